"""Options of the board that would say nothing, or something else, unless they are heeded."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from analysis.leaderboard import Asked, load, text
from tests.boards import steady, write_board
from tests.grids import call

ATTACKS = ("badnet", "blended", "sig", "wanet", "trojvqa", "badclip")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asr = {"none": steady(0.95, 0.01), "finetune": steady(0.4, 0.02), "ours": steady(0.2, 0.02)}
    return write_board(tmp_path_factory.mktemp("board"), asr, attacks=ATTACKS)


@pytest.mark.parametrize("words", [["--worst-case"], ["--group", "needs"], ["--at-ca-loss", "1"]])
def test_what_shapes_tiers_is_heeded_in_every_form(
    words: list[str], board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = call(capsys, "leaderboard", board, "--format", "csv", *words)
    assert told.code == 0
    lines = list(csv.DictReader(io.StringIO(told.out)))
    assert sorted(line["defense"] for line in lines) == ["finetune", "none", "ours"]
    assert "letters" in lines[0]
    tiers = call(capsys, "leaderboard", board, "--format", "csv", "--part", "tiers", *words)
    assert told.out == tiers.out
    refused = call(capsys, "leaderboard", board, "--part", "lines", *words)
    assert (refused.code, "leave out --part lines" in refused.err) == (1, True)


def test_without_them_csv_holds_the_lines(board: Path) -> None:
    assert len(text(load(board, Asked()), Asked(), "csv").splitlines()) == 19
    for form in ("tex", "html"):
        asked = Asked(at_ca_loss=1)
        assert "at most 1 points of CA lost" in text(load(board, asked), asked, form)


def test_a_set_that_is_not_there_is_named_alike(
    board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["leaderboard", board], ["compare", "ours", "none", "--in", board]):
        told = call(capsys, *words, "--set", "reprt")
        assert told.code == 1
        assert "No evaluation set 'reprt'" in told.err
        assert "Did you mean 'report'? There: report." in told.err
