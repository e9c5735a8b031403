"""Torchvision beside any build of torch: declared operators where its extension cannot be loaded, and only there."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest

from fldist import vision

LOADS = """
import importlib.machinery, importlib.util, torch
folder = importlib.util.find_spec('torchvision').submodule_search_locations[0]
loaders = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
try:
    torch.ops.load_library(importlib.machinery.FileFinder(folder, loaders).find_spec('_C').origin)
    print('loads')
except OSError:
    print('fails')
"""


def python(program: str, *, succeeds: bool = True) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode == 0) is succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def extension_loads() -> bool:
    return python(LOADS).strip() == "loads"


def test_works_here_and_declares_only_what_is_missing() -> None:
    out = python(
        "import sys\n"
        "from fldist import vision\n"
        "assert not {'torch', 'torchvision'} & set(sys.modules), 'not lazy'\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool: made = list(pool.map(lambda _: vision.torchvision(), range(8)))\n"
        "import torch, torchvision, torchvision.transforms.v2 as v2\n"
        "assert all(m is torchvision for m in made) and vision.torchvision() is torchvision\n"
        "assert v2.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)\n"
        "assert torchvision.transforms.RandomCrop(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)\n"
        "assert torchvision.datasets.MNIST.resources\n"
        "print('declared', len(vision._kept), torch.ops.torchvision.nms.default._schema)\n"
    )
    assert f"declared {0 if extension_loads() else 1} " in out
    assert "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in out


def test_nothing_is_declared_when_the_extension_loads() -> None:
    # its loading is simulated, so the import fails for want of operators: nobody else has declared them
    out = python(
        "import torch\n"
        "torch.ops.load_library = lambda path: print('asked for', path)\n"
        "from fldist import vision\n"
        "try: vision.torchvision()\n"
        "except Exception as error: print(error)\n"
        "assert not vision._kept\n"
        "assert not hasattr(torch.ops.torchvision, 'nms')\n"
    )
    assert "_C.so" in out or "_C.pyd" in out


@pytest.mark.parametrize(
    "before",
    [
        "try: import torchvision\nexcept Exception: pass",
        "import torch; mine = torch.library.Library('torchvision', 'DEF'); "
        "[mine.define(f'{n}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor') for n in ('nms', 'qnms')]; "
        "import torchvision",
        "import torch; mine = torch.library.Library('torchvision', 'DEF'); "
        "mine.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')",
    ],
    ids=["after a failed import", "imported by someone else", "half declared by someone else"],
)
def test_whatever_happened_before(before: str) -> None:
    if "mine" in before and extension_loads():
        pytest.skip("the extension loads here: nobody needs to declare its operators")
    python(
        f"from fldist import vision\n{before}\n"
        "import gc; gc.collect()\n"
        "assert vision.torchvision().transforms.Resize and vision.torchvision().datasets.CIFAR10\n"
        "import torch\n"
        "assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms\n"
    )


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    with pytest.raises(ImportError, match="torchvision is not installed; install it with: pip install torchvision"):
        vision.torchvision()
    assert vision._lock.acquire(timeout=1)
    vision._lock.release()
