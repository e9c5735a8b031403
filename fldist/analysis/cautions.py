"""What a reader of a comparison must know before believing it: unlike runs, machines, seeds, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from fldist.analysis.compare import Interval, Method, Task, differing
from fldist.analysis.runs import SIMULATED, Run

_NAMED = 6
"""So many are named of what there may be many of."""


def cautions(task: Task) -> list[str]:
    """Everything about a task's runs that makes its figures less, or other, than they seem."""
    found = [*_seeds(task), *task.notes, *_unlike_methods(task), *_scores(task), *_lengths(task), *_rounds_lost(task)]
    return [*found, *_simulated(task), *_made_elsewhere(task)]


def of_intervals(intervals: Sequence[Interval]) -> list[str]:
    """What is to be known of so many intervals at once."""
    given = [each for each in intervals if each.upper >= each.lower]
    found = []
    if any(math.isclose(each.upper, each.lower, rel_tol=1e-9) for each in given):
        found.append(
            "An interval without width says that all pairs differ by the same, not that this is certain: costs come in "
            "whole rounds, and few seeds can agree by chance."
        )
    if len(given) > 1:
        found.append(
            f"{len(given)} intervals of 95 % are given here, and nothing corrects for their number: of those without a "
            "true difference about one in twenty is marked all the same."
        )
    return found


def _seeds(task: Task) -> list[str]:
    found = []
    single = [method.label for method in task.methods if len(method.seeds) == 1]
    if single:
        found.append(f"One seed only, hence neither deviation nor interval: {', '.join(single)}.")
    if len({method.seeds for method in task.methods}) > 1:
        sets = _by_value(task.methods, lambda method: f"seeds {', '.join(map(str, method.seeds))}")
        told = "; ".join(f"{seeds} of {few(labels)}" for seeds, labels in sets.items())
        found.append(f"The methods have different seeds ({told}): differences are over the common ones only.")
    return found


def _unlike_methods(task: Task) -> list[str]:
    """In what methods differ besides their algorithms, where their labels need not say so."""
    found = []
    for key in differing([method.facts for method in task.methods]):
        if key.startswith(("algorithm.", "place.")) or _of_selectors_alone(task, key):
            continue
        values = _by_value(task.methods, partial(_fact, key=key))
        told = ", ".join(f"{value} ({few(labels)})" for value, labels in values.items())
        found.append(f"The methods differ in more than their algorithms: {key} is {told}.")
    return found


def _of_selectors_alone(task: Task, key: str) -> bool:
    """Whether a key is a field of selectors, and methods differ in it only as far as they have other selectors."""
    if not key.startswith("selection.") or key == "selection.name":
        return False
    names: dict[str, set[str]] = {}
    for method in task.methods:
        names.setdefault(_fact(method, "selection.name"), set()).add(_fact(method, key))
    return all(len(values) == 1 for values in names.values())


def _fact(method: Method, key: str) -> str:
    return method.facts.get(key, "default")


def _scores(task: Task) -> list[str]:
    found = []
    kinds = _by_value(task.methods, lambda method: " and ".join(sorted({_scored(run) for run in method.runs})))
    if len(kinds) > 1:
        told = "; ".join(f"{kind} for {few(labels)}" for kind, labels in kinds.items())
        found.append(f"Accuracy is not the same thing for all methods: {told}.")
    found += _unlike(task, "eval.every (costs to an accuracy are no finer)", _every)
    return found


def _scored(run: Run) -> str:
    """What a run's accuracy is of."""
    scored = [line.get("scores") or {} for line in run.rounds if line["accuracy"] is not None]
    if not scored[-1]:
        return "not said of what"
    return "of the global model at the server" if "global" in scored[-1] else "a mean over the clients"


def _every(run: Run) -> str:
    return str(run.config.get("eval", {}).get("every", "default"))


def _lengths(task: Task) -> list[str]:
    found = []
    last = {run.rounds[-1]["round"] for run in task.runs}
    if len(last) > 1:
        found.append(
            f"The runs have from {min(last)} to {max(last)} rounds: their final accuracies are not those of equal "
            "budgets, and mean curves end with a method's shortest run."
        )
    found += _unlike(task, "numbers of rounds configured (stages and schedules may go by them)", _rounds_configured)
    stopped = [method.label for method in task.methods if any(_stop_rule(run) == "accuracy" for run in method.runs)]
    if stopped:
        found.append(
            f"Runs of {few(stopped)} ended because they had reached an accuracy: their final accuracy was chosen "
            "where it was high, and says no more than that it was reached."
        )
    silent = [method.label for method in task.methods if method.exchanges_nothing("total_bytes")]
    if silent:
        found.append(
            f"Nothing is exchanged in runs of {few(silent)}: they decide about no budget of bytes, stand at every one "
            "with their last accuracy, and are on no Pareto front of bytes."
        )
    return found


def _rounds_configured(run: Run) -> str:
    return str(run.config.get("rounds", "default"))


def _stop_rule(run: Run) -> Any:
    return ((run.result or {}).get("stop") or {}).get("rule")


def _rounds_lost(task: Task) -> list[str]:
    found = []
    for method in task.methods:
        lost = {run.seed: sum(line.get("committed") is False for line in run.rounds) for run in method.runs}
        if any(lost.values()):
            told = ", ".join(f"{count} with seed {seed}" for seed, count in lost.items() if count)
            found.append(f"{method.label}: in some rounds no reply was used, and they changed nothing ({told}).")
    return found


def _simulated(task: Task) -> list[str]:
    have = [method for method in task.methods if any(method.has(axis) for axis in SIMULATED)]
    if not have:
        return []
    found = [
        "Simulated seconds and joules are those of the devices that the section `devices` describes, not of this "
        "machine: they are as good as that section is, and no measured second is in them."
    ]
    if len(have) < len(task.methods):
        without = [method.label for method in task.methods if method not in have]
        found.append(
            f"No devices are simulated in runs of {few(without)}: they have no simulated seconds and no joules."
        )
    slept = [method.label for method in have if method.facts.get("devices.mode") == "sleep"]
    if slept:
        found.append(
            f"Hosts slept in runs of {few(slept)}, and their training was measured: simulated seconds are partly those "
            "of this machine."
        )
    return found


def _made_elsewhere(task: Task) -> list[str]:
    found = []
    for what in ("fldist", "torch"):
        found += _unlike(task, f"versions of {what}", partial(_environment, key=what))
    machines = _unlike(task, "machines (seconds are not of one machine)", _machine)
    ranks = _unlike(task, "backends (seconds and wire bytes are not of one kind)", _backend)
    shared = {run.environment["suite"].get("jobs", 1) for run in task.runs if run.environment.get("suite")}
    if shared and max(shared) > 1:
        found.append(
            f"Up to {max(shared)} runs went on beside each other on one machine: seconds are of a shared machine."
        )
    return [*found, *machines, *ranks]


def _environment(run: Run, key: str) -> str:
    return str(run.environment.get(key) or "not known")


def _machine(run: Run) -> str:
    words = [str(run.environment[key]) for key in ("hostname", "processor", "gpu_name") if run.environment.get(key)]
    return ", ".join(words) or "not known"


def _backend(run: Run) -> str:
    backend = (run.result or {}).get("backend") or run.environment.get("backend") or "not known"
    size = (run.result or {}).get("world_size") or run.environment.get("world_size")
    return f"{backend} with {size} ranks" if size and size != 1 else str(backend)


def _unlike(task: Task, what: str, of: Callable[[Run], str]) -> list[str]:
    """That runs differ in something, and which have what."""
    if len({of(run) for run in task.runs}) == 1:
        return []
    by_value: dict[str, dict[str, None]] = {}
    for method in task.methods:
        for run in method.runs:
            by_value.setdefault(of(run), {}).setdefault(method.label)
    told = [f"{value} ({few(labels)})" for value, labels in list(by_value.items())[:_NAMED]]
    more = f", and {len(by_value) - _NAMED} more" if len(by_value) > _NAMED else ""
    return [f"The runs have different {what}: {'; '.join(told)}{more}."]


def _by_value(methods: Iterable[Method], of: Callable[[Method], str]) -> dict[str, list[str]]:
    """The labels of methods by what they have."""
    found: dict[str, list[str]] = {}
    for method in methods:
        found.setdefault(of(method), []).append(method.label)
    return found


def few(labels: Iterable[str]) -> str:
    """Some of many labels."""
    named = list(labels)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more
