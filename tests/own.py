"""Algorithms of tests' own: slow, failing, lying clients, outside the package as a user's would be."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fldist.algorithm import Algorithm, Clients, Me, Server, Stage, State, on_client
from fldist.algorithms.scaffold import Scaffold
from fldist.algorithms.scaffold import Update as ScaffoldUpdate
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Collect, Mean, Sum, collect
from fldist.kinds import (
    Factors,
    Kind,
    Logits,
    MaskedWeights,
    Masks,
    MaxBytes,
    Once,
    Scalar,
    SparseWeights,
    Variates,
    Weights,
)
from fldist.models.train import Order, train
from fldist.params import Params
from fldist.seeding import generator
from fldist.selection import Candidates, Selector
from fldist.sparse import Choice, Kept, pack, unpack


class Update(NamedTuple):
    y: Weights
    n: Scalar


@dataclass(frozen=True)
class Base(Algorithm):
    """FedAvg that adds 1 to the model instead of training it."""

    def init_server(self, task: Task) -> State:
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        server.x = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")}).y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        y = x.clone()
        y.floats += 1.0
        return Update(y, data.n)


@dataclass(frozen=True)
class Slow(Base):
    """Clients take their time, one perhaps a time of its own; `flag` is a file that each makes when it begins."""

    seconds: float = 0.2
    flag: str = ""
    slow_client: int = -1
    slow_seconds: float = 0.0

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        if self.flag:
            Path(f"{self.flag}-{data.client}").write_text(str(os.getpid()))
        time.sleep(self.slow_seconds if data.client == self.slow_client else self.seconds)
        return Base.update(self, me, data, x)


@dataclass(frozen=True)
class NanFrom(Base):
    """One client sends NaN in every round."""

    client: int = 2

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        got = Base.update(self, me, data, x)
        if data.client == self.client:
            got.y.floats[-1] = float("nan")
        return got


@dataclass(frozen=True)
class Raises(Base):
    """Some clients raise."""

    clients: tuple[int, ...] = (1,)

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        if data.client in self.clients:
            raise ZeroDivisionError(f"client {data.client} divides by zero")
        return Base.update(self, me, data, x)


@dataclass(frozen=True)
class Mutates(Base):
    """Clients change the model that was sent to them."""

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        x.floats.add_(1.0)
        return Update(x, data.n)


@dataclass(frozen=True)
class MutatesServer(Base):
    """The server half changes its own state in place."""

    def round(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x.floats.copy_(got.y.floats)


class Counted(NamedTuple):
    y: Weights
    n: Scalar
    calls: Scalar


@dataclass(frozen=True)
class Counts(Base):
    """Clients count their committed rounds; client `bad` sends NaN in round `bad_round`."""

    bad: int = 2
    bad_round: int = 2
    slow: float = 0.0

    def init_client(self, task: Task, client: int) -> State:
        return State(calls=0, round=0)

    def round(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(
            self.count, x=server.x, round=server.round, fold={"y": Mean(by="n"), "calls": collect()}
        )
        server.x = got.y
        server.counted = dict(got.calls)

    @on_client
    def count(self, me: Me, data: ClientData, x: Weights, round: Scalar) -> Counted:
        time.sleep(self.slow)
        me.calls = me.calls + 1
        y = x.clone()
        if data.client == self.bad and round == self.bad_round:
            y.floats[0] = float("nan")
        return Counted(y, data.n, me.calls)


class Nothing(NamedTuple):
    n: Scalar


@dataclass(frozen=True)
class TwoCalls(Base):
    """Two calls a round: scratch and staged state of the first are seen by the second."""

    def init_client(self, task: Task, client: int) -> State:
        return State(seen=0)

    def round(self, server: Server, clients: Clients) -> None:
        chosen = clients.selected()
        chosen.call(self.first, round=server.round)
        got = chosen.call(self.second, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y
        server.sums = dict(got.total)

    @on_client
    def first(self, me: Me, data: ClientData, round: Scalar) -> Nothing:
        me.scratch.noise = torch.rand(3)
        me.seen = me.seen + int(round)
        return Nothing(data.n)

    @on_client
    def second(self, me: Me, data: ClientData, x: Weights) -> Totals:
        me.seen = me.seen + 100
        return Totals(x + x.zeros_like(), data.n, me.seen + float(me.scratch.noise.sum()))


class Totals(NamedTuple):
    y: Weights
    n: Scalar
    total: Scalar


class Zeros(NamedTuple):
    d: Variates


@dataclass(frozen=True)
class Nobody(Base):
    """A call whose replies are all refused."""

    def round(self, server: Server, clients: Clients) -> None:
        server.x = server.x + server.x
        clients.selected().call(self.broken, v=server.x.trainable, fold={"d": Sum()})

    @on_client
    def broken(self, me: Me, data: ClientData, v: Variates) -> Zeros:
        return Zeros(v * float("inf"))


@dataclass(frozen=True)
class TrainsBetween(Base):
    """The server's half holds a network open while clients train theirs, and then trains it."""

    def round(self, server: Server, clients: Clients) -> None:
        """Open, call, go on."""
        task = server.task
        x = torch.cat([task.rows(c)[0] for c in range(2)])
        y = torch.cat([task.rows(c)[1] for c in range(2)])
        with task.network(server.x) as network:
            optimizer = torch.optim.SGD(network.weights, lr=0.1)
            order = Order(len(y), 16, server.rng)

            def loss(rows: Tensor) -> Tensor:
                value: Tensor = cross_entropy(network.module(x[rows]), y[rows])
                return value

            progress = train([network], loss, [optimizer], epochs=1, order=order)
            got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
            train([network], loss, [optimizer], epochs=2, order=order, resume_from=progress)
            server.x = 0.5 * network.params.restricted(task.travel) + 0.5 * got.y


@dataclass(frozen=True)
class DroppedScaffold(Scaffold):
    """SCAFFOLD whose clients fail or send NaN, after they have written their state, in `share` of all cases."""

    share: float = 0.35
    seconds: float = 0.0

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights, c: Variates) -> ScaffoldUpdate:
        got = Scaffold.update(self, me, data, x, c)
        time.sleep(self.seconds)
        chance = float(torch.rand(1, generator=generator(7, "drop", data.streams.round, data.client)))
        if chance < self.share / 2:
            raise RuntimeError("gone")
        if chance < self.share:
            got.dc.floats[0] = float("nan")
        return got


@dataclass(frozen=True)
class Twice(Base):
    """FedAvg that lets its clients train twice a round."""

    def round(self, server: Server, clients: Clients) -> None:
        for _ in range(2):
            server.x = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")}).y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        return Update(data.train(x).params, data.n)


@dataclass(frozen=True)
class ByReports(Selector):
    """An order that any change of any report changes; clients without one come first."""

    wants_reports: ClassVar[bool] = True

    def select(self, state: State, candidates: Candidates) -> list[int]:
        def key(client: int) -> tuple[int, int]:
            report = candidates.reports.get(client)
            return (int(report.loss * 1e6) % 97 if report is not None else -1, client)

        return sorted(sorted(candidates.ids, key=key)[: candidates.count])


@dataclass(frozen=True)
class Masked(Base):
    """Clients get a mask that changes every `every` rounds, and add it to the model."""

    every: int = 3
    spoils: bool = False
    size: int = 2000

    def round(self, server: Server, clients: Clients) -> None:
        version = (server.round - 1) // self.every
        mask = torch.full((self.size,), version + 1, dtype=torch.int32)
        got = clients.selected().call(
            self.masked, x=server.x, mask=Once(mask, version), other=Once(version + 0.5, version),
            fold={"y": Mean(by="n")},
        )  # fmt: skip
        server.x = got.y

    @on_client
    def masked(self, me: Me, data: ClientData, x: Weights, mask: Masks, other: Scalar) -> Update:
        assert mask.shape == (self.size,)
        assert len(mask.unique()) == 1
        if self.spoils:
            mask.add_(1)
        y = x.clone()
        y.floats += float(mask[0]) * other
        return Update(y, data.n)


@dataclass(frozen=True)
class MaskedTwice(Masked):
    """The same in two calls a round."""

    def round(self, server: Server, clients: Clients) -> None:
        for _ in range(2):
            Masked.round(self, server, clients)


@dataclass(frozen=True)
class Halves(Base):
    """Two stages, each of half the rounds."""

    def stages(self, rounds: int) -> list[Stage]:
        """First this, then that; both the same."""
        return [Stage("this", rounds // 2, self.round), Stage("that", rounds - rounds // 2, self.round)]


@dataclass(frozen=True)
class Collects(Base):
    """The server keeps every client's model."""

    def round(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(self.many, x=server.x, fold={"y": collect()})
        server.x = sum(got.y.values(), start=server.x.zeros_like()) / float(len(got.y))

    @on_client
    def many(self, me: Me, data: ClientData, x: Weights) -> Update:
        return Base.update(self, me, data, x)


@dataclass(frozen=True)
class Heavy(Base):
    """A mean whose bound holds for the clients of one host, and not for all."""

    def round(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(self.weigh, x=server.x, fold={"y": Mean(by="weight", bound=4)})
        server.x = got.y

    @on_client
    def weigh(self, me: Me, data: ClientData, x: Weights) -> Weighed:
        return Weighed(x.clone(), 1.0)


class Weighed(NamedTuple):
    y: Weights
    weight: Scalar


@dataclass(frozen=True)
class Double(Base):
    """Clients send float64."""

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        return Update(Params(x.layout, x.floats.double(), x.ints), data.n)


class MaskedUpdate(NamedTuple):
    y: MaskedWeights
    n: Scalar


@dataclass(frozen=True)
class MaskedModel(Base):
    """Models under a mask that keeps two of three parameters; `lies` is how client 2 breaks it."""

    encoding: Choice = "values"
    lies: str = ""

    def init_server(self, task: Task) -> State:
        x = task.init_params()
        keep = torch.arange(x.layout.num_params) % 3 != 0
        return State(x=Kept(x, pack(keep)).value, mask=pack(keep))

    def round(self, server: Server, clients: Clients) -> None:
        mask = Once(server.mask, 1, "mask")
        x = Kept(server.x, server.mask, self.encoding)
        got = clients.selected().call(self.update, x=x, mask=mask, fold={"y": Mean(by="n")})
        server.x = got.y
        clients.all().call(self.look, x=Kept(server.x, server.mask, self.encoding), mask=mask)

    @on_client
    def update(self, me: Me, data: ClientData, x: MaskedWeights, mask: Masks) -> MaskedUpdate:
        keep = unpack(mask, x.layout.num_params)
        assert not x.trainable.floats[~keep].any()
        y = data.train(x, mask=keep).params
        sent: Any = Kept(y, mask, self.encoding)
        if self.lies and data.client == 2:
            y.floats[0] = 1.0
            keep[0] = True
            sent = y if self.lies == "plain" else Kept(y, pack(keep), self.encoding)
        return MaskedUpdate(sent, data.n)

    @on_client
    def look(self, me: Me, data: ClientData, x: MaskedWeights, mask: Masks) -> None:
        assert not x.trainable.floats[~unpack(mask, x.layout.num_params)].any()


class SparseUpdate(NamedTuple):
    y: SparseWeights
    n: Scalar


@dataclass(frozen=True)
class OwnZeros(Base):
    """Each client sends a model with zeros of its own."""

    encoding: Choice = "auto"

    def round(self, server: Server, clients: Clients) -> None:
        server.x = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")}).y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> SparseUpdate:
        y = data.train(x).params
        y.floats[: y.layout.num_params][data.client :: 2] = 0.0
        return SparseUpdate(Kept(y, encoding=self.encoding), data.n)


@dataclass(frozen=True)
class FailsLate(Base):
    """Clients train; in round 2 one of them fails in a second call."""

    def round(self, server: Server, clients: Clients) -> None:
        server.x = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")}).y
        clients.selected().call(self.tally, round=server.round)

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        return Update(data.train(x).params, data.n)

    @on_client
    def tally(self, me: Me, data: ClientData, round: Scalar) -> Nothing:
        if round == 2 and data.client == 1:
            raise ZeroDivisionError("late")
        return Nothing(data.n)


class Answers(NamedTuple):
    z: Logits
    h: Logits
    few: Annotated[Tensor, Kind.REPORT, MaxBytes(64)]
    n: Scalar


@dataclass(frozen=True)
class Ensemble(Base):
    """Clients' logits are averaged and added up; nothing is sent that they could take a scale from."""

    lies: str = ""  # how client 2 spoils its reply
    shape: ClassVar[tuple[int, int]] = (210, 10)

    def init_server(self, task: Task) -> State:
        return State(x=task.init_params(), e=torch.zeros(self.shape, dtype=torch.float64), h=torch.zeros(self.shape))

    def round(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(
            self.ask,
            round=server.round,
            fold={
                "z": Mean(by="n", shape=self.shape),
                "h": Sum(shape=self.shape, dtype="float16", limit=100.0),
                "few": Collect((2,), not_negative=True),
            },
        )
        server.e = got.z
        server.h = got.h
        server.log(seen=sum(float(few[0]) for few in got.few.values()))

    @on_client
    def ask(self, me: Me, data: ClientData, round: Scalar) -> Answers:
        rng = generator(3, "answers", int(round), data.client)
        z, h, few = torch.randn(self.shape, generator=rng), torch.randn(self.shape, generator=rng).half(), torch.ones(2)
        if data.client == 2 and self.lies:
            z, h, few = {
                "nan": (z.index_fill(0, torch.tensor([209]), float("nan")), h, few),
                "range": (z, h.index_fill(0, torch.tensor([3]), 101.0), few),
                "shape": (z.T, h, few),
                "dtype": (z, h.float(), few),
                "few": (z, h, -few),
            }[self.lies]
        return Answers(z, h, few, data.n)


@dataclass(frozen=True)
class Frozen(Base):
    """A frozen model and tensors of several sizes, given as `Once`: to client 0 first, then to all."""

    every: int = 2

    def init_server(self, task: Task) -> State:
        return State(x=task.init_params(), frozen=task.init_params() * 0.5)

    def round(self, server: Server, clients: Clients) -> None:
        version = (server.round - 1) // self.every
        frozen = Once(server.frozen, version, "frozen")
        tensors = Once({"large": torch.full((1500,), 1.0 + version), "small": torch.ones(3)}, version)
        for cohort in (clients.only([0]), clients.selected()):
            server.x = cohort.call(
                self.add, x=server.x, frozen=frozen, tensors=tensors, fold={"y": Mean(by="n", like="x")}
            ).y
        if server.round % self.every == 0:
            server.frozen = server.x.clone()

    @on_client
    def add(self, me: Me, data: ClientData, x: Weights, frozen: Weights, tensors: Factors) -> Update:
        y = x.clone()
        y.floats += 0.1 * frozen.floats + tensors["large"].mean() + tensors["small"].sum() * data.client
        return Update(y, data.n)
