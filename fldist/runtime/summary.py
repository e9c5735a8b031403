"""Figures over clients: what a round's line says of scores that every client has of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fldist.models.evaluate import Scores


def over_clients(scores: Mapping[int, Scores]) -> dict[str, Any]:
    """Means weighted by samples and equal, and the population standard deviation, of every metric.

    Clients without samples are left out; so is, for one metric, a client whose figure is NaN (an AUC of one class).
    """
    held = [s for s in scores.values() if s.n > 0]
    names = list(held[0].values) if held else []
    summary: dict[str, Any] = {"count": len(held), "n": sum(s.n for s in held), "samples": {}, "equal": {}, "std": {}}
    for name in names:
        pairs = [(s.n, s.values[name]) for s in held if not math.isnan(s.values[name])]
        total = sum(n for n, _ in pairs)
        values = [v for _, v in pairs]
        mean = sum(values) / len(values) if values else float("nan")
        summary["samples"][name] = sum(n * v for n, v in pairs) / total if total else float("nan")
        summary["equal"][name] = mean
        summary["std"][name] = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) if values else float("nan")
    return summary
