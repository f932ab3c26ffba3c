"""What a cluster gives and what it does to stages: shares of GPUs, chosen nodes, hangs, lost nodes.

After every fault the numbers are those of a calm run, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grid.execution import Resources
from grid.filters import parse_filter
from grid.plan import Plan
from grid.planning import make_plan
from grid.run import Driver
from grid.spec import Grid
from grid.stage_order import parents
from grid.stages import DefendStage, Stage
from grid.work import Ended, execute
from tests.clusters import Start, finish, kill_raylet, note, weights
from tests.grids import RECIPE, TINY, numbers, outcomes, records, run_serial, tiny_grid
from tests.processes import alive, descendants, name_of, wait_for, worker_of
from tests.stages import Hanging, Note, Spill, Spilling, turned
from victims.recipe import Runtime
from victims.store import Store

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(600)]

ONLY = parse_filter("rate=0.1 defense=none")


def test_small_stages_share_gpus_and_no_more_run_than_fit(start: Start, tmp_path: Path) -> None:
    executor = start(resources={"gate": Resources(gpus=0.5, cpus=0.25)})
    stages = [Note(f"half{i}", str(tmp_path), seconds=4, kind="gate") for i in range(6)]
    finish(executor, stages)
    ran = [note(tmp_path, stage.name) for stage in stages]
    # Four at once: two on each GPU. The other two waited for their places.
    assert Counter(gpu for r in ran[:4] for gpu in r["gpus"]) == {0: 2, 1: 2}
    assert all(len(r["gpus"]) == 1 for r in ran)
    spans = [(r["began"], r["ended"]) for r in ran]
    together = max(sum(b <= begin < e for b, e in spans) for begin, _ in spans)
    assert together == 4


def test_stages_go_where_labels_and_the_type_of_gpu_say(start: Start, tmp_path: Path) -> None:
    executor = start(
        resources={
            "gate": Resources(labels={"market": "spot"}, cpus=0.25),
            "model": Resources(labels={"market": "!spot"}, cpus=0.25),
            "measure": Resources(gpus=0.25, cpus=0.25, accelerator="A100"),
        }
    )
    kinds = ("gate", "model", "measure")
    stages = [Note(f"{kind}{i}", str(tmp_path), kind=kind) for kind in kinds for i in range(2)]
    assert {o.ended for o in finish(executor, stages)} == {Ended.OK}
    nodes = {n["NodeID"]: n["Resources"].get("GPU", 0) for n in executor._ray.nodes()}
    for stage in stages:
        gpus = nodes[note(tmp_path, stage.name)["node"]]
        assert gpus == (0 if stage.kind == "model" else 2), stage.name
    executor.execution = type(executor.execution)(
        resources={"gate": Resources(gpus=1, accelerator="H100")}
    )
    said = executor.check(stages)
    assert said is not None
    assert (
        "1 GPUs of type H100, and no node has them; the largest has 2 CPUs, 2 GPUs (A100)" in said
    )


def test_a_stage_that_hangs_is_stopped_and_one_that_works_is_not(
    start: Start, tmp_path: Path
) -> None:
    """Slow is not hung: signs of work count, not the seconds since the beginning."""
    executor = start(resources={"gate": Resources(gpus=0.5, stall_seconds=6)})
    hung = Note("hung", str(tmp_path), seconds=300, kind="gate")
    slow = Note("slow", str(tmp_path), seconds=14, beats=True, kind="gate")
    ended, worked = finish(executor, [hung, slow])
    assert ended.ended is Ended.INFRASTRUCTURE
    assert "no batch was read for" in ended.message
    assert "execution.resources.gate.stall_seconds" in ended.message
    assert worked.ended is Ended.OK


def test_a_stage_without_memory_fails_alone(start: Start, tmp_path: Path) -> None:
    executor = start()
    full, other = Spill("full", str(tmp_path)), Note("other", str(tmp_path), seconds=1)
    out_of_memory, fine = finish(executor, [full, other])
    assert out_of_memory.ended is Ended.INFRASTRUCTURE
    assert out_of_memory.message.startswith("MemoryError")
    assert fine.ended is Ended.OK


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished serial run of the tiny grid."""
    folder = tmp_path_factory.mktemp("calm")
    run_serial(tiny_grid(folder), folder / "out", folder / "store")
    return folder


REPAIRED = "badnet/0.1/finetune/s0"


def run_with(into: type[DefendStage], folder: Path, calm: Path, **resources: Any) -> None:
    """The tiny grid from a store without its repairs, where one of the repairs is trouble."""
    shutil.copytree(calm / "store", folder / "store")
    asked = {**TINY["execution"], "resources": {"defended": resources}}
    plan = make_plan(tiny_grid(folder, execution=asked))
    for cell in plan.cells:
        defended = cell.measure.defended
        if defended.defense.name == "finetune":
            for stage in (defended, cell.measure):
                Store(folder / "store").discard(stage.key, "to be made again")
        if cell.cell.label == REPAIRED:
            plan.stages[defended.key] = turned(defended, into)
    store = Store(folder / "store")
    Driver(plan.grid, folder / "out", store, plan=plan, say=lambda line: None).run()


@pytest.mark.usefixtures("joined")
def test_out_of_memory_is_the_outcome_of_its_cell_alone(tmp_path: Path, calm: Path) -> None:
    run_with(Spilling, tmp_path, calm)
    found = outcomes(tmp_path / "out")
    assert found[REPAIRED]["status"] == "failed_infrastructure"
    assert "MemoryError" in found[REPAIRED]["detail"]
    assert found[REPAIRED]["attempts"] == 3
    assert {row["status"] for name, row in found.items() if name != REPAIRED} == {"ok"}
    mine = numbers(tmp_path / "out")
    others = {k: v for k, v in numbers(calm / "out").items() if k[0] != found[REPAIRED]["cell"]}
    assert {k: v for k, v in mine.items() if k[0] != found[REPAIRED]["cell"]} == others


@pytest.mark.usefixtures("joined")
def test_a_cell_whose_defense_hangs_once_has_the_numbers_of_a_calm_run(
    tmp_path: Path, calm: Path
) -> None:
    run_with(Hanging, tmp_path, calm, stall_seconds=6)
    assert outcomes(tmp_path / "out")[REPAIRED]["attempts"] == 2
    assert numbers(tmp_path / "out") == numbers(calm / "out")
    (hung,) = [a for a in records(tmp_path / "out", "attempts") if a["outcome"] != "ok"]
    assert "no batch was read for" in hung["error"]


# --- faults in the middle of a fit


class Scene:
    """A victim that trains for seconds, everything before it made, and what a calm fit gives."""

    def __init__(self, folder: Path, **resources: Any) -> None:
        self.folder = folder
        self.grid: Grid = tiny_grid(
            folder,
            recipes={**TINY["recipes"], "victim": {**RECIPE, "epochs": 24}},
            execution={
                **TINY["execution"],
                # After every step: of spaced saves the last may lie in the first epoch.
                "checkpoint_seconds": 0,
                "resources": {"model": resources},
            },
        )
        self.plan: Plan = make_plan(self.grid)
        (cell,) = [c for c in self.plan.cells if ONLY.matches(c.cell)]
        self.victim: Stage = cell.measure.defended.victim
        self.out, self.store = folder / "out", folder / "store"
        rests_on_it = {self.victim.key}
        wanted = [*cell.stages, *self.plan.gates[cell.group].stages]
        for stage in self.plan.missing(wanted, set()).values():
            if rests_on_it.isdisjoint([stage.key, *(parent.key for parent in parents(stage))]):
                done = execute(stage, str(self.store), Runtime(), "")
                assert done.ended is Ended.OK, done.message
            else:
                rests_on_it.add(stage.key)
        self.calm = folder / "calm-store"
        shutil.copytree(self.store, self.calm)
        self.log = self.out / "logs" / f"{self.victim.key}.log"
        self.said: list[str] = []

    def is_under_way(self) -> bool:
        saved = self.store / "partial" / self.victim.key / "fit.safetensors"
        return saved.exists() and self.log.exists() and " epoch 2/" in self.log.read_text()

    def run(self, fault: Any) -> None:
        """Run the cell; ``fault`` strikes in the middle of the fit."""
        found: list[BaseException] = []

        def strike() -> None:
            try:
                wait_for(self.is_under_way, 200)
                fault()
            except BaseException as error:
                found.append(error)

        striker = threading.Thread(target=strike)
        striker.start()
        driver = Driver(
            self.grid, self.out, Store(self.store), plan=self.plan, only=ONLY, say=self.said.append
        )
        report = driver.run()
        striker.join()
        assert not found, found
        assert report.counts == {"ok": 1}, self.said

    def is_what_a_calm_run_gives(self) -> None:
        run_serial(self.grid, self.folder / "calm", self.calm, only=ONLY)
        key = self.victim.key
        assert torch.equal(weights(self.store, key), weights(self.calm, key))
        assert numbers(self.out) == numbers(self.folder / "calm")

    def tried(self) -> Counter[str]:
        attempts = records(self.out, "attempts")
        return Counter(a["outcome"] for a in attempts if a["key"] == self.victim.key)

    def worker(self) -> int:
        return worker_of(self.log)

    def node_of(self, cluster: Any) -> Any:
        """The node on which the victim trains."""
        (node,) = [
            node
            for node in cluster.worker_nodes
            if self.worker() in descendants(node.all_processes["raylet"][0].process.pid)
        ]
        return node

    def went_on_elsewhere(self) -> None:
        """One attempt failed, the next did not begin again, and no number tells."""
        assert self.tried() == {"ok": 1, "failed_infrastructure": 1}, self.said
        assert self.log.read_text().count(" epoch 1/") == 1
        first, second = re.findall(r"process (\d+) of ", self.log.read_text())
        pids = {
            a["outcome"]: a["pid"]
            for a in records(self.out, "attempts")
            if a["key"] == self.victim.key
        }
        assert pids == {"failed_infrastructure": int(first), "ok": int(second)}
        self.is_what_a_calm_run_gives()


@pytest.mark.usefixtures("joined")
def test_a_train_controller_that_dies(tmp_path: Path) -> None:
    """What the next controller goes on from gives the weights of a group that nobody disturbed."""
    scene = Scene(tmp_path, workers=2, cpus=0.5)

    def kill() -> None:
        # The head's own children are the raylets; the controller is below one of them.
        found = [pid for pid in descendants(os.getpid()) if "TrainController" in name_of(pid)]
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    scene.run(kill)
    assert scene.tried() == {"ok": 1, "failed_infrastructure": 1}, scene.said
    # One of each rank: what was saved after the first epoch did not run again.
    assert scene.log.read_text().count(" epoch 1/") == 2
    # A group rounds otherwise than one process: the calm run is one of a group as well.
    options: dict[str, Any] = {"plan": scene.plan, "only": ONLY, "say": lambda line: None}
    Driver(scene.grid, tmp_path / "calm", Store(scene.calm), **options).run()
    key = scene.victim.key
    assert torch.equal(weights(scene.store, key), weights(scene.calm, key))
    assert numbers(scene.out) == numbers(tmp_path / "calm")


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of its own, of which a node is lost: a head without CPUs and two nodes."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, num_gpus=0)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()  # type: ignore[no-untyped-call]


def test_a_node_that_is_lost(fragile: Any, tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.run(lambda: fragile.remove_node(scene.node_of(fragile), allow_graceful=False))
    scene.went_on_elsewhere()


def test_a_raylet_that_is_killed(fragile: Any, tmp_path: Path) -> None:
    """What it had started ends without it, and does not compute on beside the new attempt."""
    scene, left = Scene(tmp_path), dict[int, str]()

    def kill() -> None:
        node = scene.node_of(fragile)
        found = descendants(node.all_processes["raylet"][0].process.pid)
        kill_raylet(node)
        left.update({pid: born for pid, born in found.items() if pid in alive(found)})

    scene.run(kill)
    scene.went_on_elsewhere()
    wait_for(lambda: not alive(left))
