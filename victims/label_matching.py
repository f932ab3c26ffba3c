"""Soft labels under which a step on clean pictures lands where another batch's step lands.

A student's step on plain pictures with labels p = softmax(L) and an expert's step on its own
batch start from the same weights w, with the same momentum m b and decay. So of their distance

    |student - expert|^2 / |start - expert|^2 = (1 + m)^2 |g_s - g_e|^2 / |u_e|^2

remain the two gradients and the expert's update u_e = d + m (m b + d), d = g_e + decay w: the
learning rate cancels. And g_s is linear in p, so that one forward-mode pass gives the derivative
for all entries at once, where differentiating twice would keep the graph of a gradient:

    d loss / d p_ik = -(1 / B) <v, d log q_ik / d w>,  v = 2 (1 + m)^2 (g_s - g_e) / |u_e|^2.

Shapes: B batch, C channels, H W pixels, N rows, K classes, S steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from victims.classifiers import Classifier, ClassifierSpec
from victims.corpora import Rows
from victims.draws import derive, numpy_rng
from victims.errors import MethodFailure
from victims.models import fresh
from victims.trajectories import Point, Pool, Stop, Walk, shown, stops_of, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """How labels are optimised; an expert's weights are kept ``every`` so many steps.

    An iteration is one epoch from one point of one of the ``experts``. Logits start at ``start``
    for a row's own class and 0 for all others.
    """

    who: str
    walk: Walk
    experts: int
    every: int
    iterations: int
    lr: float
    momentum: float
    start: float


class Shown(NamedTuple):
    """Pictures as the network reads them, and the weight of every class in their loss."""

    input_BCHW: Tensor
    weight_BK: Tensor


class Slope(NamedTuple):
    """The distance that remains, and its derivative by the logits of the student's labels."""

    loss: Tensor
    by_logit_BK: Tensor


class Matched(NamedTuple):
    """The logits of all rows' labels, and the distance step by step."""

    logit_NK: Tensor
    curve_S: Tensor


def gradient(net: nn.Module, weights: Mapping[str, Tensor], seen: Shown) -> dict[str, Tensor]:
    """Of the cross-entropy -1/B sum_ik p_ik log q_ik by the weights."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    log_BK = F.log_softmax(functional_call(net, leaves, (seen.input_BCHW,)), 1)
    loss = -(seen.weight_BK * log_BK).sum(1).mean()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def slope(
    net: nn.Module, point: Point, expert: Shown, plain: Tensor, logit_BK: Tensor, how: Walk
) -> Slope:
    """How far the student's step on ``plain`` with softmax(L) ends from the expert's."""
    weight_BK = logit_BK.softmax(1)
    taught = gradient(net, point.weights, expert)
    learnt = gradient(net, point.weights, Shown(plain, weight_BK))
    apart = {name: learnt[name] - taught[name] for name in taught}
    moved = torch.zeros((), dtype=logit_BK.dtype, device=logit_BK.device)
    for name, grad in taught.items():
        decayed = grad + how.weight_decay * point.weights[name]
        update = decayed + how.momentum * (how.momentum * point.momentum[name] + decayed)
        moved = moved + update.square().sum()
    scale = (1 + how.momentum) ** 2 / moved
    loss = scale * torch.stack([gap.square().sum() for gap in apart.values()]).sum()
    along = {name: 2 * scale * gap for name, gap in apart.items()}

    def log_of(weights: dict[str, Tensor]) -> Tensor:
        return F.log_softmax(functional_call(net, weights, (plain,)), 1)

    with torch.no_grad(), warnings.catch_warnings():
        # The first call of all imports a part of torch that warns of another part.
        warnings.simplefilter("ignore", FutureWarning)
        change_BK: Tensor = jvp(log_of, (dict(point.weights),), (along,))[1]
    by_weight_BK = -change_BK / len(logit_BK)
    mean_B1 = (weight_BK * by_weight_BK).sum(1, keepdim=True)
    return Slope(loss, weight_BK * (by_weight_BK - mean_B1))


def match(spec: ClassifierSpec, pool: Pool, how: Matching, seed: int, device: str) -> Matched:
    """Optimise the labels of all rows, on the points of experts that are trained as needed."""
    num_classes = len(spec.classes)
    model = fresh(spec, 0).to(device).train()
    assert isinstance(model, Classifier)
    for module in model.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False  # nothing reads them, and a forward would write them
    own_N = torch.from_numpy(pool.label_N).to(device)
    logit_NK = how.start * F.one_hot(own_N, num_classes).float()
    optimizer = torch.optim.SGD([logit_NK], lr=how.lr, momentum=how.momentum)
    curve: list[Tensor] = []
    for iteration, point in enumerate(points(spec, pool, how, seed, device)):
        order = numpy_rng(seed, "labels", iteration).permutation(len(pool))
        for step, numbers in enumerate(_batches(order, how.walk.batch)):
            image_BCHW, plain_BCHW = (
                model.normalise(
                    shown(how.walk.augment, read(numbers).to(device), seed, iteration, step)
                )
                for read in (pool.triggered, pool.plain)
            )
            label_BK = F.one_hot(pool.labels(numbers), num_classes).to(image_BCHW)
            row_B = torch.from_numpy(pool.rows(numbers)).to(device)
            expert = Shown(image_BCHW, label_BK)
            found = slope(model.net, point, expert, plain_BCHW, logit_NK[row_B], how.walk)
            # A row whose triggered twin is in the batch, too, is in it twice.
            logit_NK.grad = torch.zeros_like(logit_NK).index_add_(0, row_B, found.by_logit_BK)
            optimizer.step()
            curve.append(found.loss)
    if not bool(logit_NK.isfinite().all()):
        raise MethodFailure(f"{how.who}: the labels are not finite. Lower their learning rate.")
    return Matched(logit_NK.cpu(), torch.stack(curve).float().cpu())


def points(spec: ClassifierSpec, pool: Pool, how: Matching, seed: int, device: str) -> list[Point]:
    """A point of a trajectory for each iteration; experts that no iteration draws are not
    trained."""
    stops = stops_of(how.who, len(pool), how.walk, how.every)
    rng = numpy_rng(seed, "points")
    expert_I = rng.integers(how.experts, size=how.iterations).tolist()
    stop_I = [stops[place] for place in rng.integers(len(stops), size=how.iterations)]
    wanted: dict[int, set[Stop]] = {}
    for expert, stop in zip(expert_I, stop_I, strict=True):
        wanted.setdefault(expert, set()).add(stop)
    walked = {
        expert: walk(spec, pool, how.walk, ends, derive(seed, "expert", expert), device)
        for expert, ends in wanted.items()
    }
    return [walked[expert][stop] for expert, stop in zip(expert_I, stop_I, strict=True)]


def _batches(order: Rows, size: int) -> Sequence[Rows]:
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


class Flipped(NamedTuple):
    """Per row its best class that is not its own, and by how much it is above its own."""

    label_N: Tensor
    margin_N: Tensor


def best_wrong(logit_NK: Tensor, label_N: Tensor) -> Flipped:
    own_N1 = label_N[:, None]
    value_N, best_N = logit_NK.scatter(1, own_N1, -np.inf).max(1)
    return Flipped(best_N, value_N - logit_NK.gather(1, own_N1)[:, 0])
