"""What clients and sets of clients are worth to selectors: utilities from reports, scores of sets, draws by weight.

Pure functions of float64 tensors, and what selectors keep of all clients (`begin`, `updated`). A set is a row of 0 and
1 over all clients. Nothing here knows how a set is found or what travels.

Sources: F. Lai, X. Zhu, H. V. Madhyastha, M. Chowdhury, "Oort: Efficient Federated Learning via Guided Participant
Selection", OSDI 2021, with the authors' code (variant `oort`), and the code published for FedGCS
(zhiyuan-ning/GenerativeFL), which has it from Plato's example (variant `repo`).

    U_i = n_i sqrt(Q_i / n_i)         Q_i: sum over n_i samples of the squared loss; stale until i trains again
    u_i = ((min(U_i, c) - lo) / range + sqrt(0.1 ln r / L_i)) min(1, T* / t_i)^alpha min(1, E* / e_i)^beta    `oort`
    u_i = (U_i + sqrt(0.1 ln L_i / L_i)) min(1, T* / t_i)^alpha min(1, E* / e_i)^beta                        `repo`

with L_i the last round in which client i took part, t_i and e_i its seconds and joules. Departures: no statistical part
is less than 0, a client that was selected f times in a row without a reply counts 2^-f, and those that were never tried
are worth as much as the best, where the published `repo` never tries them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fldist.algorithm import State
from fldist.selection import Candidates, Outcome, UtilEpochs

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SLACK = 1.2
"""Times the median of what clients need is what is preferred, where nothing else is said."""
_SHORTEST = 1e-4
"""The least range of utilities, and of seconds, that is divided by, as in Oort's code."""


def _floats(values: Tensor | Sequence[float] | float) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


# ---- one client
def statistical_utility(n: Tensor | float, squares: Tensor | float) -> Tensor:
    """U = n sqrt(Q / n) of n samples whose squared losses sum to Q; 0 where n is 0, NaN where Q is not known."""
    samples, total = _floats(n), _floats(squares)
    return torch.where(samples == 0, 0.0, samples * (total / samples).sqrt())


def penalty(value: Tensor | float, preferred: float, exponent: float) -> Tensor:
    """min(1, preferred / value)^exponent; 1 where the value, or what is preferred, is not known (NaN)."""
    value = _floats(value)
    factor = (preferred / value.clamp(min=0.0)).clamp(max=1.0).nan_to_num(nan=1.0)
    return factor**exponent


def oort_utilities(
    utility: Tensor,
    sizes: Tensor,
    last: Tensor,
    number: int,
    seconds: Tensor,
    preferred: float,
    *,
    alpha: float = 2.0,
    clip: float = 0.98,
    optimistic: bool = False,
) -> Tensor:
    """u [n] of clients that may be chosen, as Oort's code has it at the selection of round `number`.

    utility: U, NaN of those that were never tried; sizes: training examples, their reward until then; last: L; seconds:
    t, NaN where unknown; preferred: T*. Normalised by all positive rewards, those of untried ones among them: from
    0.999 of the least to the largest, clipped at the value of rank floor(clip n). Untried clients get NaN, or, where
    `optimistic`, the largest statistical part of the tried ones and the bonus of a client last seen in round 1.
    """
    utility, sizes, last, seconds = _floats(utility), _floats(sizes), _floats(last), _floats(seconds)
    tried = ~utility.isnan()
    rewards = torch.where(tried, utility, sizes)
    rewards = rewards[rewards > 0].sort().values
    ceiling, low, spread = 0.0, 0.0, _SHORTEST
    if len(rewards):
        ceiling = float(rewards[min(math.floor(clip * len(rewards)), len(rewards) - 1)])
        low = 0.999 * float(rewards[0])
        spread = max(float(rewards[-1]) - low, _SHORTEST)
    statistical = ((utility.clamp(max=ceiling) - low) / spread).clamp(min=0.0)
    if optimistic:
        best = statistical[tried].max() if bool(tried.any()) else torch.ones((), dtype=torch.float64)
        statistical = torch.where(tried, statistical, best)
        last = torch.where(tried, last, 1.0)
    u = statistical + (0.1 * math.log(max(number, 1)) / last).sqrt()
    return u * penalty(seconds.clamp(min=_SHORTEST), preferred, alpha)


def repo_utility(
    utility: Tensor | float,
    number: Tensor | float,
    last: Tensor | float,
    seconds: Tensor | float,
    preferred: float,
    *,
    alpha: float = 2.0,
) -> Tensor:
    """u = (U + sqrt(0.1 ln r / L)) min(1, T* / t)^alpha; made once, when the report of round r = L has come."""
    bonus = (0.1 * _floats(number).log() / _floats(last)).sqrt()
    return (_floats(utility) + bonus) * penalty(seconds, preferred, alpha)


# ---- the preferred duration
def percentile_duration(durations: Tensor | Sequence[float], percent: float) -> float:
    """The duration of rank min(floor(n p / 100), n - 1) of the n that are known; infinite for p of 100, or of none."""
    known = _floats(durations)
    known = known[~known.isnan()].sort().values
    if percent >= 100.0 or not len(known):
        return math.inf
    return float(known[min(math.floor(len(known) * percent / 100.0), len(known) - 1)])


def pacer_oort(percent: float, history: Sequence[float], number: int, *, window: int = 20, step: float = 5.0) -> float:
    """p after round `number`: every W rounds, from round 2 W on, looser if little has changed, tighter if very much.

    history: mean utility of the exploited clients, a number for each round up to this one. With A and B its sums over
    the previous and the last W rounds: |B - A| <= 0.1 A raises p by a step, to 100 at most; |B - A| >= 5 A lowers it,
    to one step at least.
    """
    if number < 2 * window or number % window:
        return percent
    before, now = sum(history[-2 * window : -window]), sum(history[-window:])
    if abs(now - before) <= 0.1 * before:
        return min(100.0, percent + step)
    if abs(now - before) >= 5.0 * before:
        return max(step, percent - step)
    return percent


def pacer_repo(
    preferred: float, history: Sequence[float], number: int, *, window: int = 2, step: float = 50.0
) -> float:
    """T* after round `number`: one step more, in every round from 2 W on, if the participants' sum of U has fallen.

    history: that sum, a number for each round up to this one; its sums over the previous and the last W rounds count.
    """
    if number >= 2 * window and sum(history[-2 * window : -window]) > sum(history[-window:]):
        return preferred + step
    return preferred


# ---- sets of clients
def additive_score(sets: Tensor, u: Tensor) -> Tensor:
    """y(S) = sum of u_i over S, [C], of C sets as rows of 0 and 1 [C, N]; u [N]. The best of a size are the largest."""
    return _floats(sets) @ _floats(u)


def group_score(
    sets: Tensor,
    utility: Tensor,
    seconds: Tensor,
    joules: Tensor,
    preferred_s: float,
    preferred_joules: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """y(S) = (sum of U_i) min(1, T* / max t_i)^alpha min(1, E* / sum of e_i)^beta, [C]; not additive.

    sets [C, N]; utility, seconds, joules [N], the latter NaN where unknown, and then left out; preferred_joules: E* of
    a whole set.
    """
    chosen = _floats(sets)
    longest = (chosen * _floats(seconds).nan_to_num(nan=0.0)).amax(dim=1)
    spent = chosen @ _floats(joules).nan_to_num(nan=0.0)
    total = chosen @ _floats(utility)
    return total * penalty(longest, preferred_s, alpha) * penalty(spent, preferred_joules, beta)


def measured_score(
    gain: float,
    seconds: float | None,
    joules: float | None,
    preferred_s: float,
    preferred_joules: float,
    alpha: float,
    beta: float,
) -> float:
    """y of a real round: its gain in accuracy, times the penalties of its seconds and joules (None: nobody knows)."""
    longest = math.nan if seconds is None else seconds
    spent = math.nan if joules is None else joules
    return gain * float(penalty(longest, preferred_s, alpha) * penalty(spent, preferred_joules, beta))


# ---- choosing by numbers
def draw(weights: Tensor, count: int, rng: torch.Generator) -> list[int]:
    """Positions of `count` entries, in the order drawn: one after the other without replacement, in proportion.

    weights [n], at least 0; NaN counts as 0. Those of weight 0 come last, and are equally likely among themselves.
    """
    waits = -torch.log1p(-torch.rand(len(weights), generator=rng, dtype=torch.float64))
    weights = _floats(weights).nan_to_num(nan=0.0, posinf=torch.finfo(torch.float64).max).clamp(min=0.0)
    # the first of exponential clocks whose rates are the weights; an entry that is infinite would be a tie
    rates = weights / weights.max().clamp(min=torch.finfo(torch.float64).tiny) if len(weights) else weights
    running = rates > 0
    times = torch.where(running, waits / torch.where(running, rates, 1.0), waits)
    ranks = list(zip((~running).tolist(), times.tolist(), strict=True))
    return sorted(range(len(ranks)), key=ranks.__getitem__)[:count]


def largest(values: Tensor, count: int, rng: torch.Generator) -> list[int]:
    """Positions of the `count` largest entries, the largest first; equal ones in any order; NaN comes last."""
    order = torch.randperm(len(values), generator=rng)
    ranked = _floats(values).nan_to_num(nan=-math.inf)[order].sort(descending=True, stable=True).indices
    found: list[int] = order[ranked][:count].tolist()
    return found


# ---- what is known of clients
def begin(num_clients: int) -> State:
    """What is known of N clients before anything is: utility U, seconds, joules [N] (NaN: unknown), last (0: never took
    part), chosen (how often) and silent (how often in a row without a reply) [N] int64."""
    unknown = torch.full((num_clients,), math.nan, dtype=torch.float64)
    none = torch.zeros(num_clients, dtype=torch.int64)
    return State(utility=unknown, seconds=unknown, joules=unknown, last=none, chosen=none, silent=none)


def updated(known: State, outcome: Outcome, *, seconds: bool = True, joules: bool = True) -> State:
    """What is known after a round, in new tensors; numbers that are none, or below 0, teach nothing.

    seconds, joules: whether these are kept; what is measured and not used should make no two runs differ.
    """
    now = {name: known.values[name].clone() for name in ("utility", "seconds", "joules", "last", "chosen")}
    now["chosen"][list(outcome.selected)] += 1
    now["last"][[*outcome.replied, *outcome.reports]] = outcome.round
    for client, report in outcome.reports.items():
        told = {"utility": float(statistical_utility(report.n, report.squares))}
        if seconds:
            told["seconds"] = report.seconds
        if joules:
            told["joules"] = report.joules
        for name, value in told.items():
            if 0.0 <= value < math.inf:
                now[name][client] = value
    return State(**now, silent=silence(known.silent, outcome))


def silence(silent: Tensor, outcome: Outcome) -> Tensor:
    """How often in a row each client was selected and its reply not used, after a round; int64 [N], a new one."""
    silent = silent.clone()
    silent[list(outcome.selected)] += 1
    silent[list(outcome.replied)] = 0
    return silent


def trust(silent: Tensor) -> Tensor:
    """2^-f, [N]: what counts of a client whose reply was missing f times in a row; a dead one frees its place."""
    return torch.ldexp(torch.ones(len(silent), dtype=torch.float64), -silent)


def filled(by_client: Mapping[int, float], told: Tensor) -> Tensor:
    """A number for every client [N]: what it has told, else what is known of its device, else NaN."""
    if not by_client:
        return told
    of_device = torch.full_like(told, math.nan)
    of_device[list(by_client)] = _floats(list(by_client.values()))
    return torch.where(told.isnan(), of_device, told)


@dataclass(frozen=True)
class Utility:
    """How much a client is worth: the options of u_i for selectors that go by it, see above.

    variant: `oort` normalises U to 0..1 and lets the bonus grow with the rounds; `repo` does neither. alpha, beta:
    exponents of the penalties of slow and of hungry devices (0: none); duration, energy: T* seconds and E* joules of a
    client's training, null: 1.2 times the median of those known. untried: what clients that never took part are worth:
    `optimistic`: as much as the best one, times what their devices are known for; `zero`: nothing. epochs: local ones
    whose losses U is made of; `all` is as published, about sqrt(E) larger, and mixes losses before and after training.

    Where the section `devices` simulates nothing, seconds are measured and two runs choose differently, unless alpha is
    0 or the section `clock` is scripted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    variant: Literal["oort", "repo"] = "oort"
    alpha: NonNegative = 2.0
    beta: NonNegative = 1.0
    duration: Positive | None = None  # T*
    energy: Positive | None = None  # E*
    untried: Literal["optimistic", "zero"] = "optimistic"
    epochs: UtilEpochs = "first"

    def learn(self, known: State, outcome: Outcome) -> State:
        """`updated`, without what is not used."""
        return updated(known, outcome, seconds=self.alpha > 0, joules=self.beta > 0)

    def costs(self, known: State, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """t and e of all clients, [N] each: as reported, else as their devices have it, else NaN."""
        return filled(candidates.seconds, known.seconds), filled(candidates.joules, known.joules)

    def preferred(self, known: State, candidates: Candidates) -> tuple[float, float]:
        """T* and E* of a client's training; NaN where nothing is known to take them from."""
        ids = list(candidates.ids)
        seconds, joules = self.costs(known, candidates)
        return self._preferred(seconds[ids], joules[ids])

    def _preferred(self, seconds: Tensor, joules: Tensor) -> tuple[float, float]:
        return (
            _typical(seconds) if self.duration is None else self.duration,
            _typical(joules) if self.energy is None else self.energy,
        )

    def statistical(self, known: State, candidates: Candidates) -> Tensor:
        """U of all clients, [N]: raw, that of untried ones filled in; for scores of sets that have penalties of their
        own. 0 for clients without samples; 1 for all, as far as they answer, before anything is known."""
        ids = list(candidates.ids)
        utility = known.utility[ids]
        tried = ~utility.isnan()
        best = 1.0 if not bool(tried.any()) else float(utility[tried].max())
        worth = utility.nan_to_num(nan=best if self.untried == "optimistic" or not bool(tried.any()) else 0.0)
        return _spread(worth * trust(known.silent[ids]), ids, candidates.num_clients)

    def of(self, known: State, candidates: Candidates) -> Tensor:
        """u of all clients, [N]; 0 for those without samples.

        Before anything is known all are equal but for their devices.
        """
        ids = list(candidates.ids)
        seconds, joules = (cost[ids] for cost in self.costs(known, candidates))
        preferred_s, preferred_joules = self._preferred(seconds, joules)
        utility, last = known.utility[ids], known.last[ids]
        tried = ~utility.isnan()
        if self.variant == "oort":
            sizes = _floats(candidates.sizes)
            u = oort_utilities(
                utility, sizes, last, candidates.round, seconds, preferred_s, alpha=self.alpha, optimistic=True
            )
        else:
            raw = utility + repo_utility(0.0, last, last, math.nan, math.nan)
            best = raw[tried].max() if bool(tried.any()) else torch.ones((), dtype=torch.float64)
            u = torch.where(tried, raw, best) * penalty(seconds, preferred_s, self.alpha)
        if self.untried == "zero" and bool(tried.any()):
            u = torch.where(tried, u, 0.0)
        u = u * penalty(joules, preferred_joules, self.beta) * trust(known.silent[ids])
        return _spread(u, ids, candidates.num_clients)


def _typical(values: Tensor) -> float:
    """1.2 times the median of what is known; NaN where nothing is."""
    known = [value for value in values.tolist() if not math.isnan(value)]
    return SLACK * median(known) if known else math.nan


def _spread(values: Tensor, ids: Sequence[int], num_clients: int) -> Tensor:
    """Values of some clients as one for every client, 0 for the others."""
    whole = torch.zeros(num_clients, dtype=torch.float64)
    whole[list(ids)] = values
    return whole
