"""Choosing a learning rate as a defender can: by retrieval among held-out pairs (by labels, where
there are labels), never by ASR.

Shapes: N held-out pairs, D embedding, R rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

from victims.batches import Batch, ReadsText
from victims.classifiers import classifier, labels
from victims.models import Clip

Floats = npt.NDArray[np.floating]
# Similarities that are held at once: all of them would be 29 GB for 60,000 pairs.
BLOCK: Final = 2**23


class Choice(TypedDict):
    """How a learning rate was chosen: the metric of every rate on ``held_out`` pairs, and the
    standard error of the best."""

    rates: list[float]
    metric: list[float]
    standard_error: float
    chosen: float
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeatures:
    """The normalised feature of every picture."""

    name: ClassVar[str] = "image_features"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return model.encode_image(batch.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFeatures(ReadsText):
    """The normalised feature of every caption."""

    name: ClassVar[str] = "text_features"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return model.encode_text(batch.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """A classifier's logits of every picture."""

    name: ClassVar[str] = "logits"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return model.embed_image(batch.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class Penultimate:
    """What a classifier's linear layer reads, of every picture."""

    name: ClassVar[str] = "penultimate"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return classifier(model).penultimate(batch.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class RightLabel:
    """1 where a classifier gives the picture the class that its caption names."""

    name: ClassVar[str] = "right_label"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        logit_BK = model.embed_image(batch.image)
        return (logit_BK.argmax(1) == labels(batch.tokens)).float()


def retrieved(image_ND: Floats, text_ND: Floats, captions: Sequence[str]) -> Floats:
    """Per pair: 1 where picture and caption find each other first among all pairs, a half where
    one finds the other.

    A caption equal to the right one counts as right. The rank of the best right answer is the mean
    over its ties with wrong ones, so a tie is no hit.
    """
    names = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    name_N = np.array([names[caption] for caption in captions])
    image_ND, text_ND = image_ND.astype(np.float64), text_ND.astype(np.float64)
    num_pairs = len(name_N)
    # Of every caption, the largest similarity to a right and to a wrong picture so far.
    best_N, wrong_N = np.full((2, num_pairs), -np.inf)
    by_image_N = np.zeros(num_pairs, dtype=bool)
    rows = max(1, BLOCK // max(1, num_pairs))
    for start in range(0, num_pairs, rows):
        block = slice(start, start + rows)
        similar_RN = image_ND[block] @ text_ND.T
        right_RN = name_N[block, None] == name_N[None, :]
        best_RN = np.where(right_RN, similar_RN, -np.inf)
        wrong_RN = np.where(right_RN, -np.inf, similar_RN)
        by_image_N[block] = best_RN.max(1) > wrong_RN.max(1)
        np.maximum(best_N, best_RN.max(0), out=best_N)
        np.maximum(wrong_N, wrong_RN.max(0), out=wrong_N)
    return np.asarray(np.mean([by_image_N, best_N > wrong_N], axis=0))


def choose(rates: Sequence[float], hits_RN: Sequence[Floats]) -> Choice:
    """The largest rate whose metric is within one standard error of the best."""
    metric = [float(hits_N.mean()) for hits_N in hits_RN]
    best = int(np.argmax(metric))
    num_pairs = len(hits_RN[best])
    error = float(hits_RN[best].std(ddof=1) / np.sqrt(num_pairs))
    within = [rate for rate, m in zip(rates, metric, strict=True) if m >= metric[best] - error]
    return Choice(
        rates=list(rates),
        metric=metric,
        standard_error=error,
        chosen=max(within),
        held_out=num_pairs,
    )
