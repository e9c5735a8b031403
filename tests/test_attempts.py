"""Rounds that too few answered: done again as if nothing had happened, left, or the end of the run."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import fldist
from fldist.config import load
from fldist.runner import run_here
from fldist.runtime.membership import RunStopped
from tests.conftest import Hosts, Recorder, small
from tests.disturbed import assert_undisturbed, config, scaffold, when


def test_a_round_that_lost_a_reply_is_done_again_as_if_nothing_had_happened(tmp_path: Path, hosts: Hosts) -> None:
    mark = tmp_path / "mark"
    settings = scaffold(rounds=4)
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 2, str(mark))
    seen = Recorder()
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert mark.exists()
    assert_undisturbed(result, settings, tmp_path)
    assert [line["attempt"] for line in seen.lines] == [0, 1, 0, 0]
    assert all(line["replied"] == 3 and not line["missing"] for line in seen.lines)
    rows = [json.loads(line) for line in (tmp_path / "run" / "messages.jsonl").read_text().splitlines()]
    void = [r for r in rows if r["row"] == "kind" and (r["round"], r["attempt"]) == (2, 0)]
    assert void
    assert {r["status"] for r in void} <= {"resent", "lost", "late"}
    again = [r for r in rows if r["row"] == "kind" and (r["round"], r["attempt"]) == (2, 1)]
    assert {r["status"] for r in again} == {"delivered"}
    for way in ("up", "down"):
        resent = sum(r["logical_bytes"] for r in void if (r["status"], r["direction"]) == ("resent", way))
        assert result["bytes"]["wasted"].get("resent", {}).get(way, 0) == resent
    wire = sum(r["wire_bytes"] for r in rows if r["row"] == "message")
    assert sum(result["bytes"]["wire"].values()) == wire + sum(result["bytes"]["transport"].values())


def test_a_round_waits_for_the_host_whose_clients_wait_for_it(tmp_path: Path, hosts: Hosts) -> None:
    """orphans: wait, retry: the round is done again when the host is back, not in vain meanwhile."""
    settings = scaffold(rounds=4)
    settings["faults"]["orphans"] = "wait"
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 2, str(tmp_path / "mark"))
    seen = Recorder()
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert_undisturbed(result, settings, tmp_path)
    assert [line["attempt"] for line in seen.lines] == [0, 1, 0, 0]
    assert [line["hosts"]["present"] for line in seen.lines] == [2, 2, 2, 2]


def test_a_selector_is_told_nothing_of_a_void_attempt(tmp_path: Path, hosts: Hosts) -> None:
    settings = scaffold(rounds=5)
    settings.update(selection="tests.own:ByReports", algorithm="tests.own:Twice")
    hosts.moments[1] = ("computing the second call", int(signal.SIGKILL), 3, str(tmp_path / "mark"))
    seen = Recorder()
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert [line["attempt"] for line in seen.lines] == [0, 0, 1, 0, 0]
    assert_undisturbed(result, settings, tmp_path)


@pytest.mark.parametrize("algorithm", [{"name": "tests.own:Raises", "clients": [1]}, "tests.own:NanFrom"])
def test_what_would_fail_again_is_not_done_again(tmp_path: Path, algorithm: Any) -> None:
    raises = small(algorithm=algorithm, faults={"min_replies": "all", "on_quorum_loss": "retry"})
    raises["task"]["model"] = {"name": "mlp", "hidden": [100]}  # too large for the replies to ride in one frame
    with pytest.raises(RunStopped, match=r"round 1: only \d of the 6 replies .* nothing else would come of it"):
        fldist.run(raises, output=tmp_path / "run")


def test_too_few_replies_stop_a_run_that_says_so(tmp_path: Path) -> None:
    few = small(
        algorithm={"name": "tests.own:Raises", "clients": [1, 2]}, faults={"min_replies": 5, "on_quorum_loss": "stop"}
    )
    with pytest.raises(RunStopped, match=r"only 4 of the 5 replies that are needed to update were accepted"):
        fldist.run(few, output=tmp_path / "run")
    few["faults"]["min_replies"] = 4
    assert fldist.run(few, output=tmp_path / "enough")["status"] == "finished"


def test_too_few_replies_leave_the_state_as_it_was(tmp_path: Path) -> None:
    few = small(algorithm={"name": "tests.own:Raises", "clients": [1]}, faults={"min_replies": "all"})
    seen = Recorder()
    result = run_here(load(few), output=tmp_path / "run", observer=seen)
    assert [line["committed"] for line in seen.lines] == [False, False]
    untouched = fldist.run(small(algorithm="tests.own:Nobody"), output=tmp_path / "other")
    assert result["state_hash"] == untouched["state_hash"]


def test_attempts_are_limited(tmp_path: Path, hosts: Hosts) -> None:
    settings = config(faults={"min_replies": "all", "on_quorum_loss": "retry", "max_attempts": 3})
    settings["deadlines"]["round_deadline_s"] = 0.2
    settings["algorithm"] = {"name": "tests.own:Slow", "seconds": 0.0, "slow_client": 0, "slow_seconds": 0.5}
    with pytest.raises(RunStopped, match=r"round 1: only 1 of the 2 replies .* in 3 attempts \(faults.max_attempts\)"):
        run_here(load(settings), nproc=3, output=tmp_path / "run", spawn=hosts)




def test_attempts_are_not_burnt_on_a_host_that_takes_no_calls(tmp_path: Path, hosts: Hosts) -> None:
    """It is paused for longer than the round's deadline and shorter than the limit on silence."""
    mark = tmp_path / "mark"
    settings = config(faults={"min_replies": "all", "on_quorum_loss": "retry", "max_attempts": 4})
    settings["deadlines"] = {"client_timeout_s": 5.0, "round_deadline_s": 0.2}
    hosts.moments[1] = ("on the header", int(signal.SIGSTOP), 2, str(mark))
    seen = Recorder()
    with when(mark.exists, lambda: (time.sleep(1.2), hosts.send(1, signal.SIGCONT))):
        result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert 1 <= seen.lines[1]["attempt"] <= 2
    assert [line["replied"] for line in seen.lines] == [2, 2, 2]


def test_a_host_that_does_not_come_back_is_not_waited_for_in_vain(tmp_path: Path, hosts: Hosts) -> None:
    faults = {"min_replies": "all", "on_quorum_loss": "retry", "orphans": "wait", "restart": "never"}
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 2, str(tmp_path / "mark"))
    with pytest.raises(RunStopped, match="a host whose clients wait for it does not come back"):
        run_here(load(config(faults=faults)), nproc=3, output=tmp_path / "run", spawn=hosts)


def test_a_setup_that_lost_its_only_client_is_done_again(tmp_path: Path, hosts: Hosts) -> None:
    """Without the setup there would be no round, so that `skip`, the default, cannot mean to leave it out."""
    settings = small(
        algorithm={"name": "prunefl", "initial_passes": 20, "initial_client": 0},
        clients={"num_clients": 2},
        rounds=2,
        eval__every=0,
        clock={"name": "scripted", "default": 1e-3},
    )
    mark = tmp_path / "mark"
    hosts.moments[1] = ("computing", int(signal.SIGKILL), 0, str(mark))
    seen = Recorder()
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert mark.exists()
    assert result["state_hash"] == fldist.run(settings, output=tmp_path / "alone")["state_hash"]
    again = "setup: no reply to alone was accepted; it is done again (attempt 1)"
    assert any(w.startswith(again) for w in seen.warnings)
