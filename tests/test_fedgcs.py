"""FedGCS: the choice against what it is by definition, and whole runs: bytes, repetition, resume, ranks, refusals.

The generator and its search have tests of their own; where they only have to give something, they are replaced here.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fldist
import fldist.selection.fedgcs as module
from fldist.algorithm import State
from fldist.config import ConfigError, build, load
from fldist.generative.networks import Losses
from fldist.inspection import dry_run, predict
from fldist.params import Params
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints
from fldist.runtime.state import hash_state
from fldist.scoring import Utility
from fldist.selection import Candidates, ClientReport, Outcome, Selector
from fldist.selection.favor import Favor
from fldist.selection.fedgcs import FedGCS, Fitting, Searching
from fldist.selection.fedmarl import FedMarl
from fldist.selection.oort import Oort
from fldist.selection.random import Random
from fldist.selection.tifl import Tifl
from fldist.selection.topk import TopK
from tests.conftest import Hosts, Recorder, small
from tests.needs import needs_data
from tests.own_selectors import Proposes

CONFIGS = Path(__file__).parents[1] / "configs" / "fedgcs"
NAN = math.nan
MODEL = Params.of(torch.nn.Linear(2, 1))
FITTING = Fitting(hidden=8, width=8, epochs=3, later_epochs=2, lr=0.01)
SEARCHING = Searching(starts=4, steps=2, beam_width=3)


# ---- a federation that is made up
def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fedgcs(**fields: Any) -> FedGCS:
    return FedGCS(**{"fitting": FITTING, "searching": SEARCHING, "proposals": 5, **fields})


def sets(*members: Sequence[int]) -> tuple[Selector, ...]:
    """A pool that proposes each of these sets, once where `proposals` is 1."""
    return tuple(Proposes((tuple(ids),)) for ids in members)


class Federation:
    """A selector and what it is told; reports give client i the utility `worth[i]`."""

    def __init__(
        self,
        selector: FedGCS,
        n: int = 6,
        count: int = 3,
        *,
        ids: Sequence[int] | None = None,
        seconds: Sequence[float] = (),
        joules: Sequence[float] = (),
    ) -> None:
        self.selector, self.number = selector, 1
        self.logged: dict[str, float] = {}
        self.warned: list[str] = []
        ids = range(n) if ids is None else ids
        self.base = Candidates(
            list(ids), [10] * len(ids), count, num_clients=n,
            seconds=dict(enumerate(seconds)), joules=dict(enumerate(joules)),
            log=lambda **values: self.logged.update(values), warn=self.warned.append,
            model=lambda: MODEL,
        )  # fmt: skip
        self.state = selector.init(self.at(1000))

    def at(self, seed: int | None = None) -> Candidates:
        return replace(self.base, round=self.number, rng=rng(self.number if seed is None else seed))

    def tell(
        self, worth: Mapping[int, float], lost: Sequence[int] = (), accuracy: float | None = None, **more: Any
    ) -> None:
        """A round of these clients, of which `lost` did not reply, is over."""
        seconds, joules = self.base.seconds, self.base.joules
        reports = {
            i: ClientReport(10.0, u**2 / 10, u / 10, seconds.get(i, NAN), joules.get(i, NAN)) for i, u in worth.items()
        }
        who = tuple(sorted(worth))
        models = {i: torch.zeros(2) for i in who} if self.selector.wants_models else {}
        outcome = Outcome(
            self.number, tuple(sorted([*who, *lost])), who, reports, accuracy, models=models, **more
        )  # fmt: skip
        self.selector.observe(self.state, self.at(100 + self.number), outcome)
        self.number += 1

    def select(self, seed: int | None = None) -> list[int]:
        self.logged.clear()
        return self.selector.select(self.state, self.at(seed))

    def score(self, *members: Sequence[int]) -> list[float]:
        return self.selector.scores(members, self.state, self.at()).tolist()


WORTH = [9.0, 5.0, 10.0, 6.0, 2.0, 1.0]
SECONDS = [20.0, 24.0, 36.0, 25.0, 23.0, 22.0]
JOULES = [50.0, 60.0, 80.0, 40.0, 300.0, 70.0]
EVERY = list(itertools.combinations(range(6), 3))


def told(selector: FedGCS, count: int = 3, **more: Any) -> Federation:
    """Six clients have all reported in round 1."""
    made = Federation(selector, 6, count, seconds=SECONDS, joules=JOULES, **more)
    made.tell({i: WORTH[i] for i in made.base.ids}, accuracy=0.1)
    return made


def group(ids: Sequence[int], count: int = 3) -> float:
    """y by hand: T* and E* are 1.2 times the medians, E* that of K clients."""
    slowest, spent = max(SECONDS[i] for i in ids), sum(JOULES[i] for i in ids)
    return sum(WORTH[i] for i in ids) * min(1, 1.2 * 23.5 / slowest) ** 2 * min(1, 1.2 * 65 * count / spent)


class Stub:
    """Stands for fit and search: `found` are the sets of tokens that searches find, `fits` what fits were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: tuple[int, ...]) -> None:
        self.found = found
        self.fits: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        monkeypatch.setattr(module, "fit", self._fit)
        monkeypatch.setattr(module, "search", self._search)

    def _fit(self, net: Any, optimizer: Any, members: Any, labels: Tensor, **given: Any) -> Losses[float]:
        self.fits.append({"sets": members, "labels": labels.tolist(), **given})
        return Losses(0.0, 0.0, 0.0)

    def _search(self, net: Any, starts: Any, known: Any, **given: Any) -> list[tuple[int, ...]]:
        self.searches.append({"starts": starts, "known": known, **given})
        return list(self.found)


# ---- the score of sets (client_sum, group), and the best of them
@pytest.mark.parametrize("score", ["client_sum", "group"])
def test_the_choice_lies_between_the_best_record_and_the_best_set_there_is(score: Any) -> None:
    u = Utility().of(told(fedgcs()).state.known, told(fedgcs()).at()).tolist()
    y = {ids: group(ids) if score == "group" else sum(u[i] for i in ids) for ids in EVERY}
    for seed in range(4):
        proposed = random.Random(seed).sample(EVERY, 4)
        trial = told(fedgcs(pool=sets(*proposed), proposals=1, score=score))
        chosen = tuple(trial.select(seed))
        best = max(proposed, key=y.__getitem__)
        assert y[best] <= y[chosen] <= max(y.values())
        assert trial.logged["set_score"] == pytest.approx(y[chosen])
        assert trial.logged["record_score"] == pytest.approx(y[best])
        assert trial.logged["best_score"] == pytest.approx(max(y.values()))
        assert trial.logged["records"] == 4
        assert all(math.isfinite(value) for value in trial.logged.values())
    everything = told(fedgcs(pool=sets(*EVERY), proposals=1, score=score))
    assert tuple(everything.select()) == max(EVERY, key=y.__getitem__)
    assert everything.logged["new_sets"] == 0


def test_under_the_sum_the_best_set_is_a_sort_and_under_group_it_is_not() -> None:
    """Client 2 has the largest u, and slows all down."""
    trial = told(fedgcs(pool=sets(*EVERY), proposals=1))
    trial.select()
    assert told(fedgcs(pool=(TopK(noise=0),))).select() == trial.select() == [0, 2, 3]
    assert trial.logged["sorted_score"] == trial.logged["best_score"] == trial.logged["set_score"]
    trial = told(fedgcs(pool=sets(*EVERY), proposals=1, score="group"))
    assert trial.select() == [0, 1, 3]
    assert trial.logged["sorted_score"] < trial.logged["best_score"]
    # alone, 0 and 2 are worth 9 and 10 times 30 / 50, 1 and 3 as much as they have to tell
    joules = [50.0, 20.0, 50.0, 25.0, 25.0, 25.0]
    trial = Federation(fedgcs(score="group"), 6, 2, seconds=[20.0] * 6, joules=joules)
    trial.tell(dict(enumerate([9.0, 7.0, 10.0, 6.5, 2.0, 1.0])))
    trial.select()
    assert trial.logged["sorted_score"] == pytest.approx(7 + 6.5)
    assert trial.logged["best_score"] == pytest.approx((7 + 10) * 60 / 70)


def test_the_best_set_is_left_open_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES", 20 * 6)
    trial = told(fedgcs(score="group"))
    trial.select()
    assert "best_score" in trial.logged
    monkeypatch.setattr(module, "_ENTRIES", 20 * 6 - 1)
    trial = told(fedgcs(score="group"))
    trial.select()
    assert "best_score" not in trial.logged
    assert "sorted_score" in trial.logged


def test_the_pool_and_the_score_go_by_one_utility() -> None:
    own = Utility(alpha=0.5)
    made = fedgcs(utility=Utility(alpha=0, untried="zero"), pool=(TopK(), TopK(utility=own), Random()))
    assert [getattr(member, "utility", None) for member in made.pool] == [made.utility, own, None]
    trial = told(fedgcs(score="group", utility=Utility(alpha=0, beta=0)))
    assert trial.score((0, 2, 4)) == pytest.approx([21.0])


def test_clients_that_never_took_part_are_worth_the_best_or_nothing() -> None:
    for untried, best in (("optimistic", [3, 4, 5]), ("zero", [0, 1, 2])):
        trial = Federation(fedgcs(pool=sets(*EVERY), proposals=1, utility=Utility(untried=untried)))
        trial.tell({0: 5.0, 1: 4.0, 2: 3.0})
        trial.tell({0: 5.0, 1: 4.0, 2: 3.0})
        chosen = trial.select()
        assert chosen == best if untried == "zero" else set(best) <= {*chosen, 0}
        assert len(set(chosen) & {3, 4, 5}) == (0 if untried == "zero" else 3)


def test_a_client_that_never_answers_is_given_up() -> None:
    trial = told(fedgcs(pool=sets(*EVERY), proposals=1))
    taken = []
    for _ in range(5):
        chosen = trial.select()
        taken.append(2 in chosen)
        trial.tell({i: WORTH[i] for i in chosen if i != 2}, lost=[2] if 2 in chosen else [])
    assert taken[0]
    assert not any(taken[3:])


# ---- records
def test_records_are_what_the_pool_proposes_once_each_with_todays_scores() -> None:
    pool = (Random(), Oort(), TopK())
    trial = told(fedgcs(pool=pool, proposals=7))
    records = dict(trial.selector.records(trial.state, trial.at(), rng(1)).items())
    assert 3 < len(records) <= 21
    assert all(len(ids) == 3 and list(ids) == sorted(set(ids)) for ids in records)
    assert list(records.values()) == pytest.approx(trial.score(*records))
    trial.tell({0: 0.1, 2: 0.1, 5: 90.0})
    again = dict(trial.selector.records(trial.state, trial.at(), rng(1)).items())
    assert list(again.values()) == pytest.approx(trial.score(*again))
    assert any(again[ids] != records[ids] for ids in set(again) & set(records))


@dataclass(frozen=True)
class Asked(Selector):
    """Proposes as many clients as it is asked for, and notes how many these are."""

    counts: ClassVar[list[int]] = []

    def init(self, candidates: Candidates) -> State:
        return State(drawn=[torch.rand((), generator=candidates.rng)])

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        state.drawn = [*state.drawn, torch.rand((), generator=candidates.rng)]

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        self.counts.append(candidates.count)
        order = torch.randperm(len(candidates.ids), generator=rng)[: candidates.count].tolist()
        return [candidates.ids[i] for i in order]


def test_each_selector_of_the_pool_is_asked_so_often_and_has_draws_of_its_own() -> None:
    Asked.counts.clear()
    trial = told(fedgcs(pool=(Asked(), Asked()), proposals=9, fitting=replace(FITTING, epochs=1)))
    trial.select()
    assert Asked.counts == [3] * 18
    trial.tell({0: 1.0}, lost=[1, 2])
    trial.tell({}, lost=[3, 4, 5])
    first, second = (own.drawn for own in trial.state.pool)
    assert len(first) == len(second) == 4  # init, and three rounds
    assert len({float(value) for value in [*first, *second]}) == 8
    other = Federation(fedgcs(pool=(Random(), Asked())))  # whose first draws nothing there
    other.tell({0: 1.0})
    assert other.state.pool[1].drawn == second[:2]


def test_what_others_of_the_pool_draw_changes_no_ones_proposals() -> None:
    proposed = []
    for pool, m in (((Proposes(), Random()), 4), ((Oort(), Random()), 4), ((Random(), Random(), TopK()), 6)):
        trial = told(fedgcs(pool=pool, proposals=m))
        proposed.append([ids for ids, _ in trial.selector.records(trial.state, trial.at(), rng(5)).items()])
    assert len(proposed[0]) > 2
    assert set(proposed[0]) <= set(proposed[1])
    assert set(proposed[0]) <= set(proposed[2])


def test_what_is_no_record_is_left_out() -> None:
    trial = told(fedgcs(pool=sets((), (0, 1, 2, 3), (4, 4, 1), (5, 0, 3)), proposals=1))
    records = trial.selector.records(trial.state, trial.at(), rng())
    assert [ids for ids, _ in records.items()] == [(1, 4), (0, 3, 5)]
    trial.state.known = State(**trial.state.known.values | {"utility": torch.full((6,), math.inf, dtype=torch.float64)})
    assert trial.select() == sorted(trial.select())
    assert len(trial.select()) == 3


def test_a_proposal_of_somebody_who_is_not_there_is_refused() -> None:
    trial = told(fedgcs(pool=(Random(), Proposes(((0, 7, 9),)))))
    with pytest.raises(ValueError, match=r"selection\.pool\.1: Proposes proposes client 7, which it is not offered"):
        trial.select()


@pytest.mark.parametrize("pool", [(Proposes(),), sets((0, 1, 2, 3), ()), sets((0, 1))])
def test_a_pool_that_proposes_nothing_that_can_be_chosen_is_told_of(
    pool: tuple[Selector, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    Stub(monkeypatch)
    drawn = set()
    for seed in range(8):
        trial = told(fedgcs(pool=pool, proposals=1))
        chosen = trial.select(seed)
        assert len(chosen) == len(set(chosen)) == 3
        assert trial.warned == [
            "selection.pool: no set of 3 clients has been proposed or found; clients are drawn at random"
        ]
        drawn.add(tuple(chosen))
    assert len(drawn) > 2


@pytest.mark.parametrize("pool", [sets(*EVERY[:6]), sets((0, 1, 2)), (Random(), Oort(), TopK())])
@pytest.mark.parametrize("score", ["client_sum", "group"])
def test_records_of_equal_scores_are_labelled_alike(
    pool: tuple[Selector, ...], score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(monkeypatch)
    trial = Federation(fedgcs(pool=pool, proposals=2, score=score))
    trial.tell(dict.fromkeys(range(6), 4.0))
    assert len(trial.select()) == 3
    assert set(stub.fits[0]["labels"]) == {0.5}
    monkeypatch.undo()
    trial = Federation(fedgcs(pool=pool, proposals=2, score=score))
    trial.tell(dict.fromkeys(range(6), 0.0))
    assert len(trial.select()) == 3
    assert all(math.isfinite(value) for value in trial.logged.values())


# ---- tokens
def test_a_client_is_the_token_of_its_place_among_those_with_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch, (0, 4), (3, 4))
    ids = [1, 2, 4, 7, 8]
    trial = Federation(fedgcs(pool=sets((1, 2), (2, 7), (1, 8)), proposals=1), 11, 2, ids=ids)
    trial.tell({1: 3.0, 2: 1.0, 4: 1.0, 7: 8.0, 8: 9.0})
    assert trial.select() == [7, 8]
    assert stub.fits[0]["sets"] == [(0, 1), (1, 3), (0, 4)]
    y = trial.score((1, 2), (2, 7), (1, 8))
    assert stub.fits[0]["labels"] == pytest.approx([(value - y[0]) / (y[2] - y[0]) for value in y], abs=1e-6)
    search = stub.searches[0]
    assert search["starts"] == [(0, 4), (1, 3), (0, 1)]
    assert search["known"] == {(0, 1), (1, 3), (0, 4)}
    assert (search["length"], search["low"], search["high"]) == (3, 2, 2)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [1, 2, 4, 5, 7, 9]])
def test_every_client_can_be_found_also_the_last(ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real generator, from records of which none has the last two clients."""
    found: set[int] = set()
    seek = module.search

    def seen(*given: Any, **more: Any) -> Any:
        got = seek(*given, **more)
        found.update(token for tokens in got for token in tokens)
        return got

    monkeypatch.setattr(module, "search", seen)
    chosen: set[int] = set()
    for seed in range(6):
        trial = Federation(fedgcs(pool=sets(ids[:2], ids[2:4], ids[1:3]), proposals=1), 10, 2, ids=ids)
        trial.tell(dict.fromkeys(ids[:4], 1.0) | dict.fromkeys(ids[4:], 50.0))
        got = trial.select(seed)
        assert len(got) == 2 and set(got) <= set(ids)
        chosen |= set(got)
    assert found == set(range(6))
    assert {ids[4], ids[5]} <= chosen


# ---- the final set
def test_new_sets_are_chosen_where_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, (3, 4, 5), (0, 2, 3), (1, 2, 3))
    trial = told(fedgcs(pool=sets((0, 1, 2), (1, 4, 5)), proposals=1))
    assert trial.select() == [0, 2, 3]
    assert trial.logged["new_sets"] == 3
    assert trial.logged["set_score"] > trial.logged["record_score"]


def test_a_record_is_chosen_where_it_is_better_unless_records_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, (3, 4, 5), (1, 4, 5))
    for with_records, chosen in ((True, [0, 2, 3]), (False, [3, 4, 5])):
        searching = replace(SEARCHING, with_records=with_records)
        trial = told(fedgcs(pool=sets((0, 2, 3), (0, 1, 2)), proposals=1, searching=searching))
        assert trial.select() == chosen
        assert (trial.logged["set_score"] < trial.logged["record_score"]) == (not with_records)
    Stub(monkeypatch)
    trial = told(fedgcs(pool=sets((0, 1, 2), (0, 2, 3)), proposals=1, searching=searching))
    assert trial.select() == [0, 2, 3]


def test_equal_sets_the_one_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for first, second in itertools.permutations([(1, 2, 3), (2, 4, 5), (0, 1, 5)], 2):
        Stub(monkeypatch, first, second)
        trial = Federation(fedgcs(pool=sets((0, 3, 4)), proposals=1))
        trial.tell(dict.fromkeys(range(6), 4.0))
        assert tuple(trial.select()) == first


def test_new_sets_of_another_size_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, (0, 1, 2, 3, 4, 5), (2,), (3, 4, 5))
    trial = told(fedgcs(pool=sets((1, 4, 5), (0, 2)), proposals=1, searching=replace(SEARCHING, with_records=False)))
    assert trial.select() == [3, 4, 5]
    assert trial.logged["new_sets"] == 1


def test_decoded_sets_that_are_empty_leave_the_best_record() -> None:
    """With the published decoding an untrained network repeats itself, or stops at once."""
    searching = Searching(starts=4, steps=3, ascent="single", target="sigmoid", decode="official", with_records=False)
    fitting = replace(FITTING, epochs=1, mask_padding=False, length="clients")
    for seed in range(3):
        trial = told(fedgcs(pool=sets(*EVERY[:5]), proposals=1, searching=searching, fitting=fitting))
        chosen = tuple(trial.select(seed))
        assert trial.logged["new_sets"] == 0
        assert chosen == max(EVERY[:5], key=lambda ids: trial.score(ids)[0])


def test_with_random_alone_and_no_search_it_is_the_best_of_m_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Generator", None)  # no networks are made
    searching = replace(SEARCHING, steps=0)
    means = []
    for m in (1, 4, 16):
        scores = []
        for seed in range(20):
            trial = told(fedgcs(pool=(Random(),), proposals=m, searching=searching))
            chosen = tuple(trial.select(seed))
            records = dict(trial.selector.records(trial.state, trial.at(), rng(seed)).items())
            assert 1 <= len(records) <= m
            assert chosen == max(records, key=records.__getitem__)
            assert trial.logged["new_sets"] == 0
            assert "generator_loss" not in trial.logged
            scores.append(records[chosen])
        means.append(math.fsum(scores))
    assert means == sorted(means) and means[0] < means[2]
    assert trial.state.networks == {}


# ---- sizes
def test_before_anyone_has_reported_clients_are_drawn() -> None:
    counts: dict[tuple[int, ...], int] = {}
    trial = Federation(fedgcs(), 4, 2)
    for seed in range(600):
        chosen = tuple(trial.select(seed))
        counts[chosen] = counts.get(chosen, 0) + 1
    assert set(counts) == set(itertools.combinations(range(4), 2))
    assert all(70 < count < 130 for count in counts.values())
    trial = Federation(fedgcs(), 6, 3)
    trial.tell({}, lost=[0, 1, 2])
    assert len(trial.select()) == 3
    assert trial.logged == {} and trial.warned == []


@pytest.mark.parametrize(("low", "high", "first"), [(2, 4, 3), (4, 5, 4), (1, 2, 2), (None, None, 3), (6, 6, 6)])
def test_a_range_of_sizes_is_kept_in_every_round(low: int | None, high: int | None, first: int) -> None:
    trial = Federation(fedgcs(size="range", k_min=low, k_max=high, score="group"), seconds=SECONDS, joules=JOULES)
    assert len(trial.select()) == first
    for number in range(4):
        chosen = trial.select(number)
        assert (low or 1) <= len(chosen) <= (high or 3)
        trial.tell({i: WORTH[i] for i in chosen})


def test_with_a_range_all_sizes_are_proposed() -> None:
    Asked.counts.clear()
    trial = told(fedgcs(size="range", k_min=2, k_max=5, pool=(Asked(),), proposals=60))
    sizes = [len(ids) for ids, _ in trial.selector.records(trial.state, trial.at(), rng()).items()]
    assert set(Asked.counts) == set(sizes) == {2, 3, 4, 5}


def test_with_a_range_the_sum_takes_as_many_as_it_may_and_group_does_not() -> None:
    every = [ids for k in (1, 2, 3) for ids in itertools.combinations(range(6), k)]
    trial = told(fedgcs(size="range", pool=sets(*every), proposals=1))
    assert trial.select() == [0, 2, 3]
    assert trial.logged["best_score"] == pytest.approx(trial.logged["set_score"])
    trial = told(fedgcs(size="range", k_max=3, pool=sets(*every), proposals=1, score="group"), count=1)
    assert tuple(trial.select()) == max(every, key=lambda ids: group(ids, count=1))
    assert trial.logged["best_score"] == pytest.approx(max(group(ids, count=1) for ids in every))


def test_the_published_size_is_free_and_is_the_next_rounds_k(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, (0, 1, 2, 3, 4))
    Asked.counts.clear()
    trial = told(fedgcs(size="published", pool=(Asked(),), proposals=2))
    assert trial.select() == [0, 1, 2, 3, 4]
    trial.tell({i: WORTH[i] for i in range(5)})
    Stub(monkeypatch, (0, 3))
    trial = replace_selector(trial, searching=replace(SEARCHING, with_records=False))
    assert trial.select() == [0, 3]
    trial.tell({i: WORTH[i] for i in (0, 3)})
    trial.select()
    assert Asked.counts == [3, 3, 5, 5, 2, 2]


def replace_selector(trial: Federation, **fields: Any) -> Federation:
    trial.selector = replace(trial.selector, **fields)
    return trial


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 4),
        ({"size": "range", "k_min": 1, "k_max": 5}, 6),
        ({"fitting": replace(FITTING, length="clients")}, 6),
        ({"size": "published"}, 7),
        ({"size": "published", "fitting": replace(FITTING, length="clients")}, 6),
    ],
)
def test_rows_hold_the_largest_set_and_an_end(
    fields: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(monkeypatch)
    told(fedgcs(**fields)).select()
    assert [stub.fits[0]["length"], stub.searches[0]["length"]] == [length, length]
    monkeypatch.undo()
    chosen = told(fedgcs(pool=sets(range(6), (0, 1, 2), (3, 4, 5)), proposals=1, **fields)).select()
    assert 1 <= len(chosen) <= 6


def test_where_all_are_asked_all_are_chosen_and_no_network_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Generator", None)
    for score in ("client_sum", "group", "measured"):
        trial = Federation(fedgcs(score=score), 4, 4)
        for _ in range(3):
            assert trial.select() == [0, 1, 2, 3]
            trial.tell(dict.fromkeys(range(4), 2.0), accuracy=0.1)


# ---- the generator from round to round
@pytest.mark.parametrize(("refresh_every", "fitted"), [(1, [2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [2, 5]), (0, [2])])
@pytest.mark.parametrize("warm_start", [True, False])
def test_networks_are_fitted_as_often_as_asked_for_and_go_on_or_begin_anew(
    refresh_every: int, fitted: list[int], warm_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int, str]] = []
    fit, search = module.fit, module.search

    def weights(net: Any) -> str:
        return hash_state({"all": torch.cat([p.detach().flatten() for p in net.parameters()])})

    def seen_fit(net: Any, optimizer: Any, *given: Any, **more: Any) -> Any:
        log.append((f"fit {more['epochs']} {bool(optimizer.state)}", trial.number, weights(net)))
        return fit(net, optimizer, *given, **more)

    def seen_search(net: Any, *given: Any, **more: Any) -> Any:
        log.append(("search", trial.number, weights(net)))
        return search(net, *given, **more)

    monkeypatch.setattr(module, "fit", seen_fit)
    monkeypatch.setattr(module, "search", seen_search)
    trial = told(fedgcs(refresh_every=refresh_every, warm_start=warm_start))
    held = {}
    for number in range(2, 7):
        trial.tell({i: WORTH[i] for i in trial.select()})
        held[number] = bool(trial.state.networks)
    fits = {number: (what, before) for what, number, before in log if what != "search"}
    used = {number: after for what, number, after in log if what == "search"}
    assert list(fits) == fitted
    assert [what for what, _ in fits.values()] == ["fit 3 False", *["fit 2 True" if warm_start else "fit 3 False"] * 9][
        : len(fitted)
    ]
    assert list(used) == [2, 3, 4, 5, 6]
    for number in range(3, 7):
        if number not in fitted:
            assert used[number] == used[number - 1]
        elif warm_start:
            assert fits[number][1] == used[number - 1]
        else:
            assert fits[number][1] != used[number - 1]
    assert set(held.values()) == {warm_start or refresh_every != 1}
    assert trial.state.fitted == fitted[-1]


def test_draws_differ_between_rounds_and_repeat_where_seeds_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    for reseed in (False, True):
        fit, initial = module.fit, []

        def seen(net: Any, *given: Any, fit: Any = fit, initial: Any = initial, **more: Any) -> Any:
            initial.append(net.encoder.embedding.weight.detach().clone())
            return fit(net, *given, **more)

        monkeypatch.setattr(module, "fit", seen)
        trial = told(fedgcs(reseed=reseed, pool=(Random(), Random()), warm_start=False))
        records = []
        for _ in range(2):
            records.append([ids for ids, _ in trial.selector.records(trial.state, trial.at(), trial.at().rng).items()])
            trial.select()
            trial.number += 1
        monkeypatch.undo()
        assert (records[0] == records[1]) == reseed
        assert torch.equal(initial[0], initial[1]) == reseed
        first = [Federation(fedgcs(reseed=reseed), 9, 3).select(seed) for seed in range(5)]
        assert (len(set(map(tuple, first))) == 1) == reseed


def test_networks_that_diverge_are_told_of_and_given_up() -> None:
    trial = told(fedgcs())
    trial.tell({i: WORTH[i] for i in trial.select()})
    assert trial.state.networks
    sane, trial = trial.selector, replace_selector(trial, fitting=replace(FITTING, lr=1e30))
    assert len(trial.select()) == 3
    assert trial.warned == ["selection.fitting.lr: 1e+30 lets the networks diverge; lower it"]
    assert trial.state.networks == {}
    assert trial.logged["new_sets"] == 0
    assert all(math.isfinite(value) for value in trial.logged.values())
    trial.selector = sane
    trial.select()
    assert all(bool(value.isfinite().all()) for value in trial.state.networks.values())


def test_options_reach_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    networks = module.Generator

    def seen(*given: Any, **more: Any) -> Any:
        made["net"] = given
        return networks(*given, **more)

    monkeypatch.setattr(module, "Generator", seen)
    stub = Stub(monkeypatch)
    fitting = Fitting(7, 9, 1, 0.02, 33, 2.0, 0.4, 11, 12, 6, False, False, "clients")
    searching = Searching(2, "single", 13, 0.7, "sigmoid", "greedy", 4, 17, False)
    trial = told(fedgcs(fitting=fitting, searching=searching))
    trial.select()
    assert made["net"] == (6, 7, 9, 1, False)
    fit = stub.fits[0]
    wanted = {"epochs": 11, "batch": 33, "trade_off": 0.4, "clip": 2.0, "copies": 6, "length": 6, "online": False}
    assert {key: fit[key] for key in wanted} == wanted
    search = stub.searches[0]
    wanted = {
        "ascent": "single", "steps": 13, "step": 0.7, "target": "sigmoid", "decode": "greedy", "width": 4, "wanted": 17,
        "low": 3, "high": 3,
    }  # fmt: skip
    assert {key: search[key] for key in wanted} == wanted
    assert len(search["starts"]) == 2
    assert trial.state.networks["net.encoder.embedding.weight"].shape == (7, 7)
    trial.tell({0: 1.0})
    trial.select()
    assert stub.fits[1]["epochs"] == 12


# ---- measured
def measured(*rounds: tuple[Sequence[int], float], **fields: Any) -> Federation:
    trial = Federation(fedgcs(score="measured", **fields), seconds=SECONDS, joules=JOULES)
    for who, accuracy in rounds:
        trial.tell({i: WORTH[i] for i in who}, accuracy=accuracy, seconds=max(SECONDS[i] for i in who), joules=300.0)
    return trial


def test_measured_lets_the_pool_choose_in_turn_and_then_the_generator() -> None:
    pool = sets((0, 1, 2), (3, 4, 5))
    trial = measured(pool=pool, collect=3)
    chosen = []
    for accuracy in (0.1, 0.4, 0.5):
        chosen.append(trial.select())
        assert trial.logged == {}
        trial.tell({i: WORTH[i] for i in chosen[-1]}, accuracy=accuracy)
    assert chosen == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert len(trial.select()) == 3
    assert trial.logged["records"] == 2
    assert "sorted_score" not in trial.logged


def test_measured_scores_are_gains_times_penalties() -> None:
    trial = measured(((0, 1, 2), 0.2), ((3, 4, 5), 0.5), ((0, 1), 0.4), pool=(Random(),))
    records = dict(trial.selector.records(trial.state, trial.at(), rng()).items())
    late, spent = 1.2 * 23.5, 1.2 * 65 * 3
    assert records == {
        (3, 4, 5): pytest.approx(0.3 * min(1, late / 25) ** 2 * spent / 300),
        (0, 1): pytest.approx(-0.1 * min(1, late / 24) ** 2 * spent / 300),
    }


def test_a_set_that_was_measured_twice_has_its_newest_or_its_first_score() -> None:
    rounds = (((0, 1, 2), 0.2), ((0, 1, 3), 0.5), ((0, 1, 3), 0.6))
    for repeated, gain in (("newest", 0.1), ("first", 0.3)):
        trial = measured(*rounds, pool=(Random(),), repeated=repeated, utility=Utility(alpha=0, beta=0))
        assert dict(trial.selector.records(trial.state, trial.at(), rng()).items()) == {(0, 1, 3): pytest.approx(gain)}


def test_measured_goes_by_those_who_replied_and_forgets_rounds_without_a_reply() -> None:
    trial = measured(((0, 1, 2), 0.2), pool=(Random(),), collect=1)
    trial.tell({}, lost=[3, 4, 5], accuracy=0.2)
    assert trial.state.sets == []
    assert len(trial.select()) == 3  # nothing is measured yet: the pool goes on
    assert trial.warned == []
    trial.tell({3: 1.0, 4: 1.0}, lost=[5], accuracy=0.5)
    assert trial.state.sets == [[3, 4]]
    assert trial.state.gains == [pytest.approx(0.3)]


def test_measured_takes_what_networks_take_for_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, (1, 2, 3), (2, 3, 4))
    trial = measured(((0, 1, 2), 0.2), ((3, 4, 5), 0.5), pool=(Random(),), collect=1)
    for liked in [(1, 2, 3), (2, 3, 4), (3, 4, 5)]:

        def estimates(net: Any, rows: Tensor, liked: Any = liked) -> Tensor:
            return torch.tensor([float(tuple(row[:3]) == liked) for row in rows.tolist()])

        monkeypatch.setattr(module, "_estimates", estimates)
        assert tuple(trial.select()) == liked
        assert trial.logged["set_score"] == 1.0
        assert trial.logged["record_score"] == pytest.approx(trial.state.gains[0])
    trial.tell({0: 1.0, 1: 1.0, 5: 1.0}, accuracy=0.4)
    monkeypatch.setattr(module, "_estimates", lambda net, rows: torch.arange(len(rows)).double())
    Stub(monkeypatch)
    for starts, chosen in ((1, [3, 4, 5]), (2, [0, 1, 5])):  # of records only those from which the search begins
        trial = replace_selector(trial, searching=replace(SEARCHING, starts=starts))
        assert trial.select() == chosen
    trial = replace_selector(trial, searching=replace(SEARCHING, steps=0))
    assert trial.select() == [3, 4, 5]


def test_measured_keeps_bounds_also_while_it_collects() -> None:
    for proposed in ((0, 1), (0, 1, 2, 3), ()):
        trial = measured(pool=sets(proposed))
        assert len(trial.select()) == 3
    trial = measured(pool=(Random(),), size="range", k_min=4, k_max=5)
    assert {len(trial.select(seed)) for seed in range(12)} == {4, 5}


# ---- what the pool's selectors want
def test_what_the_pool_wants_is_wanted_and_what_it_refuses_is_refused() -> None:
    cheap, paper = fedgcs(), fedgcs(pool=(Oort(), FedMarl(hidden=4), Favor(hidden=(4,), components=2)))
    assert (cheap.wants_reports, cheap.wants_accuracy, cheap.wants_models, cheap.probes) == (True, False, False, False)
    assert (paper.wants_reports, paper.wants_accuracy, paper.wants_models, paper.probes) == (True, True, True, False)
    assert fedgcs(score="measured").wants_accuracy
    assert list(fedgcs(pool=(Random(), Tifl(), Tifl())).client_methods()) == [
        "tifl1.accuracy", "tifl1.latency", "tifl2.accuracy", "tifl2.latency",
    ]  # fmt: skip
    assert cheap.client_methods() == {}


@dataclass(frozen=True)
class Sees(Favor):
    """Notes what it is shown."""

    seen: ClassVar[list[Any]] = []

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        self.seen.append(dict(outcome.models))


def test_models_are_shown_to_the_selector_that_wants_them_alone() -> None:
    Sees.seen.clear()

    @dataclass(frozen=True)
    class Blind(Random):
        seen: ClassVar[list[Any]] = []

        def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
            self.seen.append(dict(outcome.models))

    trial = Federation(fedgcs(pool=(Blind(), Sees(hidden=(4,), components=2))))
    trial.tell({0: 1.0, 4: 2.0}, accuracy=0.5)
    assert [set(models) for models in Sees.seen] == [{0, 4}]
    assert Blind.seen == [{}]
    trial.state.pool[1].loadings, trial.state.pool[1].mean = torch.eye(2, 3), torch.zeros(3)
    assert torch.equal(trial.selector.digest(trial.state, MODEL), MODEL.floats[:2])


@dataclass(frozen=True)
class Warms(Random):
    """Notes the rounds in which it may ask clients, as it could in a round of its own."""

    warmed: ClassVar[list[int]] = []

    def warm_up(self, state: State, candidates: Candidates) -> None:
        self.warmed.append(candidates.round)


def test_the_pool_warms_up_once_a_round_and_not_for_a_proposal() -> None:
    Warms.warmed.clear()
    trial = Federation(fedgcs(pool=(Random(), Warms())))
    for _ in range(3):
        trial.selector.propose(trial.state, trial.at(), rng())
        trial.tell(dict.fromkeys(trial.select(), 1.0))
    assert Warms.warmed == [1, 2, 3]


# ---- without a trace
def everything(state: Any) -> str:
    return hash_state(state.values)


SELECTORS: dict[str, Callable[[], FedGCS]] = {
    "cheap": fedgcs,
    "paper": lambda: fedgcs(
        pool=(Oort(variant="repo"), FedMarl(hidden=4), Favor(hidden=(4,), components=2), Tifl(tiers=2))
    ),
    "measured": lambda: fedgcs(score="measured", collect=2, pool=(Random(), TopK())),
    "published": lambda: fedgcs(size="published"),
}


def learnt(name: str) -> Federation:
    """After four rounds, networks held."""
    trial = told(SELECTORS[name]())
    for number in range(3):
        trial.tell({i: WORTH[i] + number for i in trial.select()}, accuracy=0.2 + 0.1 * number)
    return trial


@pytest.mark.parametrize("name", SELECTORS)
def test_a_proposal_changes_no_state_and_says_nothing(name: str) -> None:
    trial = learnt(name)
    before = everything(trial.state)
    trial.logged.clear()
    candidates = trial.at()
    own = candidates.rng.get_state()
    proposed = [trial.selector.propose(trial.state, candidates, rng(seed)) for seed in (1, 2, 1)]
    assert proposed[0] == proposed[2] == trial.select(1)
    assert torch.equal(candidates.rng.get_state(), own)
    trial = learnt(name)
    trial.logged.clear()
    trial.selector.propose(trial.state, trial.at(), rng(1))
    assert everything(trial.state) == before
    assert trial.logged == {} and trial.warned == []
    for member, state in zip(trial.selector.pool, trial.state.pool, strict=True):
        for seed in range(3):
            member.propose(state, trial.at(), rng(seed))
    assert everything(trial.state) == before


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selection_draws_from_its_own_generator_alone_and_replaces_what_it_changes(name: str) -> None:
    ends = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        trial = learnt(name)
        old = trial.state.copy()
        before = everything(old)
        globals_before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        chosen = trial.select(7)
        trial.tell(dict.fromkeys(chosen, 1.0), accuracy=0.3)
        assert torch.equal(torch.get_rng_state(), globals_before[0])
        assert np.random.get_state()[1].tolist() == globals_before[1]  # type: ignore[index]
        assert random.getstate() == globals_before[2]
        assert everything(old) == before
        ends.append((chosen, everything(trial.state)))
    assert ends[0] == ends[1]


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from tests.test_fedgcs import SELECTORS, everything, learnt
for name in SELECTORS:
    trial = learnt(name)
    print(name, trial.select(7), everything(trial.state))
"""


def test_nothing_depends_on_the_interpreters_hash_seed() -> None:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(root=root)], env=environment, cwd=root, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    here = []
    for name in SELECTORS:
        trial = learnt(name)
        here.append(f"{name} {trial.select(7)} {everything(trial.state)}")
    assert done.stdout.splitlines() == here


def test_what_is_kept_does_not_grow_with_the_rounds() -> None:
    """Of 1000 clients, 10 a round; what was measured alone grows, by one set a round."""

    def numbers(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        if isinstance(value, State):
            return numbers(value.values)
        if isinstance(value, dict):
            return sum(map(numbers, value.values()))
        return sum(map(numbers, value)) if isinstance(value, list) else 1

    for score in ("client_sum", "measured"):
        trial = Federation(fedgcs(score=score, searching=replace(SEARCHING, steps=0), proposals=1), 1000, 10)
        sizes = []
        for number in range(50):
            trial.tell({(17 * number + i) % 1000: 1.0 for i in range(10)}, accuracy=0.1)
            sizes.append(numbers(trial.state) - numbers(trial.state.pool[1].history))
        grown = {after - before for before, after in itertools.pairwise(sizes[1:])}
        assert grown == ({11} if score == "measured" else {0})


# ---- whole runs
N, K = 8, 3
SELECTION: dict[str, Any] = {
    "name": "fedgcs",
    "proposals": 4,
    "fitting": {"hidden": 8, "width": 8, "epochs": 3, "later_epochs": 2, "lr": 0.01},
    "searching": {"starts": 4, "steps": 2, "beam_width": 3},
}
PAPER = ["oort", {"name": "fedmarl", "hidden": 4}, {"name": "favor", "hidden": [4], "components": 2}]


def config(selection: Any = None, **changes: Any) -> dict[str, Any]:
    """Devices are simulated, so that nothing goes by the clock; `selection` are fields that differ, or a name."""
    given = selection if isinstance(selection, str) else {**SELECTION, **(selection or {})}
    made = small(rounds=4, clients={"num_clients": N, "per_round": K}, devices="simulated", selection=given)
    made["task"]["partition"] = {"name": "dirichlet", "alpha": 0.5}
    made["local"]["epochs"] = 2
    for key, value in changes.items():
        at = made
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return made


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def logs(run: Path) -> list[dict[str, float]]:
    return [line.get("log", {}) for line in lines(run)]


def kept(run: Path) -> Any:
    found = Checkpoints(run / "checkpoints").newest()
    assert found is not None
    return found[1]["selector"]


def model_bytes(settings: dict[str, Any]) -> int:
    return 4 * build(load(settings)).task.layout.num_floats


def final_model(run: Path) -> Tensor:
    return torch.cat([t.reshape(-1) for _, t in sorted(load_file(run / "model" / "model.safetensors").items())])


BYTES: dict[str, Any] = {
    "random": "random",
    "oort": "oort",
    "defaults": None,
    "wide": {"proposals": 9, "fitting": {"hidden": 16, "width": 4, "layers": 1, "epochs": 1, "copies": 5}},
    "no search": {"searching": {"steps": 0}},
    "published": {
        "warm_start": False, "reseed": True, "refresh_every": 2,
        "searching": {"decode": "official", "ascent": "single"},
    },
    "group": {"score": "group", "utility": {"untried": "zero"}},
    "measured": {"score": "measured", "collect": 2},
    "range": {"size": "range", "k_min": 1, "k_max": 5, "score": "group"},
    "any": {"size": "published", "fitting": {**SELECTION["fitting"], "length": "clients"}},
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_a_round_moves_the_bytes_of_its_clients_models_and_reports_whatever_the_generator_is(
    name: str, tmp_path: Path
) -> None:
    settings = config(BYTES[name])
    result = fldist.run(settings, output=tmp_path / "run")
    size, chosen = model_bytes(settings), [line["chosen"] for line in lines(tmp_path / "run")]
    assert len(chosen) == 4
    if name not in ("range", "any"):
        assert all(len(ids) == K for ids in chosen)
    total = sum(map(len, chosen))
    assert result["bytes"]["by_phase"] == {"train": {"up": total * (size + 48), "down": total * size}}
    assert result["bytes"]["by_kind"]["report"] == {"up": 40 * total, "down": 0}
    for line in lines(tmp_path / "run"):
        assert line["bytes"]["logical"] == {
            "up": len(line["chosen"]) * (size + 48), "down": len(line["chosen"]) * size,
        }  # fmt: skip


def test_the_papers_pool_costs_its_setup_and_nothing_later(tmp_path: Path) -> None:
    settings = config({"pool": PAPER})
    result = fldist.run(settings, output=tmp_path / "run")
    size, phases = model_bytes(settings), result["bytes"]["by_phase"]
    assert set(phases) == {"setup", "train"}
    assert phases["setup"] == {"up": N * (size + 40), "down": N * size}
    assert phases["train"] == {"up": 4 * K * (size + 48), "down": 4 * K * size}
    log = logs(tmp_path / "run")
    assert all(line["favor_reward"] < 0 for line in log)
    assert all(line["records"] >= 1 for line in log[1:])
    state = kept(tmp_path / "run")
    assert state.pool[1].accuracy is not None
    assert len(state.pool[2].memory) == 4
    assert float(state.pool[2].scores.abs().sum()) > 0


def test_where_everybody_takes_part_it_is_full_participation(tmp_path: Path) -> None:
    everybody = {"num_clients": N, "per_round": N}
    fldist.run(config(clients=everybody), output=tmp_path / "run")
    fldist.run(config("random", clients=everybody), output=tmp_path / "all")
    assert torch.equal(final_model(tmp_path / "run"), final_model(tmp_path / "all"))
    assert all(line["selected"] == N for line in lines(tmp_path / "run"))


@pytest.mark.parametrize("name", ["cheap", "paper", "measured"])
def test_the_same_run_again_on_several_ranks_and_after_a_resume(name: str, tmp_path: Path, hosts: Hosts) -> None:
    fields = {"cheap": {"score": "group"}, "paper": {"pool": PAPER}, "measured": {"score": "measured", "collect": 2}}
    settings = config(fields[name])
    alone = fldist.run(settings, output=tmp_path / "alone")
    random.seed(1)
    torch.manual_seed(1)
    assert fldist.run(settings, output=tmp_path / "twice")["state_hash"] == alone["state_hash"]
    other = fldist.run({**settings, "seed": 1}, output=tmp_path / "other")
    assert other["state_hash"] != alone["state_hash"]
    topology = {"cheap": "reduce", "paper": "star", "measured": "collective"}[name]
    ranks = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "ranks", spawn=hosts)
    assert ranks["state_hash"] == alone["state_hash"]
    assert ranks["bytes"]["by_phase"] == alone["bytes"]["by_phase"]
    fldist.run({**settings, "rounds": 3}, output=tmp_path / "again")
    assert kept(tmp_path / "again").networks  # networks are warm
    resumed = fldist.resume(tmp_path / "again", ["rounds=4"])
    assert resumed["state_hash"] == alone["state_hash"]
    assert logs(tmp_path / "again") == logs(tmp_path / "alone")


def test_a_host_that_dies_leaves_no_trace_where_the_round_is_done_again(tmp_path: Path, hosts: Hosts) -> None:
    settings = config(faults={"min_replies": "all", "on_quorum_loss": "retry"})
    undisturbed = fldist.run(settings, output=tmp_path / "undisturbed")
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 3, str(tmp_path / "mark"))
    seen = Recorder()
    result = run_here(load(settings), nproc=2, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert (tmp_path / "mark").exists()
    assert sum(line["attempt"] for line in seen.lines) == 1
    assert result["state_hash"] == undisturbed["state_hash"]


def test_clients_of_a_host_that_dies_are_silent_and_the_run_goes_on(tmp_path: Path, hosts: Hosts) -> None:
    settings = config(rounds=3)
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 2, str(tmp_path / "mark"))
    seen = Recorder()
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert (tmp_path / "mark").exists()
    assert result["status"] == "finished"
    silent = dict.fromkeys(range(N), 0)
    for line in seen.lines:
        for client in line["chosen"]:
            silent[client] = silent[client] + 1 if str(client) in line["missing"] else 0
    assert sum(silent.values()) > 0
    assert kept(tmp_path / "run").known.silent.tolist() == list(silent.values())


def test_two_rounds_are_enough(tmp_path: Path) -> None:
    result = fldist.run(config(rounds=2), output=tmp_path / "run")
    assert result["status"] == "finished"
    first, second = logs(tmp_path / "run")
    assert first == {}
    assert second["generator_loss"] > 0


def test_a_scripted_clock_makes_a_run_repeatable_where_nothing_is_simulated(tmp_path: Path) -> None:
    scripted = {"name": "scripted", "default": 1.0, "seconds": {f"client {i}": 1.0 + i for i in range(N)}}
    settings = config(devices="none", clock=scripted)
    hashes = {fldist.run(settings, output=tmp_path / str(i))["state_hash"] for i in range(2)}
    assert len(hashes) == 1
    assert float(kept(tmp_path / "0").known.seconds.nan_to_num().sum()) > 0


@pytest.mark.parametrize("algorithm", ["scaffold", "local", "fedproto", "moon"])
def test_other_algorithms(algorithm: str, tmp_path: Path) -> None:
    result = fldist.run(config(algorithm={"name": algorithm}, rounds=3), output=tmp_path / "run")
    assert result["status"] == "finished"
    assert logs(tmp_path / "run")[2]["records"] >= 1


def test_clients_without_samples_are_not_chosen_and_those_that_are_there_all_can_be(tmp_path: Path) -> None:
    """24 rows of 12 clients: many have none. More are asked for than there are, too."""
    settings = config(
        {"pool": ["random"]}, rounds=6, clients={"num_clients": 12, "per_round": 2},
        task__partition={"name": "dirichlet", "alpha": 0.05}, task__subset={"train": 24},
    )  # fmt: skip
    task = build(load(settings)).task
    able = {c for c in range(12) if task.sizes[c] > 0}
    assert 3 < len(able) < 12
    fldist.run(settings, output=tmp_path / "run")
    chosen = {c for line in lines(tmp_path / "run") for c in line["chosen"]}
    assert chosen <= able
    assert len(chosen) > len(able) // 2
    settings["clients"]["per_round"] = 12
    fldist.run(settings, output=tmp_path / "all")
    assert all(line["selected"] == line["replied"] == len(able) for line in lines(tmp_path / "all"))


# ---- predictions
@pytest.mark.parametrize("fields", [{}, {"pool": PAPER}, {"score": "measured"}, {"size": "published"}])
def test_a_prediction_counts_what_a_run_sends(fields: dict[str, Any], tmp_path: Path) -> None:
    settings = config(fields, rounds=1)
    result = fldist.run(settings, output=tmp_path / "run")
    prediction = predict(build(load(settings)))
    assert not prediction.unknown
    assert prediction.training == result["bytes"]["logical"]
    assert prediction.before == {k: v for k, v in result["bytes"]["by_phase"].items() if k == "setup"}
    assert "fedgcs" in dry_run(load(settings), 1)


# ---- what cannot be
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"fitting": {"hiden": 3}}, "selection.fitting.hiden: unknown key; did you mean selection.fitting.hidden?"),
        ({"searching": {"beam": 3}}, "selection.searching.beam: unknown key; did you mean .*beam_width"),
        ({"utility": {"alhpa": 3}}, "selection.utility.alhpa: unknown key; did you mean selection.utility.alpha?"),
        ({"serching": {}}, "selection.serching: fedgcs has no such field; did you mean selection.searching?"),
        ({"proposals": 0}, "selection.proposals: input should be greater than or equal to 1; got 0"),
        ({"fitting": {"trade_off": 1.5}}, "selection.fitting.trade_off: .*less than or equal to 1; got 1.5"),
        ({"searching": {"steps": -1}}, "selection.searching.steps: .*greater than or equal to 0; got -1"),
        ({"pool": "chaep"}, "selection.pool: there is no pool 'chaep'; use cheap, paper, or a list of selectors"),
        ({"pool": []}, "selection.pool: it must be cheap, paper, or a list of at least one selector"),
        ({"pool": ["random", "oortt"]}, "selection.pool.1.name: unknown name 'oortt'; did you mean 'oort'?"),
        ({"pool": ["random", 3]}, "selection.pool.1: it must be a selector such as oort, or .*; got 3"),
        ({"pool": ["random", {"name": "topk", "noise": -1}]}, "selection.pool.1.noise: .*equal to 0; got -1"),
        ({"pool": ["random", {"name": "topk", "nois": 1}]}, "selection.pool.1.nois: topk has no such field"),
        ({"pool": ["fedgcs"]}, "selection.pool.0.name: it cannot propose to itself"),
        ({"pool": ["tests.own:Base"]}, "selection.pool.0.name: 'tests.own:Base' is not a subclass"),
        ({"pool": ["tests.own_selectors:Fixed"]}, "selection.pool.0.name: it has nothing to propose; define propose"),
    ],
)
def test_keys_and_values_that_cannot_be(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error.replace("?", r"\?")):
        load(config(fields))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"selection__size": "range", "selection__k_min": 5, "selection__k_max": 4},
            "selection.k_min: 5 is more than k",
        ),
        ({"selection__size": "range", "selection__k_min": 4}, "selection.k_min, k_max: 4 to 3 of 8 clients that hold"),
        ({"selection__size": "range", "selection__k_max": 9}, "selection.k_min, k_max: 1 to 9 of 8 clients that hold"),
        ({"selection__k_max": 4}, "selection.size: exact, but k_min and k_max are bounds of range; use size: range"),
        ({"selection__pool": ["favor", {"name": "favor"}]}, "selection.pool: two of its selectors look at clients' mo"),
        (
            {"selection__pool": ["random", {"name": "oort", "blacklist": 3}]},
            "selection.pool.1.blacklist: 3 is of the va",
        ),
        ({"selection__pool": [{"name": "oort", "util_epochs": "all"}]}, "selection.pool.0: its utilities are of all"),
        ({"selection__pool": [{"name": "power_of_choice", "d": 2}]}, "selection.pool.0.d: 2 candidates, but 3 clients"),
        ({"selection__pool": "paper", "local__epochs": 1}, "^local.epochs: 1, but fedmarl stops clients"),
        ({"selection__score": "measured", "eval": {"every": 2}}, "eval.every: 2, but this selector goes by every rou"),
        ({"selection__pool": "paper", "topology": "reduce"}, "topology: reduce, but this selector looks at every cl"),
        ({"clients": {"num_clients": 3, "per_round": 4}}, "clients.per_round: 4 of 3 clients cannot be selected"),
        (
            {"selection__pool": [{"name": "tests.own_selectors:Proposes", "sets": [[0, 70]]}]},
            "pool.0: Proposes propose",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        fldist.run(config(None, **changes), output=tmp_path / "run")


def test_a_pool_that_proposes_nothing_draws_and_says_so(tmp_path: Path) -> None:
    seen = Recorder()
    settings = config({"pool": [{"name": "tests.own_selectors:Proposes"}]}, rounds=3)
    result = run_here(load(settings), output=tmp_path / "run", observer=seen)
    assert result["status"] == "finished"
    assert [text.partition(":")[0] for text in seen.warnings if "drawn at random" in text] == ["round 2", "round 3"]


# ---- the configurations
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_predict_what_they_send(path: Path) -> None:
    needs_data("MNIST/raw")
    settings = load(path)
    job = build(settings)
    prediction = predict(job)
    size, count = 4 * job.task.layout.num_floats, settings.clients.count()
    assert not prediction.unknown
    assert prediction.training == {"up": count * (size + 48), "down": count * size}
    num = settings.clients.num_clients
    official = path.stem == "official"
    assert prediction.before == ({"setup": {"up": num * (size + 40), "down": num * size}} if official else {})
    assert "fedgcs" in dry_run(settings, 3)
    assert settings.rounds == (50 if official else 30)


def test_the_official_configuration_has_the_published_settings() -> None:
    needs_data("MNIST/raw")
    settings = load(CONFIGS / "official.yaml")
    job = build(settings)
    assert (job.task.num_clients, settings.clients.count(), settings.rounds) == (100, 10, 50)
    assert set(job.task.sizes) == {600}
    assert 4 * job.task.layout.num_floats == 246_824
    local = settings.local
    assert (local.epochs, local.batch_size, local.optimizer, local.lr) == (5, 32, "sgd", 0.01)
    assert (local.momentum, local.weight_decay) == (0.9, 0.0)
    assert job.selector == FedGCS(
        pool=(Oort(variant="repo", util_epochs="all"), FedMarl(), Favor()),
        proposals=100,
        score="client_sum",
        size="published",
        utility=Utility("repo", alpha=2, beta=0, duration=50, untried="zero", epochs="all"),
        repeated="first",
        refresh_every=1,
        warm_start=False,
        reseed=True,
        fitting=Fitting(64, 200, 2, 1e-3, 1024, 5, 0.8, 200, 20, 25, False, False, "clients"),
        searching=Searching(100, "single", 101, 1, "sigmoid", "official", 5, 100, False),
    )


def test_the_official_configuration_runs_where_it_is_made_small(tmp_path: Path) -> None:
    """As its first lines say, and smaller."""
    needs_data("MNIST/raw")
    settings = load(
        CONFIGS / "official.yaml",
        [
            "clients.num_clients=12", "clients.per_round=4", "task.partition.size=30", "rounds=3",
            "selection.proposals=5", "selection.fitting.epochs=2", "task.subset.test=100",
        ],
    )  # fmt: skip
    seen = Recorder()
    result = run_here(settings, output=tmp_path / "run", observer=seen)
    assert result["status"] == "finished"
    assert not any("selection" in text for text in seen.warnings)
    state = kept(tmp_path / "run")
    assert state.networks == {} and state.fitted == 3
    assert state.count == seen.lines[-1]["selected"]
    assert float(state.pool[0].duration) >= 50
    assert float(state.known.utility.nansum()) > 0
    assert int(state.known.joules.isfinite().sum()) == 0
