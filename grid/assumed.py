"""Seconds of stages of real models that no history speaks of, from FLOPs: assumed, not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from grid.execution import Execution
from grid.measure import MeasureStage
from grid.stages import DefendStage, ModelStage, Stage, TriggerStage
from grid.start_gate import StartStage
from grid.step_costs import DEFAULT_DEVICE, SHARE, counts, sample_seconds
from victims.models import EMBEDDED, ModelSpec, NetSpec

COMPILED, IN_PARTS = "compiled", "parts"


def rated_as(stage: Stage) -> str:
    """The name under which seconds per unit of work are kept: a stage's family and, where its
    model is no embedded one, which model, precision and ways to train it."""
    found, ways = _network(stage), _ways(stage)
    if found is None or not isinstance(found[0], ModelSpec):
        return stage.family
    model, precision = found
    if model.arch in EMBEDDED and not ways:
        return stage.family
    return "/".join([stage.family, f"{model.arch}@{model.size}", precision, *ways])


def _ways(stage: Stage) -> list[str]:
    """What a recipe asks for that makes its steps faster or slower."""
    if not (isinstance(stage, ModelStage) or (isinstance(stage, DefendStage) and stage.trains)):
        return []
    recipe = stage.recipe
    return [COMPILED] * recipe.compile + [IN_PARTS] * (recipe.parts > 1)


def _network(stage: Stage) -> tuple[NetSpec, str] | None:
    """What a stage computes with, and how."""
    if isinstance(stage, ModelStage):
        return stage.model, stage.recipe.precision.value
    if isinstance(stage, DefendStage) and stage.trains:
        return stage.victim.model, stage.recipe.precision.value
    if isinstance(stage, MeasureStage):
        return stage.defended.victim.model, "fp32"
    if isinstance(stage, StartStage):
        return stage.model, "fp32"
    if isinstance(stage, TriggerStage) and stage.network is not None:
        return stage.network, "fp32"
    return None


def assumed_device(execution: Execution) -> str:
    """The type of GPU that fits ask for, or the one that is assumed; a CPU has none."""
    if execution.device in ("cpu", "mps"):
        return execution.device
    return execution.resources_for("model").accelerator or DEFAULT_DEVICE


def assumed_rate(name: str, device: str) -> float | None:
    """Seconds per thousand plain steps of what is rated under a name; None if nothing says so."""
    _, *of = name.split("/")
    if len(of) < 2 or of[0] not in counts():
        return None
    # Parts of a batch pass through the network once more; what compiling saves is not known.
    count = counts()[of[0]]
    flops = count.step + count.forward * (IN_PARTS in of[2:])
    seconds = sample_seconds(flops, device, of[1])
    return None if seconds is None else 1000 * seconds


def assumptions(stages: Iterable[Stage], known: Iterable[str], device: str) -> Sequence[str]:
    """What a plan must say of the seconds of these stages, those with a history apart."""
    hours: dict[str, float] = {}
    guessed: dict[str, None] = {}
    measured = set(known)
    unknown: dict[str, None] = {}
    for stage in stages:
        name = rated_as(stage)
        if isinstance(stage, TriggerStage) and stage.crafting is None and name not in measured:
            unknown[stage.attack.name] = None
        if "/" not in name or name in measured:
            continue
        model, rate = name.split("/")[1], assumed_rate(name, device)
        if rate is None:
            guessed[model] = None
        else:
            hours[model] = hours.get(model, 0.0) + rate * stage.work / 3600
    found = [
        f"about {gpu_time(spent)} of {model} are assumed, not measured:"
        f" {counts()[model].step / 1e9:.0f} GFLOP per sample of a plain step, at"
        f" {SHARE:.0%} of the peak of one {device}"
        for model, spent in hours.items()
    ]
    return (
        found
        + [
            f"nothing is known of what {model} costs on {device}: its seconds are a small model's"
            for model in guessed
        ]
        + [
            f"{name} trains networks of its own to craft its trigger: how long that takes is not"
            " known before it has run, and is left out"
            for name in unknown
        ]
    )


def gpu_time(hours: float) -> str:
    """Hours of one GPU, or seconds where they are few."""
    if hours < 0.01:
        return f"{3600 * hours:.2g} GPU-seconds"
    return f"{f'{hours:,.0f}' if hours >= 10 else f'{hours:.2g}'} GPU-hours"
