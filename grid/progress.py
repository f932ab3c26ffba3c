"""Progress of a run: a live line on a terminal; else a line after some seconds and per minute."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from grid.status_words import duration


class Line:
    """The line itself: when there is to be one, and where it goes."""

    def __init__(self, say: Callable[[str], None], waits: Sequence[float] = (10, 60)) -> None:
        self.say, self.waits = say, list(waits)
        self.started = self.said = time.monotonic()
        self._status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()

    @property
    def is_due(self) -> bool:
        """Whether anybody would see a new one now."""
        quiet = time.monotonic() - self.said
        return self._status is not None or quiet >= self.waits[0]

    def show(self, line: str) -> None:
        if self._status is not None:
            self._status.update(line)
        else:
            self.said = time.monotonic()
            self.waits = self.waits[1:] or self.waits  # the last one stays
            self.say(line)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


class Progress:
    """Counts, rate and time to go."""

    def __init__(self, num_cells: int, say: Callable[[str], None]) -> None:
        self.num_cells, self.line = num_cells, Line(say)

    def update(
        self,
        *,
        cells_left: int,
        stages_done: int,
        stages_planned: int,
        running: Sequence[str],
        waiting: int = 0,
        seconds_left: float | None = None,
    ) -> None:
        """Say where the run is; ``waiting`` counts stages that another run is making,
        ``seconds_left`` is what is left by the recorded times of stages.

        The first cell closes after many stages: until then it is these that show progress.
        """
        if not self.line.is_due:
            return
        closed, elapsed = self.num_cells - cells_left, time.monotonic() - self.line.started
        parts = [f"{closed}/{self.num_cells} cells", f"{stages_done}/{stages_planned} stages"]
        if elapsed > 1 and closed:
            rate = 3600 * closed / elapsed
            parts.append(f"{rate:.0f} cells/h")
        if seconds_left is not None:
            parts.append(f"about {duration(seconds_left)} to go")
        names = ", ".join(
            f"{name} x{count}" if count > 1 else name for name, count in Counter(running).items()
        )
        told = f"{', '.join(parts)}; running: {names or 'nothing'}"
        others = f"; another run of this store makes {waiting} more" if waiting else ""
        self.line.show(told + others)

    def close(self) -> None:
        self.line.close()


class PartsProgress:
    """Rows looked at, parts done, rate and time to go of a source that is worked through."""

    def __init__(self, num_parts: int, weight: int, say: Callable[[str], None]) -> None:
        self.num_parts, self.weight = num_parts, weight
        self.line = Line(say, (3, 5, 10, 20, 30, 60))

    def update(self, *, parts: int, rows: int, weight: int) -> None:
        """Say where it is: parts done of all, rows and weight done since this run began."""
        if not self.line.is_due:
            return
        elapsed = time.monotonic() - self.line.started
        told = [f"{parts}/{self.num_parts} parts", f"{rows:,} rows"]
        if elapsed > 1 and rows:
            rate = rows / elapsed
            told.append(f"{rate:,.0f} rows/s" if rate >= 10 else f"{rate:.1f} rows/s")
        if elapsed > 1 and weight:
            left = elapsed * (self.weight - weight) / weight
            told.append(f"about {duration(left)} to go")
        self.line.show(", ".join(told))

    def joined(self, parts: int) -> None:
        """Say how many parts were put together."""
        self.update(parts=parts, rows=0, weight=parts)

    def close(self) -> None:
        self.line.close()
