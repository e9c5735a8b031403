"""Accuracy against cost, drawn: a panel per task and axis, a line per method, told apart in colour and in grey."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fldist.analysis.compare import Task, mean_curve, natural, shares_chosen
from fldist.analysis.runs import Axis
from fldist.analysis.tables import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which people with any colour vision tell apart, but for yellow, which is faint on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
# counts without a common divisor, so that two methods of one colour have different lines and markers
_LINES: tuple[Any, ...] = ("-", ":", "-.", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (9, 2, 2, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h", "8")
_SILENT = "--"
"""The line of what exchanges nothing; no method with a curve has it."""

_NUM_MARKERS = 8
_COLUMNS = 3
"""Panels beside each other where there is one axis and several tasks."""

LABELS: dict[Axis, str] = {
    "rounds": "rounds",
    "uplink_bytes": "encoded bytes up",
    "total_bytes": "encoded bytes up and down",
    "wire_bytes": "bytes on the wire, up and down",
    "seconds": "seconds of setup and rounds, without evaluation",
    "simulated_seconds": "simulated seconds on the clients' devices",
    "joules": "simulated energy of the clients' devices",
}


def require_ending(path: Path) -> None:
    """ValueError for a file that cannot be drawn."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--plot: {path} must end in {', '.join(ENDINGS)}; got {path.suffix or 'no ending'!r}")


def draw(tasks: Sequence[Task], path: Path, axes: Sequence[Axis], how_often: bool = False) -> None:
    """Draw mean accuracy and a band of one sample standard deviation, at rounds scored for all of a method's seeds.

    Several axes: a row per task and a column per axis; one axis: tasks beside each other. how_often: a column more, of
    how often clients were chosen.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {method.label for task in tasks for method in task.methods}
    wanted: list[Axis | None] = [*axes, None] if how_often else [*axes]
    columns = len(wanted) if len(wanted) > 1 else min(_COLUMNS, len(tasks))
    rows = len(tasks) if len(wanted) > 1 else math.ceil(len(tasks) / columns)
    styles = styles_of(tasks)
    height = max(3.4 * rows, 0.24 * len(labels)) + 0.4  # inches; the legend needs its own
    figure, grid = pyplot.subplots(
        rows, columns, squeeze=False, layout="constrained", figsize=(4.6 * columns + 2.2, height)
    )
    try:
        panels = [panel for row in grid for panel in row]
        for panel, (task, axis) in zip(panels, [(task, axis) for task in tasks for axis in wanted], strict=False):
            if axis is None:
                draw_chosen(panel, task, styles)
            else:
                draw_panel(panel, task, axis, styles)
        for panel in panels[len(tasks) * len(wanted) :]:
            panel.set_axis_off()
        handles = {label: line for panel in panels for line, label in zip(*_legend(panel), strict=True)}
        ordered = sorted(handles, key=natural)
        figure.legend([handles[label] for label in ordered], ordered, loc="outside right upper", handlelength=4.5)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"--plot: {path} cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _legend(panel: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = panel.get_legend_handles_labels()
    return handles, [str(label) for label in labels]


def styles_of(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """How the methods of each label look, in all panels."""
    labels = sorted({method.label for task in tasks for method in task.methods}, key=natural)
    silent = {method.label for task in tasks for method in task.methods if method.exchanges_nothing("total_bytes")}
    return {
        label: {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _SILENT if label in silent else _LINES[number % len(_LINES)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 9 if _MARKERS[number % len(_MARKERS)] == "*" else 6,
        }
        for number, label in enumerate(labels)
    }


def draw_panel(panel: Axes, task: Task, axis: Axis, styles: dict[str, dict[str, Any]]) -> None:
    """Draw one task against one axis; styles as of `styles_of`."""
    curves = {
        method.label: mean_curve(method, axis)
        for method in task.methods
        if method.has(axis) and not method.exchanges_nothing(axis)
    }
    most = max((float(curve.cost[-1]) for curve in curves.values() if len(curve.cost)), default=1.0)
    factor, unit = scale(axis, most)
    for number, method in enumerate(task.methods):
        style = {**styles[method.label], "linewidth": 1.4, "markeredgewidth": 0.5, "markeredgecolor": "white"}
        if not method.has(axis):
            continue
        if method.label not in curves:
            final = float(np.mean(list(method.final.values())))
            across = panel.get_yaxis_transform()  # x from the left edge to the right one, whatever the axis shows
            panel.plot([0, 0.5, 1], [final] * 3, transform=across, label=method.label, **style)
            continue
        curve = curves[method.label]
        every = max(1, math.ceil(len(curve.cost) / _NUM_MARKERS))
        marked = (number % every, every)  # not the same points for all, or markers of close lines hide each other
        panel.plot(curve.cost / factor, curve.accuracy, label=method.label, markevery=marked, **style)
        if not np.isnan(curve.std).all():
            low, high = curve.accuracy - curve.std, curve.accuracy + curve.std
            panel.fill_between(curve.cost / factor, low, high, color=style["color"], alpha=0.13, linewidth=0)
    panel.set_xlim(left=0)
    panel.set_xlabel(f"{LABELS[axis]} ({unit})" if unit else LABELS[axis])
    panel.set_ylabel("accuracy (share of samples)")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_title("\n".join(textwrap.wrap(task.title, 50)), fontsize=9)


def draw_chosen(panel: Axes, task: Task, styles: dict[str, dict[str, Any]]) -> None:
    """Draw in which share of the rounds clients were chosen, the most often chosen first; styles as of `styles_of`."""
    from matplotlib.ticker import MaxNLocator

    for method in task.methods:
        shares = shares_chosen(method)
        if shares is not None:
            style = {**styles[method.label], "linewidth": 1.4, "markeredgewidth": 0.5, "markeredgecolor": "white"}
            every = max(1, math.ceil(len(shares) / _NUM_MARKERS))
            panel.plot(np.arange(1, len(shares) + 1), shares, label=method.label, markevery=every, **style)
    panel.set_ylim(0, 1.03)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("clients, the most often chosen first")
    panel.set_ylabel("share of the rounds in which it was chosen")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_title("\n".join(textwrap.wrap(task.title, 50)), fontsize=9)
