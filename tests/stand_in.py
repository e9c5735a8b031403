"""Stands where `ProcessGroupNCCL` stands, with its interface and its manners, on gloo and the CPU's memory.

Sends and receives between two, and the operations of all ranks. As NCCL does it: connects at the first transfer; a work
is complete or not and says so without waiting; `wait` is for works that are complete; of a dead peer nothing is said;
after `abort` every work says that it is complete, and what was being received into is spoilt. `arm` makes a process
take it for NCCL, and its CPU for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import fldist.runner
import tests.warm
from fldist.runtime import device as device_module

LONG = timedelta(seconds=60)


class Work:
    def __init__(self, group: ProcessGroupNCCL, begin: Any, received: list[torch.Tensor]) -> None:
        self._group = group
        self._received = received
        self._done = False
        self._error: Exception | None = None
        self.waited = False
        threading.Thread(target=self._run, args=(begin,), name="stand-in", daemon=True).start()

    def _run(self, begin: Any) -> None:
        try:
            begin().wait(LONG)
            self._done = True
        except RuntimeError:
            pass  # NCCL says nothing of it

    def fail(self, text: str) -> None:
        """As an asynchronous error of NCCL's."""
        self._error = dist.DistBackendError(text)

    def is_completed(self) -> bool:
        return self._done or self._error is not None or self._group.aborted

    def wait(self, timeout: timedelta | None = None) -> bool:
        assert self.is_completed(), "it would block"
        if self._error is not None:
            raise self._error
        self.waited = True
        return True

    def spoil(self) -> None:
        for tensor in self._received if not self._done else []:
            tensor.view(torch.uint8).fill_(0xEE)


class ProcessGroupNCCL:
    made: ClassVar[list[ProcessGroupNCCL]] = []

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.config = SimpleNamespace(blocking=-1)
            self._timeout = timedelta(minutes=10)
            self.global_ranks_in_group: list[int] = []

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        assert options.global_ranks_in_group == list(range(size))
        self.size = size
        self.options = options
        self.environment = {k: v for k, v in os.environ.items() if k.startswith("TORCH_NCCL")}
        self.aborted = False
        self.works: list[Work] = []
        self.begun: list[tuple[str, int]] = []  # what was asked for, and bytes that it may write
        self.threads: set[str] = set()
        self._arguments = (store, rank)
        self._gloo: Any = None
        self._connecting = threading.Lock()
        ProcessGroupNCCL.made.append(self)

    def _connected(self) -> Any:
        with self._connecting:
            if self._gloo is None:
                store, rank = self._arguments
                options = dist.ProcessGroupGloo._Options()
                options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
                options._timeout = LONG
                self._gloo = dist.ProcessGroupGloo(store, rank, self.size, options)
            return self._gloo

    def _begin(self, way: str, *arguments: Any, received: list[torch.Tensor]) -> Work:
        self.threads.add(threading.current_thread().name)
        gloo = self._connected()
        begun = getattr(gloo, way)(*arguments)  # in order, whatever the threads do
        work = Work(self, lambda: begun, received)
        self.works.append(work)
        self.begun.append((way, sum(t.numel() * t.element_size() for t in received)))
        return work

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._begin("send", tensors, peer, 0, received=[])

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._begin("recv", tensors, peer, 0, received=tensors)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Work:
        return self._begin("broadcast", tensors, options, received=tensors)

    def gather(self, theirs: list[list[torch.Tensor]], mine: list[torch.Tensor], options: Any) -> Work:
        return self._begin("gather", theirs, mine, options, received=[t for each in theirs for t in each])

    def reduce(self, tensors: list[torch.Tensor], options: Any) -> Work:
        return self._begin("reduce", tensors, options, received=tensors)

    def abort(self) -> None:
        for work in self.works:
            work.spoil()
        self.aborted = True
        if self._gloo is not None:
            other = 1 if self._arguments[1] == 0 else 0
            with contextlib.suppress(RuntimeError):
                self._gloo.recv([torch.empty(1)], other, 1).wait(timedelta(milliseconds=1))


def described(gpu: str) -> Any:
    return lambda device: {"device": "cuda:0", "gpu": gpu, "gpu_name": "stand-in"}


def arm(gpu: str) -> None:
    """Make this process take the stand-in for NCCL and its CPU for the GPU with this UUID."""
    dist.ProcessGroupNCCL = ProcessGroupNCCL
    device_module.nccl_problem = lambda wanted, local_size: None
    fldist.runner.nccl_problem = device_module.nccl_problem
    fldist.runner.describe = described(gpu)
    fldist.runner.pinned_empty = torch.empty


def host(
    gpu: str,
    address: tuple[str, int],
    rank: int,
    token: str,
    log: str,
    join_s: float,
    moment: tuple[Any, ...] | None = None,
) -> None:
    """A host's process with the stand-in; moment: see `moments.arm_host`."""
    arm(gpu.format(rank=rank))
    tests.warm.host(address, rank, token, str(Path(log)), join_s, moment)
