"""One bad file is named, and everything else goes on without it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.board import load_board
from analysis.leaderboard import Asked, load, text
from analysis.query import run_sql
from analysis.report import write_report
from grid.quick import outcomes_in, unreadable_in
from grid.schema.errors import ResultsError
from grid.schema.writing import merge_row_files, write_rows
from grid.view import Viewed
from tests.boards import steady, write_board
from tests.rows import cell_rows

LINES = Asked(part="lines")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return write_board(folder, {"none": steady(0.9), "ours": steady(0.1)})


@pytest.fixture(scope="module")
def as_csv(whole: Path) -> str:
    return text(load(whole, LINES), LINES, "csv")


@pytest.fixture
def board(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "board")


def good(board: Path) -> Path:
    """A file of rows as a run writes it, of a seed that the board has not."""
    aside = board.parent / "aside"
    return write_rows(aside, cell_rows(seed=7))


def corrupt(board: Path, bad: Path) -> None:
    """The footer is whole, the pages are not."""
    body = bytearray(good(board).read_bytes())
    end = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
    body[4:end] = b"\xff" * (end - 4)
    bad.write_bytes(body)


def with_column(name: str, values: Callable[[int], pa.Array]) -> Callable[[Path, Path], None]:
    def make(board: Path, bad: Path) -> None:
        table = pq.read_table(good(board))
        place = table.schema.get_field_index(name)
        made = table.set_column(place, name, values(len(table)))
        pq.write_table(made.replace_schema_metadata(table.schema.metadata), bad)

    return make


def without_cells(board: Path, bad: Path) -> None:
    table = pq.read_table(good(board))
    pq.write_table(table.drop_columns(["cell"]), bad)


BAD: dict[str, Callable[[Path, Path], object]] = {
    "corrupt": corrupt,
    "text": with_column("value", lambda n: pa.array(["0.5"] * n)),
    "no-cells": without_cells,
    "dangling": lambda _, bad: bad.symlink_to("/nonexistent"),
    "looping": lambda _, bad: bad.symlink_to(bad.name),
    "folder": lambda _, bad: bad.mkdir(),
    "nan": with_column("value", lambda n: pa.array([math.nan] * n)),
    "infinite": with_column("value", lambda n: pa.array([math.inf] * n)),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_and_the_board_is_there(kind: str, board: Path, as_csv: str) -> None:
    bad = board / "rows" / f"{kind}.parquet"
    BAD[kind](board, bad)
    found = load(board, LINES)
    assert [warning for warning in found.board.warnings if bad.name in warning]
    assert len(found.board.warnings) == 1
    assert text(found, LINES, "csv") == as_csv
    json.loads(text(found, LINES, "json"))
    answer, warnings = run_sql(board, "SELECT count(*) FROM rows WHERE value IS NOT NULL")
    assert (answer.rows, len(warnings)) == ([(48,)], 1)
    (said,) = unreadable_in(board)
    assert bad.name in said


def test_a_page_and_a_view_go_on_without_a_corrupt_file(board: Path) -> None:
    bad = board / "rows" / "bad.parquet"
    corrupt(board, bad)
    assert "bad.parquet" in write_report(board, board / "report.html", Asked()).read_text()
    viewed = Viewed(board)
    try:
        assert viewed.rows({})["total"] == 4
    finally:
        viewed.close()


@pytest.mark.parametrize("content", ["", "null", "{}", "[]", '{"name": "x", ', '{"cells": 3}'])
def test_a_bad_grid_file_is_named(content: str, board: Path) -> None:
    (board / "grid.json").write_text(content)
    found = load_board(board)
    assert len(found.lines) == 4
    (said,) = found.warnings
    assert "grid.json: skipped, cannot be read, so missing cells cannot be told" in said
    if content != '{"cells": 3}':
        (said,) = unreadable_in(board)
        assert "grid.json: cannot be read" in said


def test_a_mistake_in_sql_is_no_damage(board: Path) -> None:
    for sql in ("SELECT nonsense FROM rows", "SELECT 'a'::INT", "SELECT * FROM rows LIMIT -1"):
        with pytest.raises(ResultsError):
            run_sql(board, sql)


def test_what_is_mistyped_is_neither_merged_nor_an_outcome(board: Path) -> None:
    bad = board / "rows" / "bad.parquet"
    BAD["text"](board, bad)
    write_rows(board, cell_rows(seed=9))
    merge_row_files(board)
    assert bad.exists()
    assert len(list((board / "rows").iterdir())) == 2
    assert len(outcomes_in(board)) == 13
    without_cells(board, bad)
    assert len(outcomes_in(board)) == 13
