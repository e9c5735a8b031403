"""MPI with ULFM: a host's death is noticed at any moment, costs nobody else anything, and the host is replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_launch import BIN, ROOT, config, kill_a_host_after_a_round, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")

# replacements are jobs of their own to mpirun: without this it ends with 137 when one of them was killed
RECOVERABLE = ["--prtemca", "state_base_recoverable", "1"]


def mpirun(ranks: int, *program: str) -> list[str]:
    launcher = shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}")
    assert launcher is not None, "the test extra brings mpirun"
    flags = ["--with-ft", "ulfm", *RECOVERABLE, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    return [launcher, *flags, "-n", str(ranks), sys.executable, *program]


def run(command: list[str], timeout_s: float, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True, cwd=ROOT
    )
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        for pid in of_job(process.pid):
            os.kill(pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"{command} lasted over {timeout_s} s:\n{out}")
    done = subprocess.CompletedProcess(command, process.returncode, out, "")
    done.left = eventually_none(process.pid)  # type: ignore[attr-defined]
    return done


def of_job(mpirun_pid: int) -> list[int]:
    """The processes that an mpirun started, spawned ones and orphans included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        names = [e for e in environment if e.startswith(b"PMIX_NAMESPACE=")]
        if names and names[0].partition(b"@")[0].endswith(f"-{mpirun_pid}".encode()):
            found.append(int(entry.name))
    return found


def eventually_none(mpirun_pid: int) -> list[int]:
    deadline = time.monotonic() + 1.0
    while (left := of_job(mpirun_pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One job with all deaths and replacements; what its server saw."""
    directory = tmp_path_factory.mktemp("scenes")
    done = run(mpirun(7, str(ROOT / "tests" / "ulfm_scenes.py"), str(directory)), 100)
    assert (directory / "seen.json").exists(), done.stdout
    seen: dict[str, Any] = json.loads((directory / "seen.json").read_text())
    assert set(seen["scenes"]) == {"many_deaths", "in_a_row", "stopped", "failing_starts", "the_real_one"}, done.stdout
    return {**seen, "returncode": done.returncode, "left": done.left, "out": done.stdout}  # type: ignore[attr-defined]


def named(death: dict[str, Any]) -> str:
    return f"{death['moment']} (incarnation {death['incarnation']})"


def test_a_death_is_noticed_at_once_at_any_moment(scenes: dict[str, Any]) -> None:
    assert scenes["survives"] == "MPI with ULFM: a host may die, and the server can start a replacement"
    assert {(d["moment"], d["incarnation"]) for d in scenes["deaths"]} >= {
        (moment, incarnation) for moment in ("idle", "download", "compute", "upload", "head") for incarnation in (1, 2)
    }
    for death in scenes["deaths"]:
        assert death["reason"] == "its process died", named(death)
        # a copy out of a rank's memory that has begun is finished first, and may even be complete
        limit = 0.4 if death["moment"] == "upload" and death["incarnation"] == 1 else 0.2
        assert death["noticed_s"] < limit, named(death)


def test_a_death_costs_the_dead_host_only(scenes: dict[str, Any]) -> None:
    quiet = scenes["quiet"][len(scenes["quiet"]) // 2]
    for death in scenes["deaths"]:
        assert death["times_lost"] == 1, named(death)
        assert death["others_lost"] == [], named(death)
        # 10 ms: seven ranks share two cores, and a replacement that starts takes one of them for a while
        assert death["trips"][len(death["trips"]) // 2] < 2 * quiet + 0.01, named(death)
        assert death["trips"][-1] < 1.0, named(death)  # one may fall into the start of several replacements


def test_what_was_on_its_way_is_dropped(scenes: dict[str, Any]) -> None:
    for death in scenes["deaths"]:
        assert death["half"] == 0, named(death)
        if death["moment"] == "download":
            assert death["acknowledged"] == 0, "it was not killed in the middle"
        if death["moment"] == "upload" and death["incarnation"] > 1:
            assert death["received"] == 0, "it was not killed in the middle"
        assert (death["unsent"], death["sending"]) in ((0, 0), (1, 0)), named(death)  # 1: rank 1's next call
        assert death["refused"], named(death)


def test_lost_hosts_are_replaced_several_at_once_and_again_and_again(scenes: dict[str, Any]) -> None:
    assert scenes["first"] == {str(rank): 1 for rank in range(1, 7)}
    for again in [*scenes["respawns"], *scenes["row"], scenes["stopped"]]:
        assert again["joined"]
        assert again["answered"]
        assert again["respawn_took_s"] < 0.05, "respawn must not block"
        assert again["after"] == {rank: number + 1 for rank, number in again["before"].items()}
        assert set(again["first"]) == {"Joined"}, "nothing of an old incarnation may come after it"
        assert again["stray"] == []
    assert len(scenes["respawns"][0]["ranks"]) == 5


def test_replacing_leaves_nothing_behind_at_the_server(scenes: dict[str, Any]) -> None:
    usages = [again["usage"] for again in scenes["row"]]
    for usage in usages:
        assert usage["own_threads"] == ["MainThread", "fldist-mpi"]
        assert usage["receivers"] <= min(len(os.sched_getaffinity(0)), 6)
        assert usage["threads"] == usages[0]["threads"]
        assert usage["descriptors"] == usages[0]["descriptors"]
    # less than one of the 100 MB transfers that were cut off in between
    assert usages[-1]["rss"] - usages[0]["rss"] < 60e6


def test_a_stopped_host_is_lost_after_its_silence_and_ends_when_it_is_replaced(scenes: dict[str, Any]) -> None:
    assert scenes["stopped"]["reason"] == "silent for 2 s"
    assert scenes["stopped"]["noticed_s"] < 2.0 + 0.5
    assert not scenes["stopped"]["still_there"]


def test_a_replacement_that_does_not_start_is_given_up(scenes: dict[str, Any]) -> None:
    before_mpi, before_joining = scenes["failing"]
    assert before_mpi["reason"] == "its replacement did not start within 1 s"
    assert before_mpi["took_s"] < 1.5
    assert before_joining["reason"] in ("its process died", "silent for 20 s")
    for failed in scenes["failing"]:
        assert failed["trips"][-1] < 1.0


def test_a_host_that_the_server_spawned_is_a_host_like_others(scenes: dict[str, Any]) -> None:
    assert scenes["real"]["joined"]
    assert scenes["real"]["incarnation"] == scenes["stopped"]["after"]["2"] + 2  # one started and died while it joined
    assert "rank 2: joined from" in scenes["real"]["log"]


def test_the_job_ends_well_and_leaves_nothing_also_with_a_replacement_on_its_way(scenes: dict[str, Any]) -> None:
    assert scenes["returncode"] == 0, scenes["out"]
    assert scenes["all_left"]
    assert scenes["close_s"] < 9.0
    assert scenes["left"] == []
    assert [file for file in scenes["files"] if Path(file).exists()] == []
    assert any("sm_segment" in file for file in scenes["files"])


def test_hosts_end_when_the_server_dies(tmp_path: Path) -> None:
    command = mpirun(3, str(ROOT / "tests" / "ulfm_scenes.py"), str(tmp_path))
    done = run(command, 40, ULFM_END="server dies")
    assert done.returncode != 0
    assert done.stdout.count("host: the server is gone: its process died") == 2, done.stdout
    assert done.left == []  # type: ignore[attr-defined]


def test_a_host_that_ends_with_an_exit_code_is_lost_after_its_silence(tmp_path: Path) -> None:
    """MPI tells nobody of it, and MPI_Finalize would wait for it."""
    done = run(mpirun(3, str(ROOT / "tests" / "ulfm_scenes.py"), str(tmp_path)), 40, ULFM_END="host exits")
    assert "the server has ended" in done.stdout
    assert done.returncode == 7
    assert done.left == []  # type: ignore[attr-defined]


def test_a_killed_host_is_replaced_while_the_run_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, config("tests.own:Slow", rounds=9))
    command = mpirun(3, "-m", "fldist", "run", path, "--output", str(tmp_path / "run"))
    code, out = kill_a_host_after_a_round(command, tmp_path / "run", "OMPI_COMM_WORLD_RANK=2")
    assert code == 0, out
    assert "host 2 lost (its process died)" in out
    assert "host 2 has joined again" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("finished", 9)
    log = (tmp_path / "run" / "rank-2.log").read_text()
    assert log.count("rank 2: joined from") == 2
    assert log.rstrip().endswith("rank 2: done")
