"""The order of stages: every schedule is valid and near the bound, and it is the driver's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.history import History
from grid.order import Inputs, Turns, chains, lower_bound, priorities, simulate, waits_of
from grid.planning import make_plan
from grid.run import Driver
from grid.stage_order import longest_chain, parents
from tests.finished import Finished
from tests.grids import numbers, records, run_serial, tiny_grid
from victims.keys import Key
from victims.store import Store


@st.composite
def works(draw: st.DrawFn) -> tuple[dict[Key, list[Key]], dict[Key, float]]:
    """Some stages, each with inputs among those before it, and their seconds."""
    keys = [Key(f"stage-{number}") for number in range(draw(st.integers(0, 14)))]
    inputs = {
        key: draw(st.lists(st.sampled_from(keys[:place]), max_size=3, unique=True)) if place else []
        for place, key in enumerate(keys)
    }
    lengths = st.floats(0, 100, allow_nan=False) | st.just(1.0)
    return inputs, {key: draw(lengths) for key in keys}


LANES = st.integers(1, 6)


@settings(deadline=None)
@given(works(), LANES, st.sampled_from(["chain", "shortest first", "none"]))
def test_any_list_schedule_is_valid_and_within_grahams_bound(
    work: tuple[dict[Key, list[Key]], dict[Key, float]], lanes: int, order: str
) -> None:
    inputs, seconds = work
    priority = {
        "chain": chains(inputs, seconds),
        "shortest first": {key: -length for key, length in seconds.items()},
        "none": dict.fromkeys(inputs, 0.0),
    }[order]
    found = simulate(inputs, seconds, priority, lanes)
    bound = lower_bound(inputs, seconds, lanes)
    assert bound <= found.makespan * (1 + 1e-9)
    assert found.makespan <= (2 - 1 / lanes) * bound * (1 + 1e-9)
    assert found.ended.keys() == found.began.keys() == inputs.keys()
    for key, needed in inputs.items():
        assert found.ended[key] == found.began[key] + seconds[key]
        assert all(found.ended[parent] <= found.began[key] for parent in needed)
    for moment in found.began.values():
        # Stages of no length may stand at the same moment on one lane.
        running = [k for k in inputs if found.began[k] <= moment < found.ended[k]]
        assert len(running) <= lanes


def test_the_longest_chain_first_beats_the_order_of_the_file() -> None:
    """Three stages of 1 s, then one of 3 s: listed, two lanes take 4.5 s of a bound of 3."""
    inputs: Inputs = {Key(name): [] for name in "abcd"}
    seconds = {key: 3.0 if key == "d" else 1.0 for key in inputs}
    listed = {key: -float(place) for place, key in enumerate(inputs)}
    assert lower_bound(inputs, seconds, 2) == 3
    assert simulate(inputs, seconds, chains(inputs, seconds), 2).makespan == 3
    assert simulate(inputs, seconds, listed, 2).makespan == 4


def test_a_turn_comes_when_the_last_input_is_there() -> None:
    a, b, c = Key("a"), Key("b"), Key("c")
    turns = Turns({a: [], b: [], c: [a, b, Key("exists already")]}, {a: 1.0, b: 2.0, c: 3.0})
    assert (turns.take(), turns.take(), turns.take()) == (b, a, None)
    turns.finish(b)
    assert turns.take() is None
    turns.finish(a)
    assert (turns.take(), turns.take()) == (c, None)


def test_chains_of_inputs_alone_are_the_drivers(tmp_path: Path) -> None:
    plan = make_plan(tiny_grid(tmp_path))
    stages = plan.missing(plan.everything(), set())
    seconds = {key: History(None).seconds(stage) for key, stage in stages.items()}
    inputs = {key: [parent.key for parent in parents(stage)] for key, stage in stages.items()}
    assert chains(inputs, seconds) == longest_chain(stages, seconds)


def test_gated_cells_wait_for_their_gate_and_nothing_else_does(tmp_path: Path) -> None:
    plan = make_plan(tiny_grid(tmp_path, rates=[0, 0.05, 0.1], seeds=[0, 1]))
    waits = waits_of(plan)
    assert waits.keys() == plan.missing(plan.everything(), set()).keys()
    seen: set[Key] = set()
    for key, needed in waits.items():
        assert set(needed) <= seen
        seen.add(key)
    gated = {c.measure.key: c for c in plan.cells if c.gated}
    assert len(gated) == 2
    for key, needed in waits.items():
        checks = [k for k in needed if k.startswith("gate-")]
        if key in gated:
            gate = plan.gates[gated[key].group]
            assert set(checks) == {stage.key for stage in gate.stages}
        elif not any(key == cell.measure.defended.key for cell in gated.values()):
            assert checks == []
    # A gate comes before what is in a hurry and has nothing to wait for it, since cells do.
    stages = plan.missing(plan.everything(), set())
    counted = priorities(plan, stages, dict.fromkeys(stages, 1.0))
    alone = longest_chain(stages, dict.fromkeys(stages, 1.0))
    assert counted.keys() == alone.keys()
    raised = {key for key in stages if counted[key] > alone[key]}
    assert {c.group for c in gated.values()} == {
        group for group, gate in plan.gates.items() if raised & {m.key for m in gate.victims}
    }
    done = {cell.victim.key for cell in plan.cells}
    assert not done & waits_of(plan, done).keys()


def test_the_driver_counts_what_waits_for_a_gate(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path)
    driver = Driver(grid, tmp_path, Store(tmp_path / "store"))
    driver._open_cells(driver.plan.cells)
    stages = driver.plan.missing(driver.plan.everything(), set())
    seconds = {key: History(None).seconds(stage) for key, stage in stages.items()}
    assert driver.priority == priorities(driver.plan, stages, seconds)
    assert driver.priority != longest_chain(stages, seconds)


def test_the_order_of_stages_changes_no_number(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last_first(*arguments: Any) -> dict[Key, float]:
        return {key: -seconds for key, seconds in priorities(*arguments).items()}

    monkeypatch.setattr("grid.run.priorities", last_first)
    run_serial(finished.grid, tmp_path / "out", tmp_path / "store")
    runs = finished.out, tmp_path / "out"
    ran, again = (
        [r["key"] for r in sorted(records(out, "stages"), key=lambda r: r["started_at"])]
        for out in runs
    )
    assert (sorted(ran), ran != again) == (sorted(again), True)
    assert numbers(finished.out) == numbers(tmp_path / "out")


@pytest.mark.exhaustive
def test_a_real_driver_takes_turns_as_the_simulation_does(tmp_path: Path) -> None:
    """With one lane, whatever began had the longest chain of all that could have begun."""
    grid = tiny_grid(tmp_path / "in", defenses=["none", "finetune", {"cleanclip": {}}])
    run_serial(grid, tmp_path / "out", tmp_path / "store")
    plan = make_plan(grid)
    stages = plan.missing(plan.everything(), set())
    seconds = {key: History(None).seconds(stage) for key, stage in stages.items()}
    priority, waits = priorities(plan, stages, seconds), waits_of(plan)
    ran = sorted(records(tmp_path / "out", "stages"), key=lambda record: record["started_at"])
    order = [Key(record["key"]) for record in ran]
    assert set(order) == set(stages)
    done: set[Key] = set()
    for key in order:
        could = [k for k in waits if k not in done and done.issuperset(waits[k])]
        assert key in could
        assert priority[key] == pytest.approx(max(priority[k] for k in could))
        done.add(key)
