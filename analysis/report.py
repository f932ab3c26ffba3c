"""A results directory as one self-contained page: what was run, whether it may be trusted, where
defenses stand, and how much of that is certain. No torch, no Ray, no network."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from analysis.board import Board, BoardRow
from analysis.compare import Comparison, compare
from analysis.compare_render import cells_table, comparison_line
from analysis.drawing import attack_figures, figures_in
from analysis.imports.section import others_section
from analysis.inference import benjamini_hochberg, holm
from analysis.leaderboard import Asked, Found, read
from analysis.methods import method_of, told_by
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
from analysis.render import lines_table, rate_words, trouble
from analysis.standing import BUDGET
from analysis.standing_render import standing_table
from analysis.text import Grid
from analysis.theme import COLUMN_INCHES, NothingToDraw, house_style
from grid.schema import STATUS_WORDS, ResultsError, Status, write_whole

WORDS = {
    "heat_map": "ASR of every defense on every attack, mean over sound victims; hatched is invalid,"
    " missing or failed.",
    "trade_off": "Clean accuracy against ASR over all strata, with intervals over victim seeds. The"
    " line is the front: nothing is both more accurate and safer.",
    "rank_plot": "The interval of ranks of each defense; who shares a letter is not told apart.",
    "rate_curves": "ASR and clean accuracy against the poison rate; bands from the lowest to the"
    " highest victim seed.",
    "profile": "The share of victims on which a defense leaves at most so much ASR.",
    "cost": "What a defense costs beside its victim's training, and the share of lift it removes.",
    "detection": "How what a defense says of rows tells the poisoned ones, of one victim an attack;"
    " cover rows are left out.",
}
OF_ATTACK = {
    "gallery": "Pictures of the evaluation set before and after the trigger, and what it changed.",
    "feature_map": "Image features of clean and triggered pictures in the model's own plane: of one"
    " victim, and of what defenses made of it.",
    "training": "What the last fit of each model recorded, of one victim and its defenses.",
}
TITLES = {
    "heat_map": "ASR by attack and defense",
    "trade_off": "Accuracy against safety",
    "rank_plot": "Ranks",
    "rate_curves": "Poison rates",
    "profile": "Performance profile",
    "cost": "Cost",
    "detection": "Telling poisoned rows",
}
MOST_COMPARED = 30
NUMBER = re.compile(r"(?P<less><?) ?(?P<number>[+-]?\d+(\.\d+)?(e[+-]?\d+)?)")


def write_report(directory: Path, path: Path, asked: Asked) -> Path:
    """Write the page; also while a grid is still writing its results."""
    text = read_tables(directory, lambda tables: report(tables, asked))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def report(tables: Tables, asked: Asked) -> str:
    """The page of open results."""
    found = read(tables, asked)
    board = found.board
    sections = [
        _what(tables, board),
        _validity(board),
        _standings(found),
        _board(board),
        *_comparisons(tables, found, asked),
        _figures(tables, asked),
        *others_section(found.imported),
        _attacks(tables, board),
        _limits(found),
        _appendix(board),
    ]
    name = board.grid.name or tables.directory.name
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(
        f"{name}: backdoor attacks and defenses",
        [section for section in sections if section.blocks or section.parts],
        subtitle=f"grid {name}, hash {board.grid.hash or 'unknown'}, split {board.eval_set}",
        made=f"Written {at} from {tables.directory.name}.",
    )


def _what(tables: Tables, board: Board) -> Section:
    """Grid, versions, hardware, cost."""
    (row,) = tables.query(
        """SELECT min(written_at), max(written_at), list(DISTINCT device), list(DISTINCT commit),
                  list(DISTINCT versions), count(DISTINCT victim_seed), count(DISTINCT victim_key)
           FROM newest WHERE metric = 'cell' AND status = 'ok'"""
    ).rows
    first, last, devices, commits, versions, seeds, victims = row
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
        ("Victims", f"{victims} models, {seeds} seed{'s' if seeds != 1 else ''}"),
        ("Written", f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC" if first else "nothing"),
        ("Devices", ", ".join(map(str, devices or ())) or "unknown"),
        (
            "Code",
            ", ".join(str(c).removesuffix("-dirty")[:12] for c in commits or () if c) or "unknown",
        ),
        ("Versions", "; ".join(_versions(v) for v in versions or () if v) or "unknown"),
        (
            "Cost",
            f"{(seconds or 0) / 3600:.2f} hours of stages, {(training or 0) / 3600:.2f} of them"
            f" training; {failed} attempts failed",
        ),
    ]
    return Section(name="what", title="What was run", blocks=[Facts(pairs=pairs)])


def _versions(text: str) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(json.loads(text).items()))


def _validity(board: Board) -> Section:
    """Undefended victims: does each attack work, and at what cost?"""
    columns = [
        Column(name="attack", heading="Attack"),
        Column(name="rate", heading="Rate"),
        Column(name="clean", heading="CA %", is_number=True),
        Column(name="asr", heading="ASR %", is_number=True),
        Column(
            name="base",
            heading="ASR clean victim %",
            is_number=True,
            help="the same stamped pictures on a victim that was not poisoned",
        ),
        Column(name="lift", heading="Lift", is_number=True),
        Column(name="status", heading="Gate"),
        Column(name="detail", heading="Why"),
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
                Shown(rate_words(row), row.rate or 0.0),
                _percent(row.clean_top1),
                _percent(row.asr_top1),
                _percent(row.asr_clean_victim_top1),
                _percent(row.lift_top1),
                Shown(words, words, "bad" if is_bad else ""),
                row.detail or "",
            ]
        )
    table = Table(
        name="validity", caption="Undefended victims and their gate", columns=columns, rows=rows
    )
    says = Prose(
        "No defense is measured on a victim that failed its gate, and no mean holds one. ASR is to"
        " be read beside that of the clean victim on the same pictures."
    )
    return Section(name="validity", title="Are the victims sound?", blocks=[says, table])


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
        _table_of(grid, "tiers", first="Defense", heads="Group"),
        Notes(lines=list(grid.notes)),
    ]
    return Section(name="tiers", title=title, blocks=blocks)


def _board(board: Board) -> Section:
    grid = lines_table(board)
    table = _table_of(grid, "board", first="Defense", filters=("Attack", "Rate %", "Status"))
    warnings = [*trouble(board), *board.warnings]
    blocks: list[Block] = [table, *([Notes(lines=warnings, is_warning=True)] if warnings else [])]
    return Section(name="board", title="The board", blocks=blocks)


def _table_of(
    grid: Grid, name: str, first: str, heads: str = "", filters: Sequence[str] = ()
) -> Table:
    """A table of texts whose numbers sort as numbers, with what names a line in front."""
    order = sorted(range(len(grid.headings)), key=lambda i: grid.headings[i] != first)
    columns = [
        Column(name=grid.headings[i], heading=grid.headings[i], is_number=grid.are_numbers[i])
        for i in order
    ]
    rows: list[list[Cell]] = [
        [_sorted(line[i], is_number=grid.are_numbers[i]) for i in order] for line in grid.lines
    ]
    if heads:
        columns.append(Column(name=heads, heading=heads))
        rows = [[*row, head] for row, head in zip(rows, grid.heads, strict=True)]
    kept = [column for column in filters if column in grid.headings]
    return Table(name=name, caption=grid.title, columns=columns, rows=rows, filters=kept)


def _sorted(text: str, *, is_number: bool) -> Cell:
    """A text with the number that it begins with; what is less than a number sorts before it."""
    if not is_number:
        return text
    found = NUMBER.match(text)
    if found is None:
        return Shown(text, math.nan, "muted")
    number = float(found["number"])
    return Shown(text, math.nextafter(number, -math.inf) if found["less"] else number)


def _percent(share: float | None) -> Cell:
    return None if share is None else Shown(f"{100 * share:.1f}", share)


def _comparisons(tables: Tables, found: Found, asked: Asked) -> Iterator[Section]:
    """Every defense against the control that it must beat."""
    if found.tiers is None:
        return
    names = [line.defense for line in found.tiers.lines if not line.is_control]
    against = BUDGET if BUDGET in names else "none"
    compared: list[Comparison] = []
    others = [name for name in names if name not in (against, "none")]
    notes = []
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
            one.says(p),
        ]
        for one, p, q in zip(compared, holm(ps), benjamini_hochberg(ps), strict=True)
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
            blocks=[_table_of(cells_table(one), f"cells-{one.first}", first="Attack")],
        )
        for one in compared
    ]
    blocks: list[Block] = [table, *([Notes(lines=notes)] if notes else [])]
    yield Section(name="comparisons", title=f"Against {against}", blocks=blocks, parts=parts)


def _figures(tables: Tables, asked: Asked) -> Section:
    blocks: list[Picture | Notes] = []
    missing = []
    for name, draw in figures_in(tables, asked).items():
        try:
            blocks.append(_picture(TITLES[name], WORDS[name], draw()))
        except NothingToDraw as error:
            missing.append(f"{TITLES[name]}: not drawn, {error}")
    if missing:
        blocks.append(Notes(lines=missing))
    return Section(name="figures", title="Figures", blocks=blocks)


def _picture(name: str, words: str, figure: Any) -> Picture:
    """A figure as drawn; one of a page's width is shown so."""
    output = io.BytesIO()
    with house_style():
        figure.savefig(output, format="svg", metadata={"Date": None})
    is_wide = float(figure.get_size_inches()[0]) > COLUMN_INCHES + 0.5
    return Picture(
        alt=f"{name}: {words}", caption=words, data=output.getvalue(), kind="svg", is_wide=is_wide
    )


def _attacks(tables: Tables, board: Board) -> Section:
    """A part per attack, and the pictures where they were drawn."""
    blocks: list[Picture | Prose] = []
    gallery, shown = tables.directory / "gallery.png", attack_figures(tables)
    if gallery.is_file():
        words = "Pairs before and after each attack, and what it changed."
        blocks.append(Picture(alt=words, caption=words, data=gallery.read_bytes(), kind="png"))
    elif not shown:
        blocks.append(
            Prose(
                "`grid gallery` draws what every attack does, and `evaluate: {exhibits: true}` in"
                " the grid file keeps pictures, features and training curves: this page then shows"
                " them."
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
                    *_method(attack, "attacks"),
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
        Column(name="defense", heading="Defense"),
        Column(name="rate", heading="Rate"),
        Column(name="clean", heading="CA %", is_number=True),
        Column(name="asr", heading="ASR %", is_number=True),
        Column(name="r_acc", heading="R-Acc %", is_number=True),
        Column(name="cost", heading="Cost", is_number=True),
        Column(name="status", heading="Status"),
    ]
    lines: list[list[Cell]] = [
        [
            row.defense,
            Shown(rate_words(row), row.rate or 0.0),
            _percent(row.clean_top1),
            _percent(row.asr_top1 if row.asr_top1 is not None else row.hit_top1),
            _percent(row.r_acc),
            None if row.relative_cost is None else round(row.relative_cost, 2),
            STATUS_WORDS.get(row.status, row.status),
        ]
        for row in rows
    ]
    return Table(name=f"lines-{attack}", caption=attack, columns=columns, rows=lines)


def _limits(found: Found) -> Section:
    lines = found.board.notes()
    lines.append(
        "A defense that does not help here may help elsewhere, and the other way round: these"
        " numbers are of these models, data and attacks."
    )
    return Section(
        name="limits", title="What this can and cannot tell", blocks=[Notes(lines=lines)]
    )


def _appendix(board: Board) -> Section:
    """What the methods say of themselves."""
    parts = []
    for package, labels in (
        ("attacks", dict.fromkeys(row.attack for row in board.lines)),
        ("defenses", dict.fromkeys(row.defense for row in board.lines)),
    ):
        methods = dict.fromkeys(
            method for label in labels if (method := method_of(label, package)) is not None
        )
        parts += [
            Section(
                name=f"{package}-{method}",
                title=f"{method} ({package.removesuffix('s')})",
                blocks=[Prose(told_by(package)[method])],
            )
            for method in methods
        ]
    return Section(name="methods", title="Methods", blocks=[], parts=parts)


def _method(label: str, package: str) -> list[Prose]:
    method = method_of(label, package)
    told = told_by(package)[method] if method else ""
    return [Prose(told.split("\n\n")[0])] if told else []
