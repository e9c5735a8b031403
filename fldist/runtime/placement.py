"""Which host does a client's work: balanced by data size, fixed for clients with state, kept within a round."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

Orphans = Literal["adopt", "wait"]
"""What becomes of the clients of a lost host: other hosts take them, or they wait until it is back."""


class Placement:
    """Places clients on hosts.

    Clients with state, and those that wait for a lost host, have a home from the start. Others are placed anew each
    round among the hosts that are alive; after its first call of a round a client stays where it is for that round.
    """

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int], stateful: bool, orphans: Orphans = "adopt") -> None:
        self.shared_files = False
        """Whether every host can read every client's state: then none is lost with a host."""
        self._sizes = sizes
        self._stateful = stateful
        self._orphans = orphans
        self._alive = sorted(ranks)
        self._touched: set[int] = set()  # clients whose home holds a state that exists nowhere else
        homes = stateful or orphans == "wait"
        self._home = balance(range(len(sizes)), sizes, self._alive) if homes else {}
        self._round: dict[int, int] = {}

    @property
    def alive(self) -> list[int]:
        """The hosts that can be given work."""
        return list(self._alive)

    @property
    def waits(self) -> bool:
        """Whether the clients of a lost host wait for it."""
        return self._orphans == "wait"

    @property
    def this_round(self) -> dict[int, int]:
        """The host of every client that was called in this round."""
        return dict(self._round)

    def begin_round(self) -> None:
        """Forget where clients without state were."""
        self._round.clear()

    def place(self, clients: Sequence[int]) -> dict[int, int]:
        """The host of each client; every client of a lost host keeps that host for the rest of the round."""
        new = [c for c in clients if c not in self._round]
        if self._home:
            self._round.update({c: self._home[c] for c in new})
        else:
            loads: dict[int, int] = dict.fromkeys(self._alive, 0)
            for client, rank in self._round.items():
                if rank in loads:
                    loads[rank] += self._sizes[client]
            self._round.update(balance(new, self._sizes, self._alive, loads))
        return {c: self._round[c] for c in clients}

    @property
    def moves(self) -> bool:
        """Whether another host may do a client's work, at its first call of a round."""
        return not self._home

    def new(self, clients: Iterable[int]) -> set[int]:
        """Those that have not been called in this round."""
        return {c for c in clients if c not in self._round}

    def move(self, clients: Iterable[int], rank: int) -> None:
        """Another host than the one they were placed on has these clients for the rest of the round."""
        self._round.update(dict.fromkeys(clients, rank))

    def commit(self, clients: Iterable[int]) -> None:
        """Note clients whose state was committed on their host."""
        if self._stateful:
            self._touched.update(clients)

    def lose(self, rank: int, fresh: Collection[int] = ()) -> list[int]:
        """Take a host out; returns the clients whose state is lost with it. The others find new homes, or wait.

        fresh: clients of which a call was accepted in this round; their staged writes are lost as well.
        """
        if rank in self._alive:
            self._alive.remove(rank)
        orphans = [c for c, home in self._home.items() if home == rank]
        lost = [c for c in orphans if c in self._touched or c in fresh] if self._bound else []
        if self._alive and self._orphans == "adopt":
            loads = dict.fromkeys(self._alive, 0)
            for client, home in self._home.items():
                if home in loads:
                    loads[home] += self._sizes[client]
            self._home.update(balance(set(orphans) - set(lost), self._sizes, self._alive, loads))
        return lost

    def join(self, rank: int) -> None:
        """Take a host in, between rounds. Under `adopt` clients are placed as if it had been there from the start."""
        if rank in self._alive:
            return
        bisect.insort(self._alive, rank)
        if not self._home or self._orphans == "wait":
            return
        stay = {c: self._home[c] for c in self._touched} if self._bound else {}
        loads = dict.fromkeys(self._alive, 0)
        for client, home in stay.items():
            loads[home] += self._sizes[client]
        others = [c for c in self._home if c not in stay]
        self._home = {**stay, **balance(others, self._sizes, self._alive, loads)}

    @property
    def _bound(self) -> bool:
        """Whether a client's state is nowhere but at its home."""
        return self._stateful and not self.shared_files

    def homes(self) -> dict[int, list[int]]:
        """Clients with a home, by host."""
        result: dict[int, list[int]] = {}
        for client, rank in sorted(self._home.items()):
            result.setdefault(rank, []).append(client)
        return result


def balance(
    clients: Iterable[int], sizes: Sequence[int], ranks: Sequence[int], loads: dict[int, int] | None = None
) -> dict[int, int]:
    """Largest first, each to the host with the least samples so far; ties to the lower rank."""
    loads = dict(loads) if loads is not None else dict.fromkeys(ranks, 0)
    placed = {}
    for client in sorted(clients, key=lambda c: (-sizes[c], c)):
        rank = min(ranks, key=lambda r: (loads[r], r))
        placed[client] = rank
        loads[rank] += sizes[client]
    return placed
