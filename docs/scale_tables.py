"""The figures of the documents: tables of what ``python -m benchmarks NAME --record`` measured.

Every file of ``docs/figures`` is one benchmark's, with the machine, the commit and the load beside
its numbers, and a digest: a check fails when it was edited since.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from docs import tables

LANES = re.compile(r"(\d+) lanes: (.+)")
MARKS = {None: "", True: "reached", False: "**missed**"}


def files() -> list[Path]:
    return sorted((tables.DOCS / "figures").glob("*.json"))


def read_figures(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return body


def parts() -> dict[str, Callable[[], str]]:
    """The generated parts: the table of every benchmark whose figures are there."""
    return {f"{path.stem}-figures": partial(figures, path) for path in files()}


def problems() -> list[str]:
    """Figures that are not as a benchmark left them."""
    return [
        f"figures/{path.name} was edited after it was written: its digest is another one. Run:"
        f" python -m benchmarks {path.stem} --record; make docs"
        for path in files()
        if (body := read_figures(path)).get("digest") != tables.digest_of(body)
    ]


def figures(path: Path) -> str:
    """One benchmark's numbers; those of numbers of lanes side by side, and what they hold for."""
    body = read_figures(path)
    found: dict[str, dict[str, Any]] = body["figures"]
    by_lanes: dict[str, dict[str, dict[str, Any]]] = {}
    plain = {}
    for what, figure in found.items():
        if match := LANES.fullmatch(what):
            by_lanes.setdefault(match[2], {})[match[1]] = figure
        else:
            plain[what] = figure
    lines = [[what, number(f), _aim(f)] for what, f in plain.items()]
    text = tables.table(["what", "figure", "aim"], lines)
    if by_lanes:
        lanes = list(dict.fromkeys(lane for row in by_lanes.values() for lane in row))
        rows = [
            [what, *(number(row[lane]) for lane in lanes), _aims(row.values())]
            for what, row in by_lanes.items()
        ]
        text += "\n" + tables.table(["lanes", *lanes, "aim"], rows)
    return f"{text}\n{made(body)}"


def number(figure: dict[str, Any]) -> str:
    """A figure with its unit: counts whole, and of the rest at least three digits."""
    value, unit = float(figure["value"]), str(figure["unit"])
    if abs(value) >= 1000 or (value.is_integer() and unit != "x"):
        digits = 0
    else:
        digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f} {unit}"


def _aim(figure: dict[str, Any]) -> str:
    return f"{figure['aim']}: {MARKS[figure['ok']]}" if figure["aim"] else ""


def _aims(row: Iterable[dict[str, Any]]) -> str:
    """One aim that a whole row has: reached if it is everywhere."""
    row = list(row)
    return _aim({**row[0], "ok": all(figure["ok"] for figure in row)})


def made(body: dict[str, Any]) -> str:
    """What the figures hold for."""
    about, (before, after) = body["made"], body["load"]
    return (
        f"{about['time'][:10]}, commit `{about['commit']}`, {about['processor']}, {about['cores']}"
        f" cores, Python {about['python']}; load {before:.1f} before, {after:.1f} after.\n"
    )
