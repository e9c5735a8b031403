"""Data sets, decoded to arrays that are mapped, not read. Which client holds which rows is in `partition.py`,
what is done to values in `prepare.py`; nothing is ever downloaded here unless `download` is called.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fldist.data import cache, image_files
from fldist.data.windows import Windows
from fldist.vision import torchvision

NAMES = {
    "digits": "fldist.data.datasets:Digits",
    "mnist": "fldist.data.datasets:Mnist",
    "fashion-mnist": "fldist.data.datasets:FashionMnist",
    "cifar10": "fldist.data.datasets:Cifar10",
    "cifar100": "fldist.data.datasets:Cifar100",
    "svhn": "fldist.data.datasets:Svhn",
    "images": "fldist.data.datasets:Images",
    "hdf5": "fldist.data.datasets:Hdf5",
    "roles": "fldist.data.text:Roles",
    "leaf": "fldist.data.leaf:Leaf",
}

Floats = tuple[float, ...]
Kind = Literal["values", "tokens"]
Samples = NDArray[Any] | Windows
_TEN = tuple("0123456789")
_BLOCK_VALUES = 1 << 22
_SILENCE_S = 60.0


@dataclass(frozen=True)
class Dataset:
    """Labelled samples, as they are stored.

    kind: what samples are made of, `values` (of pixels, measurements) or `tokens` (numbers of symbols, text);
    x of values: uint8 0..255 or float32, [n, channels, height, width] or any shape per sample; x of tokens: integers
    from 0, [n, length], perhaps `Windows`; mostly read-only memory maps;
    y: int64 [n] in 0..classes-1; mean, std: per channel, of values scaled to 0..1 (empty: see `statistics`);
    notes: what happened while loading that the user should know;
    train_owner, test_owner: whose each row is (a writer's, a speaker's), int64 [n] from 0; None: nobody's;
    owners: their names (empty: they have none).
    """

    train_x: Samples
    train_y: NDArray[np.int64]
    test_x: Samples
    test_y: NDArray[np.int64]
    classes: int
    class_names: tuple[str, ...] = ()
    mean: Floats = ()
    std: Floats = ()
    notes: tuple[str, ...] = ()
    kind: Kind = "values"
    train_owner: NDArray[np.int64] | None = None
    test_owner: NDArray[np.int64] | None = None
    owners: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train_x.shape[1:])

    def statistics(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation per channel, of values scaled to 0..1; calculated when nobody knows them.

        Tokens have none: both are empty.
        """
        if self.mean or self.kind == "tokens":
            return self.mean, self.std
        return channel_statistics(np.asarray(self.train_x))


def channel_statistics(x: NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean and standard deviation per channel of x [n, channels, h, w] (of any other shape: one for all values).

    uint8 is scaled to 0..1 first. In float64, over n h w values (not n h w - 1), in two passes of blocks of rows;
    a channel that is constant gets deviation 1, so that dividing by it does no harm.
    """
    channels = x.shape[1] if x.ndim == 4 else 1
    unit = 255.0 if x.dtype == np.uint8 else 1.0
    rows = max(1, _BLOCK_VALUES // max(1, x[:1].size))
    count = x.size // channels

    def total(of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
        sums = np.zeros(channels)
        for first in range(0, len(x), rows):
            block = x[first : first + rows].astype(np.float64)
            sums += of(block.reshape(len(block), channels, -1)).sum(axis=(0, 2))
        return sums

    mean = total(lambda block: block) / count
    std = np.sqrt(total(lambda block: np.square(block - mean[:, None])) / count)
    std[std == 0.0] = unit
    return tuple(map(float, mean / unit)), tuple(map(float, std / unit))


def _cached(entry: cache.Entry, fingerprint: str | None, decode: Callable[[], Dataset]) -> Dataset:
    """A data set by way of its cache; without a fingerprint its source is gone, and the cache does without."""

    def contents() -> cache.Contents:
        made = decode()
        mean, std = made.statistics()
        arrays: dict[str, NDArray[Any]] = {}
        facts = {"classes": made.classes, "class_names": made.class_names, "mean": mean, "std": std, "kind": made.kind}
        facts |= {"owners": made.owners, "notes": made.notes}
        for split, x, y, owner in (
            ("train", made.train_x, made.train_y, made.train_owner),
            ("test", made.test_x, made.test_y, made.test_owner),
        ):
            if isinstance(x, Windows):  # of one stream, which is stored once
                arrays["stream"], arrays[f"{split}_starts"], facts["length"] = x.stream, x.starts, x.shape[1]
            else:
                arrays[f"{split}_x"] = x
            arrays[f"{split}_y"] = y
            if owner is not None:
                arrays[f"{split}_owner"] = owner
        return cache.Contents(arrays, facts)

    got, notes = entry.load(fingerprint, contents)
    if fingerprint is None:
        notes = (*notes, f"what the cache {entry.path} was decoded from is not there any more; the cache is used")
    arrays, facts = got.arrays, got.facts

    def samples(split: str) -> Samples:
        if "stream" not in arrays:
            return arrays[f"{split}_x"]
        return Windows(arrays["stream"], arrays[f"{split}_starts"], facts["length"])

    def owner_of(split: str) -> NDArray[np.int64] | None:
        name = f"{split}_owner"
        return np.array(arrays[name]) if name in arrays else None

    return Dataset(
        samples("train"),
        np.array(arrays["train_y"]),
        samples("test"),
        np.array(arrays["test_y"]),
        facts["classes"],
        tuple(facts["class_names"]),
        tuple(facts["mean"]),
        tuple(facts["std"]),
        (*facts.get("notes", ()), *notes),  # `get`: caches of older versions do not say
        facts.get("kind", "values"),
        owner_of("train"),
        owner_of("test"),
        tuple(facts.get("owners", ())),
    )


def from_files(
    path: str,
    entry: Callable[[Path], cache.Entry],
    stats: Callable[[Path], list[tuple[str, os.stat_result]]],
    decode: Callable[[Path], Dataset],
) -> Dataset:
    """What a file or folder of the user's holds, by way of its cache, which is made anew when a file has changed.

    path: `task.data.path`; entry, stats, decode: the cache, the state of the files and the data of a place. When the
    files are gone, a cache of them is used. Raises ValueError when there is neither, and what `decode` raises.
    """
    key = "task.data.path"
    places = _places(path)
    place = next((p for p in places if p.exists()), None)
    if place is not None:
        found = place
        return _cached(entry(found), cache.fingerprint(stats(found)), lambda: decode(found))
    for gone in places:
        if entry(gone).path.is_file():
            return _cached(entry(gone), None, lambda: decode(find_data(path, key, folders=True)))
    return decode(find_data(path, key, folders=True))


def accepted(made: Any, where: str) -> Dataset:
    """What a user's own loader returned, brought to the types of `Dataset`; ValueError, beginning with `where`."""
    if not isinstance(made, Dataset):
        raise ValueError(
            f"{where}: it must return a fldist.data.datasets.Dataset, or have `load()` that does; "
            f"it gave a {type(made).__name__}"
        )
    x = [a if isinstance(a, Windows) else np.asarray(a) for a in (made.train_x, made.test_x)]
    y = [np.asarray(a) for a in (made.train_y, made.test_y)]
    for a in x:
        if not (np.issubdtype(a.dtype, np.number) or a.dtype == np.bool_):
            raise ValueError(f"{where}: samples of type {a.dtype} are no numbers; give uint8 or float32")
    for a in y:
        if a.ndim != 1 or not np.issubdtype(a.dtype, np.integer):
            raise ValueError(f"{where}: labels must be [n] integers, not {a.dtype} {a.shape}")
    if made.kind == "values":
        kept = (np.uint8, np.float32)
        x = [a if isinstance(a, Windows) or a.dtype in kept else a.astype(np.float32) for a in x]
    y = [a.astype(np.int64, copy=False) for a in y]
    made = dataclasses.replace(made, train_x=x[0], train_y=y[0], test_x=x[1], test_y=y[1])
    for name in ("train_owner", "test_owner"):
        if (owner := getattr(made, name)) is not None:
            owner = np.asarray(owner)
            if not np.issubdtype(owner.dtype, np.integer):
                raise ValueError(f"{where}: {name} must be [n] integers, not {owner.dtype} {owner.shape}")
            made = dataclasses.replace(made, **{name: owner.astype(np.int64, copy=False)})
    return checked(made, where)


def checked(data: Dataset, where: str) -> Dataset:
    """Refuse what no later code expects; `where` begins the error."""
    for split, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        if y.shape != (len(x),):
            raise ValueError(f"{where} has {len(x)} rows of {split}_x and {len(y)} of {split}_y")
        if not len(y):
            raise ValueError(f"{where} has no rows of {split}_x; training and test samples are both needed")
        if y.min() < 0 or y.max() >= data.classes:
            raise ValueError(f"{where}: {split}_y must be 0 to {data.classes - 1}, not {y.min()} to {y.max()}")
    for split, y, owner in (("train", data.train_y, data.train_owner), ("test", data.test_y, data.test_owner)):
        if owner is None:
            continue
        if owner.shape != y.shape:
            raise ValueError(f"{where} has {len(y)} rows of {split}_x and {len(owner)} of {split}_owner")
        if owner.min() < 0 or (data.owners and owner.max() >= len(data.owners)):
            most = f" to {len(data.owners) - 1}" if data.owners else ""
            raise ValueError(f"{where}: {split}_owner must be 0{most}, not {owner.min()} to {owner.max()}")
    if data.test_owner is not None and data.train_owner is None:
        raise ValueError(f"{where} says whose the test rows are (test_owner), but not the training rows (train_owner)")
    if data.kind == "tokens" and not np.issubdtype(data.train_x.dtype, np.integer):
        raise ValueError(f"{where}: tokens are numbers of symbols; train_x must be integers, not {data.train_x.dtype}")
    train, test = (f"{x.dtype} {x.shape[1:]}" for x in (data.train_x, data.test_x))
    if train != test:
        raise ValueError(f"{where}: a sample of train_x is {train} and one of test_x {test}; make them alike")
    return data


# ---- in scikit-learn
@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; needs no download.

    1,437 training and 360 test samples by a permutation that is the same for every run; float32 from 0 to 1.
    """

    def entry(self) -> cache.Entry:
        """Its place in the cache."""
        return cache.Entry("digits", "scikit-learn")

    def load(self) -> Dataset:
        """Map the cache, which is made when it is not there: importing scikit-learn takes seconds."""
        try:
            found = version("scikit-learn")
        except PackageNotFoundError:
            found = None
        try:
            return _cached(self.entry(), found, self._decode)
        except cache.Unwritable as error:  # they are small and always there: no reason not to run
            return dataclasses.replace(self._decode(), notes=(f"digits are decoded at every start: {error}",))

    def _decode(self) -> Dataset:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError(
                "task.data: digits come with scikit-learn, which is not installed; pip install scikit-learn"
            ) from None
        digits = load_digits()
        order = np.random.default_rng(1797).permutation(len(digits.target))
        x = (digits.images[order] / 16.0).astype(np.float32)[:, None]
        y = digits.target[order].astype(np.int64)
        return Dataset(x[:1437], y[:1437], x[1437:], y[1437:], 10, _TEN)


# ---- through torchvision
@dataclass(frozen=True)
class Torchvision(ABC):
    """A data set that torchvision reads; the base of those below.

    root: the folder that torchvision calls so; default FLDIST_DATA, else `data` in the user's cache directory.
    """

    root: str | None = None

    name: ClassVar[str]
    kind: ClassVar[str]  # torchvision's class
    folder: ClassVar[str]  # below root
    files: ClassVar[tuple[str, ...]]
    classes: ClassVar[int]
    mean: ClassVar[Floats] = ()
    std: ClassVar[Floats] = ()

    def place(self) -> Path:
        """The root, absolute."""
        given = self.root or os.environ.get("FLDIST_DATA")
        return _absolute(given) if given else cache.user_directory() / "data"

    def sources(self) -> list[Path]:
        """The files that it is read from."""
        return [self.place() / self.folder / name for name in self.files]

    def entry(self) -> cache.Entry:
        """Its place in the cache."""
        return cache.Entry(self.name, str(self.place()))

    def load(self) -> Dataset:
        """Map the cache, which is made when it is not there or when the files have changed.

        ValueError says which file is missing or damaged. When all of them are gone, a cache of them is used.
        """
        there = [path for path in self.sources() if path.is_file()]
        state = cache.fingerprint([(p.name, p.stat()) for p in there]) if there else None
        return _cached(self.entry(), state, self._decode)

    def download(self) -> None:
        """Download what is missing, checked by torchvision's MD5 sums; ValueError says what prevents it."""
        if all(path.is_file() for path in self.sources()):
            return
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_SILENCE_S)  # torchvision sets no limit on a server's silence
        try:
            self.place().mkdir(parents=True, exist_ok=True)
            for train in (True, False):
                self._torchvision_kind()(**self._arguments(train), download=True)
        except Exception as error:  # URLError, RuntimeError, HTTPException, tarfile.ReadError, PermissionError ...
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"task.data.root: {self.name} cannot be downloaded to {self.place()} ({said}); "
                f"see to the network, or put {', '.join(self.files)} into {self.place() / self.folder}{self._hint()}"
            ) from None
        finally:
            socket.setdefaulttimeout(before)

    def _missing(self) -> ValueError:
        path = next(path for path in self.sources() if not path.is_file())
        option = f" --root {self.root}" if self.root else ""
        remedy = "set or correct FLDIST_DATA" if not self.root else "correct task.data.root"
        if self.root is None and "FLDIST_DATA" not in os.environ:
            remedy = "set FLDIST_DATA to the folder that has it"
        return ValueError(
            f"task.data.root: no {self.name} found: looked for {path}; `fldist data prepare {self.name}{option}` "
            f"downloads it; or {remedy}{self._hint()}"
        )

    def _hint(self) -> str:
        return ""

    def _torchvision_kind(self) -> Any:
        return getattr(torchvision().datasets, self.kind)

    def _arguments(self, train: bool) -> dict[str, Any]:
        return {"root": str(self.place()), "train": train}

    def _decode(self) -> Dataset:
        if not all(path.is_file() for path in self.sources()):
            raise self._missing()
        self._check_files()
        try:
            train_x, train_y = self._arrays(self._torchvision_kind()(**self._arguments(True)))
            test_x, test_y = self._arrays(self._torchvision_kind()(**self._arguments(False)))
        except Exception as error:  # whatever torch, pickle or scipy say to a damaged file
            raise self._damaged(self.place() / self.folder, f"{type(error).__name__}: {error}") from None
        data = Dataset(train_x, train_y, test_x, test_y, self.classes, self._class_names(), self.mean, self.std)
        return checked(data, f"task.data.root: {self.name} in {self.place() / self.folder}")

    def _damaged(self, path: Path, why: str) -> ValueError:
        return ValueError(
            f"task.data.root: {path} is damaged ({why}); delete it and run `fldist data prepare {self.name}"
            f"{f' --root {self.root}' if self.root else ''}`, which downloads it again"
        )

    @abstractmethod
    def _check_files(self) -> None:
        """ValueError names the first damaged file."""

    @abstractmethod
    def _arrays(self, made: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """What torchvision has read, as x uint8 [n, c, h, w] and y int64 [n]."""

    def _class_names(self) -> tuple[str, ...]:
        return _TEN


@dataclass(frozen=True)
class Mnist(Torchvision):
    """MNIST: 60,000 + 10,000 handwritten digits, uint8 [1, 28, 28]. Source: LeCun et al. 1998."""

    name = "mnist"
    kind = "MNIST"
    folder = "MNIST/raw"
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    classes = 10
    mean = (0.1307,)
    std = (0.3081,)

    def _torchvision_kind(self) -> Any:
        kind = super()._torchvision_kind()
        # without this, torchvision prefers processed/training.pt of its early versions to the files looked at here
        return type(kind.__name__, (kind,), {"_check_legacy_exist": lambda self: False})

    def _check_files(self) -> None:
        for path in self.sources():  # IDX: 0, 0, type, rank, then the sizes as big-endian int32, then the values
            rank = 3 if "images" in path.name else 1
            with path.open("rb") as file:
                head = file.read(4 + 4 * rank)
            if len(head) < 4 + 4 * rank or head[:4] != bytes([0, 0, 8, rank]):
                raise self._damaged(path, "it does not begin as an IDX file")
            sizes = np.frombuffer(head, ">i4", offset=4).tolist()
            want = len(head) + int(np.prod(sizes, dtype=np.int64))
            if path.stat().st_size != want:
                raise self._damaged(path, f"{path.stat().st_size} bytes instead of {want}")
            if rank == 3 and sizes[1:] != [28, 28]:
                raise self._damaged(path, f"images of {sizes[1]}x{sizes[2]} pixels instead of 28x28")

    def _arrays(self, made: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return made.data.numpy()[:, None], made.targets.numpy().astype(np.int64)


@dataclass(frozen=True)
class FashionMnist(Mnist):
    """Fashion-MNIST: 60,000 + 10,000 pictures of clothes, uint8 [1, 28, 28]. Source: Xiao et al., arXiv 1708.07747."""

    name = "fashion-mnist"
    kind = "FashionMNIST"
    folder = "FashionMNIST/raw"
    mean = (0.2860,)
    std = (0.3530,)

    def _class_names(self) -> tuple[str, ...]:
        return tuple(self._torchvision_kind().classes)


@dataclass(frozen=True)
class Cifar10(Torchvision):
    """CIFAR-10: 50,000 + 10,000 photographs, uint8 [3, 32, 32]. Source: Krizhevsky 2009."""

    name = "cifar10"
    kind = "CIFAR10"
    folder = "cifar-10-batches-py"
    files = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
    classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)

    def _check_files(self) -> None:
        # These files are pickles. Torchvision unpickles them only after their MD5 sums have been found on its list,
        # and that is what keeps code in them from running: never read them past its check. Here it names the file.
        check_integrity = torchvision().datasets.utils.check_integrity
        kind = self._torchvision_kind()
        sums = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
        for path in self.sources():
            if not check_integrity(str(path), sums[path.name]):
                raise self._damaged(path, "its MD5 sum is not the published one")

    def _arrays(self, made: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return made.data.transpose(0, 3, 1, 2), np.array(made.targets, dtype=np.int64)

    def _class_names(self) -> tuple[str, ...]:
        return tuple(self._torchvision_kind()(**self._arguments(False)).classes)

    def _hint(self) -> str:
        jpegs = self.place() / "cifar10-jpg.zip"
        if self.name != "cifar10" or not jpegs.is_file():
            return ""
        path = jpegs.name if self.root is None else str(jpegs)
        return f"; or use its JPEG images that are there with task.data={{name: images, path: {path}}}"


@dataclass(frozen=True)
class Cifar100(Cifar10):
    """CIFAR-100 with its 100 fine labels: 50,000 + 10,000 photographs, uint8 [3, 32, 32]. Source: Krizhevsky 2009."""

    name = "cifar100"
    kind = "CIFAR100"
    folder = "cifar-100-python"
    files = ("train", "test", "meta")
    classes = 100
    mean = (0.50708, 0.48655, 0.44092)
    std = (0.26733, 0.25644, 0.27615)


@dataclass(frozen=True)
class Svhn(Torchvision):
    """SVHN, cropped digits: 73,257 + 26,032 photographs, uint8 [3, 32, 32]. Source: Netzer et al. 2011.

    Label 10 of the files is the digit 0, and class 0 here; mean and deviation are those of the training images.
    """

    name = "svhn"
    kind = "SVHN"
    folder = "."
    files = ("train_32x32.mat", "test_32x32.mat")
    classes = 10

    def _arguments(self, train: bool) -> dict[str, Any]:
        return {"root": str(self.place()), "split": "train" if train else "test"}

    def _check_files(self) -> None:
        check_integrity = torchvision().datasets.utils.check_integrity
        for path, split in zip(self.sources(), ("train", "test"), strict=True):
            if not check_integrity(str(path), self._torchvision_kind().split_list[split][2]):
                raise self._damaged(path, "its MD5 sum is not the published one")

    def _arrays(self, made: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return made.data, made.labels


# ---- a user's own
@dataclass(frozen=True)
class Images:
    """A folder or a zip of images laid out `split/class/image`, decoded to uint8 [channels, height, width].

    path: relative to the working directory, else to FLDIST_DATA; a single folder around the splits is skipped.
    Splits are `train` and `test` (without it `val` or `valid`); classes are the folders of `train` in order of
    their names. size: every image is brought to size x size (bilinear); without it all must be of one size.
    channels: 1 or 3; without it as the files are, and 3 when some have colour.
    """

    path: str
    size: Annotated[int, Field(ge=1, le=1 << 14)] | None = None
    channels: Literal[1, 3] | None = None

    def entry(self, place: Path) -> cache.Entry:
        """Its place in the cache when it is read from `place`."""
        options = {"size": self.size, "channels": self.channels}
        said = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
        return cache.Entry("images", f"{place}{f' ({said})' if said else ''}")

    def load(self) -> Dataset:
        """Map the cache, which is made when it is not there or when a file has changed.

        ValueError names the image or folder that does not fit. When the files are gone, a cache of them is used.
        """
        return from_files(self.path, self.entry, lambda place: image_files.stats(place, "task.data.path"), self._decode)

    def _decode(self, place: Path) -> Dataset:
        files = image_files.find(place, "task.data.path")
        x = files.decode(self.size, self.channels, "task.data.path")
        y, n = files.labels, files.num_train
        return Dataset(x[:n], y[:n], x[n:], y[n:], len(files.classes), files.classes)


@dataclass(frozen=True)
class Hdf5:
    """A user's own data in one HDF5 file: `train_x`, `train_y`, `test_x`, `test_y`.

    x: [n, channels, height, width] (or any shape per sample), uint8 as it is, all other numbers as float32; of kind
    `tokens` [n, length] integers from 0, as they are;
    y: [n] integers from 0; `train_owner`, `test_owner`: [n] integers from 0, whose each row is, may be there.
    A relative `path` is looked for in the working directory, then in FLDIST_DATA.
    """

    path: str
    kind: Kind = "values"

    def load(self) -> Dataset:
        """Map x where it lies contiguous as uint8 or float32, read everything else; nothing is cached.

        ValueError says where the file was looked for or what it lacks.
        """
        import h5py

        wanted = ("train_x", "train_y", "test_x", "test_y")
        path = find_data(self.path, "task.data.path")
        try:
            with path.open("rb") as raw, h5py.File(raw, "r") as file:
                missing = [name for name in wanted if not isinstance(file.get(name), h5py.Dataset)]
                if missing:
                    raise ValueError(f"task.data.path: {path} has no {missing[0]!r}; it needs {', '.join(wanted)}")
                train_x, test_x = (_features(raw, file[name], path, self.kind) for name in ("train_x", "test_x"))
                train_y, test_y = (_labels(file[name], path) for name in ("train_y", "test_y"))
                told = [n for n in ("train_owner", "test_owner") if isinstance(file.get(n), h5py.Dataset)]
                owner = {name: _labels(file[name], path) for name in told}
        except (OSError, RuntimeError) as error:
            raise ValueError(f"task.data.path: {path} cannot be read as HDF5 ({error}); make it again") from None
        classes = 1 + max((int(y.max()) for y in (train_y, test_y) if len(y)), default=0)
        data = Dataset(
            train_x, train_y, test_x, test_y, classes,
            kind=self.kind, train_owner=owner.get("train_owner"), test_owner=owner.get("test_owner"),
        )  # fmt: skip
        return checked(data, f"task.data.path: {path}")


def _features(file: Any, dataset: Any, path: Path, kind: Kind) -> NDArray[Any]:
    stored = dataset.dtype
    if dataset.ndim < 1 or stored.kind not in ("fiu" if kind == "values" else "iu"):
        numbers = "numbers" if kind == "values" else "integers, being tokens"
        raise ValueError(
            f"task.data.path: {dataset.name[1:]} of {path} must be [n, ...] {numbers}, not {stored} {dataset.shape}"
        )
    wanted = stored if kind == "tokens" or stored == np.uint8 else np.dtype(np.float32)
    mapped = cache.map_array(file, dataset) if stored == wanted else None
    return np.asarray(dataset.astype(wanted)[...]) if mapped is None else mapped


def _labels(dataset: Any, path: Path) -> NDArray[np.int64]:
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
        raise ValueError(
            f"task.data.path: {dataset.name[1:]} of {path} must be [n] integers, not {dataset.dtype} {dataset.shape}"
        )
    return np.asarray(dataset[...]).astype(np.int64)


# ---- where files are
def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _places(path: str) -> Sequence[Path]:
    places = [_absolute(path)]
    root = os.environ.get("FLDIST_DATA")
    if root and not Path(path).expanduser().is_absolute():
        places.append(_absolute(root) / path)
    return places


def find_data(path: str, key: str, *, folders: bool = False) -> Path:
    """Where a data file (or, with `folders`, a folder) is: as given, else below FLDIST_DATA.

    ValueError names both places and the remedy.
    """
    tried = _places(path)
    for candidate in tried:
        if candidate.is_file() or (folders and candidate.is_dir()):
            return candidate
    places = " and ".join(str(p) for p in tried)
    remedy = "put it there" if os.environ.get("FLDIST_DATA") else "set FLDIST_DATA to the folder that has it"
    raise ValueError(f"{key}: no data found: looked for {places}; {remedy}, or correct {key}")
