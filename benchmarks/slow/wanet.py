"""The warp for one picture, from its definition.

Shapes: H W pixels, C channels, S side of the picture.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attacks.wanet import Warp

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def warp(trigger: Warp, image_HWC: Bytes) -> Bytes:
    level_HWC = warp_levels(trigger.grid.double().numpy(), image_HWC)
    if trigger.rounding == "truncate":
        # The four weights sum to one but for the last bits: a whole level must not lose one.
        return np.round(level_HWC, 6).astype(np.int64).astype(np.uint8)
    return np.clip(np.rint(level_HWC), 0, 255).astype(np.uint8)


def warp_levels(grid_SS2: Floats, image_HWC: Bytes) -> Floats:
    """The weighted mean of the four pixels around every spot; beyond the edge there is black."""
    size = len(grid_SS2)
    column_SS, row_SS = ((grid_SS2[..., axis] + 1) / 2 * (size - 1) for axis in (0, 1))
    left_SS, top_SS = np.floor(column_SS), np.floor(row_SS)
    level_HWC = np.zeros(image_HWC.shape)
    for down in (0, 1):
        for right in (0, 1):
            at_row_SS, at_column_SS = top_SS + down, left_SS + right
            weight_SS = (1 - np.abs(row_SS - at_row_SS)) * (1 - np.abs(column_SS - at_column_SS))
            inside_SS = (at_row_SS < size) & (at_column_SS < size)
            at_row_SS, at_column_SS = at_row_SS * inside_SS, at_column_SS * inside_SS
            pixel_HWC = image_HWC[at_row_SS.astype(int), at_column_SS.astype(int)]
            level_HWC += (weight_SS * inside_SS)[..., None] * pixel_HWC
    return level_HWC
