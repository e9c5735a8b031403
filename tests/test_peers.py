"""The comparison with other programs, as far as it goes without them: its arithmetic, and that the work is the same."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fldist
from fldist.bench import exchange
from fldist.bench import workload as bench_workload
from fldist.config import build, load
from fldist.data.datasets import Mnist
from fldist.params import Layout
from tests.needs import needs_data

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "launch" / "peers"


def loaded(name: str) -> ModuleType:
    """A file of the comparison as a module, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"tests_peers_{name}", PEERS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


table = loaded("table")
common = loaded("workload")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script in the folder: the files beside it can be imported by name."""
    monkeypatch.syspath_prepend(str(PEERS))
    for path in PEERS.glob("*.py"):
        assert path.stem not in sys.modules, "another module of that name is there"
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield
    for path in PEERS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def run_fldist(beside: None) -> ModuleType:
    return loaded("run_fldist")


@pytest.fixture
def compare(beside: None) -> ModuleType:
    return loaded("compare")


# ---- the files
@pytest.mark.parametrize("path", sorted(PEERS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_parse_and_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {line.partition("==")[0]: line.partition("==")[2] for line in lines}


@pytest.mark.parametrize("peer", table.PEERS)
def test_what_peers_share_with_fldist_is_pinned_alike(peer: str) -> None:
    ours, theirs = pins(ROOT / "constraints.txt"), pins(PEERS / f"{peer}.txt")
    assert all(theirs.values()), "something is not pinned"
    assert {"torch", "numpy"} <= set(theirs)
    assert {name: ours[name] for name in theirs if name in ours} == {n: v for n, v in theirs.items() if n in ours}


def test_every_peer_has_a_script_pins_and_a_place_in_the_page() -> None:
    page = (ROOT / "docs" / "peers.md").read_text()
    for peer in table.PEERS:
        assert (PEERS / f"run_{peer}.py").is_file()
        for name, version in pins(PEERS / f"{peer}.txt").items():
            assert f"{name.partition('[')[0]} {version}" in page, f"{name} {version} is not in docs/peers.md"
    for what in table.WORKS.values():
        assert what in page


# ---- the same work
def test_the_workload_is_that_of_the_configuration(run_fldist: ModuleType) -> None:
    settings = load(run_fldist.config("workload", 7))
    local = settings.local
    assert (settings.clients.num_clients, settings.clients.count()) == (common.CLIENTS, common.PER_ROUND)
    assert (local.epochs, local.batch_size, local.lr, local.optimizer) == (1, common.BATCH, common.LR, "sgd")
    assert (local.momentum, local.weight_decay, local.tail, local.order) == (0.0, 0.0, "keep", "shuffle")
    assert (settings.rounds, settings.eval.every) == (7, 0)
    assert (settings.task.data.name, settings.task.model.name) == ("mnist", "lenet5")
    assert (settings.task.partition.name, settings.task.normalize) == ("iid", "standard")
    assert common.TRAINERS == bench_workload.HOSTS
    assert load(run_fldist.config("workload", 7, epochs=5)).local.epochs == 5


def test_the_model_is_lenet5(run_fldist: ModuleType) -> None:
    settings = bench_workload.config(1, quick=True)  # the same model on data that are always there
    layout = build(load(settings)).task.architecture().layout
    model = common.lenet5()
    assert Layout.of(model) == layout
    assert layout.num_params == 61_706
    one, other = (torch.cat([p.flatten() for p in common.initial_model().parameters()]) for _ in range(2))
    assert torch.equal(one, other)


def test_clients_hold_600_samples_and_take_19_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = common.partition()
    assert [len(part) for part in parts] == [600] * 100
    assert len(set(np.concatenate(parts).tolist())) == 60_000
    x, y = torch.rand(600, 1, 28, 28), torch.arange(600) % 10
    monkeypatch.setattr(common, "samples", lambda client: (x, y))
    rows = torch.cat([batch[0].flatten(1).sum(1) for batch in common.batches(0)])
    assert torch.equal(rows.sort().values, x.flatten(1).sum(1).sort().values), "every sample once"
    model = common.initial_model()
    before = model[0].weight.clone()
    assert common.STEPS == 19
    assert common.train(model, 0, 2) == 2 * common.STEPS
    assert not torch.equal(model[0].weight, before)


def test_the_data_are_those_of_fldist() -> None:
    needs_data("MNIST/raw")
    data = Mnist().load()
    (mean,), (std,) = data.statistics()
    assert abs(common.MEAN - mean) < 1e-4
    assert abs(common.STD - std) < 1e-4
    x, y = common.mnist("t10k")
    assert torch.equal(y, torch.from_numpy(data.test_y))
    expected = (torch.from_numpy(np.array(data.test_x[:50])).float() / 255 - mean) / std
    assert torch.allclose(x[:50], expected, atol=1e-3)
    assert common.mnist("train")[0].shape == (60_000, 1, 28, 28)


def test_data_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"FLDIST_DATA: .*missing cannot be read"):
        common.read_idx(tmp_path / "missing")
    (tmp_path / "other").write_bytes(b"PK\3\4 and so on")
    with pytest.raises(ValueError, match="is no IDX file of bytes"):
        common.read_idx(tmp_path / "other")
    monkeypatch.delenv("FLDIST_DATA", raising=False)
    common.mnist.cache_clear()
    with pytest.raises(ValueError, match="FLDIST_DATA: it is not set"):
        common.mnist("train")


def test_what_is_exchanged_is_the_resnet18_of_fldist_bench(run_fldist: ModuleType) -> None:
    assert exchange.model_size(False) == common.NUMEL
    assert exchange.HOSTS == common.RECEIVERS
    for work in ("exchange", "average"):
        settings = load(run_fldist.config(work, 3))
        assert settings.algorithm.fields == {"average": work == "average"}
        assert (settings.clients.num_clients, settings.task.travel) == (common.RECEIVERS, "params")


def test_an_exchange_that_lost_something_is_refused() -> None:
    common.check_exchanged(np.full(common.NUMEL, 4, np.float32), 4)
    for wrong in (np.full(common.NUMEL - 1, 4, np.float32), np.full(common.NUMEL, 3, np.float32)):
        with pytest.raises(ValueError, match="came back; they must be 11,173,962 and 4"):
            common.check_exchanged(wrong, 4)


# ---- what fldist runs
def test_counted_is_fedavg_with_a_count(beside: None, tmp_path: Path) -> None:
    settings = bench_workload.config(2, quick=True)
    counted = settings | {"algorithm": f"{PEERS / 'fldist_algorithms.py'}:Counted"}
    fldist.run(counted, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    (steps,) = {-(-size // common.BATCH) for size in build(load(settings)).task.sizes}
    assert [(line["selected"], line["log"]["steps"]) for line in lines] == [(4, 4 * steps)] * 2
    started = fldist.run(counted | {"rounds": 1}, output=tmp_path / "one")
    assert started["status"] == "finished"
    moved = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name, tensor in common.initial_model().state_dict().items():
        assert 0 < float((moved[name] - tensor).abs().max()) < 0.1, "a round away from the common start"


@pytest.mark.parametrize("average", [False, True])
def test_an_exchange_adds_one_in_every_round(tmp_path: Path, average: bool) -> None:
    algorithm = {"name": f"{PEERS / 'fldist_algorithms.py'}:Exchange", "average": average}
    fldist.run(exchange.exchange_config(True, 3) | {"algorithm": algorithm}, output=tmp_path / "run")
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, torch.full_like(tensor, 3.0)) for tensor in model.values())


# ---- arithmetic
def run_of(number: int, work: str, who: str, *seconds: float, **facts: float) -> object:
    given = {"before_bytes": 1_000_000, "peak_bytes": 3_000_000, "wall_s": 9.0, "load": 0.5} | facts
    return table.Run(number, work, who, seconds, **given)


def some_runs() -> list[object]:
    return [
        run_of(1, "workload", "fldist", 9.0, 2.0, 1.0, 3.0, steps=190, accuracy=0.25),
        run_of(1, "workload", "flower", 50.0, 6.0, 4.0, steps=190, accuracy=0.5),
        run_of(2, "workload", "flower", 40.0, 8.0, 8.0, steps=190, accuracy=0.25),
        run_of(2, "workload", "fldist", 9.0, 4.0, 4.0, steps=190, accuracy=0.25, peak_bytes=5_000_000),
        run_of(3, "workload", "fldist", 9.0, 1.0, 1.0, steps=190, accuracy=0.25),
        run_of(3, "workload", "flower", 40.0, 9.0, 9.0, steps=190, accuracy=0.25),
        run_of(4, "workload", "flower", 40.0, 1.0, 1.0, steps=190, accuracy=0.25),  # fldist failed in this pass
    ]


def test_the_first_round_is_not_counted() -> None:
    assert run_of(1, "workload", "fldist", 100.0, 2.0, 1.0, 3.0, 10.0).round_s == 2.5
    with pytest.raises(ValueError, match="fldist, workload: 1 rounds; at least 2 are needed"):
        _ = run_of(1, "workload", "fldist", 100.0).round_s


def test_ratios_are_taken_within_a_pass() -> None:
    assert table.ratios(some_runs(), "workload", "flower") == [5.0 / 2.0, 8.0 / 4.0, 9.0 / 1.0]
    assert table.ratios(some_runs(), "exchange", "flower") == []
    assert table.spread([2.5, 2.0, 9.0]) == (2.0, 2.5, 9.0)
    with pytest.raises(ValueError, match="no values"):
        table.spread([])


def test_tables_by_hand() -> None:
    figures, ratios = "\n".join(table.lines(some_runs())).split("\n\n")
    what = table.WORKS["workload"]
    assert figures.splitlines()[2:] == [
        f"| {what} | fldist | 3 | 2.000 | 1.000 to 4.000 | 9.00 | 9.0 | 190 | 0.2500 | 3 | 1 |",
        f"| {what} | Flower | 4 | 6.500 | 1.000 to 9.000 | 40.00 | 9.0 | 190 | 0.2500 to 0.5000 | 3 | 1 |",
    ]
    assert ratios.splitlines()[2:] == [f"| {what} | Flower / fldist | 2.50 | 2.00 to 9.00 | 3 |"]


def test_figures_are_a_flat_object() -> None:
    assert table.flat(some_runs()) == {
        **{"workload_fldist_s": 2.0, "workload_fldist_min_s": 1.0, "workload_fldist_max_s": 4.0},
        **{"workload_fldist_peak_bytes": 3_000_000, "workload_fldist_before_bytes": 1_000_000},
        **{"workload_flower_s": 6.5, "workload_flower_min_s": 1.0, "workload_flower_max_s": 9.0},
        **{"workload_flower_peak_bytes": 3_000_000, "workload_flower_before_bytes": 1_000_000},
        **{"workload_flower_ratio": 2.5, "workload_flower_min_ratio": 2.0, "workload_flower_max_ratio": 9.0},
    }


# ---- running them
def test_a_pass_is_every_program_with_every_work(compare: ModuleType) -> None:
    made = compare.commands(10, 1, list(table.WORKS))
    assert [(work, who) for work, who, _ in made if work == "workload"] == [
        ("workload", who) for who in ("fldist", "flower", "fedlab", "fldist-alone")
    ]
    assert [who for work, who, _ in made if work != "workload"] == ["fldist", "flower", "fedlab"] * 2
    for work, who, command in made:
        script = f"run_{who.removesuffix('-alone')}.py"
        assert command[1:7] == [str(PEERS / script), work, "--rounds", "10", "--epochs", "1"]
        assert command[7:] == (["--processes", "1"] if who == "fldist-alone" else [])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")
def test_of_a_run_that_takes_too_long_nothing_is_left(compare: ModuleType, tmp_path: Path) -> None:
    program = (
        "import subprocess, sys; print('so far so good', flush=True);"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    )
    marks: list[str] = []
    plain = compare.end
    compare.end = lambda mark, patience_s: (marks.append(mark), plain(mark, patience_s))
    began = time.monotonic()
    with pytest.raises(compare.RunFailed, match=r"it did not end within 1 s; its last words:\nso far so good"):
        compare.run([sys.executable, "-c", program], 1.0, tmp_path)
    assert time.monotonic() - began < 20.0
    assert len(marks) == 1
    assert compare.marked(marks[0]) == []


def test_a_run_that_fails_is_told_of_and_one_that_does_not_is_read(compare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(compare.RunFailed, match=r"it ended with 3; its last words:\noh"):
        compare.run([sys.executable, "-c", "print('oh'); raise SystemExit(3)"], 30.0, tmp_path)
    with pytest.raises(compare.RunFailed, match="it ended with 0, but told nothing"):
        compare.run([sys.executable, "-c", "pass"], 30.0, tmp_path)
    program = "import os, sys; open(sys.argv[2], 'w').write('{\"threads\": ' + os.environ['OMP_NUM_THREADS'] + '}')"
    told = compare.run([sys.executable, "-c", program], 30.0, tmp_path)
    assert told["threads"] == 1
    assert 0.0 < told["wall_s"] < 30.0
