"""From a grid to a plan: cells, the stages they need, shared prefixes merged, finished ones known.

Nothing runs here. A plan says what exists, what must be made, in which order it can be made, what
it is expected to cost, and which cells wait for a victim to pass its gate.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import uuid
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from attacks.base import Aim, Goal, Track
from defenses.base import Need, Recipes, Regime, fidelity_in, resolved_needs
from defenses.controls import CleanModel, NoDefense
from grid.assumed import assumed_rate, assumptions, rated_as
from grid.measure import MeasureStage, OtherStages
from grid.room import Room, busiest
from grid.spec import AttackEntry, Cell, DefenseEntry, Gate, Grid, Guide, WorldData
from grid.stages import (
    CorpusStage,
    DefendStage,
    FileModelStage,
    GuideStage,
    ModelStage,
    PoisonStage,
    Stage,
    TriggerStage,
)
from grid.start_gate import StartStage
from grid.step_costs import DEFAULT_DEVICE
from victims.corpora import Reader
from victims.draws import derive
from victims.evaluation_sets import EvaluationSet
from victims.ingested import IngestedPairs
from victims.keys import Key, content_key
from victims.models import ModelSpec
from victims.recipe import Recipe
from victims.store import Store

# Seconds per unit of work before anything was measured on a machine; replaced by its history.
DEFAULT_RATE = {
    "corpus": 0.1,
    "pointer": 0.001,
    "measure": 0.5,
    "plain": 0.5,
    "plain_clip": 0.5,
    "trigger": 0.1,
    "poisoned": 0.1,
}
# Of whatever else computes with a network.
DEFAULT_STEP_RATE = 0.5
# How work is counted; of a history that counts otherwise only these families are still right.
FORM, FORM_NAME = 2.0, "form"
UNCHANGED = ("corpus", "pointer", "plain", "plain_clip", "poisoned", "trigger", "file_model")

Group = tuple[str, str, int]
NO_DEFENSE = NoDefense()


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
    """Tuning-split measurements of one attack at one rate: victims, clean twins, start weights."""

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
        rows, said = self.grid.data.suspect, dict[str, None]()
        judges = (planned.cell.defense.guide for planned in self.cells)
        for weights in (self.grid.weights, *(judge.weights for judge in judges if judge)):
            said |= dict.fromkeys(weights.notes if weights else ())
        for cell in (planned.cell for planned in self.cells):
            words = cell.defense.method.caution(cell.count / rows, rows)
            if words:
                said[f"{cell.defense.label} at {cell.rate}: {words}"] = None
        for stage in self.stages.values():
            spec = stage.spec if isinstance(stage, CorpusStage) else None
            if isinstance(spec, EvaluationSet | IngestedPairs) and spec.caution:
                said[spec.caution] = None
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


def parents(stage: Stage) -> list[Stage]:
    """The stages whose artefacts a stage reads."""
    if isinstance(stage, MeasureStage):
        return stage.parents
    if isinstance(stage, DefendStage):
        return stage.parents
    if isinstance(stage, ModelStage):
        init: list[Stage] = [stage.init] if stage.init else []
        return [stage.data, *init]
    if isinstance(stage, TriggerStage):
        return [stage.corpus, *([stage.surrogate] if stage.surrogate else [])]
    if isinstance(stage, PoisonStage):
        return [stage.trigger]
    if isinstance(stage, StartStage):
        return [stage.reference, stage.tuning]
    return []


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


def finished(store: Store, plan: Plan) -> set[Key]:
    """Which of the plan's stages the store holds, by one listing per kind."""
    kinds = {key.rsplit("-", 1)[0] for key in plan.stages}
    held = {key for kind in kinds for key in store.keys(kind)} & set(plan.stages)
    return held


def _family(name: str) -> str:
    return name.split("/")[0].split(":")[0]


class History:
    """Measured seconds per unit of work, by family of stage, kept beside the store.

    Of real models that nothing was measured of they are assumed, for a type of device.
    """

    def __init__(self, path: Path | None, device: str = DEFAULT_DEVICE) -> None:
        self.path, self.device = path, device
        self.rates: dict[str, float] = {}
        # It only estimates: what cannot be read is as good as not there.
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
            found = json.loads(path.read_text()) if path else {}
            rates = {str(name): float(rate) for name, rate in found.items()}
            form = rates.pop(FORM_NAME, 1.0)
            kept = {n: r for n, r in rates.items() if form == FORM or _family(n) in UNCHANGED}
            self.rates = {n: r for n, r in kept.items() if math.isfinite(r) and r >= 0}

    def rate(self, name: str) -> float:
        """Seconds per unit of work of what is rated under a name."""
        if name in self.rates:
            return self.rates[name]
        family, assumed = _family(name), assumed_rate(name, self.device)
        return DEFAULT_RATE.get(family, DEFAULT_STEP_RATE) if assumed is None else assumed

    def seconds(self, stage: Stage) -> float:
        return self.rate(rated_as(stage)) * stage.work

    def record(self, stage: Stage, seconds: float) -> None:
        rate, name = seconds / max(stage.work, 1e-6), rated_as(stage)
        old = self.rates.get(name)
        self.rates[name] = rate if old is None else 0.7 * old + 0.3 * rate

    def save(self) -> None:
        """Replace the file; another driver may do the same at the same time."""
        if self.path is None:
            return
        scratch = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(OSError):
            body = {FORM_NAME: FORM, **self.rates}
            scratch.write_text(json.dumps(body, sort_keys=True, indent=1))
            scratch.replace(self.path)
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def summary(
    plan: Plan, done: set[Key], history: History, room: Room, settled: Collection[str] = ()
) -> dict[str, Any]:
    """What `grid plan` prints; ``settled`` cells have their rows."""
    todo = plan.missing(plan.everything(settled), done)
    seconds = {key: history.seconds(stage) for key, stage in todo.items()}
    longest = longest_chain(todo, seconds)
    on_gpus = gpu_seconds(todo, seconds, history, room)
    by_kind: dict[str, dict[str, float]] = {}
    for key, stage in plan.stages.items():
        entry = by_kind.setdefault(stage.kind, {"stages": 0, "to_run": 0, "seconds": 0.0})
        entry["stages"] += 1
        if key in todo:
            entry["to_run"] += 1
            entry["seconds"] += seconds[key]
    shared = _saved_by_sharing(plan)
    return {
        "grid": plan.grid.name,
        "hash": plan.grid.identity_hash,
        "cells": len(plan.cells) + len(plan.refused),
        "not_applicable": len(plan.refused),
        "stages": len(plan.stages),
        "stages_without_sharing": len(plan.stages) + shared,
        "stages_finished": len(set(plan.stages) & done),
        "stages_to_run": len(todo),
        "victims": plan.num_victims(),
        "victims_to_train": sum(1 for key in {c.victim.key for c in plan.cells} if key in todo),
        "kinds": by_kind,
        "cautions": plan.cautions(),
        "assumed": assumptions(todo.values(), history.rates, history.device),
        "seconds_of_work": sum(seconds.values()),
        "longest_chain_seconds": max(longest.values(), default=0.0),
        "lanes": room.lanes,
        # Work for GPUs that are not here: nothing can be said of how long it takes here.
        "gpu_seconds": on_gpus,
        "gpu": history.device if on_gpus is not None else None,
        "estimated_seconds": max(
            max(longest.values(), default=0.0),
            busiest({kind: entry["seconds"] for kind, entry in by_kind.items()}, room),
        )
        if on_gpus is None
        else None,
    }


def gpu_seconds(
    todo: Mapping[Key, Stage], seconds: Mapping[Key, float], history: History, room: Room
) -> float | None:
    """Seconds of one GPU that stages take, where a GPU was assumed or no node has those that they
    ask for; None where all of them have a place here."""
    found, elsewhere = 0.0, False
    for key, stage in todo.items():
        name = rated_as(stage)
        assumed = name not in history.rates and assumed_rate(name, history.device) is not None
        asks = room.execution.resources_for(stage.kind).gpus > 0
        if assumed or asks:
            found += seconds[key]
            elsewhere |= assumed or not room.most(stage.kind)
    return found if elsewhere else None


def _saved_by_sharing(plan: Plan) -> int:
    """How many more stages would run if every cell made all that it needs for itself."""
    known: dict[Key, frozenset[Key]] = {}

    def whole(stage: Stage) -> frozenset[Key]:
        """A stage that many cells need, and everything before it."""
        if stage.key not in known:
            known[stage.key] = frozenset([stage.key]).union(*map(whole, parents(stage)))
        return known[stage.key]

    num_stages, distinct = 0, set[Key]()
    for cell in plan.cells:
        # The measurement and the defense are the cell's own; the rest is looked up.
        defended = cell.measure.defended
        before = [stage for stage in parents(cell.measure) if stage is not defended]
        needed = [*before, *parents(defended), *cell.stages[1:]]
        own = {cell.measure.key, defended.key}.union(*map(whole, needed))
        num_stages += len(own)
        distinct |= own
    return num_stages - len(distinct)


def chain(plan: Plan, cell: CellPlan) -> dict[Key, Stage]:
    """Every stage that a cell's rows rest on, its gate's included, inputs first."""
    gate = plan.gates.get(cell.group)
    start: list[Stage] = [plan.start] if plan.start else []
    return plan.missing([*start, *(gate.stages if gate else []), *cell.stages], set())


def longest_chain(todo: Mapping[Key, Stage], seconds: Mapping[Key, float]) -> dict[Key, float]:
    """Per stage: its own seconds and the longest chain of stages that wait for it."""
    behind: dict[Key, float] = dict.fromkeys(todo, 0.0)
    for key in reversed(list(todo)):
        through = behind[key] + seconds[key]
        for parent in parents(todo[key]):
            if parent.key in behind:
                behind[parent.key] = max(behind[parent.key], through)
    return {key: behind[key] + seconds[key] for key in todo}


def describe_cell(cell: Cell, grid: Grid) -> dict[str, Any]:
    """The identity columns of a cell's rows.

    Chosen pictures have rows per target and in total, which one rate would mix up: it is null.
    """
    defense, regime = cell.defense.method, grid.regime
    rate: str | None = cell.rate
    if cell.count and cell.attack.counts is not None:
        counted = Decimal(cell.count) / grid.data.suspect
        is_rate = cell.attack.method.aim is not Aim.TARGETS
        rate = format(round(counted, 8).normalize(), "f") if is_rate else None
    return {
        "label": cell.label,
        "attack": cell.attack.label,
        "rate": None if rate is None else float(rate),
        "rate_text": rate,
        "defense": cell.defense.label,
        "needs": resolved_needs(defense, regime),
        "fidelity": fidelity_in(defense, regime).value,
        "phase": defense.acts().value,
        # The undefended victim stands among the defenses: every one of them is read against it.
        "is_control": defense.phase.value == "control" and not isinstance(defense, NoDefense),
        "victim_seed": cell.seed,
        "defense_seed": cell.defense_seed,
    }
