"""A plan: the cells of a grid, their stages and their gates.

It says what exists, what must be made, in which order it can be made, and which cells wait for a
gate to pass its victims.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Final

from grid.cautions import lone_seeds, rising_rates
from grid.measure import MeasureStage
from grid.spec import Cell, Grid
from grid.stage_order import parents
from grid.stages import CorpusStage, ModelStage, Stage
from grid.start_gate import StartStage
from grid.unread_words import unread_cautions
from victims.evaluation_sets import EvaluationSet
from victims.ingested import IngestedPairs
from victims.keys import Key
from victims.store import Store

Group = tuple[str, str, int]
_UNASKED: Final = (
    "gate: nothing is asked of the start weights, so that a wrong activation, other class names or"
    " an order of classes would be found in the board alone. gate: {reference: R} asks for their"
    " accuracy first; R is best some points below what is published of them"
)


@dataclass(frozen=True, slots=True)
class CellPlan:
    """A cell, the victim that it stands for and the measurements that its rows are made from."""

    cell: Cell
    key: Key
    victim: ModelStage
    measure: MeasureStage
    clean_victim: MeasureStage
    init_model: MeasureStage | None
    group: Group
    gated: bool

    @property
    def stages(self) -> list[MeasureStage]:
        return [self.measure, self.clean_victim, *([self.init_model] if self.init_model else [])]


@dataclass(frozen=True, slots=True)
class GateCheck:
    """Tuning-split measurements of one attack at one rate: the victims of all seeds, clean
    twins, start weights."""

    group: Group
    victims: tuple[MeasureStage, ...]
    clean: tuple[MeasureStage, ...]
    init: tuple[MeasureStage, ...]
    is_reference: bool

    @property
    def stages(self) -> list[MeasureStage]:
        return [*self.victims, *self.clean, *self.init]


@dataclass(slots=True)
class Plan:
    grid: Grid
    cells: list[CellPlan]
    refused: list[tuple[Cell, str]]
    gates: dict[Group, GateCheck]
    stages: dict[Key, Stage] = field(default_factory=dict)
    # What is asked before any victim is trained, if the grid's gate asks it.
    start: StartStage | None = None

    def add(self, stage: Stage) -> None:
        """The stage and everything it is made from."""
        if stage.key in self.stages:
            return
        self.stages[stage.key] = stage
        for parent in parents(stage):
            self.add(parent)

    def missing(self, wanted: Iterable[Stage], done: set[Key]) -> dict[Key, Stage]:
        """What must run so that every wanted stage exists, inputs first."""
        needed: dict[Key, Stage] = {}

        def visit(stage: Stage) -> None:
            if stage.key in done or stage.key in needed:
                return
            for parent in parents(stage):
                visit(parent)
            needed[stage.key] = stage

        for stage in wanted:
            visit(stage)
        return needed

    def cautions(self) -> list[str]:
        """What the defenses have to say about the grid's rates and data, and those that no cell
        can use."""
        rows, said = self.grid.data.suspect, dict.fromkeys(lone_seeds(self.grid))
        judges = (planned.cell.defense.guide for planned in self.cells)
        for weights in (self.grid.weights, *(judge.weights for judge in judges if judge)):
            said |= dict.fromkeys(weights.notes if weights else ())
        if self.grid.weights and self.grid.gate.reference is None:
            said[_UNASKED] = None
        said |= dict.fromkeys(unread_cautions(self.grid))
        for cell in (planned.cell for planned in self.cells):
            words = cell.defense.method.caution(cell.count / rows, rows)
            if words:
                said[f"{cell.defense.label} at {cell.rate}: {words}"] = None
        for stage in self.stages.values():
            spec = stage.spec if isinstance(stage, CorpusStage) else None
            if isinstance(spec, EvaluationSet | IngestedPairs) and spec.caution:
                said[spec.caution] = None
        said |= dict.fromkeys(rising_rates(self.stages.values()))
        used = {planned.cell.defense.label for planned in self.cells}
        for cell, why in self.refused:
            if cell.defense.label not in used:
                said[f"{cell.defense.label} applies to no cell of this grid: {why}"] = None
        return list(said)

    def everything(self, settled: Container[str] = ()) -> list[Stage]:
        """The measurements of every cell that is not settled, and of its gate."""
        wanted = [cell for cell in self.cells if cell.key not in settled]
        groups = dict.fromkeys(cell.group for cell in wanted if cell.group in self.gates)
        gates = [stage for group in groups for stage in self.gates[group].stages]
        start: list[Stage] = [self.start] if self.start and wanted else []
        return [*start, *gates, *(stage for cell in wanted for stage in cell.stages)]

    def num_victims(self) -> int:
        """Distinct victims: poisoned or clean models that cells are attacked on."""
        return len({cell.victim.key for cell in self.cells})


def chain(plan: Plan, cell: CellPlan) -> dict[Key, Stage]:
    """Every stage that a cell's rows rest on, its gate's included, inputs first."""
    gate = plan.gates.get(cell.group)
    start: list[Stage] = [plan.start] if plan.start else []
    return plan.missing([*start, *(gate.stages if gate else []), *cell.stages], set())


def finished(store: Store, plan: Plan) -> set[Key]:
    """Which of the plan's stages the store holds, by one listing per kind."""
    kinds = {key.rsplit("-", 1)[0] for key in plan.stages}
    held = {key for kind in kinds for key in store.keys(kind)} & set(plan.stages)
    return held
