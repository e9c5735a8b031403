"""Samples that are tokens, data sets of text, clients that are the owners of their rows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import fldist
from fldist.config import ConfigError, build, load
from fldist.data import text
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset, accepted
from fldist.data.leaf import Leaf
from fldist.data.task import Task
from fldist.data.text import ALPHABET, Roles, speeches_in, tokens_of
from fldist.data.windows import Windows
from fldist.inspection import partition
from fldist.seeding import Streams
from tests.conftest import small
from tests.needs import needs_data
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
    table, _ = partition(load(small(clients={"num_clients": 3}, task=owned(tmp_path / "a.h5"))))
    lines = table.splitlines()
    assert lines[1].split()[:5] == ["client", "owner", "samples", "(test)", "classes"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "0", "3", "2"],
        ["1", "1", "2", "1"],
        ["2", "3", "3", "1"],
    ]
    assert lines[5].split()[:3] == ["all", "8", "4"]
    assert lines[-1] == "note: 4 of 12 training rows are nobody's under this partition"


# ---- text with roles
def test_the_alphabet_is_that_of_leaf() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == len(text.NAMES) == len(set(text.NAMES)) == 80
    assert [ALPHABET.index(c) for c in "\n !\"&'(),-.09:;>?AZ[]az}"] == [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 25, 50, 51, 52, 53, 78, 79,
    ]  # fmt: skip
    found, outside = tokens_of(ALPHABET)
    assert (found.dtype, found.tolist(), outside) == (np.uint8, list(range(80)), "")


def test_characters_that_the_alphabet_has_not_are_read_as_a_space() -> None:
    found, outside = tokens_of("a$\u00e9\x7f\U0001f600\ud800$b")
    assert found.tolist() == [53, 1, 1, 1, 1, 1, 1, 54]
    assert outside == "$\x7f\u00e9\ud800\U0001f600"
    assert text.note_outside(outside) == [
        "characters that are not among the 80 of the alphabet are read as a space: '$\\x7f\u00e9\\ud800\U0001f600'"
    ]
    assert tokens_of("")[0].tolist() == text.note_outside("") == []


def test_windows_read_like_the_array_that_they_stand_for() -> None:
    stream = np.random.default_rng(0).integers(0, 80, 50).astype(np.uint8)
    starts = np.array([3, 4, 0, 40, 17])
    windows = Windows(stream, starts, 10)
    whole = np.stack([stream[s : s + 10] for s in starts])
    assert (windows.shape, windows.dtype, windows.ndim, len(windows)) == ((5, 10), np.uint8, 2, 5)
    for rows in ([], [2], [4, 0, 0, 3], slice(1, 4), slice(None), whole[:, 0] > 20, 3, -1):
        rows = np.array(rows, dtype=np.int64) if isinstance(rows, list) else rows
        assert np.array_equal(windows[rows], whole[rows])
    assert np.array_equal(np.asarray(windows), whole)
    assert np.asarray(windows, dtype=np.int64).dtype == np.int64
    windows[:][:] = 0
    assert np.array_equal(windows[:], whole), "what is given out is a copy"
    with pytest.raises(IndexError):
        windows[np.array([5])]


SPOKEN = """A one:
First line,
second line.

B:
Hm.

A one:
Again

and on.

C:

B:
$5!
"""


def test_speeches() -> None:
    expected = {"A one": ["First line,\nsecond line.", "Again\nand on."], "B": ["Hm.", "$5!"], "C": [""]}
    assert speeches_in(SPOKEN, "here") == expected
    assert speeches_in("\n\n" + SPOKEN.replace("\n\n", "\n \n\n").replace("B:", "B: "), "here") == expected
    assert speeches_in("C:\n\nHo!\n\nHa!\n\nD:", "here") == {"C": ["Ho!\nHa!"], "D": [""]}
    for bad in ("Once upon a time\n\nA:\nHm.", ""):
        with pytest.raises(
            ValueError, match=r"^here is no text with roles: it must begin with a role on a line of its"
        ):
            speeches_in(bad, "here")


def play(path: Path, lengths: dict[str, list[int]], seed: int = 0) -> str:
    """A text with roles, whose speeches have so many characters each."""
    rng = np.random.default_rng(seed)
    blocks = [
        f"{role}:\n{''.join(rng.choice(list('abcdefgh '), n - 2))}xy" for role, sizes in lengths.items() for n in sizes
    ]
    path.write_text("\n\n".join(rng.permutation(blocks)) + "\n")
    return str(path)


def roles_by_hand(path: str, least: int, window: int, stride: int, share: float) -> dict[str, list[tuple[Any, ...]]]:
    """(role, window, next character) of the training and the test samples, and the characters each comes from."""
    made: dict[str, list[tuple[Any, ...]]] = {"train": [], "test": []}
    for role, said in speeches_in(Path(path).read_text(), "").items():
        if len(said) < least:
            continue
        whole = "\n".join(said)
        all_of_it = [
            (role, whole[i : i + window], whole[i + window], set(range(i, i + window)))
            for i in range(0, len(whole) - window, stride)
        ]
        train = all_of_it[: math.floor(len(all_of_it) * share)]
        if not train:
            continue
        gap = next(k for k in range(1, window + 1) if k * stride >= window) - 1
        made["train"] += train
        made["test"] += all_of_it[len(train) + gap :]
        for *_, places in all_of_it[len(train) + gap :]:
            assert not places & train[-1][3]
        between = all_of_it[len(train) : len(train) + gap]
        assert all(places & train[-1][3] for *_, places in between), "no more is left out than overlaps"
    return made


@pytest.mark.parametrize(
    ("window", "stride", "share"), [(10, 1, 0.9), (10, 1, 0.5), (7, 3, 0.8), (5, 5, 0.75), (4, 9, 0.5), (1, 1, 0.9)]
)
def test_roles_are_windows_of_what_each_role_speaks(tmp_path: Path, window: int, stride: int, share: float) -> None:
    path = play(tmp_path / "play.txt", {"A": [40, 30, 50], "B": [200], "C": [100, 70], "D": [90, 90], "E": [5, 6]})
    data = Roles(path, min_speeches=2, window=window, stride=stride, train_share=share).load()
    expected = roles_by_hand(path, 2, window, stride, share)
    assert (data.kind, data.classes, data.shape, data.statistics()) == ("tokens", 80, (window,), ((), ()))
    for split, x, y, owner in (
        ("train", data.train_x, data.train_y, data.train_owner),
        ("test", data.test_x, data.test_y, data.test_owner),
    ):
        assert owner is not None
        assert x.dtype == np.uint8
        got = [
            (data.owners[o], "".join(ALPHABET[t] for t in row), ALPHABET[label])
            for row, label, o in zip(x[:], y, owner, strict=True)
        ]
        assert got == [sample[:3] for sample in expected[split]]
    assert "B" not in data.owners


def test_roles_that_are_too_short_and_strange_characters_are_said(tmp_path: Path) -> None:
    path = play(tmp_path / "play.txt", {"A": [300], "B": [12], "C": [30]})
    Path(path).write_text(Path(path).read_text().replace("xy", "$%"))
    for _ in range(2):  # decoded, then from the cache
        data = Roles(path, min_speeches=1, window=20).load()
        assert sorted(data.owners) == ["A", "C"]
        assert data.notes == (
            "characters that are not among the 80 of the alphabet are read as a space: '$%'",
            "roles whose text is too short to train on are left out: B",
        )
        assert set(data.test_owner) == {data.owners.index("A")}


@pytest.mark.parametrize(
    ("fields", "content", "says"),
    [
        (
            {"min_speeches": 3},
            SPOKEN,
            "task.data.min_speeches: no role of {path} speaks 3 times, the busiest does 2; lower",
        ),
        (
            {"min_speeches": 1},
            SPOKEN,
            "task.data.window: no role of {path} has text enough to train and test on windows of",
        ),
        (
            {},
            "Once upon a time",
            "task.data.path: {path} is no text with roles: it must begin with a role on a line of its",
        ),
        ({}, b"A:\n\xff\xfe", "task.data.path: {path} cannot be read as text ('utf-8' codec can't decode byte 0xff"),
        ({}, None, "task.data.path: no data found: looked for {path}; set FLDIST_DATA"),
    ],
)
def test_text_that_cannot_be_used(tmp_path: Path, fields: dict[str, Any], content: Any, says: str) -> None:
    path = tmp_path / "play.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        Roles(str(path), **fields).load()
    assert str(error.value).startswith(says.format(path=path))


def test_a_cache_holds_the_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = play(tmp_path / "play.txt", {"A": [4000, 3000], "B": [5000, 20]})
    own = Roles(path, min_speeches=2)
    made = own.load()
    with h5py.File(own.entry(Path(path)).path) as file:
        assert len(file["stream"]) == 4000 + 3000 + 5000 + 20 + 2
        assert set(file) == {"stream"} | {f"{s}_{n}" for s in ("train", "test") for n in ("starts", "y", "owner")}
    with monkeypatch.context() as patch:
        patch.setattr(Roles, "_decode", lambda *_: pytest.fail("decoded again"))
        again = own.load()
    assert isinstance(again.train_x, Windows)
    assert isinstance(again.train_x.stream, np.memmap)
    for name in ("train_x", "train_y", "test_x", "test_y", "train_owner", "test_owner"):
        assert np.array_equal(getattr(again, name), getattr(made, name)), name
    assert (again.owners, again.kind, again.class_names) == (("A", "B"), "tokens", text.NAMES)
    assert Roles(path, min_speeches=2, stride=2).load().shape == (80,), "other fields, another cache"
    os.utime(path, ns=(1, 1))
    assert own.load().notes[-1].endswith("the cache was out of date and has been rebuilt")
    Path(path).unlink()
    assert "is not there any more; the cache is used" in own.load().notes[-1]


def test_tinyshakespeare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLDIST_DATA", str(needs_data("tinyshakespeare.txt")))
    began = time.perf_counter()
    data = Roles().load()
    task = build(
        load({"clients": {"num_clients": 146}, "task": {"data": "roles", "partition": "natural", "model": TINY}})
    ).task
    assert time.perf_counter() - began < 5  # 0.4 s alone on a core
    assert len(data.owners) == 146
    assert data.owners[:3] == ("First Citizen", "All", "Second Citizen")
    assert (len(data.train_y), len(data.test_y)) == (task.num_train, task.num_test) == (859_922, 84_441)
    assert task.notes[0] == "characters that are not among the 80 of the alphabet are read as a space: '$'"
    x, y = task.rows(0)
    first = "".join(ALPHABET[t] for t in x[0])
    assert (
        first + ALPHABET[y[0]] == "Before we proceed any further, hear me speak.\nYou are all resolved rather to die "
    )
    assert "".join(ALPHABET[t] for t in x[1]) == first[1:] + ALPHABET[y[0]]
    assert (task.sizes[0], task.count(0, "test"), x.dtype) == (3509, 311, torch.int64)


# ---- LEAF's JSON
def windows_of(spoken: str, length: int) -> dict[str, list[Any]]:
    """A user's samples as LEAF writes them."""
    x = [spoken[i : i + length] for i in range(len(spoken) - length)]
    return {"x": x, "y": [spoken[i + length] for i in range(len(x))]}


def letters(n: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("abc \nXYZ."), n))


def images_of(n: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    return {"x": (rng.integers(0, 256, (n, 784)) / 255).tolist(), "y": rng.integers(0, 62, n).tolist()}


def written(path: Path, users: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"users": list(users), "num_samples": [len(u["y"]) for u in users.values()], "user_data": users}
    path.write_text(json.dumps(data))
    return path


def samples_of(data: Dataset, split: str, name: str) -> tuple[Any, Any]:
    """One owner's samples and labels."""
    owner = getattr(data, f"{split}_owner")
    rows = np.flatnonzero(owner == data.owners.index(name))
    return getattr(data, f"{split}_x")[rows], getattr(data, f"{split}_y")[rows]


def spelt(x: Any, y: Any) -> dict[str, list[str]]:
    return {"x": ["".join(ALPHABET[t] for t in row) for row in x], "y": [ALPHABET[t] for t in y]}


def test_leafs_train_and_test_files(tmp_path: Path) -> None:
    users = {f"PLAY_{name}": letters(40 + 10 * i, i) for i, name in enumerate("ABCD")}
    whole = {name: windows_of(spoken, 8) for name, spoken in users.items()}
    first = {n: {k: v[:20] for k, v in u.items()} for n, u in whole.items()}
    rest = {n: {k: v[25:] for k, v in u.items()} for n, u in whole.items()}
    written(tmp_path / "train/part_1.json", {n: first[n] for n in ("PLAY_C", "PLAY_A")})
    written(tmp_path / "train/part_2.json", {n: first[n] for n in ("PLAY_D", "PLAY_B")})
    written(tmp_path / "test/all.json", {n: rest[n] for n in ("PLAY_A", "PLAY_B", "PLAY_C", "PLAY_D")})
    written(tmp_path / "all_data/all.json", whole)
    for _ in range(2):  # decoded, then from the cache
        data = Leaf(str(tmp_path)).load()
        assert data.owners == ("PLAY_C", "PLAY_A", "PLAY_D", "PLAY_B")
        assert (data.kind, data.classes, data.shape, data.train_x.dtype, data.notes) == (
            "tokens",
            80,
            (8,),
            np.uint8,
            (),
        )
        for name in users:
            assert spelt(*samples_of(data, "train", name)) == first[name]
            assert spelt(*samples_of(data, "test", name)) == rest[name]
    task = build(load(small(clients={"num_clients": 4}, task={
        "data": {"name": "leaf", "path": str(tmp_path)}, "partition": "natural", "model": TINY,
    }))).task  # fmt: skip
    assert task.client_names == data.owners
    assert [task.count(c, "test") for c in range(4)] == [len(rest[n]["y"]) for n in data.owners]


@pytest.mark.parametrize("place", ["all_data/all_data.json", "all_data.json", "one.json"])
def test_one_set_of_text_is_divided_in_order_with_a_gap(tmp_path: Path, place: str) -> None:
    users = {"A": letters(150, 0), "B": letters(20, 1), "C": letters(9, 2)}
    file = written(tmp_path / place, {name: windows_of(spoken, 8) for name, spoken in users.items()})
    data = Leaf(str(file if place == "one.json" else tmp_path), train_share=0.8).load()
    assert data.owners == ("A", "B", "C")
    for name, n, train in (("A", 142, 113), ("B", 12, 9), ("C", 1, 0)):
        samples = windows_of(users[name], 8)
        assert len(samples["y"]) == n
        assert spelt(*samples_of(data, "train", name)) == {k: v[:train] for k, v in samples.items()}
        assert spelt(*samples_of(data, "test", name)) == {k: v[train + 7 :] for k, v in samples.items()}
    assert data.notes == ("1 users have no samples to train on and can be no clients",)


def test_one_set_of_images_is_divided_at_random(tmp_path: Path) -> None:
    users = {"w1": images_of(25, 0), "w2": images_of(40, 1)}
    written(tmp_path / "all_data_0.json", {"w1": users["w1"]})
    written(tmp_path / "all_data_1.json", {"w2": users["w2"]})
    data = Leaf(str(tmp_path)).load()
    assert (data.kind, data.classes, data.shape, data.train_x.dtype) == ("values", 62, (1, 28, 28), np.uint8)
    assert "".join(data.class_names) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert data.mean == pytest.approx((0.5,), abs=0.01)
    for name, tested in (("w1", 2), ("w2", 4)):
        x, y = samples_of(data, "train", name)
        test_x, test_y = samples_of(data, "test", name)
        assert len(test_y) == tested, "floor(0.1 n)"
        given = [(row, label) for row, label in zip(users[name]["x"], users[name]["y"], strict=True)]
        got = [((r / 255).reshape(784).tolist(), label) for r, label in zip([*x, *test_x], [*y, *test_y], strict=True)]
        assert sorted(got) == sorted(given)
        places = [given.index(sample) for sample in got]
        assert places[: len(y)] == sorted(places[: len(y)])
        assert places[len(y) :] != list(range(len(given) - tested, len(given)))
    other = Leaf(str(tmp_path), seed=1).load()
    assert not np.array_equal(other.test_x, data.test_x)
    assert np.array_equal(Leaf(str(tmp_path), seed=0).load().test_x, data.test_x)
    task = build(load(small(clients={"num_clients": 2}, task={
        "data": {"name": "leaf", "path": str(tmp_path)}, "partition": "natural", "normalize": "standard",
    }))).task  # fmt: skip
    x, _ = task.rows(0)
    expected = (samples_of(data, "train", "w1")[0] / 255 - data.mean[0]) / data.std[0]
    assert np.allclose(x.numpy(), expected, atol=1e-5)


def test_images_that_are_no_multiples_of_1_255_stay_floats(tmp_path: Path) -> None:
    users = {"w1": images_of(5, 0), "w2": images_of(5, 1)}
    users["w2"]["x"][3][7] = -0.37
    written(tmp_path / "train/a.json", users)
    written(tmp_path / "test/a.json", {"w1": images_of(2, 2)})
    data = Leaf(str(tmp_path)).load()
    assert data.train_x.dtype == data.test_x.dtype == np.float32
    assert np.allclose(data.train_x.reshape(10, 784), users["w1"]["x"] + users["w2"]["x"])
    assert data.owners == ("w1", "w2")


def test_a_share_of_all_samples_is_taken_user_by_user(tmp_path: Path) -> None:
    sizes = dict(zip("ABCDEFGH", (30, 25, 40, 20, 35, 60, 50, 40), strict=True))
    file = written(tmp_path / "all.json", {n: windows_of(letters(s + 8, 0), 8) for n, s in sizes.items()})

    def taken(share: float, seed: int = 0) -> tuple[str, ...]:
        return Leaf(str(file), share=share, seed=seed, train_share=0.5).load().owners

    chosen = set()
    for seed in range(6):
        names = taken(0.3, seed)
        assert list(names) == sorted(names), "in the order of the files"
        assert sum(sizes[n] for n in names) >= 90
        assert any(sum(sizes[n] for n in names) - sizes[last] < 90 for last in names), "and not one more than needed"
        chosen.add(names)
    assert len(chosen) > 3
    assert taken(1.0) == tuple(sizes)
    assert len(taken(1e-9)) == 1
    assert set(taken(0.3, 5)) <= set(taken(0.6, 5))


def test_test_samples_of_other_users(tmp_path: Path) -> None:
    written(tmp_path / "train/a.json", {"A": windows_of(letters(30, 0), 8), "B": windows_of(letters(30, 1), 8)})
    written(tmp_path / "test/a.json", {"C": windows_of(letters(30, 2), 8)})
    data = Leaf(str(tmp_path)).load()
    assert data.test_owner is None
    assert data.notes == (
        "test samples are of other users than training samples: no client has test samples of its own",
    )
    task = build(load(small(clients={"num_clients": 2}, task={
        "data": {"name": "leaf", "path": str(tmp_path)}, "partition": "natural", "model": TINY,
    }))).task  # fmt: skip
    assert (task.num_test, task.has_part("test")) == (22, False)


def test_very_many_users_with_long_names(tmp_path: Path) -> None:
    users = {f"THE_FIRST_PART_OF_SOME_PLAY_ROLE_NUMBER_{i}": {"x": ["ab"] * 4, "y": list("cdef")} for i in range(4000)}
    file = written(tmp_path / "all.json", users)
    for _ in range(2):
        data = Leaf(str(file), train_share=0.5).load()
        assert data.owners == tuple(users)
        assert len(data.train_y) == 8000


GOOD = {"x": ["abcd", "bcde"], "y": ["e", "f"]}


@pytest.mark.parametrize(
    ("users", "says"),
    [
        ({"A": GOOD, "B": {"x": ["abc"], "y": ["d"]}}, "samples differ in shape: (3,) and (4,); make them alike"),
        ({"A": GOOD, "B": images_of(2, 0)}, "samples differ in shape: (1, 28, 28) and (4,); make them alike"),
        (
            {"A": {"x": ["ab", "c"], "y": ["d", "e"]}},
            "all.json: user A: x must be strings of one length and y single char",
        ),
        (
            {"A": {"x": ["a.jpg", "b.jpg"], "y": [0, 1]}},
            "user A: x must be strings of one length and y single characters",
        ),
        ({"A": {"x": [["1", "a tweet"]], "y": [0]}}, "user A: x must be lists of 784 numbers in 0..1 and y integers"),
        (
            {"A": {"x": [[0.5] * 60], "y": [0]}},
            "user A: x must be lists of 784 numbers in 0..1 and y integers, as in FEMN",
        ),
        ({"A": {"x": [[200] * 784], "y": [0]}}, "user A: x must be lists of 784 numbers in 0..1 and y integers"),
        ({"A": {"x": [[0.5] * 784], "y": [0.5]}}, "user A: x must be lists of 784 numbers in 0..1 and y integers"),
        (
            {"A": {"x": [[float("nan")] * 784], "y": [0]}},
            "user A: x must be lists of 784 numbers in 0..1 and y integers",
        ),
        (
            {"A": {"x": [[0.5] * 784, [0.5]], "y": [0, 1]}},
            "user A: x must be lists of 784 numbers in 0..1 and y integers",
        ),
        ({"A": {"x": [[0.5] * 784] * 9, "y": [62] * 9}}, "train_y must be 0 to 61, not 62 to 62"),
        ({"A": {"x": ["ab"], "y": ["c", "d"]}}, "a user has not as many x as y; make it again"),
        ({"A": {"x": [], "y": []}}, "no user in {path} has a sample; make the files again"),
        ({"A": GOOD}, ": the users taken have no test samples; raise task.data.share, or change task.data.train"),
        (
            "nothing",
            'is not of LEAF\'s form {{"users": [...], "user_data": {{user: {{"x": [...], "y": [...]}}}}}} (TypeEr',
        ),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, users: Any, says: str) -> None:
    path = tmp_path / "all.json"
    if isinstance(users, str):
        path.write_text(json.dumps(users))
    else:
        written(path, users)
    with pytest.raises(ValueError) as error:
        Leaf(str(path), train_share=0.5).load()
    assert str(error.value).startswith("task.data.path: ")
    assert says.format(path=path) in str(error.value)


def test_files_that_are_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has no JSON files, neither in train and test, nor in all_data, nor in itself;"
    ):
        Leaf(str(tmp_path)).load()
    written(tmp_path / "train/a.json", {"A": GOOD})
    with pytest.raises(ValueError, match="has no JSON files in test; put them there, or give one set alone"):
        Leaf(str(tmp_path)).load()
    written(tmp_path / "test/a.json", {"A": GOOD})
    assert Leaf(str(tmp_path)).load().owners == ("A",)
    written(tmp_path / "test/b.json", {"A": GOOD})
    with pytest.raises(ValueError, match=r"b\.json: user A is there twice, in this file or two; remove one"):
        Leaf(str(tmp_path)).load()
    for broken in ("{", "[" * 100_000, '{"users": ["A"], "user_data": {}}', ""):
        (tmp_path / "test/b.json").write_text(broken)
        with pytest.raises(ValueError, match=r"b\.json is not of LEAF's form"):
            Leaf(str(tmp_path)).load()
    with pytest.raises(ValueError, match=r"^task\.data\.path: no data found: looked for"):
        Leaf(str(tmp_path / "gone")).load()


# ---- the command line
def test_text_is_listed_and_prepared(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, out, _ = cli("data", "list")
    listed = out.partition("\nroles\n")[2].splitlines()
    assert listed[1] == "  from: task.data.path, else tinyshakespeare.txt in FLDIST_DATA: not there"
    play(tmp_path / "tinyshakespeare.txt", {"A": [400, 300], "B": [500, 20]})
    code, out, err = cli("data", "prepare", "roles", "min_speeches=2", "stride=3", "window=9")
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == ["rows: 360 to train, 38 to test", "owners: 2 (A, B)", "shape: 9, uint8"]
    _, out, _ = cli("data", "list")
    listed = out.partition("\nroles\n")[2].splitlines()
    assert listed[1] == f"  from: task.data.path, else {tmp_path}/tinyshakespeare.txt: there"
    said = f"of {tmp_path}/tinyshakespeare.txt (min_speeches 2, window 9, stride 3, train_share 0.9)"
    assert listed[2].endswith(said)
    assert "task.data.strides: roles has no such field; did you mean" in cli("data", "prepare", "roles", "strides=3")[2]
    assert "task.data.stride: input should be greater than" in cli("data", "prepare", "roles", "stride=0")[2]
    file = written(tmp_path / "all.json", {"A": windows_of(letters(90, 0), 8), "B": windows_of(letters(40, 1), 8)})
    code, out, _ = cli("data", "prepare", "leaf", "share=0.1", "train_share=0.5", "--path", str(file))
    assert code == 0
    assert "owners: 1 (" in out
