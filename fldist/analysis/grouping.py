"""Which runs a page shows together: the tasks and methods of `compare`, with every run in one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fldist.analysis.cautions import cautions
from fldist.analysis.compare import split
from fldist.analysis.runs import Run


@dataclass
class Group:
    """A method of a task. runs: those that means are over, one a seed; others: of a seed that is there already."""

    label: str
    task: int
    runs: list[Run]
    others: list[Run] = field(default_factory=list)


def group(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], list[Group]]:
    """The tasks of runs (title, and what is to be known before believing their figures), and their methods."""
    tasks = split(runs)
    groups, place = [], {}
    for number, task in enumerate(tasks):
        for method in task.methods:
            groups.append(Group(method.label, number, list(method.runs)))
            place[_key(task.facts), _key(method.facts)] = groups[-1]
    used = {id(run) for of in groups for run in of.runs}
    for run in runs:
        if id(run) not in used:
            (alone,) = split([run])
            place[_key(alone.facts), _key(alone.methods[0].facts)].others.append(run)
    scored = split([run for run in runs if not np.isnan(run.accuracy).all()])
    told = {_key(task.facts): cautions(task) for task in scored}
    return [(task.title, told.get(_key(task.facts), [])) for task in tasks], groups


def _key(facts: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(facts.items())
