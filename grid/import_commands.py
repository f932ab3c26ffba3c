"""The command that takes in what others measured: `grid import`."""

from __future__ import annotations

import getpass
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grid.board_commands import results_folder
from grid.places import GRID_FILE, home, run_folders
from grid.registry import table
from victims.errors import UsageError, near

if TYPE_CHECKING:
    from analysis.imports import Told


MOST_LINES = 12


def import_numbers(
    file: Annotated[Path, typer.Argument(help="CSV, or for backdoorbench a Markdown table too.")],
    name: Annotated[str, typer.Option("--as", help="What to call this import.")],
    out: Annotated[str, typer.Option("--out", help="A results directory, or a grid's name.")],
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="table or backdoorbench; told by the first line otherwise."),
    ] = None,
    about: Annotated[
        str,
        typer.Option("--about", help="What the file leaves out: 'dataset=cifar10 rate=10%'."),
    ] = "",
    as_written: Annotated[
        str, typer.Option("--as-written", help="Names of the paper's own, such as 'NAD,AC'.")
    ] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Let it count in place of the one called the same.")
    ] = False,
    by: Annotated[
        str | None, typer.Option("--by", help="Who imports it; default the user.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Import what others measured: shown in grey beside a board, and never mixed with it."""
    from analysis.imports import import_file
    from analysis.imports.figure import Known

    where = results_folder(out)
    if not (where / GRID_FILE).is_file() and not (where / "rows").is_dir():
        raise UsageError(
            f"--out {where}: no results of a grid are there, beside which numbers would be shown."
            f"{near(where.name, [path.name for path in run_folders(home())])} Give the directory"
            " that `grid run` printed, or its name."
        )
    known = Known(
        attacks=table("attacks"),
        defenses=table("defenses"),
        declared=frozenset(filter(None, (word.strip() for word in as_written.split(",")))),
    )
    told = import_file(
        file,
        name,
        where,
        known,
        by=by or _user(),
        kind=kind,
        about=_pairs(about),
        replace=replace,
    )
    if as_json:
        typer.echo(json.dumps(asdict(told), indent=1, default=str))
    else:
        typer.echo("\n".join(_words(told, where)))


def _words(told: Told, where: Path) -> list[str]:
    cautions = [f"caution: {words}" for words in told.cautions]
    if told.path is None:
        return [f"{told.name}: the same {told.numbers} numbers are there already", *cautions]
    names = f"; names as written: {', '.join(told.as_written)}" if told.as_written else ""
    did = "in place of the earlier ones " if told.replaced else ""
    more = len(told.understood) - MOST_LINES
    return [
        f"{told.name}: {told.numbers} numbers of a {told.kind} file {did}in {told.path}{names}",
        *(f"  {line}" for line in told.understood[:MOST_LINES]),
        *([f"  and {more} more"] if more > 0 else []),
        *cautions,
        f"board: grid leaderboard {where}",
    ]


def _pairs(text: str) -> dict[str, str]:
    """Words NAME=VALUE; a value with spaces stands in quotes."""
    found: dict[str, str] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--about {text!r}: {error}") from error
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not value:
            raise UsageError(f"--about: {word!r} is no NAME=VALUE, such as dataset=cifar10")
        if name in found:
            raise UsageError(f"--about: {name} is given twice")
        found[name] = value
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # as in a container that knows no names


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("import")(import_numbers)
