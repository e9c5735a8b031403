"""Samples that are tokens, data sets of text, clients that are the owners of their rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import fldist
from fldist.config import ConfigError, build, load
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset, accepted
from fldist.data.task import Task
from fldist.inspection import partition
from fldist.seeding import Streams
from tests.conftest import small
from tests.test_errors import Cli

TINY = {"name": "next_char_lstm", "embedding": 3, "hidden": 5, "layers": 1}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for every test, and nothing found by accident."""
    monkeypatch.setenv("FLDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLDIST_DATA", raising=False)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


# ---- samples that are tokens
def sequences(n: int, length: int = 4, symbols: int = 7, seed: int = 0, kind: Any = np.uint8) -> Any:
    """Sequences of tokens [n, length] and their labels [n]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, symbols, (n, length)).astype(kind), rng.integers(0, symbols, n)


def tokens(path: Path, kind: Any = np.uint8, **changes: Any) -> dict[str, Any]:
    """A configuration's `task.data` for an HDF5 file of tokens."""
    arrays = dict(
        zip(
            ("train_x", "train_y", "test_x", "test_y"),
            (*sequences(60, kind=kind), *sequences(20, seed=1, kind=kind)),
            strict=True,
        )
    )
    with h5py.File(path, "w") as file:
        for name, array in (arrays | changes).items():
            file[name] = array
    return {"name": "hdf5", "path": str(path), "kind": "tokens"}


def task_of(data: Any, **task: Any) -> Task:
    return build(load(small(task={"data": data, "model": TINY, **task}))).task


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint16, ">i4"])
def test_tokens_reach_the_model_as_they_are(tmp_path: Path, kind: Any) -> None:
    data = tokens(tmp_path / "a.h5", kind)
    task = task_of(data, split={"val": 0.1, "test": 0.2}, public={"n": 5})
    made = task.dataset
    assert (made.kind, made.train_x.dtype, made.shape) == ("tokens", np.dtype(kind), (4,))
    assert made.train_x.max() == 6, "nothing to scale"
    for client in range(6):
        x, y = task.rows(client)
        assert x.dtype == torch.int64
        assert np.array_equal(x.numpy(), made.train_x[task.parts[client]])
        assert np.array_equal(y.numpy(), made.train_y[task.parts[client]])
    read = ClientData(task, 1, Streams(0, 1, 1))
    assert not read.varies
    batch = read.reader()(torch.tensor([2, 0]))
    assert torch.equal(batch.x, task.rows(1)[0][[2, 0]])
    xs = torch.cat([x for x, _ in task.test_batches(6)])
    assert np.array_equal(xs.numpy(), made.test_x)
    assert {x.dtype for x in (xs, task.public()[0], task.pooled()[0], task.blank(3))} == {torch.int64}
    assert task.blank(3).shape == (3, 4)
    x, _ = task_of(data, merged=True, split={"test": 0.2}).rows(0)
    assert x.dtype == torch.int64


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (
            {"normalize": "symmetric"},
            "task.normalize: symmetric, but the samples are tokens, which stay as they are; rem",
        ),
        (
            {"normalize": {"mean": [0.5], "std": [1]}},
            "task.normalize: MeanStd(mean=(0.5,), std=(1.0,)), but the samples",
        ),
        ({"resize": 8}, "task.resize: 8, but the samples are tokens, which stay as they are; remove it"),
        ({"augment": {"crop": 1}}, "task.augment.crop: 1, but the samples are tokens"),
        ({"augment": {"flip": 0.5}}, "task.augment.flip: 0.5, but the samples are tokens"),
        ({"augment": {"rotate": 5}}, "task.augment.rotate: 5.0, but the samples are tokens"),
        ({"augment": {"jitter": 0.1}}, "task.augment.jitter: 0.1, but the samples are tokens"),
        (
            {"partition": "feature_noise"},
            "task.partition: feature_noise adds noise to values, and the samples are tokens",
        ),
        (
            {"public": {"n": 5, "data": "digits"}},
            "task.public.data: its samples are values, the task's tokens; choose a",
        ),
        ({"model": "mlp"}, "task.model: mlp does not take samples of shape (4,) tokens [length]: "),
        ({"model": "cnn"}, "task.model: cnn needs images [channels, height, width]; the data's shape is (4,); choose"),
    ],
)
def test_what_means_nothing_to_tokens_is_refused(tmp_path: Path, task: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        task_of(tokens(tmp_path / "a.h5"), **task)
    assert says in str(error.value)


def test_values_are_no_tokens(tmp_path: Path) -> None:
    data = tokens(tmp_path / "a.h5")
    with pytest.raises(ConfigError, match=r"^task\.model: next_char_lstm does not take samples of shape \(4,\) \[chan"):
        task_of(data | {"kind": "values"})
    with pytest.raises(ValueError, match=r"^task\.model: next_char_lstm needs sequences of tokens \[length\]"):
        task_of("digits")
    with pytest.raises(ValueError, match=r"train_x of .* must be \[n, \.\.\.\] integers, being tokens, not float64"):
        task_of(tokens(tmp_path / "b.h5", train_x=np.zeros((60, 4))))
    made = Dataset(*sequences(6), *sequences(6), 7, kind="tokens")
    assert accepted(made, "mine").train_x.dtype == np.uint8
    assert accepted(dataclasses.replace(made, kind="values"), "mine").train_x.dtype == np.uint8
    wide = dataclasses.replace(made, train_x=made.train_x.astype(np.int32), test_x=made.test_x.astype(np.int32))
    assert accepted(wide, "mine").train_x.dtype == np.int32
    with pytest.raises(ValueError, match="mine: tokens are numbers of symbols; train_x must be integers, not float32"):
        accepted(dataclasses.replace(wide, train_x=wide.train_x.astype(np.float32)), "mine")


@pytest.mark.parametrize("algorithm", ["fedavg", "moon", "centralised", "scaffold"])
def test_algorithms_train_on_tokens(tmp_path: Path, algorithm: str) -> None:
    task = {"data": tokens(tmp_path / "a.h5"), "model": TINY}
    result = fldist.run(
        small(task=task, algorithm=algorithm, eval={"metrics": ["top5", "f1"]}), output=tmp_path / "run"
    )
    assert result["status"] == "finished"
    assert result["final"]["loss"] == pytest.approx(np.log(7), rel=0.2)


# ---- clients that are owners of rows
TRAIN_OWNER = np.array([3, 0, 0, 3, 1, 4, 3, 0, 1, 4, 4, 4])
TEST_OWNER = np.array([4, 0, 2, 1, 0, 3, 4])


def owned(path: Path, **changes: Any) -> dict[str, Any]:
    """A configuration's `task` for an HDF5 file of 12 and 7 rows whose owners are known."""
    arrays = {"train_owner": TRAIN_OWNER, "test_owner": TEST_OWNER} | changes
    x, y = sequences(12)
    test_x, test_y = sequences(7, seed=1)
    data = tokens(
        path, train_x=x, train_y=y, test_x=test_x, test_y=test_y, **{k: v for k, v in arrays.items() if v is not None}
    )
    return {"data": data, "model": TINY, "partition": "natural"}


def job_of(clients: int, task: dict[str, Any], **changes: Any) -> Any:
    return build(load(small(clients={"num_clients": clients}, task=task, **changes)))


def owners_of(task: Task) -> list[int]:
    """The one owner of each client's rows."""
    held = [np.unique(TRAIN_OWNER[rows]) for rows in task.parts]
    assert all(len(own) == 1 for own in held)
    return [int(own[0]) for own in held]


def test_natural_clients_hold_their_owners_rows_and_test_rows(tmp_path: Path) -> None:
    task = job_of(4, owned(tmp_path / "a.h5")).task
    assert (owners_of(task), task.client_names) == ([0, 1, 3, 4], ("0", "1", "3", "4"))
    assert [rows.tolist() for rows in task.parts] == [[1, 2, 7], [4, 8], [0, 3, 6], [5, 9, 10, 11]]
    for client, rows in enumerate(([1, 4], [3], [5], [0, 6])):
        x, y = task.rows(client, "test")
        assert np.array_equal(x.numpy(), task.dataset.test_x[rows])
        assert np.array_equal(y.numpy(), task.dataset.test_y[rows])
        assert (task.count(client, "test"), task.count(client, "val")) == (len(rows), 0)
    assert task.num_test == 6, "all test rows but that of owner 2, who trains nowhere"
    xs = torch.cat([x for x, _ in task.test_batches(3)])
    assert np.array_equal(xs.numpy(), task.dataset.test_x[[0, 1, 3, 4, 5, 6]])
    assert not task.notes


def test_fewer_clients_than_owners(tmp_path: Path) -> None:
    section = owned(tmp_path / "a.h5")
    task = job_of(2, section).task
    assert owners_of(task) == [0, 1]
    assert (
        np.concatenate([task.rows(c, "test")[1] for c in range(2)]).tolist() == task.dataset.test_y[[1, 4, 3]].tolist()
    )
    assert task.num_test == 3, "of the owners that take part"
    assert "7 of 12 training rows are nobody's under this partition" in task.notes
    drawn = {
        tuple(owners_of(job_of(2, section | {"partition": {"name": "natural", "choice": "random"}}, seed=s).task))
        for s in range(9)
    }
    assert len(drawn) > 2
    assert all(pair == tuple(sorted(pair)) for pair in drawn)
    with pytest.raises(ValueError, match=r"^clients\.num_clients: 5 clients .* there are 4; lower it to at most 4$"):
        job_of(5, section)


def test_subset_takes_rows_before_natural_looks_for_owners(tmp_path: Path) -> None:
    section = owned(tmp_path / "a.h5") | {"subset": {"train": 4, "test": 5}}
    task = job_of(2, section).task
    assert owners_of(task) == [0, 3]
    assert [rows.tolist() for rows in task.parts] == [[1, 2], [0, 3]]
    assert (task.count(0, "test"), task.count(1, "test"), task.num_test) == (2, 0, 2)
    with pytest.raises(ValueError, match="there are 2; lower it to at most 2"):
        job_of(3, section)
    with pytest.raises(
        ValueError, match=r"^task\.subset\.test: none of the test rows taken is of one of the 2 clients; ra"
    ):
        job_of(2, section | {"subset": {"train": 4, "test": 1}})


def test_who_has_no_test_rows_is_not_scored(tmp_path: Path) -> None:
    section = owned(tmp_path / "a.h5", test_owner=np.array([4, 0, 0, 4, 0, 3, 4]))
    job = job_of(4, section, eval={"where": "both"})
    assert job.evaluation.split == "test"
    assert "1 clients have no test part and are not scored" in job.task.notes


def test_a_validation_part_is_of_the_training_rows(tmp_path: Path) -> None:
    task = job_of(4, owned(tmp_path / "a.h5") | {"split": {"val": 0.34}}).task
    assert [task.count(c, "val") for c in range(4)] == [1, 0, 1, 1]
    assert [task.count(c, "test") for c in range(4)] == [2, 1, 1, 2]
    assert [task.count(c) for c in range(4)] == [2, 2, 2, 3]
    with pytest.raises(
        ValueError, match=r"^task\.split\.test: 0\.2, but under natural the clients have test rows of their own"
    ):
        job_of(4, owned(tmp_path / "a.h5") | {"split": {"test": 0.2}})


def test_owners_of_training_rows_alone(tmp_path: Path) -> None:
    section = owned(tmp_path / "a.h5", test_owner=None)
    job = job_of(4, section | {"split": {"test": 0.5}}, eval={"where": "both"})
    assert job.evaluation.split == "test"
    assert [job.task.count(c, "test") for c in range(4)] == [1, 1, 1, 2]
    assert job.task.num_test == 7, "nobody knows whose they are: all of them"
    assert job_of(4, section, eval={"where": "both"}).evaluation.split == "global"
    with pytest.raises(ValueError, match=r"^task\.merged: these data do not say whose a test row is"):
        job_of(4, section | {"merged": True, "split": {"test": 0.5}})


def test_merged_rows_of_an_owner_are_divided_again(tmp_path: Path) -> None:
    task = job_of(5, owned(tmp_path / "a.h5") | {"merged": True, "split": {"test": 0.5}}).task
    whole = [task.count(c) + task.count(c, "test") for c in range(5)]
    assert whole == [5, 3, 1, 4, 6]
    assert [task.count(c, "test") for c in range(5)] == [2, 1, 0, 2, 3]
    assert task.num_test == 0


def test_other_partitions_do_not_look_at_owners(tmp_path: Path) -> None:
    section = owned(tmp_path / "a.h5") | {"partition": "iid"}
    task = job_of(3, section).task
    assert (task.num_test, task.client_names, task.has_part("test")) == (7, (), False)
    assert job_of(3, section | {"split": {"test": 0.5}}).task.count(0, "test") == 2


def test_data_without_owners_are_refused(tmp_path: Path) -> None:
    message = (
        r"^task\.partition: natural makes owners of rows clients, and these data do not say whose a row is; use an"
    )
    with pytest.raises(ValueError, match=message):
        job_of(2, {"data": "digits", "model": "mlp", "partition": "natural"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_owner": TRAIN_OWNER[:5]}, "has 12 rows of train_x and 5 of train_owner"),
        ({"test_owner": TEST_OWNER - 1}, "test_owner must be 0, not -1 to 3"),
        ({"test_owner": TEST_OWNER * 0.5}, "test_owner of {path} must be [n] integers, not float64 (7,)"),
        ({"train_owner": None}, "says whose the test rows are (test_owner), but not the training rows (train_owner)"),
    ],
)
def test_owners_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(ValueError) as error:
        job_of(2, owned(path, **changes))
    assert says.format(path=path) in str(error.value)


def test_an_own_loaders_owners() -> None:
    made = Dataset(
        *sequences(12), *sequences(7), 7, kind="tokens", train_owner=TRAIN_OWNER.astype(np.int8), owners=tuple("abcde")
    )
    good = accepted(made, "mine")
    assert (good.train_owner.dtype, good.test_owner, good.owners[4]) == (np.int64, None, "e")
    with pytest.raises(ValueError, match=r"^mine: train_owner must be 0 to 3, not 0 to 4$"):
        accepted(dataclasses.replace(made, owners=tuple("abcd")), "mine")
    with pytest.raises(ValueError, match=r"^mine: train_owner must be \[n\] integers, not float64 \(12,\)$"):
        accepted(dataclasses.replace(made, train_owner=TRAIN_OWNER / 2), "mine")


def test_the_table_of_natural_clients_names_their_owners(tmp_path: Path) -> None:
    text, _ = partition(load(small(clients={"num_clients": 3}, task=owned(tmp_path / "a.h5"))))
    lines = text.splitlines()
    assert lines[1].split()[:5] == ["client", "owner", "samples", "(test)", "classes"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "0", "3", "2"],
        ["1", "1", "2", "1"],
        ["2", "3", "3", "1"],
    ]
    assert lines[5].split()[:3] == ["all", "8", "4"]
    assert lines[-1] == "note: 4 of 12 training rows are nobody's under this partition"
