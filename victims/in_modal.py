"""L_ss beside L_mm: contrast inside each modality, between a pair and its augmented view.

The loss of Bansal et al. 2023 (arXiv 2303.03323), and the base of what was built on it.
Shapes: B rows of this rank, D embedding, C H W picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from victims.augment import augment
from victims.batches import Batch, cat_tokens
from victims.draws import Draws
from victims.losses import clip_loss, in_modal_loss
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Objective


class Side(StrEnum):
    BOTH = "both"
    IMAGE = "image"
    TEXT = "text"


class Encoded(NamedTuple):
    """I, I', T and T' of a batch."""

    image_BD: Tensor
    view_BD: Tensor
    text_BD: Tensor
    eda_BD: Tensor


def in_modal_views(spec: InModalSpec, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    return {"image": augment(spec.image_policy, batch.image, draws)}


def encode_sides(spec: InModalSpec, model: Clip, batch: Batch) -> Encoded:
    """One pass over all pictures and one over all captions, unless the views go apart."""
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
    return Encoded(image_BD, view_BD, text_BD, eda_BD)


def in_modal_terms(spec: InModalSpec, seen: Encoded, s: Tensor) -> dict[str, Tensor]:
    """L = clip_weight L_mm + inmodal_weight L_ss, L_ss = 1/2 [CE(I, I') + CE(T, T')]."""
    terms = {"clip": spec.clip_weight * clip_loss(seen.image_BD, seen.text_BD, s)}
    if spec.side != Side.TEXT:
        loss = in_modal_loss(seen.image_BD, seen.view_BD, s)
        terms["inmodal_image"] = spec.inmodal_weight * loss
    if spec.side != Side.IMAGE:
        loss = in_modal_loss(seen.text_BD, seen.eda_BD, s)
        terms["inmodal_text"] = spec.inmodal_weight * loss
    return terms


class InModal(Objective):
    def __init__(self, spec: InModalSpec) -> None:
        super().__init__()
        self.spec = spec

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return in_modal_views(self.spec, batch, draws)

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        s = model.scale
        return in_modal_terms(self.spec, encode_sides(self.spec, model, batch), s)


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
