"""Where defenses stand: tiers, ranks, bounds and what is left out, on made boards."""

from __future__ import annotations

import json
import math
import re
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.drawing import figures_of
from analysis.inference import separated_by_draws
from analysis.leaderboard import Asked, load, text
from analysis.matrix import About, Matrix, Stratum, load_matrix
from analysis.pointwise import pointwise
from analysis.reader import Tables, read_tables
from analysis.resample import Bootstrap
from analysis.seeds import over_strata
from analysis.standing import Standing, Standings, standings
from analysis.standing_render import standing_table
from analysis.text import FORMS, formed
from grid.schema.columns import CELL
from grid.schema.errors import ResultsError
from grid.schema.writing import write_grid, write_rows
from tests.boards import N, steady, write_board, write_pictures
from tests.grids import call
from tests.rows import cell_columns, cell_rows

ATTACKS = ("badnet", "blended", "sig", "wanet", "trojvqa", "badclip", "ssba", "label_consistent")
SPREAD = {
    "none": steady(0.95, 0.01),
    "finetune": steady(0.4, 0.03),
    "cleanclip": steady(0.41, 0.03, seed=1),
    "roclip": steady(0.1, 0.03),
}


def matrix_of(folder: Path) -> Matrix:
    found = read_tables(folder, load_matrix)
    assert found is not None
    return found


def line_of(found: Standings, defense: str) -> Standing:
    (line,) = [line for line in found.lines if line.defense == defense]
    return line


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_board(tmp_path_factory.mktemp("board"), SPREAD, attacks=ATTACKS)


def test_tiers_hold_what_no_test_tells_apart(board: Path) -> None:
    found = standings(matrix_of(board), draws=2000)
    assert [(line.letters, line.defense) for line in found.lines] == [
        ("a", "roclip"),
        ("b", "cleanclip"),
        ("b", "finetune"),
        ("c", "none"),
    ], "by name within a tier"
    assert (found.families, found.strata, found.seeds, found.speaks_of) == ([6], 8, 3, "seeds")
    ranks = {line.defense: line.rank for line in found.lines}
    assert ranks["roclip"] == (1, 1)
    assert ranks["none"] == (4, 4)
    assert ranks["finetune"] == ranks["cleanclip"] == (2, 3)
    assert found.friedman_p < 0.001
    assert "3 seeds, indicative" in " ".join(found.notes())
    assert f"p {found.friedman_p:.3g}." in " ".join(found.notes())


def test_oracles_stand_beside_and_what_was_seen_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search on the held-out attacks led the tiers of what had seen none of them."""
    made = {"none": 0.9, "finetune": 0.3, "tuned": 0.2, "looked": 0.1}
    rows, cells = [], []
    for attack, (defense, asr), seed in product(ATTACKS, made.items(), range(3)):
        more: dict[str, Any] = {}
        if defense in ("tuned", "looked"):
            about = {"trials": 5, "device_seconds": 9.0, "oracle": defense == "looked"}
            more = {"tuned": json.dumps({**about, "seen": attack == "sig"})}
        cells.append(cell_columns(attack, "0.01", defense, seed))
        rows += cell_rows(attack, "0.01", defense, seed, asr=asr + 0.01 * seed, **more)
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "tuned", "0", cells)
    found = standings(matrix_of(tmp_path), draws=200)
    looked = line_of(found, "looked")
    assert (looked.rank, looked.letters, looked.on_front) == (None, "", None)
    assert found.families == [3], "no pair with the oracle is tested"
    assert [line.defense for line in found.lines][-1] == "looked"
    said = call(capsys, "leaderboard", tmp_path, "--part", "tiers").out
    assert "oracles, tuned on what no defender sees, not compared" in said
    assert {"looked (oracle)", "tuned (seen)"} <= set(re.findall(r"\w+ \(\w+\)", said))
    assert "its settings were chosen on attacks of this board" in " ".join(said.split())
    drawn: Any = figures_of(tmp_path, Asked())
    for name in ("trade_off", "rank_plot"):
        assert "looked" not in " ".join(drawn[name].args[0].args[0]["defense"])
    for name in ("heat_map", "profile", "cost"):
        assert "looked (oracle)" in set(drawn[name].args[0].args[0]["defense"])
    compared = call(capsys, "compare", "looked", "finetune", "--in", tmp_path).out
    assert "! looked is an oracle" in compared


def test_tiers_and_comparisons_say_of_which_grid_and_what_joined_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_board(tmp_path, {name: SPREAD[name] for name in ("none", "finetune")})
    rows, cells = [], []
    for attack, defense, seed in product(("badnet", "blended"), ("cleanclip",), range(3)):
        cells.append(cell_columns(attack, "0.01", defense, seed))
        rows += cell_rows(attack, "0.01", defense, seed, asr=0.2, added_later=attack == "badnet")
    write_rows(tmp_path, rows)
    old = json.loads((tmp_path / "grid.json").read_text())["cells"]
    names = [column.name for column in CELL]
    kept = [{name: cell[name] for name in names} for cell in old]
    write_grid(tmp_path, "made", "0123456789abcdef", [*kept, *cells])
    of_what = "Grid made, hash 0123456789abcdef, evaluation set report"
    said = " ".join(call(capsys, "leaderboard", tmp_path, "--part", "tiers").out.split())
    assert f"{of_what}." in said
    assert " cleanclip * " in said
    assert "* has cells that joined the grid after its first run." in said
    told = call(capsys, "leaderboard", tmp_path, "--part", "tiers", "--format", "json").out
    assert json.loads(told)["grid"] == {"name": "made", "hash": "0123456789abcdef"}
    assert json.loads(told)["eval_set"] == "report"
    later = {row["defense"]: row["added_later"] for row in json.loads(told)["tiers"]["rows"]}
    assert later == {"none": False, "finetune": False, "cleanclip": True}
    compared = call(capsys, "compare", "cleanclip", "finetune", "--in", tmp_path).out
    assert f"{of_what}; of cleanclip cells joined it after its first run." in compared


def test_failures_beat_nothing(tmp_path: Path) -> None:
    """What worked on one of three victims beat fine-tuning on every one."""
    gone = {("roclip", a, "0.01", seed): "failed_method" for a in ATTACKS for seed in (1, 2)}
    matrix = matrix_of(write_board(tmp_path / "one", SPREAD, attacks=ATTACKS, status=gone))
    assert line_of(standings(matrix, draws=100), "roclip").improves == pytest.approx(1 / 3)
    gone = {("finetune", a, "0.01", s): "failed_method" for a in ATTACKS for s in (0, 1, 2)}
    gone[("finetune", "sig", "0.01", 0)] = "ok"
    matrix = matrix_of(write_board(tmp_path / "two", SPREAD, attacks=ATTACKS, status=gone))
    assert (line_of(standings(matrix, draws=100), "cleanclip").improves or 0.0) > 0.95


def test_means_are_over_strata_and_intervals_over_seeds(board: Path) -> None:
    matrix = matrix_of(board)
    roclip = line_of(standings(matrix, draws=500), "roclip")
    own = matrix.asr_DSR[matrix.index("roclip")]
    assert roclip.asr.value == pytest.approx(own.mean())
    assert roclip.asr.low < own.mean() < roclip.asr.high
    assert roclip.loss.value == pytest.approx(0)
    assert roclip.lift.value == pytest.approx(own.mean() - 0.02)
    assert roclip.relative_cost == 0.25
    assert roclip.worst is not None
    by_attack = own.mean(axis=1)
    assert roclip.worst.value == pytest.approx(by_attack.max())
    assert roclip.worst_attack == ATTACKS[int(by_attack.argmax())]
    assert roclip.worst.low < roclip.worst.value < roclip.worst.high
    assert roclip.improves == 1.0
    assert line_of(standings(matrix, draws=500), "finetune").improves is None


def test_who_had_more_than_the_control_is_named(board: Path) -> None:
    matrix = matrix_of(board)
    told = " ".join(standings(matrix, draws=200).notes())
    assert "With more than finetune had: roclip (suspect data, start)." in told
    cost = matrix.cost_DSR.copy()
    cost[matrix.index("cleanclip")] = 1.0
    cost[matrix.index("finetune")] = 0.25
    cost[matrix.index("roclip")] = 0.26
    told = " ".join(standings(replace(matrix, cost_DSR=cost), draws=200).notes())
    assert "had: roclip (suspect data, start); cleanclip (4.0 times its cost)." in told
    alike = matrix.only([matrix.index(name) for name in ("none", "finetune", "cleanclip")])
    assert "With more than" not in " ".join(standings(alike, draws=200).notes())


def test_the_front_is_a_share_of_draws(tmp_path: Path) -> None:
    """Accurate and safe beats all; what trades one for the other is on the front too."""
    clean = {"none": steady(0.6, 0.002), "costly": steady(0.55, 0.002), "bad": steady(0.5, 0.002)}
    asr = {"none": steady(0.9, 0.01), "costly": steady(0.1, 0.01), "bad": steady(0.5, 0.01)}
    found = standings(matrix_of(write_board(tmp_path, asr, clean=clean)), draws=2000)
    fronts = {line.defense: line.on_front for line in found.lines}
    assert fronts == {"none": 1.0, "costly": 1.0, "bad": 0.0}
    assert found.volume is not None
    # Nothing at full accuracy is safe, and what is safe has lost all that may be lost.
    assert found.volume.value == pytest.approx(0.1, abs=0.02)


def test_needs_are_compared_with_their_like(board: Path) -> None:
    found = standings(matrix_of(board), by_needs=True, draws=500)
    assert sorted(found.families) == [0, 0, 1], "only finetune and cleanclip have equal needs"
    assert {line.letters for line in found.lines} == {"a"}
    assert "within each group of equal needs)" in found.notes()[1]
    heads = standing_table(found).heads
    assert len(heads) - len(set(heads)) == 1, "equal needs stand together"


def test_a_limit_on_clean_accuracy_sets_others_apart(tmp_path: Path) -> None:
    clean = {"costly": steady(0.57), "cheap": steady(0.59)}
    asr = {"none": steady(0.9, 0.01), "costly": steady(0.01, 0.01), "cheap": steady(0.2, 0.01)}
    matrix = matrix_of(write_board(tmp_path, asr, clean=clean))
    found = standings(matrix, at_ca_loss=2, draws=500)
    assert line_of(found, "costly").is_beyond
    assert line_of(found, "costly").rank is None
    assert line_of(found, "cheap").rank == (1, 1)
    assert not line_of(standings(matrix, at_ca_loss=3, draws=500), "costly").is_beyond
    with pytest.raises(ResultsError, match="from 0 to 100, found -1"):
        standings(matrix, at_ca_loss=-1)


def test_what_is_missing_is_bounded_and_not_ranked(tmp_path: Path) -> None:
    """A gap may hide the clean victim's ASR or the undefended one's."""
    gone = {("roclip", "sig", "0.01", seed): "failed_method" for seed in (0, 1, 2)}
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, status=gone))
    found = standings(matrix, draws=500)
    roclip = line_of(found, "roclip")
    assert roclip.is_partial
    assert roclip.coverage == pytest.approx(7 / 8)
    assert (roclip.rank, roclip.letters, roclip.failures) == (None, "", 3)
    own = matrix.asr_DSR[matrix.index("roclip")]
    none = matrix.asr_DSR[matrix.index("none")]
    sig = [s.attack for s in matrix.strata].index("sig")
    assert roclip.bounds is not None
    low, high = roclip.bounds
    assert low == pytest.approx((np.nansum(own) + 3 * 0.02) / 24)
    assert high == pytest.approx((np.nansum(own) + none[sig].sum()) / 24)
    assert roclip.filled == 0
    assert line_of(found, "cleanclip").rank == (1, 2), "the others are ranked without it"
    shown = formed(standing_table(found), "table", 120)
    assert "partial: numbers on less than 95 % of the sound victims" in shown
    assert "roclip (3 failed)" in shown


def test_one_small_gap_keeps_a_rank_on_the_victims_that_all_have(tmp_path: Path) -> None:
    gone = {("roclip", "sig", "0.01", 0): "failed_infrastructure"}
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, status=gone))
    roclip = line_of(standings(matrix, draws=500), "roclip")
    assert not roclip.is_partial
    assert roclip.rank == (1, 1)
    assert roclip.bounds is not None


def test_victims_that_failed_their_gate_are_in_no_mean(tmp_path: Path) -> None:
    bad = {("none", "sig", "0.01", seed): "invalid_victim" for seed in (0, 1, 2)}
    bad |= {(d, "sig", "0.01", s): "skipped" for d in ("finetune", "roclip") for s in (0, 1, 2)}
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, status=bad))
    assert "sig" not in {stratum.attack for stratum in matrix.strata}
    assert line_of(standings(matrix, draws=200), "roclip").coverage == 1


def test_one_seed_gives_no_ranks(tmp_path: Path) -> None:
    found = standings(matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, seeds=[0])))
    roclip = line_of(found, "roclip")
    assert (roclip.rank, roclip.on_front, found.speaks_of) == (None, None, "pictures")
    assert roclip.asr.low == -math.inf
    assert roclip.worst is not None
    assert roclip.worst.low < roclip.worst.value
    assert "One seed gives no ranks" in " ".join(found.notes())


def test_few_strata_separate_nothing_and_say_so(tmp_path: Path) -> None:
    found = standings(matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS[:5])), draws=200)
    assert {line.letters for line in found.lines} == {"a"}
    assert "5 strata can never show p <= 0.05" in " ".join(found.notes())


def test_worst_cases_are_told_apart_by_draws(tmp_path: Path) -> None:
    asr = {
        "none": steady(0.95, 0.01),
        "finetune": steady(0.5, 0.01),
        "cleanclip": steady(0.51, 0.01, seed=1),
        "roclip": steady(0.05, 0.01),
    }
    matrix = matrix_of(write_board(tmp_path, asr, attacks=ATTACKS))
    found = standings(matrix, worst_case=True, draws=4000)
    assert found.tested == "draws of victim seeds"
    assert [line.letters for line in found.lines] == ["a", "b", "b", "c"]
    for line in found.lines:
        assert line.worst is not None
        assert line.worst.low <= line.worst.value <= line.worst.high


@pytest.mark.parametrize("worst_case", [False, True])
def test_one_seed_gives_no_letters(worst_case: bool, tmp_path: Path) -> None:
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, seeds=[0]))
    found = standings(matrix, worst_case=worst_case, draws=500)
    assert {line.letters for line in found.lines} == {""}
    assert [line.defense for line in found.lines] == ["none", "cleanclip", "finetune", "roclip"]
    assert found.notes()[0].startswith("One seed: indicative. Nothing is told apart")
    assert "One seed gives no letters" in found.notes()[1]
    assert "Friedman" not in " ".join(found.notes())


def test_a_seed_that_leans_all_strata_makes_no_tiers(tmp_path: Path) -> None:
    """One of two alike fares better on all strata of two seeds in three, by what seeds do."""
    lean = {0: -0.06, 1: -0.05, 2: 0.03}

    def ours(attack: str, rate: str, seed: int) -> float:
        return 0.4 + lean[seed]

    asr = {"none": steady(0.95), "ours": ours, "theirs": steady(0.4)}
    found = standings(matrix_of(write_board(tmp_path, asr, attacks=ATTACKS)), draws=200)
    assert found.strata >= 8
    assert line_of(found, "ours").letters == line_of(found, "theirs").letters == "a"
    assert line_of(found, "none").letters == "b"
    assert "t tests over victim seeds" in found.notes()[1]


def made(asr_DSR: Any, clean: float = 0.6) -> Matrix:
    """Exchangeable defenses with these numbers."""
    num, strata, seeds = asr_DSR.shape
    of = {"track": "t", "regime": "F", "model": "m", "target": "x", "rate": "0.01"}
    zeros = np.zeros(asr_DSR.shape)
    return Matrix(
        defenses=("none", *(f"d{i}" for i in range(1, num))),
        strata=tuple(Stratum(attack=f"a{i}", **of) for i in range(strata)),
        seeds=tuple(range(seeds)),
        is_sound_SR=np.ones((strata, seeds), dtype=bool),
        about=(About((), "finetuning", "exact", is_control=False),) * num,
        clean_DSR=zeros + clean,
        asr_DSR=asr_DSR,
        base_DSR=zeros,
        cost_DSR=zeros,
        status_DSR=np.full(asr_DSR.shape, "ok"),
        pictures_S=np.full(strata, 1000),
    )


COUNTS = [(3, 3, 3), (3, 3, 1), (5, 5, 3)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("num", [2, 5, 10])
def test_worst_cases_of_equal_defenses_are_seldom_told_apart(
    num: int, counts: tuple[int, ...]
) -> None:
    """Letters of the worst case differ on at most one board in ten, whatever seeds do."""
    rng = np.random.default_rng(1)
    boards, apart = 40, 0
    shape = (num, len(counts), max(counts))
    for i in range(boards):
        common = rng.normal(0, 0.05 * (i % 2), (num, 1, shape[2]))
        matrix = made(0.5 + common + rng.normal(0, 0.05, shape))
        board = Bootstrap(
            replace(matrix, is_sound_SR=np.arange(shape[2]) < np.array(counts)[:, None]), 2000
        )
        apart += int(separated_by_draws(board.worst_ND, board.worst_D)[0].any())
    assert apart <= 0.1 * boards


def test_ranks_of_equal_defenses_are_seldom_one() -> None:
    rng = np.random.default_rng(1)
    boards, single = 100, 0
    for _ in range(boards):
        noise = rng.normal(0, 0.05, (2, 1, 3)) + rng.normal(0, 0.03, (2, 1, 3))
        low, high = Bootstrap(made(0.5 + noise), 1000).ranks()[0]
        single += int(low == high)
    assert single <= 0.1 * boards


def test_two_seeds_give_no_letters_and_ranks_by_worst_case(tmp_path: Path) -> None:
    """Draws of two told five equal defenses apart on four boards in ten."""
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, seeds=[0, 1]))
    found = standings(matrix, worst_case=True, draws=300)
    assert {(line.letters, line.rank) for line in found.lines} == {("", None)}
    assert found.notes()[0].startswith("Two seeds: indicative. They tell no worst cases apart")
    assert "Two seeds give no letters and ranks by worst case" in found.notes()[1]
    assert not any(note.startswith("Ranks:") for note in found.notes())
    by_mean = standings(matrix, draws=300)
    assert all(line.letters and line.rank for line in by_mean.lines)


def test_gaps_do_not_shrink_the_board(tmp_path: Path) -> None:
    """Thirty defenses, each without another victim: all are ranked, on all victims."""
    names = [f"d{i}" for i in range(30)]
    asr = {
        "none": steady(0.95, 0.01),
        **{name: steady(0.2, 0.02, i) for i, name in enumerate(names)},
    }
    attacks = [f"attack{i}" for i in range(10)]
    gone = {
        (name, attacks[i % 10], "0.01", i // 10): "failed_method" for i, name in enumerate(names)
    }
    matrix = matrix_of(write_board(tmp_path, asr, attacks=attacks, status=gone))
    found = standings(matrix, draws=500)
    assert all(line.rank is not None for line in found.lines)
    assert {line.filled for line in found.lines} == {0, 1}
    assert "30 victims of compared lines have no number" in " ".join(found.notes())
    filled = matrix.filled(range(31), 0.05)
    none = matrix.index("none")
    lost = np.isnan(matrix.asr_DSR[1])
    assert filled.asr_DSR[1][lost] == matrix.asr_DSR[none][lost]
    assert filled.clean_DSR[1][lost] == 0.05


def test_what_machines_lost_is_as_its_stratum(tmp_path: Path) -> None:
    gone = {("roclip", "sig", "0.01", 0): "failed_infrastructure"}
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, status=gone))
    d = matrix.index("roclip")
    sig = [s.attack for s in matrix.strata].index("sig")
    filled = matrix.filled([d], 0.0)
    assert filled.asr_DSR[0, sig, 0] == pytest.approx(matrix.asr_DSR[d, sig, 1:].mean())


def test_what_does_not_apply_is_no_gap(tmp_path: Path) -> None:
    """It is ranked, as if it did nothing there, and its own mean is of where it can be run."""
    gone = {("roclip", "sig", "0.01", seed): "not_applicable" for seed in (0, 1, 2)}
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, status=gone))
    roclip = line_of(standings(matrix, draws=500), "roclip")
    assert (roclip.coverage, roclip.bounds, roclip.filled) == (1, None, 3)
    assert roclip.rank is not None
    assert roclip.asr.value == pytest.approx(np.nanmean(matrix.asr_DSR[matrix.index("roclip")]))


def test_one_stratum_of_one_seed_leaves_the_ranks_of_the_board(tmp_path: Path) -> None:
    gone = {("none", "sig", "0.01", seed): "invalid_victim" for seed in (1, 2)}
    found = standings(matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS, status=gone)))
    assert found.speaks_of == "seeds"
    assert line_of(found, "roclip").rank is not None


def test_no_interval_leaves_what_a_share_can_be(tmp_path: Path) -> None:
    asr = {"none": steady(1.0), "perfect": steady(0.0), "near": steady(0.02, 0.01)}
    found = standings(matrix_of(write_board(tmp_path, asr, attacks=ATTACKS)), draws=200)
    for line in found.lines:
        assert 0 <= line.asr.low < line.asr.high <= 1, "three seeds at 0 are no proof of 0"


def test_a_hypervolume_says_how_optimistic_it_is() -> None:
    """Fourteen equal defenses look better together than any is: by about what is stated."""
    rng = np.random.default_rng(3)
    true, over, stated = 0.0, [], []
    for _ in range(20):
        noise = rng.normal(0, 0.04, (15, 1, 3)) + rng.normal(0, 0.03, (15, 5, 3))
        asr = np.where(np.arange(15)[:, None, None] == 0, 0.95, 0.3) + noise
        matrix = made(np.clip(asr, 0, 1))
        clean = matrix.clean_DSR.copy()
        clean[1:] = 0.58
        # Of 5 points of accuracy 3 are left, at 0.7; the undefended have all 5, at 0.05.
        true = (3 * 0.7 + 2 * 0.05) / 5
        found = Bootstrap(replace(matrix, clean_DSR=clean), 1000).volume(range(15), 0)
        over.append(found.value - true)
        stated.append(found.optimism)
    assert np.mean(over) > 0.02
    assert 0.4 * np.mean(over) < np.mean(stated) < 2 * np.mean(over)


def test_a_hypervolume_has_no_interval(board: Path) -> None:
    found = standings(matrix_of(board), draws=300)
    (note,) = [note for note in found.notes() if note.startswith("Hypervolume")]
    assert "without an interval. It is optimistic" in note
    assert "[" not in note


def test_unknown_accuracy_is_not_within_a_limit(tmp_path: Path) -> None:
    matrix = matrix_of(write_board(tmp_path, SPREAD, attacks=ATTACKS))
    unknown = matrix.clean_DSR.copy()
    unknown[matrix.index("roclip")] = np.nan
    found = standings(replace(matrix, clean_DSR=unknown), at_ca_loss=2, draws=200)
    assert line_of(found, "roclip").is_beyond


def test_many_tiers_stand_in_order(tmp_path: Path) -> None:
    names = [f"d{i:02}" for i in range(30)]
    asr = {"none": steady(0.99), **{n: steady(0.02 + 0.03 * i) for i, n in enumerate(names)}}
    attacks = [f"attack{i}" for i in range(15)]
    found = standings(matrix_of(write_board(tmp_path, asr, attacks=attacks)), draws=200)
    assert [line.defense for line in found.lines] == [*names, "none"]
    assert [line.letters for line in found.lines][25:28] == ["z", "aa", "ab"]


def test_controls_are_shown_and_not_compared(tmp_path: Path) -> None:
    asr = {**SPREAD, "oracle_filter": steady(0.0)}
    found = standings(matrix_of(write_board(tmp_path, asr, attacks=ATTACKS)), draws=200)
    oracle = line_of(found, "oracle_filter")
    assert (oracle.is_control, oracle.rank, found.families) == (True, None, [6])


# --- the bootstrap


def test_draws_of_a_mean_are_its_t_interval(tmp_path: Path) -> None:
    matrix = matrix_of(write_board(tmp_path, {"none": steady(0.5, 0.05)}, attacks=ATTACKS))
    drawn = Bootstrap(matrix, 40_000).asr_ND[:, 0]
    want = over_strata(matrix.asr_DSR[0])
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert low == pytest.approx(want.low, abs=0.05 * (want.high - want.low))
    assert high == pytest.approx(want.high, abs=0.05 * (want.high - want.low))


def test_all_defenses_meet_the_same_victims(tmp_path: Path) -> None:
    """Paired draws: what is always better stays better, however much victims differ."""

    def hard(attack: str, rate: str, seed: int) -> float:
        return 0.2 + 0.3 * seed

    asr = {"none": steady(0.95), "ours": hard, "theirs": lambda a, r, s: hard(a, r, s) + 0.01}
    matrix = matrix_of(write_board(tmp_path, asr, attacks=ATTACKS))
    ours, theirs = matrix.index("ours"), matrix.index("theirs")
    drawn = Bootstrap(matrix, 2000).asr_ND
    assert (drawn[:, ours] < drawn[:, theirs]).all()
    found = standings(matrix.only([matrix.index("none"), ours, theirs]), draws=2000)
    ranks = [line_of(found, name).rank for name in ("ours", "theirs")]
    assert ranks[0] is not None
    assert ranks[1] is not None
    assert ranks[0][0] < ranks[1][0]


def test_the_middle_is_the_interquartile_mean_of_victims(board: Path) -> None:
    from scipy import stats as scipy_stats

    matrix = matrix_of(board)
    for d, span in enumerate(Bootstrap(matrix, 500).interquartile()):
        want = scipy_stats.trim_mean(matrix.asr_DSR[d].ravel(), 0.25)
        assert span.value == pytest.approx(want)
        assert span.low <= span.value <= span.high


def test_equal_boards_have_equal_draws(board: Path) -> None:
    first, second = (standings(matrix_of(board), draws=300) for _ in range(2))
    assert first == second


# --- pictures


def test_the_pointwise_worst_case_counts_pictures_that_any_attack_fools(tmp_path: Path) -> None:
    asr = {"none": steady(0.5), "ours": steady(0.25)}
    write_board(tmp_path, asr, seeds=[0])
    labels, right = [0, 1, 2, 3, 4], [True] * 5
    fooled = {
        ("none", "badnet"): [True, True, True, False, False],
        ("none", "blended"): [True, False, True, True, False],
        ("ours", "badnet"): [True, True, False, False, False],
        ("ours", "blended"): [True, True, False, False, False],
    }
    for (defense, attack), seen in fooled.items():
        write_pictures(tmp_path, f"{attack}-0.01-{defense}-0-0", seen, right, labels)
    with closing(Tables(tmp_path)) as tables:
        matrix = load_matrix(tables)
        assert matrix is not None
        found = pointwise(tables, matrix)
    # The picture of the target class is none that an attack could succeed on.
    assert found["none"].value == pytest.approx(3 / 4)
    assert found["ours"].value == pytest.approx(1 / 4)
    asked = Asked(worst_case=True, part="tiers")
    assert "Pointwise" in text(load(tmp_path, asked), asked)


def test_pointwise_keeps_kinds_of_victims_apart(tmp_path: Path) -> None:
    """Half of the pictures on each of two targets, other halves: half, and not all of them."""
    rows, cells = [], []
    for target, fooled in (
        ("apple", [True, True, False, False]),
        ("pear", [False, False, True, True]),
    ):
        for defense in ("none", "ours"):
            where: dict[str, Any] = {"target": target, "cell": f"{defense}-{target}"}
            cells.append(cell_columns("badnet", "0.01", defense, 0, **where))
            rows += cell_rows("badnet", "0.01", defense, 0, asr=0.5, n=N, **where)
            if (defense, target) != ("ours", "pear"):
                write_pictures(tmp_path, f"{defense}-{target}", fooled, [True] * 4, [1, 2, 3, 4])
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "made", "0", cells)
    with closing(Tables(tmp_path)) as tables:
        matrix = load_matrix(tables)
        assert matrix is not None
        found = pointwise(tables, matrix)
    assert found["none"].value == pytest.approx(0.5)
    assert "ours" not in found, "its pictures of one target are not on record"


# --- what is printed


@pytest.mark.parametrize("form", FORMS)
def test_what_tiers_are_not_over_is_named(form: str, tmp_path: Path) -> None:
    """An attack without an ASR may fare another way than all that tiers are over."""
    rows, cells = [], []
    for defense in ("none", "finetune", "cleanclip"):
        for seed in (0, 1, 2):
            bad = "invalid_victim" if defense == "none" else "skipped"
            attacks: list[tuple[str, str | None, dict[str, Any]]] = [
                ("badnet", "0.01", {}),
                ("mmpoison", None, {"hit": "psr_top1", "count": 20}),
                ("sig", "0.05", {"status": bad}),
            ]
            for attack, rate, more in attacks:
                own = {"count": more.get("count", 40)}
                cells.append(cell_columns(attack, rate, defense, seed, **own))
                rows += cell_rows(attack, rate, defense, seed, asr=0.5, **{**more, **own})
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "made", "0", cells)
    asked = Asked(part="tiers")
    shown = text(load(tmp_path, asked), asked, form, width=200)
    assert "mmpoison (no ASR)" in shown
    assert "sig@0.05 (no sound victim)" in shown
    assert "badnet" not in shown.split("Left out")[-1].splitlines()[0]
    if form not in ("csv", "json"):
        assert "Over all attacks and rates but those that a note names" in shown


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["all", "lines", "tiers"])
def test_every_form_holds_every_defense(form: str, part: str, board: Path) -> None:
    asked = Asked(part=part)
    shown = text(load(board, asked), asked, form, width=160)
    for defense in SPREAD:
        assert defense in shown
    if form == "json":
        body = json.loads(shown)
        assert ("rows" in body, "tiers" in body) == (part != "tiers", part != "lines")
    if form == "tex":
        assert shown.count(r"\begin{tabular}") == 1
        assert r"label\_consistent" in shown or part == "tiers"


def test_hostile_names_are_texts(tmp_path: Path) -> None:
    name = "<b>&%$#_{}~^\\|"
    shown = {
        form: formed(standing_table(_standings_of(tmp_path / form, name)), form)
        for form in ("html", "tex", "md", "csv")
    }
    assert "<b>" not in shown["html"]
    assert "&lt;b&gt;" in shown["html"]
    assert r"\textless{}b\textgreater{}\&\%\$\#\_\{\}" in shown["tex"]
    assert r"\|" in shown["md"]
    assert name in shown["csv"]


def _standings_of(folder: Path, name: str) -> Standings:
    asr = {"none": steady(0.9, 0.01), name: steady(0.1, 0.01)}
    return standings(matrix_of(write_board(folder, asr)), draws=100)


def test_a_board_without_a_sound_victim_has_lines_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_board(tmp_path, {"none": steady(0.9)}, status=dict.fromkeys(_cells(), "invalid_victim"))
    assert call(capsys, "leaderboard", tmp_path).code == 0
    refused = call(capsys, "leaderboard", tmp_path, "--part", "tiers")
    assert (refused.code, "No sound victim has numbers yet" in refused.err) == (1, True)


def _cells() -> list[tuple[str, str, str, int]]:
    return [("none", a, "0.01", s) for a in ("badnet", "blended") for s in (0, 1, 2)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--part", "tier"], "no part 'tier'. Did you mean 'tiers'?"),
        (["--group", "need"], "no group 'need'. Did you mean 'needs'?"),
        (["--at-ca-loss", "200"], "from 0 to 100, found 200"),
        (["--format", "xml"], "xml"),
        (["--published", "--part", "tiers"], "published figures join the lines"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], says: str, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "leaderboard", board, *words)
    assert done.code == 2
    assert says in done.err


def test_numbers_of_programs_are_those_of_people(board: Path) -> None:
    values: list[dict[str, Any]] = list(
        standing_table(standings(matrix_of(board), draws=300)).values
    )
    assert {value["defense"] for value in values} == set(SPREAD)
    for value in values:
        assert value["asr_low"] < value["asr"] < value["asr_high"]
        assert 0 <= value["worst_low"] <= value["worst"] <= value["worst_high"] <= 1
        assert round(value["asr"] * N * 24) == pytest.approx(value["asr"] * N * 24)
