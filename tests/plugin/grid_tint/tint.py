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

import numpy as np
from torch import Tensor

from attacks.base import GateGroup, Knowledge, Track, pick, round_half_even, template_caption
from victims.corpora import Rows
from victims.draws import numpy_rng
from victims.lab import Lab


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    channel: int
    strength: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        level_BCHW = image_BCHW.float()
        level_BCHW[:, self.channel] += self.strength
        return round_half_even(level_BCHW)

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self.stamp(image_BCHW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tint:
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

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return pick(np.arange(len(held.corpus)), count, rng, self.name)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return template_caption(held.goal, rng)
