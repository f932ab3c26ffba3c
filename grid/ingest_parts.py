"""The parts of an ingest: what is missing is worked through, here or on a cluster, and counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grid import local_pool
from grid.progress import PartsProgress
from victims.errors import GridError
from victims.ingest.items import Job, Reason, Request
from victims.ingest.keep import choose
from victims.ingest.sources import Prepared
from victims.ingest.work import Part, read_part, run_part
from victims.pair_folders import WORK

HOPELESS_ROWS = 1000  # so many rows without any pair, and nobody waits for the others


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How an ingest is run, which changes nothing that it makes: processes, or the address of a
    Ray cluster; ``allow_skips`` publishes a corpus whatever was skipped."""

    workers: int = 1
    address: str = ""
    allow_skips: bool = False


@dataclass(slots=True)
class Run:
    """A run on one folder: the request, what the source consists of, and who listens."""

    request: Request
    out: Path
    how: How
    say: Callable[[str], None]
    prepared: Prepared = field(init=False)

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def row_bytes(self) -> int:
        return 3 * self.request.size**2


def run_parts(run: Run) -> None:
    """Work through what is missing; parts that are there are taken as they are."""
    for path in run.work.rglob(".*.tmp"):
        path.unlink(missing_ok=True)
    jobs = run.prepared.jobs
    found = [read_part(run.work, job.index, run.row_bytes) for job in jobs]
    done = {part.index: part for part in found if part is not None}
    missing = [job for job in jobs if job.index not in done]
    if done:
        run.say(f"going on: {len(done)} of {len(jobs)} parts are there")
    tally = _Tally(run, done, missing)
    with contextlib.closing(tally), contextlib.closing(_answers(run, tally, missing)) as answers:
        for part in answers:
            tally.add(part)


class _Tally:
    """What has come in, whether it is enough, and the line that says so."""

    def __init__(self, run: Run, done: dict[int, Part], missing: Sequence[Job]) -> None:
        self.run, self.done = run, done
        self.weights = {job.index: job.weight for job in missing}
        self.progress = PartsProgress(len(run.prepared.jobs), sum(self.weights.values()), run.say)
        self.rows = self.weight = 0

    def look(self, rows: int) -> None:
        """Hear of rows that were looked at since the run began."""
        self.rows = max(self.rows, rows)
        self.progress.update(parts=len(self.done), rows=self.rows, weight=self.weight)

    def tick(self) -> None:
        self.look(self.rows + 1)

    def add(self, part: Part) -> None:
        self.done[part.index] = part
        self.weight += self.weights[part.index]
        came = [p for i, p in self.done.items() if i in self.weights]
        self.look(sum(p.seen for p in came))
        seen = sum(p.seen for p in self.done.values())
        if seen >= HOPELESS_ROWS and not any(p.kept for p in self.done.values()):
            raise GridError(
                f"none of the first {seen:,} rows gave a pair: {told(self._skipped())}."
                f"{advice(self._skipped())} Nothing was published."
            )

    def _skipped(self) -> Counter[str]:
        total = Counter[str]()
        for part in self.done.values():
            total.update(part.skipped)
        return total

    def is_enough(self) -> bool:
        """Whether the parts from the first on, as far as all are there, hold the limit."""
        if self.run.request.limit is None:
            return False
        whole = next((i for i in range(len(self.done) + 1) if i not in self.done), 0)
        if sum(self.done[i].kept for i in range(whole)) < self.run.request.limit:
            return False
        return choose(self.run.work, whole, self.run.request.limit).total == self.run.request.limit

    def close(self) -> None:
        self.progress.close()


def _answers(run: Run, tally: _Tally, missing: Sequence[Job]) -> Generator[Part]:
    """The parts that are missing, as they come; jobs are handed out in order, until the limit."""

    def arguments() -> Iterator[tuple[Job, Request, Path]]:
        for job in missing:
            if tally.is_enough():
                return
            yield (job, run.request, run.work)

    if run.how.address:
        from grid.cluster.joining import joined
        from grid.machines import map_on_cluster

        with joined(run.how.address):
            yield from map_on_cluster(run_part, arguments(), lambda: tally.look(0))
    elif run.how.workers > 1 and len(missing) > 1:
        workers = min(run.how.workers, len(missing))
        modules = run_part.__module__
        yield from local_pool.map_locally(_in_pool, arguments(), workers, tally.look, modules)
    else:
        for job, request, work in arguments():
            yield run_part(job, request, work, tally.tick)


def _in_pool(job: Job, request: Request, work: Path) -> Part:
    return run_part(job, request, work, local_pool.tick, local_pool.stopped)


def told(skipped: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in skipped.most_common())


def advice(skipped: Mapping[str, int]) -> str:
    """What most often is behind the commonest reason."""
    said = {
        Reason.MISSING_IMAGE: " Is --root the folder that the paths are below?",
        Reason.OUTSIDE_ROOT: " Is --root the folder that the paths are below?",
        Reason.MISSING_CAPTION: " Is --caption-column the right one?",
        Reason.CORRUPT_IMAGE: " Is --image-column the right one?",
    }
    worst = max(skipped, key=lambda reason: skipped[reason], default="")
    return said.get(Reason(worst), "") if worst else ""
