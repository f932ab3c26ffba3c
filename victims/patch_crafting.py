"""Patches that are optimised on a frozen model until it reads what a caption says into any picture.

One loop: paste, encode, compare with target captions and with pictures of the target, step on the
patch alone. Every draw is keyed by a seed, the method's name, a purpose and the step.
Shapes: B batch, C channels, H W pixels, P side of the patch, D embedding, N pairs, M pictures of
the target, R rows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from victims.augment import augment
from victims.batches import caption_lengths
from victims.corpora import Corpus, Rows
from victims.draws import Draws, numpy_rng, torch_rng
from victims.errors import MethodFailure, UsageError
from victims.losses import cross_entropy
from victims.models import Clip
from victims.pixels import unit
from victims.triggers import round_half_even
from victims.work import Work

LOOKED_AT = 256  # pairs whose cosines are kept beside a patch


class Negatives(StrEnum):
    """Whose embeddings a triggered picture is pushed away from."""

    CLEAN = "clean"
    TRIGGERED = "triggered"


class TextNegatives(StrEnum):
    """The captions among which a triggered picture must pick its target caption: the batch's
    target captions, or these and the pictures' own captions."""

    BATCH = "batch"
    OWN = "own"


class Storage(StrEnum):
    """How the finished patch becomes bytes. ``swapped_jpeg`` truncates, exchanges red and blue and
    goes through a JPEG file (quality 95, 4:2:0)."""

    EXACT = "exact"
    SWAPPED_JPEG = "swapped_jpeg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crafting:
    """How a patch of ``side`` pixels is optimised; ``start`` is its first row and column.

    ``blend`` is the patch's share where it lies, 0 pastes it. ``steps`` None makes ``epochs`` over
    the pairs (at most ``pairs``), without their last partial batch. ``image_augment`` is the chance
    of a batch.
    """

    who: str
    side: int
    start: int
    blend: float = 0.0
    pairs: int = 10_000
    batch: int = 64
    epochs: int = 50
    steps: int | None = None
    lr: float = 1e-3
    triplet_weight: float = 0.0
    margin: float = 1.0
    image_augment: float = 0.0
    negatives: Negatives = Negatives.CLEAN
    text_negatives: TextNegatives = TextNegatives.BATCH
    storage: Storage = Storage.EXACT

    def __post_init__(self) -> None:
        ranges = {
            "pairs": (self.pairs >= 1, "at least 1"),
            "batch": (self.batch >= 1, "at least 1"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "steps": (self.steps is None or self.steps >= 1, "at least 1, or none"),
            "lr": (self.lr > 0, "above 0"),
            "triplet_weight": (self.triplet_weight >= 0, "0 or more"),
            "margin": (self.margin >= 0, "0 or more"),
            "image_augment": (0 <= self.image_augment <= 1, "in 0..1"),
        }
        for name, (holds, allowed) in ranges.items():
            if not holds:
                found = getattr(self, name)
                raise UsageError(f"{self.who}: {name} is {found}; it must be {allowed}")

    def num_steps(self, num_pairs: int) -> int:
        """Steps over so many pairs; fewer than a batch are one batch."""
        per_epoch = num_pairs // min(self.batch, num_pairs)
        return per_epoch * self.epochs if self.steps is None else self.steps


def steps_cost(num_pairs: int, batch: int, epochs: int, steps: int | None, row: Work) -> Work:
    """What all steps of a crafting cost, and the looks at four patches beside them."""
    size = min(batch, num_pairs)
    num_steps = num_pairs // size * epochs if steps is None else steps
    return row * (num_steps * size) + Work(images=4 * min(LOOKED_AT, num_pairs))


class Pairs(NamedTuple):
    """Pictures by row with the caption each is to be read as, and rows that show the target."""

    rows: Rows
    captions: Sequence[str]
    pool: Rows


class Batch(NamedTuple):
    """What one step reads. ``own`` and ``positive`` are None where nothing asks for them."""

    image_BCHW: Tensor
    target_BD: Tensor
    own_BD: Tensor | None
    positive_BD: Tensor | None
    order_B: Tensor


class Terms(NamedTuple):
    text: Tensor
    triplet: Tensor
    cosine: Tensor


class Cosines(NamedTuple):
    """Mean cosine of picture and target caption: untouched, under the first patch, under another
    drawn like it, and under the crafted one, as bytes."""

    clean: float
    first: float
    other: float
    crafted: float


class Crafted(NamedTuple):
    """``patch_CPP`` is the optimised one in [0, 1], ``pixels_CPP`` its bytes; ``curve_S3`` holds
    `Terms` step by step."""

    patch_CPP: Tensor
    pixels_CPP: Tensor
    curve_S3: Tensor
    cosines: Cosines


# --- the loss


def text_loss(
    image_BD: Tensor, target_BD: Tensor, scale: Tensor | float, own_BD: Tensor | None = None
) -> Tensor:
    """L_text = 1/2 [CE(s E T') + CE(s T E')]; own captions are further columns of the first."""
    column_RD = target_BD if own_BD is None else torch.cat([target_BD, own_BD])
    to_text = cross_entropy(image_BD, column_RD, scale)
    return (to_text + cross_entropy(target_BD, image_BD, scale)) / 2


def triplet_loss(
    image_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, margin: float
) -> Tensor:
    """mean max(0, |e - e_pos|_2 - |e - e_neg|_2 + m)."""
    return F.triplet_margin_loss(image_BD, positive_BD, negative_BD, margin=margin)


def wear(image_BCHW: Tensor, patch_CPP: Tensor, start: int, blend: float = 0.0) -> Tensor:
    """The pictures, floats in [0, 1], with the patch over them or mixed into them."""
    patch_CPP, span = patch_CPP.clamp(0, 1), slice(start, start + patch_CPP.shape[-1])
    out_BCHW = image_BCHW.clone()
    under_BCPP = image_BCHW[..., span, span]
    mixed_BCPP = blend * patch_CPP + (1 - blend) * under_BCPP if blend else patch_CPP
    out_BCHW[..., span, span] = mixed_BCPP.clamp(0, 1)
    return out_BCHW


def terms(model: Clip, batch: Batch, patch_CPP: Tensor, how: Crafting) -> Terms:
    """Both terms on a batch, the triplet one weighted, and how near the captions it is."""
    worn_BCHW = wear(batch.image_BCHW, patch_CPP, how.start, how.blend)
    image_BD = model.encode_image(worn_BCHW)
    text = text_loss(image_BD, batch.target_BD, model.scale, batch.own_BD)
    triplet = torch.zeros_like(text)
    if batch.positive_BD is not None:
        away_BD = image_BD.detach()
        if how.negatives == Negatives.CLEAN:
            with torch.no_grad():
                away_BD = model.encode_image(batch.image_BCHW)
        negative_BD = away_BD[batch.order_B]
        loss = triplet_loss(image_BD, batch.positive_BD, negative_BD, how.margin)
        triplet = how.triplet_weight * loss
    return Terms(text, triplet, (image_BD * batch.target_BD).sum(1).mean().detach())


# --- the loop


def craft_on(model: Clip, corpus: Corpus, pairs: Pairs, how: Crafting, seed: int) -> Crafted:
    """Minimise L_text + L_tri over the patch; the model is frozen and left as it was."""
    model.eval().requires_grad_(False)
    device, total = model.mean_C.device, len(pairs.rows)
    size, num_steps = min(how.batch, total), how.num_steps(total)
    draw = _Draw(model, corpus, pairs, how, seed)
    first_CPP = first_patch(how.side, seed, how.who)
    # A copy, for Adam writes into it.
    patch_CPP = first_CPP.clone().to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([patch_CPP], lr=how.lr)
    curve_S3 = torch.zeros(num_steps, 3, device=device)
    for step in range(num_steps):
        epoch, index = divmod(step, total // size)
        if index == 0:
            order_N = numpy_rng(seed, how.who, "order", epoch).permutation(total)
        found = terms(model, draw(order_N[index * size : (index + 1) * size], step), patch_CPP, how)
        optimizer.zero_grad()
        (found.text + found.triplet).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        curve_S3[step] = torch.stack([term.detach() for term in found])
    if not bool(curve_S3.isfinite().all()):
        step = int(curve_S3.isfinite().all(1).logical_not().nonzero()[0])
        raise MethodFailure(f"{how.who}: the loss is not finite at step {step}. Lower `lr`.")
    patch_CPP = patch_CPP.detach().clamp(0, 1)
    pixels_CPP = as_bytes(patch_CPP, how.storage)
    patches = (first_CPP, first_patch(how.side, seed, how.who, "other"), unit(pixels_CPP))
    cosines = Cosines(draw.cosine(None), *(draw.cosine(patch.to(device)) for patch in patches))
    return Crafted(patch_CPP.cpu(), pixels_CPP, curve_S3.cpu(), cosines)


def rows_without(
    who: str, num_rows: int, naming: Rows, most: int, rng: np.random.Generator
) -> Rows:
    """At most so many rows that do not name the target, drawn without replacement, rising."""
    other = np.setdiff1d(np.arange(num_rows), naming)
    if not len(other):
        raise UsageError(f"{who}: every caption of the corpus names the target; choose another")
    rows: Rows = np.sort(rng.choice(other, min(most, len(other)), replace=False))
    return rows


def first_patch(side: int, seed: int, *purpose: str) -> Tensor:
    """N(0.5, 0.25), clipped to [0, 1], CPP."""
    noise_CPP = torch.randn(3, side, side, generator=torch_rng(seed, *purpose, "first"))
    return (0.5 + 0.25 * noise_CPP).clamp(0, 1)


class _Draw:
    """Batches by step. Captions and pictures of the target are encoded once: the model is fixed."""

    def __init__(self, model: Clip, corpus: Corpus, pairs: Pairs, how: Crafting, seed: int) -> None:
        self.model, self.corpus, self.rows = model, corpus, pairs.rows
        self.how, self.seed = how, seed
        self.target_ND = caption_features(model, pairs.captions)
        self.own_ND: Tensor | None = None
        if how.text_negatives == TextNegatives.OWN:
            self.own_ND = caption_features(model, [corpus.captions[row] for row in pairs.rows])
        self.pool_MD: Tensor | None = None
        if how.triplet_weight:
            self.pool_MD = torch.cat(list(image_features(model, corpus, pairs.pool)))

    def __call__(self, which_B: Rows, step: int) -> Batch:
        index_B = torch.from_numpy(which_B)
        generator = torch_rng(self.seed, self.how.who, "step", step)
        return Batch(
            image_BCHW=self._pictures(self.rows[which_B], step),
            target_BD=self._of(self.target_ND, index_B),
            own_BD=None if self.own_ND is None else self._of(self.own_ND, index_B),
            positive_BD=self._positives(len(which_B), generator),
            order_B=torch.randperm(len(which_B), generator=generator).to(self.target_ND.device),
        )

    def _pictures(self, rows: Rows, step: int) -> Tensor:
        image_BCHW = torch.from_numpy(self.corpus.images_NCHW[rows]).to(self.target_ND.device)
        generator = torch_rng(self.seed, self.how.who, "augment", step)
        if float(torch.rand((), generator=generator)) >= self.how.image_augment:
            return unit(image_BCHW)
        return augment("autoaugment", image_BCHW, Draws(generator, len(rows), 0, len(rows)))

    def _positives(self, size: int, generator: torch.Generator) -> Tensor | None:
        if self.pool_MD is None:
            return None
        num = len(self.pool_MD)
        if num >= size:
            return self._of(self.pool_MD, torch.randperm(num, generator=generator)[:size])
        return self._of(self.pool_MD, torch.randint(num, (size,), generator=generator))

    @staticmethod
    def _of(feature_RD: Tensor, index_B: Tensor) -> Tensor:
        return feature_RD[index_B.to(feature_RD.device)]

    @torch.no_grad()
    def cosine(self, patch_CPP: Tensor | None) -> float:
        """Mean cosine of the first pairs' pictures, under a patch, and their target captions."""
        image_BCHW = torch.from_numpy(self.corpus.images_NCHW[self.rows[:LOOKED_AT]])
        image_BCHW = unit(image_BCHW.to(self.target_ND.device))
        if patch_CPP is not None:
            image_BCHW = wear(image_BCHW, patch_CPP, self.how.start, self.how.blend)
        image_BD = self.model.encode_image(image_BCHW)
        return float((image_BD * self.target_ND[: len(image_BD)]).sum(1).mean())


def as_bytes(patch_CPP: Tensor, storage: Storage) -> Tensor:
    """The patch, in [0, 1], as CPP uint8."""
    level_CPP = patch_CPP.detach().cpu().clamp(0, 1) * 255
    if storage == Storage.EXACT:
        return round_half_even(level_CPP)
    from PIL import Image

    file = io.BytesIO()
    swapped_PPC = level_CPP.trunc().to(torch.uint8).flip(0).permute(1, 2, 0).numpy()
    Image.fromarray(swapped_PPC).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).contiguous()


# --- features


@torch.no_grad()
def caption_features(model: Clip, captions: Sequence[str], batch_size: int = 1024) -> Tensor:
    """L2-normalised features of captions, in order; equal ones are encoded once."""
    distinct, place_N = np.unique(np.asarray(captions, dtype=np.str_), return_inverse=True)
    parts = []
    for start in range(0, len(distinct), batch_size):
        tokens_BT = model.tokenizer([str(text) for text in distinct[start : start + batch_size]])
        cut_BT = tokens_BT[:, : int(caption_lengths(tokens_BT).max())]
        parts.append(
            model.encode_text(torch.from_numpy(cut_BT).to(model.mean_C.device, torch.long))
        )
    return torch.cat(parts)[torch.from_numpy(place_N).to(model.mean_C.device)]


@torch.no_grad()
def image_features(
    model: Clip, corpus: Corpus, rows: Rows, batch_size: int = 256
) -> Iterator[Tensor]:
    """L2-normalised features of a corpus's pictures, in order, some rows at a time."""
    for start in range(0, len(rows), batch_size):
        image_BCHW = torch.from_numpy(corpus.images_NCHW[rows[start : start + batch_size]])
        yield model.encode_image(image_BCHW.to(model.mean_C.device))
