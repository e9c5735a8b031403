"""Run under mpirun by test_launch.py: every configuration of a JSON file, one after the other, in one MPI job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fldist.config import load
from fldist.runner import run_here

if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run_here(load(job["config"]), output=job["output"])
