"""RoCLIP: every K-th epoch, match each picture with the nearest caption in a pool, not its own.

Idea: break the pairing of a poisoned picture with its poisoned caption while training; strong
    augmentation of both sides is always on.
Reference: Yang, Gao, Mirzasoleiman, "Robust Contrastive Language-Image Pretraining against Data
    Poisoning and Backdoor Attacks", NeurIPS 2023, arXiv 2303.06854 (v2; v1 is another algorithm).
Symbols: K = ``every`` (None: never); P = ``pool_size`` (None: 2 % of the data, at least one
    batch); N_i = the nearest caption.
Where: step a, j*(i) = argmax_j cos(I_i, P_j) -> `Memory.nearest`; steps b, c,
    L = 1/2 [CE(I, N) + CE(N, I)] -> `forward`; step d, the circular FIFO -> `Memory.push`.
Differences: the pool starts empty and unfilled slots are masked, with the plain loss while there
    is nothing in it (``pool_init: legacy`` starts from unnormalised noise, as released); the text
    tower of a matching step has no gradient and does not move (``text_drift: true`` gives it the
    zero gradient under which AdamW's momentum and decay still move it). In regime F it starts from
    the public model instead of random weights, unlike the paper: fidelity ADAPTED there.
    ``data: clean`` turns it into a repair of the victim on clean pairs.
Cost: one augmented view with gradient per suspect pair and epoch; replaces the victim's training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
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
    Regime,
    Sizes,
    Space,
    require,
)
from victims.augment import augment, policy_from
from victims.batches import Batch
from victims.distributed import gather
from victims.draws import Draws
from victims.lab import Lab
from victims.losses import clip_loss
from victims.memory import Memory
from victims.models import Clip
from victims.recipe import Clock
from victims.rewrite import EdaMode, eda_text, pinned_source
from victims.training import Objective
from victims.work import Work, fitted


class PoolInit(StrEnum):
    EMPTY = "empty"
    LEGACY = "legacy"


class Query(StrEnum):
    IMAGE = "image"
    CAPTION = "caption"


class Data(StrEnum):
    """`suspect` replaces the victim's training; `clean` repairs the victim on clean pairs."""

    SUSPECT = "suspect"
    CLEAN = "clean"


class Augment(StrEnum):
    BOTH = "both"
    IMAGE = "image"
    TEXT = "text"
    NONE = "none"


class PooledCaptions(Objective):
    def __init__(self, spec: PooledCaptionsSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        noise = spec.pool_init == PoolInit.LEGACY
        self.pool = Memory(spec.pool_size, width, noise=noise)

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        if self.spec.augment in (Augment.TEXT, Augment.NONE):
            return {"image": batch.image}
        policy = policy_from("simclr", crop_scale=self.spec.crop_scale)
        return {"image": augment(policy, batch.image, draws)}

    def matches(self, epoch: int) -> bool:
        """Is this epoch (counted from 0) a matching one? Epochs of the paper count from 1."""
        return self.spec.every is not None and (epoch + 1) % self.spec.every == 0

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_BD = model.encode_image(batch.views["image"])
        tokens, matching = batch.texts["eda"], self.matches(clock.epoch)
        remember = matching or self.spec.refresh_in_plain_epochs
        if not matching or not int(self.pool.filled):
            text_BD = model.encode_text(tokens)
            terms = {"clip": clip_loss(image_BD, text_BD, model.scale)}
        else:
            with torch.set_grad_enabled(self.spec.text_drift):
                text_BD = model.encode_text(tokens)
            by_image = self.spec.query == Query.IMAGE
            nearest_BD = self.pool.nearest(image_BD if by_image else text_BD)
            terms = {"matched": clip_loss(image_BD, nearest_BD, model.scale)}
            if self.spec.text_drift:
                terms["matched"] = terms["matched"] + 0 * text_BD.sum()
        if remember:
            self.pool.push(gather(text_BD.detach()))
        return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledCaptionsSpec:
    name: ClassVar[str] = "pooled_captions"
    version: ClassVar[int] = 1

    every: int | None
    pool_size: int
    pool_init: PoolInit
    refresh_in_plain_epochs: bool
    crop_scale: tuple[float, float]
    augment: Augment
    query: Query
    text_drift: bool

    def build(self, model: Clip) -> Objective:
        return PooledCaptions(self, model.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoClip(Defense):
    name: ClassVar[str] = "roclip"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2303.06854"
    phase: ClassVar[Phase] = Phase.PRETRAINING
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUSPECT_DATA, Need.START})
    fidelity: ClassVar[Mapping[Regime, Fidelity]] = {
        Regime.S: Fidelity.EXACT,
        Regime.F: Fidelity.ADAPTED,
    }
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "augment_only": {"every": None},
        "legacy_pool": {"pool_init": "legacy", "text_drift": True},
        "repair": {"data": "clean"},
    }
    knob: ClassVar[Knob] = Knob(name="every", values=(1, 2, 3, 5, None))
    space: ClassVar[Space] = {
        "recipe.lr": Between(low=1e-6, high=1e-3, log=True),
        "every": OneOf(values=(1, 2, 3, 5)),
        "crop_scale": OneOf(values=((0.08, 1.0), (0.5, 1.0), (0.9, 1.0))),
    }

    data: Data = Data.SUSPECT
    every: int | None = 2
    pool_size: int | None = None
    pool_init: PoolInit = PoolInit.EMPTY
    refresh_in_plain_epochs: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)
    augment: Augment = Augment.BOTH
    eda: EdaMode = EdaMode.STATIC
    synonyms: str = "lexicon"
    query: Query = Query.IMAGE
    text_drift: bool = False

    def needed(self) -> frozenset[Need]:
        if self.data == Data.CLEAN:
            return frozenset({Need.VICTIM, Need.CLEAN_DATA})
        return self.needs

    def acts(self) -> Phase:
        return Phase.FINETUNING if self.data == Data.CLEAN else self.phase

    def check(self) -> None:
        require(
            self,
            every=(self.every is None or self.every >= 1, "at least 1, or null"),
            pool_size=(self.pool_size is None or self.pool_size >= 1, "at least 1, or null"),
        )
        policy_from("simclr", crop_scale=self.crop_scale)
        pinned_source(self.synonyms)

    def costs(self, recipes: Recipes, sizes: Sizes) -> Work:
        matching = 0.0 if self.every is None else 1 / self.every
        still = 0.0 if self.text_drift else matching
        row = Work(images_trained=1, texts_trained=1 - still, texts=still)
        if self.data == Data.CLEAN:
            return fitted(recipes.repair, sizes.clean, row)
        return fitted(recipes.victim, sizes.suspect, row)

    def apply(self, lab: Lab, case: Case) -> Defended:
        self.check()
        repairs = self.data == Data.CLEAN
        data = case.clean_data if repairs else case.suspect_data
        init = case.victim if repairs else case.start
        recipe = case.recipes.repair if repairs else case.recipes.victim
        size = self.pool_size
        if size is None:
            size = max(recipe.batch_size, math.ceil(0.02 * len(data)))
        spec = PooledCaptionsSpec(
            every=self.every,
            # Without a matching epoch the pool is never read: keep it out of the identity.
            pool_size=size if self.every is not None else 1,
            pool_init=self.pool_init,
            refresh_in_plain_epochs=self.refresh_in_plain_epochs,
            crop_scale=self.crop_scale,
            augment=self.augment,
            query=self.query,
            text_drift=self.text_drift,
        )
        plain_text = self.augment in (Augment.IMAGE, Augment.NONE)
        mode = EdaMode.OFF if plain_text else self.eda
        data = lab.with_text(data, eda=eda_text(mode, self.synonyms, recipe.seed))
        return Defended(lab.train(spec, data, recipe, init=init))
