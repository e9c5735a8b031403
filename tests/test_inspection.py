"""What is shown without running: the partition and its drawing, predicted bytes of evaluation, doctor's findings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fldist
from fldist import inspection
from fldist.config import load
from fldist.inspection import partition, plot_partition, predict
from fldist.runtime.job import Job
from fldist.wire import network
from tests.conftest import small

ROOT = Path(__file__).parents[1]
Put = Callable[[str, str], None]


def job_of(**changes: object) -> Job:
    from fldist.config import build

    return build(load(small(**changes)))


def cells(line: str) -> list[str]:
    return line.split()


def test_the_table_has_a_row_a_client_and_a_column_a_class() -> None:
    settings = load(small(task__partition={"name": "classes", "per_client": 3}, task__split={"val": 0.1, "test": 0.2}))
    text, task = partition(settings)
    head, columns, *rows = text.splitlines()
    counts = task.label_counts()
    assert f"{counts.sum():,} training samples of 6 clients" in head
    assert cells(columns) == ["client", "samples", "(val)", "(test)", "classes", *map(str, range(10))]
    for client, row in enumerate(rows[:6]):
        number, samples, val, test, classes, *by_class = cells(row)
        assert (int(number), int(samples), int(val), int(test), int(classes)) == (
            client,
            task.sizes[client],
            task.count(client, "val"),
            task.count(client, "test"),
            3,
        )
        assert [0 if c == "." else int(c) for c in by_class] == counts[client].tolist()
    assert cells(rows[6])[0] == "all"
    whole = task.sizes[0] + task.count(0, "val") + task.count(0, "test")
    assert task.count(0, "test") == int(0.2 * whole)
    assert task.count(0, "val") == int(0.1 * whole)
    assert f"samples a client: {min(task.sizes)} to {max(task.sizes)}" in text


def test_the_table_of_many_classes_shows_the_largest_and_notes_come_last(tmp_path: Path) -> None:
    import h5py

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 4)
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for split in ("train", "test"):
            file[f"{split}_x"] = rng.random((120, 1, 4, 4), dtype=np.float32)
            file[f"{split}_y"] = labels
    data = {"name": "hdf5", "path": str(tmp_path / "many.h5")}
    settings = load(small(task__data=data, task__partition={"name": "classes", "per_client": 1}))
    text, _ = partition(settings)
    assert cells(text.splitlines()[1]) == ["client", "samples", "classes", "largest"]
    assert "100% 3" in text.splitlines()[5]
    assert text.splitlines()[-2].startswith("note: nobody holds a sample of class 6, 7, 8")
    assert text.splitlines()[-1] == "note: 96 of 120 training rows are nobody's under this partition"


def test_the_drawing_is_a_picture_and_an_impossible_path_is_an_error(tmp_path: Path) -> None:
    _, task = partition(load(small(task__partition={"name": "dirichlet", "alpha": 0.1})))
    plot_partition(task, tmp_path / "table.png", "six clients")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--plot: .*nowhere/table\.png cannot be written"):
        plot_partition(task, tmp_path / "nowhere" / "table.png", "six clients")
    with pytest.raises(ValueError, match=r"--plot: .*table\.xyz cannot be written"):
        plot_partition(task, tmp_path / "table.xyz", "six clients")


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednova", "moon", "fedopt", "local", "centralised"])
def test_predicted_bytes_are_those_of_a_round_evaluation_included(tmp_path: Path, algorithm: str) -> None:
    changes = {"algorithm": algorithm, "rounds": 1, "eval": {"where": "clients", "metrics": ["f1", "top5"]}}
    prediction = predict(job_of(**changes))
    result = fldist.run(small(**changes), output=tmp_path / "run")
    assert not prediction.unknown
    assert {k: v for k, v in prediction.by_kind.items() if any(v.values())} == result["bytes"]["by_kind"]
    scored = result["bytes"]["by_phase"].get("evaluate", {"up": 0, "down": 0})
    assert prediction.phases.get("evaluate", scored) == scored
    assert scored["up"] == 6 * 8 * (1 + 4)
    assert prediction.training == result["bytes"]["logical"]


def test_a_prediction_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fldist.data.client_data import ClientData

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a prediction must not train")

    monkeypatch.setattr(ClientData, "train", never)
    assert predict(job_of(algorithm="centralised")).training == {"up": 0, "down": 0}


def ci(repository: Path, data: str | None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLDIST_")} | ({"FLDIST_DATA": data} if data else {})
    done = subprocess.run(["bash", ".ci/run"], cwd=repository, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ci_finds_the_data_beside_the_main_worktree_and_keeps_what_is_set(tmp_path: Path) -> None:
    """In a repository whose test command only says what it was given."""
    main = tmp_path / "home" / "main"
    (main / ".ci").mkdir(parents=True)
    (main / "launch").mkdir()
    (main / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (main / "launch" / "test.sh").write_text('echo "given [${FLDIST_DATA:-}] [${FLDIST_REQUIRE_DATA:-}]"\n')
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["worktree", "add", "-q", "../../other"]):
        subprocess.run([*git, *command], cwd=main, check=True, timeout=60)
    other = tmp_path / "other"
    said = ci(main, None)
    assert "data: none" in said
    assert "given [] []" in said
    beside = tmp_path / "home" / "shared" / "data"
    beside.mkdir(parents=True)
    for place in (main, other):
        said = ci(place, None)
        assert f"data: {beside}, beside the main worktree" in said
        assert f"given [{beside}] [1]" in said
    said = ci(other, "/elsewhere")
    assert "data: FLDIST_DATA is set to /elsewhere" in said
    assert "given [/elsewhere] [1]" in said


def test_a_test_may_not_skip_for_want_of_data_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom tests.needs import needs_data\n"
        "def test_absent(): needs_data('CIFAR')\n"
        "def test_there(): assert needs_data('MNIST').is_dir()\n"
        "def test_lazy(): pytest.skip('needs MNIST: FLDIST_DATA was not looked at')\n"
        "def test_other(): pytest.skip('no GPU')\n"
    )
    said = {}
    for required in (None, "1"):
        env = {k: v for k, v in os.environ.items() if k != "FLDIST_REQUIRE_DATA"} | {"PYTHONPATH": str(ROOT)}
        env |= {"FLDIST_DATA": str(tmp_path)} | ({"FLDIST_REQUIRE_DATA": required} if required else {})
        command = [sys.executable, "-m", "pytest", "-q", "-rsf", "-p", "tests.conftest", str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        said[required] = (done.returncode, done.stdout)
    assert said[None][0] == 0
    assert f"needs CIFAR: FLDIST_DATA={tmp_path} has no CIFAR" in said[None][1]
    assert "1 passed, 3 skipped" in said[None][1]
    assert said["1"][0] == 1
    assert "1 failed, 1 passed, 2 skipped" in said["1"][1]
    assert "skipped although the data are there: needs MNIST" in said["1"][1]


# ---- doctor
@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Put:
    """Makes a program of a name, a shell script; no others are on PATH, and no launcher's variables are set."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "GLOO_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))

    def program(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return program


def test_doctor_on_the_name_of_this_machine(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, level, says in (
        ("127.0.1.1", "warn", "is 127.0.1.1 on this machine (see /etc/hosts), where no other machine reaches it; give"),
        ("10.0.0.2", "ok", f"this one is {socket.gethostname()}, 10.0.0.2"),
    ):
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
        monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, answer=answer, **__: answer)
        found = inspection._check_name()
        assert found[0] == level
        assert says in found[1]


@pytest.mark.parametrize(
    ("interfaces", "value", "level", "says"),
    [
        ({"lo": ["127.0.0.1"]}, None, "ok", "network: loopback alone; a run over several machines needs one"),
        ({"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "down": []}, None, "ok", "network: eth0 10.0.0.2"),
        ({"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "ib0": ["10.1.0.2", "fd00::2"]}, None, "--",
         "GLOO_SOCKET_IFNAME is not set: gloo takes the one on the way to MASTER_ADDR\n"
         "to choose another, set GLOO_SOCKET_IFNAME on every machine to one of: eth0 10.0.0.2; ib0 10.1.0.2, fd00::2"),
        ({"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "ib0": ["10.1.0.2"]}, "ib0", "ok",
         "network: GLOO_SOCKET_IFNAME=ib0 is 10.1.0.2; the server listens there"),
        ({"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]}, "ib0", "warn",
         "GLOO_SOCKET_IFNAME: ib0: there is no such interface here; name one of these"),
    ],
)  # fmt: skip
def test_doctor_on_networks(
    put: Put,
    monkeypatch: pytest.MonkeyPatch,
    interfaces: dict[str, list[str]],
    value: str | None,
    level: str,
    says: str,
) -> None:
    for module in (inspection, network):
        monkeypatch.setattr(module, "interfaces", lambda: interfaces)
    if value is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    found = inspection._check_network()
    assert found[0] == level
    assert says in found[1]


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("env", "srun", "level", "says"),
    [
        ({}, None, "--", "no srun here, and this is no job of one"),
        (JOB, None, "warn", "in job 7 (2 nodes, 8 tasks), but no srun on PATH\nwithout it: mpirun, or torchrun"),
        ({}, "echo 'MPI plugin types are...\n\tnone\n\tpmix_v4'", "ok", "not in a job: sbatch launch/slurm-mpi.sbatch"),
        (JOB, "echo 'specific pmix plugin versions available: pmix_v4' >&2", "ok",
         "in job 7 (2 nodes, 8 tasks); srun --mpi=pmix starts MPI ranks"),
        (JOB, "echo 'none pmi2'", "warn", "srun --mpi=list has no pmix, so srun cannot start MPI ranks\nMPI: mpirun"),
        (JOB, "echo pmix; exit 1", "warn", "srun --mpi=list has no pmix"),
    ],
)  # fmt: skip
def test_doctor_on_slurm(
    put: Put, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], srun: str | None, level: str, says: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if srun is not None:
        put("srun", f'[ "$1" = --mpi=list ] || exit 1\n{srun}')
    found = inspection._check_slurm()
    assert found[0] == level
    assert says in found[1]


def test_doctor_on_gpus_that_torch_cannot_use(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert inspection._check_gpu() == ("--", "GPU: none that torch can use; everything runs on the CPU")
    put("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert inspection._check_gpu()[0] == "--"
    put("nvidia-smi", "echo 'NVIDIA A100'; echo 'NVIDIA A30'")
    for cuda, hidden, says in (
        (None, None, f"this torch {torch.__version__} was built without CUDA\ninstall torch with CUDA"),
        ("12.8", None, "this torch cannot use them\ntorch was built for CUDA 12.8: update the driver"),
        ("12.8", "", "this torch cannot use them\nCUDA_VISIBLE_DEVICES is '': unset it"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        level, text = inspection._check_gpu()
        assert level == "warn"
        assert f"GPU: nvidia-smi shows 2 (NVIDIA A100, NVIDIA A30), but {says}" in text


@pytest.mark.parametrize(("nccl", "says"), [("2.27.5", "NCCL 2.27.5"), (None, "NCCL is not in this torch")])
def test_doctor_on_gpus(put: Put, monkeypatch: pytest.MonkeyPatch, nccl: str | None, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU number {i}")
    monkeypatch.setattr(inspection, "nccl_version", lambda: nccl)
    level, text = inspection._check_gpu()
    assert level == "ok"
    assert text.startswith(f"GPU: 2 (GPU number 0, GPU number 1); {says}")
    assert "need gloo" in text


def test_doctor_on_mpi() -> None:
    level, text = inspection._check_mpi()
    assert level == "ok"
    assert "MPI: Open MPI v5" in text
    assert "--with-ft ulfm" in text
    assert "a line `NAME slots=N` for each" in text
    assert ("you are root" in text) == (os.geteuid() == 0)


def test_a_mask_of_every_round_is_counted_with_the_round() -> None:
    fields = {"name": "autoflip", "T": 0.5, "explore_epochs": 1, "deviation_dtype": "fp32"}
    found = {}
    for schedule in ("static", "per_round"):
        job = job_of(algorithm={**fields, "mask_schedule": schedule}, clients={"num_clients": 6, "fraction": 0.5})
        found[schedule] = (predict(job), -(-job.task.layout_of(0).num_params // 8))
    static, size = found["static"]
    assert (static.once, static.by_kind.get("masks")) == ({"mask (masks)": size}, None)
    anew, _ = found["per_round"]
    assert anew.once == {}
    assert anew.by_kind["masks"] == {"up": 0, "down": 3 * size}
    assert set(static.before) == {"explore"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_prediction_explores_with_made_up_deviations_of_every_client(tmp_path: Path, dtype: str) -> None:
    algorithm = {"name": "autoflip", "T": 0.5, "mask_schedule": "per_round", "deviation_dtype": dtype}
    algorithm |= {"explore_epochs": 1, "close_dead_units": False}
    changes = {"algorithm": algorithm, "rounds": 1, "task__model": {"name": "cnn_bn"}}
    prediction = predict(job_of(**changes))
    result = fldist.run(small(**changes), output=tmp_path / "run")
    assert not prediction.unknown
    assert prediction.before["explore"] == result["bytes"]["by_phase"]["explore"]
    for way in ("up", "down"):
        measured = result["bytes"]["by_phase_and_kind"]["train.weights"][way]
        assert prediction.phases["train"][way] == pytest.approx(measured, rel=0.2)


def test_what_is_predicted_without_the_setup_is_said_to_be() -> None:
    changes = {"algorithm": {"name": "autoflip", "deviation_dtype": "fp16"}}
    (told,) = predict(job_of(**changes)).unknown
    assert told.startswith("setup: explore_half.m (weights): its size is known only when it runs; the round is predic")


def test_a_second_round_that_made_up_replies_cannot_lead_to_leaves_the_first_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = job_of()
    first = predict(job).training
    kind = type(job.algorithm)
    whole = kind.round

    def only_once(self: object, server: object, clients: object) -> None:
        if server.round > 1:  # type: ignore[attr-defined]
            raise ArithmeticError("of such replies nothing can be made")
        whole(self, server, clients)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "round", only_once)
    prediction = predict(job)
    assert prediction.training == first
    assert prediction.later is None
    assert prediction.of_run(3) == {way: 3 * n for way, n in first.items()}
