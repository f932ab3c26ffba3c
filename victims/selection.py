"""Choosing a learning rate as a defender can: by retrieval among held-out pairs (by labels, where
there are labels), never by ASR.

Shapes: N held-out pairs, D embedding, R rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

from victims.batches import Batch
from victims.classifiers import classifier, labels
from victims.models import Clip

Floats = npt.NDArray[np.floating]


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
class TextFeatures:
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
    similar_NN = image_ND.astype(np.float64) @ text_ND.astype(np.float64).T
    names = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    name_N = np.array([names[caption] for caption in captions])
    right_NN = name_N[:, None] == name_N[None, :]
    hits = [_is_first(logits, right_NN) for logits in (similar_NN, similar_NN.T)]
    return np.asarray(np.mean(hits, axis=0))


def _is_first(similar_NN: Floats, right_NN: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    best_N = np.where(right_NN, similar_NN, -np.inf).max(1)
    wrong_N = np.where(right_NN, -np.inf, similar_NN).max(1)
    first: npt.NDArray[np.bool_] = best_N > wrong_N
    return first


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
