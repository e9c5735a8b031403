"""What carries bodies between the server and one host: a two-rank group of some backend, behind one small interface.

A `Session` decides what is sent and when; a pair moves tensors, and is ended by `unblock`. Here are the interface and
gloo; NCCL is in `nccl.py`. A group of two contains the damage: a wait that fails closes all pairs of its group, and
there is only this one.
"""

from __future__ import annotations

import contextlib
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


class GlooPair(Pair):
    """A two-rank group of gloo; bodies lie in the CPU's memory.

    gloo does not report a peer's death on the message in flight, and nothing frees a thread that waits on it. So who
    receives waits for the trailer, which fails with the peer, and only then calls the bodies' own waits, which return
    at once. A wait on a trailer whose peer has merely stopped is freed by failing a dummy receive of the same group.
    """

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self._transfer = timedelta(seconds=ends.limits.transfer_s)
        self._group: Any = None

    def open(self) -> None:
        """Connect to the peer; waits for it as long as `join_s`."""
        self._group = gloo_group(self._ends.store, self._ends.me, 2, self._ends.address(), self._ends.limits)

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
        """Free threads that are blocked in the group: a wait that times out closes all its pairs."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                dummy = torch.empty(1, dtype=torch.uint8)
                self._group.recv([dummy], self._ends.peer, _UNBLOCK_TAG).wait(timedelta(milliseconds=1))
