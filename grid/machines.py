"""The machines of the Ray cluster that this process has joined: which there are, and asking each.

A question is a function of ours that runs once on every machine. It takes no CPU, so that it is
answered while others use the cluster, and an answer that does not come is an answer too.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from grid.needs import Node, NodeType

# What Ray calls the type of a machine that no autoscaler has started.
NO_TYPE = re.compile(r"node_[0-9a-f]+")

LOOK_SECONDS = 5.0


class Machine(NamedTuple):
    """A node of the cluster: its id in Ray, what people call it, the GPUs that it advertises, and
    whether it has CPUs for stages."""

    id: str
    name: str
    gpus: float
    runs_stages: bool = True


def _alive() -> list[dict[str, Any]]:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def machines() -> list[Machine]:
    """Every machine that is there now."""
    found = []
    for node in _alive():
        host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        gpus, cpus = (float(node["Resources"].get(unit, 0)) for unit in ("GPU", "CPU"))
        found.append(Machine(node["NodeID"], f"{host} ({address})", gpus, cpus > 0))
    return sorted(found, key=lambda machine: machine.name)


def nodes() -> list[Node]:
    """What every machine that is there has, whoever uses it."""
    return [Node(node["Resources"], node["Labels"]) for node in _alive()]


def node_types() -> list[NodeType]:
    """The nodes that an autoscaler says it can start; few autoscalers tell Ray."""
    import ray

    config = ray._private.state.state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return [
        NodeType(g.name, dict(g.resources), math.inf if g.max_count < 0 else g.max_count)
        for g in groups
    ]


def ask_each(
    asked: Sequence[Machine],
    question: Callable[..., Any],
    arguments: Mapping[str, tuple[Any, ...]],
    seconds: float,
) -> dict[str, Any]:
    """Machine -> its answer, or the exception that came instead; ``arguments`` are per machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(max_retries=0, num_cpus=0)(question)
    refs = {}
    for machine in asked:
        place = NodeAffinitySchedulingStrategy(machine.id, soft=False)
        refs[task.options(scheduling_strategy=place).remote(*arguments[machine.id])] = machine.id
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    for ref, name in refs.items():
        try:
            found[name] = ray.get(ref, timeout=max(0.0, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(ref, force=True)
            found[name] = TimeoutError(f"no answer in {seconds:.0f} s")
        except Exception as error:
            cause = getattr(error, "cause", None)
            found[name] = cause if isinstance(cause, Exception) else error
    return found


def map_on_cluster(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    look: Callable[[], None] = lambda: None,
    ahead: int = 2,
) -> Generator[Any]:
    """``function(*one)`` for each of the arguments, a CPU each; answers as they come.

    ``ahead`` times as many as there are CPUs are under way. One that a dying node took along runs
    again elsewhere. ``look`` is called every few seconds. Who stops asking for answers stops what
    runs.
    """
    import ray

    task: Any = ray.remote(max_retries=3, num_cpus=1)(function)
    waiting, running = iter(arguments), set[Any]()
    try:
        while True:
            there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            most = max(1, int(there.get("CPU", 1))) * ahead
            running |= {task.remote(*one) for one in islice(waiting, max(0, most - len(running)))}
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
            look()
            running -= set(done)
            for ref in done:
                try:
                    yield ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
    finally:
        for ref in running:
            ray.cancel(ref, force=True)


def autoscales() -> bool:
    """Whether something may add machines to the cluster: a launcher's autoscaler or KubeRay's."""
    from ray.experimental.internal_kv import _internal_kv_get

    if any(node["Labels"].get("ray.io/node-group") for node in _alive()):
        return True
    text = _internal_kv_get("__autoscaling_status")
    report = json.loads(text).get("autoscaler_report") if text else None
    types = (report or {}).get("node_type_mapping") or {}
    return any(NO_TYPE.fullmatch(name) is None for name in types.values())


def want(bundles: Sequence[tuple[Mapping[str, float], Mapping[str, str]]]) -> None:
    """Have the autoscaler keep machines that hold these bundles, each on a node with such labels;
    none takes the wish back."""
    from ray.autoscaler.sdk import request_resources

    labels = [dict(rules) for _, rules in bundles]
    selectors = labels if any(labels) else None
    request_resources(
        bundles=[dict(bundle) for bundle, _ in bundles], bundle_label_selectors=selectors
    )
