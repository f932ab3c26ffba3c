"""Waves in chroma: coefficients added to the blockwise cosine transform of a picture's colours.

The way from bytes to a colour space and its blocks' coefficients and back is linear, so that adding
to coefficients is adding one fixed picture; in whole-number colours it is not, and is walked.

Shapes: B batch, C channels, H W pixels, S side of a picture, Q side of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from victims.blends import Rounding
from victims.errors import UsageError
from victims.triggers import Trigger, round_half_even, truncate

Positions = Sequence[tuple[int, int]]

# Rows: luma and the two chroma channels, each from red, green and blue.
YUV = ((0.299, 0.587, 0.114), (-0.147, -0.289, 0.436), (0.615, -0.515, -0.1))
# As in ITU-R 601: Cr = 0.713 (R - Y), Cb = 0.564 (B - Y), less the offset of 128.
YCRCB = (
    YUV[0],
    (0.713 * (1 - 0.299), 0.713 * -0.587, 0.713 * -0.114),
    (0.564 * -0.299, 0.564 * -0.587, 0.564 * (1 - 0.114)),
)


# --- coefficients


def check_blocks(who: str, size: int, window: int, magnitude: float, positions: Positions) -> None:
    """Raise unless blocks tile the picture and have the coefficients."""
    if magnitude < 0:
        raise UsageError(f"{who}: magnitude {magnitude} must not be negative")
    if not positions or len(set(positions)) < len(positions):
        raise UsageError(f"{who}: positions {_shown(positions)} must be one or more, all different")
    if min(map(min, positions)) < 0:
        raise UsageError(f"{who}: positions {_shown(positions)} must not be negative")
    most = max(map(max, positions))
    fits = [side for side in range(most + 1, size + 1) if size % side == 0]
    if window in fits:
        return
    known = f"windows that do: {', '.join(map(str, fits))}" if fits else "no window does"
    raise UsageError(
        f"{who}: window {window} must divide {size}, the picture's side, and be larger than {most},"
        f" the last of positions {_shown(positions)}; {known}"
    )


def _shown(positions: Positions) -> str:
    return ", ".join(f"({row}, {column})" for row, column in positions) or "[]"


def cosines(window: int) -> Tensor:
    """The orthonormal DCT-II, QQ float64: row u is sqrt(2 / Q) cos((2 i + 1) u pi / (2 Q)), and
    sqrt(1 / Q) for u = 0."""
    step_Q = torch.arange(window, dtype=torch.float64)
    basis_QQ = torch.cos((2 * step_Q + 1) * step_Q[:, None] * (torch.pi / (2 * window)))
    basis_QQ *= (2 / window) ** 0.5
    basis_QQ[0] = (1 / window) ** 0.5
    return basis_QQ


def waves(size: int, window: int, magnitude: float, positions: Positions) -> Tensor:
    """What a channel gains, SS float64, when every block's coefficients at ``positions`` (of rows,
    of columns) gain ``magnitude``."""
    basis_QQ = cosines(window)
    block_QQ = torch.zeros_like(basis_QQ)
    for row, column in positions:
        block_QQ += magnitude * torch.outer(basis_QQ[row], basis_QQ[column])
    return block_QQ.repeat(size // window, size // window)


# --- colours


def gain(space: Sequence[Sequence[float]]) -> Tensor:
    """What red, green and blue gain by one level more of both chroma channels, C float64."""
    inverse_CC: Tensor = torch.linalg.inv(torch.tensor(space, dtype=torch.float64))
    return inverse_CC[:, 1] + inverse_CC[:, 2]


BITS = 14  # of the fraction, in whole-number colours


def _fixed(value: float) -> int:
    return round(value * (1 << BITS))


def _whole(scaled: Tensor) -> Tensor:
    return (scaled + (1 << BITS - 1)) >> BITS


def to_ycrcb_bytes(image_CHW: Tensor) -> Tensor:
    """Luma, Cr and Cb as bytes in whole-number arithmetic, int32 CHW."""
    r_HW, g_HW, b_HW = image_CHW.to(torch.int32)
    y_HW = _whole(_fixed(0.299) * r_HW + _fixed(0.587) * g_HW + _fixed(0.114) * b_HW)
    cr_HW = _whole((r_HW - y_HW) * _fixed(0.713)) + 128
    cb_HW = _whole((b_HW - y_HW) * _fixed(0.564)) + 128
    return torch.stack((y_HW, cr_HW, cb_HW)).clamp(0, 255)


def from_ycrcb_bytes(colour_CHW: Tensor) -> Tensor:
    """The picture, uint8, of luma, Cr and Cb in bytes."""
    y_HW, cr_HW, cb_HW = colour_CHW.to(torch.int32)
    cr_HW, cb_HW = cr_HW - 128, cb_HW - 128
    r_HW = y_HW + _whole(_fixed(1.403) * cr_HW)
    g_HW = y_HW + _whole(_fixed(-0.714) * cr_HW + _fixed(-0.344) * cb_HW)
    b_HW = y_HW + _whole(_fixed(1.773) * cb_HW)
    return torch.stack((r_HW, g_HW, b_HW)).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chroma(Trigger):
    """A crafted trigger: ``pattern``, SS float64 in levels, is what both chroma channels gain, and
    ``gain`` what one level of that adds to red, green and blue.

    Cut off instead of rounded, levels out of 0..255 wrap: those of the picture or, ``in_bytes``,
    of the chroma channels, on the way through whole-number YCrCb.
    """

    pattern: Tensor
    gain: Tensor
    rounding: str
    in_bytes: bool

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        device, out_BCHW = image_BCHW.device, torch.empty_like(image_BCHW)
        wave_SS = self.pattern.float().to(device)
        added_CSS = (self.gain[:, None, None] * self.pattern).float().to(device)
        # One picture's floats at a time: those of a batch would leave the processor's cache.
        for index, image_CHW in enumerate(image_BCHW):
            if self.in_bytes:
                colour_CHW = to_ycrcb_bytes(image_CHW)
                colour_CHW[1:] = self._bytes(colour_CHW[1:] + wave_SS)
                out_BCHW[index] = from_ycrcb_bytes(colour_CHW)
            else:
                out_BCHW[index] = self._bytes(image_CHW + added_CSS)
        return out_BCHW

    def _bytes(self, level: Tensor) -> Tensor:
        return round_half_even(level) if self.rounding == Rounding.EVEN else truncate(level)
