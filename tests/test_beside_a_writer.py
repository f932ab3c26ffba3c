"""Readers beside a writer that never rests: no error, nothing twice, nothing that goes away."""

from __future__ import annotations

import http.client
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from analysis import Results
from analysis.leaderboard import Asked, load
from analysis.query import run_sql
from analysis.report import write_report
from grid.compact import compact
from grid.schema import writing
from grid.schema.writing import write_grid, write_rows
from grid.view import serve
from tests.boards import write_pictures
from tests.rows import cell_columns, cell_rows

ATTACKS = ("badnet", "blended", "sig")
DEFENSES = ("none", "finetune", "ours")
MOST = 7_200
COUNT = "SELECT count(*), count(DISTINCT cell) FROM outcomes WHERE status = 'ok'"


def cells() -> list[dict[str, Any]]:
    kinds = itertools.product(range(MOST // 9), ATTACKS, DEFENSES)
    return [{"attack": a, "defense": d, "seed": seed} for seed, a, d in kinds]


def write_one(results: Path, cell: dict[str, Any]) -> None:
    asr = 0.9 if cell["defense"] == "none" else 0.3
    write_rows(results, cell_rows(**cell, clean=0.6, asr=asr))
    name = f"{cell['attack']}-0.01-{cell['defense']}-{cell['seed']}-0"
    write_pictures(results, name, [True, False], [True, True], [1, 2])


def keep_writing(results: Path, stop: Event, told: Any) -> None:
    """Cells one by one, their files merged every 24, and all put into few now and then."""
    writing.MAX_ROW_FILES = 24
    done = 9
    for cell in cells()[9:]:
        if stop.is_set():
            break
        write_one(results, cell)
        done += 1
        if done % 20 == 0:
            for path in results.rglob("*.parquet"):
                os.utime(path, (0, 0))  # as if it had lain there long
            compact(results)
    told.put(done)  # of many that are planned


def chains(columns: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run leaves of its plan, as if all cells shared their stages."""
    listed = [
        {
            **{name: cell[name] for name in ("label", "attack", "rate", "defense", "defense_seed")},
            **{"key": cell["cell"], "seed": cell["victim_seed"], "target": 0},
            **{"measures": ["m", "v"], "gate": None},
        }
        for cell in columns
    ]
    about = {"grid": "busy", "hash": "0", "store": "store", "gpus": {}, "gates": []}
    stages = {"m": {"kind": "measure", "name": "measure", "inputs": ["v"]}}
    return {**about, "stages": {**stages, "v": {"kind": "model", "name": "v"}}, "cells": listed}


def ask(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    assert answer.status == 200, body
    return json.loads(body)


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_every_reader_sees_whole_results(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    for cell in cells()[:9]:
        write_one(results, cell)
    planned = cells()[: 120 * seconds]
    columns = [cell_columns(c["attack"], "0.01", c["defense"], c["seed"]) for c in planned]
    write_grid(results, "busy", "0", columns)
    (results / "chains.json").write_text(json.dumps(chains(columns)))
    monkeypatch.setattr("analysis.report.figures_in", lambda *_: {})
    server = serve(results, 0)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    port = server.server_port
    counts: dict[str, list[int]] = {}

    def saw(name: str, count: int) -> None:
        counts.setdefault(name, []).append(count)

    def sql() -> None:
        ((rows, distinct),) = run_sql(results, COUNT)[0].rows
        assert rows == distinct
        saw("sql", rows)

    def board() -> None:
        found = load(results, Asked()).board
        assert found.warnings == []
        saw("board", found.completeness.ok)

    def notebook() -> None:
        saw("notebook", int(Results(results).board().lines()["num_shown"].sum()))

    def page() -> None:
        text = write_report(results, tmp_path / "report.html", Asked()).read_text()
        saw("page", int(text.partition("planned: ")[2].partition(" ok")[0]))

    def rows() -> None:
        found = ask(port, "/rows")
        assert "error" not in found
        saw("rows", found["total"])

    def status() -> None:
        saw("status", ask(port, "/status")["ended"])

    context = multiprocessing.get_context("fork")
    stop, told = context.Event(), context.Queue()
    writer = context.Process(target=keep_writing, args=(results, stop, told))
    writer.start()
    readers: tuple[Callable[[], None], ...] = (sql, board, notebook, rows, status, page)
    try:
        deadline = time.monotonic() + seconds
        for read in itertools.cycle(readers):
            read()
            if time.monotonic() > deadline and len(counts) == len(readers):
                break
    finally:
        stop.set()
        written = told.get(timeout=60)
        writer.join()
        server.shutdown()
        server.server_close()
        serving.join()
    assert writer.exitcode == 0
    for name, seen in counts.items():
        assert seen == sorted(seen), name
    assert written >= 20, "what is read was put together meanwhile"
    for read in (sql, board, notebook):
        read()
    assert {counts[name][-1] for name in ("sql", "board", "notebook")} == {written}
    assert run_sql(results, "SELECT count(*) FROM samples")[0].rows == [(2 * written,)]
