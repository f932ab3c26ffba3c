"""ASR and clean accuracy against the poison rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.figures.panels import (
    SMALL,
    UNDEFENDED,
    as_numbers,
    line_style,
    names_in,
    ordered_looks,
    outer_labels,
    panel_grid,
    panel_inches,
    percent_limits,
    require,
)
from analysis.theme import LETTER_INCHES, Look, NothingToDraw, legend

if TYPE_CHECKING:
    import pandas as pd

MOST_LINES = 8
"""More lines in a small panel cannot be told apart."""
MOST_ATTACKS = 60
"""Of more panels a picture tells nothing, and takes minutes."""


def rate_curves(
    frame: pd.DataFrame,
    order: Sequence[str] = (),
    invalid: Mapping[str, Sequence[float]] | None = None,
) -> Any:
    """ASR and, below, clean accuracy against the poison rate: a pair of panels per attack.

    Columns: attack, rate, defense, seed, asr, clean. Lines are means over seeds, bands reach from
    the least to the largest seed. Up to the smallest rate the axis is linear, so that it has a 0.
    Of more than `MOST_LINES` defenses those of least ASR have names, and the rest are grey. What of
    an attack is ``invalid`` is said in its panel.
    """
    require(frame, "attack rate defense seed asr clean", "cells")
    known = frame.assign(
        **{name: as_numbers(frame[name]) for name in ("rate", "asr", "clean")},
        **{name: frame[name].astype(str) for name in ("attack", "defense")},
    )
    known = known[known["rate"].notna() & known[["asr", "clean"]].notna().any(axis=1)]
    if known.empty:
        raise NothingToDraw(f"none of {len(frame)} cells has a rate and an ASR or a clean accuracy")
    attacks, defenses = names_in(known["attack"]), names_in(known["defense"])
    if len(attacks) > MOST_ATTACKS:
        raise NothingToDraw(f"{len(attacks):,} attacks are more than {MOST_ATTACKS}")
    looks, bold = ordered_looks(defenses, order), _named(known, defenses)
    figure, panels = panel_grid(attacks, height=1.0 if len(attacks) > 1 else 1.4, rows=2)
    clean = (
        percent_limits(100 * known["clean"], -4, 104) if known["clean"].notna().any() else (0, 100)
    )
    for attack, (above, below) in zip(attacks, panels, strict=True):
        of_attack = known[known["attack"] == attack]
        for defense in defenses:
            of_both = of_attack[of_attack["defense"] == defense]
            for axis, name in ((above, "asr"), (below, "clean")):
                if defense in bold:
                    _rate_line(axis, of_both, name, defense, looks[defense])
                else:
                    _grey_line(axis, of_both, name, defense, len(defenses) - len(bold))
        above.set_ylim(-4, 104)
        below.set_ylim(*clean)
        if lost := sorted((invalid or {}).get(attack, ())):
            words = f"{', '.join(f'{100 * rate:.4g} %' for rate in lost)}: invalid victim"
            above.annotate(words, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center",
                           fontsize=SMALL, color="0.35", gid=f"invalid {attack}")  # fmt: skip
        for axis in (above, below):
            _rate_axis(axis, sorted(set(of_attack["rate"])))
    outer_labels(panels, "poison rate, %", ("ASR, %", "clean acc., %"))
    legend(figure, [axis for pair in panels for axis in pair], is_packed=True)
    return figure


def _named(known: pd.DataFrame, defenses: Sequence[str]) -> set[str]:
    """The undefended victim, and of many defenses those of least mean ASR."""
    if len(defenses) <= MOST_LINES:
        return set(defenses)
    means = known[known["rate"] > 0].groupby("defense")["asr"].mean().dropna()
    best = [name for name in means.sort_values(kind="stable").index if name != UNDEFENDED]
    return {UNDEFENDED, *best[: MOST_LINES - 1]}


def _grey_line(axis: Any, frame: pd.DataFrame, name: str, defense: str, num: int) -> None:
    """One of the others, whose names would help nobody."""
    over = 100 * frame.dropna(subset=[name]).groupby("rate")[name].mean()
    if len(over):
        axis.plot(over.index, over, color="0.78", lw=0.7, marker=".", ms=2, zorder=1.5,
                  label=f"each of {num} others", gid=f"mean {defense}")  # fmt: skip


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
        **line_style(look),
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
    inches = (places - low) / (high - low) * panel_inches(axis)
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
