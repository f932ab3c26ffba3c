"""A grid file of seconds for the tests of the driver, and ways to run it and to read its rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml

from grid.cli import main
from grid.gridfile import load_grid
from grid.run import run_grid
from grid.run_report import RunReport
from grid.spec import Grid

RECIPE = {"epochs": 1, "batch_size": 32, "lr": 2e-3, "warmup_steps": 2}
# Two passes on 64 rows teach nothing: the gate has to let everything through.
OPEN_GATE = {"asr": 0, "lift": -1, "clean_loss": 1}
TINY: Mapping[str, Any] = {
    "name": "tiny",
    "data": {
        "world": {
            "size": 32,
            "public": 64,
            "suspect": 64,
            "clean": 32,
            "tuning": 32,
            "report": 32,
            "shifted": 32,
        }
    },
    "target": "circle",
    "rates": [0, 0.1],
    "seeds": [0],
    "attacks": [{"badnet": {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}}],
    "defenses": ["none", "finetune"],
    "recipes": {"reference": RECIPE, "victim": RECIPE, "repair": RECIPE},
    "gate": {"strong": OPEN_GATE, "medium": OPEN_GATE, "init_loss": 1},
    "execution": {"lanes": 2, "device": "cpu", "threads": 1},
}


def write_grid_file(folder: Path, **changes: Any) -> Path:
    """The tiny grid with other top-level values, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


def tiny_grid(folder: Path, **changes: Any) -> Grid:
    return load_grid(str(write_grid_file(folder, **changes)))


def run_serial(grid: Grid, out: Path, store: Path, **options: Any) -> RunReport:
    return run_grid(grid, out, str(store), executor="serial", say=lambda line: None, **options)


def grid_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "grid.cli", *(str(argument) for argument in arguments)]


def environment(**more: str) -> dict[str, str]:
    """What a subprocess needs; no Ray cluster of anybody else's."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


class Answer(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """``grid`` with these arguments, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return Answer(int(ended.value.code or 0), said.out, said.err)


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    """Every record of a kind in a results directory, oldest first."""
    found: list[dict[str, Any]] = []
    for path in sorted((out / kind).glob("[!.]*.parquet")):
        found.extend(pq.ParquetFile(path).read().to_pylist())
    return sorted(found, key=lambda record: record["written_at"])


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    """``attack/rate/defense/seed`` -> the newest row with the outcome of that cell."""
    rows = [row for row in records(out, "rows") if row["metric"] == "cell"]
    return {f"{r['attack']}/{r['rate_text']}/{r['defense']}/s{r['victim_seed']}": r for r in rows}


# What may differ between two runs of the same grid: when, where, how long, and how often tried.
CIRCUMSTANCE = {
    "written_at",
    "added_later",
    "attempts",
    "reused",
    "cost_seconds",
    "victim_seconds",
    "relative_cost",
    "wall_seconds",
    "commit",
    "detail",
}


def numbers(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Cell, evaluation set and metric -> everything in the newest row that must be the same."""
    return {
        (row["cell"], row["eval_set"], row["metric"]): {
            name: value for name, value in row.items() if name not in CIRCUMSTANCE
        }
        for row in records(out, "rows")
    }
