"""What a suite looks like while it goes: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fldist.bench.suite import Planned, Shown
from fldist.units import bytes_text, seconds_text

SAY_S = 60.0
"""Where there is no terminal: how often it is told how far the runs are."""


class InLines(Shown):
    """A line for every run that begins or ends, and now and then one that says how far all are."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._states: dict[str, str] = {}
        self._said = self._started = time.monotonic()
        self._before = 0

    def began(self, runs: Sequence[Planned], jobs: int) -> None:
        """Say what is to be done, and what is done already."""
        self._runs = list(runs)
        self._before = sum(run.rounds for run in runs)
        count = {state: sum(run.state == state for run in runs) for state in ("finished", "failed")}
        resumed = sum(run.resumes and run.state == "waiting" for run in runs)
        parts = [f"{len(runs)} runs, {jobs} at a time"]
        parts += [f"{count['finished']} are finished already"] if count["finished"] else []
        parts += [f"{resumed} go on"] if resumed else []
        self._say("; ".join(parts))
        for run in runs:
            self._states[run.name] = run.state
            if run.state == "failed":
                self._say(f"{run.name} cannot be run: {run.reason}")

    def changed(self, run: Planned) -> None:
        """Tell of a run that has ended."""
        if self._states.get(run.name) == run.state:
            return
        self._states[run.name] = run.state
        if run.state == "finished" and run.result is not None:
            accuracy = run.result["final"]["accuracy"]
            bytes_ = run.result["bytes"]["encoded"]
            self._say(
                f"{self._done()} {run.name}: "
                + ("" if accuracy is None else f"accuracy {accuracy:.4f}, ")
                + f"{run.result['rounds']} rounds, {bytes_text(bytes_['up'])} up, {bytes_text(bytes_['down'])} down, "
                f"{seconds_text(run.seconds)}{self._left()}"
            )
        elif run.state in ("failed", "ended"):
            self._say(f"{self._done()} {run.name} {run.state}: {run.reason}")

    def tick(self) -> None:
        """Tell how far the runs are, when nothing was told for a while."""
        if time.monotonic() - self._said > SAY_S:
            going = ", ".join(f"{r.name} {r.rounds}/{r.of}" for r in self._runs if r.state == "running")
            self._say(f"{self._done()} {going}{self._left()}")

    def _done(self) -> str:
        ended = sum(run.state in ("finished", "failed", "ended") for run in self._runs)
        return f"[{ended:>{len(str(len(self._runs)))}}/{len(self._runs)}]"

    def _left(self) -> str:
        """How long the rest may take, were all rounds alike."""
        done = sum(run.rounds for run in self._runs) - self._before
        left = sum(run.of - run.rounds for run in self._runs if run.state in ("waiting", "running"))
        if not done or not left:
            return ""
        return f"; about {seconds_text((time.monotonic() - self._started) / done * left)} left"

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, markup=False)


class InBars(InLines):
    """The same lines, and below them a bar for all and one for every run under way."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        super().__init__(self._bars.console)
        self._all: TaskID | None = None
        self._of: dict[str, TaskID] = {}

    def began(self, runs: Sequence[Planned], jobs: int) -> None:
        """See the base."""
        super().began(runs, jobs)
        self._all = self._bars.add_task("rounds of all runs", total=sum(run.of for run in runs))
        self._bars.start()

    def changed(self, run: Planned) -> None:
        """See the base."""
        super().changed(run)
        if run.state == "running":
            if run.name not in self._of:
                self._of[run.name] = self._bars.add_task(run.name, total=run.of)
            self._bars.update(self._of[run.name], completed=run.rounds, total=run.of)
        elif run.name in self._of:
            self._bars.remove_task(self._of.pop(run.name))
        if self._all is not None:
            done = sum(r.of if r.state == "finished" else r.rounds for r in self._runs)
            self._bars.update(self._all, completed=done, total=sum(r.of for r in self._runs))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()


def shown_here() -> InLines:
    """What suits where the output goes."""
    console = Console(highlight=False, soft_wrap=True)
    return InBars(console) if console.is_terminal else InLines(console)
