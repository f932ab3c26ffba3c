"""Errors for the person who reads them: where, what was found, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GridError(Exception):
    """Something the user can act on. Printed without a traceback; the exit code is ``code``."""

    code = 1


class UsageError(GridError):
    """The command or the grid file asks for something that cannot be meant."""

    code = 2


class MethodFailure(GridError):
    """A method failed on its own terms (a loss that is not finite, say): an outcome."""


class BadData(GridError):
    """Files that were given are not fit to be read: no method's fault, and nothing that trying
    again mends."""


class Forbidden(GridError):
    """Code reached for what it must not see: undeclared needs, the truth, the report split."""


def near(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` when something known is close to ``name``, else nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def unknown(what: str, name: str, known: Iterable[str], where: str = "") -> UsageError:
    """The error for a name that is not in a table."""
    table = sorted(known)
    place = f"{where}: " if where else ""
    return UsageError(
        f"{place}no {what} called {name!r}.{near(name, table)} Known: {', '.join(table)}."
    )


def require_all(who: str, *checks: tuple[bool, str]) -> None:
    """Raise for what does not hold, and for that alone; each check comes with what is allowed."""
    faults = [words for holds, words in checks if not holds]
    if faults:
        raise UsageError(f"{who}: {'; '.join(faults)}")


def size_words(num_bytes: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def counted(number: int, noun: str, many: str = "") -> str:
    """A number of things in words: ``1 cell``, ``2 cells``; ``many`` where it is not noun and s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"
