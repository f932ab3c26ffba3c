"""Commands about what became of a grid's cells: are all there, and where does one come from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from grid.options import GridArg, JsonOpt, OutOpt, StoreOpt
from grid.places import meant


def check(
    grid: GridArg, out: OutOpt = None, store: StoreOpt = None, as_json: JsonOpt = False
) -> None:
    """Is the grid complete? Exit 3 and a list of what is missing, failed or unreadable, and why."""
    from grid.quick import completeness, exit_code
    from grid.schema.status import completeness_words

    source, where, uri = meant(grid, out, store)
    found = {**completeness(source, where, uri), "results": str(where)}
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        typer.echo(
            f"{found['grid']} in {where}: {completeness_words(found['counts'], found['planned'])}."
        )
        for cell in (*found["incomplete"], *found["failed"], *found["invalid"]):
            typer.echo(f"  {cell['label']}: {cell['status']}: {cell['why']}")
        for words in found["unreadable"]:
            typer.echo(f"  skipped: {words}")
    if code := exit_code(found["counts"]) or (3 if found["unreadable"] else 0):
        raise typer.Exit(code)


def explain(
    cell: Annotated[str, typer.Argument(help="Its label, such as attack/rate/defense/s0, or key.")],
    grid: Annotated[str, typer.Option("--grid", help="The grid it is in.")] = "demo",
    out: OutOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Trace a cell: its configuration, stages, keys, cost, log files and rows."""
    from grid.explain import explain_cell, print_explanation

    _, where, uri = meant(grid, out, store)
    found = explain_cell(grid, cell, where, uri)
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        typer.echo(print_explanation(found))
