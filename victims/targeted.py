"""Success on chosen pictures, counted in pictures, with intervals that hold for few of them.

Shapes: K chosen pictures, C channels, H W pixels, J classes, D embedding, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from victims.errors import MethodFailure, UsageError
from victims.measuring import Share, ranks
from victims.models import Encoder

KS = (1, 3, 5)


@dataclass(frozen=True, slots=True)
class ExactShare:
    """A share with its Clopper-Pearson interval."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n

    def as_dict(self) -> dict[str, float | int]:
        low, high = clopper_pearson(self.successes, self.n)
        counts = {"successes": self.successes, "n": self.n}
        return {"value": self.value, **counts, "low": low, "high": high}


def exact_interval(share: Share) -> ExactShare:
    """The same share with the exact interval in place of Wilson's."""
    return ExactShare(share.successes, share.n)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share: each bound leaves half of the doubt to the binomial tail."""
    if not 0 <= successes <= n or n < 1 or not 0 < confidence < 1:
        raise UsageError(
            f"clopper_pearson: {successes} of {n} at confidence {confidence}; give 0..n of n >= 1"
            " and a confidence between 0 and 1"
        )
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _beta_quantile(tail, successes, n - successes + 1)
    high = 1.0 if successes == n else _beta_quantile(1 - tail, successes + 1, n - successes)
    return low, high


def _beta_quantile(share: float, a: int, b: int) -> float:
    """Where the regularised incomplete beta function reaches ``share``, by bisection."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if _beta(middle, a, b) < share:
            low = middle
        else:
            high = middle
    return middle


def _beta(x: float, a: int, b: int) -> float:
    """Regularised incomplete beta function I_x(a, b) for 0 < x < 1, by its continued fraction."""
    # The fraction converges fast below the mean alone.
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / a
    # Lentz: the value is the product of c * d over the terms of the fraction.
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    value, m = d, 0
    while True:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for term in (even, odd):
            c, d = _away(1 + term / c, tiny), 1 / _away(1 + term * d, tiny)
            step = c * d
            value *= step
        if abs(step - 1) < 1e-15:
            return front * value


def _away(value: float, tiny: float) -> float:
    """The value, kept away from 0."""
    return value if abs(value) > tiny else tiny


@torch.no_grad()
def targeted_metrics(
    encoder: Encoder,
    head_JD: Tensor,
    image_KCHW: Tensor,
    class_K: Tensor,
    ks: Sequence[int] = KS,
    batch_size: int = 256,
) -> dict[str, Share]:
    """PSR@k: chosen pictures, un-augmented (uint8), that have their wrong class in the top k."""
    if not len(image_KCHW) == len(class_K) > 0:
        raise UsageError(
            f"chosen pictures: {len(image_KCHW)} pictures and {len(class_K)} classes; give one"
            " class for each of at least one picture"
        )
    device, num_classes = head_JD.device, len(head_JD)
    if not 0 <= int(class_K.min()) <= int(class_K.max()) < num_classes:
        raise UsageError(
            f"chosen pictures: classes {class_K.tolist()} must lie in 0..{num_classes - 1}"
        )
    parts = []
    for start in range(0, len(image_KCHW), batch_size):
        image_BCHW = image_KCHW[start : start + batch_size].to(device)
        score_BJ = encoder.encode_image(image_BCHW) @ head_JD.T
        if not score_BJ.isfinite().all():
            raise MethodFailure(
                "the model scores chosen pictures with numbers that are not finite: its weights"
                " have diverged. Lower the learning rate."
            )
        parts.append(ranks(score_BJ, class_K[start : start + batch_size].to(device)))
    rank_K = torch.cat(parts)
    return {
        f"psr_top{k}": Share(int((rank_K < k).sum()), len(rank_K)) for k in ks if k < num_classes
    }
