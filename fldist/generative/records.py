"""Sets of clients with their scores, as a generator of sets learns them: records, labels, rows of tokens.

Client i is token i; the token N, the number of clients, is start, end and padding at once. (FedGCS: Ning et al., IJCAI
2024, arXiv 2405.06312.) Where the sets and their scores come from is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor


class Records:
    """Scored sets of clients; two records are the same when their sets are, whatever the order of the ids.

    keep: which score a set has that is added again, the `newest` or the `first`; its place is that of the first.
    """

    def __init__(self, keep: Literal["newest", "first"] = "newest") -> None:
        self._keep = keep
        self._scores: dict[tuple[int, ...], float] = {}

    def add(self, ids: Iterable[int], score: float) -> None:
        """Note that the set scores so; ValueError for a score that is not finite, from which nothing can be learned."""
        if not math.isfinite(score):
            raise ValueError(f"score: {score} is not finite; leave the record out")
        if self._keep == "newest":
            self._scores[_set(ids)] = score
        else:
            self._scores.setdefault(_set(ids), score)

    def __len__(self) -> int:
        return len(self._scores)

    def __contains__(self, ids: Iterable[int]) -> bool:
        return _set(ids) in self._scores

    def items(self) -> list[tuple[tuple[int, ...], float]]:
        """All records, in the order in which they were first added; the ids of each ascending."""
        return list(self._scores.items())

    def best(self, k: int) -> list[tuple[int, ...]]:
        """The k sets of highest score (all, if there are fewer), best first; of equal ones the one found first."""
        return sorted(self._scores, key=self._scores.__getitem__, reverse=True)[: max(k, 0)]


def _set(ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({int(i) for i in ids}))


def labels(scores: Tensor) -> Tensor:
    """Scores [R], floating, brought to 0 (the least) to 1 (the greatest); 0.5 where all are equal."""
    if not len(scores):
        return scores.clone()
    least, greatest = scores.aminmax()
    if least == greatest:
        return torch.full_like(scores, 0.5)
    return (scores - least) / (greatest - least)


def augment(
    sets: Sequence[tuple[int, ...]], copies: int, length: int, pad: int, rng: torch.Generator
) -> Tensor:  # int64 [R * (copies + 1), length]
    """Rows of tokens: for each set its ids ascending, then `copies` uniform random permutations of them.

    Each row is filled up with `pad` to `length`. ValueError for a set that is longer.
    """
    return permuted(padded(sets, length, pad), copies, pad, rng)


def padded(sets: Sequence[tuple[int, ...]], length: int, pad: int) -> Tensor:
    """One row for each set, int64 [R, length]: its ids ascending, then `pad`. ValueError for a set that is longer."""
    longest = max(map(len, sets), default=0)
    if longest > length:
        raise ValueError(f"length: {length} tokens cannot hold a set of {longest} clients; use at least {longest}")
    rows = [[*sorted(ids), *[pad] * (length - len(ids))] for ids in sets]
    return torch.tensor(rows, dtype=torch.int64).view(len(sets), length)


def permuted(rows: Tensor, copies: int, pad: int, rng: torch.Generator) -> Tensor:
    """Rows [R, length] each followed by `copies` uniform random permutations of its ids: [R * (copies + 1), length]."""
    count, length = rows.shape
    # float64, so that two equal keys, which would keep their order, are out of the question
    keys = torch.rand(count, copies, length, dtype=torch.float64, generator=rng)
    order = keys.masked_fill_((rows == pad)[:, None], 2.0).argsort(dim=2)
    copied = rows[:, None].expand(-1, copies, -1).gather(2, order)
    return torch.cat([rows[:, None], copied], dim=1).view(-1, length)


def decoder_inputs(rows: Tensor, start: int) -> Tensor:
    """What the decoder is given to predict rows [B, T]: the start token, then the rows without their last token."""
    return torch.cat([torch.full_like(rows[:, :1], start), rows[:, :-1]], dim=1)


def members(row: Sequence[int] | Tensor, num_clients: int) -> tuple[int, ...]:
    """The set that a row of tokens stands for: the ids before its first end token, ascending."""
    tokens = row.tolist() if isinstance(row, Tensor) else list(row)
    if num_clients in tokens:
        tokens = tokens[: tokens.index(num_clients)]
    return _set(tokens)
