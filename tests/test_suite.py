"""Suites: what a file means, and that runs are skipped, resumed, and go on beside one that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fldist import run as run_one
from fldist.algorithms.fedavg import FedAvg
from fldist.bench import suite as of_suite
from fldist.bench.shown import InLines
from fldist.bench.suite import Planned, Shown, laid_over, plan, read
from fldist.config import ConfigError, load
from tests.conftest import small

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Broken(FedAvg):
    def round(self, server, clients):
        raise RuntimeError("the algorithm is broken")


def written(tmp_path, **suite):
    path = tmp_path / "little.yaml"
    given = {"base": small(), "methods": {"fedavg": {}, "prox": {"algorithm": {"name": "fedprox", "mu": 0.1}}}}
    path.write_text(yaml.safe_dump({**given, **suite}))
    return path


# ---- files
def test_mappings_are_laid_over_key_by_key_but_components_whole():
    below = {"a": {"b": 1, "c": 2}, "algorithm": {"name": "fedprox", "mu": 1}, "d": 3}
    above = {"a": {"c": 9}, "algorithm": {"name": "fedavg"}, "e": {"f": 4}}
    assert laid_over(below, above) == {
        "a": {"b": 1, "c": 9}, "algorithm": {"name": "fedavg"}, "d": 3, "e": {"f": 4},
    }  # fmt: skip
    assert laid_over(below, {"algorithm": {"mu": 2}})["algorithm"] == {"name": "fedprox", "mu": 2}
    assert below["a"] == {"b": 1, "c": 2}


def test_a_plan_has_every_method_seed_and_task_seed_by_seed(tmp_path):
    tasks = {"iid": {}, "skewed": {"task": {"partition": {"name": "dirichlet", "alpha": 0.5}}}}
    suite = read(written(tmp_path, seeds=[3, 1], tasks=tasks))
    runs = plan(suite, tmp_path / "out", ["rounds=7"])
    assert [run.name for run in runs] == [
        f"{task}/{method}-s{seed}" for seed in (3, 1) for task in ("iid", "skewed") for method in ("fedavg", "prox")
    ]
    last = runs[-1]
    assert last.directory == tmp_path / "out" / "skewed" / "prox-s1"
    assert (last.settings.seed, last.settings.name, last.settings.rounds, last.of) == (1, "prox", 7, 7)
    assert last.settings.algorithm.fields == {"mu": 0.1}
    assert last.settings.task.partition.fields == {"alpha": 0.5}


def test_a_suites_own_keys_may_be_given_as_overrides(tmp_path):
    suite = read(written(tmp_path), ["seeds=[5]", "jobs=3", "nproc=2", "rounds=9"])
    assert (suite.name, suite.seeds, suite.jobs, suite.nproc) == ("little", [5], 3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, r"little\.yaml: methods: .*at least 1 item.*got \{\}"),
        ({"seed": 1}, r"little\.yaml: seed: unknown key; a suite has: name, base, tasks, methods, seeds, jobs, nproc"),
        ({"seeds": [-1]}, r"seeds\.0: .*greater than or equal to 0; got -1"),
        ({"seeds": [2, 0, 2]}, r"seeds: a seed is named twice, and a run of a method and seed has one directory; got"),
        ({"methods": {"a/b": {}}}, r"methods\.a/b.*: .*match pattern"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path, **changes))


def test_every_runs_configuration_is_checked_before_any_runs(tmp_path):
    suite = read(written(tmp_path, methods={"good": {}, "bad": {"algorithm": {"name": "fedprox", "nu": 1}}}))
    with pytest.raises(ConfigError, match=r"little: bad-s0: algorithm\.nu: fedprox has no such field; its fields: mu"):
        plan(suite, tmp_path / "out")


@pytest.mark.parametrize(
    ("methods", "overrides", "message"),
    [
        ({"a": {}}, ["seed=5"], r"seed=5: a suite gives every run its seed, by seeds: \[\.\.\.\]; remove it"),
        ({"a": {}}, ["name=b"], r"name=b: a suite gives every run its name, by the names of the methods; remove it"),
        ({"a": {}, "b": {"seed": 3}}, [], r"methods\.b\.seed: a suite gives every run its seed"),
    ],
)
def test_what_says_which_run_it_is_cannot_be_given_for_several(tmp_path, methods, overrides, message):
    """Else runs of one seed would lie in directories that say another."""
    with pytest.raises(ConfigError, match=message):
        plan(read(written(tmp_path, methods=methods), overrides), tmp_path / "out", overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "bench").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_suites_that_are_there_can_be_run(path, tmp_path):
    suite = read(path)
    runs = plan(suite, tmp_path)
    assert len({run.directory for run in runs}) == len(runs) >= 3
    assert suite.name == path.stem


def test_configurations_may_be_given_by_their_paths(tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(small(rounds=5)))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"local": {"lr": 0.5}}))
    suite = read(written(tmp_path, base="one.yaml", tasks={"a": "two.yaml", "b": {}}))
    runs = plan(suite, tmp_path / "out")
    assert [(run.name, run.settings.rounds, run.settings.local.lr) for run in runs[::2][:2]] == [
        ("a/fedavg-s0", 5, 0.5), ("b/fedavg-s0", 5, 0.05),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"little\.yaml: tasks\.a: there is no configuration .*three\.yaml"):
        read(written(tmp_path, tasks={"a": "three.yaml"}))


def test_a_suite_is_no_configuration_of_a_run():
    with pytest.raises(ConfigError, match=r"family\.yaml is a suite of runs; `fldist bench suite .*`"):
        load(ROOT / "configs" / "bench" / "family.yaml")


# ---- runs
class Seen(Shown):
    def __init__(self) -> None:
        self.states: list[tuple[str, str]] = []

    def changed(self, run: Planned) -> None:
        if (run.name, run.state) not in self.states:
            self.states.append((run.name, run.state))


def done(tmp_path, path, overrides=(), **options):
    suite = read(path, overrides)
    runs = plan(suite, tmp_path / "out", overrides)
    of_suite.execute(suite, runs, options.pop("shown", Shown()), **options)
    return {run.name: run for run in runs}


def test_a_suite_runs_skips_resumes_and_extends(tmp_path):
    path = written(tmp_path, seeds=[0, 1])
    seen = Seen()
    runs = done(tmp_path, path, shown=seen)
    assert {run.state for run in runs.values()} == {"finished"}
    assert [name for name, state in seen.states if state == "running"] == list(runs)
    alone = run_one({**small(), "seed": 1, "name": "fedavg"}, output=tmp_path / "alone")
    result = json.loads((tmp_path / "out" / "fedavg-s1" / "result.json").read_text())
    assert result["state_hash"] == alone["state_hash"]
    environment = json.loads((tmp_path / "out" / "prox-s0" / "environment.json").read_text())
    assert environment["suite"]["method"] == "prox"
    assert environment["suite"]["jobs"] >= 1
    assert "round 2/2" in (tmp_path / "out" / "prox-s0.log").read_text()

    before = {name: (tmp_path / "out" / name / "result.json").stat().st_mtime_ns for name in runs}
    (tmp_path / "out" / "prox-s1" / "result.json").unlink()  # as if it had been killed at its end
    again = done(tmp_path, path)
    assert {run.state for run in again.values()} == {"finished"}
    after = {name: (tmp_path / "out" / name / "result.json").stat().st_mtime_ns for name in runs}
    assert [name for name in runs if after[name] != before[name]] == ["prox-s1"]
    assert [run.skipped for run in again.values()] == [True, True, True, False]

    longer = done(tmp_path, path, ["rounds=4", "seeds=[1]"])
    assert [(run.result["rounds"], run.resumes) for run in longer.values()] == [(4, True), (4, True)]
    whole = run_one({**small(rounds=4), "seed": 1, "name": "fedavg"}, output=tmp_path / "whole")
    assert longer["fedavg-s1"].result["state_hash"] == whole["state_hash"]


def test_a_run_that_fails_stops_no_other_and_says_why(tmp_path):
    methods = {"broken": {"algorithm": {"name": f"{__name__}:Broken"}}, "fedavg": {}}
    path = written(tmp_path, seeds=[0], methods=methods)
    runs = done(tmp_path, path, jobs=1)
    assert {name: run.state for name, run in runs.items()} == {"broken-s0": "failed", "fedavg-s0": "finished"}
    assert "the algorithm is broken" in runs["broken-s0"].reason
    (line,) = of_suite.lines_of(list(runs.values()))
    assert line.startswith("broken-s0 failed: ")
    assert line.endswith(f"; see {tmp_path / 'out' / 'broken-s0.log'}")


def test_a_directory_with_another_run_is_left_alone(tmp_path):
    path = written(tmp_path, seeds=[0])
    done(tmp_path, path)
    runs = done(tmp_path, path, ["local.lr=0.5"])
    assert {run.state for run in runs.values()} == {"failed"}
    assert "holds a run with another configuration (local.lr); remove it, or give --output" in runs["prox-s0"].reason


def damage_config(directory):
    (directory / "config.yaml").write_text("{{{")


def take_out_stop(directory):
    result = json.loads((directory / "result.json").read_text())
    del result["stop"]
    (directory / "result.json").write_text(json.dumps(result))


def bar_the_log(directory):
    (directory / "result.json").unlink()
    directory.with_name("fedavg-s0.log").unlink()
    directory.with_name("fedavg-s0.log").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, r"cannot be read: .* is not valid YAML"),
        (take_out_stop, r"written by a version .* did not say `stop`"),
        (bar_the_log, r"fedavg-s0\.log cannot be written: Is a directory"),
    ],
)
def test_what_is_wrong_with_one_runs_files_stops_no_other(tmp_path, damage, message):
    path = written(tmp_path, seeds=[0], jobs=1)
    done(tmp_path, path)
    shutil.rmtree(tmp_path / "out" / "prox-s0")
    damage(tmp_path / "out" / "fedavg-s0")
    runs = done(tmp_path, path)
    assert {name: run.state for name, run in runs.items()} == {"fedavg-s0": "failed", "prox-s0": "finished"}
    assert re.search(message, runs["fedavg-s0"].reason)


def test_a_run_without_checkpoints_that_would_have_to_go_on_is_told_of(tmp_path):
    path = written(tmp_path, seeds=[0], base=small(checkpoint={"every": 0}), methods={"fedavg": {}})
    assert done(tmp_path, path)["fedavg-s0"].state == "finished"
    assert done(tmp_path, path)["fedavg-s0"].skipped
    longer = done(tmp_path, path, ["rounds=4"])["fedavg-s0"]
    assert (longer.state, longer.rounds) == ("failed", 2)
    assert f"{longer.directory} holds a run that has no checkpoints; remove it to run it" in longer.reason
    longer.state = "ended"
    (line,) = of_suite.lines_of([longer])
    assert "fedavg-s0: 2 of 4 rounds; " in line
    assert "has no checkpoints; remove it" in line


def test_a_log_on_a_full_disk_ends_no_run_and_hides_no_reason(tmp_path):
    path = written(tmp_path, seeds=[0], methods={"broken": {"algorithm": {"name": f"{__name__}:Broken"}}, "fedavg": {}})
    (tmp_path / "out").mkdir()
    for name in ("broken-s0", "fedavg-s0"):
        (tmp_path / "out" / f"{name}.log").symlink_to("/dev/full")
    runs = done(tmp_path, path, jobs=1)
    assert {name: run.state for name, run in runs.items()} == {"broken-s0": "failed", "fedavg-s0": "finished"}
    assert runs["broken-s0"].reason == "RuntimeError: the algorithm is broken (exit code 1)"


def test_a_run_that_another_suite_has_finished_meanwhile_is_not_run_again(tmp_path):
    path = written(tmp_path, seeds=[0], jobs=1)

    prox = {**small(algorithm={"name": "fedprox", "mu": 0.1}), "name": "prox"}

    class Other(Shown):
        def changed(self, run: Planned) -> None:
            if (run.name, run.state) == ("fedavg-s0", "finished"):
                run_one(prox, output=run.directory.with_name("prox-s0"))

    runs = done(tmp_path, path, shown=Other())
    assert {name: (run.state, run.skipped) for name, run in runs.items()} == {
        "fedavg-s0": ("finished", False), "prox-s0": ("finished", True),
    }  # fmt: skip


def test_runs_of_several_ranks(tmp_path):
    runs = done(tmp_path, written(tmp_path, seeds=[0], nproc=2, methods={"fedavg": {}}), jobs=1)
    assert runs["fedavg-s0"].result["backend"] == "gloo"


# ---- the command
def command(tmp_path, path, *more):
    return [sys.executable, "-m", "fldist", "bench", "suite", str(path), "--output", str(tmp_path / "out"), *more]


def wait_for(condition, limit_s=60.0):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGINT, True), (signal.SIGTERM, True)],
    ids=["SIGTERM", "SIGKILL", "Ctrl-C", "timeout"],
)
def test_a_suite_that_is_ended_leaves_no_process_and_goes_on(tmp_path, number, to_all):
    """Also one whose own process is killed outright: its runs notice that, and write what they have. A terminal, a
    scheduler and `timeout` send the signal to all processes at once."""
    path = written(tmp_path, seeds=[0], base=small(rounds=150), jobs=2)
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(tmp_path, path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines = [out / name / "rounds.jsonl" for name in ("fedavg-s0", "prox-s0")]
    wait_for(lambda: all(line.is_file() and line.read_text().count("\n") > 2 for line in lines))
    owners = [int((out / name / "owner.lock").read_text().rpartition(" ")[2]) for name in ("fedavg-s0", "prox-s0")]
    (os.killpg if to_all else os.kill)(process.pid, number)
    text, _ = process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in owners))
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        for name in ("fedavg-s0", "prox-s0"):
            assert re.search(rf"{name}: \d+ of 150 rounds; the same command goes on with it", text)
        assert "failed" not in text
    for name in ("fedavg-s0", "prox-s0"):
        assert json.loads((out / name / "result.json").read_text())["status"] == "interrupted"
    listed = [of_suite.settle(run) or run.rounds for run in plan(read(path), out)]
    assert all(2 < rounds < 150 for rounds in listed)
    shorter = done(tmp_path, path, jobs=2)
    assert {run.state for run in shorter.values()} == {"finished"}
    assert {run.result["rounds"] for run in shorter.values()} == {150}


def test_the_command_says_what_failed_and_ends_with_1(tmp_path):
    methods = {"broken": {"algorithm": {"name": f"{__name__}:Broken"}}, "fedavg": {}}
    path = written(tmp_path, seeds=[0], methods=methods)
    ended = subprocess.run(
        command(tmp_path, path), capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ}
    )
    assert ended.returncode == 1
    assert "2 runs" in ended.stdout
    assert "fedavg-s0: accuracy 0." in ended.stdout
    assert "broken-s0 failed: " in ended.stderr
    listed = subprocess.run(
        command(tmp_path, path, "--list"), capture_output=True, text=True, timeout=100, cwd=ROOT, check=True
    )
    assert listed.stdout.splitlines() == ["broken-s0  0/2 rounds  waiting", "fedavg-s0  2/2 rounds  finished"]


def test_progress_is_told_in_lines(tmp_path):
    console = Console(file=open(tmp_path / "said", "w"), width=200, highlight=False)  # noqa: SIM115
    done(tmp_path, written(tmp_path, seeds=[0]), jobs=1, shown=InLines(console))
    console.file.close()
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines[0] == "2 runs, 1 at a time"
    assert lines[1].startswith("[1/2] fedavg-s0: accuracy 0.")
    assert lines[2].startswith("[2/2] prox-s0: accuracy 0.")
    assert "left" in lines[1]
    assert "left" not in lines[2]

