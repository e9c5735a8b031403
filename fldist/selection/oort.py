"""Oort: F. Lai, X. Zhu, H. V. Madhyastha, M. Chowdhury, "Oort: Efficient Federated Learning via Guided Participant
Selection", OSDI 2021. Most clients of a round are drawn by utility (exploited), the rest among those that were never
tried (explored). u_i, T* and the pacer are in `fldist/scoring.py`.

`oort` is the authors' code. With e = max(exploration decay^r, exploration_min), and 0 once everybody has been tried:

    x    = min(floor(K (1 - e)), tried clients) are exploited: drawn in proportion to u from those whose u is at least
           cut_off times that of the (x+1)-th
    K - x  are explored, as far as there are any: drawn in proportion to data size times (T* / t)^alpha from the 5 (K -
           x) for which that is largest; the places that are left go to any others, uniformly
    T*   = the p-th percentile of all durations, p moved by the pacer

`repo` is the code published for FedGCS, which has it from Plato's example. Round 1 draws from all. Later:

    x    = max(ceil((1 - exploration) K), K - untried clients) are exploited: drawn in proportion to u from those whose
           u is above cut_off times that of the x-th; where they are fewer, the next ones below follow in order
    K - x  are explored, uniformly; u_i is made once, when i reports, with the T* of that round, which only grows
    a client that was selected more than `blacklist` times is exploited no more

Departures from both: what was tried and how often is learnt from the rounds, whoever chose their clients, so that
proposals change nothing; a client that was selected f times in a row without a reply counts 2^-f of its u, and where it
was never tried is explored with probability 2^-f; the pacer of `oort` counts all clients that were tried before as
exploited, those that filled a place too. From `repo`: where it fails, because too few untried ones are left to explore,
places go to all others, those that are blacklisted last; where all utilities are 0 it skips the first client, here it
does not; untried clients that it exploits at utility 0 are not drawn a second time. From `oort`: no statistical part is
less than 0.

Where the section `devices` simulates nothing, t is measured, and two runs choose differently, unless alpha is 0 or the
section `clock` is scripted.

Messages of its own: none. Beside every reply of a client method that may train a report of 40 bytes travels up (kind
`report`): 40 S for S clients a round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fldist import scoring
from fldist.algorithm import State
from fldist.data.task import Task
from fldist.scoring import NonNegative, Positive
from fldist.selection import Candidates, Outcome, Selector, UtilEpochs

Share = Annotated[float, Field(ge=0, le=1)]

_OF = {
    "oort": {"cut_off": 0.7, "window": 20, "decay": 0.95, "exploration_min": 0.2, "percentile": 10.0},
    "repo": {"cut_off": 0.95, "window": 2, "duration": 50.0, "blacklist": 10},
}
"""What a field that is null means in a variant; the fields that another variant has alone are not to be set."""
_EXPLORE_AMONG = 5
"""Untried clients among which each explored place is drawn, those of most data."""


@dataclass(frozen=True)
class Oort(Selector):
    """Clients are drawn by utility, some among those that were never tried."""

    wants_reports: ClassVar[bool] = True

    variant: Literal["oort", "repo"] = "oort"
    exploration: Share = 0.9  # share of the places that are explored, at first
    cut_off: Share | None = None  # null: 0.7 (oort), 0.95 (repo)
    alpha: NonNegative = 2.0  # exponent of the penalty of slow clients; 0: none
    util_epochs: UtilEpochs = "first"  # local epochs whose losses U is made of; published for `repo`: all
    window: Annotated[int, Field(ge=1)] | None = None  # W, rounds of the pacer; null: 20 (oort), 2 (repo)
    # of `oort` alone
    decay: Share | None = None  # of the exploration in each round; null: 0.95
    exploration_min: Share | None = None  # null: 0.2
    percentile: Annotated[float, Field(ge=0, le=100)] | None = None  # p at first; null: 10
    # of `repo` alone
    duration: Positive | None = None  # T* at first, and the pacer's step, seconds; null: 50
    blacklist: Annotated[int, Field(ge=0)] | None = None  # null: 10

    def check(self, task: Task) -> None:
        """Refuse fields of the other variant, which nothing would look at."""
        for name in sorted(_OF["oort"].keys() ^ _OF["repo"].keys()):
            if getattr(self, name) is not None and name not in _OF[self.variant]:
                other = "repo" if self.variant == "oort" else "oort"
                raise ValueError(
                    f"selection.{name}: {getattr(self, name)} is of the variant {other}, and selection.variant is "
                    f"{self.variant}; remove it, or set the variant"
                )

    def _set(self, name: str) -> float:
        """A field's value, or what null means."""
        value = getattr(self, name)
        return float(_OF[self.variant][name] if value is None else value)

    def init(self, candidates: Candidates) -> State:
        """What is known of clients; the pacer's history, and what it paces: p, or T* and the u_i [N] made with it."""
        state = State(known=scoring.begin(candidates.num_clients), history=[])
        if self.variant == "oort":
            state.percentile = self._set("percentile")
        else:
            state.duration = self._set("duration")
            state.u = torch.zeros(candidates.num_clients, dtype=torch.float64)
        return state

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """Draw."""
        return self.propose(state, candidates, candidates.rng)

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """The same, from `rng`."""
        choose = self._oort if self.variant == "oort" else self._repo
        return sorted(candidates.ids[i] for i in choose(state, candidates, rng))

    # both give positions in candidates.ids
    def _oort(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        ids, count, known = list(candidates.ids), candidates.count, state.known
        sizes = torch.tensor(candidates.sizes, dtype=torch.float64)
        seconds = scoring.filled(candidates.seconds, known.seconds)[ids]
        duration = scoring.percentile_duration(seconds, state.percentile)
        trust = scoring.trust(known.silent[ids])
        u = scoring.oort_utilities(
            known.utility[ids], sizes, known.last[ids], candidates.round, seconds, duration, alpha=self.alpha
        )
        u = u * trust  # NaN of untried ones
        worths = u.tolist()
        tried = sorted((i for i, worth in enumerate(worths) if not math.isnan(worth)), key=lambda i: -worths[i])
        untried = [i for i, worth in enumerate(worths) if math.isnan(worth)]
        # a dead one that is the last untried would be explored for ever
        seem_alive = (torch.rand(len(ids), generator=rng, dtype=torch.float64) < trust).tolist()
        untried = [i for i in untried if seem_alive[i]]

        explores = max(self.exploration * self._set("decay") ** candidates.round, self._set("exploration_min"))
        share = 1.0 - explores if untried else 1.0
        num_exploited = min(math.floor(count * share + 1e-9), len(tried))
        cut = self._set("cut_off") * worths[tried[num_exploited]] if num_exploited < len(tried) else 0.0
        pool = [i for i in tried if worths[i] >= cut]
        chosen = [pool[i] for i in scoring.draw(u[pool], num_exploited, rng)]
        num_explored = min(len(untried), count - num_exploited)
        rewards = (sizes * scoring.penalty(seconds, duration, self.alpha))[untried]
        among = scoring.largest(rewards, _EXPLORE_AMONG * num_explored, rng)
        chosen += [untried[among[i]] for i in scoring.draw(rewards[among], num_explored, rng)]
        return chosen + _others(trust, chosen, count, rng)

    def _repo(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        ids, count, known = list(candidates.ids), candidates.count, state.known
        trust = scoring.trust(known.silent[ids])
        u = state.u[ids] * trust
        times, worths = known.chosen[ids].tolist(), u.tolist()
        most = self._set("blacklist")
        listed = [n > most for n in times]
        untried = [i for i, n in enumerate(times) if not n]
        chosen: list[int] = []
        num_exploited = max(math.ceil((1.0 - self.exploration) * count - 1e-9), count - len(untried))
        if num_exploited and len(untried) < len(ids):
            order = sorted(range(len(ids)), key=lambda i: -worths[i])
            cut = self._set("cut_off") * worths[order[num_exploited - 1]]
            pool = [i for i in order if worths[i] > cut and not listed[i]]
            chosen = [pool[i] for i in scoring.draw(u[pool], num_exploited, rng)]
            below = order[order.index(pool[-1]) + 1 :] if pool else order
            chosen += [i for i in below if not listed[i]][: num_exploited - len(chosen)]
        left = [i for i in untried if i not in chosen]
        chosen += [left[i] for i in scoring.draw(torch.ones(len(left)), count - len(chosen), rng)]
        return chosen + _others(trust.masked_fill(torch.tensor(listed), 0.0), chosen, count, rng)

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Take what the clients report, and pace."""
        before, window = state.known, int(self._set("window"))
        state.known = known = scoring.updated(before, outcome, seconds=self.alpha > 0, joules=False)
        told = {c: worth for c in outcome.reports if not math.isnan(worth := float(known.utility[c]))}
        if self.variant == "oort":
            exploited = [worth for c, worth in told.items() if not bool(before.utility[c].isnan())]
            util = math.fsum(exploited) / max(1, len(exploited))
            state.history = [*state.history, util][-2 * window :]
            state.percentile = scoring.pacer_oort(state.percentile, state.history, outcome.round, window=window)
            return
        seconds, u = scoring.filled(candidates.seconds, known.seconds), state.u.clone()
        for c, worth in told.items():
            u[c] = scoring.repo_utility(
                worth, outcome.round, outcome.round, seconds[c], state.duration, alpha=self.alpha
            )
        state.u = u
        state.history = [*state.history, math.fsum(told.values())][-2 * window :]
        state.duration = scoring.pacer_repo(
            state.duration, state.history, outcome.round, window=window, step=self._set("duration")
        )


def _others(weights: Tensor, chosen: list[int], count: int, rng: torch.Generator) -> list[int]:
    """For places that are left, others, drawn by weights [n]."""
    if len(chosen) == count:
        return []
    others = [i for i in range(len(weights)) if i not in chosen]
    return [others[i] for i in scoring.draw(weights[others], count - len(chosen), rng)]
