"""Choosing cells on the command line: ``attack=badnet rate<0.02 defense=clean*``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from victims.errors import UsageError, near

if TYPE_CHECKING:
    from grid.chains import ListedCell
    from grid.spec import Cell

    FilteredCell = Cell | ListedCell

FIELDS: dict[str, Callable[[Any], str]] = {
    "attack": lambda cell: str(cell.attack.label),
    "defense": lambda cell: str(cell.defense.label),
    "rate": lambda cell: str(cell.rate),
    "seed": lambda cell: str(cell.seed),
    "defense_seed": lambda cell: str(cell.defense_seed),
    "target": lambda cell: str(cell.target),
    "cell": lambda cell: str(cell.label),
}
NUMERIC = ("rate", "seed", "defense_seed", "target")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
CONDITION = re.compile(r"(\w+)\s*(<=|>=|!=|=|<|>)\s*(\S+)")


@dataclass(frozen=True, slots=True)
class CellFilter:
    """All conditions must hold. Text matches by shell pattern, numbers by value."""

    conditions: tuple[tuple[str, str, str], ...]

    def matches(self, cell: FilteredCell) -> bool:
        return all(_holds(cell, *condition) for condition in self.conditions)


def parse_filter(text: str) -> CellFilter:
    conditions = []
    for word in re.split(r"[\s,]+", text.strip()):
        match = CONDITION.fullmatch(word)
        if match is None:
            raise UsageError(
                f"--only: {word!r} is no condition. Write FIELD=VALUE (or != < > <= >=), for"
                f" example defense=none rate<0.02. Fields: {', '.join(FIELDS)}."
            )
        name, sign, value = match.groups()
        if name not in FIELDS:
            raise UsageError(
                f"--only: no field called {name!r}.{near(name, FIELDS)} Fields:"
                f" {', '.join(FIELDS)}."
            )
        if name in NUMERIC:
            _number(name, value)
        elif sign in COMPARE:
            raise UsageError(f"--only: {name} has no order; use = or !=")
        conditions.append((name, sign, value))
    return CellFilter(tuple(conditions))


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"--only: {name} is a number, got {value!r}") from error


def _holds(cell: FilteredCell, name: str, sign: str, value: str) -> bool:
    found = FIELDS[name](cell)
    if name in NUMERIC:
        try:
            number = float(found)
        except ValueError:  # poisoned rows that are counted have no rate
            return sign == "!="
        if sign in COMPARE:
            return COMPARE[sign](number, float(value))
        same = number == float(value)
    else:
        same = fnmatchcase(found, value)
    return same if sign == "=" else not same


def require_match(only: CellFilter, cells: Sequence[FilteredCell]) -> None:
    """A filter that takes nothing is a slip of the pen."""
    if any(only.matches(cell) for cell in cells):
        return
    for name, sign, value in only.conditions:
        known = list(dict.fromkeys(FIELDS[name](cell) for cell in cells))
        alone = CellFilter(((name, sign, value),))
        if not any(alone.matches(cell) for cell in cells):
            shown = ", ".join([*known[:20], *(["..."] if len(known) > 20 else [])])
            raise UsageError(
                f"--only {name}{sign}{value} takes none of the {len(cells)} cells."
                f"{near(value, known)} {name} is one of: {shown}."
            )
    raise UsageError(f"--only: no cell of the {len(cells)} meets all conditions together")
