"""On what a rank calculates: `device: auto | cpu | cuda`, which GPU of its machine, and what makes a GPU repeat itself.

Every rank decides for itself, by its place among the ranks of its machine. What is asked of the machine goes through
the four functions `num_gpus`, `has_nccl`, `describe` and `set_up`, so that all else runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Wanted = Literal["auto", "cpu", "cuda"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """A rank's number among the ranks of its machine, from 0, and how many these are, as far as is known."""

    rank: int = 0
    size: int = 1


def gpu_of(local_rank: int, local_size: int, num_gpus: int) -> int:
    """Which of a machine's GPUs a rank takes: round robin by its local rank, so that no two GPUs differ by more than
    one rank. ValueError for a rank that is not on this machine, or a machine without a GPU.

    The server is local rank 0 of its machine and shares GPU 0 with the host that comes round to it: it computes
    (folding, evaluation, its own training) while hosts wait, and a GPU to itself would stand idle while they train. So
    a machine of G GPUs takes G hosts and the server with one host a GPU, and a machine without the server needs no
    other rule. A host that is started again alone has the same local rank, hence the same GPU.
    """
    if num_gpus < 1:
        raise ValueError(f"num_gpus: {num_gpus}; there is no GPU to take: use the CPU")
    if not 0 <= local_rank < local_size:
        raise ValueError(f"local_rank: {local_rank} is none of the {local_size} ranks of this machine")
    return local_rank % num_gpus


# ---- the machine
def num_gpus() -> int:
    """GPUs that torch can use here; 0 without any, and without a torch built for them."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_nccl() -> bool:
    """Whether this torch was built with NCCL."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_nccl_available()


def describe(device: torch.device) -> dict[str, Any]:
    """What a rank says of its device: `device`, and of a GPU `gpu` (its UUID) and `gpu_name`."""
    if device.type == "cpu":
        return {"device": "cpu"}
    facts = torch.cuda.get_device_properties(device)
    return {"device": str(device), "gpu": str(facts.uuid), "gpu_name": facts.name}


def set_up(device: torch.device) -> Callable[[], None]:
    """Make a GPU this process's own one and have it repeat itself; returns what puts the settings back.

    Matrix products and convolutions keep all bits of float32 (no TF32), and cuDNN takes algorithms that give the same
    result every time, chosen without a trial. That costs speed; it makes a run on one kind of GPU repeatable.
    """
    if device.type == "cpu":
        return lambda: None
    torch.cuda.set_device(device)
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32)

    def put(deterministic: bool, benchmark: bool, convolutions: bool, matrices: bool) -> None:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        cudnn.allow_tf32, products.allow_tf32 = convolutions, matrices

    put(True, False, False, False)
    return lambda: put(*kept)


# ---- decisions
def resolve(wanted: Wanted, place: Place) -> torch.device:
    """The device of a rank; ValueError when a GPU is asked for and there is none. `auto`: a GPU where there is one."""
    count = num_gpus() if wanted != "cpu" else 0
    if count:
        return torch.device("cuda", gpu_of(place.rank, place.size, count))
    if wanted == "cuda":
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU it can use"
        raise ValueError(f"device: cuda, but {why} on this machine (see `fldist doctor`); use device=cpu or auto")
    return CPU


def nccl_problem(wanted: Wanted, local_size: int) -> str | None:
    """Why NCCL cannot join ranks of which this machine has so many, and what to use instead; None: it can."""
    if wanted == "cpu":
        return "nccl moves bodies between GPUs, and device is cpu; use backend=gloo, or device=cuda"
    if not has_nccl():
        return "this torch was built without NCCL; install a CUDA build of torch for Linux, or use backend=gloo"
    count = num_gpus()
    if not count:
        return "nccl needs a GPU for every rank, and torch finds none on this machine; use backend=gloo"
    if local_size > count:
        return (
            f"nccl needs a GPU of its own for every rank, and this machine has {local_size} ranks on {count}; "
            "start fewer, or use backend=gloo: with device=cuda several ranks may share a GPU there"
        )
    return None


class Seats:
    """Who has which GPU, where each may be one rank's only. own: of the server, `describe` and `hostname`."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self._ranks: dict[tuple[str, str], int] = {}
        reason = self.take(0, own)
        assert reason is None

    def take(self, rank: int, info: Mapping[str, Any]) -> str | None:
        """Give a rank the GPU that it says it has; why not, if another one has it, or it names none."""
        gpu = info.get("gpu")
        if not gpu:
            return f"rank {rank} has no GPU, and nccl needs one for every rank; use backend=gloo"
        seat = (str(info.get("hostname")), str(gpu))
        other = self._ranks.get(seat, rank)
        if other != rank:
            return (
                f"ranks {other} and {rank} have the same GPU ({info.get('device')} of {seat[0]}, {gpu}), and nccl "
                "needs one for every rank; start fewer ranks on that machine, or use backend=gloo: with device=cuda "
                "several ranks may share a GPU there"
            )
        self._ranks[seat] = rank
        return None

    def leave(self, rank: int) -> None:
        """A rank is gone, and its GPU free."""
        self._ranks = {seat: other for seat, other in self._ranks.items() if other != rank}
