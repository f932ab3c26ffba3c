"""Forgetting some pairs by their local tokens while keeping others: one objective.

The rows of a fit are those to keep; the pairs to forget come along as tensors, since they may
belong to other data. L = L_u + beta L_mm(rows to keep), where L_u is either the mean of
(<I, T_loc> - c)^2 over pairs to forget, which lies in 0..4, or -min(L_mm, limit) of these.
Shapes: B rows of this rank, G of the global batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from victims.batches import Batch, Scan, cat_tokens
from victims.corpora import Rows
from victims.distributed import gather
from victims.draws import Draws
from victims.keys import Key
from victims.local_tokens import encode_patches
from victims.losses import clip_loss
from victims.models import Clip
from victims.recipe import Clock
from victims.training import Objective


class Forget(StrEnum):
    SQUARE = "square"
    ASCENT = "ascent"


class LocalForgetting(Objective):
    """Trains on the rows to keep, with the rows to forget at hand as tensors.

    One step is an epoch, so that all of D_u is looked at before each: it ends the fit when mean
    <I, T_loc> is below ``target_cosine`` + ``stop_margin``. Nothing here changes during
    a fit: after a restart it is built again.
    """

    def __init__(self, spec: LocalForgettingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_pairs = len(spec.pairs.get("image", ()))
        for name in spec.pairs:
            self.register_buffer(name, spec.pairs[name].clone(), persistent=False)

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        if not self.num_pairs:
            return {}
        device = draws.generator.device
        order = torch.randperm(self.num_pairs, generator=draws.generator, device=device)
        # In a batch of more rows than there are pairs, these come around again.
        places = torch.arange(draws.start, draws.stop, device=device) % self.num_pairs
        return self._pairs(order[places])

    def rows_per_epoch(self, num_rows: int) -> int:
        return self.spec.batch

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        spec = self.spec
        if self.num_pairs:
            # The rows to forget are none of the scan's: it lends its eval mode, and one row.
            remembered = scan(lambda net, _: self._remembered(net), np.zeros(1, dtype=np.int64))
            self.watched = {"remembered": model.mean_C.new_tensor(float(remembered[0]))}
            if remembered[0] < spec.target_cosine + spec.stop_margin:
                return np.zeros(0, dtype=np.int64)
        return rng.permutation(len(scan))[: spec.batch]

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        local, spec = batch.views, self.spec
        if not local:
            image_BD, text_BD = model.encode_image(batch.image), model.encode_text(batch.tokens)
            return {"keep": spec.beta * clip_loss(image_BD, text_BD, model.scale)}
        if "patches" in local:
            own_BD = encode_patches(model, local["image"], local["patches"])
            image_BD = model.encode_image(batch.image)
        else:
            images = torch.cat([local["image"], batch.image])
            own_BD, image_BD = model.encode_image(images).chunk(2)
        tokens = cat_tokens(local["tokens"], batch.tokens)
        local_BD, text_BD = model.encode_text(tokens).chunk(2)
        return {
            "forget": self._forget(own_BD, local_BD, model.scale),
            "keep": spec.beta * clip_loss(image_BD, text_BD, model.scale),
        }

    def _forget(self, image_BD: Tensor, local_BD: Tensor, scale: Tensor) -> Tensor:
        if self.spec.forget == Forget.ASCENT:
            return -clip_loss(image_BD, local_BD, scale).clamp(max=self.spec.ascent_limit)
        cosine_G = gather((image_BD * local_BD).sum(1, keepdim=True))
        return (cosine_G - self.spec.target_cosine).square().mean()

    def _pairs(self, rows: Tensor | slice) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in self.named_buffers()}

    def _remembered(self, model: Clip) -> Tensor:
        """Mean <I, T_loc> over all of D_u."""
        found = []
        for start in range(0, self.num_pairs, 256):
            pairs = self._pairs(slice(start, start + 256))
            if "patches" in pairs:
                image_BD = encode_patches(model, pairs["image"], pairs["patches"])
            else:
                image_BD = model.encode_image(pairs["image"])
            found.append((image_BD * model.encode_text(pairs["tokens"])).sum(1))
        return torch.cat(found).mean()[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalForgettingSpec:
    """``pairs`` are the tensors of D_u, or none; ``made_of`` is the key of what they are."""

    name: ClassVar[str] = "local_forgetting"
    version: ClassVar[int] = 1

    made_of: Key
    pairs: Mapping[str, Tensor] = field(metadata={"keyed": False}, compare=False, repr=False)
    batch: int
    forget: Forget
    ascent_limit: float
    target_cosine: float
    stop_margin: float
    beta: float

    def build(self, model: Clip) -> Objective:
        return LocalForgetting(self)
