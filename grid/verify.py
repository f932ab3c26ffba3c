"""Making a cell again from recorded inputs, and comparing every number with its recorded row.

The inputs are borrowed from the store and what rests on them is made in a store of its own, which
goes away afterwards. On the machine that made the row, with as many threads and the same version
of torch, every number must be the same; elsewhere sums round differently, and a tolerance holds.
The verdict of the gate, which rests on the victims of other seeds too, is not made again.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grid.explain import find_cell, newest_rows, records_of
from grid.gridfile import load_grid
from grid.plan import CellPlan, Plan
from grid.planning import make_plan
from grid.results import RowMaker, versions
from grid.schema.status import MEASURED
from grid.stages import PoisonStage, Stage
from grid.work import Ended, choose_device, execute
from victims.errors import GridError, UsageError, unknown
from victims.recipe import Runtime
from victims.store import Artefact, Store

# What is made again from each level on: stages of these kinds. Data and triggers are inputs.
LEVELS = {
    "measure": ("measure",),
    "defended": ("measure", "defended"),
    "model": ("measure", "defended", "model"),
}
# Where nothing promises equal bits: of shares, and of other numbers relative to their size. Fits
# make differences of rounding grow.
TOLERANCE = {"measure": 0.005, "defended": 0.05, "model": 0.05}
NUMBERS = ("value", "low", "high", "clean_victim", "init_model")
EXACT = ("n", "eval_digest", "templates_digest", "preprocess_digest", "corpus_digest")
SHOWN = 10


def level(name: str) -> str:
    """A level by its name."""
    if name not in LEVELS:
        raise unknown("level", name, LEVELS, "--from")
    return name


def verify_cell(
    grid_arg: str,
    cell_label_or_key: str,
    results: Path,
    store_uri: str,
    *,
    start: str = "measure",
    tolerance: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the cell again and say what differs, as JSON types."""
    grid = load_grid(grid_arg)
    plan = make_plan(grid)
    key, cell, planned, reason = find_cell(plan, cell_label_or_key)
    recorded = {(row["eval_set"], row["metric"]): row for row in newest_rows(results, key)}
    outcome = recorded.pop(("", "cell"), None)
    if planned is None or outcome is None or outcome["status"] not in MEASURED:
        why = reason or (outcome["status"] if outcome else "it has no row")
        raise UsageError(
            f"{cell.label}: {results} holds no numbers of it to verify ({why}). `grid explain"
            f" {cell.label}` tells what there is of it."
        )
    started = time.perf_counter()
    runtime = Runtime(
        device=choose_device(grid.execution.device, 1.0),
        threads=int(outcome["threads"]),
        checkpoint_activations=grid.execution.checkpoint_activations,
    )
    with tempfile.TemporaryDirectory(prefix="grid-verify-") as folder:
        borrowed, made = _make(plan, planned, Store(store_uri), folder, runtime, start, say)
        rows = RowMaker(plan, Store(folder), runtime, set()).measured(planned, None, 1, False)
    again = {(row["eval_set"], row["metric"]): row for row in rows}
    del again["", "cell"]
    differences = _unlike(outcome, _maker(results, outcome), runtime)
    allowed = 0.0 if tolerance is None and not differences else tolerance
    allowed = TOLERANCE[start] if allowed is None else allowed
    compared = list(_compare(recorded, again, allowed))
    return {
        "cell": key,
        "label": cell.label,
        "from": start,
        "borrowed": borrowed,
        "made": made,
        "exact": allowed == 0,
        "tolerance": allowed,
        "circumstances_that_differ": differences,
        "numbers": len(compared),
        "different": [entry for entry in compared if not entry["equal"]],
        "largest_difference": max((entry["difference"] or 0.0 for entry in compared), default=0.0),
        "equal": all(entry["equal"] for entry in compared),
        "seconds": time.perf_counter() - started,
    }


def _make(
    plan: Plan,
    planned: CellPlan,
    store: Store,
    folder: str,
    runtime: Runtime,
    start: str,
    say: Callable[[str], None],
) -> tuple[int, list[dict[str, Any]]]:
    """Fill a store with borrowed inputs and what is made of them; how many, and which."""
    again, temporary = LEVELS[start], Store(folder)
    # The rows tell what the victim cost, whether or not the defense was given it.
    chain = plan.missing([*planned.stages, planned.victim, planned.measure.defended.suspect], set())
    borrowed = 0
    for stage in chain.values():
        if stage.kind in again:
            continue
        for key in _leaves(stage, store):
            if key in store and key not in temporary:
                _borrow(store.need(key), temporary)
                borrowed += 1
    made = []
    for key, stage in chain.items():
        if key in temporary:
            continue
        was_kept = stage.kind not in again
        say(f"making {key} ({stage.family})" + (", which the store lacks" if was_kept else ""))
        done = execute(stage, folder, runtime, "")
        if done.ended is not Ended.OK:
            raise GridError(f"{key} ({stage.family}) could not be made again: {done.message}")
        made.append({"key": key, "name": stage.family, "seconds": done.seconds})
    return borrowed, made


def _leaves(stage: Stage, store: Store) -> Iterator[str]:
    """The artefacts that are read where the stage's is: its own and those that it points at."""
    yield stage.key
    if isinstance(stage, PoisonStage):
        yield stage.truth_key
    if stage.kind == "defended" and stage.key in store:
        yield str(store.need(stage.key).meta["model_key"])


def _borrow(artefact: Artefact, store: Store) -> None:
    """The same artefact in another store; its files are linked where they lie on one disk."""

    def link(scratch: Path) -> Mapping[str, Any]:
        for name in artefact.files:
            found = artefact.path(name)
            try:
                (scratch / name).hardlink_to(found)
            except OSError:  # another disk
                shutil.copyfile(found, scratch / name)
        return artefact.meta

    store.make(artefact.key, link)


def _maker(results: Path, outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of the measurement, which knows its machine; empty if another run made it."""
    records = [r for r in records_of(results, "stages") if r["key"] == outcome["measure_key"]]
    return records[-1] if records else {}


def _unlike(
    outcome: Mapping[str, Any], record: Mapping[str, Any], runtime: Runtime
) -> dict[str, list[Any]]:
    """What is not as it was when the row was made, of all that can change a sum's last bits."""
    then = {
        "host": record.get("host"),
        "device": str(outcome["device"]).split(":")[0],
        "torch": json.loads(outcome["versions"] or "{}").get("torch"),
    }
    now = {
        "host": socket.gethostname(),
        "device": runtime.device.split(":")[0],
        "torch": json.loads(versions()).get("torch"),
    }
    return {name: [then[name], now[name]] for name in then if then[name] != now[name]}


def _compare(
    recorded: Mapping[tuple[str, str], Mapping[str, Any]],
    again: Mapping[tuple[str, str], Mapping[str, Any]],
    tolerance: float,
) -> Iterator[dict[str, Any]]:
    """Every number of every row; a row that only one side has differs."""
    for about in sorted({*recorded, *again}):
        old, new = recorded.get(about), again.get(about)
        common = {"eval_set": about[0], "metric": about[1]}
        if old is None or new is None:
            lacking = {"recorded": old is not None, "again": new is not None}
            yield {**common, "column": "row", **lacking, "difference": None, "equal": False}
            continue
        for name in EXACT:
            before, now = old.get(name), new.get(name)
            if before != now:
                found = {"column": name, "recorded": before, "again": now}
                yield {**common, **found, "difference": None, "equal": False}
        for name in NUMBERS:
            before, now = old.get(name), new.get(name)
            if before is None and now is None:
                continue
            difference = None
            if before is not None and now is not None:
                difference = abs(before - now)
            # Shares lie in 0..1; what does not is compared relative to its size.
            limit = tolerance * max(1.0, abs(before or 0.0))
            yield {
                **common,
                "column": name,
                "recorded": before,
                "again": now,
                "difference": difference,
                "equal": difference is not None and difference <= limit,
            }


def verification_words(found: Mapping[str, Any]) -> str:
    """What `grid verify` prints."""
    names = ", ".join(f"{stage['name']} {stage['seconds']:.1f} s" for stage in found["made"])
    lines = [
        f"{found['label']} ({found['cell']}), from {found['from']}:"
        f" {found['borrowed']} artefacts borrowed, {len(found['made'])} stages made again",
        f"  {names}",
    ]
    if found["circumstances_that_differ"]:
        changed = [
            f"{name} was {then}, is {now}"
            for name, (then, now) in found["circumstances_that_differ"].items()
        ]
        lines.append(f"  {'; '.join(changed)}: equal bits are not promised")
    how = "exactly" if found["exact"] else f"within {found['tolerance']:g}"
    number = len(found["different"])
    lines.append(
        f"{'EQUAL' if found['equal'] else 'DIFFERENT'}: {found['numbers'] - number} of"
        f" {found['numbers']} numbers are {how} as recorded; the largest difference is"
        f" {found['largest_difference']:.3g}"
    )
    for entry in found["different"][:SHOWN]:
        lines.append(
            f"  {entry['eval_set']} {entry['metric']} {entry['column']}: recorded"
            f" {entry['recorded']}, made again {entry['again']}"
        )
    if number > SHOWN:
        lines.append(f"  and {number - SHOWN} more")
    return "\n".join(lines)
