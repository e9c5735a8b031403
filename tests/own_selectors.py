"""Selectors of tests' own, outside the package as a user's would be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fldist.algorithm import Me, State, on_client
from fldist.data.client_data import ClientData
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.params import Params
from fldist.selection import Candidates, Outcome, Probe, Selector


class Loss(NamedTuple):
    loss: Scalar


class Trained(NamedTuple):
    y: Weights
    n: Scalar


@dataclass(frozen=True)
class Asks(Selector):
    """Everybody trains an epoch in the setup; two clients a round say their loss; the choice follows from all of it.

    fails: a client that raises when it is asked; spoils: changes its state in place.
    """

    wants_reports: ClassVar[bool] = True

    fails: int = -1
    spoils: bool = False

    def init(self, candidates: Candidates) -> State:
        return State(seen=torch.zeros(candidates.num_clients, dtype=torch.float64), rounds=0, told=[])

    def setup(self, state: State, candidates: Candidates) -> None:
        assert candidates.clients is not None
        got = candidates.clients.all().call(self.begin, x=candidates.model(), fold={"y": Mean(by="n")})
        state.start = got.y

    def select(self, state: State, candidates: Candidates) -> list[int]:
        assert candidates.clients is not None
        asked = [candidates.ids[(candidates.round + i) % len(candidates.ids)] for i in range(2)]
        got = candidates.clients.only(asked).call(self.loss, x=candidates.model())
        seen = state.seen.clone()
        for client, loss in got.loss.items():
            seen[client] += loss
        state.seen = seen
        order = sorted(candidates.ids, key=lambda c: (float(state.seen[c]), c))
        return sorted(order[: candidates.count])

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        if self.spoils:
            state.seen[0] += 1.0
        seen = state.seen.clone()
        for client, report in outcome.reports.items():
            seen[client] += report.loss
        state.seen = seen
        state.rounds = state.rounds + 1
        accuracy = outcome.accuracy if outcome.accuracy is not None else -1.0
        state.told = [*state.told, [outcome.round, list(outcome.selected), list(outcome.replied), accuracy]]

    @on_client
    def begin(self, me: Me, data: ClientData, x: Weights) -> Trained:
        return Trained(data.train(x, epochs=1).params, data.n)

    @on_client
    def loss(self, me: Me, data: ClientData, x: Weights) -> Loss:
        if data.client == self.fails:
            raise ValueError("nothing to say")
        return Loss(data.evaluate(x, "train").values["loss"])


@dataclass(frozen=True)
class Fixed(Selector):
    """The same clients in every round."""

    sets: tuple[tuple[int, ...], ...] = ((0, 1),)

    def select(self, state: State, candidates: Candidates) -> list[int]:
        return list(self.sets[(candidates.round - 1) % len(self.sets)])


@dataclass(frozen=True)
class Begins(Selector):
    """Has the first `among` clients begin; those of the largest losses go on."""

    probes: ClassVar[bool] = True
    among: int = 4

    def init(self, candidates: Candidates) -> State:
        return State(kept=[], losses=[])

    def select(self, state: State, candidates: Candidates) -> list[int]:
        return list(candidates.ids[: self.among])

    def keep(self, state: State, candidates: Candidates, probes: Mapping[int, Probe]) -> list[int]:
        kept = sorted(sorted(probes, key=lambda c: (-probes[c].loss, c))[: candidates.count])
        state.kept = [*state.kept, kept]
        state.losses = [*state.losses, {str(c): p.loss for c, p in probes.items()}]
        assert all(p.seconds > 0 for p in probes.values())
        return kept


@dataclass(frozen=True)
class Looks(Selector):
    """Keeps the norm of every model that comes back."""

    wants_models: ClassVar[bool] = True
    wants_accuracy: ClassVar[bool] = True

    def init(self, candidates: Candidates) -> State:
        return State(norms=[])

    def select(self, state: State, candidates: Candidates) -> list[int]:
        return list(candidates.ids[: candidates.count])

    def digest(self, state: State, model: Params) -> Tensor:
        return model.floats.double().norm()

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        assert outcome.accuracy is not None
        state.norms = [*state.norms, {str(c): float(m) for c, m in outcome.models.items()}]


@dataclass(frozen=True)
class Proposes(Selector):
    """One of some sets, by lot; none where there are none."""

    sets: tuple[tuple[int, ...], ...] = ()

    def select(self, state: State, candidates: Candidates) -> list[int]:
        return list(candidates.ids[: candidates.count])

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        return list(self.sets[int(torch.randint(len(self.sets), (1,), generator=rng))]) if self.sets else []
