"""A comparison as text: the verdict first, then the numbers behind it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from analysis.compare import CellTest, Comparison
from analysis.inference import ALPHA, Mean, least_p
from analysis.render import UNKNOWN
from analysis.text import Grid, formed
from victims.errors import counted


def comparison_text(found: Comparison, form: str = "table", width: int = 100) -> str:
    """The comparison in one of the forms; CSV holds the cells."""
    if form == "json":
        return json.dumps(_plain(asdict(found)), indent=1, allow_nan=False) + "\n"
    grid = cells_table(found)
    if form in ("csv", "tex", "html"):
        return formed(grid, form)
    head = summary(found)
    if form == "md":
        return "\n".join([f"**{head[0]}**", "", *(f"- {line}" for line in head[1:]), ""]) + (
            "\n" + formed(grid, "md")
        )
    return "\n".join([*head, ""]) + "\n" + formed(grid, form, width)


def _lacking(found: Comparison) -> str:
    """How many each has, where one has victims that the other lacks."""
    if found.of_first == found.of_second == found.shared:
        return ""
    return f" ({found.first} has {found.of_first}, {found.second} has {found.of_second})"


def summary(found: Comparison) -> list[str]:
    """The verdict, then effect, interval, p and what was shared, one sentence each."""
    seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
    caution = ", indicative" if 1 < found.seeds < 5 else ""
    lines = [
        found.verdict,
        *([found.unsaid] if found.unsaid else []),
        f"{found.first} against {found.second}, on {counted(found.shared, 'victim')} that both"
        f" have{_lacking(found)}, {counted(found.strata, 'stratum', 'strata')}, {seeds}"
        f"{caution}. Differences are {found.first} less {found.second}, in points.",
        f"ASR: {_points(found.asr)} over victim seeds{_over_strata(found, found.asr_strata)};"
        f" signed-rank p {_p(found.p_signed_rank)}, sign flips p {_p(found.p_sign_flip)}"
        f"{_by_seeds(found)}.",
        f"Clean accuracy: {_points(found.clean)} over victim"
        f" seeds{_over_strata(found, found.clean_strata)}; signed-rank p"
        f" {_p(found.clean_p_signed_rank)}.",
        f"Probability that a victim has the smaller ASR with {found.first}:"
        f" {found.first_better:.2f} (of the victims that both have, ties by half).",
    ]
    if found.detectable is not None:
        least = min(100.0, 100 * found.detectable)
        lines.append(
            f"A paired t test over these strata would find a true difference of {least:.1f} points"
            " 4 times in 5."
        )
    if found.defense_seeds > 1:
        lines.append("McNemar's test is of each victim's first defense seed; means are of all.")
    later = (
        f"; of {' and '.join(found.added_later)} cells joined it after its first run"
        if found.added_later
        else ""
    )
    lines.append(
        f"Grid {found.grid or 'unnamed'}, hash {found.grid_hash or 'unknown'}, evaluation set"
        f" {found.eval_set}{later}."
    )
    return [*lines, *(f"! {warning}" for warning in found.warnings)]


def _by_seeds(found: Comparison) -> str:
    """The test over victim seeds, where there are several."""
    return f", t test over victim seeds p {_p(found.p_seeds)}" if found.asr.df else ""


def _over_strata(found: Comparison, mean: Mean) -> str:
    """The interval that strata have as a sample, where a test of them could find anything."""
    if least_p(found.strata) > ALPHA:
        return ""
    return f", {_points(mean)} were strata a sample"


def cells_table(found: Comparison) -> Grid:
    """Every shared victim; pictures are those on which the attack fools one model alone."""
    return Grid(
        title="By victim (McNemar on pictures, exact; Holm over the victims)",
        headings=(
            *("Attack", "Rate", "Seed", "ASR, points", "CA, points"),
            *(f"Only {found.first} fooled", f"Only {found.second} fooled", "p", "p Holm", "CA p"),
        ),
        lines=[_texts(cell) for cell in found.cells],
        values=[asdict(cell) for cell in found.cells],
        are_numbers=(False, True, True, *[True] * 7),
    )


def _texts(cell: CellTest) -> list[str]:
    return [
        f"{cell.attack} ({cell.kind})" if cell.kind else cell.attack,
        cell.rate,
        str(cell.seed),
        f"{100 * cell.asr_difference:+.1f}",
        f"{100 * cell.clean_difference:+.1f}",
        UNKNOWN if cell.only_first is None else str(cell.only_first),
        UNKNOWN if cell.only_second is None else str(cell.only_second),
        _p(cell.p),
        _p(cell.p_holm),
        _p(cell.clean_p),
    ]


def comparison_line(mean: Mean) -> str:
    """A difference in points with its interval, if there is one."""
    return _points(mean).replace(" (no interval)", "")


def _points(mean: Mean) -> str:
    if math.isinf(mean.low):
        return f"{100 * mean.value:+.1f} (no interval)"
    return f"{100 * mean.value:+.1f} [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"


def _p(p: float | None) -> str:
    if p is None:
        return UNKNOWN
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Mean):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
