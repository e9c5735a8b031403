"""The direction of imports, and that nothing heavy or dangerous happens where it must not."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fldist"

# what each part may import of the package; "" is the package's own __init__ (the version)
ALLOWED: dict[str, set[str]] = {
    "blocks": set(),
    "params": {"blocks"},
    "seeding": set(),
    "resolve": set(),
    "vision": set(),
    "lines": set(),
    "units": set(),
    "clock": set(),
    "analysis": {"units"},
    "kinds": {"params"},
    "sparse": {"blocks", "params"},
    "fold": {"blocks", "params"},
    "directions": {"blocks"},
    "wire": {"blocks", "kinds", "lines", "params", "sparse"},
    "models": {"blocks", "params", "resolve", "seeding", "vision"},
    "pruning": {"blocks", "params"},
    "data": {"clock", "models", "params", "pruning", "seeding", "vision"},
    "algorithm": {"clock", "data", "fold", "kinds", "models", "params", "seeding"},
    "selection": {"algorithm", "data", "fold", "kinds", "models", "params", "resolve", "seeding"},
    "algorithms": {"algorithm", "data", "models", "fold", "kinds", "masked", "params", "pruning", "sparse", "seeding"},
    "distillation": {"algorithm", "data", "kinds", "models", "params"},
    "generative": {"blocks", "seeding"},
    "inversion": set(),
    "prototypes": {"data", "fold", "kinds"},
    "on_top": {"algorithm", "data", "fold", "kinds", "params", "resolve"},
    "masked": {"algorithm", "data", "fold", "kinds", "params", "pruning", "sparse"},
    "runtime": {"wire", "algorithm", "data", "models", "selection", "fold", "kinds", "lines", "params", "seeding", ""},
}
ALLOWED["selection"] |= {"blocks", "generative", "q_learning", "scoring"}
ALLOWED["q_learning"] = {"algorithm"}
ALLOWED["scoring"] = {"algorithm", "selection"}
ALLOWED["devices"] = {"resolve", "seeding", "units"}
ALLOWED["algorithms"] |= {"blocks", "directions", "distillation", "inversion", "on_top", "prototypes"}
ALLOWED["runtime"] |= {"blocks", "clock", "devices", "on_top", "sparse", "units"}
ALLOWED["config"] = {"runtime", "resolve", *ALLOWED["runtime"]}
ALLOWED["trackers"] = {"runtime"}
ALLOWED["runner"] = {"config", "console", "trackers", *ALLOWED["config"]}
ALLOWED["console"] = {"runtime", "units"}
ALLOWED["inspection"] = {"config", "runner", *ALLOWED["config"]}
ALLOWED["pretrain"] = {"data", "models", "runtime", "seeding"}
ALLOWED["bench"] = {
    "algorithms",
    "generative",
    "directions",
    "distillation",
    "inversion",
    "runner",
    "inspection",
    "console",
    "pruning",
    *ALLOWED["config"],
    "config",
}
ALLOWED["cli"] = {"runner", "inspection", "console", "bench", "analysis", "config", "pretrain", *ALLOWED["config"]}
ALLOWED["__main__"] = {"cli"}
ALLOWED[""] = {"config", "runner", "runtime"}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module == "fldist":
                names |= {f"fldist.{alias.name}" for alias in node.names}
                names.discard("fldist")
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    for name in imported(path):
        if name == "fldist" or name.startswith("fldist."):
            target = name.split(".")[1] if "." in name else ""
            assert target == part or target in ALLOWED[part], f"{path.name} of {part!r} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "algorithms").glob("*.py")), ids=lambda p: p.stem)
def test_an_algorithm_is_one_file(path: Path) -> None:
    for name in imported(path):
        assert not name.startswith(("fldist.algorithms", "fldist.wire", "fldist.runtime", "torch.distributed"))


def test_torchvision_is_imported_in_one_place() -> None:
    for path in FILES:
        if path.name != "vision.py":
            assert not any(n.split(".")[0] == "torchvision" for n in imported(path)), f"{path}: use fldist.vision"


def test_every_file_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} does not open with what it is for"


def test_nothing_is_executed_that_came_from_outside() -> None:
    for path in FILES:
        executing = {"pickle", "marshal", "dill", "cloudpickle", "shelve"}
        if path == PACKAGE / "models" / "generators" / "stylegan.py":  # where the user has set trust_pickle
            executing.remove("pickle")
        assert not imported(path) & executing, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "yaml.load"}, f"{path}: {called}"
                if called == "torch.load":  # which builds tensors and plain containers alone, if it is told so
                    assert "weights_only=True" in map(ast.unparse, node.keywords), f"{path}: {called}"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['fldist', '--help']\n"
        "import fldist.cli\n"
        "try: fldist.cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'sklearn', 'pydantic'} & set(sys.modules)"
    )
    best = min(_seconds(program) for _ in range(3))
    assert best < 0.5 * 3, f"{best:.2f} s"  # half a second on an idle machine; three times that on a busy one


def _seconds(program: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    return time.monotonic() - began
