"""Local outlier detection and filtering: drop the pairs in sparse regions, and train again.

Idea: in the feature space of a model trained on poisoned pairs, poisoned pictures lie in sparser
    surroundings than clean ones; score every pair with a local density detector, drop the highest
    scores and repeat the victim's training on the rest.
Reference: Huang, Erfani, Li, Ma, Bailey, "Detecting Backdoor Samples in Contrastive Language Image
    Pretraining", ICLR 2025, arXiv 2502.01385.
Symbols: k = ``k`` (null: 16, and 64 for LID alone); R = ``reference_rows``; ``texts`` = whether
    captions are in the reference; ``query`` = which side of a pair is scored; ``rounds`` = shuffles
    averaged over; ``reference`` = the rows of the same batch, or R rows of the clean data.
Where: k-dist, SLOF, LID, DAO -> `victims.outliers.local_scores`; the detectors they are compared
    with -> `pair_scores`, `forest_scores`; batches of R -> `victims.outlier_scores`; dropping and
    training again -> `LocalOutlier.apply`.
Differences: neighbours are found and measured alike, against a pool without the row and its
    partner; ``indexing: released`` gives the authors' shifted places and their neighbours one
    apart. LID takes a maximum with 1e-4, where an added 1e-4 turned equal distances into a large
    negative number. DAO's summand is the logarithm, as the code has it, not the exponential of
    the text. Scores without a unit end at 1000, which also stands for what is not a number, minus
    infinity included (0 in the code). The victim's own pixel normalisation is kept. As long as
    poisons per batch, R times the rate, stay below k, they are not each other's neighbours: the
    notes give the largest such rate.
Cost: a forward pass over the suspect pairs, N R distances twice, and one training of the victim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch

from defenses.base import (
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    OneOf,
    Phase,
    Recipes,
    Sizes,
    Space,
    require,
    rows_in,
    trained_without,
)
from victims.errors import MethodFailure, UsageError
from victims.lab import Lab
from victims.outlier_scores import Features, OutlierScores, Query
from victims.outliers import CAP, LOCAL, Detector, ImageEmbeddings, Indexing, TextEmbeddings
from victims.work import Work, fitted


class Reference(StrEnum):
    BATCH = "batch"
    CLEAN = "clean"


class Retrain(StrEnum):
    START = "start"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOutlier(Defense):
    name: ClassVar[str] = "local_outlier"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2502.01385"
    phase: ClassVar[Phase] = Phase.FILTERING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.SUSPECT_DATA, Need.START})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "slof": {"detector": "slof"},
        "k_dist": {"detector": "k_dist"},
        "lid": {"detector": "lid"},
        "images": {"texts": False},
    }
    knob: ClassVar[Knob | None] = Knob(name="drop", values=(0.001, 0.01, 0.05, 0.1, 0.3))
    space: ClassVar[Space] = {
        "drop": Between(low=0.001, high=0.3, log=True),
        "k": OneOf(values=(4, 8, 16, 32, 64)),
        "reference_rows": OneOf(values=(512, 1024, 2048, 8192)),
        "texts": OneOf(values=(True, False)),
        "normalize": OneOf(values=(True, False)),
        "detector": OneOf(values=("dao", "slof", "k_dist", "lid")),
    }

    detector: Detector = Detector.DAO
    k: int | None = None
    reference_rows: int = 2048
    rounds: int = 1
    texts: bool = True
    query: Query = Query.IMAGE
    normalize: bool = False
    indexing: Indexing = Indexing.CONSISTENT
    reference: Reference = Reference.BATCH
    trees: int = 100
    drop: float = 0.1
    retrain: Retrain = Retrain.START

    @property
    def neighbours(self) -> int:
        if self.k is not None:
            return self.k
        return 64 if self.detector == Detector.LID else 16

    def needed(self) -> frozenset[Need]:
        needs = {Need.VICTIM, Need.SUSPECT_DATA}
        if self.retrain == Retrain.START:
            needs.add(Need.START)
        if self.reference == Reference.CLEAN:
            needs.add(Need.CLEAN_DATA)
        return frozenset(needs)

    def check(self) -> None:
        require(
            self,
            rounds=(self.rounds >= 1, "at least 1"),
            trees=(self.trees >= 1, "at least 1"),
            drop=(0 <= self.drop < 1, "in [0, 1)"),
        )
        # LID of one neighbour compares its distance with itself.
        if not 2 <= self.neighbours <= self.reference_rows - 2:
            raise UsageError(
                f"local_outlier: k must lie in 2..{self.reference_rows - 2}, two below"
                f" reference_rows, got {self.neighbours}"
            )
        if self.query == Query.TEXT and not self.texts:
            raise UsageError(
                "local_outlier: query: text scores captions, and texts: false leaves them out of"
                " the reference; set texts: true or query: image"
            )
        if self.reference == Reference.CLEAN and self.detector == Detector.CLIP_SCORE:
            raise UsageError(
                "local_outlier: clip_score looks at one pair alone and has no reference; leave"
                " reference: batch"
            )
        if self.reference == Reference.CLEAN and self.indexing == Indexing.RELEASED:
            raise UsageError(
                "local_outlier: indexing: released is the authors' code within a batch; with"
                " reference: clean there is no row to leave out. Set indexing: consistent"
            )

    def caution(self, rate: float, num_rows: int) -> str:
        rows = min(self.reference_rows, num_rows)
        if self.detector not in LOCAL or self.reference == Reference.CLEAN:
            return ""
        if rate * rows < self.neighbours:
            return ""
        return (
            f"{rate:g} of {rows} reference rows are {rate * rows:g} expected poisons, not fewer"
            f" than k {self.neighbours}: they are each other's neighbours and look like inliers."
            f" Raise k or lower reference_rows, to R < {self.neighbours / rate:.0f}"
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        clean = sizes.clean if self.reference == Reference.CLEAN else 0
        texts = self.texts or self.detector == Detector.CLIP_SCORE
        found = Work(images=1, texts=texts) * (sizes.suspect + clean)
        if self.retrain == Retrain.START:
            found += fitted(recipes.victim, sizes.suspect - rows_in(self.drop, sizes.suspect))
        return found

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        notes = self._notes(case)
        suspicion = self._scores(lab, case)
        count = rows_in(self.drop, len(suspicion))
        flagged = np.zeros(len(suspicion), dtype=bool)
        flagged[np.argsort(-suspicion, kind="stable")[:count]] = True
        model = case.victim
        if self.retrain == Retrain.START:
            model = trained_without(lab, case, flagged)
        notes |= {"dropped": float(count), "capped": float(np.mean(suspicion == CAP))}
        return Defended(model, flagged=flagged, suspicion=suspicion, notes=notes)

    def _notes(self, case: Case) -> dict[str, float]:
        """Of a local detector: k, R as the data allow it, and the rate below which the poisons of
        a batch are expected to be fewer than k."""
        if self.detector not in LOCAL:
            return {}
        clean = self.reference == Reference.CLEAN
        rows = min(self.reference_rows, len(case.clean_data if clean else case.suspect_data))
        if self.neighbours > rows - 2:
            raise MethodFailure(
                f"local_outlier: {self.neighbours} neighbours among {rows} reference rows; k must"
                f" be at most {rows - 2}"
            )
        notes = {"k": float(self.neighbours), "reference_rows": float(rows)}
        return notes if clean else {**notes, "largest_rate": self.neighbours / rows}

    def _scores(self, lab: Lab, case: Case) -> np.ndarray:
        clean, features = None, None
        if self.reference == Reference.CLEAN:
            data, texts = case.clean_data, None
            images = torch.from_numpy(lab.score(ImageEmbeddings(), data, case.victim))
            if self.texts:
                texts = torch.from_numpy(lab.score(TextEmbeddings(), data, case.victim))
            clean, features = data.key, Features(images, texts)
        spec = OutlierScores(
            detector=self.detector,
            k=self.neighbours,
            reference_rows=self.reference_rows,
            rounds=self.rounds,
            texts=self.texts,
            query=self.query,
            normalize=self.normalize,
            indexing=self.indexing,
            trees=self.trees,
            seed=case.seed,
            clean=clean,
            clean_features=features,
        )
        return lab.tensor(spec, case.suspect_data, case.victim)["score"].numpy()
