"""Figures over clients: what a round's line says of scores that every client has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fldist.models.evaluate import Scores


def over_clients(scores: Mapping[int, Scores]) -> dict[str, Any]:
    """Means weighted by samples and equal, and the population standard deviation, of every metric.

    Clients without samples are left out; so is, for one metric, a client whose figure is NaN.
    """
    held = [s for s in scores.values() if s.n > 0]
    names = list(held[0].values) if held else []
    summary: dict[str, Any] = {"count": len(held), "n": sum(s.n for s in held), "samples": {}, "equal": {}, "std": {}}
    for name in names:
        values = np.array([s.values[name] for s in held], dtype=np.float64)
        known = ~np.isnan(values)
        values, weights = values[known], np.array([s.n for s in held], dtype=np.float64)[known]
        with np.errstate(all="ignore"):  # figures are clients' claims: absurd ones give inf or NaN, not an error
            figures = (
                (np.average(values, weights=weights), values.mean(), values.std()) if len(values) else (np.nan,) * 3
            )
        for kind, figure in zip(("samples", "equal", "std"), figures, strict=True):
            summary[kind][name] = float(figure)
    return summary


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The first's means, as `over_clients` gives them, less the other's: `samples` and `equal`, of every metric."""
    kinds = ("samples", "equal")
    return {k: {name: value - other[k][name] for name, value in one[k].items() if name in other[k]} for k in kinds}
