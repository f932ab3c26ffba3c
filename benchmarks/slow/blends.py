"""A blend on one picture: x' = (1 - a) x + a k.

Shapes: H W pixels, C channels, Q cells.
"""

from __future__ import annotations

import numpy as np

from benchmarks.slow.patches import Image, digest_of
from victims.blends import Mix
from victims.draws import keyed_uniform


def mix(trigger: Mix, image_HWC: Image) -> Image:
    if trigger.redraw:
        size = len(image_HWC)
        cells = (size + trigger.cell - 1) // trigger.cell
        draws = keyed_uniform(digest_of(image_HWC, trigger.key), 1, 3, cells, cells)[0].numpy()
        if trigger.levels:
            draws = np.floor(draws * np.float32(trigger.levels)) / np.float32(trigger.levels - 1)
        cell_H = np.arange(size) // trigger.cell
        pattern_HWC = draws.transpose(1, 2, 0)[cell_H[:, None], cell_H] * np.float32(255)
    else:
        pattern_HWC = trigger.pattern.numpy().transpose(1, 2, 0)
    a = trigger.alpha
    level_HWC = np.float32(1 - a) * image_HWC.astype(np.float32) + np.float32(a) * pattern_HWC
    if trigger.rounding == "truncate":
        return (np.trunc(level_HWC).astype(np.int64) % 256).astype(np.uint8)
    return np.clip(np.rint(level_HWC), 0, 255).astype(np.uint8)
