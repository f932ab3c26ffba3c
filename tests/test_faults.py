"""Killing a worker and killing the driver in the middle of a fit changes no number."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grid.gridfile import load_grid
from grid.plan import make_plan
from tests.grids import RECIPE, TINY, numbers, outcomes, records, run_serial, write_grid_file
from tests.processes import command, wait_for, worker_of
from victims.checkpoints import read_state
from victims.keys import Key
from victims.store import Store

# A victim's fit of some seconds, with several checkpoints on the way.
EPOCHS = 24
LONG: dict[str, Any] = {
    "data": {"world": {**TINY["data"]["world"], "suspect": 256}},
    "recipes": {**TINY["recipes"], "victim": {**RECIPE, "epochs": EPOCHS}},
    # One lane: every further worker imports torch for seconds.
    "execution": {**TINY["execution"], "lanes": 1, "checkpoint_seconds": 0.1},
}


def epochs_of(log: Path) -> list[int]:
    """The epochs that the attempts at a fit finished, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split(" epoch ")[1].split("/")[0]) for line in lines if " epoch " in line]


@pytest.mark.slow
def test_kills_in_the_middle_change_no_number(tmp_path: Path) -> None:
    file = write_grid_file(tmp_path, **LONG)
    grid = load_grid(str(file))
    out, store = tmp_path / "out", tmp_path / "store"
    words = ("run", file, "--out", out, "--store", store)
    cells = make_plan(grid).cells
    clean, poisoned = (
        next(c.measure.defended.victim.key for c in cells if c.cell.rate == rate)
        for rate in ("0", "0.1")
    )
    logs = {key: out / "logs" / f"{key}.log" for key in (clean, poisoned)}

    def is_saved(key: Key, epochs: int) -> bool:
        """Whether the newest mid-fit checkpoint lies behind so many whole epochs."""
        saved = store / "partial" / key / "fit.safetensors"
        found = read_state(saved) if saved.exists() else None
        return found is not None and found[0]["epoch"] >= epochs

    with command(tmp_path / "first.txt", *words) as first:
        # A worker dies; the driver gives the fit to another one.
        wait_for(lambda: is_saved(clean, 1))
        victim_of_ours = worker_of(logs[clean])
        first.look()
        assert victim_of_ours in first.family
        os.kill(victim_of_ours, signal.SIGKILL)
        wait_for(lambda: " will be tried again" in first.said)
        # Then the driver dies, in the middle of a fit.
        wait_for(lambda: len(set(epochs_of(logs[clean]))) > 4)
        assert clean not in {row["key"] for row in records(out, "stages")}
        first.send(signal.SIGKILL)
        first.wait()
        # Ray's agents wait a minute for a head that does not come back. They compute nothing.
        first.leaves_nothing(but="Agent")
        # A worker trains on for a moment without its driver, and may come to the end.
        left_behind = int(clean in Store(store))

    with command(tmp_path / "second.txt", *words) as second:
        assert second.wait() == 0, second.said
        second.leaves_nothing()
    assert {row["status"] for row in outcomes(out).values()} == {"ok"}

    # Mid-fit checkpoints were used: no attempt began at the first epoch again, and each lost at
    # most what came after the last checkpoint.
    for key, log in logs.items():
        epochs = epochs_of(log)
        assert epochs.count(1) == 1, (key, epochs)
        assert sorted(set(epochs)) == list(range(1, EPOCHS + 1))
    assert not (store / "partial" / clean).exists()
    # The killed worker's attempt is on record, and the one that ended well.
    tried = Counter((a["key"], a["outcome"]) for a in records(out, "attempts"))
    assert tried[clean, "failed_infrastructure"] == 1
    assert tried[clean, "ok"] == 1 - left_behind
    # Nothing that was whole was made twice.
    made = Counter(row["key"] for row in records(out, "stages") if not row["reused"])
    assert set(made.values()) == {1}

    run_serial(grid, tmp_path / "calm", tmp_path / "calm-store")
    assert numbers(out) == numbers(tmp_path / "calm")
