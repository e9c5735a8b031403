"""Topologies `collective` and `reduce`: the same bits as `star`, what each saves on the wire, and what each refuses."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import fldist
from fldist.config import ConfigError, build, load
from fldist.fold import FixedPoint, FoldContext
from fldist.inspection import dry_run
from fldist.params import Layout, Params, Slot
from fldist.runner import run_here
from fldist.runtime.caller import ClientCodeFailed
from fldist.runtime.membership import RunStopped
from fldist.wire.link import Limits
from fldist.wire.world import ALIGNMENT, GlooWorld, Members, kept, pack, packed, room, unpacked
from tests.conftest import Hosts, Recorder, small
from tests.test_launch import ALGORITHMS, ROOT, config, ledger, mpirun, outcome

TOPOLOGIES = ("collective", "reduce")
NEED_EVERY_REPLY = ("fedktl", "fedf2dg")
"""What reduce refuses; see below."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    base = tmp_path_factory.mktemp("alone")
    return {name: fldist.run(config(name), output=base / name) for name in ALGORITHMS}


# ---- the same as star
@pytest.mark.parametrize(
    ("topology", "algorithm"),
    [(t, name) for t in TOPOLOGIES for name in ALGORITHMS if t != "reduce" or name not in NEED_EVERY_REPLY],
)
def test_gloo_gives_the_same_bits_and_ledger(
    alone: dict[str, dict[str, Any]], tmp_path: Path, hosts: Hosts, algorithm: str, topology: str
) -> None:
    changed = load(config(algorithm, topology=topology))
    result = run_here(changed, nproc=4, output=tmp_path / "run", spawn=hosts)
    assert outcome(result) == outcome(alone[algorithm])
    assert ledger(tmp_path / "run") == ledger(alone[algorithm]["directory"])


def test_a_server_that_needs_every_reply_cannot_have_them_added_up(tmp_path: Path, hosts: Hosts) -> None:
    changed = load(config("fedktl", topology="reduce"))
    with pytest.raises(ValueError, match=r"train.prototypes: topology: reduce needs Mean or Sum"):
        run_here(changed, nproc=4, output=tmp_path / "run", spawn=hosts)


def own_on_four(name: str) -> dict[str, Any]:
    """Folds of tensors; what is given once, to one host and then to all."""
    model = {"name": "cnn_bn", "widths": [32, 32]}
    return small(algorithm=f"tests.own:{name}", eval__every=0, rounds=3, task__model=model)


def test_mpi_gives_the_same_bits_and_ledger(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    of: dict[str, dict[str, Any]] = {name: config(name) for name in ("fedavg", "scaffold", "moon", "local")}
    of |= {name: own_on_four(name) for name in ("Ensemble", "Frozen")}
    straight = {name: alone.get(name) or fldist.run(of[name], output=tmp_path / name) for name in of}
    names = [(name, topology) for name in of for topology in TOPOLOGIES]
    jobs = [{"config": {**of[n], "topology": t}, "output": str(tmp_path / f"{n}-{t}")} for n, t in names]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = mpirun(4, [str(ROOT / "tests" / "mpi_runs.py"), str(tmp_path / "jobs.json")])
    assert done.returncode == 0, done.stderr
    for name, topology in names:
        directory = tmp_path / f"{name}-{topology}"
        assert outcome(json.loads((directory / "result.json").read_text())) == outcome(straight[name])
        assert ledger(directory) == ledger(straight[name]["directory"])


@pytest.mark.parametrize("integers", ["mean", "max", "keep"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_integer_blocks_follow_their_rule(tmp_path: Path, hosts: Hosts, integers: str, topology: str) -> None:
    changed = config("fedavg", aggregation={"integers": integers})
    here = fldist.run(changed, output=tmp_path / "here")
    there = run_here(load({**changed, "topology": topology}), nproc=3, output=tmp_path / "there", spawn=hosts)
    assert outcome(there) == outcome(here)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_run_may_go_on_with_another_topology(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    straight = fldist.run(config("scaffold"), output=tmp_path / "straight")
    run_here(load(config("scaffold", rounds=1)), nproc=2, output=tmp_path / "run", spawn=hosts)
    from fldist.config import load_resumed

    changed = load_resumed(tmp_path / "run", ["rounds=2", f"topology={topology}"])
    result = run_here(changed, nproc=3, output=tmp_path / "run", spawn=hosts, resume=True)
    assert outcome(result) == outcome(straight)


def own(name: str, topology: str, **changes: Any) -> dict[str, Any]:
    algorithm = {"name": f"tests.own:{name}", **changes}
    return small(
        algorithm=algorithm,
        clients={"num_clients": 6},
        task__model={"name": "mlp", "hidden": [64]},
        topology=topology,
        eval__every=0,
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["NanFrom", "Raises", "TwoCalls", "Masked", "DroppedScaffold"])
def test_refused_and_failing_clients_cost_what_they_cost_in_a_star(
    tmp_path: Path, hosts: Hosts, name: str, topology: str
) -> None:
    here, there = Recorder(), Recorder()
    straight = run_here(load(own(name, "star")), output=tmp_path / "here", observer=here)
    result = run_here(load(own(name, topology)), nproc=3, output=tmp_path / "there", spawn=hosts, observer=there)
    assert outcome(result) == outcome(straight)
    for mine, theirs in zip(there.lines, here.lines, strict=True):
        assert mine["missing"].keys() == theirs["missing"].keys()
        refused = [{c for c, r in line["missing"].items() if r.startswith("refused")} for line in (mine, theirs)]
        assert refused[0] == refused[1]
    assert result["bytes"]["wasted"] == straight["bytes"]["wasted"]
    if name in ("NanFrom", "Raises"):
        assert there.lines[0]["missing"]


# ---- folds of tensors
def ensemble(topology: str, lies: str = "", **changes: Any) -> Any:
    algorithm = {"name": "tests.own:Ensemble", "lies": lies}
    return load(small(algorithm=algorithm, topology=topology, eval__every=0, **changes))


def test_tensors_are_folded_with_the_same_bits_and_ledger(tmp_path: Path, hosts: Hosts) -> None:
    straight = run_here(ensemble("star"), output=tmp_path / "alone")
    z, h, small_ones = 4 * 2100, 2 * 2100, 2 * 4 + 8
    predicted = rf"training +up +{6 * (z + h + small_ones):,} +down +{6 * 8}\n"
    assert re.search(predicted, dry_run(ensemble("star"), 1))
    assert straight["bytes"]["logical"] == {"up": 2 * 6 * (z + h + small_ones), "down": 2 * 6 * 8}
    assert straight["bytes"]["by_kind"]["logits"] == {"up": 2 * 6 * (z + h), "down": 0}
    for topology in ("star", *TOPOLOGIES):
        directory = tmp_path / topology
        result = run_here(ensemble(topology), nproc=3, output=directory, spawn=hosts)
        assert outcome(result) == outcome(straight)
        assert ledger(directory) == ledger(tmp_path / "alone")
        payload = sum(r["wire_bytes"] - r["framing_bytes"] for r in messages(directory, "up"))
        # two rounds, two hosts; each adds up two tensors, 8 bytes an element
        folded = 2 * 2 * 2 * 8 * 2100 if topology == "reduce" else 2 * 6 * (z + h)
        assert payload == folded + 2 * 6 * small_ones


@pytest.mark.parametrize("lies", ["nan", "range", "shape", "dtype", "few"])
def test_a_tensor_that_is_refused_costs_the_same_everywhere(tmp_path: Path, hosts: Hosts, lies: str) -> None:
    straight = run_here(ensemble("star", lies), output=tmp_path / "alone")
    reason = {"dtype": "h: shape", "range": "h: range", "few": "few: range"}.get(lies, f"z: {lies}")
    assert straight["bytes"]["wasted"]["refused"]["up"] > 0
    for topology in TOPOLOGIES:
        seen = Recorder()
        result = run_here(ensemble(topology, lies), nproc=3, output=tmp_path / topology, spawn=hosts, observer=seen)
        assert outcome(result) == outcome(straight)
        assert result["bytes"]["wasted"] == straight["bytes"]["wasted"]
        for line in seen.lines:
            assert list(line["missing"]) == ["2"]
            assert line["missing"]["2"].startswith(f"refused: {reason}")


def test_a_host_without_a_client_takes_part_in_a_sum_larger_than_the_model(tmp_path: Path, hosts: Hosts) -> None:
    result = run_here(ensemble("reduce", clients__per_round=1), nproc=4, output=tmp_path / "run", spawn=hosts)
    straight = run_here(ensemble("star", clients__per_round=1), output=tmp_path / "alone")
    assert outcome(result) == outcome(straight)


# ---- what is saved
def messages(directory: Path, direction: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
    return [r for r in rows if r["row"] == "message" and r["direction"] == direction]


def test_what_each_topology_hands_to_the_transport(tmp_path: Path, hosts: Hosts) -> None:
    """Twelve clients on three hosts, one round: M bytes of model, 2 M bytes of integers."""
    payload = {}
    for topology in ("star", *TOPOLOGIES):
        changed = own("Base", topology)
        changed |= {"clients": {"num_clients": 12}, "rounds": 1}
        directory = tmp_path / topology
        result = run_here(load(changed), nproc=4, output=directory, spawn=hosts)
        model = result["bytes"]["by_kind"]["weights"]["down"] // 12
        assert result["bytes"]["logical"] == {"up": 12 * (model + 8), "down": 12 * model}
        payload[topology] = {
            way: sum(r["wire_bytes"] - r["framing_bytes"] for r in messages(directory, way)) for way in ("up", "down")
        }
        wire = result["bytes"]["wire"]
        for way in ("up", "down"):
            framing = sum(r["framing_bytes"] for r in messages(directory, way))
            assert wire[way] == payload[topology][way] + framing + result["bytes"]["transport"][way]
    assert payload == {
        "star": {"down": 3 * model, "up": 12 * (model + 8)},
        "collective": {"down": model, "up": 12 * (model + 8)},
        "reduce": {"down": model, "up": 3 * 2 * model + 12 * 8},
    }
    for topology in TOPOLOGIES:
        carriers = [r for r in messages(tmp_path / topology, "down") if r["wire_bytes"] >= model]
        assert len(carriers) == 1
        others = [r["shared_with"] for r in messages(tmp_path / topology, "down") if r != carriers[0]]
        assert carriers[0]["client"] in others
        assert None not in others


def test_what_is_given_once_is_broadcast_to_who_lacks_it(tmp_path: Path, hosts: Hosts) -> None:
    """Two calls a round, of one client and of all, on three hosts: in the second the first host holds it already."""
    changes: dict[str, Any] = {
        "algorithm": {"name": "tests.own:Frozen"}, "rounds": 3, "task__model": {"name": "cnn_bn", "widths": [32, 32]}
    }  # fmt: skip
    straight = run_here(load(small(eval__every=0, **changes)), output=tmp_path / "alone")
    job = build(load(small(**changes)), torch.device("cpu"))
    floats, ints = 4 * job.task.layout.num_floats, 8 * job.task.layout.num_ints
    assert floats > 4096 > ints > 0
    large, tiny = 4 * 1500, 4 * 3
    for topology in ("star", *TOPOLOGIES):
        directory = tmp_path / topology
        result = run_here(
            load(small(topology=topology, eval__every=0, **changes)), nproc=4, output=directory, spawn=hosts
        )
        assert outcome(result) == outcome(straight)
        assert ledger(directory) == ledger(tmp_path / "alone")
        down = messages(directory, "down")
        assert {r["rank"] for r in down if r["call"] == 1} == {1}
        assert {r["rank"] for r in down if r["call"] == 2} == {1, 2, 3}
        payload: dict[tuple[int, int], int] = {}
        for r in down:
            key = (r["round"], r["call"])
            payload[key] = payload.get(key, 0) + r["wire_bytes"] - r["framing_bytes"]
        one = floats + ints  # x, to one host
        all_of_x = 3 * one if topology == "star" else floats + 3 * ints
        alike = floats + large if topology != "star" else 2 * (floats + large)
        news = {1: floats + ints + large + tiny, 2: alike + 2 * (ints + tiny)}
        assert payload == {
            (number, call): {1: one, 2: all_of_x}[call] + (0 if number == 2 else news[call])
            for number in (1, 2, 3)
            for call in (1, 2)
        }
        others = [r for r in down if r["call"] == 2 and topology != "star"]
        assert sum(r["wire_bytes"] >= floats for r in others) == (3 if others else 0), "one row a round"


def test_hosts_without_a_client_take_part(tmp_path: Path, hosts: Hosts) -> None:
    for topology in TOPOLOGIES:
        changed = own("Base", topology)
        changed |= {"clients": {"num_clients": 6, "per_round": 1}}
        result = run_here(load(changed), nproc=4, output=tmp_path / topology, spawn=hosts)
        straight = fldist.run({**changed, "topology": "star"}, output=tmp_path / f"{topology}-star")
        assert outcome(result) == outcome(straight)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_hosts_without_a_client_do_without_what_rides_in_the_head(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    """BatchNorm's counters, or a whole model, may be too small to be broadcast."""
    for name, widths in (("counters", [32]), ("model", [4])):
        changed = small(
            topology=topology, clients__per_round=1, task__model={"name": "cnn_bn", "widths": [*widths, *widths]}
        )
        result = run_here(load(changed), nproc=4, output=tmp_path / name, spawn=hosts)
        straight = fldist.run({**changed, "topology": "star"}, output=tmp_path / f"{name}-star")
        assert outcome(result) == outcome(straight)


# ---- what is refused, and what ends a run
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"deadlines": {"round_deadline_s": 3}}, "deadlines.round_deadline_s: 3 does not go with topology"),
        ({"network": {"share": False}}, "network.share: false does not go with topology"),
        ({"network": {"checksum": "full"}}, "network.checksum: full does not go with topology"),
    ],
    ids=["deadline", "share", "checksum"],
)
def test_what_does_not_go_together_is_refused(topology: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(small(topology=topology, **changes))


def test_reduce_refuses_what_cannot_be_added_up(tmp_path: Path, hosts: Hosts) -> None:
    with pytest.raises(ValueError, match=r"many\.y: topology: reduce needs Mean or Sum, and this field .* collected"):
        run_here(load(own("Collects", "reduce")), nproc=3, output=tmp_path / "run", spawn=hosts)
    run_here(load(own("Collects", "collective")), nproc=3, output=tmp_path / "collective", spawn=hosts)


def test_in_one_process_nothing_is_exchanged_and_it_is_said(tmp_path: Path) -> None:
    seen = Recorder()
    run_here(load(own("Base", "reduce")), output=tmp_path / "run", observer=seen)
    assert any("topology: reduce is for several ranks" in w for w in seen.warnings)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_lost_host_ends_the_run_which_says_so_before_and_can_go_on(
    tmp_path: Path, hosts: Hosts, topology: str
) -> None:
    seen = Recorder(lambda number: hosts.send(2, signal.SIGKILL) if number == 2 else None)
    changed = own("Slow", topology, seconds=0.05) | {"rounds": 5}
    with pytest.raises(RunStopped, match=rf"host 2 lost \(.*\); topology {topology} needs every rank"):
        run_here(load(changed), nproc=4, output=tmp_path / "run", spawn=hosts, observer=seen)
    assert f"topology {topology} needs every rank" in seen.facts["survives"]
    result = run_here(load(changed), nproc=3, output=tmp_path / "run", spawn=hosts)
    assert result["state_hash"] == fldist.run({**changed, "topology": "star"}, output=tmp_path / "s")["state_hash"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_host_killed_within_an_exchange_ends_the_run(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    """The others are in the middle of a gather or a reduction, and nobody hangs there."""
    hosts.moments[2] = ("in the world", int(signal.SIGKILL), 2, str(tmp_path / "mark"))
    with pytest.raises(RunStopped, match=r"host \d lost \(.*\); topology"):
        run_here(load(own("Base", topology)), nproc=4, output=tmp_path / "run", spawn=hosts)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_host_lost_while_all_meet_ends_the_run_and_leaves_no_thread(tmp_path: Path, hosts: Hosts, rank: int) -> None:
    hosts.moments[rank] = ("opening the world", int(signal.SIGKILL), 0, str(tmp_path / "mark"))
    began = time.monotonic()
    with pytest.raises(RunStopped, match=rf"host {rank} lost \(.*\); topology reduce needs every rank"):
        run_here(load(own("Base", "reduce")), nproc=3, output=tmp_path / "run", spawn=hosts)
    assert time.monotonic() - began < 20


def test_reduce_ends_a_run_whose_weights_break_the_bound(tmp_path: Path, hosts: Hosts) -> None:
    """Each host keeps the bound by itself; a star refuses who came too late, a reduction cannot."""
    star = run_here(load(own("Heavy", "star")), nproc=3, output=tmp_path / "star", spawn=hosts)
    assert star["status"] == "finished"
    with pytest.raises(ValueError, match="the weights of all hosts' replies exceed the bound of the mean, 4"):
        run_here(load(own("Heavy", "reduce")), nproc=3, output=tmp_path / "run", spawn=hosts)


@pytest.mark.parametrize("topology", ["star", *TOPOLOGIES])
def test_a_reply_of_another_type_is_refused_everywhere(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    with pytest.raises(ClientCodeFailed, match="float32"):
        run_here(load(own("Double", topology)), nproc=3, output=tmp_path / "run", spawn=hosts)


def test_the_largest_of_negative_integers_is_no_zero() -> None:
    layout = Layout((), (), (Slot("count", (2,), 0, 2),))
    reference = Params(layout, torch.empty(0), torch.zeros(2, dtype=torch.int64))
    context = FoldContext(reference, 10.0, "max")
    host, idle, server = (FixedPoint(context, divide=True) for _ in range(3))
    host.add(0, Params(layout, torch.empty(0), torch.tensor([-3, 5])), 1.0)
    host.add(1, Params(layout, torch.empty(0), torch.tensor([-7, -2])), 1.0)
    server.absorb(0, 1.0)
    server.absorb(1, 1.0)
    blocks = [accumulator.blocks() for accumulator in (host, idle, server)]
    assert [b.how for b in blocks[2]] == ["sum", "max"]
    blocks[2][1].tensor.copy_(torch.stack([b[1].tensor for b in blocks]).amax(dim=0))
    assert server.result().ints.tolist() == [-3, 5]


def test_a_late_rank_is_waited_for_as_long_as_a_transfer_may_last() -> None:
    """Not as long as a rank may take to join, which is what gloo's groups are made with."""
    store = dist.HashStore()
    limits = Limits(join_s=0.8, transfer_s=30.0)
    worlds = [GlooWorld(Members(rank, 2, store, lambda: "127.0.0.1", limits)) for rank in range(2)]
    failed: list[Exception] = []

    def be(world: GlooWorld) -> None:
        try:
            world.open()
            block = torch.full((1000,), world.rank + 1, dtype=torch.int64)
            for step in range(3):
                time.sleep(1.2 if world.rank == step % 2 else 0.0)
                if step == 0:
                    world.broadcast(block.view(torch.uint8))
                    assert int(block[-1]) == 1
                elif step == 1:
                    got = world.gather([] if world.rank == 0 else [block.view(torch.uint8)], 8000)
                    assert sorted(got) == ([1] if world.rank == 0 else [])
                else:
                    world.reduce(block, "sum")
                    assert world.rank or int(block[0]) == 2
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=be, args=(world,)) for world in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failed == []
    for world in worlds:
        world.release()


# ---- gathered buffers
def test_a_small_part_that_is_kept_does_not_hold_the_whole_buffer() -> None:
    buffer = torch.zeros(100_000, dtype=torch.uint8)
    small, large = kept(buffer[:1000], buffer), kept(buffer[:50_000], buffer)
    assert small.untyped_storage().nbytes() == 1000
    assert large.data_ptr() == buffer.data_ptr()


@settings(max_examples=50, deadline=None, database=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=6), spare=st.integers(0, 3))
def test_parts_come_out_of_a_gathered_buffer_as_they_went_in(sizes: list[int], spare: int) -> None:
    parts = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    buffer = packed(parts, room(sizes) + spare * ALIGNMENT)
    assert room(sizes) % ALIGNMENT == 0
    for part, out in zip(parts, unpacked(buffer, sizes), strict=True):
        assert torch.equal(part, out)
        assert (out.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0
    assert int(buffer[room(sizes) :].sum()) == 0


@settings(max_examples=50, deadline=None, database=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=6), spare=st.integers(0, 3), length=st.integers(1, 500))
def test_a_buffer_packed_window_by_window_is_the_same(sizes: list[int], spare: int, length: int) -> None:
    parts = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    whole = packed(parts, room(sizes) + spare * ALIGNMENT)
    windows = [torch.full_like(window, 77) for window in whole.split(length)]
    for number, window in enumerate(windows):
        pack(window, number * length, parts)
    assert torch.equal(torch.cat(windows), whole)
