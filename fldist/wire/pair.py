"""What carries bodies between the server and one host: a two-rank group of some backend, behind one small interface.

A `Session` decides what is sent and when; a pair moves tensors, and is ended by `unblock`. Here are the interface and
gloo; NCCL is in `nccl.py`. A group of two contains the damage: a wait that fails closes all pairs of its group, and
there is only this one.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fldist.wire.link import Limits

_BODY_TAG = 0
_UNBLOCK_TAG = 1
_TRAILER_TAG = 2


@dataclass(frozen=True)
class Ends:
    """What a pair is made of: this member's number (0: the server, 1: the host), the rendezvous store of the two,
    what tells this machine's address towards the other, and the limits on waiting."""

    me: int
    store: Any
    address: Callable[[], str]
    limits: Limits

    @property
    def peer(self) -> int:
        """The other member's number."""
        return 1 - self.me


class Pair(ABC):
    """Two members of a group. One thread sends, another receives, any may call `unblock`.

    `send` and `receive` begin a transfer and return what must stay alive until it is over, for `sent` or `received`.
    Tensors are flat uint8 bodies, all of known size; behind them goes the trailer, int64 [3].
    """

    @abstractmethod
    def open(self) -> None:
        """Make the group, as far as it is made before anything is sent; RuntimeError when that fails."""

    @abstractmethod
    def send(self, bodies: Sequence[Tensor], trailer: Tensor) -> Any:
        """Begin to send."""

    @abstractmethod
    def sent(self, transfer: Any) -> None:
        """End a `send` whose arrival the peer has acknowledged."""

    @abstractmethod
    def receive(self, bodies: Sequence[Tensor], trailer: Tensor) -> Any:
        """Begin to receive into these tensors."""

    @abstractmethod
    def received(self, transfer: Any) -> None:
        """Wait until all is there; RuntimeError or TransportError when it will not be."""

    @abstractmethod
    def unblock(self) -> None:
        """Have whoever waits in the group fail. Nothing can be transferred afterwards."""


MakePair = Callable[[Ends], Pair]


def gloo_group(store: Any, rank: int, size: int, address: str, limits: Limits) -> Any:
    """Meet the others of a group of gloo; address: this machine's, towards them."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=limits.join_s)
    return dist.ProcessGroupGloo(store, rank, size, options)


class Meeting:
    """Where one rank meets the others of a group of gloo, once, and leaves when they do not come.

    Gloo begins when all have told each other their addresses through the store. From then on it waits for those who are
    to connect to this rank, five times as long as its limit, and no error of theirs and no call ends that.
    """

    def __init__(self, store: Any, rank: int, size: int, address: Callable[[], str], limits: Limits) -> None:
        self._members = store, rank, size
        self._address = address
        self._limits = limits
        self._at = ""

    def group(self) -> Any:
        """Meet the others; RuntimeError when one does not come, or when the store was shut before all were there."""
        self._at = self._address()
        return gloo_group(*self._members, self._at, self._limits)

    def leave(self) -> None:
        """Have `group` return, its store being shut: connections of our own take the places of all who may be missing.

        What it returns then leads to nobody. Not freed is who connects to a machine that does not answer at all.
        """
        told = self._members[0].told
        if told is None:  # gloo will ask a store that is shut
            return
        port, numbers = _listens(told)
        for at in range(0, len(numbers), 8):
            with contextlib.suppress(OSError), socket.create_connection((self._at, port), timeout=1.0) as connection:
                connection.sendall(numbers[at : at + 8])


def _listens(told: bytes) -> tuple[int, bytes]:
    """The port in what gloo tells the others through the store, and the 8 bytes a rank by which each says who it is.

    These are, each behind its size in 8 bytes, a host name and a `sockaddr` with something behind it; then the numbers.
    """
    rest = told
    for _ in range(2):
        size = int.from_bytes(rest[:8], sys.byteorder)
        field, rest = rest[8 : 8 + size], rest[8 + size :]
    return int.from_bytes(field[2:4], "big"), rest


class GlooPair(Pair):
    """A two-rank group of gloo; bodies lie in the CPU's memory.

    gloo does not report a peer's death on the message in flight, and nothing frees a thread that waits on it. So who
    receives waits for the trailer, which fails with the peer, and only then calls the bodies' own waits, which return
    at once. A wait on a trailer whose peer has merely stopped is freed by failing a dummy receive of the same group.
    """

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._transfer = timedelta(seconds=ends.limits.transfer_s)
        self._meeting = Meeting(ends.store, ends.me, 2, ends.address, ends.limits)
        self._group: Any = None

    def open(self) -> None:
        """Connect to the peer; waits for it until `unblock`."""
        self._group = self._meeting.group()

    def send(self, bodies: Sequence[Tensor], trailer: Tensor) -> Any:
        """Begin to send."""
        works = [self._group.send([body], self._ends.peer, _BODY_TAG) for body in bodies]
        works.append(self._group.send([trailer], self._ends.peer, _TRAILER_TAG))
        return works

    def sent(self, transfer: Any) -> None:
        """Let gloo take note of what has arrived."""
        for work in transfer:
            work.wait(self._transfer)

    def receive(self, bodies: Sequence[Tensor], trailer: Tensor) -> Any:
        """Begin to receive."""
        works = [self._group.recv([body], self._ends.peer, _BODY_TAG) for body in bodies]
        return works, self._group.recv([trailer], self._ends.peer, _TRAILER_TAG)

    def received(self, transfer: Any) -> None:
        """Wait for the trailer, then for what came before it."""
        works, last = transfer
        last.wait(self._transfer)
        for work in works:
            work.wait(self._transfer)

    def unblock(self) -> None:
        """Free who waits: for the peer to come, or in the group, whose pairs a wait that times out closes."""
        if self._group is None:
            self._meeting.leave()
        else:
            with contextlib.suppress(RuntimeError):
                dummy = torch.empty(1, dtype=torch.uint8)
                self._group.recv([dummy], self._ends.peer, _UNBLOCK_TAG).wait(timedelta(milliseconds=1))
