"""Plain tables of texts in every form that results are printed in."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from grid.schema.errors import no_such

# What no document may hold (controls, halves of surrogate pairs, what is no character; a terminal
# obeys some), and what would show a name as another: marks that turn the direction of letters.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
T = TypeVar("T")
FORMS = ("table", "md", "csv", "json", "tex", "html")
TEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Headings and lines as people read them; ``values`` as programs do, one mapping a line."""

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    values: Sequence[dict[str, Any]]
    are_numbers: Sequence[bool]
    notes: Sequence[str] = ()
    heads: Sequence[str] = ()
    """What heads each line in a table, as lines with one head are kept together; may be empty."""
    is_verbatim: bool = False
    """Whether headings are names, which stay on one line."""


def printable(text: str) -> str:
    """The text with what cannot be shown, or what a terminal would obey, shown as a mark."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def formed(grid: Grid, form: str, width: int = 100) -> str:
    """The grid in one of `FORMS`."""
    if form == "csv":
        return _csv(grid)
    if form == "json":
        body = {"title": grid.title, "rows": list(grid.values), "notes": list(grid.notes)}
        return json.dumps(body, indent=1, default=str) + "\n"
    if form not in FORMS:
        raise no_such("format", form, FORMS)
    grid = replace(
        grid,
        title=printable(grid.title),
        headings=list(map(printable, grid.headings)),
        lines=[list(map(printable, line)) for line in grid.lines],
        notes=list(map(printable, grid.notes)),
        heads=list(map(printable, grid.heads)),
    )
    text = {"table": _table, "md": _markdown, "tex": _tex, "html": _html}[form]
    return text(grid) if form != "table" else _table(grid, width)


def fitted(grid: Grid, width: int, spare: Sequence[str]) -> Grid:
    """The grid without those of its ``spare`` columns, first ones first, that the width cannot
    hold; a note says which."""
    left_out: list[str] = []
    for name in spare:
        if table_width(grid) <= width or name not in grid.headings:
            continue
        at = list(grid.headings).index(name)
        left_out.append(name)
        grid = replace(
            grid,
            headings=_without(grid.headings, at),
            lines=[_without(line, at) for line in grid.lines],
            are_numbers=_without(grid.are_numbers, at),
        )
    if not left_out:
        return grid
    told = f"Left out at this width: {', '.join(left_out)}; `--format md` has all columns."
    return replace(grid, notes=[*grid.notes, told])


def _without(items: Sequence[T], at: int) -> list[T]:
    return [item for i, item in enumerate(items) if i != at]


def _table(grid: Grid, width: int = 100) -> str:
    import textwrap

    sizes = _sizes(grid)
    rows = [
        [heading] if grid.is_verbatim else _wrapped(heading, size)
        for heading, size in zip(grid.headings, sizes, strict=True)
    ]
    height = max(map(len, rows), default=0)
    head = [[""] * (height - len(parts)) + parts for parts in rows]
    out = [grid.title] if grid.title else []
    out += [_line(parts, sizes, grid) for parts in zip(*head, strict=True)]
    last = None
    for i, line in enumerate(grid.lines):
        if grid.heads and grid.heads[i] != last:
            last = grid.heads[i]
            out.append(f" {last}")
        out.append(_line(line, sizes, grid))
    for note in grid.notes:
        out += textwrap.wrap(note, width)
    return "\n".join(line.rstrip() for line in out) + "\n"


def _sizes(grid: Grid) -> list[int]:
    """How wide each column of a table is."""
    words = [[heading] if grid.is_verbatim else heading.split() for heading in grid.headings]
    return [
        max(map(len, [*own, *(line[i] for line in grid.lines)]), default=0)
        for i, own in enumerate(words)
    ]


def table_width(grid: Grid) -> int:
    """How many letters the lines of a table take."""
    return sum(size + 2 for size in _sizes(grid))


def _wrapped(heading: str, size: int) -> list[str]:
    import textwrap

    return textwrap.wrap(heading, size) or [""]


def _line(parts: Sequence[str], sizes: Sequence[int], grid: Grid) -> str:
    return "  " + "  ".join(
        part.rjust(size) if is_number else part.ljust(size)
        for part, size, is_number in zip(parts, sizes, grid.are_numbers, strict=True)
    )


def _markdown(grid: Grid) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([|*_])", r"\\\1", cell) for cell in cells) + " |"

    rule = ["---:" if is_number else "---" for is_number in grid.are_numbers]
    lines = [f"### {grid.title}", ""] if grid.title else []
    lines += [row(grid.headings), f"| {' | '.join(rule)} |"]
    return "\n".join([*lines, *map(row, grid.lines), "", *(f"- {n}" for n in grid.notes)]) + "\n"


def csv_cell(cell: Any) -> Any:
    """A cell of a CSV. A spreadsheet computes a text that begins as a formula does, and may send
    what is beside it elsewhere: an apostrophe before it keeps it text. Numbers are as they are."""
    if isinstance(cell, str) and cell.startswith(FORMULA) and not NUMBER.fullmatch(cell):
        return f"'{cell}"
    return "" if cell is None else cell


def _csv(grid: Grid) -> str:
    output = io.StringIO()
    names = list(dict.fromkeys(name for value in grid.values for name in value))
    writer = csv.DictWriter(output, names, lineterminator="\n")
    writer.writerow({name: csv_cell(name) for name in names})
    for value in grid.values:
        writer.writerow({name: csv_cell(cell) for name, cell in value.items()})
    return printable(output.getvalue())


def _tex(grid: Grid) -> str:
    """A booktabs table."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(TEX) for cell in cells) + r" \\"

    columns = "".join("r" if is_number else "l" for is_number in grid.are_numbers)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", row(grid.headings), r"\midrule"]
    end = [r"\bottomrule", r"\end{tabular}"]
    notes = [f"% {note}" for note in (grid.title, *grid.notes) if note]
    return "\n".join([*notes, *body, *map(row, grid.lines), *end]) + "\n"


def _html(grid: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        # 3e-3 could be broken behind its hyphen.
        sides = (
            "right;white-space:nowrap"
            if is_number and tag == "td"
            else "right"
            if is_number
            else "left"
            for is_number in grid.are_numbers
        )
        cells_ = (
            f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(cells_)}</tr>"

    notes = "".join(f"<li>{html.escape(note)}</li>" for note in grid.notes)
    body = "\n".join(row(line, "td") for line in grid.lines)
    return (
        "<table>\n"
        + (f"<caption>{html.escape(grid.title)}</caption>\n" if grid.title else "")
        + f"<thead>{row(grid.headings, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        + (f"<ul>{notes}</ul>\n" if notes else "")
    )
