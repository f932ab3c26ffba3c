"""Anti-backdoor learning: isolate what is learned soonest, train on the rest, unlearn the isolated.

Idea: a backdoor is learned faster than the task; a loss that is not allowed to sink below a level
    keeps clean rows there while poisoned ones still fall, so the rows of lowest loss are isolated,
    left out, and unlearned in the end by gradient ascent.
Reference: Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned
    Data", NeurIPS 2021, arXiv 2110.11571.
Symbols: gamma = ``gamma``; p = ``isolation_rate``; T_te = ``isolation_share`` of the victim's
    epochs; T - T_te = ``finetune_share`` and ``unlearn_share``, before and during the unlearning.
Where: L_LGA = E[sign(l - gamma) l] -> `held_up`, or flooding, |l - gamma| + gamma; isolation ->
    `Abl.apply`; the second half of L_GGA, -E_isolated[l] -> `Unlearning`.
Differences: the paper counts 20, 60 and 20 of 100 epochs; here they are shares of the victim
    recipe's epochs, rounded, at least one each. The first two stages use the victim's recipe,
    where the schedule of the first is constant, as the released code has it within 20 epochs, and
    that of the second starts anew. L_GGA minimises the loss of the rest beside; the released code
    does this before and then ascends on the isolated rows alone, which is done here. The equation
    takes the sign per row, the code of a batch's mean (``over: batch``). Losses for the isolation
    are those of the pictures as they are, in eval mode. Isolated rows that do not fill a batch are
    repeated until they do.
Cost: the shares' sum in epochs of the victim's training (at the defaults as many as the victim
    took, the last few of them of the isolated rows alone), and a forward pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from defenses.base import (
    Between,
    Case,
    Defended,
    Defense,
    Fidelity,
    Knob,
    Need,
    OneOf,
    Phase,
    Recipes,
    Sizes,
    Space,
    Track,
    require,
    rows_in,
)
from victims.batches import Batch
from victims.classifiers import labels
from victims.distributed import gather
from victims.draws import Draws
from victims.entropy_split import entropies
from victims.lab import Lab
from victims.labels import augment_of, seen
from victims.models import Clip
from victims.recipe import Augment, Clock, Schedule
from victims.selection import Logits
from victims.training import Objective
from victims.work import Work, fitted


class Bound(StrEnum):
    """What keeps the loss from sinking below gamma."""

    ASCENT = "ascent"
    FLOODING = "flooding"


class Over(StrEnum):
    """Whose loss is compared with gamma: each row's, or the mean of the batch."""

    ROW = "row"
    BATCH = "batch"


def held_up(loss_G: Tensor, gamma: float, bound: Bound, over: Over) -> Tensor:
    """L_LGA, or the flooded loss, of a global batch."""
    loss_G = loss_G.mean(0, keepdim=True) if over == Over.BATCH else loss_G
    above_G = loss_G - gamma
    if bound == Bound.FLOODING:
        return (above_G.abs() + gamma).mean()
    return (above_G.sign() * loss_G).mean()


def row_losses(model: Clip, batch: Batch) -> Tensor:
    """The cross-entropy of every row of the global batch."""
    logit_BK = model.embed_image(batch.views["image"])
    return gather(F.cross_entropy(logit_BK, labels(batch.tokens), reduction="none"))


class LocalAscent(Objective):
    """The first stage: a loss that is held up at gamma."""

    def __init__(self, spec: LocalAscentSpec) -> None:
        super().__init__()
        self.spec = spec

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": seen(self.spec.augment, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        spec = self.spec
        loss = held_up(row_losses(model, batch), spec.gamma, spec.bound, spec.over)
        return {"held_up": loss}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAscentSpec:
    name: ClassVar[str] = "local_ascent"
    version: ClassVar[int] = 1

    gamma: float
    bound: Bound
    over: Over
    augment: Augment

    def build(self, model: Clip) -> Objective:
        return LocalAscent(self)


class Unlearning(Objective):
    """The last stage: the cross-entropy of the isolated rows, climbed."""

    def __init__(self, augment: Augment) -> None:
        super().__init__()
        self.augment = augment

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": seen(self.augment, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return {"unlearn": -row_losses(model, batch).mean()}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearningSpec:
    name: ClassVar[str] = "unlearning"
    version: ClassVar[int] = 1

    augment: Augment

    def build(self, model: Clip) -> Objective:
        return Unlearning(self.augment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abl(Defense):
    name: ClassVar[str] = "abl"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2110.11571"
    phase: ClassVar[Phase] = Phase.PRETRAINING
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.SUPERVISED})
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.START})
    fidelity: ClassVar[Fidelity] = Fidelity.READING
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "batch": {"over": "batch"},
        "flooding": {"bound": "flooding"},
        "isolate_only": {"unlearn_share": 0.0},
    }
    knob: ClassVar[Knob | None] = Knob(name="isolation_rate", values=(0.01, 0.02, 0.05, 0.1, 0.2))
    space: ClassVar[Space] = {
        "gamma": Between(low=0.1, high=1.0),
        "isolation_rate": Between(low=0.005, high=0.2, log=True),
        "unlearn_lr": Between(low=1e-4, high=1e-2, log=True),
        "bound": OneOf(values=("ascent", "flooding")),
    }

    gamma: float = 0.5
    bound: Bound = Bound.ASCENT
    over: Over = Over.ROW
    isolation_share: float = 0.2
    isolation_rate: float = 0.01
    finetune_share: float = 0.6
    unlearn_share: float = 0.2
    unlearn_lr: float = 5e-4

    def check(self) -> None:
        require(
            self,
            gamma=(self.gamma >= 0, "0 or more"),
            isolation_share=(self.isolation_share > 0, "above 0"),
            isolation_rate=(0 < self.isolation_rate < 1, "in (0, 1)"),
            finetune_share=(self.finetune_share > 0, "above 0"),
            unlearn_share=(self.unlearn_share >= 0, "0 or more; at 0 nothing is unlearned"),
            unlearn_lr=(self.unlearn_lr > 0, "above 0"),
        )

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        recipe, num_rows = recipes.victim, sizes.suspect
        isolated = self._count(num_rows)

        def part(share: float, rows: int) -> Work:
            return fitted(replace(recipe, epochs=share_of(share, recipe.epochs)), rows)

        found = part(self.isolation_share, num_rows) + Work(images=num_rows)
        found += part(self.finetune_share, num_rows - isolated)
        if self.unlearn_share:
            found += part(self.unlearn_share, max(isolated, recipe.batch_size))
        return found

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        data, recipe = case.suspect_data, case.recipes.victim
        augment = augment_of(recipe)
        first = replace(
            recipe,
            epochs=share_of(self.isolation_share, recipe.epochs),
            schedule=Schedule.CONSTANT,
        )
        ascent = LocalAscentSpec(
            gamma=self.gamma, bound=self.bound, over=self.over, augment=augment
        )
        model = lab.train(ascent, data, first, init=case.start)
        suspicion = -entropies(lab.score(Logits(), data, model), lab.labels(data))
        isolated = np.argsort(-suspicion, kind="stable")[: self._count(len(data))]
        flagged = np.zeros(len(data), dtype=bool)
        flagged[isolated] = True
        rest = lab.subset(data, np.flatnonzero(~flagged))
        second = replace(recipe, epochs=share_of(self.finetune_share, recipe.epochs))
        model = lab.train(lab.plain(recipe), rest, second, init=model)
        if self.unlearn_share:
            third = replace(
                recipe,
                epochs=share_of(self.unlearn_share, recipe.epochs),
                lr=self.unlearn_lr,
                schedule=Schedule.CONSTANT,
                warmup_steps=0,
            )
            least = max(len(isolated), recipe.batch_size)
            climbed = lab.subset(data, np.resize(isolated, least))
            model = lab.train(UnlearningSpec(augment=augment), climbed, third, init=model)
        notes = {
            "isolated": float(len(isolated)),
            "isolated_loss": -float(suspicion[flagged].min()),
        }
        return Defended(model, flagged=flagged, suspicion=suspicion.astype(np.float32), notes=notes)

    def _count(self, num_rows: int) -> int:
        return max(1, rows_in(self.isolation_rate, num_rows))


def share_of(share: float, epochs: int) -> int:
    """So many of the victim's epochs, rounded half up, at least one."""
    return max(1, int(share * epochs + 0.5))
