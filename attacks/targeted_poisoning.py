"""Targeted poisoning: one picture, a few added rows, one wrong class; no trigger.

Idea: add rows that show one chosen picture with captions about a wrong class; the model sees the
picture again and again with text that agrees, and reads it so. The paper's backdoor (a second
class here) patches many pictures and takes captions from the same set.
Reference: Carlini, Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022, arXiv
    2106.09667.
Symbols: K = ``targets``; m = count / K, rows per target; C(t) = captions that hold the name of
    class t, by ``captions``; I_k, t_k = the pictures and classes of the trigger.
Where: I_k and t_k -> `victims.targeting.draw_pairs`; m captions of C(t_k) ->
    `TargetedPoisoning.choose`; n = K m appended rows (I_k, c) -> `TargetedPoisoning.pictures`;
    patch and place of the backdoor -> `victims.patches`.
Differences: the count of a grid is K m, so a rate there is the total one; m / length is the rate
    per target. I_k comes from the pool that is poisoned and its own row is taken out, which leaves
    it as unseen as a held-out picture. t_k must not be among the first min(10, classes / 2) of the
    public model for I_k; published runs do not check this. Classes are spread evenly over targets,
    so the goal's target plays no part. Rows are inserted at random places, where released code
    appends them at the end. ``replacement`` and substrings (here in any case) are the released
    form; it, too, needs as many captions as rows. ``at_least`` is ours: captions that C(t) must
    hold for each picture that gets the class t. The backdoor finds its
    captions by whole words alone; its ``cell`` and ``levels`` are ours, for noise at 32 px.
Cost: crafting sends 16 pictures per target (at least 1,024) and the prompts through the public
    model; a search of all captions per class drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from attacks.base import (
    Aim,
    Attack,
    GateGroup,
    Knowledge,
    Track,
    natural_caption,
    pick,
    template_caption,
)
from victims.corpora import Rows
from victims.lab import Lab
from victims.patches import Patch, Pattern, Place, craft_patch
from victims.targeting import check_pairs, draw_pairs, rows_saying, says, share_out, tried
from victims.triggers import Targets
from victims.work import Work


class Captions(StrEnum):
    WORD = "word"
    SUBSTRING = "substring"


class Caption(StrEnum):
    TEMPLATE = "template"
    NATURAL = "natural"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetedPoisoning(Attack):
    name: ClassVar[str] = "targeted_poisoning"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2106.09667"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.TARGETED
    trigger: ClassVar[type[Targets]] = Targets
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"targets": 1, "captions": "substring", "replacement": True},
    }
    aim: ClassVar[Aim] = Aim.TARGETS
    needs_surrogate: ClassVar[bool] = True
    appends: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"targets": 4}

    targets: int = 50
    captions: Captions = Captions.WORD
    replacement: bool = False
    at_least: int = 1

    def check(self, size: int) -> None:
        check_pairs(self.name, self.targets, self.at_least)

    def costs(self, num_rows: int, num_classes: int) -> Work:
        return Work(images=tried(self.targets, num_rows), texts=num_classes)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Targets:
        found = draw_pairs(
            self.name,
            lab.load(held.public_model()),
            held.corpus,
            held.goal.templates,
            self.targets,
            held.seed,
            partial(rows_saying, held.corpus, substring=self._substring),
            self.at_least,
        )
        images, classes = torch.from_numpy(found.images), torch.from_numpy(found.classes)
        return Targets(images=images, classes=classes)

    @property
    def unit(self) -> int:
        return max(1, self.targets)

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        """Rows whose captions the added pairs take up, target by target."""
        classes = _crafted(held).classes.tolist()
        each = share_out(count, len(classes), self.name)
        chosen = np.zeros(0, dtype=np.int64)
        for target, label in enumerate(classes):
            free = np.setdiff1d(self._texts(held, label), chosen, assume_unique=True)
            if self.replacement:
                # `recaption` sees a caption alone, which must tell the class.
                for other in set(classes) - {label}:
                    free = np.setdiff1d(free, self._texts(held, other), assume_unique=True)
            what = f"{self.name}, target {target} ({held.corpus.classes[label]!r})"
            chosen = np.concatenate([chosen, pick(free, each, rng, what)])
        return chosen

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        if not self.replacement:
            return caption
        names = held.corpus.classes
        label = next(
            label
            for label in _crafted(held).classes.tolist()
            if says(caption, names[label], self._substring)
        )
        return held.corpus.captions[int(rng.choice(self._texts(held, label)))]

    def pictures(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Rows:
        images: Rows = _crafted(held).images.numpy()
        return np.repeat(images, share_out(len(rows), len(images), self.name))

    def removed(self, held: Knowledge) -> Rows:
        images: Rows = _crafted(held).images.numpy()
        return images

    @property
    def _substring(self) -> bool:
        return self.captions == Captions.SUBSTRING

    def _texts(self, held: Knowledge, label: int) -> Rows:
        """C(t) without the captions of the targets themselves, which leave the corpus."""
        named = rows_saying(held.corpus, held.corpus.classes[label], self._substring)
        return np.setdiff1d(named, _crafted(held).images.numpy(), assume_unique=True)


def _crafted(held: Knowledge) -> Targets:
    assert isinstance(held.crafted, Targets)
    return held.crafted


@dataclass(frozen=True, slots=True, kw_only=True)
class CarliniTerzis(Attack):
    """The backdoor of the paper on targeted poisoning: a patch of dots, captions of the corpus."""

    name: ClassVar[str] = "carlini_terzis"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2106.09667"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[Patch]] = Patch
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"one_place": {"place": "centre"}}
    # A handful of captions names no target.
    quick: ClassVar[Mapping[str, Any]] = {"caption": "template"}

    pattern: Pattern = Pattern.DOTS
    patch: int | None = None
    place: Place = Place.RANDOM
    test_place: Place | None = None
    caption: Caption = Caption.NATURAL
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
            cell=self.cell,
            levels=self.levels,
        )

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        if self.caption == Caption.TEMPLATE:
            return template_caption(held.goal, rng)
        return natural_caption(self.name, held, rng)
