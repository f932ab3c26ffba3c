"""SQL of a user's, from the command line: what it may read and how it is answered."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import Results
from analysis.leaderboard import Asked, load, text
from analysis.permitted import TABLE_FUNCTIONS, Permitted
from analysis.query import answer_text, run_sql
from analysis.reader import QUERIED, Answer, Tables
from analysis.text import FORMS
from grid.schema.errors import AskedError, ResultsError
from grid.schema.writing import write_grid, write_rows
from tests.boards import steady, write_board
from tests.grids import call, environment
from tests.rows import cell_columns, cell_rows

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
        ("COPY rows TO '/tmp/x.csv'", "One SELECT statement over rows"),
        ("DROP VIEW rows", "One SELECT statement"),
        ("SELECT 1; SELECT 2", "One SELECT at a time; found 2."),
        ("SELECT nonsense FROM rows", "nonsense"),
        ("SELECT * FROM row", "'row', which is no view here (Did you mean 'rows'?)"),
        ("ATTACH 'http://example.com/x.db'", "One SELECT statement"),
    ],
)
def test_nothing_else_is_read_or_written(
    query: str, says: str, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(board.rglob("*"))
    done = call(capsys, "sql", query, "--in", board)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert sorted(board.rglob("*")) == before


REFUSED = {
    "SHOW DATABASES": "refused because of SHOW DATABASES",
    "FROM planned": "'planned', which is no view",
    "FROM t95": "'t95', which is no view",
    "FROM main.rows": "'main.rows', which is no view",
    "FROM sqlite_master": "'sqlite_master', which is no view",
    "FROM pg_catalog.pg_settings": "'pg_catalog.pg_settings', which is no view",
    "WITH x AS (FROM duckdb_tables) FROM x": "'duckdb_tables', which is no view",
    "WITH planned AS (FROM planned) FROM planned": "'planned', which is no view",
    "SELECT (WITH t95 AS (SELECT 1) FROM t95), t FROM t95": "'t95', which is no view",
    "WITH RECURSIVE t95 AS (FROM t95 UNION ALL FROM t95) FROM t95": "'t95', which is no",
    "SELECT current_setting('temp_directory')": "refused because of current_setting()",
    "SELECT pg_catalog.pg_sleep(9)": "refused because of pg_sleep()",
    "SELECT sum(sleep_ms(9)) OVER () FROM rows": "refused because of sleep_ms()",
    "SELECT write_log('x')": "refused because of write_log()",
    "SELECT [write_log(x) FOR x IN ['a']]": "refused because of write_log()",
    "SELECT pg_get_viewdef(1)": "refused because of pg_get_viewdef()",
}


def test_no_table_and_no_function_of_duckdb_is_reached(board: Path) -> None:
    opened = Tables(board)
    for query, says in REFUSED.items():
        with pytest.raises(ResultsError, match=re.escape(says)):
            opened.sql(query)
    opened.close()


KEPT = "secret,words\n4711,4712\n"


FILE_QUERIES = (
    "SELECT * FROM 'FILE'",
    'SELECT * FROM "FILE"',
    "SELECT * FROM read_csv('FILE')",
    "SELECT (SELECT content FROM read_text('FILE'))",
    'SELECT * FROM (WITH "FILE" AS (SELECT 1) FROM "FILE"), \'FILE\'',
    "SUMMARIZE 'FILE'",
    "DESCRIBE 'FILE'",
    "SELECT json_serialize_plan('SELECT * FROM QQFILEQQ')",
)


@pytest.mark.parametrize("place", ["inside", "beside", "linked"])
def test_no_other_file_is_told(place: str, tmp_path: Path) -> None:
    folder = write_board(tmp_path / "board", {"none": steady(0.9)}, seeds=[0])
    path = (tmp_path if place == "beside" else folder) / "secret.csv"
    path.write_text(KEPT)
    if place == "linked":
        path = folder / "link.csv"
        path.symlink_to(folder / "secret.csv")
    opened = Tables(folder)
    for query in FILE_QUERIES:
        asked = query.replace("QQ", "''").replace("FILE", str(path))
        with pytest.raises(ResultsError, match="is refused because of") as caught:
            opened.sql(asked)
        assert "4711" not in str(caught.value)
    # The second wall, behind the check of the syntax.
    with pytest.raises(ResultsError, match="Permission"):
        opened.query(f"SELECT * FROM read_csv('{path}')")  # noqa: S608
    opened.close()


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("WITH a AS (SELECT 1 AS n), b AS (SELECT n + 1 AS n FROM a) FROM b", [(2,)]),
        ("WITH RECURSIVE t AS (SELECT 1 n UNION ALL SELECT n + 1 FROM t WHERE n < 3) FROM t",
         [(1,), (2,), (3,)]),
        ("SELECT count(*) FROM Rows JOIN (SELECT DISTINCT cell FROM cells) USING (cell)", [(60,)]),
        ("SELECT list_sum([x * 2 FOR x IN [1, 2]]), nullif(1, 1), split_part('a,b', ',', 2)",
         [(6, None, "b")]),
        ("SELECT wilson_low(0.5, 100) < 0.5, now() > TIMESTAMP '2020-01-01'", [(True, True)]),
        ("SELECT row_number() OVER (ORDER BY i) FROM range(2) t(i)", [(1,), (2,)]),
        ("SELECT regexp_extract('s12', '[0-9]+')::INT + date_part('year', DATE '2020-02-02')",
         [(2032,)]),
        ("SELECT column_name FROM (DESCRIBE board) LIMIT 1", [("track",)]),
    ],
)  # fmt: skip
def test_what_only_computes_is_answered(query: str, rows: list[object], board: Path) -> None:
    assert run_sql(board, query)[0].rows == rows


SMELL = re.compile(
    r"read|write|scan|sniff|load|file|path|sett|log|secret|sleep|http|url|env|host|user|token|connection|transaction|query"
    r"|catalog|schema|database|sql|setseed|nextval|currval|variable|extension|disk|memory|glob"
)
HARMLESS = re.compile(
    r"(log|log2|log10|logical_\w+|url_(en|de)code|bit_xor|union_\w+|parse_\w+|path_join|catalog"
    r"|json_extract_path(_text)?|json_serialize_sql|hive_partition_component|arg_\w+"
    r"|(current|session)_user|user|list_\w+|geometric_\w+"
    r"|formatReadable\w+|has_\w+_privilege|pg_conf_load_time|pg_(is_other|my)_temp_schema"
    r"|transaction_timestamp)"
)
"""Of these, what takes a text apart, and names that are the same everywhere."""


def test_every_function_that_smells_of_more_than_computing_is_refused(board: Path) -> None:
    tables = Tables(board)
    found = tables.query("SELECT DISTINCT function_name FROM duckdb_functions()").rows
    names = [name for (name,) in found if re.fullmatch(r"\w+", name)]
    suspects = [n for n in names if SMELL.search(n.lower()) and not HARMLESS.fullmatch(n)]
    assert {"current_setting", "getvariable", "pg_sleep", "write_log", "read_text"} <= {*suspects}
    allowed = Permitted(lambda *asked: tables.query(*asked).rows, QUERIED)
    assert [name for name in suspects if allowed.computes(name.lower())] == []
    assert {"range", "generate_series", "unnest"} == TABLE_FUNCTIONS
    tables.close()


def test_columns_of_one_name_are_told_apart(board: Path) -> None:
    answer, _ = run_sql(board, "SELECT 1 AS a, 2 AS a, 3 AS a_2, 4 AS a")
    assert json.loads(answer_text(answer, "json")) == [{"a": 1, "a_3": 2, "a_2": 3, "a_4": 4}]
    assert answer_text(answer, "csv") == "a,a_3,a_2,a_4\n1,2,3,4\n"
    raw = Answer(["a", "a"], [(1, 2)])
    assert answer_text(raw, "csv") == "a,a_2\n1,2\n"
    assert answer_text(raw, "md").startswith("| a | a\\_2 |")
    frame = Results(board).sql("SELECT 1 AS a, 2 AS a")
    assert list(frame.columns) == ["a", "a_2"]


def test_a_terminal_is_given_no_orders(tmp_path: Path) -> None:
    evil = "boom \x1b]0;owned\x07\x1b[2J \u202etxt"
    rows = cell_rows("bad\x1bnet", status="failed_method", detail=evil)
    write_rows(tmp_path, rows)
    write_grid(tmp_path, "na\x1bme", "0", [cell_columns("bad\x1bnet")])
    (tmp_path / "rows" / "od\x1bd.parquet").touch()
    found = load(tmp_path, Asked())
    answer, warnings = run_sql(tmp_path, "SELECT detail, attack FROM outcomes")
    told = [text(found, Asked(), form) for form in FORMS]
    told += [answer_text(answer, form) for form in FORMS]
    for said in (*told, *warnings):
        assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert all("owned" in said for said in told[len(FORMS) :])
    assert "owned" in told[0]


def test_long_answers_say_what_they_leave_out(board: Path) -> None:
    answer, _ = run_sql(board, "SELECT * FROM range(1000)")
    shown = answer_text(answer, limit=10)
    assert len(shown.splitlines()) == 12
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


def test_headings_are_the_columns_names_and_wide_rows_stand_upright(
    board: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Underscores were spaces and long names were broken, so that no heading could be typed."""
    monkeypatch.setenv("COLUMNS", "80")
    query = "SELECT attack, asr_top1_low, 1 AS a_name_of_many_parts FROM board LIMIT 2"
    table = call(capsys, "sql", query, "--in", board).out
    assert table.splitlines()[0].split() == ["attack", "asr_top1_low", "a_name_of_many_parts"]
    assert not call(capsys, "sql", query, "--in", board, "--format", "md").out.startswith("#")
    wide = call(capsys, "sql", "SELECT * FROM board LIMIT 2", "--in", board).out
    first, second = wide.strip().split("\n\n")
    assert all(": " in line for line in first.splitlines())
    assert "asr_top1: " in second


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT asr_tp1 FROM board", "no column 'asr_tp1' in board. Did you mean 'asr_top1'?"),
        ("SELECT avg(asr) FROM board", "in board. Did you mean 'asr_top1'"),
        ("SELECT b.clean_top1 FROM rows b", "no column 'clean_top1' in rows. There is one in"),
        ("SELECT 1 FROM bord", "Did you mean 'board'?"),
        ("SELECT seed FROM cells", "in cells. Did you mean 'victim_seed' or 'defense_seed'?"),
        ("-- all\nCOPY rows TO 'x.csv'", "COPY is no SELECT: queries only read results, and"),
        ("SELECT 1; DROP VIEW rows", "Not every statement here is a SELECT"),
        ("SELECT 'a'::int", "Could not convert string 'a'"),
    ],
)
def test_what_is_amiss_is_said_in_words_of_the_views(query: str, says: str, board: Path) -> None:
    with pytest.raises(AskedError) as told:
        run_sql(board, query)
    assert says in str(told.value)
    assert "Binder Error" not in str(told.value)
    assert "json" not in str(told.value)
    assert str(board) not in str(told.value)


def test_show_tables_lists_the_views(board: Path) -> None:
    for query in ("SHOW TABLES", "show all tables;"):
        assert [name for (name,) in run_sql(board, query)[0].rows] == list(QUERIED)
