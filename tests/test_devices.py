"""Simulated devices: the arithmetic by hand, laws, sections that are refused, and what runs tell of them."""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch

import fldist
from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.clock import Scripted as ScriptedClock
from fldist.config import ConfigError, build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.devices import (
    Cost,
    Devices,
    Fleet,
    Normal,
    Pareto,
    Scripted,
    Simulated,
    Speeds,
    Uniform,
    Zipf,
    energy,
    pareto,
    training_seconds,
    transfer_seconds,
)
from fldist.fold import Mean
from fldist.inspection import dry_run
from fldist.kinds import Weights
from fldist.runner import run_here
from fldist.runtime import host
from fldist.seeding import Streams
from fldist.selection import Candidates, Selector
from fldist.units import bandwidth_text, joules_text, to_bits_per_second
from tests.conftest import Hosts, Recorder, small
from tests.own import Base, Update
from tests.test_launch import ROOT, mpirun

N, K = 6, 3
SPEEDS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
SCRIPT = {"name": "scripted", "epoch_s": SPEEDS, "watts": [1, 2, 3, 4, 5, 6], "bandwidth": "1 Mbit/s"}
ME = "tests.test_devices"


def config(devices: Any = SCRIPT, **changes: Any) -> dict[str, Any]:
    named = {} if devices is None else {"devices": devices}
    return small(**{"rounds": 3, "clients": {"num_clients": N, "per_round": K}, **named, **changes})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def clock(run: Path) -> list[tuple[Any, Any]]:
    """What every round says of the simulated clock, and what it says was spent."""
    told = [(line["simulated"], line["spent"]) for line in lines(run)]
    return [(line, {k: spent[k] for k in ("simulated_seconds", "joules")}) for line, spent in told]


def sizes(run: Path) -> Mapping[tuple[int, int], dict[int, dict[str, int]]]:
    """Logical bytes of delivered messages by round and call, client and direction; scoring left out."""
    found: dict[tuple[int, int], dict[int, dict[str, int]]] = defaultdict(
        lambda: defaultdict(lambda: {"up": 0, "down": 0})
    )
    for text in (run / "messages.jsonl").read_text().splitlines():
        row = json.loads(text)
        if row["row"] == "kind" and row["phase"] != "evaluate":
            assert row["status"] == "delivered"
            found[row["round"], row["call"]][row["client"]][row["direction"]] += row["logical_bytes"]
    return found


def by_hand(
    run: Path,
    training_s: Callable[[int, int, int], float],
    watts: Callable[[int], float] = lambda client: client + 1.0,
    bandwidth: float = 1e6,
    radio: float = 1.0,
) -> dict[int, Cost]:
    """What every round costs with a link that is shared, from the ledger's rows. training_s: of round, call, client."""
    found: dict[int, Cost] = defaultdict(Cost)
    for (number, call), clients in sorted(sizes(run).items()):
        times, joules = [], 0.0
        for client, ways in clients.items():
            exchange = 8 * (ways["up"] + ways["down"]) / (bandwidth / len(clients))
            seconds = training_s(number, call, client)
            times.append(seconds + exchange)
            joules += watts(client) * seconds + radio * exchange
        found[number] = Cost(found[number].seconds + max(times), found[number].joules + joules)
    return found


def assert_costs(run: Path, expected: Mapping[int, Cost]) -> None:
    total = expected.get(0, Cost())
    for line in lines(run):
        assert line["simulated"]["seconds"] == pytest.approx(expected[line["round"]].seconds, rel=1e-12)
        assert line["simulated"]["joules"] == pytest.approx(expected[line["round"]].joules, rel=1e-12)
        total = total.plus(Cost(**line["simulated"]))
        assert line["spent"]["simulated_seconds"] == pytest.approx(total.seconds, rel=1e-12)
        assert line["spent"]["joules"] == pytest.approx(total.joules, rel=1e-12)
    result = json.loads((run / "result.json").read_text())
    last = lines(run)[-1]["spent"]
    assert result["simulated"] == {"seconds": last["simulated_seconds"], "joules": last["joules"]}


# ---- arithmetic
def test_the_lomax_law_at_points_worked_by_hand() -> None:
    u = np.array([0.0, 0.5, 0.75, 0.9, 1.0 - 2.0**-53])
    assert pareto(u, 1.0, 60.0).tolist() == pytest.approx([0.0, 1.0, 3.0, 9.0, 60.0])
    assert pareto(u, 2.0, 5.0).tolist() == pytest.approx([0.0, math.sqrt(2) - 1, 1.0, math.sqrt(10) - 1, 5.0])
    assert pareto(u, 1e-3, 7.0).tolist() == [0.0, 7.0, 7.0, 7.0, 7.0]


def test_seconds_and_joules_worked_by_hand() -> None:
    assert training_seconds(5, 10.0, 3.0) == 65.0
    mb = 8e6  # bits
    assert transfer_seconds(mb, 100e6, 10) == pytest.approx(0.8)
    assert transfer_seconds(mb, 100e6, 10, "separate") == pytest.approx(0.08)
    mib = 2.5
    assert transfer_seconds(mib * 2**20 * 8, 100e6, 7, "published") == pytest.approx(mib * 8 * 7 / 100)
    assert energy(4.0, 65.0, 1.0, 0.8) == pytest.approx(260.8)
    assert Cost(1.0, 2.0).plus(Cost(3.0, 5.0)) == Cost(4.0, 7.0)


def test_a_call_takes_the_longest_time_and_the_sum_of_the_joules() -> None:
    fleet = Fleet((1.0, 2.0, 3.0), (2.0, 4.0, 6.0), radio_watts=0.5, bandwidth=8e3)
    down, up = {0: 1000, 1: 1000, 2: 4000}, {0: 1000, 1: 1000, 2: 0}
    cost = fleet.call({0: 10.0, 1: 20.0, 2: 15.0}, down, up, called=3, per_round=2)
    exchange = {0: 3.0 + 3.0, 1: 3.0 + 3.0, 2: 12.0}
    assert cost.seconds == max(10 + 6.0, 20 + 6.0, 15 + 12.0) == 27.0
    assert cost.joules == pytest.approx(2 * 10 + 4 * 20 + 6 * 15 + 0.5 * sum(exchange.values()))
    # who was called and is missing has its part of the link all the same
    assert fleet.call({0: 10.0}, down, up, called=3, per_round=2).seconds == 16.0
    assert fleet.call({}, down, up, called=3, per_round=2) == Cost(0.0, 0.0)


def test_links() -> None:
    def seconds(link: Any, called: int = 4) -> float:
        fleet = Fleet((0.0,), (1.0,), bandwidth=100e6, link=link)
        return fleet.call({0: 0.0}, {0: 2**20}, {0: 2**20}, called, per_round=10).seconds

    assert seconds("shared") == pytest.approx(2 * 8 * 2**20 * 4 / 1e8)
    assert seconds("separate") == seconds("separate", called=1) == pytest.approx(2 * 8 * 2**20 / 1e8)
    assert seconds("published") == pytest.approx(8 * 4 / 100 + 8 * 10 / 100)  # |S| down, the configured K up


def test_equal_devices_take_equally_long_whoever_they_are() -> None:
    fleet = Fleet((5.0,) * 4, (2.0,) * 4)
    size = dict.fromkeys(range(4), 1000)
    costs = [fleet.call(dict.fromkeys(s, 10.0), size, size, 2, 2) for s in ([0, 1], [2, 3], [1, 3])]
    assert len(set(costs)) == 1


def test_a_profile_is_that_of_a_whole_training() -> None:
    fleet = Fleet((1.0, 2.5), (2.0, 4.0))
    assert fleet.profile(4) == ({0: 4.0, 1: 10.0}, {0: 8.0, 1: 40.0})
    once = Fleet((0.0, 1.0), (2.0, 4.0), training_s=(7.0, 3.0))
    assert once.profile(4) == ({0: 7.0, 1: 7.0}, {0: 14.0, 1: 28.0})
    assert once.seconds(0, 0) == 0.0  # who does not train takes no time


@pytest.mark.parametrize("values", [(1.0, -1.0), (1.0, math.inf), (1.0, math.nan), (1.0,)])
def test_a_fleet_that_cannot_be(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="watts: "):
        Fleet((1.0, 1.0), values)


# ---- laws
def test_laws_have_their_moments() -> None:
    u = np.random.default_rng(3).random(100_000)
    assert np.median(Pareto().extra_s(u)) == pytest.approx(1.0, rel=0.02)
    normal = Normal(mean=20.0, sd=3.0).extra_s(u)
    assert (normal.mean(), normal.std()) == (pytest.approx(20.0, abs=0.05), pytest.approx(3.0, abs=0.05))
    assert np.corrcoef(u, normal)[0, 1] > 0.95  # slower with u, as in the other laws
    assert (Normal(mean=0.0, sd=1.0, cap=1.5).extra_s(u).min(), Normal(0.0, 1.0, 1.5).extra_s(u).max()) == (0.0, 1.5)
    assert Normal(mean=5.0, sd=0.0).extra_s(np.array([0.0, 0.7])).tolist() == [5.0, 5.0]
    uniform = Uniform(low=2.0, high=6.0).extra_s(u)
    assert uniform.mean() == pytest.approx(4.0, abs=0.02)
    assert 2.0 <= uniform.min() < uniform.max() < 6.0


def test_zipfs_law_is_that_of_its_probabilities() -> None:
    s, cap = 2.0, 6.0
    total = math.pi**2 / 6
    edges = np.cumsum([k**-s / total for k in range(1, 6)])  # P(X <= 1) ... P(X <= 5)
    u = np.random.default_rng(4).random(2000)
    expected = 1.0 + np.searchsorted(edges, u, side="right")
    assert Zipf(s=s, cap=cap).extra_s(u).tolist() == expected.tolist()
    assert set(expected) == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}
    assert Zipf(s=s, cap=0.5).extra_s(u).max() == 0.5


# ---- the section
def fleet_of(devices: Any, num_clients: int = 6, seed: int = 0) -> Fleet:
    settings = load(small(clients={"num_clients": num_clients}, devices=devices, seed=seed))
    made = build(settings).devices
    assert made is not None
    return made


def test_nothing_is_simulated_unless_it_is_asked_for() -> None:
    assert build(load(small())).devices is None
    assert build(load(small(devices="none"))).devices is None


def test_simulated_devices_are_those_of_the_law_and_the_seed() -> None:
    fleet = fleet_of("simulated", 8, seed=5)
    assert fleet.watts == (2.0, 4.0, 6.0, 8.0) * 2
    assert all(10.0 <= seconds <= 70.0 for seconds in fleet.epoch_s)
    assert len(set(fleet.epoch_s)) == 8
    assert (fleet.bandwidth, fleet.link, fleet.radio_watts, fleet.sleeps) == (1e8, "shared", 1.0, False)
    assert fleet_of("simulated", 8, seed=5) == fleet
    assert fleet_of("simulated", 20, seed=5).epoch_s[:8] == fleet.epoch_s  # whatever the number of clients
    assert fleet_of("simulated", 8, seed=6) != fleet
    own = {"name": "simulated", "seed": 5}
    assert fleet_of(own, 8, seed=5) == fleet_of(own, 8, seed=6) == fleet
    faster = fleet_of({"name": "simulated", "epoch_s": 1, "speeds": {"cap": 2}}, 8, seed=5)
    assert faster.epoch_s == pytest.approx([1.0 + min(seconds - 10.0, 2.0) for seconds in fleet.epoch_s])


def test_power_is_given_in_turn_or_by_lot() -> None:
    drawn = fleet_of({"name": "simulated", "assign": "drawn", "watts": [1, 3]}, 2000)
    assert set(drawn.watts) == {1.0, 3.0}
    assert 900 < drawn.watts.count(3.0) < 1100
    assert drawn.watts != fleet_of({"name": "simulated", "watts": [1, 3]}, 2000).watts
    assert drawn.epoch_s == fleet_of("simulated", 2000).epoch_s


def test_laws_are_chosen_by_name() -> None:
    def law(given: Any) -> Speeds:
        section = load(small(devices={"name": "simulated", "speeds": given})).devices
        from pydantic import TypeAdapter

        made: Simulated = TypeAdapter(Simulated).validate_python(section.fields)
        return made.speeds

    assert law("pareto") == law({}) == Pareto(1.0, 60.0)
    assert law({"kappa": 2}) == law({"name": "pareto", "kappa": 2}) == Pareto(2.0, 60.0)
    assert law({"name": "normal", "mean": 10, "sd": 3}) == Normal(10.0, 3.0, 60.0)
    assert law({"name": "zipf", "s": 1.5}) == Zipf(1.5, 60.0)
    assert law({"name": "uniform", "low": 0, "high": 2}) == Uniform(0.0, 2.0)
    assert law({"name": f"{ME}:Steps", "step": 4}) == Steps(4.0)
    steps = fleet_of({"name": "simulated", "epoch_s": 0, "speeds": f"{ME}:Steps"}, 3)
    assert steps.epoch_s == (0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Steps(Speeds):
    """A law of a user's own."""

    step: float = 1.0

    def extra_s(self, u: Any) -> Any:
        return self.step * np.arange(len(u))


@dataclass(frozen=True)
class Phones(Devices):
    """Devices of a user's own."""

    slow: float = 9.0
    too_many: int = 0

    def fleet(self, num_clients: int, seed: int) -> Fleet:
        count = num_clients + self.too_many
        return Fleet((self.slow,) * count, (2.0,) * count)


class Careless:
    """No devices."""


def test_devices_of_ones_own() -> None:
    assert fleet_of({"name": f"{ME}:Phones", "slow": 4}, 2) == Fleet((4.0, 4.0), (2.0, 2.0))


def test_scripted_devices_are_those_that_are_written() -> None:
    assert fleet_of({"name": "scripted", "epoch_s": 3}, 2) == Fleet((3.0, 3.0), (1.0, 1.0))
    listed = {"name": "scripted", "training_s": [3, 4], "watts": {"1": 5, "0": 6}, "link": "separate"}
    made = Fleet((0.0, 0.0), (6.0, 5.0), training_s=(3.0, 4.0), link="separate")
    assert fleet_of(listed, 2) == made
    assert Scripted(training_s=[3.0, 4.0], watts={1: 5.0, 0: 6.0}, link="separate").fleet(2, 0) == made
    changed = load(
        small(clients={"num_clients": 2}), ["devices.name=scripted", "devices.epoch_s.0=1", "devices.epoch_s.1=2"]
    )
    assert build(changed).devices == Fleet((1.0, 2.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        ("simulatd", r"devices\.name: unknown name 'simulatd'; did you mean 'simulated'\?"),
        ({"name": "none", "watts": 3}, r"devices\.watts: none has no such field; it has no fields"),
        ({"name": "simulated", "wats": [3]}, r"devices\.wats: simulated has no such field; did you mean"),
        ({"name": "simulated", "watts": [2, -4]}, r"devices\.watts\.1: .*greater than or equal to 0; got -4"),
        ({"name": "simulated", "watts": []}, r"devices\.watts: .*at least 1 item"),
        ({"name": "simulated", "epoch_s": -1}, r"devices\.epoch_s: .*greater than or equal to 0; got -1"),
        ({"name": "simulated", "radio_watts": -1}, r"devices\.radio_watts: .*greater than or equal to 0; got -1"),
        ({"name": "simulated", "link": "shred"}, r"devices\.link: .*'shared', 'separate' or 'published'; got 'shred'"),
        ({"name": "simulated", "mode": "nap"}, r"devices\.mode: .*'simulate' or 'sleep'; got 'nap'"),
        ({"name": "simulated", "seed": -1}, r"devices\.seed: .*greater than or equal to 0; got -1"),
        ({"name": "simulated", "bandwidth": 0}, r"devices\.bandwidth: .*greater than 0; got 0"),
        ({"name": "simulated", "bandwidth": "10 MB"}, r"devices\.bandwidth: it must be .* 100 Mbit/s .*; got '10 MB'"),
        ({"name": "simulated", "speeds": "pareta"}, r"devices\.speeds\.name: unknown name 'pareta'; did you mean"),
        ({"name": "simulated", "speeds": 3}, r"devices\.speeds: it must be the name of a law such as .*; got 3"),
        ({"name": "simulated", "speeds": {"cap": -3}}, r"devices\.speeds\.cap: .*greater than or equal to 0; got -3"),
        ({"name": "simulated", "speeds": {"kappa": 0}}, r"devices\.speeds\.kappa: .*greater than 0; got 0"),
        ({"name": "simulated", "speeds": {"sd": 1}}, r"devices\.speeds\.sd: pareto has no such field; it has"),
        ({"name": "simulated", "speeds": "normal"}, r"devices\.speeds\.mean: a value is needed"),
        ({"name": "simulated", "speeds": {"name": "zipf", "s": 1}}, r"devices\.speeds\.s: .*greater than 1; got 1"),
        (
            {"name": "simulated", "speeds": {"name": "uniform", "low": 3, "high": 1}},
            r"devices\.speeds\.low: 3 is above high \(1\); lower it",
        ),
        ({"name": "simulated", "speeds": f"{ME}:Careless"}, r"devices\.speeds\.name: it is no subclass of .*Speeds"),
        ("scripted", r"devices\.epoch_s: neither of epoch_s and training_s is given"),
        ({"name": "scripted", "epoch_s": 1, "training_s": 1}, r"devices\.epoch_s: both of epoch_s and training_s"),
        ({"name": "scripted", "epoch_s": [1, 2]}, r"devices\.epoch_s: client 2 of the 6 has no value, 2 have one"),
        ({"name": "scripted", "epoch_s": {0: 1}}, r"devices\.epoch_s: client 1 of the 6 has no value, 1 have one"),
        ({"name": "scripted", "epoch_s": [1] * 7}, r"devices\.epoch_s: there is no client 6, clients are 0 to 5"),
        ({"name": "scripted", "epoch_s": -2}, r"devices\.epoch_s: it must be a number of at least 0 .*; got -2"),
        ({"name": "scripted", "epoch_s": 1, "watts": [1] * 5 + [-6]}, r"devices\.watts: it must be a number of at"),
        (f"{ME}:Careless", r"devices\.name: '.*:Careless' is no frozen dataclass that is a subclass of"),
        ({"name": f"{ME}:Phones", "too_many": 2}, r"devices\.name: .*:Phones gives 8 devices for 6 clients"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_refused(devices: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(config(devices))


def test_its_keys_are_known_where_others_are_meant() -> None:
    with pytest.raises(ConfigError, match=r"devces: unknown key; did you mean devices\?"):
        load({**config(), "devces": "simulated"})
    with pytest.raises(ConfigError, match=r"kappa: unknown key; did you mean devices\.speeds\.kappa\?"):
        load({**config(), "kappa": 2})


def test_the_devices_of_a_run_that_goes_on_stay(tmp_path: Path) -> None:
    fldist.run(config(), output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"devices\.watts: it cannot be changed in a run that goes on"):
        load_resumed(tmp_path / "run", ["devices.watts=3", "rounds=4"])


def test_bandwidths_as_people_write_them() -> None:
    assert [to_bits_per_second(v) for v in (5, 2.5, "100 Mbit/s", "1.5Gbps", "64 kbps", "1e6")] == [
        5.0, 2.5, 1e8, 1.5e9, 64e3, 1e6,
    ]  # fmt: skip
    assert [bandwidth_text(v) for v in (5, 64e3, 1e8, 2.5e9)] == ["5 bit/s", "64 kbit/s", "100 Mbit/s", "2.5 Gbit/s"]
    assert [joules_text(v) for v in (5, 64e3, 1e8, 2.5e9)] == ["5 J", "64 kJ", "100 MJ", "2.5 GJ"]
    for wrong in (True, None, "fast", "-3", "5 MB/s"):
        with pytest.raises(ValueError, match="it must be a number of bits per second"):
            to_bits_per_second(wrong)


# ---- epochs
def test_the_epochs_of_a_call_are_those_that_it_has_run() -> None:
    task = build(load(small(local__epochs=3, local__batch_size=10))).task
    data = ClientData(task, 0, Streams(0, 1, 0))
    assert data.epochs == 0.0
    begun = data.train(task.init_params(), epochs=2)
    assert data.epochs == 2.0
    data.train(task.init_params(), epochs=5, resume_from=begun)
    assert data.epochs == 5.0  # three more, the resumed ones not again
    later = ClientData(task, 0, Streams(0, 1, 0))
    steps = later.train(task.init_params(), steps=3).steps
    assert later.epochs == pytest.approx(30 / later.n)
    assert steps == 3


def test_a_pause_follows_each_epoch() -> None:
    task = build(load(small(local__epochs=3))).task
    pauses: list[float] = []
    ClientData(task, 0, Streams(0, 1, 0), pause=pauses.append).train(task.init_params())
    assert pauses == [1.0, 1.0, 1.0]


# ---- runs
def test_a_round_takes_what_its_slowest_client_takes(tmp_path: Path) -> None:
    fldist.run(config(local__epochs=2), output=tmp_path / "run")
    assert_costs(tmp_path / "run", by_hand(tmp_path / "run", lambda number, call, client: 2 * SPEEDS[client]))
    for line in lines(tmp_path / "run"):
        slowest = max(line["chosen"])
        assert 2 * SPEEDS[slowest] < line["simulated"]["seconds"] < 2 * SPEEDS[slowest] + 1.0
        assert len(line["chosen"]) == line["selected"] == K


@dataclass(frozen=True)
class Probing(Base):
    """A setup in which everybody trains, two calls a round of which one trains no model, scoring by the clients."""

    def setup(self, server: Server, clients: Clients) -> None:
        server.x = clients.all().call(self.train_some, x=server.x, fold={"y": Mean(by="n")}).y

    def round(self, server: Server, clients: Clients) -> None:
        chosen = clients.selected()
        server.x = chosen.call(self.train_some, x=server.x, fold={"y": Mean(by="n")}).y
        server.x = clients.only(chosen.ids[:2]).call(self.update, x=server.x, fold={"y": Mean(by="n")}).y

    @on_client
    def train_some(self, me: Me, data: ClientData, x: Weights) -> Update:
        first = data.train(x, epochs=1)
        return Update(data.train(x, epochs=3, resume_from=first).params, data.n)


def test_calls_add_up_setup_counts_and_scoring_does_not(tmp_path: Path) -> None:
    several = config(algorithm=f"{ME}:Probing", eval={"where": "both"}, local__epochs=4)
    fldist.run(several, output=tmp_path / "run")

    def training_s(number: int, call: int, client: int) -> float:
        return 3 * SPEEDS[client] if call == 1 else 0.0  # the setup's only call, and a round's first

    expected = by_hand(tmp_path / "run", training_s)
    assert expected[0].seconds > 3 * SPEEDS[-1]
    assert_costs(tmp_path / "run", expected)
    fldist.run({**several, "eval": {"every": 0}}, output=tmp_path / "unscored")
    assert clock(tmp_path / "unscored") == clock(tmp_path / "run")


@dataclass(frozen=True)
class Failing(Base):
    """The last client that is called fails in the second round; in the third nobody answers."""

    def round(self, server: Server, clients: Clients) -> None:
        server.x = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")}).y

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        if data.round == 3 or (data.round == 2 and data.client == 5):
            raise ValueError("no")
        return Update(data.train(x).params, data.n)


def test_a_client_whose_reply_was_not_used_takes_no_time(tmp_path: Path) -> None:
    everyone = {"clients": {"num_clients": N}, "algorithm": f"{ME}:Failing", "rounds": 4}
    fldist.run(config(**everyone, faults={"on_quorum_loss": "skip"}), output=tmp_path / "run")
    told = [line["simulated"]["seconds"] for line in lines(tmp_path / "run")]
    assert told[0] > SPEEDS[5] > told[1] > SPEEDS[4]
    assert (told[2], lines(tmp_path / "run")[2]["committed"]) == (0.0, False)
    assert "chosen" not in lines(tmp_path / "run")[0]  # everybody


def test_devices_change_what_is_told_and_nothing_else(tmp_path: Path) -> None:
    plain = fldist.run(config(None), output=tmp_path / "plain")
    told = fldist.run(config("simulated"), output=tmp_path / "told")
    assert told["state_hash"] == plain["state_hash"]
    assert told["final"] == plain["final"]
    assert told["bytes"]["by_kind"]["report"] == {"up": 3 * K * 40, "down": 0}
    assert "report" not in plain["bytes"]["by_kind"]
    assert {k: v for k, v in told["bytes"]["by_kind"].items() if k != "report"} == plain["bytes"]["by_kind"]
    assert plain["simulated"] is None
    assert all("simulated" not in line and "joules" not in line["spent"] for line in lines(tmp_path / "plain"))


@dataclass(frozen=True)
class Fastest(Selector):
    """Those who took least time, the untried first; wants reports."""

    wants_reports: ClassVar[bool] = True

    def select(self, state: State, candidates: Candidates) -> list[int]:
        def took(client: int) -> tuple[float, int]:
            report = candidates.reports.get(client)
            return (-1.0 if report is None else report.seconds, client)

        return sorted(sorted(candidates.ids, key=took)[: candidates.count])


@dataclass(frozen=True)
class Informed(Selector):
    """Those whose profile is fastest; keeps what it is told of rounds."""

    def init(self, candidates: Candidates) -> State:
        assert candidates.seconds == {c: 2 * s for c, s in enumerate(SPEEDS)}
        assert candidates.joules == {c: (c + 1) * 2 * s for c, s in enumerate(SPEEDS)}
        return State(told=[])

    def select(self, state: State, candidates: Candidates) -> list[int]:
        assert candidates.reports == {}  # it has not asked for them
        return sorted(sorted(candidates.ids, key=lambda c: candidates.seconds[c])[: candidates.count])

    def observe(self, state: State, candidates: Candidates, outcome: Any) -> None:
        assert outcome.reports == {}
        state.told = [*state.told, [outcome.seconds, outcome.joules]]


def test_every_selector_moves_the_same_reports(tmp_path: Path) -> None:
    ones = fldist.run(config(selection=f"{ME}:Fastest"), output=tmp_path / "wants")
    other = fldist.run(config(), output=tmp_path / "random")
    assert ones["bytes"]["by_kind"] == other["bytes"]["by_kind"]
    assert [line["chosen"] for line in lines(tmp_path / "wants")] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_a_selector_knows_the_profile_and_what_rounds_took(tmp_path: Path) -> None:
    from fldist.runtime.checkpoint import Checkpoints

    fldist.run(config(selection=f"{ME}:Informed", local__epochs=2), output=tmp_path / "run")
    assert [line["chosen"] for line in lines(tmp_path / "run")] == [[0, 1, 2]] * 3
    newest = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert newest is not None
    assert newest[1]["selector"].told == [list(line["simulated"].values()) for line in lines(tmp_path / "run")]


def test_probes_and_other_calls_of_selectors_count(tmp_path: Path) -> None:
    """Of the clients 0 to 3 that begin the slowest takes 8 s; then those that go on train two more epochs."""
    begins = {"name": "tests.own_selectors:Begins", "among": 4}
    fldist.run(config(selection=begins, local__epochs=3), output=tmp_path / "begins")

    def begun(number: int, call: int, client: int) -> float:
        return SPEEDS[client] if call == 1 else 2 * SPEEDS[client]

    assert_costs(tmp_path / "begins", by_hand(tmp_path / "begins", begun))
    asks = fldist.run(config(selection="tests.own_selectors:Asks", local__epochs=3), output=tmp_path / "asks")

    def asked(number: int, call: int, client: int) -> float:
        if number == 0:
            return SPEEDS[client]  # all train an epoch in the setup
        return 3 * SPEEDS[client] if call == 2 else 0.0  # the first call asks for losses

    assert_costs(tmp_path / "asks", by_hand(tmp_path / "asks", asked))
    kinds = asks["bytes"]["by_phase_and_kind"]
    assert kinds["setup.report"]["up"] == N * 40
    assert "select.report" not in kinds  # who trains nothing has nothing to tell
    assert kinds["train.report"]["up"] == 3 * K * 40


def outcome(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result["state_hash"], result["simulated"], result["bytes"]["by_phase_and_kind"]


def test_the_same_on_any_ranks_and_topology(tmp_path: Path, hosts: Hosts) -> None:
    asked = config("simulated", local__epochs=2, selection=f"{ME}:Fastest")
    alone = fldist.run(asked, output=tmp_path / "alone")
    assert alone["simulated"]["seconds"] > 30.0
    for topology in ("star", "reduce"):
        there = run_here(load({**asked, "topology": topology}), nproc=3, output=tmp_path / topology, spawn=hosts)
        assert outcome(there) == outcome(alone)
        assert clock(tmp_path / topology) == clock(tmp_path / "alone")
    (tmp_path / "jobs.json").write_text(json.dumps([{"config": asked, "output": str(tmp_path / "mpi")}]))
    done = mpirun(3, [str(ROOT / "tests" / "mpi_runs.py"), str(tmp_path / "jobs.json")])
    assert done.returncode == 0, done.stderr
    assert outcome(json.loads((tmp_path / "mpi" / "result.json").read_text())) == outcome(alone)
    assert clock(tmp_path / "mpi") == clock(tmp_path / "alone")


def test_a_run_that_goes_on_keeps_its_clock(tmp_path: Path) -> None:
    asked = config("simulated", rounds=4, algorithm=f"{ME}:Probing")
    whole = fldist.run(asked, output=tmp_path / "whole")
    fldist.run({**asked, "rounds": 2}, output=tmp_path / "cut")
    longer = run_here(load_resumed(tmp_path / "cut", ["rounds=4"]), output=tmp_path / "cut", resume=True)
    assert outcome(longer) == outcome(whole)
    assert clock(tmp_path / "cut") == clock(tmp_path / "whole")


def test_a_run_ends_at_a_budget_of_the_devices(tmp_path: Path) -> None:
    fldist.run(config(rounds=5), output=tmp_path / "free")
    spent = [line["spent"] for line in lines(tmp_path / "free")]
    for rule in ("simulated_seconds", "joules"):
        limit = (spent[1][rule] + spent[2][rule]) / 2
        result = fldist.run(config(rounds=5, stop={rule: limit}), output=tmp_path / rule)
        assert result["stop"] == {"rule": rule, "limit": limit, "value": spent[2][rule], "round": 3}
        with pytest.raises(ConfigError, match=rf"stop\.{rule}: the run in .* is finished, .*; give more"):
            load_resumed(tmp_path / rule, ["rounds=9"])
        with pytest.raises(ConfigError, match=rf"stop\.{rule}: 5 is never reached, since no devices are simulated"):
            load(config(None, stop={rule: 5}))
        with pytest.raises(ConfigError, match=rf"stop\.{rule}: .*greater than 0"):
            load(config(stop={rule: 0}))


def test_arrays_progress_and_dry_run_tell_of_the_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fldist.console import Progress

    settings = load(config("simulated"))
    run_here(settings, output=tmp_path / "run", observer=Progress())
    shown = capsys.readouterr().out
    assert len(re.findall(r"^round \d/3 .* simulated [\d.]+ (?:s|min), [\d.]+ k?J", shown, re.M)) == 3
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    seconds, joules = result["simulated"]["seconds"], result["simulated"]["joules"]
    assert f"simulated {seconds:,.1f} s and {joules:,.1f} J on the clients' devices" in shown
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        for name in ("simulated_seconds", "joules"):
            each, spent = file["rounds"][name][:], file["rounds"][f"spent_{name}"][:]
            assert each.tolist() == [
                line["simulated"][name.removeprefix("simulated_")] for line in lines(tmp_path / "run")
            ]
            assert spent.tolist() == [line["spent"][name] for line in lines(tmp_path / "run")]
    fldist.run(config(None), output=tmp_path / "none")
    with h5py.File(tmp_path / "none" / "run.h5") as file:
        assert "joules" not in file["rounds"]
    text = dry_run(settings, 1)
    assert "simulated devices: 100 Mbit/s in each direction, shared by the clients of a call" in text
    fleet = build(settings).devices
    assert fleet is not None
    low, high = min(fleet.epoch_s), max(fleet.epoch_s)
    assert f"seconds of a training of 1 epoch: {low:.4g} to {high:.4g}, median" in text
    assert "2 W: 2 clients, 4 W: 2 clients, 6 W: 1 client, 8 W: 1 client; radio 1 W" in text
    assert re.search(r"report +up +120 ", text)
    assert "simulated devices" not in dry_run(load(config(None)), 1)


# ---- by the clock
def test_hosts_that_are_to_sleep_do_and_their_time_is_measured(tmp_path: Path) -> None:
    slow = {"name": "simulated", "mode": "sleep", "speeds": {"name": f"{ME}:Steps", "step": 0.03}, "watts": [10]}
    began = time.monotonic()
    result = fldist.run(config(slow, rounds=1, local__epochs=2, clients={"num_clients": 3}), output=tmp_path / "run")
    asleep = 2 * 0.03 * (0 + 1 + 2)
    assert time.monotonic() - began > asleep
    assert 2 * 0.03 * 2 < result["simulated"]["seconds"] < 10.0
    assert 10 * asleep < result["simulated"]["joules"]


def test_who_sleeps_is_timed_by_the_clock_that_is_set(tmp_path: Path) -> None:
    scripted = {"name": "scripted", "seconds": {f"client {c}": s for c, s in enumerate(SPEEDS)}}
    asleep = {"name": "simulated", "mode": "sleep", "speeds": {"cap": 0}, "watts": [2], "bandwidth": "1 Mbit/s"}
    fldist.run(config(asleep, clock=scripted), output=tmp_path / "run")
    taken = by_hand(tmp_path / "run", lambda number, call, client: SPEEDS[client], watts=lambda client: 2.0)
    assert_costs(tmp_path / "run", taken)


def test_a_run_that_selects_by_measured_time_can_be_replayed_with_a_scripted_clock(
    tmp_path: Path, hosts: Hosts
) -> None:
    scripted = {"name": "scripted", "seconds": {"client 0": 9.0, "client 4": 8.0}, "default": 1.0}
    asked = config(None, selection=f"{ME}:Fastest", clock=scripted, rounds=4)
    one = fldist.run(asked, output=tmp_path / "one")
    two = run_here(load(asked), nproc=3, output=tmp_path / "two", spawn=hosts)
    assert one["state_hash"] == two["state_hash"]
    assert [line["chosen"] for line in lines(tmp_path / "one")] == [[0, 1, 2], [3, 4, 5], [1, 2, 3], [1, 2, 3]]
    assert [line["chosen"] for line in lines(tmp_path / "two")] == [line["chosen"] for line in lines(tmp_path / "one")]
    with pytest.raises(RuntimeError, match=r"clock\.seconds: it has no 'client 0', but nothing; name it there, or set"):
        fldist.run({**asked, "clock": "scripted"}, output=tmp_path / "lacking")


def test_where_nobody_wants_reports_no_clock_is_asked(tmp_path: Path) -> None:
    """A scripted clock that knows no client ends no run whose replies tell no seconds."""
    assert ScriptedClock().default is None
    fldist.run(config(None, clock="scripted"), output=tmp_path / "plain")
    fldist.run(config("simulated", clock="scripted", selection=f"{ME}:Fastest"), output=tmp_path / "simulated")


@pytest.mark.parametrize("lie", [math.nan, math.inf, -3.0])
def test_a_lie_about_seconds_spoils_no_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lie: float
) -> None:
    honest = host._report

    def report(job: Any, method: Any, data: ClientData, took_s: float) -> torch.Tensor | None:
        told = honest(job, method, data, took_s)
        if told is not None and data.client == 5:
            told[3] = lie
        return told

    monkeypatch.setattr(host, "_report", report)
    fldist.run(config(clients={"num_clients": N}, rounds=1), output=tmp_path / "run")
    taken = by_hand(tmp_path / "run", lambda number, call, client: SPEEDS[client] if client < 5 else 0.0)
    assert_costs(tmp_path / "run", taken)
    assert "client 5 reports" in caplog.text


@dataclass(frozen=True)
class Idle(Algorithm):
    """Calls nobody."""

    has_global_model: ClassVar[bool] = True

    def init_server(self, task: Any) -> State:
        return State(x=task.init_params())

    def round(self, server: Server, clients: Clients) -> None:
        """Nothing."""


def test_a_round_without_a_call_takes_nothing(tmp_path: Path) -> None:
    seen = Recorder()
    result = run_here(load(config(algorithm=f"{ME}:Idle")), output=tmp_path / "run", observer=seen)
    assert result["simulated"] == {"seconds": 0.0, "joules": 0.0}
    assert all(line["simulated"] == {"seconds": 0.0, "joules": 0.0} for line in seen.lines)
    assert all("chosen" not in line for line in seen.lines)
