"""Signs of work: counted wherever a batch is read or a line is reported.

Whoever watches a process from outside can tell one that is slow from one that hangs.
"""

from __future__ import annotations

import itertools

_counter = itertools.count(1)
_latest = 0


def beat() -> None:
    global _latest
    _latest = next(_counter)


def beats() -> int:
    """How many signs there have been in this process."""
    return _latest
