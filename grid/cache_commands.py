"""Commands for who looks after the store of artefacts: what it holds, why, and what may go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grid.options import JsonOpt, OutOpt, StoreOpt, print_found
from grid.places import folders_with_needs, home, places, run_folder
from victims.errors import UsageError

OutsOpt = Annotated[
    list[Path] | None,
    typer.Option("--out", help="Further results directories that use the store; repeatable."),
]
KeyOrNothing = Annotated[str | None, typer.Argument(help="An artefact's key.")]
PinGrid = Annotated[str | None, typer.Option("--grid", help="All that this run's cells rest on.")]


cache = typer.Typer(
    name="cache",
    help="Look after the store of artefacts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@cache.command("ls")
def list_store(store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """What the store holds, by kind: number, bytes, newest use."""
    from grid.cache import contents, contents_words

    print_found(contents(_store(store)), as_json, contents_words)


@cache.command()
def why(
    key: Annotated[str, typer.Argument(help="An artefact's key, or its beginning.")],
    out: OutsOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Which cells of which runs need an artefact, and whether it is pinned."""
    from grid.cache import reasons, reasons_words

    print_found(reasons(_store(store), key, _folders(out)), as_json, reasons_words)


@cache.command()
def pin(
    key: KeyOrNothing = None, grid: PinGrid = None, out: OutOpt = None, store: StoreOpt = None
) -> None:
    """Keep an artefact, or all that a run rests on, from ever being collected."""
    from grid.cache import pin_key, pin_run

    _one_of(key, grid)
    if key is not None:
        typer.echo(pin_key(_store(store), key))
    else:
        typer.echo(pin_run(_store(store), run_folder(grid, out)))


@cache.command()
def unpin(
    key: KeyOrNothing = None,
    grid: Annotated[str | None, typer.Option("--grid", help="The name of a pinned run.")] = None,
    store: StoreOpt = None,
) -> None:
    """Take back a pin."""
    from grid.cache import unpin as take_back

    _one_of(key, grid)
    typer.echo(take_back(_store(store), key, grid))


@cache.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Do it; else it is only told.")] = False,
    older_than: Annotated[
        float | None, typer.Option("--older-than", help="Only what was not used for so many days.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option("--max-bytes", help="Only as much, least recently used first, as it takes."),
    ] = None,
    out: OutsOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Collect what no known run needs and nobody pinned. Tells what it would do; --delete acts."""
    from grid.collect import collect, collection_words

    found = collect(
        _store(store), _folders(out), delete=delete, older_than=older_than, max_bytes=max_bytes
    )
    print_found(found, as_json, collection_words)


def _folders(outs: list[Path] | None) -> list[Path]:
    """The results directories that are known: those at home and those given."""
    found = [*folders_with_needs(home()), *(outs or [])]
    return list(dict.fromkeys(path.resolve() for path in found))


def _store(uri: str | None) -> Any:
    from victims.store import Store

    where = places("", None, uri)[1]
    if "://" not in where and not (Path(where) / "store.json").is_file():
        raise UsageError(f"--store {where}: no store is there; --store names another")
    return Store(where)


def _one_of(key: str | None, grid: str | None) -> None:
    if (key is None) == (grid is None):
        raise UsageError("give a KEY, or --grid GRID for all that a run rests on; one of the two")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(cache, name="cache")
