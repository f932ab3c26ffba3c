"""What the grid adds to its stages: wall time over the lower bound of the same run.

    lower bound = max(longest chain of stages, sum of stage seconds / lanes)

Both come from ``run.json``, which a run writes beside its rows; Ray's own start is not counted.
Then the same command again, when nothing is left to do. An argument names another preset or a
grid file: ``python -m benchmarks.overhead smoke``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Figure, Figures, grid, lines

# Complete, or complete but for victims that failed their gate.
FINE = (0, 4)


def main(*, quick: bool = False, name: str = "demo", executor: str = "ray") -> Figures:
    """Run a grid into an empty store and compare."""
    if quick and name == "demo":
        name = "smoke"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        places = ("--out", str(out), "--store", str(Path(scratch, "store")))
        first = grid("run", name, *places, "--executor", executor, expect=FINE)
        ran = json.loads((out / "run.json").read_text("utf-8"))
        again = grid("run", name, *places, "--executor", executor, expect=FINE)
    own = ran["wall_seconds"] - ran["ray_start_seconds"]
    # Short stages cannot hide what starting them costs: the aim is one of minutes-long grids.
    aim = 1.15 if name == "demo" else None
    return {
        "stages run": Figure(value=ran["stages_run"], unit="stages"),
        "lanes": Figure(value=ran["lanes"], unit="lanes"),
        "the whole command": Figure(value=first.seconds.wall, unit="s"),
        "Ray's start": Figure(value=ran["ray_start_seconds"], unit="s"),
        "wall without Ray's start": Figure(value=own, unit="s"),
        "lower bound": Figure(value=ran["lower_bound_seconds"], unit="s"),
        "wall / lower bound": Figure(value=own / ran["lower_bound_seconds"], unit="x", at_most=aim),
        "the same command again": Figure(value=again.seconds.wall, unit="s", at_most=5.0),
    }


if __name__ == "__main__":
    print("\n".join(lines("overhead", main(name=sys.argv[1] if sys.argv[1:] else "demo"))))
