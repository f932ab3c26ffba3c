"""Controls: what a defense's success could be owed to, one cause each.

Idea: a defense number means nothing alone. It needs the undefended model above it, perfect
    knowledge below it and chance beside it. Controls are entries of the same grid, shown beside
    the defenses and never ranked with them.
Reference: none; oracle and random rows are customary in poison filtering.
Symbols: r = ``recall``; q = ``fraction``; FIT = the victim's own recipe from its own start weights.
Where: each control is its `apply`.
Differences: none known.
Cost: `none` and `clean_model` nothing; the filters and `clean_training` one victim training, which
    `clean_training` shares with the rate-0 victim; the fine-tunes as the method they imitate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from defenses.base import (
    Case,
    Defended,
    Defense,
    Fidelity,
    Need,
    Phase,
    Recipes,
    Sizes,
    Track,
    rows_in,
    trained_without,
)
from victims.augment import Policy, augment, seeded
from victims.batches import Batch
from victims.draws import Draws, numpy_rng
from victims.errors import UsageError, unknown
from victims.lab import Lab
from victims.losses import clip_loss
from victims.models import Clip
from victims.recipe import Clock
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.training import Objective, PlainClipSpec
from victims.work import Work, fitted

# Pair views with gradient per clean pair and epoch, for `same_budget_finetune`.
VIEWS_PER_PAIR = {"finetune": 1, "cleanclip": 2}

# Image policy and EDA of each policy name, for `augment_only`.
POLICIES = {
    "none": ("none", EdaMode.OFF),
    "autoaugment_eda": ("autoaugment", EdaMode.STATIC),
    "simclr_eda": ("simclr", EdaMode.STATIC),
    "noise_erase": ("noise_erase", EdaMode.OFF),
    "noise_patch_eda": ("noise_patch", EdaMode.STATIC),
}


class Budget(StrEnum):
    STEPS = "steps"
    VIEWS = "views"


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UsageError(f"{name} must lie in 0..1, got {value}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDefense(Defense):
    """The undefended victim."""

    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def apply(self, lab: Lab, case: Case) -> Defended:
        return Defended(case.victim)


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanModel(Defense):
    """The public reference, untouched: how much of an ASR is no backdoor at all."""

    name: ClassVar[str] = "clean_model"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def apply(self, lab: Lab, case: Case) -> Defended:
        return Defended(case.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanTraining(Defense):
    """FIT on the data with every poisoned row restored: the ceiling of training-time defenses."""

    name: ClassVar[str] = "clean_training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.START, Need.TRUTH})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def apply(self, lab: Lab, case: Case) -> Defended:
        data, recipe = case.truth.restored, case.recipes.victim
        return Defended(lab.train(lab.plain(recipe), data, recipe, init=case.start))


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleFilter(Defense):
    """FIT without the poisoned rows, or without a random share ``recall`` of them."""

    name: ClassVar[str] = "oracle_filter"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.START, Need.TRUTH})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    recall: float = 1.0

    def check(self) -> None:
        _share("oracle_filter: recall", self.recall)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        poisoned = np.flatnonzero(case.truth.poisoned)
        count = round(self.recall * len(poisoned))
        # The order of the draw does not depend on the recall, so that a larger one drops more of
        # the same rows.
        rng = numpy_rng(case.seed, "oracle", case.suspect_data.key)
        return _filtered(lab, case, rng.permutation(poisoned)[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialOracle(Defense):
    """`oracle_filter` with a detector's recall instead of 1."""

    name: ClassVar[str] = "partial_oracle"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = OracleFilter.needs
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "r50": {"recall": 0.5},
        "r99": {"recall": 0.99},
    }

    recall: float = 0.9

    def check(self) -> None:
        _share("partial_oracle: recall", self.recall)

    def apply(self, lab: Lab, case: Case) -> Defended:
        return OracleFilter(recall=self.recall).apply(lab, case)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomFilter(Defense):
    """FIT without floor(q N) uniformly drawn rows: what dropping data does by itself."""

    name: ClassVar[str] = "random_filter"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.START})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    fraction: float = 0.1

    def check(self) -> None:
        _share("random_filter: fraction", self.fraction)

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        return fitted(recipes.victim, sizes.suspect - rows_in(self.fraction, sizes.suspect))

    def apply(self, lab: Lab, case: Case) -> Defended:
        num_rows = len(case.suspect_data)
        count = rows_in(_share("random_filter: fraction", self.fraction), num_rows)
        rng = numpy_rng(case.seed, "random", case.suspect_data.key)
        return _filtered(lab, case, rng.choice(num_rows, count, replace=False))


def _filtered(lab: Lab, case: Case, dropped: np.ndarray) -> Defended:
    """FIT on the suspect data without the rows in ``dropped``."""
    flagged = np.zeros(len(case.suspect_data), dtype=bool)
    flagged[dropped] = True
    return Defended(trained_without(lab, case, flagged), flagged=flagged)


@dataclass(frozen=True, slots=True, kw_only=True)
class SameBudgetFinetune(Defense):
    """Plain fine-tuning with the recipe and the budget of another method."""

    name: ClassVar[str] = "same_budget_finetune"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"views": {"budget": "views"}}

    like: str = "cleanclip"
    budget: Budget = Budget.STEPS

    def check(self) -> None:
        # Steps come with the recipe of any entry; views are known of these methods alone.
        if self.budget == Budget.VIEWS and self.like not in VIEWS_PER_PAIR:
            raise unknown("method", self.like, VIEWS_PER_PAIR, "same_budget_finetune.like")

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        views = VIEWS_PER_PAIR[self.like] if self.budget == Budget.VIEWS else 1
        return fitted(recipes.repair, sizes.clean) * views

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        recipe = case.recipes.repair
        if self.budget == Budget.VIEWS:
            recipe = replace(recipe, epochs=recipe.epochs * VIEWS_PER_PAIR[self.like])
        spec = lab.plain(recipe)
        return Defended(lab.train(spec, case.clean_data, recipe, init=case.victim))


class AugmentedClip(Objective):
    """L_mm on augmented pictures and captions instead of the pairs themselves."""

    def __init__(self, image_policy: str | Policy) -> None:
        super().__init__()
        self.image_policy = image_policy

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": augment(self.image_policy, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_BD = model.encode_image(batch.views["image"])
        text_BD = model.encode_text(batch.texts["eda"])
        return {"clip": clip_loss(image_BD, text_BD, model.scale)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentedClipSpec:
    name: ClassVar[str] = "augmented_clip"
    version: ClassVar[int] = 1

    image_policy: str | Policy

    def build(self, model: Clip) -> Objective:
        return AugmentedClip(self.image_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentOnly(Defense):
    """Fine-tuning on augmented views and nothing else: augmentation's share in a cure."""

    name: ClassVar[str] = "augment_only"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "control"
    phase: ClassVar[Phase] = Phase.CONTROL
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "simclr": {"policy": "simclr_eda"},
        "noise_erase": {"policy": "noise_erase"},
        "noise_patch": {"policy": "noise_patch_eda"},
    }

    policy: str = "autoaugment_eda"
    like: str = "cleanclip"
    synonyms: str = "lexicon"

    def check(self) -> None:
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES, "augment_only.policy")
        pinned_source(self.synonyms)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        image_policy, eda = POLICIES[self.policy]
        recipe = case.recipes.repair
        if self.policy == "none":
            return Defended(lab.train(PlainClipSpec(), case.clean_data, recipe, init=case.victim))
        text = eda_text(eda, self.synonyms, recipe.seed)
        data = lab.with_text(case.clean_data, eda=text)
        spec = AugmentedClipSpec(image_policy=seeded(image_policy, case.seed))
        return Defended(lab.train(spec, data, recipe, init=case.victim))
