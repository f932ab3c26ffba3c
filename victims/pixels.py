"""Small steps that the augmentations share.

Shape legend: B or N rows, C = 3 channels, H, W pixels.
"""

from __future__ import annotations

from torch import Tensor


def unit(image_BCHW: Tensor) -> Tensor:
    """8-bit values as float in [0, 1]."""
    return image_BCHW.float().div_(255)


def luma(image_NCHW: Tensor) -> Tensor:
    """ITU-R 601 luma in the image's own scale; torchvision's weights and order of sums."""
    r, g, b = image_NCHW.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def rows(value_N: Tensor) -> Tensor:
    """One value per row, in a shape that meets BCHW."""
    return value_N.view(-1, 1, 1, 1)
