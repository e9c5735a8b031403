"""Laws of the algorithms, each from its paper or specification, checked on whole runs in this process."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import fldist
from fldist.algorithm import Algorithm, State, on_client
from fldist.algorithms.fedavg import FedAvg
from fldist.algorithms.scaffold import Scaffold
from fldist.config import build, load
from fldist.data.client_data import ClientData
from fldist.data.datasets import Digits
from fldist.fold import Mean, collect
from fldist.kinds import Scalar, Variates, Weights
from fldist.models.train import warm_up
from fldist.params import Params
from fldist.runner import Silent
from fldist.runtime.host import Host
from fldist.runtime.launch import Unsupervised
from fldist.runtime.output import Output
from fldist.runtime.server import ServerLoop
from fldist.seeding import Streams
from fldist.wire.local import LocalServer

MLP = {"name": "mlp", "hidden": [8]}
CNN = {"name": "cnn_bn", "widths": [4]}
SEED = 3
NUM_CLIENTS = 5

# of CNN on 8x8 images and ten classes: 4 kernels of 3x3, two vectors of BatchNorm, a linear layer
CNN_PARAMS = 4 * 9 + 2 * 4 + 4 * 10 + 10
CNN_BUFFERS = 2 * 4
CNN_COUNTERS = 1
CNN_BYTES = 4 * (CNN_PARAMS + CNN_BUFFERS) + 8 * CNN_COUNTERS


@pytest.fixture(autouse=True, scope="module")
def _imports():
    """Let no test pay for what torch and scikit-learn import at their first use."""
    warm_up()
    Digits().load()


def config(algorithm="fedavg", model=None, rounds=2, clients=None, local=None, travel="all", **other):
    """Five clients of unequal size on the digits; `algorithm` is a name or a section."""
    return {
        "seed": SEED,
        "rounds": rounds,
        "clients": {"num_clients": NUM_CLIENTS, **(clients or {})},
        "task": {
            "data": "digits",
            "partition": {"name": "dirichlet", "alpha": 2.0},
            "model": model or MLP,
            "travel": travel,
        },
        "local": {"epochs": 1, "batch_size": 64, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, **(local or {})},
        "algorithm": algorithm,
        "eval": {"every": 0},
        **other,
    }


def final_model(settings, directory):
    """The final model of a run by tensor name."""
    result = fldist.run(settings, output=directory)
    assert result["status"] == "finished"
    return load_file(Path(directory) / "model" / "model.safetensors")


def run_own(settings, algorithm, directory):
    """Run an algorithm of this file under these settings."""
    job = dataclasses.replace(build(load(settings)), algorithm=algorithm)
    directory.mkdir()
    link = LocalServer(Host(job).serve, job.calls())
    facts = {"backend": "in-process", "world_size": 1}
    named = {"algorithm": {"name": type(algorithm).__name__}}
    nobody = Unsupervised(survives_loss=True)
    options = {"ranks": [0], "supervisor": nobody, "facts": facts, "config": named}
    return job, ServerLoop(job, link, Output(directory), Silent(), **options).run()


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def assert_close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance, msg=name)


def distance(one, other):
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def ordinary(params):
    """A module of its own, as the settings' `mlp` with these values."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    module.load_state_dict({name: view.clone() for name, view in params.named()})
    return module


# ---- FedAvg
@pytest.mark.parametrize("model", [MLP, CNN])
def test_a_round_of_fedavg_is_the_mean_of_the_local_models_weighted_by_samples(tmp_path, model):
    settings = config(model=model, rounds=1)
    got = final_model(settings, tmp_path / "run")
    task = build(load(settings)).task
    assert len(set(task.sizes)) > 1  # the weights matter
    local = [ClientData(task, k, Streams(SEED, 1, k)).train(task.init_params()).params for k in range(NUM_CLIENTS)]
    weights = np.array(task.sizes, dtype=np.float64) / sum(task.sizes)
    for name, tensor in got.items():
        mean = sum(w * dict(y.named())[name].double() for w, y in zip(weights, local, strict=True))
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6, msg=name)
        else:
            assert tensor.tolist() == math.floor(float(mean)), name


@pytest.mark.parametrize("integers", ["mean", "max", "keep"])
def test_counters_after_one_round(tmp_path, integers):
    epochs, batch_size = 2, 16
    settings = config(model=CNN, rounds=1, local={"epochs": epochs, "batch_size": batch_size})
    settings["aggregation"] = {"integers": integers}
    sizes = build(load(settings)).task.sizes
    # a batch of one sample is left out, since it would reach BatchNorm
    steps = [epochs * (math.ceil(n / batch_size) - (n % batch_size == 1)) for n in sizes]
    exact = sum(n * t for n, t in zip(sizes, steps, strict=True)) / sum(sizes)
    assert exact % 1 > 0.1  # truncation shows
    expected = {"mean": math.floor(exact), "max": max(steps), "keep": 0}[integers]
    assert final_model(settings, tmp_path / "run")["1.num_batches_tracked"].item() == expected


@pytest.mark.parametrize("algorithm", ["fedavg", {"name": "fedprox", "mu": 0.0}, "scaffold"])
def test_one_client_is_plain_sgd(tmp_path, algorithm):
    """A new optimizer every round; SCAFFOLD's c equals its only client's c_1, so that nothing is corrected."""
    settings = config(algorithm, rounds=3, clients={"num_clients": 1})
    got = final_model(settings, tmp_path / "run")
    task = build(load(settings)).task
    x, y = task.rows(0)
    assert len(y) == 1437
    module = ordinary(task.init_params())
    for number in (1, 2, 3):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        order = torch.randperm(len(y), generator=Streams(SEED, number, 0).generator("order"))
        for batch in order.split(64):
            optimizer.zero_grad()
            cross_entropy(module(x[batch]), y[batch]).backward()
            optimizer.step()
    assert_close(got, module.state_dict(), tolerance=1e-5)


def test_a_run_is_repeatable_and_depends_on_its_seed(tmp_path):
    settings = config("scaffold", clients={"per_round": 2})
    hashes = [
        fldist.run({**settings, "seed": seed}, output=tmp_path / name)["state_hash"]
        for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    ]
    assert hashes[0] == hashes[1] != hashes[2]


# ---- FedProx
@pytest.mark.parametrize("model", [MLP, CNN])
def test_fedprox_with_mu_0_is_fedavg_bit_for_bit(tmp_path, model):
    settings = {"model": model, "clients": {"per_round": 3}, "local": {"epochs": 2}}
    fedavg = final_model(config("fedavg", **settings), tmp_path / "fedavg")
    fedprox = final_model(config({"name": "fedprox", "mu": 0.0}, **settings), tmp_path / "fedprox")
    assert_same_bits(fedavg, fedprox)


def test_fedprox_stays_nearer_to_the_start_the_larger_mu(tmp_path):
    start = dict(build(load(config())).task.init_params().named())
    moved = []
    for mu in (0.0, 0.3, 3.0):
        got = final_model(config({"name": "fedprox", "mu": mu}, rounds=1, local={"epochs": 3}), tmp_path / str(mu))
        moved.append(math.sqrt(sum(float((got[n] - start[n]).square().sum()) for n in got)))
    assert moved[0] > 1.1 * moved[1] > 1.2 * moved[2]


# ---- SCAFFOLD
class Variate(NamedTuple):
    c: Variates


@dataclass(frozen=True)
class Watched(Scaffold):
    """Notes before every round the model, the server's variate and those that the clients have committed."""

    seen: list = field(default_factory=list)

    def round(self, server, clients):
        got = clients.all().call(self.variate, phase="evaluate", fold={"c": collect()})
        self.seen.append((server.x, server.c, got.c))
        super().round(server, clients)

    @on_client
    def variate(self, me, data) -> Variate:
        return Variate(me.c)


def watched(tmp_path, **settings):
    algorithm = Watched()
    job, _ = run_own(config(**settings), algorithm, tmp_path / "run")
    return job.task, algorithm.seen


@pytest.mark.parametrize("model", [MLP, CNN])
def test_the_servers_variate_is_the_mean_of_all_clients_variates(tmp_path, model):
    _, seen = watched(tmp_path, model=model, rounds=5, clients={"per_round": 2})
    changed = []
    for (_, _, before), (_, c, after) in itertools.pairwise(seen):
        assert sorted(after) == list(range(NUM_CLIENTS))
        mean = sum(v.floats.double() for v in after.values()) / NUM_CLIENTS
        scale = max(float(v.floats.abs().max()) for v in after.values())
        torch.testing.assert_close(c.floats.double(), mean, rtol=0, atol=1e-6 * max(1.0, scale))
        changed.append({k for k in after if not after[k].equals(before[k])})
    assert all(len(clients) == 2 for clients in changed)  # the selected ones and nobody else
    assert len(set.union(*changed)) > 2
    assert seen[-1][1].norm() > 0.1


def test_variates_start_at_zero_and_cover_the_parameters_only(tmp_path):
    _, seen = watched(tmp_path, model=CNN, rounds=1)
    _, c, variates = seen[0]
    for variate in [c, *variates.values()]:
        assert variate.floats.shape == (CNN_PARAMS,)
        assert not variate.floats.any()
        assert variate.ints.numel() == 0


@pytest.mark.parametrize("model", [MLP, CNN])
def test_the_first_round_of_scaffold_is_fedavg_bit_for_bit(tmp_path, model):
    settings = {"model": model, "rounds": 1, "clients": {"per_round": 3}, "local": {"epochs": 2}}
    assert_same_bits(
        final_model(config("fedavg", **settings), tmp_path / "fedavg"),
        final_model(config("scaffold", **settings), tmp_path / "scaffold"),
    )


def test_the_second_round_of_scaffold_is_not_fedavg(tmp_path):
    """What makes the test above able to fail."""
    models = [final_model(config(name, rounds=2), tmp_path / name) for name in ("fedavg", "scaffold")]
    assert distance(*models) > 1e-3


def test_one_local_step_makes_the_variate_the_gradient_at_the_model_that_was_sent(tmp_path):
    """Also in later rounds, where c and c_i are not zero: y = x - eta (g + c - c_i), so that c_i+ = g."""
    local = {"batch_size": 2000, "momentum": 0.0, "weight_decay": 0.0, "lr": 0.5}
    task, seen = watched(tmp_path, rounds=4, clients={"per_round": 3}, local=local)
    checked = 0
    for (x, _, before), (_, _, after) in itertools.pairwise(seen):
        for k in after:
            if after[k].equals(before[k]):
                continue
            module = ordinary(x)
            images, labels = task.rows(k)
            loss = cross_entropy(module(images), labels)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, module.parameters())])
            torch.testing.assert_close(after[k].floats, gradient, rtol=0, atol=2e-6)
            assert gradient.abs().max() > 1e-2
            checked += 1
    assert checked == 3 * 3


def test_scaffold_by_hand_for_three_rounds(tmp_path):
    """The whole algorithm with local steps by `ClientData.train` and everything else in float64."""
    settings = config("scaffold", model=CNN, rounds=3, local={"epochs": 2})
    got = final_model(settings, tmp_path / "run")
    task = build(load(settings)).task
    x = task.init_params()
    num_params = x.layout.num_params
    zeros = torch.zeros(num_params, dtype=torch.float64)
    c, c_i = zeros, [zeros] * NUM_CLIENTS
    for number in (1, 2, 3):
        models, changes = [], []
        for k in range(NUM_CLIENTS):
            drift = Params(x.layout.restricted("params"), (c - c_i[k]).float())
            local = ClientData(task, k, Streams(SEED, number, k)).train(x, drift=drift)
            moved = (x.floats - local.params.floats)[:num_params].double()
            new = c_i[k] - c + moved / (local.steps * 0.05)
            models.append(local.params)
            changes.append(new - c_i[k])
            c_i[k] = new
        weights = [n / sum(task.sizes) for n in task.sizes]
        floats = sum(w * y.floats.double() for w, y in zip(weights, models, strict=True)).float()
        ints = sum(w * y.ints.double() for w, y in zip(weights, models, strict=True)).trunc().long()
        x = Params(x.layout, floats, ints)
        c = c + sum(changes) / NUM_CLIENTS
    assert_close(got, dict(x.named()), tolerance=1e-4)


# ---- bytes
@pytest.mark.parametrize("per_round", [2, 5])
@pytest.mark.parametrize(
    ("travel", "size"),
    [("all", CNN_BYTES), ("floats", 4 * (CNN_PARAMS + CNN_BUFFERS)), ("params", 4 * CNN_PARAMS)],
)
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox"])
def test_bytes_of_fedavg(tmp_path, algorithm, per_round, travel, size):
    """Down Sz, up Sz and n_k (8 bytes), for every client and round."""
    assert (CNN_PARAMS, CNN_BYTES) == (94, 416)
    rounds = 2
    settings = config(algorithm, model=CNN, rounds=rounds, clients={"per_round": per_round}, travel=travel)
    result = fldist.run(settings, output=tmp_path / "run")
    messages = rounds * per_round
    assert result["bytes"]["logical"] == {"down": messages * size, "up": messages * (size + 8)}
    assert result["bytes"]["by_kind"] == {
        "weights": {"down": messages * size, "up": messages * size},
        "scalars": {"down": 0, "up": messages * 8},
    }
    assert result["bytes"]["by_phase"] == {"train": result["bytes"]["logical"]}
    assert result["bytes"]["wasted"] == {}


@pytest.mark.parametrize("per_round", [2, 5])
def test_scaffold_adds_the_bytes_of_the_parameters_each_way(tmp_path, per_round):
    rounds = 2
    settings = config("scaffold", model=CNN, rounds=rounds, clients={"per_round": per_round})
    result = fldist.run(settings, output=tmp_path / "run")
    messages = rounds * per_round
    variates = 4 * CNN_PARAMS
    assert result["bytes"]["logical"] == {
        "down": messages * (CNN_BYTES + variates),
        "up": messages * (CNN_BYTES + variates + 8),
    }
    assert result["bytes"]["by_kind"]["variates"] == {"down": messages * variates, "up": messages * variates}


def test_every_round_has_the_bytes_of_its_clients(tmp_path):
    fldist.run(config(model=CNN, rounds=3, clients={"per_round": 3}), output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line["bytes"]["logical"] == {"down": 3 * CNN_BYTES, "up": 3 * (CNN_BYTES + 8)}
        assert (line["selected"], line["replied"], line["missing"]) == (3, 3, {})


# ---- what a run owes its clients
class Calls(NamedTuple):
    n: Scalar


class Reply(NamedTuple):
    y: Weights
    n: Scalar


@dataclass(frozen=True)
class RandomStart(FedAvg):
    """Clients whose first state is drawn from the global generator, as a personal model's would be."""

    def init_client(self, task, client):
        return State(head=torch.rand(4))


def test_a_random_first_state_of_a_client_follows_from_the_seed(tmp_path):
    hashes = []
    for name, noise in (("a", 1), ("b", 2)):
        torch.manual_seed(noise)  # what ran in this process before must not matter
        _, result = run_own(config(rounds=1, clients={"per_round": 2}), RandomStart(), tmp_path / name)
        hashes.append(result["state_hash"])
    assert hashes[0] == hashes[1]


@dataclass(frozen=True)
class Liar(Algorithm):
    """Clients 1 and 3 send what no mean can take; all count their calls."""

    counts: list = field(default_factory=list)

    def init_server(self, task):
        return State(x=task.init_params())

    def init_client(self, task, client):
        return State(calls=0)

    def round(self, server, clients):
        self.counts.append(clients.all().call(self.count, phase="evaluate").n)
        got = clients.all().call(self.update, x=server.x, fold={"y": Mean(by="n")})
        assert got.clients == [0, 2, 4]
        assert got.missing[1].startswith("refused: y: nan")
        assert got.missing[3].startswith("refused: y: range")
        server.x = got.y

    @on_client
    def count(self, me, data) -> Calls:
        return Calls(me.calls)

    @on_client
    def update(self, me, data, x: Weights) -> Reply:
        me.calls = me.calls + 1
        y = x.clone()
        y.floats[:] = 2.0
        if data.client in (1, 3):
            y.floats[-1] = math.nan if data.client == 1 else 1e9
        return Reply(y, data.n)


def test_a_refused_reply_leaves_no_trace_in_model_or_state(tmp_path):
    algorithm = Liar()
    run_own(config(rounds=3), algorithm, tmp_path / "run")
    assert algorithm.counts == [{k: 0 if k in (1, 3) else done for k in range(NUM_CLIENTS)} for done in range(3)]
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(t, torch.full_like(t, 2.0)) for t in model.values())
