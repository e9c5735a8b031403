"""The configurations of FedF2DG: the published values, the recommended ones, and who may look at the test set."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fldist.config import load

CONFIGS = Path(__file__).parents[1] / "configs" / "fedf2dg"
OFFICIAL = ["cifar10", "cifar100", "svhn"]
RECOMMENDED = [*OFFICIAL, "fashion-mnist"]
INVERSION = {"steps": 2000, "lr": 0.1, "alpha_tv": 0.001, "alpha_l2": 0, "alpha_c": 0, "temperature_c": 3, "jitter": 2}
SCRIPTS = {
    "generation": "server",
    "batches": 10,
    "per_client": 256,
    "hard_rounds": 10,
    "hard_batches": 1,
    "alpha_c_hard": 10,
    "student": "previous",
    "kd_epochs": 30,
    "kd_lr": 0.01,
    "kd_momentum": 0.9,
    "kd_weight_decay": 1e-4,
    "kd_batch_size": 256,
    "kd_temperature": 3,
    "sharpness": 1,
    "mix": 1 / 3,
    "kd_reset": True,
}
CHOICES: dict[str, dict[str, Any]] = {
    "official": {"select": "best_test", "hard_training": "first", "kd_bn": "train", "kd_lambda": 1e-3},
    "recommended": {"select": "last", "hard_training": "every", "kd_bn": "eval", "kd_lambda": 0.3},
}
BN_WEIGHT = {"official": 1, "recommended": 10}


@pytest.mark.parametrize(
    ("kind", "data"), [("official", data) for data in OFFICIAL] + [("recommended", data) for data in RECOMMENDED]
)
def test_presets_are_the_published_scripts_but_for_the_recommended_choices(kind: str, data: str) -> None:
    settings = load(CONFIGS / f"{kind}-{data}.yaml")
    resolved = settings.resolved()
    algorithm = resolved["algorithm"]
    inversion = algorithm["inversion"]
    assert {key: algorithm[key] for key in SCRIPTS} == SCRIPTS
    assert {key: algorithm[key] for key in CHOICES[kind]} == CHOICES[kind]
    assert {key: inversion[key] for key in INVERSION} == INVERSION
    assert inversion["alpha_bn"] == BN_WEIGHT[kind]
    assert settings.rounds == 80 + 10 + 1 + 10
    assert (settings.clients.num_clients, settings.clients.count()) == (10, 10)
    local = settings.local
    assert (local.epochs, local.batch_size, local.optimizer, local.lr) == (5, 64, "sgd", 0.01)
    assert (local.momentum, local.weight_decay, local.schedule, local.tail) == (0.9, 1e-5, "constant", "keep")
    assert resolved["task"]["partition"] == {
        "name": "dirichlet_min", "alpha": 0.05, "min_size": 10, "attempts": 1000, "balanced": True,
    }  # fmt: skip
    augment = {"cifar10": (4, 0.5, 0), "cifar100": (4, 0.5, 15)}.get(data, (0, 0, 0))
    assert tuple(resolved["task"]["augment"][key] for key in ("crop", "flip", "rotate")) == augment
    assert resolved["task"]["model"]["name"] == ("resnet18_d2l" if data == "fashion-mnist" else "resnet18_32")
    assert (resolved["task"]["normalize"] == "unit") == (data == "svhn")


def test_only_presets_that_say_so_choose_by_the_test_set() -> None:
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text()
        chosen = yaml.safe_load(text)["algorithm"].get("select") == "best_test"
        assert chosen == path.name.startswith("official-")
        assert chosen == ("ITS ACCURACIES ARE CHOSEN ON THE TEST SET" in text)
