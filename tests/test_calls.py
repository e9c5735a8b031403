"""Calls on cohorts: what an author may get wrong, and what a lying host may send."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import torch

import fldist
from fldist.algorithm import Algorithm, Clients, Me, Server, State, TooFewReplies, on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.bench.round import Answered, Ask
from fldist.config import build, load
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Collect, Mean, Sum, collect
from fldist.kinds import Each, Factors, Logits, MaxBytes, Once, Scalar, Weights
from fldist.params import Params
from fldist.runtime.caller import Caller
from fldist.runtime.host import Host
from fldist.runtime.placement import Placement
from fldist.wire.codec import Frame, FrameType
from fldist.wire.ledger import Ledger
from fldist.wire.link import Event, Joined, Lost
from fldist.wire.local import LocalServer
from tests.conftest import small


class Answer(NamedTuple):
    y: Weights
    n: Scalar
    w: Scalar


class Tensors(NamedTuple):
    logits: Annotated[Logits, MaxBytes(64)]
    factors: Annotated[Factors, MaxBytes(64)]


class Optional(NamedTuple):
    y: Weights | None
    n: Scalar


class Said(NamedTuple):
    text: Scalar


@dataclass(frozen=True)
class Talk(Algorithm):
    """Client halves for the tests; the server half is in them."""

    def init_server(self, task: Task) -> State:
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        raise AssertionError

    @on_client
    def echo(self, me: Me, data: ClientData, x: Weights, s: Scalar) -> Answer:
        return Answer(x, data.n, s)

    @on_client
    def tensors(self, me: Me, data: ClientData, rows: Scalar) -> Tensors:
        return Tensors(torch.ones(int(rows), 4), {"u": torch.ones(2), "v": torch.ones(3)})

    @on_client
    def nothing(self, me: Me, data: ClientData, x: Weights | None) -> Optional:
        return Optional(x, 0)

    @on_client
    def wrong(self, me: Me, data: ClientData, which: Scalar) -> Said:
        returned: list[Any] = [Said("text"), Said(True), Said(2**63), "no NamedTuple", None, Said(1.5)]
        return returned[int(which)]


class Tampering(LocalServer):
    """An in-process link whose replies are changed on their way."""

    def __init__(self, host: Host, change: Callable[[Frame], None]) -> None:
        super().__init__(host.serve_aside, host.job.calls())
        self.expected = host.job.replies()
        self._change = change
        self.aborted: list[str] = []

    def next_event(self, timeout_s: float | None) -> Event | None:
        if self.aborted and not self._work:
            return Lost(0, self.aborted[-1])
        event = super().next_event(timeout_s)
        frame = getattr(event, "frame", None)
        if frame is not None and frame.head.type is FrameType.REPLY:
            self._change(frame)
        return event

    def abort(self, rank: int, reason: str) -> None:
        super().abort(rank, reason)
        self.aborted.append(reason)


class NotedHosts:
    """Notes which hosts are lost."""

    def __init__(self, placement: Placement) -> None:
        self.lost_ones: list[tuple[int, str]] = []
        self._placement = placement

    def joined(self, event: Joined) -> None:
        pass

    def lost(self, rank: int, reason: str, fresh: Collection[int]) -> str:
        self._placement.lose(rank, fresh)
        self.lost_ones.append((rank, reason))
        return reason


class Talker:
    """A caller over a link to one in-process host."""

    def __init__(self, change: Callable[[Frame], None] = lambda frame: None) -> None:
        self.job = build(load(small(algorithm={"name": f"{__file__}:Talk"}, clients__num_clients=4)))
        self.algorithm: Any = self.job.algorithm
        self.link = Tampering(Host(self.job), change)
        self.ledger = Ledger(None)
        placement = Placement(self.job.task.sizes, [0], False)
        self.hosts = NotedHosts(placement)
        self.caller = Caller(self.job, self.link, self.ledger, placement, self.hosts)
        self.caller.begin_round(1, 0, 0)
        self.x = self.job.task.init_params()

    def call(
        self, name: str, ids: list[int] | None = None, fold: dict[str, Any] | None = None, **arguments: Any
    ) -> Any:
        method = getattr(self.algorithm, name)
        return self.caller.call([0, 1, 2, 3] if ids is None else ids, method, fold or {}, None, arguments)


def test_values_come_back_by_fold_and_by_client() -> None:
    talker = Talker()
    got = talker.call("echo", x=talker.x, s=Each({0: 1.0, 1: 2.5, 2: 3, 3: -4}), fold={"y": collect()})
    assert got.w == {0: 1.0, 1: 2.5, 2: 3, 3: -4}
    assert got.clients == [0, 1, 2, 3]
    assert set(got.seconds) == {0, 1, 2, 3}
    assert all(torch.equal(y.floats, talker.x.floats) for y in got.y.values())
    assert all(y.floats.data_ptr() != talker.x.floats.data_ptr() for y in got.y.values()), "passed by reference"
    once = talker.call("echo", [2], x=Once(talker.x, 7), s=0.0, fold={"y": Sum()})
    assert torch.allclose(once.y.floats, talker.x.floats)
    with pytest.raises(AttributeError, match="the replies have no 'z'; they have y, n, w"):
        _ = got.z


@pytest.mark.parametrize(
    ("arguments", "fold", "says"),
    [
        ({}, {}, r"echo takes the arguments \['x', 's'\]; it was called with \['x'\]"),
        ({"s": 1.0}, {}, r"the reply field 'y' \(weights\) needs a fold: Mean, Sum, or collect\(\)"),
        ({"s": 1.0}, {"z": Sum()}, r"echo has no reply field \['z'\]"),
        ({"s": 1.0}, {"y": Mean(by="w")}, r"Mean\(by='w'\) needs bound=..., a number that no sum of the weights"),
        ({"s": "one"}, {"y": Mean()}, "'s' must be a number, got str"),
        ({"s": None}, {"y": Mean()}, "'s' is None; annotate it"),
        ({"s": Each({0: 1.0})}, {"y": Mean()}, "argument 's': Each has no value for client 1"),
    ],
)
def test_what_an_author_gets_wrong_is_told(arguments: dict[str, Any], fold: dict[str, Any], says: str) -> None:
    talker = Talker()
    with pytest.raises(ValueError, match=says):
        talker.call("echo", x=talker.x, fold=fold, **arguments)


def test_a_model_of_another_layout_is_not_sent() -> None:
    talker = Talker()
    other = Params.of(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="field 'x' has 12 floats and 0 integers; the model has"):
        talker.call("echo", x=other, s=1.0, fold={"y": Mean()})


def test_only_client_methods_of_this_algorithm_can_be_called() -> None:
    talker = Talker()
    with pytest.raises(ValueError, match="round is not a client method of this algorithm; mark it with @on_client"):
        talker.caller.call([0], talker.algorithm.round, {}, None, {})
    with pytest.raises(ValueError, match="echo is not a client method of this algorithm"):
        talker.caller.call([0], Talk().echo, {}, None, {"x": talker.x, "s": 1.0})


def test_tensors_of_free_shape_have_a_bound() -> None:
    talker = Talker()
    got = talker.call("tensors", rows=4, fold={"logits": collect(), "factors": Collect()})
    assert got.logits[3].shape == (4, 4)
    assert list(got.factors[0]) == ["u", "v"]
    talker.caller.begin_round(2, 0, 0)
    with pytest.raises(TooFewReplies) as told:
        talker.call("tensors", rows=5, fold={"logits": collect(), "factors": collect()})
    assert "field 'logits' has 80 bytes; allowed are 64" in told.value.missing[0]


@pytest.mark.parametrize(
    ("which", "says"),
    [
        (0, "'text' must be a number, got str"),
        (1, "'text' must be a number, got bool"),
        (2, "which does not fit 64 bits"),
        (3, "returned str, not Said"),
        (4, "returned NoneType, not Said"),
    ],
)
def test_a_reply_of_the_wrong_type_costs_that_client_alone(which: int, says: str) -> None:
    talker = Talker()
    got = talker.call("wrong", which=Each({0: 5, 1: which, 2: 5, 3: 5}))
    assert got.clients == [0, 2, 3]
    assert says in got.missing[1]


def test_nothing_to_fold_and_weights_of_zero_are_no_replies() -> None:
    talker = Talker()
    talker.call("nothing", x=talker.x, fold={"y": Mean()})
    with pytest.raises(TooFewReplies) as told:
        talker.call("nothing", x=None, fold={"y": collect()}, ids=[])
    assert told.value.missing == {}
    with pytest.raises(TooFewReplies) as told:
        talker.call("nothing", x=talker.x, fold={"y": Mean(by="n")})
    assert "weights of all replies sum to 0" in told.value.missing[0]
    got = talker.call("nothing", x=Each({0: talker.x, 1: None, 2: talker.x, 3: None}), fold={"y": Mean()})
    assert got.clients == [0, 2]
    assert got.missing[1] == "refused: y: shape: there is nothing to fold"


def test_a_reply_of_a_client_that_was_not_asked_is_refused() -> None:
    def claim(frame: Frame) -> None:
        for message in frame.messages:
            if message.client == 1:
                message.client = 0

    talker = Talker(claim)
    with pytest.raises(TooFewReplies):
        talker.call("wrong", [1], which=5)
    talker.ledger.flush()
    assert talker.ledger.totals.wasted["refused"]["up"] == 8


def test_a_second_reply_of_a_client_is_refused() -> None:
    def repeat(frame: Frame) -> None:
        frame.messages.append(frame.messages[0])

    talker = Talker(repeat)
    got = talker.call("wrong", [1, 2], which=5)
    assert got.text == {1: 1.5, 2: 1.5}
    talker.ledger.flush()
    assert talker.ledger.totals.wasted["refused"]["up"] == 8


def test_a_reply_to_another_method_ends_that_host() -> None:
    def other(frame: Frame) -> None:
        frame.head.method = 99

    talker = Talker(other)
    with pytest.raises(TooFewReplies):
        talker.call("wrong", [1], which=5)
    assert talker.link.aborted == ["it answered a call with another method's reply"]


@pytest.mark.parametrize("field", ["round", "attempt", "call"])
def test_a_reply_to_an_older_call_is_late(field: str) -> None:
    def older(frame: Frame) -> None:
        if frame.head.call == 2:
            setattr(frame.head, field, getattr(frame.head, field) + 7)

    talker = Talker(older)
    talker.job.round_deadline_s = 0.3
    talker.caller.begin_round(1, 0, 0)
    talker.call("wrong", [1], which=5)
    with pytest.raises(TooFewReplies) as told:
        talker.call("wrong", [1], which=5)
    assert told.value.missing == {1: "deadline"}
    talker.ledger.flush()
    assert talker.ledger.totals.wasted["late"]["up"] == 8


def test_a_round_deadline_holds_in_one_process_too(tmp_path: Path) -> None:
    own = str(Path(__file__).with_name("own.py"))
    config = small(algorithm={"name": f"{own}:Slow", "seconds": 0.1}, deadlines__round_deadline_s=0.25)
    fldist.run(config, output=tmp_path / "run")
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert all('"replied": 3' in line or '"replied": 2' in line for line in lines)
    assert all('"deadline"' in line for line in lines)


@dataclass(frozen=True)
class Hiccups(Ask):
    """One client of round 1 takes 80 ms, as on a machine that does something else meanwhile."""

    @on_client
    def answer(self, me: Me, data: ClientData, value: Scalar) -> Answered:
        if (data.round, data.client) == (1, 7):
            time.sleep(0.08)
        return Answered(value)


def test_one_slow_client_does_not_keep_small_replies_apart_for_ever(tmp_path: Path) -> None:
    settings = small(algorithm=f"{__name__}:Hiccups", rounds=8, clients={"num_clients": 200}, eval={"every": 0})
    fldist.run(settings, output=tmp_path / "run")
    frames = [0] * 9
    for line in (tmp_path / "run" / "messages.jsonl").read_text().splitlines():
        row = json.loads(line)
        frames[row["round"]] += row["row"] == "message" and row["direction"] == "up" and row["framing_bytes"] > 0
    assert frames[2] == 200, "as long as the next client may take as long"
    assert frames[8] < 100


class Shadowed(NamedTuple):
    y: Weights
    seconds: Scalar


class Doubled(NamedTuple):
    own_scores: Scalar


@dataclass(frozen=True)
class Shadows(FedAvg):
    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Shadowed:
        return Shadowed(x.clone(), 1.0)


@dataclass(frozen=True)
class Doubles(FedAvg):
    @on_client
    def tally(self, me: Me, data: ClientData) -> Doubled:
        return Doubled(1.0)


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        (Shadows(), r"Shadows\.update: the replies have a 'seconds' of their own; call the field something else"),
        (Doubles(), r"Doubles\.tally: the replies have a 'own_scores'"),
    ],
)
def test_a_field_that_could_not_be_read_is_refused(algorithm: Algorithm, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(build(load(small())), algorithm=algorithm)
