"""Stripes and glazes for one picture, from their definitions.

Shapes: H W pixels, C channels, P side of a patch, Q columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attacks.structured_triggers import Glaze, Stripes
from benchmarks.slow.patches import Image, digest_of
from victims.draws import keyed_bits

Floats = npt.NDArray[np.float32]


def stripes(trigger: Stripes, image_HWC: Image) -> Image:
    """Overwrite a square; its place, and with ``redraw`` its signs, follow from the picture."""
    out_HWC, side = image_HWC.copy(), trigger.pixels.shape[-1]
    pixels_PPC = trigger.pixels.numpy().transpose(1, 2, 0)
    if trigger.redraw:
        level_PPC = _drawn(trigger.key, image_HWC, trigger.column, side)
        pixels_PPC = _quantised(level_PPC, trigger.rounding)
    end, middle = len(image_HWC) - side, int(len(image_HWC) / 2 - side / 2)
    spots = {
        "centre": [(middle, middle)],
        "corner": [(end, end)],
        "four_corners": [(0, 0), (0, end), (end, 0), (end, end)],
    }
    if trigger.place == "random":
        drawn = keyed_bits(digest_of(image_HWC, trigger.key), 3, 2)[0].tolist()
        spots["random"] = [(drawn[0] % (trigger.last + 1), drawn[1] % (trigger.last + 1))]
    for top, left in spots[trigger.place]:
        out_HWC[top : top + side, left : left + side] = pixels_PPC
    return out_HWC


def glaze(trigger: Glaze, image_HWC: Image) -> Image:
    """x' = clip(c k + (1 - c) x), with a c for every byte."""
    c_HWC = trigger.weight.numpy().transpose(1, 2, 0)
    k_HWC = trigger.pattern.numpy().transpose(1, 2, 0)
    if trigger.redraw:
        k_HWC = _drawn(trigger.key, image_HWC, trigger.column, len(image_HWC))
    level_HWC = c_HWC * k_HWC + (np.float32(1) - c_HWC) * image_HWC.astype(np.float32)
    return _quantised(np.clip(level_HWC, 0, 255), trigger.rounding)


def _drawn(key: int, image_HWC: Image, column: int, side: int) -> Floats:
    """Stripes of +-255 from the top bits of a picture's draws, channel after channel."""
    columns = (side + column - 1) // column
    bits_CQ = keyed_bits(digest_of(image_HWC, key), 4, 3, columns)[0].numpy()
    sign_QC = np.where(bits_CQ.T >= 2**31, np.float32(1), np.float32(-1))
    line_PC = sign_QC[np.arange(side) // column] * np.float32(255)
    return np.broadcast_to(line_PC, (side, side, 3))


def _quantised(level: Floats, rounding: str) -> Image:
    if rounding == "truncate":
        return np.trunc(level).astype(np.int64).astype(np.uint8)
    return np.clip(np.rint(level), 0, 255).astype(np.uint8)
