"""Signals that ask a run to end: turned into an exception in the round loop, and held back while ends are tied up."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; schedulers that end a job; schedulers that announce the end (`sbatch --signal=B:USR1@60`)."""

_ONE_END_S = 2.0
"""Signals this soon after another are about the same end: Ctrl-C reaches a run from the terminal, and once more as
SIGTERM from a suite or a launcher that it has reached, too."""


class Interrupted(BaseException):
    """A signal asked the run to end. No Exception: nothing that handles errors may swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.text = f"ended by {signal.Signals(signal_number).name}"
        self.told = False  # whether the observer has heard of it

    def __str__(self) -> str:
        return self.text


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise `Interrupted` inside (in the main thread; elsewhere nothing changes).

    A second one soon after the first raises nothing: it would interrupt what the first one has set going.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    latest = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest > _ONE_END_S:
            latest = now
            raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold further signals back while a run's ends are tied up (seconds), and forget them: it is ending."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = set(ENDING)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        if not numbers & before:  # the outermost of nested ones
            while signal.sigtimedwait(numbers, 0) is not None:
                pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
