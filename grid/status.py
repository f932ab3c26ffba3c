"""What a run is doing, read from its results directory alone: while it runs, and after it died.

Rows and records say what became of cells and stages, ``chains.json`` what is planned,
``progress.json`` what the driver said last, log files when a stage last wrote a line. Nothing
heavy is imported here.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grid.chains import Chains, ListedCell, read_chains
from grid.control import Control
from grid.journal import read_progress
from grid.lock import is_held
from grid.quick import SETTLED, files_in, outcomes_in
from grid.schema.status import Status

SHOWN_CELLS = 3


def status_of(out: Path, *, stalled_after: float = 300.0, slowest: int = 5) -> dict[str, Any]:
    """Everything that is known about a run, as JSON types."""
    now = time.time()
    chains, progress = read_chains(out), read_progress(out)
    is_alive, control = is_held(out), Control(out)
    told = outcomes_in(out)
    outcomes = {cell: status for cell, (status, _) in told.items()}
    open_cells = [cell for cell in chains.cells if _is_open(outcomes.get(cell.key))]
    # A driver that lives and has not said a word: what is there is its predecessor's.
    is_older = is_alive and (progress or {}).get("state") in ("ended", "stopped")
    running = _running(out, chains, open_cells, progress, now) if is_alive and progress else []
    for stage in running:
        quiet = stage["quiet_seconds"]
        stage["is_stalled"] = quiet is not None and quiet >= stalled_after
    records = _records(out)
    return {
        "grid": chains.grid,
        "hash": chains.hash,
        "results": str(out),
        "store": chains.store,
        **driver_state(progress, is_alive),
        "paused": control.is_paused,
        "requests": [{"verb": r.verb.value, "only": r.only} for r in control.pending()],
        "planned": len(chains.cells),
        "cells": _cells(chains, outcomes, {stage["key"] for stage in running}),
        "waiting": _waiting(chains, told),
        "lanes": (progress or {}).get("lanes"),
        "running": sorted(running, key=lambda stage: -(stage["seconds"] or 0)),
        "stalled_after_seconds": stalled_after,
        "stages": _hits({} if is_older else (progress or {}).get("stages", {})),
        "seconds": _seconds(chains, records, _lost(out), progress),
        "slowest": _slowest(chains, records, slowest),
    }


def _is_open(status: str | None) -> bool:
    """Whether a run takes the cell up, or would."""
    return status not in SETTLED and status != Status.CANCELLED


def driver_state(progress: Mapping[str, Any] | None, is_alive: bool) -> dict[str, Any]:
    """``running``, ``paused``, ``starting``, ``ended``, ``stopped`` or ``died``, and whose word
    it is. A driver holds its lock as long as it lives, whatever it last wrote."""
    if progress is None:
        return {"state": "starting" if is_alive else "never said", "why": "", "driver": None}
    said = str(progress["state"])
    state = said
    if not is_alive and said not in ("ended", "stopped"):
        state = "died"
    elif is_alive and said in ("ended", "stopped"):
        state = "starting"
    names = ("pid", "host", "started_at", "written_at")
    driver = {name: progress.get(name) for name in names}
    driver["silent_seconds"] = max(0.0, time.time() - float(progress["written_at"]))
    return {"state": state, "why": progress.get("why", ""), "driver": driver}


def _cells(chains: Chains, outcomes: Mapping[str, str], running: set[str]) -> dict[str, int]:
    """Cells by state: their outcome, else ``running`` where their defense or their measurement
    runs now, else what they wait as."""
    found: Counter[str] = Counter()
    for cell in chains.cells:
        status = outcomes.get(cell.key, Status.MISSING.value)
        is_running = _is_open(status) and not running.isdisjoint(chains.own(cell))
        found["running" if is_running else status] += 1
    order = ["running", *(status.value for status in Status)]
    return {state: found[state] for state in order if found[state]}


def _waiting(chains: Chains, told: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    """What measured cells without an outcome wait for, and how many do."""
    found = [told.get(cell.key, ("", "")) for cell in chains.cells]
    return dict(Counter(why for status, why in found if status == Status.MISSING and why))


def _running(
    out: Path,
    chains: Chains,
    cells: list[ListedCell],
    progress: Mapping[str, Any],
    now: float,
) -> list[dict[str, Any]]:
    """The stages that run: since when, how long they should take, who waits for them, and how
    long ago each wrote its last line."""
    entries = progress.get("running", [])
    users = chains.users(cells) if entries else {}
    found = []
    for entry in entries:
        key = str(entry["key"])
        begun = entry.get("begun_at")
        log = out / "logs" / f"{key}.log"
        quiet = None
        with contextlib.suppress(OSError):
            if begun is not None:
                quiet = max(0.0, now - max(log.stat().st_mtime, begun))
        waiting = users.get(key, [])
        found.append(
            {
                "key": key,
                "kind": entry.get("kind"),
                "name": entry.get("name"),
                "has_begun": begun is not None,
                "seconds": None if begun is None else now - begun,
                "expected_seconds": entry.get("expected_seconds"),
                "quiet_seconds": quiet,
                "log": str(log) if log.exists() else None,
                "cells": [cell.label for cell in waiting[:SHOWN_CELLS]],
                "num_cells": len(waiting),
            }
        )
    return found


def _hits(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of the last run: how many were found in the store, how many it has to make and
    has made; and the share of them all that were found."""
    found, made = stages.get("found", 0), stages.get("made", 0)
    every = found + max(made, stages.get("planned", 0))
    share = found / every if every else None
    return {**stages, "found_share": share}


def _records(out: Path) -> dict[str, dict[str, Any]]:
    """Stage -> its record, of whoever made it."""
    names = ["key", "kind", "name", "seconds", "device_seconds", "reused"]
    found: dict[str, dict[str, Any]] = {}
    for file in files_in(out, "stages"):
        for record in file.read(columns=names).to_pylist():
            if not record["reused"]:
                found[record["key"]] = record
    return found


def _lost(out: Path) -> dict[str, float]:
    """Stage -> the seconds of its attempts that came to nothing."""
    found: dict[str, float] = {}
    for file in files_in(out, "attempts"):
        for attempt in file.read(columns=["key", "outcome", "seconds"]).to_pylist():
            if attempt["outcome"] != "ok":
                found[attempt["key"]] = found.get(attempt["key"], 0.0) + attempt["seconds"]
    return found


def _seconds(
    chains: Chains,
    records: Mapping[str, Mapping[str, Any]],
    lost: Mapping[str, float],
    progress: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Seconds of stages that this directory's runs made, and what is left by recorded times.

    ``gpu`` multiplies by the GPUs that a stage asks for; ``training`` is the part spent in fits,
    ``lost`` that of attempts that failed.
    """
    gpus = {key: stage.gpus for key, stage in chains.stages.items()}
    said = progress or {}
    return {
        "used": sum(record["seconds"] for record in records.values()) + sum(lost.values()),
        "lost": sum(lost.values()),
        "training": sum(record["device_seconds"] or 0.0 for record in records.values()),
        "gpu_used": sum(r["seconds"] * gpus.get(key, 0.0) for key, r in records.items())
        + sum(seconds * gpus.get(key, 0.0) for key, seconds in lost.items()),
        "left": said.get("seconds_left"),
        "gpu_left": said.get("gpu_seconds_left"),
        "eta": said.get("eta_seconds"),
    }


def _slowest(
    chains: Chains, records: Mapping[str, Mapping[str, Any]], number: int
) -> list[dict[str, Any]]:
    """The cells whose own stages, the defense and its measurement, took longest."""
    found = []
    for cell in chains.cells:
        own = [records[key] for key in chains.own(cell) if key in records]
        if own:
            seconds = sum(record["seconds"] for record in own)
            found.append({"label": cell.label, "cell": cell.key, "seconds": seconds})
    return sorted(found, key=lambda entry: -entry["seconds"])[:number]
