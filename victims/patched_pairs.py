"""Clean pairs whose pictures carry a patch or noise under rewritten captions: ABD's objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from victims.batches import Batch, cat_tokens
from victims.draws import Draws
from victims.losses import clip_loss, in_modal_loss
from victims.models import Clip, frozen_copy
from victims.noise_patch import anywhere, corner_of, wear
from victims.pixels import rows, unit
from victims.recipe import Clock
from victims.training import Objective
from victims.universal_patch import (
    noise_of_each,
)


class Placement(StrEnum):
    RANDOM = "random"
    FIXED = "fixed"


class PatchedPairs(Objective):
    """``frozen`` is the victim as the fit found it, where each picture gets noise of its own."""

    pixels_CPP: Tensor

    def __init__(self, spec: PatchedPairsSpec, frozen: Clip | None) -> None:
        super().__init__()
        self.spec = spec
        # In a tuple: no module of this one, so neither trained nor put into train mode nor saved.
        self._frozen = (frozen,)
        self.register_buffer("pixels_CPP", spec.pixels_CPP, persistent=False)

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        spec, image_BCHW = self.spec, unit(batch.image)
        adversarial_BCHW = self._adversarial(batch, image_BCHW, draws)
        if spec.clean_mix:
            clean_B = draws.chance(spec.clean_mix).to(image_BCHW.device)
            adversarial_BCHW = torch.where(rows(clean_B), image_BCHW, adversarial_BCHW)
        return {"image": adversarial_BCHW}

    def _adversarial(self, batch: Batch, image_BCHW: Tensor, draws: Draws) -> Tensor:
        spec, side, size = self.spec, self.pixels_CPP.shape[-1], image_BCHW.shape[-1]
        (frozen,) = self._frozen
        if frozen is not None and spec.pgd is not None:
            start_BCHW = 2 * draws.uniform(*image_BCHW.shape[1:]).to(image_BCHW.device) - 1
            pgd = spec.pgd
            return noise_of_each(
                frozen,
                batch,
                start_BCHW,
                reach=pgd.reach,
                steps=pgd.steps,
                text_weight=pgd.text_weight,
            )
        if not side:
            return image_BCHW
        if spec.placement == Placement.FIXED:
            corner = corner_of(side, size)
            return wear(image_BCHW, self.pixels_CPP, corner, corner)
        top_B, left_B = (place_B.to(image_BCHW.device) for place_B in anywhere(draws, side, size))
        return wear(image_BCHW, self.pixels_CPP, top_B, left_B)

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        s, worn_BCHW, eda_BT = model.scale, batch.views["image"], batch.texts["eda"]
        if not self.spec.align:
            worn_BD, eda_BD = model.encode_image(worn_BCHW), model.encode_text(eda_BT)
            return {"clip": clip_loss(worn_BD, eda_BD, s)}
        images_BCHW = torch.cat([unit(batch.image), worn_BCHW])
        image_BD, worn_BD = model.encode_image(images_BCHW).chunk(2)
        text_BD, eda_BD = model.encode_text(cat_tokens(batch.tokens, eda_BT)).chunk(2)
        return {
            "clip": clip_loss(image_BD, text_BD, s),
            "inmodal_image": in_modal_loss(image_BD, worn_BD, s),
            "inmodal_text": in_modal_loss(text_BD, eda_BD, s),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pgd:
    """Noise for every picture: the largest change of a pixel, in [0, 1], and the steps to it."""

    reach: float
    steps: int
    text_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchedPairsSpec:
    """The patch goes into the key by the digest of its bytes; one of side 0 is none."""

    name: ClassVar[str] = "patched_pairs"
    version: ClassVar[int] = 1

    align: bool
    placement: Placement
    clean_mix: float
    pgd: Pgd | None
    patch_sha256: str
    pixels_CPP: Tensor = field(metadata={"keyed": False}, compare=False, repr=False)

    def build(self, model: Clip) -> Objective:
        if self.pgd is None:
            return PatchedPairs(self, None)
        return PatchedPairs(self, frozen_copy(model))
