"""The order among stages: what each is made from, and the longest chain that waits for one."""

from __future__ import annotations

from collections.abc import Mapping

from grid.measure import MeasureStage
from grid.stages import DefendStage, ModelStage, PoisonStage, Stage, TriggerStage
from grid.start_gate import StartStage
from victims.keys import Key


def parents(stage: Stage) -> list[Stage]:
    """The stages whose artefacts a stage reads."""
    if isinstance(stage, MeasureStage):
        return stage.parents
    if isinstance(stage, DefendStage):
        return stage.parents
    if isinstance(stage, ModelStage):
        init: list[Stage] = [stage.init] if stage.init else []
        return [stage.data, *init]
    if isinstance(stage, TriggerStage):
        return [stage.corpus, *([stage.surrogate] if stage.surrogate else [])]
    if isinstance(stage, PoisonStage):
        return [stage.trigger]
    if isinstance(stage, StartStage):
        return [stage.reference, stage.tuning]
    return []


def longest_chain(todo: Mapping[Key, Stage], seconds: Mapping[Key, float]) -> dict[Key, float]:
    """Per stage: its own seconds and the longest chain of stages that wait for it."""
    behind: dict[Key, float] = dict.fromkeys(todo, 0.0)
    for key in reversed(list(todo)):
        through = behind[key] + seconds[key]
        for parent in parents(todo[key]):
            if parent.key in behind:
                behind[parent.key] = max(behind[parent.key], through)
    return {key: behind[key] + seconds[key] for key in todo}
