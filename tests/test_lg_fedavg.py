"""LG-FedAvg: rounds worked by hand, every byte, who has which head, and replies that are lost."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fldist
from fldist.algorithm import Me, on_client
from fldist.algorithms.lg_fedavg import Head, LgFedAvg, Update, head_of, head_slots, with_head
from fldist.config import build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.inspection import predict
from fldist.runner import run_here
from fldist.seeding import Streams
from tests.conftest import Hosts, small
from tests.test_pruning_baselines import lines_of, states

SEED, WIDTH, C = 3, 6, 10
HEAD = WIDTH * C + C
NARROW = {"name": "mlp", "hidden": [WIDTH]}
DEEP = {"name": "mlp", "hidden": [9, WIDTH]}
NORM = {"name": "cnn_bn", "widths": [4, WIDTH]}


def settings(**changes):
    """Four clients in turn with two networks, whose classifiers are alike."""
    base = {
        "algorithm": "lg_fedavg",
        "seed": SEED,
        "clients": {"num_clients": 4, "models": [NARROW, DEEP], "init": "own"},
        "task__partition": {"name": "dirichlet", "alpha": 1.0},
        "task__subset": {"train": 300, "test": 60},
        "task__model": NARROW,
        "eval__every": 0,
    }
    return small(**{**base, **changes})


def weighted(heads, weights):
    total = sum(w / sum(weights) * h.double() for w, h in zip(weights, heads, strict=True))
    return total.float()


def heads_of(task, found):
    """By client: the head that its model has."""
    return {c: head_of(state["y"], head_slots(task.architecture(c))) for c, state in found.items()}


def bases_of(task, found):
    """By client: the rest of its model's parameters."""
    return {
        c: torch.cat([v.flatten() for n, v in state["y"].trainable.named() if n not in names_of(task, c)])
        for c, state in found.items()
    }


def names_of(task, client):
    return {slot.name for slot in head_slots(task.architecture(client))}


def plain_training(task, client, start, number):
    """An epoch of plain SGD in the order of the client's stream, from the values of `start`; the module."""
    widths = [64, *(NARROW if client % 2 == 0 else DEEP)["hidden"]]
    layers = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Linear(WIDTH, C))
    module.load_state_dict({name: view.clone() for name, view in start.named()})
    x, y = task.rows(client)
    order = torch.randperm(len(y), generator=Streams(SEED, number, client).generator("order"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for rows in order.split(64):
        optimizer.zero_grad()
        cross_entropy(module(x[rows]), y[rows]).backward()
        optimizer.step()
    return module


def test_two_rounds_by_hand(tmp_path):
    fldist.run(settings(), output=tmp_path / "run")
    task = build(load(settings())).task
    models = {c: task.init_params(c, whole=True) for c in range(4)}
    slots = {c: head_slots(task.architecture(c)) for c in range(4)}
    head = torch.cat([t.flatten() for t in list(dict(models[0].named()).values())[-2:]])  # client 0's
    for number in (1, 2):
        trained = {}
        for c in range(4):
            module = plain_training(task, c, with_head(models[c], head, slots[c]), number)
            trained[c] = torch.cat([p.detach().flatten() for p in module.parameters()])
            models[c] = models[c].clone()
            models[c].floats.copy_(trained[c])
        head = weighted([t[-HEAD:] for t in trained.values()], [task.sizes[c] for c in range(4)])
    server, clients = states(tmp_path / "run")
    torch.testing.assert_close(server["head"], head, rtol=0, atol=1e-6)
    assert len({task.sizes[c] for c in range(4)}) > 1
    for c in range(4):
        torch.testing.assert_close(clients[c]["y"].floats[:-HEAD], trained[c][:-HEAD], rtol=0, atol=1e-6)
        assert torch.equal(clients[c]["y"].floats[-HEAD:], server["head"])


def test_clients_of_one_size_are_averaged_alike(tmp_path):
    """With as many samples everywhere, n_k changes nothing: the head is the plain mean."""

    SENT.clear()
    changes = {"algorithm": "tests.test_lg_fedavg:Watched", "task__partition": "iid", "rounds": 1}
    fldist.run(settings(**changes), output=tmp_path / "run")
    server, _ = states(tmp_path / "run")
    assert set(build(load(settings(**changes))).task.sizes) == {75}
    mean = torch.stack([SENT[1, c].double() for c in range(4)]).mean(dim=0).float()
    torch.testing.assert_close(server["head"], mean, rtol=0, atol=1e-7)


SENT: dict[tuple[int, int], torch.Tensor] = {}


@dataclass(frozen=True)
class Watched(LgFedAvg):
    """Keeps what clients send."""

    @on_client
    def update(self, me: Me, data: ClientData, head: Head | None) -> Update:
        got = super().update(me, data, head)
        SENT[data.round, data.client] = got.head.clone()
        return got


def test_bytes_are_the_heads_alone_whatever_is_below_them(tmp_path):
    """Two of four clients a round: they send, all receive."""
    for name, models in (("small", [NARROW]), ("large", [{"name": "mlp", "hidden": [50, WIDTH]}, NORM])):
        changes = {"clients": {"num_clients": 4, "per_round": 2, "models": models}, "rounds": 3}
        result = fldist.run(settings(**changes), output=tmp_path / name)
        assert result["bytes"]["by_phase_and_kind"] == {
            "setup.weights": {"up": 0, "down": 4 * 4 * HEAD},
            "train.weights": {"up": 3 * 2 * 4 * HEAD, "down": 0},
            "train.scalars": {"up": 3 * 2 * 8, "down": 0},
            "load.weights": {"up": 0, "down": 3 * 4 * 4 * HEAD},
        }
        found = predict(build(load(settings(**changes))))
        assert not found.unknown
        assert found.by_kind["weights"] == {"up": 2 * 4 * HEAD, "down": 4 * 4 * HEAD}


def test_the_initial_head_is_client_0s_and_reaches_all(tmp_path):
    """After the setup, before any training."""
    with pytest.raises(KeyboardInterrupt):
        fldist.run(settings(algorithm="tests.test_lg_fedavg:EndsAtOnce"), output=tmp_path / "run")
    task = build(load(settings())).task
    first = task.init_params(0, whole=True).floats[-HEAD:]
    for c in range(4):
        state = STATES[c]
        assert torch.equal(state.floats[-HEAD:], first)
        assert torch.equal(state.floats[:-HEAD], task.init_params(c, whole=True).floats[:-HEAD])
    assert not torch.equal(task.init_params(2, whole=True).floats[-HEAD:], first)


STATES: dict[int, fldist.params.Params] = {}


@dataclass(frozen=True)
class EndsAtOnce(LgFedAvg):
    """Keeps the models after the setup."""

    @on_client
    def load(self, me: Me, data: ClientData, head: Head) -> None:
        super().load(me, data, head)
        STATES[data.client] = me.y

    def round(self, server, clients):
        raise KeyboardInterrupt


def test_who_is_not_selected_is_scored_with_the_new_head_on_its_own_network(tmp_path):
    changes = {
        "clients": {"num_clients": 4, "per_round": 1, "models": [NARROW, NORM]},
        "task__model": NARROW,
        "eval": {"every": 1},
        "rounds": 2,
    }
    fldist.run(settings(**changes), output=tmp_path / "run")
    task = build(load(settings(**changes))).task
    server, clients = states(tmp_path / "run")
    assert all(torch.equal(h, server["head"]) for h in heads_of(task, clients).values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    last = {r["client"]: r for r in rows if r["round"] == 2}
    assert set(last) == set(range(4))
    for c, state in clients.items():
        scores = task.evaluate_client(state["y"], c, "global")
        assert last[c]["accuracy"] == pytest.approx(scores.accuracy)
        assert last[c]["loss"] == pytest.approx(scores.loss)
    first = bases_of(task, {c: {"y": task.init_params(c, whole=True)} for c in range(4)})
    kept = [c for c, base in bases_of(task, clients).items() if torch.equal(base, first[c])]
    assert 2 <= len(kept) < 4  # two rounds, one client each


def test_statistics_of_batch_norm_stay_with_their_client(tmp_path):
    changes = {"clients": {"num_clients": 4, "models": [NORM]}, "task__model": NORM, "rounds": 1}
    fldist.run(settings(**changes), output=tmp_path / "run")
    _, clients = states(tmp_path / "run")
    buffers = [s["y"].floats[s["y"].layout.num_params :] for s in clients.values()]
    assert not torch.equal(buffers[0], buffers[1])


# ---- replies that are lost
@dataclass(frozen=True)
class Spoilt(LgFedAvg):
    """In round 2, client 0 sends NaN, client 1 fails once it has written its model, client 2 as it loads the head."""

    @on_client
    def update(self, me: Me, data: ClientData, head: Head | None) -> Update:
        got = super().update(me, data, head)
        GIVEN[data.round, data.client] = head
        if data.round == 2 and data.client == 0:
            got.head[0] = math.nan
        if data.round == 2 and data.client == 1:
            raise RuntimeError("gone")
        return got

    @on_client
    def load(self, me: Me, data: ClientData, head: Head) -> None:
        super().load(me, data, head)
        if data.round == 2 and data.client == 2:
            raise RuntimeError("gone")


GIVEN: dict[tuple[int, int], torch.Tensor | None] = {}


def test_a_reply_that_is_lost_or_refused_leaves_no_trace_and_the_head_comes_later(tmp_path):
    how = {"algorithm": "tests.test_lg_fedavg:Spoilt"}
    found = {}
    for rounds in (1, 2, 3):
        GIVEN.clear()
        fldist.run(settings(**how, rounds=rounds), output=tmp_path / str(rounds))
        found[rounds] = states(tmp_path / str(rounds))
    task = build(load(settings())).task
    lines = lines_of(tmp_path / "3")
    assert [sorted(line["missing"]) for line in lines] == [[], ["0", "1", "2"], []]
    assert lines[1]["missing"]["0"].startswith("refused: head: nan")
    for c in (0, 1):  # nothing of round 2
        assert torch.equal(found[2][1][c]["y"].floats, found[1][1][c]["y"].floats)
    heads = heads_of(task, found[2][1])
    assert torch.equal(heads[3], found[2][0]["head"])
    assert not torch.equal(heads[2], found[2][0]["head"])  # the one that it has trained itself
    assert found[2][0]["behind"] == [0, 1, 2]
    # what came is the mean of two
    assert not torch.equal(found[2][0]["head"], found[1][0]["head"])
    # in round 3 they are given what they lack; others have it
    assert {c for c in range(4) if GIVEN[3, c] is not None} == {0, 1, 2}
    assert all(torch.equal(GIVEN[3, c], found[2][0]["head"]) for c in (0, 1, 2))
    assert not any(GIVEN[r, c] is not None for r in (1, 2) for c in range(4))
    assert found[3][0]["behind"] == []
    rows = [json.loads(line) for line in (tmp_path / "3" / "messages.jsonl").read_text().splitlines()]
    extra = [r for r in rows if r["row"] == "kind" and (r["phase"], r["direction"]) == ("train", "down")]
    assert [(r["round"], r["client"], r["logical_bytes"]) for r in extra] == [(3, c, 4 * HEAD) for c in (0, 1, 2)]


@dataclass(frozen=True)
class Hostile(LgFedAvg):
    """In round 1, client 0 sends something else."""

    sends: str = ""

    @on_client
    def update(self, me: Me, data: ClientData, head: Head | None) -> Update:
        got = super().update(me, data, head)
        if data.client or data.round > 1:
            return got
        made = {
            "shape": got.head[:-1].clone(),
            "dtype": got.head.double(),
            "range": got.head * 1e9,
            "inf": got.head * math.inf,
        }
        return got._replace(head=made[self.sends])


@pytest.mark.parametrize("sends", ["shape", "dtype", "range", "inf"])
def test_a_head_that_is_none_is_refused_and_costs_nobody_else(tmp_path, sends):
    how = {"name": "tests.test_lg_fedavg:Hostile", "sends": sends}
    fldist.run(settings(algorithm=how), output=tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    reason = {"dtype": "shape", "inf": "range"}.get(sends, sends)
    assert lines[0]["missing"]["0"].startswith(f"refused: head: {reason}")
    assert lines[1]["missing"] == {}
    server, _ = states(tmp_path / "run")
    assert bool(server["head"].isfinite().all())


# ---- ranks, resuming
@pytest.mark.parametrize("topology", ["star", "collective", "reduce"])
def test_ranks_change_nothing(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    made = settings(eval={"every": 1}, clients={"num_clients": 5, "per_round": 3, "models": [NARROW, NORM]})
    alone = fldist.run(made, output=tmp_path / "alone")
    many = run_here(load({**made, "topology": topology}), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["final"] == alone["final"]
    assert many["bytes"]["by_phase_and_kind"] == alone["bytes"]["by_phase_and_kind"]


def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path):
    whole = fldist.run(settings(rounds=4), output=tmp_path / "whole")
    fldist.run(settings(rounds=2), output=tmp_path / "run")
    again = run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    assert again["state_hash"] == whole["state_hash"]


# ---- what is refused
def test_heads_of_several_shapes_are_refused_by_name():
    models = [NARROW, {"name": "mlp", "hidden": [7]}]
    with pytest.raises(ValueError, match=r"lg_fedavg averages classifiers.*\[10, 6\].*\[10, 7\].*task\.feature_dim=6"):
        build(load(settings(clients__models=models)))
    # what no client has is not looked at
    build(load(settings(task__model={"name": "mlp", "hidden": [7]})))


def test_one_width_for_all_is_a_remedy(tmp_path):
    models = [NARROW, {"name": "mlp", "hidden": [20]}]
    result = fldist.run(settings(clients__models=models, task__feature_dim=5, rounds=1), output=tmp_path / "run")
    assert result["bytes"]["by_phase_and_kind"]["train.weights"]["up"] == 4 * 4 * (5 * C + C)
