"""What a user's SQL may hold: the views, what it names itself, and functions that only compute.

A SELECT may hide a writing statement (WITH x AS (COPY ...)), a name may be that of a file, and
functions reach settings, logs and the clock. So the syntax tree is held to what is known to be
harmless, and whatever is not known is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from victims.errors import near

Query = Callable[..., list[tuple[Any, ...]]]

NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
SOURCES = {
    *("BASE_TABLE", "SUBQUERY", "JOIN", "TABLE_FUNCTION", "EXPRESSION_LIST", "EMPTY", "PIVOT"),
    "SHOW_REF",
}
"""What may stand behind FROM."""
TABLE_FUNCTIONS = {"range", "generate_series", "unnest"}
CLOCK_AND_CHANCE = {
    *("now", "today", "current_date", "get_current_time", "get_current_timestamp", "random"),
    *("current_localtime", "current_localtimestamp", "transaction_timestamp", "uuid"),
    *("gen_random_uuid", "error"),
}
"""Of what does not always answer alike, what tells nothing of this machine but its time."""
SYNTAX = {
    *("unnest", "row_number", "rank", "dense_rank", "rank_dense", "percent_rank", "cume_dist"),
    *("ntile", "lead", "lag", "first_value", "last_value", "nth_value", "fill"),
}
"""What older versions of DuckDB list as no function."""
TOLD_APART = {"json_serialize_plan", "json_deserialize_sql", "json_execute_serialized_sql"}
"""Called consistent, and yet they look up what a text names."""


class Permitted:
    """What one connection's SQL may hold, beside the ``views``."""

    def __init__(self, query: Query, views: Iterable[str]) -> None:
        self._query, self._views = query, tuple(views)

    def refused(self, statements: list[Any]) -> Iterator[str]:
        """What in syntax trees does more than read the views."""
        yield from self._in(statements, frozenset())

    def _in(self, node: object, named: frozenset[str]) -> Iterator[str]:
        """``named`` are the tables that the query names itself, where the node stands."""
        if isinstance(node, list):
            for child in node:
                yield from self._in(child, named)
        elif isinstance(node, dict):
            yield from self._of_kind(node, named)
            within = named
            for entry in node.get("cte_map", {}).get("map", ()):
                # Before it is named, a name is that of a table: entries see those above them.
                yield from self._in(entry["value"], within)
                within |= {entry["key"].lower()}
            for name, child in node.items():
                if name != "cte_map":
                    yield from self._in(child, within | _own(node, name))

    def _of_kind(self, node: Mapping[str, Any], named: frozenset[str]) -> Iterator[str]:
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in NODES:
            yield kind.removesuffix("_NODE").replace("_", " ").lower()
        if "sample" in node and "alias" in node and kind not in SOURCES:
            yield str(kind).replace("_", " ").lower()
        if kind == "BASE_TABLE":
            yield from self._table(node, named)
        elif kind == "TABLE_FUNCTION":
            name = node.get("function", {}).get("function_name", "an unnamed table function")
            if name.lower() not in TABLE_FUNCTIONS:
                yield f"{name}()"
        elif kind == "SHOW_REF" and not node.get("query"):
            name = str(node.get("table_name", "")).strip('"')
            if name.lower() not in self._views:
                yield f"SHOW {name.upper()}"
        elif "function_name" in node:
            name = str(node["function_name"])
            if name.lower() not in TABLE_FUNCTIONS and not self.computes(name.lower()):
                yield f"{name}()"

    def _table(self, node: Mapping[str, Any], named: frozenset[str]) -> Iterator[str]:
        name, inside = str(node["table_name"]), node.get("schema_name") or node.get("catalog_name")
        known = {*self._views, *named}
        if inside or name.lower() not in known:
            whole = f"{inside}.{name}" if inside else name
            guess = near(name, sorted(known)).strip()
            yield f"{whole!r}, which is no view here" + (f" ({guess})" if guess else "")

    def computes(self, name: str, within: frozenset[str] = frozenset()) -> bool:
        """Whether a function only computes: all that are called so, and what a macro calls."""
        if name in SYNTAX or name in CLOCK_AND_CHANCE:
            return True
        found = self._functions.get(name)
        if not found or name in TOLD_APART or name.startswith("__") or name in within:
            return False
        return all(
            stability == "CONSISTENT" if body is None else self._is_plain(body, within | {name})
            for stability, body in found
        )

    def _is_plain(self, body: str, within: frozenset[str]) -> bool:
        """Whether the body of a macro reads nothing."""
        ((text,),) = self._query("SELECT json_serialize_sql(?)", f"SELECT {body}")
        tree = json.loads(text)
        return not tree["error"] and all(
            name != "" and self.computes(name, within) for name in _called(tree["statements"])
        )

    @cached_property
    def _functions(self) -> Mapping[str, list[tuple[str, str | None]]]:
        """By name how steady its answers are, or what a macro stands for."""
        found: dict[str, list[tuple[str, str | None]]] = {}
        for name, stability, body in self._query(
            "SELECT DISTINCT lower(function_name), stability, macro_definition"
            " FROM duckdb_functions()"
            " WHERE function_type IN ('scalar', 'aggregate', 'window', 'macro')"
        ):
            found.setdefault(name, []).append((stability, body))
        return found


def _own(node: Mapping[str, Any], child: str) -> frozenset[str]:
    """The name by which the second half of a recursive query calls itself."""
    is_self = node.get("type") == "RECURSIVE_CTE_NODE" and child == "right"
    return frozenset({str(node["cte_name"]).lower()}) if is_self else frozenset()


def _called(node: object) -> Iterator[str]:
    """Names of functions in a syntax tree; an empty one where it reads from something."""
    if isinstance(node, list):
        for child in node:
            yield from _called(child)
    elif isinstance(node, dict):
        if "function_name" in node:
            yield str(node["function_name"]).lower()
        if "sample" in node and "alias" in node and node.get("type") != "EMPTY":
            yield ""
        for child in node.values():
            yield from _called(child)
