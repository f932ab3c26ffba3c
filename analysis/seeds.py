"""Intervals over victim seeds: what a mean over strata varies by from one seed to the next.

A seed is one seed in every stratum (it sets where training starts, and in which order), so what it
does to several strata is added before it is squared. The last two axes of values are S strata and
R victim seeds; NaN is a seed that is not there.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from analysis.bounded import paired_p
from analysis.inference import NOISE, Floats, Mean
from analysis.stats import t_cdf, t_quantile


def seed_effects(values_SR: Floats) -> Floats:
    """What each victim seed adds to its strata's means.

    Scaled so that, of one stratum, squares sum to the variance of its mean. A stratum of one seed
    moves as the others do on average, by as much as a single seed does: what it varies by itself
    cannot be known.
    """
    present = ~np.isnan(values_SR)
    count_S = present.sum(axis=-1, keepdims=True)
    mean_S = np.where(present, values_SR, 0.0).sum(-1, keepdims=True) / np.maximum(count_S, 1)
    scale_S = np.sqrt(count_S / np.maximum(count_S - 1, 1)) / np.maximum(count_S, 1)
    effect_SR = np.where(present & (count_S > 1), (values_SR - mean_S) * scale_S, 0.0)
    several = count_S > 1
    others = (effect_SR * np.sqrt(count_S)).sum(-2, keepdims=True)
    others = others / np.maximum(several.sum(-2, keepdims=True), 1)
    return np.asarray(np.where(count_S == 1, others, effect_SR))


def seed_freedom(present_SR: npt.NDArray[np.bool_], variance_S: Floats | None = None) -> int:
    """Degrees of freedom between victim seeds, by Satterthwaite and rounded down; 0 where no
    stratum has several.

    ``variance_S`` are those of the strata's means, else seeds are taken to vary alike in all. The
    interval is a sum of squares whose terms are few where few seeds are behind most of it. Of two
    ways in which strata can go together, each by itself or all alike, the one with fewer counts.
    Equal numbers of seeds, R, have R - 1.
    """
    several = present_SR.sum(axis=1) > 1
    if not several.any():
        return 0
    present = present_SR[several].astype(float)
    count_S = present.sum(axis=1)
    single = (present_SR.sum(axis=1) == 1).sum()
    variance = 1 / count_S if variance_S is None else variance_S[several]
    if not variance.any():
        variance = 1 / count_S
    # A stratum of one seed moves by what the others do, and gives them as much more weight.
    weight_S = np.sqrt(variance / (count_S - 1)) * (1 + single / len(count_S) * np.sqrt(count_S))

    def centred(each_S: Floats) -> Floats:
        """The weighted sum of what takes a stratum's mean from its seeds."""
        return np.asarray(np.diag(each_S @ present) - (present.T * (each_S / count_S)) @ present)

    alike = centred(weight_S)
    found = [
        np.trace(form) ** 2 / (form**2).sum() for form in (centred(weight_S**2), alike @ alike)
    ]
    return max(1, int(min(found) + 1e-9))


def over_strata(values_SR: Floats) -> Mean:
    """The mean over strata of means over victim seeds, its t interval from what seeds differ by
    (`seed_effects`). Strata are the board's own and no sample; NaN is a seed that is not there.

    One seed says nothing of others: the interval is then all there is, from -inf to inf.
    """
    present = ~np.isnan(values_SR)
    values_SR, present = values_SR[present.any(axis=1)], present[present.any(axis=1)]
    if not len(values_SR):
        return Mean(math.nan, math.nan, math.nan, 0)
    value = float(np.nanmean(values_SR, axis=1).mean())
    effect_SR = seed_effects(values_SR)
    df = seed_freedom(present, (effect_SR**2).sum(axis=1))
    if not df:
        return Mean(value, -math.inf, math.inf, 0)
    total_R = effect_SR.sum(axis=0) / len(values_SR)
    half = t_quantile(0.975, df) * math.sqrt(float((total_R**2).sum()))
    return Mean(value, value - half, value + half, df)


def seeds_p(values_SR: Floats, pictures: int = 0) -> float:
    """Two-sided p that a mean difference over strata is 0, by the t test of `over_strata`, and no
    smaller than so many pictures allow; 1 of one seed, which says nothing of others."""
    found = over_strata(np.round(values_SR, NOISE))
    if not found.df or not found.value:
        return 1.0
    spread = (found.high - found.value) / t_quantile(0.975, found.df)
    least = paired_p(found.value, pictures) if pictures else 0.0
    if spread == 0:
        return least
    return max(least, 2 * (1 - t_cdf(abs(found.value) / spread, found.df)))
