"""Class prototypes: one vector for each class that a client holds. What methods that exchange such vectors share.

    P_i^c = mean of the vectors of client i's samples of class c        `class_means`

A client uploads those of its m_i classes, float32 [m_i, d], with their numbers, int32 [m_i]: m_i (4 d + 4) bytes. What
is made of them, at the server and at the clients, is the business of `algorithms/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from fldist.data.task import Task
from fldist.fold import Accumulator, Collect, Fold, FoldContext, Refused
from fldist.kinds import Labels, MaxBytes, Prototypes

LARGEST = 1e6
"""A prototype with an entry beyond it is refused, where a method does not know better."""


class Uploaded(NamedTuple):
    """A client's prototypes."""

    prototypes: Annotated[Prototypes, MaxBytes(2**26)]  # float32 [m, d]
    classes: Annotated[Labels, MaxBytes(2**20)]  # int32 [m], strictly ascending


class Stacked(NamedTuple):
    """The prototypes of several clients, ordered by client and class."""

    prototypes: Tensor  # [U, d]
    classes: Tensor  # int64 [U]


def class_means(values: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means [C, d] of values [n, d] by class int64 [n], 0 for a class without any; and how many of each, int64 [C]."""
    sums = torch.zeros(num_classes, values.shape[1], dtype=values.dtype, device=values.device)
    add_rows(sums, classes, values)
    counts = torch.bincount(classes, minlength=num_classes)
    return sums / counts.clamp(min=1)[:, None].to(values.dtype), counts


def add_rows(into: Tensor, rows: Tensor, values: Tensor, alpha: float = 1.0) -> None:
    """into[rows[j]] += alpha values[j] for all j, in place: into [C, d], rows int64 [n], values [n, d].

    In one order, so that the bits are the same every time, on a GPU too.
    """
    if into.is_cuda:  # index_add_ has no order there; this sorts the rows
        into.index_put_((rows,), values * alpha, accumulate=True)
    else:
        into.index_add_(0, rows, values, alpha=alpha)


def kept_rows(task: Task, client: int) -> int:
    """How many of a client's samples, from the first, its training really uses: `local.order: fixed` with `tail: drop`
    never gets to the last n mod B, nor a model with BatchNorm, with `tail: keep`, to a last one that is alone."""
    n, local = task.sizes[client], task.local
    left = n % local.batch_size
    alone = left == 1 and task.architecture(client).batch_norm
    if n == left:
        return 0 if alone else n
    if local.order == "fixed" and (local.tail == "drop" or (alone and local.tail == "keep")):
        return n - left
    return n


def made_up(task: Task, client: int, field: str, dim: int) -> Tensor | None:
    """A field of `Uploaded` in the size that it will have, for predictions."""
    held = torch.unique(task.labels(client)[: kept_rows(task, client)])
    return {"prototypes": torch.zeros(len(held), dim), "classes": held.int()}.get(field)


def folds(dim: int, num_classes: int, limit: float = LARGEST) -> dict[str, Fold]:
    """How `Uploaded` replies of a call are taken: all are kept, and what is no prototype of this dimension is refused,
    as are more or fewer of them than class numbers. limit: the largest magnitude of an entry.
    """
    vectors = Vectors(dim, limit)
    return {"prototypes": vectors, "classes": ClassNumbers(num_classes, vectors)}


@dataclass(frozen=True)
class Vectors(Fold):
    """Keep every reply that is float32 [m, dim] with entries up to a limit, and refuse others.

    lengths: by client, m of what was kept last.
    """

    dim: int
    limit: float = LARGEST
    lengths: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def begin(self, context: FoldContext) -> Accumulator:
        """Start an empty collection."""
        return _Vectors(Collect(shape=(None, self.dim), limit=self.limit).begin(context), self.lengths)


@dataclass(frozen=True)
class ClassNumbers(Fold):
    """Keep every reply that is int32 [m], strictly ascending within 0 ... num_classes - 1, and refuse others.

    vectors: the fold of an earlier field of the same reply, whose m must be the same.
    """

    num_classes: int
    vectors: Vectors | None = None

    def begin(self, context: FoldContext) -> Accumulator:
        """Start an empty collection."""
        lengths = None if self.vectors is None else self.vectors.lengths
        return _Numbers(Collect(shape=(None,), dtype="int32").begin(context), self.num_classes, lengths)


class _Kept(Accumulator):
    """A collection of which more is wanted than that its entries are tensors of a shape."""

    def __init__(self, kept: Accumulator) -> None:
        self._kept = kept

    def remove(self, client: int, value: Any, weight: float) -> None:
        """Drop a reply."""
        self._kept.remove(client, value, weight)

    def result(self) -> Any:
        """All replies, in client order."""
        return self._kept.result()


class _Vectors(_Kept):
    """A collection that tells how long its entries are."""

    def __init__(self, kept: Accumulator, lengths: dict[int, int]) -> None:
        super().__init__(kept)
        self._lengths = lengths

    def add(self, client: int, value: Any, weight: float) -> None:
        """Keep a reply, or refuse it."""
        self._kept.add(client, value, weight)
        self._lengths[client] = len(value)


class _Numbers(_Kept):
    """A collection that looks at the number, the order and the range of what it gets."""

    def __init__(self, kept: Accumulator, num_classes: int, lengths: dict[int, int] | None) -> None:
        super().__init__(kept)
        self._num_classes = num_classes
        self._lengths = lengths

    def add(self, client: int, value: Any, weight: float) -> None:
        """Keep a reply, or refuse it."""
        self._kept.add(client, value, weight)
        try:
            self._look(client, value)
        except Refused:
            self._kept.remove(client, value, weight)
            raise

    def _look(self, client: int, value: Tensor) -> None:
        if self._lengths is not None and self._lengths[client] != len(value):
            raise Refused("shape", f"{len(value)} class numbers for {self._lengths[client]} prototypes")
        if len(value) and not (
            int(value[0]) >= 0 and int(value[-1]) < self._num_classes and bool((value[1:] > value[:-1]).all())
        ):
            raise Refused("range", f"class numbers must ascend within 0 to {self._num_classes - 1}")


def stacked(replies: Any, dim: int) -> Stacked:
    """The prototypes of all `Uploaded` replies, in order of client and class, whatever order they came in."""
    ids = sorted(replies.prototypes)
    if not ids:
        return Stacked(torch.zeros(0, dim), torch.zeros(0, dtype=torch.int64))
    return Stacked(
        torch.cat([replies.prototypes[c].cpu() for c in ids]), torch.cat([replies.classes[c].cpu() for c in ids]).long()
    )
