"""Which host does a client's work: balanced by data size, fixed for clients with state, kept within a round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


class Placement:
    """Places clients on hosts.

    Clients with state have a home from the start. Clients without state are placed anew each round among the
    hosts that are alive; after its first call of a round a client stays where it is for that round.
    """

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int], stateful: bool) -> None:
        self.shared_files = False
        """Whether every host can read every client's state: then none is lost with a host."""
        self._sizes = sizes
        self._stateful = stateful
        self._alive = sorted(ranks)
        self._touched: set[int] = set()  # clients whose home holds a state that exists nowhere else
        self._home = balance(range(len(sizes)), sizes, self._alive) if stateful else {}
        self._round: dict[int, int] = {}

    @property
    def alive(self) -> list[int]:
        """The hosts that can be given work."""
        return list(self._alive)

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
        if self._stateful:
            self._round.update({c: self._home[c] for c in new})
        else:
            loads: dict[int, int] = dict.fromkeys(self._alive, 0)
            for client, rank in self._round.items():
                if rank in loads:
                    loads[rank] += self._sizes[client]
            self._round.update(balance(new, self._sizes, self._alive, loads))
        return {c: self._round[c] for c in clients}

    def commit(self, clients: Iterable[int]) -> None:
        """Note clients whose state was committed on their host."""
        if self._stateful:
            self._touched.update(clients)

    def lose(self, rank: int, fresh: Collection[int] = ()) -> list[int]:
        """Take a host out; returns the clients whose state is lost with it. The others find new homes.

        fresh: clients of which a call was accepted in this round; their staged writes are lost as well.
        """
        if rank in self._alive:
            self._alive.remove(rank)
        orphans = [c for c, home in self._home.items() if home == rank]
        lost = [] if self.shared_files else [c for c in orphans if c in self._touched or c in fresh]
        if self._alive:
            loads = dict.fromkeys(self._alive, 0)
            for client, home in self._home.items():
                if home in loads:
                    loads[home] += self._sizes[client]
            self._home.update(balance(set(orphans) - set(lost), self._sizes, self._alive, loads))
        return lost

    def homes(self) -> dict[int, list[int]]:
        """Clients with state, by host."""
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
