"""The generated parts of the documents: written by ``make docs``, compared by ``make check``.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. The demo's board
comes from ``docs/demo-board.json``, which `grid leaderboard demo --format json` printed; a check
fails when the preset has changed since.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/demo.md")
BOARD = ROOT / "docs" / "demo-board.json"
MARK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _place(origin: str) -> str:
    file = Path(origin.rpartition(":")[0])
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return f"[{name}]({name})"


def attacks() -> str:
    from grid.registry import describe

    rows = [
        [m.name, m.idea, m.paper, m.phase, ", ".join(m.variants) or "-", _place(m.origin)]
        for m in describe("attacks")
    ]
    return _table(["attack", "idea", "paper", "gate", "variants", "file"], rows)


def defenses() -> str:
    """Who is given what: the threat model of every defense and control."""
    from grid.registry import describe

    gives = ("suspect_data", "victim", "clean_data", "reference", "truth")
    rows = []
    for method in describe("defenses"):
        fidelity = method.fidelity or {}
        words = sorted(set(fidelity.values()))
        shown = words[0] if len(words) == 1 else ", ".join(f"{r}: {w}" for r, w in fidelity.items())
        marks = ["yes" if need in method.needs else "" for need in gives]
        rows.append([method.name, method.phase, *marks, shown, method.paper, _place(method.origin)])
    head = ["defense", "phase", "suspect data", "victim", "clean data", "reference", "truth"]
    return _table([*head, "fidelity", "paper", "file"], rows)


def presets() -> str:
    from grid import registry

    return _table(["preset", "what it is"], [[n, t] for n, t in registry.presets().items()])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _with_interval(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{_percent(row[name])} [{_percent(low)}, {_percent(high)}]"


def _board_rows(keep: Callable[[dict[str, Any]], bool]) -> str:
    board = json.loads(BOARD.read_text())
    rows = []
    for row in board["rows"]:
        if keep(row):
            cost = "" if row["relative_cost"] is None else f"{row['relative_cost']:.2f}"
            rows.append(
                [
                    row["attack"],
                    f"{100 * row['rate']:g} %",
                    row["defense"],
                    _with_interval(row, "clean_top1"),
                    _with_interval(row, "asr_top1"),
                    _percent(row["asr_clean_victim_top1"]),
                    _percent(row["r_acc"]),
                    cost,
                    row["status"],
                ]
            )
    head = ["attack", "rate", "defense", "CA %", "ASR %", "ASR of the clean victim %", "R-Acc %"]
    table = _table([*head, "cost", "status"], rows)
    return f"{table}\nGrid `{board['grid']['name']}`, hash `{board['grid']['hash']}`.\n"


def demo_short() -> str:
    wanted = ("none", "finetune", "cleanclip", "roclip")
    return _board_rows(lambda row: row["rate"] > 0 and row["defense"] in wanted)


def demo_board() -> str:
    return _board_rows(lambda row: True)


PARTS: dict[str, Callable[[], str]] = {
    "attacks": attacks,
    "defenses": defenses,
    "presets": presets,
    "demo-short": demo_short,
    "demo-board": demo_board,
}


def filled(text: str, name: str) -> str:
    """A document with every generated part made anew."""

    def part(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            raise SystemExit(f"{name}: no generated part called {match[2]!r}: {sorted(PARTS)}")
        return f"{match[1]}{PARTS[match[2]]()}{match[3]}"

    return MARK.sub(part, text)


def check_board() -> str | None:
    """The board in the documents must be of the demo as it is now."""
    from grid.gridfile import load_grid

    shown = json.loads(BOARD.read_text())["grid"]["hash"]
    now = load_grid("demo").identity_hash
    if shown == now:
        return None
    return (
        f"docs/demo-board.json is of grid {shown}, the preset is now {now}. Run: make demo;"
        " .venv/bin/grid leaderboard demo --format json > docs/demo-board.json; make docs"
    )


def main() -> int:
    check = "--check" in sys.argv[1:]
    problems = [problem] if (problem := check_board()) else []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = filled(before, name)
        if check and before != after:
            problems.append(f"{name}: a generated table is out of date; run make docs")
        elif not check and before != after:
            path.write_text(after)
            print(f"{name} written")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems and check else 0


if __name__ == "__main__":
    sys.exit(main())
