"""What trials are measured on: victims and their tuning-split measurements, for each of the ways
in which an objective may look at attacks. Keys and stages alone; nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

from grid.builder import Builder
from grid.data import Data
from grid.measure import MeasureStage
from grid.nodes import Raw, Where
from grid.plan import Group, Plan
from grid.planning import make_plan
from grid.registry import Source
from grid.spec import AttackEntry, Cell, DefenseEntry, Grid
from grid.stage_order import parents
from grid.stages import Stage
from grid.tuning.file import entries_of, with_values
from grid.tuning.spec import Campaign, Searched, Sees, Side, Values
from victims.corpora import CorpusSpec, Reader
from victims.errors import UsageError
from victims.ingested import IngestedPairs
from victims.keys import Key, content_key
from victims.parts import CorpusPart


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedData:
    """The defender's clean pairs in two halves: one to be poisoned, one to repair with."""

    of: Data

    @property
    def size(self) -> int:
        return self.of.size

    @property
    def public(self) -> int:
        return self.of.public

    @property
    def suspect(self) -> int:
        return self.rows("suspect")

    def rows(self, split: str) -> int:
        total = self.of.rows("clean")
        halves = {"suspect": total // 2, "clean": total - self._second}
        return halves[split] if split in halves else self.of.rows(split)

    @property
    def _second(self) -> int:
        """Where the half to repair with begins: no picture is in both."""
        half, whole = self.of.rows("clean") // 2, self.of.corpus("clean")
        return whole.next_picture(half) if isinstance(whole, IngestedPairs) else half

    def corpus(self, split: str) -> CorpusSpec:
        if split not in ("suspect", "clean"):
            return self.of.corpus(split)
        start = 0 if split == "suspect" else self._second
        whole = self.of.corpus("clean")
        if isinstance(whole, IngestedPairs):  # half of them is pointed to as all of them is
            return whole.part(start, self.rows(split))
        return CorpusPart(of=whole, start=start, num_rows=self.rows(split))

    @property
    def classes(self) -> Sequence[str]:
        return self.of.classes

    @property
    def templates(self) -> Sequence[str]:
        return self.of.templates


class Square(NamedTuple):
    """One cell of a trial: the defended victim and the undefended one, on the tuning split."""

    cell: Cell
    measure: MeasureStage
    victim: MeasureStage


class Scene:
    """The victims that an objective sees."""

    def __init__(self, campaign: Campaign, sees: Sees) -> None:
        self.campaign, self.sees = campaign, sees
        side = campaign.held_out if sees is Sees.HELD_OUT else campaign.tuning
        grid = campaign.grid
        if sees is Sees.SIMULATED:
            simulate = campaign.simulate
            assert simulate is not None, "the file was checked for it"
            side = Side(attacks=simulate.attacks, seeds=simulate.seeds, rates=(simulate.rate,))
            grid = replace(
                grid,
                data=cast("Data", SimulatedData(of=grid.data)),  # it answers what those do
                victim=replace(grid.victim, **simulate.recipe),
            )
        self.side = side
        self.grid = self._of_side(grid)
        self.build = Builder(self.grid)

    def _of_side(self, grid: Grid) -> Grid:
        by_label = {entry.label: entry for entry in grid.attacks}
        chosen = [self._entry(by_label[label]) for label in self.side.attacks]
        return replace(grid, attacks=tuple(chosen), seeds=self.side.seeds, defense_seeds=(0,))

    def _entry(self, entry: AttackEntry) -> AttackEntry:
        if self.sees is Sees.SIMULATED:
            return replace(entry, rates=self.side.rates, counts=None)
        return entry

    @cached_property
    def plan(self) -> Plan:
        """The undefended victims with their gates."""
        none = [entry for entry in self.grid.defenses if entry.method.name == "none"]
        return make_plan(replace(self.grid, defenses=tuple(none)))

    def takes(self, cell: Cell) -> bool:
        """Whether trials are measured on a cell's victim."""
        if cell.count == 0:
            return False
        rates = self.side.rates or (self.grid.gate_rate(cell.attack),)
        return cell.rate in rates

    def groups(self) -> list[Group]:
        """The gates that the victims have to pass."""
        cells = [planned.cell for planned in self.plan.cells if self.takes(planned.cell)]
        return list(dict.fromkeys((c.attack.label, c.rate, c.target) for c in cells))

    def squares(self, entry: DefenseEntry, groups: Sequence[Group] | None = None) -> list[Square]:
        """An entry's cells, in the order of the file; of some gates alone, if they are given."""
        found, build = [], self.build.branch()
        for cell in replace(self.grid, defenses=(entry,)).cells():
            if not self.takes(cell):
                continue
            if groups is not None and (cell.attack.label, cell.rate, cell.target) not in groups:
                continue
            if cell.not_applicable is not None:
                raise UsageError(f"{cell.label}: {cell.not_applicable}")
            victim = self.build.gate(cell, cell.count)
            defended = build.defended(cell, cell.count, entry)
            measure = build.measurement(cell, defended, Reader.TUNING)
            found.append(Square(cell, measure, victim))
        return found


class Scenes:
    """The scenes of a campaign, each built once, and the entries that settings mean."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self._grid = Raw.of({**campaign.plain}, Where(campaign.source))
        self._source = Source(campaign.grid.name, campaign.grid.source, campaign.grid.text)
        self._scenes: dict[Sees, Scene] = {}

    def of(self, sees: Sees) -> Scene:
        sees = Sees.ATTACKS if sees is Sees.CLEAN else sees
        if sees not in self._scenes:
            self._scenes[sees] = Scene(self.campaign, sees)
        return self._scenes[sees]

    def entry(self, searched: Searched, values: Values) -> DefenseEntry:
        """A defense with settings of its space in place of its own."""
        if not values:
            return searched.entry
        given = with_values(searched.given, values)
        (entry,) = entries_of([{searched.name: given}], self._grid, self._source)
        return entry

    def trial_key(self, squares: Sequence[Square]) -> Key:
        """What is measured for some settings: all that can change their numbers."""
        return content_key("trial", {}, [square.measure.key for square in squares])

    def search_key(self, searched: Searched, objective: str, groups: Sequence[Group]) -> Key:
        """What suggests settings and judges them, apart from the budget: a search with another
        key starts anew, though what it needs of the store is found there."""
        campaign = self.campaign
        scene = self.of(campaign.objectives[objective].sees)
        squares = scene.squares(searched.entry, groups)
        about: Mapping[str, Any] = {
            "objective": campaign.objectives[objective],
            "space": {name: searched.space[name] for name in sorted(searched.space)},
            "given": searched.given,
            "search": campaign.search,
            "stop": campaign.stop,
            "drop": campaign.drop,
        }
        keys = [key for square in squares for key in (square.measure.key, square.victim.key)]
        return content_key("search", {k: _plain(v) for k, v in about.items()}, keys)


def _plain(value: Any) -> Any:
    """Spaces and rules as plain data: none of them is a method with a name and a version."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def inputs(stage: Stage, seen: dict[Key, Stage] | None = None) -> dict[Key, Stage]:
    """A stage and all that it is made from, inputs first."""
    seen = {} if seen is None else seen
    if stage.key not in seen:
        for parent in parents(stage):
            inputs(parent, seen)
        seen[stage.key] = stage
    return seen
