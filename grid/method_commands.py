"""Commands that show what methods do: to pairs, with the rows of their data, under the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grid.options import GridArg, OnlyOpt, OutOpt, StoreOpt, say
from grid.places import meant


def gallery(
    grid: GridArg,
    out: Annotated[Path | None, typer.Option("--out", help="Default runs/NAME.")] = None,
    store: StoreOpt = None,
) -> None:
    """Draw what every attack does to pairs: gallery.png and gallery.html."""
    from grid.gallery import make_gallery
    from grid.gridfile import load_grid
    from victims.store import Store

    decoded = load_grid(grid)
    _, where, uri = meant(grid, out, store)
    picture, page = make_gallery(decoded, where, Store(uri), say)
    typer.echo(f"{picture}\n{page}")


def scores(
    grid: GridArg,
    only: OnlyOpt = None,
    out: OutOpt = None,
    store: StoreOpt = None,
) -> None:
    """Draw how defenses judged the rows of their data, the truth in colours: scores.png."""
    from grid.filters import parse_filter
    from grid.gridfile import load_grid
    from grid.planning import make_plan
    from grid.score_maps import draw, score_maps
    from victims.store import Store

    decoded = load_grid(grid)
    _, where, uri = meant(grid, out, store)
    chosen = parse_filter(only) if only else None
    picture = where / "scores.png"
    draw(score_maps(make_plan(decoded), Store(uri), chosen, say), picture)
    typer.echo(f"{picture}")


def mock(
    method: Annotated[str, typer.Argument(help="A method's name, or package.module:Class.")],
) -> None:
    """Run the contract tests on a method you are writing, on a tiny world, in seconds."""
    from grid.kit import check_method

    failed = check_method(method, typer.echo)
    if failed:
        raise typer.Exit(1)
