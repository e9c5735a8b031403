"""The ledger: every byte counted once, at the server, by kind, direction, client, round and phase.

messages.jsonl has two kinds of rows. `row: kind`, one per message and kind: logical and encoded bytes, times
and status. `row: message`, one per message: framing and wire bytes, and the times again. Several clients of a
host may share a part (or a frame): its framing and wire bytes are booked on the first of them, the others carry
0 there and name it in `shared_with`.

    logical  tensor bytes as if the client were alone on its own link (8 for a number)
    encoded  after the codec
    framing  heads without the payload that rides in them
    wire     what the sending process handed to the transport: framing and every distinct part once
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fldist.kinds import Form, Kind, Schema
from fldist.lines import Lines
from fldist.wire.codec import _NO_PART, Frame, Place, Status

Direction = Literal["up", "down"]
Outcome = Literal["delivered", "late", "lost", "resent", "refused", "open"]

UNTRAINED_PHASES = frozenset({"setup", "select", "evaluate"})
"""Phases that are not training; `bytes.logical` and `bytes.by_kind` leave them out."""

TABLES = ("by_kind", "by_phase", "wasted", "encoded_by_phase", "wire_by_phase", "by_phase_and_kind")
"""What `Totals` holds by name and direction."""

ROTATE_BYTES = 256 * 10**6


Kinds = dict[Kind, tuple[int, int]]
"""(logical, encoded) bytes by kind."""


@dataclass
class Booked:
    """One message in the ledger; `settle` gives it its outcome."""

    round: int
    attempt: int
    call: int
    phase: str
    client: int
    rank: int
    direction: Direction
    kinds: Kinds
    framing_bytes: int
    wire_bytes: int
    shared_with: int | None
    started_ns: int | None = None
    ready_ns: int = 0
    sent_ns: int = 0
    done_ns: int = 0
    status: Outcome = "open"

    @property
    def logical_bytes(self) -> int:
        """Logical bytes of all kinds."""
        return sum(logical for logical, _ in self.kinds.values())

    def settle(self, status: Outcome, done_ns: int = 0) -> None:
        """Give the outcome; only the first one counts, except that what was delivered may prove to be of no use."""
        if self.status == "open" or (self.status == "delivered" and status in ("late", "refused", "resent")):
            self.status = status
            self.done_ns = done_ns or self.done_ns


def costs(
    frame: Frame, schema: Schema, once: Mapping[int, Kinds] | None = None, carrier: int | None = None
) -> list[tuple[Kinds, int, int, int | None]]:
    """(kinds, framing bytes, wire bytes, shared_with) of each message of an encoded or decoded frame.

    once: by client, the kinds of values that are booked with its message, whether or not they travel in it; carrier:
    the client with whose message travelled what this frame does not repeat, or what is broadcast with it.
    """
    booked: dict[int, int] = {}  # part -> client that carries its wire bytes
    payload_in_head = sum(p.bytes for p in frame.parts if p.place is Place.INLINE)
    result: list[tuple[Kinds, int, int, int | None]] = []
    for number, message in enumerate(frame.messages):
        kinds: Kinds = dict((once or {}).get(message.client, {}))
        distinct = 0
        shared_with: int | None = frame.messages[0].client if number else carrier
        fields = [] if message.status is Status.ERROR else message.fields
        for spec, value in zip(schema.fields, fields, strict=False):
            logical, encoded = kinds.get(spec.kind, (0, 0))
            if value.form in (Form.FLOAT, Form.INT):
                logical, encoded = logical + 8, encoded + 8
                payload_in_head += 8
                distinct += 8
            for index in value.parts:
                if index == _NO_PART:
                    continue
                part = frame.parts[index]
                logical, encoded = logical + part.logical_bytes, encoded + part.bytes
                if part.place is Place.WORLD and carrier is not None:
                    shared_with = carrier
                elif index in booked:
                    if booked[index] != message.client:
                        shared_with = booked[index]
                else:
                    booked[index] = message.client
                    distinct += part.bytes
            if value.form not in (Form.NONE, Form.HELD, Form.FOLDED) and value.version is None:
                kinds[spec.kind] = (logical, encoded)
        result.append((kinds, 0, distinct, shared_with))
    if result:
        unused = [p for i, p in enumerate(frame.parts) if i not in booked] if carrier is None else []
        # what is broadcast is booked on the call's first client, also where its host holds it already
        broadcast = sum(p.bytes for p in unused if p.place is Place.WORLD)
        framing = frame.head_bytes - payload_in_head
        kinds, _, distinct, shared = result[0]
        result[0] = (kinds, framing, framing + distinct + broadcast, shared)
    return result


def _by_direction() -> dict[str, int]:
    return {"up": 0, "down": 0}


@dataclass
class Totals:
    """Sums of the ledger; `as_dict` is `bytes` of result.json."""

    logical: dict[str, int] = field(default_factory=_by_direction)
    encoded: dict[str, int] = field(default_factory=_by_direction)
    framing: dict[str, int] = field(default_factory=_by_direction)
    wire: dict[str, int] = field(default_factory=_by_direction)
    by_kind: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(_by_direction))
    by_phase: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(_by_direction))
    wasted: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(_by_direction))
    transport: dict[str, int] = field(default_factory=_by_direction)
    encoded_by_phase: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(_by_direction))
    wire_by_phase: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(_by_direction))
    by_phase_and_kind: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(_by_direction))

    def add(self, message: Booked) -> None:
        """Count one settled message."""
        way = message.direction
        self.wire[way] += message.wire_bytes
        self.wire_by_phase[message.phase][way] += message.wire_bytes
        self.framing[way] += message.framing_bytes
        logical = message.logical_bytes
        if message.status != "delivered":
            self.wasted[message.status][way] += logical
            return
        self.by_phase[message.phase][way] += logical
        self.encoded_by_phase[message.phase][way] += sum(encoded for _, encoded in message.kinds.values())
        for kind, (bytes_logical, _) in message.kinds.items():
            self.by_phase_and_kind[f"{message.phase}.{kind.label}"][way] += bytes_logical
        if message.phase in UNTRAINED_PHASES:
            return
        self.logical[way] += logical
        for kind, (bytes_logical, bytes_encoded) in message.kinds.items():
            self.by_kind[kind.label][way] += bytes_logical
            self.encoded[way] += bytes_encoded

    def add_transport(self, up: int, down: int) -> None:
        """Count heartbeats, joins, acknowledgements and the like; part of wire."""
        self.transport["up"] += up
        self.transport["down"] += down
        self.wire["up"] += up
        self.wire["down"] += down

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Totals:
        """What `as_dict` gave."""
        made = cls(*(dict(saved[name]) for name in ("logical", "encoded", "framing", "wire")))
        made.transport = dict(saved["transport"])
        for name in TABLES:
            getattr(made, name).update({k: dict(v) for k, v in saved[name].items()})
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries in a fixed order."""
        return {
            "logical": dict(self.logical),
            "encoded": dict(self.encoded),
            "framing": dict(self.framing),
            "wire": dict(self.wire),
            "by_kind": {k: dict(v) for k, v in sorted(self.by_kind.items())},
            "by_phase": {k: dict(v) for k, v in sorted(self.by_phase.items())},
            "wasted": {k: dict(v) for k, v in sorted(self.wasted.items())},
            "transport": dict(self.transport),
            "encoded_by_phase": {k: dict(v) for k, v in sorted(self.encoded_by_phase.items())},
            "wire_by_phase": {k: dict(v) for k, v in sorted(self.wire_by_phase.items())},
            "by_phase_and_kind": {k: dict(v) for k, v in sorted(self.by_phase_and_kind.items())},
        }

    def nested(self) -> dict[str, dict[str, dict[str, int]]]:
        """`by_phase_and_kind` as phase, kind and direction."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for key, ways in sorted(self.by_phase_and_kind.items()):
            phase, _, kind = key.rpartition(".")
            found.setdefault(phase, {})[kind] = dict(ways)
        return found

    def spent(self) -> dict[str, int]:
        """What has been exchanged, scoring left out: encoded bytes of what was delivered, wire bytes of everything."""
        found = {}
        for prefix, by_phase in (("", self.encoded_by_phase), ("wire_", self.wire_by_phase)):
            for name, way in (("uplink", "up"), ("downlink", "down")):
                found[f"{prefix}{name}_bytes"] = sum(v[way] for k, v in by_phase.items() if k != "evaluate")
        return found


class Ledger:
    """Books messages as they are posted and received; writes and counts them when they are settled."""

    def __init__(self, path: Path | None, totals: Totals | None = None) -> None:
        self.totals = totals or Totals()
        self.round_totals = Totals()
        self._open: list[Booked] = []
        self._lines = Lines(path) if path else None

    def book(
        self,
        frame: Frame,
        schema: Schema,
        *,
        direction: Direction,
        phase: str,
        rank: int,
        times: Iterable[tuple[int | None, int, int, int]],
        once: Mapping[int, Kinds] | None = None,
        carrier: int | None = None,
    ) -> list[Booked]:
        """Enter a frame's messages as open; `times`: (started, ready, sent, done) of each; the rest: see `costs`."""
        head = frame.head
        entered = []
        of_each = costs(frame, schema, once, carrier)
        for message, cost, (started, ready, sent, done) in zip(frame.messages, of_each, times, strict=True):
            kinds, framing, wire, shared_with = cost
            entered.append(
                Booked(
                    round=head.round,
                    attempt=head.attempt,
                    call=head.call,
                    phase=phase,
                    client=message.client,
                    rank=rank,
                    direction=direction,
                    kinds=kinds,
                    framing_bytes=framing,
                    wire_bytes=wire,
                    shared_with=shared_with,
                    started_ns=started,
                    ready_ns=ready,
                    sent_ns=sent,
                    done_ns=done,
                )
            )
        self._open += entered
        return entered

    def void(self, number: int, attempt: int) -> None:
        """An attempt at a round is made again: what it exchanged is exchanged once more, and counts as `resent`."""
        for message in self._open:
            if (message.round, message.attempt) == (number, attempt):
                message.settle("resent")

    def flush(self, *, final: bool = False) -> None:
        """Write and count what is settled, in order of call, direction and client; `final`: the rest is lost."""
        if final:
            for message in self._open:
                if message.status == "open":
                    message.settle("lost")
        settled = [m for m in self._open if m.status != "open"]
        self._open = [m for m in self._open if m.status == "open"]
        settled.sort(key=lambda m: (m.round, m.attempt, m.call, m.direction, m.client))
        lines = []
        for message in settled:
            self.totals.add(message)
            self.round_totals.add(message)
            lines += _rows(message)
        if self._lines is not None:
            self._lines.write(lines)
            if self._lines.size > ROTATE_BYTES and self._lines.problem is None:
                self._rotate()

    @property
    def problem(self) -> str | None:
        """Why rows wait to be written, or None."""
        return self._lines.problem if self._lines is not None else None

    def take_round(self) -> Totals:
        """The totals since the last call of this."""
        totals, self.round_totals = self.round_totals, Totals()
        return totals

    def add_transport(self, up: int, down: int) -> None:
        """Count transport bytes."""
        self.totals.add_transport(up, down)

    def close(self) -> None:
        """Settle everything and close the file; OSError when rows cannot be written."""
        self.flush(final=True)
        lines, self._lines = self._lines, None
        if lines is not None:
            lines.close()

    def _rotate(self) -> None:
        assert self._lines is not None
        path = self._lines.path
        self._lines.sync()  # checkpoints sync the file that grows, and never come back to one that is full
        self._lines.close()
        number = len(list(path.parent.glob(f"{path.stem}-*{path.suffix}"))) + 1
        path.rename(path.with_name(f"{path.stem}-{number:04d}{path.suffix}"))
        self._lines = Lines(path)


def _rows(message: Booked) -> list[str]:
    common = {
        "round": message.round,
        "attempt": message.attempt,
        "call": message.call,
        "phase": message.phase,
        "client": message.client,
        "rank": message.rank,
        "direction": message.direction,
    }
    rows: list[dict[str, Any]] = [
        {
            "row": "kind",
            **common,
            "kind": kind.label,
            "codec": "raw",
            "logical_bytes": logical,
            "encoded_bytes": encoded,
            "ready_ns": message.ready_ns,
            "sent_ns": message.sent_ns,
            "done_ns": message.done_ns,
            "status": message.status,
        }
        for kind, (logical, encoded) in message.kinds.items()
    ]
    rows.append(
        {
            "row": "message",
            **common,
            "framing_bytes": message.framing_bytes,
            "wire_bytes": message.wire_bytes,
            "shared_with": message.shared_with,
            "started_ns": message.started_ns,
            "ready_ns": message.ready_ns,
            "sent_ns": message.sent_ns,
            "done_ns": message.done_ns,
            "status": message.status,
        }
    )
    return [json.dumps(r) + "\n" for r in rows]
