"""FedKTL's bytes to the last one, against the closed formulas of its module's table, and the published CIFAR-100
setting with synthetic data. The equations are in `test_fedktl_equations.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fldist
from fldist.config import build, load
from fldist.data.datasets import Dataset
from fldist.inspection import predict

CLASSES, CLIENTS, ROUNDS = 6, 4, 3
SHAPE = (1, 8, 8)
LATENT, FEATURES = 5, 16
ROWS = 20
HOLDS = ([0, 1], [1], [2, 3, 4], [0, 3, 4])
"""By client: the classes of its samples. Nobody has class 5."""
M = [len(held) for held in HOLDS]
BYTES = {"float32": 4, "float16": 2, "uint8": 1}
CNN = {"name": "cnn", "widths": [4], "hidden": []}
WIDE = {"name": "cnn", "widths": [7], "hidden": []}
MLP = {"name": "mlp", "hidden": [40]}
By = dict[str, int]


def made(holds: list[list[int]], rows: int, classes: int, shape: tuple[int, ...]) -> Dataset:
    """Noise; client i is an owner of so many rows, whose labels are its classes in turn."""
    labels = np.concatenate([np.resize(held, rows) for held in holds])
    owner = np.repeat(np.arange(len(holds)), rows)
    x = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    n = len(holds)
    return Dataset(x, labels, x[::rows], labels[::rows], classes, train_owner=owner, test_owner=np.arange(n))


@dataclass(frozen=True)
class Small:
    """Four clients of `ROWS` rows."""

    def load(self) -> Dataset:
        return made([list(held) for held in HOLDS], ROWS, CLASSES, SHAPE)


@dataclass(frozen=True)
class Hundred:
    """Twenty clients with 45 or 44 of 100 classes, 898 in all, as many as the published figures imply."""

    def load(self) -> Dataset:
        return made(published(), 50, 100, (3, 32, 32))


def published() -> list[list[int]]:
    return [sorted((5 * i + j) % 100 for j in range(45 if i < 18 else 44)) for i in range(20)]


def config(**changes: Any) -> dict[str, Any]:
    """`algorithm__field=value` changes the algorithm, `section__key=value` the rest."""
    found: dict[str, Any] = {
        "name": "bytes",
        "rounds": ROUNDS,
        "clients": {"num_clients": CLIENTS},
        "task": {
            "data": "tests.test_fedktl_bytes:Small",
            "partition": "natural",
            "model": CNN,
            "feature_dim": FEATURES,
        },
        "local": {"epochs": 1, "batch_size": 10, "lr": 0.01},
        "algorithm": {
            "name": "fedktl",
            "generator": {"name": "toy", "latent_dim": LATENT},
            "server_epochs": 1,
            "show_every": 0,
        },
        "eval": {"every": 0},
    }
    for key, value in changes.items():
        at = found
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return found


@dataclass(frozen=True)
class Told:
    """A run's bytes: in the ledger by phase, round and client, and in its result."""

    ledger: dict[tuple[str, int, int], By]
    result: dict[str, Any]

    def of(self, phase: str, round_: int) -> dict[int, By]:
        return {client: found for (p, r, client), found in self.ledger.items() if (p, r) == (phase, round_)}

    @property
    def by_kind(self) -> By:
        """Of training, in the whole run, without zeros."""
        kinds = self.result["bytes"]["by_kind"]
        return {f"{kind} {way}": n for kind, ways in kinds.items() for way, n in ways.items() if n}


def run(directory: Path, **changes: Any) -> Told:
    result = fldist.run(config(**changes), output=directory)
    assert result["status"] == "finished"
    ledger: dict[tuple[str, int, int], By] = defaultdict(lambda: defaultdict(int))
    for line in (directory / "messages.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["row"] == "kind" and row["logical_bytes"]:
            assert row["status"] == "delivered"
            mine = ledger[row["phase"], row["round"], row["client"]]
            mine[f"{row['kind']} {row['direction']}"] += row["logical_bytes"]
    return Told({key: dict(value) for key, value in ledger.items()}, result)


def up(m: int, d: int = CLASSES) -> By:
    return {"prototypes up": 4 * m * d, "labels up": 4 * m}


def pairs(n: int, h: int = LATENT, pixels: int = 64, images: str = "float32", vectors: str = "float32") -> By:
    return {"images down": n * pixels * BYTES[images], "latents down": n * h * BYTES[vectors]} if n else {}


SEEDS = {"seeds down": 16}
TENSORS = {"weights down": 4 * CLASSES * CLASSES + 4 * (FEATURES + 1) * LATENT}


@pytest.mark.parametrize(("setup_by", "setup"), [("seed", SEEDS), ("tensor", TENSORS)])
def test_bytes_are_those_of_the_formulas(tmp_path: Path, setup_by: str, setup: By) -> None:
    """What is set up goes to everybody once; there are no pairs in the first round, then one for each class that
    anybody has."""
    told = run(tmp_path / "run", algorithm__setup_by=setup_by)
    known = len({c for held in HOLDS for c in held})
    want = {("setup", 0, k): setup for k in range(CLIENTS)}
    for r in range(1, ROUNDS + 1):
        want |= {("train", r, k): up(M[k]) | pairs(known if r > 1 else 0) for k in range(CLIENTS)}
    assert told.ledger == want
    each = {kind: ROUNDS * sum(up(m)[kind] for m in M) for kind in up(1)}
    each |= {kind: (ROUNDS - 1) * CLIENTS * n for kind, n in pairs(known).items()}
    assert told.by_kind == each
    logical, phases = told.result["bytes"]["logical"], told.result["bytes"]["by_phase"]
    assert logical["up"] == ROUNDS * sum(m * (4 * CLASSES + 4) for m in M)
    assert logical["down"] == (ROUNDS - 1) * CLIENTS * 4 * known * (64 + LATENT)
    assert phases["setup"] == {"up": 0, "down": CLIENTS * sum(setup.values())}


@pytest.mark.parametrize("dim", ["classes", "least", 9])
def test_how_it_is_set_up_changes_no_bit_of_the_outcome(tmp_path: Path, dim: Any) -> None:
    one, other = (run(tmp_path / by, algorithm__setup_by=by, algorithm__etf_dim=dim) for by in ("seed", "tensor"))
    assert one.result["state_hash"] == other.result["state_hash"]


@pytest.mark.parametrize("setup_by", ["seed", "tensor"])
@pytest.mark.parametrize("dim", ["least", 9])
def test_bytes_follow_the_dimension_of_the_classifier(tmp_path: Path, dim: Any, setup_by: str) -> None:
    told = run(tmp_path / "run", rounds=1, algorithm__setup_by=setup_by, algorithm__etf_dim=dim)
    d = CLASSES - 1 if dim == "least" else dim
    assert told.of("train", 1) == {k: up(m, d) for k, m in enumerate(M)}
    matrices = {"weights down": 4 * CLASSES * d + 4 * (FEATURES + 1) * LATENT}
    assert told.of("setup", 0) == dict.fromkeys(range(CLIENTS), SEEDS if setup_by == "seed" else matrices)


@pytest.mark.parametrize(("images", "vectors"), [("uint8", "float32"), ("float32", "float16"), ("uint8", "float16")])
def test_pairs_in_smaller_numbers(tmp_path: Path, images: str, vectors: str) -> None:
    told = run(tmp_path / "run", rounds=2, algorithm__images_as=images, algorithm__vectors_as=vectors)
    want = {k: up(m) | pairs(5, images=images, vectors=vectors) for k, m in enumerate(M)}
    assert told.of("train", 2) == want


def test_pairs_of_classes_that_nobody_has(tmp_path: Path) -> None:
    told = run(tmp_path / "run", rounds=2, algorithm__never_seen="random")
    assert told.of("train", 1) == {k: up(m) for k, m in enumerate(M)}
    assert told.of("train", 2) == {k: up(m) | pairs(CLASSES) for k, m in enumerate(M)}


def test_upload_does_not_depend_on_the_models(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    other = run(tmp_path / "other", clients__models=[MLP, WIDE, CNN], task__feature_dim=31)
    assert one.ledger == other.ledger
    sizes = [build(load(config(task__model=model))).task.layout.nbytes for model in (CNN, WIDE, MLP)]
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_fedproto_uploads_k_values_where_fedktl_uploads_c(tmp_path: Path, tail: str) -> None:
    local = {"epochs": 1, "batch_size": 8, "lr": 0.01, "order": "fixed", "tail": tail}
    ktl = run(tmp_path / "ktl", local=local).by_kind
    proto = run(tmp_path / "proto", local=local, algorithm={"name": "fedproto"}).by_kind
    assert proto["prototypes up"] * CLASSES == ktl["prototypes up"] * FEATURES
    assert proto["labels up"] == ktl["labels up"]


def test_download_does_not_depend_on_how_many_classes_a_client_has(tmp_path: Path) -> None:
    told = run(tmp_path / "run")
    down = [{kind: n for kind, n in told.of("train", 2)[k].items() if kind.endswith("down")} for k in range(CLIENTS)]
    assert len(set(M)) > 1
    assert all(mine == pairs(5) for mine in down)


@pytest.mark.parametrize(("tail", "m"), [("drop", 40), ("keep", None)])
def test_classes_that_training_never_gets_to_are_not_uploaded(tmp_path: Path, tail: str, m: int | None) -> None:
    """In fixed order, batches of 40 leave out the last 10 of 50 rows, and with them 4 or 5 classes."""
    told = run(
        tmp_path / "run",
        rounds=1,
        clients__num_clients=20,
        task__data="tests.test_fedktl_bytes:Hundred",
        algorithm__generator={"name": "toy", "latent_dim": LATENT, "image_shape": [3, 32, 32]},
        local={"epochs": 1, "batch_size": 40, "lr": 0.01, "order": "fixed", "tail": tail},
    )
    assert told.of("train", 1) == {k: up(m or len(held), 100) for k, held in enumerate(published())}


def test_who_is_not_selected_is_sent_nothing_and_knows_the_classes_of_others(tmp_path: Path) -> None:
    told = run(tmp_path / "run", clients__per_round=2, rounds=4, seed=1)
    known: set[int] = set()
    cohorts = []
    for r in range(1, 5):
        found = told.of("train", r)
        assert len(found) == 2
        assert found == {k: up(M[k]) | pairs(len(known)) for k in found}
        known |= {c for k in found for c in HOLDS[k]}
        cohorts.append(set(found))
    assert len({frozenset(c) for c in cohorts}) > 1
    assert set(told.of("setup", 0)) == set(range(CLIENTS))


def test_the_control_exchanges_nothing(tmp_path: Path) -> None:
    told = run(tmp_path / "run", algorithm__mu=0)
    assert told.by_kind == {}
    assert told.ledger == {("setup", 0, k): {"seeds down": 8} for k in range(CLIENTS)}


def test_scores_are_booked_apart(tmp_path: Path) -> None:
    without, scored = run(tmp_path / "without"), run(tmp_path / "scored", eval={"every": 1})
    assert scored.by_kind == without.by_kind
    assert {key: n for key, n in scored.ledger.items() if key[0] != "evaluate"} == without.ledger
    assert all("down" not in kind for key, found in scored.ledger.items() if key[0] == "evaluate" for kind in found)


@pytest.mark.parametrize("setup_by", ["seed", "tensor"])
def test_a_dry_run_foretells_them(tmp_path: Path, setup_by: str) -> None:
    """But for the number of pairs, where nobody can say which classes are uploaded."""
    changes = {"algorithm__setup_by": setup_by, "algorithm__never_seen": "random"}
    told, foretold = run(tmp_path / "run", **changes), predict(build(load(config(**changes))))
    assert foretold.of_run(ROUNDS) == told.result["bytes"]["logical"]


def test_the_published_setting(tmp_path: Path) -> None:
    """CIFAR-100, 20 clients, 898 classes held in all, H = K = 512: 0.09 million numbers up and 7.17 down in a round."""
    assert sum(len(held) for held in published()) == 898
    told = run(
        tmp_path / "run",
        rounds=2,
        clients__num_clients=20,
        task__data="tests.test_fedktl_bytes:Hundred",
        task__model={"name": "cnn", "widths": [2], "hidden": []},
        task__feature_dim=512,
        algorithm__generator={"name": "toy", "latent_dim": 512, "image_shape": [3, 32, 32]},
        algorithm__setup_by="tensor",
    )
    first, second = (
        {kind: sum(found.get(kind, 0) for found in told.of("train", r).values()) for kind in up(1) | pairs(1)}
        for r in (1, 2)
    )
    numbers = {kind: n // 4 for kind, n in second.items()}
    assert numbers == {
        "prototypes up": 89_800,
        "labels up": 898,
        "images down": 20 * 100 * 3 * 32 * 32,
        "latents down": 20 * 100 * 512,
    }
    assert numbers["images down"] + numbers["latents down"] == 7_168_000
    assert first == second | {"images down": 0, "latents down": 0}
    assert told.result["bytes"]["logical"] == {"up": 2 * 898 * (4 * 100 + 4), "down": 4 * 7_168_000}
    assert told.of("setup", 0)[0] == {"weights down": 4 * 100**2 + 1_050_624}
