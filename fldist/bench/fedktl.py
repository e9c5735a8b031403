"""`fldist bench fedktl`: FedKTL's alignment against the same one batch by batch, with a data loader and automatic
differentiation; prototypes by sums against lists; what the transfer term adds to a client's training.

Batch by batch means as in the published code: a `DataLoader` over the prototypes, latents drawn for each batch (through
the generator's mapping network, where there is one), MMD as a sum over the kernels, `backward`, two optimizers. Both
forms get the same prototypes, permutations and latents, and the benchmark fails where they do not come to the same F
and E but for rounding in the first epochs. Sooner or later rounding switches a ReLU, from where on two forms go apart,
by chance; how far each is from the batch-by-batch form in float64 is told. They take turns, on one thread, in CPU
seconds. What a generator's images cost is not measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, mse_loss, normalize
from torch.utils.data import DataLoader, Sampler, TensorDataset

from fldist.algorithms.fedktl import (
    BANDWIDTHS,
    LATENTS,
    Alignment,
    Drawn,
    FedKtl,
    Pairs,
    align,
    etf,
    prototypes,
    transformer,
    unit,
)
from fldist.bench.autoflip import over, turns
from fldist.bench.exchange import CLASSES, SHAPE, Blank
from fldist.bench.measure import Figure, Report, Say, Target, check_same, cpu_seconds, quartiles
from fldist.data.client_data import ClientData
from fldist.data.partition import Iid
from fldist.data.task import Architecture, Task
from fldist.models.cnn import Cnn4
from fldist.models.generators.pretrained import ModuleGenerator, PretrainedGenerator
from fldist.models.train import LocalTraining, Network
from fldist.seeding import Streams, forked, generator

REPEATS = 7
SEED = 1
CPU = torch.device("cpu")
LR, LAMBDA, CLIP = 0.01, 1.0, 100.0
BATCH = 100
MAPPING_LAYERS = 8
SAME = 1e-4
CHECKED_EPOCHS = 3
TARGET = Target(1.2, at_most=False)
UNDETERMINED = ("0.bias", "1.running_mean")
"""F's bias before BatchNorm has no gradient, and Adam makes steps of whatever rounding leaves; the mean follows it."""
PARTS_TIMES = 200


@dataclass(frozen=True)
class Case:
    """An alignment. total: prototypes of all clients (U); h: values of a latent; deep: the generator has a mapping."""

    key: str
    what: str
    clients: int
    classes: int
    total: int
    h: int
    epochs: int
    deep: bool = False

    @property
    def steps(self) -> int:
        """Steps of Adam."""
        return self.epochs * math.ceil(self.total / BATCH)

    @property
    def flops(self) -> float:
        """Of the matrix products of our form: F forward and backward, two Gram matrices, two sums over the kernels."""
        c, h, counted = self.classes, self.h, 0.0
        for b in (len(rows) for rows in torch.arange(self.total).split(BATCH)):  # type: ignore[no-untyped-call]
            counted += 2 * b * (2 * c * c + 3 * c * h) + 4 * 2 * b * b * h
        return self.epochs * counted

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """Unit vectors [U, C] about the columns of an equiangular frame, and their classes: distinct in a client."""
        rng = generator(SEED, "bench-prototypes")
        held = [self.total // self.clients + (i < self.total % self.clients) for i in range(self.clients)]
        classes = torch.cat([torch.randperm(self.classes, generator=rng)[:m].sort().values for m in held])
        around = etf(self.classes, self.classes, SEED).T[classes]
        return unit(around + torch.randn(around.shape, generator=rng) / math.sqrt(self.classes)), classes

    def generator(self) -> PretrainedGenerator:
        """A generator of latents N(0, I), or of those that a deep mapping network of random weights makes of them."""
        mapping = None
        if self.deep:
            with forked(SEED, "bench-mapping"):
                mapping = StyleGanMapping(self.h)
        return ModuleGenerator(
            nn.Identity(),
            mapping,
            arch="bench",
            z_dim=self.h,
            latent_dim=self.h,
            image_shape=(1, 1, 1),
            value_range=(0.0, 1.0),
            device=CPU,
        )


CASES = (
    Case("steps", "20 clients, C = 100, H = 512, N(0, I)", 20, 100, 898, 512, 100),
    Case("deep", "20 clients, C = 100, H = 512, deep mapping", 20, 100, 898, 512, 20, deep=True),
    Case("small", "8 clients, C = 10, H = 32, N(0, I)", 8, 10, 36, 32, 100),
)
QUICK = (
    Case("steps", "4 clients, C = 10, H = 16, N(0, I)", 4, 10, 30, 16, 3),
    Case("deep", "4 clients, C = 10, H = 16, deep mapping", 4, 10, 30, 16, 3, deep=True),
)


class StyleGanMapping(nn.Module):
    """StyleGAN's mapping network, noise [n, h] -> latent [n, h], with weights as they begin: the noise normalised, then
    layers of h units with a learning rate of their own, of which every call makes the weights anew."""

    LR = 0.01

    def __init__(self, h: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(h, h) / self.LR for _ in range(MAPPING_LAYERS))
        self.shifts = nn.ParameterList(torch.zeros(h) for _ in range(MAPPING_LAYERS))

    def forward(self, z: Tensor) -> Tensor:
        """z: float32 [n, h]."""
        x = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for weight, shift in zip(self.layers, self.shifts, strict=True):
            scaled = weight * (self.LR / math.sqrt(len(weight)))
            x = leaky_relu(torch.addmm(shift * self.LR, x, scaled.T), 0.2) * math.sqrt(2)
        return x


# ---- measuring
def measure(repeats: int | None = None, *, quick: bool = False, say: Say = lambda text: None) -> Report:
    """Everything; see the module."""
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats: must be at least 1, got {repeats}")
    repeats = repeats or (2 if quick else REPEATS)
    report = Report("fedktl: the alignment, prototypes, and the transfer term of a client's training", quick=quick)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        side = 64 if quick else 1024
        square = torch.randn(side, side, generator=generator(SEED, "bench-square"))
        speed = [2e-9 * side**3 / cpu_seconds(lambda: square @ square, 5) for _ in range(repeats)]
        report.add(Figure("product_gflop_per_s", f"a product of {side} x {side} matrices", speed, "GFLOP/s"))
        for case in QUICK if quick else CASES:
            _measure_alignment(report, case, repeats, say)
        _measure_prototypes(report, repeats, say, clients=2 if quick else 20, samples=40 if quick else 2250)
        _measure_training(report, repeats, say, samples=20 if quick else 200)
    finally:
        torch.set_num_threads(before)
    report.notes.append("CPU seconds, one thread; the alignments start from the same F, E, prototypes and latents")
    return report


# ---- the alignment
@dataclass(frozen=True)
class Start:
    """What an alignment begins with; every call of `fast` and of `plain` comes to the same."""

    case: Case
    p: Tensor
    classes: Tensor
    f: Architecture
    e: Tensor
    made: PretrainedGenerator
    how: Alignment

    @classmethod
    def of(cls, case: Case) -> Start:
        """F and E at their initial values."""
        with forked(SEED, "bench-transformer"):
            f = Architecture.of("transformer", transformer(case.classes, case.h), CPU)
        e = torch.randn(case.classes, case.h, generator=generator(SEED, "bench-centroids"))
        how = Alignment(LR, case.epochs, BATCH, LAMBDA, CLIP, BANDWIDTHS)
        return cls(case, *case.prototypes(), f, e, case.generator(), how)


@dataclass(frozen=True)
class Aligned:
    """Where an alignment has come, and in how many CPU seconds."""

    f: Mapping[str, Tensor]
    e: Tensor
    seconds: float


def fast(start: Start) -> Aligned:
    """The alignment that runs make."""
    order, noise = _streams()
    module = start.f.copy()
    network = Network(module, start.f.initial.clone())
    began = time.process_time()
    e, _ = align(network, start.e, start.p, start.classes, Drawn(start.made, noise, CPU), start.how, order)
    seconds = time.process_time() - began
    return Aligned(module.state_dict(), e, seconds)


class _Shuffled(Sampler[int]):
    """A new permutation in each pass, from one generator."""

    def __init__(self, n: int, rng: torch.Generator) -> None:
        self._n, self._rng = n, rng

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._n, generator=self._rng).tolist()


def plain(start: Start, dtype: torch.dtype = torch.float32) -> Aligned:
    """The alignment batch by batch."""
    order, noise = _streams()
    how, f = start.how, start.f.copy()
    start.f.initial.clone().bind(f)
    f.to(dtype).train().requires_grad_(True)
    e = nn.Embedding.from_pretrained(start.e.to(dtype, copy=True), freeze=False)  # type: ignore[no-untyped-call]
    began = time.process_time()
    loader = DataLoader(
        TensorDataset(start.p.to(dtype), start.classes), how.batch_size, sampler=_Shuffled(len(start.p), order)
    )
    optimizers = [torch.optim.Adam(f.parameters(), how.lr), torch.optim.Adam(e.parameters(), how.lr)]
    for _ in range(how.epochs):
        for p, classes in loader:
            w = start.made.sample_latents(len(p), noise).to(dtype)
            q = f(p)
            loss = plain_mmd(q, w, how.bandwidths) + how.lambda_ * mse_loss(q, e(classes))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for module in (f, e):
                nn.utils.clip_grad_norm_(module.parameters(), how.clip)
            for optimizer in optimizers:
                optimizer.step()
    seconds = time.process_time() - began
    return Aligned(f.state_dict(), e.weight.detach(), seconds)


def plain_mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """MMD(X, Y) of x and y [b, H] by three Gram matrices and a sum over the kernels of each."""
    xx, yy, xy = x @ x.T, y @ y.T, x @ y.T
    of_x, of_y = xx.diag().expand_as(xx), yy.diag().expand_as(yy)
    among_x, among_y, across = of_x.T + of_x - 2 * xx, of_y.T + of_y - 2 * yy, of_x.T + of_y - 2 * xy
    k_xx, k_yy, k_xy = torch.zeros_like(xx), torch.zeros_like(xx), torch.zeros_like(xx)
    for width in bandwidths:
        k_xx = k_xx + torch.exp(-0.5 * among_x / width)
        k_yy = k_yy + torch.exp(-0.5 * among_y / width)
        k_xy = k_xy + torch.exp(-0.5 * across / width)
    return (k_xx + k_yy - 2 * k_xy).mean()


def _streams() -> tuple[torch.Generator, torch.Generator]:
    """Of the permutations and of the latents."""
    return generator(SEED, "bench-order"), generator(SEED, "bench-latents")


def apart(one: Aligned, other: Aligned) -> float:
    """|one - other| / |other| over all entries of E and of F's tensors, `UNDETERMINED` ones excepted."""
    names = [name for name, value in one.f.items() if value.is_floating_point() and name not in UNDETERMINED]
    ours, theirs = (torch.cat([x.e.flatten(), *(x.f[name].flatten() for name in names)]).double() for x in (one, other))
    return float((ours - theirs).norm() / theirs.norm())


def _measure_alignment(report: Report, case: Case, repeats: int, say: Say) -> None:
    say(f"fedktl: {case.what}: {case.steps} steps in both forms, {repeats} turns")
    start = Start.of(case)
    first = dataclasses.replace(start, how=dataclasses.replace(start.how, epochs=min(CHECKED_EPOCHS, case.epochs)))
    difference = check_same(apart(fast(first), plain(first)), SAME, case.what)
    exact = plain(start, torch.float64)
    found = turns({"ours": lambda: fast(start).seconds, "plain": lambda: plain(start).seconds}, repeats)
    ours, key, name = found["ours"], case.key, case.what
    ratio = over(found["plain"], ours)
    target = TARGET if key == "steps" else None
    report.add(Figure(f"{key}_ratio", f"{name}: batch by batch / ours", ratio, "", target))
    each = report.add(Figure(f"{key}_step_s", "  ours: a step", [s / case.steps for s in ours], "s"))
    report.add(Figure(f"{key}_s", f"  ours: {case.steps} steps", ours, "s"))
    report.add(Figure(f"{key}_plain_s", f"  batch by batch: {case.steps} steps", found["plain"], "s"))
    what = f"  F and E apart after {first.how.epochs} epochs"
    report.add(Figure(f"{key}_difference", what, [difference], "", Target(SAME)))
    what = f"  F and E after {case.epochs} epochs, from float64"
    report.add(Figure(f"{key}_exact_difference", f"{what}: ours", [apart(fast(start), exact)]))
    report.add(Figure(f"{key}_plain_exact_difference", f"{what}: batch by batch", [apart(plain(start), exact)]))
    speed = [case.flops / s / 1e9 for s in ours]
    done = report.add(Figure(f"{key}_gflop_per_s", "  ours: matrix products, over the whole time", speed, "GFLOP/s"))
    parts = {name: [s / each for s in values] for name, values in turns(_parts(start), repeats).items()}
    shares = {
        name: report.add(Figure(f"{key}_{name}_share", f"  {WHAT[name]} alone / a step", values))
        for name, values in parts.items()
    }
    told = ", ".join(f"{WHAT[name]} {100 * share:.0f} %" for name, share in shares.items())
    report.limits.append(
        f"{case.what}: of a step, each measured alone: {told}; the rest is elementwise work, caches and Python; "
        f"alone the products run at {done / shares['products']:.0f} GFLOP/s"
    )


WHAT = {"products": "matrix products", "latents": "latents", "adam": "Adam"}


def _parts(start: Start) -> dict[str, Callable[[], float]]:
    """What a step consists of above all: the CPU seconds of each alone, with arrays of the same sizes."""
    case = start.case
    b = min(BATCH, case.total)
    x, y = torch.randn(2, b, case.h).unbind()
    p, s = torch.randn(b, case.classes), torch.randn(b, b)
    w1, w2 = torch.randn(case.classes, case.classes), torch.randn(case.h, case.classes)
    weights = nn.Parameter(torch.randn(start.f.initial.layout.num_params + start.e.numel()))
    weights.grad = torch.randn(weights.shape)
    adam = torch.optim.Adam([weights], LR, fused=True)
    noise = _streams()[1]

    def products() -> None:
        forward, gram, sums = (p @ w1.T, p @ w2.T), (x @ y.T, x @ x.T), (s @ y, s @ x)
        backward = (x.T @ p, x @ w2, p.T @ p)
        del forward, gram, sums, backward

    def block() -> None:
        start.made.sample_latents(LATENTS, noise)

    return {
        "products": lambda: cpu_seconds(products, PARTS_TIMES),
        "latents": lambda: cpu_seconds(block, 2) * b / LATENTS,
        "adam": lambda: cpu_seconds(adam.step, PARTS_TIMES),
    }


# ---- clients
def listed(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`prototypes` by a list of vectors for each class, one sample at a time."""
    found: dict[int, list[Tensor]] = {}
    for row, label in zip(normalize(z), y, strict=True):
        found.setdefault(int(label), []).append(row)
    means = []
    for label in sorted(found):
        total = torch.zeros_like(found[label][0])
        for row in found[label]:
            total += row
        means.append(normalize(total / len(found[label]), dim=0))
    return torch.stack(means), torch.tensor(sorted(found), dtype=torch.int32)


def _measure_prototypes(report: Report, repeats: int, say: Say, clients: int, samples: int) -> None:
    say(f"fedktl: prototypes of {clients} clients by sums and by lists, {repeats} turns")
    rng = generator(SEED, "bench-outputs")
    classes = 100
    outputs = [
        (torch.randn(samples, classes, generator=rng), torch.randint(classes, (samples,), generator=rng))
        for _ in range(clients)
    ]
    forms: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "sums": functools.partial(prototypes, num_classes=classes),
        "lists": listed,
    }
    for z, y in outputs:
        (p, held), (other, others) = (form(z, y) for form in forms.values())
        gap = float((p - other).abs().max()) if torch.equal(held, others) else math.inf
        difference = check_same(gap, SAME, "prototypes")

    def seconds(form: Callable[[Tensor, Tensor], object]) -> float:
        began = time.process_time()
        for z, y in outputs:
            form(z, y)
        return time.process_time() - began

    found = turns({name: functools.partial(seconds, form) for name, form in forms.items()}, repeats)
    what = f"prototypes, {clients} clients of {samples} samples, d = C = {classes}: lists / sums"
    report.add(Figure("prototypes_ratio", what, over(found["lists"], found["sums"])))
    report.add(Figure("prototypes_s", "  by sums", found["sums"], "s"))
    report.add(Figure("prototypes_lists_s", "  by lists", found["lists"], "s"))
    report.add(Figure("prototypes_difference", "  prototypes apart", [difference], "", Target(SAME)))


class _TwoPasses(Pairs):
    """Pairs that go through the model after the client's batch, as they must where there is BatchNorm."""

    def __init__(self, data: ClientData, images: Tensor, vectors: Tensor, g: nn.Module) -> None:
        super().__init__(data, images, vectors, g)
        self._norm = True


def _measure_training(report: Report, repeats: int, say: Say, samples: int) -> None:
    say(f"fedktl: a client's training with and without pairs, {repeats} turns")
    task = Task(
        dataset=Blank(samples).load(),
        partition=Iid(),
        num_clients=1,
        build=Cnn4().build,
        local=LocalTraining(batch_size=10, lr=0.01),
        seed=SEED,
        partition_seed=SEED,
    )
    algorithm, start, v = FedKtl(), task.init_params(), etf(CLASSES, CLASSES, SEED)
    rng = generator(SEED, "bench-pairs")
    images, vectors = torch.randn(CLASSES, *SHAPE, generator=rng), torch.randn(CLASSES, 512, generator=rng)
    with forked(SEED, "bench-projection"):
        made = Architecture.of("projection", nn.Linear(512, 512), CPU)

    def seconds(pairs: type[Pairs] | None) -> float:
        data = ClientData(task, 0, Streams(SEED, 1, 0))
        began = time.process_time()
        if pairs is None:
            steps = data.train(start, loss=algorithm.loss(v), clip=CLIP).steps
        else:
            with task.network(made.initial, made) as g:
                loss = algorithm.loss(v, pairs(data, images, vectors, g.module))
                steps = data.train(start, loss=loss, clip=CLIP, beside=[g]).steps
        return (time.process_time() - began) / steps

    forms = {"alone": None, "pairs": Pairs, "two_passes": _TwoPasses}
    for form in forms.values():
        seconds(form)
    found = turns({name: functools.partial(seconds, form) for name, form in forms.items()}, repeats)
    what = "training CNN4, 3x32x32, K = H = 512, batch 10: with pairs / alone"
    report.add(Figure("train_ratio", what, over(found["pairs"], found["alone"])))
    what = "  the same, real and generated batch in two passes / alone"
    report.add(Figure("train_two_passes_ratio", what, over(found["two_passes"], found["alone"])))
    report.add(Figure("train_alone_s", "  a step alone", found["alone"], "s"))
    report.add(Figure("train_pairs_s", "  a step with pairs", found["pairs"], "s"))
    times = quartiles(over(found["pairs"], found["alone"]))[1]
    report.limits.append(f"a client's step: pairs double its images, and it takes {times:.2f} times as long")
