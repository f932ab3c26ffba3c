"""The driver: it owns the order of stages, retries, gates and rows. The store owns the work.

Killing it loses nothing but the seconds since the last mid-fit checkpoints: the same command plans
again, finds what exists, and goes on.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grid.chains import write_chains
from grid.cluster import Executor, start_executor
from grid.filters import CellFilter, require_match
from grid.journal import Journal
from grid.lock import only_driver
from grid.order import priorities
from grid.plan import (
    CellPlan,
    Group,
    History,
    Plan,
    finished,
    longest_chain,
    make_plan,
    parents,
)
from grid.preflight import preflight
from grid.progress import Progress
from grid.quick import SETTLED, exit_code, outcomes_in
from grid.results import RowMaker, Verdict, commit, judge, planned_cells, versions
from grid.schema import Status, write_columns, write_grid, write_rows, write_table, write_whole
from grid.spec import Grid
from grid.stages import MeasureStage, PoisonStage, Stage
from grid.steering import Steering
from grid.work import Ended, Outcome
from victims.errors import GridError
from victims.keys import Key
from victims.recipe import Runtime
from victims.store import Damaged, Store

MAX_ATTEMPTS = 3
FLUSH_SECONDS = 5.0
BUSY_SECONDS = 0.5


@dataclass(slots=True)
class RunReport:
    """What a run did, for people and for benchmarks; also written as ``run.json``."""

    grid: str
    cells: int
    counts: dict[str, int]
    stages_run: int
    victims_trained: int
    victims: int
    victims_found: int
    victims_missing: int
    wall_seconds: float
    ray_start_seconds: float
    lower_bound_seconds: float
    lanes: int
    attempts: int
    trained: dict[str, int] = field(default_factory=dict)
    remaining: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def code(self) -> int:
        """0 complete, 1 stopped by an error, 3 incomplete, 4 a victim failed its gate."""
        if self.problem:
            return 1
        return 3 if self.remaining else exit_code(self.counts)

    @property
    def victims_told(self) -> str:
        """What became of the victims, in words."""
        num_trained = self.victims - self.victims_found - self.victims_missing
        again = self.victims_trained > num_trained
        each = f", in {self.victims_trained} fits" if again else ", each once"
        words = [
            f"{num_trained} trained{each if again or num_trained > 1 else ''}",
            f"{self.victims_found} found in the store",
            f"{self.victims_missing} not there",
        ]
        numbers = (num_trained, self.victims_found, self.victims_missing)
        told = ", ".join(word for word, number in zip(words, numbers, strict=True) if number)
        noun = "victim" if self.victims == 1 else "victims"
        return f"{self.victims} {noun}: {told}" if told else "no victims"


@contextlib.contextmanager
def _clear_errors(out: Path) -> Iterator[None]:
    """What the file system says about the results directory, as one message."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(out):
            raise
        raise GridError(
            f"{error.filename}: {error.strerror}. Nothing was half-written; make room or give"
            " another --out, then run the same command again."
        ) from error


class Driver:
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
        self.grid, self.out, self.store = grid, out, store
        self.executor_name, self.say, self.checks_nodes = executor, say, checks_nodes
        self.plan: Plan = plan or make_plan(grid)
        self.only, self.retry = only, retry
        execution = grid.execution
        self.runtime = Runtime(
            device=execution.device,
            threads=execution.threads,
            checkpoint_seconds=execution.checkpoint_seconds,
            keep_optimizer=execution.keep_optimizer,
        )
        self.history = History(Path(store.root, "history.json") if store.local else None)
        self.journal = Journal(out, self.history, always=executor == "serial")
        self.steering = Steering(self)
        self.rows = RowMaker(self.plan, store, self.runtime, set())
        self.status: dict[str, str] = {}
        self.truths: dict[str, Stage] = {
            stage.truth_key: stage
            for stage in self.plan.stages.values()
            if isinstance(stage, PoisonStage)
        }
        # The scheduler's state.
        self.done: set[Key] = set()
        self.blocked: dict[Key, tuple[Ended, str]] = {}
        self.waits: dict[Key, set[Key]] = {}
        self.children: dict[Key, set[Key]] = defaultdict(set)
        self.ready: list[tuple[float, int, Key]] = []
        self.later: list[tuple[float, Key]] = []
        self.running: set[Key] = set()
        self.attempts: Counter[Key] = Counter()
        self.priority: dict[Key, float] = {}
        self.planned: set[Key] = set()
        self.asked = 0
        self.told_to_wait = -60.0
        self.seconds: dict[Key, float] = {}
        self.made: Counter[str] = Counter()
        self.verdicts: dict[Group, Verdict | None] = {}
        self.open: dict[Key, CellPlan] = {}
        self.cells_of: dict[Key, list[CellPlan]] = defaultdict(list)
        self.groups_of: dict[Key, list[Group]] = defaultdict(list)
        self.mended: dict[Key, list[Key]] = defaultdict(list)
        self.buffer: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.measured: list[CellPlan] = []
        self.flushed = time.monotonic()
        self.problem = ""
        self.sequence = 0

    # --- from cells to wanted stages

    def run(self) -> RunReport:
        started = time.perf_counter()
        with only_driver(self.out), _clear_errors(self.out):
            self.status = {cell: status for cell, (status, _) in outcomes_in(self.out).items()}
            self._announce()
            executor = None
            try:
                self.steering.heed()
                todo = self._todo()
                if todo:
                    for words in self.plan.cautions():
                        self.say(f"caution: {words}")
                    (self.out / "logs").mkdir(exist_ok=True)
                    self.done = finished(self.store, self.plan)
                    self._open_cells(todo)
                if self.open:
                    executor = self._work(len(todo))
                self._tell_how_it_ended(executor)
            except BaseException as error:
                self.journal.state("stopped", str(error) or type(error).__name__)
                raise
            finally:
                self.flush(force=True)
            return self._report(started, executor)

    def settle(self) -> None:
        """Carry out what was asked of a run that is not alive; no stage runs."""
        with only_driver(self.out), _clear_errors(self.out):
            self.status = {cell: status for cell, (status, _) in outcomes_in(self.out).items()}
            self.rows.first_cells = _first_cells(self.out) or set()
            self.steering.heed()
            self.flush(force=True)

    def _tell_how_it_ended(self, executor: Executor | None) -> None:
        """Cells that nobody runs until they are requeued, for who wonders; then the last word."""
        cancelled = [c for c in self.plan.cells if self.status.get(c.key) == Status.CANCELLED]
        if cancelled:
            self.say(f"{len(cancelled)} cells are cancelled; `grid requeue` opens them again")
        if self.asked:
            self._note_progress(executor, at_once=True)
        self.journal.state("stopped" if self.problem else "ended", self.problem)

    def _work(self, num_cells: int) -> Executor:
        """Run stages until every cell that can be closed is; then give everything back."""
        self.journal.state("starting")
        executor = start_executor(
            self.executor_name,
            self.grid.execution,
            self.store.uri,
            self.runtime,
            str((self.out / "logs").resolve()),
        )
        with contextlib.ExitStack() as closing:
            # Each of these runs even where another one fails; the last one named comes first.
            closing.callback(executor.close)
            closing.callback(self.history.save)
            progress = Progress(num_cells, self.say)
            closing.callback(progress.close)
            closing.callback(self.flush, force=True)
            if self.checks_nodes:
                preflight(executor, self.plan, self.store.uri, self.say)
            self._fit_or_wait(executor)
            executor.warm()
            self._loop(executor, progress)
        return executor

    def _announce(self) -> None:
        """Write what is planned, so that a board knows from the start what is missing."""
        name, number = self.grid.name, self.grid.identity_hash
        write_grid(self.out, name, number, planned_cells(self.plan))
        write_whole(self.out / "grid.yaml", self.grid.text)
        write_chains(self.out, self.plan, self.store.shown)
        first = _first_cells(self.out)
        if first is None:
            first = {cell.key for cell in self.plan.cells}
            write_whole(self.out / "first_cells.json", json.dumps(sorted(first)))
        self.rows.first_cells = first
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
        everything = [*wanted, *(measure for cell in todo for measure in cell.stages)]
        missing = self.plan.missing(everything, self.done)
        if not self.planned:
            self.journal.found = len(self.plan.missing(everything, set())) - len(missing)
        self.planned |= set(missing)
        seconds = {key: self.history.seconds(stage) for key, stage in missing.items()}
        self.priority |= priorities(self.plan, missing, seconds)
        gpus = {key: self._gpus(stage) for key, stage in missing.items()}
        self.journal.expect(missing, gpus, self.priority)
        for needed in wanted:
            self._want(needed)
        for group in groups:
            self._judge_if_ready(group)
        for cell in todo:
            self._close_if_ready(cell)

    def _want(self, stage: Stage, also: Iterable[Stage] = ()) -> None:
        """Schedule a stage and, first, whatever it needs and the store does not hold.

        ``also`` are further stages that it waits for.
        """
        key = stage.key
        if key in self.done or key in self.waits or key in self.running:
            return
        if key in self.blocked:
            return
        self.waits[key] = set()
        for parent in (*parents(stage), *also):
            self._want(parent)
            if parent.key not in self.done:
                self.waits[key].add(parent.key)
                self.children[parent.key].add(key)
            if parent.key in self.blocked:
                self._block(key, *self.blocked[parent.key])
                return
        self._ready_if_free(key)

    def _ready_if_free(self, key: Key) -> None:
        if key in self.waits and not self.waits[key] and key not in self.running:
            self.sequence += 1
            heapq.heappush(self.ready, (-self.priority.get(key, 0.0), self.sequence, key))

    def _gpus(self, stage: Stage) -> float:
        wants = self.grid.execution.resources_for(stage.kind)
        return wants.gpus * wants.workers

    def put_back(self, key: Key) -> None:
        """A stage that was handed over and taken back before it ended."""
        self.journal.end(key)
        self._ready_if_free(key)

    def record(self, cell: CellPlan, status: Status, detail: str) -> None:
        """Give a cell an outcome that does not come from its stages."""
        rows = self._outcome_row(cell, status, detail)
        self.open.setdefault(cell.key, cell)
        self._close(cell, rows, status)

    def drop_unneeded(self, executor: Executor) -> int:
        """Forget the stages that no open cell rests on; how many of them were stopped."""
        cells = list(self.open.values())
        groups = dict.fromkeys(cell.group for cell in cells if cell.group in self.plan.gates)
        gates = [stage for group in groups for stage in self.plan.gates[group].stages]
        needed = self.plan.missing([*gates, *(s for c in cells for s in c.stages)], set())
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

    # --- the loop

    def _fit_or_wait(self, executor: Executor) -> None:
        """Refuse what no node can hold; on a shared cluster, wait a stated time for such a node."""
        kinds = {self.plan.stages[key].kind: self.plan.stages[key] for key in self.planned}
        limit = 0.0 if executor.owns_cluster else self.grid.execution.wait_seconds
        started, said = time.monotonic(), -60.0
        while (problem := executor.check(list(kinds.values()))) is not None:
            waited = time.monotonic() - started
            if waited >= limit:
                raise GridError(f"{problem} (waited {waited:.0f} s of {limit:.0f})")
            if waited - said >= 60:
                self.say(f"waiting for resources: {problem} Giving up after {limit:.0f} s.")
                said = waited
            time.sleep(2)

    def _wait_for_a_place(self, executor: Executor) -> None:
        """Say that others hold what the stages ask for, and give up after the stated time.

        While a stage of ours runs, the others wait for it and not for somebody else.
        """
        starved = executor.starved()
        if starved is None:
            self.told_to_wait = -60.0
            return
        limit = self.grid.execution.wait_seconds
        if starved.seconds >= limit:
            raise GridError(
                f"{starved.words} No stage could start in {starved.seconds:.0f} s"
                f" (execution.wait_seconds: {limit:g}). Run the same command when they are free,"
                " or ask for less in execution.resources."
            )
        if starved.seconds >= min(30, limit / 2) and starved.seconds - self.told_to_wait >= 60:
            self.say(f"waiting for resources: {starved.words} Giving up after {limit:g} s.")
            self.told_to_wait = starved.seconds

    def _loop(self, executor: Executor, progress: Progress) -> None:
        if self.steering.is_paused:
            self.say("paused: nothing starts until `grid resume`")
        while self.open and not self.problem:
            self.steering.heed(executor)
            now = time.monotonic()
            while self.later and self.later[0][0] <= now:
                _, key = heapq.heappop(self.later)
                self._ready_if_free(key)
            while self.ready and executor.running < executor.window and not self._is_paused:
                _, _, key = heapq.heappop(self.ready)
                if key in self.done or key in self.running or key not in self.waits:
                    continue
                self.running.add(key)
                self.journal.submit(key)
                executor.submit(self.plan.stages[key])
            if not executor.running and not self.ready and not self.later:
                break
            self._note_progress(executor)
            if self._is_paused and not executor.running:
                time.sleep(BUSY_SECONDS)
            for outcome in executor.poll(BUSY_SECONDS):
                self._take(outcome)
            self._wait_for_a_place(executor)
            progress.update(
                cells_left=len(self.open),
                stages_done=len(self.planned & self.done),
                stages_planned=len(self.planned),
                running=[stage.family for stage in executor.begun],
                waiting=len(self.later),
            )
            self.flush()
        if self.problem:
            self.say(self.problem)

    @property
    def _is_paused(self) -> bool:
        return self.steering.is_paused

    def _note_progress(self, executor: Executor | None, *, at_once: bool = False) -> None:
        self.journal.lanes = executor.lanes if executor else 1
        self.journal.update(
            "paused" if self._is_paused else "running",
            cells_open=len(self.open),
            cells_asked=self.asked,
            planned=self.planned,
            done=self.done | set(self.blocked),
            running={key: self.plan.stages[key] for key in self.running},
            begun=executor.begun if executor else [],
            waiting=len(self.later),
            at_once=at_once,
        )

    def _take(self, outcome: Outcome) -> None:
        """One attempt ended."""
        key = Key(outcome.key)
        stage = self.plan.stages[key]
        self.running.discard(key)
        self.journal.end(key)
        if outcome.ended is Ended.BUSY:
            # Another driver makes it: look again soon, without holding a lane.
            if key in self.store:
                self._finish(key)
            else:
                heapq.heappush(self.later, (time.monotonic() + BUSY_SECONDS, key))
            return
        self.attempts[key] += 1
        self._record(stage, outcome)
        if outcome.ended is Ended.OK:
            self.made.update(outcome.made)
            self.seconds[key] = outcome.seconds
            if key in outcome.made:
                self.history.record(stage, outcome.seconds)
                self.journal.made += 1
            else:
                self.journal.found += 1
            self._finish(key)
        elif outcome.ended is Ended.NO_SPACE:
            self.problem = outcome.message
        elif outcome.ended is Ended.DAMAGED and self.attempts[key] < MAX_ATTEMPTS:
            self._remake(stage, outcome.damaged)
        elif outcome.ended is Ended.INFRASTRUCTURE and self.attempts[key] < MAX_ATTEMPTS:
            self.say(f"{key} ({stage.family}) will be tried again: {outcome.message}")
            self._ready_if_free(key)
        else:
            ended = Ended.METHOD if outcome.ended is Ended.METHOD else Ended.INFRASTRUCTURE
            self._block(key, ended, f"{stage.family}: {outcome.message}")

    def _finish(self, key: Key) -> None:
        self.done.add(key)
        self.waits.pop(key, None)
        for child in self.children.pop(key, set()):
            if child in self.waits:
                self.waits[child].discard(key)
                self._ready_if_free(child)
        for group in self.groups_of.get(key, []):
            self._judge_if_ready(group)
        for cell in self.cells_of.get(key, []):
            self._close_if_ready(cell)

    def _owner(self, artefact: str) -> Stage | None:
        """The stage that leaves an artefact; None for what a defense makes on its way."""
        return self.plan.stages.get(Key(artefact)) or self.truths.get(artefact)

    def _remake(self, stage: Stage, damaged: str) -> None:
        """Something a stage reads turned out to be damaged: make it again, then come back."""
        self.say(f"{damaged} was damaged in the store and is made again")
        owner = self._owner(damaged)
        owners = [owner] if owner else [p for p in parents(stage) if p.kind == "defended"]
        for found in owners:
            if owner is None:
                self.store.discard(found.key, f"it rests on {damaged}, which is damaged")
            if found.key != stage.key:
                self.done.discard(found.key)
        self.waits.pop(stage.key, None)
        # What is damaged need not be a parent: a measurement loads its victim's weights through
        # the defended stage between them.
        self._want(stage, also=[found for found in owners if found.key != stage.key])

    def _block(self, key: Key, ended: Ended, message: str) -> None:
        """A stage that will not be made: so are all that wait for it, and their cells."""
        self.blocked[key] = (ended, message)
        self.waits.pop(key, None)
        for child in self.children.pop(key, set()):
            if child in self.waits:
                self._block(child, ended, message)
        for group in self.groups_of.get(key, []):
            self._judge_if_ready(group)
        for cell in self.cells_of.get(key, []):
            self._close_if_ready(cell)

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
                        self._want(measure)
                return
        else:
            return
        verdict = self.verdicts[group]
        for cell in [c for c in self.open.values() if c.group == group]:
            if cell.gated and verdict is not None and verdict.passes:
                for stage in cell.stages:
                    self._want(stage)
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
        self._want(owner)

    def _close_if_ready(self, cell: CellPlan) -> None:
        """Write a cell's rows once its fate is known."""
        if cell.key not in self.open:
            return
        verdict = self.verdicts.get(cell.group)
        if cell.group in self.plan.gates and cell.group not in self.verdicts:
            return
        if cell.gated and verdict is not None and not verdict.passes:
            detail = f"victim failed its gate: {verdict.detail}"
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
                rows = self.rows.measured(
                    cell, verdict, self.attempts[cell.measure.key], self._reused(cell)
                )
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
        attempts = max((self.attempts[s.key] for s in cell.stages), default=0)
        return [self.rows.outcome(cell, status, detail, attempts, self._reused(cell))]

    def _close(self, cell: CellPlan, rows: list[dict[str, Any]], status: Status) -> None:
        del self.open[cell.key]
        self.status[cell.key] = status
        if status is Status.SKIPPED:
            own = (cell.measure.key, cell.measure.defended.key)
            self.planned -= {k for k in own if k not in self.done and k not in self.waits}
        self.buffer["rows"].extend(rows)

    # --- records

    def _record(self, stage: Stage, outcome: Outcome) -> None:
        from datetime import UTC, datetime

        started = datetime.fromtimestamp(outcome.started, UTC)
        ended = datetime.fromtimestamp(outcome.started + outcome.seconds, UTC)
        common = {
            "key": stage.key,
            "attempt": self.attempts[stage.key],
            "seconds": outcome.seconds,
            "host": outcome.host,
            "pid": outcome.pid,
            "started_at": started,
        }
        self.buffer["attempts"].append(
            {**common, "outcome": outcome.ended.value, "error": outcome.message or None}
        )
        if outcome.ended not in (Ended.OK, Ended.METHOD):
            self.flushed = 0.0  # what tells of a fault must not be lost to the next one
        if outcome.ended is Ended.OK:
            self.buffer["stages"].append(
                {
                    **common,
                    "kind": stage.kind,
                    "name": stage.family,
                    "ended_at": ended,
                    "inputs": [p.key for p in parents(stage)],
                    "reused": stage.key not in outcome.made,
                    "device": outcome.device,
                    "threads": outcome.threads,
                    "commit": commit(),
                    "device_seconds": outcome.cost.get("train_seconds"),
                    "pair_views": int(outcome.cost.get("images_backward", 0)),
                    "peak_memory_bytes": outcome.peak_memory_bytes,
                    "versions": versions(),
                }
            )

    def flush(self, *, force: bool = False) -> None:
        """Write what has gathered: new files only, each renamed into place when whole."""
        if not force and time.monotonic() - self.flushed < FLUSH_SECONDS:
            return
        self.flushed = time.monotonic()
        for cell in self.measured:
            try:
                self._write_samples(cell)
            except Damaged as error:  # between its rows and now; the rows stand
                self.say(f"{cell.cell.label}: its per-image outcomes are lost: {error}")
        self.measured.clear()
        for kind, records in self.buffer.items():
            if records and kind == "rows":
                write_rows(self.out, records)
            elif records:
                write_table(self.out, kind, records)
        self.buffer.clear()

    def _write_samples(self, cell: CellPlan) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(self.store.need(cell.measure.key).path("samples.parquet"))
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        columns["eval_set"] = table["eval_set"].combine_chunks().cast("string")
        write_columns(self.out, "samples", {**columns, "cell": cell.key}, len(table))

    def _report(self, started: float, executor: Executor | None) -> RunReport:
        wanted = [c for c in self.plan.cells if self.only is None or self.only.matches(c.cell)]
        counts = Counter(str(self.status.get(c.key, Status.MISSING)) for c in wanted)
        counts[Status.NOT_APPLICABLE.value] += len(self.plan.refused)
        all_victims = {c.measure.defended.victim.key for c in self.plan.cells}
        # Of the cells asked for, and what their gates had trained besides.
        victims = {c.measure.defended.victim.key for c in wanted}
        victims |= {key for key in all_victims if self.made[key]}
        there = self.done or finished(self.store, self.plan)
        ran = {k: self.plan.stages[k] for k in self.seconds}
        chains = longest_chain(_ordered(self.plan, ran), self.seconds) if ran else {}
        lanes = executor.lanes if executor else 1
        report = RunReport(
            grid=self.grid.name,
            cells=len(wanted) + len(self.plan.refused),
            counts={k: v for k, v in counts.items() if v},
            stages_run=len(self.seconds),
            victims_trained=sum(self.made[k] for k in victims),
            victims=len(victims),
            victims_found=len([k for k in victims if not self.made[k] and k in there]),
            victims_missing=len([k for k in victims if not self.made[k] and k not in there]),
            wall_seconds=time.perf_counter() - started,
            ray_start_seconds=executor.start_seconds if executor else 0.0,
            lower_bound_seconds=max(
                max(chains.values(), default=0.0), sum(self.seconds.values()) / lanes
            ),
            lanes=lanes,
            attempts=sum(self.attempts.values()),
            trained={k: n for k, n in sorted(self.made.items()) if k.startswith("model-")},
            remaining=[c.cell.label for c in wanted if self.status.get(c.key) not in SETTLED],
            problem=self.problem,
        )
        body = {name: getattr(report, name) for name in report.__slots__}
        with contextlib.suppress(OSError):
            write_whole(self.out / "run.json", json.dumps(body, indent=1, sort_keys=True))
        return report


def _ordered(plan: Plan, ran: Mapping[Key, Stage]) -> dict[Key, Stage]:
    """The stages that ran, inputs first."""
    return plan.missing(ran.values(), set(plan.stages) - set(ran))


def _first_cells(out: Path) -> set[str] | None:
    """The cells of the grid as it was first run here; None before the first run."""
    try:
        return set(json.loads((out / "first_cells.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


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
