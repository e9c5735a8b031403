"""What a user reads who did something wrong: one line with the key, the value and the remedy, and no traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

import fldist
import fldist.cli
from fldist.config import ConfigError, known_keys, load
from tests.conftest import small

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


class Cli:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["fldist", *arguments])
        code: Any = 0
        try:
            fldist.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err + out
        return int(code), out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("local.epoch=3", "local.epoch: unknown key; did you mean local.epochs?"),
        ("lr=0.1", "lr: unknown key; did you mean local.lr?"),
        ("local.alpha=0.1", "local.alpha: unknown key; did you mean task.partition.alpha?"),
        ("batchsize=3", "batchsize: unknown key; did you mean local.batch_size?"),
        ("mu=0.1", "mu: unknown key; did you mean algorithm.mu?"),
        ("clients.num_client=3", "clients.num_client: unknown key; did you mean clients.num_clients?"),
        ("rounds=five", "rounds: input should be a valid integer, unable to parse string as an integer; got 'five'"),
        ("rounds=0", "rounds: input should be greater than or equal to 1; got 0"),
        ("local.lr=-1", "local.lr: input should be greater than 0; got -1"),
        ("local.optimizer=lion", "local.optimizer: input should be 'sgd' or 'adam'; got 'lion'"),
        ("algorithm.name=fedavgg", "algorithm.name: unknown name 'fedavgg'; did you mean 'fedavg'?"),
        ("algorithm.mu=1", "algorithm.mu: fedavg has no such field; it has no fields"),
        ("algorithm={name: fedprox, nu: 1}", "algorithm.nu: fedprox has no such field; its fields: mu"),
        ("algorithm={name: fedprox, mu: -1}", "algorithm.mu: input should be greater than or equal to 0; got -1"),
        ("task.model=mlpp", "task.model.name: unknown name 'mlpp'; did you mean 'mlp'?"),
        ("task.data=digit", "task.data.name: unknown name 'digit'; did you mean 'digits'?"),
        ("task.partition.alpha=0", "task.partition.alpha: input should be greater than 0; got 0"),
        ("selection=randomly", "selection.name: unknown name 'randomly'; did you mean 'random'?"),
        ("clients.per_round=3", "clients: fraction (1.0) and per_round (3) exclude each other; remove one"),
        ("algorithm.name=no.such:Thing", "algorithm.name: 'no.such:Thing' cannot be loaded: No module named 'no'"),
        ("algorithm.name=./nofile.py:Thing", "there is no file"),
        ("backend=nccll", "backend: input should be"),
        ("faults.min_replies=0", "faults.min_replies: it must be a number of replies, at least 1, or all; got 0"),
        ("faults.min_replies=most", "it must be a number of replies, at least 1, or all; got 'most'"),
        ("faults.min_replies=21", "faults.min_replies: 21 replies cannot come of 20 clients a round; lower it"),
        ("faults.on_quorum_loss=again", "input should be 'skip', 'retry' or 'stop'; got 'again'"),
        ("faults.orphans=leave", "faults.orphans: input should be 'adopt' or 'wait'; got 'leave'"),
        ("faults.restart=always", "faults.restart: input should be 'on-failure' or 'never'; got 'always'"),
        ("min_reply=2", "min_reply: unknown key; did you mean faults.min_replies?"),
        ("network.control_port=70000", "network.control_port: input should be less than or equal to 65535; got 70000"),
        ("local.zzz=1", "local.zzz: unknown key; local has: epochs, batch_size, optimizer, lr,"),
        ("rounds", "override 'rounds' must have the form key.sub=value"),
        ("rounds.x=1", "override 'rounds.x=1': 'rounds' is 15 and has no keys"),
        (
            "task.normalize=standart",
            "task.normalize: it must be unit, symmetric, standard, or {mean: [...], std: [...]}",
        ),
        ("task.normalize={mean: 0.1, std: 1}", "a number a channel; got {'mean': 0.1, 'std': 1}"),
        (
            "task.normalize={mean: [0, 0], std: [1, 1]}",
            "task.normalize: 2 means and 2 deviations do not fit 1 channels",
        ),
        ("task.resize=0", "task.resize: input should be greater than or equal to 1; got 0"),
        ("task.augment={crop: 20}", "crop"),
        ("task.augment.flip=2", "task.augment.flip: input should be less than or equal to 1; got 2"),
        ("task.split={val: 0.5, test: 0.5}", "task.split: val (0.5) and test (0.5) leave nothing to train on; lower"),
        ("task.subset.train=5000", "task.subset.train: 5000 rows of 1437 cannot be taken; lower it"),
        ("task.public.n=1437", "task.public.n: 1437 public rows leave none to train on; lower it"),
        ("task.public.n=5000", "task.public.n: 5000 of 1437 training rows cannot be taken; lower it"),
        ("task.public.data=digits", "task.public.data: digits would not be used, since task.public.n is 0; set n"),
        ("task.merged=true", "with task.merged there is no global test set; give clients one: task.split.test"),
        ("task.partition={name: iid, alpha: 1}", "task.partition.alpha: iid has no such field; it has no fields"),
        ("task.partition={name: dirichlet_min, alpha: 0.01, min_size: 71, attempts: 5}", "Raise alpha, lower min_size"),
        ("task.partition={name: feature_noise, where: cell}; clients.num_clients=100", "task.partition: feature_noise"),
        ("task.model=lenet5", "lenet5"),
        ("task.model={name: cnn_bn, norm: bach}", "task.model.norm: input should be 'batch', 'group' or 'none'; got"),
        ("task.model=cnn_bn; local.batch_size=1", "local.batch_size: BatchNorm cannot train on batches of 1; raise it"),
        ("clients.models=[mlp,cnn_nb]", "clients.models.1.name: unknown name 'cnn_nb'; did you mean 'cnn_bn'"),
        (
            "clients.models=htfe5",
            "clients.models: unknown family; known: htfe2, htfe3, htfe4, htfe8, htfe9, htm10, or a",
        ),
        ("clients.models=[mlp,cnn_bn]", "clients.models: FedAvg needs the model of task.model at all clients"),
        ("eval.metrics=[acuracy]", "eval.metrics.0: input should be 'accuracy', 'loss', 'top5', 'f1', 'precision',"),
        (
            "eval={where: clients, model: personal}",
            "eval.model: personal, but clients of FedAvg have no models of their",
        ),
        ("eval={where: clients, split: val}", "eval.split: clients have no val part; set task.split.val"),
        ("eval={where: clients, split: test}; task.split.test=0.001", "eval.split: no client has a test part; raise"),
        ("algorithm=local; eval.where=server", "eval.where: server, but Local has no global model; use clients"),
        ("algorithm=local; eval.model=sent", "eval.model: sent, but Local sends its clients no model; use personal"),
        ("eval={batch_norm: batch, batch_size: 1}", "eval: batch_norm: batch needs batches of at least two samples"),
        (
            "algorithm=fednova; local.optimizer=adam",
            "algorithm: fednova is for SGD with a constant lr in a round; local",
        ),
        ("algorithm=scaffold; local.optimizer=adam", "algorithm: scaffold is for SGD; local.optimizer is adam"),
        ("local.schedule=cosin", "local.schedule: input should be 'constant' or 'cosine'; got 'cosin'"),
    ],
)
def test_configuration_errors(cli: Cli, tmp_path: Path, override: str, says: str) -> None:
    code, _, err = cli("run", QUICKSTART, *override.split("; "), "--output", str(tmp_path / "run"))
    assert code == 2
    assert says in err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir()), "a failed start left files"


def test_several_errors_are_told_at_once(cli: Cli) -> None:
    _, _, err = cli("run", QUICKSTART, "rounds=0", "local.epoch=1")
    assert "rounds:" in err
    assert "local.epoch:" in err


def test_too_many_clients_per_round() -> None:
    with pytest.raises(ConfigError, match=r"clients.per_round: 9 of 6 clients cannot be selected; lower it"):
        load(small(clients__per_round=9))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["backend=gloo"], "backend: gloo needs at least two ranks, a server and a host, and this process is alone"),
        (["backend=mpi"], "use mpirun -n 2 or more"),
        (["backend=mpi", "--nproc", "3"], "backend: mpi does not go with --nproc 3; start it with mpirun"),
        (["backend=in-process", "--nproc", "3"], "leave --nproc out"),
        (["--nproc", "0"], "--nproc must be at least 1, got 0"),
    ],
)
def test_backends_that_cannot_be(cli: Cli, arguments: list[str], says: str) -> None:
    code, _, err = cli("run", QUICKSTART, *arguments)
    assert code == 2
    assert says in err


def test_a_world_of_one_under_torchrun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = cli("run", QUICKSTART)
    assert code == 2
    assert "torchrun started one rank; a run needs at least two" in err


def test_an_output_directory_that_holds_something_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    code, _, err = cli("run", QUICKSTART, "--output", str(tmp_path))
    assert code == 2
    assert f"output: {tmp_path} exists and is not empty; nothing is overwritten: name another with --output" in err
    assert (tmp_path / "result.json").read_text() == "{}"


def test_a_configuration_that_is_not_there_or_not_yaml(cli: Cli, tmp_path: Path) -> None:
    assert "there is no configuration nowhere.yaml" in cli("run", "nowhere.yaml")[2]
    bad = tmp_path / "bad.yaml"
    bad.write_text("rounds: [1")
    assert "is not valid YAML" in cli("run", str(bad))[2]
    bad.write_text("- 1")
    assert "must hold keys and values" in cli("run", str(bad))[2]


def test_yaml_cannot_run_code(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/owned']")
    code, _, err = cli("run", str(bad))
    assert code == 2
    assert "is not valid YAML" in err
    assert not (tmp_path / "owned").exists()


def test_missing_data_says_where_it_was_looked_for(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLDIST_DATA", raising=False)
    arguments = ("run", QUICKSTART, "task.data={name: hdf5, path: mine.h5}", "--output", str(tmp_path / "run"))
    code, _, err = cli(*arguments)
    assert code == 2
    assert f"task.data.path: no data found: looked for {Path.cwd() / 'mine.h5'}; set FLDIST_DATA" in err
    monkeypatch.setenv("FLDIST_DATA", str(tmp_path))
    _, _, err = cli(*arguments)
    assert f"and {tmp_path / 'mine.h5'}; put it there" in err


def test_own_data_in_hdf5(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.h5"
    path.write_bytes(b"this is no HDF5")
    run = ("run", QUICKSTART, f"task.data={{name: hdf5, path: {path}}}", "rounds=1", "clients.num_clients=2")
    assert "cannot be read as HDF5" in cli(*run, "--output", str(tmp_path / "a"))[2]
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["train_x"] = rng.integers(0, 255, (40, 1, 4, 4), dtype=np.uint8)
        file["train_y"] = rng.integers(0, 3, 40)
        file["test_x"] = rng.integers(0, 255, (10, 1, 4, 4), dtype=np.uint8)
    assert "has no 'test_y'" in cli(*run, "--output", str(tmp_path / "b"))[2]
    with h5py.File(path, "a") as file:
        file["test_y"] = rng.integers(0, 3, 10)
    code, out, _ = cli(*run, "--output", str(tmp_path / "c"))
    assert code == 0
    assert "accuracy" in out


def test_a_model_that_does_not_fit_the_data(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "flat.h5"
    with h5py.File(path, "w") as file:
        for part in ("train", "test"):
            file[f"{part}_x"] = np.zeros((6, 5), dtype=np.float32)
            file[f"{part}_y"] = np.arange(6) % 2
    arguments = ["task.model=cnn_bn", f"task.data={{name: hdf5, path: {path}}}", "--output", str(tmp_path / "r")]
    code, _, err = cli("run", QUICKSTART, *arguments)
    assert code == 2
    assert "task.model: cnn_bn needs images [channels, height, width]; the data's shape is (5,)" in err


def test_every_configuration_in_the_repository_loads_and_resolves_to_itself(tmp_path: Path) -> None:
    configs = Path(__file__).parents[1] / "configs"
    for path in sorted(set(configs.rglob("*.yaml")) - set((configs / "bench").iterdir())):
        settings = load(path)
        again = tmp_path / "again.yaml"
        again.write_text(yaml.safe_dump(settings.resolved()))
        assert load(again) == settings


def test_known_keys_are_keys() -> None:
    keys = known_keys()
    assert {"local.lr", "algorithm.mu", "clients.num_clients", "deadlines.round_deadline_s"} <= set(keys)
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("fraction", "rounding", "clients"),
    [
        (0.3, "floor", 3),
        (0.25, "floor", 2),
        (0.25, "ceil", 3),
        (0.25, "nearest", 3),
        (0.01, "floor", 1),
        (1, "floor", 10),
    ],
)
def test_rounding_of_the_cohort(fraction: float, rounding: str, clients: int) -> None:
    settings = load(small(clients={"num_clients": 10, "fraction": fraction, "rounding": rounding}))
    assert settings.clients.count() == clients


def test_a_whole_number_of_clients_is_not_rounded_up() -> None:
    """0.07 * 100 is 7.000000000000001 in binary fractions."""
    settings = load(small(clients={"num_clients": 100, "fraction": 0.07, "rounding": "ceil"}))
    assert settings.clients.count() == 7


def test_dry_run_predicts_what_the_run_then_measures(cli: Cli, tmp_path: Path) -> None:
    for algorithm in ("fedavg", "fedprox", "scaffold"):
        arguments = ("run", QUICKSTART, f"algorithm={algorithm}", "task.model=cnn_bn", "rounds=1", "local.epochs=1")
        code, text, _ = cli(*arguments, "--dry-run")
        assert code == 0
        output = tmp_path / algorithm
        fldist.run(QUICKSTART, list(arguments[2:]), output=output)
        measured = yaml.safe_load((output / "result.json").read_text())["bytes"]["logical"]
        line = next(x for x in text.splitlines() if x.strip().startswith("training"))
        assert line.replace(",", "").split()[1:] == ["up", str(measured["up"]), "down", str(measured["down"])]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("class Net: pass", "task.model: {path}:Net must be callable as (shape, classes): "),
        ("def Net(shape, classes): return 3", "task.model: {path}:Net made a int, not an nn.Module"),
        ("", "has no 'Net'"),
    ],
)
def test_a_model_of_ones_own_that_cannot_be_built(cli: Cli, tmp_path: Path, source: str, says: str) -> None:
    path = tmp_path / "net.py"
    path.write_text(source)
    code, _, err = cli("run", QUICKSTART, f"task.model={path}:Net", "--output", str(tmp_path / "run"))
    assert code == 2
    assert says.format(path=path) in err
    assert not (tmp_path / "run").exists()


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"fldist {fldist.__version__}\n", "")


def test_describe_and_doctor(cli: Cli) -> None:
    code, out, _ = cli("describe", "fedprox")
    assert code == 0
    assert "mu: " in out
    assert "default 0.01" in out
    assert "down  x: weights" in out
    code, out, _ = cli("describe", "power_of_choice")
    assert code == 0
    assert "Fields (section `selection`):" in out
    assert "On the client: " in out
    code, out, _ = cli("describe", "topk")
    assert "  utility:" in out
    assert "    alpha: float, default 2.0" in out
    code, _, err = cli("describe", "nothing")
    assert code == 2
    assert "unknown name 'nothing'" in err
    code, out, _ = cli("doctor")
    assert code == 0
    assert "gloo: available" in out
    assert "mpirun -n 3" in out, "the test extra brings MPI"
    assert "digits" in out


def test_a_field_of_another_algorithm_names_the_way_to_replace_the_section() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.mu: local has no such field; .*algorithm=local replaces"):
        load({"algorithm": {"name": "local", "mu": 1.0}})
