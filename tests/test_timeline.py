"""What every rank did when: spans from rows, waiting, joining, clocks of several processes, and the Chrome trace."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fldist.analysis.runs import read
from fldist.analysis.timeline import (
    SERVER,
    Clock,
    Lane,
    Round,
    Span,
    TraceFile,
    chrome_trace,
    coarsen,
    covered_ns,
    events,
    of_run,
    timeline,
    waits,
)
from fldist.config import load
from fldist.runner import run_here
from tests.conftest import small
from tests.made_runs import Made

ONE, TWO = Lane(1, True), Lane(2, True)


def message(number, client, rank, way, started, ready, sent, done, **changes):
    row = {"row": "message", "round": number, "attempt": 0, "call": 1, "phase": "train", "client": client}
    row |= {"rank": rank, "direction": way, "framing_bytes": 10, "wire_bytes": 50, "shared_with": None}
    row |= {"started_ns": started, "ready_ns": ready, "sent_ns": sent, "done_ns": done, "status": "delivered"}
    return row | changes


def line(number, began, ended, spans=(), unix=None, clocks=None):
    unix = began + 10**18 if unix is None else unix
    of = {"round": number, "attempt": 0, "began_ns": began, "ended_ns": ended, "unix_ns": unix}
    return of | {"spans": [list(s) for s in spans], "clocks": clocks or {}}


def without_waits(round_):
    return [s for s in round_.spans if s.kind != "wait"]


# ---- from rows to spans
def test_rows_and_lines_become_spans_of_lanes_in_one_time():
    rows = [
        {"row": "kind", "round": 1},
        message(1, 4, 1, "down", None, 1100, 1110, 1150),
        message(1, 5, 1, "down", None, 1100, 1110, 1150, wire_bytes=7),  # in the same frame
        message(1, 4, 1, "up", 1200, 1300, 1310, 1400),
        message(1, 5, 1, "up", 1300, 1500, 1510, 1600),
        message(1, 9, 2, "up", 1250, 1350, 1350, 1450, phase="evaluate"),
    ]
    clocks = {"1": {"offset_ns": -7, "uncertainty_ns": 3}, "2": {"offset_ns": 1, "uncertainty_ns": None}}
    server = [line(1, 1000, 2000, [("server", 0, 50), ("encode", 50, 100), ("evaluate", 700, 900)], clocks=clocks)]
    (got,) = timeline(rows, server)
    assert (got.number, got.begin_ns, got.end_ns, got.measured) == (1, 0, 1000, True)
    assert without_waits(got) == [
        Span(SERVER, "server", 0, 50),
        Span(SERVER, "encode", 50, 100),
        Span(SERVER, "evaluate", 700, 900),
        Span(ONE, "down", 110, 150, (4, 5), "train", 57),
        Span(ONE, "encode", 150, 200),
        Span(ONE, "compute", 200, 300, (4,), "train"),
        Span(ONE, "compute", 300, 500, (5,), "train"),
        Span(ONE, "up", 310, 400, (4,), "train", 50),
        Span(ONE, "encode", 500, 510),
        Span(ONE, "up", 510, 600, (5,), "train", 50),
        Span(TWO, "evaluate", 250, 350, (9,), "evaluate"),
        Span(TWO, "up", 350, 450, (9,), "evaluate", 50),
    ]
    waiting = {lane: [(s.begin_ns, s.end_ns) for s in got.spans if s.kind == "wait" and s.lane == lane]
               for lane in (SERVER, ONE, TWO)}  # fmt: skip
    assert waiting == {
        SERVER: [(100, 700), (900, 1000)],
        ONE: [(0, 150), (510, 1000)],
        TWO: [(0, 250), (350, 1000)],
    }
    assert got.clocks == {1: Clock(-7, 3), 2: Clock(1, None)}


def test_what_never_left_is_no_transfer_and_what_never_began_no_computing():
    rows = [
        message(1, 0, 1, "down", None, 1100, 0, 0, status="lost"),
        message(1, 1, 1, "up", None, 0, 0, 0, status="lost"),
        message(1, 2, 1, "up", 0, 0, 0, 0, status="lost"),
    ]
    (got,) = timeline(rows, [line(1, 1000, 2000)])
    assert without_waits(got) == []


def test_a_host_of_the_servers_own_process_has_a_lane_of_its_own():
    (got,) = timeline([message(1, 0, 0, "up", 10, 20, 21, 22)], [line(1, 5, 30, [("server", 0, 5)])])
    assert {s.lane for s in without_waits(got)} == {SERVER, Lane(0, True)}


def test_rounds_without_messages_and_messages_without_a_line():
    rows = [message(2, 0, 1, "up", 1500, 1600, 1610, 1700), message(4, 0, 1, "up", 4500, 4600, 4610, 4700)]
    server = [line(0, 1000, 1100), line(2, 1400, 2000), line(3, 2000, 3000, [("server", 0, 1000)]), line(5, 5000, 6000)]
    got = list(timeline(rows, server))
    assert [(of.number, of.begin_ns, of.end_ns, of.measured) for of in got] == [
        (0, 0, 100, True),
        (2, 400, 1000, True),
        (3, 1000, 2000, True),
        (4, 3500, 3700, False),
        (5, 4000, 5000, True),
    ]
    assert [s for s in got[3].spans if s.kind == "wait"] == []  # nobody knows when it began
    # a host that is known by now waits in rounds in which it does nothing
    assert [s for s in got[2].spans if s.lane == ONE] == [Span(ONE, "wait", 1000, 2000)]


def test_without_any_line_times_count_from_the_first_message():
    got = list(timeline([message(1, 0, 1, "up", 5000, 5100, 5110, 5200)], []))
    assert [(s.kind, s.begin_ns, s.end_ns) for s in got[0].spans] == [
        ("compute", 0, 100), ("encode", 100, 110), ("up", 110, 200),
    ]  # fmt: skip


def test_messages_that_are_settled_later_come_as_the_same_round_again():
    rows = [
        message(1, 0, 1, "up", 1000, 1100, 1100, 1200),
        message(2, 0, 1, "up", 2000, 2100, 2100, 2200),
        message(1, 1, 2, "up", 1000, 2050, 2060, 2070, status="late"),
    ]
    got = list(timeline(rows, [line(1, 1000, 1500), line(2, 2000, 2500)]))
    assert [of.number for of in got] == [1, 2, 1]
    assert (got[2].begin_ns, got[2].end_ns) == (0, 500)
    assert [(s.kind, s.begin_ns, s.end_ns) for s in got[2].spans] == [
        ("compute", 0, 1050), ("encode", 1050, 1060), ("up", 1060, 1070),
    ]  # fmt: skip


def packed(*rows):
    (got,) = timeline(rows, [line(1, 0, 1000)])
    return [(s.begin_ns, s.end_ns) for s in got.spans if s.kind == "encode" and s.lane == ONE]


def test_a_host_packs_between_the_times_of_its_messages():
    calls = [message(1, client, 1, "down", None, 5, 10, 20) for client in (4, 5)]
    # the reply of 4 is packed before 5 begins, and waits for that of 5, with which it leaves
    assert packed(*calls, message(1, 4, 1, "up", 30, 50, 90, 99), message(1, 5, 1, "up", 52, 80, 90, 99)) == [
        (20, 30), (50, 52), (80, 90),
    ]  # fmt: skip
    # the reply of 4 leaves at once
    assert packed(*calls, message(1, 4, 1, "up", 30, 50, 55, 60), message(1, 5, 1, "up", 57, 80, 90, 99)) == [
        (20, 30), (50, 55), (55, 57), (80, 90),
    ]  # fmt: skip


def test_a_host_that_waits_for_its_next_portion_packs_nothing():
    first, second = message(1, 4, 1, "down", None, 5, 10, 20), message(1, 5, 1, "down", None, 200, 210, 220)
    replies = [message(1, 4, 1, "up", 30, 50, 55, 60), message(1, 5, 1, "up", 225, 250, 255, 260)]
    assert packed(first, replies[0], second, replies[1]) == [(20, 30), (50, 55), (220, 225), (250, 255)]


def test_calls_of_a_round_are_apart():
    """A second call does not make what lies between it and the first one packing."""
    one = message(1, 4, 1, "up", 30, 50, 55, 60)
    two = message(1, 4, 1, "up", 300, 350, 355, 360, call=2)
    assert packed(one, two) == [(50, 55), (350, 355)]


# ---- clocks of several server processes
SECOND = 10**9


def test_a_run_that_goes_on_elsewhere_is_placed_by_the_wall_clock():
    server = [
        line(1, 100 * SECOND, 101 * SECOND, unix=5000 * SECOND),
        line(2, 7 * SECOND, 8 * SECOND, unix=5060 * SECOND),  # another machine, which began to count anew
    ]
    rows = [message(2, 0, 1, "up", 7 * SECOND + 10, 7 * SECOND + 20, 7 * SECOND + 30, 7 * SECOND + 40)]
    got = list(timeline(rows, server))
    assert [of.begin_ns for of in got] == [0, 60 * SECOND]
    assert without_waits(got[1])[0].begin_ns == 60 * SECOND + 10


def test_a_correction_of_the_wall_clock_moves_nothing():
    """Half a second backwards in round 2, for good: rounds stay where the monotonic clock has them."""
    server = [
        line(1, 100 * SECOND, 101 * SECOND, unix=5000 * SECOND),
        line(2, 102 * SECOND, 103 * SECOND, unix=5002 * SECOND - SECOND // 2),
        line(3, 104 * SECOND, 105 * SECOND, unix=5004 * SECOND - SECOND // 2),
    ]
    assert [of.begin_ns for of in timeline([], server)] == [0, 2 * SECOND, 4 * SECOND]


# ---- damage
def test_rows_that_lack_something_are_left_out_and_counted():
    good = message(1, 0, 1, "up", 1000, 1100, 1100, 1200)
    lacking = [{k: v for k, v in good.items() if k != name} for name in ("round", "rank", "started_ns", "done_ns")]
    odd = [good | {"rank": "1"}, good | {"direction": "sideways"}, good | {"sent_ns": None}]
    broken = [line(1, 1000, 2000, [("sleep", 0, 1)]), line(1, 1000, 2000) | {"clocks": {"x": {}}}, {"round": 1}]
    notes = []
    (got,) = timeline([*lacking, *odd, good], [*broken, line(1, 1000, 2000)], notes)
    assert [s.kind for s in without_waits(got)] == ["compute", "up"]
    assert notes == [
        "messages.jsonl: 7 lines lack a time or a number and are not in the timeline",
        "timeline.jsonl: 3 lines lack a time or a number and are not in the timeline",
    ]


def test_a_damaged_line_of_a_file_is_told(tmp_path):
    path = Made(rounds=2).write(tmp_path / "run")
    with (path / "timeline.jsonl").open("a") as file:
        file.write('{"round": 3, "atte')
    notes = []
    assert [of.number for of in of_run(read(path), notes)] == [1, 2]
    assert notes == [
        "timeline.jsonl: 1 line is damaged and skipped (line 3; the last one ends in the middle)",
    ]


# ---- waiting, covering, joining
spans_of_a_lane = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 300), st.sampled_from(["compute", "evaluate", "down"]))
)


@given(spans_of_a_lane, spans_of_a_lane)
def test_work_and_waiting_fill_the_round_and_do_not_overlap(first, second):
    spans = [Span(lane, kind, begin, begin + length)
             for lane, given_ in ((ONE, first), (TWO, second)) for begin, length, kind in given_]  # fmt: skip
    of = Round(1, 100, 900, spans)
    waiting = waits(of, [ONE, TWO])
    for lane in (ONE, TWO):
        work = [s for s in spans if s.lane == lane and s.kind != "down"]
        free = [s for s in waiting if s.lane == lane]
        at_work = {t for s in work for t in range(max(100, s.begin_ns), min(900, s.end_ns))}
        at_rest = [t for s in free for t in range(s.begin_ns, s.end_ns)]
        assert len(at_rest) == len(set(at_rest))
        assert at_work.isdisjoint(at_rest)
        assert at_work | set(at_rest) == set(range(100, 900))


@given(spans_of_a_lane)
def test_covered_is_the_time_in_which_anything_goes_on(given_):
    spans = [Span(ONE, "up", begin, begin + length) for begin, length, _ in given_]
    assert covered_ns(spans) == len({t for s in spans for t in range(s.begin_ns, s.end_ns)})


@given(spans_of_a_lane, st.integers(3, 40))
def test_joined_spans_are_few_and_still_cover_all(given_, most):
    scale = 10**6
    spans = [Span(ONE, kind, scale * b, scale * (b + n), (b % 5,), "train", 3) for b, n, kind in given_]
    joined = coarsen(spans, most)
    assert len(joined) <= max(most, 3)
    if len(spans) <= most:
        assert joined == spans
    for kind in ("compute", "evaluate", "down"):
        before, after = ([s for s in of if s.kind == kind] for of in (spans, joined))
        assert sum(s.wire_bytes for s in before) == sum(s.wire_bytes for s in after)
        if len(spans) > most:
            assert sum(s.end_ns - s.begin_ns - s.idle_ns for s in after) == covered_ns(before)
        assert {c for s in before for c in s.clients} == {c for s in after for c in s.clients}
        for span in before:
            assert any(s.begin_ns <= span.begin_ns and span.end_ns <= s.end_ns for s in after)


# ---- the trace
def slices(trace):
    """Complete events by thread, in order of begin."""
    found = defaultdict(list)
    for event in trace:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return {thread: sorted(of, key=lambda e: (e["ts"], -e["dur"])) for thread, of in found.items()}


def check_nesting(trace):
    """Slices of a thread lie one in another, or apart: others are drawn wrongly, or dropped."""
    for thread, of in slices(trace).items():
        open_ends = []
        for event in of:
            end = event["ts"] + event["dur"]
            while open_ends and open_ends[-1] <= event["ts"] + 1e-6:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-6, f"{thread}: {event}"
            open_ends.append(end)


def test_a_trace_has_complete_events_in_microseconds_and_names():
    rows = [
        message(1, 4, 1, "down", None, 1100, 1100_000, 1150_000),
        message(1, 4, 1, "up", 1200_000, 1300_000, 1310_000, 1400_000),
        message(1, 5, 1, "up", 1300_000, 1350_000, 1360_000, 1450_000),  # on the wire while 4's still is
    ]
    server = [line(1, 1_000_000, 2_000_000, [("server", 0, 50_000), ("evaluate", 900_000, 990_000),
                                             ("encode", 910_000, 920_000)])]  # fmt: skip
    trace = list(events(timeline(rows, server), {1: "vm"}))
    check_nesting(trace)
    by_name = {e["name"]: e for e in trace if e["ph"] == "X"}
    assert (by_name["round 1"]["ts"], by_name["round 1"]["dur"], by_name["round 1"]["pid"]) == (0, 1000, 0)
    assert (by_name["client 4"]["ts"], by_name["client 4"]["dur"]) == (200, 100)
    assert by_name["client 4"]["args"] == {"round": 1, "clients": [4], "phase": "train"}
    assert (by_name["down: client 4"]["cat"], by_name["down: client 4"]["args"]["wire_bytes"]) == ("wire", 50)
    assert by_name["up: client 4"]["tid"] != by_name["up: client 5"]["tid"]
    assert not any(e["name"] == "wait" for e in trace)
    names = {(e["pid"], e["name"], e["args"]["name"]) for e in trace if e["ph"] == "M" and "name" in e["args"]}
    assert {(0, "process_name", "server (rank 0)"), (1, "process_name", "host (rank 1, vm)")} <= names
    assert {n for p, kind, n in names if (p, kind) == (1, "thread_name")} == {"works", "receives", "sends", "sends 2"}
    threads = {(e["pid"], e["tid"]) for e in trace if e["name"] == "thread_name"}
    assert set(slices(trace)) == threads


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_trace_of_a_run_adds_up_to_its_rows(tmp_path, ranks):
    run = read(Made(rounds=4, clients=7, ranks=ranks, lost=0.2).write(tmp_path / "run"))
    trace = list(chrome_trace(run))
    check_nesting(trace)
    rows = [json.loads(text) for text in (run.path / "messages.jsonl").read_text().splitlines()]
    ups = [r for r in rows if r["row"] == "message" and r["direction"] == "up"]
    computed = [e for e in trace if e.get("cat") == "compute"]
    assert len(computed) == len(ups) == 28
    assert sum(e["dur"] for e in computed) == pytest.approx(sum(r["ready_ns"] - r["started_ns"] for r in ups) / 1000)
    assert {e["pid"] for e in trace} == set(range(ranks))
    processes = {e["args"]["name"] for e in trace if e["name"] == "process_name"}
    assert "server (rank 0)" in processes
    if ranks == 1:
        threads = {e["args"]["name"] for e in trace if e["name"] == "thread_name"}
        assert threads == {"rounds", "works", "host works", "host receives", "host sends"}


def test_a_trace_file_is_gzipped_json_also_when_it_is_empty(tmp_path):
    for number, found in enumerate(([], [{"name": "a<b", "ph": "X"}, {"name": "ü", "ph": "X"}])):
        path = tmp_path / f"{number}.json.gz"
        file = TraceFile(path, {"run": "r"})
        file.write(found)
        file.close()
        with gzip.open(path) as opened:
            got = json.load(opened)
        assert got == {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"run": "r"}}


# ---- real runs
@pytest.mark.parametrize("nproc", [1, 3])
def test_the_timeline_of_a_real_run_agrees_with_the_seconds_that_it_measured(tmp_path, hosts, nproc):
    settings = load(small(rounds=3, local={"epochs": 3, "batch_size": 16, "lr": 0.05}))
    run_here(settings, nproc=nproc, output=tmp_path / "run", spawn=hosts)
    run, notes = read(tmp_path / "run"), []
    rounds = list(of_run(run, notes))
    assert notes == []
    assert [of.number for of in rounds] == [0, 1, 2, 3]
    assert all(before.end_ns <= after.begin_ns for before, after in pairwise(rounds))
    for of, measured in zip(rounds[1:], run.rounds, strict=True):

        def seconds(kind, lane, of=of):
            return covered_ns(s for s in of.spans if (s.kind, s.lane) == (kind, lane)) / 1e9

        lanes = [Lane(0, True)] if nproc == 1 else [ONE, TWO]
        busiest = max(seconds("compute", lane) for lane in lanes)
        assert busiest == pytest.approx(measured["seconds"]["compute"], abs=2e-3)
        assert seconds("evaluate", SERVER) == pytest.approx(measured["seconds"]["evaluate"], abs=2e-3)
        clients = sorted(c for s in of.spans if s.kind == "compute" for c in s.clients)
        assert clients == list(range(6))
    check_nesting(chrome_trace(run))
