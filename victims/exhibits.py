"""What a measurement can keep to be looked at: pictures before and after a trigger, where features
lie, how a score tells poisoned rows. Nothing here is a number of the board.

Shapes: N pictures, D embedding, C channels, H W pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from victims.corpora import Corpus, Rows, Stamper
from victims.draws import numpy_rng
from victims.models import Encoder

Floats = npt.NDArray[np.float64]

_PERPLEXITY = 30.0
_MOST_POINTS = 201  # of a curve


class Projection(StrEnum):
    """How features of many dimensions become two."""

    PCA = "pca"
    TSNE = "tsne"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibits:
    """How much of each: ``rows`` pictures of other classes than the target whose features are
    drawn, clean and triggered, and ``pictures`` of them that are shown."""

    name: ClassVar[str] = "exhibits"
    version: ClassVar[int] = 2

    projection: Projection = Projection.PCA
    rows: int = 200
    pictures: int = 3

    def __post_init__(self) -> None:
        if self.rows < 3:
            raise ValueError(f"rows must be at least 3, got {self.rows}")
        if self.pictures < 0:
            raise ValueError(f"pictures cannot be negative, got {self.pictures}")


@dataclass(frozen=True, slots=True)
class Places:
    """Pictures in a plane of features. ``kind`` is clean, triggered, or target: clean ones of the
    target's class."""

    image: Rows
    label: Rows
    kind: list[str]
    place_N2: Floats


def chosen_rows(labels: Rows, target: int, num_rows: int) -> tuple[Rows, Rows]:
    """Rows of other classes and of the target's, drawn the same for every model."""
    order = numpy_rng(0, "exhibits").permutation(len(labels))
    is_target = labels[order] == target
    others, own = order[~is_target][:num_rows], order[is_target][: max(1, num_rows // 4)]
    return others.astype(np.int64), own.astype(np.int64)


@torch.no_grad()
def places(
    encoder: Encoder,
    corpus: Corpus,
    trigger: Stamper,
    target: int,
    exhibits: Exhibits,
    device: torch.device,
    batch_size: int = 256,
) -> Places:
    """Image features of clean and triggered pictures, projected together."""
    labels = np.asarray(corpus.labels)
    others, own = chosen_rows(labels, target, exhibits.rows)

    def encode(rows: Rows, *, stamped: bool) -> list[Tensor]:
        found = []
        for start in range(0, len(rows), batch_size):
            image_BCHW = torch.from_numpy(
                np.array(corpus.images_NCHW[rows[start : start + batch_size]])
            ).to(device)
            shown = trigger.stamp(image_BCHW) if stamped else image_BCHW
            found.append(encoder.encode_image(shown).double().cpu())
        return found

    parts = [
        *encode(others, stamped=False),
        *encode(others, stamped=True),
        *encode(own, stamped=False),
    ]
    kinds = ["clean"] * len(others) + ["triggered"] * len(others) + ["target"] * len(own)
    rows = np.concatenate([others, others, own])
    place_N2 = project(torch.cat(parts).numpy(), exhibits.projection)
    return Places(rows, labels[rows], kinds, place_N2)


def project(feature_ND: Floats, projection: Projection) -> Floats:
    """Two coordinates per row."""
    centred_ND = feature_ND - feature_ND.mean(0)
    if projection is Projection.TSNE:
        from sklearn.manifold import TSNE

        perplexity = min(_PERPLEXITY, (len(feature_ND) - 1) / 3)
        mapped = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(centred_ND)
        return np.asarray(mapped, dtype=np.float64)
    _, _, axis_KD = np.linalg.svd(centred_ND, full_matrices=False)
    axis_KD = axis_KD[:2]
    # An axis has no direction of its own: its largest part points up.
    largest_K = np.abs(axis_KD).argmax(1)
    axis_KD = axis_KD * np.sign(axis_KD[np.arange(len(axis_KD)), largest_K])[:, None]
    found_N2 = np.zeros((len(feature_ND), 2))
    found_N2[:, : len(axis_KD)] = centred_ND @ axis_KD.T
    return found_N2


@dataclass(frozen=True, slots=True)
class Roc:
    """Shares of clean and of poisoned rows at or above each threshold, from none to all."""

    false_positive: Floats
    true_positive: Floats


def roc(suspicion: npt.NDArray[np.floating], poisoned: npt.NDArray[np.bool_]) -> Roc | None:
    """The curve of a score, higher is more suspicious; tied rows pass together. Rows without a
    score (NaN) are left out; None where poisoned or clean ones are lacking."""
    scored = ~np.isnan(suspicion)
    suspicion, poisoned = suspicion[scored], poisoned[scored]
    if not poisoned.any() or poisoned.all():
        return None
    values, place = np.unique(-suspicion.astype(np.float64), return_inverse=True)
    hits, alarms = (
        np.concatenate([[0], np.cumsum(np.bincount(place[which], minlength=len(values)))])
        for which in (poisoned, ~poisoned)
    )
    x, y = alarms / alarms[-1], hits / hits[-1]
    if len(x) > _MOST_POINTS:
        # By length along the curve, so that its steep part keeps its points.
        along = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], _MOST_POINTS)))
        kept = np.unique([0, *kept.clip(max=len(x) - 1), len(x) - 1])
        x, y = x[kept], y[kept]
    return Roc(x, y)


def png(image_CHW: npt.NDArray[np.uint8]) -> bytes:
    """A picture as PNG."""
    from PIL import Image

    output = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_CHW.transpose(1, 2, 0))).save(output, "PNG")
    return output.getvalue()


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """A picture of an evaluation set, as PNG, without and with the trigger."""

    image: int
    label: int
    class_name: str
    clean: bytes
    triggered: bytes


def pictures(corpus: Corpus, trigger: Stamper, target: int, count: int) -> list[BeforeAfter]:
    """Some pictures of other classes than the target."""
    labels = np.asarray(corpus.labels)
    rows = chosen_rows(labels, target, count)[0] if count else np.empty(0, dtype=np.int64)
    found = []
    for row in rows.tolist():
        image_CHW = np.array(corpus.images_NCHW[row])
        stamped_CHW = trigger.stamp(torch.from_numpy(image_CHW)[None])[0].numpy()
        label = int(labels[row])
        before_after = (png(image_CHW), png(stamped_CHW))
        found.append(BeforeAfter(row, label, corpus.classes[label], *before_after))
    return found
