"""The command line. Every verb imports what it needs and nothing else."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grid import (
    board_commands,
    corpus_commands,
    import_commands,
    job_commands,
    model_commands,
    operations,
)
from grid.board_commands import EvalSetOpt, results_folder, terminal_width
from grid.new_files import file_for, folder_for, writing
from grid.places import meant, places
from victims.errors import GridError, UsageError, counted, near
from victims.places import shown

if TYPE_CHECKING:
    from analysis.leaderboard import Asked
    from analysis.theme import Drawn
    from grid.run import RunReport
    from grid.spec import Grid

app = typer.Typer(
    name="grid",
    help="An evaluation grid for backdoor attacks and defenses on CLIP-style models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GridArg = Annotated[str, typer.Argument(help="A preset's name or a YAML file.")]
OutOpt = Annotated[Path | None, typer.Option("--out", help="Results directory; default runs/NAME.")]
StoreOpt = Annotated[
    str | None, typer.Option("--store", help="Artefact store, a path or URI; default runs/store.")
]
OnlyOpt = Annotated[
    str | None, typer.Option("--only", help="Cells to take, e.g. 'defense=none rate<0.02'.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class ExecutorName(StrEnum):
    RAY = "ray"
    SERIAL = "serial"


class Kind(StrEnum):
    ATTACKS = "attacks"
    DEFENSES = "defenses"
    PRESETS = "presets"
    CAMPAIGNS = "campaigns"
    MODELS = "models"


class Format(StrEnum):
    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"
    TEX = "tex"
    HTML = "html"


OnOpt = Annotated[
    str | None,
    typer.Option(
        "--on",
        help="What stages ask for, in place of the file's execution: gpu, shared-gpu, four-gpus,"
        " cpu.",
    ),
]
ExecutorOpt = Annotated[
    ExecutorName, typer.Option("--executor", help="serial runs in this process, without Ray.")
]


def say(line: str) -> None:
    typer.echo(line, err=True)


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
                "a victim failed its gate, so nothing was defended on it: give it more epochs, rows"
                " or a higher rate, or other thresholds with `gate` (docs/grid-files.md)"
            )
    _board(where, "table")
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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
    return (
        f"about {on_gpus / 3600:,.4g} GPU-hours ({duration(on_gpus)} of one {found['gpu']};"
        f" {longest}){others}"
    )


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


@app.command()
def check(
    grid: GridArg, out: OutOpt = None, store: StoreOpt = None, as_json: JsonOpt = False
) -> None:
    """Is the grid complete? Exit 3 and a list of what is missing, failed or unreadable, and why."""
    from grid.quick import completeness, exit_code
    from grid.schema import completeness_words

    source, where, uri = meant(grid, out, store)
    found = {**completeness(source, where, uri), "results": str(where)}
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        typer.echo(
            f"{found['grid']} in {where}: {completeness_words(found['counts'], found['planned'])}."
        )
        for cell in (*found["incomplete"], *found["failed"], *found["invalid"]):
            typer.echo(f"  {cell['label']}: {cell['status']}: {cell['why']}")
        for words in found["unreadable"]:
            typer.echo(f"  skipped: {words}")
    if code := exit_code(found["counts"]) or (3 if found["unreadable"] else 0):
        raise typer.Exit(code)


@app.command()
def explain(
    cell: Annotated[str, typer.Argument(help="Its label, such as attack/rate/defense/s0, or key.")],
    grid: Annotated[str, typer.Option("--grid", help="The grid it is in.")] = "demo",
    out: OutOpt = None,
    store: StoreOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Trace a cell: its configuration, stages, keys, cost, log files and rows."""
    from grid.explain import explain_cell, print_explanation

    _, where, uri = meant(grid, out, store)
    found = explain_cell(grid, cell, where, uri)
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        typer.echo(print_explanation(found))


@app.command()
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


def _board(where: Path, form: str) -> None:
    from analysis.leaderboard import Asked

    _print_board(where, form, Asked())


def _print_board(where: Path, form: str, asked: Asked, published: bool = False) -> None:
    from analysis.leaderboard import caveats, load, text

    color, found = sys.stdout.isatty(), load(where, asked)
    typer.echo(text(found, asked, form, terminal_width(), color, published))
    if form not in ("table", "md", "json"):  # which have no place for words
        for line in caveats(found):
            say(line)


@app.command()
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


@app.command()
def ls(
    kind: Annotated[Kind, typer.Argument()],
    name: Annotated[
        str, typer.Argument(help="Only names that hold this, in any case.", show_default="")
    ] = "",
    as_json: JsonOpt = False,
) -> None:
    """List attacks, defenses, presets, campaigns or models, with where each is defined."""
    from grid.registry import campaigns, describe, presets

    if kind is Kind.MODELS:
        model_commands.show_models(name, as_json)
        return

    if kind in (Kind.PRESETS, Kind.CAMPAIGNS):
        every = presets() if kind is Kind.PRESETS else campaigns()
        bundled = {n: every[n] for n in _held(name, every, kind)}
        files = {name: _bundled_file(kind.value, name) for name in bundled}
        if as_json:
            found = {n: {"idea": idea, "file": files[n]} for n, idea in bundled.items()}
            typer.echo(json.dumps(found, indent=1))
            return
        for name, idea in bundled.items():
            typer.echo(f"{name:12} {idea}\n{'':12} {files[name]}")
        return
    found_methods = describe("attacks" if kind is Kind.ATTACKS else "defenses")
    held = _held(name, [method.name for method in found_methods], kind)
    methods = [method for method in found_methods if method.name in held]
    if as_json:
        rows = [{n: getattr(m, n) for n in m.__slots__} for m in methods]
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    for method in methods:
        by_regime = method.fidelity or {}
        same = len(set(by_regime.values())) == 1
        words = [word if same else f"{word} in {regime}" for regime, word in by_regime.items()]
        phase = f"gate: {method.phase}" if kind is Kind.ATTACKS and method.phase else method.phase
        knob = f"knob: {method.knob}" if method.knob else ""
        facts = [phase, ", ".join(words[:1] if same else words), ", ".join(method.needs), knob]
        typer.echo(f"{method.name:22}{'; '.join(fact for fact in facts if fact)}")
        typer.echo(f"{'':22}{method.error or method.idea}")
        typer.echo(f"{'':22}{method.distribution}: {method.origin or method.cls}")


def _held(name: str, known: Iterable[str], kind: Kind) -> list[str]:
    """Of some names those that hold a text."""
    every = list(known)
    found = [one for one in every if name.lower() in one.lower()]
    if not found:
        raise UsageError(f"none of the {kind.value} is called so: {name!r}.{near(name, every)}")
    return found


def _bundled_file(folder: str, name: str) -> str:
    """Where a preset is, relative to the working directory where it lies below it."""
    path = Path(__file__).parent / folder / f"{name}.yaml"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@app.command()
def gallery(
    grid: GridArg,
    out: Annotated[Path | None, typer.Option("--out", help="Default runs/NAME.")] = None,
    store: StoreOpt = None,
) -> None:
    """Draw what every attack does to pairs: gallery.png and gallery.html."""
    from grid.gallery import make_gallery
    from grid.gridfile import load_grid
    from victims.store import Store

    decoded = load_grid(grid)
    _, where, uri = meant(grid, out, store)
    picture, page = make_gallery(decoded, where, Store(uri), say)
    typer.echo(f"{picture}\n{page}")


@app.command()
def scores(
    grid: GridArg,
    only: OnlyOpt = None,
    out: OutOpt = None,
    store: StoreOpt = None,
) -> None:
    """Draw how defenses judged the rows of their data, the truth in colours: scores.png."""
    from grid.filters import parse_filter
    from grid.gridfile import load_grid
    from grid.plan import make_plan
    from grid.score_maps import draw, score_maps
    from victims.store import Store

    decoded = load_grid(grid)
    _, where, uri = meant(grid, out, store)
    chosen = parse_filter(only) if only else None
    picture = where / "scores.png"
    draw(score_maps(make_plan(decoded), Store(uri), chosen, say), picture)
    typer.echo(f"{picture}")


@app.command()
def mock(
    method: Annotated[str, typer.Argument(help="A method's name, or package.module:Class.")],
) -> None:
    """Run the contract tests on a method you are writing, on a tiny world, in seconds."""
    from grid.kit import check_method

    failed = check_method(method, typer.echo)
    if failed:
        raise typer.Exit(1)


operations.register(app)
board_commands.register(app)
import_commands.register(app)
job_commands.register(app)
model_commands.register(app)
corpus_commands.register(app)


def _known_commands() -> list[str]:
    commands = [
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    ]
    return [*commands, *(group.name for group in app.registered_groups if group.name)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``grid``: errors in one message, exit codes as documented."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _known_commands():
        hint = near(arguments[0], _known_commands())
        say(f"grid: no command called {arguments[0]!r}.{hint} Try grid --help.")
        sys.exit(UsageError.code)
    sys.exit(_guarded(lambda: app(arguments, standalone_mode=False)))


# Typer brings its own copy of click, or uses the installed one: its errors tell which.
BadCommand: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


INTERRUPTED = 130
# What Typer says of a word that is not in a list, after its library's name for such errors.
NOT_LISTED = re.compile(r"(?:Value error, )?'(?P<word>.*)' is not one of (?P<listed>'.*')\.?")


def _plainly(message: str) -> str:
    """Typer's words about a choice that there is not, as ours: with what was probably meant."""
    match = NOT_LISTED.fullmatch(message)
    if match is None:
        return message
    known = [name.strip(" '") for name in match["listed"].split(",")]
    word = match["word"]
    return f"no choice is called {word!r}.{near(word, known)} There are: {', '.join(known)}."


def _guarded(command: Callable[[], Any]) -> int:
    try:
        result = command()
        if result == INTERRUPTED:  # newer Typer turns Ctrl-C into an exit code itself
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except GridError as error:
        say(f"grid: {error}")
        return error.code
    except BadCommand as error:
        error.message = _plainly(error.message)
        error.show()
        return UsageError.code
    except (typer.Abort, KeyboardInterrupt):
        say("grid: interrupted; the same command goes on where this one stopped")
        return INTERRUPTED
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    main()
