"""For how long others have held all that the submitted stages ask for.

Waiting for stages of our own is no such time, nor is the time that a process takes to start where
there was a free place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from grid.cluster.calls import Call
from grid.execution import Execution
from grid.needs import Node, asks, lacks, places

# Seconds within which a stage that was given a free place notes so, on a busy machine: a task's
# process has to start, and a worker group says nothing before its ranks have imported everything.
START_SECONDS, GROUP_START_SECONDS = 30.0, 60.0
# Where no place was free, it is certain after a moment that this is no start.
MOMENT = 5.0


class Starved(NamedTuple):
    """Nothing of ours has a place: since how many seconds, and what is asked and what is free."""

    seconds: float
    words: str


class Waiting:
    """Since when nothing of ours has had a place although something asks for one."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.since: float | None = None
        self._had_room = False

    def count(self, execution: Execution, calls: Collection[Call]) -> None:
        """Begin to wait, go on, or wait no longer, by whether a call has a place."""
        if any(call.placed is not None for call in calls):
            self.since = None
        elif calls:
            if self.since is None:
                self.since, self._had_room = time.monotonic(), False
            self._had_room = self._had_room or _has_room(execution, calls, self._free())

    def starved(
        self,
        execution: Execution,
        calls: Collection[Call],
        nodes: Callable[[], Sequence[Node]],
    ) -> Starved | None:
        """For how long others have held all that the calls ask for, in words too.

        None while one of them has a place, or could have one: a process takes time to start.
        """
        if not calls or self.since is None:
            return None
        waited = time.monotonic() - self.since
        kinds = sorted({call.stage.kind for call in calls})
        for lack in lacks(execution, kinds, nodes()):
            return Starved(waited, lack.words)  # a node that held it was lost
        asked = {kind: execution.resources_for(kind) for kind in kinds}
        is_group = any(wants.workers > 1 for wants in asked.values())
        grace = GROUP_START_SECONDS if is_group else START_SECONDS
        free = self._free()
        if waited < (grace if self._had_room else MOMENT) or _has_room(execution, calls, free):
            return None
        told = "; ".join(f"stages of kind {k!r} ask for {asks(w)}" for k, w in asked.items())
        has = self._ray.cluster_resources()
        left = [
            f"{sum(node.resources.get(unit, 0) for node in free):g} of {has.get(unit, 0):g} {unit}s"
            for unit in ("CPU", "GPU")
        ]
        return Starved(
            waited, f"{told}, and others use what the cluster has: free are {' and '.join(left)}."
        )

    def _free(self) -> list[Node]:
        """What each node has to give now."""
        labels = {node["NodeID"]: node["Labels"] for node in self._ray.nodes()}
        free = self._ray._private.state.available_resources_per_node()
        return [Node(left, labels.get(name, {})) for name, left in free.items()]


def _has_room(execution: Execution, calls: Collection[Call], free: list[Node]) -> bool:
    """Whether any of the calls fits in what is free."""
    kinds = {call.stage.kind for call in calls}
    wants = [execution.resources_for(kind) for kind in kinds]
    return any(places(w, free) >= w.workers for w in wants)
