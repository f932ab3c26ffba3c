"""How often equal defenses are told apart, on made boards where a seed is one seed everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.apart import told_apart
from analysis.inference import separated
from analysis.seeds import over_strata, seed_freedom, seeds_p


def board(rng: np.random.Generator, num: int, strata: int, seeds: int, common: float) -> np.ndarray:
    """ASR of equal defenses: what a seed adds to a defense in all strata, and noise of cells."""
    cells = rng.uniform(0.2, 0.6, strata)[:, None] + rng.normal(0, 0.05, (num, strata, seeds))
    return np.asarray(cells + rng.normal(0, common, (num, 1, seeds)))


@pytest.mark.parametrize(("num", "seeds"), [(2, 2), (2, 5), (6, 3)])
def test_equal_defenses_are_seldom_told_apart_whatever_seeds_do(num: int, seeds: int) -> None:
    """Signed ranks alone tell 30 % of pairs apart, and some of six defenses on most boards."""
    rng = np.random.default_rng(7)
    boards, apart, by_ranks = 60, 0, 0
    for _ in range(boards):
        asr = board(rng, num, 14, seeds, 0.03)
        apart += int(told_apart(asr)[0].any())
        by_ranks += int(separated(asr.mean(axis=2))[0].any())
    assert apart <= 0.1 * boards
    assert by_ranks >= 0.3 * boards, "or the seeds' effect shows nothing"


def test_what_differs_on_every_victim_is_told_apart() -> None:
    rng = np.random.default_rng(8)
    asr = board(rng, 2, 14, 3, 0.005)
    asr[1] += 0.3
    differ, pairs = told_apart(asr)
    assert (differ.tolist(), pairs) == ([[False, True], [True, False]], 1)


def test_one_seed_tells_nothing_apart() -> None:
    base = np.linspace(0.1, 0.5, 10)[:, None]
    assert separated(np.stack([base, base + 0.3])[..., 0])[0].any()
    assert not told_apart(np.stack([base, base + 0.3]))[0].any()
    assert seeds_p(np.full((10, 1), -0.3)) == 1


def test_ranks_and_mean_that_point_apart_tell_nothing() -> None:
    """A little better nearly everywhere, far worse once, the same on every seed."""
    base = np.full((21, 3), 0.5)
    ours = base - 0.01 - 0.001 * np.arange(21)[:, None]
    ours[20] = 1.0
    assert separated(np.stack([ours, base]).mean(axis=2))[0].any()
    theirs = base.copy()
    theirs[20] = 0.0
    assert (ours - theirs).mean() > 0
    assert not told_apart(np.stack([ours, theirs]))[0].any()


def test_a_p_over_seeds_is_that_of_the_t_test() -> None:
    from scipy import stats as scipy_stats

    rng = np.random.default_rng(9)
    difference = rng.normal(0.02, 0.03, (4, 5))
    want = scipy_stats.ttest_1samp(difference.mean(axis=0), 0).pvalue
    assert seeds_p(difference) == pytest.approx(want)
    assert seeds_p(np.full((4, 3), 0.1)) == 0, "the same on every seed"
    assert seeds_p(np.zeros((4, 3))) == 1


# --- intervals where strata have unequal numbers of seeds


def staggered(counts: list[int]) -> np.ndarray:
    """Which seeds are there: the first so many of each stratum."""
    return np.arange(max(counts)) < np.array(counts)[:, None]


def coverage(counts: list[int], spread: list[float], common: float, boards: int = 400) -> float:
    """How many intervals hold 0, which all numbers vary about."""
    rng = np.random.default_rng(10)
    present, held = staggered(counts), 0
    for _ in range(boards):
        noise = rng.normal(0, 1, present.shape) * np.array(spread)[:, None]
        found = over_strata(np.where(present, noise + rng.normal(0, common, max(counts)), np.nan))
        held += found.low <= 0 <= found.high
    return held / boards


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize(
    "counts", [[10, 10, 10, 2, 2], [5, 5, 5, 2, 2], [5, 5, 5, 1, 1], [3, 3, 3, 1]]
)
def test_intervals_cover_with_unequal_seeds(counts: list[int], common: float) -> None:
    """The median of the counts, less one, has 9 degrees for the first, and covers 87 %."""
    assert coverage(counts, [1.0] * len(counts), common) >= 0.93


def test_intervals_cover_where_few_seeds_vary_most() -> None:
    """By the median of the counts these cover 80 and 86 %."""
    assert coverage([5, 5, 5, 2, 2], [0.1, 0.1, 0.1, 5, 5], 0) >= 0.93
    assert coverage([3, 3, 3, 3, 2], [0.1, 0.1, 0.1, 0.1, 5], 0) >= 0.93


def test_degrees_of_freedom_have_hand_values() -> None:
    assert seed_freedom(staggered([4, 4, 4])) == 3
    assert seed_freedom(staggered([4, 4, 1])) == 3, "one seed adds no square of its own"
    assert seed_freedom(staggered([1, 1])) == 0
    few = staggered([5, 5, 2])
    assert seed_freedom(few, np.array([0.0, 0.0, 1.0])) == 1, "two seeds are behind all of it"
    assert seed_freedom(few, np.array([1.0, 1.0, 0.0])) == 4
    assert seed_freedom(few, np.zeros(3)) == seed_freedom(few)
    # Variances 1 of 3 seeds and 1 of 2 others: (1 + 1)^2 / (1/2 + 1/1), as Welch has it.
    apart = np.array([[True, True, True, False, False], [False, False, False, True, True]])
    assert seed_freedom(apart, np.array([1.0, 1.0])) == 2
    assert seed_freedom(apart, np.array([9.0, 1.0])) == 2, "100 / (81/2 + 1) = 2.41"
    assert seed_freedom(apart, np.array([1.0, 9.0])) == 1, "100 / (1/2 + 81) = 1.23"


def test_the_way_to_go_together_with_fewer_degrees_counts() -> None:
    assert seed_freedom(staggered([5, 5, 2])) == 1, "1.97 all alike, and 2.08 each by itself"
    assert seed_freedom(staggered([9, 9, 9, 9, 2])) == 2, "3.81 all alike, and 2.70 by itself"


def test_pictures_bound_what_seeds_that_agree_show() -> None:
    """A tenth of a point on every seed is one picture of a thousand."""
    rng = np.random.default_rng(11)
    base = np.repeat(np.linspace(0.2, 0.5, 10)[:, None], 3, axis=1)
    near = base + 0.001 + rng.normal(0, 1e-6, base.shape)
    assert seeds_p(near - base) < 0.001 < 0.3 < seeds_p(near - base, 1000)
    assert told_apart(np.stack([base, near]))[0].any()
    assert not told_apart(np.stack([base, near]), 1000)[0].any()
    assert told_apart(np.stack([base, near + 0.05]), 1000)[0].any()
