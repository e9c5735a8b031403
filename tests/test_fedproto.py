"""FedProto: rounds worked by hand, every byte, scores by the nearest prototype, and replies that cannot be."""

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
from fldist.algorithms.fedproto import FedProto, Nearest, Seen, of_classes, targets
from fldist.config import build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.fold import FoldContext, Refused
from fldist.inspection import predict
from fldist.kinds import Labels, Prototypes
from fldist.models.evaluate import class_metrics
from fldist.models.layers import features_and_logits
from fldist.prototypes import Uploaded, folds
from fldist.runner import run_here
from fldist.seeding import Streams
from tests.conftest import Hosts, small
from tests.test_pruning_baselines import lines_of, states

SEED, K, C = 3, 6, 10
NARROW = {"name": "mlp", "hidden": [K]}
DEEP = {"name": "mlp", "hidden": [9, K]}
NORM = {"name": "cnn_bn", "widths": [4, K]}


def settings(algorithm="fedproto", **changes):
    """Four clients in turn with two networks, whose features have one width."""
    base = {
        "algorithm": algorithm,
        "seed": SEED,
        "clients": {"num_clients": 4, "models": [NARROW, DEEP], "init": "own"},
        "task__partition": {"name": "dirichlet", "alpha": 0.5},
        "task__subset": {"train": 300, "test": 60},
        "task__model": NARROW,
        "local": {"epochs": 2, "batch_size": 32, "lr": 0.05},
        "eval__every": 0,
    }
    return small(**{**base, **changes})


def rows_of(directory, name="messages.jsonl"):
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


def held(task, client):
    """The classes of a client's training samples, ascending."""
    return sorted(set(task.labels(client).tolist()))


# ---- the pieces
def test_a_class_without_prototype_adds_no_loss_and_no_gradient():
    r = torch.randn(5, K, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.tensor([0, 1, 2, 1, 3])
    classes, prototypes = torch.tensor([1, 3], dtype=torch.int32), torch.randn(2, K)
    t = targets(r, y, prototypes, classes, 4)
    assert not t.requires_grad
    for b, c in enumerate(y.tolist()):
        assert torch.equal(t[b], prototypes[[1, 3].index(c)] if c in (1, 3) else r[b].detach())
    loss = torch.nn.functional.mse_loss(r, t)
    want = sum(((r[b] - t[b]) ** 2).sum() for b in (1, 3, 4)) / (5 * K)  # the mean is of all five rows
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert not r.grad[[0, 2]].any()
    assert bool(r.grad[[1, 3, 4]].any(dim=1).all())


def test_what_was_seen_is_the_mean_by_class_of_all_batches():
    rng = torch.Generator().manual_seed(2)
    r, y = torch.randn(50, K, generator=rng), torch.randint(0, 4, (50,), generator=rng) * 2
    seen = Seen(8, K, torch.device("cpu"))
    for rows in torch.arange(50).split(7):
        seen.add(r[rows].clone().requires_grad_(True), y[rows])
    means, classes = seen.means()
    assert (classes.tolist(), classes.dtype, means.dtype) == ([0, 2, 4, 6], torch.int32, torch.float32)
    for mean, c in zip(means, classes.tolist(), strict=True):
        torch.testing.assert_close(mean, r[y == c].mean(dim=0))
    means, classes = Seen(8, K, torch.device("cpu")).means()
    assert (means.shape, classes.shape) == ((0, K), (0,))


def test_the_global_prototype_is_the_plain_mean_of_those_who_have_the_class():
    vectors = torch.tensor([[1.0, 2], [3, 4], [5, 6], [9, 0]])
    means, classes = of_classes(vectors, torch.tensor([0, 2, 2, 3]), 5)
    assert means.tolist() == [[1, 2], [4, 5], [9, 0]]
    assert (classes.tolist(), classes.dtype) == ([0, 2, 3], torch.int32)


def test_the_nearest_prototype_by_hand():
    module = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(2, 4))
    prototypes, classes = torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([1, 3], dtype=torch.int32)
    outputs = Nearest(module, prototypes, classes, 4)(torch.tensor([[0.0, 0], [3, 4], [3, 0]]))
    inf = math.inf
    assert outputs.tolist() == [[-inf, 0, -inf, -5], [-inf, -5, -inf, 0], [-inf, -3, -inf, -4]]
    assert outputs.argmax(dim=1).tolist() == [1, 3, 1]


def test_near_ones_are_told_apart_far_from_the_origin():
    """Through a matrix product, distances of 1e-3 at 1e3 would be rounding."""
    module = nn.Linear(2, 2)
    prototypes = torch.tensor([[1000.0, 1000], [1000.001, 1000]])
    outputs = Nearest(module, prototypes, torch.tensor([0, 1]), 2)(prototypes)
    assert outputs.argmax(dim=1).tolist() == [0, 1]
    assert bool((outputs.diagonal() == 0).all())


# ---- whole rounds
def plain(client):
    """A client's network as an ordinary module: what is below the classifier, and the classifier."""
    widths = [64, *(NARROW if client % 2 == 0 else DEEP)["hidden"]]
    layers = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers), nn.Linear(K, C)


def flat(base, head):
    return torch.cat([p.detach().flatten() for m in (base, head) for p in m.parameters()])


def plain_round(task, client, values, number, known, weight, epochs=2):
    """Two epochs of plain SGD from flat values; the values after it and the means of the features on the way."""
    base, head = plain(client)
    at = 0
    with torch.no_grad():
        for p in [*base.parameters(), *head.parameters()]:
            p.copy_(values[at : at + p.numel()].view(p.shape))
            at += p.numel()
    optimizer = torch.optim.SGD([*base.parameters(), *head.parameters()], lr=0.05)
    x, y = task.rows(client)
    order = Streams(SEED, number, client).generator("order")
    met = {}
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(32):
            r = base(x[rows])
            loss = cross_entropy(head(r), y[rows])
            for row, c in zip(r, y[rows].tolist(), strict=True):
                met.setdefault(c, []).append(row.detach())
                if c in known:
                    loss = loss + weight * ((row - known[c]) ** 2).sum() / (len(rows) * K)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return flat(base, head), {c: torch.stack(rows).mean(dim=0) for c, rows in met.items()}


def test_three_rounds_by_hand(tmp_path):
    """Two of four clients in each, so that classes come and go."""
    changes = {
        "rounds": 3,
        "clients": {"num_clients": 4, "per_round": 2, "models": [NARROW, DEEP], "init": "own"},
        "task__partition": {"name": "shards", "per_client": 2},
    }
    fldist.run(settings(**changes), output=tmp_path / "run")
    task = build(load(settings(**changes))).task
    values = {c: task.init_params(c, whole=True).floats for c in range(4)}
    known = {}
    numbers = []
    for number in (1, 2, 3):
        rows = rows_of(tmp_path / "run")
        chosen = sorted({r["client"] for r in rows if (r["round"], r["phase"]) == (number, "train")})
        sent = []
        for c in chosen:
            values[c], met = plain_round(task, c, values[c], number, known, 10.0)
            sent.append(met)
        known = {
            c: torch.stack([met[c] for met in sent if c in met]).mean(dim=0)
            for c in range(C)
            if any(c in met for met in sent)
        }
        numbers.append(sorted(known))
    server, clients = states(tmp_path / "run")
    assert server["classes"].tolist() == numbers[-1]
    assert len({tuple(n) for n in numbers}) > 1  # or nothing would be said about classes that are forgotten
    torch.testing.assert_close(server["prototypes"], torch.stack([known[c] for c in numbers[-1]]), rtol=0, atol=1e-5)
    for c, state in clients.items():
        torch.testing.assert_close(state["y"].floats, values[c], rtol=0, atol=1e-5)
        assert torch.equal(state["prototypes"], server["prototypes"])  # whoever was selected
        assert torch.equal(state["classes"], server["classes"])
    assert set(clients) == set(range(4))


@pytest.mark.parametrize("how", [{"clients__models": [NORM, DEEP]}, {"local__clip": 0.1, "local__momentum": 0.9}])
def test_the_first_round_is_that_of_local_training(tmp_path, how):
    """No bit differs."""
    models = {}
    for name in ("local", "fedproto"):
        fldist.run(settings(name, rounds=1, **how), output=tmp_path / name)
        _, models[name] = states(tmp_path / name)
    assert set(models["local"]) == set(range(4))
    for c, state in models["local"].items():
        assert state["y"].floats.numpy().tobytes() == models["fedproto"][c]["y"].floats.numpy().tobytes()
        assert torch.equal(state["y"].ints, models["fedproto"][c]["y"].ints)


def test_without_weight_clients_go_on_as_in_local_training_and_with_it_they_do_not(tmp_path):
    models = {}
    for name in ("local", "fedproto", {"name": "fedproto", "lambda_": 0.0}):
        key = str(name)
        fldist.run(settings(name, rounds=3), output=tmp_path / str(len(models)))
        models[key] = states(tmp_path / str(len(models)))[1]
    local, pulled, free = models.values()
    for c, state in local.items():
        assert torch.equal(state["y"].floats, free[c]["y"].floats)
        assert not torch.equal(state["y"].floats, pulled[c]["y"].floats)


def test_prototypes_are_of_features_in_training_mode(tmp_path):
    """With BatchNorm, those of a model in eval mode would be others."""
    SENT.clear()
    how = {"clients": {"num_clients": 2, "models": [NORM]}, "task__model": NORM, "rounds": 1, "local__epochs": 1}
    made = settings("tests.test_fedproto:Watched", **how, local__batch_size=300)
    fldist.run(made, output=tmp_path / "run")
    task = build(load(made)).task
    for c in range(2):  # one step: features before it, of the initial model
        x, y = task.rows(c)
        module = task.architecture(c).copy()
        module.load_state_dict(dict(task.init_params(c, whole=True).named()))
        r, _ = features_and_logits(module.train(), x)
        assert SENT[c].classes.tolist() == held(task, c)
        for got, k in zip(SENT[c].prototypes, held(task, c), strict=True):
            torch.testing.assert_close(got, r[y == k].mean(dim=0), rtol=1e-5, atol=1e-5)
        r, _ = features_and_logits(module.eval(), x)
        assert not torch.allclose(SENT[c].prototypes[0], r[y == held(task, c)[0]].mean(dim=0), atol=1e-3)


SENT: dict[int, Uploaded] = {}


@dataclass(frozen=True)
class Watched(FedProto):
    """Keeps what clients send."""

    @on_client
    def update(self, me: Me, data: ClientData, prototypes: Prototypes | None, classes: Labels | None) -> Uploaded:
        got = super().update(me, data, prototypes, classes)
        SENT[data.client] = Uploaded(got.prototypes.clone(), got.classes.clone())
        return got


def test_what_is_left_out_of_every_epoch_is_in_no_prototype(tmp_path):
    SENT.clear()
    how = {"local": {"epochs": 3, "batch_size": 16, "lr": 0.05, "order": "fixed", "tail": "drop"}, "rounds": 1}
    made = settings("tests.test_fedproto:Watched", **how)
    fldist.run(made, output=tmp_path / "run")
    task = build(load(made)).task
    fewer = 0
    for c in range(4):
        n = task.sizes[c] - task.sizes[c] % 16
        kept = sorted(set(task.labels(c)[:n].tolist()))
        assert SENT[c].classes.tolist() == kept
        fewer += kept != held(task, c)
    assert fewer


# ---- bytes
def test_bytes_are_those_of_the_formula(tmp_path):
    """Whatever is below the features; two of four clients send in a round, all receive."""
    for name, models in (("small", [NARROW]), ("large", [{"name": "mlp", "hidden": [50, K]}, NORM])):
        made = settings(clients={"num_clients": 4, "per_round": 2, "models": models}, rounds=3)
        result = fldist.run(made, output=tmp_path / name)
        task = build(load(made)).task
        rows = rows_of(tmp_path / name)
        up = [r for r in rows if r["row"] == "kind" and r["phase"] == "train"]
        sent = [0, 0, 0, 0]  # classes that were sent in each round; those with a prototype at its end
        down = 0
        for number in (1, 2, 3):
            chosen = sorted({r["client"] for r in up if r["round"] == number})
            sent[number] = sum(len(held(task, c)) for c in chosen)
            down += 4 * len(set().union(*(held(task, c) for c in chosen)))
        assert result["bytes"]["by_phase_and_kind"] == {
            "train.prototypes": {"up": 4 * K * sum(sent), "down": 0},
            "train.labels": {"up": 4 * sum(sent), "down": 0},
            "load.prototypes": {"up": 0, "down": 4 * K * down},
            "load.labels": {"up": 0, "down": 4 * down},
        }
        for row in up:
            each = len(held(task, row["client"]))
            assert row["logical_bytes"] == 4 * each * (K if row["kind"] == "prototypes" else 1)


def test_a_dry_run_knows_them(tmp_path):
    made = settings(rounds=1, clients={"num_clients": 4, "per_round": 2, "models": [NARROW, NORM]})
    found = predict(build(load(made)))
    assert not found.unknown
    assert found.by_kind == fldist.run(made, output=tmp_path / "run")["bytes"]["by_kind"]


# ---- scores
def by_hand(task, state, client, split="global"):
    """Outputs and labels."""
    x, y = task.rows(client, split) if split != "global" else next(iter(task.test_batches(1000)))
    module = task.frozen_copy(state["y"], client)
    r, _ = features_and_logits(module, x)
    outputs = torch.full((len(y), C), -math.inf)
    for p, c in zip(state["prototypes"], state["classes"].tolist(), strict=True):
        outputs[:, c] = -(r - p).square().sum(dim=1).sqrt()
    return outputs, y


def test_clients_are_scored_by_the_new_prototypes_whoever_was_selected(tmp_path):
    how = {
        "clients": {"num_clients": 4, "per_round": 3, "models": [NARROW, NORM]},
        "eval": {"metrics": ["auc", "top5"]},
        "task__partition": "iid",
    }
    fldist.run(settings(**how), output=tmp_path / "run")
    task = build(load(settings(**how))).task
    _, clients = states(tmp_path / "run")
    scored = {r["client"]: r for r in rows_of(tmp_path / "run", "clients.jsonl") if r["round"] == 2}
    assert set(scored) == set(range(4))
    for c, state in clients.items():
        outputs, y = by_hand(task, state, c)
        assert scored[c]["accuracy"] == pytest.approx(float((outputs.argmax(dim=1) == y).double().mean()))
        assert scored[c]["loss"] == pytest.approx(float(cross_entropy(outputs, y)), rel=1e-4)
        assert scored[c]["auc"] == pytest.approx(class_metrics(outputs, y)["auc"], rel=1e-3)
        logits = task.evaluate_client(state["y"], c, "global")
        assert scored[c]["loss"] != pytest.approx(logits.loss, rel=1e-3)


def test_a_class_that_nobody_has_is_never_predicted_and_leaves_no_auc(tmp_path):
    """Five classes at one client, one client a round: the others' samples are all missed."""
    how = {
        "clients": {"num_clients": 4, "per_round": 1, "models": [NARROW]},
        "task__partition": {"name": "shards", "per_client": 2},
        "eval": {"metrics": ["auc"]},
    }
    result = fldist.run(settings(**how), output=tmp_path / "run")
    task = build(load(settings(**how))).task
    server, clients = states(tmp_path / "run")
    assert 0 < len(server["classes"]) < C
    scored = {r["client"]: r for r in rows_of(tmp_path / "run", "clients.jsonl") if r["round"] == 2}
    for c, state in clients.items():
        outputs, y = by_hand(task, state, c)
        assert set(outputs.argmax(dim=1).tolist()) <= set(server["classes"].tolist())
        assert scored[c]["accuracy"] == pytest.approx(float((outputs.argmax(dim=1) == y).double().mean()))
        assert scored[c]["auc"] is None
        assert scored[c]["loss"] is None  # infinite
    assert result["final"]["accuracy"] is not None


# ---- replies that are lost, and such as cannot be
@dataclass(frozen=True)
class Spoilt(FedProto):
    """In round `number`, client 0 sends NaN, client 1 fails once it has written its model, client 2 while it loads."""

    number: int = 2

    @on_client
    def update(self, me: Me, data: ClientData, prototypes: Prototypes | None, classes: Labels | None) -> Uploaded:
        GIVEN[data.round, data.client] = classes
        got = super().update(me, data, prototypes, classes)
        if data.round == self.number and data.client == 0:
            got.prototypes[0, 0] = math.nan
        if data.round == self.number and data.client == 1:
            raise RuntimeError("gone")
        return got

    @on_client
    def load(self, me: Me, data: ClientData, prototypes: Prototypes, classes: Labels) -> None:
        super().load(me, data, prototypes, classes)
        if data.round == self.number and data.client == 2:
            raise RuntimeError("gone")


GIVEN: dict[tuple[int, int], torch.Tensor | None] = {}


def test_a_reply_that_is_lost_or_refused_leaves_no_trace_and_prototypes_come_later(tmp_path):
    found = {}
    for rounds in (1, 2, 3):
        GIVEN.clear()
        fldist.run(settings("tests.test_fedproto:Spoilt", rounds=rounds), output=tmp_path / str(rounds))
        found[rounds] = states(tmp_path / str(rounds))
    lines = lines_of(tmp_path / "3")
    assert [sorted(line["missing"]) for line in lines] == [[], ["0", "1", "2"], []]
    assert lines[1]["missing"]["0"].startswith("refused: prototypes: nan")
    for c in (0, 1):  # nothing of round 2
        for name in ("prototypes", "classes"):
            assert torch.equal(found[2][1][c][name], found[1][1][c][name])
        assert torch.equal(found[2][1][c]["y"].floats, found[1][1][c]["y"].floats)
    assert torch.equal(found[2][1][2]["prototypes"], found[1][1][2]["prototypes"])
    assert torch.equal(found[2][1][3]["prototypes"], found[2][0]["prototypes"])
    assert found[2][0]["behind"] == [0, 1, 2]
    assert {c for c in range(4) if GIVEN[3, c] is not None} == {0, 1, 2}
    assert found[3][0]["behind"] == []
    assert all(torch.equal(s["prototypes"], found[3][0]["prototypes"]) for s in found[3][1].values())


def test_a_client_without_prototypes_has_an_accuracy_of_0(tmp_path):
    """Those whose replies of round 1 were lost; no figure is NaN."""
    how = {"name": "tests.test_fedproto:Spoilt", "number": 1}
    metrics = ["auc", "f1", "top5", "accuracy_batchstat"]
    fldist.run(settings(how, rounds=1, eval={"metrics": metrics}), output=tmp_path / "run")
    scored = {r["client"]: r for r in rows_of(tmp_path / "run", "clients.jsonl")}
    for c in (0, 1, 2):
        assert {m: scored[c][m] for m in ("accuracy", "loss", *metrics)} == {
            "accuracy": 0.0,
            "loss": pytest.approx(math.log(C)),
            "auc": 0.5,
            **dict.fromkeys(("f1", "top5", "accuracy_batchstat"), 0.0),
        }
        assert scored[c]["n"] == 60
    assert scored[3]["accuracy"] > 0


@dataclass(frozen=True)
class Hostile(FedProto):
    """In round 1, client 0 sends something else."""

    sends: str = ""

    @on_client
    def update(self, me: Me, data: ClientData, prototypes: Prototypes | None, classes: Labels | None) -> Uploaded:
        got = super().update(me, data, prototypes, classes)
        if data.client or data.round > 1:
            return got
        p, c = got
        return {
            "narrow": Uploaded(p[:, 1:].contiguous(), c),
            "flat": Uploaded(p.flatten(), c),
            "double": Uploaded(p.double(), c),
            "nan": Uploaded(p * math.nan, c),
            "inf": Uploaded(p + math.inf, c),
            "huge": Uploaded(p + 1e9, c),
            "fewer": Uploaded(p[1:].contiguous(), c),
            "more": Uploaded(p, c[1:].contiguous()),
            "long": Uploaded(p, c.long()),
            "twice": Uploaded(p, torch.cat([c[1:2], c[1:]])),
            "beyond": Uploaded(p, torch.cat([c[:-1], c[-1:] * 0 + C])),
            "negative": Uploaded(p, torch.cat([c[:1] * 0 - 1, c[1:]])),
            "none": Uploaded(p[:0].clone(), c[:0].clone()),
        }[self.sends]


REFUSALS = {
    "narrow": "prototypes: shape",
    "flat": "prototypes: shape",
    "double": "prototypes: shape",
    "nan": "prototypes: nan",
    "inf": "prototypes: range",
    "huge": "prototypes: range",
    "fewer": "classes: shape",
    "more": "classes: shape",
    "long": "classes: shape",
    "twice": "classes: range",
    "beyond": "classes: range",
    "negative": "classes: range",
}


@pytest.mark.parametrize("sends", [*REFUSALS, "none"])
def test_prototypes_that_are_none_are_refused_and_cost_nobody_else(tmp_path, sends):
    fldist.run(settings({"name": "tests.test_fedproto:Hostile", "sends": sends}, rounds=1), output=tmp_path / "run")
    (line,) = lines_of(tmp_path / "run")
    if sends == "none":
        assert line["missing"] == {}  # a client may have made no step
    else:
        assert line["missing"]["0"].startswith(f"refused: {REFUSALS[sends]}")
    server, clients = states(tmp_path / "run")
    task = build(load(settings())).task
    assert server["classes"].tolist() == sorted(set().union(*(held(task, c) for c in (1, 2, 3))))
    assert bool(server["prototypes"].isfinite().all())
    assert torch.equal(clients[3]["prototypes"], server["prototypes"])


def test_half_a_reply_is_not_kept():
    """Where one of the two fields is refused, or another one after them, neither is."""
    p, c = torch.ones(2, K), torch.tensor([0, 4], dtype=torch.int32)
    fold = folds(K, C)
    vectors, numbers = (fold[name].begin(FoldContext(None, 1.0)) for name in ("prototypes", "classes"))
    vectors.add(7, p, 1.0)
    with pytest.raises(Refused, match="shape: 1 class numbers for 2 prototypes"):
        numbers.add(7, c[:1], 1.0)
    vectors.remove(7, p, 1.0)
    assert (vectors.result(), numbers.result()) == ({}, {})
    vectors.add(7, p[:1], 1.0)  # the length of before is forgotten
    numbers.add(7, c[:1], 1.0)
    vectors.add(2, p, 1.0)
    numbers.add(2, c, 1.0)
    assert list(vectors.result()) == list(numbers.result()) == [2, 7]


# ---- ranks, resuming
@pytest.mark.parametrize(("topology", "nproc"), [("star", 2), ("star", 3), ("collective", 3)])
def test_ranks_change_nothing(tmp_path: Path, hosts: Hosts, topology: str, nproc: int) -> None:
    made = settings(
        clients={"num_clients": 5, "per_round": 3, "models": [NARROW, NORM]},
        local={"epochs": 1, "batch_size": 32, "lr": 0.05, "momentum": 0.9},
        eval={"every": 1},
    )
    alone = fldist.run(made, output=tmp_path / "alone")
    many = run_here(load({**made, "topology": topology}), nproc=nproc, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["final"] == alone["final"]
    assert many["bytes"]["by_phase_and_kind"] == alone["bytes"]["by_phase_and_kind"]


def test_reduce_cannot_add_up_what_differs_in_size_and_says_what_can(tmp_path: Path, hosts: Hosts) -> None:
    with pytest.raises(ValueError, match=r"update\.prototypes: topology: reduce.*use topology: star or collective"):
        run_here(load(settings(topology="reduce")), nproc=2, output=tmp_path / "run", spawn=hosts)


def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path):
    whole = fldist.run(settings(rounds=4), output=tmp_path / "whole")
    fldist.run(settings(rounds=2), output=tmp_path / "run")
    again = run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    assert again["state_hash"] == whole["state_hash"]


# ---- what is refused
def test_features_of_several_widths_are_refused_by_name():
    models = [NARROW, {"name": "mlp", "hidden": [7]}]
    with pytest.raises(ValueError, match=r"fedproto averages features.*6 in .*7 in .*task\.feature_dim=6"):
        build(load(settings(clients__models=models)))
    # what no client has is not looked at
    build(load(settings(task__model={"name": "mlp", "hidden": [7]})))


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(ValueError, match=r"algorithm\.lambda_"):
        build(load(settings({"name": "fedproto", "lambda_": weight})))


def test_one_width_for_all_is_a_remedy(tmp_path):
    models = [NARROW, {"name": "mlp", "hidden": [20]}, NORM]
    fldist.run(settings(clients__models=models, task__feature_dim=5), output=tmp_path / "run")
    assert states(tmp_path / "run")[0]["prototypes"].shape[1] == 5
