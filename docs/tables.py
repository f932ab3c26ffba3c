"""The generated parts of the documents: written by ``make docs``, compared by ``make check``.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A board in the
documents comes from ``docs/NAME-board.json``. ``python -m docs.tables --board NAME [DIR]`` writes
it from the results of preset NAME (DIR, else runs/NAME), on the machine where they were made, and
keeps beside the rows what made them and a digest. A check fails when the file was edited since,
when the preset has changed, or when the picture is of another board.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from docs.campaign_tables import campaign_parts, check_campaign, write_campaign
from docs.recipe_table import recipe_fields

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BOARD = DOCS / "demo-board.json"
PAPERS = DOCS / "papers-board.json"
PICTURE, PAPERS_PICTURE = DOCS / "demo.png", DOCS / "papers.png"
MARK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _place(origin: str) -> str:
    """A link from the root to the file of an origin, which is told from the working directory."""
    file = Path.cwd() / origin.rpartition(":")[0]
    if not file.is_relative_to(ROOT):
        return file.name
    return f"[{file.name}]({file.relative_to(ROOT).as_posix()})"


def attacks() -> str:
    from grid.registry import describe

    rows = [
        [m.name, m.idea, m.paper, m.phase, ", ".join(m.variants) or "-", _place(m.origin)]
        for m in describe("attacks")
    ]
    return table(["attack", "idea", "paper", "gate", "variants", "file"], rows)


def defenses() -> str:
    """Every defense and control: who is given what, how faithful it is and what it costs."""
    from grid.registry import describe

    gives = ("suspect_data", "victim", "clean_data", "reference", "truth")
    views = pair_views()
    rows = []
    for method in describe("defenses"):
        fidelity = method.fidelity or {}
        words = sorted(set(fidelity.values()))
        shown = words[0] if len(words) == 1 else ", ".join(f"{r}: {w}" for r, w in fidelity.items())
        marks = ["yes" if need in method.needs else "" for need in gives]
        facts = [shown, method.knob, views.get(method.name, ""), method.paper]
        rows.append([method.name, method.phase, *marks, *facts, _place(method.origin)])
    head = ["defense", "phase", "suspect data", "victim", "clean data", "reference", "truth"]
    return table([*head, "fidelity", "knob", "pair views", "paper", "file"], rows)


def pair_views() -> dict[str, str]:
    """Pairs that passed with gradient, in thousands, as measured where the papers' board has it."""
    if not PAPERS.exists():
        return {}
    rows = [row for row in read_board(PAPERS)["rows"] if row["rate"] and row["pair_views"]]
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["defense"], []).append(row["pair_views"] / 1000)
    return {name: f"{sum(views) / len(views):.0f}" for name, views in found.items()}


def presets() -> str:
    from grid import registry

    return table(["preset", "what it is"], [[n, t] for n, t in registry.presets().items()])


# --- boards in the documents


def digest_of(board: dict[str, Any]) -> str:
    """Of everything in a board's file but the digest itself."""
    body = {name: value for name, value in board.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_board(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text())
    return board


def write_board(name: str, results: Path, partial: bool = False) -> Path:
    """``docs/NAME-board.json`` from a results directory: its board, and what made it.

    A grid too large for one machine may be shown in part; the documents then say how much is there.
    """
    from analysis.board import load_board
    from analysis.render import render

    board = load_board(results)
    if not board.completeness.is_complete and not partial:
        raise SystemExit(f"{results}: some cells have no outcome; `grid check {name}` lists them")
    document = json.loads(render(board, "json"))
    document["rows"] = [row for row in document["rows"] if row["num_shown"] or not _not_run(row)]
    document["made"] = _made(results)
    document["stages"] = _stages(results)
    document["digest"] = digest_of(document)
    path = DOCS / f"{name}-board.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def _not_run(row: dict[str, Any]) -> bool:
    return bool(row["status"] == "missing")


def _made(results: Path) -> dict[str, Any]:
    """The commits, torch versions and device that the rows name, and this machine's processor."""
    import socket
    from contextlib import closing

    from analysis.reader import Tables
    from benchmarks.common import machine

    with closing(Tables(results)) as opened:

        def distinct(what: str, source: str) -> list[str]:
            rows = opened.query(f"SELECT DISTINCT {what} FROM {source} ORDER BY 1").rows  # noqa: S608
            return [str(value) for (value,) in rows if value]

        planned = "rows WHERE cell IN (SELECT cell FROM outcomes WHERE is_planned)"
        hosts = distinct("host", "stages WHERE NOT reused")
        made = {
            "commit": ", ".join(distinct("commit", planned)),
            "torch": ", ".join(distinct("json_extract_string(versions, '$.torch')", planned)),
            "device": ", ".join(distinct("device", planned)),
            "device_seconds": _spent(opened, planned),
        }
    if elsewhere := sorted(set(hosts) - {socket.gethostname()}):
        raise SystemExit(f"{results} was made on {', '.join(elsewhere)}: run this command there")
    return {**made, "processor": machine()["processor"]}


def _stages(results: Path) -> list[dict[str, Any]]:
    """What the stages of defenses found, beside their final judgement: means over the seeds."""
    from contextlib import closing

    from analysis.reader import Tables

    what = """
        SELECT defense, regexp_replace(metric, '^found_|_auroc$', '', 'g'), attack, avg(value)
        FROM rows WHERE cell IN (SELECT cell FROM outcomes WHERE is_planned) AND count > 0
        AND regexp_matches(metric, '^found_.+_auroc$|^found_alike_')
        AND NOT starts_with(metric, 'found_with_cover')
        GROUP BY ALL ORDER BY ALL
    """
    with closing(Tables(results)) as opened:
        rows = opened.query(what).rows
    names = ("defense", "stage", "attack", "value")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _spent(results: Any, planned: str) -> float:
    """Device seconds of all victims and defenses behind the rows, each counted once."""
    costs = (
        "SELECT DISTINCT defended_key, cost_seconds",
        "SELECT DISTINCT victim_key, victim_seconds",
    )
    totals = [
        results.query(f"SELECT sum(c) FROM ({what} AS c FROM {planned} AND metric = 'cell')").rows  # noqa: S608
        for what in costs
    ]
    return round(sum(float(rows[0][0] or 0) for rows in totals))


def check_board(path: Path) -> str | None:
    """A board in the documents must be as it was written, and of its preset as that is now."""
    from grid.gridfile import load_grid

    name = path.name.removesuffix("-board.json")
    again = f" Run: grid run {name}; python -m docs.tables --board {name}; make docs"
    board = read_board(path)
    if "made" not in board or "digest" not in board:
        return f"{path.name} does not say what made it.{again}"
    if board["digest"] != digest_of(board):
        return f"{path.name} was edited after it was written: its digest is another one.{again}"
    shown, now = board["grid"]["hash"], load_grid(name).identity_hash
    if shown != now:
        return f"{path.name} is of grid {shown}, the preset is now {now}.{again}"
    return None


def picture_inputs(path: Path) -> str:
    """Digest of what a picture is drawn from: the board of its name, published figures and code."""
    parts = [ROOT / "docs" / "picture.py", ROOT / "analysis" / "published.csv"]
    code = b"".join(part.read_bytes() for part in parts)
    board = read_board(path.with_name(f"{path.stem}-board.json"))
    return hashlib.sha256(digest_of(board).encode() + code).hexdigest()


def check_picture(path: Path) -> str | None:
    """A picture must be of the board in the documents."""
    from PIL import Image

    if path.exists():
        with Image.open(path) as image:
            if image.info.get("Inputs") == picture_inputs(path):
                return None
    return f"{path.name} was drawn from another board or by other code; run make docs"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _with_interval(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{_percent(row[name])} [{_percent(low)}, {_percent(high)}]"


def _rate(row: dict[str, Any]) -> str:
    return f"{row['count']} rows" if row["rate"] is None else f"{100 * row['rate']:g} %"


def _board_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> str:
    board = read_board(path)
    kept = [row for row in board["rows"] if keep(row)]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "attack": lambda row: row["attack"],
        "rate": _rate,
        "defense": lambda row: row["defense"],
        "CA %": lambda row: _with_interval(row, "clean_top1"),
        "ASR %": lambda row: _with_interval(row, "asr_top1"),
        "ASR of the clean victim %": lambda row: _percent(row["asr_clean_victim_top1"]),
    }
    if any(row.get("hit_top1") is not None for row in kept):
        columns |= {
            "hit@1 %": lambda row: _with_interval(row, "hit_top1"),
            "hit@1 of the clean victim %": lambda row: _percent(row["hit_clean_victim_top1"]),
        }
    columns |= {
        "R-Acc %": lambda row: _percent(row["r_acc"]),
        "cost": lambda r: "" if r["relative_cost"] is None else f"{r['relative_cost']:.2f}",
        "status": lambda row: row["status"],
    }
    text = table(list(columns), [[shown(row) for shown in columns.values()] for row in kept])
    return f"{text}\n{board_hash(path)}"


def board_hash(path: Path) -> str:
    grid = read_board(path)["grid"]
    return f"Grid `{grid['name']}`, hash `{grid['hash']}`.\n"


def board_made(path: Path) -> str:
    """What a board's numbers depend on beside the grid file, and what they were made with."""
    board = read_board(path)
    made, ended = board.get("made"), board.get("completeness", {"complete": True})
    what = "It was not recorded what these were made with."
    if made:
        what = (
            f"These were made by commit `{made['commit']}` with torch {made['torch']} on"
            f" {made['device']}, processor {made['processor']}."
        )
        if seconds := made.get("device_seconds"):
            shown = (
                f"{seconds / 3600:.1f} device hours"
                if seconds >= 3600
                else (f"{seconds / 60:.0f} device minutes")
            )
            what += f" Victims and defenses took {shown}."
    if not ended["complete"]:
        what += f"\n**Not all of the grid:** {ended['ok']} of {ended['planned']} cells have run."
    return (
        "The numbers depend on the processor and on the version of torch: these round differently,"
        f" and training makes\nsuch differences grow. {what}\n"
    )


def _short(row: dict[str, Any]) -> bool:
    """The poisoned rates and the defenses proper."""
    return row["rate"] != 0 and (row["defense"] == "none" or not row["is_control"])


def _undefended(row: dict[str, Any]) -> bool:
    """The poisoned victims as they are."""
    return bool(row["rate"] != 0 and row["defense"] == "none")


# --- the papers' board: one line per defense, one column per attack


def _by_defense(path: Path) -> dict[str, dict[tuple[str, float], dict[str, Any]]]:
    """The rows of a board by defense, in its order, and by (attack, rate)."""
    found: dict[str, dict[tuple[str, float], dict[str, Any]]] = {}
    for row in read_board(path)["rows"]:
        found.setdefault(row["defense"], {})[row["attack"], row["rate"]] = row
    return found


def _attacks_of(path: Path) -> list[str]:
    return list(dict.fromkeys(row["attack"] for row in read_board(path)["rows"]))


NEED_WORDS = {"clean_data": "clean", "suspect_data": "suspect", "reference": "ref"}


def given_words(row: dict[str, Any]) -> str:
    return " + ".join(NEED_WORDS.get(need, need) for need in row["needs"])


def _rates_of(rows: Sequence[dict[str, Any]]) -> str:
    rates = sorted({rate for row in rows for rate in row["lr"] or []})
    return ", ".join(f"{rate:g}" for rate in rates)


def _mean(rows: Sequence[dict[str, Any]], name: str, scale: float = 100, digits: int = 1) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{scale * sum(values) / len(values):.{digits}f}" if values else ""


def attack_columns(path: Path) -> str:
    """ASR of every attack, and what a defense does to clean accuracy and costs, means over both."""
    attacks = _attacks_of(path)
    lines = []
    for defense, rows in _by_defense(path).items():
        poisoned = [rows[a, r] for a, r in rows if r]
        clean = [rows[a, r] for a, r in rows if not r]
        found = [_with_interval(row, "asr_top1") for row in poisoned]
        accuracy = [_mean(poisoned, "clean_top1"), _mean(clean, "clean_top1")]
        cost = _mean(poisoned, "relative_cost", 1, 2)
        lines.append(
            [given_words(poisoned[0]), defense, *found, *accuracy, cost, _rates_of(poisoned)]
        )
    shown = [f"ASR % {attack}" for attack in attacks]
    head = ["given", "defense", *shown, "CA %", "CA % at rate 0", "cost", "lr"]
    return table(head, lines)


def squares(path: Path) -> str:
    """ASR / CA of every attack, where it poisons, under every defense; a square not run is empty.

    Means over the seeds that were run. Defenses go down where there are more of them.
    """
    found = {
        (
            row["attack"],
            row["defense"],
        ): f"{_percent(row['asr_top1'])} / {_percent(row['clean_top1'])}"
        for row in read_board(path)["rows"]
        if row["rate"] != 0 and row["asr_top1"] is not None
    }
    defenses = sorted(_by_defense(path), key=lambda name: name != "none")
    sides = [("attack", _attacks_of(path)), ("defense", defenses)]
    (what, down), (_, across) = sorted(sides, key=lambda side: -len(side[1]))
    lines = [
        [
            one,
            *(
                found.get((one, other) if what == "attack" else (other, one), "")
                for other in across
            ),
        ]
        for one in down
    ]
    return table([what, *across], [line for line in lines if any(line[1:])])


def findings(path: Path) -> str:
    """How the defenses that judge rows told the poisoned ones."""
    attacks = _attacks_of(path)
    lines = []
    for defense, rows in _by_defense(path).items():
        poisoned = {attack: row for (attack, rate), row in rows.items() if rate}
        if all(row["found_recall"] is None for row in poisoned.values()):
            continue
        lines.append([defense, *(_found(poisoned[a]) if a in poisoned else "" for a in attacks)])
    bound = "\nAfter `of`: the highest precision that so many flagged rows can have.\n"
    has_bound = any(
        row.get("found_precision_bound") is not None for row in read_board(path)["rows"]
    )
    return table(["defense", *attacks], lines) + (bound if has_bound else "")


def stages(path: Path) -> str:
    """AUROC of the findings of each defense's stages, and cosines of what it made alike.

    A defense named after one above it, as variants are, is left out if it found the same.
    """
    attacks, every = _attacks_of(path), dict[tuple[str, str], dict[str, float]]()
    for row in read_board(path).get("stages", []):
        every.setdefault((row["defense"], row["stage"]), {})[row["attack"]] = row["value"]
    found = dict[tuple[str, str], dict[str, float]]()
    for (defense, stage), values in every.items():
        above = [
            seen
            for (name, other), seen in found.items()
            if other == stage and defense.startswith(f"{name}-")
        ]
        if not any(values.items() <= seen.items() for seen in above):
            found[defense, stage] = values
    lines = [
        [defense, stage, *(f"{values[a]:.2f}" if a in values else "" for a in attacks)]
        for (defense, stage), values in found.items()
    ]
    return table(["defense", "stage", *attacks], lines)


def _found(row: dict[str, Any]) -> str:
    if row["found_recall"] is None:
        return ""
    area = "" if row["found_auroc"] is None else f"{row['found_auroc']:.3f}; "
    # Boards of before there was a bound are shown without.
    bound = row.get("found_precision_bound")
    most = "" if bound is None else f" of {_percent(bound)}"
    return f"{area}{_percent(row['found_recall'])} / {_percent(row['found_precision'])}{most}"


def resource_presets() -> str:
    """What stages of each kind ask for on each preset, those that ask alike together."""
    from grid.execution import PRESETS, STAGE_KINDS, Execution
    from grid.needs import asks

    lines = []
    for name in PRESETS:
        by_words: dict[str, list[str]] = {}
        for kind in STAGE_KINDS:
            by_words.setdefault(asks(Execution(preset=name).resources_for(kind)), []).append(kind)
        lines += [[f"`{name}`", ", ".join(kinds), words] for words, kinds in by_words.items()]
    return table(["preset", "stages", "each asks for"], lines)


def board_words() -> str:
    """What the words of boards mean, as the report tells it beside its tables."""
    from analysis.words import WORDS

    return table(["word", "what it is"], [[word.name, word.says] for word in WORDS])


PARTS: dict[str, Callable[[], str]] = {
    "recipe-fields": recipe_fields,
    "board-words": board_words,
    "resource-presets": resource_presets,
    "attacks": attacks,
    "defenses": defenses,
    "presets": presets,
}


def parts() -> dict[str, Callable[[], str]]:
    """All parts by name: NAME-board, NAME-short, NAME-made and more of every board there is, and
    NAME-figures of every benchmark that was recorded."""
    from docs import gpu_tables, model_tables, real_tables, scale_tables

    found = {**PARTS, **scale_tables.parts(), **gpu_tables.parts(), **real_tables.parts()}
    found |= model_tables.parts()
    for path in boards():
        name = path.name.removesuffix("-board.json")
        found[f"{name}-board"] = partial(_board_rows, path, lambda row: True)
        found[f"{name}-short"] = partial(_board_rows, path, _short)
        found[f"{name}-victims"] = partial(_board_rows, path, _undefended)
        found[f"{name}-made"] = partial(board_made, path)
        found[f"{name}-hash"] = partial(board_hash, path)
        found[f"{name}-attacks"] = partial(attack_columns, path)
        found[f"{name}-squares"] = partial(squares, path)
        found[f"{name}-findings"] = partial(findings, path)
        found[f"{name}-stages"] = partial(stages, path)
    return found | campaign_parts(board_made)


def boards() -> list[Path]:
    return sorted(DOCS.glob("*-board.json"))


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def filled(text: str, name: str) -> str:
    """A document with every generated part made anew."""
    known = parts()

    def part(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise SystemExit(f"{name}: no generated part called {match[2]!r}: {sorted(known)}")
        return f"{match[1]}{known[match[2]]()}{match[3]}"

    return MARK.sub(part, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--board", nargs="+", metavar=("NAME", "DIR"), help="write a board")
    parser.add_argument("--campaign", nargs="+", metavar=("NAME", "DIR"), help="write a campaign")
    parser.add_argument("--partial", action="store_true", help="a board of a grid that still runs")
    given = parser.parse_args(arguments)
    if given.board:
        name, *rest = given.board
        if len(rest) > 1:
            parser.error("--board takes a name and at most one directory")
        where = Path(rest[0] if rest else f"runs/{name}")
        print(f"{write_board(name, where, given.partial)} written")
        return 0
    from docs import gpu_tables, scale_tables

    if given.campaign:
        name, *rest = given.campaign
        print(f"{write_campaign(name, Path(rest[0] if rest else f'runs/{name}'), _made)} written")
        return 0
    problems = [problem for path in boards() if (problem := check_board(path))]
    campaigns = sorted(DOCS.glob("*-campaign.json"))
    problems += [problem for path in campaigns if (problem := check_campaign(path))]
    problems += scale_tables.problems() + gpu_tables.problems()
    for picture in (PICTURE, PAPERS_PICTURE):
        if not (stale := check_picture(picture)):
            continue
        if given.check:
            problems.append(stale)
        else:
            from docs.picture import draw, draw_papers

            {PICTURE: draw, PAPERS_PICTURE: draw_papers}[picture](picture)
            print(f"{picture} written")
    for path in documents():
        before = path.read_text()
        after = filled(before, path.name)
        if given.check and before != after:
            problems.append(f"{path.name}: a generated part is out of date; run make docs")
        elif before != after:
            path.write_text(after)
            print(f"{path} written")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
