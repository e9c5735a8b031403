"""Trackers are told of a run, and none of them can end it."""

from __future__ import annotations

import builtins
from dataclasses import dataclass

import pytest

from fldist import run
from fldist.analysis.check import check
from fldist.config import ConfigError, load, load_resumed
from fldist.runner import run_here
from fldist.trackers import scalars
from tests.conftest import Recorder, small


def events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalar(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_the_numbers_of_a_line_have_paths():
    line = {
        "round": 3, "attempt": 0, "stage": "train", "committed": True, "accuracy": 0.5, "loss": None, "replied": 4,
        "scores": {"global": {"accuracy": 0.5}}, "missing": {"1": "deadline"}, "bytes": {"wire": {"up": 7, "down": 8}},
    }  # fmt: skip
    assert list(scalars(line)) == [
        ("accuracy", 0.5), ("replied", 4.0), ("scores/global/accuracy", 0.5), ("bytes/wire/up", 7.0),
        ("bytes/wire/down", 8.0),
    ]  # fmt: skip


def test_tensorboard_has_every_round_once_also_of_a_run_that_goes_on(tmp_path):
    directory = tmp_path / "run"
    lines = Recorder()
    settings = load(small(rounds=3, output={"trackers": ["tensorboard"]}))
    run_here(settings, output=directory, observer=lines)
    found = events(directory / "tensorboard")
    for tag, of in (
        ("accuracy", lambda line: line["accuracy"]),
        ("spent/uplink_bytes", lambda line: line["spent"]["uplink_bytes"]),
        ("bytes/by_kind/weights/up", lambda line: line["bytes"]["by_kind"]["weights"]["up"]),
        ("seconds/compute", lambda line: line["seconds"]["compute"]),
    ):
        assert scalar(found, tag) == [(line["round"], pytest.approx(of(line), rel=1e-6)) for line in lines.lines]
    assert b"num_clients: 6" in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    run_here(load_resumed(directory, ["rounds=5"]), output=directory, resume=True)
    again = events(directory / "tensorboard")
    assert [step for step, _ in scalar(again, "accuracy")] == [1, 2, 3, 4, 5]


def test_without_the_package_it_is_said_before_anything_runs(tmp_path, monkeypatch):
    whole = builtins.__import__

    def lacking(name, *rest, **options):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError("No module named 'tensorboard'")
        return whole(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ValueError, match=r"output\.trackers: tensorboard needs the package .* pip install"):
        run(small(output={"trackers": ["tensorboard"]}), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"output\.trackers\.0\.name: unknown name 'tensorbord'; did you mean"):
        load(small(output={"trackers": ["tensorbord"]}))
    with pytest.raises(ConfigError, match=r"output\.trackers\.0\.port: tensorboard has no such field"):
        load(small(output={"trackers": [{"name": "tensorboard", "port": 1}]}))


TOLD = []


@dataclass(frozen=True)
class Own:
    """A tracker of one's own, which fails in a round."""

    fails_in: int = 0

    def open(self, directory, config):
        TOLD.append((directory.name, config["seed"]))
        return OwnObserver(self.fails_in)


class OwnObserver(Recorder):
    def __init__(self, fails_in):
        super().__init__()
        self.fails_in = fails_in

    def round(self, line):
        TOLD.append(line["round"])
        if line["round"] == self.fails_in:
            raise RuntimeError("the network is down")


def test_a_tracker_of_ones_own_is_told_and_cannot_end_the_run(tmp_path):
    TOLD.clear()
    seen = Recorder()
    name = f"{__name__}:Own"
    config = small(rounds=3, output={"trackers": [{"name": name, "fails_in": 2}, {"name": name}]})
    result = run_here(load(config), output=tmp_path / "run", observer=seen)
    assert result["status"] == "finished"
    assert TOLD == [("run", 0), ("run", 0), 1, 1, 2, 2, 3]
    assert seen.warnings == ["OwnObserver is told no more of this run: RuntimeError: the network is down"]
    assert [line["round"] for line in seen.lines] == [1, 2, 3]


def test_trackers_may_change_in_a_run_that_goes_on(tmp_path):
    run(small(), output=tmp_path / "run")
    settings = load_resumed(tmp_path / "run", ["rounds=3", "output.trackers=[tensorboard]"])
    run_here(settings, output=tmp_path / "run", resume=True)
    assert [step for step, _ in scalar(events(tmp_path / "run" / "tensorboard"), "accuracy")] == [3]


@dataclass(frozen=True)
class Emptying:
    """Takes what it is told apart."""

    def open(self, directory, config):
        return self

    def started(self, facts):
        facts.clear()

    def round(self, line):
        line["bytes"].clear()
        line.clear()

    def warning(self, text): ...
    def stopped(self, text): ...

    def finished(self, result):
        result.clear()


def test_what_a_tracker_does_to_what_it_is_told_changes_nothing(tmp_path):
    result = run(small(output={"trackers": [f"{__name__}:Emptying"]}), output=tmp_path / "run")
    assert result["status"] == "finished"
    assert result["final"]["accuracy"] is not None
    assert check(tmp_path / "run").failed == []
