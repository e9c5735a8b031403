"""An algorithm's own figures of a run: when it is asked for them, what it is told, and where they are written."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import pytest
import torch

import fldist
from fldist.algorithm import Books, on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.config import load, load_resumed
from fldist.fold import collect
from fldist.kinds import Once, Scalar, Weights
from fldist.runner import run_here
from fldist.runtime.signals import Interrupted
from tests.conftest import Hosts, Recorder, small
from tests.own import Nobody

MODEL_BYTES = 4 * (64 * 8 + 8 + 8 * 10 + 10)
KEYS = {"explored_bytes", "break_even_round", "replies", "drawn", "nothing"}


class Found(NamedTuple):
    y: Weights


@dataclass(frozen=True)
class Told(FedAvg):
    """FedAvg that explores before round 1 and sends a number once; counts what that cost."""

    share: float = 0.5  # of FedAvg's bytes that a round would spare
    wrong: str = ""

    def setup(self, server, clients):
        clients.all().call(self.explore, x=server.x, fold={"y": collect()}, phase="explore")

    @on_client
    def explore(self, me, data, x: Weights) -> Found:
        return Found(x.clone())

    def round(self, server, clients):
        server.x = clients.selected().call(self.update, x=server.x, fold={"y": collect()}).y[0]
        clients.selected().call(self.hear, number=Once(0.5, 1))

    @on_client
    def update(self, me, data, x: Weights) -> Found:
        return Found(data.train(x).params)

    @on_client
    def hear(self, me, data, number: Scalar) -> None:
        pass

    def summary(self, server, books):
        assert isinstance(books, Books)
        if self.wrong == "raises":
            raise ZeroDivisionError("no figures")
        if self.wrong == "words":
            return {"speed": "high"}
        explored = books.total("explore")
        spared = self.share * books.total("train", kind="weights") / books.rounds
        assert server.round == books.rounds == len(books.replied)
        server.x = server.x.zeros_like()
        return {
            "explored_bytes": explored,
            "break_even_round": explored / spared,
            "replies": torch.tensor(float(sum(books.replied))),
            "drawn": float(torch.rand(1)),
            "nothing": math.nan if self.wrong != "infinite" else math.inf,
        }


def settings(**fields):
    changes = {name: fields.pop(name) for name in ("rounds", "checkpoint") if name in fields}
    return small(
        algorithm={"name": "tests.test_summary:Told", **fields}, clients={"num_clients": 6, "per_round": 6}, **changes
    )


def of_file(directory: Path):
    return json.loads((directory / "result.json").read_text())


def test_sums_of_books():
    ways = {"up": 3, "down": 5}
    books = Books(2, [4, 4], {"train": {"weights": ways, "masks": {"up": 0, "down": 7}}, "explore": {"weights": ways}})
    assert books.total() == 23
    assert books.total("train") == 15
    assert books.total("train", "explore", way="down") == 17
    assert books.total(kind="masks") == books.total("train", kind="masks", way="down") == 7
    assert books.total("evaluate") == books.total(kind="logits") == 0


def test_a_run_has_its_algorithms_own_figures(tmp_path, capsys):
    result = fldist.run(settings(rounds=4), output=tmp_path / "run", progress=True)
    got = result["summary"]
    assert set(got) == KEYS
    assert got["explored_bytes"] == 6 * 2 * MODEL_BYTES
    assert type(got["explored_bytes"]) is int
    assert got["break_even_round"] == pytest.approx(2.0)
    assert got["replies"] == 4 * 6
    assert math.isnan(got["nothing"])
    written = of_file(tmp_path / "run")["summary"]
    assert written == {**got, "nothing": None}
    with h5py.File(tmp_path / "run" / "run.h5") as file:
        assert json.loads(file["result"].asstr()[()])["summary"] == written
    lines = capsys.readouterr().out.splitlines()
    assert f"explored_bytes {6 * 2 * MODEL_BYTES:,}" in lines
    assert "break_even_round 2" in lines
    assert "nothing nan" in lines
    assert lines.index("break_even_round 2") < next(i for i, text in enumerate(lines) if text.startswith("finished"))


def test_what_is_done_to_the_state_and_drawn_for_it_changes_nothing(tmp_path, monkeypatch):
    one = fldist.run(settings(), output=tmp_path / "one")
    monkeypatch.setattr(Told, "summary", FedAvg.summary)
    other = fldist.run(settings(), output=tmp_path / "other")
    assert other["summary"] == {}
    assert one["state_hash"] == other["state_hash"]
    model = "model/model.safetensors"
    assert (tmp_path / "one" / model).read_bytes() == (tmp_path / "other" / model).read_bytes()


def test_several_ranks_have_the_same_figures(tmp_path, hosts: Hosts):
    here = fldist.run(settings(), output=tmp_path / "here")["summary"]
    there = run_here(load(settings()), nproc=3, output=tmp_path / "there", spawn=hosts)["summary"]
    for summary in (here, there):
        assert math.isnan(summary.pop("nothing"))
    assert here == there


def test_a_run_that_went_on_has_the_figures_of_the_whole(tmp_path):
    whole = fldist.run(settings(rounds=4), output=tmp_path / "whole")
    fldist.run(settings(rounds=2), output=tmp_path / "run")
    assert of_file(tmp_path / "run")["summary"]["replies"] == 12
    run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    assert of_file(tmp_path / "run")["summary"] == of_file(tmp_path / "whole")["summary"]
    assert of_file(tmp_path / "run")["bytes"]["by_phase_and_kind"] == whole["bytes"]["by_phase_and_kind"]
    assert whole["bytes"]["by_phase_and_kind"] == {
        "explore.weights": {"up": 6 * MODEL_BYTES, "down": 6 * MODEL_BYTES},
        "hear.scalars": {"up": 0, "down": 6 * 8},
        "train.weights": {"up": 24 * MODEL_BYTES, "down": 24 * MODEL_BYTES},
    }


@pytest.mark.parametrize("round_", [0, 3])
def test_an_interrupted_run_has_figures_once_a_round_is_committed(tmp_path, round_):
    def interrupt(number: int) -> None:
        if number == round_:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_here(load(settings(rounds=9)), output=tmp_path / "run", observer=Recorder(interrupt))
    written = of_file(tmp_path / "run")
    assert written["status"] == "interrupted"
    if round_:
        assert written["summary"]["replies"] == 18
        assert written["summary"]["explored_bytes"] == 12 * MODEL_BYTES
    else:
        assert written["summary"] == {}


def test_a_run_of_which_no_round_counted_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Nobody, "summary", lambda self, server, books: {"rounds": books.rounds})
    result = fldist.run(small(algorithm="tests.own:Nobody"), output=tmp_path / "run")
    assert (result["status"], result["rounds"], result["summary"]) == ("finished", 2, {})


@pytest.mark.parametrize("wrong", ["raises", "words"])
def test_figures_that_cannot_be_had_cost_no_result(tmp_path, wrong):
    seen = Recorder()
    result = run_here(load(settings(wrong=wrong)), output=tmp_path / "run", observer=seen)
    assert (result["status"], result["summary"]) == ("finished", {})
    assert (tmp_path / "run" / "run.h5").is_file()
    assert any("no summary of the run: " in text for text in seen.warnings)


def test_infinity_is_written_as_null(tmp_path):
    fldist.run(settings(wrong="infinite"), output=tmp_path / "run")
    assert of_file(tmp_path / "run")["summary"]["nothing"] is None


def test_it_is_asked_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Told, "summary", lambda self, server, books: asked.append(books.rounds) or {})
    fldist.run(settings(rounds=3), output=tmp_path / "run")
    assert asked == [3]
