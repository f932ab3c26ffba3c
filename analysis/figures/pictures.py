"""Pictures without and with a trigger, and where they lie among features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.figures.panels import SMALL, Floats, as_numbers, names_in, panel_grid, require
from analysis.theme import COLUMN_INCHES, PAGE_INCHES, NothingToDraw, legend, new_figure, wrapped

if TYPE_CHECKING:
    import pandas as pd


class Stamped(NamedTuple):
    """A picture without and with an attack's trigger: bytes, height x width x channels."""

    attack: str
    clean: npt.NDArray[np.uint8]
    triggered: npt.NDArray[np.uint8]
    words: str = ""
    """What the picture shows, if it is known."""


def gallery(pictures: Sequence[Stamped]) -> Any:
    """A row per attack: the clean picture, the triggered one, and what differs: no change is grey,
    as in the gallery of training pairs, and a change amplified by the factor above it, the largest
    whole one that cuts off no more than a hundredth of it. A factor that all have stands above the
    first alone."""
    if not pictures:
        raise NothingToDraw("there are no pictures")
    for picture in pictures:
        if picture.clean.shape != picture.triggered.shape:
            raise ValueError(
                f"{picture.attack}: the clean picture is {picture.clean.shape}, the triggered one"
                f" {picture.triggered.shape}"
            )
    blocks = 1 if len(pictures) <= 5 else 2
    rows = math.ceil(len(pictures) / blocks)
    width = COLUMN_INCHES if blocks == 1 else PAGE_INCHES
    factors = [_factor(picture) for picture in pictures]
    is_one = len(set(factors)) == 1
    has_words = any(picture.words for picture in pictures)
    figure = new_figure(width, 0.2 + (1.0 + 0.15 * has_words + 0.2 * (not is_one)) * rows)
    axes = figure.subplots(rows, 3 * blocks, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.set_visible(False)
    for place, picture in enumerate(pictures):
        block, row = divmod(place, rows)
        axes_3 = axes[row][3 * block : 3 * block + 3]
        _picture_row(axes_3, picture, factors[place])
        if row == 0:
            axes_3[0].set_title("clean", **TITLE)
            axes_3[1].set_title("triggered", **TITLE)
        if row == 0 or not is_one:
            factor = factors[place]
            words = f"difference × {factor}" if factor else "no difference"
            axes_3[2].set_title(words, **TITLE)
    return figure


LETTERS = 18
GREY = 128
"""Of a difference: no change."""
TITLE: dict[str, Any] = {"fontsize": SMALL, "loc": "center", "pad": 2}


def _difference(picture: Stamped) -> npt.NDArray[np.int64]:
    return picture.triggered.astype(np.int64) - picture.clean.astype(np.int64)


def _factor(picture: Stamped) -> int:
    """By how much a difference can be amplified; 0 where there is none."""
    difference = np.abs(_difference(picture))
    differing = difference[difference > 0]
    return max(1, int(GREY // np.percentile(differing, 99))) if len(differing) else 0


def _picture_row(axes: Sequence[Any], picture: Stamped, factor: int) -> None:
    difference = np.clip(GREY + factor * _difference(picture), 0, 255).astype(np.uint8)
    for axis, image in zip(axes, (picture.clean, picture.triggered, difference), strict=True):
        axis.set_visible(True)
        # One channel is a plane for the reader of pictures.
        plane = image[..., 0] if image.shape[-1] == 1 else image
        axis.imshow(plane, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel(wrapped(picture.attack, 16), fontsize=SMALL)
    words = picture.words
    if len(words) > LETTERS:  # one line: the next picture is right below
        words = words[: LETTERS - 1].rstrip() + "…"
    axes[0].set_xlabel(words, fontsize=SMALL, labelpad=2)


VICTIM = "victim"
MOST_VECTORS = 1500
FEATURES = {"clean": ("o", 0, 7), "triggered": ("^", 1, 9), "target": ("P", 2, 16)}
"""By kind: its marker, its place in the palette, its size."""


def feature_map(frame: pd.DataFrame) -> Any:
    """Where pictures lie in a plane of features: a panel for the victim, then one per defense.

    Columns: x, y, kind (clean, triggered or target), model (victim, or a defense) and, if panels
    are to be turned so that clean pictures lie where the victim has them, image.
    """
    import seaborn as sns

    require(frame, "x y kind model", "features")
    place_N2 = np.column_stack([as_numbers(frame["x"]), as_numbers(frame["y"])])
    kinds, models = (frame[n].astype(str).to_numpy() for n in ("kind", "model"))
    known = np.isfinite(place_N2).all(1) & np.isin(kinds, list(FEATURES))
    if not known.any():
        raise NothingToDraw(
            f"none of {len(frame)} features has a place and is {', '.join(FEATURES)}"
        )
    names = sorted(names_in(models[known]), key=lambda name: name != VICTIM)
    if "image" in frame.columns:
        clean = frame["image"].where(known & (kinds == "clean"))
        for name in names[1:]:
            turned = _turned(place_N2, clean, models, name)
            place_N2[models == name] = turned
    figure, panels = panel_grid(names, is_bare=True)
    colors = sns.color_palette("colorblind")
    for name, (axis,) in zip(names, panels, strict=True):
        for kind, (marker, place, size) in FEATURES.items():
            here = known & (models == name) & (kinds == kind)
            if here.any():
                axis.scatter(
                    *place_N2[here].T,
                    s=size,
                    marker=marker,
                    color=colors[place],
                    alpha=0.9 if kind == "target" else 0.6,
                    linewidths=0.4,
                    edgecolors="white",
                    label=f"{kind} class" if kind == "target" else kind,
                    gid=f"{kind} {name}",
                    zorder=4 if kind == "target" else 3,
                    # A file of vectors with a mark per picture is large, and slow to open.
                    rasterized=len(frame) > MOST_VECTORS,
                )
        _square(axis, place_N2[known & (models == name)])
    legend(figure, [axis for (axis,) in panels], is_packed=True)
    return figure


def _turned(place_N2: Floats, clean: pd.Series, models: npt.NDArray[Any], name: str) -> Floats:
    """A model's places, turned and mirrored (orthogonal Procrustes) to where the victim has the
    clean pictures that both have."""
    own, victim = models == name, models == VICTIM
    at = {image: i for i, image in enumerate(clean) if victim[i] and image == image}
    pairs = [(i, at[image]) for i, image in enumerate(clean) if own[i] and image in at]
    if len(pairs) < 2:
        return np.asarray(place_N2[own])
    mine_M2, theirs_M2 = (place_N2[list(rows)] for rows in zip(*pairs, strict=True))
    middle_2 = mine_M2.mean(0)
    left_22, _, right_22 = np.linalg.svd((mine_M2 - middle_2).T @ (theirs_M2 - theirs_M2.mean(0)))
    turned_N2: Floats = (place_N2[own] - middle_2) @ (left_22 @ right_22)
    return turned_N2


def _square(axis: Any, place_N2: Floats) -> None:
    """One scale along both sides, or turning would mean nothing."""
    low_2, high_2 = place_N2.min(0), place_N2.max(0)
    half = 0.53 * float((high_2 - low_2).max()) or 1.0
    (x, y) = (low_2 + high_2) / 2
    axis.set(xticks=[], yticks=[], xlim=(x - half, x + half), ylim=(y - half, y + half))
    axis.set_box_aspect(1)
    # In the middle of its place it would leave the layout too little room for the name above.
    axis.set_anchor("N")
