"""The stages of a run: which there are; where they begin, and, when it goes on, whether what is done would have been
the same.

What is asked of here are algorithms and numbers of rounds; no state is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fldist.algorithm import Algorithm, Stage

Plan = list[tuple[str, int]]
"""The stages of a run in order: name and number of rounds."""


def stages_of(algorithm: Algorithm, rounds: int, chosen: Sequence[str] | None) -> list[Stage]:
    """The stages that an algorithm divides so many rounds into; those that are not chosen (None: all are) have none.

    ValueError for a name that is none, and where nothing is left to do.
    """
    stages = algorithm.stages(rounds)
    if chosen is None:
        return stages
    names = [stage.name for stage in stages]
    for name in chosen:
        if name not in names:
            raise ValueError(f"stages: there is no stage {name!r}; this run's stages: {', '.join(names)}")
    kept = [stage if stage.name in chosen else replace(stage, rounds=0) for stage in stages]
    if not any(stage.rounds for stage in kept):
        raise ValueError(f"stages: {', '.join(chosen) or 'none'} of {rounds} rounds is nothing to do; choose others")
    return kept


def plan_of(algorithm: Algorithm, rounds: int, chosen: Sequence[str] | None) -> Plan:
    """The same, as names and numbers."""
    return [(stage.name, stage.rounds) for stage in stages_of(algorithm, rounds, chosen)]


def begins_after(plan: Sequence[tuple[str, int]], name: str) -> int:
    """How many rounds come before a stage; ValueError where there is none of this name."""
    names = [stage for stage, _ in plan]
    if name not in names:
        raise ValueError(f"there is no stage {name!r}; this run's stages: {', '.join(names)}")
    return sum(rounds for _, rounds in plan[: names.index(name)])


def check_plan(before: Sequence[Any], now: Plan, done: int) -> None:
    """Refuse to go on when the rounds that are done would have been other ones: ValueError. before: name and rounds."""

    def in_turn(plan: Sequence[Any]) -> list[str]:
        return [str(name) for name, rounds in plan for _ in range(int(rounds))][:done]

    would_be = in_turn(now)
    if in_turn(before) != would_be or len(would_be) < done:
        raise ValueError(
            f"rounds: {done} rounds are done, and with this number of rounds and these stages they would have been "
            "others; give those that the run was begun with, or begin a new run"
        )


def check_fields(before: Algorithm, now: Algorithm, plan: Plan, done: int) -> None:
    """Refuse another value of a field that a stage has read already: ValueError names the stage.

    plan: the stages as they were when `done` rounds had been done; see `Algorithm.stage_fields`.
    """
    for field, stage in type(now).stage_fields.items():
        if stage is None or getattr(before, field) == getattr(now, field):
            continue
        start = begins_after(plan, stage)
        if done > start:
            raise ValueError(
                f"algorithm.{field}: stage {stage} reads it, which began with round {start + 1}, and {done} rounds are "
                f"done; `fldist resume RUN --from {stage} --output NEW` begins again from there, with other values"
            )
