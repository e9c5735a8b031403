"""By how much other ranks' clocks differ from the server's, from the times that messages carry anyway.

A message that a host sent at h and the server had at s gives offset <= s - h; a call that the server posted at s and
the host had at h gives offset >= s - h (offset: the server's clock minus the host's). The estimate is the middle of the
tightest bounds so far, its uncertainty half their distance, as in NTP's exchange of four times (RFC 5905, section 8).
Old bounds loosen with time, since two clocks do not run equally fast.
"""

from __future__ import annotations

from dataclasses import dataclass

DRIFT = 1e-4
"""How much two clocks may drift apart, in seconds a second; quartz clocks of computers differ by less."""


@dataclass
class Clock:
    """Bounds on the offset of one host's clock, in ns, at the server's time `at`."""

    upper: float
    lower: float = float("-inf")
    at: int = 0

    def received(self, sent_ns: int, done_ns: int) -> None:
        """A message left at the host's `sent_ns` and was here at `done_ns`."""
        self._loosen(done_ns)
        self.upper = min(self.upper, done_ns - sent_ns)
        self.lower = min(self.lower, self.upper)  # a host whose times contradict each other is believed the latest

    def posted(self, posted_ns: int, received_ns: int, now_ns: int) -> None:
        """A message left here at `posted_ns` and was there at the host's `received_ns`."""
        self._loosen(now_ns)
        self.lower = max(self.lower, min(posted_ns - received_ns, self.upper))

    def _loosen(self, now: int) -> None:
        passed = max(0, now - self.at) if self.at else 0
        self.upper += DRIFT * passed
        self.lower -= DRIFT * passed
        self.at = now

    @property
    def offset_ns(self) -> int:
        """Add it to the host's clock to get the server's; never more than a message's arrival allows."""
        return int(self.upper if self.lower == float("-inf") else (self.lower + self.upper) // 2)

    @property
    def uncertainty_ns(self) -> int | None:
        """Half the distance of the bounds; None while there is one bound only."""
        return None if self.lower == float("-inf") else int((self.upper - self.lower) // 2)
