"""The same source in one process, on gloo and on MPI, under every launcher: same bits, same ledger; result files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest
import yaml
from safetensors.torch import load_file

import fldist
from fldist.config import load
from fldist.runner import run_here
from tests.conftest import Hosts, Recorder, small
from tests.needs import needs_data

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ALGORITHMS = (
    "fedavg",
    "fedprox",
    "scaffold",
    "fednova",
    "moon",
    "fedopt",
    "local",
    "centralised",
    "autoflip",
    "fedzge",
    "lg_fedavg",
    "fedktl",
    "fedf2dg",
    "fedgcs",
)

SELECTORS: dict[str, dict[str, Any]] = {
    "fedgcs": {
        "pool": ["random", "oort", "topk"],
        "proposals": 5,
        "score": "group",
        "fitting": {"hidden": 8, "width": 8, "epochs": 3, "later_epochs": 2},
        "searching": {"starts": 4, "steps": 2},
    },
    "topk": {},
    "oort": {"variant": "repo"},
    "afl": {"initial": "evaluate"},
    "power_of_choice": {"d": 6},
    "tifl": {"tiers": 2, "interval": 1},
    "favor": {"hidden": [8]},
    "fedmarl": {"hidden": 8},
    "fedcor": {"warmup": 1, "interval": 1, "first_steps": 5, "steps": 5},
}
"""Cases that are FedAvg or SCAFFOLD with a selector, on simulated devices."""
OTHERS = (
    "random_mask",
    "random_pruning",
    "prunefl",
    "efl_prune",
    "lottery_fl",
    "public_distillation",
    "fedproto",
)
"""These run under MPI as well; their own tests run them on gloo."""
CHOSEN_BY = tuple(name for name in SELECTORS if name not in ALGORITHMS)
FIELDS: dict[str, dict[str, Any]] = {
    "autoflip": {"T": 0.5, "explore_epochs": 2, "compact": True},
    "prunefl": {"initial_passes": 4, "reconfigure_every": 2},
    "lottery_fl": {"threshold": 0.1},
    "fedzge": {"synthetic": 20, "q": 3, "generator": {"nz": 8, "ngf": 2}, "server_steps": 3, "client_steps": 2},
    "fedktl": {"generator": {"name": "toy", "latent_dim": 8}, "server_epochs": 5},
    "fedf2dg": {
        "base": "scaffold",
        "generation": "client",
        "batches": 1,
        "hard_rounds": 1,
        "per_client": 16,
        "inversion": {"steps": 5},
        "kd_epochs": 2,
        "kd_lambda": 0.3,
    },
}


def config(algorithm: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Skewed clients, half of them at a time, BatchNorm with its integers, momentum."""
    if isinstance(algorithm, str) and algorithm in SELECTORS:
        changes = {
            "selection": {"name": algorithm, **SELECTORS[algorithm]},
            "devices": {"name": "simulated"},
            "rounds": 3,
            "local__epochs": 2,
            **changes,
        }
        algorithm = "scaffold"
    if isinstance(algorithm, str):
        algorithm = {"name": algorithm, **FIELDS.get(algorithm, {})}
    name = algorithm["name"]
    return small(
        algorithm=algorithm,
        clients={"num_clients": 8, "fraction": 0.5},
        task={
            "data": "digits",
            "partition": {"name": "dirichlet", "alpha": 0.3},
            "model": {"name": "cnn_bn", "widths": [8, 16]},
        },
        local={"epochs": 1, "batch_size": 32, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
        **({"clock": {"name": "scripted", "default": 0.01}} if name == "prunefl" else {}),
        **({"rounds": 4} if name == "fedf2dg" else {}),  # all its stages
        **({"task__split": {"val": 0.2}} if name == "lottery_fl" else {}),
        **({"task__public": {"n": 20}} if name == "public_distillation" else {}),
        **changes,
    )


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same wherever a run was made."""
    return {
        "state_hash": result["state_hash"],
        "logical": result["bytes"]["logical"],
        "encoded": result["bytes"]["encoded"],
        "by_kind": result["bytes"]["by_kind"],
        "by_phase": result["bytes"]["by_phase"],
        "final": result["final"],
    }


def ledger(directory: str | Path) -> list[tuple[Any, ...]]:
    """The ledger's rows without what may differ between launch modes (rank and times)."""
    names = ("round", "attempt", "call", "phase", "client", "direction", "kind", "codec")
    rows = [json.loads(line) for line in (Path(directory) / "messages.jsonl").read_text().splitlines()]
    return sorted(
        (*(r[n] for n in names), r["logical_bytes"], r["encoded_bytes"], r["status"])
        for r in rows
        if r["row"] == "kind"
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    base = tmp_path_factory.mktemp("alone")
    return {name: fldist.run(config(name), output=base / name) for name in (*ALGORITHMS, *OTHERS, *CHOSEN_BY)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("nproc", [2, 3])
def test_gloo_gives_the_same_bits_and_ledger(
    alone: dict[str, dict[str, Any]], tmp_path: Path, hosts: Hosts, algorithm: str, nproc: int
) -> None:
    result = run_here(load(config(algorithm)), nproc=nproc, output=tmp_path / "run", spawn=hosts)
    assert outcome(result) == outcome(alone[algorithm])
    assert ledger(tmp_path / "run") == ledger(alone[algorithm]["directory"])
    assert (result["backend"], result["world_size"]) == ("gloo", nproc)


@pytest.mark.parametrize("selector", CHOSEN_BY)
def test_a_selector_chooses_alike_on_gloo(
    alone: dict[str, dict[str, Any]], tmp_path: Path, hosts: Hosts, selector: str
) -> None:
    result = run_here(load(config(selector)), nproc=3, output=tmp_path / "run", spawn=hosts)
    assert outcome(result) == outcome(alone[selector])
    assert ledger(tmp_path / "run") == ledger(alone[selector]["directory"])


def test_a_network_that_the_server_holds_open_is_not_the_clients(tmp_path: Path, hosts: Hosts) -> None:
    changed = config("tests.own:TrainsBetween")
    here = fldist.run(changed, output=tmp_path / "here")
    there = run_here(load(changed), nproc=2, output=tmp_path / "there", spawn=hosts)
    assert outcome(there) == outcome(here)


@pytest.mark.parametrize("algorithm", ["fedavg", "local"])
def test_augmentation_splits_schedules_and_scoring_at_clients_give_the_same_everywhere(
    tmp_path: Path, hosts: Hosts, algorithm: str
) -> None:
    changed = config(algorithm, eval={"where": "clients", "split": "test", "metrics": ["top5", "f1", "auc"]})
    changed["task"] |= {
        "partition": {"name": "feature_noise", "noise": 0.1},
        "split": {"val": 0.1, "test": 0.25},
        "augment": {"crop": 1, "flip": 0.5, "jitter": 0.3, "rotate": 10},
        "normalize": "standard",
        "resize": 10,
    }
    changed["local"] |= {"schedule": "cosine", "lr_decay": 0.9, "tail": "merge", "epochs": 2}
    if algorithm == "local":
        changed["clients"] |= {"models": ["cnn_bn", "mlp"], "init": "own"}
    here = fldist.run(changed, output=tmp_path / "here")
    there = run_here(load(changed), nproc=3, output=tmp_path / "there", spawn=hosts)
    assert outcome(there) == outcome(here)
    assert ledger(tmp_path / "there") == ledger(tmp_path / "here")
    assert (tmp_path / "there" / "clients.jsonl").read_text() == (tmp_path / "here" / "clients.jsonl").read_text()


@pytest.mark.parametrize("network", [{"share": False}, {"checksum": "full"}])
def test_network_settings_change_no_bit(
    alone: dict[str, dict[str, Any]], tmp_path: Path, hosts: Hosts, network: dict[str, Any]
) -> None:
    changed = config("scaffold", network=network)
    result = run_here(load(changed), nproc=3, output=tmp_path / "run", spawn=hosts)
    assert outcome(result) == outcome(alone["scaffold"])
    shared = sum(r["shared_with"] is not None for r in _messages(tmp_path / "run"))
    if network.get("share") is False:
        weights = result["bytes"]["encoded"]["down"]
        assert result["bytes"]["wire"]["down"] > weights, "every client is sent a copy of its own"
    assert shared > 0


def _messages(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
    return [r for r in rows if r["row"] == "message"]


def test_mpi_gives_the_same_bits_and_ledger(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    names = (*ALGORITHMS, *OTHERS, *CHOSEN_BY)
    jobs = [{"config": config(name), "output": str(tmp_path / name)} for name in names]
    resumed = ("fedavg", "scaffold", "moon")
    for name in resumed:  # begun in one process, ended under MPI
        fldist.run({**config(name), "rounds": 1}, output=tmp_path / f"{name}-on")
        jobs.append({"resume": ["rounds=2"], "output": str(tmp_path / f"{name}-on")})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = mpirun(3, [str(ROOT / "tests" / "mpi_runs.py"), str(tmp_path / "jobs.json")])
    assert done.returncode == 0, done.stderr
    for name in names:
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert outcome(result) == outcome(alone[name])
        assert ledger(tmp_path / name) == ledger(alone[name]["directory"])
        assert (result["backend"], result["world_size"]) == ("mpi", 3)
    for name in resumed:
        result = json.loads((tmp_path / f"{name}-on" / "result.json").read_text())
        assert outcome(result) == outcome(alone[name])
        assert ledger(tmp_path / f"{name}-on") == ledger(alone[name]["directory"])
        assert (result["backend"], result["rounds"]) == ("mpi", 2)


def mpirun(
    ranks: int, program: list[str], timeout_s: float = 90, flags: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    launcher = shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}")
    assert launcher is not None, "the test extra brings mpirun"
    flags = [*flags, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    command = [launcher, *flags, "-n", str(ranks), sys.executable, *program]
    return run_group(command, timeout_s)


def run_group(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, which is killed as a whole when it lasts too long."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, cwd=ROOT
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} lasted over {timeout_s} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def write(tmp_path: Path, settings: dict[str, Any]) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("name", ["scaffold", "autoflip", "fedzge", "fedktl", "fedf2dg", "fedgcs"])
def test_torchrun_gives_the_same_bits_and_ledger(alone: dict[str, dict[str, Any]], tmp_path: Path, name: str) -> None:
    path = write(tmp_path, config(name))
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "4", "-m", "fldist"]
    done = run_group([*torchrun, "run", path, "--output", str(tmp_path / "run")], 90)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert outcome(result) == outcome(alone[name])
    assert ledger(tmp_path / "run") == ledger(alone[name]["directory"])


def kill_a_host_after_a_round(command: list[str], directory: Path, find: str) -> tuple[int, str]:
    """Start a command, kill one of its hosts after the first round, return its exit code and what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 60
        rounds = directory / "rounds.jsonl"
        while time.monotonic() < deadline and not (rounds.exists() and rounds.read_text()):
            time.sleep(0.05)
        for pid in (int(p) for p in os.listdir("/proc") if p.isdigit()):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if find.encode() in environment and str(directory).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"no host with {find}")
        out, _ = process.communicate(timeout=40)
        return process.returncode, out
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def children(pid: int) -> list[int]:
    """The direct children of a process, of all its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie that its new parent has not buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_rounds(directory: Path, count: int, timeout_s: float = 60) -> None:
    """Wait until so many rounds of a run are finished."""
    rounds = directory / "rounds.jsonl"
    deadline = time.monotonic() + timeout_s
    while not (rounds.exists() and len(rounds.read_text().splitlines()) >= count):
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
def test_the_launchers_children_are_its_hosts_which_end_with_it(tmp_path: Path) -> None:
    """The command itself, its hosts killed, then itself; the same command goes on, bit for bit."""
    settings = config("scaffold", rounds=40, faults={"min_replies": "all", "on_quorum_loss": "retry"})
    path, run = write(tmp_path, settings), tmp_path / "run"
    command = [sys.executable, "-m", "fldist", "run", path, "--nproc", "3", "--output", str(run)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
    try:
        wait_for_rounds(run, 2)
        hosts = children(process.pid)
        assert len(hosts) == 2
        for host in hosts:
            assert b"FLDIST_HOST=" in Path(f"/proc/{host}/environ").read_bytes()
            assert children(host) == []
        os.kill(hosts[0], signal.SIGKILL)
        done = len((run / "rounds.jsonl").read_text().splitlines())
        wait_for_rounds(run, min(done + 3, 40))
        again = children(process.pid)
        assert len(again) == 2
        assert hosts[1] in again
        process.kill()
        process.wait()
        deadline = time.monotonic() + 2
        while any(map(alive, again)):
            assert time.monotonic() < deadline, "a host outlived its launcher"
            time.sleep(0.01)
    finally:
        process.kill()
        out, _ = process.communicate()
    assert "killed by SIGKILL" in out
    done_again = run_group(command, 60)
    assert done_again.returncode == 0, done_again.stderr
    assert "continued after round" in done_again.stdout
    result = json.loads((run / "result.json").read_text())
    straight = fldist.run(settings, output=tmp_path / "straight")
    assert outcome(result) == outcome(straight)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the host through /proc")
def test_a_dead_rank_under_torchrun_ends_the_run_with_a_clear_message(tmp_path: Path) -> None:
    path = write(tmp_path, config("fedavg", rounds=500))
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "3", "-m", "fldist"]
    command = [*torchrun, "run", path, "--output", str(tmp_path / "run")]
    code, out = kill_a_host_after_a_round(command, tmp_path / "run", "RANK=2")
    assert code != 0
    assert re.search(
        r"fldist: (host 2 lost \(.*\)|ended by SIGTERM); torchrun ends all ranks when one dies.*kept in", out
    ), out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] in ("stopped", "interrupted")
    assert result["rounds"] == len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the host through /proc")
def test_a_dead_rank_under_mpirun_ends_the_run_with_a_clear_message(tmp_path: Path) -> None:
    path = write(tmp_path, config("fedavg", rounds=500))
    launcher = shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}")
    assert launcher is not None
    flags = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", "3"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    command = [launcher, *flags, sys.executable, "-m", "fldist", "run", path, "--output", str(tmp_path / "run")]
    code, out = kill_a_host_after_a_round(command, tmp_path / "run", "OMPI_COMM_WORLD_RANK=2")
    assert code != 0
    assert "MPI without fault tolerance: mpirun ends the whole job when a rank dies" in out
    assert re.search(r"fldist: ended by SIGTERM; MPI without .* finished rounds? (is|are) kept in ", out), out
    assert "signal 9 (Killed)" in out
    assert (tmp_path / "run" / "rounds.jsonl").read_text().endswith("}\n")


def test_a_thousand_clients_on_two_hosts(tmp_path: Path, hosts: Hosts) -> None:
    many = small(clients__num_clients=1000, rounds=2, local__batch_size=8)
    result = run_here(load(many), nproc=3, output=tmp_path / "run", spawn=hosts)
    size = 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert result["bytes"]["logical"] == {"up": 2 * 1000 * (size + 8), "down": 2 * 1000 * size}
    # every host is sent the model once a round, whatever its number of clients
    assert result["bytes"]["wire"]["down"] < 0.05 * result["bytes"]["logical"]["down"]
    alone = fldist.run(many, output=tmp_path / "alone")
    assert alone["state_hash"] == result["state_hash"]


def test_fedprox_with_mu_0_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    plain = fldist.run(config("fedavg"), output=tmp_path / "a")
    proximal = fldist.run(config({"name": "fedprox", "mu": 0.0}), output=tmp_path / "b")  # type: ignore[arg-type]
    assert plain["state_hash"] == proximal["state_hash"]


def test_the_quickstart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fldist", "run", str(QUICKSTART), "--nproc", "3", "--output", str(tmp_path / "q")]
    began = time.monotonic()
    done = run_group(command, 60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    result = json.loads((tmp_path / "q" / "result.json").read_text())
    assert result["final"]["accuracy"] >= 0.90
    assert len(re.findall(r"^round +\d+/15  accuracy 0\.\d+  up ", done.stdout, re.M)) == 15
    for text in ("weights (logical)", "scalars (logical)", "accuracy ", "seconds ", f"results in {tmp_path / 'q'}"):
        assert text in done.stdout
    shown = {p.name for p in (tmp_path / "q").iterdir()}
    assert shown == {
        "checkpoints", "config.yaml", "environment.json", "messages.jsonl", "model", "owner.lock", "rank-0.log",
        "rank-1.log", "rank-2.log", "result.json", "rounds.jsonl", "run.h5", "timeline.jsonl",
    }  # fmt: skip


def test_the_result_files(tmp_path: Path) -> None:
    result = fldist.run(config("fedavg"), output=tmp_path / "run")
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text()) == result
    wanted = {
        "schema", "algorithm", "seed", "rounds", "backend", "world_size", "num_clients", "final", "best", "bytes",
        "seconds", "peak_rss_bytes", "state_hash", "status", "version",
    }  # fmt: skip
    assert wanted <= set(result)
    assert set(result["seconds"]) >= {"total", "compute", "encode", "wire", "wait", "evaluate"}
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == [1, 2]
    assert sum(x["bytes"]["logical"]["up"] for x in lines) == result["bytes"]["logical"]["up"]
    again = load(run / "config.yaml")
    assert again.resolved() == yaml.safe_load((run / "config.yaml").read_text())
    assert fldist.run(run / "config.yaml", output=tmp_path / "again")["state_hash"] == result["state_hash"]
    environment = json.loads((run / "environment.json").read_text())
    assert {"torch", "python", "processor", "cpus", "launcher", "backend"} <= set(environment)
    with h5py.File(run / "run.h5") as file:
        assert list(file["rounds/round"]) == [1.0, 2.0]
        assert int(file["rounds/logical_bytes_up"][()].sum()) == result["bytes"]["logical"]["up"]
    tensors = load_file(run / "model" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) * 2 * 4 == result["bytes"]["logical"]["down"]


def test_one_line_per_committed_round_is_flushed_at_once(tmp_path: Path) -> None:
    counts = []

    def after(number: int) -> None:
        counts.append(len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()))

    run_here(load(config("fedavg", rounds=3)), output=tmp_path / "run", observer=Recorder(after))
    assert counts == [0, 1, 2, 3]


def test_a_signal_ends_a_run_in_good_order(tmp_path: Path) -> None:
    path = write(tmp_path, config("fedavg", rounds=100000))
    command = [sys.executable, "-m", "fldist", "run", path, "--nproc", "2", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    rounds = tmp_path / "run" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (rounds.exists() and rounds.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["rounds"] == len(rounds.read_text().splitlines())
    assert f"fldist: ended by SIGTERM; {result['rounds']} finished round" in err
    assert err.count("fldist:") == 1
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert len(file["rounds/accuracy"]) == result["rounds"]
    assert load_file(tmp_path / "run" / "model" / "model.safetensors"), "the work of finished rounds is lost"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "family").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_family_configurations_run(tmp_path: Path, path: Path) -> None:
    needs_data("MNIST/raw", "FashionMNIST/raw")
    small_run = ["rounds=1", "task.subset={train: 300, test: 100, choice: random}", "task.partition=iid"]
    result = fldist.run(path, small_run, output=tmp_path / "run")
    assert result["status"] == "finished"
    assert result["final"]["accuracy"] > 0
    assert load(path).task.partition.name == "dirichlet_min"
