"""What a run looks like in a terminal: one line a round, warnings, and a table at the end."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from fldist.runtime.launch import find_world
from fldist.runtime.stops import reason_text
from fldist.units import bytes_text, joules_text, seconds_text


class Progress:
    """Prints a run as it goes. Plain lines, whether or not there is a terminal."""

    def __init__(self, verbose: bool = False) -> None:
        # mpirun gives rank 0 a terminal of its own, whatever its output is redirected to
        forced = False if find_world().launcher == "mpi" else None
        self._console = Console(highlight=False, soft_wrap=True, force_terminal=forced)
        self._rounds = 0
        self._done = 0
        self._verbose = verbose
        self._began = time.monotonic()
        self._ended = self._began  # the last round
        self._ends: dict[str, int] = {}  # by stage, where there are several: its last round
        self._stage = ""

    def started(self, facts: dict[str, Any]) -> None:
        """All hosts have joined."""
        self._began = self._ended = time.monotonic()
        self._rounds = facts["rounds"]
        stages = [(name, rounds) for name, rounds in facts["stages"] if rounds]
        if len(stages) > 1:
            ends = itertools.accumulate(rounds for _, rounds in stages)
            self._ends = {name: end for (name, _), end in zip(stages, ends, strict=True)}
        self._console.print(f"backend {facts['backend']}, {facts['world_size']} rank(s): {facts['survives']}")

    def round(self, line: dict[str, Any]) -> None:
        """One line a round."""
        number = line["round"]
        seconds = line["seconds"]
        stage = line["stage"] if self._ends else ""
        if stage != self._stage:  # its rounds may take a time of their own
            self._stage, self._done, self._began = stage, 0, self._ended
        self._done += 1  # by this process: a run that goes on has rounds of another's
        self._ended = time.monotonic()
        end = self._ends.get(stage, self._rounds)
        left = (self._ended - self._began) / self._done * (end - number)
        named = f"{stage:<{max(map(len, self._ends))}}  " if self._ends else ""
        scored = "accuracy   -  " if line["accuracy"] is None else f"accuracy {line['accuracy']:.4f}"
        split = ", ".join(f"{k} {seconds[k]:.2f}" for k in ("compute", "server", "encode", "wire", "wait", "evaluate"))
        logical = line["bytes"]["logical"]
        present, of = line["hosts"]["present"], line["hosts"]["of"]
        hosts = "" if present == of else f"  {present} of {of} hosts"
        self._console.print(
            f"round {number:>{len(str(self._rounds))}}/{self._rounds}  {named}{scored}  "
            f"up {bytes_text(logical['up'])}  down {bytes_text(logical['down'])}  "
            f"{line['replied']}/{line['selected']} replies{hosts}  {seconds['total']:.2f} s ({split})"
            + (f"  simulated {_cost(line['simulated'])}" if "simulated" in line else "")
            + (f"  ETA {seconds_text(left)}" if number < end else "")
            + (f" to the end of {stage}" if stage and number < end else ""),
            markup=False,
        )
        if self._verbose:
            for client, reason in line["missing"].items():
                self._console.print(f"    client {client}: {reason}", markup=False)

    def warning(self, text: str) -> None:
        """A line that stands out."""
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def stopped(self, text: str) -> None:
        """Why the run ends before its time."""
        print(f"fldist: {text}", file=sys.stderr, flush=True)

    def finished(self, result: dict[str, Any]) -> None:
        """The table of the whole run."""
        rounds = "1 round" if result["rounds"] == 1 else f"{result['rounds']} rounds"
        table = Table(title=f"{result['name']}: {result['algorithm']}, {rounds}, {result['backend']}")
        table.add_column("")
        table.add_column("up", justify="right")
        table.add_column("down", justify="right")
        data = result["bytes"]
        for kind, ways in data["by_kind"].items():
            table.add_row(f"{kind} (logical)", *(f"{ways[w]:,} B" for w in ("up", "down")))
        table.add_section()
        for name in ("logical", "encoded", "wire"):
            table.add_row(name, *(f"{data[name][w]:,} B" for w in ("up", "down")))
        for status, ways in data["wasted"].items():
            table.add_row(f"not used: {status}", *(f"{ways[w]:,} B" for w in ("up", "down")))
        self._console.print(table)
        seconds = result["seconds"]
        split = ", ".join(f"{k} {seconds[k]:.2f}" for k in ("compute", "server", "encode", "wire", "wait", "evaluate"))
        final = result["final"]
        if final["accuracy"] is not None:
            best = result["best"]
            loss = float("nan") if final["loss"] is None else final["loss"]  # as a file has it: of a run that went on
            self._console.print(
                f"accuracy {final['accuracy']:.4f} (best {best['accuracy']:.4f} in round {best['round']}), "
                f"loss {loss:.4f}"
            )
        for name, value in result["summary"].items():
            shown = f"{value:,.0f}" if isinstance(value, int) or 1e6 <= abs(value) < 1e15 else f"{value:,.6g}"
            self._console.print(f"{name} {shown}", markup=False)
        self._console.print(f"finished: {reason_text(result['stop'])}")
        self._console.print(f"seconds {seconds['total']:.2f} in rounds ({split}), {seconds['run']:.2f} in all")
        if result["simulated"]:
            on = result["simulated"]
            self._console.print(f"simulated {on['seconds']:,.1f} s and {on['joules']:,.1f} J on the clients' devices")
        self._console.print(f"state_hash {result['state_hash']}")
        self._console.print(f"results in {result['directory']}", markup=False)


def _cost(simulated: dict[str, float]) -> str:
    """What devices take, in words."""
    return f"{seconds_text(simulated['seconds'])}, {joules_text(simulated['joules'])}"
