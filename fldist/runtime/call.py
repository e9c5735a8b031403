"""One call under way: what it sends to whom, and what has come of it so far. Who waits for what is `caller.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fldist.fold import Fold
from fldist.kinds import HELD, Once
from fldist.runtime.folding import Folds, argument_for, plain
from fldist.runtime.job import ClientMethod, Job
from fldist.runtime.once import OnceTable, size_of
from fldist.runtime.sharing import Shares
from fldist.wire.codec import Frame, FrameBuilder, Head, Message
from fldist.wire.ledger import Booked, Kinds
from fldist.wire.link import Received


@dataclass
class Call:
    """One call under way."""

    job: Job
    spec: ClientMethod
    phase: str
    folds: Folds
    arguments: dict[str, Any]
    outstanding: dict[int, int] = field(default_factory=dict)  # client -> rank
    missing: dict[int, str] = field(default_factory=dict)
    replied: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)  # hosts that took no frame: their `Lost` is on its way
    shares: Shares = field(init=False)
    common: list[str] = field(default_factory=list)  # arguments that are large, and the same for all
    told: dict[str, Any] = field(default_factory=dict)  # under `reduce`: how hosts fold
    held: list[Received] = field(default_factory=list)  # under `collective`: replies whose parts are still to come
    arrived: dict[int, int] = field(default_factory=dict)  # client -> rank, of these
    folded: list[Booked] = field(default_factory=list)  # replies that were accepted
    first: dict[int, int] = field(default_factory=dict)  # by host: the first client it was given
    posted: dict[int, int] = field(default_factory=dict)  # client -> when its message was handed to the link, in ns
    down: dict[int, int] = field(default_factory=dict)  # client -> logical bytes of its message
    up: dict[int, int] = field(default_factory=dict)  # and of its reply

    @property
    def open(self) -> list[int]:
        """Clients of which neither a reply has come nor is known that none will."""
        return sorted([*self.outstanding, *self.shares.waiting])

    @property
    def once(self) -> dict[str, Once[Any]]:
        """The arguments that are given as `Once`, by name."""
        return {name: a for name, a in self.arguments.items() if isinstance(a, Once)}

    def frame(
        self, head: Head, table: OnceTable, rank: int, clients: list[int], held: bool = False, broadcast: bool = False
    ) -> tuple[Frame, dict[int, Kinds]]:
        """A host's frame of the call, and what is booked with each client's message whether or not it travels there.

        held: the host has got what is common already; broadcast: it gets it together with all others.
        """
        spec, arguments, once = self.spec, self.arguments, self.once
        builder = FrameBuilder(head, share=self.job.share, layout=self.job.layout)
        if broadcast:
            builder.broadcast(spec.call, {name: plain(arguments[name]) for name in self.common})
        given: dict[int, Kinds] = {}
        for client in clients:
            values = [argument_for(arguments[f.name], client, f.name) for f in spec.call.fields]
            kinds = table.hold_back(rank, spec.name, spec.call.fields, client, once, values) if once else {}
            for index, field_ in enumerate(spec.call.fields):
                if held and field_.name in self.common:
                    size, before = size_of(values[index]), kinds.get(field_.kind, (0, 0))
                    kinds[field_.kind] = (before[0] + size, before[1] + size)
                    values[index] = HELD
            given[client] = kinds
            builder.add(Message(client), spec.call, values, {name: a.version for name, a in once.items()})
        if names := {argument: a.name for argument, a in once.items() if a.name is not None}:
            builder.frame.note["once"] = names
        return builder.frame, given


def check_names(spec: ClientMethod, fold: Mapping[str, Fold], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments and folds that a client method does not have: ValueError."""
    names = [f.name for f in spec.call.fields]
    if set(arguments) != set(names):
        raise ValueError(f"{spec.name} takes the arguments {names}; it was called with {sorted(arguments)}")
    unknown = set(fold) - {f.name for f in spec.reply.fields}
    if unknown:
        raise ValueError(
            f"{spec.name} has no reply field {sorted(unknown)}; it has {[f.name for f in spec.reply.fields]}"
        )
