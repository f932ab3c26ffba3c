"""A stage on several devices: a Ray Train worker group, started by a launcher task."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from grid.cluster.notes import pulse
from grid.execution import Resources
from grid.stages import Stage
from grid.work import Ended, Outcome, execute
from victims.recipe import Runtime


def in_worker_group(
    call: str, stage: Stage, store: str, runtime: Runtime, logs: str, wants: Resources
) -> Outcome:
    """The body of a launcher task: a Train worker group of several ranks, then its outcome."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.config import FailureConfig, RunConfig
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    on_gpu = wants.gpus > 0
    held = {"CPU": wants.cpus, **({"GPU": wants.gpus} if on_gpu else {})}
    if wants.memory_gb:
        held["memory"] = int(wants.memory_gb * 2**30)
    scratch = _train_scratch(store) / f"{stage.key}-{uuid.uuid4().hex[:8]}"
    # Typed for the older generation of Train, which the installed one replaces at import.
    trainer: Any = cast("Any", TorchTrainer)(
        _rank,
        train_loop_config={
            "call": call,
            "stage": stage,
            "store": store,
            "runtime": runtime,
            "logs": logs,
        },
        scaling_config=cast("Any", ScalingConfig)(
            num_workers=wants.workers,
            use_gpu=on_gpu,
            resources_per_worker=held,
            accelerator_type=wants.accelerator,
            label_selector=dict(wants.labels) or None,
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name=scratch.name,
            storage_path=str(scratch),
            # A group that failed is the driver's to try again: it counts and records attempts.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )
    try:
        found = trainer.fit().return_value
    except WorkerGroupError as error:
        found = _judged(error.worker_failures)
        if found is None:
            raise
    except ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        # Its turn did not come. That is no attempt: the driver asks again, or gives up waiting.
        return Outcome(key=stage.key, ended=Ended.BUSY, message=str(error.controller_failure))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Outcome(**{**found, "ended": Ended(found["ended"]), "made": tuple(found["made"])})


def _rank(config: dict[str, Any]) -> dict[str, Any]:
    """What every rank runs. Plain values come back, of rank 0.

    A rank that does not end well raises, so that no other waits for it in a collective.
    """
    import torch

    runtime: Runtime = config["runtime"]
    device = runtime.device
    if device == "auto":
        device = "cpu"
        if torch.distributed.get_backend() == "nccl":
            device = f"cuda:{torch.cuda.current_device()}"
    with pulse(config["call"]):
        runtime = replace(runtime, device=device)
        done = execute(config["stage"], config["store"], runtime, config["logs"])
    plain = {name: getattr(done, name) for name in Outcome.__slots__}
    plain |= {"ended": done.ended.value, "made": list(done.made), "cost": dict(done.cost)}
    if done.ended is not Ended.OK:
        raise _RankEnded(f"{_RankEnded.OPEN}{json.dumps(plain)}{_RankEnded.CLOSE}")
    return plain


class _RankEnded(Exception):
    """A rank's stage did not end well. Its outcome travels as text between these marks."""

    OPEN, CLOSE = "<outcome>", "</outcome>"


def _judged(failures: Mapping[int, BaseException]) -> dict[str, Any] | None:
    """What became of a group that failed, from the ranks that did; None when none says anything.

    What came first counts: later ones are ranks that it left alone. A rank that says nothing has
    died, and what its death did to the others is the machine's fault, whatever they call it.
    """
    mark = re.compile(f"{_RankEnded.OPEN}(.*?){_RankEnded.CLOSE}", re.DOTALL)
    said = {rank: mark.search(str(error)) for rank, error in failures.items()}
    found = [json.loads(text[1]) for text in said.values() if text]
    first: dict[str, Any] | None = min(
        found, key=lambda f: f["started"] + f["seconds"], default=None
    )
    silent = [rank for rank, text in said.items() if text is None]
    if first is None or not silent:
        return first
    message = f"rank {silent[0]} of the worker group died ({first['message']} on another rank)"
    return {**first, "ended": Ended.INFRASTRUCTURE.value, "message": message}


def _train_scratch(store: str) -> Path:
    if "://" in store:
        return Path(os.environ.get("TMPDIR", "/tmp")) / "backdoor-grid-train"  # noqa: S108
    return Path(store) / "train-scratch"
