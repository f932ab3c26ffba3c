"""Storage that fails for a moment: what is tried again, how often, and what is said at the end.

A network file system gives ESTALE, EIO or ETIMEDOUT while a server restarts, an object store
answers 503 when asked too often. That a file is missing, a disk full or a door shut does not
change by asking again.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from victims.errors import GridError

T = TypeVar("T")

TRIES = 4
FIRST_WAIT, LONGEST_WAIT = 0.2, 5.0

MOMENTARY = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETUNREACH,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
# Arrow says of an object store in its text alone: the HTTP status, AWS's name of it, or curl's.
_SAYS = re.compile(
    r"HTTP status (5\d\d|429|408)\b"
    r"|AWS Error (SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|NETWORK_CONNECTION)\b"
    r"|\b(SlowDown|ServiceUnavailable|InternalError|RequestTimeout|Throttling)\b"
    r"|curlCode: (6|7|18|28|35|52|55|56)\b"
    r"|\btimed out\b|\btimeout was reached\b",
    re.IGNORECASE,
)


class Unreachable(GridError, OSError):
    """The storage does not answer, or refuses: the machine's fault, never a method's."""


def is_momentary(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if not isinstance(error, OSError) or isinstance(error, GridError):
        return False
    if error.errno is not None:
        return error.errno in MOMENTARY
    return _SAYS.search(str(error)) is not None


class Patience:
    """Tries again what failed for a moment. ``waited`` counts how often that was needed."""

    def __init__(
        self, where: str, tries: int = TRIES, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.where, self.tries, self.sleep = where, tries, sleep
        self.waited = 0
        # Nothing but the waits depends on it: many processes must not come back at once.
        self._chance = random.Random()

    def __call__(self, ask: Callable[[], T], tries: int | None = None) -> T:
        """The answer; `Unreachable` when every try failed for a moment. Other errors pass."""
        tries = tries or self.tries
        wait = FIRST_WAIT
        for attempt in range(1, tries + 1):
            try:
                return ask()
            except OSError as error:
                if not is_momentary(error):
                    raise
                if attempt == tries:
                    raise Unreachable(
                        f"the store at {self.where} does not answer, after {tries}"
                        f" {'try' if tries == 1 else 'tries'} ({error}). Nothing was half-written;"
                        " run the same command again when it does."
                    ) from error
            self.waited += 1
            self.sleep(wait * self._chance.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable: the last try returns or raises")
