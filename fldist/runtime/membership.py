"""The hosts of a run: who is here, who is lost, who comes back, and when a run cannot go on without them.

A host is a rank; each process that joins as that rank is an incarnation of it. Only the round loop uses this: a host
that joins in the middle of a round has work from the next one on. Starting processes is a `Supervisor`'s business
(`launch.py`), where clients go is `Placement`'s, which clients are selected depends on neither.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BeforeValidator, Field

import fldist
from fldist.runtime.device import Seats
from fldist.runtime.placement import Orphans, Placement
from fldist.wire.link import Event, Joined, Limits, ServerLink

log = logging.getLogger("fldist.server")

MAX_FAILED_STARTS = 3
"""A host is not started again after so many starts in a row that did not join."""


class RunStopped(RuntimeError):
    """The run cannot go on; what was finished is kept. The message says why and what to do."""


def _replies(value: Any) -> Any:
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("it must be a number of replies, at least 1, or all")
    return value


@dataclass(frozen=True)
class Faults:
    """What happens when clients or hosts fail (the section `faults`).

    min_replies: accepted replies without which a call, and with it its round, does not count (`all`: of everyone
    who was called); on_quorum_loss: then the state stays as it was and the run goes on (`skip`; not the setup, which
    is done again), the round is done again with the same random draws (`retry`, at most `max_attempts` times in all),
    or the run stops (`stop`); restart: whether a host that has died is started again, where the launcher can; orphans:
    whether other hosts adopt an absent host's clients, or these wait for it and are missing meanwhile.
    """

    min_replies: Annotated[int | Literal["all"], BeforeValidator(_replies)] = 1
    on_quorum_loss: Literal["skip", "retry", "stop"] = "skip"
    max_attempts: Annotated[int, Field(ge=1)] = 10
    restart: Literal["on-failure", "never"] = "on-failure"
    orphans: Orphans = "adopt"

    def needed(self, called: int) -> int:
        """Accepted replies that a call to `called` clients needs."""
        return max(1, called if self.min_replies == "all" else min(self.min_replies, called))


class Supervisor(Protocol):
    """Who started the hosts: what it knows of their ends, and what it does about them."""

    @property
    def survives_loss(self) -> bool:
        """Whether the other ranks live on when a host dies."""

    def explain(self, rank: int, reason: str) -> str:
        """Why a host has ended, in words; an empty text while it lives and `reason` (why the link lost it) is empty."""

    def killed(self, rank: int) -> bool:
        """Whether a host's process was ended by a signal: no fault of its own, as far as can be told."""

    def restart(self, rank: int) -> bool:
        """See to it that a lost host comes back, without waiting for it; False if it will not."""


class Membership:
    """Who of a run's hosts is here.

    survives: why the run ends with the first host that is lost, None where it goes on; warn: tells the user; kept: says
    what is there of a run that has to stop.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        placement: Placement,
        link: ServerLink,
        supervisor: Supervisor,
        limits: Limits,
        *,
        survives: str | None,
        warn: Callable[[str], None],
        kept: Callable[[], str],
        who: str,
        seats: Seats | None = None,
    ) -> None:
        self.ranks = list(ranks)
        self._placement = placement
        self._link = link
        self._supervisor = supervisor
        self._limits = limits
        self._survives = survives
        self._warn = warn
        self._kept = kept
        self._who = who  # the algorithm, for what is said of clients' states
        self._seats = seats  # who has which GPU, where each is one rank's only
        self._began = False
        self._partly = False
        self._coming: set[int] = set()  # absent, and expected back
        self._arrived: set[int] = set()  # joined, and in no round yet
        self._began_waiting = 0.0
        self._starts: dict[int, int] = dict.fromkeys(ranks, 0)  # since it last joined
        self.files = True
        """Whether every host that has joined sees the clients' files in the run's directory."""
        self.about: dict[int, dict[str, str]] = {}
        """By rank: the hostname that a host gave when it last joined, what it calculates on, and the versions that are
        not the server's."""

    @property
    def present(self) -> list[int]:
        """The hosts that have work in this round."""
        return self._placement.alive

    # ---- events
    def joined(self, event: Joined) -> None:
        """A host is ready for calls."""
        rank = event.rank
        unfit = event.info.get("refuses") or (self._seats.take(rank, event.info) if self._seats is not None else None)
        if unfit:
            self._send_away(rank, str(unfit))
            return
        files = self.ranks == [0] or bool(event.info.get("files"))
        if self._began and self.files and not files:
            self._warn(f"host {rank} has joined again, but does not see the run's directory: it is sent away")
            self._starts[rank] = MAX_FAILED_STARTS
            self._link.abort(rank, "it does not see the run's directory")
            return
        self.files = self.files and files
        self._introduce(rank, event.info)
        self._coming.discard(rank)
        self._starts[rank] = 0
        self._arrived.add(rank)
        if self._began:
            self._warn(f"host {rank} has joined again; it has work from the next round on")

    def _introduce(self, rank: int, info: Mapping[str, Any]) -> None:
        """Note where a host is and what it runs on; say so when its versions are not this process's."""
        told, own = info.get("versions"), versions()
        others = {n: str(told.get(n, "unknown"))[:80] for n in own} if isinstance(told, dict) else own
        differing = {name: other for name, other in others.items() if other != own[name]}
        about = {"hostname": str(info.get("hostname", "unknown"))[:255], **differing}
        if "device" in info:
            about["device"] = " ".join(str(info[k])[:80] for k in ("device", "gpu_name") if k in info)
        if differing and self.about.get(rank) != about:
            what = ", ".join(f"{name} {other} (the server {own[name]})" for name, other in differing.items())
            self._warn(
                f"host {rank} on {about['hostname']} has {what}: results may differ, and not only in their last bits"
            )
        self.about[rank] = about

    def _send_away(self, rank: int, reason: str) -> None:
        """Have nothing to do with a host that cannot take part; RunStopped at the start of a run."""
        if not self._began and not self._partly:
            raise RunStopped(f"host {rank} cannot take part: {reason}")
        self._warn(f"host {rank} cannot take part: {reason}: it is sent away")
        self._starts[rank] = MAX_FAILED_STARTS
        self._link.abort(rank, reason)

    def lost(self, rank: int, reason: str, fresh: Collection[int] = ()) -> str:
        """A host is gone; returns why, in full. RunStopped when the run cannot go on without it.

        fresh: clients of which a call was accepted in this round.
        """
        text = self._supervisor.explain(rank, reason)
        log.warning("host %d lost: %s", rank, text)
        if self._seats is not None:
            self._seats.leave(rank)
        self._arrived.discard(rank)
        if not self._began:
            self._lost_at_start(rank, text)
            return text
        state_lost = self._placement.lose(rank, fresh)
        if self._survives is not None:
            raise RunStopped(f"host {rank} lost ({text}); {self._survives}; {self._kept()}")
        if state_lost:
            raise RunStopped(
                f"host {rank} lost ({text}), and with it the state of clients {ids_text(state_lost)}, which "
                f"{self._who} cannot do without; {self._kept()}"
            )
        back = self._restart(rank)
        self._somebody(f"host {rank} lost ({text}); it was the last one")
        fate = "its clients wait for it" if self._placement.waits else f"its clients move to {self._hosts_text()}"
        self._warn(
            f"host {rank} lost ({text}); its replies of this round are missing; "
            f"{fate if self.present else 'no host is left until one is back'}{'; it comes back' if back else ''}"
        )
        return text

    def _hosts_text(self) -> str:
        return f"host{'s' if len(self.present) > 1 else ''} {ids_text(self.present)}"

    def _restart(self, rank: int) -> bool:
        """Have a host started again, unless that is not done or has failed too often."""
        self._coming.discard(rank)
        if self._starts[rank] >= MAX_FAILED_STARTS or not self._supervisor.restart(rank):
            return False
        self._starts[rank] += 1
        self._coming.add(rank)
        return True

    def _somebody(self, otherwise: str) -> None:
        """RunStopped when no host is here and none will come."""
        if not (self.present or self._arrived or self._coming):
            raise RunStopped(f"{otherwise}; {self._kept()}")

    def _look_after(self, take: Callable[[Event], None]) -> None:
        """Take what has happened, and notice hosts that were started again and ended before they joined."""
        starts = dict(self._starts)
        silent = self._coming - self._link.connected
        while (event := self._link.next_event(0.0)) is not None:  # one that had connected has told of its end by now
            take(event)
        for rank in sorted(silent & self._coming):
            why = self._supervisor.explain(rank, "") if self._starts[rank] == starts[rank] else ""
            if why and not self._began:
                self._lost_at_start(rank, why)
            elif why and not self._restart(rank):
                text = f"host {rank} does not come back: its last {MAX_FAILED_STARTS} starts failed ({why})"
                self._warn(text)
                self._somebody(text)

    # ---- waiting
    def gather(self, take: Callable[[Event], None], *, partly: bool) -> None:
        """Wait for all hosts at the start of a run; RunStopped when one does not join in time.

        partly: go on without those that do not join (the run has been under way before). The limit is on hosts of
        which nothing was heard. take: gets every event.
        """
        self._coming, self._partly = set(self.ranks), partly
        self._began_waiting = time.monotonic()
        while self._coming:
            self._next(take)
            silent = sorted(self._coming - self._link.connected)
            if silent and time.monotonic() - self._began_waiting > self._limits.join_s:
                self._give_up(silent, f"within {self._limits.join_s:g} s (deadlines.join_s)")
                break
        self._arrived.clear()
        self._began = True

    def _lost_at_start(self, rank: int, why: str) -> None:
        """A host was lost before all had joined. One that ended by itself would do so again."""
        self._coming.add(rank)
        self._began_waiting = time.monotonic()  # another one is under way
        if self._supervisor.killed(rank) and self._restart(rank):
            self._warn(f"host {rank} was lost while it joined ({why}); it is started again")
            return
        if not self._partly:
            raise RunStopped(f"host {rank} ended before it joined: {why}")
        self._coming.discard(rank)
        self._give_up([rank], f"({why})")

    def _give_up(self, silent: list[int], why: str) -> None:
        """Go on without some hosts; RunStopped for a new run, and where nobody is left."""
        if self._partly:
            for rank in silent:
                self._placement.lose(rank)
        if not self._partly or not self.present:
            raise RunStopped(f"hosts {silent} did not join {why}; are they started, and can they reach this machine?")
        self._warn(f"hosts {silent} did not join {why}; the run goes on without them")

    def assemble(self, take: Callable[[Event], None], also: Callable[[], bool] = lambda: True) -> None:
        """Begin a round: take in who has joined since. Where no host is here, wait for one, as long as join_s.

        also: what else is waited for that long, and no longer.
        """
        self._look_after(take)
        self._somebody("no host is left")
        deadline = time.monotonic() + self._limits.join_s
        while not ((self.present or self._arrived) and also()):
            if time.monotonic() > deadline:
                if self.present or self._arrived:
                    break
                raise RunStopped(
                    f"no host came back within {self._limits.join_s:g} s (deadlines.join_s); {self._kept()}"
                )
            self._next(take)
        for rank in sorted(self._arrived):
            self._placement.join(rank)
        self._arrived.clear()

    def _next(self, take: Callable[[Event], None]) -> None:
        """Wait a moment for the next event, and look after those who are expected."""
        event = self._link.next_event(0.1)
        if event is not None:
            take(event)
        self._look_after(take)

    @property
    def complete(self) -> bool:
        """Whether nobody is absent who is expected back."""
        return not self._coming


def versions() -> dict[str, str]:
    """The versions that decide whether two ranks compute alike."""
    return {"fldist": fldist.__version__, "torch": torch.__version__}


def ids_text(ids: Collection[int]) -> str:
    """A list of ids that stays readable when it is long."""
    ordered = sorted(ids)
    shown = ", ".join(str(i) for i in ordered[:20])
    return shown if len(ordered) <= 20 else f"{shown} and {len(ordered) - 20} more"
