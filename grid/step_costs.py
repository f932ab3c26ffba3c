"""What a training step of a real model costs before any was run here: from its FLOPs.

`step_costs.json` holds FLOPs per sample, counted by ``python -m benchmarks.gpu --count``. Seconds
are these over the device's peak at an assumed share of it: a guess that says so, and that a store's
own history replaces once a stage of the kind has run. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COUNTS = Path(__file__).with_name("step_costs.json")
# Of its peak that a device is assumed to reach in training, where nothing was measured.
SHARE = 0.35
DEFAULT_DEVICE = "A100"
# Of a CLIP that nothing was counted of.
USUAL_IMAGE_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Peak:
    """Dense tensor-core peaks in FLOP/s. Float32 stands for TF32, which torch lets convolutions
    use and matrix products only on request: its share is of more than a fit can reach."""

    bf16: float
    fp32: float


# By what a device's name, or Ray's name of its type, contains; the longer names first.
PEAKS: Mapping[str, Peak] = {
    "H100 PCIe": Peak(756e12, 378e12),
    "H200": Peak(989e12, 494e12),
    "H100": Peak(989e12, 494e12),
    "A100": Peak(312e12, 156e12),
    "L40S": Peak(362e12, 183e12),
    "A10G": Peak(70e12, 35e12),
    "A10": Peak(125e12, 62.5e12),
    "L4": Peak(121e12, 60e12),
    "RTX 4090": Peak(165e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12),
}


@dataclass(frozen=True, slots=True)
class Count:
    """FLOPs of one sample: a plain training step, one pass through both towers, and the part of
    it that is the caption's, of full length."""

    step: float
    forward: float
    text: float


def peak_of(device: str, precision: str) -> float | None:
    """FLOP/s of a device by a name that contains its type; None for one that is not known."""
    for name, peak in PEAKS.items():
        if name.lower() in device.lower():
            return peak.bf16 if precision == "bf16" else peak.fp32
    return None


@cache
def counts() -> Mapping[str, Count]:
    """By architecture and pixels a side, such as ``RN50@224``."""
    body = json.loads(COUNTS.read_text("utf-8"))
    return {name: Count(**found) for name, found in body["flops"].items()}


def image_share(arch: str, size: int) -> float:
    """The picture's part of a sample's FLOPs: as counted, or about what it is of other CLIPs."""
    count = counts().get(f"{arch}@{size}")
    return USUAL_IMAGE_SHARE if count is None else 1 - count.text / count.forward


def sample_seconds(flops: float, device: str, precision: str) -> float | None:
    """Seconds of so many FLOPs at the assumed share of a device's peak."""
    peak = peak_of(device, precision)
    return None if peak is None else flops / (peak * SHARE)
