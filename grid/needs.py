"""What stages ask of machines, and which machines hold it. Plain numbers: no Ray here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from grid.spec import Resources

# Ray counts a node's accelerator as one of a resource of its name, and asks for a thousandth of it.
ACCELERATOR = "accelerator_type:"
ANY_SHARE = 0.001


class Node(NamedTuple):
    """What a machine has, or has left, by Ray's names, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = {}


def bundle(wants: Resources) -> dict[str, float]:
    """What one process of a stage holds; worker groups reserve no memory."""
    found = {"CPU": wants.cpus, "GPU": wants.gpus}
    if wants.memory_gb and wants.workers == 1:
        found["memory"] = wants.memory_gb * 2**30
    if wants.accelerator:
        found[ACCELERATOR + wants.accelerator] = ANY_SHARE
    return found


def times(wants: Resources, node: Node) -> float:
    """How many processes of a stage a node holds at once."""
    if not all(selects(rule, node.labels.get(name)) for name, rule in wants.labels.items()):
        return 0
    asked = bundle(wants).items()
    return min((node.resources.get(k, 0.0) // v for k, v in asked if v > 0), default=math.inf)


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
