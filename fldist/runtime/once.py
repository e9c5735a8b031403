"""Arguments given as `Once`: what each host holds, what each client has been given, and, at a host, the values.

A value travels to a host that does not hold its version; what a host holds ends with its process, so after a rejoin it
travels again. In the ledger a client is given a version once, whichever hosts it has been on: kinds (logical and
encoded bytes) are booked the first time, and what travels again later is in framing and wire alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fldist.kinds import HELD, Field, Once
from fldist.params import Params
from fldist.sparse import Kept
from fldist.wire.ledger import Booked, Kinds


def size_of(value: Any) -> int:
    """Logical bytes of a value of any form."""
    if value is None:
        return 0
    if isinstance(value, Kept):
        return value.nbytes
    if isinstance(value, Params):
        return size_of(value.floats) + size_of(value.ints)
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value.values())) if isinstance(value, dict) else 8


def named(method: str, argument: str, name: str | None) -> str:
    """Under what name a host keeps an argument: that which the call gives it, or its method's and its own."""
    return name or f"{method}.{argument}"


def copied(value: Any) -> Any:
    """The value in memory of its own."""
    if isinstance(value, dict):
        return {name: tensor.clone() for name, tensor in value.items()}
    return value.clone() if isinstance(value, Params | Tensor) else value


@dataclass
class _Held:
    """What a host holds of one argument: a version, and, where payloads are not shared, for which clients."""

    version: int
    clients: set[int]


class OnceTable:
    """The server's tables. Arguments have names (`named`); share: one copy serves all clients of a host."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self._held: dict[int, dict[str, _Held]] = {}  # by rank, of its present incarnation
        self.given: dict[str, dict[int, int]] = {}  # argument -> client -> version
        self._giving: dict[tuple[str, int], tuple[int, Booked]] = {}  # by argument and client; not settled yet

    def left(self, rank: int) -> None:
        """A host is gone, and what it held with it."""
        self._held.pop(rank, None)

    def holds(self, rank: int, method: str, name: str, given: Once[Any]) -> bool:
        """Whether a host holds this version of an argument, for some client."""
        held = self._held.get(rank, {}).get(named(method, name, given.name))
        return held is not None and held.version == given.version

    def hold_back(
        self, rank: int, method: str, fields: Sequence[Field], client: int, once: Mapping[str, Once[Any]], values: Any
    ) -> Kinds:
        """Put HELD for what a host holds into a client's values (one a field, in place).

        Returns what is booked with the message: the values that this client has not been given before.
        """
        kinds: Kinds = {}
        for index, field in enumerate(fields):
            given = once.get(field.name)
            if given is None:
                continue
            argument = named(method, field.name, given.name)
            if given.value is not None and self._has(argument, client) != given.version:
                size, before = size_of(given.value), kinds.get(field.kind, (0, 0))
                kinds[field.kind] = (before[0] + size, before[1] + size)
            held = self._held.get(rank, {}).get(argument)
            if held is not None and held.version == given.version and (self._share or client in held.clients):
                values[index] = HELD
        return kinds

    def sent(self, rank: int, method: str, once: Mapping[str, Once[Any]], entries: Sequence[Booked]) -> None:
        """A call with these values, for the clients of these entries, is on its way to a host."""
        for name, given in once.items():
            argument = named(method, name, given.name)
            held = self._held.setdefault(rank, {}).get(argument)
            if held is None or held.version != given.version:
                held = self._held[rank][argument] = _Held(given.version, set())
            for booked in entries:
                held.clients.add(booked.client)
                if self._has(argument, booked.client) != given.version:
                    self._giving[argument, booked.client] = (given.version, booked)

    def _has(self, argument: str, client: int) -> int | None:
        """The version that a client has been given, or is being given."""
        version, booked = self._giving.get((argument, client), (None, None))
        if booked is not None and booked.status in ("open", "delivered"):
            return version
        return self.given.get(argument, {}).get(client)

    def settle(self) -> None:
        """Note what clients have been given by now; what was lost or is void they have not."""
        for (argument, client), (version, booked) in list(self._giving.items()):
            if booked.status == "delivered":
                self.given.setdefault(argument, {})[client] = version
            if booked.status != "open":
                del self._giving[argument, client]


class OnceValues:
    """A host's values, one version of each argument."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[int, Any]] = {}
        self._spoilt: dict[str, str] = {}

    def clear(self) -> None:
        """Hold nothing: another server does not know of it."""
        self._values.clear()
        self._spoilt.clear()

    def put(self, argument: str, version: int, value: Any) -> None:
        """Keep a value that was sent, in memory of its own: a message's belongs to the link."""
        if self._values.get(argument, (None,))[0] != version:
            self._values[argument] = (version, copied(value))
            self._spoilt.pop(argument, None)

    def get(self, argument: str, version: int) -> Any:
        """The value of a version; ValueError when a client has changed it, or it is not there."""
        if argument in self._spoilt:
            raise ValueError(self._spoilt[argument])
        held, value = self._values.get(argument, (None, None))
        if held != version:
            raise ValueError(f"this host does not hold version {version} of {argument}")
        return value

    def spoil(self, argument: str, why: str) -> None:
        """A client has changed what all share: nobody gets it any more."""
        if argument in self._values:
            self._spoilt[argument] = why
