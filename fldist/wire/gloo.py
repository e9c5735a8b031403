"""gloo: one two-rank process group per host for bodies, the TCP control plane for everything else.

A group of two contains the damage: a wait that fails closes all pairs of its group, and there is only this one.
The group's rendezvous goes over the control connection (`_Store`), so no further port is opened.

Nobody waits on a body. gloo does not report a peer's death on the message in flight, and nothing frees a thread
that waits on it. So the receiver waits for a small trailer behind the bodies, which fails with the peer, and the
sender for the acknowledgement on the control connection; only then are the bodies' own waits called, which return
at once. A wait on a trailer whose peer has merely stopped is freed by failing a dummy receive of the same group.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fldist.wire.codec import CHECKSUMMED, Frame, FrameType, Head, decode, encode
from fldist.wire.control import Connection, ControlPlane, control_frame, new_token, proof, trust
from fldist.wire.errors import BadMessage, DeadlineExceeded, PeerLost, TransportError
from fldist.wire.link import (
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

_BODY_TAG = 0
_UNBLOCK_TAG = 1
_TRAILER_TAG = 2
_TRAILER_BYTES = 24
"""int64: sequence number, bytes of all bodies, crc32 of all bodies (0 with checksum: header)."""
_MAX_QUEUED = 10_000
"""Heads that may wait at one end; a host sends at most one every 50 ms ahead of the server's reading."""
_MAX_STORE_KEYS = 64
_MAX_STORE_BYTES = 1 << 16
_COUNTED_BY_MESSAGE = (FrameType.CALL, FrameType.REPLY)
"""Frames whose bytes the ledger counts message by message; all others are transport."""
_HOST_QUEUE = 2
"""Frames that a host may have waiting: one on the wire, one behind it, while the next client trains."""


class _Store(dist.Store):  # type: ignore[name-defined, misc]
    """The rendezvous store of one two-rank group, over the control connection of its two members."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def receive(self, key: str, value: bytes) -> None:
        """Take over what the other member has set."""
        with self._changed:
            if len(self._values) >= _MAX_STORE_KEYS or len(value) > _MAX_STORE_BYTES:
                raise BadMessage("the rendezvous of two ranks needs no such store")
            self._values[key] = value
            self._changed.notify_all()

    def shut(self) -> None:
        """Fail whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def set(self, key: str, value: str | bytes) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        self.receive(key, raw)
        self._publish(key, raw)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        limit = min(self._timeout_s, timeout.total_seconds() if timeout else self._timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or all(k in self._values for k in keys), limit)
            if self._closed or not all(k in self._values for k in keys):
                raise RuntimeError("the peer did not take part in the rendezvous")

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]


class Session:
    """One end of the connection between server and host: a reader and a writer thread around a two-rank group."""

    def __init__(
        self,
        plane_connection: Connection,
        *,
        me: int,
        limits: Limits,
        identity: tuple[bytes, int, int],
        deliver: Callable[[Session, Frame], None],
        acknowledged: Callable[[Session, Head], None],
        lost: Callable[[Session, str], None],
        queue_size: int = 0,
        checksum: bool = False,
    ) -> None:
        self.connection = plane_connection
        self.run_id, self.epoch, self.incarnation = identity
        self.rank = 0
        self.expected: Any = None
        self.info: dict[str, Any] = {}
        self.clock_offset_ns = 0
        self.sent_ns: dict[int, int] = {}
        self._me = me
        self._limits = limits
        self._transfer = timedelta(seconds=limits.transfer_s)
        self._deliver = deliver
        self._acknowledged = acknowledged
        self._lost = lost
        self._checksum = checksum
        self._store = _Store(self._publish, limits.join_s)
        self._group: Any = None
        self._inbox: queue.Queue[bytes | None] = queue.Queue()
        self._outbox: queue.Queue[tuple[Frame, bytes | None] | None] = queue.Queue(queue_size)
        self._acks: dict[int, threading.Event] = {}  # frames with bodies that the peer has not acknowledged
        self._seq = 0
        # what gloo may still touch when a session ends in the middle of a transfer lives as long as the group
        self._in_flight: dict[str, Any] = {}
        self._window = threading.Semaphore(1)
        self._ended = threading.Event()
        self._end_lock = threading.Lock()
        self._flushed = threading.Event()
        self._group_ready = threading.Event()
        self._saw: Callable[[Head], None] = lambda head: None
        self._unblocker: threading.Thread | None = None
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=f"fldist-{name}", daemon=True)
            for name, work in (("reader", self._read_all), ("writer", self._write_all))
        ]

    @property
    def ended(self) -> bool:
        """Whether the session is over."""
        return self._ended.is_set()

    def start(self, saw: Callable[[Head], None] | None = None) -> None:
        """Start both threads; the writer makes the group first."""
        if saw is not None:
            self._saw = saw
        for thread in self._threads:
            thread.start()

    # called by the control plane's thread
    def take(self, data: bytes) -> None:
        """Sort a head by what it is; heads with messages go to the reader in order."""
        kind = data[6]
        if kind not in _COUNTED_BY_MESSAGE:
            self.connection.transport_in += len(data)
        if self._inbox.qsize() > _MAX_QUEUED:
            raise BadMessage(f"over {_MAX_QUEUED} frames wait to be read")
        if kind in (FrameType.STORE, FrameType.ACK):
            frame = decode(data, None)
            check_session(frame.head, self.run_id, self.epoch, self.incarnation)
            if frame.head.type is FrameType.STORE:
                self._store.receive(str(frame.note["k"]), bytes.fromhex(str(frame.note["v"])))
            else:
                waiting = self._acks.pop(frame.head.seq, None)
                if waiting is not None:
                    waiting.set()
                self._acknowledged(self, frame.head)
        else:
            self._inbox.put(data)

    def put(self, frame: Frame, encoded: bytes | None = None) -> None:
        """Queue a frame for the writer (encoded now by the caller, or by the writer just before it is sent)."""
        while not self.ended:
            try:
                self._outbox.put((frame, encoded), timeout=0.2)
                return
            except queue.Full:
                continue
        raise PeerLost("the session has ended")

    def release(self) -> None:
        """Let the reader receive the next bodies."""
        self._window.release()

    def end(self, reason: str) -> None:
        """End the session from any thread; `lost` is told once."""
        with self._end_lock:
            if self._ended.is_set():
                return
            self._ended.set()
        self.connection.close()
        self._store.shut()
        self._group_ready.set()
        self._flushed.set()
        self._inbox.put(None)
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait(None)
        self._window.release()
        for waiting in list(self._acks.values()):
            waiting.set()
        self._unblocker = threading.Thread(target=self._unblock, name="fldist-unblock", daemon=True)
        self._unblocker.start()
        self._lost(self, reason)

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was queued is sent."""
        with contextlib.suppress(queue.Full):
            self._outbox.put(None, timeout=timeout_s)
        self._flushed.wait(timeout_s)

    def join_threads(self, timeout_s: float) -> None:
        """Wait for both threads to end."""
        deadline = time.monotonic() + timeout_s
        for thread in [*self._threads, self._unblocker]:
            if thread is not None and thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (TransportError, RuntimeError) as error:  # gloo's errors are RuntimeErrors
            self.end(_classify(error))
        except Exception as error:  # a fault of our own: end this session loudly, not the process silently
            self.end(f"internal error: {error!r}")

    def _publish(self, key: str, value: bytes) -> None:
        self._control(FrameType.STORE, {"k": key, "v": value.hex()})

    def _control(self, kind: FrameType, note: dict[str, Any] | None = None, seq: int = 0) -> None:
        head = Head(kind, self.run_id, self.epoch, self.incarnation, seq=seq)
        data = encode(Frame(head, note=note or {}))
        self.connection.send(data, self._limits.silence_s * 2, transport=True)

    def _make_group(self) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        address = self.connection.sock.getsockname()[0]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=self._limits.join_s)
        return dist.ProcessGroupGloo(self._store, self._me, 2, options)

    def _write_all(self) -> None:
        self._group = self._make_group()
        self._group_ready.set()
        while not self.ended:
            item = self._outbox.get()
            if item is None:
                break
            frame, encoded = item
            bodies = frame.bodies
            if encoded is None:
                self._seq += 1
                frame.head.seq = self._seq
                if self._checksum and bodies:
                    frame.head.flags |= CHECKSUMMED
            started = time.monotonic_ns()
            if encoded is None:
                frame.head.sent_ns = started
                encoded = encode(frame)
            self.sent_ns[frame.head.seq] = started
            transport = frame.head.type not in _COUNTED_BY_MESSAGE
            self.connection.send(encoded, self._limits.transfer_s, transport=transport)
            if bodies:
                self._send_bodies(frame)
        self._flushed.set()

    def _send_bodies(self, frame: Frame) -> None:
        acknowledged = self._acks[frame.head.seq] = threading.Event()
        crc = frame.checksum() if frame.head.flags & CHECKSUMMED else 0
        trailer = torch.tensor([frame.head.seq, frame.body_bytes, crc], dtype=torch.int64)
        peer = 1 - self._me
        works = [self._group.send([part.flat()], peer, _BODY_TAG) for part in frame.bodies]
        works.append(self._group.send([trailer], peer, _TRAILER_TAG))
        self._in_flight["out"] = (frame, trailer, works)
        self.connection.transport_out += _TRAILER_BYTES
        if not acknowledged.wait(self._limits.transfer_s):
            raise DeadlineExceeded("a transfer did not end in time")
        if not self.ended:
            for work in works:
                work.wait(self._transfer)
            del self._in_flight["out"]

    def _read_all(self) -> None:
        if not self._group_ready.wait(self._limits.join_s):
            raise DeadlineExceeded("the two-rank group was not made in time")
        while not self.ended:
            data = self._inbox.get()
            if data is None:
                break
            frame = decode(data, self.expected)
            check_session(frame.head, self.run_id, self.epoch, self.incarnation)
            self._saw(frame.head)
            if frame.bodies:
                self._window.acquire()
                if self.ended:
                    break
                self._receive_bodies(frame)
            if frame.head.type is FrameType.CALL or frame.bodies:
                self._control(FrameType.ACK, seq=frame.head.seq)
            self._deliver(self, frame)

    def _receive_bodies(self, frame: Frame) -> None:
        frame.allocate()
        trailer = torch.empty(3, dtype=torch.int64)
        peer = 1 - self._me
        works = [self._group.recv([part.flat()], peer, _BODY_TAG) for part in frame.bodies]
        last = self._group.recv([trailer], peer, _TRAILER_TAG)
        self._in_flight["in"] = (frame, trailer, works, last)
        last.wait(self._transfer)
        for work in works:
            work.wait(self._transfer)
        del self._in_flight["in"]
        self.connection.transport_in += _TRAILER_BYTES
        crc = frame.checksum() if frame.head.flags & CHECKSUMMED else 0
        if trailer.tolist() != [frame.head.seq, frame.body_bytes, crc]:
            raise BadMessage("the trailer does not fit its bodies: they were damaged on their way")

    def _unblock(self) -> None:
        """Free threads that are blocked in the group: a wait that times out closes all its pairs."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                dummy = torch.empty(1, dtype=torch.uint8)
                self._group.recv([dummy], 1 - self._me, _UNBLOCK_TAG).wait(timedelta(milliseconds=1))


def _classify(error: Exception) -> str:
    """One place that reads the texts of gloo's errors."""
    text = str(error)
    if isinstance(error, TransportError):
        return text
    if "closed by peer" in text or "reset by peer" in text or "pair closure" in text:
        return "connection closed by the peer"
    if "imed out" in text:
        return "a transfer did not end in time"
    return f"gloo: {text.splitlines()[0] if text else error!r}"


class GlooServer(ServerLink):
    """The server's end: listens, admits hosts that know the token, keeps a session for each."""

    def __init__(
        self,
        *,
        ranks: list[int],
        limits: Limits,
        token: str | None = None,
        bind: str = "127.0.0.1",
        checksum: bool = False,
        survives: str = "",
    ) -> None:
        super().__init__()
        self.limits = limits
        self.token = token or new_token()
        self._token = bytes.fromhex(self.token)
        self._checksum = checksum
        self._survives = survives
        self._ranks = set(ranks)
        self._welcome: Welcome | None = None
        self._sessions: dict[int, Session] = {}
        self._incarnations = dict.fromkeys(ranks, 0)
        self._old_transport = [0, 0]
        self._closing = False
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        listener = socket.create_server((bind, 0), family=family, backlog=1024)
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._plane = ControlPlane(limits.silence_s, self._frame, self._gone, on_accept=lambda connection: None)
        self._listener = listener
        self.rendezvous: object = None
        """What must live as long as hosts may look for this server (torchrun's store)."""

    @property
    def survives(self) -> str:
        """One line: what this backend and launcher can survive."""
        return self._survives

    def admit(self, welcome: Welcome) -> None:
        """Start to accept hosts."""
        self._welcome = welcome
        self._plane.listen(self._listener)

    # ---- joining, in the control plane's thread
    def _frame(self, connection: Connection, data: bytes) -> None:
        session = connection.owner
        if isinstance(session, Session):
            session.take(data)
            return
        try:
            self._handshake(connection, data)
        except (KeyError, TypeError, ValueError) as error:
            raise BadMessage(f"a damaged handshake: {error!r}") from None

    def _handshake(self, connection: Connection, data: bytes) -> None:
        connection.transport_in += len(data)
        if connection.owner is None:
            note = control_frame(data, FrameType.JOIN).note
            rank, nonce = int(note["rank"]), str(note["nonce"])
            mine = secrets.token_hex(16)
            connection.owner = (rank, nonce, mine)
            answer = {"nonce": mine, "proof": proof(self._token, "server", nonce, mine)}
            connection.send(encode(Frame(Head(FrameType.CHALLENGE), note=answer)), 1.0, transport=True)
            return
        rank, nonce, mine = connection.owner
        note = control_frame(data, FrameType.PROOF).note
        right = proof(self._token, "host", mine, nonce, str(rank))
        if not secrets.compare_digest(right, str(note["proof"])):
            raise BadMessage("the token is wrong")
        problem = None
        if rank not in self._ranks:
            problem = f"rank {rank} is not expected"
        elif rank in self._sessions:
            problem = f"rank {rank} has joined already"
        elif self._welcome is None or self._closing:
            problem = "the server admits nobody"
        if problem is not None:
            connection.send(encode(Frame(Head(FrameType.BYE), note={"reason": problem})), 1.0, transport=True)
            raise BadMessage(problem)
        self._incarnations[rank] += 1
        welcome = self._welcome
        assert welcome is not None
        identity = (welcome.run_id, welcome.epoch, self._incarnations[rank])
        session = Session(
            connection,
            me=0,
            limits=self.limits,
            identity=identity,
            deliver=self._delivered,
            acknowledged=self._acknowledged,
            lost=self._session_lost,
            checksum=self._checksum,
        )
        session.rank = rank
        session.expected = self.expected
        connection.owner = session
        trust(connection)
        self._sessions[rank] = session
        self.connected.add(rank)
        greeting = Frame(Head(FrameType.WELCOME, *identity), note=welcome.note(identity[2], self.limits))
        connection.send(encode(greeting), 5.0, transport=True)
        session.start()

    def _gone(self, connection: Connection, reason: str) -> None:
        if isinstance(connection.owner, Session):
            connection.owner.end(reason)

    # ---- sessions, in their threads
    def _delivered(self, session: Session, frame: Frame) -> None:
        now = time.monotonic_ns()
        if frame.head.type is FrameType.READY:
            offset = now - int(frame.note["clock_ns"])
            self.events.put(Joined(session.rank, session.incarnation, frame.note, offset))
            return
        release = session.release if frame.bodies else _nothing
        self.events.put(Received(session.rank, frame, now, release))

    def _acknowledged(self, session: Session, head: Head) -> None:
        sent = session.sent_ns.pop(head.seq, 0)
        self.events.put(Sent(session.rank, head.seq, sent, time.monotonic_ns()))

    def _session_lost(self, session: Session, reason: str) -> None:
        self._old_transport[0] += session.connection.transport_in
        self._old_transport[1] += session.connection.transport_out
        self._sessions.pop(session.rank, None)
        self.connected.discard(session.rank)
        if not self._closing:
            self.events.put(Lost(session.rank, reason))

    # ---- the round loop's side
    def post(self, rank: int, frame: Frame) -> bool:
        """Encode and queue a frame; a host that is gone is told of by its `Lost` event too."""
        self.number(frame)
        session = self._sessions.get(rank)
        if session is None:
            return False
        head = frame.head
        head.run_id, head.epoch, head.incarnation = session.run_id, session.epoch, session.incarnation
        if self._checksum and frame.bodies:
            head.flags |= CHECKSUMMED
        try:
            session.put(frame, encode(frame))
        except PeerLost:
            return False
        return True

    def abort(self, rank: int, reason: str) -> None:
        """End a host's session."""
        session = self._sessions.get(rank)
        if session is not None:
            session.end(reason)

    def transport_bytes(self) -> tuple[int, int]:
        """Heartbeats, joins, acknowledgements, rendezvous."""
        connections = [s.connection for s in list(self._sessions.values())]
        return (
            self._old_transport[0] + sum(c.transport_in for c in connections),
            self._old_transport[1] + sum(c.transport_out for c in connections),
        )

    def close(self, deadline_s: float) -> None:
        """Send BYE, wait until the hosts have hung up, end what is left."""
        self._closing = True
        sessions = list(self._sessions.values())
        for session in sessions:
            with contextlib.suppress(TransportError):
                session.put(Frame(Head(FrameType.BYE, session.run_id, session.epoch, session.incarnation)), None)
        deadline = time.monotonic() + deadline_s
        while any(not s.ended for s in sessions) and time.monotonic() < deadline:
            time.sleep(0.005)
        for session in sessions:
            session.end("closed")
        self._plane.close()
        self._listener.close()
        for session in [*sessions, *self._sessions.values()]:  # one may have joined meanwhile
            session.end("closed")
            session.join_threads(max(1.0, deadline - time.monotonic()))


def _nothing() -> None:
    return None


class GlooHost(HostLink):
    """A host's end."""

    def __init__(self, address: tuple[str, int], rank: int, token: str, limits: Limits) -> None:
        super().__init__()
        self._frames: queue.Queue[Frame | str] = queue.Queue()
        self._raw: queue.Queue[bytes | str] = queue.Queue()
        self._session: Session | None = None
        self._hand_over = threading.Lock()
        self._join_s = limits.join_s
        deadline = time.monotonic() + limits.join_s
        self._connection = Connection(_connect(address, deadline))
        self._plane = ControlPlane(limits.silence_s, self._frame, self._gone)
        self._plane.add(self._connection)
        try:
            note = self.welcome = self._shake_hands(rank, bytes.fromhex(token), deadline)
            self.identity = (bytes.fromhex(note["run_id"]), int(note["epoch"]), int(note["incarnation"]))
            limits = Limits(limits.join_s, float(note["silence_s"]), float(note["transfer_s"]))
            checksum = bool(note["checksum"])
        except BaseException as error:
            self._plane.close()
            if isinstance(error, LookupError | TypeError | ValueError | OverflowError):
                raise BadMessage(f"the server's handshake is damaged: {error!r}") from None
            raise
        self._plane.silence_s = limits.silence_s
        self._session = Session(
            self._connection,
            me=1,
            limits=limits,
            identity=self.identity,
            deliver=self._delivered,
            acknowledged=lambda session, head: None,
            lost=self._session_lost,
            queue_size=_HOST_QUEUE,
            checksum=checksum,
        )
        with self._hand_over:
            self._connection.owner = self._session
            while not self._raw.empty():
                early = self._raw.get()
                if isinstance(early, bytes):
                    self._session.take(early)
        trust(self._connection)
        self._session.start(self.saw)

    def _shake_hands(self, rank: int, token: bytes, deadline: float) -> dict[str, Any]:
        nonce = secrets.token_hex(16)
        self._say(FrameType.JOIN, {"rank": rank, "nonce": nonce})
        challenge = self._hear(deadline, FrameType.CHALLENGE).note
        if not secrets.compare_digest(proof(token, "server", nonce, str(challenge["nonce"])), str(challenge["proof"])):
            raise PeerLost("the server does not know this run's token; nothing is taken from it")
        self._say(FrameType.PROOF, {"proof": proof(token, "host", str(challenge["nonce"]), nonce, str(rank))})
        answer = self._hear(deadline, FrameType.WELCOME, FrameType.BYE)
        if answer.head.type is FrameType.BYE:
            raise PeerLost(f"the server refused rank {rank}: {answer.note.get('reason')}")
        return answer.note

    def _say(self, kind: FrameType, note: dict[str, Any]) -> None:
        self._connection.send(encode(Frame(Head(kind), note=note)), 5.0, transport=True)

    def _hear(self, deadline: float, *kinds: FrameType) -> Frame:
        try:
            data = self._raw.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise DeadlineExceeded(f"the server did not answer within {self._join_s:g} s") from None
        if isinstance(data, str):
            raise PeerLost(f"the server hung up while this host joined: {data}")
        return control_frame(data, *kinds)

    # ---- in the control plane's thread
    def _frame(self, connection: Connection, data: bytes) -> None:
        with self._hand_over:
            if isinstance(connection.owner, Session):
                connection.owner.take(data)
            else:
                self._raw.put(data)

    def _gone(self, connection: Connection, reason: str) -> None:
        self._raw.put(reason)
        if isinstance(connection.owner, Session):
            connection.owner.end(reason)

    # ---- in the session's threads
    def _delivered(self, session: Session, frame: Frame) -> None:
        self._frames.put(frame)

    def _session_lost(self, session: Session, reason: str) -> None:
        self._frames.put(reason)

    # ---- in the main thread
    def ready(self) -> None:
        """Tell the server that calls may come; `expected` must be set."""
        assert self._session is not None and self.expected is not None
        self._session.expected = self.expected
        self.send(Frame(Head(FrameType.READY), note=own_info()))

    def recv(self) -> Frame:
        """The next frame; waits as long as the server is alive."""
        item = self._frames.get()
        if isinstance(item, str):
            self._frames.put(item)
            raise PeerLost(f"the server is gone: {item}")
        if item.bodies and self._session is not None:
            self._session.release()  # the next call's bodies may come while this one is worked on
        return item

    def send(self, frame: Frame) -> None:
        """Queue a frame; the writer encodes it just before it is sent."""
        assert self._session is not None
        frame.head.run_id, frame.head.epoch, frame.head.incarnation = self.identity
        self._session.put(frame)

    def close(self) -> None:
        """Flush what is queued, hang up, end the threads."""
        assert self._session is not None
        if not self._session.ended:
            self._session.flush(10.0)
        self._session.end("closed")
        self._session.join_threads(5.0)
        self._plane.close()


def _connect(address: tuple[str, int], deadline: float) -> socket.socket:
    """Connect with back-off until the deadline: under torchrun a host may be up before the server listens."""
    pause = 0.02
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection(address, timeout=max(0.1, left))
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise PeerLost(f"no server at {address[0]}:{address[1]}: {error}") from None
            time.sleep(pause)
            pause = min(1.0, pause * 2)
