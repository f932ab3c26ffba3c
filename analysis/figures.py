"""Figures of a grid's results for a paper: a function per figure, from a frame to a picture.

Shares are 0 to 1 in frames and percent in pictures. A figure is as wide as a column where its
panels fit, else as wide as a page. A defense has one look in all figures that are given the same
``order``; the undefended victim is black with a star.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.theme import (
    COLUMN_INCHES,
    GREY,
    LETTER_INCHES,
    PAGE_INCHES,
    Drawn,
    Look,
    NothingToDraw,
    draw_all,
    legend,
    looks_of,
    name_parts,
    new_figure,
    whole_ticks,
    wrapped,
)
from grid.schema import Status

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Drawn",
    "NothingToDraw",
    "Stamped",
    "cost",
    "detection",
    "draw_all",
    "feature_map",
    "gallery",
    "heat_map",
    "profile",
    "rank_plot",
    "rate_curves",
    "trade_off",
    "training",
]

UNDEFENDED = "none"
ROW_LETTERS = 26
MOST_NAMED = 8
"""More points are numbered, with a key below."""
MOST_LINES = 24
"""More lines cannot be told apart, and are drawn alike."""
SMALL = 7.0
FIXED = "\N{NO-BREAK SPACE}"
Floats = npt.NDArray[np.float64]


# --- what several figures need


def _need(frame: pd.DataFrame, columns: str, what: str) -> None:
    """A frame without rows, or without a column, says so."""
    missing = [name for name in columns.split() if name not in frame.columns]
    if missing:
        raise NothingToDraw(f"the frame of {what} has no column {', '.join(missing)}")
    if frame.empty:
        raise NothingToDraw(f"there are no {what}")


def _numbers(values: Iterable[Any]) -> Floats:
    """Floats; what is no number, or not finite, is NaN."""
    import pandas as pd

    found = np.array([math.nan if pd.isna(value) else value for value in values], dtype=float)
    found[~np.isfinite(found)] = math.nan
    return found


def _unique(values: Iterable[Any]) -> list[str]:
    """Names in the order of their first row."""
    return list(dict.fromkeys(str(value) for value in values))


def _looks(names: Sequence[str], order: Sequence[str]) -> dict[str, Look]:
    """Looks by the place in ``order``, then by the place among the names that it lacks."""
    every = [name for name in dict.fromkeys([*order, *names]) if name != UNDEFENDED]
    return {**looks_of(every), UNDEFENDED: Look("black", "*", "-")}


def _line(look: Look) -> dict[str, Any]:
    """How a defense's line is drawn."""
    size = 5 if look.marker == "*" else 3
    return {"ls": look.dash, "marker": look.marker, "ms": size, "mew": 0, "lw": 1.0,
            "color": look.color}  # fmt: skip


def _panels(
    names: Sequence[str], height: float | None = None, rows: int = 1
) -> tuple[Any, list[list[Any]]]:
    """Small multiples: a list of ``rows`` panels, one below the other, for each name. Without a
    height they are square."""
    num = len(names)
    width = COLUMN_INCHES if num <= 4 else PAGE_INCHES
    most = min(num, 2 if num == 4 else 3 if num < 4 else 5 if height else 6)
    bands = math.ceil(num / most)
    columns = math.ceil(num / bands)
    letters = max(8, int((width / columns - 0.3) / LETTER_INCHES))
    titles = [wrapped(name, letters) for name in names]
    deepest = max(title.count("\n") for title in titles)
    side = height or min(2.4, width / columns - 0.1)
    around = 0.2 + 0.13 * deepest + (0 if height else 0.2)
    figure = new_figure(width, 0.35 + bands * (around + rows * side))
    grid = figure.subplots(bands * rows, columns, squeeze=False)
    found = []
    for place in range(bands * columns):
        band, column = divmod(place, columns)
        panels = [grid[band * rows + row][column] for row in range(rows)]
        if place < num:
            panels[0].set_title(titles[place])
            found.append(panels)
        else:
            for axis in panels:
                axis.set_visible(False)
    return figure, found


def _outer(panels: Sequence[Sequence[Any]], xlabel: str, ylabels: Sequence[str]) -> None:
    """Labels on the left of each band and below the lowest panel of each column alone."""
    columns = panels[0][0].get_gridspec().ncols
    for place, rows in enumerate(panels):
        for row, axis in enumerate(rows):
            if place % columns == 0:
                axis.set_ylabel(ylabels[row])
            else:
                axis.tick_params(labelleft=False)
            if row < len(rows) - 1:
                axis.tick_params(labelbottom=False)
        if place + columns >= len(panels):
            rows[-1].set_xlabel(xlabel)


def _limits(values: Iterable[float], low: float = -math.inf, high: float = math.inf) -> Any:
    """Limits of an axis around percents, with room, no further out than asked."""
    known = [value for value in values if math.isfinite(value)]
    room = max(0.07 * (max(known) - min(known)), 1.5)
    return max(low, min(known) - room), min(high, max(known) + room)


def _inches(axis: Any) -> float:
    """How wide a panel is, about: its layout is not solved yet."""
    grid = axis.get_gridspec()
    return float(axis.figure.get_size_inches()[0] / grid.ncols - 0.3)


# --- ASR by attack, rate and defense


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
MOST_COLUMNS = 24
"""A page has room for so many numbers of three digits beside long names."""


def heat_map(frame: pd.DataFrame) -> Any:
    """ASR in percent: a row per defense, a column per attack and rate, a page wide if need be.

    Columns: attack, rate, defense, asr, status; one row per cell. A cell whose status is not ok is
    hatched, and so is one that has no row or no ASR. Many columns are broken into several panels.
    """
    _need(frame, "attack rate defense asr status", "cells")
    cells = _cells(frame)
    defenses, attacks = _unique(frame["defense"]), _unique(frame["attack"])
    columns = [
        (attack, rate)
        for attack in attacks
        for rate in sorted({r for a, r, _ in cells if a == attack}, key=lambda r: (r is None, r))
    ]
    if not any(kind is None for _, kind in cells.values()):
        raise NothingToDraw(f"none of {len(cells)} cells is ok and has an ASR")
    blocks = _blocks(columns)
    names = [wrapped(name, ROW_LETTERS) for name in defenses]
    lines = [line for name in names for line in name.split("\n")]
    beside = LETTER_INCHES * max(map(len, lines)) + 0.25
    widest = max(map(len, blocks))
    width = COLUMN_INCHES if beside + 0.3 * widest <= COLUMN_INCHES else PAGE_INCHES
    cell = (width - beside) / widest
    deep = [1 + name.count("\n") for name in names]
    # Two neighbours share the room between their middles.
    row = max(0.17, *(0.03 + 0.105 * (a + b) / 2 for a, b in pairwise([1, *deep, 1])))
    heads = [_heads(block, cell) for block in blocks]
    digits = max(len(_rate_words(rate)) for _, rate in columns)
    is_narrow = LETTER_INCHES * digits + 0.06 > cell
    below = (LETTER_INCHES * digits if is_narrow else 0.12) + 0.12
    height = sum(row * len(defenses) + head.inches + below for head in heads)
    figure = new_figure(width, height + 0.25)
    axes = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    for axis, block, head in zip(axes, blocks, heads, strict=True):
        _heat(axis, [[cells.get((*c, d), (math.nan, "missing")) for c in block] for d in defenses],
              cell)  # fmt: skip
        axis.set_xlim(0, widest)
        rates = [_rate_words(rate) for _, rate in block]
        axis.set_xticks(np.arange(len(block)) + 0.5, rates, rotation=90 if is_narrow else 0)
        axis.set_yticks(np.arange(len(defenses)) + 0.5, names, rotation=0, linespacing=0.95)
        axis.tick_params(length=0, pad=2, labelsize=SMALL)
        _attack_names(axis, head)
    corner = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": SMALL}
    axes[0].annotate("ASR, %", (0, 1), (-3, 3), ha="right", va="bottom", weight="bold", **corner)
    axes[-1].set_xlabel("poison rate, %")
    legend(figure, axes, is_packed=True)
    return figure


def _rate_words(rate: float | None) -> str:
    """A poison rate in percent; targeted poisoning has a count instead."""
    return "–" if rate is None else f"{100 * rate:.4g}"


def _cells(frame: pd.DataFrame) -> dict[tuple[str, float | None, str], tuple[float, str | None]]:
    """ASR, and the kind of hatch where there is none, by attack, rate and defense."""
    found: dict[tuple[str, float | None, str], tuple[float, str | None]] = {}
    columns = (frame[name] for name in ("attack", "rate", "defense", "asr", "status"))
    for attack, rate, defense, asr, status in zip(*columns, strict=True):
        (share,), (value,) = _numbers([rate]), _numbers([asr])
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
            va="bottom",
            linespacing=1.0,
            fontsize=SMALL,
        )
        if start:
            axis.axvline(start, color="black", lw=0.8)


def _heat(
    axis: Any, rows: Sequence[Sequence[tuple[float, str | None]]], cell_inches: float
) -> None:
    """Colours and numbers of the cells that are ok, hatches on the others."""
    import seaborn as sns
    from matplotlib.patches import Rectangle

    asr = 100 * np.array([[value for value, _ in row] for row in rows])
    is_hatched = np.array([[kind is not None for _, kind in row] for row in rows])
    digits = 1 if cell_inches >= 0.34 else 0
    words = np.array([["" if math.isnan(v) else f"{v:.{digits}f}" for v in row] for row in asr])
    sns.heatmap(
        np.where(is_hatched, np.nan, asr),
        ax=axis,
        mask=is_hatched,
        annot=words,
        fmt="",
        annot_kws={"fontsize": SMALL},
        vmin=0,
        vmax=100,
        cmap="rocket_r",
        cbar=False,
        linewidths=0.5,
        linecolor="white",
    )
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


# --- against the poison rate


def rate_curves(frame: pd.DataFrame, order: Sequence[str] = ()) -> Any:
    """ASR and, below, clean accuracy against the poison rate: a pair of panels per attack.

    Columns: attack, rate, defense, seed, asr, clean. Lines are means over seeds, bands reach from
    the least to the largest seed. Up to the smallest rate the axis is linear, so that it has a 0.
    """
    _need(frame, "attack rate defense seed asr clean", "cells")
    known = frame.assign(
        **{name: _numbers(frame[name]) for name in ("rate", "asr", "clean")},
        **{name: frame[name].astype(str) for name in ("attack", "defense")},
    )
    known = known[known["rate"].notna() & known[["asr", "clean"]].notna().any(axis=1)]
    if known.empty:
        raise NothingToDraw(f"none of {len(frame)} cells has a rate and an ASR or a clean accuracy")
    attacks, defenses = _unique(known["attack"]), _unique(known["defense"])
    looks = _looks(defenses, order)
    figure, panels = _panels(attacks, height=1.0 if len(attacks) > 1 else 1.4, rows=2)
    clean = _limits(100 * known["clean"], -4, 104) if known["clean"].notna().any() else (0, 100)
    for attack, (above, below) in zip(attacks, panels, strict=True):
        of_attack = known[known["attack"] == attack]
        for defense in defenses:
            of_both = of_attack[of_attack["defense"] == defense]
            for axis, name in ((above, "asr"), (below, "clean")):
                _rate_line(axis, of_both, name, defense, looks[defense])
        above.set_ylim(-4, 104)
        below.set_ylim(*clean)
        for axis in (above, below):
            _rate_axis(axis, sorted(set(of_attack["rate"])))
    _outer(panels, "poison rate, %", ("ASR, %", "clean acc., %"))
    legend(figure, [axis for pair in panels for axis in pair], is_packed=True)
    return figure


def _rate_line(axis: Any, frame: pd.DataFrame, name: str, defense: str, look: Look) -> None:
    """One defense's line and band; a single rate has a bar in place of a band."""
    by_seed = frame.dropna(subset=[name]).groupby(["rate", "seed"], dropna=False)[name].mean()
    if by_seed.empty:
        return
    over = 100 * by_seed.groupby("rate").agg(["mean", "min", "max"])
    rates = over.index.to_numpy()
    low, high = over["min"].to_numpy(), over["max"].to_numpy()
    axis.plot(
        rates,
        over["mean"].to_numpy(),
        label=defense,
        gid=f"mean {defense}",
        zorder=4 if defense == UNDEFENDED else 3,
        **_line(look),
    )
    if len(rates) == 1:
        axis.vlines(rates, low, high, color=look.color, lw=0.8, gid=f"band {defense}")
    else:
        style = {"color": look.color, "alpha": 0.13, "linewidth": 0}
        axis.fill_between(rates, low, high, gid=f"band {defense}", zorder=2, **style)


def _rate_axis(axis: Any, rates: Sequence[float]) -> None:
    """A logarithmic axis of rates, with a 0 if one is 0, and ticks at the rates that fit."""
    from matplotlib.ticker import FixedLocator, NullLocator

    positive = [rate for rate in rates if rate > 0]
    if not positive:
        axis.set_xlim(-1, 1)
    elif len(positive) < len(rates):
        axis.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
        axis.set_xlim(-0.2 * positive[0], 1.3 * positive[-1])
    else:
        spread = max(positive[-1] / positive[0], 4.0) ** 0.1
        axis.set_xscale("log")
        axis.set_xlim(positive[0] / spread, positive[-1] * spread)
    words = [f"{100 * rate:.4g}" for rate in rates]
    low, high = axis.transScale.transform([(x, 1.0) for x in axis.get_xlim()])[:, 0]
    places = axis.transScale.transform([(rate, 1.0) for rate in rates])[:, 0]
    inches = (places - low) / (high - low) * _inches(axis)
    kept: list[int] = []
    # The ends first: they say what range was tried.
    for i in (0, len(rates) - 1, *range(1, len(rates) - 1)):
        halves = [LETTER_INCHES * (len(words[i]) + len(words[k])) / 2 + 0.06 for k in kept]
        if all(abs(inches[i] - inches[k]) >= h for k, h in zip(kept, halves, strict=True)):
            kept.append(i)
    kept = sorted(set(kept))
    axis.xaxis.set_major_locator(FixedLocator([rates[i] for i in kept]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks([rates[i] for i in kept], [words[i] for i in kept])


# --- points with names


class _Point(NamedTuple):
    """A point with a name, in percent or in the units of its axis."""

    name: str
    x: float
    y: float
    style: Mapping[str, Any]


def _named_points(
    figure: Any, axis: Any, points: Sequence[_Point], limits: Callable[[], None]
) -> None:
    """Mark points, and name them where nothing else lies; if there are many, number them.

    ``limits`` sets the axis' limits: placing needs them, and marks would move them.
    """
    can_name = len(points) <= MOST_NAMED
    for number, point in enumerate(points, 1):
        label = None if can_name else f"{number}{FIXED * 2}{point.name}"
        axis.plot(
            [point.x], [point.y], ls="", label=label, gid=f"point {point.name}", **point.style
        )
    limits()
    legend(figure, [axis], is_packed=True)
    if can_name:
        texts = [wrapped(point.name, 18) for point in points]
    else:
        texts = [str(number) for number in range(1, len(points) + 1)]
    _place(figure, axis, points, texts)


GAPS = (4.5, 7.0, 11.0, 16.0, 22.0, 30.0, 40.0, 55.0)
"""How far from its point a name may lie, in points."""
AVOIDED = {"mark": 3.0, "line": 0.5, "name": 50.0}
"""What it costs to cover a pixel."""


def _place(figure: Any, axis: Any, points: Sequence[_Point], texts: Sequence[str]) -> None:
    """Write each text near its point, where it covers the least of marks, bars and other texts."""
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi
    frame = axis.get_window_extent()
    at = axis.transData.transform([(point.x, point.y) for point in points])
    # Boxes that are taken: left, bottom, right, top, and what covering them costs.
    taken = [_boxes(at, 4 / to_points, AVOIDED["mark"]), _drawn_lines(axis)]
    gaps, turns = np.meshgrid(GAPS, 2 * math.pi * (np.arange(24) / 24 + 0.125), indexing="ij")
    for place, point, text in zip(at, points, texts, strict=True):
        note = axis.annotate(
            text,
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            linespacing=0.95,
            color="0.4" if point.style["marker"] == "x" else "0.1",
            zorder=8,
            gid=f"name {point.name}",
        )
        half = np.array(note.get_window_extent().size) / 2
        shifts = np.stack(
            [
                (np.cos(turns) * (half[0] + gaps / to_points)).ravel(),
                (np.sin(turns) * (half[1] + gaps / to_points)).ravel(),
            ],
            axis=1,
        )
        low, high = place + shifts - half - 1, place + shifts + half + 1
        is_out = (low < frame.min + 1).any(axis=1) | (high > frame.max - 1).any(axis=1)
        boxes = np.concatenate(taken)
        shared = np.minimum(high[:, None], boxes[:, 2:4]) - np.maximum(low[:, None], boxes[:, :2])
        covered = np.clip(shared, 0, None).prod(axis=2) @ boxes[:, 4]
        best = int(np.argmin(gaps.ravel() / 100 + covered + 1e6 * is_out))
        offset = tuple(shifts[best] * to_points)
        note.set_position(offset)
        taken.append(np.array([[*low[best], *high[best], AVOIDED["name"]]]))
        # The corner or edge of the name that is nearest to the point.
        nearest = np.clip(0.0, shifts[best] - half, shifts[best] + half) * to_points
        if np.hypot(*nearest) > 9:
            arrow = {"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0.5, "shrinkB": 2.5}
            axis.annotate("", (point.x, point.y), tuple(nearest), textcoords="offset points",
                          arrowprops=arrow, zorder=2)  # fmt: skip


def _boxes(centers: Floats, radius: float, cost: float) -> Floats:
    """A square around each place, with what it costs to cover it."""
    return np.column_stack([centers - radius, centers + radius, np.full(len(centers), cost)])


def _drawn_lines(axis: Any) -> Floats:
    """Small boxes along the lines and error bars of a panel."""
    from matplotlib.cbook import pts_to_prestep

    paths = [bar.vertices for bars in axis.collections for bar in bars.get_paths()]
    for line in axis.lines:
        xs, ys = (np.asarray(values, dtype=float) for values in line.get_data(orig=False))
        if len(xs) > 1 and line.get_transform() == axis.transData:
            if line.get_drawstyle() == "steps-pre":
                xs, ys = pts_to_prestep(xs, ys)
            paths.append(np.column_stack([xs, ys]))
    places = [np.empty((0, 2))]
    for path in paths:
        for start, end in pairwise(axis.transData.transform(path)):
            steps = max(1, int(np.abs(end - start).max() / 4))
            places.append(start + np.linspace(0, 1, steps + 1)[:, None] * (end - start))
    return _boxes(np.concatenate(places), 1.0, AVOIDED["line"])


MARK = {"marker": "o", "ms": 4.5, "mew": 0.9, "zorder": 5}


def _marks() -> dict[str, dict[str, Any]]:
    """How points are drawn: on the front, dominated, undefended, published elsewhere."""
    import seaborn as sns

    blue = sns.color_palette("colorblind")[0]
    return {
        "front": {**MARK, "color": blue, "mec": blue},
        "dominated": {**MARK, "mfc": "white", "mec": "0.35"},
        "undefended": {**MARK, "marker": "*", "ms": 7, "mew": 0, "color": "black"},
        "published": {**MARK, "marker": "x", "ms": 4.5, "mew": 1.1, "color": GREY, "zorder": 4},
    }


def trade_off(frame: pd.DataFrame, published: pd.DataFrame | None = None) -> Any:
    """ASR against clean accuracy, with intervals, and the front of what nothing dominates.

    Columns: defense, clean, asr, clean_low, clean_high, asr_low, asr_high, on_front (true, or a
    share of draws of at least one half). ``published`` has label, clean, asr. The front is a stair
    as in a campaign's cloud: between two points only the larger ASR can be had.
    """
    _need(frame, "defense clean asr clean_low clean_high asr_low asr_high on_front", "defenses")
    marks = _marks()
    names = [str(name) for name in frame["defense"]]
    clean, asr = (100 * _numbers(frame[name]) for name in ("clean", "asr"))
    bounds = {
        name: np.clip(100 * _numbers(frame[name]), 0, 100)
        for name in ("clean_low", "clean_high", "asr_low", "asr_high")
    }
    on_front = np.nan_to_num(_numbers(frame["on_front"])) >= 0.5
    known = [i for i in np.argsort(asr, kind="stable") if math.isfinite(clean[i] + asr[i])]
    if not known:
        raise NothingToDraw(f"none of {len(names)} defenses has a clean accuracy and an ASR")
    points = []
    for i in known:
        kind = "front" if on_front[i] else "dominated"
        style = marks["undefended" if names[i] == UNDEFENDED else kind]
        points.append(_Point(names[i], clean[i], asr[i], style))
    if published is not None and not published.empty:
        _need(published, "label clean asr", "published numbers")
        rows = zip(published["label"], *(100 * _numbers(published[n]) for n in ("clean", "asr")),
                   strict=True)  # fmt: skip
        points += [_Point(str(n), x, y, marks["published"]) for n, x, y in rows
                   if math.isfinite(x + y)]  # fmt: skip
    figure = new_figure(COLUMN_INCHES, 2.9)
    axis = figure.subplots()
    _intervals(axis, clean[known], asr[known], {n: b[known] for n, b in bounds.items()})
    front = sorted((clean[i], asr[i]) for i in known if on_front[i])
    if front:
        style = {"color": marks["front"]["color"], "lw": 1.0, "zorder": 3}
        axis.plot(*zip(*front, strict=True), "-", drawstyle="steps-pre", label="front",
                  gid="front", **style)  # fmt: skip
    _kinds(axis, points)
    xs = [*(p.x for p in points), *bounds["clean_low"][known], *bounds["clean_high"][known]]
    ys = [*(p.y for p in points), *bounds["asr_low"][known], *bounds["asr_high"][known]]

    def limits() -> None:
        axis.set(xlim=_limits(xs, -4, 104), ylim=_limits(ys, -4, 104))

    axis.set(xlabel="clean accuracy, %", ylabel="ASR, %", title="better: right and down")
    _named_points(figure, axis, points, limits)
    return figure


def _intervals(axis: Any, xs: Floats, ys: Floats, bounds: Mapping[str, Floats]) -> None:
    """Error bars; an end that is not known, or infinite as with one seed, is left out."""
    style = {"color": "0.6", "lw": 0.7, "zorder": 2}
    for name, horizontal in (("clean", True), ("asr", False)):
        low, high = bounds[f"{name}_low"], bounds[f"{name}_high"]
        here = np.isfinite(low) & np.isfinite(high)
        if not here.any():
            continue
        draw, along = (axis.hlines, ys) if horizontal else (axis.vlines, xs)
        draw(along[here], low[here], high[here], gid=f"intervals {name}", **style)


def _kinds(axis: Any, points: Sequence[_Point]) -> None:
    """A legend's entry for each kind of point that there is."""
    words = {"dominated": "dominated", "undefended": "undefended", "published": "published"}
    for kind, style in _marks().items():
        if kind in words and any(point.style == style for point in points):
            axis.plot([], [], ls="", label=words[kind], **style)


def cost(frame: pd.DataFrame) -> Any:
    """The share of the attack's lift that is removed against the cost relative to the victim's
    training; defenses that cost nothing stand at 0, left of the logarithmic part.

    Columns: defense, relative_cost, lift_removed.
    """
    _need(frame, "defense relative_cost lift_removed", "defenses")
    costs, removed = _numbers(frame["relative_cost"]), 100 * _numbers(frame["lift_removed"])
    names = [str(name) for name in frame["defense"]]
    known = [
        i
        for i in np.argsort(-removed, kind="stable")
        if math.isfinite(removed[i] + costs[i]) and costs[i] >= 0
    ]
    if not known:
        raise NothingToDraw(f"none of {len(names)} defenses has a cost and a share of lift removed")
    marks = _marks()
    points = [
        _Point(names[i], costs[i], removed[i],
               marks["undefended" if names[i] == UNDEFENDED else "front"])
        for i in known
    ]  # fmt: skip
    figure = new_figure(COLUMN_INCHES, 2.5)
    axis = figure.subplots()
    axis.axhline(0, color="0.3", lw=0.8, zorder=1)
    axis.set(xlabel="cost, in trainings of the victim", ylabel="lift removed, %")
    if len(known) < len(names):
        axis.set_title(f"{len(names) - len(known)} without a cost or a lift are left out")

    def limits() -> None:
        _cost_axis(axis, [point.x for point in points])
        axis.set_ylim(*_limits([0, 100, *(point.y for point in points)]))

    _named_points(figure, axis, points, limits)
    return figure


def _cost_axis(axis: Any, costs: Sequence[float]) -> None:
    """Powers of ten that hold all costs; a 0 has a place of its own."""
    from matplotlib.ticker import FixedLocator, NullLocator

    positive = [value for value in costs if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive)) - 1e-9)
    high = max(low + 1, math.ceil(math.log10(max(positive)) - 1e-9))
    step = math.ceil((high - low + 1) / 6)
    ticks = [10.0**power for power in range(low, high + 1, step)]
    if min(costs) <= 0:
        axis.set_xscale("symlog", linthresh=10.0**low, linscale=0.7)
        axis.set_xlim(-0.35 * 10.0**low, 10.0 ** (high + 0.2))
        ticks = [0.0, *ticks]
    else:
        axis.set_xscale("log")
        axis.set_xlim(10.0 ** (low - 0.1), 10.0 ** (high + 0.2))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


# --- over all cells


def profile(frame: pd.DataFrame, order: Sequence[str] = ()) -> Any:
    """The share of a defense's cells whose ASR is at most tau, against tau.

    Columns: defense, asr; one row per cell. Cells without an ASR are left out, and counted in the
    legend; the best defense comes first there.
    """
    _need(frame, "defense asr", "cells")
    cells = {
        defense: np.sort(_numbers(frame["asr"][frame["defense"].astype(str) == defense]))
        for defense in _unique(frame["defense"])
    }
    known = {defense: values[~np.isnan(values)] for defense, values in cells.items()}
    known = {defense: values for defense, values in known.items() if len(values)}
    if not known:
        raise NothingToDraw(f"none of {len(frame)} cells has an ASR")
    looks = _looks(list(cells), order)
    figure = new_figure(COLUMN_INCHES, 2.4)
    axis = figure.subplots()
    # The area above a profile is the mean ASR.
    for defense in sorted(known, key=lambda name: float(known[name].mean())):
        values = known[defense]
        taus = np.unique([0.0, *values, 1.0])
        shares = np.searchsorted(values, taus, side="right") / len(values)
        gaps = f"({len(values)} of {len(cells[defense])} cells)".replace(" ", FIXED)
        axis.plot(
            100 * taus,
            100 * shares,
            drawstyle="steps-post",
            markevery=max(1, len(taus) // 6),
            label=f"{defense} {gaps}" if len(values) < len(cells[defense]) else defense,
            gid=f"profile {defense}",
            clip_on=False,
            zorder=3,
            **_line(looks[defense]),
        )
    axis.set(xlim=(0, 100), ylim=(0, 102), xlabel="τ: ASR, %", ylabel="cells with ASR ≤ τ, %")
    legend(figure, [axis], is_packed=True)
    return figure


def rank_plot(frame: pd.DataFrame) -> Any:
    """Intervals of ranks, the best on top, among defenses that are given the same.

    Columns: defense, score (less is better, 0 to 1), rank_low, rank_high, letters, needs (text or a
    sequence), partial. Who shares a letter is not told apart. Partial defenses are hollow.
    """
    import seaborn as sns

    _need(frame, "defense score rank_low rank_high letters needs partial", "defenses")
    entries = _entries(frame)
    ranks = [rank for entry in entries for rank in (entry.low, entry.high) if rank == rank]
    if not ranks:
        raise NothingToDraw(
            f"none of {len(entries)} defenses has an interval of ranks: that takes two victim seeds"
        )
    groups = list(dict.fromkeys(entry.needs for entry in entries))
    letters = max(len(line) for e in entries for line in e.words.split("\n"))
    ties = max(len(entry.letters) for entry in entries)
    room = COLUMN_INCHES - LETTER_INCHES * (letters + ties + 7) - 0.4
    y, rows = 0.0, list[tuple[float, _Entry]]()
    heads: list[tuple[float, str]] = []
    for group in groups:
        if len(groups) > 1:
            words = wrapped(f"given: {group or 'nothing'}", max(16, int(room / 0.066)))
            y += 0.2 + 0.75 * words.count("\n")
            heads.append((y, words))
            y += 1.0
        for entry in (e for e in entries if e.needs == group):
            lines = entry.words.count("\n")
            rows.append((y + 0.35 * lines, entry))
            y += 1 + 0.7 * lines
    figure = new_figure(COLUMN_INCHES, 0.75 + 0.165 * y)
    axis = figure.subplots()
    blue = sns.color_palette("colorblind")[0]
    for at, entry in rows:
        _rank_row(axis, at, entry, blue)
    for at, words in heads:
        axis.annotate(words, (0, at), (2, -3), xycoords=axis.get_yaxis_transform(), va="baseline",
                      textcoords="offset points", fontsize=SMALL, style="italic", color="0.3",
                      linespacing=1.0)  # fmt: skip
    axis.set_yticks([at for at, _ in rows], [entry.words for _, entry in rows])
    margin = 0.5 + 0.02 * max(ranks)
    axis.set(
        xlim=(min(1, *ranks) - margin, max(ranks) + margin), ylim=(y - 0.3, -0.7), xlabel="rank"
    )
    axis.grid(axis="y", visible=False)
    axis.set_xticks(range(1, int(max(ranks)) + 1, math.ceil(max(ranks) / 7)))
    _beside(axis, 1.0, "top", "score, %", "ties")
    axis.plot([], [], color=blue, lw=4, solid_capstyle="round", label="interval of ranks")
    if any(entry.is_partial for _, entry in rows):
        axis.plot([], [], marker="o", ms=5, mfc="white", mec=blue, ls="", label="cells are missing")
    legend(figure, [axis], is_packed=True)
    return figure


class _Entry(NamedTuple):
    """A line of the plot of ranks."""

    words: str
    score: float
    low: float
    high: float
    letters: str
    needs: str
    is_partial: bool


def _entries(frame: pd.DataFrame) -> list[_Entry]:
    """Best first; those without ranks last."""
    columns = ("defense", "letters", "needs", "partial")
    texts = list(zip(*(frame[name] for name in columns), strict=True))
    numbers = zip(*(_numbers(frame[n]) for n in ("score", "rank_low", "rank_high")), strict=True)
    found = [
        _Entry(
            wrapped(str(defense), 22),
            float(score),
            float(low),
            float(high),
            letters if isinstance(letters, str) else "",
            needs
            if isinstance(needs, str)
            else ", ".join(map(str, () if needs is None else needs)),
            bool(partial),
        )
        for (defense, letters, needs, partial), (score, low, high) in zip(
            texts, numbers, strict=True
        )
    ]
    return sorted(found, key=lambda e: (math.isnan(e.low), math.isnan(e.score), e.score, e.words))


def _rank_row(axis: Any, y: float, entry: _Entry, color: Any) -> None:
    """An interval, with the score and the letters beside it."""
    name = entry.words.replace("\n", "")
    if math.isnan(entry.low):
        axis.annotate("partial: no rank" if entry.is_partial else "no rank", (0, y), (2, 0),
                      xycoords=axis.get_yaxis_transform(), textcoords="offset points",
                      va="center", fontsize=SMALL, color="0.4")  # fmt: skip
    else:
        span = [entry.low, entry.high]
        # Round ends are marks: a line of no length would not be drawn.
        style = {"solid_capstyle": "butt", "marker": "o", "mew": 0, "zorder": 3, "clip_on": False}
        axis.plot(span, [y, y], color=color, lw=5, ms=5, gid=f"rank {name}", **style)
        if entry.is_partial:
            axis.plot(span, [y, y], color="white", lw=3, ms=3, gid=f"hollow {name}", **style)
    score = "" if math.isnan(entry.score) else f"{100 * entry.score:.1f}"
    _beside(axis, y, "center", score, entry.letters)


def _beside(axis: Any, y: float, where: str, score: str, letters: str) -> None:
    """Two columns right of the panel; ``where`` is "top" for their heads."""
    is_head = where == "top"
    for x, text, side in ((32, score, "right"), (40, letters, "left")):
        if text:
            axis.annotate(
                text,
                (1.0, y),
                (x, 3 if is_head else 0),
                xycoords="axes fraction" if is_head else axis.get_yaxis_transform(),
                textcoords="offset points",
                ha=side,
                va="bottom" if is_head else "center_baseline",
                fontsize=SMALL,
                color="0.3" if is_head else "black",
            )


# --- curves


def detection(frame: pd.DataFrame, order: Sequence[str] = ()) -> Any:
    """How defenses that judge rows tell the poisoned ones: ROC curves, a panel per attack.

    Columns: defense, attack, false_positive, true_positive, auroc; a row per point of a curve.
    """
    _need(frame, "defense attack false_positive true_positive auroc", "points of ROC curves")
    known = frame.assign(
        **{n: _numbers(frame[n]) for n in ("false_positive", "true_positive", "auroc")},
        **{name: frame[name].astype(str) for name in ("attack", "defense")},
    ).dropna(subset=["false_positive", "true_positive"])
    if known.empty:
        raise NothingToDraw(f"none of {len(frame)} points of ROC curves has both of its rates")
    attacks, defenses = _unique(known["attack"]), _unique(known["defense"])
    looks = _looks(defenses, order)
    labels = {d: _auroc_words(d, known["auroc"][known["defense"] == d]) for d in defenses}
    figure, panels = _panels(attacks)
    for attack, (axis,) in zip(attacks, panels, strict=True):
        axis.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=":", gid="chance", zorder=1)
        of_attack = known[known["attack"] == attack]
        for defense in defenses:
            points = of_attack[of_attack["defense"] == defense]
            points = points.sort_values(["false_positive", "true_positive"])
            if points.empty:
                continue
            axis.plot(
                100 * points["false_positive"].to_numpy(),
                100 * points["true_positive"].to_numpy(),
                markevery=max(1, len(points) // 5),
                label=labels[defense],
                gid=f"roc {defense}",
                zorder=3,
                **_line(looks[defense]),
            )
        axis.set(xlim=(-3, 103), ylim=(-3, 103), xticks=(0, 50, 100), yticks=(0, 50, 100))
        axis.set_box_aspect(1)
    _outer(panels, "clean flagged, %", ["poison found, %"])
    legend(figure, [axis for (axis,) in panels], is_packed=True)
    return figure


def _auroc_words(defense: str, values: Iterable[float]) -> str:
    """A defense with the range of its AUROC over attacks."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return defense
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return f"{defense}: AUROC {low if low == high else f'{low} to {high}'}"


def training(frame: pd.DataFrame) -> Any:
    """What stages recorded while they trained: a panel per number, a line per stage.

    Columns: stage, epoch, name, value.
    """
    _need(frame, "stage epoch name value", "recorded epochs")
    known = frame.assign(
        **{name: _numbers(frame[name]) for name in ("epoch", "value")},
        **{name: frame[name].astype(str) for name in ("stage", "name")},
    ).dropna(subset=["epoch", "value"])
    if known.empty:
        raise NothingToDraw(f"none of {len(frame)} recorded epochs has a value")
    names, stages = _unique(known["name"]), _unique(known["stage"])
    looks, are_alike = _looks(stages, ()), len(stages) > MOST_LINES
    figure, panels = _panels(names, height=1.2 if len(names) > 1 else 1.8)
    for name, (axis,) in zip(names, panels, strict=True):
        of_name = known[known["name"] == name].sort_values("epoch", kind="stable")
        for stage in stages:
            line = of_name[of_name["stage"] == stage]
            if line.empty:
                continue
            look = looks[stage]
            style: dict[str, Any] = {
                "color": look.color,
                "ls": look.dash,
                "marker": look.marker,
                "markevery": max(1, len(line) // 6),
                "label": stage,
            }
            if are_alike:
                style = {"color": "0.25", "alpha": 0.35, "label": f"each of {len(stages)} stages"}
            axis.plot(line["epoch"].to_numpy(), line["value"].to_numpy(), ms=3, mew=0, lw=1.0,
                      gid=f"stage {stage}", **style)  # fmt: skip
        whole_ticks(axis, 4)
        axis.locator_params(axis="y", nbins=4)
    columns = panels[0][0].get_gridspec().ncols
    for place, (axis,) in enumerate(panels):
        if place + columns >= len(panels):
            axis.set_xlabel("epoch")
    legend(figure, [axis for (axis,) in panels], is_packed=True)
    return figure


# --- pictures and features


class Stamped(NamedTuple):
    """A picture without and with an attack's trigger: bytes, height x width x channels."""

    attack: str
    clean: npt.NDArray[np.uint8]
    triggered: npt.NDArray[np.uint8]


def gallery(pictures: Sequence[Stamped]) -> Any:
    """A row per attack: the clean picture, the triggered one, and what differs, amplified by the
    factor above it: the largest whole one that cuts off no more than a hundredth of it."""
    if not pictures:
        raise NothingToDraw("there are no pictures")
    blocks = 1 if len(pictures) <= 5 else 2
    rows = math.ceil(len(pictures) / blocks)
    width = COLUMN_INCHES if blocks == 1 else PAGE_INCHES
    figure = new_figure(width, 0.1 + 1.2 * rows)
    axes = figure.subplots(rows, 3 * blocks, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.set_visible(False)
    for place, picture in enumerate(pictures):
        block, row = divmod(place, rows)
        _picture_row(axes[row][3 * block : 3 * block + 3], picture, is_first=row == 0)
    return figure


def _picture_row(axes: Sequence[Any], picture: Stamped, *, is_first: bool) -> None:
    if picture.clean.shape != picture.triggered.shape:
        raise ValueError(
            f"{picture.attack}: the clean picture is {picture.clean.shape}, the triggered one"
            f" {picture.triggered.shape}"
        )
    difference = np.abs(picture.triggered.astype(int) - picture.clean.astype(int))
    differing = difference[difference > 0]
    factor = int(255 // np.percentile(differing, 99)) if len(differing) else 0
    words = f"difference × {factor}" if factor else "no difference"
    shown = (
        picture.clean,
        picture.triggered,
        np.minimum(factor * difference, 255).astype(np.uint8),
    )
    titles = ("clean", "triggered") if is_first else ("", "")
    for axis, image, title in zip(axes, shown, (*titles, words), strict=True):
        axis.set_visible(True)
        # One channel is a plane for the reader of pictures.
        plane = image[..., 0] if image.shape[-1] == 1 else image
        axis.imshow(plane, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=SMALL, loc="center", pad=2)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel(wrapped(picture.attack, 16), fontsize=SMALL)


FEATURES = {"clean": ("o", 0, 7), "triggered": ("^", 1, 9), "target": ("P", 2, 16)}
"""By kind: its marker, its place in the palette, its size."""


def feature_map(frame: pd.DataFrame) -> Any:
    """Where pictures lie in a plane of features: a panel for the victim, then one per defense.

    Columns: x, y, kind (clean, triggered or target), model (victim, or a defense).
    """
    import seaborn as sns

    _need(frame, "x y kind model", "features")
    xs, ys = _numbers(frame["x"]), _numbers(frame["y"])
    kinds, models = (frame[n].astype(str).to_numpy() for n in ("kind", "model"))
    known = np.isfinite(xs + ys) & np.isin(kinds, list(FEATURES))
    if not known.any():
        raise NothingToDraw(
            f"none of {len(frame)} features has a place and is {', '.join(FEATURES)}"
        )
    names = sorted(_unique(models[known]), key=lambda name: name != "victim")
    figure, panels = _panels(names)
    colors = sns.color_palette("colorblind")
    for name, (axis,) in zip(names, panels, strict=True):
        for kind, (marker, place, size) in FEATURES.items():
            here = known & (models == name) & (kinds == kind)
            if here.any():
                axis.scatter(
                    xs[here],
                    ys[here],
                    s=size,
                    marker=marker,
                    color=colors[place],
                    alpha=0.9 if kind == "target" else 0.6,
                    linewidths=0.4,
                    edgecolors="white",
                    label=f"{kind} class" if kind == "target" else kind,
                    gid=f"{kind} {name}",
                    zorder=4 if kind == "target" else 3,
                    # A file of vectors with a mark per picture takes minutes to open.
                    rasterized=len(frame) > 5000,
                )
        axis.set(xticks=[], yticks=[])
        axis.margins(0.06)
        axis.set_box_aspect(1)
    legend(figure, [axis for (axis,) in panels], is_packed=True)
    return figure
