"""Opens a results directory as SQL: an in-memory DuckDB over its Parquet files, locked down.

Reads while a grid is still writing: the files present at the moment of opening are the data.
A file that cannot be read, or is not ours, is skipped and named in ``Tables.warnings``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from analysis.amiss import amiss, asks_for_tables, misunderstood, tables_in
from analysis.files import (
    ARE_FINITE,
    FilesChanged,
    damaged,
    listed,
    literal,
    not_finite,
    quoted,
    readable,
)
from analysis.permitted import Permitted
from analysis.stats import t_quantile
from analysis.text import printable
from grid.schema.columns import CELL, SCHEMA_VERSION, SCHEMAS, Column
from grid.schema.errors import AskedError, ResultsError, SchemaError

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
MOST_IN_MEMORY = 1_000_000
"""So many rows of a table may be kept in memory: some hundred MB."""
MAX_SEEDS_TABLE = 30
"""Beyond 31 seeds the board uses t of 30 degrees of freedom: wider by under 5 %."""


class Answer(NamedTuple):
    """A query's result: column names and rows in order."""

    columns: list[str]
    rows: list[tuple[Any, ...]]


class GridInfo(NamedTuple):
    """What ``grid.json`` says: name, hash, how many cells are planned and how many classes there
    are, where known."""

    name: str | None
    hash: str | None
    planned: int | None
    classes: int | None = None


class Tables:
    """A results directory as DuckDB views: rows, newest, cells, board, ..., trials, curves."""

    def __init__(
        self,
        directory: Path,
        of: str = "rows",
        without: Mapping[Path, str] | None = None,
        *,
        in_memory: bool = False,
    ) -> None:
        """``of`` says what has to be there: a grid's ``rows`` or a campaign's ``trials``;
        ``without`` are damaged files to leave out, as `FilesChanged` told them. What is small is
        read at once if it is to be ``in_memory``: a busy writer can take no file away then."""
        self.directory = directory.resolve()
        self.warnings: list[str] = []
        self._of = of
        found = {kind: listed(self.directory / kind) for kind in SCHEMAS}
        self._read: list[Path] = []
        if of == "trials" and not found["trials"]:
            raise AskedError(_no_trials(directory))
        if of == "rows" and not found["rows"] and not (self.directory / "grid.json").is_file():
            raise AskedError(_nothing_here(directory))
        self._connection = _connect()
        # Many small files: keep their footers, not their bytes, between queries.
        self._run("SET parquet_metadata_cache = true")
        self._run("SET enable_external_file_cache = false")
        files: dict[str, list[Path]] = {}
        for kind in SCHEMAS:
            files[kind], told = readable(self._ask, kind, found[kind], without or {})
            self.warnings += map(printable, told)
        self._read = [path for kind in SCHEMAS for path in files[kind]]
        odd = not_finite(self._rows, files["rows"])
        self.warnings += map(printable, odd)
        for kind, columns in SCHEMAS.items():
            kept = ARE_FINITE if odd and kind == "rows" else "true"
            self._create_view(kind, files[kind], columns, kept)
            if in_memory and self._hold(kind):
                self._read = [path for path in self._read if path.parent.name != kind]
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
        return self._run(sql, values)

    def sql(self, text: str) -> Answer:
        """Run one SELECT of the user's over the views; it can read nothing else, or write."""
        tree = json.loads(self.query("SELECT json_serialize_sql(?)", text).rows[0][0])
        if tree["error"]:
            raise AskedError(
                f"{misunderstood(tree.get('error_message', 'not understood'), text)}\n"
                f"One SELECT statement over {', '.join(QUERIED[:-1])} or {QUERIED[-1]} is allowed."
            )
        if asks_for_tables(tree["statements"]):
            return Answer(["view"], [(view,) for view in QUERIED])
        for refused in Permitted(self._rows, QUERIED).refused(tree["statements"]):
            raise AskedError(
                f"This SQL is refused because of {refused}: queries here only read the views "
                f"{', '.join(QUERIED)}."
            )
        if len(tree["statements"]) != 1:
            raise AskedError(f"One SELECT at a time; found {len(tree['statements'])}.")
        try:
            return self.query(text)
        except FilesChanged:
            raise
        except ResultsError as error:
            told, read = str(error.__cause__), tables_in(tree["statements"])
            raise AskedError(amiss(told, read, self._columns())) from error

    def _columns(self) -> Mapping[str, Sequence[str]]:
        """The columns of every view that a user may read."""
        found: dict[str, list[str]] = {view: [] for view in QUERIED}
        for view, column in self._ask("SELECT table_name, column_name FROM duckdb_columns()"):
            if view in found:
                found[view].append(column)
        return found

    def _ask(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """SQL of ours whose errors the caller looks into."""
        return self._connection.execute(sql, values).fetchall()

    def _rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return self._run(sql, values).rows

    def close(self) -> None:
        """Give the connection's memory back."""
        self._connection.close()

    def _run(self, sql: str, values: Sequence[object] = ()) -> Answer:
        import duckdb

        try:
            cursor = self._connection.execute(sql, values)
            return Answer([column[0] for column in cursor.description or ()], cursor.fetchall())
        except duckdb.Error as error:
            if not all(path.exists() for path in self._read):
                raise FilesChanged(f"{self.directory}: files were merged meanwhile") from error
            # What a text says amiss is no file's fault, and to look into all of them takes long.
            of_text = (
                *(duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException),
                *(duckdb.PermissionException, duckdb.ConversionException),
            )
            if not isinstance(error, of_text) and (bad := self._damaged()):
                raise FilesChanged(f"{self.directory}: damaged files", bad) from error
            raise ResultsError(f"{self.directory}: {error}") from error

    def _damaged(self) -> dict[Path, str]:
        """Files that cannot be read to their end, asked of a connection that no error has hit."""
        with closing(_connect()) as fresh:
            return damaged(lambda sql, *v: fresh.execute(sql, v).fetchall(), self._read)

    def _create_view(
        self, kind: str, files: list[Path], columns: Sequence[Column], kept: str
    ) -> None:
        """A view of what is kept of the files as they are now, or of nothing with the right
        columns."""
        nulls = ", ".join(f'NULL::{SQL_TYPES[c.type]} AS "{c.name}"' for c in columns)
        empty = f"SELECT {nulls} WHERE false"
        if files:
            paths = ", ".join(quoted(literal(path)) for path in files)
            # Plain UTC timestamps: handing zoned ones to Python would need another package.
            naive = ", ".join(
                f"make_timestamp(epoch_us({c.name})) AS {c.name}"
                for c in columns
                if c.type == "timestamp"
            )
            replaced = f"* REPLACE ({naive})" if naive else "*"
            source = f"SELECT {replaced} FROM read_parquet([{paths}], union_by_name = true)"  # noqa: S608
            # Files of before a column was added hold null there.
            body = f"{empty} UNION ALL BY NAME {source}"
            if kept != "true":
                body = f"SELECT * FROM ({body}) WHERE {kept}"  # noqa: S608
            self._run(f"CREATE VIEW {kind} AS {body}")
        else:
            self._run(f"CREATE VIEW {kind} AS {empty}")

    def _hold(self, kind: str) -> bool:
        """Put a table in the place of a view, unless it is too large."""
        if self._rows(f"SELECT count(*) FROM {kind}")[0][0] > MOST_IN_MEMORY:  # noqa: S608
            return False
        self._run(f"CREATE TABLE held AS FROM {kind}")
        self._run(f"DROP VIEW {kind}")
        self._run(f"ALTER TABLE held RENAME TO {kind}")
        return True

    def _load_grid(self) -> GridInfo:
        """Table ``planned`` from grid.json, with every cell's position in the grid file."""
        import duckdb

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
            f"read_json({quoted(literal(path))}, format = 'unstructured', columns = {layout}, "
            f"maximum_object_size = {path.stat().st_size + 1})"
        )
        try:
            self._ask(f"CREATE TEMP TABLE grid_file AS FROM {source}")
            found = self._ask("SELECT schema_version, name, hash, planned, classes FROM grid_file")
        except duckdb.Error as error:
            return self._no_grid(path, str(error).splitlines()[0])
        if len(found) != 1 or found[0][0] is None:
            return self._no_grid(path, "not one grid with its schema_version")
        ((version, name, digest, planned, classes),) = found
        if version > SCHEMA_VERSION:
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

    def _no_grid(self, path: Path, why: str) -> GridInfo:
        told = f"{path}: skipped, cannot be read, so missing cells cannot be told ({why})"
        self.warnings.append(printable(told))
        return GridInfo(None, None, None)

    def _lock(self) -> None:
        """From here on: the files that were found, and no setting can be changed back."""
        # The lock compares text, so a name with wildcards has to be let through as written.
        names = {name for path in self._read for name in (str(path), literal(path))}
        self._run(f"SET allowed_paths = [{', '.join(map(quoted, names))}]")
        self._run("SET enable_external_access = false")
        self._run("SET lock_configuration = true")


T = TypeVar("T")
PATIENCE_SECONDS = 20.0
"""How long to try to read between the merges of a very busy writer."""


def read_tables(directory: Path, read: Callable[[Tables], T], of: str = "rows") -> T:
    """What ``read`` makes of a results directory, also while a grid is still writing there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    without, in_memory = dict[Path, str](), False
    while time.monotonic() < deadline:
        try:
            with closing(Tables(directory, of, without, in_memory=in_memory)) as tables:
                return read(tables)
        except FilesChanged as changed:
            without |= changed.damaged
            in_memory = True
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
