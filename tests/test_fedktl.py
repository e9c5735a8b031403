"""FedKTL, whole runs: ranks, resuming and lost replies, what a round leaves alone, odd clients and generators, and what
is refused. The equations are in `test_fedktl_equations.py`, the bytes in `test_fedktl_bytes.py`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fldist
from fldist.algorithm import Me, on_client
from fldist.algorithms import fedktl
from fldist.algorithms.fedktl import FedKtl, arcface, etf, unit
from fldist.config import build, load, load_resumed
from fldist.data.client_data import Batch, ClientData
from fldist.data.datasets import Dataset
from fldist.data.task import Task
from fldist.inspection import describe, predict
from fldist.kinds import Images, Kind, Latents, Seeds
from fldist.models.generators.pretrained import GeneratorConfig, ModuleGenerator
from fldist.models.generators.toy import Toy
from fldist.models.layers import features_and_logits
from fldist.prototypes import Stacked, Uploaded, add_rows
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints, ClientFiles
from fldist.seeding import Streams
from tests.conftest import Hosts, Recorder, small
from tests.needs import needs_data, needs_gpus

ROOT = Path(__file__).parents[1]
K, C, H = 4, 10, 6
MLP = {"name": "mlp", "hidden": [8]}
CNN = {"name": "cnn", "widths": [4], "kernels": 3, "paddings": 1, "hidden": [8]}
NORM = {"name": "cnn_bn", "widths": [8]}
ONE_FEATURE_EACH = {"name": "tests.test_fedktl:Normed"}
Matrix = Annotated[Tensor, Kind.WEIGHTS]


def ktl(**changes: Any) -> dict[str, Any]:
    """Four clients in turn with two networks, 8x8 digits; `algorithm__field=value` changes the algorithm."""
    return small(
        algorithm={
            "name": "fedktl",
            "generator": {"name": "toy", "latent_dim": H},
            "server_epochs": 3,
            "mu": 1.0,
            "show_every": 0,
            **{k.removeprefix("algorithm__"): v for k, v in changes.items() if k.startswith("algorithm__")},
        },
        **{
            "clients": {"num_clients": K, "models": [CNN, MLP]},
            "task__partition": {"name": "dirichlet", "alpha": 0.5},
            "task__subset": {"train": 200, "test": 60},
            "task__model": MLP,
            "local": {"epochs": 1, "batch_size": 10, "lr": 0.05},
            "eval": {"every": 0},
            **{k: v for k, v in changes.items() if not k.startswith("algorithm__")},
        },
    )


def run(directory: Path, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = fldist.run(ktl(**changes), output=directory)
    assert result["status"] == "finished"
    return result


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def states(directory: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The server's state at the end of a run, and that of every client that has one of its own."""
    found = Checkpoints(directory / "checkpoints").newest()
    assert found is not None
    _, server, facts, _ = found
    files = ClientFiles(directory / "clients")
    return server, {int(c): files.read(int(c), version) for c, version in facts["versions"].items()}


# ---- data, models and generators of the tests
@dataclass(frozen=True)
class Rows:
    """Clients with rows of noise, of the given classes in turn; `twins`: all have the same rows."""

    holds: tuple[tuple[int, ...], ...] = ((0, 1), (1, 2))
    rows: tuple[int, ...] = (20, 20)
    twins: bool = False
    shape: tuple[int, ...] = (1, 8, 8)
    classes: int = C

    def load(self) -> Dataset:
        rng = np.random.default_rng(0)
        labels = np.concatenate([np.resize(held, n) for held, n in zip(self.holds, self.rows, strict=True)])
        if self.twins:
            x = np.tile(rng.integers(0, 256, (self.rows[0], *self.shape), dtype=np.uint8), (len(self.rows), 1, 1, 1))
        else:
            x = rng.integers(0, 256, (len(labels), *self.shape), dtype=np.uint8)
        owner = np.repeat(np.arange(len(self.rows)), self.rows)
        first = np.cumsum([0, *self.rows[:-1]])
        return Dataset(
            x,
            labels,
            x[first],
            labels[first],
            self.classes,
            train_owner=owner,
            test_owner=np.arange(len(self.rows)),
        )


def rows(holds: list[list[int]], n: int | list[int] = 20, **more: Any) -> dict[str, Any]:
    """The changes that make clients of `Rows`, n rows each."""
    each = [n] * len(holds) if isinstance(n, int) else n
    return {
        "clients__num_clients": len(holds),
        "task__data": {"name": "tests.test_fedktl:Rows", "holds": holds, "rows": each, **more},
        "task__partition": "natural",
        "task__subset": {},
    }


@dataclass(frozen=True)
class Normed:
    """BatchNorm over vectors, which cannot train on a batch of one."""

    short_name: ClassVar[str] = "normed"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes)
        )


DECODED: list[int] = []
MADE: list[ModuleGenerator] = []


@dataclass(frozen=True)
class Counted(GeneratorConfig):
    """The toy, which tells how many latents it decodes."""

    seed: int = 0

    def load(self, device: torch.device) -> ModuleGenerator:
        made = Toy(latent_dim=H, seed=self.seed).load(device)
        decode = made.decode

        def counting(latents: Tensor) -> Tensor:
            DECODED.append(len(latents))
            return decode(latents)

        made.decode = counting  # type: ignore[method-assign]
        MADE.append(made)
        return made


@dataclass(frozen=True)
class Lying(GeneratorConfig):
    """The toy, which says that its latents or its images have another size than they have."""

    what: str = "latents"

    def load(self, device: torch.device) -> ModuleGenerator:
        made = Toy(latent_dim=H).load(device)
        if self.what == "latents":
            made.latent_dim = H + 1
        else:
            made.image_shape = (1, 8, 9)
        return made


UPLOADED: list[Stacked] = []


@dataclass(frozen=True)
class Watched(FedKtl):
    """Keeps what the server was sent."""

    def align(self, server: Any, u: Stacked) -> None:
        UPLOADED.append(u)
        super().align(server, u)


WATCHED = "tests.test_fedktl:Watched"


def watched(directory: Path, **changes: Any) -> list[Stacked]:
    """What was sent in each round."""
    UPLOADED.clear()
    run(directory, algorithm__name=WATCHED, **changes)
    return list(UPLOADED)


# ---- ranks, resuming, hosts that are lost
MIXED: dict[str, Any] = {"clients__models": [NORM, CNN], "task__feature_dim": 8, "clients__per_round": 3, "rounds": 3}


@pytest.mark.parametrize(
    ("topology", "how"),
    [("star", {"setup_by": "tensor"}), ("collective", {"images_as": "uint8", "vectors_as": "float16"})],
)
def test_ranks_change_nothing(tmp_path: Path, hosts: Hosts, topology: str, how: dict[str, Any]) -> None:
    settings = ktl(**MIXED, eval={"clients": "all"}, **{f"algorithm__{k}": v for k, v in how.items()})
    alone = fldist.run(settings, output=tmp_path / "alone")
    many = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["by_kind"] == alone["bytes"]["by_kind"]
    assert many["final"] == alone["final"]


def test_reduce_is_refused_with_a_word(tmp_path: Path, hosts: Hosts) -> None:
    with pytest.raises(ValueError, match=r"train\.prototypes: topology: reduce .*use topology: star or collective$"):
        run_here(load(ktl(topology="reduce")), nproc=2, output=tmp_path / "run", spawn=hosts)


@pytest.mark.parametrize("setup_by", ["seed", "tensor"])
def test_a_host_that_comes_back_goes_on_with_the_same_classifier(tmp_path: Path, hosts: Hosts, setup_by: str) -> None:
    def after(number: int) -> None:
        if number == 1:
            hosts.send(1, signal.SIGKILL)

    settings = ktl(**{**MIXED, "rounds": 6}, algorithm__setup_by=setup_by, algorithm__persist_g=True)
    alone = fldist.run(settings, output=tmp_path / "alone")
    seen = Recorder(after)
    faults = {"min_replies": "all", "on_quorum_loss": "retry"}
    again = run_here(load({**settings, "faults": faults}), nproc=2, output=tmp_path / "run", observer=seen, spawn=hosts)
    assert any("has joined again" in w for w in seen.warnings)
    assert again["state_hash"] == alone["state_hash"]
    assert again["bytes"]["logical"] == alone["bytes"]["logical"]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"persist_g": True, "setup_by": "tensor"},
        {"centroids": "learned", "never_seen": "random"},
        {"centroids": "eval", "bandwidths": "median"},
        {"mu": 0.0},
    ],
)
def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path: Path, how: dict[str, Any]) -> None:
    fields = {**MIXED, **{f"algorithm__{k}": v for k, v in how.items()}}
    whole = run(tmp_path / "whole", **{**fields, "rounds": 4})
    run(tmp_path / "run", **{**fields, "rounds": 2})
    again = run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    assert again["state_hash"] == whole["state_hash"]


def test_a_run_does_not_go_on_with_another_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", algorithm__generator="tests.test_fedktl:Counted")
    fedktl._loaded.cache_clear()
    monkeypatch.setattr(Counted, "load", lambda self, device: Toy(latent_dim=H, seed=1).load(device))
    with pytest.raises(ValueError, match=r"algorithm\.generator: .* another generator .*put its file back"):
        run_here(load_resumed(tmp_path / "run", ["rounds=3"]), output=tmp_path / "run", resume=True)
    fedktl._loaded.cache_clear()


@pytest.mark.parametrize("dim", ["classes", "least", 13])
def test_seeds_and_tensors_set_up_the_same_run(tmp_path: Path, dim: Any) -> None:
    by = [run(tmp_path / how, algorithm__setup_by=how, algorithm__etf_dim=dim) for how in ("seed", "tensor")]
    assert by[0]["state_hash"] == by[1]["state_hash"]
    assert by[0]["bytes"]["by_phase"]["setup"] != by[1]["bytes"]["by_phase"]["setup"]


# ---- replies that are lost, and clients that lie
@dataclass(frozen=True)
class Spoilt(FedKtl):
    """In round 2, client 0 sends something else than its prototypes, and client 1 fails once it has trained."""

    sends: str = "nan"

    @on_client
    def train(
        self,
        me: Me,
        data: ClientData,
        etf_seed: Seeds | None,
        etf: Matrix | None,
        g_seed: Seeds | None,
        g: Matrix | None,
        images: Images | None,
        vectors: Latents | None,
    ) -> Uploaded:
        p, c = super().train(me, data, etf_seed, etf, g_seed, g, images, vectors)
        if data.round != 2 or data.client > 1:
            return Uploaded(p, c)
        if data.client == 1:
            raise RuntimeError("gone")
        p, c = p.clone(), c.clone()
        if self.sends == "nan":
            p[0, 0] = math.nan
        return {
            "nan": Uploaded(p, c),
            "long vectors": Uploaded(p * 1.1 / p.abs().max(), c),
            "other dimension": Uploaded(p[:, :-1].clone(), c),
            "float64": Uploaded(p.double(), c),
            "too many": Uploaded(p.repeat(2, 1), c),
            "more than classes": Uploaded(p[:1].repeat(C + 1, 1), torch.arange(C + 1, dtype=torch.int32)),
            "twice": Uploaded(p, c[:1].repeat(len(c))),
            "unsorted": Uploaded(p, c.flip(0)),
            "negative": Uploaded(p, c - C),
            "int64": Uploaded(p, c.long()),
            "zeros": Uploaded(p * 0, c),
            "none": Uploaded(p[:0], c[:0]),
        }[self.sends]


SPOILT = "tests.test_fedktl:Spoilt"


def test_a_reply_that_is_lost_or_refused_leaves_no_trace(tmp_path: Path) -> None:
    how: dict[str, Any] = {"algorithm__name": SPOILT, "algorithm__persist_g": True}
    run(tmp_path / "one", **how, rounds=1)
    run(tmp_path / "two", **how, rounds=2)
    run(tmp_path / "three", **how, rounds=3)
    assert [sorted(line["missing"]) for line in lines(tmp_path / "three")] == [[], ["0", "1"], []]
    (_, before), (_, after), (_, end) = (states(tmp_path / name) for name in ("one", "two", "three"))
    for client in range(K):
        stays = before[client]["y"].equals(after[client]["y"])
        assert stays == (client < 2)
        assert (after[client]["g"] is None) == (client < 2)
        assert not end[client]["y"].equals(after[client]["y"])


@pytest.mark.parametrize(
    ("sends", "why"),
    [
        ("long vectors", r"prototypes: range: a value is beyond 1\.001"),
        ("other dimension", r"prototypes: shape: torch\.float32 \[\d+, 9\] is not torch\.float32 \[any, 10\]"),
        ("float64", r"prototypes: shape: "),
        ("too many", r"classes: shape: \d+ class numbers for \d+ prototypes"),
        ("more than classes", r"classes: range: class numbers must ascend within 0 to 9"),
        ("twice", r"classes: range: "),
        ("unsorted", r"classes: range: "),
        ("negative", r"classes: range: "),
        ("int64", r"classes: shape: "),
    ],
)
def test_what_is_no_prototype_is_refused_and_changes_nothing_for_others(tmp_path: Path, sends: str, why: str) -> None:
    honest = run(tmp_path / "nan", algorithm__name=SPOILT, rounds=3)
    result = run(tmp_path / "run", algorithm__name=SPOILT, algorithm__sends=sends, rounds=3)
    said = lines(tmp_path / "run")[1]["missing"]["0"]
    assert said.startswith("refused: ")
    assert re.search(why, said), said
    assert result["state_hash"] == honest["state_hash"]


@pytest.mark.parametrize("sends", ["zeros", "none"])
@pytest.mark.parametrize("mode", ["batch", "eval", "learned"])
def test_prototypes_without_direction_and_empty_replies_do_no_harm(tmp_path: Path, sends: str, mode: str) -> None:
    run(
        tmp_path / "run",
        rounds=4,
        algorithm__name=SPOILT,
        algorithm__sends=sends,
        algorithm__centroids=mode,
        algorithm__server_epochs=20,
    )
    found = lines(tmp_path / "run")
    assert [sorted(line["missing"]) for line in found] == [[], ["1"], [], []]
    assert 0 < found[-1]["log"]["centroid_std"] < 5
    server, clients = states(tmp_path / "run")
    assert bool(server["e"].isfinite().all())
    assert all(bool(mine["y"].floats.isfinite().all()) for mine in clients.values())


# ---- what a client does
def test_before_there_are_pairs_a_client_trains_as_under_the_control(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=1, algorithm__persist_g=True)
    run(tmp_path / "control", rounds=1, algorithm__mu=0.0)
    (_, one), (_, other) = states(tmp_path / "run"), states(tmp_path / "control")
    assert sorted(one) == sorted(other) == list(range(K))
    assert all(one[client]["y"].equals(other[client]["y"]) for client in range(K))
    assert all(mine["g"] is None for mine in one.values())


def at_a_client(client: int, number: int = 2, **changes: Any) -> tuple[FedKtl, ClientData]:
    """The algorithm, and a client's data in a round."""
    job = build(load(ktl(**changes)))
    assert isinstance(job.algorithm, FedKtl)
    return job.algorithm, ClientData(job.task, client, Streams(0, number, client))


def gradients(algorithm: FedKtl, data: ClientData, pairs: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the first step's loss, by name, and the model's buffers behind it; with so many pairs."""
    module = data.architecture.copy().train()
    v = etf(C, C, 1)
    g = nn.Linear(8, H)
    rng = torch.Generator().manual_seed(5)
    images, vectors = torch.rand(pairs, *data.task.shape, generator=rng), torch.randn(pairs, H, generator=rng)
    loss = algorithm.loss(v, fedktl.Pairs(data, images, vectors, g) if pairs else None)
    loss(module, data.reader()(torch.arange(10))).backward()  # type: ignore[no-untyped-call]
    found = {name: t.grad for name, t in module.named_parameters() if t.grad is not None}
    return found, dict(module.named_buffers())


@pytest.mark.parametrize("model", [MLP, CNN])
def test_with_mu_0_pairs_move_no_gradient_without_batch_norm(model: dict[str, Any]) -> None:
    algorithm, data = at_a_client(0, algorithm__mu=0.0, clients__models=[model])
    without, _ = gradients(algorithm, data, 0)
    with_pairs, _ = gradients(algorithm, data, 7)
    assert without.keys() == with_pairs.keys()
    for name, gradient in without.items():
        torch.testing.assert_close(with_pairs[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [CNN, NORM])
def test_the_transfer_term_does_not_reach_the_head(model: dict[str, Any]) -> None:
    """What is left of the whole loss' gradient in the head is that of L_A."""
    fields: dict[str, Any] = {"clients__models": [model], "task__model": model}
    without, before = gradients(*at_a_client(0, **fields), 0)
    with_pairs, after = gradients(*at_a_client(0, **fields, algorithm__mu=1e4), 7)
    head = sorted(without)[-2:] if model is NORM else [n for n in without if without[n].shape[0] == C]
    moved = [name for name in without if not torch.allclose(with_pairs[name], without[name], rtol=1e-3, atol=1e-4)]
    assert moved
    assert not set(moved) & {name for name in head if without[name].shape[0] == C}
    # BatchNorm has seen both batches, one after the other
    counts = [int(t) for name, t in after.items() if name.endswith("num_batches_tracked")]
    assert counts == [2] * len(counts)
    assert bool(counts) == (model is NORM) == bool(before)


@pytest.mark.parametrize("model", [NORM, CNN, MLP])
def test_one_step_by_hand(model: dict[str, Any]) -> None:
    """L = L_A + mu L_M of a batch and of the first batch of pairs: in two passes with BatchNorm, else in one."""
    algorithm, data = at_a_client(0, clients__models=[model], task__model=model, algorithm__mu=3.0)
    module, by_hand = data.architecture.copy().train(), data.architecture.copy().train()
    g, v = nn.Linear(8, H), etf(C, C, 1)
    rng = torch.Generator().manual_seed(5)
    images, vectors = torch.rand(13, 1, 8, 8, generator=rng), torch.randn(13, H, generator=rng)
    order = torch.randperm(13, generator=Streams(0, 2, 0).generator("second"))
    batch: Batch = data.reader()(torch.arange(10))
    loss = algorithm.loss(v, fedktl.Pairs(data, images, vectors, g))(module, batch)
    z = by_hand(batch.x)
    want = arcface((z / z.norm(dim=1, keepdim=True)) @ v, batch.y, 0.5, 64.0)
    features, _ = features_and_logits(by_hand, images[order[:10]])
    want = want + 3.0 * (g(features) - vectors[order[:10]]).square().mean()
    torch.testing.assert_close(loss, want)
    for one, other in zip(module.buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_pairs_run_on_over_epochs_and_are_shuffled_at_every_pass() -> None:
    _, data = at_a_client(0)
    vectors = torch.arange(23.0)[:, None]
    pairs = fedktl.Pairs(data, torch.rand(23, 1, 8, 8), vectors, nn.Identity())
    assert pairs._order is not None
    passes = [[next(pairs._order) for _ in range(3)] for _ in range(2)]
    assert [[len(batch) for batch in one] for one in passes] == [[10, 10, 3]] * 2
    first, second = (torch.cat(one).tolist() for one in passes)
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


@pytest.mark.parametrize(("pairs", "sizes"), [(21, [10, 11]), (11, [11]), (1, None), (2, [2])])
def test_no_batch_of_one_pair_comes_to_batch_norm(pairs: int, sizes: list[int] | None) -> None:
    _, data = at_a_client(0, clients__models=[ONE_FEATURE_EACH], task__model=ONE_FEATURE_EACH)
    made = fedktl.Pairs(data, torch.rand(pairs, 1, 8, 8), torch.zeros(pairs, H), nn.Linear(8, H))
    module = data.architecture.copy().train()
    x = torch.rand(10, 1, 8, 8)
    if sizes is None:
        assert made.beside(module, x)[1] is None
        return
    assert made._order is not None
    assert [len(next(made._order)) for _ in sizes] == sizes
    _, loss = made.beside(module, x)
    assert loss is not None
    assert bool(loss.isfinite())


def test_gradients_of_model_and_projection_are_clipped_each_on_its_own(tmp_path: Path) -> None:
    """One step with a huge mu: both move by exactly clip times the learning rate."""
    fields: dict[str, Any] = {
        **rows([[0, 1], [1, 2]], 8),
        "algorithm__mu": 1e10,
        "algorithm__clip": 0.5,
        "algorithm__persist_g": True,
        "local__lr": 0.25,
    }
    run(tmp_path / "one", **fields, rounds=1)
    run(tmp_path / "two", **fields, rounds=2)
    run(tmp_path / "three", **fields, rounds=3)
    (_, one), (_, two), (_, three) = (states(tmp_path / name) for name in ("one", "two", "three"))
    for client in range(2):
        for name, before, after in (("y", one, two), ("g", two, three)):
            moved = (after[client][name].floats - before[client][name].floats).norm()
            assert float(moved) == pytest.approx(0.5 * 0.25, rel=1e-4)


def test_g_begins_anew_in_each_round_unless_it_is_kept(tmp_path: Path) -> None:
    for name, kept in (("anew", False), ("kept", True)):
        run(tmp_path / name, algorithm__persist_g=kept, rounds=3)
    (_, anew), (_, kept) = states(tmp_path / "anew"), states(tmp_path / "kept")
    assert all(mine["g"] is None for mine in anew.values())
    assert all(mine["g"] is not None for mine in kept.values())
    assert not any(anew[c]["y"].equals(kept[c]["y"]) for c in range(K))


@pytest.mark.parametrize("model", [CNN, NORM])
def test_twins_send_the_same(tmp_path: Path, model: dict[str, Any]) -> None:
    """Clients that have equal models and data, and read these in a fixed order."""
    fields = {**rows([[0, 1, 2], [0, 1, 2]], 24, twins=True), "local__order": "fixed"}
    (u,) = watched(tmp_path / "run", **fields, rounds=1, clients__models=[model], task__model=model)
    assert u.classes.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(u.prototypes[:3], u.prototypes[3:])
    torch.testing.assert_close(u.prototypes.norm(dim=1), torch.ones(6))


def test_prototypes_are_those_of_the_trained_model(tmp_path: Path) -> None:
    (u,) = watched(tmp_path / "run", rounds=1)
    job = build(load(ktl(algorithm__name=WATCHED)))
    _, clients = states(tmp_path / "run")
    at = 0
    for client in range(K):
        module = job.task.frozen_copy(clients[client]["y"], client)
        x, y = job.task.rows(client)
        z = unit(module(x))
        for label in sorted(set(y.tolist())):
            want = unit(z[y == label].mean(dim=0))
            assert int(u.classes[at]) == label
            torch.testing.assert_close(u.prototypes[at], want, rtol=1e-5, atol=1e-6)
            at += 1
    assert at == len(u.classes)


def test_scores_are_those_of_the_nearest_column_of_the_classifier(tmp_path: Path) -> None:
    run(tmp_path / "run", eval={"every": 1})
    job = build(load(ktl(eval={"every": 1})))
    _, clients = states(tmp_path / "run")
    assert isinstance(job.algorithm, FedKtl)
    seed = job.algorithm.common(job.task)["etf_seed"].value
    v = etf(C, C, seed)
    rows_of = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    (batch,) = job.task.test_batches(512)
    for row in (r for r in rows_of if r["round"] == 2):
        z = job.task.frozen_copy(clients[row["client"]]["y"], row["client"])(batch[0])
        cosines = z @ v / z.norm(dim=1, keepdim=True)
        assert row["accuracy"] == pytest.approx(float((cosines.argmax(dim=1) == batch[1]).float().mean()))
        assert row["loss"] == pytest.approx(float(nn.functional.cross_entropy(64 * cosines, batch[1])), rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"task__partition": {"name": "feature_noise", "noise": 0.3}}, MIXED])
def test_the_pass_for_prototypes_serves_for_scores_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {**how, "task__subset": {"train": 1200, "test": 60}, "rounds": 2}
    fields |= {"eval": {"split": "train", "clients": "selected", "metrics": ["accuracy", "loss", "top5"]}}
    anew = {"batch_size": 511}  # another size of batches: scores are made by a pass of their own

    def scores(name: str) -> str:
        return (tmp_path / name / "clients.jsonl").read_text()

    with monkeypatch.context() as patch:
        patch.setattr(ClientData, "evaluate", None)  # nobody asks for it
        run(tmp_path / "reused", **fields)
    with monkeypatch.context() as patch:
        passed = FedKtl.passed

        def without_trace(self: FedKtl, me: Me, data: ClientData) -> Tensor:
            z = passed(self, me, data)
            del me.scratch.values["passed"]
            return z

        patch.setattr(FedKtl, "passed", without_trace)
        run(tmp_path / "apart", **fields)
    assert scores("reused") == scores("apart")
    run(tmp_path / "other", **{**fields, "eval": {**fields["eval"], **anew}})
    assert len(scores("other").splitlines()) == len(scores("reused").splitlines())


def test_who_was_not_selected_keeps_its_model_and_is_scored_too(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=1, clients__per_round=1, eval={"every": 1})
    (line,) = lines(tmp_path / "run")
    _, clients = states(tmp_path / "run")
    assert len(clients) == line["selected"] == 1
    scored = [json.loads(row)["client"] for row in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert scored == list(range(K))


# ---- what the server does
@pytest.mark.parametrize("mode", ["batch", "eval", "learned"])
@pytest.mark.parametrize("never_seen", ["leave_out", "random"])
def test_classes_that_are_absent_keep_their_rows(tmp_path: Path, mode: str, never_seen: str) -> None:
    """Nobody has classes 5 to 9; what was uploaded in the first round alone stays in the second."""
    fields: dict[str, Any] = {
        **rows([[0, 1], [1, 2], [3, 4]]),
        "clients__per_round": 2,
        "algorithm__centroids": mode,
        "algorithm__never_seen": never_seen,
    }
    run(tmp_path / "one", **fields, rounds=1)
    (first, second) = watched(tmp_path / "two", **fields, rounds=2)
    (one, _), (two, _) = states(tmp_path / "one"), states(tmp_path / "two")
    start = build(load(ktl(**fields)))
    initial = start.algorithm.init_server(start.task).e
    known, now = set(first.classes.tolist()), set(second.classes.tolist())
    assert known - now, "everything was uploaded again: choose another seed"
    for c in range(C):
        assert torch.equal(one["e"][c], initial[c]) == (c not in known)
        assert torch.equal(two["e"][c], one["e"][c]) == (c not in now)
    sends = set(range(C)) if never_seen == "random" else known | now
    assert two["sent"].nonzero().flatten().tolist() == sorted(sends)
    assert two["known"].nonzero().flatten().tolist() == sorted(known | now)
    images = Toy(latent_dim=H).load(torch.device("cpu")).decode(two["e"])
    for c in range(C):
        if c in sends:
            torch.testing.assert_close(two["decoded"][c], images[c])
        else:
            assert not two["decoded"][c].any()


def test_only_classes_whose_latents_have_moved_are_decoded(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**rows([[0, 1], [1, 2], [3, 4]]), "clients__per_round": 1, "rounds": 5}
    DECODED.clear()
    sent = watched(
        tmp_path / "run", **fields, algorithm__generator="tests.test_fedktl:Counted", algorithm__generation_batch=64
    )
    assert [len(set(u.classes.tolist())) for u in sent] == DECODED == [2] * 5


def test_how_many_are_decoded_at_a_time_changes_nothing(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"algorithm__generator": "tests.test_fedktl:Counted"}
    run(tmp_path / "whole", **fields)
    DECODED.clear()
    run(tmp_path / "parts", **fields, algorithm__generation_batch=4)
    assert DECODED == [4, 4, 2] * 2
    (one, _), (other, _) = states(tmp_path / "whole"), states(tmp_path / "parts")
    torch.testing.assert_close(one["decoded"], other["decoded"], rtol=1e-4, atol=1e-5)


def test_a_run_leaves_the_generator_as_it_was(tmp_path: Path) -> None:
    MADE.clear()
    fedktl._loaded.cache_clear()
    run(tmp_path / "run", algorithm__generator="tests.test_fedktl:Counted", algorithm__server_lr=0.5)
    (made,) = MADE
    want = Toy(latent_dim=H).load(torch.device("cpu"))
    assert made._synthesis.state_dict().keys() == want._synthesis.state_dict().keys()
    for name, tensor in made._synthesis.state_dict().items():
        assert torch.equal(tensor, want._synthesis.state_dict()[name])
    assert not made._synthesis.training
    assert all(t.grad is None for t in made._synthesis.parameters())


@pytest.mark.parametrize("size", [2, 4, 5])
def test_a_prototype_that_is_left_over_is_left_out(tmp_path: Path, size: int) -> None:
    """Five prototypes: in batches of two or four one is left over, on which BatchNorm cannot train."""
    fields = {**rows([[0, 1], [0, 1, 2]]), "algorithm__server_batch_size": size}
    run(tmp_path / "run", **fields, rounds=3)
    for line in lines(tmp_path / "run"):
        assert line["log"]["prototypes"] == 5
        assert all(math.isfinite(line["log"][name]) for name in ("mmd", "mse", "centroid_std"))


@pytest.mark.parametrize("never_seen", ["leave_out", "random"])
def test_a_single_prototype_cannot_be_aligned(tmp_path: Path, never_seen: str) -> None:
    result = run(tmp_path / "run", **rows([[3]]), algorithm__never_seen=never_seen, rounds=3)
    assert [line["log"] for line in lines(tmp_path / "run")] == [{"prototypes": 1.0}] * 3
    assert result["bytes"]["logical"]["down"] == 0


def test_one_pair_for_clients_with_batch_norm(tmp_path: Path) -> None:
    """Two clients with one class between them: they train as if there were no pair."""
    fields = {**rows([[3], [3]], 12), "clients__models": [NORM], "task__model": NORM, "rounds": 3}
    run(tmp_path / "run", **fields)
    run(tmp_path / "control", **fields, algorithm__mu=0.0)
    (server, one), (_, other) = states(tmp_path / "run"), states(tmp_path / "control")
    assert int(server["sent"].sum()) == 1
    assert all(line["missing"] == {} for line in lines(tmp_path / "run"))
    assert all(one[c]["y"].equals(other[c]["y"]) for c in range(2))


@pytest.mark.parametrize("tail", ["keep", "drop", "merge"])
def test_samples_that_batch_norm_never_trains_on_make_no_prototypes(tmp_path: Path, tail: str) -> None:
    """Of clients with one sample, and of a last sample that is alone: in its class, too."""
    held = [[0], [*[1] * 10, 2], [4, 5]]
    fields: dict[str, Any] = {**rows(held, [1, 11, 20]), "clients__models": [NORM], "task__model": NORM}
    fields |= {"local__order": "fixed", "local__tail": tail, "rounds": 1}
    (u,) = watched(tmp_path / "run", **fields)
    assert u.classes.tolist() == ([1, 2, 4, 5] if tail == "merge" else [1, 4, 5])
    found = predict(build(load(ktl(**fields))))
    assert found.of_run(1) == json.loads((tmp_path / "run" / "result.json").read_text())["bytes"]["logical"]


@pytest.mark.parametrize("n", [1, 5])
def test_clients_with_fewer_samples_than_a_batch_train_on_one_smaller_batch(tmp_path: Path, n: int) -> None:
    fields: dict[str, Any] = {**rows([[0, 1], [0, 1]], [n, 20]), "local": {"batch_size": 10, "lr": 0.05}}
    fields |= {"local__order": "fixed", "local__tail": "drop"}
    run(tmp_path / "run", **fields)
    _, clients = states(tmp_path / "run")
    task = build(load(ktl(**fields))).task
    assert not clients[0]["y"].equals(task.init_params(0, whole=True))
    assert lines(tmp_path / "run")[0]["log"]["prototypes"] == min(n, 2) + 2


def pairs_of(algorithm: FedKtl, task: Task, e: Tensor, decoded: Tensor) -> tuple[Tensor | None, Tensor | None]:
    sent = torch.ones(len(e), dtype=torch.bool)
    return algorithm.pairs(SimpleNamespace(sent=sent, e=e, decoded=decoded, task=task))  # type: ignore[arg-type]


def test_vectors_beyond_the_range_of_float16_stay_finite() -> None:
    job = build(load(ktl(algorithm__vectors_as="float16")))
    e = torch.tensor([[1e6, -1e6, 1.5, 65504.0, 65519.0, 65521.0]])
    assert isinstance(job.algorithm, FedKtl)
    _, vectors = pairs_of(job.algorithm, job.task, e, torch.zeros(1, 1, 8, 8))
    assert vectors is not None
    assert vectors.dtype is torch.float16
    assert vectors[0].tolist() == [65504.0, -65504.0, 1.5, 65504.0, 65504.0, 65504.0]


@pytest.mark.parametrize("normalize", ["unit", "symmetric", "standard"])
def test_images_reach_clients_as_their_samples_are(normalize: str) -> None:
    """In numbers or in bytes: normalised as their own."""
    decoded = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    got = []
    for images_as in ("float32", "uint8"):
        algorithm, data = at_a_client(0, task__normalize=normalize, algorithm__images_as=images_as)
        images, vectors = pairs_of(algorithm, data.task, torch.zeros(5, H), decoded)
        assert images is not None
        assert vectors is not None
        got.append(fedktl.Pairs(data, images, vectors, nn.Linear(8, H))._images)
    torch.testing.assert_close(got[0], data.task.normal(decoded))
    step = float((data.task.normal(torch.ones(1, 1, 8, 8)) - data.task.normal(torch.zeros(1, 1, 8, 8))).max()) / 255
    assert 0 < float((got[0] - got[1]).abs().max()) <= step / 2 * 1.001


@pytest.mark.parametrize("shape", [[3, 16, 12], [1, 5, 9], [3, 8, 8]])
def test_images_of_other_sizes_are_brought_to_that_of_the_data(tmp_path: Path, shape: list[int]) -> None:
    run(tmp_path / "run", algorithm__generator={"name": "toy", "latent_dim": H, "image_shape": shape})
    server, _ = states(tmp_path / "run")
    assert server["decoded"].shape == (C, 1, 8, 8)
    assert 0 <= float(server["decoded"].min()) < float(server["decoded"].max()) <= 1


def test_bandwidths_by_the_median_go_by_what_the_alignment_sees() -> None:
    """In evaluation mode vectors explode where those of a batch lie close to one another."""
    job = build(load(ktl(algorithm__bandwidths="median")))
    algorithm = job.algorithm
    assert isinstance(algorithm, FedKtl)
    f = fedktl.transformer(C, H)
    norm = f[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(norm.running_var, Tensor)
    norm.running_var.fill_(1e-12)
    p = unit(torch.randn(30, C, generator=torch.Generator().manual_seed(1)))
    draw = torch.Generator().manual_seed(2)
    got = algorithm.widths(f, p, lambda n: torch.randn(n, H, generator=draw))
    assert max(got) < 100
    assert sorted(got) == list(got)


def test_pictures_of_the_pairs(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=3, algorithm__show_every=2)
    found = sorted(p.name for p in (tmp_path / "run" / "images").iterdir())
    assert found == ["round-000001-pairs.png", "round-000002-pairs.png"]


# ---- generators and data of others
FOREIGN = {
    "pretrained/mnist_vae.pth": {"name": "mlp", "layers": ["fc3", "fc4"], "output": "sigmoid"},
    "pretrained/mnist_mlp_gan.ckpt": {"name": "mlp", "output": "tanh"},
}


@pytest.mark.parametrize("file", FOREIGN)
def test_generators_of_others(tmp_path: Path, file: str) -> None:
    path = needs_data(file) / file
    run(tmp_path / "run", algorithm__generator={**FOREIGN[file], "path": str(path)}, algorithm__show_every=1)
    server, _ = states(tmp_path / "run")
    assert server["e"].shape == (C, 20 if "vae" in file else 64)
    assert float(server["decoded"].std()) > 0.05
    assert len(list((tmp_path / "run" / "images").iterdir())) == 2


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs" / "fedktl").glob("small-*.yaml")))
def test_two_rounds_of_the_small_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FLDIST_DATA", str(needs_data("MNIST/raw")))
    overrides = ["rounds=2", "algorithm.server_epochs=2", "task.subset.test=100"]
    if "single" not in name:
        overrides.append("task.subset.train=500")
    result = run_here(load(ROOT / "configs" / "fedktl" / name, overrides), output=tmp_path / "run")
    assert (result["status"], result["rounds"]) == ("finished", 2)
    assert result["bytes"]["logical"]["down"] > 0


# ---- what is refused, and what is only said
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"algorithm__etf_dim": 8}, r"algorithm\.etf_dim: 8 dimensions .* 10 classes; it must be at least 9$"),
        (
            {"algorithm__etf_dim": "most"},
            r"algorithm\.etf_dim: it must be classes, least, or a whole number from 1 on; got 'most'$",
        ),
        (
            {"clients__models": [MLP, {"name": "mlp", "hidden": [12]}]},
            r"task\.feature_dim: .* of several sizes, 8 \(.*\), 12 \(.*\); set it",
        ),
        (
            {**rows([[0, 1], [1, 2]], shape=[64]), "clients__models": [MLP]},
            r"algorithm: fedktl makes images, .* \(64,\); set mu=0$",
        ),
        ({"eval": {"own": True}, "task__split": {"test": 0.2}}, r"eval\.own: .*use false$"),
        ({"eval": {"model": "sent"}}, r"eval\.model: sent"),
        ({"algorithm__bandwidths": []}, r"algorithm\.bandwidths: .*give numbers, or median$"),
        (
            {"algorithm__bandwidths": [10.0, 0.0]},
            r"algorithm\.bandwidths: it must be a list of positive numbers, or median; got \[10\.0, 0\.0\]$",
        ),
        ({"algorithm__server_batch_size": 1}, r"algorithm\.server_batch_size: .*greater than or equal to 2"),
        ({"algorithm__margin": 3.2}, r"algorithm\.margin: .*less than 3\.14"),
        ({"algorithm__mu": -1.0}, r"algorithm\.mu: .*greater than or equal to 0"),
        ({"algorithm__mu": math.inf}, r"algorithm\.mu: .*finite"),
        (
            {"algorithm__generator": "styl"},
            r"algorithm\.generator\.name: unknown name 'styl'; did you mean 'stylegan'\? known: .*mini_style",
        ),
        (
            {"algorithm__generator": {"name": "toy", "latents": 3}},
            r"algorithm\.generator\.latents: .*it has latent_dim",
        ),
        ({"algorithm__generator": {"name": "toy", "latent_dim": 0}}, r"algorithm\.generator\.latent_dim: .*equal to 1"),
        ({"task__model": NORM, "clients__models": [NORM], "local__batch_size": 1}, r"local\.batch_size: .*raise it"),
    ],
)
def test_bad_settings(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        build(load(ktl(**changes)))


@pytest.mark.parametrize(
    ("generator", "what"),
    [
        ({"name": "toy", "image_shape": [2, 8, 8]}, r"images have 2 channels; .*choose another generator"),
        ({"name": "tests.test_fedktl:Lying"}, r"its latents have the shape \[7\], and gives \[6\]; correct it"),
        (
            {"name": "tests.test_fedktl:Lying", "what": "images"},
            r"its images have the shape \[1, 8, 9\], and gives \[1, 8, 8\]; correct it",
        ),
        ({"name": "mlp", "path": "nowhere.pth", "output": "tanh"}, r"no file found: looked for .*nowhere\.pth"),
    ],
)
def test_generators_that_do_not_fit(tmp_path: Path, generator: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.generator.*: .*" + what):
        fldist.run(ktl(algorithm__generator=generator), output=tmp_path / "run")
    done = tmp_path / "run" / "rounds.jsonl"
    assert not done.exists() or not done.read_text()


def test_data_without_images_and_models_without_linear_layers_can_do_the_control(tmp_path: Path) -> None:
    run(tmp_path / "flat", **rows([[0, 1], [1, 2]], shape=[64]), clients__models=[MLP], algorithm__mu=0.0)
    convolved = {"name": "tests.test_fedktl:Convolved"}
    run(tmp_path / "conv", clients__models=[convolved], task__model=convolved, algorithm__mu=0.0)


@dataclass(frozen=True)
class Convolved:
    """A classifier that is a convolution."""

    short_name: ClassVar[str] = "convolved"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(shape[0], classes, shape[1]), nn.Flatten())


def test_a_class_that_nobody_has_is_left_out(tmp_path: Path) -> None:
    holds = [[0, 1], [1, 2]]
    run(tmp_path / "run", **rows(holds))
    server, _ = states(tmp_path / "run")
    assert server["sent"].nonzero().flatten().tolist() == [0, 1, 2]


def test_describe_tells_every_field_and_its_default() -> None:
    text = describe("fedktl")
    assert "required" not in text
    fields = text.split("Fields (section `algorithm`):\n")[1].split("\n\n")[0].splitlines()
    assert len(fields) == len(dataclasses.fields(FedKtl))
    assert all("; " in line for line in fields), [line for line in fields if "; " not in line]


def test_sums_by_class_have_the_same_bits_every_time_on_a_gpu() -> None:
    needs_gpus()
    rng = torch.Generator().manual_seed(1)
    rows_, values = torch.randint(0, 3, (20000,), generator=rng), torch.randn(20000, 16, generator=rng)
    made = []
    for _ in range(3):
        into = torch.ones(3, 16, device="cuda")
        add_rows(into, rows_.cuda(), values.cuda(), alpha=-0.5)
        made.append(into.cpu())
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    want = torch.ones(3, 16)
    add_rows(want, rows_, values, alpha=-0.5)
    torch.testing.assert_close(made[0], want, rtol=1e-4, atol=1e-3)


def test_a_selector_that_goes_by_the_loss_of_outputs_needs_one_output_for_each_class() -> None:
    changes = {"selection": {"name": "tests.own:ByReports"}}
    build(load(ktl(algorithm__etf_dim="classes", **changes)))
    with pytest.raises(ValueError, match=r"selection.name: .*gives 9 for 10 classes; use another selector"):
        build(load(ktl(algorithm__etf_dim="least", **changes)))


def test_a_generator_that_cannot_be_read_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"algorithm.generator.path: no file found"):
        run(tmp_path / "run", algorithm__generator={"name": "torchscript", "path": "nowhere.pt"})
    run(tmp_path / "run", rounds=1)  # the same directory serves
    assert len(lines(tmp_path / "run")) == 1


def test_an_alignment_that_diverges_says_what_to_lower(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"algorithm.server_lr: the alignment of round 1 has diverged"):
        run(tmp_path / "run", algorithm__server_lr=1e30)


def test_pictures_of_many_classes_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedktl, "_SHOWN", 4)
    run(tmp_path / "run", rounds=2, algorithm__show_every=2, algorithm__never_seen="random")
    names = sorted(path.name for path in (tmp_path / "run" / "images").iterdir())
    assert names == [f"round-{r:06}-pairs{part}.png" for r in (1, 2) for part in ("-5", "-9", "")]
