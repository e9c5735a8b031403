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
from fldist.selection import Candidates, ClientReport, Outcome, Selector
from fldist.selection.afl import AFL
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


TIMES = 2500


def same_law(got: Mapping[frozenset[int], float], want: Mapping[frozenset[int], float], times: int = TIMES) -> None:
    """No set outside the law's support, and frequencies within five standard deviations of its probabilities."""
    assert set(got) <= set(want), f"cannot be chosen: {[sorted(s) for s in set(got) - set(want)]}"
    assert sum(want.values()) == pytest.approx(1)
    for s, p in want.items():
        assert abs(got.get(s, 0) - p) < 5 * math.sqrt(p * (1 - p) / times) + 1e-9, (sorted(s), got.get(s, 0), p)


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


def test_oort_the_percentile_of_the_preferred_duration_moves_with_the_pacer() -> None:
    """After 2 W rounds of unchanged utility everybody may take longer."""
    selector = Oort(variant="oort")
    seconds = [20.0 + i for i in range(20)]
    trial = Trial(selector, 20, 2, sizes=[10] * 20, seconds=dict(enumerate(seconds)))
    before = repr(trial.state)
    for _ in range(41):
        chosen = trial.select(trial.round)
        trial.tell({i: report(5.0, 10, seconds[i]) for i in chosen})
    assert repr(trial.state) != before


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
    trial = Trial(AFL(), 5, 3, sizes=[4, 9, 16, 25, 36])
    losses = [400.0, 90.0, 300.0, 10.0, 0.0]
    trial.tell({i: report(1.0, n, loss=losses[i]) for i, n in [(0, 4), (1, 9), (2, 16), (3, 25)]})
    values = [losses[i] / math.sqrt([4, 9, 16, 25][i]) for i in range(4)] + [-math.inf]
    same_law(trial.proposed(TIMES), afl_law(values, 3))
    assert len(afl_law(values, 3)) == 10


def test_afl_knows_nothing_at_first() -> None:
    same_law(Trial(AFL(), 5, 2).proposed(TIMES), uniform(range(5), 2))


# ---- what all selectors have in common
def values(state: Any) -> Any:
    """A state as plain values that compare."""
    if isinstance(state, State):
        return {k: values(v) for k, v in state.values.items()}
    if isinstance(state, Params):
        return values(state.floats), values(state.integers)
    if isinstance(state, Tensor):
        return str(state.dtype), state.tolist()
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
    "afl": AFL,
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


def test_fedcor_conditioning_takes_away_all_that_is_known() -> None:
    sigma = covariance(5, 1)
    got = condition(sigma, 2)
    close(got, conditioned(sigma.tolist(), 2), 1e-12)
    close(got[2], np.zeros(5), 1e-12)
    close(got[:, 2], np.zeros(5), 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_fedcor_chooses_by_correlation_and_then_conditions(seed: int) -> None:
    sigma = covariance(7, seed)
    weights = (0.2 + torch.rand(7, generator=gen(seed), dtype=torch.float64)).tolist()
    discounts = (0.5 + torch.rand(7, generator=gen(seed + 50), dtype=torch.float64)).tolist()
    got = choose(sigma, torch.tensor(weights).double(), torch.tensor(discounts).double(), 4)
    assert got == fedcor_by_hand(sigma.tolist(), weights, discounts, 4)


def test_fedcor_with_independent_clients_chooses_by_weight() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
    eye, ones = torch.eye(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    assert choose(eye, weights, ones, 3) == [1, 3, 2]


def test_fedcor_the_covariance_is_the_products_of_the_embeddings_and_a_little_noise() -> None:
    x = torch.randn(15, 4, generator=gen(3), dtype=torch.float64)
    want = [
        [sum(float(x[d, i] * x[d, j]) for d in range(15)) + (0.0001 if i == j else 0.0) for j in range(4)]
        for i in range(4)
    ]
    close(fedcor_covariance(x), want, 1e-10)


def test_fedcor_the_likelihood_is_a_discounted_sum_of_gaussians() -> None:
    x = torch.randn(3, 4, generator=gen(3), dtype=torch.float64)
    seen = torch.randn(5, 4, generator=gen(4), dtype=torch.float64)
    sigma = (x.T @ x + 1e-4 * torch.eye(4, dtype=torch.float64)).numpy()
    gamma, want = 0.9, 0.0
    powers = [gamma ** (4 - e) for e in range(5)]
    mean = sum(p * seen[e].numpy() for e, p in enumerate(powers)) / sum(powers)
    for e, p in enumerate(powers):
        d = seen[e].numpy() - mean
        want += p * 0.5 * (d @ np.linalg.inv(sigma) @ d + math.log(np.linalg.det(sigma)) + 4 * math.log(2 * math.pi))
    got = fedcor_loss(x, seen, gamma)
    # constants that do not depend on X may be left out
    y = 1.1 * x
    sigma2 = (y.T @ y + 1e-4 * torch.eye(4, dtype=torch.float64)).numpy()
    want2 = 0.0
    for e, p in enumerate(powers):
        d = seen[e].numpy() - mean
        want2 += p * 0.5 * (d @ np.linalg.inv(sigma2) @ d + math.log(np.linalg.det(sigma2)))
    want -= sum(powers) * 0.5 * 4 * math.log(2 * math.pi)
    close(float(fedcor_loss(y, seen, gamma)) - float(got), want2 - want, 1e-6 * abs(want2 - want))


# ---- FAVOR
def test_favor_the_reward_is_nought_at_the_target() -> None:
    close(favor_reward(0.9, 0.9), 0.0)
    close(favor_reward(0.9 - 1 / 3, 0.9), -0.75)
    close(favor_reward(0.9 - 0.5, 0.9), -0.875)
    assert -1 < favor_reward(0.0, 1.0) < -0.98


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
