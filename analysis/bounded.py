"""Intervals over victim seeds, held to what pictures allow and to what a share can be.

Seeds that agree by luck do not make pictures more numerous: no interval is narrower than that of
one model on its pictures. And a share is between 0 and 1, a difference of shares between -1 and 1,
whatever t has to say.
"""

from __future__ import annotations

import math
from typing import TypeVar

from analysis.inference import Mean, Span
from analysis.stats import Interval, Z, wilson

M = TypeVar("M", Mean, Span)


def of_share(mean: M, pictures: int) -> M:
    """The interval of a mean of shares, each of so many pictures; 0 is not known how many."""
    if math.isnan(mean.value) or math.isinf(mean.low):
        return mean
    low, high = mean.low, mean.high
    if pictures:
        inside = wilson(mean.value * pictures, pictures)
        low, high = min(low, inside.low), max(high, inside.high)
    return _within(mean, low, high, 0.0)


def of_difference(mean: M, pictures: int) -> M:
    """The same of a mean difference of shares of the same pictures."""
    if math.isnan(mean.value) or math.isinf(mean.low):
        return mean
    low, high = mean.low, mean.high
    if pictures:
        inside = paired(mean.value, pictures)
        low, high = min(low, inside.low), max(high, inside.high)
    return _within(mean, low, high, -1.0)


def _within(mean: M, low: float, high: float, least: float) -> M:
    return mean._replace(low=max(least, low), high=min(1.0, high))


def paired(difference: float, pictures: int) -> Interval:
    """The narrowest interval that a difference of two shares of the same pictures can have: as if
    all pictures on which the two differ did so in one direction. By Agresti and Min (2005): half a
    picture is added to each of the four ways in which a pair can end."""
    middle, spread = _paired(difference, pictures)
    return Interval(middle - Z * spread, middle + Z * spread, "within-cell")


def paired_p(difference: float, pictures: int) -> float:
    """Two-sided p of the same that two shares of so many pictures are equal, at the least."""
    middle, spread = _paired(difference, pictures)
    return math.erfc(abs(middle) / spread / math.sqrt(2))


def _paired(difference: float, pictures: int) -> tuple[float, float]:
    """The middle and its standard error."""
    n, apart = pictures + 2, abs(difference) * pictures
    return difference * pictures / n, math.sqrt(apart + 1 - apart**2 / n) / n
