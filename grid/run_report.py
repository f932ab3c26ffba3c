"""What a run did, counted once it is over."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grid.executors import Executor
from grid.plan import Plan, finished
from grid.quick import SETTLED, exit_code
from grid.room import busiest
from grid.schema.status import Status
from grid.schema.whole import write_whole
from grid.stage_order import longest_chain
from grid.stages import Stage
from victims.keys import Key

if TYPE_CHECKING:
    from grid.run import Driver


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
        """0 complete, 1 stopped by an error, 3 incomplete, 4 victims failed their gate."""
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


def reported(driver: Driver, started: float, executor: Executor | None) -> RunReport:
    """Count what a run did, and leave it as ``run.json``."""
    wanted = [c for c in driver.plan.cells if driver.only is None or driver.only.matches(c.cell)]
    counts = Counter(str(driver.status.get(c.key, Status.MISSING)) for c in wanted)
    counts[Status.NOT_APPLICABLE.value] += len(driver.plan.refused)
    all_victims = {c.measure.defended.victim.key for c in driver.plan.cells}
    # Of the cells asked for, and what their gates had trained besides.
    victims = {c.measure.defended.victim.key for c in wanted}
    victims |= {key for key in all_victims if driver.made[key]}
    there = driver.done or finished(driver.store, driver.plan)
    ran = {k: driver.plan.stages[k] for k in driver.seconds}
    chains = longest_chain(_ordered(driver.plan, ran), driver.seconds) if ran else {}
    work: dict[str, float] = defaultdict(float)
    for key, seconds in driver.seconds.items():
        work[driver.stages[key].kind] += seconds
    at_best = busiest(work, executor.room) if executor else 0.0
    report = RunReport(
        grid=driver.grid.name,
        cells=len(wanted) + len(driver.plan.refused),
        counts={k: v for k, v in counts.items() if v},
        stages_run=len(driver.seconds),
        victims_trained=sum(driver.made[k] for k in victims),
        victims=len(victims),
        victims_found=len([k for k in victims if not driver.made[k] and k in there]),
        victims_missing=len([k for k in victims if not driver.made[k] and k not in there]),
        wall_seconds=time.perf_counter() - started,
        ray_start_seconds=executor.start_seconds if executor else 0.0,
        lower_bound_seconds=max(max(chains.values(), default=0.0), at_best),
        lanes=executor.lanes if executor else 1,
        attempts=sum(driver.attempts.values()),
        trained={k: n for k, n in sorted(driver.made.items()) if k.startswith("model-")},
        remaining=[c.cell.label for c in wanted if driver.status.get(c.key) not in SETTLED],
        problem=driver.problem,
    )
    body = {name: getattr(report, name) for name in report.__slots__}
    with contextlib.suppress(OSError):
        write_whole(driver.out / "run.json", json.dumps(body, indent=1, sort_keys=True))
    return report


def _ordered(plan: Plan, ran: Mapping[Key, Stage]) -> dict[Key, Stage]:
    """The stages that ran, inputs first."""
    return plan.missing(ran.values(), set(plan.stages) - set(ran))
