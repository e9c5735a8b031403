"""The part of a run's timeline that a page can hold: some rounds, with spans joined where there are too many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fldist.analysis.timeline import KINDS, SERVER, Clock, Lane, Round, Span, coarsen, covered_ns

SPANS = 4000
"""About so many spans of a run are in the page."""
ROUNDS = 24
LANES = 33


def shown_rounds(rounds: Sequence[dict[str, Any]]) -> set[int]:
    """Numbers of the rounds whose spans are in the page: the first, the last, the slowest; fewer of large rounds."""
    expected = 7 * float(np.median([line["selected"] for line in rounds])) + 10
    count = int(min(ROUNDS, max(3, SPANS // expected)))
    numbers = [line["round"] for line in rounds]
    if len(numbers) <= count:
        return {0, *numbers}
    chosen = {0, *numbers[: (count + 1) // 2], *numbers[len(numbers) - count // 4 :]}
    for line in sorted(rounds, key=lambda line: -line["seconds"]["total"]):
        if len(chosen) > count:  # setup is one more
            break
        chosen.add(line["round"])
    return chosen


class Excerpt:
    """Watches rounds go by: keeps those that are shown, adds up what each lane did in all."""

    def __init__(self, numbers: set[int]) -> None:
        self._numbers = numbers
        self._rounds: dict[int, Round] = {}
        self._busy: dict[Lane, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._total_ns = 0
        self._unmeasured = 0

    def watch(self, rounds: Iterable[Round]) -> Iterator[Round]:
        """The same rounds."""
        known: set[int] = set()
        for of in rounds:
            if of.number not in known:
                self._total_ns += of.end_ns - of.begin_ns
                self._unmeasured += not of.measured
            known.add(of.number)
            by: dict[tuple[Lane, str], list[Span]] = defaultdict(list)
            for span in of.spans:
                by[span.lane, span.kind].append(span)
            for (lane, kind), spans in by.items():
                self._busy[lane][kind] += covered_ns(spans)
            if of.number in self._rounds:
                self._rounds[of.number].spans += of.spans
            elif of.number in self._numbers:
                self._rounds[of.number] = of
            yield of

    def shown(self, names: dict[int, str], last: int) -> dict[str, Any]:
        """What the page gets. names: machines by rank; last: the number of the run's last round."""
        lanes = sorted({SERVER, *self._busy})
        left_out = lanes[LANES:]
        lanes = lanes[:LANES]
        index = {lane: number for number, lane in enumerate(lanes)}
        rounds = [self._rounds[number] for number in sorted(self._rounds) if number or self._rounds[number].spans]
        budget, joined, shown = SPANS // max(1, len(rounds)), False, []
        for of in rounds:
            here = [span for span in of.spans if span.lane in index]
            spans = coarsen(here, budget)
            joined |= len(spans) < len(here)
            shown.append({
                "number": of.number,
                "begin_us": of.begin_ns // 1000,
                "end_us": of.end_ns // 1000,
                "clocks": {str(rank): _clock(of.clocks[rank]) for rank in sorted(of.clocks)},
                "spans": [_span(span, of.begin_ns, index) for span in spans],
            })  # fmt: skip
        notes = []
        if left_out:
            notes.append(f"{len(left_out)} more hosts are not drawn here; all are in the trace")
        if joined:
            notes.append(
                "bars that lie close together are drawn as one, as much lower as there was nothing between them; the "
                "trace has each of them"
            )
        if self._unmeasured:
            notes.append(
                f"timeline.jsonl lacks {self._unmeasured} rounds; the server's own spans of these are not known"
            )
        if Lane(0, True) in lanes:
            notes.append("server and host are one process here: they have two lanes, and do one thing at a time")
        return {
            "lanes": [{"label": _lane(lane, names)} for lane in lanes],
            "kinds": KINDS,
            "rounds": shown,
            "busy": [{kind: ns / 1e9 for kind, ns in self._busy[lane].items()} for lane in lanes],
            "seconds": max(self._total_ns, 1) / 1e9,
            "hint": f"This page holds {_ranges([of.number for of in rounds if of.number])} of {last}.",
            "notes": notes,
        }


def _span(span: Span, begin_ns: int, index: dict[Lane, int]) -> list[Any]:
    """[lane, kind, begin and length in µs, whose, wire bytes, and the share in which it went on where it is not 1]."""
    begin, end = (span.begin_ns - begin_ns) // 1000, (span.end_ns - begin_ns) // 1000
    whose = ""
    if len(span.clients) == 1:
        whose = f"client {span.clients[0]}"
    elif span.clients:
        more = ", ..." if len(span.clients) > 8 else ""
        whose = f"{len(span.clients)} clients: {', '.join(map(str, span.clients[:8]))}{more}"
    if span.phase not in ("", "train", "evaluate"):
        whose += f" ({span.phase})"
    told = [index[span.lane], KINDS.index(span.kind), begin, end - begin, whose, span.wire_bytes]
    return [*told, round(1 - span.idle_ns / (span.end_ns - span.begin_ns), 3)] if span.idle_ns else told


def _clock(clock: Clock) -> list[float | None]:
    """[offset and uncertainty in µs]."""
    unsure = clock.uncertainty_ns
    return [clock.offset_ns / 1e3, None if unsure is None else unsure / 1e3]


def _lane(lane: Lane, names: dict[int, str]) -> str:
    at = f" ({names[lane.rank]})" if lane.rank in names and lane.rank else ""
    if not lane.host:
        return "server"
    return f"host {lane.rank}{at}" if lane.rank else "host, in the same process"


def _ranges(numbers: Sequence[int]) -> str:
    """`rounds 1 to 12, 40 and 95 to 100`."""
    if not numbers:
        return "no round"
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    texts = [str(of[0]) if len(of) == 1 else f"{of[0]} to {of[-1]}" for of in found]
    listed = texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    return f"round{'s' if len(numbers) > 1 else ''} {listed}"
