"""What the server half of an algorithm sees of a run: its state, its data, all clients. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fldist.algorithm import State
from fldist.data.client_data import PooledData
from fldist.runtime.choice import KEY, Choice
from fldist.runtime.cohort import CallsClients, Cohort
from fldist.runtime.device import CPU
from fldist.runtime.job import Job
from fldist.runtime.pictures import grid
from fldist.runtime.state import check_value, moved
from fldist.runtime.tables import csv_text
from fldist.seeding import Streams, generator


class ServerView:
    """The server half's view of a run; see `fldist.algorithm.Server`. Its state is on the CPU, whatever is set."""

    _RESERVED = frozenset(
        {"task", "data", "clock", "round", "rng", "log", "images", "table", "warn", "state", "predicting", KEY}
    )

    def __init__(self, job: Job, state: State, tell: Callable[[str], None] = lambda text: None) -> None:
        set_ = object.__setattr__
        set_(self, "_tell", tell)
        set_(self, "_told", set())  # in this round
        set_(self, "round", 0)
        set_(self, "task", job.task)
        set_(self, "clock", job.clock)
        set_(self, "state", state)
        set_(self, "logged", {})
        set_(self, "pictures", {})
        set_(self, "tables", {})
        set_(self, "predicting", False)
        set_(self, "data", PooledData(job.task, Streams(job.seed, 0, -1), clock=job.clock))
        self.enter(0, job.seed)

    def enter(self, number: int, seed: int) -> None:
        """Begin a round, or do it again: its random stream, an empty log."""
        set_ = object.__setattr__
        if number != self.round:
            self._told.clear()
        set_(self, "round", number)
        set_(self, "rng", generator(seed, "server", number))
        self.data.enter(Streams(seed, number, -1))
        self.logged.clear()
        self.pictures.clear()
        self.tables.clear()

    def replace(self, state: State) -> None:
        """Put another state in place."""
        object.__setattr__(self, "state", state)

    def log(self, **values: float) -> None:
        """Write numbers into this round's line of rounds.jsonl."""
        self.logged.update({k: float(v) for k, v in values.items()})

    def images(self, **pictures: Tensor) -> None:
        """Keep pictures of this round; see `fldist.algorithm.Server`."""
        self.pictures.update({name: grid(name, pixels) for name, pixels in pictures.items()})

    def table(self, **tables: Sequence[Mapping[str, Any]]) -> None:
        """Keep small tables of this round; see `fldist.algorithm.Server`."""
        self.tables.update({name: csv_text(name, rows) for name, rows in tables.items()})

    def warn(self, text: str) -> None:
        """Tell the user; see `fldist.algorithm.Server`."""
        if text not in self._told:  # a round that is done again says the same again
            self._told.add(text)
            self._tell(f"round {self.round}: {text}" if self.round else f"setup: {text}")

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "state"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._RESERVED:
            raise AttributeError(f"server.{name} is taken; choose another name for your state")
        check_value(f"server.{name}", value)
        setattr(self.state, name, moved(value, CPU))


class ClientsView:
    """All clients of a run; see `fldist.algorithm.Clients`. choice: the selector's business."""

    def __init__(self, job: Job, caller: CallsClients) -> None:
        self.num = job.task.num_clients
        self.choice = Choice(job, caller, self)
        self._job = job
        self._caller = caller
        self._able = [c for c in range(self.num) if job.task.sizes[c] > 0]

    def enter(self, view: ServerView, attempt: int = 0) -> None:
        """Begin the view's round, or do it again: nobody is selected yet."""
        self.choice.enter(view, attempt)

    def selected(self) -> Cohort:
        """The selector's choice for this round, the same whenever it is asked for."""
        return self.choice.selected()

    def all(self) -> Cohort:
        """Every client that holds samples."""
        return Cohort(self._caller, self._able)

    def only(self, ids: Sequence[int]) -> Cohort:
        """The named clients."""
        unknown = [c for c in ids if not 0 <= c < self.num]
        if unknown:
            raise ValueError(f"there is no client {unknown[0]}; clients are 0 to {self.num - 1}")
        return Cohort(self._caller, sorted(set(ids)))

    def by(self, architecture: int) -> Cohort:
        """The clients that hold samples and a model of this architecture."""
        task = self._job.task
        wanted = task.architectures[architecture]
        return Cohort(self._caller, [c for c in self._able if task.architecture(c) is wanted])
