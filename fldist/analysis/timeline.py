"""What every rank of a run was doing when, from messages.jsonl and timeline.jsonl; and the same as a Chrome trace.

All times are nanoseconds from the run's begin, on the server's clock. The server's spans are what it has measured; a
host's are the times that its messages carry, moved by the offset of the clocks as it was estimated then. A host packs
and unpacks from a call's arrival to the first client's begin, from each client's end to the next one's begin, and from
the last end until the reply begins to leave. What is in no span is waiting.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fldist.analysis.runs import Run, json_lines, messages

Kind = Literal["wait", "server", "encode", "compute", "evaluate", "down", "up"]
KINDS: tuple[Kind, ...] = ("wait", "server", "encode", "compute", "evaluate", "down", "up")
"""What a rank may be doing. `down` and `up` are transfers, which go on beside the rest."""

_SAME_CLOCK_NS = 10**9
"""Wall clocks are corrected while a process goes on. A server's monotonic clock that has moved by less than this
against the wall clock is taken for the one of the round before, so that such a correction moves nothing."""


class Lane(NamedTuple):
    """The server, or one host. In one process both have rank 0."""

    rank: int
    host: bool


SERVER = Lane(0, False)


class Clock(NamedTuple):
    """The server's clock minus a rank's, as estimated, and by how much it may be wrong; None: nothing bounds that."""

    offset_ns: int
    uncertainty_ns: int | None


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a lane did from begin_ns to end_ns. clients: whose; wire_bytes: of transfers.

    idle_ns: of a span that was joined from several, the time between these.
    """

    lane: Lane
    kind: Kind
    begin_ns: int
    end_ns: int
    clients: tuple[int, ...] = ()
    phase: str = ""
    wire_bytes: int = 0
    idle_ns: int = 0


@dataclass
class Round:
    """A round's spans, in order of lane and begin. The same number comes again for messages that were settled later."""

    number: int
    begin_ns: int
    end_ns: int
    spans: list[Span]
    clocks: dict[int, Clock] = field(default_factory=dict)
    attempt: int = 0
    measured: bool = True
    """Whether timeline.jsonl has the round; else begin and end are those of its messages, and nobody waits."""


# ---- from files to rounds
def of_run(run: Run, notes: list[str]) -> Iterator[Round]:
    """The rounds of a run, as they went; what is damaged is told in `notes` at the end."""
    return timeline(messages(run, notes), lines(run, notes), notes)


def lines(run: Run, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a run's timeline.jsonl; none for a run that was read from run.h5."""
    if run.path.suffix != ".h5":
        yield from json_lines(run.path / "timeline.jsonl", notes)


def timeline(
    rows: Iterable[dict[str, Any]], server: Iterable[dict[str, Any]], notes: list[str] | None = None
) -> Iterator[Round]:
    """Rounds in the order in which they were written, from the rows of messages.jsonl and the lines of timeline.jsonl.

    Nothing is kept but the bounds of rounds, so that a run of any length can be read. Rows and lines that lack what is
    needed are left out, and counted in `notes`.
    """
    left_out = {"messages.jsonl": 0, "timeline.jsonl": 0}

    def usable(file: str, values: Iterable[dict[str, Any]], check: Any) -> Iterator[dict[str, Any]]:
        for value in values:
            if check(value):
                yield value
            else:
                left_out[file] += 1

    of_server = usable("timeline.jsonl", server, _is_line)
    letters = usable("messages.jsonl", (row for row in rows if row.get("row") == "message"), _is_message)
    line = next(of_server, None)
    placing = _Placing(line)
    for number, group in groupby(letters, key=lambda row: int(row["round"])):
        while line is not None and line["round"] < number:
            yield placing.round(line["round"], line, [])
            line = next(of_server, None)
        if line is not None and line["round"] == number:
            yield placing.round(number, line, group)
            line = next(of_server, None)
        else:
            yield placing.round(number, None, group)
    while line is not None:
        yield placing.round(line["round"], line, [])
        line = next(of_server, None)
    for file, count in left_out.items():
        if count and notes is not None:
            notes.append(f"{file}: {count} lines lack a time or a number and are not in the timeline")


class _Placing:
    """Brings the monotonic clocks of a run's processes to one zero: the begin of the run's first round."""

    def __init__(self, first: dict[str, Any] | None) -> None:
        self._offset = first["unix_ns"] - first["began_ns"] if first else 0
        self._zero = first["unix_ns"] if first else None
        self._lanes = {SERVER}
        self._bounds: dict[int, tuple[int, int, int]] = {}  # by round: begin, end, the offset that was used

    def round(self, number: int, line: dict[str, Any] | None, rows: Iterable[dict[str, Any]]) -> Round:
        """One round's line, if it has one, and rows, in places on the common clock."""
        spans = list(_of_rows(rows))
        if line is not None:
            seen = line["unix_ns"] - line["began_ns"]
            if abs(seen - self._offset) >= _SAME_CLOCK_NS:
                self._offset = seen
            began = line["began_ns"]
            for kind, begin, end in line["spans"]:
                spans.append(Span(SERVER, kind, began + begin, began + end))
        known = self._bounds.get(number)
        offset = known[2] if line is None and known else self._offset
        if self._zero is None:
            self._zero = min((s.begin_ns for s in spans), default=0)
        shift = offset - self._zero
        spans = [replace(s, begin_ns=s.begin_ns + shift, end_ns=s.end_ns + shift) for s in spans]
        self._lanes |= {s.lane for s in spans}
        if line is not None:
            begin, end = line["began_ns"] + shift, line["ended_ns"] + shift
        elif known:
            begin, end = known[:2]
        else:
            begin, end = min((s.begin_ns for s in spans), default=0), max((s.end_ns for s in spans), default=0)
        self._bounds[number] = (begin, end, offset)
        clocks = {int(rank): Clock(c["offset_ns"], c["uncertainty_ns"]) for rank, c in _clocks(line).items()}
        self._lanes |= {Lane(rank, True) for rank in clocks}
        made = Round(number, begin, end, spans, clocks, line["attempt"] if line else 0, line is not None)
        if made.measured:
            spans += waits(made, self._lanes)
        spans.sort(key=attrgetter("lane", "begin_ns"))
        return made


def _of_rows(rows: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """A host's computing, a span a message; transfers, a span a frame: messages that left and arrived together; and
    its packing and unpacking."""
    frames: dict[tuple[int, Kind, int, int], list[dict[str, Any]]] = defaultdict(list)
    calls: dict[tuple[int, int, int], _HostsCall] = defaultdict(_HostsCall)
    for row in rows:
        calls[row["rank"], row.get("attempt", 0), row.get("call", 0)].see(row)
        rank, direction, started = row["rank"], row["direction"], row["started_ns"]
        if direction == "up" and started and row["ready_ns"] > started:
            kind: Kind = "evaluate" if row["phase"] == "evaluate" else "compute"
            yield Span(Lane(rank, True), kind, started, row["ready_ns"], (row["client"],), row["phase"])
        if row["sent_ns"] and row["done_ns"] > row["sent_ns"]:
            frames[rank, direction, row["sent_ns"], row["done_ns"]].append(row)
    for (rank, way, sent, done), of in frames.items():
        clients = tuple(sorted({row["client"] for row in of}))
        yield Span(Lane(rank, True), way, sent, done, clients, of[0]["phase"], sum(row["wire_bytes"] for row in of))
    for (rank, _, _), call in calls.items():
        for begin, end in call.packing():
            yield Span(Lane(rank, True), "encode", begin, end)


class _HostsCall:
    """The messages of one call on one host."""

    def __init__(self) -> None:
        self._arrived: dict[int, int] = {}
        self._worked: list[tuple[int, int, int, int]] = []  # began, ended, began to leave, client

    def see(self, row: dict[str, Any]) -> None:
        """Take a message into account."""
        if row["direction"] == "down":
            if row["done_ns"]:
                self._arrived[row["client"]] = row["done_ns"]
        elif row["started_ns"]:
            self._worked.append((row["started_ns"], row["ready_ns"], row["sent_ns"], row["client"]))

    def packing(self) -> Iterator[tuple[int, int]]:
        """When the host packed and unpacked, in order, no two overlapping."""
        worked = sorted(self._worked)
        free: int | None = None  # the host was at work until then
        for index, (began, ended, left, client) in enumerate(worked):
            arrived = self._arrived.get(client)
            begin = max((at for at in (arrived, free) if at is not None), default=began)
            if begin < began:
                yield begin, began
            following = worked[index + 1][0] if index + 1 < len(worked) else left
            end = min(left, following)
            if end > ended:
                yield ended, end
            free = max(ended, end)


def _is_message(row: dict[str, Any]) -> bool:
    numbers = ("round", "client", "rank", "wire_bytes", "ready_ns", "sent_ns", "done_ns")
    return (
        all(isinstance(row.get(name), int) for name in numbers)
        and isinstance(row.get("started_ns", ""), int | None)
        and row.get("direction") in ("up", "down")
        and isinstance(row.get("phase"), str)
    )


def _is_line(line: dict[str, Any]) -> bool:
    return (
        all(isinstance(line.get(name), int) for name in ("round", "attempt", "began_ns", "ended_ns", "unix_ns"))
        and isinstance(line.get("spans"), list)
        and all(_is_span(span) for span in line["spans"])
        and isinstance(line.get("clocks"), dict)
        and all(_is_clock(rank, clock) for rank, clock in line["clocks"].items())
    )


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 3
        and span[0] in ("server", "encode", "evaluate")
        and all(isinstance(ns, int) for ns in span[1:])
    )


def _is_clock(rank: str, clock: Any) -> bool:
    return (
        rank.isdecimal()
        and isinstance(clock, dict)
        and isinstance(clock.get("offset_ns"), int)
        and isinstance(clock.get("uncertainty_ns", ""), int | None)
    )


def _clocks(line: dict[str, Any] | None) -> dict[str, Any]:
    return line["clocks"] if line is not None else {}


# ---- what follows from spans
def waits(of: Round, lanes: Iterable[Lane]) -> list[Span]:
    """The gaps between what each lane did in a round, from its begin to its end; transfers fill none."""
    work: dict[Lane, list[tuple[int, int]]] = {lane: [] for lane in lanes}
    for span in of.spans:
        if span.kind not in ("down", "up", "wait") and span.lane in work:
            work[span.lane].append((span.begin_ns, span.end_ns))
    found = []
    for lane, done in work.items():
        at = of.begin_ns
        for begin, end in sorted(done):
            if begin > at:
                found.append(Span(lane, "wait", at, min(begin, of.end_ns)))
            at = max(at, end)
            if at >= of.end_ns:
                break
        if at < of.end_ns:
            found.append(Span(lane, "wait", at, of.end_ns))
    return found


def covered_ns(spans: Iterable[Span]) -> int:
    """How long at least one of the spans went on."""
    total, until = 0, None
    for span in sorted(spans, key=attrgetter("begin_ns")):
        begin = span.begin_ns if until is None else max(span.begin_ns, until)
        if span.end_ns > begin:
            total += span.end_ns - begin
            until = span.end_ns
    return total


def coarsen(spans: Sequence[Span], most: int) -> list[Span]:
    """At most about `most` spans: those of a kind that lie close together in a lane are joined, no more than needed.

    One of each kind in each lane is always left, also where these are more than `most`.
    """
    joined, gap_ns = list(spans), 1000
    longest = max((s.end_ns for s in spans), default=0) - min((s.begin_ns for s in spans), default=0)
    while len(joined) > most and gap_ns <= 2 * longest:
        joined = _joined(joined, gap_ns)
        gap_ns *= 2
    return joined


def _joined(spans: Sequence[Span], gap_ns: int) -> list[Span]:
    last: dict[tuple[Lane, Kind], Span] = {}
    found = []
    for span in sorted(spans, key=attrgetter("begin_ns")):
        before = last.get((span.lane, span.kind))
        if before is not None and span.begin_ns - before.end_ns <= gap_ns:
            last[span.lane, span.kind] = replace(
                before,
                end_ns=max(before.end_ns, span.end_ns),
                clients=tuple(sorted({*before.clients, *span.clients})),
                phase=before.phase if before.phase == span.phase else "several phases",
                wire_bytes=before.wire_bytes + span.wire_bytes,
                idle_ns=before.idle_ns + span.idle_ns + max(0, span.begin_ns - before.end_ns),
            )
            continue
        if before is not None:
            found.append(before)
        last[span.lane, span.kind] = span
    found += last.values()
    return sorted(found, key=attrgetter("lane", "begin_ns"))


# ---- the Trace Event Format
_STRIPS = {"server": 1, "encode": 1, "evaluate": 1, "compute": 1, "down": 2, "up": 3}
_IN_PROCESS_HOST = 1000  # added to the thread numbers of a host that is the server's process


def chrome_trace(run: Run, notes: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """A run as events of the Trace Event Format: complete ones (`X`, µs) and names (`M`)."""
    return events(of_run(run, [] if notes is None else notes), host_names(run))


def host_names(run: Run) -> dict[int, str]:
    """By rank, the machine that it was on, as far as environment.json tells."""
    hosts = run.environment.get("hosts")
    names = {}
    for rank, about in hosts.items() if isinstance(hosts, dict) else ():
        if rank.isdecimal() and isinstance(about, dict) and isinstance(about.get("hostname"), str):
            names[int(rank)] = about["hostname"]
    return names


def events(rounds: Iterable[Round], hosts: dict[int, str] | None = None) -> Iterator[dict[str, Any]]:
    """Rounds as trace events: a process a rank; threads for rounds, work and transfers. A gap in a thread is waiting.

    Transfers of one host that overlap get threads of their own, since slices of a thread must lie one in another.
    """
    tracks = _Tracks(hosts or {})
    drawn: set[int] = set()
    for of in rounds:
        if of.measured and of.number not in drawn:
            drawn.add(of.number)
            about = {"attempt": of.attempt, "clocks": {str(k): c._asdict() for k, c in sorted(of.clocks.items())}}
            name = f"round {of.number}" if of.number else "setup"
            yield from tracks.new(SERVER, 0, 0)
            yield _complete(name, "round", 0, 0, of.begin_ns, of.end_ns, {"round": of.number, **about})
        for span in of.spans:
            if span.kind == "wait":
                continue
            track, names = tracks.take(span)
            yield from names
            facts: dict[str, Any] = {"round": of.number}
            if span.clients:
                facts |= {"clients": list(span.clients), "phase": span.phase}
            if span.kind in ("down", "up"):
                facts["wire_bytes"] = span.wire_bytes
            category = "wire" if span.kind in ("down", "up") else span.kind
            yield _complete(_title(span), category, span.lane.rank, track, span.begin_ns, span.end_ns, facts)


def _title(span: Span) -> str:
    if not span.clients:
        return span.kind
    whose = f"client {span.clients[0]}" if len(span.clients) == 1 else f"{len(span.clients)} clients"
    return whose if span.kind == "compute" else f"{span.kind}: {whose}"


def _complete(
    name: str, category: str, process: int, thread: int, begin_ns: int, end_ns: int, facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": begin_ns / 1000,
        "dur": max(0, end_ns - begin_ns) / 1000,
        "pid": process,
        "tid": thread,
        "args": facts,
    }


class _Tracks:
    """Threads of the trace: so many for each strip of a lane that no two slices overlap."""

    _NAMES = ("rounds", "works", "receives", "sends")

    def __init__(self, hosts: dict[int, str]) -> None:
        self._hosts = hosts
        self._ends: dict[tuple[Lane, int], list[int]] = defaultdict(list)
        self._named: set[tuple[int, int]] = set()

    def take(self, span: Span) -> tuple[int, list[dict[str, Any]]]:
        """The thread for a span, and the names that are new with it."""
        strip = _STRIPS[span.kind]
        if span.lane == SERVER:  # its spans lie one in another as they are
            return self._thread(SERVER, strip, 0), self.new(SERVER, strip, 0)
        ends = self._ends[span.lane, strip]
        index = next((i for i, end in enumerate(ends) if end <= span.begin_ns), len(ends))
        ends[index:] = [span.end_ns, *ends[index + 1 :]]
        return self._thread(span.lane, strip, index), self.new(span.lane, strip, index)

    @staticmethod
    def _thread(lane: Lane, strip: int, index: int) -> int:
        return 100 * strip + index + (_IN_PROCESS_HOST if lane.host and lane.rank == 0 else 0)

    def new(self, lane: Lane, strip: int, index: int) -> list[dict[str, Any]]:
        """The names of a process and a thread that are used for the first time."""
        process, thread = lane.rank, self._thread(lane, strip, index)
        found = []
        for number, key in ((-1, "process"), (thread, "thread")):
            if (process, number) in self._named:
                continue
            self._named.add((process, number))
            name = self._process(lane) if key == "process" else self._NAMES[strip]
            if key == "thread":
                name = f"host {name}" if lane.host and lane.rank == 0 else name
                name = f"{name} {index + 1}" if index else name
            order = process if key == "process" else thread
            where = {"pid": process, "tid": max(number, 0)}
            found.append({"name": f"{key}_name", "ph": "M", **where, "args": {"name": name}})
            found.append({"name": f"{key}_sort_index", "ph": "M", **where, "args": {"sort_index": order}})
        return found

    def _process(self, lane: Lane) -> str:
        at = f", {self._hosts[lane.rank]}" if lane.rank in self._hosts else ""
        return f"host (rank {lane.rank}{at})" if lane.rank else "server (rank 0)"


class TraceFile:
    """A gzipped trace that is written event by event; Perfetto and chrome://tracing open it as it is."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._file = gzip.GzipFile(path, "wb", compresslevel=6, mtime=0)
        self._about = about
        self._separator = b'{"traceEvents":[\n'

    def write(self, found: Iterable[dict[str, Any]]) -> None:
        """Append events."""
        for event in found:
            self._file.write(self._separator + json.dumps(event, separators=(",", ":")).encode())
            self._separator = b",\n"

    def close(self) -> None:
        """Write the end of the file. about: what is said of the whole trace."""
        if self._separator != b",\n":
            self._file.write(self._separator)
        end = json.dumps({"displayTimeUnit": "ms", "otherData": self._about})
        self._file.write(b"\n]," + end[1:].encode() + b"\n")
        self._file.close()
