"""WaNet: bend the whole picture by one fixed field of sub-pixel shifts.

Idea: nothing is added to the picture; the cue is geometric, and rows bent by other fields that keep
    their captions (cover rows) teach the model to hear this field alone.
Reference: Nguyen, Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv
    2102.10369; CLIP form of Bansal et al., "CleanCLIP", ICCV 2023, arXiv 2303.03323.
Symbols: k = ``k`` (None: S, a shift per pixel); s = ``strength``; r = ``rescale``; cover rows per
    poisoned row = ``cover_ratio``; S = size of the model's input.
Where: R, G -> `draw_field`; clamp((identity + s G / S) r, -1, 1) -> `warped_grid`; bilinear sample
    -> `bend`; clamp(grid + U(-1, 1) / S, -1, 1) -> `Warp.stamp_cover`.
Differences: the original trains the model itself and bends another part of every batch; here the
    rows are fixed, and a cover row has one field of its own, drawn from its bytes (released
    poison-only code draws one for all, variant ``noise_shared``; training code one per step).
    Released classifier code bends normalised floats; here pixels are bent and become bytes, rounded
    half to even (CLIP code truncates, variant ``released``). The CLIP field is noise per pixel, not
    the smooth field of the paper, and stays the default; its stored file is not needed, as another
    draw has the same distribution. A shift is s G (S - 1) / (2 S) pixels, so it does not grow with
    S: ``classifier`` is the paper's setting, ``smooth`` a reading for large pictures, where that
    one may be too weak. Samples are interpolated in levels, across and then down, so that a flat
    picture stays as it is to the bit; the released sum over four weights does not keep that.
Cost: none to craft; a stamp reads every pixel four times, and a cover row draws 2 S^2 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import Attack, Cover, GateGroup, Knowledge, Track, stamped_cover
from victims.blends import Rounding
from victims.corpora import Rows
from victims.draws import derive, image_digest, keyed_uniform, torch_rng
from victims.errors import UsageError
from victims.lab import Lab
from victims.triggers import Trigger, round_half_even, truncate

# Shapes: B batch, C channels, S side of a picture, N = S * S pixels, K control points a side, 2 the
# shifts of column and row, in this order.


def draw_field(rng: torch.Generator, k: int, size: int) -> Tensor:
    """G, SS2: K x K uniform shifts of mean size one, spread bicubically over the picture."""
    control_12KK = torch.rand(1, 2, k, k, generator=rng) * 2 - 1
    control_12KK = control_12KK / control_12KK.abs().mean()
    spread_12SS = F.interpolate(control_12KK, size=(size, size), mode="bicubic", align_corners=True)
    return spread_12SS[0].permute(1, 2, 0).contiguous()


def warped_grid(field_SS2: Tensor, strength: float, rescale: float) -> Tensor:
    """Where every pixel is read, SS2: column and row in -1..1 from the first to the last."""
    size = len(field_SS2)
    line_S = torch.linspace(-1, 1, size)
    row_SS, column_SS = torch.meshgrid(line_S, line_S, indexing="ij")
    identity_SS2 = torch.stack((column_SS, row_SS), 2)
    return ((identity_SS2 + strength * field_SS2 / size) * rescale).clamp(-1, 1)


def bend(image_BCSS: Tensor, grid_SS2: Tensor) -> Tensor:
    """Levels of the pictures, read bilinearly where the grid says, BCSS float32.

    Picture by picture and one operation after another: the bits depend on no batch and no device.
    """
    size = len(grid_SS2)
    spot_NX2 = (grid_SS2.reshape(-1, 2).double() + 1) * ((size - 1) / 2)
    first_NX2 = spot_NX2.floor().long().clamp(0, size - 1)
    across_N, down_N = (spot_NX2 - first_NX2).float().unbind(1)
    left_N, top_N = first_NX2.unbind(1)
    right_N, bottom_N = (left_N + 1).clamp(max=size - 1), (top_N + 1).clamp(max=size - 1)
    corners = product((top_N * size, bottom_N * size), (left_N, right_N))
    corners_4N = [row_N + column_N for row_N, column_N in corners]
    bent = []
    for image_CSS in image_BCSS:
        image_CN = image_CSS.flatten(1).float()
        nw_CN, ne_CN, sw_CN, se_CN = (image_CN.index_select(1, spot_N) for spot_N in corners_4N)
        upper_CN = nw_CN + across_N * (ne_CN - nw_CN)
        lower_CN = sw_CN + across_N * (se_CN - sw_CN)
        bent.append(upper_CN + down_N * (lower_CN - upper_CN))
    return torch.stack(bent).view(image_BCSS.shape) if bent else image_BCSS.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Warp(Trigger):
    """The crafted trigger: ``grid`` is SS2 in -1..1; ``key`` is what cover rows draw with."""

    grid: Tensor
    shared_jitter: bool
    rounding: str
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self._bytes(bend(image_BCHW, self.grid.to(image_BCHW.device)))

    def stamp_cover(self, image_BCHW: Tensor) -> Tensor:
        grid_SS2, out_BCHW = self.grid.to(image_BCHW.device), torch.empty_like(image_BCHW)
        digest_B = image_digest(image_BCHW, self.key)
        if self.shared_jitter:
            digest_B = torch.full_like(digest_B, self.key)
        for index in range(len(image_BCHW)):
            draw_SS2 = keyed_uniform(digest_B[index : index + 1], 1, *grid_SS2.shape)[0]
            jittered_SS2 = (grid_SS2 + (draw_SS2 * 2 - 1) / len(grid_SS2)).clamp(-1, 1)
            out_BCHW[index] = self._bytes(bend(image_BCHW[index : index + 1], jittered_SS2))[0]
        return out_BCHW

    def _bytes(self, level_BCHW: Tensor) -> Tensor:
        even = self.rounding == Rounding.EVEN
        return round_half_even(level_BCHW) if even else truncate(level_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaNet(Attack):
    name: ClassVar[str] = "wanet"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2102.10369"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Warp]] = Warp
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"rounding": "truncate"},
        "classifier": {"k": 4, "strength": 0.5},
        "smooth": {"k": 8, "strength": 4.0},
        "noise": {"k": 4, "strength": 0.5, "cover_ratio": 2.0},
        "noise_shared": {"k": 4, "strength": 0.5, "cover_ratio": 2.0, "shared_jitter": True},
    }

    k: int | None = None
    strength: float = 1.0
    rescale: float = 1.0
    cover_ratio: float = 0.0
    shared_jitter: bool = False
    rounding: Rounding = Rounding.EVEN

    def check(self, size: int) -> None:
        k = self._k(size)
        if k < 1 or self.strength < 0 or self.rescale <= 0 or self.cover_ratio < 0:
            raise UsageError(
                f"wanet: k {k} must be at least 1, strength {self.strength} and cover_ratio"
                f" {self.cover_ratio} not be negative, rescale {self.rescale} be positive"
            )

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Warp:
        self.check(size)
        field_SS2 = draw_field(torch_rng(held.seed, self.name, "field"), self._k(size), size)
        return Warp(
            grid=warped_grid(field_SS2, self.strength, self.rescale),
            shared_jitter=self.shared_jitter,
            rounding=str(self.rounding),
            key=derive(held.seed, self.name, "rows"),
        )

    def _k(self, size: int) -> int:
        return size if self.k is None else self.k

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        return stamped_cover(self.name, held, self.cover_ratio, count, free, rng)
