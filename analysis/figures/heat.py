"""ASR of every defense against every attack and rate, as numbers on colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.figures.panels import SMALL, as_numbers, names_in, require
from analysis.theme import (
    COLUMN_INCHES,
    LETTER_INCHES,
    PAGE_INCHES,
    NothingToDraw,
    legend,
    name_parts,
    new_figure,
    wrapped,
)
from grid.schema.status import Status

if TYPE_CHECKING:
    import pandas as pd

ROW_LETTERS = 26
LOSS_INCHES = 0.5
MOST_COLUMNS = 24
"""A page has room for so many numbers of three digits beside long names."""
CORNER = ((0.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 0.0))
"""A mark left of and below its place."""


MOST_PANELS = 10
"""Of more columns a picture tells nothing, and takes minutes."""


class _Hatch(NamedTuple):
    """How cells without a number of their own are marked."""

    words: str
    pattern: str


HATCHES = {
    "invalid": _Hatch("invalid or skipped victim", "/////"),
    "inapplicable": _Hatch("not applicable", "-----"),
    "failed": _Hatch("failed", "xxxxx"),
    "missing": _Hatch("missing", "....."),
}
KINDS: dict[str, str] = {
    **dict.fromkeys((Status.INVALID_VICTIM, Status.SKIPPED, Status.INERT), "invalid"),
    Status.NOT_APPLICABLE: "inapplicable",
    **dict.fromkeys((Status.FAILED_METHOD, Status.FAILED_INFRASTRUCTURE, "failed"), "failed"),
}


def heat_map(frame: pd.DataFrame) -> Any:
    """ASR in percent: a row per defense, a column per attack and rate, a page wide if need be.

    Columns: attack, rate, defense, asr, status and, for a last column of what each defense costs in
    accuracy, clean; one row per cell. A cell whose status is not ok is hatched, and so is one that
    has no row or no ASR; where the column is_part is true, as of a mean that lacks victims, it has
    a mark in its corner. Many columns are broken into several panels.
    """
    require(frame, "attack rate defense asr status", "cells")
    cells = _cells(frame)
    defenses, attacks = names_in(frame["defense"]), names_in(frame["attack"])
    columns = [
        (attack, rate)
        for attack in attacks
        for rate in sorted({r for a, r, _ in cells if a == attack}, key=lambda r: (r is None, r))
    ]
    if not any(kind is None for _, kind in cells.values()):
        raise NothingToDraw(f"none of {len(cells)} cells is ok and has an ASR")
    if len(columns) > (most := MOST_COLUMNS * MOST_PANELS):
        raise NothingToDraw(f"{len(columns):,} attacks and rates are more than {most}")
    losses, parts = _losses(frame), _parts(frame)
    blocks = _blocks(columns)
    names = [wrapped(name, ROW_LETTERS) for name in defenses]
    lines = [line for name in names for line in name.split("\n")]
    beside = LETTER_INCHES * max(map(len, lines)) + 0.25 + (LOSS_INCHES if losses else 0)
    widest = max(map(len, blocks))
    width = COLUMN_INCHES if beside + 0.3 * widest <= COLUMN_INCHES else PAGE_INCHES
    cell = (width - beside) / widest
    deep = [1 + name.count("\n") for name in names]
    # Two neighbours share the room between their middles.
    row = max(0.17, *(0.03 + 0.105 * (a + b) / 2 for a, b in pairwise([1, *deep, 1])))
    heads = [_heads(block, cell) for block in blocks]
    if losses:
        heads = [head._replace(inches=max(head.inches, 0.35)) for head in heads]
    digits = max(len(_rate_words(rate)) for _, rate in columns)
    is_narrow = LETTER_INCHES * digits + 0.06 > cell
    below = (LETTER_INCHES * digits if is_narrow else 0.12) + 0.12
    height = sum(row * len(defenses) + head.inches + below for head in heads)
    figure = new_figure(width, height + 0.25)
    axes = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    for axis, block, head in zip(axes, blocks, heads, strict=True):
        _heat(axis, [[cells.get((*c, d), (math.nan, "missing")) for c in block] for d in defenses],
              cell)  # fmt: skip
        _corners(axis, [[(*c, d) in parts for c in block] for d in defenses])
        if losses:
            _loss_column(axis, [losses.get(defense) for defense in defenses], widest, cell)
        axis.set_xlim(0, widest + (LOSS_INCHES / cell if losses else 0))
        rates = [_rate_words(rate) for _, rate in block]
        axis.set_xticks(np.arange(len(block)) + 0.5, rates, rotation=90 if is_narrow else 0)
        axis.set_yticks(np.arange(len(defenses)) + 0.5, names, va="center", linespacing=0.95)
        axis.tick_params(length=0, pad=2, labelsize=SMALL)
        _attack_names(axis, head)
    corner = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": SMALL}
    axes[0].annotate("ASR, %", (0, 1), (-3, 3), ha="right", va="baseline", weight="bold", **corner)
    axes[-1].set_xlabel("poison rate, %")
    legend(figure, axes, is_packed=True)
    return figure


def _parts(frame: pd.DataFrame) -> set[tuple[str, float | None, str]]:
    """The cells with a number that is of a part of the victims alone."""
    if "is_part" not in frame.columns:
        return set()
    cells = _cells(frame[frame["is_part"].astype(bool)])
    return {key for key, (_, kind) in cells.items() if kind is None}


def _corners(axis: Any, are_parts: Sequence[Sequence[bool]]) -> None:
    """A triangle in the upper right corner of each cell that is of a part, in what can be seen on
    its colour."""
    mesh = axis.collections[0]
    for y, x in np.argwhere(np.array(are_parts)):
        color = readable_on(mesh.cmap(mesh.norm(mesh.get_array()[y, x])))
        axis.plot([x + 1], [y], marker=CORNER, ms=9, mew=0, color=color, gid=f"part {y} {x}")
    if np.any(are_parts):
        axis.plot([], [], ls="", marker=CORNER, ms=9, mew=0, color="black",
                  label="of a part of the victims")  # fmt: skip


def _losses(frame: pd.DataFrame) -> dict[str, float]:
    """Points of clean accuracy that each defense loses, mean over the cells that are ok with it and
    without any; empty where nothing is known."""
    if "clean" not in frame.columns or "none" not in set(frame["defense"]):
        return {}
    known = frame[frame["status"] == Status.OK]
    known = known.assign(clean=as_numbers(known["clean"]))
    none = known[known["defense"] == "none"][["attack", "rate", "clean"]]
    both = known.merge(none, on=["attack", "rate"], suffixes=("", "_none"))
    found = (100 * (both["clean_none"] - both["clean"])).groupby(both["defense"]).mean().dropna()
    return {str(name): float(loss) for name, loss in found.items()}


def _loss_column(axis: Any, losses: Sequence[float | None], at: int, cell: float) -> None:
    """Numbers right of the colours, which are not of their kind."""
    style = {"fontsize": SMALL, "textcoords": "offset points", "annotation_clip": False}
    x = at + 0.5 * LOSS_INCHES / cell
    for row, loss in enumerate(losses):
        words = "–" if loss is None else f"{loss:.1f}".replace("-0.0", "0.0")
        axis.annotate(words, (x, row + 0.5), (0, 0), ha="center", va="center", **style)
    axis.annotate("CA lost,\npoints", (x, 1.0), (0, 3), xycoords=axis.get_xaxis_transform(),
                  ha="center", va="baseline", linespacing=1.0, **style)  # fmt: skip


def _rate_words(rate: float | None) -> str:
    """A poison rate in percent; targeted poisoning has a count instead."""
    return "–" if rate is None else f"{100 * rate:.4g}"


def _cells(frame: pd.DataFrame) -> dict[tuple[str, float | None, str], tuple[float, str | None]]:
    """ASR, and the kind of hatch where there is none, by attack, rate and defense."""
    found: dict[tuple[str, float | None, str], tuple[float, str | None]] = {}
    columns = (frame[name] for name in ("attack", "rate", "defense", "asr", "status"))
    for attack, rate, defense, asr, status in zip(*columns, strict=True):
        (share,), (value,) = as_numbers([rate]), as_numbers([asr])
        key = (str(attack), None if math.isnan(share) else float(share), str(defense))
        if key in found:
            raise ValueError(
                f"{key[0]}@{key[1]} x {key[2]} has several rows: a heat map wants one per cell,"
                " so average over seeds first"
            )
        kind = None if status == Status.OK else KINDS.get(status, "missing")
        found[key] = (float(value), "missing" if kind is None and math.isnan(value) else kind)
    return found


def _blocks(columns: Sequence[tuple[str, float | None]]) -> list[list[tuple[str, float | None]]]:
    """Columns by panel: no more than are readable, and an attack in one panel if it fits."""
    panels = math.ceil(len(columns) / MOST_COLUMNS)
    enough = math.ceil(len(columns) / panels)
    found: list[list[tuple[str, float | None]]] = [[]]
    for attack in dict.fromkeys(attack for attack, _ in columns):
        group = [column for column in columns if column[0] == attack]
        if found[-1] and (len(found[-1]) >= enough or len(found[-1]) + len(group) > MOST_COLUMNS):
            found.append([])
        for column in group:
            if len(found[-1]) == MOST_COLUMNS:
                found.append([])
            found[-1].append(column)
    return found


class _Head(NamedTuple):
    """Names above the columns: where each starts, how many columns it spans, its lines."""

    names: list[tuple[int, int, str]]
    is_upright: bool
    inches: float


def _heads(block: Sequence[tuple[str, float | None]], cell: float) -> _Head:
    """Attack names above their columns: upright where a column is narrower than a word."""
    attacks = [attack for attack, _ in block]
    spans = [(attacks.index(a), attacks.count(a), a) for a in dict.fromkeys(attacks)]
    room = [int(cell * span / 0.062) for _, span, _ in spans]
    is_upright = any(
        letters < max(map(len, name_parts(name)))
        for letters, (_, _, name) in zip(room, spans, strict=True)
    )
    if is_upright:
        # As many lines as lie side by side above the columns.
        names = [(at, span, wrapped(name, 22)) for at, span, name in spans]
        names = [
            (at, span, text if (text.count("\n") + 1) * 0.125 <= cell * span else name)
            for (at, span, text), (_, _, name) in zip(names, spans, strict=True)
        ]
        longest = max(len(line) for _, _, text in names for line in text.split("\n"))
        return _Head(names, True, 0.066 * longest + 0.1)
    names = [
        (at, span, wrapped(name, letters))
        for letters, (at, span, name) in zip(room, spans, strict=True)
    ]
    return _Head(names, False, 0.125 * max(text.count("\n") + 1 for *_, text in names) + 0.1)


def _attack_names(axis: Any, head: _Head) -> None:
    """The names, and a line between the columns of different attacks."""
    for start, span, text in head.names:
        axis.annotate(
            text,
            (start + span / 2, 1.0),
            (0, 3),
            xycoords=axis.get_xaxis_transform(),
            textcoords="offset points",
            rotation=90 if head.is_upright else 0,
            ha="center",
            va="bottom" if head.is_upright else "baseline",
            linespacing=1.0,
            fontsize=SMALL,
        )
        if start:
            axis.axvline(start, color="black", lw=0.8)


def readable_on(ground: Sequence[float]) -> str:
    """Black or white, whichever has more contrast (WCAG 2) on a colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3]]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "white"


def _heat(
    axis: Any, rows: Sequence[Sequence[tuple[float, str | None]]], cell_inches: float
) -> None:
    """Colours and numbers of the cells that are ok, hatches on the others."""
    import seaborn as sns
    from matplotlib.patches import Rectangle

    asr = 100 * np.array([[value for value, _ in row] for row in rows])
    is_hatched = np.array([[kind is not None for _, kind in row] for row in rows])
    digits = 1 if cell_inches >= 0.34 else 0
    shown = np.ma.masked_where(is_hatched, asr)
    mesh = axis.pcolormesh(
        shown, vmin=0, vmax=100, cmap=sns.cm.rocket_r, linewidth=0.5, edgecolors="white"
    )
    axis.set_ylim(len(rows), 0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for (y, x), value in np.ndenumerate(asr):
        if not is_hatched[y, x]:
            color = readable_on(mesh.cmap(value / 100))
            axis.text(x + 0.5, y + 0.5, f"{value:.{digits}f}", color=color, ha="center",
                      va="center", fontsize=SMALL)  # fmt: skip
    axis.grid(visible=False)
    for y, row in enumerate(rows):
        for x, (_, kind) in enumerate(row):
            if kind is not None:
                axis.add_patch(
                    Rectangle(
                        (x + 0.04, y + 0.04),
                        0.92,
                        0.92,
                        facecolor="white",
                        edgecolor="0.45",
                        linewidth=0,
                        hatch=HATCHES[kind].pattern,
                        label=HATCHES[kind].words,
                        gid=kind,
                    )
                )
