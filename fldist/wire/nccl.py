"""NCCL between the server and one host: bodies go from GPU to GPU, all else over the control plane as with gloo.

Two groups of two, one for each direction. NCCL runs what a communicator is asked for in order, on one stream, and a
send ends only when its receive has begun: with one communicator for both ways, a server and a host that begin to send
to each other at the same time would wait for ever. It also spares us locks: each group is used by one thread alone.

Nobody waits inside NCCL or torch. NCCL has no limits on time and does not say that a peer is gone; torch's own remedy
is to end the process. So torch is told to handle nothing and to start no threads of its own (`ENVIRONMENT`), work is
polled under our own deadline, and a session that ends aborts both groups (`unblock`). What an aborted receive has left
in its buffer is undefined, and a work may say afterwards that it is complete: neither is used.

The communicators are made by the first body of each direction, so that a host can be refused before that.

A host's bodies lie in its GPU's memory. The server's lie in the CPU's, where it folds and keeps its state: they are
brought there through pinned memory, body by body, so that its GPU holds no more than what is on its way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fldist.wire.errors import DeadlineExceeded, PeerLost, TransportError
from fldist.wire.pair import Ends, MakePair, Pair
from fldist.wire.staging import settle

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
_SPIN_S = 200e-6
_NAP_S = 0.2e-3


@dataclass
class _Transfer:
    """What must stay alive until it is done. landed: bodies that lie on the CPU, and where they are on the GPU."""

    works: list[Any]
    tensors: list[Tensor]
    landed: list[tuple[Tensor, Tensor]]


class NcclPair(Pair):
    """Two members that send GPU memory to each other. device: this member's GPU."""

    def __init__(self, ends: Ends, device: torch.device) -> None:
        os.environ.update(ENVIRONMENT)
        self._ends = ends
        self._device = device
        self._lock = threading.Lock()
        self._groups: dict[str, Any] = {}
        self._over = False

    def open(self) -> None:
        """Nothing: the groups are made when they are needed."""

    def _group(self, sender: int) -> Any:
        """The group of one direction."""
        way = "down" if sender == 0 else "up"
        with self._lock:
            if self._over:
                raise PeerLost("the session has ended")
            if way not in self._groups:
                self._groups[way] = _make(self._ends, way)
            return self._groups[way]

    def send(self, bodies: Sequence[Tensor], trailer: Tensor) -> _Transfer:
        """Begin to send; bodies that lie on the CPU are copied to the GPU first."""
        with self._told():
            tensors = [t.to(self._device) for t in (*bodies, trailer)]
            group = self._group(self._ends.me)
            return _Transfer([group.send([t], self._ends.peer, 0) for t in tensors], tensors, [])

    def sent(self, transfer: Any) -> None:
        """Poll until the GPU has let go of what was sent; the peer has it already."""
        self._poll(transfer)

    def receive(self, bodies: Sequence[Tensor], trailer: Tensor) -> _Transfer:
        """Begin to receive, into the bodies or, for those that lie on the CPU, beside them."""
        with self._told():
            group = self._group(self._ends.peer)
            wanted = [*bodies, trailer]
            tensors = [torch.empty_like(t, device=self._device) if self._is_away(t) else t for t in wanted]
            landed = [(there, here) for there, here in zip(wanted, tensors, strict=True) if there is not here]
            return _Transfer([group.recv([t], self._ends.peer, 0) for t in tensors], tensors, landed)

    def _is_away(self, tensor: Tensor) -> bool:
        return tensor.device != self._device

    def received(self, transfer: Any) -> None:
        """Poll until all is there, then bring to the CPU what belongs there."""
        self._poll(transfer)
        with self._told():
            for there, here in transfer.landed:
                there.copy_(here, non_blocking=True)
            if transfer.landed:
                settle(self._device)

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

    def _poll(self, transfer: _Transfer) -> None:
        """Wait until works are complete, at most as long as a transfer may take."""
        began = time.monotonic()
        deadline = began + self._ends.limits.transfer_s
        for work in transfer.works:
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

    def unblock(self) -> None:
        """Abort both groups, once; this may take as long as a communicator takes to be made."""
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


def nccl_pair(device: torch.device) -> MakePair:
    """Makes the pairs of a rank that uses this GPU."""
    return lambda ends: NcclPair(ends, device)


def _make(ends: Ends, way: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options.config.blocking = 0  # an abort must find nobody inside NCCL
    options._timeout = timedelta(seconds=ABORT_S)
    options.global_ranks_in_group = [0, 1]
    warnings.filterwarnings("ignore", message=".*An unbatched P2P op")  # a two-rank communicator is what we want
    return dist.ProcessGroupNCCL(dist.PrefixStore(way, ends.store), ends.me, 2, options)  # type: ignore[attr-defined]
