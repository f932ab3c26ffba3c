"""From a file of somebody else's numbers to Parquet in ``imported/`` of a results directory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

from analysis.imports.backdoorbench import is_backdoorbench, read_backdoorbench
from analysis.imports.figure import Known, checked
from analysis.imports.reading import records_of
from analysis.imports.table import is_table, read_table
from analysis.imports.told import bare_rates, understood
from grid.schema.errors import SchemaError, no_such
from grid.schema.writing import write_table

KINDS = ("table", "backdoorbench")
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
WHO = ("schema_version", "written_at", "imported_by", "source_file")
MOST_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What an import did: the file it wrote, or None where the same was there already."""

    name: str
    kind: str
    numbers: int
    as_written: list[str]
    path: Path | None
    replaced: bool
    understood: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


def import_file(
    path: Path,
    name: str,
    out: Path,
    known: Known,
    *,
    by: str,
    kind: str | None = None,
    about: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Told:
    """Read, check and write a file's numbers; all of them or none."""
    if not NAME.fullmatch(name):
        raise SchemaError(
            f"--as {name!r}: a name is letters and digits, and . _ - inside it, 64 at most"
        )
    content, text = _text(path)
    lines = text.splitlines(keepends=True)
    kind = kind or _kind(lines, path.name)
    if kind not in KINDS:
        raise no_such("kind", kind, KINDS, " of file")
    if kind == "table":
        if about:
            raise SchemaError("--about is for backdoorbench: a table says everything itself")
        found = read_table(lines, path.name)
    else:
        found = read_backdoorbench(lines, about or {}, path.name)
    shared: dict[str, Any] = {
        "import_name": name,
        "provenance": "imported",
        "kind": kind,
        "source_file": path.name,
        "source_sha256": hashlib.sha256(content).hexdigest(),
        "imported_by": by,
    }
    raws = list(found)
    records = [{**shared, **record} for record in checked(raws, known, path.name)]
    before = [record for record in records_of(out) if record["import_name"] == name]
    told = Told(
        name=name,
        kind=kind,
        numbers=len(records),
        as_written=sorted(
            {r[n] for r in records for n in ("attack", "defense", "metric") if r[f"{n}_as_written"]}
        ),
        path=None,
        replaced=bool(before),
        understood=understood(records),
        cautions=bare_rates(raws),
    )
    if _same(before, records):
        return told
    if before and not replace:
        raise SchemaError(
            f"{out}: there is an import {name!r} already, of {before[0]['source_file']} on"
            f" {before[0]['written_at']:%Y-%m-%d}, and this is another one. Give another name with"
            " --as, or --replace it."
        )
    return replaced(told, path=write_table(out, "imported", records))


def _same(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> bool:
    """Whether two imports hold the same numbers of the same bytes, whoever made them and when."""

    def plain(records: list[dict[str, Any]]) -> list[tuple[tuple[str, Any], ...]]:
        kept = [{n: v for n, v in r.items() if n not in WHO} for r in records]
        return sorted((tuple(sorted(r.items(), key=lambda x: x[0])) for r in kept), key=repr)

    return plain(before) == plain(now)


def _text(path: Path) -> tuple[bytes, str]:
    """A file's bytes and text, or an error that says what it is instead."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SchemaError(f"{path}: more than {MOST_BYTES >> 20} MiB; that is no table")
        content = path.read_bytes()
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: not text in UTF-8 ({error}); save it as CSV") from error
    if not text.strip():
        raise SchemaError(f"{path}: the file is empty")
    return content, text


def _kind(lines: list[str], where: str) -> str:
    """What a file is, by its first line."""
    first = lines[0].strip()
    separator = "|" if first.startswith("|") else ","
    header = [cell.strip(' "') for cell in first.strip("|").split(separator)]
    if is_table(header):
        return "table"
    if is_backdoorbench(header):
        return "backdoorbench"
    hint = " Fields are separated by commas." if ";" in first or "\t" in first else ""
    raise SchemaError(
        f"{where}: line 1 tells neither a table nor BackdoorBench's results: {first[:80]!r}.{hint}"
        f" Give --kind, one of {', '.join(KINDS)}, to hear what is missing."
    )
