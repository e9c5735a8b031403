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
