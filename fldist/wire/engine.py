"""The I/O thread of one MPI process: it, and the threads that it has for large bodies, make every MPI call of the links
in `mpi.py`.

The thread spins for 50 us and then naps, so that waiting does not burn a core: for a twentieth of the time for which
nothing has happened, at most 0.5 ms, and for 0.05 ms while a body is on its way, since nothing moves but when MPI is
called. A head's size is probed before it is received, a body's size is known from the checked head. Every peer has a
channel of its own (a communicator and a rank in it), and whatever goes wrong on a channel costs that peer alone.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fldist import blocks
from fldist.wire.codec import MAX_HEAD_BYTES, Expected, Frame, FrameType, Head, decode, encode
from fldist.wire.errors import BadMessage
from fldist.wire.link import COUNTED_BY_MESSAGE, How, Limits, check_session
from fldist.wire.world import ALIGNMENT

log = logging.getLogger("fldist.mpi")

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
NOBODY = (bytes(16), 0, 0)
"""The identity of a session that has not begun."""


@dataclass(eq=False)
class Peer:
    """One incarnation of another rank, as the I/O thread knows it."""

    rank: int
    comm: Any
    at: int
    """Its rank in `comm`."""
    last_heard: float
    silence_s: float  # the joining limit at first, the limit on silence once the peer is ready
    identity: tuple[bytes, int, int] = NOBODY
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
