"""What a running cluster has for the stages of a grid, and may have; nothing runs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grid.cluster.joining import attach, load_ray
from grid.execution import Execution
from grid.machines import autoscales, node_types, nodes
from grid.needs import Lack, Node, lacks


class Offer(NamedTuple):
    """What a running cluster has for the stages of a grid, and may have."""

    nodes: list[Node]
    lacks: list[Lack]
    types: list[str]
    may_grow: bool

    @property
    def never(self) -> list[Lack]:
        """What nothing can hold: neither a node nor, if Ray knows them, one that may be started."""
        is_unknown = self.may_grow and not self.types
        return [] if is_unknown else [lack for lack in self.lacks if not lack.types]


def offer(execution: Execution, kinds: Sequence[str], address: str) -> Offer:
    """What a running cluster has for such stages; nothing runs there."""
    ray = load_ray()
    attach(ray, {"address": address, "log_to_driver": False, "logging_level": "error"})
    try:
        there, types = nodes(), node_types()
        found = list(lacks(execution, kinds, there, types))
        return Offer(there, found, [one.name for one in types], bool(types) or autoscales())
    finally:
        ray.shutdown()
