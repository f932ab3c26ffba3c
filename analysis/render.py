"""A board as text: a table for the terminal, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import groupby
from typing import Any, NamedTuple

from analysis.board import Board, BoardRow
from analysis.published import WORDS, Published
from analysis.published import lines as printed
from analysis.text import UNPRINTABLE, Grid, csv_cell, printable
from grid.schema.errors import AskedError, no_such
from grid.schema.status import STATUS_WORDS, Status
from grid.schema.status import completeness_words as words_of

NEED_WORDS = {"clean_data": "clean", "suspect_data": "suspect", "reference": "ref"}
UNKNOWN = "–"


def render(
    board: Board,
    form: str = "table",
    width: int = 100,
    color: bool = False,
    published: bool = False,
    imported: Sequence[Published] = (),
) -> str:
    """The board as ``table`` (``width`` columns), ``md``, ``csv`` or ``json``.

    A table or Markdown ends with what others measured of the same attacks and defenses, in grey
    and apart: what was ``imported`` and, with ``published``, what papers print.
    """
    if form not in ("table", *FORMATS):
        raise no_such("format", form, ("table", *FORMATS))
    if published and form not in ("table", "md"):
        raise AskedError(f"published figures join a table or md, not {form}: they are no rows.")
    if form != "json":  # which writes such characters as numbers
        board = _printable(board)
    text = _table(board, width, color) if form == "table" else FORMATS[form](board)
    names = {row.attack for row in board.lines}, {row.defense for row in board.lines}
    if form in ("table", "md") and imported:
        told = map(printable, [*printed(*names, imported), *_others(names, imported)])
        text += _grey("Imported", list(told), form, width, color)
    return text + _grey("Published", printed(*names), form, width, color) if published else text


def _others(names: tuple[set[str], set[str]], imported: Sequence[Published]) -> Sequence[str]:
    """How many imported figures are of something else."""
    attacks, defenses = names
    told = sum(
        f.attack in attacks and f.defense in defenses and f.metric in WORDS for f in imported
    )
    count = len(imported) - told
    where = '`grid sql "FROM published"` shows all'
    return [f"{count} of {len(imported)} numbers are of something else: {where}"] if count else []


def _printable(board: Board) -> Board:
    """The board with nothing that a terminal would obey."""
    lines = []
    for row in board.lines:
        texts = {f.name: getattr(row, f.name) for f in fields(row)}
        odd: dict[str, Any] = {
            name: printable(text)
            for name, text in texts.items()
            if isinstance(text, str) and UNPRINTABLE.search(text)
        }
        lines.append(replace(row, **odd) if odd else row)
    name = None if board.grid.name is None else printable(board.grid.name)
    return replace(
        board,
        lines=lines,
        grid=board.grid._replace(name=name),
        warnings=list(map(printable, board.warnings)),
    )


def _grey(what: str, found: Sequence[str], form: str, width: int, color: bool) -> str:
    """Others' figures of the attacks and defenses on the board."""
    from rich.console import Console
    from rich.text import Text

    title = f"{what} (other models, data and victims; not comparable with the lines above)"
    if form == "md":
        return "\n".join(["", f"### {title}", "", *(f"- {line}" for line in found), ""])
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=color, legacy_windows=False)
    for line in (title, *(f"  {line}" for line in found or ["none of these"])):
        console.print(Text(line, style="bright_black"))
    return "\n" + output.getvalue()


class _Column(NamedTuple):
    """A column of the text forms: its heading, how a row fills it, at which widths it shows."""

    heading: str
    cell: Callable[[BoardRow], str]
    min_width: int = 0
    max_width: int = 10_000
    is_number: bool = True
    is_of_hits: bool = False
    is_of_findings: bool = False
    is_of_tuning: bool = False


def percent(share: float | None) -> str:
    """A share as percent with one decimal."""
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def with_interval(share: float | None, low: float | None, high: float | None) -> str:
    """A share in percent and its 95 % interval."""
    if share is None or low is None or high is None:
        return percent(share)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _defense(row: BoardRow) -> str:
    return f"{row.defense} *" if row.added_later else row.defense


def _needs(row: BoardRow) -> str:
    return " + ".join(NEED_WORDS.get(need, need) for need in row.needs) or "nothing"


def _status(row: BoardRow) -> str:
    return "skipped" if row.status == Status.SKIPPED else STATUS_WORDS.get(row.status, row.status)


def _cost(row: BoardRow) -> str:
    return UNKNOWN if row.relative_cost is None else f"{row.relative_cost:.2f}"


def _rates(row: BoardRow) -> str:
    if not row.lr:
        return UNKNOWN
    ends = sorted({f"{rate:.0e}".replace("e-0", "e-") for rate in (row.lr[0], row.lr[-1])})
    return "..".join(ends) + (" ?" if row.lr_rule == "select" else "")


def _tuned(row: BoardRow) -> str:
    """The trials behind a line's settings, and their cost over that of its victim."""
    if row.tuned is None:
        return UNKNOWN
    tuned = json.loads(row.tuned)
    words = [str(tuned["trials"])]
    if row.relative_cost and row.cost_seconds:
        words.append(f"{tuned['device_seconds'] * row.relative_cost / row.cost_seconds:.1f}")
    marks = [mark for mark in ("oracle", "seen") if tuned[mark]]
    return " ".join([" / ".join(words), *marks])


def _found(row: BoardRow) -> str:
    if row.found_auroc is None and row.found_recall is None:
        return UNKNOWN
    area = UNKNOWN if row.found_auroc is None else f"{row.found_auroc:.3f}"
    bound = row.found_precision_bound
    most = "" if bound is None else f" of {percent(bound)}"
    return f"{area} / {percent(row.found_recall)} / {percent(row.found_precision)}{most}"


HITS_WIDTH = 26
COLUMNS = (
    _Column("Defense", _defense, is_number=False),
    _Column("Needs", _needs, min_width=1000, is_number=False),
    _Column("Fidelity", lambda row: row.fidelity, min_width=126, is_number=False),
    _Column("Phase", lambda row: row.phase, min_width=152, is_number=False),
    _Column("Clean acc. %", lambda row: percent(row.clean_top1), max_width=95),
    _Column(
        "Clean acc. %",
        lambda row: with_interval(row.clean_top1, row.clean_top1_low, row.clean_top1_high),
        min_width=96,
    ),
    _Column("ASR %", lambda row: with_interval(row.asr_top1, row.asr_top1_low, row.asr_top1_high)),
    _Column("ASR clean victim", lambda row: percent(row.asr_clean_victim_top1)),
    _Column("Lift", lambda row: percent(row.lift_top1)),
    _Column("hit@1 %", lambda row: percent(row.hit_top1), max_width=95, is_of_hits=True),
    _Column(
        "hit@1 %",
        lambda row: with_interval(row.hit_top1, row.hit_top1_low, row.hit_top1_high),
        min_width=96,
        is_of_hits=True,
    ),
    _Column(
        "hit@1 clean victim",
        lambda row: percent(row.hit_clean_victim_top1),
        min_width=96,
        is_of_hits=True,
    ),
    _Column("R-Acc", lambda row: percent(row.r_acc), min_width=116),
    _Column("Found: AUROC / recall / prec. of bound %", _found, min_width=140, is_of_findings=True),
    _Column("lr", _rates, min_width=126),
    _Column("Cost", _cost, min_width=96),
    _Column("Tuned: trials / cost", _tuned, min_width=96, is_of_tuning=True),
    _Column("Seeds", lambda row: str(row.num_seeds), min_width=116),
    _Column("Status", _status, is_number=False),
)


def _block(row: BoardRow) -> tuple[str, str | None, str, str, str, str]:
    """What one heading of the table speaks of."""
    rate = str(row.count) if row.rate is None else row.rate_text
    return row.attack, rate, row.track, row.regime, row.model, row.target


def rate_words(row: BoardRow) -> str:
    """The rate as people say it: ``rate 1 % (41 rows)``; targeted attacks have counts only."""
    rows = "" if row.count is None else f" ({row.count} rows)"
    return f"targeted{rows}" if row.rate is None else f"rate {100 * row.rate:.4g} %{rows}"


def completeness_words(board: Board) -> str:
    """One line: how much of the grid stands behind the board."""
    state = board.completeness
    tail = f"; {state.unplanned} cells not in this grid left out" if state.unplanned else ""
    return f"{words_of(state._asdict(), state.planned)}{tail}."


def trouble(board: Board) -> list[str]:
    """What is not plainly ok and why: one line per attack, rate and reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in board.lines:
        lacking = row.num_cells - row.num_shown if row.num_shown else 0
        if row.status == Status.OK and not row.num_shown:
            kinds = "neither CA nor ASR" if board.further else "not"
            reason = f"{kinds} measured on evaluation set {row.eval_set}"
            if board.further:
                reason += f", but {', '.join(m for m in board.further if m.endswith('_top1'))}"
        elif lacking or (row.detail and row.status not in (Status.OK, Status.SKIPPED)):
            shown = f"{row.num_shown} of {row.num_cells} cells shown; " if lacking else ""
            reason = f"{shown}{_status(row)}" + (f": {row.detail}" if row.detail else "")
        else:
            continue
        reasons.setdefault((row.attack, rate_words(row), reason), []).append(row.defense)
    return [
        f"{attack}, {rate}, {', '.join(defenses)}: {reason}"
        for (attack, rate, reason), defenses in reasons.items()
    ]


def of_what(board: Board) -> str:
    """The grid and the evaluation set behind a board."""
    name, digest = board.grid.name or "unnamed", board.grid.hash or "unknown"
    return f"Grid {name}, hash {digest}, evaluation set {board.eval_set}."


def footer(board: Board) -> list[str]:
    """The lines under every text form: what the numbers are and how complete they are."""
    return [
        of_what(board),
        completeness_words(board),
        *board.notes(),
    ]


def _sections(board: Board) -> list[tuple[str, list[BoardRow]]]:
    """Titled groups of lines; empty ones are left out."""
    sections = [
        ("Defenses", board.rows),
        ("Controls", board.controls),
        (
            "Invalid victims (the attack or the start weights did not pass the gate; not counted)",
            board.invalid,
        ),
    ]
    return [(title, rows) for title, rows in sections if rows]


def _table(board: Board, width: int, color: bool) -> str:
    """Blocks of lines under one heading per attack and rate, all in the same columns.

    The layout is ours, since widths are shared by all blocks; rich wraps the prose and colours.
    """
    from rich.console import Console
    from rich.text import Text

    columns = _columns(board, width)
    texts = {id(row): [column.cell(row) for column in columns] for row in board.lines}
    sizes = _sizes(columns, list(texts.values()), width)
    told_apart = [len(set(values)) > 1 for values in zip(*map(_block, board.lines), strict=True)]
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=color, legacy_windows=False)
    for title, section in _sections(board):
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{title}\n", "bold underline")
        headings = [column.heading for column in columns]
        text.append(_laid_out(headings, columns, sizes, at_bottom=True), "bold")
        for _, group in groupby(section, _block):
            rows = list(group)
            if _has_not_run(rows):
                ran = "has an outcome yet" if any(row.detail for row in rows) else "has run"
                words = f"{_heading(rows[0], told_apart)}: none of {len(rows)} lines {ran}"
                text.append(f"{words}\n", "dim")
                continue
            text.append(f"{_heading(rows[0], told_apart)}\n", "bold cyan")
            # Only equals are compared: what a defense is given heads its lines.
            for needs, equals in groupby(rows, _needs):
                text.append(f" given {needs}\n", "italic")
                for row in equals:
                    style = "" if row.status == Status.OK else "dim" if row.num_shown else "red"
                    text.append(_laid_out(texts[id(row)], columns, sizes), style)
        console.print(text)
    if not board.lines:
        console.print("No cell has ended yet.")
    for line in trouble(board):
        console.print(Text(f"! {line}", style="red"))
    for line in board.warnings:
        console.print(Text(f"! {line}", style="yellow"))
    for line in footer(board):
        console.print(Text(line, style="dim"))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _has_not_run(rows: Sequence[BoardRow]) -> bool:
    return len(rows) > 1 and all(row.status == Status.MISSING and not row.num_shown for row in rows)


def _columns(board: Board, width: int) -> list[_Column]:
    """Those that a width has room for. Where some attack stamps nothing, its success joins them."""
    has_hits = any(row.hit_top1 is not None for row in board.lines)
    has_findings = any(row.found_recall is not None for row in board.lines)
    has_tuning = any(row.tuned is not None for row in board.lines)
    room = width - HITS_WIDTH if has_hits and width > 95 else width
    return [
        column
        for column in COLUMNS
        if (has_hits or not column.is_of_hits)
        and (has_findings or not column.is_of_findings)
        and (has_tuning or not column.is_of_tuning)
        and column.min_width <= (width if column.is_of_hits else room) <= column.max_width
    ]


def _laid_out(
    texts: Sequence[str], columns: Sequence[_Column], sizes: Sequence[int], at_bottom: bool = False
) -> str:
    """One line of the table, or several where a text is wider than its column."""
    wrapped = [
        [text] if len(text) <= size else textwrap.wrap(text, size)
        for text, size in zip(texts, sizes, strict=True)
    ]
    height = max(map(len, wrapped))
    for part in wrapped:
        empty = [""] * (height - len(part))
        part[:] = empty + part if at_bottom else part + empty
    lines = []
    for parts in zip(*wrapped, strict=True):
        padded = (
            part.rjust(size) if column.is_number else part.ljust(size)
            for part, column, size in zip(parts, columns, sizes, strict=True)
        )
        lines.append("  " + " ".join(padded) + "\n")
    return "".join(lines)


def _heading(row: BoardRow, told_apart: Sequence[bool]) -> str:
    """Attack and rate, and whatever else differs between the blocks of this board."""
    others = zip(_block(row)[2:], told_apart[2:], strict=True)
    return ", ".join(
        [f"{row.attack}, {rate_words(row)}", *(str(o) for o, differs in others if differs)]
    )


def _sizes(columns: Sequence[_Column], texts: Sequence[Sequence[str]], width: int) -> list[int]:
    """Column widths: numbers in full, headings wrapped, and words share what is left."""
    longest_word = [
        max((len(part) for text in column for part in text.split()), default=0)
        for column in zip(*texts, strict=True)
    ] or [0] * len(columns)
    longest = [max(map(len, column)) for column in zip(*texts, strict=True)] or [0] * len(columns)
    sizes = []
    for i, column in enumerate(columns):
        heading = max(map(len, column.heading.split()))
        sizes.append(max(heading, longest[i] if column.is_number else longest_word[i]))
    spare = width - 3 - sum(sizes) - len(sizes)
    for i, column in enumerate(columns):
        if not column.is_number and spare > 0:
            more = min(spare, max(0, longest[i] - sizes[i]))
            sizes[i] += more
            spare -= more
    return sizes


def lines_table(board: Board) -> Grid:
    """Every line with all columns, as one table of texts."""
    columns = _columns(board, 1000)
    rows = [row for _, section in _sections(board) for row in section]
    return Grid(
        title=f"Grid {board.grid.name or 'unnamed'}, evaluation set {board.eval_set}",
        headings=["Attack", "Rate %", *(column.heading for column in columns)],
        lines=[[row.attack, _rate(row), *(c.cell(row) for c in columns)] for row in rows],
        values=[asdict(row) for row in rows],
        are_numbers=[False, True, *(column.is_number for column in columns)],
        notes=[*trouble(board), *board.warnings, *footer(board)],
    )


def _rate(row: BoardRow) -> str:
    return UNKNOWN if row.rate is None else f"{100 * row.rate:.4g}"


def _markdown(board: Board) -> str:
    """One Markdown table per section, then the notes as a list."""
    lines: list[str] = []
    columns = _columns(board, 1000)
    head = ["Attack", "Rate %", *(column.heading for column in columns)]
    rule = ["---", "---:", *("---:" if column.is_number else "---" for column in columns)]
    for title, rows in _sections(board):
        lines += [f"### {title}", "", _markdown_row(head), _markdown_row(rule)]
        for row in rows:
            cells = [row.attack, _rate(row), *(column.cell(row) for column in columns)]
            lines.append(
                _markdown_row([cell.replace("|", "\\|").replace("*", "\\*") for cell in cells])
            )
        lines.append("")
    remarks = [*trouble(board), *board.warnings, *footer(board)]
    return "\n".join([*lines, *(f"- {remark}" for remark in remarks)]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |"


def _csv(board: Board) -> str:
    """Every line and every column; shares as 0 to 1, nothing measured as an empty field."""
    output = io.StringIO()
    names = [column.name for column in fields(BoardRow)]
    writer = csv.DictWriter(output, names, lineterminator="\n")
    writer.writeheader()
    for row in board.lines:
        lists = {"needs": " ".join(row.needs), "lr": " ".join(f"{r:g}" for r in row.lr or [])}
        cells = {**asdict(row), **lists}
        writer.writerow({name: csv_cell(cell) for name, cell in cells.items()})
    return output.getvalue()


def _json(board: Board) -> str:
    """One object: grid, completeness, every line, notes and warnings; shares as 0 to 1."""
    state = board.completeness
    document = {
        "grid": {"name": board.grid.name, "hash": board.grid.hash},
        "eval_set": board.eval_set,
        "completeness": {**state._asdict(), "complete": state.is_complete},
        "rows": [asdict(row) for row in board.lines],
        "notes": board.notes(),
        "warnings": board.warnings,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


FORMATS: Mapping[str, Callable[[Board], str]] = {"md": _markdown, "csv": _csv, "json": _json}
