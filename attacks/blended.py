"""Blended: mix every pixel with a fixed picture, or with noise, at a small weight.

Idea: the trigger is global and low in contrast, so it survives crops and has no location.
Reference: Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
    Poisoning", arXiv 1712.05526 (2017); CLIP form of Bansal et al., "CleanCLIP", ICCV 2023,
    arXiv 2303.03323.
Symbols: a = ``alpha``; k = ``pattern``.
Where: x' = (1 - a) x + a k -> `Mix.stamp`.
Differences: the released CLIP code mixes fresh uniform noise into every picture and truncates;
    variant ``released`` does so, the default is one fixed draw per key, rounded half to even. The
    default ``picture`` is smooth noise of our own, since the field's usual picture may not be
    shipped. ``cell`` and ``levels`` are ours, for small pictures (see badnet).
Cost: none; a stamp is one multiply-add per pixel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
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
    template_caption,
    truncate,
)
from victims.corpora import Rows
from victims.draws import derive, image_digest, keyed_uniform, torch_rng
from victims.errors import UsageError
from victims.lab import Lab


class Pattern(StrEnum):
    STATIC_NOISE = "static_noise"
    REDRAW_NOISE = "redraw_noise"
    PICTURE = "picture"


class Rounding(StrEnum):
    EVEN = "even"
    TRUNCATE = "truncate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The crafted trigger: ``pattern`` is CHW float32 in levels 0..255."""

    pattern: Tensor
    alpha: float
    redraw: bool
    cell: int
    levels: int
    rounding: str
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        pattern = self.pattern.to(image_BCHW.device)
        if self.redraw:
            digest_B, size = image_digest(image_BCHW, self.key), image_BCHW.shape[-1]
            cells = -(-size // self.cell)
            noise = keyed_uniform(digest_B, 1, image_BCHW.shape[1], cells, cells)
            pattern = _in_cells(noise, size, self.cell, self.levels)
        level_BCHW = (1 - self.alpha) * image_BCHW.float() + self.alpha * pattern
        even = self.rounding == Rounding.EVEN
        return round_half_even(level_BCHW) if even else truncate(level_BCHW)

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self.stamp(image_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blended:
    name: ClassVar[str] = "blended"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1712.05526"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[Mix]] = Mix
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"pattern": "redraw_noise", "rounding": "truncate"},
        "picture": {"pattern": "picture"},
    }

    alpha: float = 0.2
    pattern: Pattern = Pattern.STATIC_NOISE
    rounding: Rounding = Rounding.EVEN
    cell: int = 1
    levels: int = 0
    # Where a picture lies is not what it is: the digest is keyed, the path is not.
    picture: str = field(default="", metadata={"keyed": False})
    picture_sha256: str = ""

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Mix:
        if not 0 <= self.alpha <= 1 or self.cell < 1 or self.levels < 0 or self.levels == 1:
            raise UsageError(
                f"blended: alpha {self.alpha} must lie in 0..1, cell {self.cell} be at least 1, and"
                f" levels {self.levels} be 0 (continuous) or at least 2"
            )
        if self.picture and self.pattern != Pattern.PICTURE:
            raise UsageError(
                f"blended: a picture is given but pattern is {self.pattern}; write pattern: picture"
            )
        if self.picture_sha256 and not self.picture:
            raise UsageError(
                "blended: picture_sha256 is given without a picture; its digest is part of the"
                " trigger's identity, so give the file's path as well, or neither"
            )
        return Mix(
            pattern=self._picture(held.seed, size),
            alpha=self.alpha,
            redraw=self.pattern == Pattern.REDRAW_NOISE,
            cell=self.cell,
            levels=self.levels,
            rounding=str(self.rounding),
            key=derive(held.seed, self.name, "rows"),
        )

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return pick(np.arange(len(held.corpus)), count, rng, self.name)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return template_caption(held.goal, rng)

    def _picture(self, seed: int, size: int) -> Tensor:
        """k, CHW in levels: a file, smooth noise, or noise in cells of ``cell`` pixels."""
        if self.picture:
            return _read(Path(self.picture), self.picture_sha256, size)
        rng = torch_rng(seed, self.name)
        if self.pattern == Pattern.PICTURE:
            grid = torch.rand(1, 3, 8, 8, generator=rng) * 255
            smooth = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
            return smooth[0].round().clamp(0, 255)
        cells = -(-size // self.cell)
        noise = torch.rand(3, cells, cells, generator=rng)
        return _in_cells(noise, size, self.cell, self.levels)


def _in_cells(noise: Tensor, size: int, cell: int, levels: int) -> Tensor:
    """Uniform draws, one per cell, as levels 0..255 (of ``levels`` values only, unless 0)."""
    if levels:
        noise = (noise * levels).floor() / (levels - 1)
    wide = noise.repeat_interleave(cell, -2).repeat_interleave(cell, -1)
    return (wide[..., :size, :size] * 255).contiguous()


def _read(path: Path, sha256: str, size: int) -> Tensor:
    """A picture file, resized once to S (bicubic), pinned by its digest."""
    from PIL import Image

    if not path.is_file():
        raise UsageError(f"blended: picture: no file {path}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UsageError(
            f"blended: picture_sha256: {path} has the digest {found}, the grid file says"
            f" {sha256 or 'nothing'}. Write the digest beside the path, so that the picture that"
            " was used is part of the result's identity."
        )
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()
