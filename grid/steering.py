"""What a driver does about requests: pause, resume, cancel, requeue. `grid.control` holds them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from grid.chains import read_chains
from grid.control import Control, Request, Verb
from grid.filters import parse_filter
from grid.plan import CellPlan, chain
from grid.quick import SETTLED
from grid.schema.status import Status
from victims.errors import GridError
from victims.places import is_uri

if TYPE_CHECKING:
    from collections.abc import Callable

    from grid.executors import Executor
    from grid.run import Driver
    from victims.keys import Key

FAILED = frozenset({Status.FAILED_METHOD, Status.FAILED_INFRASTRUCTURE})


class Steering:
    """Reads requests in the driver's loop and carries them out on the driver's own state."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.control = driver, Control(driver.out)
        self.is_paused = False

    def heed(self, executor: Executor | None = None) -> None:
        """Carry out what has been asked since the last look, in the order of asking.

        What was done is on disk before the request goes.
        """
        if not self.control.changed():
            return
        try:
            requests = self.control.pending()
        except GridError as error:
            self.driver.say(str(error))
            return
        for request in requests:
            did = self._do(request, executor)
            self.driver.flush(force=True)
            self.control.answer(request, did)
            self.driver.say(f"{request.verb}{f' {request.only}' if request.only else ''}: {did}")
        self.is_paused = self.control.is_paused

    def _do(self, request: Request, executor: Executor | None) -> str:
        if request.verb in (Verb.PAUSE, Verb.PAUSE_NOW, Verb.RESUME):
            did = self.control.turn(request)
            if executor is None or request.verb is Verb.RESUME:
                return did
            if request.verb is Verb.PAUSE_NOW:
                stopped = self._take_back(executor, set(self.driver.running))
                return f"{did}; {_count(stopped, 'stage')} stopped" if stopped else did
            running = self._recall(executor)
            return f"{did}; {_count(running, 'stage')} running come to an end" if running else did
        try:
            matches = parse_filter(request.only).matches
        except GridError as error:
            return f"nothing: {error}"
        cells = [planned for planned in self.driver.plan.cells if matches(planned.cell)]
        if request.verb is Verb.CANCEL:
            return self._cancel(cells, executor)
        return self._requeue(cells, executor)

    def _recall(self, executor: Executor) -> int:
        """Take back what was handed over and has no place yet; how many stages then run."""
        if not executor.owns_cluster:
            begun = {stage.key for stage in executor.begun}
            self._take_back(executor, self.driver.running - begun)
        return len(self.driver.running)

    def _take_back(self, executor: Executor, keys: set[Key]) -> int:
        """End stages wherever they are, to be begun again from their last checkpoints; how many."""
        executor.stop(keys)
        self.driver.running -= keys
        for key in keys:
            self.driver.put_back(key)
        return len(keys)

    def _cancel(self, cells: list[CellPlan], executor: Executor | None) -> str:
        driver = self.driver
        final = SETTLED | {Status.CANCELLED}
        chosen = [c for c in cells if c.key in driver.open or driver.status.get(c.key) not in final]
        for cell in chosen:
            driver.give(cell, Status.CANCELLED, "cancelled on request; `grid requeue` opens it")
        stopped = driver.drop_unneeded(executor) if executor else 0
        told = f"{_count(len(chosen), 'cell')} cancelled"
        return f"{told}; {_count(stopped, 'stage')} stopped" if stopped else told

    def _requeue(self, cells: list[CellPlan], executor: Executor | None) -> str:
        driver = self.driver
        again = FAILED | {Status.CANCELLED}
        chosen = [
            c for c in cells if c.key not in driver.open and driver.status.get(c.key) in again
        ]
        for cell in chosen:
            driver.give(cell, Status.REQUEUED, f"open again; it was {driver.status[cell.key]}")
        taken = [c for c in chosen if driver.only is None or driver.only.matches(c.cell)]
        if executor and taken:
            driver.reopen(taken, {key for cell in taken for key in chain(driver.plan, cell)})
        return f"{_count(len(chosen), 'cell')} open again"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _file_of(out: Path) -> str:
    """Where a run's grid file was, which the paths in it are relative to."""
    from grid.registry import SOURCE_FILE, TEXT_FILE

    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((out / SOURCE_FILE).read_text(encoding="utf-8"))["path"])
    return str(out / TEXT_FILE)


def settle(out: Path, say: Callable[[str], None]) -> None:
    """Carry out the requests to a run that no driver works on; runs no stage."""
    from grid.gridfile import decode_grid
    from grid.registry import TEXT_FILE, Source
    from grid.run import Driver
    from victims.store import Store

    chains = read_chains(out)
    if is_uri(chains.store):  # written without what may be secret in it
        raise GridError(
            f"{out}: no run is alive there, and its store is {chains.store}. The request stands,"
            " and the next `grid run` carries it out."
        )
    source = Source(chains.grid, _file_of(out), (out / TEXT_FILE).read_text("utf-8"))
    driver = Driver(decode_grid(source), out, Store(chains.store), say=say)
    if {cell.key for cell in chains.cells} != {cell.key for cell in driver.plan.cells}:
        raise GridError(
            f"{out}: the cells that were planned there are not those that its grid.yaml means to"
            " this version of the tool. The request stands, and the next `grid run` carries it out."
        )
    driver.settle()
