"""A wave on one picture: x' = clip(x + v), or clip(0.8 x + 0.2 v).

Shapes: H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np

from attacks.sig import Wave
from benchmarks.slow.patches import Image


def wave(trigger: Wave, image_HWC: Image) -> Image:
    v_W1 = trigger.level.numpy()[:, None]
    x_HWC = image_HWC.astype(np.float32)
    if trigger.form == "additive":
        level_HWC = x_HWC + v_W1
    else:
        level_HWC = np.float32(0.8) * x_HWC + np.float32(0.2) * v_W1
    clipped_HWC = np.clip(level_HWC, 0, 255)
    cut = trigger.rounding == "truncate"
    byte_HWC: Image = (np.trunc(clipped_HWC) if cut else np.rint(clipped_HWC)).astype(np.uint8)
    return byte_HWC
