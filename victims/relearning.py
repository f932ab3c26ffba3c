"""Relearning a clean part of the data while a judge guides the unlearning of another part.

L = L_re + alpha L_kd + beta L_un, each a mean over its own rows of the global batch. The rows that
are in neither part are among the captions that the unlearned ones are rated against.
Shapes: G rows of the global batch, C clean ones, M captions they are rated against, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import Batch, Scan
from victims.caption_bank import own_first
from victims.corpora import Rows
from victims.distributed import gather
from victims.losses import similarity
from victims.models import Clip
from victims.recipe import Clock
from victims.selection import ImageFeatures, TextFeatures, retrieved
from victims.training import Objective

DROP = 0.01  # of retrieval among held-out pairs, at which the fit ends


class Sides(StrEnum):
    IMAGE = "image"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Captions to repair against. The judge's features follow from the data's columns."""

    captions: tuple[str, ...]
    numbers: tuple[int, ...]
    text_MD: Tensor = field(metadata={"keyed": False}, compare=False)


def relearn_term(
    image_GD: Tensor, text_GD: Tensor, scale: Tensor | float, clean_G: Tensor
) -> Tensor:
    """L_mm over the clean rows of gathered features; 0, with gradient 0, if there are none."""
    logit_CC = similarity(image_GD[clean_G], text_GD[clean_G], scale)
    if not len(logit_CC):
        return 0.0 * image_GD.sum()
    target_C = torch.arange(len(logit_CC), device=logit_CC.device)
    return (F.cross_entropy(logit_CC, target_C) + F.cross_entropy(logit_CC.T, target_C)) / 2


def mean_over(value_G: Tensor, chosen_G: Tensor) -> Tensor:
    """The mean over the chosen rows; 0, with gradient 0, if there are none."""
    return (value_G * chosen_G).sum() / chosen_G.sum().clamp(min=1)


def unlearn_term(logit_GM: Tensor, epsilon: float) -> Tensor:
    """log(p + epsilon) of each row's own caption, which stands first."""
    return (logit_GM.softmax(1)[:, 0] + epsilon).log()


def distill_term(judge_GM: Tensor, logit_GM: Tensor, temperature: float) -> Tensor:
    """T^2 KL(judge || f) of each row at temperature T; both leave out the same captions."""
    log_q, log_p = [(x / temperature).log_softmax(1) for x in (judge_GM, logit_GM)]
    gap_GM = (log_q - log_p).masked_fill(judge_GM.isinf(), 0.0)
    return temperature**2 * (log_q.exp() * gap_GM).sum(1)


class RelearnUnlearn(Objective):
    """What retrieval among the held-out rows was, now and at best, is in buffers."""

    held: Tensor
    best: Tensor
    tokens_MT: Tensor
    judge_MD: Tensor
    number_M: Tensor

    def __init__(self, spec: RelearnUnlearnSpec, model: Clip) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("held", torch.tensor(0.0))
        self.register_buffer("best", torch.tensor(0.0))
        if spec.bank is not None:
            tokens = torch.from_numpy(model.tokenizer(spec.bank.captions)).long()
            self.register_buffer("tokens_MT", tokens, persistent=False)
            self.register_buffer("judge_MD", spec.bank.text_MD, persistent=False)
            numbers = torch.tensor(spec.bank.numbers)
            self.register_buffer("number_M", numbers, persistent=False)

    def rows_per_epoch(self, num_rows: int) -> int:
        return min(num_rows - self.spec.num_held, self.spec.most_rows)

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        columns = scan.columns
        if self.spec.num_held and self._fell(scan):
            return np.zeros(0, dtype=np.int64)
        clean = np.flatnonzero(columns["clean"])
        if self.spec.balanced:
            _, group, count = np.unique(
                columns["group"][clean], return_inverse=True, return_counts=True
            )
            share = 1 / (len(count) * count[group])
            clean = rng.spawn(1)[0].choice(clean, len(clean), p=share)
        others = np.flatnonzero(~columns["clean"] & ~columns["held"])
        order = rng.permutation(np.concatenate([others, clean]))
        return order[: self.rows_per_epoch(len(scan))]

    def _fell(self, scan: Scan) -> bool:
        """Whether retrieval among the held-out rows is a point below what it was."""
        rows = np.flatnonzero(scan.columns["held"])
        captions = [str(number) for number in scan.columns["number"][rows]]
        hits = retrieved(scan(ImageFeatures(), rows), scan(TextFeatures(), rows), captions)
        self.held.fill_(float(hits.mean()))
        fell = float(self.held) < float(self.best) - DROP
        self.best.copy_(torch.maximum(self.best, self.held))
        return fell

    def _out(self, column: Mapping[str, Tensor], text_MD: Tensor, number_M: Tensor) -> Tensor:
        """GM: the captions that are no alternatives to a row's own; its own is one of them."""
        same_GM = column["number"][:, None] == number_M
        if self.spec.limit is None:
            return same_GM
        return same_GM | (similarity(column["judge_text"], text_MD, 1.0) > self.spec.limit)

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec, s = self.spec, model.scale
        image_GD = gather(model.encode_image(batch.image))
        text_GD = gather(model.encode_text(batch.tokens))
        column = {name: gather(values) for name, values in batch.columns.items()}
        if spec.num_held:
            self.watched = {"held_out": self.held}

        # Per side: logits of judge and model for every row, and which of them are left out.
        logit_GG = similarity(image_GD, text_GD, s)
        judge_GG = similarity(column["judge_image"], column["judge_text"], spec.teacher_scale)
        if spec.bank is None:
            out_GG = self._out(column, column["judge_text"], column["number"])
            sides = [(judge_GG, logit_GG, out_GG)]
            if spec.sides == Sides.BOTH:
                sides.append((judge_GG.T, logit_GG.T, out_GG))
        else:
            bank_GM = similarity(image_GD, model.encode_text(self.tokens_MT), s)
            judge_GM = similarity(column["judge_image"], self.judge_MD, spec.teacher_scale)
            sides = [(judge_GM, bank_GM, self._out(column, self.judge_MD, self.number_M))]

        distill, unlearn = [], []
        for judge_GM, logit_GM, out_GM in sides:
            taught_GM = own_first(judge_GG.diagonal(), judge_GM, out_GM)
            seen_GM = own_first(logit_GG.diagonal(), logit_GM, out_GM)
            distill.append(distill_term(taught_GM, seen_GM, spec.temperature))
            unlearn.append(unlearn_term(seen_GM, spec.epsilon))
        triggered_G = column["triggered"]
        return {
            "relearn": relearn_term(image_GD, text_GD, s, column["clean"]),
            "distill": spec.alpha * mean_over(torch.stack(distill).mean(0), triggered_G),
            "unlearn": spec.beta * mean_over(torch.stack(unlearn).mean(0), triggered_G),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RelearnUnlearnSpec:
    name: ClassVar[str] = "relearn_unlearn"
    version: ClassVar[int] = 1

    alpha: float
    beta: float
    temperature: float
    epsilon: float
    teacher_scale: float
    limit: float | None
    bank: Bank | None
    sides: Sides
    balanced: bool
    most_rows: int
    num_held: int

    def build(self, model: Clip) -> Objective:
        return RelearnUnlearn(self, model)
