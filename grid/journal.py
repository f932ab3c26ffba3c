"""What a driver is doing, as a small file beside its results: ``progress.json``.

It holds what rows and records cannot tell: what runs, what is left by the recorded stage times,
what was found in the store. `read_progress` imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grid.room import Room, busiest
from grid.schema.whole import write_whole

if TYPE_CHECKING:
    from grid.history import History
    from grid.logbook import Logbook
    from grid.stages import Stage
    from victims.keys import Key

FILE = "progress.json"
WRITE_SECONDS = 2.0
LEFT = ("seconds_left", "gpu_seconds_left", "eta_seconds")


class Journal:
    """Writes the file, at most every two seconds while a run goes on.

    ``always``: at every change of what runs, for an executor that holds the driver up meanwhile.
    """

    def __init__(
        self, out: Path, history: History, logbook: Logbook, *, always: bool = False
    ) -> None:
        self.path, self.history, self.always = out / FILE, history, always
        self.logbook = logbook
        self.started = time.time()
        self.lanes, self.found, self.made = 1, 0, 0
        self.room: Room | None = None
        self.submitted: dict[Key, float] = {}
        self.begun: dict[Key, float] = {}
        self._written = 0.0
        self._last: dict[str, Any] = {}
        self._shown: tuple[Any, ...] = ()
        self._stages: dict[Key, tuple[str, str, float, float]] = {}
        self._chain: dict[Key, float] = {}

    def expect(
        self, stages: Mapping[Key, Stage], gpus: Mapping[Key, float], chain: Mapping[Key, float]
    ) -> None:
        """What is to be made: the GPUs that each stage asks for, and the seconds from each to the
        end of the longest chain that waits for it."""
        from grid.assumed import rated_as  # drivers alone expect; who reads must not wait for torch

        for key, stage in stages.items():
            self._stages[key] = (stage.kind, rated_as(stage), stage.work, gpus.get(key, 0.0))
        self._chain.update(chain)

    @property
    def eta_seconds(self) -> float | None:
        """Until everything is made, as last written; None before that."""
        found: float | None = self._last.get("eta_seconds")
        return found

    def submit(self, key: Key, attempt: int) -> None:
        self.submitted[key] = time.time()
        self.logbook.submit(key, attempt)

    def end(self, key: Key) -> None:
        self.submitted.pop(key, None)
        self.begun.pop(key, None)
        self.logbook.end(key)

    def update(
        self,
        state: str,
        *,
        cells_open: int,
        cells_asked: int,
        planned: Collection[Key],
        done: Collection[Key],
        running: Mapping[Key, Stage],
        begun: Sequence[Stage],
        waiting: int,
        at_once: bool = False,
    ) -> None:
        """Write the file if it is due."""
        for stage in begun:
            if stage.key not in self.begun:
                self.begun[stage.key] = time.time()
                self.logbook.begin(stage.key)
        shown = (state, frozenset(running), frozenset(self.begun)) if self.always else (state,)
        now = time.monotonic()
        if not at_once and now - self._written < WRITE_SECONDS and shown == self._shown:
            return
        self._written, self._shown = now, shown
        left = [key for key in planned if key not in done]
        self._last = {
            "cells": {"asked": cells_asked, "open": cells_open},
            "stages": {
                "planned": len(planned),
                "done": len(planned) - len(left),
                "found": self.found,
                "made": self.made,
                "made_by_another_run": waiting,
            },
            **self._estimate(left),
            "running": [self._running(stage) for stage in running.values()],
        }
        self._write(state, "")

    def state(self, state: str, why: str = "") -> None:
        """Say that the driver starts, or how it ends; of what ran before, the numbers stay."""
        if not self._last:
            before = read_progress(self.path.parent) or {}
            self._last = {n: before[n] for n in ("cells", "stages", *LEFT) if n in before}
        self._write(state, why)

    def _running(self, stage: Stage) -> dict[str, Any]:
        return {
            "key": stage.key,
            "kind": stage.kind,
            "name": stage.family,
            "submitted_at": self.submitted.get(stage.key),
            "begun_at": self.begun.get(stage.key),
            "expected_seconds": self.history.seconds(stage),
        }

    def _estimate(self, left: Sequence[Key]) -> dict[str, float]:
        """Seconds of work to go by what stages of each family have taken, and until the end."""
        rates: dict[str, float] = {}
        kinds: dict[str, float] = {}
        gpu = spent = longest = 0.0
        now = time.time()
        for key in left:
            kind, family, work, gpus = self._stages.get(key, ("", "", 0.0, 0.0))
            if family not in rates:
                rates[family] = self.history.rate(family)
            seconds = rates[family] * work
            if key in self.begun:
                spent = min(now - self.begun[key], seconds)
                seconds -= spent
                longest = max(longest, self._chain.get(key, 0.0) - spent)
            else:
                longest = max(longest, self._chain.get(key, 0.0))
            kinds[kind] = kinds.get(kind, 0.0) + seconds
            gpu += gpus * seconds
        return {
            "seconds_left": sum(kinds.values()),
            "gpu_seconds_left": gpu,
            "eta_seconds": max(longest, self._at_best(kinds)),
        }

    def _at_best(self, work: Mapping[str, float]) -> float:
        """Seconds until work by kind is done, if no place is ever empty."""
        return busiest(work, self.room) if self.room else sum(work.values())

    def _write(self, state: str, why: str) -> None:
        ends = state in ("ended", "stopped")
        body = {
            "state": state,
            "why": why,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": self.started,
            "written_at": time.time(),
            "lanes": self.lanes,
            **self._last,
            **({"running": []} if ends else {}),
        }
        with contextlib.suppress(OSError):  # a full disk stops the run elsewhere, with its reason
            write_whole(self.path, json.dumps(body, indent=1))


def read_progress(out: Path) -> dict[str, Any] | None:
    """What the last driver of a results directory said; None where none did."""
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and "written_at" in found else None
    except (OSError, ValueError):
        return None
