"""What the server half of an algorithm calls: some clients, and what a call to them gave. Who makes the call, and how,
is `caller.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fldist.fold import Fold
from fldist.runtime.job import REPORT, ClientMethod
from fldist.selection import ClientReport


class Replies:
    """See `fldist.algorithm.Replies`."""

    def __init__(
        self, values: dict[str, Any], clients: list[int], missing: dict[int, str], seconds: dict[int, float]
    ) -> None:
        told = values.pop(REPORT.name, {})
        fits = {c: t for c, t in told.items() if t is not None and t.shape == (len(ClientReport._fields),)}
        self.reports = {c: ClientReport(*map(float, tensor)) for c, tensor in fits.items()}
        self._values = values
        self.clients = clients
        self.missing = missing
        self.seconds = seconds

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            known = ", ".join(self._values) or "no fields"
            raise AttributeError(f"the replies have no {name!r}; they have {known}") from None


class CallsClients(Protocol):
    """What a cohort needs of a caller."""

    reports: dict[int, ClientReport]
    """The latest report of every client that has given one, where the selector wants reports."""

    @property
    def called_s(self) -> float:
        """Seconds of this round's calls so far."""

    def call(
        self,
        ids: Sequence[int],
        method: Callable[..., Any] | ClientMethod,
        fold: dict[str, Fold],
        phase: str | None,
        arguments: dict[str, Any],
    ) -> Replies:
        """Call a client method on these clients."""


class Cohort:
    """Some clients and the caller that reaches them."""

    def __init__(self, caller: CallsClients, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._caller = caller

    def call(
        self,
        method: Callable[..., Any],
        *,
        fold: Mapping[str, Fold] | None = None,
        phase: str | None = None,
        **arguments: Any,
    ) -> Replies:
        """See `fldist.algorithm.Cohort.call`."""
        return self._caller.call(self.ids, method, dict(fold or {}), phase, arguments)
