"""What the server did in a round, and when: a line of timeline.jsonl. What hosts did is in the ledger's times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fldist.runtime.caller import RoundFacts
from fldist.runtime.clocks import Clock

Span = tuple[float, float]

_TOGETHER_S = 50e-6
"""Spans of one kind that are no farther apart are told as one: there is one for every reply."""


def line(
    number: int,
    attempt: int,
    began_s: float,
    ended_s: float,
    facts: RoundFacts,
    evaluated: Span | None,
    scoring: RoundFacts | None,
    clocks: Mapping[int, Clock],
) -> dict[str, Any]:
    """A round's line. All times are of `time.monotonic`; facts, scoring: of the calls of training and of evaluation."""
    spans = [("server", *span) for span in outside((facts.began_s, facts.ended_s), facts.calls)]
    spans += [("encode", *span) for span in merged(facts.encoded)]
    if evaluated is not None and evaluated[1] > evaluated[0]:
        spans.append(("evaluate", *evaluated))
    if scoring is not None:
        spans += [("encode", *span) for span in merged(scoring.encoded)]
    return {
        "round": number,
        "attempt": attempt,
        "began_ns": round(began_s * 1e9),
        "ended_ns": round(ended_s * 1e9),
        "unix_ns": time.time_ns() - round((time.monotonic() - began_s) * 1e9),
        "spans": [
            [kind, round((begin - began_s) * 1e9), round((end - began_s) * 1e9)]
            for kind, begin, end in sorted(spans, key=lambda span: (span[1], -span[2]))
        ],
        "clocks": {
            str(rank): {"offset_ns": clock.offset_ns, "uncertainty_ns": clock.uncertainty_ns}
            for rank, clock in sorted(clocks.items())
        },
    }


def outside(whole: Span, parts: Sequence[Span]) -> list[Span]:
    """What is left of a span without the parts, which are in order and do not overlap."""
    left, at = [], whole[0]
    for begin, end in parts:
        if begin > at:
            left.append((at, begin))
        at = max(at, end)
    if whole[1] > at:
        left.append((at, whole[1]))
    return left


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those joined between which there is next to nothing."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] <= _TOGETHER_S:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
