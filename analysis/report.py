"""A results directory as one self-contained page: what was run, whether it may be trusted, where
defenses stand, and how much of that is certain. No torch, no Ray, no network."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from analysis.appendix import appendix, idea
from analysis.board import Board, BoardRow
from analysis.captions import OF_ATTACK, TITLES, caption
from analysis.compare import Comparison, compare
from analysis.compare_render import cells_table, comparison_line
from analysis.drawing import attack_figures, figures_in
from analysis.imports.section import others_section
from analysis.inference import benjamini_hochberg, holm
from analysis.leaderboard import Asked, Found, read
from analysis.page import (
    Block,
    Cell,
    Column,
    Facts,
    Notes,
    Picture,
    Prose,
    Section,
    Shown,
    Table,
    page,
)
from analysis.reader import Tables, read_tables
from analysis.render import lines_table, trouble
from analysis.report_tables import RATE, column, percent, table_of, with_rates
from analysis.standing import BUDGET
from analysis.standing_render import standing_table
from analysis.theme import COLUMN_INCHES, NothingToDraw, house_style, save_svg
from analysis.words import amount
from grid.schema.errors import ResultsError
from grid.schema.status import STATUS_WORDS, Status
from grid.schema.whole import write_whole
from victims.errors import counted

MOST_COMPARED = 30
MOST_LINES, MOST_VICTIMS = 5_000, 1_000
"""So much of a board, and of a comparison's victims, a browser shows without a wait."""
WORDY = (
    *("Status", "Found: AUROC / recall / prec. of bound %", "Tuned: trials / cost", "lr", "Seeds"),
    *("Needs", "Fidelity", "Phase"),
)
"""Columns of the board that stand behind its numbers."""


def write_report(
    directory: Path, path: Path, asked: Asked, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the page; also while a grid is still writing its results. ``say`` hears what is going
    on."""
    text = read_tables(directory, lambda tables: report(tables, asked, say))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def report(tables: Tables, asked: Asked, say: Callable[[str], None] = lambda _: None) -> str:
    """The page of open results."""
    found = read(tables, asked)
    board = found.board
    drawn, of_attacks = figures_in(tables, asked, found), attack_figures(tables)
    say(f"drawing {len(drawn) + sum(map(len, of_attacks.values()))} figures ...")
    few = replace(board, lines=board.lines[:MOST_LINES])
    left_out = _left_out(tables, len(board.lines))
    sections = [
        _what(tables, board),
        _validity(few, left_out),
        _standings(found),
        _board(few, left_out),
        *_comparisons(tables, found, asked),
        _figures(drawn, max((row.num_seeds for row in board.lines), default=0)),
        *others_section(found.imported),
        _attacks(tables, few, of_attacks),
        _limits(found),
        appendix(
            dict.fromkeys(row.attack for row in board.lines),
            dict.fromkeys(row.defense for row in board.lines),
        ),
    ]
    name = board.grid.name or tables.directory.name
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(
        f"{name}: backdoor attacks and defenses",
        [section for section in sections if section.blocks or section.parts],
        subtitle=f"grid {name}, hash {board.grid.hash or 'unknown'}, split {board.eval_set}",
        made=f"Written {at} from {tables.directory.name}.",
    )


def _left_out(tables: Tables, lines: int) -> list[str]:
    """What is said of a board that is too long for a page."""
    if lines <= MOST_LINES:
        return []
    name = tables.directory.name
    return [
        f"The first {MOST_LINES:,} of {lines:,} lines, by attack: `grid leaderboard {name} --part"
        f" lines --format csv` has all, and `grid view {name}` shows them a page at a time. Tiers"
        " and comparisons are of all."
    ]


def _what(tables: Tables, board: Board) -> Section:
    """Grid, versions, hardware, cost."""
    (row,) = tables.query(
        """SELECT min(written_at), max(written_at), list(DISTINCT device), list(DISTINCT commit),
                  list(DISTINCT versions), count(DISTINCT victim_seed), count(DISTINCT victim_key),
                  count(DISTINCT victim_key) FILTER (defense = 'none' AND status = 'invalid_victim')
           FROM newest WHERE metric = 'cell' AND status IN ('ok', 'inert', 'invalid_victim')"""
    ).rows
    first, last, devices, commits, versions, seeds, victims, invalid = row
    ((seconds, training),) = tables.query(
        "SELECT sum(seconds), sum(device_seconds) FROM stages WHERE NOT reused"
    ).rows
    ((failed,),) = tables.query("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").rows
    state = board.completeness
    counts = ", ".join(
        f"{number} {STATUS_WORDS.get(name, name)}"
        for name, number in state._asdict().items()
        if number and name not in ("planned", "failed", "unplanned")
    )
    pairs = [
        ("Cells", f"{state.planned} planned: {counts}"),
        (
            "Victims",
            f"{counted(victims, 'model')}{f', {invalid} of them invalid' if invalid else ''},"
            f" {counted(seeds, 'seed')}",
        ),
        ("Written", _span_of_time(first, last) if first else "nothing"),
        ("Devices", ", ".join(map(str, devices or ())) or "unknown"),
        ("Code", ", ".join(_code(str(c)) for c in commits or () if c) or "unknown"),
        ("Versions", "; ".join(_versions(v) for v in versions or () if v) or "unknown"),
        (
            "Cost",
            f"{_duration(seconds or 0)} of stages, {_duration(training or 0)} of it training;"
            f" {counted(failed, 'attempt')} failed",
        ),
    ]
    return Section(name="what", title="What was run", blocks=[Facts(pairs=pairs)])


def _code(commit: str) -> str:
    """A commit, and whether the files that ran were changed after it."""
    digest = commit.removesuffix("-dirty")
    return digest[:12] + (" (modified)" if digest != commit else "")


def _span_of_time(first: datetime, last: datetime) -> str:
    """From the first to the last, to the minute, which may be one."""
    begin, end = (f"{at:%Y-%m-%d %H:%M}" for at in (first, last))
    return f"{begin} UTC" if begin == end else f"{begin} to {end} UTC"


def _duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _versions(text: str) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(json.loads(text).items()))


def _validity(board: Board, left_out: Sequence[str]) -> Section:
    """Undefended victims: does each attack work, and at what cost?"""
    columns = [
        column("Attack"),
        column(RATE),
        column("CA %", is_number=True),
        column("ASR %", is_number=True),
        column("ASR clean victim %", is_number=True),
        column("Lift", is_number=True),
        column("Gate"),
        column("Why"),
    ]
    rows: list[list[Cell]] = []
    for row in board.lines:
        if row.defense != "none":
            continue
        is_bad = row.status not in (Status.OK, Status.INERT)
        words = STATUS_WORDS.get(row.status, row.status)
        rows.append(
            [
                row.attack,
                _rate(row),
                percent(row.clean_top1),
                percent(row.asr_top1),
                percent(row.asr_clean_victim_top1),
                percent(row.lift_top1),
                Shown(words, words, "bad" if is_bad else ""),
                row.detail or "",
            ]
        )
    table = Table(
        name="validity", caption="Undefended victims and their gate", columns=columns, rows=rows
    )
    says = Prose(
        "A gate asks the means over victim seeds, of an attack at a rate: its victims pass or fail"
        " together. No defense is measured on those that failed, and no mean holds one. ASR is to"
        " be read beside that of the clean victim on the same pictures."
    )
    blocks: list[Block] = [says, Notes(lines=left_out), table]
    return Section(name="validity", title="Are the victims sound?", blocks=blocks)


def _standings(found: Found) -> Section:
    title = "Where defenses stand"
    if found.tiers is None:
        words = Prose("No sound victim has numbers yet.")
        return Section(name="tiers", title=title, blocks=[words])
    grid = standing_table(found.tiers)
    blocks: list[Block] = [
        Prose(
            "Tiers, and no order by decimals: within a tier defenses stand by name. Compare what is"
            " given the same."
        ),
        table_of(grid, "tiers", first=("Defense",), last=("Given",)),
        Notes(lines=list(grid.notes)),
    ]
    return Section(name="tiers", title=title, blocks=blocks)


def _board(board: Board, left_out: Sequence[str]) -> Section:
    """Every line, under a head by what it is: controls and invalid victims stand apart."""
    heads = [
        *["defenses"] * len(board.rows),
        *["controls, not compared"] * len(board.controls),
        *["invalid victims, not counted"] * len(board.invalid),
    ]
    grid = replace(lines_table(board), heads=heads)
    table = table_of(
        with_rates(grid, [*board.rows, *board.controls, *board.invalid]),
        "board",
        first=("Defense", "Attack", RATE),
        last=WORDY,
        filters=("Attack", RATE, "Status"),
    )
    warnings = [*trouble(board), *board.warnings]
    blocks: list[Block] = [
        Notes(lines=left_out),
        table,
        *([Notes(lines=warnings, is_warning=True)] if warnings else []),
    ]
    return Section(name="board", title="The board", blocks=blocks)


def _comparisons(tables: Tables, found: Found, asked: Asked) -> Iterator[Section]:
    """Every defense against the control that it must beat."""
    if found.tiers is None:
        return
    names = [line.defense for line in found.tiers.lines if not line.is_beside]
    against = BUDGET if BUDGET in names else "none"
    compared: list[Comparison] = []
    others = [name for name in names if name not in (against, "none")]
    notes = []
    if oracles := [line.defense for line in found.tiers.lines if line.is_oracle]:
        notes.append(f"Oracles are left out: {', '.join(oracles)}.")
    if len(others) > MOST_COMPARED:
        notes.append(
            f"{len(others) - MOST_COMPARED} of {len(others)} defenses are left out:"
            f" `grid compare DEFENSE {against}` compares them."
        )
    for name in others[:MOST_COMPARED]:
        try:
            compared.append(compare(tables, name, against, asked.eval_set))
        except ResultsError as error:
            notes.append(f"{name} is left out: {error}")
    if not compared:
        return
    ps = [one.p_signed_rank for one in compared]
    by_seeds = holm([one.p_seeds for one in compared])
    columns = [
        Column(name="defense", heading="Defense"),
        Column(name="asr", heading="ASR, points", is_number=True),
        Column(name="clean", heading="CA, points", is_number=True),
        Column(name="p", heading="p", is_number=True, help="signed ranks over strata, two-sided"),
        Column(
            name="holm", heading="p, Holm", is_number=True, help="corrected for all of this table"
        ),
        Column(
            name="q",
            heading="q",
            is_number=True,
            help="false discovery rate (Benjamini and Hochberg), for exploring alone",
        ),
        Column(name="shared", heading="Shared victims", is_number=True),
        Column(name="says", heading="Says"),
    ]
    rows: list[list[Cell]] = [
        [
            one.first,
            Shown(comparison_line(one.asr), one.asr.value),
            Shown(comparison_line(one.clean), one.clean.value),
            one.p_signed_rank,
            round(p, 4),
            round(q, 4),
            float(one.shared),
            # Of many comparisons some look different by chance: what is said follows Holm's p.
            f"{one.says(p, s)} {one.unsaid}".rstrip(),
        ]
        for one, p, q, s in zip(compared, holm(ps), benjamini_hochberg(ps), by_seeds, strict=True)
    ]
    table = Table(
        name="comparisons",
        caption=f"Each less {against}, on shared victims",
        columns=columns,
        rows=rows,
    )
    parts = [
        Section(
            name=f"against-{one.first}",
            title=f"{one.first} against {against}, victim by victim",
            blocks=_victims(one),
        )
        for one in compared
    ]
    blocks: list[Block] = [table, *([Notes(lines=notes)] if notes else [])]
    yield Section(name="comparisons", title=f"Against {against}", blocks=blocks, parts=parts)


def _victims(one: Comparison) -> list[Block]:
    """The victims of a comparison, as many as a page holds."""
    few = replace(one, cells=one.cells[:MOST_VICTIMS])
    table = table_of(cells_table(few), f"cells-{one.first}", first=("Attack",))
    if few.cells == one.cells:
        return [table]
    words = (
        f"The first {MOST_VICTIMS:,} of {len(one.cells):,} victims: `grid compare {one.first}"
        f" {one.second}` has all."
    )
    return [Notes(lines=[words]), table]


def _figures(drawn: Mapping[str, Callable[[], Any]], num_seeds: int) -> Section:
    blocks: list[Picture | Notes] = []
    missing = []
    for name, draw in drawn.items():
        try:
            blocks.append(_picture(TITLES[name], caption(name, num_seeds), draw()))
        except NothingToDraw as error:
            missing.append(f"{TITLES[name]}: not drawn, {error}")
    # Small ones first, so that they stand side by side.
    blocks.sort(key=lambda block: isinstance(block, Picture) and block.is_wide)
    if missing:
        blocks.append(Notes(lines=missing))
    return Section(name="figures", title="Figures", blocks=blocks)


def _picture(name: str, words: str, figure: Any) -> Picture:
    """A figure as drawn; one of a page's width is shown so."""
    output = io.BytesIO()
    with house_style():
        save_svg(figure, output)
    is_wide = float(figure.get_size_inches()[0]) > COLUMN_INCHES + 0.5
    return Picture(
        alt=f"{name}: {words}", caption=words, data=output.getvalue(), kind="svg", is_wide=is_wide
    )


def _attacks(
    tables: Tables, board: Board, shown: Mapping[str, Mapping[str, Callable[[], Any]]]
) -> Section:
    """A part per attack, and the pictures where they were drawn."""
    blocks: list[Picture | Prose] = []
    gallery = tables.directory / "gallery.png"
    if gallery.is_file():
        words = "Pairs before and after each attack, and what it changed."
        blocks.append(Picture(alt=words, caption=words, data=gallery.read_bytes(), kind="png"))
    elif not shown:
        blocks.append(
            Prose(
                "`grid gallery` draws what every attack does, and `evaluate: {exhibits: true}` in"
                " the grid file keeps pictures, features and training curves: this page then shows"
                " them.",
                has_code=True,
            )
        )
    parts = []
    for attack in dict.fromkeys(row.attack for row in board.lines):
        rows = [row for row in board.lines if row.attack == attack]
        parts.append(
            Section(
                name=f"attack-{attack}",
                title=attack,
                blocks=[
                    *idea(attack, "attacks"),
                    *_pictures(attack, shown.get(attack, {})),
                    _attack_table(attack, rows),
                ],
            )
        )
    return Section(name="attacks", title="Attack by attack", blocks=blocks, parts=parts)


def _pictures(attack: str, shown: Mapping[str, Callable[[], Any]]) -> Iterator[Picture]:
    """What the run kept of an attack to be looked at."""
    for name, draw in shown.items():
        with suppress(NothingToDraw):
            yield _picture(attack, OF_ATTACK[name], draw())


def _attack_table(attack: str, rows: Sequence[BoardRow]) -> Table:
    columns = [
        column("Defense"),
        column(RATE),
        column("CA %", is_number=True),
        column("ASR %", is_number=True),
        column("R-Acc %", is_number=True),
        column("Cost", is_number=True),
        column("Status"),
    ]
    # In the order of the lines: controls are kept together, behind the defenses.
    rows = sorted(rows, key=lambda row: row.is_control)
    lines: list[list[Cell]] = [
        [
            row.defense,
            _rate(row),
            percent(row.clean_top1),
            percent(row.asr_top1),
            percent(row.r_acc),
            None
            if row.relative_cost is None
            else Shown(f"{row.relative_cost:.2f}", row.relative_cost),
            STATUS_WORDS.get(row.status, row.status),
        ]
        for row in rows
    ]
    return Table(
        name=f"lines-{attack}",
        caption=attack,
        columns=columns,
        rows=lines,
        heads=["controls, not compared" if row.is_control else "defenses" for row in rows],
    )


def _rate(row: BoardRow) -> Shown:
    return Shown(amount(row.rate, row.count), row.count or row.rate or 0.0)


def _limits(found: Found) -> Section:
    lines = found.board.notes()
    lines.append(
        "A defense that does not help here may help elsewhere, and the other way round: these"
        " numbers are of these models, data and attacks."
    )
    return Section(
        name="limits", title="What this can and cannot tell", blocks=[Notes(lines=lines)]
    )
