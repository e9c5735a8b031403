"""The selectors' laws against what they are by definition: the exact distribution over sets, enumerated in plain Python,
or the set itself where the law leaves no choice. The generative one's networks and search: `test_fedgcs_equations.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fldist.algorithm import State
from fldist.params import Params
from fldist.q_learning import Mlp, improved, learner
from fldist.scoring import pacer_oort, percentile_duration
from fldist.selection import Candidates, ClientReport, Outcome, Selector
from fldist.selection.afl import Afl
from fldist.selection.favor import double_targets, project, sampled
from fldist.selection.favor import fit as favor_fit
from fldist.selection.favor import reward as favor_reward
from fldist.selection.fedcor import Covariance, FedCor, columns, discounted_mean, likelihood
from fldist.selection.fedcor import fit as fedcor_fit
from fldist.selection.fedgcs import FedGCS
from fldist.selection.oort import Oort
from fldist.selection.random import Random
from fldist.selection.topk import TopK

NAN = math.nan


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Any, want: Any, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64), rtol=0, atol=atol)


def report(utility: float, size: int = 10, seconds: float = 20.0, loss: float | None = None) -> ClientReport:
    """One whose statistical utility n sqrt(Q / n) is the one wanted."""
    return ClientReport(float(size), utility**2 / size, utility / size if loss is None else loss, seconds, NAN)


class Trial:
    """A selector in a made-up federation, told of rounds that somebody chose."""

    def __init__(
        self,
        selector: Selector,
        n: int,
        k: int,
        sizes: Sequence[int] | None = None,
        seconds: Mapping[int, float] | None = None,
        joules: Mapping[int, float] | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        ids = list(range(n)) if ids is None else list(ids)
        self.selector = selector
        self.logged: dict[str, Any] = {}
        self.base = Candidates(
            ids, sizes or [10] * len(ids), k, num_clients=n, seconds=seconds or {}, joules=joules or {},
            log=lambda **values: self.logged.update(values),
        )  # fmt: skip
        self.reports: dict[int, ClientReport] = {}
        self.round = 1
        self.state = selector.init(self.at())
        selector.setup(self.state, self.at())

    def at(self, rng: torch.Generator | None = None) -> Candidates:
        return replace(self.base, round=self.round, reports=dict(self.reports), rng=rng or gen(1000 + self.round))

    def tell(
        self, reports: Mapping[int, ClientReport], selected: Sequence[int] | None = None, accuracy: float | None = 0.5
    ) -> None:
        """The end of a round."""
        self.reports |= reports
        chosen = tuple(sorted(reports if selected is None else selected))
        outcome = Outcome(self.round, chosen, tuple(sorted(reports)), dict(reports), accuracy)
        self.selector.observe(self.state, self.at(), outcome)
        self.round += 1

    def select(self, seed: int = 0) -> list[int]:
        return self.selector.select(self.state, self.at(gen(seed)))

    def proposed(self, times: int, first: int = 0) -> dict[frozenset[int], float]:
        """How often it proposes which set."""
        counts: dict[frozenset[int], float] = {}
        candidates = self.at()
        for seed in range(first, first + times):
            got = self.selector.propose(self.state, candidates, gen(seed))
            assert got == sorted(set(got))
            counts[frozenset(got)] = counts.get(frozenset(got), 0) + 1 / times
        return counts


def draws(weights: Mapping[int, float], x: int) -> dict[frozenset[int], float]:
    """The law of x draws without replacement, each proportional to the weights that are left."""
    out: dict[frozenset[int], float] = {}
    for order in itertools.permutations(weights, x):
        left, p = sum(weights.values()), 1.0
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        if p > 0:
            out[frozenset(order)] = out.get(frozenset(order), 0) + p
    return out


def uniform(ids: Sequence[int], x: int) -> dict[frozenset[int], float]:
    return draws(dict.fromkeys(ids, 1.0), x)


def then(
    law: Mapping[frozenset[int], float], more: Callable[[frozenset[int]], Mapping[frozenset[int], float]]
) -> dict[frozenset[int], float]:
    """The law of a set and what is drawn after it."""
    out: dict[frozenset[int], float] = {}
    for s, p in law.items():
        for t, q in more(s).items():
            assert not s & t
            out[s | t] = out.get(s | t, 0) + p * q
    return out


TIMES = 1000


def same_law(got: Mapping[frozenset[int], float], want: Mapping[frozenset[int], float], times: int = TIMES) -> None:
    """No set outside the law's support, and a chi-squared statistic within four deviations of its mean; rare sets are
    taken together. Seeds are fixed, so that chance has no part in it."""
    assert set(got) <= set(want), f"cannot be chosen: {[sorted(s) for s in set(got) - set(want)]}"
    assert sum(want.values()) == pytest.approx(1)
    often = [s for s, p in want.items() if p * times >= 5]
    cells = [(got.get(s, 0), want[s]) for s in often]
    rest = 1 - sum(p for _, p in cells)
    if rest * times >= 5:
        cells.append((1 - sum(f for f, _ in cells), rest))
    statistic = sum(times * (f - p) ** 2 / p for f, p in cells)
    degrees = max(1, len(cells) - 1)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), {tuple(sorted(s)): (got.get(s, 0), want[s]) for s in often}


# ---- random, top-k
def test_random_draws_every_set_equally_often() -> None:
    same_law(Trial(Random(), 5, 2).proposed(TIMES), uniform(range(5), 2))
    same_law(Trial(Random(), 9, 2, ids=[1, 4, 8]).proposed(TIMES), uniform([1, 4, 8], 2))


def test_topk_takes_those_of_the_largest_utility() -> None:
    trial = Trial(TopK(), 6, 2)
    trial.tell({i: report(u) for i, u in enumerate([3.0, 9.0, 1.0, 7.0, 5.0, 2.0])})
    assert trial.select() == [1, 3]
    trial.tell({1: report(4.0), 3: report(0.5)})
    assert trial.select() == [1, 4]


# ---- Oort as in the repository
def oort_repo(
    u: Sequence[float], tried: Sequence[int], k: int, black: Sequence[int] = ()
) -> dict[frozenset[int], float]:
    """The law of a round after the first."""
    n = len(u)
    unexplored = [i for i in range(n) if i not in tried]
    exploit = max(math.ceil((1 - 0.9) * k), k - len(unexplored))
    order = sorted(range(n), key=lambda i: -u[i])
    cut = 0.95 * u[order[exploit - 1]]
    pool = [i for i in order if i not in black and u[i] > cut]
    below = [i for i in order if i not in black and i not in pool]

    def fill(s: frozenset[int]) -> dict[frozenset[int], float]:
        return {frozenset(below[: exploit - len(s)]): 1.0}

    def explore(s: frozenset[int]) -> dict[frozenset[int], float]:
        left = [i for i in unexplored if i not in s]
        need = k - len(s)
        if need <= len(left):
            return uniform(left, need)
        rest = [i for i in range(n) if i not in s and i not in left]
        return then({frozenset(left): 1.0}, lambda _: uniform(rest, need - len(left)))

    return then(then(draws({i: u[i] for i in pool}, min(len(pool), exploit)), fill), explore)


def repo(n: int, k: int, **more: Any) -> Trial:
    return Trial(Oort(variant="repo"), n, k, **more)


def test_the_first_round_explores_at_random() -> None:
    same_law(repo(5, 2).proposed(TIMES), uniform(range(5), 2))
    same_law(Trial(Oort(), 5, 2).proposed(TIMES), uniform(range(5), 2))


def repo_utilities(u: Sequence[float], r: int, seconds: Sequence[float], preferred: float = 50.0) -> list[float]:
    return [
        (x + math.sqrt(0.1 * math.log(r) / r)) * (1.0 if t <= preferred else (preferred / t) ** 2)
        for x, t in zip(u, seconds, strict=True)
    ]


def test_repo_when_all_are_tried_draws_by_utility_above_the_cut() -> None:
    u = [100.0, 102.0, 96.9, 97.5, 60.0, 99.0]
    trial = repo(6, 3)
    trial.tell({i: report(x) for i, x in enumerate(u)})
    law = oort_repo(repo_utilities(u, 1, [20.0] * 6), range(6), 3)
    assert 4 < len(law) < 20
    same_law(trial.proposed(TIMES), law)


def test_repo_slow_clients_count_less_and_the_bonus_is_that_of_the_round_of_the_report() -> None:
    u = [0.5, 0.9, 0.6, 0.55, 0.8, 0.7]
    seconds = [20.0, 56.0, 20.0, 50.0, 53.0, 50.5]
    trial = repo(6, 2)
    trial.tell({0: report(5.0)})
    trial.tell({i: report(x, seconds=t) for i, (x, t) in enumerate(zip(u, seconds, strict=True))})
    values = repo_utilities(u, 2, seconds)
    same_law(trial.proposed(TIMES), oort_repo(values, range(6), 2))
    assert oort_repo(values, range(6), 2) != oort_repo(repo_utilities(u, 1, seconds), range(6), 2)


@pytest.mark.parametrize("tried", [(1, 2, 3, 4), (0, 2, 5), (3,)])
def test_repo_the_rest_is_drawn_from_the_unexplored(tried: tuple[int, ...]) -> None:
    u = [5.0, 7.0, 6.9, 2.0, 6.8, 9.0]
    trial = repo(6, 3)
    trial.tell({i: report(u[i]) for i in tried})
    values = [x if i in tried else 0.0 for i, x in enumerate(u)]
    same_law(trial.proposed(TIMES), oort_repo(values, tried, 3))


def test_repo_who_was_chosen_more_than_ten_times_is_out_for_ever() -> None:
    for times, out in ((10, ()), (11, (5,))):
        trial = repo(6, 2)
        u = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]
        trial.tell({i: report(u[i]) for i in range(5)})
        for _ in range(times):
            trial.tell({5: report(u[5])})
        r = trial.round - 1
        values = [*repo_utilities(u[:5], 1, [1.0] * 5), *repo_utilities(u[5:], r, [1.0])]
        same_law(trial.proposed(TIMES), oort_repo(values, range(6), 2, out))


def test_repo_blacklisted_clients_and_too_few_unexplored_are_no_error() -> None:
    trial = repo(4, 3)
    for _ in range(12):
        trial.tell({i: report(10.0) for i in range(4)})
    got = trial.proposed(200)
    assert all(len(s) == 3 for s in got)
    assert len(got) == 4


def test_repo_utilities_of_nought_skip_nobody() -> None:
    trial = repo(4, 2)
    trial.tell({i: report(0.0) for i in range(4)})
    got = trial.proposed(200)
    assert all(len(s) == 2 for s in got)
    assert any(0 in s for s in got)


def test_repo_the_pacer_allows_fifty_seconds_more_when_utility_falls() -> None:
    """W = 2: at the end of round 4 rounds 1 and 2 are compared with rounds 3 and 4."""
    seconds = {0: 20.0, 1: 100.0, 2: 20.0}
    for sums, preferred in (([9.0, 9.0, 1.0, 1.0], 100.0), ([1.0, 1.0, 9.0, 9.0], 50.0), ([2.0, 2.0, 2.0, 2.0], 50.0)):
        trial = repo(3, 1)
        for x in sums:
            trial.tell({0: report(x), 2: report(x)})
        trial.tell({1: report(50.0, seconds=seconds[1]), 2: report(30.0), 0: report(0.0)})
        (got,) = trial.proposed(20)
        # 100 s count a quarter of 50 under 50 s, and in full under 100 s
        assert got == frozenset([1] if preferred == 100 else [2])


# ---- Oort as published
def oort_values(
    rewards: Sequence[float], last: Sequence[int], seconds: Sequence[float], r: int, p: float = 10.0
) -> tuple[list[float], float]:
    """(u_i of the tried, T*). rewards: U_i of the tried, sizes of the others; last: 0 where never tried."""
    durations = sorted(seconds)
    preferred = math.inf if p >= 100 else durations[min(math.floor(len(seconds) * p / 100), len(seconds) - 1)]
    positive = sorted(x for x in rewards if x > 0)
    cap = positive[min(math.floor(0.98 * len(positive)), len(positive) - 1)]
    low = 0.999 * positive[0]
    spread = max(positive[-1] - low, 1e-4)
    out = []
    for x, at, t in zip(rewards, last, seconds, strict=True):
        u = (min(x, cap) - low) / spread + math.sqrt(0.1 * math.log(r) / max(at, 1))
        out.append(u * ((preferred / max(1e-4, t)) ** 2 if t > preferred else 1.0) if at else 0.0)
    return out, preferred


def oort_law(
    u: Sequence[float], tried: Sequence[int], initial: Sequence[float], k: int, r: int
) -> dict[frozenset[int], float]:
    n = len(u)
    unexplored = [i for i in range(n) if i not in tried]
    epsilon = max(0.9 * 0.95**r, 0.2) if unexplored else 0.0
    x = min(math.floor(k * (1 - epsilon)), len(tried))
    order = sorted(tried, key=lambda i: -u[i])
    cut = 0.7 * u[order[min(x, len(order) - 1)]]
    pool = {i: u[i] for i in order if u[i] >= cut}

    def explore(s: frozenset[int]) -> dict[frozenset[int], float]:
        m = min(len(unexplored), k - len(s))
        near = sorted(unexplored, key=lambda i: -initial[i])[: min(5 * m, len(unexplored))]
        return draws({i: initial[i] for i in near}, m)

    def fill(s: frozenset[int]) -> dict[frozenset[int], float]:
        return uniform([i for i in range(n) if i not in s], k - len(s))

    return then(then(draws(pool, x), explore), fill)


def published(
    n: int, k: int, utilities: Mapping[int, float], last: Mapping[int, int], sizes: Sequence[int], seconds: Sequence[float], r: int
) -> Trial:
    trial = Trial(Oort(variant="oort"), n, k, sizes=sizes, seconds=dict(enumerate(seconds)))
    for at in range(1, r):
        trial.tell(
            {i: report(x, sizes[i], seconds[i]) for i, x in utilities.items() if last[i] == at},
        )
    assert trial.round == r
    return trial


def test_oort_when_all_are_tried_exploits_by_normalised_utility_and_time_since_last() -> None:
    u = {0: 50.0, 1: 40.0, 2: 30.0, 3: 45.0, 4: 48.0}
    last = {0: 3, 1: 1, 2: 4, 3: 2, 4: 1}
    sizes = [10] * 5
    for seconds in ([20.0] * 5, [20.0, 22.0, 24.0, 20.0, 30.0]):
        trial = published(5, 2, u, last, sizes, seconds, 6)
        values, _ = oort_values([u[i] for i in range(5)], [last[i] for i in range(5)], seconds, 6)
        law = oort_law(values, range(5), [0.0] * 5, 2, 6)
        assert len(law) > 2
        same_law(trial.proposed(TIMES), law)


def test_oort_explores_the_unexplored_by_data_size_and_speed() -> None:
    sizes = [20, 30, 10, 40, 15, 25, 60]
    u, last = {0: 33.0, 1: 20.0, 2: 29.0}, {0: 20, 1: 25, 2: 12}
    for seconds in ([20.0] * 7, [20.0, 25.0, 20.0, 40.0, 20.0, 22.0, 80.0]):
        trial = published(7, 3, u, last, sizes, seconds, 30)
        rewards = [u.get(i, float(sizes[i])) for i in range(7)]
        values, preferred = oort_values(rewards, [last.get(i, 0) for i in range(7)], seconds, 30)
        initial = [s * ((preferred / t) ** 2 if t > preferred else 1.0) for s, t in zip(sizes, seconds, strict=True)]
        law = oort_law(values, [0, 1, 2], initial, 3, 30)
        same_law(trial.proposed(TIMES), law)


def test_oort_only_the_nearest_five_times_as_many_are_explored() -> None:
    sizes = [10, 80, 70, 60, 50, 40, 30, 20]
    trial = published(8, 1, {0: 5.0}, {0: 1}, sizes, [20.0] * 8, 2)
    got = trial.proposed(TIMES)
    same_law(got, draws({i: float(sizes[i]) for i in range(1, 6)}, 1))


@pytest.mark.parametrize(
    ("before", "now", "round_", "want"),
    [
        (1.0, 1.05, 40, 15.0),  # little has changed
        (1.0, 0.95, 40, 15.0),
        (1.0, 1.2, 40, 10.0),
        (1.0, 0.5, 40, 10.0),
        (1.0, 7.0, 40, 5.0),  # very much
        (1.0, 1.0, 39, 10.0),
        (1.0, 1.0, 41, 10.0),
        (1.0, 1.0, 20, 10.0),
        (0.0, 0.0, 60, 15.0),
    ],
)
def test_oort_the_pacer_moves_the_percentile_every_window(before: float, now: float, round_: int, want: float) -> None:
    history = [before] * 20 + [now] * 20
    assert pacer_oort(10.0, history, round_) == want


def test_oort_the_percentile_stays_between_a_step_and_a_hundred() -> None:
    assert pacer_oort(98.0, [1.0] * 40, 40) == 100
    assert pacer_oort(8.0, [1.0] * 20 + [9.0] * 20, 40) == 5
    durations = [30.0, 10.0, 20.0, 50.0, 40.0, 60.0, 70.0]
    for p, want in [(0, 10.0), (10, 10.0), (15, 20.0), (50, 40.0), (99, 70.0), (100, math.inf)]:
        assert percentile_duration(durations, p) == want


def test_oort_after_rounds_of_unchanged_utility_slower_clients_are_allowed() -> None:
    """W = 2: in round 1 nobody is exploited, so that rounds 3 to 6 are the first that are alike; the percentile goes
    from 10 to 15, of 7 durations from the first to the second."""
    seconds = dict(enumerate([20.0, 24.0, 28.0, 32.0, 36.0, 40.0, 44.0]))
    for rounds, p in ((5, 10.0), (6, 15.0)):
        trial = Trial(Oort(window=2), 7, 2, seconds=seconds)
        for _ in range(rounds):
            trial.tell({i: report(5.0 + i, seconds=seconds[i]) for i in range(7)})
        values, preferred = oort_values([5.0 + i for i in range(7)], [rounds] * 7, list(seconds.values()), rounds + 1, p)
        assert preferred == (20.0 if p == 10 else 24.0)
        same_law(trial.proposed(TIMES), oort_law(values, range(7), [0.0] * 7, 2, rounds + 1))


# ---- AFL
def afl_law(values: Sequence[float], k: int) -> dict[frozenset[int], float]:
    """values: mean loss / sqrt(n) of those who took part, -inf else."""
    n = len(values)
    v = list(values)
    for i in sorted(range(n), key=lambda i: v[i])[: math.floor(0.75 * n)]:
        v[i] = -math.inf
    p = {i: math.exp(0.01 * v[i]) + 0.01 for i in range(n)}
    x = math.floor(0.9 * k)
    return then(draws(p, x), lambda s: uniform([i for i in range(n) if i not in s], k - x))


def test_afl_draws_by_valuation_and_some_uniformly() -> None:
    sizes, losses = [4, 9, 16, 25, 36, 9, 9, 9], [400.0, 90.0, 300.0, 10.0, 0.0, 600.0, 5.0, 0.0]
    for valuation in ("mean", "sum"):
        trial = Trial(Afl(valuation=valuation), 8, 3, sizes=sizes)
        trial.tell({i: report(1.0, sizes[i], loss=losses[i] / (20 if valuation == "sum" else 1)) for i in range(7)})
        values = [
            x / math.sqrt(n) if valuation == "mean" else n * x / 20 / math.sqrt(n)
            for x, n in zip(losses[:7], sizes[:7], strict=True)
        ]
        law = afl_law([*values, -math.inf], 3)
        assert len(law) == 56
        same_law(trial.proposed(TIMES), law)


def test_afl_knows_nothing_at_first() -> None:
    same_law(Trial(Afl(), 5, 2).proposed(TIMES), uniform(range(5), 2))


# ---- what all selectors have in common
def values(state: Any) -> Any:
    """A state as plain values that compare."""
    if isinstance(state, State):
        return {k: values(v) for k, v in state.values.items()}
    if isinstance(state, Params):
        return values(state.floats), values(state.ints)
    if isinstance(state, Tensor | float):  # as text, since NaN is not equal to itself
        return repr(state.tolist() if isinstance(state, Tensor) else state)
    if isinstance(state, Mapping):
        return {k: values(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return [values(v) for v in state]
    return state


def learnt(selector: Selector, n: int = 6, k: int = 3, **more: Any) -> Trial:
    """A selector that has seen a few rounds."""
    trial = Trial(selector, n, k, seconds={i: 20.0 + i for i in range(n)}, joules={i: 50.0 + i for i in range(n)}, **more)
    draw = torch.rand(8, n, generator=gen(5)).tolist()
    for r in range(6):
        who = [(r + j * 2) % n for j in range(k)] if r else list(range(k))
        trial.tell({i: report(1 + 9 * draw[r][i], 10, 20.0 + i) for i in sorted(set(who))}, accuracy=0.1 * r)
    return trial


SMALL_NET = {"hidden": 8, "width": 8, "epochs": 5, "steps": 2}
SELECTORS: dict[str, Callable[[], Selector]] = {
    "random": Random,
    "topk": TopK,
    "oort": Oort,
    "repo": lambda: Oort(variant="repo"),
    "afl": Afl,
    "fedgcs": lambda: FedGCS(**SMALL_NET),
    "fedgcs group": lambda: FedGCS(score="group", **SMALL_NET),
}
each_selector = pytest.mark.parametrize("name", SELECTORS)


@each_selector
def test_a_proposal_leaves_the_state_and_the_global_generators_alone_and_follows_from_its_generator(name: str) -> None:
    trial = learnt(SELECTORS[name]())
    before = values(trial.state)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    candidates = trial.at()
    own = candidates.rng.get_state()
    first = [trial.selector.propose(trial.state, candidates, gen(s)) for s in range(5)]
    assert values(trial.state) == before
    assert torch.equal(candidates.rng.get_state(), own)
    again = [trial.selector.propose(trial.state, trial.at(), gen(s)) for s in range(5)]
    assert first == again
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()


@each_selector
def test_a_selection_follows_from_state_and_generator_and_touches_no_global_one(name: str) -> None:
    ends = []
    for _ in range(2):
        trial = learnt(SELECTORS[name]())
        states = torch.get_rng_state(), np.random.get_state()[1].tolist()
        got = trial.select(3)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == np.random.get_state()[1].tolist()
        ends.append((got, values(trial.state)))
        torch.manual_seed(123)
        np.random.seed(5)
    assert ends[0] == ends[1]


@each_selector
def test_values_of_a_state_are_replaced_not_changed_in_place(name: str) -> None:
    trial = learnt(SELECTORS[name]())
    old = trial.state.copy()
    before = values(old)
    trial.tell({i: report(3.0 + i) for i in trial.select(1)})
    trial.select(2)
    assert values(old) == before


@each_selector
def test_when_all_are_asked_all_are_chosen(name: str) -> None:
    for trial in (Trial(SELECTORS[name](), 4, 4), learnt(SELECTORS[name](), 4, 4)):
        assert trial.select() == [0, 1, 2, 3]


@each_selector
def test_exactly_k_of_the_candidates_are_chosen_each_round(name: str) -> None:
    ids = [1, 2, 4, 5, 8]
    trial = Trial(SELECTORS[name](), 9, 3, ids=ids)
    for r in range(5):
        got = trial.select(r)
        assert got == sorted(set(got))
        assert set(got) <= set(ids)
        assert len(got) == 3
        assert all(type(i) is int for i in got)
        trial.tell({i: report(1.0 + i) for i in got[: 3 - r % 2]}, selected=got)


@each_selector
def test_every_client_also_the_last_is_chosen_some_time(name: str) -> None:
    trial = Trial(SELECTORS[name](), 6, 2)
    seen: set[int] = set()
    for r in range(25):
        got = trial.select(r)
        seen |= set(got)
        trial.tell({i: report(5.0 - 0.1 * r) for i in got})
    assert seen == set(range(6))


@each_selector
def test_rounds_without_a_reply_end_nothing(name: str) -> None:
    trial = learnt(SELECTORS[name]())
    for r in range(4):
        trial.tell({}, selected=trial.select(r), accuracy=None)
    assert len(trial.select()) == 3


@pytest.mark.parametrize("name", ["topk", "oort", "repo", "fedgcs"])
def test_a_client_that_never_replies_does_not_hold_a_place_for_ever(name: str) -> None:
    trial = Trial(SELECTORS[name](), 5, 2)
    chosen = [0] * 5
    for r in range(30):
        got = trial.select(r)
        for i in got:
            chosen[i] += 1
        trial.tell({i: report(5.0) for i in got if i != 3}, selected=got)
    assert chosen[3] < 15, chosen


# ---- the generative selector
def utilities_by_size(u: Sequence[float]) -> dict[int, ClientReport]:
    return {i: report(x) for i, x in enumerate(u)}


def test_fedgcs_draws_the_first_round_uniformly() -> None:
    trial = Trial(FedGCS(**SMALL_NET), 5, 2)
    counts: dict[frozenset[int], float] = {}
    for seed in range(400):
        trial = Trial(FedGCS(**SMALL_NET), 5, 2)
        s = frozenset(trial.select(seed))
        counts[s] = counts.get(s, 0) + 1 / 400
    same_law(counts, uniform(range(5), 2), 400)


def test_fedgcs_with_an_additive_score_of_a_small_federation_finds_the_sort() -> None:
    """C(6, 3) = 20 sets and more proposals than that: the best record is the optimum, and no score exceeds it."""
    for seed in range(3):
        trial = learnt(FedGCS(**SMALL_NET))
        sort = learnt(TopK())
        assert trial.select(seed) == sort.select(seed)


# ---- FedCor
def fedcor_by_hand(sigma: Sequence[Sequence[float]], weights: Sequence[float], discounts: Sequence[float], k: int) -> list[int]:
    """K times: argmax over those left of disc_k sum_i w_i S_ik / sqrt(S_kk); then condition on k."""
    s = [list(row) for row in sigma]
    left, chosen = list(range(len(s))), []
    for _ in range(k):
        best, at = -math.inf, -1
        for c in left:
            value = discounts[c] * sum(weights[i] * s[i][c] for i in left) / math.sqrt(s[c][c])
            if value > best:
                best, at = value, c
        chosen.append(at)
        left.remove(at)
        s = conditioned(s, at)
    return chosen


def conditioned(s: Sequence[Sequence[float]], k: int) -> list[list[float]]:
    n = len(s)
    return [[s[i][j] - s[i][k] * s[k][j] / s[k][k] for j in range(n)] for i in range(n)]


def covariance(n: int, seed: int) -> Tensor:
    x = torch.randn(4, n, generator=gen(seed), dtype=torch.float64)
    return x.T @ x + 0.01**2 * torch.eye(n, dtype=torch.float64)


def embedding(n: int, seed: int, d: int = 4) -> Tensor:
    return torch.randn(d, n, generator=gen(seed), dtype=torch.float64)


def covariance(x: Tensor) -> list[list[float]]:
    """X'X + 0.01^2 I."""
    d, n = x.shape
    return [
        [sum(float(x[r, i] * x[r, j]) for r in range(d)) + (0.0001 if i == j else 0.0) for j in range(n)]
        for i in range(n)
    ]


def test_fedcor_the_covariance_and_what_is_left_of_it_after_one_client_and_two() -> None:
    x = embedding(6, 1)
    sigma, want = Covariance.of(x, 0.01), covariance(x)
    for known in (None, 2, 5):
        if known is not None:
            sigma, want = sigma.given(known), conditioned(want, known)
            assert sigma.row(known).tolist() == [0.0] * 6
            assert all(float(sigma.row(k)[known]) == 0 for k in range(6))
            close(want[known], np.zeros(6), 1e-12)
        close(torch.stack([sigma.row(k) for k in range(6)]), want, 1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_fedcor_chooses_by_correlation_and_then_conditions(seed: int) -> None:
    n, k = 7, 4
    x = embedding(n, seed)
    sizes = torch.randint(5, 60, (n,), generator=gen(seed)).tolist()
    factors = (0.5 + 0.5 * torch.rand(n, generator=gen(seed + 50), dtype=torch.float64)).tolist()
    for normalised in (False, True):
        trial = Trial(FedCor(normalised=normalised), n, k, sizes=sizes)
        trial.state.x, trial.state.fitted, trial.state.factors = x, 1, torch.tensor(factors, dtype=torch.float64)
        trial.round = 3
        scaled = 1.0 * x / x.norm(dim=0) if normalised else x
        weights = [size / sum(sizes) for size in sizes]
        assert trial.select() == sorted(fedcor_by_hand(covariance(scaled), weights, factors, k))


def test_fedcor_with_independent_clients_chooses_by_weight() -> None:
    sizes = [10, 40, 20, 25, 5, 30]
    trial = Trial(FedCor(), 6, 3, sizes=sizes)
    trial.state.x, trial.state.fitted, trial.round = torch.eye(6, dtype=torch.float64), 1, 3
    assert trial.select() == [1, 3, 5]


def test_fedcor_who_has_run_is_discounted_and_the_others_are_not() -> None:
    trial = Trial(FedCor(beta=0.9), 6, 2, sizes=[10, 40, 20, 25, 5, 30])
    trial.state.x, trial.state.fitted, trial.round = torch.eye(6, dtype=torch.float64), 1, 3
    seen = []
    for _ in range(5):
        seen.append(trial.select())
        trial.tell({i: report(1.0) for i in seen[-1]})
    # 40 30 -> 36 27 -> 32.4 24.3 < 25 -> 29.16 22.5 < 24.3 -> 26.24 24.3 ...
    assert seen == [[1, 5], [1, 5], [1, 3], [1, 5], [1, 3]]


def test_fedcor_as_a_source_draws_each_by_its_gain_in_deviations() -> None:
    """Uncorrelated clients: the gains are the weights, and conditioning changes none of those that are left."""
    sizes, tau = [10, 14, 12, 11, 13], 0.8
    trial = Trial(FedCor(tau=tau), 5, 2, sizes=sizes)
    trial.state.x, trial.state.fitted, trial.round = torch.eye(5, dtype=torch.float64), 1, 3
    law: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(5), 2):
        p = 1.0
        for at, k in enumerate(order):
            left = [i for i in range(5) if i not in order[:at]]
            deviation = tau * float(np.std([sizes[i] for i in left]))
            p *= math.exp(sizes[k] / deviation) / sum(math.exp(sizes[i] / deviation) for i in left)
        law[frozenset(order)] = law.get(frozenset(order), 0) + p
    same_law(trial.proposed(1000), law, 1000)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_fedcor_the_mean_and_the_likelihood_are_discounted_by_age(gamma: float) -> None:
    x, seen = embedding(4, 3, d=3), embedding(4, 4, d=5)
    ages = [4, 3, 2, 1, 0]
    powers = [gamma**age for age in ages]
    mean = sum(p * seen[e].numpy() for e, p in enumerate(powers)) / sum(powers)
    c = torch.tensor(powers, dtype=torch.float64)
    close(discounted_mean(seen, c), mean)

    def by_hand(x: Tensor) -> float:
        sigma = np.array(covariance(x))
        total = 0.0
        for e, p in enumerate(powers):
            d = seen[e].numpy() - mean
            total += p * 0.5 * (
                d @ np.linalg.solve(sigma, d) + math.log(np.linalg.det(sigma)) + 4 * math.log(2 * math.pi)
            )  # fmt: skip
        return total

    value, slope = likelihood(x, seen - torch.tensor(mean), c, 0.01)
    assert float(value) == pytest.approx(by_hand(x), rel=1e-9)
    for r, k in itertools.product(range(3), range(4)):
        plus, minus = x.clone(), x.clone()
        plus[r, k] += 1e-6
        minus[r, k] -= 1e-6
        want = (by_hand(plus) - by_hand(minus)) / 2e-6
        assert abs(float(slope[r, k]) - want) < 1e-4 * max(1.0, abs(want))


@pytest.mark.parametrize("normalised", [False, True])
def test_fedcor_fitting_makes_what_was_seen_likelier(normalised: bool) -> None:
    truth = embedding(5, 8, d=2)
    seen = embedding(40, 9, d=2).T @ truth
    c = torch.ones(40, dtype=torch.float64)
    deviations = seen - discounted_mean(seen, c)
    x, scale = 0.3 * embedding(5, 1, d=3), torch.ones((), dtype=torch.float64)
    before = x.clone()
    got, scaled = fedcor_fit(x, scale, deviations, c, noise=0.1, steps=300, lr=0.02, normalised=normalised)
    assert torch.equal(before, x)

    def value(x: Tensor, scale: Tensor) -> float:
        return float(likelihood(columns(x, scale) if normalised else x, deviations, c, 0.1)[0])

    assert value(got, scaled) < 0.6 * value(x, scale)
    assert (float(scaled) != 1.0) == normalised
    learnt, true = columns(got, scale).T @ columns(got, scale), columns(truth, scale).T @ columns(truth, scale)
    if not normalised:
        assert float((learnt - true).abs().max()) < 0.35


# ---- FAVOR
def test_favor_the_reward_is_nought_at_the_target() -> None:
    close(favor_reward(0.9, 0.9), 0.0)
    close(favor_reward(0.9 - 1 / 3, 0.9), -0.75)
    close(favor_reward(0.9 - 0.5, 0.9), -0.875)
    assert -1 < favor_reward(0.0, 1.0) < -0.98


def test_favor_the_components_are_those_of_the_models() -> None:
    models = [torch.randn(30, generator=gen(k)) for k in range(6)]
    mean, loadings = favor_fit(models, 3)
    table = torch.stack(models).double().numpy()
    centred = table - table.mean(axis=0)
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    close(mean, table.mean(axis=0), 1e-6)
    got = loadings.double().numpy()
    close(np.abs(got @ v[:3].T), np.eye(3), 1e-5)
    scores = np.array([project(m, mean, loadings).numpy() for m in models])
    close(scores, centred @ got.T, 1e-4)
    assert (np.diff(scores.std(axis=0)) < 0).all()


def test_favor_the_target_is_that_of_double_q_learning() -> None:
    q = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]])
    copied = torch.tensor([[10.0, 20.0, 30.0], [7.0, 8.0, 9.0]])
    got = double_targets(torch.tensor([-0.5, -0.25]), q, copied, 0.9)
    close(got, [-0.5 + 0.9 * 20, -0.25 + 0.9 * 7], 1e-5)


def test_favor_a_sample_is_drawn_from_the_softmax_without_replacement() -> None:
    q, tau = [0.3, 0.1, 0.25, 0.0, 0.2], 0.1
    law = draws({i: math.exp(x / tau) for i, x in enumerate(q)}, 2)
    counts: dict[frozenset[int], float] = {}
    for seed in range(TIMES):
        s = frozenset(sampled(torch.tensor(q), 2, tau, gen(seed)))
        counts[s] = counts.get(s, 0) + 1 / TIMES
    same_law(counts, law)


def test_the_q_networks_adam_and_copies_are_torchs() -> None:
    form = Mlp((3, 4, 2))
    learnt = learner(form, gen(1))
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.nn.utils.vector_to_parameters(learnt.weights[0].clone(), net.parameters())
    x, y = torch.randn(6, 3, generator=gen(2)), torch.randn(6, 2, generator=gen(3))
    close(form(learnt.weights[0], x), net(x).detach(), 1e-6)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    copies = []
    for step in range(1, 8):
        learnt = improved(learnt, lambda w: (form(w[0], x) - y).square().mean(), 0.01, 3)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        now = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        close(learnt.weights[0], now, 2e-6)
        if step % 3 == 0:
            copies.append(now)
        close(learnt.target[0], copies[-1] if copies else learner(form, gen(1)).weights[0], 2e-6)


# ---- FedMarl
def test_fedmarl_the_reward_is_gain_less_time_less_bytes() -> None:
    probes, rest, upload, bytes_ = [3.0, 5.0, 9.0], [20.0, 30.0, 40.0], [1.0, 1.0, 2.0], [4.0, 4.0, 4.0]
    kept = [0, 1]
    time = max(probes) + max(rest[i] + upload[i] for i in kept)
    for w in ((1.0, 0.2, 0.1), (1.0, 0.0, 0.0), (2.0, 0.5, 0.0)):
        want = w[0] * (10 * 0.6 - 10 * 0.52) - w[1] * time - w[2] * sum(bytes_[i] for i in kept)
        close(marl_reward(0.6, 0.52, time, sum(bytes_[i] for i in kept), w), want)


# ---- TiFL
def test_tifl_the_tier_of_lowest_accuracy_is_the_likeliest() -> None:
    close(tier_probabilities([0.5, 0.2, 0.9, 0.4], [True] * 4), [1 / 6, 3 / 6, 0.0, 2 / 6])
    close(tier_probabilities([0.5, 0.2, 0.9, 0.4], [True, False, True, True]), [1 / 3, 0.0, 0.0, 2 / 3])
    close(tier_probabilities([0.5, 0.2], [False, True]), [0.0, 1.0])
