"""Laws that the algorithms under FedF2DG share: what they make of clients that are copies of one another, and SCAFFOLD
and FedProx alone. Each algorithm's own laws are in `test_laws.py` and `test_family.py`."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fldist.config import build, load
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset, Digits
from fldist.models.train import warm_up
from fldist.seeding import Streams
from tests.test_family import network
from tests.test_laws import CNN, MLP, SEED, assert_close, assert_same_bits, config, distance, final_model, watched

ROWS = 90
BASES: list[Any] = ["fedavg", {"name": "fedprox", "mu": 0.5}, "scaffold", "fednova", {"name": "moon", "mu": 5.0}]


@pytest.fixture(autouse=True, scope="module")
def _imports() -> None:
    """Let no test pay for what torch and scikit-learn import at their first use."""
    warm_up()
    Digits().load()


@dataclass(frozen=True)
class Copies:
    """The first digits, over and over."""

    times: int

    def load(self) -> Dataset:
        whole = Digits().load()
        x, y = np.asarray(whole.train_x[:ROWS]), np.asarray(whole.train_y[:ROWS])
        x, y = np.concatenate([x] * self.times), np.concatenate([y] * self.times)
        return Dataset(x, y, whole.test_x[:20], whole.test_y[:20], whole.classes, whole.mean, whole.std)


@dataclass(frozen=True)
class Blocks:
    """Client k holds the k-th copy."""

    def split(self, labels: Any, num_clients: int, rng: Any) -> list[Any]:
        return np.split(np.arange(len(labels)), num_clients)


def copies(algorithm: Any, times: int, rounds: int = 3) -> dict[str, Any]:
    local = {"epochs": 2, "batch_size": 40, "order": "fixed"}
    settings = config(algorithm, model=CNN, rounds=rounds, clients={"num_clients": times}, local=local)
    settings["task"]["data"] = {"name": "tests.test_fedf2dg_baselines:Copies", "times": times}
    settings["task"]["partition"] = "tests.test_fedf2dg_baselines:Blocks"
    return settings


@pytest.mark.parametrize("algorithm", BASES, ids=lambda a: a if isinstance(a, str) else a["name"])
def test_clients_that_are_copies_of_one_another_are_one_client(tmp_path: Path, algorithm: Any) -> None:
    """Equal local models have themselves for their mean, statistics and counters included, in every algorithm.

    SCAFFOLD's variates are all equal then, and corrects nothing; MOON's former model is the one that was sent, and
    its term a constant; FedNova's clients make equal steps.
    """
    got = final_model(copies(algorithm, 4), tmp_path / "four")
    alone = final_model(copies(algorithm, 1), tmp_path / "one")
    assert_close(got, alone, tolerance=2e-6)
    plain = final_model(copies("fedavg", 1), tmp_path / "fedavg")
    start = dict(build(load(copies(algorithm, 4))).task.init_params().named())
    assert distance(got, start) > 0.1
    if algorithm != BASES[1]:
        assert_close(got, plain, tolerance=2e-6)
    else:
        assert distance(got, plain) > 1e-3


def test_the_mean_of_equal_models_is_that_model_bit_for_bit(tmp_path: Path) -> None:
    settings = copies("fedavg", 3, rounds=1)
    got = final_model(settings, tmp_path / "run")
    task = build(load(settings)).task
    local = ClientData(task, 1, Streams(SEED, 1, 1)).train(task.init_params()).params
    assert_same_bits(got, {name: view.clone() for name, view in local.named()})


def test_the_variate_of_an_only_client_is_the_servers(tmp_path: Path) -> None:
    _, seen = watched(tmp_path, model=CNN, rounds=4, clients={"num_clients": 1})
    for (_, _, _), (_, c, variates) in itertools.pairwise(seen):
        assert list(variates) == [0]
        torch.testing.assert_close(c.floats, variates[0].floats, rtol=1e-6, atol=1e-6)
        assert c.norm() > 0.1


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_fedprox_draws_the_parameters_and_not_the_statistics_to_the_model_that_was_sent(model: str) -> None:
    """CE + mu/2 of the squared distance of all parameters, by automatic differentiation in float64."""
    mu = 0.7
    settings = config({"name": "fedprox", "mu": mu}, model={"mlp": MLP, "cnn": CNN}[model], local={"epochs": 2})
    job = build(load(settings))
    task, client = job.task, 1
    x = ClientData(task, 0, Streams(SEED, 1, 0)).train(task.init_params()).params
    got = job.algorithm.update(None, ClientData(task, client, Streams(SEED, 2, client)), x)
    samples, labels = task.rows(client)
    module = network({name: view.clone() for name, view in x.named()}, model).double().train()
    sent = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    order = Streams(SEED, 2, client).generator("order")
    for _ in range(2):
        for rows in torch.randperm(len(labels), generator=order).split(64):
            optimizer.zero_grad()
            pairs = zip(module.parameters(), sent.parameters(), strict=True)
            pull = sum(((y - x0.detach()) ** 2).sum() for y, x0 in pairs)
            (cross_entropy(module(samples[rows].double()), labels[rows]) + mu / 2 * pull).backward()
            optimizer.step()
    want = {n: t.float() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    assert_close(dict(got.y.named()), want, tolerance=1e-5)
