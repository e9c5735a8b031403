"""NCCL between ranks: bodies go from GPU to GPU, all else over the control plane as with gloo.

Between the server and one host are two groups of two, one for each direction. NCCL runs what a communicator is asked
for in order, on one stream, and a send ends only when its receive has begun: with one communicator for both ways, a
server and a host that begin to send to each other at the same time would wait for ever. It also spares us locks: each
group is used by one thread alone. For the topologies `collective` and `reduce` there is one group of all ranks besides,
whose operations the server puts in one order for all: a rank begins one when it has begun all those before.

Nobody waits inside NCCL or torch. NCCL has no limits on time and does not say that a peer is gone; torch's own remedy
is to end the process. So torch is told to handle nothing and to start no threads of its own (`ENVIRONMENT`), work is
polled under our own deadline, and a session that ends aborts both its groups (`unblock`) and that of all ranks
(`release`). What an aborted receive has left in its buffer is undefined, and a work may say afterwards that it is
complete: neither is used.

The communicators are made by the first body of each direction and by the first operation of all ranks, so that a host
can be refused before that.

A host's bodies lie in its GPU's memory. The server's lie in the CPU's, where it folds and keeps its state: they are
brought there through pinned memory, body by body, or piece by piece where all ranks take part, so that its GPU holds no
more than what is on its way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fldist import blocks
from fldist.wire.carrier import Carrier
from fldist.wire.errors import DeadlineExceeded, PeerLost, TransportError
from fldist.wire.link import How
from fldist.wire.pair import Ends, Pair
from fldist.wire.staging import settle, to_host
from fldist.wire.world import ALIGNMENT, Members, World, begin_broadcast, begin_gather, begin_reduce, pack

log = logging.getLogger("fldist.nccl")

ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # nothing ends the process; torchrun sets 1
    "TORCH_NCCL_BLOCKING_WAIT": "1",  # no watchdog thread, which would report and sleep where we abort
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "60",  # seconds for making a communicator; an abort has to wait for it
}
"""Read by torch when a group is made. Set over what is there: other values could end the server with a host."""
ABORT_S = 30.0
"""How long torch waits for the communicators to be aborted."""
PIECE_BYTES = 64 * 2**20
"""What all ranks exchange at a time."""
GATHERED_BYTES = 2**30
"""What the root's GPU holds of all ranks' pieces while they are gathered, at most."""
_SPIN_S = 200e-6
_NAP_S = 0.2e-3


@dataclass
class _Transfer:
    """What must stay alive until it is done. landed: bodies that lie on the CPU, and where they are on the GPU."""

    works: list[Any]
    tensors: list[Tensor]
    landed: list[tuple[Tensor, Tensor]]


class _Groups:
    """Groups of NCCL's that are made when they are first needed, used under a deadline, and aborted together.

    make: makes the group of a name; transfer_s: how long a work may take.
    """

    def __init__(self, make: Callable[[str], Any], device: torch.device, transfer_s: float) -> None:
        os.environ.update(ENVIRONMENT)
        self._make = make
        self._device = device
        self._transfer_s = transfer_s
        self._lock = threading.Lock()
        self._groups: dict[str, Any] = {}
        self._over = False

    def _group(self, name: str) -> Any:
        with self._lock:
            if self._over:
                raise PeerLost("the session has ended")
            if name not in self._groups:
                self._groups[name] = self._make(name)
            return self._groups[name]

    def _is_away(self, tensor: Tensor) -> bool:
        return tensor.device != self._device

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of NCCL's and torch's as ours. After an abort that is the reason for whatever fails."""
        try:
            yield
        except TransportError:
            raise
        except RuntimeError as error:
            self._usable()
            raise PeerLost(f"nccl: {str(error).partition(chr(10))[0]}") from None

    def _poll(self, works: Sequence[Any]) -> None:
        """Wait until works are complete, at most as long as a transfer may take."""
        began = time.monotonic()
        deadline = began + self._transfer_s
        for work in works:
            with self._told():
                while not work.is_completed():
                    self._usable()
                    now = time.monotonic()
                    if now > deadline:
                        raise DeadlineExceeded("a transfer did not end in time")
                    if now - began > _SPIN_S:
                        time.sleep(_NAP_S)
                self._usable()
                work.wait()  # complete: tells of an error of NCCL's, and puts this thread's stream behind the transfer
        self._usable()

    def _usable(self) -> None:
        if self._over:
            raise PeerLost("the session has ended")

    def _abort(self) -> None:
        """Abort all groups, once; this may take as long as a communicator takes to be made."""
        with self._lock:
            if self._over:
                return
            self._over = True
            groups = list(self._groups.values())
        for group in groups:
            try:
                group.abort()
            except RuntimeError as error:
                log.warning("a communicator could not be aborted: %s", str(error).partition("\n")[0])


class NcclPair(_Groups, Pair):
    """Two members that send GPU memory to each other. device: this member's GPU."""

    def __init__(self, ends: Ends, device: torch.device) -> None:
        super().__init__(lambda way: _make(ends.store, way, ends.me, 2), device, ends.limits.transfer_s)
        self._ends = ends

    def open(self) -> None:
        """Nothing: the groups are made when they are needed."""

    def _from(self, sender: int) -> Any:
        """The group of one direction."""
        return self._group("down" if sender == 0 else "up")

    def send(self, bodies: Sequence[Tensor], trailer: Tensor) -> _Transfer:
        """Begin to send; bodies that lie on the CPU are copied to the GPU first."""
        with self._told():
            tensors = [t.to(self._device) for t in (*bodies, trailer)]
            group = self._from(self._ends.me)
            return _Transfer([group.send([t], self._ends.peer, 0) for t in tensors], tensors, [])

    def sent(self, transfer: Any) -> None:
        """Poll until the GPU has let go of what was sent; the peer has it already."""
        self._poll(transfer.works)

    def receive(self, bodies: Sequence[Tensor], trailer: Tensor) -> _Transfer:
        """Begin to receive, into the bodies or, for those that lie on the CPU, beside them."""
        with self._told():
            group = self._from(self._ends.peer)
            wanted = [*bodies, trailer]
            tensors = [torch.empty_like(t, device=self._device) if self._is_away(t) else t for t in wanted]
            landed = [(there, here) for there, here in zip(wanted, tensors, strict=True) if there is not here]
            return _Transfer([group.recv([t], self._ends.peer, 0) for t in tensors], tensors, landed)

    def received(self, transfer: Any) -> None:
        """Poll until all is there, then bring to the CPU what belongs there."""
        self._poll(transfer.works)
        with self._told():
            for there, here in transfer.landed:
                there.copy_(here, non_blocking=True)
            if transfer.landed:
                settle(self._device)

    def unblock(self) -> None:
        """Abort both groups, once; this may take as long as a communicator takes to be made."""
        self._abort()


class NcclWorld(_Groups, World):
    """All ranks in one communicator. device: this rank's GPU.

    What lies in this GPU's memory is sent from there and received into it; what lies in the CPU's, as all does at the
    root, is brought over in pieces of PIECE_BYTES, one at a time. A gather takes as much of every rank at a time, or
    less where there are many: NCCL's works on equal buffers at the root, which are GATHERED_BYTES together at most.
    """

    def __init__(self, members: Members, device: torch.device) -> None:
        super().__init__(
            lambda name: _make(members.store, name, members.rank, members.size), device, members.limits.transfer_s
        )
        World.__init__(self, members)
        # by thread: what NCCL may still touch after an error lives as long as the group
        self._under_way: dict[int, Sequence[Tensor]] = {}

    def open(self) -> None:
        """Nothing: the group is made when it is needed."""

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast from or into this GPU's memory, or by way of it."""
        for piece in tensor.split(PIECE_BYTES):  # type: ignore[no-untyped-call]
            with self._told():
                here = self._here(piece, filled=self.rank == 0)
                self._do(partial(begin_broadcast, tensor=here), [here])
                if here is not piece and self.rank != 0:
                    piece.copy_(to_host(here))

    def gather(self, parts: Sequence[Tensor], capacity: int) -> dict[int, Tensor]:
        """Gather piece by piece; the root copies each to the CPU, through pinned memory."""
        size = self.members.size
        most = min(PIECE_BYTES, max(1, GATHERED_BYTES // size // ALIGNMENT) * ALIGNMENT)
        buffers = [blocks.empty(capacity, torch.uint8) for _ in range(1, size)] if self.rank == 0 else []
        for start in range(0, capacity, most):
            length = min(most, capacity - start)
            with self._told():
                pieces = [torch.empty(length, dtype=torch.uint8, device=self._device) for _ in range(len(buffers) + 1)]
                theirs = pieces if self.rank == 0 else []
                pack(pieces[0], start, parts)
                self._do(partial(begin_gather, theirs=theirs, mine=pieces[0]), pieces)
                for buffer, piece in zip(buffers, theirs[1:], strict=True):
                    buffer[start : start + length] = to_host(piece)
        return dict(enumerate(buffers, 1))

    def reduce(self, block: Tensor, how: How) -> None:
        """Reduce piece by piece; at the root each is copied back to the CPU."""
        for piece in block.split(PIECE_BYTES // block.element_size()):  # type: ignore[no-untyped-call]
            with self._told():
                here = self._here(piece, filled=True)
                self._do(partial(begin_reduce, block=here, how=how), [here])
                if here is not piece and self.rank == 0:
                    piece.copy_(to_host(here))

    def _here(self, tensor: Tensor, filled: bool) -> Tensor:
        """The tensor itself if it lies on this GPU, else one beside it there, with its values or without."""
        if not self._is_away(tensor):
            return tensor
        here = torch.empty_like(tensor, device=self._device)
        return here.copy_(tensor) if filled else here

    def _do(self, begin: Callable[[Any], Any], tensors: Sequence[Tensor]) -> None:
        """Begin an operation with these tensors, and poll until it has ended."""
        thread = threading.get_ident()
        self._under_way[thread] = tensors
        self._poll([begin(self._group("world"))])
        del self._under_way[thread]

    def release(self) -> None:
        """Abort the group, once; this may take as long as a communicator takes to be made."""
        self._abort()


def nccl_carrier(device: torch.device) -> Carrier:
    """Makes the pairs, and the world, of a rank that uses this GPU."""
    return Carrier(lambda ends: NcclPair(ends, device), lambda members: NcclWorld(members, device))


def _make(store: Any, name: str, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options.config.blocking = 0  # an abort must find nobody inside NCCL
    options._timeout = timedelta(seconds=ABORT_S)
    options.global_ranks_in_group = list(range(size))
    warnings.filterwarnings("ignore", message=".*An unbatched P2P op")  # a two-rank communicator is what we want
    return dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, options)  # type: ignore[attr-defined]
