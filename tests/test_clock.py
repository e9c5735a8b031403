"""Clocks: what they tell, how they are configured, and that a scripted one makes a run repeatable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

import fldist
from fldist.algorithm import State, on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.clock import Clock, Measured, Scripted
from fldist.config import ConfigError, build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.runner import run_here
from fldist.runtime.output import config_hash
from fldist.runtime.views import ServerView
from fldist.seeding import Streams
from tests.conftest import Hosts, small

T = TypeVar("T")
SCRIPT = {"name": "scripted", "seconds": {"train": 0.25, "aggregate": 2}, "default": 0.5}


@dataclass(frozen=True)
class Doubled(Clock):
    """A clock of a user's own."""

    each: float = 1.0

    def time(self, label: str, work: Callable[[], T]) -> tuple[T, float]:
        return work(), 2 * self.each


class Careless:
    """No clock."""


@dataclass(frozen=True)
class Timeless(Clock):
    """A clock without time."""


class Timed(NamedTuple):
    y: Weights
    n: Scalar
    took: Scalar


@dataclass(frozen=True)
class ByTime(FedAvg):
    """The model is scaled by how long clients and server took, and the state keeps it."""

    label: str = "train"

    def init_server(self, task):
        return State(x=task.init_params(), spent=0.0)

    def round(self, server, clients):
        got = clients.selected().call(self.timed, x=server.x, fold={"y": Mean(by="n")})
        y, seconds = server.clock.time("aggregate", lambda: got.y)
        server.spent = server.spent + seconds + sum(got.took.values())
        server.log(spent=server.spent)
        server.x = y * (1.0 / (1.0 + server.spent))

    @on_client
    def timed(self, me, data, x: Weights) -> Timed:
        trained, seconds = data.clock.time(self.label, lambda: data.train(x))
        return Timed(trained.params, data.n, seconds)


def settings(clock: Any = None, **fields: Any) -> dict[str, Any]:
    return small(algorithm={"name": "tests.test_clock:ByTime", **fields}, **({} if clock is None else {"clock": clock}))


# ---- the clocks
def test_what_is_measured_is_what_the_work_takes():
    value, seconds = Measured().time("any", lambda: time.sleep(0.03) or 7)
    assert value == 7
    assert 0.03 <= seconds < 10
    assert Measured().time("any", lambda: None)[1] < seconds


def test_what_is_scripted_is_what_was_written_and_the_work_is_done():
    done = []
    clock = Scripted({"a": 3.5}, default=0.0)
    assert clock.time("a", lambda: done.append("a") or "value") == ("value", 3.5)
    assert clock.time("b", lambda: done.append("b")) == (None, 0.0)
    assert done == ["a", "b"]


def test_a_label_without_a_time_is_refused_before_the_work():
    done = []
    with pytest.raises(ValueError, match=r"clock\.seconds: it has no 'conv2', but conv1, fc; .* clock\.default"):
        Scripted({"conv1": 1.0, "fc": 2.0}).time("conv2", lambda: done.append(1))
    with pytest.raises(ValueError, match="it has no 'x', but nothing"):
        Scripted().time("x", lambda: done.append(1))
    assert done == []


# ---- the section
def test_the_clock_is_measured_unless_another_is_named():
    assert build(load(settings())).clock == Measured()
    assert build(load(settings("measured"))).clock == Measured()
    scripted = build(load(settings(SCRIPT))).clock
    assert scripted == Scripted({"train": 0.25, "aggregate": 2.0}, 0.5)
    assert build(load(settings("scripted"), ["clock.default=0.5", "clock.seconds.fc1=1"])).clock == Scripted(
        {"fc1": 1.0}, 0.5
    )
    own = build(load(settings({"name": "tests.test_clock:Doubled", "each": 4}))).clock
    assert own.time("any", lambda: 1) == (1, 8.0)


def test_both_ends_have_it():
    job = build(load(settings(SCRIPT)))
    view = ServerView(job, State())
    assert view.clock is view.data.clock is job.clock
    with pytest.raises(AttributeError, match=r"server\.clock is taken"):
        view.clock = 3
    assert ClientData(job.task, 0, Streams(0, 1, 0)).clock == Measured()
    assert ClientData(job.task, 0, Streams(0, 1, 0), clock=job.clock).clock is job.clock


@pytest.mark.parametrize(
    ("clock", "text"),
    [
        ("mesured", r"clock\.name: unknown name 'mesured'; did you mean 'measured'\?"),
        ({"name": "measured", "seconds": {}}, r"clock\.seconds: measured has no such field; it has no fields"),
        ({"name": "scripted", "second": {}}, r"clock\.second: scripted has no such field; did you mean clock\.seconds"),
        ({"name": "scripted", "seconds": {"a": -1}}, r"clock\.seconds\.a: .*greater than or equal to 0; got -1"),
        ({"name": "scripted", "seconds": {"a": math.nan}}, r"clock\.seconds\.a: .*finite"),
        ({"name": "scripted", "seconds": {"a": "long"}}, r"clock\.seconds\.a: .*valid number.*; got 'long'"),
        ({"name": "scripted", "default": -0.5}, r"clock\.default: .*greater than or equal to 0"),
        ("tests.test_clock:Careless", r"clock\.name: 'tests\.test_clock:Careless' is no frozen dataclass that is"),
        ("tests.test_clock:Missing", r"clock\.name: 'tests\.test_clock' has no 'Missing'"),
    ],
)
def test_a_wrong_section_is_refused(clock, text):
    with pytest.raises(ValueError, match=text):
        load(settings(clock))


def test_a_key_of_it_is_known_where_another_is_meant():
    with pytest.raises(ConfigError, match=r"clok: unknown key; did you mean clock\?"):
        load({**settings(), "clok": "measured"})


def test_the_resolved_section_gives_the_same_clock():
    loaded = load(settings(SCRIPT))
    again = load(loaded.resolved())
    assert again == loaded
    assert build(again).clock == build(loaded).clock
    assert config_hash(load(settings()).resolved()) != config_hash(loaded.resolved())


# ---- runs
def test_scripted_times_make_a_run_repeatable_on_any_ranks(tmp_path: Path, hosts: Hosts):
    one = fldist.run(settings(SCRIPT), output=tmp_path / "one")
    two = run_here(load(settings(SCRIPT)), nproc=3, output=tmp_path / "two", spawn=hosts)
    assert one["state_hash"] == two["state_hash"]
    lines = (tmp_path / "two" / "rounds.jsonl").read_text().splitlines()
    assert [f'"log": {{"spent": {spent}}}' in line for line, spent in zip(lines, (3.5, 7.0), strict=True)] == [True] * 2
    slower = {**SCRIPT, "seconds": {"train": 0.25, "aggregate": 3}}
    assert fldist.run(settings(slower), output=tmp_path / "slower")["state_hash"] != one["state_hash"]
    measured = fldist.run(settings(), output=tmp_path / "measured")
    assert measured["state_hash"] != one["state_hash"]


def test_a_time_that_a_client_lacks_is_told(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"clock\.seconds: it has no 'other', but train, aggregate"):
        fldist.run(settings({**SCRIPT, "default": None}, label="other"), output=tmp_path / "run")


def test_a_clock_without_a_time_is_told(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"Timeless does not define time\(self, label, work\)"):
        fldist.run(settings("tests.test_clock:Timeless"), output=tmp_path / "run")


def test_the_clock_of_a_run_that_goes_on_stays(tmp_path: Path):
    fldist.run(settings(SCRIPT), output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"clock\.default: it cannot be changed in a run that goes on"):
        load_resumed(tmp_path / "run", ["clock.default=0.75", "rounds=4"])
    load_resumed(tmp_path / "run", ["rounds=4"])
