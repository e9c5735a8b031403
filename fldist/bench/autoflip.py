"""`fldist bench autoflip`: what a mask costs a step of local training, and what taking closed units out saves.

TwoCNN and an MLP on the digits that are always there. Four clients explore, the squares of how far their parameters
moved make a guidance, and that makes masks: of scattered entries by a quantile T, of whole units by a quantile T_s; one
more mask is drawn at random. Each network is then trained by the local training that runs use: dense, and masked and
compacted under every mask, in turn, on one thread, in CPU seconds a step: forward, backward, mask, optimizer; what a
training needs to begin is divided among its steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fldist.bench.measure import Figure, Report, Say, Target, quartiles
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset, Digits
from fldist.data.partition import Iid, Shards
from fldist.data.prepare import Preparation
from fldist.data.task import Task
from fldist.models.cnn import TwoCnn
from fldist.models.mlp import Mlp
from fldist.models.train import LocalTraining
from fldist.params import Params
from fldist.pruning.flops import Macs, TrainingFlops
from fldist.pruning.masks import by_quantile
from fldist.pruning.structure import Structure, close_dead_units, prune_units
from fldist.seeding import Streams, generator

REPEATS = 9
SEED = 1
EXPLORERS = 4
CLIENTS = 10
EXPLORE_EPOCHS = 5
CHECKED_STEPS = 20
ALONE_ELEMENTS = 20_000_000
SAME = Target(1e-6)


@dataclass(frozen=True)
class Workload:
    """A network and how it is trained. steps: of a training that is timed, about."""

    key: str
    what: str
    model: Mlp | TwoCnn
    size: int
    batch: int
    lr: float
    steps: int


@dataclass(frozen=True)
class Setting:
    """A mask: T-quantile of single entries, T_s-quantile of units; guided: by exploration, or drawn at random."""

    key: str
    T: float
    T_s: float = 0.0
    guided: bool = True

    def __str__(self) -> str:
        if not self.guided:
            return f"random, density {1.0 - self.T:g}"
        return f"T {self.T:g}" + (f", T_s {self.T_s:g}" if self.T_s else "")


SETTINGS = (
    Setting("random50", 0.5, guided=False),
    Setting("t50", 0.5),
    Setting("t90", 0.9),
    Setting("t50_ts50", 0.5, 0.5),
    Setting("t50_ts80", 0.5, 0.8),
)


def workloads(quick: bool) -> tuple[Workload, ...]:
    """The networks; when quick, small ones."""
    if quick:
        return (
            Workload("two_cnn", "TwoCNN(4, 32)", TwoCnn(width=4, hidden=32, init="xavier"), 12, 50, 3e-4, 2),
            Workload("mlp", "MLP 144-16-16-10", Mlp((16, 16), init="xavier"), 12, 32, 1e-3, 2),
        )
    return (
        Workload("two_cnn", "TwoCNN, 1x24x24, batch 50", TwoCnn(init="xavier"), 24, 50, 3e-4, 20),
        Workload("mlp", "MLP 784-64-64-10, batch 32", Mlp((64, 64), init="xavier"), 28, 32, 1e-3, 300),
    )


# ---- guidance and masks
def task_of(work: Workload, dataset: Dataset, clients: int = 1) -> Task:
    """The digits for one client, or two classes for each of several."""
    return Task(
        dataset=dataset,
        partition=Iid() if clients == 1 else Shards(2),
        num_clients=clients,
        build=work.model.build,
        local=LocalTraining(batch_size=work.batch, lr=work.lr, optimizer="adam", tail="drop"),
        seed=SEED,
        partition_seed=SEED,
        preparation=Preparation(resize=work.size),
    )


def explored(work: Workload, dataset: Dataset) -> Tensor:
    """The guidance [P] of a few explorers with two classes each: mean squared movement, each tensor brought to 0..1."""
    task = task_of(work, dataset, clients=CLIENTS)
    start = task.init_params()
    guidance = torch.zeros(start.layout.num_params)
    for client in range(EXPLORERS):
        end = ClientData(task, client, Streams(SEED, 1, client)).train(start, epochs=EXPLORE_EPOCHS).params
        guidance += (end.trainable.floats - start.trainable.floats).square() / EXPLORERS
    for slot in start.layout.params:
        part = guidance[slot.offset : slot.offset + slot.numel]
        low, high = part.min(), part.max()
        part.copy_((part - low) / (high - low) if high > low else torch.ones_like(part))
    return guidance


def mask_of(setting: Setting, guidance: Tensor, structure: Structure) -> Tensor:
    """The closed mask [P] of a setting."""
    scores = guidance if setting.guided else torch.rand(guidance.shape, generator=generator(SEED, "random-mask"))
    mask = by_quantile(scores, structure.layout, setting.T)
    return close_dead_units(prune_units(mask, guidance, structure, setting.T_s), structure)


# ---- measuring
def turns(variants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call all variants `repeats` times, each turn beginning with the next one; what they returned, by name."""
    names = list(variants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(variants[name]())
    return found


def over(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """ours / other, turn by turn."""
    return [a / b for a, b in zip(ours, other, strict=True)]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of two networks' answers, relative to the largest answer where that is above 1."""
    return float((one - other).abs().max() / one.abs().max().clamp(min=1.0))


@dataclass(frozen=True)
class Trainer:
    """One variant of a network: its task, which no other has, its start, its mask or None, whether it is compacted."""

    task: Task
    start: Params
    mask: Tensor | None = None
    compact: bool = False

    def train(self, epochs: int) -> tuple[Params, int, float]:
        """The trained model, the steps made and the CPU seconds of a step."""
        began = time.process_time()
        data = ClientData(self.task, 0, Streams(SEED, 1, 0))
        trained = data.train(self.start, mask=self.mask, epochs=epochs, compact=self.compact)
        return trained.params, trained.steps, (time.process_time() - began) / trained.steps

    def answers(self, epochs: int, x: Tensor) -> tuple[Tensor, int]:
        """What the trained model says to x, and after how many steps."""
        params, steps, _ = self.train(epochs)
        with torch.no_grad():
            return self.task.frozen_copy(params)(x), steps

    def exact_answers(self, epochs: int, x: Tensor) -> Tensor:
        """The same with float64 throughout, by a loop of its own: local training is float32."""
        start, keep = self.start, torch.ones(self.task.layout.num_params) if self.mask is None else self.mask
        net = self.task.frozen_copy(start)
        if self.compact:
            compaction = self.task.compacted(keep).compaction
            net, start, keep = compaction.module(), compaction.shrink(start), compaction.shrink_mask(keep)
            start.bind(net)
        net.double().train().requires_grad_(True)
        tensors = list(net.parameters())
        parts = [keep[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in start.layout.params]
        optimizer = self.task.local.make_optimizer(tensors)
        data = ClientData(self.task, 0, Streams(SEED, 1, 0))
        order = data.order()
        for _ in range(epochs):
            for rows in order.epoch():
                optimizer.zero_grad()
                cross_entropy(net(data.x[rows].double()), data.y[rows]).backward()  # type: ignore[no-untyped-call]
                for tensor, part in zip(tensors, parts, strict=True):
                    assert tensor.grad is not None
                    tensor.grad.mul_(part)
                optimizer.step()
                with torch.no_grad():
                    for tensor, part in zip(tensors, parts, strict=True):
                        tensor.mul_(part)
        with torch.no_grad():
            answers: Tensor = net.eval()(x.double())
        return answers


@dataclass(frozen=True)
class Pruned:
    """A network under a setting: masked, and compacted."""

    setting: Setting
    mask: Tensor
    masked: Trainer
    small: Trainer


def measure(repeats: int | None = None, *, quick: bool = False, say: Say = lambda text: None) -> Report:
    """Every workload with every mask; see the module."""
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats: must be at least 1, got {repeats}")
    repeats = repeats or (2 if quick else REPEATS)
    report = Report("autoflip: steps of local training, dense, masked and compacted, one thread", quick=quick)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for work in workloads(quick):
            _measure(work, report, repeats, say)
    finally:
        torch.set_num_threads(before)
    report.notes.append(
        "CPU seconds; the guidance is that of digits: how many units T alone leaves without input or output depends on "
        "data and exploration"
    )
    report.notes.append(
        "answers apart: largest difference, relative where they are above 1; in float32 it may grow once rounding has "
        "switched a ReLU or a maximum"
    )
    return report


def _measure(work: Workload, report: Report, repeats: int, say: Say) -> None:
    dataset = Digits().load()
    say(f"autoflip: {work.what}: {EXPLORERS} explorers of {EXPLORE_EPOCHS} epochs, then {repeats} turns")
    guidance = explored(work, dataset)
    rows = 10 * work.batch
    subset = dataclasses.replace(dataset, train_x=dataset.train_x[:rows], train_y=dataset.train_y[:rows])
    epochs = max(1, work.steps // 10)
    task = task_of(work, subset)
    structure = task.structure()
    dense = Trainer(task, task.init_params())
    pruned: list[Pruned] = []
    for setting in SETTINGS:
        try:
            mask = mask_of(setting, guidance, structure)
        except ValueError as error:
            report.absent.append(f"{work.what}, {setting}: {error}")
            continue
        start = task.init_params()
        start.trainable.floats.mul_(mask)
        small = Trainer(task_of(work, subset), start, mask, compact=True)
        pruned.append(Pruned(setting, mask, Trainer(task, start, mask), small))
    variants = {"dense": dense}
    for one in pruned:
        variants |= {f"{one.setting.key} masked": one.masked, f"{one.setting.key} small": one.small}
    for trainer in variants.values():
        trainer.train(1)
    seconds = turns({name: _timed(trainer, epochs) for name, trainer in variants.items()}, repeats)
    report.add(Figure(f"{work.key}_dense_s", f"{work.what}: a step, dense", seconds["dense"], "s"))
    alone = {
        "mask": ("the two multiplications by the mask", _Alone(pruned[0].masked).multiply),
        "optimizer": ("the optimizer's step, no zeros", _Alone(dense).step),
        "optimizer_masked": ("the optimizer's step, scattered zeros", _Alone(pruned[0].masked).step),
    }
    times = turns({key: do for key, (_, do) in alone.items()}, repeats)
    parts = {
        key: report.add(Figure(f"{work.key}_{key}_s", f"  {what}", times[key], "s")) for key, (what, _) in alone.items()
    }
    x, _ = next(task.test_batches(100))
    for one in pruned:
        _report(work, one, report, seconds, structure, x)
    dense_s = quartiles(seconds["dense"])[1]
    shares = parts["mask"] / dense_s, (parts["optimizer_masked"] - parts["optimizer"]) / dense_s
    report.limits.append(
        f"{work.what}: of a dense step the two multiplications are {100 * shares[0]:.1f} %, what "
        f"scattered zeros add to the optimizer's {100 * shares[1]:.1f} %"
    )


def _timed(trainer: Trainer, epochs: int) -> Callable[[], float]:
    return lambda: trainer.train(epochs)[2]


class _Alone:
    """What a masked step does besides forward and backward, on blocks of the network's size."""

    def __init__(self, trainer: Trainer) -> None:
        self._weights = nn.Parameter(trainer.start.trainable.floats.clone())
        shape = self._weights.shape
        self._keep = torch.ones(shape) if trainer.mask is None else trainer.mask.float()
        self._weights.grad = torch.rand(shape).add_(0.5).mul_(self._keep)
        self._optimizer = trainer.task.local.make_optimizer([self._weights])
        self._times = min(500, max(10, ALONE_ELEMENTS // len(self._keep)))

    def multiply(self) -> float:
        """CPU seconds of the two multiplications."""
        gradient, values = self._weights.grad, self._weights.data
        assert gradient is not None
        began = time.process_time()
        for _ in range(self._times):
            gradient.mul_(self._keep)
            values.mul_(self._keep)
        return (time.process_time() - began) / self._times

    def step(self) -> float:
        """CPU seconds of the optimizer's step."""
        began = time.process_time()
        for _ in range(self._times):
            self._optimizer.step()
        return (time.process_time() - began) / self._times


def _report(
    work: Workload,
    one: Pruned,
    report: Report,
    seconds: Mapping[str, Sequence[float]],
    structure: Structure,
    x: Tensor,
) -> None:
    """The figures of one mask. seconds: by variant and turn; x: samples on which the answers are compared."""
    key, name = f"{work.key}_{one.setting.key}", f"  {one.setting}"
    masked_s, small_s = (seconds[f"{one.setting.key} {which}"] for which in ("masked", "small"))
    report.add(Figure(f"{key}_masked_ratio", f"{name}: masked / dense", over(masked_s, seconds["dense"])))
    ratio = report.add(Figure(f"{key}_compact_ratio", f"{name}: compacted / masked", over(small_s, masked_s)))
    epochs = -(-CHECKED_STEPS // 10)
    whole, steps = one.masked.answers(epochs, x)
    small, _ = one.small.answers(epochs, x)
    exact = apart(one.masked.exact_answers(epochs, x), one.small.exact_answers(epochs, x))
    report.add(Figure(f"{key}_difference", f"{name}: answers apart after {steps} steps, float64", [exact], "", SAME))
    report.add(Figure(f"{key}_float32_difference", f"{name}: the same, float32", [apart(whole, small)]))
    compacted = one.small.task.compacted(one.mask)
    macs, fewer = (
        Macs.of(made.template, x.shape[1:]) for made in (one.small.task.architecture(), compacted.architecture)
    )
    flops = TrainingFlops.of(macs, one.mask, fewer)
    theoretical, realised = flops.theoretical / flops.dense, flops.realised / flops.dense
    report.add(Figure(f"{key}_theoretical_ratio", f"{name}: FLOPs under the mask / dense", [theoretical]))
    report.add(Figure(f"{key}_realised_ratio", f"{name}: FLOPs compacted / dense", [realised]))
    density = int(one.mask.sum()) / len(one.mask)
    left = structure.num_units - compacted.compaction.num_removed
    told = f"{work.what}, {one.setting}: density {density:.3f}, {left} of {structure.num_units} units stay"
    if left == structure.num_units:
        told += ": scattered zeros, of which compaction takes nothing out and saves nothing"
    else:
        told += f"; FLOPs allow {realised:.2f} of a dense step, {ratio:.2f} of the masked one was measured"
    report.limits.append(told)
