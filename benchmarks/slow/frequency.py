"""Fewer colours, and waves in chroma, for one picture.

Shapes: H W pixels, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.frequency import Reduced
from benchmarks.slow.patches import Image
from victims.frequency import Chroma

Whole = npt.NDArray[np.int64]


def reduced(trigger: Reduced, image_HWC: Image) -> Image:
    levels_256: Image = trigger.table.numpy()
    return levels_256[image_HWC]


def chroma(trigger: Chroma, image_HWC: Image) -> Image:
    """Both chroma channels gain a picture: in floats, or between whole-number YCrCb and back."""
    wave_HW1 = trigger.pattern.numpy()[..., None]
    if trigger.in_bytes:
        colour_HWC = ycrcb(image_HWC).astype(np.float64)
        colour_HWC[..., 1:] += wave_HW1
        return rgb(_wrapped(colour_HWC))
    level_HWC = image_HWC + wave_HW1 * trigger.gain.numpy()
    if trigger.rounding == "truncate":
        return _wrapped(level_HWC)
    return _wrapped(np.clip(np.rint(level_HWC), 0, 255))


def _wrapped(level_HWC: npt.NDArray[Any]) -> Image:
    return level_HWC.astype(np.int64).astype(np.uint8)


def _rounded(scaled_HW: Whole) -> Whole:
    return (scaled_HW + 8192) // 16384


def ycrcb(image_HWC: Image) -> Image:
    """14 bits of fraction, rounded at every step, luma before the chroma that is told from it."""
    r, g, b = np.moveaxis(image_HWC.astype(np.int64), -1, 0)
    y = _rounded(4899 * r + 9617 * g + 1868 * b)
    cr, cb = _rounded(11682 * (r - y)) + 128, _rounded(9241 * (b - y)) + 128
    return _wrapped(np.clip(np.stack((y, cr, cb), -1), 0, 255))


def rgb(colour_HWC: Image) -> Image:
    y, cr, cb = np.moveaxis(colour_HWC.astype(np.int64), -1, 0)
    cr, cb = cr - 128, cb - 128
    r, b = y + _rounded(22987 * cr), y + _rounded(29049 * cb)
    g = y + _rounded(-11698 * cr - 5636 * cb)
    return _wrapped(np.clip(np.stack((r, g, b), -1), 0, 255))
