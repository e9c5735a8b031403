"""gloo: the server's and a host's end. Bodies go over a two-rank group per host (`session.py`) or the group of all
ranks (`world.py`), everything else over the TCP control plane (`control.py`); here hosts are admitted, and sessions are
turned into a link's events. With NCCL as the carrier the groups are NCCL's, and all else is the same.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fldist import blocks
from fldist.wire.carrier import GLOO, Carrier
from fldist.wire.codec import CHECKSUMMED, Frame, FrameType, Head, encode
from fldist.wire.control import Connection, ControlPlane, control_frame, new_token, proof, trust
from fldist.wire.errors import BadMessage, DeadlineExceeded, PeerLost, TransportError
from fldist.wire.link import (
    HOST_QUEUE,
    PATIENCE,
    Combined,
    HostLink,
    How,
    Joined,
    Limits,
    Lost,
    RanksLink,
    Received,
    Sent,
    Welcome,
    own_info,
)
from fldist.wire.network import pair_address
from fldist.wire.session import Session, Store
from fldist.wire.world import Members, World, WorldThread, kept, room, unpacked

MAX_RANKS = 4096
"""Ranks whose rendezvous a host makes room for."""


class GlooServer(RanksLink):
    """The server's end: listens, admits hosts that know the token, keeps a session for each.

    carrier: what carries bodies; empty: makes the tensors that a host's are received into.
    """

    def __init__(
        self,
        *,
        ranks: list[int],
        limits: Limits,
        token: str | None = None,
        bind: str = "127.0.0.1",
        port: int = 0,
        checksum: bool = False,
        survives: str = "",
        carrier: Carrier = GLOO,
        empty: Callable[..., Tensor] = blocks.empty,
    ) -> None:
        super().__init__()
        self._carrier = carrier
        self._empty = empty
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
        try:
            listener = socket.create_server((bind, port), family=family, backlog=1024)
        except OSError as error:
            raise ValueError(
                f"network.control_port: {bind} port {port or 'any'} cannot be listened on ({error.strerror}); "
                "choose another port, the same at every rank"
            ) from None
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._plane = ControlPlane(limits.silence_s, self._frame, self._gone, on_accept=lambda connection: None)
        self._listener = listener
        self._world: World | None = None
        self._world_thread: WorldThread | None = None
        self._world_store: Store | None = None
        self._somebody_lost = threading.Event()
        self._padding = 0
        self.rendezvous: Any = None
        """Torchrun's store, through which hosts find this server; it must live as long as they may look for it."""

    @property
    def survives(self) -> str:
        """One line: what this backend and launcher can survive."""
        return self._survives

    def admit(self, welcome: Welcome) -> None:
        """Start to accept hosts."""
        self._welcome = welcome
        self._plane.listen(self._listener)

    def publish(self, key: str, value: str) -> None:
        """Set a key of `rendezvous`, and count it."""
        self.rendezvous.set(key, value)
        self._old_transport[1] += len(key.encode()) + len(value.encode())

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
        connection.count(received=len(data))
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
            pair=self._carrier.pair,
        )
        session.rank = rank
        session.expected = self.expected
        session.world_store = self._relay
        session.empty = self._empty
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
        self.connected.discard(session.rank)
        if self._world_store is not None:
            self._world_store.shut()
        if self._world is not None:
            self._world.release_aside()
        if not self._closing:
            self.events.put(Lost(session.rank, reason))
        self._somebody_lost.set()
        self._sessions.pop(session.rank, None)  # last: only now may it join again, so `Joined` comes after `Lost`

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

    # ---- all ranks at once
    def _tell_all(self, key: str, value: bytes) -> None:
        for session in list(self._sessions.values()):
            session.publish_world(key, value)

    def _relay(self, sender: Session, key: str, value: bytes) -> None:
        """Take what a host has set in the world group's store, and tell the other hosts."""
        if self._world_store is None:
            raise BadMessage("the rendezvous of a group of all ranks, and there is none")
        self._world_store.receive(key, value)
        for session in list(self._sessions.values()):
            if session is not sender:
                with contextlib.suppress(TransportError):  # its own thread notices
                    session.publish_world(key, value)

    def open_world(self) -> None:
        """Meet all hosts in a group."""
        size = len(self._ranks) + 1
        sessions = list(self._sessions.values())
        if not sessions:
            return  # its loss is about to be told
        self._world_store = Store(self._tell_all, self.limits.join_s, size)
        members = Members(0, size, self._world_store, sessions[0].address, self.limits)
        world = self._world = self._carrier.world(members)
        self._world_thread = WorldThread(world, self._world_failed)
        for rank in self._ranks:
            self.post(rank, Frame(Head(FrameType.WORLD), note={"size": size}))
        self._world_thread.do(world.open)

    def _world_failed(self, reason: str) -> None:
        self._somebody_lost.wait(self.limits.silence_s)  # whose fault it was should be told first
        if not self._closing:
            for session in list(self._sessions.values()):
                session.end(f"the exchange between all ranks failed: {reason}")

    def broadcast(self, frames: Mapping[int, Frame]) -> list[int]:
        """Post all frames; their parts for all ranks are broadcast once."""
        gone = [rank for rank, frame in frames.items() if not self.post(rank, frame)]
        parts = next(iter(frames.values())).world

        def work() -> None:
            assert self._world is not None
            for part in parts:
                self._world.broadcast(part.flat())

        self._all_ranks(work)
        return gone

    def gather(self, frames: Mapping[int, Sequence[Frame]]) -> None:
        """Ask all hosts for their replies' parts, and fill these in."""
        parts = {rank: [p for frame in theirs for p in frame.world] for rank, theirs in frames.items()}
        sizes = {rank: [p.bytes for p in theirs] for rank, theirs in parts.items()}
        capacity = max(room(s) for s in sizes.values())
        self._padding += capacity * len(self._ranks) - sum(map(sum, sizes.values()))
        for rank in self._ranks:
            self.post(rank, Frame(Head(FrameType.GATHER), note={"bytes": capacity}))

        def work() -> None:
            assert self._world is not None
            buffers = self._world.gather([], capacity)
            for rank, theirs in parts.items():
                for part, raw in zip(theirs, unpacked(buffers[rank], sizes[rank]), strict=True):
                    part.tensor = kept(raw, buffers[rank]).view(part.dtype).view(part.shape)
            self.events.put(Combined())

        self._all_ranks(work)

    def reduce(self, blocks: Sequence[tuple[Tensor, How]]) -> None:
        """Ask all hosts for their blocks, and add them up."""
        told = [[block.numel(), how] for block, how in blocks]
        for rank in self._ranks:
            self.post(rank, Frame(Head(FrameType.REDUCE), note={"blocks": told}))

        def work() -> None:
            assert self._world is not None
            for block, how in blocks:
                if block.numel():
                    self._world.reduce(block, how)
            self.events.put(Combined())

        self._all_ranks(work)

    def _all_ranks(self, work: Callable[[], None]) -> None:
        if self._world_thread is not None:
            self._world_thread.do(work)

    def abort(self, rank: int, reason: str) -> None:
        """End a host's session."""
        session = self._sessions.get(rank)
        if session is not None:
            session.end(reason)

    def transport_bytes(self) -> tuple[int, int]:
        """Heartbeats, joins, acknowledgements, rendezvous."""
        connections = [s.connection for s in list(self._sessions.values())]
        return (
            self._old_transport[0] + sum(c.transport_in for c in connections) + self._padding,
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
        if self._world_store is not None:
            self._world_store.shut()
        if self._world_thread is not None:
            self._world_thread.close(1.0)
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
    """A host's end. carrier_for: chooses what carries bodies, by the server's welcome."""

    def __init__(
        self,
        address: tuple[str, int],
        rank: int,
        token: str,
        limits: Limits,
        carrier_for: Callable[[dict[str, Any]], Carrier] = lambda welcome: GLOO,
    ) -> None:
        super().__init__()
        self._frames: queue.Queue[Frame | str] = queue.Queue()
        self._raw: queue.Queue[bytes | str] = queue.Queue()
        self._session: Session | None = None
        self._rank = rank
        self._world: World | None = None
        self._world_store: Store | None = None
        self._owed: list[Tensor] = []  # this call's replies, as bytes: what the server will ask all ranks for
        self._hand_over = threading.Lock()
        self._join_s = limits.join_s
        deadline = time.monotonic() + limits.join_s
        connected = _connect(address, deadline)
        try:
            pair_address(connected)  # where it cannot be had, this host says so before it joins
        except ValueError:
            connected.close()
            raise
        self._connection = Connection(connected)
        self._plane = ControlPlane(limits.silence_s, self._frame, self._gone, patience=PATIENCE)
        self._plane.add(self._connection)
        try:
            note = self.welcome = self._shake_hands(rank, bytes.fromhex(token), deadline)
            self.identity = (bytes.fromhex(note["run_id"]), int(note["epoch"]), int(note["incarnation"]))
            limits = Limits(limits.join_s, float(note["silence_s"]), float(note["transfer_s"]))
            checksum = bool(note["checksum"])
            self._carrier = carrier_for(note)
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
            queue_size=HOST_QUEUE,
            checksum=checksum,
            pair=self._carrier.pair,
        )
        self._world_store = Store(self._session.publish_world, limits.join_s, MAX_RANKS)
        self._session.world_store = self._set_elsewhere
        self._session.receive_world = self._receive_world
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
        if frame.head.type is FrameType.WORLD:
            assert self._world_store is not None
            size = int(frame.note["size"])
            members = Members(self._rank, size, self._world_store, session.address, session.limits)
            world = self._world = self._carrier.world(members)
            world.open()
            if session.ended:  # before there was something to release
                world.release_aside()
            return
        self._frames.put(frame)

    def _set_elsewhere(self, session: Session, key: str, value: bytes) -> None:
        assert self._world_store is not None
        self._world_store.receive(key, value)

    def _receive_world(self, frame: Frame) -> None:
        assert self._session is not None
        frame.allocate_world(self._session.empty)
        for part in frame.world:
            self._together(functools.partial(_broadcast, part.flat()))

    def _session_lost(self, session: Session, reason: str) -> None:
        self._frames.put(reason)
        if self._world_store is not None:
            self._world_store.shut()
        if self._world is not None:
            self._world.release_aside()

    # ---- in the main thread
    def ready(self) -> None:
        """Tell the server that calls may come; `expected` must be set."""
        assert self._session is not None and self.expected is not None
        self._session.empty = self.empty
        self._session.expected = self.expected
        self.send(Frame(Head(FrameType.READY), note=own_info(self.about)))

    def recv(self) -> Frame:
        """The next frame; waits as long as the server is alive."""
        item = self._frames.get()
        if isinstance(item, str):
            self._frames.put(item)
            raise PeerLost(f"the server is gone: {item}")
        if (item.bodies or item.world) and self._session is not None:
            self._session.release()  # the next call's bodies may come while this one is worked on
        if item.head.type is FrameType.CALL:
            self._owed.clear()
        return item

    def send(self, frame: Frame) -> None:
        """Queue a frame; the writer encodes it just before it is sent."""
        assert self._session is not None
        frame.head.run_id, frame.head.epoch, frame.head.incarnation = self.identity
        self._owed += [part.flat() for part in frame.world]
        self._session.put(frame)

    def gather(self, capacity: int) -> None:
        """Give the root this call's replies."""
        if room([part.numel() for part in self._owed]) > capacity:
            raise BadMessage(f"the server asks for {capacity} bytes of replies, and there are more")
        self._together(lambda world: world.gather(self._owed, capacity))
        self._owed.clear()

    def reduce(self, blocks: Sequence[tuple[Tensor, How]]) -> None:
        """Add these blocks to the root's."""
        for block, how in blocks:
            if block.numel():
                self._together(functools.partial(_reduce, block, how))

    def _together(self, work: Callable[[World], object]) -> None:
        if self._world is None:
            raise BadMessage("something for all ranks, and there is no group of all ranks")
        try:
            work(self._world)
        except RuntimeError as error:
            assert self._session is not None
            self._session.wait_ended()  # another host is gone: the server should hear of that one first
            raise PeerLost(f"the exchange between all ranks failed: {str(error).partition(chr(10))[0]}") from None

    def close(self) -> None:
        """Flush what is queued, hang up, end the threads."""
        assert self._session is not None
        if not self._session.ended:
            self._session.flush(10.0)
        self._session.end("closed")
        self._session.join_threads(5.0)
        if self._world is not None:
            self._world.wait_released(5.0)
        self._plane.close()


def _broadcast(part: Tensor, world: World) -> None:
    world.broadcast(part)


def _reduce(block: Tensor, how: How, world: World) -> None:
    world.reduce(block, how)


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
