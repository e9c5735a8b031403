"""Which runs belong together: those of one task, and among them those of one method, which differ in their seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fldist.analysis.runs import Run

_SEEDS = frozenset({"seed", "partition_seed"})
_NOT_THE_METHOD = ("seed", "output.", "checkpoint.")


def tasks(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by what they learn: section `task` of the configuration, seeds apart. (label, runs), in the runs' order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_text(_seedless(run.config.get("task", {}))), []).append(run)
    sections = [flat(_seedless(of[0].config.get("task", {}))) for of in groups.values()]
    _, differing = split(sections)
    labels = []
    for section in sections:
        names = [section[key] for key in ("data.name", "partition.name") if key in section]
        rest = [k for k in differing if k in section and k not in ("data.name", "partition.name")]
        labels.append(", ".join([*names, *(f"{k.removeprefix('partition.')}={section[k]}" for k in rest)]) or "task")
    return list(zip(unique(labels), groups.values(), strict=True))


def methods(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs by method: section `algorithm` and the configuration's name. (label, runs), in the runs' order."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((_text(run.config["algorithm"]), str(run.config.get("name"))), []).append(run)
    names = {name for _, name in groups}
    fields = [flat(of[0].config["algorithm"]) for of in groups.values()]
    labels = []
    for of, (_, name) in zip(fields, groups, strict=True):
        algorithm = of.get("name", "?")
        alike = [other for other in fields if other.get("name") == algorithm]
        told = ", ".join(f"{key}={of[key]}" for key in split(alike)[1] if key in of)
        label = PurePath(algorithm).name + (f" ({told})" if told else "")
        labels.append(f"{label}, {name}" if len(names) > 1 else label)
    return list(zip(unique(labels), groups.values(), strict=True))


def not_alike(runs: Sequence[Run]) -> list[str]:
    """The keys, besides seeds and where files go, in which the runs of one method differ all the same."""
    _, differing = split([flat(run.config) for run in runs])
    return [k for k in differing if k.rpartition(".")[2] not in _SEEDS and not k.startswith(_NOT_THE_METHOD)]


def flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Dotted keys and their values as text; lists are one value."""
    found: dict[str, str] = {}
    for key, of in value.items():
        name = f"{before}{key}"
        if isinstance(of, Mapping) and of:
            found |= flat(of, f"{name}.")
        else:
            found[name] = of if isinstance(of, str) else _text(of)
    return found


def split(of: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], list[str]]:
    """What all have alike, and the keys in which they differ, in order of appearance."""
    keys = list(dict.fromkeys(key for each in of for key in each))
    alike = {key: of[0][key] for key in keys if all(key in each and each[key] == of[0].get(key) for each in of)}
    return alike, [key for key in keys if key not in alike]


def unique(labels: Iterable[str]) -> list[str]:
    """The labels, with a number behind those that were there before."""
    found: list[str] = []
    for label in labels:
        number, name = 1, label
        while name in found:
            number += 1
            name = f"{label} #{number}"
        found.append(name)
    return found


def _seedless(section: Any) -> Any:
    if isinstance(section, Mapping):
        return {key: _seedless(value) for key, value in section.items() if key not in _SEEDS}
    return section


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
