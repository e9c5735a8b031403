"""Client selection, one selector a file; `selection.name: random` is the module `fldist.selection.random`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Generator


class ClientReport(NamedTuple):
    """What a client tells of its training, 40 bytes.

    n: its training samples; squares: sum over the samples of their squared cross-entropy, taken in the first
    epoch before each step; loss: mean training loss of the first epoch; seconds: of the client method;
    joules: NaN, since nobody measures them yet. squares and loss are NaN when the method did not train.
    """

    n: float
    squares: float
    loss: float
    seconds: float
    joules: float


@dataclass(frozen=True)
class Candidates:
    """What a selector may know before a round.

    ids: clients that hold samples, ascending; sizes: their training examples; count: how many to choose;
    reports: the latest report of every client that has given one (only if the selector wants reports).
    """

    ids: Sequence[int]
    sizes: Sequence[int]
    count: int
    reports: Mapping[int, ClientReport] = field(default_factory=dict)


@dataclass(frozen=True)
class Selector:
    """Base of all selectors; a subclass is a frozen dataclass whose fields are its configuration.

    wants_reports: whether clients send a `ClientReport` with each reply; said by the class, not configured.
    """

    wants_reports: ClassVar[bool] = False

    def select(self, candidates: Candidates, rng: Generator) -> list[int]:
        """The clients of this round, ascending; `rng` is keyed by run seed and round."""
        raise TypeError(f"{type(self).__name__} does not define select(self, candidates, rng)")
