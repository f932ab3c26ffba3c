"""The board: how soon it answers on a small results directory, and on 10,000 cells.

Start-up is a process of its own, from the call of `grid leaderboard` to its exit; the least of
several calls, since other processes only ever add to it. The rows are made up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, Figures, Seconds, child, grid, timed
from grid.schema.columns import CELL
from grid.schema.writing import write_columns, write_grid

SETS = ("report", "shifted")
RANKS = (1, 3, 5, 10)
METRICS = (
    *(f"clean_top{k}" for k in RANKS),
    *(f"asr_top{k}" for k in RANKS),
    *(f"target_rate_top{k}" for k in RANKS),
    "r_acc",
)
N = 2000
CELLS_PER_FILE = 500
DEFENSES = ("none", "finetune", "cleanclip", "roclip", "oracle_filter")

# A process that says which heavy modules a board has imported.
HEAVY = """
import sys
from grid.cli import main
try:
    main(["leaderboard", sys.argv[1]])
except SystemExit:
    pass
print(",".join(sorted({"torch", "ray", "open_clip"} & set(sys.modules))), file=sys.stderr)
"""


def made_cells(num_cells: int) -> list[dict[str, Any]]:
    """Cells as a plan would describe them: labels x rates x defenses x five seeds."""
    seeds, rates = range(5), ("0", "0.003", "0.01", "0.03")
    per_attack = len(seeds) * len(rates) * len(DEFENSES)
    attacks = [f"attack-{number}" for number in range(-(-num_cells // per_attack))]
    squares = list(product(attacks, rates, DEFENSES, seeds))[:num_cells]
    return [
        {
            **{"cell": f"cell-{index:016x}", "track": "multimodal", "regime": "F"},
            "label": f"{attack}/{rate}/{defense}/s{seed}",
            **{"attack": attack, "rate": float(rate), "rate_text": rate},
            **{"count": round(float(rate) * 10_000), "defense": defense, "needs": ["victim"]},
            **{"phase": "finetuning", "fidelity": "exact", "is_control": "oracle" in defense},
            **{"victim_seed": seed, "defense_seed": 0, "model": "tiny-32", "target": "circle"},
        }
        for index, (attack, rate, defense, seed) in enumerate(squares)
    ]


def write_results(
    out: Path, name: str, digest: str, cells: Sequence[Mapping[str, Any]], rows_per_cell: int
) -> int:
    """Results of a finished grid with these cells; returns the number of rows."""
    write_grid(out, name, digest, cells)
    pairs = [("", "cell"), *product(SETS, METRICS)]
    # More rows than one run writes: the older ones of cells that were run again.
    width = min(rows_per_cell, len(pairs))
    for _ in range(max(1, round(rows_per_cell / width))):
        for start in range(0, len(cells), CELLS_PER_FILE):
            _write_file(out, name, digest, cells[start : start + CELLS_PER_FILE], pairs[:width])
    return len(cells) * width * max(1, round(rows_per_cell / width))


def _write_file(
    out: Path,
    name: str,
    digest: str,
    cells: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[str, str]],
) -> None:
    width, rng = len(pairs), np.random.default_rng(len(cells))
    successes = rng.integers(0, N, len(cells) * width)
    measured = [metric != "cell" for _ in cells for _, metric in pairs]

    def where(values: Any) -> list[Any]:
        return [v if m else None for v, m in zip(values.tolist(), measured, strict=True)]

    columns = {c.name: [cell[c.name] for cell in cells for _ in pairs] for c in CELL}
    columns |= {
        "eval_set": [eval_set for _ in cells for eval_set, _ in pairs],
        "metric": [metric for _ in cells for _, metric in pairs],
        "value": where(successes / N),
        "n": [N if m else None for m in measured],
        "successes": where(successes),
        "low": where(np.maximum(0, successes / N - 0.01)),
        "high": where(np.minimum(1, successes / N + 0.01)),
        "clean_victim": where(successes / (2 * N)),
    }
    same = {"grid": name, "grid_hash": digest, "added_later": False, "status": "ok"}
    same |= {"attack_params": "{}", "defense_params": "{}", "num_rows": 10_000, "attempts": 1}
    same |= {"victim_seconds": 12.0, "cost_seconds": 3.0, "relative_cost": 0.25, "threads": 1}
    write_columns(out, "rows", {**columns, **same}, len(measured))


def _least(calls: int, *arguments: str) -> Seconds:
    """Seconds of the quickest of some calls of `grid`, on each clock."""
    found = [grid(*arguments).seconds for _ in range(calls)]
    return Seconds(min(s.wall for s in found), min(s.cpu for s in found))


def _load(out: Path, calls: int) -> float:
    """Seconds to open results and make a board, with everything imported; the least of some."""
    from analysis.board import load_board

    return min(timed(lambda: load_board(out)).wall for _ in range(calls))


def _tiers(out: Path) -> float:
    """Seconds from open results to tiers with all their draws."""
    from analysis.matrix import load_matrix
    from analysis.reader import read_tables
    from analysis.resample import DRAWS
    from analysis.standing import standings

    def make() -> None:
        matrix = read_tables(out, load_matrix)
        assert matrix is not None
        standings(matrix, draws=DRAWS)

    return timed(make).wall


def _boards(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Path]]:
    for name, (num_cells, rows_per_cell) in sizes.items():
        out = folder / name.replace(" ", "-")
        write_results(out, "made", "0" * 12, made_cells(num_cells), rows_per_cell)
        yield name, out


def main(*, quick: bool = False, num_cells: int = 10_000, calls: int = 7) -> Figures:
    """Start-up, and boards over ``num_cells`` cells with the rows of one run and of four."""
    if quick:
        num_cells, calls = min(num_cells, 1000), min(calls, 3)
    run_rows = 1 + len(SETS) * len(METRICS)
    sizes = {"a small grid": (20, run_rows), "many cells": (num_cells, run_rows)}
    sizes["many rows"] = (num_cells, 4 * run_rows)
    figures: Figures = {"cells": Figure(value=num_cells, unit="cells")}
    with tempfile.TemporaryDirectory() as scratch:
        for name, out in _boards(Path(scratch), sizes):
            small = name == "a small grid"
            if small:
                heavy = child("-c", HEAVY, str(out)).err.split()
                figures["heavy modules imported"] = Figure(
                    value=len(heavy), unit="modules", at_most=0
                )
            took = _least(calls if small else min(calls, 3), "leaderboard", str(out))
            figures[f"grid leaderboard, {name}"] = Figure(
                value=took.wall, unit="s", at_most=0.7 if small else None
            )
            figures[f"grid leaderboard, {name}, cpu"] = Figure(value=took.cpu, unit="s")
            if not small:
                rows = sizes[name][0] * sizes[name][1]
                figures[f"rows, {name}"] = Figure(value=rows, unit="rows")
                figures[f"board in process, {name}"] = Figure(
                    value=_load(out, calls), unit="s", at_most=1.0
                )
                figures[f"tiers, 10,000 draws, {name}"] = Figure(
                    value=_tiers(out), unit="s", at_most=5.0
                )
    return figures
