"""CleanCLIP: fine-tune on clean pairs, with a contrastive loss inside each modality.

Idea: re-organise pictures and captions each on their own, and the shortcut between a trigger and a
    caption weakens.
Reference: Bansal, Singhi, Yang, Yin, Grover, Chang, "CleanCLIP: Mitigating Data Poisoning Attacks
    in Multimodal Contrastive Learning", ICCV 2023, arXiv 2303.03323.
Symbols: I', T' = the augmented views; clip_weight, inmodal_weight = the weights of L_mm and L_ss.
Where: L = clip_weight L_mm + inmodal_weight L_ss, L_ss = 1/2 [CE(I, I') + CE(T, T')] ->
    `victims.in_modal`; one direction only, nothing detached, the model's own scale.
Differences: AutoAugment acts at the model's input size, the released code applies it to the
    full-size picture before resizing; EDA draws do not depend on the order of Python's sets; end
    tokens of long captions are kept; schedule and optimizer state as in finetune.
Cost: two views with gradient per clean pair and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
    Phase,
    Recipes,
    Sizes,
    Space,
)
from victims.augment import policy_from
from victims.in_modal import InModalSpec, Side
from victims.lab import Lab
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.work import TRAINED, Work, fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanClip(Defense):
    name: ClassVar[str] = "cleanclip"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2303.03323"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    knob: ClassVar[Knob] = Knob(name="inmodal_weight", values=(0.0, 0.5, 1.0, 2.0, 4.0, 8.0))
    space: ClassVar[Space] = {
        "recipe.lr": LR,
        "recipe.epochs": EPOCHS,
        "inmodal_weight": Between(low=0.1, high=10, log=True),
    }

    clip_weight: float = 1.0
    inmodal_weight: float = 1.0
    image_policy: str = "autoaugment"
    eda: EdaMode = EdaMode.STATIC
    synonyms: str = "lexicon"
    side: Side = Side.BOTH
    concat_views: bool = True

    def check(self) -> None:
        policy_from(self.image_policy)
        pinned_source(self.synonyms)

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        return fitted(recipes.repair, sizes.clean, TRAINED * 2)

    def apply(self, lab: Lab, case: Case) -> Defended:
        recipe = case.recipes.repair
        text = eda_text(self.eda, self.synonyms, recipe.seed)
        data = lab.with_text(case.clean_data, eda=text)
        spec = InModalSpec(
            clip_weight=self.clip_weight,
            inmodal_weight=self.inmodal_weight,
            image_policy=self.image_policy,
            side=self.side,
            concat_views=self.concat_views,
        )
        return Defended(lab.train(spec, data, recipe, init=case.victim))
