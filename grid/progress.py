"""Progress of a run: a live line on a terminal; else a line after ten seconds and per minute."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from grid.status_words import duration


class Progress:
    """Counts, rate and time to go."""

    def __init__(self, num_cells: int, say: Callable[[str], None]) -> None:
        self.num_cells, self.say = num_cells, say
        self.started = self.said = time.monotonic()
        self.has_said = False
        self._status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()

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
        now = time.monotonic()
        if self._status is None and now - self.said < (60 if self.has_said else 10):
            return
        closed, elapsed = self.num_cells - cells_left, now - self.started
        parts = [f"{closed}/{self.num_cells} cells", f"{stages_done}/{stages_planned} stages"]
        if elapsed > 1 and closed:
            rate = 3600 * closed / elapsed
            parts.append(f"{rate:.0f} cells/h")
        if seconds_left is not None:
            parts.append(f"about {duration(seconds_left)} to go")
        names = ", ".join(
            f"{name} x{count}" if count > 1 else name for name, count in Counter(running).items()
        )
        line = f"{', '.join(parts)}; running: {names or 'nothing'}" + (
            f"; another run of this store makes {waiting} more" if waiting else ""
        )
        if self._status is not None:
            self._status.update(line)
        else:
            self.said, self.has_said = now, True
            self.say(line)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
