"""What can be wrong with results, with the file that holds them, or with what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable

from victims.errors import GridError, UsageError, near


class SchemaError(GridError):
    """A row, a file or a grid file does not obey the schema."""


class ResultsError(GridError):
    """A results directory cannot be read as asked."""


class AskedError(ResultsError):
    """What was asked of results cannot be meant; the results are not at fault."""

    code = UsageError.code


def no_such(what: str, name: str, known: Iterable[str], where: str = "") -> AskedError:
    """The error for a name that results do not have, or that nothing here is called."""
    there = list(known)
    return AskedError(
        f"no {what} {name!r}{where}.{near(name, there)} There are: {', '.join(there)}."
    )
