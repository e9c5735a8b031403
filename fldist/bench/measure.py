"""Measuring: interleaved pairs, medians and quartiles, and how figures are shown and written.

What is measured is none of this file's business; processes that are measured are in `party.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

Answer = Mapping[str, float]
"""What one round showed, by name; seconds end in `_s`."""
Round = Callable[[], Answer]
"""Does one round of something and tells what it showed."""
Say = Callable[[str], None]

SUFFIXES = ("_ratio", "_gb_per_s", "_s")
"""Endings of keys that say what a figure is; a quartile's key keeps the ending."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between the sorted values; ValueError when empty."""
    if not values:
        raise ValueError("there are no values to take quartiles of")
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def cpu_seconds(do: Callable[[], object], times: int) -> float:
    """CPU seconds of a call, in the mean over so many after a first one."""
    do()
    began = time.process_time()
    for _ in range(times):
        do()
    return (time.process_time() - began) / times


def check_same(found: float, most: float, what: str) -> float:
    """The difference of two forms' results, `found`; RuntimeError where it is above `most`."""
    if not found <= most:
        raise RuntimeError(f"{what}: the two forms come to results that are {found:.2g} apart, above {most:g}")
    return found


def interleave(ours: Round, other: Round, pairs: int, *, after: Callable[[], None] = lambda: None) -> list[Pair]:
    """Do `pairs` pairs of rounds, ours first in every other one; `after` is called behind each pair."""
    if pairs < 1:
        raise ValueError(f"--pairs: must be at least 1, got {pairs}")
    done = []
    for number in range(pairs):
        if number % 2 == 0:
            mine = ours()
            theirs = other()
        else:
            theirs = other()
            mine = ours()
        done.append(Pair(mine, theirs))
        after()
    return done


@dataclass(frozen=True)
class Pair:
    """Two rounds next to each other."""

    ours: Answer
    other: Answer


def ratios(pairs: Sequence[Pair], ours: str, other: str) -> list[float]:
    """ours / other of every pair."""
    return [pair.ours[ours] / pair.other[other] for pair in pairs]


@dataclass(frozen=True)
class Target:
    """What a figure should be: at most (or at least) `limit`."""

    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        """Whether a value keeps to it."""
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One thing measured. key: its name in the JSON; values: one a repeat, of which the median counts."""

    key: str
    what: str
    values: Sequence[float]
    unit: str = ""
    target: Target | None = None


class Report:
    """What a measurement found, for the screen and as a flat JSON object. quick: the figures count for nothing."""

    def __init__(self, title: str, *, quick: bool = False) -> None:
        self.title = title
        self.quick = quick
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self.absent: list[str] = []
        self.limits: list[str] = []
        self.machine = machine()

    def add(self, figure: Figure) -> float:
        """Take a figure; returns its median."""
        self.figures.append(figure)
        return quartiles(figure.values)[1]

    def as_json(self) -> dict[str, Any]:
        """The machine's facts, and every figure's median and, where there are several values, quartiles."""
        flat: dict[str, Any] = dict(self.machine)
        if self.quick:
            flat["quick"] = True
        for figure in self.figures:
            low, middle, high = quartiles(figure.values)
            flat[figure.key] = middle
            if len(figure.values) > 1:
                flat[_quartile_key(figure.key, 1)], flat[_quartile_key(figure.key, 3)] = low, high
        return flat

    def text(self) -> str:
        """The report for people."""
        about = self.machine
        lines = [
            self.title,
            f"{about['date']}, {about['processor']}, {about['cores']} usable cores, load {about['load']:.2f} at the "
            f"start, Python {about['python']}, torch {about['torch']}, fldist {about['fldist']}",
        ]
        if self.quick:
            lines.append("quick: tiny sizes and few repeats, to see that it works; these figures count for nothing")
        lines.append("")
        lines += _table([("", "median", "quartiles", "", "n", "target", ""), *(self._row(f) for f in self.figures)])
        lines.append("")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"not measured: {what}" for what in self.absent]
        lines += [f"limit: {limit}" for limit in self.limits]
        return "\n".join(lines)

    def _row(self, figure: Figure) -> tuple[str, ...]:
        low, middle, high = quartiles(figure.values)
        spread = f"{_short(low)} - {_short(high)}" if len(figure.values) > 1 else ""
        target, verdict = "", ""
        if figure.target is not None:
            target = str(figure.target)
            verdict = "not judged" if self.quick else "met" if figure.target.met(middle) else "MISSED"
        return figure.what, _short(middle), spread, figure.unit, str(len(figure.values)), target, verdict


def _quartile_key(key: str, number: int) -> str:
    suffix = next((s for s in SUFFIXES if key.endswith(s)), "")
    return f"{key.removesuffix(suffix)}_q{number}{suffix}"


def _short(value: float) -> str:
    return f"{value:.4g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def machine() -> dict[str, Any]:
    """What a figure must be read with: date, processor, cores, load, versions."""
    from fldist.runtime.output import machine_facts

    facts = machine_facts()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": facts["processor"],
        "cores": facts["cpus_usable"],
        "load": os.getloadavg()[0],
        "python": facts["python"],
        "torch": facts["torch"],
        "fldist": facts["fldist"],
    }


def check_pairs(pairs: int | None, quick: bool, usual: int) -> int:
    """The number of pairs to do: what was asked for, else the usual number, or two when quick."""
    if pairs is None:
        return 2 if quick else usual
    if pairs < 1:
        raise ValueError(f"--pairs: must be at least 1, got {pairs}")
    return pairs


def told(make: Callable[[], Report], json_file: Path | None) -> str:
    """Measure, write the JSON file if one is named, and return the text. A bad file is refused before measuring."""
    if json_file is not None:
        if json_file.is_dir():
            raise ValueError(f"--json: {json_file} is a directory; name a file")
        if not json_file.parent.is_dir():
            raise ValueError(f"--json: there is no directory {json_file.parent}; make it, or name another file")
    report = make()
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--json: {json_file} cannot be written: {error.strerror}; {report.text()}") from None
    return report.text()
