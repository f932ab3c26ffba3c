"""Answers about a grid that need no torch: remembered plans, keyed by the grid's text and the code.

A plan is a function of the grid file, of our code and of the files that the grid file names. After
a run it is kept as ``plan.json`` in the results directory under the digest of the first two, so
that asking about a finished grid, or running it again, compares a list of cell keys with the rows
on disk and imports nothing heavy. A grid that names other files is planned anew each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grid.nodes import Raw, parse
from grid.registry import Source, code_digest
from grid.schema.arrow import KIND_KEY, VERSION_KEY, mistyped
from grid.schema.columns import KINDS, SCHEMA_VERSION
from grid.schema.status import NO_VICTIM, WITHOUT_OUTCOME, Status, is_complete
from victims.errors import UsageError
from victims.places import shown

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# What a driver has done that is in no table yet; without it, a driver has ended as it should.
UNWRITTEN = "unwritten.jsonl"
SETTLED = {
    Status.OK,
    Status.INERT,
    Status.INVALID_VICTIM,
    Status.SKIPPED,
    Status.NOT_APPLICABLE,
    Status.FAILED_METHOD,
}


def outcomes_in(out: Path) -> dict[str, tuple[str, str]]:
    """Cell key -> newest (status, detail) in the rows of a results directory."""
    import pyarrow as pa
    import pyarrow.compute as pc

    newest: dict[str, tuple[Any, str, str]] = {}
    names = ["cell", "metric", "status", "detail", "written_at"]
    for file in files_in(out, "rows"):
        with contextlib.suppress(OSError, pa.ArrowException):
            table = file.read(columns=names)
            table = table.filter(pc.equal(table["metric"], "cell"))
            for cell, _, status, detail, written in zip(
                *(table[name].to_pylist() for name in names), strict=True
            ):
                if cell not in newest or written >= newest[cell][0]:
                    newest[cell] = (written, status, detail or "")
    return {cell: (status, detail) for cell, (_, status, detail) in newest.items()}


def files_in(out: Path, kind: str) -> Iterator[pq.ParquetFile]:
    """Our files of a kind in a results directory; a newer version's are refused.

    A board names files that are not whole or not ours; here they only mean that what they may
    have held is computed again. Files that are put into one meanwhile may be read both ways.
    """
    for path in _listed(out / kind):
        file, fault = _opened(path, kind)
        if file is not None and not fault:
            yield file


def unreadable_in(out: Path) -> list[str]:
    """The files of a results directory that are not whole or not ours, each with its fault.

    They are read to their end: a whole footer does not say that the data are.
    """
    found = []
    for kind in KINDS:
        for path in _listed(out / kind):
            file, fault = _opened(path, kind)
            if file is not None and not fault:
                fault = _fault_inside(file, kind)
            if fault:
                found.append(f"{path}: {fault}")
    path = out / "grid.json"
    if path.exists():
        try:
            json.loads(path.read_text())["cells"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.append(f"{path}: cannot be read ({error or type(error).__name__})")
    return found


def _fault_inside(file: pq.ParquetFile, kind: str) -> str:
    """What is wrong with the data of a file whose footer is whole."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            if kind == "rows" and pc.all(pc.is_finite(table["value"])).as_py() is False:
                return "holds values that are not finite; their rows are left out"
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({str(error).splitlines()[0]})"
    return ""


def _opened(path: Path, kind: str) -> tuple[pq.ParquetFile | None, str]:
    """A file of a kind, or what is wrong with it; a file that went meanwhile is neither."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        return None, "is a link that leads nowhere" if path.is_symlink() else ""
    except (OSError, pa.ArrowException) as error:
        return None, f"cannot be read ({str(error).splitlines()[0]})"
    marks = file.schema_arrow.metadata or {}
    version = marks.get(VERSION_KEY.encode(), b"").decode(errors="replace")
    if not version.isdigit() or marks.get(KIND_KEY.encode()) != kind.encode():
        return file, f"is no {kind} file of this tool"
    if int(version) > SCHEMA_VERSION:
        raise UsageError(
            f"{path} was written by a newer version of this tool (results schema {version},"
            f" this version reads up to {SCHEMA_VERSION}). Upgrade, or give another --out."
        )
    return file, mistyped(file.schema_arrow, kind)


def _listed(folder: Path) -> Iterator[Path]:
    """Files as listed, then those that came meanwhile: one may hold what went meanwhile."""
    seen: set[Path] = set()
    while fresh := sorted(set(folder.glob("[!.]*.parquet")) - seen):
        yield from fresh
        seen.update(fresh)


def _digest(source: Source) -> str:
    text = hashlib.sha256(source.text.encode()).hexdigest()
    return hashlib.sha256(f"{text}{code_digest()}".encode()).hexdigest()


def names_files(source: Source) -> bool:
    """Whether the plan depends on files beside the grid's own."""
    items = parse(source.text, source.source).items()
    data, guides, defenses = (items.get(name) for name in ("data", "guides", "defenses"))
    if _is_pretrained(items.get("model")):
        return True
    if data is not None and set(data.items()) != {"world"}:
        return True
    if defenses is not None and any(_names_its_settings(item) for item in defenses.elements()):
        return True
    made = [guide for guide in (guides.items() if guides else {}).values() if guide.node.data]
    return any(
        {"weights", "of"} & set(given := guide.items()) or _is_pretrained(given.get("model"))
        for guide in made
    )


def _is_pretrained(model: Raw | None) -> bool:
    """Whether a model's weights are those of a file."""
    return (
        model is not None
        and isinstance(model.node.data, Mapping)
        and ("pretrained" in model.items())
    )


def _names_its_settings(entry: Raw) -> bool:
    """Whether a defense's settings are those of a campaign's file."""
    if not isinstance(entry.node.data, Mapping):
        return False
    given = [item for item in entry.items().values() if isinstance(item.node.data, Mapping)]
    return any(
        isinstance(item.items()["tuned"].node.data, str)
        for item in given
        if "tuned" in item.items()
    )


def remember(source: Source, out: Path) -> None:
    """Keep which cells the plan that just ran has."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        cells = json.loads((out / "grid.json").read_text())["cells"]
        body = {"digest": _digest(source), "cells": [cell["cell"] for cell in cells]}
        (out / "plan.json").write_text(json.dumps(body))


def _remembered(source: Source, out: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((out / "plan.json").read_text())
        same = found["digest"] == _digest(source) and not names_files(source)
        return found if same else None
    except (UsageError, OSError, ValueError, KeyError, TypeError):
        return None


def finished_run(source: Source, out: Path) -> Counter[str] | None:
    """Cells by status if the same plan has run here and every cell is settled."""
    plan = _remembered(source, out)
    if plan is None or (out / UNWRITTEN).exists():
        return None
    status = outcomes_in(out)
    if not all(cell in status and status[cell][0] in SETTLED for cell in plan["cells"]):
        return None
    return Counter(status[cell][0] for cell in plan["cells"])


def exit_code(counts: Mapping[str, int]) -> int:
    """0 complete, 3 incomplete or a method failed, 4 victims failed their gate."""
    if not is_complete(counts) or counts.get(Status.FAILED_METHOD):
        return 3
    # Start weights that fail theirs leave nothing but skipped cells.
    return 4 if counts.get(Status.INVALID_VICTIM) or counts.get(Status.SKIPPED) else 0


def plan_summary(
    source: Source, out: Path, store_uri: str, *, on: str | None = None, only: str | None = None
) -> dict[str, Any]:
    """What a run would do, of all cells or of those that a filter takes. Of a finished grid,
    without planning."""
    plan = _remembered(source, out)
    is_finished = plan is not None and finished_run(source, out) is not None
    if (
        plan is not None
        and only is None
        and is_finished
        and plan.get("store") == shown(store_uri)
        and "summary" in plan
    ):
        found: dict[str, Any] = plan["summary"]
        return found
    from dataclasses import replace

    import torch

    from grid.assumed import assumed_device
    from grid.barred import barred_cells
    from grid.gridfile import decode_grid
    from grid.history import History
    from grid.plan import finished
    from grid.plan_summary import summary
    from grid.planning import make_plan
    from grid.room import on_lanes
    from victims.store import Store

    grid = decode_grid(source)
    if on is not None:
        grid = replace(grid, execution=grid.execution.moved(on))
    made = make_plan(grid)
    device = assumed_device(grid.execution)
    history, done, store = History(None, device), set(), None
    root = Path(store_uri)
    if "://" in store_uri or (root / "store.json").exists():
        store = Store(store_uri)
        done = finished(store, made)
        history = History(Path(store.root, "history.json") if store.local else None, device)
    final = SETTLED | {Status.CANCELLED}
    settled = {cell for cell, (status, _) in outcomes_in(out).items() if status in final}
    if only is not None:
        from grid.filters import parse_filter, require_match

        taken = parse_filter(only)
        require_match(taken, [cell.cell for cell in made.cells])
        left_out = {cell.key for cell in made.cells if not taken.matches(cell.cell)}
        settled |= left_out
    barred = barred_cells(made, store, done) - settled if store else set()
    settled |= barred
    lanes = grid.execution.lanes or os.cpu_count() or 1
    room = on_lanes(grid.execution, lanes, torch.cuda.device_count())
    found = summary(made, done, history, room, settled)
    found["barred"] = len(barred)
    if only is not None:
        found["taken"] = len(made.cells) - len(left_out)
    if plan is not None and is_finished and only is None:
        with contextlib.suppress(OSError):
            body = {**plan, "summary": found, "store": shown(store_uri)}
            (out / "plan.json").write_text(json.dumps(body))
    return found


def completeness(source: Source, out: Path, store_uri: str) -> dict[str, Any]:
    """Planned cells against rows: what is missing, what failed and why, what was invalid.

    ``incomplete`` are the cells without an outcome, ``failed`` those whose method failed;
    ``unreadable`` are files that are skipped, whatever they may have held.
    """
    cells = _planned(source, out)
    status = outcomes_in(out)
    counts: Counter[str] = Counter()
    told: dict[str, list[dict[str, str]]] = {"incomplete": [], "failed": [], "invalid": []}
    unstarted: dict[str, dict[str, str]] = {}
    for cell in cells:
        state, why = status.get(cell["cell"], (Status.MISSING.value, "not run yet"))
        counts[state] += 1
        entry = {"label": cell["label"], "cell": cell["cell"], "status": state, "why": why}
        if state in WITHOUT_OUTCOME:
            told["incomplete"].append(entry)
        elif state == Status.FAILED_METHOD:
            told["failed"].append(entry)
        elif state == Status.INVALID_VICTIM:
            told["invalid"].append(entry)
        elif state == Status.SKIPPED and why.startswith(NO_VICTIM):
            unstarted.setdefault(why, entry)  # the same of every cell
    told["invalid"].extend(unstarted.values())
    return {
        "grid": source.name,
        "planned": len(cells),
        "counts": dict(counts),
        "complete": is_complete(counts),
        "unreadable": unreadable_in(out),
        **told,
    }


def _planned(source: Source, out: Path) -> list[dict[str, Any]]:
    if _remembered(source, out) is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            cells: list[dict[str, Any]] = json.loads((out / "grid.json").read_text())["cells"]
            return cells
    from grid.gridfile import decode_grid
    from grid.planning import make_plan
    from grid.results import planned_cells

    return planned_cells(make_plan(decode_grid(source)))
