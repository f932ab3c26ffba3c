"""On a machine that has GPUs: the tiny grid on them, shared and in groups, against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grid.gridfile import load_grid
from grid.run import run_grid
from tests.grids import numbers, outcomes, records, run_serial, tiny_grid, write_grid_file

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not GPUS, reason="no GPU here"),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    run_serial(tiny_grid(folder), folder / "out", folder / "store")
    return folder / "out"


def shares(out: Path) -> dict[tuple[str, str, str], float]:
    return {place: row["value"] for place, row in numbers(out).items() if row["value"] is not None}


@pytest.mark.parametrize(
    "on",
    [
        "shared-gpu",
        "gpu",
        pytest.param(
            "four-gpus", marks=pytest.mark.skipif(GPUS < 4, reason="fewer than four GPUs")
        ),
    ],
)
def test_a_grid_on_gpus_says_what_it_says_on_the_cpu(
    on: str, on_cpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit of two steps differs by rounding: a picture or two of 32 may fall otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    grid = load_grid(str(write_grid_file(tmp_path)), on=on)
    said: list[str] = []
    run_grid(grid, tmp_path / "out", str(tmp_path / "store"), say=said.append)
    assert {row["status"] for row in outcomes(tmp_path / "out").values()} == {"ok"}, said
    ran: dict[str, set[Any]] = {}
    for record in records(tmp_path / "out", "stages"):
        ran.setdefault(record["kind"], set()).add(record["device"])
    assert ran["corpus"] == {"cpu"}
    assert all("cpu" not in ran[kind] for kind in ("model", "defended", "measure"))
    mine, theirs = shares(tmp_path / "out"), shares(on_cpu)
    assert mine.keys() == theirs.keys()
    for place, share in theirs.items():
        if place[-1] in ("clean_top1", "asr_top1"):
            assert mine[place] == pytest.approx(share, abs=0.1), place
