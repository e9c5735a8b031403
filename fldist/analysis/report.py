"""Makes one HTML file about runs, which needs no network and no other file, and their timelines as Chrome traces.

Here is gathered what the page shows; page/page.js draws it.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fldist.analysis.excerpt import Excerpt, shown_rounds
from fldist.analysis.grouping import Group, group
from fldist.analysis.html import html
from fldist.analysis.participation import Participation
from fldist.analysis.pictures import pictures
from fldist.analysis.runs import AXES, SIMULATED, Axis, Floats, Run, UnreadableRun, find, messages, read
from fldist.analysis.tables import UNITS
from fldist.analysis.timeline import TraceFile, events, host_names, lines, timeline

AXIS_LABELS: dict[Axis, str] = {
    "rounds": "rounds",
    "uplink_bytes": "uplink bytes (encoded)",
    "total_bytes": "uplink and downlink bytes (encoded)",
    "wire_bytes": "wire bytes, up and down",
    "seconds": "seconds of setup and rounds",
    "simulated_seconds": "simulated seconds on the clients' devices",
    "joules": "simulated joules of the clients' devices",
}
POINTS = 1000
"""Points of a curve in the page; of more rounds some are left out, evenly."""


@dataclass
class Made:
    """What was written. unread: the paths of runs that could not be read, and why."""

    page: Path
    num_runs: int
    traces: list[Path] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def write(paths: Sequence[Path], page: Path) -> Made:
    """Write the report of the runs at or below the paths, and the traces beside it; ValueError when there is none."""
    runs, unread = _read_all(paths)
    folder = page.with_name(f"{page.stem}-traces")
    shown = []
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for run, label, file in zip(runs, _labels(runs), _file_names(runs), strict=True):
            try:
                shown.append(_Shown(run, label, folder / f"{file}.json.gz"))
            except (KeyError, TypeError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                unread.append(f"{run.path}: its files have not the form of this version of fldist ({what})")
        _need(shown, unread)
        text = html(_page(shown, unread))
        temporary = page.with_name(f"{page.name}.tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(page)
    except OSError as error:
        where = error.filename or page
        raise ValueError(f"report: {where}: {error.strerror}; --output names another place to write to") from None
    return Made(page, len(shown), [of.trace for of in shown if of.trace is not None], unread)


def _read_all(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    runs, unread = [], []
    for path in find(paths):
        try:
            runs.append(read(path))
        except UnreadableRun as error:
            unread.append(str(error))
    _need(runs, unread)
    return runs, unread


def _need(of: Sequence[object], unread: Sequence[str]) -> None:
    if not of:
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        raise UnreadableRun(f"there is no run to report on: {unread[0]}{more}")


def _labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names, with as much of their paths as tells them apart."""
    parts = [run.path.resolve().parts for run in runs]
    names = [run.name for run in runs]
    for length in range(2, max(map(len, parts)) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["/".join(of[-length:]) if name in twice else name for of, name in zip(parts, names, strict=True)]
    return names


def _file_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run that every file system takes, no two alike."""
    taken: set[str] = set()
    found = []
    for run in runs:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", run.name).strip("._") or "run"
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.lower())
        found.append(name)
    return found


# ---- one run
class _Shown:
    """What the page shows of one run; reads its messages once, and writes its trace."""

    def __init__(self, run: Run, label: str, trace: Path) -> None:
        self.run, self.label = run, label
        self.notes = list(run.notes)
        self.trace: Path | None = None
        self.timeline: dict[str, Any] | None = None
        self.participation: dict[str, Any] | None = None
        self._read_messages(trace)
        if run.result is None:
            self.notes.append("its bytes by kind and phase are sums over its finished rounds, without transport")
        self.page = self._page(trace)
        """What the page gets of it, apart from task, method and pictures."""

    def _read_messages(self, trace: Path) -> None:
        run, notes = self.run, self.notes
        last, clients = run.rounds[-1]["round"], run.config.get("clients", {}).get("num_clients", 0)
        try:
            taking = Participation(last, clients)
        except ValueError as error:
            notes.append(f"participation: {error}")
            taking = Participation(0, 0)

        def seen() -> Iterator[dict[str, Any]]:
            for row in messages(run, notes):
                taking.see(row)
                yield row

        kept = Excerpt(shown_rounds(run.rounds))
        found = events(kept.watch(timeline(seen(), lines(run, notes), notes)), host_names(run))
        first = next(found, None)
        if first is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            temporary = trace.with_name(f"{trace.name}.tmp")
            file = TraceFile(temporary, {"run": self.label, "config_hash": (run.result or {}).get("config_hash")})
            try:
                file.write(chain([first], found))
            finally:
                file.close()
            self.trace = temporary.replace(trace)
            self.timeline = kept.shown(host_names(run), last)
        taking.missing(run.rounds)
        self.participation = taking.shown()

    def _page(self, trace: Path) -> dict[str, Any]:
        run, result = self.run, self.run.result or {}
        spent = run.rounds[-1]["spent"]
        beside = f"{trace.parent.name}/{trace.name}"
        return {
            "label": self.label,
            "algorithm": run.algorithm,
            "seed": run.seed,
            "status": run.status,
            "ended": _ended(result),
            "rounds": run.rounds[-1]["round"],
            "accuracy": run.last_accuracy,
            "uplink_bytes": spent["uplink_bytes"],
            "downlink_bytes": spent["downlink_bytes"],
            "seconds": spent["seconds"],
            **{name: spent.get(name) for name in SIMULATED},
            "state_hash": result.get("state_hash"),
            "notes": self.notes,
            "curve": _thinned(series(run)),
            "bytes": bytes_of(run),
            "timeline": self.timeline,
            "participation": self.participation,
            "trace": {"path": beside, "href": quote(beside)} if self.trace is not None else None,
        }


def _ended(result: dict[str, Any]) -> str | None:
    """What ended a run, where it was not the number of its rounds."""
    stop = result.get("stop")
    if stop and stop["rule"] != "rounds":
        return f"{stop['rule']} {stop['value']:g} of {stop['limit']:g}"
    reason = result.get("reason")
    return None if reason is None else str(reason)


# ---- curves
def series(run: Run, numbers: Sequence[int] | None = None) -> dict[str, Floats]:
    """Accuracy, loss and every axis, of the rounds with these numbers, else of all that were scored."""
    chosen = np.isin(run.spent("rounds"), numbers) if numbers is not None else ~np.isnan(run.accuracy)
    columns: dict[str, Floats] = {axis: run.spent(axis)[chosen] for axis in AXES}
    return {**columns, "accuracy": run.accuracy[chosen], "loss": run.loss[chosen]}


def mean_over_seeds(runs: Sequence[Run]) -> dict[str, Floats]:
    """Means over runs at the rounds that all have scored, of what they had spent, of accuracy and of loss.

    With several runs also `accuracy_sd` and `loss_sd`, sample standard deviations.
    """
    scored = [set(series(run)["rounds"].astype(int).tolist()) for run in runs]
    each = [series(run, sorted(set.intersection(*scored))) for run in runs]
    mean = {name: np.mean([of[name] for of in each], axis=0) for name in each[0]}
    if len(runs) > 1:
        for name in ("accuracy", "loss"):
            mean[f"{name}_sd"] = np.std([of[name] for of in each], axis=0, ddof=1)
    return mean


def _thinned(series: dict[str, Floats]) -> dict[str, Any]:
    """At most POINTS points, the last among them."""
    length = len(series["rounds"])
    chosen = np.unique(np.linspace(0, length - 1, min(length, POINTS)).round().astype(int)) if length else slice(0)
    return {name: [_compact(v) for v in values[chosen].tolist()] for name, values in series.items()}


def _compact(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.12g}")


# ---- bytes
VIEWS = (
    ("kind", "payload by kind (logical bytes)", "Tensor bytes of delivered training messages, as if every client were "
     "alone on its own link.", True),
    ("phase", "payload by phase (logical bytes)", "Tensor bytes of delivered messages of every phase, as if every "
     "client were alone on its own link.", True),
    ("encoded", "by phase (encoded bytes)", "Bytes of delivered messages of every phase, after the codec.", True),
    ("wire", "by phase (wire bytes)", "What was handed to the transport: heads, and every shared part once. "
     "`transport`: joining, heartbeats, acknowledgements and the like.", True),
    ("levels", "logical, encoded and wire bytes", "Logical and encoded: delivered training messages. Wire: everything "
     "that was handed to the transport.", False),
    ("overhead", "framing, transport, and what was not used", "Framing: heads of messages. Transport: joining, "
     "heartbeats, acknowledgements and the like. Not used: logical bytes of messages that were late, lost, refused, or "
     "sent again.", True),
)  # fmt: skip
"""Key, label, what is counted, and whether its bars add up."""


def bytes_of(run: Run) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes by view, name and direction: of result.json, or else the sum of the rounds (no setup, no transport)."""
    if run.result is not None:
        of = run.result["bytes"]
    else:
        of = {}
        for line in run.rounds:
            _add(of, line["bytes"])
    transport = {"transport": of["transport"]} if any(of.get("transport", {}).values()) else {}
    views = {
        "kind": of["by_kind"],
        "phase": of["by_phase"],
        "encoded": of.get("encoded_by_phase", {}),
        "wire": {**of["wire_by_phase"], **transport} if of.get("wire_by_phase") else {},
        "levels": {name: of[name] for name in ("logical", "encoded", "wire")},
        "overhead": {"framing": of["framing"], **transport, **{f"not used: {k}": v for k, v in of["wasted"].items()}},
    }
    return {view: {name: way for name, way in names.items() if any(way.values())} for view, names in views.items()}


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


# ---- the page
def _page(shown: Sequence[_Shown], unread: Sequence[str]) -> dict[str, Any]:
    """Everything that page.js draws."""
    runs = [of.run for of in shown]
    place = {id(run): index for index, run in enumerate(runs)}
    in_page = [of.page for of in shown]
    of_tasks, groups = group(runs)
    of_methods = []
    for method in groups:
        mean = mean_over_seeds(method.runs)
        members = [place[id(run)] for run in (*method.runs, *method.others)]
        averaged = members[: len(method.runs)]
        of_methods.append({
            "label": method.label,
            "task": method.task,
            "runs": members,
            "averaged": averaged,
            "mean": _thinned(mean),
            "notes": _ends(method, [shown[index].label for index in averaged], mean),
        })  # fmt: skip
        for index in members:
            in_page[index] |= {"task": method.task, "method_label": method.label}
    images, left_out = pictures(runs)
    for of, found in zip(in_page, images, strict=True):
        of["pictures"] = found
    names = {key: _byte_names([of["bytes"][key] for of in in_page]) for key, *_ in VIEWS}
    views = [
        {"key": key, "label": label, "hint": hint, "stacked": stacked}
        for key, label, hint, stacked in VIEWS
        if names[key]
    ]
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return {
        "title": f"fldist report: {runs[0].name if len(runs) == 1 else count}",
        "made": f"{count}, read on {datetime.now(UTC):%d %B %Y at %H:%M} UTC",
        "notes": [f"not read: {text}" for text in unread],
        "axes": [
            {"key": axis, "label": AXIS_LABELS[axis], "unit": UNITS[axis]}
            for axis in AXES
            if any(run.has(axis) for run in runs)
        ],
        "tasks": [{"label": label, "notes": notes} for label, notes in of_tasks],
        "methods": of_methods,
        "runs": in_page,
        "views": views,
        "byte_names": names,
        "pictures_hint": f"{left_out} more are in the runs' directories." if left_out else "",
        "config": _facts([run.config for run in runs]),
        "environment": _facts([_environment(run) for run in runs]),
    }


def _byte_names(of: Sequence[dict[str, dict[str, int]]]) -> list[str]:
    """The names of all runs, what is largest first."""
    total: dict[str, int] = defaultdict(int)
    for names in of:
        for name, ways in names.items():
            total[name] += sum(ways.values())
    return sorted(total, key=lambda name: -total[name])


def _ends(of: Group, labels: Sequence[str], mean: dict[str, Floats]) -> list[str]:
    """Where a mean ends before some of its runs do."""
    lasts = [max(series(run)["rounds"], default=0) for run in of.runs]
    shorter = [label for label, last in zip(labels, lasts, strict=True) if last < max(lasts)]
    if not shorter:
        return []
    common = mean["rounds"]
    until = f"ends with round {common[-1]:.0f}" if len(common) else "has no round"
    return [f"{of.label}: the mean {until}, since not all runs were scored after that: {', '.join(shorter)}"]


def _environment(run: Run) -> dict[str, Any]:
    """environment.json, with its command as it was typed and its hosts in one text."""
    found = dict(run.environment)
    if isinstance(found.get("command"), list):
        found["command"] = " ".join(map(str, found["command"]))
    if isinstance(found.get("hosts"), dict):
        told = {rank: " ".join(map(str, about.values())) for rank, about in found["hosts"].items()}
        found["hosts"] = ", ".join(f"{rank}: {about}" for rank, about in told.items())
    return found


def _facts(of: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all have alike, and a row a run of what differs."""
    flattened = [_flat(each) for each in of]
    keys = list(dict.fromkeys(key for each in flattened for key in each))
    same = [key for key in keys if len({each.get(key) for each in flattened}) == 1]
    differing = [key for key in keys if key not in same]
    rows = [[each.get(key, "") for key in differing] for each in flattened]
    return {"same": [[key, flattened[0][key]] for key in same], "differing": differing, "rows": rows}


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Dotted keys, in their order, and their values as text; a list is one value."""
    found: dict[str, str] = {}
    for key, of in value.items():
        if isinstance(of, Mapping) and of:
            found |= _flat(of, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = of if isinstance(of, str) else json.dumps(of, default=str)
    return found
