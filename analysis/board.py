"""The board: what a results directory says, one line per attack x rate x defense.

Lines come in an order that claims nothing: by attack and rate, then by what the defender is
given, then as the grid file lists the defenses. Controls and invalid victims stand apart.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from analysis.reader import GridInfo, Tables, read_tables
from analysis.stats import defense_effectiveness, normalised_asr, seeds_label
from grid.schema.errors import no_such
from grid.schema.status import Status, is_complete

NEEDS = ("clean_data", "suspect_data", "victim", "reference", "start", "truth")
DERIVED = ("nasr_top1", "der")
"""Columns of a line that are computed here; all others come from the view."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardRow:
    """One line. Shares are 0 to 1; a number that was not measured is None.

    ``status`` is the worst among the line's cells, ``shown_status`` that of the ``num_shown``
    cells behind its numbers. ``success`` is the metric that says how the attack fares: ``asr_top1``
    or, where nothing is stamped, ``psr_top1`` or ``text_hit_top1``, whose value is ``hit_top1``.
    ``lr`` are the learning rates of the cells; ``tuned`` is JSON, of the campaign that chose the
    settings, if one did; ``found_`` is how a defense that judges rows told
    the poisoned ones; ``found_precision_bound`` is the highest precision that so many flagged
    rows can have.
    """

    attack: str
    rate: float | None
    rate_text: str | None
    count: int | None
    defense: str
    needs: list[str]
    fidelity: str
    phase: str
    is_control: bool
    clean_top1: float | None
    clean_top1_low: float | None
    clean_top1_high: float | None
    asr_top1: float | None
    asr_top1_low: float | None
    asr_top1_high: float | None
    asr_clean_victim_top1: float | None
    lift_top1: float | None
    nasr_top1: float | None = None
    der: float | None = None
    success: str | None
    hit_top1: float | None
    hit_top1_low: float | None
    hit_top1_high: float | None
    hit_n: int | None
    hit_clean_victim_top1: float | None
    r_acc: float | None
    num_seeds: int
    num_cells: int
    num_shown: int
    shown_status: str | None
    status: str
    detail: str | None
    relative_cost: float | None
    cost_seconds: float | None
    pair_views: float | None
    lr: list[float] | None
    lr_rule: str | None
    tuned: str | None
    found_auroc: float | None
    found_recall: float | None
    found_precision: float | None
    found_precision_bound: float | None
    eval_set: str
    track: str
    regime: str
    model: str
    target: str
    added_later: bool


class Completeness(NamedTuple):
    """How many planned cells ended how. ``failed`` is both kinds of failure together."""

    planned: int
    ok: int
    failed: int
    failed_method: int
    failed_infrastructure: int
    skipped: int
    inert: int
    invalid_victim: int
    not_applicable: int
    cancelled: int
    requeued: int
    missing: int
    unplanned: int

    @property
    def is_complete(self) -> bool:
        """As `grid check` says it."""
        return is_complete(self._asdict())


class Unfinished(NamedTuple):
    """A planned cell without an outcome, and why."""

    cell: str
    label: str | None
    attack: str
    rate_text: str | None
    defense: str
    victim_seed: int
    status: str
    detail: str | None
    attempts: int | None


@dataclass(frozen=True, slots=True)
class Board:
    """Everything a renderer needs."""

    grid: GridInfo
    eval_set: str
    completeness: Completeness
    lines: list[BoardRow]
    warnings: list[str] = field(default_factory=list)
    # Metrics measured on the set that have no column here, and where the results are.
    further: tuple[str, ...] = ()
    directory: str = "DIR"

    @property
    def rows(self) -> list[BoardRow]:
        """Defenses (and the undefended victim), the controls left out."""
        return [row for row in self.lines if not (row.is_control or _is_invalid(row))]

    @property
    def controls(self) -> list[BoardRow]:
        """Controls of the experiment: what the numbers of the defenses are held against."""
        return [row for row in self.lines if row.is_control and not _is_invalid(row)]

    @property
    def invalid(self) -> list[BoardRow]:
        """Attacks that did not pass the gate: their victims' numbers and the skipped cells."""
        return [row for row in self.lines if _is_invalid(row)]

    def notes(self) -> list[str]:
        """What a reader must know beside the numbers, one sentence each."""
        seeds = sorted({row.num_seeds for row in self.lines if row.num_seeds})
        most = f"; some lines have up to {seeds[-1]} seeds" if len(seeds) > 1 else ""
        notes = [f"{seeds_label(seeds[0])}{most}."] if seeds else []
        notes += [
            "ASR: share of triggered images of other classes answered with the target. Beside it "
            "the same images on the clean victim; lift is the difference.",
            "Lines are ordered, not ranked: compare defenses with equal needs only.",
            "Cost: the defense's own training time over that of its victim (device seconds); "
            "evaluation is not part of it.",
        ]
        if any(row.lr_rule == "select" for row in self.lines):
            notes.append(
                "lr ?: the learning rate was selected on held-out pairs of the data that the "
                "defense was given, never by attack success; the search is part of its cost."
            )
        if any(row.tuned for row in self.lines):
            notes.append(
                "Tuned: trials of the search that chose the settings on the tuning split, and what "
                "they cost beside one victim; `seen`: it was tuned on this very attack; `oracle`: "
                "it saw the held-out attacks, as no defender does."
            )
        if any(row.found_recall is not None for row in self.lines):
            notes.append(
                "Found: AUROC of the defense's suspicion, recall and precision of the rows that it "
                "flagged, against the truth; after `of`, the highest precision that so many "
                "flagged rows can have."
            )
        if any(row.hit_top1 is not None for row in self.lines):
            notes.append(
                "hit@1, of attacks that stamp nothing: share of the chosen pictures read as what "
                "was chosen for them, or of the chosen queries answered with the target."
            )
        if self.further:
            shown_by = further_sql(self.eval_set, self.directory)
            notes.append(
                f"Also measured on {self.eval_set}, and in no column here: "
                f"{', '.join(self.further)}. See them with: {shown_by}"
            )
        if any(row.status == Status.INERT for row in self.lines):
            notes.append("inert: the attack lifts ASR by too little at this rate to be defended.")
        if any(row.added_later for row in self.lines):
            notes.append("* the cell joined the grid after its first run.")
        return notes


def load_board(directory: Path, eval_set: str = "report") -> Board:
    """The board of a results directory, also while a grid is still writing there."""
    return read_tables(directory, lambda tables: read_board(tables, eval_set))


def check_eval_set(results: Tables, eval_set: str) -> None:
    """Refuse an evaluation set that nothing was measured on."""
    known = [name for (name,) in results.query("FROM eval_sets ORDER BY 1").rows]
    if eval_set not in known:
        raise no_such("evaluation set", eval_set, known, f" in {results.directory}")


def read_board(results: Tables, eval_set: str = "report") -> Board:
    """The board of open results."""
    check_eval_set(results, eval_set)
    names = ", ".join(f'"{f.name}"' for f in fields(BoardRow) if f.name not in DERIVED)
    answer = results.query(f"SELECT {names} FROM board WHERE eval_set = ?", eval_set)  # noqa: S608
    lines = _derived([BoardRow(**dict(zip(answer.columns, r, strict=True))) for r in answer.rows])
    place = _places(results)
    lines.sort(
        key=lambda row: (
            place["attack"].get(row.attack, len(place["attack"])),
            row.attack,
            -1.0 if row.rate is None else row.rate,
            row.count or 0 if row.rate is None else 0,
            (row.track, row.regime, row.model, row.target),
            row.is_control,
            needs_tier(row.needs),
            row.defense != "none",
            place["defense"].get(row.defense, len(place["defense"])),
            row.defense,
        )
    )
    return Board(
        grid_info(results),
        eval_set,
        _completeness(results),
        lines,
        results.warnings,
        _further(results, eval_set),
        str(results.directory),
    )


FURTHER = ("image_to_text_", "text_to_image_", "probe_")
"""How the names begin of what a board has no columns for: retrieval, and probes."""


def _further(results: Tables, eval_set: str) -> tuple[str, ...]:
    """What was measured on a set besides what the columns show."""
    found = results.query(
        "SELECT metric FROM newest WHERE eval_set = ? AND value IS NOT NULL GROUP BY 1 "
        "ORDER BY regexp_extract(metric, '^(.*?)[0-9]*$', 1), "
        "TRY_CAST(regexp_extract(metric, '[0-9]*$') AS INT)",
        eval_set,
    )
    return tuple(metric for (metric,) in found.rows if metric.startswith(FURTHER))


def further_sql(eval_set: str, directory: str) -> str:
    """A command that shows what was measured on a set without a column for it."""
    like = " OR ".join(f"metric LIKE '{prefix}%'" for prefix in FURTHER)
    named = eval_set.replace("'", "''")
    query = (  # for people to run: a user's SQL can read the views and nothing else
        "SELECT attack, rate_text, defense, metric, avg(value) AS value FROM newest"  # noqa: S608
        f" WHERE eval_set = '{named}' AND value IS NOT NULL AND ({like}) GROUP BY ALL ORDER BY ALL"
    )
    return f'grid sql "{query}" --in {shlex.quote(directory)}'


def _derived(lines: list[BoardRow]) -> list[BoardRow]:
    """The lines with what follows from the numbers of a line and of its undefended victim."""

    def about(row: BoardRow) -> tuple[object, ...]:
        count = row.count if row.rate is None else None
        return row.attack, row.rate, count, row.track, row.regime, row.model, row.target

    undefended = {about(row): row for row in lines if row.defense == "none"}
    done = []
    for row in lines:
        asr, base, none = row.asr_top1, row.asr_clean_victim_top1, undefended.get(about(row), row)
        nasr = None if asr is None or base is None else normalised_asr(asr, base)
        found = (none.clean_top1, none.asr_top1, row.clean_top1, asr)
        known = [number for number in found if number is not None]
        is_held = none.defense == "none" and len(known) == len(found)
        der = defense_effectiveness(*known) if is_held else None
        done.append(replace(row, nasr_top1=nasr, der=der))
    return done


def needs_tier(needs: list[str]) -> tuple[int, ...]:
    """Orders groups of needs: fewer first, the truth last; equal needs are equal."""
    order = sorted(NEEDS.index(need) if need in NEEDS else len(NEEDS) for need in needs)
    return ("truth" in needs, len(order), *order)


def unfinished(results: Tables) -> list[Unfinished]:
    """The planned cells that stand between the grid and completeness, in file order."""
    answer = results.query(
        "SELECT cell, label, attack, rate_text, defense, victim_seed, status, detail, attempts "
        "FROM outcomes WHERE is_planned "
        "AND status IN ('missing', 'failed_infrastructure', 'cancelled', 'requeued') "
        "ORDER BY position, cell"
    )
    return [Unfinished(*row) for row in answer.rows]


def _is_invalid(row: BoardRow) -> bool:
    if row.shown_status is None:
        return row.status in (Status.INVALID_VICTIM, Status.SKIPPED)
    return row.shown_status == Status.INVALID_VICTIM


def grid_info(results: Tables) -> GridInfo:
    """grid.json where there is one, else what the newest row says."""
    if results.grid.name is not None:
        return results.grid
    rows = results.query(
        "SELECT grid, grid_hash FROM rows WHERE metric = 'cell' ORDER BY written_at DESC LIMIT 1"
    ).rows
    return GridInfo(rows[0][0], rows[0][1], None) if rows else results.grid


def _completeness(results: Tables) -> Completeness:
    ended: dict[str, int] = dict(results.query("FROM completeness").rows)
    unplanned = ended.pop("unplanned", 0)
    known = sum(ended.values())
    # grid.json may give the number of cells without the list of them.
    planned = max(known, results.grid.planned or 0)
    count: dict[str, Any] = {status.value: ended.get(status.value, 0) for status in Status}
    count["missing"] += planned - known
    failed = count["failed_method"] + count["failed_infrastructure"]
    return Completeness(planned=planned, failed=failed, unplanned=unplanned, **count)


def _places(results: Tables) -> dict[str, dict[str, int]]:
    """Where the grid file first mentions each attack and each defense."""
    return {
        column: dict(
            results.query(
                f"SELECT {column}, min(position) FROM planned GROUP BY ALL"  # noqa: S608
            ).rows
        )
        for column in ("attack", "defense")
    }
