"""What the presets for real corpora are expected to take, for docs/real-data.md.

``python -m docs.real_tables`` plans each preset as if its files were there (a manifest of as many
pairs as CC3M gives, ImageNet with empty pictures, a weights file that only its digest is asked of)
and writes ``docs/real-presets.json``. Hours are those of `grid plan`: assumed, not measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "docs" / "real-presets.json"
PRESETS = ("rn50-cc3m", "vit-b32", "rn50-scratch")
DEVICES = ("A100", "H100")
PAIRS = 2_800_000  # about what can still be fetched of CC3M
PER_CLASS = {"train": 5, "val": 50}
DOLLARS = 2.0  # an hour of an A100, as an example
GIGA = 1e9


def parts() -> Mapping[str, Callable[[], str]]:
    return {"real-presets": real_presets}


def digest_of(name: str) -> str:
    """Of a preset's text: the table is of this very file."""
    text = (ROOT / "grid" / "presets" / f"{name}.yaml").read_bytes()
    return hashlib.sha256(text).hexdigest()


def real_presets() -> str:
    """The table, from what was written; a preset that has changed since is an error."""
    from docs.tables import table

    rows = []
    for name, found in json.loads(FOUND.read_text())["presets"].items():
        if found["sha256"] != digest_of(name):
            raise SystemExit(f"{name} has changed: python -m docs.real_tables, then make docs")
        rows.append(
            [
                f"`{name}`",
                f"{found['cells']:,}",
                str(found["victims"]),
                *(f"{found['hours'][device]:,.0f}" for device in DEVICES),
                f"{found['undefended_hours']['A100']:,.0f}",
                f"${DOLLARS * found['hours']['A100']:,.0f}",
                f"{found['pairs_gb']:,.0f} GB",
                f"{found['store_gb']:,.0f} GB",
            ]
        )
    head = ["preset", "cells", "victims", *(f"{device} hours" for device in DEVICES)]
    head += ["of these undefended, A100", f"at ${DOLLARS:g} an A100 hour", "pairs", "store"]
    return table(head, rows)


def estimates(name: str, folder: Path) -> dict[str, Any]:
    """One preset, planned."""
    from grid.assumed import assumed_device
    from grid.gridfile import decode_grid
    from grid.history import History
    from grid.planning import make_plan
    from grid.registry import Source, grid_source
    from grid.stages import DefendStage, ModelStage

    source = grid_source(name)
    text = source.text.replace(
        "pretrained: openai", f"pretrained: {folder / 'weights.safetensors'}"
    )
    grid = decode_grid(Source(name, source.source, text))
    assert assumed_device(grid.execution) in DEVICES
    plan = make_plan(grid)
    hours, undefended = {}, {}
    bare = plan.missing(
        [c.measure for c in plan.cells if c.cell.defense.method.name == "none"], set()
    )
    for device in DEVICES:
        history = History(None, device)
        hours[device] = sum(map(history.seconds, plan.stages.values())) / 3600
        undefended[device] = sum(map(history.seconds, bare.values())) / 3600
    fits = [
        stage
        for stage in plan.stages.values()
        if isinstance(stage, ModelStage) or (isinstance(stage, DefendStage) and stage.trains)
    ]
    data = grid.data
    rows = sum(data.rows(split) for split in ("suspect", "clean", "public"))
    size = 4 * sum(p.numel() for p in replace(grid.model).empty().parameters())
    judged = data.rows("tuning") + data.rows("report")
    pixels = 3 * grid.model.size**2
    return {
        "sha256": digest_of(name),
        "cells": len(plan.cells) + len(plan.refused),
        "victims": plan.num_victims(),
        "fits": len(fits),
        "hours": hours,
        "undefended_hours": undefended,
        "pairs_gb": rows * pixels / GIGA,
        "store_gb": (len(fits) * size + judged * pixels) / GIGA,
    }


def made_files(folder: Path) -> None:
    """As much of the files as a plan looks at."""
    (folder / "pairs").mkdir()
    manifest = {"form": 1, "digest": "0" * 16, "size": 224, "rows": PAIRS}
    (folder / "pairs" / "corpus.json").write_text(json.dumps(manifest))
    (folder / "weights.safetensors").write_bytes(b"asked for its digest alone")
    for part, count in PER_CLASS.items():
        for label in range(1000):
            place = folder / "imagenet" / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.JPEG").touch()
    from victims.imagenet_names import imagenet_names

    (folder / "imagenet" / "classnames.txt").write_text("\n".join(imagenet_names()) + "\n")
    os.environ |= {"CC3M": str(folder / "pairs"), "IMAGENET": str(folder / "imagenet")}
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        made_files(Path(name))
        found = {preset: estimates(preset, Path(name)) for preset in PRESETS}
    FOUND.write_text(json.dumps({"presets": found}, indent=1) + "\n")
    print(real_presets())


if __name__ == "__main__":
    main()
