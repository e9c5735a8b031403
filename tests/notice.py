"""How soon the server's link loses a host that is killed or stopped: `python -m tests.notice RUNS` prints a line for
each signal and moment, in milliseconds from the signal; docs/recovery.md has figures of it."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from fldist.wire.gloo import GlooServer
from fldist.wire.session import Session
from tests.conftest import Hosts
from tests.disturbed import config
from tests.moments import MOMENTS
from tests.test_membership import strike_at

lost_at: list[float] = []
end = GlooServer._session_lost


def note(self: GlooServer, session: Session, reason: str) -> None:
    lost_at.append(time.monotonic())
    end(self, session, reason)


if __name__ == "__main__":
    GlooServer._session_lost = note  # type: ignore[method-assign]
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for moment in MOMENTS:
            times = []
            for _ in range(int(sys.argv[1])):
                lost_at.clear()
                with tempfile.TemporaryDirectory() as folder:
                    _, struck = strike_at(moment, number, Path(folder) / "run", Hosts(), config(moment), 1.0)
                times.append(round(1000 * (lost_at[0] - struck)))
            print(number.name, moment, *sorted(times), flush=True)
