"""Reversing an image classifier: a small square of pixels that makes chosen units fire.

Shapes: C channels, D penultimate features, K classes, N units, P side of the square, S of a
picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from victims.classifiers import Classifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Reversal:
    """The square, where it lies, the grey it starts from, and the signed steps; in 0..1."""

    top: int
    left: int
    side: int
    start: float
    units: int
    wanted: float
    eps: float
    step: float
    steps: int


class Reversed(NamedTuple):
    """The square, CPP in 0..1; the units and their values under it at the start and at the end."""

    pixels_CPP: Tensor
    units_N: Tensor
    first_N: Tensor
    last_N: Tensor


def most_connected(model: Classifier, count: int) -> Tensor:
    """The units whose weights to all classes have the largest sum of absolute values."""
    sum_D: Tensor = model.net.head.weight.detach().abs().sum(0)
    return sum_D.argsort(descending=True, stable=True)[:count]


def reverse(model: Classifier, size: int, how: Reversal) -> Reversed:
    """Steps down sum_n (unit_n - wanted)^2, until every unit is there; the closest of all steps.

    What the model is shown is the square on black. It is in eval mode.
    """
    model.requires_grad_(False)
    units_N = most_connected(model, how.units)
    grey_CPP = torch.full((3, how.side, how.side), how.start, device=model.mean_C.device)
    low, high = max(0.0, how.start - how.eps), min(1.0, how.start + how.eps)
    pixels_CPP, best_CPP, nearest = grey_CPP, grey_CPP, torch.inf
    first_N = last_N = torch.zeros(len(units_N))
    for step in range(how.steps + 1):
        pixels_CPP = pixels_CPP.detach().requires_grad_(True)
        with torch.enable_grad():
            value_N = model.penultimate(_on_black(pixels_CPP, size, how))[0, units_N]
            loss = (value_N - how.wanted).square().sum()
        if step == 0:
            first_N = value_N.detach()
        if float(loss.detach()) < nearest:
            nearest, best_CPP, last_N = float(loss.detach()), pixels_CPP.detach(), value_N.detach()
        if step == how.steps or bool((value_N.detach() >= how.wanted).all()):
            break
        (slope_CPP,) = torch.autograd.grad(loss, pixels_CPP)
        pixels_CPP = (pixels_CPP.detach() - how.step * slope_CPP.sign()).clamp(low, high)
    return Reversed(best_CPP.cpu(), units_N.cpu(), first_N.cpu(), last_N.cpu())


def _on_black(pixels_CPP: Tensor, size: int, how: Reversal) -> Tensor:
    right, below = size - how.left - how.side, size - how.top - how.side
    return torch.nn.functional.pad(pixels_CPP, (how.left, right, how.top, below))[None]
