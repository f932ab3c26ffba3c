"""Stages on Ray. The driver owns the order, Ray owns the machines, the store owns the results.

A stage on one device is a Ray Train run in local mode inside a warm task; a stage on several is a
Train worker group started by a launcher task. Both run the same code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from grid.spec import Execution, Resources
from grid.stages import Stage
from grid.work import Ended, Outcome, choose_device, device_fault, execute
from victims.errors import GridError, UsageError
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
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# Kinds of stages that compute with a model.
ON_DEVICE = ("model", "gate", "defended", "measure")


def _import_everything() -> None:
    """Start a lane's process and pay its imports, seconds of them, before there is work."""
    import open_clip  # noqa: F401
    import ray.train.torch  # noqa: F401


def _local_run(stage: Stage, store: str, runtime: Runtime, logs: str) -> Outcome:
    """One stage as a Train run in local mode: the same function, in this very process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    found: list[Outcome] = []

    def train_fn() -> None:
        found.append(execute(stage, store, runtime, logs))

    TorchTrainer(train_fn, scaling_config=ScalingConfig(num_workers=0)).fit()
    return found[0]


def _on_assigned_device(stage: Stage, store: str, runtime: Runtime, logs: str) -> Outcome:
    """The body of a warm task. Its device is the one Ray assigned to this call.

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
    return _local_run(stage, store, replace(runtime, device=device), logs)


def _in_worker_group(
    stage: Stage, store: str, runtime: Runtime, logs: str, wants: Resources
) -> Outcome:
    """The body of a launcher task: a Train worker group of several ranks, then its outcome."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    on_gpu = wants.gpus > 0
    bundle = {"CPU": wants.cpus, **({"GPU": wants.gpus} if on_gpu else {})}
    scratch = _train_scratch(store) / f"{stage.key}-{uuid.uuid4().hex[:8]}"
    # Typed for the older generation of Train, which the installed one replaces at import.
    trainer: Any = cast("Any", TorchTrainer)(
        _rank,
        train_loop_config={"stage": stage, "store": store, "runtime": runtime, "logs": logs},
        scaling_config=ScalingConfig(
            num_workers=wants.workers, use_gpu=on_gpu, resources_per_worker=bundle
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
        found = _first_to_end(error.worker_failures.values())
        if found is None:
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Outcome(**{**found, "ended": Ended(found["ended"]), "made": tuple(found["made"])})


class _RankEnded(Exception):
    """A rank's stage did not end well. Its outcome travels as text between these marks."""

    OPEN, CLOSE = "<outcome>", "</outcome>"


def _first_to_end(failures: Iterable[BaseException]) -> dict[str, Any] | None:
    """What came first of the ranks' outcomes: later ones are ranks that it left alone."""
    mark = re.compile(f"{_RankEnded.OPEN}(.*?){_RankEnded.CLOSE}", re.DOTALL)
    texts = [match[1] for error in failures if (match := mark.search(str(error)))]
    found = [json.loads(text) for text in texts]
    return min(found, key=lambda f: f["started"] + f["seconds"], default=None)


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
    done = execute(
        config["stage"], config["store"], replace(runtime, device=device), config["logs"]
    )
    plain = {name: getattr(done, name) for name in Outcome.__slots__}
    plain |= {"ended": done.ended.value, "made": list(done.made), "cost": dict(done.cost)}
    if done.ended is not Ended.OK:
        raise _RankEnded(f"{_RankEnded.OPEN}{json.dumps(plain)}{_RankEnded.CLOSE}")
    return plain


def _train_scratch(store: str) -> Path:
    if "://" in store:
        return Path(os.environ.get("TMPDIR", "/tmp")) / "backdoor-grid-train"  # noqa: S108
    return Path(store) / "train-scratch"


def _times(bundle: dict[str, float], node: dict[str, float]) -> float:
    """How often a node that is free holds a bundle."""
    return min((node.get(k, 0.0) // v for k, v in bundle.items() if v > 0), default=math.inf)


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


class RayExecutor:
    """A bounded window of stages on a Ray cluster."""

    def __init__(self, execution: Execution, store: str, runtime: Runtime, logs: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

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
        self._pending: dict[Any, tuple[Stage, float]] = {}
        self._lanes = 1
        noset = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        self._task = ray.remote(max_retries=0, max_calls=0)(_on_assigned_device)
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
    def window(self) -> int:
        return self.lanes if self.owns_cluster else 2 * self.lanes

    def check(self, stages: Sequence[Stage]) -> str | None:
        """What no node can hold now, in words; None when every stage fits somewhere."""
        nodes = [n["Resources"] for n in self._ray.nodes() if n["Alive"]]
        for stage in stages:
            wants = self.execution.resources_for(stage.kind)
            where = f"execution.resources.{stage.kind}"
            if self.execution.device == "cuda" and stage.kind in ON_DEVICE and not wants.gpus:
                raise UsageError(
                    f"execution.device is cuda, but stages of kind {stage.kind!r} ask for no GPU."
                    f" Give {where} (or execution.resources.default) gpus: 1, or device: auto."
                )
            bundle = {"CPU": wants.cpus, "GPU": wants.gpus}
            if wants.memory_gb and wants.workers == 1:
                bundle["memory"] = wants.memory_gb * 2**30
            places = sum(_times(bundle, node) for node in nodes)
            if places >= wants.workers:
                continue
            asks = f"{wants.cpus:g} CPUs and {wants.gpus:g} GPUs"
            if "memory" in bundle:
                asks += f" and {wants.memory_gb:g} GiB"
            best: dict[str, float] = max(
                nodes, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), default={}
            )
            has = (
                f"the largest has {best.get('CPU', 0):g} CPUs, {best.get('GPU', 0):g} GPUs and"
                f" {best.get('memory', 0) / 2**30:.1f} GiB"
            )
            lack = "no node has them"
            if wants.workers > 1:
                asks = f"{wants.workers} workers of {asks} each"
                lack = f"the cluster holds {places:g} of them"
            return (
                f"stages of kind {stage.kind!r} ask for {asks}, and {lack}; {has}. Change {where}"
                " in the grid file, or add such a node."
            )
        return None

    def submit(self, stage: Stage) -> None:
        wants = self.execution.resources_for(stage.kind)
        memory = {"memory": int(wants.memory_gb * 2**30)} if wants.memory_gb else {}
        if wants.workers > 1:
            launcher = self._launcher.options(num_cpus=0.01, scheduling_strategy="SPREAD")
            ref = launcher.remote(stage, *self._context, wants)
        else:
            options: dict[str, Any] = {"num_cpus": wants.cpus, "num_gpus": wants.gpus, **memory}
            if wants.gpus:
                options |= self._on_gpu
            ref = self._task.options(**options).remote(stage, *self._context)
        self._pending[ref] = (stage, time.time())

    @property
    def running(self) -> int:
        return len(self._pending)

    def poll(self, seconds: float) -> list[Outcome]:
        """Outcomes that arrived within ``seconds``; a process that died is one of them."""
        if not self._pending:
            time.sleep(min(seconds, 0.05))
            return []
        refs = list(self._pending)
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=seconds)
        more, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        outcomes = [self._collect(ref) for ref in dict.fromkeys([*ready, *more])]
        return outcomes + self._overdue()

    def _collect(self, ref: Any) -> Outcome:
        stage, submitted = self._pending.pop(ref)
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
                host="",
                pid=0,
            )

    def _overdue(self) -> list[Outcome]:
        """Stages past their limit, counted from the first line that they wrote themselves."""
        ended = []
        for ref, (stage, submitted) in list(self._pending.items()):
            wants = self.execution.resources_for(stage.kind)
            if wants.limit_seconds is None:
                continue
            started = _start_mark(Path(self._context[2]) / f"{stage.key}.log", stage.key)
            # An earlier attempt's mark says nothing about one that still waits for its turn.
            if started < int(submitted):
                continue
            if time.time() - started > wants.limit_seconds:
                self._ray.cancel(ref, force=wants.workers == 1)
                del self._pending[ref]
                ended.append(
                    Outcome(
                        key=stage.key,
                        ended=Ended.METHOD,
                        started=started,
                        host="",
                        pid=0,
                        seconds=time.time() - started,
                        message=f"stopped after its limit of {wants.limit_seconds:g} s; raise"
                        f" execution.resources.{stage.kind}.limit_seconds if it was not stuck",
                    )
                )
        return ended

    def close(self) -> None:
        for ref, (stage, _) in self._pending.items():
            with contextlib.suppress(Exception):
                self._ray.cancel(ref, force=self.execution.resources_for(stage.kind).workers == 1)
        self._ray.shutdown()


def _attach(ray: Any, options: dict[str, Any]) -> None:
    """Join the cluster that RAY_ADDRESS names."""
    host, colon, port = os.environ["RAY_ADDRESS"].rpartition(":")
    try:
        if colon and port.isdigit() and "/" not in host:
            # Ray itself asks for minutes before it gives up.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise GridError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({first}). Start"
            " it, correct the address, or unset RAY_ADDRESS to run on this machine alone."
        ) from error


def _start_mark(log: Path, key: str) -> float:
    """When the latest attempt wrote its first line, in seconds since 1970; 0 without one."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return 0.0
    marks = re.findall(rf"^(\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d) {key} \(", text, re.MULTILINE)
    return time.mktime(time.strptime(marks[-1], "%Y-%m-%dT%H:%M:%S")) if marks else 0.0


def _protect_token() -> None:
    """Ray writes its token readable by everyone; a Ray cluster is a shell."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.exists() and token.stat().st_mode & 0o077:
            token.chmod(0o600)


class SerialExecutor:
    """The same stages, one after another, in this process: for debugging, and without Ray."""

    owns_cluster = True
    start_seconds = 0.0
    lanes = 1
    window = 1

    def __init__(self, execution: Execution, store: str, runtime: Runtime, logs: str) -> None:
        device = choose_device(runtime.device, 1.0)
        self._context = (store, replace(runtime, device=device), logs)
        self._next: list[Stage] = []

    def warm(self) -> None:
        pass

    def check(self, stages: Sequence[Stage]) -> str | None:
        return device_fault(self._context[1].device)

    @property
    def running(self) -> int:
        return len(self._next)

    def submit(self, stage: Stage) -> None:
        self._next.append(stage)

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
