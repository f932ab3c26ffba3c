"""What was understood of a file of others' numbers, for who imports it to look over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.imports.figure import Raw
from analysis.imports.reading import amount_words, name_words
from analysis.published import WORDS

ABOUT = ("attack", "defense", "rate_text", "count", "dataset", "model", "setting")
LARGE = 0.1
"""A share from which on a rate without a sign may have been meant as percent."""


def understood(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per attack, defense and rate, with what was measured of it."""
    cells: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        cells.setdefault(tuple(record[name] for name in ABOUT), []).append(record)
    return [_line(cell) for cell in cells.values()]


def _line(cell: Sequence[Mapping[str, Any]]) -> str:
    first = cell[0]
    about = [
        name_words(first, "attack"),
        name_words(first, "defense"),
        amount_words(first) or "rate not stated",
        first["dataset"],
        first["model"],
        first["setting"],
    ]
    return f"{', '.join(filter(None, about))}: {', '.join(map(_number, cell))}"


def _number(record: Mapping[str, Any]) -> str:
    name = WORDS.get(record["metric"], record["metric"])
    bound = "" if record["relation"] == "=" else f"{record['relation']} "
    if record["unit"] not in ("%", "share") or record["metric"] == "auroc":
        return f"{name} {bound}{record['printed']}"
    return f"{name} {bound}{100 * record['value']:.4g} %"


def bare_rates(raws: Sequence[Raw]) -> list[str]:
    """Rates without a sign that are large for shares."""
    bare = dict.fromkeys(raw.rate.strip() for raw in raws if raw.rate and "%" not in raw.rate)
    return [
        f"rate {text} is {100 * float(text):g} %: write {text}% if percent were meant"
        for text in bare
        if _share(text) >= LARGE
    ]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # as where it is not stated
