"""What runs stages: a Ray cluster, or this process alone, without Ray."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from grid.cluster.executor import RayExecutor
from grid.execution import Execution
from grid.room import on_lanes
from grid.stages import Stage
from grid.work import Outcome, choose_device, device_fault, execute
from victims.errors import GridError
from victims.recipe import Runtime


class SerialExecutor:
    """The same stages, one after another, in this process: for debugging, and without Ray.

    It takes the machine as it is: of ``execution.resources`` nothing holds here, neither what a
    stage asks for nor its ``limit_seconds``, for nobody is there to stop it.
    """

    owns_cluster = True
    start_seconds = 0.0
    lanes = 1

    def __init__(self, execution: Execution, store: str, runtime: Runtime, logs: str) -> None:
        device = choose_device(runtime.device, 1.0)
        self.room = on_lanes(execution, 1)
        self._context = (store, replace(runtime, device=device), logs)
        self._next: list[Stage] = []

    def warm(self) -> None:
        pass

    def check(self, stages: Sequence[Stage]) -> str | None:
        return device_fault(self._context[1].device)

    @property
    def running(self) -> int:
        return len(self._next)

    @property
    def begun(self) -> list[Stage]:
        return list(self._next)

    def starved(self) -> None:
        """Nobody else has its place."""

    def admits(self, kind: str) -> bool:
        return not self._next

    def submit(self, stage: Stage) -> None:
        self._next.append(stage)

    def stop(self, keys: Collection[str]) -> None:
        self._next = [stage for stage in self._next if stage.key not in keys]

    def poll(self, seconds: float) -> list[Outcome]:
        found = [execute(stage, *self._context) for stage in self._next]
        self._next.clear()
        if not found:
            time.sleep(min(seconds, 0.05))
        return found

    def close(self) -> None:
        self._next.clear()


Executor = RayExecutor | SerialExecutor


def start_executor(
    name: str, execution: Execution, store: str, runtime: Runtime, logs: str
) -> Executor:
    if name == "serial":
        return SerialExecutor(execution, store, runtime, logs)
    try:
        return RayExecutor(execution, store, runtime, logs)
    except ImportError as error:
        raise GridError(
            f"--executor ray needs ray[default,train,tune] ({error}); install it, or use"
            " --executor serial"
        ) from error
