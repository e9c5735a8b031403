"""Reads what runs have left behind, whole or cut off, and says what of it is damaged. It compares and draws nothing.

A run is read from its directory, or from its `run.h5` alone, which holds what tables need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

Axis = Literal["rounds", "uplink_bytes", "total_bytes", "wire_bytes", "seconds", "simulated_seconds", "joules"]
SIMULATED: tuple[Axis, ...] = ("simulated_seconds", "joules")
"""What rounds took on the clients' devices, of runs that simulate these; nothing that was measured is in it."""

AXES: tuple[Axis, ...] = ("rounds", "uplink_bytes", "total_bytes", "wire_bytes", "seconds", *SIMULATED)
"""What a run's accuracy is looked at against. Bytes are encoded ones, `wire_bytes` what was handed to the transport, up
and down; `seconds` are measured. None of these contains evaluation."""

Floats = NDArray[np.float64]

_MOST_CLIENTS = 10**7
_NAMED_LINES = 5
"""So many damaged lines are named; of the others their number is said."""


class UnreadableRun(ValueError):
    """What cannot be read as a run, and why."""


@dataclass(frozen=True)
class Run:
    """One run, as far as it can be read. rounds: the lines of rounds.jsonl, in order of their numbers, at least one."""

    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    result: dict[str, Any] | None
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What is damaged or missing, a sentence each."""

    @property
    def name(self) -> str:
        """What the run's directory is called."""
        return self.path.parent.name if self.path.suffix == ".h5" else self.path.name

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return str(self.config["algorithm"]["name"])

    @property
    def status(self) -> str:
        """As in result.json; `cut off` where there is none (killed, or still going)."""
        return str(self.result["status"]) if self.result else "cut off"

    @property
    def summary(self) -> dict[str, float | None]:
        """The algorithm's own figures of the run, None where one is not finite; empty where it has none."""
        figures: dict[str, float | None] = (self.result or {}).get("summary", {})
        return figures

    @cached_property
    def accuracy(self) -> Floats:
        """Accuracy of every round, NaN where it was not scored. [rounds]."""
        return _column(self.rounds, lambda line: line["accuracy"])

    @cached_property
    def loss(self) -> Floats:
        """Loss of every round, NaN where it was not scored. [rounds]."""
        return _column(self.rounds, lambda line: line["loss"])

    def spent(self, axis: Axis) -> Floats:
        """What the run had cost after every round, NaN where it does not say. [rounds]."""
        return self._spent[axis]

    def has(self, axis: Axis) -> bool:
        """Whether the run says of every round what it had cost."""
        return not bool(np.isnan(self.spent(axis)).any())

    @cached_property
    def times_called(self) -> NDArray[np.int64] | None:
        """In how many rounds each client was called, but for scoring and by the selector; None where it does not say.

        [clients].
        """
        count = self.config.get("clients", {}).get("num_clients")
        if type(count) is not int or not 0 < count <= _MOST_CLIENTS:
            return None
        times = np.zeros(count, dtype=np.int64)
        for line in self.rounds:
            chosen, selected = line.get("chosen"), line.get("selected")
            if chosen is None and selected in (0, count):  # nobody, or everybody
                times += 1 if selected else 0
            elif isinstance(chosen, list) and all(type(c) is int and 0 <= c < count for c in chosen):
                times[chosen] += 1
            else:
                return None
        return times

    @cached_property
    def _spent(self) -> dict[Axis, Floats]:
        return {axis: _column(self.rounds, partial(_spent, axis=axis)) for axis in AXES}

    @property
    def num_scored(self) -> int:
        """How many of its rounds were scored."""
        return int(np.count_nonzero(~np.isnan(self.accuracy)))

    @property
    def last_accuracy(self) -> float:
        """Of the last scored round; NaN when none was scored."""
        scored = self.accuracy[~np.isnan(self.accuracy)]
        return float(scored[-1]) if len(scored) else float("nan")

    @property
    def last_loss(self) -> float:
        """Of the last scored round; NaN when none was scored."""
        scored = self.loss[~np.isnan(self.loss)]
        return float(scored[-1]) if len(scored) else float("nan")


def _column(lines: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], Any]) -> Floats:
    values = [of(line) for line in lines]
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _spent(line: dict[str, Any], axis: Axis) -> float:
    if axis == "rounds":
        return float(line["round"])
    spent = line["spent"]
    if axis == "total_bytes":
        return float(spent["uplink_bytes"] + spent["downlink_bytes"])
    if axis == "wire_bytes":
        return float(spent["wire_uplink_bytes"] + spent["wire_downlink_bytes"])
    return float(spent.get(axis, math.nan) if axis in SIMULATED else spent[axis])


# ---- finding
def find(paths: Iterable[Path]) -> list[Path]:
    """The runs that are named, or lie in directories that are named, each once; ValueError for what holds none."""
    found: dict[Path, Path] = {}
    for path in paths:
        here = list(_runs_in(path))
        if not here:
            what = "holds no run (no config.yaml in it or below)" if path.is_dir() else "is no run's directory"
            raise UnreadableRun(f"{path}: {what}" if path.exists() else f"{path}: there is no such directory or file")
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(path: Path) -> Iterator[Path]:
    """Links to runs count; other links are not followed, since they may lead anywhere, and round in circles."""
    try:
        is_run = (path.is_file() and path.suffix == ".h5") or _holds_run(path)
        below = sorted(path.iterdir(), key=_natural) if path.is_dir() and not is_run else []
    except OSError:  # what it is, and why it cannot be read, is told when that is tried
        is_run, below = True, []
    if is_run:
        yield path
    for each in below:
        if each.is_dir() and (not each.is_symlink() or _holds_run(each)):
            yield from _runs_in(each)


def _holds_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders names with numbers as people do: s2 before s10."""
    parts: list[tuple[int, str]] = []
    digits = ""
    for character in f"{path.name}\0":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((int(digits), ""))
            digits = ""
        parts.append((-1, character))
    return parts


# ---- reading
def read(path: Path) -> Run:
    """Read a run; ValueError when it cannot be used at all. A run that was cut off has its finished rounds."""
    if path.suffix == ".h5":
        return _from_h5(path)
    notes: list[str] = []
    config = _config(path / "config.yaml")
    told = list(json_lines(path / "rounds.jsonl", notes))
    lines = [line for line in told if _is_round(line, path)]
    if len(lines) < len(told):
        word = "line has" if len(told) - len(lines) == 1 else "lines have"
        notes.append(f"rounds.jsonl: {len(told) - len(lines)} {word} not what a round's line has: damaged and skipped")
    by_number = {line["round"]: line for line in lines}
    if len(by_number) < len(lines):
        notes.append(f"rounds.jsonl: {len(lines) - len(by_number)} rounds are there twice; the later lines are used")
    if not by_number:
        raise UnreadableRun(f"{path}: no round was finished{': ' + notes[0] if notes else ''}")
    rounds = [by_number[number] for number in sorted(by_number)]
    lacking = rounds[-1]["round"] - len(rounds)
    if lacking > 0:
        notes.append(f"rounds.jsonl: {lacking} of {rounds[-1]['round']} rounds are missing")
    result = _json(path / "result.json", notes, _is_result)
    if result is None and not (path / "result.json").is_file():
        notes.append(f"it was cut off after round {rounds[-1]['round']}, or is still going: there is no result.json")
    return Run(path, config, rounds, result, _json(path / "environment.json", notes, _is_environment) or {}, notes)


def json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a file, one object each. Damaged ones are skipped; what was is told in `notes` at the end."""
    damaged: list[int] = []
    unended = False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):  # half a line, or no text at all
                    value = None
                unended = not line.endswith(b"\n")
                if isinstance(value, dict):
                    yield value
                else:
                    damaged.append(number)
    except OSError as error:
        notes.append(f"{path.name}: it cannot be read ({error.strerror})")
    if damaged:
        named = ", ".join(map(str, damaged[:_NAMED_LINES]))
        more = f" and {len(damaged) - _NAMED_LINES} more" if len(damaged) > _NAMED_LINES else ""
        word = "line is" if len(damaged) == 1 else "lines are"
        cut = "; the last one ends in the middle" if unended else ""
        notes.append(f"{path.name}: {len(damaged)} {word} damaged and skipped (line {named}{more}{cut})")


def messages(run: Run, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a run's ledger, in the order in which they were written. A run read from run.h5 has none."""
    if run.path.suffix == ".h5":
        return
    for path in [*sorted(run.path.glob("messages-*.jsonl")), run.path / "messages.jsonl"]:
        yield from json_lines(path, notes)


SPENT = ("uplink_bytes", "downlink_bytes", "wire_uplink_bytes", "wire_downlink_bytes", "seconds")
"""What `spent` of a round says; where devices are simulated `SIMULATED` as well."""


def _is_round(line: Any, path: Path) -> bool:
    """Whether a line has what is read of it; a run of another version is refused."""
    if not isinstance(line, dict) or not _is_number(line.get("round")) or "accuracy" not in line:
        return False
    if "spent" not in line:
        raise UnreadableRun(f"{path}: its rounds.jsonl was written by a version of fldist that did not say `spent`")
    spent = line["spent"]
    return (
        isinstance(line["round"], int)
        and line["round"] > 0
        and all(name in line and (line[name] is None or _is_number(line[name])) for name in ("accuracy", "loss"))
        and isinstance(line.get("scores"), dict | None)
        and isinstance(spent, dict)
        and all(_is_number(spent.get(name)) and spent[name] >= 0 for name in SPENT)
        and all(name not in spent or (_is_number(spent[name]) and spent[name] >= 0) for name in SIMULATED)
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that arrays hold: finite, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_result(value: dict[str, Any]) -> bool:
    figures = value.get("summary", {})
    return (
        isinstance(value.get("status"), str)
        and isinstance(value.get("stop"), dict | None)
        and isinstance(figures, dict)
        and all(figure is None or _is_number(figure) for figure in figures.values())
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UnreadableRun(f"{path}: it cannot be read: {error}") from None
    return _checked(config, path)


def _checked(config: Any, path: Path) -> dict[str, Any]:
    """A resolved configuration, as far as runs are told apart by it; UnreadableRun for anything else."""
    sections = isinstance(config, dict) and all(
        isinstance(config.get(name, {}), dict) for name in ("task", "clients", "eval", "algorithm")
    )
    if not sections or type(config.get("seed")) is not int or not isinstance(_name_of(config.get("algorithm")), str):
        raise UnreadableRun(f"{path}: it is no run's configuration")
    models = config.get("clients", {}).get("models") or []
    if not isinstance(models, list) or not all(isinstance(_name_of(model), str) for model in models):
        raise UnreadableRun(f"{path}: clients.models: it must be a list of models with a name each")
    checked: dict[str, Any] = config
    return checked


def _name_of(component: Any) -> Any:
    return component.get("name") if isinstance(component, dict) else None


def _json(path: Path, notes: list[str], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name}: it is damaged and was left out ({error})")
        return None
    if not isinstance(value, dict) or not fits(value):
        notes.append(f"{path.name}: it is damaged and was left out (it has not what is read of it)")
        return None
    return value


def _is_environment(value: dict[str, Any]) -> bool:
    suite = value.get("suite")
    return suite is None or (isinstance(suite, dict) and _is_number(suite.get("jobs", 1)))


def _from_h5(path: Path) -> Run:
    import h5py

    try:
        with h5py.File(path) as file:
            text = {name: str(file[name].asstr()[()]) for name in ("config", "result", "environment")}
            lines = [json.loads(line) for line in file["rounds/lines"].asstr()]
        config, result, environment = (json.loads(text[name]) for name in ("config", "result", "environment"))
    except (OSError, KeyError, ValueError, RecursionError) as error:
        raise UnreadableRun(f"{path}: it is no run's run.h5, or damaged: {error}") from None
    if not lines:
        raise UnreadableRun(f"{path}: no round was finished")
    fit = all(_is_round(line, path) for line in lines) and isinstance(result, dict) and _is_result(result)
    if not fit or not isinstance(environment, dict) or not _is_environment(environment):
        raise UnreadableRun(f"{path}: it is damaged: it has not what is read of a run")
    return Run(path, _checked(config, path), lines, result, environment)
