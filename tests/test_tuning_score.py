"""What a trial is worth: hand values, and the signed-rank test against scipy's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from grid.tuning.score import (
    FAILED,
    INFEASIBLE,
    CellNumbers,
    TrialNumbers,
    best,
    excess,
    over_cells,
    score,
    signed_rank_p,
)
from grid.tuning.spec import Budget, Drop, Objective, Sees


def cell(attack: str, clean: float, asr: float, change: float | None = None) -> CellNumbers:
    return CellNumbers(
        attack=attack, clean=clean, asr=asr, victim_clean=0.9, victim_asr=1.0, change=change
    )


def test_success_is_first_a_mean_over_the_cells_of_an_attack() -> None:
    """Two seeds of one attack, 0.2 and 0.6, and one cell of another, 0.5: the worst is 0.5."""
    found = over_cells([cell("a", 0.8, 0.2, 0.1), cell("a", 0.9, 0.6, 0.3), cell("b", 0.7, 0.5)])
    assert found.worst_asr == pytest.approx(0.5)
    assert found.mean_asr == pytest.approx(0.45)
    assert found.ca == pytest.approx(0.8)
    assert found.ca_loss == pytest.approx(0.1)
    assert found.change == pytest.approx(0.2)


def numbers(ca_loss: float, worst: float = 0.5, change: float | None = 0.3) -> TrialNumbers:
    return TrialNumbers(
        ca=0.9 - ca_loss, ca_loss=ca_loss, worst_asr=worst, mean_asr=worst / 2, change=change
    )


def test_a_loss_of_exactly_the_limit_keeps_to_it() -> None:
    rule = Objective(minimise="worst_asr", ca_loss=2)
    assert excess(numbers(0.9 - 0.88), rule) == 0
    assert excess(numbers(0.021), rule) == pytest.approx(0.001)
    assert excess(numbers(0.5), Objective(minimise="worst_asr")) == 0


def test_scores_put_what_keeps_to_the_limit_first() -> None:
    rule = Objective(minimise="worst_asr", ca_loss=2)
    bad_but_within, good_but_beyond = numbers(0.02, worst=1.0), numbers(0.03, worst=0.0)
    assert score(bad_but_within, rule) == 1.0
    assert score(good_but_beyond, rule) == pytest.approx(INFEASIBLE + 0.01)
    assert score(numbers(1.0, worst=1.0), rule) < FAILED
    assert score(numbers(0.0), Objective(minimise="mean_asr")) == 0.25
    assert score(numbers(0.1), Objective(maximise="ca")) == pytest.approx(0.2)
    assert score(numbers(0.0), Objective(sees=Sees.CLEAN, maximise="change")) == pytest.approx(0.7)
    # Until a cell has ended nobody knows how much changed: that is no reason to end a trial.
    assert score(numbers(0.0, change=None), Objective(maximise="change")) == 0.0


def test_an_objective_without_attacks_does_not_see_their_success() -> None:
    for rule in (
        Objective(sees=Sees.CLEAN, maximise="change", ca_loss=2),
        Objective(sees=Sees.CLEAN, maximise="ca"),
    ):
        assert score(numbers(0.01, worst=0.0), rule) == score(numbers(0.01, worst=1.0), rule)
    with pytest.raises(ValueError, match="sees none"):
        Objective(sees=Sees.CLEAN, minimise="worst_asr")


def trial(number: int, score: float, ca: float = 0.5, **more: Any) -> dict[str, Any]:
    shared = {"status": "ok", "is_default": False, "device_seconds": 10 - number}
    return {**shared, "number": number, "score": score, "ca": ca, **more}


def test_the_best_trial_is_then_the_most_accurate_then_the_first() -> None:
    trials = [
        trial(0, 0.3, is_default=True),
        trial(1, 0.2, 0.6),
        trial(2, 0.2, 0.7),
        trial(3, 0.2, 0.7),
        trial(4, 0.1, status="stopped"),
        trial(5, 0.0, status="failed"),
    ]
    assert best(trials) == trials[2]
    better = trial(0, 0.1, is_default=True)
    assert best([better, *trials[1:]]) == better, "no search chooses what is worse"
    assert best(trials[4:]) is None


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 1 / 32),
        ([-1, -2, -3], 1.0),
        ([0, 0], 1.0),
        ([1], 0.5),
        ([1, -1], 0.75),  # ties share a rank: sums 0, 1.5, 1.5, 3
        ([0, 2, 3, 0, 1], 1 / 8),
    ],
)
def test_signed_ranks_by_hand(differences: list[float], p: float) -> None:
    assert signed_rank_p(differences) == pytest.approx(p)


@given(st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=12, unique_by=abs))
def test_signed_ranks_are_scipys(differences: list[int]) -> None:
    expected = wilcoxon(differences, alternative="greater", method="exact").pvalue
    assert signed_rank_p(differences) == pytest.approx(expected)


def test_rules_that_could_not_act_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 5 in one direction"):
        Drop(after=4, p=0.05)
    Drop(after=5, p=0.05)
    budgets: list[dict[str, Any]] = [{}, {"trials": 0}, {"trials": 3, "device_hours": -1}]
    for budget in budgets:
        with pytest.raises(ValueError, match="trials, device_hours"):
            Budget(**budget)
    with pytest.raises(ValueError, match="give `minimise`"):
        Objective()
