"""Pictures that runs have left in images/, as data URIs, so few and so small that a page can hold them."""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fldist.analysis.runs import Run

PICTURES = 4
"""Pictures of one name and run: the newest, the first, and some between."""
PICTURE_BYTES = 1_000_000
ALL_PICTURES_BYTES = 4_000_000


def pictures(runs: Sequence[Run]) -> tuple[list[list[dict[str, Any]]], int]:
    """Of each run, some pictures as data URIs, the newest of all runs before the older ones; how many are left out."""
    wanted: list[tuple[int, int, str, int, Path]] = []
    left_out = 0
    for index, run in enumerate(runs):
        by_name: dict[str, list[tuple[int, Path]]] = defaultdict(list)
        for path in (run.path / "images").glob("*.png") if run.path.is_dir() else ():
            match = re.fullmatch(r"round-(\d+)-(.+)\.png", path.name)
            if match:
                by_name[match[2]].append((int(match[1]), path))
        for name, of in sorted(by_name.items()):
            of.sort()
            at = np.unique(np.linspace(0, len(of) - 1, min(len(of), PICTURES)).round().astype(int))[::-1].tolist()
            left_out += len(of) - len(at)
            wanted += [(age, index, name, *of[i]) for age, i in enumerate(at)]
    found: list[list[dict[str, Any]]] = [[] for _ in runs]
    room = ALL_PICTURES_BYTES
    for _, index, name, number, path in sorted(wanted):
        size = path.stat().st_size
        content = path.read_bytes() if size <= min(room, PICTURE_BYTES) else b""
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            left_out += 1
            continue
        room -= size
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        found[index].append({"name": name, "round": number, "source": source})
    for of_run in found:
        of_run.sort(key=lambda of: (of["name"], of["round"]))
    return found, left_out
