"""MPI: the server's and a host's end. Heads, bodies and heartbeats go over MPI itself; the calls are made by the I/O
thread of `engine.py`.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fldist import blocks
from fldist.wire.codec import (
    CHECKSUMMED,
    Frame,
    FrameType,
    Head,
    encode,
)
from fldist.wire.engine import NOBODY, Engine, Peer
from fldist.wire.errors import BadMessage, DeadlineExceeded, PeerLost
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
from fldist.wire.ulfm import ulfm
from fldist.wire.world import kept, packed, room, unpacked

log = logging.getLogger("fldist.mpi")

SPAWNED = ("-m", "fldist", "_spawned")
"""What Python runs in a replacement; its arguments are the rank and the limit on joining, in seconds."""


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


class MpiServer(RanksLink):
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
        self.identity = NOBODY
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
