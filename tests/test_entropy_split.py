"""The split by two entropies, against its definition, and on data whose poison is known."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from victims.draws import numpy_rng
from victims.entropy_split import Bools, Floats, Split, places, split
from victims.errors import MethodFailure

# Few different values, so that ties are the rule.
pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)
distinct = st.integers(2, 30).flatmap(
    lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))
)
sigmas = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.7])


def arrays(rows: list[tuple[int, int]]) -> tuple[Floats, Floats]:
    judge, early = zip(*rows, strict=True)
    return np.array(judge, dtype=np.float64), np.array(early, dtype=np.float64)


def slow_rank(values: list[int], row: int) -> Fraction:
    """The share of rows up to this one, equal values of earlier rows below it."""
    below = sum(v < values[row] for v in values)
    tied = sum(values[other] == values[row] for other in range(row + 1))
    return Fraction(below + tied, len(values))


@given(pairs, sigmas, sigmas)
def test_it_is_its_definition(rows: list[tuple[int, int]], sigma1: float, sigma2: float) -> None:
    found = split(*arrays(rows), sigma1, sigma2)
    one, two = Fraction(str(sigma1)), Fraction(str(sigma2))
    for row in range(len(rows)):
        x = slow_rank([judge for judge, _ in rows], row)
        y = slow_rank([early for _, early in rows], row)
        assert (found.judge_N[row], found.early_N[row]) == (float(x), float(y))
        assert found.clean_N[row] == (x <= 1 - one and y >= one)
        assert found.triggered_N[row] == (x > 1 - two or y < two)


@given(pairs, sigmas, sigmas, sigmas)
def test_sets_shrink_and_grow_with_their_thresholds(
    rows: list[tuple[int, int]], low: float, high: float, other: float
) -> None:
    assume(low <= high)
    narrow, wide = split(*arrays(rows), low, low), split(*arrays(rows), high, high)
    assert not (wide.clean_N & ~narrow.clean_N).any()
    assert not (narrow.triggered_N & ~wide.triggered_N).any()
    assert not (split(*arrays(rows), high, low).clean_N & narrow.triggered_N).any()
    # Neither threshold has a say in the other set.
    assert np.array_equal(split(*arrays(rows), low, other).clean_N, narrow.clean_N)
    assert np.array_equal(split(*arrays(rows), other, low).triggered_N, narrow.triggered_N)


@given(distinct, st.randoms(use_true_random=False), sigmas, sigmas)
def test_rows_in_another_order_have_their_sets(
    values: tuple[list[int], list[int]], random: object, sigma1: float, sigma2: float
) -> None:
    judge, early = (np.array(side, dtype=np.float64) for side in values)
    order = list(range(len(judge)))
    random.shuffle(order)  # type: ignore[attr-defined]
    found, moved = (
        split(judge, early, sigma1, sigma2),
        split(judge[order], early[order], sigma1, sigma2),
    )
    for name in ("judge_N", "early_N", "clean_N", "triggered_N", "suspicion_N"):
        assert np.array_equal(getattr(found, name)[order], getattr(moved, name))


@given(distinct, sigmas)
def test_what_counts_is_the_order_alone(values: tuple[list[int], list[int]], sigma: float) -> None:
    judge, early = (np.array(side, dtype=np.float64) for side in values)
    found, bent = (
        split(judge, early, sigma, sigma),
        split(np.exp(judge), early**3 - 5, sigma, sigma),
    )
    assert np.array_equal(found.clean_N, bent.clean_N)
    assert np.array_equal(found.triggered_N, bent.triggered_N)


def test_nothing_at_sigma_0() -> None:
    found = split(np.arange(9.0), np.arange(9.0)[::-1], 0.0, 0.0)
    assert found.clean_N.all()
    assert not found.triggered_N.any()


def test_of_equal_rows_the_earlier_is_easier() -> None:
    assert places(np.array([1.0, 0.0, 1.0, 0.0])).tolist() == [3, 1, 4, 2]


def test_a_border_is_met_as_it_is_written() -> None:
    """In floats 1 - 0.9 is below 1 / 10, which put the first row of ten on the wrong side."""
    found = split(np.arange(10.0), np.arange(10.0)[::-1], 0.9, 0.9)
    assert np.flatnonzero(found.clean_N).tolist() == [0]
    assert np.flatnonzero(~found.triggered_N).tolist() == [0]


def test_the_triggered_are_the_most_suspicious() -> None:
    rng = numpy_rng(0, "split")
    found = split(rng.random(501), rng.random(501), 0.2, 0.1)
    inside, outside = (found.suspicion_N[mask] for mask in (found.triggered_N, ~found.triggered_N))
    assert inside.min() >= outside.max()


def ideal(share: float, num_rows: int, *, dirty: bool) -> tuple[Split, Bools]:
    """A split where poison is hardest for the judge (if its captions are wrong) and easiest for
    the early model, and nothing else is known."""
    rng = numpy_rng(1, "ideal")
    poisoned = np.arange(num_rows) < share * num_rows
    judge, early = rng.random(num_rows), rng.random(num_rows)
    return split(judge + (poisoned if dirty else 0), early - poisoned, 0.2, 0.1), poisoned


def test_independent_ranks() -> None:
    found, _ = ideal(0.0, 100_000, dirty=True)
    assert found.clean_N.mean() == pytest.approx(0.64, abs=0.01)
    assert found.triggered_N.mean() == pytest.approx(0.19, abs=0.01)


def test_five_percent_of_ideal_poison() -> None:
    found, poisoned = ideal(0.05, 100_000, dirty=True)
    assert found.clean_N.mean() == pytest.approx(0.674, abs=0.005)
    assert found.triggered_N.mean() == pytest.approx(0.147, abs=0.005)
    assert found.triggered_N[poisoned].all()
    assert poisoned[found.triggered_N].mean() == pytest.approx(0.34, abs=0.01)


@pytest.mark.parametrize(("dirty", "recall"), [(True, 0.75), (False, 0.55)])
def test_twenty_percent_do_not_fit_into_the_triggered_set(dirty: bool, recall: float) -> None:
    found, poisoned = ideal(0.2, 100_000, dirty=dirty)
    assert found.triggered_N[poisoned].mean() == pytest.approx(recall, abs=0.01)
    assert found.clean_N[poisoned].mean() < 0.001


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_no_rank(bad: float) -> None:
    with pytest.raises(MethodFailure, match="the entropy of row 2 is"):
        split(np.arange(4.0), np.array([1.0, 2.0, bad, 3.0]), 0.2, 0.1)
