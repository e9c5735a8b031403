"""Small tables that an algorithm gives to look at, as the text of a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from fldist.runtime.pictures import file_part


def csv_text(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a header, floats in full.

    rows: at least one; their keys are the columns, the same in all, in the first one's order; their values are numbers
    or strings. ValueError for anything else.
    """
    file_part("table", name)
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"table: {name} must be a list of at least one row; got {rows!r}")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not row or row.keys() != rows[0].keys():
            raise ValueError(
                f"table: {name}: every row is a dict with the same columns, and row {number} is {row!r}, row 0 "
                f"{rows[0]!r}"
            )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(rows[0])
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(name, column, row[column]) for column in columns])
    return text.getvalue()


def _cell(name: str, column: str, value: Any) -> int | float | str:
    if isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise ValueError(f"table: {name}: {column} must be a number or a string, got {type(value).__name__}")
