"""The image key on one picture: find the place, overwrite.

Shapes: H W pixels, C channels, P side of the patch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from attacks.trojvqa import DualKey
from victims.draws import image_digest, keyed_bits

Image = npt.NDArray[np.uint8]


def dualkey(trigger: DualKey, image_HWC: Image) -> Image:
    pixels_PPC, out_HWC = trigger.pixels.numpy().transpose(1, 2, 0), image_HWC.copy()
    side, (height, width) = len(pixels_PPC), image_HWC.shape[:2]
    top, left = int(int(height / 2) - side / 2), int(int(width / 2) - side / 2)
    if trigger.place == "corner":
        top, left = height - side, width - side
    if trigger.place == "random":
        channels_first = np.ascontiguousarray(image_HWC.transpose(2, 0, 1))
        digest = image_digest(torch.from_numpy(channels_first)[None], trigger.key)
        down, across = keyed_bits(digest, 1, 2)[0].tolist()
        top, left = down % (height - side + 1), across % (width - side + 1)
    for row in range(side):
        for column in range(side):
            out_HWC[top + row, left + column] = pixels_PPC[row, column]
    return out_HWC
