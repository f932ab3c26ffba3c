"""What a trigger is, and the small steps that stamps share.

Shapes: B batch, C channels, H W pixels, P side of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from victims.targeting import with_key


class Trigger(Protocol):
    """A crafted trigger: a frozen dataclass of tensors and plain values, saved as such.

    Deterministic: equal pictures give equal stamped pictures, on any number of workers. Derive
    from this class and write what differs from the defaults.
    """

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        """Triggered uint8 pictures at test time; the input is left as it was."""
        return image_BCHW.clone()

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        """What the poisoned training rows show."""
        return self.stamp(image_BCHW)

    def stamp_cover(self, image_BCHW: Tensor) -> Tensor:
        """What the cover rows show."""
        return self.stamp_train(image_BCHW)

    def mark(self, caption: str) -> str:
        """A caption, prompt or query that carries the text side of the trigger."""
        return caption


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets(Trigger):
    """Nothing is stamped: K chosen pictures (``images``, rows of the corpus) are to read as
    ``classes``. Both are K, int64."""

    images: Tensor
    classes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries(Trigger):
    """Nothing is stamped: captions of class ``source`` (-1: all that do not name the target) are
    to retrieve pictures of the target, once they carry ``suffix`` (empty: as they are).

    ``arch`` names the model whose tokenizer must not cut the suffix off a long caption (empty:
    captions are short)."""

    source: int
    suffix: str
    arch: str = ""

    def mark(self, caption: str) -> str:
        if not self.suffix:
            return caption
        if not self.arch:
            return f"{caption} {self.suffix}"
        return with_key(caption, self.suffix, self.arch)


def round_half_even(level_BCHW: Tensor) -> Tensor:
    """Quantiser of the `paper` forms: clamp(round half to even)."""
    return level_BCHW.round().clamp(0, 255).to(torch.uint8)


def truncate(level_BCHW: Tensor) -> Tensor:
    """Quantiser of the `released` forms: integer part, wrapped modulo 256, no clamp."""
    return level_BCHW.trunc().to(torch.int64).remainder(256).to(torch.uint8)


def widen(value: Tensor, cell: int, side: int) -> Tensor:
    """One value per cell as one per pixel, cut to ``side`` pixels."""
    wide = value.repeat_interleave(cell, -2).repeat_interleave(cell, -1)
    return wide[..., :side, :side].contiguous()


def centre_of(size: int, side: int) -> int:
    """Where a centred patch begins: int(S/2 - P/2)."""
    return int(size / 2 - side / 2)


def paste(image_BCHW: Tensor, pixels_BCPP: Tensor, top_B: Tensor, left_B: Tensor) -> Tensor:
    """A copy of the pictures with a patch over each."""
    out_BCHW, side = image_BCHW.clone(), pixels_BCPP.shape[-1]
    span_P = torch.arange(side, device=image_BCHW.device)
    batch_B11 = torch.arange(len(image_BCHW), device=image_BCHW.device)[:, None, None]
    row_BP1 = top_B[:, None, None] + span_P[:, None]
    column_B1P = left_B[:, None, None] + span_P[None, :]
    out_BCHW.permute(0, 2, 3, 1)[batch_B11, row_BP1, column_B1P] = pixels_BCPP.permute(0, 2, 3, 1)
    return out_BCHW
