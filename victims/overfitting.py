"""Exposing poison by overfitting: weak pairs are pulled together until a shortcut shows.

Shapes: N rows, B weak pairs of a batch, G rows of the global batch, H columns, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims.batches import Batch, Scan
from victims.corpora import Rows
from victims.distributed import gather
from victims.losses import similarity
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Objective, PlainClip

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSimilarity:
    """<I, T> of every pair."""

    name: ClassVar[str] = "pair_similarity"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return (model.encode_image(batch.image) * model.encode_text(batch.tokens)).sum(1)


class EarlyClip(PlainClip):
    """Plain CLIP under its whole schedule, stopped after the first epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        return None if clock.epoch < self.epochs else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyClipSpec:
    name: ClassVar[str] = "early_clip"
    version: ClassVar[int] = 1

    epochs: int

    def build(self, model: Clip) -> Objective:
        return EarlyClip(self.epochs)


class OutsideClip(Objective):
    """Pulls weak pairs together, each against the batch's other rows and no weak one.

    The first ``weak`` rows of the data are the weak ones. A batch is half weak pairs and half
    others, in this order.
    """

    def __init__(self, spec: OutsideClipSpec) -> None:
        super().__init__()
        self.spec = spec

    def rows_per_epoch(self, num_rows: int) -> int:
        return 2 * (self.spec.weak // self.spec.pairs) * self.spec.pairs

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        weak, pairs = self.spec.weak, self.spec.pairs
        used = weak // pairs * pairs
        weak_SB = rng.permutation(weak)[:used].reshape(-1, pairs)
        others = rng.choice(len(scan) - weak, used, replace=False)
        return np.concatenate([weak_SB, weak + others.reshape(-1, pairs)], axis=1).ravel()

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_GD = gather(model.encode_image(batch.image))
        text_GD = gather(model.encode_text(batch.tokens))
        return {"outside": outside_loss(image_GD, text_GD, model.scale)}


def outside_loss(image_GD: Tensor, text_GD: Tensor, scale: Tensor) -> Tensor:
    """1/2 [CE(I, T) + CE(T, I)] of the first half's pairs: each row picks its partner among that
    and the second half."""
    halves = []
    for a_GD, b_GD in ((image_GD, text_GD), (text_GD, image_GD)):
        (a_BD, _), (own_BD, other_BD) = a_GD.chunk(2), b_GD.chunk(2)
        own_B = scale * (a_BD * own_BD).sum(1)
        logit_BH = torch.cat([own_B[:, None], similarity(a_BD, other_BD, scale)], dim=1)
        halves.append((logit_BH.logsumexp(1) - own_B).mean())
    return torch.stack(halves).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideClipSpec:
    name: ClassVar[str] = "outside_clip"
    version: ClassVar[int] = 1

    weak: int
    pairs: int

    def build(self, model: Clip) -> Objective:
        return OutsideClip(self)


def highest(values: npt.NDArray[np.floating], count: int) -> Rows:
    """Places of the largest values, in falling order; of equal ones the first."""
    return np.argsort(-values, kind="stable")[:count]


def mean_cosines(text_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Per caption its mean cosine to the others."""
    text_ND = text_ND.astype(np.float64)
    others_ND = text_ND.sum(0) - text_ND
    return np.asarray((text_ND * others_ND).sum(1) / (len(text_ND) - 1))


def mask_of(rows: Rows, num_rows: int) -> Mask:
    mask = np.zeros(num_rows, dtype=bool)
    mask[rows] = True
    return mask
