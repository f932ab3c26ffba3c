"""What a campaign is doing, read from its results directory alone. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grid.journal import read_progress
from grid.lock import is_held
from grid.nodes import parse
from grid.places import CAMPAIGN_FILE
from grid.quick import files_in
from grid.status import driver_state
from grid.status_words import driver_words, duration

COLUMNS = (
    *("search", "defense", "objective", "record", "trial", "number", "is_default", "status"),
    *("score", "is_feasible", "ca", "worst_asr", "ca_loss", "device_seconds", "written_at"),
)


def campaign_status(out: Path) -> dict[str, Any]:
    """The driver's word and, of every search that has begun, what its trials came to."""
    given = parse((out / CAMPAIGN_FILE).read_text(encoding="utf-8"), str(out / CAMPAIGN_FILE))
    items, progress = given.items(), read_progress(out)
    budget = items["budget"].plain() if "budget" in items else {}
    return {
        "campaign": str(items["name"].plain()) if "name" in items else out.name,
        "results": str(out),
        **driver_state(progress, is_held(out)),
        "lanes": (progress or {}).get("lanes"),
        "stages": (progress or {}).get("stages", {}),
        "budget": budget,
        "searches": [_search(trials) for trials in _searches(out)],
    }


def _searches(out: Path) -> list[list[dict[str, Any]]]:
    """The ended trials of each search, defaults first. Of a defense and an objective that were
    searched before the file was changed, the last search stands."""
    trials: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for file in files_in(out, "trials"):
        for record in file.read(columns=list(COLUMNS)).to_pylist():
            if record["record"] == "trial":
                key = (record["search"], record["trial"], record["is_default"])
                own = trials.setdefault(key, record)
                if record["written_at"] > own["written_at"]:
                    trials[key] = record
    by_search: dict[str, list[dict[str, Any]]] = {}
    for record in trials.values():
        by_search.setdefault(record["search"], []).append(record)
    newest: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in sorted(by_search.values(), key=lambda f: max(r["written_at"] for r in f)):
        newest[found[0]["defense"], found[0]["objective"]] = found
    return [sorted(found, key=lambda r: r["number"]) for found in newest.values()]


def _search(trials: list[dict[str, Any]]) -> dict[str, Any]:
    own = [trial for trial in trials if not trial["is_default"]]
    able = [t for t in trials if t["status"] == "ok"]
    best = min(able, key=lambda t: (t["score"], -t["ca"], t["number"]), default=None)
    names = ("number", "worst_asr", "ca_loss", "is_feasible")
    return {
        "defense": trials[0]["defense"],
        "objective": trials[0]["objective"],
        "trials": len(own),
        "stopped": sum(t["status"] == "stopped" for t in own),
        "failed": sum(t["status"] == "failed" for t in own),
        "device_seconds": sum(t["device_seconds"] or 0.0 for t in own),
        "best": None if best is None else {name: best[name] for name in names},
    }


def campaign_status_words(found: Mapping[str, Any]) -> str:
    """What `grid status` prints of a campaign."""
    return "\n".join(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['campaign']} (campaign): {driver_words(found, 'grid tune')}"
    stages = found["stages"]
    if not found["searches"] and stages.get("planned"):
        yield f"before the trials: {stages['done']} of {stages['planned']} stages done"
    total = found["budget"].get("trials")
    for search in found["searches"]:
        counts = f"{search['trials']}{f' of {total}' if total else ''} trials"
        for name in ("stopped", "failed"):
            counts += f", {search[name]} {name}" if search[name] else ""
        best = search["best"]
        shown = "none yet"
        if best is not None:
            shown = f"#{best['number']}, worst ASR {100 * best['worst_asr']:.1f} %,"
            shown += f" {100 * best['ca_loss']:.1f} points of accuracy lost"
            shown += "" if best["is_feasible"] else ", beyond the limit"
        yield (
            f"{search['defense']}, {search['objective']}: {counts},"
            f" {duration(search['device_seconds'])} of fits; best: {shown}"
        )
    if not found["searches"]:
        yield "no search has begun"
