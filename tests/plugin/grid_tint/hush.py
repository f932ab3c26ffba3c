"""Hush: fine-tune on clean pairs whose pictures carry fresh noise.

Idea: a trigger that noise drowns is forgotten sooner.
Reference: none, an example.
Symbols: s = ``noise``, a standard deviation where white is 1.
Where: L = L_mm on x + s n, n standard normal -> `Noisy.forward`.
Differences: none known.
Cost: one view with gradient per clean pair and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from defenses.base import Case, Defended, Defense, Fidelity, Knob, Need, Phase
from victims.batches import Batch
from victims.draws import Draws
from victims.lab import Lab
from victims.losses import clip_loss
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Objective


class Noisy(Objective):
    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        level_BCHW = batch.image.float() / 255
        return {"noisy": level_BCHW + self.noise * draws.normal(*level_BCHW.shape[1:])}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_BD = model.encode_image(batch.views["noisy"])
        text_BD = model.encode_text(batch.tokens)
        return {"clip": clip_loss(image_BD, text_BD, model.scale)}


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisySpec:
    name: ClassVar[str] = "noisy"
    version: ClassVar[int] = 1

    noise: float

    def build(self, model: Clip) -> Objective:
        return Noisy(self.noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hush(Defense):
    name: ClassVar[str] = "hush"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "an example"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    knob: ClassVar[Knob] = Knob(name="noise", values=(0.0, 0.1, 0.3))

    noise: float = 0.1

    def apply(self, lab: Lab, case: Case) -> Defended:
        spec = NoisySpec(noise=self.noise)
        return Defended(lab.train(spec, case.clean_data, case.recipes.repair, init=case.victim))
