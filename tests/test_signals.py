"""Signals that ask a run to end: the first one ends it, those that come with it disturb nothing."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import fldist
from fldist.runtime import server, signals
from fldist.runtime.membership import RunStopped
from fldist.runtime.signals import Interrupted, interruptible, undisturbed
from tests.conftest import small


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


@pytest.mark.parametrize("stops", [True, False])
def test_a_signal_just_before_a_run_is_tied_up_costs_no_result(tmp_path: Path, monkeypatch, stops: bool) -> None:
    """As torchrun's, which comes soon after the death of a rank that has ended the run already."""
    entered = []

    @contextlib.contextmanager
    def late() -> Iterator[None]:
        entered.append(1)
        if len(entered) == 1:
            raise Interrupted(signal.SIGTERM)
        with undisturbed():
            yield

    monkeypatch.setattr(server, "undisturbed", late)
    faults = {"min_replies": "all", "on_quorum_loss": "stop"} if stops else {}
    settings = small(algorithm={"name": "tests.own:NanFrom"}, rounds=1, faults=faults)
    with pytest.raises(RunStopped) if stops else contextlib.nullcontext():
        fldist.run(settings, output=tmp_path / "run")
    assert len(entered) == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == ("stopped" if stops else "finished")
