"""Others' numbers beside ours in a figure: which may stand there, and where they come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.imports.reading import amount_words

if TYPE_CHECKING:
    import pandas as pd

COMPARABLE = {"clean_top1": "top-1", "asr_top1": "non-target images"}
"""The variants in which ours are measured, on the report split."""
SETTING = (
    *("import_name", "paper", "table", "attack", "defense", "dataset", "model", "setting"),
    *("rate", "count"),
)
MOST_WORDS = 2
FIXED = "\N{NO-BREAK SPACE}"


class Beside(NamedTuple):
    """Points with label, clean, asr and source, and what to say of the numbers without one."""

    points: pd.DataFrame
    note: str


def beside(
    records: Sequence[Mapping[str, Any]],
    attacks: Collection[str],
    defenses: Collection[str],
    eval_set: str,
) -> Beside:
    """The points of others in a plane of clean accuracy and ASR.

    A point takes both numbers, counted as ours are, of an attack and a defense of this board.
    """
    import pandas as pd

    kept = [record for record in records if eval_set == "report" and _is_comparable(record)]
    cells: dict[tuple[object, ...], dict[str, Mapping[str, Any]]] = {}
    for record in kept:
        if record["attack"] in attacks and record["defense"] in defenses:
            about = tuple(record[name] for name in SETTING)
            cells.setdefault(about, {})[record["metric"]] = record
    pairs = [cell for cell in cells.values() if len(cell) == len(COMPARABLE)]
    shown = [cell["asr_top1"] for cell in pairs]
    sources = source_words(shown)
    rows = [
        {
            "label": f"{cell['asr_top1']['defense']} ({cell['asr_top1']['attack']})",
            "clean": cell["clean_top1"]["value"],
            "asr": cell["asr_top1"]["value"],
            "source": sources[cell["asr_top1"]["import_name"]],
        }
        for cell in pairs
    ]
    left_out = len(records) - len(COMPARABLE) * len(pairs)
    notes = ["grey: one attack each, ours are means"] if rows else []
    notes += [f"{left_out} of {len(records)} imported numbers left out"] if left_out else []
    return Beside(pd.DataFrame(rows, columns=["label", "clean", "asr", "source"]), "; ".join(notes))


def _is_comparable(record: Mapping[str, Any]) -> bool:
    """Counted over the same images as ours, no bound, and under names of ours."""
    is_foreign = any(record[f"{name}_as_written"] for name in ("attack", "defense", "metric"))
    variant = COMPARABLE.get(record["metric"])
    return not is_foreign and record["relation"] == "=" and record["variant"] == variant


def source_words(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each import is, in the words of a legend: paper, data set, model and rate."""

    def name(record: Mapping[str, Any]) -> str:
        return str(record["import_name"])

    return {
        key: f"{key}: " + ", ".join(filter(None, _settings(list(group))))
        for key, group in groupby(sorted(records, key=name), name)
    }


def _settings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    amounts = [
        (amount_words(record) or "rate not stated").replace(" %", f"{FIXED}%") for record in records
    ]
    return [
        _few([str(record["paper"]) for record in records], "papers"),
        _few([str(record["dataset"]) for record in records], "data sets"),
        _few([str(record["model"]) for record in records], "models"),
        _few(amounts, "rates"),
    ]


def _few(words: Sequence[str], plural: str) -> str:
    """A few different words in full, many as their number."""
    found = list(dict.fromkeys(words))
    return ", ".join(found) if len(found) <= MOST_WORDS else f"{len(found)} {plural}"
