"""What many tests share: small configurations, warm host processes, and a check that nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.needs import skipped_all_the_same

torch.set_num_threads(1)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm"])


def pytest_configure(config: pytest.Config) -> None:
    """Decoded data sets of the tests lie in a folder of their own, also for the processes that tests start."""
    if "FLDIST_CACHE" not in os.environ:
        os.environ["FLDIST_CACHE"] = str(config.rootpath / ".test-cache")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where FLDIST_REQUIRE_DATA is set, a test may not be skipped for want of data that are there."""
    report = yield
    if report.skipped and os.environ.get("FLDIST_REQUIRE_DATA") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if skipped_all_the_same(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped although the data are there: {reason}"
    return report


class TooSlow(AssertionError):
    """A limit in seconds of real time was not kept."""


def in_time(took_s: float, limit_s: float) -> None:
    """Assert that something did not take longer."""
    if took_s > limit_s:
        raise TooSlow(f"{took_s:.2f} s, and {limit_s:g} s is the limit")


TIMED = pytest.mark.flaky(reruns=2, only_rerun=["TooSlow"])
"""For tests that call `in_time` with a limit so tight that a machine busy with other work may not keep it; nothing else
is to carry it. Only a limit of real time is tried again, never another failure: a result, a thread or process that is
left, an error fails at once, since chance in these is a fault of the program or of the test."""


def small(**changes: Any) -> dict[str, Any]:
    """A configuration that runs in a fraction of a second; `section__key=value` changes it."""
    config: dict[str, Any] = {
        "name": "small",
        "rounds": 2,
        "clients": {"num_clients": 6},
        "task": {"data": "digits", "partition": "iid", "model": {"name": "mlp", "hidden": [8]}},
        "local": {"epochs": 1, "batch_size": 64, "lr": 0.05},
        "algorithm": {"name": "fedavg"},
    }
    for key, value in changes.items():
        at = config
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return config


class WarmProcess:
    """A host forked from a process that has imported everything already; looks like a Popen."""

    def __init__(
        self, address: tuple[str, int], rank: int, token: str, log: Path, join_s: float, moment: Any = None
    ) -> None:
        from tests.warm import host

        arguments = (address, rank, token, str(log), join_s, moment)
        self.process = CONTEXT.Process(target=host, args=arguments, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("host", timeout or 0.0)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


class Hosts:
    """A `spawn` for run_here that remembers its processes. moments: what happens to which rank, see `moments.py`."""

    def __init__(self) -> None:
        self.processes: dict[int, WarmProcess] = {}  # the newest of each rank
        self.all: list[WarmProcess] = []
        self.moments: dict[int, tuple[Any, ...]] = {}

    def __call__(self, address: tuple[str, int], rank: int, token: str, log: Path, join_s: float) -> WarmProcess:
        self.processes[rank] = WarmProcess(address, rank, token, log, join_s, self.moments.get(rank))
        self.all.append(self.processes[rank])
        return self.processes[rank]

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)


def in_a_process(program: str) -> int | None:
    """The exit code of a program in a process of its own, forked from one that has imported everything."""
    from tests.warm import program as warm_program

    process = CONTEXT.Process(target=warm_program, args=(program,))
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def mean_variate(run: Path, num_clients: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The server's variate and the mean of the clients' (0 where one never took part), in float64."""
    from fldist.runtime.checkpoint import Checkpoints, ClientFiles

    found = Checkpoints(run / "checkpoints").newest()
    assert found is not None
    _, values, facts, _ = found
    files = ClientFiles(run / "clients")
    total = torch.zeros(values["c"].floats.numel(), dtype=torch.float64)
    for client, version in facts["versions"].items():
        total += files.read(int(client), version)["c"].floats.double()
    return values["c"].floats.double(), total / num_clients


class Recorder:
    """An observer that keeps what it sees and calls back after a round."""

    def __init__(self, after_round: Callable[[int], None] = lambda number: None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._after_round = after_round

    def started(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._after_round(0)

    def round(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._after_round(line["round"])

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def finished(self, result: dict[str, Any]) -> None:
        self.result = result

    def stopped(self, text: str) -> None:
        self.text = text


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    for process in made.all:
        assert process.poll() is not None, "a host outlived its run"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread of ours survives a test; one that another test left is that test's failure alone."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5.0  # they need milliseconds, where nothing else runs
    while time.monotonic() < deadline:
        left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith("fldist-")]
        if not left:
            return
        time.sleep(0.02)
    pytest.fail(f"threads left: {left}")
