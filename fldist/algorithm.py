"""What an algorithm's author writes: `Algorithm`, `@on_client`, `State`, `Stage`; and what a client method meets.

An algorithm is one frozen dataclass. Its fields are its hyper-parameters, the server half is straight-line
code, a client half is a method marked `@on_client` whose signature is the wire schema. How calls travel is
nobody's business here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch

from fldist.clock import Clock
from fldist.data.client_data import ClientData, PooledData
from fldist.data.task import Task
from fldist.fold import Fold, collect
from fldist.kinds import MaxBytes, Report, Weights
from fldist.models.evaluate import Evaluation, Scores
from fldist.params import Params
from fldist.seeding import generator

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

    @property
    def reports(self) -> Mapping[int, Any]:
        """What each client reports of its training (`selection.ClientReport`), where the selector wants reports."""

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
        """Run a client method on every client of the cohort; raise `TooFewReplies` when too few are accepted.

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

    def by(self, architecture: int) -> Cohort:
        """The clients that hold samples and a model of this architecture (its number in `task.architectures`)."""


class Server(Protocol):
    """The server half's view: its state's values are attributes; `rng`, `log` and `task` are there.

    `data` is all clients' training data together, for what no federation could do: centralised training; `clock` has
    the durations by which something is decided; `predicting`: replies are made up, to count bytes (`--dry-run`), and
    what takes time and changes no message's size may be left out.
    """

    task: Task
    data: PooledData
    predicting: bool
    clock: Clock
    round: int
    rng: torch.Generator

    def log(self, **values: float) -> None:
        """Write numbers into this round's line of rounds.jsonl."""

    def images(self, **pictures: torch.Tensor) -> None:
        """Save pictures of this round to look at, as images/round-000010-NAME.png: one, or up to 64 as a grid.

        Each [channels, height, width] or [number, channels, height, width], with 1 or 3 channels; floats are clipped to
        0..1, uint8 is taken as it is. Those of `setup` are of round 0.
        """

    def table(self, **tables: Sequence[Mapping[str, float | str]]) -> None:
        """Save small tables of this round as tables/round-000010-NAME.csv, if it is committed.

        Each a list of rows, at least one; a row is {column: number or string}, and all have the same columns. Those of
        `setup` are of round 0.
        """

    def warn(self, text: str) -> None:
        """Tell the user something that is no error, at once, whatever becomes of the round; the same text once a round.

        It is shown as `round 10: TEXT`.
        """

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


class Me(Protocol):
    """A client's own state. Writes are staged and become real when the round commits and the reply was accepted.

    `scratch` lives within a round, its scoring included, and is never checkpointed; `stage` is the index in
    `Algorithm.stages` of the stage whose round it is (0 in the setup), which no message says besides its head.
    """

    client: int
    stage: int
    scratch: State

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


class TooFewReplies(RuntimeError):
    """A call that fewer clients answered than `faults.min_replies` asks for. The runtime leaves the state unchanged,
    and goes on, does the round again or stops, as `faults.on_quorum_loss` says."""

    def __init__(self, method: str, missing: Mapping[int, str], replied: int = 0, needed: int = 1) -> None:
        what = "no reply" if not replied else f"only {replied} of the {needed} replies that are needed"
        super().__init__(f"{what} to {method} {'was' if replied < 2 else 'were'} accepted")
        self.method = method
        self.missing = dict(missing)


@dataclass(frozen=True)
class Stage:
    """A named part of a run: `rounds` times `step(server, clients)`."""

    name: str
    rounds: int
    step: Callable[[Any, Any], None]


@dataclass(frozen=True)
class Books:
    """What a run has exchanged by its end, for `Algorithm.summary`.

    rounds: those that are finished; replied: by round, how many clients' replies were used; bytes: logical bytes of
    delivered messages by phase, kind (`weights`, `masks` ...) and direction (`up`, `down`), all phases: `setup` and
    `evaluate` as well.
    """

    rounds: int
    replied: Sequence[int]
    bytes: Mapping[str, Mapping[str, Mapping[str, int]]]

    def total(self, *phases: str, kind: str | None = None, way: Literal["up", "down"] | None = None) -> int:
        """Bytes of these phases (none named: of all), of one kind or of all, in one direction or in both."""
        return sum(
            number
            for phase, kinds in self.bytes.items()
            if not phases or phase in phases
            for name, ways in kinds.items()
            if kind in (None, name)
            for direction, number in ways.items()
            if way in (None, direction)
        )


class ClientScores(NamedTuple):
    """How a model did on a client's samples."""

    scores: Annotated[Report, MaxBytes(1024)]  # float64 [1 + M]: samples, then the metrics of `Evaluation.names`

    @classmethod
    def of(cls, scores: Scores, how: Evaluation) -> ClientScores:
        """These scores as they travel."""
        return cls(torch.tensor([scores.n, *(scores.values[m] for m in how.names)], dtype=torch.float64))


@dataclass(frozen=True)
class Algorithm:
    """Base of all algorithms. A subclass is a frozen dataclass; it must define `init_server` and `round`.

    heterogeneous: whether clients may have models of different architectures; has_global_model: whether the
    server has one. Both are said by the class, not configured.

    stage_fields: fields that may be changed when a run goes on, each with the first stage that reads it: until that one
    has begun. None in place of a stage: the field only decides what `stages` gives, and must leave the rounds that are
    done in the stages that they were in.
    """

    heterogeneous: ClassVar[bool] = False
    has_global_model: ClassVar[bool] = True
    stage_fields: ClassVar[Mapping[str, str | None]] = {}

    def check(self, task: Task) -> None:
        """Refuse a task that cannot be done: ValueError with the key and the remedy. Called before anything starts."""

    def outputs(self, classes: int) -> int:
        """How many outputs a model has, the server's and the clients'; the default is one a class.

        With another number the classifier that a model was built with is replaced, and what its outputs say of the
        classes is the algorithm's business. ValueError, with the key and the remedy, for classes that it cannot tell
        apart. Called while the task is made.
        """
        return classes

    def check_server(self, task: Task) -> None:
        """Refuse what the server alone can see, such as a file that only it reads: ValueError with key and remedy.

        Called at the server before anything of the run is written.
        """

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
        """The global model, which is evaluated and saved; the default is the state's `x`."""
        model: Params = server.x
        return model

    def local_model(self, task: Task, x: Params, reply: Any) -> Params:
        """A client's model after its training from x, of its reply; by default what it has sent, the reply's `y`.

        For algorithms that go on with other algorithms' models. reply: has the reply's fields as attributes.
        """
        y: Params = reply.y
        return y

    def personal_model(self, me: Me, data: ClientData) -> Params:
        """A client's own model, at the client; an algorithm that defines it has personal models."""
        raise TypeError(f"{type(self).__name__} does not define personal_model(self, me, data)")

    def evaluate(self, server: Server, clients: Clients) -> Replies:
        """Let clients score a model as the section `eval` says; its bytes are booked under `evaluate`."""
        model = self.model(server) if self.scoring(server.task).model == "global" else None
        cohort = self.scored_clients(server, clients)
        return cohort.call(self.evaluate_client, model=model, fold={"scores": collect()}, phase="evaluate")

    def scored_clients(self, server: Server, clients: Clients) -> Cohort:
        """Who scores a model in this round, as the section `eval` says: none that lacks samples of the split.

        Of the clients that were not selected, `max(floor(eval.fraction * their number), 1)` are drawn without
        replacement from a stream of its own; where all were selected, it is all.
        """
        how = self.scoring(server.task)
        cohort = clients.selected() if how.clients == "selected" or how.model == "sent" else clients.all()
        assert how.split != "auto"
        ids = [c for c in cohort.ids if how.split == "global" or server.task.count(c, how.split)]
        if how.clients == "unselected":
            chosen = set(clients.selected().ids)
            left = [c for c in ids if c not in chosen]
            count = max(math.floor(how.fraction * len(left) + 1e-9), 1)  # as with clients.fraction
            order = torch.randperm(len(left), generator=generator(server.task.seed, "evaluate", server.round))
            ids = [left[i] for i in order[:count].tolist()] or ids
        return clients.only(ids)

    @on_client
    def evaluate_client(self, me: Me, data: ClientData, model: Weights | None) -> ClientScores:
        """Score the model that was sent for it, the personal one, or the one sent for training in this round."""
        how = self.scoring(data.task)
        if how.model == "personal":
            model = self.personal_model(me, data)
        elif how.model == "sent":
            model = data.sent
        if model is None:
            raise ValueError("eval.model: this client was sent no model in this round")
        assert how.split != "auto"
        scores = data.evaluate(model, how.split)
        return ClientScores.of(scores, how)

    def made_up(self, task: Task, client: int, method: str, field: str) -> torch.Tensor | None:
        """A reply field of a client in the size that it will have, where it follows from the task alone.

        For predictions (`--dry-run`), which know the size of a field that is folded with a shape or has an argument of
        its kind; of all others they say that it is not predictable, which is the default.
        """
        return None

    def summary(self, server: Server, books: Books) -> dict[str, float]:
        """Figures of the whole run, for `summary` of result.json; the default has none.

        Called once, when the run ends, also before its time if a round was committed. `server` is as after the last
        finished round; what is done to it changes nothing. NaN and infinity are written as null.
        """
        return {}

    def scoring(self, task: Task) -> Evaluation:
        """The section `eval` with every `auto` decided; ValueError for what cannot be."""
        return decide(task.evaluation, task, type(self))

    @property
    def stateful(self) -> bool:
        """Whether clients keep a state of their own."""
        return type(self).init_client is not Algorithm.init_client

    def client_methods(self) -> dict[str, Callable[..., Any]]:
        """The client halves by name, in the order that both ends of the wire number them by."""
        return dict(client_methods(self))


def decide(how: Evaluation, task: Task, algorithm: type[Algorithm]) -> Evaluation:
    """Decide every `auto` of the section `eval` for an algorithm and a task; ValueError for what cannot be."""
    name = algorithm.__name__
    server = algorithm.has_global_model and task.num_test > 0
    asked = ["clients"] if how.clients != "all" else []
    asked += ["split"] if how.split != "auto" and not how.own else []  # else it says on what clients score their own
    asked += ["model"] if how.model in ("personal", "sent") else []
    if how.where == "server" and asked:
        raise ValueError(f"eval.{asked[0]}: {getattr(how, asked[0])} is about scoring at clients; use eval.where: both")
    where = how.where
    if where == "auto":
        where = ("both" if asked else "server") if server else "clients"
    if where != "clients" and not algorithm.has_global_model:
        raise ValueError(f"eval.where: {where}, but {name} has no global model; use clients")
    if where != "clients" and not task.num_test:
        raise ValueError(f"eval.where: {where}, but with task.merged there is no global test set; use clients")
    personal = algorithm.personal_model is not Algorithm.personal_model
    model = how.model if how.model != "auto" else "personal" if personal else "global"
    if model == "personal" and not personal:
        raise ValueError(f"eval.model: personal, but clients of {name} have no models of their own; use global")
    if model == "global" and where != "server" and not algorithm.has_global_model:
        raise ValueError(f"eval.model: global, but {name} has no global model; use personal")
    if model == "global" and where != "server" and len(task.architectures) > 1:
        raise ValueError("eval.model: global, but clients.models gives clients other architectures; use where: server")
    if model == "sent" and how.clients == "unselected":
        raise ValueError("eval.model: sent, but clients that are not selected are sent no model; use global")
    split = how.split if how.split != "auto" else "test" if task.has_part("test") else "global"
    if how.own and split == "global":
        raise ValueError(
            f"eval.own: clients score what they train on a part of their own, and eval.split is {how.split}"
            f"{' (global)' if how.split == 'auto' else ''}; set task.split.test=0.2, or eval.split: train"
        )
    if where != "server" or how.own:
        if split == "global" and not task.num_test:
            raise ValueError(
                "eval: with task.merged there is no global test set; give clients one: task.split.test=0.25"
            )
        if split != "global" and not task.has_part(split):
            raise ValueError(f"eval.split: clients have no {split} part; set task.split.{split}, or use another split")
    return dataclasses.replace(how, where=where, split=split, model=model)


def client_methods(of: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods that are marked `@on_client`, by name, in alphabetical order."""
    for name in sorted(dir(type(of))):
        if getattr(getattr(type(of), name, None), "_fldist_on_client", False):
            yield name, getattr(of, name)
