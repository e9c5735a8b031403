"""Active federated learning: J. Goetz, K. Malik, D. Bui, S. Moon, H. Liu, A. Kumar, "Active Federated Learning", arXiv
1909.12641. Clients are drawn by how large their loss was when they last trained.

    v_i = n_i loss_i / sqrt(n_i)      of a client that has trained; -inf of one that has not; stale until it does again
    v_i = -inf                        for the floor(alpha1 N) smallest
    p_i ~ exp(alpha2 v_i) + floor
    S   = floor((1 - alpha3) K) clients drawn by p without replacement, and the rest of K uniformly from the others

`floor`, and the values of the alphas, are those of Plato's example (TL-System/plato); with `valuation: mean` v_i is
loss_i / sqrt(n_i), as there. The smallest are set to -inf in each round anew, of the valuations as they are. A client
that was selected f times in a row without a reply is drawn with 2^-f of its p.

Bytes: 40 up beside every reply of a client method that may train (kind `report`): 40 S for S clients a round. With
`initial: evaluate` all N clients score the initial model first:

    weights, setup     N B_w down     B_w: bytes of the model that travels
    scalars, setup     8 N up         losses
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fldist import scoring
from fldist.algorithm import Me, State, on_client
from fldist.data.client_data import ClientData
from fldist.kinds import Scalar, Weights
from fldist.scoring import NonNegative
from fldist.selection import Candidates, Outcome, Selector

Share = Annotated[float, Field(ge=0, le=1)]
_LARGEST = 700.0
"""Largest exponent of e that a float holds, about."""


class Loss(NamedTuple):
    """One client's reply."""

    loss: Scalar  # mean cross-entropy on its training samples


@dataclass(frozen=True)
class Afl(Selector):
    """Clients are drawn by their valuation."""

    wants_reports: ClassVar[bool] = True

    alpha1: Share = 0.75  # share of the clients whose valuation is ignored
    alpha2: NonNegative = 0.01  # 0: all are equally likely
    alpha3: Share = 0.1  # share of the selected that is drawn uniformly
    floor: NonNegative = 0.01
    valuation: Literal["sum", "mean"] = "sum"  # of the losses of a client's samples
    initial: Literal["none", "evaluate"] = "none"  # whether all clients score the initial model before round 1

    def init(self, candidates: Candidates) -> State:
        """v [N], and how often in a row a client has not answered."""
        n = candidates.num_clients
        unknown = torch.full((n,), -math.inf, dtype=torch.float64)
        return State(v=unknown, silent=torch.zeros(n, dtype=torch.int64))

    def setup(self, state: State, candidates: Candidates) -> None:
        """Have the initial model scored, if asked for."""
        if self.initial == "none":
            return
        assert candidates.clients is not None
        got = candidates.clients.only(candidates.ids).call(self.initial_loss, x=candidates.model())
        state.v = self._valued(state.v, candidates, got.loss)

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Draw."""
        return self.propose(state, candidates, candidates.rng)

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """The same, from `rng`."""
        ids = candidates.ids
        p = self.weights(state.v[list(ids)]) * scoring.trust(state.silent[list(ids)])
        drawn = scoring.draw(p, math.floor((1.0 - self.alpha3) * candidates.count + 1e-9), rng)
        p = torch.ones(len(ids))
        p[drawn] = 0.0
        drawn += scoring.draw(p, candidates.count - len(drawn), rng)
        return sorted(ids[i] for i in drawn)

    def weights(self, v: Tensor) -> Tensor:
        """p [n] of valuations v [n], not normalised."""
        ignored = v.sort(stable=True).indices[: math.floor(self.alpha1 * len(v) + 1e-9)]
        v = v.clone()
        v[ignored] = -math.inf
        if self.alpha2 == 0.0:  # 0 times -inf is no number
            return torch.ones_like(v)
        return (self.alpha2 * v).clamp(max=_LARGEST).exp() + self.floor

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Value those who took part."""
        state.v = self._valued(state.v, candidates, {client: r.loss for client, r in outcome.reports.items()})
        state.silent = scoring.silence(state.silent, outcome)

    def _valued(self, v: Tensor, candidates: Candidates, losses: dict[int, float]) -> Tensor:
        sizes = dict(zip(candidates.ids, candidates.sizes, strict=True))
        v = v.clone()
        for client, loss in losses.items():
            if math.isfinite(loss):
                n = sizes[client]
                v[client] = loss * math.sqrt(n) if self.valuation == "sum" else loss / math.sqrt(n)
        return v

    @on_client
    def initial_loss(self, me: Me, data: ClientData, x: Weights) -> Loss:
        """Score the initial model."""
        return Loss(data.evaluate(x, "train").loss)
