"""Work that hosts of one machine take over from each other: which clients of a call a host is given, and when.

A client without state, at its first call of a round, may be done by any host of the machine it was placed on. Of such
clients every host is given a few at first, the largest first, and some more whenever it has nearly done; the portions
become smaller towards the end, so that the hosts finish together. Nothing here knows frames or replies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

PORTION_S = 0.01
"""Least work in a portion, in seconds: below this, handing it out costs more than it evens out."""
PORTIONS = 4
"""Into how many portions for each host what is left would be divided: one that is so many times slower than the others
does not keep them waiting with its first."""
AHEAD = 1
"""Clients that a host still has when it is given the next portion, so that it need not wait for it."""


class Shares:
    """Who is given which clients of one call. machines: by host, the machine that it runs on."""

    def __init__(
        self,
        placed: Mapping[int, int],
        free: Collection[int],
        machines: Mapping[int, str],
        sizes: Sequence[int],
        seconds: float | None,
    ) -> None:
        """placed: host by client; free: clients that another host of the machine may do; sizes: samples by client;
        seconds: what a client of this call takes, None where it is not known."""
        self._machines = dict(machines)
        self._seconds = seconds
        self._fixed: dict[int, list[int]] = {}
        self._pools: dict[str, list[int]] = {}  # by machine: clients that nobody has yet, the smallest first
        hosts: dict[str, int] = {}
        for machine in self._machines.values():
            hosts[machine] = hosts.get(machine, 0) + 1
        for client, rank in placed.items():
            machine = self._machines[rank]
            if client in free and hosts[machine] > 1:
                self._pools.setdefault(machine, []).append(client)
            else:
                self._fixed.setdefault(rank, []).append(client)
        for pool in self._pools.values():
            pool.sort(key=lambda c: (sizes[c], -c))

    @property
    def waiting(self) -> list[int]:
        """The clients that nobody has been given yet."""
        return sorted([c for ids in self._fixed.values() for c in ids] + [c for p in self._pools.values() for c in p])

    def first(self) -> dict[int, list[int]]:
        """What every host is given at once: what only it may do, and its first portion."""
        given, self._fixed = self._fixed, {}
        ranks = sorted(self._machines)
        portions = {rank: self._portion(rank, AHEAD + 1) for rank in ranks}  # before anybody takes one: all alike
        for rank in ranks:
            taken = self._take(rank, portions[rank])
            if taken:
                given.setdefault(rank, []).extend(taken)
        return {rank: sorted(clients) for rank, clients in sorted(given.items())}

    def next(self, rank: int, has: int) -> list[int]:
        """What a host is given that still has so many clients to do."""
        return sorted(self._take(rank, self._portion(rank))) if has <= AHEAD else []

    def lose(self, rank: int) -> list[int]:
        """Take a host out; returns the clients that nobody is left to do on its machine."""
        machine = self._machines.pop(rank, None)
        if machine is None or machine in self._machines.values():
            return []
        return sorted(self._pools.pop(machine, []))

    def _portion(self, rank: int, least: int = 1) -> int:
        machine = self._machines.get(rank)
        left = len(self._pools.get(machine, ())) if machine is not None else 0
        if not left:
            return 0
        hosts = sum(m == machine for m in self._machines.values())
        even = -(-left // hosts)
        worthwhile = int(PORTION_S / self._seconds) if self._seconds else 0
        return min(even, max(least, left // (PORTIONS * hosts), worthwhile))

    def _take(self, rank: int, count: int) -> list[int]:
        pool = self._pools.get(self._machines.get(rank, ""), [])
        return [pool.pop() for _ in range(min(count, len(pool)))]
