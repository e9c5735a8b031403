"""Signals that ask a run to end: the first one ends it, those that come with it disturb nothing."""

from __future__ import annotations

import signal

import pytest

from fldist.runtime import signals
from fldist.runtime.signals import Interrupted, interruptible


def test_a_second_signal_soon_after_the_first_interrupts_no_end():
    """As Ctrl-C: from the terminal, and as SIGTERM from the suite that has heard it, too."""
    tied_up = []
    with pytest.raises(Interrupted) as ended, interruptible():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            tied_up.append("all")
    assert tied_up == ["all"]
    assert ended.value.signal_number == signal.SIGINT


def test_a_later_signal_interrupts_again(monkeypatch):
    """For a run that has swallowed the first one, as an exception in a finalizer is."""
    monkeypatch.setattr(signals, "_ONE_END_S", 0.0)
    with interruptible():
        for number in (signal.SIGINT, signal.SIGUSR1):
            with pytest.raises(Interrupted) as ended:
                signal.raise_signal(number)
            assert ended.value.signal_number == number
