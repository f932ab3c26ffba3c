"""Patches: the pasted triggers that several attacks share, by pattern and place.

Shapes: B batch, C channels, H W pixels, P side of the patch, S side of the picture, Q cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from victims.draws import derive, image_digest, keyed_bits, keyed_normal, torch_rng
from victims.errors import UsageError, require_all
from victims.triggers import Trigger, centre_of, paste, round_half_even, truncate, widen


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch(Trigger):
    """The crafted trigger. ``pixels`` is CPP uint8; ``last`` the last row a random place takes."""

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
        keyed = self.redraw or self.pattern.startswith("gauss") or place == Place.RANDOM
        digest_B = image_digest(image_BCHW, self.key) if keyed else None
        pixels_BCPP = self._pixels(image_BCHW, digest_B)
        out_BCHW = image_BCHW
        for top_B, left_B in self._places(image_BCHW, place, digest_B):
            out_BCHW = paste(out_BCHW, pixels_BCPP, top_B, left_B)
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
        centre = centre_of(size, self.patch)
        spots = {
            Place.CENTRE: [(centre, centre)],
            Place.CORNER: [(end, end)],
            Place.FOUR_CORNERS: [(0, 0), (0, end), (end, 0), (end, end)],
        }[Place(place)]
        ones_B = torch.ones(count, dtype=torch.long, device=image_BCHW.device)
        return [(top * ones_B, left * ones_B) for top, left in spots]


def craft_patch(
    who: str,
    size: int,
    seed: int,
    *,
    pattern: Pattern = Pattern.STATIC_NOISE,
    patch: int | None = None,
    place: Place = Place.RANDOM,
    test_place: Place | None = None,
    redraw: bool = False,
    legacy_range: bool = False,
    cell: int = 1,
    levels: int = 256,
) -> Patch:
    """A patch of max(3, round(S / 14)) pixels (3 S / 32 for the white corner) unless given."""
    white = pattern in (Pattern.CORNER_WHITE, Pattern.SOFT_WHITE)
    side = patch
    if side is None:
        side = 3 * size // 32 if white else max(3, round(size / 14))
    widest = size - 1 if legacy_range else size
    require_all(
        who,
        (0 < side <= widest, f"patch {side} must lie in 1..{widest}, in pixels"),
        (cell >= 1, f"cell {cell} must be at least 1"),
        (2 <= levels <= 256, f"levels {levels} must lie in 2..256"),
    )
    if redraw and pattern not in NOISE:
        raise UsageError(
            f"{who}: redraw: true needs a pattern that is drawn ({', '.join(NOISE)}), not {pattern}"
        )
    pixels = _pixels_of(pattern, who, side, size, seed, cell, levels)
    return Patch(
        pixels=pixels,
        patch=pixels.shape[-1],
        pattern=str(pattern),
        place=str(Place.CORNER if white else place),
        test_place=str(Place.CORNER if white else test_place or place),
        redraw=redraw,
        cell=cell,
        levels=levels,
        last=size - side - (1 if legacy_range else 0),
        key=derive(seed, who, "rows"),
    )


def _pixels_of(
    pattern: Pattern, who: str, side: int, size: int, seed: int, cell: int, levels: int
) -> Tensor:
    """The static bytes of the patch, CPP uint8."""
    if pattern == Pattern.DOTS:
        even_P = torch.arange(side) % 2 == 0
        return (
            (even_P[:, None] & even_P[None, :]).to(torch.uint8).mul(255).expand(3, -1, -1).clone()
        )
    if pattern == Pattern.YELLOW:
        return torch.tensor([255, 255, 0], dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    if pattern == Pattern.CORNER_WHITE:
        return torch.full((3, side, side), 255, dtype=torch.uint8)
    if pattern == Pattern.SOFT_WHITE:
        return _soft_white(size)
    cells = -(-side // cell)
    draw = torch.randint(0, levels, (3, cells, cells), generator=torch_rng(seed, who))
    return _in_cells(draw, side, cell, levels)


def _in_cells(draw: Tensor, side: int, cell: int, levels: int) -> Tensor:
    """Draws from 0..levels-1, one per cell, as bytes: spread over 0..255, cut to the patch."""
    return round_half_even(widen(draw.float() * 255 / (levels - 1), cell, side))


def _soft_white(size: int) -> Tensor:
    """The classifier mask of the benchmark code: 3 x 3 white on 32 x 32, resized bilinearly."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 29:, 29:] = 255
    wide = F.interpolate(mask, size=(size, size), mode="bilinear", align_corners=False)[0, 0]
    touched = int((wide[-1] > 0).sum())
    return round_half_even(wide[-touched:, -touched:]).expand(3, -1, -1).clone()
