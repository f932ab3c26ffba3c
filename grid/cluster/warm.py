"""A stage on one device: a Ray Train run in local mode inside a warm task."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grid.cluster.notes import pulse
from grid.stages import Stage
from grid.work import Ended, Outcome, choose_device, execute
from victims.recipe import Runtime


def import_everything() -> None:
    """Start a lane's process and pay its imports, seconds of them, before there is work."""
    import open_clip  # noqa: F401
    import ray.train.torch  # noqa: F401


def warm_task() -> Callable[[str, list[Any]], Outcome]:
    """What a warm task runs. It notes its place before the imports, which may take many seconds.

    A function within a function travels by value, and its arguments as a reference within a list,
    which Ray hands over unopened: to receive them imports nothing of ours.
    """

    def warm_task(call: str, held: list[Any]) -> Outcome:
        import contextlib
        import os
        import socket

        import ray
        from ray.experimental.internal_kv import _internal_kv_put

        with contextlib.suppress(Exception):
            where = f"{os.getpid()} {socket.gethostname()}"
            _internal_kv_put(f"{call}/placed", where.encode())
        from grid.cluster.warm import _on_assigned_device

        return _on_assigned_device(call, *ray.get(held[0]))

    return warm_task


def _on_assigned_device(
    call: str, stage: Stage, store: str, runtime: Runtime, logs: str
) -> Outcome:
    """The body of a warm task, on the device that Ray assigned to this call."""
    device = assigned_device(runtime)
    done = _local_run(call, stage, store, replace(runtime, device=device), logs)
    if done.ended is Ended.INFRASTRUCTURE and device.startswith("cuda"):
        _leave_a_lost_device(device)
    return done


def _local_run(call: str, stage: Stage, store: str, runtime: Runtime, logs: str) -> Outcome:
    """One stage as a Train run in local mode: the same function, in this very process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    found: list[Outcome] = []

    def train_fn() -> None:
        with pulse(call):
            found.append(execute(stage, store, runtime, logs))

    TorchTrainer(train_fn, scaling_config=ScalingConfig(num_workers=0)).fit()
    return found[0]


def assigned_device(runtime: Runtime) -> str:
    """The device that Ray assigned to the call or actor that asks.

    A warm process keeps the CUDA devices it saw first, so the device is chosen by its position
    among all of them and not by changing what is visible.
    """
    import ray

    assigned = ray.get_gpu_ids()
    device = choose_device(runtime.device, float(len(assigned)))
    if device == "cuda" and not assigned:
        device = "cpu"  # `check` has seen to it that no stage that uses a model comes here
    if device == "cuda":
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        mine = str(assigned[0])
        device = f"cuda:{visible.index(mine) if mine in visible else int(assigned[0])}"
    return device


def _leave_a_lost_device(device: str) -> None:
    """End this process if its CUDA context met an error: each later call in it would fail.

    The driver sees a dead worker and tries again in a new one; the stage's log says why.
    """
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        os._exit(1)
