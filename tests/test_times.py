"""When things happened: the offset of a host's clock, and the line of a round in timeline.jsonl."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fldist import run
from fldist.config import load
from fldist.runner import run_here
from fldist.runtime.caller import RoundFacts
from fldist.runtime.clocks import DRIFT, Clock
from fldist.runtime.timeline import line, merged, outside
from tests.conftest import small


# ---- clocks
def test_the_offset_is_the_middle_of_what_both_ways_allow():
    clock = Clock(upper=1000)  # server - host <= 1000
    assert (clock.offset_ns, clock.uncertainty_ns) == (1000, None)
    clock.posted(500, 100, 2000)  # left here at 500, there at its 100: server - host >= 400
    assert (clock.offset_ns, clock.uncertainty_ns) == (700, 300)
    clock.received(2000, 2600)  # left there at 2000, here at 2600: <= 600
    assert (clock.offset_ns, clock.uncertainty_ns) == pytest.approx((500, 100), abs=1)  # clocks may drift
    clock.received(3000, 4600)  # a slow message says nothing new
    assert clock.offset_ns == pytest.approx(500, abs=1)


@given(
    st.integers(-(10**15), 10**15),
    st.lists(st.tuples(st.booleans(), st.integers(0, 10**7), st.integers(0, 10**9)), min_size=1),
)
def test_the_true_offset_lies_within_the_uncertainty(true, messages):
    """Clocks that run equally fast, messages of any delay in both directions."""
    now = 10**12
    clock = Clock(upper=float(true + 10**9), at=now)
    for up, delay, pause in messages:
        now += pause + delay
        if up:  # left when the server's clock said now - delay
            clock.received(now - delay - true, now)
        else:
            clock.posted(now - delay, now - true, now)
        assert clock.lower - 2 <= true <= clock.upper + 2
        if clock.uncertainty_ns is not None:
            assert abs(clock.offset_ns - true) <= clock.uncertainty_ns + 2


def test_a_message_never_arrives_before_it_was_sent():
    clock = Clock(upper=100.0, at=0)
    clock.posted(1000, 0, 1500)  # contradicts what is known: >= 1000, but <= 100
    assert clock.offset_ns <= 100
    clock.received(5000, 5050)
    assert clock.offset_ns <= 50


def test_old_bounds_loosen_as_clocks_drift():
    clock = Clock(upper=0.0, lower=0.0, at=1)
    clock.received(0, 10**10 + 1)  # ten seconds later, of a message that was ten seconds on its way
    assert (clock.upper, clock.lower) == pytest.approx((DRIFT * 10**10, -DRIFT * 10**10))


# ---- lines
def test_what_is_outside_of_calls_is_the_servers_half():
    assert outside((0.0, 10.0), [(1.0, 2.0), (5.0, 6.0)]) == [(0.0, 1.0), (2.0, 5.0), (6.0, 10.0)]
    assert outside((0.0, 1.0), []) == [(0.0, 1.0)]
    assert outside((0.0, 1.0), [(0.0, 1.0)]) == []


def test_spans_that_touch_are_told_as_one():
    assert merged([(0.0, 1.0), (1.00004, 2.0), (2.1, 3.0)]) == [(0.0, 2.0), (2.1, 3.0)]


def test_a_line_has_spans_in_order_relative_to_its_begin():
    facts = RoundFacts(encoded=[(10.5, 10.6), (10.8, 10.9)], calls=[(10.5, 11.0)], began_s=10.25, ended_s=11.5)
    scoring = RoundFacts(encoded=[(11.6, 11.7)])
    got = line(3, 1, 10.0, 12.0, facts, (11.5, 11.9), scoring, {2: Clock(7.0, 3.0)})
    assert [(kind, round(begin / 1e9, 6), round(end / 1e9, 6)) for kind, begin, end in got["spans"]] == [
        ("server", 0.25, 0.5),
        ("encode", 0.5, 0.6),
        ("encode", 0.8, 0.9),
        ("server", 1.0, 1.5),
        ("evaluate", 1.5, 1.9),
        ("encode", 1.6, 1.7),
    ]
    assert (got["round"], got["attempt"], got["began_ns"], got["ended_ns"]) == (3, 1, 10**10, 12 * 10**9)
    assert got["clocks"] == {"2": {"offset_ns": 5, "uncertainty_ns": 2}}


# ---- runs
def rows(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize("nproc", [1, 3])
def test_the_times_of_a_run_are_in_the_order_in_which_things_happen(tmp_path, hosts, nproc):
    result = run_here(load(small(rounds=2)), nproc=nproc, output=tmp_path / "run", spawn=hosts)
    rounds = {line["round"]: line for line in rows(tmp_path / "run" / "timeline.jsonl")}
    assert list(rounds) == [0, 1, 2]
    messages = [r for r in rows(tmp_path / "run" / "messages.jsonl") if r["row"] == "message"]
    assert messages
    slack = max([10**6] + [c["uncertainty_ns"] or 0 for line in rounds.values() for c in line["clocks"].values()])
    for row in messages:
        of = rounds[row["round"]]
        assert of["began_ns"] <= row["done_ns"] <= of["ended_ns"] + slack
        assert row["ready_ns"] - slack <= row["sent_ns"] <= row["done_ns"]
        if row["direction"] == "up":
            assert of["began_ns"] - slack <= row["started_ns"] <= row["ready_ns"]
        else:
            assert row["started_ns"] is None
    downs = {(r["round"], r["client"]): r for r in messages if r["direction"] == "down"}
    for row in messages:
        if row["direction"] == "up":  # nobody begins before the call was sent
            assert row["started_ns"] >= downs[row["round"], row["client"]]["ready_ns"] - slack
    for of in rounds.values():
        assert all(0 <= begin <= end <= of["ended_ns"] - of["began_ns"] for _, begin, end in of["spans"])
    if nproc > 1:
        assert set(rounds[2]["clocks"]) == {"1", "2"}
        # all processes of a machine have the same monotonic clock
        for clock in rounds[2]["clocks"].values():
            assert abs(clock["offset_ns"]) <= clock["uncertainty_ns"] + 10**5
    compute = sum(r["ready_ns"] - r["started_ns"] for r in messages if r["direction"] == "up") / 1e9
    # `compute` is that of the busiest host of every round
    assert result["seconds"]["compute"] <= compute + 1e-3


def test_a_run_that_goes_on_has_one_line_a_round(tmp_path):
    run(small(rounds=3), output=tmp_path / "run")
    from fldist.config import load_resumed

    run_here(load_resumed(tmp_path / "run", ["rounds=5"]), output=tmp_path / "run", resume=True)
    assert [line["round"] for line in rows(tmp_path / "run" / "timeline.jsonl")] == [0, 1, 2, 3, 4, 5]
