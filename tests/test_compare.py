"""Two defenses on the same victims, against hand values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.compare import compare_in
from analysis.compare_render import comparison_text, summary
from grid.schema import ResultsError
from tests.boards import steady, write_board, write_pictures
from tests.grids import call

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
    assert found.asr.high == pytest.approx(-0.05)
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


def test_only_victims_of_both_count(tmp_path: Path) -> None:
    gone = {("ours", "sig", "0.01", seed): "failed_method" for seed in (0, 1, 2)}
    gone[("theirs", "wanet", "0.01", 1)] = "missing"
    found = compare_in(write_board(tmp_path, PAIR, attacks=ATTACKS, status=gone), "ours", "theirs")
    assert (found.shared, found.of_first, found.of_second) == (14, 15, 17)
    assert (found.strata, found.seeds) == (5, 2)
    assert len(found.cells) == 14


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
    assert done.code == 1
    assert "no defense 'our' on this board. Did you mean 'ours'" in done.err
    with pytest.raises(ResultsError, match="name two defenses"):
        compare_in(tmp_path, "ours", "ours")
    nothing = call(capsys, "compare", "ours", "theirs", "--in", tmp_path / "nowhere")
    assert (nothing.code, "there is no such directory" in nothing.err) == (1, True)


def test_every_form_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_board(tmp_path, PAIR, attacks=ATTACKS)
    found = compare_in(tmp_path, "ours", "theirs")
    said = call(capsys, "compare", "ours", "theirs", "--in", tmp_path).out
    assert said.startswith("ours leaves the smaller ASR over strata.\n")
    assert "-5.0 [-5.0, -5.0] over victim seeds" in said
    told = json.loads(
        call(capsys, "compare", "ours", "theirs", "--in", tmp_path, "--format", "json").out
    )
    assert told["asr"][0] == pytest.approx(found.asr.value)
    assert len(told["cells"]) == 18
    assert "indicative" in summary(found)[1]
    lines = call(
        capsys, "compare", "ours", "theirs", "--in", tmp_path, "--format", "csv"
    ).out.splitlines()
    assert len(lines) == 19
