"""Imported before FedLab: it imports torchvision, which beside a CPU build of torch needs help (`fldist/vision.py`)."""

import importlib.util
from pathlib import Path

VISION = Path(__file__).parents[2] / "fldist" / "vision.py"

_spec = importlib.util.spec_from_file_location("vision", VISION)
assert _spec is not None and _spec.loader is not None
_vision = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_vision)
_vision.torchvision()
