"""Planning 10,000 cells, and running a grid of 10,000 finished cells again.

The grid file varies attacks and defenses under labels of their own. Planning is timed in a fresh
process after its imports. The finished rows are made up for exactly the cells of the plan, so the
commands find what a real run would have left.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.board import METRICS, SETS, write_results
from benchmarks.common import Figure, Figures, Process, child, grid
from grid.quick import remember
from grid.registry import grid_source

# Imports, then the plan, on both clocks; peak memory before and after, in MB (0 but on Linux).
PLANNER = """
import json, sys, time
from pathlib import Path
def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] / 1024 if found else 0.0
from grid.gridfile import load_grid
from grid.history import History
from grid.plan_summary import summary
from grid.planning import make_plan
from grid.room import on_lanes
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
plan = make_plan(load_grid(sys.argv[1]))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
told = time.process_time()
summary(plan, set(), History(None), on_lanes(plan.grid.execution, 2))
told = time.process_time() - told
print(json.dumps({"wall": wall, "cpu": cpu, "summary": told, "cells": len(plan.cells),
                  "stages": len(plan.stages), "peak": peak(), "more": peak() - before}))
"""


def grid_text(attacks: int, rates: int, seeds: int, defenses: int) -> str:
    """A grid file of attacks x rates x seeds x defenses cells."""
    listed = [f"badnet: {{as: badnet-{i}, patch: {4 + i}, cell: 2}}" for i in range(attacks)]
    defended = [
        f"cleanclip: {{as: cleanclip-{i}, recipe: {{lr: {(i + 1) / 10_000}}}}}"
        for i in range(defenses - 1)
    ]
    shares = [f"{number / 1000:g}" for number in range(rates)]
    lines = [
        "data: {world: {size: 32, public: 10000, suspect: 10000}}",
        f"rates: [{', '.join(shares)}]",
        f"seeds: [{', '.join(map(str, range(seeds)))}]",
        *("attacks:", *(f"  - {attack}" for attack in listed)),
        *("defenses:", "  - none", *(f"  - {defense}" for defense in defended)),
        "recipes:",
        *(
            f"  {stage}: {{epochs: 4, batch_size: 64, lr: 5.0e-3}}"
            for stage in ("reference", "victim", "repair")
        ),
        "execution: {device: cpu}",
    ]
    return "\n".join(lines) + "\n"


def finish(file: Path, out: Path) -> int:
    """Write what a finished run of the grid leaves in ``out``; returns the number of rows."""
    from grid.gridfile import load_grid
    from grid.planning import make_plan
    from grid.results import planned_cells

    plan = make_plan(load_grid(str(file)))
    width = 1 + len(SETS) * len(METRICS)
    cells = planned_cells(plan)
    rows = write_results(out, plan.grid.name, plan.grid.identity_hash, cells, width)
    remember(grid_source(str(file)), out)
    return rows


def _again(file: Path, out: Path, *verb: str) -> Process:
    """A command about the finished grid, which must not have had to plan or run anything."""
    places = ("--out", str(out), "--store", str(out.with_name("store")))
    for _ in range(3):
        done = grid(*verb, str(file), *places)
        if verb[0] != "run" or "nothing to run" in done.err:
            return done
        # Someone edited the code in between, which makes a remembered plan void.
        remember(grid_source(str(file)), out)
    raise RuntimeError(f"grid {' '.join(verb)} did not find the grid finished:\n{done.err}")


def main(
    *,
    quick: bool = False,
    attacks: int = 10,
    rates: int = 4,
    seeds: int = 10,
    defenses: int = 25,
    calls: int = 3,
) -> Figures:
    """Seconds and memory of a plan, and of commands about the same grid finished."""
    if quick:
        attacks, calls = 1, 1
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch, "many.yaml"), Path(scratch, "out")
        file.write_text(grid_text(attacks, rates, seeds, defenses), "utf-8")
        planned = [json.loads(child("-c", PLANNER, str(file)).out) for _ in range(calls)]
        rows = finish(file, out)
        again = [_again(file, out, "run").seconds for _ in range(calls)]
        _again(file, out, "plan")
        asked = [_again(file, out, "plan").seconds for _ in range(calls)]
        checked = [_again(file, out, "check").seconds for _ in range(calls)]

    def middle(name: str) -> float:
        return statistics.median(float(found[name]) for found in planned)

    return {
        "cells": Figure(value=planned[0]["cells"], unit="cells"),
        "stages": Figure(value=planned[0]["stages"], unit="stages"),
        "rows": Figure(value=rows, unit="rows"),
        "plan, wall": Figure(value=middle("wall"), unit="s"),
        "plan, cpu": Figure(value=middle("cpu"), unit="s"),
        "its summary, cpu": Figure(value=middle("summary"), unit="s"),
        "peak memory": Figure(value=middle("peak"), unit="MB"),
        "of it for the plan": Figure(value=middle("more"), unit="MB"),
        "grid run, finished": Figure(
            value=statistics.median(s.wall for s in again), unit="s", at_most=5.0
        ),
        "grid run, finished, cpu": Figure(value=statistics.median(s.cpu for s in again), unit="s"),
        "grid plan, finished": Figure(value=statistics.median(s.wall for s in asked), unit="s"),
        "grid check, finished": Figure(value=statistics.median(s.wall for s in checked), unit="s"),
    }
