"""The generated parts of docs/campaigns.md, of a campaign's results as they were written down.

``python -m docs.tables --campaign NAME [DIR]`` writes ``docs/NAME-campaign.json`` from results of a
campaign and of its held-out grid, on the machine where they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def write_campaign(name: str, results: Path, made: Callable[[Path], dict[str, Any]]) -> Path:
    """A campaign's board and that of what it chose, as Markdown, with what made them."""
    from analysis.board import load_board
    from analysis.campaign_figures import draw_campaign
    from analysis.campaign_render import render_campaign
    from analysis.campaigns import load_campaign
    from analysis.render import render

    board, held_out = load_campaign(results), load_board(results / "held-out")
    if not held_out.completeness.is_complete:
        raise SystemExit(f"{results / 'held-out'} is not complete")
    document = {
        "name": name,
        "file": _digest_of_file(name),
        "made": made(results / "held-out"),
        "campaign": _without_paths(render_campaign(board, "md"), results),
        "held_out": render(held_out, "md"),
    }
    document["digest"] = _digest(document)
    path = DOCS / f"{name}-campaign.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    drawn = draw_campaign(board, results / "figures")
    for file in drawn.files:
        if file.name == "cloud-finetune.png":
            (DOCS / f"campaign-{file.name}").write_bytes(file.read_bytes())
    return path


def _without_paths(text: str, results: Path) -> str:
    """Where the results lay is of no use to who reads them elsewhere."""
    return text.replace(f"{results}/", f"runs/{results.name}/")


def check_campaign(path: Path) -> str | None:
    """The results must be as they were written, and of the campaign as it is now."""
    found = json.loads(path.read_text())
    name = found["name"]
    again = f" Run: grid tune {name} --evaluate; python -m docs.tables --campaign {name}; make docs"
    if found["digest"] != _digest(found):
        return f"{path.name} was edited after it was written: its digest is another one.{again}"
    if found["file"] != _digest_of_file(name):
        return f"{path.name} is of another text of the campaign {name}.{again}"
    return None


def campaign_parts(made: Callable[[Path], str]) -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {}
    for path in sorted(DOCS.glob("*-campaign.json")):
        name = path.name.removesuffix("-campaign.json")
        found[f"{name}-made"] = partial(made, path)
        found[f"{name}-campaign"] = partial(_text, path, "campaign")
        found[f"{name}-held-out"] = partial(_text, path, "held_out")
    return found


def _text(path: Path, part: str) -> str:
    return str(json.loads(path.read_text())[part]).rstrip() + "\n"


def _digest_of_file(name: str) -> str:
    from grid.registry import campaign_source

    return hashlib.sha256(campaign_source(name).text.encode()).hexdigest()[:16]


def _digest(document: dict[str, Any]) -> str:
    body = {name: value for name, value in document.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
