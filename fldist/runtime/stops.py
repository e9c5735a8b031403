"""When a run ends before all its rounds are done: at a budget, at an accuracy, or when that does not grow any more.

What it has spent, others count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fldist.units import bytes_text, joules_text, seconds_text, to_bytes

Bytes = Annotated[int, BeforeValidator(to_bytes), Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Stop:
    """The section `stop`: after the first round in which one of these is reached, the run is finished.

    rounds: as `rounds`, but without changing what stages and schedules make of `rounds`; uplink_bytes, total_bytes:
    encoded bytes of what was delivered, to the server, and both ways (`1.5 MB` may be written); seconds: of setup and
    rounds; simulated_seconds, joules: what these took on the clients' devices, where the section `devices` simulates
    them. None of these contains evaluation. accuracy: the round's, so scores are needed. patience: so many scored
    rounds in a row were not better than the best one before them.
    """

    rounds: Annotated[int, Field(ge=1)] | None = None
    uplink_bytes: Bytes | None = None
    total_bytes: Bytes | None = None
    seconds: Positive | None = None
    simulated_seconds: Positive | None = None
    joules: Positive | None = None
    accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None

    def reached(
        self, number: int, spent: Mapping[str, Any], accuracy: float | None, before: Sequence[float] = ()
    ) -> dict[str, Any] | None:
        """What ends the run after round `number`: `rule, limit, value, round`; None when nothing does.

        spent: `uplink_bytes, downlink_bytes, seconds` so far, and `simulated_seconds, joules` where they are simulated;
        accuracy: the round's, None where it was not scored; before: those of the earlier rounds that were scored, in
        order.
        """
        values = {
            "rounds": number,
            "uplink_bytes": spent["uplink_bytes"],
            "total_bytes": spent["uplink_bytes"] + spent["downlink_bytes"],
            "seconds": spent["seconds"],
            "simulated_seconds": spent.get("simulated_seconds"),
            "joules": spent.get("joules"),
            "accuracy": accuracy,
            "patience": None if accuracy is None else since_best([*before, accuracy]),
        }
        for rule, value in values.items():
            limit = getattr(self, rule)
            if limit is not None and value is not None and value >= limit:
                return {"rule": rule, "limit": limit, "value": value, "round": number}
        return None


def since_best(accuracies: Sequence[float]) -> int:
    """How many scored rounds there were after the first best one; NaN is never better. 0 without any."""
    best, since = -1.0, 0
    for accuracy in accuracies:
        better = accuracy > best
        best, since = (accuracy, 0) if better else (best, since + 1)
    return since


def reason_text(stop: Mapping[str, Any]) -> str:
    """What ended a run, in words."""
    rule, limit, value = stop["rule"], stop["limit"], stop["value"]
    if rule == "rounds":
        return f"all {limit} rounds are done"
    if rule == "accuracy":
        return f"accuracy {value:.4f} in round {stop['round']} (stop.accuracy: {limit:g})"
    if rule == "patience":
        rounds = "1 scored round" if value == 1 else f"{value} scored rounds"
        return f"no better accuracy in {rounds} up to round {stop['round']} (stop.patience: {limit})"
    text = _TEXTS.get(rule, bytes_text)
    return f"{text(value)} spent after round {stop['round']} (stop.{rule}: {text(limit)})"


_TEXTS = {
    "seconds": seconds_text,
    "simulated_seconds": lambda seconds: f"{seconds_text(seconds)} of devices",
    "joules": joules_text,
}
