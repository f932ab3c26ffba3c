"""SafeCLIP's phases: unimodal, crossed, and the split of the rows into risky and safe ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from victims.augment import augment, policy_from
from victims.batches import Batch, Scan, cat_tokens
from victims.corpora import Rows
from victims.distributed import gather
from victims.draws import Draws, derive, torch_rng
from victims.errors import MethodFailure
from victims.losses import info_nce
from victims.memory import Memory
from victims.mixture import SplitRule
from victims.models import Clip
from victims.recipe import Clock
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
    ``planned_2``, those of all its epochs, ``first_safe`` and ``num_safe``, the sizes of the first
    and of the latest safe set, and ``started``, the step at which the epoch began.
    """

    steps_2: Tensor
    planned_2: Tensor
    first_safe: Tensor
    num_safe: Tensor
    started: Tensor

    def __init__(self, spec: SafePhaseSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.bank_size is not None:
            self.images, self.texts = [Memory(spec.bank_size, width) for _ in range(2)]
        if spec.split is not None:
            for name in ("steps_2", "planned_2"):
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
            num_epochs = range(self.spec.split.epochs)
            sizes = [len(safe), *(rule.size(len(safe), e, len(c_N)) for e in num_epochs[1:])]
            self.planned_2[0] = sum((len(c_N) - planned) // size for planned in sizes)
            self.planned_2[1] = sum(planned // size for planned in sizes)
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
            planned, epoch = int(self.planned_2[int(safe)]), split.epochs_before + clock.epoch + 1
            return Clock(epoch, epoch * planned // split.epochs + index, planned)
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
    version: ClassVar[int] = 2

    crossed: bool
    bank_size: int | None
    crop_scale: Crop | None
    split: Split | None = None

    def build(self, model: Clip) -> Objective:
        return SafePhase(self, model.width)
