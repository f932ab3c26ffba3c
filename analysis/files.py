"""Which files of a results directory are its data: whole, ours, of the right types, in no other.

One bad file must not take a board down: it is named, and the board goes on without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grid.schema.arrow import KEYS, KIND_KEY, REPLACES_KEY, VERSION_KEY
from grid.schema.columns import SCHEMA_VERSION, SCHEMAS, Column
from grid.schema.errors import ResultsError, SchemaError

Query = Callable[..., list[tuple[Any, ...]]]
"""Runs SQL of ours, with values for its question marks."""
INTEGERS = {
    *("TINYINT", "SMALLINT", "INTEGER", "BIGINT"),
    *("UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"),
}
IN_FILES: Mapping[str, set[str]] = {
    "string": {"VARCHAR"},
    "strings": {"VARCHAR[]"},
    "bool": {"BOOLEAN"},
    **dict.fromkeys(("int16", "int32", "int64"), INTEGERS),
    "float64": {"DOUBLE", "FLOAT", *INTEGERS},
    "timestamp": {"TIMESTAMP", "TIMESTAMP WITH TIME ZONE"},
    "binary": {"BLOB"},
}
"""What a column may be in a file, as DuckDB names it."""
FINITE = ("value", "low", "high", "clean_victim", "init_model")
ARE_FINITE = " AND ".join(f"coalesce(isfinite({name}), true)" for name in FINITE)
"""Of a row, as a condition: whether every number could have been written by us."""


class FilesChanged(ResultsError):
    """What was to be read is not what there is: open again. ``damaged`` are files to leave out,
    each with what is wrong with it; without any, small files were put into one meanwhile."""

    def __init__(self, text: str, damaged: Mapping[Path, str] | None = None) -> None:
        super().__init__(text)
        self.damaged = dict(damaged or {})


def listed(folder: Path) -> list[Path]:
    """Finished files of a kind, oldest name first; scratch names start with a dot.

    Listed until two listings agree: one that runs during a merge may miss both the merged file,
    which came too late for it, and the small ones, which went too early.
    """
    found: list[Path] = []
    for _ in range(20):
        before = found
        found = sorted(path for path in folder.glob("*.parquet") if path.name[0] != ".")
        if found == before:
            break
    return found


def readable(
    query: Query, kind: str, files: list[Path], known: Mapping[Path, str]
) -> tuple[list[Path], list[str]]:
    """The files that are whole and ours and in no other, and a line about each that is not.

    ``known`` are those that turned out to be damaged before.
    """
    faults = {path: known[path] for path in files if path in known}
    marks: dict[Path, dict[str, str]] = {path: {} for path in files if path not in known}
    sql = (
        "SELECT file_name, key::VARCHAR, value::VARCHAR FROM parquet_kv_metadata(?) "
        "WHERE key::VARCHAR IN (?, ?, ?)"
    )
    for path, key, value in _of_each(
        query, sql, list(marks), faults, KIND_KEY, VERSION_KEY, REPLACES_KEY
    ):
        marks[path][key] = value
    kept = []
    for path in (path for path in marks if path not in faults):
        version = marks[path].get(VERSION_KEY, "")
        if version.isdigit() and int(version) > SCHEMA_VERSION:
            raise SchemaError(
                f"{path} was written with results schema {version}; this backdoor-grid reads "
                f"up to {SCHEMA_VERSION}. Install the newer backdoor-grid that wrote it."
            )
        if marks[path].get(KIND_KEY) == kind and version.isdigit():
            kept.append(path)
        else:
            faults[path] = f"not a {kind} file of backdoor-grid"
    faults |= _of_other_types(query, kept, SCHEMAS[kind], faults)
    kept = [path for path in kept if path not in faults]
    replaced = {n for path in kept for n in marks[path].get(REPLACES_KEY, "").split("/")}
    told = [f"{path}: skipped, {fault}" for path, fault in sorted(faults.items())]
    return [path for path in kept if path.name not in replaced], told


def _of_other_types(
    query: Query, files: list[Path], columns: Iterable[Column], faults: dict[Path, str]
) -> dict[Path, str]:
    """Files whose columns are not what their mark promises."""
    types = {column.name: column.type for column in columns}
    kinds = list({(name, allowed) for name, t in types.items() for allowed in IN_FILES[t]})
    keys = [name for name in KEYS if name in types]
    good = ", ".join(f"({quoted(name)}, {quoted(allowed)})" for name, allowed in sorted(kinds))
    # One line per file with a fault, as there may be ten thousand without.
    sql = (
        "SELECT * FROM (SELECT file_name, "  # noqa: S608
        f"count(DISTINCT name) FILTER (name IN ({', '.join(map(quoted, keys))})) AS has, "
        "list(name || ' is ' || duckdb_type) FILTER ("
        f"name IN ({', '.join(map(quoted, types))}) AND (name, duckdb_type) NOT IN ({good})"
        f") AS odd FROM parquet_schema(?) GROUP BY 1) WHERE odd IS NOT NULL OR has < {len(keys)}"
    )
    found: dict[Path, str] = {}
    for path, _, odd in _of_each(query, sql, files, faults):
        lacks = f"lacks one of the columns {', '.join(keys)}"
        found[path] = f"its column {odd[0]}" if odd else lacks
    return found


def not_finite(query: Query, files: list[Path]) -> list[str]:
    """A line about each file of rows that has numbers which none of ours can be."""
    if not files:
        return []
    nulls = ", ".join(f"NULL::DOUBLE AS {name}" for name in FINITE)
    found = query(
        f"SELECT filename, count(*) FROM (SELECT {nulls}, NULL::VARCHAR AS filename WHERE false "  # noqa: S608
        "UNION ALL BY NAME SELECT * FROM read_parquet(?, union_by_name = true, filename = true)) "
        f"WHERE NOT ({ARE_FINITE}) GROUP BY 1 ORDER BY 1",
        [literal(path) for path in files],
    )
    return [f"{name}: {n} rows left out, their numbers are not finite" for name, n in found]


def damaged(query: Query, files: list[Path]) -> dict[Path, str]:
    """Files whose footers are whole and whose data cannot be read, each with the reason."""
    faults: dict[Path, str] = {}
    sql = "SELECT '', max(hash(one)) FROM read_parquet(?, union_by_name = true) AS one"
    list(_of_each(query, sql, files, faults))
    return faults


def _of_each(
    query: Query, sql: str, files: list[Path], faults: dict[Path, str], *more: object
) -> Iterator[tuple[Any, ...]]:
    """What a query says of files; a list with a broken one is halved until that is found."""
    import duckdb

    if not files:
        return
    try:
        found = query(sql, [literal(path) for path in files], *more)
    except duckdb.Error as error:
        if len(files) == 1 and not files[0].exists() and not files[0].is_symlink():
            raise FilesChanged(f"{files[0]} was merged into another file") from error
        if len(files) == 1:
            faults[files[0]] = f"cannot be read ({str(error).splitlines()[0]})"
            return
        middle = len(files) // 2
        yield from _of_each(query, sql, files[:middle], faults, *more)
        yield from _of_each(query, sql, files[middle:], faults, *more)
    else:
        yield from ((Path(row[0]), *row[1:]) for row in found)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def literal(path: Path) -> str:
    """The path with its wildcard characters meaning themselves."""
    return re.sub(r"[*?\[]", r"[\g<0>]", str(path))
