"""What a test needs that not every machine has: without it the test is skipped and says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GIVEN = os.environ.get("FLDIST_DATA")  # as it was at the start: tests set and delete the variable


def needs_data(*names: str) -> Path:
    """The folder FLDIST_DATA, which must hold these files or folders (e.g. `MNIST/raw`).

    When it does not, the test is skipped, or fails where the environment variable FLDIST_REQUIRE_DATA is set.
    """
    missing = [name for name in names if GIVEN is None or not Path(GIVEN, name).exists()]
    if GIVEN is None or missing:
        reason = "FLDIST_DATA is not set" if GIVEN is None else f"FLDIST_DATA={GIVEN} has no {missing[0]}"
        if os.environ.get("FLDIST_REQUIRE_DATA"):
            pytest.fail(f"FLDIST_REQUIRE_DATA is set, and {reason}")
        pytest.skip(f"needs {', '.join(names)}: {reason}")
    return Path(GIVEN).absolute()
