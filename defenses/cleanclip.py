"""CleanCLIP: fine-tune on clean pairs, with a contrastive loss inside each modality.

Idea: re-organise pictures and captions each on their own, and the shortcut between a trigger and a
    caption weakens.
Reference: Bansal, Singhi, Yang, Yin, Grover, Chang, "CleanCLIP: Mitigating Data Poisoning Attacks
    in Multimodal Contrastive Learning", ICCV 2023, arXiv 2303.03323.
Symbols: I', T' = the augmented views; clip_weight, inmodal_weight = the weights of L_mm and L_ss.
Where: L = clip_weight L_mm + inmodal_weight L_ss, L_ss = 1/2 [CE(I, I') + CE(T, T')] ->
    `InModal.forward`; one direction only, nothing detached, the model's own scale.
Differences: AutoAugment acts at the model's input size, the released code applies it to the
    full-size picture before resizing; EDA draws do not depend on the order of Python's sets; end
    tokens of long captions are kept; schedule and optimizer state as in finetune.
Cost: two views with gradient per clean pair and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

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
    Phase,
    Space,
)
from victims.augment import augment, policy_from
from victims.batches import Batch, cat_tokens
from victims.draws import Draws
from victims.lab import Lab
from victims.losses import clip_loss, in_modal_loss
from victims.models import Clip
from victims.recipe import Clock
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.training import Objective


class Side(StrEnum):
    BOTH = "both"
    IMAGE = "image"
    TEXT = "text"


class InModal(Objective):
    def __init__(self, spec: InModalSpec) -> None:
        super().__init__()
        self.spec = spec

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": augment(self.spec.image_policy, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec, s = self.spec, model.scale
        clean_BCHW, augmented_BCHW = batch.image.float() / 255, batch.views["image"]
        if spec.concat_views:
            images = torch.cat([clean_BCHW, augmented_BCHW])
            image_BD, view_BD = model.encode_image(images).chunk(2)
            tokens = cat_tokens(batch.tokens, batch.texts["eda"])
            text_BD, eda_BD = model.encode_text(tokens).chunk(2)
        else:
            image_BD, view_BD = model.encode_image(clean_BCHW), model.encode_image(augmented_BCHW)
            text_BD = model.encode_text(batch.tokens)
            eda_BD = model.encode_text(batch.texts["eda"])
        terms = {"clip": spec.clip_weight * clip_loss(image_BD, text_BD, s)}
        if spec.side != Side.TEXT:
            terms["inmodal_image"] = spec.inmodal_weight * in_modal_loss(image_BD, view_BD, s)
        if spec.side != Side.IMAGE:
            terms["inmodal_text"] = spec.inmodal_weight * in_modal_loss(text_BD, eda_BD, s)
        return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class InModalSpec:
    name: ClassVar[str] = "in_modal"
    version: ClassVar[int] = 1

    clip_weight: float
    inmodal_weight: float
    image_policy: str
    side: Side
    concat_views: bool

    def build(self, model: Clip) -> Objective:
        return InModal(self)


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
