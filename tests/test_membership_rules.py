"""The rules of membership, without processes: a link that says what it is told to, a supervisor that counts."""

from __future__ import annotations

from typing import Any

import pytest

from fldist.runtime.membership import MAX_FAILED_STARTS, Faults, Membership, RunStopped, ids_text
from fldist.runtime.placement import Orphans, Placement
from fldist.wire.link import Event, Joined, Limits, Lost


class Link:
    """Gives events in the order in which they were put in, and None when there is none."""

    survives = "a host may die"

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.connected: set[int] = set()
        self.aborted: list[int] = []

    def next_event(self, timeout_s: float | None) -> Event | None:
        return self.events.pop(0) if self.events else None

    def abort(self, rank: int, reason: str) -> None:
        self.aborted.append(rank)


class Supervisor:
    survives_loss = True

    def __init__(self) -> None:
        self.restarts: list[int] = []
        self.ended: dict[int, str] = {}
        self.able = True

    def explain(self, rank: int, reason: str) -> str:
        return self.ended.pop(rank, reason)

    def killed(self, rank: int) -> bool:
        return True

    def restart(self, rank: int) -> bool:
        self.restarts.append(rank)
        return self.able


class Crowd:
    """Two hosts, four clients."""

    def __init__(self, orphans: Orphans = "adopt", join_s: float = 0.05) -> None:
        self.link, self.supervisor = Link(), Supervisor()
        self.warnings: list[str] = []
        self.placement = Placement([5, 5, 5, 5], [1, 2], False, orphans)
        link: Any = self.link
        self.members = Membership(
            [1, 2], self.placement, link, self.supervisor, Limits(join_s=join_s),
            survives=None, warn=self.warnings.append, kept=lambda: "3 finished rounds are kept", who="FedAvg",
        )  # fmt: skip

    def take(self, event: Event) -> None:
        if isinstance(event, Joined):
            self.members.joined(event)
        elif isinstance(event, Lost):
            self.members.lost(event.rank, event.reason)

    def joins(self, rank: int, files: bool = True) -> None:
        self.link.events.append(Joined(rank, 1, {"files": files}, 0))

    def begun(self) -> Crowd:
        self.joins(1)
        self.joins(2)
        self.members.gather(self.take, partly=False)
        return self

    def assemble(self, everyone: bool = False) -> None:
        self.members.assemble(self.take, lambda: self.members.complete or not everyone)


def test_a_host_that_joins_has_work_from_the_next_round_on() -> None:
    crowd = Crowd().begun()
    crowd.members.lost(1, "gone")
    assert crowd.members.present == [2]
    crowd.take(Joined(1, 2, {"files": True}, 0))
    assert crowd.members.present == [2]
    crowd.assemble()
    assert crowd.members.present == [1, 2]
    assert crowd.supervisor.restarts == [1]
    assert "its clients move to host 2; it comes back" in crowd.warnings[0]


def test_a_host_whose_starts_fail_is_given_up() -> None:
    crowd = Crowd().begun()
    crowd.members.lost(1, "gone")
    for _ in range(5):
        crowd.supervisor.ended[1] = "ended with exit code 1"
        crowd.assemble()
    assert crowd.supervisor.restarts == [1] * MAX_FAILED_STARTS
    assert sum("host 1 does not come back: its last 3 starts failed (ended with exit code 1)" in w
               for w in crowd.warnings) == 1  # fmt: skip


def test_a_host_that_joins_in_between_may_be_started_as_often_as_it_dies() -> None:
    crowd = Crowd().begun()
    for _ in range(20):
        crowd.members.lost(1, "gone")
        crowd.joins(1)
        crowd.assemble()
    assert crowd.supervisor.restarts == [1] * 20
    assert crowd.members.present == [1, 2]


def test_the_last_host_lost_ends_the_run_where_none_comes_back() -> None:
    crowd = Crowd().begun()
    crowd.supervisor.able = False
    crowd.members.lost(1, "gone")
    with pytest.raises(RunStopped, match=r"host 2 lost .gone.; it was the last one; 3 finished rounds are kept"):
        crowd.members.lost(2, "gone")


def test_a_run_without_hosts_waits_as_long_as_join_s() -> None:
    crowd = Crowd().begun()
    crowd.members.lost(1, "gone")
    crowd.members.lost(2, "gone")
    with pytest.raises(RunStopped, match=r"no host came back within 0.05 s \(deadlines.join_s\); 3 finished"):
        crowd.assemble()
    crowd.joins(2)
    crowd.assemble()
    assert crowd.members.present == [2]


def test_everyone_is_waited_for_when_a_round_needs_them() -> None:
    crowd = Crowd("wait").begun()
    crowd.members.lost(1, "gone")
    crowd.joins(1)
    crowd.assemble(everyone=True)
    assert crowd.members.present == [1, 2]
    crowd.members.lost(1, "gone")
    crowd.assemble(everyone=True)  # in vain: the round is tried with those who are here
    assert crowd.members.present == [2]


def test_a_death_that_is_seen_twice_is_one_death() -> None:
    """The link tells of a host that died while it joined, and its process is found ended: one is started, not two."""
    for began in (True, False):
        crowd = Crowd()
        if began:
            crowd.begun().members.lost(1, "gone")
        crowd.supervisor.restarts.clear()
        crowd.supervisor.ended[1] = "killed by SIGKILL"
        crowd.link.events += [Lost(1, "gone")]
        crowd.joins(1)
        crowd.joins(2)
        if began:
            crowd.assemble()
        else:
            crowd.members.gather(crowd.take, partly=False)
        assert crowd.supervisor.restarts == [1]
        assert 1 in crowd.members.present


def test_hosts_that_do_not_join_end_a_new_run_and_not_one_that_goes_on() -> None:
    crowd = Crowd()
    crowd.joins(2)
    with pytest.raises(RunStopped, match=r"hosts \[1\] did not join within 0.05 s"):
        crowd.members.gather(crowd.take, partly=False)
    crowd = Crowd()
    crowd.joins(2)
    crowd.members.gather(crowd.take, partly=True)
    assert crowd.members.present == [2]
    assert crowd.warnings == ["hosts [1] did not join within 0.05 s (deadlines.join_s); the run goes on without them"]
    with pytest.raises(RunStopped, match="did not join"):
        Crowd().members.gather(lambda event: None, partly=True)


def test_a_host_that_sees_other_files_than_the_rest_is_sent_away_for_good() -> None:
    crowd = Crowd().begun()
    crowd.members.lost(1, "gone")
    crowd.joins(1, files=False)
    crowd.assemble()
    assert crowd.link.aborted == [1]
    assert crowd.members.present == [2]
    restarts = len(crowd.supervisor.restarts)
    crowd.members.lost(1, "it does not see the run's directory")
    assert len(crowd.supervisor.restarts) == restarts


def test_how_many_replies_a_call_needs() -> None:
    assert [Faults().needed(n) for n in (0, 1, 9)] == [1, 1, 1]
    assert [Faults(min_replies=3).needed(n) for n in (1, 3, 9)] == [1, 3, 3]
    assert [Faults(min_replies="all").needed(n) for n in (0, 1, 9)] == [1, 1, 9]


def test_long_lists_of_clients_stay_readable() -> None:
    assert ids_text({3, 1}) == "1, 3"
    assert ids_text(range(30)).endswith("19 and 10 more")
