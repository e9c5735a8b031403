"""The settings between a data set and what a client's model sees: which rows, how they are split at a client,
how values are scaled. Augmentation itself is in `augment.py`, who holds which rows in `partition.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor

from fldist.data.augment import Augment, resize, to_unit
from fldist.data.datasets import Dataset, Kind

Rows = NDArray[np.int64]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Subset:
    """The section `task.subset`: so many training and test rows, the first ones or drawn at random."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    train: Count | None = None
    test: Count | None = None
    choice: Literal["first", "random"] = "first"

    def rows(self, which: Literal["train", "test"], total: int, rng: np.random.Generator) -> Rows:
        """Row numbers, ascending; ValueError when there are fewer than wanted."""
        wanted = self.train if which == "train" else self.test
        if wanted is None:
            return np.arange(total)
        if wanted > total:
            raise ValueError(f"task.subset.{which}: {wanted} rows of {total} cannot be taken; lower it")
        return np.arange(wanted) if self.choice == "first" else np.sort(rng.permutation(total)[:wanted])


@dataclass(frozen=True)
class ClientSplit:
    """The section `task.split`: what part of its rows a client keeps for validation and for testing.

    rounding: of the kept parts; `floor` keeps floor(n f) rows, `ceil` leaves floor(n (1 - f)) for the rest.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    val: Fraction = 0.0
    test: Fraction = 0.0
    rounding: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        if self.val + self.test >= 1.0:
            raise ValueError(f"val ({self.val}) and test ({self.test}) leave nothing to train on; lower them")

    def sizes(self, n: int) -> tuple[int, int, int]:
        """How many of n rows train, validate and test."""
        test = held_out(n, self.test, self.rounding)
        val = min(n - test, held_out(n, self.val, self.rounding))
        return n - test - val, val, test

    def of(self, rows: Rows, rng: np.random.Generator) -> dict[str, Rows]:
        """The parts `train`, `val` and `test` of a client's rows, drawn at random, each ascending."""
        _, val, test = self.sizes(len(rows))
        if not val and not test:
            return {"train": rows, "val": rows[:0], "test": rows[:0]}
        drawn = rng.permutation(rows)
        parts = {"test": drawn[:test], "val": drawn[test : test + val], "train": drawn[test + val :]}
        return {name: np.sort(part) for name, part in parts.items()}


def held_out(n: int, fraction: float, rounding: Literal["floor", "ceil"]) -> int:
    """floor(n f), or n - floor(n (1 - f)); 1e-9 so that 0.29 of 100 is 29 whatever binary fractions make of it."""
    if rounding == "floor":
        return math.floor(n * fraction + 1e-9)
    return n - math.floor(n * (1.0 - fraction) + 1e-9)


@dataclass(frozen=True)
class Public:
    """Public rows: server and clients both know them by their numbers, so that none travel.

    n: how many (0: none); seed: draws them, without replacement, from the training rows of the data set: where there
    is a subset of these, from those that it leaves out.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    n: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class MeanStd:
    """Per channel, of values scaled to 0..1: x <- (x - mean) / std."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]


Normalize = Literal["unit", "symmetric", "standard"] | MeanStd


@dataclass(frozen=True)
class Preparation:
    """From stored values to a model's input: 0..1, size, (in training) augmentation, normalisation.

    normalize: `unit` 0..1, `symmetric` -1..1, `standard` by the data set's mean and deviation, or numbers.
    """

    normalize: Normalize = "unit"
    resize: Count | None = None
    augment: Augment = field(default_factory=Augment)

    def refuse_tokens(self) -> None:
        """ValueError for what is asked of samples that are tokens: nothing here means anything to them."""
        asked = {"normalize": self.normalize, "resize": self.resize}
        asked |= {f"augment.{f.name}": getattr(self.augment, f.name) for f in dataclasses.fields(self.augment)}
        for key, value in asked.items():
            if value and value != "unit":
                raise ValueError(f"task.{key}: {value}, but the samples are tokens, which stay as they are; remove it")

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A sample's shape after preparation."""
        if self.resize is None:
            return shape
        if len(shape) != 3:
            raise ValueError(f"task.resize: the samples' shape is {shape}, no image [channels, height, width]")
        return (shape[0], self.resize, self.resize)

    def read(self, raw: NDArray[np.generic], kind: Kind) -> Tensor:
        """Stored samples as they are given out, in a fresh tensor: `unit` of values; tokens as int64."""
        return self.unit(raw) if kind == "values" else torch.from_numpy(raw.astype(np.int64))

    def unit(self, raw: NDArray[np.generic] | Tensor) -> Tensor:
        """Stored values -> float32 in 0..1 (floats as they are), resized; a fresh tensor."""
        x = torch.from_numpy(np.ascontiguousarray(raw)) if isinstance(raw, np.ndarray) else raw
        unit = resize(x, self.resize) if self.resize is not None else to_unit(x)
        # numpy aligns to 16 bytes, torch to 64, and an address can change the bits of a matrix product
        return unit.clone() if unit.data_ptr() == x.data_ptr() else unit

    def scale(self, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation [c, 1, 1] that normalisation uses, or None when values stay as they are."""
        if self.normalize == "unit":
            return None
        channels = dataset.shape[0] if len(dataset.shape) == 3 else 1
        if self.normalize == "symmetric":
            mean, std = (0.5,) * channels, (0.5,) * channels
        elif self.normalize == "standard":
            mean, std = dataset.statistics()
        else:
            mean, std = self.normalize.mean, self.normalize.std
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"task.normalize: {len(mean)} means and {len(std)} deviations do not fit {channels} channels"
            )
        extra = (1, 1) if len(dataset.shape) == 3 else (1,) * max(0, len(dataset.shape) - 1)
        return torch.tensor(mean).view(-1, *extra), torch.tensor(std).view(-1, *extra)
