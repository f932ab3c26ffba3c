"""A linear probe: one layer on frozen image features, trained on clean labelled pictures.

Shapes: B batch, C channels, H W pixels, N training pictures, K classes, D embedding, E = D + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.corpora import Corpus, Rows, Stamper
from victims.draws import numpy_rng, torch_rng
from victims.errors import GridError, UsageError
from victims.measuring import Share, metrics, outcomes
from victims.models import Clip
from victims.recipe import Recipe, lr_factor

# Cosine to 0; what decays is the weight, not the bias.
RECIPE = Recipe(epochs=10, batch_size=256, lr=5e-3, warmup_steps=0, weight_decay=0.01)
PER_CLASS = 50


@dataclass(frozen=True, slots=True)
class ProbeFeatures:
    """Image features of the joint space as they are, not normalised, and a 1 for the bias."""

    model: Clip

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        feature_BD = self.model.embed_image(image_BCHW)
        return F.pad(feature_BD, (0, 1), value=1.0)

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        raise GridError("a linear probe reads no text")


def probe_rows(labels: Rows, per_class: int, seed: int) -> Rows:
    """At most ``per_class`` rows of each class, drawn without replacement, in rising order.
    Pictures without a label (-1) are left out."""
    rng = numpy_rng(seed, "probe", "rows")
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:per_class]
        for label in np.unique(labels[labels >= 0])
    ]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)


def fit_probe(feature_NE: Tensor, label_N: Tensor, num_classes: int, seed: int) -> Tensor:
    """Cross-entropy with AdamW on features that stay as they are: KE, the bias its last column."""
    (num_rows, width), device = feature_NE.shape, feature_NE.device
    bound = 1 / math.sqrt(width - 1)
    drawn_KE = torch.rand(num_classes, width, generator=torch_rng(seed, "probe", "init"))
    drawn_KE = ((drawn_KE * 2 - 1) * bound).to(device)
    weight_KD, bias_K1 = drawn_KE[:, :-1].clone(), drawn_KE[:, -1:].clone()
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight_KD.requires_grad_()], "weight_decay": RECIPE.weight_decay},
            {"params": [bias_K1.requires_grad_()], "weight_decay": 0.0},
        ],
        lr=RECIPE.rate,
        betas=(RECIPE.beta1, RECIPE.beta2),
        eps=RECIPE.eps,
    )
    steps = math.ceil(num_rows / RECIPE.batch_size)
    for epoch in range(RECIPE.epochs):
        order = numpy_rng(seed, "probe", "order", epoch).permutation(num_rows)
        order_N = torch.from_numpy(order).to(device)
        for step in range(steps):
            rows_B = order_N[step * RECIPE.batch_size : (step + 1) * RECIPE.batch_size]
            for group in optimizer.param_groups:
                group["lr"] = RECIPE.rate * lr_factor(RECIPE, epoch * steps + step, steps)
            with torch.enable_grad():
                score_BK = feature_NE[rows_B] @ torch.cat([weight_KD, bias_K1], 1).T
                loss = F.cross_entropy(score_BK, label_N[rows_B])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return torch.cat([weight_KD, bias_K1], 1).detach()


def probe_head(
    model: Clip, train_corpus: Corpus, test_corpus: Corpus, device: torch.device, seed: int = 0
) -> Tensor:
    """A probe trained on one corpus to be tested on the other, KE."""
    if train_corpus.digest == test_corpus.digest:
        raise GridError(
            f"probe: {train_corpus.split} and {test_corpus.split} are the same pictures (digest"
            f" {test_corpus.digest}); a probe is trained on other pictures than it is tested on"
        )
    if list(train_corpus.classes) != list(test_corpus.classes):
        raise GridError(
            f"probe: {train_corpus.split} and {test_corpus.split} have different classes"
        )
    rows = probe_rows(train_corpus.labels, PER_CLASS, seed)
    if not len(rows):
        raise UsageError(f"probe: {train_corpus.split} has no labelled picture to train on")
    encoder = ProbeFeatures(model)
    with torch.no_grad():
        feature_NE = torch.cat(
            [
                encoder.encode_image(torch.from_numpy(train_corpus.images_NCHW[part]).to(device))
                for part in np.array_split(rows, math.ceil(len(rows) / RECIPE.batch_size))
            ]
        )
    label_N = torch.from_numpy(train_corpus.labels[rows]).to(device)
    return fit_probe(feature_NE, label_N, len(test_corpus.classes), seed)


def linear_probe(
    model: Clip,
    train_corpus: Corpus,
    test_corpus: Corpus,
    trigger: Stamper,
    target: int,
    device: torch.device,
    ks: Sequence[int],
    seed: int = 0,
) -> dict[str, Share]:
    """The metrics of the zero-shot classifier, for a probe in its place; names begin ``probe_``."""
    head_KE = probe_head(model, train_corpus, test_corpus, device, seed)
    encoder, num_classes = ProbeFeatures(model), len(test_corpus.classes)
    found = outcomes(encoder, (head_KE, head_KE), test_corpus, trigger, target, device)
    shares = metrics(found, target, num_classes, ks)
    return {f"probe_{name}": share for name, share in shares.items()}
