"""The clients of largest utility: the sort that any search over sets of clients has to beat under an additive score.

    S = the K largest u_i             u_i: `fldist/scoring.py`, after Oort (OSDI 2021) and the code published for FedGCS

Before anything is known, and among equals, the choice is uniform. A proposal adds noise to u.

Messages of its own: none. Beside every reply of a client method that may train a report of 40 bytes travels up (kind
`report`): 40 S for S clients a round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fldist import scoring
from fldist.algorithm import State
from fldist.scoring import NonNegative, Utility
from fldist.selection import Candidates, Outcome, Selector, UtilEpochs


@dataclass(frozen=True)
class TopK(Selector):
    """The `count` clients of largest utility."""

    wants_reports: ClassVar[bool] = True

    utility: Utility = field(default_factory=Utility)
    noise: NonNegative = 0.5  # of proposals: normal, in standard deviations of u over the clients

    @property
    def util_epochs(self) -> UtilEpochs:
        """As the utility says."""
        return self.utility.epochs

    def init(self, candidates: Candidates) -> State:
        """Nothing is known."""
        return State(known=scoring.begin(candidates.num_clients))

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """The largest."""
        return self._largest(state, candidates, candidates.rng, 0.0)

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """The largest under noise."""
        return self._largest(state, candidates, rng, self.noise)

    def _largest(self, state: State, candidates: Candidates, rng: torch.Generator, noise: float) -> list[int]:
        u = self.utility.of(state.known, candidates)[list(candidates.ids)]
        if bool(state.known.utility.isnan().all()):
            u = torch.zeros_like(u)
        if noise:
            u = u + noise * u.std(correction=0) * torch.randn(len(u), generator=rng, dtype=u.dtype)
        return sorted(candidates.ids[i] for i in scoring.largest(u, candidates.count, rng))

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Take what the clients report."""
        state.known = self.utility.learn(state.known, outcome)
