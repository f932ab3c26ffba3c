"""Plans: what is shared, what is missing, what is impossible; filters; the history of seconds."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.execution import Execution, Resources
from grid.filters import FIELDS, NUMERIC, CellFilter, parse_filter
from grid.history import History
from grid.plan import Plan, chain, finished
from grid.plan_summary import summary
from grid.planning import make_plan
from grid.quick import plan_summary
from grid.registry import grid_source
from grid.room import on_lanes
from grid.run import run_grid
from grid.spec import Cell
from grid.stage_order import longest_chain, parents
from tests.grids import RECIPE, TINY, call, tiny_grid, write_grid_file
from victims.corpora import build_corpus
from victims.errors import UsageError
from victims.keys import Key
from victims.store import Store

PATCH = {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}
WIDE: dict[str, Any] = {
    "attacks": [{"badnet": PATCH}, {"blended": {"cell": 2, "levels": 2}}, {"sig": {"delta": 40}}],
    "rates": [0, 0.05, 0.1],
    "defenses": ["none", "finetune", "clean_model", "clean_training", "oracle_filter"],
}


def plan_of(folder: Path, **changes: Any) -> Plan:
    return make_plan(tiny_grid(folder, **changes))


def kinds(plan: Plan) -> Counter[str]:
    return Counter(stage.kind for stage in plan.stages.values())


# Sharing.


def test_attacks_share_the_clean_victim_and_the_reference(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, **WIDE)
    assert len(plan.cells) == 3 * 3 * 5
    # One per attack and positive rate, and one clean victim for all of them.
    assert plan.num_victims() == 3 * 2 + 1
    # The victims and the reference: clean_training's model is the clean victim, by its key.
    assert kinds(plan)["model"] == 3 * 2 + 1 + 1
    clean = {c.measure.defended.victim.key for c in plan.cells if c.cell.rate == "0"}
    assert len(clean) == 1
    references = {c.measure.defended.victim.init.key for c in plan.cells if c.init_model}  # type: ignore[union-attr]
    assert len(references) == 1
    assert kinds(plan)["trigger"] == 3
    assert kinds(plan)["poisoned"] == 3 * 2


def test_seeds_and_targets_share_what_they_can(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=[0, 1], target=None, targets=["circle", "square"])
    # Two seeds, each with a clean victim for both targets and a poisoned one per target.
    assert plan.num_victims() == 2 * (1 + 2)
    assert kinds(plan)["corpus"] == 6
    labels = [c.cell.label for c in plan.cells]
    assert len(set(labels)) == len(labels) == 16
    assert len({c.key for c in plan.cells}) == 16


def test_a_gate_measures_every_seed_and_serves_every_defense(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, seeds=[0, 1, 2], defense_seeds=[0, 1])
    assert list(plan.gates) == [("badnet", "0.1", 0)]
    gate = plan.gates["badnet", "0.1", 0]
    assert len({m.key for m in gate.victims}) == len({m.key for m in gate.clean}) == 3
    # Three victims, their clean twins, and the start weights under each of the three triggers.
    assert kinds(plan)["gate"] == 9
    # Nested seeds change a defense that draws, never the undefended victim.
    defended = {c.measure.defended.key for c in plan.cells if c.cell.defense.label == "finetune"}
    undefended = {c.measure.defended.key for c in plan.cells if c.cell.defense.label == "none"}
    assert len(defended) == 2 * 3 * 2
    assert len(undefended) == 2 * 3


def test_only_defended_cells_of_the_reference_rate_wait_for_the_gate(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, rates=[0, 0.05, 0.1], defenses=["none", "finetune", "clean_model"])
    waiting = {(c.cell.rate, c.cell.defense.label) for c in plan.cells if c.gated}
    assert waiting == {("0.1", "finetune")}


def test_a_chain_lists_inputs_first_and_everything_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, **WIDE)
    for cell in plan.cells[::7]:
        stages = chain(plan, cell)
        seen: set[Key] = set()
        for key, stage in stages.items():
            assert {p.key for p in parents(stage)} <= seen
            seen.add(key)
        gate = plan.gates.get(cell.group)
        assert {s.key for s in cell.stages} <= seen
        assert gate is None or {s.key for s in gate.stages} <= seen


# Keys.


@pytest.mark.parametrize(
    "execution",
    [
        Execution(lanes=7, device="cuda", threads=4, checkpoint_seconds=0, keep_optimizer=True),
        Execution(resources={"model": Resources(cpus=8, gpus=2, workers=4, memory_gb=9)}),
    ],
)
def test_keys_do_not_depend_on_how_a_grid_is_run(tmp_path: Path, execution: Execution) -> None:
    grid = tiny_grid(tmp_path, **WIDE)
    plan, other = make_plan(grid), make_plan(replace(grid, execution=execution))
    assert list(plan.stages) == list(other.stages)
    assert [c.key for c in plan.cells] == [c.key for c in other.cells]
    assert grid.identity_hash == replace(grid, execution=execution).identity_hash


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"recipes": {**TINY["recipes"], "repair": {**RECIPE, "lr": 1e-3}}}, {"defended"}),
        ({"evaluate": {"sets": ["report"]}}, {"measure"}),
        ({"gate": {"strong": {"asr": 0.1, "lift": 0, "clean_loss": 1}}}, set()),
    ],
)
def test_an_edit_moves_only_what_rests_on_it(
    tmp_path: Path, change: dict[str, Any], moves: set[str]
) -> None:
    plan, edited = plan_of(tmp_path / "a"), plan_of(tmp_path / "b", **change)
    fresh = {key.rsplit("-", 1)[0] for key in set(edited.stages) - set(plan.stages)}
    assert fresh - {"measure"} == moves - {"measure"}
    assert moves <= fresh
    # A cell's identity includes its gate's thresholds: its verdict may be another.
    assert {c.key for c in plan.cells}.isdisjoint(c.key for c in edited.cells) or moves == {
        "defended"
    }


# What is missing, and what it costs.


def test_missing_leaves_out_what_exists_and_all_it_alone_needed(
    tmp_path: Path, small_store: Store
) -> None:
    plan = plan_of(tmp_path)
    everything = plan.missing(plan.everything(), set())
    assert set(everything) == set(plan.stages)
    measure = plan.cells[0].measure
    rest = plan.missing([measure], {measure.defended.key, measure.trigger.key})
    assert set(rest) == {measure.key, *(s.key for s in measure.sets)}
    assert plan.missing([measure], {measure.key}) == {}
    store = Store(tmp_path / "store")
    assert finished(store, plan) == set()
    spec = next(s.spec for s in plan.stages.values() if s.kind == "corpus")  # type: ignore[attr-defined]
    built = build_corpus(store, spec)
    assert finished(store, plan) == {built.key}
    assert finished(small_store, plan) == set()


def test_the_longest_chain_counts_from_each_stage_to_the_last_that_waits(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    todo = plan.missing(plan.everything(), set())
    longest = longest_chain(todo, dict.fromkeys(todo, 1.0))
    for key, stage in todo.items():
        children = [k for k, s in todo.items() if key in {p.key for p in parents(s)}]
        assert longest[key] == 1 + max((longest[c] for c in children), default=0)
        assert all(longest[p.key] > longest[key] for p in parents(stage))
    # corpus -> reference -> victim -> finetune -> measure, behind the trigger and the poison.
    assert max(longest.values()) == 6


def test_a_summary_counts_stages_victims_and_reuse(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    found = summary(plan, set(), History(None), on_lanes(Execution(), 2))
    assert (found["cells"], found["not_applicable"]) == (4, 0)
    assert found["stages"] == found["stages_to_run"] == len(plan.stages)
    assert (found["victims"], found["victims_to_train"]) == (2, 2)
    own = [plan.missing(c.stages, set()) for c in plan.cells]
    shared = Counter(key for stages in own for key in stages)
    again = sum(count - 1 for count in shared.values())
    assert found["stages_without_sharing"] == len(plan.stages) + again
    assert sum(entry["stages"] for entry in found["kinds"].values()) == len(plan.stages)
    assert found["estimated_seconds"] == pytest.approx(
        max(found["longest_chain_seconds"], found["seconds_of_work"] / 2)
    )
    settled = {c.key for c in plan.cells}
    assert (
        summary(plan, set(), History(None), on_lanes(Execution(), 2), settled)["stages_to_run"] == 0
    )


def test_what_a_defense_warns_of_is_said_once_and_of_its_rate_alone(tmp_path: Path) -> None:
    outliers = {"local_outlier": {"k": 4, "reference_rows": 48}}
    plan = plan_of(tmp_path, defenses=["none", outliers], seeds=[0, 1])
    words = summary(plan, set(), History(None), on_lanes(Execution(), 2))["cautions"][0]
    # 6 of 64 rows are poisoned: 4.5 of 48.
    assert words.startswith("local_outlier at 0.1: 0.09375 of 48 reference rows are 4.5 expected")
    said = list[str]()
    only = parse_filter("defense=none")
    run_grid(
        plan.grid, tmp_path / "out", str(tmp_path), executor="serial", only=only, say=said.append
    )
    assert [line for line in said if "reference rows" in line] == [f"caution: {words}"]


def test_a_number_of_seeds_is_one_seed_and_a_caution(tmp_path: Path) -> None:
    """`seeds: 3` was quietly the one seed 3."""
    said = plan_of(tmp_path, seeds=3).cautions()
    assert "seeds: one seed, 3; for 3 seeds write [0, 1, 2]" in said
    many = plan_of(tmp_path, seeds=12, defense_seeds=[3]).cautions()
    assert [line for line in many if "seed" in line] == [
        "seeds: one seed, 12; for 12 seeds write [0, 1, ..., 11]"
    ]
    assert not [line for line in plan_of(tmp_path, seeds=[3]).cautions() if "seed" in line]


def test_a_fit_that_ends_in_its_warm_up_is_a_caution(tmp_path: Path) -> None:
    quick = {"epochs": 2, "batch_size": 32, "lr": 2e-3}
    recipes = {
        "reference": {**quick, "warmup_steps": 4},
        "victim": {**quick, "warmup_steps": 5},
        "repair": {**quick, "warmup_steps": 3},
    }
    said = [line for line in plan_of(tmp_path, recipes=recipes).cautions() if "rises" in line]
    assert not [line for line in plan_of(tmp_path).cautions() if "rises" in line], "one step"
    ends = "and the learning rate still rises at the last one: warmup_steps is"
    assert said == [
        f"plain training: 4 steps on 64 rows, {ends} 5. Give it fewer, or more epochs",
        f"finetune: 2 steps on 32 rows, {ends} 3. Give it fewer, or more epochs",
    ]


def test_a_grid_of_one_cell_shares_nothing(tmp_path: Path) -> None:
    """Sharing was once counted without the gate, which made it negative here."""
    plan = plan_of(tmp_path, rates=[0.1], defenses=["none"])
    found = summary(plan, set(), History(None), on_lanes(Execution(), 1))
    assert found["stages_without_sharing"] == found["stages"]


def test_plan_prints_one_json_object_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_grid_file(tmp_path / "in")
    places = ("--out", tmp_path / "out", "--store", tmp_path / "store")
    done = call(capsys, "plan", file, "--json", *places)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (
        found["stages_to_run"]
        == found["stages"]
        == sum(entry["to_run"] for entry in found["kinds"].values())
    )
    assert found["grid"] == "tiny"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "store").exists()


def test_a_plan_of_ten_thousand_cells(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        attacks=[{"badnet": {**PATCH, "as": f"b{i}", "patch": 4 + 2 * i}} for i in range(5)],
        rates=[0, 0.05, 0.1, 0.2],
        seeds=list(range(50)),
        defenses=[
            "none",
            *({"finetune": {"as": f"f{i}", "recipe": {"lr": 1e-4 * (i + 1)}}} for i in range(9)),
        ],
    )
    assert len(plan.cells) == 5 * 4 * 50 * 10
    assert plan.num_victims() == 50 + 5 * 3 * 50
    assert len({c.key for c in plan.cells}) == len(plan.cells)
    assert summary(plan, set(), History(None), on_lanes(Execution(), 2))["stages_to_run"] == len(
        plan.stages
    )


# The history of seconds.


def test_history_survives_a_round_trip_and_forgets_slowly(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    victim = plan.cells[0].measure.defended.victim
    history = History(tmp_path / "history.json")
    guess = history.seconds(victim)
    history.record(victim, 10.0)
    assert history.seconds(victim) == pytest.approx(10.0) != guess
    history.record(victim, 20.0)
    assert 10 < history.seconds(victim) < 20
    history.save()
    assert History(tmp_path / "history.json").rates == history.rates
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "x"}', '{"a": NaN}', '{"a": -1}', "\xff", ""])
def test_a_damaged_history_is_no_history(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.json"
    path.write_bytes(text.encode("latin-1"))
    history = History(path)
    assert history.rates == {}
    stage = plan_of(tmp_path).cells[0].measure
    assert math.isfinite(history.seconds(stage))


def test_a_history_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    history = History(tmp_path / "gone" / "history.json")
    history.rates["x"] = 1.0
    history.save()
    assert not (tmp_path / "gone").exists()


# Impossible cells.


def test_regime_s_refuses_what_needs_a_reference(tmp_path: Path) -> None:
    recipes = {"victim": RECIPE, "repair": RECIPE}
    plan = plan_of(
        tmp_path, regime="S", recipes=recipes, defenses=["none", "clean_model", "finetune"]
    )
    assert len(plan.cells) == 4
    assert {cell.defense.label for cell, _ in plan.refused} == {"clean_model"}
    assert len(plan.refused) == 2
    assert all("regime S has none" in reason for _, reason in plan.refused)
    assert all(c.init_model is None for c in plan.cells)
    assert all(s.init is None for s in plan.stages.values() if s.kind == "model")  # type: ignore[attr-defined]


# Filters.


def cells(folder: Path) -> list[Cell]:
    return tiny_grid(folder, **WIDE).cells()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("attack=badnet", 15),
        ("attack=b*", 30),
        ("attack!=badnet", 30),
        ("rate<0.1", 30),
        ("rate<=0.10", 45),
        ("rate=0.050", 15),
        ("rate>0, defense=clean_*", 12),
        ("cell=sig/0.1/none/s0", 1),
        ("seed=0 target=0 defense_seed=0", 45),
        ("defense=Clean*", 0),
    ],
)
def test_filters_take_cells(tmp_path: Path, text: str, count: int) -> None:
    chosen = parse_filter(text)
    assert sum(chosen.matches(cell) for cell in cells(tmp_path)) == count


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no condition"),
        ("badnet", "is no condition"),
        ("atack=badnet", "Did you mean 'attack'"),
        ("rate<much", "rate is a number"),
        ("attack<b", "attack has no order"),
        ("rate = 0.1", "is no condition"),
    ],
)
def test_filters_that_mean_nothing_say_so(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_filter(text)


WORDS = st.from_regex(r"[a-z0-9*._/-]{1,12}", fullmatch=True)
NUMBERS = st.floats(0, 1e6).map(repr)
CONDITIONS = st.one_of(
    st.tuples(st.sampled_from([f for f in FIELDS if f not in NUMERIC]), st.just("="), WORDS),
    st.tuples(
        st.sampled_from(NUMERIC), st.sampled_from(["=", "!=", "<", ">", "<=", ">="]), NUMBERS
    ),
)


@given(st.lists(CONDITIONS, min_size=1, max_size=4), st.sampled_from([" ", ",", "  ", ", "]))
def test_a_written_filter_reads_back(conditions: list[tuple[str, str, str]], gap: str) -> None:
    text = gap.join("".join(condition) for condition in conditions)
    assert parse_filter(text) == CellFilter(tuple(conditions))


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_a_usage_error(text: str) -> None:
    try:
        found = parse_filter(text)
    except UsageError:
        return
    assert all(name in FIELDS for name, _, _ in found.conditions)


def test_the_summary_of_a_finished_grid_belongs_to_its_store(tmp_path: Path) -> None:
    """A summary remembered for one store was once printed for any other."""
    file = write_grid_file(tmp_path / "in")
    out = tmp_path / "out"
    first = plan_summary(grid_source(str(file)), out, str(tmp_path / "a"))
    assert first["stages_finished"] == 0
    plan = make_plan(tiny_grid(tmp_path / "in"))
    store = Store(tmp_path / "b")
    for stage in plan.stages.values():
        if stage.kind == "corpus":
            build_corpus(store, stage.spec)  # type: ignore[attr-defined]
    second = plan_summary(grid_source(str(file)), out, str(tmp_path / "b"))
    assert second["stages_finished"] == 6
