"""Runs that end at a budget or an accuracy: which rule counts, what is said, and that such a run can be extended."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from fldist import run
from fldist.algorithms.fedavg import FedAvg
from fldist.config import ConfigError, load, load_resumed
from fldist.fold import collect
from fldist.runner import run_here
from fldist.runtime.stops import Stop, reason_text, since_best
from tests.conftest import small

SPENT = {"uplink_bytes": 100, "downlink_bytes": 50, "seconds": 3.0}


@pytest.mark.parametrize(
    ("stop", "rule", "value"),
    [
        (Stop(rounds=4), "rounds", 4),
        (Stop(uplink_bytes=100), "uplink_bytes", 100),
        (Stop(total_bytes=120), "total_bytes", 150),
        (Stop(seconds=2.5), "seconds", 3.0),
        (Stop(accuracy=0.7), "accuracy", 0.75),
        (Stop(rounds=5, accuracy=0.7, total_bytes=151), "accuracy", 0.75),
    ],
)
def test_what_is_reached_ends_the_run(stop, rule, value):
    got = stop.reached(4, SPENT, 0.75)
    assert got == {"rule": rule, "limit": getattr(stop, rule), "value": value, "round": 4}


@pytest.mark.parametrize(
    "stop",
    [Stop(), Stop(rounds=5), Stop(uplink_bytes=101), Stop(total_bytes=151), Stop(seconds=3.01), Stop(accuracy=0.76)],
)
def test_what_is_not_reached_does_not(stop):
    assert stop.reached(4, SPENT, 0.75) is None


def test_an_unscored_round_ends_no_run_by_its_accuracy():
    assert Stop(accuracy=0.1).reached(4, SPENT, None) is None
    assert Stop(patience=1).reached(4, SPENT, None, [0.5, 0.4]) is None


@pytest.mark.parametrize(("patience", "ends"), [(2, True), (3, True), (4, False)])
def test_patience_ends_a_run_that_does_not_get_better(patience, ends):
    """Its best is the second of five: 5 - 1 = 4 scores from there on, more than 3."""
    got = Stop(patience=patience).reached(9, SPENT, 0.2, [0.1, 0.5, 0.4, 0.3])
    assert got == ({"rule": "patience", "limit": patience, "value": 3, "round": 9} if ends else None)


@pytest.mark.parametrize(
    ("accuracies", "since"),
    [
        ([], 0),
        ([0.0], 0),
        ([0.1, 0.2], 0),
        ([0.2, 0.2, 0.2], 2),  # the first of the best counts
        ([0.5, 0.1, 0.6, 0.2], 1),
        ([float("nan"), 0.1, float("nan")], 1),
    ],
)
def test_rounds_since_the_best(accuracies, since):
    assert since_best(accuracies) == since


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ({"rule": "rounds", "limit": 5, "value": 5, "round": 5}, "all 5 rounds are done"),
        (
            {"rule": "uplink_bytes", "limit": 10**6, "value": 1_240_000, "round": 7},
            "1.24 MB spent after round 7 (stop.uplink_bytes: 1 MB)",
        ),
        (
            {"rule": "seconds", "limit": 60.0, "value": 61.0, "round": 7},
            "61 s spent after round 7 (stop.seconds: 60 s)",
        ),
        (
            {"rule": "accuracy", "limit": 0.9, "value": 0.91, "round": 7},
            "accuracy 0.9100 in round 7 (stop.accuracy: 0.9)",
        ),
        (
            {"rule": "patience", "limit": 3, "value": 3, "round": 7},
            "no better accuracy in 3 scored rounds up to round 7 (stop.patience: 3)",
        ),
        (
            {"rule": "patience", "limit": 1, "value": 1, "round": 7},
            "no better accuracy in 1 scored round up to round 7 (stop.patience: 1)",
        ),
    ],
)
def test_the_reason_is_told_in_words(stop, text):
    assert reason_text(stop) == text


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ({"uplink_bytes": "much"}, r"stop\.uplink_bytes: it must be a number of bytes, such as 1500000 or 1\.5 MB"),
        ({"total_bytes": 0}, r"stop\.total_bytes: .*greater than 0"),
        ({"seconds": 0}, r"stop\.seconds: .*greater than 0"),
        ({"accuracy": 80}, r"stop\.accuracy: .*less than or equal to 1; got 80"),
        ({"patience": 0}, r"stop\.patience: .*greater than or equal to 1"),
        ({"rounds": 0}, r"stop\.rounds: .*greater than or equal to 1"),
        ({"uplink": 5}, r"stop\.uplink: unknown key; did you mean stop\.uplink_bytes"),
    ],
)
def test_what_cannot_be_a_limit_is_refused(stop, message):
    with pytest.raises(ConfigError, match=message):
        load(small(stop=stop))


def test_an_accuracy_needs_scores():
    with pytest.raises(ConfigError, match=r"stop\.accuracy: 0\.5 is never known, since eval\.every is 0; set it"):
        load(small(stop={"accuracy": 0.5}, eval={"every": 0}))


def test_patience_needs_scores():
    with pytest.raises(
        ConfigError, match=r"stop\.patience: 5 scored rounds never come, since eval\.every is 0; set it"
    ):
        load(small(stop={"patience": 5}, eval={"every": 0}))


def test_bytes_may_be_written_with_units():
    assert load(small(), ["stop.uplink_bytes=1.5 MB"]).stop.uplink_bytes == 1_500_000


def lines_of(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def test_a_run_ends_at_the_first_round_that_reaches_its_budget_and_scores_it(tmp_path):
    one_round = run(small(rounds=1), output=tmp_path / "one")["bytes"]["encoded"]["up"]
    config = small(rounds=9, eval={"every": 9}, stop={"uplink_bytes": 2 * one_round + 1})
    result = run(config, output=tmp_path / "run")
    assert result["status"] == "finished"
    assert result["stop"] == {"rule": "uplink_bytes", "limit": 2 * one_round + 1, "value": 3 * one_round, "round": 3}
    assert result["rounds"] == 3
    lines = lines_of(tmp_path / "run")
    assert [line["accuracy"] is None for line in lines] == [True, True, False]
    assert result["final"]["accuracy"] == lines[-1]["accuracy"]
    assert lines[-1]["spent"]["uplink_bytes"] == result["bytes"]["encoded"]["up"]


def test_a_run_ends_at_an_accuracy(tmp_path):
    free = run(small(rounds=6), output=tmp_path / "free")
    curve = [line["accuracy"] for line in lines_of(tmp_path / "free")]
    wanted = curve[2]
    first = next(number for number, accuracy in enumerate(curve, start=1) if accuracy >= wanted)
    result = run(small(rounds=6, stop={"accuracy": wanted}), output=tmp_path / "run")
    assert (result["stop"]["rule"], result["stop"]["round"], result["rounds"]) == ("accuracy", first, first)
    assert free["stop"] == {"rule": "rounds", "limit": 6, "value": 6, "round": 6}


@dataclass(frozen=True)
class Lost(FedAvg):
    """Forgets everything in round 4, and goes on from there."""

    def round(self, server, clients):
        super().round(server, clients)
        if server.round >= 4:
            server.x = server.x * 0.0


def test_patience_counts_scored_rounds_of_a_run_and_of_its_continuation(tmp_path):
    """Every second round is scored, and 2 is the only one before all is forgotten: 4, 6 and 8 are three in a row."""
    config = small(rounds=20, algorithm=f"{__name__}:Lost", eval={"every": 2}, stop={"patience": 3}, local__lr=0.5)
    whole = run(config, output=tmp_path / "whole")
    assert whole["best"]["round"] == 2
    assert whole["stop"] == {"rule": "patience", "limit": 3, "value": 3, "round": 8}
    assert whole["rounds"] == 8
    run({**config, "stop": {"patience": 3, "rounds": 6}}, output=tmp_path / "cut")
    longer = run_here(load_resumed(tmp_path / "cut", ["stop.rounds=null"]), output=tmp_path / "cut", resume=True)
    assert (longer["stop"], longer["state_hash"]) == (whole["stop"], whole["state_hash"])
    with pytest.raises(ConfigError, match=r"stop\.patience: the run in .* is finished, with 3 of 3; give more"):
        load_resumed(tmp_path / "cut", ["rounds=30"])
    more = run_here(load_resumed(tmp_path / "cut", ["stop.patience=4"]), output=tmp_path / "cut", resume=True)
    assert more["stop"] == {"rule": "patience", "limit": 4, "value": 4, "round": 10}


def test_a_run_whose_patience_was_over_before_it_was_killed_only_has_to_end(tmp_path):
    config = small(rounds=20, algorithm=f"{__name__}:Lost", stop={"patience": 2})
    whole = run(config, output=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = run_here(load_resumed(tmp_path / "run"), output=tmp_path / "run", resume=True)
    assert (again["stop"], again["state_hash"]) == (whole["stop"], whole["state_hash"])
    assert whole["stop"]["rule"] == "patience"


def test_scoring_at_clients_is_no_part_of_what_is_spent(tmp_path):
    silent = run(small(eval={"every": 0}), output=tmp_path / "silent")
    scored = run(small(eval={"where": "both"}), output=tmp_path / "scored")
    assert scored["bytes"]["by_phase"]["evaluate"]["down"] > 0
    of = [lines_of(tmp_path / name)[-1]["spent"] for name in ("silent", "scored")]
    for name in ("uplink_bytes", "downlink_bytes"):
        assert of[0][name] == of[1][name]
    # the verdict on a round rides in the next frame, whether that is a call to score or to train
    assert of[0]["wire_uplink_bytes"] == of[1]["wire_uplink_bytes"]
    assert 0 <= of[0]["wire_downlink_bytes"] - of[1]["wire_downlink_bytes"] < 100
    assert of[0]["uplink_bytes"] == silent["bytes"]["logical"]["up"]


@dataclass(frozen=True)
class Scores(FedAvg):
    """Scores in its own way, and names no phase."""

    def evaluate(self, server, clients):
        return clients.all().call(self.evaluate_client, model=server.x, fold={"scores": collect()})


def test_scoring_in_a_way_of_ones_own_is_no_part_of_what_is_spent_either(tmp_path):
    usual = run(small(eval={"where": "both"}), output=tmp_path / "usual")
    own = run(small(algorithm=f"{__name__}:Scores", eval={"where": "both"}), output=tmp_path / "own")
    assert own["bytes"]["by_phase"] == usual["bytes"]["by_phase"]
    spent = [
        [{k: v for k, v in line["spent"].items() if k != "seconds"} for line in lines_of(tmp_path / name)]
        for name in ("usual", "own")
    ]
    assert spent[0] == spent[1]


def test_a_run_that_ended_at_a_budget_is_extended_to_the_same_bits(tmp_path):
    whole = run(small(rounds=4), output=tmp_path / "whole")
    run(small(rounds=4, stop={"rounds": 2}), output=tmp_path / "cut")
    with pytest.raises(ConfigError, match=r"stop\.rounds: the run in .*cut is finished, with 2 of 2; give more"):
        load_resumed(tmp_path / "cut", ["rounds=8"])
    settings = load_resumed(tmp_path / "cut", ["stop.rounds=null"])
    longer = run_here(settings, output=tmp_path / "cut", resume=True)
    assert (longer["state_hash"], longer["rounds"]) == (whole["state_hash"], 4)
    for name in ("logical", "encoded", "by_kind", "by_phase"):
        assert longer["bytes"][name] == whole["bytes"][name]
    spent = [lines_of(tmp_path / name)[-1]["spent"]["uplink_bytes"] for name in ("whole", "cut")]
    assert spent[0] == spent[1]


def test_the_budget_that_ended_a_run_must_be_raised_to_extend_it(tmp_path):
    run(small(rounds=4, stop={"total_bytes": "1 kB"}), output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"stop\.total_bytes: .* is finished, with \d+ of 1000; give more"):
        load_resumed(tmp_path / "run", ["rounds=9"])
    assert load_resumed(tmp_path / "run", ["stop.total_bytes=1 GB"]).stop.total_bytes == 10**9


def test_a_run_whose_last_round_reached_its_budget_before_it_was_killed_only_has_to_end(tmp_path):
    """As after a death between the round's checkpoint and result.json."""
    settings = load(small(rounds=5, stop={"rounds": 2}))
    whole = run_here(settings, output=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = run_here(load_resumed(tmp_path / "run"), output=tmp_path / "run", resume=True)
    assert (again["rounds"], again["state_hash"], again["stop"]) == (2, whole["state_hash"], whole["stop"])


def test_a_budget_ends_a_run_of_several_ranks_in_the_same_round(tmp_path, hosts):
    stop = {"total_bytes": "50 kB"}
    alone = run(small(rounds=9, stop=stop), output=tmp_path / "alone")
    spread = run_here(load(small(rounds=9, stop=stop)), nproc=3, output=tmp_path / "spread", spawn=hosts)
    assert alone["stop"] == spread["stop"]
    assert alone["rounds"] == spread["rounds"] < 9
