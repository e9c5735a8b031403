"""MPI: heads, bodies and heartbeats over MPI itself; one I/O thread per process makes all MPI calls.

The thread spins for 50 us and then naps in steps of 0.5 ms, so that waiting does not burn a core. A head's size
is probed before it is received, a body's size is known from the checked head. Without ULFM the death of any
rank ends the whole job: that is MPI's own doing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    HostLink,
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

_HEAD_TAG = 1
_BODY_TAG = 2
_SPIN_S = 50e-6
_NAP_S = 0.5e-3


@dataclass
class _Peer:
    """What the I/O thread knows of one other rank."""

    rank: int
    last_heard: float
    silence_s: float  # the joining limit at first, the limit on silence once the peer is ready
    identity: tuple[bytes, int, int] = (bytes(16), 0, 0)
    waiting: deque[Frame] = field(default_factory=deque)  # heads whose bodies are still to come, in order
    receiving: list[Any] | None = None
    window: int = 1
    lost: str | None = None  # why
    sent_ns: dict[int, int] = field(default_factory=dict)


class Engine:
    """The I/O thread of one process."""

    def __init__(
        self,
        comm: Any,
        peers: list[int],
        limits: Limits,
        *,
        deliver: Callable[[int, Frame], None],
        acknowledged: Callable[[int, Head, int], None],
        lost: Callable[[int, str], None],
        saw: Callable[[Head], None] = lambda head: None,
    ) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise RuntimeError("this MPI gives no MPI_THREAD_MULTIPLE, which fldist needs (see `fldist doctor`)")
        self._mpi = MPI
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        now = time.monotonic()
        self.peers = {rank: _Peer(rank, now, max(limits.silence_s, limits.join_s)) for rank in peers}
        self.beat_s = limits.silence_s / 5
        self.expected: Expected | None = None
        self.transport_in = 0
        self.transport_out = 0
        self._deliver = deliver
        self._acknowledged = acknowledged
        self._lost = lost
        self._saw = saw
        self._out: queue.SimpleQueue[tuple[int, Frame, bytes]] = queue.SimpleQueue()
        # what must stay alive until sent, its requests, and whether it counts in `_unsent`
        self._sending: list[tuple[Any, list[Any], bool]] = []
        self._unsent = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._heartbeat = encode(Frame(Head(FrameType.HEARTBEAT)))
        self._thread = threading.Thread(target=self._run, name="fldist-mpi", daemon=True)
        self._thread.start()

    def post(self, rank: int, frame: Frame, encoded: bytes) -> None:
        """Queue an encoded frame; never blocks."""
        with self._changed:
            self._unsent += 1
            self._out.put((rank, frame, encoded))
            self._changed.notify_all()

    def release(self, rank: int) -> None:
        """Let the next bodies of a peer be received."""
        with self._changed:
            self.peers[rank].window += 1
            self._changed.notify_all()

    def wait_unsent(self, most: int, timeout_s: float | None) -> bool:
        """Wait until at most `most` frames are unsent."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._unsent <= most or all(p.lost for p in self.peers.values()), timeout_s
            )

    def stop(self) -> None:
        """End the thread; MPI must not be finalized before."""
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            for peer in self.peers.values():
                self._lose(peer, f"MPI: {error}")

    def _loop(self) -> None:
        next_beat = time.monotonic() + self.beat_s
        last_turn = idle_since = time.monotonic()
        while not self._stopping:
            busy = self._start_sends()
            busy |= self._probe()
            busy |= self._receive()
            busy |= self._finish_sends()
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
                    if self._out.empty() and not self._stopping:
                        self._changed.wait(_NAP_S)

    def _beat(self, now: float) -> None:
        for peer in self.peers.values():
            if peer.lost:
                continue
            if now - peer.last_heard > peer.silence_s:
                self._lose(peer, f"silent for {peer.silence_s:g} s")
                continue
            self._isend(peer.rank, self._heartbeat)
            self.transport_out += len(self._heartbeat)

    def _isend(self, rank: int, data: bytes) -> None:
        self._sending.append((data, [self._comm.Isend([data, self._mpi.BYTE], rank, _HEAD_TAG)], False))

    def _start_sends(self) -> bool:
        started = False
        while not self._out.empty():
            rank, frame, encoded = self._out.get()
            peer = self.peers[rank]
            requests = []
            if not peer.lost:
                if frame.head.type is FrameType.CALL:
                    peer.sent_ns[frame.head.seq] = time.monotonic_ns()
                requests.append(self._comm.Isend([encoded, self._mpi.BYTE], rank, _HEAD_TAG))
                for part in frame.bodies:
                    requests.append(self._comm.Isend([part.flat().numpy(), self._mpi.BYTE], rank, _BODY_TAG))
                if frame.head.type not in COUNTED_BY_MESSAGE:
                    self.transport_out += len(encoded)
            self._sending.append(((frame, encoded), requests, True))
            started = True
        return started

    def _finish_sends(self) -> bool:
        rest = []
        done = 0
        for entry in self._sending:
            if all(r.Test() for r in entry[1]):
                done += entry[2]
            else:
                rest.append(entry)
        finished = len(rest) < len(self._sending)
        self._sending = rest
        if done:
            with self._changed:
                self._unsent -= done
                self._changed.notify_all()
        return finished

    def _probe(self) -> bool:
        found = False
        status = self._mpi.Status()
        while True:
            message = self._comm.Improbe(self._mpi.ANY_SOURCE, _HEAD_TAG, status)
            if message is None:
                return found
            found = True
            size = status.Get_count(self._mpi.BYTE)
            peer = self.peers.get(status.Get_source())
            buffer = bytearray(min(size, MAX_HEAD_BYTES))
            try:
                message.Recv([buffer, self._mpi.BYTE])  # a longer one is an error, truncated
                if peer is not None and not peer.lost:
                    peer.last_heard = time.monotonic()
                    self._take(peer, bytes(buffer))
            except Exception as error:  # whatever a peer sends costs that peer, not this thread
                if peer is not None:
                    self._lose(peer, str(error) or repr(error))

    def _take(self, peer: _Peer, data: bytes) -> None:
        frame = decode(data, self.expected)
        kind = frame.head.type
        if kind not in COUNTED_BY_MESSAGE:
            self.transport_in += len(data)
        if kind is FrameType.HEARTBEAT:
            return
        if kind not in (FrameType.JOIN, FrameType.WELCOME):
            check_session(frame.head, *peer.identity)
        if kind is FrameType.ACK:
            self._acknowledged(peer.rank, frame.head, peer.sent_ns.pop(frame.head.seq, 0))
            return
        self._saw(frame.head)
        peer.waiting.append(frame)

    def _receive(self) -> bool:
        moved = False
        for peer in self.peers.values():
            try:
                moved |= self._receive_from(peer)
            except Exception as error:
                self._lose(peer, str(error) or repr(error))
        return moved

    def _receive_from(self, peer: _Peer) -> bool:
        moved = False
        while peer.waiting and not peer.lost:
            frame = peer.waiting[0]
            if frame.bodies and peer.receiving is None:
                if peer.window < 1:
                    break
                with self._changed:
                    peer.window -= 1
                frame.allocate()
                peer.receiving = [
                    self._comm.Irecv([p.flat().numpy(), self._mpi.BYTE], peer.rank, _BODY_TAG) for p in frame.bodies
                ]
            if peer.receiving is not None:
                if not all(r.Test() for r in peer.receiving):
                    break
                peer.receiving = None
                peer.last_heard = time.monotonic()
            peer.waiting.popleft()
            moved = True
            if frame.head.type is FrameType.CALL:
                data = encode(Frame(Head(FrameType.ACK, *peer.identity, seq=frame.head.seq)))
                self._isend(peer.rank, data)
                self.transport_out += len(data)
            self._deliver(peer.rank, frame)
        return moved

    def lose(self, rank: int, reason: str) -> None:
        """Have nothing to do with a peer any more."""
        self._lose(self.peers[rank], reason)

    def _lose(self, peer: _Peer, reason: str) -> None:
        if not peer.lost:
            peer.lost = reason
            with self._changed:
                self._changed.notify_all()
            self._lost(peer.rank, reason)


class MpiServer(ServerLink):
    """The server's end: rank 0 of the communicator."""

    def __init__(self, comm: Any, limits: Limits) -> None:
        super().__init__()
        self.limits = limits
        self._welcome: Welcome | None = None
        self._closing = False
        self._joining = threading.Lock()
        self._joined: list[int] = []  # hosts that wait for a welcome
        self._farewells: set[int] = set()
        self._engine = Engine(
            comm,
            list(range(1, comm.Get_size())),
            limits,
            deliver=self._delivered,
            acknowledged=self._acknowledged,
            lost=self._rank_lost,
        )

    @property
    def survives(self) -> str:
        """One line: what this backend and launcher can survive."""
        return "MPI without fault tolerance: mpirun ends the whole job when a rank dies"

    def admit(self, welcome: Welcome) -> None:
        """Answer the hosts that have joined and that will."""
        self._engine.expected = self.expected
        with self._joining:
            self._welcome = welcome
            self._greet()

    def _greet(self) -> None:
        assert self._welcome is not None
        identity = (self._welcome.run_id, self._welcome.epoch, 1)
        for rank in self._joined:
            self.connected.add(rank)
            self._engine.peers[rank].identity = identity
            greeting = Frame(Head(FrameType.WELCOME, *identity), note=self._welcome.note(1, self.limits))
            self._engine.post(rank, greeting, encode(greeting))
        self._joined.clear()

    def _delivered(self, rank: int, frame: Frame) -> None:
        now = time.monotonic_ns()
        kind = frame.head.type
        if kind is FrameType.JOIN:
            with self._joining:
                self._joined.append(rank)
                if self._welcome is not None:
                    self._greet()
        elif kind is FrameType.BYE:
            self._farewells.add(rank)
        elif kind is FrameType.READY:
            self._engine.peers[rank].silence_s = self.limits.silence_s
            offset = now - int(frame.note["clock_ns"])
            self.events.put(Joined(rank, 1, frame.note, offset))
        else:
            release = (lambda: self._engine.release(rank)) if frame.bodies else _nothing
            self.events.put(Received(rank, frame, now, release))

    def _acknowledged(self, rank: int, head: Head, sent_ns: int) -> None:
        self.events.put(Sent(rank, head.seq, sent_ns, time.monotonic_ns()))

    def _rank_lost(self, rank: int, reason: str) -> None:
        self.connected.discard(rank)
        if not self._closing:
            self.events.put(Lost(rank, reason))

    def post(self, rank: int, frame: Frame) -> bool:
        """Encode and queue a frame."""
        self.number(frame)
        peer = self._engine.peers[rank]
        if peer.lost:
            return False
        head = frame.head
        head.run_id, head.epoch, head.incarnation = peer.identity
        self._engine.post(rank, frame, encode(frame))
        return True

    def abort(self, rank: int, reason: str) -> None:
        """Have nothing to do with a host any more."""
        self._engine.lose(rank, reason)

    def transport_bytes(self) -> tuple[int, int]:
        """Heartbeats, joins, acknowledgements."""
        return self._engine.transport_in, self._engine.transport_out

    def close(self, deadline_s: float) -> None:
        """Say goodbye, wait for every host's, stop the I/O thread; `all_left` tells whether all came.

        MPI_Finalize waits for all ranks without limit: after hosts that did not answer, abort instead.
        """
        self._closing = True
        deadline = time.monotonic() + deadline_s
        for rank, peer in self._engine.peers.items():
            if not peer.lost:
                frame = Frame(Head(FrameType.BYE, *peer.identity))
                self._engine.post(rank, frame, encode(frame))
        while not self.all_left and time.monotonic() < deadline:
            time.sleep(0.002)
        self._engine.stop()

    @property
    def all_left(self) -> bool:
        """Whether every host has said goodbye."""
        return self._farewells >= set(self._engine.peers)


def _nothing() -> None:
    return None


class MpiHost(HostLink):
    """A host's end: any rank but 0."""

    def __init__(self, comm: Any, limits: Limits) -> None:
        super().__init__()
        self._frames: queue.Queue[Frame | str] = queue.Queue()
        self._engine = Engine(
            comm,
            [0],
            limits,
            deliver=lambda rank, frame: self._frames.put(frame),
            acknowledged=lambda rank, head, sent: None,
            lost=lambda rank, reason: self._frames.put(reason),
            saw=self.saw,
        )
        join = Frame(Head(FrameType.JOIN), note=own_info())
        self._engine.post(0, join, encode(join))
        try:
            answer = self._frames.get(timeout=limits.join_s)
        except queue.Empty:
            raise DeadlineExceeded(f"rank 0 did not answer within {limits.join_s:g} s") from None
        if isinstance(answer, str):
            raise PeerLost(answer)
        if answer.head.type is not FrameType.WELCOME:
            raise BadMessage(f"a {answer.head.type.name} frame where WELCOME is due")
        self.welcome = answer.note
        self.identity = (answer.head.run_id, answer.head.epoch, answer.head.incarnation)
        self._engine.peers[0].identity = self.identity
        self._engine.peers[0].silence_s = float(self.welcome["silence_s"]) * PATIENCE
        self._engine.beat_s = float(self.welcome["silence_s"]) / 5

    def ready(self) -> None:
        """Tell the server that calls may come; `expected` must be set."""
        self._engine.expected = self.expected
        self.send(Frame(Head(FrameType.READY), note=own_info(self.about)))

    def recv(self) -> Frame:
        """The next frame; waits as long as the server is alive."""
        item = self._frames.get()
        if isinstance(item, str):
            raise PeerLost(f"the server is gone: {item}")
        if item.bodies:
            self._engine.release(0)
        return item

    def send(self, frame: Frame) -> None:
        """Queue a frame; waits while several are on their way."""
        self._engine.wait_unsent(HOST_QUEUE - 1, None)
        reason = self._engine.peers[0].lost
        if reason is not None:
            raise PeerLost(f"the server is gone: {reason}")
        frame.head.run_id, frame.head.epoch, frame.head.incarnation = self.identity
        frame.head.sent_ns = time.monotonic_ns()
        frame.head.flags &= ~CHECKSUMMED
        self._engine.post(0, frame, encode(frame))

    def close(self) -> None:
        """Say goodbye, flush, stop the I/O thread."""
        if not self._engine.peers[0].lost:
            self.send(Frame(Head(FrameType.BYE)))
        self._engine.wait_unsent(0, 10.0)
        self._engine.stop()
