"""Options of the board that would say nothing, or something else, unless they are heeded."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from analysis.leaderboard import Asked, load, text
from grid.schema.errors import ResultsError
from tests.boards import steady, write_board
from tests.grids import call

ATTACKS = ("badnet", "blended", "sig", "wanet", "trojvqa", "badclip")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asr = {"none": steady(0.95, 0.01), "finetune": steady(0.4, 0.02), "ours": steady(0.2, 0.02)}
    return write_board(tmp_path_factory.mktemp("board"), asr, attacks=ATTACKS)


@pytest.mark.parametrize("more", [{"worst_case": True}, {"group": "needs"}, {"at_ca_loss": 1.0}])
def test_what_shapes_tiers_is_heeded_in_every_form(more: dict[str, Any], board: Path) -> None:
    asked = Asked(**more)
    found = load(board, asked)
    told = text(found, asked, "csv")
    lines = list(csv.DictReader(io.StringIO(told)))
    assert sorted(line["defense"] for line in lines) == ["finetune", "none", "ours"]
    assert "letters" in lines[0]
    assert told == text(found, Asked(part="tiers", **more), "csv")
    with pytest.raises(ResultsError, match="leave out --part lines"):
        Asked(part="lines", **more)


def test_the_command_says_so_too(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = call(capsys, "leaderboard", board, "--format", "csv", "--worst-case")
    assert (told.code, told.out.count("\n")) == (0, 5), "a head, three defenses, an empty line"
    refused = call(capsys, "leaderboard", board, "--worst-case", "--part", "lines")
    assert (refused.code, "leave out --part lines" in refused.err) == (2, True)


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
        assert told.code == 2
        assert "no evaluation set 'reprt'" in told.err
        assert "Did you mean 'report'? There are: report." in told.err


def test_no_name_is_a_formula_to_a_spreadsheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defense that was called =HYPERLINK(...) was a link beside the numbers."""
    names = ("=HYPERLINK(1)", "+x", "-y", "@z")
    asr = {"none": steady(0.95), **{name: steady(0.2) for name in names}}
    write_board(tmp_path, asr, attacks=ATTACKS[:2])
    found = load(tmp_path, Asked())
    for part in ("lines", "tiers"):
        lines = list(csv.DictReader(io.StringIO(text(found, Asked(part=part), "csv"))))
        assert {line["defense"] for line in lines} == {"none", *(f"'{name}" for name in names)}
    assert {row["defense"] for row in json.loads(text(found, Asked(), "json"))["rows"]} >= {*names}
    query = "SELECT -1.5 AS number, '-2' AS text, '=1' AS formula"
    told = call(capsys, "sql", query, "--in", tmp_path, "--format", "csv").out
    assert told == "number,text,formula\n-1.5,-2,'=1\n"
