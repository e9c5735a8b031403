"""Who takes part in a round: the run's selector at the server, what it keeps, what it is told, and the cohort of those
whom it has chosen. How it chooses is its own business (`fldist/selection/`).

What a selector keeps is in the server's state, under `selector`: committed, put back, checkpointed and hashed with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fldist.algorithm import Algorithm, Clients, State
from fldist.devices import Cost
from fldist.fold import Fold, Mean, MeanAndEach
from fldist.kinds import Once
from fldist.on_top import models_of, trains
from fldist.params import Params
from fldist.runtime.cohort import CallsClients, Cohort, Replies
from fldist.runtime.device import CPU
from fldist.runtime.folding import plain
from fldist.runtime.job import ClientMethod, Job
from fldist.runtime.state import Watch, check_value, moved
from fldist.seeding import forked, generator
from fldist.selection import Candidates, ClientReport, Outcome, Probe, Selector

if TYPE_CHECKING:
    from fldist.runtime.views import ServerView

KEY = "selector"
"""The name of the selector's state in the server's."""


class Choice:
    """The run's selector at the server. clients: all clients, as it may call them."""

    def __init__(self, job: Job, caller: CallsClients, clients: Clients) -> None:
        self._job = job
        self._caller = caller
        self._clients = clients
        self._able = [c for c in range(job.task.num_clients) if job.task.sizes[c] > 0]
        self._view: ServerView | None = None
        self._chosen: Selected | None = None
        self.seconds = 0.0
        """What the selector took in this round at the server, its calls left out."""
        self.version = 0
        """Of what a probe brings to clients: of this round and attempt alone."""

    def enter(self, view: ServerView, attempt: int) -> None:
        """Begin a round, or do it again: nobody is selected yet."""
        self._view = view
        self.version = (view.round << 16) + attempt
        self._chosen = None
        self.seconds = 0.0

    def begin(self, view: ServerView) -> None:
        """Give the server's state, before round 1, what the selector keeps."""
        assert KEY not in view.state.values, f"server.{KEY} is taken; choose another name for your state"
        self._view = view
        with forked(self._job.seed, "init_selector"):
            self._put(self._job.selector.init(self._candidates("init_selector")))

    def setup(self, view: ServerView) -> None:
        """What the selector does once, after the algorithm's setup."""
        self._view = view
        if type(self._job.selector).setup is not Selector.setup:
            self._do(self._job.selector.setup, "setup_selector")

    def selected(self) -> Selected:
        """The selector's choice for this round, the same whenever it is asked for."""
        if self._chosen is None:
            ids = self._checked(self._do(self._job.selector.select, "select"), self._able, "selects")
            self._chosen = Selected(self, self._caller, ids)
        return self._chosen

    def keep(self, probes: Mapping[int, Probe]) -> list[int]:
        """Of the clients that were probed and have answered, those that go on."""
        ids = self._do(lambda state, candidates: self._job.selector.keep(state, candidates, probes), "keep")
        return self._checked(ids, list(probes), "keeps")

    def digest(self, models: Mapping[int, Params]) -> dict[int, Tensor]:
        """What the selector keeps of models until the round's end."""
        state, selector = self._state(), self._job.selector
        began = time.monotonic()
        digests = {k: moved(selector.digest(state, model), CPU) for k, model in models.items()}
        self.seconds += time.monotonic() - began
        return digests

    def observe(
        self,
        replied: Iterable[int],
        reports: Mapping[int, ClientReport],
        accuracy: float | None,
        simulated: Cost | None,
    ) -> None:
        """Let the selector learn from the round, if it has chosen its clients. replied: whose replies were used."""
        chosen = self._chosen
        if chosen is None or type(self._job.selector).observe is Selector.observe:
            return
        used = tuple(sorted(set(replied) & set(chosen.members)))
        told = {c: r for c, r in reports.items() if c in used}
        models = {c: m for c, m in chosen.models.items() if c in used}
        number = self._number
        seconds, joules = simulated if simulated is not None else (None, None)
        outcome = Outcome(number, tuple(chosen.members), used, told, accuracy, seconds, joules, models)

        def learn(state: State, candidates: Candidates) -> None:
            self._job.selector.observe(state, candidates, outcome)

        watch = Watch()
        watch.add("the selector's state", self._state())
        with forked(self._job.seed, "observe", number):
            self._do(learn, "observe")
        if changed := watch.changed():
            raise ValueError(f"{changed} was changed in place in round {number}; set it to a new value instead")

    @property
    def _number(self) -> int:
        assert self._view is not None
        number: int = self._view.round
        return number

    @property
    def algorithm(self) -> Algorithm:
        """The run's algorithm."""
        return self._job.algorithm

    def spec_of(self, method: Callable[..., Any]) -> ClientMethod:
        """See `Job.spec_of`."""
        return self._job.spec_of(method)

    def probe_of(self, method: Callable[..., Any]) -> ClientMethod | None:
        """What begins a client half, where the selector probes and it is one that may train."""
        return self._job.methods.get(f"probe.{method.__name__}")

    @property
    def probes(self) -> bool:
        """Whether the selector has clients begin their training before it chooses among them."""
        return self._job.selector.probes

    @property
    def wants_models(self) -> bool:
        """Whether the selector looks at the clients' models."""
        return self._job.selector.wants_models

    def models_of(self, method: Callable[..., Any], x: Params, ys: Mapping[int, Params], got: Any) -> dict[int, Params]:
        """See `on_top.models_of`."""
        return models_of(self._job.algorithm, self._job.task, method, x, ys, got)

    @property
    def predicting(self) -> bool:
        """Whether replies are made up."""
        assert self._view is not None
        return bool(self._view.predicting)

    def _state(self) -> State:
        """A copy of what the selector keeps, to be changed."""
        assert self._view is not None
        kept = self._view.state.values.get(KEY)
        return kept.copy() if isinstance(kept, State) else State()

    def _put(self, state: State) -> None:
        """Keep a state from here on, in a new one of the server's: the one there is may be committed."""
        assert self._view is not None
        for name, value in state.values.items():
            check_value(f"the selector's {name}", value)
        if state.values:
            after = self._view.state.copy()
            after.values[KEY] = moved(state, CPU)
            self._view.replace(after)

    def _do(self, step: Callable[[State, Candidates], Any], stream: str) -> Any:
        """Let the selector do something with its state, and keep what it makes of it."""
        state = self._state()
        called = self._caller.called_s
        began = time.monotonic()
        result = step(state, self._candidates(stream))
        self.seconds += max(0.0, time.monotonic() - began - (self._caller.called_s - called))
        self._put(state)
        return result

    def _candidates(self, stream: str) -> Candidates:
        job, view = self._job, self._view
        assert view is not None
        task = job.task
        services: dict[str, Any] = {}
        if job.devices is not None:
            services["seconds"], services["joules"] = job.devices.profile(task.local.epochs)
        if job.algorithm.has_global_model:
            services["model"] = lambda: job.algorithm.model(view)
        return Candidates(
            self._able,
            [task.sizes[c] for c in self._able],
            min(job.per_round, len(self._able)),
            self._number,
            MappingProxyType(self._caller.reports),
            rng=generator(job.seed, stream, self._number),
            num_clients=task.num_clients,
            task=task,
            clients=self._clients,
            log=view.log,
            warn=view.warn,
            predicting=bool(view.predicting),
            **services,
        )

    def _checked(self, ids: Any, among: Sequence[int], does: str) -> list[int]:
        """The clients that a selector names; ValueError where they are none, or are not to be had."""
        chosen = sorted(set(ids))
        strange = sorted(set(chosen).difference(among))
        who = type(self._job.selector).__name__
        if strange:
            raise ValueError(f"selection.name: {who} {does} client {strange[0]}, which it is not offered")
        if not chosen:
            raise ValueError(f"selection.name: {who} {does} nobody in round {self._number}")
        return chosen


class Selected(Cohort):
    """The clients of a round. Where the selector probes, who they are is seen in the first call that trains.

    members: as far as it is known; models: by client, what the selector keeps of its model.
    """

    def __init__(self, choice: Choice, caller: CallsClients, ids: Sequence[int]) -> None:
        super().__init__(caller, ids)
        self.members = list(ids)
        self.models: dict[int, Tensor] = {}
        self._choice = choice
        self._open = choice.probes

    @property
    def ids(self) -> list[int]:
        """The clients, ascending; ValueError while it is open who they are."""
        if self._open:
            who = type(self._choice.algorithm).__name__
            raise ValueError(
                f"selection.name: this selector decides in the first call of a round, and {who} asks before it who is "
                "selected; use a selector that does not probe, such as random"
            )
        return self.members

    @ids.setter
    def ids(self, ids: Sequence[int]) -> None:
        self.members = list(ids)

    def call(
        self,
        method: Callable[..., Any],
        *,
        fold: Mapping[str, Fold] | None = None,
        phase: str | None = None,
        **arguments: Any,
    ) -> Replies:
        """See `fldist.algorithm.Cohort.call`."""
        if self._open:
            arguments = self._probe(method, arguments)
        x, mean = plain(arguments.get("x")), dict(fold or {}).get("y")
        watched = self._choice.wants_models and trains(method) and isinstance(mean, Mean) and isinstance(x, Params)
        if not watched:
            return super().call(method, fold=fold, phase=phase, **arguments)
        assert isinstance(mean, Mean) and isinstance(x, Params)
        ys: dict[int, Params] = {}
        noted = mean if isinstance(mean, MeanAndEach) else MeanAndEach.of(mean, ys)
        got = super().call(method, fold={**(fold or {}), "y": noted}, phase=phase, **arguments)
        given = dict.fromkeys(got.clients, x) if self._choice.predicting else noted.into
        self.models.update(self._choice.digest(self._choice.models_of(method, x, given, got)))
        return got

    def _probe(self, method: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
        """Have the clients train one epoch, and find out who goes on; these hold what they were sent.

        Returns the arguments as they are to be given from here on.
        """
        choice = self._choice
        spec = choice.probe_of(method)
        if spec is None:
            raise ValueError(
                f"selection.name: this selector probes clients in the first call of a round, and {method.__name__} of "
                f"{type(choice.algorithm).__name__} trains none; use another selector, such as random"
            )
        version = choice.version
        held = {
            name: Once(value, version, name=f"probe.{name}") if isinstance(value, Params | Tensor | dict) else value
            for name, value in arguments.items()
        }
        got = self._caller.call(self.members, spec, {}, None, held)
        self.members = choice.keep({c: Probe(got.loss[c], got.epoch_s[c]) for c in got.clients})
        self._open = False
        return held
