"""A session: one end of the connection between the server and one host, and the pair that carries its bodies.

The pair's rendezvous goes over the control connection (`Store`), so no further port is opened. Nobody who sends waits
on a body: the receiver waits for all of them and a small trailer, and the sender for the acknowledgement on the control
connection. A session that ends has its pair free whoever is blocked in it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fldist import blocks
from fldist.wire.codec import CHECKSUMMED, Frame, FrameType, Head, decode, encode
from fldist.wire.control import Connection
from fldist.wire.errors import BadMessage, DeadlineExceeded, PeerLost, TransportError
from fldist.wire.link import COUNTED_BY_MESSAGE, Limits, check_session
from fldist.wire.network import pair_address
from fldist.wire.pair import Ends, GlooPair, MakePair

_TRAILER_BYTES = 24
"""int64: sequence number, bytes of all bodies, crc32 of all bodies (0 with checksum: header)."""
_MAX_QUEUED = 10_000
"""Heads that may wait at one end; a host sends at most one every 50 ms ahead of the server's reading."""
_MAX_STORE_KEYS = 64
_MAX_STORE_BYTES = 1 << 16


class Store(dist.Store):  # type: ignore[name-defined, misc]
    """The rendezvous store of a group, over the control connections of its members. publish: tells the others."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float, ranks: int = 2) -> None:
        super().__init__()
        self._most = _MAX_STORE_KEYS * ranks
        self._publish = publish
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self.told: bytes | None = None
        """What this member has set last."""
        self._changed = threading.Condition()
        self._closed = False

    def receive(self, key: str, value: bytes) -> None:
        """Take over what the other member has set."""
        with self._changed:
            if len(self._values) >= self._most or len(value) > _MAX_STORE_BYTES:
                raise BadMessage("the rendezvous of these ranks needs no such store")
            self._values[key] = value
            self._changed.notify_all()

    def shut(self) -> None:
        """Fail whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def set(self, key: str, value: str | bytes) -> None:
        """Keep a value and tell the others."""
        raw = value if isinstance(value, bytes) else value.encode()
        self.receive(key, raw)
        self.told = raw
        self._publish(key, raw)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are set; RuntimeError when that takes too long or the session ends."""
        limit = min(self._timeout_s, timeout.total_seconds() if timeout else self._timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or all(k in self._values for k in keys), limit)
            if self._closed or not all(k in self._values for k in keys):
                raise RuntimeError("a rank did not take part in the rendezvous")

    def get(self, key: str) -> bytes:
        """The value of a key, once it is set."""
        self.wait([key])
        return self._values[key]


class Session:
    """One end of the connection between server and host: a reader and a writer thread around a pair.

    empty: makes the tensors that bodies are received into, as `torch.empty` does.
    """

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
        pair: MakePair = GlooPair,
    ) -> None:
        self.connection = plane_connection
        self.run_id, self.epoch, self.incarnation = identity
        self.rank = 0
        self.expected: Any = None
        self.empty: Callable[..., Tensor] = blocks.empty
        self.sent_ns: dict[int, int] = {}
        self.limits = limits
        self._deliver = deliver
        self._acknowledged = acknowledged
        self._lost = lost
        self._checksum = checksum
        self._store = Store(self._publish, limits.join_s)
        self.world_store: Callable[[Session, str, bytes], None] | None = None
        """Takes what the peer has set in the world group's store."""
        self.receive_world: Callable[[Frame], None] | None = None
        """Receives a call's parts for all ranks."""
        # the address is asked for by the writer: a connection that is closed by now ends the session there
        self._pair = pair(Ends(me, self._store, self.address, limits))
        self._inbox: queue.Queue[bytes | None] = queue.Queue()
        self._outbox: queue.Queue[tuple[Frame, bytes | None] | None] = queue.Queue(queue_size)
        self._acks: dict[int, threading.Event] = {}  # frames with bodies that the peer has not acknowledged
        self._seq = 0
        # what the pair may still touch when a session ends in the middle of a transfer lives as long as the pair
        self._in_flight: dict[str, Any] = {}
        self._window = threading.Semaphore(1)
        self._ended = threading.Event()
        self._end_lock = threading.Lock()
        self._flushed = threading.Event()
        self._pair_ready = threading.Event()
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

    def address(self) -> str:
        """Where groups of this session meet: this machine's address towards the peer."""
        return pair_address(self.connection.sock)

    def wait_ended(self) -> None:
        """Wait for the session's end, as long as a peer may be silent."""
        self._ended.wait(self.limits.silence_s)

    def start(self, saw: Callable[[Head], None] | None = None) -> None:
        """Start both threads; the writer opens the pair first."""
        if saw is not None:
            self._saw = saw
        for thread in self._threads:
            thread.start()

    # called by the control plane's thread
    def take(self, data: bytes) -> None:
        """Sort a head by what it is; heads with messages go to the reader in order."""
        kind = data[6]
        if kind not in COUNTED_BY_MESSAGE:
            self.connection.count(received=len(data))
        if self._inbox.qsize() > _MAX_QUEUED:
            raise BadMessage(f"over {_MAX_QUEUED} frames wait to be read")
        if kind in (FrameType.STORE, FrameType.ACK):
            frame = decode(data, None)
            check_session(frame.head, self.run_id, self.epoch, self.incarnation)
            if frame.head.type is FrameType.STORE:
                key, value = str(frame.note["k"]), bytes.fromhex(str(frame.note["v"]))
                if not frame.note.get("world"):
                    self._store.receive(key, value)
                elif self.world_store is not None:
                    self.world_store(self, key, value)
            else:
                waiting = self._acks.pop(frame.head.seq, None)
                if waiting is not None:
                    waiting.set()
                self._acknowledged(self, frame.head)
        else:
            self._inbox.put(data)

    def put(self, frame: Frame, encoded: bytes | None = None) -> None:
        """Queue a frame for the writer (encoded now by the caller, or by the writer just before it is sent).

        An encoded frame is counted here: the server's last verdicts are then in its result, whenever they are sent.
        """
        while not self.ended:
            try:
                self._outbox.put((frame, encoded), timeout=0.2)
                if encoded is not None and frame.head.type not in COUNTED_BY_MESSAGE:
                    self.connection.count(sent=len(encoded))
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
        self._pair_ready.set()
        self._flushed.set()
        self._inbox.put(None)
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait(None)
        self._window.release()
        for waiting in list(self._acks.values()):
            waiting.set()
        self._unblocker = threading.Thread(target=self._pair.unblock, name="fldist-unblock", daemon=True)
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

    def publish_world(self, key: str, value: bytes) -> None:
        """Tell the peer what has been set in the world group's store."""
        self._control(FrameType.STORE, {"k": key, "v": value.hex(), "world": True})

    def _control(self, kind: FrameType, note: dict[str, Any] | None = None, seq: int = 0) -> None:
        head = Head(kind, self.run_id, self.epoch, self.incarnation, seq=seq)
        data = encode(Frame(head, note=note or {}))
        self.connection.send(data, self.limits.silence_s * 2, transport=True)

    def _write_all(self) -> None:
        self._pair.open()
        self._pair_ready.set()
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
            transport = encoded is None and frame.head.type not in COUNTED_BY_MESSAGE
            if encoded is None:
                frame.head.sent_ns = started
                encoded = encode(frame)
            if frame.head.type is FrameType.CALL:
                self.sent_ns[frame.head.seq] = started
            self.connection.send(encoded, self.limits.transfer_s, transport=transport)
            if bodies:
                self._send_bodies(frame)
            del item, frame, bodies  # nothing is kept while nothing is to be done
        self._flushed.set()

    def _send_bodies(self, frame: Frame) -> None:
        acknowledged = self._acks[frame.head.seq] = threading.Event()
        if self.ended:  # `end` may have looked at `_acks` before this one was in it
            return
        crc = frame.checksum() if frame.head.flags & CHECKSUMMED else 0
        trailer = torch.tensor([frame.head.seq, frame.body_bytes, crc], dtype=torch.int64)
        transfer = self._pair.send([part.flat() for part in frame.bodies], trailer)
        self._in_flight["out"] = (frame, trailer, transfer)
        self.connection.count(sent=_TRAILER_BYTES)
        if not acknowledged.wait(self.limits.transfer_s):
            raise DeadlineExceeded("a transfer did not end in time")
        if not self.ended:
            self._pair.sent(transfer)
            del self._in_flight["out"]

    def _read_all(self) -> None:
        if not self._pair_ready.wait(self.limits.join_s):
            raise DeadlineExceeded("the two-rank group was not made in time")
        while not self.ended:
            data = self._inbox.get()
            if data is None:
                break
            frame = decode(data, self.expected)
            check_session(frame.head, self.run_id, self.epoch, self.incarnation)
            self._saw(frame.head)
            if frame.bodies or (frame.world and self.receive_world is not None):
                self._window.acquire()
                if self.ended:
                    break
                if self.receive_world is not None:
                    self.receive_world(frame)
                if frame.bodies:
                    self._receive_bodies(frame)
            if frame.head.type is FrameType.CALL or frame.bodies:
                self._control(FrameType.ACK, seq=frame.head.seq)
            self._deliver(self, frame)
            del frame

    def _receive_bodies(self, frame: Frame) -> None:
        frame.allocate(self.empty)
        trailer = torch.empty(3, dtype=torch.int64)
        transfer = self._pair.receive([part.flat() for part in frame.bodies], trailer)
        self._in_flight["in"] = (frame, trailer, transfer)
        self._pair.received(transfer)
        del self._in_flight["in"]
        self.connection.count(received=_TRAILER_BYTES)
        crc = frame.checksum() if frame.head.flags & CHECKSUMMED else 0
        if trailer.tolist() != [frame.head.seq, frame.body_bytes, crc]:
            raise BadMessage("the trailer does not fit its bodies: they were damaged on their way")


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
