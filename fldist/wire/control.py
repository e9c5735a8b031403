"""The control plane of gloo and NCCL: one TCP connection per host for joining, heads, heartbeats and the end.

One thread per process reads all its connections, sends heartbeats, and notices the end of a peer (the socket
closes) or its silence. Whoever joins proves that it knows the run's token, and the server proves it to the
host (HMAC-SHA256 over fresh nonces); after that frames are neither authenticated nor encrypted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import secrets
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from fldist.wire.codec import (
    FIXED_BYTES,
    MAX_HEAD_BYTES,
    MAX_NOTE_BYTES,
    Frame,
    FrameType,
    Head,
    decode,
    encode,
    head_length,
)
from fldist.wire.errors import BadMessage, DeadlineExceeded, PeerLost

MAX_HALF_OPEN = 256
"""Connections that have not proved who they are; beyond this the oldest is closed."""
HANDSHAKE_S = 10.0
_TURN_S = 0.1
"""How late silence is noticed at most."""
CLOSED_BY_PEER = "connection closed by the peer"


def proof(token: bytes, who: str, *parts: str) -> str:
    """HMAC-SHA256 of `who` and the nonces under the run's token, in hex."""
    return hmac.new(token, "|".join((who, *parts)).encode(), hashlib.sha256).hexdigest()


def new_token() -> str:
    """A random token for one run, in hex."""
    return secrets.token_hex(32)


class Connection:
    """A TCP connection that carries whole heads; writing is safe from several threads.

    `close` may be called by any thread; the plane that reads the connection frees its descriptor.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.inbox = bytearray()
        self.head_limit = MAX_NOTE_BYTES
        self.last_heard = time.monotonic()
        self.opened = self.last_heard
        self.trusted = False
        self.closed = False
        self.transport_in = 0
        self.transport_out = 0
        self.owner: Any = None
        self.end = "the connection is closed"
        """Why it is closed, for whoever still tries to use it."""
        self._lock = threading.Lock()
        self._counting = threading.Lock()

    def count(self, *, sent: int = 0, received: int = 0) -> None:
        """Add transport bytes, from any thread."""
        with self._counting:
            self.transport_out += sent
            self.transport_in += received

    def send(self, data: bytes, timeout_s: float, *, transport: bool = False) -> None:
        """Write all of `data`; PeerLost if the connection is closed, DeadlineExceeded after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._write(data, deadline)
            if transport:
                self.count(sent=len(data))

    def try_send(self, data: bytes) -> None:
        """Write a small frame if nobody else is writing and the socket has room; otherwise do nothing."""
        if self._lock.acquire(blocking=False):
            try:
                if select.select([], [self.sock], [], 0)[1]:
                    self._write(data, time.monotonic() + 1.0)
                    self.count(sent=len(data))
            except (OSError, ValueError, PeerLost, DeadlineExceeded):
                pass  # the reading side notices and reports
            finally:
                self._lock.release()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            if self.closed:
                raise PeerLost(self.end)
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded("the peer does not take what is sent to it") from None
                with contextlib.suppress(ValueError):  # closed meanwhile
                    select.select([], [self.sock], [], min(left, 0.5))
            except OSError as error:
                raise PeerLost(_text_of(error)) from None

    def close(self) -> None:
        """Close; what the other threads do with it raises PeerLost."""
        self.closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        # the descriptor stays until the plane has unregistered it: freed here, it could be another's by then


class ControlPlane:
    """One thread that reads connections and keeps them alive.

    on_frame(connection, data) gets every whole head but heartbeats; on_lost(connection, reason) is called once.
    Both are called from this thread and must not block.
    """

    def __init__(
        self,
        silence_s: float,
        on_frame: Callable[[Connection, bytes], None],
        on_lost: Callable[[Connection, str], None],
        on_accept: Callable[[Connection], None] | None = None,
        patience: float = 1.0,
    ) -> None:
        self.silence_s = silence_s  # heartbeats are sent five times in this time
        self.patience = patience  # a peer may be silent so many times as long
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_accept = on_accept
        self._selector = selectors.DefaultSelector()
        self._connections: list[Connection] = []
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._pending: list[Connection | socket.socket] = []
        self._listening: list[socket.socket] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._heartbeat = encode(Frame(Head(FrameType.HEARTBEAT)))
        self._thread = threading.Thread(target=self._run, name="fldist-control", daemon=True)
        self._thread.start()

    def add(self, connection: Connection) -> None:
        """Start to read a connection."""
        self._register(connection)

    def listen(self, sock: socket.socket) -> None:
        """Start to accept connections."""
        sock.setblocking(False)
        self._register(sock)

    def _register(self, item: Connection | socket.socket) -> None:
        with self._lock:
            self._pending.append(item)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_out.send(b"x")

    def close(self) -> None:
        """Stop the thread and close everything it reads."""
        self._stopping = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        pending = [c for c in self._pending if isinstance(c, Connection)]
        for connection in [*self._connections, *pending]:
            connection.close()
            connection.sock.close()
        for sock in [*self._listening, self._wake_in, self._wake_out]:
            sock.close()
        self._selector.close()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # without this thread nobody would notice a lost peer: all are lost
            for connection in list(self._connections):
                self._drop(connection, f"internal error: {error!r}")

    def _loop(self) -> None:
        next_beat = time.monotonic()
        last_turn = time.monotonic()
        while not self._stopping:
            ready = self._selector.select(max(0.0, min(next_beat - time.monotonic(), _TURN_S)))
            for key, _ in ready:
                self._handle(key.fileobj, key.data)
            self._take_pending()
            now = time.monotonic()
            if now - last_turn > self.silence_s / 2:
                # this process itself stood still (stopped, or the machine asleep): nobody else is to blame
                for connection in self._connections:
                    connection.last_heard = now
            last_turn = now
            next_beat = min(next_beat, now + self.silence_s / 5)  # silence_s may have been made shorter
            if now >= next_beat:
                next_beat = now + self.silence_s / 5
                for connection in [c for c in self._connections if c.trusted]:
                    connection.try_send(self._heartbeat)
            self._check_silence(now)

    def _take_pending(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for item in pending:
            if isinstance(item, Connection):
                self._connections.append(item)
                self._selector.register(item.sock, selectors.EVENT_READ, item)
            else:
                self._listening.append(item)
                self._selector.register(item, selectors.EVENT_READ, "accept")

    def _handle(self, fileobj: Any, data: Any) -> None:
        if data is None:
            with contextlib.suppress(BlockingIOError):
                self._wake_in.recv(4096)
        elif data == "accept":
            with contextlib.suppress(OSError):
                sock, _ = fileobj.accept()
                connection = Connection(sock)
                self._connections.append(connection)
                self._selector.register(sock, selectors.EVENT_READ, connection)
                if self._on_accept is not None:
                    self._on_accept(connection)
                half_open = [c for c in self._connections if not c.trusted]
                if len(half_open) > MAX_HALF_OPEN:
                    self._drop(half_open[0], "too many connections that did not join")
        else:
            self._read(data)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, _text_of(error))
            return
        if not data:
            self._drop(connection, CLOSED_BY_PEER)
            return
        connection.last_heard = time.monotonic()
        connection.inbox += data
        try:
            while len(connection.inbox) >= FIXED_BYTES:
                length = head_length(connection.inbox, connection.head_limit)
                if len(connection.inbox) < length:
                    break
                whole = bytes(connection.inbox[:length])
                del connection.inbox[:length]
                if whole[6] == FrameType.HEARTBEAT:
                    connection.count(received=length)
                else:
                    self._on_frame(connection, whole)
                if connection.closed:
                    self._drop(connection, "closed")
                    return
        except Exception as error:
            # whatever a peer sends costs its own connection, never this thread
            self._drop(connection, str(error) or repr(error))

    def _check_silence(self, now: float) -> None:
        for connection in list(self._connections):
            limit_s = self.silence_s * self.patience
            if connection.trusted and now - connection.last_heard > limit_s:
                self._drop(connection, f"silent for {limit_s:g} s")
            elif not connection.trusted and self._on_accept and now - connection.opened > HANDSHAKE_S:
                self._drop(connection, f"did not join within {HANDSHAKE_S:g} s")
            elif connection.closed:
                self._drop(connection, "closed")

    def _drop(self, connection: Connection, reason: str) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.end = reason
        connection.close()
        connection.sock.close()
        self._on_lost(connection, reason)


def _text_of(error: OSError) -> str:
    if error.errno in (errno.EPIPE, errno.ECONNRESET):
        return CLOSED_BY_PEER
    return f"connection broken: {error.strerror}"


def trust(connection: Connection) -> None:
    """From now on this connection may send large heads and must not fall silent."""
    connection.trusted = True
    connection.head_limit = MAX_HEAD_BYTES
    connection.last_heard = time.monotonic()


def control_frame(data: bytes, *types: FrameType) -> Frame:
    """Decode a frame that must be one of the given control types."""
    frame = decode(data, None)
    if frame.head.type not in types:
        raise BadMessage(f"a {frame.head.type.name} frame where {' or '.join(t.name for t in types)} is due")
    return frame
