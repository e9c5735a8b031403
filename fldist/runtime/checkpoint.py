"""Files that outlive a process: the server's state after a round, and each client's state after a call.

One file holds one state: safetensors, the shape of the state as JSON in its metadata, a CRC-32 of all of it. It is
written to a temporary name and renamed, so a reader finds it whole or not at all; one that is damaged all the same
(a cut or rotten disk) is noticed and said to be. What the files mean to a run is decided by the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fldist import blocks
from fldist.algorithm import State
from fldist.data.cache import sync
from fldist.params import Layout, Params, Slot

FORMAT = 3
SYNCS = 8
"""Files that are synced to the disk at a time."""
_GROUPS = ("params", "buffers", "integers")


class Damaged(ValueError):
    """A file that does not hold what was written; says which and why."""


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; OSError when it cannot be written."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path.name} cannot be written: {error}") from None


# ---- one state, one file
def write_state(path: Path, values: Mapping[str, Any], facts: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write values (as a State holds them) and plain facts; durable: also past a power failure (fsync)."""
    tensors: dict[str, Tensor] = {}
    layouts: list[Layout] = []
    tree = _pack(dict(values), tensors, layouts, set())
    about = {"format": FORMAT, "tree": tree, "layouts": [_layout_text(x) for x in layouts], "facts": dict(facts)}
    text = json.dumps(about)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, temporary, {"about": text, "crc": f"{_crc(text, tensors):08x}"})
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path, layouts: Iterable[Layout] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and facts of a file; Damaged says why they cannot be had, FileNotFoundError that there is none.

    layouts: those already known; equal ones are taken from here, so that a comparison of Params costs nothing. Every
    tensor lies in memory of its own that begins at a multiple of `blocks.ALIGNMENT`.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # at a block's boundary, as they were made: where memory begins decides the order of sums, and so bits
            tensors = {name: blocks.copy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
        text = metadata["about"]
        if f"{_crc(text, tensors):08x}" != metadata["crc"]:
            raise Damaged(f"{path} is damaged: its checksum is wrong")
        about = json.loads(text)
        if about["format"] != FORMAT:
            raise Damaged(f"{path} has format {about['format']}; this version reads {FORMAT}")
        known = {layout: layout for layout in layouts}
        found = [known.get(x, x) for x in map(_layout_of, about["layouts"])]
        values = _unpack(about["tree"], tensors, found)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path} is damaged: {error}") from None
    return values, about["facts"]


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a file alone, without its tensors (and so without its checksum)."""
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["about"])["facts"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
    return facts


def _crc(text: str, tensors: Mapping[str, Tensor]) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _pack(value: Any, tensors: dict[str, Tensor], layouts: list[Layout], memories: set[int]) -> Any:
    """A value as JSON: [type, contents]; tensors go into `tensors` under a number. memories: where those lie."""

    def put(tensor: Tensor) -> str:
        name = str(len(tensors))
        flat = tensor.detach().cpu().contiguous()
        if (memory := flat.untyped_storage().data_ptr()) in memories:
            flat = flat.clone()  # safetensors takes no shared memory
        elif memory:
            memories.add(memory)
        tensors[name] = flat
        return name

    if isinstance(value, Params):
        if value.layout not in layouts:
            layouts.append(value.layout)
        return ["params", layouts.index(value.layout), put(value.floats), put(value.ints)]
    if isinstance(value, Tensor):
        return ["tensor", put(value)]
    if isinstance(value, State):
        return ["state", [[k, _pack(v, tensors, layouts, memories)] for k, v in value.values.items()]]
    if isinstance(value, dict):
        pairs = [[_pack(item, tensors, layouts, memories) for item in pair] for pair in value.items()]
        return ["dict", pairs]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", [_pack(v, tensors, layouts, memories) for v in value]]
    if isinstance(value, float):
        return ["float", value.hex()]  # JSON has no NaN and no infinity
    assert value is None or isinstance(value, bool | int | str), type(value)
    return ["plain", value]


def _unpack(tree: Any, tensors: Mapping[str, Tensor], layouts: list[Layout]) -> Any:
    kind, *rest = tree
    if kind == "params":
        return Params(layouts[rest[0]], tensors[rest[1]], tensors[rest[2]])
    if kind == "tensor":
        return tensors[rest[0]]
    if kind == "state":
        return State(**{k: _unpack(v, tensors, layouts) for k, v in rest[0]})
    if kind == "dict":
        return {_unpack(k, tensors, layouts): _unpack(v, tensors, layouts) for k, v in rest[0]}
    if kind in ("list", "tuple"):
        items = [_unpack(v, tensors, layouts) for v in rest[0]]
        return tuple(items) if kind == "tuple" else items
    if kind == "float":
        return float.fromhex(rest[0])
    if kind != "plain":
        raise ValueError(f"an unknown kind of value, {kind!r}")
    return rest[0]


def _layout_text(layout: Layout) -> dict[str, list[list[Any]]]:
    return {g: [[s.name, list(s.shape), s.offset, s.numel] for s in getattr(layout, g)] for g in _GROUPS}


def _layout_of(text: Mapping[str, Any]) -> Layout:
    made = (tuple(Slot(name, tuple(shape), at, numel) for name, shape, at, numel in text[g]) for g in _GROUPS)
    return Layout(*made)


# ---- the server's
class Checkpoints:
    """A run's checkpoints, one file a round: `round-000012.safetensors`; LATEST names the newest and moves last.

    Every round is written, so that a killed server loses none; those that must outlive a power failure too are
    synced, and of these the last `keep` stay beside the last two of all, and for good those that are said to.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self._keep = keep
        self._durable: list[int] = []
        self._others: list[int] = []
        self._lasting: list[int] = []  # some of the durable ones

    def path(self, number: int) -> Path:
        """The file of a round."""
        return self.directory / f"round-{number:06d}.safetensors"

    def write(
        self, number: int, values: Mapping[str, Any], facts: Mapping[str, Any], *, durable: bool, lasting: bool = False
    ) -> None:
        """Write a round's state, then LATEST, then drop what is not needed any more. lasting: this never is dropped."""
        write_state(self.path(number), values, facts, durable=durable)
        temporary = self.directory / "LATEST.tmp"
        temporary.write_text(f"{self.path(number).name}\n", encoding="utf-8")
        if durable:
            sync(temporary)
        temporary.replace(self.directory / "LATEST")
        if durable:
            sync(self.directory)
            self._durable.append(number)
            if lasting:
                self._lasting.append(number)
        else:
            self._others.append(number)
        self._prune()

    @property
    def durable(self) -> list[int]:
        """Of the rounds whose files are there, those that outlive a power failure, ascending."""
        return list(self._durable)

    @property
    def lasting(self) -> list[int]:
        """Of these, those whose files stay for good, ascending."""
        return list(self._lasting)

    def secure(self) -> None:
        """Sync the newest one: the run ends before its time."""
        if self._others and self._others[-1] > max(self._durable, default=-1):
            sync(self.path(self._others[-1]))
            sync(self.directory)

    @property
    def kept(self) -> list[int]:
        """The rounds whose files are needed, ascending."""
        newest = sorted({*self._durable, *self._others})[-2:]
        return sorted({*self._lasting, *self._durable[-self._keep :], *newest})

    def _prune(self) -> None:
        kept = set(self.kept)
        for number in {*self._durable, *self._others} - kept:
            self.path(number).unlink(missing_ok=True)
        self._durable = [n for n in self._durable if n in kept]
        self._others = [n for n in self._others if n in kept]

    def newest(
        self, layouts: Iterable[Layout] = (), lacking: Callable[[dict[str, Any]], str | None] = lambda facts: None
    ) -> tuple[int, dict[str, Any], dict[str, Any], list[str]] | None:
        """The newest whole checkpoint (round, values, facts), and what is wrong with newer ones; None: there is none.

        lacking: what else a checkpoint with these facts needs that is not there. Files of rounds that come after the
        one that is taken are removed, as is what a killed writer left.
        """
        problems = []
        layouts = list(layouts)
        found = sorted(self.numbers(), reverse=True)
        for number in found:
            try:
                values, facts = read_state(self.path(number), layouts)
            except Damaged as error:
                problems.append(f"{error}; the checkpoint before it is taken")
                continue
            if (lack := lacking(facts)) is not None:
                problems.append(f"{self.path(number)} cannot be used: {lack}; the checkpoint before it is taken")
                continue
            for later in found[: found.index(number)]:
                self.path(later).unlink(missing_ok=True)
            for left in self.directory.glob("*.tmp*"):
                left.unlink(missing_ok=True)
            self._durable = sorted(n for n in found if n <= number and n in set(facts.get("durable", [])))
            self._others = sorted(n for n in found if n <= number and n not in self._durable)
            self._lasting = [n for n in self._durable if n in set(facts.get("lasting", []))]
            return number, values, facts, problems
        if problems:
            raise Damaged(f"no checkpoint in {self.directory} is whole; the newest: {problems[0].rpartition(';')[0]}")
        return None

    def numbers(self) -> Iterator[int]:
        """The rounds whose files are there, in any order."""
        for path in self.directory.glob("round-*.safetensors"):
            with contextlib.suppress(ValueError):
                yield int(path.name.removeprefix("round-").removesuffix(".safetensors"))


# ---- the clients'
class ClientFiles:
    """Every client's states, one file a version: `00012/7.0.2.0.safetensors` for client 12 after call 2 of round 7.

    A host writes a version before the reply that goes with it leaves; which version counts is the server's word.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, client: int, version: str) -> Path:
        """The file of a version."""
        return self.directory / f"{client:05d}" / f"{version}.safetensors"

    def write(self, client: int, version: str, values: Mapping[str, Any]) -> None:
        """Write a version."""
        write_state(self.path(client, version), values, {"client": client, "version": version})

    def read(self, client: int, version: str, layouts: Iterable[Layout] = ()) -> dict[str, Any]:
        """The state of a version; ValueError when it is not there or damaged."""
        try:
            return read_state(self.path(client, version), layouts)[0]
        except FileNotFoundError:
            raise Damaged(f"client {client}: there is no state of version {version} in {self.directory}") from None

    def broken(self, client: int, version: str) -> str | None:
        """What is wrong with the file of a version, as far as a look at its head and length tells; None: nothing."""
        try:
            read_facts(self.path(client, version))
        except Damaged as error:
            return str(error)
        return None

    def sync(self, versions: Mapping[int, str]) -> None:
        """Have these versions outlive a power failure; OSError when one is not there.

        Whoever wrote them: a file is flushed by any process of the machine, and by its writer's closing it on a
        network file system. Several at a time, since each wait is one for the disk.
        """
        files = [self.path(client, version) for client, version in versions.items() if version]
        with ThreadPoolExecutor(SYNCS, thread_name_prefix="fldist-sync") as pool:
            list(pool.map(sync, files))
            list(pool.map(sync, [self.directory, *(file.parent for file in files)]))

    def prune(self, needed: Mapping[int, set[str]]) -> None:
        """Drop every version that is not needed; needed: by client."""
        for client, versions in needed.items():
            for path in self.path(client, "x").parent.glob("*.safetensors"):
                if path.name.removesuffix(".safetensors") not in versions:
                    path.unlink(missing_ok=True)
