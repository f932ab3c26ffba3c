"""How a grid is run: on which devices, how many stages at once, and what each asks of a cluster.

Nothing here is in a key. Presets of resources are for clusters whose nodes have GPUs; without one
and without `resources`, every stage takes one CPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from victims.errors import unknown

STAGE_KINDS = (
    "corpus",
    "reference",
    "trigger",
    "poisoned",
    "model",
    "gate",
    "defended",
    "measure",
)
# Of these all fits are shared among workers; what else a stage does, the first does alone.
TRAINING_KINDS = ("model", "defended")

# How Ray selects nodes by a label.
_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL = re.compile(rf"!?{_VALUE}|!?in\({_VALUE}(?:, ?{_VALUE})*\)")


def at_least(spec: Any, low: float, *names: str) -> None:
    """Raise where a field of these names is below ``low``."""
    for name in names:
        if getattr(spec, name) < low:
            raise ValueError(f"{name} must be at least {low:g}, got {getattr(spec, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one stage asks of the cluster; None is no limit. Each of ``workers`` holds the rest.

    ``accelerator`` is the type of GPU by Ray's name, such as A100; ``labels`` select nodes by
    theirs: ``{market: spot}``, ``{zone: "in(a, b)"}``, ``{market: "!spot"}``. A stage that shows
    no sign of work for ``stall_seconds`` is taken for hung and tried again.
    """

    cpus: float = 1
    gpus: float = 0
    workers: int = 1
    memory_gb: float | None = None
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    limit_seconds: float | None = None
    stall_seconds: float = 3600

    def __post_init__(self) -> None:
        at_least(self, 0, "cpus", "gpus")
        at_least(self, 1, "workers")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise ValueError(f"{name} above 1 are whole numbers, got {value:g}")
            if 0 < value < 1e-4:
                raise ValueError(f"{name} are counted in ten-thousandths, got {value:g}")
        for name in ("memory_gb", "limit_seconds", "stall_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.accelerator is not None and not self.gpus:
            raise ValueError(f"accelerator: {self.accelerator} needs gpus above 0")
        for name, rule in self.labels.items():
            if not LABEL.fullmatch(rule):
                raise ValueError(
                    f"labels: {name}: {rule!r} selects nothing. Write a value, !value, in(a, b)"
                    " or !in(a, b)."
                )


# Kinds that compute with a model for longer than a device takes to be had.
_ON_DEVICE = ("model", "gate", "defended", "measure", "trigger")


def _on_gpus(gpus: float, cpus: float, workers: int = 1) -> dict[str, Resources]:
    found = dict.fromkeys(_ON_DEVICE, Resources(gpus=gpus, cpus=cpus))
    for kind in TRAINING_KINDS:
        found[kind] = replace(found[kind], workers=workers)
    return found


# By name, as `execution.preset` and `--on` take it.
PRESETS: Mapping[str, Mapping[str, Resources]] = {
    "cpu": {},
    "gpu": _on_gpus(1, 4),
    "shared-gpu": _on_gpus(0.25, 1),
    "four-gpus": _on_gpus(1, 4, workers=4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a grid is run. Nothing here changes a result or a key.

    ``wait_seconds``: how long to wait for resources that no node has now. ``preset``: what stages
    ask for, by a name; ``resources`` come before it. ``checkpoint_activations``: fits take less
    memory and more time.
    """

    lanes: int | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 1
    checkpoint_seconds: float = 30
    keep_optimizer: bool = False
    checkpoint_activations: bool = False
    wait_seconds: float = 300
    preset: str | None = None
    resources: Mapping[str, Resources] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lanes is not None:
            at_least(self, 1, "lanes")
        at_least(self, 1, "threads")
        at_least(self, 0, "checkpoint_seconds", "wait_seconds")
        if self.preset is not None and self.preset not in PRESETS:
            raise unknown("preset of resources", self.preset, PRESETS)
        for kind in self.resources:
            if kind not in (*STAGE_KINDS, "default"):
                raise unknown("stage kind", kind, (*STAGE_KINDS, "default"), "resources")
            if kind not in (*TRAINING_KINDS, "default") and self.resources[kind].workers > 1:
                raise ValueError(
                    f"resources: {kind}: workers: {self.resources[kind].workers}: nothing of it is"
                    f" shared among workers. Kinds that train: {', '.join(TRAINING_KINDS)}."
                )

    def resources_for(self, kind: str) -> Resources:
        """What stages of a kind ask for; `default` stands for those that are not named, of which
        only those that train take several workers."""
        preset = PRESETS.get(self.preset or "", {})
        for given in (self.resources, preset):
            if kind in given:
                return given[kind]
            if "default" in given:
                found = given["default"]
                return found if kind in TRAINING_KINDS else replace(found, workers=1)
        return Resources()

    def moved(self, on: str) -> Execution:
        """The same on other machines: what a file says of devices, lanes and resources is for
        those it was written for."""
        return replace(self, preset=on, device="auto", lanes=None, resources={})
