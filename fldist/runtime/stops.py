"""When a run ends before all its rounds are done: at a budget, or at an accuracy. What it has spent, others count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fldist.units import bytes_text, seconds_text, to_bytes

Bytes = Annotated[int, BeforeValidator(to_bytes), Field(gt=0)]


@dataclass(frozen=True)
class Stop:
    """The section `stop`: after the first round in which one of these is reached, the run is finished.

    rounds: as `rounds`, but without changing what stages and schedules make of `rounds`; uplink_bytes, total_bytes:
    encoded bytes of what was delivered, to the server, and both ways (`1.5 MB` may be written); seconds: of setup and
    rounds. Neither bytes nor seconds contain evaluation. accuracy: the round's, so scores are needed.
    """

    rounds: Annotated[int, Field(ge=1)] | None = None
    uplink_bytes: Bytes | None = None
    total_bytes: Bytes | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    accuracy: Annotated[float, Field(gt=0, le=1)] | None = None

    def reached(self, number: int, spent: Mapping[str, Any], accuracy: float | None) -> dict[str, Any] | None:
        """What ends the run after round `number`: `rule, limit, value, round`; None when nothing does.

        spent: `uplink_bytes, downlink_bytes, seconds` so far; accuracy: the round's, None where it was not scored.
        """
        values = {
            "rounds": number,
            "uplink_bytes": spent["uplink_bytes"],
            "total_bytes": spent["uplink_bytes"] + spent["downlink_bytes"],
            "seconds": spent["seconds"],
            "accuracy": accuracy,
        }
        for rule, value in values.items():
            limit = getattr(self, rule)
            if limit is not None and value is not None and value >= limit:
                return {"rule": rule, "limit": limit, "value": value, "round": number}
        return None


def reason_text(stop: Mapping[str, Any]) -> str:
    """What ended a run, in words."""
    rule, limit, value = stop["rule"], stop["limit"], stop["value"]
    if rule == "rounds":
        return f"all {limit} rounds are done"
    if rule == "accuracy":
        return f"accuracy {value:.4f} in round {stop['round']} (stop.accuracy: {limit:g})"
    text = seconds_text if rule == "seconds" else bytes_text
    return f"{text(value)} spent after round {stop['round']} (stop.{rule}: {text(limit)})"
