"""Imported numbers out of a results directory: as records, as a frame, and as published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.published import Published, published
from analysis.reader import Tables, read_tables
from grid.schema.columns import IMPORTED

if TYPE_CHECKING:
    import pandas as pd

ORDER = "SELECT * FROM published ORDER BY import_name, source_line, attack, defense, metric"


def imported_in(tables: Tables) -> list[dict[str, Any]]:
    """Every imported number of open results, of each import the newest."""
    answer = tables.query(ORDER)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def records_of(directory: Path) -> list[dict[str, Any]]:
    """The same of a directory, which may hold nothing else, or not exist."""
    if not (directory / "imported").is_dir():
        return []
    return read_tables(directory, imported_in, of="imported")


def imported_frame(directory: Path, *, bundled: bool = False) -> pd.DataFrame:
    """Others' numbers: those imported and, if asked for, those that come along."""
    import pandas as pd

    columns = [column.name for column in IMPORTED]
    records = records_of(directory)
    if bundled:
        records += [_as_record(figure) for figure in published()]
    return pd.DataFrame(records, columns=columns)


def _as_record(figure: Published) -> dict[str, Any]:
    same = ("paper", "table", "attack", "defense", "model", "setting", "metric", "variant")
    return {
        **{name: getattr(figure, name) for name in (*same, "geometry", "relation", "value")},
        "provenance": "bundled",
        "import_name": "bundled",
        "identifier": figure.paper,
        "dataset": figure.data,
        "source_file": figure.source,
        "unit": "share",
    }


def as_published(records: Sequence[Mapping[str, Any]]) -> list[Published]:
    """Imported numbers in the form in which a board tells others' numbers. A name that is the
    paper's own is marked, so that it is none of a board's."""
    return [
        Published(
            paper=record["paper"],
            table=f"{record['table']}, import {record['import_name']}",
            model=record["model"],
            data=record["dataset"],
            attack=name_words(record, "attack"),
            defense=name_words(record, "defense"),
            setting=", ".join(filter(None, (amount_words(record), record["setting"]))),
            metric=name_words(record, "metric"),
            variant=record["variant"],
            geometry=record["geometry"],
            relation=record["relation"],
            value=record["value"],
            source=f"import {record['import_name']}, {record['identifier']}",
        )
        for record in records
    ]


def name_words(record: Mapping[str, Any], what: str) -> str:
    """A name, told apart where it is the paper's own."""
    is_foreign = record[f"{what}_as_written"]
    return f"{record[what]} (as written)" if is_foreign else str(record[what])


def amount_words(record: Mapping[str, Any]) -> str:
    """How much was poisoned, as people say it."""
    if record["rate"] is not None:
        return f"rate {100 * record['rate']:.4g} %"
    return "" if record["count"] is None else f"{record['count']} rows"
