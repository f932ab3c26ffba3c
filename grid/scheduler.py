"""The order of stages: what waits for what, what is tried again, and what is recorded of it.

A `Scheduler` owns no results. It makes stages in the store until its subclass is content: a grid's
driver when every cell has its rows, a campaign when its victims are there.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grid.assumed import assumed_device
from grid.execution import Execution
from grid.executors import Executor, start_executor
from grid.history import History
from grid.journal import Journal
from grid.logbook import Logbook
from grid.progress import Progress
from grid.results import commit, versions
from grid.schema.writing import write_rows, write_table
from grid.stage_order import parents
from grid.stages import PoisonStage, Stage
from grid.work import Ended, Outcome
from victims.errors import GridError, counted
from victims.keys import Key
from victims.recipe import Runtime
from victims.store import Store

MAX_ATTEMPTS = 3
FLUSH_SECONDS = 5.0
BUSY_SECONDS = 0.5


@contextlib.contextmanager
def clear_errors(out: Path) -> Iterator[None]:
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


class Scheduler:
    """Makes stages and what they need, each once. A subclass says what is wanted, what to do when
    a stage has been made or cannot be, and when nothing is left to wait for."""

    def __init__(
        self,
        stages: Mapping[Key, Stage],
        execution: Execution,
        out: Path,
        store: Store,
        *,
        executor: str,
        say: Callable[[str], None],
    ) -> None:
        self.stages, self.execution, self.out, self.store = stages, execution, out, store
        self.executor_name, self.say = executor, say
        self.runtime = Runtime(
            device=execution.device,
            threads=execution.threads,
            checkpoint_seconds=execution.checkpoint_seconds,
            keep_optimizer=execution.keep_optimizer,
            checkpoint_activations=execution.checkpoint_activations,
        )
        past = Path(store.root, "history.json") if store.local else None
        self.history = History(past, assumed_device(execution))
        self.logbook = Logbook(out)
        self.journal = Journal(out, self.history, self.logbook, always=executor == "serial")
        self.truths: dict[str, Stage] = {
            stage.truth_key: stage for stage in stages.values() if isinstance(stage, PoisonStage)
        }
        self.done: set[Key] = set()
        self.blocked: dict[Key, tuple[Ended, str]] = {}
        self.waits: dict[Key, set[Key]] = {}
        self.children: dict[Key, set[Key]] = defaultdict(set)
        # By kind: those of one kind do not wait for a place that another asks for.
        self.ready: dict[str, list[tuple[float, int, Key]]] = defaultdict(list)
        self.later: list[tuple[float, Key]] = []
        self.running: set[Key] = set()
        self.attempts: Counter[Key] = Counter()
        self.priority: dict[Key, float] = {}
        self.planned: set[Key] = set()
        self.told_to_wait = -60.0
        self.seconds: dict[Key, float] = {}
        self.made: Counter[str] = Counter()
        self.buffer: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self.flushed = time.monotonic()
        self.problem = ""
        self.sequence = 0

    # --- what a subclass says

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to wait for."""
        raise NotImplementedError

    @property
    def is_paused(self) -> bool:
        """Whether no stage may start now."""
        return False

    def settled(self, key: Key) -> None:
        """A stage has been made, or never will be."""

    def heed(self, executor: Executor) -> None:
        """Called at every turn of the loop, before stages are handed over."""

    def note(self, executor: Executor) -> None:
        """Called at every turn of the loop, once stages have been handed over."""

    def tell(self, executor: Executor, progress: Progress) -> None:
        """Called at every turn of the loop, once outcomes have come in, for whoever watches."""

    def before_stages(self, executor: Executor) -> None:
        """Called once, when the executor is there and before the first stage."""

    # --- running

    def recover(self) -> None:
        """Put on record what a driver did here that was killed."""
        if lost := self.logbook.recover():
            told = counted(lost, "stage")
            self.say(f"{told} ran when the driver before this one died; that is on record")

    def start(self) -> Executor:
        """What stages run on, as the grid file asks for it."""
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        return start_executor(
            self.executor_name,
            self.execution,
            self.store.uri,
            self.runtime,
            str((self.out / "logs").resolve()),
        )

    def work(self, executor: Executor, num_cells: int) -> None:
        """Run stages until it is over; then save what was learnt."""
        with contextlib.ExitStack() as closing:
            # Each of these runs even where another one fails; the last one named comes first.
            closing.callback(self.history.save)
            progress = Progress(num_cells, self.say)
            closing.callback(progress.close)
            closing.callback(self.flush, force=True)
            self.before_stages(executor)
            self._fit_or_wait(executor)
            executor.warm()
            self._loop(executor, progress)

    # --- what waits for what

    def want(self, stage: Stage, also: Iterable[Stage] = ()) -> None:
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
            self.want(parent)
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
            turn = (-self.priority.get(key, 0.0), self.sequence, key)
            heapq.heappush(self.ready[self.stages[key].kind], turn)

    def _gpus(self, stage: Stage) -> float:
        wants = self.execution.resources_for(stage.kind)
        return wants.gpus * wants.workers

    def put_back(self, key: Key) -> None:
        """A stage that was handed over and taken back before it ended."""
        self.journal.end(key)
        self._ready_if_free(key)

    def _fit_or_wait(self, executor: Executor) -> None:
        """Refuse what no node can hold; on a shared cluster, wait a stated time for such a node."""
        kinds = {self.stages[key].kind: self.stages[key] for key in self.planned}
        limit = 0.0 if executor.owns_cluster else self.execution.wait_seconds
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
        limit = self.execution.wait_seconds
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
        if self.is_paused:
            self.say("paused: nothing starts until `grid resume`")
        while not self.is_over and not self.problem:
            self.heed(executor)
            now = time.monotonic()
            while self.later and self.later[0][0] <= now:
                _, key = heapq.heappop(self.later)
                self._ready_if_free(key)
            while not self.is_paused and (chosen := self._next(executor)) is not None:
                key = chosen
                self.running.add(key)
                self.journal.submit(key, self.attempts[key] + 1)
                executor.submit(self.stages[key])
            if not executor.running and not any(self.ready.values()) and not self.later:
                break
            self.note(executor)
            if self.is_paused and not executor.running:
                time.sleep(BUSY_SECONDS)
            for outcome in executor.poll(BUSY_SECONDS):
                self._take(outcome)
            self._wait_for_a_place(executor)
            self.tell(executor, progress)
            self.flush()
        if self.problem:
            self.say(self.problem)

    def _next(self, executor: Executor) -> Key | None:
        """The stage with the longest chain behind it, of the kinds that there is room for."""
        heads = []
        for kind, heap in self.ready.items():
            while heap and not self._is_open(heap[0][2]):
                heapq.heappop(heap)
            if heap and executor.admits(kind):
                heads.append((heap[0], kind))
        if not heads:
            return None
        _, kind = min(heads)
        return heapq.heappop(self.ready[kind])[2]

    def _is_open(self, key: Key) -> bool:
        return key in self.waits and key not in self.done and key not in self.running

    def _take(self, outcome: Outcome) -> None:
        """One attempt ended."""
        key = Key(outcome.key)
        stage = self.stages[key]
        self.running.discard(key)
        if outcome.ended is Ended.BUSY:
            # Another driver makes it: look again soon, without holding a lane.
            self.journal.end(key)
            if key in self.store:
                self._finish(key)
            else:
                heapq.heappush(self.later, (time.monotonic() + BUSY_SECONDS, key))
            return
        self.attempts[key] += 1
        self._record(stage, outcome)
        self.journal.end(key)
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
        elif self._is_worth_another(outcome, self.attempts[key]):
            self.say(f"{key} ({stage.family}) will be tried again: {outcome.message}")
            self._ready_if_free(key)
        else:
            ended = Ended.METHOD if outcome.ended is Ended.METHOD else Ended.INFRASTRUCTURE
            self._block(key, ended, f"{stage.family}: {outcome.message}")

    def _is_worth_another(self, outcome: Outcome, attempts: int) -> bool:
        return outcome.ended is Ended.INFRASTRUCTURE and outcome.again and attempts < MAX_ATTEMPTS

    def _finish(self, key: Key) -> None:
        self.done.add(key)
        self.waits.pop(key, None)
        for child in self.children.pop(key, set()):
            if child in self.waits:
                self.waits[child].discard(key)
                self._ready_if_free(child)
        self.settled(key)

    def _owner(self, artefact: str) -> Stage | None:
        """The stage that leaves an artefact; None for what a defense makes on its way."""
        return self.stages.get(Key(artefact)) or self.truths.get(artefact)

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
        self.want(stage, also=[found for found in owners if found.key != stage.key])

    def _block(self, key: Key, ended: Ended, message: str) -> None:
        """A stage that will not be made: so are all that wait for it, and their cells."""
        self.blocked[key] = (ended, message)
        self.waits.pop(key, None)
        for child in self.children.pop(key, set()):
            if child in self.waits:
                self._block(child, ended, message)
        self.settled(key)

    def _record(self, stage: Stage, outcome: Outcome) -> None:
        about = {
            "kind": stage.kind,
            "name": stage.family,
            "inputs": [p.key for p in parents(stage)],
            "attempt": self.attempts[stage.key],
        }
        self.record(about, stage.key, outcome)

    def record(self, about: Mapping[str, Any], key: Key, outcome: Outcome) -> None:
        """What became of an attempt at a stage of this kind, name, and inputs."""
        started = datetime.fromtimestamp(outcome.started, UTC)
        ended = datetime.fromtimestamp(outcome.started + outcome.seconds, UTC)
        common = {
            "key": key,
            "attempt": about["attempt"],
            "seconds": outcome.seconds,
            "host": outcome.host,
            "pid": outcome.pid,
            "started_at": started,
        }
        records: dict[str, dict[str, Any]] = {
            "attempts": {
                **common,
                "outcome": outcome.ended.value,
                "error": outcome.message or None,
            }
        }
        if outcome.ended is Ended.OK:
            records["stages"] = {
                **common,
                "kind": about["kind"],
                "name": about["name"],
                "ended_at": ended,
                "inputs": about["inputs"],
                "reused": key not in outcome.made,
                "device": outcome.device,
                "threads": outcome.threads,
                "commit": commit(),
                "device_seconds": outcome.cost.get("train_seconds"),
                "pair_views": int(outcome.cost.get("images_backward", 0)),
                "peak_memory_bytes": outcome.peak_memory_bytes,
                "versions": versions(),
            }
        self.logbook.record(records)
        for kind, record in records.items():
            self.buffer[kind].append(record)

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.flushed >= FLUSH_SECONDS

    def flush(self, *, force: bool = False) -> None:
        """Write what has gathered: new files only, each renamed into place when whole."""
        if not force and not self.is_due:
            return
        self.flushed = time.monotonic()
        for kind, records in self.buffer.items():
            if records and kind == "rows":
                write_rows(self.out, records)
            elif records:
                write_table(self.out, kind, records)
        self.buffer.clear()
        self.logbook.written()
