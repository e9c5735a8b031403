"""`fldist bench round`: what a round costs in which next to nothing travels and nobody computes.

One number goes to each of 100 clients on two hosts and one comes back, over gloo, through the real runtime: placement,
frames, acknowledgements, ledger, checkpoint, rounds.jsonl. What is timed is one round after the other as the round loop
does them, from one report of a finished round to the next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fldist.algorithm import Algorithm, Clients, Me, Server, State, on_client
from fldist.bench.measure import Figure, Report, Say, Target, quartiles
from fldist.bench.party import stage
from fldist.config import load
from fldist.data.client_data import ClientData
from fldist.data.task import Task
from fldist.kinds import Scalar
from fldist.runner import Silent, run_here

HOSTS = 2
CLIENTS = 100
WARM_UP = 5
ROUNDS = 50
REPEATS = 3
TARGET = Target(0.020)
PARTS = ("encode", "server", "compute", "wire", "wait")


class Answered(NamedTuple):
    """One client's reply."""

    value: Scalar  # what it was sent


@dataclass(frozen=True)
class Ask(Algorithm):
    """Every client is sent a number and sends it back."""

    def init_server(self, task: Task) -> State:
        """A number, and the model, which stays where it is."""
        return State(x=task.init_params(), value=1.0)

    def round(self, server: Server, clients: Clients) -> None:
        """Ask all."""
        got = clients.all().call(self.answer, value=server.value)
        if set(got.value.values()) != {server.value}:
            raise RuntimeError("what came back is not what was sent")

    @on_client
    def answer(self, me: Me, data: ClientData, value: Scalar) -> Answered:
        """Return it."""
        return Answered(value)


def config(clients: int, rounds: int) -> dict[str, Any]:
    """A run of `Ask` as a user would write it, but for the evaluation, which is left out."""
    return {
        "name": "round",
        "rounds": rounds,
        "clients": {"num_clients": clients},
        "task": {"model": {"name": "mlp", "hidden": [8]}},
        "algorithm": "fldist.bench.round:Ask",
        "eval": {"every": 0},
        "deadlines": {"round_deadline_s": 60.0},
    }


class Watched(Silent):
    """Notes when each round is done, and its line of rounds.jsonl."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.lines: list[dict[str, Any]] = []

    def round(self, line: dict[str, Any]) -> None:
        """A round is done and written."""
        if line["missing"]:
            raise RuntimeError(f"round {line['round']} lacks replies: {line['missing']}")
        self.ends.append(time.perf_counter())
        self.lines.append(line)


def between(ends: Sequence[float], warm_up: int) -> list[float]:
    """Seconds of each round behind the first `warm_up` ones, from the ends of all."""
    return [end - before for before, end in zip(ends[warm_up - 1 :], ends[warm_up:], strict=False)]


def measure(repeats: int | None = None, *, quick: bool = False, say: Say = lambda text: None) -> Report:
    """Several runs, all their rounds but the first few of each; see the module."""
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats: must be at least 1, got {repeats}")
    repeats = repeats or (1 if quick else REPEATS)
    rounds = 5 if quick else ROUNDS
    report = Report(f"round: one number to each of {CLIENTS} clients on {HOSTS} hosts and back, gloo", quick=quick)
    seconds: list[float] = []
    medians: list[float] = []
    lines: list[dict[str, Any]] = []
    with stage() as place:
        for number in range(1, repeats + 1):
            say(f"round: run {number} of {repeats}, {rounds} rounds after {WARM_UP} to warm up")
            seen = Watched()
            settings = load(config(CLIENTS, WARM_UP + rounds))
            run_here(settings, nproc=1 + HOSTS, output=place.directory / f"run-{number}", observer=seen)
            own = between(seen.ends, WARM_UP)
            seconds += own
            medians.append(quartiles(own)[1])
            lines += seen.lines[WARM_UP:]
        report.notes.append(
            f"runs were written below {place.directory.parent}: the checkpoints' time depends on that disk"
        )
    whole_s = report.add(Figure("round_s", "seconds a round", seconds, "s", TARGET))
    report.add(Figure("run_median_s", "medians of the runs", medians, "s"))
    inside_s = quartiles([line["seconds"]["total"] for line in lines])[1]
    parts = {name: quartiles([line["seconds"][name] for line in lines])[1] for name in PARTS}
    told = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in parts.items())
    report.limits.append(
        f"of {1e3 * whole_s:.1f} ms a round {1e3 * inside_s:.1f} ms are the exchange ({told} ms, as rounds.jsonl has "
        f"them), {1e3 * max(0.0, whole_s - inside_s):.1f} ms writing the line and the checkpoint: latency, no bandwidth"
    )
    return report
