"""Adding to a results directory: tables, rows that were checked, and the cells that are planned."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grid.schema.arrow import VERSION_KEY, array, arrow_schema, mistyped
from grid.schema.columns import CELL, SCHEMA_VERSION, SCHEMAS
from grid.schema.errors import SchemaError
from grid.schema.laws import validate
from grid.schema.whole import fresh_path, renamed_when_done
from victims.errors import near

MAX_ROW_FILES = 256
MERGED_BYTES = 4 << 20


def write_rows(results: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Add one file with the rows of some whole cells, after checking them."""
    validate(rows)
    path = write_table(results, "rows", rows)
    if sum(1 for _ in os.scandir(path.parent)) > MAX_ROW_FILES:
        merge_row_files(results)
    return path


def merge_row_files(results: Path) -> None:
    """Put the small row files into one: opening 10,000 files costs a reader ten seconds.

    The merged file is in place before the small ones go. A kill between the two, or another
    writer doing the same, leaves rows twice, which changes nothing: the newest of equals wins.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    current = str(SCHEMA_VERSION).encode()
    small, tables = [], []
    for path in sorted((results / "rows").glob("[!.]*.parquet")):
        try:
            if path.stat().st_size < MERGED_BYTES:
                table = pq.ParquetFile(path).read()
                is_ours = (table.schema.metadata or {}).get(VERSION_KEY.encode()) == current
                if is_ours and not mistyped(table.schema, "rows"):
                    small.append(path)
                    tables.append(table)
        except (OSError, pa.ArrowException):
            continue  # Gone to another merge, or not whole: a reader names the latter.
    if len(tables) > 1:
        # Rows of before a column was added hold null there, where newer ones may not.
        merged = pa.concat_tables(tables, promote_options="default").combine_chunks()
        columns = zip(merged.schema, merged.columns, strict=True)
        fields = [f.with_nullable(f.nullable or column.null_count > 0) for f, column in columns]
        merged = merged.cast(pa.schema(fields, metadata=merged.schema.metadata))
        with renamed_when_done(fresh_path(results / "rows")) as scratch:
            pq.write_table(merged, scratch, compression="zstd")
        for path in small:
            path.unlink(missing_ok=True)


def write_table(results: Path, kind: str, records: Sequence[Mapping[str, object]]) -> Path:
    """Add one Parquet file of records to ``results/kind``; returns its path."""
    known = [column.name for column in SCHEMAS[kind]]
    given = {name for record in records for name in record}
    return write_columns(
        results,
        kind,
        {name: [record.get(name) for record in records] for name in (*known, *(given - {*known}))},
        len(records),
    )


def write_columns(
    results: Path, kind: str, columns: Mapping[str, object], num_records: int
) -> Path:
    """As ``write_table``, from columns; a plain value stands for a column that repeats it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = [column.name for column in SCHEMAS[kind]]
    for name in columns:
        if name not in known:
            raise SchemaError(f"{kind}: unknown column {name!r}.{near(name, known)}")
    if num_records < 1:
        raise SchemaError(f"{kind}: nothing to write")
    fillers = {"schema_version": SCHEMA_VERSION, "written_at": datetime.now(UTC)}
    arrays = []
    for column in SCHEMAS[kind]:
        given: Any = columns.get(column.name)
        if isinstance(given, str) or not hasattr(given, "__len__"):
            given = [given] * num_records
        if column.name in fillers:
            filler = fillers[column.name]
            given = [filler if value is None else value for value in given]
        arrays.append(array(kind, column, given))
    schema = arrow_schema(kind)
    target = fresh_path(results / kind)
    with renamed_when_done(target) as scratch:
        # Most files hold one cell: without statistics their footer shrinks by a third.
        pq.write_table(
            pa.table(arrays, schema=schema),
            scratch,
            compression="zstd",
            write_statistics=num_records > 5000,
        )
    return target


def write_grid(
    results: Path,
    name: str,
    grid_hash: str,
    cells: Sequence[Mapping[str, object]],
    classes: int | None = None,
) -> Path:
    """Write ``grid.json``: the planned cells, in file order, with the columns of CELL.

    A board takes its order from here, knows from here which cells are missing, and from the number
    of ``classes`` how low their accuracy may be.
    """
    required = [column.name for column in CELL if column.required]
    for cell in cells:
        lacking = [column for column in required if cell.get(column) is None]
        if lacking:
            raise SchemaError(f"grid {name}: cell {cell.get('cell')} lacks {', '.join(lacking)}")
    planned = [{column.name: cell.get(column.name) for column in CELL} for cell in cells]
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "hash": grid_hash,
        "planned": len(planned),
        "classes": classes,
        "cells": planned,
    }
    results.mkdir(parents=True, exist_ok=True)
    target = results / "grid.json"
    with renamed_when_done(target) as scratch:
        scratch.write_text(json.dumps(document, indent=0, allow_nan=False), encoding="utf-8")
    return target
