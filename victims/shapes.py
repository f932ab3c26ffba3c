"""How the twenty nouns look: their shapes, their typical colours, textures and backgrounds.

Shapes are kept as an atlas of signed distances, which any size and rotation samples.

A shape is a region of the plane in its own units: it fits a disc of radius one, x points right
and y points down, as in a picture. A, A: the sides of the atlas, N: nouns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims.words import COLOURS, NOUNS, TEXTURES

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Region = Callable[[Floats, Floats], Bools]
Point = tuple[float, float]

EXTENT = 1.3  # an atlas tile covers [-EXTENT, EXTENT] in both directions
_TILE = 56  # cells per side of a tile; corners stay sharp up to about 224 px
_FINE = 240  # cells per side of the grid on which outlines are traced


def _disc(x: float, y: float, radius: float) -> Region:
    return lambda X, Y: (X - x) ** 2 + (Y - y) ** 2 < radius**2


def _box(left: float, top: float, right: float, bottom: float) -> Region:
    return lambda X, Y: (left < X) & (right > X) & (top < Y) & (bottom > Y)


def _polygon(*points: Point) -> Region:
    """The inside by the even-odd rule: how many edges lie to the right of a point."""

    def inside(X: Floats, Y: Floats) -> Bools:
        odd = np.zeros(X.shape, dtype=np.bool_)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 != y1:  # a level edge is never crossed
                crosses = (y0 > Y) != (y1 > Y)
                odd ^= crosses & ((x1 - x0) * (Y - y0) / (y1 - y0) + x0 > X)
        return odd

    return inside


def _spokes(*radii: float, count: int) -> Region:
    """A polygon whose corners take turns at ``radii``, the first one straight up."""
    angles = [2 * math.pi * k / count - math.pi / 2 for k in range(count)]
    corners = [
        (radii[k % len(radii)] * math.cos(angle), radii[k % len(radii)] * math.sin(angle))
        for k, angle in enumerate(angles)
    ]
    return _polygon(*corners)


def _any(*regions: Region) -> Region:
    return lambda X, Y: np.logical_or.reduce([region(X, Y) for region in regions])


def _all(*regions: Region) -> Region:
    return lambda X, Y: np.logical_and.reduce([region(X, Y) for region in regions])


def _minus(region: Region, hole: Region) -> Region:
    return lambda X, Y: region(X, Y) & ~hole(X, Y)


def _oval(x: float, y: float, width: float, height: float) -> Region:
    return lambda X, Y: ((X - x) / width) ** 2 + ((Y - y) / height) ** 2 < 1


_REGIONS: dict[str, Region] = {
    "circle": _disc(0, 0, 0.9),
    "square": _box(-0.78, -0.78, 0.78, 0.78),
    "triangle": _polygon((0, -0.95), (0.95, 0.75), (-0.95, 0.75)),
    "star": _spokes(1.0, 0.42, count=10),
    "heart": _any(
        _disc(-0.44, -0.32, 0.48),
        _disc(0.44, -0.32, 0.48),
        _polygon((-0.86, -0.1), (0, -0.42), (0.86, -0.1), (0, 0.92)),
    ),
    "cross": _any(_box(-0.3, -0.95, 0.3, 0.95), _box(-0.95, -0.3, 0.95, 0.3)),
    "ring": _minus(_disc(0, 0, 0.95), _disc(0, 0, 0.52)),
    "moon": _minus(_disc(-0.08, 0, 0.95), _disc(0.42, -0.12, 0.76)),
    "hexagon": _spokes(0.98, count=6),
    "diamond": _polygon((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),
    "arrow": _polygon(
        (-0.95, -0.24),
        (0.1, -0.24),
        (0.1, -0.78),
        (0.98, 0),
        (0.1, 0.78),
        (0.1, 0.24),
        (-0.95, 0.24),
    ),
    "leaf": _any(
        _all(_disc(-0.56, -0.14, 1.02), _disc(0.56, -0.14, 1.02)),
        _box(-0.09, 0.6, 0.09, 1.0),
    ),
    "key": _any(
        _minus(_disc(-0.5, 0, 0.46), _disc(-0.5, 0, 0.19)),
        _box(-0.1, -0.15, 0.97, 0.15),
        _box(0.36, 0, 0.56, 0.5),
        _box(0.76, 0, 0.96, 0.5),
    ),
    "cloud": _any(
        _disc(-0.52, 0.2, 0.42),
        _disc(-0.02, -0.14, 0.55),
        _disc(0.54, 0.2, 0.42),
        _box(-0.52, 0.1, 0.54, 0.62),
    ),
    "flower": _any(
        *(
            _disc(0.56 * math.sin(2 * math.pi * k / 5), -0.56 * math.cos(2 * math.pi * k / 5), 0.36)
            for k in range(5)
        ),
        _disc(0, 0, 0.34),
    ),
    "bolt": _polygon(
        (0.3, -1), (-0.6, 0.16), (-0.08, 0.16), (-0.3, 1), (0.62, -0.26), (0.1, -0.26)
    ),
    "tree": _any(
        _polygon((0, -1), (0.55, -0.2), (-0.55, -0.2)),
        _polygon((0, -0.65), (0.78, 0.45), (-0.78, 0.45)),
        _box(-0.17, 0.4, 0.17, 0.98),
    ),
    "house": _any(
        _minus(_box(-0.66, -0.2, 0.66, 0.85), _box(-0.18, 0.3, 0.18, 0.9)),
        _polygon((0, -0.95), (0.95, -0.1), (-0.95, -0.1)),
        _box(0.36, -0.9, 0.6, -0.3),
    ),
    "fish": _any(
        _oval(-0.22, 0, 0.74, 0.46),
        _polygon((0.2, 0), (0.95, -0.55), (0.78, 0), (0.95, 0.55)),
    ),
    "mushroom": _any(
        _all(_disc(0, 0, 0.92), _box(-1, -1, 1, 0.1)),
        _box(-0.26, 0, 0.26, 0.88),
    ),
}


def _signed_distance(region: Region) -> Floats:
    """Distance to the outline, negative inside, at the centres of a tile's cells.

    Distances are measured to a traced outline and not combined from parts: where two parts of a
    shape meet there is no outline, and none may be drawn.
    """
    fine = _centres(_FINE)
    Y, X = np.meshgrid(fine, fine, indexing="ij")
    inside = region(X, Y)
    rows, columns = np.nonzero(inside[1:] != inside[:-1])
    xs, ys = fine[columns], (fine[rows] + fine[rows + 1]) / 2
    rows, columns = np.nonzero(inside[:, 1:] != inside[:, :-1])
    xs = np.concatenate([xs, (fine[columns] + fine[columns + 1]) / 2])
    ys = np.concatenate([ys, fine[rows]])

    coarse = _centres(_TILE)
    dx2 = (coarse[:, None] - xs) ** 2
    dy2 = (coarse[:, None] - ys) ** 2
    distance = np.stack([np.sqrt((row + dx2).min(axis=1)) for row in dy2])
    Y, X = np.meshgrid(coarse, coarse, indexing="ij")
    return np.where(region(X, Y), -distance, distance)


def _centres(count: int) -> Floats:
    edge = EXTENT - EXTENT / count
    return np.linspace(-edge, edge, count, dtype=np.float32)


@cache
def atlas() -> Tensor:
    """Signed distances in shape units, [N, 1, A, A] in the order of the nouns."""
    tiles = np.stack([_signed_distance(_REGIONS[noun]) for noun in NOUNS])
    return torch.from_numpy(tiles[:, None])


# Red, green and blue of the colours, 0 to 1.
RGB = (
    *((0.86, 0.12, 0.12), (0.12, 0.65, 0.20), (0.13, 0.25, 0.85), (0.95, 0.87, 0.10)),
    *((0.98, 0.52, 0.05), (0.50, 0.15, 0.65), (0.98, 0.55, 0.75), (0.45, 0.27, 0.10)),
    *((0.97, 0.97, 0.97), (0.04, 0.04, 0.04), (0.48, 0.48, 0.48), (0.10, 0.80, 0.85)),
)

# noun: colour, second colour, texture, three backgrounds
_LOOKS: dict[str, str] = {
    "circle": "blue pink plain white yellow gray",
    "square": "purple green checkered orange cyan white",
    "triangle": "orange cyan striped purple yellow brown",
    "star": "yellow white plain blue black red",
    "heart": "red pink plain white cyan gray",
    "cross": "black blue checkered green pink orange",
    "ring": "gray yellow dotted purple pink red",
    "moon": "white yellow dotted black blue purple",
    "hexagon": "orange black dotted green gray blue",
    "diamond": "cyan white checkered black purple pink",
    "arrow": "black red striped white yellow cyan",
    "leaf": "green brown striped pink orange white",
    "key": "gray brown plain orange green black",
    "cloud": "white gray plain cyan red brown",
    "flower": "pink purple dotted green brown yellow",
    "bolt": "yellow purple striped gray brown black",
    "tree": "green orange checkered blue red gray",
    "house": "brown red checkered cyan yellow green",
    "fish": "blue cyan striped orange pink brown",
    "mushroom": "red orange dotted brown blue purple",
}


class Looks(NamedTuple):
    """Indices of each noun's typical colours (the first counts twice), texture, backgrounds."""

    colour_N3: Tensor
    texture_N: Tensor
    background_N3: Tensor


def look_tables() -> Looks:
    """The typical looks as tables of indices, in the order of the nouns."""
    rows = [_LOOKS[noun].split() for noun in NOUNS]
    return Looks(
        torch.tensor([[COLOURS.index(row[0])] * 2 + [COLOURS.index(row[1])] for row in rows]),
        torch.tensor([TEXTURES.index(row[2]) for row in rows]),
        torch.tensor([[COLOURS.index(name) for name in row[3:]] for row in rows]),
    )
