"""Utilities, scores of sets, and the selectors topk, oort, afl, power_of_choice and tifl: by hand, by laws, on whole
runs."""

from __future__ import annotations

import itertools
import json
import math
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fldist
from fldist import scoring
from fldist.algorithm import State, TooFewReplies
from fldist.config import ConfigError, build, load
from fldist.inspection import predict
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints
from fldist.runtime.state import hash_state
from fldist.scoring import Utility
from fldist.selection import Candidates, ClientReport, Outcome, Selector
from fldist.selection.afl import Afl
from fldist.selection.oort import Oort
from fldist.selection.power_of_choice import PowerOfChoice
from fldist.selection.tifl import Tifl, ranked, tiers_of
from fldist.selection.topk import TopK
from tests.conftest import Hosts, Recorder, small

NAN, INF = math.nan, math.inf


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def report(n: float = 10, squares: float = 10.0, loss: float = 1.0, seconds: float = 1.0, joules: float = NAN) -> Any:
    return ClientReport(n, squares, loss, seconds, joules)


def candidates(n: int = 6, count: int = 2, number: int = 1, **more: Any) -> Candidates:
    more.setdefault("sizes", [10] * n)
    more.setdefault("rng", rng(number))
    return Candidates(list(range(n)), count=count, round=number, **more)


def outcome(number: int, reports: Mapping[int, ClientReport], lost: Sequence[int] = ()) -> Outcome:
    return Outcome(number, tuple(sorted([*reports, *lost])), tuple(sorted(reports)), reports)


def learnt(selector: Selector, n: int, *outcomes: Outcome, count: int = 2, **more: Any) -> State:
    state = selector.init(candidates(n, count, **more))
    for one in outcomes:
        selector.observe(state, candidates(n, count, one.round, **more), one)
    return state


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- one client
def test_the_utility_of_equal_losses_is_n_times_the_loss() -> None:
    assert float(scoring.statistical_utility(7, 7 * 0.3**2)) == pytest.approx(7 * 0.3)
    u = scoring.statistical_utility(floats(4, 0, 5, 5), floats(1 + 4 + 9 + 16, 0, NAN, -1))
    assert u[0] == pytest.approx(math.sqrt(4 * 30))
    assert u[1] == 0.0
    assert u[2:].isnan().all()


@pytest.mark.parametrize(
    ("value", "preferred", "exponent", "factor"),
    [
        (3.0, 3.0, 2.0, 1.0),
        (6.0, 3.0, 2.0, 0.25),
        (6.0, 3.0, 1.0, 0.5),
        (6.0, 3.0, 0.0, 1.0),
        (1.0, 3.0, 2.0, 1.0),
        (0.0, 3.0, 2.0, 1.0),
        (0.0, 0.0, 2.0, 1.0),
        (NAN, 3.0, 2.0, 1.0),
        (6.0, NAN, 2.0, 1.0),
        (6.0, INF, 2.0, 1.0),
        (INF, 3.0, 2.0, 0.0),
        (INF, 3.0, 0.0, 1.0),
    ],
)
def test_penalty(value: float, preferred: float, exponent: float, factor: float) -> None:
    assert float(scoring.penalty(value, preferred, exponent)) == factor


OORT = {
    "utility": floats(10, 20, 40, NAN),
    "sizes": floats(5, 5, 5, 8),
    "last": torch.tensor([1, 2, 3, 0]),
    "number": 4,
    "seconds": floats(1, NAN, 4, 1),
    "preferred": 2.0,
}


def test_utilities_of_oort_by_hand() -> None:
    """Rewards 8 (untried: its size), 10, 20, 40: lo = 7.992, range = 32.008."""
    bonus = [math.sqrt(0.1 * math.log(4) / last) for last in (1, 2, 3)]
    expected = [
        (10 - 7.992) / 32.008 + bonus[0],
        (20 - 7.992) / 32.008 + bonus[1],
        (1.0 + bonus[2]) * 0.25,
    ]
    u = scoring.oort_utilities(**OORT)
    assert u[:3].tolist() == pytest.approx(expected)
    assert u[3].isnan()
    # clipped at rank floor(0.5 * 4) = 2, the range is that before clipping
    u = scoring.oort_utilities(**OORT, clip=0.5, alpha=0.0)
    assert u[:3].tolist() == pytest.approx([expected[0], expected[1], (20 - 7.992) / 32.008 + bonus[2]])
    u = scoring.oort_utilities(**OORT, optimistic=True)
    assert u[:3].tolist() == pytest.approx(expected)
    assert float(u[3]) == pytest.approx(1.0 + bonus[0])


def test_the_98th_percentile_clips_above_fifty_rewards() -> None:
    utility = torch.arange(1.0, 101.0, dtype=torch.float64)
    nothing = {"number": 1, "seconds": torch.full((100,), NAN), "preferred": NAN}
    u = scoring.oort_utilities(utility, torch.ones(100), torch.ones(100), **nothing)
    assert u[98] == u[99] == pytest.approx((99 - 0.999) / (100 - 0.999))
    assert u[97] < u[98]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_utilities_make_no_nan(value: float) -> None:
    nothing = {"number": 1, "seconds": torch.full((3,), NAN), "preferred": NAN}
    u = scoring.oort_utilities(torch.full((3,), value), torch.ones(3), torch.ones(3), **nothing)
    assert u.isfinite().all()
    assert u.unique().numel() == 1
    assert (u >= 0).all()


def test_a_utility_below_the_least_positive_reward_is_not_negative() -> None:
    u = scoring.oort_utilities(floats(0, 5, 9), torch.ones(3), torch.ones(3), 1, torch.full((3,), NAN), NAN)
    assert u[0] == 0.0


def test_utility_of_repo_by_hand() -> None:
    bonus = math.sqrt(0.1 * math.log(5) / 5)
    u = scoring.repo_utility(floats(12, 12), 5, 5, floats(40, 100), 50.0)
    assert u.tolist() == pytest.approx([12 + bonus, (12 + bonus) * 0.25])


def test_the_duration_of_a_percentile() -> None:
    durations = [5.0, NAN, 1.0, 4.0, 2.0, 3.0]
    assert scoring.percentile_duration(durations, 10) == 1.0
    assert scoring.percentile_duration(durations, 20) == 2.0
    assert scoring.percentile_duration(durations, 99) == 5.0
    assert scoring.percentile_duration(durations, 100) == INF
    assert scoring.percentile_duration([NAN], 10) == INF
    assert scoring.percentile_duration([], 10) == INF


@pytest.mark.parametrize(
    ("history", "number", "percent"),
    [
        ([10, 10, 10, 10], 4, 15),  # flat
        ([10, 10, 11, 11], 4, 15),  # 10 % more
        ([10, 10, 11, 11.1], 4, 10),
        ([1, 1, 6, 6], 4, 5),  # five times more
        ([1, 1, 6, 5.9], 4, 10),
        ([10, 10, 10], 3, 10),  # before round 2 W
        ([10, 10, 10, 10, 10], 5, 10),  # not every W rounds
        ([0, 0, 0, 0], 4, 15),
        ([9, 9, 10, 10, 10, 10], 6, 15),
    ],
)
def test_the_pacer_of_oort(history: list[float], number: int, percent: float) -> None:
    assert scoring.pacer_oort(10.0, history, number, window=2) == percent


def test_the_pacer_of_oort_keeps_to_its_bounds() -> None:
    assert scoring.pacer_oort(98.0, [1, 1], 2, window=1) == 100.0
    assert scoring.pacer_oort(7.0, [1, 9], 2, window=1) == 5.0


def test_the_pacer_of_repo_only_loosens() -> None:
    assert scoring.pacer_repo(50.0, [5, 5, 4, 5], 4) == 100.0
    assert scoring.pacer_repo(50.0, [5, 5, 5, 5], 4) == 50.0
    assert scoring.pacer_repo(50.0, [5, 4, 3], 3) == 50.0
    assert scoring.pacer_repo(50.0, [9, 5, 5, 4, 5], 5, step=7.0) == 57.0  # in any round


# ---- sets
SETS = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])


def test_an_additive_score_is_best_for_the_largest() -> None:
    u = torch.rand(7, generator=rng(3), dtype=torch.float64)
    sets = torch.tensor([[float(i in chosen) for i in range(7)] for chosen in itertools.combinations(range(7), 3)])
    scores = scoring.additive_score(sets, u)
    assert scores.tolist() == pytest.approx([float(u[row.bool()].sum()) for row in sets])
    assert float(scores.max()) == pytest.approx(float(u.sort().values[-3:].sum()))


def test_a_group_score_by_hand() -> None:
    cost = {"seconds": floats(1, 2, 4, NAN), "joules": floats(3, 1, 1, NAN)}
    y = scoring.group_score(SETS, floats(5, 6, 7, 8), **cost, preferred_s=2.0, preferred_joules=2.0, alpha=2, beta=1)
    assert y.tolist() == pytest.approx([11 * 1.0 * 2 / 4, 13 * 0.25 * 1.0, 8.0])
    y = scoring.group_score(SETS, floats(5, 6, 7, 8), **cost, preferred_s=NAN, preferred_joules=NAN, alpha=2, beta=1)
    assert y.tolist() == [11.0, 13.0, 8.0]


def test_a_measured_score_by_hand() -> None:
    assert scoring.measured_score(0.1, 20.0, 30.0, 10.0, 10.0, 2, 1) == pytest.approx(0.1 / 4 / 3)
    assert scoring.measured_score(-0.1, 20.0, None, 10.0, 10.0, 2, 1) == pytest.approx(-0.1 / 4)
    assert scoring.measured_score(0.1, None, None, NAN, NAN, 2, 1) == 0.1


# ---- choosing by numbers
def test_draws_are_in_proportion_without_replacement() -> None:
    source, times = rng(1), 8000
    counts = Counter(tuple(scoring.draw(floats(1, 2, 0, 3), 2, source)) for _ in range(times))
    weights = {0: 1, 1: 2, 3: 3}
    for first, second in itertools.permutations(weights, 2):
        p = weights[first] / 6 * weights[second] / (6 - weights[first])
        assert counts[first, second] / times == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / times))
    assert sum(counts.values()) == times
    assert len(counts) == 6


def test_a_draw_takes_what_has_no_weight_last_and_uniformly() -> None:
    source = rng(2)
    drawn = [scoring.draw(floats(0, NAN, 1e-300, 0, -1), 4, source) for _ in range(600)]
    assert all(ids[0] == 2 for ids in drawn)
    counts = Counter(ids[1] for ids in drawn)
    assert all(counts[i] == pytest.approx(150, abs=50) for i in (0, 1, 3, 4))
    assert scoring.draw(torch.zeros(0), 2, source) == []
    assert scoring.draw(floats(1, INF), 1, source) == [1]
    assert sorted(scoring.draw(floats(1, 2), 5, source)) == [0, 1]


def test_the_largest_with_ties_in_any_order() -> None:
    source = rng(3)
    firsts = [scoring.largest(floats(1, 5, NAN, 5, 5), 2, source) for _ in range(300)]
    counts = Counter(i for pair in firsts for i in pair)
    assert set(counts) == {1, 3, 4}
    assert all(n == pytest.approx(200, abs=50) for n in counts.values())
    assert scoring.largest(floats(1, 5, NAN, 4), 4, source) == [1, 3, 0, 2]


# ---- what is known
def test_what_is_known_after_rounds() -> None:
    before = scoring.begin(4)
    copies = {name: value.clone() for name, value in before.values.items()}
    known = scoring.updated(before, outcome(3, {1: report(4, 16.0, seconds=5.0, joules=7.0)}, lost=[2]))
    assert all(torch.equal(before.values[k], v) or v.isnan().all() for k, v in copies.items())
    assert known.utility.tolist()[1] == 8.0
    assert known.utility.isnan().tolist() == [True, False, True, True]
    assert (known.seconds[1], known.joules[1]) == (5.0, 7.0)
    assert known.last.tolist() == [0, 3, 0, 0]
    assert known.chosen.tolist() == [0, 1, 1, 0]
    assert known.silent.tolist() == [0, 0, 1, 0]
    known = scoring.updated(known, outcome(4, {}, lost=[1, 2]))
    assert known.silent.tolist() == [0, 1, 2, 0]
    assert known.last.tolist() == [0, 3, 0, 0]
    assert scoring.trust(known.silent).tolist() == [1.0, 0.5, 0.25, 1.0]
    known = scoring.updated(known, outcome(5, {2: report()}))
    assert known.silent.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("squares", [NAN, INF, -1.0])
def test_a_report_that_is_no_number_teaches_nothing(squares: float) -> None:
    known = scoring.updated(scoring.begin(2), outcome(1, {0: report(4, 16.0, seconds=5.0)}))
    known = scoring.updated(known, outcome(2, {0: report(4, squares, seconds=NAN), 1: report(NAN, squares)}))
    assert known.utility[0] == 8.0
    assert known.seconds[0] == 5.0
    assert known.utility[1].isnan()
    assert known.last.tolist() == [2, 2]


def test_what_is_not_used_is_not_kept() -> None:
    told = outcome(1, {0: report(seconds=5.0, joules=6.0)})
    known = Utility(alpha=0.0).learn(scoring.begin(1), told)
    assert known.seconds.isnan().all()
    assert known.joules[0] == 6.0
    known = Utility(beta=0.0).learn(scoring.begin(1), told)
    assert known.seconds[0] == 5.0
    assert known.joules.isnan().all()


def knowing(*outcomes: Outcome, n: int = 4) -> State:
    known = scoring.begin(n)
    for one in outcomes:
        known = scoring.updated(known, one)
    return known


def test_preferred_values_are_a_fifth_above_the_median_of_what_is_known() -> None:
    known = knowing(outcome(1, {0: report(seconds=1.0, joules=10.0), 1: report(seconds=4.0, joules=20.0)}))
    who = candidates(4)
    assert Utility().preferred(known, who) == pytest.approx((1.2 * 2.5, 1.2 * 15.0))
    assert Utility(duration=7.0, energy=9.0).preferred(known, who) == (7.0, 9.0)
    assert all(math.isnan(value) for value in Utility().preferred(scoring.begin(4), who))
    devices = candidates(4, seconds={0: 50.0, 1: 50.0, 2: 8.0, 3: 9.0}, joules=dict.fromkeys(range(4), 2.0))
    assert Utility().preferred(known, devices) == pytest.approx((1.2 * 6.0, 1.2 * 6.0))  # 1, 4, 8, 9; 2, 2, 10, 20


@pytest.mark.parametrize("variant", ["oort", "repo"])
def test_clients_that_were_never_tried_are_worth_as_much_as_the_best(variant: Any) -> None:
    known = knowing(outcome(1, {0: report(10, 10.0), 1: report(10, 90.0)}))
    who = candidates(4, number=2)
    u = Utility(variant).of(known, who)
    assert u[2] == u[3] == pytest.approx(float(u[1]))
    assert u[0] < u[1]
    u = Utility(variant, untried="zero").of(known, who)
    assert u[2:].tolist() == [0.0, 0.0]
    assert u[1] > u[0] > 0
    slow = candidates(4, number=2, seconds={2: 10.0, 3: 1.0}, joules={2: 1.0, 3: 8.0})
    u = Utility(variant, duration=5.0, energy=4.0).of(known, slow)
    assert u[2] == pytest.approx(float(u[1]) / 4)
    assert u[3] == pytest.approx(float(u[1]) / 2)


def test_a_client_that_does_not_answer_counts_half_each_time() -> None:
    known = knowing(outcome(1, {0: report(), 1: report()}), outcome(2, {0: report()}, lost=[1]))
    who = candidates(4, number=1)  # without bonus
    u = Utility().of(known, who)
    assert float(u[1]) == pytest.approx(float(u[0]) / 2)
    assert Utility().statistical(known, who).tolist() == pytest.approx([10.0, 5.0, 10.0, 10.0])


def test_before_anything_is_known_all_are_equal_but_for_their_devices() -> None:
    u = Utility(duration=5.0).of(scoring.begin(3), candidates(3, seconds={0: 5.0, 1: 10.0, 2: 1.0}))
    assert u.tolist() == [1.0, 0.25, 1.0]
    assert Utility().statistical(scoring.begin(3), candidates(3)).tolist() == [1.0, 1.0, 1.0]
    assert Utility("repo", untried="zero").of(scoring.begin(3), candidates(3)).tolist() == [1.0, 1.0, 1.0]


def test_clients_without_samples_are_worth_nothing() -> None:
    who = Candidates([1, 3], [10, 10], 1, num_clients=5)
    for values in (Utility().of(scoring.begin(5), who), Utility().statistical(scoring.begin(5), who)):
        assert values.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


# ---- laws of all selectors
ALL: dict[str, Selector] = {
    "topk": TopK(),
    "topk_repo": TopK(Utility("repo", untried="zero")),
    "oort": Oort(),
    "oort_repo": Oort("repo"),
    "afl": Afl(),
    "afl_mean": Afl(valuation="mean", alpha2=0.0),
    "power_of_choice": PowerOfChoice(),
    "rpow_d": PowerOfChoice(variant="rpow_d"),
    "tifl": Tifl(interval=0),
}
everyone = pytest.mark.parametrize("name", ALL)


class Answers:
    """Clients that answer with these values, by field and client; missing ones do not."""

    def __init__(self, **fields: Mapping[int, float]) -> None:
        self.fields = fields
        self.asked: list[tuple[str, list[int]]] = []

    def only(self, ids: Sequence[int]) -> Any:
        def call(method: Any, x: Any) -> Any:
            self.asked.append((method.__name__, sorted(ids)))
            told = {f: {c: v for c, v in values.items() if c in ids} for f, values in self.fields.items()}
            if not any(told.values()):
                raise TooFewReplies(method.__name__, {})
            return types.SimpleNamespace(**told)

        return types.SimpleNamespace(call=call)


class Task:
    """As much of a task as `tifl` looks at."""

    def __init__(self, counts: Sequence[int], *parts: str) -> None:
        self.counts, self.parts = counts, parts

    def has_part(self, split: str) -> bool:
        return split in self.parts

    def count(self, client: int, split: str) -> int:
        return self.counts[client]


def answering(n: int) -> dict[str, Any]:
    """Services of a selector that asks clients."""
    values = {c: 1.0 + c % 7 for c in range(n)}
    clients = Answers(loss=values, latency=values, accuracy=values)
    return {"clients": clients, "model": lambda: None, "task": Task([1] * n)}


def reports_of(kind: str, ids: Sequence[int]) -> dict[int, ClientReport]:
    made = {
        "usual": lambda c: report(5 + c, 3.0 * (c + 1), 0.3 * (c + 1), 1.0 + c % 3),
        "equal": lambda c: report(),
        "zero": lambda c: report(10, 0.0, 0.0, 0.0),
        "nan": lambda c: report(NAN, NAN, NAN, NAN),
        "infinite": lambda c: report(10, INF, INF, INF),
    }[kind]
    return {c: made(c) for c in ids}


def changed(state: State) -> str:
    return hash_state({"state": state})


@everyone
@pytest.mark.parametrize("kind", ["usual", "equal", "zero", "nan", "infinite", "silent"])
def test_any_course_of_rounds(name: str, kind: str) -> None:
    """K distinct clients of those offered, also after many rounds of whatever reports; proposals leave no trace."""
    selector, n, count = ALL[name], 11, 3
    services = answering(n + 3)
    ids = [c for c in range(n + 3) if c % 5]  # 0, 5 and 10 hold no samples
    who = Candidates(ids, [4 + c for c in ids], count, num_clients=n + 3, **services)
    state = selector.init(who)
    proposed = selector.propose(state, who, rng())
    assert len(set(proposed)) == count
    selector.setup(state, who)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for number in range(1, 41):
        who = Candidates(ids, [4 + c for c in ids], count, number, num_clients=n + 3, rng=rng(number), **services)
        untouched = changed(state)
        proposals = [selector.propose(state, who, rng(seed)) for seed in range(3)]
        assert changed(state) == untouched
        assert selector.propose(state, who, rng(1)) == proposals[1]
        copy = state.copy()
        selected = selector.select(state, who)
        assert sorted(selector.select(copy, Candidates(**{**vars(who), "rng": rng(number)}))) == sorted(selected)
        for chosen in (*proposals, sorted(selected)):
            assert chosen == sorted(set(chosen))
            assert len(chosen) == count
            assert set(chosen) <= set(ids)
        told = {} if kind == "silent" else reports_of(kind, sorted(selected)[: count - number % 2])
        selector.observe(state, who, outcome(number, told, lost=[c for c in selected if c not in told]))
    assert torch.equal(torch.random.get_rng_state(), before)


@everyone
def test_proposals_from_one_state_differ(name: str) -> None:
    selector, n = ALL[name], 12
    state = learnt(selector, n, outcome(1, reports_of("usual", range(6))), **answering(n))
    for known in (state, selector.init(candidates(n))):
        source, who = rng(4), candidates(n, 3, number=2, seconds={}, **answering(n))
        sets = {tuple(selector.propose(known, who, source)) for _ in range(40)}
        assert len(sets) >= 5, name


@everyone
def test_before_anything_is_known_all_are_equally_likely(name: str) -> None:
    selector, n, count = ALL[name], 6, 2
    counts: Counter[int] = Counter()
    for seed in range(600):
        who = candidates(n, count, rng=rng(seed), **answering(n))
        state = selector.init(who)
        chosen = selector.propose(state, who, rng(seed)) if name == "power_of_choice" else selector.select(state, who)
        counts.update(chosen)
    assert all(counts[c] == pytest.approx(200, abs=50) for c in range(n)), counts


@everyone
def test_where_all_take_part_all_do(name: str) -> None:
    selector = ALL[name]
    who = candidates(5, 5, number=3, **answering(5))
    state = selector.init(who)
    selector.setup(state, who)
    selector.observe(state, who, outcome(2, reports_of("usual", [0, 2]), lost=[3]))
    assert sorted(selector.select(state, who)) == selector.propose(state, who, rng()) == [0, 1, 2, 3, 4]


@everyone
def test_a_dead_client_blocks_no_place(name: str) -> None:
    """Client 2 never answers; of 60 rounds with 3 of 9 it has at most half, and fewer towards the end."""
    selector, n, number = ALL[name], 9, 0
    services = answering(n)
    services["clients"].fields["loss"] = {**services["clients"].fields["loss"], 2: 50.0}  # looks worth having
    state = selector.init(candidates(n, 3, **services))
    selector.setup(state, candidates(n, 3, **services))
    times = []
    for number in range(1, 61):
        who = candidates(n, 3, number, **services)
        selected = selector.select(state, who)
        times.append(2 in selected)
        told = {c: r for c, r in reports_of("usual", selected).items() if c != 2}
        selector.observe(state, who, outcome(number, told, lost=[2] if 2 in selected else []))
    assert sum(times) <= 30
    assert sum(times[30:]) <= max(sum(times[:30]), 15)


# ---- topk
def test_topk_takes_the_largest() -> None:
    selector = TopK(Utility(untried="zero"))
    state = learnt(selector, 5, outcome(1, {c: report(10, s) for c, s in enumerate([5.0, 80.0, 20.0, 1.0, 40.0])}))
    assert selector.select(state, candidates(5, 2, 2)) == [1, 4]
    still = TopK(Utility(untried="zero"), noise=0.0)
    assert {tuple(still.propose(state, candidates(5, 2, 2), rng(seed))) for seed in range(20)} == {(1, 4)}


def test_topk_avoids_slow_and_hungry_clients() -> None:
    """Client 2 is worth most, and slow; 1 is worth less, and hungry; 0 least."""
    reports = {0: report(10, 9, 1, 1.0, 1.0), 1: report(10, 10, 1, 1.0, 9.0), 2: report(10, 11, 1, 9.0, 1.0)}
    for alpha, beta, best in ((0, 0, 2), (2, 0, 1), (0, 1, 2), (2, 9, 0)):
        selector = TopK(Utility(alpha=alpha, beta=beta))
        assert selector.select(learnt(selector, 3, outcome(1, reports)), candidates(3, 1, 2)) == [best]


def test_topk_begins_uniformly_whatever_is_known_of_devices() -> None:
    who = {"seconds": {0: 100.0, 1: 1.0, 2: 1.0, 3: 1.0}}
    state = TopK().init(candidates(4, **who))
    drawn = [c for seed in range(400) for c in TopK().propose(state, candidates(4, 1, **who), rng(seed))]
    assert all(drawn.count(c) == pytest.approx(100, abs=40) for c in range(4))


def test_topk_tries_everybody_before_anyone_twice() -> None:
    selector, seen = TopK(), []
    state = selector.init(candidates(8))
    for number in range(1, 5):
        chosen = selector.select(state, candidates(8, 2, number))
        seen += chosen
        selector.observe(state, candidates(8, 2, number), outcome(number, reports_of("usual", chosen)))
    assert sorted(seen) == list(range(8))


# ---- oort
def test_oort_explores_first_by_data_size() -> None:
    """Of 12 untried clients 2 are drawn among the 10 with most samples, in proportion."""
    selector, counts, times = Oort(), Counter[int](), 3000
    sizes = [1, 2, *range(10, 100, 10), 910]
    state = selector.init(candidates(12, 2, sizes=sizes))
    for seed in range(times):
        counts.update(selector.propose(state, candidates(12, 1, 1, sizes=sizes), rng(seed)))
    assert set(counts) <= set(range(7, 12))  # one place: among 5
    assert counts[11] / times == pytest.approx(910 / (910 + 60 + 70 + 80 + 90), abs=0.03)


def test_oort_explores_slow_clients_less() -> None:
    selector, counts = Oort(percentile=50.0), Counter[int]()
    seconds = {0: 1.0, 1: 2.0, 2: 4.0}
    state = selector.init(candidates(3, seconds=seconds))
    for seed in range(3000):
        counts.update(selector.propose(state, candidates(3, 1, 1, seconds=seconds), rng(seed)))
    assert counts[2] / 3000 == pytest.approx(0.25 / 2.25, abs=0.025)


def exploited(u: Sequence[float], **more: Any) -> tuple[Oort, State]:
    """Oort that knows these utilities of its first clients; the others are untried."""
    selector = Oort(exploration=0.5, decay=1.0, exploration_min=0.0, alpha=0.0, **more)
    return selector, learnt(selector, 8, outcome(1, {c: report(10, 0.1 * value**2) for c, value in enumerate(u)}))


def test_oort_exploits_those_above_the_cut_in_proportion() -> None:
    """Half of 2 places: x = 1; u is (U - lo) / range in round 1, 1, 0.56, 0.54 and 0, cut at 0.7 of the second."""
    selector, state = exploited([10.0, 6.0, 5.9, 1.0], cut_off=0.7)
    who = candidates(8, 2, 1, sizes=[1] * 8)
    u = scoring.oort_utilities(
        state.known.utility, torch.ones(8), state.known.last, 1, torch.full((8,), NAN), NAN, alpha=0.0
    ).tolist()
    pool = [c for c in range(4) if u[c] >= 0.7 * u[1]]
    assert pool == [0, 1, 2]
    counts: Counter[int] = Counter()
    for seed in range(2000):
        chosen = selector.propose(state, who, rng(seed))
        assert len([c for c in chosen if c < 4]) == 1  # one is exploited, one explored
        counts.update(chosen)
    assert set(counts) == {0, 1, 2, 4, 5, 6, 7}
    assert counts[0] / 2000 == pytest.approx(u[0] / (u[0] + u[1] + u[2]), abs=0.04)


def test_oort_explores_no_more_when_everybody_was_tried() -> None:
    selector, state = exploited([10.0, 9.9, 9.8, 9.7, 1.0, 1.0, 1.0, 1.0])
    for seed in range(50):
        chosen = selector.propose(state, candidates(8, 2, 1, sizes=[1] * 8), rng(seed))
        assert set(chosen) <= {0, 1, 2, 3}


def test_oort_fills_up_where_too_few_are_untried() -> None:
    """Half of 6 places explore, one client is untried: it is taken, and two of the others."""
    selector, state = exploited([10.0, 9.9, 9.8, 9.7, 1.0, 1.0, 1.0])
    seen: Counter[int] = Counter()
    for seed in range(200):
        chosen = selector.propose(state, candidates(8, 6, 1, sizes=[1] * 8), rng(seed))
        assert 7 in chosen
        seen.update(chosen)
    assert all(0 < seen[c] < 200 for c in range(7))


def test_the_share_that_oort_explores_falls_with_the_rounds() -> None:
    """exploration 0.9 * 0.95^r: 0.855 in round 1, below 0.5 from round 12 on, 0.2 at last."""
    selector = Oort(alpha=0.0)
    state = learnt(selector, 40, outcome(1, reports_of("equal", range(15))))
    for number, tried in ((1, 1), (12, 5), (100, 8)):
        chosen = selector.propose(state, candidates(40, 10, number), rng())
        assert sum(c < 15 for c in chosen) == tried


def test_oort_learns_and_paces() -> None:
    selector = Oort(window=1, percentile=30.0)
    state = selector.init(candidates(4))
    selector.observe(state, candidates(4), outcome(1, {0: report(10, 10.0), 1: report(10, 40.0)}))
    assert state.history == [0.0]  # nobody had been tried before
    selector.observe(state, candidates(4), outcome(2, {0: report(10, 40.0), 2: report(10, 90.0)}))
    assert state.history == [0.0, 20.0]
    assert state.percentile == 25.0  # from 0 to 20 is more than five times
    selector.observe(state, candidates(4), outcome(3, {0: report(10, 40.0), 1: report(10, 44.0)}))
    assert state.history == [20.0, pytest.approx(10 * (2 + math.sqrt(4.4)) / 2)]
    assert state.percentile == 30.0  # as good as flat
    selector.observe(state, candidates(4), outcome(4, {}, lost=[1]))
    assert state.history[-1] == 0.0


# ---- oort as the code published for FedGCS has it
def repo(u: Sequence[float], chosen: Sequence[int] | None = None, **more: Any) -> tuple[Oort, State]:
    """The variant `repo` with these u, chosen so many times."""
    selector = Oort("repo", **more)
    state = selector.init(candidates(len(u)))
    state.u = floats(*u)
    times = torch.tensor([1] * len(u) if chosen is None else chosen)
    state.known = State(**{**state.known.values, "chosen": times})
    return selector, state


def test_repo_computes_u_once_when_a_report_comes() -> None:
    selector = Oort("repo", window=1)
    state = learnt(selector, 3, outcome(1, {0: report(10, 10.0, seconds=100.0), 1: report(10, 40.0, seconds=1.0)}))
    assert state.u.tolist() == pytest.approx([10.0 * 0.25, 20.0, 0.0])
    assert (state.duration, state.history) == (50.0, [30.0])
    selector.observe(state, candidates(3), outcome(4, {2: report(10, 10.0, seconds=NAN)}))
    assert state.u.tolist() == pytest.approx([2.5, 20.0, 10.0 + math.sqrt(0.1 * math.log(4) / 4)])
    assert (state.duration, state.history) == (100.0, [30.0, 10.0])  # U has fallen
    selector.observe(state, candidates(3), outcome(5, {0: report(10, 10.0, seconds=100.0)}))
    assert float(state.u[0]) == pytest.approx(10.0 + math.sqrt(0.1 * math.log(5) / 5))  # T* is 100 now


def test_repo_exploits_above_the_cut_and_then_those_below_in_order() -> None:
    """All 4 are tried, K = 3: x = 3, cut 0.95 * 8 = 7.6: pool 10 and 9 and 8."""
    selector, state = repo([10.0, 9.0, 8.0, 7.7, 7.0])
    sets = Counter(tuple(selector.propose(state, candidates(5, 3, 2), rng(seed))) for seed in range(400))
    assert {c for ids in sets for c in ids} == {0, 1, 2, 3}
    selector, state = repo([10.0, 9.0, 8.0, 7.7, 7.0], cut_off=1.0)  # strict: 10 and 9, then 8
    assert {tuple(selector.propose(state, candidates(5, 3, 2), rng(seed))) for seed in range(30)} == {(0, 1, 2)}


def test_repo_exploits_a_tenth_while_there_are_untried_ones() -> None:
    """K = 10 of 15 with 12 untried: x = ceil(0.1 * 10) = 1."""
    selector, state = repo([9.0, 8.9, 8.0] + [0.0] * 12, [1, 1, 1] + [0] * 12)
    tried = [sum(c < 3 for c in selector.propose(state, candidates(15, 10, 2), rng(seed))) for seed in range(30)]
    assert tried == [1] * 30
    selector, state = repo([9.0, 8.9, 8.0] + [0.0] * 6, [1, 1, 1] + [0] * 6)  # 6 untried: x = 2
    for seed in range(30):
        chosen = selector.propose(state, candidates(9, 8, 2), rng(seed))
        assert sum(c < 3 for c in chosen) == 2
        assert len(chosen) == 8


def test_repo_with_utilities_of_zero_skips_nobody() -> None:
    selector, state = repo([0.0, 0.0, 0.0])
    assert selector.propose(state, candidates(3, 2, 2), rng()) == [0, 1]


def test_repo_leaves_out_those_on_the_blacklist_while_there_are_others() -> None:
    selector, state = repo([9.0, 8.0, 7.0, 6.0], [11, 10, 11, 1])
    assert {tuple(selector.propose(state, candidates(4, 2, 2), rng(seed))) for seed in range(30)} == {(1, 3)}
    sets = {tuple(selector.propose(state, candidates(4, 3, 2), rng(seed))) for seed in range(60)}
    assert sets == {(0, 1, 3), (1, 2, 3)}
    selector, state = repo([9.0, 8.0, 7.0, 6.0], [11, 11, 11, 11])
    assert len({tuple(selector.propose(state, candidates(4, 2, 2), rng(seed))) for seed in range(200)}) == 6


def test_repo_counts_how_often_clients_were_chosen() -> None:
    selector = Oort("repo", blacklist=1)
    state = learnt(selector, 3, *(outcome(r, {0: report(10, 50.0), 1: report(10, 40.0)}) for r in (1, 2)))
    state.known = State(**{**state.known.values, "chosen": torch.tensor([2, 1, 1])})
    assert {tuple(selector.propose(state, candidates(3, 1, 3), rng(seed))) for seed in range(30)} == {(1,)}


# ---- afl
def test_afl_values_clients_by_their_losses() -> None:
    told = outcome(1, {0: report(loss=2.0), 2: report(loss=NAN)})
    assert learnt(Afl(), 3, told, sizes=[9, 9, 9]).v.tolist() == [6.0, -INF, -INF]
    assert learnt(Afl(valuation="mean"), 3, told, sizes=[9, 9, 9]).v.tolist() == pytest.approx([2 / 3, -INF, -INF])


def test_afl_ignores_the_smallest_and_draws_the_others() -> None:
    p = Afl(alpha1=0.5, alpha2=0.1, floor=0.02).weights(floats(1, 7, 3, 5))
    assert p.tolist() == pytest.approx([0.02, math.exp(0.7) + 0.02, 0.02, math.exp(0.5) + 0.02])
    p = Afl(alpha1=0.0, floor=0.0).weights(floats(-INF, 1e6))
    assert p[0] == 0.0
    assert p[1].isfinite()
    assert Afl(alpha2=0.0).weights(floats(-INF, 3)).tolist() == [1.0, 1.0]


def test_afl_draws_a_share_uniformly() -> None:
    """floor(0.5 * 3) = 1 of 3 by valuation, which leaves but one client; 2 of the others."""
    selector = Afl(alpha1=0.75, alpha2=1.0, alpha3=0.5, floor=0.0)
    state = learnt(selector, 4, outcome(1, reports_of("usual", range(4))))
    sets = Counter(tuple(selector.propose(state, candidates(4, 3, 2), rng(seed))) for seed in range(300))
    assert set(sets) == {(0, 1, 3), (0, 2, 3), (1, 2, 3)}
    assert all(n == pytest.approx(100, abs=40) for n in sets.values())


def test_afl_may_ask_all_clients_first() -> None:
    selector, clients = Afl(initial="evaluate"), Answers(loss={0: 1.0, 2: NAN, 3: 2.0})
    who = candidates(4, sizes=[4] * 4, clients=clients, model=lambda: None)
    state = selector.init(who)
    selector.setup(state, who)
    assert state.v.tolist() == [2.0, -INF, -INF, 4.0]
    assert len(clients.asked) == 1
    with pytest.raises(TooFewReplies):  # the setup is done again
        selector.setup(state, candidates(4, clients=Answers(loss={}), model=lambda: None))


def test_afl_draws_a_client_that_does_not_answer_less() -> None:
    selector = Afl(alpha1=0.0, alpha3=0.0, floor=0.0)
    reports = dict.fromkeys(range(2), report(loss=2.0))
    state = learnt(selector, 2, outcome(1, reports), *(outcome(r, {}, lost=[1]) for r in (2, 3)))
    drawn = [selector.propose(state, candidates(2, 1, 4), rng(seed)) for seed in range(1000)]
    assert drawn.count([1]) / 1000 == pytest.approx(0.25 / 1.25, abs=0.04)


# ---- power of choice
def asking(selector: PowerOfChoice, losses: Mapping[int, float], n: int, count: int, number: int = 1) -> Any:
    clients = Answers(loss=losses)
    who = candidates(n, count, number, clients=clients, model=lambda: None)
    state = selector.init(who)
    return selector.select(state, who), clients, state


def test_power_of_choice_takes_the_largest_losses_of_its_candidates() -> None:
    losses = {c: float(c) for c in range(9)}
    for number in range(1, 20):
        chosen, clients, state = asking(PowerOfChoice(5), losses, 9, 2, number)
        (method, asked), *others = clients.asked
        assert not others
        assert method == "loss"
        assert len(asked) == 5
        assert chosen == asked[-2:]
        assert [c for c in range(9) if not state.losses[c].isnan()] == asked
    assert asking(PowerOfChoice(100), losses, 9, 2)[0] == [7, 8]
    assert len(asking(PowerOfChoice(), losses, 9, 2)[1].asked[0][1]) == 4


def test_power_of_choice_draws_candidates_by_their_samples() -> None:
    counts: Counter[int] = Counter()
    for number in range(2000):
        who = candidates(3, 1, number, sizes=[1, 2, 3], clients=Answers(loss={0: 1, 1: 1, 2: 1}), model=lambda: None)
        selector = PowerOfChoice(1)
        counts.update(selector.select(selector.init(who), who))
    assert [counts[c] / 2000 for c in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.04)


def test_candidates_that_do_not_answer_come_last() -> None:
    losses = {0: 0.5, 1: NAN, 3: 0.1}
    assert asking(PowerOfChoice(5), losses, 5, 2)[0] == [0, 3]
    chosen = {tuple(asking(PowerOfChoice(5), losses, 5, 3, number)[0]) for number in range(30)}
    assert chosen == {(0, 1, 3), (0, 2, 3), (0, 3, 4)}
    assert len(asking(PowerOfChoice(5), {}, 5, 3)[0]) == 3


def test_rpow_d_goes_by_what_was_reported_and_asks_nobody() -> None:
    selector = PowerOfChoice(6, "rpow_d")
    assert selector.wants_reports
    assert not PowerOfChoice(6).wants_reports
    told = outcome(1, {0: report(loss=0.1), 1: report(loss=0.9), 2: report(loss=0.5), 3: report(loss=0.2)})
    state = learnt(selector, 6, told)
    assert selector.select(state, candidates(6, 2, 2)) == [4, 5]  # infinite until they report
    selector.observe(state, candidates(6), outcome(2, {4: report(loss=0.3)}, lost=[5]))
    assert selector.select(state, candidates(6, 2, 3)) == [1, 2]  # 0.9 and 0.5; 5 counts half of 0.9
    selector.observe(state, candidates(6), outcome(3, {1: report(loss=NAN)}, lost=[2]))
    assert selector.select(state, candidates(6, 2, 4)) == [1, 5]  # 0.9 still, 0.45; 0.25, 0.3


def test_fewer_candidates_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"selection.d: 2 candidates, but 3 clients are to take part .*raise it"):
        PowerOfChoice(2).init(candidates(6, 3))


# ---- tifl
def test_tiers_are_of_equal_size() -> None:
    seconds = {c: float(s) for c, s in enumerate([5, 1, 4, 2, 3, 9, 2])}
    assert tiers_of(seconds, 3) == [[1, 3, 6], [2, 4], [0, 5]]
    assert tiers_of({3: 1.0, 4: 0.5}, 5) == [[4], [3]]
    assert tiers_of({0: INF, 1: INF}, 1) == [[0, 1]]


def test_tiers_are_ranked_by_accuracy_the_lowest_first() -> None:
    chances = ranked([0.5, 0.1, 0.9, 0.3], [True] * 4)
    assert chances == pytest.approx([1 / 6, 3 / 6, 0, 2 / 6])
    assert ranked([0.5, 0.1, 0.9, 0.3], [True, False, True, False]) == [1.0, 0.0, 0.0, 0.0]
    assert ranked([0.5, 0.1], [False, True]) == [0.0, 1.0]
    assert ranked([NAN, 0.1], [True, True]) == [0.0, 1.0]


def tiered(selector: Tifl, n: int = 10, count: int = 2, **more: Any) -> tuple[State, dict[str, Any]]:
    services = {"clients": Answers(latency={c: float(c) for c in range(n)}), "model": lambda: None, **more}
    who = candidates(n, count, **services)
    state = selector.init(who)
    selector.setup(state, who)
    return state, services


def test_tifl_draws_within_a_tier_of_the_profile() -> None:
    selector = Tifl(tiers=5, interval=0)
    state, services = tiered(selector, 20, 4)
    assert state.tiers == [list(range(t, t + 4)) for t in range(0, 20, 4)]
    assert services["clients"].asked == [("latency", list(range(20)))]
    counts = Counter(tuple(selector.propose(state, candidates(20, 4, 2), rng(seed))) for seed in range(500))
    assert set(counts) == {tuple(tier) for tier in state.tiers}
    assert all(n == pytest.approx(100, abs=40) for n in counts.values())
    seen = {tuple(selector.select(state, candidates(20, 2, number))) for number in range(1, 60)}
    assert all(a // 4 == b // 4 for a, b in seen)


def test_tifl_means_several_profiles_and_drops_the_slow() -> None:
    told: list[str] = []
    selector = Tifl(tiers=2, interval=0, limit=5.0, profile_rounds=3)
    state, services = tiered(selector, 10, 7, warn=told.append)
    assert len(services["clients"].asked) == 3
    assert state.tiers == [[0, 1, 2], [3, 4, 5]]
    assert told == ["selection.limit: over 5 s, and never selected: clients 6, 7, 8, 9; 6 are left for 7 places"]
    assert selector.select(state, candidates(10, 7, 1)) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"selection.limit: 0.5 s, and no client is faster; the fastest takes 1 s"):
        tiered(Tifl(limit=0.5), 3, 2, clients=Answers(latency={0: 1.0, 2: 2.0}))


def test_a_client_that_does_not_answer_the_profile_is_slow() -> None:
    some = Answers(latency={0: 3.0, 1: NAN, 3: 1.0})
    assert tiered(Tifl(tiers=2), 4, 1, clients=some)[0].tiers == [[0, 3], [1, 2]]
    state, _ = tiered(Tifl(tiers=2, limit=9.0), 4, 1, clients=some)
    assert state.tiers == [[3], [0]]


def test_simulated_seconds_make_the_tiers() -> None:
    seconds = {c: 10.0 - c for c in range(4)}
    state, services = tiered(Tifl(tiers=2), 4, 1, seconds=seconds)
    assert state.tiers == [[2, 3], [0, 1]]
    assert services["clients"].asked  # what clients would be asked in a real run is asked
    state, services = tiered(Tifl(tiers=2, profile="devices"), 4, 1, seconds=seconds)
    assert state.tiers == [[2, 3], [0, 1]]
    assert not services["clients"].asked
    with pytest.raises(ValueError, match=r"selection.profile: devices, but nothing says .*devices.name=simulated"):
        Tifl(profile="devices").init(candidates(4))


def test_a_small_tier_is_filled_up_from_its_neighbours() -> None:
    selector = Tifl(tiers=3, interval=0)
    state, _ = tiered(selector, 6, 3)
    sets = {tuple(selector.propose(state, candidates(6, 3, 1), rng(seed))) for seed in range(200)}
    assert sets == {(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 4, 5), (1, 4, 5), (2, 4, 5), (3, 4, 5)} - {
        (0, 4, 5),
        (1, 4, 5),
    }


def test_credits_bound_how_often_a_tier_is_drawn() -> None:
    selector = Tifl(tiers=2, interval=0, credits=[3, 1])
    state, _ = tiered(selector, 4, 2)
    drawn = []
    for number in range(1, 13):
        chosen = selector.select(state, candidates(4, 2, number))
        drawn.append(chosen)
        assert selector.propose(state, candidates(4, 2, number), rng()) in ([0, 1], [2, 3])
        if number % 4 == 0:
            assert state.credits == [0, 0]
    for begin in (0, 4, 8):  # given anew when all are spent
        assert Counter(map(tuple, drawn[begin : begin + 4])) == {(0, 1): 3, (2, 3): 1}
    few = tiered(Tifl(tiers=2, credits=[0, 1]), 1, 1)[0]
    assert few.credits is None
    assert tiered(Tifl(tiers=3, credits=7), 6, 2)[0].credits == [7, 7, 7]


def test_a_tier_whose_accuracy_did_not_rise_changes_the_probabilities() -> None:
    selector = Tifl(tiers=2, interval=2, split="test")
    accuracy: dict[int, float] = {}
    clients = Answers(latency={c: float(c) for c in range(4)}, accuracy=accuracy)
    services = {"clients": clients, "task": Task([1, 3, 2, 2], "test")}
    state, services = tiered(selector, 4, 2, **services)
    clients.asked.clear()

    def go(number: int, told: Mapping[int, float]) -> None:
        accuracy.clear()
        accuracy.update(told)
        selector.select(state, candidates(4, 2, number, **services))

    go(1, {})
    go(2, {})
    assert not clients.asked
    go(3, {0: 0.8, 1: 0.4, 2: 0.1, 3: 0.2})
    assert state.accuracies == pytest.approx([0.5, 0.15])  # (0.8 + 3 * 0.4) / 4
    assert state.chances == [0.5, 0.5]  # there is nothing to compare with
    tier = state.tier
    go(4, {})
    assert len(clients.asked) == 1
    assert clients.asked[0] == ("accuracy", [0, 1, 2, 3])
    state.tier = 0
    go(5, {0: 0.9, 1: 0.9, 2: 0.1, 3: 0.1})
    assert state.chances == [0.5, 0.5]  # tier 0 has risen; that tier 1 has not is not asked
    state.tier = 0
    go(7, {0: 0.9, 1: 0.9, 2: NAN})
    assert state.accuracies == pytest.approx([0.9, 0.1])  # nobody of tier 1 has answered
    assert state.chances == [0.0, 1.0]
    assert {tuple(selector.propose(state, candidates(4, 2, 8), rng(s))) for s in range(20)} == {(2, 3)}
    go(9, {})  # nobody answers at all
    assert state.accuracies == pytest.approx([0.9, 0.1])
    assert tier in (0, 1)


# ---- configuration
@pytest.mark.parametrize(
    ("selection", "error"),
    [
        ({"name": "topk", "utility": {"alhpa": 1}}, "utility.alhpa"),
        ({"name": "topk", "utility": {"alpha": -1}}, "selection.utility.alpha: "),
        ({"name": "topk", "noise": "much"}, "selection.noise: "),
        ({"name": "oort", "variant": "plato"}, "selection.variant: "),
        ({"name": "afl", "alpha1": 1.5}, "selection.alpha1: "),
        ({"name": "power_of_choice", "d": 0}, "selection.d: "),
        ({"name": "tifl", "tiers": 0}, "selection.tiers: "),
        (
            {"name": "tifl", "credits": [1, "x"]},
            "selection.credits: it must be a number of rounds for all tiers, a list with one a tier, or null",
        ),
    ],
)
def test_what_cannot_be_configured_is_refused(selection: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        load(small(selection=selection))


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        (
            {"name": "oort", "blacklist": 3},
            "selection.blacklist: 3 is of the variant repo, and selection.variant is oort",
        ),
        ({"name": "oort", "variant": "repo", "percentile": 3}, "selection.percentile: 3.0 is of the variant oort"),
        ({"name": "tifl", "split": "val"}, "selection.split: clients have no val part; set task.split.val=0.1"),
        ({"name": "tifl", "credits": [1, 2]}, "selection.credits: 2 numbers for 5 tiers"),
        ({"name": "tifl", "credits": 0}, "selection.credits: 0 lets no tier be selected"),
    ],
)
def test_what_does_not_fit_a_task_is_refused(selection: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        build(load(small(selection=selection)))


# ---- whole runs
N, K, ROUNDS = 6, 2, 5

RUNS: dict[str, dict[str, Any]] = {
    "topk": {"name": "topk"},
    "oort": {"name": "oort"},
    "oort_repo": {"name": "oort", "variant": "repo", "window": 1, "blacklist": 1},
    "afl": {"name": "afl"},
    "afl_evaluate": {"name": "afl", "initial": "evaluate", "alpha2": 1.0},
    "pow_d": {"name": "power_of_choice", "d": 4},
    "rpow_d": {"name": "power_of_choice", "d": 4, "variant": "rpow_d"},
    "tifl": {"name": "tifl", "tiers": 3, "interval": 2, "credits": 3, "profile_rounds": 2},
}


def config(name: str, **changes: Any) -> dict[str, Any]:
    made = small(
        rounds=ROUNDS,
        clients={"num_clients": N, "per_round": K},
        selection=RUNS[name],
        clock={"name": "scripted", "seconds": {f"client {c}": 1.0 + c for c in range(N)}},
        **changes,
    )
    made["task"]["partition"] = {"name": "dirichlet", "alpha": 0.5}
    return made


def extras(name: str, size: int) -> dict[str, dict[str, int]]:
    """Bytes of the phases setup and select, by the closed formulas."""

    def asked(times: int) -> dict[str, int]:
        return {"up": 8 * times, "down": size * times}

    return {
        "afl_evaluate": {"setup": asked(N)},
        "pow_d": {"select": asked(4 * ROUNDS)},
        "tifl": {"setup": asked(2 * N), "select": asked(2 * N)},  # before the rounds 3 and 5
    }.get(name, {})


def kept(run: Path) -> Any:
    found = Checkpoints(run / "checkpoints").newest()
    assert found is not None
    return found[1]["selector"]


@pytest.mark.parametrize("name", RUNS)
def test_bytes_repetition_and_resumption(tmp_path: Path, name: str) -> None:
    settings = config(name)
    first = fldist.run(settings, output=tmp_path / "first")
    size = 4 * build(load(settings)).task.layout.num_floats
    reported = 0 if name in ("pow_d", "tifl") else 40
    phases = first["bytes"]["by_phase"]
    assert phases.pop("train") == {"up": ROUNDS * K * (size + 8 + reported), "down": ROUNDS * K * size}
    assert phases == extras(name, size)
    lines = [json.loads(line) for line in (tmp_path / "first" / "rounds.jsonl").read_text().splitlines()]
    assert [line["selected"] for line in lines] == [K] * ROUNDS
    assert fldist.run(settings, output=tmp_path / "second")["state_hash"] == first["state_hash"]
    other = fldist.run({**settings, "seed": 1}, output=tmp_path / "other")
    assert other["state_hash"] != first["state_hash"]
    fldist.run({**settings, "rounds": 2}, output=tmp_path / "again")
    resumed = fldist.resume(tmp_path / "again", [f"rounds={ROUNDS}"])
    assert resumed["state_hash"] == first["state_hash"]
    assert hash_state({"s": kept(tmp_path / "again")}) == hash_state({"s": kept(tmp_path / "first")})
    prediction = predict(build(load(settings)))
    assert prediction.training == {way: n // ROUNDS for way, n in first["bytes"]["logical"].items()}


@pytest.mark.parametrize("name", ["oort", "pow_d", "tifl"])
def test_the_same_choice_on_several_ranks(tmp_path: Path, hosts: Hosts, name: str) -> None:
    settings = config(name)
    alone = fldist.run(settings, output=tmp_path / "alone")
    ranks = run_here(load(settings), nproc=3, output=tmp_path / "ranks", spawn=hosts)
    assert ranks["state_hash"] == alone["state_hash"]
    assert ranks["bytes"]["by_phase"] == alone["bytes"]["by_phase"]


@pytest.mark.parametrize("name", RUNS)
def test_with_everybody_selected_training_is_that_of_fedavg(tmp_path: Path, name: str) -> None:
    settings = config(name)
    settings["rounds"] = 2
    del settings["clients"]["per_round"]
    if "d" in settings["selection"]:
        settings["selection"] = {**settings["selection"], "d": 6}
    result = fldist.run(settings, output=tmp_path / "run")
    plain = fldist.run({**settings, "selection": {"name": "random"}}, output=tmp_path / "plain")
    assert result["final"] == plain["final"]


def test_what_clients_report_decides(tmp_path: Path) -> None:
    """With everybody tried and no penalties, topk takes those of the largest normalised loss."""
    settings = config("topk")
    settings["selection"] = {"name": "topk", "utility": {"alpha": 0, "beta": 0}}
    seen = Recorder()
    run_here(load(settings), output=tmp_path / "run", observer=seen)
    known = kept(tmp_path / "run").known
    assert known.chosen.tolist().count(0) == 0  # three rounds try everybody
    assert int(known.chosen.sum()) == ROUNDS * K
    assert known.seconds.isnan().all()
    assert (known.utility > 0).all()
    sizes = build(load(settings)).task.sizes
    assert all(0.1 < float(u) / n < 5 for u, n in zip(known.utility, sizes, strict=True))


@pytest.mark.parametrize(
    ("of_first", "of_all"),
    [
        ({"name": "topk"}, {"name": "topk", "utility": {"epochs": "all"}}),
        ({"name": "oort"}, {"name": "oort", "util_epochs": "all"}),
    ],
)
def test_losses_of_all_epochs_may_be_added_up(tmp_path: Path, of_first: Any, of_all: Any) -> None:
    """With a learning rate of nearly 0 every epoch adds the same: U is sqrt(3) times as large."""
    settings = config("topk", local__epochs=3, local__lr=1e-12)
    known = []
    for selection in (of_first, of_all):
        fldist.run({**settings, "rounds": 1, "selection": selection}, output=tmp_path / str(len(known)))
        known.append(kept(tmp_path / str(len(known))).known.utility)
    tried = ~known[0].isnan()
    assert int(tried.sum()) == K
    assert known[1][tried].tolist() == pytest.approx((known[0][tried] * math.sqrt(3)).tolist(), rel=1e-5)


def test_slow_devices_are_chosen_less(tmp_path: Path) -> None:
    """Under simulated devices oort and topk avoid the slowest, and the runs take less simulated time than random."""
    settings = config("topk")
    settings["rounds"] = 12
    settings["devices"] = {"name": "scripted", "epoch_s": [1, 1, 1, 1, 1, 50], "watts": 1}
    random = fldist.run({**settings, "selection": {"name": "random"}}, output=tmp_path / "random")
    topk = fldist.run(settings, output=tmp_path / "topk")
    oort = fldist.run({**settings, "selection": {"name": "oort"}}, output=tmp_path / "oort")
    assert kept(tmp_path / "topk").known.chosen[5] <= 1
    for result in (topk, oort):
        assert result["simulated"]["seconds"] < random["simulated"]["seconds"]


def test_tifl_under_devices_goes_by_them(tmp_path: Path) -> None:
    settings = config("tifl")
    settings["clock"] = {"name": "scripted", "default": 1.0}
    settings["devices"] = {"name": "scripted", "epoch_s": [6, 5, 4, 3, 2, 1]}
    fldist.run(settings, output=tmp_path / "run")
    assert kept(tmp_path / "run").tiers == [[4, 5], [2, 3], [0, 1]]
    settings["selection"] = {"name": "tifl", "tiers": 3, "profile": "devices", "interval": 0}
    result = fldist.run(settings, output=tmp_path / "known")
    assert set(result["bytes"]["by_phase"]) == {"train"}
    assert kept(tmp_path / "known").tiers == [[4, 5], [2, 3], [0, 1]]
