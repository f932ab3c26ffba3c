"""Measuring: clean accuracy and attack success, correct by construction.

The target class is left out of every attack metric; clean and triggered pictures share geometry,
since a stamp acts on the very bytes that clean accuracy is measured on; every outcome is kept.
Shapes: B batch, K classes, P templates, D embedding, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import caption_lengths
from victims.corpora import Corpus, Stamper
from victims.errors import MethodFailure, UsageError, near
from victims.keys import digest
from victims.models import Encoder, Tokenizer

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]

# Version of the protocol's metrics: a change of meaning here changes the key of every measurement.
PROTOCOL_VERSION = 3
Z = 1.96


class Measured(Protocol):
    """A measured number as it is stored: ``value`` and ``n``, and an interval if it has one."""

    def as_dict(self) -> dict[str, float | int]: ...


@dataclass(frozen=True, slots=True)
class Share:
    """A share with what it was counted from and its Wilson interval."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n

    def as_dict(self) -> dict[str, float | int]:
        low, high = wilson(self.successes, self.n)
        return {
            "value": self.value,
            "successes": self.successes,
            "n": self.n,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True, slots=True)
class Mean:
    """A number over ``n`` units that is no share, with its interval if there is one."""

    value: float
    n: int
    interval: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, float | int]:
        found: dict[str, float | int] = {"value": self.value, "n": self.n}
        if self.interval is not None:
            found |= {"low": self.interval[0], "high": self.interval[1]}
        return found


def wilson(successes: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a share."""
    p, zz = successes / n, z * z / n
    centre = p + zz / 2
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (centre - half) / (1 + zz), (centre + half) / (1 + zz)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def check_classes(classes: Sequence[str]) -> None:
    """Class names must be unique: equal names are equal text weights, and ties go unseen."""
    seen: dict[str, int] = {}
    for index, name in enumerate(classes):
        if name in seen:
            raise UsageError(
                f"class names must be unique: {name!r} is class {seen[name]} and class {index}."
                " Give one of them another name."
            )
        seen[name] = index


def resolve_target(target: int | str, classes: Sequence[str]) -> int:
    """An index, or the exact name of one class. Substrings never match."""
    if isinstance(target, str):
        hits = [index for index, name in enumerate(classes) if name == target]
        if len(hits) == 1:
            return hits[0]
        if len(hits) > 1:
            raise UsageError(f"target: {target!r} names the classes {hits}; give an index")
        raise UsageError(
            f"target: no class called {target!r}.{near(target, classes)}"
            f" Give an exact name or an index in 0..{len(classes) - 1}. {_some(classes)}"
        )
    if not 0 <= target < len(classes):
        raise UsageError(
            f"target: class {target} is outside 0..{len(classes) - 1}. {_some(classes)}"
        )
    return target


def _some(classes: Sequence[str], most: int = 20) -> str:
    """The names of classes, of many some."""
    if len(classes) <= most:
        return f"Classes: {', '.join(classes)}."
    return (
        f"Some of the {len(classes)} classes: {', '.join(classes[:: len(classes) // most][:most])}."
    )


def templates_digest(templates: Sequence[str]) -> str:
    """Digest of the prompts: the templates filled with X, in order."""
    return digest([template.format("X") for template in templates])[:16]


@torch.no_grad()
def text_head(
    encoder: Encoder,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    batch_size: int = 1024,
    mark: Callable[[str], str] = str,
) -> Tensor:
    """Zero-shot classifier, KD: per class the normalised mean of its normalised prompt features.

    Prompts go through the text tower in batches of whole classes: of 1,000 classes and 80
    templates, the features of all prompts would not fit beside a model.
    """
    step = max(1, batch_size // len(templates))
    means = []
    for start in range(0, len(classes), step):
        some = classes[start : start + step]
        prompts = [mark(template.format(name)) for name in some for template in templates]
        parts = []
        for first in range(0, len(prompts), batch_size):
            tokens = tokenizer(prompts[first : first + batch_size])
            cut = tokens[:, : int(caption_lengths(tokens).max())]
            parts.append(encoder.encode_text(torch.from_numpy(cut).to(device, torch.long)))
        feature_KPD = torch.cat(parts).view(len(some), len(templates), -1)
        means.append(feature_KPD.mean(1))
    return F.normalize(torch.cat(means), dim=-1)


def ranks(score_BK: Tensor, class_B: Tensor) -> Tensor:
    """Rank of a class in each row, from 0. Ties go to the lower index."""
    own_B1 = score_BK.gather(1, class_B[:, None])
    index_K = torch.arange(score_BK.shape[1], device=score_BK.device)
    above_BK = (score_BK > own_B1) | ((score_BK == own_B1) & (index_K < class_B[:, None]))
    return above_BK.sum(1)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Per picture of an evaluation set, clean and triggered. Ranks count from 0."""

    image: Ints
    label: Ints
    clean_prediction: Ints
    triggered_prediction: Ints
    clean_true_rank: Ints
    clean_target_rank: Ints
    triggered_target_rank: Ints

    def columns(self) -> dict[str, Ints]:
        return {name: getattr(self, name) for name in self.__slots__}


@torch.no_grad()
def outcomes(
    encoder: Encoder,
    heads: tuple[Tensor, Tensor],
    corpus: Corpus,
    trigger: Stamper,
    target: int,
    device: torch.device,
    batch_size: int = 256,
) -> Outcomes:
    """Every picture, clean and triggered, through the encoder once.

    Clean pictures are read with the first of the ``heads``, KD, triggered ones with the second,
    whose prompts carry the text side of a trigger that has one.
    """
    head_KD, keyed_KD = heads
    columns: dict[str, list[Tensor]] = {name: [] for name in Outcomes.__slots__}
    for start in range(0, len(corpus), batch_size):
        rows = np.arange(start, min(start + batch_size, len(corpus)))
        image_BCHW = torch.from_numpy(corpus.images_NCHW[rows]).to(device)
        label_B = torch.from_numpy(corpus.labels[rows]).to(device)
        target_B = torch.full_like(label_B, target)
        clean_BK = encoder.encode_image(image_BCHW) @ head_KD.T
        triggered_BK = encoder.encode_image(trigger.stamp(image_BCHW)) @ keyed_KD.T
        if not (clean_BK.isfinite().all() and triggered_BK.isfinite().all()):
            # No class is above a NaN: its rank would be 0, a perfect score.
            raise MethodFailure(
                f"the model scores pictures {start}.. of {corpus.split} with numbers that are not"
                " finite: its weights have diverged. Lower the learning rate."
            )
        batch = {
            "image": torch.from_numpy(rows),
            "label": label_B,
            "clean_prediction": clean_BK.argmax(1),
            "triggered_prediction": triggered_BK.argmax(1),
            "clean_true_rank": ranks(clean_BK, label_B),
            "clean_target_rank": ranks(clean_BK, target_B),
            "triggered_target_rank": ranks(triggered_BK, target_B),
        }
        for name, value in batch.items():
            columns[name].append(value.cpu())
    return Outcomes(
        **{n: torch.cat(parts).numpy().astype(np.int32) for n, parts in columns.items()}
    )


@torch.no_grad()
def clean_accuracy(
    encoder: Encoder, head_KD: Tensor, corpus: Corpus, device: torch.device, batch_size: int = 256
) -> Share:
    """Top-1 zero-shot accuracy on all pictures of a corpus, none of them stamped."""
    hits = 0
    for start in range(0, len(corpus), batch_size):
        rows = np.arange(start, min(start + batch_size, len(corpus)))
        image_BCHW = torch.from_numpy(corpus.images_NCHW[rows]).to(device)
        label_B = torch.from_numpy(corpus.labels[rows]).to(device)
        score_BK = encoder.encode_image(image_BCHW) @ head_KD.T
        if not score_BK.isfinite().all():
            raise MethodFailure(
                f"the model scores pictures {start}.. of {corpus.split} with numbers that are not"
                " finite"
            )
        hits += int((score_BK.argmax(1) == label_B).sum())
    return Share(hits, len(corpus))


def metrics(found: Outcomes, target: int, num_classes: int, ks: Sequence[int]) -> dict[str, Share]:
    """The protocol's metrics from per-image outcomes. Denominators leave out the target class."""
    other = found.label != target
    if not other.any():
        raise UsageError("the evaluation set holds nothing but the target class")
    n, m = len(found.label), int(other.sum())
    shares: dict[str, Share] = {}
    for k in ks:
        if k >= num_classes:
            continue
        hit = found.triggered_target_rank[other] < k
        shares[f"clean_top{k}"] = Share(int((found.clean_true_rank < k).sum()), n)
        shares[f"asr_top{k}"] = Share(int(hit.sum()), m)
        shares[f"target_rate_top{k}"] = Share(int((found.clean_target_rank[other] < k).sum()), m)
        # As published tables count: pictures of the target class in both parts.
        shares[f"asr_all_top{k}"] = Share(int((found.triggered_target_rank < k).sum()), n)
    right = found.triggered_prediction[other] == found.label[other]
    shares["r_acc"] = Share(int(right.sum()), m)
    return shares


@torch.no_grad()
def single_keys(
    encoder: Encoder,
    heads: tuple[Tensor, Tensor],
    corpus: Corpus,
    trigger: Stamper,
    target: int,
    ks: Sequence[int],
    batch_size: int = 256,
) -> dict[str, Share]:
    """Of a trigger with two keys, what each does alone: attack success with the picture stamped
    and the prompts plain (``asr_image_key``), and the other way round (``asr_text_key``)."""
    head_KD, keyed_KD = heads
    rank: dict[str, list[Tensor]] = {"asr_image_key": [], "asr_text_key": []}
    rows = np.flatnonzero(corpus.labels != target)
    for start in range(0, len(rows), batch_size):
        image_BCHW = torch.from_numpy(corpus.images_NCHW[rows[start : start + batch_size]])
        image_BCHW = image_BCHW.to(head_KD.device)
        target_B = torch.full((len(image_BCHW),), target, device=head_KD.device)
        stamped_BK = encoder.encode_image(trigger.stamp(image_BCHW)) @ head_KD.T
        rank["asr_image_key"].append(ranks(stamped_BK, target_B))
        rank["asr_text_key"].append(ranks(encoder.encode_image(image_BCHW) @ keyed_KD.T, target_B))
    return {
        f"{name}_top{k}": Share(int((torch.cat(parts) < k).sum()), len(rows))
        for name, parts in rank.items()
        for k in ks
        if k < len(corpus.classes)
    }


def changed_share(corpus: Corpus, trigger: Stamper, num_images: int = 512) -> float:
    """Share of pictures whose network input the stamp changes; a gate requires 99 %."""
    # A copy: torch warns of pictures that cannot be written to.
    image_BCHW = torch.from_numpy(np.array(corpus.images_NCHW[:num_images]))
    differs_B = (trigger.stamp(image_BCHW) != image_BCHW).flatten(1).any(1)
    return float(differs_B.float().mean())


def detection(
    flagged: npt.NDArray[np.bool_], poisoned: npt.NDArray[np.bool_]
) -> Mapping[str, Share]:
    """How well a defense found the poisoned rows, at its own operating point."""
    if not poisoned.any():
        return {}
    hit, clean, kept = int((flagged & poisoned).sum()), ~poisoned, ~flagged
    missed = int((poisoned & kept).sum())
    found = {
        "recall": Share(hit, int(poisoned.sum())),
        "leak": Share(missed, int(poisoned.sum())),
    }
    if flagged.any():
        found["precision"] = Share(hit, int(flagged.sum()))
        # What it could be at best: a set of a fixed size may be larger than all poison.
        found["precision_bound"] = Share(
            min(int(poisoned.sum()), int(flagged.sum())), int(flagged.sum())
        )
    if clean.any():
        found["clean_removed"] = Share(int((flagged & clean).sum()), int(clean.sum()))
    if kept.any():
        found["contamination"] = Share(missed, int(kept.sum()))
    return found


def separation(
    suspicion: npt.NDArray[np.floating], poisoned: npt.NDArray[np.bool_]
) -> Mapping[str, Measured]:
    """How well a score (higher: more suspicious) ranks poisoned rows above clean ones.

    AUROC with its interval by DeLong, et al. (1988), ties by mid-rank; average precision beside
    the base rate that chance would give; TPR at the threshold whose FPR is at most 1 and 5 %; FPR
    at the first threshold whose TPR is at least 95 %. Tied rows pass a threshold together. Rows
    without a score (NaN) are left out.
    """
    scored = ~np.isnan(suspicion)
    suspicion, poisoned = suspicion[scored], poisoned[scored]
    num_poisoned = int(poisoned.sum())
    num_clean = len(poisoned) - num_poisoned
    if not num_poisoned or not num_clean:
        return {}
    values, counts = np.unique(-suspicion.astype(np.float64), return_inverse=True)
    hits = np.cumsum(np.bincount(counts[poisoned], minlength=len(values)))
    alarms = np.cumsum(np.bincount(counts[~poisoned], minlength=len(values)))
    precision = hits / (hits + alarms)
    average = float((np.diff(hits, prepend=0) * precision).sum() / num_poisoned)
    found: dict[str, Measured] = {
        "auroc": _auroc(suspicion[poisoned], suspicion[~poisoned]),
        "auprc": Mean(average, len(poisoned)),
        "base_rate": Share(num_poisoned, len(poisoned)),
    }
    for percent in (1, 5):
        allowed = hits[alarms <= num_clean * percent / 100]
        found[f"tpr_at_fpr{percent}"] = Share(int(allowed.max(initial=0)), num_poisoned)
    enough = int(np.argmax(hits >= 0.95 * num_poisoned))
    found["fpr_at_tpr95"] = Share(int(alarms[enough]), num_clean)
    return found


def _auroc(high: npt.NDArray[np.floating], low: npt.NDArray[np.floating]) -> Mean:
    """P(high > low) + P(high = low) / 2, and its interval from the placements of both sides."""

    def below(values: npt.NDArray[np.floating], others: npt.NDArray[np.floating]) -> Floats:
        """Per value, the share of the others below it, ties by half."""
        order = np.sort(others)
        left, right = (np.searchsorted(order, values, side) for side in ("left", "right"))
        return np.asarray((left + right) / (2 * len(order)), dtype=np.float64)

    up, down = below(high, low), 1 - below(low, high)
    area = float(up.mean())
    variance = sum(
        float(side.var(ddof=1)) / len(side) if len(side) > 1 else 0.25 for side in (up, down)
    )
    half = Z * math.sqrt(variance)
    return Mean(area, len(high) + len(low), (max(0.0, area - half), min(1.0, area + half)))
