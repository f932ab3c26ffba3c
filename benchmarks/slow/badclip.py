"""A crafted patch on one picture: overwrite, or mix with what lies under it.

Shapes: H W pixels, C channels, P side of the patch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attacks.badclip import BadClipPatch

Image = npt.NDArray[np.uint8]


def badclippatch(trigger: BadClipPatch, image_HWC: Image) -> Image:
    pixels_PPC, out_HWC = trigger.pixels.numpy().transpose(1, 2, 0), image_HWC.copy()
    top, side, share = trigger.start, len(pixels_PPC), trigger.blend
    for row in range(side):
        under_PC = image_HWC[top + row, top : top + side].astype(np.float64)
        over_PC = pixels_PPC[row].astype(np.float64)
        mixed_PC = share * over_PC + (1 - share) * under_PC if share else over_PC
        out_HWC[top + row, top : top + side] = np.rint(mixed_PC).astype(np.uint8)
    return out_HWC
