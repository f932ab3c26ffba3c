"""Fine-tune (FT): keep training the victim on clean pairs with its own loss.

Idea: go on with ordinary training, of a CLIP or of a classifier, on guaranteed clean pairs and hope
    that the trigger is forgotten; every repair method must beat this run.
Reference: no paper of its own; the CleanCLIP code path (Bansal et al., ICCV 2023, arXiv
    2303.03323) with its in-modal loss switched off.
Symbols: L_mm = the CLIP loss over the global batch.
Where: L = L_mm -> `PlainClip` of the loop; trainable part -> `Part`.
Differences: the released schedule counts one epoch late and carries Adam's moments over from the
    poisoned run; both are options of the recipe (`schedule`, `optimizer_state`), off by default.
    Weight decay spares every tensor of fewer than two dimensions, but none of a classifier, whose
    loss is the cross-entropy. The knob's rates are a CLIP's.
Cost: one view with gradient per clean pair and epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from torch import nn

from defenses.base import (
    EPOCHS,
    LR,
    LR_KNOB,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Space,
    Track,
)
from victims.lab import Lab
from victims.models import Clip
from victims.training import Objective, PlainClip


class Part(StrEnum):
    BOTH = "both"
    IMAGE = "image"
    TEXT = "text"
    PROJECTIONS = "projections"


# Where open_clip's towers have theirs; those of timm, and texts beside a tower, have others.
PROJECTIONS = (
    *("net.text_projection", "net.text.text_projection"),
    *("net.visual.proj", "net.visual.attnpool.c_proj", "net.visual.head.proj"),
)


class PartialClip(PlainClip):
    """Plain CLIP that moves one part of the model and the logit scale."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def trainable(self, model: Clip) -> Iterable[nn.Parameter]:
        text = model.text_tower()
        for name, parameter in model.named_parameters():
            chosen = {
                Part.IMAGE: name not in text,
                Part.TEXT: name in text,
                Part.PROJECTIONS: name.startswith(PROJECTIONS),
            }[self.part]
            if chosen or name == "net.logit_scale":
                yield parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialClipSpec:
    name: ClassVar[str] = "partial_clip"
    version: ClassVar[int] = 1

    part: Part

    def build(self, model: Clip) -> Objective:
        return PartialClip(self.part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune(Defense):
    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "baseline of arXiv 2303.03323"
    phase: ClassVar[Phase] = Phase.FINETUNING
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    knob: ClassVar[Knob] = LR_KNOB
    space: ClassVar[Space] = {"recipe.lr": LR, "recipe.epochs": EPOCHS}

    trainable: Part = Part.BOTH

    def defined_on(self) -> frozenset[Track]:
        return self.tracks if self.trainable == Part.BOTH else frozenset({Track.MULTIMODAL})

    def apply(self, lab: Lab, case: Case) -> Defended:
        both, recipe = self.trainable == Part.BOTH, case.recipes.repair
        spec = lab.plain(recipe) if both else PartialClipSpec(part=self.trainable)
        return Defended(lab.train(spec, case.clean_data, recipe, init=case.victim))
