"""Gives back what a worker group reserved when its backend fails to start.

Train tells its own cleaner about the reservation only after the backend is up, so a failing start
would keep CPUs and GPUs until the driver ends. Loaded by name through the environment, since only
such callbacks run before the backend is set up.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback


class ReservationGuard(ControllerCallback, WorkerGroupCallback):
    def __init__(self) -> None:
        self.handles: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        state = worker_group._worker_group_state
        self.handles.append(state.placement_group_handle)

    async def before_controller_shutdown(self) -> None:
        for handle in self.handles:
            with contextlib.suppress(Exception):
                handle.shutdown()
