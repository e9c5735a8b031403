"""The in-process link: the same frames, encoded, checked and copied, with the host's work done by the caller.

Every body is copied as a network would copy it, so an algorithm cannot pass a tensor by reference unseen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from fldist.wire.codec import Expected, Frame, FrameType, decode, encode
from fldist.wire.link import Event, Joined, Received, Sent, ServerLink, Welcome, own_info

Serve = Callable[[Frame, Callable[[], bool]], Iterator[Frame]]
"""Answers a frame; the second argument tells whether a newer call makes it obsolete."""


class LocalServer(ServerLink):
    """One host, rank 0, whose work is done while the server waits for events."""

    def __init__(self, serve: Serve, host_expects: Expected) -> None:
        super().__init__()
        self._serve = serve
        self._host_expects = host_expects
        self._work: list[Iterator[Frame]] = []
        self._latest = (0, 0)
        self._epoch = 0
        self.connected.add(0)

    @property
    def survives(self) -> str:
        """One line: what this backend and launcher can survive."""
        return "one process: if it dies, finished rounds are kept, and the same command goes on"

    def admit(self, welcome: Welcome) -> None:
        """The only host is there at once."""
        self._epoch = welcome.epoch
        self.events.put(Joined(0, 1, own_info(), 0))

    def post(self, rank: int, frame: Frame) -> bool:
        """Encode, copy and hand over; an older call's work is left where it is, as a host would."""
        key = (frame.head.round, frame.head.attempt)
        if frame.head.type in (FrameType.CALL, FrameType.DIGEST):
            self._latest = max(self._latest, key)
        self.number(frame)
        frame.head.epoch = self._epoch
        started = frame.head.sent_ns
        arrived = _carried(frame, self._host_expects)
        self.events.put(Sent(rank, frame.head.seq, started, time.monotonic_ns()))
        self._work.append(self._serve(arrived, lambda: self._latest > key))
        return True

    def next_event(self, timeout_s: float | None) -> Event | None:
        """The next event; does the host's work as far as its next reply."""
        while self.events.empty():
            if not self._work or (timeout_s is not None and timeout_s <= 0.0):
                return None
            reply = next(self._work[0], None)
            if reply is None:
                self._work.pop(0)
                continue
            reply.head.sent_ns = time.monotonic_ns()
            arrived = _carried(reply, self.expected)
            return Received(0, arrived, time.monotonic_ns(), lambda: None)
        return self.events.get_nowait()

    def abort(self, rank: int, reason: str) -> None:
        """Forget the host's unfinished work."""
        self._work.clear()

    def transport_bytes(self) -> tuple[int, int]:
        """There is no transport beside the messages."""
        return 0, 0

    def close(self, deadline_s: float) -> None:
        """Nothing to free."""
        self._work.clear()


def _carried(frame: Frame, expected: Expected | None) -> Frame:
    """What the other end would have: decoded from the head, bodies copied."""
    arrived = decode(encode(frame), expected)
    arrived.allocate()
    for source, target in zip(frame.bodies, arrived.bodies, strict=True):
        target.flat().copy_(source.flat())
    return arrived
