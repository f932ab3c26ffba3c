"""Two defenses on the same victims, against hand values."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from analysis.compare import compare_in
from analysis.compare_render import comparison_text, summary
from grid.schema.errors import ResultsError
from grid.schema.writing import write_grid, write_rows
from tests.boards import N, steady, write_board, write_pictures
from tests.grids import call
from tests.rows import EPOCH, cell_columns, cell_rows

ATTACKS = ("badnet", "blended", "sig", "wanet", "trojvqa", "badclip")


def above(attack: str, rate: str, seed: int) -> float:
    return 0.2 + 0.01 * ATTACKS.index(attack) + 0.1 * seed


def below(attack: str, rate: str, seed: int) -> float:
    return above(attack, rate, seed) - 0.05


PAIR = {"none": steady(0.9), "ours": below, "theirs": above}


def test_a_difference_of_equal_victims_is_the_difference(tmp_path: Path) -> None:
    """Victims differ by 10 points a seed and defenses by 5 always: only pairing shows it."""
    found = compare_in(write_board(tmp_path, PAIR, attacks=ATTACKS), "ours", "theirs")
    assert found.asr.value == pytest.approx(-0.05)
    assert found.asr.high == pytest.approx(-50 / 1002 + 1.96 * 48.505**0.5 / 1002, abs=1e-5)
    assert (found.shared, found.strata, found.seeds) == (18, 6, 3)
    assert found.p_signed_rank == found.p_sign_flip == 0.03125, "6 of 6 in one direction"
    assert found.verdict == "ours leaves the smaller ASR over strata."
    assert found.clean.value == 0
    assert found.clean_p_signed_rank == 1
    swapped = compare_in(tmp_path, "theirs", "ours")
    assert swapped.asr.value == pytest.approx(0.05)
    assert swapped.p_signed_rank == found.p_signed_rank
    assert swapped.first_better == pytest.approx(1 - found.first_better)


def test_five_strata_claim_nothing(tmp_path: Path) -> None:
    found = compare_in(write_board(tmp_path, PAIR, attacks=ATTACKS[:5]), "ours", "theirs")
    assert found.p_signed_rank == 0.0625
    assert found.verdict.startswith("5 strata cannot show p <= 0.05")
    one = compare_in(write_board(tmp_path / "one", PAIR, attacks=ATTACKS[:1]), "ours", "theirs")
    assert one.verdict == "One stratum: nothing can be said of other attacks or rates."


def test_a_verdict_needs_seeds_as_well_as_strata(tmp_path: Path) -> None:
    """All strata lean one way, by what two of three seeds do to them: nothing is claimed."""
    lean = {0: -0.06, 1: -0.05, 2: 0.03}

    def leaning(attack: str, rate: str, seed: int) -> float:
        return above(attack, rate, seed) + lean[seed]

    asr = {"none": steady(0.95), "ours": leaning, "theirs": above}
    found = compare_in(write_board(tmp_path, asr, attacks=ATTACKS), "ours", "theirs")
    assert found.p_signed_rank == 0.03125
    assert found.asr.low < 0 < found.asr.high
    # t = -0.936 of two degrees of freedom: 1 - |t| / sqrt(t^2 + 2).
    assert found.p_seeds == pytest.approx(0.4479, abs=1e-4)
    assert found.verdict.startswith("Not told apart: strata differ alike")
    assert "t test over victim seeds p 0.448" in " ".join(summary(found))
    certain = compare_in(write_board(tmp_path / "pair", PAIR, attacks=ATTACKS), "ours", "theirs")
    assert certain.says(0.03, 0.06).startswith("Not told apart: strata differ alike")
    assert certain.says(0.03, 0.04) == "ours leaves the smaller ASR over strata."


def test_one_seed_is_indicative(tmp_path: Path) -> None:
    write_board(tmp_path, PAIR, attacks=ATTACKS, seeds=[1])
    found = compare_in(tmp_path, "ours", "theirs")
    assert (found.p_signed_rank, found.seeds) == (0.03125, 1)
    assert found.verdict.startswith("One seed: indicative. No difference is claimed")
    assert "over victim seeds p" not in summary(found)[2]


def test_only_victims_of_both_count(tmp_path: Path) -> None:
    gone = {("ours", "sig", "0.01", seed): "failed_method" for seed in (0, 1, 2)}
    gone[("theirs", "wanet", "0.01", 1)] = "missing"
    found = compare_in(write_board(tmp_path, PAIR, attacks=ATTACKS, status=gone), "ours", "theirs")
    assert (found.shared, found.of_first, found.of_second) == (14, 15, 17)
    assert (found.strata, found.seeds) == (5, 2)
    assert len(found.cells) == 14


def test_failures_of_either_side_are_said(tmp_path: Path) -> None:
    """What failed on most victims won on those that were left, and nothing was said of it."""
    gone = {
        ("ours", attack, "0.01", seed): "failed_method" for attack in ATTACKS for seed in (1, 2)
    }
    gone[("theirs", "sig", "0.01", 1)] = "failed_method"
    gone[("theirs", "sig", "0.01", 2)] = "missing"
    found = compare_in(write_board(tmp_path, PAIR, attacks=ATTACKS, status=gone), "ours", "theirs")
    said = (
        "ours failed on 12 of 18 victims and theirs failed on 1 of 18 victims:"
        " this says nothing of those."
    )
    assert summary(found)[1] == found.unsaid == said
    assert json.loads(comparison_text(found, "json"))["first_failed"] == 12
    whole = write_board(tmp_path / "whole", PAIR, attacks=ATTACKS)
    assert not any("failed" in line for line in summary(compare_in(whole, "ours", "theirs")))


def test_pictures_are_tested_in_pairs(tmp_path: Path) -> None:
    """10 pictures only the first is fooled by, 2 only the second: p = 0.0386."""
    write_board(tmp_path, PAIR, attacks=["badnet"], seeds=[0])
    labels = [1] * 20 + [0] * 5
    ours = [True] * 10 + [False] * 2 + [True] * 4 + [False] * 4 + [True] * 5
    theirs = [False] * 10 + [True] * 2 + [True] * 4 + [False] * 4 + [False] * 5
    right = [True] * 25
    write_pictures(tmp_path, "badnet-0.01-ours-0-0", ours, right, labels)
    write_pictures(tmp_path, "badnet-0.01-theirs-0-0", theirs, [False, *right[1:]], labels)
    (cell,) = compare_in(tmp_path, "ours", "theirs").cells
    assert (cell.only_first, cell.only_second) == (10, 2), "none of the target's own pictures"
    assert cell.p == pytest.approx(0.0386, abs=5e-5)
    assert cell.p_holm == cell.p
    assert cell.clean_p == 1.0
    shown = comparison_text(compare_in(tmp_path, "ours", "theirs"))
    assert "0.039" in shown


def test_without_pictures_there_is_no_mcnemar(tmp_path: Path) -> None:
    found = compare_in(write_board(tmp_path, PAIR), "ours", "theirs")
    assert {cell.p for cell in found.cells} == {None}
    assert "–" in comparison_text(found)


def test_names_that_are_not_there_are_refused_with_a_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_board(tmp_path, PAIR)
    done = call(capsys, "compare", "our", "theirs", "--in", tmp_path)
    assert done.code == 2
    assert "no defense 'our' on this board. Did you mean 'ours'" in done.err
    with pytest.raises(ResultsError, match="name two defenses"):
        compare_in(tmp_path, "ours", "ours")
    nothing = call(capsys, "compare", "ours", "theirs", "--in", tmp_path / "nowhere")
    assert (nothing.code, "there is no such directory" in nothing.err) == (2, True)


def test_every_form_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_board(tmp_path, PAIR, attacks=ATTACKS)
    found = compare_in(tmp_path, "ours", "theirs")
    said = call(capsys, "compare", "ours", "theirs", "--in", tmp_path).out
    assert said.startswith("ours leaves the smaller ASR over strata.\n")
    assert "-5.0 [-6.4, -3.6] over victim seeds" in said
    told = json.loads(
        call(capsys, "compare", "ours", "theirs", "--in", tmp_path, "--format", "json").out
    )
    assert told["asr"]["value"] == pytest.approx(found.asr.value)
    assert len(told["cells"]) == 18
    assert "indicative" in summary(found)[1]
    lines = call(
        capsys, "compare", "ours", "theirs", "--in", tmp_path, "--format", "csv"
    ).out.splitlines()
    assert len(lines) == 19


def test_a_verdict_does_not_contradict_the_mean(tmp_path: Path) -> None:
    """Better by a little nearly everywhere, and far worse once: no one is called safer."""
    names = [f"attack{i}" for i in range(21)]

    def ours(attack: str, rate: str, seed: int) -> float:
        place = names.index(attack)
        return 0.95 if place == 20 else round(0.5 - 0.01 - 0.001 * place, 3)

    def theirs(attack: str, rate: str, seed: int) -> float:
        return 0.05 if attack == names[20] else 0.5

    asr = {"none": steady(0.9), "ours": ours, "theirs": theirs}
    found = compare_in(write_board(tmp_path, asr, attacks=names), "ours", "theirs")
    assert found.p_signed_rank < 0.001
    assert found.asr.value > 0
    assert found.direction == -1
    assert "the mean points the other way" in found.verdict
    assert found.says(0.2) == "Not told apart over strata."


def test_cells_that_are_not_planned_and_older_pictures_are_no_pairs(tmp_path: Path) -> None:
    write_board(tmp_path, PAIR, attacks=["badnet"], seeds=[0])
    labels, right = [1] * 20, [True] * 20
    ours = [True] * 10 + [False] * 10
    theirs = [False] * 10 + [True] * 2 + [False] * 8
    write_pictures(tmp_path, "badnet-0.01-ours-0-0", theirs, right, labels)
    write_pictures(tmp_path, "badnet-0.01-theirs-0-0", theirs, right, labels)
    # Measured again, later: what was written first is no second copy.
    later = EPOCH + timedelta(minutes=1)
    write_pictures(tmp_path, "badnet-0.01-ours-0-0", ours, right, labels, written_at=later)
    # A cell of before the grid file was edited, under the same label.
    write_rows(tmp_path, cell_rows("badnet", "0.01", "ours", 0, cell="before", n=N, asr=0.5))
    write_pictures(tmp_path, "before", [not fooled for fooled in ours], right, labels)
    (cell,) = compare_in(tmp_path, "ours", "theirs").cells
    assert (cell.only_first, cell.only_second) == (10, 2)


def test_several_defense_seeds_are_told(tmp_path: Path) -> None:
    rows, cells = [], []
    for defense, nested in (("none", 0), ("ours", 0), ("ours", 1), ("theirs", 0)):
        where: dict[str, Any] = {"defense_seed": nested, "cell": f"{defense}-{nested}"}
        cells.append(cell_columns("badnet", "0.01", defense, 0, **where))
        rows += cell_rows("badnet", "0.01", defense, 0, asr=0.5 + 0.1 * nested, n=N, **where)
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "made", "0", cells)
    found = compare_in(tmp_path, "ours", "theirs")
    assert found.defense_seeds == 2
    assert found.asr.value == pytest.approx(0.05)
    assert "McNemar's test is of each victim's first defense seed" in " ".join(summary(found))


def test_victims_of_two_targets_are_two_lines(tmp_path: Path) -> None:
    rows, cells = [], []
    for target in ("apple", "pear"):
        for defense in PAIR:
            where: dict[str, Any] = {"target": target, "cell": f"{defense}-{target}"}
            cells.append(cell_columns("badnet", "0.01", defense, 0, **where))
            rows += cell_rows("badnet", "0.01", defense, 0, asr=0.5, n=N, **where)
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "made", "0", cells)
    found = compare_in(tmp_path, "ours", "theirs")
    assert [cell.kind for cell in found.cells] == ["apple", "pear"]
    assert "badnet (pear)" in comparison_text(found)
