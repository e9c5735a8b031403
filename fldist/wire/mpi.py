"""MPI: heads, bodies and heartbeats over MPI itself; one I/O thread per process makes all MPI calls.

The thread spins for 50 us and then naps, so that waiting does not burn a core: for a twentieth of the time for which
nothing has happened, at most 0.5 ms, and for 0.05 ms while a body is on its way, since nothing moves but when MPI is
called. A head's size
is probed before it is received, a body's size is known from the checked head. Every peer has a channel of its own
(a communicator and a rank in it), and whatever goes wrong on a channel costs that peer alone.

Without ULFM the death of any rank ends the whole job: that is MPI's own doing. With it (`mpirun --with-ft ulfm`) a
probe of a dead peer's channel raises within milliseconds, and the server can spawn a replacement, whose channel is
the intercommunicator that comes of it.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fldist import blocks
from fldist.wire.codec import (
    CHECKSUMMED,
    MAX_HEAD_BYTES,
    Expected,
    Frame,
    FrameType,
    Head,
    decode,
    encode,
)
from fldist.wire.errors import BadMessage, DeadlineExceeded, PeerLost
from fldist.wire.link import (
    COUNTED_BY_MESSAGE,
    HOST_QUEUE,
    PATIENCE,
    Combined,
    HostLink,
    How,
    Joined,
    Limits,
    Lost,
    Received,
    Sent,
    ServerLink,
    Welcome,
    check_session,
    own_info,
)
from fldist.wire.ulfm import ulfm
from fldist.wire.world import ALIGNMENT, kept, packed, room, unpacked

log = logging.getLogger("fldist.mpi")

SPAWNED = ("-m", "fldist", "_spawned")
"""What Python runs in a replacement; its arguments are the rank and the limit on joining, in seconds."""
_HEAD_TAG = 1
_BODY_TAG = 2
_SPIN_S = 50e-6
_NAP_S = 0.5e-3
_SHORT_NAP_S = 0.05e-3
_LARGE_BYTES = 1 << 20
"""Bodies from this size on are received by threads of their own, where there are several peers."""
_MOST_RECEIVERS = 8
_POSTING_S = 1.0
"""How long a lost peer's receive may take to be posted; it copies at most one frame's bodies."""
_NOBODY = (bytes(16), 0, 0)


class Dismissed(PeerLost):
    """The run ended before this host had joined it."""


def _channel(comm: Any) -> Any:
    """The communicator to use for `comm`: a copy, or an intercommunicator itself, which nobody else uses."""
    from mpi4py import MPI

    for each in (MPI.COMM_WORLD, MPI.COMM_SELF, comm):
        each.Set_errhandler(MPI.ERRORS_RETURN)
    if comm.Is_inter():
        return comm
    own = comm.Dup()
    own.Set_errhandler(MPI.ERRORS_RETURN)
    return own


@dataclass(eq=False)
class Peer:
    """One incarnation of another rank, as the I/O thread knows it."""

    rank: int
    comm: Any
    at: int
    """Its rank in `comm`."""
    last_heard: float
    silence_s: float  # the joining limit at first, the limit on silence once the peer is ready
    identity: tuple[bytes, int, int] = _NOBODY
    head: tuple[bytearray, Any] | None = None  # a head on its way, and its request
    waiting: deque[Frame] = field(default_factory=deque)  # heads whose bodies are still to come, in order
    receiving: list[Any] | None = None
    posting: Future[None] | None = None  # while another thread makes the requests in `receiving`
    window: int = 1
    lost: str | None = None  # why
    sent_ns: dict[int, int] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)  # what it said of itself when it joined
    dead: bool = False  # its process is known to have ended
    dismissed: bool = False  # has been sent a goodbye
    left: bool = False  # has said goodbye


@dataclass
class _Together:
    """An operation of all ranks: what starts it, what it gives when it has ended, and its requests meanwhile."""

    start: Callable[[list[Any]], None]
    done: Callable[[], None]
    requests: list[Any] = field(default_factory=list)


@dataclass
class _Sending:
    """What must stay alive until it is sent."""

    peer: Peer
    data: Any
    requests: list[Any]
    counts: bool  # in `_unsent`


class Engine:
    """The I/O thread of one process. channels: by rank a peer's communicator and its rank in that."""

    def __init__(
        self,
        channels: dict[int, tuple[Any, int]],
        limits: Limits,
        *,
        world: Any,
        deliver: Callable[[Peer, Frame], None],
        acknowledged: Callable[[Peer, Head, int], None],
        lost: Callable[[Peer, str], None],
        saw: Callable[[Head], None] = lambda head: None,
    ) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError("this MPI gives no MPI_THREAD_MULTIPLE, which fldist needs (see `fldist doctor`)")
        self._mpi = MPI
        self._status = MPI.Status()
        self._join_s = max(limits.silence_s, limits.join_s)
        self.peers = {rank: self._new(rank, *channel) for rank, channel in channels.items()}
        self.beat_s = limits.silence_s / 5
        self.expected: Expected | None = None
        self.expects_world = False
        """Whether a frame's parts for all ranks are broadcast to this one."""
        self.empty: Callable[..., Tensor] = blocks.empty
        self.transport_in = 0
        self.transport_out = 0
        self._deliver = deliver
        self._acknowledged = acknowledged
        self._lost = lost
        self._saw = saw
        self._out: queue.SimpleQueue[tuple[Peer, Frame, bytes]] = queue.SimpleQueue()
        self._replaced: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self.world = world
        """The communicator of all ranks, for operations of all of them; None in a process that was spawned."""
        self._together: queue.SimpleQueue[_Together] = queue.SimpleQueue()
        self._under_way: _Together | None = None
        self._unit: Any = None
        # Over shared memory it is the call that posts a receive which copies the body, if its sender was first. So a
        # process that receives from several peers has this done by several threads.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        several = min(cores, len(channels), _MOST_RECEIVERS)
        self._receivers = ThreadPoolExecutor(several, "fldist-mpi-receive") if several > 1 else None
        self._sending: list[_Sending] = []
        # Requests to lost peers, each with its buffers. MPI cannot take back a transfer that has begun, and may
        # write into (or read from) its memory for as long as the request is not complete, so both are kept: for
        # ever, if need be. The transfers of a process that is dead complete with an error in most cases.
        self._stuck: list[tuple[Any, list[Any]]] = []
        self._unsent = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._heartbeat = encode(Frame(Head(FrameType.HEARTBEAT)))
        self._thread = threading.Thread(target=self._run, name="fldist-mpi", daemon=True)
        self._thread.start()

    def _new(self, rank: int, comm: Any, at: int) -> Peer:
        return Peer(rank, comm, at, time.monotonic(), self._join_s)

    # ---- for other threads
    def post(self, peer: Peer, frame: Frame, encoded: bytes) -> None:
        """Queue an encoded frame; never blocks."""
        with self._changed:
            self._unsent += 1
            if frame.head.type not in COUNTED_BY_MESSAGE and not peer.lost:
                # here, so that the server's last verdicts are in its result, whenever they are sent
                self.transport_out += len(encoded)
            self._out.put((peer, frame, encoded))
            self._changed.notify_all()

    def together(self, start: Callable[[list[Any]], None], done: Callable[[], None]) -> None:
        """Have an operation of all ranks done, after those asked for before; the I/O thread starts it."""
        with self._changed:
            self._together.put(_Together(start, done))
            self._changed.notify_all()

    def release(self, peer: Peer) -> None:
        """Let the next bodies of a peer be received."""
        with self._changed:
            peer.window += 1
            self._changed.notify_all()

    def adopt(self, rank: int, comm: Any, at: int) -> None:
        """Put a new incarnation of a lost peer in its place."""
        old, self.peers[rank] = self.peers[rank], self._new(rank, comm, at)
        self._replaced.put(old)

    def wait_unsent(self, most: int, timeout_s: float | None) -> bool:
        """Wait until at most `most` frames are unsent."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._unsent <= most or all(p.lost for p in self.peers.values()), timeout_s
            )

    def lose(self, peer: Peer, reason: str) -> None:
        """Have nothing to do with a peer any more."""
        with self._changed:
            if peer.lost is not None:
                return
            peer.lost = reason
            self._changed.notify_all()
        self._lost(peer, reason)

    def stop(self) -> None:
        """End the thread; MPI must not be finalized before."""
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        self._thread.join(5.0)
        if self._receivers is not None:
            self._receivers.shutdown(wait=not any(p.posting is not None for p in self.peers.values()))

    # ---- the I/O thread
    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            log.exception("the MPI thread failed")
            for peer in self.peers.values():
                self.lose(peer, f"MPI: {error}")

    def _loop(self) -> None:
        next_beat = time.monotonic() + self.beat_s
        last_turn = idle_since = time.monotonic()
        while not self._stopping:
            while not self._replaced.empty():
                self._put_aside(self._replaced.get())
            busy = self._start_sends()
            for peer in self.peers.values():
                busy |= self._receive(peer)
            busy |= self._finish_sends() | self._go_on_together()
            now = time.monotonic()
            if now - last_turn > self.beat_s * 2.5:
                for peer in self.peers.values():  # this process itself stood still
                    peer.last_heard = now
            last_turn = now
            if now >= next_beat:
                next_beat = now + self.beat_s
                self._beat(now)
            if busy:
                idle_since = now
            elif now - idle_since > _SPIN_S:
                with self._changed:
                    if self._out.empty() and self._together.empty() and not self._stopping:
                        longest = _SHORT_NAP_S if self._moving else _NAP_S
                        self._changed.wait(min(longest, max(_SHORT_NAP_S, (now - idle_since) / 20)))

    @property
    def _moving(self) -> bool:
        """Whether a body is on its way."""
        return (
            self._under_way is not None
            or any(peer.receiving is not None for peer in self.peers.values())
            or any(len(entry.requests) > 1 for entry in self._sending)
        )

    def _fail(self, peer: Peer, error: Exception) -> None:
        """An error on a peer's channel, or in what came over it, costs that peer and nobody else."""
        reason = str(error) or repr(error)
        if isinstance(error, self._mpi.Exception):
            reason = f"MPI: {reason}"
            if error.Get_error_class() == getattr(self._mpi, "ERR_PROC_FAILED", None):
                peer.dead = True
                reason = "its process died"
        self.lose(peer, reason)

    def _beat(self, now: float) -> None:
        self._stuck = [(data, left) for data, requests in self._stuck if (left := self._incomplete(requests))]
        for peer in self.peers.values():
            if peer.lost:
                continue
            if now - peer.last_heard > peer.silence_s:
                self.lose(peer, f"silent for {peer.silence_s:g} s")
                continue
            self._isend(peer, self._heartbeat)

    def _incomplete(self, requests: list[Any]) -> list[Any]:
        rest = []
        for request in requests:
            try:
                done = request.Test()
            except self._mpi.Exception:
                done = request == self._mpi.REQUEST_NULL
            if not done:
                rest.append(request)
        return rest

    def _isend(self, peer: Peer, data: bytes) -> None:
        self._sending.append(_Sending(peer, data, requests := [], False))
        try:
            requests.append(peer.comm.Isend([data, self._mpi.BYTE], peer.at, _HEAD_TAG))
            with self._changed:
                self.transport_out += len(data)
        except Exception as error:
            self._fail(peer, error)

    def _start_sends(self) -> bool:
        started = False
        while not self._out.empty():
            peer, frame, encoded = self._out.get()
            self._sending.append(_Sending(peer, (frame, encoded), requests := [], True))
            started = True
            if peer.lost:
                continue
            if frame.head.type is FrameType.CALL:
                peer.sent_ns[frame.head.seq] = time.monotonic_ns()
            try:
                requests.append(peer.comm.Isend([encoded, self._mpi.BYTE], peer.at, _HEAD_TAG))
                for part in frame.bodies:
                    requests.append(peer.comm.Isend([part.flat().numpy(), self._mpi.BYTE], peer.at, _BODY_TAG))
            except Exception as error:
                self._fail(peer, error)
        return started

    def _finish_sends(self) -> bool:
        rest = []
        done = 0
        for entry in self._sending:
            if not entry.peer.lost:
                try:
                    if not all(r.Test() for r in entry.requests):
                        rest.append(entry)
                        continue
                except Exception as error:
                    self._fail(entry.peer, error)
            if entry.peer.lost and entry.requests:
                self._stuck.append((entry.data, entry.requests))
            done += entry.counts
        finished = len(rest) < len(self._sending)
        self._sending = rest
        if done:
            with self._changed:
                self._unsent -= done
                self._changed.notify_all()
        return finished

    def _go_on_together(self) -> bool:
        """Start or test an operation of all ranks; one that fails costs every peer."""
        try:
            if self._under_way is None:
                if self._together.empty():
                    return False
                self._under_way = self._together.get()
                self._under_way.start(self._under_way.requests)
            if not all(r.Test() for r in self._under_way.requests):
                return False
            done, self._under_way = self._under_way.done, None
            done()
        except Exception as error:
            if self._under_way is not None:  # MPI may still touch what the requests are about
                self._stuck.append((self._under_way, self._under_way.requests))
            self._under_way = None
            for peer in self.peers.values():
                self.lose(peer, f"the exchange between all ranks failed: {error}")
        return True

    def broadcasts(self, frame: Frame, requests: list[Any]) -> None:
        """Start the broadcast of a frame's parts for all ranks, from rank 0; requests: gets what was started."""
        if self.world is None:
            raise BadMessage("a part for all ranks, and this process is none of those that began")
        for part in frame.world:
            requests.append(self.world.Ibcast([part.flat().numpy(), self._mpi.BYTE], 0))

    def gathers(self, mine: Tensor, theirs: Tensor | None, counts: Sequence[int], requests: list[Any]) -> None:
        """Start to gather all ranks' bytes, `counts` of each, in the root's `theirs`; multiples of 64 bytes all."""
        if self._unit is None:  # a displacement is an int: in bytes, 2 GiB of replies would be too many
            self._unit = self._mpi.BYTE.Create_contiguous(ALIGNMENT).Commit()
        result = None if theirs is None else [theirs.numpy(), [n // ALIGNMENT for n in counts], self._unit]
        own = [mine.numpy(), mine.numel() // ALIGNMENT, self._unit]
        requests.append(self.world.Igatherv(own, result, 0))

    def reductions(self, blocks: Sequence[tuple[Tensor, How]], root: bool, requests: list[Any]) -> None:
        """Start to combine all ranks' int64 blocks in those of rank 0."""
        if self.world is None:
            raise BadMessage("a reduction of all ranks, and this process is none of those that began")
        for block, how in blocks:
            if block.numel():
                buffer = [block.numpy(), self._mpi.INT64_T]
                mine, result = (self._mpi.IN_PLACE, buffer) if root else (buffer, None)
                requests.append(self.world.Ireduce(mine, result, {"sum": self._mpi.SUM, "max": self._mpi.MAX}[how], 0))

    def _receive(self, peer: Peer) -> bool:
        if peer.lost:
            self._put_aside(peer)
            return False
        try:
            return self._receive_heads(peer) | self._receive_bodies(peer)
        except Exception as error:
            self._fail(peer, error)
            return True

    def _put_aside(self, peer: Peer) -> None:
        """Have done with what a lost peer was sending."""
        if peer.head is not None:
            self._stuck.append((peer.head[0], [peer.head[1]]))
            peer.head = None
        if peer.posting is not None:
            wait([peer.posting], _POSTING_S)
            peer.posting = None
        if peer.receiving is not None:
            self._stuck.append((peer.waiting[0], peer.receiving))
            peer.receiving = None
        peer.waiting.clear()
        peer.sent_ns.clear()

    def _receive_heads(self, peer: Peer) -> bool:
        # A probe of a dead process raises, whatever else is under way to or from it; the test of a transfer that
        # had begun may not. So every turn has a probe.
        found = False
        while True:
            if peer.head is None:
                message = peer.comm.Improbe(peer.at, _HEAD_TAG, self._status)
                if message is None:
                    return found
                buffer = bytearray(min(self._status.Get_count(self._mpi.BYTE), MAX_HEAD_BYTES))
                peer.head = (buffer, message.Irecv([buffer, self._mpi.BYTE]))  # a longer one is an error, truncated
            buffer, request = peer.head
            if not request.Test():
                peer.comm.Iprobe(peer.at, _HEAD_TAG)
                return found
            peer.head = None
            found = True
            peer.last_heard = time.monotonic()
            self._take(peer, bytes(buffer))

    def _take(self, peer: Peer, data: bytes) -> None:
        frame = decode(data, self.expected)
        kind = frame.head.type
        if kind not in COUNTED_BY_MESSAGE:
            self.transport_in += len(data)
        if kind is FrameType.HEARTBEAT:
            return
        if kind not in (FrameType.JOIN, FrameType.WELCOME):
            check_session(frame.head, *peer.identity)
        if kind is FrameType.ACK:
            self._acknowledged(peer, frame.head, peer.sent_ns.pop(frame.head.seq, 0))
            return
        self._saw(frame.head)
        peer.waiting.append(frame)

    def _post_receives(self, peer: Peer, frame: Frame, requests: list[Any]) -> None:
        for part in frame.bodies:
            requests.append(peer.comm.Irecv([part.flat().numpy(), self._mpi.BYTE], peer.at, _BODY_TAG))

    def _receive_bodies(self, peer: Peer) -> bool:
        moved = False
        while peer.waiting and not peer.lost:
            frame = peer.waiting[0]
            from_all = self.expects_world and bool(frame.world)
            if (frame.bodies or from_all) and peer.receiving is None:
                if peer.window < 1:
                    break
                with self._changed:
                    peer.window -= 1
                frame.allocate(self.empty)
                peer.receiving = []
                if from_all:
                    frame.allocate_world(self.empty)
                    self.broadcasts(frame, peer.receiving)
                if self._receivers is not None and frame.body_bytes >= _LARGE_BYTES:
                    peer.posting = self._receivers.submit(self._post_receives, peer, frame, peer.receiving)
                else:
                    self._post_receives(peer, frame, peer.receiving)
            if peer.posting is not None:
                if not peer.posting.done():
                    break
                posting, peer.posting = peer.posting, None
                posting.result()
            if peer.receiving is not None:
                if not all(r.Test() for r in peer.receiving):
                    break
                peer.receiving = None
                peer.last_heard = time.monotonic()
            peer.waiting.popleft()
            moved = True
            if frame.head.type is FrameType.CALL:
                self._isend(peer, encode(Frame(Head(FrameType.ACK, *peer.identity, seq=frame.head.seq))))
            self._deliver(peer, frame)
        return moved


class MpiServer(ServerLink):
    """The server's end: rank 0 of the communicator."""

    def __init__(self, comm: Any, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self.fault_tolerant = ulfm()
        """Whether a host may die, and `respawn` may be called."""
        self._welcome: Welcome | None = None
        self._closing = False
        self._joining = threading.Lock()
        self._joined: list[Peer] = []  # hosts that wait for a welcome
        self._spawning: set[int] = set()  # ranks whose replacement is awaited
        channel, everybody = _channel(comm), _channel(comm)
        ranks = range(1, comm.Get_size())
        self._incarnations = dict.fromkeys(ranks, 1)
        self._padding = 0
        self._engine = Engine(
            {rank: (channel, rank) for rank in ranks},
            limits,
            world=everybody,
            deliver=self._delivered,
            acknowledged=self._acknowledged,
            lost=self._peer_lost,
        )

    @property
    def survives(self) -> str:
        """One line: what this backend and launcher can survive."""
        if self.fault_tolerant:
            return "MPI with ULFM: a host may die, and the server can start a replacement"
        return "MPI without fault tolerance: mpirun ends the whole job when a rank dies"

    def admit(self, welcome: Welcome) -> None:
        """Answer the hosts that have joined and that will."""
        self._engine.expected = self.expected
        with self._joining:
            self._welcome = welcome
            self._greet()

    def _greet(self) -> None:
        assert self._welcome is not None
        for peer in self._joined:
            incarnation = self._incarnations[peer.rank]
            peer.identity = (self._welcome.run_id, self._welcome.epoch, incarnation)
            self.connected.add(peer.rank)
            note = self._welcome.note(incarnation, self.limits)
            self._say(peer, Frame(Head(FrameType.WELCOME, *peer.identity), note=note))
        self._joined.clear()

    def _say(self, peer: Peer, frame: Frame) -> None:
        self._engine.post(peer, frame, encode(frame))

    # ---- in the I/O thread
    def _delivered(self, peer: Peer, frame: Frame) -> None:
        now = time.monotonic_ns()
        kind = frame.head.type
        if kind is FrameType.JOIN:
            peer.note = frame.note
            with self._joining:
                self._joined.append(peer)
                if self._welcome is not None and not self._closing:
                    self._greet()
        elif kind is FrameType.BYE:
            peer.left = True
        elif kind is FrameType.READY:
            peer.silence_s = self.limits.silence_s
            offset = now - int(frame.note["clock_ns"])
            self.events.put(Joined(peer.rank, peer.identity[2], frame.note, offset))
        else:
            release = (lambda: self._engine.release(peer)) if frame.bodies else _nothing
            self.events.put(Received(peer.rank, frame, now, release))

    def _acknowledged(self, peer: Peer, head: Head, sent_ns: int) -> None:
        self.events.put(Sent(peer.rank, head.seq, sent_ns, time.monotonic_ns()))

    def _peer_lost(self, peer: Peer, reason: str) -> None:
        self.connected.discard(peer.rank)
        if not self._closing:
            self.events.put(Lost(peer.rank, reason))

    # ---- the round loop's side
    def post(self, rank: int, frame: Frame) -> bool:
        """Encode and queue a frame."""
        self.number(frame)
        peer = self._engine.peers[rank]
        if peer.lost:
            return False
        head = frame.head
        head.run_id, head.epoch, head.incarnation = peer.identity
        self._say(peer, frame)
        return True

    # ---- all ranks at once
    def open_world(self) -> None:
        """Nothing to do: the communicator was made when all ranks began."""

    def broadcast(self, frames: Mapping[int, Frame]) -> list[int]:
        """Post all frames; their parts for all ranks are broadcast once."""
        gone = [rank for rank, frame in frames.items() if not self.post(rank, frame)]
        frame = next(iter(frames.values()))
        self._engine.together(functools.partial(self._engine.broadcasts, frame), _nothing)
        return gone

    def gather(self, frames: Mapping[int, Sequence[Frame]]) -> None:
        """Ask all hosts for their replies' parts, and fill these in."""
        parts = {rank: [p for frame in theirs for p in frame.world] for rank, theirs in frames.items()}
        sizes = {rank: [p.bytes for p in theirs] for rank, theirs in parts.items()}
        ranks = sorted(self._engine.peers)
        counts = [0, *(room(sizes.get(rank, [])) for rank in ranks)]
        buffer = blocks.empty(sum(counts), torch.uint8)
        self._padding += buffer.numel() - sum(map(sum, sizes.values()))
        for rank in ranks:
            self.post(rank, Frame(Head(FrameType.GATHER), note={"bytes": counts[rank]}))

        def done() -> None:
            for rank, raw in zip([0, *ranks], buffer.split(counts), strict=True):  # type: ignore[no-untyped-call]
                for part, own in zip(parts.get(rank, []), unpacked(raw, sizes.get(rank, [])), strict=True):
                    part.tensor = kept(own, raw).view(part.dtype).view(part.shape)
            self.events.put(Combined())

        nothing = torch.empty(0, dtype=torch.uint8)
        self._engine.together(functools.partial(self._engine.gathers, nothing, buffer, counts), done)

    def reduce(self, blocks: Sequence[tuple[Tensor, How]]) -> None:
        """Ask all hosts for their blocks, and add them up."""
        told = [[block.numel(), how] for block, how in blocks]
        for rank in self._engine.peers:
            self.post(rank, Frame(Head(FrameType.REDUCE), note={"blocks": told}))
        start = functools.partial(self._engine.reductions, blocks, True)
        self._engine.together(start, lambda: self.events.put(Combined()))

    def abort(self, rank: int, reason: str) -> None:
        """Have nothing to do with a host any more."""
        self._engine.lose(self._engine.peers[rank], reason)

    def transport_bytes(self) -> tuple[int, int]:
        """Heartbeats, joins, acknowledgements."""
        return self._engine.transport_in + self._padding, self._engine.transport_out

    def respawn(self, rank: int) -> None:
        """Start a process in place of a lost host: `Joined` with the next incarnation follows, or `Lost` again.

        Never blocks. Needs `fault_tolerant`. Nothing happens while the host is there or its replacement on its way.
        """
        if not self.fault_tolerant:
            raise RuntimeError(self.survives)
        peer = self._engine.peers[rank]
        with self._joining:
            if peer.lost is None or rank in self._spawning or self._closing:
                return
            _kill(peer)  # one that only fell silent would still be there at the end
            self._spawning.add(rank)
        threading.Thread(target=self._replace, args=(rank,), name=f"fldist-respawn-{rank}", daemon=True).start()

    def _replace(self, rank: int) -> None:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # MPI_Comm_spawn has no limit on time, and never returns when the program ends before its MPI_Init
        threading.Thread(target=self._spawn, args=(rank, answer), name=f"fldist-spawn-{rank}", daemon=True).start()
        try:
            channel = answer.get(timeout=self.limits.join_s)
        except queue.Empty:
            channel = f"its replacement did not start within {self.limits.join_s:g} s"
        with self._joining:
            self._spawning.discard(rank)
            if not isinstance(channel, str):
                self._incarnations[rank] += 1
                self._engine.adopt(rank, channel, 0)
        if isinstance(channel, str):
            log.warning("host %d: %s", rank, channel)
            if not self._closing:
                self.events.put(Lost(rank, channel))

    def _spawn(self, rank: int, answer: queue.SimpleQueue[Any]) -> None:
        from mpi4py import MPI

        try:
            # a communicator of its own: two spawns over one at the same time are not allowed
            alone = MPI.COMM_SELF.Dup()
            alone.Set_errhandler(MPI.ERRORS_RETURN)
            # the dead rank's slot stays taken, so without OVERSUBSCRIBE there may be none
            info = MPI.Info.Create({"map_by": "slot:OVERSUBSCRIBE", "bind_to": "none", "wdir": os.getcwd()})
            command = [*SPAWNED, str(rank), str(self.limits.join_s)]
            channel = alone.Spawn(sys.executable, command, maxprocs=1, info=info)
            info.Free()
            alone.Free()
            answer.put(_channel(channel))
        except Exception as error:
            answer.put(f"its replacement could not be started ({error})")

    def close(self, deadline_s: float) -> None:
        """Say goodbye, wait for every host's, stop the I/O thread; `all_left` tells whether all came.

        MPI_Finalize waits for all ranks without limit: after hosts that did not answer, abort instead.
        """
        deadline = time.monotonic() + deadline_s
        with self._joining:
            self._closing = True
        while True:
            peers = list(self._engine.peers.values())
            for peer in peers:
                if not peer.lost and not peer.dismissed:
                    peer.dismissed = True
                    self._say(peer, Frame(Head(FrameType.BYE, *peer.identity)))
            waiting = [p for p in peers if not p.left and not (self.fault_tolerant and p.lost)]
            if not (waiting or self._spawning) or time.monotonic() > deadline:
                break
            time.sleep(0.002)
        self._engine.stop()
        if self.fault_tolerant:
            for peer in self._engine.peers.values():
                if not peer.left:
                    _kill(peer)

    @property
    def all_left(self) -> bool:
        """Whether every host has said goodbye, or has died where that is survived."""
        return all(p.left or (self.fault_tolerant and p.dead) for p in self._engine.peers.values())

    @property
    def intact(self) -> bool:
        """Whether no host was ever lost, so that MPI_Finalize may be called."""
        engine = self._engine
        return all(p.left or not p.lost for p in engine.peers.values()) and set(self._incarnations.values()) <= {1}


def _nothing() -> None:
    return None


def _kill(peer: Peer) -> None:
    """End the process of a host that is still there, if it is on this machine and of this job."""
    pid = peer.note.get("pid")
    if peer.dead or not isinstance(pid, int) or peer.note.get("hostname") != socket.gethostname():
        return
    name = os.environ.get("PMIX_NAMESPACE", "").partition("@")[0]  # of a job and of all that it spawns
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if name and any(e.startswith(f"PMIX_NAMESPACE={name}@".encode()) for e in environment):
            os.kill(pid, signal.SIGKILL)
            peer.dead = True
    except OSError:  # it has ended, or there is no /proc
        pass


class MpiHost(HostLink):
    """A host's end: any rank but 0 of a communicator, or a spawned process on the one to its parent."""

    def __init__(self, comm: Any, limits: Limits) -> None:
        super().__init__()
        self._frames: queue.Queue[Frame | str] = queue.Queue()
        self.identity = _NOBODY
        self._owed: list[Tensor] = []  # this call's replies, as bytes: what the server will ask all ranks for
        self._engine = Engine(
            {0: (_channel(comm), 0)},
            limits,
            world=None if comm.Is_inter() else _channel(comm),
            deliver=lambda peer, frame: self._frames.put(frame),
            acknowledged=lambda peer, head, sent: None,
            lost=self._server_lost,
            saw=self._saw,
        )
        self._engine.expects_world = True
        self._server = self._engine.peers[0]
        self._say(Frame(Head(FrameType.JOIN), note=own_info()))
        try:
            answer = self._frames.get(timeout=limits.join_s)
        except queue.Empty:
            raise DeadlineExceeded(f"rank 0 did not answer within {limits.join_s:g} s") from None
        if isinstance(answer, str):
            raise PeerLost(answer)
        if answer.head.type is FrameType.BYE:
            self.close()
            raise Dismissed("the run ended before this host had joined it")
        if answer.head.type is not FrameType.WELCOME:
            raise BadMessage(f"a {answer.head.type.name} frame where WELCOME is due")
        self.welcome = answer.note
        self._server.silence_s = float(self.welcome["silence_s"]) * PATIENCE
        self._engine.beat_s = float(self.welcome["silence_s"]) / 5

    def _say(self, frame: Frame) -> None:
        self._engine.post(self._server, frame, encode(frame))

    # ---- in the I/O thread
    def _saw(self, head: Head) -> None:
        if head.type is FrameType.WELCOME:  # what comes behind it is checked against this
            self.identity = self._engine.peers[0].identity = (head.run_id, head.epoch, head.incarnation)
        self.saw(head)

    def _server_lost(self, peer: Peer, reason: str) -> None:
        self.latest = (2**32, 0)  # nobody waits for what is being worked on
        self._frames.put(reason)

    # ---- in the main thread
    def ready(self) -> None:
        """Tell the server that calls may come; `expected` must be set."""
        self._engine.empty = self.empty
        self._engine.expected = self.expected
        self.send(Frame(Head(FrameType.READY), note=own_info(self.about)))

    def recv(self) -> Frame:
        """The next frame; waits as long as the server is alive."""
        item = self._frames.get()
        if isinstance(item, str):
            self._frames.put(item)
            raise PeerLost(f"the server is gone: {item}")
        if item.bodies or item.world:
            self._engine.release(self._server)
        if item.head.type is FrameType.CALL:
            self._owed.clear()
        return item

    def send(self, frame: Frame) -> None:
        """Queue a frame; waits while several are on their way."""
        self._engine.wait_unsent(HOST_QUEUE - 1, None)
        if self._server.lost is not None:
            raise PeerLost(f"the server is gone: {self._server.lost}")
        frame.head.run_id, frame.head.epoch, frame.head.incarnation = self.identity
        frame.head.sent_ns = time.monotonic_ns()
        frame.head.flags &= ~CHECKSUMMED
        self._owed += [part.flat() for part in frame.world]
        self._say(frame)

    def gather(self, capacity: int) -> None:
        """Give the root this call's replies."""
        if room([part.numel() for part in self._owed]) != capacity or self._engine.world is None:
            raise BadMessage(f"the server asks all ranks for {capacity} bytes of replies, which this one has not")
        buffer = packed(self._owed, capacity)
        self._owed.clear()
        self._together(functools.partial(self._engine.gathers, buffer, None, []))

    def reduce(self, blocks: Sequence[tuple[Tensor, How]]) -> None:
        """Add these blocks to the root's."""
        self._together(functools.partial(self._engine.reductions, blocks, False))

    def _together(self, start: Callable[[list[Any]], None]) -> None:
        """Take part in an operation of all ranks, and wait until it has ended or the server is lost."""
        ended = threading.Event()
        self._engine.together(start, ended.set)
        while not ended.wait(0.05):
            if self._server.lost is not None:
                raise PeerLost(f"the server is gone: {self._server.lost}")

    def close(self) -> None:
        """Say goodbye, flush, stop the I/O thread."""
        if not self._server.lost:
            self.send(Frame(Head(FrameType.BYE)))
        self._engine.wait_unsent(0, 10.0)
        self._engine.stop()
