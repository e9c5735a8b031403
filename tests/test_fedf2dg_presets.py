"""The configurations of FedF2DG: the published values, the recommended ones, and who may look at the test set."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fldist.algorithms.scaffold import Scaffold
from fldist.config import components, load, make_algorithm
from fldist.data.augment import Augment
from fldist.data.partition import DirichletMin
from fldist.inversion import Inversion

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
    algorithm: Any = make_algorithm(settings.algorithm)
    wanted = SCRIPTS | CHOICES[kind]
    assert {key: getattr(algorithm, key) for key in wanted} == wanted
    assert algorithm.base == Scaffold()
    assert algorithm.inversion == Inversion(**INVERSION, alpha_bn=BN_WEIGHT[kind])
    assert settings.rounds == 80 + 10 + 1 + 10
    assert (settings.clients.num_clients, settings.clients.count()) == (10, 10)
    local = settings.local
    assert (local.epochs, local.batch_size, local.optimizer, local.lr) == (5, 64, "sgd", 0.01)
    assert (local.momentum, local.weight_decay, local.schedule, local.tail) == (0.9, 1e-5, "constant", "keep")
    assert components(settings).partition == DirichletMin(alpha=0.05, min_size=10)
    augment = {"cifar10": Augment(crop=4, flip=0.5), "cifar100": Augment(crop=4, flip=0.5, rotate=15)}
    assert settings.task.augment == augment.get(data, Augment())
    assert settings.task.model.name == ("resnet18_d2l" if data == "fashion-mnist" else "resnet18_32")
    assert (settings.task.normalize == "unit") == (data == "svhn")


def test_only_presets_that_say_so_choose_by_the_test_set() -> None:
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text()
        chosen = yaml.safe_load(text)["algorithm"].get("select") == "best_test"
        assert chosen == path.name.startswith("official-")
        assert chosen == ("ITS ACCURACIES ARE CHOSEN ON THE TEST SET" in text)
