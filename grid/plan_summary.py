"""What `grid plan` says of a plan: how much there is to do, and how long it takes at best."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from grid.assumed import assumed_rate, assumptions, rated_as
from grid.history import History
from grid.plan import Plan
from grid.room import Room, busiest
from grid.stage_order import longest_chain, parents
from grid.stages import Stage
from victims.keys import Key


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
