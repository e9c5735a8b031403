"""Samples that overlap, stored once: windows into a stream of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Windows:
    """Sample i is stream[starts[i] : starts[i] + length]; reads like an array [n, length], made row by row when asked.

    stream: [m] tokens; starts: [n] integers in 0..m-length. Both may be memory maps, and are never written to.
    """

    ndim = 2

    def __init__(self, stream: NDArray[Any], starts: NDArray[np.integer[Any]], length: int) -> None:
        self.stream = stream
        self.starts = starts
        self.shape = (len(starts), length)
        self.dtype = stream.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.stream.nbytes + self.starts.nbytes

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Rows by a number, numbers, a slice or a mask, as a fresh array."""
        return np.array(np.lib.stride_tricks.sliding_window_view(self.stream, self.shape[1])[self.starts[rows]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype)
