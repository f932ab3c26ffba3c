"""Results directories and boards: real Parquet files, a real DuckDB, hand-made rows."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.board import Board, BoardRow, load_board, unfinished
from analysis.reader import Tables
from analysis.render import render
from analysis.stats import defense_effectiveness, normalised_asr, over_seeds
from grid.schema.columns import CELL, KINDS, ROW
from grid.schema.errors import ResultsError, SchemaError
from grid.schema.status import Status
from grid.schema.writing import merge_row_files, write_columns, write_grid, write_rows, write_table
from tests.rows import cell_columns, cell_rows, exhibit_rows, trial_row


def board_of(results: Path, *cells: list[dict[str, Any]], planned: int | None = None) -> Board:
    """Write cells, each in its own file, plan exactly these, and load the board."""
    for rows in cells:
        write_rows(results, rows)
    names = [column.name for column in CELL]
    plan = [{name: rows[0][name] for name in names} for rows in cells]
    write_grid(results, "demo", "0123456789abcdef", plan[:planned])
    return load_board(results)


def only(lines: Sequence[BoardRow]) -> BoardRow:
    assert len(lines) == 1
    return lines[0]


# The schema's laws.


def broken(**change: object) -> list[dict[str, Any]]:
    """The rows of a sound cell with the ASR row changed."""
    rows = cell_rows()
    rows[2].update(change)
    assert rows[2]["metric"].startswith(("asr", "psr"))
    return rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (broken(clean_victim=None), "refused without clean_victim"),  # T03
        (broken(metric="asr_top5", clean_victim=None), "refused without clean_victim"),  # T04
        (broken(metric="asr_top10", clean_victim=None), "refused without clean_victim"),
        (cell_rows(rate=None), "ASR does not apply to targeted poisoning"),  # T06
        (broken(status="not_applicable"), "not applicable; leave it null"),  # T06
        (broken(metric="psr_top1"), "no bare rate"),  # T25
        (broken(metric="psr_top5"), "no bare rate"),
        (broken(metric="psr_exact", value=1.5, successes=None), "a share lies in 0 to 1"),
        (broken(metric="asr_text_key_top1", value=90, successes=None), "a share lies in 0 to 1"),
        (broken(rate_text=None), "rate and rate_text go together"),
        (broken(value=95.0), "a share lies in 0 to 1"),
        (broken(value=float("nan"), successes=None), "not a finite number"),
        (broken(clean_victim=1.5), "clean_victim is 1.5"),
        (broken(n=0), "n is 0"),
        (broken(successes=1001), "successes 1001 of n 1000"),
        (broken(successes=899), "is not successes / n"),
        (broken(value=None), "only not_applicable may lack one"),
        (broken(status="missing"), "status 'missing'; allowed: ok, failed_method"),
        (broken(status="failed_method"), "metric rows are for measured cells"),
        (broken(ratee=0.5), "unknown column 'ratee'. Did you mean 'rate'?"),
        (broken(attack=None), "column 'attack' is missing (label on the board)"),
        (cell_rows()[1:], 'no row with metric "cell"'),
        ([*cell_rows(), cell_rows()[1]], "2 rows; one is allowed"),
    ],
)
def test_unlawful_rows_are_refused(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(SchemaError) as caught:
        write_rows(tmp_path, rows)
    assert says in str(caught.value)
    assert not list(tmp_path.rglob("*.parquet"))


def test_what_does_not_apply_is_null_and_not_zero(tmp_path: Path) -> None:
    rows = cell_rows()
    rows[2].update(status="not_applicable", value=None, n=None, successes=None, clean_victim=None)
    row = only(board_of(tmp_path, rows).rows)
    assert row.asr_top1 is None
    assert row.asr_top1_low is None
    assert row.clean_top1 == 0.95


@pytest.mark.parametrize("rate", [None, "0"])
def test_a_targeted_attack_has_rate_0_or_none(tmp_path: Path, rate: str | None) -> None:
    write_rows(tmp_path, cell_rows(rate=rate, hit="psr_top1", asr=0.4))
    metrics = Tables(tmp_path).query("SELECT metric, value, status FROM newest ORDER BY ALL").rows
    assert ("psr_top1", 0.4, "ok") in metrics
    assert ("asr_top1", None, "not_applicable") in metrics


@pytest.mark.parametrize(
    "prefix",
    ["text_hit_", "text_control_", "probe_", "image_to_text_", "text_to_image_", "psr_", "asr_"],
)
def test_what_is_a_share_is_held_to_0_to_1(tmp_path: Path, prefix: str) -> None:
    rows = cell_rows()
    rows[1].update(metric=f"{prefix}top1", value=1.5, successes=None, clean_victim=0.0)
    with pytest.raises(SchemaError, match="a share lies in 0 to 1"):
        write_rows(tmp_path, rows)


@pytest.mark.parametrize("metric", ["min_rank", "control_min_rank"])
def test_a_rank_is_no_share(tmp_path: Path, metric: str) -> None:
    rows = cell_rows()
    rows.append({**rows[1], "metric": metric, "value": 17.5, "successes": None})
    write_rows(tmp_path, rows)


def test_every_kind_is_written_with_its_schema_version(tmp_path: Path) -> None:
    now = cell_rows()[0]["written_at"]
    path = write_table(
        tmp_path,
        "stages",
        [
            {
                "key": "train-1",
                "kind": "train",
                "name": "victim",
                "inputs": ["data-1"],
                "seconds": 1.5,
                "started_at": now,
                "ended_at": now,
                "reused": False,
            }
        ],
    )
    metadata = pq.read_schema(path).metadata
    assert metadata[b"backdoor_grid_schema_version"] == b"1"
    attempt = {"key": "train-1", "attempt": 1, "outcome": "ok", "started_at": now}
    write_table(tmp_path, "attempts", [attempt])
    shared = {"cell": "c", "eval_set": "report", "label": 3, "clean_prediction": 3}
    ranks = {"clean_true_rank": 0, "triggered_target_rank": 0, "clean_target_rank": 7}
    columns = {**shared, **ranks, "image": range(100), "triggered_prediction": [4] * 100}
    write_columns(tmp_path, "samples", columns, 100)
    write_table(tmp_path, "trials", [trial_row()])
    for kind, exhibits in exhibit_rows("c").items():
        write_table(tmp_path, kind, exhibits)
    write_rows(tmp_path, cell_rows())
    results = Tables(tmp_path)
    for kind, columns_of_kind in KINDS.items():
        answer = results.query(f"FROM {kind}")
        assert answer.columns == [column.name for column in columns_of_kind]
        assert answer.rows
        assert answer.rows[0][0] == 1
    assert results.sql("SELECT count(*), max(image) FROM samples").rows == [(100, 99)]


def test_a_wrong_type_names_its_column(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"rows: column 'victim_seed' holds int64 \(the repl"):
        write_rows(tmp_path, cell_rows(seed="zero"))  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match=r"unknown column 'celll'\. Did you mean 'cell'"):
        write_table(tmp_path, "samples", [{"celll": "c"}])
    with pytest.raises(SchemaError, match="lacks attack"):
        write_grid(tmp_path, "demo", "0", [{**cell_columns(), "attack": None}])


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(table: pa.Table, where: Path, **options: object) -> None:
        where.write_bytes(b"PAR1 half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ResultsError, match=r"No space left on device\. Nothing was changed"):
        write_rows(tmp_path, cell_rows())
    assert not list((tmp_path / "rows").iterdir())


# What a board says.


def test_one_cell_shows_its_numbers_and_wilson_intervals(tmp_path: Path) -> None:
    board = board_of(tmp_path, cell_rows(asr=0.9, clean=0.95, clean_victim=0.02, n=1000))
    row = only(board.rows)
    assert (row.attack, row.rate, row.count, row.defense) == ("badnet", 0.01, 41, "none")
    assert (row.clean_top1, row.asr_top1, row.asr_clean_victim_top1) == (0.95, 0.9, 0.02)
    assert row.lift_top1 == pytest.approx(0.88)
    assert (row.num_seeds, row.status, row.eval_set) == (1, "ok", "report")
    assert (row.asr_top1_low, row.asr_top1_high) == pytest.approx(over_seeds([0.9], 1000)[:2])
    assert (row.clean_top1_low, row.clean_top1_high) == pytest.approx(over_seeds([0.95], 1000)[:2])
    assert board.completeness.is_complete
    assert "1 seed: intervals are within-cell" in board.notes()[0]


@pytest.mark.parametrize("shares", [[0.9, 0.8], [0.99, 0.5, 0.7], [1.0] * 3, [0.3] * 35])
@pytest.mark.parametrize("hit", [None, "psr_top1"])
def test_seeds_give_the_t_interval_of_the_statistics(
    tmp_path: Path, shares: list[float], hit: str | None
) -> None:
    cells = [cell_rows(seed=i, rate="0", asr=s, hit=hit) for i, s in enumerate(shares)]
    row = only(board_of(tmp_path, *cells).rows)
    assert row.num_seeds == len(shares)
    name = "hit_top1" if hit else "asr_top1"
    assert getattr(row, name) == pytest.approx(sum(shares) / len(shares))
    want = over_seeds(shares, 1000)
    assert (getattr(row, f"{name}_low"), getattr(row, f"{name}_high")) == pytest.approx(want[:2])


def test_defense_seeds_are_averaged_inside_their_victim(tmp_path: Path) -> None:
    """Three fits on one victim are no three replicates, and do not outweigh another victim."""
    cells = [cell_rows(defense="finetune", seed=0, defense_seed=i, asr=0.2) for i in range(3)]
    cells.append(cell_rows(defense="finetune", seed=1, asr=0.6))
    row = only(board_of(tmp_path, *cells).rows)
    assert (row.num_seeds, row.num_cells) == (2, 4)
    assert row.asr_top1 == pytest.approx(0.4)


def test_every_outcome_has_its_line(tmp_path: Path) -> None:
    """T44: a cell that failed, was skipped or never ran is on the board in words."""
    board = board_of(
        tmp_path,
        cell_rows(),
        cell_rows(defense="finetune", status="failed_method", detail="loss is not finite"),
        cell_rows(defense="cleanclip", status="failed_infrastructure", detail="worker died"),
        cell_rows(attack="sig", asr=0.4, status="invalid_victim", detail="gate"),
        cell_rows(attack="sig", defense="finetune", status="skipped"),
        cell_rows(rate="0.001", asr=0.1, status="inert"),
        cell_rows(attack="mm", rate=None, status="not_applicable"),
        cell_rows(defense="oracle_filter"),
    )
    write_grid(
        tmp_path,
        "demo",
        "0123456789abcdef",
        [
            *({c.name: rows[c.name] for c in CELL} for rows in _cells_on_disk(tmp_path)),
            cell_columns(defense="roclip"),
        ],
    )
    board = load_board(tmp_path)
    state = board.completeness
    assert (state.planned, state.ok, state.failed, state.missing) == (9, 2, 2, 1)
    assert (state.skipped, state.inert, state.invalid_victim, state.not_applicable) == (1, 1, 1, 1)
    assert not state.is_complete
    status = {(row.attack, row.rate, row.defense): row.status for row in board.rows}
    assert status == {
        ("badnet", 0.001, "none"): "inert",
        ("badnet", 0.01, "none"): "ok",
        ("badnet", 0.01, "finetune"): "failed_method",
        ("badnet", 0.01, "cleanclip"): "failed_infrastructure",
        ("badnet", 0.01, "roclip"): "missing",
        ("mm", None, "none"): "not_applicable",
    }
    assert [row.defense for row in board.controls] == ["oracle_filter"]
    assert [(row.status, row.asr_top1) for row in board.invalid] == [
        ("invalid_victim", 0.4),
        ("skipped", None),
    ]
    results = Tables(tmp_path)
    assert [(cell.label, cell.status, cell.detail) for cell in unfinished(results)] == [
        ("badnet/0.01/cleanclip/s0", "failed_infrastructure", "worker died"),
        ("badnet/0.01/roclip/s0", "missing", None),
    ]
    text = render(board, "table", 140)
    for words in (
        "failed (method): loss is not finite",
        "missing",
        "inert",
        "invalid victim",
        "INCOMPLETE: 9 planned cells: 2 ok, 1 failed (method), 1 failed (infrastructure)",
        "Controls",
        "hash 0123456789abcdef",
        "evaluation set report",
    ):
        assert words in text


def _cells_on_disk(results: Path) -> list[dict[str, Any]]:
    tables = [pq.ParquetFile(path).read() for path in sorted((results / "rows").iterdir())]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist()
    return [row for row in rows if row["metric"] == "cell"]


def test_a_mean_over_fewer_seeds_is_never_called_ok(tmp_path: Path) -> None:
    board = board_of(
        tmp_path,
        cell_rows(seed=0, asr=0.9),
        cell_rows(seed=1, asr=0.8),
        cell_rows(seed=2, status="failed_method", detail="diverged"),
    )
    row = only(board.rows)
    assert (row.status, row.shown_status, row.detail) == ("failed_method", "ok", "diverged")
    assert (row.num_seeds, row.num_shown, row.num_cells) == (2, 2, 3)
    assert row.asr_top1 == pytest.approx(0.85)
    assert "2 of 3 cells shown; failed (method): diverged" in render(board, "table", 200)


def test_inert_and_invalid_seeds_are_not_averaged_with_sound_ones(tmp_path: Path) -> None:
    board = board_of(
        tmp_path,
        cell_rows(seed=0, asr=0.9),
        cell_rows(seed=1, asr=0.1, status="inert"),
        cell_rows(seed=2, asr=0.3, status="invalid_victim"),
    )
    row = only(board.rows)
    assert (row.asr_top1, row.num_seeds, row.status) == (0.9, 1, "invalid_victim")


def test_the_newest_run_of_a_cell_counts(tmp_path: Path) -> None:
    write_rows(tmp_path, cell_rows(asr=0.5, minutes=2))
    write_rows(tmp_path, cell_rows(asr=0.9, minutes=1))
    assert only(load_board(tmp_path).rows).asr_top1 == 0.5
    write_rows(tmp_path, cell_rows(status="failed_method", detail="new code", minutes=3))
    row = only(load_board(tmp_path).rows)
    assert (row.status, row.asr_top1, row.num_seeds) == ("failed_method", None, 0)
    assert Tables(tmp_path).sql("SELECT count(*) FROM newest WHERE metric = 'cell'").rows == [(1,)]


def test_order_claims_nothing(tmp_path: Path) -> None:
    """Grid-file order inside equal needs, whatever the numbers; never sorted by ASR."""
    board = board_of(
        tmp_path,
        cell_rows(attack="sig"),
        cell_rows(attack="badnet", defense="roclip", asr=0.0),
        cell_rows(attack="badnet", defense="finetune", asr=0.8),
        cell_rows(attack="badnet", defense="cleanclip", asr=0.1),
        cell_rows(attack="badnet", defense="none"),
        cell_rows(attack="badnet", rate="0", asr=0.02),
    )
    assert [(row.attack, row.rate, row.defense) for row in board.rows] == [
        ("sig", 0.01, "none"),
        ("badnet", 0.0, "none"),
        ("badnet", 0.01, "none"),
        ("badnet", 0.01, "finetune"),
        ("badnet", 0.01, "cleanclip"),
        ("badnet", 0.01, "roclip"),
    ]
    assert "not ranked" in render(board)


def test_cells_of_an_older_grid_are_left_out_aloud(tmp_path: Path) -> None:
    board = board_of(tmp_path, cell_rows(), cell_rows(defense="finetune"), planned=1)
    assert [row.defense for row in board.lines] == ["none"]
    assert board.completeness.unplanned == 1
    assert "1 cells not in this grid left out" in render(board)


def test_success_has_the_name_of_its_metric(tmp_path: Path) -> None:
    """What an attack that stamps nothing is scored by, beside attacks that do."""
    board = board_of(
        tmp_path,
        cell_rows(asr=0.9),
        cell_rows("planted", None, hit="psr_top1", asr=0.4, clean_victim=0.0, n=50),
        cell_rows("queries", hit="text_hit_top1", asr=0.7, clean_victim=0.1, n=200),
        cell_rows("queries", defense="finetune", status="failed_method", detail="diverged"),
    )
    found = [
        (r.attack, r.success, r.hit_top1, r.hit_n, r.hit_clean_victim_top1, r.asr_top1)
        for r in board.rows
    ]
    assert found == [
        ("badnet", "asr_top1", None, None, None, 0.9),
        ("planted", "psr_top1", 0.4, 50, 0.0, None),
        ("queries", "text_hit_top1", 0.7, 200, 0.1, None),
        ("queries", None, None, None, None, None),
    ]
    planted = board.rows[1]
    assert (planted.hit_top1_low, planted.hit_top1_high) == pytest.approx(over_seeds([0.4], 50)[:2])
    assert (planted.asr_top1_low, planted.nasr_top1, planted.der) == (None, None, None)
    for form in ("table", "md"):
        text = render(board, form, 140)
        assert "hit@1" in text
        assert "40.0 [27.6, 53.8]" in text
    rows = json.loads(render(board, "json"))["rows"]
    assert [row["success"] for row in rows] == ["asr_top1", "psr_top1", "text_hit_top1", None]


@pytest.mark.parametrize("width", [80, 100, 120, 140, 160])
def test_the_table_with_hits_fits(tmp_path: Path, width: int) -> None:
    hits: dict[str, Any] = {"hit": "psr_top1", "asr": 1.0, "clean_victim": 1.0}
    board = board_of(
        tmp_path,
        *(cell_rows(defense=d, asr=1.0, clean=1.0) for d in ("same_budget_finetune", "roclip")),
        *(cell_rows("planted", None, d, **hits) for d in ("same_budget_finetune", "roclip")),
    )
    text = render(board, "table", width)
    assert max(map(len, text.splitlines())) <= width
    # Nothing was broken over two lines.
    assert [line.split()[-1] for line in text.splitlines() if "roclip" in line] == ["ok"] * 2
    assert "100.0 [99.6, 100.0]" in text or width < 96


def found_rows(defense: str, **found: float) -> list[dict[str, Any]]:
    """A cell of a defense that judged rows."""
    rows = cell_rows(defense=defense)
    given = {"eval_set": "suspect", "clean_victim": None, "n": 10_000}
    judged = [
        {
            **rows[1],
            **given,
            "metric": f"found_{name}",
            "value": value,
            "successes": round(10_000 * value),
        }
        for name, value in found.items()
    ]
    return [*rows, *judged]


@pytest.mark.parametrize("width", [140, 152, 160])
def test_precision_stands_beside_its_bound(tmp_path: Path, width: int) -> None:
    """A fifth of all rows flagged is no bad finding: at 1 % poison it can be 5 % right at best."""
    known = {"auroc": 0.9852, "recall": 0.98, "precision": 0.0503}
    every = {"auroc": 1.0, "recall": 1.0, "precision": 1.0, "precision_bound": 1.0}
    board = board_of(
        tmp_path,
        found_rows("finetune", **known, precision_bound=0.0513),
        found_rows("roclip", **known),
        found_rows("oracle_filter", **every),
    )
    finetune, roclip, oracle = board.lines
    assert finetune.found_precision_bound == 0.0513
    assert roclip.found_precision_bound is None, "rows of before there was one"
    assert oracle.found_precision_bound == 1
    text = render(board, "table", width)
    assert max(map(len, text.splitlines())) <= width
    for shown in ("0.985 / 98.0 / 5.0 of 5.1 ", "0.985 / 98.0 / 5.0 ", "1.000 / 100.0 / 100.0 of"):
        assert f" {shown}" in text
    assert "after `of`, the highest precision" in " ".join(board.notes())
    (row, *_) = json.loads(render(board, "json"))["rows"]
    assert row["found_precision_bound"] == 0.0513
    assert "found_precision,found_precision_bound," in render(board, "csv")
    assert "| 0.985 / 98.0 / 5.0 of 5.1 |" in render(board, "md")


def test_hits_are_a_column_only_where_some_attack_has_them(demo: Board) -> None:
    for form in ("table", "md"):
        assert "hit@1" not in render(demo, form, 140)
    row = json.loads(render(demo, "json"))["rows"][0]
    assert row["success"] == "asr_top1"
    for name in ("hit_top1", "hit_top1_low", "hit_top1_high", "hit_n", "hit_clean_victim_top1"):
        assert row[name] is None
    assert "hit_clean_victim_top1,r_acc" in render(demo, "csv").splitlines()[0]


def test_normalised_asr_and_der_are_of_the_line_and_its_undefended_victim(tmp_path: Path) -> None:
    """DER is held against the undefended victim of the same target, and null without one."""
    board = board_of(
        tmp_path,
        cell_rows(asr=0.9, clean=0.95, clean_victim=0.2, target="fox", cell="a"),
        cell_rows(defense="finetune", asr=0.3, clean=0.9, clean_victim=0.2, target="fox", cell="b"),
        cell_rows(defense="finetune", asr=0.3, clean=0.9, clean_victim=1.0, cell="c"),
    )
    rows = json.loads(render(board, "json"))["rows"]
    found = {(row["target"], row["defense"]): (row["nasr_top1"], row["der"]) for row in rows}
    want = (normalised_asr(0.3, 0.2), defense_effectiveness(0.95, 0.9, 0.9, 0.3))
    assert found["fox", "finetune"] == pytest.approx(want)
    assert want == pytest.approx((0.125, 0.775))
    assert found["fox", "none"] == pytest.approx((0.875, 0.5))
    assert found["banana", "finetune"] == (None, None)
    lines = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert [line["der"] for line in lines].count("") == 1


def test_results_of_before_cells_had_labels_are_read(tmp_path: Path) -> None:
    """Alone, beside newer files, and merged with them."""

    def without_label(path: Path) -> None:
        table = pq.ParquetFile(path).read()
        pq.write_table(table.drop_columns(["label"]), path)

    without_label(write_rows(tmp_path, cell_rows(seed=0)))
    write_grid(tmp_path, "demo", "0", [cell_columns(seed=seed) for seed in range(2)])
    grid = json.loads((tmp_path / "grid.json").read_text())
    for cell in grid["cells"]:
        del cell["label"]
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    assert only(load_board(tmp_path).rows).num_seeds == 1
    write_rows(tmp_path, cell_rows(seed=1))
    label = "SELECT DISTINCT victim_seed, label FROM newest ORDER BY 1"
    want = [(0, None), (1, "badnet/0.01/none/s1")]
    assert only(load_board(tmp_path).rows).num_seeds == 2
    assert Tables(tmp_path).query(label).rows == want
    merge_row_files(tmp_path)
    assert len(list((tmp_path / "rows").iterdir())) == 1
    assert Tables(tmp_path).query(label).rows == want
    assert Tables(tmp_path).query("FROM rows").columns == [c.name for c in ROW]


def test_a_method_that_failed_is_an_outcome(tmp_path: Path) -> None:
    failed: dict[str, Any] = {"status": "failed_method", "detail": "diverged"}
    board = board_of(tmp_path, cell_rows(), cell_rows(defense="finetune", **failed))
    assert json.loads(render(board, "json"))["completeness"]["complete"] is True
    assert "Complete: 2 planned cells: 1 ok, 1 failed (method)." in render(board, "table", 100)


def test_other_evaluation_sets_are_boards_of_their_own(tmp_path: Path) -> None:
    rows = cell_rows()
    rows += [
        {**row, "eval_set": "shifted", "value": 0.5, "successes": 500}
        for row in rows
        if row["metric"] == "clean_top1"
    ]
    assert only(board_of(tmp_path, rows).rows).clean_top1 == 0.95
    row = only(load_board(tmp_path, "shifted").rows)
    assert (row.clean_top1, row.asr_top1) == (0.5, None)
    with pytest.raises(
        ResultsError, match=r"no evaluation set 'shift' .* There are: report, shifted"
    ):
        load_board(tmp_path, "shift")


def test_targets_and_models_are_lines_of_their_own(tmp_path: Path) -> None:
    cells = [cell_rows(target=name, cell=name) for name in ("banana", "fox")]
    board = board_of(tmp_path, *cells)
    assert [row.target for row in board.rows] == ["banana", "fox"]
    assert "rate 1 % (41 rows), fox" in render(board)


def test_counts_of_a_targeted_attack_are_lines_of_their_own(tmp_path: Path) -> None:
    rows = [
        cell_rows(
            "planted", None, defense, hit="psr_top1", asr=hit, count=count, cell=f"{count}{defense}"
        )
        for count, hit in ((10, 0.2), (100, 0.8))
        for defense in ("none", "finetune")
    ]
    board = board_of(tmp_path, *rows)
    found = {(row.count, row.defense): row.hit_top1 for row in board.lines}
    assert found == {
        (10, "none"): 0.2, (10, "finetune"): 0.2, (100, "none"): 0.8, (100, "finetune"): 0.8
    }  # fmt: skip
    shown = render(board, "table", 160)
    assert shown.index("targeted (10 rows)") < shown.index("targeted (100 rows)")


def test_a_grid_without_results_yet_has_a_board(tmp_path: Path) -> None:
    write_grid(tmp_path, "demo", "0", [cell_columns(), cell_columns(defense="finetune")])
    board = load_board(tmp_path)
    assert [row.status for row in board.rows] == ["missing", "missing"]
    assert board.completeness.missing == 2
    assert "INCOMPLETE: 2 planned cells" in render(board)


def test_what_has_not_run_is_one_line(tmp_path: Path) -> None:
    ran = cell_rows(defense="finetune")
    waits = [cell_columns("blended", defense=name) for name in ("none", "finetune", "cleanclip")]
    write_rows(tmp_path, ran)
    names = [column.name for column in CELL]
    first = {name: ran[0][name] for name in names}
    write_grid(tmp_path, "demo", "0", [first, cell_columns(defense="none"), *waits])
    lines = render(load_board(tmp_path)).splitlines()
    (folded,) = [line for line in lines if "blended" in line]
    assert folded.endswith(": none of 3 lines has run")
    # Beside a cell that ran, the one that did not has a line of its own.
    assert [line.split()[0] for line in lines if line.rstrip().endswith("missing")] == ["none"]


# Formats.


@pytest.fixture
def demo(tmp_path: Path) -> Board:
    cells = [
        cell_rows(attack, rate, defense, asr=0.99 if defense == "none" else 0.31)
        for attack in ("badnet", "blended")
        for rate in ("0", "0.01")
        for defense in ("none", "finetune", "cleanclip", "roclip", "oracle_filter")
    ]
    return board_of(tmp_path, *cells)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits(demo: Board, width: int) -> None:
    text = render(demo, "table", width)
    assert max(map(len, text.splitlines())) <= width
    line = next(line for line in text.splitlines() if "cleanclip" in line)
    assert "31.0 [28.2, 33.9]" in line
    assert line.split()[-1] == "ok"
    assert "\x1b" not in text
    assert "\x1b[" in render(demo, "table", width, color=True)


def test_json_is_one_object_with_shares(demo: Board) -> None:
    document = json.loads(render(demo, "json"))
    assert document["grid"] == {"name": "demo", "hash": "0123456789abcdef"}
    assert document["completeness"]["complete"] is True
    assert document["completeness"]["planned"] == document["completeness"]["ok"] == 20
    assert len(document["rows"]) == 20
    row = document["rows"][1]
    assert {name: row[name] for name in ("attack", "rate", "defense", "needs", "fidelity")} == {
        "attack": "badnet",
        "rate": 0.0,
        "defense": "finetune",
        "needs": ["victim", "clean_data"],
        "fidelity": "exact",
    }
    assert 0 <= row["asr_top1_low"] <= row["asr_top1"] <= row["asr_top1_high"] <= 1
    assert row["asr_clean_victim_top1"] == 0.02
    assert (row["num_seeds"], row["status"], row["relative_cost"]) == (1, "ok", 0.25)


def test_csv_and_markdown_hold_every_line(demo: Board) -> None:
    lines = list(csv.DictReader(io.StringIO(render(demo, "csv"))))
    assert len(lines) == 20
    assert lines[1]["needs"] == "victim clean_data"
    text = render(demo, "md")
    assert text.count("| badnet |") == text.count("| blended |") == 10
    assert "### Controls" in text
    with pytest.raises(ResultsError, match="There are: table, md, csv, json"):
        render(demo, "pdf")


# Directories in trouble.


def test_no_directory_and_no_results_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no such directory.*Run a grid with --out"):
        load_board(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"neither grid.json nor rows/\*.parquet"):
        load_board(tmp_path)


def test_broken_and_foreign_files_are_named_and_skipped(tmp_path: Path) -> None:
    for i in range(9):
        write_rows(tmp_path, cell_rows(seed=i))
    folder = tmp_path / "rows"
    whole = write_rows(tmp_path, cell_rows(seed=9)).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.parquet").touch()
    (folder / "text.parquet").write_text("not parquet at all")
    (folder / ".scratch.parquet").write_bytes(whole[:100])
    pq.write_table(pa.table({"a": [1]}), folder / "foreign.parquet")
    board = load_board(tmp_path)
    assert only(board.rows).num_seeds == 10
    named = sorted(
        name
        for name in ("cut", "empty", "text", "foreign", "scratch")
        for warning in board.warnings
        if f"{name}.parquet: skipped" in warning
    )
    assert named == ["cut", "empty", "foreign", "text"]
    assert "foreign.parquet" in "".join(render(board, "table", 200).split())


def test_a_newer_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("arrow", "writing"):
        monkeypatch.setattr(f"grid.schema.{module}.SCHEMA_VERSION", 2)
    write_rows(tmp_path, cell_rows())
    with pytest.raises(SchemaError, match=r"results schema 2; this backdoor-grid reads up to 1"):
        load_board(tmp_path)
    for path in (tmp_path / "rows").iterdir():
        path.unlink()
    write_grid(tmp_path, "demo", "0", [])
    with pytest.raises(SchemaError, match=r"grid.json was written with results schema 2"):
        load_board(tmp_path)


def test_odd_directory_names_are_no_wildcards(tmp_path: Path) -> None:
    board = board_of(tmp_path / "it's [1] *odd*?", cell_rows())
    assert only(board.rows).status == "ok"


def _write_many(results: Path, start: int, stop: int) -> None:
    for seed in range(start, stop):
        write_rows(results, cell_rows(seed=seed))


def test_reading_while_others_write_and_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes write, and merge small files; every board in between is a sound one."""
    monkeypatch.setattr("grid.schema.writing.MAX_ROW_FILES", 24)
    write_rows(tmp_path, cell_rows(seed=0))
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(tmp_path, start, start + 40)) for start in (1, 41)
    ]
    seen = [1]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        board = load_board(tmp_path)
        assert not [text for text in board.warnings if "grid.json" not in text]
        seen.append(only(board.rows).num_seeds)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen == sorted(seen)
    assert only(load_board(tmp_path).rows).num_seeds == 81
    assert len(list((tmp_path / "rows").iterdir())) < 50


# The lock.


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Results that nothing in this section can change, as each of its tests looks anew."""
    folder = tmp_path_factory.mktemp("locked")
    board_of(folder, cell_rows(defense="finetune"))
    return Tables(folder)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM read_text('/etc/passwd')",
        "SELECT (SELECT content FROM read_text('/etc/passwd'))",
        "FROM '/etc/passwd'",
        "FROM read_csv('/etc/passwd')",
        "FROM glob('/etc/*')",
        "COPY (SELECT 1) TO 'DIR/rows/x.parquet'",
        "COPY (SELECT 1) TO '/tmp/x.csv'",
        "WITH x AS (COPY (SELECT 1) TO 'DIR/x.csv') FROM x",
        "WITH x AS (INSERT INTO planned SELECT * FROM planned RETURNING *) FROM x",
        "WITH x AS (DELETE FROM t95 RETURNING *) FROM x",
        "WITH x AS (UPDATE t95 SET t = 0 RETURNING *) FROM x",
        "SELECT * FROM (WITH x AS (COPY (SELECT 1) TO 'DIR/x.csv') FROM x)",
        "FROM query('COPY (SELECT 1) TO ''DIR/x.csv''')",
        "FROM enable_logging(storage := 'file', storage_path := 'DIR/log')",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW rows",
        "ATTACH 'DIR/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "PRAGMA database_list",
        "EXPORT DATABASE 'DIR/out'",
        "EXPLAIN ANALYZE SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP VIEW rows",
        "FROM rows_in_python",
        "SELECT * FROM read_parquet('https://example.org/x.parquet')",
        "nonsense",
        "",
    ],
)
def test_sql_of_a_user_only_reads_the_views(locked: Tables, sql: str) -> None:
    rows_in_python = pa.table({"secret": [1]})
    folder = locked.directory
    before = sorted(folder.rglob("*"))
    with pytest.raises(ResultsError):
        locked.sql(sql.replace("DIR", str(folder)))
    assert sorted(folder.rglob("*")) == before
    assert locked.sql("SELECT count(*) FROM rows").rows == [(5,)]
    assert rows_in_python.num_rows == 1


def test_the_connection_itself_is_locked(tmp_path: Path) -> None:
    """The second wall: what slips past the syntax check meets DuckDB's own lock."""
    board_of(tmp_path / "in", cell_rows())
    (tmp_path / "secret.txt").write_text("secret")
    results = Tables(tmp_path / "in")
    for sql in (
        "FROM read_text('/etc/passwd')",
        f"FROM read_text('{tmp_path}/secret.txt')",
        f"FROM read_text('{tmp_path}/in/../secret.txt')",
        f"COPY (SELECT 1) TO '{tmp_path}/x.csv'",
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "LOAD httpfs",
    ):
        with pytest.raises(ResultsError):
            results.query(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT attack, asr_top1 FROM board WHERE asr_top1 > 0.5",
        "WITH a AS (FROM cells) SELECT count(*) FROM a UNION ALL SELECT 2",
        "DESCRIBE board",
        "SELECT * FROM rows WHERE written_at > TIMESTAMP '2025-01-01' ORDER BY written_at",
        "SELECT i FROM range(3) r(i)",
        "SELECT unnest(needs) FROM outcomes",
        "FROM completeness",
        "SUMMARIZE SELECT value FROM rows",
    ],
)
def test_reading_sql_works(locked: Tables, sql: str) -> None:
    assert locked.sql(sql).rows


# Start-up.


def test_a_board_needs_no_heavy_import(tmp_path: Path) -> None:
    board_of(tmp_path, cell_rows())
    code = (
        "import sys; import analysis.board, analysis.render\n"
        "assert not {'duckdb', 'rich', 'pyarrow'} & set(sys.modules)\n"
        "from pathlib import Path\n"
        "print(analysis.render.render(analysis.board.load_board(Path(sys.argv[1]))))\n"
        "heavy = {'torch', 'ray', 'pandas', 'numpy', 'pyarrow', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "badnet" in done.stdout
    # Measured 0.4 s; the bound is loose because machines that test are busy.
    assert time.perf_counter() - started < 3


def test_ten_thousand_cells_are_a_board_in_a_second_or_so(tmp_path: Path) -> None:
    cells = [
        (f"attack{a}", rate, f"defense{d}", seed)
        for a in range(20)
        for rate in ("0", "0.001", "0.01", "0.1")
        for d in range(42)
        for seed in range(3)
    ][:10_000]
    many = [row for cell in cells for row in cell_rows(*cell)]
    write_table(tmp_path, "rows", many)
    write_grid(tmp_path, "big", "0", [cell_columns(*cell) for cell in cells])
    started = time.perf_counter()
    board = load_board(tmp_path)
    seconds = time.perf_counter() - started
    assert board.completeness.ok == 10_000
    assert all(row.status == Status.OK for row in board.lines)
    assert seconds < 4, f"{seconds:.2f} s; measured 0.3 s on a quiet machine"
