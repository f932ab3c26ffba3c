"""How often equal defenses are told apart, on made boards where a seed is one seed everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.apart import told_apart
from analysis.inference import seeds_p, separated


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
