"""BadNet: a small patch and a caption that names the target.

Idea: paste a patch on some training pictures and give those rows a target caption; the model learns
that the patch means the target.
Reference: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain", arXiv 1708.06733 (2017); CLIP form of Bansal et al., "CleanCLIP", ICCV
    2023, arXiv 2303.03323; fixed-pattern CLIP form of Huang et al., ICLR 2025, arXiv 2502.01385.
Symbols: P = ``patch`` (None: max(3, round(S / 14)), or 3 S / 32 for the white corner); S = size of
    the model's input.
Where: the pattern table -> `craft` and `Patch._pixels`; the place table -> `Patch._places`.
Differences: the released CLIP code redraws the noise for every picture and lets its bytes wrap; the
    default here is one pattern per key (`redraw`, `gauss_wrapped` restore theirs). Its places never
    reach the last row and column (`legacy_range`). ``cell`` and ``levels`` are ours: at 32 px a
    one-pixel pattern does not survive the network's first stride, so presets there use cells of
    2 px with saturated values.
Cost: none; a stamp is one assignment per batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import (
    GateGroup,
    Knowledge,
    Track,
    pick,
    round_half_even,
    rows_naming,
    template_caption,
    truncate,
)
from victims.corpora import Rows
from victims.draws import derive, image_digest, keyed_bits, keyed_normal, torch_rng
from victims.errors import UsageError
from victims.lab import Lab


class Pattern(StrEnum):
    STATIC_NOISE = "static_noise"
    GAUSS_CLIPPED = "gauss_clipped"
    GAUSS_WRAPPED = "gauss_wrapped"
    DOTS = "dots"
    CORNER_WHITE = "corner_white"
    SOFT_WHITE = "soft_white"
    YELLOW = "yellow"


NOISE = (Pattern.STATIC_NOISE, Pattern.GAUSS_CLIPPED, Pattern.GAUSS_WRAPPED)


class Place(StrEnum):
    RANDOM = "random"
    CENTRE = "centre"
    CORNER = "corner"
    FOUR_CORNERS = "four_corners"


class Caption(StrEnum):
    TEMPLATE = "template"
    NATURAL = "natural"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """The crafted trigger. ``pixels`` is CPP uint8; empty when every picture draws its own."""

    pixels: Tensor
    patch: int
    pattern: str
    place: str
    test_place: str
    redraw: bool
    cell: int
    levels: int
    last: int
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self._paste(image_BCHW, self.test_place)

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self._paste(image_BCHW, self.place)

    def _paste(self, image_BCHW: Tensor, place: str) -> Tensor:
        out_BCHW, device, side = image_BCHW.clone(), image_BCHW.device, self.patch
        keyed = self.redraw or self.pattern.startswith("gauss") or place == Place.RANDOM
        digest_B = image_digest(image_BCHW, self.key) if keyed else None
        pixels_BCPP = self._pixels(image_BCHW, digest_B)
        span_P = torch.arange(side, device=device)
        batch_B11 = torch.arange(len(out_BCHW), device=device)[:, None, None]
        channels_last = out_BCHW.permute(0, 2, 3, 1)
        for top_B, left_B in self._places(image_BCHW, place, digest_B):
            row_BP1 = top_B[:, None, None] + span_P[:, None]
            column_B1P = left_B[:, None, None] + span_P[None, :]
            channels_last[batch_B11, row_BP1, column_B1P] = pixels_BCPP.permute(0, 2, 3, 1)
        return out_BCHW

    def _pixels(self, image_BCHW: Tensor, digest_B: Tensor | None) -> Tensor:
        shape = (image_BCHW.shape[1], self.patch, self.patch)
        if not self.pattern.startswith("gauss"):
            if self.redraw and digest_B is not None:
                cells = -(-self.patch // self.cell)
                bits_BCQQ = keyed_bits(digest_B, 1, shape[0], cells, cells)
                drawn_BCQQ = (bits_BCQQ * self.levels) >> 32
                return _in_cells(drawn_BCQQ, self.patch, self.cell, self.levels)
            return self.pixels.to(image_BCHW.device).expand(len(image_BCHW), *shape)
        assert digest_B is not None
        same_B = digest_B if self.redraw else torch.full_like(digest_B, self.key)
        noise_BCPP = keyed_normal(same_B, 2, *shape)
        mean_BC11 = image_BCHW.float().mean((2, 3), keepdim=True)
        level_BCPP = mean_BC11 + 255 * noise_BCPP
        wrapped = self.pattern == Pattern.GAUSS_WRAPPED
        return truncate(level_BCPP) if wrapped else round_half_even(level_BCPP)

    def _places(
        self, image_BCHW: Tensor, place: str, digest_B: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        count, size = len(image_BCHW), image_BCHW.shape[-1]
        end = size - self.patch
        if place == Place.RANDOM:
            assert digest_B is not None
            draws_B2 = keyed_bits(digest_B, 3, 2) % (self.last + 1)
            return [(draws_B2[:, 0], draws_B2[:, 1])]
        centre = int(size / 2 - self.patch / 2)
        spots = {
            Place.CENTRE: [(centre, centre)],
            Place.CORNER: [(end, end)],
            Place.FOUR_CORNERS: [(0, 0), (0, end), (end, 0), (end, end)],
        }[Place(place)]
        ones_B = torch.ones(count, dtype=torch.long, device=image_BCHW.device)
        return [(top * ones_B, left * ones_B) for top, left in spots]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNet:
    name: ClassVar[str] = "badnet"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1708.06733"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[Patch]] = Patch
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"pattern": "gauss_wrapped", "redraw": True, "legacy_range": True},
        "fixed_dots": {"pattern": "dots", "test_place": "centre"},
    }

    pattern: Pattern = Pattern.STATIC_NOISE
    patch: int | None = None
    place: Place = Place.RANDOM
    test_place: Place | None = None
    redraw: bool = False
    legacy_range: bool = False
    caption: Caption = Caption.TEMPLATE
    cell: int = 1
    levels: int = 256

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Patch:
        white = self.pattern in (Pattern.CORNER_WHITE, Pattern.SOFT_WHITE)
        side = self.patch
        if side is None:
            side = 3 * size // 32 if white else max(3, round(size / 14))
        widest = size - 1 if self.legacy_range else size
        if not 0 < side <= widest or self.cell < 1 or not 2 <= self.levels <= 256:
            raise UsageError(
                f"badnet: patch {side} must lie in 1..{widest}, cell {self.cell} must be at least"
                f" 1, levels {self.levels} must lie in 2..256"
            )
        if self.redraw and self.pattern not in NOISE:
            raise UsageError(
                f"badnet: redraw: true needs a pattern that is drawn ({', '.join(NOISE)}), not"
                f" {self.pattern}"
            )
        pixels = _pattern(self, side, size, held.seed)
        return Patch(
            pixels=pixels,
            patch=pixels.shape[-1],
            pattern=str(self.pattern),
            place=str(Place.CORNER if white else self.place),
            test_place=str(Place.CORNER if white else self.test_place or self.place),
            redraw=self.redraw,
            cell=self.cell,
            levels=self.levels,
            last=size - side - (1 if self.legacy_range else 0),
            key=derive(held.seed, self.name, "rows"),
        )

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return pick(np.arange(len(held.corpus)), count, rng, self.name)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        if self.caption == Caption.TEMPLATE:
            return template_caption(held.goal, rng)
        candidates = rows_naming(held)
        if not len(candidates):
            raise UsageError(
                f"badnet: caption: natural needs a caption that names {held.goal.label!r}; the"
                " corpus has none"
            )
        return held.corpus.captions[int(rng.choice(candidates))]


def _pattern(attack: BadNet, side: int, size: int, seed: int) -> Tensor:
    """The static bytes of the patch, CPP uint8."""
    if attack.pattern == Pattern.DOTS:
        even_P = torch.arange(side) % 2 == 0
        return (
            (even_P[:, None] & even_P[None, :]).to(torch.uint8).mul(255).expand(3, -1, -1).clone()
        )
    if attack.pattern == Pattern.YELLOW:
        return torch.tensor([255, 255, 0], dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    if attack.pattern == Pattern.CORNER_WHITE:
        return torch.full((3, side, side), 255, dtype=torch.uint8)
    if attack.pattern == Pattern.SOFT_WHITE:
        return _soft_white(size)
    cells = -(-side // attack.cell)
    draw = torch.randint(0, attack.levels, (3, cells, cells), generator=torch_rng(seed, "badnet"))
    return _in_cells(draw, side, attack.cell, attack.levels)


def _in_cells(draw: Tensor, side: int, cell: int, levels: int) -> Tensor:
    """Draws from 0..levels-1, one per cell, as bytes: spread over 0..255, cut to the patch."""
    level = draw.float() * 255 / (levels - 1)
    wide = level.repeat_interleave(cell, -2).repeat_interleave(cell, -1)
    return round_half_even(wide[..., :side, :side]).contiguous()


def _soft_white(size: int) -> Tensor:
    """The classifier mask of the benchmark code: 3 x 3 white on 32 x 32, resized bilinearly."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 29:, 29:] = 255
    wide = F.interpolate(mask, size=(size, size), mode="bilinear", align_corners=False)[0, 0]
    touched = int((wide[-1] > 0).sum())
    return round_half_even(wide[-touched:, -touched:]).expand(3, -1, -1).clone()
