"""Collecting garbage in a store: what no known run needs, nobody pinned and nobody is making.

What is collected can be made again. A run that this looks at need not be finished: all that its
plan names is kept, and so is what may belong to a defense that it has not made yet.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid.cache import Held, inventory, needed, pins, pointed_at, size, wanted_cells
from grid.chains import Chains, read_chains
from grid.journal import read_progress
from grid.lock import is_held
from grid.places import BEGAN_FILE, CAMPAIGN_FILE
from grid.quick import SETTLED, outcomes_in
from victims.store import Busy, Store

DAY = 86_400.0
# Object stores have no locks: what lies there without a manifest may be on its way, and a fit that
# left a checkpoint may go on.
UPLOAD_SECONDS = DAY


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something to delete: a whole artefact, an abandoned ``attempt``, or partial work."""

    key: str
    what: str
    why: str
    bytes: int
    used: float
    attempt: str = ""


@dataclass(slots=True)
class _Needs:
    """What must stay, and since when an unfinished run may have left parts of its defenses."""

    keys: set[str]
    pinned: set[str]
    unfinished_since: float | None


def collect(
    store: Store,
    folders: Sequence[Path],
    *,
    delete: bool = False,
    older_than: float | None = None,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Find garbage and, if told to, delete it. ``older_than`` is in days since the newest use."""
    held = inventory(store)
    needs = _needs(store, held, folders)
    kept: Counter[str] = Counter()
    artefacts: list[Garbage] = []
    rests: list[Garbage] = []
    for entry in held.values():
        rests.extend(_rests(store, entry, needs))
        if not entry.is_whole:
            continue
        if reason := _kept_because(entry, needs):
            kept[reason] += 1
        else:
            whole = sum(entry.attempts.values()) - sum(r.bytes for r in rests if r.key == entry.key)
            artefacts.append(
                Garbage(entry.key, "artefact", "no known run needs it", whole, entry.used)
            )
    garbage = [*rests, *artefacts]
    if older_than is not None:
        before = time.time() - older_than * DAY
        kept["used lately"] = sum(item.used >= before for item in garbage)
        garbage = [item for item in garbage if item.used < before]
    total = sum(entry.bytes for entry in held.values())
    if max_bytes is not None:
        garbage = _as_much_as_it_takes(garbage, total - max_bytes)
    busy = [item for item in garbage if not _try(store, item, delete=delete)]
    kept["being made now"] = len(busy)
    gone = [item for item in garbage if item not in busy]
    freed = sum(item.bytes for item in gone)
    return {
        "store": store.shown,
        "deleted": delete,
        "garbage": [{n: getattr(item, n) for n in item.__slots__} for item in gone],
        "bytes": freed,
        "bytes_before": total,
        "bytes_after": total - freed,
        "above_max_bytes": max(0, total - freed - max_bytes) if max_bytes is not None else 0,
        "kept": {reason: number for reason, number in kept.items() if number},
        "looked_at": [str(folder) for folder in folders],
    }


def _needs(store: Store, held: Mapping[str, Held], folders: Sequence[Path]) -> _Needs:
    """A run whose needs cannot be read stops everything: `read_chains` raises."""
    models = pointed_at(store, [key for key, entry in held.items() if entry.is_whole])
    found = _Needs(set(), set().union(*pins(store).values()), None)
    for folder in folders:
        chains = read_chains(folder)
        found.keys |= needed(chains, wanted_cells(folder, chains), models)
        if not _is_finished(folder, chains):
            since = _began(folder)
            if found.unfinished_since is None or since < found.unfinished_since:
                found.unfinished_since = since
    return found


def _is_finished(folder: Path, chains: Chains) -> bool:
    """Whether a run has its rows, or a campaign came to its end: it tells of trials only then."""
    if (folder / CAMPAIGN_FILE).exists():
        return (read_progress(folder) or {}).get("state") == "ended" and not is_held(folder)
    status = outcomes_in(folder)
    cells = wanted_cells(folder, chains)
    return all(status.get(cell.key, ("",))[0] in SETTLED for cell in cells)


def _began(folder: Path) -> float:
    """When a run first planned, or a campaign first ran; before all time where nothing tells."""
    first = BEGAN_FILE if (folder / CAMPAIGN_FILE).exists() else "first_cells.json"
    try:
        return (folder / first).stat().st_mtime
    except OSError:
        return 0.0


def _kept_because(entry: Held, needs: _Needs) -> str:
    if entry.key in needs.pinned:
        return "pinned"
    if entry.key in needs.keys:
        return "needed by a run"
    since = needs.unfinished_since
    if since is not None and entry.used >= since:
        return "perhaps part of a defense that a run has not made yet"
    return ""


def _rests(store: Store, entry: Held, needs: _Needs) -> list[Garbage]:
    """What is left of attempts that came to nothing, and checkpoints that nobody resumes from."""
    if not store.local and time.time() - entry.used <= UPLOAD_SECONDS:
        return []
    found = []
    attempts = dict(entry.attempts)
    if entry.is_whole:
        published = _published(store, entry) if len(attempts) > 1 else None
        attempts = {a: n for a, n in attempts.items() if published and a != published}
    for attempt, size_ in attempts.items():
        why = "abandoned by a process that died"
        found.append(Garbage(entry.key, "attempt", why, size_, entry.used, attempt))
    if entry.partial_bytes and (entry.is_whole or not _kept_because(entry, needs)):
        why = "its artefact is finished" if entry.is_whole else "no known run needs it"
        found.append(Garbage(entry.key, "checkpoint", why, entry.partial_bytes, entry.used))
    return found


def _published(store: Store, entry: Held) -> str | None:
    """The attempt that the manifest names; None where it cannot be read, which proves nothing."""
    text = store.read_note(f"manifests/{entry.kind}/{entry.key}.json")
    try:
        return str(json.loads(text or b"")["attempt"])
    except (ValueError, KeyError, TypeError):
        return None


def _as_much_as_it_takes(garbage: list[Garbage], surplus: int) -> list[Garbage]:
    """The least recently used, until the store is small enough."""
    chosen = []
    for item in sorted(garbage, key=lambda item: item.used):
        if surplus <= 0:
            break
        chosen.append(item)
        surplus -= item.bytes
    return chosen


def _try(store: Store, item: Garbage, *, delete: bool) -> bool:
    """Delete something under its lock; False where somebody is making it now."""
    try:
        with store.claim(item.key):
            if delete and item.what == "artefact":
                store.remove(item.key)
            elif delete and item.what == "attempt":
                store.remove_attempt(item.key, item.attempt)
            elif delete:
                store.remove_partial(item.key)
    except Busy:
        return False
    return True


def collection_words(found: Mapping[str, Any]) -> str:
    """What `grid cache gc` prints."""
    by_kind: dict[tuple[str, str, str], list[int]] = {}
    for item in found["garbage"]:
        kind = item["key"].rsplit("-", 1)[0]
        by_kind.setdefault((item["what"], kind, item["why"]), []).append(item["bytes"])
    verb = "deleted" if found["deleted"] else "would delete"
    lines = [
        f"  {verb} {len(sizes)} x {kind} ({what}), {size(sum(sizes))}: {why}"
        for (what, kind, why), sizes in sorted(by_kind.items())
    ]
    number = len(found["garbage"])
    lines.append(
        f"{found['store']}: {verb} {number} things, {size(found['bytes'])} of"
        f" {size(found['bytes_before'])}"
    )
    kept = [f"{number} {reason}" for reason, number in found["kept"].items()]
    if kept:
        lines.append(f"kept: {', '.join(kept)}")
    if found["above_max_bytes"]:
        lines.append(f"still {size(found['above_max_bytes'])} above --max-bytes: the rest is kept")
    runs = ", ".join(found["looked_at"]) or "none"
    lines.append(f"runs looked at: {runs}; others are given with --out")
    if not found["deleted"] and number:
        lines.append("nothing was deleted: this was a rehearsal, --delete acts")
    return "\n".join(lines)
