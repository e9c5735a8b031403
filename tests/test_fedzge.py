"""FedZGE and distillation on public data, whole runs: bytes to the last one, formulations of the wire that agree, what
a round leaves alone, and what is refused. The equations by hand are in `test_fedzge_math.py`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fldist
from fldist.algorithm import Me, on_client
from fldist.algorithms import fedzge
from fldist.algorithms.fedzge import Answered, Coarse, FedZge, Revealed
from fldist.config import build, load, load_resumed
from fldist.data.client_data import ClientData
from fldist.distillation import comfortable, logits_of
from fldist.inspection import describe, predict
from fldist.kinds import Images, Logits, Seeds
from fldist.runner import run_here
from fldist.runtime.checkpoint import Checkpoints, ClientFiles
from tests.conftest import Hosts, small

N, D, C, Q, K = 12, 64, 10, 3, 3
SMALL = {"name": "cnn", "widths": [4], "kernels": 3, "paddings": 1, "hidden": []}
WIDE = {"name": "cnn", "widths": [6], "kernels": 3, "paddings": 1, "hidden": []}
NORM = {"name": "cnn_bn", "widths": [4]}
WIRES = ("f0", "f1", "f2", "f3", "f4", "f5", "f6")


def zge(**changes: Any) -> dict[str, Any]:
    """Three clients on 8x8 digits; `algorithm__field=value` changes the algorithm."""
    return small(
        algorithm={
            "name": "fedzge",
            "synthetic": N,
            "q": Q,
            "generator": {"nz": 8, "ngf": 2},
            "server_steps": 3,
            "client_steps": 2,
            **{k.removeprefix("algorithm__"): v for k, v in changes.items() if k.startswith("algorithm__")},
        },
        **{
            "clients": {"num_clients": K, "init": "own"},
            "task__partition": {"name": "dirichlet", "alpha": 1.0},
            "task__subset": {"train": 300, "test": 100},
            "task__model": SMALL,
            "eval": {"every": 0},
            **{k: v for k, v in changes.items() if not k.startswith("algorithm__")},
        },
    )


def run(directory: Path, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = fldist.run(zge(**changes), output=directory)
    assert result["status"] == "finished"
    return result


def messages(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]


def bytes_of(directory: Path) -> dict[tuple[int, int], dict[str, int]]:
    """By round and client: bytes by kind and direction, all phases."""
    sums: dict[tuple[int, int], dict[str, int]] = {}
    for row in messages(directory):
        if row["row"] == "kind":
            mine = sums.setdefault((row["round"], row["client"]), {})
            what = f"{row['kind']} {row['direction']}"
            mine[what] = mine.get(what, 0) + row["logical_bytes"]
    return sums


def logs(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line)["log"] for line in (directory / "rounds.jsonl").read_text().splitlines()]


# ---- bytes
def expected(wire: str, q: int = Q, c: int = C, n: int = N, d: int = D, pairs: bool = False) -> dict[str, int]:
    """The table in `fedzge.py`, for one client and round."""
    moves = 2 * q if pairs else q
    down, up = {"images": 4 * n * d}, {"logits": 4 * (moves + 1) * n * c, "scalars": 8}
    down["logits"] = 4 * n * c
    if wire in ("f0", "f1"):
        down["images"] = 4 * (moves + 1) * n * d
        up["scalars"] = 8 * (moves + 1) if wire == "f0" else 8
    else:
        down["seeds"] = 16
    if wire in ("f4", "f5"):
        down["images"] = n * d
    if wire == "f3":
        up["logits"] = 4 * n * c + 2 * q * n * c
    if wire == "f5":
        up["logits"] = 2 * n * c + q * n * c + 4 * q
        down["logits"] = 2 * n * c
    if wire == "f6":
        up |= {"logits": 4 * n * c, "gradients": 4 * n * q, "scalars": 16}
        down["gradients"] = 4 * n * c
    return {f"{k} down": v for k, v in down.items()} | {f"{k} up": v for k, v in up.items()}


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("wire", WIRES)
def test_bytes_are_those_of_the_table(tmp_path: Path, wire: str, difference: str) -> None:
    result = run(tmp_path / "run", algorithm__wire=wire, algorithm__difference=difference)
    want = expected(wire, pairs=difference == "central")
    assert bytes_of(tmp_path / "run") == {(r, k): want for r in (1, 2) for k in range(K)}
    each = sum(want.values())
    assert result["summary"] == {"bytes_per_client_and_round": each, "break_even_parameters": each / 8}


@pytest.mark.parametrize("wire", WIRES)
def test_bytes_are_predicted(wire: str) -> None:
    for how in ({"wire": wire}, {"wire": wire, "generator_steps": 2}, {"gradient": "none"}):
        found = predict(build(load(zge(**{f"algorithm__{k}": v for k, v in how.items()}))))
        assert not found.unknown
        once = {"images down": 4 * N * D, "logits up": 4 * N * C, "logits down": 4 * N * C, "scalars up": 8}
        want = once if "gradient" in how else expected(wire)
        steps = how.get("generator_steps", 1)
        told = 2 * N * C if wire == "f5" else 4 * N * C
        want = {k: v if k == "logits down" else steps * v for k, v in want.items()}
        assert want["logits down"] == (4 * N * C if "gradient" in how else told)
        by_kind = {f"{kind} {way}": n for kind, ways in found.by_kind.items() for way, n in ways.items() if n}
        assert by_kind == {kind: K * n for kind, n in want.items()}


def test_the_table_of_the_published_setting() -> None:
    """N = 500 images of 3x32x32: what each client has in a round, without its number of samples."""

    def totals(wire: str) -> list[int]:
        """With q and C of 5 and 10, 10 and 10, 5 and 100."""
        rows = [expected(wire, q, c, n=500, d=3072) for q, c in ((5, 10), (10, 10), (5, 100))]
        return [sum(v for kind, v in row.items() if not kind.startswith("scalars")) for row in rows]

    assert totals("f0") == totals("f1") == [37_004_000, 67_824_000, 38_264_000]
    assert totals("f2") == [6_284_016, 6_384_016, 7_544_016]
    assert totals("f3") == [6_234_016, 6_284_016, 7_044_016]
    assert totals("f4") == [1_676_016, 1_776_016, 2_936_016]
    assert totals("f5") == [1_581_036, 1_606_056, 1_986_036]


def test_bytes_of_the_controls(tmp_path: Path) -> None:
    run(tmp_path / "none", algorithm__gradient="none")
    want = {"images down": 4 * N * D, "logits up": 4 * N * C, "logits down": 4 * N * C, "scalars up": 8}
    assert bytes_of(tmp_path / "none") == {(r, k): want for r in (1, 2) for k in range(K)}
    settings = zge(algorithm__gradient="exact")
    fldist.run(settings, output=tmp_path / "exact")
    size = build(load(settings)).task.layout.nbytes
    want = {"images down": 4 * N * D, "weights up": size, "logits down": 4 * N * C, "scalars up": 8}
    assert bytes_of(tmp_path / "exact") == {(r, k): want for r in (1, 2) for k in range(K)}


def test_bytes_of_logits_in_half_precision_and_of_several_steps(tmp_path: Path) -> None:
    run(tmp_path / "half", algorithm__wire="f3", algorithm__logits="float16")
    assert bytes_of(tmp_path / "half")[1, 0] == expected("f3") | {
        "logits up": 2 * N * C + 2 * Q * N * C,
        "logits down": 2 * N * C,
    }
    run(tmp_path / "steps", algorithm__generator_steps=3)
    once = expected("f2")
    assert bytes_of(tmp_path / "steps")[1, 0] == {k: v if k == "logits down" else 3 * v for k, v in once.items()}


def test_who_is_not_selected_has_no_bytes_and_keeps_its_model(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"clients__fraction": 0.07, "clients__num_clients": 20, "clients__rounding": "ceil"}
    run(tmp_path / "run", rounds=1, **changes)
    who = {client for _, client in bytes_of(tmp_path / "run")}
    assert len(who) == 2  # ceil(1.4)
    found = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert found is not None
    assert {int(client) for client in found[2]["versions"]} == who


def test_bytes_do_not_depend_on_architectures(tmp_path: Path) -> None:
    run(tmp_path / "run", clients__models=[SMALL, NORM, WIDE], task__model=NORM)
    assert bytes_of(tmp_path / "run") == {(r, k): expected("f2") for r in (1, 2) for k in range(K)}


def test_public_distillation(tmp_path: Path) -> None:
    public = {"task__public": {"n": 40}, "algorithm": {"name": "public_distillation", "server_steps": 3}}
    settings = small(**{"clients__num_clients": 3, "clients__init": "own", "eval__every": 0, **public})
    fldist.run(settings, output=tmp_path / "run")
    want = {"logits up": 4 * 40 * C, "logits down": 4 * 40 * C, "scalars up": 8}
    assert bytes_of(tmp_path / "run") == {(r, k): want for r in (1, 2) for k in range(3)}


# ---- formulations agree
@dataclass(frozen=True)
class Watched(FedZge):
    """Keeps what came of the queries, and g."""

    def ask(self, *arguments: Any) -> Any:
        got = super().ask(*arguments)
        SEEN.append(got.delta)
        return got

    def image_gradient(self, *arguments: Any) -> Any:
        g = super().image_gradient(*arguments)
        SEEN.append(g)
        return g


SEEN: list[Any] = []


def estimates(directory: Path, wire: str, **changes: Any) -> tuple[Any, torch.Tensor]:
    """Delta and g of the first round."""
    SEEN.clear()
    run(directory, rounds=1, algorithm__name="tests.test_fedzge:Watched", algorithm__wire=wire, **changes)
    return SEEN[0], SEEN[1]


@pytest.mark.parametrize("law", ["rademacher", "sphere"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_one_by_one_stacked_and_by_key_are_one(tmp_path: Path, law: str, difference: str) -> None:
    """How close f0, f1 and f2 are: not one bit apart in what clients calculate. The mean is taken in floating
    point for f0, in fixed point for the others, so its Delta is within 1e-8."""
    how = {"algorithm__directions": law, "algorithm__difference": difference}
    (delta, g), *others = [estimates(tmp_path / wire, wire, **how) for wire in ("f0", "f1", "f2")]
    for other_delta, other_g in others:
        torch.testing.assert_close(other_delta, delta, rtol=0, atol=1e-8)
        torch.testing.assert_close(other_g, g, rtol=1e-5, atol=1e-9)
    stacked, by_key = (run(tmp_path / f"{w}-run", algorithm__wire=w, **how)["state_hash"] for w in ("f1", "f2"))
    assert stacked == by_key


@pytest.mark.parametrize(("wire", "far"), [("f3", 2e-3), ("f5", 0.05), ("f6", 1e-5)])
def test_rounded_differences_stay_near(tmp_path: Path, wire: str, far: float) -> None:
    like = "f4" if wire == "f5" else "f2"
    _, g = estimates(tmp_path / like, like)
    delta, other = estimates(tmp_path / wire, wire)
    assert (delta is None) == (wire == "f6")
    assert 0 < float((other - g).norm() / g.norm()) < far


def test_images_in_bytes_are_what_all_see(tmp_path: Path) -> None:
    _, g = estimates(tmp_path / "f2", "f2")
    _, other = estimates(tmp_path / "f4", "f4")
    assert 0 < float((other - g).norm() / g.norm()) < 0.5
    assert torch.equal(fedzge.to_bytes(fedzge.from_bytes(torch.arange(256).to(torch.uint8))), torch.arange(256).byte())


@pytest.mark.parametrize("wire", ["f0", "f2", "f5"])
@pytest.mark.parametrize("reduction", ["batch", "per_sample"])
def test_the_whole_loss_can_be_differenced_on_any_wire(tmp_path: Path, wire: str, reduction: str) -> None:
    _, g = estimates(tmp_path / "run", wire, algorithm__scope="all", algorithm__reduction=reduction)
    assert g.shape == (N, D)
    assert bool(g.isfinite().all())
    assert float(g.norm()) > 0


def test_many_queries_find_the_exact_gradient(tmp_path: Path) -> None:
    """Clients that are white boxes: with more directions, the estimate nears the gradient that they give."""
    SEEN.clear()
    run(tmp_path / "exact", rounds=1, algorithm__name="tests.test_fedzge:Watched", algorithm__gradient="exact")
    exact = SEEN[0]
    errors = []
    for q in (16, 256):
        _, g = estimates(tmp_path / f"q{q}", "f2", algorithm__q=q)
        errors.append(float((g - exact).square().sum() / exact.square().sum()))
    # the clients' part has a relative error of (d - 1) / q; the rest of the gradient is exact
    assert errors[1] < 0.35
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.5)


# ---- what a round leaves alone
def test_a_generator_without_a_learning_rate_stays(tmp_path: Path) -> None:
    settings = zge(algorithm__lr_generator=0.0)
    fldist.run(settings, output=tmp_path / "run")
    job = build(load(settings))
    assert isinstance(job.algorithm, FedZge)
    first = job.algorithm.generator_of(job.task).initial
    found = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert found is not None
    assert torch.equal(found[1]["generator"].trainable.floats, first.trainable.floats)


@pytest.mark.parametrize("steps", ["server_steps", "client_steps"])
def test_no_steps_change_nothing(tmp_path: Path, steps: str) -> None:
    settings = zge(**{f"algorithm__{steps}": 0}, rounds=1)
    fldist.run(settings, output=tmp_path / "run")
    loss = logs(tmp_path / "run")[0]["distillation_loss"]
    assert (loss is None) == (steps == "server_steps")


# ---- ranks, resuming, replies that are lost
@pytest.mark.parametrize("topology", ["star", "collective", "reduce"])
def test_ranks_change_nothing(tmp_path: Path, hosts: Hosts, topology: str) -> None:
    settings = zge(clients__fraction=0.7, clients__models=[SMALL, NORM], task__model=SMALL)
    alone = fldist.run(settings, output=tmp_path / "alone")
    many = run_here(load({**settings, "topology": topology}), nproc=3, output=tmp_path / "many", spawn=hosts)
    assert many["state_hash"] == alone["state_hash"]
    assert many["bytes"]["by_kind"] == alone["bytes"]["by_kind"]


@pytest.mark.parametrize("how", [{}, {"generator_optimizer": "persistent"}, {"optimizer": "sgd", "wire": "f5"}])
def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path: Path, how: dict[str, Any]) -> None:
    fields = {f"algorithm__{k}": v for k, v in how.items()}
    whole = run(tmp_path / "whole", rounds=4, **fields)
    run(tmp_path / "run", rounds=2, **fields)
    again = run_here(load_resumed(tmp_path / "run", ["rounds=4"]), output=tmp_path / "run", resume=True)
    assert again["state_hash"] == whole["state_hash"]


@dataclass(frozen=True)
class Spoilt(FedZge):
    """In round 2, client 0 sends NaN, and client 1 fails in its distillation once it has written its model."""

    @on_client
    def query(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> Answered:
        got = super().query(me, data, x, key, stream)
        if data.round == 2 and data.client == 0:
            got.logits[0, 0, 0] = math.nan
        return got

    @on_client
    def distil(self, me: Me, data: ClientData, x: Images, e: Logits) -> None:
        super().distil(me, data, x, e)
        if data.round == 2 and data.client == 1:
            raise RuntimeError("gone")


def test_a_reply_that_is_lost_or_refused_leaves_no_trace(tmp_path: Path) -> None:
    result = run(tmp_path / "run", rounds=3, algorithm__name="tests.test_fedzge:Spoilt")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [sorted(line["missing"]) for line in lines] == [[], ["0", "1"], []]
    assert lines[1]["missing"]["0"].startswith("refused: logits: nan")
    assert math.isfinite(lines[2]["log"]["distillation_loss"])
    assert result["rounds"] == 3 or result["status"] == "finished"


@dataclass(frozen=True)
class Hostile(FedZge):
    """In round 2, client 0 claims to have `claims` samples, and its answers are `times` what they are."""

    claims: float = 96
    times: float = 1.0

    @on_client
    def answer(self, me: Me, data: ClientData, x: Images) -> Answered:
        got = super().answer(me, data, x)
        if data.round != 2 or data.client != 0:
            return got
        return Answered(got.logits * self.times, self.claims)

    @on_client
    def query_coarse(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> Coarse:
        got = super().query_coarse(me, data, x, key, stream)
        return got._replace(scale=got.scale * self.times) if data.round == 2 and data.client == 0 else got

    @on_client
    def reveal(self, me: Me, data: ClientData) -> Revealed:
        got = super().reveal(me, data)
        return Revealed(got.y, self.claims) if data.round == 2 and data.client == 0 else got


HOSTILE = "tests.test_fedzge:Hostile"


@pytest.mark.parametrize("claims", [-480.0, math.nan, math.inf, 0.0])
@pytest.mark.parametrize("how", [{"wire": "f0"}, {"gradient": "exact"}])
def test_samples_that_a_client_claims_cannot_spoil_what_is_collected(
    tmp_path: Path, how: dict[str, Any], claims: float
) -> None:
    """One client alone: with none of the samples that it claims, there would be nothing to divide by."""
    fields = {f"algorithm__{k}": v for k, v in how.items()}
    for clients in (1, 3):
        changes = {**fields, "clients__num_clients": clients, "rounds": 3}
        fair = run(tmp_path / f"fair{clients}", **changes)
        claimed = {"algorithm__name": HOSTILE, "algorithm__claims": claims}
        result = run(tmp_path / f"run{clients}", **changes, **claimed)
        assert result["state_hash"] == fair["state_hash"]


@pytest.mark.parametrize(("wire", "field"), [("f0", "logits"), ("f5", "scale")])
def test_huge_answers_are_refused_where_they_are_collected(tmp_path: Path, wire: str, field: str) -> None:
    fields = {"algorithm__name": HOSTILE, "algorithm__wire": wire, "algorithm__times": 1e30}
    run(tmp_path / "run", rounds=3, **fields)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert lines[1]["missing"]["0"].startswith(f"refused: {field}: range: ")
    assert lines[2]["missing"] == {}
    assert 0 < lines[2]["log"]["diversity"] < 1


@dataclass(frozen=True)
class Diverged(FedZge):
    """In round 2, the weights of client 0 are NaN."""

    @on_client
    def reveal(self, me: Me, data: ClientData) -> Revealed:
        got = super().reveal(me, data)
        if data.round == 2 and data.client == 0:
            got = got._replace(y=got.y.clone())
            got.y.floats[0] = math.nan
        return got


@pytest.mark.parametrize("clients", [1, 3])
def test_a_revealed_model_that_has_diverged_is_left_out(tmp_path: Path, clients: int) -> None:
    how = {"algorithm__name": "tests.test_fedzge:Diverged", "algorithm__gradient": "exact"}
    run(tmp_path / "run", rounds=3, clients__num_clients=clients, **how)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert math.isfinite(lines[2]["log"]["distillation_loss"])
    assert 0 < lines[2]["log"]["diversity"] < 1


def test_answering_in_training_mode_moves_statistics_as_often_on_every_wire(tmp_path: Path) -> None:
    """q + 1 times in a round: f6 keeps its answer on the images for the call that projects."""
    how = {"query_batch_norm": "batch", "reduction": "batch"}
    fields: dict[str, Any] = {f"algorithm__{k}": v for k, v in how.items()} | {"rounds": 1, "task__model": NORM}
    counts = set()
    for wire in WIRES:
        run(tmp_path / wire, algorithm__wire=wire, **fields)
        found = Checkpoints(tmp_path / wire / "checkpoints").newest()
        assert found is not None
        y = ClientFiles(tmp_path / wire / "clients").read(0, found[2]["versions"]["0"])["y"]
        counts.add(tuple(y.ints.tolist()))
    assert len(counts) == 1


def test_describe_tells_every_field_and_its_default() -> None:
    text = describe("fedzge")
    assert "required" not in text
    lines = [line for line in text.splitlines() if line.startswith(("  generator", "  lr_generator", "  gradient: "))]
    assert len(lines) == 5
    assert all("; " in line for line in lines)


def test_one_image_of_four_pixels_a_side_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.synthetic: .* raise it"):
        fldist.run(zge(algorithm__synthetic=1, task__resize=4), output=tmp_path / "run")


def test_answers_in_passes_are_those_of_one() -> None:
    made = build(load(zge(task__model={"name": "cnn", "widths": [32], "kernels": 3, "paddings": 1, "hidden": []}))).task
    architecture = made.architecture()
    # strides of 2: a layer gives 32 x 4 x 4 floats a sample
    assert comfortable(architecture, made.shape) == (32 * 2**20 - 1) // (4 * 32 * 4 * 4)
    x = torch.rand(50, *made.shape, generator=torch.Generator().manual_seed(1))
    with architecture.module() as module:
        made.init_params(whole=True).bind(module)
        whole = logits_of(module.eval(), x)
        for chunk in (1, 7, 49, 50, 1000):
            torch.testing.assert_close(logits_of(module, x, chunk), whole, rtol=1e-5, atol=1e-6)


# ---- what is refused, and what is only said
@dataclass(frozen=True)
class Nine:
    """A model with an output too few."""

    short_name: ClassVar[str] = "nine"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes - 1))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"algorithm__q": 0}, r"algorithm\.q: .*greater than or equal to 1"),
        ({"algorithm__eps": 0}, r"algorithm\.eps: .*greater than 0"),
        ({"algorithm__generator": {"nz": 0}}, r"algorithm\.generator\.nz"),
        ({"algorithm__logits": "float16"}, r"float16 would destroy the estimate.*wire: f3"),
        ({"algorithm__logits": "bfloat16", "algorithm__wire": "f0"}, r"bfloat16 would destroy the estimate"),
        ({"algorithm__wire": "f6", "algorithm__scope": "all"}, r"f6 .* needs their logits"),
        ({"algorithm__query_batch_norm": "batch", "task__model": NORM}, r"query_batch_norm.*reduction: batch"),
        ({"algorithm__published_scores": True, "task__model": NORM}, r"published_scores.*test data"),
        ({"algorithm__synthetic": 1, "task__model": NORM}, r"algorithm\.synthetic"),
        ({"algorithm__gradient": "none", "algorithm__generator_steps": 2}, r"generator_steps.*set it to 1"),
        ({"task__resize": 10}, r"square images whose side 4 divides.*task\.resize"),
        (
            {"clients__models": [SMALL, {"name": "tests.test_fedzge:Nine"}]},
            r"must give 10 outputs a sample, one a class; it gives \(9,\)",
        ),
    ],
)
def test_bad_settings(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        build(load(zge(**changes)))


def test_moves_that_float32_rounds_away_are_warned_of_with_the_number(tmp_path: Path) -> None:
    (note,) = [n for n in build(load(zge(algorithm__eps=1e-5))).task.notes if "algorithm.eps" in n]
    assert "moves a pixel by 1.3e-06" in note  # 1e-5 / sqrt(64)
    assert "below 1.9e-06" in note
    assert not any("eps" in n for n in build(load(zge())).task.notes)
    assert not any("eps" in n for n in build(load(zge(algorithm__eps=1e-5, algorithm__gradient="none"))).task.notes)


def test_public_distillation_needs_public_samples() -> None:
    with pytest.raises(ValueError, match=r"task\.public\.n"):
        build(load(small(algorithm="public_distillation")))


@dataclass(frozen=True)
class Unprojected(FedZge):
    """In round 2, client 1 is lost while projections are asked for."""

    @on_client
    def project(
        self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds, v: fedzge.LogitGradients
    ) -> fedzge.Projected:
        if data.round == 2 and data.client == 1:
            raise RuntimeError("gone")
        return super().project(me, data, x, key, stream, v)


def test_who_is_lost_while_projecting_is_not_asked_to_distil(tmp_path: Path) -> None:
    run(tmp_path / "run", algorithm__name="tests.test_fedzge:Unprojected", algorithm__wire="f6")
    told = {(r["round"], r["client"]) for r in messages(tmp_path / "run") if r.get("phase") == "distil"}
    assert told == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 2)}


def test_scores_as_published_change_no_run_without_batch_norm(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    scored = run(tmp_path / "scored", algorithm__published_scores=True)
    assert scored["state_hash"] == plain["state_hash"]
    assert scored["bytes"]["by_phase"]["distil"] == plain["bytes"]["by_phase"]["distil"]
    for log in logs(tmp_path / "scored"):
        assert 0 <= log["published_accuracy"] <= 1
        assert log["published_accuracy"] == round(log["published_accuracy"], 2)
        assert "published_client_accuracy" in log


@dataclass(frozen=True)
class Silent(FedZge):
    """In round 2 nobody answers."""

    @on_client
    def query(self, me: Me, data: ClientData, x: Images, key: Seeds, stream: Seeds) -> Answered:
        if data.round == 2:
            raise RuntimeError("gone")
        return super().query(me, data, x, key, stream)


def test_a_round_without_an_answer_changes_nothing_at_the_server(tmp_path: Path) -> None:
    how = {"algorithm__name": "tests.test_fedzge:Silent"}
    run(tmp_path / "one", rounds=1, **how)
    run(tmp_path / "two", rounds=2, **how)
    states = [Checkpoints(tmp_path / name / "checkpoints").newest() for name in ("one", "two")]
    one, two = (found[1] for found in states if found is not None)
    for name in ("x", "generator"):
        assert torch.equal(one[name].floats, two[name].floats)


def test_pictures_of_the_images(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=3, algorithm__show_every=2)
    found = sorted(p.name for p in (tmp_path / "run" / "images").iterdir())
    assert found == ["round-000001-synthetic.png", "round-000002-synthetic.png"]
