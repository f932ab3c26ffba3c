"""The gate: the victims of all seeds are judged together, by their means, and the words say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grid import results
from grid.measure import MeasureStage
from grid.planning import make_plan
from grid.results import Verdict, judge
from grid.schema.status import Status
from tests.grids import tiny_grid
from victims.store import Store

STRICT = {"strong": {"asr": 0.9, "lift": 0.8, "clean_loss": 0.02}}


def judged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asr: dict[int, float], **changes: Any
) -> Verdict:
    """The verdict on victims whose ASR is as given, by seed; clean ones have none."""
    grid = tiny_grid(folder, seeds=list(asr), gate=STRICT, **changes)
    check = make_plan(grid).gates["badnet", "0.1", 0]
    shares = dict(zip((stage.key for stage in check.victims), asr.values(), strict=True))

    def measured(store: Store, stage: MeasureStage) -> dict[str, Any]:
        values = {"asr_top1": shares.get(stage.key, 0.0), "clean_top1": 0.5}
        metrics = {name: {"value": value} for name, value in values.items()}
        return {"sets": {"tuning": {"metrics": metrics, "changed_share": 1.0}}}

    monkeypatch.setattr(results, "read_measure", measured)
    return judge(Store(folder / "store"), check, grid.gate)


def test_victims_pass_or_fail_by_their_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two victims was below the threshold, and documents said that each is judged."""
    low = judged(tmp_path, monkeypatch, {0: 0.934, 1: 0.860})
    assert low.status is Status.INVALID_VICTIM
    assert "mean ASR of 2 victims 89.7% (93.4, 86.0), lift 89.7 points" in low.detail
    assert low.detail.endswith("; mean ASR must be at least 90%")
    enough = judged(tmp_path, monkeypatch, {0: 0.95, 1: 0.86})
    assert enough.passes
    assert not enough.detail
    assert enough.each == (0.95, 0.86)


def test_one_victim_has_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(tmp_path, monkeypatch, {0: 0.5})
    assert found.detail.startswith("tuning split: ASR 50.0%, lift 50.0 points")
    assert found.detail.endswith("; ASR must be at least 90%; lift must be at least 80 points")
