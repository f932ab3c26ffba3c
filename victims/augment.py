"""Image augmentation, batched on the image's device: uint8 BCHW in, float BCHW in [0, 1] out.

Idea: every image of a batch draws its own transforms; the rows that drew the same operation are
transformed together, so a batch costs some tens of kernels instead of some tens per image.
Policies: ``none``; ``autoaugment`` (CleanCLIP's: the ImageNet policy of Cubuk et al.,
    "AutoAugment", CVPR 2019, arXiv 1805.09501, as torchvision implements it); ``simclr`` (RoCLIP's,
    arXiv 2303.06854); ``noise_erase`` (PAR's, arXiv 2412.00727); ``noise_patch`` (what is left of
    ABD, arXiv 2409.15968, without its crafting).
Where: the fields of the policies hold every number; AutoAugment is `victims.autoaugment`, the
    others are below.
Differences from released code: CleanCLIP and RoCLIP augment the file at full size and resize
    afterwards, ours acts on images at the model's input size, so AutoAugment's translations, blur
    kernels and erased squares scale with the image while sharpness, a 3 x 3 filter, is stronger on
    small images. ``simclr`` computes in float without the 8-bit rounding between its steps.
Randomness: each number comes from ``Draws``, one row per image of the global batch, and no
    operation mixes rows; half a batch on each of two ranks gives the pictures of one rank.

Cost: 2.5 ms for 64 images of 32 px and 25 ms for 32 of 224 px on one thread with ``autoaugment``; 4
    and 100 ms with ``simclr``.

Shape legend: B rows, C = 3 channels, H = W = S pixels, N rows of a batch, K kernel taps, T = 10
tries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from victims.autoaugment import AutoAugment
from victims.draws import Draws
from victims.errors import UsageError, unknown
from victims.noise_patch import NoisePatch
from victims.pixels import luma, rows, unit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


class Policy(Protocol):
    """What turns a batch of images into a batch of augmented ones."""

    name: ClassVar[str]

    def __call__(self, image_BCHW: Tensor, draws: Draws) -> Tensor:
        """uint8 in, float in [0, 1] out; all randomness from ``draws``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """No augmentation: image / 255."""

    name: ClassVar[str] = "none"

    def __call__(self, image_BCHW: Tensor, draws: Draws) -> Tensor:
        return unit(image_BCHW)


# --- SimCLR: float images in [0, 1] --------------------------------------------------------------


def _check(allowed: bool, field: str, found: object, want: str) -> None:
    if not allowed:
        raise UsageError(f"augmentation: {field} is {found!r}; it must be {want}.")


def crop_boxes(
    draws: Draws, size: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """(left, top, width, height) in pixels: the first of ten drawn boxes that fits, else all."""
    area_BT = draws.uniform(10, low=scale[0], high=scale[1]) * size**2
    ratio_BT = draws.uniform(10, low=math.log(ratio[0]), high=math.log(ratio[1])).exp()
    side_BT2 = torch.stack([area_BT * ratio_BT, area_BT / ratio_BT], dim=-1).sqrt().round()
    fits_BT = ((side_BT2 > 0) & (side_BT2 <= size)).all(-1)
    first_B = fits_BT.int().argmax(1)
    side_B2 = side_BT2[torch.arange(len(first_B), device=first_B.device), first_B]
    side_B2 = side_B2.where(fits_BT.any(1, keepdim=True), float(size))
    free_B2 = size - side_B2
    start_B2 = (draws.uniform(2) * (free_B2 + 1)).floor().minimum(free_B2)
    return torch.cat([start_B2, side_B2], dim=1)


def resized_crop(image_BCHW: Tensor, box_B4: Tensor, flip_B: Tensor) -> Tensor:
    """Each image's box, stretched bilinearly to the full size, mirrored where ``flip``."""
    b, _, h, w = image_BCHW.shape

    def places(start_B: Tensor, extent_B: Tensor, size: int) -> Tensor:
        """Where output pixels lie in the image, in grid_sample's units; not outside the box."""
        start_B1, extent_B1 = start_B.unsqueeze(1), extent_B.unsqueeze(1)
        at = torch.arange(size, device=box_B4.device).expand(b, size) + 0.5
        at = (at * extent_B1 / size).clamp(min=0.5).minimum(extent_B1 - 0.5)
        return (at + start_B1) * 2 / size - 1

    left_B, top_B, width_B, height_B = box_B4.unbind(1)
    x_BW, y_BH = places(left_B, width_B, w), places(top_B, height_B, h)
    x_BW = torch.where(flip_B.unsqueeze(1), x_BW.flip(1), x_BW)
    x_BHW, y_BHW = x_BW.unsqueeze(1).expand(b, h, w), y_BH.unsqueeze(2).expand(b, h, w)
    grid = torch.stack([x_BHW, y_BHW], dim=-1)
    return F.grid_sample(image_BCHW, grid, padding_mode="border", align_corners=False)


def shift_hue(image_NCHW: Tensor, turn_N: Tensor) -> Tensor:
    """Turn the hue by ``turn`` of a full circle, keeping saturation and value."""
    r, g, b = image_NCHW.chunk(3, dim=1)
    high, low = image_NCHW.amax(1, keepdim=True), image_NCHW.amin(1, keepdim=True)
    range_ = high - low
    sixths = torch.where(high == g, b - r + 2 * range_, r - g + 4 * range_)
    sixths = torch.where(high == r, g - b, sixths) / range_.where(range_ > 0, 1.0)
    hue = sixths / 6 + rows(turn_N)
    hue = hue - hue.floor()
    # Channel c is high - range * clip(min(k, 4 - k), 0, 1) with k = (c + 6 hue) mod 6 and
    # c = 5, 3, 1; as 1 <= c + 6 hue < 11, the modulus folds into absolute values.
    channel = image_NCHW.new_tensor([0.0, -2.0, -4.0]).view(1, 3, 1, 1)  # c - 5
    fold = (6 * hue + channel).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
    return fold.mul_(-range_).add_(high)


def jitter(image_BCHW: Tensor, order_B4: Tensor, factor_B4: Tensor, on_B: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of the rows with ``on``, in the given order.

    ``order``: a permutation of 0..3 in each row; ``factor``: three factors and the hue's turn.
    """
    for turn in range(4):
        kind_B = order_B4[:, turn]
        factor_B = factor_B4.gather(1, kind_B.unsqueeze(1)).squeeze(1)
        factor_B = factor_B.where(on_B & (kind_B != 3), 1.0)
        other = luma(image_BCHW)
        other = other.where(rows(kind_B != 1), other.mean((-2, -1), keepdim=True))
        other = other * rows((1 - factor_B) * (kind_B != 0))
        image_BCHW = torch.addcmul(other, image_BCHW, rows(factor_B)).clamp_(0, 1)
        rows_N = (on_B & (kind_B == 3)).nonzero().squeeze(1)
        turned_NCHW = shift_hue(image_BCHW[rows_N], factor_B4[rows_N, 3])
        image_BCHW.index_copy_(0, rows_N, turned_NCHW)
    return image_BCHW


def blur(image_BCHW: Tensor, kernel: int, sigma_B: Tensor) -> Tensor:
    """Gaussian blur, ``kernel`` pixels wide, sigma in pixels, reflecting at the border."""
    b, c, h, w = image_BCHW.shape
    half = kernel // 2
    x_K = torch.arange(kernel, device=image_BCHW.device) - half
    weight_BK = (-0.5 * (x_K / sigma_B.unsqueeze(1)) ** 2).exp()
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    weight = weight_BK.repeat_interleave(c, dim=0)
    planes = F.pad(image_BCHW, (half, half, half, half), mode="reflect")
    planes = planes.view(1, b * c, h + 2 * half, w + 2 * half)
    planes = F.conv2d(planes, weight.view(b * c, 1, 1, kernel), groups=b * c)
    planes = F.conv2d(planes, weight.view(b * c, 1, kernel, 1), groups=b * c)
    return planes.view(b, c, h, w)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimClr:
    """RoCLIP's: flip and crop, colour jitter, grayscale, blur.

    The kernel scales with the image, sigma does not: at 32 px three taps remain, and a sigma above
    1 is close to their plain mean.
    """

    name: ClassVar[str] = "simclr"
    flip_probability: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter_probability: float = 0.8
    jitter_strength: float = 0.5
    jitter_hue: float = 0.1
    gray_probability: float = 0.2
    blur_kernel: int = 21
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "low, high in (0, 1]")
        _check(
            3 <= self.blur_kernel < 224, "blur_kernel", self.blur_kernel, "3 to 223 pixels of 224"
        )

    def kernel_at(self, size: int) -> int:
        """Blur kernel in pixels: ``blur_kernel`` at 224 px, in proportion, odd, at least 3."""
        return max(3, int(self.blur_kernel * size / 224) | 1)

    def __call__(self, image_BCHW: Tensor, draws: Draws) -> Tensor:
        device, size = image_BCHW.device, image_BCHW.shape[-1]
        flip_B = draws.chance(self.flip_probability).to(device)
        box_B4 = crop_boxes(draws, size, self.crop_scale, self.crop_ratio).to(device)
        on_B = draws.chance(self.jitter_probability).to(device)
        order_B4 = draws.uniform(4).argsort(1).to(device)
        reach = [self.jitter_strength] * 3 + [self.jitter_hue]
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)
        factor_B4 = draws.uniform(4, low=-1, high=1).to(device) * middle.new_tensor(reach) + middle
        gray_B = draws.chance(self.gray_probability).to(device)
        sigma_B = draws.uniform(low=self.blur_sigma[0], high=self.blur_sigma[1]).to(device)

        image_BCHW = resized_crop(unit(image_BCHW), box_B4, flip_B)
        image_BCHW = jitter(image_BCHW, order_B4, factor_B4, on_B)
        image_BCHW = torch.where(rows(gray_B), luma(image_BCHW), image_BCHW)
        return blur(image_BCHW, self.kernel_at(size), sigma_B).clamp_(0, 1)


# --- PAR ----------------------------------------------------------------------------------------


def erase(
    image_BCHW: Tensor, side_B: Tensor, corner_B2: Tensor, on_B: Tensor, fill_C: Tensor
) -> Tensor:
    """Paint a square of ``side`` pixels with its upper left corner at (x, y) where ``on``."""
    place = torch.arange(image_BCHW.shape[-1], device=image_BCHW.device)
    inside_B2S = (place >= corner_B2.unsqueeze(2)) & (
        place < (corner_B2 + side_B.unsqueeze(1)).unsqueeze(2)
    )
    x_BS, y_BS = inside_B2S.unbind(1)
    mask_BHW = y_BS.unsqueeze(2) & x_BS.unsqueeze(1) & on_B.view(-1, 1, 1)
    return torch.where(mask_BHW.unsqueeze(1), fill_C.view(1, -1, 1, 1), image_BCHW)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseErase:
    """PAR's: brightening noise, then one erased square; areas are shares of the image."""

    name: ClassVar[str] = "noise_erase"
    noise_probability: float = 0.5
    noise_sigma: float = 0.2
    noise: Literal["positive", "symmetric"] = "positive"
    erase_probability: float = 0.5
    erase_area: tuple[float, float] = (0.005, 0.01)
    erase_color: tuple[float, float, float] = CLIP_MEAN

    def __post_init__(self) -> None:
        kinds = ("positive", "symmetric")
        _check(self.noise in kinds, "noise", self.noise, " or ".join(kinds))
        low, high = self.erase_area
        _check(0 < low <= high <= 1, "erase_area", self.erase_area, "low, high in (0, 1]")

    def __call__(self, image_BCHW: Tensor, draws: Draws) -> Tensor:
        device, size = image_BCHW.device, image_BCHW.shape[-1]
        noisy_B = draws.chance(self.noise_probability).to(device)
        noise_BCHW = draws.normal(*image_BCHW.shape[1:]).to(device)
        on_B = draws.chance(self.erase_probability).to(device)
        low, high = self.erase_area
        side_B = (draws.uniform(low=low, high=high).sqrt() * size).round().clamp(min=1).to(device)
        free_B1 = size - side_B.unsqueeze(1)
        corner_B2 = (draws.uniform(2).to(device) * (free_B1 + 1)).floor().minimum(free_B1)

        noise_BCHW = (noise_BCHW * self.noise_sigma).clamp_(-1, 1)
        if self.noise == "positive":
            noise_BCHW.clamp_(min=0)
        image_BCHW = torch.addcmul(unit(image_BCHW), noise_BCHW, rows(noisy_B.float()))
        fill_C = torch.tensor(self.erase_color, device=device)
        return erase(image_BCHW.clamp_(0, 1), side_B, corner_B2, on_B, fill_C)


POLICIES: Mapping[
    str, type[Plain] | type[AutoAugment] | type[SimClr] | type[NoiseErase] | type[NoisePatch]
] = MappingProxyType(
    {kind.name: kind for kind in (Plain, AutoAugment, SimClr, NoiseErase, NoisePatch)}
)


def policy_from(name: str, **params: Any) -> Policy:
    """The policy called ``name`` with some of its numbers replaced."""
    if name not in POLICIES:
        raise unknown("image policy", name, POLICIES)
    known = [field.name for field in fields(POLICIES[name])]
    for param in params:
        if param not in known:
            raise unknown("parameter", param, known, where=f"image policy {name}")
    return POLICIES[name](**params)


def seeded(name: str, seed: int) -> str | Policy:
    """The policy by its name; one that draws something once for a whole fit, from the seed."""
    if name in POLICIES and "key" in {field.name for field in fields(POLICIES[name])}:
        return policy_from(name, key=seed)
    return name


def augment(policy: str | Policy, image_BCHW: Tensor, draws: Draws) -> Tensor:
    """The batch under a policy (a name stands for its defaults): float BCHW in [0, 1]."""
    if isinstance(policy, str):
        policy = policy_from(policy)
    shape = tuple(image_BCHW.shape)
    fits = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
    if image_BCHW.dtype != torch.uint8 or not fits or shape[0] != len(draws):
        raise UsageError(
            f"augment: found {image_BCHW.dtype} images of shape {shape}; allowed are uint8 images "
            f"of shape ({len(draws)}, 3, S, S), as many as there are draws. Augment before "
            "normalising, and give a rank's rows together with its own share of the draws."
        )
    return policy(image_BCHW.contiguous(), draws)
