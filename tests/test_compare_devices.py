"""Comparisons of what is simulated, and of who was chosen: never mixed with what was measured, never made up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fldist.analysis import cautions, plot, tables
from fldist.analysis.compare import (
    Final,
    Method,
    axes_of,
    budgets_of,
    chooses,
    chosen,
    front,
    gather,
    jain,
    needed,
    parse_budget,
    ratio,
    reached,
    shares_chosen,
    split,
)
from fldist.analysis.runs import AXES, SIMULATED, Run, read
from tests.test_compare import compare, method_of, rows, run_of, text_of, written

CURVE = [0.2, 0.4, 0.6, 0.8]


def on_devices(
    accuracy: Sequence[float | None] = CURVE,
    seed: int = 0,
    seconds: float = 30.0,
    joules: float = 400.0,
    devices: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A run whose rounds take the same on the devices each."""
    run = run_of(accuracy, seed=seed, devices=devices or {"name": "simulated"}, **changes)
    for number, line in enumerate(run.rounds, start=1):
        line["spent"] |= {"simulated_seconds": number * seconds, "joules": number * joules}
        line["simulated"] = {"seconds": seconds, "joules": joules}
    return run


def choosing(sets: Sequence[Sequence[int] | None], num_clients: int = 4, seed: int = 0, **changes: Any) -> Run:
    """A run that calls these clients in its rounds; None: everybody; an empty set: nobody."""
    run = run_of([0.5] * len(sets), seed=seed, clients__num_clients=num_clients, **changes)
    for line, of in zip(run.rounds, sets, strict=True):
        line["selected"] = num_clients if of is None else len(of)
        if of:
            line["chosen"] = list(of)
    return run


SLOW = [on_devices(seed=seed, seconds=30.0 + seed, name="random", selection={"name": "random"}) for seed in range(3)]
FAST = [
    on_devices([0.3, 0.6, 0.6, 0.7], seed=seed, seconds=10.0, joules=500.0, name="oort", selection={"name": "oort"})
    for seed in range(3)
]
PLAIN = [run_of(CURVE, seed=seed, name="favor", selection={"name": "favor"}) for seed in range(3)]


def named(runs: Sequence[Run]) -> dict[str, Method]:
    (task,) = split(runs)
    return {method.facts["selection.name"]: method for method in task.methods}


# ---- axes
def test_runs_without_devices_have_no_such_axis() -> None:
    (run,) = PLAIN[:1]
    assert [axis for axis in AXES if not run.has(axis)] == list(SIMULATED)
    assert all(np.isnan(run.spent(axis)).all() for axis in SIMULATED)
    (told,) = SLOW[:1]
    assert all(told.has(axis) for axis in AXES)
    assert told.spent("joules").tolist() == [400.0, 800.0, 1200.0, 1600.0]
    assert axes_of([method_of(PLAIN)], []) == ["rounds", "uplink_bytes", "total_bytes", "seconds"]
    assert axes_of([method_of(PLAIN), method_of(SLOW)], [])[-2:] == list(SIMULATED)
    partly = on_devices()
    del partly.rounds[2]["spent"]["joules"]
    assert (partly.has("joules"), partly.has("simulated_seconds")) == (False, True)


def test_what_is_simulated_is_compared_as_every_other_cost() -> None:
    of = named([*SLOW, *FAST])
    (task,) = split([*SLOW, *FAST])
    assert needed(of["random"], "simulated_seconds", 0.6).values == {0: 90.0, 1: 93.0, 2: 96.0}
    assert needed(of["oort"], "simulated_seconds", 0.6).values == dict.fromkeys(range(3), 20.0)
    assert needed(of["oort"], "joules", 0.6).mean == 1000.0
    found = ratio(of["oort"], of["random"], "simulated_seconds", 0.6)
    assert found.mean == pytest.approx(statistics.geometric_mean([20 / 90, 20 / 93, 20 / 96]))
    budgets = {budget.axis: budget for budget in budgets_of(task, [])}
    assert budgets["simulated_seconds"].amount == 40.0
    assert budgets["joules"].amount == 1600.0
    assert reached(of["random"], budgets["simulated_seconds"]).mean == pytest.approx(0.2)
    assert reached(of["oort"], budgets["simulated_seconds"]).mean == pytest.approx(0.7)
    assert [stretch.label for stretch in front(task, "simulated_seconds")] == ["oort", "random"]
    five = parse_budget("simulated_seconds=500")
    assert (five.axis, five.amount) == ("simulated_seconds", 500.0)


def test_methods_without_devices_have_no_figure_there_and_decide_nothing() -> None:
    of = named([*SLOW, *PLAIN])
    (task,) = split([*SLOW, *PLAIN])
    (budget,) = [budget for budget in budgets_of(task, []) if budget.axis == "joules"]
    assert budget.amount == 1600.0
    assert reached(of["favor"], budget).values == {}
    assert needed(of["favor"], "joules", 0.4).values == {}
    assert math.isnan(ratio(of["favor"], of["random"], "joules", 0.4).mean)
    assert {stretch.label for stretch in front(task, "joules")} == {of["random"].label}
    text = text_of([*SLOW, *PLAIN], [0.4])
    of_plain = [line.split("  ") for line in text.splitlines() if line.startswith("favor ")]
    assert of_plain
    assert all(cells[-1].strip() == "-" for cells in of_plain[:1])
    assert "none of 3" not in text
    assert "(k of n)" not in text
    assert "No devices are simulated in runs of favor" in " ".join(text.split())
    nobody = text_of(PLAIN, [0.4])
    assert "simulated" not in nobody
    assert "joules" not in nobody


def test_simulated_costs_are_named_as_such_everywhere() -> None:
    text = text_of([*SLOW, *FAST], [0.6], at=[parse_budget("simulated_seconds=35")])
    assert "at simulated" in text
    assert "35 s" in text
    assert "Bytes and simulated costs to an accuracy as a ratio to" in text
    said = " ".join(text.split())
    assert "Simulated seconds and joules are those of the devices that the section `devices` describes" in said
    table = text[text.index("To an accuracy of 0.6") :].splitlines()
    assert table[2].split() == ["method", "reached", "rounds", "uplink", "total", "seconds", "simulated", "joules"]
    assert "Hosts slept" not in said
    slept = [on_devices(devices={"name": "simulated", "mode": "sleep"})]
    assert "Hosts slept in runs of fedavg" in " ".join(cautions.cautions(split(slept)[0]))


def test_devices_that_calls_nobody_spend_nothing_and_are_no_bargain() -> None:
    idle = [
        on_devices([0.9] * 4, seed=seed, seconds=0.0, joules=0.0, algorithm="centralised", name="idle")
        for seed in range(3)
    ]
    (task,) = split([*SLOW, *idle])
    assert next(b for b in budgets_of(task, []) if b.axis == "joules").amount == 1600.0
    assert {stretch.label for stretch in front(task, "joules")} == {"random"}


def test_devices_make_a_method_and_none_is_as_before_there_were_any() -> None:
    (task,) = split([run_of([0.5]), run_of([0.5], seed=1, devices={"name": "none"})])
    assert len(task.methods) == 1
    (task,) = split([on_devices(), on_devices(seed=1, devices={"name": "simulated", "epoch_s": 1})])
    assert len(task.methods) == 2


def test_joules_are_written_in_a_unit_that_suits() -> None:
    assert [tables.quantity("joules", j) for j in (0, 5.5, 999, 15_500, 2.5e6)] == [
        "0 J", "5.500 J", "999 J", "15.50 kJ", "2.500 MJ",
    ]  # fmt: skip
    assert [tables.quantity("simulated_seconds", s) for s in (12.345, 900, 9000)] == ["12.35 s", "15.00 min", "2.500 h"]


def test_the_csv_has_them_where_they_are(tmp_path: Path) -> None:
    tables.write_csv(tmp_path / "x.csv", split([*SLOW, *FAST, *PLAIN]), None, [], [0.6], Final())
    table = rows(tmp_path / "x.csv")
    slow, fast, plain = "random", "oort", "favor"
    assert table[fast, "simulated_seconds_to_accuracy", "0.6"]["unit"] == "s"
    assert (
        table[fast, "joules_to_accuracy", "0.6"] | {"unit": "J", "mean": "1000"}
        == table[fast, "joules_to_accuracy", "0.6"]
    )
    assert (slow, "accuracy_at_joules", "1600") in table
    assert not any(method == plain and ("joules" in measure or "simulated" in measure) for method, measure, _ in table)
    baseline = table[fast, "final_accuracy", ""]["baseline"]
    assert baseline == plain  # no ratio to what has no devices
    assert not any("joules_to_accuracy_ratio" in measure for _, measure, _ in table)
    tables.write_csv(tmp_path / "y.csv", split([*SLOW, *FAST]), slow, [], [0.6], Final())
    told = rows(tmp_path / "y.csv")[fast, "joules_to_accuracy_ratio", "0.6"]
    assert float(told["mean"]) == pytest.approx(1000 / 1200)


def test_a_panel_draws_who_has_the_axis() -> None:
    from matplotlib import pyplot

    (task,) = split([*SLOW, *FAST, *PLAIN])
    figure, panel = pyplot.subplots()
    try:
        plot.draw_panel(panel, task, "joules", plot.styles_of([task]))
        lines = {str(line.get_label()): line for line in panel.get_lines()}
        assert set(lines) == {"random", "oort"}
        assert lines["oort"].get_xdata() == pytest.approx([0.5, 1.0, 1.5, 2.0]), "kJ"
        assert panel.get_xlabel() == "simulated energy of the clients' devices (kJ)"
    finally:
        pyplot.close(figure)


def test_damaged_figures_are_no_figures(tmp_path: Path) -> None:
    run = on_devices()
    run.rounds[1]["spent"]["joules"] = "many"
    run.rounds[2]["spent"]["simulated_seconds"] = -1.0
    of = read(written(run, tmp_path / "run"))
    assert [line["round"] for line in of.rounds] == [1, 4]


# ---- who was chosen
def test_jains_index_by_hand() -> None:
    assert jain([3, 3, 3, 3]) == 1.0
    assert jain([5, 0, 0, 0]) == 0.25
    assert jain([1, 2, 3]) == pytest.approx(36 / (3 * 14))
    assert math.isnan(jain([0, 0]))


def test_how_often_clients_were_chosen() -> None:
    runs = [choosing([[0, 1], [0, 2], [0, 1]]), choosing([[1, 2], [0, 3], [0, 1]], seed=1)]
    found = chosen(method_of(runs))
    assert found is not None
    assert found.least == {0: 0.0, 1: 1.0}
    assert found.median == {0: 1.5, 1: 1.5}
    assert found.most == {0: 3.0, 1: 2.0}
    assert found.never == {0: 1.0, 1: 0.0}
    assert found.jain == {0: pytest.approx(36 / (4 * 14)), 1: pytest.approx(36 / (4 * 10))}
    shares = shares_chosen(method_of(runs))
    assert shares is not None
    assert shares.tolist() == pytest.approx([(3 + 2) / 6, (2 + 2) / 6, (1 + 1) / 6, (0 + 1) / 6])


def test_everybody_and_nobody() -> None:
    assert choosing([None, None]).times_called is not None
    everybody = method_of([choosing([None, None])])
    assert not chooses(everybody)
    assert chosen(everybody) is not None
    nobody = method_of([choosing([[], []])])
    assert chosen(nobody) is None
    some = method_of([choosing([None, [], [2]])])
    assert some.runs[0].times_called is not None
    assert some.runs[0].times_called.tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": None, "selected": 2}, {"chosen": [9]}, {"chosen": [-1]}, {"chosen": "0"}, {"chosen": [True]},
        {"chosen": [0.5]}, {"chosen": None, "selected": None},
    ],
)  # fmt: skip
def test_what_a_run_does_not_say_is_not_made_up(change: dict[str, Any]) -> None:
    run = choosing([[0, 1], [0, 2]])
    run.rounds[1] |= change
    assert run.times_called is None
    assert chosen(method_of([run, choosing([[0, 1]], seed=1)])) is None
    odd = replace(run, config={**run.config, "clients": {"num_clients": "many"}})
    assert odd.times_called is None


def test_the_table_of_who_was_chosen_is_there_where_somebody_chooses(tmp_path: Path) -> None:
    picks = [
        choosing([[0, 1], [0, 2], [0, 1]], seed=seed, name="topk", selection={"name": "topk"}) for seed in range(2)
    ]
    whole = [choosing([None] * 3, seed=seed, name="random", selection={"name": "random"}) for seed in range(2)]
    older = [
        run_of([0.5] * 3, seed=seed, clients__num_clients=4, name="tifl", selection={"name": "tifl"})
        for seed in range(2)
    ]
    assert "In how many rounds" not in text_of(whole)
    text = text_of([*picks, *whole, *older])
    table = text[text.index("In how many rounds clients were chosen, mean over seeds") :].splitlines()
    of = {line.split()[0]: line.split()[1:] for line in table[:8] if line}
    assert of["topk"] == ["0.0", "1.5", "3.0", "1.0", "0.643", "±", "0.000"]
    assert of["random"] == ["3.0", "3.0", "3.0", "0.0", "1.000", "±", "0.000"]
    assert of["tifl"] == ["-"] * 5
    tables.write_csv(tmp_path / "x.csv", split([*picks, *whole, *older]), None, [], [0.5], Final())
    told = {key[1:]: row for key, row in rows(tmp_path / "x.csv").items() if key[0] == "topk"}
    assert [(told[f"chosen_{name}", ""]["mean"], told[f"chosen_{name}", ""]["unit"]) for name in ("most", "never")] == [
        ("3", "rounds"), ("1", "clients"),
    ]  # fmt: skip
    assert told["chosen_jain", ""]["values"] == ";".join([repr(36 / (4 * 14))] * 2)
    assert not any(key[0] == "tifl" and key[1].startswith("chosen") for key in rows(tmp_path / "x.csv"))


def test_a_panel_of_how_often_clients_were_chosen() -> None:
    from matplotlib import pyplot

    (task,) = split([choosing([[0, 1], [0, 2], [0, 1]]), run_of([0.5], "moon", clients__num_clients=4)])
    figure, panel = pyplot.subplots()
    try:
        plot.draw_chosen(panel, task, plot.styles_of([task]))
        (line,) = panel.get_lines()
        assert list(line.get_ydata()) == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert "share of the rounds" in panel.get_ylabel()
    finally:
        pyplot.close(figure)


# ---- the command
def test_the_command_takes_the_axes_and_draws_who_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in [*SLOW, *FAST]:
        written(run, tmp_path / "suite" / f"{run.config['selection']['name']}-{run.seed}")
    picture = tmp_path / "x.png"
    axes = ["--against", "simulated_seconds", "--against", "joules", "--chosen"]
    assert compare(monkeypatch, tmp_path / "suite", "--at", "simulated_seconds=35", "--plot", picture, *axes) == 0
    assert "35 s" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
    runs = gather([tmp_path / "suite"])[0]
    assert all(run.has("joules") for run in runs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--at", "joules=3"], "--at: no run here says what it cost in joules; run with devices=simulated"),
        (["--against", "simulated_seconds"], "--against: no run here says what it cost in simulated_seconds"),
        (["--chosen"], "--chosen: it is drawn into the file that --plot names; name one"),
        (["--at", "joules=0"], "--at: 'joules=0': the amount must be a number above 0"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    written(PLAIN[0], tmp_path / "run")
    assert compare(monkeypatch, tmp_path / "run", *options) == 2
    assert says in capsys.readouterr().err
