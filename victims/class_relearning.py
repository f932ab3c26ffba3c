"""Relearning the labels of a clean part of the data while a judge guides the unlearning of another.

L = L_re + alpha L_kd + beta L_un, each a mean over its own rows of the global batch, zero if there
are none. All rows of a batch go through the network together, so that its statistics are theirs.
Shapes: N rows, G rows of the global batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import Batch, Scan
from victims.classifiers import labels
from victims.corpora import Rows
from victims.distributed import gather
from victims.draws import Draws
from victims.errors import MethodFailure
from victims.labels import seen
from victims.models import Clip
from victims.recipe import Augment, Clock
from victims.relearning import DROP, distill_term, mean_over
from victims.selection import RightLabel
from victims.training import Objective

Ints = npt.NDArray[np.int64]


def balanced_copies(
    label_N: Ints, clean_N: npt.NDArray[np.bool_], num_classes: int, rng: np.random.Generator
) -> Ints:
    """How often each row is listed: clean rows once and, drawn with replacement, as often again as
    brings every class up to the largest; other rows not at all."""
    copies_N = clean_N.astype(np.int64)
    counts_K = np.bincount(label_N[clean_N], minlength=num_classes)
    if not counts_K.all():
        empty = np.flatnonzero(counts_K == 0)
        raise MethodFailure(
            f"the clean split holds no row of {len(empty)} of {num_classes} classes (the first:"
            f" class {empty[0]}), so it cannot be balanced. Lower sigma1, or set balance: none."
        )
    for label, count in enumerate(counts_K.tolist()):
        rows = np.flatnonzero(clean_N & (label_N == label))
        np.add.at(copies_N, rng.choice(rows, int(counts_K.max()) - count), 1)
    return copies_N


def unlearn_labels(logit_GK: Tensor, label_G: Tensor, epsilon: float) -> Tensor:
    """log(softmax(f)[y] + epsilon) of each row."""
    chance_G = logit_GK.softmax(1).gather(1, label_G[:, None])[:, 0]
    return (chance_G + epsilon).log()


class ClassRelearning(Objective):
    """What the share of right labels among the held-out rows was, now and at best, is in buffers.

    Columns of the data: ``clean``, ``triggered``, ``held`` and ``copies`` per row, ``judge`` NK.
    """

    held: Tensor
    best: Tensor

    def __init__(self, spec: ClassRelearningSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("held", torch.tensor(0.0))
        self.register_buffer("best", torch.tensor(0.0))

    def rows_per_epoch(self, num_rows: int) -> int:
        return min(self.spec.num_listed, self.spec.most_rows)

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        if self.spec.num_held and self._fell(scan):
            return np.zeros(0, dtype=np.int64)
        listed = np.repeat(np.arange(len(scan)), scan.columns["copies"])
        return rng.permutation(listed)[: self.rows_per_epoch(len(scan))]

    def _fell(self, scan: Scan) -> bool:
        """Whether the share of right labels among the held-out rows is a point below its best."""
        hits = scan(RightLabel(), np.flatnonzero(scan.columns["held"]))
        self.held.fill_(float(hits.mean()))
        fell = float(self.held) < float(self.best) - DROP
        self.best.copy_(torch.maximum(self.best, self.held))
        return fell

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": seen(self.spec.augment, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec = self.spec
        if spec.num_held:
            self.watched = {"held_out": self.held}
        logit_GK = gather(model.embed_image(batch.views["image"]))
        label_G = gather(labels(batch.tokens))
        judge_GK, clean_G, triggered_G = (
            gather(batch.columns[name]) for name in ("judge", "clean", "triggered")
        )
        relearn_G = F.cross_entropy(logit_GK, label_G, reduction="none")
        distill_G = distill_term(judge_GK * spec.teacher_scale, logit_GK, spec.temperature)
        unlearn_G = unlearn_labels(logit_GK, label_G, spec.epsilon)
        return {
            "relearn": mean_over(relearn_G, clean_G),
            "distill": spec.alpha * mean_over(distill_G, triggered_G),
            "unlearn": spec.beta * mean_over(unlearn_G, triggered_G),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRelearningSpec:
    name: ClassVar[str] = "class_relearning"
    version: ClassVar[int] = 1

    alpha: float
    beta: float
    temperature: float
    epsilon: float
    teacher_scale: float
    augment: Augment
    num_listed: int
    most_rows: int
    num_held: int

    def build(self, model: Clip) -> Objective:
        return ClassRelearning(self)
