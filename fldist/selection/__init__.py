"""Client selection, one selector a file; `selection.name: random` is the module `fldist.selection.random`.

A selector is one frozen dataclass, like an algorithm: its fields are its configuration, what it learns is a `State`,
and what it asks of clients is a method marked `@on_client`, which travels and is counted like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fldist.algorithm import Clients, State, client_methods
from fldist.data.task import Task
from fldist.params import Params

UtilEpochs = Literal["first", "all"]


class ClientReport(NamedTuple):
    """What a client tells of its training, 40 bytes.

    n: its training samples; squares: sum over the samples of their squared cross-entropy, taken in the first epoch (or
    in all of them: `Selector.util_epochs`) before each step; loss: mean training loss of the first epoch; seconds: of
    the client method, or of its training where the section `devices` simulates it; joules: of the training, NaN where
    nobody simulates them. squares and loss are NaN when the method did not train.
    """

    n: float
    squares: float
    loss: float
    seconds: float
    joules: float


class Probe(NamedTuple):
    """What a client tells of its first local epoch to a selector that `probes`, 16 bytes.

    loss: mean training loss of the epoch; seconds: as of `ClientReport`, of the epoch.
    """

    loss: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came of a round.

    replied: of the selected, those whose reply was used, none where the round was not committed; reports: theirs of
    this round, if the selector wants reports; accuracy: the round's, None where it was not scored; seconds, joules: the
    round's simulated latency and energy, None where nothing is simulated; models: what `Selector.digest` made of the
    models of those who replied, if the selector wants models. Clients are ascending.
    """

    round: int
    selected: tuple[int, ...]
    replied: tuple[int, ...]
    reports: Mapping[int, ClientReport] = field(default_factory=dict)
    accuracy: float | None = None
    seconds: float | None = None
    joules: float | None = None
    models: Mapping[int, Tensor] = field(default_factory=dict)


def _no_model() -> Params:
    raise ValueError("selection.name: this algorithm has no global model, which this selector goes by; use random")


@dataclass(frozen=True)
class Candidates:
    """What a selector may know and do.

    ids: clients that hold samples, ascending; sizes: their training examples; count: how many to choose, K, at most as
    many as there are ids; reports: the latest report of every client that has given one (only if the selector wants
    reports); seconds, joules: what a full local training takes on every client's device, by client, where the section
    `devices` simulates them, else empty; rng: keyed by run seed and round, for `select`, `setup` and `observe`;
    clients: to call the selector's own client methods (not in `observe`, which is part of no round); model: gives the
    global model; predicting: replies are made up (`--dry-run`), and what takes time and changes no message's size may
    be left out.
    """

    ids: Sequence[int]
    sizes: Sequence[int]
    count: int
    round: int = 1
    reports: Mapping[int, ClientReport] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)
    joules: Mapping[int, float] = field(default_factory=dict)
    rng: torch.Generator = field(default_factory=torch.Generator)
    num_clients: int = -1  # N, with those that hold no samples; -1: up to the last of `ids`
    task: Task | None = None
    clients: Clients | None = None
    model: Callable[[], Params] = _no_model
    log: Callable[..., None] = lambda **values: None
    warn: Callable[[str], None] = lambda text: None
    predicting: bool = False

    def __post_init__(self) -> None:
        if self.num_clients < 0:
            object.__setattr__(self, "num_clients", max(self.ids, default=-1) + 1)


def uniform(candidates: Candidates, count: int, rng: torch.Generator) -> list[int]:
    """So many of the candidates, ascending; each set is equally likely."""
    order = torch.randperm(len(candidates.ids), generator=rng)[:count]
    return sorted(candidates.ids[i] for i in order.tolist())


@dataclass(frozen=True)
class Selector:
    """Base of all selectors; a subclass is a frozen dataclass whose fields are its configuration.

    What it keeps is in `state`, whose values are replaced, never changed in place: it is checkpointed, put back when a
    round is done again, and part of `state_hash`. Said by the class, not configured: wants_reports: clients send a
    `ClientReport` with each reply; wants_accuracy: every round must be scored; wants_models: `digest` is given every
    model that comes back; probes: `select` names clients that train one epoch, of which `keep` chooses.
    """

    wants_reports: ClassVar[bool] = False
    wants_accuracy: ClassVar[bool] = False
    wants_models: ClassVar[bool] = False
    probes: ClassVar[bool] = False

    @property
    def util_epochs(self) -> UtilEpochs:
        """The local epochs that the `squares` of reports are of."""
        return "first"

    def check(self, task: Task) -> None:
        """Refuse a task that cannot be done: ValueError with the key and the remedy."""

    def init(self, candidates: Candidates) -> State:
        """The state before round 1; by default a selector keeps none."""
        return State()

    def setup(self, state: State, candidates: Candidates) -> None:
        """Run once, after the algorithm's setup; calls made here are booked under the phase `setup`."""

    def select(self, state: State, candidates: Candidates) -> list[int]:
        """The clients of this round, ascending; calls made here are booked under the phase `select`."""
        raise TypeError(f"{type(self).__name__} does not define select(self, state, candidates)")

    def observe(self, state: State, candidates: Candidates, outcome: Outcome) -> None:
        """Learn from a round, whoever has chosen its clients: called after every round, also one without a reply."""

    def warm_up(self, state: State, candidates: Candidates) -> None:
        """What it asks of clients before it can propose, in the rounds that another selector chooses, before it does.

        Calls made here are booked under the phase `select`; by default none are made.
        """

    def propose(self, state: State, candidates: Candidates, rng: torch.Generator) -> list[int]:
        """What it might choose, ascending; changes no state, calls no client, draws from `rng` alone."""
        raise TypeError(f"{type(self).__name__} does not define propose(self, state, candidates, rng)")

    def keep(self, state: State, candidates: Candidates, probes: Mapping[int, Probe]) -> list[int]:
        """Of the clients that were probed and answered, those that go on, ascending (only if it `probes`)."""
        raise TypeError(f"{type(self).__name__} does not define keep(self, state, candidates, probes)")

    def digest(self, state: State, model: Params) -> Tensor:
        """What is kept of a client's trained model until `observe` (only if it `wants_models`)."""
        raise TypeError(f"{type(self).__name__} does not define digest(self, state, model)")

    def client_methods(self) -> dict[str, Callable[..., Any]]:
        """Its client halves by name, in the order that both ends of the wire number them by."""
        return dict(client_methods(self))
