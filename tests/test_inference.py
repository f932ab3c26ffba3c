"""Tests of differences and aggregates against hand values, scipy, and rliable's definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis import inference, seeds

SHARES = st.floats(0, 1).map(lambda x: round(x, 3))


def test_mcnemar_gives_the_hand_values() -> None:
    assert round(inference.mcnemar(10, 2), 4) == 0.0386
    assert inference.mcnemar(0, 0) == 1.0
    assert inference.mcnemar(3, 3) == 1.0
    with pytest.raises(ValueError, match="not negative"):
        inference.mcnemar(-1, 2)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    if first + second:
        want = scipy_stats.binomtest(first, first + second).pvalue
        assert inference.mcnemar(first, second) == pytest.approx(want)


@pytest.mark.parametrize(("num", "p"), [(6, 0.03125), (5, 0.0625), (1, 1.0)])
def test_all_in_one_direction_gives_the_hand_values(num: int, p: float) -> None:
    differences = [0.1 * (i + 1) for i in range(num)]
    assert inference.signed_rank(differences) == p
    assert inference.sign_flip(differences) == p
    assert inference.signed_rank([-d for d in differences]) == p
    assert inference.signed_rank([*differences, 0.0]) == p, "no difference says nothing"


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=12, unique_by=abs))
def test_signed_ranks_agree_with_scipy(values: list[float]) -> None:
    values = list({round(abs(v), 6): round(v, 6) for v in values if abs(v) > 1e-6}.values())
    if values:
        want = scipy_stats.wilcoxon(values, method="exact").pvalue
        assert inference.signed_rank(values) == pytest.approx(want)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-0.3, -0.2, -0.1, 0.1, 0.2, 0.3]), min_size=1, max_size=9))
def test_signed_ranks_with_ties_are_what_all_signs_give(values: list[float]) -> None:
    rank = scipy_stats.rankdata(np.abs(values))
    seen = abs(float((rank * np.sign(values)).sum()))
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * r for s, r in zip(sign, rank, strict=True))) for sign in signs]
    want = sum(total >= seen - 1e-9 for total in sums) / len(sums)
    assert inference.signed_rank(values) == pytest.approx(want)


def test_of_many_differences_the_normal_curve_takes_over() -> None:
    rng = np.random.default_rng(0)
    values = list(rng.normal(0.05, 1, inference.EXACT_RANKS + 1))
    want = scipy_stats.wilcoxon(values, method="approx", correction=True).pvalue
    assert inference.signed_rank(values) == pytest.approx(want, rel=1e-2)
    exact = scipy_stats.wilcoxon(values[:-1], method="exact").pvalue
    assert inference.signed_rank(values[:-1]) == pytest.approx(exact)


def test_sign_flips_agree_with_scipy_and_draw_where_there_are_many() -> None:
    rng = np.random.default_rng(1)
    values = list(rng.normal(0.4, 1, 10))
    want = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert inference.sign_flip(values) == pytest.approx(want)
    many = list(rng.normal(0.3, 1, 40))
    drawn = inference.sign_flip(many)
    assert drawn == inference.sign_flip(many), "the same draws every time"
    assert drawn == pytest.approx(scipy_stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert inference.sign_flip([0.0, 0.0]) == 1.0


def test_families_are_corrected() -> None:
    assert inference.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert inference.holm([0.9, 0.8]) == [1.0, 1.0]
    ps = [0.001, 0.02, 0.02, 0.5, 0.04]
    want = scipy_stats.false_discovery_control(ps, method="bh")
    assert inference.benjamini_hochberg(ps) == pytest.approx(list(want))
    assert inference.holm([]) == inference.benjamini_hochberg([]) == []


@settings(deadline=None)
@given(st.lists(st.lists(SHARES, min_size=4, max_size=4), min_size=2, max_size=8))
def test_friedman_agrees_with_scipy(rows: list[list[float]]) -> None:
    values = np.array(rows)
    chi, p = inference.friedman(values)
    if all(len(set(row)) == 1 for row in rows):
        assert (chi, p) == (0.0, 1.0)
        return
    want = scipy_stats.friedmanchisquare(*values.T)
    assert chi == pytest.approx(want.statistic, abs=1e-9)
    assert p == pytest.approx(want.pvalue, abs=1e-9)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10, 25])
def test_chi_square_agrees_with_scipy(df: int) -> None:
    for x in (0.01, 0.5, 3.0, 12.0, 60.0):
        want = scipy_stats.chi2.sf(x, df)
        assert inference.chi_square_above(x, df) == pytest.approx(want, rel=1e-9)
    assert inference.chi_square_above(0.0, df) == 1.0


# --- intervals


def test_one_stratum_has_the_t_interval_of_its_seeds() -> None:
    values = [0.2, 0.3, 0.25]
    found = seeds.over_strata(np.array([values]))
    low, high = scipy_stats.t.interval(0.95, 2, np.mean(values), scipy_stats.sem(values))
    assert found.value == pytest.approx(0.25)
    assert found.df == 2
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)


def test_strata_are_fixed_and_only_seeds_vary() -> None:
    """Attacks that differ do not widen it: they are the board and no sample of attacks."""
    alike = np.array([[0.1, 0.1], [0.9, 0.9]])
    assert seeds.over_strata(alike) == (0.5, 0.5, 0.5, 1)


def test_a_seed_is_one_seed_in_every_stratum() -> None:
    """Complete boards have the t interval of each seed's mean over strata."""
    values = np.array([[0.1, 0.3, 0.2], [0.8, 0.9, 0.7]])
    found = seeds.over_strata(values)
    means = values.mean(axis=0)
    low, high = scipy_stats.t.interval(0.95, 2, means.mean(), scipy_stats.sem(means))
    assert tuple(found) == pytest.approx((0.5, low, high, 2))


def test_seeds_that_are_missing_leave_the_others() -> None:
    values = np.array([[0.2, 0.4, np.nan], [np.nan] * 3, [0.5, 0.5, 0.8]])
    found = seeds.over_strata(values)
    assert found.value == pytest.approx((0.3 + 0.6) / 2)
    assert found.low < found.value < found.high
    # A stratum of one seed moves as the others do, by as much as one seed and no mean of two.
    one = seeds.over_strata(np.array([[0.2, np.nan], [0.3, 0.4]]))
    alone = seeds.over_strata(np.array([[0.3, 0.4]]))
    assert one.value == pytest.approx(0.275)
    wider = (1 + math.sqrt(2)) / 2
    assert one.high - one.low == pytest.approx(wider * (alone.high - alone.low))
    single = seeds.over_strata(np.array([[0.2, np.nan], [np.nan, 0.4]]))
    assert (single.low, single.high) == (-math.inf, math.inf)
    assert math.isnan(seeds.over_strata(np.full((2, 2), np.nan)).value)


@pytest.mark.parametrize("common", [0.0, 0.05])
def test_intervals_cover_what_they_should(common: float) -> None:
    """Of 1,000 made boards of 5 strata and 3 seeds, 95 in 100 intervals hold the truth, also where
    a seed does the same to every stratum."""
    rng = np.random.default_rng(2)
    truth = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    held = 0
    for _ in range(1000):
        noise = rng.normal(0, 0.02, (5, 3)) + rng.normal(0, common, 3)
        found = seeds.over_strata(truth[:, None] + noise)
        held += found.low <= truth.mean() <= found.high
    assert 930 <= held <= 970


def test_differences_and_what_they_could_show() -> None:
    differences = [0.1, 0.2, 0.15, 0.05, 0.12, 0.07]
    found = inference.over_differences(differences)
    low, high = scipy_stats.t.interval(0.95, 5, np.mean(differences), scipy_stats.sem(differences))
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    want = (scipy_stats.t.ppf(0.975, 5) + scipy_stats.t.ppf(0.8, 5)) * scipy_stats.sem(differences)
    assert inference.detectable(differences) == pytest.approx(want)
    assert (inference.detectable(differences, 0.04) or 0.0) > want
    assert inference.detectable(differences, 0.03) is None, "6 strata reach 0.03125 at best"
    assert inference.detectable(differences[:5]) is None, "5 reach 0.0625 at best"
    assert inference.detectable([0.1] * 8) is None, "nothing differs"
    assert inference.over_differences([0.1]).low == -math.inf
    assert math.isnan(inference.over_differences([]).value)


def test_variances_are_told_apart() -> None:
    shares = np.array([[0.2, 0.4], [0.6, 0.8], [0.4, 0.6]])
    found = inference.variance_components(shares, 100)
    assert found.defenses == pytest.approx(0.02)
    # Means 0.3, 0.7 and 0.5 vary by 0.04, of which defense seeds explain 0.02 / 2.
    assert found.victims == pytest.approx(0.03)
    assert found.pictures == pytest.approx((4 * 0.24 + 2 * 0.16) / 6 / 100)
    certain = inference.variance_components(np.array([[0.0], [1.0]]), 1000)
    assert certain.pictures == 0, "each victim answers alike on all pictures"
    rng = np.random.default_rng(5)
    estimates = []
    for _ in range(400):
        seeds = rng.normal(0, 1, 6)[:, None] + rng.normal(0, 2, (6, 5))
        seeds[:3, 1:] = np.nan  # 1, 1, 1, 5, 5 and 5 defense seeds
        estimates.append(inference.variance_components(seeds, 10).victims or 0.0)
    assert np.mean(estimates) < 2, "1, a little more as it is never below 0"
    single = inference.variance_components(np.array([[0.5]]), 50)
    assert (single.victims, single.defenses) == (None, None)
    assert single.pictures == pytest.approx(0.005)


# --- aggregates


@settings(deadline=None)
@given(st.lists(SHARES, min_size=1, max_size=30))
def test_the_interquartile_mean_is_rliable_s(values: list[float]) -> None:
    want = scipy_stats.trim_mean(values, proportiontocut=0.25)
    assert inference.interquartile_mean(np.array(values)) == pytest.approx(want)


def test_a_profile_counts_what_lies_at_or_below() -> None:
    taus = np.array([0.0, 0.1, 0.5, 1.0])
    found = inference.profile(np.array([0.0, 0.1, 0.3, np.nan, 1.0]), taus)
    assert list(found) == [0.25, 0.5, 0.75, 1.0]
    assert np.isnan(inference.profile(np.array([np.nan]), taus)).all()


def test_improvement_is_of_the_victims_that_both_have() -> None:
    hard = np.array([[0.1, 0.5, 0.9], [0.2, 0.3, np.nan]])
    assert inference.improvement(hard - 0.02, hard) == 1, (
        "better on every victim, however they vary"
    )
    assert inference.improvement(hard + 1e-15, hard) == 0.5, "rounding is no difference"
    ours, theirs = np.array([[0.1, 0.6, 0.9]]), np.array([[0.2, 0.5, np.nan]])
    assert inference.improvement(ours, theirs) == 0.5
    rng = np.random.default_rng(3)
    ours, theirs = rng.random((4, 3)), rng.random((4, 3))
    slow = [
        np.mean([1.0 if a < b else 0.0 for a, b in zip(x, y, strict=True)])
        for x, y in zip(ours, theirs, strict=True)
    ]
    assert inference.improvement(ours, theirs) == pytest.approx(np.mean(slow))
    gone = np.full((1, 2), np.nan)
    assert math.isnan(inference.improvement(gone, gone))


# --- groups


def named(order: list[int], differ: npt.NDArray[np.bool_]) -> list[str]:
    return [inference.letters(groups) for groups in inference.groups_of(order, differ)]


def test_letters_join_what_is_not_told_apart() -> None:
    differ = np.zeros((4, 4), dtype=bool)
    for a, b in ((0, 2), (0, 3), (1, 3)):
        differ[a, b] = differ[b, a] = True
    assert named([0, 1, 2, 3], differ) == ["a", "ab", "bc", "c"]
    assert named([0, 1, 2, 3], ~np.eye(4, dtype=bool)) == ["a", "b", "c", "d"]
    assert named([2, 0, 1], np.zeros((3, 3), dtype=bool)) == ["a", "a", "a"]
    assert named([], differ) == []
    assert inference.letters((0, 1, 2, 5, 27)) == "a-c f ab"
    assert inference.letters((25, 26)) == "zaa"


@settings(deadline=None)
@given(st.integers(1, 7), st.data())
def test_letters_say_exactly_which_pairs_differ(num: int, data: st.DataObject) -> None:
    differ = np.zeros((num, num), dtype=bool)
    for a, b in itertools.combinations(range(num), 2):
        differ[a, b] = differ[b, a] = data.draw(st.booleans())
    order = data.draw(st.permutations(range(num)))
    groups = inference.groups_of(order, differ)
    for a, b in itertools.combinations(range(num), 2):
        assert bool(set(groups[a]) & set(groups[b])) != differ[a, b]


def test_differences_that_rounding_made_are_none() -> None:
    noise = [1e-17, -3e-17, 2e-16, 5e-17, 1e-16, 1e-16, -1e-16, 1e-16]
    assert inference.signed_rank(noise) == inference.sign_flip(noise) == 1
    assert inference.rank_direction(noise) == 0


def test_a_direction_is_that_of_the_ranks() -> None:
    mostly_less = [-0.01 - 0.001 * i for i in range(20)] + [0.9]
    assert sum(mostly_less) > 0
    assert inference.rank_direction(mostly_less) == -1
    assert inference.rank_direction([0.1, -0.2, 0.3]) == 1
    assert inference.rank_direction([0.1, -0.1]) == 0


@pytest.mark.parametrize("counts", [(0, 0), (2, 10), (300, 340), (4_900, 5_200)])
def test_mcnemar_counts_pictures_by_the_thousand(counts: tuple[int, int]) -> None:
    want = scipy_stats.binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert inference.mcnemar(*counts) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("pairs", [1, 3, 10, 45])
def test_so_many_strata_are_needed(pairs: int) -> None:
    needed = inference.strata_needed(pairs)
    assert pairs * inference.least_p(needed) <= 0.05 < pairs * inference.least_p(needed - 1)


def test_pairs_are_told_apart_only_with_strata_enough() -> None:
    base = np.linspace(0.2, 0.8, 6)
    values = np.stack([base, base + 0.1])
    differ, family = inference.separated(values)
    assert (bool(differ[0, 1]), family) == (True, 1)
    assert not inference.separated(values[:, :5])[0].any(), "5 of 5 is 0.0625"
    three = np.stack([base, base + 0.1, base + 0.2])
    assert not inference.separated(three)[0].any(), "Holm: three times 0.03125"


def test_draws_tell_apart_what_never_overlaps() -> None:
    rng = np.random.default_rng(4)
    draws = rng.normal([0.1, 0.12, 0.6], 0.03, (4000, 3))
    differ, family = inference.separated_by_draws(draws, np.array([0.1, 0.12, 0.6]))
    assert family == 3
    assert differ.tolist() == [
        [False, False, True],
        [False, False, True],
        [True, True, False],
    ]


def test_draws_of_a_maximum_are_held_against_their_own_middle() -> None:
    """Two that measure alike: one's draws lie higher, since more of its attacks are near."""
    rng = np.random.default_rng(5)
    draws = np.stack([rng.normal(0.6, 0.01, 4000), rng.normal(0.5, 0.01, 4000)], axis=1)
    assert not inference.separated_by_draws(draws, np.array([0.5, 0.5]))[0].any()
    assert inference.separated_by_draws(draws, np.array([0.6, 0.5]))[0].any()
    still = np.full((4000, 2), 0.5)
    assert not inference.separated_by_draws(still, np.array([0.5, 0.5]))[0].any()
