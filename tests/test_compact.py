"""Compaction: the same records in few files, whoever reads meanwhile and wherever it is killed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.files import FilesChanged
from analysis.reader import Tables
from grid import compact as module
from grid.compact import compact
from grid.quick import outcomes_in
from grid.schema.arrow import REPLACES_KEY
from grid.schema.columns import KINDS
from grid.schema.errors import ResultsError
from grid.schema.writing import write_grid, write_rows, write_table
from tests.grids import call, records
from tests.rows import EPOCH, cell_columns, cell_rows, exhibit_rows, trial_row

FORK = multiprocessing.get_context("fork")


def stage(number: int) -> dict[str, Any]:
    about = {"key": f"model-{number:016x}", "kind": "model", "name": "plain_clip", "inputs": ["a"]}
    return {**about, "seconds": 1.0, "started_at": EPOCH, "ended_at": EPOCH, "reused": False}


def attempt(number: int) -> dict[str, Any]:
    return {"key": f"model-{number:016x}", "attempt": 1, "outcome": "ok", "started_at": EPOCH}


def sample(number: int) -> dict[str, Any]:
    ranks = ("clean_true_rank", "triggered_target_rank", "clean_target_rank")
    answers = dict.fromkeys(("label", "clean_prediction", "triggered_prediction", *ranks), 1)
    return {"cell": f"cell-{number}", "eval_set": "report", "image": number, **answers}


def write_one(results: Path, number: int) -> None:
    """What a run leaves for one cell: a file of every kind."""
    write_rows(results, cell_rows(seed=number))
    write_table(results, "stages", [stage(number)])
    write_table(results, "attempts", [attempt(number)])
    write_table(results, "samples", [sample(number), sample(number + 1000)])
    write_table(results, "trials", [trial_row(number)])
    for kind, exhibits in exhibit_rows(f"cell-{number}").items():
        write_table(results, kind, exhibits)


def age(results: Path, seconds: float = 3600) -> None:
    for path in results.rglob("*.parquet"):
        then = time.time() - seconds
        os.utime(path, (then, then))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A run of three cells, long over."""
    out = tmp_path / "run"
    for number in range(3):
        write_one(out, number)
    write_grid(out, "demo", "0", [cell_columns(seed=number) for number in range(3)])
    age(out)
    return out


def everything(out: Path) -> dict[str, list[str]]:
    """All records as the views show them."""
    with closing(Tables(out)) as opened:
        assert opened.warnings == []
        return {kind: sorted(map(repr, opened.query(f"FROM {kind}").rows)) for kind in KINDS}


def files(out: Path) -> dict[str, int]:
    return {kind: len(list((out / kind).glob("*.parquet"))) for kind in KINDS}


def test_every_record_is_there_afterwards_in_one_file_of_its_kind(results: Path) -> None:
    before, cells, raw = everything(results), outcomes_in(results), records(results, "stages")
    assert files(results) == dict.fromkeys(KINDS, 3)
    done = compact(results)
    assert [(one.kind, one.files, one.put_together, one.made) for one in done] == [
        (kind, 3, 3, 1) for kind in KINDS
    ]
    assert files(results) == dict.fromkeys(KINDS, 1)
    assert everything(results) == before
    assert outcomes_in(results) == cells
    assert records(results, "stages") == raw
    with closing(Tables(results)) as opened:
        assert opened.query("FROM stages").columns == [c.name for c in KINDS["stages"]]


def test_a_compacted_directory_grows_and_is_compacted_again(results: Path) -> None:
    compact(results)
    assert {one.made for one in compact(results)} == {0}, "one file has nothing to go with"
    write_one(results, 3)
    age(results)
    before = everything(results)
    compact(results)
    assert everything(results) == before
    assert files(results) == dict.fromkeys(KINDS, 1)


def test_what_is_young_foreign_torn_or_newer_is_left_alone(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = results / "stages"
    whole = next(folder.glob("*.parquet")).read_bytes()
    with monkeypatch.context() as patched:
        for module in ("arrow", "writing"):
            patched.setattr(f"grid.schema.{module}.SCHEMA_VERSION", 99)
        write_table(results, "stages", [stage(99)])
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / ".x.parquet.1-scratch").write_bytes(whole[:9])
    pq.write_table(pa.table({"a": [1]}), folder / "foreign.parquet")
    alone = {path.name: path.read_bytes() for path in folder.glob("*") if path.stat().st_mtime > 1}
    old = {path.name for path in folder.glob("*") if time.time() - path.stat().st_mtime > 600}
    age(results)
    (folder / ".x.parquet.2-scratch").touch()
    write_table(results, "stages", [stage(100)])
    young = {path.name for path in folder.iterdir()} - alone.keys()
    compact(results)
    left = {path.name for path in folder.iterdir()}
    assert young <= left, "what may still be written"
    assert alone.keys() - old - {".x.parquet.1-scratch"} <= left
    assert not old & left
    assert ".x.parquet.1-scratch" in left, "an hour is not over"
    age(results, 7200)
    os.utime(folder / ".x.parquet.1-scratch", (0, 0))
    compact(results)
    assert not (folder / ".x.parquet.1-scratch").exists()
    for name in ("cut.parquet", "foreign.parquet"):
        assert (folder / name).read_bytes() == alone[name]


def test_large_files_are_left_and_new_ones_end(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every call would write everything anew."""
    size = max(path.stat().st_size for path in (results / "stages").iterdir())
    write_one(results, 3)
    age(results)
    before = everything(results)
    monkeypatch.setattr(module, "LARGE_BYTES", 2 * size + 2)
    monkeypatch.setattr(module, "KINDS", {"stages": KINDS["stages"]})
    assert [(one.put_together, one.made) for one in compact(results)] == [(4, 2)]
    monkeypatch.setattr(module, "LARGE_BYTES", 2)
    assert [(one.put_together, one.made) for one in compact(results)] == [(0, 0)]
    assert everything(results) == before


def test_a_column_added_later_is_null_in_older_files(results: Path) -> None:
    path = sorted((results / "stages").iterdir())[0]
    table = pq.ParquetFile(path).read()
    pq.write_table(table.drop_columns(["name"]), path)
    age(results)
    before = everything(results)
    compact(results)
    assert everything(results) == before
    assert sorted(str(row["name"]) for row in records(results, "stages"))[0] == "None"


def test_a_dry_run_says_what_would_happen_and_changes_nothing(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = sorted(results.rglob("*"))
    said = call(capsys, "compact", results, "--dry-run")
    assert said.code == 0, said.err
    assert "samples   3 of 3 files would become 1" in said.out
    assert sorted(results.rglob("*")) == listed
    told = json.loads(call(capsys, "compact", results, "--json").out)
    assert {one["kind"]: one["made"] for one in told} == dict.fromkeys(KINDS, 1)


def test_no_results_and_another_compaction_are_told(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = call(capsys, "compact", tmp_path / "nowhere")
    assert said.code == 2
    assert "there is no such directory" in said.err
    with (
        module._only_one(results),
        pytest.raises(ResultsError, match="compacted by another process"),
    ):
        compact(results)


# Killed.


def _compact_until(results: Path, last: int) -> None:
    """Compact, and die by SIGKILL at the step of that number."""
    steps = 0

    def step(what: str) -> None:
        nonlocal steps
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    compact(results, step=step)


@pytest.mark.parametrize(
    "kind",
    [
        "stages",
        *(pytest.param(k, marks=pytest.mark.exhaustive) for k in ("rows", "samples", "attempts")),
    ],
)
def test_killed_at_any_step_it_loses_and_doubles_nothing(
    kind: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of which the newest counts bear being there twice; what stages took does not."""
    monkeypatch.setattr(module, "KINDS", {kind: KINDS[kind]})
    pristine, before, cells = results.with_name("first"), everything(results), outcomes_in(results)
    shutil.copytree(results, pristine)
    for number in itertools.count():
        compacting = FORK.Process(target=_compact_until, args=(results, number))
        compacting.start()
        compacting.join()
        assert everything(results) == before, f"killed at step {number}"
        assert outcomes_in(results) == cells
        if compacting.exitcode == 0:
            break
        assert compacting.exitcode == -signal.SIGKILL
        compact(results)
        assert everything(results) == before, f"killed at step {number}, then called again"
        assert files(results)[kind] == 1
        shutil.rmtree(results)
        shutil.copytree(pristine, results)
    assert number == 3 + 3, "three steps and three deletions"


def test_what_a_killed_one_left_goes_before_its_file_is_replaced(results: Path) -> None:
    """Were it the other way round, nothing would say any more that the old ones are in another."""
    seen = list[str]()

    class Stop(BaseException):
        pass

    def stop(what: str) -> None:
        if what.startswith("stages: deleting"):
            raise Stop

    with pytest.raises(Stop):
        compact(results, step=stop)
    write_table(results, "stages", [stage(3)])
    age(results)
    before = everything(results)
    compact(results, step=seen.append)
    order = [what.split()[1] for what in seen if what.startswith("stages:")]
    assert order[:3] == ["deleting"] * 3
    assert order[3:6] == ["writing", "written", "in"]
    assert everything(results) == before
    (left,) = (results / "stages").glob("*.parquet")
    assert len(pq.read_metadata(left).metadata[REPLACES_KEY.encode()].split(b"/")) == 2


# While others read and write.


def _write(results: Path, first: int, last: int) -> None:
    for number in range(first, last):
        write_one(results, number)


def _compact_always(results: Path, stop: Any) -> None:
    module.SETTLED_SECONDS = 0.0  # every whole file at once, which is harder than a minute later
    while not stop.is_set():
        compact(results)


def test_readers_see_every_record_once_while_it_compacts(tmp_path: Path) -> None:
    out, stop = tmp_path / "run", FORK.Event()
    write_one(out, 0)
    write_grid(out, "demo", "0", [cell_columns(seed=number) for number in range(40)])
    others = [FORK.Process(target=_write, args=(out, 1, 40))]
    others.append(FORK.Process(target=_compact_always, args=(out, stop)))
    for other in others:
        other.start()
    writer, looks, last = others[0], 0, dict.fromkeys((*KINDS, "cells"), 0)
    while writer.is_alive() or looks < 3:
        seen = {"cells": len(outcomes_in(out))}
        try:
            with closing(Tables(out)) as opened:
                for kind, key in (("stages", "key"), ("attempts", "key"), ("samples", "image")):
                    asked = f"SELECT count(*), count(DISTINCT {key}) FROM {kind}"  # noqa: S608
                    (count, distinct), *_ = opened.query(asked).rows
                    assert count == distinct, f"{kind}: a record was seen twice"
                    seen[kind] = count
        except FilesChanged:
            continue
        assert all(seen[kind] >= last[kind] for kind in seen), "a record was not seen again"
        last |= seen
        looks += 1
    stop.set()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert (len(outcomes_in(out)), len(records(out, "stages"))) == (40, 40)
    assert len(everything(out)["samples"]) == 80
