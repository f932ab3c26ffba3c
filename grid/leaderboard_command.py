"""The command that prints a board, of grids or of a campaign, and draws its figures."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grid.board_commands import EvalSetOpt, results_folder, terminal_width
from grid.new_files import folder_for, writing
from grid.options import say
from victims.errors import UsageError

if TYPE_CHECKING:
    from analysis.leaderboard import Asked
    from analysis.theme import Drawn


class Format(StrEnum):
    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"
    TEX = "tex"
    HTML = "html"


def leaderboard(
    directory: Annotated[str, typer.Argument(help="A results directory, or a grid's name.")] = (
        "demo"
    ),
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="table, md, csv, json, tex or html. csv, tex and html hold the lines; with"
            " --part tiers, --group, --worst-case or --at-ca-loss the tiers.",
        ),
    ] = Format.TABLE,
    eval_set: EvalSetOpt = "report",
    part: Annotated[
        str, typer.Option("--part", help="lines by attack and rate, tiers over all, or all.")
    ] = "all",
    group: Annotated[
        str, typer.Option("--group", help="Compare all, or within equal needs.")
    ] = "all",
    worst_case: Annotated[
        bool, typer.Option("--worst-case", help="Tiers by the worst attack; and by picture.")
    ] = False,
    at_ca_loss: Annotated[
        float | None,
        typer.Option("--at-ca-loss", help="Compare what loses at most so many points of CA."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Add what papers print, in grey.")
    ] = False,
    campaign: Annotated[
        bool, typer.Option("--campaign", help="Of a campaign: what its searches chose.")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="Draw the figures into this folder.")
    ] = None,
) -> None:
    """Print the board of a results directory, also while a run is still writing it."""
    where = results_folder(directory)
    if figures is not None:
        folder_for("--figures", figures)
    if campaign:
        if published or eval_set != "report":
            raise UsageError("--campaign shows the tuning split: leave out --set and --published")
        _campaign(where, form.value, figures)
        return
    from analysis.leaderboard import Asked

    asked = Asked(
        eval_set=eval_set,
        part=part,
        group=group,
        worst_case=worst_case,
        at_ca_loss=at_ca_loss,
    )
    _print_board(where, form.value, asked, published)
    if figures is not None:
        from analysis.drawing import draw_board

        with writing("--figures", figures):
            _say_drawn(draw_board(where, figures, asked, say))


def _campaign(where: Path, form: str, figures: Path | None) -> None:
    from analysis.campaign_render import render_campaign
    from analysis.campaigns import load_campaign

    board = load_campaign(where)
    typer.echo(render_campaign(board, form, width=terminal_width(), color=sys.stdout.isatty()))
    if figures is not None:
        from analysis.campaign_figures import draw_campaign

        with writing("--figures", figures):
            _say_drawn(draw_campaign(board, figures))


def _say_drawn(drawn: Drawn) -> None:
    for file in drawn.files:
        say(str(file))
    for words in drawn.left_out:
        say(f"not drawn: {words}")


def board(where: Path, form: str) -> None:
    """Print the board that is asked for when nothing special is."""
    from analysis.leaderboard import Asked

    _print_board(where, form, Asked())


def _print_board(where: Path, form: str, asked: Asked, published: bool = False) -> None:
    from analysis.leaderboard import caveats, load, text

    color, found = sys.stdout.isatty(), load(where, asked)
    typer.echo(text(found, asked, form, terminal_width(), color, published))
    if form not in ("table", "md", "json"):  # which have no place for words
        for line in caveats(found):
            say(line)
