"""Power-of-choice: Y. J. Cho, J. Wang, G. Joshi, "Client Selection in Federated Learning: Convergence Analysis and
Power-of-Choice Selection Strategies", arXiv 2010.01243, section 4. Of some clients drawn at random, those take part on
whose data the global model has the largest loss.

    A = d clients drawn without replacement with probability n_i / sum n_j
    S = the K of A with the largest loss F_i(x)

`pow_d` asks the candidates for the loss of the present global model on all their training samples. `rpow_d` takes the
mean training loss that a client reported last, infinite before its first report, and asks nobody; the loss here is that
of the client's first local epoch.

Candidates that do not answer are the last to be chosen, in the order of what is known of them. A client that was
selected f times in a row without a reply counts 2^-f of its loss (of the largest known one, if it has none). Proposals
go by the losses last known, reported or asked for, whatever the variant.

Bytes, with S clients a round and B_w of the model that travels:

    weights, select    d B_w down     `pow_d`
    scalars, select    8 d up         `pow_d`: losses
    report             40 S up        `rpow_d`, beside every reply of a client method that may train
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from fldist import scoring
from fldist.algorithm import Me, State, TooFewReplies, on_client
from fldist.data.client_data import ClientData
from fldist.kinds import Scalar, Weights
from fldist.selection import Candidates, Outcome, Selector


class Loss(NamedTuple):
    """One candidate's reply."""

    loss: Scalar  # F_i(x), mean cross-entropy on its training samples


@dataclass(frozen=True)
class PowerOfChoice(Selector):
    """Of d clients drawn by their samples, those of the largest loss."""

    d: Annotated[int, Field(ge=1)] | None = None  # candidates, all clients at most; null: twice those that take part
    variant: Literal["pow_d", "rpow_d"] = "pow_d"

    @property
    def wants_reports(self) -> bool:  # type: ignore[override]
        """Losses that clients report are looked at by `rpow_d` alone."""
        return self.variant == "rpow_d"

    def init(self, candidates: Candidates) -> State:
        """Losses last known [N], NaN where there is none, and how often in a row a client has not answered."""
        if self.d is not None and self.d < candidates.count:
            raise ValueError(
                f"selection.d: {self.d} candidates, but {candidates.count} clients are to take part in a round; "
                "raise it, or lower clients.per_round or clients.fraction"
            )
        n = candidates.num_clients
        unknown = torch.full((n,), math.nan, dtype=torch.float64)
        return State(losses=unknown, silent=torch.zeros(n, dtype=torch.int64))

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Draw candidates, ask them, and choose."""
        drawn, asked = self._drawn(candidates, candidates.rng), {}
        if self.variant == "pow_d":
            assert candidates.clients is not None
            with contextlib.suppress(TooFewReplies):
                asked = candidates.clients.only(drawn).call(self.loss, x=candidates.model()).loss
        told = self._take(state, asked)
        others = [c for c in drawn if c not in told]
        first = self._largest(state, candidates, told, candidates.rng)
        return sorted([*first, *self._largest(state, candidates, others, candidates.rng)][: candidates.count])

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """By the losses last known."""
        return sorted(self._largest(state, candidates, self._drawn(candidates, rng), rng))

    def _drawn(self, candidates: Candidates, rng: torch.Generator) -> list[int]:
        d = 2 * candidates.count if self.d is None else self.d
        sizes = torch.tensor(candidates.sizes, dtype=torch.float64)
        return sorted(candidates.ids[i] for i in scoring.draw(sizes, d, rng))

    def _largest(self, state: State, candidates: Candidates, among: Sequence[int], rng: torch.Generator) -> list[int]:
        """Of these clients the `count` of the largest losses, the largest first."""
        losses, silent = state.losses[list(among)], state.silent[list(among)]
        known = state.losses[state.losses.isfinite()]
        most = float(known.max()) if len(known) else 1.0
        new = losses.isnan() & (silent == 0)
        worth = losses.nan_to_num(nan=most) * scoring.trust(silent)
        return [among[i] for i in scoring.largest(torch.where(new, math.inf, worth), candidates.count, rng)]

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Take the losses that clients report."""
        self._take(state, {client: report.loss for client, report in outcome.reports.items()})
        state.silent = scoring.silence(state.silent, outcome)

    def _take(self, state: State, told: Mapping[int, float]) -> list[int]:
        """Keep the losses of clients that are numbers; returns whose."""
        losses = {client: loss for client, loss in told.items() if math.isfinite(loss)}
        state.losses = state.losses.index_put(
            (torch.tensor(list(losses), dtype=torch.int64),), torch.tensor(list(losses.values()), dtype=torch.float64)
        )
        return sorted(losses)

    @on_client
    def loss(self, me: Me, data: ClientData, x: Weights) -> Loss:
        """Score the global model."""
        return Loss(data.evaluate(x, "train").loss)
