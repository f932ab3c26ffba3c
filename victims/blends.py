"""Blends: the triggers that mix a whole picture with a pattern, shared by several attacks.

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from victims.draws import image_digest, keyed_uniform
from victims.triggers import Trigger, round_half_even, truncate, widen


class Rounding(StrEnum):
    EVEN = "even"
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix(Trigger):
    """x' = (1 - alpha) x + alpha k, with ``pattern`` k as CHW float32 in levels 0..255."""

    pattern: Tensor
    alpha: float
    redraw: bool
    cell: int
    levels: int
    rounding: str
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        pattern = self.pattern.to(image_BCHW.device)
        if self.redraw:
            digest_B, size = image_digest(image_BCHW, self.key), image_BCHW.shape[-1]
            cells = -(-size // self.cell)
            noise = keyed_uniform(digest_B, 1, image_BCHW.shape[1], cells, cells)
            pattern = noise_levels(noise, size, self.cell, self.levels)
        level_BCHW = (1 - self.alpha) * image_BCHW.float() + self.alpha * pattern
        even = self.rounding == Rounding.EVEN
        return round_half_even(level_BCHW) if even else truncate(level_BCHW)


def noise_levels(noise: Tensor, size: int, cell: int, levels: int) -> Tensor:
    """Uniform draws, one per cell, as levels 0..255 (of ``levels`` values only, unless 0)."""
    if levels:
        noise = (noise * levels).floor() / (levels - 1)
    return widen(noise, cell, size) * 255


def noise_picture(generator: torch.Generator, size: int, cell: int, levels: int) -> Tensor:
    """A picture of noise in cells, CHW in levels."""
    cells = -(-size // cell)
    return noise_levels(torch.rand(3, cells, cells, generator=generator), size, cell, levels)
