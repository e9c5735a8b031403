"""Laws of FedNova, MOON, FedOpt, local and centralised training: whole rounds against plain torch and float64."""

import copy
import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fldist
from fldist.algorithm import on_client
from fldist.algorithms import fedopt
from fldist.algorithms.fednova import direction, normaliser
from fldist.algorithms.local import Local
from fldist.algorithms.moon import Moon, contrast, pull, representations
from fldist.config import build, load
from fldist.data.client_data import ClientData
from fldist.data.datasets import Digits
from fldist.fold import collect
from fldist.kinds import Weights
from fldist.models.train import warm_up
from fldist.seeding import Streams
from tests.test_laws import (
    CNN,
    CNN_BYTES,
    MLP,
    NUM_CLIENTS,
    SEED,
    assert_close,
    assert_same_bits,
    config,
    distance,
    final_model,
    run_own,
)

MODELS = {"mlp": MLP, "cnn": CNN}


@pytest.fixture(autouse=True, scope="module")
def _imports():
    """Let no test pay for what torch and scikit-learn import at their first use."""
    warm_up()
    Digits().load()


# ---- the plain computation
def network(state, model="mlp"):
    """An ordinary module with these values by name."""
    if model == "mlp":
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    else:
        convolution = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        module = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), *pooled, nn.Linear(4, 10))
    module.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return module


def start_of(task):
    return {name: view.clone() for name, view in task.init_params().named()}


def plain_loss(module, x, y):
    return cross_entropy(module(x), y)


def sgd(module, x, y, number, client, loss=plain_loss, epochs=1, batch_size=64, lr=0.05, momentum=0.9, decay=1e-4):
    """Plain local training in the order that the client's stream of the round gives; returns the steps made."""
    order = Streams(SEED, number, client).generator("order")
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in module)
    module.train()
    steps = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(batch_size):
            if normalised and len(rows) == 1:
                continue
            optimizer.zero_grad()
            loss(module, x[rows], y[rows]).backward()
            optimizer.step()
            steps += 1
    return steps


def parameters(model):
    """Names of what is trained."""
    names = ["1.weight", "1.bias", "3.weight", "3.bias"]
    return names if model == "mlp" else ["0.weight", "1.weight", "1.bias", "5.weight", "5.bias"]


def mean(states, weights):
    """Of all tensors, in float64; counters are truncated."""
    total = sum(weights)
    out = {}
    for name, like in states[0].items():
        value = sum(w / total * s[name].double() for w, s in zip(weights, states, strict=True))
        out[name] = value if like.is_floating_point() else (value + 1e-9).floor().long()
    return out


def single(state):
    """Back to the types of a model."""
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}


def job_of(settings):
    return build(load(settings))


def rows_of(directory, name="messages.jsonl"):
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


def called(directory, number):
    """The clients that were called to train in a round."""
    rows = rows_of(directory)
    return sorted({r["client"] for r in rows if r["round"] == number and r["phase"] == "train"})


@dataclass(frozen=True)
class Sizes:
    """A partition of this file: client k gets the next sizes[k] rows."""

    sizes: tuple[int, ...]

    def split(self, labels, num_clients, rng):
        cuts = np.cumsum((0, *self.sizes))
        return [np.arange(a, b) for a, b in itertools.pairwise(cuts)]


def with_sizes(settings, *sizes):
    """The same settings, clients of these sizes."""
    settings["task"]["partition"] = {"name": "tests.test_family:Sizes", "sizes": list(sizes)}
    settings["clients"]["num_clients"] = len(sizes)
    return settings


def same_bytes_but(tmp_path, algorithm, **scalars):
    """Run FedAvg and an algorithm; their bytes are equal but for so many more per client and round."""
    extra = {"down": 0, "up": 0, **scalars}
    results = {}
    for name in ("fedavg", algorithm):
        label = name if isinstance(name, str) else name["name"]
        settings = config(name, model=CNN, rounds=3, clients={"per_round": 2})
        results[label] = fldist.run(settings, output=tmp_path / label)["bytes"]
    ours, theirs = results.pop("fedavg"), results.popitem()[1]
    messages = 3 * 2
    assert ours["by_kind"]["weights"] == {"down": messages * CNN_BYTES, "up": messages * CNN_BYTES}
    assert theirs["by_kind"]["weights"] == ours["by_kind"]["weights"]
    assert set(theirs["by_kind"]) == set(ours["by_kind"]) == {"weights", "scalars"}
    for way, more in extra.items():
        assert theirs["logical"][way] == ours["logical"][way] + messages * more
        assert theirs["by_kind"]["scalars"][way] == ours["by_kind"]["scalars"][way] + messages * more
    assert theirs["by_phase"] == {"train": theirs["logical"]}
    assert theirs["wasted"] == {}


# ---- FedNova
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("tau", [1, 2, 7, 40])
def test_the_normaliser_is_the_sum_over_the_steps(tau, rho):
    """Every step's gradient is counted by what momentum makes of it until the end: 1 + rho + ... ."""
    double_sum = sum(sum(rho**j for j in range(tau - s)) for s in range(tau))
    assert normaliser(tau, rho) == pytest.approx(double_sum, rel=1e-9)
    assert normaliser(tau, rho) == pytest.approx(sum((1 - rho ** (tau - s)) / (1 - rho) for s in range(tau)), rel=1e-9)


def test_the_normaliser_of_one_step_is_1_and_without_momentum_it_counts_the_steps():
    for rho in (0.0, 0.1, 0.5, 0.9, 0.999):
        assert normaliser(1, rho) == pytest.approx(1.0, rel=1e-9)
        assert normaliser(0, rho) == pytest.approx(0.0, abs=1e-9)
    assert [normaliser(tau, 0.0) for tau in (2, 5, 31)] == [2.0, 5.0, 31.0]


def test_the_direction_is_the_way_from_the_local_model_to_the_start_by_a():
    task = job_of(config()).task
    x = task.init_params()
    y = x * 0.5
    torch.testing.assert_close(direction(x, y, 4.0).floats, x.floats / 8)
    assert not direction(x, y, 0.0).floats.any()


def fednova_by_hand(task, model, momentum, weights=None, **local):
    """One round in float64 from plain local training: x - a_eff sum_i p_i d_i, buffers averaged by samples."""
    x = start_of(task)
    ends, a, sizes = [], [], []
    for client in range(task.num_clients):
        samples, labels = task.rows(client)
        module = network(x, model)
        tau = sgd(module, samples, labels, 1, client, momentum=momentum, **local)
        ends.append(module.state_dict())
        a.append(sum(sum(momentum**j for j in range(tau - s)) for s in range(tau)))
        sizes.append(len(labels))
    weights = weights(sizes) if weights else sizes
    p = [w / sum(weights) for w in weights]
    a_eff = sum(q * b for q, b in zip(p, a, strict=True))
    new = mean(ends, sizes)
    for name in parameters(model):
        begun = x[name].double()
        towards = sum(q * (begun - e[name].double()) / b for q, b, e in zip(p, a, ends, strict=True) if b)
        new[name] = begun - a_eff * towards
    return new, a


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("model", MODELS)
def test_a_round_of_fednova_by_hand(tmp_path, model, momentum):
    local = {"momentum": momentum, "epochs": 1, "batch_size": 64, "lr": 0.2}
    settings = config("fednova", model=MODELS[model], rounds=1, local=local)
    got = final_model(settings, tmp_path / "run")
    task = job_of(settings).task
    expected, a = fednova_by_hand(task, model, momentum, lr=0.2, batch_size=64)
    assert max(a) > 1.5 * min(a)  # the steps are unequal
    assert_close(got, single(expected))
    other, _ = fednova_by_hand(task, model, momentum, lambda n: [-(-k // 64) for k in n], lr=0.2, batch_size=64)
    assert max(float((got[n] - other[n]).abs().max()) for n in parameters(model)) > 1e-4  # mini-batches as weights
    fedavg = final_model({**settings, "algorithm": {"name": "fedavg"}}, tmp_path / "fedavg")
    assert max(float((got[n] - fedavg[n]).abs().max()) for n in parameters(model)) > 1e-3


def test_fednova_is_as_exact_after_many_steps(tmp_path):
    """Hundreds of steps with momentum make a_eff some thousands."""
    settings = config("fednova", rounds=1, local={"epochs": 3, "batch_size": 4, "lr": 0.005})
    got = final_model(settings, tmp_path / "run")
    expected, a = fednova_by_hand(job_of(settings).task, "mlp", 0.9, epochs=3, batch_size=4, lr=0.005)
    assert max(a) > 1000
    assert_close(got, single(expected), tolerance=1e-5)


def test_the_buffers_of_fednova_are_those_of_fedavg(tmp_path):
    settings = {"model": CNN, "rounds": 1, "local": {"epochs": 2, "batch_size": 32}}
    fedavg = final_model(config("fedavg", **settings), tmp_path / "fedavg")
    fednova = final_model(config("fednova", **settings), tmp_path / "fednova")
    buffers = [name for name in fedavg if "running" in name or "tracked" in name]
    assert len(buffers) == 3
    assert_same_bits({n: fedavg[n] for n in buffers}, {n: fednova[n] for n in buffers})


@pytest.mark.parametrize("model", MODELS)
def test_with_equal_steps_fednova_is_fedavg(tmp_path, model):
    """Clients of unequal size, each with one batch an epoch."""
    settings = {"model": MODELS[model], "rounds": 2, "local": {"epochs": 3, "batch_size": 2000, "lr": 0.2}}
    fedavg = final_model(config("fedavg", **settings), tmp_path / "fedavg")
    fednova = final_model(config("fednova", **settings), tmp_path / "fednova")
    start = start_of(job_of(config(**settings)).task)
    assert distance({n: fedavg[n] for n in parameters(model)}, {n: start[n] for n in parameters(model)}) > 0.01
    assert_close(fednova, fedavg)


def test_a_client_that_makes_no_step_counts_with_a_of_0(tmp_path):
    """One sample cannot train BatchNorm; its share of samples stays, its direction is 0."""
    settings = with_sizes(config("fednova", model=CNN, rounds=1), 1, 80, 300)
    got = final_model(settings, tmp_path / "run")
    expected, a = fednova_by_hand(job_of(settings).task, "cnn", 0.9)
    assert a[0] == 0 < a[1] < a[2]
    assert_close(got, single(expected))


@pytest.mark.parametrize(
    ("local", "named"), [({"optimizer": "adam"}, "optimizer adam"), ({"schedule": "cosine"}, "schedule cosine")]
)
def test_fednova_refuses_what_its_normaliser_does_not_describe(tmp_path, local, named):
    with pytest.raises(ValueError, match=rf"fednova is for SGD with a constant lr.*{named}"):
        fldist.run(config("fednova", local=local), output=tmp_path / "run")


def test_bytes_of_fednova_are_those_of_fedavg_and_one_number(tmp_path):
    same_bytes_but(tmp_path, "fednova", up=8)


# ---- MOON: its term
def cosines(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_the_contrast_is_minus_log_softmax_of_the_two_cosines(temperature):
    z_y, z_x, z_v = (drawn(6, 5, seed=s) for s in (1, 2, 3))
    near, far = np.exp(cosines(z_y, z_x) / temperature), np.exp(cosines(z_y, z_v) / temperature)
    expected = float(np.mean(-np.log(near / (near + far))))
    assert float(contrast(z_y, z_x, z_v, temperature)) == pytest.approx(expected, abs=1e-5)
    swapped = float(contrast(z_y, z_v, z_x, temperature))
    assert abs(swapped - expected) > 1e-2


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_the_contrast_is_log_2_when_both_models_agree_and_is_bounded(temperature):
    z_y, z_x = drawn(7, 4, seed=1), drawn(7, 4, seed=2)
    assert float(contrast(z_y, z_x, z_x, temperature)) == pytest.approx(math.log(2), abs=1e-6)
    largest = math.log1p(math.exp(2 / temperature))
    assert float(contrast(z_y, -z_y, 3.0 * z_y, temperature)) == pytest.approx(largest, rel=1e-5)
    smallest = float(contrast(z_y, 2.0 * z_y, -z_y, temperature))
    assert smallest == pytest.approx(math.log1p(math.exp(-2 / temperature)), rel=1e-4)
    for seed in range(20):
        each = float(contrast(z_y, drawn(7, 4, seed=seed), drawn(7, 4, seed=seed + 100), temperature))
        assert 0 < smallest <= each <= largest
    assert math.isfinite(float(contrast(torch.zeros(2, 3), z_y[:2, :3], z_x[:2, :3], temperature)))


def test_the_contrast_draws_to_the_global_representation():
    z_y, z_x, z_v = (drawn(6, 5, seed=s) for s in (1, 2, 3))
    z_y.requires_grad_(True)
    contrast(z_y, z_x, z_v, 0.5).backward()
    moved = z_y.detach() - 0.1 * z_y.grad
    assert (cosines(moved, z_x) - cosines(moved, z_v) > cosines(z_y.detach(), z_x) - cosines(z_y.detach(), z_v)).all()


def test_the_pull_is_the_mean_distance():
    z_y, z_x = drawn(6, 5, seed=1), drawn(6, 5, seed=2)
    expected = np.mean(np.linalg.norm(z_y.double().numpy() - z_x.double().numpy(), axis=1))
    assert float(pull(z_y, z_x)) == pytest.approx(expected, rel=1e-6)
    z = z_x.clone().requires_grad_(True)
    pull(z, z_x).backward()
    assert not z.grad.any()  # 0, not NaN: where every local training begins


# ---- MOON: whole rounds
def moon(mu=1.0, **fields):
    return {"name": "moon", "mu": mu, **fields}


@pytest.mark.parametrize("variant", ["contrastive", "l2norm"])
@pytest.mark.parametrize("model", MODELS)
def test_moon_with_mu_0_is_fedavg_bit_for_bit(tmp_path, model, variant):
    settings = {"model": MODELS[model], "rounds": 3, "clients": {"per_round": 3}, "local": {"epochs": 2}}
    fedavg = final_model(config("fedavg", **settings), tmp_path / "fedavg")
    assert_same_bits(fedavg, final_model(config(moon(0.0, variant=variant), **settings), tmp_path / "moon"))


@pytest.mark.parametrize("model", MODELS)
def test_the_first_round_of_moon_is_fedavg_and_the_second_is_not(tmp_path, model):
    models = {}
    for rounds in (1, 2):
        for algorithm in ("fedavg", moon(5.0)):
            name = "fedavg" if algorithm == "fedavg" else "moon"
            settings = config(algorithm, model=MODELS[model], rounds=rounds, local={"epochs": 2})
            models[name, rounds] = final_model(settings, tmp_path / f"{name}-{rounds}")
    assert_same_bits(models["fedavg", 1], models["moon", 1])
    assert distance(models["fedavg", 2], models["moon", 2]) > 1e-3


def moon_loss(x_state, v_state, model, mu, temperature=0.5, variant="contrastive", dtype=torch.float32):
    """The paper's loss with three explicit networks, the two fixed ones in eval mode."""
    states = (x_state, v_state)
    fixed = [network(s, model).to(dtype).eval().requires_grad_(False) if s is not None else None for s in states]

    def loss(module, x, y):
        z = module[:-1](x)
        ce = cross_entropy(module[-1](z), y)
        if variant == "l2norm":
            return ce + mu * torch.norm(z - fixed[0][:-1](x), dim=1).mean()
        if fixed[1] is None:
            return ce
        unit = nn.functional.normalize
        near, far = ((unit(z) * unit(other[:-1](x))).sum(1) / temperature for other in fixed)
        return ce + mu * -torch.stack([near, far], dim=1).log_softmax(dim=1)[:, 0].mean()

    return loss


@pytest.mark.parametrize("variant", ["contrastive", "l2norm"])
@pytest.mark.parametrize("model", MODELS)
def test_a_clients_second_participation_in_moon_is_a_plain_loop(model, variant):
    """From an x and a v that both differ from the initial model; the outcome is kept as v."""
    settings = config(moon(2.0, temperature=0.3, variant=variant), model=MODELS[model], local={"epochs": 2})
    job = job_of(settings)
    task, client = job.task, 2
    samples, labels = task.rows(client)
    x = ClientData(task, 0, Streams(SEED, 1, 0)).train(task.init_params()).params
    v = ClientData(task, client, Streams(SEED, 1, client)).train(task.init_params()).params
    before = [(p.floats.clone(), p.ints.clone()) for p in (x, v)]
    me = SimpleNamespace(v=v)
    got = job.algorithm.update(me, ClientData(task, client, Streams(SEED, 2, client)), x)
    states = [dict(p.named()) for p in (x, v)]
    module = network(states[0], model).double()
    loss = moon_loss(*states, model, 2.0, 0.3, variant, torch.float64)
    sgd(module, samples.double(), labels, 2, client, loss, epochs=2)
    assert_close(dict(got.y.named()), single(module.state_dict()), tolerance=1e-5)
    assert got.n == len(labels)
    assert me.v.equals(got.y)
    for params, (floats, ints) in zip((x, v), before, strict=True):
        assert torch.equal(params.floats, floats)
        assert torch.equal(params.ints, ints)
    plain = network(states[0], model)
    sgd(plain, samples, labels, 2, client, epochs=2)
    assert distance(dict(got.y.named()), plain.state_dict()) > 1e-3


def test_the_fixed_models_of_moon_take_no_gradient_and_their_buffers_stay(monkeypatch):
    made = []
    original = ClientData.frozen_copy

    def recorded(self, model):
        made.append((original(self, model), model))
        return made[-1][0]

    monkeypatch.setattr(ClientData, "frozen_copy", recorded)
    for augment in ({}, {"flip": 0.5}):
        made.clear()
        settings = config(moon(1.0), model=CNN)
        settings["task"]["augment"] = augment
        job = job_of(settings)
        x, v = (ClientData(job.task, k, Streams(SEED, 1, k)).train(job.task.init_params()).params for k in (0, 1))
        job.algorithm.update(SimpleNamespace(v=v), ClientData(job.task, 1, Streams(SEED, 2, 1)), x)
        assert {id(model) for _, model in made} == {id(x), id(v)}
        for module, model in made:
            assert not module.training
            assert not any(layer.training for layer in module.modules())
            assert all(p.grad is None and not p.requires_grad for p in module.parameters())
            assert_same_bits({n: t.detach() for n, t in module.state_dict().items()}, dict(model.named()))


@pytest.mark.parametrize("augment", [{}, {"flip": 0.5}])
def test_representations_of_a_fixed_model_belong_to_no_graph(augment):
    settings = config(moon(), model=CNN)
    settings["task"]["augment"] = augment
    task = job_of(settings).task
    data = ClientData(task, 1, Streams(SEED, 1, 1))
    batch = data.reader()(torch.tensor([5, 0, 3]))
    z = representations(data, task.init_params())(batch)
    assert not z.requires_grad
    module = network(start_of(task), "cnn").eval()
    torch.testing.assert_close(z, module[:-1](batch.x).detach(), rtol=0, atol=1e-6)


def moon_by_hand(task, directory, rounds, mu, previous):
    """The whole algorithm with plain networks; who took part is read from the run."""
    x, v = start_of(task), {}
    for number in range(1, rounds + 1):
        ends, sizes = [], []
        chosen = called(directory, number)
        for client in chosen:
            samples, labels = task.rows(client)
            module = network(x)
            sgd(module, samples, labels, number, client, moon_loss(x, v.get(client), "mlp", mu))
            ends.append(copy.deepcopy(module.state_dict()))
            sizes.append(len(labels))
        x_new = single(mean(ends, sizes))
        for client, end in zip(chosen, ends, strict=True):
            v[client] = end if previous == "own" else x
        x = x_new
    return x


def test_moon_remembers_a_clients_last_participation(tmp_path):
    """Two of five clients a round: what a client compares with may be several rounds old."""
    rounds, mu = 6, 5.0
    settings = config(moon(mu), rounds=rounds, clients={"per_round": 2})
    got = final_model(settings, tmp_path / "run")
    turns = [called(tmp_path / "run", number) for number in range(1, rounds + 1)]
    waits = [
        later - earlier
        for k in range(NUM_CLIENTS)
        for rounds_of_k in [[i for i, turn in enumerate(turns) if k in turn]]
        for earlier, later in itertools.pairwise(rounds_of_k)
    ]
    assert max(waits) > 1  # somebody sat out in between
    task = job_of(settings).task
    assert_close(got, moon_by_hand(task, tmp_path / "run", rounds, mu, "own"), tolerance=1e-5)
    assert distance(got, moon_by_hand(task, tmp_path / "run", rounds, mu, "sent")) > 1e-4


# ---- MOON: augmentation, bytes, models
@pytest.mark.parametrize("model", MODELS)
def test_moon_compares_representations_of_the_same_augmented_images(tmp_path, model):
    """With a flip that always happens, everything is as if the client's images were mirrored."""
    settings = config(moon(3.0), model=MODELS[model], rounds=1)
    settings["task"]["augment"] = {"flip": 1.0}
    job = job_of(settings)
    task, client = job.task, 1
    x = ClientData(task, 0, Streams(SEED, 1, 0)).train(task.init_params()).params
    v = ClientData(task, client, Streams(SEED, 1, client)).train(task.init_params()).params
    got = job.algorithm.update(SimpleNamespace(v=v), ClientData(task, client, Streams(SEED, 2, client)), x)
    samples, labels = task.rows(client)
    states = [dict(p.named()) for p in (x, v)]
    ends = []
    for images in (samples.flip(-1), samples):
        module = network(states[0], model)
        sgd(module, images, labels, 2, client, moon_loss(*states, model, 3.0))
        ends.append(module.state_dict())
    assert_close(dict(got.y.named()), ends[0])
    assert distance(dict(got.y.named()), ends[1]) > 1e-3


def test_an_augmentation_that_changes_nothing_gives_the_precomputed_path(tmp_path):
    models = []
    for name, flip in (("none", 0.0), ("never", 1e-12), ("half", 0.5)):
        settings = config(moon(3.0), model=CNN, rounds=2)
        settings["task"]["augment"] = {"flip": flip}
        models.append(final_model(settings, tmp_path / name))
        assert all(torch.isfinite(t).all() for t in models[-1].values() if t.is_floating_point())
    assert_close(models[0], models[1])
    assert distance(models[0], models[2]) > 1e-3


def test_bytes_of_moon_are_those_of_fedavg(tmp_path):
    same_bytes_but(tmp_path, moon(1.0))


class NoLinear(nn.Module):
    """A classifier of this file without any linear layer."""

    def __init__(self, shape, classes):
        super().__init__()
        self.convolution = nn.Conv2d(shape[0], classes, 3)

    def forward(self, x):
        return self.convolution(x).mean(dim=(2, 3))


def test_moon_says_when_a_model_has_no_linear_layer(tmp_path):
    settings = config(moon(1.0), model={"name": "tests.test_family:NoLinear"})
    with pytest.raises(ValueError, match=r"NoLinear has no linear layer .*nn\.Linear.* as its last layer"):
        fldist.run(settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fldist.run({**settings, "algorithm": moon(0.0)}, output=tmp_path / "without")


# ---- FedOpt
LR, BETA1, BETA2, TAU = 0.02, 0.7, 0.9, 0.01
OPTIMIZERS = ["heavy_ball", "ema", "adam", "yogi", "adagrad"]


class ByHand:
    """A server's optimizer on numpy float64, written out from Reddi et al. (2021), Algorithm 2."""

    def __init__(self, name, size):
        self.name, self.m, self.v = name, np.zeros(size), np.full(size, TAU * TAU)
        self.signs = set()

    def step(self, x, delta):
        if self.name == "heavy_ball":
            self.m = BETA1 * self.m + delta
        else:
            self.m = BETA1 * self.m + (1 - BETA1) * delta
        if self.name in ("heavy_ball", "ema"):
            return x + LR * self.m
        square = delta * delta
        if self.name == "adagrad":
            self.v = self.v + square
        elif self.name == "adam":
            self.v = BETA2 * self.v + (1 - BETA2) * square
        else:
            self.signs |= set(np.sign(self.v - square).tolist())
            self.v = np.where(self.v > square, self.v - (1 - BETA2) * square, self.v + (1 - BETA2) * square)
        return x + LR * self.m / (np.sqrt(self.v) + TAU)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_server_optimizer_on_explicit_changes(name):
    rng = np.random.default_rng(1)
    by_hand = ByHand(name, 8)
    m, v = torch.zeros(8, dtype=torch.float64), torch.full((8,), TAU * TAU, dtype=torch.float64)
    x = ours = rng.normal(size=8)
    for scale in (0.02, 0.001, 0.03):
        delta = rng.normal(size=8) * scale
        x = by_hand.step(x, delta)
        change = torch.from_numpy(delta)
        m = (fedopt.heavy_ball if name == "heavy_ball" else fedopt.ema)(m, change, BETA1)
        step = LR * m
        if name in fedopt.SECOND_MOMENT:
            v = fedopt.SECOND_MOMENT[name](v, change, BETA2)
            step = step / (v.sqrt() + TAU)
            np.testing.assert_allclose(v.numpy(), by_hand.v, rtol=1e-12)
        np.testing.assert_allclose(m.numpy(), by_hand.m, rtol=1e-12)
        ours = ours + step.numpy()
    np.testing.assert_allclose(ours, x, rtol=1e-12)
    assert name != "yogi" or by_hand.signs == {-1.0, 1.0}


def test_the_second_moments_by_hand():
    """Below v, above it, and at it, where the sign is 0."""
    v, delta = torch.tensor([0.25, 0.25, 0.25]), torch.tensor([0.25, -1.0, 0.5])
    torch.testing.assert_close(fedopt.yogi(v, delta, 0.5), torch.tensor([0.21875, 0.75, 0.25]))
    torch.testing.assert_close(fedopt.adam(v, delta, 0.75), torch.tensor([0.203125, 0.4375, 0.25]))
    torch.testing.assert_close(fedopt.adagrad(v, delta, 0.5), torch.tensor([0.3125, 1.25, 0.5]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_rounds_of_fedopt_by_hand(tmp_path, name):
    """Parameters by the server's optimizer, buffers averaged; local models by plain training."""
    algorithm = {"name": "fedopt", "optimizer": name, "lr": LR, "beta1": BETA1, "beta2": BETA2, "tau": TAU}
    settings = config(algorithm, model=CNN, rounds=3)
    got = final_model(settings, tmp_path / "run")
    task = job_of(settings).task
    x = start_of(task)
    by_hand = {n: ByHand(name, x[n].numel()) for n in parameters("cnn")}
    averages = []
    for number in (1, 2, 3):
        ends = []
        for client in range(NUM_CLIENTS):
            module = network(x, "cnn")
            sgd(module, *task.rows(client), number, client)
            ends.append(module.state_dict())
        new = mean(ends, task.sizes)
        averages.append(single(new))
        for n, optimizer in by_hand.items():
            begun = x[n].double().numpy().reshape(-1)
            stepped = optimizer.step(begun, new[n].numpy().reshape(-1) - begun)
            new[n] = torch.from_numpy(stepped.reshape(x[n].shape))
        x = single(new)
    assert_close(got, x, tolerance=1e-5)
    assert distance(got, averages[-1]) > 1e-2  # the mean itself is something else
    if name == "yogi":
        assert set.union(*(o.signs for o in by_hand.values())) >= {-1.0, 1.0}


@pytest.mark.parametrize("optimizer", ["heavy_ball", "ema"])
def test_fedopt_without_momentum_and_with_lr_1_is_fedavg(tmp_path, optimizer):
    settings = {"model": CNN, "rounds": 3, "clients": {"per_round": 3}}
    algorithm = {"name": "fedopt", "optimizer": optimizer, "lr": 1.0, "beta1": 0.0}
    fedavg = final_model(config("fedavg", **settings), tmp_path / "fedavg")
    assert_close(final_model(config(algorithm, **settings), tmp_path / "fedopt"), fedavg)


def test_the_first_step_of_ema_is_short(tmp_path):
    """1 - beta1 of FedAvg's, since nothing corrects the bias; heavy ball's is whole."""
    start = start_of(job_of(config(model=CNN)).task)
    fedavg = final_model(config("fedavg", model=CNN, rounds=1), tmp_path / "fedavg")
    for optimizer, part in (("ema", 0.1), ("heavy_ball", 1.0)):
        algorithm = {"name": "fedopt", "optimizer": optimizer, "lr": 1.0, "beta1": 0.9}
        got = final_model(config(algorithm, model=CNN, rounds=1), tmp_path / optimizer)
        for name, tensor in got.items():
            if name in parameters("cnn"):
                expected = start[name] + part * (fedavg[name] - start[name])
                torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)
            else:
                assert torch.equal(tensor, fedavg[name]), name


def test_the_first_step_of_fedadam_by_hand(tmp_path):
    """m = (1 - beta1) Delta and v = beta2 tau^2 + (1 - beta2) Delta^2, with the defaults of the section."""
    settings = config("fedopt", rounds=1)
    algorithm = job_of(settings).algorithm
    assert (algorithm.optimizer, algorithm.beta1, algorithm.beta2) == ("adam", 0.9, 0.99)
    start = start_of(job_of(settings).task)
    fedavg = final_model(config("fedavg", rounds=1), tmp_path / "fedavg")
    got = final_model(settings, tmp_path / "fedopt")
    for name in got:
        delta = fedavg[name].double() - start[name].double()
        v = 0.99 * algorithm.tau**2 + 0.01 * delta**2
        expected = start[name].double() + algorithm.lr * 0.1 * delta / (v.sqrt() + algorithm.tau)
        torch.testing.assert_close(got[name].double(), expected, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["ema", "yogi"])
def test_bytes_of_fedopt_are_those_of_fedavg(tmp_path, optimizer):
    same_bytes_but(tmp_path, {"name": "fedopt", "optimizer": optimizer})


# ---- local training
class Model(NamedTuple):
    y: Weights


@dataclass(frozen=True)
class Shown(Local):
    """Notes every client's model after every round."""

    seen: list = field(default_factory=list)

    def round(self, server, clients):
        super().round(server, clients)
        got = clients.all().call(self.show, phase="evaluate", fold={"y": collect()})
        self.seen.append({k: {n: t.clone() for n, t in y.named()} for k, y in got.y.items()})

    @on_client
    def show(self, me, data) -> Model:
        return Model(me.y)


def shown(settings, directory):
    """The clients' models after each round."""
    algorithm = Shown()
    job, result = run_own({**settings, "eval": {"every": 0}}, algorithm, directory)
    return job.task, algorithm.seen, result


@pytest.mark.parametrize("init", ["common", "own"])
@pytest.mark.parametrize("model", MODELS)
def test_every_client_trains_as_if_it_were_alone(tmp_path, model, init):
    settings = config("local", model=MODELS[model], rounds=3, clients={"init": init})
    task, seen, _ = shown(settings, tmp_path / "run")
    assert len(seen) == 3
    for client in range(NUM_CLIENTS):
        module = network(dict(task.init_params(client, whole=True).named()), model)
        for number in (1, 2, 3):
            sgd(module, *task.rows(client), number, client)
            assert_close(seen[number - 1][client], module.state_dict(), tolerance=1e-5)


def test_starts_are_common_or_each_clients_own():
    for init in ("common", "own"):
        task = job_of(config("local", clients={"init": init})).task
        starts = [task.init_params(k, whole=True) for k in range(NUM_CLIENTS)]
        equal = [starts[0].equals(other) for other in starts[1:]]
        assert equal == [init == "common"] * (NUM_CLIENTS - 1)
        assert all(task.init_params(k, whole=True).equals(start) for k, start in enumerate(starts))  # drawn once


@pytest.mark.parametrize("travel", ["all", "params"])
def test_the_whole_local_model_stays_whatever_would_travel(tmp_path, travel):
    """The statistics of BatchNorm are the client's own too."""
    settings = config("local", model=CNN, rounds=2, travel=travel, eval={"every": 1, "split": "train"})
    fldist.run(settings, output=tmp_path / "run")
    task = job_of(settings).task
    last = {line["client"]: line for line in rows_of(tmp_path / "run", "clients.jsonl") if line["round"] == 2}
    for client in range(NUM_CLIENTS):
        x, y = task.rows(client)
        module = network(dict(task.architecture(client).initial.named()), "cnn")
        for number in (1, 2):
            sgd(module, x, y, number, client)
        assert last[client]["loss"] == pytest.approx(plain_loss(module.eval(), x, y).item(), abs=1e-5)


def test_nothing_of_local_training_travels(tmp_path):
    settings = config("local", rounds=3, clients={"per_round": 2}, eval={"every": 1})
    result = fldist.run(settings, output=tmp_path / "run")
    kinds = [row for row in rows_of(tmp_path / "run") if row["row"] == "kind"]
    assert kinds
    assert {row["phase"] for row in kinds} == {"evaluate"}
    assert {row["kind"] for row in kinds} == {"report"}
    assert result["bytes"]["logical"] == {"up": 0, "down": 0}
    assert result["bytes"]["by_kind"] == {}
    assert result["bytes"]["by_phase"]["train"] == {"up": 0, "down": 0}
    assert result["bytes"]["by_phase"]["evaluate"] == {"up": 3 * NUM_CLIENTS * 8 * 3, "down": 0}
    assert not (tmp_path / "run" / "model").exists()


def test_the_state_of_local_training_follows_from_seed_and_data(tmp_path):
    hashes = {}
    for name, partition_seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = config("local", rounds=2)
        settings["task"]["partition_seed"] = partition_seed
        hashes[name] = fldist.run(settings, output=tmp_path / name)["state_hash"]
    assert hashes["a"] is not None
    assert hashes["a"] == hashes["b"] != hashes["c"]


def test_the_hash_shows_a_single_clients_model(tmp_path):
    """Only client 0 holds other rows; the server's state is empty in both."""
    hashes = []
    for name, sizes in (("a", (50, 60, 70)), ("b", (50, 60, 71))):
        settings = with_sizes(config("local", rounds=1), *sizes)
        hashes.append(fldist.run(settings, output=tmp_path / name)["state_hash"])
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("weights", ["samples", "equal"])
def test_the_accuracy_of_local_training_is_the_clients_mean(tmp_path, weights):
    settings = config("local", rounds=2, eval={"every": 1, "weights": weights, "split": "train"})
    result = fldist.run(settings, output=tmp_path / "run")
    lines = [line for line in rows_of(tmp_path / "run", "clients.jsonl") if line["round"] == 2]
    assert [line["client"] for line in lines] == list(range(NUM_CLIENTS))
    task, seen, _ = shown(config("local", rounds=2), tmp_path / "shown")
    for line in lines:
        x, y = task.rows(line["client"])
        module = network(seen[-1][line["client"]]).eval()
        assert line["n"] == len(y)
        assert line["accuracy"] == pytest.approx(float((module(x).argmax(1) == y).double().mean()), abs=1e-9)
    n = [line["n"] if weights == "samples" else 1 for line in lines]
    for figure in ("accuracy", "loss"):
        expected = sum(k * line[figure] for k, line in zip(n, lines, strict=True)) / sum(n)
        assert result["final"][figure] == pytest.approx(expected, abs=1e-9)
    plain = sum(line["accuracy"] for line in lines) / len(lines)
    weighted = sum(line["n"] * line["accuracy"] for line in lines) / sum(line["n"] for line in lines)
    assert abs(plain - weighted) > 1e-6  # the two differ here


def test_clients_that_are_not_selected_keep_their_model(tmp_path):
    settings = config("local", rounds=4, clients={"per_round": 2})
    task, seen, _ = shown(settings, tmp_path / "run")
    before = {k: start_of(task) for k in range(NUM_CLIENTS)}
    for number, after in enumerate(seen, start=1):
        chosen = called(tmp_path / "run", number)
        assert len(chosen) == 2
        for client in range(NUM_CLIENTS):
            same = all(torch.equal(before[client][n], after[client][n]) for n in after[client])
            assert same == (client not in chosen), (number, client)
        before = after


def test_local_training_of_two_architectures(tmp_path):
    """Client i has number i mod 2 of them; the model of the section `task` is nobody's."""
    models = [{"name": "mlp", "hidden": [8]}, {"name": "cnn_bn", "widths": [4]}]
    settings = config("local", model={"name": "mlp", "hidden": [3]}, rounds=2, clients={"models": models})
    task, seen, _ = shown(settings, tmp_path / "shown")
    for client in range(NUM_CLIENTS):
        model = ("mlp", "cnn")[client % 2]
        module = network(dict(task.init_params(client, whole=True).named()), model)
        for number in (1, 2):
            sgd(module, *task.rows(client), number, client)
        assert_close(seen[-1][client], module.state_dict(), tolerance=1e-5)
    result = fldist.run({**settings, "eval": {"every": 1}}, output=tmp_path / "run")
    assert result["status"] == "finished"
    assert 0 < result["final"]["accuracy"] <= 1


def test_other_algorithms_refuse_two_architectures():
    models = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [4]}]
    with pytest.raises(ValueError, match=r"clients\.models: FedAvg needs the model of task\.model"):
        job_of(config("fedavg", clients={"models": models}))


# ---- centralised training
@pytest.mark.parametrize("model", MODELS)
def test_centralised_training_is_plain_sgd_on_all_rows(tmp_path, model):
    settings = config("centralised", model=MODELS[model], rounds=2, local={"epochs": 2})
    got = final_model(settings, tmp_path / "run")
    task = job_of(settings).task
    digits = Digits().load()
    assert sum(task.sizes) == len(digits.train_y)
    x = torch.from_numpy(
        np.asarray(digits.train_x, dtype=np.float32) / (255 if digits.train_x.dtype == np.uint8 else 1)
    )
    y = torch.from_numpy(np.asarray(digits.train_y))
    module = network(start_of(task), model)
    for number in (1, 2):
        sgd(module, x, y, number, -1, epochs=2)
    assert_close(got, module.state_dict(), tolerance=1e-4)


def test_centralised_training_uses_what_the_clients_hold_and_nothing_else(tmp_path):
    """Rows that a partition leaves to nobody, and those kept for testing, are not trained on."""
    settings = with_sizes(config("centralised", rounds=1), 40, 30, 10)
    settings["task"]["split"] = {"test": 0.5}
    got = final_model(settings, tmp_path / "run")
    task = job_of(settings).task
    assert task.sizes == [20, 15, 5]
    digits = Digits().load()
    rows = np.sort(np.concatenate(task.parts))
    x, y = task.preparation.unit(np.asarray(digits.train_x[rows])), torch.from_numpy(digits.train_y[rows])
    module = network(start_of(task))
    assert sgd(module, x, y, 1, -1) == 1
    assert_close(got, module.state_dict())


def test_centralised_training_sends_nothing(tmp_path):
    result = fldist.run(config("centralised", rounds=2, eval={"every": 1}), output=tmp_path / "run")
    assert (tmp_path / "run" / "messages.jsonl").read_text() == ""
    assert result["bytes"]["logical"] == result["bytes"]["wire"] == {"up": 0, "down": 0}
    assert result["bytes"]["by_kind"] == result["bytes"]["by_phase"] == {}
    assert result["final"]["accuracy"] > 0.2
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_centralised_training_does_not_depend_on_the_partition(tmp_path):
    models = []
    for name, partition in (("a", "iid"), ("b", {"name": "dirichlet", "alpha": 0.5})):
        settings = config("centralised", rounds=1)
        settings["task"]["partition"] = partition
        models.append(final_model(settings, tmp_path / name))
    assert_same_bits(*models)


def test_centralised_training_refuses_feature_noise(tmp_path):
    settings = config("centralised")
    settings["task"]["partition"] = {"name": "feature_noise", "noise": 0.2}
    with pytest.raises(ValueError, match=r"no common data under task\.partition feature_noise"):
        fldist.run(settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before anything was begun"


# ---- of all of them
@pytest.mark.parametrize("algorithm", ["fednova", "moon", "fedopt", "local", "centralised"])
def test_a_run_follows_from_its_seed(tmp_path, algorithm):
    settings = config(algorithm, rounds=2, clients={"per_round": 2})
    hashes = [
        fldist.run({**settings, "seed": seed}, output=tmp_path / name)["state_hash"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert hashes[0] is not None
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("algorithm", ["fednova", "moon", "fedopt"])
def test_what_does_not_travel_keeps_its_first_value_at_the_server(tmp_path, algorithm):
    result = fldist.run(config(algorithm, model=CNN, rounds=2, travel="params"), output=tmp_path / "run")
    assert result["status"] == "finished"
    assert result["bytes"]["by_kind"]["weights"]["up"] == 2 * NUM_CLIENTS * (CNN_BYTES - 4 * 8 - 8)


def test_fields_out_of_range_are_refused():
    for name, key, value in (
        ("moon", "mu", -1.0),
        ("moon", "temperature", 0.0),
        ("moon", "variant", "both"),
        ("fedopt", "beta1", 1.0),
        ("fedopt", "beta2", -0.1),
        ("fedopt", "tau", 0.0),
        ("fedopt", "lr", 0.0),
        ("fedopt", "optimizer", "sgd"),
    ):
        with pytest.raises(ValueError, match=rf"algorithm\.{key}"):
            load(config({"name": name, key: value}))


def test_algorithms_are_frozen():
    for name in ("fednova", "moon", "fedopt", "local", "centralised"):
        algorithm = job_of(config(name)).algorithm
        with pytest.raises(dataclasses.FrozenInstanceError):
            algorithm.mu = 2.0
    assert Moon().temperature == 0.5
