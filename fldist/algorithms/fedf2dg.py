"""FedF2DG: S. Zhao, T. Liao, L. Fu, C. Chen, J. Bian, Z. Zheng, "Data-free knowledge distillation via generator-free
data generation for Non-IID federated learning", Neural Networks 179 (2024) 106627. A global model that skewed labels
have spoilt is repaired without any data: after ordinary federated rounds every client's network is inverted
(`fldist.inversion`) into images like those it was trained on, in numbers that follow its share of the data and how bad
the global model is on its images, and the global model is distilled on all of them. Rounds of hard samples follow, on
which the clients' networks and the global model disagree.

    federated     I rounds of the base algorithm; the snapshot: x and the w_i of one round
    generation    J rounds, a batch each: images x_ij of w_i with labels y_ij, and l_ij = CE( f(x, x_ij), y_ij )
    distillation  1 round: the student g begins as x; teachers are the w_i, data all x_ij
    hard          R rounds: the clients train from g, their networks are inverted against g, g is distilled
    L(x') = CE( f(w_i, x'), y ) + alpha_tv R_tv + alpha_bn R_bn + alpha_l2 |x'| + alpha_c R_comp  `inversion.objective`
            least total variation, and BatchNorm's statistics; in hard rounds R_comp: agreement of w_i and g
    N_i   = b K p_i                              in a stage's first batch; p_i = n_i / n          `nominal`
            of the K clients that have trained in the round of the snapshot, with n_i of their n samples
    N_i   = b K ( m q_i + (1 - m) p_i )          later; q = softmax(a l) of the batch before, m = 1/3
    M_ic  = floor( N_i h_i[c] / n_i )            labels; one image of its commonest class where all are 0   `quotas`
    L_KD  = lambda T^2 mean KL( softmax(f(w_i, x') / T) || softmax(f(g, x') / T) )                `kd_loss`, `distil`
            x': all images of a client shifted cyclically by one draw; the teachers' logits are calculated once

Bytes (P parameters, B float and N_c integer buffer entries, S = 4 (P + B) + 8 N_c; C classes, images of px values; M_i
images of a client and batch; everything for each client that takes part):

    kind       phase     direction  bytes
    histogram  setup     up         8 C        once
    ...        train     both       as the base algorithm, in every federated round, and in every hard round that trains
    weights    generate  down       S          generation: client, or spread: g, once in `generation` and in hard rounds
                                               unless clients have just trained from it (generation: client and
                                               student: previous)
    histogram  generate  down       8 C        a batch: the quota
    images     generate  up         4 px M_i   a batch; images_as: float16, 2 px M_i; uint8, px M_i
    scalars    generate  up         8          a batch: l_ij; 16 with images_as: uint8
    logits     generate  up         4 C M_i    a batch, with send_logits
    weights    generate  down       S          a batch, only with spread: w_i, for a host that inverts for the server
    weights    score     down       S          select: val: each federated round, every `select_every`-th epoch, and g
                                               as a hard round begins, to all who have something to score; scalars 8 up
    scalars    both      down       8          select: val with generation: client: the best round, with each model to
                                               score in federated rounds, and with each quota
    generation: server without spread: nothing but the histograms beside the base algorithm's messages.
    topology: reduce adds up at hosts, and here the server needs every model or image: use star or collective.

Options of the shared laws: any partition (published: `dirichlet_min`, alpha 0.05); all of a model travels, or its
floats (BatchNorm's statistics must); cohorts as `clients.rounding` says (published: floor); one common initial model;
`rounds` = I + J + 1 + R counts rounds of all stages, those without training too. Where there are fewer, stages are cut
short from the end: of `rounds: 2` one is federated and one generates.

How far this is certain: the paper's whole text was not at hand; the steps are those of the published code, with which
its abstract and figures agree. There rounds and epochs are chosen by accuracy on the test set (`select: best_test`),
clients train in the first hard round alone (`hard_training: first`), and an empty quota is one image of class 0.
docs/fedf2dg.md lists what else is different here.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fldist.algorithm import Clients, Me, Server, Stage, State, TooFewReplies, on_client
from fldist.blocks import version_of
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.distillation import LARGEST_LOGIT, NonNegative, Positive, Targets, distillation_loss, logits_of
from fldist.fold import Collect, Fold, collect
from fldist.inversion import Inversion, cyclic, draw, invert
from fldist.kinds import Each, Histogram, Images, Kind, Logits, Once, Scalar, Weights
from fldist.models.train import Network, Order, train
from fldist.on_top import OnTop, Watched
from fldist.params import Params
from fldist.seeding import forked, generator

STAGES = ("federated", "generation", "distillation", "hard")
ANSWERED = 256
"""Images of a pass that has no gradient."""
_HARD = STAGES.index("hard")
_MODEL = "fedf2dg-model"
_GAP = 4
"""Pixels between the cells of a picture."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[Tensor, Kind.SCALARS]
Round = Annotated[int, Kind.SCALARS]
Row = dict[str, Any]
"""Of the table of quotas: a client of a batch."""
ImageType = Literal["float32", "float16", "uint8"]

log = logging.getLogger("fldist.fedf2dg")


# ---- how many images of which labels
def nominal(
    histograms: Tensor, per_client: int, losses: Tensor | None = None, sharpness: float = 1.0, mix: float = 1 / 3
) -> Tensor:
    """N_i, float64 [K], of label counts h [K, C]: their sum is b K, b = per_client.

    losses: l_i [K] of the batch before, None where there is none; sharpness: a; mix: m, the weight of q.
    """
    sizes = histograms.double().sum(dim=1)
    shares = sizes / sizes.sum()
    if losses is not None:
        shares = mix * torch.softmax(sharpness * losses.double(), dim=0) + (1 - mix) * shares
    return per_client * len(histograms) * shares


def quotas(
    histograms: Tensor, per_client: int, losses: Tensor | None = None, sharpness: float = 1.0, mix: float = 1 / 3
) -> Tensor:
    """M_i[c], int64 [K, C]; arguments as of `nominal`. Every client has samples."""
    wanted = nominal(histograms, per_client, losses, sharpness, mix)
    sizes = histograms.double().sum(dim=1)
    counts = (histograms.double() * (wanted / sizes)[:, None] + 1e-9).floor().long()
    empty = (counts.sum(dim=1) == 0).nonzero().flatten()
    counts[empty, histograms[empty].argmax(dim=1)] = 1
    return counts


def targets(counts: Tensor) -> Tensor:
    """Labels, int64 [M], of counts [C]: the classes in ascending order, each as often as its count says."""
    return torch.arange(len(counts)).repeat_interleave(counts)


# ---- distillation
@dataclass(frozen=True)
class Kd:
    """How a student is distilled. weight: lambda; bn: of BatchNorm; reset: begin each epoch with no momentum."""

    epochs: int = 30
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 256
    temperature: float = 3.0
    weight: float = 1e-3
    bn: Literal["train", "eval"] = "train"
    reset: bool = True


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0, weight: float = 1e-3) -> Tensor:
    """L_KD of logits [B, C]; its gradient is lambda T (softmax(student / T) - softmax(teacher / T)) / B."""
    return weight * distillation_loss(student, teacher, temperature)


def distil(network: Network, x: Tensor, teacher: Tensor, how: Kd, order: Order) -> Iterator[int]:
    """Train the network on images x [N, ...] towards logits [N, C]; gives each epoch's number, from 1, at its end.

    SGD with Nesterov's momentum on mini-batches. ValueError for a network that was not made for what `how.bn` says.
    """
    if (network.batch_norm == "batch") != (how.bn == "train"):
        raise ValueError(f"bn: {how.bn}, and the network was made for batch_norm {network.batch_norm!r}")
    aims = Targets(teacher, how.temperature, x.device)

    def loss(rows: Tensor) -> Tensor:
        rows = rows.to(x.device)
        return how.weight * aims.loss(network.module(x.index_select(0, rows)), rows)

    optimizer: torch.optim.Optimizer | None = None
    for epoch in range(1, how.epochs + 1):
        if optimizer is None or how.reset:
            nesterov = how.momentum > 0
            optimizer = torch.optim.SGD(network.weights, how.lr, how.momentum, 0.0, how.weight_decay, nesterov)
        train([network], loss, [optimizer], epochs=1, order=order)
        yield epoch


# ---- what travels
class Counted(NamedTuple):
    """A client's labels."""

    h: Histogram  # int64 [C]


class Made(NamedTuple):
    """A client's images of a batch."""

    x: Images  # [M, ch, h, w], as `images_as` says
    span: Range | None  # uint8: float32 [2], what 0 and 255 stand for
    loss: Scalar  # l_ij
    logits: Logits | None  # float32 [M, C] of the client's network on the images shifted, with send_logits


class Scored(NamedTuple):
    """How a model does on a client's validation samples."""

    accuracy: Scalar


def encoded(x: Tensor, how: ImageType) -> tuple[Tensor, Tensor | None]:
    """Images as they travel, and for uint8 float32 [2], what 0 and 255 stand for: their least and largest value."""
    if how != "uint8":
        return x.to(getattr(torch, how)), None
    low, high = torch.aminmax(x)
    scale = ((high - low) / 255).clamp(min=1e-30)
    return ((x - low) / scale).round().clamp(0, 255).to(torch.uint8), torch.stack([low, high])


def decoded(x: Tensor, span: Tensor | None) -> Tensor:
    """Images, float32, of what `encoded` made."""
    if span is None:
        return x.float()
    return span[0] + x.float() * ((span[1] - span[0]) / 255).clamp(min=1e-30)


@dataclass(frozen=True)
class FedF2dg(OnTop):
    """A base algorithm; model inversion; distillation; hard samples."""

    stage_fields: ClassVar[Mapping[str, str | None]] = {
        **dict.fromkeys(("per_client", "inversion", "sharpness", "mix", "images_as", "spread"), "generation"),
        **dict.fromkeys(("kd_epochs", "kd_lr", "kd_momentum", "kd_weight_decay", "kd_batch_size"), "distillation"),
        **dict.fromkeys(("kd_temperature", "kd_lambda", "kd_bn", "kd_reset", "select_every"), "distillation"),
        **dict.fromkeys(("alpha_c_hard", "hard_batches", "hard_training", "student"), "hard"),
        **dict.fromkeys(("batches", "hard_rounds", "show"), None),
    }

    generation: Literal["server", "client"] = "server"  # where networks are inverted
    spread: bool = False  # generation: server gives the work to the clients' hosts, with the networks
    send_logits: bool = False  # generation: client sends the teachers' logits, and the server keeps no client's model
    images_as: ImageType = "float32"  # type of the images, on the wire and in the distillation
    select: Literal["last", "val", "best_test"] = "last"  # of rounds (federated) and of epochs of distillations
    select_every: Count = 1  # score every n-th epoch of a distillation and the last one
    batches: Count = 10  # J, batches of common samples
    per_client: Count = 256  # b, images of a client and batch in the mean
    inversion: Inversion = field(default_factory=Inversion)  # steps, lr, alpha_tv, alpha_l2, alpha_bn, alpha_c ...
    sharpness: NonNegative = 1.0  # a, how sharply quotas follow losses
    mix: Share = 1 / 3  # m, share of the quotas that follows losses
    hard_rounds: Annotated[int, Field(ge=0)] = 10  # R, rounds of hard samples
    hard_batches: Count = 1  # batches of a hard round
    alpha_c_hard: NonNegative = 10.0  # weight of the competition in hard rounds
    hard_training: Literal["every", "first"] = "every"  # hard rounds in which the clients train
    student: Literal["previous", "aggregate"] = "previous"  # what a hard round distils: g, or the base's new model
    kd_epochs: Annotated[int, Field(ge=0)] = 30  # of a distillation
    kd_lr: Positive = 0.01  # learning rate of the distillations
    kd_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # Nesterov's
    kd_weight_decay: NonNegative = 1e-4  # on all parameters
    kd_batch_size: Count = 256  # images of a mini-batch
    kd_temperature: Positive = 3.0  # T of the distillations
    kd_lambda: NonNegative = 1e-3  # lambda, weight of their loss
    kd_bn: Literal["train", "eval"] = "train"  # eval: the student goes by its running statistics, and keeps them
    kd_reset: bool = True  # begin each epoch with no momentum
    show: Annotated[int, Field(ge=0)] = 20  # clients of which a picture shows four images of each class

    # ---- what there must be
    def check(self, task: Task) -> None:
        """Refuse a base without models to invert, networks without BatchNorm, and choices that cannot be made."""
        if task.dataset.kind == "tokens":
            raise ValueError("algorithm: fedf2dg makes images, and the samples are tokens; choose a data set of images")
        super().check(task)
        held = self.base.init_server(task).values.keys() | self.base.init_client(task, 0).values.keys()
        taken = sorted(held & {*self.own_server_state(task), "models", "begun_anew"})
        if taken:
            raise ValueError(f"algorithm.base: a state of it is called {taken[0]!r}, as one of fedf2dg's; rename it")
        norm = any(isinstance(layer, nn.BatchNorm2d) for layer in task.architecture().template.modules())
        if not norm and self.inversion.alpha_bn:
            raise ValueError(
                f"task.model: {task.architecture().name} has no BatchNorm, whose statistics its images would be made "
                "to match; use one that has, such as cnn_bn or resnet18_32, or set algorithm.inversion.alpha_bn to 0"
            )
        if norm and task.travel == "params":
            raise ValueError(
                "task.travel: params leaves out BatchNorm's statistics, which the images are made to match; use all or "
                "floats"
            )
        if norm and self.kd_bn == "train" and self.kd_batch_size == 1:
            raise ValueError(
                "algorithm.kd_batch_size: BatchNorm cannot train on batches of 1; raise it, or kd_bn: eval"
            )
        if self.send_logits and self.generation == "server":
            raise ValueError(
                "algorithm.send_logits: the server has the models and needs no logits; use generation: client"
            )
        if self.spread and self.generation == "client":
            raise ValueError("algorithm.spread: clients invert their networks themselves; use generation: server")
        self.check_choice(task)

    def check_choice(self, task: Task) -> None:
        """Refuse a choice of rounds and epochs that cannot be made, and say when it is made on the test set."""
        if self.select == "val" and not any(task.count(k, "val") for k in range(task.num_clients)):
            raise ValueError("algorithm.select: val needs validation samples at the clients; raise task.split.val")
        if self.select == "best_test":
            if not task.num_test:
                raise ValueError("algorithm.select: best_test needs a global test set; use last or val")
            if self.generation == "client":
                raise ValueError(
                    "algorithm.select: with best_test clients never learn which of their models counts; use last, val, "
                    "or generation: server"
                )
            task.notes.append(
                "algorithm.select: best_test chooses on the test set: say so wherever you give accuracies"
            )

    @property
    def stateful(self) -> bool:
        """Whether clients keep a state: the base's, or models to invert."""
        return self.base.stateful or self.generation == "client"

    @property
    def kd(self) -> Kd:
        """How students are distilled."""
        return Kd(
            epochs=self.kd_epochs,
            lr=self.kd_lr,
            momentum=self.kd_momentum,
            weight_decay=self.kd_weight_decay,
            batch_size=self.kd_batch_size,
            temperature=self.kd_temperature,
            weight=self.kd_lambda,
            bn=self.kd_bn,
            reset=self.kd_reset,
        )

    # ---- states and stages
    def own_server_state(self, task: Task) -> dict[str, Any]:
        """histograms: of all clients [K, C]; members, models: the snapshot's clients and their w_i; snapshot: its
        round; best: the best snapshot so far, where rounds are chosen; losses: l_i by client; pool: the batches of
        images that are to be distilled; begun_anew: whether the base has, as it does with the hard rounds."""
        histograms = torch.zeros(task.num_clients, task.num_classes, dtype=torch.int64)
        begins = {"members": [], "models": {}, "snapshot": 0, "best": None, "losses": {}, "pool": []}
        return {"histograms": histograms, **begins, "begun_anew": False}

    def init_server(self, task: Task) -> State:
        """The base's state and `own_server_state`."""
        return State(**self.base.init_server(task).values, **self.own_server_state(task))

    def init_client(self, task: Task, client: int) -> State:
        """The base's state; with generation: client also the client's models after training, by round."""
        mine = State(**self.base.init_client(task, client).values, begun_anew=False)
        if self.generation == "client":
            mine.models = {}
        return mine

    def stages(self, rounds: int) -> list[Stage]:
        """I = rounds - J - 1 - R rounds of training, at least one; then each stage as long as rounds are left."""
        first = max(1, rounds - self.batches - 1 - self.hard_rounds)
        left, lengths = rounds, []
        for wanted in (first, self.batches, 1, self.hard_rounds):
            lengths.append(min(wanted, left))
            left -= lengths[-1]
        whole = first + self.batches + 1 + self.hard_rounds
        federated = functools.partial(
            self.federated, last=first, short=f"{rounds} of {whole}" if rounds < whole else ""
        )
        steps: list[Callable[[Any, Any], None]] = [federated, self.common, self.distillation, self.hard]
        return [Stage(name, n, step) for name, n, step in zip(STAGES, lengths, steps, strict=True)]

    # ---- the server
    def setup(self, server: Server, clients: Clients) -> None:
        """Ask every client for its label counts."""
        shape = (server.task.num_classes,)
        fold: dict[str, Fold] = {"h": Collect(shape=shape, dtype="int64", not_negative=True)}
        got = clients.all().call(self.histogram, fold=fold)
        histograms = server.histograms.clone()
        for k in got.clients:
            histograms[k] = got.h[k]
        server.histograms = torch.from_numpy(server.task.label_counts()) if server.predicting else histograms

    def federated(self, server: Server, clients: Clients, last: int, short: str) -> None:
        """A round of the base algorithm; the last of them takes the snapshot, or the best one."""
        if short and server.round == 1:
            server.warn(f"rounds: {short} that all stages of fedf2dg need: the last stages are cut short")
        ends = server.round == last or server.predicting  # predictions see the first round of each stage
        watched = self.train(server, clients, keeps=self.keeps_models and (ends or self.select != "last"))
        if self.select == "last":
            if ends:
                self.take(server, watched)
            return
        score = self.scored(server, clients, server.x, "federated")
        server.log(selection=score)
        if server.best is None or score >= server.best["score"]:
            server.best = {
                "score": score,
                "round": server.round,
                "x": server.x,
                "members": watched.members,
                "models": watched.models,
            }
        if ends:
            self.take_best(server)

    @property
    def keeps_models(self) -> bool:
        """Whether the server needs clients' models: to invert them, or as teachers."""
        return not (self.generation == "client" and self.send_logits)

    def take(self, server: Server, watched: Watched) -> None:
        """Make a round's models the snapshot."""
        server.members, server.models, server.snapshot = watched.members, watched.models, server.round

    def take_best(self, server: Server) -> None:
        """Make the best round the snapshot."""
        best, server.best = server.best, None
        server.x, server.snapshot = best["x"], best["round"]
        server.members, server.models = best["members"], best["models"]
        server.log(snapshot=server.snapshot)

    def common(self, server: Server, clients: Clients) -> None:
        """A batch of common samples."""
        if not server.members:  # the last federated round was void
            if server.best is not None:
                self.take_best(server)
            else:
                self.take(server, self.train(server, clients, keeps=self.keeps_models))
        self.tell(server, self.generate_images(server, clients, server.x, self.inversion))

    def distillation(self, server: Server, clients: Clients) -> None:
        """Distil x on all images."""
        if not server.pool:
            server.warn("there are no images to distil: no round of generation was committed; the model stays")
            return
        server.x = self.distilled(server, clients, server.x, [])
        server.pool, server.members, server.models = [], [], {}

    def hard(self, server: Server, clients: Clients) -> None:
        """Train the clients from g, invert their networks against it, distil it."""
        student: Params = server.x
        server.pool = []
        fresh = not server.begun_anew
        if fresh:
            begins = self.base.init_server(server.task).values
            for name in begins.keys() - {"x"}:
                setattr(server, name, begins[name])
            server.begun_anew, server.losses = True, {}
        if fresh or self.hard_training == "every":
            known = self.generation == "client" and self.student == "previous"
            once = (_MODEL, self.version(server, student)) if known else None
            self.take(server, self.train(server, clients, keeps=self.keeps_models, once=once))
        if self.student == "aggregate":
            student = server.x
        how = dataclasses.replace(self.inversion, alpha_c=self.alpha_c_hard)
        rows: list[Row] = []
        for batch in range(self.hard_batches):
            rows += self.generate_images(server, clients, student, how, batch)
        self.tell(server, rows)
        server.x = self.distilled(server, clients, student, [student])
        server.pool = []
        if self.hard_training == "every":
            server.members, server.models = [], {}

    # ---- images
    def generate_images(self, server: Server, clients: Clients, g: Params, how: Inversion, batch: int = 0) -> list[Row]:
        """Add a batch of images of the snapshot's networks to the pool; g is what is to be distilled on them.

        batch: which one of the round, from 0. Returns the rows of the table of quotas.
        """
        histograms = server.histograms
        ids = [k for k in server.members if int(histograms[k].sum())]
        if not ids:
            raise TooFewReplies("generate", dict.fromkeys(server.members, "lost: its label counts never came"))
        losses = known_losses(server.losses, ids)
        counts = quotas(histograms[ids], self.per_client, losses, self.sharpness, self.mix)
        wanted = dict(zip(ids, counts, strict=True))
        if losses is None and self.per_client > 1 and int(counts.sum(dim=1).max()) == 1:
            server.warn("algorithm.per_client: every quota is empty, and each client makes one image; raise it")
        here = self.generation == "server" and not self.spread
        make = self.made_here if here else self.made_by_clients
        made = make(server, clients, wanted, g, how, batch)
        server.losses = {k: reply.loss for k, reply in made.items()}
        images = {
            k: {"x": reply.x, "span": reply.span, "y": targets(wanted[k]), "logits": reply.logits}
            for k, reply in made.items()
        }
        server.pool = [*server.pool, images]
        self.picture(server, images)
        return [
            {
                "batch": len(server.pool),
                "client": k,
                "samples": int(histograms[k].sum()),
                "images": int(wanted[k].sum()),
                "loss": made[k].loss if k in made else "",
                **{f"class_{c}": n for c, n in enumerate(wanted[k].tolist())},
            }
            for k in ids
        ]

    def tell(self, server: Server, rows: list[Row]) -> None:
        """Put a round's quotas into its table, and what was made of them into its log."""
        server.table(quotas=rows)
        made = [row for row in rows if row["loss"] != ""]
        losses = [row["loss"] for row in made]
        server.log(images=sum(row["images"] for row in made), generation_loss=sum(losses) / len(losses))

    def made_here(
        self, server: Server, clients: Clients, wanted: Mapping[int, Tensor], g: Params, how: Inversion, batch: int
    ) -> dict[int, Made]:
        """Invert clients' networks at the server, to images of these counts; who is missing was not finite."""
        task: Task = server.task
        made: dict[int, Made] = {}
        for k, counts in wanted.items():
            if server.predicting:
                made[k] = Made(torch.zeros(int(counts.sum()), *task.shape), None, 0.0, None)
                continue
            # what `data.streams` gives a client that does this itself
            rng = generator(task.seed, "inversion", server.round, k, batch)
            reply = self.made(task, server.models[k], g, counts, how, rng, None)
            if all_finite(reply):
                made[k] = reply
            else:
                server.warn(f"client {k}: its images were not finite, twice; its network is left out")
        if not made:
            raise TooFewReplies("generate", dict.fromkeys(wanted, "refused: x: nan: its images were not finite, twice"))
        return made

    def made_by_clients(
        self, server: Server, clients: Clients, wanted: Mapping[int, Tensor], g: Params, how: Inversion, batch: int
    ) -> dict[int, Made]:
        """Have the networks inverted where the clients are."""
        task: Task = server.task
        arguments: dict[str, Any] = {
            "g": Once(g, self.version(server, g), name=_MODEL),
            "snapshot": server.snapshot if self.select == "val" and self.generation == "client" else None,
        }
        made: dict[int, Made] = {}
        # a prediction must be told how many images each client makes
        for ids in [[k] for k in wanted] if server.predicting else [list(wanted)]:
            m = int(wanted[ids[0]].sum()) if server.predicting else None
            fold: dict[str, Fold] = {
                "x": Collect(shape=(m, *task.shape), dtype=self.images_as),
                "span": Collect(shape=(2,)) if self.images_as == "uint8" else collect(),
                "logits": Collect(shape=(m, task.num_classes), limit=LARGEST_LOGIT) if self.send_logits else collect(),
            }
            got = clients.only(ids).call(
                self.generate,
                fold=fold,
                w=Each({k: server.models[k] for k in ids}) if self.spread else None,
                quota=Each({k: wanted[k] for k in ids}),
                **arguments,
            )
            for k in got.clients:
                reply = Made(got.x[k], got.span[k], got.loss[k], got.logits[k])
                n = int(wanted[k].sum())
                if len(reply.x) == n and (reply.logits is None or len(reply.logits) == n):
                    made[k] = reply
                else:
                    server.warn(f"client {k}: it made {len(reply.x)} images of {n}; its network is left out")
        if not made:
            raise TooFewReplies("generate", dict.fromkeys(wanted, "refused: x: shape: not as many as it was to make"))
        return dict(sorted(made.items()))

    def version(self, server: Server, g: Params) -> int:
        """Of a model that is to be distilled, for `Once`; in predictions, where models stay, new in each hard round."""
        return (server.round if server.begun_anew else 0) if server.predicting else version_of(g.floats)

    def made(
        self,
        task: Task,
        w: Params,
        g: Params,
        counts: Tensor,
        how: Inversion,
        rng: torch.Generator,
        shift: tuple[int, int] | None,
    ) -> Made:
        """Images of a network w as `images_as` says, l_i of g on them, and w's logits on them shifted, if so.

        Those that are not finite are made again, once, from other noise.
        """
        u, student = task.frozen_copy(w), task.frozen_copy(g)
        y = targets(counts).to(task.device)
        reply = self.made_once(task, u, student, y, how, rng, shift)
        if not all_finite(reply):
            log.warning("a network's images are not finite; they are made again, from other noise")
            reply = self.made_once(task, u, student, y, how, rng, shift)
        return reply

    def made_once(
        self,
        task: Task,
        u: nn.Module,
        student: nn.Module,
        y: Tensor,
        how: Inversion,
        rng: torch.Generator,
        shift: tuple[int, int] | None,
    ) -> Made:
        """The same of networks and targets, whether finite or not."""
        x0, shifts = draw(rng, len(y), task.shape, how)
        images = invert(u, student if how.alpha_c else None, y, x0.to(task.device), shifts, how)
        x, span = encoded(images, self.images_as)
        seen = decoded(x, span)
        loss = float(cross_entropy(logits_of(student, seen, ANSWERED).double(), y))
        logits = None if shift is None else logits_of(u, cyclic(seen, shift), ANSWERED).cpu()
        return Made(x.cpu(), None if span is None else span.cpu(), loss, logits)

    def shift(self, task: Task, number: int, client: int) -> tuple[int, int]:
        """How far a client's images are shifted in a distillation; number: 0 of common samples, else the round."""
        most = self.inversion.jitter
        rng = generator(task.seed, "distillation-shift", number, client)
        down, right = torch.randint(-most, most + 1, (2,), generator=rng).tolist()
        return down, right

    def picture(self, server: Server, batch: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep a picture of a batch: a row for each client, a column for each class, four images of each."""
        task: Task = server.task
        shown = list(batch)[: self.show]
        if not shown or task.shape[0] not in (1, 3):
            return
        channels, height, width = task.shape
        high, wide = 2 * height + _GAP, 2 * width + _GAP
        sheet = torch.ones(channels, len(shown) * high - _GAP, task.num_classes * wide - _GAP)
        for row, k in enumerate(shown):
            x, y = task.unit(decoded(batch[k]["x"], batch[k]["span"])), batch[k]["y"]
            for c in y.unique().tolist():
                for i, image in enumerate(x[y == c][:4]):
                    top, left = row * high + i // 2 * height, c * wide + i % 2 * width
                    sheet[:, top : top + height, left : left + width] = image
        server.images(**{f"batch-{len(server.pool)}": sheet})

    # ---- distillation
    def distilled(self, server: Server, clients: Clients, start: Params, candidates: Sequence[Params]) -> Params:
        """The student that begins as `start` and is distilled on the pool, or the best of its epochs.

        candidates: what competes with the epochs, where these are chosen.
        """
        task: Task = server.task
        if server.predicting:
            elections = len(candidates) + math.ceil(self.kd_epochs / self.select_every)
            for _ in range(elections if self.select == "val" else 0):
                self.scored(server, clients, start, "distillation")
            return start
        x, y, teacher = self.pooled(server, server.round if server.begun_anew else 0)
        best, chosen, at = -math.inf, start, 0
        if self.select != "last":
            for model in candidates:
                best = self.scored(server, clients, model, "distillation")
        alone = task.architecture().batch_norm and self.kd_bn == "train"  # on one image BatchNorm cannot train
        order = Order(len(x), self.kd.batch_size, generator(task.seed, "distillation", server.round), no_single=alone)
        with task.network(start, batch_norm="batch" if self.kd_bn == "train" else "running") as network:
            for epoch in distil(network, x, teacher, self.kd, order):
                if self.select != "last" and (epoch % self.select_every == 0 or epoch == self.kd_epochs):
                    model = network.params.restricted(task.travel).clone()
                    score = self.scored(server, clients, model, "distillation")
                    if score >= best:
                        best, chosen, at = score, model, epoch
        if self.select == "last":
            chosen = network.params.restricted(task.travel)
        elif math.isfinite(best):
            server.log(selection=best, epoch=at)
        if not bool(chosen.floats.isfinite().all()):
            server.warn("the distilled model is not finite and not taken; lower algorithm.kd_lr or kd_lambda")
            return start
        before = logits_of(task.frozen_copy(start), x, ANSWERED)
        server.log(teacher_accuracy=accuracy_of(teacher, y), before_accuracy=accuracy_of(before, y))
        if task.num_test:
            server.log(student_accuracy=task.evaluate(chosen).accuracy)
        return chosen

    def pooled(self, server: Server, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """All images shifted [N, ...], their labels [N] and their teachers' logits [N, C], client after client."""
        task: Task = server.task
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        logits: list[Tensor] = []
        for k in sorted({k for batch in server.pool for k in batch}):
            shift = self.shift(task, number, k)
            teacher = task.frozen_copy(server.models[k]) if k in server.models else None
            for batch in server.pool:
                if k not in batch:
                    continue
                span = None if batch[k]["span"] is None else batch[k]["span"].to(task.device)
                x = cyclic(decoded(batch[k]["x"].to(task.device), span), shift)
                xs.append(x)
                ys.append(batch[k]["y"])
                if teacher is not None:
                    logits.append(logits_of(teacher, x, ANSWERED))
                else:
                    logits.append(batch[k]["logits"].to(task.device))
        return torch.cat(xs), torch.cat(ys).to(task.device), torch.cat(logits)

    # ---- choosing
    def scored(self, server: Server, clients: Clients, model: Params, stage: str) -> float:
        """How good a model is by what `select` says: in 0..1."""
        task: Task = server.task
        if self.select == "best_test":
            return 0.0 if server.predicting else float(task.evaluate(model).accuracy)
        counts = {k: task.count(k, "val") for k in clients.all().ids}
        best: int | None = None
        if stage == "federated" and self.generation == "client":
            best = server.best["round"] if server.best is not None else 0
        # who has nothing to score still must know which of its models counts
        ids = [k for k, n in counts.items() if n or best is not None]
        got = clients.only(ids).call(self.score, x=model, best=best)
        scored = [k for k in got.clients if counts[k]]
        if not scored:
            raise TooFewReplies("score", got.missing)
        return sum(counts[k] * float(got.accuracy[k]) for k in scored) / sum(counts[k] for k in scored)

    # ---- clients
    def before_training(self, me: Me, data: ClientData) -> None:
        """Begin the base's state anew with the hard rounds."""
        if me.stage == _HARD and self.base.stateful and not me.begun_anew:
            with forked(data.task.seed, "init_client", data.client):
                begins = self.base.init_client(data.task, data.client)
            for name, value in begins.values.items():
                setattr(me, name, value)
            me.begun_anew = True

    def after_training(self, me: Me, data: ClientData, model: Params) -> None:
        """Keep the model that may be inverted; where rounds are chosen, the older ones until `score` tells the best."""
        if self.generation == "client":
            older = me.models if self.select == "val" and me.stage != _HARD else {}
            me.models = {**older, data.round: model}

    @on_client
    def histogram(self, me: Me, data: ClientData) -> Counted:
        """The client's label counts."""
        return Counted(torch.bincount(data.y, minlength=data.task.num_classes).cpu())

    @on_client
    def score(self, me: Me, data: ClientData, x: Weights, best: Round | None) -> Scored:
        """The accuracy of a model on the client's validation samples; best: the best round before this one."""
        if best is not None and any(t not in (best, data.round) for t in me.models):
            me.models = {t: model for t, model in me.models.items() if t in (best, data.round)}
        return Scored(data.evaluate(x, "val").accuracy)

    @on_client
    def generate(
        self, me: Me, data: ClientData, w: Weights | None, g: Weights, quota: Histogram, snapshot: Round | None
    ) -> Made:
        """Images of the client's network; w: that which is given in its place; snapshot: the round that it is of."""
        task = data.task
        if w is None:
            w = me.models[max(me.models) if snapshot is None else snapshot]
        hard = me.stage == _HARD
        how = dataclasses.replace(self.inversion, alpha_c=self.alpha_c_hard) if hard else self.inversion
        shift = self.shift(task, data.round if hard else 0, data.client) if self.send_logits else None
        return self.made(task, w, g, quota, how, data.streams.generator("inversion"), shift)


def known_losses(losses: Mapping[int, float], ids: Sequence[int]) -> Tensor | None:
    """l_i, float64 [K], of these clients; who has none, or none that is finite, is given the others' mean."""
    told = torch.tensor([losses.get(k, math.nan) for k in ids], dtype=torch.float64)
    finite = told.isfinite()
    return torch.where(finite, told, told[finite].mean()) if finite.any() else None


def accuracy_of(logits: Tensor, y: Tensor) -> float:
    """The share of rows [N, C] whose largest entry is the label's, y [N]."""
    return float((logits.argmax(dim=1) == y).double().mean())


def all_finite(reply: Made) -> bool:
    """Whether a batch has no image with NaN or infinity."""
    return bool((reply.x if reply.span is None else reply.span).isfinite().all())
