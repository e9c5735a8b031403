"""Between a GPU's memory and a link that carries bodies in the CPU's: copies through pinned memory.

Pinned memory comes from torch's caching allocator and goes back to it. A block is handed out again only when the copies
that a stream still has to make from or to it are done: the allocator keeps an event of each. So buffers are reused from
frame to frame without a pool of our own, and nothing is overwritten that is still being copied. What gloo, MPI or a
reader of the CPU's memory touches is no stream's business, and is waited for here: `to_host` returns when its copy is
done.

On the CPU nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fldist.wire.codec import Frame


def pinned_empty(shape: Any, *, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in pinned memory, from which a GPU copies without a detour; needs a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def settle(device: torch.device) -> None:
    """Wait until what this thread has asked of a device is done; the CPU never keeps one waiting."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_host(tensor: Tensor) -> Tensor:
    """A tensor's values in the CPU's memory, ready to be read by anybody; the tensor itself if it lies there."""
    if tensor.device.type == "cpu":
        return tensor
    copy = pinned_empty(tensor.shape, dtype=tensor.dtype)
    copy.copy_(tensor, non_blocking=True)
    settle(tensor.device)
    return copy


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself: what a link takes from a GPU's memory is not staged."""
    return tensor


def to_device(frame: Frame, device: torch.device) -> None:
    """Bring a frame's tensors to a device: each part once, however many clients of the frame share it.

    The copies are made by the current stream, in order before whatever it is asked for next.
    """
    for part in frame.parts:
        if part.tensor is not None and part.tensor.device != device:
            part.tensor = part.tensor.to(device, non_blocking=True)
