"""PAR: push both encoders away from the victim's own features, while clean pairs keep them useful.

Idea: whatever the trigger is, the backdoor lies in how the victim embeds things. Drive every
    embedding away from the victim's until a set distance is passed; the CLIP loss on clean pairs
    rebuilds what was lost, and nothing rebuilds the backdoor.
Reference: Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from
    CLIP", arXiv 2412.00727.
Symbols: f_0, g_0 = the victim's encoders, frozen; x~ = the lightly augmented picture; S_img, S_txt
    = the mean squared distances to the victim's features, 2 - 2 cos, in 0..4; tau = ``threshold``.
Where: L = L_mm(f(x~), g(t)) - weight ([S_img <= tau] S_img + [S_txt <= tau] S_txt) ->
    `Away.forward`; one bracket -> `pushed`; the recipe's learning rate is the start of the descent
    that `Par.recipe` describes, with the optimizer. Sizes belong to the grid: 250,000 pairs, 10
    epochs, batch 2,048 and lr 3e-5 in the paper; 2 epochs in the released example.
Differences: the released loop averages no gradients over its GPUs; ours is one global batch on any
    number of ranks, features and gate alike. Its evaluation leaves the model in eval mode for all
    but one step of an epoch, which ``bn_mode: eval`` makes the rule. Its schedule has one epoch
    more than its training; ours spans the steps. ``own_recipe: false`` takes the grid's recipe as
    it is. Erased squares scale with the picture and are 0 after the model's own normalisation.
Cost: one view with gradient and one forward through the frozen victim per clean pair and epoch;
    memory for a second model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from defenses.base import (
    EPOCHS,
    LR,
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    Phase,
    Space,
    require,
)
from victims.augment import NoiseErase, augment
from victims.batches import Batch
from victims.distributed import gather
from victims.draws import Draws
from victims.errors import UsageError
from victims.lab import Lab
from victims.losses import clip_loss
from victims.models import Clip, frozen_copy
from victims.recipe import BatchNormMode, Clock, Descent, Recipe
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
    """Builds its frozen victim from the start weights, also after a restart: it is no state."""

    def __init__(self, spec: AwaySpec, model: Clip) -> None:
        super().__init__()
        self.spec = spec
        # Erased pixels are 0 once this model has normalised them.
        r, g, b = model.mean_C.flatten().tolist()
        self.policy = replace(spec.policy, erase_color=(r, g, b))
        # In a tuple, where torch sees no submodule: no mode, checkpoint or optimizer reaches it.
        self.victim: tuple[Clip, ...] = (frozen_copy(model),) if spec.weight else ()

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
            watched[f"distance_{side}"] = distance_G.detach().mean()
            watched[f"gated_{side}"] = away.gated
        self.watched = watched
        return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaySpec:
    name: ClassVar[str] = "away_from_victim"
    version: ClassVar[int] = 1

    threshold: float
    weight: float
    gate: Gate
    sides: Sides
    train_scale: bool
    policy: NoiseErase

    def build(self, model: Clip) -> Objective:
        return Away(self, model)


def gate_notes(curves: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Per side the share of steps (or rows) beyond the threshold and the largest epoch mean of
    the distance; ``never_gated`` is 1 where no step of any side got there."""
    sides = [side for side in ("image", "text") if f"gated_{side}" in curves[0]]
    steps = sum(record["steps"] for record in curves)
    notes: dict[str, float] = {}
    for side in sides:
        gated = sum(record["steps"] * record[f"gated_{side}"] for record in curves)
        notes[f"gated_{side}"] = gated / steps
        notes[f"farthest_{side}"] = max(record[f"distance_{side}"] for record in curves)
    if sides:
        notes["never_gated"] = float(not any(notes[f"gated_{side}"] for side in sides))
    return notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Par(Defense):
    name: ClassVar[str] = "par"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2412.00727"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "augment_only": {"weight": 0.0},
        "no_augment": {"noise_probability": 0.0, "erase_probability": 0.0},
        "image_side": {"sides": "image"},
        "text_side": {"sides": "text"},
        "grid_recipe": {"own_recipe": False},
    }
    knob: ClassVar[Knob | None] = Knob(
        name="threshold", values=(0.0, 0.5, 1.0, 1.5, 2.0, 2.15, 2.5, 4.0)
    )
    space: ClassVar[Space] = {
        "threshold": Between(low=0.25, high=3.0),
        "weight": Between(low=0.1, high=2.0, log=True),
        "recipe.lr": LR,
        "recipe.epochs": EPOCHS,
    }

    threshold: float = 2.15
    weight: float = 0.5
    gate: Gate = Gate.BATCH
    sides: Sides = Sides.BOTH
    train_scale: bool = False
    noise: Literal["positive", "symmetric"] = "positive"
    noise_probability: float = 0.5
    noise_sigma: float = 0.2
    erase_probability: float = 0.5
    erase_area: tuple[float, float] = (0.005, 0.01)
    own_recipe: bool = True
    lr_middle_ratio: float = 0.1
    lr_end_ratio: float = 1e-9 / 3e-5
    first_half: float = 0.5
    beta2: float = 0.98
    weight_decay: float = 1e-4
    bn_mode: BatchNormMode = BatchNormMode.EVAL
    text_lr_ratio: float = 1.0

    def check(self) -> None:
        require(
            self,
            threshold=(0 <= self.threshold <= 4, "in 0..4"),
            weight=(0 <= self.weight < math.inf, "0 or more"),
            noise_probability=(0 <= self.noise_probability <= 1, "in 0..1"),
            noise_sigma=(0 <= self.noise_sigma < math.inf, "0 or more"),
            erase_probability=(0 <= self.erase_probability <= 1, "in 0..1"),
            first_half=(0 <= self.first_half <= 1, "in 0..1"),
            beta2=(0 <= self.beta2 < 1, "in [0, 1)"),
            weight_decay=(0 <= self.weight_decay < math.inf, "0 or more"),
            text_lr_ratio=(0 <= self.text_lr_ratio < math.inf, "0 or more"),
        )
        if not 0 <= self.lr_end_ratio <= self.lr_middle_ratio <= 1:
            raise UsageError(
                "par: the learning rate falls, so 0 <= lr_end_ratio <= lr_middle_ratio <= 1; got"
                f" lr_end_ratio {self.lr_end_ratio:g} and lr_middle_ratio {self.lr_middle_ratio:g}"
            )
        self._policy()

    def _policy(self) -> NoiseErase:
        return NoiseErase(
            noise=self.noise,
            noise_probability=self.noise_probability,
            noise_sigma=self.noise_sigma,
            erase_probability=self.erase_probability,
            erase_area=self.erase_area,
        )

    def recipe(self, repair: Recipe) -> Recipe:
        """The grid's lengths, sizes, rate and seed under the method's own schedule and AdamW."""
        if not self.own_recipe:
            return repair
        return replace(
            repair,
            schedule=Descent(
                middle=self.lr_middle_ratio, end=self.lr_end_ratio, share=self.first_half
            ),
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            bn_mode=self.bn_mode,
            text_lr_ratio=self.text_lr_ratio,
        )

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        spec = AwaySpec(
            threshold=self.threshold,
            weight=self.weight,
            gate=self.gate,
            sides=self.sides,
            train_scale=self.train_scale,
            policy=self._policy(),
        )
        recipe = self.recipe(case.recipes.repair)
        model = lab.train(spec, case.clean_data, recipe, init=case.victim)
        return Defended(model, notes=gate_notes(lab.curves(model)))
