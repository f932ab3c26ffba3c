"""The records of trials, ``trials/*.parquet``: how they are written, and what of them is known when
a campaign goes on."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grid.quick import files_in
from grid.schema.columns import TRIAL
from grid.tuning.spec import Values
from grid.tuning.trial import OUT_OF_BUDGET, PROCESS_FAILED, Record

COLUMNS = frozenset(column.name for column in TRIAL)


def row(
    record: Record,
    number: int,
    *,
    campaign: str,
    search: str,
    defense: str,
    objective: str,
    is_default: bool = False,
) -> Record:
    """A record with the columns that say whose it is."""
    found = {name: value for name, value in record.items() if name in COLUMNS}
    started = found.get("started_at")
    if isinstance(started, int | float):
        found["started_at"] = datetime.fromtimestamp(started, UTC)
    return {
        **found,
        "campaign": campaign,
        "search": search,
        "defense": defense,
        "objective": objective,
        "number": number,
        "is_default": is_default,
    }


def recorded_in(out: Path) -> list[Record]:
    """The newest of every record in ``trials/``."""
    newest: dict[tuple[Any, ...], Record] = {}
    for file in files_in(out, "trials"):
        for record in file.read().to_pylist():
            names = ("search", "trial", "is_default", "record", "cell", "epoch")
            key = tuple(record[name] for name in names)
            if key not in newest or record["written_at"] >= newest[key]["written_at"]:
                newest[key] = record
    return list(newest.values())


def known_of(recorded: Sequence[Record]) -> dict[str, list[Record]]:
    """Per trial that came to an end, what it told, in order; those that failed are tried again
    where it was not their settings' fault."""
    by_trial: dict[str, list[Record]] = defaultdict(list)
    for record in recorded:
        if not record["is_default"]:
            by_trial[record["trial"]].append(record)
    found = {}
    for trial, records in by_trial.items():
        ended = [r for r in records if r["record"] == "trial"]
        if not ended or _to_be_done_again(ended[0]):
            continue
        order = {"epoch": 0, "cell": 1, "trial": 2}
        records.sort(key=lambda r: (order[r["record"]] == 2, r["cell"] or 0, r["epoch"] or 1e9))
        found[trial] = [_plain(record) for record in records]
    return found


def _to_be_done_again(ended: Record) -> bool:
    return ended["reason"] in (OUT_OF_BUDGET, PROCESS_FAILED)


def _plain(record: Record) -> Record:
    """A record as a trial tells it."""
    apart = {"schema_version", "written_at", "campaign", "search", "defense", "objective"}
    found = {n: v for n, v in record.items() if n not in apart | {"number", "is_default"}}
    return {**found, "started_at": record["started_at"].timestamp()}


def settings_of(records: Sequence[Record]) -> Iterator[Values]:
    """The settings of trial records, in the order of their numbers, without the defaults."""
    for record in sorted(records, key=lambda r: int(r["number"])):
        if record["record"] == "trial" and not record["is_default"]:
            yield json.loads(record["settings"])
