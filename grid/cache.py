"""What a store holds, who needs it, and what is pinned. Collecting is in `grid.collect`.

Runs tell what they rest on in ``chains.json``; the store tells what a defense's artefact points at.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grid.chains import Chains, ListedCell, read_chains
from grid.quick import outcomes_in
from grid.schema.status import Status
from grid.status_words import duration
from victims.errors import UsageError, counted, near
from victims.keys import PATTERN
from victims.store import Store

PINS = "pins"
SHOWN_CELLS = 5


@dataclass(slots=True)
class Held:
    """What the store holds under a key, whole or not."""

    key: str
    is_whole: bool = False
    attempts: dict[str, int] = field(default_factory=dict)
    partial_bytes: int = 0
    used: float = 0.0

    @property
    def kind(self) -> str:
        return self.key.rsplit("-", 1)[0]

    @property
    def bytes(self) -> int:
        return sum(self.attempts.values()) + self.partial_bytes


def inventory(store: Store) -> dict[str, Held]:
    """Every key of the store with its attempts, by three listings; foreign names are left out."""
    found: dict[str, Held] = {}
    for top in ("manifests", "data", "partial"):
        for file in store.listing(top):
            parts = file.name.split("/")
            key = parts[2].removesuffix(".json") if top == "manifests" else parts[1]
            if len(parts) < 3 or PATTERN.fullmatch(key) is None:
                continue
            held = found.setdefault(key, Held(key))
            if top == "manifests":
                # To look after a store reads manifests, which is no use of what they describe.
                held.is_whole, held.used = True, max(held.used, file.written)
                continue
            if top == "data":
                held.attempts[parts[2]] = held.attempts.get(parts[2], 0) + file.size
            else:
                held.partial_bytes += file.size
            held.used = max(held.used, file.used)
    return found


def contents(store: Store) -> dict[str, Any]:
    """By kind: artefacts, bytes and newest use; what is not whole apart."""
    kinds: dict[str, dict[str, Any]] = {}
    unfinished: dict[str, Any] = {"number": 0, "bytes": 0}
    for held in inventory(store).values():
        entry = unfinished
        if held.is_whole:
            entry = kinds.setdefault(held.kind, {"number": 0, "bytes": 0, "newest_use": 0.0})
            entry["newest_use"] = max(entry["newest_use"], held.used)
        entry["number"] += 1
        entry["bytes"] += held.bytes
    return {
        "store": store.shown,
        "kinds": dict(sorted(kinds.items())),
        "unfinished": unfinished,
        "bytes": sum(e["bytes"] for e in kinds.values()) + unfinished["bytes"],
        "pins": {name: len(keys) for name, keys in sorted(pins(store).items())},
    }


def contents_words(found: Mapping[str, Any]) -> str:
    lines = [f"{found['store']}: {size(found['bytes'])}"]
    for kind, entry in found["kinds"].items():
        ago = duration(max(0.0, time.time() - entry["newest_use"]))
        lines.append(f"  {kind:10} {entry['number']:6} {size(entry['bytes']):>10}  used {ago} ago")
    if found["unfinished"]["number"]:
        entry = found["unfinished"]
        lines.append(f"  {'unfinished':10} {entry['number']:6} {size(entry['bytes']):>10}")
    for name, number in found["pins"].items():
        lines.append(f"  pinned: {name}" + (f", {number} artefacts" if number > 1 else ""))
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes in the unit that people would use."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


# --- who needs what


def pointed_at(store: Store, keys: Iterable[str]) -> dict[str, str]:
    """Artefact -> the model that it names, of those that hold no weights themselves."""
    found = {}
    for key in keys:
        if key.startswith("defended-"):
            text = store.read_note(f"manifests/defended/{key}.json")
            try:
                found[key] = str(json.loads(text or b"")["meta"]["model_key"])
            except (ValueError, KeyError, TypeError):
                continue
    return found


def needed(chains: Chains, cells: Iterable[ListedCell], models: Mapping[str, str]) -> set[str]:
    """All that cells rest on: artefacts of stages, and the models that defenses point at."""
    ends = {key for cell in cells for key in (*cell.measures, *cell.gate)}
    found = set(chains.artefacts(chains.above(ends)))
    return found | {models[key] for key in found if key in models}


def wanted_cells(folder: Path, chains: Chains) -> list[ListedCell]:
    """The cells that are finished or to be run; cancelled ones need nothing."""
    status = outcomes_in(folder)
    return [c for c in chains.cells if status.get(c.key, ("",))[0] != Status.CANCELLED]


def reasons(store: Store, wanted: str, folders: Sequence[Path]) -> dict[str, Any]:
    """Which cells of which runs need an artefact, and which pins hold it."""
    held = inventory(store)
    planned = {folder: read_chains(folder) for folder in folders}
    known = set(held).union(*(set(c.artefacts(c.stages)) for c in planned.values()))
    key = _key(wanted, known)
    models = pointed_at(store, [k for k, h in held.items() if h.is_whole])
    users: list[dict[str, Any]] = []
    for folder, chains in planned.items():
        cells = [
            cell.label
            for cell in wanted_cells(folder, chains)
            if key in needed(chains, [cell], models)
        ]
        if cells:
            about = {"results": str(folder), "grid": chains.grid, "num_cells": len(cells)}
            users.append({**about, "cells": cells})
    return {
        "key": key,
        "in_store": key in held and held[key].is_whole,
        "bytes": held[key].bytes if key in held else 0,
        "needed_by": users,
        "pinned_by": [name for name, keys in pins(store).items() if key in keys],
        "looked_at": [str(folder) for folder in folders],
    }


def _key(wanted: str, known: set[str]) -> str:
    """The key that is meant by itself or by its beginning."""
    found = [wanted] if wanted in known else sorted(k for k in known if k.startswith(wanted))
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(found[:SHOWN_CELLS])
        raise UsageError(f"{wanted!r} is the beginning of {len(found)} keys: {listed}")
    raise UsageError(
        f"no artefact {wanted!r} in the store or in a known run.{near(wanted, known)} A key is a"
        " kind and 16 digits, such as model-0123456789abcdef; `grid explain CELL` lists a cell's."
    )


def reasons_words(found: Mapping[str, Any]) -> str:
    there = f"in the store, {size(found['bytes'])}" if found["in_store"] else "not in the store"
    lines = [f"{found['key']}: {there}"]
    for user in found["needed_by"]:
        shown = ", ".join(user["cells"][:SHOWN_CELLS])
        more = user["num_cells"] - SHOWN_CELLS
        lines.append(
            f"  needed by {counted(user['num_cells'], 'cell')} of {user['grid']}"
            f" ({user['results']}): {shown}" + (f" and {more} more" if more > 0 else "")
        )
    lines += [f"  pinned: {name}" for name in found["pinned_by"]]
    if not found["needed_by"]:
        lines.append(f"  no cell of the {len(found['looked_at'])} known runs needs it")
    return "\n".join(lines)


# --- pins


def pins(store: Store) -> dict[str, set[str]]:
    """Pin -> the artefacts that it keeps: ``KEY`` for one, ``grid NAME`` for a run's."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in store.listing(PINS):
        text = store.read_note(file.name)
        if text is None:
            continue
        try:
            body = json.loads(text)
            found[str(body["name"])] |= {str(key) for key in body["keys"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file.name} in {store.shown} is no pin ({error!r}), so nothing tells what it"
                " keeps. Delete it, and pin again."
            ) from error
    return found


def _write_pin(store: Store, file: str, name: str, keys: Iterable[str]) -> None:
    body = {"name": name, "keys": sorted(keys), "at": time.time()}
    store.write_note(f"{PINS}/{file}.json", json.dumps(body).encode())


def pin_key(store: Store, wanted: str) -> str:
    """Keep one artefact and, of a defense, the model that it points at."""
    held = inventory(store)
    key = _key(wanted, {k for k, h in held.items() if h.is_whole})
    models = pointed_at(store, [key])
    _write_pin(store, key, key, {key, *models.values()})
    return f"pinned {key}"


def pin_run(store: Store, folder: Path) -> str:
    """Keep all that the cells of a run rest on, what is still to be made too."""
    chains = read_chains(folder)
    held = inventory(store)
    models = pointed_at(store, [k for k, h in held.items() if h.is_whole])
    keys = needed(chains, chains.cells, models)
    _write_pin(store, f"grid {chains.grid}", f"grid {chains.grid}", keys)
    there = [held[key] for key in keys if key in held]
    return (
        f"pinned grid {chains.grid}: {len(keys)} artefacts, {len(there)} of them in the store"
        f" ({size(sum(h.bytes for h in there))})"
    )


def unpin(store: Store, key: str | None, grid: str | None) -> str:
    """Take back the pin of an artefact or of a run."""
    there = pins(store)
    wanted = f"grid {grid}" if grid is not None else str(key)
    if wanted not in there:
        others = [name for name, keys in there.items() if wanted in keys]
        held = f" It is kept by the pin of {', '.join(others)}." if others else ""
        listed = ", ".join(sorted(there)) or "none"
        raise UsageError(f"{wanted} is not pinned.{near(wanted, there)}{held} Pins: {listed}.")
    store.drop_note(f"{PINS}/{wanted}.json")
    return f"unpinned {wanted}"
