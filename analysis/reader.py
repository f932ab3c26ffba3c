"""Opens a results directory as SQL: an in-memory DuckDB over its Parquet files, locked down.

Reads while a grid is still writing: the files present at the moment of opening are the data.
A file that cannot be read, or is not ours, is skipped and named in ``Tables.warnings``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from analysis.stats import t_quantile
from grid.schema import (
    CELL,
    KIND_KEY,
    REPLACES_KEY,
    SCHEMA_VERSION,
    SCHEMAS,
    VERSION_KEY,
    Column,
    ResultsError,
    SchemaError,
)

if TYPE_CHECKING:
    import duckdb

VIEWS = ("newest", "cells", "intervals", "board", "completeness", "trials", "published")
QUERIED = (
    *("rows", "newest", "cells", "outcomes", "board", "completeness", "samples", "stages"),
    "newest_samples",
    *("attempts", "trials", "newest_trials", "curves", "fits", "rocs", "features", "pictures"),
    *("imported", "published"),
)
"""What a user's SQL may read."""
SQL_TYPES = {
    "string": "VARCHAR",
    "strings": "VARCHAR[]",
    "bool": "BOOLEAN",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "timestamp": "TIMESTAMP",
    "binary": "BLOB",
}
MAX_SEEDS_TABLE = 30
"""Beyond 31 seeds the board uses t of 30 degrees of freedom: wider by under 5 %."""

# A SELECT may hide a writing statement (WITH x AS (COPY ...)), so the syntax tree is held to
# what only reads. Table functions reach files and settings; these three do not.
READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
TABLE_FUNCTIONS = {"range", "generate_series", "unnest"}


class Answer(NamedTuple):
    """A query's result: column names and rows in order."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


class FilesChanged(ResultsError):
    """Small files were put into one while they were being read: open again."""


class GridInfo(NamedTuple):
    """What ``grid.json`` says: name, hash, how many cells are planned and how many classes there
    are, where known."""

    name: str | None
    hash: str | None
    planned: int | None
    classes: int | None = None


class Tables:
    """A results directory as DuckDB views: rows, newest, cells, board, ..., trials, curves."""

    def __init__(self, directory: Path, of: str = "rows") -> None:
        """``of`` says what has to be there: a grid's ``rows`` or a campaign's ``trials``."""
        self.directory = directory.resolve()
        self.warnings: list[str] = []
        self._of = of
        files = {kind: self._files(kind) for kind in SCHEMAS}
        self._read: list[Path] = []
        if of == "trials" and not files["trials"]:
            raise ResultsError(_no_trials(directory))
        if of == "rows" and not files["rows"] and not (self.directory / "grid.json").is_file():
            raise ResultsError(_nothing_here(directory))
        self._connection = _connect()
        # Many small files: keep their footers, not their bytes, between queries.
        self._run("SET parquet_metadata_cache = true")
        self._run("SET enable_external_file_cache = false")
        readable = {kind: self._readable(kind, files[kind]) for kind in SCHEMAS}
        self._read = [path for kind in SCHEMAS for path in readable[kind]]
        for kind, columns in SCHEMAS.items():
            self._create_view(kind, readable[kind], columns)
        self.grid = self._load_grid()
        self._run("CREATE TABLE t95 (df BIGINT, t DOUBLE)")
        quantiles = [(df, t_quantile(0.975, df)) for df in range(1, MAX_SEEDS_TABLE + 1)]
        values = ", ".join(f"({df}, {t!r})" for df, t in quantiles)
        self._run(f"INSERT INTO t95 VALUES {values}")  # noqa: S608
        for view in VIEWS:
            path = resources.files("analysis") / "views" / f"{view}.sql"
            self._run(path.read_text(encoding="utf-8"))
        self._lock()

    def query(self, sql: str, *values: object) -> Answer:
        """Run SQL of ours, with ``?`` filled from ``values``."""
        cursor = self._run(sql, values)
        return Answer([column[0] for column in cursor.description or ()], cursor.fetchall())

    def sql(self, text: str) -> Answer:
        """Run one SELECT of the user's over the views; it can read nothing else, or write."""
        tree = json.loads(self.query("SELECT json_serialize_sql(?)", text).rows[0][0])
        if tree["error"]:
            raise ResultsError(
                f"Cannot run this SQL: {tree.get('error_message', 'not understood')}\n"
                f"One SELECT statement over {', '.join(QUERIED[:-1])} or {QUERIED[-1]} is allowed."
            )
        for refused in _refused(tree["statements"]):
            raise ResultsError(
                f"This SQL is refused because of {refused}: queries here only read the views "
                f"{', '.join(QUERIED)}."
            )
        if len(tree["statements"]) != 1:
            raise ResultsError(f"One SELECT at a time; found {len(tree['statements'])}.")
        return self.query(text)

    def close(self) -> None:
        """Give the connection's memory back."""
        self._connection.close()

    def _run(self, sql: str, values: Sequence[object] = ()) -> duckdb.DuckDBPyConnection:
        import duckdb

        try:
            return self._connection.execute(sql, values)
        except duckdb.Error as error:
            if not all(path.exists() for path in self._read):
                raise FilesChanged(f"{self.directory}: files were merged meanwhile") from error
            raise ResultsError(f"{self.directory}: {error}") from error

    def _files(self, kind: str) -> list[Path]:
        """Finished files of a kind, oldest name first; scratch names start with a dot.

        Listed until two listings agree: one that runs during a merge may miss both the merged
        file, which came too late for it, and the small ones, which went too early.
        """
        folder = self.directory / kind
        listed: list[Path] = []
        for _ in range(20):
            before = listed
            listed = sorted(path for path in folder.glob("*.parquet") if path.name[0] != ".")
            if listed == before:
                break
        return listed

    def _readable(self, kind: str, files: list[Path]) -> list[Path]:
        """The files that are whole and ours and in no other; the warnings name what is foreign."""
        marks: dict[Path, dict[str, str]] = {path: {} for path in files}
        for path, key, value in self._metadata(files):
            marks[path][key] = value
        kept = []
        for path in files:
            version = marks[path].get(VERSION_KEY, "")
            if version.isdigit() and int(version) > SCHEMA_VERSION:
                raise SchemaError(
                    f"{path} was written with results schema {version}; this backdoor-grid reads "
                    f"up to {SCHEMA_VERSION}. Install the newer backdoor-grid that wrote it."
                )
            if marks[path].get(KIND_KEY) == kind and version.isdigit():
                kept.append(path)
            elif not any(str(path) in warning for warning in self.warnings):
                self.warnings.append(f"{path}: skipped, not a {kind} file of backdoor-grid")
        replaced = {n for path in kept for n in marks[path].get(REPLACES_KEY, "").split("/")}
        return [path for path in kept if path.name not in replaced]

    def _metadata(self, files: list[Path]) -> Iterator[tuple[Path, str, str]]:
        """Our marks in the footers; a list with a broken file is halved until it is found."""
        import duckdb

        if not files:
            return
        try:
            found = self._connection.execute(
                "SELECT file_name, key::VARCHAR, value::VARCHAR FROM parquet_kv_metadata(?) "
                "WHERE key::VARCHAR IN (?, ?, ?)",
                [[_literal(path) for path in files], KIND_KEY, VERSION_KEY, REPLACES_KEY],
            ).fetchall()
        except duckdb.Error as error:
            if len(files) == 1 and not files[0].exists():
                raise FilesChanged(f"{files[0]} was merged into another file") from error
            if len(files) == 1:
                reason = str(error).splitlines()[0]
                self.warnings.append(f"{files[0]}: skipped, cannot be read ({reason})")
                return
            middle = len(files) // 2
            yield from self._metadata(files[:middle])
            yield from self._metadata(files[middle:])
        else:
            yield from ((Path(name), key, value) for name, key, value in found)

    def _create_view(self, kind: str, files: list[Path], columns: Sequence[Column]) -> None:
        """A view of the files as they are now, or of nothing with the right columns."""
        nulls = ", ".join(f'NULL::{SQL_TYPES[c.type]} AS "{c.name}"' for c in columns)
        empty = f"SELECT {nulls} WHERE false"
        if files:
            listed = ", ".join(_quoted(_literal(path)) for path in files)
            # Plain UTC timestamps: handing zoned ones to Python would need another package.
            naive = ", ".join(
                f"make_timestamp(epoch_us({c.name})) AS {c.name}"
                for c in columns
                if c.type == "timestamp"
            )
            replaced = f"* REPLACE ({naive})" if naive else "*"
            source = f"SELECT {replaced} FROM read_parquet([{listed}], union_by_name = true)"  # noqa: S608
            # Files of before a column was added hold null there.
            self._run(f"CREATE VIEW {kind} AS {empty} UNION ALL BY NAME {source}")
        else:
            self._run(f"CREATE VIEW {kind} AS {empty}")

    def _load_grid(self) -> GridInfo:
        """Table ``planned`` from grid.json, with every cell's position in the grid file."""
        fields = ", ".join(f'"{column.name}" {SQL_TYPES[column.type]}' for column in CELL)
        self._run(f"CREATE TABLE planned ({fields}, position BIGINT)")
        path = self.directory / "grid.json"
        if not path.is_file():
            if self._of == "rows":
                self.warnings.append(f"{path}: not there, so missing cells cannot be told")
            return GridInfo(None, None, None)
        layout = (
            "{schema_version: 'BIGINT', name: 'VARCHAR', hash: 'VARCHAR', planned: 'BIGINT', "
            f"classes: 'BIGINT', cells: 'STRUCT({fields})[]'}}"
        )
        source = (
            f"read_json({_quoted(_literal(path))}, format = 'unstructured', columns = {layout}, "
            f"maximum_object_size = {path.stat().st_size + 1})"
        )
        self._run(f"CREATE TEMP TABLE grid_file AS FROM {source}")
        version, name, digest, planned, classes = self.query(
            "SELECT schema_version, name, hash, planned, classes FROM grid_file"
        ).rows[0]
        if version is not None and version > SCHEMA_VERSION:
            raise SchemaError(
                f"{path} was written with results schema {version}; this backdoor-grid reads up "
                f"to {SCHEMA_VERSION}. Install the newer backdoor-grid that wrote it."
            )
        self._run(
            "INSERT INTO planned SELECT entry.*, position FROM (SELECT unnest(cells) AS entry, "
            "generate_subscripts(cells, 1) AS position FROM grid_file)"
        )
        self._run("DROP TABLE grid_file")
        return GridInfo(name, digest, planned, classes)

    def _lock(self) -> None:
        """From here on: this directory only, and no setting can be changed back."""
        # The lock compares text, so a name with wildcards has to be let through as written.
        names = {str(self.directory), _literal(self.directory)}
        self._run(f"SET allowed_directories = [{', '.join(map(_quoted, names))}]")
        self._run("SET enable_external_access = false")
        self._run("SET lock_configuration = true")


T = TypeVar("T")
PATIENCE_SECONDS = 20.0
"""How long to try to read between the merges of a very busy writer."""


def read_tables(directory: Path, read: Callable[[Tables], T], of: str = "rows") -> T:
    """What ``read`` makes of a results directory, also while a grid is still writing there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            with closing(Tables(directory, of)) as tables:
                return read(tables)
        except FilesChanged:
            continue
    raise ResultsError(f"{directory}: files keep changing while they are read; try again.")


def _connect() -> duckdb.DuckDBPyConnection:
    import duckdb

    return duckdb.connect(
        ":memory:",
        config={
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "python_enable_replacements": False,
            "temp_directory": "",
        },
    )


def _refused(node: object) -> Iterator[str]:
    """What in a syntax tree does more than read the views."""
    if isinstance(node, list):
        for child in node:
            yield from _refused(child)
    elif isinstance(node, dict):
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in READING_NODES:
            yield kind.removesuffix("_NODE").replace("_", " ").lower()
        if kind == "TABLE_FUNCTION":
            name = node.get("function", {}).get("function_name", "an unnamed table function")
            if name not in TABLE_FUNCTIONS:
                yield f"{name}()"
        for child in node.values():
            yield from _refused(child)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _literal(path: Path) -> str:
    """The path with its wildcard characters meaning themselves."""
    return re.sub(r"[*?\[]", r"[\g<0>]", str(path))


def _nothing_here(directory: Path) -> str:
    if not directory.is_dir():
        return f"No results at {directory}: there is no such directory. Run a grid with --out."
    if any((directory / "trials").glob("*.parquet")):
        return (
            f"No results of a grid in {directory}, but trials of a campaign: "
            f"`grid leaderboard --campaign {directory}` shows them."
        )
    return (
        f"No results in {directory}: neither grid.json nor rows/*.parquet. Give the directory that "
        "`grid run` printed, such as runs/demo."
    )


def _no_trials(directory: Path) -> str:
    if not directory.is_dir():
        found = "there is no such directory"
    elif (directory / "campaign.json").is_file():
        found = "campaign.json is there, but no trials/*.parquet: none has been recorded yet"
    else:
        found = "no trials/*.parquet"
    beside = sorted(path.parent for path in directory.parent.glob("*/trials") if path.is_dir())
    known = f" Campaigns beside it: {', '.join(path.name for path in beside)}." if beside else ""
    return (
        f"No trials of a campaign in {directory}: {found}. Give the directory that `grid tune` "
        f"printed, or run `grid tune CAMPAIGN.yaml`.{known}"
    )
