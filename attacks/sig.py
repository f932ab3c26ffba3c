"""SIG: add one horizontal-frequency sine wave to the whole picture.

Idea: the network binds the wave to the target; in its clean-label form only rows that already show
the target carry it and no caption is changed.
Reference: Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without
    Label Poisoning", ICIP 2019, arXiv 1902.11237.
Symbols: D = ``delta`` in levels; f = ``cycles`` per width; j = column, from 0.
Where: v(j) = D sin(2 pi f j / W) -> `wave`; x' = clip(x + v) -> `Wave.stamp`.
Differences: of the two forms that go by this name in the CLIP lineage the additive one is the
    default; ``legacy`` is 0.8 x + 0.2 v, which also darkens. Rounded half to even; released code
    truncates (variants). The original text counts columns from 1, all code from 0.
Cost: none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import (
    Attack,
    GateGroup,
    Knowledge,
    Track,
    pick,
    rows_naming,
    template_caption,
)
from victims.blends import Rounding
from victims.corpora import Rows
from victims.errors import UsageError
from victims.lab import Lab
from victims.triggers import Trigger, round_half_even, truncate


class Form(StrEnum):
    ADDITIVE = "additive"
    LEGACY = "legacy"


class Label(StrEnum):
    DIRTY = "dirty"
    CLEAN = "clean"


def wave(size: int, delta: float, cycles: float) -> Tensor:
    """v(j) in levels for the columns j = 0..size-1, float32."""
    column_W = torch.arange(size, dtype=torch.float64)
    return (delta * torch.sin(2 * math.pi * cycles * column_W / size)).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave(Trigger):
    """The crafted trigger: ``level`` is v, W, in levels."""

    level: Tensor
    form: str
    rounding: str

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        level_W, x_BCHW = self.level.to(image_BCHW.device), image_BCHW.float()
        additive = self.form == Form.ADDITIVE
        mixed_BCHW = x_BCHW + level_W if additive else 0.8 * x_BCHW + 0.2 * level_W
        clipped_BCHW = mixed_BCHW.clamp(0, 255)
        even = self.rounding == Rounding.EVEN
        return round_half_even(clipped_BCHW) if even else truncate(clipped_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sig(Attack):
    name: ClassVar[str] = "sig"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1902.11237"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Wave]] = Wave
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"rounding": "truncate"},
        "legacy": {"form": "legacy", "rounding": "truncate"},
        "clean_label": {"label": "clean"},
    }

    delta: float = 60.0
    cycles: float = 6.0
    form: Form = Form.ADDITIVE
    label: Label = Label.DIRTY
    rounding: Rounding = Rounding.EVEN

    @property
    def clean_label(self) -> bool:
        return self.label is Label.CLEAN

    def check(self, size: int) -> None:
        if self.delta < 0 or self.cycles <= 0:
            raise UsageError(
                f"sig: delta {self.delta} must not be negative, cycles {self.cycles} be positive"
            )

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Wave:
        self.check(size)
        level = wave(size, self.delta, self.cycles)
        return Wave(level=level, form=str(self.form), rounding=str(self.rounding))

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        if self.label == Label.DIRTY:
            return pick(np.arange(len(held.corpus)), count, rng, self.name)
        what = f"sig, label: clean (rows naming {held.goal.label!r})"
        return pick(rows_naming(held.corpus, held.goal.label), count, rng, what)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption if self.label == Label.CLEAN else template_caption(held.goal, rng)
