"""Measurements: the arithmetic by hand, what is shown and written, and each of them end to end at tiny sizes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fldist
from fldist import cli
from fldist.bench import autoflip, exchange, fedf2dg, fedgcs, fedktl, fedzge, measure, workload
from fldist.bench import round as of_round
from fldist.bench.measure import Figure, Pair, Report, Target
from fldist.bench.party import PartyFailed, stage
from fldist.config import components, load
from fldist.generative import networks as generative
from fldist.inspection import find_mpirun
from fldist.inversion import competition
from fldist.models.train import warm_up
from fldist.selection.fedgcs import FedGCS

CONFIGS = Path(__file__).parents[1] / "configs"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="parties are found through /proc")


# ---- arithmetic
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], (2.0, 3.0, 4.0)),
        ([4.0, 1.0, 3.0, 2.0], (1.75, 2.5, 3.25)),
        ([10.0, 0.0], (2.5, 5.0, 7.5)),
        ([7.0], (7.0, 7.0, 7.0)),
    ],
)
def test_quartiles_by_hand(values: list[float], expected: tuple[float, float, float]) -> None:
    assert measure.quartiles(values) == expected


def test_quartiles_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        measure.quartiles([])


def test_pairs_take_turns_and_stay_together() -> None:
    order: list[str] = []

    def round_of(name: str) -> Callable[[], dict[str, float]]:
        def do() -> dict[str, float]:
            order.append(name)
            return {"s": float(len(order))}

        return do

    done = measure.interleave(round_of("ours"), round_of("bare"), 3, after=lambda: order.append("-"))
    assert order == ["ours", "bare", "-", "bare", "ours", "-", "ours", "bare", "-"]
    assert [(p.ours["s"], p.other["s"]) for p in done] == [(1, 2), (5, 4), (7, 8)]
    assert measure.ratios(done, "s", "s") == [1 / 2, 5 / 4, 7 / 8]


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    pairs = [Pair({"a": a}, {"b": b}) for a, b in [(1.0, 1.0), (10.0, 5.0), (6.0, 2.0)]]
    assert measure.quartiles(measure.ratios(pairs, "a", "b"))[1] == 2.0
    assert 6.0 / 2.0 == 3.0


def test_rounds_lie_between_the_ends_of_rounds() -> None:
    assert of_round.between([1.0, 2.0, 4.0, 7.0, 11.0], 2) == [2.0, 3.0, 4.0]


def test_targets() -> None:
    assert Target(1.25).met(1.25)
    assert not Target(1.25).met(1.26)
    assert Target(1.7, at_most=False).met(1.7)
    assert not Target(1.7, at_most=False).met(1.69)
    assert (str(Target(0.02)), str(Target(1.7, at_most=False))) == ("<= 0.02", ">= 1.7")


def report(**options: Any) -> Report:
    made = Report("a title", **options)
    made.add(Figure("x_ratio", "x: ours / bare", [1.0, 2.0, 3.0], "", Target(1.5)))
    made.add(Figure("y_s", "y", [0.5, 0.25, 0.75], "s", Target(0.5)))
    made.add(Figure("models", "models held", [4.0], "models"))
    made.absent.append("z: there is none here")
    made.limits.append("the link")
    return made


def test_a_report_is_a_flat_object_of_medians_and_quartiles() -> None:
    flat = report().as_json()
    machine = {"date", "processor", "cores", "load", "python", "torch", "fldist"}
    figures = {k: v for k, v in flat.items() if k not in machine}
    assert machine <= set(flat)
    assert figures == {
        **{"x_ratio": 2.0, "x_q1_ratio": 1.5, "x_q3_ratio": 2.5},
        **{"y_s": 0.5, "y_q1_s": 0.375, "y_q3_s": 0.625},
        "models": 4.0,
    }
    assert report(quick=True).as_json()["quick"] is True


def test_a_report_says_machine_targets_and_what_is_absent() -> None:
    lines = report().text().splitlines()
    assert lines[0] == "a title"
    assert f"torch {torch.__version__}" in lines[1]
    assert "load " in lines[1]
    table = {line.split("  ")[0]: line for line in lines}
    assert table["x: ours / bare"].split()[4:] == ["2", "1.5", "-", "2.5", "3", "<=", "1.5", "MISSED"]
    assert table["y"].endswith("met")
    assert "not measured: z: there is none here" in lines
    assert "limit: the link" in lines
    assert "MISSED" not in report(quick=True).text(), "tiny sizes are not judged"


# ---- bad input
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["exchange", "--pairs", "0"], "--pairs: must be at least 1, got 0"),
        (["workload", "--pairs", "-3"], "--pairs: must be at least 1, got -3"),
        (["round", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["autoflip", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["fedzge", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["fedktl", "--repeats", "-1"], "--repeats: must be at least 1, got -1"),
        (["fedf2dg", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["fedgcs", "--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["fedgcs", "--instances", "-2"], "--instances: must be at least 1, got -2"),
        (["exchange", "--backend", "nccl"], "--backend: 'nccl' is none of all, gloo, mpi"),
        (["round", "--json", "/nowhere/at/all.json"], "--json: there is no directory /nowhere/at"),
        (["round", "--json", "/tmp"], "--json: /tmp is a directory; name a file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    began = time.monotonic()
    code, _, err = command(monkeypatch, capsys, arguments)
    assert code == 2
    assert err.startswith(f"fldist: {said}")
    assert time.monotonic() - began < 10.0


def test_a_workload_without_its_data_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path))
    monkeypatch.setenv("FLDIST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no mnist found"):
        workload.measure(1)


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fldist bench ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["fldist", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


# ---- parties
def test_a_party_that_fails_is_told_of_with_its_last_words() -> None:
    with stage() as place, pytest.raises(PartyFailed, match=r"bench: odd: it ended.*\n[^$]*has no attribute 'nothing'"):
        place.party("odd", "fldist.bench.bare:nothing").ready()
    assert not place.directory.exists()


@pytest.mark.timeout(300)
@linux_only
def test_a_run_whose_rounds_are_not_all_asked_for_ends_with_its_hosts() -> None:
    with stage() as place:
        run = place.run("run", exchange.exchange_config(True, rounds=5), nproc=3)
        run.ready()
        assert run.go()["round_s"] > 0.0
        processes = run._processes()
        assert len(processes) == 3
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


def test_a_round_that_lacks_replies_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="round 3 lacks replies"):
        of_round.Watched().round({"round": 3, "missing": {"1": "deadline"}})


def test_the_exchange_is_what_it_says(tmp_path: Path) -> None:
    result = fldist.run(exchange.exchange_config(True, rounds=2), output=tmp_path / "run")
    size = 4 * exchange.model_size(True)
    # two rounds of two calls of three clients
    assert result["bytes"]["logical"] == {"up": 12 * size, "down": 12 * size}
    line = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[1])
    assert 0.0 < line["log"]["folded_s"] < line["seconds"]["total"]
    assert 0.0 < line["log"]["kept_s"] < line["seconds"]["total"]


def test_the_size_of_the_model_that_is_exchanged() -> None:
    assert exchange.model_size(False) == 11_173_962


def test_the_bare_loop_averages_by_samples() -> None:
    """One batch a client, so that one step of SGD can be calculated by hand."""
    torch.manual_seed(3)
    model = nn.Linear(4, 3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clients = [(torch.randn(n, 4), torch.arange(n) % 3) for n in (6, 18)]
    expected = {name: tensor.clone() for name, tensor in start.items()}
    for x, y in clients:
        loss = cross_entropy(nn.functional.linear(x, model.weight, model.bias), y)
        for name, gradient in zip(("weight", "bias"), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            expected[name] -= workload.LR * len(y) / 24 * gradient
    average = workload.bare_round(model, start, clients)
    for name, tensor in expected.items():
        assert torch.allclose(average[name], tensor, atol=1e-7)


# ---- end to end
def measured(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factory: pytest.TempPathFactory,
    *arguments: str,
) -> tuple[dict[str, Any], str]:
    """The JSON and the text of a quick measurement, which must leave nothing behind."""
    scratch = factory.mktemp("b")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    file = scratch / "figures.json"
    code, out, err = command(monkeypatch, capsys, [*arguments, "--quick", "--json", str(file)])
    assert code == 0, err
    assert [p.name for p in scratch.iterdir()] == ["figures.json"]
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["quick"] is True
    assert "quick: tiny sizes" in out
    assert "MISSED" not in out
    return figures, out


@pytest.mark.timeout(300)
@linux_only
def test_exchange_on_gloo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "exchange", "--backend", "gloo")
    kept = {"gloo_ratio", "gloo_gb_per_s", "gloo_bare_gb_per_s", "raw_tcp_gb_per_s", "gloo_s", "gloo_bare_s"}
    kept |= {"gloo_fold_ratio", "gloo_checksum_ratio", "server_models", "server_models_1000"}
    assert all(figures[name] > 0.0 for name in kept)
    assert not [name for name in figures if name.startswith("mpi")]
    assert "not measured: MPI: not asked for" in out
    size = 6 * 4 * exchange.model_size(True) / 1e9
    assert figures["gloo_gb_per_s"] == pytest.approx(size / figures["gloo_s"], rel=0.5)
    assert figures["gloo_q1_ratio"] <= figures["gloo_ratio"] <= figures["gloo_q3_ratio"]


@pytest.mark.timeout(300)
@linux_only
@pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or find_mpirun() is None, reason="needs mpi4py and mpirun"
)
def test_exchange_on_mpi(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "exchange", "--backend", "mpi", "--pairs", "3")
    assert all(figures[name] > 0.0 for name in ("mpi_ratio", "mpi_gb_per_s", "mpi_bare_gb_per_s", "mpi_fold_ratio"))
    assert not [name for name in figures if name.startswith(("gloo", "raw", "server"))]
    assert "not measured: gloo: not asked for" in out


def test_exchange_without_mpi_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "find_mpirun", lambda: None)
    done = exchange.measure(1, backend="mpi", quick=True)
    assert any(text.startswith("MPI: ") for text in done.absent)
    assert not [key for key in done.as_json() if key.startswith("mpi")]


@linux_only
def test_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "round")
    assert 0.0 < figures["round_q1_s"] <= figures["round_s"] <= figures["round_q3_s"] < 2.0
    assert "100 clients on 2 hosts" in out


@pytest.mark.timeout(300)
@linux_only
def test_workload(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    figures, _ = measured(monkeypatch, capsys, tmp_path_factory, "workload", "--pairs", "1")
    assert all(figures[name] > 0.0 for name in ("loop_ratio", "speedup_ratio", "round_s", "hosts_round_s"))


def test_turns_begin_with_another_variant_each_time() -> None:
    called: list[str] = []

    def variant(name: str) -> Callable[[], float]:
        def call() -> float:
            called.append(name)
            return float(len(called))

        return call

    found = autoflip.turns({name: variant(name) for name in "abc"}, 4)
    assert "".join(called) == "abcbcacababc"
    assert found == {"a": [1.0, 6.0, 8.0, 10.0], "b": [2.0, 4.0, 9.0, 11.0], "c": [3.0, 5.0, 7.0, 12.0]}
    assert autoflip.over([2.0, 3.0], [4.0, 2.0]) == [0.5, 1.5]


@pytest.mark.timeout(300)
def test_autoflip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    warm_up()  # what torch imports at the first step of a process makes a directory of its own
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "autoflip")
    for work in ("two_cnn", "mlp"):
        assert figures[f"{work}_dense_s"] > figures[f"{work}_mask_s"] > 0.0
        for setting in autoflip.SETTINGS:
            key = f"{work}_{setting.key}"
            assert figures[f"{key}_compact_ratio"] > 0.0
            assert figures[f"{key}_difference"] <= 1e-12
            assert figures[f"{key}_float32_difference"] <= 1e-3
            assert figures[f"{key}_theoretical_ratio"] <= figures[f"{key}_realised_ratio"] <= 1.0
        assert figures[f"{work}_random50_realised_ratio"] == 1.0
        assert figures[f"{work}_t50_ts80_realised_ratio"] < 0.3
    assert out.count("compaction takes nothing out and saves nothing") == 2


# ---- queries
def test_a_link_is_priced_by_bytes() -> None:
    assert fedzge.link_seconds([0.1, 0.2], 25_000_000) == pytest.approx([2.1, 2.2])


def test_gradients_that_differ_end_the_measurement() -> None:
    one = torch.tensor([3.0, 4.0]).numpy()
    assert fedzge.apart(one, one) == 0.0
    assert fedzge.apart(torch.tensor([3.0, 4.5]).numpy(), one) == pytest.approx(0.1)
    fedzge.check_same({"f1": [0.0, 1e-5], "f2": [0.0]})
    for bad in (1.1e-5, float("nan")):
        with pytest.raises(RuntimeError, match="f2 and f0 come to gradients"):
            fedzge.check_same({"f1": [0.0], "f2": [0.0, bad]})


def test_the_busiest_host_counts_and_its_notes_are_taken(tmp_path: Path) -> None:
    notes = {
        7: [{"moved_s": 9.0}],  # the server: it moved images, and answered nothing
        8: [{"moved_s": 1.0}, {"answered_s": 4.0}, {"moved_s": 0.5}, {"answered_s": 3.0}],
        9: [{"moved_s": 2.0}, {"answered_s": 6.0}],
    }
    for pid, lines in notes.items():
        (tmp_path / f"f2-{pid}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fedzge.spent(tmp_path / "f2") == {"moved_s": 1.5, "answered_s": 7.0}
    assert fedzge.spent(tmp_path / "f2") == {}


def test_the_definition_of_the_diversity_term() -> None:
    torch.manual_seed(5)
    x, z = torch.randn(4, 1, 2, 3), torch.randn(4, 5)
    total = 0.0
    for i in range(4):
        for k in range(4):
            total += float((x[i] - x[k]).square().mean()) * float((z[i] - z[k]).square().mean())
    assert float(fedzge.pairwise(x, z)) == pytest.approx(float(torch.exp(torch.tensor(-total / 16))), rel=1e-5)


def test_passes_of_any_size_have_the_same_logits() -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(x)

    blocks = [torch.rand(8, 3) for _ in range(2)]
    passes = fedzge.Passes(nn.Linear(3, 2), blocks)
    assert all(passes.per_second(size) > 0.0 for size in (2, 8, 16))
    passes = fedzge.Passes(Counts(), blocks)
    passes.per_second(8)
    for size in (4, 16):
        with pytest.raises(RuntimeError, match=f"passes of {size} images"):
            passes.per_second(size)


@pytest.mark.timeout(300)
@linux_only
def test_fedzge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "fedzge")
    n, q, d, c = fedzge.QUICK.n, fedzge.QUICK.q, 3 * 32 * 32, 10
    assert figures["f0_bytes"] == 4 * ((q + 1) * n * (d + c) + n * c)
    assert figures["f2_bytes"] == 4 * (n * d + (q + 1) * n * c + n * c) + 16
    assert figures["f1_difference"] == figures["f2_difference"] == 0.0
    assert figures["f2_ratio"] == pytest.approx(figures["f2_s"] / figures["f0_s"], rel=0.9)
    images = fedzge.HOSTS * 4 * n * d / fedzge.LINK  # once to each host; one in each message of f0
    assert figures["f2_link_s"] - figures["f2_s"] == pytest.approx(images, rel=0.02)
    assert figures["f0_link_s"] - figures["f0_s"] == pytest.approx((q + 1) * images, rel=0.02)
    parts = [figures[f"f2_{part}_s"] for part in ("forward", "moved", "gradient", "transfer")]
    assert all(part > 0.0 for part in parts)
    assert figures["diversity_difference"] <= 1e-5
    assert figures["diversity_gradient_difference"] <= 1e-5
    assert all(figures[f"cnn_chunk_{size}_per_s"] > 0.0 for size in (n // 4, n // 2, n, (q + 1) * n))
    assert all(figures[f"directions_{law}_s"] > 0.0 for law in ("rademacher", "sphere", "randn"))
    assert "100 Mbit/s is priced, not measured" in out


# ---- alignment
def test_prototypes_by_lists_are_those_by_sums() -> None:
    z = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 5.0], [4.0, 0.0]])
    p, classes = fedktl.listed(z, torch.tensor([7, 2, 7, 7]))
    assert classes.tolist() == [2, 7]
    want = torch.tensor([[0.0, 1.0], [2.0 / 5**0.5, 1.0 / 5**0.5]])
    assert torch.allclose(p, want, atol=1e-6)


def test_the_plain_mmd_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    want = 2 * (1 - torch.exp(torch.tensor(-25 / 20)) + 1 - torch.exp(torch.tensor(-25 / 100)))
    assert float(fedktl.plain_mmd(x, y, (10.0, 50.0))) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.timeout(300)
def test_fedktl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    warm_up()
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "fedktl")
    for case in fedktl.QUICK:
        key = case.key
        assert figures[f"{key}_ratio"] == pytest.approx(figures[f"{key}_plain_s"] / figures[f"{key}_s"], rel=0.5)
        assert figures[f"{key}_s"] == pytest.approx(case.steps * figures[f"{key}_step_s"])
        assert all(figures[f"{key}_{which}difference"] <= 1e-5 for which in ("", "exact_", "plain_exact_"))
        assert figures[f"{key}_gflop_per_s"] == pytest.approx(case.flops / figures[f"{key}_s"] / 1e9, rel=0.5)
        assert all(figures[f"{key}_{part}_share"] > 0.0 for part in fedktl.WHAT)
    assert figures["prototypes_difference"] <= 1e-5
    assert all(figures[f"{name}_ratio"] > 0.0 for name in ("prototypes", "train", "train_two_passes"))
    assert out.count("limit: ") == len(fedktl.QUICK) + 1


# ---- inversion
def test_the_plain_competition_is_ours() -> None:
    u, g = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1)) * 5
    assert 0.0 < float(competition(u, g)) < 1.0
    torch.testing.assert_close(fedf2dg.plain_competition(u, g, 3.0), competition(u, g, 3.0))


def test_forms_that_come_to_other_images_are_refused() -> None:
    assert fedf2dg.apart([torch.tensor([3.0]), torch.tensor([4.5])], [torch.tensor([3.0]), torch.tensor([4.0])]) == 0.1
    for found in (0.1, float("nan")):
        with pytest.raises(RuntimeError, match=r"a case: the two forms come to results that are .* apart, above 0\.01"):
            measure.check_same(found, 0.01, "a case")


@pytest.mark.timeout(300)
@linux_only
def test_fedf2dg(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    warm_up()
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "fedf2dg")
    for case in fedf2dg.QUICK:
        key = case.key
        assert figures[f"{key}_ratio"] == pytest.approx(
            figures[f"{key}_plain_step_ms"] / figures[f"{key}_step_ms"], rel=0.5
        )
        steps = case.images * 1e3 / figures[f"{key}_step_ms"]
        assert figures[f"{key}_image_steps_per_s"] == pytest.approx(steps, rel=0.1)
        assert figures[f"{key}_difference"] <= fedf2dg.SAME
        assert 0.0 < figures[f"{key}_network_share"] < 1.0
    rates = [figures[f"hosts_{name}_images_per_s"] for name in ("hosts", "alone", "plain")]
    assert min(rates) > 0.0
    assert figures["hosts_ratio"] == pytest.approx(rates[0] / rates[2], rel=0.5)
    for key in ("kd", "kd_small"):
        assert figures[f"{key}_ratio"] == pytest.approx(figures[f"{key}_plain_s"] / figures[f"{key}_s"], rel=0.5)
        assert figures[f"{key}_unscored_ratio"] > figures[f"{key}_ratio"] * 0.8
        assert figures[f"{key}_difference"] <= fedf2dg.KD_SAME
    assert out.count("limit: ") == len(fedf2dg.QUICK) + 3


# ---- selection
@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """CPU seconds that go on when this is called, and not else."""
    now = [0.0]

    def go_on(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    return go_on


def test_ours_is_the_small_configuration_and_the_default() -> None:
    small = components(load(CONFIGS / "fedgcs" / "small-mnist.yaml")).selector
    assert isinstance(small, FedGCS)
    for ours, other in ((fedgcs.SMALL.selector("client_sum"), small), (fedgcs.LARGE.selector("client_sum"), FedGCS())):
        for field in dataclasses.fields(FedGCS):
            assert getattr(ours, field.name) == getattr(other, field.name), field.name


def test_pauses_are_not_part_of_the_published_fit(clock: Callable[[float], None]) -> None:
    paused: list[int] = []
    called = 0

    def loss(*_: Any) -> Any:
        nonlocal called
        called += 1
        clock(2.0 if called > 2 else 1.0)

    def pause() -> None:
        paused.append(called)
        clock(100.0)

    interrupted = fedgcs.Interrupted(loss, 5, 2, pause)
    for _ in range(5):
        interrupted(*[None] * 4)  # type: ignore[arg-type]
    interrupted.close()
    assert paused == [0, 2]
    assert interrupted.seconds == [5 * 1.0, 5 * 2.0]
    assert interrupted.spent == 2 * 1.0 + 3 * 2.0


def test_parts_of_a_selection_do_not_count_twice(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    def slow(seconds: float, of: Callable[..., Any]) -> Callable[..., Any]:
        def do(*given: Any) -> Any:
            clock(seconds)
            return of(*given)

        return do

    for name, seconds in (("records", 1.0), ("scores", 10.0), ("_fitted", 100.0), ("_new", 1e3), ("_yardsticks", 1e4)):
        monkeypatch.setattr(FedGCS, name, slow(seconds, getattr(FedGCS, name)))
    ours = fedgcs.Turns(fedgcs.Way.of(fedgcs.QUICK_SMALL, "group", 1))
    ours.take()
    parts = {name: values[0] for name, values in ours.parts.items()}
    # scores of records, of the candidates, of the sorted set, of all sets
    assert parts == {"records": 1.0, "scoring": 40.0, "fit": 100.0, "search": 1e3, "yardsticks": 1e4}
    assert ours.seconds == [sum(parts.values())]


def test_an_instance_follows_from_its_seed() -> None:
    one, same, other = (fedgcs.Instance(fedgcs.QUICK_SMALL, seed) for seed in (1, 1, 2))
    assert one.outcome(3, [0, 4]) == same.outcome(3, [0, 4])
    assert one.outcome(3, [0, 4]).reports[4] == one.outcome(3, [4]).reports[4]
    assert len({i.outcome(r, [0]).reports[0].loss for i in (one, other) for r in (3, 4)}) == 4
    assert one.candidates(1).seconds != other.candidates(1).seconds


def test_the_published_choice_is_scored_like_ours() -> None:
    way = fedgcs.Way.of(fedgcs.QUICK_SMALL, "group", 2)
    every = list(itertools.combinations(range(8), 2))
    assert way.best == float(way.selector.scores(every, way.state, way.candidates).max())
    called: list[int] = []
    done = fedgcs.Published.select(way, generative.joint_loss, 2, lambda: called.append(1))
    assert len(called) == len(done.fits) == 2
    assert 0.0 < done.record <= 1.0
    assert done.records == len(way.records(fedgcs.PROPOSALS)) <= len(every)
    assert done == dataclasses.replace(
        fedgcs.Published.select(way, generative.joint_loss), fits=done.fits, fit_s=done.fit_s, rest_s=done.rest_s
    )


def test_operations_of_the_published_fit() -> None:
    """300 records of 26 rows of 100 tokens for 200 epochs, H = 64: about 9e13."""
    assert 200 * fedgcs.flops(300, 25, 100, fedgcs.LARGE, looked_up=False) == pytest.approx(9e13, rel=0.05)
    # 3 passes of 2 rows of 5 tokens: products of 16 + 6 H^2, attention to 5 positions, 21 outputs
    by_hand = 3 * 2 * 5 * (22 * 32 * 32 + 4 * 5 * 32 + 2 * 32 * 21)
    assert fedgcs.flops(1, 1, 5, fedgcs.SMALL, looked_up=True) == by_hand


@pytest.mark.timeout(300)
def test_fedgcs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    warm_up()
    figures, out = measured(monkeypatch, capsys, tmp_path_factory, "fedgcs", "--instances", "2")
    for case in (fedgcs.QUICK_SMALL, fedgcs.QUICK_LARGE):
        key = case.key
        assert figures[f"{key}_ratio"] == pytest.approx(figures[f"{key}_published_s"] / figures[f"{key}_s"], rel=0.5)
        shares = [figures[f"{key}_{part}_share"] for part in fedgcs.PARTS]
        assert 0.5 < sum(shares) <= 1.0 + 1e-9
        assert figures[f"{key}_difference"] <= fedgcs.SAME
        assert all(figures[f"{key}_{name}_ratio"] > 0.0 for name in ("batched", "short", "rows", "proposals", "search"))
        assert figures[f"{key}_warm_ratio"] == case.epochs / case.fitting.later_epochs
    for score in fedgcs.SCORES:
        assert figures[f"{score}_record_ratio"] <= figures[f"{score}_ours_ratio"] <= 1.0 + 1e-9
        assert figures[f"{score}_published_new"] >= 0.0
        assert f"ours / published, {score}, round {fedgcs.QUICK_SMALL.rounds} of 2 instances" in out
    assert "is extrapolated, not measured" in out
    assert out.count("limit: ") == 2
