"""The world group: broadcast, gather and reduction between all ranks of a run at once.

For the topologies `collective` and `reduce`. Here are the interface and gloo, which works in the CPU's memory; NCCL is
in `nccl.py`. Every rank takes part in every operation, in the same order; what order that is, the server decides. An
operation cannot go on without a rank that is gone, so `release` ends it on this rank, and the group with it: nothing
here survives a loss.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fldist import blocks
from fldist.wire.link import How, Limits
from fldist.wire.pair import Meeting

_UNBLOCK_TAG = 1
ALIGNMENT = 64
"""Parts that are gathered begin at multiples of this many bytes, as blocks do elsewhere."""


def room(sizes: Sequence[int]) -> int:
    """Bytes that parts of these sizes take in a gathered buffer."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def packed(parts: Sequence[Tensor], capacity: int) -> Tensor:
    """Byte tensors one after the other, aligned, in a buffer of `capacity` bytes; the rest of it is zero."""
    buffer = blocks.empty(capacity, torch.uint8)
    pack(buffer, 0, parts)
    return buffer


def pack(window: Tensor, start: int, parts: Sequence[Tensor]) -> None:
    """Fill a window of the buffer that `packed` makes of these parts, uint8 [N], which begins at byte `start` of it.

    The window may lie on another device than the parts.
    """
    stop = start + window.numel()
    done = at = 0
    for part in parts:
        first, last = max(at, start), min(at + part.numel(), stop)
        if first < last:
            window[done : first - start].zero_()
            window[first - start : last - start] = part[first - at : last - at]
            done = last - start
        at += room([part.numel()])
    window[done:].zero_()


def kept(part: Tensor, buffer: Tensor) -> Tensor:
    """A part of a gathered buffer for whoever may keep it: a small one alone must not hold the whole buffer."""
    return blocks.copy(part) if 4 * part.numel() < buffer.numel() else part


def unpacked(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The byte tensors of these sizes that `packed` put into a buffer, as views of it."""
    parts, at = [], 0
    for size in sizes:
        parts.append(buffer[at : at + size])
        at += room([size])
    return parts


@dataclass(frozen=True)
class Members:
    """What a world is made of: this rank and how many there are, the rendezvous store of all, what tells this machine's
    address towards the others, and the limits on waiting."""

    rank: int
    size: int
    store: Any
    address: Callable[[], str]
    limits: Limits


class World(ABC):
    """This rank's end of the group; rank 0 is the root. One operation at a time.

    Every operation blocks until it has ended here or `release` is called. Errors are RuntimeErrors.
    """

    def __init__(self, members: Members) -> None:
        self.members = members
        self.rank = members.rank
        self._releasing = threading.Lock()
        self._releaser: threading.Thread | None = None

    @abstractmethod
    def open(self) -> None:
        """Meet the other ranks, as far as that is done before the first operation."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> None:
        """Have the root's bytes in everybody's tensor: uint8 [N]."""

    @abstractmethod
    def gather(self, parts: Sequence[Tensor], capacity: int) -> dict[int, Tensor]:
        """Bring what `packed` makes of all ranks' parts to the root; `capacity` bytes each, the same at all ranks.

        Returns the other ranks' buffers, in the CPU's memory, by rank at the root, and nothing elsewhere. parts: byte
        tensors, none at the root.
        """

    @abstractmethod
    def reduce(self, block: Tensor, how: How) -> None:
        """Have the sum or the largest of all ranks' int64 blocks in the root's; the others' hold anything after it."""

    @abstractmethod
    def release(self) -> None:
        """Free who waits in an operation, from another thread; once. Nothing can be done afterwards."""

    def release_aside(self) -> None:
        """Have a thread of its own call `release`, the first time; it may take a while."""
        with self._releasing:
            if self._releaser is None:
                self._releaser = threading.Thread(target=self.release, name="fldist-unblock", daemon=True)
                self._releaser.start()

    def wait_released(self, timeout_s: float) -> None:
        """Wait until `release_aside` is done, if it has begun."""
        if self._releaser is not None:
            self._releaser.join(timeout_s)


MakeWorld = Callable[[Members], World]


def begin_broadcast(group: Any, tensor: Tensor, limit: timedelta | None = None) -> Any:
    """Begin a broadcast from rank 0 in a group of torch's; returns the work. limit: on its time, where gloo looks at it
    (a wait's own limit does not lift the group's)."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    if limit is not None:
        options.timeout = limit
    return group.broadcast([tensor], options)


def begin_gather(group: Any, theirs: Sequence[Tensor], mine: Tensor, limit: timedelta | None = None) -> Any:
    """Begin to gather all ranks' tensors into the root's `theirs`, by rank; elsewhere that is empty."""
    options = dist.GatherOptions()
    options.rootRank = 0
    if limit is not None:
        options.timeout = limit
    return group.gather([list(theirs)] if theirs else [], [mine], options)


def begin_reduce(group: Any, block: Tensor, how: How, limit: timedelta | None = None) -> Any:
    """Begin to combine all ranks' blocks in the root's."""
    options = dist.ReduceOptions()
    options.rootRank = 0
    if limit is not None:
        options.timeout = limit
    options.reduceOp = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX  # type: ignore[assignment]
    return group.reduce([block], options)


class GlooWorld(World):
    """A group of gloo between all ranks; what it is given lies in the CPU's memory."""

    def __init__(self, members: Members) -> None:
        super().__init__(members)
        self._transfer = timedelta(seconds=members.limits.transfer_s)
        self._meeting = Meeting(members.store, members.rank, members.size, members.address, members.limits)
        self._group: Any = None
        self._over = False

    def open(self) -> None:
        """Connect to all other ranks; waits for them until `release`."""
        self._group = self._meeting.group()
        if self._over:  # whoever released it found no group to close
            self._group = None
            raise RuntimeError("the session has ended")

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast in place."""
        begin_broadcast(self._group, tensor, self._transfer).wait(self._transfer)

    def gather(self, parts: Sequence[Tensor], capacity: int) -> dict[int, Tensor]:
        """Gather whole buffers."""
        mine = packed(parts, capacity)
        theirs = [blocks.empty(mine.shape, mine.dtype) for _ in range(self.members.size)] if self.rank == 0 else []
        begin_gather(self._group, theirs, mine, self._transfer).wait(self._transfer)
        return dict(list(enumerate(theirs))[1:])

    def reduce(self, block: Tensor, how: How) -> None:
        """Reduce in place."""
        begin_reduce(self._group, block, how, self._transfer).wait(self._transfer)

    def release(self) -> None:
        """Free who waits: for the others to come, or in the group, whose pairs a wait that times out closes."""
        self._over = True
        group = self._group
        if group is None:
            self._meeting.leave()
        else:
            with contextlib.suppress(RuntimeError):
                dummy = torch.empty(1, dtype=torch.uint8)
                other = 1 if self.rank == 0 else 0
                group.recv([dummy], other, _UNBLOCK_TAG).wait(timedelta(milliseconds=1))


class WorldThread:
    """Does the root's operations one after the other, so that the round loop need not wait for them.

    failed: told why an operation did not end; nothing is done afterwards.
    """

    def __init__(self, world: World, failed: Callable[[str], None]) -> None:
        self._world = world
        self._failed = failed
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fldist-world", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], None]) -> None:
        """Have this done after what was asked for before."""
        self._work.put(work)

    def _run(self) -> None:
        try:
            while (work := self._work.get()) is not None:
                work()
        except Exception as error:  # those of a world are RuntimeErrors; without this thread nothing goes on
            self._failed(str(error).partition("\n")[0] or repr(error))

    def close(self, timeout_s: float) -> None:
        """End the thread; what it waits for is released."""
        deadline = time.monotonic() + timeout_s
        self._work.put(None)
        self._world.release_aside()
        self._thread.join(timeout_s)
        self._world.wait_released(max(0.0, deadline - time.monotonic()))
