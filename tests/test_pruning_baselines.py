"""PruneFL, EFLPrune and LotteryFL: their steps worked by hand, and every byte that they send."""

import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fldist
from fldist.algorithm import State, on_client
from fldist.algorithms import efl_prune, lottery_fl, prunefl
from fldist.algorithms.efl_prune import EflPrune, select, smaller, unit_norms
from fldist.algorithms.lottery_fl import LotteryFl, MeanOfHolders, density, held, marked, pruned_further
from fldist.algorithms.prunefl import PruneFl, reconfigure
from fldist.clock import Scripted
from fldist.config import build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.fold import FoldContext, Refused
from fldist.inspection import dry_run
from fldist.kinds import Masks, SparseWeights, Weights
from fldist.masked import pruned
from fldist.models.train import warm_up
from fldist.params import Layout, Params
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints, ClientFiles
from fldist.runtime.membership import RunStopped
from fldist.seeding import Streams
from fldist.sparse import Kept, encoded_bytes, pack, unpack
from tests.conftest import small

CNN_BN = {"name": "cnn_bn", "widths": [4, 6]}
SEED = 5


@pytest.fixture(autouse=True, scope="module")
def _imports():
    """Let no test pay for what torch imports at its first step."""
    warm_up()


def settings_of(algorithm, **changes):
    """Six clients on the digits, three of them a round, and a linear network with 8 hidden units."""
    base = {"seed": SEED, "eval__every": 0, "clients": {"num_clients": 6, "fraction": 0.5}, "local__batch_size": 16}
    return small(algorithm=algorithm, **{**base, **changes})


def states(directory):
    """The state of the server at the end of a run, and of every client that has one."""
    found = Checkpoints(directory / "checkpoints").newest()
    assert found is not None
    _, server, facts, _ = found
    files = ClientFiles(directory / "clients")
    return server, {int(c): files.read(int(c), version) for c, version in facts["versions"].items()}


def kinds(directory, phase, kind, way, status="delivered"):
    """[(round, client, logical bytes)] of the ledger."""
    rows = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
    return [
        (r["round"], r["client"], r["logical_bytes"])
        for r in rows
        if r["row"] == "kind"
        and (r["phase"], r["kind"], r["direction"], r["status"]) == (phase, kind, way, status)
    ]  # fmt: skip


def lines_of(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def same_bits(one, other):
    return one.floats.numpy().tobytes() == other.floats.numpy().tobytes()


def plain_sgd(module, task, client, number, keep=None, steps=None):
    """Ordinary training in the order of a client's stream of a round; the gradients of all steps, and samples seen."""
    x, y = task.rows(client)
    order = Streams(SEED, number, client).generator("order")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    module.train()
    gradients, seen = [], 0
    while not gradients or (steps and len(gradients) < steps):
        for rows in torch.randperm(len(y), generator=order).split(16)[: steps and steps - len(gradients)]:
            optimizer.zero_grad()
            cross_entropy(module(x[rows]), y[rows]).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
            seen += len(rows)
            if keep is not None:
                for p, open_ in zip(
                    module.parameters(), keep.split([p.numel() for p in module.parameters()]), strict=True
                ):
                    p.grad.mul_(open_.view(p.shape))
            optimizer.step()
    return gradients, seen


def flat(module):
    """All parameters of a module, [P]."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---- EFLPrune
def mlp(*widths):
    layers = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_scores_and_selection_by_hand():
    task = build(load(settings_of("efl_prune", task__model={"name": "mlp", "hidden": [3, 4]}))).task
    x = task.init_params()
    named = dict(x.named())
    named["1.weight"].fill_(0.5)
    named["1.weight"][1] = -1.0
    named["1.bias"].fill_(100.0)  # biases do not count
    named["3.weight"].copy_(torch.tensor([[1.0, 1, 1], [0, 0, -9], [1, 1, 1], [0, 2, 0]]))
    structure = task.structure()
    scores = unit_norms(x.trainable.floats, structure)
    assert [s.tolist() for s in scores] == [[32.0, 64.0, 32.0], [3.0, 9.0, 3.0, 2.0]]
    # two of three, the first of equals; two of four
    assert select(scores, 0.5).tolist() == [True, True, False, True, True, False, False]
    assert select(scores, 0.01).tolist() == [False, True, False, False, True, False, False]
    assert select(scores, 1.0).all()


def test_a_round_trains_the_smaller_network_and_leaves_the_rest(tmp_path):
    settings = settings_of({"name": "efl_prune", "keep": 0.5}, rounds=1, clients={"num_clients": 1})
    fldist.run(settings, output=tmp_path / "run")
    after = states(tmp_path / "run")[0]["x"]
    task = build(load(settings)).task
    before = task.init_params()
    w1, b1, w2, b2 = (view.clone() for _, view in before.named())
    kept = w1.abs().sum(dim=1).argsort(descending=True)[:4].sort().values
    module = mlp(64, 4, 10)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), (w1[kept], b1[kept], w2[:, kept], b2), strict=True):
            parameter.copy_(value)
    plain_sgd(module, task, client=0, number=1)
    expected = [w1, b1, w2, b2]
    expected[0][kept], expected[1][kept], expected[2][:, kept], expected[3] = (p.detach() for p in module.parameters())
    for (name, got), wanted in zip(after.named(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6, msg=name)
    others = [u for u in range(8) if u not in kept.tolist()]
    for name, cut in (
        ("1.weight", lambda t: t[others]),
        ("1.bias", lambda t: t[others]),
        ("3.weight", lambda t: t[:, others]),
    ):
        assert torch.equal(cut(dict(after.named())[name]), cut(dict(before.named())[name])), name
    assert not torch.equal(after.floats, before.floats)


def test_training_the_smaller_network_is_training_the_masked_one():
    task = build(load(settings_of("efl_prune", task__model=CNN_BN, task__travel="params"))).task
    structure, x = task.structure(), task.init_params()
    units = select(unit_norms(x.trainable.floats, structure), 0.5)
    compaction, architecture = smaller(task.architecture(), task.structure(), pack(units).numpy().tobytes())
    small_y = ClientData(task, 2, Streams(SEED, 1, 2)).train(compaction.shrink(x), architecture=architecture).params
    inside = Params.zeros(compaction.layout.restricted("params"))
    inside.floats.fill_(1.0)
    mask = compaction.expand(inside, x.zeros_like()).floats > 0
    assert 0.2 < mask.double().mean() < 0.6
    y = ClientData(task, 2, Streams(SEED, 1, 2)).train(x, mask=mask).params
    torch.testing.assert_close(compaction.shrink(y).floats, small_y.floats, rtol=0, atol=1e-5)


def test_keeping_all_units_is_fedavg_bit_for_bit(tmp_path):
    changes = {"rounds": 3, "task__model": CNN_BN, "task__travel": "floats"}
    all_units = fldist.run(settings_of({"name": "efl_prune", "keep": 1.0}, **changes), output=tmp_path / "one")
    assert (
        all_units["state_hash"] == fldist.run(settings_of("fedavg", **changes), output=tmp_path / "two")["state_hash"]
    )


@pytest.mark.parametrize(("travel", "buffers"), [("all", 2 * (2 + 3)), ("params", 0)])
def test_bytes_are_those_of_the_smaller_network(tmp_path, travel, buffers):
    settings = settings_of({"name": "efl_prune", "keep": 0.5}, task__model=CNN_BN, task__travel=travel, eval__every=2)
    settings["eval"]["where"] = "clients"
    result = fldist.run(settings, output=tmp_path / "run")
    # 3x3 kernels from 1 to 2 and from 2 to 3 channels with BatchNorm behind, then 3 to 10
    parameters = 9 * 2 + 2 * 2 + 9 * 2 * 3 + 2 * 3 + 3 * 10 + 10
    one, replies = 4 * (parameters + buffers), 2 * 3
    assert result["bytes"]["by_kind"] == {
        "weights": {"up": replies * one, "down": replies * one},
        "masks": {"up": 0, "down": replies * 2},  # 4 + 6 units
        "scalars": {"up": replies * 8, "down": 0},
    }
    whole = 4 * (9 * 4 + 8 + 9 * 4 * 6 + 12 + 60 + 10) + (4 * 20 + 8 * 2 if travel == "all" else 0)
    assert result["bytes"]["by_phase"]["evaluate"]["down"] == 6 * whole
    assert lines_of(tmp_path / "run")[0]["log"]["sparsity"] == pytest.approx(1 - parameters / 342)
    text = dry_run(load(settings), 1)
    assert f"training     up {3 * (one + 8):>16,}   down {3 * (one + 2):>16,}" in text


@dataclass(frozen=True)
class Watched(EflPrune):
    """Says which units take part, as bits."""

    def round(self, server, clients):
        structure = server.task.structure()
        units = select(unit_norms(server.x.trainable.floats, structure), self.keep)
        server.log(units=sum(2**i for i in units.nonzero().flatten().tolist()))
        super().round(server, clients)


def test_a_unit_that_was_left_out_comes_back(tmp_path):
    """Weight decay shrinks those that take part, until the others are larger."""
    algorithm = {"name": "tests.test_pruning_baselines:Watched", "keep": 0.5}
    settings = settings_of(algorithm, rounds=4, local__weight_decay=0.5, clients={"num_clients": 1})
    fldist.run(settings, output=tmp_path / "run")
    chosen = [int(line["log"]["units"]) for line in lines_of(tmp_path / "run")]
    assert all(units.bit_count() == 4 for units in chosen)
    assert any(chosen[0] & ~chosen[i] & chosen[j] for i, j in itertools.combinations(range(1, 4), 2)), chosen


@dataclass(frozen=True)
class WrongSize(EflPrune):
    """Client 2 sends a network of another size."""

    @on_client
    def update(self, me, data, x: efl_prune.Floats, units: Masks) -> efl_prune.Update:
        got = super().update(me, data, x, units)
        return efl_prune.Update(got.y[:-1].clone(), got.n) if data.client == 2 else got


def test_a_network_of_another_size_is_refused(tmp_path):
    settings = settings_of("tests.test_pruning_baselines:WrongSize", clients={"num_clients": 3})
    fldist.run(settings, output=tmp_path / "run")
    for line in lines_of(tmp_path / "run"):
        assert list(line["missing"]) == ["2"]
        assert line["missing"]["2"].startswith("refused: y: shape: ")


def test_clients_score_the_smaller_network_that_they_have_trained(tmp_path):
    settings = settings_of({"name": "efl_prune", "keep": 0.5}, rounds=1, task__split={"test": 0.25}, eval={"own": True})
    fldist.run(settings, output=tmp_path / "run")
    told = lines_of(tmp_path / "run")[0]
    task = build(load(settings)).task
    x = task.init_params()
    units = select(unit_norms(x.trainable.floats, task.structure()), 0.5)
    compaction, architecture = smaller(task.architecture(), task.structure(), pack(units).numpy().tobytes())
    losses = []
    for client in {c for _, c, _ in kinds(tmp_path / "run", "train", "weights", "up")}:
        data = ClientData(task, client, Streams(SEED, 1, client))
        y = data.train(compaction.shrink(x), architecture=architecture).params
        losses.append(data.evaluate(y, "test", architecture).loss)
    assert told["scores"]["own"]["equal"]["loss"] == pytest.approx(sum(losses) / 3, abs=1e-7)


def test_a_model_without_hidden_units_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.keep: no hidden unit of this model can be left out"):
        build(load(settings_of("efl_prune", task__model={"name": "mlp", "hidden": []})))


# ---- LotteryFL
def one_layer(weights, bias):
    """The layout of a linear layer with so many weights and biases."""
    return Layout.of(nn.Linear(weights // bias, bias))


def test_pruning_further_by_hand():
    layout = one_layer(8, 2)
    weights = torch.tensor([5.0, -0.5, 0.25, 3.0, 0.0, -4.0, 2.0, 1.0, 0.001, 0.002])
    keep = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    # kept magnitudes 0, .25, .5, 3, 4, 5: the 0.3-quantile is at 1.5, 0.375
    assert pruned_further(keep, weights, layout, 0.3).tolist() == [1, 1, 0, 1, 0, 1, 0, 0, 1, 1]
    assert density(keep, layout) == 0.75
    # a held 0 is a weight like any other, and the last one stays
    assert pruned_further(keep, weights, layout, 0.1).sum() == keep.sum() - 1
    alone = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert torch.equal(pruned_further(alone, weights, layout, 0.9), alone)


@pytest.mark.parametrize("encoding", ["dense", "bitmask_values", "index_values"])
def test_a_held_zero_is_told_from_what_is_not_held(encoding):
    layout = one_layer(8, 2)
    y = Params(layout, torch.tensor([1.0, 0.0, -0.0, 3.0, 0.0, 5.0, 6.0, 0.0, 0.0, 2.0]))
    keep = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    kept = Kept(marked(y, keep), encoding=encoding)
    assert kept.z == 7
    assert held(kept.value).tolist() == keep.tolist()
    assert kept.value.floats.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 2.0]
    assert y.floats[3] == 3.0


def test_a_parameter_is_averaged_over_its_holders_in_any_order():
    layout = one_layer(4, 1)
    ones = Params(layout, torch.ones(5))
    sent = {  # client 4 holds a weight that is 0; client 7 holds one alone; nobody holds the third
        0: ([1.0, 0.1, 0.0, 0.0, 1.0], [1, 1, 0, 0, 1]),
        4: ([2.0, 0.0, 0.0, 0.0, 2.0], [1, 1, 0, 0, 1]),
        7: ([4.0, 0.0, 0.0, 0.7, 6.0], [1, 0, 0, 1, 1]),
    }
    models = {
        c: marked(Params(layout, torch.tensor(v)), torch.tensor(m, dtype=torch.bool)) for c, (v, m) in sent.items()
    }
    other = marked(Params(layout, torch.full((5,), 9.0)), torch.tensor([1, 0, 1, 1, 1], dtype=torch.bool))
    results = []
    for order in itertools.permutations(models):
        fold = MeanOfHolders().begin(FoldContext(ones, 10.0))
        fold.add(9, other, 1.0)
        for client in order:
            fold.add(client, models[client], 1.0)
        fold.remove(9, other, 1.0)
        results.append(fold.result())
    for got in results:
        assert same_bits(got.mean, results[0].mean)
        assert got.holders.tolist() == [3, 2, 0, 1, 3]
        assert list(got.masks) == [0, 4, 7]
        assert unpack(got.masks[7], 5).tolist() == [True, False, False, True, True]
    torch.testing.assert_close(results[0].mean.floats, torch.tensor([7 / 3, 0.05, 0.0, 0.7, 3.0]), rtol=0, atol=1e-7)
    assert results[0].mean.floats[3] == torch.tensor(0.7)
    fold = MeanOfHolders().begin(FoldContext(ones, 10.0))
    with pytest.raises(Refused, match="nan"):
        fold.add(1, Params(layout, torch.tensor([math.nan, 0, 0, 0, 0])), 1.0)
    assert fold.holders.sum() == 0
    assert not fold.masks


def lottery(**changes):
    base = {"task__split": {"val": 0.2}, "algorithm__threshold": 0.0, "algorithm__prune": 0.25}
    return settings_of({"name": "lottery_fl"}, **{**base, **changes})


def a_client(job, client=1, number=1):
    return ClientData(job.task, client, Streams(SEED, number, client))


def test_a_client_whose_submodel_is_poor_keeps_its_mask():
    job = build(load(lottery()))
    x = job.task.init_params()
    me = State(mask=None)
    algorithm = LotteryFl(threshold=1.0)
    got = algorithm.update(me, a_client(job), x0=x, x=x)
    assert me.mask is None
    assert got.y.z == x.layout.num_params
    assert same_bits(got.y.value, a_client(job).train(x, mask=torch.ones(x.layout.num_params)).params)


def test_a_client_prunes_what_it_got_and_starts_again_from_the_initial_values():
    job = build(load(lottery()))
    task = job.task
    x0 = task.init_params()
    n = x0.layout.num_params
    keep = torch.ones(n, dtype=torch.bool)
    keep[:100] = False
    x = pruned(x0 * -2.0 + Params(x0.layout, torch.linspace(-0.1, 0.1, n)), keep)
    me = State(mask=pack(keep))
    got = job.algorithm.update(me, a_client(job), x0=x0, x=x)
    new = unpack(me.mask, n)
    expected = keep.clone()
    for slot in x.layout.params:
        if len(slot.shape) == 2:
            place = slice(slot.offset, slot.offset + slot.numel)
            kept = x.floats[place][keep[place]].abs()
            smallest = kept.sort().values[: math.ceil(0.25 * (len(kept) - 1))]
            expected[place] &= x.floats[place].abs() > smallest[-1]
    assert torch.equal(new, expected)
    module = mlp(64, 8, 10)
    module.load_state_dict({name: view.clone() for name, view in pruned(x0, new).named()})
    plain_sgd(module, task, client=1, number=1, keep=new)
    torch.testing.assert_close(got.y.value.floats, flat(module), rtol=0, atol=1e-6)
    assert torch.equal(held(got.y.value), new)
    dense_enough = LotteryFl(threshold=0.0, target=0.9)
    me = State(mask=pack(keep))
    dense_enough.update(me, a_client(job), x0=x0, x=x)
    assert torch.equal(unpack(me.mask, n), keep), "the target is reached"


def test_rounds_change_what_somebody_holds_alone(tmp_path):
    """Three rounds by hand: masks differ once clients have taken part differently often."""
    job = build(load(lottery(rounds=3, algorithm__prune=0.4)))
    fldist.run(lottery(rounds=3, algorithm__prune=0.4), output=tmp_path / "run")
    x0 = x = job.task.init_params()
    mine = {client: State(mask=None) for client in range(6)}
    held_by = set()
    for number in (1, 2, 3):
        replies = []
        for _, client, _ in [k for k in kinds(tmp_path / "run", "train", "weights", "up") if k[0] == number]:
            me = mine[client]
            keep = held(marked(x, torch.ones(610, dtype=torch.bool) if me.mask is None else unpack(me.mask, 610)))
            replies.append(job.algorithm.update(me, a_client(job, client, number), x0=x0, x=pruned(x, keep)).y.value)
        holders = sum(held(y).double() for y in replies)
        mean = sum(y.floats.double() for y in replies) / holders.clamp(min=1)
        x = Params(x.layout, torch.where(holders > 0, mean.float(), x.floats))
        held_by |= set(holders.tolist())
    assert held_by == {0.0, 1.0, 2.0, 3.0}
    server, clients = states(tmp_path / "run")
    torch.testing.assert_close(server["x"].floats, x.floats, rtol=0, atol=1e-6)
    assert torch.equal(server["x"].floats[holders == 0], x.floats[holders == 0])
    for client, me in mine.items():
        if me.mask is not None:
            assert torch.equal(me.mask, clients[client]["mask"])
            assert torch.equal(me.mask, server["masks"][client])


@pytest.mark.parametrize("encoding", ["auto", "bitmask_values", "index_values", "dense"])
def test_bytes_of_submodels(tmp_path, encoding):
    settings = lottery(rounds=4, algorithm__encoding=encoding, eval={"every": 4, "where": "clients"})
    fldist.run(settings, output=tmp_path / "run")
    sizes, biases = [64 * 8, 8 * 10], 18
    n = sum(sizes) + biases

    def bytes_at(times):
        """Of a model whose mask was pruned so often."""
        z = biases
        for size in sizes:
            kept = size
            for _ in range(times):
                kept -= math.ceil(0.25 * (kept - 1))
            z += kept
        smallest = min(encoded_bytes(e, n, z) for e in ("dense", "bitmask_values", "index_values"))
        return smallest if encoding == "auto" else encoded_bytes(encoding, n, z)

    times = dict.fromkeys(range(6), 0)
    up, down = [], []
    for number, client, _ in kinds(tmp_path / "run", "train", "weights", "up"):
        down.append((number, client, bytes_at(times[client]) + (4 * n if not times[client] else 0)))
        times[client] += 1
        up.append((number, client, bytes_at(times[client])))
    assert max(times.values()) >= 2
    assert sorted(kinds(tmp_path / "run", "train", "weights", "down")) == sorted(down)
    assert kinds(tmp_path / "run", "train", "weights", "up") == up
    scored = kinds(tmp_path / "run", "evaluate", "weights", "down")
    assert sorted(scored) == [(4, client, bytes_at(times[client])) for client in range(6)]


def test_personal_models_are_the_global_one_under_each_clients_mask(tmp_path):
    settings = lottery(rounds=3, eval={"every": 3, "where": "both", "split": "val"})
    fldist.run(settings, output=tmp_path / "run")
    server, clients = states(tmp_path / "run")
    task = build(load(settings)).task
    scores = {}
    for client in range(6):
        model = server["x"]
        if client in clients:
            model = pruned(model, unpack(clients[client]["mask"], model.layout.num_params))
        scores[client] = task.evaluate_client(model, client, "val").loss
    told = {
        r["client"]: r["loss"] for r in map(json.loads, (tmp_path / "run" / "clients.jsonl").read_text().splitlines())
    }
    assert told == pytest.approx(scores, abs=1e-9)
    assert len(set(told.values())) == 6


@dataclass(frozen=True)
class Spoilt(LotteryFl):
    """In round 2, client 1 sends NaN and client 2 fails once it has written its mask."""

    @on_client
    def update(self, me, data, x0: Weights, x: SparseWeights) -> lottery_fl.Update:
        got = super().update(me, data, x0, x)
        if data.round == 2 and data.client == 1:
            got.y.params.floats[-1] = math.nan
        if data.round == 2 and data.client == 2:
            raise RuntimeError("gone")
        return got


def test_a_reply_that_is_lost_or_refused_leaves_no_trace(tmp_path):
    settings = lottery(clients={"num_clients": 4}, algorithm__name="tests.test_pruning_baselines:Spoilt")
    fldist.run({**settings, "rounds": 3}, output=tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert [sorted(line["missing"]) for line in lines] == [[], ["1", "2"], []]
    assert lines[1]["missing"]["1"].startswith("refused: y: nan")
    server, clients = states(tmp_path / "run")
    kept = {client: int(unpack(state["mask"], 610).sum()) for client, state in clients.items()}
    assert kept[0] == kept[3] < kept[1] == kept[2]
    for client in range(4):
        assert torch.equal(server["masks"][client], clients[client]["mask"])


def test_clients_need_a_part_of_their_own_to_decide_by():
    with pytest.raises(ValueError, match=r"algorithm\.split: .* have no val part; set task\.split\.val=0\.1"):
        build(load(lottery(task__split={})))
    with pytest.raises(ValueError, match=r"have no test part"):
        build(load(lottery(algorithm__split="test")))
    task = build(load(lottery(task__split={"test": 0.2}))).task
    assert LotteryFl().decides(task) == "test"
    assert LotteryFl().decides(build(load(lottery(task__split={"val": 0.1, "test": 0.2}))).task) == "val"


# ---- PruneFL
TWO_LAYERS = Layout.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False)))  # 4 weights, 2 biases, 2 weights


def test_a_reconfiguration_by_hand():
    weights = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.0, 0.0, 5.0, 6.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    s = torch.tensor([1.0, 1.0, 8.0, 2.0, 1.0, 1.0, 2.0, 9.0])
    c = {"0.weight": 1.0, "1.weight": 3.0}
    # certain: 4 and -3 of the first layer (floor(0.5 4) = 2 smaller ones are not), 5 of the second (floor(0.5 1) = 0)
    # A = 1 + 1 + (1 + 1) + 2 = 6, t = 1 + 2 + 3 = 6; 8/1 > 1: A = 14, t = 7; 9/3 > 2: A = 23, t = 10; 2/1 < 2.3
    new = reconfigure(weights, s, mask, c, 1.0, 0.5, TWO_LAYERS)
    assert new.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    # a larger constant makes everything worth its time; a layer that is never pruned adds to A alone
    assert reconfigure(weights, s, mask, c, 10.0, 0.5, TWO_LAYERS).all()
    # A = 2 + 11 + 2 = 15, t = 1 + 2; 8/1 > 15/3: A = 23, t = 4; 2/1 < 23/4
    only = reconfigure(weights, s, mask, {"0.weight": 1.0}, 1.0, 0.5, TWO_LAYERS)
    assert only.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    # f = 0: what is kept stays; A = 12 + 2 + 2, t = 4 + 3; 9/3 > 16/7, and 6/3 is not
    assert reconfigure(weights, s, mask, c, 0.0, 0.0, TWO_LAYERS).all()
    s[7] = 6.0
    assert torch.equal(reconfigure(weights, s, mask, c, 0.0, 0.0, TWO_LAYERS), mask)


def one_by_one(weights, s, mask, c, t, f, layout):
    """The same in a loop over candidates."""
    keep, a, rest = [True] * len(weights), 0.0, []
    for slot in layout.params:
        indices = range(slot.offset, slot.offset + slot.numel)
        if slot.name not in c:
            a += sum(float(s[i]) for i in indices)
            continue
        active = sorted(abs(float(weights[i])) for i in indices if mask[i])
        for i in indices:
            if mask[i] and abs(float(weights[i])) >= active[int(f * len(active))]:
                a, t = a + float(s[i]), t + c[slot.name]
            else:
                keep[i] = False
                rest.append((float(s[i]) / c[slot.name], i, c[slot.name]))
    for ratio, i, cost in sorted(rest, key=lambda r: (-r[0], r[1])):
        if not ratio > a / t:
            break
        keep[i], a, t = True, a + float(s[i]), t + cost
    return keep


@pytest.mark.parametrize("seed", range(12))
def test_a_reconfiguration_is_that_of_a_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    layout = Layout.of(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)))
    n = layout.num_params
    weights, s = torch.randn(n, generator=rng), torch.rand(n, generator=rng) ** 3
    mask = torch.rand(n, generator=rng) < 0.6
    costs = torch.rand(2, generator=rng).tolist()
    c = {"0.weight": costs[0], "2.weight": costs[1]}
    t, f = 5 * float(torch.rand(1, generator=rng)), 0.3 if seed % 2 else 0.7
    new = reconfigure(weights, s, mask, c, t, f, layout)
    assert new.tolist() == one_by_one(weights, s, mask, c, t, f, layout)
    assert not new.all()
    assert (new & ~mask).any() or seed % 2 == 0


def test_without_gradients_the_smallest_go_and_nothing_comes_back():
    layout = one_layer(10, 1)
    weights = torch.arange(1.0, 12.0)
    mask = torch.tensor([True] * 9 + [False, True])
    new = reconfigure(weights, torch.zeros(11), mask, {"weight": 1e-6}, 0.0, 0.3, layout)
    assert new.tolist() == [False] * 2 + [True] * 7 + [False, True]  # floor(0.3 9) = 2
    nothing = torch.zeros(11, dtype=torch.bool)
    assert reconfigure(weights, torch.zeros(11), nothing, {"weight": 1.0}, 0.0, 0.3, layout).tolist() == [
        False
    ] * 10 + [True]


TIMES = {"step": 0.5, "1": 0.128, "3": 0.016}
SCRIPT = {"name": "scripted", "seconds": TIMES}


def prune(**changes):
    base = {"clock": SCRIPT, "algorithm__reconfigure_every": 2, "algorithm__initial_passes": 0, "rounds": 4}
    return settings_of({"name": "prunefl"}, **{**base, **changes})


def test_times_are_those_of_the_clients_clock():
    job = build(load(prune(algorithm__bandwidth=8000.0, algorithm__steps=4)))
    data = ClientData(job.task, 1, Streams(SEED, 0, 1), clock=job.clock)
    times = job.algorithm.measure(State(), data).times
    assert times.tolist() == [0.5, 0.128, 0.016]
    c, t_const = job.algorithm.costs(times, job.task.layout)
    assert c == pytest.approx({"1.weight": 4 * 0.128 / 512 + 0.001, "3.weight": 4 * 0.016 / 80 + 0.001})
    assert t_const == pytest.approx(4 * (0.5 - 0.144) + 18 * 0.001)
    measured = job.algorithm.measure(State(), ClientData(job.task, 1, Streams(SEED, 0, 1))).times
    assert (measured > 0).all()
    assert measured[0] < 1.0
    with pytest.raises(ValueError, match=r"clock\.seconds: it has no '3'"):
        job.algorithm.measure(
            State(), ClientData(job.task, 1, Streams(SEED, 0, 1), clock=Scripted({"step": 1, "1": 1}))
        )


def test_layers_of_every_kind_are_timed():
    model = {"name": "tests.test_pruning_baselines:Recurrent"}
    job = build(load(prune(task__model=model, clock={"name": "scripted", "default": 1.0}, algorithm__bandwidth=8e9)))
    assert job.algorithm.layers(job.task.layout) == {"lstm": 8 * 12 + 3 * 12, "head": 30}
    times = job.algorithm.measure(State(), ClientData(job.task, 0, Streams(SEED, 0, 0))).times
    assert (times[:3] > 0).all()
    c, _ = job.algorithm.costs(torch.ones(3), job.task.layout)
    assert c["lstm.weight_ih_l0"] == c["lstm.weight_hh_l0"] == pytest.approx(5 / 132)


@dataclass(frozen=True)
class Recurrent:
    """An LSTM over the rows of an image."""

    def build(self, shape, classes):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(shape[2], 3, batch_first=True)
                self.head = nn.Linear(3, classes)

            def forward(self, x):
                return self.head(self.lstm(x[:, 0])[0][:, -1])

        return Net()


def test_a_clients_share_of_s_is_the_squared_sum_of_a_rounds_gradients():
    job = build(load(prune(algorithm__steps=17)))
    task, algorithm = job.task, job.algorithm
    x = task.init_params()
    n = x.layout.num_params
    keep = torch.arange(n) % 3 > 0
    x = pruned(x, keep)
    module = mlp(64, 8, 10)
    module.load_state_dict({name: view.clone() for name, view in x.named()})
    gradients, seen = plain_sgd(module, task, client=1, number=3, keep=keep, steps=17)
    assert len(gradients) == 17 > task.sizes[1] / 16
    s = torch.stack(gradients).sum(dim=0).square() * seen
    assert s[~keep].max() > 1e-3
    me = State(s=None, interval=-1)
    got = algorithm.update(me, a_client(job, 1, 3), x=x, mask=pack(keep))
    assert (got.n, me.interval) == (seen, 1)
    torch.testing.assert_close(me.s, s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.y.value.floats, flat(module), rtol=0, atol=1e-6)
    first = me.s
    algorithm.update(me, a_client(job, 1, 4), x=x, mask=pack(keep))  # the second round of the same interval
    other = State(s=None, interval=-1)
    algorithm.update(other, a_client(job, 1, 4), x=x, mask=pack(keep))
    assert torch.equal(me.s, first + other.s)
    algorithm.update(me, a_client(job, 1, 5), x=x, mask=pack(keep))  # another one
    assert me.interval == 2
    told = algorithm.squares(me, a_client(job, 1, 5)).s
    assert me.s is None
    fresh = State(s=None, interval=-1)
    algorithm.update(fresh, a_client(job, 1, 5), x=x, mask=pack(keep))
    assert torch.equal(told.floats, fresh.s)


def test_a_reconfiguration_takes_what_the_clients_of_the_round_gathered(tmp_path):
    """Rounds by hand: f of the round, weights of the mean by samples seen, closed weights that stay and come back."""
    settings = prune(rounds=4, clients={"num_clients": 2}, algorithm__fraction=0.6, algorithm__half_life=2.0)
    settings["task"]["partition"] = {"name": "tests.test_family:Sizes", "sizes": [40, 500]}
    result = fldist.run(settings, output=tmp_path / "run")
    job = build(load(settings))
    algorithm, layout = job.algorithm, job.task.layout
    x, keep, masks, versions = job.task.init_params(), torch.ones(610, dtype=torch.bool), [], []
    mine = {0: State(s=None, interval=-1), 1: State(s=None, interval=-1)}
    c, t_const = algorithm.costs(torch.tensor([0.5, 0.128, 0.016], dtype=torch.float64), layout)
    for number in (1, 2, 3, 4):
        got = {
            k: algorithm.update(me, a_client(job, k, number), x=pruned(x, keep), mask=pack(keep))
            for k, me in mine.items()
        }
        seen = sum(g.n for g in got.values())
        mean = sum(g.n / seen * g.y.value.floats.double() for g in got.values()).float()
        x = Params(layout, torch.where(keep, mean, x.floats))
        if number % 2 == 0:
            s = sum(algorithm.squares(me, a_client(job, k, number)).s.floats.double() for k, me in mine.items())
            keep = reconfigure(x.floats, s, keep, c, t_const, 0.6 * 0.5 ** (number / 2.0), layout)
            masks.append(keep)
            versions.append(x)
    assert {k: g.n for k, g in got.items()} == {0: 16 + 16 + 8 + 16 + 16, 1: 5 * 16}
    assert (masks[1] & ~masks[0]).any()
    assert 0.2 < masks[1].double().mean() < 0.95
    server, clients = states(tmp_path / "run")
    assert torch.equal(unpack(server["mask"], 610), keep)
    torch.testing.assert_close(server["x"].floats, x.floats, rtol=0, atol=1e-6)
    back = masks[1] & ~masks[0]
    assert torch.equal(x.floats[back], versions[0].floats[back])
    assert server["x"].floats[~keep].abs().min() > 0
    assert all(state["s"] is None for state in clients.values())
    left = keep[:512].sum() + keep[520:600].sum()
    assert result["summary"] == {"initial_passes": 0, "density": pytest.approx(float(left) / 592)}


@pytest.mark.parametrize(("passes", "delivery"), [(0, "broadcast"), (25, "first_contact")])
def test_bytes_of_a_run(tmp_path, passes, delivery):
    settings = prune(
        rounds=5, task__model=CNN_BN, algorithm__initial_passes=passes, algorithm__mask_delivery=delivery,
        clock={"name": "scripted", "default": 0.001}, local__lr=0.2,
    )  # fmt: skip
    result = fldist.run(settings, output=tmp_path / "run")
    n, buffers, counters, layers = 342, 20, 2, 3
    tail = 4 * buffers + 8 * counters
    phases = result["bytes"]["by_phase"]
    run = tmp_path / "run"
    if passes:
        assert phases["initial"] == {"down": 4 * n + tail, "up": 4 * n + tail + -(-n // 8) + 8 * (layers + 1) + 8}
    else:
        assert phases["initial"] == {"down": 0, "up": 8 * (layers + 1)}
    kept = [round(n / line["log"]["compression_rate"]) for line in lines_of(run)]  # after each round
    changes = [2, 4]
    sent = {1: n if not passes else kept[0], 2: None, 3: kept[1], 4: kept[2], 5: kept[3]}
    sent[2] = sent[1]
    for way in ("down", "up"):
        rows = kinds(run, "train", "weights", way)
        assert [(r, b) for r, _, b in rows] == [(r, 4 * z + tail) for r, z in sent.items() for _ in range(3)]
    assert [(r, b) for r, _, b in kinds(run, "reconfigure", "gradients", "up")] == [
        (r, 4 * n) for r in changes for _ in range(3)
    ]
    assert result["bytes"]["by_kind"]["gradients"] == {"up": 2 * 3 * 4 * n, "down": 0}
    assert result["bytes"]["by_kind"]["scalars"]["up"] == 5 * 3 * 8 + (8 if passes else 0)
    if delivery == "broadcast":
        assert phases["mask"] == {"down": len(changes) * 6 * -(-n // 8), "up": 0}
    else:
        by_version = {}
        for number, client, _ in kinds(run, "train", "weights", "up"):
            by_version.setdefault((number - 1) // 2, set()).add(client)
        given = kinds(run, "train", "masks", "down")
        assert all(size == -(-n // 8) for *_, size in given)
        assert len(given) == sum(map(len, by_version.values()))


def alone_of(job, client=0):
    return job.algorithm.alone(
        State(), ClientData(job.task, client, Streams(SEED, 0, client), clock=job.clock), x=job.task.init_params()
    )


def test_the_initial_stage_ends_when_the_density_stays():
    """With f = 0 nothing is ever closed: one reconfiguration, and five that change nothing."""
    job = build(load(prune(algorithm__fraction=0.0, algorithm__initial_passes=400, local__lr=0.5)))
    got = alone_of(job)
    assert got.passes in (20, 30, 40)
    assert unpack(got.mask, 610).all()
    assert got.times.tolist() == list(TIMES.values())


def test_the_initial_stage_prunes_and_is_bounded():
    job = build(load(prune(algorithm__initial_passes=30, algorithm__reconfigure_every=4, local__lr=0.2)))
    got = alone_of(job)
    keep = unpack(got.mask, 610)
    assert got.passes <= 30
    assert 0.05 < keep.double().mean() < 0.9
    assert got.y.floats[~keep].abs().min() > 0, "closed weights keep their values"
    accuracy = job.task.evaluate(pruned(got.y, keep)).accuracy
    assert accuracy > 0.5 > job.task.evaluate(job.task.init_params()).accuracy
    idle = alone_of(build(load(prune(algorithm__initial_passes=30, local__lr=1e-6))))
    assert (idle.passes, unpack(idle.mask, 610).all()) == (30, True), "it never began to reconfigure"


def test_the_client_of_the_initial_stage_is_drawn_or_named(tmp_path):
    drawn = {}
    for seed in (1, 2, 3):
        fldist.run(prune(seed=seed, rounds=1), output=tmp_path / str(seed))
        drawn[seed] = [client for _, client, _ in kinds(tmp_path / str(seed), "initial", "report", "up")]
    assert all(len(clients) == 1 for clients in drawn.values())
    assert len({clients[0] for clients in drawn.values()}) > 1
    fldist.run(prune(rounds=1, algorithm__initial_client=4), output=tmp_path / "named")
    assert [client for _, client, _ in kinds(tmp_path / "named", "initial", "report", "up")] == [4]
    with pytest.raises(ValueError, match=r"algorithm\.initial_client: there is no client 6 with samples"):
        build(load(prune(algorithm__initial_client=6)))


def test_a_scripted_clock_repeats_a_run_and_another_changes_it(tmp_path):
    hashes = []
    for name, script in (("a", SCRIPT), ("b", SCRIPT), ("c", {**SCRIPT, "seconds": {**TIMES, "1": 12.8}})):
        hashes.append(fldist.run(prune(clock=script), output=tmp_path / name)["state_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


@dataclass(frozen=True)
class Lies(PruneFl):
    """Client 2 makes up what it has gathered."""

    @on_client
    def squares(self, me, data) -> prunefl.Squares:
        s = super().squares(me, data).s.clone()
        if data.client == 2:
            s.floats[3] = -1.0 if data.round == 2 else math.inf
        return prunefl.Squares(s)


def test_gradients_that_cannot_be_are_refused_and_kept_by_the_client(tmp_path):
    settings = prune(clients={"num_clients": 3}, algorithm__name="tests.test_pruning_baselines:Lies")
    result = fldist.run(settings, output=tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert ["2" in line["missing"] for line in lines] == [False, True, False, True]
    assert lines[1]["missing"]["2"].startswith("refused: s: range: ")
    assert result["bytes"]["wasted"]["refused"]["up"] == 2 * 4 * 610
    _, clients = states(tmp_path / "run")
    assert clients[0]["s"] is None
    assert clients[2]["s"] is not None
    assert clients[2]["interval"] == 1


# ---- all three, on several ranks
CASES = {
    "efl_prune": {"task__model": CNN_BN},
    "lottery_fl": {"task__model": CNN_BN, "task__split": {"val": 0.2}, "algorithm__threshold": 0.0},
    "prunefl": {"clock": {"name": "scripted", "default": 1e-3}, "algorithm__reconfigure_every": 2, "rounds": 4},
}


@pytest.mark.parametrize("topology", ["star", "collective"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_change_nothing(tmp_path, hosts, name, topology):
    settings = settings_of({"name": name}, **CASES[name])
    alone = fldist.run(settings, output=tmp_path / "alone")
    many = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["by_kind"] == alone["bytes"]["by_kind"]
    assert alone["rounds"] == settings["rounds"]


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_is_the_same(tmp_path, name):
    settings = settings_of({"name": name}, **{**CASES[name], "rounds": 4})
    straight = fldist.run(settings, output=tmp_path / "straight")
    fldist.run({**settings, "rounds": 2}, output=tmp_path / "two")
    on = run_here(load_resumed(tmp_path / "two", ["rounds=4"]), output=tmp_path / "two", resume=True)
    assert on["state_hash"] == straight["state_hash"]
    assert on["bytes"]["by_kind"] == straight["bytes"]["by_kind"]


@pytest.mark.parametrize("name", CASES)
def test_reduce_is_refused_before_the_first_round(tmp_path, hosts, name):
    settings = settings_of({"name": name}, **CASES[name], topology="reduce")
    with pytest.raises(ValueError, match="use topology: star or collective"):
        run_here(load(settings), nproc=2, output=tmp_path / "run", spawn=hosts)


@dataclass(frozen=True)
class LiesAlone(PruneFl):
    """The client of the initial stage sends what cannot be."""

    lie: str = ""

    @on_client
    def alone(self, me, data, x: Weights) -> prunefl.Alone:
        got = super().alone(me, data, x)
        if data.client != 0:
            return got
        lies = {
            "length": {"mask": got.mask[:-1]},
            "nothing": {"mask": torch.zeros_like(got.mask)},
            "passes": {"passes": math.nan},
            "model": {"y": got.y * math.nan},
        }
        return got._replace(**lies[self.lie])


@pytest.mark.parametrize("lie", ["length", "nothing", "passes", "model"])
@pytest.mark.parametrize("named", [True, False])
def test_another_client_does_the_initial_stage_where_one_is_of_no_use(tmp_path, lie, named):
    changes = {"algorithm__name": "tests.test_pruning_baselines:LiesAlone", "algorithm__lie": lie}
    changes |= {"algorithm__initial_passes": 2, "rounds": 1, "faults": {"on_quorum_loss": "stop"}}
    if named:
        with pytest.raises(RunStopped, match="setup: no reply to alone was accepted"):
            fldist.run(prune(**changes, algorithm__initial_client=0), output=tmp_path / "run")
        return
    for seed in range(20):  # until the first that is drawn is the one that lies
        directory = tmp_path / str(seed)
        result = fldist.run(prune(**changes, seed=seed), output=directory)
        assert result["status"] == "finished"
        rows = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
        asked = [
            r["client"] for r in rows if r["row"] == "message" and (r["phase"], r["direction"]) == ("initial", "down")
        ]
        if asked[0] == 0:
            assert asked == [0, 1]
            return
    pytest.fail("no seed draws client 0 first")
