"""The generated parts of ``scale.md``: figures of benchmarks, as one command left them.

``python -m benchmarks scale schedule compact practice arithmetic --json docs/scale-figures.json``
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("scale-figures.json")


def parts() -> dict[str, Callable[[], str]]:
    """A table for each benchmark that was run, and where they ran."""
    if not FIGURES.exists():
        return {}
    found: dict[str, Any] = json.loads(FIGURES.read_text("utf-8"))
    tables = {
        f"scale-{name}": partial(table, figures) for name, figures in found["figures"].items()
    }
    return {**tables, "scale-machine": partial(machine, found)}


def table(figures: dict[str, Any]) -> str:
    lines = ["| what | figure | unit | aim | |", "| --- | ---: | --- | --- | --- |"]
    marks = {None: "", True: "ok", False: "missed"}
    for what, figure in figures.items():
        value = figure["value"]
        digits = 3 if figure["unit"] in ("x", "s") else 1 if abs(value) < 1000 else 0
        cells = [what, f"{value:,.{digits}f}", figure["unit"], figure["aim"], marks[figure["ok"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine(found: dict[str, Any]) -> str:
    about = found["machine"]
    loads = found["load_before_and_after"]
    busy = ", ".join(
        f"{name} {low:.0f} to {high:.0f}" for name, (low, high) in sorted(loads.items())
    )
    return (
        f"{about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, Python"
        f" {about['python']}, commit `{about['commit']}`, {about['time'][:10]}. Load averages while"
        f" measuring: {busy}. Above the number of cores others had the machine: wall times are"
        " then longer than they need to be, ratios of the same moment less so.\n"
    )
