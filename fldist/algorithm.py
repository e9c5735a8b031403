"""What an algorithm's author writes: `Algorithm`, `@on_client`, `State`, `Stage`; and what a client method meets.

An algorithm is one frozen dataclass. Its fields are its hyper-parameters, the server half is straight-line
code, a client half is a method marked `@on_client` whose signature is the wire schema. How calls travel is
nobody's business here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from fldist.fold import Fold
from fldist.params import Params

if TYPE_CHECKING:
    from fldist.data.task import Task

F = TypeVar("F", bound=Callable[..., Any])


class State:
    """Named values that outlive a round: Params, tensors, numbers, strings, None, lists, dicts, nested States.

    Values are replaced, never changed in place. Nothing measured (times, best accuracy) belongs here: a state
    decides the next round, and its hash must be the same wherever it ran.
    """

    def __init__(self, **values: Any) -> None:
        object.__setattr__(self, "_values", dict(values))

    @property
    def values(self) -> dict[str, Any]:
        """The named values, in the order in which they were first set."""
        values: dict[str, Any] = object.__getattribute__(self, "_values")
        return values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.values[name]
        except KeyError:
            known = ", ".join(self.values) or "nothing"
            raise AttributeError(f"the state has no {name!r}; it holds {known}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.values[name] = value

    def copy(self) -> State:
        """A State with the same values; values are shared, since they are never changed in place."""
        return State(**self.values)

    def __repr__(self) -> str:
        return f"State({', '.join(f'{k}={v!r}' for k, v in self.values.items())})"


def on_client(method: F) -> F:
    """Mark a method as a client half: it runs on the client's host as `method(self, me, data, **arguments)`."""
    method._fldist_on_client = True  # type: ignore[attr-defined]
    return method


class Replies(Protocol):
    """What a call gave. Reply fields are attributes: the folded value, or {client: value} where not folded."""

    @property
    def clients(self) -> Sequence[int]:
        """The clients whose replies were accepted, in client order."""

    @property
    def missing(self) -> Mapping[int, str]:
        """Why a called client's reply is not in: lost, error, refused (nan, range, shape), deadline."""

    @property
    def seconds(self) -> Mapping[int, float]:
        """Seconds that each accepted client computed."""

    def __getattr__(self, name: str) -> Any: ...


class Cohort(Protocol):
    """Some clients, to be called together."""

    @property
    def ids(self) -> Sequence[int]:
        """The clients, ascending."""

    def call(
        self,
        method: Callable[..., Any],
        *,
        fold: Mapping[str, Fold] | None = None,
        phase: str | None = None,
        **arguments: Any,
    ) -> Replies:
        """Run a client method on every client of the cohort; raise `NoReplies` when none is accepted.

        fold: how each reply field that is not a number is folded; numbers are collected unless named here.
        phase: the name under which bytes and seconds are booked (default: the method's name).
        Arguments are given by name: one value for all, or `Each({client: value})`, or `Once(value, version)`.
        """


class Clients(Protocol):
    """All clients of the run."""

    num: int
    """K, the number of clients, including those without samples."""

    def selected(self) -> Cohort:
        """The selector's choice for this round."""

    def all(self) -> Cohort:
        """Every client that holds samples."""

    def only(self, ids: Sequence[int]) -> Cohort:
        """The named clients."""


class Server(Protocol):
    """The server half's view: its state's values are attributes; `rng`, `log` and `task` are there."""

    task: Task
    round: int
    rng: torch.Generator

    def log(self, **values: float) -> None:
        """Write numbers into this round's line of rounds.jsonl."""

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


class Me(Protocol):
    """A client's own state. Writes are staged and become real when the round commits and the reply was accepted.

    `scratch` lives within a round and is never checkpointed.
    """

    client: int
    scratch: State

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


class NoReplies(RuntimeError):
    """A call that nobody answered. The runtime leaves the state unchanged and goes on with the next round."""

    def __init__(self, method: str, missing: Mapping[int, str]) -> None:
        super().__init__(f"no reply to {method} was accepted")
        self.method = method
        self.missing = dict(missing)


@dataclass(frozen=True)
class Stage:
    """A named part of a run: `rounds` times `step(server, clients)`."""

    name: str
    rounds: int
    step: Callable[[Any, Any], None]


@dataclass(frozen=True)
class Algorithm:
    """Base of all algorithms. A subclass is a frozen dataclass; it must define `init_server` and `round`."""

    def init_server(self, task: Task) -> State:
        """The server's state before round 1."""
        raise TypeError(f"{type(self).__name__} does not define init_server(self, task)")

    def init_client(self, task: Task, client: int) -> State:
        """A client's state before its first call; the default declares that clients keep none."""
        return State()

    def setup(self, server: Server, clients: Clients) -> None:
        """Run once before round 1; calls made here are booked under the phase `setup`."""

    def round(self, server: Server, clients: Clients) -> None:
        """One round; rounds count from 1."""
        raise TypeError(f"{type(self).__name__} does not define round(self, server, clients)")

    def stages(self, rounds: int) -> list[Stage]:
        """The stages of a run of `rounds` rounds; the default is one stage of `round`."""
        return [Stage("train", rounds, self.round)]

    def model(self, server: Server) -> Params:
        """The model that is evaluated and saved; the default is the state's `x`."""
        model: Params = server.x
        return model

    @property
    def stateful(self) -> bool:
        """Whether clients keep a state of their own."""
        return type(self).init_client is not Algorithm.init_client

    def client_methods(self) -> dict[str, Callable[..., Any]]:
        """The client halves by name, in the order that both ends of the wire number them by."""
        return dict(_client_methods(self))


def _client_methods(algorithm: Algorithm) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in sorted(dir(type(algorithm))):
        if getattr(getattr(type(algorithm), name, None), "_fldist_on_client", False):
            yield name, getattr(algorithm, name)
