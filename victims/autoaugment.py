"""AutoAugment's ImageNet policy, batched on the images' device, with torchvision's pixels.

Idea: every image draws one of 25 pairs of operations; the rows that drew the same operation are
transformed together.
Reference: Cubuk et al., "AutoAugment", CVPR 2019, arXiv 1805.09501, as torchvision implements it.
Where: ``IMAGENET`` is the table of pairs, ``OPS`` are the operations on uint8 rows, with
    torchvision's value semantics for 8-bit tensors (rounding included, nearest, fill 0), and
    ``magnitudes`` (float64, as in torchvision) what each level means to them.

Shape legend: B rows, C = 3 channels, H = W pixels, N rows that drew one operation, K = 25
sub-policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from victims.draws import Draws
from victims.pixels import luma, rows, unit


def _blend(image_NCHW: Tensor, other: Tensor, magnitude_N: Tensor) -> Tensor:
    """(1 + magnitude) image - magnitude other, cut off to 8 bits."""
    ratio_N = 1.0 + magnitude_N  # in float64, then rounded once: the bits of torchvision's scalars
    mixed = rows(ratio_N.float()) * image_NCHW + rows((1.0 - ratio_N).float()) * other
    return mixed.clamp_(0, 255).to(torch.uint8)


def _affine(image_NCHW: Tensor, theta_N23: Tensor) -> Tensor:
    """Sample output pixel (x, y), counted from the centre, at theta (x, y, 1): nearest, fill 0."""
    h, w = image_NCHW.shape[-2:]
    half_2 = theta_N23.new_tensor([0.5 * w, 0.5 * h], dtype=torch.float32)
    x, y, one = (theta_N23.float() / half_2.view(2, 1)).view(-1, 1, 1, 2, 3).unbind(-1)
    x_W1 = (torch.arange(w, device=image_NCHW.device) - (w - 1) * 0.5).unsqueeze(1)
    y_H11 = (torch.arange(h, device=image_NCHW.device) - (h - 1) * 0.5).view(h, 1, 1)
    # Not a matrix product: its precision is a global setting, and its bits may depend on N.
    grid = x * x_W1 + y * y_H11 + one
    moved = F.grid_sample(image_NCHW.float(), grid, mode="nearest", align_corners=False)
    return moved.to(torch.uint8)


def _theta(magnitude_N: Tensor, entries: Mapping[tuple[int, int], Tensor]) -> Tensor:
    theta_N23 = torch.eye(2, 3, dtype=torch.float64, device=magnitude_N.device)
    theta_N23 = theta_N23.repeat(len(magnitude_N), 1, 1)
    for (row, column), value_N in entries.items():
        theta_N23[:, row, column] = value_N
    return theta_N23


def shear_x(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """x' = x + magnitude y, about the upper left corner."""
    half = 0.5 * image_NCHW.shape[-2]
    entries = {(0, 1): magnitude_N, (0, 2): magnitude_N * half}
    return _affine(image_NCHW, _theta(magnitude_N, entries))


def shear_y(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """y' = y + magnitude x, about the upper left corner."""
    half = 0.5 * image_NCHW.shape[-1]
    entries = {(1, 0): magnitude_N, (1, 2): magnitude_N * half}
    return _affine(image_NCHW, _theta(magnitude_N, entries))


def translate_x(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Move right by whole pixels (cut off towards 0)."""
    return _affine(image_NCHW, _theta(magnitude_N, {(0, 2): -magnitude_N.trunc()}))


def translate_y(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Move down by whole pixels (cut off towards 0)."""
    return _affine(image_NCHW, _theta(magnitude_N, {(1, 2): -magnitude_N.trunc()}))


def rotate(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Turn counter-clockwise by ``magnitude`` degrees about the centre."""
    angle_N = torch.deg2rad(-magnitude_N)
    cos_N, sin_N = angle_N.cos(), angle_N.sin()
    entries = {(0, 0): cos_N, (0, 1): sin_N, (1, 0): -sin_N, (1, 1): cos_N}
    return _affine(image_NCHW, _theta(magnitude_N, entries))


def brightness(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(image_NCHW, torch.zeros_like(image_NCHW), magnitude_N)


def color(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Blend with the image's own gray version."""
    return _blend(image_NCHW, luma(image_NCHW).to(torch.uint8), magnitude_N)


def contrast(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Blend with the mean of the gray version."""
    # Sums of 8-bit values are whole numbers and exact in float32 up to 256 x 256 pixels.
    gray = luma(image_NCHW).to(torch.uint8).float()
    return _blend(image_NCHW, gray.mean((-3, -2, -1), keepdim=True), magnitude_N)


def sharpness(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Blend with a 3 x 3 smoothing (centre weight 5 of 13); the border is left alone."""
    image = image_NCHW.short()  # at most 13 * 255
    middle = image[..., 1:-1, 1:-1]
    box = image[..., :-2, :] + image[..., 1:-1, :] + image[..., 2:, :]
    box = box[..., :-2] + box[..., 1:-1] + box[..., 2:] + 4 * middle
    smooth = image_NCHW.clone()
    smooth[..., 1:-1, 1:-1] = (box.float() / 13).round_().to(torch.uint8)
    return _blend(image_NCHW, smooth, magnitude_N)


def posterize(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Keep the ``magnitude`` highest bits of each value."""
    mask_N = 256 - 2 ** (8 - magnitude_N.long())
    return image_NCHW & rows(mask_N.to(torch.uint8))


def solarize(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Invert the values at or above ``magnitude``."""
    return torch.where(image_NCHW >= rows(magnitude_N.float()), 255 - image_NCHW, image_NCHW)


def autocontrast(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel stays."""
    # Imported here: it takes as long as torch itself, and planning a grid needs neither function.
    from torchvision.transforms.v2 import functional as F2

    stretched: Tensor = F2.autocontrast(image_NCHW)
    return stretched


def equalize(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """Flatten the histogram of each channel."""
    from torchvision.transforms.v2 import functional as F2

    flattened: Tensor = F2.equalize(image_NCHW)
    return flattened


def invert(image_NCHW: Tensor, magnitude_N: Tensor) -> Tensor:
    """255 - value."""
    return 255 - image_NCHW


OPS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "ShearX": shear_x,
        "ShearY": shear_y,
        "TranslateX": translate_x,
        "TranslateY": translate_y,
        "Rotate": rotate,
        "Brightness": brightness,
        "Color": color,
        "Contrast": contrast,
        "Sharpness": sharpness,
        "Posterize": posterize,
        "Solarize": solarize,
        "AutoContrast": autocontrast,
        "Equalize": equalize,
        "Invert": invert,
    }
)
SIGNED = frozenset(list(OPS)[:9])  # magnitudes that change sign with probability 1/2
NUM_LEVELS = 10

Step = tuple[str, float, int]  # operation, probability, level 0..9

IMAGENET: tuple[tuple[Step, Step], ...] = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)


@lru_cache
def magnitudes(size: int) -> Tensor:
    """float64 magnitude of every operation (rows as in ``OPS``) and level, for ``size`` pixels."""
    top = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0}
    top |= {"TranslateX": 150 / 331 * size, "TranslateY": 150 / 331 * size}
    table = {name: torch.linspace(0, top.get(name, 0.9), NUM_LEVELS) for name in SIGNED}
    table["Solarize"] = torch.linspace(255, 0, NUM_LEVELS)
    table["Posterize"] = 8 - (torch.arange(NUM_LEVELS) * 4 / (NUM_LEVELS - 1)).round()
    return torch.stack([table.get(name, torch.zeros(NUM_LEVELS)).double() for name in OPS])


class Steps(NamedTuple):
    """What AutoAugment does to each image, on the CPU: two rows of ``OPS`` (-1: nothing)."""

    op_B2: Tensor
    magnitude_B2: Tensor


def _column(pick: Callable[[Step], float]) -> Tensor:
    return torch.tensor([[pick(step) for step in pair] for pair in IMAGENET])


_NAMES = list(OPS)
_OP_K2 = _column(lambda step: _NAMES.index(step[0]))
_PROBABILITY_K2 = _column(lambda step: step[1])
_LEVEL_K2 = _column(lambda step: step[2])
_SIGNED_K2 = _column(lambda step: step[0] in SIGNED)


def draw_steps(draws: Draws, size: int) -> Steps:
    """One of the 25 sub-policies per image, its two operations done or not, and their signs."""
    policy_B = draws.integers(len(IMAGENET)).cpu()
    done_B2 = draws.uniform(2).cpu() < _PROBABILITY_K2[policy_B]
    negative_B2 = (draws.integers(2, 2).cpu() == 0) & _SIGNED_K2[policy_B]
    op_B2 = _OP_K2[policy_B]
    magnitude_B2 = magnitudes(size)[op_B2, _LEVEL_K2[policy_B]]
    return Steps(op_B2.where(done_B2, -1), magnitude_B2.where(~negative_B2, -magnitude_B2))


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoAugment:
    """CleanCLIP's: a drawn pair of operations per image."""

    name: ClassVar[str] = "autoaugment"

    def __call__(self, image_BCHW: Tensor, draws: Draws) -> Tensor:
        device = image_BCHW.device
        steps = draw_steps(draws, image_BCHW.shape[-1])
        magnitude_B2 = steps.magnitude_B2.to(device)
        image_BCHW = image_BCHW.clone()
        for turn in (0, 1):
            op_B = steps.op_B2[:, turn]
            for index in sorted(set(op_B.tolist()) - {-1}):
                rows_N = (op_B == index).nonzero().squeeze(1).to(device)
                op = OPS[_NAMES[index]]
                changed_NCHW = op(image_BCHW[rows_N], magnitude_B2[rows_N, turn])
                image_BCHW.index_copy_(0, rows_N, changed_NCHW)
        return unit(image_BCHW)
