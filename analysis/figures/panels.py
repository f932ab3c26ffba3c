"""What several figures share: columns that must be there, looks by defense, small multiples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from analysis.theme import (
    COLUMN_INCHES,
    LETTER_INCHES,
    PAGE_INCHES,
    Look,
    NothingToDraw,
    looks_of,
    new_figure,
    wrapped,
)

if TYPE_CHECKING:
    import pandas as pd

UNDEFENDED = "none"
SMALL = 7.0
FIXED = "\N{NO-BREAK SPACE}"
Floats = npt.NDArray[np.float64]


def require(frame: pd.DataFrame, columns: str, what: str) -> None:
    """A frame without rows, or without a column, says so."""
    missing = [name for name in columns.split() if name not in frame.columns]
    if missing:
        raise NothingToDraw(f"the frame of {what} has no column {', '.join(missing)}")
    if frame.empty:
        raise NothingToDraw(f"there are no {what}")


def as_numbers(values: Iterable[Any]) -> Floats:
    """Floats; what is no number, or not finite, is NaN."""
    import pandas as pd

    found = np.array([math.nan if pd.isna(value) else value for value in values], dtype=float)
    found[~np.isfinite(found)] = math.nan
    return found


def names_in(values: Iterable[Any]) -> list[str]:
    """Names in the order of their first row."""
    return list(dict.fromkeys(str(value) for value in values))


def ordered_looks(names: Sequence[str], order: Sequence[str]) -> dict[str, Look]:
    """Looks by the place in ``order``, then by the place among the names that it lacks."""
    every = [name for name in dict.fromkeys([*order, *names]) if name != UNDEFENDED]
    return {**looks_of(every), UNDEFENDED: Look("black", "*", "-")}


def line_style(look: Look) -> dict[str, Any]:
    """How a defense's line is drawn."""
    size = 5 if look.marker == "*" else 3
    return {"ls": look.dash, "marker": look.marker, "ms": size, "mew": 0, "lw": 1.0,
            "color": look.color}  # fmt: skip


def panel_grid(
    names: Sequence[str], height: float | None = None, rows: int = 1, *, is_bare: bool = False
) -> tuple[Any, list[list[Any]]]:
    """Small multiples: a list of ``rows`` panels, one below the other, for each name. Without a
    height they are square; bare ones have no ticks."""
    num = len(names)
    width = COLUMN_INCHES if num <= 4 else PAGE_INCHES
    most = min(num, 2 if num == 4 else 3 if num < 4 else 5 if height else 6)
    bands = math.ceil(num / most)
    columns = math.ceil(num / bands)
    letters = max(8, int((width / columns - 0.3) / LETTER_INCHES))
    titles = [wrapped(name, letters) for name in names]
    deepest = max(title.count("\n") for title in titles)
    side = height or min(2.4, width / columns - 0.1)
    around = 0.2 + 0.13 * deepest + (0.1 if is_bare else 0 if height else 0.2)
    figure = new_figure(width, (0.1 if is_bare else 0.35) + bands * (around + rows * side))
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


def outer_labels(panels: Sequence[Sequence[Any]], xlabel: str, ylabels: Sequence[str]) -> None:
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


def percent_limits(values: Iterable[float], low: float = -math.inf, high: float = math.inf) -> Any:
    """Limits of an axis around percents, with room, no further out than asked."""
    known = [value for value in values if math.isfinite(value)]
    room = max(0.07 * (max(known) - min(known)), 1.5)
    return max(low, min(known) - room), min(high, max(known) + room)


def panel_inches(axis: Any) -> float:
    """How wide a panel is, about: its layout is not solved yet."""
    grid = axis.get_gridspec()
    return float(axis.figure.get_size_inches()[0] / grid.ncols - 0.3)
