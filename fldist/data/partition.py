"""Partitions: which client holds which training rows. Each is a pure function of labels and a generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

NAMES = {
    "iid": "fldist.data.partition:Iid",
    "dirichlet": "fldist.data.partition:Dirichlet",
}

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Iid:
    """A random permutation in K nearly equal consecutive parts, the first n mod K one row longer."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: every class is divided among the clients by proportions q ~ Dirichlet(alpha 1_K).

    For class c in order: shuffle its rows, draw q, cut at floor(cumsum(q) n_c); client k gets the k-th piece.
    A client may end with no row at all. Source: Hsu et al., arXiv 1909.06335, in the per-class form.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5

    def split(self, labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
        """labels [n] -> K arrays of row numbers, each ascending."""
        parts: list[list[Rows]] = [[] for _ in range(num_clients)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            q = rng.dirichlet(np.full(num_clients, self.alpha))
            for client, piece in enumerate(np.split(rows, dirichlet_cuts(q, len(rows)))):
                parts[client].append(piece)
        return [np.sort(np.concatenate(p)).astype(np.int64) for p in parts]


def dirichlet_cuts(q: NDArray[np.float64], size: int) -> Rows:
    """The K-1 inner cut positions floor(cumsum(q) size), q [K] summing to 1.

    1e-9 is added before flooring, so that a sum such as 0.1 + 0.2 does not lose a row to rounding.
    """
    return np.floor(np.cumsum(q)[:-1] * size + 1e-9).astype(np.int64)
