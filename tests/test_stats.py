"""Statistics against hand values and scipy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high", "digits"),
    [
        (0, 16, 0.0, 0.1936, 4),
        (2, 16, 0.0350, 0.3602, 4),
        (15, 16, 0.7167, 0.9889, 4),
        (25, 50, 0.3664, 0.6336, 4),
        (45000, 49950, 0.8982, 0.9035, 4),
        (0, 49950, 0.0, 0.00008, 5),
    ],
)
def test_wilson_gives_the_hand_values(
    successes: int, n: int, low: float, high: float, digits: int
) -> None:
    interval = stats.wilson(successes, n)
    assert round(interval.low, digits) == low
    assert round(interval.high, digits) == high


@settings(deadline=None)
@given(n=st.integers(1, 100_000), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_in_the_unit(n: int, share: float) -> None:
    successes = round(share * n)
    interval = stats.wilson(successes, n)
    assert 0 <= interval.low <= successes / n <= interval.high <= 1
    expected = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
    # scipy uses the exact normal quantile, the protocol 1.96.
    assert stats.Z == 1.96
    assert interval.low == pytest.approx(expected.low, abs=2e-5)
    assert interval.high == pytest.approx(expected.high, abs=2e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 4), (5, 4)])
def test_an_impossible_share_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="share needs"):
        stats.wilson(successes, n)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 7, 10, 29, 30, 99, 100, 1001])
def test_t_agrees_with_scipy(df: int) -> None:
    for p in (0.001, 0.025, 0.2, 0.5, 0.8, 0.975, 0.9999):
        want = scipy_stats.t.ppf(p, df)
        assert stats.t_quantile(p, df) == pytest.approx(want, rel=1e-9, abs=1e-9)
        assert stats.t_cdf(want, df) == pytest.approx(p, rel=1e-9)


def test_t_quantile_of_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="df=0"):
        stats.t_quantile(0.975, 0)


def test_one_seed_is_the_interval_of_its_cell() -> None:
    assert stats.over_seeds([0.5], 50) == stats.wilson(25, 50)
    assert stats.over_seeds([0.5], 50).kind == "within-cell"


def test_three_seeds_are_a_t_interval() -> None:
    shares = [0.2, 0.5, 0.8]
    interval = stats.over_seeds(shares, 100_000)
    want = scipy_stats.t.interval(0.95, 2, loc=0.5, scale=scipy_stats.sem(shares))
    assert interval.kind == "seeds"
    assert (interval.low, interval.high) == (max(0, want[0]), min(1, want[1]))
    narrow = stats.over_seeds([0.49, 0.5, 0.51], 1_000_000)
    want = scipy_stats.t.interval(0.95, 2, loc=0.5, scale=scipy_stats.sem([0.49, 0.5, 0.51]))
    assert (narrow.low, narrow.high) == pytest.approx(want)


def test_seeds_that_agree_do_not_shrink_below_the_images() -> None:
    assert stats.over_seeds([1.0, 1.0, 1.0], 100)[:2] == stats.wilson(100, 100)[:2]


def test_labels_say_how_much_to_trust() -> None:
    assert stats.seeds_label(1).startswith("1 seed: intervals are within-cell")
    assert stats.seeds_label(3).startswith("3 seeds, indicative")
    assert "indicative" not in stats.seeds_label(5)


def test_derived_metrics_by_hand() -> None:
    assert stats.normalised_asr(0.9, 0.2) == pytest.approx(0.875)
    assert stats.normalised_asr(1.0, 1.0) is None


def test_der_falls_when_clean_accuracy_falls() -> None:
    """T07: a benchmark adds the accuracy loss; its board rewards breaking the model."""
    assert stats.defense_effectiveness(0.90, 0.95, 0.88, 0.05) == pytest.approx(0.94)
    assert stats.defense_effectiveness(0.9, 0.95, 0.5, 0.05) < 0.94
    assert stats.defense_effectiveness(0.9, 0.9, 0.9, 0.95) == 0.5
