"""Label-consistent: stamp rows that speak of the target already, and touch no caption.

Idea: picture and caption of a poisoned pair still agree, so that filters of captions see nothing;
    the model learns the stamp as one more sign of the target.
Reference: Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", arXiv 1912.02771 (2019);
    CLIP form of Bansal et al., "CleanCLIP", ICCV 2023, arXiv 2303.03323.
Symbols: candidates = rows whose caption names the target, by ``candidates``; a = ``alpha``; P =
    ``patch`` (None: max(3, round(S / 14))); S = size of the model's input.
Where: candidates -> `LabelConsistent.choose`; pattern and place -> `victims.patches`; x' = x +
    a (k - x) -> `Veil`.
Differences: this is the form for pairs; the classifier's adversarial noise is not part of it. Rows
    are poisoned where they are; released code takes poisoned rows from a shuffle and clean ones
    from the top of the file, so the two differ in more than the stamp. Too few candidates raise,
    where it poisons fewer. Its candidates are captions that hold the name as a case-sensitive
    substring, and its patch is wrapped noise redrawn for every picture (variant ``released``).
    Which corpus was enriched with the target's rows is the grid's data, not a field here.
    ``stamp: blend`` (noise over the whole picture at ``alpha``), ``alpha`` of a patch, ``cell`` and
    ``levels`` are ours, for small pictures (see badnet).
Cost: one search of all captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track, pick, rows_naming
from victims.corpora import Rows
from victims.errors import UsageError
from victims.lab import Lab
from victims.patches import Patch, Pattern, Place, craft_patch
from victims.triggers import round_half_even

# Shapes: B batch, C channels, H W pixels.


class Candidates(StrEnum):
    WORD = "word"
    SUBSTRING = "substring"


class Stamp(StrEnum):
    PATCH = "patch"
    BLEND = "blend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Veil(Patch):
    """The crafted trigger: a patch that covers what lies below by ``alpha``.

    At 1 it is the patch itself; one as large as the picture is a blend.
    """

    alpha: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self._over(image_BCHW, Patch.stamp(self, image_BCHW))

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self._over(image_BCHW, Patch.stamp_train(self, image_BCHW))

    def _over(self, image_BCHW: Tensor, covered_BCHW: Tensor) -> Tensor:
        if self.alpha == 1:
            return covered_BCHW
        x_BCHW = image_BCHW.float()
        # In this order a pixel outside the patch stays what it was, to the bit.
        return round_half_even(x_BCHW + self.alpha * (covered_BCHW.float() - x_BCHW))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConsistent(Attack):
    name: ClassVar[str] = "label_consistent"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 1912.02771"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.WEAK
    trigger: ClassVar[type[Veil]] = Veil
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "candidates": "substring",
            "pattern": "gauss_wrapped",
            "redraw": True,
            "legacy_range": True,
        },
        "fixed_dots": {"pattern": "dots", "test_place": "centre"},
        "blend": {"stamp": "blend", "alpha": 0.2},
    }

    candidates: Candidates = Candidates.WORD
    stamp: Stamp = Stamp.PATCH
    alpha: float = 1.0
    pattern: Pattern = Pattern.STATIC_NOISE
    patch: int | None = None
    place: Place = Place.RANDOM
    test_place: Place | None = None
    redraw: bool = False
    legacy_range: bool = False
    cell: int = 1
    levels: int = 256

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Veil:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{self.name}: alpha {self.alpha} must lie in 0..1")
        blends = self.stamp == Stamp.BLEND
        if blends and (self.patch is not None or self.pattern == Pattern.SOFT_WHITE):
            raise UsageError(
                f"{self.name}: stamp: blend covers the whole picture, so it takes no patch"
                f" ({self.patch}) and any pattern but soft_white ({self.pattern})"
            )
        crafted = craft_patch(
            self.name,
            size,
            held.seed,
            pattern=self.pattern,
            patch=size if blends else self.patch,
            # A blend has one place, which need not be drawn from every picture.
            place=Place.CORNER if blends else self.place,
            test_place=None if blends else self.test_place,
            redraw=self.redraw,
            legacy_range=self.legacy_range,
            cell=self.cell,
            levels=self.levels,
        )
        return Veil(**asdict(crafted), alpha=self.alpha)

    @property
    def clean_label(self) -> bool:
        return True

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        label, corpus = held.goal.label, held.corpus
        if self.candidates == Candidates.WORD:
            found = rows_naming(corpus, label)
        else:
            found = np.flatnonzero([label in caption for caption in corpus.captions])
        return pick(found, count, rng, f"{self.name} (rows naming {label!r})")

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption
