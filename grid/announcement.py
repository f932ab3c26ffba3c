"""What a results directory says before anything has run: the plan, and what it was made from."""

from __future__ import annotations

import json
from pathlib import Path

from grid.chains import write_chains
from grid.plan import Plan
from grid.registry import SOURCE_FILE, TEXT_FILE
from grid.results import planned_cells
from grid.schema.whole import write_whole
from grid.schema.writing import write_grid
from grid.spec import Grid


def announce(grid: Grid, plan: Plan, out: Path, store: str) -> set[str]:
    """Write what is planned; returns the cells of the grid as it was first run here."""
    name, number = grid.name, grid.identity_hash
    cells, classes = planned_cells(plan), len(grid.data.classes)
    write_grid(out, name, number, cells, classes)
    write_whole(out / TEXT_FILE, grid.text)
    source = grid.source
    place = source if source.startswith("preset ") else str(Path(source).absolute())
    write_whole(out / SOURCE_FILE, json.dumps({"path": place}))
    write_chains(out, plan, store)
    first = first_cells(out)
    if first is None:
        first = {cell.key for cell in plan.cells}
        write_whole(out / "first_cells.json", json.dumps(sorted(first)))
    return first


def first_cells(out: Path) -> set[str] | None:
    """The cells of the grid as it was first run here; None before the first run."""
    try:
        return set(json.loads((out / "first_cells.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
