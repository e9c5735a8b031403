"""`fldist bench fedf2dg`: FedF2DG's model inversion against the plain loop, in one process and with two hosts; and its
distillation against one that is scored after every mini-batch.

The plain loop is as published: networks in evaluation whose weights have gradients all the same, BatchNorm's statistics
by hooks that copy each activation to have its channels first, all by automatic differentiation, one client after the
other. Both forms get the same networks, noise and shifts, and the benchmark fails where their images are not the same
but for rounding after the first steps (later, rounding switches a ReLU, by chance). They take turns, on one thread, in
CPU seconds. With two hosts the runtime and the algorithm are the real ones, over gloo, and seconds are of the clock,
from the order to begin a round of generation to its end, when all images are at the server and the round is written.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from fldist.algorithms.fedf2dg import Kd, distil
from fldist.bench.autoflip import over, turns
from fldist.bench.exchange import CLASSES, SHAPE
from fldist.bench.measure import Figure, Report, Say, Target, check_same, cpu_seconds, quartiles
from fldist.bench.party import Orders, stage
from fldist.data.task import Architecture
from fldist.inversion import Inversion, draw, invert
from fldist.models.cnn import CnnBn
from fldist.models.evaluate import Evaluation, evaluate
from fldist.models.resnet import ResNet18Small
from fldist.models.train import Network, Order
from fldist.pruning.flops import Macs
from fldist.seeding import forked, generator

REPEATS = 7
SEED = 1
CPU = torch.device("cpu")
GRAY = (1, 28, 28)
CHECKED_STEPS = 3
SAME = 1e-4
"""Largest difference of two forms' images after the checked steps, relative to their norm: Adam's steps are as large
where a gradient is next to rounding as anywhere."""
KD_SAME = 1e-4
TARGET = Target(1.1, at_most=False)
HOSTS_TARGET = Target(1.8, at_most=False)
KD_TARGET = Target(8.0, at_most=False)
HOSTS = 2
WARM_UP = 2
KD_REPEATS = 3
SQUARE = 512


@dataclass(frozen=True)
class Case:
    """An inversion: of so many clients' networks, with so many images of each."""

    key: str
    model: CnnBn | ResNet18Small
    shape: tuple[int, int, int]
    clients: int
    images: int
    how: Inversion

    @property
    def what(self) -> str:
        """In words."""
        words = (
            f"{self.model.short_name}, {'x'.join(map(str, self.shape))}, clients {self.clients}, images {self.images}"
        )
        return words + (", competition" if self.how.alpha_c else "")

    def network(self, number: int) -> nn.Module:
        """Client `number`'s network, or behind the last client's the student, with some BatchNorm statistics."""
        with forked(SEED, "bench-network", number):
            module = self.model.build(self.shape, CLASSES)
            with torch.no_grad():
                module.train()(torch.randn(16, *self.shape))
        return module

    @property
    def flops(self) -> float:
        """Of a step of one client: forward and backward to the images of all networks that are asked."""
        networks = 2 if self.how.alpha_c else 1
        return 4.0 * networks * self.images * Macs.of(self.network(0), self.shape).total


CASES = (
    Case("cnn", CnnBn(), GRAY, 5, 64, Inversion(steps=15, alpha_bn=10)),
    Case("hard", CnnBn(), GRAY, 5, 64, Inversion(steps=10, alpha_bn=10, alpha_c=10)),
    Case("resnet", ResNet18Small(), SHAPE, 1, 8, Inversion(steps=4)),
)
QUICK = tuple(
    dataclasses.replace(case, clients=1, images=4, how=dataclasses.replace(case.how, steps=CHECKED_STEPS))
    for case in CASES[:2]
)


@dataclass(frozen=True)
class Sizes:
    """kd_*: images to be distilled, of a mini-batch, epochs, images of the test set; steps, images: with two hosts."""

    kd_images: int = 25_600
    kd_batch: int = 256
    kd_epochs: int = 1
    kd_test: int = 10_000
    steps: int = 40
    images: int = 64
    clients: int = 5


QUICK_SIZES = Sizes(kd_images=40, kd_batch=8, kd_test=40, steps=3, images=8, clients=2)
SMALL_SIZES = Sizes(kd_images=310, kd_batch=64, kd_epochs=10, kd_test=2_000)


# ---- the plain loop
class _Hook:
    """Notes the statistics of a BatchNorm layer's input as the published code does."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.distance = torch.zeros(())
        self._handle = layer.register_forward_hook(self._note)

    def _note(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
        (x,) = inputs
        assert layer.running_mean is not None and layer.running_var is not None
        mean = x.mean([0, 2, 3])
        variance = x.permute(1, 0, 2, 3).contiguous().view([x.shape[1], -1]).var(1, unbiased=False)
        self.distance = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - mean, 2)

    def close(self) -> None:
        self._handle.remove()


def plain_competition(z_u: Tensor, z_g: Tensor, temperature: float) -> Tensor:
    """R_comp by two divergences."""
    p, q = softmax(z_g / temperature, dim=1), softmax(z_u / temperature, dim=1)
    middle = torch.clamp(0.5 * (p + q), 0.01, 0.99)
    p, q = torch.clamp(p, 0.01, 0.99), torch.clamp(q, 0.01, 0.99)
    apart = [kl_div(x.log(), middle, reduction="batchmean") for x in (p, q)]
    return 1.0 - torch.clamp(0.5 * apart[0] + 0.5 * apart[1], 0.0, 1.0)


def plain(u: nn.Module, g: nn.Module, y: Tensor, x0: Tensor, shifts: Tensor, how: Inversion) -> Tensor:
    """Images of a network, step by step; arguments as of `invert`."""
    networks = [u, g] if how.alpha_c else [u]
    for network in networks:
        network.eval()
    hooks = [_Hook(layer) for layer in u.modules() if isinstance(layer, nn.BatchNorm2d)]
    x = x0.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], how.lr, (0.9, 0.999), 1e-8)
    for down, right in shifts.tolist():
        moved = torch.roll(x, (down, right), (2, 3))
        optimizer.zero_grad()
        for network in networks:
            network.zero_grad()
        z = u(moved)
        loss = cross_entropy(z, y)
        if how.alpha_c:
            loss = loss + how.alpha_c * plain_competition(z, g(moved), how.temperature_c)
        differences = (
            moved[:, :, :, :-1] - moved[:, :, :, 1:],
            moved[:, :, :-1, :] - moved[:, :, 1:, :],
            moved[:, :, 1:, :-1] - moved[:, :, :-1, 1:],
            moved[:, :, :-1, :-1] - moved[:, :, 1:, 1:],
        )
        loss = loss + how.alpha_tv * torch.stack([torch.norm(d) for d in differences]).sum()
        loss = loss + how.alpha_bn * torch.stack([hook.distance for hook in hooks]).sum()
        loss = loss + how.alpha_l2 * torch.norm(moved, 2)
        loss.backward()
        optimizer.step()
    for hook in hooks:
        hook.close()
    return x.detach()


Form = Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor, Inversion], Tensor]


@dataclass(frozen=True)
class Start:
    """What the inversions of a case begin with."""

    case: Case
    networks: Sequence[nn.Module]
    student: nn.Module
    y: Tensor

    @classmethod
    def of(cls, case: Case) -> Start:
        """All networks, and labels in ascending order."""
        networks = [case.network(number) for number in range(case.clients)]
        return cls(case, networks, case.network(case.clients), torch.arange(case.images) * CLASSES // case.images)

    def images(self, form: Form, how: Inversion) -> list[Tensor]:
        """Of one client after the other."""
        made = []
        for number, network in enumerate(self.networks):
            x0, shifts = draw(generator(SEED, "bench-noise", number), self.case.images, self.case.shape, how)
            made.append(form(network, self.student, self.y, x0, shifts, how))
        return made

    def seconds(self, form: Form, how: Inversion | None = None) -> float:
        """CPU seconds of all clients' inversions."""
        began = time.process_time()
        self.images(form, how or self.case.how)
        return time.process_time() - began


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """|one - other| / |other| over all tensors."""
    ours, theirs = (torch.cat([x.flatten() for x in all_]).double() for all_ in (one, other))
    return float((ours - theirs).norm() / theirs.norm())


# ---- measuring
def measure(repeats: int | None = None, *, quick: bool = False, say: Say = lambda text: None) -> Report:
    """Everything; see the module."""
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats: must be at least 1, got {repeats}")
    repeats = repeats or (2 if quick else REPEATS)
    sizes = QUICK_SIZES if quick else Sizes()
    report = Report("fedf2dg: model inversion and distillation against the plain loops", quick=quick)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        side = 64 if quick else SQUARE
        square = torch.randn(side, side, generator=generator(SEED, "bench-square"))
        product = [2e-9 * side**3 / cpu_seconds(lambda: square @ square, 5) for _ in range(repeats)]
        peak = report.add(Figure("product_gflop_per_s", f"a product of {side} x {side} matrices", product, "GFLOP/s"))
        for case in QUICK if quick else CASES:
            _measure_inversion(report, case, repeats, peak, say)
        _measure_hosts(report, repeats, sizes, say)
        for key, what, of, target in (
            ("kd", "script's proportions", sizes, KD_TARGET),
            ("kd_small", "small configuration's", QUICK_SIZES if quick else SMALL_SIZES, None),
        ):
            _measure_distillation(report, key, what, of, min(repeats, KD_REPEATS), target, say)
    finally:
        torch.set_num_threads(before)
    report.notes.append("one thread a process; inversions in one process and distillations in CPU seconds")
    return report


def _measure_inversion(report: Report, case: Case, repeats: int, peak: float, say: Say) -> None:
    say(f"fedf2dg: {case.what}: {case.how.steps} steps in both forms, {repeats} turns")
    start, how = Start.of(case), case.how
    first = dataclasses.replace(how, steps=CHECKED_STEPS)
    difference = check_same(apart(start.images(invert, first), start.images(plain, first)), SAME, case.what)
    alone = dataclasses.replace(how, alpha_bn=0.0, alpha_tv=0.0)
    variants = {
        "ours": functools.partial(start.seconds, invert),
        "plain": functools.partial(start.seconds, plain),
        "network": functools.partial(start.seconds, invert, alone),
        "statistics": functools.partial(start.seconds, invert, dataclasses.replace(how, alpha_tv=0.0)),
    }
    found = turns(variants, repeats)
    key, steps, images = case.key, how.steps * case.clients, case.clients * case.images
    report.add(Figure(f"{key}_ratio", f"{case.what}: plain / ours", over(found["plain"], found["ours"]), "", TARGET))
    for name, form in (("ours", ""), ("plain", "plain_")):
        values = [1e3 * s / steps for s in found[name]]
        report.add(Figure(f"{key}_{form}step_ms", f"  {name}: a step of a client", values, "ms"))
    for name, form in (("ours", ""), ("plain", "plain_")):
        values = [images * how.steps / s for s in found[name]]
        report.add(Figure(f"{key}_{form}image_steps_per_s", f"  {name}: images x steps a second", values, "1/s"))
    what = f"  images apart after {CHECKED_STEPS} steps"
    report.add(Figure(f"{key}_difference", what, [difference], "", Target(SAME)))
    network = over(found["network"], found["ours"])
    statistics = [s - n for s, n in zip(over(found["statistics"], found["ours"]), network, strict=True)]
    share = report.add(Figure(f"{key}_network_share", "  ours: without statistics and variation / all", network))
    of_statistics = report.add(Figure(f"{key}_statistics_share", "  ours: what statistics add / all", statistics))
    speed = [case.flops * steps / s / 1e9 for s in found["network"]]
    rate = report.add(
        Figure(f"{key}_gflop_per_s", "  ours: products, without statistics and variation", speed, "GFLOP/s")
    )
    report.limits.append(
        f"{case.what}: of a step, forward and backward of the networks and Adam are {100 * share:.0f} %, "
        f"statistics {100 * of_statistics:.0f} %; in the former the networks' products run at {rate:.0f} GFLOP/s, "
        f"{100 * rate / peak:.0f} % of a matrix product's rate"
    )


# ---- hosts
def config(rounds: int, sizes: Sizes) -> dict[str, Any]:
    """A run of one federated round and batches of images that clients make; nothing is written but its lines."""
    return {
        "name": "fedf2dg",
        "rounds": rounds,
        "clients": {"num_clients": sizes.clients},
        "task": {
            "data": {"name": "fldist.bench.exchange:Blank", "samples": 20 * CLASSES * sizes.clients},
            "normalize": "unit",
            "model": {"name": "cnn_bn"},
        },
        "local": {"epochs": 1, "batch_size": 64, "lr": 0.01},
        "algorithm": {
            "name": "fedf2dg",
            "generation": "client",
            "batches": rounds - 1,
            "hard_rounds": 0,
            "per_client": sizes.images,
            "inversion": {"steps": sizes.steps, "alpha_bn": 10.0},
            "show": 0,
        },
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "deadlines": {"join_s": 120.0, "round_deadline_s": 110.0},
    }


def invert_plainly(path: str, clients: int, images: int, steps: int) -> None:
    """Be the party that inverts clients' networks by the plain loop, all of them in each round."""
    torch.set_num_threads(1)
    how = Inversion(steps=steps, alpha_bn=10.0)
    start = Start.of(Case("hosts", CnnBn(), SHAPE, clients, images, how))
    start.images(plain, dataclasses.replace(how, steps=2))
    orders = Orders(path)
    orders.ready()
    while orders.wait():
        began = time.perf_counter()
        start.images(plain, how)
        orders.answer(round_s=time.perf_counter() - began, images=clients * images)


def _measure_hosts(report: Report, repeats: int, sizes: Sizes, say: Say) -> None:
    say(f"fedf2dg: a batch of images on {HOSTS} hosts, in one process, and by the plain loop, {repeats} turns")
    made = config(1 + WARM_UP + repeats, sizes)
    with stage() as place:
        parties = {
            "hosts": place.run("hosts", made, nproc=1 + HOSTS),
            "alone": place.run("alone", made),
            "plain": place.party(
                "plain",
                "fldist.bench.fedf2dg:invert_plainly",
                clients=sizes.clients,
                images=sizes.images,
                steps=sizes.steps,
            ),
        }
        for party in parties.values():
            party.ready()
        for _ in range(1 + WARM_UP):  # the federated round first
            for party in parties.values():
                party.go()

        def rate(name: str) -> float:
            told = parties[name].go()
            return told["images"] / told["round_s"]

        found = turns({name: functools.partial(rate, name) for name in parties}, repeats)
    what = f"cnn_bn, 3x32x32, {sizes.clients} clients: images a second, {HOSTS} hosts / plain loop"
    report.add(Figure("hosts_ratio", what, over(found["hosts"], found["plain"]), "", HOSTS_TARGET))
    scaling = over(found["hosts"], found["alone"])
    times = report.add(Figure("hosts_alone_ratio", f"  {HOSTS} hosts / ours in one process", scaling))
    for name, words in (("hosts", f"{HOSTS} hosts"), ("alone", "ours in one process"), ("plain", "plain loop")):
        what = f"  {words}: images a second, {sizes.steps} steps each"
        report.add(Figure(f"hosts_{name}_images_per_s", what, found[name], "1/s"))
    busiest = -(-sizes.clients // HOSTS)
    report.limits.append(
        f"{HOSTS} hosts: the busier one inverts {busiest} of {sizes.clients} networks, which allows "
        f"{sizes.clients / busiest:.2f} times the speed of one process; it is {times:.2f}"
    )


# ---- distillation
@dataclass(frozen=True)
class Distillation:
    """A student to be distilled. Teachers' logits are made once in both forms."""

    sizes: Sizes
    made: Architecture
    x: Tensor
    teacher: Tensor
    test: tuple[Tensor, Tensor]
    how: Kd

    @classmethod
    def of(cls, sizes: Sizes) -> Distillation:
        """Noise as images, the answers of another network to it, and a test set."""
        case = Case("kd", CnnBn(), GRAY, 1, 1, Inversion())
        rng = generator(SEED, "bench-images")
        x = torch.randn(sizes.kd_images, *GRAY, generator=rng)
        test = torch.randn(sizes.kd_test, *GRAY, generator=rng)
        labels = torch.randint(CLASSES, (sizes.kd_test,), generator=rng)
        with torch.no_grad():
            teacher = torch.cat([case.network(0).eval()(part.clone()) for part in x.split(256)])  # type: ignore[no-untyped-call]
        how = Kd(
            epochs=sizes.kd_epochs,
            lr=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            batch_size=sizes.kd_batch,
            temperature=3.0,
            weight=0.3,
            bn="train",
            reset=True,
        )
        return cls(sizes, Architecture.of("student", case.network(1), CPU), x, teacher, (test, labels), how)

    def _order(self) -> Order:
        return Order(len(self.x), self.how.batch_size, generator(SEED, "bench-order"))

    def _score(self, module: nn.Module) -> float:
        return evaluate(module, self._batches(), Evaluation()).accuracy

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.test
        yield from zip(x.split(256), y.split(256), strict=True)  # type: ignore[no-untyped-call]

    def way(self, student: nn.Module) -> list[Tensor]:
        """How far its parameters have come."""
        pairs = zip(student.parameters(), self.made.template.parameters(), strict=True)
        return [after.detach() - before.detach() for after, before in pairs]

    def ours(self, *, scored: bool = True) -> tuple[nn.Module, float]:
        """The student and CPU seconds; scored once an epoch, or never."""
        module = self.made.copy()
        network = Network(module, self.made.initial.clone())
        began = time.process_time()
        for _ in distil(network, self.x, self.teacher, self.how, self._order()):
            if scored:
                self._score(module)
        return module, time.process_time() - began

    def plain(self, *, scored: bool = True) -> tuple[nn.Module, float]:
        """The same, scored after every mini-batch, or never."""
        how, module = self.how, self.made.copy()
        self.made.initial.clone().bind(module)
        module.requires_grad_(True)
        order, t = self._order(), how.temperature
        began = time.process_time()
        for _ in range(how.epochs):
            optimizer = torch.optim.SGD(module.parameters(), how.lr, how.momentum, 0.0, how.weight_decay, nesterov=True)
            for rows in order.epoch():
                module.train()
                optimizer.zero_grad()
                aims = softmax(self.teacher[rows] / t, dim=1)
                logs = log_softmax(module(self.x[rows]) / t, dim=1)
                loss = how.weight * t * t * kl_div(logs, aims, reduction="batchmean")
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if scored:
                    self._score(module)
        return module, time.process_time() - began


def _measure_distillation(
    report: Report, key: str, what: str, sizes: Sizes, repeats: int, target: Target | None, say: Say
) -> None:
    say(f"fedf2dg: distillation, {what}: {repeats} turns")
    start = Distillation.of(sizes)
    how = dataclasses.replace(start.how, epochs=1)
    few = dataclasses.replace(
        start, how=how, x=start.x[: 4 * sizes.kd_batch], teacher=start.teacher[: 4 * sizes.kd_batch]
    )
    ways = [few.way(form(scored=False)[0]) for form in (few.ours, few.plain)]
    difference = check_same(apart(*ways), KD_SAME, "distillation")
    found = turns(
        {
            "ours": lambda: start.ours()[1],
            "plain": lambda: start.plain()[1],
            "unscored": lambda: start.ours(scored=False)[1],
        },
        repeats,
    )
    batches = -(-sizes.kd_images // sizes.kd_batch)
    words = f"distillation, {what}: {batches} mini-batches of {sizes.kd_batch}, {sizes.kd_test} test images"
    report.add(Figure(f"{key}_ratio", f"{words}: plain / ours", over(found["plain"], found["ours"]), "", target))
    report.add(Figure(f"{key}_s", "  ours: scored after each epoch", [s / sizes.kd_epochs for s in found["ours"]], "s"))
    plainly = [s / sizes.kd_epochs for s in found["plain"]]
    report.add(Figure(f"{key}_plain_s", "  plain: an epoch, scored after each mini-batch", plainly, "s"))
    once = over(found["plain"], found["unscored"])
    report.add(Figure(f"{key}_unscored_ratio", "  plain / ours never scored (select: last)", once))
    report.add(
        Figure(
            f"{key}_difference",
            "  students apart after four mini-batches / their way",
            [difference],
            "",
            Target(KD_SAME),
        )
    )
    share = 1.0 - quartiles(over(found["unscored"], found["ours"]))[1]
    report.limits.append(f"distillation, {what}: scores are {100 * share:.0f} % of our time, the rest is training")
