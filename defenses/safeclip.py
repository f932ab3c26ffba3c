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
    `SafePhase.forward`; p, the first split and r -> `victims.mixture`; phases A, B, C -> `apply`.
Differences: c is taken of plain pairs (``score_view: augmented`` as released). Where p falls as c
    rises the share of such rows is noted; ``safe_rule: above_crossing`` goes by c alone. Phase C
    counts its steps on; ``schedule: released`` is our reading of counters that take the global
    epoch: epoch times the pass's own batches, on a cosine sized for phase C and not clamped. With
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
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from defenses.base import (
    LR,
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Regime,
    Space,
    require,
)
from victims.augment import augment, policy_from
from victims.batches import Batch, Scan, cat_tokens
from victims.corpora import Rows
from victims.distributed import gather
from victims.draws import Draws, derive, torch_rng
from victims.errors import MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.losses import info_nce
from victims.memory import Memory
from victims.mixture import SafeRule, SplitRule, disorder, two_gaussians
from victims.models import Clip
from victims.recipe import Clock, OptimizerState, Recipe, Schedule, Select
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.training import Objective

Crop = tuple[float, float]


class ScoreView(StrEnum):
    CLEAN = "clean"
    AUGMENTED = "augmented"


class Counting(StrEnum):
    FIXED = "fixed"
    RELEASED = "released"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCosine:
    """c of every pair; with a ``crop_scale`` of one augmented view, drawn by ``seed`` and row."""

    name: ClassVar[str] = "pair_cosine"
    version: ClassVar[int] = 1

    crop_scale: Crop | None = None
    seed: int = 0

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        image_BCHW, tokens_BT = batch.image, batch.tokens
        if self.crop_scale is not None:
            rng = torch_rng(self.seed, int(batch.rows[0]), device=batch.image.device)
            draws = Draws(rng, len(batch), 0, len(batch))
            policy = policy_from("simclr", crop_scale=self.crop_scale)
            image_BCHW, tokens_BT = augment(policy, batch.image, draws), batch.texts["eda"]
        return (model.encode_image(image_BCHW) * model.encode_text(tokens_BT)).sum(-1)

    def at(self, epoch: int) -> PairCosine:
        """The scorer of an epoch of phase C, with draws of its own if it draws."""
        drawn = self.crop_scale is not None
        return replace(self, seed=derive(self.seed, "scan", epoch)) if drawn else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Phase C, of ``epochs`` epochs after ``epochs_before`` of A and B."""

    rule: SplitRule
    scorer: PairCosine
    batch_size: int
    train_risky: bool
    schedule: Counting
    epochs: int
    epochs_before: int


def _recall(bank: Memory, view_BD: Tensor) -> Tensor:
    """NN(V), read before V is written. An empty bank answers with V itself."""
    view_BD = view_BD.detach()
    found_BD = bank.nearest(view_BD) if int(bank.filled) else view_BD
    bank.push(gather(view_BD))
    return found_BD


class SafePhase(Objective):
    """One phase: L_uni, L_cross, or first the one on risky and then the other on safe rows.

    Of phase C these are buffers: ``steps_2``, the risky and the safe steps of the epoch,
    ``first_2``, those of its first epoch, ``first_safe`` and ``num_safe``, the sizes of the first
    and of the latest safe set, and ``started``, the step at which the epoch began.
    """

    steps_2: Tensor
    first_2: Tensor
    first_safe: Tensor
    num_safe: Tensor
    started: Tensor

    def __init__(self, spec: SafePhaseSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.bank_size is not None:
            self.images, self.texts = [Memory(spec.bank_size, width) for _ in range(2)]
        if spec.split is not None:
            for name in ("steps_2", "first_2"):
                self.register_buffer(name, torch.zeros(2, dtype=torch.long))
            for name in ("first_safe", "num_safe", "started"):
                self.register_buffer(name, torch.tensor(0))

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        if self.spec.crop_scale is None:
            return {}
        policy = policy_from("simclr", crop_scale=self.spec.crop_scale)
        return {name: augment(policy, batch.image, draws) for name in ("one", "two")}

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        if self.spec.split is None:
            return None
        rule, size = self.spec.split.rule, self.spec.split.batch_size
        c_N = scan(self.spec.split.scorer.at(clock.epoch))
        first = int(self.first_safe) if clock.epoch else None
        safe_N = rule.split(c_N, first, clock.epoch)
        # Each kind is cut to whole batches, so that none mixes both.
        risky, safe = (rng.permutation(np.flatnonzero(rows_N)) for rows_N in (~safe_N, safe_N))
        self.steps_2[0], self.steps_2[1] = len(risky) // size, len(safe) // size
        if first is None:
            self.first_safe.fill_(len(safe))
            self.first_2.copy_(self.steps_2)
        self.num_safe.fill_(len(safe))
        self.started.fill_(clock.step)
        num_risky, num_safe = (self.steps_2 * size).tolist()
        chosen = np.concatenate([risky[: num_risky * self.spec.split.train_risky], safe[:num_safe]])
        if not len(chosen):
            raise MethodFailure(
                f"the safe set of epoch {clock.epoch + 1} of phase C holds {len(safe)} of"
                f" {len(c_N)} rows and risky rows are not trained on, which leaves no batch of"
                f" {size}. Lower `threshold` or batch_size, or set `train_risky: true`."
            )
        return chosen

    def place(self, clock: Clock) -> tuple[bool, int]:
        """Of a step of phase C: whether it is a safe one, and its number in its pass."""
        assert self.spec.split is not None
        num_risky = int(self.steps_2[0]) * self.spec.split.train_risky
        index = clock.step - int(self.started)
        return (True, index - num_risky) if index >= num_risky else (False, index)

    def pace(self, clock: Clock) -> Clock:
        split = self.spec.split
        if split is None:
            return clock
        safe, index = self.place(clock)
        if split.schedule == Counting.RELEASED:
            own, first = int(self.steps_2[int(safe)]), int(self.first_2[int(safe)])
            epoch = split.epochs_before + clock.epoch + 1
            return Clock(epoch, epoch * own + index, split.epochs * first)
        if split.train_risky:
            return clock
        before = clock.epoch * (clock.total_steps // split.epochs) + int(self.steps_2[0])
        return Clock(clock.epoch, before + index, clock.total_steps)

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        s, crossed = model.scale, self.spec.crossed
        if self.spec.split is not None:
            crossed, _ = self.place(clock)
            self.watched = {"safe_rows": self.num_safe.float()}
        v1_BD, v2_BD, u1_BD, u2_BD = self._features(model, batch)
        if crossed:
            return {"cross": (info_nce(v1_BD, u2_BD, s) + info_nce(u1_BD, v2_BD, s)) / 2}
        if self.spec.bank_size is not None:
            v1_BD, u1_BD = _recall(self.images, v1_BD), _recall(self.texts, u1_BD)
        return {"unimodal": (info_nce(v2_BD, v1_BD, s) + info_nce(u2_BD, u1_BD, s)) / 2}

    def _features(self, model: Clip, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """V1, V2, U1, U2: both views of a side in one batch, or one plain view as both."""
        if self.spec.crop_scale is None:
            image_BD, text_BD = model.encode_image(batch.image), model.encode_text(batch.tokens)
            return image_BD, image_BD, text_BD, text_BD
        images = torch.cat([batch.views["one"], batch.views["two"]])
        tokens = cat_tokens(batch.texts["eda"], batch.texts["eda_again"])
        v1_BD, v2_BD = model.encode_image(images).chunk(2)
        u1_BD, u2_BD = model.encode_text(tokens).chunk(2)
        return v1_BD, v2_BD, u1_BD, u2_BD


@dataclass(frozen=True, slots=True, kw_only=True)
class SafePhaseSpec:
    """``crossed``: L_cross, in a phase without a ``split``. ``bank_size`` None: no banks.
    ``crop_scale`` None: no augmentation."""

    name: ClassVar[str] = "safe_phase"
    version: ClassVar[int] = 1

    crossed: bool
    bank_size: int | None
    crop_scale: Crop | None
    split: Split | None = None

    def build(self, model: Clip) -> Objective:
        return SafePhase(self, int(model.net.text_projection.shape[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SafeClip(Defense):
    name: ClassVar[str] = "safeclip"
    version: ClassVar[int] = 1
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
        "recipe.lr": LR,
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
