"""The README's sources and commands are what they say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import h5py

import fldist
from fldist.config import load
from fldist.runner import run_here
from fldist.wire.network import VARIABLE
from tests.conftest import Hosts, small

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(mark: str) -> str:
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```python\n(.*?)```", README, re.S)
    assert found is not None
    return found.group(1)


def test_fedavg_is_shown_in_full() -> None:
    source = (ROOT / "fldist" / "algorithms" / "fedavg.py").read_text()
    assert block("fedavg").strip() == source[source.index("from dataclasses") :].strip()


def test_the_own_algorithm_runs_and_does_what_it_says(tmp_path: Path, hosts: Hosts) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(block("mine.py"))
    name = f"{mine}:Stepped"
    alone = fldist.run(small(algorithm={"name": name, "server_lr": 0.7}), output=tmp_path / "a")
    many = run_here(
        load(small(algorithm={"name": name, "server_lr": 0.7})), nproc=3, output=tmp_path / "b", spawn=hosts
    )
    assert alone["state_hash"] == many["state_hash"]
    assert '"log": {"train_loss": ' in (tmp_path / "a" / "rounds.jsonl").read_text()
    whole_step = fldist.run(small(algorithm={"name": name, "server_lr": 1.0}), output=tmp_path / "c")
    fedavg = fldist.run(small(), output=tmp_path / "d")
    assert abs(whole_step["final"]["loss"] - fedavg["final"]["loss"]) < 1e-5


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:fldist|tests|launch|configs|docs)/[\w/.-]+\.\w+)`", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_every_column_of_a_runs_files_is_explained(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(block("mine.py"))
    run = tmp_path / "run"
    scoring = {"own": True, "clients": "unselected"}
    asked = small(algorithm=f"{mine}:Stepped", eval=scoring, clients__per_round=3, task__split={"test": 0.2})
    asked["devices"] = "simulated"
    result = fldist.run(asked, output=run)
    text = (ROOT / "docs" / "results.md").read_text()
    explained = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    names = set(result) | set(result["bytes"]) | set(result["seconds"])
    environment = json.loads((run / "environment.json").read_text())
    names |= set(environment) | set(environment["tf32"]) | set(environment["cudnn"]) | set(environment["hosts"]["0"])
    names |= set(result["stop"])
    for file in ("rounds.jsonl", "messages.jsonl", "timeline.jsonl"):
        for line in (run / file).read_text().splitlines():
            names |= set(json.loads(line))
    lines = (run / "rounds.jsonl").read_text().splitlines()
    names |= set(json.loads(lines[0])["spent"]) | set(json.loads(lines[0])["simulated"])
    scores = json.loads(lines[-1])["scores"]
    names |= set(scores) | set(scores["clients"]) | set(scores["gap"])
    assert set(scores) == {"global", "clients", "own", "own_train", "gap"}
    with h5py.File(run / "run.h5") as arrays:
        names |= set(arrays) | set(arrays["rounds"])
    assert names <= explained, names - explained


def test_commands_that_the_readme_names_exist() -> None:
    tree = ast.parse((ROOT / "fldist" / "cli.py").read_text())
    commands = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list}
    commands |= {
        ast.literal_eval(k.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "app.add_typer"
        for k in n.keywords
        if k.arg == "name"
    }
    texts = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    named = {n.replace("-", "_") for text in texts for n in re.findall(r"^(?:.*-m )?fldist ([\w-]+)", text, re.M)}
    assert named <= commands, named - commands
    assert {"run", "describe", "doctor", "data", "partition"} <= named


def test_every_test_that_the_page_on_recovery_names_is_there() -> None:
    text = (ROOT / "docs" / "recovery.md").read_text()
    named = re.findall(r"^(\d+)\. `(tests/\w+\.py)`: `(test_\w+)`$", text, re.M)
    assert [int(number) for number, _, _ in named] == list(range(1, len(named) + 1))
    for _, file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"
    table = text[text.index("## What survives what") : text.index("1. `tests/")]
    numbers = {int(n) for cell in re.findall(r"\[([\d, ]+)\]", table) for n in cell.split(", ")}
    assert numbers == set(range(1, len(named) + 1)), "a test is named that no cell refers to, or the other way round"


def test_the_page_on_clusters_names_what_there_is() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text()
    assert "(docs/clusters.md)" in README
    scripts = set(re.findall(r"launch/[\w-]+\.(?:sh|sbatch)", text))
    cluster = {
        f"launch/{path.name}"
        for path in (ROOT / "launch").iterdir()
        if path.is_file() and path.name != "cluster.sh" and ". launch/cluster.sh" in path.read_text()
    }
    assert scripts == cluster, "a script is not explained, or one is that is not there"
    heads = "".join((ROOT / name).read_text().partition("\nset -euo pipefail\n")[0] for name in scripts)
    for variable in re.findall(r"^(?:# .*\n)?((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )+)bash launch", text, re.M):
        for name in re.findall(r"([A-Z_]+)=", variable):
            assert re.search(rf"\b{name}\b", heads), name
    launch = (ROOT / "fldist" / "runtime" / "launch.py").read_text()
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "MASTER_ADDR"):
        assert f"`{name}`" in text
        assert f'"{name}"' in launch
    assert VARIABLE in text
    for link in re.findall(r"\]\(([\w.-]+)\)", text):
        assert (ROOT / "docs" / link).is_file()
