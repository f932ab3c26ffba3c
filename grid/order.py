"""The order of stages: what waits for what, whose turn it is, and what a run of them would take.

A list schedule: of the stages whose inputs exist the one with the longest chain behind it goes
first, and no lane idles while one is ready. With ``m`` lanes it ends within ``2 - 1/m`` times the
lower bound (Graham 1969), whatever the order; the longest chain first comes close to the bound.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from grid.plan import Plan
from grid.stage_order import parents
from grid.stages import Stage
from victims.keys import Key

Inputs = Mapping[Key, Collection[Key]]


class Turns:
    """Which stage is next."""

    def __init__(self, inputs: Inputs, priority: Mapping[Key, float]) -> None:
        self.priority = priority
        self.waits = {key: set(needed) & inputs.keys() for key, needed in inputs.items()}
        self.children: dict[Key, list[Key]] = defaultdict(list)
        self.ready: list[tuple[float, int, Key]] = []
        self.sequence = 0
        for key, needed in self.waits.items():
            for parent in needed:
                self.children[parent].append(key)
            if not needed:
                self._push(key)

    def _push(self, key: Key) -> None:
        self.sequence += 1
        heapq.heappush(self.ready, (-self.priority[key], self.sequence, key))

    def take(self) -> Key | None:
        """The next stage, or None while all that are left wait for others."""
        return heapq.heappop(self.ready)[2] if self.ready else None

    def finish(self, key: Key) -> None:
        """The artefact of a stage exists."""
        for child in self.children.pop(key, ()):
            self.waits[child].discard(key)
            if not self.waits[child]:
                self._push(child)


def chains(inputs: Inputs, seconds: Mapping[Key, float]) -> dict[Key, float]:
    """Per stage: its own seconds and the longest chain of stages behind it; inputs come first."""
    behind: dict[Key, float] = dict.fromkeys(inputs, 0.0)
    for key in reversed(list(inputs)):
        through = behind[key] + seconds[key]
        for parent in inputs[key]:
            if parent in behind:
                behind[parent] = max(behind[parent], through)
    return {key: behind[key] + seconds[key] for key in inputs}


def lower_bound(inputs: Inputs, seconds: Mapping[Key, float], lanes: int) -> float:
    """No schedule is quicker than the longest chain, or than all work shared out evenly."""
    longest = max(chains(inputs, seconds).values(), default=0.0)
    return max(longest, sum(seconds[key] for key in inputs) / lanes)


@dataclass(frozen=True, slots=True)
class Simulated:
    """When every stage would begin and end, in seconds from the start."""

    began: dict[Key, float]
    ended: dict[Key, float]

    @property
    def makespan(self) -> float:
        return max(self.ended.values(), default=0.0)


def simulate(
    inputs: Inputs, seconds: Mapping[Key, float], priority: Mapping[Key, float], lanes: int
) -> Simulated:
    """A run on ``lanes`` lanes that each hold one stage, without any cost but the stages'."""
    turns, now = Turns(inputs, priority), 0.0
    running: list[tuple[float, Key]] = []
    found = Simulated({}, {})
    while True:
        while len(running) < lanes and (key := turns.take()) is not None:
            found.began[key] = now
            heapq.heappush(running, (now + seconds[key], key))
        if not running:
            return found
        now, key = heapq.heappop(running)
        found.ended[key] = now
        turns.finish(key)


def waits_of(plan: Plan, done: set[Key] | None = None) -> dict[Key, list[Key]]:
    """Every stage to run, inputs first, with what it waits for: its inputs, or a gate.

    A stage that gated cells alone need waits for the gate of the first of them.
    """
    done = done or set()
    gates = {group: gate.stages for group, gate in plan.gates.items()}
    free: list[Stage] = [plan.start] if plan.start else []
    free += [stage for stages in gates.values() for stage in stages]
    free += [stage for cell in plan.cells if not cell.gated for stage in cell.stages]
    first = plan.missing(free, done)
    waits = {key: _keys(parents(stage)) for key, stage in first.items()}
    known = done | waits.keys()
    for cell in plan.cells:
        if cell.gated:
            checks = _keys(gates[cell.group])
            for key, stage in plan.missing(cell.stages, known).items():
                waits[key] = [*_keys(parents(stage)), *checks]
                known.add(key)
    return waits


def priorities(
    plan: Plan, todo: Mapping[Key, Stage], seconds: Mapping[Key, float]
) -> dict[Key, float]:
    """The longest chain behind every stage, where a gate counts what waits for its verdict."""
    return chains(waits_of(plan, plan.stages.keys() - todo.keys()), seconds)


def _keys(stages: Iterable[Stage]) -> list[Key]:
    return [stage.key for stage in stages]
