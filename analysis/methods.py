"""What methods say of themselves, out of their files' docstrings; nothing of theirs is imported."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=2)
def told_by(package: str) -> dict[str, str]:
    """Method -> the docstring of the file that declares it, in ``attacks`` or ``defenses``."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted(Path(folder).glob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            told = ast.get_docstring(tree) or ""
            for name in _named(tree):
                found.setdefault(name, told)
    return found


def _named(tree: ast.Module) -> list[str]:
    """The names that classes of a module declare themselves by."""
    return [
        str(line.value.value)
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for line in owner.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.target.id == "name"
        and isinstance(line.value, ast.Constant)
    ]


def method_of(label: str, package: str) -> str | None:
    """The method behind a label of the board: itself, or the longest that the label begins with."""
    known = told_by(package)
    plain = label.partition("@")[0]
    fits = [name for name in known if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", plain)]
    return max(fits, key=len, default=None)
