"""Checkpoints and going on: files that are whole or not there, runs that end as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fldist
from fldist import blocks
from fldist.algorithm import State
from fldist.config import ConfigError, load, load_resumed
from fldist.console import Progress
from fldist.params import Layout, Params
from fldist.runner import run_here
from fldist.runtime import checkpoint, keeper, output
from fldist.runtime.checkpoint import Checkpoints, ClientFiles, Damaged, read_state, write_state
from fldist.runtime.membership import RunStopped
from fldist.runtime.state import hash_state
from tests.conftest import Hosts, Recorder, in_a_process, mean_variate, small

ALGORITHMS = ["fedavg", "scaffold", "moon", "local", "fedopt"]
ROUNDS = 5


def config(algorithm: str, rounds: int = ROUNDS, **changes: Any) -> dict[str, Any]:
    clients = changes.pop("clients", {"num_clients": 6, "fraction": 0.5})
    return small(
        algorithm=algorithm,
        rounds=rounds,
        clients=clients,
        task={
            "data": "digits",
            "partition": {"name": "dirichlet", "alpha": 0.5},
            "model": {"name": "cnn_bn", "widths": [4]},
        },
        local={"epochs": 1, "batch_size": 64, "lr": 0.05, "momentum": 0.9},
        **changes,
    )


def straight(tmp_path: Path, algorithm: str, **changes: Any) -> dict[str, Any]:
    return fldist.run(config(algorithm, **changes), output=tmp_path / "straight")


def go_on(
    directory: Path, *overrides: str, nproc: int = 1, hosts: Hosts | None = None, seen: Any = None
) -> dict[str, Any]:
    options = {"spawn": hosts} if hosts is not None else {}
    settings = load_resumed(directory, overrides)
    return run_here(settings, nproc=nproc, output=directory, resume=True, observer=seen, **options)


def kinds(directory: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
    names = ("round", "attempt", "call", "phase", "client", "direction", "kind", "logical_bytes", "status")
    return sorted(tuple(r[n] for n in names) for r in rows if r["row"] == "kind")


def rounds(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    return [{k: r[k] for k in ("round", "accuracy", "loss", "selected", "replied", "missing")} for r in lines]


def assert_as_if_nothing_had_happened(result: dict[str, Any], expected: dict[str, Any]) -> None:
    one, other = Path(result["directory"]), Path(expected["directory"])
    assert result["status"] == "finished"
    assert result["state_hash"] == expected["state_hash"]
    assert rounds(one) == rounds(other)
    assert kinds(one) == kinds(other)
    for name in ("logical", "encoded", "by_kind", "by_phase"):
        assert result["bytes"][name] == expected["bytes"][name], name
    assert {k: result[k] for k in ("best", "final", "rounds")} == {k: expected[k] for k in ("best", "final", "rounds")}


# ---- one state, one file
def a_state() -> dict[str, Any]:
    layout = Layout.of(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)))
    params = Params(layout, torch.arange(float(layout.num_floats)), torch.tensor([7]))
    return {
        "x": params,
        "part": params.trainable,
        "nothing": None,
        "flags": [True, 3, "text", math.inf, -0.0, 1e-310],
        "nested": State(inner=State(t=torch.tensor([[1, 2]], dtype=torch.int16)), empty=torch.zeros(0)),
        "by": {1: "int key", "a": (1, (2.5,)), 2.0: []},
        "scalar": torch.tensor(3.5, dtype=torch.float64),
    }


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    values = a_state()
    write_state(tmp_path / "s", {**values, "nan": float("nan")}, {"round": 3}, durable=True)
    back, facts = read_state(tmp_path / "s", [values["x"].layout])
    assert math.isnan(back.pop("nan"))
    assert hash_state(back) == hash_state(values)
    assert list(back) == list(values)
    assert facts == {"round": 3}
    assert back["x"].layout is values["x"].layout
    assert back["part"].layout == values["part"].layout
    assert isinstance(back["by"]["a"], tuple)
    assert type(back["flags"][0]) is bool
    assert math.copysign(1.0, back["flags"][4]) == -1.0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_comes_back_lies_as_what_was_made_does(tmp_path: Path) -> None:
    """Where a tensor's memory begins decides in which order a product's sums are made: a run that goes on needs it."""
    sizes = [1, 3, 7, 70, 701, 300_001]
    write_state(tmp_path / "s", {str(n): torch.arange(float(n)) for n in sizes}, {})
    back, _ = read_state(tmp_path / "s")
    assert [back[str(n)].data_ptr() % blocks.ALIGNMENT for n in sizes] == [0] * len(sizes)


def test_a_file_that_is_cut_or_changed_anywhere_is_noticed(tmp_path: Path) -> None:
    write_state(tmp_path / "s", a_state(), {"round": 3})
    whole = (tmp_path / "s").read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 97)):
        (tmp_path / "s").write_bytes(whole[:length])
        with pytest.raises(Damaged, match="is damaged"):
            read_state(tmp_path / "s")
    for at in range(8, len(whole), 13):
        (tmp_path / "s").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            back, facts = read_state(tmp_path / "s")
        except Damaged:
            continue
        assert hash_state(back) == hash_state(a_state()), f"byte {at} was changed and nothing noticed"
        assert facts == {"round": 3}
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path / "s", {"v": 1}, {})

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        write_state(tmp_path / "s", {"v": 2}, {})
    assert read_state(tmp_path / "s")[0] == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_checkpoints_are_pruned_and_latest_names_the_newest(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    durable: list[int] = []
    for number in range(13):
        if number % 4 == 0:
            durable.append(number)
        kept.write(number, {"v": number}, {"durable": durable}, durable=number % 4 == 0)
        assert (tmp_path / "LATEST").read_text() == f"round-{number:06d}.safetensors\n"
    assert sorted(int(p.name[6:12]) for p in tmp_path.glob("round-*")) == kept.kept == [8, 11, 12]
    again = Checkpoints(tmp_path, keep=2)
    found = again.newest()
    assert found is not None
    assert (found[0], found[1], found[3]) == (12, {"v": 12}, [])
    assert again.kept == [8, 11, 12]


# ---- going on
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_in_pieces_on_other_numbers_of_ranks_is_the_straight_run(
    tmp_path: Path, hosts: Hosts, algorithm: str
) -> None:
    expected = straight(tmp_path, algorithm)
    run = tmp_path / "run"
    fldist.run(config(algorithm, rounds=1), output=run)
    go_on(run, "rounds=3", nproc=3, hosts=hosts)
    assert_as_if_nothing_had_happened(go_on(run, f"rounds={ROUNDS}"), expected)


def killed(tmp_path: Path, algorithm: str, when: str, **changes: Any) -> Path:
    """A run whose process is killed (SIGKILL) at a moment that the program `when` sets up."""
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(config(algorithm, **changes)))
    program = f"""
import json, os, signal
from pathlib import Path
import fldist, tests.conftest
from fldist.config import load
from fldist.runner import run_here
from fldist.runtime import checkpoint, keeper, output, server
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
observer = tests.conftest.Recorder()
{when}
run_here(load(json.loads(Path({str(tmp_path / "config.json")!r}).read_text())), output={str(run)!r}, observer=observer)
"""
    assert in_a_process(program) == -signal.SIGKILL
    return run


MOMENTS = {
    "after a round": "observer.round = lambda line: die() if line['round'] == 3 else None",
    "before the first checkpoint": "keeper.Keeper.keep = die",
    "in the middle of a checkpoint": """
old = checkpoint.save_file
def half(tensors, path, metadata):
    if 'round-000003' in str(path):
        path.write_bytes(b'half')
        die()
    old(tensors, path, metadata=metadata)
checkpoint.save_file = half
""",
    "between a checkpoint and LATEST": """
old = checkpoint.write_state
def then(path, *a, **k):
    old(path, *a, **k)
    if 'round-000003' in str(path): die()
checkpoint.write_state = then
""",
    "in the middle of a line": """
old = output.Output.round
def half(self, line):
    if line['round'] == 3:
        self._rounds.write(['{"round": 3, "att'])
        die()
    old(self, line)
output.Output.round = half
""",
    "with half the replies in": """
from fldist.runtime.caller import Caller
old = Caller._take
seen = []
def take(self, running, event):
    old(self, running, event)
    seen.append(1)
    if self._key[0] == 3 and len(running.replied) >= 2: die()
Caller._take = take
""",
}


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_server_killed_at_any_moment_goes_on_with_the_same_command(
    tmp_path: Path, algorithm: str, moment: str
) -> None:
    expected = straight(tmp_path, algorithm)
    run = killed(tmp_path, algorithm, MOMENTS[moment])
    assert not (run / "result.json").exists()
    seen = Recorder()
    result = run_here(load(config(algorithm)), output=run, observer=seen)
    assert_as_if_nothing_had_happened(result, expected)
    done = {"before the first checkpoint": None, "after a round": 3, "between a checkpoint and LATEST": 3}.get(
        moment, 2
    )
    said = [w for w in seen.warnings if w.startswith("continued after round")]
    assert said == ([] if done is None else [f"continued after round {done}, from {run}"])
    assert len(seen.lines) == ROUNDS - (done or 0)


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
@pytest.mark.parametrize("algorithm", ["fedavg", "moon"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, algorithm: str, damage: str) -> None:
    expected = straight(tmp_path, algorithm)
    run = killed(tmp_path, algorithm, "observer.round = lambda line: die() if line['round'] == 4 else None")
    newest = run / "checkpoints" / "round-000004.safetensors"
    whole = newest.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "changed": whole[:-5] + b"?" + whole[-4:], "emptied": b""}[damage]
    newest.write_bytes(broken)
    seen = Recorder()
    result = run_here(load(config(algorithm)), output=run, observer=seen)
    assert_as_if_nothing_had_happened(result, expected)
    assert any("round-000004.safetensors is damaged" in w and "the one before" not in w[:20] for w in seen.warnings)
    assert f"continued after round 3, from {run}" in seen.warnings


def test_checkpoints_that_are_all_damaged_are_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    run = killed(tmp_path, "fedavg", MOMENTS["after a round"])
    for path in (run / "checkpoints").glob("round-*"):
        path.write_bytes(b"")
    before = {p: p.read_bytes() for p in run.glob("*.jsonl")}
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole; the newest: .*round-000003.safetensors"):
        run_here(load(config("fedavg")), output=run)
    assert {p: p.read_bytes() for p in run.glob("*.jsonl")} == before


def test_a_clients_state_that_is_cut_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    expected = straight(tmp_path, "local", rounds=4)
    run = tmp_path / "run"
    fldist.run(config("local", rounds=3), output=run)
    state = next(run.glob("clients/*/3.*.safetensors"))
    state.write_bytes(state.read_bytes()[:-9])
    seen = Recorder()
    result = go_on(run, "rounds=4", seen=seen)
    assert_as_if_nothing_had_happened(result, expected)
    assert f"continued after round 2, from {run}" in seen.warnings
    assert any("round-000003.safetensors cannot be used" in w and state.name in w for w in seen.warnings)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_client_whose_state_is_damaged_is_missing_and_said_to_be(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    fldist.run(config("local", rounds=2, clients={"num_clients": 3}), output=run)
    for state in (run / "clients" / "00001").glob("*.safetensors"):
        whole = state.read_bytes()
        state.write_bytes(whole[:-9] if damage == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    seen = Recorder()
    result = go_on(run, "rounds=3", seen=seen)
    assert "is damaged" in seen.lines[0]["missing"]["1"]
    assert result["state_hash"] is None
    resumed = [w for w in seen.warnings if w.startswith("no checkpoint in ")]
    assert len(resumed) == (damage == "cut"), "a look at the head is enough to find a cut file"


@pytest.mark.parametrize("name", ["rounds.jsonl", "messages.jsonl"])
def test_lines_that_a_power_failure_has_taken_fall_back_to_the_checkpoint_before(tmp_path: Path, name: str) -> None:
    expected = straight(tmp_path, "fedavg")
    run = killed(tmp_path, "fedavg", MOMENTS["after a round"])
    os.truncate(run / name, (run / name).stat().st_size - 5)
    seen = Recorder()
    assert_as_if_nothing_had_happened(run_here(load(config("fedavg")), output=run, observer=seen), expected)
    assert any(f"{name} has lost lines" in w for w in seen.warnings)
    assert f"continued after round 2, from {run}" in seen.warnings


# ---- what goes on and what does not
def test_only_what_changes_no_meaning_may_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fldist.run(config("fedavg", rounds=2), output=run)
    with pytest.raises(
        ConfigError, match=r"local\.lr: it cannot be changed in a run that goes on; only rounds, stages, stop"
    ):
        load_resumed(run, ["rounds=3", "local.lr=0.1"])
    with pytest.raises(ConfigError, match=r"rounds: the run in .* is finished, with 2 of 2; give more to extend it"):
        load_resumed(run)
    with pytest.raises(ConfigError, match="holds no run"):
        load_resumed(tmp_path)
    assert load_resumed(run, ["rounds=3", "eval.every=2", "deadlines.join_s=9"]).rounds == 3
    with pytest.raises(ValueError, match=r"holds a finished run; `fldist resume .* rounds=N` extends it"):
        run_here(load(config("fedavg", rounds=2)), output=run)
    with pytest.raises(ConfigError, match=r"checkpoint\.every: 0, but a run is to go on"):
        go_on(run, "rounds=3", "checkpoint.every=0")


def test_an_unfinished_run_with_another_configuration_is_refused(tmp_path: Path) -> None:
    run = killed(tmp_path, "fedavg", MOMENTS["after a round"])
    with pytest.raises(ValueError, match=r"holds an unfinished run with another configuration \(seed, local\.lr\)"):
        run_here(load({**config("fedavg"), "seed": 5, "local": {**config("fedavg")["local"], "lr": 0.1}}), output=run)


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    run = killed(tmp_path, "fedavg", MOMENTS["after a round"])
    with (
        keeper.owned(run),
        pytest.raises(ValueError, match=r"belongs to a run that is still going \(.*, process \d+\)"),
    ):
        run_here(load(config("fedavg")), output=run)
    assert run_here(load(config("fedavg")), output=run)["status"] == "finished"


def test_a_run_that_is_refused_takes_nothing_away(tmp_path: Path) -> None:
    """The other one is still building: there is no configuration in the directory yet."""
    run = tmp_path / "run"
    run.mkdir()
    with keeper.owned(run):
        (run / "rank-1.log").write_text("a host's")
        with pytest.raises(ValueError, match="belongs to a run that is still going"):
            run_here(load(config("fedavg")), output=run)
        assert {p.name for p in run.iterdir()} >= {"owner.lock", "rank-1.log"}


def test_a_method_that_has_worked_before_the_run_went_on_may_fail(tmp_path: Path) -> None:
    """A call that fails on all its clients ends a run only when nobody has ever answered it."""
    failing = small(
        algorithm={"name": "tests.own:Raises", "clients": [0]}, rounds=8, clients={"num_clients": 3, "per_round": 1}
    )
    straight_run = fldist.run(failing, output=tmp_path / "straight")
    lines = (tmp_path / "straight" / "rounds.jsonl").read_text().splitlines()
    void = [line["round"] for line in map(json.loads, lines) if not line["committed"]]
    first = next(number for number in void if number > 1)
    run = tmp_path / "run"
    fldist.run({**failing, "rounds": first - 1}, output=run)
    assert go_on(run, "rounds=8")["state_hash"] == straight_run["state_hash"]


def test_stages_that_depend_on_the_number_of_rounds_cannot_be_extended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    staged = config("tests.own:Halves", rounds=4)
    fldist.run(staged, output=run)
    with pytest.raises(
        ValueError, match="rounds: 4 rounds are done, and with this number of rounds and these stages they"
    ):
        go_on(run, "rounds=8")


def test_a_filled_ledger_is_taken_back_too(tmp_path: Path) -> None:
    for name, text in (("messages.jsonl", "abc"), ("messages-0001.jsonl", "first"), ("rounds.jsonl", "r1r2")):
        (tmp_path / name).write_text(text)
    at = output.sizes(tmp_path)
    assert at == {"messages.jsonl": 3, "rounds.jsonl": 4, "rotated": 1}
    (tmp_path / "messages.jsonl").rename(tmp_path / "messages-0002.jsonl")
    with (tmp_path / "messages-0002.jsonl").open("a") as file:
        file.write("later")
    for name in ("messages.jsonl", "messages-0003.jsonl", "clients.jsonl"):
        (tmp_path / name).write_text("later still")
    output.cut_back(tmp_path, at)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "messages.jsonl": "abc",
        "messages-0001.jsonl": "first",
        "rounds.jsonl": "r1r2",
    }


# ---- clients' states
def test_hosts_that_die_leave_scaffold_exact(tmp_path: Path, hosts: Hosts) -> None:
    """c stays the mean of all c_k while clients move between hosts with their states."""

    def after(number: int) -> None:
        if number in (2, 4):
            hosts.send(number // 2, signal.SIGKILL)

    seen = Recorder(after)
    result = run_here(load(config("scaffold", rounds=8)), nproc=4, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert result["state_hash"] is not None
    assert sum("its clients move to" in w for w in seen.warnings) == 2
    assert any(line["missing"] for line in seen.lines)
    c, mean = mean_variate(tmp_path / "run", 6)
    assert float(c.norm()) > 0
    torch.testing.assert_close(c, mean, rtol=0, atol=1e-6)


def test_a_state_that_cannot_be_written_costs_that_clients_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ClientFiles.write

    def full(self: ClientFiles, client: int, version: str, values: Any) -> None:
        if client == 2:
            raise OSError(28, "No space left on device")
        write(self, client, version, values)

    monkeypatch.setattr(ClientFiles, "write", full)
    changed = config("scaffold", clients={"num_clients": 4})
    seen = Recorder()
    result = run_here(load(changed), output=tmp_path / "run", observer=seen)
    assert result["status"] == "finished"
    for line in seen.lines:
        assert line["missing"] == {
            "2": "error: update on host 0: its state cannot be written: [Errno 28] No space left on device"
        }
    c, mean = mean_variate(tmp_path / "run", 4)
    torch.testing.assert_close(c, mean, rtol=0, atol=1e-6)


def test_a_full_disk_is_not_taken_for_code_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's state can be written in round 1; code that fails on everyone would end the run."""
    write = ClientFiles.write

    def full(self: ClientFiles, client: int, version: str, values: Any) -> None:
        if version.startswith("1."):
            raise OSError(28, "No space left on device")
        write(self, client, version, values)

    monkeypatch.setattr(ClientFiles, "write", full)
    seen = Recorder()
    run_here(load(config("scaffold", rounds=3)), output=tmp_path / "run", observer=seen)
    assert [line["committed"] for line in seen.lines] == [False, True, True]


def test_a_run_that_cannot_begin_for_a_full_disk_says_so(tmp_path: Path) -> None:
    for limit in (0, 200):
        program = f"""
import json, resource, sys
from pathlib import Path
import tests.conftest
from fldist.config import ConfigError, load
from fldist.runner import run_here
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
try:
    run_here(load(tests.conftest.small()), output={str(tmp_path / f"run{limit}")!r})
except ConfigError as error:
    sys.exit(7 * ("cannot be written to (File too large); make room" in str(error)))
"""
        assert in_a_process(program) == 7


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoints.write

    def sometimes(self: Checkpoints, number: int, *rest: Any, **options: Any) -> None:
        if number in (2, 3):
            raise OSError(28, "No space left on device")
        write(self, number, *rest, **options)

    expected = straight(tmp_path, "scaffold")
    monkeypatch.setattr(Checkpoints, "write", sometimes)
    seen = Recorder()
    result = run_here(load(config("scaffold")), output=tmp_path / "run", observer=seen)
    assert result["state_hash"] == expected["state_hash"]
    assert [w[:41] for w in seen.warnings] == [f"round {n}: no checkpoint could be written (" for n in (2, 3)]


def under_a_limit(run: Path, tmp_path: Path, until: int) -> int | None:
    """A run of scaffold in which files may not grow over 3,000 bytes after round 2 until after round `until`."""
    (tmp_path / "config.json").write_text(json.dumps(config("scaffold")))
    program = f"""
import json, resource, sys
from pathlib import Path
import tests.conftest
from fldist.config import load
from fldist.runner import run_here
def after(number):
    soft = {{2: 3000, {until}: resource.RLIM_INFINITY}}
    if number in soft: resource.setrlimit(resource.RLIMIT_FSIZE, (soft[number], resource.RLIM_INFINITY))
seen = tests.conftest.Recorder(after)
try:
    run_here(load(json.loads(Path({str(tmp_path / "config.json")!r}).read_text())), output={str(run)!r}, observer=seen)
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path({str(tmp_path / "warnings")!r}).write_text("\\n".join(seen.warnings))
"""
    return in_a_process(program)


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    expected = straight(tmp_path, "scaffold")
    run = tmp_path / "run"
    assert under_a_limit(run, tmp_path, until=4) == 0
    warnings = (tmp_path / "warnings").read_text()
    assert "round 3: messages.jsonl cannot be written (File too large): its lines are kept in memory" in warnings
    assert "round 4: no checkpoint could be written (lines of earlier rounds are not written yet)" in warnings
    assert "round 5: " not in warnings
    assert_as_if_nothing_had_happened(json.loads((run / "result.json").read_text()), expected)


def test_a_disk_that_stays_full_ends_the_run_and_it_goes_on(tmp_path: Path) -> None:
    expected = straight(tmp_path, "scaffold")
    run = tmp_path / "run"
    assert under_a_limit(run, tmp_path, until=99) == 1
    assert "results cannot be written" in json.loads((run / "result.json").read_text())["reason"]
    seen = Recorder()
    assert_as_if_nothing_had_happened(run_here(load(config("scaffold")), output=run, observer=seen), expected)
    assert f"continued after round 2, from {run}" in seen.warnings


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, small_disk: Path) -> None:
    """Neither lines, nor a checkpoint, nor a client's state can be written in rounds 3 and 4."""
    filler = small_disk / "filler"

    def after(number: int) -> None:
        if number == 2:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if number == 4:
            filler.unlink()

    seen = Recorder(after)
    result = run_here(load(config("scaffold", rounds=6)), output=small_disk / "run", observer=seen)
    assert result["status"] == "finished"
    said = "\n".join(seen.warnings)
    # what is left of a file's last page still takes a few lines
    assert re.search(r"round [34]: messages\.jsonl cannot be written \(No space left on device\)", said)
    assert "round 4: no checkpoint could be written" in said
    reasons = [reason for line in seen.lines[2:4] for reason in line["missing"].values()]
    assert len(reasons) == 6
    assert all(r.startswith("error: update on host 0: its state cannot be written: ") for r in reasons)
    assert [line["committed"] for line in seen.lines] == [True, True, False, False, True, True]
    assert [line["round"] for line in rounds(small_disk / "run")] == [1, 2, 3, 4, 5, 6]
    c, mean = mean_variate(small_disk / "run", 6)
    torch.testing.assert_close(c, mean, rtol=0, atol=1e-6)
    delivered = [r for r in kinds(small_disk / "run") if r[8] == "delivered" and r[3] == "train"]
    assert sum(r[7] for r in delivered) == sum(result["bytes"]["logical"].values())


def test_arrays_that_cannot_be_written_stop_the_run_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(RunStopped, match=r"all rounds are done, but .*: run\.h5 cannot be written: No space left"):
            fldist.run(config("fedavg", rounds=2), output=tmp_path / "run")
    assert go_on(tmp_path / "run")["status"] == "finished"


def test_what_a_full_disk_makes_of_safetensors_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be written"):
        checkpoint.save_tensors({"a": torch.zeros(3)}, tmp_path / "missing" / "file")


def test_files_of_clients_do_not_pile_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fldist.run(config("moon", rounds=12, checkpoint={"every": 3, "keep": 2}), output=run)
    needed: dict[str, set[str]] = {}
    for path in (run / "checkpoints").glob("round-*"):
        for client, version in checkpoint.read_facts(path)["versions"].items():
            needed.setdefault(f"{int(client):05d}", set()).add(f"{version}.safetensors")
    assert len(list((run / "checkpoints").glob("round-*"))) == 3
    there = {p.name: {f.name for f in p.iterdir()} for p in (run / "clients").iterdir() if p.is_dir()}
    assert there.keys() == needed.keys()
    for client, names in there.items():
        assert needed[client] <= names
        assert len(names) <= 4


def test_what_a_synced_checkpoint_names_has_been_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()

    def note(path: Path) -> None:
        assert path.exists()
        synced.add(path.name)

    monkeypatch.setattr(checkpoint, "sync", note)
    monkeypatch.setattr(keeper, "sync", note)
    run = tmp_path / "run"
    named: list[tuple[int, set[str]]] = []

    def after(number: int) -> None:
        if number:
            facts = checkpoint.read_facts(run / "checkpoints" / f"round-{number:06d}.safetensors")
            named.append((number, {f"{version}.safetensors" for version in facts["versions"].values()}))
            if number % 2 == 0 or number == 5:
                assert named[-1][1] <= synced
                assert {"rounds.jsonl", "messages.jsonl", "LATEST.tmp"} <= synced
                assert any(name.startswith(f"round-{number:06d}") for name in synced)
            else:
                assert not named[-1][1] <= synced, "an ordinary round need not wait for the disk"

    settings = config("scaffold", checkpoint={"every": 2, "keep": 2})
    run_here(load(settings), output=run, observer=Recorder(after))
    assert [number for number, _ in named] == [1, 2, 3, 4, 5]


def test_without_checkpoints_nothing_is_written(tmp_path: Path) -> None:
    result = fldist.run(config("scaffold", checkpoint={"every": 0}), output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "clients").exists()
    assert result["state_hash"] == straight(tmp_path, "scaffold")["state_hash"]


def test_hosts_that_do_not_see_the_directory_are_told_of(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begins without keeping clients' states, and says so; one that needs them does not go on without."""
    run = tmp_path / "run"
    fldist.run(config("scaffold", rounds=1), output=run)
    monkeypatch.setattr(keeper.Keeper, "mark", lambda self, run_id: self.clients.directory.mkdir(exist_ok=True))
    for sign in (run / "clients").glob("run-*"):
        sign.unlink()
    seen = Recorder()
    result = run_here(load(config("scaffold", rounds=2)), nproc=2, output=tmp_path / "new", observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert any("not every host sees the run's directory" in w for w in seen.warnings)
    assert not (tmp_path / "new" / "checkpoints").exists()
    with pytest.raises(ValueError, match="exists and is not empty; nothing is overwritten"):
        run_here(load(config("scaffold", rounds=2)), nproc=2, output=tmp_path / "new", spawn=hosts)
    with pytest.raises(RunStopped, match=r"not every host sees .*, where the clients' states are"):
        go_on(run, "rounds=2", nproc=2, hosts=hosts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_leave_a_run_that_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    expected = straight(tmp_path, "scaffold")
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(json.dumps(config("scaffold")))
    program = f"""
import json, os, signal
from pathlib import Path
import tests.conftest
from fldist.config import load
from fldist.runner import run_here
observer = tests.conftest.Recorder(lambda n: os.kill(os.getpid(), {int(number)}) if n == 2 else None)
run_here(load(json.loads(Path({str(tmp_path / "config.json")!r}).read_text())), output={str(run)!r}, observer=observer)
"""
    assert in_a_process(program) != 0
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert_as_if_nothing_had_happened(run_here(load(config("scaffold")), output=run), expected)


def test_a_run_of_another_version_is_refused_before_anything_of_it_is_changed(tmp_path, monkeypatch):
    """Its checkpoints do not say what the run had spent."""
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    fldist.run(small(), output=tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"round-000002\.safetensors has format 1; this version reads 3"):
        go_on(tmp_path / "run", "rounds=4")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 2


def test_a_run_without_a_finite_loss_goes_on_to_its_end(tmp_path, capsys):
    """Its files have null in place of NaN."""
    settings = small(algorithm="centralised", local={"epochs": 1, "batch_size": 64, "lr": 1e38})
    first = fldist.run(settings, output=tmp_path / "run")
    assert math.isnan(first["final"]["loss"])
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed at its end
    again = go_on(tmp_path / "run", seen=Progress())
    assert (again["status"], again["state_hash"]) == ("finished", first["state_hash"])
    assert "loss nan" in capsys.readouterr().out
