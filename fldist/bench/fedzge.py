"""`fldist bench fedzge`: what a round's queries cost when a key stands for the directions, against moved images sent
one by one; what limits them; and what the closed form of the diversity term saves.

Noise in the shape of CIFAR-10, a small CNN, four clients on two hosts over gloo. The runtime and the algorithm are the
real ones: `Timed` is FedZGE that notes when things happen. Nothing is learnt from the images (learning rates of next to
0), so that in every round all wires are asked about the same images and models and must come to the same gradient; the
benchmark fails where they do not. An exchange goes from the moment when the images are made to the moment when the
gradient on them is known. The time on a slower link is a price: bytes by rate on top of what was measured.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fldist.algorithm import Clients, Me, Server
from fldist.algorithms.fedzge import Answers, Batch, FedZge, Revelation, diversity
from fldist.bench.autoflip import over, turns
from fldist.bench.exchange import CLASSES, SHAPE
from fldist.bench.measure import Answer, Figure, Pair, Report, Say, Target, interleave, quartiles, ratios
from fldist.bench.party import Orders, Party, Stage, forget_peak, memory, stage
from fldist.config import components, load
from fldist.data.client_data import ClientData
from fldist.directions import Directions, Law, held
from fldist.distillation import logits_of
from fldist.models.train import Network
from fldist.seeding import generator

HOSTS = 2
CLIENTS = 4
SAMPLES = 8
"""Of a client: its local training is next to nothing."""
WARM_UP = 2
REPEATS = 7
CNN = {"name": "cnn", "widths": [8, 16], "kernels": [5, 3], "strides": 2, "paddings": [2, 1], "hidden": []}
RESNET = "resnet18_32"
LINK = 12.5e6
"""Bytes a second of a link of 100 Mbit/s."""
NZ = 100
CLOSED_TIMES = 20
RESNET_TURNS = 2

SAME = 1e-5
EXCHANGE_TARGET = Target(1.0)
SAME_TARGET = Target(SAME)
LINK_TARGET = Target(5.0, at_most=False)
DIVERSITY_TARGET = Target(20.0, at_most=False)
PAIRWISE_ARRAYS = 6
"""Arrays of N x N x d that the diversity term by its definition and its gradient need at a time, with a reserve."""


@dataclass(frozen=True)
class Sizes:
    """n: images of a round (N); q: directions; ngf: width of the generator; resnet: images of ResNet-18's chunks."""

    n: int = 500
    q: int = 10
    ngf: int = 4
    resnet: int = 64

    @property
    def d(self) -> int:
        """Values of an image."""
        return SHAPE[0] * SHAPE[1] * SHAPE[2]


QUICK = Sizes(n=12, q=2, ngf=2, resnet=0)


# ---- what runs
@dataclass(frozen=True)
class Timed(FedZge):
    """FedZGE that logs when a round's images were made (`made_at`), the answers were there (`answered_at`) and the
    gradient on the images was known (`estimated_at`), and leaves beside `keep` that gradient (`KEEP.npy`) and what its
    processes spent (`KEEP-PID.jsonl`, see `spent`)."""

    keep: str = ""

    @contextmanager
    def generating(self, server: Server, step: int) -> Iterator[tuple[Network, Batch]]:
        """As ever."""
        with self.generator_of(server.task).module() as module:  # the one that is borrowed next
            hook = module.register_forward_hook(lambda *_: server.log(made_at=time.perf_counter()))
        try:
            with super().generating(server, step) as made:
                yield made
        finally:
            hook.remove()

    def ask(self, server: Server, clients: Clients, replied: Sequence[int], batch: Batch) -> Answers:
        """As ever."""
        answers = super().ask(server, clients, replied, batch)
        server.log(answered_at=time.perf_counter())
        return answers

    def image_gradient(self, server: Server, batch: Batch, answers: Answers, revealed: Revelation | None) -> Tensor:
        """As ever."""
        g = super().image_gradient(server, batch, answers, revealed)
        server.log(estimated_at=time.perf_counter())
        np.save(f"{self.keep}.npy", g.numpy())
        return g

    def moved(self, x: Tensor, directions: Directions, out: Tensor | None = None) -> Iterator[Tensor]:
        """As ever."""
        seconds, began = 0.0, time.perf_counter()
        for one in super().moved(x, directions, out):
            seconds += time.perf_counter() - began
            yield one
            began = time.perf_counter()
        self._note(moved_s=seconds)

    def moved_answers(
        self, me: Me, data: ClientData, x: Tensor, key: int, stream: int, base: Tensor | None = None
    ) -> Tensor:
        """As ever."""
        began = time.perf_counter()
        logits = super().moved_answers(me, data, x, key, stream, base)
        self._note(answered_s=time.perf_counter() - began)
        return logits

    def _note(self, **seconds: float) -> None:
        with Path(f"{self.keep}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(seconds) + "\n")


def spent(keep: Path) -> dict[str, float]:
    """What the host that was busiest with its clients' answers spent since this was last called: `answered_s`, and
    within it `moved_s` for the directions and the moved images; empty where no host has noted anything."""
    hosts: list[dict[str, float]] = []
    for file in keep.parent.glob(f"{keep.name}-*.jsonl"):
        totals: dict[str, float] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            for name, seconds in json.loads(line).items():
                totals[name] = totals.get(name, 0.0) + seconds
        file.unlink()
        if "answered_s" in totals:
            hosts.append(totals)
    return max(hosts, key=lambda totals: totals["answered_s"], default={})


def config(wire: str, keep: Path, rounds: int, sizes: Sizes, **algorithm: Any) -> dict[str, Any]:
    """A run of `Timed`; nothing is written to the disk but its lines and the notes."""
    return {
        "name": "fedzge",
        "rounds": rounds,
        "clients": {"num_clients": CLIENTS, "init": "own"},
        "task": {
            "data": {"name": "fldist.bench.exchange:Blank", "samples": SAMPLES * CLIENTS},
            "normalize": "unit",
            "model": CNN,
        },
        "local": {"epochs": 1, "batch_size": SAMPLES, "optimizer": "adam", "lr": 0.002},
        "algorithm": {
            "name": "fldist.bench.fedzge:Timed",
            "keep": str(keep),
            "wire": wire,
            "synthetic": sizes.n,
            "q": sizes.q,
            "generator": {"nz": NZ, "ngf": sizes.ngf},
            "lr_generator": 0.0,
            "server_steps": 0,
            "client_steps": 1,  # so that the ensemble's logits travel
            "client_lr": 1e-12,  # less than a weight's last bit
            "show_every": 0,
            **algorithm,
        },
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "deadlines": {"join_s": 120.0, "round_deadline_s": 60.0},
    }


# ---- measuring
def measure(repeats: int | None = None, *, quick: bool = False, say: Say = lambda text: None) -> Report:
    """Everything; see the module."""
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats: must be at least 1, got {repeats}")
    repeats = repeats or (2 if quick else REPEATS)
    sizes = QUICK if quick else Sizes()
    report = Report(
        f"fedzge: {sizes.n} images {'x'.join(map(str, SHAPE))}, {sizes.q} directions, small CNN, {CLIENTS} clients on "
        f"{HOSTS} hosts, gloo",
        quick=quick,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stage() as place:
            _measure_exchange(report, place, repeats, sizes, say)
        with stage() as place:
            _measure_diversity(report, place, sizes, say)
        _measure_chunks(report, repeats, sizes, say)
        _measure_directions(report, repeats, sizes, say)
    finally:
        torch.set_num_threads(before)
    report.notes.append(
        f"one thread a process; an exchange is timed at the server, from the images to the gradient on them: the "
        f"generator, of ngf {sizes.ngf}, is no part of it"
    )
    return report


# ---- an exchange
class _Wire:
    """A run that does a round at a time, with what it leaves behind."""

    def __init__(self, place: Stage, name: str, wire: str, rounds: int, sizes: Sizes, **algorithm: Any) -> None:
        self._keep = place.directory / name
        self._lines = place.directory / f"{name}-run" / "rounds.jsonl"
        self.party: Party = place.run(name, config(wire, self._keep, rounds, sizes, **algorithm), nproc=1 + HOSTS)

    def go(self) -> Answer:
        """A round: `exchange_s`, of which `gradient_s` behind the last answer, and what `spent` says."""
        told = self.party.go()
        at = {name: told[f"{name}_at"] for name in ("made", "answered", "estimated")}
        return {
            "exchange_s": at["estimated"] - at["made"],
            "gradient_s": at["estimated"] - at["answered"],
            **spent(self._keep),
        }

    def gradient(self) -> np.ndarray[Any, Any]:
        """g [N, d] of the last round."""
        made: np.ndarray[Any, Any] = np.load(self._keep.with_suffix(".npy"), allow_pickle=False)
        return made

    def bytes(self) -> tuple[int, int]:
        """Of the last round: bytes of a client, but for its number of samples; bytes that the transport moved during
        the queries, in the busier direction at the server."""
        told = json.loads(self._lines.read_text(encoding="utf-8").splitlines()[-1])["bytes"]
        kinds = told["by_kind"]
        logical = sum(sum(both.values()) for kind, both in kinds.items() if kind != "scalars")
        return logical // CLIENTS, max(told["wire_by_phase"]["query"].values())


def apart(g: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """|g - other| / |other|."""
    return float(np.linalg.norm(g.astype(np.float64) - other) / np.linalg.norm(other.astype(np.float64)))


def check_same(difference: Mapping[str, Sequence[float]]) -> None:
    """RuntimeError where a wire has come to another gradient than f0. difference: `apart` in each round, by wire."""
    for name, found in difference.items():
        for value in found:
            if not value <= SAME:
                raise RuntimeError(f"{name} and f0 come to gradients that are {value:.2g} apart, above {SAME:g}")


def link_seconds(measured: Sequence[float], transported: int) -> list[float]:
    """What exchanges would take on a link of 100 Mbit/s: as measured, and its bytes by its rate; no latency."""
    return [s + transported / LINK for s in measured]


def _measure_exchange(report: Report, place: Stage, repeats: int, sizes: Sizes, say: Say) -> None:
    say(f"fedzge: {repeats} pairs of f2 and f0, and f1 and f2 with directions on the sphere behind each")
    rounds = WARM_UP + repeats
    f2, f0, f1 = (_Wire(place, name, name, rounds, sizes) for name in ("f2", "f0", "f1"))
    sphere = _Wire(place, "sphere", "f2", rounds, sizes, directions="sphere")
    everyone = (f2, f0, f1, sphere)
    for run in everyone:
        run.party.ready()
    for _ in range(WARM_UP):
        for run in everyone:
            run.go()
    aside: list[Pair] = []
    difference: dict[str, list[float]] = {"f1": [], "f2": []}

    def behind() -> None:
        aside.append(Pair(f1.go(), sphere.go()))
        published = f0.gradient()
        for name, run in (("f1", f1), ("f2", f2)):
            difference[name].append(apart(run.gradient(), published))

    done = interleave(f2.go, f0.go, repeats, after=behind)
    check_same(difference)
    _report_exchange(report, done, aside, difference, (f0, f1, f2))
    _report_limits(report, [pair.ours for pair in done])


def _report_exchange(
    report: Report,
    done: Sequence[Pair],
    aside: Sequence[Pair],
    difference: Mapping[str, Sequence[float]],
    runs: tuple[_Wire, _Wire, _Wire],
) -> None:
    """done: f2 and f0; aside: f1 and f2 with the other law, behind them; runs: f0, f1, f2."""
    seconds = {
        "f2": [pair.ours["exchange_s"] for pair in done],
        "f0": [pair.other["exchange_s"] for pair in done],
        "f1": [pair.ours["exchange_s"] for pair in aside],
        "sphere": [pair.other["exchange_s"] for pair in aside],
    }
    values = ratios(done, "exchange_s", "exchange_s")
    report.add(Figure("f2_ratio", "an exchange: f2 / f0", values, "", EXCHANGE_TARGET))
    report.add(Figure("f1_ratio", "an exchange: f1 / f0", over(seconds["f1"], seconds["f0"])))
    values = over(seconds["sphere"], seconds["f2"])
    report.add(Figure("sphere_ratio", "an exchange, f2: sphere / rademacher", values))
    for name in ("f0", "f1", "f2"):
        report.add(Figure(f"{name}_s", f"an exchange: {name}", seconds[name], "s"))
    for name, found in difference.items():
        report.add(Figure(f"{name}_difference", f"gradient on the images: {name} from f0", found, "", SAME_TARGET))
    counted = {name: run.bytes() for name, run in zip(("f0", "f1", "f2"), runs, strict=True)}
    on_link = {name: link_seconds(seconds[name], counted[name][1]) for name in counted}
    values = over(on_link["f0"], on_link["f2"])
    report.add(Figure("link_ratio", "priced at 100 Mbit/s: f0 / f2", values, "", LINK_TARGET))
    for name in ("f0", "f2"):
        report.add(Figure(f"{name}_link_s", f"priced at 100 Mbit/s: {name}", on_link[name], "s"))
    for name in ("f0", "f2"):
        report.add(Figure(f"{name}_bytes", f"a client and round: {name}", [float(counted[name][0])], "B"))
    report.notes.append(
        "a client and round, without its number of samples (8 bytes in each reply that has logits): "
        + ", ".join(f"{name} {each:,} bytes" for name, (each, _) in counted.items())
    )
    told = " and ".join(f"{name}'s {counted[name][1]:,} bytes" for name in ("f0", "f2"))
    report.notes.append(
        f"100 Mbit/s is priced, not measured: seconds on loopback, and {told} from the server to {HOSTS} hosts by "
        "12.5 MB/s; no latency, nothing overlaps"
    )


def _report_limits(report: Report, rounds: Sequence[Answer]) -> None:
    """Of what an exchange with f2 consists."""
    parts = {
        "forward": ("clients' forward passes", [r["answered_s"] - r["moved_s"] for r in rounds]),
        "moved": ("directions and moved images at a host", [r["moved_s"] for r in rounds]),
        "gradient": ("gradient at the server", [r["gradient_s"] for r in rounds]),
        "transfer": (
            "all else: sending, packing, folding",
            [r["exchange_s"] - r["answered_s"] - r["gradient_s"] for r in rounds],
        ),
    }
    whole = [r["exchange_s"] for r in rounds]
    shares = []
    for key, (what, values) in parts.items():
        report.add(Figure(f"f2_{key}_s", f"  f2: {what}", values, "s"))
        shares.append(f"{what} {100 * quartiles(over(values, whole))[1]:.0f} %")
    report.limits.append(
        f"an exchange with f2: {', '.join(shares)}; clients of a host answer one after the other, hosts at the same "
        f"time, the busier one of {HOSTS} counts"
    )


# ---- the diversity term
def pairwise(x: Tensor, z: Tensor) -> Tensor:
    """L_div as it is defined, over an array [N, N, d]."""
    flat = x.reshape(len(x), -1)
    images = (flat[:, None] - flat[None]).square().mean(dim=2)
    noise = (z[:, None] - z[None]).square().mean(dim=2)
    return torch.exp(-(images * noise).mean())


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"closed": diversity, "pairs": pairwise}


def differentiate(path: str, form: str, n: int, times: int, keep: str) -> None:
    """Be the party that takes the diversity term of n images and its gradient, `times` in its only round; it leaves
    both in the file `keep`, and tells seconds and, where the system knows them, the bytes of memory that one takes."""
    torch.set_num_threads(1)
    rng = generator(0, "bench-diversity")
    x = torch.rand(n, *SHAPE, generator=rng).mul_(2).sub_(1).requires_grad_(True)
    z = torch.randn(n, NZ, generator=rng)

    def once(x: Tensor) -> tuple[Tensor, Tensor]:
        value = FORMS[form](x, z[: len(x)])
        (g,) = torch.autograd.grad(value, x)
        return value.detach(), g

    once(x.detach()[:4].clone().requires_grad_(True))
    orders = Orders(path)
    orders.ready()
    if not orders.wait():
        return
    base = memory() if forget_peak() else {}
    told: dict[str, float] = {}
    began = time.perf_counter()
    for number in range(times):
        value, g = once(x)
        if base and number == 0:
            told["needed_bytes"] = memory()["peak_bytes"] - base["rss_bytes"]
    told["round_s"] = (time.perf_counter() - began) / times
    np.save(keep, torch.cat([value.reshape(1), g.flatten()]).numpy())
    orders.answer(**told)


def _available() -> float:
    """Bytes of memory that this system can give; infinity where it does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return float("inf")
    found = dict(line.split(":", 1) for line in text.splitlines())
    return float(found["MemAvailable"].split()[0]) * 1024


def _measure_diversity(report: Report, place: Stage, sizes: Sizes, say: Say) -> None:
    needed = PAIRWISE_ARRAYS * 4 * sizes.n**2 * sizes.d
    if _available() < needed:
        report.absent.append(
            f"the diversity term by its definition: it needs about {needed / 1e9:.0f} GB of memory, which are not free"
        )
        return
    say(f"fedzge: the diversity term of {sizes.n} images by its definition, once, and in closed form")
    told: dict[str, Answer] = {}
    found: dict[str, np.ndarray[Any, Any]] = {}
    for form, times in (("closed", CLOSED_TIMES), ("pairs", 1)):
        keep = place.directory / f"{form}.npy"
        party = place.party(
            form, "fldist.bench.fedzge:differentiate", form=form, n=sizes.n, times=times, keep=str(keep)
        )
        party.ready()
        told[form] = party.go()
        found[form] = np.load(keep, allow_pickle=False)
    values = {
        "value": abs(float(found["closed"][0] / found["pairs"][0]) - 1.0),
        "gradient": apart(found["closed"][1:], found["pairs"][1:]),
    }
    seconds = {form: told[form]["round_s"] for form in told}
    ratio = seconds["pairs"] / seconds["closed"]
    report.add(Figure("diversity_ratio", "diversity term: N x N x d / closed form", [ratio], "", DIVERSITY_TARGET))
    if all("needed_bytes" in answer for answer in told.values()):
        mb = {form: told[form]["needed_bytes"] / 1e6 for form in told}
        values_mb = [mb["pairs"] / max(mb["closed"], 0.1)]
        report.add(Figure("diversity_memory_ratio", "  the same, memory", values_mb, "", DIVERSITY_TARGET))
        report.add(Figure("diversity_mb", "  closed form: memory", [mb["closed"]], "MB"))
        report.add(Figure("diversity_pairs_mb", "  N x N x d: memory", [mb["pairs"]], "MB"))
    else:
        report.absent.append("the diversity term's memory: this system does not tell a process's peak")
    report.add(Figure("diversity_s", "  closed form, with gradient", [seconds["closed"]], "s"))
    report.add(Figure("diversity_pairs_s", "  N x N x d, with gradient", [seconds["pairs"]], "s"))
    report.add(Figure("diversity_difference", "  values apart, relative", [values["value"]], "", SAME_TARGET))
    report.add(
        Figure("diversity_gradient_difference", "  gradients apart, relative", [values["gradient"]], "", SAME_TARGET)
    )


# ---- chunks
class Passes:
    """Forward passes of blocks of images [N, ...], some images at a time.

    network: images -> logits; blocks: at least one, all of the same size.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[Tensor]) -> None:
        self._network, self._blocks = network, blocks
        self._stacked = torch.cat(list(blocks))
        self._expected: Tensor | None = None

    def per_second(self, size: int) -> float:
        """Images a second in passes of `size`: block by block, or all blocks as one where that is their size.

        RuntimeError where logits are not those of other sizes but for rounding.
        """
        blocks = [self._stacked] if size == len(self._stacked) else self._blocks
        began = time.perf_counter()
        logits = torch.cat([logits_of(self._network, block, size) for block in blocks])
        seconds = time.perf_counter() - began
        if self._expected is None:
            self._expected = logits
        difference = float((logits - self._expected).abs().max() / self._expected.abs().max())
        if not difference <= SAME:
            raise RuntimeError(f"logits in passes of {size} images are {difference:.2g} apart, above {SAME:g}")
        return len(self._stacked) / seconds


def _measure_chunks(report: Report, repeats: int, sizes: Sizes, say: Say) -> None:
    _measure_chunks_of(report, "cnn", "CNN", CNN, sizes.n, sizes.q + 1, repeats, say)
    if sizes.resnet:
        _measure_chunks_of(report, "resnet", "ResNet-18", RESNET, sizes.resnet, 2, RESNET_TURNS, say)


def _measure_chunks_of(
    report: Report, key: str, name: str, model: Any, n: int, count: int, repeats: int, say: Say
) -> None:
    """count: blocks of n images."""
    say(f"fedzge: {name}: {count} blocks of {n} images in passes of several sizes, {repeats} turns")
    build = components(load({"task": {"model": model}})).build_model
    network = build(SHAPE, CLASSES).eval().requires_grad_(False)
    rng = generator(0, "bench-chunks")
    blocks = [torch.rand(n, *SHAPE, generator=rng) for _ in range(count)]
    passes = Passes(network, blocks)
    by_size = (n // 4, n // 2, n, count * n)
    found = turns({str(size): functools.partial(passes.per_second, size) for size in by_size}, repeats)
    for size in by_size:
        what = f"{name}: passes of {size} images" + {n: " (N)", count * n: " (all stacked)"}.get(size, "")
        report.add(Figure(f"{key}_chunk_{size}_per_s", what, found[str(size)], "images/s"))
    best = max((quartiles(over(found[str(size)], found[str(n)]))[1], size) for size in by_size)
    report.limits.append(
        f"{name}: passes of {best[1]} images are the quickest, {100 * (best[0] - 1):+.0f} % against N at once ({n})"
    )


# ---- directions
def _drawn(directions: Directions) -> float:
    """Seconds in which all blocks are made."""
    began = time.perf_counter()
    for j in range(directions.q):
        directions.block(j)
    return time.perf_counter() - began


def _normals(sizes: Sizes) -> float:
    """Seconds in which as many directions are drawn by torch's own generator."""
    rng = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in range(sizes.q):
        g = torch.randn(sizes.n, sizes.d, generator=rng)
        g /= g.norm(dim=1, keepdim=True)
    return time.perf_counter() - began


def _measure_directions(report: Report, repeats: int, sizes: Sizes, say: Say) -> None:
    say(f"fedzge: {sizes.q} directions of {sizes.n} images, {repeats} turns")
    clients = CLIENTS // HOSTS
    streams = iter(range(1 << 20))

    def fresh(law: Law) -> Directions:
        return Directions(1, next(streams), sizes.q, sizes.n, sizes.d, law)

    def alone(law: Law) -> float:
        return _drawn(fresh(law))

    def by_host(law: Law) -> float:
        directions = fresh(law)
        return sum(_drawn(held(directions)) for _ in range(clients))

    variants: dict[str, Callable[[], float]] = {"randn": functools.partial(_normals, sizes)}
    for law in get_args(Law):
        variants |= {law: functools.partial(alone, law), f"{law}_host": functools.partial(by_host, law)}
    found = turns(variants, repeats)
    for law in get_args(Law):
        report.add(Figure(f"directions_{law}_s", f"directions, {law}", found[law], "s"))
    report.add(Figure("directions_randn_s", "directions, torch.randn and norms", found["randn"], "s"))
    for law in get_args(Law):
        values = [host / (clients * one) for host, one in zip(found[f"{law}_host"], found[law], strict=True)]
        what = f"directions, {law}: once a host / once a client of {clients}"
        report.add(Figure(f"directions_{law}_held_ratio", what, values))
