"""A line per defense or stage: profiles over cells, ROC curves, training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import inference
from analysis.figures.panels import (
    FIXED,
    as_numbers,
    line_style,
    names_in,
    ordered_looks,
    outer_labels,
    panel_grid,
    require,
)
from analysis.theme import COLUMN_INCHES, GREY, NothingToDraw, legend, new_figure, whole_ticks

if TYPE_CHECKING:
    import pandas as pd

MOST_LINES = 24
"""More lines cannot be told apart, and are drawn alike."""


def profile(frame: pd.DataFrame, order: Sequence[str] = ()) -> Any:
    """The share of a defense's cells whose ASR is at most tau, against tau.

    Columns: defense, asr; one row per cell. A cell without an ASR is at most at no tau: it ends its
    line below 100 %, and is counted in the legend, where the best defense comes first.
    """
    require(frame, "defense asr", "cells")
    cells = {
        defense: as_numbers(frame["asr"][frame["defense"].astype(str) == defense])
        for defense in names_in(frame["defense"])
    }
    known = {defense: values[~np.isnan(values)] for defense, values in cells.items()}
    if not any(map(len, known.values())):
        raise NothingToDraw(f"none of {len(frame)} cells has an ASR")
    looks = ordered_looks(list(cells), order)
    figure = new_figure(COLUMN_INCHES, 2.4)
    axis = figure.subplots()
    # The area above a profile is the mean ASR, that of a cell without one taken to be all.
    for defense in sorted(cells, key=lambda name: float(np.nan_to_num(cells[name], nan=1).mean())):
        values = known[defense]
        taus = np.unique([0.0, *values, 1.0])
        there = len(values) / len(cells[defense])
        shares = there * inference.profile(values, taus) if len(values) else np.zeros(len(taus))
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
            **line_style(looks[defense]),
        )
    axis.set(xlim=(0, 100), ylim=(0, 102), xlabel="τ: ASR, %", ylabel="cells with ASR ≤ τ, %")
    legend(figure, [axis], is_packed=True)
    return figure


def detection(frame: pd.DataFrame, order: Sequence[str] = ()) -> Any:
    """How defenses that judge rows tell the poisoned ones: ROC curves, a panel per attack.

    Columns: defense, attack, false_positive, true_positive, auroc; a row per point of a curve.
    """
    require(frame, "defense attack false_positive true_positive auroc", "points of ROC curves")
    known = frame.assign(
        **{n: as_numbers(frame[n]) for n in ("false_positive", "true_positive", "auroc")},
        **{name: frame[name].astype(str) for name in ("attack", "defense")},
    ).dropna(subset=["false_positive", "true_positive"])
    if known.empty:
        raise NothingToDraw(f"none of {len(frame)} points of ROC curves has both of its rates")
    attacks, defenses = names_in(known["attack"]), names_in(known["defense"])
    looks = ordered_looks(defenses, order)
    labels = {d: _auroc_words(d, known["auroc"][known["defense"] == d]) for d in defenses}
    figure, panels = panel_grid(attacks)
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
                **line_style(looks[defense]),
            )
        axis.set(xlim=(-3, 103), ylim=(-3, 103), xticks=(0, 50, 100), yticks=(0, 50, 100))
        axis.set_box_aspect(1)
    outer_labels(panels, "clean flagged, %", ["poison found, %"])
    legend(figure, [axis for (axis,) in panels], is_packed=True)
    return figure


def _auroc_words(defense: str, values: Iterable[float]) -> str:
    """A defense with the range of its AUROC over attacks."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return defense
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return f"{defense}: AUROC {low if low == high else f'{low} to {high}'}"


RECORDED = {
    "clip": "contrastive loss",
    "cross_entropy": "cross-entropy",
    "distill": "distillation loss",
    "eda": "contrastive loss, reworded captions",
    "inmodal_image": "loss among pictures",
    "inmodal_text": "loss among captions",
    "lr": "learning rate",
    "matched": "contrastive loss, matched captions",
    "relearn": "relearning loss",
    "scale": "logit scale",
    "unlearn": "unlearning loss",
}
"""What recorded numbers are; others are called as they were recorded."""
LEARNING_RATE = "lr"


def training(frame: pd.DataFrame) -> Any:
    """What stages recorded while they trained: a panel per number, a line per stage.

    Columns: stage, epoch, name, value. A number of which no stage has two epochs has no panel, nor
    has a learning rate that is the same for all; else it comes last.
    """
    require(frame, "stage epoch name value", "recorded epochs")
    known = frame.assign(
        **{name: as_numbers(frame[name]) for name in ("epoch", "value")},
        **{name: frame[name].astype(str) for name in ("stage", "name")},
    ).dropna(subset=["epoch", "value"])
    if known.empty:
        raise NothingToDraw(f"none of {len(frame)} recorded epochs has a value")
    names, stages = _drawn_names(known), names_in(known["stage"])
    if not names:
        raise NothingToDraw(f"none of {len(stages)} fits recorded a second epoch")
    looks, are_alike = ordered_looks(stages, ()), len(stages) > MOST_LINES
    titles = [RECORDED.get(name, name.replace("_", " ")) for name in names]
    figure, panels = panel_grid(titles, height=1.2 if len(names) > 1 else 1.8)
    for name, (axis,) in zip(names, panels, strict=True):
        of_name = known[known["name"] == name].sort_values("epoch", kind="stable")
        for stage in stages:
            line = of_name[of_name["stage"] == stage]
            if len(line) < 2:
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


def _drawn_names(known: pd.DataFrame) -> list[str]:
    """What has a curve, the learning rate last, if it tells stages apart."""
    curves = [
        name
        for name in names_in(known["name"])
        if known[known["name"] == name].groupby("stage")["epoch"].nunique().max() > 1
    ]
    if LEARNING_RATE in curves:
        curves.remove(LEARNING_RATE)
        rates = known[known["name"] == LEARNING_RATE]
        if len({tuple(own["value"]) for _, own in rates.groupby("stage")}) > 1 or not curves:
            curves.append(LEARNING_RATE)
    return curves
