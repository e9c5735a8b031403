"""An algorithm on top of another: rounds of the one, its base, in which the other sees the clients' models as they are
after their training.

`OnTop` runs the base's rounds as they are, client halves included, under its own name: what travels is the base's, byte
for byte. What is made of the models is the business of `algorithms/`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator

from fldist import resolve
from fldist.algorithm import Algorithm, Books, Clients, Cohort, Me, Replies, Server
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Fold, Mean, MeanAndEach
from fldist.kinds import Form, Kind, Once, Schema, call_schema, reply_schema
from fldist.params import Params


def named(given: Any) -> Algorithm:
    """The algorithm that `scaffold` or `{name: fedprox, mu: 0.01}` means; one that is made is returned.

    Made for pydantic's BeforeValidator: what is wrong is a ValueError whose location is the field.
    """
    if isinstance(given, Algorithm):
        return given
    wanted = "the name of an algorithm such as scaffold, or {name: fedprox, mu: 0.01}"
    return resolve.component(*resolve.nested("fldist.algorithms", Algorithm, given, wanted))  # type: ignore[no-any-return]


Base = Annotated[Algorithm, BeforeValidator(named)]


class Watched:
    """All clients, as the base sees them in a round.

    keeps: gather in `models` what the clients have trained; once: the name and version under which the model that is
    sent is given, so that a later call need not send it again. members: who has trained.
    """

    def __init__(self, on_top: OnTop, server: Server, clients: Clients, keeps: bool, once: tuple[str, int] | None):
        self.on_top, self.server, self.keeps, self.once = on_top, server, keeps, once
        self.models: dict[int, Params] = {}
        self.members: list[int] = []
        self.num = clients.num
        self._clients = clients

    def selected(self) -> Cohort:
        """The selector's choice for this round."""
        return _Cohort(self._clients.selected(), self)

    def all(self) -> Cohort:
        """Every client that holds samples."""
        return _Cohort(self._clients.all(), self)

    def only(self, ids: Sequence[int]) -> Cohort:
        """The named clients."""
        return _Cohort(self._clients.only(ids), self)

    def by(self, architecture: int) -> Cohort:
        """The clients with a model of this architecture."""
        return _Cohort(self._clients.by(architecture), self)


class _Cohort:
    """Clients whose answers to the base's calls are looked at on their way."""

    def __init__(self, cohort: Cohort, watch: Watched) -> None:
        self._cohort, self._watch = cohort, watch

    @property
    def ids(self) -> Sequence[int]:
        return self._cohort.ids

    def call(
        self,
        method: Callable[..., Any],
        *,
        fold: Mapping[str, Fold] | None = None,
        phase: str | None = None,
        **arguments: Any,
    ) -> Replies:
        """Call a client half of the base under the name that it has in `OnTop.client_methods`."""
        watch, on_top = self._watch, self._watch.on_top
        mine = on_top.client_methods()[method.__name__]
        if not trains(mine):
            return self._cohort.call(mine, fold=fold, phase=phase, **arguments)
        x, mean = arguments["x"], dict(fold or {}).get("y")
        if not isinstance(x, Params) or not isinstance(mean, Mean):
            raise ValueError("algorithm.base: it does not send one model to all and average theirs; use fedavg, ...")
        ys: dict[int, Params] = {}
        if watch.keeps:
            fold = {**(fold or {}), "y": MeanAndEach.of(mean, ys)}
        if watch.once is not None:
            name, version = watch.once
            arguments["x"] = Once(x, version, name=name)
        got = self._cohort.call(mine, fold=fold, phase=phase, **arguments)
        if watch.keeps and watch.server.predicting:
            ys = dict.fromkeys(got.clients, x)
        watch.models.update(models_of(on_top.base, watch.server.task, mine, x, ys, got))
        watch.members = sorted({*watch.members, *got.clients})
        return got


@dataclass(frozen=True)
class OnTop(Algorithm):
    """Base of such algorithms. A subclass has states that hold its base's (`init_server`, `init_client`)."""

    base: Base = field(default_factory=functools.partial(named, "fedavg"))  # an algorithm: a name, or with its fields

    def check(self, task: Task) -> None:
        """Refuse a base whose clients do not send whole models that they have trained from one that they were sent."""
        base, who = self.base, type(self.base).__name__
        base.check(task)
        training = any(trains(method) for method in base.client_methods().values())
        if not training or not base.has_global_model or base.heterogeneous or isinstance(base, OnTop):
            raise ValueError(
                f"algorithm.base: clients of {who} do not send the server whole models y that they have trained from "
                "its x; use fedavg, fedprox, scaffold, fednova or moon"
            )
        if type(base).setup is not Algorithm.setup:
            raise ValueError(f"algorithm.base: {who} has a setup of its own, and a base has none; use another")
        own = super().client_methods().keys() - Algorithm().client_methods().keys()
        taken = sorted(own & base.client_methods().keys())
        if taken:
            raise ValueError(f"algorithm.base: {who} has a client method {taken[0]!r}, which is taken; rename it")

    def check_server(self, task: Task) -> None:
        """As the base."""
        self.base.check_server(task)

    def summary(self, server: Server, books: Books) -> dict[str, float]:
        """The base's."""
        return self.base.summary(server, books)

    def local_model(self, task: Task, x: Params, reply: Any) -> Params:
        """The base's."""
        return self.base.local_model(task, x, reply)

    def client_methods(self) -> dict[str, Callable[..., Any]]:
        """This algorithm's own client halves, and the base's in its name."""
        own = super().client_methods()
        return own | {n: self._of_base(m) for n, m in self.base.client_methods().items() if n not in own}

    def _of_base(self, method: Any) -> Callable[..., Any]:
        """A client half of the base, between `before_training` and `after_training` if it is one that trains."""
        half, training = method.__func__, trains(method)

        @functools.wraps(half)
        def run(this: OnTop, me: Me, data: ClientData, **arguments: Any) -> Any:
            if training:
                this.before_training(me, data)
            reply = half(this.base, me, data, **arguments)
            if training:
                this.after_training(me, data, this.base.local_model(data.task, arguments["x"], reply))
            return reply

        return types.MethodType(run, self)

    def before_training(self, me: Me, data: ClientData) -> None:
        """At a client, before it trains as the base has it."""

    def after_training(self, me: Me, data: ClientData, model: Params) -> None:
        """At a client, after it has; model: what it has trained."""

    def train(
        self, server: Server, clients: Clients, *, keeps: bool = True, once: tuple[str, int] | None = None
    ) -> Watched:
        """A round of the base; keeps, once: see `Watched`."""
        watched = Watched(self, server, clients, keeps, once)
        self.base.round(server, watched)
        return watched


def models_of(
    algorithm: Algorithm, task: Task, method: Callable[..., Any], x: Params, ys: Mapping[int, Params], got: Replies
) -> dict[int, Params]:
    """By client: the model that it has trained from x, of its reply to a client half that trains.

    ys: what the mean of the replies' y was of; got: the replies.
    """
    numbers = [f.name for f in reply_schema(method).fields if f.kind is Kind.SCALARS]
    models = {}
    for k, y in ys.items():
        reply = types.SimpleNamespace(y=y, **{name: getattr(got, name)[k] for name in numbers})
        models[k] = algorithm.local_model(task, x, reply)
    return models


def trains(method: Callable[..., Any]) -> bool:
    """Whether a client half is sent a whole model x and answers with one, y."""

    def whole(schema: Schema, name: str) -> bool:
        wanted = (name, Kind.WEIGHTS, Form.PARAMS, None)
        return any((f.name, f.kind, f.form, f.sparse) == wanted for f in schema.fields)

    return whole(call_schema(method), "x") and whole(reply_schema(method), "y")
