"""What every rank of a run has built from the configuration: algorithm, selector, task, and the method table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fldist.algorithm import Algorithm, ClientScores, Stage
from fldist.clock import Clock, Measured
from fldist.data.task import Task
from fldist.devices import Fleet
from fldist.fold import Integers
from fldist.kinds import Field, Form, Kind, Scalar, Schema, call_schema, reply_fields, reply_schema, reply_type
from fldist.models.evaluate import Evaluation
from fldist.on_top import trains
from fldist.params import Layout
from fldist.runtime.membership import Faults
from fldist.runtime.stages import stages_of
from fldist.runtime.stops import Stop
from fldist.selection import Selector
from fldist.wire.codec import Expected
from fldist.wire.link import Limits

REPORT = Field("selector_report", Kind.REPORT, Form.TENSOR, optional=True, max_bytes=64)
"""What the runtime adds to every reply when the selector wants reports or devices are simulated, so that selectors
exchange the same: float64 [5], see `selection.ClientReport`."""
OWN = Field("own_scores", Kind.REPORT, Form.TENSOR, optional=True, max_bytes=1024)
"""What the runtime adds to the replies of clients that have trained, under `eval.own`: float64 [1 + 2 M], how many
samples of `eval.split` the client has, then the M metrics of its training and those of the trained model on these."""
ADDED = (REPORT, OWN)
"""Fields that no algorithm declares, so that none says how they are folded: they are collected."""
_TAKEN = frozenset({"clients", "missing", "seconds", "reports", *(field.name for field in ADDED)})
"""What replies have beside their fields: a field of such a name could not be read."""


_PROBE, _SELECTOR = "probe.", "selector."
"""How names of client halves begin that are not the algorithm's."""
Topology = Literal["star", "collective", "reduce"]
"""How ranks exchange what is large: two by two; all at once, by broadcast and gather; or by broadcast and a reduction
of what every host has folded of its own clients' replies."""


class Probed(NamedTuple):
    """What a client answers to a probe: see `selection.Probe`."""

    loss: Scalar
    epoch_s: Scalar


@dataclass(frozen=True)
class ClientMethod:
    """A client half with its wire number and both schemas.

    of: whose it is. A selector's touches no client's state, and what it trains draws from streams of its own; a `probe`
    is the beginning of an algorithm's: what a client does up to the end of its first local epoch.
    """

    number: int
    name: str
    run: Callable[..., Any]
    call: Schema
    reply: Schema
    reply_type: type[tuple[Any, ...]] | None
    of: Literal["algorithm", "selector", "probe"] = "algorithm"

    @property
    def of_algorithm(self) -> str:
        """Its name, or that of the algorithm's client half that it begins."""
        return self.name.removeprefix(_PROBE) if self.of == "probe" else self.name

    @property
    def phase(self) -> str:
        """The phase of a call that names none: `train` for `update`, else the method's name."""
        if self.of != "algorithm":
            return "select"
        return "train" if self.name == "update" else self.name


@dataclass
class Job:
    """One run as its ranks see it; equal at every rank."""

    algorithm: Algorithm
    selector: Selector
    task: Task
    seed: int
    rounds: int
    per_round: int
    name: str = "run"
    integers: Integers = "mean"
    share: bool = True
    checksum: bool = False
    topology: Topology = "star"
    limits: Limits = field(default_factory=Limits)
    round_deadline_s: float | None = None
    faults: Faults = field(default_factory=Faults)
    stop: Stop = field(default_factory=Stop)
    clock: Clock = field(default_factory=Measured)
    devices: Fleet | None = None
    stages: Sequence[str] | None = None
    methods: dict[str, ClientMethod] = field(init=False)
    evaluation: Evaluation = field(init=False)

    def __post_init__(self) -> None:
        self.algorithm.check(self.task)
        self.plan()
        self.evaluation = self.algorithm.scoring(self.task)
        who = type(self.algorithm).__name__
        if self.task.own_init and self.evaluation.model != "personal" and self.algorithm.has_global_model:
            self.task.notes.append(
                f"clients.init: own changes nothing under {who}: clients begin with what they are sent"
            )
        if len(self.task.architectures) > 1 and not self.algorithm.heterogeneous:
            raise ValueError(
                f"clients.models: {who} needs the model of task.model at all clients; "
                "remove clients.models, or use an algorithm for clients with different models"
            )
        if self.selector.wants_reports and self.task.num_outputs != self.task.num_classes:
            raise ValueError(
                f"selection.name: this selector goes by the cross-entropy of a model's outputs, and {who} gives "
                f"{self.task.num_outputs} for {self.task.num_classes} classes; use another selector, such as random"
            )
        self.selector.check(self.task)
        if self.selector.wants_accuracy and self.evaluation.every != 1:
            raise ValueError(
                f"eval.every: {self.evaluation.every}, but this selector goes by every round's accuracy; use 1"
            )
        if self.topology == "reduce" and (self.selector.probes or self.selector.wants_models):
            what = "has clients begin their training" if self.selector.probes else "looks at every client's model"
            raise ValueError(f"topology: reduce, but this selector {what}, and hosts send sums; use star")
        self.methods = {}
        own = self.algorithm.client_methods()
        self._training = {name for name, method in own.items() if reply_type(method) is not ClientScores}
        if self.selector.wants_models and not any(trains(method) for method in own.values()):
            raise ValueError(
                f"selection.name: this selector looks at the models that clients have trained, and clients of {who} do "
                "not send any; use another selector, such as random"
            )
        for number, (name, method) in enumerate(own.items(), start=1):
            reply = reply_schema(method)
            for taken in _TAKEN & {f.name for f in reply.fields}:
                raise ValueError(
                    f"{who}.{name}: the replies have a {taken!r} of their own; call the field something else"
                )
            _check_masks(f"{who}.{name}", call_schema(method), reply)
            added = [f for f, wanted in ((REPORT, self.reports(name)), (OWN, self.scores_own(name))) if wanted]
            reply = Schema((*reply.fields, *added))
            self.methods[name] = ClientMethod(number, name, method, call_schema(method), reply, reply_type(method))
        training = [m for n, m in self.methods.items() if n in self._training]
        if self.evaluation.model == "sent" and not any(
            (f.kind, f.form) == (Kind.WEIGHTS, Form.PARAMS) for m in training for f in m.call.fields
        ):
            raise ValueError(f"eval.model: sent, but {who} sends its clients no model; use personal or global")
        if self.evaluation.own and not training:
            raise ValueError(f"eval.own: no client of {who} trains a model; use eval.own: false")
        lacking = []
        if (self.evaluation.where != "server" or self.evaluation.own) and self.evaluation.split != "global":
            split = self.evaluation.split
            assert split != "auto"
            lacking = [c for c in range(self.task.num_clients) if self.task.sizes[c] and not self.task.count(c, split)]
        if lacking and len(lacking) == sum(n > 0 for n in self.task.sizes):
            raise ValueError(
                f"eval.split: no client has a {self.evaluation.split} part; raise task.split, or use "
                f"{'train' if self.evaluation.own else 'global'}"
            )
        if lacking:
            self.task.notes.append(f"{len(lacking)} clients have no {self.evaluation.split} part and are not scored")
        self._add_selectors()
        self._by_number = {m.number: m for m in self.methods.values()}

    def _add_selectors(self) -> None:
        """Add the selector's client halves, and the probes of the algorithm's where it wants them."""

        def add(name: str, method: Callable[..., Any], reply: type[tuple[Any, ...]] | None, of: Any) -> None:
            schema = reply_schema(method) if reply is None else reply_fields(reply)
            number = len(self.methods) + 1
            made = reply_type(method) if reply is None else reply
            if self.reports(name):
                schema = Schema((*schema.fields, REPORT))
            self.methods[name] = ClientMethod(number, name, method, call_schema(method), schema, made, of)

        if self.selector.probes:
            for name in sorted(self._training):
                add(f"{_PROBE}{name}", self.methods[name].run, Probed, "probe")
        for name, method in self.selector.client_methods().items():
            add(f"{_SELECTOR}{name}", method, None, "selector")

    def spec_of(self, method: Callable[..., Any]) -> ClientMethod:
        """A client half of the algorithm or of the selector, by its method; ValueError where it is neither's."""
        name, owner = getattr(method, "__name__", repr(method)), getattr(method, "__self__", None)
        if owner is self.algorithm and name in self.methods:
            return self.methods[name]
        for spec in self.methods.values():
            if spec.of == "selector" and spec.run == method:
                return spec
        raise ValueError(f"{name} is not a client method of this algorithm; mark it with @on_client")

    def plan(self) -> list[Stage]:
        """The run's stages: all that the algorithm has, without rounds where they are not chosen."""
        return stages_of(self.algorithm, self.rounds, self.stages)

    def method(self, number: int) -> ClientMethod | None:
        """The client method with this wire number."""
        return self._by_number.get(number)

    def reports(self, method: str) -> bool:
        """Whether replies of a client method carry a report: for the selector, or for the simulated clock.

        A selector's own methods report for the clock alone.
        """
        if method in self._training:
            return self.selector.wants_reports or self.devices is not None
        return method.startswith(_SELECTOR) and self.devices is not None

    def scores_own(self, method: str) -> bool:
        """Whether replies of a client method carry scores of what it has trained."""
        return self.evaluation.own and method in self._training

    def layout(self, client: int) -> Layout:
        """The layout of a client's model."""
        return self.task.layout_of(client)

    def calls(self) -> Expected:
        """What a host may receive."""
        world = self.topology != "star"
        schema = lambda n: m.call if (m := self.method(n)) else None  # noqa: E731
        return Expected(schema, self.layout, self.task.num_clients, once=True, world=world)

    def replies(self) -> Expected:
        """What the server may receive."""
        world, folded = self.topology == "collective", self.topology == "reduce"
        schema = lambda n: m.reply if (m := self.method(n)) else None  # noqa: E731
        return Expected(schema, self.layout, self.task.num_clients, world=world, folded=folded)


def _check_masks(where: str, call: Schema, reply: Schema) -> None:
    """Refuse masked models whose mask is no argument: ValueError."""
    for spec in (*call.fields, *reply.fields):
        mask = None if spec.sparse is None else spec.sparse.mask
        given = [f for f in call.fields if f.name == mask and (f.kind, f.form) == (Kind.MASKS, Form.TENSOR)]
        if mask is not None and not given:
            raise ValueError(f"{where}: {spec.name!r} is a masked model, which needs an argument `{mask}: Masks`")
