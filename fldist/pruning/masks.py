"""Masks of single parameters from scores: thresholds by selection, what is kept whatever it scores, what is refused.

A mask is bool [P] over the parameters of a model in the order of its layout, True where a parameter is kept. What a
score means is an algorithm's business; whole units are in `structure.py`, bits and bytes in `fldist/sparse.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fldist.params import Layout, Params, Slot


def quantile(values: Tensor, q: float) -> float:
    """The linearly interpolated q-quantile of values [N], N >= 1: at position q (N - 1) of the sorted values.

    By selection of the two values next to it: linear in time, and without the limit of 2^24 values that
    `torch.quantile` has. q in [0, 1].
    """
    array = values.detach().cpu().numpy().reshape(-1)
    position = q * (array.size - 1)
    below = math.floor(position)
    above = min(below + 1, array.size - 1)
    chosen = np.partition(array, (below, above))
    low, high = float(chosen[below]), float(chosen[above])
    return low + (position - below) * (high - low)


def above(values: Tensor, threshold: float) -> Tensor:
    """values [N] > threshold, strictly, in float64: rounded to float32 the threshold might reach the next value."""
    return values.double() > threshold


@dataclass(frozen=True)
class Eligible:
    """Which tensors of a model take part in pruning; the others are kept whole and enter no quantile.

    one_d: tensors of one dimension (biases, normalisation) take part; exclude: names of tensors that do not.
    """

    one_d: bool = True
    exclude: tuple[str, ...] = ()

    def check(self, layout: Layout) -> None:
        """ValueError for a name that the model does not have."""
        names = [slot.name for slot in layout.params]
        for name in self.exclude:
            if name not in names:
                raise ValueError(f"algorithm.exclude: the model has no parameter {name!r}; it has {', '.join(names)}")
        if not self.slots(layout):
            raise ValueError("algorithm.exclude: no parameter is left to prune; exclude fewer")

    def slots(self, layout: Layout) -> list[Slot]:
        """The tensors that take part, in order."""
        return [s for s in layout.params if s.name not in self.exclude and (self.one_d or len(s.shape) > 1)]


def by_quantile(
    scores: Tensor, layout: Layout, q: float, eligible: Eligible | None = None, per_tensor: bool = False
) -> Tensor:
    """Keep what scores strictly above the q-quantile of all eligible scores together, or of its own tensor's.

    scores [P]; q in [0, 1), 0 keeps everything. With distinct scores floor(q (N - 1)) + 1 of N are closed; what equals
    the threshold is closed as well.
    """
    if not 0.0 <= q < 1.0:
        raise ValueError(f"the quantile must be in [0, 1), got {q}: 1 would close every parameter")
    keep = torch.ones(layout.num_params, dtype=torch.bool)
    slots = (eligible or Eligible()).slots(layout)
    if q == 0.0:
        return keep
    places = [slice(slot.offset, slot.offset + slot.numel) for slot in slots]
    if per_tensor:
        for place in places:
            keep[place] = above(scores[place], quantile(scores[place], q))
        return keep
    everything = scores if len(slots) == len(layout.params) else torch.cat([scores[place] for place in places])
    threshold = quantile(everything, q)
    for place in places:
        keep[place] = above(scores[place], threshold)
    return keep


def random_mask(layout: Layout, density: float, rng: torch.Generator, slots: Sequence[Slot]) -> Tensor:
    """Keep round(density N) of the N parameters of these tensors, drawn without replacement, and all others."""
    keep = torch.ones(layout.num_params, dtype=torch.bool)
    total = sum(slot.numel for slot in slots)
    closed = torch.randperm(total, generator=rng)[round(density * total) :]
    drawn = torch.ones(total, dtype=torch.bool)
    drawn[closed] = False
    start = 0
    for slot in slots:
        keep[slot.offset : slot.offset + slot.numel] = drawn[start : start + slot.numel]
        start += slot.numel
    return keep


def refuse_empty(keep: Tensor, layout: Layout, remedy: str) -> None:
    """ValueError where a mask keeps nothing of a tensor of two or more dimensions: no signal would pass its layer."""
    for slot in layout.params:
        if len(slot.shape) > 1 and not bool(keep[slot.offset : slot.offset + slot.numel].any()):
            raise ValueError(f"the mask leaves the layer {slot.name} no parameter; {remedy}")


def num_zeros(params: Params) -> int:
    """How many parameters are 0."""
    floats = params.trainable.floats
    return floats.numel() - int(floats.count_nonzero())
