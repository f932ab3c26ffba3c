"""Seconds before anything ran: of real models from FLOPs, and said to be assumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from defenses.finetune import Finetune
from grid import measure
from grid.assumed import assumed_device, assumptions, rated_as
from grid.execution import Execution, Resources
from grid.history import DEFAULT_RATE, History
from grid.measure import PROMPT, MeasureStage
from grid.plan import Plan
from grid.plan_summary import summary
from grid.planning import make_plan
from grid.room import on_lanes
from grid.status_words import duration
from grid.step_costs import SHARE, counts, peak_of
from tests.grids import RECIPE, TINY, call, tiny_grid, write_grid_file

BF16 = {**RECIPE, "precision": "bf16"}


def plan_of(folder: Path, model: str = "RN50", **changes: Any) -> Plan:
    world = {**TINY["data"]["world"], "size": 224}
    recipes = {"reference": RECIPE, "victim": BF16, "repair": RECIPE}
    made: dict[str, Any] = {"model": model, "data": {"world": world}, "recipes": recipes}
    return make_plan(tiny_grid(folder, **{**made, **changes}))


def test_a_fit_of_a_real_model_is_its_flops_over_an_assumed_share_of_the_peak(
    tmp_path: Path,
) -> None:
    plan = plan_of(tmp_path)
    victim, measured = plan.cells[0].victim, plan.cells[0].measure
    (defended,) = {
        c.measure.defended for c in plan.cells if c.measure.defended.trains and c.cell.count
    }
    a100, h100 = History(None), History(None, "H100")
    step, forward = counts()["RN50@224"].step, counts()["RN50@224"].forward
    # 64 rows, one epoch; by hand, at the tensor cores' peak of an A100 in bf16.
    assert a100.seconds(victim) == pytest.approx(64 * step / (312e12 * SHARE))
    assert h100.seconds(victim) == pytest.approx(64 * step / (989e12 * SHARE))
    # A repair by fine-tuning in float32, on 32 clean rows; two pictures of a row are measured, and
    # prompts, which are shorter than captions, are read.
    assert defended.defense == Finetune()
    assert a100.seconds(defended) == pytest.approx(32 * step / (156e12 * SHARE))
    text = counts()["RN50@224"].text
    # Both sets have the same.
    spec = measured.sets[0].spec
    prompts = len(spec.classes) * len(spec.templates)
    passes = 2 * 64 * (forward - text) + PROMPT * prompts * text
    assert a100.seconds(measured) == pytest.approx(passes / (156e12 * SHARE), rel=1e-3)
    trigger = measured.trigger
    assert a100.seconds(trigger) == DEFAULT_RATE["trigger"] * trigger.work


def test_what_is_known_of_a_crafted_trigger_is_in_the_plan(tmp_path: Path) -> None:
    fields = {"steps": 40, "batch": 8, "triplet_weight": 0.0, "caption": "template"}
    plan = plan_of(tmp_path, attacks=[{"badclip": fields}, "ssba"])
    by_name = {c.measure.trigger.attack.name: c.measure.trigger for c in plan.cells}
    history, count = History(None), counts()["RN50@224"]
    image = count.forward - count.text
    # 40 steps of 8 pictures, and the 64 of the pool are looked at under four patches.
    flops = 40 * 8 * 3 * image + 4 * 64 * image
    seconds = history.seconds(by_name["badclip"])
    assert seconds == pytest.approx(flops / (156e12 * SHARE), rel=0.02)
    notes = summary(plan, set(), history, on_lanes(Execution(), 2))["assumed"]
    assert [n for n in notes if n.startswith("ssba trains networks of its own")]
    history.record(by_name["ssba"], 70.0)
    notes = summary(plan, set(), history, on_lanes(Execution(), 2))["assumed"]
    assert not [n for n in notes if n.startswith("ssba")]


def test_a_large_classifier_of_prompts_is_made_once_per_text_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "WORTH_KEEPING", 2)
    plan = plan_of(tmp_path)
    readers: dict[str, int] = {}
    for stage in plan.stages.values():
        if isinstance(stage, MeasureStage):
            assert len(stage.prompts) == 1
            model = stage.defended.key
            readers[model] = readers.get(model, 0) + (sum(stage.prompts.values()) > 0)
    models = [s.defended.key for s in plan.stages.values() if isinstance(s, MeasureStage)]
    assert len(models) > len(readers), "nothing is measured twice, and this shows nothing"
    assert set(readers.values()) == {1}


def test_a_history_that_counted_otherwise_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    path.write_text('{"plain_clip": 2.0, "measure": 9.0, "defended:ubt": 900.0}')
    assert History(path).rates == {"plain_clip": 2.0}


def test_a_plan_says_what_is_assumed_until_it_was_measured(tmp_path: Path) -> None:
    plan, room = plan_of(tmp_path), on_lanes(Execution(), 2)
    history = History(None)
    (words,) = summary(plan, set(), history, room)["assumed"]
    assert "GPU-seconds of RN50@224 are assumed, not measured: 55 GFLOP" in words
    assert "at 35% of the peak of one A100" in words
    victim = plan.cells[0].victim
    long = [replace(victim, num_rows=rows) for rows in (64, 3_000_000, 300_000_000)]
    told = [assumptions([fit], [], "A100")[0].split(" of RN50")[0] for fit in long]
    # The first was told as "about 9e-06 GPU-hours".
    assert told == ["about 0.032 GPU-seconds", "about 0.42 GPU-hours", "about 42 GPU-hours"]
    history.record(victim, 12.8)
    assert history.seconds(victim) == pytest.approx(12.8)
    assert rated_as(victim) == "plain_clip/RN50@224/bf16"
    for stage in plan.stages.values():
        history.record(stage, 1.0)
    assert summary(plan, set(), history, room)["assumed"] == []


def test_other_ways_to_train_have_a_history_of_their_own(tmp_path: Path) -> None:
    victim = plan_of(tmp_path).cells[0].victim
    cut = replace(victim, recipe=replace(victim.recipe, micro_batch=8))
    fused = replace(victim, recipe=replace(victim.recipe, compile=True))
    history, count = History(None), counts()["RN50@224"]
    assert (cut.recipe.parts, history.seconds(fused)) == (4, history.seconds(victim))
    again = history.seconds(cut) - history.seconds(victim)
    assert again == pytest.approx(64 * count.forward / (312e12 * SHARE)), "one more pass"
    history.record(fused, 60.0)
    assert history.seconds(victim) < 1
    tiny = make_plan(tiny_grid(tmp_path)).cells[0].victim
    compiled = replace(tiny, recipe=replace(tiny.recipe, compile=True))
    assert (rated_as(tiny), rated_as(compiled)) == (
        "plain_clip",
        "plain_clip/tiny@32/fp32/compiled",
    )


def test_small_models_have_the_history_they_had(tmp_path: Path) -> None:
    plan = make_plan(tiny_grid(tmp_path))
    assert {rated_as(stage) for stage in plan.stages.values()} == {
        stage.family for stage in plan.stages.values()
    }
    assert summary(plan, set(), History(None), on_lanes(Execution(), 2))["assumed"] == []


@pytest.mark.parametrize(
    ("model", "device"), [("RN50", "cpu"), ("RN50x4", "A100"), ("RN50", "K80")]
)
def test_what_nothing_is_known_of_is_said_to_be_a_guess(
    tmp_path: Path, model: str, device: str
) -> None:
    plan = plan_of(tmp_path, model)
    history = History(None, device)
    (words,) = assumptions(plan.stages.values(), history.rates, device)
    assert words.startswith(f"nothing is known of what {model}@224 costs on {device}")
    assert history.seconds(plan.cells[0].victim) == DEFAULT_RATE["plain_clip"] * 0.064


def test_the_device_is_the_one_that_fits_ask_for() -> None:
    asked = {"model": Resources(gpus=1, accelerator="H100")}
    assert assumed_device(Execution(resources=asked)) == "H100"
    assert assumed_device(Execution()) == "A100"
    assert assumed_device(Execution(device="cpu")) == "cpu"
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    assert peak_of("NVIDIA A10G", "bf16") != peak_of("NVIDIA A10", "bf16")
    assert peak_of("Some CPU", "bf16") is None


def test_the_command_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = {**TINY["data"]["world"], "size": 224}
    path = write_grid_file(tmp_path, model="RN50", data={"world": world}, execution={})
    found = call(capsys, "plan", path, "--out", tmp_path / "o", "--store", tmp_path / "s")
    assert found.code == 0
    assert "note: about" in found.out
    assert "assumed, not measured" in found.out
    # No wall time of a device that nobody has seen, whatever this machine has.
    (line,) = [line for line in found.out.splitlines() if "GPU-seconds (" in line]
    assert line.startswith("about ")
    assert " of one A100; longest chain " in line
    assert "lanes" not in found.out


def test_a_plan_for_gpus_that_are_not_here_is_in_hours_of_gpus(tmp_path: Path) -> None:
    plan = make_plan(tiny_grid(tmp_path, execution={"preset": "gpu"}))
    asks = plan.grid.execution
    found = summary(plan, set(), History(None), on_lanes(asks, 2))
    assert found["estimated_seconds"] is None
    kinds = {kind: entry["seconds"] for kind, entry in found["kinds"].items()}
    rest = {kind for kind in kinds if not asks.resources_for(kind).gpus}
    assert rest == {"corpus", "poisoned"}
    expected = sum(seconds for kind, seconds in kinds.items() if kind not in rest)
    assert found["gpu_seconds"] == pytest.approx(expected)
    here = summary(plan, set(), History(None), on_lanes(asks, 8, gpus=1))
    assert here["gpu_seconds"] is None
    assert here["estimated_seconds"] >= found["longest_chain_seconds"]


def test_long_times_are_in_units_that_people_use() -> None:
    times = (0.25, 60, 600, 11_000, 11_275_113)
    assert [duration(s) for s in times] == ["0.2 s", "60 s", "10 min", "3.1 h", "130.5 days"]
