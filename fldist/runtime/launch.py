"""Who are we and who are the others: one process, children of our own, torchrun, mpirun, or srun.

Finds rank, world size and place on the machine in the environment, starts and watches host processes, and says in
words why one ended. It opens no connection: `wire/network.py` knows addresses.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Launcher = Literal["alone", "children", "torchrun", "mpi", "srun"]
"""`srun` is Slurm's without MPI: ranks that find each other at MASTER_ADDR and talk gloo."""

log = logging.getLogger("fldist")

ENDING_S = 1.0
"""Between the end of a host's connection and that of its process; one that lasts longer is killed."""
HOST_ENVIRONMENT = "FLDIST_HOST"
"""Set for a child: `address port rank parent-pid join-seconds`; the token stands in FLDIST_TOKEN."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run. Rank 0 is the server.

    own_agents: every rank has an agent or supervisor of its own, which starts it again alone; the others live on.
    local_rank, local_size: which of how many ranks on this machine it is, as far as the launcher tells.
    """

    rank: int
    size: int
    launcher: Launcher
    own_agents: bool = False
    local_rank: int = 0
    local_size: int = 1


_PMI_LAUNCHERS = (  # rank, size, local rank, local size: Open MPI's mpirun; MPICH's, and Slurm's --mpi=pmi2
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def find_world() -> World:
    """Read rank, world size and local rank from the environment that torchrun, mpirun or srun made.

    ValueError where a variable that should be a number is none.
    """
    env = os.environ
    task = _slurm_task(env)
    place = _slurm_place(env)
    by_address = {"MASTER_ADDR", "MASTER_PORT"} <= set(env)
    if "TORCHELASTIC_RUN_ID" in env or (by_address and {"RANK", "WORLD_SIZE"} <= set(env)):
        own_agents = env.get("LOCAL_WORLD_SIZE", "1") == "1"
        # srun may have started several agents on this machine, each of which counts its own ranks from 0
        mine, here = _number(env, "LOCAL_RANK", 0), _number(env, "LOCAL_WORLD_SIZE", 1)
        local = (place[0] * here + mine, place[1] * here)
        return World(_number(env, "RANK"), _number(env, "WORLD_SIZE"), "torchrun", own_agents, *local)
    for rank, size, local_rank, local_size in _PMI_LAUNCHERS:
        if rank in env and size in env:
            found = (_number(env, rank), _number(env, size))
            if rank == "PMI_RANK" and "SLURM_STEP_ID" in env and (found[1] == 1 or (found == task and by_address)):
                break  # only Slurm's default: one task is no MPI job, and who names an address wants to be found there
            if local_rank in env:
                place = (_number(env, local_rank), _number(env, local_size, 1))
            return World(*found, "mpi", False, *place)
    if task is not None:
        # with --mpi=pmix the MPI library asks Slurm; what it answers is compared with this when the run begins
        return World(*task, "srun" if by_address else "mpi", False, *place)
    return World(0, 1, "alone")


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"{name}: {text!r} is no number; it is set by what starts the ranks (torchrun, mpirun, srun)")
    return int(text)


def _slurm_task(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and size of a step of several tasks that srun started; None in a batch script or an interactive shell."""
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    # in an interactive shell SLURM_NTASKS is the allocation's, though the shell is alone in its step
    size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)
    return (_number(env, "SLURM_PROCID"), size) if size > 1 else None


def _slurm_place(env: Mapping[str, str]) -> tuple[int, int]:
    """Which of how many tasks on its machine a task of a step is; (0, 1) where srun did not start it."""
    if "SLURM_STEP_ID" not in env or "SLURM_LOCALID" not in env:
        return 0, 1
    local_rank = _number(env, "SLURM_LOCALID")
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):  # such as 2(x3),1
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: {part!r} is no number of tasks; it is set by srun")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return local_rank, max(local_rank + 1, counts[node] if node < len(counts) else 1)


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
