"""Commands for who looks after runs and their store: thin, each imports what it needs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grid.places import GRID_FILE, folders_with_needs, home, meant, places, run_folder
from victims.errors import UsageError

if TYPE_CHECKING:
    from grid.control import Control, Request

RunArg = Annotated[
    str | None,
    typer.Argument(help="A grid's name, its file, or a results directory; default: the newest."),
]
OneRun = Annotated[str, typer.Argument(help="A grid's name, its file, or a results directory.")]
OutOpt = Annotated[Path | None, typer.Option("--out", help="Results directory; default runs/NAME.")]
OutsOpt = Annotated[
    list[Path] | None,
    typer.Option("--out", help="Further results directories that use the store; repeatable."),
]
StoreOpt = Annotated[
    str | None, typer.Option("--store", help="Artefact store, a path or URI; default runs/store.")
]
OnlyCells = Annotated[
    str, typer.Option("--only", help="The cells, e.g. 'defense=none rate<0.01'.", show_default="")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
WaitOpt = Annotated[
    float, typer.Option("--wait", help="Seconds to wait for the run to say what it did.")
]


def say(line: str) -> None:
    typer.echo(line, err=True)


def _print(found: Any, as_json: bool, words: Callable[[Any], str]) -> None:
    typer.echo(json.dumps(found, indent=1, sort_keys=True) if as_json else words(found))


def status(
    grid: RunArg = None,
    out: OutOpt = None,
    as_json: JsonOpt = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until the run ends.")] = (
        False
    ),
    every: Annotated[float, typer.Option("--every", help="Seconds between two looks.")] = 2.0,
    stalled_after: Annotated[
        float, typer.Option("--stalled-after", help="Seconds without a log line.")
    ] = 300.0,
) -> None:
    """What a run is doing: cells by state, what runs, time used and to go, reuse, what is stuck.
    Of a campaign: what each search's trials came to."""
    from grid.campaign_status import campaign_status, campaign_status_words
    from grid.status import status_of
    from grid.status_words import status_words

    where = run_folder(grid, out, campaigns=True)
    is_run = (where / GRID_FILE).is_file()
    words = status_words if is_run else campaign_status_words

    def look() -> dict[str, Any]:
        return status_of(where, stalled_after=stalled_after) if is_run else campaign_status(where)

    found = look()
    if not watch:
        _print(found, as_json, words)
    elif as_json or not sys.stdout.isatty():
        _print(found, as_json, words)
        while _goes_on(found):
            time.sleep(every)
            found = look()
            _print(found, as_json, words)
    else:
        from rich.live import Live
        from rich.text import Text

        with Live(Text(words(found)), auto_refresh=False) as live:
            while _goes_on(found):
                time.sleep(every)
                found = look()
                live.update(Text(words(found)), refresh=True)


def _goes_on(found: dict[str, Any]) -> bool:
    return found["state"] in ("starting", "running", "paused")


def pause(
    grid: OneRun,
    out: OutOpt = None,
    wait: WaitOpt = 10.0,
    now: Annotated[
        bool, typer.Option("--now", help="Stop what runs; it goes on from its last checkpoint.")
    ] = False,
) -> None:
    """Start nothing new in a run, until it is resumed; what runs comes to its end."""
    _ask("pause-now" if now else "pause", "", grid, out, wait)


def resume(grid: OneRun, out: OutOpt = None, wait: WaitOpt = 10.0) -> None:
    """Let a paused run start stages again."""
    _ask("resume", "", grid, out, wait)


def cancel(grid: OneRun, only: OnlyCells, out: OutOpt = None, wait: WaitOpt = 10.0) -> None:
    """Give up cells that are not finished, and stop the stages that nobody else needs."""
    _ask("cancel", only, grid, out, wait)


def requeue(grid: OneRun, only: OnlyCells, out: OutOpt = None, wait: WaitOpt = 10.0) -> None:
    """Open cells again that were cancelled or that failed."""
    _ask("requeue", only, grid, out, wait)


def _ask(verb: str, only: str, grid: str, out: Path | None, wait: float) -> None:
    """Leave a request and wait for its answer; where no run is alive, carry it out here."""
    from grid.chains import read_chains
    from grid.control import Control, Verb
    from grid.filters import parse_filter, require_match
    from grid.lock import is_held

    where = run_folder(grid, out)
    if verb in (Verb.CANCEL, Verb.REQUEUE):
        require_match(parse_filter(only), read_chains(where).cells)
    control = Control(where)
    request = control.ask(Verb(verb), only)
    end = time.monotonic() + wait
    while (did := control.answer_to(request)) is None and is_held(where):
        if time.monotonic() > end:
            typer.echo(f"asked; the run in {where} has not answered within {wait:g} s, and will")
            return
        time.sleep(0.05)
    if did is None:
        did = f"{_settle(where, control, request)}; no run is alive, it holds for the next one"
    typer.echo(did)


def _settle(where: Path, control: Control, request: Request) -> str:
    """Carry out a request to a run that no driver works on."""
    from grid.control import Verb

    if request.verb in (Verb.PAUSE, Verb.PAUSE_NOW, Verb.RESUME):
        from grid.lock import only_driver

        with only_driver(where):
            did = control.turn(request)
            control.answer(request, did)
        return did
    from grid.steering import settle

    settle(where, lambda line: None)
    return control.answer_to(request) or "asked"


def verify(
    row: Annotated[str, typer.Argument(help="A cell's label, or its key.")],
    grid: Annotated[str, typer.Option("--grid", help="The grid it is in.")] = "demo",
    start: Annotated[
        str, typer.Option("--from", help="What is made again: measure, defended or model on.")
    ] = "measure",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Allowed difference of shares where none is exact."),
    ] = None,
    out: OutOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Make a cell again from recorded inputs and compare every number; exit 4 if one differs."""
    from grid.verify import level, verification_words, verify_cell

    level(start)
    _, where, uri = meant(grid, out, store)
    found = verify_cell(grid, row, where, uri, start=start, tolerance=tolerance, say=say)
    _print(found, as_json, verification_words)
    if not found["equal"]:
        raise typer.Exit(4)


cache = typer.Typer(
    name="cache",
    help="Look after the store of artefacts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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


@cache.command("ls")
def list_store(store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """What the store holds, by kind: number, bytes, newest use."""
    from grid.cache import contents, contents_words

    _print(contents(_store(store)), as_json, contents_words)


@cache.command()
def why(
    key: Annotated[str, typer.Argument(help="An artefact's key, or its beginning.")],
    out: OutsOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Which cells of which runs need an artefact, and whether it is pinned."""
    from grid.cache import reasons, reasons_words

    _print(reasons(_store(store), key, _folders(out)), as_json, reasons_words)


KeyOrNothing = Annotated[str | None, typer.Argument(help="An artefact's key.")]
PinGrid = Annotated[str | None, typer.Option("--grid", help="All that this run's cells rest on.")]


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


def _one_of(key: str | None, grid: str | None) -> None:
    if (key is None) == (grid is None):
        raise UsageError("give a KEY, or --grid GRID for all that a run rests on; one of the two")


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
    _print(found, as_json, collection_words)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (status, pause, resume, cancel, requeue, verify):
        app.command()(command)
    app.add_typer(cache, name="cache")
