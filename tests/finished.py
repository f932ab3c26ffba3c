"""A finished run of the tiny grid, which tests look at, copy, and never change."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from grid.spec import Grid
from tests.grids import run_serial, tiny_grid


@dataclass(frozen=True)
class Finished:
    """Its grid file, results and store."""

    grid: Grid
    file: Path
    out: Path
    store: Path

    def copy(self, folder: Path) -> Finished:
        """The same elsewhere, to be spoiled."""
        shutil.copytree(self.out, folder / "out")
        shutil.copytree(self.store, folder / "store")
        chains = json.loads((folder / "out" / "chains.json").read_text())
        body = json.dumps({**chains, "store": str(folder / "store")})
        (folder / "out" / "chains.json").write_text(body)
        return Finished(self.grid, self.file, folder / "out", folder / "store")

    @property
    def places(self) -> tuple[object, ...]:
        return ("--out", self.out, "--store", self.store)


def finish(folder: Path) -> Finished:
    """Run the tiny grid on the serial executor."""
    grid = tiny_grid(folder)
    run_serial(grid, folder / "out", folder / "store")
    return Finished(grid, folder / "tiny.yaml", folder / "out", folder / "store")
