"""Where durations come from that decide something: the section `clock`. It is `data.clock` and `server.clock`.

An algorithm that goes by how long something takes (a layer's forward and backward pass, a transfer) asks the clock for
it, and nothing else. So a run whose times are scripted can be repeated bit for bit, on any machine and any number of
ranks. The seconds that results tell of rounds and messages do not come from here: they decide nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import torch
from pydantic import Field

T = TypeVar("T")
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

NAMES = {"measured": "fldist.clock:Measured", "scripted": "fldist.clock:Scripted"}
"""The clocks by the name that a configuration gives them."""


@dataclass(frozen=True)
class Clock:
    """Base of all clocks; a subclass is a frozen dataclass whose fields are its configuration."""

    def time(self, label: str, work: Callable[[], T]) -> tuple[T, float]:
        """Do some work, once, under every clock; its value, and the seconds that it is taken to have needed.

        label: what the work is, the same at every rank. ValueError where the clock knows no time for it.
        """
        raise TypeError(f"{type(self).__name__} does not define time(self, label, work)")


@dataclass(frozen=True)
class Measured(Clock):
    """What the machine takes. Two runs do not measure the same, so what goes by it cannot be repeated."""

    def time(self, label: str, work: Callable[[], T]) -> tuple[T, float]:
        """Seconds of the work alone; of a GPU's, until it has finished."""
        _finish()
        began = time.perf_counter()
        value = work()
        _finish()
        return value, time.perf_counter() - began


@dataclass(frozen=True)
class Scripted(Clock):
    """What the configuration says. seconds: by label; default: of every other label (none: these are refused)."""

    seconds: Mapping[str, Seconds] = field(default_factory=dict)
    default: Seconds | None = None

    def time(self, label: str, work: Callable[[], T]) -> tuple[T, float]:
        """The seconds of the label, however long the work takes; ValueError, before any work, where it has none."""
        seconds = self.seconds.get(label, self.default)
        if seconds is None:
            known = ", ".join(self.seconds) or "nothing"
            raise ValueError(f"clock.seconds: it has no {label!r}, but {known}; name it there, or set clock.default")
        return work(), seconds


def _finish() -> None:
    """Wait until a GPU has done what it was given, where one is in use."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
