"""Stages on Ray. The driver owns the order, Ray owns the machines, the store owns the results.

A stage on one device is a Ray Train run in local mode inside a warm task; a stage on several is a
Train worker group started by a launcher task. Both run the same code.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from grid.execution import Execution, Resources
from grid.machines import autoscales, node_types, nodes, want
from grid.needs import Lack, Node, asks, bundle, lacks, places
from grid.room import Room, on_lanes
from grid.stages import Stage
from grid.work import Ended, Outcome, choose_device, device_fault, execute
from victims.errors import GridError
from victims.pulse import beats
from victims.recipe import Runtime

# Ray's and Train's own defaults, unless the user has set the variable.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_CALLBACKS": "grid.cluster.ReservationGuard",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The thread of a trial that was ended has so long to go away before its actor is used again;
    # with Tune's own 2 seconds, on a busy machine, the trial that waits for it fails.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def _import_everything() -> None:
    """Start a lane's process and pay its imports, seconds of them, before there is work."""
    import open_clip  # noqa: F401
    import ray.train.torch  # noqa: F401


# What a call leaves in the cluster's key-value table: that it was given a place, and that its
# stage has begun, both with its process and host, of which a process that died says no more.
# Every process of the cluster reaches the table; log files need not be shared.
# While it works, how many signs of work there have been.
PLACED, BEGUN, PULSE = "placed", "begun", "pulse"
PULSE_SECONDS = 2.0


def _note(call: str, what: str, value: str = "") -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    with contextlib.suppress(Exception):  # a stage must not fail for want of a note
        _internal_kv_put(f"{call}/{what}", value.encode(), overwrite=True)


@contextlib.contextmanager
def _pulse(call: str) -> Iterator[None]:
    """Note now and then that the work goes on, as long as it does."""
    ended = threading.Event()

    def tell() -> None:
        seen = -1
        while not ended.wait(PULSE_SECONDS):
            if (now := beats()) != seen:
                seen = now
                _note(call, PULSE, str(now))

    _note(call, BEGUN, f"{os.getpid()} {socket.gethostname()}")
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _warm_task() -> Callable[[str, list[Any]], Outcome]:
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
        from grid.cluster import _on_assigned_device

        return _on_assigned_device(call, *ray.get(held[0]))

    return warm_task


def _local_run(call: str, stage: Stage, store: str, runtime: Runtime, logs: str) -> Outcome:
    """One stage as a Train run in local mode: the same function, in this very process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    found: list[Outcome] = []

    def train_fn() -> None:
        with _pulse(call):
            found.append(execute(stage, store, runtime, logs))

    TorchTrainer(train_fn, scaling_config=ScalingConfig(num_workers=0)).fit()
    return found[0]


def _on_assigned_device(
    call: str, stage: Stage, store: str, runtime: Runtime, logs: str
) -> Outcome:
    """The body of a warm task, on the device that Ray assigned to this call."""
    device = assigned_device(runtime)
    done = _local_run(call, stage, store, replace(runtime, device=device), logs)
    if done.ended is Ended.INFRASTRUCTURE and device.startswith("cuda"):
        _leave_a_lost_device(device)
    return done


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


def _in_worker_group(
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
    with _pulse(config["call"]):
        runtime = replace(runtime, device=device)
        done = execute(config["stage"], config["store"], runtime, config["logs"])
    plain = {name: getattr(done, name) for name in Outcome.__slots__}
    plain |= {"ended": done.ended.value, "made": list(done.made), "cost": dict(done.cost)}
    if done.ended is not Ended.OK:
        raise _RankEnded(f"{_RankEnded.OPEN}{json.dumps(plain)}{_RankEnded.CLOSE}")
    return plain


def _train_scratch(store: str) -> Path:
    if "://" in store:
        return Path(os.environ.get("TMPDIR", "/tmp")) / "backdoor-grid-train"  # noqa: S108
    return Path(store) / "train-scratch"


@cache
def _guard_class() -> type[Any]:
    """Gives back what a worker group reserved when its backend fails to start.

    Train tells its own cleaner about the reservation only after the backend is up, so a failing
    start would keep CPUs and GPUs until the driver ends. Loaded by name through the environment,
    since only such callbacks run before the backend is set up.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class Guard(ControllerCallback, WorkerGroupCallback):
        def __init__(self) -> None:
            self.handles: list[Any] = []

        def after_worker_group_start(self, worker_group: Any) -> None:
            state = worker_group._worker_group_state
            self.handles.append(state.placement_group_handle)

        async def before_controller_shutdown(self) -> None:
            for handle in self.handles:
                with contextlib.suppress(Exception):
                    handle.shutdown()

    # Found, and pickled, by the name under which Train imports it.
    Guard.__name__ = Guard.__qualname__ = GUARD
    return Guard


GUARD = "ReservationGuard"


def __getattr__(name: str) -> Any:
    """The guard derives from classes of Train's, so it exists once somebody asks for it."""
    if name == GUARD:
        return _guard_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Starved(NamedTuple):
    """Nothing of ours has a place: since how many seconds, and what is asked and what is free."""

    seconds: float
    words: str


@dataclass(slots=True)
class _Call:
    """A stage on its way: submitted, then given a place on some node, then begun."""

    name: str
    stage: Stage
    submitted: float
    placed: float | None = None
    begun: float | None = None
    pulse: bytes = b""
    beaten: float = 0.0


# Seconds within which a stage that was given a free place notes so, on a busy machine: a task's
# process has to start, and a worker group says nothing before its ranks have imported everything.
START_SECONDS, GROUP_START_SECONDS = 30.0, 60.0
# Within which a stage that has its place begins: imports over a slow network take a minute.
BEGIN_SECONDS = 600.0
# Where no place was free, it is certain after a moment that this is no start.
MOMENT = 5.0
LOOK_SECONDS = 0.5


class RayExecutor:
    """A bounded window of stages on a Ray cluster."""

    def __init__(self, execution: Execution, store: str, runtime: Runtime, logs: str) -> None:
        ray = _ray()
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
            _attach(ray, common)
        _protect_token()
        self._pending: dict[Any, _Call] = {}
        self._name = f"backdoor-grid/{uuid.uuid4().hex[:12]}"
        self._calls = itertools.count()
        self._looked = 0.0
        # Since when nothing of ours has had a place although something asks for one.
        self._starved: float | None = None
        self._had_room = False
        self._lanes = 1
        self._room: Room | None = None
        self._stale = 0.0
        # Whether an autoscaler was asked for a machine that holds what no node does.
        self._wishes = False
        noset = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        self._task = ray.remote(max_retries=0, max_calls=0)(_warm_task())
        self._on_gpu = {"runtime_env": {"env_vars": {**variables, **noset}}}
        self._launcher = ray.remote(max_retries=0)(_in_worker_group)
        self.start_seconds = time.perf_counter() - started

    def warm(self) -> None:
        """Pay the imports of every lane of a cluster of our own, as part of its start."""
        if not self.owns_cluster:
            return
        started = time.perf_counter()
        task = self._ray.remote(max_retries=0, num_cpus=1)(_import_everything)
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
            self._starved = None  # for a while nothing was asked for
        self._pending[ref] = _Call(call, stage, time.time())
        self._count_places()

    @property
    def running(self) -> int:
        return len(self._pending)

    @property
    def begun(self) -> list[Stage]:
        """The submitted stages that are known to have begun."""
        return [call.stage for call in self._pending.values() if call.begun is not None]

    def starved(self) -> Starved | None:
        """For how long others have held all that the submitted stages ask for, in words too.

        None while a stage of ours has a place, or could have one: a process takes time to start.
        """
        if not self._pending or self._starved is None:
            return None
        waited = time.monotonic() - self._starved
        kinds = {call.stage.kind for call in self._pending.values()}
        for lack in lacks(self.execution, sorted(kinds), self.room.nodes):
            return Starved(waited, lack.words)  # a node that held it was lost
        asked = {kind: self.execution.resources_for(kind) for kind in sorted(kinds)}
        is_group = any(wants.workers > 1 for wants in asked.values())
        grace = GROUP_START_SECONDS if is_group else START_SECONDS
        free = self._free()
        if waited < (grace if self._had_room else MOMENT) or self._has_room(free):
            return None
        told = "; ".join(f"stages of kind {k!r} ask for {asks(w)}" for k, w in asked.items())
        has = self._ray.cluster_resources()
        left = [
            f"{sum(node.resources.get(unit, 0) for node in free):g} of {has.get(unit, 0):g} {unit}s"
            for unit in ("CPU", "GPU")
        ]
        return Starved(
            waited, f"{told}, and others use what the cluster has: free are {' and '.join(left)}."
        )

    def _free(self) -> list[Node]:
        """What each node has to give now."""
        labels = {node["NodeID"]: node["Labels"] for node in self._ray.nodes()}
        free = self._ray._private.state.available_resources_per_node()
        return [Node(left, labels.get(name, {})) for name, left in free.items()]

    def _has_room(self, free: list[Node]) -> bool:
        """Whether any submitted stage fits in what is free."""
        kinds = {call.stage.kind for call in self._pending.values()}
        wants = [self.execution.resources_for(kind) for kind in kinds]
        return any(places(w, free) >= w.workers for w in wants)

    def _count_places(self) -> None:
        if any(call.placed is not None for call in self._pending.values()):
            self._starved = None
        elif self._pending:
            if self._starved is None:
                self._starved, self._had_room = time.monotonic(), False
            self._had_room = self._had_room or self._has_room(self._free())

    def _look(self) -> None:
        """Learn which stages have been given a place and which have begun."""
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

        self._looked = time.monotonic()
        notes = {note.decode() for note in _internal_kv_list(f"{self._name}/")}
        for call in self._pending.values():
            has_begun = f"{call.name}/{BEGUN}" in notes
            if has_begun and call.begun is None:
                call.begun = call.beaten = time.time()
            if f"{call.name}/{PULSE}" in notes:
                pulse = _internal_kv_get(f"{call.name}/{PULSE}") or b""
                if pulse != call.pulse:
                    call.pulse, call.beaten = pulse, time.time()
            if call.placed is None and (has_begun or f"{call.name}/{PLACED}" in notes):
                call.placed = time.time()
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
                **self._place(call),
            )
        finally:
            self._forget(call)

    def _place(self, call: _Call) -> dict[str, Any]:
        """The process and the host that a call was given, as far as it came to say so."""
        from ray.experimental.internal_kv import _internal_kv_get

        with contextlib.suppress(Exception):  # a cluster that is gone keeps no notes
            for what in (BEGUN, PLACED):
                if noted := _internal_kv_get(f"{call.name}/{what}"):
                    pid, _, host = noted.decode().partition(" ")
                    return {"pid": int(pid), "host": host}
        return {"pid": 0, "host": ""}

    def _overdue(self) -> list[Outcome]:
        """Stages past their limit, counted from when they began, not from their submission; and
        those that did not begin, or have shown no sign of work for too long, to be tried again."""
        ended, now = [], time.time()
        for ref, call in list(self._pending.items()):
            wants = self.execution.resources_for(call.stage.kind)
            where = f"execution.resources.{call.stage.kind}"
            if call.begun is None:
                if call.placed is None or now - call.placed <= BEGIN_SECONDS:
                    continue
                fate = Ended.INFRASTRUCTURE
                message = f"stopped: given a place, it did not begin in {now - call.placed:.0f} s"
            elif wants.limit_seconds is not None and now - call.begun > wants.limit_seconds:
                fate = Ended.METHOD
                message = (
                    f"stopped after its limit of {wants.limit_seconds:g} s; if it was not stuck,"
                    f" raise {where}.limit_seconds (or default) and run `grid retry GRID`"
                )
            elif now - call.beaten > wants.stall_seconds:
                fate = Ended.INFRASTRUCTURE
                message = (
                    f"stopped: no batch was read for {now - call.beaten:.0f} s; if it was not"
                    f" stuck, raise {where}.stall_seconds (or default)"
                )
            else:
                continue
            self._ray.cancel(ref, force=wants.workers == 1)
            del self._pending[ref]
            ended.append(
                Outcome(
                    key=call.stage.key,
                    ended=fate,
                    started=call.begun or call.submitted,
                    seconds=now - (call.begun or call.submitted),
                    message=message,
                    **self._place(call),
                )
            )
            self._forget(call)
        return ended

    def stop(self, keys: Collection[str]) -> None:
        """End these stages wherever they are; no outcome of theirs arrives."""
        for ref, call in list(self._pending.items()):
            if call.stage.key in keys:
                wants = self.execution.resources_for(call.stage.kind)
                with contextlib.suppress(Exception):  # it has just ended by itself
                    self._ray.cancel(ref, force=wants.workers == 1)
                del self._pending[ref]
                self._forget(call)

    def _forget(self, call: _Call) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        with contextlib.suppress(Exception):  # a cluster that is gone keeps no notes
            _internal_kv_del(f"{call.name}/", del_by_prefix=True)

    def close(self) -> None:
        for ref, call in self._pending.items():
            wants = self.execution.resources_for(call.stage.kind)
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=wants.workers == 1)
            self._forget(call)
        self._pending.clear()
        with contextlib.suppress(Exception):  # a cluster that is gone needs no machines
            self._wish([])
        self._ray.shutdown()


def _ray() -> Any:
    """Ray, with our defaults in the environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


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
    ray = _ray()
    _attach(ray, {"address": address, "log_to_driver": False, "logging_level": "error"})
    try:
        there, types = nodes(), node_types()
        found = list(lacks(execution, kinds, there, types))
        return Offer(there, found, [one.name for one in types], bool(types) or autoscales())
    finally:
        ray.shutdown()


def _attach(ray: Any, options: dict[str, Any]) -> None:
    """Join a cluster: the one whose address is among the options, or that RAY_ADDRESS names."""
    address = options.get("address") or os.environ["RAY_ADDRESS"]
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit() and "/" not in host:
            # Ray itself asks for minutes before it gives up.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        named = "RAY_ADDRESS=" if address == os.environ.get("RAY_ADDRESS") else ""
        without = "unset RAY_ADDRESS to run on this machine alone" if named else "leave it out"
        raise GridError(
            f"no Ray cluster answers at {named}{address} ({first}). Start it, correct the address,"
            f" or {without}."
        ) from error


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """This process as part of the cluster at an address, for work that is no grid's."""
    ray = _ray()
    variables = {name: os.environ[name] for name in ENVIRONMENT}
    options = {"log_to_driver": False, "logging_level": "error", "address": address}
    is_ours = not ray.is_initialized()
    if is_ours:
        _attach(ray, {**options, "runtime_env": {"env_vars": variables}})
        _protect_token()
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()


def _protect_token() -> None:
    """Ray writes its token readable by everyone; a Ray cluster is a shell."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.exists() and token.stat().st_mode & 0o077:
            token.chmod(0o600)


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
