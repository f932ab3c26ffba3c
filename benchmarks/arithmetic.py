"""What the papers' full grid asks for at the papers' size, from the plan and one small run.

Pair views, requests and artefacts follow from the plan of the full grid (see ``schedule``), with
the rows of CleanCLIP's setting in place of the embedded world's: 500,000 suspect pairs, 100,000
clean ones. Bytes of the weights follow from the parameters of open_clip's model; bytes of all other
artefacts and rows per cell are those of a run of preset smoke, so they are those of small data.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from benchmarks.common import Figure, Figures, grid
from benchmarks.overhead import FINE
from benchmarks.schedule import papers_grid
from grid.plan import Plan
from grid.stage_order import parents
from grid.stages import DefendStage, ModelStage

ARCHITECTURE = "RN50"
SUSPECT, CLEAN = 500_000, 100_000
# Pair views per second of one device: what to look up, or to measure, for the one at hand.
THROUGHPUTS = (500, 1000, 2000)
BYTES_PER_PARAMETER = 4


def parameters(architecture: str) -> int:
    """How many numbers open_clip's model has."""
    import open_clip

    model = open_clip.create_model(architecture, pretrained=None, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def pair_views(plan: Plan) -> dict[str, float]:
    """Pairs passed by all fits of a kind, at the papers' numbers of rows; searches included."""
    views: dict[str, float] = defaultdict(float)
    for stage in plan.stages.values():
        if isinstance(stage, ModelStage):
            scale = SUSPECT / plan.grid.data.suspect
        elif isinstance(stage, DefendStage) and stage.trains:
            used = stage.clean in parents(stage)
            rows = stage.clean.spec.num_rows if used else plan.grid.data.suspect
            scale = (CLEAN if used else SUSPECT) / rows
        else:
            continue
        views[stage.kind] += 1000 * stage.work * scale
    return views


def artefacts(store: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and files of one artefact, by kind, in a store."""
    sizes: dict[str, list[int]] = defaultdict(list)
    files: dict[str, list[int]] = defaultdict(list)
    for path in store.glob("manifests/*/*.json"):
        found = json.loads(path.read_text("utf-8"))["files"]
        sizes[path.parent.name].append(sum(int(file["size"]) for file in found.values()))
        files[path.parent.name].append(len(found))
    return ({k: fmean(v) for k, v in sizes.items()}, {k: fmean(v) for k, v in files.items()})


def requests(plan: Plan, files: dict[str, float]) -> float:
    """What an object store is asked for at least: of every stage one question, its inputs'
    manifests and files, its own files and its own manifest."""
    asked = 0.0
    for stage in plan.stages.values():
        own = 1 + files.get(stage.kind, 1)
        asked += 1 + own + sum(1 + files.get(parent.kind, 1) for parent in parents(stage))
    return asked


def main(*, quick: bool = False, executor: str = "ray") -> Figures:
    """Views, hours by throughput, bytes by kind, requests, rows."""
    plan = papers_grid(4, 2, 1) if quick else papers_grid(None, 4, 5)
    with tempfile.TemporaryDirectory() as scratch:
        out, store = Path(scratch, "out"), Path(scratch, "store")
        places = ("--out", str(out), "--store", str(store), "--executor", executor)
        grid("run", "smoke", *places, expect=FINE)
        sizes, files = artefacts(store)
        ran = json.loads((out / "run.json").read_text("utf-8"))
        rows, row_bytes, sample_bytes = _rows(out)
    views, kinds = pair_views(plan), Counter(stage.kind for stage in plan.stages.values())
    weights = BYTES_PER_PARAMETER * parameters(ARCHITECTURE)
    models = kinds["model"] + sum(
        1 for s in plan.stages.values() if isinstance(s, DefendStage) and s.trains
    )
    cells = len(plan.cells)
    figures = {"cells": Figure(value=cells, unit="cells")}
    figures |= {f"views of {k}": Figure(value=v / 1e9, unit="1e9 views") for k, v in views.items()}
    for speed in THROUGHPUTS:
        hours = sum(views.values()) / speed / 3600
        figures[f"device hours at {speed} views/s"] = Figure(value=hours, unit="h")
    figures[f"weights of {ARCHITECTURE}"] = Figure(value=weights / 1e6, unit="MB")
    figures["models kept"] = Figure(value=models, unit="models")
    figures["weights of all models"] = Figure(value=models * weights / 1e9, unit="GB")
    figures |= {
        f"one artefact of {kind}, preset smoke": Figure(value=size / 1e3, unit="kB")
        for kind, size in sorted(sizes.items())
    }
    figures["requests at least"] = Figure(value=requests(plan, files), unit="requests")
    figures["rows per cell"] = Figure(value=rows / ran["cells"], unit="rows")
    figures["rows of all cells"] = Figure(value=cells * rows / ran["cells"], unit="rows")
    figures["bytes of a row"] = Figure(value=row_bytes / rows, unit="bytes")
    figures["bytes of a cell's outcomes, 300 images"] = Figure(value=sample_bytes, unit="bytes")
    return figures


def _rows(out: Path) -> tuple[int, float, float]:
    """Rows of a run, the bytes of their files, and of one cell's per-image outcomes."""
    import pyarrow.parquet as pq

    files = list((out / "rows").glob("*.parquet"))
    samples = [path.stat().st_size for path in (out / "samples").glob("*.parquet")]
    rows = sum(pq.read_metadata(path).num_rows for path in files)
    return rows, float(sum(path.stat().st_size for path in files)), fmean(samples)
