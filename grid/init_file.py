"""``grid init``: a preset or another grid file as a file of one's own, changed and made small.

The limited form is a smoke test of the same code on the same files: a few rows, one epoch, one
seed, one prompt, methods under the values that craft in seconds, no attack that needs captions of
one class, and a gate that lets every victim through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from grid.data import WorldData
from grid.decode import type_hints
from grid.edited import dumped, edited
from grid.gridfile import check_keys
from grid.nodes import Raw, Where, parse
from grid.registry import Kind, Source, resolve
from victims.errors import UsageError

# Rows that a limited attack poisons, where its rate would give fewer.
FEWEST = 8
SMALLEST = 32  # rows in which a batch, a held-out part and some poison have room
_OPEN: Mapping[str, Any] = {
    **{name: {"asr": 0, "lift": -1, "clean_loss": 1} for name in ("strong", "medium", "weak")},
    **{name: {"low": -1, "clean": 1, "clean_loss": 1} for name in ("targeted", "text")},
    **{"init_loss": 1, "inert_lift": 0},
}


def written(source: Source, changes: Sequence[str], limit: int | None) -> str:
    """The text of the new file: of an unchanged one every byte."""
    if not changes and limit is None:
        return source.text
    document = parse(source.text, source.source).plain()
    told = [f"# From {source.source.removeprefix('preset ')}"]
    for change in changes:
        _change(document, change)
        told.append(f"# --set {change}")
    if changes:
        check_keys(Raw.of(document, Where("--set", 0, "")))
    if limit is None:
        body = edited(source.text, document, {_key(change) for change in changes})
    else:
        document = limited(document, source.name, limit)
        told.append(f"# --limit {limit}: shows that files are read; its numbers mean nothing")
        body = dumped(document)
    return "\n".join([*told, "", body])


def _key(change: str) -> str:
    return change.partition("=")[0].partition(".")[0]


def _change(document: dict[str, Any], change: str) -> None:
    """``a.b=VALUE``, the value as YAML."""
    name, sign, text = change.partition("=")
    *above, last = name.split(".")
    if not sign or not last:
        raise UsageError(f"--set {change}: write KEY=VALUE, such as model.arch=RN50 or seeds=[0]")
    place = document
    for part in above:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            raise UsageError(f"--set {change}: {part} holds no keys, it is {below!r}")
        place = below
    place[last] = parse(f"value: {text}", "--set").items()["value"].plain()


def limited(document: Mapping[str, Any], name: str, rows: int) -> dict[str, Any]:
    """The document at its smallest: ``rows`` of every split."""
    if rows < SMALLEST:
        raise UsageError(f"--limit {rows}: at least {SMALLEST} rows, for a batch and some poison")
    found: dict[str, Any] = {"name": f"{document.get('name', name)}-limit{rows}"}
    found |= {key: value for key, value in document.items() if key != "name"}
    found["data"] = {key: _data(key, value, rows) for key, value in found["data"].items()}
    for key in ("seeds", "defense_seeds", "targets"):
        if key in found:
            found[key] = found[key][:1]
    found["rates"] = _rates(found.get("rates", [0]), rows)
    kinds: tuple[Kind, ...] = ("attacks", "defenses")
    for kind in kinds:
        entries = [_entry(kind, item, rows) for item in found[kind]]
        found[kind] = [entry for entry in entries if entry is not None]
    found["recipes"] = {key: _recipe(value, rows) for key, value in found["recipes"].items()}
    found["gate"] = {**_OPEN, **_asked_of_start(found.get("gate"))}
    if isinstance(found.get("evaluate"), dict):
        found["evaluate"] = _evaluate(found["evaluate"], rows)
    found["execution"] = {"lanes": 1}
    return found


def _asked_of_start(gate: Any) -> dict[str, Any]:
    """What start weights must reach is kept: it finds a wrong activation or order of classes."""
    reference = gate.get("reference") if isinstance(gate, Mapping) else None
    return {} if reference is None else {"reference": reference}


def _data(kind: str, value: Mapping[str, Any] | None, rows: int) -> dict[str, Any]:
    """A form of `data` with fewer rows of each split that it counts, of the embedded world also
    of those that it leaves at their defaults."""
    found = dict(value or {})
    if kind == "world":
        defaults = {f.name: f.default for f in fields(WorldData) if f.name != "world"}
        found |= {name: count for name, count in defaults.items() if name not in found}
    for split in ("public", "suspect", "clean", "tuning", "report", "shifted"):
        if isinstance(found.get(split), int):
            found[split] = min(found[split], rows if split != "clean" else rows // 2)
        elif isinstance(found.get(split), dict):  # a pool of clean rows
            found[split] = {**found[split], "rows": min(found[split]["rows"], rows // 2)}
    if "judged_by" in found:
        judge = {**found["judged_by"], "tuning": 1, "templates": "photo"}
        found["judged_by"] = {**judge, "report": min(judge.get("report") or rows, rows)}
    return found


def _rates(given: Sequence[Any], rows: int) -> list[Any]:
    """Clean, and the largest rate, of which there must be rows."""
    most = max((float(rate) for rate in given), default=0.0)
    return [0, max(most, FEWEST / rows)] if most else [0]


def _entry(kind: Kind, item: Any, rows: int) -> Any:
    """A method with the values under which it takes seconds; None for one that has no rows."""
    name, given = next(iter(item.items())) if isinstance(item, Mapping) else (item, {})
    given = dict(given or {})
    cls: Any = resolve(kind, name)
    if kind == "attacks" and cls().clean_label:
        return None  # so few captions name no class
    # Free words in it are names of the embedded world.
    hints = type_hints(cls)
    own = {k: v for k, v in getattr(cls, "quick", {}).items() if hints[k] is not str}
    if "counts" in given:
        unit = cls(**own).unit
        count = max(unit, FEWEST - FEWEST % unit)
        given["counts"] = [0, count]
        if "at_least" in hints:  # captions of each chosen class
            given["at_least"] = count // unit
    if "rates" in given:
        given["rates"] = _rates(given["rates"], rows)
    if isinstance(given.get("recipe"), Mapping):
        given["recipe"] = _recipe(given["recipe"], rows)
    given |= own
    return {name: given} if given else name


def _recipe(value: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """One epoch of small batches; of several learning rates the first two."""
    found = dict(value)
    if "epochs" in found:
        found["epochs"] = 1
    if "batch_size" in found:
        found["batch_size"] = min(found["batch_size"], rows // 4)
    if "warmup_steps" in found:
        found["warmup_steps"] = min(found["warmup_steps"], 2)
    found.pop("micro_batch", None)
    rate = found.get("lr")
    if isinstance(rate, Mapping):
        rates = rate.get("rates", [1.0e-6, 1.0e-5])[:2]
        found["lr"] = {**rate, "rates": rates, "floor": 4}
    return found


def _evaluate(value: Mapping[str, Any], rows: int) -> dict[str, Any]:
    found = dict(value)
    if found.get("exhibits"):
        found["exhibits"] = {"rows": min(32, rows)}
    for name in ("retrieval", "others"):
        sets = found.get(name)
        if isinstance(sets, Mapping):
            sets = [sets]
        if isinstance(sets, list):
            found[name] = [{**each, "rows": rows} for each in sets]
    return found
