"""Points of a panel with their names, placed where they hide nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from analysis.figures.panels import FIXED, SMALL, Floats
from analysis.theme import GREY, legend, wrapped

MOST_NAMED = 8
"""More points are numbered, with a key below."""


class Point(NamedTuple):
    """A point with a name, in percent or in the units of its axis; too many names are not told.
    Others' points have numbers, so that ours keep their names."""

    name: str
    x: float
    y: float
    style: Mapping[str, Any]
    is_told: bool = True
    is_others: bool = False


def draw_named(figure: Any, axis: Any, points: Sequence[Point], limits: Callable[[], None]) -> None:
    """Mark points, and name them where nothing else lies; if there are many, number them.

    ``limits`` sets the axis' limits: placing needs them, and marks would move them.
    """
    told = [point for point in points if point.is_told]
    can_name = sum(not point.is_others for point in told) <= MOST_NAMED
    numbered = [point for point in told if point.is_others or not can_name]
    numbers = {id(point): number for number, point in enumerate(numbered, 1)}
    for point in points:
        number = numbers.get(id(point))
        label = None if number is None else f"{number}{FIXED * 2}{point.name}"
        # One at the edge of the panel is whole.
        style = {"clip_on": False, **point.style}
        axis.plot([point.x], [point.y], ls="", label=label, gid=f"point {point.name}", **style)
    limits()
    legend(figure, [axis], is_packed=True)
    texts = [
        "" if not p.is_told else str(numbers[id(p)]) if id(p) in numbers else wrapped(p.name, 18)
        for p in points
    ]
    _place(figure, axis, points, texts)


GAPS = (4.5, 7.0, 11.0, 16.0, 22.0, 30.0, 40.0, 55.0)
"""How far from its point a name may lie, in points."""
AVOIDED = {"mark": 3.0, "line": 0.5, "name": 50.0}
"""What it costs to cover a pixel."""


def _place(figure: Any, axis: Any, points: Sequence[Point], texts: Sequence[str]) -> None:
    """Write each text near its point, where it covers the least of marks, bars and other texts;
    an empty one is not written."""
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi
    frame = axis.get_window_extent()
    at = axis.transData.transform([(point.x, point.y) for point in points])
    # Boxes that are taken: left, bottom, right, top, and what covering them costs.
    taken = [_boxes(at, 4 / to_points, AVOIDED["mark"]), _drawn_lines(axis)]
    gaps, turns = np.meshgrid(GAPS, 2 * math.pi * (np.arange(24) / 24 + 0.125), indexing="ij")
    for place, point, text in zip(at, points, texts, strict=True):
        if not text:
            continue
        note = axis.annotate(
            text,
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=SMALL,
            linespacing=0.95,
            color="0.4" if point.is_others else "0.1",
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


def point_marks() -> dict[str, dict[str, Any]]:
    """How points are drawn: on the front, dominated, undefended, published elsewhere."""
    import seaborn as sns

    blue = sns.color_palette("colorblind")[0]
    return {
        "front": {**MARK, "color": blue, "mec": blue},
        "dominated": {**MARK, "mfc": "white", "mec": "0.35"},
        "undefended": {**MARK, "marker": "*", "ms": 7, "mew": 0, "color": "black"},
        "published": {**MARK, "marker": "x", "ms": 4.5, "mew": 1.1, "color": GREY, "zorder": 4},
    }
