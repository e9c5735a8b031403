"""Data sets in the JSON form of LEAF: Shakespeare (text) and FEMNIST (images), whose users are owners of rows.

LEAF's own scripts make such files of what they download; they are only read here.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fldist.data import cache
from fldist.data.datasets import Dataset, checked, from_files
from fldist.data.text import NAMES, Rows, Share, in_order, note_outside, tokens_of

FEMNIST = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
"""The 62 classes of FEMNIST, in LEAF's order."""

_SIDE = 28
_KEY = "task.data.path"


class User(NamedTuple):
    """A user's samples: x, tokens [n, length] or images [n, 1, 28, 28] (uint8, or float32 in 0..1), and y [n]."""

    x: NDArray[Any]
    y: Rows

    def only(self, rows: Any) -> User:
        """Some of the samples."""
        return User(self.x[rows], self.y[rows])


Users = Mapping[str, User]


@dataclass(frozen=True)
class Leaf:
    """Users' samples as LEAF writes them: {"users": [...], "user_data": {user: {"x": [...], "y": [...]}}}.

    Shakespeare: x strings of one length (80), y the character that follows; numbers of `text.ALPHABET`, of kind
    `tokens`. FEMNIST: x lists of 784 values, 0..1 unless they were normalised, y 0 to 61; images [1, 28, 28], uint8
    where all values are multiples of 1/255 in 0..1, as LEAF's are, else float32.

    path: a folder with `train` and `test`, whose JSON files are read; else one set: the files in its folder `all_data`,
    or in itself, or a single file. The samples of each user of one set are divided here. Of text, the first train_share
    train; then come as many as a window has characters, less one, that nobody uses, so that no test window overlaps a
    training one; the rest test. Of images, floor(n (1 - train_share)) test, drawn at random by `seed`. share: users,
    shuffled by `seed`, are taken until they have that share of all samples; the last one is taken whole, while LEAF's
    script cuts it. Owners are in the order of the files.
    Source: Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv 1812.01097.
    """

    path: str
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    train_share: Share = 0.9

    def entry(self, place: Path) -> cache.Entry:
        """Its place in the cache when it is read from `place`."""
        said = ", ".join(f"{name} {getattr(self, name)}" for name in ("share", "seed", "train_share"))
        return cache.Entry("leaf", f"{place} ({said})")

    def load(self) -> Dataset:
        """Map the cache, which is made when it is not there or when a file has changed.

        ValueError names the file and the user that do not fit. When the files are gone, a cache of them is used.
        """
        return from_files(self.path, self.entry, _stats, self._decode)

    def _decode(self, place: Path) -> Dataset:
        outside: set[str] = set()
        sets = {name: users_in(files, outside) for name, files in _sets(place).items()}
        counts: dict[str, int] = {}
        for users in sets.values():
            for name, user in users.items():
                counts[name] = counts.get(name, 0) + len(user.y)
        if not counts:
            raise ValueError(f"{_KEY}: no user in {place} has a sample; make the files again")
        chosen = self._chosen(counts)
        if "all" in sets:
            numbers = {name: number for number, name in enumerate(counts)}
            divided = {name: self._divided(sets["all"][name], numbers[name]) for name in chosen}
            sets = {split: {n: parts[i] for n, parts in divided.items()} for i, split in enumerate(("train", "test"))}
        train, test = ([sets[split].get(name) for name in chosen] for split in ("train", "test"))
        return _dataset(chosen, train, test, note_outside("".join(sorted(outside))), f"{_KEY}: {place}")

    def _chosen(self, counts: Mapping[str, int]) -> list[str]:
        """The users that have `share` of all samples, in the order of the files."""
        from fldist.seeding import numpy_generator  # torch, which listing data sets does without

        drawn = numpy_generator(self.seed, "leaf-users").permutation(len(counts))
        so_far = np.cumsum(np.array(list(counts.values()))[drawn])
        needed = 1 + int(np.searchsorted(so_far, self.share * so_far[-1] - 1e-6))
        names = list(counts)
        return [names[i] for i in np.sort(drawn[:needed])]

    def _divided(self, user: User, number: int) -> tuple[User, User]:
        """A user's training and test samples."""
        from fldist.seeding import numpy_generator

        n = len(user.y)
        if user.x.ndim == 2:
            first, later = in_order(n, self.train_share, user.x.shape[1] - 1)
            return user.only(slice(first)), user.only(slice(later, None))
        drawn = numpy_generator(self.seed, "leaf-test", number).permutation(n)
        tested = int(n * (1.0 - self.train_share) + 1e-9)
        return user.only(np.sort(drawn[tested:])), user.only(np.sort(drawn[:tested]))


def _dataset(
    names: Sequence[str], train: Sequence[User | None], test: Sequence[User | None], notes: list[str], where: str
) -> Dataset:
    """The samples of the users one after the other; None: a user that has none there."""
    there = [[u for u in users if u is not None and len(u.y)] for users in (train, test)]
    counts = [np.array([0 if u is None else len(u.y) for u in users]) for users in (train, test)]
    shapes = {u.x.shape[1:] for users in (train, test) for u in users if u is not None}
    if len(shapes) > 1:
        raise ValueError(f"{where}: samples differ in shape: {' and '.join(map(str, sorted(shapes)))}; make them alike")
    for split, users in zip(("training", "test"), there, strict=True):
        if not users:
            raise ValueError(
                f"{where}: the users taken have no {split} samples; raise task.data.share, or change "
                "task.data.train_share"
            )
    is_text = len(shapes.pop()) == 1
    as_float = any(u.x.dtype == np.float32 for users in there for u in users)
    x = [np.concatenate([_float(u.x) if as_float else u.x for u in users]) for users in there]
    y = [np.concatenate([u.y for u in users]) for users in there]
    owner = [np.repeat(np.arange(len(names)), count) for count in counts]
    both = np.count_nonzero((counts[0] > 0) & (counts[1] > 0))
    if not both:
        notes.append("test samples are of other users than training samples: no client has test samples of its own")
    elif np.count_nonzero(counts[0]) < len(names):
        notes.append(
            f"{len(names) - np.count_nonzero(counts[0])} users have no samples to train on and can be no clients"
        )
    classes = NAMES if is_text else FEMNIST
    return checked(
        Dataset(
            x[0], y[0], x[1], y[1], len(classes), classes,
            notes=tuple(notes),
            kind="tokens" if is_text else "values",
            train_owner=owner[0],
            test_owner=owner[1] if both else None,
            owners=tuple(names),
        ),
        where,
    )  # fmt: skip


def _float(x: NDArray[Any]) -> NDArray[np.float32]:
    """Images as float32 in 0..1."""
    return x if x.dtype == np.float32 else (x / 255.0).astype(np.float32)


# ---- files
def _sets(place: Path) -> dict[str, list[Path]]:
    """The JSON files of the sets `train` and `test`, or of the one set `all`."""
    if place.is_file():
        return {"all": [place]}
    split = {name: _json_in(place / name) for name in ("train", "test")}
    if all(split.values()):
        return split
    for name, files in split.items():
        if any(split.values()) and not files:
            raise ValueError(f"{_KEY}: {place} has no JSON files in {name}; put them there, or give one set alone")
    files = _json_in(place / "all_data") or _json_in(place)
    if not files:
        raise ValueError(
            f"{_KEY}: {place} has no JSON files, neither in train and test, nor in all_data, nor in itself; give the "
            "folder that LEAF's preprocess.sh has written into, or a file of it"
        )
    return {"all": files}


def _json_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _stats(place: Path) -> list[tuple[str, os.stat_result]]:
    return [(str(path), path.stat()) for files in _sets(place).values() for path in files]


def users_in(files: Sequence[Path], outside: set[str]) -> dict[str, User]:
    """The users of some files that have samples; characters that the alphabet has not are added to `outside`."""
    users: dict[str, User] = {}
    for path in files:
        where = f"{_KEY}: {path}"
        try:
            with path.open(encoding="utf-8") as file:
                given = json.load(file)
            names, data = given["users"], given["user_data"]
            samples = [(str(name), data[name]["x"], data[name]["y"]) for name in names]
            even = all(len(x) == len(y) for _, x, y in samples)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f'{where} is not of LEAF\'s form {{"users": [...], "user_data": {{user: {{"x": [...], "y": [...]}}}}}} '
                f"({said}); make it again"
            ) from None
        if not even:
            raise ValueError(f"{where}: a user has not as many x as y; make it again")
        for name, x, y in samples:
            if name in users:
                raise ValueError(f"{where}: user {name} is there twice, in this file or two; remove one")
            if len(y):
                users[name] = _user(x, y, f"{where}: user {name}", outside)
    return users


def _user(x: list[Any], y: list[Any], where: str, outside: set[str]) -> User:
    if isinstance(x[0], str):
        lengths = set(map(len, x)) if set(map(type, x)) == {str} else set()
        if len(lengths) != 1 or set(map(type, y)) != {str} or set(map(len, y)) != {1}:
            raise ValueError(
                f"{where}: x must be strings of one length and y single characters, as in Shakespeare; other text of "
                "LEAF is not read"
            )
        tokens, strange = tokens_of("".join(x))
        following, stranger = tokens_of("".join(y))
        outside.update(strange, stranger)
        return User(tokens.reshape(len(x), -1), following.astype(np.int64))
    try:
        pixels, labels = np.asarray(x), np.asarray(y)
    except ValueError:  # rows of different lengths
        pixels = labels = np.empty(0)
    numbers = pixels.dtype.kind in "fiu" and labels.dtype.kind in "iu"
    if (
        not numbers
        or (pixels.dtype.kind != "f" and pixels.max() > 1)
        or pixels.shape != (len(y), _SIDE * _SIDE)
        or labels.ndim != 1
        or not np.isfinite(pixels).all()
    ):
        raise ValueError(
            f"{where}: x must be lists of {_SIDE * _SIDE} numbers in 0..1 and y integers, as in FEMNIST; other data of "
            "LEAF are not read"
        )
    images = pixels.reshape(-1, 1, _SIDE, _SIDE)
    scaled = images * 255.0
    whole = np.rint(scaled)
    if whole.min() >= 0 and whole.max() <= 255 and np.abs(scaled - whole).max() < 1e-3:
        return User(whole.astype(np.uint8), labels.astype(np.int64))
    return User(images.astype(np.float32), labels.astype(np.int64))
