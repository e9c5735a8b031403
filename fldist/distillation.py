"""Distillation of logits, and the base of algorithms whose clients and server teach each other by them.

    e   = sum_k w_k f_k(x)        w_k = n_k / sum_j n_j over the clients that answered           `ensemble`
    L_f = tau^2 mean_i KL( softmax(e_i / tau) || softmax(f(x_i) / tau) )                         `distillation_loss`

e are logits [N, C] of N samples that all clients answered, whatever networks they have. The server's model and, with e
back at the clients, theirs make full-batch steps on L_f. Which samples, and how they come to be known, is the business
of `algorithms/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from fldist.algorithm import Algorithm, Cohort, Me, Server, State, TooFewReplies, on_client
from fldist.data.client_data import ClientData
from fldist.data.task import Architecture, Task
from fldist.kinds import Scalar
from fldist.models.train import LocalTraining, Network, Order, train
from fldist.params import Params

Optimizer = Literal["adam", "sgd"]
BatchNorm = Literal["batch", "running"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

LARGEST_LOGIT = 2.0**16
"""Answers beyond it are refused; the mean of ten is right within 1e-13 where all clients answer."""
_PUBLISHED_BATCH = 256
_MAPPED = 32 * 2**20


def ensemble(
    logits: Mapping[int, Any], weights: Mapping[int, float], decode: Callable[[Any], Tensor] = lambda held: held
) -> Tensor:
    """e, float64: the mean of the clients' logits (of one shape) with these weights, added in the clients' order.

    decode: makes logits of what is held of a client, one client at a time.
    """
    total = sum(weights[k] for k in logits)
    mean: Tensor | None = None
    for k in sorted(logits):
        part = decode(logits[k]).double() * (weights[k] / total)
        mean = part if mean is None else mean.add_(part)
    if mean is None:
        raise ValueError("an ensemble needs the logits of at least one client")
    return mean


class Targets:
    """What is to be distilled, computed once for all steps: softmax(e / tau) of logits e [N, C], and its logarithm."""

    def __init__(
        self, e: Tensor, tau: float, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        logs = log_softmax(e.double() / tau, dim=1)
        self.tau = tau
        self._p = logs.exp().to(device, dtype)  # [N, C]
        self._log_p = logs.to(device, dtype)

    def loss(self, student: Tensor, rows: Tensor | None = None) -> Tensor:
        """L_f of the student's logits [N, C], or of those [b, C] on the samples `rows` [b]."""
        p, log_p = self._p, self._log_p
        if rows is not None:
            p, log_p = p.index_select(0, rows), log_p.index_select(0, rows)
        return (p * (log_p - log_softmax(student / self.tau, dim=1))).sum() * (self.tau**2 / len(p))


def distillation_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """L_f of two sets of logits [N, C]: at least 0, and 0 where they differ by a constant in each row."""
    return Targets(teacher, tau, student.device, student.dtype).loss(student)


def make_optimizer(kind: Optimizer, lr: float, network: Network) -> torch.optim.Optimizer:
    """Adam (betas 0.9 and 0.999), or SGD with momentum 0.9 and weight decay 5e-4."""
    if kind == "adam":
        return LocalTraining(optimizer="adam", lr=lr).make_optimizer(network.weights)
    return LocalTraining(lr=lr, momentum=0.9, weight_decay=5e-4).make_optimizer(network.weights)


def distil(
    network: Network,
    x: Tensor,
    targets: Targets,
    *,
    steps: int,
    lr: float,
    optimizer: Optimizer = "adam",
    cosine_over: int | None = None,
    after_step: Callable[[], None] | None = None,
) -> float:
    """Full-batch steps of a network on samples x [N, ...]; the loss before the last of them, NaN without steps.

    The learning rate of step s = 1, 2 ... is lr (1 + cos(pi (s - 1) / T)) / 2 with T = cosine_over, or `steps`.
    """
    schedule = LocalTraining(lr=lr, schedule="cosine", epochs=1)
    over = cosine_over or steps
    made = make_optimizer(optimizer, lr, network)

    def before_epoch(number: int) -> None:
        for group in made.param_groups:
            group["lr"] = schedule.lr_at(1, number, over)

    progress = train(
        [network],
        lambda rows: targets.loss(network.module(x)),
        [made],
        epochs=steps,
        order=Order(len(x), len(x), None),
        before_epoch=before_epoch,
        after_step=after_step,
    )
    return progress.last_loss


class PublishedScores:
    """Accuracy as published: after each step on the whole global test set, by the statistics of its batches of 256,
    which also move the running ones; the mean of the batches' accuracies, and the best of all steps in two decimals."""

    def __init__(self, network: Network, task: Task) -> None:
        self.best = float("nan")
        self._network = network
        self._task = task

    def __call__(self) -> None:
        """Score the network as it is now; it is in training mode afterwards, as its training has it."""
        shares = []
        self._network.module.train()
        with torch.no_grad():
            for x, y in self._task.test_batches(_PUBLISHED_BATCH):
                shares.append(float((self._network.module(x).argmax(dim=1) == y).double().mean()))
        self._network.train()
        score = round(sum(shares) / len(shares), 2)
        self.best = score if self.best != self.best else max(self.best, score)


@functools.lru_cache(maxsize=64)
def comfortable(made: Architecture, sample: tuple[int, ...]) -> int:
    """How many samples of this shape a CPU answers at once: as many as keep each layer's output below 32 MiB.

    glibc fetches larger blocks from the system anew, page by page, at every layer: a third of the time of a ResNet-18.
    """
    largest = 1

    def look(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    with torch.no_grad(), made.module() as module:
        made.initial.clone().to(made.device).bind(module)
        handles = [layer.register_forward_hook(look) for layer in module.modules()]
        module.eval()(torch.zeros(1, *sample, device=made.device))
        for handle in handles:
            handle.remove()
    return max(1, (_MAPPED - 1) // largest)


def logits_of(module: nn.Module, x: Tensor, chunk: int = 0) -> Tensor:
    """f(x) [N, C] for samples x [N, ...], without a graph, in passes of `chunk` samples (0: one)."""
    with torch.no_grad():
        if not 0 < chunk < len(x):
            return module(x)  # type: ignore[no-any-return]
        # clones: a slice's address could change the bits of a matrix product
        return torch.cat([module(part.clone()) for part in x.split(chunk)])  # type: ignore[no-untyped-call]


class Published(NamedTuple):
    """A client's accuracy as it was published, after a distillation."""

    accuracy: Scalar


@dataclass(frozen=True)
class Distilling(Algorithm):
    """Base: a global model at the server, a model of its own at every client, whatever its architecture; neither ever
    travels. A subclass's `round` trains the clients (`train`), has them answer, and distils."""

    heterogeneous: ClassVar[bool] = True

    tau: Positive = 5.0  # tau, temperature of the distillations
    ensemble_weights: Literal["samples", "uniform"] = "samples"  # of the clients' logits: training samples, or alike
    server_steps: Count = 10  # E2, distillation steps of the global model in a round
    server_lr: Positive = 0.01  # its learning rate; anneals to 0 along a cosine
    client_steps: Count = 10  # E3, distillation steps of each client's model in a round
    client_lr: Positive | None = None  # its learning rate (none: local.lr)
    client_cosine_over: Annotated[int, Field(ge=1)] | None = None  # steps that its cosine spans (none: client_steps)
    optimizer: Optimizer = "adam"  # of all distillations; new in each round. sgd: momentum 0.9, weight decay 5e-4
    distil_batch_norm: BatchNorm = "running"  # of the clients' BatchNorm in distillation; running: left as it is
    query_batch_norm: BatchNorm = "running"  # of clients that answer; batch: training mode (published with FedZGE)
    query_chunk: Count = 0  # most samples of a forward pass of an answer; 0: as is fastest on a CPU, all on a GPU
    published_scores: bool = False  # log accuracies as published: best of steps, by batch statistics, which they move

    def check(self, task: Task) -> None:
        """Refuse scores as published without a test set, and where they would change a run."""
        if self.published_scores and not task.num_test:
            raise ValueError("algorithm.published_scores: there is no global test set; set it to false")
        norm = any(made.batch_norm for made in task.architectures)
        if self.published_scores and norm and "running" in (self.distil_batch_norm, self.query_batch_norm):
            raise ValueError(
                "algorithm.published_scores: such scores move BatchNorm's running statistics on test data, by which "
                "clients would then answer; set distil_batch_norm and query_batch_norm to batch, or it to false"
            )

    def init_server(self, task: Task) -> State:
        """The global model x."""
        return State(x=task.init_params(whole=True))

    def init_client(self, task: Task, client: int) -> State:
        """The client's model y."""
        return State(y=task.init_params(client, whole=True))

    def personal_model(self, me: Me, data: ClientData) -> Params:
        """The client's model."""
        y: Params = me.y
        return y

    @on_client
    def train(self, me: Me, data: ClientData) -> None:
        """E1 epochs on the client's samples, as configured under `local`."""
        me.y = data.train(me.y).whole

    @property
    def weighed_by(self) -> str | None:
        """The reply field by which answers are weighed."""
        return "n" if self.ensemble_weights == "samples" else None

    def teach_server(self, server: Server, x: Tensor, e: Tensor) -> None:
        """E2 steps of the global model on samples x [N, ...] with targets e [N, C]; logs their loss."""
        if server.predicting:
            return
        task: Task = server.task
        with task.network(server.x) as network:
            scores = PublishedScores(network, task) if self.published_scores else None
            loss = distil(
                network,
                x.to(task.device),
                Targets(e, self.tau, task.device),
                steps=self.server_steps,
                lr=self.server_lr,
                optimizer=self.optimizer,
                after_step=scores,
            )
        server.x = network.params
        server.log(distillation_loss=loss)
        if scores is not None:
            server.log(published_accuracy=scores.best)

    @contextmanager
    def answering(self, me: Me, data: ClientData) -> Iterator[Callable[[Tensor], Tensor]]:
        """The client's model, as samples [N, ...] -> logits [N, C]."""
        task = data.task
        if self.query_batch_norm == "running":
            with task.architecture(data.client).module() as module:
                chunk = self.query_chunk
                if not chunk and task.device.type == "cpu" and task.dataset.kind != "tokens":
                    chunk = comfortable(task.architecture(data.client), task.shape)
                me.y.bind(module)
                module.eval()
                yield lambda x: logits_of(module, x, chunk)
        else:
            with task.network(me.y, data.client) as network:
                network.train()
                yield lambda x: logits_of(network.module, x)
            me.y = network.params  # answering has moved its running statistics

    @on_client
    def published(self, me: Me, data: ClientData) -> Published:
        """The accuracy that the distillation of this round has noted."""
        return Published(me.scratch.published)

    def log_published(self, server: Server, cohort: Cohort) -> None:
        """Log the mean of the clients' accuracies as published, where that is wanted; no round ends for want of it."""
        if self.published_scores:
            with suppress(TooFewReplies):
                scores = list(cohort.call(self.published, phase="evaluate").accuracy.values())
                server.log(published_client_accuracy=sum(scores) / len(scores))

    def teach_client(self, me: Me, data: ClientData, x: Tensor, e: Tensor) -> None:
        """E3 steps of the client's model; notes its accuracy as published, if that is wanted."""
        task = data.task
        with task.network(me.y, data.client, batch_norm=self.distil_batch_norm) as network:
            scores = PublishedScores(network, task) if self.published_scores else None
            distil(
                network,
                x,
                Targets(e, self.tau, data.device),
                steps=self.client_steps,
                lr=self.client_lr or task.local.lr,
                optimizer=self.optimizer,
                cosine_over=self.client_cosine_over,
                after_step=scores,
            )
        me.y = network.params
        if scores is not None:
            me.scratch.published = scores.best
