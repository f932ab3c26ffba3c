"""Statistics of the board as pure functions of numbers. Shares are 0 to 1, intervals 95 %.

The replicate is the victim seed. Test images are the same for every seed, so they say how well
one model was measured (Wilson), not how a method varies (t over seeds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.96
"""Normal quantile of the Wilson interval."""


class Interval(NamedTuple):
    """A 95 % interval and what it speaks of: ``within-cell`` or ``seeds``."""

    low: float
    high: float
    kind: str


def wilson(successes: float, n: int, z: float = Z) -> Interval:
    """Wilson's score interval of ``successes / n``; successes may be a mean over models."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n >= 1, found {successes} of {n}")
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    # At the ends the formula is exactly 0 or 1; rounding must not push past the share.
    return Interval(
        min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), "within-cell"
    )


def over_seeds(shares: Sequence[float], n: int) -> Interval:
    """The interval of the mean over victim seeds, each a share of the same ``n`` images.

    One seed: Wilson, within the cell. More: the t interval over seeds, widened to the Wilson
    interval of the mean where that is wider, since seeds that agree by luck (or all at 100 %)
    do not make the images more numerous.
    """
    if not shares:
        raise ValueError("no seeds")
    mean = math.fsum(shares) / len(shares)
    inside = wilson(mean * n, n)
    if len(shares) == 1:
        return inside
    variance = math.fsum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
    half = t_quantile(0.975, len(shares) - 1) * math.sqrt(variance / len(shares))
    low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Interval(min(low, inside.low), max(high, inside.high), "seeds")


def seeds_label(num_seeds: int) -> str:
    """How much an interval over so many victim seeds may be trusted, in words."""
    if num_seeds == 1:
        return "1 seed: intervals are within-cell (test images only)"
    caution = ", indicative" if num_seeds < 5 else ""
    return f"{num_seeds} seeds{caution}: t intervals over victim seeds"


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with whole ``df``: the finite trigonometric series."""
    theta = math.atan(t / math.sqrt(df))
    cosine2 = math.cos(theta) ** 2
    if df % 2:
        term, series = math.cos(theta), 0.0
        for j in range(1, (df - 1) // 2 + 1):
            series += term
            term *= cosine2 * 2 * j / (2 * j + 1)
        return 0.5 + (theta + math.sin(theta) * series) / math.pi
    term, series = 1.0, 0.0
    for j in range(1, df // 2 + 1):
        series += term
        term *= cosine2 * (2 * j - 1) / (2 * j)
    return 0.5 + math.sin(theta) * series / 2


def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1 and whole df >= 1, by bracketing and bisection."""
    if df < 1 or not 0 < p < 1:
        raise ValueError(f"t_quantile needs 0 < p < 1 and df >= 1, found p={p}, df={df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    low = high / 2 if high > 1 else 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return middle


def normalised_asr(asr: float, asr_clean_victim: float) -> float | None:
    """nASR: the lift over the clean victim's ASR by the room for it; None where that is 1."""
    room = 1 - asr_clean_victim
    return (asr - asr_clean_victim) / room if room > 0 else None


def defense_effectiveness(
    clean_none: float, asr_none: float, clean_defended: float, asr_defended: float
) -> float:
    """DER, kept for comparison with published tables; never a sort key.

    (max(0, ASR_none - ASR_def) - max(0, CA_none - CA_def) + 1) / 2: it falls when clean
    accuracy falls, where a well-known implementation adds that loss.
    """
    removed = max(0.0, asr_none - asr_defended)
    lost = max(0.0, clean_none - clean_defended)
    return (removed - lost + 1) / 2


class Point(NamedTuple):
    """Two numbers of which more is better: of settings, ``ca`` and ``1 - worst ASR``."""

    x: float
    y: float


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Where in ``points`` those lie that none dominates, by falling ``x``; equals all stay.

    A point dominates another that it equals or beats in both numbers and beats in one.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i].x, -points[i].y))
    front: list[int] = []
    for i in order:
        if not front or points[i].y > points[front[-1]].y or points[i] == points[front[-1]]:
            front.append(i)
    return front


def hypervolume(points: Sequence[Point], reference: Point, best: Point) -> float:
    """The share of the box from ``reference`` to ``best`` that the points dominate, 0 to 1.

    Points beyond the box count as far as its edges: below the reference nothing is gained, above
    the best nothing more.
    """
    width, height = best.x - reference.x, best.y - reference.y
    if not (width > 0 and height > 0):
        raise ValueError(f"a box needs best above reference, found {best} and {reference}")
    inside = [
        Point(min(max(p.x - reference.x, 0.0), width), min(max(p.y - reference.y, 0.0), height))
        for p in points
    ]
    area = floor = 0.0
    for i in pareto_front(inside):
        area += inside[i].x * (inside[i].y - floor)
        floor = inside[i].y
    return area / (width * height)
