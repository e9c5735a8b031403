"""Which clients took part in which rounds, from a run's messages and its rounds' `missing`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_CALLED, NOT_USED, USED = 0, 1, 2
"""What a client was in a round: not called; called, but no reply of it was used; called and used."""

WHOLE = (200, 120)
"""Up to so many rounds and clients are shown one by one; more are put into bins."""
_BINS = (100, 60)
_COLUMNS = 40
_MOST_CELLS = 50_000_000

_NO_TRAINING = frozenset({"setup", "select", "evaluate"})


class Participation:
    """Fills a table of rounds by clients from rows of messages.jsonl; being asked to score does not count."""

    def __init__(self, num_rounds: int, num_clients: int) -> None:
        if num_rounds * num_clients > _MOST_CELLS:
            raise ValueError(
                f"{num_rounds} rounds of {num_clients} clients are more than the {_MOST_CELLS} cells that are drawn"
            )
        self.table: NDArray[np.uint8] = np.zeros((num_rounds, num_clients), dtype=np.uint8)
        """[rounds, clients]."""

    def see(self, row: dict[str, Any]) -> None:
        """Take a row; those of rounds and clients that the table does not have (an unfinished round) count nowhere."""
        if row.get("row") != "message" or row.get("phase") in _NO_TRAINING:
            return
        number, client = row.get("round"), row.get("client")
        rounds, clients = self.table.shape
        if not (isinstance(number, int) and isinstance(client, int) and 0 < number <= rounds and 0 <= client < clients):
            return
        state = USED if row.get("direction") == "up" and row.get("status") == "delivered" else NOT_USED
        self.table[number - 1, client] = max(state, self.table[number - 1, client])

    def missing(self, lines: Iterable[dict[str, Any]]) -> None:
        """Take the lines of rounds.jsonl, last: who is `missing` was called and not used, whatever has arrived."""
        rounds, clients = self.table.shape
        for line in lines:
            for client in line.get("missing") or ():
                if client.isdecimal() and int(client) < clients and 0 < line["round"] <= rounds:
                    self.table[line["round"] - 1, int(client)] = NOT_USED

    def shown(self) -> dict[str, Any] | None:
        """What the page draws, at most some 100 kB; None when nobody was called."""
        used, unused = self.table == USED, self.table == NOT_USED
        if not self.table.any():
            return None
        rounds, clients = self.table.shape
        often = used.sum(axis=0)
        shown: dict[str, Any] = {
            "rounds": rounds,
            "clients": clients,
            "called": int(used.sum() + unused.sum()),
            "unused": int(unused.sum()),
            "least": int(often.min()),
            "median": float(np.median(often)),
            "most": int(often.max()),
        }
        if rounds <= WHOLE[0] and clients <= WHOLE[1]:
            shown["cells"] = ["".join(map(str, column)) for column in self.table.T.tolist()]
        else:
            of_rounds, of_clients = _edges(rounds, _BINS[0]), _edges(clients, _BINS[1])
            shown["bins"] = {
                "rounds": (of_rounds + 1).tolist(),
                "clients": of_clients.tolist(),
                "used": _binned(used, of_rounds, of_clients).tolist(),
                "unused": _binned(unused, of_rounds, of_clients).tolist(),
            }
        if clients <= WHOLE[1]:
            shown["by_client"] = {"used": often.tolist(), "unused": unused.sum(axis=0).tolist()}
        else:
            step = max(1, -(-(int(often.max()) + 1) // _COLUMNS))
            counts = np.bincount(often // step)
            shown["histogram"] = {"step": step, "clients": counts.tolist()}
        return shown


def _edges(count: int, bins: int) -> NDArray[np.int64]:
    """The first index of every bin and, at the end, `count`."""
    return np.unique(np.linspace(0, count, min(bins, count) + 1).astype(np.int64))


def _binned(cells: NDArray[np.bool_], rounds: NDArray[np.int64], clients: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many cells of each bin are set. [clients' bins, rounds' bins]."""
    summed = np.add.reduceat(cells.astype(np.int64), rounds[:-1], axis=0)
    return np.asarray(np.add.reduceat(summed, clients[:-1], axis=1).T, dtype=np.int64)
