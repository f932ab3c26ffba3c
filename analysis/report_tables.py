"""Tables of texts as tables of the report: what names a line in front, numbers that sort as
numbers, words behind them, and what every column says."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from analysis.board import BoardRow
from analysis.page import Cell, Column, Shown, Table
from analysis.text import Grid
from analysis.words import BY_HEADING, amount

NUMBER = re.compile(r"(?P<less><?) ?(?P<number>[+-]?\d+(\.\d+)?(e[+-]?\d+)?)")
RATE = "Rate"
SHORT = {"Found: AUROC / recall / prec. of bound %": "Found", "Tuned: trials / cost": "Tuned"}
"""Headings that the table of words explains at length."""


def column(heading: str, *, is_number: bool = False) -> Column:
    """A column under a heading that the table of words explains, if it does."""
    says = BY_HEADING.get(heading, "")
    shown = SHORT.get(heading, heading)
    return Column(name=heading, heading=shown, is_number=is_number, help=says)


def table_of(
    grid: Grid,
    name: str,
    first: Sequence[str],
    last: Sequence[str] = (),
    filters: Sequence[str] = (),
) -> Table:
    """A table of texts with what names a line in front and ``last`` behind all else."""

    def place(i: int) -> tuple[int, int]:
        heading = grid.headings[i]
        if heading in first:
            return 0, first.index(heading)
        return (2, last.index(heading)) if heading in last else (1, i)

    order = sorted(range(len(grid.headings)), key=place)
    rows = [
        [sorted_cell(line[i], is_number=grid.are_numbers[i]) for i in order] for line in grid.lines
    ]
    return Table(
        name=name,
        caption=grid.title,
        columns=[column(grid.headings[i], is_number=grid.are_numbers[i]) for i in order],
        rows=rows,
        filters=[heading for heading in filters if heading in grid.headings],
        heads=grid.heads,
    )


def with_rates(grid: Grid, rows: Sequence[BoardRow]) -> Grid:
    """The lines of a board with their rates as people say them."""
    at = grid.headings.index("Rate %")
    words = [amount(row.rate, row.count if row.rate is None else None) for row in rows]
    return replace(
        grid,
        headings=[*grid.headings[:at], RATE, *grid.headings[at + 1 :]],
        lines=[
            [*line[:at], said, *line[at + 1 :]]
            for line, said in zip(grid.lines, words, strict=True)
        ],
    )


def sorted_cell(text: str, *, is_number: bool) -> Cell:
    """A text with the number that it begins with; what is less than a number sorts before it."""
    if not is_number:
        return text
    found = NUMBER.match(text)
    if found is None:
        return Shown(text, math.nan, "muted")
    number = float(found["number"])
    return Shown(text, math.nextafter(number, -math.inf) if found["less"] else number)


def percent(share: float | None) -> Cell:
    return None if share is None else Shown(f"{100 * share:.1f}", share)
