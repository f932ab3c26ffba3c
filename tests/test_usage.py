"""What cannot be meant of results: exit 2, one line, and what was probably meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis import Results
from grid.nodes import parse
from grid.schema.errors import AskedError
from tests.boards import steady, write_board
from tests.grids import call
from victims.errors import counted


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "mine"
    asr = {"none": steady(0.9), "finetune": steady(0.4), "cleanclip": steady(0.2)}
    write_board(folder, asr, attacks=["badnet"], rates=["0.01"], seeds=[0])
    return folder


@pytest.fixture(autouse=True)
def at_home(board: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRID_HOME", str(board.parent))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("leaderboard mine --part tier", "Did you mean 'tiers'?"),
        ("leaderboard mine --group need", "Did you mean 'needs'?"),
        ("leaderboard mine --set repor", "Did you mean 'report'?"),
        ("leaderboard mine --at-ca-loss -3", "in points, from 0 to 100"),
        ("leaderboard mine --format htm", "Did you mean 'html'?"),
        ("compare cleanclp none --in mine", "Did you mean 'cleanclip'?"),
        ("compare cleanclip none --in mine --format jsn", "Did you mean 'json'?"),
        ("sql SELECT+1 --in mine --format jsn", "Did you mean 'json'?"),
        ("leaderboard mien", "Did you mean 'mine'?"),
        ("view mien", "Did you mean 'mine'?"),
        ("ls attack", "Did you mean 'attacks'?"),
        ("modls", "Did you mean 'models'?"),
    ],
)
def test_what_cannot_be_meant_is_usage(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = call(capsys, *(word.replace("+", " ") for word in line.split()))
    assert answer.code == 2
    assert told in answer.err
    assert "Value error" not in answer.err


def test_a_file_is_no_results_directory(
    tmp_path: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").touch()
    answer = call(capsys, "leaderboard", "mine.yaml")
    assert (answer.code, "mine.yaml is a file" in answer.err) == (2, True)
    assert Results("mine").directory == board, "a notebook takes a run's name as commands do"
    with pytest.raises(AskedError, match="Did you mean 'mine'"):
        Results("mien")


def test_places_that_cannot_be_written_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was a traceback, and a half-made page was left behind."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for line, told in (
        ("leaderboard mine --figures file", "give a folder"),
        ("leaderboard mine --figures file/below", "cannot be written"),
        ("report mine --out folder", "is a folder"),
        ("report mine --out file/page.html", "cannot be written"),
        ("init smoke --out file/x.yaml", "cannot be written"),
        ("report mine --out file/below/page.html", "cannot be written"),
    ):
        answer = call(capsys, *line.split())
        assert (answer.code, told in answer.err) == (2, True), answer.err
        assert len(answer.err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert call(capsys, "init", "smoke", "--out", "new/dir/x.yaml").code == 0
    assert (tmp_path / "new" / "dir" / "x.yaml").is_file()


def test_lists_take_part_of_a_name_and_show_what_can_be_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    every, refused = (call(capsys, "models", *more).out for more in ((), ("--all",)))
    assert every.count("cannot be used:") == 1
    assert "more cannot be used: --all tells why" in every
    assert "cannot be used:" in refused
    assert refused.index("cannot be used:") > refused.index("RN50x64"), "those that can come first"
    rn50 = call(capsys, "ls", "models", "rn50").out
    assert "RN50" in rn50
    assert "ViT" not in rn50
    assert call(capsys, "ls", "attacks", "badn").out.startswith("badnet ")
    assert "Did you mean 'roclip'?" in call(capsys, "ls", "defenses", "clip2").err


def test_one_of_a_thing_is_one() -> None:
    assert (counted(1, "victim"), counted(2, "victim")) == ("1 victim", "2 victims")
    assert counted(1, "stratum", "strata") == "1 stratum"
    assert counted(1200, "stratum", "strata") == "1,200 strata"


def test_a_plan_may_be_of_some_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("--out", tmp_path / "out", "--store", tmp_path / "store", "--json")
    whole, some = (
        json.loads(call(capsys, "plan", "smoke", *places, *more).out)
        for more in ((), ("--only", "attack=badnet defense=none"))
    )
    assert 0 < some["stages_to_run"] < whole["stages_to_run"]
    assert 0 < some["taken"] < whole["cells"]
    wrong = call(capsys, "plan", "smoke", *places, "--only", "attack=badnt")
    assert (wrong.code, "Did you mean 'badnet'?" in wrong.err) == (2, True)


def test_a_place_in_a_file_and_a_message_name_a_method_once(tmp_path: Path) -> None:
    given = parse("badnet: {patch: 900}", "x.yaml").items()["badnet"]
    assert str(given.error("badnet: patch 900")) == "x.yaml:1: badnet: patch 900"
