"""Recipes: everything about a fit that changes its result, and the schedule they imply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Schedule(StrEnum):
    """`released`: the CleanCLIP lineage counts one epoch late and passes the minimum."""

    FIXED = "fixed"
    RELEASED = "released"


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
    """Everything about a fit that changes its result. What cannot change it is `Runtime`."""

    name: ClassVar[str] = "recipe"
    version: ClassVar[int] = 1

    epochs: int
    batch_size: int
    lr: float
    text_lr_ratio: float = 1.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule = Schedule.FIXED
    precision: Precision = Precision.FP32
    bn_mode: BatchNormMode = BatchNormMode.TRAIN
    optimizer_state: OptimizerState = OptimizerState.FRESH
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "text_lr_ratio", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Knobs that cannot change a result and are in no key.

    The number of threads changes the last bits of a sum on a CPU, which is why a run pins it
    and every row records it.
    """

    device: str = "cpu"
    threads: int = 1
    checkpoint_seconds: float = 30.0
    keep_optimizer: bool = False


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a fit is. Epochs and steps count from 0; ``step`` counts over the whole fit."""

    epoch: int
    step: int
    total_steps: int


def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine to 0; ``released`` starts counting one epoch late."""
    total = max(1, recipe.epochs * steps_per_epoch)
    if recipe.schedule == Schedule.RELEASED:
        step += steps_per_epoch
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / _span(recipe, total)))


def _span(recipe: Recipe, total: int) -> int:
    return max(1, total - recipe.warmup_steps)
