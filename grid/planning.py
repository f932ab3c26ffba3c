"""From a grid to a plan: cells, the stages they need, shared prefixes merged. Nothing runs here."""

from __future__ import annotations

from attacks.base import Track
from defenses.base import Need, Regime
from defenses.controls import NoDefense
from grid.builder import Builder
from grid.plan import CellPlan, GateCheck, Group, Plan
from grid.spec import Cell, Grid
from victims.corpora import Reader
from victims.keys import content_key


def make_plan(grid: Grid) -> Plan:
    """Every cell with its stages and its gate; impossible cells apart, with their reasons."""
    build = Builder(grid)
    plan = Plan(grid, [], [], {}, start=build.start())
    members: dict[Group, dict[int, Cell]] = {}
    cells = grid.cells()
    for cell in cells:
        if cell.not_applicable is None:
            group = (cell.attack.label, cell.rate, cell.target)
            members.setdefault(group, {})[cell.seed] = cell
    for group, by_seed in members.items():
        first = next(iter(by_seed.values()))
        if first.count == 0:
            continue
        plan.gates[group] = GateCheck(
            group,
            tuple(build.gate(cell, cell.count) for cell in by_seed.values()),
            tuple(build.gate(cell, 0) for cell in by_seed.values()),
            tuple(m for cell in by_seed.values() if (m := build.init(cell, Reader.TUNING))),
            is_reference=first.rate == grid.gate_rate(first.attack),
        )
    for cell in cells:
        reason = cell.not_applicable or _impossible(grid, cell)
        if reason is not None:
            plan.refused.append((cell, reason))
            continue
        plan.cells.append(_plan_cell(build, plan, cell))
    for stage in plan.everything():
        plan.add(stage)
    return plan


def _plan_cell(build: Builder, plan: Plan, cell: Cell) -> CellPlan:
    group = (cell.attack.label, cell.rate, cell.target)
    undefended = isinstance(cell.defense.method, NoDefense)
    measure = build.measure(cell, cell.count, None if undefended else cell.defense)
    clean, init = build.beside(cell)
    gate = plan.gates.get(group)
    others = [clean.key, *([init.key] if init else [])]
    needs = cell.defense.method.needed()
    about = {
        "attack": cell.attack.label,
        "defense": cell.defense.label,
        "rate": cell.rate,
        "seeds": [cell.seed, cell.defense_seed],
        "gate": build.gate_of(cell.attack),
    }
    return CellPlan(
        cell=cell,
        key=content_key("cell", about, [measure.key, *others], build.checks(gate) if gate else ()),
        victim=build.victim(cell, cell.count),
        measure=measure,
        clean_victim=clean,
        init_model=init,
        group=group,
        gated=bool(
            gate
            and gate.is_reference
            and not undefended
            and needs & {Need.VICTIM, Need.SUSPECT_DATA}
        ),
    )


def _impossible(grid: Grid, cell: Cell) -> str | None:
    needs = cell.defense.method.needed()
    if Need.REFERENCE in needs and grid.regime is Regime.S and cell.defense.guide is None:
        if grid.track is Track.SUPERVISED:
            return f"{cell.defense.label} asks a judge: give `guides`, or recipes.reference"
        return f"{cell.defense.label} needs a reference model; regime S has none"
    return None
