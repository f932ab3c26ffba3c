"""Pushing both encoders away from their frozen start: PAR's objective.

Shapes: B batch of a rank, G global batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from victims.augment import NoiseErase, augment
from victims.batches import Batch
from victims.distributed import gather
from victims.draws import Draws
from victims.losses import clip_loss
from victims.models import Clip, frozen_copy
from victims.recipe import Clock
from victims.training import Objective


class Gate(StrEnum):
    """What is compared with the threshold: the mean of the global batch, or each of its rows."""

    BATCH = "batch"
    SAMPLE = "sample"


class Sides(StrEnum):
    BOTH = "both"
    IMAGE = "image"
    TEXT = "text"


class Pushed(NamedTuple):
    """[S <= tau] S, and the share that the bracket switched off."""

    distance: Tensor
    gated: Tensor


def pushed(distance_G: Tensor, threshold: float, gate: Gate) -> Pushed:
    """What is to grow: beyond the threshold it is 0 and so is its gradient."""
    level = distance_G.mean() if gate == Gate.BATCH else distance_G
    counts = (level.detach() <= threshold).to(level.dtype)
    return Pushed((counts * level).mean(), 1 - counts.mean())


class Away(Objective):
    """Builds its frozen victim from the start weights, also after a restart: it is no state.

    The curves hold means, so ``further`` is by how much a step's mean distance exceeds all earlier
    ones, which are in a buffer: summed over a fit it is the largest distance.
    """

    farthest_2: Tensor

    def __init__(self, spec: AwaySpec, model: Clip) -> None:
        super().__init__()
        self.spec = spec
        # Erased pixels are 0 once this model has normalised them.
        r, g, b = model.mean_C.flatten().tolist()
        self.policy = replace(spec.policy, erase_color=(r, g, b))
        # In a tuple, where torch sees no submodule: no mode, checkpoint or optimizer reaches it.
        self.victim: tuple[Clip, ...] = (frozen_copy(model),) if spec.weight else ()
        self.register_buffer("farthest_2", torch.zeros(2))

    def trainable(self, model: Clip) -> Iterable[nn.Parameter]:
        for name, parameter in model.named_parameters():
            if self.spec.train_scale or name != "net.logit_scale":
                yield parameter

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": augment(self.policy, batch.image, draws)}

    @torch.no_grad()
    def _then(self, image_BCHW: Tensor, tokens_BT: Tensor) -> dict[Sides, Tensor]:
        """The victim's features of what is pushed away from them: nothing at weight 0."""
        then_BD: dict[Sides, Tensor] = {}
        for victim in self.victim:
            if victim.mean_C.device != image_BCHW.device:
                victim.to(image_BCHW.device)
            if self.spec.sides != Sides.TEXT:
                then_BD[Sides.IMAGE] = victim.encode_image(image_BCHW)
            if self.spec.sides != Sides.IMAGE:
                then_BD[Sides.TEXT] = victim.encode_text(tokens_BT)
        return then_BD

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec, image_BCHW = self.spec, batch.views["image"]
        image_BD, text_BD = model.encode_image(image_BCHW), model.encode_text(batch.tokens)
        terms, watched = {"clip": clip_loss(image_BD, text_BD, model.scale)}, dict[str, Tensor]()
        for side, then_BD in self._then(image_BCHW, batch.tokens).items():
            now_BD = image_BD if side == Sides.IMAGE else text_BD
            distance_G = gather((now_BD - then_BD).square().sum(-1))
            away = pushed(distance_G, spec.threshold, spec.gate)
            terms[f"away_{side}"] = -spec.weight * away.distance
            mean = distance_G.detach().mean()
            watched[f"distance_{side}"] = mean
            watched[f"further_{side}"] = self._further(int(side == Sides.TEXT), mean)
            watched[f"gated_{side}"] = away.gated
        self.watched = watched
        return terms

    def _further(self, index: int, mean: Tensor) -> Tensor:
        before = self.farthest_2[index].clone()
        self.farthest_2[index] = torch.maximum(before, mean.to(before.dtype))
        return self.farthest_2[index] - before


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaySpec:
    name: ClassVar[str] = "away_from_victim"
    version: ClassVar[int] = 2

    threshold: float
    weight: float
    gate: Gate
    sides: Sides
    train_scale: bool
    policy: NoiseErase

    def build(self, model: Clip) -> Objective:
        return Away(self, model)


def gate_notes(curves: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Per side the share of steps (or rows) beyond the threshold and the largest mean distance of
    a step; ``never_gated`` is 1 where no step of any side got there."""
    sides = [side for side in ("image", "text") if f"gated_{side}" in curves[0]]
    steps = sum(record["steps"] for record in curves)
    notes: dict[str, float] = {}
    for side in sides:
        gated = sum(record["steps"] * record[f"gated_{side}"] for record in curves)
        notes[f"gated_{side}"] = gated / steps
        further = [record["steps"] * record[f"further_{side}"] for record in curves]
        notes[f"farthest_{side}"] = sum(further)
    if sides:
        notes["never_gated"] = float(not any(notes[f"gated_{side}"] for side in sides))
    return notes
