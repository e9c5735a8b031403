"""Run under mpirun by test_launch.py: every job of a JSON file, one after the other, in one MPI job.

A job is a configuration, or overrides with which the run in `output` goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fldist.config import load, load_resumed
from fldist.runner import run_here

if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        going_on = "resume" in job
        settings = load_resumed(Path(job["output"]), job["resume"]) if going_on else load(job["config"])
        run_here(settings, output=job["output"], resume=going_on)
