"""What stages ask of machines: numbers, types of GPU and labels, against nodes made up here."""

from __future__ import annotations

import math
from typing import Any

import pytest

from grid.execution import Execution, Resources
from grid.needs import (
    Node,
    NodeType,
    asks,
    bundle,
    holds,
    lacks,
    nearest,
    places,
    selects,
    times,
)

SMALL = Node({"CPU": 4, "memory": 8 * 2**30})
SPOT = Node({"CPU": 16, "GPU": 4, "accelerator_type:A100": 1}, {"market": "spot", "zone": "a"})
OWNED = Node({"CPU": 16, "GPU": 2, "accelerator_type:H100": 1}, {"market": "owned"})
NODES = [SMALL, SPOT, OWNED]

CASES: list[tuple[dict[str, Any], float]] = [
    ({}, 36),
    ({"cpus": 3}, 1 + 5 + 5),
    ({"gpus": 1}, 6),
    ({"gpus": 0.25, "cpus": 0.5}, 24),
    ({"gpus": 3}, 1),
    ({"gpus": 5}, 0),
    ({"gpus": 1, "accelerator": "A100"}, 4),
    ({"gpus": 1, "accelerator": "T4"}, 0),
    ({"gpus": 1, "labels": {"market": "spot"}}, 4),
    ({"gpus": 1, "labels": {"market": "!spot"}}, 2),
    ({"labels": {"market": "!spot"}}, 4 + 16),
    ({"labels": {"market": "in(spot, owned)"}}, 32),
    ({"labels": {"market": "spot", "zone": "b"}}, 0),
    ({"memory_gb": 3}, 2),
]


@pytest.mark.parametrize(("fields", "expected"), CASES, ids=lambda value: str(value))
def test_places(fields: dict[str, Any], expected: float) -> None:
    assert places(Resources(**fields), NODES) == expected


def test_what_asks_for_nothing_fits_anywhere() -> None:
    assert times(Resources(cpus=0), SMALL) == math.inf


@pytest.mark.parametrize(
    ("rule", "value", "passes"),
    [
        ("spot", "spot", True),
        ("spot", "owned", False),
        ("spot", None, False),
        ("!spot", None, True),
        ("!spot", "spot", False),
        ("in(a,b)", "b", True),
        ("in(a, b)", "c", False),
        ("!in(a, b)", "c", True),
        ("!in(a, b)", "a", False),
        ("inner", "inner", True),
    ],
)
def test_labels_select(rule: str, value: str | None, passes: bool) -> None:
    assert selects(rule, value) is passes


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_reserves_its_memory(workers: int) -> None:
    assert bundle(Resources(memory_gb=1, workers=workers))["memory"] == 2**30


def test_requests_and_nodes_in_words() -> None:
    wants = Resources(cpus=2, gpus=1, workers=2, accelerator="A100", labels={"market": "spot"})
    assert asks(wants) == "2 workers of 2 CPUs and 1 GPUs of type A100 where market is spot each"
    assert holds(SPOT) == "16 CPUs, 4 GPUs (A100) and 0.0 GiB; labels market=spot, zone=a"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"accelerator": "A100"}, "accelerator: A100 needs gpus above 0"),
        ({"labels": {"market": "spot?"}}, "labels: market: 'spot\\?' selects nothing"),
        ({"labels": {"market": "in()"}}, "selects nothing"),
        ({"stall_seconds": 0}, "stall_seconds must be positive"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Resources(**fields)


@pytest.mark.parametrize(
    ("fields", "node"),
    [
        ({"cpus": 20}, SPOT),
        ({"cpus": 20, "gpus": 3}, SPOT),
        ({"memory_gb": 100}, SMALL),
        ({"gpus": 8}, SPOT),
        ({"gpus": 1, "accelerator": "T4"}, SPOT),
        ({"gpus": 3, "accelerator": "H100"}, OWNED),
    ],
)
def test_the_nearest_node_lacks_least_of_what_is_shortest(
    fields: dict[str, Any], node: Node
) -> None:
    assert nearest(Resources(**fields), NODES) is node
    assert nearest(Resources(**fields), NODES[::-1]) is node


def test_what_an_autoscaler_could_start_counts_up_to_its_limit() -> None:
    types = [NodeType("big", {"CPU": 32, "GPU": 8}, 2), NodeType("gone", {"GPU": 99}, 0)]

    def startable(**fields: Any) -> list[tuple[str, ...]]:
        execution = Execution(resources={"model": Resources(**fields)})
        return [lack.types for lack in lacks(execution, ["corpus", "model"], NODES, types)]

    assert startable(gpus=4) == []
    assert startable(gpus=8) == [("big",)]
    assert startable(gpus=9) == [()]
    # Which labels its nodes would have it does not tell.
    assert startable(gpus=1, labels={"market": "rented"}) == [("big",)]
    # Four groups of two on nodes that are there or come, besides three that are.
    assert startable(workers=11, gpus=2) == [("big",)]
    assert startable(workers=12, gpus=2) == [()]
    unlimited = [NodeType("big", {"CPU": 32, "GPU": 8}, math.inf)]
    execution = Execution(resources={"model": Resources(workers=999, gpus=8)})
    assert [lack.types for lack in lacks(execution, ["model"], NODES, unlimited)] == [("big",)]


@pytest.mark.parametrize(("share", "count"), [(0.2, 5), (0.1, 10), (0.3, 3), (1, 1)])
def test_a_node_holds_as_many_as_fit(share: float, count: int) -> None:
    """In floats the floor of 1 / 0.2 is 4."""
    assert places(Resources(cpus=share), [Node({"CPU": 1.0})]) == count


@pytest.mark.parametrize(
    ("wants", "says"),
    [
        ({"gpus": 1.5}, "gpus above 1 are whole numbers"),
        ({"cpus": 2.5}, "cpus above 1 are whole numbers"),
        ({"cpus": 1e-9}, "ten-thousandths"),
    ],
)
def test_what_ray_cannot_count_is_refused(wants: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Resources(**wants)  # type: ignore[arg-type]
