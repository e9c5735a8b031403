"""Compares runs fairly: the arithmetic over their curves, and which runs are the same task, the same method, a pair.

A run is a curve: what it had spent, and how well it did, after every scored round. From curves come the accuracy at
equal budgets, the cost to an accuracy, paired differences to a baseline, and the Pareto front. Nothing is extrapolated:
what a run that ended early would have reached, or needed, is counted as not known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fldist.analysis.runs import AXES, SIMULATED, Axis, Floats, Run, UnreadableRun, find, read
from fldist.units import to_bytes

COSTS: tuple[Axis, ...] = ("rounds", "uplink_bytes", "total_bytes", "seconds")
"""What is compared unless more is asked for; and `SIMULATED` where there are runs that have it."""

LEVEL = 0.95
"""Of the intervals."""


# ---- arithmetic
def accuracy_at(cost: Floats, accuracy: Floats, budget: float) -> float:
    """Accuracy of the last scored round that costs at most `budget`; NaN when none does.

    cost [rounds], not falling; accuracy [rounds], NaN where a round was not scored.
    """
    within = (cost <= budget) & ~np.isnan(accuracy)
    return float(accuracy[within][-1]) if within.any() else math.nan


def mean_of_last(accuracy: Floats, num: int) -> float:
    """Mean over the last `num` scored rounds, or those there are; NaN when none was scored. Array as above."""
    scored = accuracy[~np.isnan(accuracy)][-num:]
    return float(scored.mean()) if len(scored) else math.nan


def cost_to(cost: Floats, accuracy: Floats, target: float) -> float:
    """Cost of the first scored round with at least this accuracy; infinite when there is none. Arrays as above."""
    there = accuracy >= target
    return float(cost[there][0]) if there.any() else math.inf


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def median_of(costs: Sequence[float]) -> float:
    """Median of costs of which some are infinite, which count as larger than all; NaN where it falls on these."""
    median = float(np.median(costs))
    return median if math.isfinite(median) else math.nan


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval (NaN with fewer than two values), and the values by seed."""

    values: dict[int, float]
    mean: float
    lower: float
    upper: float

    def excludes(self, value: float) -> bool:
        """Whether the interval is there and does not contain a value."""
        return self.lower > value or self.upper < value


def interval(values: Mapping[int, float]) -> Interval:
    """Mean and Student-t interval of values by seed; all NaN without values."""
    from scipy.special import stdtrit

    n = len(values)
    if n == 0:
        return Interval({}, math.nan, math.nan, math.nan)
    mean = float(np.mean(list(values.values())))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * spread(list(values.values())) / math.sqrt(n) if n > 1 else math.nan
    return Interval(dict(values), mean, mean - half, mean + half)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Interval:
    """Interval of the differences to a baseline, over the seeds that both have."""
    return interval({seed: values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())})


def ratio_of(costs: Mapping[int, float], base: Mapping[int, float]) -> Interval:
    """Geometric mean of the ratios of costs to a baseline's, with the interval of their logarithms.

    All NaN unless both are finite and above 0 for every common seed: a mean over those that got there flatters.
    """
    seeds = sorted(costs.keys() & base.keys())
    if not all(0 < cost[seed] < math.inf for seed in seeds for cost in (costs, base)):
        return interval({})
    logs = interval({seed: math.log(costs[seed] / base[seed]) for seed in seeds})
    ratios = {seed: costs[seed] / base[seed] for seed in seeds}
    return Interval(ratios, math.exp(logs.mean), math.exp(logs.lower), math.exp(logs.upper))


def nondominated(cost: Floats, accuracy: Floats) -> NDArray[np.intp]:
    """Which points have a higher accuracy than all that cost no more, in order of cost; of equal points the first."""
    best = -math.inf
    kept = []
    for index in np.lexsort((-accuracy, cost)):
        if accuracy[index] > best:
            best = float(accuracy[index])
            kept.append(index)
    return np.array(kept, dtype=np.intp)


# ---- reading
def gather(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs that lie at paths, each once, and why others cannot be compared; ValueError when none can."""
    found: dict[Path, Path] = {}
    left_out = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: there is no such directory or file")
        try:
            for run in find([path]):
                found.setdefault(run.resolve(), run)
        except UnreadableRun as error:
            left_out.append(str(error))
    usable = []
    for path in found.values():
        try:
            one = read(path)
        except UnreadableRun as error:
            left_out.append(str(error))
            continue
        if math.isnan(one.last_accuracy):
            left_out.append(f"{path}: no round was scored (eval.every is {one.config.get('eval', {}).get('every')})")
        else:
            usable.append(one)
    if not usable:
        raise ValueError(" ".join(f"no run can be compared: {'; '.join(left_out)}".split()))
    return usable, left_out


# ---- which runs belong together
_TASK = (
    "task", "clients.num_clients", "clients.models", "eval.where", "eval.clients", "eval.split", "eval.model",
    "eval.weights", "eval.batch_norm",
)  # fmt: skip
"""Keys that say what is learnt, by whom, and what accuracy means."""

_FOLDERS = ("task.data.root", "task.public.data.root")
"""Where data of a known name lie changes nothing."""

_NEITHER = (
    "name", "seed", "rounds", "stop", "output", "checkpoint", "eval", "backend", "device", "network.control_port",
    "deadlines.join_s", "deadlines.client_timeout_s", "deadlines.transfer_s",
)  # fmt: skip
"""Keys that change neither the task nor a method's result or cost. What `backend` and `device` came to is looked up in
what the run wrote; of the deadlines only a round's changes what is computed."""

_PLACE = ("backend", "world_size", "device")
"""Where a run was made, as far as it makes another method: seconds and wire bytes depend on it."""

_UNNAMED = "run"
"""The name of a configuration that gives none."""


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds only. runs: by seed, one each."""

    label: str
    runs: tuple[Run, ...]
    facts: dict[str, str]

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return self.runs[0].algorithm

    @property
    def description(self) -> str:
        """The algorithm with all fields that its configuration gives."""
        return component(self.facts, "algorithm")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its runs, ascending."""
        return tuple(run.seed for run in self.runs)

    def has(self, axis: Axis) -> bool:
        """Whether all its runs say what they cost on an axis."""
        return all(run.has(axis) for run in self.runs)

    def exchanges_nothing(self, axis: Axis) -> bool:
        """Whether a run of it spends none of an axis, as `exchanges_nothing`."""
        return any(exchanges_nothing(run, axis) for run in self.runs)

    @property
    def final(self) -> dict[int, float]:
        """By seed: accuracy of the last scored round."""
        return {run.seed: run.last_accuracy for run in self.runs}


@dataclass(frozen=True)
class Task:
    """One task and the methods that were tried on it, by label. notes: what was done to make them comparable."""

    title: str
    facts: dict[str, str]
    methods: tuple[Method, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All runs."""
        return tuple(run for method in self.methods for run in method.runs)

    def method(self, label: str) -> Method | None:
        """The method with a label, if there is one."""
        return next((method for method in self.methods if method.label == label), None)


def split(runs: Iterable[Run]) -> list[Task]:
    """The tasks of runs and their methods, in an order that does not depend on that of the runs."""
    by_task: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        by_task.setdefault(tuple(sorted(_of_task(run).items())), []).append(run)
    facts = [dict(key) for key in by_task]
    apart = differing(facts)
    tasks = []
    for mine, members in zip(facts, by_task.values(), strict=True):
        methods, notes = _methods(members)
        tasks.append(Task(_title(mine, apart), mine, tuple(methods), tuple(notes)))
    return sorted(tasks, key=lambda task: natural(task.title))


def reasons(tasks: Sequence[Task]) -> list[str]:
    """Why runs are of several tasks: the keys in which these differ, and their values."""
    lines = []
    for key in differing([task.facts for task in tasks]):
        values: dict[str, list[str]] = {}
        for number, task in enumerate(tasks, start=1):
            values.setdefault(task.facts.get(key, "default"), []).append(str(number))
        if len(tasks) == 2:
            lines.append(f"{key}: {' against '.join(values)}")
        else:
            named = [f"{value} (task {', '.join(numbers)})" for value, numbers in values.items()]
            lines.append(f"{key}: {' against '.join(named)}")
    return lines


def differing(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose values are not the same everywhere, sorted."""
    return [key for key in sorted({key for each in facts for key in each}) if len({f.get(key) for f in facts}) > 1]


def natural(text: str) -> list[tuple[float, str]]:
    """Orders texts with numbers in them as people do: mu=0.5 before mu=10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [(float(part), "") if index % 2 else (-1.0, part) for index, part in enumerate(parts)]


def _within(key: str, keys: Iterable[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _of_task(run: Run) -> dict[str, str]:
    flat = _flat(run.config)
    task = {key for key in flat if _within(key, _TASK)} - set(_public_beside(flat))
    facts = {key: flat[key] for key in flat if key in task and key not in _FOLDERS}
    if facts.get("eval.batch_norm") == "batch":  # then a sample's score depends on those beside it
        facts["eval.batch_size"] = flat.get("eval.batch_size", "default")
    if facts.get("eval.clients") == "unselected":
        facts["eval.fraction"] = flat.get("eval.fraction", "default")
    return facts


def _public_beside(flat: Mapping[str, str]) -> dict[str, str]:
    """The keys of public samples that are not of the task, since clients hold the same without them: there are none, or
    they are of another data set, or of those rows that a subset leaves out."""
    own = flat.get("task.data.name")
    taken = flat.get("task.public.data.name", own) == own and flat.get("task.subset.train", "null") == "null"
    if flat.get("task.public.n", "0") == "0" or not taken:
        return {key: value for key, value in flat.items() if _within(key, ["task.public"])}
    return {}


def _of_method(run: Run) -> dict[str, str]:
    flat = _flat(run.config)
    facts = {key: value for key, value in flat.items() if not _within(key, (*_TASK, *_NEITHER))}
    if flat.get("task.public.n", "0") != "0":
        facts |= {key: value for key, value in _public_beside(flat).items() if key not in _FOLDERS}
    if facts.get("clock.name") == "measured":  # as in runs of versions that had no other
        del facts["clock.name"]
    if facts.get("devices.name") == "none":  # the same
        del facts["devices.name"]
    if flat.get("eval.own") == "true":  # then replies are longer, and clients compute more
        facts["eval.own"] = "true"
    for name in _PLACE:
        value = (run.result or {}).get(name) or run.environment.get(name)
        facts[f"place.{name}"] = "unknown" if value is None else _shown(value).partition(":")[0]
    return facts


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested sections as dotted keys, in order of their names."""
    if not isinstance(value, dict) or not value:
        return {key: _shown(value)}
    inner: dict[str, str] = {}
    for name in sorted(value, key=str):
        inner |= _flat(value[name], f"{key}.{name}" if key else str(name))
    return inner


def _shown(value: Any) -> str:
    """A value as text, the same for the same number however it was written (1, 1.0, "1e0")."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def component(facts: Mapping[str, str], key: str) -> str:
    """Something chosen by name, with its fields: `dirichlet alpha=0.1`."""
    fields = [f"{k.removeprefix(f'{key}.')}={v}" for k, v in facts.items() if _within(k, [key])]
    named = [field.removeprefix("name=") for field in fields if field.startswith("name=")]
    return " ".join([*named, *(field for field in fields if not field.startswith("name="))])


def _title(facts: Mapping[str, str], apart: Iterable[str]) -> str:
    told = ["task.data", "task.partition", "clients.num_clients"]
    words = [component(facts, "task.data"), component(facts, "task.partition")]
    models = json.loads(facts.get("clients.models", "[]"))
    told.append("clients.models" if models else "task.model")
    words.append("+".join(model["name"] for model in models) if models else component(facts, "task.model"))
    words.append(f"{facts.get('clients.num_clients', '?')} clients")
    words += [f"{key}={facts.get(key, 'default')}" for key in apart if not _within(key, told)]
    return ", ".join(words)


# ---- methods
def _methods(runs: Sequence[Run]) -> tuple[list[Method], list[str]]:
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(_of_method(run).items()), []).append(run)
    facts = [dict(key) for key in groups]
    methods, notes = [], []
    for label, mine, members in zip(_labels(facts, list(groups.values())), facts, groups.values(), strict=True):
        chosen, twice = _one_a_seed(members)
        methods.append(Method(label, tuple(chosen), mine))
        notes += [f"{label}, {text}" for text in twice]
    return sorted(methods, key=lambda method: natural(method.label)), sorted(notes, key=natural)


def _one_a_seed(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    chosen, notes = [], []
    for seed, same in sorted(by_seed.items()):
        best, *others = sorted(same, key=lambda r: (-r.rounds[-1]["round"], r.status != "finished", str(r.path)))
        chosen.append(best)
        if others:
            named = ", ".join(str(run.path) for run in others)
            why = "more rounds" if all(r.rounds[-1]["round"] < best.rounds[-1]["round"] for r in others) else "no fewer"
            notes.append(f"seed {seed}: {best.path} is used ({why} than {named})")
    return chosen, notes


def _labels(facts: Sequence[Mapping[str, str]], runs: Sequence[Sequence[Run]]) -> list[str]:
    """The configurations' names where each method has one of its own; else the algorithms' and what differs."""
    names = [{str(run.config.get("name")) for run in members} for members in runs]
    if all(len(of) == 1 and of != {_UNNAMED} for of in names) and len(set.union(*names)) == len(names):
        return [of.pop() for of in names]
    around = [key for key in differing(facts) if not _within(key, ("algorithm", "place"))]
    place = [key for key in differing(facts) if key.startswith("place.")]
    labels = []
    for mine in facts:
        same = [other for other in facts if other["algorithm.name"] == mine["algorithm.name"]]
        own = [key for key in differing(same) if key.startswith("algorithm.")]
        words = [f"{key.removeprefix('algorithm.')}={mine.get(key, 'default')}" for key in (*own, *around)]
        where = f"({', '.join(_place(key, mine[key]) for key in place)})" if place else ""
        labels.append(" ".join(filter(None, (mine["algorithm.name"], *words, where))))
    return labels


def _place(key: str, value: str) -> str:
    name = key.removeprefix("place.")
    if value == "unknown":
        return f"unknown {name}"
    if name == "world_size":
        return "1 rank" if value == "1" else f"{value} ranks"
    return value


def baseline_of(task: Task, label: str | None) -> Method:
    """The method that the others are compared with; without a label FedAvg where it is there, else the first."""
    if label is not None:
        wanted = task.method(label)
        if wanted is None:
            there = ", ".join(repr(method.label) for method in task.methods)
            raise ValueError(f"--baseline: there is no method {label!r} in {task.title}; there are {there}")
        return wanted
    likely = (task.method("fedavg"), *(method for method in task.methods if method.algorithm == "fedavg"))
    return next((method for method in likely if method is not None), task.methods[0])


# ---- equal budgets
@dataclass(frozen=True)
class Budget:
    """So much of an axis. set_by: the runs that decide it where it was not asked for, in words."""

    axis: Axis
    amount: float
    set_by: str = ""


@dataclass(frozen=True)
class Final:
    """The end of every run: the mean over its last `last` scored rounds; or, instead, its best scored round."""

    last: int = 1
    best: bool = False

    def of(self, accuracy: Floats) -> float:
        """Of a run's accuracies by round, NaN where one was not scored; NaN when none was."""
        if self.best and not np.isnan(accuracy).all():
            return float(np.nanmax(accuracy))
        return mean_of_last(accuracy, self.last)


@dataclass(frozen=True)
class Reached:
    """A method's accuracy at a budget or in the end, by seed.

    ended: seeds of runs that ended before it; unscored: of runs of which no round was scored within it.
    """

    values: dict[int, float]
    ended: tuple[int, ...] = ()
    unscored: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Over the runs that get there; NaN when none does."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation; NaN for fewer than two values."""
        return spread(list(self.values.values()))


def exchanges_nothing(run: Run, axis: Axis) -> bool:
    """Whether the run spends none of an axis of bytes, or of one that is simulated, since it calls no client.

    On the wire even calls that carry nothing are some.
    """
    if not axis.endswith("_bytes") and axis not in SIMULATED:
        return False
    return bool(run.spent("total_bytes" if axis == "wire_bytes" else axis)[-1] == 0)


def spent_when_scored(run: Run, axis: Axis) -> float:
    """What the run had cost after its last scored round."""
    return float(run.spent(axis)[~np.isnan(run.accuracy)][-1])


def parse_budget(text: str) -> Budget:
    """`uplink_bytes=5MB`, `rounds=20` or `seconds=60`; ValueError for anything else."""
    name, equals, value = text.partition("=")
    axis = axis_of(name, "--at")
    if not equals:
        raise ValueError(f"--at: {text!r} must have the form {axis}=amount")
    if axis.endswith("_bytes"):
        try:
            amount = float(to_bytes(value))
        except ValueError as error:
            raise ValueError(f"--at: {text!r}: {error}") from None
    else:
        amount = _number(value)
    if not 0 < amount < math.inf:
        raise ValueError(f"--at: {text!r}: the amount must be a number above 0")
    return Budget(axis, amount)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def axis_of(name: str, option: str) -> Axis:
    """The axis with a name; ValueError naming those there are."""
    for axis in AXES:
        if axis == name:
            return axis
    raise ValueError(f"{option}: {name!r} is no axis; there are {', '.join(AXES)}")


def require(tasks: Sequence[Task], axis: Axis, option: str) -> None:
    """ValueError for an axis that no method has."""
    if not any(method.has(axis) for task in tasks for method in task.methods):
        raise ValueError(
            f"{option}: no run here says what it cost in {axis}; run with devices=simulated, or leave it out"
        )


def axes_of(methods: Sequence[Method], asked: Iterable[Budget]) -> list[Axis]:
    """The usual axes, those that are simulated for any of the methods, and those that were asked for."""
    wanted = {budget.axis for budget in asked}
    return [
        axis
        for axis in AXES
        if axis in COSTS or axis in wanted or (axis in SIMULATED and any(method.has(axis) for method in methods))
    ]


def check_target(target: float) -> float:
    """The target itself, an accuracy above 0 and at most 1; ValueError for anything else."""
    if not 0 < target <= 1:
        raise ValueError(f"--to: {target:g} is no accuracy to reach; give a share above 0 and at most 1, such as 0.8")
    return target


def check_last(last: int) -> int:
    """The number itself, of scored rounds, at least 1; ValueError for anything else."""
    if last < 1:
        raise ValueError(f"--last: {last} is no number of scored rounds; give 1 or more")
    return last


def budgets_of(task: Task, asked: Sequence[Budget]) -> list[Budget]:
    """The budgets that were asked for; for other axes the largest that every run has reached with a scored round.

    Runs that exchange nothing decide about no budget of bytes; where no run exchanges anything there is none. So it is
    with what is simulated and methods that do not have it.
    """
    budgets = []
    for axis in AXES:
        mine = [budget for budget in asked if budget.axis == axis]
        if not mine and (axis in COSTS or axis in SIMULATED):
            ends = [
                (spent_when_scored(run, axis), f"{method.label}, seed {run.seed}")
                for method in task.methods
                if method.has(axis)
                for run in method.runs
                if not exchanges_nothing(run, axis)
            ]
            mine = [_smallest(axis, ends)] if ends else []
        budgets += sorted(set(mine), key=lambda budget: budget.amount)
    return budgets


def _smallest(axis: Axis, ends: Sequence[tuple[float, str]]) -> Budget:
    amount = min(spent for spent, _ in ends)
    named = sorted((run for spent, run in ends if spent == amount), key=natural)
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    return Budget(axis, amount, "all runs" if len(named) == len(ends) else f"{named[0]}{more}")


def reached(method: Method, budget: Budget | Final) -> Reached:
    """A method's accuracy at a budget, or in the end. A run that exchanges nothing is within every budget of bytes.

    Without values where the method does not say what it cost.
    """
    if isinstance(budget, Final):
        return Reached({run.seed: budget.of(run.accuracy) for run in method.runs})
    if not method.has(budget.axis):
        return Reached({})
    values, ended, unscored = {}, [], []
    for run in method.runs:
        cost = run.spent(budget.axis)
        if exchanges_nothing(run, budget.axis):
            values[run.seed] = run.last_accuracy
        elif cost[-1] < budget.amount:
            ended.append(run.seed)
        elif math.isnan(value := accuracy_at(cost, run.accuracy, budget.amount)):
            unscored.append(run.seed)
        else:
            values[run.seed] = value
    return Reached(values, tuple(ended), tuple(unscored))


# ---- to an accuracy
@dataclass(frozen=True)
class Needed:
    """What a method needed to reach an accuracy, by seed: infinite where a run had not reached it up to its limit."""

    values: dict[int, float]
    limits: dict[int, float]

    @property
    def not_reached(self) -> int:
        """How many runs did not get there."""
        return sum(math.isinf(value) for value in self.values.values())

    @property
    def mean(self) -> float:
        """NaN unless all runs got there."""
        return math.nan if self.not_reached else float(np.mean(list(self.values.values())))

    @property
    def std(self) -> float:
        """Sample standard deviation; NaN unless all runs got there, and there are two."""
        return math.nan if self.not_reached else spread(list(self.values.values()))

    @property
    def median(self) -> float:
        """A run that did not get there counts as one that costs more than all; NaN where the median falls on these."""
        return median_of(list(self.values.values()))

    @property
    def median_is_bound(self) -> bool:
        """Whether the median could be less, since a run that did not get there ended before it had cost as much."""
        least = [min(value, self.limits[seed]) for seed, value in self.values.items()]
        return median_of(least) < self.median

    @property
    def limit(self) -> float:
        """Up to this cost no run that did not get there had got there; infinite where all did."""
        return min((self.limits[s] for s, value in self.values.items() if math.isinf(value)), default=math.inf)


def needed(method: Method, axis: Axis, target: float) -> Needed:
    """What a method needed to reach an accuracy for the first time; without values where it does not say."""
    if not method.has(axis):
        return Needed({}, {})
    return Needed(
        {run.seed: cost_to(run.spent(axis), run.accuracy, target) for run in method.runs},
        {run.seed: spent_when_scored(run, axis) for run in method.runs},
    )


def ratio(method: Method, baseline: Method, axis: Axis, target: float) -> Interval:
    """A method's cost of an accuracy as `ratio_of` a baseline's; all NaN where one of them exchanges nothing, or does
    not say what it cost."""
    if any(each.exchanges_nothing(axis) or not each.has(axis) for each in (method, baseline)):
        return interval({})
    return ratio_of(needed(method, axis, target).values, needed(baseline, axis, target).values)


def default_targets(baseline: Method) -> list[float]:
    """80 % and 95 % of a method's mean accuracy in the last scored round, rounded down to two digits."""
    final = float(np.mean(list(baseline.final.values())))
    if final <= 0:
        return []
    return sorted({_rounded_down(share * final) for share in (0.8, 0.95)})


def _rounded_down(value: float) -> float:
    digits = 1 - math.floor(math.log10(value))
    scaled: float = math.floor(value * 10.0**digits + 1e-9) / 10.0**digits
    return round(scaled, digits)


# ---- the algorithms' own figures
@dataclass(frozen=True)
class Figure:
    """A figure of a method by seed, for the runs that have it: None where it is not finite, as of what never comes."""

    values: dict[int, float | None]

    @property
    def not_finite(self) -> int:
        """For how many runs it is not finite."""
        return sum(value is None for value in self.values.values())

    @property
    def finite(self) -> list[float]:
        """The values, if all of them are finite; else none: a mean over those that are flatters."""
        return [] if self.not_finite else [float(value) for value in self.values.values() if value is not None]


def figure(method: Method, name: str) -> Figure:
    """A figure of a method; without values where it has not this one."""
    return Figure({run.seed: run.summary[name] for run in method.runs if name in run.summary})


def figures_of(methods: Iterable[Method]) -> list[str]:
    """The names of all figures that any of the methods has, in the order in which these tell them."""
    return list(dict.fromkeys(name for method in methods for run in method.runs for name in run.summary))


# ---- who was chosen
@dataclass(frozen=True)
class Chosen:
    """How often a method's runs called the clients, by seed.

    least, median, most: rounds of a client; never: clients that were called in none; jain: Jain's index of fairness,
    (sum c)^2 / (N sum c^2) over the N clients' rounds c: 1 where all are called equally often, 1/N where it is always
    the same one (Jain, Chiu, Hawe, DEC-TR-301, 1984).
    """

    least: dict[int, float]
    median: dict[int, float]
    most: dict[int, float]
    never: dict[int, float]
    jain: dict[int, float]


def jain(times: Sequence[float] | NDArray[np.int64]) -> float:
    """Jain's index of numbers of at least 0; NaN where all are 0."""
    of = np.asarray(times, dtype=np.float64)
    squares = float((of**2).sum())
    return float(of.sum()) ** 2 / (len(of) * squares) if squares else math.nan


def chosen(method: Method) -> Chosen | None:
    """How often a method called clients; None where a run does not say, or nobody was ever called."""
    by_seed = {run.seed: run.times_called for run in method.runs}
    times = {seed: each for seed, each in by_seed.items() if each is not None and each.any()}
    if len(times) < len(by_seed):
        return None
    return Chosen(
        {seed: float(each.min()) for seed, each in times.items()},
        {seed: float(np.median(each)) for seed, each in times.items()},
        {seed: float(each.max()) for seed, each in times.items()},
        {seed: float((each == 0).sum()) for seed, each in times.items()},
        {seed: jain(each) for seed, each in times.items()},
    )


def chooses(method: Method) -> bool:
    """Whether a method does not call everybody equally often, so that it says something how often it does."""
    found = chosen(method)
    return found is not None and any(found.most[seed] > found.least[seed] for seed in found.most)


def shares_chosen(method: Method) -> Floats | None:
    """In which share of a run's rounds clients were called, most often first, mean over seeds; None as of `chosen`.

    [clients].
    """
    if chosen(method) is None:
        return None
    each = [np.sort(run.times_called)[::-1] / len(run.rounds) for run in method.runs if run.times_called is not None]
    return np.asarray(np.mean(each, axis=0), dtype=np.float64)


# ---- mean curves
@dataclass(frozen=True)
class Curve:
    """A method's mean over its seeds, at the rounds that were scored for all of them. All arrays: [points]."""

    rounds: NDArray[np.int64]
    cost: Floats
    accuracy: Floats
    std: Floats
    """Sample standard deviation of the accuracy; NaN with one seed."""


def mean_curve(method: Method, axis: Axis) -> Curve:
    """Mean accuracy against mean cost."""
    scored = [run.spent("rounds")[~np.isnan(run.accuracy)] for run in method.runs]
    common = scored[0]
    for rounds in scored[1:]:
        common = np.intersect1d(common, rounds)

    def at_common(values: Callable[[Run], Floats]) -> Floats:
        return np.array([values(run)[np.isin(run.spent("rounds"), common)] for run in method.runs])

    accuracy = at_common(lambda run: run.accuracy)
    several = len(method.runs) > 1
    std = np.std(accuracy, axis=0, ddof=1) if several else np.full(len(common), np.nan)
    cost = at_common(lambda run: run.spent(axis)).mean(axis=0)
    return Curve(common.astype(np.int64), cost, accuracy.mean(axis=0), std)


@dataclass(frozen=True)
class Stretch:
    """A method is ahead from a cost on: its mean accuracy there, and where it is ahead for the last time."""

    label: str
    begins: float
    accuracy: float
    ends: float
    last_accuracy: float


def front(task: Task, axis: Axis) -> list[Stretch]:
    """The Pareto front of all methods' mean curves, told as stretches of one method each, in order of cost.

    Methods that exchange nothing are not on fronts of bytes: there they would be compared with at no cost. Nor are
    those on a front that do not say what they cost.
    """
    labels: list[str] = []
    costs: list[Floats] = []
    accuracies: list[Floats] = []
    for method in task.methods:
        if method.exchanges_nothing(axis) or not method.has(axis):
            continue
        curve = mean_curve(method, axis)
        labels += [method.label] * len(curve.cost)
        costs.append(curve.cost)
        accuracies.append(curve.accuracy)
    if not labels:
        return []
    cost, accuracy = np.concatenate(costs), np.concatenate(accuracies)
    stretches: list[Stretch] = []
    for index in nondominated(cost, accuracy):
        at, reaches = float(cost[index]), float(accuracy[index])
        if stretches and stretches[-1].label == labels[index]:
            begun = stretches.pop()
            stretches.append(Stretch(begun.label, begun.begins, begun.accuracy, at, reaches))
        else:
            stretches.append(Stretch(labels[index], at, reaches, at, reaches))
    return stretches
