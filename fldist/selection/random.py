"""Uniform selection without replacement, as in FedAvg."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fldist.selection import Candidates, Selector


@dataclass(frozen=True)
class Random(Selector):
    """Every set of `count` clients is equally likely."""

    def select(self, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """Draw without replacement; ids ascending."""
        order = torch.randperm(len(candidates.ids), generator=rng)[: candidates.count]
        return sorted(candidates.ids[i] for i in order.tolist())
