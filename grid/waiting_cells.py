"""Cells that are measured and have no outcome yet: what they wait for, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from grid.plan import CellPlan, Plan
from grid.quick import SETTLED
from grid.schema.status import Status
from victims.keys import Key


def waiting_cells(
    plan: Plan, done: Collection[Key], status: Mapping[str, str]
) -> Iterator[tuple[CellPlan, str]]:
    """The cells without an outcome whose measurements are all there, and why they have none.

    A number that is not judged enters no board, but nobody should think that it was never measured.
    """
    seeds: dict[tuple[str, str, int], dict[int, None]] = {}
    for cell in plan.cells:
        seeds.setdefault(cell.group, {})[cell.cell.seed] = None
    for cell in plan.cells:
        if status.get(cell.key) in (*SETTLED, Status.CANCELLED):
            continue
        if all(stage.key in done for stage in cell.stages):
            yield cell, _words(plan, cell, tuple(seeds[cell.group]), done)


def _words(plan: Plan, cell: CellPlan, seeds: tuple[int, ...], done: Collection[Key]) -> str:
    gate = plan.gates.get(cell.group)
    if gate is None or all(stage.key in done for stage in gate.stages):
        return "measured; its outcome comes with the next run that takes it up, without new work"
    lists = [stages for stages in (gate.victims, gate.clean, gate.init) if stages]
    absent = [
        str(seed)
        for seed, *stages in zip(seeds, *lists, strict=False)
        if any(stage.key not in done for stage in stages)
    ]
    if not absent:
        return "measured; waits for the gate, which is not judged yet"
    who = "the victim of seed" if len(absent) == 1 else "the victims of seeds"
    verb = "is" if len(absent) == 1 else "are"
    return (
        f"measured; waits for the gate, which judges all seeds together: {who}"
        f" {', '.join(absent)} {verb} not there yet"
    )
