"""How the demo's learning rates and augmentation were chosen: by clean accuracy alone.

Every candidate repairs (or, for a training-time defense, replaces) the **unpoisoned** victim, and
is scored by its clean accuracy on the tuning split: no trigger, attack or report picture is in
sight. Of the candidates within one standard error of the best the largest learning rate is taken,
or the strongest augmentation. ``python -m benchmarks.choices`` prints the tables.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from grid.builder import Builder
from grid.gridfile import decode_grid
from grid.measure import MeasureStage
from grid.registry import Source, grid_source
from grid.results import read_measure
from grid.stage_order import parents
from grid.stages import Stage
from grid.work import Ended, execute
from victims.corpora import Reader
from victims.recipe import Runtime
from victims.store import Store

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 8e-3)
ROCLIP = (
    (3, 0.9),
    (3, 0.75),
    (3, 0.5),
    (3, 0.08),
    (2, 0.9),
    (2, 0.75),
    (2, 0.5),
    (2, 0.08),
)  # K, smallest crop


def candidates() -> dict[str, list[tuple[str, str]]]:
    """Per family, from the mildest to the strongest: a name and a line of a grid file."""
    return {
        method: [
            (f"lr {lr:g}", f"{method}: {{as: {method}-{lr:g}, recipe: {{lr: {lr}}}}}")
            for lr in LEARNING_RATES
        ]
        for method in ("finetune", "cleanclip")
    } | {
        "roclip": [
            (
                f"K {every}, crop {low:g}",
                f"roclip: {{as: roclip-{every}-{low:g}, every: {every}, crop_scale: [{low}, 1.0]}}",
            )
            for every, low in ROCLIP
        ]
    }


def main(preset: str = "demo", store_path: str | None = None) -> dict[str, str]:
    """The chosen candidate of each family."""
    store = Store(store_path or str(Path("runs") / "store"))
    text = grid_source(preset).text
    head = text[: text.index("defenses:")]
    tail = text[text.index("recipes:") :]
    chosen: dict[str, str] = {}
    for family, options in candidates().items():
        lines = "\n".join(f"  - {line}" for _, line in options)
        body = f"{head}defenses:\n  - none\n{lines}\n\n{tail}"
        grid = decode_grid(Source(preset, f"{preset} (choices)", body))
        builder = Builder(grid)
        cells = [c for c in grid.cells() if not c.count and c.attack is grid.attacks[0]]
        found: list[tuple[str, float, int]] = []
        for (name, _), cell in zip(options, cells[1:], strict=True):
            defended = builder.defended(cell, 0, cell.defense)
            measure = builder.measurement(cell, defended, Reader.TUNING)
            _make(store, measure)
            share = read_measure(store, measure)["sets"]["tuning"]["metrics"]["clean_top1"]
            found.append((name, float(share["value"]), int(share["n"])))
        best = max(found, key=lambda row: row[1])
        error = math.sqrt(best[1] * (1 - best[1]) / best[2])
        chosen[family] = [name for name, value, _ in found if value >= best[1] - error][-1]
        print(f"{family}: clean accuracy on the tuning split, unpoisoned victim")
        for name, value, n in found:
            mark = "  <- chosen" if name == chosen[family] else ""
            print(f"  {name:16} {value:7.2%} of {n}{mark}")
        print(f"  one standard error of the best: {100 * error:.2f} points")
    return chosen


def _make(store: Store, stage: Stage | MeasureStage) -> None:
    if stage.key in store:
        return
    for parent in parents(stage):
        _make(store, parent)
    done: Any = execute(stage, store.uri, Runtime(), "")
    if done.ended is not Ended.OK:
        raise SystemExit(f"{stage.key}: {done.message}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
