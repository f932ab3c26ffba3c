"""Two Gaussians over one number per row, and which rows their upper one makes safe.

Shapes: N rows.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from victims.errors import MethodFailure

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class SafeRule(StrEnum):
    """What ranks rows: the posterior itself, which need not rise with the value where the two
    components differ in width, or the value, from where the posterior first crosses on."""

    POSTERIOR = "posterior"
    ABOVE_CROSSING = "above_crossing"


@dataclass(frozen=True, slots=True)
class Mixture:
    """``posterior_N``: probability that a row belongs to the component of the larger mean."""

    posterior_N: Floats
    low_mean: float


def two_gaussians(values_N: npt.NDArray[np.floating]) -> Mixture:
    """A mixture of two Gaussians, as scikit-learn fits it by default."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    column_N1 = values_N.astype(np.float64)[:, None]
    if not np.isfinite(column_N1).all():
        raise MethodFailure("a mixture cannot be fitted: some similarities are not finite")
    with warnings.catch_warnings():
        # What it reached after its last iteration is as good a split as any; equal rows are one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = GaussianMixture(2, random_state=0).fit(column_N1)
    low, high = np.argsort(fitted.means_[:, 0])
    return Mixture(
        posterior_N=np.asarray(fitted.predict_proba(column_N1)[:, high], dtype=np.float64),
        low_mean=float(fitted.means_[low, 0]),
    )


def disorder(values_N: npt.NDArray[np.floating], posterior_N: Floats) -> float:
    """Share of rows with a smaller posterior than some row of a smaller value; 0: monotone."""
    ordered_N = posterior_N[np.lexsort((posterior_N, values_N))]
    return float(np.mean(ordered_N < np.maximum.accumulate(ordered_N) - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """A safe set that starts as the rows of posterior ``threshold`` and grows by ``increment`` of
    all rows at a time, up to ``cap`` of them."""

    name: ClassVar[str] = "split_rule"
    version: ClassVar[int] = 1

    threshold: float
    increment: float
    cap: float
    safe_rule: SafeRule

    def size(self, first: int, later: int, num_rows: int) -> int:
        """Rows of the safe set ``later`` splits after the first one, which took ``first``."""
        # In exact decimals as they are written: in floats 0.29 of 100 rows is 28.
        grown = first + num_rows * later * Fraction(str(self.increment))
        return math.floor(min(grown, num_rows * Fraction(str(self.cap))))

    def split(self, values_N: npt.NDArray[np.floating], first: int | None, later: int) -> Bools:
        """The safe rows of a split: of the first one, or ``later`` splits after one of ``first``
        rows, then those of the largest posterior, ties by value, or of the largest value."""
        mixture, by_value = two_gaussians(values_N), self.safe_rule == SafeRule.ABOVE_CROSSING
        if first is None:
            over_N: Bools = mixture.posterior_N >= self.threshold
            if not by_value:
                return over_N
            # Between the means the posterior rises; it may fall again above, and rise below.
            reached_N = values_N[over_N & (values_N >= mixture.low_mean)]
            return np.asarray(values_N >= (reached_N.min() if len(reached_N) else np.inf))
        keys = (-values_N,) if by_value else (-values_N, -mixture.posterior_N)
        safe_N = np.zeros(len(values_N), dtype=bool)
        safe_N[np.lexsort(keys)[: self.size(first, later, len(values_N))]] = True
        return safe_N
