"""Commands before a run: a grid file of one's own, and what a run of it would do and take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grid.new_files import file_for, writing
from grid.options import GridArg, JsonOpt, OnlyOpt, OnOpt, OutOpt, StoreOpt, say
from grid.places import meant
from victims.errors import GridError, UsageError, counted

if TYPE_CHECKING:
    from grid.spec import Grid


def init(
    grid: GridArg,
    out: Annotated[
        Path | None, typer.Option("--out", help="The new file; default: it is printed.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, the key with dots, the value as YAML; repeatable."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="A smoke form: so many rows, one epoch, one seed, open gate."),
    ] = None,
) -> None:
    """Copy a preset to a file of your own, to change it or to try it small on your data."""
    from grid.init_file import written
    from grid.registry import grid_source

    text = written(grid_source(grid), changes or (), limit)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise UsageError(f"{out} is there already; give another name, or remove it first")
    with writing("--out", file_for("--out", out)):
        out.write_text(text, encoding="utf-8")
    say(f"{out} is written; next: grid plan {out}")


def plan(
    grid: GridArg,
    out: OutOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
    only: OnlyOpt = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="Say what of it this Ray cluster, HOST:PORT or auto, cannot hold; default"
            " RAY_ADDRESS.",
            show_default=False,
        ),
    ] = None,
    on: OnOpt = None,
) -> None:
    """Show what a run would do: cells, stages, reuse, estimated seconds. Runs nothing."""
    from grid.quick import plan_summary

    address = _cluster(cluster)
    source, where, uri = meant(grid, out, store)
    found = plan_summary(source, where, uri, on=on, only=only)
    if address:
        from grid.gridfile import load_grid

        try:
            found = {**found, "cluster": _offered(load_grid(grid, on=on), found, address)}
        except GridError as error:
            if cluster is not None:
                raise
            # Named by the environment, and perhaps long gone: the plan is good without it.
            found["cautions"] = [*found["cautions"], f"RAY_ADDRESS: {error}"]
            address = ""
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        _print_plan(found)
    if address and found["cluster"]["never"]:
        raise typer.Exit(1)


def _cluster(given: str | None) -> str:
    """The address of the cluster to ask, or nothing; jobs name another one in the variable."""
    if given is not None and "://" in given:
        raise UsageError(
            f"--cluster {given}: expected HOST:PORT, as in RAY_ADDRESS, or auto. From outside a"
            " cluster `grid submit` checks its nodes."
        )
    if given == "local":
        raise UsageError(
            "--cluster local: that starts a cluster here, and a plan asks one that runs. Leave it"
            " out, or give HOST:PORT or auto."
        )
    named = os.environ.get("RAY_ADDRESS", "")
    return given or ("" if "://" in named else named)


def _offered(grid: Grid, plan: Mapping[str, Any], address: str) -> dict[str, Any]:
    """What a running cluster has for the stages of a plan, and how long it takes at best."""
    from grid.cluster.offer import offer
    from grid.room import Room, busiest

    work = {kind: e["seconds"] for kind, e in plan["kinds"].items() if e["to_run"]}
    found = offer(grid.execution, list(work), address)
    room = Room(grid.execution, found.nodes, grid.execution.lanes)
    return {
        "estimated_seconds": max(plan["longest_chain_seconds"], busiest(work, room)),
        "address": address,
        "nodes": len(found.nodes),
        "may_grow": found.may_grow,
        "node_types": found.types,
        "lacks": {lack.kind: lack.words for lack in found.lacks},
        "startable": {lack.kind: list(lack.types) for lack in found.lacks if lack.types},
        "never": [lack.kind for lack in found.never],
    }


def _print_plan(found: dict[str, Any]) -> None:
    from grid.status_words import duration

    typer.echo(f"{found['grid']} ({found['hash']}): {counted(found['cells'], 'cell')}")
    if "taken" in found:
        typer.echo(f"to run are stages of the {counted(found['taken'], 'cell')} that --only takes")
    if found.get("barred"):
        cells = counted(found["barred"], "cell")
        typer.echo(f"{cells} to be skipped: the store holds victims that failed their gate")
    shared = found["stages_without_sharing"] - found["stages"]
    typer.echo(
        f"{counted(found['stages'], 'stage')} ({shared} more without sharing),"
        f" {found['stages_finished']} of them finished, {found['stages_to_run']} to run"
    )
    typer.echo(f"{counted(found['victims'], 'victim')}, {found['victims_to_train']} to train")
    for kind, entry in found["kinds"].items():
        typer.echo(
            f"  {kind:10} {entry['stages']:6.0f} stages {entry['to_run']:6.0f} to run"
            f" {duration(entry['seconds']):>9} of work"
        )
    typer.echo(_time_words(found))
    for words in found["cautions"]:
        typer.echo(f"caution: {words}")
    for words in found.get("assumed", ()):
        typer.echo(f"note: {words}")
    if "cluster" in found:
        _print_offer(found["cluster"])


def _time_words(found: Mapping[str, Any]) -> str:
    """How long a plan takes here; where it is for GPUs that are not here, how many hours of one."""
    from grid.status_words import duration

    longest = f"longest chain {duration(found['longest_chain_seconds'])}"
    on_gpus = found.get("gpu_seconds")
    if on_gpus is None:
        here = f"about {duration(found['estimated_seconds'])} on {counted(found['lanes'], 'lane')}"
        return f"{here} ({duration(found['seconds_of_work'])} of work, {longest})"
    rest = found["seconds_of_work"] - on_gpus
    others = f", and {duration(rest)} of work on CPUs" if rest >= 1 else ""
    hours = f"{on_gpus / 3600:,.4g} GPU-hours" if on_gpus >= 36 else f"{on_gpus:.2g} GPU-seconds"
    return f"about {hours} ({duration(on_gpus)} of one {found['gpu']}; {longest}){others}"


def _print_offer(cluster: dict[str, Any]) -> None:
    from grid.status_words import duration

    fits = "" if cluster["lacks"] else "; there is a place for every stage"
    typer.echo(
        f"cluster {cluster['address']}: {counted(cluster['nodes'], 'node')}{fits}; about"
        f" {duration(cluster['estimated_seconds'])} there"
    )
    for kind, words in cluster["lacks"].items():
        if kind in cluster["never"]:
            typer.echo(f"  never: {words}")
        elif kind in cluster["startable"]:
            types = ", ".join(cluster["startable"][kind])
            typer.echo(f"  once it has grown: {words} Its autoscaler can start {types}.")
        else:
            typer.echo(f"  perhaps: {words} The cluster may grow; Ray does not know by what.")
