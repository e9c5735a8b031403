"""Who are we and who are the others: one process, children of our own, torchrun, or mpirun.

Finds rank and world size in the environment, starts and watches host processes, and says in words why one ended.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Launcher = Literal["alone", "children", "torchrun", "mpi"]

log = logging.getLogger("fldist")

ENDING_S = 1.0
"""Between the end of a host's connection and that of its process; one that lasts longer is killed."""
HOST_ENVIRONMENT = "FLDIST_HOST"
"""Set for a child: `address port rank parent-pid join-seconds`; the token stands in FLDIST_TOKEN."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run. Rank 0 is the server.

    own_agents: every rank has an agent or supervisor of its own, which starts it again alone; the others live on.
    """

    rank: int
    size: int
    launcher: Launcher
    own_agents: bool = False


def find_world() -> World:
    """Read rank and world size from the environment that torchrun or mpirun (srun) made."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
        own_agents = env.get("LOCAL_WORLD_SIZE", "1") == "1"
        return World(int(env["RANK"]), int(env["WORLD_SIZE"]), "torchrun", own_agents)
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if rank in env and size in env:
            return World(int(env[rank]), int(env[size]), "mpi")
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), "mpi")
    return World(0, 1, "alone")


class HostProcess(Protocol):
    """A host's process, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Process id."""

    def poll(self) -> int | None:
        """The exit code (minus the signal that killed it), or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired when it lasts longer."""

    def kill(self) -> None:
        """Send SIGKILL."""


Address = tuple[str, int]
Spawn = Callable[[Address, int, str, Path, float], HostProcess]
"""Starts a host: the server's address, the host's rank, the run's token, the log file, seconds to join in."""


def spawn_host(address: Address, rank: int, token: str, log: Path, join_s: float) -> HostProcess:
    """Start a host as a child of this process, in a fresh interpreter."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fldist", "_host"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **host_environment(address, rank, token, join_s)},
        )


class Unsupervised:
    """Hosts that somebody else started: nothing is known of their ends but what the link saw.

    survives_loss: whether the others live on when one dies; returns: whether whoever started them starts them again.
    """

    def __init__(self, *, survives_loss: bool, returns: bool = False) -> None:
        self.survives_loss = survives_loss
        self._returns = returns

    def explain(self, rank: int, reason: str) -> str:
        """What the link saw."""
        return reason

    def killed(self, rank: int) -> bool:
        """What comes back may as well have been killed."""
        return self._returns

    def restart(self, rank: int) -> bool:
        """Nothing to do: it is started again, or it is not."""
        return self._returns


class Spawned(Unsupervised):
    """The hosts of an MPI job whose server can spawn others in their place (`respawn`). restart: whether it does."""

    def __init__(self, respawn: Callable[[int], None], restart: bool) -> None:
        super().__init__(survives_loss=True, returns=restart)
        self._respawn = respawn

    def restart(self, rank: int) -> bool:
        """Have another one spawned."""
        if self._returns:
            self._respawn(rank)
        return self._returns


class Children:
    """The hosts that this process has started. restart: whether one that has died is started again."""

    survives_loss = True

    def __init__(
        self,
        address: Address,
        token: str,
        logs: Path,
        join_s: float,
        spawn: Spawn = spawn_host,
        *,
        restart: bool = True,
    ) -> None:
        self._processes: dict[int, HostProcess] = {}
        self._spawn = spawn
        self._arguments = (address, token, logs, join_s)
        self._restart = restart

    def start(self, ranks: Iterable[int]) -> None:
        """Start these hosts."""
        address, token, logs, join_s = self._arguments
        for rank in ranks:
            self._processes[rank] = self._spawn(address, rank, token, logs / f"rank-{rank}.log", join_s)

    def killed(self, rank: int) -> bool:
        """Whether a host was ended by a signal."""
        return (self._processes[rank].poll() or 0) < 0

    def restart(self, rank: int) -> bool:
        """Start a host that has ended again."""
        if not self._restart:
            return False
        try:
            self.start([rank])
        except OSError as error:  # no memory or no process to be had: the run goes on without this host
            log.warning("host %d cannot be started again: %s", rank, error)
            return False
        return True

    def explain(self, rank: int, reason: str) -> str:
        """Why a host has ended, from its exit code; an empty text while it lives and `reason` is empty.

        reason: why the link lost it. A lost host that still lives (stopped, or cut off) is killed.
        """
        process = self._processes[rank]
        if reason:
            # the link notices an end before the process has quite ended; one that fell silent will not end
            try:
                process.wait(0.0 if "silent" in reason else ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return f"{reason}; its process has been killed"
        code = process.poll()
        if code is None:
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}; its last words are in rank-{rank}.log"

    def stop(self, deadline_s: float, joined: Container[int]) -> None:
        """Wait for all to end, then kill who has not; one that has not joined has nothing to wait for."""
        deadline = time.monotonic() + deadline_s
        for rank, process in self._processes.items():
            if rank not in joined:
                process.kill()
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def host_environment(address: Address, rank: int, token: str, join_s: float) -> dict[str, str]:
    """What a host finds in its environment."""
    return {HOST_ENVIRONMENT: f"{address[0]} {address[1]} {rank} {os.getpid()} {join_s}", "FLDIST_TOKEN": token}


def own_host_environment() -> tuple[Address, int, str, float]:
    """Server's address, rank, token and limit on joining of this host; ends with its parent, leaves Ctrl-C to it."""
    text = os.environ.get(HOST_ENVIRONMENT)
    if text is None:
        raise ValueError("`fldist _host` is started by `fldist run --nproc`, not by hand")
    address, port, rank, parent, join_s = text.split()
    die_with_parent(int(parent))
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to a whole group of processes: the server ends the run
        signal.signal(number, signal.SIG_IGN)
    return (address, int(port)), int(rank), os.environ["FLDIST_TOKEN"], float(join_s)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere the closed link ends it)."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
