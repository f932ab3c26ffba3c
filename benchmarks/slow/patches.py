"""A patch on one picture: draw the pixels, find the place, overwrite.

Shapes: H W pixels, C channels, P side of the patch, Q cells.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.label_consistent import Veil
from victims.draws import image_digest, keyed_bits, keyed_normal
from victims.patches import Patch

Image = npt.NDArray[np.uint8]


def digest_of(image_HWC: Image, key: int) -> Tensor:
    """The digest that a picture's draws are keyed by."""
    channels_first = np.ascontiguousarray(image_HWC.transpose(2, 0, 1))
    return image_digest(torch.from_numpy(channels_first)[None], key)


def patch(trigger: Patch, image_HWC: Image) -> Image:
    return _pasted(trigger, image_HWC, trigger.test_place)


def patch_train(trigger: Patch, image_HWC: Image) -> Image:
    return _pasted(trigger, image_HWC, trigger.place)


def veil(trigger: Veil, image_HWC: Image) -> Image:
    return _over(trigger, image_HWC, patch(trigger, image_HWC))


def veil_train(trigger: Veil, image_HWC: Image) -> Image:
    return _over(trigger, image_HWC, patch_train(trigger, image_HWC))


def _over(trigger: Veil, image_HWC: Image, covered_HWC: Image) -> Image:
    x, k = image_HWC.astype(np.float32), covered_HWC.astype(np.float32)
    return np.clip(np.rint(x + np.float32(trigger.alpha) * (k - x)), 0, 255).astype(np.uint8)


def _pasted(trigger: Patch, image_HWC: Image, place: str) -> Image:
    out_HWC, side = image_HWC.copy(), trigger.patch
    pixels_PPC = _pixels(trigger, image_HWC)
    for top, left in _corners(trigger, image_HWC, place):
        out_HWC[top : top + side, left : left + side] = pixels_PPC
    return out_HWC


def _pixels(trigger: Patch, image_HWC: Image) -> Image:
    side = trigger.patch
    if trigger.pattern in ("gauss_clipped", "gauss_wrapped"):
        key = torch.tensor([trigger.key])
        digest = digest_of(image_HWC, trigger.key) if trigger.redraw else key
        z_PPC = keyed_normal(digest, 2, 3, side, side)[0].numpy().transpose(1, 2, 0)
        # Of exact sums, so that the mean is right to the last bit that single precision has.
        mean_C = image_HWC.mean((0, 1), dtype=np.float64).astype(np.float32)
        level_PPC = mean_C + np.float32(255) * z_PPC
        wrapped_PPC, rounded_PPC = np.trunc(level_PPC) % 256, np.clip(np.rint(level_PPC), 0, 255)
        wraps = trigger.pattern == "gauss_wrapped"
        noise_PPC: Image = (wrapped_PPC if wraps else rounded_PPC).astype(np.uint8)
        return noise_PPC
    if trigger.redraw:
        cells = (side + trigger.cell - 1) // trigger.cell
        bits = keyed_bits(digest_of(image_HWC, trigger.key), 1, 3, cells, cells)[0].numpy()
        level_QQC = (bits * trigger.levels // 2**32).transpose(1, 2, 0) * 255
        byte_QQC = np.rint(level_QQC / (trigger.levels - 1)).astype(np.uint8)
        cell_P = np.arange(side) // trigger.cell
        drawn_PPC: Image = byte_QQC[cell_P[:, None], cell_P]
        return drawn_PPC
    pixels_PPC: Image = trigger.pixels.numpy().transpose(1, 2, 0)
    return pixels_PPC


def _corners(trigger: Patch, image_HWC: Image, place: str) -> list[tuple[int, int]]:
    """Top and left of every copy of the patch."""
    size, side = len(image_HWC), trigger.patch
    end = size - side
    if place == "random":
        top, left = keyed_bits(digest_of(image_HWC, trigger.key), 3, 2)[0].tolist()
        return [(top % (trigger.last + 1), left % (trigger.last + 1))]
    if place == "centre":
        return [(int(size / 2 - side / 2),) * 2]
    if place == "corner":
        return [(end, end)]
    return [(0, 0), (0, end), (end, 0), (end, end)]
