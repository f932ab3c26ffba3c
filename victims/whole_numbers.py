"""Networks that compute in whole numbers, so that no byte of what they make can differ.

Weights, activations and sums are whole numbers so small that float32 sums of them are exact,
whatever their order: no batch, number of threads, kernel or device can change them.

Shapes: D channels of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

EXACT = 2**24  # whole numbers up to here are float32s
TOP = 255  # of an activation
LARGEST = 2047  # of a weight: 11 bits survive even where a GPU shortens its factors
PASS_PIXELS = 2**17  # pixels that go through a network at once, so that they stay in cache

Shape = tuple[int, ...]


def finest(weight: Tensor, bias: Tensor) -> int:
    """The smallest power of two in which no weight and no sum is too large to be exact."""
    power = math.frexp(max(float(weight.abs().max()), 2.0**-60) / LARGEST)[1]
    while True:
        steps = (weight / 2.0**power).round().abs().flatten(1).sum(1) * TOP
        offset = (bias / 2.0**power).round().abs().view(len(bias), -1).amax(1)
        if float((steps + offset).max()) < EXACT:
            return power
        power += 1


def shift_of(sum_BDHW: Tensor) -> int:
    """The smallest s for which no sum / 2^s is above an activation's range."""
    return max(0, math.ceil(math.log2(max(1, int(sum_BDHW.max())) / TOP)))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def unflatten(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums on a CPU in one order, however many threads the process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
