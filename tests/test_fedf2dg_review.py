"""FedF2DG in unkind circumstances: replies that are lost or not finite, bases that send models otherwise, validation
parts without samples, several batches of a hard round, many clients."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fldist
from fldist.algorithm import Clients, Me, Server, State, on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.algorithms.fedf2dg import FedF2dg, Round, Scored
from fldist.config import ConfigError, build, load
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.inspection import predict_stages
from fldist.kinds import Scalar, Weights
from fldist.params import Params
from fldist.runner import run_here
from tests.conftest import Hosts, Recorder
from tests.test_fedf2dg import HOLDS, K, f2dg, lines, logged, model, quota_rows, run, same_model, states

SPOILT: list[int] = []


@dataclass(frozen=True)
class Spoils(FedF2dg):
    """The first images of client 2 have one value that is not finite."""

    value: float = math.inf

    def made_once(self, task: Task, u: Any, student: Any, y: Tensor, how: Any, rng: Any, shift: Any) -> Any:
        reply = super().made_once(task, u, student, y, how, rng, shift)
        if not SPOILT and y.unique().tolist() == HOLDS[2]:
            SPOILT.append(2)
            (reply.x.view(-1) if reply.span is None else reply.span)[0] = self.value
        return reply


@pytest.mark.parametrize("images_as", ["float32", "uint8"])
def test_infinite_images_are_made_again_wherever_they_are_made(tmp_path: Path, images_as: str) -> None:
    for generation in ("server", "client"):
        SPOILT.clear()
        how: dict[str, Any] = {"name": "tests.test_fedf2dg_review:Spoils", "images_as": images_as}
        run(tmp_path / generation, rounds=4, hard_rounds=0, generation=generation, **how)
        assert SPOILT == [2]
    assert logged(tmp_path / "client") == logged(tmp_path / "server")
    assert same_model(tmp_path / "server", tmp_path / "client")


@pytest.mark.parametrize("faults", [{"min_replies": "all"}, {"min_replies": "all", "on_quorum_loss": "retry"}])
def test_images_are_made_again_also_where_all_replies_are_needed(tmp_path: Path, faults: dict[str, Any]) -> None:
    SPOILT.clear()
    how: dict[str, Any] = {"name": "tests.test_fedf2dg_review:Spoils", "value": math.nan, "generation": "client"}
    run(tmp_path / "run", rounds=4, hard_rounds=0, faults=faults, **how)
    assert all(line["committed"] for line in lines(tmp_path / "run"))


def test_the_quotas_of_all_batches_of_a_hard_round_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", hard_batches=2, hard_rounds=1, rounds=6)
    rows = quota_rows(tmp_path / "run", 6)
    assert [int(row["batch"]) for row in rows] == [1] * K + [2] * K
    assert logged(tmp_path / "run")[5]["images"] == sum(int(row["images"]) for row in rows)


# ---- bases
@pytest.mark.parametrize("base", ["random_mask", "magnitude_mask", "prunefl", "efl_prune", "autoflip"])
def test_bases_whose_models_travel_in_parts_are_refused(base: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"algorithm\.base: "):
        build(load(f2dg(base=base)))


class Pong(NamedTuple):
    v: Scalar


@dataclass(frozen=True)
class Asks(FedAvg):
    """Every client is asked something, whether it trains or not."""

    def round(self, server: Server, clients: Clients) -> None:
        clients.all().call(self.ping)
        super().round(server, clients)

    @on_client
    def ping(self, me: Me, data: ClientData) -> Pong:
        return Pong(1.0)


@pytest.mark.parametrize("generation", ["server", "client"])
def test_only_who_has_trained_is_inverted(tmp_path: Path, generation: str) -> None:
    how: dict[str, Any] = {"base": "tests.test_fedf2dg_review:Asks", "clients__fraction": 0.5}
    run(tmp_path / "run", generation=generation, **how)
    assert all(len(quota_rows(tmp_path / "run", number)) == 2 for number in (3, 4, 6, 7))


@dataclass(frozen=True)
class Named(FedAvg):
    """Its state has a name that FedF2DG's has."""

    def init_server(self, task: Task) -> State:
        return State(x=task.init_params(), models=3)


def test_a_base_with_a_state_of_a_taken_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.base: .*models"):
        fldist.run(f2dg(base="tests.test_fedf2dg_review:Named", rounds=1), output=tmp_path / "run")


@dataclass(frozen=True)
class Looks(FedAvg):
    """It has something to say about what only the server sees."""

    def check_server(self, task: Task) -> None:
        raise ValueError("algorithm.base: the file is not there")


def test_a_base_may_refuse_what_the_server_sees(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the file is not there"):
        fldist.run(f2dg(base="tests.test_fedf2dg_review:Looks", rounds=1), output=tmp_path / "run")


# ---- choosing
@dataclass(frozen=True)
class Deaf(FedF2dg):
    """Round 2 is the best; client 0 does not score in round 3, and so does not learn it then."""

    def scored(self, server: Server, clients: Any, model: Params, stage: str) -> float:
        found = super().scored(server, clients, model, stage)
        return {2: 0.9}.get(server.round, 0.1) if stage == "federated" else found

    @on_client
    def score(self, me: Me, data: ClientData, x: Weights, best: Round | None) -> Scored:
        if (data.round, data.client) == (3, 0):
            raise RuntimeError("deaf")
        return FedF2dg.score(self, me, data, x, best)


def test_a_client_that_has_missed_a_scoring_still_has_its_model_of_the_best_round(tmp_path: Path) -> None:
    how: dict[str, Any] = {"name": "tests.test_fedf2dg_review:Deaf", "select": "val", "task__split": {"val": 0.25}}
    run(tmp_path / "run", generation="client", rounds=6, batches=1, hard_rounds=0, **how)
    assert logged(tmp_path / "run")[3]["snapshot"] == 2
    assert [line["missing"] for line in lines(tmp_path / "run")[3:]] == [{}, {}, {}]


def test_clients_do_not_keep_the_best_federated_model_in_hard_rounds(tmp_path: Path) -> None:
    how: dict[str, Any] = {"select": "val", "task__split": {"val": 0.25}, "generation": "client"}
    run(tmp_path / "run", rounds=9, hard_rounds=4, **how)
    _, clients = states(tmp_path / "run")
    assert {k: list(state["models"]) for k, state in clients.items()} == {k: [9] for k in range(K)}


def test_validation_parts_without_a_sample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.split\.val"):
        build(load(f2dg(select="val", task__split={"val": 0.01})))


def test_a_student_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    recorder = Recorder()
    run_here(load(f2dg(kd_lr=1e20, kd_lambda=1.0)), output=tmp_path / "run", observer=recorder)
    assert all(torch.isfinite(t).all() for t in model(tmp_path / "run").values())
    assert any("kd_lr" in warning for warning in recorder.warnings)


# ---- predictions
def test_a_prediction_counts_labels_a_few_times_for_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"clients__num_clients": 60, "task__data": "digits", "task__partition": "iid"}
    job = build(load(f2dg(generation="client", **how)))
    counts, asked = job.task.label_counts, [0]

    def counted() -> Any:
        asked[0] += 1
        return counts()

    monkeypatch.setattr(job.task, "label_counts", counted)
    predict_stages(job)
    assert asked[0] < 60


def test_a_prediction_divides_the_images_among_who_takes_part(tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "task__data": "digits",
        "task__partition": {"name": "dirichlet_min", "alpha": 0.3, "min_size": 10},
        "clients__num_clients": 6,
        "clients__fraction": 0.5,
        "generation": "client",
        "send_logits": True,
        "batches": 1,
        "hard_rounds": 0,
        "rounds": 3,
    }
    run(tmp_path / "run", **how)
    predicted = {stage.name: prediction for stage, prediction in predict_stages(build(load(f2dg(**how))))}
    assert predicted["generation"].training["up"] == lines(tmp_path / "run")[1]["bytes"]["logical"]["up"]


# ---- what is lost
@pytest.mark.parametrize(
    ("how", "moment", "number"),
    [
        ({"spread": True}, "computing", 4),
        ({"generation": "client", "base": "scaffold", "send_logits": True}, "computing the second call", 6),
    ],
)
def test_a_host_that_dies_among_the_inversions_leaves_no_trace(
    tmp_path: Path, hosts: Hosts, how: dict[str, Any], moment: str, number: int
) -> None:
    alone = run(tmp_path / "alone", **how)
    hosts.moments[1] = (moment, int(signal.SIGKILL), number, str(tmp_path / "mark"))
    settings = f2dg(faults={"min_replies": "all", "on_quorum_loss": "retry"}, **how)
    many = run_here(load(settings), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert (tmp_path / "mark").exists()
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["by_phase"] == alone["bytes"]["by_phase"]


@dataclass(frozen=True)
class Lost(FedF2dg):
    """The global model's losses are no numbers."""

    def made(self, *arguments: Any) -> Any:
        return super().made(*arguments)._replace(loss=math.nan)


@pytest.mark.parametrize("generation", ["server", "client"])
def test_losses_that_are_no_numbers_end_nothing(tmp_path: Path, generation: str) -> None:
    how: dict[str, Any] = {"name": "tests.test_fedf2dg_review:Lost", "rounds": 4, "hard_rounds": 0}
    run(tmp_path / "run", generation=generation, **how)
    assert all(line["committed"] for line in lines(tmp_path / "run"))
    first, second = quota_rows(tmp_path / "run", 2), quota_rows(tmp_path / "run", 3)
    assert [row["loss"] for row in first] == ["nan"] * K
    assert [row["images"] for row in second] == [row["images"] for row in first]
