"""Hosts that die or stop, clients that fail or lie: the run goes on, or stops and says why."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import fldist
from fldist.config import load
from fldist.runner import run_here
from fldist.runtime.caller import ClientCodeFailed
from fldist.runtime.membership import RunStopped
from tests.conftest import TIMED, Hosts, Recorder, in_time, small

OWN = str(Path(__file__).with_name("own.py"))


def own(name: str, **changes: Any) -> dict[str, Any]:
    return small(algorithm={"name": f"{OWN}:{name}", **changes.pop("fields", {})}, **changes)


def rows(directory: Path, row: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
    return [r for r in found if r["row"] == row]


def kill_when_busy(hosts: Hosts, flag: Path, number: signal.Signals, client: int) -> threading.Thread:
    """Send a signal to the host that works for `client` as soon as it has begun."""

    def wait() -> None:
        mark = Path(f"{flag}-{client}")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if mark.exists() and mark.read_text():
                pid = int(mark.read_text())
                rank = next(r for r, p in hosts.processes.items() if p.pid == pid)
                hosts.send(rank, number)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@TIMED
def test_a_killed_host_costs_its_replies_of_the_round_and_its_clients_move(tmp_path: Path, hosts: Hosts) -> None:
    flag = tmp_path / "flag"
    config = own("Slow", fields={"seconds": 0.3, "flag": str(flag)}, rounds=3)
    seen = Recorder()
    killer = kill_when_busy(hosts, flag, signal.SIGKILL, client=0)
    result = run_here(load(config), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    killer.join()
    assert result["status"] == "finished"
    first, second, third = seen.lines
    assert 0 < first["replied"] < 6
    assert "0" in first["missing"]
    assert "killed by SIGKILL" in seen.warnings[0] or "connection" in seen.warnings[0]
    assert second["replied"] == third["replied"] == 6
    in_time(first["seconds"]["total"], 3.0)  # the death was noticed at once
    lost = [r for r in rows(tmp_path / "run", "kind") if r["round"] == 1 and r["direction"] == "up"]
    assert len({r["client"] for r in lost}) == first["replied"], "half a reply was booked"


def test_a_stopped_host_is_lost_after_its_silence(tmp_path: Path, hosts: Hosts) -> None:
    flag = tmp_path / "flag"
    config = own("Slow", fields={"seconds": 0.2, "flag": str(flag)}, deadlines__client_timeout_s=0.6)
    seen = Recorder()
    stopper = kill_when_busy(hosts, flag, signal.SIGSTOP, client=0)
    result = run_here(load(config), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    stopper.join()
    assert result["status"] == "finished"
    assert "silent for 0.6 s" in seen.warnings[0]
    assert seen.lines[0]["replied"] < 6
    assert seen.lines[1]["replied"] == 6


def test_losing_clients_with_state_that_nobody_kept_stops_the_run_and_names_them(tmp_path: Path, hosts: Hosts) -> None:
    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)

    config = own("Counts", fields={"bad": 99}, rounds=5, checkpoint={"every": 0})
    with pytest.raises(RunStopped, match=r"host 1 lost .*state of clients (\d, )+\d.*1 finished round is kept in"):
        run_here(load(config), nproc=3, output=tmp_path / "run", observer=Recorder(after), spawn=hosts)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "stopped"
    assert "state of clients" in result["reason"]
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == result["rounds"] >= 1


def test_the_last_host_lost_ends_the_run(tmp_path: Path, hosts: Hosts) -> None:
    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)

    with pytest.raises(RunStopped, match="it was the last one"):
        alone = own("Slow", rounds=9, faults__restart="never")
        run_here(load(alone), nproc=2, output=tmp_path / "run", observer=Recorder(after), spawn=hosts)


@pytest.mark.parametrize("pause_s", [0.0, 0.4])
def test_all_hosts_lost_between_rounds_end_the_run(tmp_path: Path, hosts: Hosts, pause_s: float) -> None:
    """Also when the next call finds their sessions gone before it has heard of it: no round passes for finished."""

    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)
            hosts.send(2, signal.SIGKILL)
            time.sleep(pause_s)

    seen = Recorder(after)
    alone = own("Base", rounds=2, faults__restart="never")
    with pytest.raises(RunStopped, match="it was the last one; 1 finished round is kept in"):
        run_here(load(alone), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert len(seen.lines) == 1
    assert "it was the last one" in seen.text


def test_a_host_killed_while_idle_is_noticed(tmp_path: Path, hosts: Hosts) -> None:
    def after(number: int) -> None:
        if number == 1:
            hosts.send(2, signal.SIGKILL)
            time.sleep(0.3)

    seen = Recorder(after)
    run_here(load(own("Base", rounds=3)), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert seen.lines[-1]["replied"] == 6
    assert any("host 2 lost" in w for w in seen.warnings)


def test_a_nan_update_is_refused_booked_and_named(tmp_path: Path) -> None:
    seen = Recorder()
    run_here(load(own("NanFrom", rounds=2)), output=tmp_path / "run", observer=seen)
    assert seen.lines[0]["replied"] == 5
    assert seen.lines[0]["missing"]["2"].startswith("refused: y: nan: a value is NaN; if training diverges")
    assert any("client 2" in w and "nan" in w for w in seen.warnings)
    refused = [r for r in rows(tmp_path / "run", "kind") if r["status"] == "refused"]
    assert {(r["client"], r["direction"]) for r in refused} == {(2, "up")}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bytes"]["wasted"]["refused"]["up"] == sum(r["logical_bytes"] for r in refused) > 0
    delivered = [r for r in rows(tmp_path / "run", "kind") if r["status"] == "delivered" and r["direction"] == "up"]
    assert result["bytes"]["logical"]["up"] == sum(r["logical_bytes"] for r in delivered)


def test_a_refused_reply_leaves_no_trace_in_the_clients_state(tmp_path: Path) -> None:
    result = fldist.run(own("Counts", rounds=3, fields={"bad": 2, "bad_round": 2}), output=tmp_path / "a")
    assert result["status"] == "finished"
    lines = [json.loads(x) for x in (tmp_path / "a" / "rounds.jsonl").read_text().splitlines()]
    assert [x["replied"] for x in lines] == [6, 5, 6]
    # committed calls: 2 of client 2 (its call of round 2 left no trace), 3 of the others; the hash shows it
    straight = fldist.run(own("Counts", rounds=3, fields={"bad": 99}), output=tmp_path / "b")
    assert result["state_hash"] != straight["state_hash"]


def test_two_calls_of_a_round_share_scratch_and_staged_state(tmp_path: Path, hosts: Hosts) -> None:
    alone = fldist.run(own("TwoCalls"), output=tmp_path / "a")
    many = run_here(load(own("TwoCalls")), nproc=3, output=tmp_path / "b", spawn=hosts)
    assert alone["state_hash"] == many["state_hash"]


def test_a_client_that_raises_is_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    seen = Recorder()
    run_here(load(own("Raises", fields={"clients": [1, 4]})), output=tmp_path / "run", observer=seen)
    assert seen.lines[0]["replied"] == 4
    assert "ZeroDivisionError: client 1 divides by zero" in seen.lines[0]["missing"]["1"]
    assert "own.py" in seen.lines[0]["missing"]["1"], "the place in the user's code is not named"


def test_code_that_fails_on_every_client_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ClientCodeFailed, match=r"update failed on every client.*divides by zero"):
        fldist.run(own("Raises", fields={"clients": list(range(6))}), output=tmp_path / "run")


def test_changing_an_argument_in_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientCodeFailed, match="argument x was changed in place"):
        fldist.run(own("Mutates"), output=tmp_path / "run")


def test_changing_the_servers_state_in_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"server\.x was changed in place in round 1; set it to a new value instead"):
        fldist.run(own("MutatesServer"), output=tmp_path / "run")


def test_a_round_that_nobody_answered_leaves_the_state_unchanged(tmp_path: Path) -> None:
    seen = Recorder()
    result = run_here(load(own("Nobody")), output=tmp_path / "run", observer=seen)
    assert [line["committed"] for line in seen.lines] == [False, False]
    assert "the state stays as it was" in seen.warnings[0]
    assert seen.warnings[-1] == "in 2 of 2 rounds no reply was used: the model stayed as it was"
    untouched = fldist.run(own("Nobody", rounds=1), output=tmp_path / "other")
    assert result["state_hash"] == untouched["state_hash"]


@TIMED
def test_replies_after_the_round_deadline_are_booked_as_late(tmp_path: Path, hosts: Hosts) -> None:
    config = own("Slow", fields={"seconds": 0.35}, rounds=3, clients__num_clients=4, deadlines__round_deadline_s=0.5)
    seen = Recorder()
    result = run_here(load(config), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert "deadline" in seen.lines[0]["missing"].values()
    assert result["bytes"]["wasted"]["late"]["up"] > 0
    in_time(max(line["seconds"]["total"] for line in seen.lines), 0.8)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("delay_s", [0.02, 0.08, 0.2])
@TIMED
def test_a_host_lost_in_the_middle_of_a_transfer_blocks_nobody(
    tmp_path: Path, hosts: Hosts, delay_s: float, number: signal.Signals
) -> None:
    """37 MB down and up: whatever moment is met, the round ends and every thread comes back (see conftest).

    Rounds enough that the last one begins after the loss.
    """
    timers: list[threading.Timer] = []

    def after(number_of_round: int) -> None:
        if number_of_round == 0:
            timers.append(threading.Timer(delay_s, hosts.send, (1, number)))
            timers[0].start()

    seen = Recorder(after)
    config = own(
        "Base",
        rounds=5,
        clients__num_clients=4,
        task__model={"name": "mlp", "hidden": [3000, 3000]},
        eval__every=0,
        deadlines__client_timeout_s=1.5,
    )
    result = run_here(load(config), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    timers[0].join()
    assert result["status"] == "finished"
    assert seen.lines[-1]["replied"] == 4
    in_time(max(line["seconds"]["total"] for line in seen.lines), 5.0)
    totals = [r for r in rows(tmp_path / "run", "kind") if r["kind"] == "weights" and r["direction"] == "up"]
    assert len(totals) == sum(line["replied"] for line in seen.lines), "half an upload was booked"
