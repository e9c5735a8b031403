"""Data sets as they are stored, their cache, image folders and zips, and `fldist data`."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.Image
import pytest

from fldist.data import cache, catalogue, datasets, image_files
from fldist.data.datasets import Cifar10, Cifar100, Dataset, Digits, FashionMnist, Hdf5, Images, Mnist, Svhn, accepted
from fldist.vision import torchvision
from tests import needs
from tests.needs import needs_data
from tests.test_errors import Cli

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for every test, and nothing found by accident."""
    monkeypatch.setenv("FLDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLDIST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


def refused(call: Callable[[], Any], *says: str) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert type(error.value) in (ValueError, cache.Unwritable)
    assert error.traceback[-1].frame.f_globals["__name__"].startswith("fldist"), "a library's error"
    for text in says:
        assert text in str(error.value)
    return str(error.value)


def never() -> Any:
    raise AssertionError("decoded again")


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


def fake_mnist(root: Path, rows: tuple[int, int] = (30, 10), folder: str = "MNIST/raw") -> dict[str, np.ndarray]:
    made = {}
    for name, n in zip(("train", "t10k"), rows, strict=True):
        made[f"{name}_x"] = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        made[f"{name}_y"] = (np.arange(n) % 10).astype(np.uint8)
        write_idx(root / folder / f"{name}-images-idx3-ubyte", made[f"{name}_x"])
        write_idx(root / folder / f"{name}-labels-idx1-ubyte", made[f"{name}_y"])
    return made


def files_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# ---- digits
def test_digits_are_those_of_scikit_learn_scaled_and_shuffled() -> None:
    from sklearn.datasets import load_digits

    order = np.random.default_rng(1797).permutation(1797)
    x = (load_digits().images[order] / 16.0).astype(np.float32)[:, None]
    y = load_digits().target[order]
    for _ in range(2):  # decoded, then from the cache
        data = Digits().load()
        assert data.train_x.dtype == data.test_x.dtype == np.float32
        assert np.array_equal(np.concatenate([data.train_x, data.test_x]), x)
        assert np.array_equal(np.concatenate([data.train_y, data.test_y]), y)
        assert (len(data.train_x), data.classes, data.shape, data.notes) == (1437, 10, (1, 8, 8), ())
        assert data.mean == pytest.approx((float(x[:1437].astype(np.float64).mean()),), abs=1e-12)
        assert data.std == pytest.approx((float(x[:1437].astype(np.float64).std()),), abs=1e-12)


def test_digits_import_scikit_learn_once_only() -> None:
    program = "import sys; from fldist.data.datasets import Digits; Digits().load(); print('sklearn' in sys.modules)"
    said = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(2)
    ]
    assert said == ["True", "False"]


def test_digits_follow_the_version_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    Digits().load()
    monkeypatch.setattr(datasets, "version", lambda name: "99")
    assert "has changed" in Digits().load().notes[0]
    assert Digits().load().notes == ()

    def gone(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(datasets, "version", gone)
    assert "not there any more; the cache is used" in Digits().load().notes[0]
    shutil.rmtree(cache.directory())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(Digits().load, "digits come with scikit-learn, which is not installed; pip install scikit-learn")


# ---- torchvision's
def test_mnist_is_what_its_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    root = needs_data("MNIST/raw")
    monkeypatch.setenv("FLDIST_DATA", str(root))
    first = Mnist().load()
    monkeypatch.setattr(datasets, "torchvision", never)
    for data in (first, Mnist().load()):
        for name, x, y in (("train", data.train_x, data.train_y), ("t10k", data.test_x, data.test_y)):
            images = (root / f"MNIST/raw/{name}-images-idx3-ubyte").read_bytes()
            assert x.tobytes() == images[16:]
            assert y.tolist() == list((root / f"MNIST/raw/{name}-labels-idx1-ubyte").read_bytes()[8:])
        assert (data.shape, data.classes, data.train_x.dtype, data.train_y.dtype) == ((1, 28, 28), 10, "u1", "i8")
    assert datasets.channel_statistics(first.train_x)[0] == pytest.approx(first.mean, abs=1e-4)
    assert datasets.channel_statistics(first.train_x)[1] == pytest.approx(first.std, abs=1e-4)


def test_a_rank_pages_in_only_the_rows_that_it_uses(tmp_path: Path) -> None:
    fake_mnist(tmp_path, (60_000, 10))
    Mnist(str(tmp_path)).load()
    data = Mnist(str(tmp_path)).load()
    assert isinstance(data.train_x, np.memmap)
    assert not data.train_x.flags.writeable

    def resident() -> int:
        at, total = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line.split()[0].count("-") == 1 and not line.split()[0].endswith(":"):
                at = line.endswith(data_file)
            elif at and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    data_file = str(next(cache.directory().glob("mnist-*.h5")))
    assert resident() < 8000, "kB; the check of its CRC must not map 47 MB"
    data.train_x[[5, 30_000]].sum()
    assert 0 < resident() < 8000  # the kernel maps some pages around
    data.train_x.sum()
    assert resident() > 40_000
    # nothing but the maps stays open
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0


def test_where_torchvisions_sets_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mnist().place() == tmp_path / "user/fldist/data"
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path / "b/../c"))
    assert Mnist().place() == tmp_path / "c"
    assert Mnist("~/x").place() == Path.home() / "x"
    monkeypatch.chdir(tmp_path)
    assert Mnist("y").place() == tmp_path / "y"
    monkeypatch.delenv("FLDIST_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("FLDIST_CACHE")
    assert Mnist().place() == Path.home() / ".cache/fldist/data"
    assert cache.directory() == Path.home() / ".cache/fldist"


def test_missing_files_are_named_and_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "torchvision", never)
    path = tmp_path / "user/fldist/data/MNIST/raw/train-images-idx3-ubyte"
    refused(
        Mnist().load,
        f"task.data.root: no mnist found: looked for {path}; `fldist data prepare mnist` downloads it; or set "
        "FLDIST_DATA to the folder that has it",
    )
    refused(Mnist(str(tmp_path)).load, f"prepare mnist --root {tmp_path}` downloads it; or correct task.data.root")
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path))
    assert "JPEG" not in refused(Cifar10().load, "cifar-10-batches-py/data_batch_1; ", "set or correct FLDIST_DATA")
    (tmp_path / "cifar10-jpg.zip").touch()
    assert refused(Cifar10().load).endswith("there with task.data={name: images, path: cifar10-jpg.zip}")
    assert refused(Cifar10(str(tmp_path)).load).endswith(f"path: {tmp_path / 'cifar10-jpg.zip'}}}")
    assert "JPEG" not in refused(Cifar100().load, str(tmp_path / "cifar-100-python/train"))
    refused(Svhn().load, f"looked for {tmp_path}/train_32x32.mat;")
    fake_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    refused(Mnist().load, "looked for", "t10k-labels-idx1-ubyte; ")


def test_fashion_mnist(tmp_path: Path) -> None:
    made = fake_mnist(tmp_path, folder="FashionMNIST/raw")
    data = FashionMnist(str(tmp_path)).load()
    assert np.array_equal(data.train_x[:, 0], made["train_x"])
    assert np.array_equal(data.test_y, made["t10k_y"])
    assert (data.class_names[0], data.class_names[9]) == ("T-shirt/top", "Ankle boot")
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))


def test_mnist_reads_the_files_it_looks_at(tmp_path: Path) -> None:
    made = fake_mnist(tmp_path)
    old = tmp_path / "MNIST/processed"
    old.mkdir()
    for name in ("training.pt", "test.pt"):  # torchvision would take these instead
        (old / name).write_bytes(b"anything")
    assert np.array_equal(Mnist(str(tmp_path)).load().train_x[:, 0], made["train_x"])


def cut(n: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:n]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("train-images-idx3-ubyte", cut(0), "it does not begin as an IDX file"),
        ("train-images-idx3-ubyte", cut(15), "it does not begin as an IDX file"),
        ("train-images-idx3-ubyte", cut(16), f"16 bytes instead of {16 + 30 * 784}"),
        ("t10k-images-idx3-ubyte", cut(-1), f"{15 + 10 * 784} bytes instead of"),
        ("t10k-images-idx3-ubyte", lambda d: d + b"\0", f"{17 + 10 * 784} bytes instead of"),
        ("t10k-labels-idx1-ubyte", cut(-1), "17 bytes instead of 18"),
        ("train-labels-idx1-ubyte", lambda d: b"\0\0\x0d" + d[3:], "it does not begin as an IDX file"),
        ("train-images-idx3-ubyte", lambda d: d[:8] + bytes([0, 0, 0, 56, 0, 0, 0, 14]) + d[16:], "images of 56x14"),
        ("train-images-idx3-ubyte", lambda d: d[:4] + b"\xff" * 12 + d[16:], "is damaged"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, name: str, change: Callable[[bytes], bytes], says: str) -> None:
    fake_mnist(tmp_path)
    path = tmp_path / "MNIST/raw" / name
    path.write_bytes(change(path.read_bytes()))
    remedy = f"; delete it and run `fldist data prepare mnist --root {tmp_path}`, which downloads it again"
    refused(Mnist(str(tmp_path)).load, f"task.data.root: {path} is damaged (", says, remedy)
    assert not list(cache.directory().glob("*.h5")) + list(cache.directory().glob("*.tmp"))


def test_idx_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    fake_mnist(tmp_path)
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(29, dtype=np.uint8))
    refused(Mnist(str(tmp_path)).load, "has 30 rows of train_x and 29 of train_y")
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.full(30, 10, dtype=np.uint8))
    refused(Mnist(str(tmp_path)).load, "train_y must be 0 to 9, not 10 to 10")


class Touch:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def md5(path: Path) -> str:
    from torchvision.datasets.utils import calculate_md5

    return str(calculate_md5(str(path)))


def fake_cifar(root: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, extra: Any = None) -> dict[str, Any]:
    """Files in CIFAR's own format, and their MD5 sums in torchvision's lists; returns rows and labels."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    ten = kind.base_folder == "cifar-10-batches-py"
    made: dict[str, Any] = {}
    for which in ("train_list", "test_list"):
        sums, rows, labels = [], [], []
        for name, _ in getattr(kind, which):
            x = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
            y = RNG.integers(0, 10 if ten else 100, 4).tolist()
            entry = {"data": x, "labels" if ten else "fine_labels": y, "coarse_labels": [0] * 4, "extra": extra}
            (folder / name).write_bytes(pickle.dumps(entry))
            sums.append([name, md5(folder / name)])
            rows.append(x)
            labels += y
        monkeypatch.setattr(kind, which, sums)
        made[which] = (np.concatenate(rows).reshape(-1, 3, 32, 32), labels)
    names = [f"name{i}" for i in range(10 if ten else 100)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / kind.meta["filename"])})
    return made


@pytest.mark.parametrize("ours", [Cifar10, Cifar100])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: type[Cifar10]) -> None:
    kind = getattr(torchvision().datasets, ours.kind)
    made = fake_cifar(tmp_path, kind, monkeypatch)
    data = ours(str(tmp_path)).load()
    for x, y, which in ((data.train_x, data.train_y, "train_list"), (data.test_x, data.test_y, "test_list")):
        assert np.array_equal(x, made[which][0])
        assert y.tolist() == made[which][1]
    assert data.class_names[:2] == ("name0", "name1")
    assert len(data.class_names) == data.classes == (10 if ours is Cifar10 else 100)
    assert data.mean == ours.mean
    assert len(data.std) == 3


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_changed_byte_of_cifar_is_refused_before_anything_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind = torchvision().datasets.CIFAR10
    fake_cifar(tmp_path, kind, monkeypatch)
    path = tmp_path / kind.base_folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(Cifar10(str(tmp_path)).load, f"{path} is damaged (its MD5 sum is not the published one); delete it and run")
    path.write_bytes(pickle.dumps(Touch(tmp_path / "owned")))
    refused(Cifar10(str(tmp_path)).load, f"{path} is damaged")
    monkeypatch.setattr(Cifar10, "_check_files", lambda self: None)  # torchvision's own check holds without ours
    with pytest.raises(Exception, match="corrupted"):
        Cifar10(str(tmp_path)).load()
    assert not (tmp_path / "owned").exists()


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    kind = torchvision().datasets.SVHN
    made, lists = {}, dict(kind.split_list)
    for split, n in (("train", 12), ("test", 5)):
        x = RNG.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)  # [h, w, c, n] in these files
        y = (np.arange(n) % 10 + 1).astype(np.uint8)  # 1 to 10; 10 is the digit 0
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": x, "y": y[:, None]})
        lists[split] = [*lists[split][:2], md5(path)]
        made[split] = (x, y)
    monkeypatch.setattr(kind, "split_list", lists)
    data = Svhn(str(tmp_path)).load()
    assert data.shape == (3, 32, 32)
    assert data.train_x[7, 2, 5, 31] == made["train"][0][5, 31, 2, 7]
    assert np.array_equal(data.test_x, made["test"][0].transpose(3, 2, 0, 1))
    assert data.train_y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert data.mean == pytest.approx(made["train"][0].mean(axis=(0, 1, 3)) / 255, abs=1e-12)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refused(Svhn(str(tmp_path)).load, f"{path} is damaged (its MD5")


# ---- mean and deviation
def test_channel_statistics_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((3, 2, 1, 2), dtype=np.uint8)
    x[:, 0] = [[[0, 51]], [[102, 153]], [[204, 255]]]
    x[:, 1] = 51
    for values in (1, 5, 1 << 22):  # blocks of one row, of two that do not divide three, and of all
        monkeypatch.setattr(datasets, "_BLOCK_VALUES", values)
        mean, std = datasets.channel_statistics(x)
        assert mean == pytest.approx((0.5, 0.2), abs=1e-15)
        assert std == pytest.approx((np.sqrt((0.25 + 0.09 + 0.01) / 3), 1.0), abs=1e-15)
        mean, std = datasets.channel_statistics(x[:, :1, 0].astype(np.float32))  # [3, 1, 2]: no images, one mean
        assert mean == pytest.approx((127.5,))
        assert std == pytest.approx((255 * np.sqrt(0.35 / 3),))


def test_statistics_are_those_given_or_else_calculated() -> None:
    x, y = np.full((2, 1, 1, 1), 51, dtype=np.uint8), np.zeros(2, dtype=np.int64)
    assert datasets.Dataset(x, y, x, y, 1, (), (0.1,), (0.3,)).statistics() == ((0.1,), (0.3,))
    assert datasets.Dataset(x, y, x, y, 1).statistics() == ((0.2,), (1.0,))


# ---- images
def image_bytes(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    image = PIL.Image.fromarray(pixels)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, form)
    return out.getvalue()


def grey(h: int = 4, w: int = 4) -> np.ndarray:
    return RNG.integers(0, 256, (h, w), dtype=np.uint8)


def colour(h: int = 4, w: int = 4) -> np.ndarray:
    return RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)


def four(**changes: bytes | None) -> dict[str, bytes]:
    """A small data set by file names; `train_b_0=...` changes train/b/0.png, None removes it."""
    made = {f"{s}/{c}/0.png": image_bytes(grey()) for s in ("train", "test") for c in "ab"}
    for key, value in changes.items():
        name = key.replace("_", "/") + ".png"
        made.pop(name, None)
        if value is not None:
            made[name] = value
    return made


def place(path: Path, files: dict[str, bytes]) -> str:
    """Write files to a folder, or to a zip when its name says so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as made:
            for name, data in files.items():
                made.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return str(path)


@pytest.mark.parametrize("form", ["folder", "set.zip"])
@pytest.mark.parametrize("around", ["", "around/"])
@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_images_in_a_folder_or_a_zip(tmp_path: Path, form: str, around: str, test: str) -> None:
    pixels = {
        f"{split}/{name}/{file}": colour(3, 5)
        for split, name, file in [
            ("train", "cat", "10.png"), ("train", "cat", "9.png"), ("train", "ant", "b.png"), ("train", "ant", "A.PNG"),
            (test, "cat", "2.png"), (test, "ant", "7.png"), (test, "cat", "1.png"),
        ]
    }  # fmt: skip
    others = {f"train/cat/{n}": b"x" for n in ("notes.txt", ".hidden.png")} | {"__MACOSX/train/x/1.png": b"x"}
    others["more/readme.png" if not around else "readme.md"] = b"x"
    files = {around + name: image_bytes(p) for name, p in pixels.items()} | {
        name if name.startswith("__") else around + name: data for name, data in others.items()
    }
    data = Images(place(tmp_path / form, files)).load()
    order = ["train/ant/A.PNG", "train/ant/b.png", "train/cat/10.png", "train/cat/9.png"]
    assert np.array_equal(data.train_x, [pixels[n].transpose(2, 0, 1) for n in order])
    assert data.train_y.tolist() == [0, 0, 1, 1]
    order = [f"{test}/ant/7.png", f"{test}/cat/1.png", f"{test}/cat/2.png"]
    assert np.array_equal(data.test_x, [pixels[n].transpose(2, 0, 1) for n in order])
    assert data.test_y.tolist() == [0, 1, 1]
    assert (data.classes, data.class_names, data.shape, data.notes) == (2, ("ant", "cat"), (3, 3, 5), ())
    train = np.array([pixels[n] for n in pixels if n.startswith("train")])
    assert data.mean == pytest.approx(train.mean(axis=(0, 1, 2)) / 255, abs=1e-12)
    assert data.std == pytest.approx(train.std(axis=(0, 1, 2)) / 255, abs=1e-12)


def test_test_is_preferred_to_val(tmp_path: Path) -> None:
    files = four() | {f"val/{c}/{i}.png": image_bytes(grey()) for c in "ab" for i in range(3)}
    assert len(Images(place(tmp_path / "x", files)).load().test_x) == 2


def test_channels(tmp_path: Path) -> None:
    def load(files: dict[str, bytes], channels: Any = None) -> datasets.Dataset:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return Images(place(path, files), channels=channels).load()

    assert load(four()).shape == (1, 4, 4)
    one = colour()
    for at in ("train_a_0", "test_b_0"):  # the first or the last has colour
        data = load(four(**{at: image_bytes(one)}))
        assert data.shape == (3, 4, 4)
        x = np.concatenate([data.train_x, data.test_x])
        assert np.array_equal(x[0 if at == "train_a_0" else 3], one.transpose(2, 0, 1))
        assert (x[1, 0] == x[1, 1]).all() and (x[1, 0] == x[1, 2]).all(), "grey in three channels"
    assert load(four(), 3).shape == (3, 4, 4)
    data = load(four(train_a_0=image_bytes(one)), 1)
    assert np.array_equal(data.train_x[0, 0], np.asarray(PIL.Image.fromarray(one).convert("L")))
    for mode, channels in (("RGBA", 3), ("P", 3), ("1", 1), ("LA", 1)):
        assert load(four(train_a_0=image_bytes(one, mode=mode))).shape[0] == channels, mode
    deep = image_bytes(np.full((4, 4), 40_000, dtype=np.uint16))
    refused(lambda: load(four(train_b_0=deep)), "train/b/0.png cannot be decoded (mode I;16 has more than 8 bits")


def test_sizes(tmp_path: Path) -> None:
    big = colour(8, 6)
    files = four(train_a_0=image_bytes(colour(4, 5)), train_b_0=image_bytes(big))
    path = place(tmp_path / "x", files)
    refused(
        Images(path).load,
        f"task.data.path: {path}: images differ in size: train/a/0.png is 5x4 and train/b/0.png is 6x8; "
        "set task.data.size (e.g. task.data.size=4) to bring all to one",
    )
    data = Images(path, size=7).load()
    assert data.shape == (3, 7, 7)
    want = PIL.Image.fromarray(big).resize((7, 7), PIL.Image.Resampling.BILINEAR)
    assert np.array_equal(data.train_x[1], np.asarray(want).transpose(2, 0, 1))
    assert Images(path, size=5).load().shape == (3, 5, 5), "another size is another cache"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (four(test_c_0=b"x"), "class 'c' is in test and not in train; add training images or remove it"),
        (four(test_a_0=None, test_b_0=None), "must be laid out split/class/image with the splits train and test"),
        (four(train_a_0=None, train_b_0=None), "its folders with images are: a, b"),  # `test` is taken for a wrapper
        ({}, "its folders with images are: none"),
        ({f"x/y/{n}": d for n, d in four().items()}, "its folders with images are: y"),
        (four() | {"train/a/deep/1.png": b"x"}, "train/a/deep/1.png does not lie in split/class/image; move it"),
        (four() | {"train/1.png": b"x"}, "train/1.png does not lie in split/class/image"),
        (four(train_b_0=b"no image"), "train/b/0.png cannot be decoded (it is no BMP, GIF, JPEG"),
        (four(train_b_0=image_bytes(colour(64, 64), "JPEG")[:-900]), "train/b/0.png cannot be decoded (image file is"),
        (four(test_b_0=image_bytes(grey(64, 64))[:-2000]), "test/b/0.png cannot be decoded ("),
        (four(test_b_0=b""), "test/b/0.png cannot be decoded ("),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["folder", "set.zip"])
def test_images_that_cannot_be_used(tmp_path: Path, form: str, files: dict[str, bytes], says: str) -> None:
    path = tmp_path / form
    if form == "folder":
        path.mkdir()
    if says.endswith("a, b"):
        says = "its folders with images are: test"
    refused(Images(place(path, files)).load, f"task.data.path: {path}", says)
    assert not list(cache.directory().glob("*.h5")) + list(cache.directory().glob("*.tmp"))


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(tmp_path / "x.zip", four(train_b_0=image_bytes(grey(20, 20))))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns
    with pytest.warns(PIL.Image.DecompressionBombWarning):
        refused(Images(path, size=4).load, "train/b/0.png cannot be decoded (20x20 pixels are more than 300)")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 150)  # Pillow refuses
    refused(Images(path, size=4).load, "train/b/0.png cannot be decoded (Image size (400 pixels) exceeds limit")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 400)
    assert Images(path, size=4).load().shape == (1, 4, 4)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in four(train_b_0=b"\0" * 1001).items():
            made.writestr(name, data)
    refused(Images(str(tmp_path / "x.zip")).load, "train/b/0.png is larger than 1000 bytes; remove it")


def test_no_file_makes_pillow_start_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/owned\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    refused(Images(place(tmp_path / "x", four(train_b_0=eps))).load, "train/b/0.png cannot be decoded (it is no BMP")
    assert not (tmp_path / "owned").exists()


def test_broken_zips(tmp_path: Path) -> None:
    path = Path(place(tmp_path / "x.zip", four()))
    whole = path.read_bytes()
    for cut_at in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut_at])
        refused(Images(str(path)).load, f"task.data.path: {path} cannot be read as a zip (")
    flipped = bytearray(whole)
    with zipfile.ZipFile(io.BytesIO(whole)) as made:
        flipped[made.getinfo("train/b/0.png").header_offset + 30 + len("train/b/0.png") + 40] ^= 1
    path.write_bytes(flipped)
    refused(Images(str(path)).load, "train/b/0.png cannot be read (Bad CRC-32", "get the data again")


def test_names_in_a_zip_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    files = four() | {"train/a/../../../escaped.png": image_bytes(grey()), "/train/a/9.png": image_bytes(grey())}
    path = place(tmp_path / "inner/x.zip", files)
    before = sorted(tmp_path.rglob("*"))
    refused(Images(path).load, "does not lie in split/class/image")
    assert [p for p in sorted(tmp_path.rglob("*")) if "cache" not in str(p)] == before


def test_images_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(shape: tuple[int, ...], dtype: Any) -> Any:
        raise MemoryError

    own = Images(place(tmp_path / "x.zip", four()))
    monkeypatch.setattr(np, "empty", small)
    refused(own.load, "4 images of (1, 4, 4) do not fit into memory; set task.data.size")


def test_a_sample_of_cifar_as_jpeg(tmp_path: Path) -> None:
    source = needs_data("cifar10-jpg.zip") / "cifar10-jpg.zip"
    with zipfile.ZipFile(source) as real, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        entries = [i for i in real.infolist() if i.filename.endswith(("07.jpg", "42.jpg"))][::10]
        for info in entries:
            some.writestr(info.filename, real.read(info))
    with zipfile.ZipFile(source) as real:
        data = Images(str(tmp_path / "some.zip")).load()
        names = sorted(i.filename for i in entries if "/train/" in i.filename)
        assert len(data.train_x) == len(names) > 50
        for row in (0, len(names) // 2, len(names) - 1):
            want = np.asarray(PIL.Image.open(io.BytesIO(real.read(names[row]))))
            assert np.array_equal(data.train_x[row], want.transpose(2, 0, 1))
            assert data.class_names[data.train_y[row]] == names[row].split("/")[2]
    assert (data.classes, data.class_names[0], data.class_names[9], data.shape) == (
        10,
        "airplane",
        "truck",
        (3, 32, 32),
    )


def test_where_images_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path / "there"))
    refused(
        Images("set").load,
        f"task.data.path: no data found: looked for {tmp_path}/here/set and {tmp_path}/there/set; put it there, or "
        "correct task.data.path",
    )
    place(tmp_path / "there/set", four())
    assert len(Images("set").load().train_x) == 2
    place(tmp_path / "here/set", four(train_b_0=None, test_b_0=None))
    assert len(Images("set").load().train_x) == 1
    refused(Hdf5("set").load, "no data found")


def test_a_changed_image_is_noticed(tmp_path: Path) -> None:
    path = place(tmp_path / "x", four())
    Images(path).load()
    (tmp_path / "x/train/a/.DS_Store").touch()
    assert Images(path).load().notes == ()
    new = grey()
    (tmp_path / "x/train/a/1.png").write_bytes(image_bytes(new))
    data = Images(path).load()
    assert "has changed" in data.notes[0]
    assert np.array_equal(data.train_x[1, 0], new)
    os.utime(tmp_path / "x/train/a/1.png", ns=(1, 1))
    assert "has changed" in Images(path).load().notes[0]
    (tmp_path / "x/train/a/1.png").unlink()
    (tmp_path / "x/train/a/1.png").symlink_to(tmp_path / "nowhere")
    refused(Images(path).load, "1.png cannot be read (No such file or directory); correct or remove it")


def test_a_cache_outlives_its_sources(tmp_path: Path) -> None:
    fake_mnist(tmp_path / "m")
    want = Mnist(str(tmp_path / "m")).load().train_x.tobytes()
    shutil.rmtree(tmp_path / "m")
    data = Mnist(str(tmp_path / "m")).load()
    assert data.train_x.tobytes() == want
    assert data.notes == (
        f"what the cache {next(cache.directory().glob('mnist-*.h5'))} was decoded from is not there any more; "
        "the cache is used",
    )
    refused(Mnist(str(tmp_path / "n")).load, "no mnist found")
    path = place(tmp_path / "x.zip", four())
    Images(path).load()
    Path(path).unlink()
    assert "not there any more" in Images(path).load().notes[0]
    refused(Images(path, size=3).load, "no data found")
    for made in cache.directory().glob("*.h5"):
        made.write_bytes(b"")
    refused(Images(path).load, "no data found")
    refused(Mnist(str(tmp_path / "m")).load, "no mnist found")


# ---- the cache
@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Path, bytes]]:
    """A cache of a small MNIST with its bytes; it must be whole again at the end, and alone."""
    fake_mnist(tmp_path)
    Mnist(str(tmp_path)).load()
    path = next(cache.directory().glob("*.h5"))
    whole = path.read_bytes()
    yield path, whole
    assert path.read_bytes() == whole
    assert files_in(path.parent) == {path.name, f"{path.name}.lock"}


def rebuilt(tmp_path: Path, why: str) -> None:
    path = next(cache.directory().glob("*.h5"))
    data = Mnist(str(tmp_path)).load()
    assert len(data.notes) == 1
    assert data.notes[0].startswith(f"the cache {path} was damaged (")
    assert data.notes[0].endswith(") and has been rebuilt")
    assert why in data.notes[0]
    assert Mnist(str(tmp_path)).load().notes == ()


def test_truncated_caches_are_rebuilt(tmp_path: Path, made: tuple[Path, bytes]) -> None:
    path, whole = made
    for length in (0, 1, 100, 4096, 10_000, len(whole) // 2, len(whole) - 5000, len(whole) - 1):
        path.write_bytes(whole[:length])
        rebuilt(tmp_path, "")
    path.write_bytes(b"not HDF5 " * 1000)
    rebuilt(tmp_path, "signature")


@pytest.mark.parametrize("name", ["train_x", "train_y", "test_x", "test_y"])
def test_a_flipped_bit_is_found(
    tmp_path: Path, made: tuple[Path, bytes], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = made
    with h5py.File(path, "r") as file:
        offset, size = file[name].id.get_offset(), file[name].nbytes
    assert offset % 4096 == 0
    for at in (0, size // 2, size - 1):
        path.write_bytes(whole[: offset + at] + bytes([whole[offset + at] ^ 1]) + whole[offset + at + 1 :])
        with caplog.at_level(logging.WARNING, "fldist.data"):
            caplog.clear()
            rebuilt(tmp_path, f"(CRC of {name})")
        assert [r.message for r in caplog.records] == [f"the cache {path} was damaged (CRC of {name}): it is rebuilt"]


@pytest.mark.parametrize("damage", [
    lambda f: f["train_x"].attrs.__delitem__("crc32"),
    lambda f: f["test_y"].attrs.__setitem__("crc32", "text"),
    lambda f: f.attrs.__delitem__("about"),
    lambda f: f.attrs.__delitem__("crc32"),
    lambda f: f.attrs.__setitem__("about", f.attrs["about"].replace("0.1307", "0.9307")),
    lambda f: f.__delitem__("test_x"),
    lambda f: f.move("test_x", "text_x"),
])  # fmt: skip
def test_missing_or_changed_attributes_are_found(
    tmp_path: Path, made: tuple[Path, bytes], damage: Callable[[Any], None]
) -> None:
    with h5py.File(made[0], "a") as file:
        damage(file)
    rebuilt(tmp_path, "")


def test_a_changed_type_or_shape_is_found(tmp_path: Path, made: tuple[Path, bytes]) -> None:
    for change in (lambda a: a.view(np.int8), lambda a: a.reshape(len(a), 1, 14, 56)):
        with h5py.File(made[0], "a") as file:
            x, crc = change(file["train_x"][...]), file["train_x"].attrs["crc32"]
            del file["train_x"]
            file["train_x"] = x
            file["train_x"].attrs["crc32"] = crc
        rebuilt(tmp_path, "(CRC of train_x)")


def test_any_flipped_byte_of_the_description_is_survived(tmp_path: Path, made: tuple[Path, bytes]) -> None:
    path, whole = made
    want = Mnist(str(tmp_path)).load()
    with h5py.File(path, "r") as file:
        spans = [(file[n].id.get_offset(), file[n].nbytes) for n in file]
    outside = [at for at in range(len(whole)) if not any(o <= at < o + n for o, n in spans) and whole[at]]
    for at in outside[:: max(1, len(outside) // 60)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        got = Mnist(str(tmp_path)).load()
        assert np.array_equal(got.train_x, want.train_x)
        assert (got.mean, got.class_names, got.train_y.tolist()) == (want.mean, want.class_names, want.train_y.tolist())
    path.write_bytes(whole)


def test_another_format_or_source_is_decoded_again(
    tmp_path: Path, made: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "FORMAT", 2)
        assert Mnist(str(tmp_path)).load().notes == (
            f"the cache {made[0]} has another format (1, not 2) and has been rebuilt",
        )
    assert "another format (2, not 1)" in Mnist(str(tmp_path)).load().notes[0]
    old = Mnist(str(tmp_path)).load()
    before = old.train_x.tobytes()
    source = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    state, images = source.stat(), source.read_bytes()
    source.write_bytes(images[:16] + images[16:][::-1])
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with caplog.at_level(logging.WARNING, "fldist.data"):
        caplog.clear()
        assert "the source of the cache" in Mnist(str(tmp_path)).load().notes[0]
    assert "has changed" in caplog.text
    assert old.train_x.tobytes() == before, "a map of the old file stays what it was"
    source.write_bytes(images)
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "has changed" in Mnist(str(tmp_path)).load().notes[0]


def test_a_good_cache_is_only_read(tmp_path: Path, made: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    (made[0].parent / f"{made[0].name}.lock").unlink()
    state = made[0].parent.stat().st_mtime_ns
    monkeypatch.setattr(Mnist, "_decode", never)
    assert Mnist(str(tmp_path)).load().notes == ()
    assert made[0].parent.stat().st_mtime_ns == state
    (made[0].parent / f"{made[0].name}.lock").touch()


def test_read_only_and_unwritable_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    fake_mnist(tmp_path)
    monkeypatch.setenv("FLDIST_CACHE", str(blocked / "cache"))
    refused(
        Mnist(str(tmp_path)).load,
        f"FLDIST_CACHE: the cache directory {blocked}/cache cannot be written (",
        "; set FLDIST_CACHE to a folder that can",
    )
    home = Path(tempfile.mkdtemp())  # tmp_path is closed to others, and root may write anywhere
    try:
        home.chmod(0o755)
        fake_mnist(home)
        fake_mnist(home / "other")
        monkeypatch.setenv("FLDIST_CACHE", str(home / "cache"))
        Mnist(str(home)).load()
        (home / "cache").chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        assert len(Mnist(str(home)).load().train_x) == 30
        refused(Mnist(str(home / "other")).load, f"FLDIST_CACHE: the cache directory {home}/cache cannot be written (")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (home / "cache").chmod(0o755)
        shutil.rmtree(home)


def test_a_failed_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mnist(tmp_path)
    with monkeypatch.context() as patch:

        def full(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(cache, "_fill", full)
        refused(Mnist(str(tmp_path)).load, "cannot be written ([Errno 28] No space left on device); set FLDIST_CACHE")
        assert all(name.endswith(".lock") for name in files_in(cache.directory()))

        def interrupted(*_: Any) -> int:
            raise KeyboardInterrupt

        patch.setattr(cache, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Mnist(str(tmp_path)).load()
        assert all(name.endswith(".lock") for name in files_in(cache.directory()))
    assert Mnist(str(tmp_path)).load().notes == ()


def test_a_disk_that_does_not_keep_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mnist(tmp_path)
    monkeypatch.setattr(cache, "_fill", lambda dataset, array: 0)
    refused(Mnist(str(tmp_path)).load, "was damaged (", "though it was just written; is its disk full or failing?")


SLOW = """
import logging, os, sys, time
logging.basicConfig(level=logging.WARNING)
from fldist.data import cache, datasets
path, log, how = sys.argv[1:]
decode, fill = datasets.Images._decode, cache._fill
def slowly(self, place):
    open(log, 'a').write(f'{os.getpid()}\\n')
    time.sleep(1.5 if how == 'slow' else 0)
    return decode(self, place)
def never_ending(dataset, array):
    dataset[:1] = array[:1]
    dataset.file.flush()
    print('writing', flush=True)
    time.sleep(60)
datasets.Images._decode = slowly
if how == 'die': cache._fill = never_ending
print(datasets.Images(path).load().train_x.astype('i8').sum())
"""


def writer(path: str, log: Path, how: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SLOW, path, str(log), how]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    pixels = grey()
    files = four(train_a_0=image_bytes(pixels), train_b_0=image_bytes(pixels))
    source = place(tmp_path / "x.zip", files)
    started = [writer(source, tmp_path / "log", "slow") for _ in range(3)]
    said = [process.communicate(timeout=60) for process in started]
    assert [out.strip() for out, _ in said] == [str(2 * pixels.astype(np.int64).sum())] * 3
    wrote = (tmp_path / "log").read_text().split()
    assert len(wrote) == 1
    path = next(cache.directory().glob("*.h5"))
    for process, (_, err) in zip(started, said, strict=True):
        line = f"waiting for process {wrote[0]}, which decodes images into {path}"
        assert err.count(line) == (0 if str(process.pid) == wrote[0] else 1)
    assert files_in(path.parent) == {path.name, f"{path.name}.lock"}


def test_a_killed_writer_is_forgotten(tmp_path: Path) -> None:
    pixels = grey()
    source = place(tmp_path / "x.zip", four(train_b_0=image_bytes(pixels)))
    process = writer(source, tmp_path / "log", "die")
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    left = files_in(cache.directory())
    assert any(name.endswith(".tmp") for name in left)
    assert not any(name.endswith(".h5") for name in left)
    (cache.directory() / "images-000000000000.h5.77.tmp").touch()  # another file's: its writer may be alive
    data = Images(source).load()
    assert np.array_equal(data.train_x[1, 0], pixels)
    assert data.notes == ()
    left = files_in(cache.directory())
    assert {name for name in left if name.endswith(".tmp")} == {"images-000000000000.h5.77.tmp"}


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    fake_mnist(tmp_path)
    entry = Mnist(str(tmp_path)).entry()
    cache.directory().mkdir()
    monkeypatch.setattr(cache, "WAIT_S", 0.3)
    with Path(f"{entry.path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        began = time.monotonic()
        refused(
            Mnist(str(tmp_path)).load,
            f"waited 0 s for process 4711, which decodes mnist into {entry.path}; if it hangs, end it; or prepare",
        )
        assert 0.3 <= time.monotonic() - began < 5
    assert len(Mnist(str(tmp_path)).load().train_x) == 30


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8).transpose(2, 0, 1)
    entry = cache.Entry("own", "x")
    got, notes = entry.load("1", lambda: cache.Contents({"a": x, "b": x.astype(np.float32)}, {"n": [1.5, "é"]}))
    assert notes == ()
    assert np.array_equal(got.arrays["a"], x)
    assert (got.arrays["a"].dtype, got.arrays["b"].dtype) == (np.uint8, np.float32)
    assert got.facts == {"n": [1.5, "é"]}
    again, _ = entry.load("1", never)
    assert np.array_equal(again.arrays["b"], x)
    assert entry.path != cache.Entry("own", "y").path
    with h5py.File(entry.path, "r") as file:
        assert json.loads(file.attrs["about"])["source"] == "x"


def test_large_arrays_are_written_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 100)
    x = RNG.integers(0, 256, (23, 37), dtype=np.uint8)
    got, _ = cache.Entry("own", "blocks").load("1", lambda: cache.Contents({"a": x}, {}))
    assert np.array_equal(got.arrays["a"], x)


# ---- HDF5 of one's own
def hdf5(path: Path, options: dict[str, Any] | None = None, **changes: Any) -> Hdf5:
    arrays = {
        "train_x": RNG.integers(0, 256, (6, 1, 4, 4), dtype=np.uint8), "train_y": np.arange(6) % 3,
        "test_x": RNG.integers(0, 256, (3, 1, 4, 4), dtype=np.uint8), "test_y": np.arange(3),
    } | changes  # fmt: skip
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **(options or {}))
    return Hdf5(str(path))


def test_hdf5_is_mapped_where_it_can_be(tmp_path: Path) -> None:
    x = RNG.integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    data = hdf5(tmp_path / "a.h5", train_x=x).load()
    assert isinstance(data.train_x, np.memmap)
    assert not data.train_x.flags.writeable
    assert np.array_equal(data.train_x, x)
    assert (data.train_x.dtype, data.classes, data.mean, data.train_y.dtype) == (np.uint8, 3, (), np.int64)
    assert data.statistics()[0] == pytest.approx((x.mean() / 255,))
    data = hdf5(tmp_path / "b.h5", {"compression": "gzip"}, train_x=x).load()
    assert not isinstance(data.train_x, np.memmap)
    assert np.array_equal(data.train_x, x)
    for kind, mapped in (("<f4", True), (">f4", False), ("<f8", False), ("<f2", False), ("<i2", False)):
        data = hdf5(tmp_path / "c.h5", train_x=x.astype(kind), test_x=x[:3].astype(kind)).load()
        assert data.train_x.dtype == np.float32
        assert isinstance(data.train_x, np.memmap) is mapped, kind
        assert np.array_equal(data.train_x, x)
    assert not cache.directory().exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_y": np.array([0, 1, 2, -1, 0, 0])}, "train_y must be 0 to 2, not -1 to 2"),
        ({"train_y": np.zeros(6)}, "train_y of {path} must be [n] integers, not float64 (6,)"),
        ({"test_y": np.zeros((3, 1), dtype=int)}, "test_y of {path} must be [n] integers, not int64 (3, 1)"),
        ({"test_y": np.zeros(2, dtype=int)}, "{path} has 3 rows of test_x and 2 of test_y"),
        ({"test_x": np.zeros((3, 1, 4, 5), dtype=np.uint8)}, "and one of test_x uint8 (1, 4, 5); make them alike"),
        ({"test_x": np.zeros((3, 1, 4, 4))}, "and one of test_x float32 (1, 4, 4); make them alike"),
        ({"test_x": np.zeros((0, 1, 4, 4), dtype=np.uint8), "test_y": np.zeros(0, dtype=int)}, "no rows of test_x"),
        ({"train_x": np.array([b"a"] * 6)}, "train_x of {path} must be [n, ...] numbers, not |S1"),
        ({"train_x": np.float32(3)}, "train_x of {path} must be [n, ...] numbers, not float32 ()"),
    ],
)
def test_hdf5_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "a.h5"
    refused(hdf5(path, **changes).load, "task.data.path: ", says.format(path=path))


def test_hdf5_that_is_damaged_or_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    own = hdf5(path)
    whole = path.read_bytes()
    for length in (0, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(own.load, f"task.data.path: {path} cannot be read as HDF5 (")
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        del file["test_y"]
        file.create_group("test_y")
    refused(own.load, "has no 'test_y'; it needs train_x, train_y, test_x, test_y")


# ---- the command line
def test_list(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(catalogue.TEXTS) == list(datasets.NAMES)
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path))
    fake_mnist(tmp_path)
    fake_mnist(tmp_path, folder="FashionMNIST/raw")
    (tmp_path / "FashionMNIST/raw/t10k-labels-idx1-ubyte").unlink()
    zipped = place(tmp_path / "x.zip", four())
    Mnist().load()
    Images(zipped, size=4).load()
    code, out, err = command("data", "list")
    assert (code, err) == (0, "")
    parts = {name: f"\n{out}".partition(f"\n{name}\n")[2] for name in datasets.NAMES}
    for name in datasets.NAMES:
        assert parts[name].startswith(f"  {catalogue.TEXTS[name]}\n")
    path = Mnist().entry().path
    lines = parts["mnist"].splitlines()
    assert lines[1] == f"  from: {tmp_path}/MNIST/raw: there"
    assert lines[2] == f"  cached: {path}, {path.stat().st_size / 1e6:.1f} MB"
    assert "incomplete, t10k-labels-idx1-ubyte is missing" in parts["fashion-mnist"].splitlines()[1]
    assert parts["cifar10"].splitlines()[1].endswith("not there; `fldist data prepare cifar10` downloads it")
    assert parts["cifar10"].splitlines()[2] == "  cached: no"
    assert parts["images"].splitlines()[2].endswith(f" MB, of {zipped} (size 4)")


def test_list_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['fldist', 'data', 'list']\n"
        "import fldist.cli\n"
        "try: fldist.cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'torchvision', 'sklearn', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_prepare(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mnist(tmp_path)
    code, out, err = command("data", "prepare", "mnist", "--root", str(tmp_path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "rows: 30 to train, 10 to test",
        "shape: 1 x 28 x 28, uint8",
        "classes: 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)",
        f"size: {(40 * 784 + 40 * 8) / 1e6:.1f} MB decoded",
    ]
    assert lines[4].startswith("seconds: ")
    assert len(list(cache.directory().glob("mnist-*.h5"))) == 1
    next(cache.directory().glob("mnist-*.h5")).write_bytes(b"")
    assert command("data", "prepare", "mnist", "--root", str(tmp_path))[1].startswith("note: the cache ")
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "torchvision", never)
        assert command("data", "prepare", "mnist", "--root", str(tmp_path))[0] == 0, "nothing to download or decode"
    path = place(tmp_path / "x.zip", four(train_a_0=image_bytes(grey(8, 8))))
    assert "set task.data.size" in command("data", "prepare", "images", "--path", path)[2]
    code, out, _ = command("data", "prepare", "images", "--path", path, "--size", "6", "--channels", "3")
    assert code == 0
    assert "shape: 3 x 6 x 6, uint8\nclasses: 2 (a, b)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mnits"], "unknown name 'mnits'; did you mean 'mnist'?"),
        (["digits", "--root", "x"], "task.data.root: digits has no such field; it has no fields"),
        (["images"], "task.data.path: a value is needed"),
        (["images", "--path", "nowhere"], "task.data.path: no data found: looked for"),
        (["images", "--path", "x", "--size", "0"], "task.data.size: input should be greater than or equal to 1; got 0"),
        (["images", "--path", "x", "--channels", "2"], "task.data.channels: input should be 1 or 3; got 2"),
    ],
)
def test_prepare_errors(command: Cli, arguments: list[str], says: str) -> None:
    code, out, err = command("data", "prepare", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fldist: ")
    assert says in err
    assert err.count("\n") == 1


def test_prepare_downloads_what_is_missing(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    kind = torchvision().datasets.MNIST
    images = fake_mnist(tmp_path / "web")["train_x"]
    served, resources = tmp_path / "served", []
    served.mkdir()
    for name, _ in kind.resources:
        raw = (tmp_path / "web/MNIST/raw" / name.removesuffix(".gz")).read_bytes()
        (served / name).write_bytes(gzip.compress(raw))
        resources.append((name, md5(served / name)))
    monkeypatch.setattr(kind, "resources", resources)
    root = tmp_path / "new/root"
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(kind, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            code, out, err = command("data", "prepare", "mnist", "--root", str(root))
        finally:
            server.shutdown()
            thread.join()
    assert code == 0, err
    assert "rows: 30 to train, 10 to test" in out
    assert np.array_equal(Mnist(str(root)).load().train_x[:, 0], images)


def test_a_download_that_fails_is_one_line(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = torchvision().datasets
    monkeypatch.setattr(kinds.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(kinds.CIFAR10, "url", "http://127.0.0.1:9/x.tar.gz")
    monkeypatch.setattr(
        kinds.SVHN, "split_list", {k: ["http://127.0.0.1:9/x", *v[1:]] for k, v in kinds.SVHN.split_list.items()}
    )
    for name in ("mnist", "cifar10", "svhn"):
        code, _, err = command("data", "prepare", name, "--root", str(tmp_path))
        assert code == 2
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"fldist: task.data.root: {name} cannot be downloaded to {tmp_path} (")
        assert "refused" in last
        assert "; see to the network, or put " in last
    (tmp_path / "file").touch()
    _, _, err = command("data", "prepare", "mnist", "--root", str(tmp_path / "file"))
    assert "mnist cannot be downloaded to" in err


# ---- what tests need
def test_missing_data_skip_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").touch()
    monkeypatch.setattr(needs, "GIVEN", None)
    with pytest.raises(pytest.skip.Exception, match="needs there: FLDIST_DATA is not set"):
        needs_data("there")
    monkeypatch.setattr(needs, "GIVEN", str(tmp_path))
    assert needs_data("there") == tmp_path
    with pytest.raises(pytest.skip.Exception, match=f"FLDIST_DATA={tmp_path} has no gone"):
        needs_data("there", "gone")
    assert needs.skipped_all_the_same("needs there: FLDIST_DATA is not set")
    assert not needs.skipped_all_the_same("needs there, gone: FLDIST_DATA is not set")
    assert not needs.skipped_all_the_same("no GPU")


# ---- what a review found
def test_cifar_is_checked_in_a_process_that_never_imported_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in Cifar10.files:
        (folder / name).write_bytes(b"no pickle")
    (tmp_path / "test_32x32.mat").write_bytes(b"no mat")
    (tmp_path / "train_32x32.mat").write_bytes(b"no mat")
    for name, first in (("cifar10", "data_batch_1"), ("svhn", "train_32x32.mat")):
        config = {"task": {"data": {"name": name, "root": str(tmp_path)}}}
        program = f"from fldist.config import load, build; build(load({config!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert f"{first} is damaged (its MD5 sum is not the published one)" in done.stderr, done.stderr


def test_digits_do_without_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Digits().load()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLDIST_CACHE", str(tmp_path / "file" / "cache"))
    made = Digits().load()
    assert made.train_x.tobytes() == kept.train_x.tobytes()
    assert made.notes[0].startswith("digits are decoded at every start: FLDIST_CACHE: the cache directory")
    monkeypatch.delenv("FLDIST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", _homeless)
    assert "there is no home directory" in Digits().load().notes[0]


def _homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


class Odd:
    """A user's own, in types that are near enough."""

    def load(self) -> Dataset:
        x = np.linspace(0, 1, 96).reshape(6, 1, 4, 4)
        y = np.arange(6, dtype=np.int32) % 3
        return Dataset(x, y, x[:3], y[:3], 3)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ((1, 2), r"mine: it must return a fldist\.data\.datasets\.Dataset, .* it gave a tuple"),
        (dataclasses.replace(Odd().load(), train_y=np.zeros(6)), r"mine: labels must be \[n\] integers, not float64"),
        (dataclasses.replace(Odd().load(), classes=2), "mine: train_y must be 0 to 1, not 0 to 2"),
        (dataclasses.replace(Odd().load(), train_x=np.array(["a"] * 6)), "mine: samples of type <U1 are no numbers"),
    ],
)
def test_what_an_own_loader_returns_is_looked_at(made: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        accepted(made, "mine")
    good = accepted(Odd().load(), "mine")
    assert (good.train_x.dtype, good.train_y.dtype) == (np.float32, np.int64)


def test_public_rows_beside_a_subset_are_of_those_that_it_leaves_out() -> None:
    from fldist.config import build, load

    def of(**public: Any) -> Any:
        subset = {"train": 300, "choice": "random"}
        return build(load({"task": {"data": "digits", "subset": subset, "public": public}})).task

    plain, shared = of(), of(n=50)
    for one, other in zip(plain.parts, shared.parts, strict=True):
        assert np.array_equal(one, other)
    held = {tuple(x.flatten().tolist()) for x in shared.pooled()[0]}
    public, _ = shared.public()
    assert len(public) == 50
    assert not any(tuple(x.flatten().tolist()) in held for x in public)
    with pytest.raises(ValueError, match=r"task\.public\.n: 1200 of 1137 rows that task\.subset\.train leaves out"):
        of(n=1200)


def test_public_rows_named_as_the_same_data_set_are_kept_out_of_training() -> None:
    from fldist.config import build, load

    task = build(load({"task": {"data": "digits", "public": {"n": 100, "data": "digits"}}})).task
    assert task.num_train == 1437 - 100
