"""Tests and intervals of comparisons, as pure functions of numbers.

Everything is paired: two defenses are compared on the same victims. Exact where numbers are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.stats import t_quantile

Floats = npt.NDArray[np.float64]
# Signs of so many differences are all tried; of more, so many are drawn.
EXACT_FLIPS, FLIP_DRAWS = 16, 20_000
EXACT_RANKS = 200
ALPHA = 0.05


class Mean(NamedTuple):
    """A mean with its 95 % interval, and the degrees of freedom that this rests on."""

    value: float
    low: float
    high: float
    df: int


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that two models fail on different pictures by chance alone, of the
    pictures on which one of them fails."""
    n, least = only_first + only_second, min(only_first, only_second)
    if least < 0:
        raise ValueError(f"counts are not negative, found {only_first} and {only_second}")
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return float(min(1.0, 2 * tail / 2**n))


def signed_rank(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are left out, ties share mid-ranks.

    Exact, but for more than `EXACT_RANKS` differences, where the normal curve is as good.
    """
    values = np.asarray([d for d in differences if d], dtype=float)
    if not len(values):
        return 1.0
    _, place, count = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    # Twice the mid-ranks: whole numbers, for ties too.
    above = np.cumsum(count)
    doubled = (2 * above - count + 1)[place]
    total = int(doubled.sum())
    seen = int(doubled[values > 0].sum())
    if len(values) > EXACT_RANKS:
        spread = math.sqrt(float((doubled.astype(float) ** 2).sum())) / 2
        return math.erfc(max(0.0, abs(seen - total / 2) - 1) / spread / math.sqrt(2))
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in doubled:
        further = ways.copy()
        further[rank:] += ways[: total + 1 - rank]
        ways = further / 2
    tail = min(ways[: seen + 1].sum(), ways[seen:].sum())
    return float(min(1.0, 2 * tail))


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p that the mean difference is 0, were every sign a coin's."""
    values = np.asarray([d for d in differences if d], dtype=float)
    n = len(values)
    if not n:
        return 1.0
    seen = abs(values.sum()) * (1 - 1e-12)
    if n <= EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ values) >= seen).mean())
    rng = np.random.default_rng(seed)
    signs = 1 - 2 * rng.integers(0, 2, (FLIP_DRAWS, n))
    return float((1 + (np.abs(signs @ values) >= seen).sum()) / (1 + FLIP_DRAWS))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, most = [1.0] * len(ps), 0.0
    for place, i in enumerate(order):
        most = max(most, min(1.0, (len(ps) - place) * ps[i]))
        found[i] = most
    return found


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Adjusted p by the false discovery rate; for exploring, never for the board's letters."""
    order = sorted(range(len(ps)), key=lambda i: -ps[i])
    found, least = [1.0] * len(ps), 1.0
    for place, i in enumerate(order):
        least = min(least, ps[i] * len(ps) / (len(ps) - place))
        found[i] = least
    return found


def friedman(values_SD: Floats) -> tuple[float, float]:
    """(chi square, p) that all defenses rank alike over strata, ties by mid-ranks."""
    num_strata, num = values_SD.shape
    if num_strata < 2 or num < 3:
        return 0.0, 1.0
    rank_SD = np.stack([_mid_ranks(row) for row in values_SD])
    ties = sum(float((count**3 - count).sum()) for count in map(_counts, values_SD))
    spread = 1 - ties / (num_strata * num * (num**2 - 1))
    if spread <= 0:
        return 0.0, 1.0
    off = rank_SD.sum(axis=0) - num_strata * (num + 1) / 2
    chi = 12 * float((off**2).sum()) / (num_strata * num * (num + 1)) / spread
    return chi, chi_square_above(chi, num - 1)


def _counts(row: Floats) -> Floats:
    return np.unique(row, return_counts=True)[1].astype(float)


def _mid_ranks(row: Floats) -> Floats:
    _, place, count = np.unique(row, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place], dtype=float)


def chi_square_above(x: float, df: int) -> float:
    """P(X > x) of chi square with whole ``df``, by the finite series of its two kinds."""
    if x <= 0:
        return 1.0
    half = x / 2
    if df % 2 == 0:
        term = total = math.exp(-half)
        for i in range(1, df // 2):
            term *= half / i
            total += term
        return min(1.0, total)
    total = math.erfc(math.sqrt(half))
    term = math.exp(-half) * math.sqrt(half) / math.gamma(1.5)
    for i in range(1, (df - 1) // 2 + 1):
        total += term
        term *= half / (i + 0.5)
    return min(1.0, total)


# --- intervals over victim seeds


def over_strata(values_SR: Floats) -> Mean:
    """The mean over strata of means over victim seeds, its t interval from what seeds differ by
    inside strata. Strata are the board's own and no sample; NaN is a seed that is not there.

    One seed says nothing of others: the interval is then all there is, from -inf to inf.
    """
    present = ~np.isnan(values_SR)
    values_SR, present = values_SR[present.any(axis=1)], present[present.any(axis=1)]
    if not len(values_SR):
        return Mean(math.nan, math.nan, math.nan, 0)
    count_S = present.sum(axis=1)
    mean_S = np.nanmean(values_SR, axis=1)
    value = float(mean_S.mean())
    if count_S.min() < 2:
        return Mean(value, -math.inf, math.inf, 0)
    variance_S = np.nanvar(values_SR, axis=1, ddof=1) / count_S
    error2 = float(variance_S.sum()) / len(mean_S) ** 2
    if not error2:
        return Mean(value, value, value, int((count_S - 1).sum()))
    # Welch and Satterthwaite; rounded down, which widens.
    df = int(variance_S.sum() ** 2 / (variance_S**2 / (count_S - 1)).sum() + 1e-9)
    half = t_quantile(0.975, max(1, df)) * math.sqrt(error2)
    return Mean(value, value - half, value + half, max(1, df))


def over_differences(differences: Sequence[float]) -> Mean:
    """The mean of one difference per stratum with its t interval: as if strata were a sample."""
    n = len(differences)
    if not n:
        return Mean(math.nan, math.nan, math.nan, 0)
    value = math.fsum(differences) / n
    if n == 1:
        return Mean(value, -math.inf, math.inf, 0)
    spread = math.sqrt(math.fsum((d - value) ** 2 for d in differences) / (n - 1) / n)
    half = t_quantile(0.975, n - 1) * spread
    return Mean(value, value - half, value + half, n - 1)


def detectable(differences: Sequence[float]) -> float | None:
    """The smallest true difference that a paired test over these strata finds 4 times in 5."""
    n = len(differences)
    if n < 2:
        return None
    spread = float(np.std(np.asarray(differences), ddof=1))
    return (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * spread / math.sqrt(n)


class Components(NamedTuple):
    """Variances of a share: between victim seeds, between defense seeds of one victim, and of the
    pictures of one model. None where it cannot be told."""

    victims: float | None
    defenses: float | None
    pictures: float


def variance_components(share_RK: Floats, n: int) -> Components:
    """Of one cell's shares by victim seed and, nested inside, defense seed; ``n`` pictures each.

    What is between victims is what their means differ by, less what defense seeds explain.
    """
    rows = [row[~np.isnan(row)] for row in share_RK]
    rows = [row for row in rows if len(row)]
    mean = float(np.mean([row.mean() for row in rows]))
    inner = [float(row.var(ddof=1)) for row in rows if len(row) > 1]
    within = float(np.mean(inner)) if inner else None
    between = None
    if len(rows) > 1:
        between = float(np.var([row.mean() for row in rows], ddof=1))
        per_victim = float(np.mean([len(row) for row in rows]))
        between = max(0.0, between - (within or 0.0) / per_victim)
    return Components(between, within, mean * (1 - mean) / n)


# --- aggregates


def interquartile_mean(values: Floats, axis: int = -1) -> Floats:
    """The mean of the middle half: a quarter of the values, rounded down, is cut at each end."""
    ordered = np.sort(np.moveaxis(np.asarray(values, dtype=float), axis, -1), axis=-1)
    n = ordered.shape[-1]
    cut = n // 4
    return np.asarray(ordered[..., cut : n - cut].mean(axis=-1))


def profile(values: Floats, taus: Floats) -> Floats:
    """The share of values at or below each tau."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return np.full(len(taus), math.nan)
    return np.asarray(np.searchsorted(known, taus, side="right") / len(known))


def improvement(ours_SR: Floats, theirs_SR: Floats) -> float:
    """The probability that a run of ours has a smaller number than one of theirs, ties by half:
    the mean over strata of the share of pairs."""
    shares = []
    for ours, theirs in zip(ours_SR, theirs_SR, strict=True):
        a, b = ours[~np.isnan(ours)], theirs[~np.isnan(theirs)]
        if len(a) and len(b):
            less = (a[:, None] < b).mean() + 0.5 * (a[:, None] == b).mean()
            shares.append(float(less))
    return float(np.mean(shares)) if shares else math.nan


# --- groups that no test tells apart


def separated(values_DS: Floats, alpha: float = ALPHA) -> tuple[npt.NDArray[np.bool_], int]:
    """Which pairs of defenses differ, by signed ranks over strata with Holm, and how many pairs
    there are."""
    num = len(values_DS)
    pairs = list(combinations(range(num), 2))
    ps = [signed_rank(list(values_DS[a] - values_DS[b])) for a, b in pairs]
    differ = np.zeros((num, num), dtype=bool)
    for (a, b), p in zip(pairs, holm(ps), strict=True):
        differ[a, b] = differ[b, a] = p <= alpha
    return differ, len(pairs)


def separated_by_draws(score_ND: Floats, alpha: float = ALPHA) -> tuple[npt.NDArray[np.bool_], int]:
    """The same of a score that has draws alone: twice the rarer side of their differences."""
    draws, num = score_ND.shape
    pairs = list(combinations(range(num), 2))
    ps = []
    for a, b in pairs:
        difference = score_ND[:, a] - score_ND[:, b]
        least = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
        ps.append(min(1.0, 2 * (least + 1) / (draws + 1)))
    differ = np.zeros((num, num), dtype=bool)
    for (a, b), p in zip(pairs, holm(ps), strict=True):
        differ[a, b] = differ[b, a] = p <= alpha
    return differ, len(pairs)


def letters(order: Sequence[int], differ: npt.NDArray[np.bool_]) -> list[str]:
    """Letters by defense: two that share one are not told apart. ``order`` is best first.

    Insert and absorb: start from one group of all, split it at every pair that differs.
    """
    groups: list[frozenset[int]] = [frozenset(order)]
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            if not differ[a, b]:
                continue
            split: list[frozenset[int]] = []
            for group in groups:
                both = a in group and b in group
                split += [group - {a}, group - {b}] if both else [group]
            split = list(dict.fromkeys(split))
            groups = [g for g in split if not any(g < other for other in split)]
    place = {defense: i for i, defense in enumerate(order)}
    groups.sort(key=lambda group: sorted(place[d] for d in group))
    names = [_letter(i) for i in range(len(groups))]
    found = [""] * (max(order, default=-1) + 1)
    for name, group in zip(names, groups, strict=True):
        for defense in group:
            found[defense] += name
    return found


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else f"({i + 1})"
