"""Where a cell comes from: its configuration, its stages, who ran them, and what was measured.

Works before, during and after a run; it only reads.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from grid.assumed import assumed_device
from grid.cell_columns import describe_cell
from grid.gridfile import load_grid
from grid.history import History
from grid.plan import CellPlan, Plan, chain, finished
from grid.planning import make_plan
from grid.quick import files_in
from grid.results import judge, planned_cells
from grid.schema.status import Status
from grid.spec import Cell, Grid
from grid.stages import Stage
from victims.errors import UsageError, counted, near
from victims.keys import Key, canonical
from victims.pretrained import Weights
from victims.store import Damaged, Store

SHOWN = ("clean_top1", "asr_top1", "psr_top1", "text_hit_top1", "r_acc")
MOST_LISTED = 10


def explain_cell(
    grid_arg: str, cell_label_or_key: str, results_dir: Path, store_uri: str
) -> dict[str, Any]:
    """Everything that is known about one cell, as JSON types."""
    grid = load_grid(grid_arg)
    plan = make_plan(grid)
    key, cell, planned, reason = find_cell(plan, cell_label_or_key)
    rows = list(newest_rows(results_dir, key))
    outcome = next((row for row in rows if row["metric"] == "cell"), None)
    found: dict[str, Any] = {
        "grid": grid.name,
        "hash": grid.identity_hash,
        "cell": key,
        "label": cell.label,
        "status": outcome["status"] if outcome else Status.MISSING.value,
        "detail": (outcome["detail"] if outcome else None) or reason,
        "configuration": _configuration(grid, cell),
        "gate": None,
        "stages": [],
        "metrics": [_metric(row) for row in rows if row["metric"] != "cell"],
    }
    if planned is not None:
        store = _store(store_uri)
        done = finished(store, plan) if store else set()
        found["gate"] = _gate(plan, planned, store, done)
        found["stages"] = _stages(plan, planned, store, done, results_dir)
    return found


def find_cell(plan: Plan, wanted: str) -> tuple[str, Cell, CellPlan | None, str | None]:
    """The cell's key, itself, its plan where it has one, and why it has none."""
    identities = planned_cells(plan)
    sources: list[tuple[Cell, CellPlan | None, str | None]] = [
        *((planned.cell, planned, None) for planned in plan.cells),
        *((cell, None, reason) for cell, reason in plan.refused),
    ]
    keys = [identity["cell"] for identity in identities]
    labels = [source[0].label for source in sources]
    named = [i for i, names in enumerate(zip(keys, labels, strict=True)) if wanted in names]
    if len(named) == 1:
        return keys[named[0]], *sources[named[0]]
    # A label is cut short where it leaves out the target or the defense's seed.
    meant = named or [i for i, label in enumerate(labels) if label.startswith(f"{wanted}/")]
    if len(meant) > 1:
        listed = ", ".join(f"{labels[i]} ({keys[i]})" for i in meant[:MOST_LISTED])
        more = ", ..." if len(meant) > MOST_LISTED else ""
        raise UsageError(
            f"{wanted!r} means {len(meant)} cells of grid {plan.grid.name}: {listed}{more}. Give"
            " one of these labels, or its key."
        )
    example = "" if near(wanted, labels) else f" One of them is {labels[0]!r}."
    raise UsageError(
        f"no cell called {wanted!r} among the {len(labels)} of grid {plan.grid.name}."
        f"{near(wanted, labels)}{example} `grid check` lists those that are missing; another grid"
        " is given with --grid."
    )


def _store(uri: str) -> Store | None:
    """The store, unless nothing was ever put there: asking makes no folders."""
    there = "://" in uri or (Path(uri) / "store.json").exists()
    return Store(uri) if there else None


def _configuration(grid: Grid, cell: Cell) -> dict[str, Any]:
    recipes = {"victim": cell.defense.victim_recipe, "repair": cell.defense.recipe}
    if grid.regime.value == "F" and grid.weights is None:
        recipes["reference"] = grid.reference
    body = {
        **describe_cell(cell, grid),
        "track": grid.track,
        "regime": grid.regime,
        "target": grid.data.classes[cell.target],
        "attack_params": canonical(cell.attack.method)["fields"],
        "defense_params": canonical(cell.defense.method)["fields"],
        "guide": None if cell.defense.guide is None else cell.defense.guide.identity(),
        "recipes": {name: canonical(recipe)["fields"] for name, recipe in recipes.items()},
        "model": canonical(grid.model)["fields"],
        "weights": None if grid.weights is None else _weights(grid.weights),
        "data": canonical(grid.data)["fields"],
        "execution": canonical(grid.execution)["fields"],
    }
    # The seeds of a cell's recipes come from its own; shown once, under their own names.
    for name in ("victim", "repair"):
        del body["recipes"][name]["seed"]
    plain: dict[str, Any] = canonical(body)
    return plain


def _weights(weights: Weights) -> dict[str, Any]:
    return {"sha256": weights.sha256, "path": weights.path, "tag": weights.tag or None}


def _gate(
    plan: Plan, planned: CellPlan, store: Store | None, done: set[Key]
) -> dict[str, Any] | None:
    """The gate of the cell's victim and, once it can be known, its verdict."""
    gate = plan.gates.get(planned.group)
    if gate is None:
        return None
    found: dict[str, Any] = {
        "checks": [stage.key for stage in gate.stages],
        "rule": "validity" if gate.is_reference else "inert",
        "cell_waits": planned.gated,
        "status": None,
        "detail": "not judged yet",
    }
    if store is not None and done.issuperset(found["checks"]):
        try:
            verdict = judge(store, gate, plan.grid.gate)
        except Damaged as error:
            return {**found, "detail": str(error)}
        found |= {"status": verdict.status.value, "detail": verdict.detail}
        found |= {"asr": verdict.asr, "lift": verdict.lift, "clean_loss": verdict.clean_loss}
        found["asr_of_victims"] = list(verdict.each)
    return found


def _stages(
    plan: Plan, planned: CellPlan, store: Store | None, done: set[Key], results: Path
) -> list[dict[str, Any]]:
    """The cell's stages, inputs first, with who ran them and who else needs them."""
    uses = _uses(plan)
    rows = records_of(results, "stages")
    # Who made it; failing that, who found it made by another stage.
    ran = {row["key"]: row for row in sorted(rows, key=lambda row: not row["reused"])}
    tried = {row["key"]: row for row in records_of(results, "attempts")}
    past = Path(store.root, "history.json") if store and store.local else None
    history = History(past, assumed_device(plan.grid.execution))
    found = []
    for key, stage in chain(plan, planned).items():
        row, attempt = ran.get(key), tried.get(key)
        log = results / "logs" / f"{key}.log"
        failed = key not in done and attempt is not None and attempt["outcome"] != "ok"
        found.append(
            {
                "kind": stage.kind,
                "name": _name(stage),
                "key": key,
                "state": "finished" if key in done else "failed" if failed else "to run",
                "error": attempt["error"] if attempt and failed else None,
                "seconds": row["seconds"] if row else None,
                "estimated_seconds": None if key in done else history.seconds(stage),
                "host": row["host"] if row else None,
                "pid": row["pid"] if row else None,
                "device": row["device"] if row else None,
                "log": str(log) if log.exists() else None,
                "other_cells": uses[key] - 1,
            }
        )
    return found


def _uses(plan: Plan) -> Counter[Key]:
    """How many cells rest on each stage, through their gates or directly."""
    gates = {group: set(plan.missing(gate.stages, set())) for group, gate in plan.gates.items()}
    uses: Counter[Key] = Counter()
    start = set(plan.missing([plan.start] if plan.start else [], set()))
    for cell in plan.cells:
        own = set(plan.missing(cell.stages, set()))
        uses.update(start | gates.get(cell.group, set()) | own)
    return uses


def _name(stage: Stage) -> str:
    spec = getattr(stage, "spec", None)
    return f"corpus:{spec.split}" if spec is not None else stage.family


def records_of(results: Path, kind: str) -> list[dict[str, Any]]:
    """All records of a kind, oldest first."""
    records: list[dict[str, Any]] = []
    for file in files_in(results, kind):
        records.extend(file.read().to_pylist())
    return sorted(records, key=lambda record: record["written_at"])


def newest_rows(results: Path, cell: str) -> Iterator[dict[str, Any]]:
    """The newest row of each evaluation set and metric of a cell."""
    import pyarrow as pa
    import pyarrow.compute as pc

    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files_in(results, "rows"):
        with contextlib.suppress(OSError, pa.ArrowException):
            table = file.read()
            for row in table.filter(pc.equal(table["cell"], cell)).to_pylist():
                about = (row["eval_set"], row["metric"])
                if about not in newest or row["written_at"] >= newest[about]["written_at"]:
                    newest[about] = row
    # Metrics of an earlier outcome do not belong to the present one.
    outcome: datetime | None = newest.get(("", "cell"), {}).get("written_at")
    for row in newest.values():
        if outcome is not None and row["written_at"] >= outcome:
            yield row


def _metric(row: dict[str, Any]) -> dict[str, Any]:
    names = ("eval_set", "metric", "value", "low", "high", "n", "clean_victim", "init_model")
    return {name: row[name] for name in names}


def print_explanation(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{found['label']}  ({found['cell']}, grid {found['grid']} {found['hash']})"]
    lines.append(f"status: {found['status']}" + (f": {found['detail']}" if found["detail"] else ""))
    lines.append("configuration:")
    for name, value in found["configuration"].items():
        lines.append(f"  {name}: {json.dumps(value, sort_keys=True)}")
    gate = found["gate"]
    if gate is not None:
        said = gate["status"] or "open"
        detail = f": {gate['detail']}" if gate["detail"] else ""
        numbers = ""
        if gate["status"] and not gate["detail"]:
            each = gate["asr_of_victims"]
            mean = f"mean of {len(each)} victims, " if len(each) > 1 else ""
            numbers = f" ({mean}success {gate['asr']:.1%}, lift {100 * gate['lift']:.1f} points)"
        lines.append(f"gate ({gate['rule']}): {said}{numbers}{detail}")
    if found["stages"]:
        lines.append("stages, inputs first:")
    for stage in found["stages"]:
        took = f"{stage['seconds']:.2f} s" if stage["seconds"] is not None else ""
        where = f"process {stage['pid']} on {stage['host']}" if stage["host"] else ""
        shared = (
            f"shared with {counted(stage['other_cells'], 'cell')}"
            if stage["other_cells"]
            else "its own"
        )
        about = ", ".join(word for word in (stage["state"], took, where, shared) if word)
        lines.append(f"  {stage['kind']:9} {stage['key']:26} {stage['name']}: {about}")
        if stage["error"]:
            lines.append(f"{'':12}{stage['error']}")
        if stage["log"]:
            lines.append(f"{'':12}log: {stage['log']}")
    if found["metrics"]:
        lines.append("measured:")
    for metric in found["metrics"]:
        if metric["metric"] not in SHOWN and not metric["metric"].startswith("found_"):
            continue
        if metric["value"] is None:  # does not apply to this attack
            continue
        beside = metric["clean_victim"]
        clean = f", clean victim {beside:.1%}" if beside is not None else ""
        spread = ""
        if metric["low"] is not None:
            spread = f" [{metric['low']:.1%}, {metric['high']:.1%}]"
        lines.append(
            f"  {metric['eval_set']:8} {metric['metric']:12} {metric['value']:.1%}{spread}"
            f" of {metric['n']}{clean}"
        )
    return "\n".join(lines)
