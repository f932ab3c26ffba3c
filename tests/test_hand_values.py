"""Numbers of a board that can be worked out by hand, to the last digit."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.apart import worst_told_apart
from analysis.board import load_board
from analysis.drawing import _costs
from analysis.inference import detectable
from analysis.leaderboard import Asked
from analysis.matrix import About, Matrix, Stratum, load_matrix
from analysis.pointwise import pointwise
from analysis.reader import Tables
from analysis.resample import Bootstrap
from analysis.seeds import seed_effects
from analysis.standing import Standing, standings
from analysis.stats import wilson
from grid.schema.writing import write_grid, write_rows
from tests.boards import N, steady, write_board, write_pictures
from tests.rows import cell_columns, cell_rows

ATTACKS = tuple(f"attack{i}" for i in range(8))


def matrix_of(folder: Path) -> Matrix:
    with closing(Tables(folder)) as tables:
        found = load_matrix(tables)
    assert found is not None
    return found


def standing_of(matrix: Matrix, defense: str) -> Standing:
    (line,) = [x for x in standings(matrix, draws=200).lines if x.defense == defense]
    return line


def points(*pairs: tuple[float, float]) -> Matrix:
    """Defenses of one attack whose every seed has this clean accuracy and ASR."""
    shape = (len(pairs), 1, 3)
    clean, asr = (np.full(shape, np.array(v)[:, None, None]) for v in zip(*pairs, strict=True))
    return Matrix(
        defenses=("none", *(f"d{i}" for i in range(1, len(pairs)))),
        strata=(Stratum("badnet", "0.01", "t", "F", "m", "x"),),
        seeds=(0, 1, 2),
        is_sound_SR=np.ones((1, 3), dtype=bool),
        about=(About((), "finetuning", "exact", is_control=False),) * len(pairs),
        clean_DSR=clean,
        asr_DSR=asr,
        base_DSR=np.zeros(shape),
        cost_DSR=np.zeros(shape),
        status_DSR=np.full(shape, "ok"),
        pictures_S=np.array([1000]),
    )


def test_effects_of_seeds_are_scaled_by_their_own_stratum() -> None:
    nan = math.nan
    found = seed_effects(np.array([[0.0, 1.0, nan], [0.1, 0.2, 0.6], [0.5, nan, nan]]))
    # Squares sum to the variance of a mean: 0.5 / 2 of two, 0.07 / 3 of three.
    assert (found[:2] ** 2).sum(axis=1) == pytest.approx([0.25, 0.07 / 3])
    assert found[0] == pytest.approx([-math.sqrt(0.125), math.sqrt(0.125), 0])
    assert found[1] == pytest.approx(np.array([-0.2, -0.1, 0.3]) / math.sqrt(6))
    # One seed: the mean of what a single seed of the others does, root 2 and root 3 of their means.
    want = (found[0] * math.sqrt(2) + found[1] * math.sqrt(3)) / 2
    assert found[2] == pytest.approx(want)


def test_ties_share_the_better_rank() -> None:
    ranks = Bootstrap(points((0.6, 0.9), (0.6, 0.3), (0.6, 0.3), (0.6, 0.1)), 50).ranks()
    assert ranks.tolist() == [[4, 4], [2, 2], [2, 2], [1, 1]]


def test_a_front_needs_both_numbers() -> None:
    """As safe and less accurate is off it, as is as accurate and less safe; twins are both on."""
    matrix = points((0.6, 0.9), (0.6, 0.1), (0.5, 0.1), (0.6, 0.1), (0.55, 0.05))
    assert Bootstrap(matrix, 50).on_front().tolist() == [0, 1, 0, 1, 1]


def test_the_smallest_difference_is_of_the_first_step_of_holm(tmp_path: Path) -> None:
    asr = {"none": steady(0.9, 0.02), "a": steady(0.4, 0.05), "b": steady(0.4, 0.05, 1)}
    matrix = matrix_of(write_board(tmp_path, asr, attacks=ATTACKS))
    found = standings(matrix, draws=100)
    mean_DS = matrix.asr_DSR.mean(axis=2)
    least = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        difference = mean_DS[i] - mean_DS[j]
        quantiles = scipy_stats.t.ppf(1 - 0.05 / 3 / 2, 7) + scipy_stats.t.ppf(0.8, 7)
        least.append(quantiles * difference.std(ddof=1) / math.sqrt(8))
        assert detectable(list(difference), 0.05 / 3) == pytest.approx(least[-1])
    assert found.detectable == pytest.approx(np.median(least))
    (note,) = [note for note in found.notes() if note.startswith("Smallest difference")]
    assert "at 0.05 / 3 as Holm's correction begins" in note


def test_seeds_are_the_fewest_of_a_stratum(tmp_path: Path) -> None:
    gone = {("none", ATTACKS[0], "0.01", 2): "invalid_victim"}
    asr = {"none": steady(0.9, 0.02), "a": steady(0.4, 0.05)}
    found = standings(matrix_of(write_board(tmp_path, asr, attacks=ATTACKS, status=gone)))
    assert found.seeds == 2
    assert ", 2 seeds, indicative" in found.notes()[1]


def test_pictures_are_the_fewest_of_a_stratum(tmp_path: Path) -> None:
    asr = {"none": steady(0.9), "a": steady(0.0)}
    matrix = matrix_of(write_board(tmp_path, asr, attacks=ATTACKS))
    assert matrix.pictures == N
    few = replace(matrix, pictures_S=np.array([16, *[N] * 7]))
    assert few.pictures == 16
    line = standing_of(few, "a")
    assert (line.asr.low, line.asr.high) == pytest.approx(wilson(0, 16)[:2])


@pytest.mark.parametrize(("gaps", "is_partial"), [(1, False), (2, True)])
def test_partial_is_below_95_of_100(gaps: int, is_partial: bool, tmp_path: Path) -> None:
    """23 of 24 are 95.8 %, 22 are 91.7 %."""
    gone = {("a", ATTACKS[i], "0.01", 0): "failed_infrastructure" for i in range(gaps)}
    asr = {"none": steady(0.9, 0.02), "a": steady(0.4, 0.05)}
    line = standing_of(matrix_of(write_board(tmp_path, asr, attacks=ATTACKS, status=gone)), "a")
    assert line.coverage == pytest.approx((24 - gaps) / 24)
    assert line.is_partial == is_partial


def test_pictures_of_cells_that_are_not_planned_are_in_no_worst_case(tmp_path: Path) -> None:
    """A cell of before the grid file was edited: its attack fools all, and is no more."""
    write_board(tmp_path, {"none": steady(0.5)}, attacks=["badnet"], seeds=[0])
    labels, right = [1, 2, 3, 4], [True] * 4
    write_pictures(tmp_path, "badnet-0.01-none-0-0", [True, False, False, False], right, labels)
    write_rows(tmp_path, cell_rows("sig", "0.01", "none", 0, cell="before", n=N, asr=1.0))
    write_pictures(tmp_path, "before", [True] * 4, right, labels)
    with closing(Tables(tmp_path)) as tables:
        matrix = load_matrix(tables)
        assert matrix is not None
        found = pointwise(tables, matrix)
    assert found["none"].value == 0.25


def test_the_lift_that_is_removed_is_a_share_of_all_lift(tmp_path: Path) -> None:
    """0.88 and 0.38 above a clean victim's 0.02; what is left is 0.44 and 0.1."""
    none, ours = {"badnet": 0.9, "blended": 0.4}, {"badnet": 0.46, "blended": 0.12}
    asr = {"none": lambda a, r, s: none[a], "a": lambda a, r, s: ours[a]}
    with closing(Tables(write_board(tmp_path, asr))) as tables:
        frame = _costs(tables, Asked())
    (removed,) = frame["lift_removed"]
    assert removed == pytest.approx(1 - 0.54 / 1.26)


def test_a_line_has_the_t_interval_of_its_seeds(tmp_path: Path) -> None:
    value = (0.4, 0.5, 0.7)
    asr = {"none": lambda a, r, s: value[s]}
    (line,) = load_board(write_board(tmp_path, asr, attacks=["badnet"])).lines
    low, high = scipy_stats.t.interval(0.95, 2, np.mean(value), scipy_stats.sem(value))
    assert (line.asr_top1_low, line.asr_top1_high) == pytest.approx((low, high), abs=1e-4)


def test_the_worst_case_is_as_wide_as_all_attacks_together() -> None:
    """Of two attacks that vary alike, both by one effect: the t interval of either, no less."""
    matrix = points((0.6, 0.9), (0.6, 0.5))
    asr = np.repeat(np.array([0.88, 0.9, 0.92]) - np.array([[[0.0]], [[0.4]]]), 2, axis=1)
    strata = tuple(matrix.strata[0]._replace(attack=name) for name in ("badnet", "blended"))
    both = replace(
        matrix,
        strata=strata,
        is_sound_SR=np.ones((2, 3), dtype=bool),
        asr_DSR=asr,
        pictures_S=np.array([10**6] * 2),
    )
    half = scipy_stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    span = Bootstrap(both, 40_000).worst()[1]
    assert span.value == pytest.approx(0.5)
    assert (span.high - span.low) / 2 == pytest.approx(half, rel=0.05)


def test_worst_cases_that_one_picture_parts_are_not_told_apart() -> None:
    near = Bootstrap(points((0.6, 0.9), (0.6, 0.3), (0.6, 0.301), (0.6, 0.4)), 2000)
    differ, pairs = worst_told_apart(near)
    assert (pairs, differ[1].tolist()) == (6, [True, False, False, True])


def test_two_defense_seeds_are_no_more_pictures(tmp_path: Path) -> None:
    """Four pictures, seen by two runs of a defense on each victim, are four."""
    rows: list[dict[str, Any]] = []
    cells = []
    for seed in (0, 1):
        for nested in (0, 1):
            own: dict[str, Any] = {"cell": f"{seed}-{nested}", "defense_seed": nested}
            cells.append(cell_columns("badnet", "0.01", "none", seed, **own))
            rows += cell_rows("badnet", "0.01", "none", seed, asr=0.0, n=N, **own)
            write_pictures(tmp_path, own["cell"], [False] * 4, [True] * 4, [1, 2, 3, 4])
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "made", "0", cells)
    with closing(Tables(tmp_path)) as tables:
        matrix = load_matrix(tables)
        assert matrix is not None
        found = pointwise(tables, matrix)
    assert found["none"].high == pytest.approx(wilson(0, 4).high)
