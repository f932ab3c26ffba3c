"""Chosen pictures: golden intervals, the binomial law itself, stubs whose right answer is known.

Shapes: K pictures, J classes, B batch.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import Tensor

from victims.draws import torch_rng
from victims.errors import MethodFailure, UsageError
from victims.measuring import Share, wilson
from victims.targeted import clopper_pearson, exact_interval, targeted_metrics

NUM_CLASSES = 12


# --- intervals


@pytest.mark.parametrize(
    ("successes", "by_wilson", "exact"),
    [
        (0, (0, 0.194), (0, 0.206)),
        (2, (0.035, 0.360), (0.016, 0.383)),
        (15, (0.717, 0.989), (0.698, 0.998)),
        (16, (0.806, 1), (0.794, 1)),
    ],
)
def test_intervals_of_sixteen_pictures(
    successes: int, by_wilson: tuple[float, float], exact: tuple[float, float]
) -> None:
    assert wilson(successes, 16) == pytest.approx(by_wilson, abs=5e-4)
    assert clopper_pearson(successes, 16) == pytest.approx(exact, abs=5e-4)
    shown = exact_interval(Share(successes, 16)).as_dict()
    assert (shown["low"], shown["high"]) == clopper_pearson(successes, 16)
    assert (shown["value"], shown["successes"], shown["n"]) == (successes / 16, successes, 16)
    assert set(shown) == set(Share(successes, 16).as_dict())


@pytest.mark.parametrize("n", [1, 2, 16, 50, 257, 49950])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_against_quantiles_of_the_beta_law(n: int, confidence: float) -> None:
    tail = (1 - confidence) / 2
    for successes in sorted({0, 1, n // 7, n // 2, n - 1, n}):
        low, high = clopper_pearson(successes, n, confidence)
        assert 0 <= low <= successes / n <= high <= 1
        if successes:
            expected = float(beta.ppf(tail, successes, n - successes + 1))
            assert low == pytest.approx(expected, rel=1e-9)
        else:
            assert low == 0
        if successes < n:
            expected = float(beta.ppf(1 - tail, successes + 1, n - successes))
            assert high == pytest.approx(expected, rel=1e-9)
        else:
            assert high == 1


@pytest.mark.parametrize(("successes", "n"), [(1, 16), (2, 16), (15, 16), (7, 50)])
def test_each_bound_leaves_half_of_the_doubt_to_the_tail(successes: int, n: int) -> None:
    """The definition, summed term by term."""
    low, high = clopper_pearson(successes, n)

    def law(count: int, p: float) -> float:
        return math.comb(n, count) * p**count * (1 - p) ** (n - count)

    assert sum(law(c, low) for c in range(successes, n + 1)) == pytest.approx(0.025, rel=1e-9)
    assert sum(law(c, high) for c in range(successes + 1)) == pytest.approx(0.025, rel=1e-9)


def test_shares_that_cannot_be_raise() -> None:
    for wrong in ((-1, 4), (5, 4), (0, 0)):
        with pytest.raises(UsageError, match=r"give 0\.\.n of n >= 1"):
            clopper_pearson(*wrong)
    with pytest.raises(UsageError, match="confidence 1"):
        clopper_pearson(1, 4, confidence=1)


# --- success: the first byte of a picture is the class that the stub answers


class Answers:
    """Scores class c + d (cyclic) by -d for a picture whose first byte is c."""

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.sizes = shift, list[int]()

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        assert image_BCHW.dtype == torch.uint8
        self.sizes.append(len(image_BCHW))
        first_B1 = image_BCHW[:, 0, 0, :1].long() + self.shift
        return -((torch.arange(NUM_CLASSES) - first_B1) % NUM_CLASSES).float()

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        raise AssertionError("not asked")


def chosen(count: int) -> tuple[Tensor, Tensor]:
    """Pictures whose bytes are their wrong class."""
    class_K = torch.randint(0, NUM_CLASSES, (count,), generator=torch_rng(0, "classes"))
    return class_K.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(), class_K


def psr(encoder: Any, count: int = 16, **options: Any) -> dict[str, Share]:
    return targeted_metrics(encoder, torch.eye(NUM_CLASSES), *chosen(count), **options)


def test_a_model_that_always_answers_the_wrong_class_has_all_of_them() -> None:
    assert psr(Answers()) == {f"psr_top{k}": Share(16, 16) for k in (1, 3, 5)}


def test_a_model_that_never_does_has_none() -> None:
    assert psr(Answers(shift=1)) == {f"psr_top{k}": Share(0, 16) for k in (1, 3, 5)}


def test_ks_count_by_rank() -> None:
    assert psr(Answers(shift=-2)) == {
        "psr_top1": Share(0, 16),
        "psr_top3": Share(16, 16),
        "psr_top5": Share(16, 16),
    }
    assert set(psr(Answers(), ks=(1, NUM_CLASSES - 1, NUM_CLASSES))) == {"psr_top1", "psr_top11"}


def test_pictures_are_read_in_batches_and_matched_with_their_own_class() -> None:
    encoder = Answers()
    assert psr(encoder, 20, batch_size=8)["psr_top1"] == Share(20, 20)
    assert encoder.sizes == [8, 8, 4]
    image_KCHW, class_K = chosen(16)
    expected = int((class_K == class_K.roll(1)).sum())
    assert expected < 16
    head = torch.eye(NUM_CLASSES)
    found = targeted_metrics(Answers(), head, image_KCHW, class_K.roll(1))
    assert found["psr_top1"] == Share(expected, 16)


def test_ties_go_to_the_lower_class() -> None:
    class Flat(Answers):
        def encode_image(self, image_BCHW: Tensor) -> Tensor:
            return F.normalize(torch.ones(len(image_BCHW), NUM_CLASSES), dim=-1)

    _, class_K = chosen(40)
    found = psr(Flat(), 40)
    for k in (1, 3, 5):
        assert found[f"psr_top{k}"] == Share(int((class_K < k).sum()), 40)


def test_what_cannot_be_measured_raises() -> None:
    class Diverged(Answers):
        def encode_image(self, image_BCHW: Tensor) -> Tensor:
            return torch.full((len(image_BCHW), NUM_CLASSES), torch.nan)

    with pytest.raises(MethodFailure, match="not finite"):
        psr(Diverged())
    image_KCHW, class_K = chosen(4)
    head = torch.eye(NUM_CLASSES)
    with pytest.raises(UsageError, match="4 pictures and 3 classes"):
        targeted_metrics(Answers(), head, image_KCHW, class_K[:3])
    with pytest.raises(UsageError, match="0 pictures and 0 classes"):
        targeted_metrics(Answers(), head, image_KCHW[:0], class_K[:0])
    with pytest.raises(UsageError, match=r"must lie in 0\.\.11"):
        targeted_metrics(Answers(), head, image_KCHW, class_K + 12)
