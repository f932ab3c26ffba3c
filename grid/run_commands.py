"""Commands that work until what a grid or a campaign asks for is there: run, retry and tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grid.leaderboard_command import board
from grid.options import ExecutorName, ExecutorOpt, GridArg, OnlyOpt, OnOpt, OutOpt, StoreOpt, say
from grid.places import meant, places
from victims.errors import GridError, UsageError, counted
from victims.places import shown

if TYPE_CHECKING:
    from grid.run_report import RunReport


def run(
    grid: GridArg,
    out: OutOpt = None,
    store: StoreOpt = None,
    executor: ExecutorOpt = ExecutorName.RAY,
    only: OnlyOpt = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="First check every node of the cluster.")
    ] = False,
    on: OnOpt = None,
) -> None:
    """Run what is missing of a grid, then print its board. The same command resumes."""
    if preflight and executor is ExecutorName.SERIAL:
        raise UsageError(
            "--preflight checks the nodes of a Ray cluster; --executor serial has none"
        )
    _run(grid, out, store, executor, only, retry=False, preflight=preflight, on=on)


def retry(
    grid: GridArg,
    out: OutOpt = None,
    store: StoreOpt = None,
    executor: ExecutorOpt = ExecutorName.RAY,
    only: OnlyOpt = None,
    on: OnOpt = None,
) -> None:
    """Run again the cells whose method failed, after its code was mended."""
    _run(grid, out, store, executor, only, retry=True, on=on)


def _run(
    name: str,
    out: Path | None,
    store: str | None,
    executor: ExecutorName,
    only: str | None,
    retry: bool,
    preflight: bool = False,
    on: str | None = None,
) -> None:
    from grid.quick import exit_code, finished_run, remember

    source, where, uri = meant(name, out, store)
    done = None if only is not None or retry else finished_run(source, where)
    if done is not None:
        say(f"{source.name}: all {done.total()} cells are done in {where}; nothing to run")
        code = exit_code(done)
    else:
        from grid.filters import parse_filter
        from grid.gridfile import load_grid
        from grid.run import run_grid

        chosen = parse_filter(only) if only is not None else None
        report = run_grid(
            load_grid(name, on=on),
            where,
            uri,
            executor=executor.value,
            only=chosen,
            retry=retry,
            checks_nodes=preflight,
            say=say,
        )
        remember(source, where)
        _tell(report, where, uri)
        code = report.code
        if report.counts.get("invalid_victim"):
            say(
                "the victims of an attack failed their gate (its means over seeds), so nothing was"
                " defended on them: give them more epochs, rows or a higher rate, or other"
                " thresholds with `gate` (docs/grid-files.md)"
            )
    board(where, "table")
    if code:
        raise typer.Exit(code)


def _tell(report: RunReport, where: Path, uri: str) -> None:
    counts = ", ".join(f"{n} {status}" for status, n in sorted(report.counts.items()))
    say(f"{report.grid}: {counted(report.cells, 'cell')} ({counts}) in {report.wall_seconds:.1f} s")
    say(f"{counted(report.stages_run, 'stage')} ran; {report.victims_told}")
    if report.stages_run:
        own = report.wall_seconds - report.ray_start_seconds
        say(
            f"{counted(report.lanes, 'lane')}: {own:.1f} s without Ray's start"
            f" ({report.ray_start_seconds:.1f} s) against a lower bound of"
            f" {report.lower_bound_seconds:.1f} s"
        )
    say(f"results: {where}    store: {shown(uri)}    board: grid leaderboard {where}")


def tune(
    campaign: Annotated[str, typer.Argument(help="A campaign's name or a YAML file.")],
    out: OutOpt = None,
    store: StoreOpt = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Then run the held-out grid of what was chosen.")
    ] = False,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would do, and do nothing.")
    ] = False,
) -> None:
    """Search the settings of defenses, on the tuning split alone. The same command goes on."""
    from grid.registry import campaign_source
    from grid.tuning.campaign import run_campaign
    from grid.tuning.file import decode_campaign

    source = campaign_source(campaign)
    where, uri = places(source.name, out, store)
    if show_plan:
        from grid.tuning.preview import preview

        typer.echo("\n".join(preview(decode_campaign(source), uri)))
        return
    report = run_campaign(decode_campaign(source), where, uri, say=say)
    for line in report.lines():
        say(line)
    if report.held_out is None:
        raise GridError("no search chose anything, so there is nothing to evaluate; see above why")
    say(f"{report.name}: {report.wall_seconds:.1f} s; results: {where}    store: {shown(uri)}")
    if report.short:
        raise GridError(
            "trials whose process failed: " + "; ".join(report.short) + ". The same command runs"
            " them again; what was chosen without them is chosen of fewer."
        )
    if evaluate:
        _run(str(report.held_out), where / "held-out", uri, ExecutorName.RAY, None, retry=False)
        return
    say(f"board: grid leaderboard --campaign {where}")
    say(f"next: grid run {report.held_out} --out {where / 'held-out'} --store {shown(uri)}")
