"""Client selection, one selector a file; `selection.name: random` is the module `fldist.selection.random`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator


@dataclass(frozen=True)
class Candidates:
    """What a selector may know before a round.

    ids: clients that hold samples, ascending; sizes: their training examples; count: how many to choose.
    """

    ids: Sequence[int]
    sizes: Sequence[int]
    count: int


@dataclass(frozen=True)
class Selector:
    """Base of all selectors; a subclass is a frozen dataclass whose fields are its configuration."""

    def select(self, candidates: Candidates, rng: Generator) -> list[int]:
        """The clients of this round, ascending; `rng` is keyed by run seed and round."""
        raise TypeError(f"{type(self).__name__} does not define select(self, candidates, rng)")
