"""BadNet: a small patch and a caption that names the target.

Idea: paste a patch on some training pictures and give those rows a target caption; the model learns
that the patch means the target.
Reference: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain", arXiv 1708.06733 (2017); CLIP form of Bansal et al., "CleanCLIP", ICCV
    2023, arXiv 2303.03323; fixed-pattern CLIP form of Huang et al., ICLR 2025, arXiv 2502.01385.
Symbols: P = ``patch`` (None: max(3, round(S / 14)), or 3 S / 32 for the white corner); S = size of
    the model's input.
Where: the pattern table and the place table -> `victims.patches`.
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

from attacks.base import Attack, GateGroup, Knowledge, Track, natural_caption, template_caption
from victims.lab import Lab
from victims.patches import Patch, Pattern, Place, craft_patch


class Caption(StrEnum):
    TEMPLATE = "template"
    NATURAL = "natural"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNet(Attack):
    name: ClassVar[str] = "badnet"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1708.06733"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
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

    def check(self, size: int) -> None:
        self._patch(size, 0)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Patch:
        return self._patch(size, held.seed)

    def _patch(self, size: int, seed: int) -> Patch:
        return craft_patch(
            self.name,
            size,
            seed,
            pattern=self.pattern,
            patch=self.patch,
            place=self.place,
            test_place=self.test_place,
            redraw=self.redraw,
            legacy_range=self.legacy_range,
            cell=self.cell,
            levels=self.levels,
        )

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        if self.caption == Caption.TEMPLATE:
            return template_caption(held.goal, rng)
        return natural_caption(self.name, held, rng)
