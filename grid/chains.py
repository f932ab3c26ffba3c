"""What the cells of a run, or a campaign's trials, rest on: ``chains.json`` beside the results.

The driver writes it from its plan. Whoever asks which stages a cell needs, or which cells need an
artefact, reads it and plans nothing: planning imports torch. This file imports nothing heavy.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grid.schema.whole import write_whole
from victims.errors import GridError
from victims.places import is_uri

if TYPE_CHECKING:
    from grid.plan import Plan
    from grid.spec import Cell, Grid
    from grid.stages import Stage
    from victims.keys import Key

FILE = "chains.json"


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage: what it reads, what it leaves besides its own artefact, the GPUs it asks for."""

    kind: str
    name: str
    inputs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """An attack or a defense by its name on the board."""

    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedCell:
    """A cell as filters see it, with its measurements and its gate; the first is its own."""

    key: str
    label: str
    attack: Labelled
    defense: Labelled
    rate: str
    seed: int
    defense_seed: int
    target: int
    measures: tuple[str, ...]
    gate: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chains:
    """The stages of a run and the cells that stand on them."""

    grid: str
    hash: str
    store: str
    stages: Mapping[str, PlannedStage]
    cells: tuple[ListedCell, ...]

    def above(self, ends: Iterable[str]) -> set[str]:
        """The stages named and everything that they are made from."""
        found: set[str] = set()
        todo = list(ends)
        while todo:
            key = todo.pop()
            if key not in found:
                found.add(key)
                todo.extend(self.stages[key].inputs)
        return found

    def of(self, cell: ListedCell) -> set[str]:
        """Every stage that a cell's rows rest on, its gate's included."""
        return self.above([*cell.measures, *cell.gate])

    def own(self, cell: ListedCell) -> set[str]:
        """The cell's measurement and the defense that it measures."""
        first = cell.measures[0]
        inputs = self.stages[first].inputs
        return {first, *(key for key in inputs if self.stages[key].kind == "defended")}

    def users(self, cells: Iterable[ListedCell]) -> dict[str, list[ListedCell]]:
        """Stage -> the given cells that rest on it."""
        gates: dict[tuple[str, ...], set[str]] = {}
        found: dict[str, list[ListedCell]] = defaultdict(list)
        for cell in cells:
            if cell.gate not in gates:
                gates[cell.gate] = self.above(cell.gate)
            for key in gates[cell.gate] | self.above(cell.measures):
                found[key].append(cell)
        return found

    def artefacts(self, stages: Iterable[str]) -> Iterator[str]:
        """The keys of all that stages leave in the store."""
        for key in stages:
            yield key
            yield from self.stages[key].also


def write_chains(out: Path, plan: Plan, store: str) -> None:
    """Keep what a plan's cells rest on."""
    gates = [group for group in plan.gates if plan.gates[group].stages]
    number = {group: i for i, group in enumerate(gates)}
    # Rows tell what the victim cost, whether or not the defense was given it.
    start = [plan.start.key] if plan.start else []
    cells = [
        listed(
            c.cell,
            c.key,
            [*(s.key for s in c.stages), c.victim.key, *start],
            number.get(c.group),
        )
        for c in plan.cells
    ]
    keys = [[stage.key for stage in plan.gates[group].stages] for group in gates]
    write_parts(out, plan.grid, store, plan.stages, keys, cells)


def write_parts(
    out: Path,
    grid: Grid,
    store: str,
    stages: Mapping[Key, Stage],
    gates: Sequence[Sequence[str]],
    cells: Sequence[Mapping[str, Any]],
) -> None:
    """Keep cells, as `listed` tells of them, and the stages that they rest on."""
    execution = grid.execution
    body = {
        "grid": grid.name,
        "hash": grid.identity_hash,
        "store": store if is_uri(store) else str(Path(store).absolute()),
        "stages": dict(_stages(stages)),
        "gpus": {
            kind: wants.gpus * wants.workers
            for kind in {stage.kind for stage in stages.values()}
            if (wants := execution.resources_for(kind)).gpus
        },
        "gates": gates,
        "cells": cells,
    }
    write_whole(out / FILE, json.dumps(body, separators=(",", ":")))


def _stages(stages: Mapping[Key, Stage]) -> Iterator[tuple[str, dict[str, Any]]]:
    from grid.stage_order import parents
    from grid.stages import PoisonStage

    for key, stage in stages.items():
        body: dict[str, Any] = {"kind": stage.kind, "name": stage.family}
        if above := parents(stage):
            body["inputs"] = [parent.key for parent in above]
        if isinstance(stage, PoisonStage):
            body["also"] = [stage.truth_key]
        yield key, body


def listed(
    cell: Cell, key: str, measures: Sequence[str], gate: int | None, about: str = ""
) -> dict[str, Any]:
    """A cell as the file has it; ``gate`` is the number of its gate in the file's list."""
    return {
        "key": key,
        "label": f"{about}{cell.label}",
        "attack": cell.attack.label,
        "defense": cell.defense.label,
        "rate": cell.rate,
        "seed": cell.seed,
        "defense_seed": cell.defense_seed,
        "target": cell.target,
        "measures": measures,
        "gate": gate,
    }


def read_chains(out: Path) -> Chains:
    """What the run in ``out`` planned; raises where it never said so."""
    path = out / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        gpus = found["gpus"]
        stages = {
            str(key): PlannedStage(
                kind=str(stage["kind"]),
                name=str(stage["name"]),
                inputs=tuple(stage.get("inputs", ())),
                also=tuple(stage.get("also", ())),
                gpus=float(gpus.get(stage["kind"], 0)),
            )
            for key, stage in found["stages"].items()
        }
        gates = [tuple(gate) for gate in found["gates"]]
        cells = tuple(_read_cell(cell, gates) for cell in found["cells"])
        chains = Chains(
            str(found["grid"]), str(found["hash"]), _store_of(out, found["store"]), stages, cells
        )
        _require_whole(chains)
        return chains
    except OSError as error:
        raise GridError(
            f"{path}: cannot be read ({error.strerror or error}). It says what cells rest on, and"
            " is written at a start: `grid run` (of a campaign, `grid tune`) on these results"
            " writes it."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise GridError(
            f"{path}: not a list of stages ({error!r}); `grid run` (of a campaign, `grid tune`)"
            " writes it again"
        ) from error


def _store_of(out: Path, recorded: str) -> str:
    """Where a run's store is: as recorded, or beside the results, where both were moved; a path
    that was recorded relative to where the run was started is looked for from the results."""
    if is_uri(recorded):
        return recorded
    path, above = Path(recorded), out.absolute().parents
    near_by = [folder / path for folder in above[:2]] if not path.is_absolute() else []
    for store in (*near_by, path, out.absolute().parent / path.name):
        if (store / "store.json").is_file():
            return str(store)
    return recorded


def _read_cell(cell: Mapping[str, Any], gates: list[tuple[str, ...]]) -> ListedCell:
    plain = {name: cell[name] for name in ("key", "label", "rate", "seed", "defense_seed")}
    return ListedCell(
        **plain,
        target=int(cell["target"]),
        attack=Labelled(cell["attack"]),
        defense=Labelled(cell["defense"]),
        measures=tuple(cell["measures"]),
        gate=() if cell["gate"] is None else gates[cell["gate"]],
    )


def _require_whole(chains: Chains) -> None:
    named = {key for stage in chains.stages.values() for key in stage.inputs}
    named |= {key for cell in chains.cells for key in (*cell.measures, *cell.gate)}
    if lost := sorted(named - set(chains.stages)):
        raise ValueError(f"no stage {lost[0]}")
