"""Comparisons: arithmetic worked by hand, runs that belong together, what is not known and not made up, outputs."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import fldist.cli
from fldist.analysis import cautions, plot, tables
from fldist.analysis.compare import (
    Budget,
    Final,
    Method,
    Needed,
    Reached,
    accuracy_at,
    baseline_of,
    budgets_of,
    cost_to,
    default_targets,
    front,
    gather,
    interval,
    mean_curve,
    mean_of_last,
    median_of,
    needed,
    nondominated,
    paired,
    parse_budget,
    ratio,
    ratio_of,
    reached,
    reasons,
    split,
)
from fldist.analysis.runs import Run

NAN = math.nan
ENVIRONMENT = {
    "fldist": "0.1.0", "torch": "2.13.0", "hostname": "box", "processor": "Xeon", "device": "cpu",
}  # fmt: skip


def config_of(algorithm: str = "fedavg", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A configuration as a run writes it, as far as comparing looks at it; `section__key=value` changes it."""
    config: dict[str, Any] = {
        "name": "run",
        "seed": seed,
        "rounds": 4,
        "clients": {"num_clients": 10, "fraction": None, "models": []},
        "task": {
            "data": {"name": "digits"},
            "partition": {"name": "dirichlet", "alpha": 0.1},
            "partition_seed": None,
            "model": {"name": "mlp"},
        },
        "local": {"epochs": 1, "lr": 0.01},
        "algorithm": {"name": algorithm},
        "eval": {"every": 1, "where": "auto", "metrics": ["accuracy", "loss"]},
        "deadlines": {"join_s": 60.0, "round_deadline_s": None},
        "network": {"share": True, "control_port": None},
        "threads": 1,
        "output": {"root": "runs"},
    }
    for key, value in changes.items():
        at = config
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return config


def run_of(
    accuracy: Sequence[float | None],
    algorithm: str = "fedavg",
    seed: int = 0,
    up: int = 100,
    seconds: float = 1.0,
    status: str | None = "finished",
    scored: str = "global",
    **changes: Any,
) -> Run:
    """A run that spends the same in every round: `up` bytes up, three times as many down, `seconds`."""
    rounds = [
        {
            "round": number,
            "accuracy": value,
            "loss": None if value is None else 1 - value,
            "scores": {scored: {}},
            "committed": True,
            "spent": {
                "uplink_bytes": number * up,
                "downlink_bytes": number * 3 * up,
                "wire_uplink_bytes": number * (up + 10),
                "wire_downlink_bytes": number * (3 * up + 10),
                "seconds": number * seconds,
            },
        }
        for number, value in enumerate(accuracy, start=1)
    ]
    result = {"status": status, "backend": "in-process", "world_size": 1} if status else None
    config = config_of(algorithm, seed, **changes)
    path = Path("runs") / f"{algorithm}-{up}-s{seed}-{len(rounds)}"
    return Run(path, config, rounds, result, {"backend": "in-process", "world_size": 1, **ENVIRONMENT})


def method_of(runs: Sequence[Run]) -> Method:
    (task,) = split(runs)
    (method,) = task.methods
    return method


def written(run: Run, directory: Path) -> Path:
    """The run as a directory."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(run.config))
    (directory / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.rounds))
    (directory / "environment.json").write_text(json.dumps(run.environment))
    if run.result is not None:
        (directory / "result.json").write_text(json.dumps(run.result))
    return directory


def text_of(runs: Sequence[Run], targets: Sequence[float] = (), **options: Any) -> str:
    final = Final(options.get("last", 1))
    return tables.text_of(
        split(runs), options.get("baseline"), options.get("at", []), targets, options.get("left_out", []), final
    )


THREE = {
    "fedavg": [[0.2, 0.4, 0.6, 0.7], [0.2, 0.5, 0.6, 0.8], [0.1, 0.3, 0.5, 0.75]],
    "scaffold": [[0.4, 0.6, 0.7, 0.75], [0.3, 0.6, 0.8, 0.8], [0.3, 0.5, 0.7, 0.85]],
}
SMALL = [
    run_of(accuracy, name, seed, up=200 if name == "scaffold" else 100)
    for name, seeds in THREE.items()
    for seed, accuracy in enumerate(seeds)
]


# ---- arithmetic
def test_accuracy_at_a_budget_is_that_of_the_last_scored_round_within_it() -> None:
    cost = np.array([10.0, 20.0, 30.0, 40.0])
    accuracy = np.array([0.1, 0.3, NAN, 0.2])
    assert accuracy_at(cost, accuracy, 20.0) == 0.3, "a budget that is met exactly is enough"
    assert accuracy_at(cost, accuracy, 39.9) == 0.3, "round 3 was not scored"
    assert accuracy_at(cost, accuracy, 1e9) == 0.2, "the last, not the best"
    assert math.isnan(accuracy_at(cost, accuracy, 9.9))


def test_the_mean_of_the_last_rounds_is_over_those_that_were_scored() -> None:
    accuracy = np.array([0.1, NAN, 0.5, 0.3, NAN])
    assert mean_of_last(accuracy, 1) == 0.3
    assert mean_of_last(accuracy, 2) == pytest.approx(0.4)
    assert mean_of_last(accuracy, 3) == mean_of_last(accuracy, 9) == pytest.approx(0.3)
    assert math.isnan(mean_of_last(np.array([NAN, NAN]), 2))


def test_cost_to_an_accuracy_is_that_of_the_first_scored_round_that_has_it() -> None:
    cost = np.array([10.0, 20.0, 30.0, 40.0])
    accuracy = np.array([0.1, 0.3, NAN, 0.2])
    assert cost_to(cost, accuracy, 0.1) == 10
    assert cost_to(cost, accuracy, 0.3) == 20, "an accuracy that is met exactly is enough, and need not last"
    assert cost_to(cost, accuracy, 0.31) == math.inf


curves = st.lists(st.tuples(st.integers(1, 50), st.one_of(st.none(), st.floats(0, 1))), min_size=1, max_size=30).map(
    lambda steps: (
        np.cumsum([float(step) for step, _ in steps]),
        np.array([NAN if value is None else value for _, value in steps]),
    )
)


@given(curves, st.floats(0, 1600), st.floats(0, 1600))
def test_a_larger_budget_counts_no_fewer_rounds(curve: Any, one: float, other: float) -> None:
    cost, _ = curve
    numbered = np.arange(len(cost), dtype=float)  # an "accuracy" that tells which round was taken
    small, large = (accuracy_at(cost, numbered, budget) for budget in sorted((one, other)))
    assert math.isnan(small) or small <= large


@given(curves, st.floats(0, 1600))
def test_rounds_beyond_a_budget_do_not_matter(curve: Any, budget: float) -> None:
    cost, accuracy = curve
    within = cost <= budget
    whole, cut = accuracy_at(cost, accuracy, budget), accuracy_at(cost[within], accuracy[within], budget)
    assert whole == cut or (math.isnan(whole) and math.isnan(cut))


@given(curves, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_accuracy_is_no_cheaper_and_is_there_at_its_cost(curve: Any, one: float, other: float) -> None:
    cost, accuracy = curve
    low, high = sorted((one, other))
    assert cost_to(cost, accuracy, low) <= cost_to(cost, accuracy, high)
    if math.isfinite(needs := cost_to(cost, accuracy, high)):
        assert accuracy_at(cost, accuracy, needs) >= high


def test_an_interval_by_hand() -> None:
    found = interval({0: 0.1, 1: 0.2, 2: 0.3})
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # Student's t for 2 degrees of freedom, 97.5 %
    assert found.mean == pytest.approx(0.2)
    assert (found.lower, found.upper) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert not found.excludes(0)
    assert found.excludes(0.5)


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=2, max_size=12))
def test_an_interval_is_that_of_scipys_test(values: list[float]) -> None:
    if statistics.stdev(values) < 1e-6:
        return
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(dict(enumerate(values)))
    assert (found.lower, found.upper) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    one, none = interval({7: 0.5}), interval({})
    assert one.mean == 0.5
    assert math.isnan(one.lower)
    assert math.isnan(one.upper)
    assert not one.excludes(0)
    assert math.isnan(none.mean)


def test_differences_are_over_the_seeds_that_both_have() -> None:
    found = paired({0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.6, 2: 0.6, 3: 0.1})
    assert found.values == {1: pytest.approx(0.1), 2: pytest.approx(0.3)}
    assert found.mean == pytest.approx(0.2)


def test_ratios_have_a_geometric_mean() -> None:
    found = ratio_of({0: 50.0, 1: 200.0}, {0: 100.0, 1: 100.0})
    assert found.values == {0: 0.5, 1: 2.0}
    assert found.mean == pytest.approx(1.0)
    half = 12.706204736432095 * math.log(2) * math.sqrt(2) / math.sqrt(2)  # t for 1 degree of freedom; std of the logs
    assert found.upper == pytest.approx(math.exp(half))
    assert found.lower == pytest.approx(math.exp(-half))


@pytest.mark.parametrize("costs", [{0: math.inf, 1: 5.0}, {0: 0.0, 1: 5.0}, {7: 5.0}])
def test_there_is_no_ratio_of_what_was_not_reached_or_costs_nothing(costs: dict[int, float]) -> None:
    assert math.isnan(ratio_of(costs, {0: 1.0, 1: 1.0}).mean)


def test_a_median_counts_what_was_not_reached_as_larger_than_all() -> None:
    assert median_of([3.0, 1.0, math.inf]) == 3
    assert median_of([3.0, 1.0, 2.0, math.inf]) == 2.5
    assert math.isnan(median_of([3.0, math.inf]))
    assert math.isnan(median_of([3.0, math.inf, math.inf]))


points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=25)


@given(points)
def test_the_front_is_what_nothing_dominates_and_all_of_it(given_points: list[tuple[int, int]]) -> None:
    cost = np.array([c for c, _ in given_points], dtype=float)
    accuracy = np.array([a for _, a in given_points], dtype=float)
    kept = nondominated(cost, accuracy)
    chosen = [given_points[i] for i in kept]
    assert chosen == sorted(set(chosen)), "in order of cost, each point once"
    expected = {
        (c, a) for c, a in given_points if not any((d <= c and b >= a) and (d < c or b > a) for d, b in given_points)
    }
    assert set(chosen) == expected


# ---- budgets
def test_a_budget_is_what_every_run_has_spent_when_it_was_scored() -> None:
    runs = [run_of([0.1, 0.2, None], up=100), run_of([0.1, 0.2, 0.3], "scaffold", up=200)]
    runs.append(run_of([0.3, 0.3, 0.3, 0.3], "local", up=0, seconds=2.0, scored="clients"))
    (task,) = split(runs)
    budgets = {budget.axis: budget for budget in budgets_of(task, [])}
    assert {axis: budget.amount for axis, budget in budgets.items()} == {
        "rounds": 2, "uplink_bytes": 200, "total_bytes": 800, "seconds": 2,
    }  # fmt: skip
    assert budgets["uplink_bytes"].set_by == "fedavg, seed 0", "local exchanges nothing and decides nothing"


def test_the_default_budget_is_told_in_full() -> None:
    assert "seconds=2.25 (set by all runs)" in text_of([run_of([0.1, 0.2], seconds=1.125)])


def test_budgets_that_are_asked_for_replace_those_of_their_axis() -> None:
    (task,) = split(SMALL)
    asked = [parse_budget("rounds=3"), parse_budget("rounds=2"), parse_budget("wire_bytes=1kB")]
    found = [(budget.axis, budget.amount, bool(budget.set_by)) for budget in budgets_of(task, asked)]
    assert found == [
        ("rounds", 2, False), ("rounds", 3, False), ("uplink_bytes", 400, True), ("total_bytes", 1600, True),
        ("wire_bytes", 1000, False), ("seconds", 4, True),
    ]  # fmt: skip


def test_a_run_that_ended_before_a_budget_is_counted_and_not_extrapolated() -> None:
    method = method_of([run_of([0.1, 0.2, 0.3], seed=0), run_of([0.5], seed=1, status=None)])
    assert reached(method, Budget("rounds", 2)) == Reached({0: 0.2}, ended=(1,))
    assert reached(method, Budget("rounds", 4)) == Reached({}, ended=(0, 1))
    unscored = method_of([run_of([None, None, 0.3])])
    assert reached(unscored, Budget("rounds", 2)) == Reached({}, unscored=(0,))
    text = text_of([run_of([0.1, 0.2, 0.3], seed=0), run_of([0.5], seed=1, status=None)], at=[Budget("rounds", 2)])
    assert "0.2000 ± - (1 of 2)" in text
    assert "1 (cut off)" in text


@pytest.mark.parametrize("axis", ["uplink_bytes", "total_bytes", "wire_bytes"])
def test_what_exchanges_nothing_is_within_every_budget_of_bytes(axis: Any) -> None:
    method = method_of([run_of([0.1, 0.2, 0.4], "local", up=0)])
    assert reached(method, Budget(axis, 1)).values == {0: 0.4}
    assert reached(method, Budget("rounds", 1)).values == {0: 0.1}


# ---- to an accuracy
def test_where_all_get_there_the_cost_is_a_mean() -> None:
    found = needed(method_of(SMALL[:3]), "uplink_bytes", 0.6)
    assert found.values == {0: 300, 1: 300, 2: 400}
    assert found.mean == pytest.approx(1000 / 3)
    assert found.std == pytest.approx(statistics.stdev([300, 300, 400]))
    assert found.limit == math.inf
    assert "333 ± 58 B" in text_of(SMALL, [0.6])


def test_where_some_do_not_the_cost_is_a_median_and_never_a_mean() -> None:
    found = needed(method_of(SMALL[:3]), "uplink_bytes", 0.75)
    assert found.values == {0: math.inf, 1: 400, 2: 400}
    assert math.isnan(found.mean)
    assert math.isnan(found.std)
    assert found.median == 400
    assert not found.median_is_bound, "the run that did not get there had spent as much"
    line = next(line for line in text_of(SMALL, [0.75]).splitlines() if "not reached in" in line)
    assert line.split("  ")[0] == "fedavg"
    assert "not reached in 1 of 3" in line
    assert "median 400 B" in line
    assert "±" not in line


def test_a_median_is_a_bound_where_a_run_ended_too_early_to_tell() -> None:
    found = Needed({0: 500.0, 1: 600.0, 2: math.inf}, {0: 1000.0, 1: 1000.0, 2: 200.0})
    assert found.median == 600
    assert found.median_is_bound, "had it gone on, it could have needed 300, and the median were 500"
    runs = [run_of([0.1, 0.2, 0.3, 0.4, 0.9], seed=0), run_of([0.1, 0.2, 0.3, 0.9], seed=1)]
    assert "median <= 5" in text_of([*runs, run_of([0.1, 0.2], seed=2, status=None)], [0.9])


def test_where_none_does_it_is_said_up_to_what_cost() -> None:
    found = needed(method_of([run_of([0.1, 0.2, None], seed=0), run_of([0.1, 0.2, 0.3], seed=1)]), "uplink_bytes", 0.9)
    assert found.not_reached == 2
    assert found.limit == 200, "the first run was last scored in round 2"
    assert math.isnan(found.median)
    line = next(line for line in text_of(SMALL, [0.9]).splitlines() if line.startswith("scaffold  not reached"))
    assert "not reached in 3 of 3" in line
    assert "(by 800 B)" in line
    assert "(by 4)" in line


def test_targets_are_chosen_from_the_baseline() -> None:
    assert default_targets(method_of([run_of([0.5, 0.8])])) == [0.64, 0.76]
    assert default_targets(method_of([run_of([0.0073])])) == [0.0058, 0.0069]
    assert default_targets(method_of([run_of([0.0])])) == []
    assert "chosen from these runs: 80 % and 95 % of fedavg's mean accuracy in the last" in text_of(SMALL)
    assert "chosen from these runs" not in text_of(SMALL, [0.5])


def test_bytes_are_compared_where_every_pair_got_there() -> None:
    task = split(SMALL)[0]
    fedavg, scaffold = task.methods
    found = ratio(scaffold, fedavg, "uplink_bytes", 0.6)
    assert found.values == {0: 400 / 300, 1: 400 / 300, 2: 600 / 400}
    assert found.mean == pytest.approx(statistics.geometric_mean(found.values.values()))
    assert not ratio(scaffold, fedavg, "uplink_bytes", 0.75).values, "one of fedavg's did not"
    silent = split([*SMALL, run_of([0.9] * 4, "local", up=0)])[0].methods[1]
    assert silent.label == "local"
    assert not ratio(silent, fedavg, "wire_bytes", 0.6).values, "framing alone is no cost to boast of"


def test_marks_stand_where_an_interval_excludes_no_difference() -> None:
    curves = {"fedavg": [0.50, 0.51, 0.52], "moon": [0.80, 0.82, 0.81], "scaffold": [0.45, 0.56, 0.55]}
    runs = [run_of([0.1, last], name, seed, up=seed + 2) for name, of in curves.items() for seed, last in enumerate(of)]
    runs += [run_of([0.9, 0.9], "fednova", seed, up=2 * seed + 5) for seed in range(3)]
    lines = text_of(runs, [0.4]).splitlines()
    below = lines.index("Difference to fedavg in accuracy, mean and 95 % interval of the paired differences")
    final = {line.split()[0]: line.split("]")[0] + line.split("]")[1] for line in lines[below + 5 : below + 8]}
    assert "+0.3900" in final["fednova"]
    assert " *" in final["fednova"]
    assert " *" in final["moon"]
    assert " *" not in final["scaffold"], "0.01 with 0.05 around it"
    ratios = lines[lines.index("Bytes to an accuracy as a ratio to fedavg's, geometric mean and 95 % interval") :]
    told = {line.split()[0]: line for line in ratios[5:8]}
    assert told["moon"].count("*") == 0, "the same rounds and bytes"
    assert told["fednova"].count("*") == 2, "half the rounds, at more than twice the bytes"


# ---- the mean over the last rounds
SWINGING = [
    run_of([0.1, 0.4, 0.6], seed=0), run_of([0.1, 0.5, 0.9], seed=1),
    run_of([0.9, 0.8, 0.6], "moon", seed=0, up=101), run_of([0.4, None, 0.8], "moon", seed=1, up=101),
]  # fmt: skip


def test_the_final_accuracy_is_a_mean_over_the_last_scored_rounds() -> None:
    (task,) = split(SWINGING)
    fedavg, moon = (reached(method, Final(2)) for method in task.methods)
    assert fedavg.values == {0: pytest.approx(0.5), 1: pytest.approx(0.7)}
    assert moon.values == {0: pytest.approx(0.7), 1: pytest.approx(0.6)}, "round 2 of seed 1 was not scored"
    text = text_of(SWINGING, [0.5], last=2)
    lines = text.splitlines()
    accuracies = lines.index("Accuracy at equal budgets, mean ± sample standard deviation over seeds")
    assert lines[accuracies + 2].split("  at")[0].split() == ["final", "(last", "2"]
    assert lines[accuracies + 3].split()[:3] == ["method", "scored", "rounds)"]
    assert lines[accuracies + 5].startswith("fedavg  0.6000 ± 0.1414  0.7500 ± 0.2121"), "at 3 rounds as ever"
    assert lines[accuracies + 6].startswith("moon    0.6500 ± 0.0707  0.7000 ± 0.1414")
    assert "final: each run's mean over its last 2 scored rounds, not over the best ones." in lines
    below = lines.index("Difference to fedavg in accuracy, mean and 95 % interval of the paired differences")
    half = 12.706204736432095 * 0.15  # the differences are 0.2 and -0.1; t for 1 degree of freedom
    assert lines[below + 5].startswith(f"moon    2  +0.0500 [{0.05 - half:+.4f}, {0.05 + half:+.4f}] ")
    assert "fewer scored rounds" not in text


def test_only_the_final_accuracy_depends_on_how_many_rounds_it_is_over() -> None:
    one, two = (text_of(SWINGING, last=last) for last in (1, 2))
    parts = [text[text.index("To an accuracy of 0.6 ") :] for text in (one, two)]
    assert parts[0] == parts[1], "targets, ratios and fronts"
    assert "final: of the last scored round, not of the best one." in one


def test_runs_with_fewer_scored_rounds_are_told() -> None:
    text = " ".join(text_of(SWINGING, last=3).split())
    assert "Runs with fewer scored rounds count with those they have: moon with seed 1 (2)." in text
    assert reached(split(SWINGING)[0].methods[1], Final(3)).values[1] == pytest.approx(0.6)
    many = [run_of([0.5], seed=seed) for seed in range(9)]
    assert "fedavg with seed 5 (1) and 3 more." in " ".join(text_of(many, last=2).split())


# ---- the algorithms' own figures
def telling(summary: dict[str, float | None], algorithm: str, seed: int = 0) -> Run:
    run = run_of([0.5], algorithm, seed)
    assert run.result is not None
    return replace(run, result={**run.result, "summary": summary})


def figures(runs: Sequence[Run]) -> list[str]:
    """The lines of the table of figures and below."""
    lines = text_of(runs, [0.9]).splitlines()
    begins = lines.index("Figures of the algorithms, each in its own unit, mean over seeds")
    return lines[begins + 2 : lines.index("Notes") - 1]


def test_the_figures_of_algorithms_are_means_over_seeds() -> None:
    masked = [telling({"flops": 24_709_082_112, "even": 4.06, "nil": 0, "few": 12}, "autoflip")]
    masked.append(telling({"flops": 24_882_384_384, "even": 4.07, "nil": 0, "few": 12}, "autoflip", seed=1))
    other = [telling({"even": 0.03481384, "mine": 10_000}, "other", seed=seed) for seed in (0, 1)]
    assert figures([run_of([0.5]), *masked, *other]) == [
        "method        flops     even  nil  few       mine",
        "--------  ---------  -------  ---  ---  ---------",
        "autoflip  2.480e+10    4.065    0   12          -",
        "other             -  0.03481    -    -  1.000e+04",
        "",
        "As the algorithms tell them of whole runs; methods that tell none are not here.",
    ]
    assert "Figures of the algorithms" not in text_of([run_of([0.5]), telling({}, "other")])


def test_no_mean_is_made_of_figures_that_are_finite_in_some_runs_only() -> None:
    never = [telling({"even": None}, "never", seed=seed) for seed in (0, 1)]
    some = [telling({"even": even}, "some", seed=seed) for seed, even in enumerate((3.0, None))]
    cut = [telling({"even": 2.0}, "cut"), run_of([0.5], "cut", seed=1, status=None)]
    assert figures([*never, *some, *cut]) == [
        "method            even",
        "------  --------------",
        "cut         2 (1 of 2)",
        "never             none",
        "some    none in 1 of 2",
        "",
        "As the algorithms tell them of whole runs; methods that tell none are not here.",
        "none: not finite, as of what never comes; where only some runs are so, there is no mean.",
        "(k of n): so many runs have told it, and the mean is theirs.",
    ]


# ---- mean curves and the front
def test_a_mean_curve_has_the_rounds_that_are_scored_for_all_seeds() -> None:
    curve = mean_curve(method_of([run_of([0.1, 0.2, 0.3, 0.4]), run_of([None, 0.4, 0.5], seed=1, up=300)]), "rounds")
    assert curve.rounds.tolist() == [2, 3]
    assert curve.accuracy.tolist() == [pytest.approx(0.3), pytest.approx(0.4)]
    assert curve.std.tolist() == [pytest.approx(math.sqrt(0.02)), pytest.approx(math.sqrt(0.02))]
    bytes_ = mean_curve(method_of([run_of([0.1, 0.2]), run_of([0.3, 0.4], seed=1, up=300)]), "uplink_bytes")
    assert bytes_.cost.tolist() == [200, 400]
    assert np.isnan(mean_curve(method_of([run_of([0.1])]), "rounds").std).all()


def test_the_front_tells_from_what_cost_on_a_method_is_ahead() -> None:
    cheap = run_of([0.3, 0.5, 0.55, 0.56], up=100)
    dear = run_of([0.4, 0.7, 0.8, 0.8], "scaffold", up=200)
    (task,) = split([cheap, dear, run_of([0.99] * 4, "centralised", up=0)])
    found = [(s.label, s.begins, s.accuracy, s.ends, s.last_accuracy) for s in front(task, "uplink_bytes")]
    # at 200 B: 0.5 of fedavg, 0.4 of scaffold; at 300 B fedavg has 0.55, at 400 B scaffold 0.7; its 0.8 comes at 600 B
    assert found == [("fedavg", 100, 0.3, 300, 0.55), ("scaffold", 400, 0.7, 600, 0.8)]
    assert [s.label for s in front(task, "seconds")] == ["centralised"], "it costs time as all do"


# ---- which runs belong together
def test_different_tasks_are_compared_apart_and_it_is_said_why() -> None:
    runs = [
        run_of([0.5], task__partition={"name": "dirichlet", "alpha": 1.0}),
        run_of([0.4]),
        run_of([0.4], "scaffold"),
    ]
    tasks = split(runs)
    assert [len(task.runs) for task in tasks] == [2, 1]
    assert reasons(tasks) == ["task.partition.alpha: 0.1 against 1"]
    text = text_of(runs)
    assert "They differ in\n\n  task.partition.alpha: 0.1 against 1\n" in text
    assert "Task 1 of 2: digits, dirichlet alpha=0.1, mlp, 10 clients" in text
    assert "Task 2 of 2: digits, dirichlet alpha=1, mlp, 10 clients" in text


def test_of_more_than_two_tasks_it_is_said_which_have_what() -> None:
    tasks = split([run_of([0.5], task__subset={"train": n}) for n in (100, 200, 300)] + [run_of([0.5])])
    assert [task.title.rpartition(", ")[2] for task in tasks] == [
        "task.subset.train=100", "task.subset.train=200", "task.subset.train=300", "task.subset.train=default",
    ]  # fmt: skip
    assert reasons(tasks) == ["task.subset.train: 100 (task 1) against 200 (task 2) against 300 (task 3) against "
                              "default (task 4)"]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"task__data": {"name": "mnist"}}, {"task__partition_seed": 3}, {"clients__num_clients": 20},
        {"clients__models": [{"name": "cnn"}]}, {"eval__where": "clients"}, {"eval__clients": "selected"},
        {"eval__split": "val"}, {"eval__model": "personal"}, {"eval__weights": "equal"}, {"eval__batch_norm": "batch"},
    ],
)  # fmt: skip
def test_what_changes_what_is_learnt_or_what_accuracy_means_makes_another_task(changes: dict[str, Any]) -> None:
    assert len(split([run_of([0.5]), run_of([0.5], seed=1, **changes)])) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm__mu": 0.1}, {"local__lr": 0.1}, {"clients__fraction": 0.5}, {"selection": {"name": "own"}},
        {"aggregation": {"integers": "max"}}, {"faults": {"min_replies": 3}}, {"topology": "reduce"},
        {"network__share": False}, {"deadlines__round_deadline_s": 3.0}, {"threads": 2}, {"eval__own": True},
        {"clock": {"name": "scripted"}},
    ],
)  # fmt: skip
def test_what_changes_a_result_or_its_cost_makes_another_method(changes: dict[str, Any]) -> None:
    (task,) = split([run_of([0.5]), run_of([0.5], seed=1, **changes)])
    assert len(task.methods) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 40}, {"name": "other"}, {"stop": {"rounds": 9}}, {"output": {"root": "elsewhere"}},
        {"checkpoint": {"every": 2}}, {"task__data": {"name": "digits", "root": "/elsewhere"}}, {"eval__every": 5},
        {"eval__metrics": ["f1"]}, {"deadlines__join_s": 5.0}, {"eval__own": False}, {"eval__fraction": 0.5},
        {"clock": {"name": "measured"}},
        {"network__control_port": 999}, {"backend": "gloo"}, {"local__lr": "1e-2"}, {"local__epochs": 1.0},
    ],
)  # fmt: skip
def test_what_changes_neither_is_not_looked_at(changes: dict[str, Any]) -> None:
    assert method_of([run_of([0.5]), run_of([0.5], seed=1, **changes)]).seeds == (0, 1)


def test_public_samples_of_other_data_are_the_methods_those_of_the_own_are_the_tasks() -> None:
    own = {"task__public": {"n": 20, "data": None}}
    beside = {"task__public": {"n": 20, "data": {"name": "mnist"}}}
    unused = {"task__public": {"n": 0, "data": None}}
    named = {"task__public": {"n": 20, "data": {"name": "digits"}}}
    assert len(split([run_of([0.5]), run_of([0.5], **own)])) == 2
    assert len(split([run_of([0.5]), run_of([0.5], **named)])) == 2
    subset = {"task__subset": {"train": 300}}
    assert len(split([run_of([0.5], **subset), run_of([0.5], **subset, **named)])) == 1
    (task,) = split([run_of([0.5]), run_of([0.5], **unused), run_of([0.5], seed=1, **beside)])
    assert sorted(method.seeds for method in task.methods) == [(0,), (1,)]
    assert "mnist" in "".join(method.label for method in task.methods)


def test_batches_matter_only_where_a_score_depends_on_them() -> None:
    assert len(split([run_of([0.5], eval__batch_size=n) for n in (64, 128)])) == 1
    assert len(split([run_of([0.5], eval__batch_size=n, eval__batch_norm="batch") for n in (64, 128)])) == 2


def test_the_share_of_those_who_score_matters_only_where_there_is_one() -> None:
    assert len(split([run_of([0.5], eval__fraction=f, eval__clients="unselected") for f in (0.5, 1)])) == 2


def test_where_a_run_was_made_makes_another_method() -> None:
    gloo = {"status": "finished", "backend": "gloo", "world_size": 3}
    cut = replace(run_of([0.5], seed=1, status=None), environment={**ENVIRONMENT, "backend": "gloo", "world_size": 3})
    (task,) = split([run_of([0.5]), replace(run_of([0.5]), result=gloo), cut])
    assert [(method.label, method.seeds) for method in task.methods] == [
        ("fedavg (gloo, 3 ranks)", (0, 1)), ("fedavg (in-process, 1 rank)", (0,)),
    ]  # fmt: skip
    gpu = replace(run_of([0.5]), environment={**ENVIRONMENT, "device": "cuda:1"})
    assert [method.label for method in split([run_of([0.5]), gpu])[0].methods] == ["fedavg (cpu)", "fedavg (cuda)"]


def labels(runs: Sequence[Run]) -> list[str]:
    (task,) = split(runs)
    return [method.label for method in task.methods]


def test_labels_are_the_algorithms_names_and_what_they_differ_in() -> None:
    prox = [run_of([0.5], "fedprox", algorithm__mu=mu) for mu in (0.1, 0.01)]
    assert labels([run_of([0.5]), prox[0]]) == ["fedavg", "fedprox"]
    assert labels([run_of([0.5]), *prox]) == ["fedavg", "fedprox mu=0.01", "fedprox mu=0.1"]
    assert labels([run_of([0.5]), run_of([0.5], local__lr=0.1), run_of([0.5], "scaffold")]) == [
        "fedavg local.lr=0.01", "fedavg local.lr=0.1", "scaffold local.lr=0.01",
    ]  # fmt: skip
    assert labels([prox[0], run_of([0.5], "fedprox")]) == ["fedprox mu=0.1", "fedprox mu=default"]
    assert "fedprox is fedprox mu=0.1." in text_of([run_of([0.5]), prox[0]])


def test_fields_of_a_selector_are_no_news_where_others_have_none() -> None:
    """A key that all methods of one selector share goes with its name; one in which they differ is told."""
    topk = {"name": "topk", "noise": 0.1}
    runs = [run_of([0.5], name="a", selection={"name": "random"}), run_of([0.5], name="b", selection=topk)]
    text = text_of(runs)
    assert "selection.name is random (a), topk (b)." in text
    assert "selection.noise" not in text
    text = text_of([*runs, run_of([0.5], name="c", selection={"name": "topk", "noise": 0.2})])
    assert "selection.noise is" in text


def test_labels_are_the_configurations_names_where_each_method_has_one_of_its_own() -> None:
    plain = [run_of([0.5], seed=seed, name="plain") for seed in (0, 1)]
    other = run_of([0.5], "fedprox", name="pulled", local__lr=0.1, algorithm__mu=0.1)
    assert labels([*plain, other]) == ["plain", "pulled"]
    text = text_of([*plain, other])
    assert "plain is fedavg; pulled is fedprox mu=0.1." in text
    assert "The methods differ in more than their algorithms: local.lr is 0.01 (plain), 0.1 (pulled)." in text
    assert labels([*plain, run_of([0.5], "fedprox", name="plain")]) == ["fedavg", "fedprox"]
    assert labels([*plain, other, run_of([0.5], "fedprox", seed=1, name="3", local__lr=0.1, algorithm__mu=0.1)]) == [
        "fedavg local.lr=0.01", "fedprox local.lr=0.1",
    ]  # fmt: skip


def test_numbers_in_labels_are_ordered_as_numbers() -> None:
    assert labels([run_of([0.5], "fedprox", algorithm__mu=mu) for mu in (10, 0.5, 2)]) == [
        "fedprox mu=0.5", "fedprox mu=2", "fedprox mu=10",
    ]  # fmt: skip


def test_of_two_runs_with_one_seed_that_with_more_rounds_is_used_and_it_is_said() -> None:
    runs = [run_of([0.1, 0.2]), run_of([0.1, 0.2, 0.3])]
    (task,) = split(runs)
    assert len(task.methods[0].runs[0].rounds) == 3
    assert task.notes == ("fedavg, seed 0: runs/fedavg-100-s0-3 is used (more rounds than runs/fedavg-100-s0-2)",)
    assert "- fedavg, seed 0: runs/fedavg-100-s0-3 is used" in text_of(runs)


def test_the_baseline_is_fedavg_where_it_is_there() -> None:
    (task,) = split([run_of([0.5], name) for name in ("scaffold", "fedavg", "centralised")])
    assert baseline_of(task, None).label == "fedavg"
    assert baseline_of(task, "scaffold").label == "scaffold"
    (named,) = split([run_of([0.5], "scaffold", name="a"), run_of([0.5], "fedavg", name="b")])
    assert baseline_of(named, None).label == "b"
    (without,) = split([run_of([0.5], name) for name in ("scaffold", "moon")])
    assert baseline_of(without, None).label == "moon"
    with pytest.raises(ValueError, match=r"no method 'fedsgd' in digits, .*; there are 'centralised', 'fedavg', 'sca"):
        baseline_of(task, "fedsgd")


MIXED = [
    *SMALL, SMALL[0],
    run_of([0.3], "local", up=0), run_of([0.5], task__merged=True), run_of([0.5], task__subset={"train": 9}),
    run_of([0.5], "fedopt", algorithm__tau=1), run_of([0.6], "fedopt", algorithm__lr=1), run_of([0.6], "fedopt"),
]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(len(MIXED))))
def test_the_order_of_the_runs_changes_nothing(order: list[int]) -> None:
    assert text_of([MIXED[number] for number in order]) == text_of(MIXED)


# ---- what a reader must know
def told(runs: Sequence[Run]) -> str:
    (task,) = split(runs)
    return "\n".join(cautions.cautions(task))


def test_nothing_is_said_of_runs_that_are_alike() -> None:
    assert told(SMALL) == ""


def test_few_or_unlike_seeds_are_told() -> None:
    text = told([*SMALL, run_of([0.5] * 4, "moon")])
    assert "One seed only, hence neither deviation nor interval: moon." in text
    assert "different seeds (seeds 0, 1, 2 of fedavg, scaffold; seeds 0 of moon): differences are over the" in text
    assert "0.5000 ± - " in text_of([run_of([0.5]), run_of([0.5], "moon")])


def test_unlike_scores_are_told() -> None:
    text = told([run_of([0.5]), run_of([0.5], "local", up=0, scored="clients")])
    assert "not the same thing for all methods: of the global model at the server for fedavg; a mean over the" in text
    assert "exchanged in runs of local: they decide about no budget of bytes" in text
    assert "different eval.every" in told([run_of([0.5]), run_of([0.5], "moon", eval__every=5)])


def test_unlike_ends_are_told() -> None:
    assert "from 1 to 2 rounds" in told([run_of([0.5]), run_of([0.5, 0.6], "moon")])
    text = told([run_of([0.5], rounds=9), run_of([0.5], "moon")])
    assert "different numbers of rounds configured (stages and schedules may go by them): 9 (fedavg); 4 (moon)" in text
    early = run_of([0.5])
    assert early.result is not None
    early.result["stop"] = {"rule": "accuracy", "limit": 0.5, "value": 0.5, "round": 1}
    assert "Runs of fedavg ended because they had reached an accuracy" in told([early])


def test_rounds_that_changed_nothing_are_told() -> None:
    lost = run_of([0.5, 0.5, 0.5], seed=4)
    lost.rounds[1]["committed"] = False
    assert "fedavg: in some rounds no reply was used, and they changed nothing (1 with seed 4)." in told([lost])


def test_unlike_versions_machines_and_company_are_told() -> None:
    other = {**ENVIRONMENT, "torch": "2.12.0", "hostname": "den", "suite": {"name": "s", "method": "m", "jobs": 2}}
    text = told([run_of([0.5]), replace(run_of([0.5], "moon"), environment=other)])
    assert "different versions of torch: 2.13.0 (fedavg); 2.12.0 (moon)." in text
    assert "versions of fldist" not in text
    assert "different machines (seconds are not of one machine): box, Xeon (fedavg); den, Xeon (moon)." in text
    assert "Up to 2 runs went on beside each other on one machine: seconds are of a shared machine." in text
    gloo = replace(run_of([0.5], "moon"), result={"status": "finished", "backend": "gloo", "world_size": 3})
    assert "one kind): in-process (fedavg (in-process, 1 rank)); gloo with 3 ranks" in told([run_of([0.5]), gloo])


def test_many_intervals_and_such_without_width_are_told() -> None:
    assert "9 intervals of 95 % are given here, and nothing corrects for their number" in " ".join(
        text_of(SMALL, [0.3, 0.6]).split()
    ), "five accuracies, and twice two axes of bytes"
    same = [run_of([0.25, 0.5], name, seed, up=up) for name, up in (("fedavg", 1), ("moon", 2)) for seed in (0, 1)]
    assert "An interval without width" in text_of(same, [0.5])


# ---- outputs
GOLDEN = """\
digits, dirichlet alpha=0.1, mlp, 10 clients
============================================

Runs, and what they spent in all (mean ± sample standard deviation over seeds)

method      seeds  rounds     uplink             total          seconds
--------  -------  ------  ---------  ----------------  ---------------
fedavg    0, 1, 2       4  400 ± 0 B  1.600 ± 0.000 kB  4.000 ± 0.000 s
scaffold  0, 1, 2       4  800 ± 0 B  3.200 ± 0.000 kB  4.000 ± 0.000 s

Accuracy at equal budgets, mean ± sample standard deviation over seeds

                                        at        at uplink         at total       at seconds
method              final         4 rounds            400 B         1.600 kB              4 s
--------  ---------------  ---------------  ---------------  ---------------  ---------------
fedavg    0.7500 ± 0.0500  0.7500 ± 0.0500  0.7500 ± 0.0500  0.7500 ± 0.0500  0.7500 ± 0.0500
scaffold  0.8000 ± 0.0500  0.8000 ± 0.0500  0.5667 ± 0.0577  0.5667 ± 0.0577  0.8000 ± 0.0500

final: of the last scored round, not of the best one.
Budgets that --at does not set are what every run has spent: rounds=4 (set by all runs), uplink_bytes=400 (set by
fedavg, seed 0 and 2 more), total_bytes=1600 (set by fedavg, seed 0 and 2 more), seconds=4 (set by all runs).

Difference to fedavg in accuracy, mean and 95 % interval of the paired differences

                                                                     at                     at uplink
method    n                         final                      4 rounds                         400 B
--------  -  ----------------------------  ----------------------------  ----------------------------
scaffold  3  +0.0500 [-0.0742, +0.1742]    +0.0500 [-0.0742, +0.1742]    -0.1833 [-0.3731, +0.0064]

                              at total                    at seconds
method                        1.600 kB                           4 s
--------  ----------------------------  ----------------------------
scaffold  -0.1833 [-0.3731, +0.0064]    +0.0500 [-0.0742, +0.1742]

n: seeds that both have; [-]: one pair has no interval; *: the interval excludes 0.

To an accuracy of 0.6 (first scored round that has it)

method      reached     rounds       uplink             total          seconds
--------  ---------  ---------  -----------  ----------------  ---------------
fedavg    in 3 of 3  3.3 ± 0.6   333 ± 58 B  1.333 ± 0.231 kB  3.333 ± 0.577 s
scaffold  in 3 of 3  2.3 ± 0.6  467 ± 115 B  1.867 ± 0.462 kB  2.333 ± 0.577 s

To an accuracy of 0.75 (first scored round that has it)

method                  reached     rounds        uplink             total          seconds
--------  ---------------------  ---------  ------------  ----------------  ---------------
fedavg    not reached in 1 of 3   median 4  median 400 B   median 1.600 kB       median 4 s
scaffold              in 3 of 3  3.7 ± 0.6   733 ± 115 B  2.933 ± 0.462 kB  3.667 ± 0.577 s

median: runs that did not get there count as larger than all (<=: one of them ended before it had spent as much, so
the median could be less); (by ...): up to this cost none of them had got there.

Bytes to an accuracy as a ratio to fedavg's, geometric mean and 95 % interval

                             uplink                   total   uplink    total
method    n                  to 0.6                  to 0.6  to 0.75  to 0.75
--------  -  ----------------------  ----------------------  -------  -------
scaffold  3  1.387 [1.171, 1.642] *  1.387 [1.171, 1.642] *        -        -

-: not every common seed of both got there, or nothing is exchanged; *: the interval excludes 1.

Pareto front: from which cost on which method has the highest mean accuracy (of mean curves)

  uplink: from 100 B fedavg (0.1667, 0.7500 at 400 B), from 800 B scaffold (0.8000)
  total: from 400 B fedavg (0.1667, 0.7500 at 1.600 kB), from 3.200 kB scaffold (0.8000)
  seconds: from 1 s scaffold (0.3333, 0.8000 at 4 s)

Notes

- 7 intervals of 95 % are given here, and nothing corrects for their number: of those without a true difference about
  one in twenty is marked all the same."""


def test_a_small_comparison_reads_like_this() -> None:
    assert text_of(SMALL, [0.6, 0.75]) == GOLDEN


def test_tables_are_never_cut() -> None:
    long = "a-name-of-" + "many-" * 20 + "parts"
    lines = tables.grid(["method", "one\nof two", "two"], [[long, "1" * 30, "2" * 30], ["b", "3", "4"]], width=60)
    assert sum(long in line for line in lines) == 2, "both columns have a table of their own"
    assert any(line.endswith("1" * 30) for line in lines)
    assert any(line.endswith("2" * 30) for line in lines)


def test_tables_fit_where_they_can() -> None:
    runs = [run_of([0.1 * k, 0.05 * n], f"method{n}", k, up=1000 + n) for n in range(12) for k in range(3)]
    assert max(map(len, text_of(runs).splitlines())) <= tables.WIDTH


def test_amounts_are_written_in_a_unit_that_suits() -> None:
    assert [tables.quantity("total_bytes", n) for n in (0, 999, 1000, 16_417_600, 2.5e9)] == [
        "0 B", "999 B", "1.000 kB", "16.42 MB", "2.500 GB",
    ]  # fmt: skip
    assert tables.quantity("uplink_bytes", 16_417_600, 950_000) == "16.42 ± 0.95 MB"
    assert [tables.quantity("seconds", s) for s in (0.123, 12.345, 900, 9000)] == [
        "0.123 s", "12.35 s", "15.00 min", "2.500 h",
    ]  # fmt: skip
    assert tables.quantity("rounds", 20) == "20"
    assert tables.quantity("rounds", 12.34, NAN) == "12.3 ± -"


def rows(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["method"], row["measure"], row["at"]): row for row in csv.DictReader(file)}


def test_the_csv_holds_the_figures_in_full(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    tables.write_csv(path, split(SMALL), None, [Budget("wire_bytes", 100)], [0.6, 0.75, 0.9], Final())
    table = rows(path)
    assert {tuple(row) for row in table.values()} == {tables.COLUMNS}
    assert len(table) == 2 * (1 + 5 + 3 * 5) + 3 * 3, "each measure once, and ratios of one method's bytes"

    final = table["scaffold", "final_accuracy", ""]
    assert final["task"] == "digits, dirichlet alpha=0.1, mlp, 10 clients"
    assert (final["unit"], final["num_seeds"], final["not_reached"]) == ("fraction", "3", "0")
    assert [float(v) for v in final["values"].split(";")] == [0.75, 0.8, 0.85]
    assert (final["seeds"], final["baseline"], final["num_pairs"]) == ("0;1;2", "fedavg", "3")
    assert final["rounds_averaged"] == "1;1;1"
    assert float(final["mean"]) == pytest.approx(0.8)
    assert float(final["std"]) == pytest.approx(0.05)
    expected = paired({0: 0.75, 1: 0.8, 2: 0.85}, {0: 0.7, 1: 0.8, 2: 0.75})
    assert [float(final[name]) for name in ("difference", "lower", "upper")] == [
        expected.mean, expected.lower, expected.upper,
    ]  # fmt: skip

    assert float(table["scaffold", "accuracy_at_uplink_bytes", "400"]["mean"]) == pytest.approx(1.7 / 3)
    short = table["fedavg", "accuracy_at_wire_bytes", "100"]
    assert (short["mean"], short["not_reached"], short["values"]) == ("", "3", ";;"), "a round costs more"

    some = table["fedavg", "uplink_bytes_to_accuracy", "0.75"]
    assert (some["mean"], some["std"], some["median"], some["not_reached"]) == ("", "", "400", "1")
    assert (some["values"], some["unit"]) == (">400;400;400", "B")
    none = table["fedavg", "seconds_to_accuracy", "0.9"]
    assert (none["mean"], none["median"], none["not_reached"], none["values"]) == ("", "", "3", ">4;>4;>4")
    all_ = table["fedavg", "rounds_to_accuracy", "0.6"]
    assert float(all_["mean"]) == pytest.approx(10 / 3)

    told = table["scaffold", "total_bytes_to_accuracy_ratio", "0.6"]
    assert [float(v) for v in told["values"].split(";")] == [4 / 3, 4 / 3, 1.5]
    assert float(told["mean"]) == pytest.approx(statistics.geometric_mean([4 / 3, 4 / 3, 1.5]))
    assert float(told["lower"]) < float(told["mean"]) < float(told["upper"])
    assert table["scaffold", "total_bytes_to_accuracy_ratio", "0.75"]["num_pairs"] == "0"
    assert ("fedavg", "total_bytes_to_accuracy_ratio", "0.6") not in table


def test_the_csv_says_over_how_many_rounds_the_final_accuracy_is(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    tables.write_csv(path, split(SWINGING), None, [], [0.5], Final(3))
    table = rows(path)
    final = table["moon", "final_accuracy", ""]
    assert final["rounds_averaged"] == "3;2"
    assert [float(v) for v in final["values"].split(";")] == [pytest.approx(2.3 / 3), pytest.approx(0.6)]
    assert float(final["difference"]) == pytest.approx((2.3 / 3 - 1.1 / 3 + 0.6 - 0.5) / 2)
    rest = {key: row for key, row in table.items() if key[1] != "final_accuracy"}
    assert {row["rounds_averaged"] for row in rest.values()} == {""}
    tables.write_csv(path, split(SWINGING), None, [], [0.5], Final())
    assert {key: row for key, row in rows(path).items() if key[1] != "final_accuracy"} == rest


def test_the_csv_holds_the_figures_of_algorithms(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    runs = [
        telling({"flops": flops, "even": even}, "autoflip", seed) for seed, flops, even in ((0, 1, None), (1, 4, 2.5))
    ]
    tables.write_csv(path, split([run_of([0.5]), *runs]), None, [], [0.5], Final())
    table = rows(path)
    flops, even = (table["autoflip", f"figure_{name}", ""] for name in ("flops", "even"))
    assert [flops[name] for name in ("mean", "median", "num_seeds", "seeds", "values")] == [
        "2.5",
        "2.5",
        "2",
        "0;1",
        "1;4",
    ]
    assert float(flops["std"]) == pytest.approx(statistics.stdev([1, 4]))
    assert [even[name] for name in ("mean", "std", "median", "values")] == ["", "", "", "none;2.5"]
    assert not any(measure.startswith("figure") for method, measure, _ in table if method == "fedavg")


@pytest.mark.parametrize("ending", plot.ENDINGS)
def test_curves_are_drawn(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"curves{ending}"
    tasks = split([*SMALL, run_of([0.3] * 4, "local", up=0), run_of([0.5], task__merged=True)])
    plot.draw(tasks, path, ["total_bytes", "seconds"])
    assert path.stat().st_size > 5000
    if ending == ".png":
        with Image.open(path) as image:
            assert image.width > 1000, "two axes beside each other, and the legend"
            assert image.height > 900, "two tasks"
            assert len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_a_panel_shows_means_deviations_and_what_costs_nothing() -> None:
    from matplotlib import pyplot

    (task,) = split([*SMALL, run_of([0.1, 0.2, 0.3, 0.35], "local", up=0)])
    figure, panel = pyplot.subplots()
    try:
        plot.draw_panel(panel, task, "total_bytes", plot.styles_of([task]))
        lines = {str(line.get_label()): line for line in panel.get_lines()}
        assert lines["fedavg"].get_xdata() == pytest.approx([0.4, 0.8, 1.2, 1.6]), "kB"
        assert lines["fedavg"].get_ydata() == pytest.approx([0.5 / 3, 1.2 / 3, 1.7 / 3, 0.75])
        assert list(lines["local"].get_ydata()) == [0.35] * 3
        assert lines["local"].get_linestyle() == "--"
        assert panel.get_xlabel() == "encoded bytes up and down (kB)"
        assert panel.get_title() == "digits, dirichlet alpha=0.1, mlp, 10 clients"
        assert len(panel.collections) == 2, "a band for each method with several seeds"
        low = min(y for path in panel.collections[0].get_paths() for y in path.vertices[:, 1])
        assert low == pytest.approx(0.5 / 3 - statistics.stdev([0.2, 0.2, 0.1]))
    finally:
        pyplot.close(figure)


def test_twelve_methods_look_different_even_without_colour() -> None:
    tasks = split([run_of([0.5], f"method{n}", up=100 * (n > 1)) for n in range(12)])
    styles = plot.styles_of(tasks).values()
    assert len({style["marker"] for style in styles}) == 12
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 12
    assert sum(style["linestyle"] == "--" for style in styles) == 2, "those that exchange nothing, and no other"


# ---- runs on the disk
def test_runs_are_found_and_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    for run in SMALL[:2]:
        written(run, tmp_path / "suite" / run.name)
    broken = written(SMALL[2], tmp_path / "suite" / "broken")
    (broken / "config.yaml").write_text("seed: [")
    empty = written(SMALL[3], tmp_path / "suite" / "empty")
    (empty / "rounds.jsonl").write_text("")
    unscored = written(run_of([None, None], eval__every=0), tmp_path / "suite" / "unscored")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    runs, left_out = gather([tmp_path / "suite", nothing])
    assert [run.seed for run in runs] == [0, 1]
    assert len(left_out) == 4
    text = "\n".join(left_out)
    assert f"{broken / 'config.yaml'}: it cannot be read" in text
    assert f"{empty}: no round was finished" in text
    assert f"{unscored}: no round was scored (eval.every is 0)" in text
    assert f"{nothing}: holds no run" in text
    assert " ".join(text_of(runs, left_out=left_out).split()).count("left out: ") == 4
    with pytest.raises(ValueError, match=r"no run can be compared: .*no round was finished; .*no round was scored"):
        gather([empty, unscored])
    with pytest.raises(ValueError, match="no run can be compared") as refused:
        gather([broken])
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="there is no such directory or file"):
        gather([tmp_path / "suite", tmp_path / "typo"])


def test_runs_that_were_cut_off_or_damaged_count_with_what_they_have(tmp_path: Path) -> None:
    cut = written(run_of([0.1, 0.2, 0.3], status=None), tmp_path / "cut")
    with (cut / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "accura')
    stopped = written(run_of([0.1, 0.2, 0.3, 0.4], seed=1, status="interrupted"), tmp_path / "stopped")
    runs, left_out = gather([cut, stopped])
    assert left_out == []
    text = " ".join(text_of(runs).split())
    assert "0 (cut off), 1 (interrupted) 3 to 4" in text
    assert f"{cut}: rounds.jsonl: 1 line is damaged and skipped (line 4; the last one ends in the middle)" in text
    assert f"{cut}: it was cut off after round 3, or is still going" in text
    assert "rounds=3 (set by fedavg, seed 0)" in text


def spent_of(line: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**line, "spent": {**line["spent"], **changes}}


@pytest.mark.parametrize(
    "change",
    [
        lambda line: {**line, "spent": None},
        lambda line: {**line, "spent": {"seconds": 1.0}},
        lambda line: spent_of(line, uplink_bytes="300"),
        lambda line: spent_of(line, seconds=None),
        lambda line: spent_of(line, seconds=math.inf),
        lambda line: spent_of(line, uplink_bytes=10**400),
        lambda line: {**line, "accuracy": "0.9"},
        lambda line: {**line, "accuracy": [0.9]},
        lambda line: {**line, "accuracy": math.nan},
        lambda line: {k: v for k, v in line.items() if k != "loss"},
        lambda line: {**line, "round": True},
        lambda line: {**line, "scores": "none"},
    ],
)
def test_a_line_that_has_not_what_a_rounds_line_has_is_skipped_and_told(tmp_path: Path, change: Any) -> None:
    run = run_of([0.1, 0.2, 0.3])
    directory = written(replace(run, rounds=[*run.rounds[:2], change(run.rounds[2])]), tmp_path / "run")
    (read,), left_out = gather([directory])
    assert left_out == []
    assert list(read.accuracy) == [0.1, 0.2]
    assert "rounds.jsonl: 1 line has not what a round's line has: damaged and skipped" in read.notes
    assert "damaged and skipped" in " ".join(text_of([read]).split())


def nested(depth: int = 100_000) -> str:
    return "[" * depth


@pytest.mark.parametrize(
    "config",
    [
        yaml.safe_dump({**config_of(), "seed": "first"}),
        yaml.safe_dump({**config_of(), "seed": None}),
        yaml.safe_dump({**config_of(), "algorithm": "fedavg"}),
        yaml.safe_dump({**config_of(), "algorithm": {}}),
        yaml.safe_dump({**config_of(), "eval": None}),
        yaml.safe_dump(config_of(clients__models="mlp")),
        yaml.safe_dump(config_of(clients__models=[{}])),
        nested(),
    ],
)
def test_a_configuration_of_another_form_leaves_its_run_out_and_no_other(tmp_path: Path, config: str) -> None:
    for run in SMALL[:2]:
        written(run, tmp_path / run.name)
    (tmp_path / SMALL[0].name / "config.yaml").write_text(config)
    runs, (left_out,) = gather([tmp_path])
    assert [run.seed for run in runs] == [1]
    assert str(tmp_path / SMALL[0].name / "config.yaml") in left_out
    assert text_of(runs)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("result.json", '{"stop": null}'),
        ("result.json", '{"status": "finished", "stop": "rounds"}'),
        ("result.json", '{"status": "finished", "summary": []}'),
        ("result.json", '{"status": "finished", "summary": {"flops": "many"}}'),
        ("result.json", '{"status": "finished", "summary": {"flops": Infinity}}'),
        ("result.json", nested()),
        ("environment.json", '{"suite": "mine"}'),
        ("environment.json", '{"suite": {"jobs": null}}'),
        ("environment.json", "[]"),
    ],
)
def test_files_of_another_form_are_named_and_left_out(tmp_path: Path, name: str, text: str) -> None:
    directory = written(SMALL[0], tmp_path / "run")
    (directory / name).write_text(text)
    (run,), _ = gather([directory])
    (note,) = run.notes
    assert note.startswith(f"{name}: it is damaged and was left out (")
    assert text_of([run])


def test_links_to_runs_count_and_others_are_not_followed(tmp_path: Path) -> None:
    for run in SMALL[:3]:
        written(run, tmp_path / "made" / run.name)
    picked = tmp_path / "picked"
    picked.mkdir()
    (picked / "one").symlink_to(tmp_path / "made" / SMALL[0].name)
    (picked / "same").symlink_to(tmp_path / "made" / SMALL[0].name)
    (picked / "around").symlink_to(picked)
    (picked / "all").symlink_to(tmp_path / "made")
    runs, _ = gather([picked])
    assert [run.path for run in runs] == [picked / "one"]


def test_a_directory_that_may_not_be_read_leaves_out_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in SMALL[:2]:
        written(run, tmp_path / run.name)
    barred = str(tmp_path / SMALL[0].name)
    before = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if os.fspath(path).startswith(f"{barred}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before(path, **options)

    def barred_text(path: Path, **options: Any) -> str:
        stat(path)
        with path.open(**options) as file:
            return file.read()

    monkeypatch.setattr(os, "stat", stat)  # root, as whom tests may be run, is let in everywhere
    monkeypatch.setattr(Path, "read_text", barred_text)
    runs, (left_out,) = gather([tmp_path])
    assert [run.seed for run in runs] == [1]
    assert f"{barred}/config.yaml: it cannot be read: [Errno 13] Permission denied" in left_out


def test_a_run_is_read_from_its_arrays_alone(tmp_path: Path) -> None:
    run = SMALL[0]
    with h5py.File(tmp_path / "run.h5", "w") as file:
        for name, value in (("config", run.config), ("result", run.result), ("environment", run.environment)):
            file[name] = json.dumps(value)
        file["rounds/lines"] = [json.dumps(line) for line in run.rounds]
    runs, _ = gather([tmp_path / "run.h5"])
    assert text_of(runs) == text_of([run])


def test_arrays_of_another_form_are_no_run(tmp_path: Path) -> None:
    run = SMALL[0]
    lines = [{k: v for k, v in line.items() if k != "loss"} for line in run.rounds]
    for name, rounds, config in (("lines", lines, run.config), ("config", run.rounds, {"seed": 0})):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, value in (("config", config), ("result", run.result), ("environment", run.environment)):
                file[key] = json.dumps(value)
            file["rounds/lines"] = [json.dumps(line) for line in rounds]
        with pytest.raises(ValueError, match=r"it is damaged|it is no run's configuration"):
            gather([tmp_path / f"{name}.h5"])


# ---- the command
@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for run in SMALL:
        written(run, tmp_path / "suite" / run.name)
    return tmp_path / "suite"


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["fldist", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        fldist.cli.main()
    return stopped.value.code


def test_the_command_prints_writes_and_draws(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, picture = tmp_path / "x.csv", tmp_path / "x.png"
    options = ["--csv", table, "--plot", picture, "--against", "rounds", "--against", "seconds"]
    assert compare(monkeypatch, suite, "--to", "0.6", "--to", "0.75", *options) == 0
    assert capsys.readouterr().out == f"{GOLDEN}\nfigures in {table}\ndrawn in {picture}\n"
    assert len(rows(table)) == 2 * (1 + 4 + 2 * 4) + 2 * 2
    assert picture.stat().st_size > 5000
    assert compare(monkeypatch, suite, "--baseline", "scaffold", "--at", "uplink_bytes=0.3kB", "--at", "seconds=2") == 0
    text = capsys.readouterr().out
    assert "Difference to scaffold in accuracy" in text
    assert "300 B" in text
    assert "2 s" in text
    assert compare(monkeypatch, suite, "--at", "seconds=2.5") == 0
    assert "2.500 s" in capsys.readouterr().out
    assert compare(monkeypatch, suite, "--last", "2", "--csv", table) == 0
    assert "final: each run's mean over its last 2 scored rounds" in capsys.readouterr().out
    assert rows(table)["fedavg", "final_accuracy", ""]["rounds_averaged"] == "2;2;2"
    assert compare(monkeypatch, suite, "--best", "--csv", table) == 0
    assert "best: each run's best scored round, as many papers report it" in capsys.readouterr().out
    best = rows(table)["fedavg", "best_accuracy", ""]
    of = [run.accuracy for run in gather([suite])[0] if run.config["algorithm"]["name"] == "fedavg"]
    assert [float(value) for value in best["values"].split(";")] == [max(accuracy) for accuracy in of]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--baseline", "sgd"], "--baseline: there is no method 'sgd' in digits"),
        (["--at", "bytes=5MB"], "--at: 'bytes' is no axis; there are rounds, uplink_bytes, total_bytes, wire_bytes, s"),
        (["--at", "rounds"], "--at: 'rounds' must have the form rounds=amount"),
        (["--at", "uplink_bytes=5 apples"], "--at: 'uplink_bytes=5 apples': it must be a number of bytes"),
        (["--at", "rounds=many"], "--at: 'rounds=many': the amount must be a number above 0"),
        (["--at", "seconds=-1"], "--at: 'seconds=-1': the amount must be a number above 0"),
        (["--at", "rounds=nan"], "--at: 'rounds=nan': the amount must be a number above 0"),
        (["--to", "80"], "--to: 80 is no accuracy to reach; give a share above 0 and at most 1, such as 0.8"),
        (["--to", "0"], "--to: 0 is no accuracy"),
        (["--to", "nan"], "--to: nan is no accuracy"),
        (["--last", "0"], "--last: 0 is no number of scored rounds; give 1 or more"),
        (["--last", "-3"], "--last: -3 is no number of scored rounds"),
        (["--best", "--last", "2"], "--best: not together with --last 2; leave one out"),
        (["--against", "bytes"], "--against: 'bytes' is no axis"),
        (["--plot", "curves.gif"], "--plot: curves.gif must end in .png, .pdf, .svg; got '.gif'"),
        (["--plot", "curves"], "--plot: curves must end in .png, .pdf, .svg; got 'no ending'"),
        (["--plot", "not-there/x.png"], "--plot: there is no directory not-there to write x.png in; make it first"),
        (["--csv", "not-there/x.csv"], "--csv: there is no directory not-there to write x.csv in; make it first"),
        (["--csv", "."], "--csv: . cannot be written: Is a directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line(
    suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert compare(monkeypatch, suite, *options) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_page_explains_every_measure_and_option() -> None:
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text()
    for name in (*tables.COLUMNS, "final_accuracy", "accuracy_at_", "_to_accuracy", "_to_accuracy_ratio"):
        assert f"`{name}`" in page or f"{name}AXIS" in page or f"AXIS{name}" in page, name
    assert "`figure_NAME`" in page
    for option in ("--baseline", "--at", "--to", "--last", "--best", "--csv", "--plot", "--against", "--chosen"):
        assert f"`{option}" in page, option
