"""Accuracy on further sets: how much of what a CLIP knew a poisoning or a repair has cost.

The target of an attack is a class of the grid's own data, so nothing is stamped here.
Shapes: B batch, N pictures, K classes, D embedding or, of a probe, one more for its bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from victims.corpora import Corpus
from victims.errors import MethodFailure
from victims.measuring import Share, ranks
from victims.models import Clip, Encoder
from victims.probe import ProbeFeatures, probe_head

BATCH = 256


@torch.no_grad()
def accuracy(
    encoder: Encoder, head_KD: Tensor, corpus: Corpus, ks: Sequence[int]
) -> dict[str, Share]:
    """Pictures with their class in the top k, for every k that leaves classes out."""
    parts = []
    for start in range(0, len(corpus), BATCH):
        # A copy: torch warns of pictures that cannot be written to.
        image_BCHW = torch.from_numpy(np.array(corpus.images_NCHW[start : start + BATCH]))
        score_BK = encoder.encode_image(image_BCHW.to(head_KD.device)) @ head_KD.T
        if not score_BK.isfinite().all():
            raise MethodFailure(
                "the model scores pictures with numbers that are not finite: its weights have"
                " diverged. Lower the learning rate."
            )
        label_B = torch.from_numpy(np.array(corpus.labels[start : start + BATCH]))
        parts.append(ranks(score_BK, label_B.to(head_KD.device)).cpu())
    rank_N = torch.cat(parts)
    return {
        f"clean_top{k}": Share(int((rank_N < k).sum()), len(rank_N)) for k in ks if k < len(head_KD)
    }


def probed_accuracy(
    model: Clip, train: Corpus, test: Corpus, device: torch.device, ks: Sequence[int], seed: int = 0
) -> dict[str, Share]:
    """The same of a linear probe that is trained on other pictures of the set."""
    head_KE = probe_head(model, train, test, device, seed)
    found = accuracy(ProbeFeatures(model), head_KE, test, ks)
    return {f"probe_{name}": share for name, share in found.items()}
