"""What stages ask of machines, and which machines hold it. Plain numbers: no Ray here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from grid.execution import Execution, Resources
from victims.errors import UsageError

# Ray counts a node's accelerator as one of a resource of its name, and asks for a thousandth of it.
ACCELERATOR = "accelerator_type:"
ANY_SHARE = 0.001
# Kinds of stages that compute with a model.
ON_DEVICE = ("model", "gate", "defended", "measure")


class Node(NamedTuple):
    """What a machine has, or has left, by Ray's names, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = {}


class NodeType(NamedTuple):
    """Nodes that an autoscaler can start, and the most that it would; labels it does not tell."""

    name: str
    resources: Mapping[str, float]
    most: float


class Lack(NamedTuple):
    """What stages of a kind ask for and no node holds; the types of nodes that would, if any."""

    kind: str
    wants: Resources
    words: str
    types: tuple[str, ...] = ()


def bundle(wants: Resources) -> dict[str, float]:
    """What one process of a stage holds."""
    found = {"CPU": wants.cpus, "GPU": wants.gpus}
    if wants.memory_gb:
        found["memory"] = wants.memory_gb * 2**30
    if wants.accelerator:
        found[ACCELERATOR + wants.accelerator] = ANY_SHARE
    return found


def times(wants: Resources, node: Node) -> float:
    """How many processes of a stage a node holds at once."""
    if not all(selects(rule, node.labels.get(name)) for name, rule in wants.labels.items()):
        return 0
    asked = bundle(wants).items()
    # A float's floor loses one: five times 0.2 is in 1.
    shares = (math.floor(node.resources.get(k, 0.0) / v + 1e-6) for k, v in asked if v > 0)
    return min(shares, default=math.inf)


def places(wants: Resources, nodes: Iterable[Node]) -> float:
    """How many processes of a stage all nodes hold at once."""
    return sum(times(wants, node) for node in nodes)


def selects(rule: str, value: str | None) -> bool:
    """Whether a label passes ``value``, ``!value``, ``in(a, b)`` or ``!in(a, b)``.

    A node without the label passes the negative forms alone, as in Ray.
    """
    negative, listed = rule.startswith("!"), re.fullmatch(r"!?in\((.*)\)", rule)
    names = listed[1].split(",") if listed else [rule.removeprefix("!")]
    return (value in {name.strip() for name in names}) != negative


def asks(wants: Resources) -> str:
    """A request in words."""
    words = f"{wants.cpus:g} CPUs and {wants.gpus:g} GPUs"
    if "memory" in bundle(wants):
        words += f" and {wants.memory_gb:g} GiB"
    if wants.accelerator:
        words += f" of type {wants.accelerator}"
    if wants.labels:
        words += f" where {', '.join(f'{n} is {r}' for n, r in sorted(wants.labels.items()))}"
    return f"{wants.workers} workers of {words} each" if wants.workers > 1 else words


def holds(node: Node) -> str:
    """What a node has, in words."""
    has = node.resources
    types = [name.removeprefix(ACCELERATOR) for name in has if name.startswith(ACCELERATOR)]
    shown = f" ({', '.join(types)})" if types else ""
    labels = {n: v for n, v in node.labels.items() if not n.startswith("ray.io/")}
    told = f"; labels {', '.join(f'{n}={v}' for n, v in sorted(labels.items()))}" if labels else ""
    return (
        f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs{shown} and"
        f" {has.get('memory', 0) / 2**30:.1f} GiB{told}"
    )


def nearest(wants: Resources, nodes: Iterable[Node]) -> Node:
    """The node that comes closest to a request: by what is shortest there, then the largest."""
    asked = {name: number for name, number in bundle(wants).items() if number > 0}

    def size(node: Node) -> tuple[float, float, float]:
        has = node.resources
        shares = [min(1.0, has.get(name, 0.0) / number) for name, number in asked.items()]
        return min(shares, default=1.0), has.get("GPU", 0.0), has.get("CPU", 0.0)

    return max(nodes, key=size, default=Node({}))


def lacks(
    execution: Execution,
    kinds: Iterable[str],
    nodes: Sequence[Node],
    types: Sequence[NodeType] = (),
) -> Iterator[Lack]:
    """The kinds of stages that the nodes could not run even if they did nothing else."""
    for kind in kinds:
        wants, where = execution.resources_for(kind), f"execution.resources.{kind}"
        if execution.device == "cuda" and kind in ON_DEVICE and not wants.gpus:
            raise UsageError(
                f"execution.device is cuda, but stages of kind {kind!r} ask for no GPU."
                f" Give {where} (or execution.resources.default) gpus: 1, or device: auto."
            )
        there = places(wants, nodes)
        if there >= wants.workers:
            continue
        lack = f"the cluster holds {there:g} of them" if wants.workers > 1 else "no node has them"
        words = (
            f"stages of kind {kind!r} ask for {asks(wants)}, and {lack}; the largest has"
            f" {holds(nearest(wants, nodes))}. Change {where} in the grid file, or add such a node."
        )
        yield Lack(kind, wants, words, _startable(wants, there, types))


def _startable(wants: Resources, there: float, types: Sequence[NodeType]) -> tuple[str, ...]:
    """The types of nodes that hold a process of a stage, if enough of them can be started."""
    blind = replace(wants, labels={})
    each = {one.name: times(blind, Node(one.resources)) * one.most for one in types}
    found = tuple(name for name, number in each.items() if number > 0)
    return found if there + sum(each.values()) >= wants.workers else ()
