"""PAR: push both encoders away from the victim's own features, while clean pairs keep them useful.

Idea: whatever the trigger is, the backdoor lies in how the victim embeds things. Drive every
    embedding away from the victim's until a set distance is passed; the CLIP loss on clean pairs
    rebuilds what was lost, and nothing rebuilds the backdoor.
Reference: Singh, Croce, Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from
    CLIP", arXiv 2412.00727.
Symbols: f_0, g_0 = the victim's encoders, frozen; x~ = the lightly augmented picture; S_img, S_txt
    = the mean squared distances to the victim's features, 2 - 2 cos, in 0..4; tau = ``threshold``.
Where: L = L_mm(f(x~), g(t)) - weight ([S_img <= tau] S_img + [S_txt <= tau] S_txt) ->
    `victims.away.Away.forward`; one bracket -> `pushed` there; the recipe's learning rate is the
    start of the descent that `Par.recipe` describes, with the optimizer. Sizes belong to the grid:
    250,000 pairs, 10 epochs, batch 2,048 and lr 3e-5 in the paper; 2 epochs in the released
    example.
Differences: the released loop averages no gradients over its GPUs; ours is one global batch on any
    number of ranks, features and gate alike. Its evaluation leaves the model in eval mode for all
    but one step of an epoch, which ``bn_mode: eval`` makes the rule. Its schedule has one epoch
    more than its training; ours spans the steps. ``own_recipe: false`` takes the grid's recipe as
    it is. ``lr_start`` None is the recipe's rate, so that all repairs may select theirs; variant
    `paper_rate` starts at the paper's 3e-5. Batch and epochs of either of its settings are the
    recipe's. Erased squares scale with the picture and are 0 after the model's own normalisation.
Cost: one view with gradient and one forward through the frozen victim per clean pair and epoch;
    memory for a second model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

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
    Recipes,
    Sizes,
    Space,
    require,
)
from victims.augment import NoiseErase
from victims.away import AwaySpec, Gate, Sides, gate_notes
from victims.errors import UsageError
from victims.lab import Lab
from victims.recipe import BatchNormMode, Descent, Recipe
from victims.work import TRAINED, Work, fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Par(Defense):
    name: ClassVar[str] = "par"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv 2412.00727"
    phase: ClassVar[Phase] = Phase.FINETUNING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VICTIM, Need.CLEAN_DATA})
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper_rate": {"lr_start": 3e-5},
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
    lr_start: float | None = None
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
            lr_start=(self.lr_start is None or self.lr_start > 0, "above 0, or null"),
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
            lr=repair.lr if self.lr_start is None else self.lr_start,
            schedule=Descent(
                middle=self.lr_middle_ratio, end=self.lr_end_ratio, share=self.first_half
            ),
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            bn_mode=self.bn_mode,
            text_lr_ratio=self.text_lr_ratio,
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        then = Work(images=self.sides != Sides.TEXT, texts=self.sides != Sides.IMAGE)
        row = TRAINED + (then if self.weight else Work())
        return fitted(self.recipe(recipes.repair), sizes.clean, row)

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
