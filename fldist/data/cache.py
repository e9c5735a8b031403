"""Decoded arrays in HDF5 files, made once by one process and memory-mapped by all. What is decoded is not known here.

One file per data set and source, in FLDIST_CACHE, else $XDG_CACHE_HOME/fldist, else ~/.cache/fldist. Arrays lie
in it contiguous and uncompressed; each has a CRC-32 of its type, shape and bytes, and so has the text that
describes them. Every opening checks all of them.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
WAIT_S = 600.0
"""How long a process waits for another one that decodes."""

_POLL_S = 0.1
_BLOCK_BYTES = 1 << 22
_logger = logging.getLogger("fldist.data")


@dataclass(frozen=True)
class Contents:
    """Arrays by name, and facts about them that JSON can hold."""

    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One cache file. name: of the data set; source: what was decoded and how, in words."""

    name: str
    source: str

    @property
    def path(self) -> Path:
        """Where the file is, or would be."""
        return directory() / f"{self.name}-{hashlib.sha256(self.source.encode()).hexdigest()[:12]}.h5"

    def load(self, fingerprint: str | None, decode: Callable[[], Contents]) -> tuple[Contents, tuple[str, ...]]:
        """The contents, decoded now if the cache does not have them, and what a user should be told.

        fingerprint: of the sources as they are now; None when they are gone, and any cache of them will do.
        The arrays are read-only memory maps. Raises ValueError when the directory cannot be written and must be,
        or when another process decodes for longer than WAIT_S; and whatever `decode` raises.
        """
        path = self.path
        notes: tuple[str, ...] = ()
        try:
            return _open(path, fingerprint), notes
        except (FileNotFoundError, NotADirectoryError):
            pass
        except _Unusable as error:
            notes = (f"{error} and has been rebuilt",)
            _logger.warning("%s: it is rebuilt", error)
        with _only_writer(path, self.name):
            try:
                return _open(path, fingerprint), notes  # another process was quicker
            except (FileNotFoundError, _Unusable):
                pass
            _logger.info("decoding %s into %s", self.name, path)
            _write(path, decode(), {"source": self.source, "fingerprint": fingerprint})
        try:
            return _open(path, fingerprint), notes
        except (OSError, _Unusable) as error:
            raise ValueError(f"{error}, though it was just written; is its disk full or failing?") from None


def directory() -> Path:
    """Where caches are."""
    own = os.environ.get("FLDIST_CACHE")
    return Path(own).expanduser().absolute() if own else user_directory()


def user_directory() -> Path:
    """The user's own directory for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache").absolute() / "fldist"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise Unwritable(f"FLDIST_CACHE: there is no home directory to keep a cache in ({error}); set it") from None


def sources_of(name: str) -> list[tuple[str, Path]]:
    """The caches that there are of a data set: what was decoded, and the file; damaged ones are left out."""
    found = []
    for path in sorted(directory().glob(f"{glob.escape(name)}-{'[0-9a-f]' * 12}.h5")):
        try:
            with path.open("rb") as file:
                found.append((str(_describe(file, path)[0]["source"]), path))
        except (OSError, _Unusable):
            continue
    return found


def fingerprint(paths: list[tuple[str, os.stat_result]]) -> str:
    """What changes when one of these files does: their names, sizes and times of change, hashed."""
    text = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in paths])
    return hashlib.sha256(text.encode()).hexdigest()


def map_array(file: BinaryIO, dataset: Any) -> NDArray[Any] | None:
    """A read-only memory map of an h5py dataset of an open file; None unless its bytes lie there as they are."""
    offset = dataset.id.get_offset()  # None: chunked, compressed, elsewhere or never written
    if offset is None or offset % dataset.dtype.itemsize or dataset.size == 0:
        return None
    return np.memmap(file, dataset.dtype, "r", offset, dataset.shape)


# ---- reading
class _Unusable(Exception):
    """A cache that is damaged or was made from something else; says which."""


_Layout = dict[str, tuple[int, np.dtype[Any], tuple[int, ...], int]]  # offset, type, shape, CRC-32


def _open(path: Path, fingerprint: str | None) -> Contents:
    try:
        with path.open("rb") as file:  # one file object for all: nobody can put another file in its place meanwhile
            about, layout = _describe(file, path)
            if fingerprint is not None and about["fingerprint"] != fingerprint:
                raise _Unusable(f"the source of the cache {path} has changed: the cache was out of date")
            for name, (offset, dtype, shape, crc) in layout.items():
                if _crc_of_file(file, offset, dtype, shape) != crc:
                    raise _Unusable(f"the cache {path} was damaged (CRC of {name})")
            arrays = {
                name: np.memmap(file, dtype, "r", offset, shape) for name, (offset, dtype, shape, _) in layout.items()
            }
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise _Unusable(f"the cache {path} was unreadable ({error.strerror})") from None
    return Contents(arrays, about["facts"])


def _describe(file: BinaryIO, path: Path) -> tuple[dict[str, Any], _Layout]:
    """What a cache says of itself; h5py has let go of the file afterwards."""
    import h5py

    try:
        with h5py.File(file, "r") as h5:
            text = h5.attrs["about"]
            if zlib.crc32(text.encode()) != int(h5.attrs["crc32"]):
                raise _Unusable(f"the cache {path} was damaged (CRC of its description)")
            about: dict[str, Any] = json.loads(text)
            if about["format"] != FORMAT:
                raise _Unusable(f"the cache {path} has another format ({about['format']}, not {FORMAT})")
            return about, {name: _layout(h5[name]) for name in about["arrays"]}
    except _Unusable:
        raise
    except Exception as error:  # h5py has no one class for what it finds in a broken file
        raise _Unusable(f"the cache {path} was damaged ({error})") from None


def _layout(dataset: Any) -> tuple[int, np.dtype[Any], tuple[int, ...], int]:
    return int(dataset.id.get_offset()), dataset.dtype, tuple(dataset.shape), int(dataset.attrs["crc32"])


def _crc_of_layout(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return zlib.crc32(f"{dtype.str} {shape}".encode())


def _crc_of_file(file: BinaryIO, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    # read, not mapped: a rank must not come to hold every page of a data set of which it needs a few rows
    crc = _crc_of_layout(dtype, shape)
    left = math.prod(shape) * dtype.itemsize
    block = memoryview(bytearray(min(_BLOCK_BYTES, left)))
    file.seek(offset)
    while left:
        got = file.readinto(block[: min(len(block), left)])  # type: ignore[attr-defined]
        if not got:
            return -1
        crc = zlib.crc32(block[:got], crc)
        left -= got
    return crc


# ---- writing
class Unwritable(ValueError):
    """The cache directory cannot be written; says which and what to do."""


def _unwritable(error: Exception) -> Unwritable:
    return Unwritable(
        f"FLDIST_CACHE: the cache directory {directory()} cannot be written ({error}); "
        "set FLDIST_CACHE to a folder that can, with room for the decoded data"
    )


@contextmanager
def _only_writer(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of a cache file, and clear away what killed writers left of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(error) from None
    try:
        _wait_for(lock, path, name)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)  # the file stays: one that is deleted may be locked by two


def _wait_for(lock: int, path: Path, name: str) -> None:
    deadline = time.monotonic() + WAIT_S
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise _unwritable(error) from None
        writer = os.pread(lock, 32, 0).decode(errors="replace") or "(unknown)"
        if time.monotonic() > deadline:
            raise ValueError(
                f"task.data: waited {WAIT_S:.0f} s for process {writer}, which decodes {name} into {path}; "
                "if it hangs, end it; or prepare the cache before the run with `fldist data prepare`"
            )
        if not told:
            _logger.warning("waiting for process %s, which decodes %s into %s", writer, name, path)
            told = True
        time.sleep(_POLL_S)


def _write(path: Path, contents: Contents, origin: Mapping[str, Any]) -> None:
    import h5py

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # latest: its metadata have checksums; alignment: maps begin with a page; locking: we hold a lock of our own
        with h5py.File(
            temporary, "w", libver="latest", alignment_threshold=1, alignment_interval=4096, locking=False
        ) as h5:
            for name, array in contents.arrays.items():
                dataset = h5.create_dataset(name, shape=array.shape, dtype=array.dtype)
                dataset.attrs["crc32"] = _fill(dataset, array)
            about = {"format": FORMAT, **origin, "arrays": list(contents.arrays), "facts": dict(contents.facts)}
            text = json.dumps(about)
            h5.attrs["about"] = text
            h5.attrs["crc32"] = zlib.crc32(text.encode())
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:  # h5py tells of a full disk with either
        raise _unwritable(error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _fill(dataset: Any, array: NDArray[Any]) -> int:
    """Write an array in blocks of rows (it need not be contiguous); returns its CRC-32."""
    crc = _crc_of_layout(array.dtype, array.shape)
    rows = max(1, _BLOCK_BYTES // max(1, array.nbytes // len(array)))
    for first in range(0, len(array), rows):
        block = np.ascontiguousarray(array[first : first + rows])
        dataset[first : first + rows] = block
        crc = zlib.crc32(block.reshape(-1).view(np.uint8).data, crc)
    return crc


def sync(path: Path) -> None:
    """Have a file, or a directory's entries, written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
