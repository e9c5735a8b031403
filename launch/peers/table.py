"""The arithmetic of the comparison, and its table: medians of rounds, ratios within a pass. Needs the standard library.

A run is one program doing one work once; a pass is all of them in turn, so that a slower hour of the machine is in all
figures of a pass alike. A ratio is taken within a pass, and the median over the passes is what counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

OURS = "fldist"
PEERS = ("flower", "fedlab")
ALONE = "fldist-alone"
NAMES = {OURS: "fldist", "flower": "Flower", "fedlab": "FedLab", ALONE: "fldist, one process"}
WORKS = {
    "workload": "FedAvg, LeNet-5, MNIST, 10 of 100 clients a round",
    "exchange": "44.7 MB to 3 clients and back, kept",
    "average": "44.7 MB to 3 clients and back, averaged",
}
HEAD = (
    *("work", "program", "runs", "s a round", "min to max", "first round s", "whole command s", "steps", "accuracy"),
    *("server's peak MB", "of it before round 1"),
)


@dataclass(frozen=True)
class Run:
    """What one run showed. seconds: of every round, the first included; bytes: of the server's process.

    before_bytes: in memory before round 1; peak_bytes: the most from then on; wall_s: of the whole command; load: of
    the machine when it began. steps and accuracy are None where nothing is trained.
    """

    number: int
    work: str
    who: str
    seconds: Sequence[float]
    before_bytes: int
    peak_bytes: int
    wall_s: float
    load: float
    steps: int | None = None
    accuracy: float | None = None

    @property
    def round_s(self) -> float:
        """The median of its rounds but the first; ValueError when there is no other."""
        if len(self.seconds) < 2:
            raise ValueError(f"{self.who}, {self.work}: {len(self.seconds)} rounds; at least 2 are needed")
        return statistics.median(self.seconds[1:])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Smallest, median, largest; ValueError when empty."""
    if not values:
        raise ValueError("there are no values to take a median of")
    return min(values), statistics.median(values), max(values)


def of(runs: Sequence[Run], work: str, who: str) -> list[Run]:
    """The runs of one program doing one work, by pass."""
    return sorted((run for run in runs if (run.work, run.who) == (work, who)), key=lambda run: run.number)


def ratios(runs: Sequence[Run], work: str, who: str) -> list[float]:
    """`who` / fldist of every pass in which both have run; above 1 where fldist is quicker."""
    ours = {run.number: run.round_s for run in of(runs, work, OURS)}
    return [run.round_s / ours[run.number] for run in of(runs, work, who) if run.number in ours]


def lines(runs: Sequence[Run]) -> list[str]:
    """Two tables in Markdown: a row for each program and work, and a row for each ratio."""
    rows: list[tuple[str, ...]] = [HEAD]
    compared = [("work", "ratio of the seconds of a round", "median", "min to max", "passes")]
    for work, what in WORKS.items():
        for who, name in NAMES.items():
            mine = of(runs, work, who)
            if not mine:
                continue
            low, middle, high = spread([run.round_s for run in mine])
            rows.append(
                (
                    what,
                    name,
                    str(len(mine)),
                    f"{middle:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{statistics.median(run.seconds[0] for run in mine):.2f}",
                    f"{statistics.median(run.wall_s for run in mine):.1f}",
                    _range([run.steps for run in mine], "{:,}"),
                    _range([run.accuracy for run in mine], "{:.4f}"),
                    f"{statistics.median(run.peak_bytes for run in mine) / 1e6:.0f}",
                    f"{statistics.median(run.before_bytes for run in mine) / 1e6:.0f}",
                )
            )
            values = ratios(runs, work, who)
            if who != OURS and values:
                low, middle, high = spread(values)
                pair = f"{name} / {NAMES[OURS]}"
                compared.append((what, pair, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", str(len(values))))
    return [*_markdown(rows), "", *_markdown(compared)]


def flat(runs: Sequence[Run]) -> dict[str, float]:
    """The same as one flat object: seconds end in `_s`, ratios in `_ratio`, bytes in `_bytes`."""
    told: dict[str, float] = {}
    for work in WORKS:
        for who in NAMES:
            mine = of(runs, work, who)
            if not mine:
                continue
            key = f"{work}_{who.replace('-', '_')}"
            told |= _spread_of(key, "s", [run.round_s for run in mine])
            told[f"{key}_peak_bytes"] = statistics.median(run.peak_bytes for run in mine)
            told[f"{key}_before_bytes"] = statistics.median(run.before_bytes for run in mine)
            values = ratios(runs, work, who)
            if who != OURS and values:
                told |= _spread_of(key, "ratio", values)
    return told


def _spread_of(key: str, unit: str, values: Sequence[float]) -> dict[str, float]:
    low, middle, high = spread(values)
    return {f"{key}_{unit}": middle, f"{key}_min_{unit}": low, f"{key}_max_{unit}": high}


def _range(values: Sequence[float | None], form: str) -> str:
    """The values that differ, from the smallest to the largest; empty where there are none."""
    there = sorted({value for value in values if value is not None})
    return " to ".join(form.format(value) for value in dict.fromkeys((there[0], there[-1]))) if there else ""


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]
