"""What is wrong with a user's SQL, in words of the views: DuckDB's own speak of its inside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from victims.errors import near

NO_COLUMN = re.compile(
    r'Referenced column "(?P<name>[^"]*)" not found|does not have a column named "(?P<own>[^"]*)"'
)
NOT_SELECT = "Only SELECT statements can be serialized"
FIRST_WORD = re.compile(r"\A\s*(?:(?:--[^\n]*|/\*.*?\*/)\s*)*(?P<word>[A-Za-z]+)", re.DOTALL)
KIND = re.compile(r"\A[A-Z][\w ]* Error: ")
MOST = 3


def amiss(told: str, read: Iterable[str], columns: Mapping[str, Sequence[str]]) -> str:
    """What DuckDB told of a text; ``read`` are the views in it, ``columns`` those of all views."""
    match = NO_COLUMN.search(told)
    if match is None:
        return f"This SQL cannot be run: {KIND.sub('', told).strip()}"
    name = match["name"] or match["own"]
    views = sorted({view for view in read if view in columns}) or list(columns)
    own = list(dict.fromkeys(column for view in views for column in columns[view]))
    others = [view for view in columns if view not in views and name in columns[view]]
    alike = [column for column in own if name.lower() in column]
    # Of a view that has `victim_seed`, that is meant by `seed`, whatever other views have.
    parts = [column for column in alike if name.lower() in column.split("_")]
    if others and not parts:
        guess = f" There is one in {', '.join(others)}."
    elif alike:
        guess = f" Did you mean {' or '.join(map(repr, (parts or alike)[:MOST]))}?"
        guess += f" There is a {name!r} in {', '.join(others)}." if others else ""
    else:
        guess = near(name, own)
    if len(views) > MOST:
        return f"no column {name!r}.{guess} `DESCRIBE board` lists those of a view."
    listed = " and ".join(f"`DESCRIBE {view}`" for view in views)
    return f"no column {name!r} in {', '.join(views)}.{guess} {listed} lists all."


def misunderstood(told: str, text: str) -> str:
    """What DuckDB told of a text that has no syntax tree, which only a SELECT has."""
    if NOT_SELECT not in told:
        return f"Cannot run this SQL: {told}"
    match = FIRST_WORD.match(text)
    word = match["word"].upper() if match else ""
    if word in ("", "SELECT", "WITH", "FROM"):
        return "Not every statement here is a SELECT: queries only read results."
    return f"{word} is no SELECT: queries only read results, and write nothing."


def tables_in(node: object) -> Iterator[str]:
    """Names of the tables that a syntax tree reads."""
    if isinstance(node, list):
        for child in node:
            yield from tables_in(child)
    elif isinstance(node, dict):
        if node.get("type") == "BASE_TABLE":
            yield str(node["table_name"]).lower()
        for child in node.values():
            yield from tables_in(child)


def asks_for_tables(statements: Sequence[object]) -> bool:
    """Whether SHOW TABLES was said, which of our views is a question with an answer."""
    names = [name.strip('"').lower() for name in _shown(statements)]
    return len(statements) == 1 and names in (["tables"], ["__show_tables_expanded"])


def _shown(node: object) -> Iterator[str]:
    if isinstance(node, list | tuple):
        for child in node:
            yield from _shown(child)
    elif isinstance(node, dict):
        if node.get("type") == "SHOW_REF" and not node.get("query"):
            yield str(node.get("table_name", ""))
        for child in node.values():
            yield from _shown(child)
