"""The world group: broadcast, gather and reduction between all ranks of a run at once, over torch.distributed.

For the topologies `collective` and `reduce` of gloo and NCCL. Every rank takes part in every operation, in the same
order; what order that is, the server decides. An operation cannot go on without a rank that is gone, so `release` ends
it on this rank, and the group with it: nothing here survives a loss.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fldist import blocks

How = Literal["sum", "max"]
_UNBLOCK_TAG = 1
ALIGNMENT = 64
"""Parts that are gathered begin at multiples of this many bytes, as blocks do elsewhere."""


def room(sizes: Sequence[int]) -> int:
    """Bytes that parts of these sizes take in a gathered buffer."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def packed(parts: Sequence[Tensor], capacity: int) -> Tensor:
    """Byte tensors one after the other, aligned, in a buffer of `capacity` bytes; the rest of it is zero."""
    buffer = blocks.empty(capacity, torch.uint8)
    at = 0
    for part in parts:
        end = at + part.numel()
        buffer[at:end] = part
        at += room([part.numel()])
        buffer[end:at].zero_()
    buffer[at:].zero_()
    return buffer


def unpacked(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The byte tensors of these sizes that `packed` put into a buffer, as views of it."""
    parts, at = [], 0
    for size in sizes:
        parts.append(buffer[at : at + size])
        at += room([size])
    return parts


class World:
    """This rank's end of the group. Every method blocks until the operation has ended here, or `release` is called.

    make: makes the group, which is a rendezvous of all ranks. Rank 0 is the root. Errors are RuntimeErrors.
    """

    def __init__(self, make: Callable[[], Any], rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._make = make
        self._group: Any = None
        self._timeout = timedelta(seconds=timeout_s)
        self._released = False

    def open(self) -> None:
        """Meet the other ranks."""
        self._group = self._make()

    def broadcast(self, tensor: Tensor) -> None:
        """Have the root's bytes in everybody's tensor: uint8 [N]."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(self._group.broadcast([tensor], options))

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The buffers of all ranks, by rank, at the root, where `mine` is one of them; [] elsewhere."""
        options = dist.GatherOptions()
        options.rootRank = 0
        theirs = [blocks.empty(mine.shape, mine.dtype) for _ in range(self.size)] if self.rank == 0 else []
        self._wait(self._group.gather([theirs] if theirs else [], [mine], options))
        return theirs

    def reduce(self, block: Tensor, how: How) -> None:
        """Have the sum or the largest of all ranks' int64 blocks in the root's; the others' hold anything after it."""
        options = dist.ReduceOptions()
        options.rootRank = 0
        options.reduceOp = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX  # type: ignore[assignment]
        self._wait(self._group.reduce([block], options))

    def _wait(self, work: Any) -> None:
        work.wait(self._timeout)

    def release(self) -> None:
        """Free who waits in an operation, from another thread: a wait that times out closes the group's pairs."""
        if self._released:
            return
        self._released = True
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                dummy = torch.empty(1, dtype=torch.uint8)
                other = 1 if self.rank == 0 else 0
                self._group.recv([dummy], other, _UNBLOCK_TAG).wait(timedelta(milliseconds=1))


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
        except Exception as error:  # gloo's errors are RuntimeErrors; without this thread nothing goes on
            self._failed(str(error).partition("\n")[0] or repr(error))

    def close(self, timeout_s: float) -> None:
        """End the thread; what it waits for is released."""
        self._work.put(None)
        self._world.release()
        self._thread.join(timeout_s)
