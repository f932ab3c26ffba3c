"""A point per defense: accuracy against safety, and cost against what it buys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures.naming import Point, draw_named, point_marks
from analysis.figures.panels import UNDEFENDED, Floats, as_numbers, percent_limits, require
from analysis.theme import COLUMN_INCHES, NothingToDraw, new_figure

if TYPE_CHECKING:
    import pandas as pd


OTHERS = "x+1234"
"""A mark for each source of published numbers."""
MOST_OTHERS = 6
"""More published points are drawn, and not named."""
ROOM = 0.5, 5.0
"""How far from ours they may lie to widen the axes: a share of the extent of ours, or points."""


def trade_off(frame: pd.DataFrame, published: pd.DataFrame | None = None, note: str = "") -> Any:
    """ASR against clean accuracy, with intervals, and the front of what nothing dominates.

    Columns: defense, clean, asr, clean_low, clean_high, asr_low, asr_high, on_front (true, or a
    share of draws of at least one half). ``published`` has label, clean, asr, and source if there
    are several; the legend names the sources, and ends with the ``note``. Axes are as large as ours
    need: published points far outside are arrows at the edge. The front is a stair as in a
    campaign's cloud: between two points only the larger ASR can be had.
    """
    require(frame, "defense clean asr clean_low clean_high asr_low asr_high on_front", "defenses")
    marks = point_marks()
    names = [str(name) for name in frame["defense"]]
    clean, asr = (100 * as_numbers(frame[name]) for name in ("clean", "asr"))
    bounds = {
        name: np.clip(100 * as_numbers(frame[name]), 0, 100)
        for name in ("clean_low", "clean_high", "asr_low", "asr_high")
    }
    on_front = np.nan_to_num(as_numbers(frame["on_front"])) >= 0.5
    known = [i for i in np.argsort(asr, kind="stable") if math.isfinite(clean[i] + asr[i])]
    if not known:
        raise NothingToDraw(f"none of {len(names)} defenses has a clean accuracy and an ASR")
    points = []
    for i in known:
        kind = "front" if on_front[i] else "dominated"
        style = marks["undefended" if names[i] == UNDEFENDED else kind]
        points.append(Point(names[i], clean[i], asr[i], style))
    xs = [*(p.x for p in points), *bounds["clean_low"][known], *bounds["clean_high"][known]]
    ys = [*(p.y for p in points), *bounds["asr_low"][known], *bounds["asr_high"][known]]
    others = {} if published is None or published.empty else _others(published)
    every = list(chain(*others.values()))
    x_limits = percent_limits([*xs, *(p.x for p in every if _is_near(p.x, xs))], -4, 104)
    y_limits = percent_limits([*ys, *(p.y for p in every if _is_near(p.y, ys))], 0, 104)
    far = 0
    for point in every:
        points.append(_within(point, x_limits, y_limits))
        far += points[-1] != point
    if far:
        note = "; ".join(filter(None, [note, f"arrows: {far} far outside"]))
    figure = new_figure(COLUMN_INCHES, 2.9)
    axis = figure.subplots()
    _intervals(axis, clean[known], asr[known], {n: b[known] for n, b in bounds.items()})
    front = sorted((clean[i], asr[i]) for i in known if on_front[i])
    if front:
        style = {"color": marks["front"]["color"], "lw": 1.0, "zorder": 3}
        axis.plot(*zip(*front, strict=True), "-", drawstyle="steps-pre", label="front",
                  gid="front", **style)  # fmt: skip
    _kinds(axis, points)
    for source, of_source in others.items():
        count = "" if of_source[0].is_told else f" ({len(of_source)} points)"
        axis.plot([], [], ls="", label=f"{source}{count}", **of_source[0].style)
    if note:
        axis.plot([], [], ls="", label=note)

    def limits() -> None:
        axis.set(xlim=x_limits, ylim=y_limits)

    axis.set(xlabel="clean accuracy, %", ylabel="ASR, %", title="better: right and down")
    draw_named(figure, axis, points, limits)
    return figure


def _others(published: pd.DataFrame) -> dict[str, list[Point]]:
    """The points of each source, in grey, with a mark of its own."""
    require(published, "label clean asr", "published numbers")
    clean, asr = (100 * as_numbers(published[name]) for name in ("clean", "asr"))
    has_sources = "source" in published.columns
    sources = published["source"].astype(str) if has_sources else ["published"] * len(published)
    style, are_told = point_marks()["published"], len(published) <= MOST_OTHERS
    found: dict[str, list[Point]] = {}
    for label, x, y, source in zip(published["label"], clean, asr, sources, strict=True):
        if math.isfinite(x + y):
            point = Point(str(label), x, y, style, are_told, is_others=True)
            found.setdefault(source, []).append(point)
    marked = zip(found.items(), cycle(OTHERS), strict=False)
    return {
        source: [point._replace(style={**style, "marker": marker}) for point in points]
        for (source, points), marker in marked
    }


def _is_near(value: float, ours: Sequence[float]) -> bool:
    known = [number for number in ours if math.isfinite(number)]
    low, high = min(known), max(known)
    room = max(ROOM[0] * (high - low), ROOM[1])
    return low - room <= value <= high + room


def _within(point: Point, xs: tuple[float, float], ys: tuple[float, float]) -> Point:
    """A point, or at the edge of the panel an arrow to where it lies."""
    marker = ""
    for value, (low, high), (back, forth) in ((point.x, xs, "<>"), (point.y, ys, "v^")):
        if not low <= value <= high:
            marker = marker or (back if value < low else forth)
    if not marker:
        return point
    style = {**point.style, "marker": marker, "clip_on": False}
    x, y = (float(np.clip(value, *span)) for value, span in ((point.x, xs), (point.y, ys)))
    return point._replace(x=x, y=y, style=style)


def _intervals(axis: Any, xs: Floats, ys: Floats, bounds: Mapping[str, Floats]) -> None:
    """Error bars; an end that is not known, or infinite as with one seed, is left out."""
    # Darker than the lines of the panel, with which they were mistaken.
    style = {"color": "0.35", "lw": 1.0, "zorder": 2}
    is_any = False
    for name, horizontal in (("clean", True), ("asr", False)):
        low, high = bounds[f"{name}_low"], bounds[f"{name}_high"]
        here = np.isfinite(low) & np.isfinite(high)
        if not here.any():
            continue
        draw, along = (axis.hlines, ys) if horizontal else (axis.vlines, xs)
        draw(along[here], low[here], high[here], gid=f"intervals {name}", **style)
        is_any = True
    if is_any:
        axis.plot([], [], label="interval of 95 %", **style)


def _kinds(axis: Any, points: Sequence[Point]) -> None:
    """A legend's entry for each kind of point that there is."""
    for kind, style in point_marks().items():
        if kind in ("dominated", "undefended") and any(p.style == style for p in points):
            axis.plot([], [], ls="", label=kind, **style)


def cost(frame: pd.DataFrame) -> Any:
    """The share of the attack's lift that is removed against the cost relative to the victim's
    training; defenses that cost nothing stand at 0, left of the logarithmic part.

    Columns: defense, relative_cost, lift_removed.
    """
    require(frame, "defense relative_cost lift_removed", "defenses")
    costs, removed = as_numbers(frame["relative_cost"]), 100 * as_numbers(frame["lift_removed"])
    names = [str(name) for name in frame["defense"]]
    known = [
        i
        for i in np.argsort(-removed, kind="stable")
        if math.isfinite(removed[i] + costs[i]) and costs[i] >= 0
    ]
    if not known:
        raise NothingToDraw(f"none of {len(names)} defenses has a cost and a share of lift removed")
    marks = point_marks()
    points = [
        Point(names[i], costs[i], removed[i],
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
        axis.set_ylim(*percent_limits([0, 100, *(point.y for point in points)]))

    draw_named(figure, axis, points, limits)
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
