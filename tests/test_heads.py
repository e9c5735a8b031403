"""Models whose classifiers are replaced: `task.feature_dim`, and algorithms with another number of outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from fldist import models, run
from fldist.algorithms.fedavg import FedAvg
from fldist.config import ConfigError, build, load, make_algorithm
from fldist.inspection import describe, dry_run
from fldist.models.layers import AdaptedHead, feature_dim, features_and_logits, head_names
from tests.conftest import small

MODELS = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [9, 24]}, {"name": "cnn_bn", "widths": [4, 6]}]


@dataclass(frozen=True)
class TwoMore(FedAvg):
    """Models have two outputs beyond the classes."""

    def outputs(self, classes: int) -> int:
        return classes + 2


@dataclass(frozen=True)
class Few(FedAvg):
    """As an algorithm that can tell five classes apart."""

    def outputs(self, classes: int) -> int:
        raise ValueError(f"algorithm.few: {classes} classes are more than five; use other data")


def task_of(**changes):
    return build(load(small(**changes))).task


def mixed(**changes):
    return task_of(algorithm="local", clients={"num_clients": 6, "models": MODELS}, **changes)


def test_every_model_gets_features_of_the_size_asked_for():
    task = mixed(task__feature_dim=12)
    assert (task.feature_dim, task.num_outputs, task.num_classes) == (12, 10, 10)
    assert len(task.architectures) == 3  # the task's model is the first one
    for client in range(6):
        module = task.frozen_copy(task.init_params(client, whole=True), client)
        features, outputs = features_and_logits(module, task.blank(3))
        assert (features.shape, outputs.shape) == ((3, 12), (3, 10))
        width = (8, 24, 6)[client % 3]
        x, _ = task.rows(client)
        features, _ = features_and_logits(module, x)
        base = dict(module.named_modules())
        name = next(n for n, layer in base.items() if isinstance(layer, AdaptedHead))
        whole = nn.Sequential(*list(module)[: int(name)])(x)
        assert whole.shape[1] == width
        torch.testing.assert_close(features, nn.functional.adaptive_avg_pool1d(whole[:, None], 12)[:, 0])


def test_the_base_starts_as_it_would_without_and_the_head_is_drawn_behind_it():
    plain, wide = mixed(), mixed(task__feature_dim=12)
    for before, after in zip(plain.architectures, wide.architectures, strict=True):
        old, new = before.template.state_dict(), after.template.state_dict()
        base = set(new) - set(head_names(after.template))
        assert base == set(old) - set(head_names(before.template))
        assert all(torch.equal(old[name], new[name]) for name in base)
        assert after.batch_norm == before.batch_norm


def test_initial_models_of_ones_own_have_replaced_heads_too():
    task = task_of(task__feature_dim=12, clients__init="own")
    first, second = task.init_params(0), task.init_params(1)
    assert first.layout == task.layout
    assert not torch.equal(first.floats, second.floats)
    assert torch.equal(first.floats, task_of(task__feature_dim=12, clients__init="own").init_params(0).floats)


def test_without_the_key_sizes_are_the_models_own():
    assert task_of().feature_dim == 8
    with pytest.raises(
        ValueError,
        match=r"^task\.feature_dim: .* of several sizes, 8 \(mlp.*\), 24 \(mlp.*\), 6 \(cnn_bn.*\); set it$",
    ):
        _ = mixed().feature_dim


def test_nothing_is_replaced_where_nothing_is_asked_for():
    assert not any(isinstance(layer, AdaptedHead) for layer in task_of().architectures[0].template.modules())


def test_runs_of_adapted_models_train_and_are_pruned_or_counted_as_far_as_can_be(tmp_path):
    result = run(small(rounds=6, task__feature_dim=32, local__lr=0.3), output=tmp_path / "run")
    assert result["final"]["accuracy"] > 0.5
    task = task_of(task__feature_dim=32)
    assert result["bytes"]["by_kind"]["weights"]["up"] == 6 * 6 * task.layout.nbytes
    assert task.layout.num_params == 64 * 8 + 8 + 32 * 10 + 10
    assert task.structure().num_units == 0  # averages mix the units
    assert task.macs().total == 64 * 8 + 32 * 10


def test_an_algorithm_says_how_many_outputs_models_have(tmp_path):
    config = small(algorithm=f"{__name__}:TwoMore", clients={"num_clients": 6, "init": "own"})
    task = build(load(config)).task
    assert (task.num_outputs, task.num_classes, task.feature_dim) == (12, 10, 8)
    module = task.architectures[0].template
    assert isinstance(module[-1].adapter, nn.Identity)
    assert module(task.blank(2)).shape == (2, 12)
    assert module.training
    assert task.init_params(3).layout == task.layout
    assert run(config, output=tmp_path / "run")["status"] == "finished"


def test_an_algorithm_may_refuse_a_number_of_classes():
    with pytest.raises(ValueError, match=r"^algorithm\.few: 10 classes are more than five"):
        build(load(small(algorithm=f"{__name__}:Few")))


class Convolutional(nn.Module):
    """Has no linear layer."""

    def __init__(self, shape, classes):
        super().__init__()
        self.last = nn.Conv2d(shape[0], classes, shape[1:])

    def forward(self, x):
        return self.last(x).flatten(1)


class Rows(nn.Module):
    """Classifies every row of an image, and takes the mean."""

    def __init__(self, shape, classes):
        super().__init__()
        self.last = nn.Linear(shape[2], classes)

    def forward(self, x):
        return self.last(x[:, 0]).mean(1)


class GoesOn(nn.Module):
    """Has a layer behind its classifier that needs as many outputs as there are classes."""

    def __init__(self, shape, classes):
        super().__init__()
        self.last = nn.Linear(shape[0] * shape[1] * shape[2], classes)
        self.norm = nn.BatchNorm1d(classes)

    def forward(self, x):
        return self.norm(self.last(x.flatten(1)))


@pytest.mark.parametrize(
    ("model", "changes", "key", "why"),
    [
        ("Convolutional", {"task__feature_dim": 4}, "task.feature_dim", "Convolutional has no linear layer to take"),
        ("Rows", {"task__feature_dim": 4}, "task.feature_dim", "the model goes on behind its last linear layer, or g"),
        ("GoesOn", {"algorithm": f"{__name__}:TwoMore"}, "task.model", ""),
    ],
)
def test_a_classifier_that_cannot_be_replaced_is_refused_by_name(model, changes, key, why):
    name = f"{__name__}:{model}"
    build(load(small(task__model=name)))
    with pytest.raises(ValueError, match=f"^{key}: the classifier of {name} cannot be replaced: {why}"):
        build(load(small(**changes, task__model=name)))


def test_a_number_of_features_is_at_least_one():
    with pytest.raises(ConfigError, match=r"^task\.feature_dim: input should be greater than or equal to 1; got 0"):
        load(small(task__feature_dim=0))


def test_embeddings_do_not_follow_the_outputs():
    """A network on text knows as many symbols as there are classes, whatever its outputs are."""
    from fldist.models.layers import adapted
    from fldist.models.lstm import NextCharLstm

    made = adapted(NextCharLstm().build((7,), 11), None, 10)
    assert made.embedding.num_embeddings == 11
    assert feature_dim(made) == 256


# ---- families
FAMILIES = {
    "htfe2": "cnn4 resnet18",
    "htfe3": "resnet10 resnet18 resnet34",
    "htfe4": "cnn4 googlenet mobilenet_v2 resnet18",
    "htfe8": "cnn4 googlenet mobilenet_v2 resnet18 resnet34 resnet50 resnet101 resnet152",
    "htfe9": "resnet4 resnet6 resnet8 resnet10 resnet18 resnet34 resnet50 resnet101 resnet152",
    "htm10": "cnn4 googlenet mobilenet_v2 resnet18 resnet34 resnet50 resnet101 resnet152 vit_b16 vit_b32",
}


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_family_stands_for_its_models_in_order(name):
    settings = load(small(algorithm="local"), [f"clients.models={name}"])
    assert [model.name for model in settings.clients.models] == FAMILIES[name].split()
    listed = load(small(algorithm="local", clients={"num_clients": 6, "models": FAMILIES[name].split()}))
    assert settings == listed
    assert settings.resolved()["clients"]["models"] == [{"name": member} for member in FAMILIES[name].split()]


def test_clients_have_the_models_of_a_family_in_turn():
    config = small(algorithm="local", clients={"num_clients": 5, "models": "htfe2"}, task__resize=16)
    config["task"] |= {"feature_dim": 32, "split": {"test": 0.2}}
    shown = dry_run(load(config), 1)
    task = build(load(config)).task
    assert [task.architecture(client).name for client in range(5)] == ["cnn4", "resnet18"] * 2 + ["cnn4"]
    sizes = [task.layout_of(client).num_params for client in range(2)]
    assert f"\nmodel cnn4: {sizes[0]:,} parameters, clients 0, 2, 4\nmodel resnet18: {sizes[1]:,} parameters, " in shown
    assert "parameters, clients 1, 3\n" in shown
    assert task.feature_dim == 32


def test_families_are_told_where_they_may_be_used():
    assert "(clients.models: a list, or htfe2, htfe3, htfe4, htfe8, htfe9, htm10)." in describe("local")
    assert "htfe2" not in describe("fedavg")


def test_one_model_is_not_listed():
    assert "\nmodel " not in dry_run(load(small()), 1)


@pytest.mark.parametrize("partition", ["dirichlet", "pathological"])
@pytest.mark.parametrize(("data", "classes"), [("cifar10", 2), ("cifar100", 10)])
def test_presets_are_the_published_settings(data, classes, partition):
    settings = load(Path(__file__).parents[1] / "configs" / "fedktl" / f"{data}-{partition}.yaml")
    assert (settings.clients.num_clients, settings.clients.count()) == (20, 20)
    assert [model.name for model in settings.clients.models] == FAMILIES["htfe8"].split()
    assert settings.task.split.sizes(10) == (7, 0, 3)
    assert all(settings.task.split.sizes(n)[0] == 3 * n // 4 for n in range(1, 500))
    wanted = {
        "dirichlet": {"alpha": 0.1, "min_size": 40, "balanced": True},
        "pathological": {"per_client": classes, "balanced": True},
    }
    assert settings.task.partition.fields == wanted[partition]
    assert (settings.rounds, settings.stop.patience, settings.task.feature_dim) == (2001, 100, 512)
    assert (settings.local.batch_size, settings.local.lr, settings.local.epochs) == (10, 0.01, 1)
    assert (settings.local.order, settings.local.tail, settings.local.momentum) == ("fixed", "drop", 0.0)
    assert (settings.task.merged, settings.task.normalize) == (True, "symmetric")
    made = make_algorithm(settings.algorithm)
    assert (made.mu, made.lambda_, made.server_lr, made.server_batch_size, made.server_epochs) == (
        50,
        1,
        0.01,
        100,
        100,
    )
    assert not made.generator.trust_pickle
