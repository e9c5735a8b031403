"""Work that hosts of one machine take over from each other: who is given which clients, and what travels then."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fldist
from fldist.config import load
from fldist.runner import run_here
from fldist.runtime.caller import ClientCodeFailed
from fldist.runtime.sharing import PORTION_S, Shares
from tests.conftest import small

ALIKE = [10] * 100
ONE_MACHINE = {1: "a", 2: "a"}


def placed(*ranks):
    return dict(enumerate(ranks))


def played(shares, seconds):
    """Let every host do its clients, each `seconds[rank]` long; returns who did what, and when each was done."""
    queues = {rank: list(clients) for rank, clients in shares.first().items()}
    clock = dict.fromkeys(seconds, 0.0)
    did = {rank: [] for rank in seconds}
    while any(queues.values()):
        rank = min((r for r in queues if queues[r]), key=lambda r: clock[r] + seconds[r])
        clock[rank] += seconds[rank]
        did[rank].append(queues[rank].pop(0))
        queues[rank] += shares.next(rank, len(queues[rank]))
    assert shares.waiting == []
    return did, clock


def test_portions_by_hand():
    shares = Shares(placed(*[1, 2] * 5), range(10), ONE_MACHINE, ALIKE, None)
    # ten are left: each of two hosts is given 10 // 8, and one more, so that it need not wait
    assert shares.first() == {1: [0, 1], 2: [2, 3]}
    assert shares.waiting == [4, 5, 6, 7, 8, 9]
    assert shares.next(1, 2) == []  # it has enough
    assert shares.next(1, 1) == [4]
    assert shares.next(1, 1) == [5]
    assert shares.next(2, 0) == [6]
    assert shares.waiting == [7, 8, 9]


def test_the_largest_are_given_first():
    shares = Shares(placed(1, 1, 2, 2), range(4), ONE_MACHINE, [5, 40, 30, 20], None)
    assert shares.first() == {1: [1, 2], 2: [0, 3]}
    shares = Shares(placed(1, 1, 2, 2, 1, 1), range(6), ONE_MACHINE, [5, 40, 30, 20, 3, 1], None)
    assert shares.first() == {1: [1, 2], 2: [0, 3]}
    assert shares.next(2, 1) == [4]
    assert shares.next(1, 0) == [5]


def test_quick_clients_are_not_dealt_out_one_by_one():
    ids = placed(*[1, 2] * 50)
    slow = Shares(ids, range(100), ONE_MACHINE, ALIKE, PORTION_S)
    assert [len(c) for c in slow.first().values()] == [12, 12]
    assert len(slow.next(1, 1)) == 76 // 8
    quick = Shares(ids, range(100), ONE_MACHINE, ALIKE, PORTION_S / 1000)
    assert [len(c) for c in quick.first().values()] == [50, 50]
    assert quick.waiting == []


def test_hosts_of_other_machines_and_clients_that_have_a_place_take_no_part():
    shares = Shares(placed(1, 2, 3, 3, 1, 2), [0, 1, 2, 3], {1: "a", 2: "a", 3: "b"}, ALIKE, None)
    assert shares.first() == {1: [0, 4], 2: [1, 5], 3: [2, 3]}
    assert shares.waiting == []


def test_a_lost_host_leaves_the_rest_to_the_others_of_its_machine():
    shares = Shares(placed(*[1, 2] * 4), range(8), ONE_MACHINE, ALIKE, None)
    shares.first()
    assert shares.lose(1) == []
    assert shares.next(1, 0) == []
    waiting = shares.waiting
    assert len(waiting) == 4
    assert shares.lose(2) == waiting
    assert shares.waiting == []
    assert shares.lose(2) == []


@settings(max_examples=60, deadline=None, database=None)
@given(
    count=st.integers(1, 60),
    speeds=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 100), min_size=60, max_size=60),
)
def test_every_client_is_done_once_and_hosts_end_together(count, speeds, sizes):
    seconds = dict(enumerate(speeds, start=1))
    ids = {c: 1 + c % len(speeds) for c in range(count)}
    did, clock = played(Shares(ids, range(count), dict.fromkeys(seconds, "a"), sizes, None), seconds)
    assert sorted(c for clients in did.values() for c in clients) == list(range(count))
    # nobody waits longer than the slowest needs for what it has before it: one under way, one ahead
    if count >= 4 * len(speeds):
        assert max(clock.values()) - min(clock.values()) <= 2.01 * max(speeds)


@pytest.mark.parametrize("rank", [1, 2])
def test_nothing_is_given_where_nothing_is_left(rank):
    shares = Shares({}, (), ONE_MACHINE, ALIKE, None)
    assert shares.first() == {}
    assert shares.next(rank, 0) == []


# ---- in a run
def config(**changes):
    algorithm = {"name": "tests.own:Slow", "seconds": 0.03, "slow_client": 0, "slow_seconds": 0.6}
    return small(
        algorithm=algorithm,
        rounds=1,
        clients={"num_clients": 12},
        task__model={"name": "mlp", "hidden": [64]},
        eval__every=0,
        **changes,
    )


def rows(directory, row):
    lines = (directory / "messages.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["row"] == row]


def test_a_free_host_does_the_clients_of_a_slow_one_and_the_model_travels_once_to_each(tmp_path, hosts):
    result = run_here(load(config()), nproc=3, output=tmp_path / "run", spawn=hosts)
    here = fldist.run(config(), output=tmp_path / "here")
    assert result["state_hash"] == here["state_hash"]
    assert result["bytes"]["logical"] == here["bytes"]["logical"]
    assert result["bytes"]["by_kind"] == here["bytes"]["by_kind"]
    messages = rows(tmp_path / "run", "message")
    down = [r for r in messages if r["direction"] == "down"]
    slow = next(r["rank"] for r in down if r["client"] == 0)
    assert sum(r["rank"] == slow for r in down) <= 5 < sum(r["rank"] != slow for r in down)
    # wire: framing, and the model once a host; who was sent no copy names who was
    model = sum(r["logical_bytes"] for r in rows(tmp_path / "run", "kind") if r["direction"] == "down") // 12
    assert sum(r["wire_bytes"] - r["framing_bytes"] for r in down) == 2 * model
    carriers = {r["rank"]: r["client"] for r in down if r["wire_bytes"] >= model}
    assert len(carriers) == 2
    assert all(r["shared_with"] in (None, carriers[r["rank"]]) for r in down)
    assert sum(r["shared_with"] is None for r in down) == 2
    assert sum(r["framing_bytes"] > 0 for r in down) > 4  # frames


def test_without_sharing_every_client_is_sent_a_copy(tmp_path, hosts):
    run_here(load(config(network={"share": False})), nproc=3, output=tmp_path / "run", spawn=hosts)
    down = [r for r in rows(tmp_path / "run", "message") if r["direction"] == "down"]
    model = sum(r["logical_bytes"] for r in rows(tmp_path / "run", "kind") if r["direction"] == "down") // 12
    assert all(r["wire_bytes"] >= model for r in down)


def test_what_a_client_changed_in_place_no_later_frame_of_the_call_gets(tmp_path, hosts):
    settings = config(faults={"min_replies": 1})
    settings["algorithm"] = "tests.own:Mutates"
    settings["clients"] = {"num_clients": 12}
    with pytest.raises(ClientCodeFailed, match="was changed in place"):
        run_here(load(settings), nproc=3, output=tmp_path / "run", spawn=hosts)
