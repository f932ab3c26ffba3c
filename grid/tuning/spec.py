"""A campaign: what is searched, for whom, within what budget. `grid.tuning.file` reads one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from defenses.base import Between, OneOf
from grid.spec import DefenseEntry, Grid

Values = Mapping[str, Any]


class Sees(StrEnum):
    """What a search may look at: the tuning attacks; nothing but clean pictures, as a defender who
    knows no attack; attacks that the defender simulates; or the held-out attacks themselves."""

    ATTACKS = "attacks"
    CLEAN = "clean"
    SIMULATED = "simulated"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a search makes small or large, among settings that lose at most ``ca_loss`` points of
    clean accuracy against the undefended victim.

    ``change`` is the share of clean pictures that the repaired model answers otherwise than the
    victim: how much a repair does, for a defender who cannot measure attacks.
    """

    sees: Sees = Sees.ATTACKS
    minimise: Literal["worst_asr", "mean_asr"] | None = None
    maximise: Literal["ca", "change"] | None = None
    ca_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.minimise is None) == (self.maximise is None):
            raise ValueError("give `minimise` (worst_asr, mean_asr) or `maximise` (ca, change)")
        if self.sees is Sees.CLEAN and self.minimise is not None:
            raise ValueError(
                f"minimise: {self.minimise} is measured with attacks, and this objective sees none."
                " Give maximise: ca or change, or let it see attacks."
            )
        if self.ca_loss is not None and not 0 <= self.ca_loss <= 100:
            raise ValueError(f"ca_loss is in points, from 0 to 100, got {self.ca_loss:g}")

    @property
    def is_oracle(self) -> bool:
        return self.sees is Sees.HELD_OUT


class By(StrEnum):
    """How settings are suggested."""

    RANDOM = "random"
    GRID = "grid"
    TPE = "tpe"
    NSGA2 = "nsga2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """``points`` is how many values a range has in a grid, ``population`` the size of a generation
    of NSGA-II."""

    by: By = By.RANDOM
    seed: int = 0
    points: int = 3
    population: int = 8

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        for name in ("points", "population"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Ends a trial during its first fit if it does worse than others after as many epochs:
    ``asha`` lets the best one in ``reduction`` go on past each rung, ``median`` those above it.

    None is judged before ``grace`` epochs.
    """

    by: Literal["asha", "median"] = "asha"
    grace: int = 1
    reduction: float = 3

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise ValueError(f"grace must be at least 1 epoch, got {self.grace}")
        if self.reduction <= 1:
            raise ValueError(f"reduction must be above 1, got {self.reduction:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Ends a trial once ``after`` cells or more show that it is worse than the best one so far: a
    one-sided paired Wilcoxon test of their ASR. A trial is looked at after every further cell, and
    ``p`` is shared among these looks."""

    after: int = 5
    p: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p lies between 0 and 1, got {self.p:g}")
        least = math.ceil(-math.log2(self.p))
        if self.after < least:
            raise ValueError(
                f"after: {self.after} cells, which cannot show p {self.p:g}: that takes {least} in"
                " one direction"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What each search may use, the same for every defense; what is reached first ends it.

    ``device_hours`` are those that its settings' training takes, wherever it ran: what is found in
    the store counts as if it had been computed.
    """

    trials: int | None = None
    device_hours: float | None = None
    wall_minutes: float | None = None

    def __post_init__(self) -> None:
        limits = (self.trials, self.device_hours, self.wall_minutes)
        given = [value for value in limits if value is not None]
        if not given or min(given) <= 0:
            raise ValueError("trials, device_hours or wall_minutes: give at least one, above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Attacks by their labels in the grid, and the seeds of their victims."""

    attacks: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    rates: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulate:
    """Attacks that the defender carries out on half of its own clean pairs, at ``rate``, with the
    victim's recipe as changed by ``recipe``; the other half is what repairs are given."""

    attacks: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    rate: str = "0.05"
    recipe: Values = field(default_factory=dict)


Space = Mapping[str, Between | OneOf]


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """A defense, its entry as a grid file would have it, and the space of its settings."""

    label: str
    name: str
    given: Values
    space: Space
    entry: DefenseEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A decoded campaign file. ``plain`` is its grid as plain data, without what is said here;
    ``curves``: to measure every model after every epoch."""

    name: str
    description: str = ""
    grid: Grid
    plain: Mapping[str, Any]
    tuning: Side
    held_out: Side
    defenses: tuple[Searched, ...]
    objectives: Mapping[str, Objective]
    search: Search
    stop: Stop | None
    drop: Drop | None
    budget: Budget
    simulate: Simulate | None
    curves: bool = False
    source: str = ""
    text: str = ""

    def named(self, defense: str, objective: str) -> str:
        """What the settings that a search chose are called on a board."""
        plain = objective == next(iter(self.objectives))
        return f"{defense}@{self.name}" + ("" if plain else f"-{objective}")
