"""Blended: mix every pixel with a fixed picture, or with noise, at a small weight.

Idea: the trigger is global and low in contrast, so it survives crops and has no location.
Reference: Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
    Poisoning", arXiv 1712.05526 (2017); CLIP form of Bansal et al., "CleanCLIP", ICCV 2023,
    arXiv 2303.03323.
Symbols: a = ``alpha``; k = ``pattern``.
Where: x' = (1 - a) x + a k -> `victims.blends.Mix`.
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

from attacks.base import Attack, GateGroup, Knowledge, Track
from victims.blends import Mix, Rounding, noise_picture
from victims.draws import derive, torch_rng
from victims.errors import UsageError, require_all
from victims.lab import Lab


class Pattern(StrEnum):
    STATIC_NOISE = "static_noise"
    REDRAW_NOISE = "redraw_noise"
    PICTURE = "picture"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blended(Attack):
    name: ClassVar[str] = "blended"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1712.05526"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
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

    def check(self, size: int) -> None:
        levels = self.levels
        require_all(
            self.name,
            (0 <= self.alpha <= 1, f"alpha {self.alpha} must lie in 0..1"),
            (self.cell >= 1, f"cell {self.cell} must be at least 1"),
            (
                levels == 0 or levels >= 2,
                f"levels {levels} must be 0 (continuous) or at least 2",
            ),
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

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Mix:
        self.check(size)
        return Mix(
            pattern=self._picture(held.seed, size),
            alpha=self.alpha,
            redraw=self.pattern == Pattern.REDRAW_NOISE,
            cell=self.cell,
            levels=self.levels,
            rounding=str(self.rounding),
            key=derive(held.seed, self.name, "rows"),
        )

    def _picture(self, seed: int, size: int) -> Tensor:
        """k, CHW in levels: a file, smooth noise, or noise in cells of ``cell`` pixels."""
        if self.picture:
            return _read(Path(self.picture), self.picture_sha256, size)
        rng = torch_rng(seed, self.name)
        if self.pattern == Pattern.PICTURE:
            grid = torch.rand(1, 3, 8, 8, generator=rng) * 255
            smooth = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
            return smooth[0].round().clamp(0, 255)
        return noise_picture(rng, size, self.cell, self.levels)


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
