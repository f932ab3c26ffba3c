"""Fitting labels: the cross-entropy of every victim that is a classifier, and its augmentation.

Shapes: B batch, G global batch, C channels, S side of a picture, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import Batch
from victims.classifiers import ClassifierSpec, labels
from victims.distributed import gather
from victims.draws import Draws
from victims.models import Clip, NetSpec
from victims.recipe import Augment, ClassifierRecipe, Clock, Recipe
from victims.training import Objective, ObjectiveSpec, PlainClipSpec

PAD = 1 / 8  # of the side, on each side: 4 px at 32


def crop_flip(image_BCSS: Tensor, draws: Draws) -> Tensor:
    """Each picture out of itself with black around, at a place of its own; every other mirrored."""
    size = image_BCSS.shape[-1]
    pad = max(1, round(size * PAD))
    wide_BCWW = F.pad(image_BCSS, (pad,) * 4)
    start_B2 = draws.integers(2 * pad + 1, 2)
    line_S = torch.arange(size, device=image_BCSS.device)
    down_BS, across_BS = (start_B2[:, side, None] + line_S for side in (0, 1))
    across_BS = torch.where(draws.chance(0.5)[:, None], across_BS.flip(1), across_BS)
    rows_B = torch.arange(len(image_BCSS), device=image_BCSS.device)[:, None, None]
    picked_BSSC = wide_BCWW.permute(0, 2, 3, 1)[rows_B, down_BS[:, :, None], across_BS[:, None]]
    return picked_BSSC.permute(0, 3, 1, 2)


class CrossEntropy(Objective):
    """CE of the given labels, on pictures as they are or augmented."""

    def __init__(self, augment: Augment = Augment.NONE) -> None:
        super().__init__()
        self.augment = augment

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": seen(self.augment, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        logit_GK = gather(model.embed_image(batch.views["image"]))
        return {"cross_entropy": F.cross_entropy(logit_GK, gather(labels(batch.tokens)))}


def seen(augment: Augment, image_BCHW: Tensor, draws: Draws) -> Tensor:
    """The pictures as the model is shown them."""
    return crop_flip(image_BCHW, draws) if augment is Augment.CROP_FLIP else image_BCHW


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropySpec:
    name: ClassVar[str] = "cross_entropy"
    version: ClassVar[int] = 1

    augment: Augment = Augment.NONE

    def build(self, model: Clip) -> Objective:
        return CrossEntropy(self.augment)


def plain(model: NetSpec, recipe: Recipe) -> ObjectiveSpec:
    """The loss that a victim of this kind is trained with: CLIP's, or the cross-entropy."""
    if isinstance(model, ClassifierSpec):
        return CrossEntropySpec(augment=augment_of(recipe))
    return PlainClipSpec()


def augment_of(recipe: Recipe) -> Augment:
    return recipe.augment if isinstance(recipe, ClassifierRecipe) else Augment.NONE


def label_numbers(captions: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The class that each caption names: the labels as they were given."""
    number = {name: index for index, name in enumerate(classes)}
    return [number[caption] for caption in captions]
