"""SafeCLIP: the CLIP loss sees only a growing safe part of the data, the rest stays unimodal.

Idea: warm up each modality on its own, take one careful epoch of CLIP at a tiny learning rate, then
    split the data by the similarity of picture and caption before every epoch.
Reference: Yang, Gao, Mirzasoleiman, "Better Safe than Sorry: Pre-training CLIP against Targeted
    Data Poisoning and Backdoor Attacks", ICML 2024, arXiv 2310.05862 (v2).
Symbols: V1, V2 = two views of a picture; U1, U2 = two captions under EDA; NN = nearest entry of a
    bank of ``bank_size`` (None: 2 % of the data, at least a batch); c = cos(V1, U1); p = posterior
    of the upper of two Gaussians over c; r = share of the safe rows; the epochs of phases A and B
    are ``unimodal_epochs`` and ``filter_epochs``, phase C takes the recipe's others; ``filter_lr``
    None: 1 % of the recipe's, which is the paper's 5e-6 at its 5e-4.
Where: L_uni = 1/2 [CE(V2, NN(V1)) + CE(U2, NN(U1))], L_cross = 1/2 [CE(V1, U2) + CE(U1, V2)] ->
    `victims.safe_phases.SafePhase.forward`; p, the first split and r -> `victims.mixture`; phases
    A, B, C -> `apply`.
Differences: c is taken of plain pairs (``score_view: augmented`` as released). Where p falls as c
    rises the share of such rows is noted; ``safe_rule: above_crossing`` goes by c alone. Phase C
    counts its steps on; ``schedule: released`` has counters that take the global epoch: epoch times
    the pass's mean batches in phase C, on a cosine sized for phase C and not clamped. With
    ``train_risky: false`` the schedule still counts the skipped steps. Banks are empty at the start
    of a phase, and an empty one answers with the view itself; moments are carried from phase to
    phase. In regime F training starts from the public model, unlike the paper, with one epoch of A:
    fidelity ADAPTED there. A recipe too short for the phases shortens A first. Flagged are the rows
    that the finished model ranks outside a safe set of the last epoch's size.
Cost: two views with gradient per suspect pair and epoch, a forward pass per epoch of phase C and
    two at the end; replaces the victim's training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from defenses.base import (
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Recipes,
    Regime,
    Sizes,
    Space,
    require,
)
from victims.augment import policy_from
from victims.draws import derive
from victims.errors import UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.mixture import SafeRule, SplitRule, disorder, two_gaussians
from victims.recipe import OptimizerState, Recipe, Schedule, Select
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.safe_phases import Counting, Crop, PairCosine, SafePhaseSpec, ScoreView, Split
from victims.work import SEEN, TRAINED, Work, fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class SafeClip(Defense):
    name: ClassVar[str] = "safeclip"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv 2310.05862"
    phase: ClassVar[Phase] = Phase.PRETRAINING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.START})
    fidelity: ClassVar[Mapping[Regime, Fidelity]] = {
        Regime.S: Fidelity.EXACT,
        Regime.F: Fidelity.ADAPTED,
    }
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Crossed CLIP on everything: augmentation's share.
        "augment_only": {"unimodal_epochs": 0, "filter_epochs": 0, "threshold": 0.0, "cap": 1.0},
        "no_filter_epoch": {"filter_epochs": 0},
        "safe_only": {"train_risky": False},
        "no_banks": {"banks": False},
        "released": {"schedule": "released", "score_view": "augmented"},
    }
    knob: ClassVar[Knob | None] = Knob(name="threshold", values=(0.5, 0.6, 0.7, 0.8, 0.9))
    space: ClassVar[Space] = {
        "recipe.lr": Between(low=1e-6, high=1e-3, log=True),
        "threshold": Between(low=0.5, high=0.99),
        "increment": Between(low=0.002, high=0.1, log=True),
        "cap": Between(low=0.3, high=1.0),
    }

    unimodal_epochs: int | None = None
    filter_epochs: int | None = None
    filter_lr: float | None = None
    threshold: float = 0.9
    increment: float = 0.01
    cap: float = 0.85
    safe_rule: SafeRule = SafeRule.POSTERIOR
    score_view: ScoreView = ScoreView.CLEAN
    schedule: Counting = Counting.FIXED
    train_risky: bool = True
    banks: bool = True
    bank_size: int | None = None
    augment: bool = True
    crop_scale: Crop = (0.08, 1.0)
    eda: EdaMode = EdaMode.STATIC
    synonyms: str = "lexicon"

    def check(self) -> None:
        unimodal, filtering, lr = self.unimodal_epochs, self.filter_epochs, self.filter_lr
        require(
            self,
            threshold=(0 <= self.threshold <= 1, "in 0..1"),
            increment=(0 <= self.increment <= 1, "in 0..1"),
            cap=(0 <= self.cap <= 1, "in 0..1"),
            unimodal_epochs=(unimodal is None or unimodal >= 0, "0 or more, or null"),
            filter_epochs=(filtering is None or filtering >= 0, "0 or more, or null"),
            bank_size=(self.bank_size is None or self.bank_size >= 1, "at least 1, or null"),
            filter_lr=(lr is None or lr > 0, "above 0, or null"),
        )
        policy_from("simclr", crop_scale=self.crop_scale)
        pinned_source(self.synonyms)

    def lengths(self, epochs: int, from_scratch: bool) -> tuple[int, int, int]:
        """Epochs of the phases A, B and C, of which C has at least one."""
        b, a = self.filter_epochs, self.unimodal_epochs
        if b is None:
            b = max(0, min(1, epochs - 1 - (a or 0)))
        if a is None:
            a = min(5 if from_scratch else 1, max(0, epochs - 1 - b))
        if a + b >= epochs:
            raise UsageError(
                f"safeclip: {a} unimodal and {b} filter epochs leave none of the recipe's {epochs}"
                " for phase C. Lower unimodal_epochs or filter_epochs, or give more epochs."
            )
        return a, b, epochs - a - b

    def specs(
        self, recipe: Recipe, num_rows: int, lengths: tuple[int, int, int]
    ) -> list[SafePhaseSpec]:
        """The phases A, B and C."""
        crop_scale = self.crop_scale if self.augment else None
        size = self.bank_size or max(recipe.batch_size, math.ceil(0.02 * num_rows))
        banks = size if self.banks else None
        drawn = self.score_view == ScoreView.AUGMENTED and self.augment
        split = Split(
            rule=SplitRule(
                threshold=self.threshold,
                increment=self.increment,
                cap=self.cap,
                safe_rule=self.safe_rule,
            ),
            scorer=PairCosine(crop_scale=crop_scale, seed=recipe.seed) if drawn else PairCosine(),
            batch_size=recipe.batch_size,
            train_risky=self.train_risky,
            schedule=self.schedule,
            epochs=lengths[2],
            epochs_before=lengths[0] + lengths[1],
        )
        unimodal = SafePhaseSpec(crossed=False, bank_size=banks, crop_scale=crop_scale)
        crossed = SafePhaseSpec(crossed=True, bank_size=None, crop_scale=crop_scale)
        return [unimodal, crossed, replace(unimodal if self.train_risky else crossed, split=split)]

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        # Every epoch but those of phases A and B begins with a look at all rows, and two follow.
        row = TRAINED * 2 if self.augment else TRAINED
        scans = max(1, recipes.victim.epochs - (self.unimodal_epochs or 1)) + 2
        return fitted(recipes.victim, sizes.suspect, row) + SEEN * (scans * sizes.suspect)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        recipe, start = case.recipes.victim, case.start
        if isinstance(recipe.lr, Select):
            raise UsageError(
                "safeclip: it trains as the victim does, at one learning rate; got lr: select"
            )
        lengths = self.lengths(recipe.epochs, start is None)
        specs = self.specs(recipe, len(case.suspect_data), lengths)
        slow = recipe.lr / 100 if self.filter_lr is None else self.filter_lr
        careful = replace(recipe, lr=slow, schedule=Schedule.CONSTANT, warmup_steps=0)
        before, model, data = start, start, case.suspect_data
        for turn, own in enumerate((recipe, careful, recipe)):
            if not lengths[turn]:
                continue
            own = replace(own, epochs=lengths[turn])
            if model != start:
                # A seed of its own: no phase meets the order and the views of the one before.
                seed, carry = derive(recipe.seed, "phase", turn), OptimizerState.CARRY
                own = replace(own, seed=seed, optimizer_state=carry)
            data = self._with_captions(lab, case.suspect_data, recipe.seed, own.seed)
            before = model
            model = lab.train(specs[turn], data, own, init=before, keep_optimizer=turn < 2)
        assert model is not None
        return self._judged(lab, data, specs[2].split, before, model)

    def _with_captions(self, lab: Lab, data: DataRef, run: int, phase: int) -> DataRef:
        """U1 and U2, of one draw for all phases unless they are drawn anew each epoch."""
        if not self.augment:
            return data
        seed = phase if self.eda == EdaMode.PER_EPOCH else run
        one, two = (eda_text(self.eda, self.synonyms, s) for s in (seed, derive(seed, "eda_again")))
        return lab.with_text(data, eda=one, eda_again=two)

    def _judged(
        self, lab: Lab, data: DataRef, split: Split | None, before: ModelRef | None, model: ModelRef
    ) -> Defended:
        """What the splits say of the rows; nothing where phase C starts from random weights."""
        assert split is not None
        notes = {"unimodal_and_filter_epochs": float(split.epochs_before)}
        if before is None:
            return Defended(model, notes=notes)
        c_N = lab.score(split.scorer.at(0), data, before)
        late_N = lab.score(split.scorer.at(split.epochs), data, model)
        first_N = split.rule.split(c_N, None, 0)
        num_first, last = int(first_N.sum()), split.epochs - 1
        last_N = split.rule.split(late_N, num_first if last else None, last)
        p_N = two_gaussians(c_N).posterior_N
        notes |= {
            "first_safe_share": num_first / len(c_N),
            "last_safe_share": float(last_N.mean()),
            "disordered_share": disorder(c_N, p_N),
        }
        return Defended(
            model,
            flagged=~last_N,
            suspicion=-c_N,
            sets={"first_split": ~first_N},
            scores={"posterior": -p_N.astype(np.float32), "finished": -late_N},
            notes=notes,
        )
