"""How much of a wave along the columns each picture holds already.

Shapes: N pictures, C channels, H W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from victims.frequency import YUV

Floats = npt.NDArray[np.float64]

READ = 256  # pictures at a time
# Of the content, in levels: sums of floats differ in the last bits from one machine to the next,
# and pictures that hold the same would else be ranked by these.
DECIMALS = 9


def unit_wave(size: int, cycles: int) -> Floats:
    """sin(2 pi f j / W) for the columns j = 0..W-1."""
    wave_W: Floats = np.sin(2 * math.pi * cycles * np.arange(size) / size)
    return wave_W


def wave_content(images_NCHW: npt.NDArray[Any], wave_W: Floats) -> Floats:
    """c(x) = 2 / (H W) sum of Y(x) times the wave, N: its amplitude in the luma, in levels."""
    height, width = images_NCHW.shape[-2:]
    weight_C = np.asarray(YUV[0])
    parts = [np.zeros(0)]
    for start in range(0, len(images_NCHW), READ):
        # Exact for bytes, in whatever order they are summed.
        column_NCW = images_NCHW[start : start + READ].sum(2, dtype=np.float64)
        luma_NW = (column_NCW * weight_C[:, None]).sum(1)
        parts.append((luma_NW * wave_W).sum(1) * 2 / (height * width))
    return np.concatenate(parts).round(DECIMALS)
