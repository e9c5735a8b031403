"""Uniform selection without replacement, as in FedAvg (McMahan et al., AISTATS 2017). No message of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fldist.algorithm import State
from fldist.selection import Candidates, Selector, uniform


@dataclass(frozen=True)
class Random(Selector):
    """Every set of `count` clients is equally likely."""

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Draw without replacement; ids ascending."""
        return self.propose(state, candidates, candidates.rng)

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """The same, from `rng`."""
        return uniform(candidates, candidates.count, rng)
