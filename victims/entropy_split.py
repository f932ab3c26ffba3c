"""Splitting data by how hard two models find the given labels or captions.

Two entropies per row, one of a judge that is taken to be clean and one of a model that saw the
data, become ranks; rows that are hard for the judge or very easy for the other are suspects.
Shapes: N rows, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from victims.errors import MethodFailure

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Scale(StrEnum):
    """What a judge's cosines are multiplied with: the scale that it learned, or a number."""

    MODEL = "model"
    ONE = "1"
    HUNDRED = "100"

    def value_of(self, learned: float) -> float:
        return learned if self is Scale.MODEL else float(self.value)


class Stop(StrEnum):
    """What ends a repair early: nothing, or rows that are held out of its clean part."""

    NONE = "none"
    HELD_OUT = "held_out"


def entropies(logit_NK: npt.NDArray[np.floating], label_N: Ints) -> Floats:
    """- log softmax(z)[y] of each row."""
    z_NK = logit_NK.astype(np.float64)
    z_NK -= z_NK.max(1, keepdims=True)
    found_N: Floats = np.log(np.exp(z_NK).sum(1)) - z_NK[np.arange(len(z_NK)), label_N]
    return found_N


@dataclass(frozen=True, slots=True)
class Split:
    """The ranks X and Y in (0, 1], 1 is the hardest row, and the two sets made of them."""

    judge_N: Floats
    early_N: Floats
    clean_N: Bools
    triggered_N: Bools

    @property
    def suspicion_N(self) -> Floats:
        """max(X, 1 - Y)."""
        return np.maximum(self.judge_N, 1 - self.early_N)


def places(values_N: npt.NDArray[np.floating]) -> Ints:
    """1 for the smallest value to N for the largest; of equal values the earlier row is smaller."""
    if not np.isfinite(values_N).all():
        bad = int(np.flatnonzero(~np.isfinite(values_N))[0])
        raise MethodFailure(f"the entropy of row {bad} is {values_N[bad]}: nothing can be ranked")
    found = np.empty(len(values_N), dtype=np.int64)
    found[np.argsort(values_N, kind="stable")] = np.arange(1, len(values_N) + 1)
    return found


def split(
    judge_N: npt.NDArray[np.floating],
    early_N: npt.NDArray[np.floating],
    sigma1: float,
    sigma2: float,
) -> Split:
    """Entropies to the clean split, X <= 1 - sigma1 and Y >= sigma1, and the triggered split,
    X > 1 - sigma2 or Y < sigma2.

    They are disjoint where sigma1 >= sigma2; the rest is in neither.
    """
    x_N, y_N, num_rows = places(judge_N), places(early_N), len(judge_N)
    # Of the decimals as written: in floats a row at the border falls on either side.
    border1, border2 = (Fraction(str(sigma)) * num_rows for sigma in (sigma1, sigma2))
    clean_N = (x_N <= math.floor(num_rows - border1)) & (y_N >= math.ceil(border1))
    triggered_N = (x_N > math.floor(num_rows - border2)) | (y_N < math.ceil(border2))
    return Split(x_N / num_rows, y_N / num_rows, clean_N, triggered_N)
