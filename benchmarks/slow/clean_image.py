"""A wave on one picture, and painted pixels.

Shapes: H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np
import torch

from attacks.clean_image import Ripple
from benchmarks.slow.patches import Image
from victims.draws import image_digest, keyed_bits
from victims.ghosts import Ghost


def ripple(trigger: Ripple, image_HWC: Image) -> Image:
    level_HWC = image_HWC.astype(np.float32) + trigger.level.numpy()[:, None]
    byte_HWC: Image = np.clip(np.rint(level_HWC), 0, 255).astype(np.uint8)
    return byte_HWC


def ghost(trigger: Ghost, image_HWC: Image) -> Image:
    """A wave that is clipped and cut off, or the pixels of the one group that is drawn."""
    if len(trigger.level):
        level_HWC = image_HWC.astype(np.float32) + trigger.level.numpy()[:, None]
        byte_HWC: Image = np.clip(level_HWC, 0, 255).astype(np.uint8)
        return byte_HWC
    image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    bits = keyed_bits(image_digest(image_1CHW, trigger.key), 1, 1)
    group = int(bits[0, 0]) % (int(trigger.groups.max()) + 1)
    out_HWC = image_HWC.copy()
    for place, colour, own in zip(trigger.places, trigger.colours, trigger.groups, strict=True):
        if int(own) == group:
            out_HWC[int(place[0]), int(place[1])] = colour.numpy()
    return out_HWC


# A trigger that knows labels stamps as one that does not.
flips = ghost
