"""Adversarial examples of image classifiers, and training on them.

Shapes: B batch, N rows, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from victims.batches import Batch
from victims.classifiers import Classifier, classifier, labels
from victims.distributed import gather
from victims.draws import Draws
from victims.labels import seen
from victims.models import Clip
from victims.recipe import Augment, Clock
from victims.training import Objective
from victims.triggers import round_half_even

_AT_ONCE = 256  # pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """Signed steps up a loss: the largest change of a byte and a step's size, in levels."""

    name: ClassVar[str] = "climb"
    version: ClassVar[int] = 1

    eps: float
    step: float
    steps: int


def climbed(
    model: Classifier, level_BCHW: Tensor, label_B: Tensor, how: Climb, start_BCHW: Tensor | None
) -> Tensor:
    """Pictures in levels, each moved within ``eps`` and 0..255 up the CE of its label.

    They start where they are, or from ``start`` (in -1..1 of eps). The model must be in eval mode,
    so that no picture looks at another; its weights get no gradients.
    """
    low_BCHW = (level_BCHW - how.eps).clamp(min=0)
    high_BCHW = (level_BCHW + how.eps).clamp(max=255)
    moved_BCHW = level_BCHW
    if start_BCHW is not None:
        moved_BCHW = (level_BCHW + how.eps * start_BCHW).clamp(min=low_BCHW, max=high_BCHW)
    for _ in range(how.steps):
        moved_BCHW = moved_BCHW.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model.embed_image(moved_BCHW / 255), label_B, reduction="sum")
            (slope_BCHW,) = torch.autograd.grad(loss, moved_BCHW)
        step_BCHW = how.step * slope_BCHW.sign()
        moved_BCHW = (moved_BCHW.detach() + step_BCHW).clamp(min=low_BCHW, max=high_BCHW)
    return moved_BCHW.detach()


def hardened(model: Classifier, image_NCHW: Tensor, label: int, how: Climb) -> Tensor:
    """Pictures of one class as bytes, moved away from it without a random start."""
    device = model.mean_C.device
    parts = [image_NCHW[:0]]
    for part in torch.split(image_NCHW, _AT_ONCE):
        label_B = torch.full((len(part),), label, device=device)
        moved_BCHW = climbed(model, part.to(device).float(), label_B, how, None)
        parts.append(round_half_even(moved_BCHW).cpu())
    return torch.cat(parts)


@torch.no_grad()
def share_read_as(model: Classifier, image_NCHW: Tensor, label: int) -> float:
    """The share of pictures that are read as a class; 0 of none."""
    parts = [
        model.embed_image(part.to(model.mean_C.device)).argmax(1) == label
        for part in torch.split(image_NCHW, _AT_ONCE)
    ]
    return float(torch.cat(parts).float().mean()) if len(image_NCHW) else 0.0


# --- training on them


@contextmanager
def at_rest(model: Clip) -> Iterator[None]:
    """The model in eval mode for a while, then every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Adversarial(Objective):
    """CE of pictures that the model as it is now finds hard (Madry et al. 2018)."""

    def __init__(self, spec: AdversarialSpec) -> None:
        super().__init__()
        self.spec = spec

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        image_BCHW = seen(self.spec.augment, batch.image, draws)
        start_BCHW = draws.uniform(*image_BCHW.shape[1:], low=-1.0, high=1.0)
        return {"image": image_BCHW, "start": start_BCHW.to(image_BCHW.device)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        label_B, level_BCHW = labels(batch.tokens), batch.views["image"].float()
        with at_rest(model):
            hard_BCHW = climbed(
                classifier(model), level_BCHW, label_B, self.spec.inner, batch.views["start"]
            )
        logit_GK = gather(model.embed_image(hard_BCHW / 255))
        return {"adversarial": F.cross_entropy(logit_GK, gather(label_B))}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdversarialSpec:
    name: ClassVar[str] = "adversarial"
    version: ClassVar[int] = 1

    inner: Climb
    augment: Augment

    def build(self, model: Clip) -> Objective:
        return Adversarial(self)
