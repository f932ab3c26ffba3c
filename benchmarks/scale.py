"""Planning about 100,000 cells, and asking about them, each in a process of its own.

The grid file crosses attacks with several settings, poison rates, defenses with several settings
and seeds. What is timed is a whole command, from the call of Python to its exit, imports included.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

from benchmarks.board import write_results
from benchmarks.common import Figure, Figures, Process, child
from grid.quick import remember
from grid.registry import grid_source

SECONDS, MEGABYTES = 20.0, 1024.0

# The command ``grid``, and the most memory that it held, in MB (0 but on Linux).
COMMAND = """
import sys
from pathlib import Path
from grid.cli import main
try:
    main(sys.argv[1:])
finally:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    print(found[0] / 1024 if found else 0.0, file=sys.stderr)
"""


def attack_lines(num_settings: int) -> list[str]:
    """Four attacks, each under several settings."""
    families: dict[str, Callable[[int], str]] = {
        "badnet": lambda i: f"patch: {4 + 2 * i}, cell: 2",
        "blended": lambda i: f"alpha: {0.1 + 0.05 * i:.2f}",
        "sig": lambda i: f"delta: {20 + 10 * i}",
        "wanet": lambda i: f"strength: {0.5 + 0.1 * i:.1f}",
    }
    return [
        f"  - {name}: {{as: {name}-{i}, {values(i)}}}"
        for name, values in families.items()
        for i in range(num_settings)
    ]


def defense_lines(num_rates: int) -> list[str]:
    """The undefended victim and some repairs, each with several learning rates."""
    rates = [1e-4 * 2**i for i in range(num_rates)]
    families = ("finetune", "cleanclip", "par", "roclip")
    return [
        "  - none",
        *(
            f"  - {name}: {{as: {name}-{i}, recipe: {{lr: {rate:g}}}}}"
            for name, (i, rate) in product(families, enumerate(rates))
        ),
    ]


def grid_text(settings: int, rates: int, repairs: int, seeds: int) -> str:
    """A grid file of ``4 settings x rates x (4 repairs + 1) x seeds`` cells, a rate of 0 among."""
    recipe = "{epochs: 4, batch_size: 64, lr: 5.0e-3}"
    shares = [f"{i / 500:g}" for i in range(rates)]
    lines = [
        "data: {world: {size: 32, public: 10000, suspect: 10000}}",
        f"rates: [{', '.join(shares)}]",
        f"seeds: [{', '.join(map(str, range(seeds)))}]",
        *("attacks:", *attack_lines(settings)),
        *("defenses:", *defense_lines(repairs)),
        *("recipes:", *(f"  {name}: {recipe}" for name in ("reference", "victim", "repair"))),
        "execution: {device: cpu}",
    ]
    return "\n".join(lines) + "\n"


def told(done: Process) -> dict[str, float]:
    """What a command printed as JSON, its seconds and the most memory that it held."""
    peak = float(done.err.strip().splitlines()[-1])
    found = json.loads(done.out)
    return {**found, "wall": done.seconds.wall, "cpu": done.seconds.cpu, "peak": peak}


def asked(file: Path, verb: str, calls: int, codes: tuple[int, ...] = (0,)) -> dict[str, float]:
    """The answer of `grid VERB` about a grid, with the medians of its clocks and memory."""
    places = ("--out", str(file.with_name("out")), "--store", str(file.with_name("store")))
    said = [
        told(child("-c", COMMAND, verb, str(file), "--json", *places, expect=codes))
        for _ in range(calls)
    ]
    middle = {
        name: statistics.median(one[name] for one in said) for name in ("wall", "cpu", "peak")
    }
    return {**said[-1], **middle}


def finish(file: Path) -> int:
    """Rows as a run of the whole grid would have left them, one for each cell's outcome."""
    from grid.gridfile import load_grid
    from grid.planning import make_plan
    from grid.results import planned_cells

    plan, out = make_plan(load_grid(str(file))), file.with_name("out")
    cells = planned_cells(plan)
    rows = write_results(out, plan.grid.name, plan.grid.identity_hash, cells, 1)
    remember(grid_source(str(file)), out)
    return rows


def main(
    *,
    quick: bool = False,
    settings: int = 10,
    rates: int = 5,
    repairs: int = 6,
    seeds: int = 20,
    calls: int = 1,
) -> Figures:
    """`grid plan` of the whole grid, then `grid plan` and `grid check` of the same one finished."""
    if quick:
        settings = 1
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "many.yaml")
        file.write_text(grid_text(settings, rates, repairs, seeds), "utf-8")
        plan = asked(file, "plan", calls)
        finish(file)
        asked(file, "plan", 1)  # keeps its summary
        again, check = asked(file, "plan", calls), asked(file, "check", calls)
    return {
        "cells": Figure(value=plan["cells"], unit="cells"),
        "stages": Figure(value=plan["stages"], unit="stages"),
        "grid plan": Figure(value=plan["wall"], unit="s", at_most=SECONDS),
        "grid plan, cpu": Figure(value=plan["cpu"], unit="s", at_most=SECONDS),
        "grid plan, peak memory": Figure(value=plan["peak"], unit="MB", at_most=MEGABYTES),
        "grid plan, finished": Figure(value=again["wall"], unit="s"),
        "grid plan, finished, peak memory": Figure(value=again["peak"], unit="MB"),
        "grid check, finished": Figure(value=check["wall"], unit="s"),
        "grid check, finished, peak memory": Figure(value=check["peak"], unit="MB"),
    }
