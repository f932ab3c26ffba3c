"""The grid against a loop of one process per cell, and what a stage costs that does nothing.

The loop is the field's practice: every cell is a process that trains its victim, defends and
measures. It is given the best of it: the corpora and the public model are there, a process makes
its own cell's chain and no control beside it, and two run at a time, one per core, on one thread
each. Then the same where victims were saved before, whose training nobody counts. The grid starts
from the same stores and does all that it always does, Ray's start and the gates included.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

from benchmarks.common import Figure, Figures, child, grid
from benchmarks.overhead import FINE
from grid.cluster.executor import RayExecutor
from grid.execution import Execution
from grid.executors import Executor, SerialExecutor
from grid.gridfile import load_grid
from grid.plan import CellPlan, Plan, finished
from grid.planning import make_plan
from grid.stages import Bench, Stage
from grid.work import Ended, execute
from victims.keys import Key, content_key
from victims.recipe import Runtime
from victims.store import Store

PROCESSES = 2


@dataclass(frozen=True)
class Nothing:
    """A stage that publishes an artefact of a few bytes."""

    number: int
    kind: ClassVar[str] = "corpus"
    family: ClassVar[str] = "nothing"
    inputs: ClassVar[Sequence[Key]] = ()
    work: ClassVar[float] = 0.0

    @property
    def key(self) -> Key:
        return content_key("corpus", ["nothing", self.number])

    def run(self, bench: Bench) -> None:
        def make(scratch: Path) -> dict[str, int]:
            (scratch / "number.txt").write_text(str(self.number))
            return {}

        bench.memo(self.key, make)


def seconds_per_stage(executor: Executor, first: int, count: int, width: int) -> float:
    """Wall seconds for each of ``count`` empty stages, ``width`` of them submitted at a time."""
    left, started = list(range(first, first + count)), time.perf_counter()
    while left or executor.running:
        while left and executor.running < width:
            executor.submit(Nothing(left.pop()))
        for outcome in executor.poll(0.5):
            if outcome.ended is not Ended.OK:
                raise RuntimeError(f"an empty stage ended as {outcome.ended}: {outcome.message}")
    return (time.perf_counter() - started) / count


def fixed_costs(folder: Path, count: int, *, ray: bool = True) -> Figures:
    """What every stage costs beside its work."""
    store, runtime, figures = str(folder / "empty"), Runtime(device="cpu"), Figures()
    kinds: dict[str, Callable[..., Executor]] = {"serial": SerialExecutor}
    if ray:
        kinds["ray"] = RayExecutor
    for name, kind in kinds.items():
        first = 10 * count * list(kinds).index(name)
        executor = kind(Execution(lanes=PROCESSES), store, runtime, "")
        try:
            cold = seconds_per_stage(executor, first, 1, 1)
            figures[f"{name}: first stage"] = Figure(value=cold, unit="s")
            executor.warm()
            for width in sorted({1, executor.lanes}):
                first += count
                warm = seconds_per_stage(executor, first, count, width)
                said = f"{name}: a warm stage, {width} at a time"
                figures[said] = Figure(value=1000 * warm, unit="ms")
        finally:
            executor.close()
    return figures


def make_stages(store: Store, stages: Sequence[Stage]) -> None:
    for stage in stages:
        done = execute(stage, store.uri, Runtime(device="cpu"), "")
        if done.ended is not Ended.OK:
            raise RuntimeError(f"{stage.key}: {done.message}")


def make_cell(file: str, label: str, store_path: str) -> None:
    """What a script of the field does: this cell's victim, its defense and its measurement."""
    plan, store = make_plan(load_grid(file)), Store(store_path)
    cell = next(cell for cell in plan.cells if cell.cell.label == label)
    make_stages(store, list(plan.missing([cell.measure], finished(store, plan)).values()))


def prepare(plan: Plan, folder: Path) -> dict[str, Path]:
    """Two stores: with the corpora and the public model; with the victims as well."""
    public, saved = folder / "public", folder / "saved"
    models = [c.victim.init for c in plan.cells[:1] if c.victim.init]
    corpora = [stage for stage in plan.stages.values() if stage.kind == "corpus"]
    todo = plan.missing([*corpora, *models], set())
    make_stages(Store(public), list(todo.values()))
    shutil.copytree(public, saved)
    victims = plan.missing([cell.victim for cell in plan.cells], set(todo))
    make_stages(Store(saved), list(victims.values()))
    return {"own victims": public, "saved victims": saved}


def loop_seconds(file: Path, cells: Sequence[CellPlan], store: Path, folder: Path) -> float:
    """Seconds per cell of the loop. A process never finds what another has made."""
    stores = [folder / f"loop-{number}" for number in range(len(cells))]
    for one in stores:
        shutil.copytree(store, one)
    started = time.perf_counter()
    with ThreadPoolExecutor(PROCESSES) as pool:
        arguments = [
            ("-m", "benchmarks.practice", str(file), cell.cell.label, str(one))
            for cell, one in zip(cells, stores, strict=True)
        ]
        list(pool.map(lambda words: child(*words), arguments))
    took = time.perf_counter() - started
    for one in stores:
        shutil.rmtree(one)
    return took / len(cells)


def grid_seconds(file: Path, num_cells: int, store: Path, folder: Path, executor: str) -> float:
    """Seconds per cell of the whole grid, from a copy of a store, by one command."""
    own, out = folder / "own", folder / "out"
    shutil.copytree(store, own)
    places = ("--out", str(out), "--store", str(own), "--executor", executor)
    took = grid("run", str(file), *places, expect=FINE).seconds.wall
    shutil.rmtree(own)
    shutil.rmtree(out)
    return took / num_cells


def main(
    *,
    quick: bool = False,
    name: str = "demo",
    sample: int = 12,
    rounds: int = 1,
    count: int = 200,
    executor: str = "ray",
) -> Figures:
    """Cells per hour of the grid and of the loops; ``sample`` cells stand for all in a loop."""
    if quick and name == "demo":
        name, sample, count = "smoke", 4, 20
    source = load_grid(name)
    plan = make_plan(source)
    step = max(1, len(plan.cells) // sample)
    cells = plan.cells[step // 2 :: step][:sample]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "grid.yaml"
        file.write_text(source.text, "utf-8")
        figures = fixed_costs(folder, count, ray=executor == "ray")
        figures["cells"] = Figure(value=len(plan.cells), unit="cells")
        figures["cells of a loop"] = Figure(value=len(cells), unit="cells")
        for about, store in prepare(plan, folder).items():
            loop = median(loop_seconds(file, cells, store, folder) for _ in range(rounds))
            ours = median(
                grid_seconds(file, len(plan.cells), store, folder, executor) for _ in range(rounds)
            )
            figures[f"loop, {about}"] = Figure(value=3600 / loop, unit="cells/h")
            figures[f"grid, {about}"] = Figure(value=3600 / ours, unit="cells/h")
            figures[f"grid / loop, {about}"] = Figure(value=loop / ours, unit="x", at_least=1.0)
    return figures


if __name__ == "__main__":
    make_cell(*sys.argv[1:4])
