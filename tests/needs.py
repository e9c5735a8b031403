"""What a test needs that not every machine has: without it the test is skipped and says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GIVEN = os.environ.get("FLDIST_DATA")  # as it was at the start: tests set and delete the variable


def needs_data(*names: str) -> Path:
    """The folder FLDIST_DATA, which must hold these files or folders (e.g. `MNIST/raw`), or the test is skipped."""
    missing = missing_data(names)
    if GIVEN is None or missing:
        reason = "FLDIST_DATA is not set" if GIVEN is None else f"FLDIST_DATA={GIVEN} has no {missing[0]}"
        pytest.skip(f"needs {', '.join(names)}: {reason}")
    return Path(GIVEN).absolute()


def missing_data(names: tuple[str, ...]) -> list[str]:
    """Those of the names that FLDIST_DATA does not hold."""
    return [name for name in names if GIVEN is None or not Path(GIVEN, name).exists()]


def skipped_all_the_same(reason: str) -> bool:
    """Whether a test was skipped for want of data that are there, whoever skipped it."""
    if GIVEN is None or ("FLDIST_DATA" not in reason and not reason.startswith("needs ")):
        return False
    names = tuple(n.strip() for n in reason.removeprefix("needs ").partition(":")[0].split(","))
    return not missing_data(names)


def needs_gpus(count: int = 1) -> None:
    """So many GPUs that torch can use, or the test is skipped."""
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < count:
        pytest.skip(f"needs {'a GPU' if count == 1 else f'{count} GPUs'}: torch finds {there or 'none'} here")
