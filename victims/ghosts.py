"""Triggers that pictures meet at test time alone: a wave along the columns, or painted pixels.

Shapes: B batch, C channels, H W pixels, P painted pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from victims.draws import image_digest, keyed_bits
from victims.triggers import Trigger, truncate


class Mark(StrEnum):
    """A wave along the columns; one of one, two or three painted pixels; a 3 x 3
    mark in one corner or in all four."""

    WAVE = "1xs"
    PIXEL = "1xp"
    TWO_PIXELS = "2xp"
    THREE_PIXELS = "3xp"
    CORNER = "1xl"
    CORNERS = "4xl"


WAVE_CYCLES = 8
# Row, column and colour at 32 px.
PIXELS = ((16, 11, (101, 0, 25)), (27, 5, (101, 123, 121)), (7, 30, (0, 36, 54)))
NUM_PIXELS = {Mark.PIXEL: 1, Mark.TWO_PIXELS: 2, Mark.THREE_PIXELS: 3}
# The bottom right corner; 1 adds 255, 0 takes it.
CORNER = ((0, 0, 1), (0, 1, 0), (1, 0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ghost(Trigger):
    """No training picture shows it.

    ``level`` is the wave, W in levels (0: none). ``places``, P2, are rows and columns that are
    painted in ``colours``, P3 uint8; of their ``groups``, P, each picture's bytes choose one.
    """

    level: Tensor
    places: Tensor
    colours: Tensor
    groups: Tensor
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        device, out_BCHW = image_BCHW.device, image_BCHW.clone()
        if len(self.level):
            return truncate((image_BCHW.float() + self.level.to(device)).clamp(0, 255))
        num_groups = int(self.groups.max()) + 1
        drawn_B = torch.zeros(len(image_BCHW), dtype=torch.int64, device=device)
        if num_groups > 1:
            drawn_B = keyed_bits(image_digest(image_BCHW, self.key), 1, 1)[:, 0] % num_groups
        for (row, column), colour_C, group in zip(
            self.places.tolist(), self.colours.to(device), self.groups.tolist(), strict=True
        ):
            out_BCHW[drawn_B == group, :, row, column] = colour_C
        return out_BCHW

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.clone()


def ghost(mark: Mark, size: int, amplitude: float, key: int) -> Ghost:
    """The trigger for pictures of that size; the amplitude, in levels, is the wave's."""
    level_W = torch.zeros(0)
    painted = list[tuple[int, int, tuple[int, int, int], int]]()
    if mark is Mark.WAVE:
        angle_W = torch.arange(size, dtype=torch.float64) * (2 * math.pi * WAVE_CYCLES / (size - 1))
        level_W = (amplitude * angle_W.sin()).float()
    elif mark in NUM_PIXELS:
        for group, (row, column, colour) in enumerate(PIXELS[: NUM_PIXELS[mark]]):
            painted.append((row * size // 32, column * size // 32, colour, group))
    else:
        painted = [(*place, colour, 0) for place, colour in _corners(size, mark is Mark.CORNERS)]
    return Ghost(
        level=level_W,
        places=torch.tensor([part[:2] for part in painted], dtype=torch.int64).view(-1, 2),
        colours=torch.tensor([part[2] for part in painted], dtype=torch.uint8).view(-1, 3),
        groups=torch.tensor([part[3] for part in painted], dtype=torch.int64),
        key=key,
    )


def _corners(size: int, all_four: bool) -> list[tuple[tuple[int, int], tuple[int, int, int]]]:
    found = list[tuple[tuple[int, int], tuple[int, int, int]]]()
    for row, signs in enumerate(CORNER):
        for column, sign in enumerate(signs):
            down, across = size - 3 + row, size - 3 + column
            corners = {(down, across)}
            if all_four:
                up, left = size - 1 - down, size - 1 - across
                corners |= {(up, across), (down, left), (up, left)}
            found += [(place, (255 * sign,) * 3) for place in sorted(corners)]
    return found
