"""A campaign's board as text: a table for the terminal, Markdown, CSV or JSON.

Per defense the settings that it has anyway, then those that each search chose.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from analysis.campaigns import SEES_WORDS, CampaignBoard, SearchResult, Trial
from analysis.render import UNKNOWN, percent
from analysis.text import csv_cell
from grid.schema.errors import no_such


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignLine:
    """One line. Shares are 0 to 1; what was not measured is None.

    ``chosen_as`` is ``default``, ``chosen``, ``best so far`` (the search has not ended) or
    ``none``. Counts and seconds are of the whole search; the default's line has none, since every
    search of its defense has tried it. ``scene`` is what the numbers are measured on.
    """

    defense: str
    objective: str
    chosen_as: str
    is_oracle: bool
    sees: str | None
    scene: str
    ca: float | None
    ca_loss: float | None
    worst_asr: float | None
    mean_asr: float | None
    is_feasible: bool | None
    num_trials: int | None
    num_stopped: int | None
    num_failed: int | None
    num_running: int | None
    device_seconds: float | None
    by: str | None
    number: int | None
    settings: Mapping[str, Any] | None
    named: str | None
    file: str | None
    search: str | None
    trial: str | None


def campaign_lines(board: CampaignBoard) -> list[CampaignLine]:
    """Every line, defense by defense: its default on each scene, then what was chosen there."""
    lines = []
    for searches in board.defenses.values():
        scenes: dict[tuple[str, ...], list[SearchResult]] = {}
        for search in searches:
            scenes.setdefault(search.scene, []).append(search)
        for group in scenes.values():
            lines += [_default_line(group, len(scenes) > 1), *map(_chosen_line, group)]
    return lines


def _default_line(group: Sequence[SearchResult], says_where: bool) -> CampaignLine:
    """The default's numbers, of a search that took it to its end if there is one."""
    tried = [(s, s.default) for s in group if s.default is not None]
    tried.sort(key=lambda pair: not pair[1].is_complete)
    search, trial = tried[0] if tried else (group[0], None)
    verdicts = {default.is_feasible for _, default in tried}
    where = f", on {SEES_WORDS.get(search.scene[0], search.scene_words)}" if says_where else ""
    line = _line(search, f"default{where}", "default", trial)
    agreed = verdicts.pop() if len(verdicts) == 1 else None
    return CampaignLine(**{**_plain(line), "is_feasible": agreed, "is_oracle": False})


def _chosen_line(search: SearchResult) -> CampaignLine:
    trial = search.chosen
    chosen_as = "chosen" if search.is_final else "best so far" if trial else "none"
    line = _line(search, search.objective, chosen_as, trial)
    told = search.told
    whole = {
        "num_trials": search.num_trials,
        "num_stopped": search.num_stopped,
        "num_failed": search.num_failed,
        "num_running": search.num_running,
        "device_seconds": search.device_seconds,
        **{name: told.get(name) for name in ("by", "named", "file")},
    }
    return CampaignLine(**{**_plain(line), **whole, "search": search.key})


def _line(
    search: SearchResult, objective: str, chosen_as: str, trial: Trial | None
) -> CampaignLine:
    numbers = ("ca", "ca_loss", "worst_asr", "mean_asr", "is_feasible", "number", "settings")
    known = {name: None if trial is None else getattr(trial, name) for name in numbers}
    return CampaignLine(
        defense=search.defense,
        objective=objective,
        chosen_as=chosen_as,
        is_oracle=search.is_oracle,
        sees=search.sees,
        scene=search.scene_words,
        trial=None if trial is None else trial.key,
        **known,
        **dict.fromkeys(
            (
                *("num_trials", "num_stopped", "num_failed", "num_running", "device_seconds"),
                *("by", "named", "file", "search"),
            )
        ),
    )


def _plain(line: CampaignLine) -> dict[str, Any]:
    return {f.name: getattr(line, f.name) for f in fields(line)}


# --- what is said beside the numbers


def notes(board: CampaignBoard) -> list[str]:
    """What a reader must know beside the numbers, one sentence each."""
    held_out = _nearest(board.directory / "held-out.yaml")
    return [
        f"Campaign {board.name}, hash {board.hash or 'unknown'}, grid {board.grid or 'unknown'}.",
        "These are numbers of the tuning split, which the searches have seen: they choose "
        f"settings and prove nothing. `grid run {held_out}` evaluates the "
        "chosen ones on the held-out attacks and the report split.",
        *_scene_notes(board),
        "Worst ASR: the largest over attacks of the mean over their cells. CA loss, in points: "
        "the undefended victim's clean accuracy less this.",
        *_limit_notes(board),
        _budget_note(board),
        *_oracle_notes(board),
        *_unended_notes(board),
        *(f"Settings of {words}." for words in chosen_words(board)),
    ]


def _nearest(path: Path) -> Path:
    """From the working directory on, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _scene_notes(board: CampaignBoard) -> list[str]:
    """What is measured on what, and the victims that each starts from."""
    scenes = board.scenes()
    found = []
    for searches in scenes.values():
        objectives = ", ".join(dict.fromkeys(search.label for search in searches))
        start = next((s.undefended for s in searches if s.undefended is not None), None)
        none = (
            ""
            if start is None
            else f"; undefended: CA {percent(start.ca)} %, worst ASR {percent(start.worst_asr)} %"
        )
        found.append(f"{objectives}: measured on {searches[0].scene_words}{none}.")
    if len(scenes) > 1:
        found.append("Numbers on different attacks or victims are not compared with each other.")
    return found


def _limit_notes(board: CampaignBoard) -> list[str]:
    limits: dict[float, list[str]] = {}
    for search in board.searches:
        if search.ca_loss_limit is not None:
            labels = limits.setdefault(search.ca_loss_limit, [])
            labels += [] if search.objective in labels else [search.objective]
    return [
        f"Feasible: a CA loss of at most {100 * limit:g} points ({', '.join(labels)})."
        for limit, labels in limits.items()
    ]


def chosen_words(board: CampaignBoard) -> list[str]:
    """The settings behind every line of a search, short enough to read."""
    return [
        f"{line.named or line.defense} ({line.objective}, trial {line.number}): "
        + ", ".join(f"{name} {_short(value)}" for name, value in line.settings.items())
        for line in campaign_lines(board)
        if line.settings and line.chosen_as != "default"
    ]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _budget_note(board: CampaignBoard) -> str:
    """Whether every search could try equally much, and has."""
    units = {"trials": "trials", "device_hours": "device hours", "wall_minutes": "minutes"}
    given = [f"{board.budget[n]:g} {words}" for n, words in units.items() if board.budget.get(n)]
    said = f"Budget of every search: {' or '.join(given)}" if given else "Budget: unknown"
    counts = [search.num_trials for search in board.searches]
    least, most = min(counts), max(counts)
    spread = f"{least} to {most}" if least < most else str(least)
    if any(not search.is_final for search in board.searches):
        return f"{said}. Not ended: so far they have tried {spread}."
    wanted = int(board.budget.get("trials") or 0)
    # Other limits end a search when they are reached, and a grid search has what its grid has.
    is_whole = wanted and len(given) == 1 and not any(s.is_of_a_grid for s in board.searches)
    if least < most and any(s.is_of_a_grid for s in board.searches):
        return f"{said}. NOT EQUAL: their grids have {spread} settings."
    if least < most and not is_whole and given:
        return f"{said}. Within it they have tried {spread} settings."
    if is_whole and least < wanted:
        short = [f"{s.defense} {s.objective}" for s in board.searches if s.num_trials < wanted]
        return (
            f"{said}. SHORT of it, and NOT EQUAL in what they could find: they have tried {spread}"
            f" ({', '.join(short)}). The same command goes on."
        )
    if is_whole and most > wanted:
        return f"{said}; with those of a larger budget before, they have tried {spread}."
    if least < most:
        return f"{said}. NOT EQUAL: they have tried {spread} settings."
    return f"{said}. Equal: each has tried {least}."


def _oracle_notes(board: CampaignBoard) -> list[str]:
    labels = dict.fromkeys(search.objective for search in board.searches if search.is_oracle)
    return [
        f"! {label} is an oracle: its searches see the held-out attacks, as no defender does. It "
        "bounds what tuning could reach, and is no result of a defense."
        for label in labels
    ]


def _unended_notes(board: CampaignBoard) -> list[str]:
    running = [f"{s.defense} {s.objective}" for s in board.searches if not s.is_final]
    if not running:
        return []
    return [f"Not ended, so the best so far is shown: {', '.join(running)}."]


# --- the forms


class _Column(NamedTuple):
    heading: str
    cell: Callable[[CampaignLine], str]
    is_number: bool = True
    min_width: int = 0


def _settings_words(line: CampaignLine) -> str:
    words = f"{line.objective} (ORACLE)" if line.is_oracle else line.objective
    return words if line.chosen_as in ("default", "chosen") else f"{words}, {line.chosen_as}"


def _yes(verdict: bool | None) -> str:
    return UNKNOWN if verdict is None else "yes" if verdict else "NO"


def _points(loss: float | None) -> str:
    """A share lost, in points; never a zero below nothing."""
    return UNKNOWN if loss is None else f"{round(100 * loss, 1) + 0.0:.1f}"


def _tried(line: CampaignLine) -> str:
    if line.num_trials is None:
        return UNKNOWN
    running = f", {line.num_running} running" if line.num_running else ""
    return f"{line.num_trials} ({line.num_stopped}, {line.num_failed}{running})"


COLUMNS = (
    _Column("Settings", _settings_words, is_number=False),
    _Column("CA %", lambda line: percent(line.ca)),
    _Column("CA loss", lambda line: _points(line.ca_loss)),
    _Column("Worst ASR %", lambda line: percent(line.worst_asr)),
    _Column("Feasible", lambda line: _yes(line.is_feasible), is_number=False),
    _Column("Trials (stopped, failed)", _tried),
    _Column(
        "Device s",
        lambda line: UNKNOWN if line.device_seconds is None else f"{line.device_seconds:.1f}",
    ),
    _Column("Named", lambda line: line.named or UNKNOWN, is_number=False, min_width=130),
)


def render_campaign(
    board: CampaignBoard, form: str = "table", width: int = 100, color: bool = False
) -> str:
    """The campaign as ``table`` (``width`` columns), ``md``, ``csv`` or ``json``."""
    if form == "table":
        return _table(board, width, color)
    if form not in FORMATS:
        raise no_such("format", form, ("table", *FORMATS))
    return FORMATS[form](board)


def _table(board: CampaignBoard, width: int, color: bool) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=color, legacy_windows=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    lines = campaign_lines(board)
    columns = [column for column in COLUMNS if column.min_width <= width]
    for column in columns:
        longest = max((len(column.cell(line)) for line in lines), default=0)
        if column.is_number:  # headings are wrapped, numbers never
            table.add_column(column.heading, justify="right", min_width=longest)
        else:
            table.add_column(column.heading, no_wrap=True)
    before = ""
    for line in lines:
        if line.defense != before:
            table.add_row(Text(line.defense, style="bold cyan"))
            before = line.defense
        style = "magenta" if line.is_oracle else "red" if line.is_feasible is False else ""
        cells = [Text(column.cell(line), style=style) for column in columns]
        table.add_row(Text("  ").append_text(cells[0]), *cells[1:])
    console.print(table)
    console.print()
    for warning in board.warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    for note in notes(board):
        console.print(Text(note, style="dim"))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _markdown(board: CampaignBoard) -> str:
    head = ["Defense", *(column.heading for column in COLUMNS)]
    rule = ["---", *("---:" if column.is_number else "---" for column in COLUMNS)]
    rows = [[n.defense, *(column.cell(n) for column in COLUMNS)] for n in campaign_lines(board)]
    table = ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]
    return (
        "\n".join([*table, "", *(f"- {text}" for text in (*board.warnings, *notes(board)))]) + "\n"
    )


def _csv(board: CampaignBoard) -> str:
    """Every line and every column; settings as JSON, nothing measured as an empty field."""
    output = io.StringIO()
    writer = csv.DictWriter(output, [f.name for f in fields(CampaignLine)], lineterminator="\n")
    writer.writeheader()
    for line in campaign_lines(board):
        settings = None if line.settings is None else json.dumps(line.settings)
        cells = {**_plain(line), "settings": settings}
        writer.writerow({name: csv_cell(cell) for name, cell in cells.items()})
    return output.getvalue()


def _json(board: CampaignBoard) -> str:
    """One object: the lines, every search with its trials and hypervolumes, notes, warnings."""
    document = {
        "campaign": {"name": board.name, "hash": board.hash, "grid": board.grid},
        "budget": board.budget,
        "lines": [_plain(line) for line in campaign_lines(board)],
        "searches": [
            {
                "defense": search.defense,
                "objective": search.objective,
                "search": search.key,
                "undefended": search.undefended and search.undefended._asdict(),
                "front": [trial.number for trial in search.front()],
                "hypervolumes": [share for _, share in search.hypervolumes()],
                "trials": [_trial(trial) for trial in search.trials],
            }
            for search in board.searches
        ],
        "notes": notes(board),
        "warnings": board.warnings,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _trial(trial: Trial) -> dict[str, Any]:
    """A trial with its cells and its curve, by the names of their numbers."""
    return {
        **asdict(trial),
        "squares": [square._asdict() for square in trial.squares],
        "epochs": [epoch._asdict() for epoch in trial.epochs],
    }


FORMATS: Mapping[str, Callable[[CampaignBoard], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
}
