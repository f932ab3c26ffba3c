"""Commands for who looks after runs and their results: thin, each imports what it needs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grid.board_commands import results_folder
from grid.options import JsonOpt, OutOpt, StoreOpt, print_found, say
from grid.places import GRID_FILE, meant, run_folder

if TYPE_CHECKING:
    from grid.control import Control, Request


RunArg = Annotated[
    str | None,
    typer.Argument(help="A grid's name, its file, or a results directory; default: the newest."),
]
OneRun = Annotated[str, typer.Argument(help="A grid's name, its file, or a results directory.")]
OnlyCells = Annotated[
    str, typer.Option("--only", help="The cells, e.g. 'defense=none rate<0.01'.", show_default="")
]
WaitOpt = Annotated[
    float, typer.Option("--wait", help="Seconds to wait for the run to say what it did.")
]


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
        print_found(found, as_json, words)
    elif as_json or not sys.stdout.isatty():
        print_found(found, as_json, words)
        while _goes_on(found):
            time.sleep(every)
            found = look()
            print_found(found, as_json, words)
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
    print_found(found, as_json, verification_words)
    if not found["equal"]:
        raise typer.Exit(4)


def compact(
    directory: Annotated[str, typer.Argument(help="A results directory, or a grid's name.")] = (
        "demo"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Put the many small files of a results directory into few, also beside a run."""
    from dataclasses import asdict

    from grid.compact import compact as put_together
    from grid.compact import words

    found = put_together(results_folder(directory), dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        typer.echo("\n".join(words(found, dry_run)))


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (status, pause, resume, cancel, requeue, verify):
        app.command()(command)
