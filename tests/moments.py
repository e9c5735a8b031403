"""Signals at a moment of a round: a host sends one to itself, or the server's process sends it to a host.

`mid download` and `mid upload` are proved by the bytes: the beginning of the block is there, its end is not.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fldist.runtime.host import Host
from fldist.wire.codec import Frame, FrameType, Head
from fldist.wire.gloo import GlooHost
from fldist.wire.session import Session

AT_HOST = ("on the header", "mid download", "computing")
AT_SERVER = ("mid upload", "uploaded, not acknowledged")
MOMENTS = ("idle", *AT_HOST, *AT_SERVER)


def strike(number: int, mark: str) -> None:
    """Write down the time and send this process the signal."""
    Path(mark).write_text(str(time.monotonic()))
    os.kill(os.getpid(), number)
    while number == signal.SIGKILL:
        time.sleep(1)


def when_half_is_there(frame: Frame, act: Callable[[], None]) -> None:
    """Allocate a frame's bodies and act when the first part's beginning has arrived and its end has not."""
    Frame.allocate(frame)
    tensor = frame.bodies[0].tensor
    assert tensor is not None
    tensor.zero_()
    first, last = tensor[:1000], tensor[-1000:]

    def watch() -> None:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if bool(first.any()):
                if not bool(last.any()):
                    act()
                return

    threading.Thread(target=watch, name="watch", daemon=True).start()


def halving(receive: Any, wanted: Callable[[Session, Frame], bool], act: Callable[[Session], None]) -> Any:
    """`Session._receive_bodies` that acts in the middle of a wanted frame."""

    def receive_bodies(self: Session, frame: Frame) -> None:
        if wanted(self, frame):
            frame.allocate = lambda *how: when_half_is_there(frame, lambda: act(self))  # type: ignore[method-assign]
        receive(self, frame)

    return receive_bodies


def arm_host(moment: str, number: int, round_number: int, mark: str) -> None:
    """Change this host's process so that the signal comes at the moment of that round."""

    def due(head: Head) -> bool:
        return head.type is FrameType.CALL and head.round == round_number and not Path(mark).exists()

    if moment == "on the header":
        saw = GlooHost.saw

        def seen(self: GlooHost, head: Head) -> None:
            if due(head):
                strike(number, mark)
            saw(self, head)

        GlooHost.saw = seen  # type: ignore[method-assign]
    elif moment == "mid download":
        Session._receive_bodies = halving(  # type: ignore[method-assign]
            Session._receive_bodies, lambda session, frame: due(frame.head), lambda session: strike(number, mark)
        )
    elif moment in ("computing", "computing the second call"):
        run = Host._run

        def running(self: Host, method: Any, frame: Frame, *rest: Any) -> Any:
            if due(frame.head) and (moment == "computing" or frame.head.call == 2):
                strike(number, mark)
            return run(self, method, frame, *rest)

        Host._run = running  # type: ignore[method-assign]
    elif moment == "asleep":
        time.sleep(60)
    elif moment == "joining":
        ready = GlooHost.ready

        def joining(self: GlooHost) -> None:
            if not Path(mark).exists():
                strike(number, mark)
            ready(self)

        GlooHost.ready = joining  # type: ignore[method-assign]
    elif moment == "opening the world":
        delivered = GlooHost._delivered

        def opening(self: GlooHost, session: Session, frame: Frame) -> None:
            if frame.head.type is FrameType.WORLD and not Path(mark).exists():
                strike(number, mark)
            delivered(self, session, frame)

        GlooHost._delivered = opening  # type: ignore[method-assign]
    elif moment == "in the world":  # where the others wait for this rank
        together = GlooHost._together

        def in_the_world(self: GlooHost, work: Any) -> None:
            if self.latest[0] == round_number and not Path(mark).exists():
                strike(number, mark)
            together(self, work)

        GlooHost._together = in_the_world  # type: ignore[method-assign]
    else:
        raise AssertionError(moment)
