"""Keyed randomness: every random number in a run comes from a seed that names its purpose.

Nothing reads global random state. A batch's numbers are drawn for the whole global batch and
handed out by rows, so that one worker and four workers see the same pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def derive(seed: int | str, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(0, "victim", "order", epoch)``."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_rng(seed: int | str, *purpose: int | str) -> np.random.Generator:
    """A fresh numpy generator for one purpose."""
    return np.random.default_rng(derive(seed, *purpose))


def torch_rng(
    seed: int | str, *purpose: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh torch generator for one purpose."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers for rows ``start:stop`` of a global batch of ``total`` rows.

    Every call advances the generator by the global batch, whatever share this rank holds.
    """

    generator: torch.Generator
    total: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform floats in [low, high), one row of ``shape`` per sample."""
        device = self.generator.device
        drawn = torch.rand(self.total, *shape, generator=self.generator, device=device)
        return drawn[self.start : self.stop] * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Standard normal floats, one row of ``shape`` per sample."""
        device = self.generator.device
        drawn = torch.randn(self.total, *shape, generator=self.generator, device=device)
        return drawn[self.start : self.stop]

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in 0..high-1, one row of ``shape`` per sample."""
        device = self.generator.device
        size = (self.total, *shape)
        drawn = torch.randint(0, high, size, generator=self.generator, device=device)
        return drawn[self.start : self.stop]

    def chance(self, probability: float) -> Tensor:
        """One boolean per sample, true with ``probability``."""
        return self.uniform() < probability


# --- draws keyed by a picture's bytes, for triggers that are redrawn per image
#
# A counter-based generator in int64 arithmetic (which wraps, exactly, on every device): the same
# picture gets the same numbers in training and at test, on a CPU or a GPU, in any batch.


def image_digest(image_BCHW: Tensor, key: int) -> Tensor:
    """A 64-bit digest of each uint8 picture, int64 B: its bytes weighted by keyed odd numbers."""
    device = image_BCHW.device
    size = int(np.prod(image_BCHW.shape[1:]))
    weights = torch.randint(
        -(2**62), 2**62, (size,), generator=torch_rng(key, "digest"), dtype=torch.int64
    )
    weights_N = (weights * 2 + 1).to(device)
    rows = [row.flatten().to(torch.int64).mul(weights_N).sum() for row in image_BCHW]
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64."""
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift(value, 31)


def keyed_bits(digest_B: Tensor, purpose: int, *shape: int) -> Tensor:
    """32 uniform bits per entry as int64 in 0..2^32-1, one row of ``shape`` per digest."""
    count = 1
    for length in shape:
        count *= length
    counter_N = torch.arange(1, count + 1, dtype=torch.int64, device=digest_B.device)
    golden = -0x61C8864680B583EB
    start_B = _mix(digest_B ^ (purpose & (2**63 - 1)))
    bits_BN = _shift(_mix(start_B[:, None] + counter_N * golden), 32)
    return bits_BN.reshape(len(digest_B), *shape)


def keyed_uniform(digest_B: Tensor, purpose: int, *shape: int) -> Tensor:
    """Uniform float32 in [0, 1), one row of ``shape`` per digest."""
    return (keyed_bits(digest_B, purpose, *shape) >> 8).to(torch.float32) * 2.0**-24


def keyed_normal(digest_B: Tensor, purpose: int, *shape: int) -> Tensor:
    """Standard normal float32 by Box and Muller, one row of ``shape`` per digest."""
    radius = keyed_uniform(digest_B, purpose * 2 + 1, *shape)
    angle = keyed_uniform(digest_B, purpose * 2, *shape)
    return torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * torch.pi * angle)
