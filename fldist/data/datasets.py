"""Data sets, decoded to tensors. Which client holds which rows is the business of `partition.py`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = {
    "digits": "fldist.data.datasets:Digits",
    "hdf5": "fldist.data.datasets:Hdf5",
}


@dataclass(frozen=True)
class Dataset:
    """Labelled samples: x float32 [n, channels, height, width], y int64 [n] in 0..classes-1."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train_x.shape[1:])


@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; needs no download.

    1,437 training and 360 test samples by a permutation that is the same for every run; values 0 to 1.
    """

    def load(self) -> Dataset:
        """Read and split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(1797).permutation(len(digits.target))
        x = torch.from_numpy((digits.images[order] / 16.0).astype(np.float32)).unsqueeze(1).contiguous()
        y = torch.from_numpy(digits.target[order].astype(np.int64))
        return Dataset(x[:1437].clone(), y[:1437].clone(), x[1437:].clone(), y[1437:].clone(), classes=10)


@dataclass(frozen=True)
class Hdf5:
    """A user's own data in one HDF5 file: `train_x`, `train_y`, `test_x`, `test_y`.

    x: [n, channels, height, width] (or any shape per sample), floats as they are, uint8 scaled to 0..1;
    y: [n] integers from 0. A relative `path` is looked for in the working directory, then in FLDIST_DATA.
    """

    path: str

    def load(self) -> Dataset:
        """Read the whole file; ValueError says where it was looked for or what it lacks."""
        import h5py

        wanted = ("train_x", "train_y", "test_x", "test_y")
        path = find_data(self.path, "task.data.path")
        try:
            with h5py.File(path, "r") as file:
                missing = [name for name in wanted if name not in file]
                if missing:
                    raise ValueError(f"task.data.path: {path} has no {missing[0]!r}; it needs {', '.join(wanted)}")
                raw = [np.asarray(file[name]) for name in wanted]
        except OSError as error:
            raise ValueError(f"task.data.path: {path} cannot be read as HDF5 ({error}); make it again") from None
        for name, labels in (("train_y", raw[1]), ("test_y", raw[3])):
            if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"task.data.path: {name} of {path} must be [n] integers, not {labels.dtype} {labels.shape}"
                )
        train_x, test_x = (_as_floats(a) for a in (raw[0], raw[2]))
        train_y, test_y = (torch.from_numpy(a.astype(np.int64)) for a in (raw[1], raw[3]))
        for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
            if y.shape != (len(x),):
                raise ValueError(f"task.data.path: {path} has {len(x)} rows of {name}_x and {len(y)} of {name}_y")
        classes = int(torch.cat([train_y, test_y]).max()) + 1
        return Dataset(train_x, train_y, test_x, test_y, classes)


def _as_floats(array: NDArray[Any]) -> Tensor:
    scaled = array / 255.0 if array.dtype == np.uint8 else array
    return torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))


def find_data(path: str, key: str) -> Path:
    """Where a data file is: as given, else below FLDIST_DATA; ValueError names both places and the remedy."""
    tried = [Path(path).absolute()]
    root = os.environ.get("FLDIST_DATA")
    if root and not Path(path).is_absolute():
        tried.append(Path(root).absolute() / path)
    for candidate in tried:
        if candidate.is_file():
            return candidate
    places = " and ".join(str(p) for p in tried)
    remedy = "put it there" if root else "set FLDIST_DATA to the folder that has it"
    raise ValueError(f"{key}: no data found: looked for {places}; {remedy}, or correct {key}")
