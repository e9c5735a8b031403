"""Torchvision, importable also beside a torch that its compiled operators were not built for."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMAS = {
    name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")
}  # those that torchvision gives Python rules for when it is imported

_lock = threading.Lock()
_kept: list[Any] = []  # torch.library.Library objects: what one of them defined is gone when it is deleted


def torchvision() -> ModuleType:
    """Import torchvision and return it, however often and from whatever thread.

    The registry's torchvision is compiled against a CUDA build of torch; beside a CPU build its extension cannot
    be loaded and its import ends with "operator torchvision::nms does not exist". Then, and only then, the missing
    operators are declared, without an implementation: transforms, data sets and models work, box operators do not.
    Raises ImportError when torchvision is not installed.
    """
    with _lock:
        if "torchvision" not in sys.modules and not _extension_loads():
            _declare()
        return importlib.import_module("torchvision")


def _extension_loads() -> bool:
    """Whether torchvision's compiled operators can be loaded (and then they are); imports nothing of torchvision.

    A failed `import torchvision` would leave `torchvision.extension` behind, so this is found out before.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("torchvision is not installed; install it with: pip install torchvision")
    loaders = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    for folder in spec.submodule_search_locations:
        extension = importlib.machinery.FileFinder(str(Path(folder)), loaders).find_spec("_C")
        if extension is not None and extension.origin is not None:
            try:
                torch.ops.load_library(extension.origin)  # type: ignore[no-untyped-call]
            except OSError:
                return False
            return True
    return False


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):  # someone else may have declared it
            library.define(schema)  # type: ignore[no-untyped-call]
    _kept.append(library)
