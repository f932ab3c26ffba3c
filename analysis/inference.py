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
NOISE = 12  # decimals of a difference that mean something


class Mean(NamedTuple):
    """A mean with its 95 % interval, and the degrees of freedom that this rests on."""

    value: float
    low: float
    high: float
    df: int


class Span(NamedTuple):
    """What was measured and a 95 % interval from draws."""

    value: float
    low: float
    high: float


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that two models fail on different pictures by chance alone, of the
    pictures on which one of them fails."""
    n, least = only_first + only_second, min(only_first, only_second)
    if least < 0:
        raise ValueError(f"counts are not negative, found {only_first} and {only_second}")
    # In logarithms, since there are thousands of pictures.
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(least + 1)
    log_ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    return float(min(1.0, 2 * np.exp(log_ways - n * math.log(2)).sum()))


def _signed(differences: Sequence[float]) -> Floats:
    """Differences without zeros, those among them that rounding alone made to be some."""
    values = np.round(np.asarray(differences, dtype=float), NOISE)
    return np.asarray(values[values != 0])


def _doubled_ranks(values: Floats) -> npt.NDArray[np.int64]:
    """Twice the mid-ranks of sizes: whole numbers, for ties too."""
    _, place, count = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    return np.asarray((2 * np.cumsum(count) - count + 1)[place], dtype=np.int64)


def rank_direction(differences: Sequence[float]) -> int:
    """Which sign has the larger signed ranks: -1, 1, or 0 where neither has."""
    values = _signed(differences)
    return int(np.sign((_doubled_ranks(values) * np.sign(values)).sum()))


def signed_rank(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are left out, ties share mid-ranks.

    Exact, but for more than `EXACT_RANKS` differences, where the normal curve is as good.
    """
    values = _signed(differences)
    if not len(values):
        return 1.0
    doubled = _doubled_ranks(values)
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
    values = _signed(differences)
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


# --- strata as a sample


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


def detectable(differences: Sequence[float], alpha: float = ALPHA) -> float | None:
    """The smallest true difference that a paired t test over these strata finds 4 times in 5 at
    ``alpha``; None where a signed-rank test could find none, or nothing differs."""
    n = len(differences)
    if n < 2 or least_p(n) > alpha:
        return None
    spread = float(np.std(np.asarray(differences), ddof=1))
    if round(spread, NOISE) == 0:
        return None
    quantiles = t_quantile(1 - alpha / 2, n - 1) + t_quantile(0.8, n - 1)
    return quantiles * spread / math.sqrt(n)


def least_p(num_strata: int) -> float:
    """The smallest p that a signed-rank test over so many strata can have."""
    return float(min(1.0, 2 / 2**num_strata))


def strata_needed(pairs: int, alpha: float = ALPHA) -> int:
    """How many strata it takes for one of so many pairs to be told apart by Holm's correction."""
    return math.ceil(1 + math.log2(max(1, pairs) / alpha) - 1e-12)


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
    # Of each model by itself: victims at 0 and 1 have no noise of pictures, if a mean of 1/2.
    pictures = float(np.mean([(row * (1 - row)).mean() for row in rows])) / n
    inner = [float(row.var(ddof=1)) for row in rows if len(row) > 1]
    within = float(np.mean(inner)) if inner else None
    between = None
    if len(rows) > 1:
        between = float(np.var([row.mean() for row in rows], ddof=1))
        inverse = float(np.mean([1 / len(row) for row in rows]))
        between = max(0.0, between - (within or 0.0) * inverse)
    return Components(between, within, pictures)


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
    """The probability that a victim has a smaller number with ours than with theirs, ties by half:
    the mean over strata of the share of the victims that both have."""
    difference_SR = np.round(ours_SR - theirs_SR, NOISE)
    shared = ~np.isnan(difference_SR)
    kept = shared.any(axis=1)
    if not kept.any():
        return math.nan
    less_SR = (difference_SR < 0) + 0.5 * (difference_SR == 0)
    return float((less_SR * shared)[kept].sum(axis=1) @ (1 / shared[kept].sum(axis=1)) / kept.sum())


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


def separated_by_draws(
    score_ND: Floats, measured_D: Floats, alpha: float = ALPHA
) -> tuple[npt.NDArray[np.bool_], int]:
    """The same of a score that has draws alone: how many draws of a difference are as far from
    their middle as the measured difference is from 0.

    The middle is subtracted since a maximum of draws lies above the maximum that was measured, by
    more where more attacks are near it: equal defenses would differ in that.
    """
    draws, num = score_ND.shape
    pairs = list(combinations(range(num), 2))
    ps = []
    for a, b in pairs:
        difference = score_ND[:, a] - score_ND[:, b]
        off = np.round(np.abs(difference - difference.mean()), NOISE)
        seen = round(abs(float(measured_D[a] - measured_D[b])), NOISE)
        ps.append((int((off >= seen).sum()) + 1) / (draws + 1))
    differ = np.zeros((num, num), dtype=bool)
    for (a, b), p in zip(pairs, holm(ps), strict=True):
        differ[a, b] = differ[b, a] = p <= alpha
    return differ, len(pairs)


def groups_of(order: Sequence[int], differ: npt.NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """The groups that each defense belongs to, by their numbers from 0, best first: two that share
    one are not told apart. ``order`` is best first.

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
    return [
        tuple(i for i, group in enumerate(groups) if d in group)
        for d in range(max(order, default=-1) + 1)
    ]


def letters(groups: Sequence[int]) -> str:
    """The groups of a defense as letters; three or more that follow each other as a range."""
    found, start = [], 0
    for i in range(1, len(groups) + 1):
        if i < len(groups) and groups[i] == groups[i - 1] + 1:
            continue
        run = groups[start:i]
        names = [_letter(group) for group in run]
        found.append(f"{names[0]}-{names[-1]}" if len(run) > 2 else "".join(names))
        start = i
    return " ".join(found) if any(len(part) > 2 for part in found) else "".join(found)


def _letter(i: int) -> str:
    """a to z, then aa, ab, ..."""
    head = _letter(i // 26 - 1) if i >= 26 else ""
    return head + chr(ord("a") + i % 26)
