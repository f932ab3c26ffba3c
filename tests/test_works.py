"""An undefended attack really works on the embedded world, at the demo's own scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grid.gridfile import load_grid
from grid.plan import Builder, parents
from grid.results import read_measure
from grid.stages import MeasureStage, Stage
from grid.work import Ended, execute
from victims.corpora import Reader
from victims.recipe import Runtime
from victims.store import Store


def make(store: Store, stage: Stage) -> None:
    if stage.key not in store:
        for parent in parents(stage):
            make(store, parent)
        done = execute(stage, store.uri, Runtime(), "")
        assert done.ended is Ended.OK, done.message


def numbers(store: Store, stage: MeasureStage) -> dict[str, Any]:
    make(store, stage)
    found: dict[str, Any] = read_measure(store, stage)["sets"]["tuning"]["metrics"]
    return found


@pytest.mark.slow
def test_a_victim_of_the_demo_is_attacked_and_still_sees(tmp_path: Path) -> None:
    """On the tuning split, and beside the public model: the same stamps, no backdoor."""
    grid, store = load_grid("demo"), Store(tmp_path)
    build = Builder(grid)
    cell = next(c for c in grid.cells() if c.count)
    init = build.init(cell, Reader.TUNING)
    assert init is not None
    victim, before = numbers(store, build.gate(cell, cell.count)), numbers(store, init)
    assert cell.attack.label == "badnet"
    assert victim["asr_top1"]["value"] > 0.80
    assert victim["clean_top1"]["value"] > 0.85
    assert before["asr_top1"]["value"] < 0.10
    assert before["clean_top1"]["value"] > 0.85
    assert victim["r_acc"]["value"] < before["r_acc"]["value"]
