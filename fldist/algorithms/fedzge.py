"""FedZGE: X. Ma, J. Wang, X. Zhang, "Data-Free Black-Box Federated Learning via Zeroth-Order Gradient Estimation", AAAI
2025, arXiv 2503.06028. The server makes images x = G(z, y), asks the clients for their logits on x and on q slightly
moved copies of it, estimates from these how x should change, moves the generator so, and lets the global model and the
clients distil the ensemble. Neither weights nor gradients nor data travel; clients may have any architecture.

    e     = sum_k w_k f_k(x)                                    `distillation.ensemble`
    L     = L_fid + beta1 L_adv + beta2 L_div + beta3 L_info    means over the N images
    L_fid = -mean_i log softmax(e_i)[y_i]                       `fidelity`
    L_adv = -mean_i KL( softmax(e_i / tau) || softmax(f(x_i) / tau) )                       `adversarial`
    L_div = exp( -mean_il |x_i - x_l|^2 / d  |z_i - z_l|^2 / nz )                           `diversity`
    L_info = sum_c Pbar_c log Pbar_c, Pbar = mean_i softmax(e_i)                            `information`
    v     = dL/de with x and f(x) held fixed                    `logit_gradient`
    Delta_ij = (e_i at x_i + eps u_ij  -  e_i at x_i) / eps     u_ij: q random directions for each image, |u_ij| = 1
    g_i   = d(beta1 L_adv + beta2 L_div)/dx_i with e held fixed  +  (d / q) sum_j <v_i, Delta_ij> u_ij
                                                                `combine`; published: `Whole.batch`
    theta_G <- one optimizer step along (dx/dtheta_G)^T g;  then E2 and E3 steps of `distillation.distil` on x, e

Bytes for each client and round (N images of d values, C classes, q queries, of which `difference: central` has twice as
many in f0, f1, f2 and f4; generator steps multiply all but `distil`), all phases `query` but where it says otherwise:

    wire  images, down    seeds, down   logits, up                     gradients        logits, distil, down
    f0    4 (q + 1) N d                 4 (q + 1) N C                                   4 N C
    f1    4 (q + 1) N d                 4 (q + 1) N C                                   4 N C     one message
    f2    4 N d           16            4 (q + 1) N C                                   4 N C     the key of the u_ij
    f3    4 N d           16            4 N C + 2 q N C                                 4 N C     Delta as float16
    f4    N d             16            4 (q + 1) N C                                   4 N C     images as uint8
    f5    N d             16            2 N C + q N C + 4 q                             2 N C     and Delta as int8
    f6    4 N d           16            4 N C                          4 N C down       4 N C     <v, Delta> alone
                                                                       4 N q up

    scalars 8 up with every reply that has logits or gradients: n_k. `logits: float16` halves what is not Delta.
    gradient: none    images 4 N d down, logits 4 N C up; then 4 N C down     a generator that is never trained
    gradient: exact   weights S_k up (phase `reveal`); images 4 N d and logits 4 N C down    a white box, a control
    images are sent once: for the distillation, clients' hosts hold them. Nothing else travels but scores (`eval`).
    topology: reduce adds up answers at hosts, which f0, f5 and `exact` do not allow.

Options of the shared laws: any partition (published: `dirichlet` with alpha 1 and 0.1); nothing of a model travels;
cohorts as `clients.rounding` says (published: ceil); every client has a model of its own, that begins where
`clients.init` says (published: `own`); `rounds` counts rounds of local training, queries and distillation.

How far this is certain: the paper's text was not at hand; the steps are those of the published code, whose command line
gives the values of the presets, and of the abstract and the figures. The default departs from the code where that
differences the whole loss, the global model's part included, as one number for all images (`scope: all`, `reduction:
batch`), divides once more by N (`divide_by_n`), lets clients answer in training mode (`query_batch_norm: batch`), and
scores on batch statistics that leak into the model (`published_scores`). docs/fedzge.md has what that changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss, one_hot

from fldist.algorithm import Books, Clients, Me, Replies, Server, State, TooFewReplies, on_client
from fldist.blocks import version_of
from fldist.data.client_data import ClientData
from fldist.data.task import Architecture, Task
from fldist.directions import Directions, Law, held
from fldist.distillation import (
    LARGEST_LOGIT,
    Distilling,
    NonNegative,
    Positive,
    ensemble,
    logits_of,
    make_optimizer,
)
from fldist.fold import Collect, Fold, Mean, collect
from fldist.kinds import Images, Kind, Logits, Once, Scalar, Seeds, Weights
from fldist.models.generators.conditional import ConditionalGenerator
from fldist.models.train import Network
from fldist.params import Params
from fldist.seeding import derive, forked, generator

Wire = Literal["f0", "f1", "f2", "f3", "f4", "f5", "f6"]
LogitType = Literal["float32", "float16", "bfloat16"]
LogitGradients = Annotated[Tensor, Kind.GRADIENTS]

LOCAL_DIFFERENCES = ("f3", "f5", "f6")
"""Formulations in which clients take the differences, so that base logits and e may be rounded."""
COARSE_IMAGES = ("f4", "f5")
_SHOWN = 64


# ---- losses; e and f(x) [N, C], x [N, ...], z [N, nz], y [N]
def fidelity(e: Tensor, y: Tensor) -> Tensor:
    """L_fid: cross-entropy of the ensemble with the labels that the images were made for, temperature 1."""
    return nll_loss(log_softmax(e, dim=1), y)


def divergences(e: Tensor, f: Tensor, tau: float) -> Tensor:
    """KL( softmax(e_i / tau) || softmax(f_i / tau) ) [N]."""
    p = log_softmax(e / tau, dim=1)
    return (p.exp() * (p - log_softmax(f / tau, dim=1))).sum(dim=1)


def adversarial(e: Tensor, f: Tensor, tau: float) -> Tensor:
    """L_adv: at most 0, and 0 where global model and ensemble agree."""
    return -divergences(e, f, tau).mean()


def mean_log_probability(e: Tensor) -> Tensor:
    """log Pbar [C], from logarithms: a class that underflows gives no 0 times infinity."""
    return torch.logsumexp(log_softmax(e, dim=1), dim=0) - math.log(len(e))


def information(e: Tensor, log_pbar: Tensor | None = None) -> Tensor:
    """L_info, in -log C .. 0. log_pbar: instead of e's own; that of the unmoved images makes it linear in Pbar."""
    own = mean_log_probability(e)
    return (own.exp() * (own if log_pbar is None else log_pbar)).sum()


def diversity(x: Tensor, z: Tensor) -> Tensor:
    """L_div in (0, 1], in closed form: with x and z centred, a_i = |x_i|^2 and b_i = |z_i|^2, the sum over all pairs is
    S = 2 N sum a_i b_i + 2 (sum a)(sum b) + 4 |X^T Z|^2. No N x N x d array, and all terms are at least 0."""
    n = len(x)
    flat = x.reshape(n, -1)
    x0, z0 = flat - flat.mean(dim=0), z.to(flat.dtype) - z.to(flat.dtype).mean(dim=0)
    a, b = x0.square().sum(dim=1), z0.square().sum(dim=1)
    pairs = 2 * n * (a * b).sum() + 2 * a.sum() * b.sum() + 4 * (x0.T @ z0).square().sum()
    return torch.exp(-pairs / (n * n * x0.shape[1] * z0.shape[1]))


@dataclass(frozen=True)
class Loss:
    """L: its weights and temperature."""

    tau: float
    beta1: float
    beta2: float
    beta3: float

    def __call__(self, e: Tensor, f: Tensor, x: Tensor, y: Tensor, z: Tensor, log_pbar: Tensor | None = None) -> Tensor:
        """L. log_pbar: see `information`."""
        return (
            fidelity(e, y)
            + self.beta1 * adversarial(e, f, self.tau)
            + self.beta2 * diversity(x, z)
            + self.beta3 * information(e, log_pbar)
        )

    def parts(self, e: Tensor, f: Tensor, x: Tensor, y: Tensor, z: Tensor) -> dict[str, float]:
        """The four terms, without their weights."""
        return {
            "fidelity": float(fidelity(e, y)),
            "adversarial": float(adversarial(e, f, self.tau)),
            "diversity": float(diversity(x, z)),
            "information": float(information(e)),
        }


# ---- gradients
def logit_gradient(e: Tensor, f: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """v = dL/de [N, C] with x and f = f(x) held fixed; each row sums to 0.

    v_i = (P_i - onehot(y_i)) / N  -  beta1 / (N tau) p_i (r_i - <p_i, r_i>)  +  beta3 / N P_i (l - <P_i, l>),
    p = softmax(e / tau), r = log p - log softmax(f / tau), P = softmax(e), l = log Pbar.
    """
    n, tau = len(e), loss.tau
    log_p = log_softmax(e / tau, dim=1)
    p, r = log_p.exp(), log_p - log_softmax(f.to(e.dtype) / tau, dim=1)
    big = torch.softmax(e, dim=1)
    logs = mean_log_probability(e)
    v = big - one_hot(y, e.shape[1]).to(e.dtype)
    v = v - (loss.beta1 / tau) * p * (r - (p * r).sum(dim=1, keepdim=True))
    v = v + loss.beta3 * big * (logs - (big @ logs)[:, None])
    return v / n


def known_gradient(
    model: Callable[[Tensor], Tensor], e: Tensor, x: Tensor, z: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """d(beta1 L_adv + beta2 L_div)/dx [N, ...] with e held fixed, through the global model; and its logits f(x)."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        f = model(x)
        known = loss.beta1 * adversarial(e.to(f.dtype), f, loss.tau) + loss.beta2 * diversity(x, z)
        (g,) = torch.autograd.grad(known, x)
    return g, f.detach()


def client_scalars(v: Tensor, delta: Tensor) -> Tensor:
    """s_ij = <v_i, Delta_ij> [q, N] of v [N, C] and differences [q, N, C]."""
    return torch.einsum("ic,jic->ji", v, delta)


def combine(share: Callable[[int, Tensor], Tensor], block: Callable[[int], Tensor], q: int) -> Tensor:
    """(d / q) sum_j s_ij u_ij [N, d]. block: j -> u_j [N, d], one at a time; share: j, u_j -> s_j [N]."""
    total: Tensor | None = None
    for j in range(q):
        u = block(j)
        s = (share(j, u) * (u.shape[1] / q)).to(u.device, u.dtype)[:, None]
        total = s * u if total is None else total.addcmul_(s, u)
    assert total is not None
    return total


class Whole:
    """L at moved images, for `scope: all`: what of it is the same for all directions is computed once.

    model: the global model's logits; e [N, C] and x [N, ...]: the unmoved ones.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], e: Tensor, f: Tensor, x: Tensor, y: Tensor, z: Tensor, loss: Loss
    ) -> None:
        self._model, self._e, self._f, self._x, self._y, self._z, self._loss = model, e, f.to(e.dtype), x, y, z, loss
        self._log_pbar = mean_log_probability(e)

    def batch(self, e_j: Tensor, moved: Tensor) -> Tensor:
        """How much larger L is at moved images: a scalar. L_info there has the logarithm of the unmoved Pbar, as
        published: the exact linearisation, smaller than the difference by KL(Pbar there || Pbar), of order eps^2."""
        f_j = self._model(moved).to(e_j.dtype)
        there = self._loss(e_j, f_j, moved.double(), self._y, self._z, self._log_pbar)
        return there - self._here

    @functools.cached_property
    def _here(self) -> Tensor:
        return self._loss(self._e, self._f, self._x.double(), self._y, self._z)

    def per_sample(self, e_j: Tensor, moved: Tensor) -> Tensor:
        """How much larger L is when each image alone is moved [N]; L_info linearised."""
        loss, n = self._loss, len(e_j)
        f_j = self._model(moved).to(e_j.dtype)
        rows = torch.arange(n, device=e_j.device)
        logs, base = log_softmax(e_j, dim=1), log_softmax(self._e, dim=1)
        share = -(logs - base)[rows, self._y]
        share = share - loss.beta1 * (divergences(e_j, f_j, loss.tau) - divergences(self._e, self._f, loss.tau))
        share = share + loss.beta3 * ((logs.exp() - base.exp()) @ self._log_pbar)
        return share / n + loss.beta2 * self._diversity_share(moved).to(share)

    def _diversity_share(self, moved: Tensor) -> Tensor:
        """Change of L_div [N] when each image alone is moved."""
        level, about, weight = self._pairs
        n, d = about.shape
        x, step = self._x.reshape(n, d).double(), (moved - self._x).reshape(n, d).double()
        # sum_l |z_i - z_l|^2 / nz (|x_i + s_i - x_l|^2 - |x_i - x_l|^2) / d
        change = (2 * (step * (weight[:, None] * x - about)).sum(dim=1) + weight * step.square().sum(dim=1)) / d
        return level * torch.expm1(-2 * change / n**2)

    @functools.cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """L_div; sum_l |z_i - z_l|^2 / nz x_l [N, d]; sum_l |z_i - z_l|^2 / nz [N]."""
        z, x = self._z.double(), self._x.reshape(len(self._x), -1).double()
        distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square() / z.shape[1]
        return diversity(x, z), distances @ x, distances.sum(dim=1)


def exact_gradient(
    models: Mapping[int, Callable[[Tensor], Tensor]], weights: Mapping[int, float], v: Tensor, x: Tensor
) -> Tensor:
    """sum_k w_k (df_k/dx)^T v [N, ...]: what the clients' part of the estimate is an estimate of."""
    total, sum_of = torch.zeros_like(x), sum(weights[k] for k in models)
    for k in sorted(models):
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            f = models[k](leaf)
            (part,) = torch.autograd.grad(f, leaf, grad_outputs=(v * (weights[k] / sum_of)).to(f))
        total += part
    return total


# ---- what is rounded
def to_bytes(x: Tensor) -> Tensor:
    """Images in -1..1 as uint8: round((x + 1) 127.5)."""
    return ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(x: Tensor) -> Tensor:
    """The images that uint8 stand for; others as they are."""
    return x.float() / 127.5 - 1.0 if x.dtype is torch.uint8 else x


def to_int8(delta: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Differences [q, N, C] in int8 and their scales [q], float32: rounded up or down so that the mean is right."""
    scale = (delta.abs().amax(dim=(1, 2)) / 127.0).float()
    chance = torch.rand(delta.shape, generator=rng, dtype=torch.float64).to(delta.device)
    steps = delta.double() / torch.where(scale > 0, scale, 1.0).double()[:, None, None]
    return torch.floor(steps + chance).clamp(-127, 127).to(torch.int8), scale


def from_int8(values: Tensor, scale: Tensor) -> Tensor:
    """The differences [q, N, C] that these stand for, float64."""
    return values.double() * scale.double()[:, None, None]


# ---- replies
class Answered(NamedTuple):
    """Logits on what was sent: [N, C], or one such for the images and each moved copy of them, [1 + q, N, C]."""

    logits: Logits
    n: Scalar  # n_k, training examples held by the client


class Differences(NamedTuple):
    """Logits on the images, and how they change along each direction."""

    base: Logits  # [N, C]
    delta: Logits  # Delta [q, N, C], float16
    n: Scalar


class Coarse(NamedTuple):
    """The same in bytes."""

    base: Logits  # [N, C], float16
    delta: Logits  # [q, N, C], int8
    scale: Logits  # [q], float32
    n: Scalar


class Projected(NamedTuple):
    """How the loss changes along each direction, as far as this client's logits go."""

    s: LogitGradients  # <v_i, Delta_ij> [q, N], float32
    n: Scalar


class Revealed(NamedTuple):
    """A white box."""

    y: Weights
    n: Scalar


class Batch(NamedTuple):
    """What the generator made in a step of a round, on the task's device."""

    step: int
    z: Tensor  # [N, nz]
    y: Tensor  # [N]
    made: Tensor  # [N, ...], with the graph
    x: Tensor  # as the clients see it: without the graph, rounded where images travel as bytes
    sent: Once[Tensor]  # as it travels


class Answers(NamedTuple):
    """What the clients said of a batch."""

    e: Tensor  # [N, C], float64
    delta: Tensor | None  # Delta [q, N, C], float64; None where nobody was asked for it, or clients project it
    clients: Sequence[int]  # whose answers these are
    scalars: Tensor | None = None  # <v_i, Delta_ij> [q, N], where clients take them


@dataclass(frozen=True)
class FedZge(Distilling):
    """Clients and server teach each other on images of a generator that learns from the clients' answers alone."""

    synthetic: Annotated[int, Field(ge=1)] = 500  # N, images made in each round
    q: Annotated[int, Field(ge=1)] = 5  # random directions in which they are moved
    eps: Positive = 1e-3  # length of a move of a whole image
    beta1: NonNegative = 1.0  # weight of L_adv
    beta2: NonNegative = 1.0  # weight of L_div
    beta3: NonNegative = 1.0  # weight of L_info
    generator: ConditionalGenerator = field(default_factory=ConditionalGenerator)  # G: nz, ngf, slope, conditional
    lr_generator: NonNegative = 1e-3  # of its optimizer, which is of the kind `optimizer`
    generator_steps: Annotated[int, Field(ge=1)] = 1  # in a round, each with queries of its own
    generator_optimizer: Literal["fresh", "persistent"] = "fresh"  # new in each round, or one that keeps its state
    gradient: Literal["queries", "none", "exact"] = "queries"  # none: never trained; exact: clients reveal weights

    wire: Wire = "f2"  # what of the queries travels; see the table of bytes
    logits: LogitType = "float32"  # of base logits and e, where clients take the differences (f3, f6); f5: float16
    directions: Law = "rademacher"  # u_ij: signs, or uniform on the sphere (published)
    difference: Literal["forward", "central"] = "forward"  # central: q pairs of moved copies, error of order eps^2
    scope: Literal["clients", "all"] = "clients"  # what is estimated: the path through clients, or the whole loss
    reduction: Literal["per_sample", "batch"] = "per_sample"  # a difference for each image, or one for all (published)
    divide_by_n: bool = False  # divide the estimate once more by N (published)
    show_every: Annotated[int, Field(ge=0)] = 10  # rounds between pictures of the images (round 1 as well); 0: none

    # ---- before round 1
    def check(self, task: Task) -> None:
        """Refuse what cannot be generated, asked or told; warn of moves that float32 rounds away."""
        super().check(task)
        if task.dataset.kind == "tokens":
            raise ValueError("algorithm: fedzge makes images, and the samples of these data are tokens")
        self._check_wire()
        self.generator_of(task)  # refuses shapes that it cannot make
        norm = any(a.batch_norm for a in task.architectures)
        if self.synthetic == 1 and task.shape[-1] == 4:
            raise ValueError(
                "algorithm.synthetic: the generator's BatchNorm cannot train on one image of 4 x 4 pixels; raise it"
            )
        alone = task.architecture().batch_norm or (norm and self.distil_batch_norm == "batch")
        if alone and self.synthetic == 1:
            raise ValueError("algorithm.synthetic: BatchNorm cannot train on batches of 1; raise it")
        if norm and self.query_batch_norm == "batch" and self.reduction == "per_sample" and self.gradient == "queries":
            raise ValueError(
                "algorithm.query_batch_norm: batch makes each image's logits depend on all images, and reduction: "
                "per_sample needs them apart; use query_batch_norm: running, or reduction: batch"
            )
        if self.gradient == "none" and self.generator_steps > 1:
            raise ValueError(
                f"algorithm.generator_steps: {self.generator_steps} with gradient: none would send images of which "
                "only the last are used; set it to 1"
            )
        move = self.eps / math.sqrt(math.prod(task.shape))
        least = 16 * torch.finfo(torch.float32).eps
        if self.gradient == "queries" and move < least:
            task.notes.append(
                f"algorithm.eps: {self.eps:g} moves a pixel by {move:.2g}, and float32 rounds images of -1..1 to "
                f"{torch.finfo(torch.float32).eps:.2g}: below {least:.2g} little is left of it; raise eps"
            )

    def _check_wire(self) -> None:
        if self.gradient != "queries":
            return
        if self.logits != "float32" and self.wire not in LOCAL_DIFFERENCES:
            raise ValueError(
                f"algorithm.logits: {self.logits} would destroy the estimate: it lies in differences of the order of "
                f"1e-5 to 1e-4 between logits, and {self.logits} rounds logits of 4 to 8 to "
                f"{4 * torch.finfo(getattr(torch, self.logits)).eps:.1g}. With wire: f3 (or f5, f6) clients take the "
                "differences themselves; else use float32"
            )
        if self.wire == "f6" and self.scope == "all":
            raise ValueError(
                "algorithm.wire: f6 tells the server how the loss changes through the clients alone; scope: all needs "
                "their logits: use scope: clients, or another wire"
            )

    def init_server(self, task: Task) -> State:
        """The global model x; the generator; what its optimizer keeps."""
        state = super().init_server(task)
        state.generator = self.generator_of(task).initial.clone()
        state.moments = {}
        return state

    def generator_of(self, task: Task) -> Architecture:
        """The generator's architecture and initial values, from the run's seed."""
        return _generator(self.generator, task.shape, task.num_classes, task.seed, task.device)

    @property
    def loss(self) -> Loss:
        """L."""
        return Loss(self.tau, self.beta1, self.beta2, self.beta3)

    @property
    def moves(self) -> int:
        """Moved copies of the images: q, or twice q."""
        return self.q * (2 if self.difference == "central" else 1)

    # ---- a round
    def round(self, server: Server, clients: Clients) -> None:
        """Train the clients; make images, ask, move the generator; distil at the server and at the clients."""
        replied = clients.selected().call(self.train).clients
        revealed: Revelation | None = None
        if self.gradient == "exact":
            revealed = Revelation(server.task, clients.only(replied).call(self.reveal, fold={"y": collect()}), self)
        for step in range(self.generator_steps):
            with self.generating(server, step) as (network, batch):
                answers = self.ask(server, clients, replied, batch) if revealed is None else revealed.answers(batch.x)
                if self.gradient != "none" and not server.predicting:
                    g = self.image_gradient(server, batch, answers, revealed)
                    self.move_generator(server, network, batch.made, g)
            replied = answers.clients
        self.show(server, batch.x)
        e = answers.e.to(self.logit_type)
        self.teach_server(server, batch.x, e)
        if self.client_steps:
            told = clients.only(replied).call(self.distil, x=batch.sent, e=e.cpu()).clients
            self.log_published(server, clients.only(told))

    @property
    def logit_type(self) -> torch.dtype:
        """As what e travels, and base logits where clients take the differences."""
        coarse = self.wire == "f5" and self.gradient == "queries"
        return torch.float16 if coarse else getattr(torch, self.logits)

    @contextmanager
    def generating(self, server: Server, step: int) -> Iterator[tuple[Network, Batch]]:
        """The generator in training mode, and what it makes in a step of the round; labels are in order, as published.

        It is the server's, as it is at the end of the `with`.
        """
        task: Task = server.task
        rng = generator(task.seed, "fedzge-noise", server.round, step)
        z = torch.randn(self.synthetic, self.generator.nz, generator=rng).to(task.device)
        y = torch.randint(task.num_classes, (self.synthetic,), generator=rng).sort().values.to(task.device)
        with self.generator_of(task).module() as module:
            current: Params = server.generator
            network = Network(module, current.to(task.device).clone())
            try:
                network.train()
                made = network.module(z, y)
                x = made.detach().contiguous()
                travels = x
                if self.gradient == "queries" and self.wire in COARSE_IMAGES:
                    travels = to_bytes(x)
                    x = from_bytes(travels)
                elif self.gradient == "queries" and self.wire == "f1":
                    travels = torch.stack([x, *self.moved(x, self.drawn(server, step))])
                yield network, Batch(step, z, y, made, x, Once(travels, version_of(travels), name="images"))
                server.generator = network.params
            finally:
                network.release()

    def drawn(self, server: Server, step: int) -> Directions:
        """The directions of a step of this round."""
        return self.directions_of(server.task, *self.descriptor(server, step))

    def descriptor(self, server: Server, step: int) -> tuple[int, int]:
        """The 16 bytes by which directions travel: a key, and which stream of it with how many directions."""
        stream = server.round * self.generator_steps + step
        return derive(server.task.seed, "fedzge-directions"), stream << 32 | self.q

    def directions_of(self, task: Task, key: int, stream: int) -> Directions:
        """The directions that a descriptor stands for."""
        d = math.prod(task.shape)
        return Directions(key, stream >> 32, stream & 0xFFFFFFFF, self.synthetic, d, self.directions, task.device)

    def moved(self, x: Tensor, directions: Directions, out: Tensor | None = None) -> Iterator[Tensor]:
        """x + eps u_j for all j, one at a time; with `central`, each followed by x - eps u_j.

        out: memory like x's for whoever is done with each before the next (none: each has its own).
        """
        for j in range(self.q):
            u = directions.block(j).view_as(x)
            yield torch.add(x, u, alpha=self.eps, out=out)
            if self.difference == "central":
                yield torch.sub(x, u, alpha=self.eps, out=out)

    def deltas(self, logits: Tensor) -> Tensor:
        """Delta [q, N, C], float64, of logits [1 + moves, N, C] on the images and, in order, their moved copies."""
        logits = logits.double()
        if self.difference == "central":
            return (logits[1::2] - logits[2::2]) / (2 * self.eps)
        return (logits[1:] - logits[:1]) / self.eps

    # ---- queries
    def ask(self, server: Server, clients: Clients, replied: Sequence[int], batch: Batch) -> Answers:
        """What these clients say of a batch, as the wire formulation has it."""
        task: Task = server.task
        shape, moves, by = (self.synthetic, task.num_classes), self.moves, self.weighed_by
        cohort = clients.only(replied)
        if self.gradient == "none" or self.wire == "f6":
            mean = Mean(by=by, shape=(1, *shape), dtype=self.logits, limit=LARGEST_LOGIT)
            got = cohort.call(self.answer, x=batch.sent, fold={"logits": mean}, phase="query")
            if self.gradient == "none":
                return Answers(got.logits[0], None, got.clients)
            return self.ask_projected(server, clients, got.clients, batch, got.logits[0])
        if self.wire == "f0":
            return self.ask_singly(server, clients, replied, batch)
        if self.wire == "f1":
            mean = Mean(by=by, shape=(1 + moves, *shape), limit=LARGEST_LOGIT)
            got = cohort.call(self.answer, x=batch.sent, fold={"logits": mean}, phase="query")
            return Answers(got.logits[0], self.deltas(got.logits), got.clients)
        key, stream = self.descriptor(server, batch.step)
        if self.wire in ("f2", "f4"):
            mean = Mean(by=by, shape=(1 + moves, *shape), limit=LARGEST_LOGIT)
            got = cohort.call(self.query, x=batch.sent, key=key, stream=stream, fold={"logits": mean})
            return Answers(got.logits[0], self.deltas(got.logits), got.clients)
        base = Mean(by=by, shape=shape, dtype="float16" if self.wire == "f5" else self.logits, limit=LARGEST_LOGIT)
        if self.wire == "f3":
            delta = Mean(by=by, shape=(self.q, *shape), dtype="float16", limit=LARGEST_LOGIT)
            fold: dict[str, Fold] = {"base": base, "delta": delta}
            got = cohort.call(self.query_differences, x=batch.sent, key=key, stream=stream, fold=fold, phase="query")
            return Answers(got.base, got.delta, got.clients)
        fold = {
            "base": base,
            "delta": Collect(shape=(self.q, *shape), dtype="int8"),
            # as much as f3 takes
            "scale": Collect(shape=(self.q,), dtype="float32", not_negative=True, limit=LARGEST_LOGIT / 127.0),
        }
        got = cohort.call(self.query_coarse, x=batch.sent, key=key, stream=stream, fold=fold, phase="query")
        coarse = {k: (got.delta[k], got.scale[k]) for k in got.clients}
        deltas = ensemble(coarse, self.weights(server.task, got.clients), lambda both: from_int8(*both))
        return Answers(got.base, deltas, got.clients)

    def ask_singly(self, server: Server, clients: Clients, replied: Sequence[int], batch: Batch) -> Answers:
        """One message for each moved copy; who has not answered all of them is left out of the ensemble."""
        shape = (1, self.synthetic, server.task.num_classes)
        fold: dict[str, Fold] = {"logits": Collect(shape=shape, dtype="float32", limit=LARGEST_LOGIT)}
        got = clients.only(replied).call(self.answer, x=batch.sent, fold=fold, phase="query")
        weights = self.weights(server.task, got.clients)
        said = {k: [logits] for k, logits in got.logits.items()}
        for moved in self.moved(batch.x, self.drawn(server, batch.step)):
            got = clients.only(sorted(said)).call(self.answer, x=moved, fold=fold, phase="query")
            said = {k: [*said[k], got.logits[k]] for k in got.clients}
        logits = torch.stack(
            [ensemble({k: answers[i][0] for k, answers in said.items()}, weights) for i in range(1 + self.moves)]
        )
        return Answers(logits[0], self.deltas(logits), got.clients)

    def weights(self, task: Task, clients: Sequence[int]) -> dict[int, float]:
        """w_k but for their sum, where no fold looks at the n_k that clients claim: those that the server knows."""
        return {k: 1.0 if self.weighed_by is None else float(task.sizes[k]) for k in clients}

    def ask_projected(
        self, server: Server, clients: Clients, replied: Sequence[int], batch: Batch, e: Tensor
    ) -> Answers:
        """Send v to those of whom e [N, C] is the mean. Who is lost here is still in e, and in nothing that follows."""
        model = server.task.frozen_copy(server.x)
        v = logit_gradient(e.to(batch.x.device), logits_of(model, batch.x), batch.y, self.loss)
        key, stream = self.descriptor(server, batch.step)
        sent = {"x": batch.sent, "key": key, "stream": stream, "v": v.float().cpu()}
        mean = Mean(by=self.weighed_by, shape=(self.q, len(v)), limit=LARGEST_LOGIT)
        got = clients.only(replied).call(self.project, **sent, fold={"s": mean}, phase="query")
        return Answers(e, None, got.clients, got.s)

    # ---- what the server makes of the answers
    def image_gradient(self, server: Server, batch: Batch, answers: Answers, revealed: Revelation | None) -> Tensor:
        """g [N, d], as the fields say; logs the four losses."""
        task: Task = server.task
        loss, x, y, z = self.loss, batch.x, batch.y, batch.z
        e = answers.e.to(task.device)
        delta, s = (None if t is None else t.to(task.device) for t in (answers.delta, answers.scalars))
        model = task.frozen_copy(server.x)
        if self.scope == "all" and revealed is None:
            f = logits_of(model, x)
            assert delta is not None
            whole = Whole(functools.partial(logits_of, model), e, f, x, y, z, loss)
            share = functools.partial(self.whole_share, whole, e, delta, x)
            g = combine(share, self.drawn(server, batch.step).block, self.q)
        else:
            known, f = known_gradient(model, e, x, z, loss)
            v = logit_gradient(e, f, y, loss)
            if revealed is not None:
                part = revealed.gradient(v, x)
            else:
                if s is None:
                    assert delta is not None
                    s = client_scalars(v, delta)
                if self.reduction == "batch":
                    s = s.sum(dim=1, keepdim=True).expand_as(s)
                part = combine(lambda j, u: s[j], self.drawn(server, batch.step).block, self.q)
            g = known.reshape(len(x), -1) + part.reshape(len(x), -1)
        server.log(**loss.parts(e, f.to(e.dtype), x, y, z))
        return g / len(x) if self.divide_by_n else g

    def whole_share(self, whole: Whole, e: Tensor, delta: Tensor, x: Tensor, j: int, u: Tensor) -> Tensor:
        """s_j [N] of the whole loss along u_j [N, d]."""
        u = u.view_as(x)
        differ = whole.batch if self.reduction == "batch" else whole.per_sample
        change = differ(e + self.eps * delta[j], torch.add(x, u, alpha=self.eps))
        if self.difference == "central":
            change = (change - differ(e - self.eps * delta[j], torch.sub(x, u, alpha=self.eps))) / 2
        return (change / self.eps).expand(len(x))

    def move_generator(self, server: Server, network: Network, made: Tensor, g: Tensor) -> None:
        """One optimizer step along the gradient g [N, d] on the images that were made."""
        network.gradient.zero_()
        made.backward(g.to(made.dtype).view_as(made))  # type: ignore[no-untyped-call]
        optimizer = make_optimizer(self.optimizer, self.lr_generator, network)
        (weights,) = network.weights
        if server.moments:
            optimizer.state[weights] = {name: t.to(weights.device).clone() for name, t in server.moments.items()}
        optimizer.step()
        if self.generator_optimizer == "persistent":
            server.moments = {name: t.clone() for name, t in optimizer.state[weights].items() if t is not None}

    def show(self, server: Server, x: Tensor) -> None:
        """Keep a picture of some of the images, of all classes."""
        if self.show_every and (server.round == 1 or server.round % self.show_every == 0) and x.shape[1] in (1, 3):
            chosen = torch.linspace(0, len(x) - 1, min(len(x), _SHOWN)).long()
            server.images(synthetic=(x.cpu()[chosen] + 1.0) / 2.0)

    def summary(self, server: Server, books: Books) -> dict[str, float]:
        """Bytes of a client and round, and with how many parameters FedAvg, which moves a model twice, has as many."""
        each = books.total("train", "query", "reveal", "distil") / max(1, sum(books.replied))
        return {"bytes_per_client_and_round": each, "break_even_parameters": each / 8}

    # ---- clients
    def moved_answers(
        self, me: Me, data: ClientData, x: Tensor, key: int, stream: int, base: Tensor | None = None
    ) -> Tensor:
        """Logits [1 + moves, N, C] on images as they were sent and, in order, their moved copies.

        base: those [N, C] on the images, where the client has them already.
        """
        x = from_bytes(x)
        directions = held(self.directions_of(data.task, key, stream))
        with self.answering(me, data) as logits:
            moved = self.moved(x, directions, torch.empty_like(x))
            return torch.stack([logits(x) if base is None else base, *map(logits, moved)])

    @on_client
    def answer(self, me: Me, data: ClientData, x: Images) -> Answered:
        """Logits [M, N, C] on images [N, ...], where M is 1, or on M times as many [M, N, ...]."""
        several = x if x.dim() > 1 + len(data.task.shape) else x[None]
        with self.answering(me, data) as logits:
            made = torch.stack([logits(part.clone()) for part in several])
        if self.wire == "f6":
            me.scratch.base = made[0]
        return Answered(made.to(self.logit_type), data.n)

    @on_client
    def query(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> Answered:
        """Logits [1 + moves, N, C]."""
        return Answered(self.moved_answers(me, data, x, key, stream), data.n)

    @on_client
    def query_differences(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> Differences:
        """Logits, and differences in half precision."""
        logits = self.moved_answers(me, data, x, key, stream)
        return Differences(logits[0].to(self.logit_type), self.deltas(logits).half(), data.n)

    @on_client
    def query_coarse(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> Coarse:
        """Logits in half precision, differences in bytes."""
        logits = self.moved_answers(me, data, x, key, stream)
        delta, scale = to_int8(self.deltas(logits), data.streams.generator("rounding"))
        return Coarse(logits[0].half(), delta, scale, data.n)

    @on_client
    def project(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds, v: LogitGradients) -> Projected:
        """<v_i, Delta_ij> [q, N]."""
        # without it, where the client has come from a host that is lost
        base = me.scratch.values.get("base")
        logits = self.moved_answers(me, data, x, key, stream, base)
        return Projected(client_scalars(v.double(), self.deltas(logits)).float(), data.n)

    @on_client
    def reveal(self, me: Me, data: ClientData) -> Revealed:
        """The client's model."""
        return Revealed(me.y, data.n)

    @on_client
    def distil(self, me: Me, data: ClientData, x: Images, e: Logits) -> None:
        """E3 steps on the images that the queries were about; not sent again."""
        x = from_bytes(x if x.dim() == 1 + len(data.task.shape) else x[0].clone())
        self.teach_client(me, data, x, e)


class Revelation:
    """Clients' models that the server has, for `gradient: exact`; one at a time is made a module."""

    def __init__(self, task: Task, replies: Replies, algorithm: FedZge) -> None:
        self._models: dict[int, Callable[[Tensor], Tensor]] = {
            k: functools.partial(_run, task, y, k)
            for k, y in replies.y.items()
            if bool(y.floats.isfinite().all())  # a model that has diverged is left out, as its answers would be
        }
        if not self._models:
            raise TooFewReplies("reveal", dict.fromkeys(replies.y, "refused: y: nan: its weights are not finite"))
        self._weights = algorithm.weights(task, list(self._models))

    def answers(self, x: Tensor) -> Answers:
        """Their ensemble on images [N, ...]."""
        with torch.no_grad():
            e = ensemble({k: model(x) for k, model in self._models.items()}, self._weights)
        return Answers(e, None, tuple(self._models))

    def gradient(self, v: Tensor, x: Tensor) -> Tensor:
        """See `exact_gradient`."""
        return exact_gradient(self._models, self._weights, v, x)


def _run(task: Task, model: Params, client: int, x: Tensor) -> Tensor:
    return task.frozen_copy(model, client)(x)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=2)
def _generator(
    how: ConditionalGenerator, shape: tuple[int, ...], classes: int, seed: int, device: torch.device
) -> Architecture:
    with forked(seed, "fedzge-generator"):
        return Architecture.of("generator", how.build(shape, classes), device)
