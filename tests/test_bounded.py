"""No interval is narrower than pictures allow, or leaves what a share can be."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
from scipy import stats as scipy_stats

from analysis.bounded import of_difference, of_share, paired, paired_p
from analysis.compare import compare_in
from analysis.inference import Mean
from analysis.matrix import load_matrix
from analysis.pointwise import pointwise
from analysis.reader import Tables
from analysis.resample import Bootstrap
from analysis.standing import standings
from analysis.stats import wilson
from tests.boards import steady, write_board, write_pictures

ATTACKS = tuple(f"attack{i}" for i in range(8))


def test_a_share_has_its_hand_values() -> None:
    assert of_share(Mean(0.0, 0.0, 0.0, 2), 16) == pytest.approx((0, 0, 0.1936, 2), abs=5e-5)
    wide = of_share(Mean(0.9, 0.6, 1.2, 2), 1000)
    assert (wide.low, wide.high) == (0.6, 1.0)
    unknown = Mean(0.9, -math.inf, math.inf, 0)
    assert of_share(unknown, 1000) == of_difference(unknown, 1000) == unknown
    assert of_share(Mean(0.9, 0.8, 1.1, 2), 0) == (0.9, 0.8, 1.0, 2), "pictures are not known"


def test_a_difference_has_its_hand_values() -> None:
    # None of 16 apart: half a picture each way, 1 / 18 about 0.
    assert paired(0, 16)[:2] == pytest.approx((-1.96 / 18, 1.96 / 18))
    assert paired_p(0, 16) == 1
    # 10 of 1000, all one way: 10 / 1002, and the root of 11 - 100 / 1002.
    half = 1.96 * math.sqrt(11 - 100 / 1002) / 1002
    assert paired(-0.01, 1000)[:2] == pytest.approx((-10 / 1002 - half, -10 / 1002 + half))
    assert of_difference(Mean(-0.9, -1.2, 0.1, 2), 1000)[:3] == (-0.9, -1.0, 0.1)
    assert paired_p(0.001, 1000) > 0.3, "one picture shows nothing"
    assert paired(1.0, 1000).high > 1 >= of_difference(Mean(1.0, 1.0, 1.0, 2), 1000).high


@pytest.mark.parametrize("apart", [0, 1, 4, 5, 6, 12, 60])
def test_a_paired_p_is_near_that_of_mcnemar(apart: int) -> None:
    """All pictures that differ do so one way. Exact is 6 of 6; 5 of 5 are 0.0625."""
    exact = scipy_stats.binomtest(apart, apart).pvalue if apart else 1.0
    found = paired_p(apart / 1000, 1000)
    assert found >= exact / 2.2
    assert (found <= 0.05) == (apart >= 5)


def test_no_interval_of_a_board_is_a_point_or_leaves_its_range(tmp_path: Path) -> None:
    """Seeds that agree on every number, and seeds that differ by all there is."""
    alike, wild = (lambda a, r, s: 0.95), (lambda a, r, s: (0.0, 0.5, 1.0)[s])
    asr = {"none": alike, "still": lambda a, r, s: 0.0, "wild": wild}
    folder = write_board(tmp_path, asr, attacks=ATTACKS, clean={"wild": wild})
    with closing(Tables(folder)) as tables:
        matrix = load_matrix(tables)
    assert matrix is not None
    for line in standings(matrix, draws=400).lines:
        assert line.middle is not None
        assert line.worst is not None
        for span in (line.asr, line.clean, line.middle, line.worst):
            assert 0 <= span.low < span.high <= 1
            assert span.high - span.low >= 0.0038, "1.96^2 / (1000 + 1.96^2)"
        for span in (line.loss, line.lift):
            assert -1 <= span.low < span.high <= 1
            assert span.high - span.low >= 0.0039, "2 x 1.96 / 1002"
    found = compare_in(folder, "wild", "still")
    for mean in (found.asr, found.clean, found.asr_strata, found.clean_strata):
        assert -1 <= mean.low < mean.high <= 1
    found = compare_in(folder, "none", "still")
    assert found.asr.low < 0.95 < found.asr.high


def test_a_pointwise_worst_case_is_held_to_its_pictures(tmp_path: Path) -> None:
    """80, 97 and 100 of 100: t would have it reach 119 %. And 0 of 100 is no proof of 0."""
    share = (80, 97, 100)
    write_board(tmp_path, {"none": lambda a, r, s: share[s] / 100, "still": steady(0.0)})
    labels, right = [0] * 5 + [1 + i % 9 for i in range(100)], [True] * 105
    for attack in ("badnet", "blended"):
        for seed in (0, 1, 2):
            fooled = [False] * 5 + [i < share[seed] for i in range(100)]
            write_pictures(tmp_path, f"{attack}-0.01-none-{seed}-0", fooled, right, labels)
            write_pictures(tmp_path, f"{attack}-0.01-still-{seed}-0", [False] * 105, right, labels)
    with closing(Tables(tmp_path)) as tables:
        matrix = load_matrix(tables)
        assert matrix is not None
        found = pointwise(tables, matrix)
    assert found["none"].value == pytest.approx(0.9233, abs=1e-4)
    assert 0 <= found["none"].low < found["none"].high == 1
    assert found["still"].high == pytest.approx(wilson(0, 100).high)


def test_one_attack_has_one_interval(tmp_path: Path) -> None:
    """The largest over one attack is its mean."""
    asr = {"none": steady(0.9, 0.02), "ours": steady(0.3, 0.05)}
    folder = write_board(tmp_path, asr, attacks=["badnet"], rates=["0.01", "0.05"])
    with closing(Tables(folder)) as tables:
        matrix = load_matrix(tables)
    assert matrix is not None
    for line in standings(matrix, draws=300).lines:
        assert line.worst == pytest.approx(line.asr[:3])


def test_a_maximum_is_no_narrower_than_each_attack(tmp_path: Path) -> None:
    """Half as wide as the 95 % of what is off most: of 12 attacks, more than of one."""
    attacks = [f"attack{i}" for i in range(12)]
    asr = {"none": steady(0.5, 0.05), "ours": steady(0.3, 0.05)}
    folder = write_board(tmp_path, asr, attacks=attacks)
    with closing(Tables(folder)) as tables:
        matrix = load_matrix(tables)
    assert matrix is not None
    worst = Bootstrap(matrix, 2000).worst()
    for d, span in enumerate(worst):
        spread = matrix.asr_DSR[d].std(axis=1, ddof=1).max() / math.sqrt(3)
        assert (span.high - span.low) / 2 >= 0.99 * scipy_stats.t.ppf(0.975, 2) * spread
