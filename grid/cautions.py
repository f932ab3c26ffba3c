"""What a grid file says that is probably not what was meant: words for its plan, no refusals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from defenses.base import Need
from grid.nodes import parse
from grid.spec import Grid
from grid.stages import DefendStage, ModelStage, Stage
from victims.errors import counted
from victims.recipe import Descent, Recipe, Schedule

MOST_SPELLED = 5


def lone_seeds(grid: Grid) -> Iterator[str]:
    """`seeds: 3` is the seed 3, where three seeds may have been meant."""
    given = parse(grid.text, grid.source).items() if grid.text else {}
    for name in ("seeds", "defense_seeds"):
        number = given[name].node.data if name in given else None
        if type(number) is not int or number < 2:
            continue
        spelled = [str(seed) for seed in range(min(number, MOST_SPELLED))]
        if number > MOST_SPELLED:
            spelled = [*spelled[:2], "...", str(number - 1)]
        yield f"{name}: one seed, {number}; for {number} seeds write [{', '.join(spelled)}]"


def rising_rates(stages: Iterable[Stage]) -> Iterator[str]:
    """Fits that end in their warm-up: their learning rate never gets where the file says."""
    found: dict[tuple[int, int, int], dict[str, None]] = {}
    for stage in stages:
        if isinstance(stage, ModelStage):
            fit, rows, name = stage.recipe, stage.num_rows, "plain training"
        elif isinstance(stage, DefendStage) and stage.trains and stage.defense.fits_by_recipe():
            fit, rows, name = stage.recipe, _most_rows(stage), stage.defense.name
        else:
            continue
        steps = fit.epochs * (rows // fit.batch_size)
        # A single step shows that files are read: its rate is nobody's concern.
        if 1 < steps < _warm_up(fit, rows):
            found.setdefault((rows, steps, fit.warmup_steps), {})[name] = None
    for (rows, steps, warm_up), who in found.items():
        yield (
            f"{', '.join(who)}: {counted(steps, 'step')} on {rows:,} rows, and the learning rate"
            f" still rises at the last one: warmup_steps is {warm_up}. Give it fewer, or more"
            " epochs"
        )


def _warm_up(fit: Recipe, rows: int) -> int:
    """The steps in which the learning rate rises."""
    if isinstance(fit.schedule, Descent):
        return 0
    released = fit.schedule == Schedule.RELEASED  # which counts from the second epoch
    return fit.warmup_steps - (rows // fit.batch_size if released else 0)


def _most_rows(stage: DefendStage) -> int:
    """At most so many rows does a defense fit: of the data that it is given."""
    needs = stage.defense.needed()
    if Need.SUSPECT_DATA in needs or Need.CLEAN_DATA not in needs:
        return stage.victim.num_rows
    return stage.clean.spec.num_rows
