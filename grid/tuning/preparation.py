"""What stands before the trials of a campaign, by the same scheduler as a grid's cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grid.executors import Executor
from grid.progress import Progress
from grid.scheduler import Scheduler
from grid.stage_order import longest_chain
from grid.stages import Stage
from grid.tuning.scenes import inputs
from grid.tuning.spec import Campaign
from victims.keys import Key


class Preparation(Scheduler):
    """The victims, their gates and all else that trials read, and the default settings' cells."""

    def __init__(self, campaign: Campaign, stages: Mapping[Key, Stage], **options: Any) -> None:
        super().__init__(stages, campaign.grid.execution, **options)
        self.wanted: set[Key] = set()

    @property
    def is_over(self) -> bool:
        return all(key in self.done or key in self.blocked for key in self.wanted)

    def add(self, wanted: Iterable[Stage]) -> None:
        """Want some stages more."""
        missing: dict[Key, Stage] = {}
        found = list(wanted)
        for stage in found:
            missing |= {k: s for k, s in inputs(stage).items() if k not in self.store}
            self.done |= {key for key in inputs(stage) if key not in missing}
        seconds = {key: self.history.seconds(stage) for key, stage in missing.items()}
        self.priority |= longest_chain(missing, seconds)
        self.planned |= set(missing)
        self.journal.expect(missing, {}, self.priority)
        for stage in found:
            self.wanted.add(stage.key)
            self.want(stage)

    def note(self, executor: Executor) -> None:
        self.journal.lanes, self.journal.room = executor.lanes, executor.room
        self.journal.update(
            "running",
            cells_open=len(self.wanted - self.done),
            cells_asked=len(self.wanted),
            planned=self.planned,
            done=self.done | set(self.blocked),
            running={key: self.stages[key] for key in self.running},
            begun=executor.begun,
            waiting=len(self.later),
        )

    def tell(self, executor: Executor, progress: Progress) -> None:
        progress.update(
            cells_left=len(self.wanted - self.done),
            stages_done=len(self.planned & self.done),
            stages_planned=len(self.planned),
            running=[stage.family for stage in executor.begun],
            waiting=len(self.later),
            seconds_left=self.journal.eta_seconds,
        )
