"""What methods say of themselves, out of their files' docstrings; nothing of theirs is imported."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Method(NamedTuple):
    """A method: its idea in a few words, and what the docstring of its file tells."""

    name: str
    idea: str
    told: str
    file: str


@lru_cache(maxsize=2)
def methods_of(package: str) -> dict[str, Method]:
    """The methods that are declared in ``attacks`` or ``defenses``, by name."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found: dict[str, Method] = {}
    for folder in folders:
        for file in sorted(Path(folder).glob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            told = ast.get_docstring(tree) or ""
            for name, own in _named(tree):
                idea = " ".join((own or told).split("\n\n")[0].split())
                found.setdefault(name, Method(name, idea, told, str(file)))
    return found


def _named(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names that classes of a module declare themselves by, and their docstrings."""
    for owner in tree.body:
        for line in owner.body if isinstance(owner, ast.ClassDef) else ():
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and line.target.id == "name"
                and isinstance(line.value, ast.Constant)
            ):
                assert isinstance(owner, ast.ClassDef)
                yield str(line.value.value), ast.get_docstring(owner) or ""


def method_of(label: str, package: str) -> str | None:
    """The method behind a label of the board: itself, or the longest that the label begins with."""
    known = methods_of(package)
    plain = label.partition("@")[0]
    fits = [name for name in known if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", plain)]
    return max(fits, key=len, default=None)
