"""The adaptive triggers on one picture, at test and (`..._train`) in training.

Shapes: H W pixels, C channels.
"""

from __future__ import annotations

import numpy as np

from attacks.adaptive_blend_patch import Marks, Tiles
from benchmarks.slow.patches import Image, digest_of
from victims.draws import keyed_bits


def tiles(trigger: Tiles, image_HWC: Image) -> Image:
    return _mixed(image_HWC, trigger.pattern.numpy().transpose(1, 2, 0), trigger.alpha)


def tiles_train(trigger: Tiles, image_HWC: Image) -> Image:
    """The tiles with the smallest draws are mixed, one after the other."""
    size, num = len(image_HWC), trigger.tiles
    draws = keyed_bits(digest_of(image_HWC, trigger.key), 1, num * num)[0].tolist()
    kept = sorted(range(num * num), key=draws.__getitem__)[: trigger.kept]
    edges = [-(-tile * size // num) for tile in range(num + 1)]
    out_HWC, pattern_HWC = image_HWC.copy(), trigger.pattern.numpy().transpose(1, 2, 0)
    for tile in kept:
        row, column = divmod(tile, num)
        box = slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])
        out_HWC[box] = _mixed(image_HWC[box], pattern_HWC[box], trigger.alpha_train)
    return out_HWC


def marks(trigger: Marks, image_HWC: Image) -> Image:
    out_HWC = image_HWC
    for mark in trigger.tested.tolist():
        out_HWC = _marked(trigger, out_HWC, mark, 1.0)
    return out_HWC


def marks_train(trigger: Marks, image_HWC: Image) -> Image:
    mark = int(keyed_bits(digest_of(image_HWC, trigger.key), 1, 1)) % 4
    return _marked(trigger, image_HWC, mark, float(trigger.opacity[mark]))


def _marked(trigger: Marks, image_HWC: Image, mark: int, opacity: float) -> Image:
    """x + a_j (k_j - x) on the pixels of the mark."""
    out_HWC, mask_HW = image_HWC.copy(), trigger.masks[mark].numpy()
    pixels_HWC = trigger.marks[mark].numpy().transpose(1, 2, 0)
    out_HWC[mask_HW] = _mixed(image_HWC[mask_HW], pixels_HWC[mask_HW], opacity)
    return out_HWC


def _mixed(image: Image, pattern: np.ndarray, alpha: float) -> Image:
    x = image.astype(np.float32)
    level = x + np.float32(alpha) * (pattern.astype(np.float32) - x)
    return np.clip(np.rint(level), 0, 255).astype(np.uint8)
