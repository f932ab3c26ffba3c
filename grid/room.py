"""How many stages a cluster works on at once, by what they ask for and what its nodes have.

Plain numbers: no Ray here. Stages of one kind never wait for those of another that ask for
something else: GPUs are not idle because the queue is full of stages for CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grid.execution import Execution
from grid.needs import Node, bundle, places

# A stage that asks for nothing runs everywhere; somebody has to say how often.
MOST = 64
LANES = "lanes"


@dataclass(frozen=True, slots=True)
class Room:
    """What nodes hold of a grid's stages. ``ahead`` times as much is handed over as fits, so that
    a place that others leave is taken at once; ``lanes`` bounds the number of stages."""

    execution: Execution
    nodes: Sequence[Node]
    lanes: int | None = None
    ahead: int = 1

    def most(self, kind: str) -> int:
        """How many stages of a kind fit at once if nothing else runs; 0 where none does."""
        wants = self.execution.resources_for(kind)
        found = min(places(wants, self.nodes), MOST * wants.workers)
        return int(min(found // wants.workers, self.lanes or math.inf))

    def shares(self, kind: str) -> dict[str, float]:
        """The part of the whole cluster that a stage of a kind holds, by resource."""
        wants, found = self.execution.resources_for(kind), {}
        for name, number in bundle(wants).items():
            total = self._total(name)
            if number and total:
                found[name] = number * wants.workers / total
        if self.lanes is not None:
            found[LANES] = 1 / self.lanes
        return found or {LANES: 1 / MOST}

    def admits(self, kind: str, pending: Mapping[str, int]) -> bool:
        """Whether to hand over one more stage of a kind, besides those that are on their way.

        One of a kind that no node holds is handed over all the same: the cluster may grow, and
        whoever waits for it wants to be told.
        """
        if self.lanes is not None and sum(pending.values()) >= self.lanes * self.ahead:
            return False
        most = self.most(kind)
        if pending.get(kind, 0) >= max(1, most * self.ahead):
            return False
        if not most:
            return True
        used = self.shares(kind)
        for other, number in pending.items():
            for name, share in self.shares(other).items() if self.most(other) else ():
                if name in used:
                    used[name] += number * share
        return all(share <= self.ahead + 1e-9 for share in used.values())

    def _total(self, name: str) -> float:
        return sum(node.resources.get(name, 0.0) for node in self.nodes)


def busiest(work: Mapping[str, float], room: Room) -> float:
    """Seconds until work, given by kind, is done at best: what is used most takes longest."""
    by_resource: dict[str, float] = {}
    for kind, seconds in work.items():
        for name, share in room.shares(kind).items():
            by_resource[name] = by_resource.get(name, 0.0) + seconds * share
    return max(by_resource.values(), default=0.0)


def on_lanes(execution: Execution, lanes: int, gpus: int = 0) -> Room:
    """A machine of which no more is known than how many one-CPU stages it runs at once, and its
    GPUs."""
    return Room(execution, [Node({"CPU": float(lanes), "GPU": float(gpus)})], lanes)
