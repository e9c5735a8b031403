"""FedKTL's rounds seen from within and done again by hand: what a client makes of the pairs it is sent, what the server
makes of the vectors it gets, and how models are scored. Equations are in `test_fedktl_equations.py`."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import fldist
from fldist.algorithm import ClientScores, Me, Server, on_client
from fldist.algorithms import fedktl
from fldist.algorithms.fedktl import Alignment, Drawn, FedKtl, Matrix, centroids, etf
from fldist.data.client_data import ClientData
from fldist.data.datasets import Dataset
from fldist.kinds import Images, Latents, Seeds
from fldist.models.generators import named
from fldist.models.train import Network
from fldist.params import Params
from fldist.prototypes import Stacked, Uploaded
from fldist.seeding import Streams

C, H, K, ROWS = 6, 5, 12, 22
HOLDS = ([0, 1], [0, 1], [2, 3, 4], [0, 3, 4])
"""Nobody has class 5; clients 0 and 1 have the same samples."""
MLP = {"name": "mlp", "hidden": [K]}
TOY = {"name": "toy", "latent_dim": H}


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@dataclass(frozen=True)
class Held:
    """Four owners of `ROWS` rows with a mean for each class."""

    def load(self) -> Dataset:
        rng = np.random.default_rng(1)
        means = rng.normal(size=(C, 1, 8, 8))
        y = np.concatenate([np.resize(held, ROWS) for held in HOLDS])
        x = (0.5 + 0.1 * means[y] + 0.1 * rng.normal(size=(len(y), 1, 8, 8))).astype(np.float32)
        x[ROWS : 2 * ROWS] = x[:ROWS]
        owner = np.repeat(np.arange(len(HOLDS)), ROWS)
        return Dataset(x, y, x[::3], y[::3], C, train_owner=owner, test_owner=owner[::3])


@dataclass
class Turn:
    """A client's training: what it had and was sent, and what came of it."""

    client: int
    y: Params
    streams: Streams
    data: ClientData
    v: Tensor
    g: Tensor
    images: Tensor | None
    vectors: Tensor | None
    trained: Params = field(init=False)
    uploaded: Uploaded = field(init=False)


SEEN: dict[str, list[Any]] = defaultdict(list)


@dataclass(frozen=True)
class Watched(FedKtl):
    """Keeps what goes in and comes out."""

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
        assert etf is not None
        assert g is not None
        turn = Turn(data.client, me.y.clone(), copy.deepcopy(data.streams), data, etf, g, images, vectors)
        got = super().train(me, data, etf_seed, etf, g_seed, g, images, vectors)
        turn.trained, turn.uploaded = me.y.clone(), got
        SEEN["turn"].append(turn)
        return got

    def align(self, server: Server, u: Stacked) -> None:
        before = server.f.clone(), server.e.clone()
        super().align(server, u)
        SEEN["align"].append((u, before, (server.f.clone(), server.e.clone())))

    @on_client
    def score(self, me: Me, data: ClientData, etf_seed: Seeds | None, etf: Matrix | None) -> ClientScores:
        got = super().score(me, data, etf_seed, etf)
        assert etf is not None
        SEEN["score"].append((data, me.y.clone(), etf, got.scores))
        return got


def run(directory: Path, fields: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    SEEN.clear()
    config: dict[str, Any] = {
        "name": "rounds",
        "rounds": 3,
        "clients": {"num_clients": len(HOLDS), "init": "common"},
        "task": {
            "data": "tests.test_fedktl_rounds:Held",
            "partition": "natural",
            "model": MLP,
            "normalize": "symmetric",
        },
        "local": {"epochs": 2, "batch_size": 8, "lr": 0.02, "order": "fixed", "tail": "drop"},
        "algorithm": {
            "name": "tests.test_fedktl_rounds:Watched",
            "generator": TOY,
            "setup_by": "tensor",
            "server_epochs": 4,
            "server_batch_size": 4,
            "show_every": 0,
            **(fields or {}),
        },
        "eval": {"every": 0},
    }
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    result: dict[str, Any] = fldist.run(config, output=directory)
    assert result["status"] == "finished"
    return result


# ---- a client
def unit_rows(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)


@dataclass
class ByHand:
    """A client's model f, h (a perceptron of one hidden layer) and g, in plain tensors that take gradients."""

    f: list[Tensor]
    h: list[Tensor]
    g: list[Tensor]

    @classmethod
    def of(cls, turn: Turn) -> ByHand:
        module = turn.data.frozen_copy(turn.y)
        values = [p.detach().double().clone() for p in module.parameters()]
        assert [tuple(p.shape) for p in values] == [(K, 64), (K,), (C, K), (C,)]
        g = [turn.g[: H * K].view(H, K).double(), turn.g[H * K :].double()]
        return cls(*([p.clone().requires_grad_() for p in part] for part in (values[:2], values[2:], g)))

    def features(self, x: Tensor) -> Tensor:
        return relu(x.double().flatten(1) @ self.f[0].T + self.f[1])

    def project(self, x: Tensor) -> Tensor:
        return unit_rows(self.features(x) @ self.h[0].T + self.h[1])


def train_by_hand(turn: Turn, mu: float, margin: float, scale: float, clip: float, g: list[Tensor] | None) -> ByHand:
    """Two epochs of clipped SGD on batches in their order; pairs in batches too, from one pass to the next."""
    model, x, y, size = ByHand.of(turn), turn.data.x, turn.data.y, turn.data.task.local.batch_size
    if g is not None:
        model.g = [p.clone().requires_grad_() for p in g]
    groups = [model.f + model.h, model.g]
    queue: list[Tensor] = []
    rng = turn.streams.generator("second")
    for _ in range(2):
        for start in range(0, len(x) - size + 1, size):
            z, label = model.project(x[start : start + size]), y[start : start + size]
            cosines = z @ turn.v.double()
            angles = torch.acos(cosines[torch.arange(size), label])
            moved = cosines.clone()
            moved[torch.arange(size), label] = torch.cos(angles + margin)
            loss = cross_entropy(scale * moved, label)
            if turn.images is not None:
                assert turn.vectors is not None
                if not queue:
                    queue = list(torch.randperm(len(turn.images), generator=rng).split(size))
                    if len(queue) > 1 and len(queue[-1]) == 1:  # which BatchNorm could not train on
                        queue[-2:] = [torch.cat(queue[-2:])]
                rows = queue.pop(0)
                predicted = model.features(turn.images[rows]) @ model.g[0].T + model.g[1]
                loss = loss + mu * (predicted - turn.vectors[rows].double()).square().sum() / (len(rows) * H)
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for group in groups:
                    slopes = [p.grad for p in group if p.grad is not None]
                    if not slopes:
                        continue
                    norm = float(torch.cat([s.flatten() for s in slopes]).norm())
                    for p, slope in zip(group, slopes, strict=True):
                        p -= 0.02 * slope * min(1.0, clip / norm)
                        p.grad = None
    return model


def by_client_and_round(turns: list[Turn]) -> dict[tuple[int, int], Turn]:
    return {(turn.data.round, turn.client): turn for turn in turns}


@pytest.mark.parametrize("persist_g", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"mu": 5.0},
        {"mu": 50.0, "clip": 1.0},
        {"mu": 0.5, "margin": 0.2, "scale": 10.0, "clip": 0.0, "never_seen": "random"},
    ],
)
@pytest.mark.parametrize("batch_size", [8, 4])
def test_a_clients_training_is_that_of_a_plain_loop(
    tmp_path: Path, fields: dict[str, Any], persist_g: bool, batch_size: int
) -> None:
    """Of 5 or 6 pairs, batches of 4 leave one, which joins the others, or two."""
    run(tmp_path / "run", fields | {"persist_g": persist_g}, local={"batch_size": batch_size})
    turns = by_client_and_round(SEEN["turn"])
    assert len(turns) == 12
    pairs = C if "never_seen" in fields else C - 1
    for client in range(4):
        g: list[Tensor] | None = None
        for r in (1, 2, 3):
            turn = turns[r, client]
            if r == 1:
                assert turn.images is None
                assert turn.vectors is None
            else:
                assert turn.images is not None
                assert turn.vectors is not None
                assert (turn.images.shape, turn.vectors.shape) == ((pairs, 1, 8, 8), (pairs, H))
            clip = fields.get("clip", 100.0) or float("inf")
            model = train_by_hand(turn, fields["mu"], fields.get("margin", 0.5), fields.get("scale", 64.0), clip, g)
            g = [p.detach() for p in model.g] if persist_g and r > 1 else None
            trained = list(turn.data.frozen_copy(turn.trained).parameters())
            moved = max(float((p - q.detach()).abs().max()) for p, q in zip(trained, ByHand.of(turn).f, strict=False))
            assert moved > 2e-3
            for got, want in zip(trained, model.f + model.h, strict=True):
                close(got.double(), want.detach(), 1e-4)
            assert r == 3 or turns[r + 1, client].y.equals(turn.trained)


def test_prototypes_are_of_the_trained_model_and_the_samples_it_was_trained_on(tmp_path: Path) -> None:
    """Of 22 rows, batches of 8 leave out the last 6."""
    run(tmp_path / "run")
    for turn in SEEN["turn"]:
        before = turn.y
        turn.y = turn.trained
        with torch.no_grad():
            z = ByHand.of(turn).project(turn.data.x[:16])
        turn.y = before
        held = HOLDS[turn.client]
        assert turn.uploaded.classes.tolist() == held
        for p, c in zip(turn.uploaded.prototypes, held, strict=True):
            mean = torch.stack([v for v, label in zip(z, turn.data.y[:16].tolist(), strict=True) if label == c]).mean(0)
            close(p.double(), mean / mean.norm(), 1e-5)


def test_a_huge_weight_of_the_transfer_moves_no_further_than_the_clip_allows(tmp_path: Path) -> None:
    """One step: of the model and, on its own, of g, by lr times the largest norm."""
    local = {"epochs": 1, "batch_size": ROWS}
    run(tmp_path / "run", {"mu": 1e8, "clip": 3.0, "persist_g": True}, rounds=2, local=local)
    for turn in SEEN["turn"]:
        if turn.data.round == 2:
            step = (turn.trained.trainable.floats - turn.y.trainable.floats).norm()
            assert float(step) == pytest.approx(0.02 * 3.0, rel=1e-4)


def test_a_vanishing_weight_of_the_transfer_trains_as_none_does(tmp_path: Path) -> None:
    run(tmp_path / "none", {"mu": 0}, eval={"every": 3, "where": "clients"})
    alone = {data.client: y for data, y, *_ in SEEN["score"]}
    run(tmp_path / "tiny", {"mu": 1e-12}, eval={"every": 3, "where": "clients"})
    with_pairs = {data.client: y for data, y, *_ in SEEN["score"]}
    assert any(turn.images is not None for turn in SEEN["turn"])
    assert alone.keys() == with_pairs.keys() == set(range(4))
    for client, y in alone.items():
        close(with_pairs[client].floats, y.floats, 1e-6)


def test_equal_clients_upload_equal_vectors(tmp_path: Path) -> None:
    """Pairs come in an order of each client's own; here all of them are in every batch."""
    run(tmp_path / "run")
    turns = by_client_and_round(SEEN["turn"])
    for r in (1, 2, 3):
        one, other = (turns[r, client].uploaded.prototypes for client in (0, 1))
        assert torch.equal(one, other) if r == 1 else torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(turns[1, 2].uploaded.prototypes[:2], turns[1, 0].uploaded.prototypes, atol=0.01)


@pytest.mark.parametrize("batch_size", [ROWS, 4])
def test_real_samples_go_through_a_batch_norm_before_generated_ones(tmp_path: Path, batch_size: int) -> None:
    """Running statistics are those of the passes in this order. Of 5 pairs, batches of 4 leave one, which BatchNorm
    cannot train on: it joins the others. Weights all but stay."""
    local = {"batch_size": batch_size, "lr": 1e-9}
    run(tmp_path / "run", rounds=2, task={"model": {"name": "cnn_bn", "widths": [4]}}, local=local)
    for turn in SEEN["turn"]:
        module = turn.data.frozen_copy(turn.y).train()
        rng = turn.streams.generator("second")
        for _ in range(2):
            for start in range(0, ROWS - batch_size + 1, batch_size):
                module(turn.data.x[start : start + batch_size])
                if turn.images is not None:
                    module(turn.images[torch.randperm(5, generator=rng)])
        ends = turn.data.frozen_copy(turn.trained).state_dict()
        for name, value in module.state_dict().items():
            if "running" in name or "num_batches" in name:
                torch.testing.assert_close(ends[name], value, rtol=1e-5, atol=1e-5)


# ---- the server
@dataclass
class Aligned:
    """A call of `align`."""

    f: Params
    e: Tensor
    p: Tensor
    classes: Tensor
    how: Alignment
    latents: Tensor
    after: Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Aligned]:
    """The calls of `align` in a run of one process."""
    found: list[Aligned] = []

    def spy(f: Network, e: Tensor, p: Tensor, classes: Tensor, draw: Any, how: Alignment, rng: torch.Generator) -> Any:
        before, start = f.params.clone(), e.clone()
        drawn: list[Tensor] = []

        def kept(n: int) -> Tensor:
            drawn.append(draw(n))
            return drawn[-1]

        got = aligning(f, e, p, classes, kept, how, rng)
        found.append(Aligned(before, start, p, classes, how, torch.cat(drawn), got[0].clone()))
        return got

    aligning = fedktl.align
    monkeypatch.setattr(fedktl, "align", spy)
    return found


@pytest.mark.parametrize("mode", ["batch", "eval", "learned"])
def test_what_the_server_makes_of_the_vectors(tmp_path: Path, calls: list[Aligned], mode: str) -> None:
    fields = {"centroids": mode, "lambda_": 0.7, "server_lr": 0.02, "clip": 9.0, "bandwidths": [3.0, 8.0]}
    run(tmp_path / "run", fields)
    turns = by_client_and_round(SEEN["turn"])
    assert len(calls) == len(SEEN["align"]) == 3
    made = named(TOY).load(torch.device("cpu"))
    last: tuple[Params, Tensor] | None = None
    for r, (call, (u, before, after)) in enumerate(zip(calls, SEEN["align"], strict=True), start=1):
        replies = [turns[r, client].uploaded for client in range(4)]
        assert torch.equal(u.prototypes, torch.cat([one.prototypes for one in replies]))
        assert u.classes.tolist() == [c for held in HOLDS for c in held]
        assert torch.equal(call.p, u.prototypes)
        assert torch.equal(call.classes, u.classes)
        assert call.how == Alignment(0.02, 4, 4, 0.7, 9.0, (3.0, 8.0))
        assert call.f.equals(before[0])
        assert not after[0].equals(before[0])
        if last is not None:
            assert before[0].equals(last[0])
            assert torch.equal(before[1], last[1])
        last = after
        e, want = before[1], call.after
        if mode != "learned":
            module = fedktl.transformer(C, H)
            e, want = e.clone(), want.clone()
            for params, rows in ((before[0], e), (after[0], want)):
                params.bind(module)
                means, present = centroids(module, u.prototypes, u.classes, C, mode)  # type: ignore[arg-type]
                rows[present] = means[present]
        close(call.e, e, 1e-6)
        close(after[1], want, 1e-6)
        assert torch.equal(after[1][5], before[1][5])  # nobody has it
        if r < 3:
            for client in range(4):
                turn = turns[r + 1, client]
                assert turn.images is not None
                assert turn.vectors is not None
                assert torch.equal(turn.vectors, after[1][:5])
                close(turn.images, 2 * made.decode(after[1][:5]) - 1, 1e-6)
    latents = torch.cat([call.latents for call in calls])
    assert len(torch.unique(latents[:, 0])) == len(latents) == 3 * 4 * 10  # two of the ten are in a last batch
    assert 0.8 < float(latents.std()) < 1.2


def test_pairs_in_smaller_numbers_are_the_same_but_for_rounding(tmp_path: Path) -> None:
    """Bytes are of 0 to 255, before normalisation, to the nearest."""
    run(tmp_path / "run", {"images_as": "uint8", "vectors_as": "float16"}, rounds=2)
    _, _, (_, e) = SEEN["align"][0]
    pictures = named(TOY).load(torch.device("cpu")).decode(e[:5])
    for turn in SEEN["turn"][4:]:
        assert turn.images is not None
        assert turn.vectors is not None
        assert (turn.images.dtype, turn.vectors.dtype) == (torch.uint8, torch.float16)
        assert int((turn.images.double() - (pictures.double() * 255)).abs().max() > 0.5001) == 0
        assert torch.equal(turn.vectors, e[:5].half())
        want = copy.copy(turn)
        want.images, want.vectors = 2 * turn.images.double() / 255 - 1, turn.vectors.double()
        model = train_by_hand(want, 50.0, 0.5, 64.0, 100.0, None)
        for got, value in zip(turn.data.frozen_copy(turn.trained).parameters(), model.f + model.h, strict=True):
            close(got.double(), value.detach(), 1e-4)


@pytest.mark.parametrize("never_seen", ["leave_out", "random"])
def test_what_has_moved_is_decoded_and_nothing_else(monkeypatch: pytest.MonkeyPatch, never_seen: Any) -> None:
    """A class that has moved in one value, one that has not, one that is new, and one that nobody has."""
    how = FedKtl(generator=named(TOY), never_seen=never_seen, show_every=0, generation_batch=2)
    made = named(TOY).load(torch.device("cpu"))
    decoded: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(latents)
        return made.decode(latents)

    monkeypatch.setattr(FedKtl, "made", lambda self, task: SimpleNamespace(decode=decode, image_shape=(1, 8, 8)))
    before = torch.randn(4, H)
    server: Any = SimpleNamespace(
        task=SimpleNamespace(device=torch.device("cpu"), shape=(1, 8, 8)),
        known=torch.tensor([True, True, True, False]),
        sent=torch.tensor([True, True, never_seen == "random", never_seen == "random"]),
        e=before.clone(),
        decoded=torch.full((4, 1, 8, 8), -1.0),
        predicting=False,
        round=2,
    )
    server.e[0, 1] += 0.5
    server.e[2] += 1.0
    how.generate(server, before)
    assert torch.equal(torch.cat(decoded), server.e[[0, 2]])
    close(server.decoded[[0, 2]], made.decode(server.e[[0, 2]]), 1e-6)
    assert bool((server.decoded[[1, 3]] == -1).all())
    assert server.sent.tolist() == [True, True, True, never_seen == "random"]


def test_the_median_is_of_vectors_as_the_alignment_maps_them_and_of_latents(
    tmp_path: Path, calls: list[Aligned], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a round: BatchNorm goes by the vectors' own statistics, as in training."""
    asked: list[tuple[Tensor, Tensor, tuple[float, ...]]] = []

    def spy(x: Tensor, y: Tensor) -> tuple[float, ...]:
        asked.append((x, y, median(x, y)))
        return asked[-1][2]

    median = fedktl.median_bandwidths
    monkeypatch.setattr(fedktl, "median_bandwidths", spy)
    run(tmp_path / "run", {"bandwidths": "median"})
    assert len(asked) == len(calls) == 3
    for (x, y, widths), call in zip(asked, calls, strict=True):
        module = fedktl.transformer(C, H).train()
        call.f.clone().bind(module)
        with torch.no_grad():
            close(x, module(call.p), 1e-5)
        assert y.shape == x.shape
        assert 0.7 < float(y.std()) < 1.3
        assert call.how.bandwidths == widths


def test_the_rows_that_nobody_has_uploaded_are_random_ones(tmp_path: Path) -> None:
    run(tmp_path / "run", {"never_seen": "random"})
    turns = by_client_and_round(SEEN["turn"])
    start = SEEN["align"][0][1][1]
    assert start.shape == (C, H)
    assert 0.6 < float(start.std()) < 1.5
    for r in (2, 3):
        turn = turns[r, 0]
        assert turn.vectors is not None
        assert torch.equal(turn.vectors[5], start[5])


def test_latents_drawn_in_blocks_are_each_given_once() -> None:
    class Numbered:
        latent_dim = 2**13  # a block of 2,048

        def __init__(self) -> None:
            self.next = 0

        def sample_latents(self, n: int, rng: torch.Generator) -> Tensor:
            got = torch.arange(self.next, self.next + n, dtype=torch.float32)[:, None].expand(n, self.latent_dim)
            self.next += n
            return got

    draw = Drawn(Numbered(), torch.Generator(), torch.device("cpu"))  # type: ignore[arg-type]
    got = [draw(n)[:, 0] for n in (3, 1, 2040, 100, 1, 3000, 2)]
    assert [len(part) for part in got] == [3, 1, 2040, 100, 1, 3000, 2]
    assert torch.equal(torch.cat(got), torch.arange(5147.0))


# ---- scores
@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("dim", ["classes", "least", 9])
def test_the_nearest_column_is_the_prediction(tmp_path: Path, dim: Any, split: str) -> None:
    how = {"every": 1, "where": "clients", "split": split, "metrics": ["accuracy"]}
    result = run(tmp_path / "run", {"etf_dim": dim}, eval=how, local={"epochs": 1, "batch_size": 22})
    right = total = 0.0
    for data, y, v, scores in SEEN["score"][-4:]:
        x, labels = data.task.rows(data.client, split)
        module = data.frozen_copy(y)
        assert isinstance(module, nn.Module)
        with torch.no_grad():
            z = unit_rows(module(x))
        cosines = torch.stack([torch.stack([(a * v[:, c]).sum() for c in range(C)]) for a in z])
        hits = int((cosines.argmax(dim=1) == labels).sum())
        assert scores[:2].tolist() == [len(labels), pytest.approx(hits / len(labels), abs=1e-9)]
        right, total = right + hits, total + len(labels)
    assert result["final"]["accuracy"] == pytest.approx(right / total, abs=1e-9)


def test_v_is_the_equiangular_frame_and_g_a_fresh_linear_layer(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=1)
    turn = SEEN["turn"][0]
    close(turn.v.T @ turn.v, etf(C, C, 0).T @ etf(C, C, 0), 1e-5)
    assert turn.g.shape == (H * K + H,)
    bound = K**-0.5
    assert 0.9 * bound < float(turn.g[: H * K].abs().max()) <= bound
    assert all(torch.equal(other.g, turn.g) for other in SEEN["turn"])
