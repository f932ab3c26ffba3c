"""How many stages of which kind are handed to a cluster: numbers, no Ray."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from grid.execution import Execution, Resources
from grid.needs import Node
from grid.room import Room, busiest, on_lanes
from victims.errors import UsageError

CPU_NODE = Node({"CPU": 8.0, "memory": 32.0 * 2**30})
GPU_NODE = Node({"CPU": 8.0, "GPU": 4.0, "memory": 64.0 * 2**30})
HEAD = Node({"CPU": 0.0})


def room(*nodes: Node, lanes: int | None = None, ahead: int = 1, **resources: Any) -> Room:
    return Room(Execution(resources=resources), nodes, lanes, ahead)


def filled(place: Room, *kinds: str) -> Counter[str]:
    """What is on its way once no stage of these kinds is admitted, asked in turn."""
    pending: Counter[str] = Counter()
    while any(place.admits(kind, pending) for kind in kinds):
        for kind in kinds:
            pending[kind] += place.admits(kind, pending)
    return pending


def test_a_machine_is_full_when_its_cpus_are() -> None:
    assert filled(room(CPU_NODE, HEAD), "corpus", "measure").total() == 8
    assert filled(room(CPU_NODE, lanes=3), "corpus", "measure").total() == 3
    assert filled(room(CPU_NODE, ahead=2), "corpus", "measure").total() == 16
    halves = room(CPU_NODE, default=Resources(cpus=0.5))
    assert filled(halves, "corpus") == {"corpus": 16}
    whole = room(CPU_NODE, model=Resources(cpus=5), corpus=Resources(cpus=3))
    assert filled(whole, "model", "corpus") == {"model": 1, "corpus": 1}


def test_stages_for_cpus_do_not_keep_gpus_idle() -> None:
    place = room(GPU_NODE, CPU_NODE, defended=Resources(gpus=0.5))
    pending = Counter(corpus=16)
    # No CPU is free, but a stage that asks for one waits in Ray's own queue no longer than needed.
    assert not place.admits("corpus", pending)
    free = room(GPU_NODE, CPU_NODE, defended=Resources(gpus=0.5, cpus=0))
    assert free.admits("defended", pending)
    assert filled(free, "defended", "corpus") == {"defended": 8, "corpus": 16}


def test_fractions_of_a_gpu_are_counted_by_node() -> None:
    """Of 0.75 of a GPU each node of two GPUs holds two, though the sum would hold five."""
    nodes = [Node({"CPU": 64.0, "GPU": 1.0})] * 4
    assert filled(room(*nodes, model=Resources(gpus=0.75)), "model") == {"model": 4}


def test_memory_and_labels_bound_too() -> None:
    assert filled(room(CPU_NODE, model=Resources(memory_gb=20)), "model") == {"model": 1}
    spot = Node({"CPU": 2.0}, {"market": "spot"})
    place = room(CPU_NODE, spot, model=Resources(labels={"market": "spot"}))
    assert filled(place, "model") == {"model": 2}


def test_groups_count_all_their_workers() -> None:
    place = room(GPU_NODE, GPU_NODE, model=Resources(gpus=1, workers=4), gate=Resources(gpus=1))
    assert place.most("model") == 2
    assert filled(place, "model") == {"model": 2}
    assert place.admits("gate", Counter(model=1))
    assert not place.admits("gate", Counter(model=2))


def test_one_of_a_kind_that_nothing_holds_is_asked_for_and_blocks_nobody() -> None:
    """A node with GPUs was lost: its stages wait, the others go on."""
    place = room(CPU_NODE, model=Resources(gpus=1))
    assert place.most("model") == 0
    assert filled(place, "model", "corpus") == {"model": 1, "corpus": 8}
    nothing = room(HEAD)
    assert filled(nothing, "corpus") == {"corpus": 1}


@pytest.mark.parametrize("resources", [{}, {"default": Resources(cpus=0)}])
def test_a_stage_that_asks_for_nothing_is_bounded_all_the_same(resources: dict[str, Any]) -> None:
    place = room(CPU_NODE, **resources)
    assert 8 <= filled(place, "corpus").total() <= 64
    assert busiest({"corpus": 64.0}, place) > 0


def test_the_time_that_is_left_is_that_of_what_is_used_most() -> None:
    place = room(GPU_NODE, CPU_NODE, defended=Resources(gpus=1, cpus=1))
    # 400 s of GPU stages on 4 GPUs, 160 s of others on 16 CPUs.
    assert busiest({"defended": 400.0, "measure": 160.0}, place) == pytest.approx(100)
    assert busiest({"defended": 40.0, "measure": 1600.0}, place) == pytest.approx(1640 / 16)
    assert busiest({"measure": 90.0}, on_lanes(Execution(), 3)) == pytest.approx(30)
    assert busiest({}, place) == 0


def test_presets_stand_behind_what_a_file_says() -> None:
    there = Execution(preset="shared-gpu", resources={"gate": Resources(cpus=2)})
    assert there.resources_for("gate") == Resources(cpus=2)
    assert there.resources_for("defended") == Resources(gpus=0.25)
    assert there.resources_for("corpus") == Resources()
    four = Execution(preset="four-gpus")
    assert (four.resources_for("model").workers, four.resources_for("measure").workers) == (4, 1)
    written = Execution(device="cpu", lanes=2, threads=3, resources={"model": Resources(cpus=9)})
    moved = written.moved("gpu")
    assert (moved.device, moved.lanes, moved.threads) == ("auto", None, 3)
    assert moved.resources_for("model") == Resources(gpus=1, cpus=4)
    with pytest.raises(
        UsageError, match=r"no preset of resources called 'gpus'. Did you mean 'gpu'"
    ):
        written.moved("gpus")


def test_several_workers_are_for_stages_that_train() -> None:
    with pytest.raises(ValueError, match=r"measure: workers: 2: nothing of it is shared"):
        Execution(resources={"measure": Resources(workers=2)})
    shared = Execution(resources={"default": Resources(workers=2, gpus=1)})
    assert shared.resources_for("defended").workers == 2
    assert shared.resources_for("measure") == Resources(gpus=1)
