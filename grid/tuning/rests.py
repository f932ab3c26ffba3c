"""What the trials of a campaign rest on, as ``chains.json``: for whoever looks after the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid.chains import listed, write_parts
from grid.spec import Cell, Grid
from grid.stages import Stage
from grid.tuning.scenes import inputs
from victims.keys import Key


class Rests:
    """Cells of trials, and all stages that they are made from."""

    def __init__(self, out: Path, grid: Grid, store: str) -> None:
        self.out, self.grid, self.store = out, grid, store
        self.stages: dict[Key, Stage] = {}
        self.cells: list[dict[str, Any]] = []

    def add(self, about: str, cell: Cell, stages: Sequence[Stage]) -> None:
        """One cell, by the measurements of it: its own first."""
        for stage in stages:
            inputs(stage, self.stages)
        keys = [stage.key for stage in stages]
        self.cells.append(listed(cell, keys[0], keys, None, about))

    def write(self) -> None:
        write_parts(self.out, self.grid, self.store, self.stages, (), self.cells)
