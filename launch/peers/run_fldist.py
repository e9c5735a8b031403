"""The comparison's work in fldist, as a user runs it: a server and hosts on gloo (`--processes 3`), or one process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from workload import RECEIVERS, TRAINERS, Rounds, accuracy, arguments, check_exchanged, lenet5

import fldist
from fldist.bench import exchange, workload
from fldist.config import components, load
from fldist.params import Layout
from fldist.runner import Silent, run_here

ALGORITHMS = Path(__file__).with_name("fldist_algorithms.py")


class Watched(Silent):
    """Notes when rounds are done: line, ledger and checkpoint included."""

    def __init__(self) -> None:
        self.rounds = Rounds()
        self.steps = 0

    def started(self, facts: dict[str, Any]) -> None:
        """All hosts have joined."""
        self.rounds.begin()

    def round(self, line: dict[str, Any]) -> None:
        """A round is done and written."""
        if line["missing"]:
            raise RuntimeError(f"round {line['round']} lacks replies: {line['missing']}")
        self.rounds.end()
        self.steps += int(line.get("log", {}).get("steps", 0))


def config(work: str, rounds: int, epochs: int = 1) -> dict[str, Any]:
    """The configuration of a work: that of `fldist bench`, with the algorithms beside this file."""
    if work == "workload":
        made = workload.config(rounds, quick=False)
        made["task"]["normalize"] = "standard"
        made["local"]["epochs"] = epochs
        return made | {"algorithm": f"{ALGORITHMS}:Counted"}
    made = exchange.exchange_config(False, rounds)
    return made | {"algorithm": {"name": f"{ALGORITHMS}:Exchange", "average": work == "average"}}


def main() -> None:
    """Run and write the figures."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--processes", type=int, help="all ranks; default: a server and a host for each of the others'")
    given = parser.parse_args()
    training = given.work == "workload"
    processes = given.processes or 1 + (TRAINERS if training else RECEIVERS)
    settings = load(config(given.work, given.rounds, given.epochs))
    seen = Watched()
    with tempfile.TemporaryDirectory(prefix="fldist-peers-") as place:
        run_here(settings, nproc=processes, output=Path(place, "run"), observer=seen)
        model = load_file(Path(place, "run", "model", "model.safetensors"))
    versions = {"fldist": fldist.__version__, "torch": torch.__version__, "numpy": np.__version__}
    if training:
        trained = lenet5()
        trained.load_state_dict(model)
        seen.rounds.write(given.out, versions, steps=seen.steps, accuracy=accuracy(trained))
    else:
        layout = Layout.of(components(settings).build_model(exchange.SHAPE, exchange.CLASSES))
        values = torch.cat([model[slot.name].flatten() for slot in layout.params])  # buffers do not travel
        check_exchanged(values, given.rounds)
        seen.rounds.write(given.out, versions)


if __name__ == "__main__":
    main()
