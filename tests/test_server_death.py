"""Servers that are killed, with hosts that wait for them or that end with them; and all kinds of death together."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from fldist.config import load
from fldist.runner import run_here
from tests.conftest import Hosts, Recorder, mean_variate
from tests.disturbed import (
    KILLS,
    assert_is_first_and,
    assert_undisturbed,
    config,
    own_agents,
    scaffold,
    server_killed,
    when,
)


def test_a_server_that_is_killed_is_waited_for_by_its_hosts(tmp_path: Path) -> None:
    """F9, at each moment in turn, with hosts that live on: they join every new server and keep what they have built."""
    settings = scaffold(rounds=6, model={"name": "mlp", "hidden": [2500, 2500]})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with own_agents(settings, tmp_path / "run") as hosts:
        pids = hosts.pids
        for number, moment in enumerate(KILLS, start=2):
            server_killed(tmp_path, moment, number, {**hosts.environment, "RANK": "0"})
        result = run_here(load(settings), output=tmp_path / "run")
        assert hosts.pids == pids
    assert_undisturbed(result, settings, tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "EPOCH").read_text() == f"{len(KILLS)}\n"
    for rank in pids:
        log = (tmp_path / "run" / f"rank-{rank}.log").read_text()
        assert log.count("joined from") == 1 + len(KILLS)


def test_a_server_that_is_killed_goes_on_with_new_hosts(tmp_path: Path, hosts: Hosts) -> None:
    """F9 with hosts that end with their launcher."""
    settings = scaffold(rounds=4)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    server_killed(tmp_path, "aggregating", 3, nproc=3)
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", spawn=hosts)
    assert_undisturbed(result, settings, tmp_path)


def test_hosts_give_up_a_server_that_does_not_come_back(tmp_path: Path) -> None:
    settings = scaffold(deadlines={"join_s": 1.5})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(AssertionError, match="host 1 ended with 1"), own_agents(settings, tmp_path / "run") as hosts:
        server_killed(tmp_path, "aggregating", 2, {**hosts.environment, "RANK": "0"})
        began = time.monotonic()
        hosts.processes[1].join(10)
        assert time.monotonic() - began < 5


def test_a_pause_longer_than_the_limit_ends_that_incarnation(tmp_path: Path) -> None:
    """F3, second half, where nobody kills it: it is lost, wakes up, and joins again as another incarnation."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    settings = config("computing")
    settings.update(algorithm={"name": "tests.own:Slow", "seconds": 0.1}, rounds=12)
    with own_agents(settings, run, moments={1: ("computing", int(signal.SIGSTOP), 2, str(mark))}) as hosts:
        pid = hosts.pids[1]
        with when(mark.exists, lambda: (time.sleep(1.2), os.kill(pid, signal.SIGCONT))):
            seen = Recorder()
            result = run_here(load(settings), output=run, observer=seen)
    assert result["status"] == "finished"
    assert any("host 1 lost (silent for 0.6 s)" in w for w in seen.warnings)
    assert sum("host 1 has joined again" in w for w in seen.warnings) == 1
    assert hosts.pids[1] == pid
    assert [line["hosts"]["present"] for line in seen.lines][-1] == 2
    assert_is_first_and(12, run, settings)
    log = (run / "rank-1.log").read_text()
    assert "waiting for the server" in log or log.count("joined from") == 2


# ---- all of it together
def test_a_run_killed_five_times_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Hosts are killed three times, the server twice, at different moments."""
    settings = scaffold(rounds=8)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    marks = [str(tmp_path / f"mark-{i}") for i in range(3)]
    kill = int(signal.SIGKILL)
    struck = {1: ("computing", kill, 2, marks[0]), 2: ("on the header", kill, 5, marks[1])}
    with own_agents(settings, tmp_path / "run", moments=struck) as hosts:
        environment = {**hosts.environment, "RANK": "0"}
        stop = threading.Event()

        def agent() -> None:
            """Start a host that was killed again, as its agent would."""
            while not stop.is_set():
                for rank, process in list(hosts.processes.items()):
                    if process.exitcode == -signal.SIGKILL:
                        again = ("computing", kill, 7, marks[2]) if rank == 1 else None
                        hosts.processes[rank] = hosts.start(rank, again)
                time.sleep(0.01)

        agents = threading.Thread(target=agent)
        agents.start()
        try:
            server_killed(tmp_path, "aggregating", 3, environment)
            server_killed(tmp_path, "writing a checkpoint", 6, environment)
            result = run_here(load(settings), output=tmp_path / "run")
        finally:
            stop.set()
            agents.join()
    assert all(Path(mark).exists() for mark in marks), "a host was not killed"
    assert_undisturbed(result, settings, tmp_path)


def test_scaffold_stays_exact_while_clients_drop_out_at_random(tmp_path: Path) -> None:
    """50 rounds in which a third of the clients fail, or lie, after they have written their state: c = mean of c_k."""
    settings = scaffold(rounds=50, eval__every=0)
    settings.update(algorithm="tests.own:DroppedScaffold", faults={})
    seen = Recorder()
    run_here(load(settings), output=tmp_path / "run", observer=seen)
    dropped = [reason for line in seen.lines for reason in line["missing"].values()]
    assert 30 < len(dropped) < 70
    assert any("refused" in reason for reason in dropped)
    assert any("RuntimeError" in reason for reason in dropped)
    c, mean = mean_variate(tmp_path / "run", 6)
    assert float(c.norm()) > 0.01
    torch.testing.assert_close(c, mean, rtol=0, atol=1e-6)


def test_scaffold_stays_exact_while_hosts_die_at_random(tmp_path: Path, hosts: Hosts) -> None:
    generator = random.Random(5)
    settings = scaffold(rounds=50, eval__every=0)
    settings.update(faults={}, algorithm={"name": "tests.own:DroppedScaffold", "share": 0.0, "seconds": 0.03})
    stop = threading.Event()

    def reaper() -> None:
        while not stop.wait(generator.uniform(0.2, 0.5)):
            with contextlib.suppress(ProcessLookupError):
                hosts.send(generator.choice([1, 2, 3]), signal.SIGKILL)

    seen = Recorder()
    thread = threading.Thread(target=reaper)
    thread.start()
    try:
        result = run_here(load(settings), nproc=4, output=tmp_path / "run", observer=seen, spawn=hosts)
    finally:
        stop.set()
        thread.join()
    assert result["state_hash"] is not None
    assert sum(bool(line["missing"]) for line in seen.lines) >= 2
    assert sum("has joined again" in w for w in seen.warnings) >= 2
    c, mean = mean_variate(tmp_path / "run", 6)
    assert float(c.norm()) > 0.01
    torch.testing.assert_close(c, mean, rtol=0, atol=1e-6)
