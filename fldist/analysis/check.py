"""`fldist report --check RUN`: whether the files that a run has left behind agree with each other.

Sums of the ledger's rows against rounds.jsonl and result.json, the configuration against its hash, rounds against their
numbers, run.h5 against all of them. What was measured cannot be checked in this way; that it was not changed or cut
afterwards can.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from fldist.analysis.runs import SIMULATED, SPENT, Run, json_lines, messages, read

_UNTRAINED = frozenset({"setup", "select", "evaluate"})
_TABLES = ("by_kind", "by_phase", "wasted", "encoded_by_phase", "wire_by_phase", "by_phase_and_kind")
_SUMS = ("logical", "encoded", "framing", "wire")
_NAMED = 3
"""So many rounds are named in which something does not agree."""


def _ways() -> dict[str, int]:
    return {"up": 0, "down": 0}


@dataclass
class Bytes:
    """What `bytes` of result.json and rounds.jsonl hold, added up from rows of the ledger."""

    sums: dict[str, dict[str, int]] = field(default_factory=lambda: {name: _ways() for name in _SUMS})
    tables: dict[str, dict[str, dict[str, int]]] = field(
        default_factory=lambda: {name: defaultdict(_ways) for name in _TABLES}
    )

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row, of either kind."""
        way, phase, delivered = row["direction"], row["phase"], row["status"] == "delivered"
        of_outcome = self.tables["by_phase"][phase] if delivered else self.tables["wasted"][row["status"]]
        if row["row"] == "message":
            self.sums["framing"][way] += row["framing_bytes"]
            self.sums["wire"][way] += row["wire_bytes"]
            self.tables["wire_by_phase"][phase][way] += row["wire_bytes"]
            of_outcome[way] += 0
            if delivered:
                self.tables["encoded_by_phase"][phase][way] += 0
            return
        of_outcome[way] += row["logical_bytes"]
        if not delivered:
            return
        self.tables["encoded_by_phase"][phase][way] += row["encoded_bytes"]
        self.tables["by_phase_and_kind"][f"{phase}.{row['kind']}"][way] += row["logical_bytes"]
        if phase not in _UNTRAINED:
            self.sums["logical"][way] += row["logical_bytes"]
            self.sums["encoded"][way] += row["encoded_bytes"]
            self.tables["by_kind"][row["kind"]][way] += row["logical_bytes"]

    def differing(self, told: Mapping[str, Any]) -> Iterator[str]:
        """Where a `bytes` differs from these sums. Its wire bytes are compared without its transport."""
        transport = told.get("transport", _ways())
        for name in _SUMS:
            for way, own in self.sums[name].items():
                other = told[name][way] - (transport[way] if name == "wire" else 0)
                if own != other:
                    yield f"{name} {way}: {other:,} B are told, the messages' rows give {own:,} B"
        for name in _TABLES:
            for key in sorted(set(self.tables[name]) | set(told[name])):
                for way in ("up", "down"):
                    own = self.tables[name].get(key, _ways())[way]
                    other = told[name].get(key, _ways())[way]
                    if own != other:
                        yield f"{name}.{key} {way}: {other:,} B are told, the messages' rows give {own:,} B"


@dataclass
class Checked:
    """What a check has found."""

    run: Run
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """What could not be checked, and why."""

    def text(self) -> str:
        """A line for each thing."""
        lines = [f"{self.run.path}"]
        lines += [f"  agrees     {line}" for line in self.passed]
        lines += [f"  unchecked  {line}" for line in self.unknown]
        lines += [f"  DIFFERS    {line}" for line in self.failed]
        return "\n".join(lines)


def check(path: Path) -> Checked:
    """Check a run's directory; ValueError when there is no run to check."""
    if path.suffix == ".h5":
        raise ValueError(f"{path}: what is checked is a run's directory; run.h5 alone has nothing to agree with")
    run = read(path)
    found = Checked(run)
    steps: list[tuple[str, Callable[[Run, Checked], None]]] = [
        ("clients.jsonl or timeline.jsonl", _check_lines),
        ("config.yaml", _check_config),
        ("rounds.jsonl or result.json", _check_rounds),
        ("messages.jsonl, rounds.jsonl or result.json", _check_bytes),
        ("run.h5", _check_arrays),
    ]
    for files, step in steps:
        try:
            step(run, found)
        except (LookupError, TypeError, AttributeError) as error:
            found.failed.append(f"{files}: it has not the form that this version writes ({_words(error)})")
    return found


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_lines(run: Run, found: Checked) -> None:
    damaged = [note for note in run.notes if "damaged" in note or "there twice" in note or "cannot be read" in note]
    for name in ("clients.jsonl", "timeline.jsonl"):
        if (run.path / name).is_file():
            for _ in json_lines(run.path / name, damaged):
                pass
    found.failed += damaged
    if not damaged:
        found.passed.append("every line can be read")


def _check_config(run: Run, found: Checked) -> None:
    if run.result is None:
        found.unknown.append("configuration: its hash is in result.json, which is not there")
        return
    text = json.dumps(run.config, sort_keys=True, separators=(",", ":"))
    own = hashlib.sha256(text.encode()).hexdigest()
    told = run.result.get("config_hash")
    if own == told:
        found.passed.append(f"config.yaml is the configuration that was run ({own[:12]})")
    else:
        found.failed.append(f"config.yaml has the hash {own[:12]}, result.json says {str(told)[:12]}")


def _check_rounds(run: Run, found: Checked) -> None:
    numbers = [line["round"] for line in run.rounds]
    lacking = numbers[-1] - len(numbers)
    if lacking:
        between = (n for before, after in zip([0, *numbers], numbers, strict=False) for n in range(before + 1, after))
        named = _some(list(islice(between, _NAMED)), lacking)
        found.failed.append(f"rounds.jsonl: {lacking} rounds are missing ({named})")
    else:
        found.passed.append(f"rounds.jsonl has every round from 1 to {numbers[-1]}")
    shrinking = [
        line["round"]
        for before, line in zip(run.rounds, run.rounds[1:], strict=False)
        if any(line["spent"][name] < before["spent"][name] for name in SPENT)
        or any(line["spent"].get(name, 0) < before["spent"].get(name, 0) for name in SIMULATED)
    ]
    if shrinking:
        found.failed.append(f"rounds.jsonl: less is spent after a round than before it ({_some(shrinking)})")
    result = run.result
    if result is None:
        found.unknown.append("result: the run was cut off, or is still going: there is no result.json")
        return
    if any("simulated" in line for line in run.rounds):
        _check_simulated(run, result, found)
    scored = [line for line in run.rounds if line["accuracy"] is not None]
    final = {name: scored[-1][name] if scored else None for name in ("accuracy", "loss")}
    told = {name: result["final"][name] for name in ("accuracy", "loss")}
    for what, own, other in (
        ("the number of rounds", numbers[-1], result["rounds"]),
        ("the final accuracy", final["accuracy"], told["accuracy"]),
        ("the final loss", final["loss"], told["loss"]),
    ):
        if own == other:
            found.passed.append(f"result.json: {what} ({own})")
        else:
            found.failed.append(f"result.json: {what} is {other}, rounds.jsonl says {own}")


def _check_simulated(run: Run, result: Mapping[str, Any], found: Checked) -> None:
    """What the devices have spent grows by what each round says, and ends where the result says."""
    lines = run.rounds
    bad = [
        line["round"]
        for before, line in pairwise(lines)
        if line["round"] == before["round"] + 1
        and any(
            line["spent"][name] != before["spent"][name] + line["simulated"][name.removeprefix("simulated_")]
            for name in SIMULATED
        )
    ]
    if bad:
        found.failed.append(f"rounds.jsonl: simulated costs do not add up to what is spent (rounds {_some(bad)})")
    told = {name.removeprefix("simulated_"): lines[-1]["spent"][name] for name in SIMULATED}
    if result.get("simulated") != told and run.status == "finished":
        found.failed.append(f"result.json: simulated is {result.get('simulated')}, rounds.jsonl says {told}")
    elif not bad:
        found.passed.append("simulated seconds and joules of the rounds add up to what is spent")


def _check_bytes(run: Run, found: Checked) -> None:
    """The ledger's rows against every round's bytes, the totals, and what was spent."""
    notes: list[str] = []
    total = Bytes()
    rounds: dict[int, Bytes] = defaultdict(Bytes)
    count = 0
    for row in messages(run, notes):
        if not {"row", "round", "direction", "phase", "status"} <= row.keys():
            notes.append(f"messages.jsonl: a row is none of the ledger's: {json.dumps(row)[:80]}")
            continue
        count += 1
        total.add(row)
        rounds[row["round"]].add(row)
    if notes:
        found.failed += notes
    if run.result is not None:
        _compare(found, f"{count:,} rows of the ledger add up to the totals of result.json", total, run.result["bytes"])
    else:
        _told_by_rounds(run, found, rounds, count)
    if run.result is None or run.status == "finished":
        _check_spent(run, found, rounds)


def _compare(found: Checked, what: str, own: Bytes, told: Mapping[str, Any]) -> None:
    differing = list(own.differing(told))
    if differing:
        found.failed += [f"result.json: {line}" for line in differing]
    else:
        found.passed.append(what)


def _told_by_rounds(run: Run, found: Checked, rounds: Mapping[int, Bytes], count: int) -> None:
    """Without totals: what the rounds' lines say was exchanged is in the ledger. Late replies may be booked later."""
    bad = [line["round"] for line in run.rounds if line["round"] in rounds and _less(rounds[line["round"]], line)]
    if bad:
        found.failed.append(f"rounds.jsonl: more bytes are told than the ledger's rows give (rounds {_some(bad)})")
    else:
        found.passed.append(f"{count:,} rows of the ledger hold what every round says was exchanged")


def _less(own: Bytes, line: Mapping[str, Any]) -> bool:
    return any(own.sums["logical"][way] < line["bytes"]["logical"][way] for way in ("up", "down"))


def _check_spent(run: Run, found: Checked, rounds: Mapping[int, Bytes]) -> None:
    """What the last round says was spent is the rows' sum; or less, where a client was missing in some round: that its
    call has arrived may have become known after the last one."""
    last = run.rounds[-1]
    missing = any(line["missing"] for line in run.rounds)
    for name, way in (("uplink_bytes", "up"), ("downlink_bytes", "down")):
        own = sum(
            ways[way]
            for number, of in rounds.items()
            if number <= last["round"]
            for phase, ways in of.tables["encoded_by_phase"].items()
            if phase != "evaluate"
        )
        told = last["spent"][name]
        if told > own or (told < own and not missing):
            found.failed.append(f"rounds.jsonl: spent.{name} of the last round is {told:,}, the rows give {own:,}")
        else:
            found.passed.append(f"spent.{name} of the last round agrees with the ledger's rows ({told:,} B)")


def _check_arrays(run: Run, found: Checked) -> None:
    path = run.path / "run.h5"
    if not path.is_file():
        found.unknown.append("run.h5: it is not there; it is written when a run ends")
        return
    try:
        sealed = read(path)
        digests = _digests(path)
    except (ValueError, OSError, KeyError) as error:
        found.failed.append(f"run.h5: {error}")
        return
    same: list[tuple[str, Callable[[Run], Any]]] = [
        ("the configuration", lambda of: of.config),
        ("the rounds", lambda of: of.rounds),
        ("the result", lambda of: of.result),
    ]
    for what, part in same:
        if part(run) == part(sealed):
            found.passed.append(f"run.h5 has {what} of the other files")
        else:
            found.failed.append(f"run.h5: {what} in it is not that of the other files")
    changed = []
    for name, told in digests.items():
        own = run.path / name
        if not own.is_file():
            changed.append(f"{name} is gone")
        elif _digest(own) != told:
            changed.append(f"{name} was changed")
    if changed:
        found.failed.append(f"run.h5: since it was written, {', '.join(changed)}")
    else:
        found.passed.append(f"{len(digests)} files have the digests that run.h5 holds")


def _digests(path: Path) -> dict[str, str]:
    import h5py

    with h5py.File(path) as file:
        found: dict[str, str] = json.loads(file["sha256"].asstr()[()])
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(numbers: list[int], count: int | None = None) -> str:
    """The first of some numbers; count: how many there are, where not all are given."""
    count = len(numbers) if count is None else count
    named = ", ".join(map(str, numbers[:_NAMED]))
    return f"{named} and {count - _NAMED} more" if count > _NAMED else named
