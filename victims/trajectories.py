"""Where networks pass on their way when some triggered rows are among those they are trained on.

Shapes: B batch, C channels, H W pixels, N rows of the set, M triggered rows behind them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.classifiers import Classifier, ClassifierSpec
from victims.corpora import Rows, Stamp
from victims.draws import Draws, numpy_rng, torch_rng
from victims.errors import MethodFailure, UsageError
from victims.labels import seen
from victims.models import fresh
from victims.recipe import Augment


@dataclass(frozen=True, slots=True)
class Pool:
    """A labelled set and, numbered from N on, its rows ``dirty`` once more: stamped, and labelled
    as the target."""

    images_NCHW: npt.NDArray[np.uint8]
    label_N: Rows
    dirty_M: Rows
    target: int
    stamp: Stamp

    def __len__(self) -> int:
        return len(self.label_N) + len(self.dirty_M)

    def rows(self, numbers: Rows) -> Rows:
        """The row of the set whose picture each number shows."""
        return np.concatenate([np.arange(len(self.label_N)), self.dirty_M])[numbers]

    def plain(self, numbers: Rows) -> Tensor:
        """Their pictures without the trigger, BCHW."""
        return torch.from_numpy(self.images_NCHW[self.rows(numbers)])

    def triggered(self, numbers: Rows) -> Tensor:
        """Their pictures with the trigger where they have it, BCHW."""
        image_BCHW, is_dirty = self.plain(numbers), numbers >= len(self.label_N)
        if is_dirty.any():
            which = torch.from_numpy(is_dirty)
            image_BCHW[which] = self.stamp(image_BCHW[which])
        return image_BCHW

    def labels(self, numbers: Rows) -> Tensor:
        """Their labels, the target where they have the trigger, B."""
        is_dirty = numbers >= len(self.label_N)
        return torch.from_numpy(np.where(is_dirty, self.target, self.label_N[self.rows(numbers)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """How a network is trained: SGD with Nesterov's momentum at one rate."""

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    augment: Augment


class Stop(NamedTuple):
    """Before which step of which epoch, both from 0."""

    epoch: int
    step: int


class Point(NamedTuple):
    """Weights and their momentum, by the weights' names in the network."""

    weights: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]


def stops_of(who: str, num_rows: int, how: Walk, every: int) -> list[Stop]:
    """Every so many steps of each epoch; an epoch's first step is none of them."""
    num_steps = num_rows // how.batch
    if num_steps <= every:
        raise UsageError(
            f"{who}: an epoch of {num_rows} rows in batches of {how.batch} has {num_steps} steps,"
            f" and weights are kept every {every}; keep them more often, or take smaller batches"
        )
    return [
        Stop(epoch, step) for epoch in range(how.epochs) for step in range(every, num_steps, every)
    ]


def shown(augment: Augment, image_BCHW: Tensor, seed: int, *purpose: int | str) -> Tensor:
    """The pictures as a network is shown them; equal purposes give equal crops."""
    total, device = len(image_BCHW), image_BCHW.device
    draws = Draws(torch_rng(seed, "views", *purpose, device=device), total, 0, total)
    return seen(augment, image_BCHW, draws)


def walk(
    spec: ClassifierSpec, pool: Pool, how: Walk, stops: Collection[Stop], seed: int, device: str
) -> dict[Stop, Point]:
    """Train from random weights as far as the last stop."""
    model = fresh(spec, seed).to(device).train()
    assert isinstance(model, Classifier)
    optimizer = torch.optim.SGD(
        model.net.parameters(),
        lr=how.lr,
        momentum=how.momentum,
        weight_decay=how.weight_decay,
        nesterov=how.momentum > 0,
        fused=True,
    )
    found: dict[Stop, Point] = {}
    for epoch in range(how.epochs):
        order = numpy_rng(seed, "order", epoch).permutation(len(pool))
        for step in range(len(pool) // how.batch):
            stop = Stop(epoch, step)
            if stop in stops:
                found[stop] = _point(model, optimizer)
                if len(found) == len(stops):
                    return found
            numbers = order[step * how.batch : (step + 1) * how.batch]
            image_BCHW = pool.triggered(numbers).to(device)
            image_BCHW = shown(how.augment, image_BCHW, seed, epoch, step)
            logit_BK = model.embed_image(image_BCHW)
            loss = F.cross_entropy(logit_BK, pool.labels(numbers).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    raise AssertionError(f"a fit of {how.epochs} epochs has no step {set(stops) - set(found)}")


def _point(model: Classifier, optimizer: torch.optim.Optimizer) -> Point:
    named = dict(model.net.named_parameters())
    if not all(bool(weight.isfinite().all()) for weight in named.values()):
        raise MethodFailure("the weights of an expert are not finite. Lower its learning rate.")
    moving = {
        name: optimizer.state[weight].get("momentum_buffer") for name, weight in named.items()
    }
    return Point(
        weights={name: weight.detach().clone() for name, weight in named.items()},
        momentum={
            name: torch.zeros_like(named[name]) if buffer is None else buffer.clone()
            for name, buffer in moving.items()
        },
    )
