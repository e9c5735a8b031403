"""Comparisons as plain text for people, and as a CSV file with a row per task, method and measure.

Tables are as wide as they must be: labels are never cut, and columns that do not fit stand in a second table below.
"""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fldist.analysis.cautions import cautions, few, of_intervals
from fldist.analysis.compare import (
    Budget,
    Chosen,
    Figure,
    Final,
    Interval,
    Method,
    Needed,
    Reached,
    Task,
    axes_of,
    baseline_of,
    budgets_of,
    chooses,
    chosen,
    default_targets,
    figure,
    figures_of,
    front,
    needed,
    paired,
    ratio,
    reached,
    reasons,
    spread,
)
from fldist.analysis.runs import AXES, SIMULATED, Axis

WIDTH = 118
NAMES: dict[Axis, str] = {
    "rounds": "rounds",
    "uplink_bytes": "uplink",
    "total_bytes": "total",
    "wire_bytes": "wire",
    "seconds": "seconds",
    "simulated_seconds": "simulated",
    "joules": "joules",
}
_OTHER_UNITS: dict[Axis, str] = {"seconds": "s", "simulated_seconds": "s", "joules": "J"}
UNITS: dict[Axis, str] = {axis: "B" if axis.endswith("_bytes") else "rounds" for axis in AXES} | _OTHER_UNITS


_LARGE = 1e4
"""Figures of algorithms from here on are in scientific notation."""


# ---- numbers
def quantity(axis: Axis, value: float, std: float | None = None) -> str:
    """An amount of an axis in a unit that suits, four digits of it; with a deviation (NaN: a dash) in the same unit."""
    factor, unit = scale(axis, value)
    scaled = value / factor
    if factor == 1 and std is None and value == int(value):
        decimals = 0
    elif axis == "rounds":
        decimals = 1
    else:
        decimals = 0 if unit == "B" else max(0, 4 - len(str(int(scaled))))
    text = f"{scaled:.{decimals}f}"
    if std is not None:
        text += " ± -" if math.isnan(std) else f" ± {std / factor:.{decimals}f}"
    return f"{text} {unit}".rstrip()


def scale(axis: Axis, value: float) -> tuple[float, str]:
    """The unit that suits an amount of an axis, and how much of the axis it is."""
    if axis == "rounds":
        return 1.0, ""
    if axis in ("seconds", "simulated_seconds"):
        return (3600.0, "h") if value >= 7200 else (60.0, "min") if value >= 600 else (1.0, "s")
    base = "J" if axis == "joules" else "B"
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((factor, f"{prefix}{base}") for factor, prefix in units if value >= factor), (1.0, base))


def _amount(budget: Budget) -> str:
    """A budget as `--at` takes it."""
    amount = int(budget.amount) if budget.amount == int(budget.amount) else budget.amount
    return f"{budget.axis}={amount}"


def _accuracy(found: Reached, num_seeds: int) -> str:
    count = len(found.values)
    if not count:
        return f"none of {num_seeds}"
    deviation = "-" if math.isnan(found.std) else f"{found.std:.4f}"
    return f"{found.mean:.4f} ± {deviation}" + (f" ({count} of {num_seeds})" if count < num_seeds else "")


def _difference(found: Interval, num_pairs: int) -> str:
    count = len(found.values)
    if not count:
        return "-"
    told = "[-]" if math.isnan(found.lower) else f"[{found.lower:+.4f}, {found.upper:+.4f}]"
    fewer = f" n={count}" if count < num_pairs else ""
    return f"{found.mean:+.4f} {told}{fewer} {'*' if found.excludes(0) else ' '}"


def _ratio(found: Interval) -> str:
    if not found.values:
        return "-"
    told = "[-]" if math.isnan(found.lower) else f"[{found.lower:.3f}, {found.upper:.3f}]"
    return f"{found.mean:.3f} {told} {'*' if found.excludes(1) else ' '}"


def _cost(axis: Axis, found: Needed) -> str:
    if not found.values:
        return "-"
    if not found.not_reached:
        return quantity(axis, found.mean, found.std)
    if found.not_reached < len(found.values):
        bound = " <=" if found.median_is_bound else ""
        return "-" if math.isnan(found.median) else f"median{bound} {quantity(axis, found.median)}"
    return f"(by {quantity(axis, found.limit)})"


def _figure(found: Figure, num_seeds: int) -> str:
    count = len(found.values)
    if not count:
        return "-"
    if found.not_finite not in {0, count}:
        return f"none in {found.not_finite} of {count}"
    mean = math.nan if found.not_finite else float(np.mean(found.finite))
    told = "none" if found.not_finite else f"{mean:.3e}" if abs(mean) >= _LARGE else f"{mean:.4g}"
    return told + (f" ({count} of {num_seeds})" if count < num_seeds else "")


# ---- text
def grid(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; a header may have several lines.

    Columns that do not fit into the width stand below, with the first column again; nothing is cut.
    """
    heads = [cell.split("\n") for cell in header]
    widths = [max(len(text) for text in (*head, *(row[column] for row in rows))) for column, head in enumerate(heads)]
    portions: list[list[int]] = []
    for column in range(1, len(header)):
        if not portions or widths[0] + sum(widths[c] + 2 for c in portions[-1]) + widths[column] + 2 > width:
            portions.append([])
        portions[-1].append(column)
    lines: list[str] = []
    for portion in portions:
        columns = [0, *portion]
        height = max(len(heads[column]) for column in columns)
        above = [[""] * (height - len(heads[column])) + heads[column] for column in columns]
        block = [[cells[line] for cells in above] for line in range(height)]
        block.append(["-" * widths[column] for column in columns])
        block += [[row[column] for column in columns] for row in rows]
        lines += [""] if lines else []
        lines += ["  ".join(_aligned(cells, [widths[column] for column in columns])).rstrip() for cells in block]
    return lines


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if number == 0 else cell.rjust(width)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def text_of(
    tasks: Sequence[Task],
    label: str | None,
    asked: Sequence[Budget],
    targets: Sequence[float],
    left_out: Sequence[str],
    final: Final,
) -> str:
    """The whole comparison.

    label: of the baseline; asked, targets: empty for those that suit; left_out: as told; final: over how many rounds.
    """
    lines = [line for text in left_out for line in _wrapped(f"left out: {text}")]
    for task in tasks:
        lines += [line for run in task.runs for note in run.notes for line in _wrapped(f"{run.path}: {note}")]
    lines += [""] if lines else []
    if len(tasks) > 1:
        lines += [f"The runs are of {len(tasks)} tasks, which are compared apart. They differ in", ""]
        lines += [line for reason in reasons(tasks) for line in _wrapped(reason, "  ")]
        lines.append("")
    for number, task in enumerate(tasks, start=1):
        title = f"Task {number} of {len(tasks)}: {task.title}" if len(tasks) > 1 else task.title
        lines += [*_wrapped(title), "=" * min(WIDTH, len(title)), ""]
        lines += [*_task(task, label, asked, targets, final), ""]
    return "\n".join(lines).rstrip()


def _task(
    task: Task, label: str | None, asked: Sequence[Budget], targets: Sequence[float], final: Final
) -> Iterator[str]:
    baseline = baseline_of(task, label)
    others = [method for method in task.methods if method is not baseline]
    ordered = [baseline, *others]
    budgets = budgets_of(task, asked)
    axes = axes_of(ordered, budgets)
    yield from _runs(ordered)
    yield from ["", *_budget_table(ordered, final, budgets)]
    intervals: list[Interval] = []
    if others:
        lines, intervals = _difference_table(baseline, others, [final, *budgets])
        yield from ["", *lines]
    wanted = list(targets) or default_targets(baseline)
    for target in wanted:
        yield from ["", *_target_table(ordered, axes, target)]
    if any(needed(method, "rounds", target).not_reached for method in ordered for target in wanted):
        yield ""
        yield from _wrapped(
            "median: runs that did not get there count as larger than all (<=: one of them ended before it had spent "
            "as much, so the median could be less); (by ...): up to this cost none of them had got there."
        )
    if not targets and wanted:
        yield ""
        yield from _wrapped(
            f"The accuracies were chosen from these runs: 80 % and 95 % of {baseline.label}'s mean accuracy in "
            "the last scored round, rounded down. For a report, fix them beforehand with --to."
        )
    if others and wanted:
        lines, more = _ratio_table(baseline, others, [a for a in axes if _as_ratio(a)], wanted)
        intervals += more
        yield from ["", *lines] if lines else []
    if len(ordered) > 1:
        yield from ["", *_fronts(task, axes)]
    if lines := _chosen_table(ordered):
        yield from ["", *lines]
    if lines := _figure_table(ordered):
        yield from ["", *lines]
    notes = [*cautions(task), *of_intervals(intervals)]
    if notes:
        yield from ["", "Notes", ""]
        for note in notes:
            yield from _wrapped(note, "- ")


def _as_ratio(axis: Axis) -> bool:
    """Whether costs on an axis are told as a ratio to the baseline's: those that no machine measures."""
    return axis.endswith("_bytes") or axis in SIMULATED


def _runs(methods: Sequence[Method]) -> list[str]:
    rows = []
    columns = [axis for axis in axes_of(methods, ()) if axis != "rounds"]
    for method in methods:
        last = [run.rounds[-1]["round"] for run in method.runs]
        seeds = [f"{run.seed}{'' if run.status == 'finished' else f' ({run.status})'}" for run in method.runs]
        spent = []
        for axis in columns:
            values = [float(run.spent(axis)[-1]) for run in method.runs]
            spent.append(quantity(axis, float(np.mean(values)), spread(values)) if method.has(axis) else "-")
        rounds = str(last[0]) if len(set(last)) == 1 else f"{min(last)} to {max(last)}"
        rows.append([method.label, ", ".join(seeds), rounds, *spent])
    header = ["method", "seeds", "rounds", *(NAMES[axis] for axis in columns)]
    lines = ["Runs, and what they spent in all (mean ± sample standard deviation over seeds)", "", *grid(header, rows)]
    more = [f"{method.label} is {method.description}" for method in methods if method.label != method.description]
    return [*lines, "", *_wrapped(f"{'; '.join(more)}.")] if more else lines


def _budget_table(methods: Sequence[Method], final: Final, budgets: Sequence[Budget]) -> list[str]:
    columns: list[Budget | Final] = [final, *budgets]
    found = [[reached(method, budget) for budget in columns] for method in methods]
    rows = [
        [
            method.label,
            *(
                _accuracy(each, len(method.runs)) if _told(method, column) else "-"
                for column, each in zip(columns, line, strict=True)
            ),
        ]
        for method, line in zip(methods, found, strict=True)
    ]
    lines = ["Accuracy at equal budgets, mean ± sample standard deviation over seeds", ""]
    lines += [*grid(["method", *map(_column, columns)], rows), ""]
    if final.best:
        lines += _wrapped(
            "best: each run's best scored round, as many papers report it. It is chosen by the very scores that are "
            "reported, so it is optimistic, and more so the more rounds there are."
        )
    elif final.last == 1:
        lines += _wrapped("final: of the last scored round, not of the best one.")
    else:
        lines += _wrapped(f"final: each run's mean over its last {final.last} scored rounds, not over the best ones.")
    fewer = [
        f"{method.label} with seed {run.seed} ({run.num_scored})"
        for method in methods
        for run in method.runs
        if run.num_scored < final.last
    ]
    if fewer:
        lines += _wrapped(f"Runs with fewer scored rounds count with those they have: {few(fewer)}.")
    chosen = [f"{_amount(budget)} (set by {budget.set_by})" for budget in budgets if budget.set_by]
    if chosen:
        lines += _wrapped(f"Budgets that --at does not set are what every run has spent: {', '.join(chosen)}.")
    if any(
        len(each.values) < len(method.runs) and _told(method, column)
        for method, line in zip(methods, found, strict=True)
        for column, each in zip(columns, line, strict=True)
    ):
        lines += _wrapped(
            "(k of n): so many runs get there, and the mean is theirs; the others ended before, which is not "
            "extrapolated, or were not scored by then."
        )
    return lines


def _told(method: Method, budget: Budget | Final) -> bool:
    """Whether a method says what it cost on a budget's axis."""
    return isinstance(budget, Final) or method.has(budget.axis)


def _column(budget: Budget | Final) -> str:
    if isinstance(budget, Final) and budget.best:
        return "\nbest"
    if isinstance(budget, Final):
        return "\nfinal" if budget.last == 1 else f"final (last {budget.last}\nscored rounds)"
    amount = quantity(budget.axis, budget.amount)
    return f"at\n{amount} rounds" if budget.axis == "rounds" else f"at {NAMES[budget.axis]}\n{amount}"


def _difference_table(
    baseline: Method, others: Sequence[Method], columns: Sequence[Budget | Final]
) -> tuple[list[str], list[Interval]]:
    base = [reached(baseline, budget) for budget in columns]
    rows: list[list[str]] = []
    intervals: list[Interval] = []
    for method in others:
        pairs = len(set(method.seeds) & set(baseline.seeds))
        found = [paired(reached(method, column).values, of.values) for column, of in zip(columns, base, strict=True)]
        intervals += found
        rows.append([method.label, str(pairs), *(_difference(each, pairs) for each in found)])
    lines = [f"Difference to {baseline.label} in accuracy, mean and 95 % interval of the paired differences", ""]
    lines += [*grid(["method", "n", *map(_column, columns)], rows), ""]
    lines += _wrapped("n: seeds that both have; [-]: one pair has no interval; *: the interval excludes 0.")
    return lines, intervals


def _target_table(methods: Sequence[Method], axes: Sequence[Axis], target: float) -> list[str]:
    rows = []
    for method in methods:
        found = [needed(method, axis, target) for axis in axes]
        count, of = found[0].not_reached, len(method.runs)
        there = f"not reached in {count} of {of}" if count else f"in {of} of {of}"
        rows.append([method.label, there, *(_cost(axis, each) for axis, each in zip(axes, found, strict=True))])
    lines = [f"To an accuracy of {target:g} (first scored round that has it)", ""]
    return [*lines, *grid(["method", "reached", *(NAMES[axis] for axis in axes)], rows)]


def _ratio_table(
    baseline: Method, others: Sequence[Method], axes: Sequence[Axis], targets: Sequence[float]
) -> tuple[list[str], list[Interval]]:
    """No lines where no ratio can be told."""
    rows: list[list[str]] = []
    intervals: list[Interval] = []
    for method in others:
        found = [ratio(method, baseline, axis, target) for target in targets for axis in axes]
        intervals += found
        rows.append([method.label, str(len(set(method.seeds) & set(baseline.seeds))), *map(_ratio, found)])
    if all(cell == "-" for row in rows for cell in row[2:]):
        return [], []
    header = ["method", "n", *(f"{NAMES[axis]}\nto {target:g}" for target in targets for axis in axes)]
    simulated = any(axis in SIMULATED for axis in axes)
    what = "Bytes and simulated costs" if simulated else "Bytes"
    lines = [f"{what} to an accuracy as a ratio to {baseline.label}'s, geometric mean and 95 % interval", ""]
    lines += [*grid(header, rows), ""]
    lines += _wrapped(
        f"-: not every common seed of both got there, or nothing is exchanged{' or simulated' if simulated else ''}; "
        "*: the interval excludes 1."
    )
    return lines, intervals


def _fronts(task: Task, axes: Sequence[Axis]) -> list[str]:
    lines = ["Pareto front: from which cost on which method has the highest mean accuracy (of mean curves)", ""]
    for axis in axes[1:]:
        stretches = front(task, axis)
        told = [
            f"from {quantity(axis, s.begins)} {s.label} ({s.accuracy:.4f})" if s.begins == s.ends else
            f"from {quantity(axis, s.begins)} {s.label} ({s.accuracy:.4f}, {s.last_accuracy:.4f} at "
            f"{quantity(axis, s.ends)})"
            for s in stretches
        ]  # fmt: skip
        lines += _wrapped(", ".join(told) or "nothing is exchanged", f"  {NAMES[axis]}: ")
    return lines


_CHOSEN = {
    "least": "rounds", "median": "rounds", "most": "rounds", "never": "clients", "jain": "index",
}  # fmt: skip
"""What is told of how often clients were chosen, and its unit."""


def _chosen_table(methods: Sequence[Method]) -> list[str]:
    """No lines where every method calls all clients equally often, or none says."""
    if not any(chooses(method) for method in methods):
        return []
    rows = [[method.label, *_chosen_cells(chosen(method))] for method in methods]
    header = [
        "method",
        "least often\nrounds",
        "median\nrounds",
        "most often\nrounds",
        "never\nclients",
        "Jain's\nindex",
    ]
    lines = ["In how many rounds clients were chosen, mean over seeds", "", *grid(header, rows), ""]
    return lines + _wrapped(
        "Chosen: called in the round, but to score or by the selector. Jain's index is 1 where all clients are chosen "
        "equally often and 1/N where it is always the same one. -: it is not known, or nobody is chosen."
    )


def _chosen_cells(found: Chosen | None) -> list[str]:
    if found is None:
        return ["-"] * len(_CHOSEN)
    of = [list(getattr(found, name).values()) for name in _CHOSEN]
    deviation = spread(of[-1])
    jains = f"{np.mean(of[-1]):.3f} ± {'-' if math.isnan(deviation) else f'{deviation:.3f}'}"
    return [*(f"{np.mean(values):.1f}" for values in of[:-1]), jains]


def _figure_table(methods: Sequence[Method]) -> list[str]:
    """No lines where no method has figures of its own."""
    names = figures_of(methods)
    if not names:
        return []
    found = [(method, [figure(method, name) for name in names]) for method in methods]
    rows = [
        [method.label, *(_figure(each, len(method.runs)) for each in line)]
        for method, line in found
        if any(each.values for each in line)
    ]
    lines = [
        "Figures of the algorithms, each in its own unit, mean over seeds",
        "",
        *grid(["method", *names], rows),
        "",
    ]
    lines += _wrapped("As the algorithms tell them of whole runs; methods that tell none are not here.")
    if any(each.not_finite for _, line in found for each in line):
        lines += _wrapped("none: not finite, as of what never comes; where only some runs are so, there is no mean.")
    if any(0 < len(each.values) < len(method.runs) for method, line in found for each in line):
        lines += _wrapped("(k of n): so many runs have told it, and the mean is theirs.")
    return lines


# ---- CSV
COLUMNS = (
    "task", "method", "measure", "at", "unit", "num_seeds", "mean", "std", "median", "not_reached", "difference",
    "lower", "upper", "baseline", "num_pairs", "seeds", "values", "rounds_averaged",
)  # fmt: skip
"""lower, upper: of the difference, or in rows of ratios of the ratio; num_pairs: how many seeds these are over."""


def require_directory(option: str, path: Path) -> None:
    """ValueError where a file cannot be written because its directory is not there."""
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no directory {path.parent} to write {path.name} in; make it first")


def write_csv(
    path: Path,
    tasks: Sequence[Task],
    label: str | None,
    asked: Sequence[Budget],
    targets: Sequence[float],
    final: Final,
) -> None:
    """A row per task, method and measure; arguments as of `text_of`."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            for task in tasks:
                writer.writerows(rows_of(task, label, asked, targets, final))
    except OSError as error:
        raise ValueError(f"--csv: {path} cannot be written: {error.strerror}") from None


def rows_of(
    task: Task, label: str | None, asked: Sequence[Budget], targets: Sequence[float], final: Final
) -> Iterator[dict[str, str]]:
    """The rows of one task, numbers in full."""
    baseline = baseline_of(task, label)
    budgets = budgets_of(task, asked)
    columns: list[Budget | Final] = [final, *budgets]
    axes = axes_of(task.methods, budgets)
    for method in task.methods:
        common = {"task": task.title, "method": method.label, "baseline": baseline.label}
        for column in columns:
            if _told(method, column):
                yield common | _accuracy_row(method, baseline, column)
        for target in list(targets) or default_targets(baseline):
            for axis in filter(method.has, axes):
                found = needed(method, axis, target)
                at = {"at": _exact(target)}
                yield common | at | {"measure": f"{axis}_to_accuracy", "unit": UNITS[axis]} | _cost_row(found)
                if method is not baseline and _as_ratio(axis) and baseline.has(axis):
                    told = _ratio_row(ratio(method, baseline, axis, target))
                    yield common | at | {"measure": f"{axis}_to_accuracy_ratio", "unit": "ratio"} | told
        often = chosen(method)
        for name, unit in _CHOSEN.items() if often is not None else ():
            yield common | {"measure": f"chosen_{name}", "unit": unit} | _figure_row(Figure(getattr(often, name)))
        for name in figures_of([method]):
            yield common | {"measure": f"figure_{name}"} | _figure_row(figure(method, name))


def _accuracy_row(method: Method, baseline: Method, budget: Budget | Final) -> dict[str, str]:
    found = reached(method, budget)
    if isinstance(budget, Final) and budget.best:
        row = {"measure": "best_accuracy"}
    elif isinstance(budget, Final):
        averaged = _joined(str(min(budget.last, run.num_scored)) for run in method.runs)
        row = {"measure": "final_accuracy", "rounds_averaged": averaged}
    else:
        row = {"measure": f"accuracy_at_{budget.axis}", "at": _exact(budget.amount)}
    row |= {
        "unit": "fraction",
        "num_seeds": str(len(method.runs)),
        "mean": _exact(found.mean),
        "std": _exact(found.std),
        "not_reached": str(len(method.runs) - len(found.values)),
        "seeds": _joined(map(str, method.seeds)),
        "values": _joined(_exact(found.values.get(seed, math.nan)) for seed in method.seeds),
    }
    if found.values:
        row["median"] = _exact(float(np.median(list(found.values.values()))))
    if method is not baseline:
        pairs = paired(found.values, reached(baseline, budget).values)
        row |= {"difference": _exact(pairs.mean), "num_pairs": str(len(pairs.values))}
        row |= {"lower": _exact(pairs.lower), "upper": _exact(pairs.upper)}
    return row


def _cost_row(found: Needed) -> dict[str, str]:
    return {
        "num_seeds": str(len(found.values)),
        "mean": _exact(found.mean),
        "std": _exact(found.std),
        "median": _exact(found.median),
        "not_reached": str(found.not_reached),
        "seeds": _joined(map(str, found.values)),
        "values": _joined(
            f">{_exact(found.limits[seed])}" if math.isinf(value) else _exact(value)
            for seed, value in found.values.items()
        ),
    }


def _ratio_row(found: Interval) -> dict[str, str]:
    return {
        "num_seeds": str(len(found.values)),
        "mean": _exact(found.mean),
        "lower": _exact(found.lower),
        "upper": _exact(found.upper),
        "num_pairs": str(len(found.values)),
        "seeds": _joined(map(str, found.values)),
        "values": _joined(map(_exact, found.values.values())),
    }


def _figure_row(found: Figure) -> dict[str, str]:
    row = {
        "num_seeds": str(len(found.values)),
        "seeds": _joined(map(str, found.values)),
        "values": _joined("none" if value is None else _exact(value) for value in found.values.values()),
    }
    if found.finite:
        row |= {"mean": _exact(float(np.mean(found.finite))), "std": _exact(spread(found.finite))}
        row["median"] = _exact(float(np.median(found.finite)))
    return row


def _exact(value: float) -> str:
    """A number in full, which reads back the same; nothing where there is none."""
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) else repr(float(value))


def _joined(values: Iterable[str]) -> str:
    return ";".join(values)
