"""Hosts that die, stop, pause and come back, at any moment of a round (gloo, warm hosts): noticed in time, missed for
no longer than they are gone, and nothing of a half upload in a result."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fldist import runner
from fldist.config import load
from fldist.runner import run_here
from fldist.wire import gloo
from fldist.wire.codec import Frame, FrameType
from fldist.wire.control import ControlPlane
from fldist.wire.pair import GlooPair
from fldist.wire.session import Session
from tests import moments
from tests.conftest import TIMED, Hosts, Recorder, in_time, small
from tests.disturbed import SILENCE_S, assert_is_first_and, config, when

KILL_LIMIT_S = 0.2
STOP_LIMIT_S = SILENCE_S + 0.2


@pytest.fixture
def noticed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, float]]]:
    """When the link lost which host."""
    times: list[tuple[int, float]] = []
    lost = gloo.GlooServer._session_lost

    def session_lost(self: gloo.GlooServer, session: Session, reason: str) -> None:
        at = time.monotonic()
        lost(self, session, reason)
        if not self._closing:
            times.append((session.rank, at))

    monkeypatch.setattr(gloo.GlooServer, "_session_lost", session_lost)
    yield times


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def struck_by_server(moment: str, hosts: Hosts, number: int, mark: Path) -> Iterator[None]:
    """The server's process sends host 1 the signal in round 2, while its upload comes or before it acknowledges it."""
    receive, control = Session._receive_bodies, Session._control

    def strike(session: Session) -> None:
        mark.write_text(str(time.monotonic()))
        hosts.send(1, signal.Signals(number))

    def due(session: Session, frame: Frame) -> bool:
        head = frame.head
        return session.rank == 1 and (head.type, head.round) == (FrameType.REPLY, 2) and not mark.exists()

    def received(self: Session, frame: Frame) -> None:
        receive(self, frame)
        if due(self, frame):
            strike(self)

    changed = moments.halving(receive, due, strike) if moment == "mid upload" else received
    Session._receive_bodies = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session._receive_bodies, Session._control = receive, control  # type: ignore[method-assign]


def strike_at(
    moment: str, number: signal.Signals, run: Path, hosts: Hosts, settings: dict[str, Any], pause_s: float
) -> tuple[Recorder, float]:
    """A run in which host 1 gets the signal at the moment; returns what was seen and when it was struck."""
    mark = run.parent / "mark"

    def after(finished: int) -> None:
        if moment == "idle" and finished == 1:
            mark.write_text(str(time.monotonic()))
            hosts.send(1, number)
            time.sleep(pause_s)

    if moment in moments.AT_HOST:
        hosts.moments[1] = (moment, int(number), 2, str(mark))
    seen = Recorder(after)
    by_server = moment in moments.AT_SERVER
    with struck_by_server(moment, hosts, number, mark) if by_server else contextlib.nullcontext():
        result = run_here(load(settings), nproc=3, output=run, observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert mark.exists(), "the moment never came"
    return seen, float(mark.read_text())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("moment", moments.MOMENTS)
@TIMED
def test_a_host_is_lost_in_time_at_any_moment(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]], moment: str, number: signal.Signals
) -> None:
    """F1 and F2: SIGKILL within 0.2 s, SIGSTOP within client_timeout_s + 0.2 s; program and launcher end."""
    limit_s = KILL_LIMIT_S if number is signal.SIGKILL else STOP_LIMIT_S
    settings = config(moment)
    seen, struck = strike_at(moment, number, tmp_path / "run", hosts, settings, limit_s)
    assert [rank for rank, _ in noticed] == [1]
    assert noticed[0][1] >= struck
    in_time(noticed[0][1] - struck, limit_s)
    assert_is_first_and(3, tmp_path / "run", settings)
    replied = [line["replied"] for line in seen.lines]
    assert replied[0] == 2
    # lost between rounds, it has left its clients to the other; an upload that was complete counts, acknowledged or not
    assert replied[1] == (2 if moment in ("idle", "uploaded, not acknowledged") else 1)
    assert [line["committed"] for line in seen.lines] == [True] * 3
    in_time(seen.lines[1]["seconds"]["total"], limit_s + 3.0)


# ---- pauses
@pytest.mark.parametrize("moment", ["mid download", "computing"])
def test_a_pause_shorter_than_the_limit_costs_nothing(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]], moment: str
) -> None:
    """F3, first half."""
    run, mark = tmp_path / "run", tmp_path / "mark"
    settings = config(moment)
    settings["deadlines"] = {"client_timeout_s": 4.0}
    hosts.moments[1] = (moment, int(signal.SIGSTOP), 2, str(mark))
    with when(mark.exists, lambda: (time.sleep(0.4), hosts.send(1, signal.SIGCONT))):
        seen = Recorder()
        run_here(load(settings), nproc=3, output=run, observer=seen, spawn=hosts)
    assert mark.exists()
    assert noticed == []
    assert [line["replied"] for line in seen.lines] == [2, 2, 2]
    assert seen.lines[1]["seconds"]["total"] > 0.4
    assert_is_first_and(3, run, settings)


# ---- kill and restart
def test_a_host_that_is_killed_again_and_again_is_back_by_the_round_after(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4, ten times: incarnation + 1 each; threads, descriptors and memory of the server stay flat."""
    servers: list[gloo.GlooServer] = []
    admit = gloo.GlooServer.admit
    monkeypatch.setattr(gloo.GlooServer, "admit", lambda self, welcome: (servers.append(self), admit(self, welcome)))
    ready: list[int] = []
    delivered = gloo.GlooServer._delivered

    def seen_ready(self: gloo.GlooServer, session: Session, frame: Frame) -> None:
        delivered(self, session, frame)
        if frame.head.type is FrameType.READY and session.rank == 1:
            ready.append(session.incarnation)

    monkeypatch.setattr(gloo.GlooServer, "_delivered", seen_ready)
    used: list[tuple[int, int, int]] = []

    def after(number: int) -> None:
        if number % 2 == 1 and number < 21:
            hosts.send(1, signal.SIGKILL)
        if number % 2 == 0 and number:
            wait_until(lambda: ready[-1] == 1 + number // 2)
            gc.collect()
            used.append((len(os.listdir("/proc/self/task")), own_descriptors(), resident()))

    settings = config()
    settings.update(algorithm={"name": "tests.own:Slow", "seconds": 0.02}, rounds=21)
    seen = Recorder(after)
    run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert servers[0]._incarnations == {1: 11, 2: 1}
    assert sum("host 1 has joined again" in w for w in seen.warnings) == 10
    present = [line["hosts"]["present"] for line in seen.lines]
    assert present[2::2] == [2] * 10, "a restarted host had no work in the round after it had joined"
    assert_is_first_and(21, tmp_path / "run", settings)
    (threads, files, memory), last = used[0], used[-1]
    # one that is just ending may be counted; of nine restarts each would leave something
    assert last[0] <= threads + 2, used
    assert last[1] <= files + 2, used
    assert last[2] - memory < 20e6


def own_descriptors() -> int:
    """Open descriptors but for pipes, of which the tests' own processes keep two each."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += not os.readlink(f"/proc/self/fd/{name}").startswith("pipe:")
    return count


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_all_hosts_killed_at_once_come_back(tmp_path: Path, hosts: Hosts) -> None:
    """F5: the round that nobody answered leaves the state as it was, and the next waits for a host."""
    run = tmp_path / "run"
    settings = config("computing")
    settings["rounds"] = 4
    for rank in (1, 2):
        hosts.moments[rank] = ("computing", int(signal.SIGKILL), 2, str(tmp_path / f"mark-{rank}"))
    seen = Recorder()
    result = run_here(load(settings), nproc=3, output=run, observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert [line["committed"] for line in seen.lines] == [True, False, True, True]
    assert any("no host is left until one is back" in w for w in seen.warnings)
    assert_is_first_and(3, run, settings)


def test_a_run_goes_on_without_half_its_hosts_and_says_so_every_round(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]]
) -> None:
    """F5: their clients move to the others."""
    run = tmp_path / "run"
    settings = config(faults={"restart": "never"})
    settings.update(clients={"num_clients": 4}, rounds=4)

    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)
            hosts.send(3, signal.SIGKILL)
            wait_until(lambda: len(noticed) == 2)

    seen = Recorder(after)
    run_here(load(settings), nproc=5, output=run, observer=seen, spawn=hosts)
    assert [line["hosts"] for line in seen.lines[1:]] == [{"present": 2, "of": 4}] * 3
    assert [line["replied"] for line in seen.lines] == [4] * 4
    assert_is_first_and(4, run, settings)


def test_a_host_killed_while_it_joins_is_started_again(tmp_path: Path, hosts: Hosts) -> None:
    """F5: during the handshake."""
    hosts.moments[1] = ("joining", int(signal.SIGKILL), 0, str(tmp_path / "mark"))
    seen = Recorder()
    result = run_here(load(config()), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert result["status"] == "finished"
    assert any("host 1 was lost while it joined (killed by SIGKILL); it is started again" in w for w in seen.warnings)
    assert [line["replied"] for line in seen.lines] == [2] * 3


@TIMED
def test_a_host_that_is_still_starting_does_not_hold_up_the_end(tmp_path: Path, hosts: Hosts) -> None:
    def after(number: int) -> None:
        if number == 1:
            hosts.moments[1] = ("asleep", 0, 0, "")  # whatever comes next
            hosts.send(1, signal.SIGKILL)

    finished: list[float] = []
    seen = Recorder(after)
    seen.finished = lambda result: finished.append(time.monotonic())  # type: ignore[method-assign]
    run_here(load(config()), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert len(hosts.all) == 3
    in_time(time.monotonic() - finished[0], 2.0)


@TIMED
def test_clients_that_wait_for_their_host_are_missing_at_once(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]]
) -> None:
    """orphans: wait. Selection does not look at membership."""

    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)
            wait_until(lambda: len(noticed) == 1)

    settings = config(faults={"restart": "never", "orphans": "wait"})
    seen = Recorder(after)
    run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert [line["selected"] for line in seen.lines] == [2] * 3
    assert [line["replied"] for line in seen.lines] == [2, 1, 1]
    assert [line["missing"] for line in seen.lines[1:]] == [{"0": "host 1 is absent"}] * 2
    in_time(max(line["seconds"]["total"] for line in seen.lines), 1.0)
    assert any("its clients wait for it" in w for w in seen.warnings)


# ---- slow clients
@TIMED
def test_a_client_three_times_slower_than_the_deadline_is_not_disconnected(tmp_path: Path, hosts: Hosts) -> None:
    """F6: its late results are booked, the ledger stays exact."""
    settings = config()
    settings.update(
        algorithm={"name": "tests.own:Slow", "seconds": 0.0, "slow_client": 0, "slow_seconds": 0.9},
        rounds=5,
        deadlines={"client_timeout_s": SILENCE_S, "round_deadline_s": 0.3},
    )
    seen = Recorder(lambda number: time.sleep(0.2))
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert not any("lost" in w for w in seen.warnings)
    assert [line["hosts"]["present"] for line in seen.lines] == [2] * 5
    reasons = {line["missing"]["0"] for line in seen.lines}
    assert reasons <= {"deadline", "host 1 is still busy with an earlier round"}
    assert [line["replied"] for line in seen.lines] == [1] * 5
    in_time(max(line["seconds"]["total"] for line in seen.lines), 0.8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "messages.jsonl").read_text().splitlines()]
    up = [r for r in rows if r["row"] == "kind" and r["direction"] == "up"]
    late = [r for r in up if r["status"] == "late"]
    assert late
    assert {r["client"] for r in late} == {0}
    assert result["bytes"]["wasted"]["late"]["up"] == sum(r["logical_bytes"] for r in late)
    delivered = [r for r in up if r["status"] == "delivered"]
    assert {r["client"] for r in delivered} == {1}
    assert result["bytes"]["logical"]["up"] == sum(r["logical_bytes"] for r in delivered)


# ---- each mechanism switched off
def test_without_heartbeats_a_stopped_host_is_not_noticed(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ControlPlane, "_check_silence", lambda self, now: None)
    monkeypatch.setattr(runner, "GOODBYE_S", 1.0)
    settings = config()
    settings["deadlines"]["round_deadline_s"] = 2.0
    _, struck = strike_at("computing", signal.SIGSTOP, tmp_path / "run", hosts, settings, STOP_LIMIT_S)
    assert not [t for _, t in noticed if t - struck <= STOP_LIMIT_S]


def test_without_the_end_of_its_connection_a_killed_host_is_noticed_by_its_silence_only(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = ControlPlane._drop

    def deaf(self: ControlPlane, connection: Any, reason: str) -> None:
        if "closed by the peer" not in reason:
            drop(self, connection, reason)

    monkeypatch.setattr(ControlPlane, "_drop", deaf)
    _, struck = strike_at("computing", signal.SIGKILL, tmp_path / "run", hosts, config(), KILL_LIMIT_S)
    assert noticed[0][1] - struck > KILL_LIMIT_S


def test_without_its_trailer_a_body_is_not_noticed_to_be_half(
    tmp_path: Path, hosts: Hosts, noticed: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that waits on the body itself hangs until the transfer's own limit."""
    waited: list[str] = []

    class Impatient:
        def __init__(self, works: list[Any]) -> None:
            self._works = works

        def wait(self, limit: Any) -> None:
            for work in self._works:
                work.wait(limit)
            waited.append("done")

    receive = Session._receive_bodies

    def without_trailer(self: Session, frame: Frame) -> None:
        if self.rank != 1 or frame.head.round != 2:
            receive(self, frame)
            return
        moments.when_half_is_there(frame, lambda: (mark.write_text(""), hosts.send(1, signal.SIGKILL)))
        group = self._pair._group
        group.recv([frame.bodies[0].flat()], 1, 0).wait(timedelta(seconds=3))

    mark = tmp_path / "mark"
    monkeypatch.setattr(Session, "_receive_bodies", without_trailer)
    monkeypatch.setattr(GlooPair, "unblock", lambda self: None)
    settings = config("mid upload")
    settings["deadlines"]["transfer_s"] = 3.0
    run_here(load(settings), nproc=3, output=tmp_path / "run", observer=Recorder(), spawn=hosts)
    assert mark.exists()
    stuck = [t for t in threading.enumerate() if t.name == "fldist-reader"]
    assert stuck, "the reader of a half body came back without a trailer"
    for thread in stuck:
        thread.join(5)


def test_without_restarts_a_killed_host_stays_away(tmp_path: Path, hosts: Hosts) -> None:
    settings = config(faults={"restart": "never"})
    settings.update(algorithm={"name": "tests.own:Slow", "seconds": 0.2}, rounds=5)
    seen = Recorder(lambda number: hosts.send(1, signal.SIGKILL) if number == 1 else None)
    run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert [line["hosts"]["present"] for line in seen.lines][2:] == [1, 1, 1]
    assert len(hosts.all) == 2


def test_states_that_nobody_can_be_asked_for_leave_a_run_without_its_hash(tmp_path: Path, hosts: Hosts) -> None:
    """A host lost before its clients had a state to lose, which wait for it in vain: the end comes all the same."""
    settings = small(
        algorithm={"name": "tests.own:Counts", "bad_round": 99},
        checkpoint={"every": 0},
        faults={"orphans": "wait", "restart": "never"},
    )
    seen = Recorder(lambda number: hosts.send(1, signal.SIGKILL) if number == 0 else None)
    result = run_here(load(settings), nproc=3, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert (result["status"], result["state_hash"]) == ("finished", None)
    assert any("no state_hash: the state of clients" in w for w in seen.warnings)
