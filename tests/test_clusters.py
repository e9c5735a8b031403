"""The scripts for clusters, run on this machine: torchrun as two nodes on loopback, mpirun with a host file, and the
Slurm scripts against stand-ins for Slurm's commands; and what the environment of each launcher means.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fldist
from fldist.config import ConfigError, load
from fldist.runner import choose_backend, run_here
from fldist.runtime import membership
from fldist.runtime.device import gpu_of
from fldist.runtime.launch import World, find_world
from fldist.runtime.output import VARIABLES, Output
from fldist.wire import network
from fldist.wire.gloo import GlooHost, GlooServer
from fldist.wire.link import Joined, Limits, Welcome
from tests.conftest import Hosts, Recorder, small
from tests.fake_slurm import JOB, install

ROOT = Path(__file__).parents[1]
SCRIPTS = ("torchrun-nodes.sh", "mpirun-hosts.sh", "slurm-mpi.sbatch", "slurm-torchrun.sbatch")
LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "MPI_LOCAL", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GLOO_")


def clean(**more: str) -> dict[str, str]:
    """This process's environment without any launcher's, and the python that runs the tests."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return {**own, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def free_ports() -> str:
    """A port that is free, as is the next one."""
    for port in range(21000 + os.getpid() % 5000, 32000, 2):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return str(port)
        except OSError:
            continue
    raise AssertionError("no free ports")


def start(command: list[str], env: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    """In a process group of its own, so that `end` leaves nothing."""
    return subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str], timeout_s: float = 90) -> tuple[int, str]:
    """Exit code and all that it has printed."""
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"{process.args} lasted over {timeout_s} s:\n{out}")
    return process.returncode, out


def write(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small(**changes)))
    return str(path)


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def environment_of(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return facts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fldist.run(small(), output=tmp_path_factory.mktemp("alone") / "run")


# ---- scripts
@pytest.mark.parametrize("name", [*SCRIPTS, "cluster.sh"])
def test_a_script_is_bash_and_explains_itself(name: str) -> None:
    path = ROOT / "launch" / name
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    text = path.read_text()
    if name != "cluster.sh":
        assert "\nset -euo pipefail\n" in text
        explained = text[: text.index("\nset -euo pipefail\n")]
        for variable in ("OUTPUT", "PYTHON"):
            assert f"#   {variable} " in explained
        assert '"$@"' in text


@pytest.mark.parametrize(
    ("name", "arguments", "env", "says"),
    [
        ("torchrun-nodes.sh", [], {}, "torchrun-nodes.sh: give a configuration"),
        ("torchrun-nodes.sh", ["x"], {}, "set NNODES to the number of machines (or HOSTS to their names)"),
        ("torchrun-nodes.sh", ["x"], {"NNODES": "2"}, "set NODE_RANK to the number of this machine, from 0"),
        ("torchrun-nodes.sh", ["x"], {"NNODES": "2", "NODE_RANK": "0"}, "set MASTER_ADDR to the name or address"),
        ("torchrun-nodes.sh", ["x"], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "PYTHON": "none"},
         "PYTHON: none is no program"),
        ("mpirun-hosts.sh", ["x"], {}, "set HOSTFILE to a file with a line `NAME slots=N`"),
        ("mpirun-hosts.sh", ["x"], {"HOSTFILE": "/none"}, "HOSTFILE: /none cannot be read"),
        ("slurm-mpi.sbatch", ["x"], {}, "start it with sbatch, from the checkout"),
        ("slurm-torchrun.sbatch", ["x"], {}, "start it with sbatch, from the checkout"),
        ("slurm-mpi.sbatch", [], {"SLURM_SUBMIT_DIR": str(ROOT)}, "slurm-mpi.sbatch: give a configuration"),
    ],
)  # fmt: skip
def test_a_script_says_what_it_lacks(name: str, arguments: list[str], env: dict[str, str], says: str) -> None:
    command = ["bash", str(ROOT / "launch" / name), *arguments]
    done = subprocess.run(command, env=clean(**env), capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    assert says in done.stderr


def test_torchrun_on_two_nodes(tmp_path: Path, alone: dict[str, Any]) -> None:
    """Run once per node; two nodes on loopback, an agent a rank."""
    settings = clean(
        NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_ports(), OUTPUT=str(tmp_path / "run"),
    )  # fmt: skip
    command = ["bash", str(ROOT / "launch" / "torchrun-nodes.sh"), write(tmp_path)]
    nodes = [start(command, {**settings, "NODE_RANK": str(i)}, tmp_path) for i in range(2)]
    for code, out in map(end, nodes):
        assert code == 0, out
    result = result_of(tmp_path / "run")
    assert (result["backend"], result["world_size"]) == ("gloo", 2)
    assert result["state_hash"] == alone["state_hash"]
    facts = environment_of(tmp_path / "run")
    assert facts["variables"]["MASTER_ADDR"] == "127.0.0.1"
    assert facts["hosts"] == {"1": {"hostname": socket.gethostname(), "device": "cpu"}}


def test_torchrun_on_two_nodes_over_ssh(tmp_path: Path, alone: dict[str, Any]) -> None:
    """The script starts itself on every machine: two ranks on each, which get the variables that they need."""
    fake = install(tmp_path / "bin")
    env = clean(
        PATH=f"{fake}:{os.environ['PATH']}", FAKE_SLURM=str(fake), HOSTS="127.0.0.1 127.0.0.1", PER_NODE="2",
        MASTER_PORT=free_ports(), OUTPUT=str(tmp_path / "with a space"),
    )  # fmt: skip
    code, out = end(start(["bash", str(ROOT / "launch" / "torchrun-nodes.sh"), write(tmp_path), "seed=0"], env))
    assert code == 0, out
    assert (fake / "asked").read_text() == "ssh 127.0.0.1\n" * 2
    result = result_of(tmp_path / "with a space")
    assert result["world_size"] == 4
    assert result["state_hash"] == alone["state_hash"]


def test_a_failure_on_one_of_the_nodes_is_the_scripts(tmp_path: Path) -> None:
    fake = install(tmp_path / "bin")
    env = clean(PATH=f"{fake}:{os.environ['PATH']}", FAKE_SLURM=str(fake), HOSTS="127.0.0.1", PYTHON="none")
    code, out = end(start(["bash", str(ROOT / "launch" / "torchrun-nodes.sh"), "x"], env))
    assert code == 2
    assert "PYTHON: none is no program" in out


def test_mpirun_with_a_host_file(tmp_path: Path, alone: dict[str, Any]) -> None:
    (tmp_path / "hosts").write_text("# the server's machine first\n\nlocalhost slots=3\n")
    env = clean(HOSTFILE=str(tmp_path / "hosts"), OVERSUBSCRIBE="1", OUTPUT=str(tmp_path / "run"))
    code, out = end(start(["bash", str(ROOT / "launch" / "mpirun-hosts.sh"), write(tmp_path)], env))
    assert code == 0, out
    result = result_of(tmp_path / "run")
    assert (result["backend"], result["world_size"]) == ("mpi", 3)
    assert result["state_hash"] == alone["state_hash"]
    facts = environment_of(tmp_path / "run")
    assert facts["mpi"].startswith("Open MPI v")
    assert set(facts["hosts"]) == {"1", "2"}


def test_usr1_ends_an_mpi_run_in_good_order_with_138(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    run = tmp_path / "run"
    env = clean(HOSTFILE=str(tmp_path / "hosts"), OVERSUBSCRIBE="1", OUTPUT=str(run))
    command = ["bash", str(ROOT / "launch" / "mpirun-hosts.sh"), write(tmp_path, rounds=100000)]
    process = start(command, env)
    wait_for_rounds(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    code, out = end(process)
    assert code == 138, out
    assert result_of(run)["status"] == "interrupted"


def wait_for_rounds(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    rounds = run / "rounds.jsonl"
    while not (rounds.exists() and len(rounds.read_text().splitlines()) >= count):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"the run does not begin: {process.communicate()[0]}")
        time.sleep(0.05)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("script", "agents", "launcher", "per_node"),
    [
        ("slurm-mpi.sbatch", "", "mpirun", 1),
        ("slurm-torchrun.sbatch", "rank", "torchrun", 1),
        ("slurm-torchrun.sbatch", "node", "torchrun", 2),
        ("slurm-torchrun.sbatch", "none", "srun", 1),
    ],
)
def test_a_job_that_slurm_interrupts_is_requeued_and_goes_on(
    tmp_path: Path, script: str, agents: str, launcher: str, per_node: int
) -> None:
    """Two nodes. The job is told of its end in the middle, comes again, and finishes as one that was never told."""
    fake = install(tmp_path / "bin")
    run = tmp_path / "run"
    config = write(tmp_path, rounds=12, algorithm={"name": "tests.own:Slow", "seconds": 0.05})
    env = clean(
        PATH=f"{fake}:{os.environ['PATH']}", FAKE_SLURM=str(fake), OUTPUT=str(run), MASTER_PORT=free_ports(),
        **({"AGENTS": agents} if agents else {}),
    )  # fmt: skip
    options = [f"--ntasks-per-node={per_node}"]
    process = start([str(fake / "sbatch"), *options, str(ROOT / "launch" / script), config], env)
    wait_for_rounds(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    code, out = end(process, 180)
    assert code == 0, out
    asked = (fake / "asked").read_text()
    assert asked.count(f"scontrol requeue {JOB}") == 1
    assert asked.count("srun --mpi=") == 2
    assert "ended by SIGUSR1" in out
    assert "continued after round" in out
    result = result_of(run)
    assert (result["status"], result["rounds"], result["world_size"]) == ("finished", 12, 2 * per_node)
    straight = fldist.run(load(config, ["algorithm.seconds=0.0"]), output=tmp_path / "straight")
    assert result["state_hash"] == straight["state_hash"]
    facts = environment_of(run)
    assert facts["launcher"] == launcher
    assert facts["variables"]["SLURM_JOB_ID" if launcher != "mpirun" else "SLURM_STEP_ID"]


@pytest.mark.parametrize("script", ["slurm-mpi.sbatch", "slurm-torchrun.sbatch"])
def test_a_job_that_fails_by_itself_is_not_requeued(tmp_path: Path, script: str) -> None:
    fake = install(tmp_path / "bin")
    env = clean(PATH=f"{fake}:{os.environ['PATH']}", FAKE_SLURM=str(fake), OUTPUT=str(tmp_path / "run"), AGENTS="none")
    code, out = end(
        start(
            [str(fake / "sbatch"), "--ntasks-per-node=1", str(ROOT / "launch" / script), write(tmp_path), "rouns=3"],
            env,
        )
    )
    assert code != 0
    assert "rouns" in out
    assert "requeue" not in (fake / "asked").read_text()


# ---- what the environment says
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}  # fmt: skip
ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 1, "alone")),
        (TORCHRUN | ADDRESS, World(5, 8, "torchrun", False, 1, 4)),
        (TORCHRUN | ADDRESS | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World(5, 8, "torchrun", True, 0, 1)),
        # a torchrun a rank, a torchrun a node, started by srun
        (TORCHRUN | ADDRESS | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"} | STEP, World(5, 8, "torchrun", True, 1, 2)),
        (TORCHRUN | ADDRESS | STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"},
         World(5, 8, "torchrun", False, 1, 4)),
        # a torchrun in a batch script: the job's numbers are not those of a step
        (TORCHRUN | ADDRESS | {"SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "7"},
         World(5, 8, "torchrun", False, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, World(1, 2, "torchrun", True, 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **STEP, **ADDRESS}, World(3, 6, "mpi", False, 1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "6", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "3"},
         World(3, 6, "mpi", False, 0, 3)),
        # MPICH's mpiexec within a job: the step is that of its proxies, one a node
        ({"PMI_RANK": "3", "PMI_SIZE": "6", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "3", **STEP},
         World(3, 6, "mpi", False, 0, 3)),
        (STEP | {"PMIX_RANK": "3"}, World(3, 5, "mpi", False, 1, 2)),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "5"}, World(3, 5, "mpi", False, 1, 2)),
        (STEP | ADDRESS, World(3, 5, "srun", False, 1, 2)),
        # a Slurm whose default is an MPI of its own, and ranks that are to meet at an address
        (STEP | ADDRESS | {"PMIX_RANK": "3"}, World(3, 5, "srun", False, 1, 2)),
        (STEP | ADDRESS | {"PMI_RANK": "3", "PMI_SIZE": "5"}, World(3, 5, "srun", False, 1, 2)),
        # one task; a batch script; an interactive shell, whose SLURM_NTASKS is the allocation's
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0", "PMI_SIZE": "1"}, World(0, 1, "alone")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "5", "SLURM_LOCALID": "0"}, World(0, 1, "alone")),
        (STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, World(0, 1, "alone")),
    ],
)  # fmt: skip
def test_the_world_that_an_environment_means(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], world: World
) -> None:
    alone_in(monkeypatch, env)
    assert find_world() == world


def alone_in(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    """Have these variables of launchers and no others."""
    for name in [n for n in os.environ if n.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (TORCHRUN | ADDRESS | {"RANK": "one"}, "RANK: 'one' is no number; it is set by what starts the ranks"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, r"SLURM_STEP_TASKS_PER_NODE: '2\(y2\)' is no number of tasks"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], says: str) -> None:
    alone_in(monkeypatch, env)
    with pytest.raises(ValueError, match=says):
        find_world()


def test_ranks_under_srun_talk_gloo_and_nothing_else() -> None:
    world = World(0, 3, "srun")
    assert choose_backend(load(small()), world, 1) == "gloo"
    with pytest.raises(ConfigError, match="backend: mpi does not go with srun; use backend=gloo or auto"):
        choose_backend(load(small(backend="mpi")), world, 1)


def test_an_mpi_library_that_does_not_understand_its_launcher_is_told_of(tmp_path: Path) -> None:
    """As under srun without --mpi=pmix: every rank would be a world of its own."""
    command = [sys.executable, "-m", "fldist", "run", write(tmp_path), "--output", str(tmp_path / "run")]
    env = clean(**STEP) | {"SLURM_PROCID": "0", "OMPI_MCA_btl": "self"}
    code, out = end(start(command, env))
    assert code == 2
    assert "5 ranks were started, but the MPI library knows 1 of them" in out
    assert "srun --mpi=pmix" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("num_gpus", "local_size"), [(1, 1), (1, 5), (2, 3), (4, 5), (4, 4), (4, 9), (8, 3)])
def test_no_gpu_has_two_ranks_more_than_another(num_gpus: int, local_size: int) -> None:
    taken = [gpu_of(rank, local_size, num_gpus) for rank in range(local_size)]
    counts = [taken.count(gpu) for gpu in range(num_gpus)]
    assert sum(counts) == local_size
    assert max(counts) - min(counts) <= 1
    assert taken[0] == 0, "the server's"
    hosts = [taken[1:].count(gpu) for gpu in range(num_gpus)]
    assert max(hosts) - min(hosts) <= 1, "nor has one two hosts more"


def test_a_gpu_for_nobody() -> None:
    with pytest.raises(ValueError, match="num_gpus: 0; there is no GPU to take"):
        gpu_of(0, 1, 0)
    with pytest.raises(ValueError, match="local_rank: 2 is none of the 2 ranks of this machine"):
        gpu_of(2, 2, 4)


# ---- networks
TWO = {"lo": ["127.0.0.1", "::1"], "down": [], "eth0": ["10.0.0.2", "fd00::2"], "ib0": ["10.1.0.2"], "six": ["fd01::2"]}
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def two_networks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(network, "interfaces", lambda: TWO)
    return monkeypatch


@pytest.mark.parametrize(
    ("value", "family", "only", "address"),
    [
        ("ib0", V4, False, "10.1.0.2"),
        ("eth0", V4, False, "10.0.0.2"),
        ("eth0", V6, False, "fd00::2"),
        ("nope, ib0", V4, True, "10.1.0.2"),
        ("down,ib0", V4, True, "10.1.0.2"),
        ("ib0,eth0", V6, True, "fd00::2"),
        ("six", V4, False, "fd01::2"),
        ("", V4, False, None),
        (" , ", V4, False, None),
    ],
)
def test_the_interface_that_the_variable_names(
    two_networks: pytest.MonkeyPatch, value: str, family: socket.AddressFamily, only: bool, address: str | None
) -> None:
    two_networks.setenv(network.VARIABLE, value)
    assert network.chosen_address(family, only=only) == address


@pytest.mark.parametrize(
    ("value", "family", "says"),
    [
        ("eth1", V4, "GLOO_SOCKET_IFNAME: eth1: there is no such interface here; name one.*eth0 10.0.0.2, fd00::2"),
        ("down", V4, "GLOO_SOCKET_IFNAME: down: it has no address; name one of these.*; ib0 10.1.0.2; six fd01::2$"),
        ("ib0", V6, "GLOO_SOCKET_IFNAME: ib0: it has no IPv6 address, and the server is at one"),
    ],
)  # fmt: skip
def test_an_interface_that_is_not_there(
    two_networks: pytest.MonkeyPatch, value: str, family: socket.AddressFamily, says: str
) -> None:
    two_networks.setenv(network.VARIABLE, value)
    with pytest.raises(ValueError, match=says):
        network.chosen_address(family, only=True)


def test_the_interfaces_of_this_machine_are_found() -> None:
    found = network.interfaces()
    loopback = [name for name, listed in found.items() if "127.0.0.1" in listed]
    assert len(loopback) == 1
    assert set(found) == {name for _, name in socket.if_nameindex()}


def test_where_a_server_listens(two_networks: pytest.MonkeyPatch) -> None:
    two_networks.delenv(network.VARIABLE, raising=False)
    assert network.listening_address("node0", one_machine=True) == "127.0.0.1"
    assert network.listening_address("127.0.0.1", one_machine=False) == "127.0.0.1"
    assert network.listening_address("10.0.0.2", one_machine=False) == "10.0.0.2"
    two_networks.setenv(network.VARIABLE, "eth0")
    assert network.listening_address("node0", one_machine=True) == "10.0.0.2"
    assert network.listening_address("10.0.0.2", one_machine=False) == "10.0.0.2"
    assert network.listening_address("fd00::9", one_machine=False) == "fd00::2", "as the other machines find it"


def test_a_name_that_is_loopback_on_its_own_machine_is_refused(two_networks: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts has it; where all ranks are here, or the user says so, nothing is wrong with it."""
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    two_networks.setattr(network.socket, "getaddrinfo", lambda *_, **__: answer)
    two_networks.delenv(network.VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"MASTER_ADDR: node0 is 127.0.1.1 on this machine") as error:
        network.listening_address("node0", one_machine=False)
    assert "(10.0.0.2, fd00::2, 10.1.0.2, fd01::2) as MASTER_ADDR" in str(error.value)
    assert network.listening_address("localhost", one_machine=False) == "127.0.1.1"
    two_networks.setenv(network.VARIABLE, "ib0")
    assert network.listening_address("node0", one_machine=False) == "10.1.0.2"


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"MASTER_ADDR: nowhere.invalid is no address and no name that this machine"):
        network.address_of("nowhere.invalid", "MASTER_ADDR")


@pytest.mark.parametrize("family", [V4, V6])
def test_server_and_pairs_are_at_the_chosen_interface(
    monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily
) -> None:
    """A real session over an interface of this machine that is not loopback."""
    found = [
        (name, a) for name, listed in network.interfaces().items() for a in listed
        if network.family_of(a) == family and not network.is_loopback(a)
    ]  # fmt: skip
    if not found:
        pytest.skip("this machine has no such address but loopback's")
    name, address = found[0]
    monkeypatch.setenv(network.VARIABLE, name)
    limits = Limits(10.0, 5.0)
    server = GlooServer(ranks=[1], limits=limits, bind=network.listening_address(address, one_machine=False))
    assert server.address[0] == address
    server.admit(Welcome(b"0" * 16, 0, {}))
    host = GlooHost(server.address, 1, server.token, limits)
    try:
        host.expected = {}  # type: ignore[assignment]
        host.ready()
        assert isinstance(server.next_event(10.0), Joined)
        assert host._session is not None
        published = b"".join(host._session._store._values.values())
        assert socket.inet_pton(family, address) in published
        assert socket.inet_pton(family, "127.0.0.1" if family == V4 else "::1") not in published
    finally:
        server.close(0.1)
        host.close()


def test_a_host_without_the_chosen_interface_says_so_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(10.0, 5.0)
    found = [a for listed in network.interfaces().values() for a in listed if not network.is_loopback(a)]
    if not found:
        pytest.skip("this machine has no address but loopback's")
    server = GlooServer(ranks=[1], limits=limits, bind=found[0])
    monkeypatch.setenv(network.VARIABLE, "nope0")
    try:
        with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME: nope0: there is no such interface here"):
            GlooHost(server.address, 1, server.token, limits)
    finally:
        server.close(0.1)


# ---- environment.json
def test_environment_json_keeps_what_decides_about_bits_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone_in(monkeypatch, {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("FLDIST_TOKEN", "0123-token")
    monkeypatch.setenv("SLURM_JWT", "secret-of-slurm")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-cloud")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    fldist.run(small(rounds=1), output=tmp_path / "run")
    facts = environment_of(tmp_path / "run")
    assert facts["variables"] == {
        k: os.environ[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
                                   "CUBLAS_WORKSPACE_CONFIG") if k in os.environ
    }  # fmt: skip
    assert facts["variables"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    text = (tmp_path / "run" / "environment.json").read_text()
    assert "0123-token" not in text
    assert "secret-of" not in text
    assert not [n for n in VARIABLES if any(w in n for w in ("TOKEN", "KEY", "SECRET", "JWT", "PASS", "AUTH"))]
    assert facts["tf32"]["matmul"] is torch.backends.cuda.matmul.allow_tf32
    assert facts["tf32"]["cudnn"] is torch.backends.cudnn.allow_tf32
    assert facts["tf32"]["float32_matmul_precision"] == torch.get_float32_matmul_precision()
    assert facts["cudnn"]["benchmark"] is True
    assert facts["cudnn"]["deterministic"] is torch.backends.cudnn.deterministic
    assert facts["deterministic_algorithms"] is torch.are_deterministic_algorithms_enabled()
    assert facts["cuda_version"] == torch.version.cuda
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["torch_threads"] == 1
    assert facts["mpi"] is None
    assert facts["hosts"] == {"0": {"hostname": socket.gethostname()}}


def test_settings_of_tf32_that_torch_does_not_tell_are_null() -> None:
    """In a process of its own: torch's two interfaces for it exclude each other once both were used."""
    program = (
        "import torch, json; from fldist.runtime.output import machine_facts\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(json.dumps(machine_facts()['tf32']))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=clean(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["matmul_fp32_precision"] == "tf32"
    assert told["matmul"] in (None, True)


def test_a_host_with_other_versions_is_warned_of_and_noted(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own version is changed here: its hosts have the true one."""
    monkeypatch.setattr(membership, "versions", lambda: {"fldist": fldist.__version__, "torch": "1.0"})
    seen = Recorder()
    run_here(load(small(rounds=1)), nproc=3, output=tmp_path / "run", spawn=hosts, observer=seen)
    about = {"hostname": socket.gethostname(), "torch": torch.__version__, "device": "cpu"}
    assert environment_of(tmp_path / "run")["hosts"] == {"1": about, "2": about}
    for rank in (1, 2):
        text = (
            f"host {rank} on {socket.gethostname()} has torch {torch.__version__} (the server 1.0): results may differ"
        )
        assert [w.startswith(text) for w in seen.warnings].count(True) == 1


def test_a_host_that_joins_again_from_elsewhere_is_noted(tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.environment({"backend": "gloo"})
    output.hosts({2: {"hostname": "b"}, 1: {"hostname": "a"}})
    before = environment_of(tmp_path)
    assert list(before["hosts"].items()) == [("1", {"hostname": "a"}), ("2", {"hostname": "b"})]
    output.hosts({1: {"hostname": "c"}, 2: {"hostname": "b"}})
    now = environment_of(tmp_path)
    assert now == {**before, "hosts": {"1": {"hostname": "c"}, "2": {"hostname": "b"}}}
    output.close()
