"""FedF2DG's whole run, all four stages, by loops written out: quotas, noise, inversion, losses, the pool of shifted
images with their teachers' logits, distillation, hard samples. Local training alone is fldist's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fldist.algorithms.fedf2dg import Kd, decoded, known_losses
from fldist.config import build, load
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.inversion import Inversion
from fldist.params import Params
from fldist.seeding import Streams, generator
from tests.test_fedf2dg import BASES, SEEN, TRACED, K, f2dg, logged, model, quota_rows, run, same_model, seen, states
from tests.test_fedf2dg_equations import PlainCnn, nominal_by_hand, plain_distil, plain_invert, quotas_by_hand


@dataclass
class ByHand:
    """What a run comes to."""

    task: Task
    how: Inversion
    kd: Kd
    per_client: int
    mix: float = 1 / 3
    sharpness: float = 1.0
    images_as: str = "float32"
    agree: dict[int, tuple[float, float]] = field(default_factory=dict)  # by round: teachers and student with labels
    tables: dict[int, Any] = field(default_factory=dict)  # by round: the counts and the losses of each client

    def module(self, values: Params) -> nn.Module:
        return self.task.frozen_copy(values).requires_grad_(True)

    def trained(self, number: int, x: Params) -> tuple[list[Params], Params]:
        """The clients' models after their training, and their mean by samples."""
        ws = [ClientData(self.task, k, Streams(self.task.seed, number, k)).train(x).params for k in range(K)]
        total = sum(self.task.sizes)
        floats = sum(n / total * w.floats.double() for n, w in zip(self.task.sizes, ws, strict=True))
        counters = sum(n / total * w.ints.double() for n, w in zip(self.task.sizes, ws, strict=True))
        assert isinstance(floats, Tensor)
        assert isinstance(counters, Tensor)
        return ws, Params(x.layout, floats.float(), (counters + 1e-9).trunc().long())

    def batch(self, number: int, ws: list[Params], g: Params, alpha_c: float, before: Any, use: int = 0) -> Any:
        """The images and losses of each client in a batch."""
        rows = self.task.label_counts().tolist()
        amounts = nominal_by_hand(rows, self.per_client, before, self.sharpness, self.mix)
        counts = quotas_by_hand(rows, amounts)
        how = Inversion(**{**vars(self.how), "alpha_c": alpha_c})
        student, images, losses = PlainCnn(self.task.frozen_copy(g)), [], []
        for k in range(K):
            y = torch.tensor([c for c, n in enumerate(counts[k]) for _ in range(n)])
            rng = generator(self.task.seed, "inversion", number, k, use)
            x0 = torch.randn(len(y), *self.task.shape, generator=rng)
            shifts = torch.randint(-how.jitter, how.jitter + 1, (how.steps, 2), generator=rng)
            u = PlainCnn(self.task.frozen_copy(ws[k]))
            images.append(travelled(plain_invert(u, student, y, x0, shifts, how)[-1], self.images_as))
            losses.append(float(cross_entropy(student(images[-1]), y)))
        self.tables.setdefault(number, []).append((counts, losses))
        return images, losses

    def distilled(self, number: int, seed: int, ws: list[Params], g: Params, batches: list[Any]) -> Params:
        """The student after the last epoch; number: 0 for the common samples."""
        pool, logits = [], []
        made = [batch for n in (range(seed) if number == 0 else [seed]) for batch in self.tables.get(n, [])]
        for k in range(K):
            rng = generator(self.task.seed, "distillation-shift", number, k)
            down, right = torch.randint(-self.how.jitter, self.how.jitter + 1, (2,), generator=rng).tolist()
            x = torch.cat([torch.roll(images[k], (down, right), (2, 3)) for images in batches])
            pool.append(x)
            logits.append(PlainCnn(self.task.frozen_copy(ws[k]))(x))
        x, s = torch.cat(pool).float(), torch.cat(logits).float()
        assert len(x) % self.kd.batch_size != 1
        y = torch.tensor([c for k in range(K) for counts, _ in made for c, n in enumerate(counts[k]) for _ in range(n)])
        before = PlainCnn(self.task.frozen_copy(g))(x.double())
        self.agree[seed] = (float((s.argmax(1) == y).double().mean()), float((before.argmax(1) == y).double().mean()))
        student = self.module(g)
        plain_distil(student, x, s, self.kd, generator(self.task.seed, "distillation", seed))
        return Params.of(student, g.layout)


def travelled(x: Tensor, how: str) -> Tensor:
    """Images as they are used after they have travelled so."""
    if how == "float16":
        return x.half().double()
    if how == "uint8":
        step = (x.max() - x.min()) / 255
        return x.min() + ((x - x.min()) / step).round() * step
    return x


def parts(**changes: Any) -> tuple[dict[str, Any], ByHand]:
    """Fields of a run of one federated round, two batches, a distillation, hard rounds; and it by hand."""
    fields: dict[str, Any] = {"rounds": 6, "batches": 2, "hard_rounds": 2, **changes}
    job = build(load(f2dg(**fields)))
    algorithm: Any = job.algorithm
    kd = {name: getattr(algorithm, f"kd_{name}") for name in ("epochs", "lr", "momentum", "weight_decay", "batch_size")}
    kd |= {"temperature": algorithm.kd_temperature, "weight": algorithm.kd_lambda, "bn": algorithm.kd_bn}
    how = Kd(**kd, reset=algorithm.kd_reset)
    counts = {"per_client": algorithm.per_client, "mix": algorithm.mix, "sharpness": algorithm.sharpness}
    return fields, ByHand(job.task, algorithm.inversion, how, **counts, images_as=algorithm.images_as)


@pytest.mark.parametrize(
    "changes",
    [
        {"kd_lr": 1.0},
        {"generation": "client", "kd_bn": "eval", "kd_lr": 0.3, "student": "aggregate"},
        {
            "inversion": {"steps": 3, "jitter": 1, "alpha_tv": 0.05, "alpha_l2": 0.1, "alpha_bn": 3.0},
            "kd_reset": False,
            "kd_temperature": 2.0,
            "kd_momentum": 0.5,
            "kd_lr": 0.2,
            "kd_weight_decay": 0.01,
            "kd_batch_size": 9,
            "mix": 0.8,
            "sharpness": 3.0,
            "alpha_c_hard": 4.0,
            "hard_batches": 2,
            "hard_training": "first",
        },
        {"generation": "client", "images_as": "float16", "send_logits": True, "kd_lr": 1.0},
        {"images_as": "uint8", "kd_lr": 1.0, "rounds": 5, "hard_rounds": 1},
        # in its first round, and in the first one after it has begun anew, each of these trains as FedAvg does
        {"base": "scaffold", "generation": "client", "rounds": 5, "hard_rounds": 1, "kd_lr": 1.0},
        {"base": {"name": "moon", "mu": 20.0}, "rounds": 5, "hard_rounds": 1, "kd_lr": 1.0},
        {"base": "fednova", "rounds": 5, "hard_rounds": 1, "kd_lr": 1.0, "kd_epochs": 3},
    ],
)
def test_a_whole_run_by_hand(tmp_path: Path, changes: dict[str, Any]) -> None:
    fields, hand = parts(**changes)
    run(tmp_path / "run", **fields)
    alpha_c, hard_batches = fields.get("alpha_c_hard", 10.0), fields.get("hard_batches", 1)
    # federated
    start = hand.task.init_params()
    ws, g = hand.trained(1, start)
    trained = g
    # generation
    batches, losses = [], None
    for number in (2, 3):
        images, losses = hand.batch(number, ws, g, 0.0, losses)
        batches.append(images)
    # distillation
    g = hand.distilled(0, 4, ws, g, batches)
    # hard
    losses = None
    for number in range(5, fields["rounds"] + 1):
        if number == 5 or fields.get("hard_training") != "first":
            ws, aggregate = hand.trained(number, g)
            if fields.get("student") == "aggregate":
                g = aggregate
        batches = []
        for use in range(hard_batches):
            images, losses = hand.batch(number, ws, g, alpha_c, losses, use)
            batches.append(images)
        g = hand.distilled(number, number, ws, g, batches)
    for number, made in hand.tables.items():
        for row in quota_rows(tmp_path / "run", number):
            counts, values = made[int(row["batch"]) - (1 if number > 3 else number - 1)]
            k = int(row["client"])
            assert [int(row[f"class_{c}"]) for c in range(len(counts[k]))] == counts[k]
            assert float(row["loss"]) == pytest.approx(values[k], abs=1e-3)
    log = logged(tmp_path / "run")
    for number, (teachers, before) in hand.agree.items():
        assert log[number - 1]["teacher_accuracy"] == pytest.approx(teachers, abs=1e-9)
        assert log[number - 1]["before_accuracy"] == pytest.approx(before, abs=1e-9)
    assert log[-1]["student_accuracy"] == hand.task.evaluate(g).accuracy
    for number, made in hand.tables.items():
        values = [loss for _, of_clients in made for loss in of_clients]
        assert log[number - 1]["generation_loss"] == pytest.approx(sum(values) / len(values), abs=1e-3)
        assert log[number - 1]["images"] == sum(n for counts, _ in made for row in counts for n in row)
    got, want = model(tmp_path / "run"), dict(g.named())
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-4, msg=name)
    assert max(float((want[n] - view).abs().max()) for n, view in trained.named() if "weight" in n) > 0.05


def test_every_batch_of_a_hard_round_is_in_the_table(tmp_path: Path) -> None:
    run(tmp_path / "run", hard_batches=2)
    table = quota_rows(tmp_path / "run", 6)
    assert [(row["batch"], row["client"]) for row in table] == [(b, str(k)) for b in ("1", "2") for k in range(K)]


UNEQUAL: dict[str, Any] = {"task__partition": {"name": "tests.test_family:Sizes", "sizes": [40, 30, 16, 10]}}


@pytest.mark.parametrize("generation", ["server", "client"])
@pytest.mark.parametrize("base", BASES, ids=lambda b: b if isinstance(b, str) else b["name"])
def test_what_is_inverted_are_the_clients_models_after_their_training(
    tmp_path: Path, base: Any, generation: str
) -> None:
    """In the first round all bases but FedProx train as FedAvg does, whatever they send of it."""
    SEEN.clear()
    run(tmp_path / "run", name=TRACED, base=base, generation=generation, batches=1, hard_rounds=0, rounds=3, **UNEQUAL)
    task = build(load(f2dg(**UNEQUAL))).task
    models = seen("generate")[0][5]
    assert sorted(models) == list(range(K))
    for k, got in models.items():
        proximal = 0.1 if isinstance(base, dict) and base["name"] == "fedprox" else 0.0
        data = ClientData(task, k, Streams(task.seed, 1, k))
        want = data.train(task.init_params(), proximal=proximal).params
        np.testing.assert_allclose(got.floats.numpy(), want.floats.numpy(), rtol=0, atol=5e-6)
        assert torch.equal(got.ints, want.ints)


def test_a_client_inverts_its_model_and_not_what_it_has_sent_of_it(tmp_path: Path) -> None:
    """FedNova's clients, whose steps are unequal, send another model than their own."""
    settings: dict[str, Any] = {"base": "fednova", "rounds": 4, "batches": 1, "hard_rounds": 1, "kd_lr": 1.0, **UNEQUAL}
    for generation in ("server", "client"):
        run(tmp_path / generation, generation=generation, **settings)
    assert same_model(tmp_path / "server", tmp_path / "client")


VAL: dict[str, Any] = {"select": "val", "task__split": {"val": 0.25}, **UNEQUAL}


def test_a_round_is_scored_by_the_validation_samples_of_all_clients(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=2, batches=1, hard_rounds=0, **VAL)
    task = build(load(f2dg(**VAL))).task
    ws = [ClientData(task, k, Streams(task.seed, 1, k)).train(task.init_params()).params for k in range(K)]
    floats = sum(n / sum(task.sizes) * w.floats.double() for n, w in zip(task.sizes, ws, strict=True))
    assert isinstance(floats, Tensor)
    x = Params(ws[0].layout, floats.float(), ws[0].ints)
    right = [task.count(k, "val") * task.evaluate_client(x, k, "val").accuracy for k in range(K)]
    assert logged(tmp_path / "run")[0]["selection"] == pytest.approx(
        sum(right) / sum(task.count(k, "val") for k in range(K))
    )
    assert len({task.count(k, "val") for k in range(K)}) > 1


def test_clients_invert_their_models_of_the_round_that_was_chosen(tmp_path: Path) -> None:
    """At a learning rate that is too large the best round is not the last one."""
    settings: dict[str, Any] = {"rounds": 7, "batches": 1, "hard_rounds": 0, "kd_lr": 1.0, "local__lr": 0.8, **VAL}
    for generation in ("server", "client"):
        run(tmp_path / generation, generation=generation, stop={"rounds": 6}, **settings)
        server, _ = states(tmp_path / generation)
        scores = [line["selection"] for line in logged(tmp_path / generation)[:5]]
        assert server["snapshot"] == 1 + scores.index(max(scores)) < 5
    assert logged(tmp_path / "server") == logged(tmp_path / "client")


def test_who_has_no_loss_is_given_the_mean_of_the_others() -> None:
    losses = known_losses({0: 1.0, 1: float("nan"), 2: 4.0}, [0, 1, 2, 3])
    assert losses is not None
    assert losses.tolist() == [1.0, 2.5, 4.0, 2.5]
    assert known_losses({1: float("inf")}, [1, 3]) is None


@pytest.mark.parametrize("images_as", ["float16", "uint8"])
def test_losses_and_logits_are_of_the_images_as_they_have_travelled(images_as: str) -> None:
    job = build(load(f2dg(images_as=images_as, generation="client", send_logits=True)))
    algorithm: Any = job.algorithm
    task, g = job.task, job.task.init_params()
    w = ClientData(task, 0, Streams(task.seed, 1, 0)).train(g).params
    counts = torch.tensor([6, 3] + [0] * (task.num_classes - 2))
    reply = algorithm.made(task, w, g, counts, algorithm.inversion, torch.Generator().manual_seed(1), (1, -1))
    x, y = decoded(reply.x, reply.span), torch.tensor([0] * 6 + [1] * 3)
    loss = float(cross_entropy(PlainCnn(task.frozen_copy(g))(x.double()), y))
    assert reply.loss == pytest.approx(loss, abs=7e-7)
    s = PlainCnn(task.frozen_copy(w))(torch.roll(x.double(), (1, -1), (2, 3)))
    torch.testing.assert_close(reply.logits.double(), s, rtol=0, atol=3e-6)
    exact: Any = build(load(f2dg(generation="client", send_logits=True))).algorithm
    other = exact.made(task, w, g, counts, exact.inversion, torch.Generator().manual_seed(1), (1, -1))
    assert abs(other.loss - loss) > 2e-6
    assert float((other.logits - s).abs().max()) > 2e-5
