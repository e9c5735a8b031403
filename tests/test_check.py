"""A run's files agree with each other, and a file that was changed, cut or lost is found."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fldist import run
from fldist.analysis.check import check
from fldist.config import load, load_resumed
from fldist.runner import run_here
from fldist.runtime.keeper import Keeper
from fldist.runtime.signals import Interrupted
from tests.conftest import Hosts, Recorder, small


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(small(rounds=3, eval={"where": "both"}), output=path)
    return path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def edit_lines(path, edit):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    edit(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_files_of_a_run_agree(whole):
    found = check(whole)
    assert found.failed == []
    assert found.unknown == []
    assert len(found.passed) == 13
    text = found.text()
    assert "rows of the ledger add up to the totals of result.json" in text
    assert "DIFFERS" not in text


@pytest.fixture
def simulated(tmp_path) -> Path:
    run(small(rounds=3, devices="simulated"), output=tmp_path / "run")
    found = check(tmp_path / "run")
    assert found.failed == []
    assert "simulated seconds and joules of the rounds add up to what is spent" in found.passed
    return tmp_path / "run"


def test_a_simulated_clock_that_does_not_add_up_is_found(simulated):
    def edit(lines):
        lines[1]["simulated"]["joules"] += 1.0

    edit_lines(simulated / "rounds.jsonl", edit)
    (line,) = [line for line in check(simulated).failed if "simulated" in line]
    assert line == "rounds.jsonl: simulated costs do not add up to what is spent (rounds 2)"


def test_a_simulated_clock_that_is_told_otherwise_in_the_end_is_found(simulated):
    result = json.loads((simulated / "result.json").read_text())
    result["simulated"]["seconds"] -= 1.0
    (simulated / "result.json").write_text(json.dumps(result))
    assert any(line.startswith("result.json: simulated is {'seconds'") for line in check(simulated).failed)


def test_joules_that_shrink_are_found(simulated):
    def edit(lines):
        lines[1]["spent"]["joules"] = 1e9

    edit_lines(simulated / "rounds.jsonl", edit)
    assert any("less is spent after a round than before it (3)" in line for line in check(simulated).failed)


@pytest.mark.parametrize("topology", ["star", "collective", "reduce"])
def test_the_files_of_runs_of_several_ranks_agree(tmp_path, hosts: Hosts, topology):
    config = small(rounds=3, topology=topology, algorithm={"name": "scaffold"}, eval={"where": "both"})
    run_here(load(config), nproc=3, output=tmp_path / "run", spawn=hosts)
    found = check(tmp_path / "run")
    assert (found.failed, found.unknown) == ([], [])


def test_the_files_of_a_run_that_went_on_agree(tmp_path):
    run(small(rounds=2), output=tmp_path / "run")
    run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    found = check(tmp_path / "run")
    assert (found.failed, found.unknown) == ([], [])


def test_the_files_of_a_run_that_was_interrupted_agree(tmp_path):
    def interrupt(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_here(load(small(rounds=9)), output=tmp_path / "run", observer=Recorder(interrupt))
    found = check(tmp_path / "run")
    assert found.failed == []
    assert "rounds.jsonl has every round from 1 to 3" in found.passed


def test_the_files_of_a_run_that_ended_again_before_its_next_round_agree(tmp_path):
    """Also run.h5, which was that of the end before."""
    run(small(rounds=2), output=tmp_path / "run")

    def interrupt(number: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_here(
            load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True,
            observer=Recorder(interrupt),
        )  # fmt: skip
    found = check(tmp_path / "run")
    assert (found.failed, found.unknown) == ([], [])
    assert found.run.status == "interrupted"


def test_the_files_of_a_run_that_was_killed_when_it_went_on_agree(tmp_path):
    run(small(rounds=2), output=tmp_path / "run")
    going_on = Keeper(tmp_path / "run", every=1, keep=2)
    going_on.resume([])  # what is left if the process is killed then
    found = check(tmp_path / "run")
    assert found.failed == []
    assert "run.h5: it is not there; it is written when a run ends" in found.unknown


def test_a_run_that_was_cut_off_is_checked_as_far_as_it_goes(copy):
    for name in ("result.json", "run.h5"):
        (copy / name).unlink()
    found = check(copy)
    assert found.failed == []
    assert len(found.unknown) == 3
    assert any("hold what every round says was exchanged" in line for line in found.passed)
    edit_lines(copy / "messages.jsonl", lose_half_a_round)
    failed = check(copy).failed
    assert failed[0] == "rounds.jsonl: more bytes are told than the ledger's rows give (rounds 2)"
    assert failed[-1].startswith("rounds.jsonl: spent.uplink_bytes of the last round is ")


def a_row(rows, **wanted):
    return next(row for row in rows if wanted.items() <= row.items())


def lose_half_a_round(rows):
    rows[:] = [row for row in rows if (row["round"], row["direction"]) != (2, "up")]


def change_a_row(rows):
    a_row(rows, row="kind", direction="up", phase="train", round=2)["encoded_bytes"] += 1


def lose_a_message(rows):
    rows.remove(a_row(rows, row="message", direction="down", round=2))


def lose_a_round(lines):
    del lines[1]


def spend_less(lines):
    lines[2]["spent"]["uplink_bytes"] = 5


def score_better(lines):
    lines[-1]["accuracy"] = 0.999


@pytest.mark.parametrize(
    ("name", "edit", "messages"),
    [
        (
            "messages.jsonl",
            change_a_row,
            [
                r"result\.json: encoded up: [\d,]+ B are told, the messages' rows give [\d,]+ B",
                r"result\.json: encoded_by_phase\.train up",
                r"rounds\.jsonl: spent\.uplink_bytes of the last round is",
            ],
        ),
        ("messages.jsonl", lose_a_message, [r"result\.json: framing down", r"result\.json: wire down"]),
        ("rounds.jsonl", lose_a_round, [r"rounds\.jsonl: 1 rounds are missing \(2\)", "run.h5: the rounds in it"]),
        ("rounds.jsonl", spend_less, [r"less is spent after a round than before it \(3\)", r"spent\.uplink_bytes of"]),
        ("rounds.jsonl", score_better, [r"result\.json: the final accuracy is 0\.\d+, rounds\.jsonl says 0\.999"]),
    ],
)
def test_what_does_not_agree_is_named(copy, name, edit, messages):
    edit_lines(copy / name, edit)
    found = check(copy)
    for message in [*messages, rf"run\.h5: since it was written, {name} was changed"]:
        assert any(re.search(message, line) for line in found.failed), (message, found.failed)
    assert "DIFFERS" in found.text()


def test_a_changed_configuration_is_found(copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["local"]["lr"] = 0.06
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    failed = check(copy).failed
    assert any(line.startswith("config.yaml has the hash ") for line in failed)
    assert "run.h5: the configuration in it is not that of the other files" in failed


def test_damaged_lines_are_found(copy):
    with (copy / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "accu')
    with (copy / "timeline.jsonl").open("a") as file:
        file.write("nonsense\n")
    failed = check(copy).failed
    assert "rounds.jsonl: 1 line is damaged and skipped (line 4; the last one ends in the middle)" in failed
    assert "timeline.jsonl: 1 line is damaged and skipped (line 5)" in failed


@pytest.mark.parametrize("missing", [{}, {"3": "deadline"}])
def test_a_call_may_be_known_to_have_arrived_after_the_last_round_where_a_client_was_missing(copy, missing):
    def change(lines):
        lines[0]["missing"] = missing
        lines[-1]["spent"]["downlink_bytes"] -= 1

    edit_lines(copy / "rounds.jsonl", change)
    found = [line for line in check(copy).failed if "spent.downlink_bytes of the last round is" in line]
    assert len(found) == (not missing)


def change_the_form_of_a_row(rows):
    a_row(rows, row="message")["direction"] = "sideways"


def take_a_kind_away(rows):
    del a_row(rows, row="kind")["kind"]


@pytest.mark.parametrize("edit", [change_the_form_of_a_row, take_a_kind_away])
def test_rows_of_another_form_are_found(copy, edit):
    edit_lines(copy / "messages.jsonl", edit)
    assert any("messages.jsonl, rounds.jsonl or result.json: it has not the form" in f for f in check(copy).failed)


def test_a_result_of_another_form_is_found(copy):
    result = json.loads((copy / "result.json").read_text())
    del result["final"], result["bytes"]["wire"]
    (copy / "result.json").write_text(json.dumps(result))
    failed = check(copy).failed
    assert any(line.startswith("rounds.jsonl or result.json: it has not the form") for line in failed)
    assert any(line.startswith("messages.jsonl, rounds.jsonl or result.json: it has not the form") for line in failed)


def test_a_round_of_another_form_is_found(copy):
    edit_lines(copy / "rounds.jsonl", lambda lines: lines[1].update(spent=None))
    failed = check(copy).failed
    assert "rounds.jsonl: 1 line has not what a round's line has: damaged and skipped" in failed
    assert "rounds.jsonl: 1 rounds are missing (2)" in failed


def test_a_number_of_rounds_that_cannot_be_takes_no_memory(copy):
    edit_lines(copy / "rounds.jsonl", lambda lines: lines[-1].update(round=10**15))
    assert any("999999999999997 rounds are missing (3, 4, 5 and 999999999999994 more)" in f for f in check(copy).failed)


def test_a_lost_file_is_found(copy):
    (copy / "model" / "model.safetensors").unlink()
    (copy / "timeline.jsonl").unlink()
    (line,) = check(copy).failed
    assert line == "run.h5: since it was written, timeline.jsonl is gone, model/model.safetensors is gone"


def test_a_damaged_run_h5_is_found(copy):
    data = (copy / "run.h5").read_bytes()
    (copy / "run.h5").write_bytes(data[: len(data) // 2])
    assert any(line.startswith("run.h5: ") and "damaged" in line for line in check(copy).failed)


def test_what_cannot_be_checked_is_refused(copy, tmp_path):
    with pytest.raises(ValueError, match=r"run\.h5: what is checked is a run's directory"):
        check(copy / "run.h5")
    (copy / "rounds.jsonl").write_text("")
    with pytest.raises(ValueError, match="no round was finished"):
        check(copy)


def test_the_command_says_what_differs_and_ends_with_1(whole, copy):
    command = [sys.executable, "-m", "fldist", "report", "--check"]
    good = subprocess.run([*command, str(whole)], capture_output=True, text=True, timeout=60, check=True)
    assert good.stdout.splitlines()[0] == str(whole)
    edit_lines(copy / "messages.jsonl", change_a_row)
    bad = subprocess.run([*command, str(whole), str(copy)], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1
    assert bad.stdout.count("DIFFERS") == 4
    assert not Path("report.html").exists()
