"""Client state that is transactional, and the hash of a state.

What a client method writes is staged under (round, attempt). The verdict at the round's end says, per client,
how many of its calls were accepted: their writes are committed in order, the rest is dropped. A state has a version,
`round.attempt.call.epoch` of the call that wrote it last ("" before any), where the epoch counts the server's starts:
what a host wrote for a server that has died since has another name than what its successor asks for. Each call says
which version it starts from, and a host that does not have it in memory reads it from the client's files.

States lie on the CPU, at the server as at clients: there may be more of them than a GPU has memory, and files and
hashes are made from there. What a client reads of its `me` is brought to the device it calculates on, and what it
writes comes back when it is staged; `me.scratch` lives within a round, its scoring included, and stays where it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fldist.algorithm import State
from fldist.params import Params
from fldist.runtime.checkpoint import ClientFiles, Damaged
from fldist.runtime.device import CPU
from fldist.wire.codec import Head

RoundKey = tuple[int, int]
"""(round, attempt)."""


UNKEPT = "its state cannot be "
"""In the reason of a reply that is missing for want of a file, not of a client's code: `written`, `read`."""


def version_of(head: Head) -> str:
    """The version of what is written in the call that a head belongs to."""
    return f"{head.round}.{head.attempt}.{head.call}.{head.epoch}"


class ClientView:
    """A client's `me` during one call: reads see its own staged writes, writes go into the call's own set.

    device: where what is read is brought to, each value once.
    """

    def __init__(
        self,
        client: int,
        layers: list[dict[str, Any]],
        scratch: State,
        may_write: bool,
        device: torch.device = CPU,
        stage: int = 0,
    ) -> None:
        set_ = object.__setattr__
        set_(self, "_device", device)
        set_(self, "_read", {})
        set_(self, "client", client)
        set_(self, "stage", stage)
        set_(self, "scratch", scratch)
        set_(self, "_layers", layers)  # newest first
        set_(self, "_may_write", may_write)
        set_(self, "writes", {})
        set_(self, "watched", Watch())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.writes:
            return self.writes[name]
        if name in self._read:
            return self._read[name]
        layers: list[dict[str, Any]] = object.__getattribute__(self, "_layers")
        for layer in layers:
            if name in layer:
                value = self._read[name] = moved(layer[name], self._device)
                self.watched.add(f"me.{name}", value)
                return value
        known = ", ".join(sorted({n for layer in [self.writes, *layers] for n in layer})) or "nothing"
        raise AttributeError(f"client {self.client} has no state {name!r}; it holds {known}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not object.__getattribute__(self, "_may_write"):
            raise AttributeError(
                f"me.{name} cannot be set: the algorithm declares no client state; define init_client(self, task, "
                "client), or use me.scratch for what lives within a round"
            )
        if name in ("client", "stage", "scratch", "writes", "watched"):
            raise AttributeError(f"me.{name} is taken; choose another name")
        check_value(f"me.{name}", value)
        self.writes[name] = value


def moved(value: Any, device: torch.device) -> Any:
    """A state's value on a device: the value itself where all of it lies there, else a copy, containers included."""
    if isinstance(value, Params | Tensor):
        return value.to(device)
    if isinstance(value, State):
        values = moved(value.values, device)
        return value if values is value.values else State(**values)
    if isinstance(value, dict):
        items = {k: moved(v, device) for k, v in value.items()}
        return value if all(items[k] is v for k, v in value.items()) else items
    if isinstance(value, list | tuple):
        parts = [moved(v, device) for v in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


class Watch:
    """Notices tensors, lists, dicts and States that were changed in place although others share them.

    A tensor written to through `.data`, or as part of a module that was bound to it, is not noticed.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[str, Tensor, int]] = []
        self._containers: list[tuple[str, Any, list[Any]]] = []

    def add(self, name: str, value: Any) -> None:
        """Remember the version of every tensor and the contents of every container in `value`."""
        if isinstance(value, Tensor):
            self._tensors.append((name, value, value._version))
        elif isinstance(value, Params):
            self.add(name, value.floats)
            self.add(name, value.ints)
        elif isinstance(value, State | dict | list | tuple):
            contents = _contents(value)
            self._containers.append((name, value, contents))
            for item in contents:
                self.add(name, item)

    def changed(self) -> str | None:
        """The name of a value that was changed in place, or None."""
        for name, tensor, version in self._tensors:
            if tensor._version != version:
                return name
        for name, container, contents in self._containers:
            now = _contents(container)
            if len(now) != len(contents) or any(a is not b for a, b in zip(now, contents, strict=True)):
                return name
        return None


def _contents(container: State | dict[Any, Any] | list[Any] | tuple[Any, ...]) -> list[Any]:
    """Keys and values, or items, to be compared by identity."""
    if isinstance(container, State):
        container = container.values
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    return list(container)


class ClientStates:
    """The states of the clients that this host holds."""

    files: ClientFiles | None = None
    """Where versions are kept past this process, if anywhere."""

    def __init__(self, init: Callable[[int], State], stateful: bool, device: torch.device = CPU) -> None:
        self._init = init
        self._device = device
        self._stateful = stateful
        self._committed: dict[int, dict[str, Any]] = {}
        self._versions: dict[int, str] = {}  # of what is committed here
        self._key: RoundKey = (0, 0)
        self._staged: dict[int, list[tuple[str, dict[str, Any]]]] = {}  # by call: version, writes
        self._scratch: dict[int, State] = {}

    def forget(self) -> None:
        """Another server has taken over: no round has begun, and states are what it says, read from the files."""
        self._key = (0, 0)
        self._committed.clear()
        self._versions.clear()
        self._staged.clear()
        self._scratch.clear()

    def begin(self, key: RoundKey) -> bool:
        """Enter a round or an attempt; what was staged for another one is dropped. True if it is a new one."""
        if key == self._key:
            return False
        self._key = key
        self._staged.clear()
        self._scratch.clear()
        return True

    def committed(self, client: int) -> dict[str, Any]:
        """A client's committed values."""
        if client not in self._committed:
            self._committed[client] = moved(dict(self._init(client).values), CPU) if self._stateful else {}
        return self._committed[client]

    def take(self, client: int, version: str) -> None:
        """Have this version of a client's state as the committed one; Damaged when it cannot be had."""
        if not self._stateful or self._versions.get(client, "") == version:
            return
        if version and self.files is None:
            raise Damaged(f"client {client}: this host has no state of version {version}, and no files to look in")
        if version:
            assert self.files is not None
            self._committed[client] = self.files.read(client, version)
        else:
            self._committed.pop(client, None)
        self._versions[client] = version
        self._staged.pop(client, None)

    def view(self, client: int, stage: int = 0) -> ClientView:
        """`me` for one call, of a round of the stage with this number."""
        layers = [*(w for _, w in reversed(self._staged.get(client, []))), self.committed(client)]
        scratch = self._scratch.setdefault(client, State())
        return ClientView(client, layers, scratch, self._stateful, self._device, stage)

    def stage(self, client: int, writes: dict[str, Any], version: str = "") -> bool:
        """Keep a call's writes until the verdict, also in the client's files; True if the version is there now.

        Nothing is staged when the files cannot be written: OSError, which costs the client its reply.
        """
        staged = self._staged.setdefault(client, [])
        writes = moved(writes, CPU)
        kept = bool(writes) and self.files is not None
        if kept:
            assert self.files is not None
            whole = dict(self.committed(client))
            for _, earlier in staged:
                whole.update(earlier)
            self.files.write(client, version, {**whole, **writes})
        staged.append((version, writes))
        return kept

    def verdict(self, key: RoundKey, commit: bool, accepted: dict[int, int]) -> None:
        """End a round: commit the first `accepted[client]` calls of each client (all where it is not named).

        What is in the scratches stays for the round's scoring, until the next round begins here.
        """
        if key != self._key:
            return
        if commit:
            for client, calls in self._staged.items():
                for version, writes in calls[: accepted.get(client, len(calls))]:
                    self.committed(client).update(writes)
                    if writes and self.files is not None:
                        self._versions[client] = version
        else:
            self._scratch.clear()
        self._staged.clear()

    def digest(self, client: int) -> str:
        """SHA-256 of a client's committed state."""
        return hash_state(self.committed(client))


def check_value(name: str, value: Any) -> None:
    """Refuse what a state cannot hold: TypeError names it."""
    if isinstance(value, State):
        value = value.values
    if isinstance(value, dict):
        for key, item in value.items():
            check_value(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_value(name, item)
    elif not (value is None or isinstance(value, Params | Tensor | bool | int | float | str)):
        raise TypeError(
            f"{name} is a {type(value).__name__}; a state holds Params, tensors, numbers, strings, lists and dicts"
        )


def hash_state(values: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes, independent of the order in which values were set."""
    digest = hashlib.sha256()
    _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, State):
        value = value.values
    if isinstance(value, Params):
        digest.update(b"P")
        _feed(digest, value.floats)
        _feed(digest, value.ints)
    elif isinstance(value, Tensor):
        digest.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    elif isinstance(value, dict):
        digest.update(f"D{len(value)}".encode())
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"L{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif isinstance(value, bool) or value is None:
        digest.update(f"B{value}".encode())
    elif isinstance(value, int):
        digest.update(f"I{value};".encode())
    elif isinstance(value, float):
        digest.update(b"F" + struct.pack("<d", value))
    elif isinstance(value, str):
        raw = value.encode()
        digest.update(f"S{len(raw)};".encode() + raw)
    else:
        check_value("a state", value)
        raise AssertionError("check_value refuses what has no hash")
