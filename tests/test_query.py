"""SQL of a user's, from the command line: what it may read and how it is answered."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.query import answer_text, run_sql
from analysis.reader import Answer
from tests.boards import steady, write_board
from tests.grids import call, environment

HEAVY = """
import sys
from grid.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print(",".join(sorted({"torch", "ray", "open_clip", "pandas", "matplotlib"} & set(sys.modules))))
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asr = {"none": steady(0.9), "ours": steady(0.1)}
    return write_board(tmp_path_factory.mktemp("board"), asr)


def test_a_select_is_answered_in_every_form(
    board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = (
        "SELECT defense, avg(asr_top1) AS mean_asr, NULL AS nothing FROM board "
        "WHERE rate > 0 GROUP BY 1 ORDER BY 2"
    )
    words = ("sql", query, "--in", board)
    table = call(capsys, *words)
    assert table.code == 0
    assert [line.split() for line in table.out.splitlines()[-2:]] == [
        ["ours", "0.1", "–"],
        ["none", "0.9", "–"],
    ]
    found = json.loads(call(capsys, *words, "--format", "json").out)
    assert found == [
        {"defense": "ours", "mean_asr": pytest.approx(0.1), "nothing": None},
        {"defense": "none", "mean_asr": pytest.approx(0.9), "nothing": None},
    ]
    csv = call(capsys, *words, "--format", "csv").out.splitlines()
    assert csv[0] == "defense,mean_asr,nothing"
    assert len(csv) == 3
    assert "| ours |" in call(capsys, *words, "--format", "md").out


def test_sql_may_come_from_the_input(
    board: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT count(*) AS n FROM cells"))
    assert json.loads(call(capsys, "sql", "-", "--in", board, "--format", "json").out) == [
        {"n": 12}
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("  "))
    assert call(capsys, "sql", "-", "--in", board).code == 2


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT * FROM read_csv('/etc/passwd')", "refused because of read_csv()"),
        ("SELECT * FROM '/etc/passwd'", "/etc/passwd"),
        ("COPY rows TO '/tmp/x.csv'", "One SELECT statement over rows"),
        ("DROP VIEW rows", "One SELECT statement"),
        ("SELECT 1; SELECT 2", "One SELECT at a time; found 2."),
        ("SELECT nonsense FROM rows", "nonsense"),
        ("SELECT * FROM row", "row"),
        ("ATTACH 'http://example.com/x.db'", "One SELECT statement"),
        ("SELECT getenv('HOME')", "getenv"),
    ],
)
def test_nothing_else_is_read_or_written(
    query: str, says: str, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(board.rglob("*"))
    done = call(capsys, "sql", query, "--in", board)
    assert (done.code, done.out) == (1, "")
    assert says in done.err
    assert sorted(board.rglob("*")) == before


def test_long_answers_say_what_they_leave_out(board: Path) -> None:
    answer, _ = run_sql(board, "SELECT * FROM range(1000)")
    shown = answer_text(answer, limit=10)
    assert len(shown.splitlines()) == 13
    assert "990 of 1,000 lines are left out" in shown
    assert len(answer_text(answer, "csv", limit=10).splitlines()) == 1001
    assert answer_text(Answer(["a"], []), "csv") == "a\n"
    assert "no lines" in answer_text(Answer(["a"], []))


def test_values_of_all_types_are_json(board: Path) -> None:
    answer, _ = run_sql(
        board,
        "SELECT needs, written_at, 1.5::DECIMAL(4, 2) AS d, 'nan'::DOUBLE AS gone, true AS yes, "
        "{'a': [1]} AS deep FROM newest WHERE defense = 'ours' LIMIT 1",
    )
    (found,) = json.loads(answer_text(answer, "json"))
    assert found["needs"] == ["victim"]
    assert found["written_at"].startswith("2026-01-01T")
    assert (found["d"], found["gone"], found["yes"], found["deep"]) == (1.5, None, True, {"a": [1]})


@pytest.mark.parametrize(
    "words",
    [
        ["leaderboard", "{board}", "--worst-case"],
        ["compare", "ours", "none", "--in", "{board}"],
        ["sql", "SELECT 1", "--in", "{board}"],
    ],
)
def test_reading_results_imports_nothing_heavy(words: list[str], board: Path) -> None:
    given = [word.format(board=board) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, *given],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == ""
