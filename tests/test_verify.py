"""`grid verify`: a cell is made again from recorded inputs, and every number is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grid.schema.writing import write_rows
from grid.verify import verify_cell
from tests.finished import Finished
from tests.grids import call, records
from victims.store import Store

CELL = "badnet/0.1/finetune/s0"


def verify(run: Finished, start: str = "measure", **options: Any) -> dict[str, Any]:
    return verify_cell(str(run.file), CELL, run.out, str(run.store), start=start, **options)


def change(run: Finished, metric: str, **columns: Any) -> None:
    """Write a cell's rows again, with other values of a metric on the report split, or of all."""
    rows = [row for row in records(run.out, "rows") if row["label"] == CELL]
    for row in rows:
        del row["written_at"]
        is_meant = (row["eval_set"], row["metric"]) == ("report", metric)
        row.update(columns if is_meant or metric == "*" else {})
    write_rows(run.out, rows)


def files(store: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("start", "made"), [("measure", {"measure"}), ("model", {"measure", "defended", "model"})]
)
def test_a_cell_made_again_has_the_same_bits(
    finished: Finished, start: str, made: set[str]
) -> None:
    before = files(finished.store)
    found = verify(finished, start)
    assert found["equal"], found["different"]
    assert found["exact"]
    assert found["largest_difference"] == 0
    assert found["numbers"] > 100
    assert {stage["key"].split("-")[0] for stage in found["made"]} == made
    # Its own defense, and not what the store holds of it, is what was measured.
    assert found["borrowed"] > 0
    assert files(finished.store) == before


def test_a_number_that_is_not_as_recorded_is_named(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished.copy(tmp_path)
    words = ("verify", CELL, "--grid", run.file, *run.places)
    assert call(capsys, *words).code == 0
    rows = [row for row in records(run.out, "rows") if row["label"] == CELL]
    row = next(r for r in rows if (r["eval_set"], r["metric"]) == ("report", "r_acc"))
    other = (row["successes"] + 1) % row["n"]
    change(run, "r_acc", successes=other, value=other / row["n"])
    told = call(capsys, *words)
    assert told.code == 4
    assert "DIFFERENT" in told.out
    assert "report r_acc value: recorded" in told.out
    found = json.loads(call(capsys, *words, "--json").out)
    assert {(d["metric"], d["column"]) for d in found["different"]} == {("r_acc", "value")}
    assert call(capsys, *words, "--tolerance", "1").code == 0


def test_another_machine_or_torch_gets_a_stated_tolerance(
    finished: Finished, tmp_path: Path
) -> None:
    """Sums round differently there: that is no fault of the row."""
    run = finished.copy(tmp_path)
    change(run, "*", versions=json.dumps({"torch": "1.0"}))
    found = verify(run)
    assert found["circumstances_that_differ"]["torch"][0] == "1.0"
    assert (found["exact"], found["tolerance"], found["equal"]) == (False, 0.005, True)
    assert verify(run, tolerance=0.0)["exact"]


def test_what_was_measured_on_is_compared_whatever_the_tolerance(
    finished: Finished, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path)
    change(run, "clean_top1", eval_digest="0" * 16)
    found = verify(run, tolerance=1.0)
    assert {d["column"] for d in found["different"]} == {"eval_digest"}


def test_inputs_that_the_store_lost_are_made_again(finished: Finished, tmp_path: Path) -> None:
    run = finished.copy(tmp_path)
    row = next(r for r in records(run.out, "rows") if r["label"] == CELL)
    Store(run.store).remove(row["trigger_key"])
    said: list[str] = []
    assert verify(run, say=said.append)["equal"]
    assert f"making {row['trigger_key']} (trigger:badnet), which the store lacks" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((CELL, "--from", "modle"), "Did you mean 'model'?"),
        (("badnet/0.1/fintune/s0",), "Did you mean 'badnet/0.1/finetune/s0'?"),
    ],
)
def test_wrong_words(
    finished: Finished, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    answer = call(capsys, "verify", *words, "--grid", finished.file, *finished.places)
    assert (answer.code, says in answer.err) == (2, True)


def test_a_cell_without_numbers_cannot_be_verified(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--out", tmp_path / "out", "--store", finished.store)
    answer = call(capsys, "verify", CELL, "--grid", finished.file, *where)
    assert answer.code == 2
    assert "holds no numbers of it to verify (it has no row)" in answer.err
