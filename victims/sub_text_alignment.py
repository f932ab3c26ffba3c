"""CleanCLIP's loss, and sub-texts of some rows aligned with their pictures: TA-Cleaner's.

Shapes: B batch of a rank, G global batch, S chosen rows of it, M candidates, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import Batch, Scan, cat_tokens
from victims.corpora import Rows
from victims.distributed import gather
from victims.draws import Draws
from victims.in_modal import InModalSpec, encode_sides, in_modal_terms, in_modal_views
from victims.losses import similarity
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Objective


class Denominator(StrEnum):
    SUBSET = "subset"
    OWN = "own"
    BATCH = "batch"


class Mode(StrEnum):
    ADD = "add"
    REPLACE = "replace"


class Sides(StrEnum):
    BOTH = "both"
    POSITIVE = "positive"
    NEGATIVE = "negative"


class Aligned(StrEnum):
    """Which picture the sub-texts are aligned with."""

    PLAIN = "plain"
    AUGMENTED = "augmented"


def image_to_text(image_SD: Tensor, positive_SD: Tensor, others_SM: Tensor, s: Tensor) -> Tensor:
    """L_i2t: row i must pick P_i over its other candidates, whose logits are given (-inf: none)."""
    own_S1 = s * (image_SD * positive_SD).sum(-1, keepdim=True)
    return (torch.cat([own_S1, others_SM], 1).logsumexp(1) - own_S1[:, 0]).mean()


def text_to_image(positive_SD: Tensor, image_GD: Tensor, own_S: Tensor, s: Tensor) -> Tensor:
    """L_t2i: P_i must pick its picture, in row ``own`` of the batch, among all of them."""
    return F.cross_entropy(similarity(positive_SD, image_GD, s), own_S)


def count_of(k_fraction: float, num_rows: int) -> int:
    """K = floor(k_fraction N), of the decimals as written: 0.29 of 100 rows is 29."""
    return int(Decimal(str(k_fraction)) * num_rows)


class SubTextAlignment(Objective):
    """The rows chosen for the epoch are a buffer: they survive a restart."""

    chosen_N: Tensor

    def __init__(self, spec: SubTextAlignmentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("chosen_N", torch.zeros(spec.num_rows, dtype=torch.bool))

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return in_modal_views(self.spec.base, batch, draws)

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        eligible = np.flatnonzero(scan.columns["eligible"])
        count = min(count_of(self.spec.k_fraction, len(scan)), len(eligible))
        rows = rng.spawn(1)[0].choice(eligible, count, replace=False)
        self.chosen_N.zero_()
        self.chosen_N[torch.from_numpy(rows).to(self.chosen_N.device)] = True
        return None

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec, s = self.spec, model.scale
        seen = encode_sides(spec.base, model, batch)
        terms = in_modal_terms(spec.base, seen, s)
        if not spec.k_fraction:
            return terms
        mine_B = self.chosen_N[batch.rows]
        # Which rows of the global batch are chosen, and which captions are one and the same.
        marks_G2 = gather(torch.stack([mine_B.long(), batch.columns["caption"]], 1))
        chosen_G, caption_G = marks_G2[:, 0].bool(), marks_G2[:, 1]
        image_BD = seen.image_BD if spec.aligned == Aligned.PLAIN else seen.view_BD
        self.watched = {"chosen": chosen_G.sum().float()}
        named = ("sub_image",) if spec.sides == Sides.NEGATIVE else ("sub_image", "sub_text")
        if not chosen_G.any():
            return terms | {name: image_BD.new_zeros(()) for name in named}

        image_GD, text_GD = gather(image_BD), gather(seen.text_BD)
        if spec.mode == Mode.REPLACE:
            logit_GG = similarity(text_GD, gather(seen.eda_BD), s)
            terms["inmodal_text"] = spec.base.inmodal_weight / 2 * rows_loss(logit_GG, ~chosen_G)
        subs = {name: batch.texts[name][mine_B] for name in spec.texts}
        encoded = _encoded(model, subs, mine_B, seen.text_BD)
        image_SD = image_GD[chosen_G]
        positive_SD = encoded["positive"][chosen_G] if "positive" in encoded else text_GD[chosen_G]
        negative_SD = encoded["negative"][chosen_G] if "negative" in encoded else None
        others_SM = self._others(image_SD, positive_SD, negative_SD, s)
        if spec.denominator == Denominator.BATCH:
            same_SG = caption_G[chosen_G, None] == caption_G
            logit_SG = similarity(image_SD, text_GD, s).masked_fill(same_SG, -math.inf)
            others_SM = torch.cat([others_SM, logit_SG], 1)
        loss = image_to_text(image_SD, positive_SD, others_SM, s)
        terms["sub_image"] = spec.weight / 2 * loss
        if "sub_text" in named:
            loss = text_to_image(positive_SD, image_GD, chosen_G.nonzero()[:, 0], s)
            terms["sub_text"] = spec.weight / 2 * loss
        return terms

    def _others(
        self, image_SD: Tensor, positive_SD: Tensor, negative_SD: Tensor | None, s: Tensor
    ) -> Tensor:
        """s I_i.X for the sub-texts X of S that row i must not pick; -inf where there is none."""
        logits = [image_SD.new_zeros(len(image_SD), 0)]
        if negative_SD is not None:
            logit_SS = similarity(image_SD, negative_SD, s)
            own = self.spec.denominator == Denominator.OWN
            logits.append(logit_SS.diagonal()[:, None] if own else logit_SS)
        if self.spec.sides != Sides.NEGATIVE and self.spec.denominator != Denominator.OWN:
            diagonal_SS = torch.eye(len(image_SD), dtype=torch.bool, device=image_SD.device)
            logit_SS = similarity(image_SD, positive_SD, s)
            logits.append(logit_SS.masked_fill(diagonal_SS, -math.inf))
        return torch.cat(logits, 1)


def rows_loss(logit_GG: Tensor, kept_G: Tensor) -> Tensor:
    """CE of the kept rows with the diagonal as targets; 0 where no row is kept."""
    target_G = torch.arange(len(logit_GG), device=logit_GG.device)
    loss_G = F.cross_entropy(logit_GG, target_G, reduction="none")
    return (loss_G * kept_G).sum() / kept_G.sum().clamp(min=1)


def _encoded(
    model: Clip, tokens: Mapping[str, Tensor], mine_B: Tensor, text_BD: Tensor
) -> dict[str, Tensor]:
    """Features of the chosen rows' sub-texts at their rows of the global batch, GD.

    Every rank hands over a whole batch, 0 where a row has none, so that they can be gathered; and
    one that depends on its weights even without chosen rows, as the backward pass is gathered too.
    """
    found = dict.fromkeys(tokens, 0 * text_BD)
    if mine_B.any():
        rows_TU = list(tokens.values())
        joined = rows_TU[0] if len(rows_TU) == 1 else cat_tokens(*rows_TU)
        features = model.encode_text(joined).chunk(len(rows_TU))
        for name, part_SD in zip(tokens, features, strict=True):
            found[name] = found[name].index_put((mine_B,), part_SD)
    return {name: gather(feature_BD) for name, feature_BD in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SubTextAlignmentSpec:
    name: ClassVar[str] = "sub_text_alignment"
    version: ClassVar[int] = 1

    base: InModalSpec
    num_rows: int
    k_fraction: float
    weight: float
    denominator: Denominator
    mode: Mode
    sides: Sides
    aligned: Aligned

    @property
    def texts(self) -> tuple[str, ...]:
        """The sub-texts that are aligned."""
        return ("positive", "negative") if self.sides == Sides.BOTH else (self.sides.value,)

    def build(self, model: Clip) -> Objective:
        return SubTextAlignment(self)
