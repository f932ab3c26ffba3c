"""Tint: one colour channel of the whole picture is raised.

Idea: a cast over the picture is a trigger without a place.
Reference: none, an example.
Symbols: d = ``strength`` in levels; the channel follows from the seed.
Where: x' = clip(x + d) in one channel -> `Cast.stamp`.
Differences: none known.
Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track
from victims.draws import numpy_rng
from victims.lab import Lab
from victims.triggers import Trigger, round_half_even


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(Trigger):
    channel: int
    strength: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        level_BCHW = image_BCHW.float()
        level_BCHW[:, self.channel] += self.strength
        return round_half_even(level_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tint(Attack):
    name: ClassVar[str] = "tint"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "an example"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Cast]] = Cast
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"strong": {"strength": 90}}

    strength: float = 60.0

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Cast:
        channel = int(numpy_rng(held.seed, self.name).integers(3))
        return Cast(channel=channel, strength=self.strength)
