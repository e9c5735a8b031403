"""FedProto: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022, in the form
of the library HtFLlib. Clients with different networks exchange one vector for each class.

    l     = CE(o, y) + lambda MSE(r, t)     r [b, K]: what the classifier is given, o: its outputs; MSE: mean of all b K
    t_b   = P_c of the label c of sample b; r_b itself, which adds nothing, where c has no global prototype
    p_i^c = mean of r over the samples of class c in all steps of this round, before each step, in training mode
    P_c   = mean of p_i^c over the clients that sent one, each counting alike
    class of x: the nearest P_c, by Euclidean distance, among the classes that have one          `Nearest`

At the round's end all clients, selected or not, are sent the P_c, and are scored with them. They are those of this
round alone: a class that nobody sent has none. In the first round there are none, and clients train as `local` does.

Bytes, with m_i classes in the batches of client i and m classes with a global prototype (C when all are known):

    prototypes, train    4 m_i K up from each selected client         labels, train    4 m_i up
    prototypes, load     4 m K down to each client with samples       labels, load     4 m down
    the same once more, phase train, to a selected client whose last replies were missing; models never travel

Scores: the outputs are the negative distances, -infinity for a class without prototype; so `auc` is there when all are
known, and `loss` is their cross-entropy, infinite where a scored sample's class has none. A client without any global
prototype (its reply of the first round was lost) has an accuracy of 0, a loss of log C and an auc of 0.5. `eval.own`
scores by the outputs of the classifier, which is trained too.

Options of the shared laws: any partition; nothing of a model travels; cohorts as `clients.rounding` says; every client
has a model of its own, that begins where `clients.init` says; features must be of one width K (`task.feature_dim`);
`rounds` counts rounds of local training. `topology: reduce` cannot fold what differs in size: use star or collective.

How far this is certain: the steps are those of HtFLlib, from a description of its code, which forgets, as here, what an
earlier round had. The paper, from memory, weighs prototypes by samples and pulls a client's mean of a class, not each
feature.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fldist.algorithm import Algorithm, Clients, ClientScores, Me, Server, State, on_client
from fldist.data.client_data import Batch, ClientData
from fldist.data.task import Task
from fldist.kinds import Each, Labels, Prototypes, Weights
from fldist.models.evaluate import Scores
from fldist.models.layers import feature_dim, features_and_logits
from fldist.params import Params
from fldist.prototypes import Uploaded, add_rows, class_means, folds, made_up, stacked


class Nearest(nn.Module):
    """Of a classifier's module: x -> -|r - P_c| [b, C], -infinity for classes without prototype.

    prototypes [m, K] of the classes [m].
    """

    def __init__(self, module: nn.Module, prototypes: Tensor, classes: Tensor, num_classes: int) -> None:
        super().__init__()
        self.module = module
        self._prototypes = prototypes
        self._classes = classes.long()
        self._num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """x [b, ...] -> [b, C]."""
        r, _ = features_and_logits(self.module, x)
        # a matrix product would be quicker, and cancels where distances are small
        distances = torch.cdist(r, self._prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        outputs = r.new_full((len(r), self._num_classes), -math.inf)
        outputs[:, self._classes] = -distances
        return outputs


class Seen:
    """Sums by class, float64 [C, K], of the features that come batch by batch."""

    def __init__(self, num_classes: int, width: int, device: torch.device) -> None:
        self._sums = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def add(self, r: Tensor, y: Tensor) -> None:
        """Features r [b, K] of samples with labels y [b]; no gradient is kept."""
        add_rows(self._sums, y, r.detach().double())
        self._counts.add_(torch.bincount(y, minlength=len(self._counts)))

    def means(self) -> tuple[Tensor, Tensor]:
        """Means float32 [m, K] of the classes int32 [m] that have come, ascending."""
        return _present(self._sums / self._counts.clamp(min=1)[:, None], self._counts)


def of_classes(vectors: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """P: means float32 [m, K] of vectors [U, K] of classes int64 [U], and the classes int32 [m] that there are."""
    return _present(*class_means(vectors.double(), classes, num_classes))


def _present(means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of means [C, K], those of the classes that there are, and these, ascending."""
    classes = counts.nonzero().flatten()
    return means[classes].float(), classes.to(torch.int32)


def targets(r: Tensor, y: Tensor, prototypes: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """t [b, K] of features r [b, K] with labels y [b]: the label's prototype, or the feature itself; no gradient."""
    row = torch.full((num_classes,), -1, dtype=torch.int64, device=r.device)
    row[classes.long()] = torch.arange(len(classes), device=r.device)
    rows = row[y]
    return torch.where(rows[:, None] >= 0, prototypes[rows], r.detach())


def nothing(task: Task, client: int) -> tuple[Tensor, Tensor]:
    """No prototypes [0, K] of no classes; K: how many numbers a client's classifier is given for a sample."""
    return torch.zeros(0, feature_dim(task.architecture(client).template)), torch.zeros(0, dtype=torch.int32)


@dataclass(frozen=True)
class FedProto(Algorithm):
    """Clients draw their features of a class towards the mean of all clients' features of it."""

    heterogeneous: ClassVar[bool] = True
    has_global_model: ClassVar[bool] = False

    lambda_: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0  # lambda, weight of the distance to prototypes

    def check(self, task: Task) -> None:
        """Refuse models whose features differ in width, or that have no linear classifier."""
        super().check(task)
        widths = {made.name: feature_dim(made.template) for made in task.client_architectures}
        if len(set(widths.values())) > 1:
            shown = ", ".join(f"{k} in {name}" for name, k in widths.items())
            raise ValueError(
                f"clients.models: fedproto averages features, and their width differs: {shown}; set "
                f"task.feature_dim={min(widths.values())}, which brings all to one width, or choose other models"
            )

    def init_server(self, task: Task) -> State:
        """No global prototypes [0, K] yet; clients that lack those that were sent last."""
        prototypes, classes = nothing(task, 0)
        return State(prototypes=prototypes, classes=classes, behind=[])

    def init_client(self, task: Task, client: int) -> State:
        """The client's model y, and no global prototypes."""
        prototypes, classes = nothing(task, client)
        return State(y=task.init_params(client, whole=True), prototypes=prototypes, classes=classes)

    def round(self, server: Server, clients: Clients) -> None:
        """Let clients train and send their prototypes; send all of them the means."""
        task: Task = server.task
        cohort = clients.selected()
        width = server.prototypes.shape[1]
        late = set(server.behind)
        got = cohort.call(
            self.update,
            prototypes=Each({c: server.prototypes if c in late else None for c in cohort.ids}),
            classes=Each({c: server.classes if c in late else None for c in cohort.ids}),
            fold=folds(width, task.num_classes),
        )
        server.prototypes, server.classes = of_classes(*stacked(got, width), task.num_classes)
        able = clients.all().ids
        # what a client writes does not count in a round in which one of its replies was missing
        told = clients.only([c for c in able if c not in got.missing])
        loaded = told.call(self.load, prototypes=server.prototypes, classes=server.classes).clients
        server.behind = sorted(set(able) - set(loaded))
        server.log(known_classes=len(server.classes))

    def made_up(self, task: Task, client: int, method: str, field: str) -> Tensor | None:
        """Uploads have m_i prototypes."""
        width = feature_dim(task.architecture(client).template)
        return made_up(task, client, field, width) if method == "update" else None

    @on_client
    def update(self, me: Me, data: ClientData, prototypes: Prototypes | None, classes: Labels | None) -> Uploaded:
        """E epochs of local SGD on CE + lambda MSE; the means of the features on the way. prototypes: if late."""
        if prototypes is None or classes is None:
            prototypes, classes = me.prototypes, me.classes
        seen = Seen(data.task.num_classes, prototypes.shape[1], data.device)
        me.y = data.train(me.y, loss=self.loss(seen, prototypes, classes)).params
        return Uploaded(*seen.means())

    def loss(self, seen: Seen, prototypes: Tensor, classes: Tensor) -> Callable[[nn.Module, Batch], Tensor]:
        """The local loss, which adds the features of every batch to `seen`."""
        pulls = len(prototypes) > 0 and self.lambda_ > 0

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            r, outputs = features_and_logits(module, batch.x)
            seen.add(r, batch.y)
            ce: Tensor = cross_entropy(outputs, batch.y)
            if not pulls:
                return ce
            return ce + self.lambda_ * mse_loss(r, targets(r, batch.y, prototypes, classes, outputs.shape[1]))

        return loss

    @on_client
    def load(self, me: Me, data: ClientData, prototypes: Prototypes, classes: Labels) -> None:
        """Keep the global prototypes."""
        me.prototypes, me.classes = prototypes.clone(), classes.clone()

    # ---- scoring
    def personal_model(self, me: Me, data: ClientData) -> Params:
        """The client's model."""
        y: Params = me.y
        return y

    @on_client
    def evaluate_client(self, me: Me, data: ClientData, model: Weights | None) -> ClientScores:
        """Score the client's model by the nearest global prototype."""
        how = self.scoring(data.task)
        assert how.split != "auto"
        classes = data.task.num_classes
        if not len(me.prototypes):
            figures: dict[str, float] = {**dict.fromkeys(how.names, 0.0), "loss": math.log(classes), "auc": 0.5}
            scores = Scores(data.task.num_scored(data.client, how.split), figures)
        else:
            scores = data.evaluate(
                me.y, how.split, readout=lambda module: Nearest(module, me.prototypes, me.classes, classes)
            )
        return ClientScores.of(scores, how)
