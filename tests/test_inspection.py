"""What is shown without running: the partition's table and its drawing, the predicted bytes of evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fldist
from fldist.config import load
from fldist.inspection import partition, plot_partition, predict
from fldist.runtime.job import Job
from tests.conftest import small

ROOT = Path(__file__).parents[1]


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
