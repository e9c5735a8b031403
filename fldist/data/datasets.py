"""Data sets, decoded to tensors. Which client holds which rows is the business of `partition.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NAMES = {"digits": "fldist.data.datasets:Digits"}


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
