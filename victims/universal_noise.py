"""One perturbation for all pictures that points into a class, crafted on an image classifier.

Values are in half-ranges: a picture spans -1..1, a level is 2 / 255.

Shapes: B batch, N rows, C channels, S side of a picture, R rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.classifiers import Classifier
from victims.corpora import Rows
from victims.draws import numpy_rng
from victims.errors import MethodFailure

HALF_RANGE = 127.5  # levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Inward:
    """How the model is warmed up, and how the perturbation is made. ``eps`` is in levels."""

    eps: float
    rounds: int
    lr: float
    batch: int
    warm_epochs: int
    warm_lr: float
    seed: int | str


class Pictures(NamedTuple):
    """Some rows of a pool, which are to read as ``target``."""

    images_NCHW: npt.NDArray[np.uint8]
    rows: Rows
    target: int

    def batches(self, how: Inward, *purpose: int | str) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them once, in -1..1, with their class."""
        order = numpy_rng(how.seed, *purpose).permutation(self.rows)
        for start in range(0, len(order), how.batch):
            image_BCSS = torch.from_numpy(self.images_NCHW[order[start : start + how.batch]])
            yield image_BCSS.float() / HALF_RANGE - 1, torch.full((len(image_BCSS),), self.target)


def warm_up(model: Classifier, pictures: Pictures, how: Inward) -> None:
    """Train the whole model on the pictures for a few epochs; it ends in eval mode, frozen."""
    device = model.mean_C.device
    model.train().requires_grad_(True)
    optimizer = torch.optim.RAdam(model.parameters(), lr=how.warm_lr)
    for epoch in range(how.warm_epochs):
        for image_BCSS, label_B in pictures.batches(how, "warm", epoch):
            loss = F.cross_entropy(read(model, image_BCSS.to(device)), label_B.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval().requires_grad_(False)


def read(model: Classifier, image_BCSS: Tensor) -> Tensor:
    """Logits of pictures in -1..1, BK."""
    return model.embed_image((image_BCSS + 1) / 2)


class Perturbation(NamedTuple):
    """``noise`` CSS in levels, and the mean CE of each round."""

    noise_CSS: Tensor
    curve_R: Tensor


def inward(model: Classifier, pictures: Pictures, how: Inward) -> Perturbation:
    """min over d, |d| <= eps, of CE(f(clip(x + d)), target): one pass over the pictures a round.

    The model is in eval mode and frozen.
    """
    device, bound = model.mean_C.device, how.eps / HALF_RANGE
    noise_CSS = torch.zeros(pictures.images_NCHW.shape[1:], device=device, requires_grad=True)
    optimizer = torch.optim.RAdam([noise_CSS], lr=how.lr)
    curve_R = torch.zeros(how.rounds)
    for epoch in range(how.rounds):
        losses = []
        for image_BCSS, label_B in pictures.batches(how, "round", epoch):
            worn_BCSS = (image_BCSS.to(device) + noise_CSS).clamp(-1, 1)
            loss = F.cross_entropy(read(model, worn_BCSS), label_B.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                noise_CSS.clamp_(-bound, bound)
            losses.append(loss.detach())
        curve_R[epoch] = torch.stack(losses).mean()
    if not bool(curve_R.isfinite().all()):
        raise MethodFailure(
            "crafting a perturbation: the loss is not finite; lower the learning rates"
        )
    return Perturbation((noise_CSS.detach() * HALF_RANGE).cpu(), curve_R)
