"""The interface of the transport: what the round loop and a host see of gloo, MPI or the in-process link.

Server side: `post` never blocks, `next_event` has a timeout, a lost host is an event and never an exception.
Host side: `recv` and `send` have deadlines and raise `PeerLost`. A link moves frames; it knows nothing of rounds.
"""

from __future__ import annotations

import os
import queue
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fldist import blocks
from fldist.wire.codec import Expected, Frame, FrameType, Head
from fldist.wire.errors import BadMessage

How = Literal["sum", "max"]
"""How the blocks of all ranks are combined."""
COUNTED_BY_MESSAGE = (FrameType.CALL, FrameType.REPLY)
"""Frames whose bytes the ledger counts message by message; all others are transport."""
PATIENCE = 4.0
"""A host gives up a silent server after so many times the limit that the server has for it: the server serves many,
and a host that leaves a busy one in haste is a loss that nobody needed."""
HOST_QUEUE = 2
"""Frames that a host may have waiting: one on the wire, one behind it, while the next client trains."""


@dataclass(frozen=True)
class Limits:
    """Every wait has one of these. join_s: from start to the last host's joining; silence_s: a peer of which
    nothing was heard (heartbeats included) for so long is lost; transfer_s: one body's way."""

    join_s: float = 60.0
    silence_s: float = 5.0
    transfer_s: float = 3600.0


@dataclass(frozen=True)
class Joined:
    """A host is ready for calls. offset_ns: add it to the host's clock to get the server's."""

    rank: int
    incarnation: int
    info: dict[str, Any]
    offset_ns: int


@dataclass(frozen=True)
class Lost:
    """A host is gone; its outstanding replies will not come."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Sent:
    """A host acknowledged a frame with all its bodies."""

    rank: int
    seq: int
    sent_ns: int
    done_ns: int


@dataclass(frozen=True)
class Received:
    """A complete frame from a host. Call `release` when its bodies are used up: until then no further bodies are
    received from this host, so that the server holds one receive window a host."""

    rank: int
    frame: Frame
    done_ns: int
    release: Callable[[], None]


@dataclass(frozen=True)
class Combined:
    """A gather or a reduction between all ranks has ended: what it fills in is there."""


Event = Joined | Lost | Sent | Received | Combined


@dataclass(frozen=True)
class Welcome:
    """What a host is told when it joins."""

    run_id: bytes
    epoch: int
    config: dict[str, Any]
    checksum: bool = False
    directory: str = ""
    """The run's directory, for the hosts' logs where they can see it."""
    backend: str = "gloo"
    """What carries bodies: `auto` in the configuration is decided by the server."""

    def note(self, incarnation: int, limits: Limits) -> dict[str, Any]:
        """As the note of a WELCOME frame."""
        return {
            "run_id": self.run_id.hex(),
            "epoch": self.epoch,
            "incarnation": incarnation,
            "config": self.config,
            "silence_s": limits.silence_s,
            "transfer_s": limits.transfer_s,
            "checksum": self.checksum,
            "directory": self.directory,
            "backend": self.backend,
        }


def own_info(about: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a host says of itself when it is ready; about: what its owner adds."""
    return {"pid": os.getpid(), "hostname": socket.gethostname(), "clock_ns": time.monotonic_ns(), **(about or {})}


def check_session(head: Head, run_id: bytes, epoch: int, incarnation: int) -> None:
    """Refuse a frame of another run, server epoch or incarnation."""
    if (head.run_id, head.epoch, head.incarnation) != (run_id, epoch, incarnation):
        raise BadMessage(
            f"a frame of run {head.run_id.hex()}, epoch {head.epoch}, incarnation {head.incarnation}; this is "
            f"{run_id.hex()}, {epoch}, {incarnation}"
        )


class ServerLink(ABC):
    """The server's end."""

    expected: Expected | None = None
    """What replies may look like; set before the first call."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.seq = 0
        self.connected: set[int] = set()
        """Ranks that have begun to join and are not lost."""

    @property
    @abstractmethod
    def survives(self) -> str:
        """One line: what this backend and launcher can survive."""

    @abstractmethod
    def admit(self, welcome: Welcome) -> None:
        """Begin to admit hosts; `expected` must be set."""

    @abstractmethod
    def post(self, rank: int, frame: Frame) -> bool:
        """Encode a frame and queue it, without blocking; False if the host is gone and nothing was queued.

        The frame's head gets its sequence number and length.
        """

    @abstractmethod
    def abort(self, rank: int, reason: str) -> None:
        """End a host's session; `Lost` follows unless it was lost already."""

    @abstractmethod
    def transport_bytes(self) -> tuple[int, int]:
        """Bytes (up, down) of heartbeats, joins, acknowledgements and rendezvous so far."""

    @abstractmethod
    def close(self, deadline_s: float) -> None:
        """Say goodbye to all hosts, wait for them at most `deadline_s`, free everything."""

    def next_event(self, timeout_s: float | None) -> Event | None:
        """The next event, or None after `timeout_s` seconds (None: wait for ever; heartbeats bound silence)."""
        try:
            return self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def number(self, frame: Frame) -> None:
        """Give a frame its sequence number."""
        self.seq += 1
        frame.head.seq = self.seq
        frame.head.sent_ns = time.monotonic_ns()


class RanksLink(ServerLink):
    """The server's end towards several ranks, which can also exchange all at once."""

    @abstractmethod
    def open_world(self) -> None:
        """Begin to exchange with all hosts at once, all being there; calls of the three methods below may follow."""

    @abstractmethod
    def broadcast(self, frames: Mapping[int, Frame]) -> list[int]:
        """Post a frame to every host, as `post` does; their parts for all ranks are the same tensors, and travel once.

        Returns the hosts to which nothing could be queued.
        """

    @abstractmethod
    def gather(self, frames: Mapping[int, Sequence[Frame]]) -> None:
        """Have the parts for all ranks of every host's replies, in the order they came in; `Combined` follows."""

    @abstractmethod
    def reduce(self, blocks: Sequence[tuple[Tensor, How]]) -> None:
        """Combine all hosts' int64 blocks into these, in place; `Combined` follows."""


class HostLink(ABC):
    """A host's end."""

    expected: Expected | None = None
    """What calls may look like; set before `ready`."""
    empty: Callable[..., Tensor] = staticmethod(blocks.empty)
    """Makes the tensors that bodies are received into; set before `ready`."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        """What `ready` tells the server beside the link's own facts."""
        self.latest: tuple[int, int] = (0, 0)
        """(round, attempt) of the newest call that has arrived, also of one not yet taken by `recv`."""

    welcome: dict[str, Any]
    """The server's WELCOME: run id, epoch, incarnation, configuration."""

    @abstractmethod
    def ready(self) -> None:
        """Tell the server that calls may come; `expected` must be set."""

    @abstractmethod
    def recv(self) -> Frame:
        """The next frame; raises PeerLost when the server is gone or silent."""

    @abstractmethod
    def send(self, frame: Frame) -> None:
        """Queue a frame; blocks while several large ones wait, raises PeerLost when the server is gone."""

    @abstractmethod
    def gather(self, capacity: int) -> None:
        """Give the root what it asks for: the parts for all ranks of this call's replies, in `capacity` bytes."""

    @abstractmethod
    def reduce(self, blocks: Sequence[tuple[Tensor, How]]) -> None:
        """Add these int64 blocks to the root's; they hold anything afterwards."""

    @abstractmethod
    def close(self) -> None:
        """Flush and end the session."""

    def saw(self, head: Head) -> None:
        """Note a frame's round, so that the work for an older one can be left; nothing is due after BYE."""
        if head.type is FrameType.BYE:
            self.latest = (2**32, 0)
        elif head.type in (FrameType.CALL, FrameType.DIGEST):
            self.latest = max(self.latest, (head.round, head.attempt))
