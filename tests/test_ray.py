"""Stages on a real Ray: placement, warm workers, limits, worker groups, interruption.

One cluster of three nodes serves the file (tests/clusters.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from grid.cluster.group import _judged, _rank, _RankEnded
from grid.execution import Execution, Resources
from grid.executors import start_executor
from grid.filters import parse_filter
from grid.machines import autoscales, machines
from grid.planning import make_plan
from grid.preflight import check_machines
from grid.run import Driver
from grid.stage_order import parents
from grid.work import Ended, Outcome, execute
from tests.clusters import Start, finish, note, weights
from tests.grids import RECIPE, TINY, call, numbers, records, run_serial, tiny_grid, write_grid_file
from tests.processes import wait_for, worker_of
from tests.stages import Note
from victims.errors import GridError, UsageError
from victims.recipe import Runtime
from victims.store import Store

pytestmark = pytest.mark.slow


def test_stages_run_on_nodes_that_hold_them_in_warm_workers(start: Start, tmp_path: Path) -> None:
    executor = start(resources={"gate": Resources(gpus=1)})
    assert not executor.owns_cluster
    assert executor.lanes == 3
    nodes = {n["NodeID"]: n["Resources"] for n in executor._ray.nodes() if n["Alive"]}
    first = [Note(f"a{i}", str(tmp_path), seconds=1.0) for i in range(3)]
    outcomes = finish(executor, first)
    assert {o.ended for o in outcomes} == {Ended.OK}
    ran = [note(tmp_path, s.name) for s in first]
    # Three sleepers at once fill both worker nodes; none goes to the head, which has no CPU.
    assert sorted(nodes[r["node"]]["CPU"] for r in ran) == [1, 2, 2]
    assert len({r["pid"] for r in ran}) == 3
    assert {r["device"] for r in ran} == {"cpu"}
    # Later stages find a process that has everything imported.
    second = [Note(f"b{i}", str(tmp_path)) for i in range(4)]
    finish(executor, second)
    assert {note(tmp_path, s.name)["pid"] for s in second} <= {r["pid"] for r in ran}
    # A stage that wants a GPU goes where there is one, and is told which.
    on_gpu = Note("c", str(tmp_path), kind="gate")
    (outcome,) = finish(executor, [on_gpu])
    assert outcome.ended is Ended.OK
    found = note(tmp_path, "c")
    assert nodes[found["node"]]["GPU"] == 2
    assert len(found["gpus"]) == 1
    # An error in a stage's own code is the method's, with its place in the log.
    (failed,) = finish(executor, [Note("d", str(tmp_path), error="no tea left")])
    assert (failed.ended, failed.message) == (Ended.METHOD, "ValueError: no tea left")


def test_waiting_for_stages_of_our_own_is_no_reason_to_give_up(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grid.cluster.waiting.START_SECONDS", 0.0)
    executor = start(resources={"gate": Resources(gpus=2)})
    first = Note("first", str(tmp_path), seconds=4, kind="gate")
    second = Note("second", str(tmp_path), kind="gate")
    for stage in (first, second):
        executor.submit(stage)
        wait_for(lambda: not executor.poll(0.1) and executor.begun == [first])
    ended: list[Outcome] = []
    while not ended:
        assert executor.begun == [first]
        assert executor.starved() is None
        ended = executor.poll(0.2)
    assert ended[0].key == first.key
    finish(executor, [])


def test_a_stage_past_its_limit_is_stopped_and_a_waiting_one_is_not(
    start: Start, tmp_path: Path
) -> None:
    """The limit counts from when a stage begins, not from when it was submitted."""
    limit = {"gate": Resources(gpus=2, limit_seconds=3)}
    executor = start(resources=limit)
    stuck = Note("stuck", str(tmp_path), seconds=300, kind="gate")
    queued = Note("queued", str(tmp_path), kind="gate")
    began = time.monotonic()
    ended, after = finish(executor, [stuck, queued])
    assert ended.ended is Ended.METHOD
    assert "stopped after its limit of 3 s" in ended.message
    # The limit is in no key: the same command alone would find the failure settled.
    assert "raise execution.resources.gate.limit_seconds (or default)" in ended.message
    assert "run `grid retry GRID`" in ended.message
    assert after.ended is Ended.OK
    assert time.monotonic() - began < 150, "long before the 300 s that it would have slept"


def test_a_stage_that_has_a_place_and_does_not_begin_is_tried_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grid.cluster.calls.BEGIN_SECONDS", 5.0)
    executor = start()
    executor.submit(Note("stuck", str(tmp_path), seconds=60))
    (call_,) = executor._pending.values()
    assert executor._overdue() == []
    call_.placed = time.time() - 6
    (outcome,) = executor._overdue()
    assert outcome.ended is Ended.INFRASTRUCTURE
    assert "given a place, it did not begin in 6 s" in outcome.message
    assert executor.running == 0


def test_a_node_that_was_lost_is_not_said_to_be_used_by_others(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = start(resources={"gate": Resources(gpus=8)})
    executor.submit(Note("never", str(tmp_path), kind="gate"))
    starved = executor.starved()
    assert starved is not None
    assert "1 CPUs and 8 GPUs, and no node has them" in starved.words
    assert "others use" not in starved.words


WANTS: list[tuple[Resources, str]] = [
    (Resources(cpus=3), "3 CPUs and 0 GPUs, and no node has them"),
    (Resources(gpus=3), "1 CPUs and 3 GPUs, and no node has them"),
    (Resources(cpus=2, gpus=0.5, memory_gb=1e6), "1e+06 GiB, and no node has them"),
    (Resources(workers=4), "4 workers of 1 CPUs and 0 GPUs each, and the cluster holds 3 of them"),
    (Resources(workers=3, gpus=1), "the cluster holds 2 of them"),
]


def test_what_no_node_holds_is_said_at_once(start: Start, tmp_path: Path) -> None:
    stage = Note("a", str(tmp_path), kind="model")
    executor = start()
    assert executor.check([stage]) is None
    for wants, says in WANTS:
        executor.execution = Execution(resources={"model": wants})
        said = executor.check([stage])
        assert said is not None
        assert says in said
        assert "execution.resources.model" in said
        executor.execution = Execution(resources={"defended": wants})
        assert executor.check([stage]) is None
    executor.execution = Execution(resources={"model": Resources(workers=3)})
    assert executor.check([stage]) is None
    executor.execution = Execution(device="cuda")
    with pytest.raises(UsageError, match=r"execution\.resources\.model .*gpus: 1"):
        executor.check([stage])


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="the declared GPUs are there")
def test_every_node_is_asked_and_the_one_without_its_gpus_is_named(
    start: Start, tmp_path: Path
) -> None:
    start()
    said: list[str] = []
    store = tmp_path / "store"
    (fault,) = check_machines(str(store), said.append)
    (named,) = [machine for machine in machines() if machine.gpus]
    assert fault.startswith(f"node {named.name}: advertises 2 GPUs, and torch finds")
    assert len(machines()) == 3
    assert said == []
    assert [path.name for path in store.iterdir()] == ["store.json"]
    assert not autoscales()


# Stages that wait for a gate's verdict ask in time as well: not once hours have gone into it.
NEVER: list[tuple[str, dict[str, Any], str, str]] = [
    ("rate=0.1", {"model": {"gpus": 4}}, "1 CPUs and 4 GPUs, and no node has them", "2 GPUs"),
    (
        "rate=0.1",
        {"model": {"workers": 3, "gpus": 1}},
        "3 workers of 1 CPUs and 1 GPUs each, and the cluster holds 2 of them",
        "2 GPUs",
    ),
    (
        "rate=0.1 defense=finetune",
        {"measure": {"cpus": 3}},
        "3 CPUs and 0 GPUs, and no node has them",
        "2 CPUs",
    ),
]


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("only", "resources", "asked", "largest"),
    [
        pytest.param(*NEVER[0], id="GPUs", marks=pytest.mark.exhaustive),
        pytest.param(*NEVER[1], id="workers", marks=pytest.mark.exhaustive),
        pytest.param(*NEVER[2], id="gated"),
    ],
)
def test_a_shared_cluster_is_waited_for(
    tmp_path: Path, only: str, resources: dict[str, Any], asked: str, largest: str
) -> None:
    execution = {**TINY["execution"], "wait_seconds": 3, "resources": resources}
    said: list[str] = []
    options: dict[str, Any] = {"only": parse_filter(only), "say": said.append}
    grid, out, store = tiny_grid(tmp_path, execution=execution), tmp_path / "out", tmp_path / "s"
    began = time.monotonic()
    with pytest.raises(GridError, match=rf"ask for {asked}.*waited \d s of 3"):
        Driver(grid, out, Store(store), **options).run()
    assert 3 <= time.monotonic() - began < 30
    assert said[0].startswith(f"waiting for resources: stages of kind {next(iter(resources))!r}")
    assert re.search(rf"the largest has [^;]*{largest}", said[0])
    assert "Giving up after 3 s" in said[0]
    assert records(out, "rows") == []


ASKED: dict[str, Any] = {
    "gate": {"gpus": 1, "accelerator": "H100"},
    "corpus": {"cpus": 3},
    "defended": {"workers": 3, "gpus": 1},
    "measure": {"memory_gb": 1e6},
    "model": {"gpus": 4},
    "poisoned": {"labels": {"market": "owned"}},
    "trigger": {"labels": {"market": "spot"}},
}


def planned(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> tuple[int, Any]:
    """What `grid plan` says about a cluster, and its exit code."""
    store = ("--store", file.parent / "store", "--out", file.parent / "out")
    done = call(capsys, "plan", file, "--json", *store, *words)
    assert done.err == ""
    return done.code, json.loads(done.out).get("cluster")


@pytest.mark.usefixtures("joined")
def test_a_plan_says_what_no_node_of_a_cluster_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execution = {**TINY["execution"], "resources": ASKED}
    file = write_grid_file(tmp_path / "much", execution=execution)
    code, found = planned(capsys, file)
    assert (code, found["nodes"], found["may_grow"]) == (1, 3, False)
    assert set(found["never"]) == set(found["lacks"]) == ASKED.keys() - {"trigger"}
    assert (
        "3 CPUs and 0 GPUs, and no node has them; the largest has 2 CPUs"
        in (found["lacks"]["corpus"])
    )
    assert "the cluster holds 2 of them" in found["lacks"]["defended"]
    shown = call(capsys, "plan", file, "--store", tmp_path / "store")
    assert shown.code == 1
    assert "  never: stages of kind 'model' ask for 1 CPUs and 4 GPUs, and no node" in shown.out
    # Four stages at a time on two GPUs; a GPU per stage would be there, four CPUs are not.
    code, shared = planned(capsys, file, "--on", "shared-gpu")
    assert (code, shared["lacks"]) == (0, {})
    assert set(planned(capsys, file, "--on", "gpu")[1]["never"]) >= {"model", "defended"}
    little = write_grid_file(tmp_path / "little")
    assert planned(capsys, little)[1]["lacks"] == {}
    shown = call(capsys, "plan", little, "--store", tmp_path / "store")
    assert (shown.code, "3 nodes; there is a place for every stage" in shown.out) == (0, True)
    assert not (tmp_path / "store").exists(), "nothing runs"


@pytest.mark.usefixtures("joined")
def test_nodes_that_an_autoscaler_can_start_are_places(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import ClusterConfig  # type: ignore[attr-defined]

    def told(*groups: dict[str, Any]) -> None:
        """What autoscalers say to Ray, as they say it."""
        gcs.report_cluster_config(ClusterConfig(node_group_configs=groups).SerializeToString())

    gcs: Any = GcsClient(address=cluster)
    resources = {"model": {"gpus": 4}, "gate": {"cpus": 64}}
    execution = {**TINY["execution"], "resources": resources}
    file = write_grid_file(tmp_path, execution=execution)
    try:
        told({"name": "large", "resources": {"CPU": 8, "GPU": 4}, "max_count": 3})
        code, found = planned(capsys, file)
        assert (code, found["may_grow"], found["node_types"]) == (1, True, ["large"])
        assert (found["startable"], found["never"]) == ({"model": ["large"]}, ["gate"])
        told({"name": "huge", "resources": {"CPU": 64, "GPU": 8}, "max_count": -1})
        shown = call(capsys, "plan", file, "--store", tmp_path / "store")
        assert shown.code == 0
        assert shown.out.count("Its autoscaler can start huge.") == 2
    finally:
        told()


@pytest.mark.exhaustive
def test_stages_that_others_keep_waiting_are_told_and_given_up(
    start: Start, tmp_path: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run once waited for ever, and said that what waits was running."""
    resources = {"model": {"gpus": 1}}
    execution = {**TINY["execution"], "wait_seconds": 8, "resources": resources}
    grid = tiny_grid(tmp_path / "in", execution=execution)
    store = tmp_path / "store"
    shutil.copytree(calm / "store", store)
    plan = make_plan(grid)
    only = parse_filter("rate=0.1 defense=none")
    (cell,) = [c for c in plan.cells if only.matches(c.cell)]
    victim = cell.measure.defended.victim
    for key in (victim.key, *(stage.key for stage in cell.stages)):
        Store(store).discard(key, "to be made again")
    executor = start(store, resources={"model": Resources(gpus=1)})
    monkeypatch.setattr("grid.scheduler.start_executor", lambda *options: executor)
    sleeper = executor._ray.remote(num_gpus=2, num_cpus=0)(lambda: time.sleep(300))
    held = sleeper.remote()
    wait_for(lambda: executor._ray.available_resources().get("GPU", 0) == 0)
    said: list[str] = []
    shown: list[list[str]] = []
    monkeypatch.setattr(
        "grid.run.Progress.update", lambda self, **now: shown.append(now["running"])
    )
    began = time.monotonic()
    driver = Driver(grid, tmp_path / "out", Store(store), plan=plan, only=only, say=said.append)
    with pytest.raises(
        GridError, match=r"free are \d of 3 CPUs and 0 of 2 GPUs.* No stage"
    ) as ended:
        driver.run()
    assert 8 <= time.monotonic() - began < 200
    assert ended.value.code == 1
    assert "\n" not in str(ended.value)
    assert "execution.wait_seconds: 8" in str(ended.value)
    told = "waiting for resources: stages of kind 'model' ask for 1 CPUs and 1 GPUs"
    assert len([line for line in said if line.startswith("waiting for")]) == 1, said
    assert said[-1].startswith(told)
    assert not any("plain_clip" in running for running in shown)
    assert victim.key not in Store(store)
    assert records(tmp_path / "out", "rows") == []
    executor._ray.cancel(held, force=True)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished serial run of the tiny grid."""
    folder = tmp_path_factory.mktemp("calm")
    run_serial(tiny_grid(folder), folder / "out", folder / "store")
    return folder


def losses(store: Path, key: str) -> dict[str, list[float]]:
    """The curves of a fit by their names, epoch by epoch."""
    text = Store(store).need(key).path("curves.json").read_text()
    epochs: list[dict[str, float]] = json.loads(text)
    return {name: [epoch[name] for epoch in epochs] for name in epochs[0]}


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_train_the_models_that_one_trains(
    workers: int, start: Start, calm: Path, tmp_path: Path
) -> None:
    """The victim and its repair: equal keys, equal rows, curves and weights to rounding."""
    grid, store = tiny_grid(tmp_path), tmp_path / "store"
    shutil.copytree(calm / "store", store)
    label = "badnet/0.1/finetune/s0"
    (cell,) = [c for c in make_plan(grid).cells if c.cell.label == label]
    defended, victim = cell.measure.defended, cell.measure.defended.victim
    repaired = defended_model(store, defended.key)
    assert victim.init is not None
    begun = {victim.key: victim.init.key, repaired: victim.key}
    for key in (cell.measure.key, defended.key, repaired, victim.key):
        Store(store).discard(key, "to be made again")
    group = Resources(workers=workers, cpus=0.5)
    executor = start(store, resources={"model": group, "defended": group})
    for stage in (victim, defended, cell.measure):
        (outcome,) = finish(executor, [stage])
        assert outcome.ended is Ended.OK, outcome.message
    assert defended_model(store, defended.key) == repaired
    for key, before in begun.items():
        alone, together = (losses(where, key) for where in (calm / "store", store))
        assert alone.keys() == together.keys() >= {"clip", "steps"}
        for name, curve in alone.items():
            assert together[name] == pytest.approx(curve, rel=1e-4), name
        here, there, first = (
            weights(calm / "store", key),
            weights(store, key),
            weights(calm / "store", before),
        )
        # Relative to how far the fit went. Single weights may differ: where the gradient is zero
        # but for rounding, AdamW makes a step of its sign.
        assert (there - here).norm() < 0.02 * (here - first).norm()
    plan = make_plan(grid)
    assert plan.cells[0].key == make_plan(tiny_grid(calm)).cells[0].key, "workers are in no key"
    mine, calm_ones = (
        pq.read_table(_samples(where, cell.measure.key)) for where in (store, calm / "store")
    )
    assert mine.num_rows == calm_ones.num_rows


def _samples(store: Path, key: str) -> Path:
    return Store(store).need(key).path("samples.parquet")


def defended_model(store: Path, key: str) -> str:
    return str(Store(store).need(key).meta["model_key"])


def test_what_a_failing_rank_said_arrives(tmp_path: Path) -> None:
    """Ranks that fail raise, so that no other waits for them; the first to end says why."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    failures = []
    for name in ("first", "second"):
        stage = Note(name, str(tmp_path), error=f"no tea in the {name} cup", needs_ray=False)
        config = {"stage": stage, "store": str(tmp_path / "s"), "runtime": Runtime(), "logs": ""}
        config["call"] = f"test/{name}"
        with pytest.raises(_RankEnded) as ended:
            _rank(config)
        text = "".join(traceback.format_exception(ended.value))
        failures.append(UserExceptionWithTraceback(ended.value, text))
    found = _judged({0: failures[1], 1: failures[0]})
    assert found is not None
    assert found["message"] == "ValueError: no tea in the first cup"
    assert Ended(found["ended"]) is Ended.METHOD
    # A rank that died without a word: what the others say may be because of it.
    found = _judged({0: failures[0], 1: RuntimeError("the actor is dead")})
    assert found is not None
    assert Ended(found["ended"]) is Ended.INFRASTRUCTURE
    assert found["message"].startswith("rank 1 of the worker group died (ValueError: no tea in")
    assert _judged({0: RuntimeError("the machine is gone")}) is None


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_rank_that_dies_costs_the_work_since_the_last_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    """The survivor's "connection reset" once counted as the method's failure, for good."""
    workers = {"workers": 2, "cpus": 0.5}
    grid = tiny_grid(
        tmp_path,
        recipes={**TINY["recipes"], "victim": {**RECIPE, "epochs": 12}},
        execution={
            **TINY["execution"],
            # After every step: of spaced saves the last may lie in the first epoch.
            "checkpoint_seconds": 0,
            "resources": {"model": workers},
        },
    )
    only = parse_filter("rate=0.1 defense=none")
    plan = make_plan(grid)
    (cell,) = [c for c in plan.cells if only.matches(c.cell)]
    victim = cell.measure.defended.victim
    # What does not rest on the victim is there; a worker group trains it, twice.
    rests_on_it = {victim.key}
    for stage in plan.missing([*cell.stages, *plan.gates[cell.group].stages], set()).values():
        if rests_on_it.isdisjoint([stage.key, *(parent.key for parent in parents(stage))]):
            execute(stage, str(tmp_path / "store"), Runtime(), "")
        else:
            rests_on_it.add(stage.key)
    calm, killed = tmp_path / "calm-store", tmp_path / "killed-store"
    shutil.copytree(tmp_path / "store", calm)
    shutil.copytree(tmp_path / "store", killed)
    executor = start(calm, resources={"model": Resources(workers=2, cpus=0.5)})
    (outcome,) = finish(executor, [victim])
    assert outcome.ended is Ended.OK, outcome.message
    executor.close()

    out, said = tmp_path / "out", list[str]()
    log = out / "logs" / f"{victim.key}.log"
    saved = killed / "partial" / victim.key / "fit.safetensors"

    def kill() -> None:
        wait_for(lambda: saved.exists() and " epoch 2/" in log.read_text())
        os.kill(worker_of(log), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = Driver(grid, out, Store(killed), plan=plan, only=only, say=said.append).run()
    killer.join()
    assert report.counts == {"ok": 1}, said
    assert any(" will be tried again: " in line for line in said)
    tried = Counter(a["outcome"] for a in records(out, "attempts") if a["key"] == victim.key)
    assert tried == {"ok": 1, "failed_infrastructure": 1}
    # One of each rank: what was saved after the first epoch did not run again.
    assert log.read_text().count(" epoch 1/") == 2
    assert torch.equal(weights(killed, victim.key), weights(calm, victim.key))
    run_serial(grid, tmp_path / "calm", calm, only=only)
    assert numbers(out) == numbers(tmp_path / "calm")


@pytest.mark.exhaustive
def test_a_backend_that_fails_gives_back_what_it_reserved(start: Start, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("NCCL starts on this machine")
    executor = start(resources={"model": Resources(workers=2, gpus=1)})
    (outcome,) = finish(executor, [Note("a", str(tmp_path), kind="model")])
    assert outcome.ended is Ended.INFRASTRUCTURE
    assert "nccl" in outcome.message.lower(), outcome.message
    wait_for(lambda: executor._ray.available_resources().get("GPU", 0) == 2, 15)


@pytest.mark.usefixtures("apart")
def test_an_address_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(GridError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        start_executor("ray", Execution(), str(tmp_path), Runtime(), "")


@pytest.mark.usefixtures("apart")
def test_a_plan_asks_the_cluster_that_is_named_and_none_besides(
    cluster: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execution = {**TINY["execution"], "resources": {"model": {"gpus": 4}}}
    file = write_grid_file(tmp_path, execution=execution)
    assert planned(capsys, file) == (0, None)
    code, found = planned(capsys, file, "--cluster", cluster)
    assert (code, found["address"], found["never"]) == (1, cluster, ["model"])
    nobody = call(capsys, "plan", file, "--cluster", "127.0.0.1:1")
    assert nobody.code == 1
    assert nobody.err.startswith("grid: no Ray cluster answers at 127.0.0.1:1 (")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    stale = call(capsys, "plan", file)
    assert stale.code == 0, "of the environment's cluster, which is gone, it only warns"
    assert "caution: RAY_ADDRESS: no Ray cluster answers" in stale.out
    monkeypatch.delenv("RAY_ADDRESS")
    wrong = call(capsys, "plan", file, "--cluster", "http://127.0.0.1:8265")
    assert (wrong.code, "expected HOST:PORT" in wrong.err) == (2, True)
    new = call(capsys, "plan", file, "--cluster", "local")
    assert (new.code, "that starts a cluster here" in new.err) == (2, True)


# Clusters of our own.


@pytest.mark.exhaustive
@pytest.mark.usefixtures("apart")
def test_a_gpu_that_is_not_there_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid_file(
        tmp_path, execution={**TINY["execution"], "resources": {"model": {"gpus": 8}}}
    )
    began = time.monotonic()
    done = call(capsys, "run", file, "--out", tmp_path / "out", "--store", tmp_path / "store")
    assert done.code == 1
    assert time.monotonic() - began < 60
    assert "stages of kind 'model' ask for 1 CPUs and 8 GPUs, and no node has them" in done.err
    assert "execution.resources.model" in done.err
    assert records(tmp_path / "out", "rows") == []
