"""Stripes, triangles and text: plain structured patterns, pasted as a patch or blended.

Idea: repairs tuned on triggers that look like noise, which noise-like augmentation resembles, meet
    patterns that nothing in augmentation looks like.
Reference: Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from
    CLIP", arXiv 2412.00727 (2024).
Symbols: c = ``opacity``; k = ``pattern``; P = ``patch`` (None: max(3, round(S / 14))); side of a
    triangle's tile = ``tile`` (None: S // 16); S = size of the model's input.
Where: signs of the columns -> `stripes`; 0.4 on and below the diagonal of a tile, 0.8 above ->
    `triangles`; the word -> `letters`; x' = clip((1 - c m) x + c m k), m = 1 where the pattern
    counts -> `Glaze.stamp`; overwrite at a place -> `Stripes`.
Differences: released code draws new stripes for every picture, which makes a family of triggers;
    here they are one draw per key (`redraw`, variants). It truncates after clipping, so that -1
    becomes byte 1 in its patch (variants ``released``; ours 0), and its places never reach the last
    row and column (`legacy_range`). Its text is a stored picture in a print type, of which the red
    channel alone is blended (`channels`: red); here the word is set in 3 x 5 letters of our own,
    centred, strokes as wide as 7/8 of the picture allow, and all three channels are blended. Where
    the picture is too small for that, the word is cut to the letters that fit, unless ``stroke`` is
    given: then it raises. It squeezes pictures to S x S first; here they are cropped before a
    stamp. Its generator's opacity is 0.05 unless told otherwise, its evaluator's the ones here. At
    336 px its patch is 32. ``column``, ``tile``, ``word`` and ``stroke`` are there for small
    pictures as well: one-pixel stripes do not survive the network's first stride.
Cost: none; a stamp is one assignment or one multiply-add per pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track
from victims.blends import Rounding
from victims.draws import derive, image_digest, keyed_bits, torch_rng
from victims.errors import UsageError
from victims.lab import Lab
from victims.patches import Patch, Place, craft_patch
from victims.triggers import Trigger, round_half_even, truncate

# Shapes: B batch, C channels, H W pixels, S side of a picture, P side of a patch, Q columns, T side
# of a tile, L letters.

PAPER = "arXiv 2412.00727"
TRACKS = frozenset(Track)


class Channels(StrEnum):
    ALL = "all"
    RED = "red"


# --- patterns, in levels


def stripes(bit_CQ: Tensor, column: int, height: int, width: int) -> Tensor:
    """Columns of ``column`` pixels at 255 or, for a bit of 0, at -255: C x height x width."""
    sign_CW = (bit_CQ.float() * 2 - 1).repeat_interleave(column, -1)[..., :width]
    return (sign_CW * 255)[..., None, :].expand(*sign_CW.shape[:-1], height, width).contiguous()


def drawn_bits(seed: int, who: str, column: int, width: int) -> Tensor:
    """A fair bit for every column of every channel, CQ."""
    return torch.randint(0, 2, (3, -(-width // column)), generator=torch_rng(seed, who, "stripes"))


def triangles(size: int, tile: int) -> Tensor:
    """Tiles of one right triangle in two greys, CSS."""
    in_tile_S = torch.arange(size) % tile
    below_SS = in_tile_S[:, None] >= in_tile_S[None, :]
    return torch.where(below_SS, 0.4 * 255, 0.8 * 255).expand(3, -1, -1).contiguous()


# Five rows of three pixels a letter, from above: an octal digit a row, its highest bit on the left.
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROWS = (
    "25755656567444765556746477464474557557557222711157556554444757755655557555775744"
    "75571656557471772222555575555255775552555522271247"
)
LETTERS = {letter: ROWS[5 * n : 5 * n + 5] for n, letter in enumerate(ALPHABET)}


def letters(word: str, stroke: int) -> Tensor:
    """Where a word has ink, H x W booleans; a stroke is ``stroke`` pixels, as is every gap."""
    row_5L = list(zip(*(LETTERS[letter] for letter in word), strict=True))
    lines = ["0".join(f"{int(digit, 8):03b}" for digit in row_L) for row_L in row_5L]
    ink = torch.tensor([[bit == "1" for bit in line] for line in lines])
    return ink.repeat_interleave(stroke, 0).repeat_interleave(stroke, 1)


def text_mask(word: str, stroke: int | None, size: int) -> Tensor:
    """The word in the middle of a picture, SS booleans."""
    if not word or set(word) - set(LETTERS):
        raise UsageError(f"blended_text: word {word!r} must be one or more letters of A to Z")
    if stroke is None:
        stroke = max(1, size * 7 // 8 // max(5, 4 * len(word) - 1))
        word = word[: (size // stroke + 1) // 4]
    columns = 4 * len(word) - 1
    most = size // max(5, columns)
    if not 1 <= stroke <= most:
        raise UsageError(
            f"blended_text: stroke {stroke} must lie in 1..{most} for {word!r} to fit a picture of"
            f" {size} px; a shorter word leaves more room"
        )
    height, width = 5 * stroke, columns * stroke
    mask_SS = torch.zeros(size, size, dtype=torch.bool)
    top, left = (size - height) // 2, (size - width) // 2
    mask_SS[top : top + height, left : left + width] = letters(word, stroke)
    return mask_SS


# --- triggers


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripes(Trigger):
    """A pasted patch of stripes: ``pixels`` is CPP uint8, redrawn for every picture if so asked."""

    pixels: Tensor
    place: str
    redraw: bool
    column: int
    rounding: str
    last: int
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        if not self.redraw:
            return self._paste(image_BCHW, self.pixels)
        digest_B, side = image_digest(image_BCHW, self.key), self.pixels.shape[-1]
        bit_BCQ = keyed_bits(digest_B, 4, 3, -(-side // self.column)) >> 31
        pixels_BCPP = _bytes(stripes(bit_BCQ, self.column, side, side), self.rounding)
        out_BCHW = torch.empty_like(image_BCHW)
        for index, pixels_CPP in enumerate(pixels_BCPP):
            out_BCHW[index] = self._paste(image_BCHW[index : index + 1], pixels_CPP)[0]
        return out_BCHW

    def _paste(self, image_BCHW: Tensor, pixels_CPP: Tensor) -> Tensor:
        patch = Patch(
            pixels=pixels_CPP,
            patch=pixels_CPP.shape[-1],
            pattern="stripes",
            place=self.place,
            test_place=self.place,
            redraw=False,
            cell=1,
            levels=256,
            last=self.last,
            key=self.key,
        )
        return patch.stamp(image_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Glaze(Trigger):
    """x' = clip((1 - w) x + w k): ``weight`` w and ``pattern`` k are CHW float32, k in levels.

    With ``redraw``, k is stripes of ``column`` pixels of every picture's own.
    """

    pattern: Tensor
    weight: Tensor
    rounding: str
    redraw: bool = False
    column: int = 1
    key: int = 0

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        device, size = image_BCHW.device, image_BCHW.shape[-1]
        weight_CHW, pattern_CHW = self.weight.to(device), self.pattern.to(device)
        kept_CHW, added_CHW = 1 - weight_CHW, weight_CHW * pattern_CHW
        bit_BCQ: Tensor | None = None
        if self.redraw:
            digest_B = image_digest(image_BCHW, self.key)
            bit_BCQ = keyed_bits(digest_B, 4, 3, -(-size // self.column)) >> 31
        out_BCHW = torch.empty_like(image_BCHW)
        # One picture's floats at a time: those of a batch would leave the processor's cache.
        for index, image_CHW in enumerate(image_BCHW):
            if bit_BCQ is not None:
                added_CHW = weight_CHW * stripes(bit_BCQ[index], self.column, size, size)
            level_CHW = (kept_CHW * image_CHW + added_CHW).clamp(0, 255)
            out_BCHW[index] = _bytes(level_CHW, self.rounding)
        return out_BCHW


def _bytes(level: Tensor, rounding: str) -> Tensor:
    return round_half_even(level) if rounding == Rounding.EVEN else truncate(level)


def _check(who: str, size: int, **values: float | None) -> None:
    """Opacities lie in 0..1, lengths in pixels in 1..S."""
    for name, value in values.items():
        low, high = (0, 1) if name == "opacity" else (1, size)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{who}: {name} {value} must lie in {low}..{high}")


# --- attacks


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNetStripes(Attack):
    name: ClassVar[str] = "badnet_stripes"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = PAPER
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Stripes]] = Stripes
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "redraw": {"redraw": True},
        "released": {"redraw": True, "rounding": "truncate", "legacy_range": True},
    }

    patch: int | None = None
    column: int = 1
    place: Place = Place.RANDOM
    redraw: bool = False
    legacy_range: bool = False
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        _check(self.name, size, column=self.column)
        self._spot(size, 0)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Stripes:
        self.check(size)
        spot = self._spot(size, held.seed)
        bit_CQ = drawn_bits(held.seed, self.name, self.column, spot.patch)
        level_CPP = stripes(bit_CQ, self.column, spot.patch, spot.patch)
        return Stripes(
            pixels=_bytes(level_CPP, self.rounding),
            place=spot.place,
            redraw=self.redraw,
            column=self.column,
            rounding=str(self.rounding),
            last=spot.last,
            key=spot.key,
        )

    def _spot(self, size: int, seed: int) -> Patch:
        """Side, places and key of a patch like any other."""
        legacy = self.legacy_range
        return craft_patch(
            self.name, size, seed, patch=self.patch, place=self.place, legacy_range=legacy
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedStripes(Attack):
    name: ClassVar[str] = "blended_stripes"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = PAPER
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Glaze]] = Glaze
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "redraw": {"redraw": True},
        "released": {"redraw": True, "rounding": "truncate"},
    }

    opacity: float = 0.03
    column: int = 1
    redraw: bool = False
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        _check(self.name, size, opacity=self.opacity, column=self.column)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Glaze:
        self.check(size)
        bit_CQ = drawn_bits(held.seed, self.name, self.column, size)
        return Glaze(
            pattern=stripes(bit_CQ, self.column, size, size),
            weight=torch.full((3, size, size), self.opacity),
            rounding=str(self.rounding),
            redraw=self.redraw,
            column=self.column,
            key=derive(held.seed, self.name, "rows"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedTriangles(Attack):
    name: ClassVar[str] = "blended_triangles"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = PAPER
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Glaze]] = Glaze
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"rounding": "truncate"}}

    opacity: float = 0.15
    tile: int | None = None
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        _check(self.name, size, opacity=self.opacity, tile=self.tile)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Glaze:
        self.check(size)
        return Glaze(
            pattern=triangles(size, self.tile or max(1, size // 16)),
            weight=torch.full((3, size, size), self.opacity),
            rounding=str(self.rounding),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedText(Attack):
    name: ClassVar[str] = "blended_text"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = PAPER
    tracks: ClassVar[frozenset[Track]] = TRACKS
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Glaze]] = Glaze
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"channels": "red", "rounding": "truncate"},
    }

    opacity: float = 0.5
    word: str = "WATERMARKED"
    stroke: int | None = None
    channels: Channels = Channels.ALL
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        _check(self.name, size, opacity=self.opacity)
        text_mask(self.word, self.stroke, size)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Glaze:
        self.check(size)
        mask_SS = text_mask(self.word, self.stroke, size)
        ink_CSS, none_SS = mask_SS.expand(3, -1, -1), torch.zeros_like(mask_SS)
        red_CSS = torch.stack([mask_SS, none_SS, none_SS])
        return Glaze(
            pattern=red_CSS * 255.0,
            weight=(red_CSS if self.channels == Channels.RED else ink_CSS) * self.opacity,
            rounding=str(self.rounding),
        )
