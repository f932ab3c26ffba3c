"""Commands for runs that go to a Ray cluster as jobs: thin, each imports what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grid.options import GridArg, OnlyOpt, StoreOpt, say
from grid.places import home

if TYPE_CHECKING:
    from grid.jobs import Jobs

AddressOpt = Annotated[
    str | None,
    typer.Option("--address", help="The head's dashboard; default http://127.0.0.1:8265."),
]
InsecureOpt = Annotated[
    bool, typer.Option("--insecure", help="Let the token go out in clear, or do without one.")
]
JobArg = Annotated[
    str, typer.Argument(help="A handle file, its folder, or the grid's name or file.")
]
INTERRUPTED = 130


def submit(
    grid: GridArg,
    address: AddressOpt = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Results directory, an absolute path there.")
    ] = None,
    store: StoreOpt = None,
    only: OnlyOpt = None,
    folder: Annotated[
        Path, typer.Option("--working-dir", help="What travels with the job: code, grid files.")
    ] = Path(),
    insecure: InsecureOpt = False,
    on: Annotated[
        str | None, typer.Option("--on", help="What stages ask for: gpu, shared-gpu, four-gpus.")
    ] = None,
) -> None:
    """Run a grid as a job of a Ray cluster; returns when its nodes were found fit."""
    from grid import submit as submitting
    from grid.jobs import Jobs, choose_address

    submitting.check_places(out, store)
    jobs = Jobs(choose_address(address, insecure), insecure)
    handle, path = submitting.submit(
        grid, jobs=jobs, folder=folder, home=home(), out=out, store=store, only=only, on=on
    )
    typer.echo(handle.job)
    say(f"submitted to {handle.address}; handle: {path}")
    further = f"follow it with: grid job logs {path} --follow    end it with: grid job stop {path}"
    try:
        state = submitting.wait_for_preflight(jobs, handle.job, say)
    except KeyboardInterrupt:
        say(f"job {handle.job} goes on; {further}")
        sys.exit(INTERRUPTED)
    if state.has_ended:
        _end(*submitting.verdict(state, jobs.log(handle.job)))
    say(further)


job = typer.Typer(
    name="job",
    help="Follow a run that was submitted.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _submitted(named: str, insecure: bool) -> tuple[Jobs, str]:
    """The cluster of a submitted run, and the job's name there."""
    from grid.handles import find_handle, read_handle
    from grid.jobs import Jobs, choose_address

    handle = read_handle(find_handle(named, home()))
    return Jobs(choose_address(handle.address, insecure), insecure), handle.job


def _end(words: str, code: int) -> None:
    say(f"grid: {words}" if code else words)
    if code:
        raise typer.Exit(code)


@job.command()
def status(run: JobArg, insecure: InsecureOpt = False) -> None:
    """Say where the job stands; its driver's exit code becomes this command's."""
    from grid.submit import verdict

    jobs, name = _submitted(run, insecure)
    state = jobs.state(name)
    _end(*verdict(state, jobs.log(name) if state.has_ended else ""))


@job.command()
def logs(
    run: JobArg,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    insecure: InsecureOpt = False,
) -> None:
    """Print what the job has said."""
    from grid.submit import verdict

    jobs, name = _submitted(run, insecure)
    if not follow:
        typer.echo(jobs.log(name), nl=False)
        return
    state = jobs.follow(name, typer.echo)
    _end(*verdict(state, jobs.log(name)))


@job.command()
def stop(run: JobArg, insecure: InsecureOpt = False) -> None:
    """End the job and wait until it has ended. What it finished is kept."""
    from grid.submit import STOP_SECONDS, verdict

    jobs, name = _submitted(run, insecure)
    words, _ = verdict(jobs.stop(name, STOP_SECONDS), jobs.log(name))
    say(words)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(submit)
    app.add_typer(job, name="job")
