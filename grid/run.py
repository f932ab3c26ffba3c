"""The driver: it owns the order of stages, retries, gates and rows. The store owns the work.

Killing it loses nothing but the seconds since the last mid-fit checkpoints: the same command plans
again, finds what exists, and goes on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grid import exhibits
from grid.announcement import announce, first_cells
from grid.executors import Executor
from grid.filters import CellFilter, require_match
from grid.lock import only_driver
from grid.measure import MeasureStage
from grid.order import priorities
from grid.plan import CellPlan, Group, Plan, finished
from grid.planning import make_plan
from grid.preflight import preflight
from grid.progress import Progress
from grid.quick import SETTLED, outcomes_in
from grid.results import RowMaker, Verdict, judge
from grid.run_report import RunReport, reported
from grid.scheduler import MAX_ATTEMPTS, Scheduler, clear_errors
from grid.schema.status import Status
from grid.schema.writing import write_columns
from grid.spec import Grid
from grid.stages import Stage
from grid.start_gate import StartVerdict, judge_start
from grid.steering import Steering
from grid.waiting_cells import waiting_cells
from grid.work import Ended
from victims.errors import counted
from victims.keys import Key
from victims.store import Damaged, Store


class Held(NamedTuple):
    """Cells that were opened, and what is to be wanted for them."""

    wanted: Sequence[Stage]
    groups: Collection[Group]
    cells: Sequence[CellPlan]


class Driver(Scheduler):
    """One run of one grid."""

    def __init__(
        self,
        grid: Grid,
        out: Path,
        store: Store,
        *,
        plan: Plan | None = None,
        executor: str = "ray",
        only: CellFilter | None = None,
        retry: bool = False,
        checks_nodes: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.grid, self.plan = grid, plan or make_plan(grid)
        super().__init__(self.plan.stages, grid.execution, out, store, executor=executor, say=say)
        self.only, self.retry, self.checks_nodes = only, retry, checks_nodes
        self.steering = Steering(self)
        self.rows = RowMaker(self.plan, store, self.runtime, set())
        self.status: dict[str, str] = {}
        self.asked = 0
        self.start_verdict: StartVerdict | None = None
        self.held: list[Held] = []
        self.verdicts: dict[Group, Verdict | None] = {}
        self.open: dict[Key, CellPlan] = {}
        self.cells_of: dict[Key, list[CellPlan]] = defaultdict(list)
        self.groups_of: dict[Key, list[Group]] = defaultdict(list)
        self.mended: dict[Key, list[Key]] = defaultdict(list)
        self.measured: list[CellPlan] = []
        self.told_waiting: dict[str, str] = {}

    # --- from cells to wanted stages

    def run(self) -> RunReport:
        started = time.perf_counter()
        with only_driver(self.out), clear_errors(self.out):
            self._take_over()
            self._announce()
            executor = None
            try:
                self.steering.heed()
                todo = self._todo()
                if todo:
                    for words in self.plan.cautions():
                        self.say(f"caution: {words}")
                    self.done = finished(self.store, self.plan)
                    self._open_cells(todo)
                if self.open:
                    self._note_progress(None, at_once=True)  # not what the last run counted
                    self.journal.state("starting")
                    executor = self.start()
                    try:
                        self.work(executor, len(todo))
                    finally:
                        executor.close()
                self._tell_how_it_ended(executor)
            except BaseException as error:
                self.journal.state("stopped", str(error) or type(error).__name__)
                raise
            finally:
                self.flush(force=True)
                self.logbook.close()
            return reported(self, started, executor)

    def _take_over(self) -> None:
        """Learn what earlier drivers have done here, and put on record what a killed one has."""
        found = outcomes_in(self.out)
        self.status = {cell: status for cell, (status, _) in found.items()}
        self.told_waiting = {c: why for c, (s, why) in found.items() if s == Status.MISSING}
        self.recover()

    def settle(self) -> None:
        """Carry out what was asked of a run that is not alive; no stage runs."""
        with only_driver(self.out), clear_errors(self.out):
            self._take_over()
            self.rows.first_cells = first_cells(self.out) or set()
            self.steering.heed()
            self.flush(force=True)
            self.logbook.close()

    def _tell_who_waits(self) -> None:
        """Let a board know which cells without an outcome are measured, and what they wait for."""
        told = {row["cell"] for row in self.buffer["rows"]}
        for cell, why in waiting_cells(self.plan, self.done, self.status):
            if cell.key not in told and self.told_waiting.get(cell.key) != why:
                self.told_waiting[cell.key] = why
                self.buffer["rows"].extend(self._outcome_row(cell, Status.MISSING, why))

    def _tell_how_it_ended(self, executor: Executor | None) -> None:
        """Cells that nobody runs until they are requeued, for who wonders; then the last word."""
        cancelled = [c for c in self.plan.cells if self.status.get(c.key) == Status.CANCELLED]
        if cancelled:
            told = counted(len(cancelled), "cell")
            self.say(f"{told} cancelled; `grid requeue` opens them again")
        if self.asked:
            self._note_progress(executor, at_once=True)
        self.journal.state("stopped" if self.problem else "ended", self.problem)

    def before_stages(self, executor: Executor) -> None:
        if self.checks_nodes:
            preflight(executor, self.plan, self.store.uri, self.say)

    def _announce(self) -> None:
        """Let a board know from the start what is missing, and what was never to be had."""
        self.rows.first_cells = announce(self.grid, self.plan, self.out, self.store.shown)
        for cell, reason in self.plan.refused:
            row = self.rows.refused(cell, reason)
            if row["cell"] not in self.status:
                self.buffer["rows"].append(row)
                self.status[row["cell"]] = Status.NOT_APPLICABLE.value

    def _todo(self) -> list[CellPlan]:
        again = {Status.FAILED_METHOD} if self.retry else set()
        final = (SETTLED - again) | {Status.CANCELLED}
        cells = [c for c in self.plan.cells if self.status.get(c.key) not in final]
        return [c for c in cells if self.only is None or self.only.matches(c.cell)]

    def _open_cells(self, todo: Sequence[CellPlan]) -> None:
        self.asked += len(todo)
        for cell in todo:
            self.open[cell.key] = cell
            for stage in cell.stages:
                self.cells_of[stage.key].append(cell)
        groups = {cell.group for cell in todo if cell.group in self.plan.gates}
        wanted: list[Stage] = []
        for group in groups:
            gate = self.plan.gates[group]
            for measure in gate.stages:
                self.groups_of[measure.key].append(group)
                wanted.append(measure)
        wanted.extend(stage for cell in todo if not cell.gated for stage in cell.stages)
        start: list[Stage] = [self.plan.start] if self.plan.start and todo else []
        measures = (measure for cell in todo for measure in cell.stages)
        everything = [*start, *wanted, *measures]
        missing = self.plan.missing(everything, self.done)
        if not self.planned:
            self.journal.found = len(self.plan.missing(everything, set())) - len(missing)
        self.planned |= set(missing)
        seconds = {key: self.history.seconds(stage) for key, stage in missing.items()}
        self.priority |= priorities(self.plan, missing, seconds)
        gpus = {key: self._gpus(stage) for key, stage in missing.items()}
        self.journal.expect(missing, gpus, self.priority)
        self.held.append(Held(wanted, groups, todo))
        self._begin_if_ready()

    def _begin_if_ready(self) -> None:
        """Want the stages of opened cells, once the weights that victims start from have passed."""
        start = self.plan.start
        if start is not None and self.start_verdict is None:
            if start.key in self.blocked:
                self._close_held(*self.blocked[start.key])
                return
            if start.key not in self.done:
                self.want(start)
                return
            try:
                required = self.grid.gate.reference or 0.0
                self.start_verdict = judge_start(self.store, start, required)
            except Damaged:
                self.done.discard(start.key)
                self.want(start)
                return
            self.say(self.start_verdict.detail)
        if self.start_verdict is not None and not self.start_verdict.passes:
            self._close_held(Status.SKIPPED, self.start_verdict.detail)
            return
        held, self.held = self.held, []
        for opened in held:
            for needed in opened.wanted:
                self.want(needed)
            for group in opened.groups:
                self._judge_if_ready(group)
            for cell in opened.cells:
                self._close_if_ready(cell)

    def _close_held(self, ended: Status | Ended, detail: str) -> None:
        """None of the opened cells is begun."""
        held, self.held, status = self.held, [], Status(ended.value)
        for cell in (cell for opened in held for cell in opened.cells):
            if cell.key in self.open:
                self._close(cell, self._outcome_row(cell, status, detail), status)
        self.planned &= self.done

    def give(self, cell: CellPlan, status: Status, detail: str) -> None:
        """Give a cell an outcome that does not come from its stages."""
        rows = self._outcome_row(cell, status, detail)
        self.open.setdefault(cell.key, cell)
        self._close(cell, rows, status)

    def drop_unneeded(self, executor: Executor) -> int:
        """Forget the stages that no open cell rests on; how many of them were stopped."""
        cells = list(self.open.values())
        groups = dict.fromkeys(cell.group for cell in cells if cell.group in self.plan.gates)
        gates = [stage for group in groups for stage in self.plan.gates[group].stages]
        start: list[Stage] = [self.plan.start] if self.plan.start and cells else []
        needed = self.plan.missing([*start, *gates, *(s for c in cells for s in c.stages)], set())
        unneeded = {key for key in self.running if key not in needed}
        executor.stop(unneeded)
        self.running -= unneeded
        for key in unneeded:
            self.journal.end(key)
        self.waits = {key: waits for key, waits in self.waits.items() if key in needed}
        self.planned &= self.done | set(needed)
        return len(unneeded)

    def reopen(self, cells: Sequence[CellPlan], stages: Iterable[Key]) -> None:
        """Take cells up again, and with a clean slate the stages of theirs that failed."""
        for key in stages:
            if self.blocked.pop(key, None) is not None:
                del self.attempts[key]
        for cell in cells:
            self.verdicts.pop(cell.group, None)  # judged anew, which wants the cell's stages
        self._open_cells(cells)

    # --- what the scheduler asks

    @property
    def is_over(self) -> bool:
        return not self.open

    @property
    def is_paused(self) -> bool:
        return self.steering.is_paused

    def heed(self, executor: Executor) -> None:
        self.steering.heed(executor)

    def settled(self, key: Key) -> None:
        if self.held and self.plan.start is not None and key == self.plan.start.key:
            self._begin_if_ready()
        for group in self.groups_of.get(key, []):
            self._judge_if_ready(group)
        for cell in self.cells_of.get(key, []):
            self._close_if_ready(cell)

    def note(self, executor: Executor) -> None:
        self._note_progress(executor)

    def tell(self, executor: Executor, progress: Progress) -> None:
        progress.update(
            cells_left=len(self.open),
            stages_done=len(self.planned & self.done),
            stages_planned=len(self.planned),
            running=[stage.family for stage in executor.begun],
            waiting=len(self.later),
            seconds_left=self.journal.eta_seconds,
        )

    def _note_progress(self, executor: Executor | None, *, at_once: bool = False) -> None:
        if executor:
            self.journal.lanes, self.journal.room = executor.lanes, executor.room
        self.journal.update(
            "paused" if self.is_paused else "running",
            cells_open=len(self.open),
            cells_asked=self.asked,
            planned=self.planned,
            done=self.done | set(self.blocked),
            running={key: self.stages[key] for key in self.running},
            begun=executor.begun if executor else [],
            waiting=len(self.later),
            at_once=at_once,
        )

    # --- gates and cells

    def _judge_if_ready(self, group: Group) -> None:
        if group in self.verdicts:
            return
        gate = self.plan.gates[group]
        checks = gate.stages
        if any(m.key in self.blocked for m in checks):
            self.verdicts[group] = None
        elif all(m.key in self.done for m in checks):
            try:
                self.verdicts[group] = judge(self.store, gate, self.grid.gate)
            except Damaged as error:
                for measure in checks:
                    if measure.key == error.key:
                        self.done.discard(measure.key)
                        self.want(measure)
                return
        else:
            return
        verdict = self.verdicts[group]
        for cell in [c for c in self.open.values() if c.group == group]:
            if cell.gated and verdict is not None and verdict.passes:
                for stage in cell.stages:
                    self.want(stage)
            self._close_if_ready(cell)

    def _mend(self, cell: CellPlan, damaged: str) -> None:
        """Something that a cell's rows are read from is damaged: make it, then close the cell."""
        owner, before = self._owner(damaged), self.mended[cell.key]
        if owner is None or owner.key in self.blocked or len(before) >= MAX_ATTEMPTS:
            detail = f"{damaged} is damaged in the store and could not be made again"
            rows = self._outcome_row(cell, Status.FAILED_INFRASTRUCTURE, detail)
            self._close(cell, rows, Status.FAILED_INFRASTRUCTURE)
            return
        before.append(owner.key)
        self.cells_of[owner.key].append(cell)
        self.done.discard(owner.key)
        self.want(owner)

    def _close_if_ready(self, cell: CellPlan) -> None:
        """Write a cell's rows once its fate is known."""
        if cell.key not in self.open or self.held:
            return
        verdict = self.verdicts.get(cell.group)
        if cell.group in self.plan.gates and cell.group not in self.verdicts:
            return
        if cell.gated and verdict is not None and not verdict.passes:
            who = "victims failed their" if len(verdict.each) > 1 else "victim failed its"
            detail = f"{who} gate: {verdict.detail}"
            self._close(cell, self._outcome_row(cell, Status.SKIPPED, detail), Status.SKIPPED)
            return
        gate_keys = [m.key for m in self._checks(cell)]
        failed = [k for k in (*(s.key for s in cell.stages), *gate_keys) if k in self.blocked]
        if failed:
            ended, message = self.blocked[failed[0]]
            status = Status(ended.value)
            self._close(cell, self._outcome_row(cell, status, message), status)
        elif all(key in self.done for key in (*(s.key for s in cell.stages), *self._mends(cell))):
            try:
                rows = self.rows.measured(cell, verdict, self._tried(cell), self._reused(cell))
            except Damaged as error:
                self._mend(cell, error.key)
                return
            self._close(cell, rows, Status(rows[0]["status"]))
            self.measured.append(cell)

    def _mends(self, cell: CellPlan) -> list[Key]:
        """What the cell waits for although its measurements exist."""
        return [key for key in self.mended.get(cell.key, []) if key not in self.blocked]

    def _checks(self, cell: CellPlan) -> list[MeasureStage]:
        gate = self.plan.gates.get(cell.group)
        return gate.stages if gate else []

    def _reused(self, cell: CellPlan) -> bool:
        return self.attempts[cell.measure.key] == 0

    def _outcome_row(self, cell: CellPlan, status: Status, detail: str) -> list[dict[str, Any]]:
        return [self.rows.outcome(cell, status, detail, self._tried(cell), self._reused(cell))]

    def _tried(self, cell: CellPlan) -> int:
        """The most attempts that this run made at the victim, its defense or a measurement."""
        defended = cell.measure.defended
        own = [cell.victim.key, defended.key, defended.victim.key, *(s.key for s in cell.stages)]
        return max(self.attempts[key] for key in own)

    def _close(self, cell: CellPlan, rows: list[dict[str, Any]], status: Status) -> None:
        del self.open[cell.key]
        self.status[cell.key] = status
        if status is Status.SKIPPED:
            own = (cell.measure.key, cell.measure.defended.key)
            self.planned -= {k for k in own if k not in self.done and k not in self.waits}
        self.buffer["rows"].extend(rows)

    # --- records

    def flush(self, *, force: bool = False) -> None:
        if not (force or self.is_due):
            return
        self._tell_who_waits()
        for cell in self.measured:
            try:
                self._write_samples(cell)
            except Damaged as error:  # between its rows and now; the rows stand
                self.say(f"{cell.cell.label}: its per-image outcomes are lost: {error}")
        self.measured.clear()
        super().flush(force=True)

    def _write_samples(self, cell: CellPlan) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(self.store.need(cell.measure.key).path("samples.parquet"))
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        columns["eval_set"] = table["eval_set"].combine_chunks().cast("string")
        write_columns(self.out, "samples", {**columns, "cell": cell.key}, len(table))
        for kind, exhibit, number in exhibits.tables(self.store, cell):
            write_columns(self.out, kind, exhibit, number)


def run_grid(
    grid: Grid,
    out: Path,
    store_uri: str,
    *,
    executor: str = "ray",
    only: CellFilter | None = None,
    retry: bool = False,
    checks_nodes: bool = False,
    say: Callable[[str], None] = print,
) -> RunReport:
    """Run what is missing of a grid and report; ``checks_nodes`` of the cluster first."""
    plan = make_plan(grid)
    if only is not None:
        require_match(only, [planned.cell for planned in plan.cells])
    options: dict[str, Any] = {"executor": executor, "only": only, "retry": retry, "say": say}
    options["checks_nodes"] = checks_nodes
    return Driver(grid, out, Store(store_uri), plan=plan, **options).run()
