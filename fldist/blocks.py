"""Memory for large blocks, used again when nobody holds it any more.

A fresh block of tens of megabytes costs a page fault for every 4 kB of it, several times what the copy into it costs,
and C libraries give such blocks back to the system as soon as they are freed. So blocks for message bodies, sums and
new models are kept here and given out again. A block is free when no tensor shares its memory; nobody has to say so.
"""

from __future__ import annotations

import hashlib
import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 20
"""Bytes below which a block is not kept: the C library does not give those back."""
ALIGNMENT = 64
"""Every block begins at a multiple of this many bytes."""
IDLE = 32
"""A free block that was not needed for so many others in a row is given back to the system."""


def version_of(block: Tensor) -> int:
    """63 bits of a hash of a tensor's values, for `Once`: other values have another version."""
    return int.from_bytes(hashlib.sha256(block.cpu().contiguous().numpy().data).digest()[:8], "little") >> 1


class Blocks:
    """A store of blocks; safe to use from several threads."""

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], int]] = []  # memory, when it was given out
        self._count = 0
        self._lock = threading.Lock()

    def empty(
        self, shape: int | Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """A tensor with any contents, at a 64-byte boundary, in memory that no other tensor shares.

        device: where it lies (None: the CPU); a GPU's memory is torch's to keep.
        """
        if device is not None and device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(sizes) * dtype.itemsize
        if size < SMALL:
            return torch.empty(sizes, dtype=dtype)
        memory = self._memory(size)
        start = -memory.ctypes.data % ALIGNMENT
        return torch.from_numpy(memory[start : start + size]).view(dtype).view(sizes)

    def zeros(
        self, shape: int | Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """The same, filled with zeros."""
        return self.empty(shape, dtype, device).zero_()

    def copy(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, in memory of their own."""
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def _memory(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        with self._lock:
            self._count += 1
            found = None
            for index in reversed(range(len(self._kept))):  # the newest first: what is not needed grows old
                # a tensor on this memory holds a slice, which holds it: this tuple and the argument make two more
                if self._kept[index][0].size == size + ALIGNMENT and sys.getrefcount(self._kept[index][0]) == 2:
                    found = self._kept.pop(index)[0]
                    break
            self._kept = [k for k in self._kept if self._count - k[1] <= IDLE or sys.getrefcount(k[0]) > 2]
            if found is None:
                found = np.empty(size + ALIGNMENT, dtype=np.uint8)
            self._kept.append((found, self._count))
            return found


_shared = Blocks()
empty = _shared.empty
zeros = _shared.zeros
copy = _shared.copy
