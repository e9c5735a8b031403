"""FedKTL: J. Zhang, Y. Liu, Y. Hua, J. Cao, "An Upload-Efficient Scheme for Transferring Knowledge From a Server-Side
Pre-trained Generator to Clients in Heterogeneous Federated Learning", CVPR 2024, arXiv 2403.15760. Every client keeps a
model of its own and uploads one unit vector for each class it holds. The server, which has a frozen generator that
somebody trained on public images, learns to map these vectors to latents of the generator, decodes the mean of each
class into one image, and sends the pairs of image and latent; clients learn to predict the latent from the image.

    V     = sqrt(C / (C - 1)) P (I - 1 1^T / C)                     a frozen classifier, common to all: `simplex`, `etf`
    z     = h(f(x)) / |h(f(x))|                                     f: features [K], h: the model's head, to d values
    L_A   = CE( s cos', y ), cos'_y = cos(arccos <z, v_y> + m), cos'_c = <z, v_c> for other classes       `arcface`
    L_M   = mean |g(f(I)) - q|^2 over pairs (I, q)                  g: linear, K to H                     `transfer`
    client: clipped SGD on L_A + mu L_M; then P^c = unit( mean of z over its samples of class c )         `prototypes`
    server: Q = F(P), F: linear, BatchNorm, ReLU, linear            `transformer`
    L     = MMD(Q, w) + lambda mean |Q - E_c|^2                     w: latents of the generator's own     `mmd`, `align`
    q_c   = mean of F(P^c) over the clients that hold c             `centroids`; I_c = the image that G makes of q_c

Bytes, for each client that takes part: d outputs of a model (C unless `etf_dim` says otherwise), H values of a latent,
m_i classes of the client, M classes that anybody has uploaded so far, images of the clients' size:

    kind         phase   direction  bytes
    seeds        setup   down       16                  once: 8 for V, 8 for the initial g; 8 with mu = 0
    weights      setup   down       4 d C + 4 (K+1) H   once, instead, with setup_by: tensor
    images       train   down       4 M ch h w          a round, once M > 0; images_as: uint8, M ch h w
    latents      train   down       4 M H               likewise; vectors_as: float16, 2 M H
    prototypes   train   up         4 m_i d             a round
    labels       train   up         4 m_i               a round: which classes they are of
    With mu = 0, the control, nothing but V's seed ever travels: what would be exchanged has no use.
    topology: reduce adds up at hosts, and here the server needs every vector: use star or collective.

Options of the shared laws: any partition (published: `dirichlet_min` of 0.1 and `pathological`, of merged data); of a
model nothing travels; cohorts as `clients.rounding` says (published: floor); every client has a model of its own, whose
initial values are `clients.init`'s (published: `common`: equal architectures begin alike), and, where architectures
differ, `task.feature_dim` features; `rounds` counts trainings, the first of which is without pairs. Published besides:
`local: {order: fixed, tail: drop}`, plain SGD.

How far this is certain: the paper's whole text was not at hand; the steps are those of the published code, with which
the published diagrams agree. There, setting the centroids to class means has no effect, so that what it decodes is E as
trained (`centroids: learned`); the default is the paper's, the class means, with BatchNorm by the statistics of all
prototypes (`batch`), without which they can explode (`eval`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, mse_loss, relu

from fldist.algorithm import Algorithm, Clients, ClientScores, Me, Replies, Server, State, on_client
from fldist.data.client_data import Batch, ClientData, Loss
from fldist.data.task import Architecture, Task, spans
from fldist.fold import collect
from fldist.kinds import Images, Kind, Latents, Once, Seeds
from fldist.models.evaluate import evaluate
from fldist.models.generators import named
from fldist.models.generators.pretrained import GeneratorConfig, PretrainedGenerator, to_samples
from fldist.models.layers import features_and_logits
from fldist.models.train import Network, Order
from fldist.params import Params
from fldist.prototypes import Stacked, Uploaded, add_rows, class_means, folds, kept_rows, made_up, stacked
from fldist.seeding import derive, forked, generator

Matrix = Annotated[Tensor, Kind.WEIGHTS]
Bandwidths = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
Generator = Annotated[GeneratorConfig, BeforeValidator(named)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

BANDWIDTHS = (10.0, 15.0, 20.0, 50.0)
PASSED = 512
"""Samples of a pass that makes prototypes; a pass for scores of as many gives the same bits."""
LATENTS = 2048
"""Least latents that are drawn at a time: a mapping network takes many in little more time than few."""
_LATENT_VALUES = 2**24
_SHOWN = 64
_HALF = torch.finfo(torch.float16).max


# ---- the classifier
def simplex(p: Tensor) -> Tensor:
    """V = sqrt(C / (C - 1)) P (I - 1 1^T / C) of P [d, C] with orthonormal columns: C unit vectors, <v_a, v_b> = -1 /
    (C - 1)."""
    classes = p.shape[1]
    return math.sqrt(classes / (classes - 1)) * (p - p.mean(dim=1, keepdim=True))


@functools.lru_cache(maxsize=4)
def etf(classes: int, dim: int, seed: int) -> Tensor:
    """An equiangular tight frame V, float32 [d, C], computed in float64; do not change it.

    d >= C: P is the Q factor of a d x C matrix of numbers uniform in (0, 1); d = C - 1, the least: the frame of d = C
    seen from within the hyperplane of vectors that sum to 0. ValueError below, and for less than two classes.
    """
    if classes < 2 or dim < classes - 1:
        raise ValueError(
            f"algorithm.etf_dim: {dim} dimensions hold {dim + 1} equiangular vectors at most, and there are {classes} "
            f"classes; it must be at least {max(1, classes - 1)}"
        )
    rng = generator(seed, "fedktl-etf")
    if dim >= classes:
        drawn = torch.rand(dim, classes, dtype=torch.float64, generator=rng)
        # contiguous, as what was sent is: the layout decides the bits of a matrix product
        return simplex(torch.linalg.qr(drawn).Q).float().contiguous()
    drawn = torch.rand(classes, classes, dtype=torch.float64, generator=rng)
    drawn[:, 0] = 1.0
    within = torch.linalg.qr(drawn).Q[:, 1:]  # [C, C - 1], a basis of the hyperplane
    frame: Tensor = within.T @ simplex(torch.eye(classes, dtype=torch.float64))
    return frame.float().contiguous()


def unit(v: Tensor) -> Tensor:
    """v / max(|v|, 1e-12), along the last dimension."""
    return nn.functional.normalize(v, dim=-1)


class Classifier(nn.Module):
    """A client's model and V [d, C] as a classifier: x -> s <unit(h(f(x))), v_c>, [B, C]."""

    def __init__(self, model: nn.Module, v: Tensor, scale: float) -> None:
        super().__init__()
        self.model, self.v, self.scale = model, v, scale

    def forward(self, x: Tensor) -> Tensor:
        """Scaled cosines, the largest of which is the prediction."""
        return self.scale * (unit(self.model(x)) @ self.v)


# ---- losses and prototypes of a client
def arcface(cosines: Tensor, y: Tensor, margin: float, scale: float) -> Tensor:
    """L_A of cosines [B, C] and labels y [B]: the angle to the true class is made larger by `margin` radians.

    In algebraic form, cos t cos m - sin t sin m, since the slope of arccos is infinite at cosines of 1 and -1.
    """
    true = cosines.gather(1, y[:, None])  # [B, 1]
    sine = (1 - true.square()).clamp(min=1e-12).sqrt()
    moved = true * math.cos(margin) - sine * math.sin(margin)
    return cross_entropy(scale * cosines.scatter(1, y[:, None], moved), y)


def transfer(predicted: Tensor, vectors: Tensor) -> Tensor:
    """L_M: the mean of the squared differences over all entries of g(f(I)) and q, [b, H]."""
    return mse_loss(predicted, vectors)


def prototypes(z: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """unit( mean of unit(z) ) by class, of z = h(f(x)) [n, d] and labels y [n]: float32 [m, d], and the m classes,
    int32, ascending."""
    means, counts = class_means(unit(z), y, num_classes)
    held = counts.nonzero().flatten()
    return unit(means[held]).float(), held.int()


# ---- the alignment at the server
def kernel(squared: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> Tensor:
    """k = sum over the bandwidths sigma^2 of exp(-D / (2 sigma^2)), of squared distances D of any shape."""
    return torch.stack([torch.exp(squared * (-0.5 / b)) for b in bandwidths]).sum(dim=0)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_j - y_l|^2 [a, b] of x [a, H] and y [b, H], through one Gram matrix; at least 0."""
    return torch.addmm(
        x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :], x, y.T, alpha=-2
    ).clamp(min=0)  # fmt: skip


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> Tensor:
    """MMD(X, Y) = mean_jl [ k(x_j, x_l) + k(y_j, y_l) - 2 k(x_j, y_l) ] of x and y, both [b, H]; diagonals included."""
    within = kernel(squared_distances(x, x), bandwidths).mean() + kernel(squared_distances(y, y), bandwidths).mean()
    return within - 2 * kernel(squared_distances(x, y), bandwidths).mean()


def mmd_gradient(x: Tensor, y: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> Tensor:
    """dMMD(X, Y)/dX [b, H], in closed form: with k'_jl = sum of exp(-D_jl / (2 sigma^2)) / sigma^2,

    2 / b^2 ( sum_l k'(x_j, y_l) (x_j - y_l)  -  sum_l k'(x_j, x_l) (x_j - x_l) ).

    The kernels among the y, a third of the loss, are not needed. l = j adds nothing to the second sum and is left out:
    with latents in 512 dimensions the other kernels are e^-10, and its rounding would be a share of 0.004 of the sum.
    """
    b = len(x)
    norms = x.square().sum(dim=1)
    d = x.new_empty(b, 2 * b)  # D of x and y, and of x and x, side by side
    torch.addmm(norms[:, None] + y.square().sum(dim=1), x, y.T, alpha=-2, out=d[:, :b])
    torch.addmm(norms[:, None] + norms, x, x.T, alpha=-2, out=d[:, b:])
    slope = torch.zeros_like(d)
    for width in bandwidths:
        # at least e^-80: an exp whose result is no normal number is fifty times as slow as another
        slope.add_((d * (-0.5 / width)).clamp_(-80.0, 0.0).exp_(), alpha=1 / width)
    across, within = slope[:, :b], slope[:, b:].neg_()
    within.diagonal().zero_()
    sums = slope.sum(dim=1, keepdim=True)
    return torch.addmm(sums * x, across, y, alpha=-1).addmm_(within, x, alpha=-1).mul_(2 / b**2)


def median_bandwidths(x: Tensor, y: Tensor) -> tuple[float, ...]:
    """1/4, 1/2, 1 and 2 times the median of the squared distances among all different points of x [a, H] and y [b, H].

    The given numbers are absolute: latents of H = 16,384 lie about 32,768 apart, where exp(-D / 100) is 0.
    """
    both = torch.cat([x, y])
    rows, columns = torch.triu_indices(len(both), len(both), 1).to(both.device)
    middle = max(float(squared_distances(both, both)[rows, columns].median()), 1e-12)
    return tuple(middle * share for share in (0.25, 0.5, 1.0, 2.0))


def transformer(dim: int, latent_dim: int) -> nn.Sequential:
    """F: prototypes [U, d] -> latents [U, H]."""
    return nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, latent_dim))


def centroids(
    f: nn.Module, p: Tensor, classes: Tensor, num_classes: int, mode: Literal["eval", "batch"]
) -> tuple[Tensor, Tensor]:
    """Class means [C, H] of F(P), of prototypes p [U, d] of classes [U], and which classes there are, bool [C].

    mode: as of `mapped`.
    """
    means, counts = class_means(mapped(f, p, mode), classes, num_classes)
    return means, counts > 0


def mapped(f: nn.Module, p: Tensor, mode: Literal["eval", "batch"]) -> Tensor:
    """F(P) [U, H] of prototypes p [U, d], without gradients; F stays as it is.

    eval: F's BatchNorm goes by its running statistics; batch: by those of all of p, and the running ones stay.
    """
    assert isinstance(f, nn.Sequential) and isinstance(f[1], nn.BatchNorm1d)
    first, norm, last = f[0], f[1], f[3]
    with torch.no_grad():
        x = first(p)
        mean, var = norm.running_mean, norm.running_var
        if mode == "batch":
            mean, var = x.mean(dim=0), x.var(dim=0, correction=0)
        q: Tensor = last(relu(batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)))
    return q


@dataclass(frozen=True)
class Alignment:
    """How F and E are trained in a round."""

    lr: float
    epochs: int
    batch_size: int
    lambda_: float
    clip: float
    bandwidths: Sequence[float]


class Drawn:
    """Latents of a generator's own distribution, drawn in large blocks and given out in small ones."""

    def __init__(self, of: PretrainedGenerator, rng: torch.Generator, device: torch.device) -> None:
        self._of, self._rng, self._device = of, rng, device
        self._left = torch.empty(0, of.latent_dim, device=device)

    def __call__(self, n: int) -> Tensor:
        """The next n latents [n, H]."""
        taken, self._left = self._left[:n], self._left[n:]
        if len(taken) == n:
            return taken
        missing = n - len(taken)
        rows = max(missing, min(LATENTS, _LATENT_VALUES // self._of.latent_dim))
        block = self._of.sample_latents(rows, self._rng).to(self._device)
        self._left = block[missing:]
        return torch.cat([taken, block[:missing]])


class Passes:
    """F's forward and backward pass in training, written out: autograd's bookkeeping takes longer than such layers.

    a = P W1' + b1,  u = (a - mean a) / sqrt(var a + eps),  h = relu(gamma u + beta),  Q = h W2' + b2
    """

    def __init__(self, f: nn.Module) -> None:
        """f: what `transformer` made, its parameters with gradients."""
        assert isinstance(f, nn.Sequential) and isinstance(f[1], nn.BatchNorm1d)
        self._norm: nn.BatchNorm1d = f[1]
        self._values = [t.detach() for t in f.parameters()]  # W1, b1, gamma, beta, W2, b2
        self._gradients = [t.grad for t in f.parameters() if t.grad is not None]

    def forward(self, p: Tensor) -> Tensor:
        """Q [b, H] of p [b, d]; BatchNorm's running statistics move."""
        w1, b1, gamma, beta, w2, b2 = self._values
        a = torch.addmm(b1, p, w1.T)
        mean = a.mean(dim=0)
        var = a.sub_(mean).square().mean(dim=0)  # five times as fast as torch.var_mean
        self._scale = (var + self._norm.eps).rsqrt_()
        self._p, self._u = p, a.mul_(self._scale)
        self._h = torch.addcmul(beta, self._u, gamma).relu_()
        self._move_statistics(mean, var * (len(p) / (len(p) - 1)))
        return torch.addmm(b2, self._h, w2.T)

    def backward(self, g: Tensor) -> None:
        """Write the gradients of a loss whose gradient with respect to Q is g [b, H].

        b1's is 0, since BatchNorm takes b1 away with the mean; autograd would write the rounding of a sum, of which
        Adam makes steps of full length.
        """
        _, _, gamma, _, w2, _ = self._values
        d_w1, d_b1, d_gamma, d_beta, d_w2, d_b2 = self._gradients
        torch.mm(g.T, self._h, out=d_w2)
        torch.sum(g, dim=0, out=d_b2)
        n = torch.mm(g, w2).mul_(self._h.sign())  # with respect to gamma u + beta
        torch.sum(n, dim=0, out=d_beta)
        torch.sum(n * self._u, dim=0, out=d_gamma)
        n.sub_(d_beta / len(g)).addcmul_(self._u, d_gamma, value=-1 / len(g)).mul_(gamma * self._scale)
        torch.mm(n.T, self._p, out=d_w1)
        d_b1.zero_()

    def _move_statistics(self, mean: Tensor, var: Tensor) -> None:
        norm = self._norm
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var, norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)


def align(
    f: Network,
    e: Tensor,
    p: Tensor,
    classes: Tensor,
    draw: Callable[[int], Tensor],
    how: Alignment,
    rng: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Train F (in place) and E [C, H] on prototypes p [U, d] of classes [U]; E as trained, and the last losses.

    For each of `epochs`: p shuffled, in batches of batch_size (a last one of a single prototype is left out, since
    BatchNorm needs two); for each, L = MMD(F(P), w) + lambda MSE(F(P), E_c) with latents w that `draw` gives; gradients
    of F and of E clipped each to the norm `clip`; a step of Adam, which begins anew in each call. draw: b -> w [b, H].

    All gradients are in closed form.
    """
    kept = nn.Parameter(e.clone())
    gradient = kept.grad = torch.zeros_like(kept)
    adam = torch.optim.Adam([*f.weights, kept], lr=how.lr, fused=True)
    passes = Passes(f.module)
    with torch.no_grad():
        for drawn in _batches(len(p), how, rng):
            rows = drawn.to(p.device)
            c = classes.index_select(0, rows)
            q, w = passes.forward(p.index_select(0, rows)), draw(len(rows))
            gap = q - kept.index_select(0, c)
            rate = 2 * how.lambda_ / gap.numel()
            passes.backward(mmd_gradient(q, w, how.bandwidths).add_(gap, alpha=rate))
            add_rows(gradient.zero_(), c, gap, alpha=-rate)
            for g in (f.gradient, gradient):
                g.mul_((how.clip / (torch.linalg.vector_norm(g) + 1e-6)).clamp_(max=1.0))
            adam.step()
    return kept.detach(), {"mmd": float(mmd(q, w, how.bandwidths)), "mse": float(gap.square().mean())}


def _batches(n: int, how: Alignment, rng: torch.Generator) -> Iterator[Tensor]:
    order = Order(n, how.batch_size, rng, no_single=True)
    for _ in range(how.epochs):
        yield from order.epoch()


# ---- the algorithm
@dataclass(frozen=True)
class FedKtl(Algorithm):
    """Clients of any architecture learn from each other and from a generator through class vectors and image pairs."""

    heterogeneous: ClassVar[bool] = True
    has_global_model: ClassVar[bool] = False

    generator: Generator = field(default_factory=lambda: named("mini_style"))  # a name, or {name: ..., its fields}
    mu: NonNegative = 50.0  # mu, weight of L_M at the clients; 0: the control, which exchanges nothing
    margin: Annotated[float, Field(ge=0, lt=math.pi)] = 0.5  # m, radians
    scale: Positive = 64.0  # s
    clip: NonNegative = 100.0  # largest gradient norms: of a client's model, of g, of F, of E; 0: any
    etf_dim: Literal["classes", "least"] | Count = "classes"  # d: C, C - 1, or any number from there on
    persist_g: bool = False  # clients keep g; published: it begins anew in each round

    lambda_: NonNegative = 1.0  # lambda, weight of the centroids in the alignment
    server_lr: Positive = 0.01  # of the alignment's Adam
    server_epochs: Count = 100  # passes over the prototypes of a round
    server_batch_size: Annotated[int, Field(ge=2)] = 100  # prototypes, and as many latents, of a step
    bandwidths: Bandwidths | Literal["median"] = BANDWIDTHS  # sigma^2 of the kernels; median: by the distances
    centroids: Literal["batch", "eval", "learned"] = "batch"  # what is decoded: see `centroids`; learned: E
    never_seen: Literal["leave_out", "random"] = "leave_out"  # classes nobody has uploaded; random: a random latent

    setup_by: Literal["seed", "tensor"] = "seed"  # how V and the initial g reach the clients
    images_as: Literal["float32", "uint8"] = "float32"  # uint8: before normalisation
    vectors_as: Literal["float32", "float16"] = "float32"  # of the latents that are sent
    antialias: bool = True  # when images are made smaller; published: no
    generation_batch: Count = 64  # images decoded at a time
    show_every: Annotated[int, Field(ge=0)] = 10  # rounds between pictures of the pairs (round 1 as well); 0: none

    # ---- before round 1
    def outputs(self, classes: int) -> int:
        """d."""
        if isinstance(self.etf_dim, int):
            return self.etf_dim
        return classes if self.etf_dim == "classes" else classes - 1

    def check(self, task: Task) -> None:
        """Refuse what cannot be classified, generated or scored."""
        etf(task.num_classes, self.outputs(task.num_classes), 0)
        if self.mu and len(task.shape) != 3:
            raise ValueError(f"algorithm: fedktl makes images, and the samples' shape is {tuple(task.shape)}; set mu=0")
        if self.mu:
            _ = task.feature_dim  # ValueError where the models differ in it: one g serves all
        if task.evaluation.own:
            raise ValueError("eval.own: what a model of fedktl gives are no scores of classes; use false")
        if isinstance(self.bandwidths, tuple) and not self.bandwidths:
            raise ValueError("algorithm.bandwidths: at least one is needed; give numbers, or median")

    def check_server(self, task: Task) -> None:
        """Refuse a generator that cannot be read, or whose latents and images do not fit."""
        if self.mu:
            made = self.made(task)
            to_samples(torch.zeros(1, *made.image_shape), task.shape)  # ValueError where they can be no samples
            self._fits("latents", made.sample_latents(2, generator(task.seed, "fedktl-try")), (made.latent_dim,))

    def init_server(self, task: Task) -> State:
        """F and E; the latent and the image of every class that there is one of."""
        if not self.mu:
            return State()
        made, classes = self.made(task), task.num_classes
        e = torch.randn(classes, made.latent_dim, generator=generator(task.seed, "fedktl-centroids"))
        return State(
            f=self.transformer(task).initial.clone(),
            e=e,
            made_by=made.fingerprint,
            known=torch.zeros(classes, dtype=torch.bool),  # classes that anybody has uploaded
            sent=torch.zeros(classes, dtype=torch.bool),  # those that there are pairs of
            decoded=torch.zeros(classes, *task.shape),  # in 0..1, made of the rows of e
        )

    def init_client(self, task: Task, client: int) -> State:
        """The client's model y; g, where it is kept."""
        return State(y=task.init_params(client, whole=True), g=None)

    def personal_model(self, me: Me, data: ClientData) -> Params:
        """The client's model."""
        y: Params = me.y
        return y

    def made(self, task: Task) -> PretrainedGenerator:
        """The pretrained generator; read once."""
        return _loaded(self.generator, task.device)

    def transformer(self, task: Task) -> Architecture:
        """F's architecture and initial values, from the run's seed."""
        return _transformer(self.outputs(task.num_classes), self.made(task).latent_dim, task.seed, task.device)

    def common(self, task: Task) -> dict[str, Any]:
        """V and the initial g as they are given to clients, each of whom gets them once: in the setup."""
        etf_seed, g_seed = derive(task.seed, "fedktl-v"), derive(task.seed, "fedktl-g")
        given: dict[str, Any] = {"etf_seed": etf_seed, "etf": None, "g_seed": g_seed, "g": None}
        if self.setup_by == "tensor":
            v = etf(task.num_classes, self.outputs(task.num_classes), etf_seed)
            given = {"etf_seed": None, "etf": v, "g_seed": None, "g": None}
            if self.mu:
                made = _projection(task.feature_dim, self.made(task).latent_dim, g_seed, task.device)
                given["g"] = made.initial.floats
        if not self.mu:
            given["g_seed"] = None
        return {name: None if value is None else Once(value, 1, name=name) for name, value in given.items()}

    def made_up(self, task: Task, client: int, method: str, field: str) -> Tensor | None:
        """Uploads have m_i prototypes."""
        return made_up(task, client, field, self.outputs(task.num_classes)) if method == "train" else None

    def setup(self, server: Server, clients: Clients) -> None:
        """V and the initial g travel, once."""
        clients.all().call(self.begin, **self.common(server.task))

    # ---- a round
    def round(self, server: Server, clients: Clients) -> None:
        """Pairs down, training, prototypes up; alignment; new pairs."""
        task, common = server.task, self.common(server.task)
        if not self.mu:
            clients.selected().call(self.train_alone, etf_seed=common["etf_seed"], etf=common["etf"])
            return
        dim = self.outputs(task.num_classes)
        images, vectors = self.pairs(server)
        fold = folds(dim, task.num_classes, limit=1.001)  # unit vectors, but for rounding
        replies = clients.selected().call(self.train, **common, images=images, vectors=vectors, fold=fold)
        u, before = stacked(replies, dim), server.e
        server.log(prototypes=len(u.classes))
        if len(u.classes) < 2:  # BatchNorm cannot be trained on one
            return
        known = server.known.clone()
        known[u.classes] = True
        server.known = known
        if not server.predicting:
            self.align(server, u)
        self.generate(server, before)

    def pairs(self, server: Server) -> tuple[Tensor | None, Tensor | None]:
        """The images and latents of the last round, as they travel."""
        rows = server.sent.nonzero().flatten()
        if not len(rows):
            return None, None
        pictures, vectors = server.decoded[rows], server.e[rows]
        if self.images_as == "uint8":
            images = (pictures * 255).round().to(torch.uint8)
        else:
            images = server.task.normal(pictures.to(server.task.device)).cpu()
        if self.vectors_as == "float16":  # an infinite value would spoil every client
            vectors = vectors.clamp(-_HALF, _HALF).half()
        return images, vectors

    def align(self, server: Server, u: Stacked) -> None:
        """Train F and E on the round's prototypes; E's rows then are what will be decoded."""
        task: Task = server.task
        made = self.made(task)
        self._same_generator(server, made)
        p, classes = u.prototypes.to(task.device), u.classes.to(task.device)
        e = server.e.to(task.device)
        with task.network(server.f, self.transformer(task)) as f:
            if self.centroids != "learned":
                e = self.class_means(f.module, p, classes, e)
            draw = Drawn(made, server.rng, task.device)
            how = Alignment(
                self.server_lr,
                self.server_epochs,
                self.server_batch_size,
                self.lambda_,
                self.clip or math.inf,
                self.widths(f.module, p, draw),
            )
            e, losses = align(f, e, p, classes, draw, how, server.rng)
            if self.centroids != "learned":
                e = self.class_means(f.module, p, classes, e)
        if not bool(e.isfinite().all()):
            raise ValueError(
                f"algorithm.server_lr: the alignment of round {server.round} has diverged (centroids are not finite); "
                f"lower it from {self.server_lr:g}, or lambda_ from {self.lambda_:g}"
            )
        server.f, server.e = f.params, e
        server.log(**losses, centroid_std=float(e[torch.unique(classes)].std()))

    def class_means(self, f: nn.Module, p: Tensor, classes: Tensor, e: Tensor) -> Tensor:
        """E with the rows of the classes that there are set to means of F(P)."""
        assert self.centroids != "learned"
        means, present = centroids(f, p, classes, len(e), self.centroids)
        return torch.where(present[:, None], means, e)

    def widths(self, f: nn.Module, p: Tensor, draw: Callable[[int], Tensor]) -> Sequence[float]:
        """The kernels' bandwidths; `median`: of up to 256 mapped prototypes and as many latents, once a round."""
        if not isinstance(self.bandwidths, str):
            return self.bandwidths
        n = min(len(p), 256)
        return median_bandwidths(mapped(f, p[:n], "batch"), draw(n))  # as the alignment maps them

    def generate(self, server: Server, before: Tensor) -> None:
        """Decode the classes whose latents have moved: whose rows of E are not as they were before."""
        task: Task = server.task
        wanted = torch.ones_like(server.known) if self.never_seen == "random" else server.known
        moved = wanted & ~(server.sent & (server.e == before).all(dim=1))
        server.sent = wanted
        if server.predicting:
            return
        made, pictures = self.made(task), server.decoded.clone()
        for rows in moved.nonzero().flatten().split(self.generation_batch):
            images = made.decode(server.e[rows].to(task.device))
            self._fits("images", images, made.image_shape)
            pictures[rows] = to_samples(images, task.shape, self.antialias).cpu()
        server.decoded = pictures
        if self.show_every and (server.round == 1 or server.round % self.show_every == 0):
            sheets = pictures[wanted].split(_SHOWN)  # a grid has no more
            server.images(**{f"pairs-{i * _SHOWN + 1}" if i else "pairs": sheet for i, sheet in enumerate(sheets)})

    @staticmethod
    def _fits(what: str, got: Tensor, shape: tuple[int, ...]) -> None:
        """ValueError for latents or images of other sizes than the generator says."""
        if tuple(got.shape[1:]) != tuple(shape):
            raise ValueError(
                f"algorithm.generator: it says that its {what} have the shape {list(shape)}, and gives "
                f"{list(got.shape[1:])}; correct it, or choose another one"
            )

    def _same_generator(self, server: Server, made: PretrainedGenerator) -> None:
        """A run that goes on with another generator would be neither's."""
        if server.made_by != made.fingerprint:
            raise ValueError(
                f"algorithm.generator: the run began with another generator (fingerprint {server.made_by[:12]}, now "
                f"{made.fingerprint[:12]}); put its file back, or begin a new run"
            )

    # ---- clients
    @on_client
    def begin(
        self,
        me: Me,
        data: ClientData,
        etf_seed: Seeds | None,
        etf: Matrix | None,
        g_seed: Seeds | None,
        g: Matrix | None,
    ) -> None:
        """Nothing to do: a host keeps what it is given once."""

    @on_client
    def train(
        self,
        me: Me,
        data: ClientData,
        etf_seed: Seeds | None,
        etf: Matrix | None,
        g_seed: Seeds | None,
        g: Matrix | None,
        images: Images | None,
        vectors: Latents | None,
    ) -> Uploaded:
        """E epochs on L_A + mu L_M, without pairs on L_A; the class vectors of the trained model."""
        v = self.classifier(data, etf_seed, etf)
        if images is None or vectors is None:
            me.y = data.train(me.y, loss=self.loss(v), clip=self.clip).whole
        else:
            made = _projection(data.task.feature_dim, vectors.shape[1], g_seed or 0, data.device)
            initial = made.initial if g is None else Params(made.layout, g)
            with data.task.network(me.g or initial, made) as projection:
                pairs = Pairs(data, images, vectors, projection.module)
                me.y = data.train(me.y, loss=self.loss(v, pairs), clip=self.clip, beside=[projection]).whole
            if self.persist_g:
                me.g = projection.params
        z = self.passed(me, data)[: kept_rows(data.task, data.client)]
        return Uploaded(*prototypes(z, data.y[: len(z)], data.task.num_classes))

    @on_client
    def train_alone(self, me: Me, data: ClientData, etf_seed: Seeds | None, etf: Matrix | None) -> None:
        """E epochs on L_A."""
        me.y = data.train(me.y, loss=self.loss(self.classifier(data, etf_seed, etf)), clip=self.clip).whole

    def classifier(self, data: ClientData, seed: int | None, given: Tensor | None) -> Tensor:
        """V [d, C]: as it was sent, or from its seed."""
        if given is not None:
            return given
        assert seed is not None
        classes = data.task.num_classes
        return etf(classes, self.outputs(classes), seed).to(data.device)

    def loss(self, v: Tensor, pairs: Pairs | None = None) -> Loss:
        """L_A of a batch; with pairs, L_A + mu L_M of a batch of these."""

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            z, share = (module(batch.x), None) if pairs is None else pairs.beside(module, batch.x)
            value = arcface(unit(z) @ v, batch.y, self.margin, self.scale)
            return value if share is None else value + self.mu * share

        return loss

    def passed(self, me: Me, data: ClientData) -> Tensor:
        """z = h(f(x)) [n, d] of all training samples, in evaluation mode, by a pass that scores can be made of too."""
        with data.architecture.module() as module:
            me.y.bind(module)
            module.eval()
            with torch.no_grad():
                # clones: a slice's address could change the bits of a matrix product
                z = torch.cat([module(data.x[a:b].clone()) for a, b in spans(data.n, PASSED)])
        me.scratch.passed, me.scratch.passed_by = z, me.y
        return z

    # ---- evaluation
    def evaluate(self, server: Server, clients: Clients) -> Replies:
        """Clients score their own models, by the cosines to V's columns, as the section `eval` says."""
        common = self.common(server.task)
        given = {"etf_seed": common["etf_seed"], "etf": common["etf"]}
        return self.scored_clients(server, clients).call(
            self.score, **given, fold={"scores": collect()}, phase="evaluate"
        )

    @on_client
    def score(self, me: Me, data: ClientData, etf_seed: Seeds | None, etf: Matrix | None) -> ClientScores:
        """Score the client's model; where it has trained and `eval.split` is train, by the pass that was made then."""
        how = self.scoring(data.task)
        assert how.split != "auto"
        v = self.classifier(data, etf_seed, etf)
        z, by = (me.scratch.values.get(name) for name in ("passed", "passed_by"))
        as_then = how.split == "train" and how.batch_size == PASSED and how.batch_norm == "running"
        if as_then and "accuracy_batchstat" not in how.names and z is not None and by is not None and by.equals(me.y):
            readout = Classifier(nn.Identity(), v, self.scale)
            scores = evaluate(readout, [(z[a:b].clone(), data.y[a:b]) for a, b in spans(len(z), PASSED)], how)
        else:
            scores = data.evaluate(me.y, how.split, readout=lambda module: Classifier(module, v, self.scale))
        return ClientScores.of(scores, how)


class Pairs:
    """The pairs of a round at a client, and g: batches of them, reshuffled at every pass, that run on over epochs."""

    def __init__(self, data: ClientData, images: Tensor, vectors: Tensor, g: nn.Module) -> None:
        """images [M, ...], vectors [M, H]: as they were sent."""
        unit_range = images.dtype is torch.uint8
        self._images = data.task.normal(images.float() / 255) if unit_range else images
        self._vectors = vectors.float()
        self._g = g
        size, self._norm = data.task.local.batch_size, data.architecture.batch_norm
        self._order: Iterator[Tensor] | None = None
        if len(images) > 1 or not self._norm:  # BatchNorm cannot train on one image
            # for whose sake a last batch of one joins the one before, whatever the network
            tail: Literal["merge", "keep"] = "merge" if len(images) % size == 1 else "keep"
            self._order = Order(len(images), size, data.streams.generator("second"), tail).forever()

    def beside(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """h(f(x)) of a client's batch, and L_M of the next batch of pairs, whose gradient goes to f and g, not to h.

        BatchNorm sees the one after the other; without it, one pass for both takes seven tenths of the time of two.
        """
        if self._order is None:
            return module(x), None
        rows = next(self._order).to(self._images.device)
        images, vectors = self._images.index_select(0, rows), self._vectors.index_select(0, rows)
        if self._norm:
            z = module(x)
            features, _ = features_and_logits(module, images)
        else:
            features, z = features_and_logits(module, torch.cat([x, images]))
            features, z = features[len(x) :], z[: len(x)]
        return z, transfer(self._g(features), vectors)


@functools.lru_cache(maxsize=2)
def _loaded(config: GeneratorConfig, device: torch.device) -> PretrainedGenerator:
    return config.load(device)


@functools.lru_cache(maxsize=4)
def _transformer(dim: int, latent_dim: int, seed: int, device: torch.device) -> Architecture:
    with forked(seed, "fedktl-transformer"):
        return Architecture.of("transformer", transformer(dim, latent_dim), device)


@functools.lru_cache(maxsize=4)
def _projection(features: int, latent_dim: int, seed: int, device: torch.device) -> Architecture:
    """g and its initial values, from a seed that the server may have sent."""
    with forked(seed, "fedktl-projection"):
        return Architecture.of("projection", nn.Linear(features, latent_dim), device)
