"""Runs of several stages: what clients know of the stage, and what is written, kept and begun again at their ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fldist
from fldist.algorithm import Clients, Me, Server, Stage, State, on_client
from fldist.config import load
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.fold import Mean
from fldist.kinds import Scalar, Weights
from fldist.runner import run_here
from tests.conftest import Hosts, small
from tests.own import Base
from tests.test_launch import ROOT, mpirun


class Told(NamedTuple):
    y: Weights
    n: Scalar
    stage: Scalar


@dataclass(frozen=True)
class Three(Base):
    """Three stages, in which clients add 1, `add` and `last` to the model and note the stage."""

    middle: int = 2  # rounds of the second stage
    end: int = 1  # rounds of the third
    add: float = 2.0
    last: float = 3.0

    def init_client(self, task: Task, client: int) -> State:
        return State(seen=[])

    def setup(self, server: Server, clients: Clients) -> None:
        self._exchange(server, clients)

    def stages(self, rounds: int) -> list[Stage]:
        return [
            Stage("first", rounds - self.middle - self.end, self._exchange),
            Stage("middle", self.middle, self._exchange),
            Stage("end", self.end, self._exchange),
        ]

    def _exchange(self, server: Server, clients: Clients) -> None:
        got = clients.selected().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        server.x = got.y
        server.log(told=sum(got.stage.values()) / len(got.stage))

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Told:
        y = x.clone()
        y.floats += (1.0, self.add, self.last)[me.stage]
        me.seen = [*me.seen, me.stage]
        return Told(y, data.n, me.stage)


THREE = "tests.test_stages:Three"


def config(rounds: int = 5, *, algorithm: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return small(rounds=rounds, algorithm={"name": THREE, **(algorithm or {})}, **changes)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def told(directory: Path) -> list[tuple[str, float]]:
    return [(line["stage"], line["log"]["told"]) for line in lines(directory)]


# ---- me.stage
IN_TURN = [("first", 0.0), ("first", 0.0), ("middle", 1.0), ("middle", 1.0), ("end", 2.0)]


@pytest.mark.parametrize("nproc", [1, 3])
def test_a_client_knows_the_stage_of_the_call(tmp_path: Path, hosts: Hosts, nproc: int) -> None:
    run_here(load(config()), nproc=nproc, output=tmp_path / "run", spawn=hosts)
    assert told(tmp_path / "run") == IN_TURN


def test_a_client_knows_the_stage_under_mpi(tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text(json.dumps([{"config": config(), "output": str(tmp_path / "run")}]))
    done = mpirun(2, [str(ROOT / "tests" / "mpi_runs.py"), str(tmp_path / "jobs.json")])
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "run") == IN_TURN


def test_stages_without_rounds_count_too(tmp_path: Path) -> None:
    fldist.run(config(3, algorithm={"middle": 0, "end": 3}), output=tmp_path / "run")
    assert told(tmp_path / "run") == [("end", 2.0)] * 3
