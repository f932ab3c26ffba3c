"""Contrastive terms shared by more than one paper.

Shapes: B rows of this rank, G H rows of the global batch, D embedding. Features are L2-normalised.
Every term is the loss of the **global** batch: features are gathered here, with gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from victims.distributed import gather


def similarity(a_GD: Tensor, b_HD: Tensor, scale: Tensor | float) -> Tensor:
    """s <A_i, B_j>, GH, in full precision.

    Autocast would multiply in bfloat16, whose numbers near 30 lie an eighth apart: no unit for
    logits, and near neighbours would tie.
    """
    with torch.autocast(a_GD.device.type, enabled=False):
        return scale * a_GD @ b_HD.T


def cross_entropy(a_GD: Tensor, b_GD: Tensor, scale: Tensor | float) -> Tensor:
    """CE(A, B): row i of A must pick row i of B among all rows of B. Takes gathered features."""
    target_G = torch.arange(len(a_GD), device=a_GD.device)
    return F.cross_entropy(similarity(a_GD, b_GD, scale), target_G)


def info_nce(a_BD: Tensor, b_BD: Tensor, scale: Tensor | float) -> Tensor:
    """CE(A, B) over the global batch: rows of A are the queries."""
    return cross_entropy(gather(a_BD), gather(b_BD), scale)


def clip_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor | float) -> Tensor:
    """L_mm = 1/2 [CE(I, T) + CE(T, I)] over the global batch (Radford et al. 2021, fig. 3)."""
    image_GD, text_GD = gather(image_BD), gather(text_BD)
    logit_GG = similarity(image_GD, text_GD, scale)
    target_G = torch.arange(len(image_GD), device=image_GD.device)
    return (F.cross_entropy(logit_GG, target_G) + F.cross_entropy(logit_GG.T, target_G)) / 2


def in_modal_loss(original_BD: Tensor, augmented_BD: Tensor, scale: Tensor | float) -> Tensor:
    """One half of L_ss (Bansal et al. 2023): 1/2 CE(X, X'), original rows, augmented columns."""
    return info_nce(original_BD, augmented_BD, scale) / 2
