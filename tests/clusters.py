"""A Ray cluster of three nodes for tests, executors on it, and what their stages leave.

A head without CPUs, a node with a CPU, and one with two CPUs and two GPUs that are declared and do
not exist.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grid.cluster.executor import RayExecutor
from grid.cluster.joining import attach
from grid.execution import Execution
from grid.stages import Stage
from grid.work import Outcome
from victims.recipe import Runtime
from victims.store import Store


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of the cluster."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(num_cpus=1, num_gpus=0)
        kind = {"accelerator_type:A100": 1}
        made.add_node(num_cpus=2, num_gpus=2, resources=kind, labels={"market": "spot"})
        yield made.address
    finally:
        ray.shutdown()
        made.shutdown()  # type: ignore[no-untyped-call]


Start = Callable[..., RayExecutor]


@pytest.fixture
def joined(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection to the cluster, which outlives its executors: so do the warm workers.

    A process that Ray starts needs seconds for its imports, and none serves another connection.
    """
    monkeypatch.setenv("RAY_ADDRESS", cluster)

    def attach_once(ray: Any, options: dict[str, Any]) -> None:
        if not ray.is_initialized():
            attach(ray, options)

    monkeypatch.setattr("ray.shutdown", lambda: None)
    for joiner in ("executor", "joining", "offer"):
        monkeypatch.setattr(f"grid.cluster.{joiner}.attach", attach_once)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process belongs to no cluster."""
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()


@pytest.fixture
def start(joined: None, tmp_path: Path) -> Iterator[Start]:
    """Executors on the cluster, closed at the end."""
    (tmp_path / "logs").mkdir()
    started: list[RayExecutor] = []

    def begin(store: Path | None = None, **options: Any) -> RayExecutor:
        uri, logs = str(store or tmp_path / "store"), str(tmp_path / "logs")
        executor = RayExecutor(Execution(**options), uri, Runtime(), logs)
        started.append(executor)
        return executor

    yield begin
    for executor in started:
        executor.close()


def finish(executor: RayExecutor, stages: Sequence[Stage], seconds: float = 200) -> list[Outcome]:
    """Submit them all and wait for their outcomes, in the order of the stages."""
    for stage in stages:
        executor.submit(stage)
    found: dict[str, Outcome] = {}
    end = time.monotonic() + seconds
    while executor.running:
        assert time.monotonic() < end, "the stages do not end"
        found |= {outcome.key: outcome for outcome in executor.poll(0.5)}
    return [found[stage.key] for stage in stages]


def note(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def weights(store: Path, key: str) -> torch.Tensor:
    """Every weight of a model in one vector."""
    found = load_file(Store(store).need(key).path("weights.safetensors"))
    return torch.cat([found[name].flatten().double() for name in sorted(found)])


def kill_raylet(node: Any) -> None:
    """End what holds a node of a cluster together, as a machine's failure would."""
    process = node.all_processes["raylet"][0].process
    process.kill()
    process.wait()  # a zombie would seem alive to its workers
