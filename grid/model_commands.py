"""Commands about models: what a grid file can name, and exporting what a run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from grid.board_commands import ResultsOpt, results_folder
from grid.new_files import writing
from victims.errors import UsageError, near

JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def models(
    name: Annotated[
        str, typer.Argument(help="Only names that hold this, in any case.", show_default="")
    ] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Also those that cannot be used, each with the reason.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """List what `model` can name: architectures, and the tags of published weights."""
    show_models(name, as_json, every)


def show_models(name: str, as_json: bool, with_refused: bool = False) -> None:
    """The table of `grid models`: what can be used and, on request, what cannot."""
    from grid.model_list import listed_models

    every = listed_models()
    found = [one for one in every if name.lower() in one["arch"].lower()]
    if not found:
        names = [one["arch"] for one in every]
        by_case = {known.lower(): known for known in names}
        hint = near(name.lower(), by_case)
        raise UsageError(f"no architecture's name holds {name!r}.{hint} `grid models` lists all.")
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    usable = [one for one in found if not one["refused"]]
    refused = [one for one in found if one["refused"]]
    # Of what was asked for by name the reason is the answer.
    shown = [*usable, *(refused if with_refused or not usable else [])]
    for one in shown:
        typer.echo("\n".join(_words(one)))
    if left := len(found) - len(shown):
        typer.echo(f"{left} more cannot be used: --all tells why")
    if any(tag["quick_gelu"] for one in found for tag in one["tags"]):
        typer.echo("* trained with QuickGELU, which the tag brings along")


def _words(one: dict[str, Any]) -> list[str]:
    about = [one["source"], f"{one['image_size']} px" if one["image_size"] else ""]
    about += ["QuickGELU" if one["quick_gelu"] else ""]
    lines = [f"{one['arch']:34} {', '.join(word for word in about if word)}"]
    if one["refused"]:
        lines.append(f"{'':34} cannot be used: {one['refused']}")
    elif one["tags"]:
        marks = {True: "*", False: ""}
        tags = (f"{tag['tag']}{marks[tag['quick_gelu']]}" for tag in one["tags"])
        lines.append(f"{'':34} pretrained: {', '.join(tags)}")
    return lines


def export(
    cell: Annotated[str, typer.Argument(help="Its label, such as attack/rate/defense/s0, or key.")],
    out: Annotated[Path, typer.Option("--out", help="A folder that is empty or not there.")],
    directory: ResultsOpt = "demo",
    victim: Annotated[
        bool, typer.Option("--victim", help="The model that was attacked, not the defended one.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option("--store", help="Artefact store, a path or URI; default the run's own."),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a cell's model as an open_clip checkpoint, with a card that says what it is."""
    from grid.sought import sought

    results = results_folder(directory)
    sought(results, cell, store)  # what is mistyped is told before torch is imported
    from grid.export import export_cell

    with writing("--out", out):
        found = export_cell(results, cell, out, store, victim=victim)
    if as_json:
        names = ("cell", "model_key", "files", "was_there", "notes")
        body = {name: getattr(found, name) for name in names}
        typer.echo(json.dumps({**body, "folder": str(found.folder)}, indent=1))
        return
    told = "is there already, the same" if found.was_there else "written"
    typer.echo(f"{found.cell} ({found.model_key}): {found.folder} {told}")
    for note in found.notes:
        typer.echo(note)
    load = f'open_clip.create_model_and_transforms("local-dir:{found.folder}")'
    typer.echo(f"load it: model, _, preprocess = {load}; model.eval()")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (models, export):
        app.command()(command)
