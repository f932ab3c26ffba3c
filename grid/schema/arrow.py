"""The columns as Arrow types: what a file of a kind promises, and whether it keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grid.schema.columns import KINDS, SCHEMA_VERSION, SCHEMAS, Column
from grid.schema.errors import SchemaError

if TYPE_CHECKING:
    import pyarrow as pa


KIND_KEY, VERSION_KEY = "backdoor_grid_kind", "backdoor_grid_schema_version"
REPLACES_KEY = "backdoor_grid_replaces"
"""In the footer of a file that others were put into: their names, with slashes between. Who sees
the file does not read those again, so nothing is ever seen twice or not at all."""

KEYS = ("written_at", "cell", "eval_set", "metric", "value", "status", "key", "trial", "record")
"""Columns that every file has had since the first, where its kind has them."""


def arrow_schema(kind: str) -> pa.Schema:
    """The Parquet schema of a kind, with the kind and the schema version in its metadata."""
    import pyarrow as pa

    fields = [pa.field(c.name, _arrow_type(c.type), nullable=not c.required) for c in SCHEMAS[kind]]
    return pa.schema(fields, metadata={KIND_KEY: kind, VERSION_KEY: str(SCHEMA_VERSION)})


def mistyped(schema: pa.Schema, kind: str) -> str:
    """What keeps a file with our mark from holding what its kind promises; empty if nothing."""
    import pyarrow as pa

    known = {column.name: column.type for column in KINDS[kind]}
    if lacking := [name for name in KEYS if name in known and name not in schema.names]:
        return f"lacks column {', '.join(lacking)}"
    numbers = (pa.types.is_integer, pa.types.is_floating)
    alike = {
        "string": (pa.types.is_string, pa.types.is_large_string),
        "strings": (pa.types.is_list, pa.types.is_large_list),
        "bool": (pa.types.is_boolean,),
        **dict.fromkeys(("int16", "int32", "int64"), numbers[:1]),
        "float64": numbers,
        "timestamp": (pa.types.is_timestamp,),
        "binary": (pa.types.is_binary, pa.types.is_large_binary),
    }
    for field in schema:
        word = known.get(field.name)
        if word is not None and not any(is_so(field.type) for is_so in alike[word]):
            return f"its column {field.name} is {field.type}, not {word}"
    return ""


def _arrow_type(word: str) -> pa.DataType:
    import pyarrow as pa

    if word == "strings":
        return pa.list_(pa.string())
    return pa.timestamp("us", tz="UTC") if word == "timestamp" else pa.type_for_alias(word)


def array(kind: str, column: Column, values: object) -> pa.Array:
    """One column as Arrow, or an error that names it."""
    import pyarrow as pa

    try:
        made = pa.array(values, _arrow_type(column.type))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise SchemaError(
            f"{kind}: column {column.name!r} holds {column.type} ({column.meaning}): {error}"
        ) from error
    if column.required and made.null_count:
        raise SchemaError(f"{kind}: column {column.name!r} is null; it says {column.meaning}")
    return made
