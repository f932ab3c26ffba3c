"""A grid file's text with some of its keys changed: the rest stays as it was written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from grid.nodes import parse


def dumped(document: Mapping[str, Any]) -> str:
    """Keys as YAML, short lists and mappings on one line as people write them."""
    # Of plain values alone the whole would be written as one mapping on a line.
    has_more = any(isinstance(value, list | dict) for value in document.values())
    style = None if has_more else False
    text: str = yaml.safe_dump(
        dict(document), sort_keys=False, allow_unicode=True, width=100, default_flow_style=style
    )
    return text


def edited(text: str, document: Mapping[str, Any], changed: Collection[str]) -> str:
    """``text``, of whose keys those ``changed`` are taken from ``document``.

    A key's lines end where the next key begins, or the comments above that one. A text whose keys
    do not begin lines of their own is written anew.
    """
    lines = text.splitlines(keepends=True)
    places = {name: item.where.line - 1 for name, item in parse(text, "").items().items()}
    if any(not lines[at].startswith(f"{name}:") for name, at in places.items()):
        return dumped(document)
    ends = [*sorted(places.values()), len(lines)]
    for name in sorted(changed, key=lambda name: -places.get(name, len(lines))):
        own = dumped({name: document[name]})
        if name not in places:
            if lines and not lines[-1].endswith("\n"):
                lines[-1] += "\n"
            lines.append(own)
            continue
        first = places[name]
        end = min(at for at in ends if at > first)
        while end - 1 > first and (not lines[end - 1].strip() or lines[end - 1][0] == "#"):
            end -= 1
        lines[first:end] = [own]
    found = "".join(lines)
    return found if parse(found, "").plain() == document else dumped(document)
