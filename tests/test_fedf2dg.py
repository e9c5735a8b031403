"""FedF2DG's protocol: its stages on every base, networks inverted at the server and at the clients alike, bytes by
the formulas of its module's table, choices of rounds and epochs, images that are not finite, bad settings. The
equations are in `test_fedf2dg_equations.py`, the inversion in `test_inversion.py`."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fldist
from fldist.algorithm import Me, Server, on_client
from fldist.algorithms.fedavg import FedAvg, Update
from fldist.algorithms.fedf2dg import FedF2dg, Kd, decoded, distil, encoded, quotas
from fldist.config import ConfigError, build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset
from fldist.data.task import Task
from fldist.fold import FoldContext, Mean, MeanAndEach, Refused
from fldist.inspection import predict_stages
from fldist.kinds import Weights
from fldist.models.train import Order
from fldist.params import Params
from fldist.runner import resume_here, run_here
from fldist.runtime.checkpoint import Checkpoints, ClientFiles
from fldist.runtime.membership import RunStopped
from tests.conftest import Hosts, Recorder, small

K, C, ROWS, PX = 4, 10, 24, 64
HOLDS = ([0, 1], [2], [3, 4, 5, 6], [0, 7, 8, 9])
"""By client: the classes of its samples; client 1 has a single one."""
NORM = {"name": "cnn_bn", "widths": [6, 8]}
BASES: list[Any] = ["fedavg", {"name": "fedprox", "mu": 0.1}, "scaffold", "fednova", {"name": "moon", "mu": 1.0}]


@dataclass(frozen=True)
class Skewed:
    """Four owners of `ROWS` rows of noise about a mean for each class."""

    def load(self) -> Dataset:
        rng = np.random.default_rng(1)
        means = rng.normal(size=(C, 1, 8, 8))
        y = np.concatenate([np.resize(held, ROWS) for held in HOLDS])
        x = (0.5 + 0.15 * means[y] + 0.05 * rng.normal(size=(len(y), 1, 8, 8))).clip(0, 1).astype(np.float32)
        owner = np.repeat(np.arange(K), ROWS)
        return Dataset(x, y, x[::2], y[::2], C, train_owner=owner, test_owner=owner[::2])


def f2dg(**changes: Any) -> dict[str, Any]:
    """Two federated rounds, two batches, a distillation, two hard rounds; `key=value` changes the algorithm, and
    `section__key=value` the rest."""
    algorithm: dict[str, Any] = {
        "name": "fedf2dg",
        "batches": 2,
        "hard_rounds": 2,
        "per_client": 12,
        "inversion": {"steps": 4},
        "kd_epochs": 2,
        "kd_batch_size": 16,
        "kd_lambda": 0.3,
    }
    other = {}
    for key, value in changes.items():
        if "__" in key or key in ("rounds", "algorithm", "faults", "topology", "stages", "stop"):
            other[key] = value
        else:
            algorithm[key] = value
    settings: dict[str, Any] = {
        "rounds": 7,
        "clients": {"num_clients": K},
        "task": {"data": "tests.test_fedf2dg:Skewed", "partition": "natural", "model": NORM},
        "local": {"epochs": 1, "batch_size": 8, "lr": 0.05, "momentum": 0.9},
        "algorithm": algorithm,
    }
    return small(**{**settings, **other})


def run(directory: Path, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = fldist.run(f2dg(**changes), output=directory)
    assert result["status"] == "finished"
    return result


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def logged(directory: Path) -> list[dict[str, float]]:
    return [line.get("log", {}) for line in lines(directory)]


def quota_rows(directory: Path, number: int) -> list[dict[str, str]]:
    with (directory / "tables" / f"round-{number:06d}-quotas.csv").open() as file:
        return list(csv.DictReader(file))


def model(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def same_model(one: Path, other: Path) -> bool:
    a, b = model(one), model(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def states(directory: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The server's values and the clients' after the last round."""
    found = Checkpoints(directory / "checkpoints").newest()
    assert found is not None
    _, values, facts, _ = found
    files = ClientFiles(directory / "clients")
    return values, {int(c): files.read(int(c), v) for c, v in facts["versions"].items()}


def sums(result: dict[str, Any], phase: str, way: str) -> int:
    return int(result["bytes"]["by_phase"].get(phase, {"up": 0, "down": 0})[way])


# ---- where networks are inverted
@pytest.mark.parametrize("base", BASES, ids=lambda b: b if isinstance(b, str) else b["name"])
def test_server_and_clients_make_the_same(tmp_path: Path, base: Any) -> None:
    """Property 14, on every base; the clients' models are those that the server has had."""
    at_server = run(tmp_path / "server", base=base)
    at_clients = run(tmp_path / "clients", base=base, generation="client")
    assert same_model(tmp_path / "server", tmp_path / "clients")
    assert logged(tmp_path / "server") == logged(tmp_path / "clients")
    assert [quota_rows(tmp_path / "server", n) for n in (3, 4, 6, 7)] == [
        quota_rows(tmp_path / "clients", n) for n in (3, 4, 6, 7)
    ]
    assert at_server["final"] == at_clients["final"]
    assert sums(at_server, "train", "up") == sums(at_clients, "train", "up")
    assert sums(at_server, "train", "down") == sums(at_clients, "train", "down")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"spread": True}),
        ({}, {"generation": "client", "send_logits": True}),
        ({"images_as": "uint8"}, {"images_as": "uint8", "generation": "client"}),
        ({"images_as": "float16"}, {"images_as": "float16", "generation": "client", "send_logits": True}),
        ({"student": "aggregate"}, {"student": "aggregate", "generation": "client"}),
        ({"hard_training": "first", "hard_batches": 2}, {"hard_training": "first", "hard_batches": 2, "spread": True}),
        ({"hard_batches": 2}, {"hard_batches": 2, "generation": "client"}),
        (
            {"select": "val", "task__split": {"val": 0.25}},
            {"select": "val", "task__split": {"val": 0.25}, "generation": "client"},
        ),
        ({"clients__fraction": 0.5}, {"clients__fraction": 0.5, "generation": "client"}),
        ({"base": "fednova", "task__travel": "floats"}, {"base": "fednova", "task__travel": "floats", "spread": True}),
    ],
)
def test_so_they_do_with_every_choice(tmp_path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    run(tmp_path / "one", **one)
    run(tmp_path / "other", **other)
    assert same_model(tmp_path / "one", tmp_path / "other")
    assert logged(tmp_path / "one") == logged(tmp_path / "other")


@pytest.mark.parametrize(
    ("topology", "how"),
    [
        ("collective", {"spread": True, "images_as": "uint8"}),
        ("star", {"generation": "client", "send_logits": True, "select": "val", "task__split": {"val": 0.25}}),
    ],
)
def test_ranks_change_nothing(tmp_path: Path, hosts: Hosts, topology: str, how: dict[str, Any]) -> None:
    settings = f2dg(**how)
    alone = fldist.run(settings, output=tmp_path / "alone")
    many = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["by_phase"] == alone["bytes"]["by_phase"]
    assert many["final"] == alone["final"]


def test_reduce_is_refused_with_a_word(tmp_path: Path, hosts: Hosts) -> None:
    with pytest.raises(ValueError, match="topology: reduce"):
        run_here(load(f2dg(topology="reduce", rounds=2)), nproc=2, output=tmp_path / "run", spawn=hosts)


# ---- bytes
def sizes(settings: dict[str, Any]) -> tuple[int, int]:
    """P and S of the model."""
    layout = build(load(settings)).task.layout
    return layout.num_params, layout.nbytes


def images_of(directory: Path, number: int) -> int:
    return sum(int(row["images"]) for row in quota_rows(directory, number))


@pytest.mark.parametrize("base", BASES, ids=lambda b: b if isinstance(b, str) else b["name"])
def test_the_base_s_messages_are_all_with_generation_at_the_server(tmp_path: Path, base: Any) -> None:
    """Property 20: FedAvg m 2 S, SCAFFOLD m (2 S + 8 P), FedNova 8 more; generation at the server adds nothing."""
    result = run(tmp_path / "run", base=base)
    p, s = sizes(f2dg())
    name = base if isinstance(base, str) else base["name"]
    trained = 4 * K  # two federated rounds and two hard ones
    more = {"scaffold": 4 * p}.get(name, 0)
    assert result["bytes"]["by_phase"].keys() == {"setup", "train"}
    assert result["bytes"]["by_phase"]["setup"] == {"up": K * 8 * C, "down": 0}
    assert sums(result, "train", "down") == trained * (s + more)
    assert sums(result, "train", "up") == trained * (s + more + (16 if name == "fednova" else 8))


@pytest.mark.parametrize(
    ("images_as", "how", "student"),
    [
        ("float32", "client", "previous"),
        ("float16", "client", "aggregate"),
        ("uint8", "logits", "previous"),
        ("float32", "spread", "previous"),
        ("uint8", "spread", "aggregate"),
    ],
)
def test_bytes_of_generation_are_those_of_the_formulas(tmp_path: Path, images_as: str, how: str, student: str) -> None:
    """Property 20: for each batch sum_i (8 C + 8 + 4 px M_i), once K S, nothing where the model was just sent."""
    fields: dict[str, Any] = {
        "client": {"generation": "client"},
        "logits": {"generation": "client", "send_logits": True},
        "spread": {"spread": True},
    }[how]
    result = run(tmp_path / "run", images_as=images_as, student=student, **fields)
    _, s = sizes(f2dg())
    made = [images_of(tmp_path / "run", number) for number in (3, 4, 6, 7)]
    batches, each = len(made) * K, {"float32": 4, "float16": 2, "uint8": 1}[images_as]
    coincides = how != "spread" and student == "previous"
    g = K * s * (1 if coincides else 3)
    w = batches * s if how == "spread" else 0
    logits = 4 * C * sum(made) if how == "logits" else 0
    scalars = batches * (16 if images_as == "uint8" else 8)
    assert sums(result, "generate", "down") == g + w + batches * 8 * C
    assert sums(result, "generate", "up") == each * PX * sum(made) + scalars + logits
    assert result["bytes"]["by_kind"]["images"] == {"up": each * PX * sum(made), "down": 0}
    assert result["bytes"]["by_kind"]["histogram"] == {"up": 0, "down": batches * 8 * C}


def test_choosing_by_validation_sends_a_model_and_a_number(tmp_path: Path) -> None:
    how: dict[str, Any] = {"select": "val", "task__split": {"val": 0.25}}
    result = run(tmp_path / "run", **how)
    _, s = sizes(f2dg(**how))
    scored = K * (2 + 2 + 2 * (1 + 2))  # rounds; epochs of the distillation; those of two hard rounds, and their start
    assert result["bytes"]["by_phase"]["score"] == {"up": 8 * scored, "down": s * scored}


@pytest.mark.parametrize(
    "how",
    [
        {"base": "scaffold"},
        {"generation": "client", "send_logits": True},
        {"spread": True, "images_as": "uint8", "student": "aggregate"},
        {"select": "val", "task__split": {"val": 0.25}, "generation": "client"},
    ],
)
def test_a_dry_run_foretells_the_bytes_of_every_stage(tmp_path: Path, how: dict[str, Any]) -> None:
    """Exactly, where each stage makes one batch: quotas of later ones follow losses."""
    short: dict[str, Any] = {"batches": 1, "hard_rounds": 1, "rounds": 5, **how}
    run(tmp_path / "run", **short)
    found: dict[str, dict[str, int]] = {}
    for line in lines(tmp_path / "run"):
        total = found.setdefault(line["stage"], {"up": 0, "down": 0})
        for way in total:
            total[way] += line["bytes"]["logical"][way]
    predicted = predict_stages(build(load(f2dg(**short))))
    assert not any(prediction.unknown for _, prediction in predicted)
    for stage, prediction in predicted:
        total = prediction.of_run(stage.rounds)
        total["down"] += K * sum(prediction.once.values())  # g, which every client is given once
        assert total == found[stage.name]


# ---- stages
@pytest.mark.parametrize(
    ("rounds", "fields", "lengths"),
    [
        (1, {}, [1, 0, 0, 0]),
        (2, {}, [1, 1, 0, 0]),
        (4, {}, [1, 2, 1, 0]),
        (5, {}, [1, 2, 1, 1]),
        (7, {}, [2, 2, 1, 2]),
        (101, {"batches": 10, "hard_rounds": 10}, [80, 10, 1, 10]),
        (9, {"batches": 1, "hard_rounds": 1}, [6, 1, 1, 1]),
        (5, {"batches": 1, "hard_rounds": 0}, [3, 1, 1, 0]),
    ],
)
def test_rounds_are_divided_among_the_stages(rounds: int, fields: dict[str, Any], lengths: list[int]) -> None:
    algorithm = build(load(f2dg(rounds=rounds, **fields))).algorithm
    stages = algorithm.stages(rounds)
    assert [s.rounds for s in stages] == lengths
    assert [s.name for s in stages] == ["federated", "generation", "distillation", "hard"]


def test_two_rounds_are_legal_and_said_to_be_few(tmp_path: Path) -> None:
    recorder = Recorder()
    run_here(load(f2dg(rounds=2)), output=tmp_path / "run", observer=recorder)
    assert [w for w in recorder.warnings if w.startswith("round 1: rounds: 2 of 6 that all stages")]
    assert [line["stage"] for line in lines(tmp_path / "run")] == ["federated", "generation"]


def test_each_stage_can_be_begun_from_the_end_of_the_one_before(tmp_path: Path) -> None:
    how: dict[str, Any] = {"base": "scaffold", "generation": "client"}
    whole = run(tmp_path / "whole", **how)
    run(tmp_path / "run", **how, stages=["federated"])
    for stages in (["federated", "generation"], ["federated", "generation", "distillation"], None):
        again = resume_here(tmp_path / "run", [f"stages={json.dumps(stages)}"])
    assert again["state_hash"] == whole["state_hash"]
    for stage, done in (("generation", 2), ("distillation", 4), ("hard", 5)):
        branch = tmp_path / stage
        again = resume_here(tmp_path / "whole", stage=stage, output=branch)
        assert again["state_hash"] == whole["state_hash"]
        assert lines(branch)[:done] == lines(tmp_path / "whole")[:done]
    other = resume_here(
        tmp_path / "whole", ["algorithm.kd_lambda=3.0"], stage="distillation", output=tmp_path / "other"
    )
    assert other["state_hash"] != whole["state_hash"]
    with pytest.raises(ValueError, match=r"algorithm\.per_client: stage generation reads it"):
        resume_here(tmp_path / "whole", ["algorithm.per_client=5"], stage="hard", output=tmp_path / "none")


@pytest.mark.parametrize("base", ["fedavg", "scaffold", "fednova", "moon", "fedprox"])
def test_the_federated_stage_is_the_base_alone(tmp_path: Path, base: str) -> None:
    run(tmp_path / "f2dg", base=base, rounds=6, batches=1, hard_rounds=0, generation="client")
    fldist.run(f2dg(algorithm={"name": base}, rounds=4), output=tmp_path / "base")
    ours, alone = lines(tmp_path / "f2dg")[:4], lines(tmp_path / "base")
    for one, other in zip(ours, alone, strict=True):
        assert (one["accuracy"], one["loss"]) == (other["accuracy"], other["loss"])
        assert one["bytes"]["by_kind"] == other["bytes"]["by_kind"]


@pytest.mark.parametrize("generation", ["server", "client"])
def test_hard_rounds_begin_with_fresh_variates(tmp_path: Path, generation: str) -> None:
    """The base begins anew with the hard stage: SCAFFOLD's variates are those of training from g with zeros."""
    run(tmp_path / "run", base="scaffold", rounds=6, hard_rounds=1, generation=generation)
    server, clients = states(tmp_path / "run")
    mean = sum(clients[k]["c"].floats.double() for k in range(K)) / K
    torch.testing.assert_close(server["c"].floats.double(), mean, atol=1e-6, rtol=1e-5)
    assert all(bool(clients[k]["begun_anew"]) for k in clients)


@dataclass(frozen=True)
class Traced(FedF2dg):
    """Notes which models are distilled, inverted and sent."""

    def train(self, server: Server, clients: Any, **options: Any) -> Any:
        SEEN.append(("train", server.round, server.x.clone()))
        got = super().train(server, clients, **options)
        SEEN.append(("aggregate", server.round, server.x.clone()))
        return got

    def generate_images(self, server: Server, clients: Any, g: Params, how: Any, batch: int = 0) -> Any:
        rows = super().generate_images(server, clients, g, how, batch)
        models = {k: m.clone() for k, m in server.models.items()}
        SEEN.append(("generate", server.round, g.clone(), how, server.members, models, dict(server.losses)))
        return rows

    def distilled(self, server: Server, clients: Any, start: Params, candidates: Any) -> Params:
        SEEN.append(("distil", server.round, start.clone(), len(server.pool), [sorted(b) for b in server.pool]))
        return super().distilled(server, clients, start, candidates)


SEEN: list[Any] = []
TRACED = "tests.test_fedf2dg:Traced"


def seen(what: str) -> list[Any]:
    return [entry for entry in SEEN if entry[0] == what]


@pytest.mark.parametrize("hard_training", ["every", "first"])
@pytest.mark.parametrize("student", ["previous", "aggregate"])
def test_which_model_is_what(tmp_path: Path, hard_training: str, student: str) -> None:
    SEEN.clear()
    run(tmp_path / "run", name=TRACED, hard_training=hard_training, student=student)
    trained = {entry[1]: entry[2] for entry in seen("train")}
    aggregates = {entry[1]: entry[2] for entry in seen("aggregate")}
    assert sorted(trained) == ([1, 2, 6, 7] if hard_training == "every" else [1, 2, 6])
    made = {entry[1]: entry for entry in seen("generate")}
    assert sorted(made) == [3, 4, 6, 7]
    distilled = {entry[1]: entry for entry in seen("distil")}
    assert sorted(distilled) == [5, 6, 7]
    # the common samples: of the last federated round's models, for its aggregate
    for number in (3, 4):
        assert made[number][2].equals(aggregates[2])
        assert made[number][3].alpha_c == 0.0
        total = sum(ROWS * m.floats.double() for m in made[number][5].values()) / (K * ROWS)
        torch.testing.assert_close(total, aggregates[2].floats.double(), atol=1e-6, rtol=0)
    assert distilled[5][2].equals(aggregates[2])
    assert distilled[5][3] == 2
    # the hard ones: against the distilled model, and against nothing of former rounds
    for number in (6, 7):
        assert made[number][3].alpha_c == 10.0
        assert made[number][2].equals(distilled[number][2])
        assert distilled[number][3] == 1
        trains = number in trained
        if student == "previous" and trains:
            assert distilled[number][2].equals(trained[number])
        elif trains:
            assert distilled[number][2].equals(aggregates[number])
    if hard_training == "first":
        assert all(made[7][5][k].equals(made[6][5][k]) for k in range(K))


@pytest.mark.parametrize("mix", [1 / 3, 1.0])
def test_quotas_follow_the_losses_of_the_batch_before(tmp_path: Path, mix: float) -> None:
    SEEN.clear()
    run(tmp_path / "run", name=TRACED, mix=mix, sharpness=2.0)
    task = build(load(f2dg())).task
    held = torch.from_numpy(task.label_counts())
    losses = {
        entry[1]: torch.tensor([entry[6][k] for k in range(K)], dtype=torch.float64) for entry in seen("generate")
    }
    for number, before in ((3, None), (4, losses[3]), (6, None), (7, losses[6])):
        wanted = quotas(held, 12, before, 2.0, mix)
        got = [[int(row[f"class_{c}"]) for c in range(C)] for row in quota_rows(tmp_path / "run", number)]
        assert got == wanted.tolist()
    for number in (3, 4, 6, 7):
        rows = quota_rows(tmp_path / "run", number)
        assert [float(row["loss"]) for row in rows] == pytest.approx(losses[number].tolist())
        assert logged(tmp_path / "run")[number - 1]["images"] == sum(int(row["images"]) for row in rows)


def test_only_who_took_part_is_inverted(tmp_path: Path) -> None:
    SEEN.clear()
    run(tmp_path / "run", name=TRACED, clients__fraction=0.5)
    for entry in seen("generate"):
        assert len(entry[4]) == 2
        assert sorted(entry[5]) == entry[4]
        assert [int(row["client"]) for row in quota_rows(tmp_path / "run", entry[1])] == entry[4]
        assert images_of(tmp_path / "run", entry[1]) <= 2 * 12


# ---- choosing
@dataclass(frozen=True)
class Scripted(FedF2dg):
    """Scores as a list says, in the order in which they are asked for."""

    def scored(self, server: Server, clients: Any, model: Params, stage: str) -> float:
        SEEN.append(("score", stage, model.clone()))
        return SCORES[len(seen("score")) - 1]


SCORES: list[float] = []


@pytest.mark.parametrize("scores", [[0.5, 0.2, 0.5], [0.1, 0.9, 0.3], [0.1, 0.2, 0.3]])
@pytest.mark.parametrize("select", ["best_test", "val"])
def test_the_best_round_is_the_snapshot_ties_to_the_later(tmp_path: Path, scores: list[float], select: str) -> None:
    SEEN.clear()
    SCORES[:] = [*scores, *([0.0] * 9)]
    run(
        tmp_path / "run",
        name="tests.test_fedf2dg:Scripted",
        select=select,
        task__split={"val": 0.25},
        rounds=5,
        batches=1,
        hard_rounds=0,
        stop={"rounds": 4},  # the distillation drops the models
    )
    best = max(range(3), key=lambda i: (scores[i], i))
    server, _ = states(tmp_path / "run")
    assert server["snapshot"] == best + 1
    assert server["x"].equals(seen("score")[best][2])
    total = sum(m.floats.double() for m in server["models"].values()) / K
    torch.testing.assert_close(total, server["x"].floats.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scores", [[0.4, 0.7], [0.7, 0.4], [0.5, 0.5]])
def test_the_best_epoch_is_kept_ties_to_the_later(tmp_path: Path, scores: list[float]) -> None:
    SEEN.clear()
    SCORES[:] = [0.1, *scores]
    run(
        tmp_path / "run",
        name="tests.test_fedf2dg:Scripted",
        select="best_test",
        rounds=3,
        batches=1,
        hard_rounds=0,
    )
    best = max(range(2), key=lambda i: (scores[i], i))
    server, _ = states(tmp_path / "run")
    assert server["x"].equals(seen("score")[1 + best][2])
    assert logged(tmp_path / "run")[2]["epoch"] == best + 1
    assert logged(tmp_path / "run")[2]["selection"] == scores[best]


@pytest.mark.parametrize(("start", "kept"), [(0.9, 0), (0.5, 2), (0.1, 2)])
def test_in_hard_rounds_the_model_before_competes(tmp_path: Path, start: float, kept: int) -> None:
    """Property 21."""
    SEEN.clear()
    SCORES[:] = [0.1, 0.0, 0.0, start, 0.3, 0.5]
    run(
        tmp_path / "run",
        name="tests.test_fedf2dg:Scripted",
        select="best_test",
        rounds=4,
        batches=1,
        hard_rounds=1,
    )
    server, _ = states(tmp_path / "run")
    assert server["x"].equals(seen("score")[3 + kept][2])


def test_by_the_test_set_accuracy_never_falls_in_hard_rounds(tmp_path: Path) -> None:
    result = run(tmp_path / "run", select="best_test", rounds=9, hard_rounds=4, kd_lr=0.5)
    accuracies = [line["accuracy"] for line in lines(tmp_path / "run")][4:]
    assert accuracies == sorted(accuracies)
    assert result["final"]["accuracy"] == accuracies[-1]


def test_a_choice_on_the_test_set_is_said_to_be_one(tmp_path: Path) -> None:
    recorder = Recorder()
    run_here(load(f2dg(select="best_test", rounds=2)), output=tmp_path / "run", observer=recorder)
    assert any("chooses on the test set" in warning for warning in recorder.warnings)


# ---- images
@pytest.mark.parametrize("how", ["float32", "float16", "uint8"])
def test_images_as_they_travel(how: Any) -> None:
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 3
    sent, span = encoded(x, how)
    assert sent.dtype is getattr(torch, how)
    step = float(x.max() - x.min()) / 255
    error = {"float32": 0.0, "float16": 5e-3, "uint8": step / 2 * 1.001}[how]
    assert float((decoded(sent, span) - x).abs().max()) <= error
    again, again_span = encoded(decoded(sent, span), how)
    assert torch.equal(again, sent)
    assert again_span is None or torch.allclose(again_span, span)


def test_images_of_one_value_survive_a_byte() -> None:
    x = torch.full((2, 1, 3, 3), 0.7)
    assert torch.allclose(decoded(*encoded(x, "uint8")), x)


@dataclass(frozen=True)
class Blows(FedF2dg):
    """Some networks' images are NaN, so many times."""

    clients: tuple[int, ...] = (2,)
    times: int = 1

    def made_once(self, task: Task, u: Any, student: Any, y: Tensor, how: Any, rng: Any, shift: Any) -> Any:
        reply = super().made_once(task, u, student, y, how, rng, shift)
        whose = [k for k in self.clients if y.unique().tolist() == HOLDS[k]]
        if whose and sum(entry == ("blow", whose[0]) for entry in SEEN) < self.times:
            SEEN.append(("blow", whose[0]))
            if reply.span is None:
                reply.x[0, 0, 0, 0] = math.nan
            else:
                reply.span[0] = math.nan
        return reply


@pytest.mark.parametrize("how", [{}, {"generation": "client"}, {"generation": "client", "images_as": "uint8"}])
@pytest.mark.parametrize("times", [1, 2])
def test_images_that_are_not_finite_are_made_again_once_and_then_named(
    tmp_path: Path, how: dict[str, Any], times: int
) -> None:
    SEEN.clear()
    recorder = Recorder()
    settings = f2dg(name="tests.test_fedf2dg:Blows", times=times, rounds=4, batches=2, hard_rounds=0, **how)
    result = run_here(load(settings), output=tmp_path / "run", observer=recorder)
    assert result["status"] == "finished"
    log = logged(tmp_path / "run")
    assert (tmp_path / "run" / "rank-0.log").read_text().count("they are made again") == 1
    named = [w for w in recorder.warnings if "client 2" in w and ("not finite, twice" in w or "nan" in w)]
    assert bool(named) == (times == 2)
    whole = images_of(tmp_path / "run", 2)
    lost = int(quota_rows(tmp_path / "run", 2)[2]["images"]) if times == 2 else 0
    assert log[1]["images"] == whole - lost
    assert log[2]["images"] == images_of(tmp_path / "run", 3)  # of the next batch nobody is left out
    assert all(torch.isfinite(t).all() for t in model(tmp_path / "run").values())
    if how:
        rows = [json.loads(line) for line in (tmp_path / "run" / "messages.jsonl").read_text().splitlines()]
        refused = [r for r in rows if r.get("status") == "refused" and r.get("phase") == "generate"]
        assert {r["client"] for r in refused} == ({2} if times == 2 else set())


def test_a_restart_draws_other_noise_the_same_at_server_and_clients(tmp_path: Path) -> None:
    how: dict[str, Any] = {"name": "tests.test_fedf2dg:Blows", "rounds": 4, "batches": 2, "hard_rounds": 0}
    for generation in ("server", "client"):
        SEEN.clear()
        run(tmp_path / generation, generation=generation, **how)
    assert same_model(tmp_path / "server", tmp_path / "client")
    run(tmp_path / "plain", rounds=4, batches=2, hard_rounds=0)
    assert not same_model(tmp_path / "server", tmp_path / "plain")


def test_where_nobody_s_images_are_finite_the_run_stops_and_says_so(tmp_path: Path) -> None:
    faults = {"on_quorum_loss": "stop"}
    how: dict[str, Any] = {"inversion": {"steps": 3, "lr": 1e38}, "batches": 1, "hard_rounds": 0}
    for generation in ("server", "client"):
        with pytest.raises(RunStopped, match="refused: x: nan"):
            run(tmp_path / generation, rounds=2, generation=generation, faults=faults, **how)
    recorder = Recorder()
    run_here(load(f2dg(rounds=3, **how)), output=tmp_path / "skips", observer=recorder)
    assert [line["committed"] for line in lines(tmp_path / "skips")] == [True, False, True]
    assert any("no images" in w for w in recorder.warnings)
    assert all(torch.isfinite(t).all() for t in model(tmp_path / "skips").values())


def test_empty_quotas_make_one_image_of_the_commonest_class_and_are_warned_of(tmp_path: Path) -> None:
    recorder = Recorder()
    run_here(load(f2dg(per_client=2, rounds=2)), output=tmp_path / "run", observer=recorder)
    rows = quota_rows(tmp_path / "run", 2)
    assert [int(row["images"]) for row in rows] == [2, 2, 1, 1]
    assert rows[2]["class_3"] == "1"
    assert rows[3]["class_0"] == "1"
    assert not any("per_client" in w for w in recorder.warnings)
    recorder = Recorder()
    run_here(
        load(f2dg(per_client=2, rounds=2, task__partition="iid", clients__num_clients=3)),
        output=tmp_path / "all",
        observer=recorder,
    )
    assert [int(row["images"]) for row in quota_rows(tmp_path / "all", 2)] == [1, 1, 1]
    assert any("per_client" in w for w in recorder.warnings)


def test_a_client_of_one_class_makes_images_of_it_alone(tmp_path: Path) -> None:
    run(tmp_path / "run")
    for number in (3, 4, 6, 7):
        row = quota_rows(tmp_path / "run", number)[1]
        assert int(row["class_2"]) == int(row["images"]) > 0


def test_pictures_show_a_row_for_each_client_and_a_column_for_each_class(tmp_path: Path) -> None:
    run(tmp_path / "run")
    pictures = sorted(p.name for p in (tmp_path / "run" / "images").iterdir())
    assert pictures == [f"round-{n:06d}-batch-{b}.png" for n, b in ((3, 1), (4, 2), (6, 1), (7, 1))]
    with Image.open(tmp_path / "run" / "images" / pictures[0]) as picture:
        assert picture.size == (C * 20 - 4, K * 20 - 4)
        pixels = np.asarray(picture.convert("L"))
    for k in range(K):
        for c in range(C):
            cell = pixels[k * 20 : k * 20 + 16, c * 20 : c * 20 + 16]
            assert (cell.min() < 255) == (c in HOLDS[k])
    run(tmp_path / "none", show=0, rounds=3)
    assert not (tmp_path / "none" / "images").exists()


def test_students_are_scored_after_each_distillation(tmp_path: Path) -> None:
    run(tmp_path / "run", eval__every=0)
    told = [log.get("student_accuracy") for log in logged(tmp_path / "run")]
    assert [a is not None for a in told] == [False] * 4 + [True] * 3
    assert all(0 <= log["teacher_accuracy"] <= 1 for log in logged(tmp_path / "run")[4:])


# ---- what is lost
@dataclass(frozen=True)
class NanAt(FedAvg):
    """Client 1 sends NaN in one round."""

    number: int = 2

    @on_client
    def update(self, me: Me, data: ClientData, x: Weights) -> Update:
        y = data.train(x).params
        if data.client == 1 and data.round == self.number:
            y.floats[0] = math.nan
        return Update(y, data.n)


@pytest.mark.parametrize("generation", ["server", "client"])
def test_a_last_federated_round_that_is_void_is_made_up_for(tmp_path: Path, generation: str) -> None:
    faults = {"min_replies": K, "on_quorum_loss": "skip"}
    base = {"name": "tests.test_fedf2dg:NanAt", "number": 2}
    run(tmp_path / "run", base=base, generation=generation, rounds=4, batches=1, hard_rounds=0, faults=faults)
    found = lines(tmp_path / "run")
    assert [line["committed"] for line in found] == [True, False, True, True]
    assert found[2]["bytes"]["by_phase"]["train"]["up"] > 0
    if generation == "client":
        _, clients = states(tmp_path / "run")
        assert all(list(clients[k]["models"]) == [3] for k in range(K))


@pytest.mark.parametrize("generation", ["server", "client"])
def test_a_model_that_was_refused_is_nobody_s_teacher(tmp_path: Path, generation: str) -> None:
    base = {"name": "tests.test_fedf2dg:NanAt", "number": 2}
    run(tmp_path / "more", base=base, generation=generation, rounds=4, batches=1, hard_rounds=0)
    assert [int(row["client"]) for row in quota_rows(tmp_path / "more", 3)] == [0, 2, 3]
    if generation == "client":
        _, clients = states(tmp_path / "more")
        assert {k: list(state["models"]) for k, state in clients.items()} == {0: [2], 1: [1], 2: [2], 3: [2]}


@pytest.mark.parametrize(
    ("how", "stop_at"),
    [
        ({"base": "scaffold", "generation": "client"}, 3),
        ({"base": "scaffold", "generation": "client"}, 6),
        ({"base": "moon", "images_as": "uint8"}, 4),
        ({"select": "val", "task__split": {"val": 0.25}, "generation": "client"}, 2),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path: Path, how: dict[str, Any], stop_at: int) -> None:
    whole = run(tmp_path / "whole", **how)
    run_here(load({**f2dg(**how), "stop": {"rounds": stop_at}}), output=tmp_path / "run")
    again = run_here(load_resumed(tmp_path / "run", ["stop.rounds=null"]), output=tmp_path / "run", resume=True)
    assert again["state_hash"] == whole["state_hash"]
    assert again["bytes"]["logical"] == whole["bytes"]["logical"]


# ---- the fold
def test_a_mean_that_notes_its_contributions_is_the_mean() -> None:
    task = build(load(f2dg())).task
    x = task.init_params()
    ys = {k: x * (1.0 + k) for k in range(3)}
    into: dict[int, Params] = {}
    plain, noting = (fold.begin(FoldContext(x, 10.0)) for fold in (Mean(by="n"), MeanAndEach.of(Mean(by="n"), into)))
    for accumulator in (plain, noting):
        for k, y in ys.items():
            accumulator.add(k, y, 1.0 + k)
    assert plain.result().equals(noting.result())
    assert into.keys() == ys.keys()
    noting.remove(1, ys[1], 2.0)
    assert into.keys() == {0, 2}
    bad = x.clone()
    bad.floats[0] = math.nan
    with pytest.raises(Refused):
        noting.add(1, bad, 1.0)
    assert into.keys() == {0, 2}
    with pytest.raises(ValueError, match="whole Params"):
        MeanAndEach(shape=(2,)).begin(FoldContext(x, 1.0))


# ---- bad settings
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"task__model": {"name": "mlp", "hidden": [8]}}, r"task\.model: .*no BatchNorm.*alpha_bn to 0"),
        ({"task__model": {"name": "cnn", "widths": [4]}}, r"task\.model: .*cnn_bn"),
        ({"base": "local"}, r"algorithm\.base: clients of Local"),
        ({"base": "fedzge"}, r"algorithm\.base: "),
        ({"base": "fedf2dg"}, r"algorithm\.base: "),
        ({"base": "fedavgg"}, r"algorithm\.base\.name: .*fedavg"),
        ({"base": {"name": "fedprox", "nu": 1}}, r"algorithm\.base\.nu: .*mu"),
        ({"base": {"name": "fedprox", "mu": -1}}, r"algorithm\.base\.mu: "),
        ({"base": 3}, r"algorithm\.base: "),
        ({"inversion": {"lr": 0}}, r"algorithm\.inversion\.lr: "),
        ({"inversion": {"stepz": 1}}, r"algorithm\.inversion\.stepz: .*did you mean algorithm\.inversion\.steps\?"),
        ({"per_client": 0}, r"algorithm\.per_client: "),
        ({"mix": 1.5}, r"algorithm\.mix: "),
        ({"generation": "nowhere"}, r"algorithm\.generation: "),
        ({"send_logits": True}, r"algorithm\.send_logits: .*generation: client"),
        ({"spread": True, "generation": "client"}, r"algorithm\.spread: .*generation: server"),
        ({"select": "val"}, r"algorithm\.select: .*task\.split\.val"),
        ({"select": "best_test", "generation": "client"}, r"algorithm\.select: "),
        ({"task__travel": "params"}, r"task\.travel: "),
        ({"base": "scaffold", "local__optimizer": "adam"}, r"scaffold is for SGD"),
    ],
)
def test_bad_settings(changes: dict[str, Any], what: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=what):
        build(load(f2dg(**changes)))


def test_a_network_without_batch_norm_can_be_inverted_where_that_is_said(tmp_path: Path) -> None:
    run(
        tmp_path / "run",
        task__model={"name": "cnn", "widths": [4], "hidden": []},
        inversion={"steps": 2, "alpha_bn": 0},
    )


def test_a_network_made_for_other_statistics_is_not_distilled() -> None:
    task = build(load(f2dg())).task
    with task.network(task.init_params()) as network, pytest.raises(ValueError, match=r"bn: eval.*'batch'"):
        next(distil(network, torch.zeros(4, 1, 8, 8), torch.zeros(4, C), Kd(bn="eval"), Order(4, 2, None)))
