"""Figures that papers and their authors' code print, to be shown in grey beside ours.

Each names its paper, table, model, data, metric and metric variant, and where it was read. They
were measured on other models, data and victims: nothing is computed from them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from grid.schema.errors import SchemaError

RELATIONS = ("=", "<", "<=", ">", ">=")
VARIANTS = {
    "clean_top": ("top-1",),
    "asr_top": ("all images", "non-target images", "not stated"),
    "psr_top": ("targeted success",),
    "r_acc": ("non-target images",),
    "auroc": ("training rows", "test images", "not stated"),
}
GEOMETRIES = ("crop", "squash", "not stated")

# The metrics that are shown beside a board.
WORDS = {"clean_top1": "CA", "asr_top1": "ASR", "r_acc": "R-Acc", "auroc": "AUROC"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One figure. ``value`` is a share, 0 to 1; ``relation`` says whether it is a bound;
    ``variant`` over which images the metric was counted; ``geometry`` how these were brought to
    the model's size, before any stamp; ``setting`` what is special about it."""

    paper: str
    table: str
    model: str
    data: str
    attack: str
    defense: str
    setting: str
    metric: str
    variant: str
    geometry: str
    relation: str
    value: float
    source: str


def published() -> list[Published]:
    """Every figure of the table that comes with the package."""
    text = resources.files("analysis").joinpath("published.csv").read_text("utf-8")
    return read(text.splitlines(), "analysis/published.csv")


def read(lines: Iterable[str], where: str) -> list[Published]:
    """Rows of CSV as figures; a row that does not say all it must is refused, with its line."""
    names = [field.name for field in fields(Published)]
    reader = csv.DictReader(lines, strict=True)
    if list(reader.fieldnames or []) != names:
        raise SchemaError(f"{where}: the columns must be {', '.join(names)}")
    found = []
    for row in reader:
        faults = list(_faults(row))
        if faults:
            raise SchemaError(f"{where}, line {reader.line_num}: {'; '.join(faults)}")
        texts: dict[str, Any] = {**row, "value": float(row["value"])}
        found.append(Published(**texts))
    seen: dict[tuple[str, ...], float] = {}
    for figure in found:
        about = tuple(str(getattr(figure, name)) for name in names if name != "value")
        if about in seen:
            raise SchemaError(f"{where}: {', '.join(filter(None, about))} is given twice")
        seen[about] = figure.value
    return found


def _faults(row: dict[str, str]) -> Iterable[str]:
    for name, text in row.items():
        if name != "setting" and not text:
            yield f"{name} is empty"
    metric, variant = row["metric"] or "", row["variant"]
    allowed = next((v for start, v in VARIANTS.items() if metric.startswith(start)), None)
    if allowed is None:
        yield f"metric {metric!r}; known beginnings: {', '.join(VARIANTS)}"
    elif variant not in allowed:
        yield f"variant {variant!r} of {metric}; allowed: {', '.join(allowed)}"
    if row["geometry"] not in GEOMETRIES:
        yield f"geometry {row['geometry']!r}; allowed: {', '.join(GEOMETRIES)}"
    if row["relation"] not in RELATIONS:
        yield f"relation {row['relation']!r}; allowed: {' '.join(RELATIONS)}"
    try:
        value = float(row["value"])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        yield f"value {row['value']!r}; a share lies in 0 to 1 (not percent)"


def lines(
    attacks: Collection[str], defenses: Collection[str], found: Sequence[Published] | None = None
) -> list[str]:
    """Clean accuracy, ASR, R-Acc and AUROC of a board's attacks and defenses, one line per cell; of
    the table that comes along, unless figures are given."""
    cells: dict[tuple[str, ...], dict[str, Published]] = {}
    for f in published() if found is None else found:
        if f.attack in attacks and f.defense in defenses and f.metric in WORDS:
            about = (f.attack, f.defense, f.setting, f.model, f.data, f.paper, f.table)
            cells.setdefault(about, {})[f.metric] = f
    shown = []
    for (attack, defense, setting, *where), figures in cells.items():
        numbers = [_told(figures[metric]) for metric in WORDS if metric in figures]
        named = f"{defense} ({setting})" if setting else defense
        shown.append(f"{attack}, {named}: {', '.join(numbers)} [{', '.join(where)}]")
    return shown


def _told(figure: Published) -> str:
    """A number with what it was counted over and the geometry of its images."""
    is_area = figure.metric == "auroc"
    number = f"{figure.value:.3f}" if is_area else f"{100 * figure.value:.1f} %"
    bound = "" if figure.relation == "=" else f"{figure.relation} "
    over = "" if figure.metric == "clean_top1" else f"counted over: {figure.variant}; "
    return f"{WORDS[figure.metric]} {bound}{number} ({over}geometry: {figure.geometry})"
