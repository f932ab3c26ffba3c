"""Cells that a run would skip, as the gates in a store already say."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from grid.plan import Plan
from grid.results import judge
from grid.start_gate import judge_start
from victims.errors import GridError
from victims.keys import Key
from victims.store import Store


def barred_cells(plan: Plan, store: Store, done: Collection[Key]) -> set[Key]:
    """The cells behind gates whose measurements the store holds and that do not pass."""
    required = plan.grid.gate.reference
    if plan.start is not None and required is not None and plan.start.key in done:
        with contextlib.suppress(GridError):  # damaged: measured again, and judged then
            if not judge_start(store, plan.start, required).passes:
                return {cell.key for cell in plan.cells}
    failed = set()
    for group in dict.fromkeys(cell.group for cell in plan.cells if cell.gated):
        gate = plan.gates[group]
        if all(stage.key in done for stage in gate.stages):
            with contextlib.suppress(GridError):
                if not judge(store, gate, plan.grid.gate).passes:
                    failed.add(group)
    return {cell.key for cell in plan.cells if cell.gated and cell.group in failed}
