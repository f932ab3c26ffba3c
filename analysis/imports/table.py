"""A table of a paper, typed in as CSV: a line per number, and every line says all it must."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from analysis.imports.figure import NAMED, Raw, from_mapping
from grid.schema.errors import SchemaError
from victims.errors import near

REQUIRED = (
    *("paper", "table", "attack", "defense", "dataset", "model", "metric", "variant"),
    *("value", "unit"),
)
EITHER = (("arxiv", "doi"), ("rate", "count"))
OPTIONAL = ("geometry", "relation", "setting", "as_written")
COLUMNS = (*REQUIRED, *(name for pair in EITHER for name in pair), *OPTIONAL)


def is_table(header: Sequence[str]) -> bool:
    """Whether a file's first line is meant as one of ours."""
    return len({*header} & {*REQUIRED}) >= len(REQUIRED) // 2


def read_table(lines: Sequence[str], where: str) -> Iterator[Raw]:
    """The numbers of the file, with the lines they stand in."""
    reader = csv.DictReader(lines, strict=True, skipinitialspace=True)
    try:
        header = list(reader.fieldnames or [])
        _check_header(header, where)
        for row in reader:
            if None in row or None in row.values():
                raise SchemaError(
                    f"{where}: line {reader.line_num}: {len(header)} fields are wanted, found"
                    f" {'more' if None in row else 'fewer'}; a field with a comma needs quotes"
                )
            texts = {name: value.strip() for name, value in row.items()}
            yield from_mapping(reader.line_num, texts, _foreign(texts, where, reader.line_num))
    except csv.Error as error:
        raise SchemaError(f"{where}: line {reader.line_num}: {error}") from error


def _check_header(header: Sequence[str], where: str) -> None:
    faults = [f"no column {name!r}" for name in REQUIRED if name not in header]
    faults += [
        f"neither a column {a!r} nor {b!r}" for a, b in EITHER if not {a, b} & {*header}
    ]  # fmt: skip
    faults += [f"unknown column {n!r}.{near(n, COLUMNS)}" for n in header if n not in COLUMNS]
    faults += [f"column {n!r} twice" for n in dict.fromkeys(header) if header.count(n) > 1]
    if faults:
        told = "; ".join(faults) + ("" if faults[-1].endswith("?") else ".")
        raise SchemaError(
            f"{where}: line 1: {told} Wanted: {', '.join(REQUIRED)}, arxiv or doi,"
            f" rate or count; allowed besides: {', '.join(OPTIONAL)}."
        )


def _foreign(row: dict[str, str], where: str, line: int) -> frozenset[str]:
    """The columns whose names a line declares to be the paper's own."""
    words = row.get("as_written", "").split()
    for word in words:
        if word not in NAMED:
            raise SchemaError(
                f"{where}: line {line}: as_written names columns, found {word!r}."
                f"{near(word, NAMED)} Allowed: {' '.join(NAMED)}."
            )
    return frozenset(words)
