"""Trackers: who is told of a run beside its directory and its terminal, by `output.trackers`. They decide nothing.

A tracker is a frozen dataclass whose fields are its keys in the configuration, with `open(directory, config)`, which
gives an observer (`fldist.runtime.server.Observer`). A tracker that fails is named and told no more; the run goes on.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from fldist.runtime.server import Observer

log = logging.getLogger("fldist")


class Tracker(Protocol):
    """What `output.trackers` names."""

    def open(self, directory: Path, config: dict[str, Any]) -> Observer:
        """Be ready for a run that writes to `directory` with this resolved configuration; it may be one that goes on.

        ValueError when it cannot be.
        """


class Together:
    """Several observers as one. The first one is the run's own; of the others none may end the run.

    What they are given is theirs: the run goes on with its own.
    """

    def __init__(self, first: Observer, others: Sequence[Observer]) -> None:
        self._first = first
        self._others = list(others)

    def started(self, facts: dict[str, Any]) -> None:
        """All hosts have joined."""
        self._first.started(facts)
        self._tell(lambda observer: observer.started(copy.deepcopy(facts)))

    def round(self, line: dict[str, Any]) -> None:
        """A round has been committed."""
        self._first.round(line)
        self._tell(lambda observer: observer.round(copy.deepcopy(line)))

    def warning(self, text: str) -> None:
        """Something a user should know."""
        self._first.warning(text)
        self._tell(lambda observer: observer.warning(text))

    def finished(self, result: dict[str, Any]) -> None:
        """The run has ended."""
        self._tell(lambda observer: observer.finished(copy.deepcopy(result)))
        self._first.finished(result)

    def stopped(self, text: str) -> None:
        """The run ends before its time."""
        self._first.stopped(text)
        self._tell(lambda observer: observer.stopped(text))

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for observer in list(self._others):
            try:
                tell(observer)
            except Exception as error:
                log.exception("a tracker failed")
                self._others.remove(observer)
                name = type(observer).__name__
                self._first.warning(f"{name} is told no more of this run: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard's event files in the run's directory, under `tensorboard/`; look with `tensorboard --logdir runs`."""

    def open(self, directory: Path, config: dict[str, Any]) -> Observer:
        """See the protocol; ValueError when the package is not there."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"output.trackers: tensorboard needs the package of that name ({error}); "
                "pip install 'fldist[tensorboard]', or remove it"
            ) from None
        writer = functools.partial(SummaryWriter, str(directory / "tensorboard"), flush_secs=30)
        return _Written(writer, config)


class _Written:
    """Writes a run's rounds as scalars."""

    def __init__(self, writer: Callable[..., Any], config: dict[str, Any]) -> None:
        self._make = writer
        self._writer: Any = None
        self._config = config

    def started(self, facts: dict[str, Any]) -> None:
        """Nothing: what is written depends on the first round."""

    def round(self, line: dict[str, Any]) -> None:
        """Every number of the line that is no list: accuracy, loss, scores, bytes, seconds, what was logged."""
        if self._writer is None:
            # what an earlier process of this run wrote of rounds that are done again is hidden
            self._writer = self._make(purge_step=line["round"])
            text = yaml.safe_dump(self._config, sort_keys=False).replace("\n", "\n    ")
            self._writer.add_text("config", f"    {text}", line["round"])  # indented: shown as it is
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["round"])

    def warning(self, text: str) -> None:
        """Nothing: the log has it."""

    def finished(self, result: dict[str, Any]) -> None:
        """All is written."""
        self._close()

    def stopped(self, text: str) -> None:
        """What there is is written; a run that goes on has another process."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of rounds.jsonl by a path such as `bytes/logical/up`."""
    for name, value in line.items():
        if name not in ("round", "attempt", "stage", "committed", "missing"):
            yield from _numbers(name, value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
