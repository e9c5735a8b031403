"""Runs that are disturbed, for the tests of membership, of attempts and of the server's death: configurations, hosts
that nobody restarts, servers that kill themselves."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import fldist
from fldist.config import build, load
from tests.conftest import CONTEXT, in_a_process, small
from tests.warm import rank as warm_rank

SILENCE_S = 0.6
LARGE = {"name": "mlp", "hidden": [5000, 4900]}  # 100 MB


def config(moment: str = "", **changes: Any) -> dict[str, Any]:
    """Clients add 1 to the model, so after R rounds it is the first one and R."""
    return small(
        algorithm="tests.own:Base",
        rounds=3,
        clients={"num_clients": 2},
        task__model=LARGE if moment.startswith("mid") else {"name": "mlp", "hidden": [300]},
        eval__every=0,
        checkpoint={"every": 0},
        deadlines={"client_timeout_s": SILENCE_S},
        **changes,
    )


def assert_is_first_and(rounds: int, run: Path, settings: dict[str, Any]) -> None:
    first = dict(build(load(settings)).task.init_params().named())
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        assert float((tensor - first[name] - rounds).abs().max()) < 1e-4, f"half an upload is in {name}"


@contextlib.contextmanager
def when(condition: Callable[[], bool], act: Callable[[], Any], limit_s: float = 20.0) -> Iterator[None]:
    """Act once, from a thread, as soon as the condition holds."""
    stop = threading.Event()

    def wait() -> None:
        deadline = time.monotonic() + limit_s
        while not stop.is_set() and time.monotonic() < deadline:
            if condition():
                act()
                return
            time.sleep(0.001)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()



# ---- hosts and servers with agents of their own
class OwnAgents:
    """Hosts that nobody here restarts, as each of them had a supervisor; the environment is the servers'."""

    def __init__(self, settings: dict[str, Any], run: Path, moments: dict[int, tuple[Any, ...]], size: int) -> None:
        (run.parent / "hosts.json").write_text(json.dumps(settings))
        with socket.create_server(("127.0.0.1", 0)) as probe:  # two neighbouring ports that are free now
            self.port = probe.getsockname()[1]
        self.environment = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "LOCAL_WORLD_SIZE": "1",
        }  # fmt: skip
        self._arguments = (run.parent / "hosts.json", run)
        self.processes = {rank: self.start(rank, moments.get(rank)) for rank in range(1, size)}

    def start(self, rank: int, moment: tuple[Any, ...] | None = None) -> Any:
        config_file, run = self._arguments
        environment = {**self.environment, "RANK": str(rank)}
        arguments = (environment, str(config_file), str(run), moment)
        process = CONTEXT.Process(target=warm_rank, args=arguments, daemon=True)
        process.start()
        return process

    @property
    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self.processes.items()}

    def join(self) -> None:
        for rank, process in self.processes.items():
            process.join(20)
            assert process.exitcode == 0, f"host {rank} ended with {process.exitcode}"


@contextlib.contextmanager
def own_agents(
    settings: dict[str, Any], run: Path, *, moments: dict[int, tuple[Any, ...]] | None = None, size: int = 3
) -> Iterator[OwnAgents]:
    """Hosts in processes of their own; inside, this process is rank 0 of their world."""
    hosts = OwnAgents(settings, run, moments or {}, size)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**hosts.environment, "RANK": "0"}.items():
            patch.setenv(name, value)
        try:
            yield hosts
            hosts.join()
        finally:
            for process in hosts.processes.values():
                process.kill()
                process.join()


KILLS = {
    "mid broadcast": """
send = Session._send_bodies
def sending(self, frame):
    if (frame.head.type, frame.head.round) == (FrameType.CALL, ROUND):
        threading.Timer(0.002, die).start()
    send(self, frame)
Session._send_bodies = sending
""",
    "mid upload": """
Session._receive_bodies = tests.moments.halving(
    Session._receive_bodies, lambda s, f: (f.head.type, f.head.round) == (FrameType.REPLY, ROUND), die)
""",
    "aggregating": """
begin, fold, now = Caller.begin_round, Folds.add, [0]
def beginning(self, number, *rest):
    now[0] = number
    begin(self, number, *rest)
def folding(self, client, values):
    refusal = fold(self, client, values)
    if now[0] == ROUND: die()
    return refusal
Caller.begin_round, Folds.add = beginning, folding
""",
    "writing a checkpoint": """
save = checkpoint.save_file
def half(tensors, path, metadata):
    if f'round-{ROUND:06d}' in str(path):
        path.write_bytes(b'half')
        die()
    save(tensors, path, metadata=metadata)
checkpoint.save_file = half
""",
}
SERVER = """
import json, os, signal, threading
from pathlib import Path
import tests.conftest, tests.moments
from fldist.config import load
from fldist.runner import run_here
from fldist.runtime.membership import RunStopped
from fldist.runtime import checkpoint
from fldist.runtime.caller import Caller
from fldist.runtime.folding import Folds
from fldist.wire.codec import FrameType
from fldist.wire.session import Session
ROUND = {number}
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
os.environ.update({environment!r})
{kill}
settings = load(json.loads(Path({config!r}).read_text()))
run_here(settings, output={run!r}, observer=tests.conftest.Recorder(), **{options})
"""


def scaffold(rounds: int = 5, model: Any = None, **changes: Any) -> dict[str, Any]:
    return small(
        algorithm="scaffold",
        rounds=rounds,
        clients={"num_clients": 6, "fraction": 0.5},
        task={"data": "digits", "partition": {"name": "dirichlet", "alpha": 0.5}, "model": model or "mlp"},
        local={"epochs": 1, "batch_size": 64, "lr": 0.05, "momentum": 0.9},
        faults={"min_replies": "all", "on_quorum_loss": "retry"},
        **changes,
    )


def server_killed(
    tmp_path: Path, moment: str, number: int, environment: dict[str, str] | None = None, nproc: int = 1
) -> None:
    """A server in a process of its own, until it kills itself at a moment of a round."""
    program = SERVER.format(
        number=number, environment=environment or {}, kill=KILLS[moment], config=str(tmp_path / "config.json"),
        run=str(tmp_path / "run"), options=f"dict(nproc={nproc}, spawn=tests.conftest.Hosts())" if nproc > 1 else "{}",
    )  # fmt: skip
    assert in_a_process(program) == -signal.SIGKILL


def assert_undisturbed(result: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    straight = fldist.run(settings, output=tmp_path / "straight")
    assert result["state_hash"] == straight["state_hash"]
    assert result["bytes"]["logical"] == straight["bytes"]["logical"]
    assert result["bytes"]["by_kind"] == straight["bytes"]["by_kind"]
    assert result["final"] == straight["final"]


