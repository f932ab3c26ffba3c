"""Pictures without and with a trigger, and where they lie among features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.figures.panels import SMALL, as_numbers, names_in, panel_grid, require
from analysis.theme import COLUMN_INCHES, PAGE_INCHES, NothingToDraw, legend, new_figure, wrapped

if TYPE_CHECKING:
    import pandas as pd


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

    require(frame, "x y kind model", "features")
    xs, ys = as_numbers(frame["x"]), as_numbers(frame["y"])
    kinds, models = (frame[n].astype(str).to_numpy() for n in ("kind", "model"))
    known = np.isfinite(xs + ys) & np.isin(kinds, list(FEATURES))
    if not known.any():
        raise NothingToDraw(
            f"none of {len(frame)} features has a place and is {', '.join(FEATURES)}"
        )
    names = sorted(names_in(models[known]), key=lambda name: name != "victim")
    figure, panels = panel_grid(names)
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
