"""Local outlier scores of all rows of the suspect data, batch by batch.

Shapes: N pairs, P pool, Q queries, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import score_rows
from victims.corpora import Rows, View
from victims.draws import derive, numpy_rng
from victims.keys import Key
from victims.models import Clip
from victims.outliers import (
    Detector,
    ImageEmbeddings,
    Indexing,
    Pool,
    TextEmbeddings,
    forest_scores,
    local_scores,
    pair_scores,
    reference_batches,
)


class Query(StrEnum):
    IMAGE = "image"
    TEXT = "text"


class Features(NamedTuple):
    """Of some pairs, pictures and, where they are asked for, captions."""

    image_ND: Tensor
    text_ND: Tensor | None

    def pool(self, rows: Rows) -> Pool:
        """The named pairs: their pictures, then their captions."""
        sides = [side_ND[rows] for side_ND in self if side_ND is not None]
        return Pool(torch.cat(sides), torch.arange(len(rows)).repeat(len(sides)))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierScores:
    """Scores of all rows; each depends on the batch that it is compared with."""

    name: ClassVar[str] = "outlier_scores"
    version: ClassVar[int] = 1

    detector: Detector
    k: int
    reference_rows: int
    rounds: int
    texts: bool
    query: Query
    normalize: bool
    indexing: Indexing
    trees: int
    seed: int
    clean: Key | None
    clean_features: Features | None = field(compare=False, repr=False, metadata={"keyed": False})

    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]:
        image_ND = torch.from_numpy(score_rows(model, view, ImageEmbeddings()))
        text_ND = None
        if self.texts or self.detector == Detector.CLIP_SCORE:
            text_ND = torch.from_numpy(score_rows(model, view, TextEmbeddings()))
        if self.detector == Detector.CLIP_SCORE:
            assert text_ND is not None
            return {"score": pair_scores(image_ND, text_ND).float()}
        data, device = self._scaled(Features(image_ND, text_ND)), model.mean_C.device
        score_N = torch.zeros(len(view), dtype=torch.float64)
        for turn in range(self.rounds):
            for number, (rows, query, pool) in enumerate(self._compared(data, turn)):
                here, there = [Pool(*(t.to(device) for t in side)) for side in (query, pool)]
                if self.detector == Detector.ISOLATION_FOREST:
                    seed = derive(self.seed, "forest", turn, number)
                    found_Q = forest_scores(here.feature_PD, there.feature_PD, seed, self.trees)
                else:
                    found_Q = local_scores(self.detector, here, there, self.k, self.indexing)
                score_N[rows] += found_Q.cpu() / self.rounds
        return {"score": score_N.float()}

    def _compared(self, data: Features, turn: int) -> Iterator[tuple[Rows, Pool, Pool]]:
        """The rows in batches: their numbers, their queries, and what these are compared with."""
        num_rows = len(data.image_ND)
        if self.clean_features is not None:
            clean = self._scaled(self.clean_features)
            drawn = numpy_rng(self.seed, "reference", turn).permutation(len(clean.image_ND))
            rows = np.arange(num_rows)
            query = self._queries(data.pool(rows), num_rows, num_rows)
            yield rows, query.unpaired(), clean.pool(drawn[: self.reference_rows])
            return
        order = numpy_rng(self.seed, "outliers", turn).permutation(num_rows)
        for rows, fresh in reference_batches(order, self.reference_rows):
            pool = data.pool(rows)
            yield rows[:fresh], self._queries(pool, len(rows), fresh), pool

    def _queries(self, pool: Pool, num_pairs: int, fresh: int) -> Pool:
        """The first pairs of a pool, by the side that is asked for."""
        first = num_pairs if self.query == Query.TEXT else 0
        side = slice(first, first + fresh)
        return Pool(pool.feature_PD[side], pool.pair_P[side])

    def _scaled(self, features: Features) -> Features:
        if not self.normalize:
            return features
        text_ND = features.text_ND
        return Features(
            F.normalize(features.image_ND, dim=-1),
            None if text_ND is None else F.normalize(text_ND, dim=-1),
        )
