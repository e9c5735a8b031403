"""What `fldist data` says and does: the data sets that have names, where each is, and making one ready for runs."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from fldist.data import cache, datasets

TEXTS = {
    "digits": "1,797 handwritten digits, 1x8x8, 10 classes; comes with scikit-learn",
    "mnist": "60,000 + 10,000 handwritten digits, 1x28x28, 10 classes",
    "fashion-mnist": "60,000 + 10,000 pictures of clothes, 1x28x28, 10 classes",
    "cifar10": "50,000 + 10,000 photographs, 3x32x32, 10 classes",
    "cifar100": "50,000 + 10,000 photographs, 3x32x32, 100 classes",
    "svhn": "73,257 + 26,032 photographs of house numbers, 3x32x32, 10 classes",
    "images": "your own: a folder or zip of images laid out split/class/image",
    "hdf5": "your own: an HDF5 file with train_x, train_y, test_x, test_y",
    "roles": "your own: a text with roles, such as Shakespeare's plays; windows of 80 characters, a role owns its rows",
    "leaf": "your own: Shakespeare or FEMNIST as LEAF's scripts prepare them, in JSON; a user owns its rows",
}


class Named(Protocol):
    """A data set that has a name."""

    def load(self) -> datasets.Dataset:
        """Its samples."""


def overview() -> str:
    """Every named data set: what it is, where it would be read from and whether it is there, what is cached."""
    lines = []
    for name, where in datasets.NAMES.items():
        lines += [name, f"  {TEXTS[name]}"]
        module, _, thing = where.rpartition(":")
        kind = getattr(importlib.import_module(module), thing)
        if issubclass(kind, datasets.Torchvision):
            lines += _of_torchvision(kind())
        elif kind is datasets.Digits:
            try:
                lines.append(f"  from: scikit-learn {version('scikit-learn')}: there")
            except PackageNotFoundError:
                lines.append("  from: scikit-learn: not there; pip install scikit-learn")
            lines.append(_cached(kind().entry().path))
        else:
            lines.append(f"  from: task.data.path{_by_default(kind)}")
            lines += ["  cached: never; it is mapped as it is"] if kind is datasets.Hdf5 else _all_cached(name)
    return "\n".join(lines)


def _of_torchvision(data: datasets.Torchvision) -> Iterator[str]:
    missing = [path for path in data.sources() if not path.is_file()]
    if not missing:
        there = "there"
    elif len(missing) < len(data.files):
        there = f"incomplete, {missing[0].name} is missing; `fldist data prepare {data.name}` downloads it"
    else:
        there = f"not there; `fldist data prepare {data.name}` downloads it"
    yield f"  from: {data.place() / data.folder}: {there}"
    yield _cached(data.entry().path)


def _by_default(kind: Any) -> str:
    """Where a data set is read from unless its path is given, if it has such a place."""
    path = next(f.default for f in dataclasses.fields(kind) if f.name == "path")
    if path is dataclasses.MISSING:
        return ""
    try:
        return f", else {datasets.find_data(path, 'task.data.path')}: there"
    except ValueError:
        return f", else {path} in FLDIST_DATA: not there"


def _all_cached(name: str) -> list[str]:
    found = [f"{_cached(path)}, of {source}" for source, path in cache.sources_of(name)]
    return found or ["  cached: no"]


def _cached(path: Path) -> str:
    return f"  cached: {path}, {path.stat().st_size / 1e6:.1f} MB" if path.is_file() else "  cached: no"


def prepare(data: Named) -> str:
    """Download a data set if it is missing, decode it into the cache, and say what it is then.

    Raises ValueError for what is missing or damaged and cannot be downloaded.
    """
    began = time.monotonic()
    if isinstance(data, datasets.Torchvision):
        data.download()
    made = data.load()
    x = (made.train_x, made.test_x)
    owners = [f"owners: {len(made.owners):,} ({_shortened(made.owners)})"] if made.owners else []
    lines = [
        *(f"note: {note}" for note in made.notes),
        f"rows: {len(x[0]):,} to train, {len(x[1]):,} to test",
        *owners,
        f"shape: {' x '.join(map(str, made.shape))}, {x[0].dtype}",
        f"classes: {made.classes}" + (f" ({_shortened(made.class_names)})" if made.class_names else ""),
        f"size: {sum(a.nbytes for a in (*x, made.train_y, made.test_y)) / 1e6:.1f} MB decoded",
        f"seconds: {time.monotonic() - began:.1f}",
    ]
    return "\n".join(lines)


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= 10 else (*names[:10], "..."))
