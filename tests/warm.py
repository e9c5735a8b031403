"""Imported by the fork server, so that a host of a test starts in milliseconds."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401
import torch

import fldist.config
import fldist.runner
import tests.moments
from fldist.models.train import warm_up
from fldist.wire.errors import TransportError

warm_up()
torch.set_num_threads(1)


def host(
    address: tuple[str, int], rank: int, token: str, log: str, join_s: float, moment: tuple[Any, ...] | None = None
) -> None:
    """What `fldist _host` does, in a forked process; moment: see `moments.arm_host`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    if moment is not None:
        tests.moments.arm_host(*moment)
    try:
        fldist.runner.gloo_host(address, rank, token, join_s)
    except TransportError as error:
        print(f"fldist host: {error}", file=sys.stderr)
        sys.exit(1)


def rank(environment: dict[str, str], config: str, output: str, moment: tuple[Any, ...] | None) -> None:
    """What `fldist run` does as a rank of a world that the environment describes, in a forked process."""
    os.environ.update(environment)
    if moment is not None:
        tests.moments.arm_host(*moment)
    try:
        fldist.runner.run_here(fldist.config.load(json.loads(Path(config).read_text())), output=output)
    except TransportError as error:
        print(f"fldist host: {error}", file=sys.stderr)
        sys.exit(1)


def program(text: str) -> None:
    """Run a test's program in a forked process, as `python -c` would after seconds of imports."""
    exec(compile(text, "<program>", "exec"), {"__name__": "__main__"})
