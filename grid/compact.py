"""Puts the many small files of a results directory into few, while others read and write there.

A run adds a file of stages and attempts every few seconds and one of per-image outcomes per cell;
opening 100,000 files costs a reader minutes. Of every kind, files that are whole, ours and older
than a minute go into one new file, whose footer names them:

    written under a scratch name -> checked -> renamed into place -> the old ones deleted

Whoever sees the new file reads in its footer what not to read any more, so between the rename and
the last deletion nothing is seen twice, and before the rename nothing has changed. Killed anywhere
it loses nothing: the next call deletes what is still there of what has been replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grid.schema.arrow import KIND_KEY, REPLACES_KEY, VERSION_KEY, arrow_schema, mistyped
from grid.schema.columns import KINDS, SCHEMA_VERSION
from grid.schema.errors import ResultsError
from grid.schema.whole import fresh_path, renamed_when_done

if TYPE_CHECKING:
    import pyarrow as pa

SETTLED_SECONDS = 60.0
"""A file this old is not being written, nor about to be merged by the driver that wrote it."""
ABANDONED_SECONDS = 3600.0
"""A scratch name this old is of a process that was killed."""
LARGE_BYTES = 64 << 20
"""A new file ends once it holds this much; a file of half of it is left as it is."""
MOST_FILES = 10_000
"""That many at most go into one, so that the list in its footer stays small."""
GROUP_ROWS = 200_000
# Names that a footer gives back as they are; every writer of ours takes such.
NAME = re.compile(r"[\w.-]+", re.ASCII)

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A file of ours: its size, its rows, and the files whose rows it holds."""

    path: Path
    size: int
    num_rows: int
    is_old: bool
    replaces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compacted:
    """What became of one kind, or would: files and bytes before, new files, bytes after."""

    kind: str
    files: int
    put_together: int
    made: int
    deleted: int
    bytes_before: int
    bytes_after: int


def compact(
    results: Path, *, dry_run: bool = False, step: Step = lambda what: None
) -> list[Compacted]:
    """Compact a results directory, or say what would happen. ``step`` hears of every step."""
    if not any((results / kind).is_dir() for kind in KINDS):
        raise ResultsError(
            f"No results in {results}: none of {', '.join(KINDS)} is there. Give the directory that"
            " `grid run` printed, such as runs/demo."
        )
    with contextlib.ExitStack() as held:
        if not dry_run:
            held.enter_context(_only_one(results))
        return [_compact_kind(results / kind, kind, dry_run, step) for kind in KINDS]


@contextlib.contextmanager
def _only_one(results: Path) -> Iterator[None]:
    """Two compactions at once would put the same rows into two files."""
    with (results / ".compact").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultsError(f"{results} is being compacted by another process") from error
        yield


def _compact_kind(folder: Path, kind: str, dry_run: bool, step: Step) -> Compacted:
    found = list(_ours(folder, kind))
    names = {one.path.name for one in found}
    gone = {name for one in found for name in one.replaces if name in names}
    kept = [one for one in found if one.path.name not in gone]
    batches = _batches([one for one in kept if one.is_old])
    num_put = sum(len(batch) for batch in batches)
    after = sum(one.size for one in kept)
    if not dry_run:
        _sweep(folder)
        # What was replaced goes before its replacement may be replaced itself.
        _delete(folder, sorted(gone), step)
        for batch in batches:
            made = _put_together(folder, kind, batch, step)
            after += made.path.stat().st_size - sum(one.size for one in batch)
            _delete(folder, made.replaces, step)
    return Compacted(
        kind=kind,
        files=len(found),
        put_together=num_put,
        made=len(batches),
        deleted=len(gone) + num_put,
        bytes_before=sum(one.size for one in found),
        bytes_after=after,
    )


def _ours(folder: Path, kind: str) -> Iterator[Found]:
    """Whole files of this schema version, oldest name first; all others are left alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {name.encode(): value for name, value in _marks(kind).items()}
    columns = {column.name for column in KINDS[kind]}
    now = time.time()
    for path in sorted(folder.glob("[!.]*.parquet")):
        if not NAME.fullmatch(path.name):
            continue
        try:
            about = path.stat()
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException):
            continue
        marks = footer.metadata or {}
        is_ours = all(marks.get(name) == value.encode() for name, value in known.items())
        schema = footer.schema.to_arrow_schema()
        if not is_ours or not columns.issuperset(schema.names) or mistyped(schema, kind):
            continue
        replaces = tuple(marks.get(REPLACES_KEY.encode(), b"").decode().split("/"))
        is_old = now - about.st_mtime > SETTLED_SECONDS
        yield Found(path, about.st_size, footer.num_rows, is_old, replaces)


def _marks(kind: str) -> dict[str, str]:
    return {KIND_KEY: kind, VERSION_KEY: str(SCHEMA_VERSION)}


def _batches(found: Sequence[Found]) -> list[list[Found]]:
    """Which files go into which new one. A single file gains nothing."""
    batches: list[list[Found]] = [[]]
    size = 0
    for one in found:
        if one.size >= LARGE_BYTES // 2:
            continue
        if len(batches[-1]) >= MOST_FILES or size + one.size > LARGE_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(one)
        size += one.size
    return [batch for batch in batches if len(batch) > 1]


class Made(NamedTuple):
    """A new file, and the names of those whose rows it holds."""

    path: Path
    replaces: list[str]


def _put_together(folder: Path, kind: str, files: Sequence[Found], step: Step) -> Made:
    """One new file with the rows of ``files`` and their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Of before a column was added a file holds null there, where newer ones may not.
    fields = [column.with_nullable(True) for column in arrow_schema(kind)]
    schema = pa.schema(fields, metadata=_marks(kind))
    made = Made(fresh_path(folder), [])
    with renamed_when_done(made.path) as scratch:
        step(f"{kind}: writing")
        num_read = 0
        with pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
            for group in _groups(files, schema, made.replaces):
                writer.write_table(group)
                num_read += len(group)
            writer.add_key_value_metadata({REPLACES_KEY: "/".join(made.replaces)})
        step(f"{kind}: written")
        if (arrived := pq.read_metadata(scratch).num_rows) != num_read:
            raise ResultsError(
                f"{folder}: {arrived} rows of {num_read} were written; nothing was changed"
            )
    _sync(folder)
    step(f"{kind}: in place")
    return made


def _groups(files: Sequence[Found], schema: pa.Schema, names: list[str]) -> Iterator[pa.Table]:
    """The rows of the files in few groups, with all columns of the schema; adds to ``names``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    gathered, num_rows = list[pa.Table](), 0
    for one in files:
        try:
            table = pq.ParquetFile(one.path).read(use_threads=False)
        except (OSError, pa.ArrowException):
            continue  # merged by the driver into a file of its own, or damaged: `grid check` says
        names.append(one.path.name)
        gathered.append(pa.table([_column(table, field) for field in schema], schema=schema))
        num_rows += len(table)
        if num_rows >= GROUP_ROWS:
            yield pa.concat_tables(gathered).combine_chunks()
            gathered, num_rows = [], 0
    if gathered:
        yield pa.concat_tables(gathered).combine_chunks()


def _column(table: pa.Table, wanted: pa.Field) -> Any:
    import pyarrow as pa

    if wanted.name in table.column_names:
        return table[wanted.name].cast(wanted.type)
    return pa.nulls(len(table), wanted.type)


def _delete(folder: Path, names: Sequence[str], step: Step) -> None:
    for name in names:
        step(f"{folder.name}: deleting {name}")
        (folder / name).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what a process that was killed left under a scratch name."""
    for path in folder.glob(".*.parquet.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def _sync(folder: Path) -> None:
    """The new name is on the disk before old ones go."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def words(found: Sequence[Compacted], dry_run: bool) -> list[str]:
    """What was done, or would be, a line per kind."""
    lines = []
    for one in found:
        did = "would become" if dry_run else "became"
        told = f"{one.put_together} of {one.files} files {did} {one.made}"
        left = one.deleted - one.put_together
        if left:
            told += f", {left} left over from before {'would go' if dry_run else 'went'}"
        if not dry_run:
            told += f"; {one.bytes_before / 1e6:.1f} MB became {one.bytes_after / 1e6:.1f}"
        lines.append(f"{one.kind:9} {told}")
    return lines
