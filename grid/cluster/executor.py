"""The stages of a grid on a Ray cluster: a bounded window of them is there at any time."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from grid.cluster.calls import Call
from grid.cluster.group import in_worker_group
from grid.cluster.joining import ENVIRONMENT, attach, load_ray, protect_token
from grid.cluster.notes import forget, notes, place
from grid.cluster.waiting import MOMENT, Starved, Waiting
from grid.cluster.warm import import_everything, warm_task
from grid.execution import Execution, Resources
from grid.machines import autoscales, nodes, want
from grid.needs import bundle, lacks
from grid.room import Room
from grid.stages import Stage
from grid.work import Ended, Outcome
from victims.recipe import Runtime

LOOK_SECONDS = 0.5


class RayExecutor:
    """A bounded window of stages on a Ray cluster."""

    def __init__(self, execution: Execution, store: str, runtime: Runtime, logs: str) -> None:
        ray = load_ray()
        self._ray: Any = ray
        self.execution = execution
        self._context = (store, runtime, logs)
        self.owns_cluster = not os.environ.get("RAY_ADDRESS")
        started = time.perf_counter()
        variables = {name: os.environ[name] for name in ENVIRONMENT}
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "error",
            "runtime_env": {"env_vars": variables},
        }
        if self.owns_cluster:
            groups = any(r.workers > 1 for r in execution.resources.values())
            cpus = max(execution.lanes or 0, os.cpu_count() or 1)
            # Train's clean-up of worker groups asks the dashboard; without groups it only costs.
            ray.init(address="local", num_cpus=cpus, include_dashboard=groups, **common)
        else:
            attach(ray, common)
        protect_token()
        self._pending: dict[Any, Call] = {}
        self._name = f"backdoor-grid/{uuid.uuid4().hex[:12]}"
        self._calls = itertools.count()
        self._looked = 0.0
        self._waiting = Waiting(ray)
        self._lanes = 1
        self._room: Room | None = None
        self._stale = 0.0
        # Whether an autoscaler was asked for a machine that holds what no node does.
        self._wishes = False
        noset = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        self._task = ray.remote(max_retries=0, max_calls=0)(warm_task())
        self._on_gpu = {"runtime_env": {"env_vars": {**variables, **noset}}}
        self._launcher = ray.remote(max_retries=0)(in_worker_group)
        self.start_seconds = time.perf_counter() - started

    def warm(self) -> None:
        """Pay the imports of every lane of a cluster of our own, as part of its start."""
        if not self.owns_cluster:
            return
        started = time.perf_counter()
        task = self._ray.remote(max_retries=0, num_cpus=1)(import_everything)
        with contextlib.suppress(Exception):  # the stages will say what is wrong
            self._ray.get([task.remote() for _ in range(self.lanes)])
        self.start_seconds += time.perf_counter() - started

    @property
    def lanes(self) -> int:
        """How many one-CPU stages the cluster holds now, unless the grid file says less."""
        if self._ray.is_initialized():
            cpus = int(self._ray.cluster_resources().get("CPU", 1))
            self._lanes = max(1, min(self.execution.lanes or cpus, cpus))
        return self._lanes

    @property
    def room(self) -> Room:
        """What the nodes hold that are there now, as of half a second ago."""
        now = time.monotonic()
        if self._room is None or self._room.execution is not self.execution or now > self._stale:
            is_bound = self.owns_cluster or self.execution.lanes is not None
            there = nodes() if self._ray.is_initialized() else ()
            lanes = self.execution.lanes
            self._room = Room(self.execution, there, lanes, ahead=1 if is_bound else 2)
            self._stale = now + LOOK_SECONDS
        return self._room

    def admits(self, kind: str) -> bool:
        """Whether one more stage of a kind may be submitted now."""
        return self.room.admits(kind, Counter(c.stage.kind for c in self._pending.values()))

    def check(self, stages: Sequence[Stage]) -> str | None:
        """What no node can hold now, in words; None when every stage fits somewhere.

        An autoscaler knows nothing of stages that wait, so it is asked for such a node.
        """
        kinds = [stage.kind for stage in stages]
        for lack in lacks(self.execution, kinds, nodes()):
            self._wish([lack.wants] * lack.wants.workers)
            return lack.words
        self._wish([])
        return None

    def _wish(self, wants: Sequence[Resources]) -> None:
        """Ask a cluster that grows for machines that hold these; or no longer."""
        if wants and not self.owns_cluster and autoscales():
            want([(bundle(one), one.labels) for one in wants])
            self._wishes = True
        elif self._wishes and not wants:
            want([])
            self._wishes = False

    def submit(self, stage: Stage) -> None:
        wants = self.execution.resources_for(stage.kind)
        memory = {"memory": int(wants.memory_gb * 2**30)} if wants.memory_gb else {}
        call = f"{self._name}/{next(self._calls)}"
        if wants.workers > 1:
            launcher = self._launcher.options(num_cpus=0.01, scheduling_strategy="SPREAD")
            ref = launcher.remote(call, stage, *self._context, wants)
        else:
            options: dict[str, Any] = {"num_cpus": wants.cpus, "num_gpus": wants.gpus, **memory}
            if wants.accelerator:
                options["accelerator_type"] = wants.accelerator
            if wants.labels:
                options["label_selector"] = dict(wants.labels)
            if wants.gpus:
                options |= self._on_gpu
            held = [self._ray.put((stage, *self._context))]
            ref = self._task.options(**options).remote(call, held)
        if not self._pending and time.monotonic() - self._looked > MOMENT:
            self._waiting.since = None  # for a while nothing was asked for
        self._pending[ref] = Call(call, stage, time.time())
        self._count_places()

    @property
    def running(self) -> int:
        return len(self._pending)

    @property
    def begun(self) -> list[Stage]:
        """The submitted stages that are known to have begun."""
        return [call.stage for call in self._pending.values() if call.begun is not None]

    def starved(self) -> Starved | None:
        """For how long others have held all that the submitted stages ask for, in words too."""
        return self._waiting.starved(
            self.execution, self._pending.values(), lambda: self.room.nodes
        )

    def _count_places(self) -> None:
        self._waiting.count(self.execution, self._pending.values())

    def _look(self) -> None:
        """Learn which stages have been given a place and which have begun."""
        self._looked = time.monotonic()
        left = notes(self._name)
        for call in self._pending.values():
            call.learn(left)
        self._count_places()

    def poll(self, seconds: float) -> list[Outcome]:
        """Outcomes that arrived within ``seconds``; a process that died is one of them."""
        if not self._pending:
            time.sleep(min(seconds, 0.05))
            return []
        refs = list(self._pending)
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        more, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        ended = dict.fromkeys([*ready, *more])
        if ended or time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        outcomes = [self._collect(ref) for ref in ended]
        self._count_places()
        return outcomes + self._overdue()

    def _collect(self, ref: Any) -> Outcome:
        call = self._pending.pop(ref)
        stage, submitted = call.stage, call.submitted
        try:
            outcome: Outcome = self._ray.get(ref)
            return outcome
        except Exception as error:
            # The task's own code classifies its errors, so what arrives here is the machine's.
            # Of an error in a task Ray shows the traceback; its last line says what it was.
            lines = str(error).strip().splitlines() or [""]
            is_remote = isinstance(error, self._ray.exceptions.RayTaskError)
            return Outcome(
                key=stage.key,
                ended=Ended.INFRASTRUCTURE,
                message=f"{type(error).__name__}: {lines[-1 if is_remote else 0]}",
                started=submitted,
                seconds=time.time() - submitted,
                **place(call.name),
            )
        finally:
            forget(call.name)

    def _overdue(self) -> list[Outcome]:
        """The stages that took too long, stopped."""
        ended, now = [], time.time()
        for ref, call in list(self._pending.items()):
            wants = self.execution.resources_for(call.stage.kind)
            found = call.overdue(wants, now)
            if found is None:
                continue
            self._ray.cancel(ref, force=wants.workers == 1)
            del self._pending[ref]
            ended.append(
                Outcome(
                    key=call.stage.key,
                    ended=found.ended,
                    started=call.begun or call.submitted,
                    seconds=now - (call.begun or call.submitted),
                    message=found.message,
                    **place(call.name),
                )
            )
            forget(call.name)
        return ended

    def stop(self, keys: Collection[str]) -> None:
        """End these stages wherever they are; no outcome of theirs arrives."""
        for ref, call in list(self._pending.items()):
            if call.stage.key in keys:
                wants = self.execution.resources_for(call.stage.kind)
                with contextlib.suppress(Exception):  # it has just ended by itself
                    self._ray.cancel(ref, force=wants.workers == 1)
                del self._pending[ref]
                forget(call.name)

    def close(self) -> None:
        for ref, call in self._pending.items():
            wants = self.execution.resources_for(call.stage.kind)
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=wants.workers == 1)
            forget(call.name)
        self._pending.clear()
        with contextlib.suppress(Exception):  # a cluster that is gone needs no machines
            self._wish([])
        self._ray.shutdown()
