"""A results directory as the text that `grid leaderboard` prints: lines, tiers, or both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from analysis.board import Board, read_board
from analysis.imports.reading import as_published, imported_in
from analysis.knobs import Knob, knob_table, load_knobs
from analysis.left_out import left_out
from analysis.matrix import load_matrix
from analysis.pointwise import pointwise
from analysis.reader import Tables, read_tables
from analysis.render import completeness_words, lines_table, of_what, render
from analysis.spread import load_spread
from analysis.standing import Standings, standings
from analysis.standing_render import standing_table
from analysis.text import FORMS, fitted, formed
from grid.schema.errors import AskedError, ResultsError, no_such

SPARE = ("Pointwise %", "Front", "Cost", "Given", "Beats finetune", "Rank")
"""Columns of the tiers that a narrow terminal goes without, those first."""
PARTS = ("all", "lines", "tiers")
GROUPS = ("all", "needs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to print: ``part`` of the board, and how its tiers are made."""

    eval_set: str = "report"
    part: str = "all"
    group: str = "all"
    worst_case: bool = False
    at_ca_loss: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("part", PARTS), ("group", GROUPS)):
            if getattr(self, name) not in allowed:
                raise no_such(name, getattr(self, name), allowed)
        if self.part == "lines" and self.shapes_tiers:
            raise AskedError(
                "--group, --worst-case and --at-ca-loss shape the tiers: leave out --part lines."
            )

    @property
    def shapes_tiers(self) -> bool:
        """Whether anything was asked of the tiers alone."""
        return self.group != "all" or self.worst_case or self.at_ca_loss is not None


class Found(NamedTuple):
    """The lines, the tiers where a victim is sound, what knobs can buy and, apart, the numbers of
    others that were imported."""

    board: Board
    tiers: Standings | None
    knobs: list[Knob]
    imported: Sequence[Mapping[str, Any]] = ()


def load(directory: Path, asked: Asked) -> Found:
    """Read a results directory, also while a grid is still writing there."""
    return read_tables(directory, lambda tables: read(tables, asked))


def read(tables: Tables, asked: Asked) -> Found:
    """The same of open results."""
    board, imported = read_board(tables, asked.eval_set), imported_in(tables)
    matrix = load_matrix(tables, asked.eval_set) if asked.part != "lines" else None
    if matrix is None:
        return Found(board, None, [], imported)
    found = standings(
        matrix,
        by_needs=asked.group == "needs",
        worst_case=asked.worst_case,
        at_ca_loss=asked.at_ca_loss,
        chance=1 / board.grid.classes if board.grid.classes else 0.0,
        spread=load_spread(tables, asked.eval_set),
    )
    found = replace(found, left_out=left_out(tables, asked.eval_set))
    if asked.worst_case:
        each = pointwise(tables, matrix, asked.eval_set)
        lines = [replace(line, pointwise=each.get(line.defense)) for line in found.lines]
        found = replace(found, lines=lines)
    return Found(board, found, load_knobs(tables, found), imported)


def caveats(found: Found) -> list[str]:
    """What makes a board less than it should be: files that were left out, cells that lack."""
    state = found.board.completeness
    lacking = [] if state.is_complete else [completeness_words(found.board)]
    return [*(f"! {warning}" for warning in found.board.warnings), *lacking]


def text(
    found: Found,
    asked: Asked,
    form: str = "table",
    width: int = 100,
    color: bool = False,
    published: bool = False,
) -> str:
    """What is printed. CSV, TeX and HTML hold one table: the lines, unless tiers are asked for, by
    name or by what shapes them alone."""
    board, tiers, knobs, imported = found
    if form in ("csv", "tex", "html") and asked.shapes_tiers:
        asked = replace(asked, part="tiers")
    if form not in FORMS:
        raise no_such("format", form, FORMS)
    if asked.part == "tiers" and tiers is None:
        raise ResultsError("No sound victim has numbers yet: there are no tiers.")
    if published and (form not in ("table", "md") or asked.part == "tiers"):
        raise AskedError("published figures join the lines of a table or md: they are no rows.")
    if form == "json":
        return _json(found, asked)
    if form in ("csv", "tex", "html"):
        if asked.part == "tiers" and tiers is not None:
            table = standing_table(tiers)
            return formed(replace(table, notes=[of_what(board), *table.notes]), form)
        return render(board, "csv") if form == "csv" else formed(lines_table(board), form)
    above = ""
    if asked.part != "tiers":
        others = as_published(imported)
        above = render(board, form, width=width, color=color, published=published, imported=others)
    below = ""
    if tiers is not None:
        grid = standing_table(tiers)
        if form == "table":
            grid = fitted(grid, width, SPARE)
        if asked.part == "tiers":  # else the lines above have said so
            grid = replace(grid, notes=[*caveats(found), of_what(board), *grid.notes])
        below = formed(grid, form, width)
    if knobs and tiers is not None:
        below = f"{below}\n{formed(knob_table(knobs), form, width)}"
    return f"{above}\n{below}" if above and below else above or below


def _json(found: Found, asked: Asked) -> str:
    about = {"name": found.board.grid.name, "hash": found.board.grid.hash}
    body: dict[str, Any] = {
        "grid": about,
        "eval_set": found.board.eval_set,
        "notes": caveats(found),
    }
    if asked.part != "tiers":
        body = json.loads(render(found.board, "json"))
    if found.tiers is not None:
        table = standing_table(found.tiers)
        body["tiers"] = {
            "asked": asdict(asked),
            "rows": list(table.values),
            "notes": list(table.notes),
        }
    if found.knobs:
        knobs = knob_table(found.knobs)
        body["knobs"] = {"rows": list(knobs.values), "notes": list(knobs.notes)}
    if found.imported:
        body["imported"] = [
            {**record, "written_at": f"{record['written_at']:%Y-%m-%dT%H:%M:%SZ}"}
            for record in found.imported
        ]
    return json.dumps(body, indent=1, allow_nan=False) + "\n"
