"""Ctrl-C that is not lost: an exception may be raised where a library swallows it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C was pressed. A plain value, as Tune pickles what it is given."""

    seen: bool = False


@contextlib.contextmanager
def heeded() -> Iterator[Interrupt]:
    """What Ctrl-C leaves a mark on, while it raises `KeyboardInterrupt` as ever.

    Whoever may have lost the exception asks the mark. Where Ctrl-C means something else already,
    or nothing, as for a process that was started in the background, that stays so.
    """
    interrupt = Interrupt()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return

    def heed(number: int, frame: FrameType | None) -> None:
        interrupt.seen = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, heed)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
