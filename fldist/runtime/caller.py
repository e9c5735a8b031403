"""Calls: the server calls a client method on some clients, the replies are folded as they arrive.

`Caller` owns everything between an algorithm's `call` and the link: placement, frames, deadlines, folds, what
is missing and why, the ledger's entries, the verdict on the clients' staged writes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fldist.algorithm import TooFewReplies
from fldist.devices import Cost
from fldist.fold import FixedPoint, Fold, NoWeight
from fldist.kinds import Form
from fldist.params import Params
from fldist.runtime.call import Call, check_names
from fldist.runtime.clocks import Clock
from fldist.runtime.cohort import Replies
from fldist.runtime.folding import Folds, reducible
from fldist.runtime.job import OWN, ClientMethod, Job
from fldist.runtime.membership import Faults
from fldist.runtime.once import OnceTable, size_of
from fldist.runtime.placement import Placement
from fldist.runtime.sharing import Shares
from fldist.runtime.state import UNKEPT, version_of
from fldist.selection import ClientReport
from fldist.sparse import Kept
from fldist.wire.codec import Frame, FrameType, Head, Message, Status, values_of
from fldist.wire.ledger import Booked, Kinds, Ledger
from fldist.wire.link import Combined, Event, Joined, Lost, RanksLink, Received, Sent, ServerLink

log = logging.getLogger("fldist.server")

_LATE_CALLS = 1000
"""Calls to which a late reply may still belong."""
_LOST_S = 5.0
"""How long the `Lost` event of a host that took no frame may be on its way."""
_LARGE = (Params, Tensor, dict, Kept)
"""Arguments that may be large."""


_NOTHING = ClientReport(0.0, 0.0, 0.0, 0.0, 0.0)
NOT_WAITED_FOR = "not waited for: too many others are missing"


class ClientCodeFailed(RuntimeError):
    """Every client of a call failed with an exception of its own: the algorithm's code cannot work."""


@dataclass
class RoundFacts:
    """What one round's calls showed; the server writes it into rounds.jsonl."""

    called: set[int] = field(default_factory=set)
    replied: set[int] = field(default_factory=set)
    missing: dict[int, str] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)  # why no answer came of a call of the selector's
    reports: dict[int, ClientReport] = field(default_factory=dict)  # by client; of several calls the seconds are added
    own: dict[int, Tensor] = field(default_factory=dict)  # by client: what it told of its last training, see `job.OWN`
    compute_s: dict[int, float] = field(default_factory=dict)  # by rank
    wire_s: dict[int, float] = field(default_factory=dict)  # by rank
    simulated: Cost = field(default_factory=Cost)  # of its calls, one after the other, where devices are simulated
    encoded: list[tuple[float, float]] = field(default_factory=list)  # from when to when the server packed and folded
    calls: list[tuple[float, float]] = field(default_factory=list)  # from when to when it was in calls
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0

    @property
    def encode_s(self) -> float:
        """Seconds of packing, unpacking and folding at the server."""
        return sum(end - begin for begin, end in self.encoded)

    @property
    def calls_s(self) -> float:
        """Seconds of the server in calls, beginning to end."""
        return sum(end - begin for begin, end in self.calls)


class Hosts(Protocol):
    """What a caller needs of a run's membership."""

    def joined(self, event: Joined) -> None:
        """A host is ready for calls."""

    def lost(self, rank: int, reason: str, fresh: Collection[int]) -> str:
        """A host is gone; returns why, in full. fresh: clients of which a call was accepted in this round."""


class Caller:
    """Makes the calls of one run. One thread uses it: the round loop."""

    def __init__(
        self,
        job: Job,
        link: ServerLink,
        ledger: Ledger,
        placement: Placement,
        hosts: Hosts,
    ) -> None:
        self.job = job
        self._hosts = hosts
        self._reasons: dict[int, str] = {}  # why a host was lost
        self.link = link
        self.ledger = ledger
        self.placement = placement
        self.clocks: dict[int, Clock] = {}
        self.facts = RoundFacts()
        self.reports: dict[int, ClientReport] = {}
        self._told: dict[int, ClientReport] = {}  # this round's reports
        self.worked: set[str] = set()  # methods that some client has answered
        self._key = (0, 0)
        self._stage = 0
        self._call = 0
        self._phases: dict[tuple[int, int, int], str] = {}  # of the latest calls: late replies are booked under theirs
        self._deadline: float | None = None
        self._default_phase: str | None = None
        self._faults = job.faults
        self._accepted: dict[int, int] = {}  # accepted calls up to the first one that was not
        self._broken: set[int] = set()  # clients with a call that was not accepted
        self.versions: dict[int, str] = {}  # of every client's committed state, where it has been written
        self.once = OnceTable(job.share)
        self._wrote: dict[int, str] = {}  # this round's, of accepted calls
        self._verdicts: dict[int, list[dict[str, Any]]] = {}  # by rank: not sent yet
        self._posted: dict[int, list[Booked]] = {}  # by sequence number: not acknowledged yet
        self._machines: dict[int, str] = {}  # by rank: the machine that it runs on
        self._sizes: dict[tuple[str, str], int] = {}  # by method and reply field that hosts fold: bytes of a reply's
        self._seconds: dict[str, float] = {}  # by method: what the latest client took

    # ---- rounds
    def begin_round(self, number: int, attempt: int, stage: int, phase: str | None = None) -> None:
        """Start a round; `phase` is the phase of its calls that name none (default: the method's name)."""
        self._key = (number, attempt)
        self._stage = stage
        self._call = 0
        self._default_phase = phase
        self._faults = self.job.faults
        limit = self.job.round_deadline_s
        self._deadline = time.monotonic() + limit if limit is not None else None
        self._accepted.clear()
        self._broken.clear()
        self._wrote.clear()
        self._told.clear()
        self.facts = RoundFacts()
        self.placement.begin_round()

    def end_round(self, commit: bool, again: bool = False) -> None:
        """Give the verdict on the round; it travels with the next frame to each host that was called.

        again: the round is going to be repeated, so what it has exchanged counts as `resent`.
        """
        number, attempt = self._key
        self.facts.ended_s = time.monotonic()
        hosts = self.placement.this_round
        for rank in sorted(set(hosts.values()) & set(self.placement.alive)):
            short = [[c, self._accepted.get(c, 0)] for c in sorted(self._broken) if hosts.get(c) == rank]
            self._verdicts.setdefault(rank, []).append(
                {"round": number, "attempt": attempt, "commit": commit, "accepted": short}
            )
        if commit:
            self.placement.commit(c for c, calls in self._accepted.items() if calls)
            self.versions.update(self._wrote)
            self.reports.update(self._told)
        elif again:
            self.ledger.void(number, attempt)
        self.once.settle()
        self._accepted.clear()
        self._broken.clear()
        self._wrote.clear()
        self._told.clear()

    def begin_evaluation(self) -> None:
        """Go over to the calls of the round's evaluation, which change no state and have facts of their own.

        They decide nothing, so whoever answers is enough. Those that name no phase are booked under `evaluate`.
        """
        self._default_phase = "evaluate"
        self._faults = Faults()
        limit = self.job.round_deadline_s
        self._deadline = time.monotonic() + limit if limit is not None else None
        self._accepted.clear()
        self._broken.clear()
        self.facts = RoundFacts()

    def send_verdicts(self) -> None:
        """Send what verdicts are still waiting, in frames of their own."""
        for rank in sorted(self._verdicts):
            if rank in self.placement.alive:
                self._post(rank, Frame(Head(FrameType.VERDICT)))
        self._verdicts.clear()

    def digests(self, clients: Collection[int]) -> dict[int, str | None]:
        """SHA-256 of clients' committed states, asked of the hosts that hold them.

        Clients of an absent host are asked of others, where these see their files. None: the state cannot be had, or
        was not told by the round's deadline. A client whose host was lost meanwhile is not in the result.
        """
        self.send_verdicts()
        number, _ = self._key
        found: dict[int, str | None] = {}
        shares: dict[int, list[int]] = {rank: [] for rank in self.placement.alive}
        homes = {c: rank for rank, ids in self.placement.homes().items() for c in ids}
        for client in sorted(clients):
            if homes[client] in shares:
                shares[homes[client]].append(client)
            elif shares and self.placement.shared_files:
                min(shares.values(), key=len).append(client)
            else:
                found[client] = None
        waiting: dict[int, list[int]] = {}
        for rank, ids in shares.items():
            # of the round to come: a host leaves what it still does for an older one
            frame = Frame(Head(FrameType.DIGEST, round=number + 1), note=self._versions_of(ids))
            if ids and self._post(rank, frame):
                waiting[rank] = ids
        limit = self.job.round_deadline_s
        deadline = time.monotonic() + limit if limit is not None else None
        while waiting:
            event = self.link.next_event(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if event is None:
                found.update({c: None for ids in waiting.values() for c in ids})
                break
            if isinstance(event, Received) and event.frame.head.type is FrameType.DIGEST:
                told = event.frame.note.get("digests")
                digests = told if isinstance(told, dict) else {}
                found.update({c: digests.get(str(c)) for c in waiting.pop(event.rank, [])})
                continue
            self.take_aside(event)
            if isinstance(event, Lost):
                waiting.pop(event.rank, None)
        return found

    def _versions_of(self, clients: Sequence[int]) -> dict[str, Any]:
        """The note that tells a host which states count."""
        return {"versions": {str(c): self.versions.get(c, "") for c in clients}}

    def drain(self) -> None:
        """Book what has arrived and nobody waits for."""
        while (event := self.link.next_event(0.0)) is not None:
            if not isinstance(event, Lost):  # the run is over: a host that goes now is no loss
                self.take_aside(event)

    def _post(self, rank: int, frame: Frame) -> bool:
        verdicts = self._verdicts.pop(rank, None)
        if verdicts:
            frame.note["verdicts"] = verdicts
        return self.link.post(rank, frame)

    @property
    def called_s(self) -> float:
        """Seconds of this round's calls so far."""
        return self.facts.calls_s

    # ---- calls
    def call(
        self,
        ids: Sequence[int],
        method: Callable[..., Any] | ClientMethod,
        fold: dict[str, Fold],
        phase: str | None,
        arguments: dict[str, Any],
    ) -> Replies:
        """Call a client method on these clients and wait for their replies."""
        began = time.monotonic()
        try:
            return self._make(ids, method, fold, phase, arguments)
        finally:
            self.facts.calls.append((began, time.monotonic()))

    def _make(
        self,
        ids: Sequence[int],
        method: Callable[..., Any] | ClientMethod,
        fold: dict[str, Fold],
        phase: str | None,
        arguments: dict[str, Any],
    ) -> Replies:
        spec = method if isinstance(method, ClientMethod) else self.job.spec_of(method)
        phase = phase or self._default_phase or spec.phase
        self._call += 1
        self._phases[(*self._key, self._call)] = phase
        while len(self._phases) > _LATE_CALLS:
            del self._phases[next(iter(self._phases))]
        began = time.monotonic()
        check_names(spec, fold, arguments)
        running = Call(self.job, spec, phase, Folds(self.job, spec, fold, arguments), arguments)
        if self.job.share:
            running.common = [n for n, a in arguments.items() if isinstance(a, _LARGE)]
        if self.job.topology == "reduce":
            running.told = reducible(spec, fold, arguments)
            for name, accumulator in running.folds.accumulators.items():
                if isinstance(accumulator, FixedPoint):
                    as_sent = running.folds.kept.get(name)
                    self._sizes[spec.name, name] = as_sent.nbytes if as_sent is not None else accumulator.nbytes
        self._send(running, sorted(ids))
        self.facts.encoded.append((began, time.monotonic()))
        needed = (self._faults if spec.of == "algorithm" else Faults()).needed(len(ids))
        self._wait(running, most_missing=len(ids) - needed if self.job.topology == "star" else len(ids))
        self._gather(running)
        replied = sorted(running.replied)
        if spec.of == "algorithm":
            self.facts.missing.update(running.missing)
            self.facts.replied.update(replied)
        else:  # it changes no state, and whoever answers is enough
            self.facts.unanswered.update(running.missing)
        if len(replied) < needed:
            errors = [r for r in running.missing.values() if r.startswith("error") and UNKEPT not in r]
            if errors and len(errors) == len(ids) and spec.name not in self.worked:
                raise ClientCodeFailed(f"{spec.name} failed on every client it was called on; the first: {errors[0]}")
            raise TooFewReplies(spec.name, running.missing, len(replied), needed)
        self.worked.add(spec.name)
        self._reduce(running)
        began = time.monotonic()
        try:
            values = running.folds.results()
        except NoWeight as error:
            self._broken.update(replied)
            raise TooFewReplies(spec.name, {**running.missing, **dict.fromkeys(replied, str(error))}) from None
        self.facts.encoded.append((began, time.monotonic()))
        self.facts.own.update({c: row for c, row in values.pop(OWN.name, {}).items() if row is not None})
        replies = Replies(values, replied, running.missing, running.seconds)
        self._simulate(running, len(ids), replies.reports, values["epoch_s"] if spec.of == "probe" else {})
        if spec.of != "algorithm" or not self.job.selector.wants_reports:
            return replies
        for client, report in replies.reports.items():
            # a call that did not train tells less
            if not math.isnan(report.loss) or (client not in self.reports and client not in self._told):
                before = self.facts.reports.get(client, _NOTHING)
                seconds, joules = before.seconds + report.seconds, before.joules + report.joules
                self._told[client] = report._replace(seconds=seconds, joules=joules)
                self.facts.reports[client] = self._told[client]
        return replies

    def _simulate(self, running: Call, called: int, reports: Mapping[int, ClientReport], probed: Any) -> None:
        """Count what a call has taken on the clients' devices; scoring takes nothing. probed: by client, of a probe."""
        devices = self.job.devices
        if devices is None or running.phase == "evaluate":
            return
        training_s = {client: reports[client].seconds if client in reports else 0.0 for client in running.replied}
        training_s.update(probed)
        for client, seconds in training_s.items():
            if not 0 <= seconds < math.inf:
                log.warning(
                    "round %d: client %d reports %s s of training; none is counted", self._key[0], client, seconds
                )
                training_s[client] = 0.0
        cost = devices.call(training_s, running.down, running.up, called, self.job.per_round)
        self.facts.simulated = self.facts.simulated.plus(cost)

    def _send(self, running: Call, ids: list[int]) -> None:
        """Give every host its clients of the call, or the first of them."""
        if running.spec.of == "algorithm":
            self.facts.called.update(ids)
        new = self.placement.new(ids)
        placed = self.placement.place(ids) if self.placement.alive else {}
        able = [rank for rank in self.placement.alive if not self._busy(rank)]
        for client, rank in placed.items():
            if rank not in self.placement.alive:
                self._miss(running, client, f"host {rank} is absent")
            elif rank not in able:
                self._miss(running, client, f"host {rank} is still busy with an earlier round")
        running.shares = Shares(
            {c: r for c, r in placed.items() if c not in running.missing},
            new if self.placement.moves and self.job.topology == "star" else (),
            {rank: self._machines.get(rank, str(rank)) for rank in able},
            self.job.task.sizes,
            self._seconds.get(running.spec.name),
        )
        first = running.shares.first()
        if self.job.topology != "star":
            self._give_all(running, first)
        else:
            for rank, clients in first.items():
                self._give(running, rank, clients)
        for client in set(ids) - set(placed):
            self._miss(running, client, "no host is left")

    def _give(self, running: Call, rank: int, clients: list[int]) -> None:
        """Send a host these clients' messages of the call. What they share with earlier ones travels no second time."""
        held_for = running.first.get(rank)  # the client whose message brought this host what is common
        frame, given = self._frame(running, rank, clients, held=held_for is not None)
        if running.common and held_for is None and running.shares.waiting:
            frame.note["keep"] = True
        self.placement.move(clients, rank)
        ready = time.monotonic_ns()
        posted = self._post(rank, frame)
        self._sent(running, rank, frame, ready, given, posted, held_for if running.common else None)

    def _give_all(self, running: Call, placed: Mapping[int, list[int]]) -> None:
        """Send every host its clients' messages; what they share is broadcast to all hosts, the idle ones too.

        Of `Once` arguments what more than one of the called hosts does not hold yet.
        """
        clients = {rank: placed.get(rank, []) for rank in self.placement.alive}
        for name, argument in running.once.items():
            without = [r for r in placed if not self.once.holds(r, running.spec.name, name, argument)]
            if isinstance(argument.value, _LARGE) and len(without) > 1:
                running.common.append(name)
        frames, given = {}, {}
        for rank, ids in clients.items():
            frames[rank], given[rank] = self._frame(running, rank, ids, broadcast=True)
            if running.told:
                frames[rank].note["fold"] = running.told
            verdicts = self._verdicts.pop(rank, None)
            if verdicts:
                frames[rank].note["verdicts"] = verdicts
        ready = time.monotonic_ns()
        gone = self._ranks_link.broadcast(frames)
        carrier: int | None = None
        for rank, frame in frames.items():
            if clients[rank]:
                self._sent(running, rank, frame, ready, given[rank], rank not in gone, carrier)
                carrier = clients[rank][0] if carrier is None else carrier
            else:
                self.ledger.add_transport(0, frame.head_bytes)

    def _frame(self, running: Call, rank: int, clients: list[int], **how: bool) -> tuple[Frame, dict[int, Kinds]]:
        number, attempt = self._key
        method = running.spec.number
        head = Head(FrameType.CALL, round=number, attempt=attempt, call=self._call, stage=self._stage, method=method)
        frame, given = running.frame(head, self.once, rank, clients, **how)
        if self.job.algorithm.stateful:
            frame.note.update(self._versions_of(clients))
        return frame, given

    def _sent(
        self,
        running: Call,
        rank: int,
        frame: Frame,
        ready_ns: int,
        given: dict[int, Kinds],
        posted: bool,
        carrier: int | None,
    ) -> None:
        """Book a frame of the call, and expect its clients' replies."""
        clients = [message.client for message in frame.messages]
        if not posted:
            running.gone.add(rank)
            for client in clients:
                self._miss(running, client, f"host {rank} is lost")
            return
        booked = self.ledger.book(
            frame,
            running.spec.call,
            direction="down",
            phase=running.phase,
            rank=rank,
            times=[(None, ready_ns, 0, 0)] * len(clients),
            once=given,
            carrier=carrier,
        )
        running.first.setdefault(rank, clients[0])
        self.once.sent(rank, running.spec.name, running.once, booked)
        self._posted[frame.head.seq] = booked
        running.down.update({b.client: b.logical_bytes for b in booked})
        running.outstanding.update(dict.fromkeys(clients, rank))
        running.posted.update(dict.fromkeys(clients, ready_ns))

    def behind(self) -> bool:
        """Whether a host has not taken all that was sent to it."""
        return any(booked[0].rank in self.placement.alive for booked in self._posted.values() if booked)

    def _busy(self, rank: int) -> bool:
        """Whether a host has not even taken a call of an earlier round: nothing more is heaped on it."""
        posted = (booked[0] for booked in self._posted.values() if booked)
        return any(b.rank == rank and (b.round, b.attempt) < self._key for b in posted)

    def _wait(self, running: Call, most_missing: int) -> None:
        """Take replies until all are in, or the deadline has passed, or so many are missing that the rest is no use."""
        while running.open or running.gone & set(self.placement.alive):
            timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            event = self.link.next_event(timeout if running.open else _LOST_S)
            if event is None:
                for client in running.open:
                    self._miss(running, client, "deadline")
                break
            if isinstance(event, Received) and self._current(event.frame.head):
                if event.frame.head.method != running.spec.number:
                    self.link.abort(event.rank, "it answered a call with another method's reply")
                    event.release()
                    continue
                if event.frame.world:
                    running.held.append(event)
                    for message in event.frame.messages:
                        if running.outstanding.get(message.client) == event.rank:
                            running.arrived[message.client] = running.outstanding.pop(message.client)
                else:
                    self._take(running, event)
            else:
                self.take_aside(event)
                if isinstance(event, Lost):
                    reason = self._reasons.get(event.rank, event.reason)
                    for client in [c for c, r in running.outstanding.items() if r == event.rank]:
                        self._miss(running, client, f"host {event.rank} lost: {reason}")
                    for client in running.shares.lose(event.rank):
                        self._miss(running, client, f"host {event.rank} lost: {reason}")
            if len(running.missing) > most_missing:
                for client in running.open:
                    self._miss(running, client, NOT_WAITED_FOR)
                break

    def _gather(self, running: Call) -> None:
        """Under `collective`: have the replies' parts, now that every host has said which there are, and take them."""
        if not running.held:
            return
        frames: dict[int, list[Frame]] = {rank: [] for rank in self.placement.alive}
        for event in running.held:
            frames[event.rank].append(event.frame)
        self._ranks_link.gather(frames)
        self._combined()
        now = time.monotonic_ns()
        running.outstanding.update(running.arrived)
        for event in running.held:
            self._take(running, dataclasses.replace(event, done_ns=now))

    def _reduce(self, running: Call) -> None:
        """Under `reduce`: have what the hosts have folded added up, now that all have."""
        folds = running.folds.fixed()
        if not running.told or not folds:
            return
        blocks = [(block.tensor, block.how) for accumulator in folds for block in accumulator.blocks()]
        self._ranks_link.reduce(blocks)
        self._combined()
        size = sum(size_of(tensor) for tensor, _ in blocks)
        carriers: dict[int, Booked] = {}
        for booked in running.folded:
            if booked.rank in carriers:
                booked.shared_with = carriers[booked.rank].client
            else:
                carriers[booked.rank] = booked
                booked.wire_bytes += size
        self.ledger.add_transport(size * (len(self.placement.alive) - len(carriers)), 0)

    @property
    def _ranks_link(self) -> RanksLink:
        assert isinstance(self.link, RanksLink)  # in one process every topology is a star
        return self.link

    def _combined(self) -> None:
        """Wait until an exchange between all ranks has ended."""
        while not isinstance(event := self.link.next_event(None), Combined):
            assert event is not None
            self.take_aside(event)

    def _current(self, head: Head) -> bool:
        return head.type is FrameType.REPLY and (head.round, head.attempt, head.call) == (*self._key, self._call)

    def _miss(self, running: Call, client: int, reason: str) -> None:
        running.outstanding.pop(client, None)
        running.missing[client] = reason
        if running.spec.of == "algorithm":
            self._broken.add(client)

    def take_aside(self, event: Event) -> None:
        """Take an event that no call waits for: an acknowledgement, a lost or joined host, a late reply."""
        if isinstance(event, Sent):
            posted = self._posted.get(event.seq)
            if not posted or posted[0].rank != event.rank or not event.sent_ns:
                return
            for booked in self._posted.pop(event.seq):
                booked.sent_ns = event.sent_ns
                booked.settle("delivered", event.done_ns)
            wire_s = (event.done_ns - event.sent_ns) / 1e9
            self.facts.wire_s[event.rank] = self.facts.wire_s.get(event.rank, 0.0) + wire_s
        elif isinstance(event, Lost):
            for seq in [s for s, posted in self._posted.items() if posted[0].rank == event.rank]:
                for booked in self._posted.pop(seq):
                    booked.settle("lost")
            self._verdicts.pop(event.rank, None)
            self.once.left(event.rank)
            self.clocks.pop(event.rank, None)
            fresh = [c for c, calls in self._accepted.items() if calls]
            self._reasons[event.rank] = self._hosts.lost(event.rank, event.reason, fresh)
        elif isinstance(event, Joined):
            if event.rank:
                self.clocks[event.rank] = Clock(event.offset_ns, at=time.monotonic_ns())
            self._machines[event.rank] = str(event.info.get("hostname"))
            self._hosts.joined(event)
        elif isinstance(event, Received):
            method = self.job.method(event.frame.head.method)
            if event.frame.head.type is FrameType.REPLY and method is not None:
                head = event.frame.head
                phase = self._phases.get((head.round, head.attempt, head.call), method.phase)
                for booked in self._book_up(event, method, phase):
                    booked.settle("late", event.done_ns)
            event.release()

    def _book_up(self, event: Received, spec: ClientMethod, phase: str) -> list[Booked]:
        head = event.frame.head
        offset = 0
        if event.rank:  # rank 0 is this process
            clock = self.clocks.setdefault(event.rank, Clock(event.done_ns - head.sent_ns))
            clock.received(head.sent_ns, event.done_ns)
            offset = clock.offset_ns
        times = [
            (m.started_ns + offset, m.ready_ns + offset, head.sent_ns + offset, event.done_ns)
            for m in event.frame.messages
        ]
        folded = {m.client: self._folded_kinds(m, spec) for m in event.frame.messages if self.job.topology == "reduce"}
        return self.ledger.book(
            event.frame, spec.reply, direction="up", phase=phase, rank=event.rank, times=times, once=folded
        )

    def _folded_kinds(self, message: Message, spec: ClientMethod) -> Kinds:
        """What a client would have sent, had its host not folded it with others'."""
        kinds: Kinds = {}
        for field_, value in zip(spec.reply.fields, message.fields, strict=False):
            if value.form is Form.FOLDED:
                size, before = self._sizes.get((spec.name, field_.name), 0), kinds.get(field_.kind, (0, 0))
                kinds[field_.kind] = (before[0] + size, before[1] + size)
        return kinds

    def _take(self, running: Call, event: Received) -> None:
        began = time.monotonic()
        frame, rank = event.frame, event.rank
        for message in frame.messages:
            if rank and running.outstanding.get(message.client) == rank:
                clock = self.clocks.setdefault(rank, Clock(event.done_ns - frame.head.sent_ns))
                clock.posted(running.posted[message.client], message.received_ns, event.done_ns)
        entries = self._book_up(event, running.spec, running.phase)
        told = frame.note.get("wrote")
        wrote = {c for c in told if isinstance(c, int)} if isinstance(told, list) else set()
        wire_s = (event.done_ns - entries[0].sent_ns) / 1e9 if entries else 0.0
        self.facts.wire_s[rank] = self.facts.wire_s.get(rank, 0.0) + wire_s
        for message, booked in zip(frame.messages, entries, strict=True):
            client = message.client
            if running.outstanding.get(client) != rank:
                log.warning("round %d: host %d sent a reply of client %d unasked; refused", self._key[0], rank, client)
                booked.settle("refused", event.done_ns)
                continue
            seconds = (message.ready_ns - message.started_ns) / 1e9
            self.facts.compute_s[rank] = self.facts.compute_s.get(rank, 0.0) + seconds
            self._seconds[running.spec.name] = seconds
            if message.status is Status.REFUSED:
                booked.settle("refused", event.done_ns)
                self._miss(running, client, message.error)
                continue
            if message.status is Status.ERROR:
                booked.settle("delivered", event.done_ns)
                self._miss(running, client, f"error: {running.spec.name} on host {rank}: {message.error}")
                continue
            refusal = running.folds.add(client, values_of(frame, message, self.job.layout(client)))
            if refusal is not None:
                booked.settle("refused", event.done_ns)
                self._miss(running, client, refusal)
                continue
            booked.settle("delivered", event.done_ns)
            running.folded.append(booked)
            running.up[client] = booked.logical_bytes
            running.outstanding.pop(client)
            running.replied.add(client)
            running.seconds[client] = seconds
            if client not in self._broken and running.spec.of == "algorithm":
                self._accepted[client] = self._accepted.get(client, 0) + 1
                if client in wrote:
                    self._wrote[client] = version_of(frame.head)
        frame.drop()  # before the next bodies are received: one window a host
        event.release()
        has = sum(r == rank for r in running.outstanding.values())
        if more := running.shares.next(rank, has):
            self._give(running, rank, more)
        self.facts.encoded.append((began, time.monotonic()))
