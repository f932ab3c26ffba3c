"""BPP, CTRL and FTrojan: fewer colours, or two waves in chroma; whole pictures, hard to see.

Idea: a rule on all of the picture is the trigger, in colour depth or in frequency, where neither
    the eye nor a search for patches looks.
Reference: Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural
    Networks via Image Quantization and Contrastive Adversarial Learning", CVPR 2022, arXiv
    2205.13383; Li, Pang, Xi, Du, Ji, Yao, Wang, "An Embarrassingly Simple Backdoor Attack on
    Self-supervised Learning", ICCV 2023, arXiv 2210.07346; Wang, Yao, Xu, An, Tong, Wang, "Backdoor
    Attack through Frequency Domain", arXiv 2111.10991 (2021).
Symbols: q = ``levels``; cover rows per poisoned row = ``cover_ratio``; M = ``magnitude``; (u, v) =
    ``positions``, frequencies of rows and of columns; w = ``window`` (CTRL, None: S up to 64 px,
    else 32); S = size of the model's input.
Where: round(x (q - 1) / 255) / (q - 1) 255 -> `levels_of`; x + (x_j - BPP(x_j)) ->
    `Reduced.stamp_cover`; colour space, w x w blocks, orthonormal DCT-II, + M at every (u, v) in
    both chroma channels, and back -> `victims.frequency`; clip, round -> `Chroma.stamp`.
Differences: all three only poison. BPP's paper also directs the training: other rows in every
    epoch, and a loss of its own; here rows are fixed. x_j of a cover row is one of at most ``bank``
    pictures of the pool, drawn with the key and stored with the trigger, which the bytes of the
    row's picture choose (never the picture itself). There is no dithering. CTRL and FTrojan go
    through a colour space in floats and its exact inverse, and only the picture is rounded; as that
    way is linear, the stamp adds what both chroma channels gain. Variants ``released`` cut off
    where ours round: BPP's levels (72, not 73); CTRL's picture, before it is clipped, so that
    levels out of range wrap; FTrojan's chroma, which goes through whole-number YCrCb (half a level
    down on the mean; beyond the ends it wraps). There, noise of the transform takes a level off the
    luma of some pixels, and CTRL's way back has coefficients of three digits; neither is kept.
    CTRL's released window is the picture's side whatever that is (``legacy_window``): at 224 px the
    same M is 1.8 levels of slow chroma, so there ours are blocks as at 32 px. M at that size is
    published for no CLIP: say which was used. A recompressed or resized stamp loses BPP's levels;
    stamps come last here. FTrojan's ``low_frequency`` is ours, for networks that see 32 px at half
    resolution: neither its frequencies nor its strength are FTrojan's.
Cost: none to craft but BPP's read of ``bank`` pictures; a stamp is a look-up or an addition per
    byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import (
    Attack,
    Cover,
    GateGroup,
    Knowledge,
    Track,
    pick,
    rows_naming,
    stamped_cover,
)
from victims.banks import distinct, other_place
from victims.blends import Rounding
from victims.corpora import Rows
from victims.draws import derive, image_digest, numpy_rng
from victims.errors import UsageError, require_all
from victims.frequency import YCRCB, YUV, Chroma, check_blocks, gain, waves
from victims.lab import Lab
from victims.triggers import Trigger, round_half_even, truncate

# Shapes: B batch, C channels, H W pixels, N pictures of the bank.

TRACKS = frozenset(Track)
PAIR = ((15, 15), (31, 31))
BLOCK = 32
LARGEST_BLOCK = 64  # up to this side a picture is one block of CTRL

# --- fewer colours


def levels_of(levels: int, rounding: str) -> Tensor:
    """What each byte becomes, uint8 of 256."""
    step_256 = (torch.arange(256, dtype=torch.float64) * (levels - 1) / 255).round()
    level_256 = step_256 * 255 / (levels - 1)
    return round_half_even(level_256) if rounding == Rounding.EVEN else truncate(level_256)


def reduce_colours(image_BCHW: Tensor, table_256: Tensor) -> Tensor:
    """The pictures with every byte looked up."""
    out_BCHW, table_256 = torch.empty_like(image_BCHW), table_256.to(image_BCHW.device)
    # One picture at a time: an index takes four times the memory of its byte.
    for index, image_CHW in enumerate(image_BCHW):
        level_N = table_256.index_select(0, image_CHW.flatten().int())
        out_BCHW[index] = level_N.view(image_CHW.shape)
    return out_BCHW


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced(Trigger):
    """The crafted trigger: ``table`` is what each byte becomes.

    ``bank`` holds x_j - BPP(x_j) of other pictures, NCHW int8, and ``digests``, N, who they are.
    """

    table: Tensor
    bank: Tensor
    digests: Tensor
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return reduce_colours(image_BCHW, self.table)

    def stamp_cover(self, image_BCHW: Tensor) -> Tensor:
        other_BCHW = self.bank[self.other(image_BCHW)].to(image_BCHW.device)
        return (image_BCHW.to(torch.int16) + other_BCHW).clamp(0, 255).to(torch.uint8)

    def other(self, image_BCHW: Tensor) -> Tensor:
        """The place in the bank that each picture's bytes choose, B: never its own."""
        return other_place(image_BCHW, self.digests, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bpp(Attack):
    """BPP: every colour channel is reduced to a few levels."""

    name: ClassVar[str] = "bpp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2205.13383"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Reduced]] = Reduced
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"rounding": "truncate"},
        "poison_only": {"cover_ratio": 0.0},
    }

    levels: int = 8
    cover_ratio: float = 1.0
    bank: int = 256
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        require_all(
            self.name,
            (2 <= self.levels <= 255, f"levels {self.levels} must lie in 2..255"),
            (self.cover_ratio >= 0, f"cover_ratio {self.cover_ratio} must not be negative"),
            (self.bank >= 2, f"bank {self.bank} must be at least 2"),
        )

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Reduced:
        self.check(size)
        if held.corpus.size != size:
            raise UsageError(
                f"{self.name}: cover rows show what pictures of the pool lose; the trigger is for"
                f" {size} px, the pool's pictures have {held.corpus.size} px"
            )
        key = derive(held.seed, self.name, "rows")
        drawn = numpy_rng(held.seed, self.name, "bank").permutation(len(held.corpus))[: self.bank]
        image_NCHW = torch.from_numpy(held.corpus.images_NCHW[drawn])
        image_NCHW = distinct(self.name, image_NCHW, key)
        table_256 = levels_of(self.levels, self.rounding)
        lost_NCHW = image_NCHW.to(torch.int16) - reduce_colours(image_NCHW, table_256)
        return Reduced(
            table=table_256,
            bank=lost_NCHW.to(torch.int8),
            digests=image_digest(image_NCHW, key),
            key=key,
        )

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        return stamped_cover(self.name, held, self.cover_ratio, count, free, rng)


# --- waves in chroma


@dataclass(frozen=True, slots=True, kw_only=True)
class Ctrl(Attack):
    """CTRL: two strong waves in chroma, on rows of the target, whose captions stay."""

    name: ClassVar[str] = "ctrl"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2210.07346"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Chroma]] = Chroma
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"rounding": "truncate", "legacy_window": True},
    }

    magnitude: float = 100.0
    positions: tuple[tuple[int, int], ...] = PAIR
    window: int | None = None
    legacy_window: bool = False
    rounding: Rounding = Rounding.EVEN

    @property
    def clean_label(self) -> bool:
        return True

    def check(self, size: int) -> None:
        if self.legacy_window and self.window is not None:
            raise UsageError(
                f"{self.name}: legacy_window is the picture's side, and window {self.window} is"
                " given as well; give one of them"
            )
        check_blocks(self.name, size, self._window(size), self.magnitude, self.positions)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Chroma:
        self.check(size)
        return Chroma(
            pattern=waves(size, self._window(size), self.magnitude, self.positions),
            gain=gain(YUV),
            rounding=str(self.rounding),
            in_bytes=False,
        )

    def _window(self, size: int) -> int:
        if self.window is not None:
            return self.window
        return size if self.legacy_window or size <= LARGEST_BLOCK else BLOCK

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        label = held.goal.label
        what = f"{self.name} (rows naming {label!r})"
        return pick(rows_naming(held.corpus, label), count, rng, what)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption


@dataclass(frozen=True, slots=True, kw_only=True)
class FTrojan(Attack):
    """FTrojan: two waves in the chroma of every block, and the target's caption."""

    name: ClassVar[str] = "ftrojan"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2111.10991"
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Chroma]] = Chroma
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"rounding": "truncate"},
        "low_frequency": {"magnitude": 300.0, "positions": ((4, 4), (8, 8))},
    }

    magnitude: float = 30.0
    positions: tuple[tuple[int, int], ...] = PAIR
    window: int = BLOCK
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        check_blocks(self.name, size, self.window, self.magnitude, self.positions)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Chroma:
        self.check(size)
        return Chroma(
            pattern=waves(size, self.window, self.magnitude, self.positions),
            gain=gain(YCRCB),
            rounding=str(self.rounding),
            in_bytes=self.rounding == Rounding.TRUNCATE,
        )
