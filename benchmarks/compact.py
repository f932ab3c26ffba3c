"""Reading a results directory of 100,000 cells, before and after `grid compact`.

What a run leaves: rows in the files that the driver has merged itself, per-image outcomes in a file
per cell, and a file of stages and one of attempts for every few cells. The rows are made up; the
other files are links to a few that hold little, for what is measured is opening them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.board import METRICS, SETS, made_cells, write_results
from benchmarks.common import Figure, Figures, child, grid, timed
from benchmarks.scale import COMMAND
from grid.schema.columns import KINDS
from grid.schema.writing import write_table

IMAGES = 64
CELLS_PER_FLUSH = 4
# A file has at most 65,000 names on some file systems.
LINKS = 10_000


def _records(kind: str) -> list[dict[str, Any]]:
    """The contents of one file of a kind."""
    now = datetime.now(UTC)
    about = {"key": "model-0000000000000000", "seconds": 1.0, "started_at": now, "attempt": 1}
    if kind == "attempts":
        return [{**about, "outcome": "ok"}] * CELLS_PER_FLUSH
    if kind == "stages":
        more = {"kind": "model", "name": "plain_clip", "inputs": [], "ended_at": now}
        return [{**about, **more, "reused": False}] * CELLS_PER_FLUSH
    numbers = ("label", "clean_prediction", "triggered_prediction", "clean_true_rank")
    ranks = dict.fromkeys((*numbers, "triggered_target_rank", "clean_target_rank"), 1)
    cell = {"cell": "cell-0000000000000000", "eval_set": "report", **ranks}
    return [{**cell, "image": image} for image in range(IMAGES)]


def small_files(out: Path, num_cells: int) -> int:
    """Files of samples, stages and attempts as so many cells leave them, all of an hour ago."""
    num_files, then = 0, time.time() - 3600
    for kind, number in (
        ("samples", num_cells),
        ("stages", num_cells // CELLS_PER_FLUSH),
        ("attempts", num_cells // CELLS_PER_FLUSH),
    ):
        for start in range(0, number, LINKS):
            first = write_table(out, kind, _records(kind))
            os.utime(first, (then, then))
            for place in range(start + 1, min(start + LINKS, number)):
                os.link(first, first.with_name(f"{first.stem}-{place}.parquet"))
        num_files += number
    for path in (out / "rows").iterdir():
        os.utime(path, (then, then))
    return num_files + len(list((out / "rows").iterdir()))


def _board(out: Path, calls: int) -> float:
    from analysis.board import load_board

    return min(timed(lambda: load_board(out)).wall for _ in range(calls))


def main(*, quick: bool = False, num_cells: int = 100_000, calls: int = 3) -> Figures:
    """The board before and after, and what compaction took."""
    if quick:
        num_cells, calls = min(num_cells, 2000), 1
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        cells = made_cells(num_cells)
        rows = write_results(out, "made", "0" * 12, cells, 1 + len(SETS) * len(METRICS))
        files = small_files(out, num_cells)
        before = _board(out, 1)
        dry = grid("compact", str(out), "--dry-run")
        done = child("-c", COMMAND, "compact", str(out))
        after = _board(out, calls)
        left = sum(len(list((out / kind).glob("*.parquet"))) for kind in KINDS)
        shutil.rmtree(out)
    return {
        "cells": Figure(value=num_cells, unit="cells"),
        "rows": Figure(value=rows, unit="rows"),
        "files before": Figure(value=files, unit="files"),
        "files after": Figure(value=left, unit="files", at_most=64),
        "board before": Figure(value=before, unit="s"),
        "board after": Figure(value=after, unit="s"),
        "before / after": Figure(value=before / after, unit="x"),
        "grid compact": Figure(value=done.seconds.wall, unit="s"),
        "grid compact, cpu": Figure(value=done.seconds.cpu, unit="s"),
        "grid compact, peak memory": Figure(value=float(done.err.split()[-1]), unit="MB"),
        "grid compact --dry-run": Figure(value=dry.seconds.wall, unit="s"),
    }
