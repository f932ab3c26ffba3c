"""Contrastive terms against loops written from their equations, and against hand values.

Shapes: N rows, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.draws import torch_rng
from victims.losses import clip_loss, cross_entropy, in_modal_loss, info_nce, similarity

Term = Callable[[Tensor, Tensor, float], Tensor]
TERMS: dict[str, Term] = {"clip": clip_loss, "nce": info_nce, "in_modal": in_modal_loss}


def features(seed: int, rows: int = 7, width: int = 5) -> Tensor:
    """Unit vectors in double precision."""
    drawn = torch.randn(rows, width, generator=torch_rng(seed, "features"), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def slow_ce(a: list[list[float]], b: list[list[float]], scale: float) -> float:
    """Mean over i of -log( exp(s <A_i, B_i>) / sum over j of exp(s <A_i, B_j>) )."""
    total = 0.0
    for i in range(len(a)):
        logits = []
        for j in range(len(b)):
            logits.append(scale * sum(x * y for x, y in zip(a[i], b[j], strict=True)))
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[i]
    return total / len(a)


def slow(name: str, a_ND: Tensor, b_ND: Tensor, scale: float) -> float:
    a, b = a_ND.tolist(), b_ND.tolist()
    if name == "clip":
        return (slow_ce(a, b, scale) + slow_ce(b, a, scale)) / 2
    return slow_ce(a, b, scale) / (2 if name == "in_modal" else 1)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_equation(name: str, scale: float) -> None:
    a_ND, b_ND = features(0), features(1)
    found = float(TERMS[name](a_ND, b_ND, scale))
    assert found == pytest.approx(slow(name, a_ND, b_ND, scale), rel=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_reach_both_sides_and_the_scale_exactly(name: str) -> None:
    """Nothing is detached: autograd agrees with finite differences of the slow reference."""
    a_ND, b_ND = features(0, 4, 3).requires_grad_(), features(1, 4, 3).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    TERMS[name](a_ND, b_ND, scale).backward()  # type: ignore[arg-type, no-untyped-call]
    step = 1e-6
    for tensor in (a_ND, b_ND, scale):
        assert tensor.grad is not None
        for place, gradient in enumerate(tensor.grad.flatten().tolist()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.view(-1)[place] += sign * step
                    ends.append(slow(name, a_ND, b_ND, float(scale)))
                    tensor.view(-1)[place] -= sign * step
            assert gradient == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("rows", [2, 5, 64])
def test_hand_values(name: str, rows: int) -> None:
    """Equal features: ln N. Orthonormal matched ones at scale s: ln(1 + (N - 1) e^-s)."""
    share = 0.5 if name == "in_modal" else 1.0
    equal = torch.eye(1, 8, dtype=torch.float64).expand(rows, -1)
    assert float(TERMS[name](equal, equal, 50.0)) == pytest.approx(share * math.log(rows))
    matched = torch.eye(rows, dtype=torch.float64)
    for s in (0.0, 1.0, 5.0):
        value = math.log(1 + (rows - 1) * math.exp(-s))
        assert float(TERMS[name](matched, matched, s)) == pytest.approx(share * value)


def test_the_clip_loss_hears_neither_order_nor_which_side_is_which() -> None:
    a_ND, b_ND = features(0), features(1)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    value = float(clip_loss(a_ND, b_ND, 10.0))
    assert float(clip_loss(a_ND[order], b_ND[order], 10.0)) == pytest.approx(value, rel=1e-12)
    assert float(clip_loss(b_ND, a_ND, 10.0)) == pytest.approx(value, rel=1e-12)
    assert float(clip_loss(a_ND[order], b_ND, 10.0)) != pytest.approx(value, rel=1e-3)


def test_the_in_modal_loss_has_one_direction() -> None:
    """Original rows, augmented columns: exchanging them is another loss."""
    a_ND, b_ND = features(0), features(1)
    forth, back = in_modal_loss(a_ND, b_ND, 10.0), in_modal_loss(b_ND, a_ND, 10.0)
    assert abs(float(forth) - float(back)) > 1e-2
    assert float(forth) + float(back) == pytest.approx(float(clip_loss(a_ND, b_ND, 10.0)))


def test_rows_and_columns_may_differ_in_number() -> None:
    a_ND, b_HD = features(0, 3), features(1, 6)
    found = similarity(a_ND, b_HD, 2.0)
    assert found.shape == (3, 6)
    assert float(found[1, 4]) == pytest.approx(2 * float(a_ND[1] @ b_HD[4]))
    assert float(cross_entropy(a_ND, b_HD, 2.0)) == pytest.approx(
        slow_ce(a_ND.tolist(), b_HD.tolist(), 2.0)
    )


@pytest.mark.parametrize("name", TERMS)
def test_autocast_leaves_the_loss_in_full_precision(name: str) -> None:
    """At scale 100 bfloat16 logits would be rounded to halves and quarters."""
    a_ND, b_ND = features(0, 32, 64).float(), features(1, 32, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = TERMS[name](a_ND, b_ND, 100.0)
    assert float(found) > 1
    assert found.dtype == torch.float32
    assert torch.equal(found, TERMS[name](a_ND, b_ND, 100.0))
