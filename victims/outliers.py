"""Local outlier detectors: how sparse the surroundings of a feature are, against a pool of others.

A pool is a set of features; each belongs to a pair, and a picture's distances leave out itself and
its own caption. d_1 <= d_2 <= ... are the distances that are left, N_k(x) the k nearest,
kd(x) = d_k. Larger scores are more suspicious.
Shapes: Q queries, P pool, D features, K neighbours, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import Batch, ReadsText
from victims.corpora import Rows
from victims.models import Clip

# What an undefined or infinite score becomes, and the bound of the scores that have no unit.
CAP = 1000.0
# Smallest d_i / d_k that counts in the dimension: a duplicate adds its logarithm, not infinity.
SMALLEST_RATIO = 1e-4
# Distances held at once, in entries.
CHUNK = 2**22
NO_PAIR = -1


class Detector(StrEnum):
    """Local density (`k_dist`), its ratio to the neighbours' (`slof`), local dimension (`lid`) and
    the ratio weighted by dimension (`dao`); the pair's similarity and a forest over all rows."""

    DAO = "dao"
    SLOF = "slof"
    K_DIST = "k_dist"
    LID = "lid"
    CLIP_SCORE = "clip_score"
    ISOLATION_FOREST = "isolation_forest"


LOCAL = frozenset({Detector.DAO, Detector.SLOF, Detector.K_DIST, Detector.LID})


class Indexing(StrEnum):
    """`released` finds neighbours as the authors' code does: by numbers that count without the row
    itself, looked up where it counts; with d_(k+1) for d_k; with itself and its partner among a
    neighbour's own neighbours."""

    CONSISTENT = "consistent"
    RELEASED = "released"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEmbeddings:
    """The feature of every picture as it comes, before its length becomes 1."""

    name: ClassVar[str] = "image_embeddings"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return model.embed_image(batch.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbeddings(ReadsText):
    """The feature of every caption as it comes, before its length becomes 1."""

    name: ClassVar[str] = "text_embeddings"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        return model.embed_text(batch.tokens)


class Pool(NamedTuple):
    """Features, and which pair each belongs to."""

    feature_PD: Tensor
    pair_P: Tensor

    def unpaired(self) -> Pool:
        """The same features as strangers, of whose pair there is nothing to leave out."""
        return Pool(self.feature_PD, torch.full_like(self.pair_P, NO_PAIR))


class Surroundings(NamedTuple):
    """kd(x), the local dimension LID(x), and the places in the pool of N_k(x)."""

    kd_Q: Tensor
    lid_Q: Tensor
    index_QK: Tensor


def capped(score_Q: Tensor) -> Tensor:
    """No score above `CAP`; one that is no number, or infinite, is `CAP`."""
    return score_Q.where(score_Q.isfinite(), CAP).clamp_max(CAP)


def local_dimension(distance_QK: Tensor, kd_Q: Tensor) -> Tensor:
    """LID = -k / sum of ln max(d_i / kd, 1e-4). Of k equal distances it is `CAP`."""
    ratio_QK = (distance_QK / kd_Q[:, None]).clamp_min(SMALLEST_RATIO)
    return capped(-distance_QK.shape[1] / ratio_QK.log().sum(1))


def surroundings(
    query: Pool, pool: Pool, k: int, indexing: Indexing = Indexing.CONSISTENT
) -> Surroundings:
    """The surroundings of each query in the pool, its own pair left out.

    Euclidean distances in float64, one by one: by products of matrices those of near neighbours
    would be rounding noise.
    """
    released = indexing == Indexing.RELEASED
    rows = max(1, CHUNK // len(pool.pair_P))
    query_QD, pool_PD = query.feature_PD.double(), pool.feature_PD.double()
    parts = []
    for start in range(0, len(query_QD), rows):
        chunk = slice(start, start + rows)
        mode = "donot_use_mm_for_euclid_dist"
        distance_QP = torch.cdist(query_QD[chunk], pool_PD, compute_mode=mode)
        own_QP = query.pair_P[chunk, None] == pool.pair_P
        found = distance_QP.masked_fill_(own_QP, torch.inf).topk(k + released, largest=False)
        kd_Q, index_QK = found.values[:, -1], found.indices[:, :k]
        if released:
            index_QK = index_QK - own_QP.cumsum(1).gather(1, index_QK)
        parts.append((kd_Q, local_dimension(found.values[:, :k], kd_Q), index_QK))
    return Surroundings(*(torch.cat(column) for column in zip(*parts, strict=True)))


def local_scores(
    detector: Detector, query: Pool, pool: Pool, k: int, indexing: Indexing = Indexing.CONSISTENT
) -> Tensor:
    """How far each query is an outlier of its surroundings, float64."""
    here = surroundings(query, pool, k, indexing)
    if detector == Detector.K_DIST:
        return here.kd_Q
    if detector == Detector.LID:
        return here.lid_Q
    members = pool if indexing == Indexing.CONSISTENT else pool.unpaired()
    there = surroundings(members, pool, k, indexing)
    ratio_QK = here.kd_Q[:, None] / there.kd_Q[here.index_QK]
    if detector == Detector.SLOF:
        return capped(ratio_QK.mean(1))
    return capped((there.lid_Q[here.index_QK] * ratio_QK.log()).mean(1))


def pair_scores(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    """Minus the cosine of picture and caption."""
    return -F.cosine_similarity(image_ND.double(), text_ND.double(), dim=1)


def forest_scores(query_QD: Tensor, pool_PD: Tensor, seed: int, trees: int = 100) -> Tensor:
    """How early random splits of the pool isolate a query (Liu, Ting, Zhou 2008)."""
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=trees, random_state=seed % 2**32)
    forest.fit(pool_PD.cpu().numpy())
    return -torch.from_numpy(forest.score_samples(query_QD.cpu().numpy())).double()


def reference_batches(order_N: Rows, size: int) -> Iterator[tuple[Rows, int]]:
    """The rows in batches of ``size`` (of all rows, where there are fewer), the last one filled up
    from the start; and how many rows of a batch are not such a filling."""
    size = min(size, len(order_N))
    for start in range(0, len(order_N), size):
        fresh = order_N[start : start + size]
        yield np.concatenate([fresh, order_N[: size - len(fresh)]]), len(fresh)
