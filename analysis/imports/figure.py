"""One number of somebody else's: what it must say of itself, and what is wrong if it does not."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from analysis.published import GEOMETRIES, RELATIONS, VARIANTS
from grid.schema.errors import SchemaError
from victims.errors import near

ARXIV = re.compile(r"(?:arxiv:?\s*)?(\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+(?:\.[A-Z]{2})?/\d{7})", re.I)
DOI = re.compile(r"(?:doi:\s*|https://doi\.org/)?(10\.\d{4,9}/\S+)", re.I)
METRIC = re.compile(r"(?:clean_top|asr_top|psr_top)\d+|r_acc|auroc")
METRICS = ("clean_top1", "asr_top1", "r_acc", "auroc", "psr_top1")
SPELT = {
    **dict.fromkeys(("ca", "cacc", "acc", "ba", "cda", "accuracy", "testacc"), "clean_top1"),
    **dict.fromkeys(("asr", "testasr"), "asr_top1"),
    **dict.fromkeys(("ra", "racc", "robustaccuracy", "testra"), "r_acc"),
    **dict.fromkeys(("auc", "rocauc"), "auroc"),
}
"""How papers call our metrics: to say which was probably meant, never to guess."""
SCALES = {"%": 100.0, "share": 1.0}
NAMED = ("attack", "defense", "metric")
TEXTS = ("paper", "table", "attack", "defense", "dataset", "model", "metric", "variant", "setting")
NOT_STATED = "not stated"
MOST_FAULTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A number as a file gives it, all in text; ``foreign`` are the names that are declared to be
    the paper's own, among `NAMED`."""

    line: int
    paper: str
    identifier: str
    table: str
    attack: str
    defense: str
    rate: str
    count: str
    dataset: str
    model: str
    metric: str
    variant: str
    value: str
    unit: str
    geometry: str = NOT_STATED
    relation: str = "="
    setting: str = ""
    arxiv: str = ""
    doi: str = ""
    foreign: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The names of ours, and those that whoever imports has declared to be foreign."""

    attacks: Collection[str]
    defenses: Collection[str]
    declared: frozenset[str] = frozenset()


def checked(raws: Iterable[Raw], known: Known, where: str) -> list[dict[str, Any]]:
    """Records of the schema of imports; or one error that names the first faults by their lines."""
    found, faults = [], dict[str, list[int]]()
    seen: dict[tuple[object, ...], int] = {}
    for raw in raws:
        foreign = {name for name in NAMED if name in raw.foreign or _is_declared(raw, name, known)}
        own = list(_faults(raw, foreign, known))
        for fault in own:
            faults.setdefault(fault, []).append(raw.line)
        if own:
            continue
        record = _record(raw, foreign)
        told = ("source_line", "value", "printed", "unit")
        about = tuple(value for name, value in record.items() if name not in told)
        if about in seen:
            words = f"{raw.metric} of {raw.attack} x {raw.defense}"
            faults[f"{words} is given twice, first in line {seen[about]}"] = [raw.line]
        seen[about] = raw.line
        found.append(record)
    if faults:
        raise SchemaError("\n".join([f"{where}: nothing was imported:", *_told(faults)]))
    if not found:
        raise SchemaError(f"{where}: there are no numbers in it")
    return found


def _told(faults: Mapping[str, Sequence[int]]) -> Iterable[str]:
    """The first faults, each once, with the first line that has it."""
    for fault, lines in list(faults.items())[:MOST_FAULTS]:
        more = f" and {len({*lines}) - 1} more" if len({*lines}) > 1 else ""
        yield f"line {lines[0]}{more}: {fault}"
    if len(faults) > MOST_FAULTS:
        yield f"... and {len(faults) - MOST_FAULTS} other faults"


def _is_declared(raw: Raw, name: str, known: Known) -> bool:
    return getattr(raw, name) in known.declared


def _faults(raw: Raw, foreign: Collection[str], known: Known) -> Iterable[str]:
    """The laws of one number, as sentences about what is broken."""
    for name in ("paper", "table", "attack", "defense", "dataset", "model", "metric", "variant"):
        if not getattr(raw, name):
            yield f"{name} is empty"
    for name in TEXTS:
        if not getattr(raw, name).isprintable():
            yield f"{name} holds {getattr(raw, name)!r}: line breaks and control characters"
    if raw.identifier and not (ARXIV.fullmatch(raw.identifier) or DOI.fullmatch(raw.identifier)):
        yield f"{raw.identifier!r} is neither an arXiv id such as 2206.12654 nor a DOI"
    elif raw.doi and not DOI.fullmatch(raw.doi):
        yield f"doi {raw.doi!r} is none: one begins with 10., and an arXiv id belongs in `arxiv`"
    elif raw.arxiv and not ARXIV.fullmatch(raw.arxiv):
        yield f"arxiv {raw.arxiv!r} is no such id: a DOI belongs in `doi`"
    elif not raw.identifier:
        yield "neither arxiv nor doi says where to find the paper"
    for name, ours in (("attack", known.attacks), ("defense", known.defenses)):
        given = getattr(raw, name)
        if given and name not in foreign and given not in ours:
            meant = near(given, ours)
            yield f"no {name} of ours is called {given!r}.{meant} {_declare(name, given)}"
    if raw.metric and "metric" not in foreign:
        yield from _metric_faults(raw)
    yield from _amount_faults(raw)
    if raw.geometry not in GEOMETRIES:
        yield f"geometry {raw.geometry!r}; allowed: {', '.join(GEOMETRIES)}"
    if raw.relation not in RELATIONS:
        yield f"relation {raw.relation!r}; allowed: {' '.join(RELATIONS)}"
    yield from _value_faults(raw, is_foreign="metric" in foreign)


def _declare(name: str, given: str) -> str:
    return (
        "A name of the paper's own is taken if it is declared:"
        f" {name} in the column as_written, or --as-written {given!r}."
    )


def _metric_faults(raw: Raw) -> Iterable[str]:
    """Known metrics have known variants, and none goes without."""
    if not METRIC.fullmatch(raw.metric):
        spelt = SPELT.get(re.sub(r"[^a-z]", "", raw.metric.lower()))
        meant = f" Did you mean {spelt!r}?" if spelt else near(raw.metric, METRICS)
        yield (
            f"no metric of ours is called {raw.metric!r}.{meant} {_declare('metric', raw.metric)}"
        )
        return
    allowed = next(known for start, known in VARIANTS.items() if raw.metric.startswith(start))
    if raw.variant and raw.variant not in allowed:
        yield f"variant {raw.variant!r} of {raw.metric}; allowed: {', '.join(allowed)}"


def _amount_faults(raw: Raw) -> Iterable[str]:
    """How much was poisoned: a rate, a count, or the word that the paper does not say it."""
    if not raw.rate and not raw.count:
        yield f"neither rate nor count says how much was poisoned; rate may be {NOT_STATED!r}"
    if raw.rate not in ("", NOT_STATED) and _rate(raw.rate) is None:
        yield f"rate {raw.rate!r}; a share below 1, or percent with its sign, such as 0.1 or 10%"
    if raw.count and not (raw.count.isascii() and raw.count.isdigit()):
        yield f"count {raw.count!r}; a whole number of poisoned rows"


def _value_faults(raw: Raw, *, is_foreign: bool) -> Iterable[str]:
    value = _number(raw.value)
    if not raw.unit:
        yield "unit is empty; % or share"
    elif raw.unit not in SCALES and not is_foreign:
        yield f"unit {raw.unit!r}; allowed: {', '.join(SCALES)}"
    if not math.isfinite(value):
        yield f"value {raw.value!r} is no finite number"
    elif raw.unit in SCALES and not 0 <= value <= SCALES[raw.unit]:
        yield f"value {raw.value!r} {raw.unit}; it must lie in 0 to {SCALES[raw.unit]:g}"


def _record(raw: Raw, foreign: Collection[str]) -> dict[str, Any]:
    rate = _rate(raw.rate) if raw.rate else None
    paper = ARXIV.fullmatch(raw.identifier)
    doi = DOI.fullmatch(raw.identifier)
    return {
        "source_line": raw.line,
        "paper": raw.paper,
        "identifier": f"arXiv {paper[1]}" if paper else f"doi {doi[1] if doi else ''}",
        "table": raw.table,
        "attack": raw.attack,
        "rate": None if rate is None else float(rate),
        "rate_text": None if rate is None else f"{rate:f}",
        "count": int(raw.count) if raw.count else None,
        "defense": raw.defense,
        "dataset": raw.dataset,
        "model": raw.model,
        "setting": raw.setting,
        "metric": raw.metric,
        "variant": raw.variant,
        "geometry": raw.geometry,
        "relation": raw.relation,
        "printed": raw.value,
        "unit": raw.unit,
        "value": _number(raw.value) / SCALES.get(raw.unit, 1.0),
        **{f"{name}_as_written": name in foreign for name in NAMED},
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _rate(text: str) -> Decimal | None:
    """An exact share, or None where the text is no rate."""
    plain = text.replace(" ", "")
    try:
        rate = Decimal(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except InvalidOperation:
        return None
    # 1 is more often one percent than all of the data: only a sign tells.
    most = rate <= 1 if plain.endswith("%") else rate < 1
    return rate.normalize() if rate.is_finite() and rate >= 0 and most else None


def from_mapping(line: int, row: Mapping[str, str], foreign: frozenset[str]) -> Raw:
    """A number of named texts; what may be left out has its default."""
    optional = {name: row[name] for name in ("geometry", "relation", "setting") if row.get(name)}
    identifier = row.get("arxiv") or row.get("doi") or ""
    names = ("paper", "table", "attack", "defense", "dataset", "model", "metric", "variant")
    more = ("rate", "count", "value", "unit", "arxiv", "doi")
    texts = {name: row.get(name) or "" for name in (*names, *more)}
    return Raw(line=line, identifier=identifier, foreign=foreign, **texts, **optional)
