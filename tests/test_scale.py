"""Plans grow with their stages: nothing that cells share is computed for each of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compact as compaction
from benchmarks import practice, scale, schedule
from benchmarks.common import Figures
from grid.gridfile import load_grid
from grid.history import History
from grid.plan_summary import summary
from grid.planning import make_plan
from grid.room import on_lanes
from tests.grids import write_grid_file
from tests.test_benchmarks import in_process, with_aims
from victims import keys
from victims.recipe import Recipe


def test_digests_of_a_plan_grow_with_its_stages_and_not_with_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key is computed once, and what many keys hold is written once."""
    file = tmp_path / "many.yaml"
    file.write_text(scale.grid_text(settings=2, rates=4, repairs=3, seeds=5))
    grid = load_grid(str(file))
    monkeypatch.setattr(keys, "_texts", {})
    digests, written = list[bytes](), list[Any]()
    sha256, canonical = hashlib.sha256, keys.canonical

    def counted(body: bytes) -> Any:
        digests.append(body)
        return sha256(body)

    def noted(value: Any) -> Any:
        written.append(value)
        return canonical(value)

    monkeypatch.setattr(keys.hashlib, "sha256", counted)  # type: ignore[attr-defined]
    monkeypatch.setattr(keys, "canonical", noted)
    plan = make_plan(grid)
    assert len(plan.cells) == 4 * 2 * 4 * 5 * 13 == 2080
    # A truth has a key of its own beside its stage; equal stages of two cells have one key.
    truths = sum(1 for stage in plan.stages.values() if stage.kind == "poisoned")
    assert len(set(digests)) == len(plan.stages) + truths + len(plan.cells)
    assert len(digests) <= 1.15 * len(set(digests))
    recipes = [value for value in written if isinstance(value, Recipe)]
    assert len(recipes) < 1000, "one of a defense and seed, not one of a cell"
    again = len(digests)
    summary(plan, set(), History(None), on_lanes(plan.grid.execution, 2))
    assert len(digests) == again + 1, "the grid's own hash"


def test_equal_objects_have_equal_texts_and_changing_ones_none_that_stays() -> None:
    """A text is remembered by the object, and only of what cannot change."""
    one, other = (Recipe(epochs=1, batch_size=2, lr=0.1) for _ in range(2))
    assert keys.text_of(one) == keys.text_of(one) == keys.text_of(other)
    assert keys.content_key("a", {"x": one}) == keys.content_key("a", {"x": other})
    assert keys.content_key("a", one) == keys.content_key("a", other)
    changing = {"x": [1]}
    before = keys.content_key("a", {"of": changing})
    changing["x"].append(2)
    assert keys.content_key("a", {"of": changing}) != before


def test_a_memory_that_is_full_forgets_and_keys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MOST_TEXTS", 2)
    recipes = [Recipe(epochs=n, batch_size=2, lr=0.1) for n in range(1, 6)]
    assert len({keys.content_key("a", {"r": recipe}) for recipe in recipes}) == 5
    assert len(keys._texts) <= 2


# The benchmarks, at a tiny size.


def aims(figures: Figures) -> set[str]:
    return with_aims(figures)


def test_compaction_is_measured_on_what_a_run_leaves() -> None:
    found = compaction.main(num_cells=40, calls=1)
    assert found["files before"].value > 50
    assert found["files after"].value == 4
    assert found["rows"].value == 40 * 27
    assert aims(found) == {"files after"}


@pytest.mark.exhaustive
def test_scale_names_its_aims() -> None:
    found = scale.main(settings=1, rates=2, repairs=1, seeds=1, calls=1)
    assert found["cells"].value == 4 * 2 * 5
    assert aims(found) == {"grid plan", "grid plan, cpu", "grid plan, peak memory"}


def test_schedules_are_compared_on_every_number_of_lanes() -> None:
    found = schedule.main(attacks=2, rates=2, seeds=1, lanes=(2, 8))
    assert aims(found) == {f"{lanes} lanes: makespan / bound" for lanes in (2, 8)}
    for lanes in (2, 8):
        assert 1 <= found[f"{lanes} lanes: makespan / bound"].value <= 2 - 1 / lanes


def test_the_seconds_of_the_papers_grid_are_those_of_their_board() -> None:
    """`python -m benchmarks.schedule --record` writes them; by hand they could say anything."""
    assert schedule.record() == json.loads(schedule.TIMES.read_text())


@pytest.mark.exhaustive
def test_practice_compares_like_with_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(practice, "grid", in_process)
    file = write_grid_file(tmp_path)
    found = practice.main(name=str(file), sample=1, count=3, executor="serial")
    assert aims(found) == {"grid / loop, own victims", "grid / loop, saved victims"}
    assert found["cells of a loop"].value == 1
    assert found["serial: a warm stage, 1 at a time"].value > 0
