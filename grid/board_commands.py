"""Commands that read results besides the board: comparing two defenses, and SQL."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from grid.new_files import file_for, writing
from grid.options import say
from victims.errors import UsageError

ResultsOpt = Annotated[
    str, typer.Option("--in", help="A results directory, or the name of what ran.")
]
FormOpt = Annotated[str, typer.Option("--format", help="table, md, csv, json, tex or html.")]
EvalSetOpt = Annotated[str, typer.Option("--set", help="report, shifted, or a further set.")]


def results_folder(named: str) -> Path:
    """A results directory by its path, or by the name of what ran."""
    from grid.schema.directory import results_directory

    return results_directory(named)


def terminal_width(least: int = 100) -> int:
    """A board needs 100 columns to say what it must; a narrower terminal wraps it."""
    import shutil

    return max(least, shutil.get_terminal_size((140, 40)).columns)


def compare(
    first: Annotated[str, typer.Argument(help="A defense's label.")],
    second: Annotated[str, typer.Argument(help="Another one's.")],
    directory: ResultsOpt = "demo",
    form: FormOpt = "table",
    eval_set: EvalSetOpt = "report",
) -> None:
    """Compare two defenses on the victims that both have: effect, interval, p."""
    from analysis.board import check_eval_set
    from analysis.compare import Comparison
    from analysis.compare import compare as compared
    from analysis.compare_render import comparison_text
    from analysis.reader import Tables, read_tables

    def read(tables: Tables) -> Comparison:
        check_eval_set(tables, eval_set)
        return compared(tables, first, second, eval_set)

    found = read_tables(results_folder(directory), read)
    typer.echo(comparison_text(found, form, terminal_width()), nl=False)


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT; - reads it from the input.")],
    directory: ResultsOpt = "demo",
    form: FormOpt = "table",
    limit: Annotated[
        int, typer.Option("--limit", help="Lines of a table or md; others hold all.", min=1)
    ] = 200,
) -> None:
    """Run a SELECT over a results directory's views. It can read nothing else, and write nothing.

    Views: rows, newest, cells, outcomes, board, completeness, samples, newest_samples, stages,
    attempts, trials, newest_trials, curves, fits, rocs, features, pictures, imported, published.
    DESCRIBE board lists columns.
    """
    from analysis.query import answer_text, run_sql

    text = sys.stdin.read() if query == "-" else query
    if not text.strip():
        raise UsageError("no SQL was given: one SELECT over the views")
    answer, warnings = run_sql(results_folder(directory), text)
    typer.echo(answer_text(answer, form, terminal_width(40), limit), nl=False)
    for warning in warnings:
        typer.echo(f"! {warning}", err=True)


def report(
    directory: Annotated[
        str, typer.Argument(help="A results directory, or the name of what ran.")
    ] = "demo",
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; default DIR/report.html.")
    ] = None,
    eval_set: EvalSetOpt = "report",
    group: Annotated[
        str, typer.Option("--group", help="Compare all, or within equal needs.")
    ] = "all",
    at_ca_loss: Annotated[
        float | None,
        typer.Option("--at-ca-loss", help="Compare what loses at most so many points of CA."),
    ] = None,
) -> None:
    """Write results as one page that needs nothing else: open it in a browser."""
    from analysis.leaderboard import Asked
    from analysis.report import write_report

    where = results_folder(directory)
    asked = Asked(eval_set=eval_set, group=group, at_ca_loss=at_ca_loss)
    path = file_for("--out", out or where / "report.html")
    with writing("--out", path):
        typer.echo(str(write_report(where, path, asked, say)))


def view(
    directory: Annotated[
        str, typer.Argument(help="A results directory, or the name of what ran.")
    ] = "demo",
    port: Annotated[
        int, typer.Option("--port", help="Of this machine; 0 takes any that is free.", min=0)
    ] = 8787,
) -> None:
    """Show results and live progress in a browser of this machine, until Ctrl-C."""
    from grid.view import HOST, serve

    where = results_folder(directory)
    try:
        server = serve(where, port)
    except (OSError, OverflowError) as error:
        raise UsageError(f"port {port} cannot be had ({error}): give another --port") from error
    typer.echo(f"http://{HOST}:{server.server_port}/")
    # Ctrl-C is how a view ends: nothing was cut short, and there is nothing to go on with.
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (compare, sql, report, view):
        app.command()(command)
