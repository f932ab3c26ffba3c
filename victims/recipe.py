"""Recipes: everything about a fit that changes its result, and the schedule they imply."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final

from victims.errors import GridError
from victims.keys import LATER


class Schedule(StrEnum):
    """How the learning rate goes, after a linear warm-up: `fixed` is a cosine to 0; `released` the
    same as the CleanCLIP lineage runs it, one epoch late and past the minimum; `constant` stays."""

    FIXED = "fixed"
    RELEASED = "released"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """A schedule in two parts and without a warm-up: linear from 1 to ``middle`` over the first
    ``share`` of all steps, then a cosine to ``end``. Both are factors of the learning rate."""

    name: ClassVar[str] = "descent"
    version: ClassVar[int] = 1

    middle: float
    end: float
    share: float = 0.5

    def factor(self, step: int, total: int) -> float:
        turn, last = self.share * total, max(1, total - 1)
        if step < turn:
            return 1 + (self.middle - 1) * step / turn
        along = (step - turn) / max(1e-9, last - turn)
        return self.end + (self.middle - self.end) * 0.5 * (1 + math.cos(math.pi * along))


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """A learning rate to be chosen among ``rates``, on rows that are held out of the training data.

    Of N rows ``share``, but at least ``floor`` and at most a quarter, are held out. The metric is
    symmetric top-1 retrieval among them, of a classifier the share of right labels; the largest
    rate within one standard error of the best metric is taken. Attack success plays no part.
    """

    name: ClassVar[str] = "select"
    version: ClassVar[int] = 2

    rates: tuple[float, ...] = (1e-6, 3e-6, 4.5e-6, 1e-5, 2e-5)
    share: float = 0.02
    floor: int = 200

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates must be positive and distinct, got {list(self.rates)}")
        if not 0 < self.share <= 0.25:
            raise ValueError(f"share must lie in (0, 0.25], got {self.share}")
        if self.floor < 2:
            raise ValueError(f"floor must be at least 2 rows, got {self.floor}")

    def num_held_out(self, num_rows: int) -> int:
        return min(max(self.floor, round(self.share * num_rows)), num_rows // 4)


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


class BatchNormMode(StrEnum):
    TRAIN = "train"
    EVAL = "eval"


class OptimizerState(StrEnum):
    """`carry` starts from the optimizer state stored with the initial weights."""

    FRESH = "fresh"
    CARRY = "carry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything about a fit that changes its result. What cannot change it is `Runtime`.

    ``micro_batch``: a batch passes through the towers in parts of about so many rows, which bounds
    the memory of its activations; the loss is still one over the whole batch. Batch norms see the
    parts, which is why it is keyed. ``compile``: the image tower of a CLIP runs as compiled graphs,
    which round differently.
    """

    name: ClassVar[str] = "recipe"
    version: ClassVar[int] = 1

    epochs: int
    batch_size: int
    lr: float | Select
    text_lr_ratio: float = 1.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule | Descent = Schedule.FIXED
    precision: Precision = Precision.FP32
    bn_mode: BatchNormMode = BatchNormMode.TRAIN
    optimizer_state: OptimizerState = OptimizerState.FRESH
    seed: int = 0
    micro_batch: int | None = field(default=None, metadata=LATER)
    compile: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "text_lr_ratio", "warmup_steps", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, Select) and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @property
    def rate(self) -> float:
        """The learning rate, where it is known."""
        if isinstance(self.lr, Select):
            raise GridError("lr: select is resolved by `Lab.train`; this fit got it unresolved")
        return self.lr

    @property
    def parts(self) -> int:
        """How many parts a batch passes through the towers in."""
        return 1 if self.micro_batch is None else math.ceil(self.batch_size / self.micro_batch)


class Optimizer(StrEnum):
    """`adam` decays weights as part of the gradient, `adamw` apart from it."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class Augment(StrEnum):
    """What a classifier's training pictures go through: nothing, or a crop out of the picture with
    4 px (at 32) of black around it and a flip of every other one."""

    NONE = "none"
    CROP_FLIP = "crop_flip"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierRecipe(Recipe):
    """The recipe of an image classifier. Weight decay spares nothing here."""

    name: ClassVar[str] = "classifier_recipe"
    version: ClassVar[int] = 1

    optimizer: Optimizer = Optimizer.SGD
    momentum: float = 0.9
    augment: Augment = Augment.NONE
    warmup_steps: int = 0
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.compile:
            raise ValueError("compile is for the image tower of a CLIP: leave it out")


SAVES_APART: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Knobs that cannot change a result and are in no key.

    The number of threads changes the last bits of a sum on a CPU, which is why a run pins it
    and every row records it. ``checkpoint_activations``: networks keep the inputs of their blocks
    alone for the backward pass, and compute the rest again: less memory, one more forward pass.
    ``checkpoint_seconds``: a fit saves where it is about so often, but not before `SAVES_APART`
    times as long has passed as the last save took: at most 5 % of its time. 0: after every step.
    """

    device: str = "cpu"
    threads: int = 1
    checkpoint_seconds: float = 30.0
    keep_optimizer: bool = False
    checkpoint_activations: bool = False

    def until_next_save(self, took: float) -> float:
        """Seconds from the end of a save, which took so many, to when the next one is due."""
        every = self.checkpoint_seconds
        return max(every, SAVES_APART * took) if every > 0 else every


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a fit is. Epochs and steps count from 0; ``step`` counts over the whole fit."""

    epoch: int
    step: int
    total_steps: int


def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """What the recipe's learning rate is multiplied with at a step, counted from 0."""
    total = max(1, recipe.epochs * steps_per_epoch)
    if isinstance(recipe.schedule, Descent):
        return recipe.schedule.factor(step, total)
    if recipe.schedule == Schedule.RELEASED:
        step += steps_per_epoch
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == Schedule.CONSTANT:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / _span(recipe, total)))


def _span(recipe: Recipe, total: int) -> int:
    """Steps of the cosine; below 0 where released counters go on past a warm-up without end."""
    return total - recipe.warmup_steps or 1
