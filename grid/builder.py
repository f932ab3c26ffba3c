"""The stages of one grid's cells, each built once, so that shared prefixes are the same objects."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from attacks.base import Goal, Track
from defenses.base import Recipes, Regime
from defenses.controls import CleanModel, NoDefense
from grid.data import WorldData
from grid.gate import Gate
from grid.measure import MeasureStage, OtherStages
from grid.plan import GateCheck
from grid.spec import AttackEntry, Cell, DefenseEntry, Grid, Guide
from grid.stages import (
    CorpusStage,
    DefendStage,
    FileModelStage,
    GuideStage,
    ModelStage,
    PoisonStage,
    TriggerStage,
)
from grid.start_gate import StartStage
from victims.corpora import Reader
from victims.draws import derive
from victims.keys import Key
from victims.models import ModelSpec
from victims.recipe import Recipe

NO_DEFENSE = NoDefense()


class Builder:
    """Stages of one grid, each built once, so that shared prefixes are the same objects."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.corpora = {
            split: CorpusStage(grid.data.corpus(split))
            for split in ("public", "suspect", "clean", "tuning", *grid.evaluate.sets)
            if grid.data.rows(split)
        }
        # What the public can download: in regime F the start of every victim. Who attacks an image
        # classifier has one of the victims' kind, fitted to pictures of its own.
        fit = grid.reference
        if grid.track is Track.SUPERVISED:
            fit = replace(grid.victim, seed=derive(0, "surrogate"))
        self.public_model: GuideStage | None = None
        if grid.weights is not None:
            assert isinstance(grid.model, ModelSpec), "weights of a file are a CLIP's"
            self.public_model = FileModelStage(grid.model, grid.weights)
        elif grid.data.rows("public"):
            public = self.corpora["public"]
            self.public_model = ModelStage(grid.model, fit, grid.data.public, public, None)
        self.reference = self.public_model if grid.regime is Regime.F else None
        self._memo: dict[Any, Any] = {}

    def branch(self) -> Builder:
        """A builder of the same victims, for defenses that share labels with others' settings."""
        found = copy.copy(self)
        of_defenses = ("recipes", "defended", "measure")
        found._memo = {
            name: made for name, made in self._memo.items() if name[0] not in of_defenses
        }
        return found

    def _once(self, name: tuple[Any, ...], make: Any) -> Any:
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]

    def goal(self, target: int) -> Goal:
        data = self.grid.data
        made: Goal = self._once(
            ("goal", target), lambda: Goal(target, data.classes[target], tuple(data.templates))
        )
        return made

    def trigger(self, cell: Cell) -> TriggerStage:
        attack, seed = cell.attack.method, cell.seed
        stage: TriggerStage = self._once(
            ("trigger", cell.attack.label, seed, cell.target),
            lambda: TriggerStage(
                attack,
                self.goal(cell.target),
                seed,
                self.corpora["suspect"],
                self.grid.model,
                self.public_model if attack.needs_surrogate else None,
            ),
        )
        return stage

    def recipe(self, seed: int) -> Recipe:
        """How the victims of a seed are trained."""
        made: Recipe = self._once(("recipe", seed), lambda: replace(self.grid.victim, seed=seed))
        return made

    def recipes(self, entry: DefenseEntry | None, seed: int) -> Recipes:
        """How an entry's defenses train, by a seed; those of many victims are one object."""

        def make() -> Recipes:
            repair = entry.recipe if entry else self.grid.repair
            retrain = entry.victim_recipe if entry else self.grid.victim
            return Recipes(victim=replace(retrain, seed=seed), repair=replace(repair, seed=seed))

        made: Recipes = self._once(("recipes", entry and entry.label, seed), make)
        return made

    def gate_of(self, attack: AttackEntry) -> Gate:
        """The gate of an attack's victims, at the rate where they are judged."""
        grid = self.grid
        made: Gate = self._once(
            ("gate", attack.label), lambda: replace(grid.gate, rate=grid.gate_rate(attack))
        )
        return made

    def victim(self, cell: Cell, count: int) -> ModelStage:
        rows = self.grid.data.suspect
        # A clean victim is the same for every attack and target.
        name = ("victim", cell.seed, count and (cell.attack.label, cell.target), count)

        def make() -> ModelStage:
            data: CorpusStage | PoisonStage = self.corpora["suspect"]
            if count:
                data = PoisonStage(self.trigger(cell), count, rows)
            return ModelStage(self.grid.model, self.recipe(cell.seed), rows, data, self.reference)

        stage: ModelStage = self._once(name, make)
        return stage

    def checks(self, gate: GateCheck) -> tuple[Key, ...]:
        """Keys of a gate's measurements, which every cell of its group has in its own."""
        found: tuple[Key, ...] = self._once(
            ("checks", gate.group), lambda: tuple(stage.key for stage in gate.stages)
        )
        return found

    def guide(self, guide: Guide) -> GuideStage:
        """Where the weights of a judge come from."""

        def make() -> GuideStage:
            if guide.of is not None and guide.cell is not None:
                return Builder(guide.of).victim(guide.cell, guide.cell.count)
            if guide.weights is not None:
                return FileModelStage(guide.model, guide.weights)
            assert isinstance(self.grid.data, WorldData), "a fit needs captions"
            public = CorpusStage(self.grid.data.captioned("public"))
            assert guide.recipe is not None, "what has no weights is fitted"
            return ModelStage(guide.model, guide.recipe, self.grid.data.public, public, None)

        stage: GuideStage = self._once(("guide", guide.label), make)
        return stage

    def defended(self, cell: Cell, count: int, entry: DefenseEntry | None) -> DefendStage:
        victim = self.victim(cell, count)
        nested = cell.defense_seed
        name = ("defended", victim.key, entry and entry.label, nested)

        def make() -> DefendStage:
            seed = cell.seed if nested == 0 else derive(cell.seed, "defense", nested)
            return DefendStage(
                entry.method if entry else NO_DEFENSE,
                self.recipes(entry, seed),
                seed,
                victim,
                self.corpora["clean"],
                self.corpora["suspect"],
                self.reference,
                self.guide(entry.guide) if entry and entry.guide else None,
            )

        stage: DefendStage = self._once(name, make)
        return stage

    def measure(self, cell: Cell, count: int, entry: DefenseEntry | None) -> MeasureStage:
        return self.measurement(cell, self.defended(cell, count, entry), Reader.REPORTING)

    def gate(self, cell: Cell, count: int) -> MeasureStage:
        return self.measurement(cell, self.defended(cell, count, None), Reader.TUNING)

    def init(self, cell: Cell, reader: Reader) -> MeasureStage | None:
        if self.reference is None:
            return None
        plain = self.defended(cell, 0, None)
        name = ("init", plain.key)
        stage = self._once(name, lambda: replace(plain, defense=CleanModel()))
        return self.measurement(cell, stage, reader)

    def start(self) -> StartStage | None:
        """The measurement that the gate asks of the start weights, if it asks one."""
        if self.reference is None or self.grid.gate.reference is None:
            return None
        return StartStage(self.grid.model, self.reference, self.corpora["tuning"])

    def beside(self, cell: Cell) -> tuple[MeasureStage, MeasureStage | None]:
        """What stands beside a cell's numbers: its clean victim and the start, same trigger."""
        name = ("beside", cell.attack.label, cell.target, cell.seed, cell.defense_seed)
        made: tuple[MeasureStage, MeasureStage | None] = self._once(
            name, lambda: (self.measure(cell, 0, None), self.init(cell, Reader.REPORTING))
        )
        return made

    def _retrieval_sets(self) -> tuple[CorpusStage, ...]:
        return tuple(CorpusStage(each) for each in self.grid.evaluate.retrieval_sets)

    def _others(self) -> tuple[OtherStages, ...]:
        return tuple(
            OtherStages(
                CorpusStage(other.report), CorpusStage(other.probe) if other.probe else None
            )
            for other in self.grid.evaluate.others
        )

    def measurement(self, cell: Cell, defended: DefendStage, reader: Reader) -> MeasureStage:
        evaluate = self.grid.evaluate
        reports = reader is not Reader.TUNING
        splits = evaluate.sets if reports else ("tuning",)
        trigger = self.trigger(cell)

        def make() -> MeasureStage:
            made = MeasureStage(
                defended,
                trigger,
                self._once(("sets", splits), lambda: tuple(self.corpora[s] for s in splits)),
                evaluate.ks,
                reader,
                evaluate.retrieval is True and reports,
                self.corpora["clean"] if evaluate.probe and reports else None,
                evaluate.shown if reports else None,
                self._once(("retrieval_sets",), self._retrieval_sets) if reports else (),
                self._once(("others",), self._others) if reports else (),
            )
            # Whoever is first to measure a model makes its classifiers of prompts.
            mine = (defended.key, trigger.key, reader)
            others = {
                name
                for name in made.prompts
                if self._once(("prompts", defended.key, name), lambda: mine) != mine
            }
            return replace(made, read_before=frozenset(others)) if others else made

        stage: MeasureStage = self._once(("measure", defended.key, trigger.key, reader), make)
        return stage
