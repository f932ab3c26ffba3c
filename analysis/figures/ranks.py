"""Intervals of ranks, among defenses that are given the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.figures.panels import SMALL, as_numbers, require
from analysis.theme import COLUMN_INCHES, LETTER_INCHES, NothingToDraw, legend, new_figure, wrapped

if TYPE_CHECKING:
    import pandas as pd


def rank_plot(frame: pd.DataFrame, score: str = "score") -> Any:
    """Intervals of ranks, the best on top, among defenses that are given the same.

    Columns: defense, score (less is better, 0 to 1), rank_low, rank_high, letters, needs (text or a
    sequence), partial. Who shares a letter is not told apart. Partial defenses are hollow. What the
    ``score`` is heads its column.
    """
    import seaborn as sns

    require(frame, "defense score rank_low rank_high letters needs partial", "defenses")
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
    _beside(axis, 1.0, "top", f"{score}, %", "tier")
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
    numbers = zip(*(as_numbers(frame[n]) for n in ("score", "rank_low", "rank_high")), strict=True)
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
