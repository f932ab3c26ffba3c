"""A small square of fixed pixels over any place of any picture, and noise as its plainest pixels.

Shapes: B batch, C channels, H W pixels, P side of the square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from victims.draws import Draws, torch_rng
from victims.errors import UsageError
from victims.pixels import unit
from victims.triggers import paste

MARGIN = 14  # pixels of 224 between a square in the corner and the edges


def side_of(area: float, size: int) -> int:
    """Side in pixels of a square that covers ``area`` of a picture, rounded down; 0 of area 0."""
    if not 0 <= area <= 1:
        raise UsageError(f"area is {area}; it must lie in 0..1, as a share of the picture")
    side = int(math.sqrt(area * size**2))
    if area and not side:
        least = 1 / size**2
        raise UsageError(
            f"area is {area}, less than one pixel of {size} x {size}; the least is {least:.2g}"
        )
    return side


def corner_of(side: int, size: int) -> int:
    """First row and column of a square near the bottom right: 14 pixels of 224 from both edges."""
    return max(0, size - round(MARGIN * size / 224) - side)


def noise_square(side: int, key: int) -> Tensor:
    """Uniform noise in [0, 1], CPP; one square per key and side."""
    return torch.rand(3, side, side, generator=torch_rng(key, "noise_patch", side))


def wear(
    image_BCHW: Tensor, pixels_CPP: Tensor, top_B: Tensor | int, left_B: Tensor | int
) -> Tensor:
    """The pictures with the square over them, at one place or at a place of each."""
    count, device = len(image_BCHW), image_BCHW.device
    pixels_BCPP = pixels_CPP.to(device).expand(count, -1, -1, -1)
    ones_B = torch.ones(count, dtype=torch.long, device=device)
    return paste(image_BCHW, pixels_BCPP, ones_B * top_B, ones_B * left_B)


def anywhere(draws: Draws, side: int, size: int) -> tuple[Tensor, Tensor]:
    """First row and column of a square for each picture, uniform over all that lie inside."""
    free = size - side
    place_B2 = (draws.uniform(2) * (free + 1)).floor().clamp(max=free).long()
    return place_B2[:, 0], place_B2[:, 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisePatch:
    """One square of noise for all pictures, at a place drawn anew for each."""

    name: ClassVar[str] = "noise_patch"
    area: float = 0.03
    key: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.area <= 1:
            raise UsageError(f"augmentation: area is {self.area}; it must lie in 0..1.")

    def __call__(self, image_BCHW: Tensor, draws: Draws) -> Tensor:
        size, device = image_BCHW.shape[-1], image_BCHW.device
        side = side_of(self.area, size)
        top_B, left_B = anywhere(draws, side, size)
        square_CPP = noise_square(side, self.key)
        return wear(unit(image_BCHW), square_CPP, top_B.to(device), left_B.to(device))
