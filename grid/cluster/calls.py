"""A stage on its way: submitted, then given a place on some node, then begun; and what of this
takes too long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

from grid.cluster.notes import BEGUN, PLACED, PULSE, last_pulse
from grid.execution import Resources
from grid.stages import Stage
from grid.work import Ended

# Within which a stage that has its place begins: imports over a slow network take a minute.
BEGIN_SECONDS = 600.0


class Overdue(NamedTuple):
    """What a stage that is stopped ends as, and why."""

    ended: Ended
    message: str


@dataclass(slots=True)
class Call:
    """A stage on its way, and since when it is where it is."""

    name: str
    stage: Stage
    submitted: float
    placed: float | None = None
    begun: float | None = None
    pulse: bytes = b""
    beaten: float = 0.0

    def learn(self, notes: set[str]) -> None:
        """Whether it has been given a place, has begun and still works, from all the notes."""
        has_begun = f"{self.name}/{BEGUN}" in notes
        if has_begun and self.begun is None:
            self.begun = self.beaten = time.time()
        if f"{self.name}/{PULSE}" in notes:
            pulse = last_pulse(self.name)
            if pulse != self.pulse:
                self.pulse, self.beaten = pulse, time.time()
        if self.placed is None and (has_begun or f"{self.name}/{PLACED}" in notes):
            self.placed = time.time()

    def overdue(self, wants: Resources, now: float) -> Overdue | None:
        """Whether it is past its limit, counted from when it began, not from its submission; or
        did not begin, or has shown no sign of work for too long, and is to be tried again."""
        where = f"execution.resources.{self.stage.kind}"
        if self.begun is None:
            if self.placed is None or now - self.placed <= BEGIN_SECONDS:
                return None
            return Overdue(
                Ended.INFRASTRUCTURE,
                f"stopped: given a place, it did not begin in {now - self.placed:.0f} s",
            )
        if wants.limit_seconds is not None and now - self.begun > wants.limit_seconds:
            return Overdue(
                Ended.METHOD,
                f"stopped after its limit of {wants.limit_seconds:g} s; if it was not stuck,"
                f" raise {where}.limit_seconds (or default) and run `grid retry GRID`",
            )
        if now - self.beaten > wants.stall_seconds:
            return Overdue(
                Ended.INFRASTRUCTURE,
                f"stopped: no batch was read for {now - self.beaten:.0f} s; if it was not"
                f" stuck, raise {where}.stall_seconds (or default)",
            )
        return None
