"""ABD: fine-tune on clean pairs whose pictures carry a patch crafted against the victim.

Idea: adversarial pictures of a backdoored model lie close to its triggered ones. Craft one patch
    that leads the victim astray wherever it is pasted, and teach the victim to ignore it.
Reference: Kuang, Liang, Liang, Liu, Cao, "Adversarial Backdoor Defense in CLIP", arXiv 2409.15968,
    2024. The patch is that of Zhou et al., "AdvCLIP", ACM MM 2023, arXiv 2308.07026.
Symbols: f_p, g_p = the victim; f_o = the reference (``origin``); lambda_bd = ``backdoor_weight``;
    I_adv = picture with patch; T_eda = caption under EDA; area = share of the picture; the weights
    10, 5, 1, 5 of L_adv, its caption part, L_topo and its caption part = the fields ``adv_weight``,
    ``adv_text_weight``, ``topo_weight``, ``topo_text_weight``.
Where: the crafting, L_adv, L_topo, L_bd -> `victims.universal_patch`; L = 1/2 [CE(I_adv, T_eda) +
    CE(T_eda, I_adv)], or with ``align`` L_mm(I, T) + 1/2 [CE(I, I_adv) + CE(T, T_eda)] ->
    `victims.patched_pairs`.
Differences: neither equations nor the method's code are public, so this is a reading of figures and
    tables: L_bd keeps the two models' features of a patched picture apart; the patch is pasted in
    [0, 1] at a place drawn at every access (``placement``), after crafting in a fixed one
    (``craft_place``). ``clamp: advclip`` takes AdvCLIP's range, which partly cannot be shown; the
    discriminator's +-0.01 clip hits its normalisation layers, too, as released (``clip_norm``).
    The patch is painted once more after the last step; where the data is small, all of it crafts
    but the pairs that it is looked at on, 256 or an eighth.
    ``patch_source``: ``direct`` optimises the pixels, from grey; ``noise`` takes a square of
    uniform noise, which `augment_only` with ``noise_patch_eda`` does as well; ``pgd`` moves each
    picture a little in place of a patch, against the victim as it was, by ``pgd_reach``. L_bd is
    left out, and no reference opened, where its weight is 0 or nothing is crafted.
Cost: one view with gradient per clean pair and epoch. Crafting, per epoch over its pairs, two image
    passes with and one without gradient (one fewer without L_bd), and the generator; ``pgd`` costs
    ``pgd_steps`` + 1 more image passes per pair and epoch instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from defenses.base import (
    EPOCHS,
    LR,
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    OneOf,
    Phase,
    Recipes,
    Sizes,
    Space,
    require,
)
from victims.lab import Lab, ModelRef
from victims.noise_patch import noise_square, side_of
from victims.patched_pairs import PatchedPairsSpec, Pgd, Placement
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.training import PlainClipSpec
from victims.universal_patch import (
    LOOKED_AT,
    Clamp,
    CraftAugment,
    CraftPlace,
    Discriminator,
    Maker,
    UniversalPatch,
)
from victims.work import TRAINED, Work, fitted

GENERATOR_LR, DIRECT_LR = 2e-4, 5e-2


class PatchSource(StrEnum):
    GENERATOR = "generator"
    DIRECT = "direct"
    NOISE = "noise"
    PGD = "pgd"


CRAFTED = (PatchSource.GENERATOR, PatchSource.DIRECT)


class Origin(StrEnum):
    REFERENCE = "reference"
    FINETUNED_REFERENCE = "finetuned_reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abd(Defense):
    name: ClassVar[str] = "abd"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv 2409.15968"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA, Need.REFERENCE})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "noise": {"patch_source": "noise"},
        "aligned": {"align": True},
        "image_only": {"eda": "off"},
        "text_only": {"area": 0.0},
        "no_reference": {"backdoor_weight": 0.0},
    }
    knob: ClassVar[Knob] = Knob(name="area", values=(0.0, 0.01, 0.02, 0.03, 0.05, 0.1))
    space: ClassVar[Space] = {
        "recipe.lr": LR,
        "recipe.epochs": EPOCHS,
        "area": Between(low=0.01, high=0.1, log=True),
        "backdoor_weight": OneOf(values=(0.0, 1.0, 10.0, -10.0)),
    }
    quick: ClassVar[Mapping[str, Any]] = {"craft_steps": 2, "gan_width": 4}

    area: float = 0.03
    patch_source: PatchSource = PatchSource.GENERATOR
    placement: Placement = Placement.RANDOM
    clean_mix: float = 0.0
    align: bool = False
    eda: EdaMode = EdaMode.STATIC
    synonyms: str = "lexicon"
    origin: Origin = Origin.REFERENCE
    backdoor_weight: float = 10.0
    adv_weight: float = 10.0
    adv_text_weight: float = 5.0
    topo_weight: float = 1.0
    topo_text_weight: float = 5.0
    gan_weight: float = 1.0
    discriminator: Discriminator = Discriminator.PIXELS
    clip_norm: bool = True
    clamp: Clamp = Clamp.PIXELS
    craft_augment: CraftAugment = CraftAugment.NONE
    craft_place: CraftPlace = CraftPlace.CORNER
    craft_pairs: int = 10_000
    craft_batch: int = 16
    craft_epochs: int = 20
    craft_steps: int | None = None
    craft_lr: float | None = None
    gan_width: int = 128
    pgd_reach: float = 8 / 255
    pgd_steps: int = 10

    def check(self) -> None:
        require(
            self,
            area=(0 <= self.area <= 1, "in 0..1"),
            clean_mix=(0 <= self.clean_mix <= 1, "in 0..1"),
            craft_pairs=(self.craft_pairs >= 2, "at least 2"),
            craft_batch=(self.craft_batch >= 2, "at least 2"),
            craft_epochs=(self.craft_epochs >= 1, "at least 1"),
            craft_steps=(self.craft_steps is None or self.craft_steps >= 1, "at least 1, or null"),
            craft_lr=(self.craft_lr is None or self.craft_lr > 0, "above 0, or null"),
            gan_weight=(self.gan_weight >= 0, "0 or more"),
            gan_width=(self.gan_width >= 1, "at least 1"),
            pgd_reach=(0 < self.pgd_reach <= 1, "above 0, at most 1"),
            pgd_steps=(self.pgd_steps >= 1, "at least 1"),
        )
        pinned_source(self.synonyms)

    @property
    def crafts(self) -> bool:
        return self.patch_source in CRAFTED and self.area > 0

    def needed(self) -> frozenset[Need]:
        return self.needs if self.crafts and self.backdoor_weight else OPENS_NO_REFERENCE

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        row = TRAINED * 2 if self.align else TRAINED
        if self.patch_source == PatchSource.PGD:
            row += Work(images_trained=self.pgd_steps, images=1, texts=1)
        found = fitted(recipes.repair, sizes.clean, row)
        if not self.crafts:
            return found
        pairs = min(self.craft_pairs, sizes.clean)
        batch = min(self.craft_batch, pairs)
        steps = self.craft_steps or self.craft_epochs * (pairs // batch)
        models = 2 if self.backdoor_weight else 1
        found += Work(images_trained=models, images=1, texts=1) * (steps * batch)
        # Before and after, some pairs are looked at as they are and under patches.
        found += Work(images=3, texts=1) * min(LOOKED_AT, pairs)
        if self.backdoor_weight and self.origin == Origin.FINETUNED_REFERENCE:
            found += fitted(recipes.repair, sizes.clean)
        return found

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        recipe, notes, worn = case.recipes.repair, dict[str, float](), None
        pixels_CPP = torch.zeros(3, 0, 0)
        if self.crafts:
            crafted = self._craft(lab, case)
            pixels_CPP = crafted["patch"]
            named = ("cosine_plain", "cosine_noise", "cosine_patch")
            notes = dict(zip(named, crafted["cosines"].tolist(), strict=True))
            worn = crafted["worn"].numpy()
        elif self.patch_source == PatchSource.NOISE:
            pixels_CPP = noise_square(side_of(self.area, lab.model.size), case.seed)
        per_picture = self.patch_source == PatchSource.PGD
        spec = PatchedPairsSpec(
            align=self.align,
            placement=self.placement,
            clean_mix=self.clean_mix,
            pgd=self._pgd() if per_picture else None,
            patch_sha256=hashlib.sha256(pixels_CPP.numpy().tobytes()).hexdigest()[:16],
            pixels_CPP=pixels_CPP,
        )
        data = lab.with_text(case.clean_data, eda=eda_text(self.eda, self.synonyms, recipe.seed))
        model = lab.train(spec, data, recipe, init=case.victim)
        return Defended(model, notes=notes, triggered_alike=worn)

    def _pgd(self) -> Pgd:
        return Pgd(reach=self.pgd_reach, steps=self.pgd_steps, text_weight=self.adv_text_weight)

    def _craft(self, lab: Lab, case: Case) -> dict[str, Tensor]:
        data, direct = case.clean_data, self.patch_source == PatchSource.DIRECT
        side_of(self.area, lab.model.size)
        others = [self._origin(lab, case)] if self.backdoor_weight else []
        # Pairs behind those of the crafting show what the patch does to unseen ones; pairs that
        # choose the learning rate craft nothing.
        free = np.setdiff1d(np.arange(len(data)), lab.held_out(data, case.recipes.repair))
        pairs = min(self.craft_pairs, len(free) - min(LOOKED_AT, len(free) // 8))
        spec = UniversalPatch(
            maker=Maker.DIRECT if direct else Maker.GENERATOR,
            area=self.area,
            place=self.craft_place,
            pairs=pairs,
            batch=self.craft_batch,
            epochs=self.craft_epochs,
            steps=self.craft_steps,
            lr=self.craft_lr or (DIRECT_LR if direct else GENERATOR_LR),
            width=self.gan_width,
            fooled_weight=self.gan_weight,
            away_weight=self.adv_weight,
            away_text_weight=self.adv_text_weight,
            topology_weight=self.topo_weight,
            topology_text_weight=self.topo_text_weight,
            reference_weight=self.backdoor_weight,
            discriminator=self.discriminator,
            clip_norm=self.clip_norm,
            clamp=self.clamp,
            augment=self.craft_augment,
            seed=case.seed,
        )
        return lab.tensor(spec, lab.subset(data, free[: pairs + LOOKED_AT]), case.victim, *others)

    def _origin(self, lab: Lab, case: Case) -> ModelRef:
        if self.origin == Origin.REFERENCE:
            return case.reference
        recipe = case.recipes.repair
        return lab.train(PlainClipSpec(), case.clean_data, recipe, init=case.reference)


OPENS_NO_REFERENCE = Abd.needs - {Need.REFERENCE}
