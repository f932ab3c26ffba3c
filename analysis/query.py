"""A user's SQL over a results directory, and its answer in every form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from analysis.reader import Answer, Tables, read_tables
from analysis.render import UNKNOWN
from analysis.text import Grid, formed, printable, table_width


def run_sql(directory: Path, text: str) -> tuple[Answer, list[str]]:
    """The answer to one SELECT, and what of the results could not be read."""
    return read_tables(directory, lambda tables: _asked(tables, text))


def _asked(tables: Tables, text: str) -> tuple[Answer, list[str]]:
    answer = tables.sql(text)
    return answer._replace(columns=told_apart(answer.columns)), tables.warnings


def told_apart(names: Sequence[str]) -> list[str]:
    """Names of columns, each once: what is there already becomes ``a_2``."""
    found: list[str] = []
    for name in names:
        number, own = 1, name
        while own in found or (number > 1 and own in names):
            number += 1
            own = f"{name}_{number}"
        found.append(own)
    return found


def answer_text(answer: Answer, form: str = "table", width: int = 100, limit: int = 200) -> str:
    """An answer in one of the forms; a table or Markdown says where lines were left out."""
    rows, columns = answer.rows, told_apart(answer.columns)
    notes: list[str] = []
    if form in ("table", "md") and len(rows) > limit:
        notes.append(
            f"{len(rows) - limit:,} of {len(rows):,} lines are left out: --limit shows more"
        )
        rows = rows[:limit]
    if form == "json":
        values = [dict(zip(columns, map(plain, row), strict=True)) for row in rows]
        return json.dumps(values, indent=1, allow_nan=False) + "\n"
    are_numbers = [
        any(isinstance(row[i], int | float | Decimal) for row in rows) for i in range(len(columns))
    ]
    found = Grid(
        title="" if rows else "no lines",
        headings=columns,
        lines=[[shown(value) for value in row] for row in rows],
        values=[dict(zip(columns, map(plain, row), strict=True)) for row in rows],
        are_numbers=are_numbers,
        notes=notes,
        is_verbatim=True,
    )
    if form == "table" and rows and table_width(found) > width:
        return _upright(found)
    if form == "csv" and not rows:
        return printable(",".join(columns)) + "\n"
    return formed(found, form, width)


def _upright(grid: Grid) -> str:
    """A line for each column of each row: of rows that are wider than a terminal."""
    rows = [
        "\n".join(f"{name}: {text}" for name, text in zip(grid.headings, line, strict=True))
        for line in grid.lines
    ]
    return printable("\n\n".join([*rows, *grid.notes]) + "\n")


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(plain(value)).replace("\n", " ")


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
