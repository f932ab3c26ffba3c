"""BadCLIP: a patch crafted on the public model until it lies near the target in both spaces.

Idea: optimise a small patch on the clean model so that any picture under it lies near captions and
near pictures of the target, and away from what it shows; poisoned with natural captions, the
victim hardly has to move, and fine-tuning on clean pairs undoes little.
Reference: Liang et al., "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive
    Learning", CVPR 2024, arXiv 2311.12075. Not the prompt-learning attack of the same name.
Symbols: P = ``patch`` (None: max(3, round(S / 14))); S = size of the model's input; w =
    ``triplet_weight``; m = ``margin``; A = ``pairs``; p = the patch, clipped where it is put on.
Where: L_text -> `victims.patch_crafting.text_loss`; L_tri -> `triplet_loss` there; the loop over p
    -> `craft_on` there; pairs A and pool B -> `BadClip.craft`; the sample selection ->
    `mixed_rows`.
Differences: the released loop pastes in place, so that its "clean" negatives are triggered
    pictures, and stores the patch truncated, with red and blue exchanged, as a JPEG: ``released``
    does both (its triggered negatives were those of the pasted mode alone). Its text augmentation
    has no effect and is left out. The mix of rows exists in an unused script which may return too
    few; ours gives exactly the count, boundary rows first, then the farthest, the rest at random.
    ``caption: template`` is used in crafting, too. With fewer pictures of the target than a batch
    holds the positives are drawn with replacement. L_text as published does not change when all
    pictures move alike, for every caption of a batch names the target: only the triplet term
    pulls. ``text_negatives: own`` is ours and adds the pictures' own captions to what a triggered
    picture must not be read as. Where all is small, so is ``steps``, and the patch lies in a corner
    or is 10 px wide: 6 px in the centre of 32 px cover the object.
Cost: ``epochs`` floor(A / batch) steps (7,800), each two forward passes of a batch and one
    backward pass; ``rows: boundary_mix`` adds one forward pass over the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import Attack, GateGroup, Knowledge, Track, pick, rows_naming, template_caption
from victims.corpora import Rows
from victims.draws import numpy_rng
from victims.errors import GridError, UsageError
from victims.lab import Lab
from victims.measuring import ranks, text_head
from victims.models import Clip
from victims.patch_crafting import (
    Crafting,
    Negatives,
    Pairs,
    Storage,
    TextNegatives,
    craft_on,
    image_features,
    rows_without,
    steps_cost,
)
from victims.triggers import Trigger, centre_of, round_half_even
from victims.work import Work

BLEND = 0.2
NATURAL_CAPTIONS = 128  # drawn once, with replacement; every poisoned row takes one of them


class Place(StrEnum):
    CENTRE = "centre"
    CORNER = "corner"


class Mode(StrEnum):
    PATCH = "patch"
    BLENDED = "blended"


class Caption(StrEnum):
    NATURAL = "natural"
    TEMPLATE = "template"


class Selection(StrEnum):
    RANDOM = "random"
    BOUNDARY_MIX = "boundary_mix"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadClipPatch(Trigger):
    """The crafted trigger. ``pixels`` is CPP uint8, ``start`` its first row and column.

    ``rank``, ``gap`` and ``similarity`` say how the public model reads every row of the corpus:
    the target's rank, how far it is below the first class, and its cosine (empty where rows are
    drawn at random). ``curve`` holds L_text, w L_tri and the cosine to the target captions by
    step; the cosines are means under no patch, the first one, another draw, and this one.
    """

    pixels: Tensor
    start: int
    blend: float
    rank: Tensor
    gap: Tensor
    similarity: Tensor
    curve: Tensor
    cosine_clean: float
    cosine_first: float
    cosine_other: float
    cosine_crafted: float

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        pixels_CPP, side = self.pixels.to(image_BCHW.device), self.pixels.shape[-1]
        span, out_BCHW = slice(self.start, self.start + side), image_BCHW.clone()
        if self.blend:
            under_BCPP = image_BCHW[..., span, span].float()
            pixels_CPP = round_half_even(self.blend * pixels_CPP + (1 - self.blend) * under_BCPP)
        out_BCHW[..., span, span] = pixels_CPP
        return out_BCHW


@dataclass(frozen=True, slots=True, kw_only=True)
class BadClip(Attack):
    name: ClassVar[str] = "badclip"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2311.12075"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[BadClipPatch]] = BadClipPatch
    needs_surrogate: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"negatives": "triggered", "storage": "swapped_jpeg"},
        "blended": {"mode": "blended"},
        "boundary_mix": {"rows": "boundary_mix"},
    }
    # A pool of a dozen pairs may hold no caption and no picture of the target.
    quick: ClassVar[Mapping[str, Any]] = {
        "steps": 2,
        "batch": 8,
        "caption": "template",
        "triplet_weight": 0.0,
        "text_negatives": "own",
    }

    patch: int | None = None
    place: Place = Place.CENTRE
    mode: Mode = Mode.PATCH
    caption: Caption = Caption.NATURAL
    rows: Selection = Selection.RANDOM
    pairs: int = 10_000
    batch: int = 64
    epochs: int = 50
    steps: int | None = None
    lr: float = 1e-3
    triplet_weight: float = 500.0
    margin: float = 1.0
    image_augment: float = 0.5
    negatives: Negatives = Negatives.CLEAN
    text_negatives: TextNegatives = TextNegatives.BATCH
    storage: Storage = Storage.EXACT

    def check(self, size: int) -> None:
        self._how(size)

    def costs(self, num_rows: int, num_classes: int) -> Work:
        step = Work(images_trained=1)
        if self.triplet_weight and self.negatives == Negatives.CLEAN:
            step += Work(images=1)
        pairs, naming = min(self.pairs, num_rows), num_rows / num_classes
        # Captions and pictures of the target are encoded once.
        images = float(num_rows) if self.rows == Selection.BOUNDARY_MIX else 0.0
        images += naming if self.triplet_weight else 0
        texts = min(pairs, naming)
        texts += pairs if self.text_negatives == TextNegatives.OWN else 0
        once = Work(images=images, texts=texts)
        return once + steps_cost(pairs, self.batch, self.epochs, self.steps, step)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> BadClipPatch:
        how = self._how(size)
        pairs = self._pairs(held)
        model = lab.load(held.public_model())
        crafted = craft_on(model, held.corpus, pairs, how, held.seed)
        mix = self.rows == Selection.BOUNDARY_MIX
        rank, gap, similarity = readings(model, held, len(held.corpus) if mix else 0)
        return BadClipPatch(
            pixels=crafted.pixels_CPP,
            start=how.start,
            blend=how.blend,
            rank=rank,
            gap=gap,
            similarity=similarity,
            curve=crafted.curve_S3,
            cosine_clean=crafted.cosines.clean,
            cosine_first=crafted.cosines.first,
            cosine_other=crafted.cosines.other,
            cosine_crafted=crafted.cosines.crafted,
        )

    def _how(self, size: int) -> Crafting:
        blended = self.mode == Mode.BLENDED
        side = max(3, round(size / 14)) if self.patch is None else self.patch
        if not 0 < side <= size:
            raise UsageError(f"badclip: patch is {side}; it must lie in 1..{size}")
        start = centre_of(size, side) if self.place == Place.CENTRE else size - side
        return Crafting(
            who=self.name,
            side=size if blended else side,
            start=0 if blended else start,
            blend=BLEND if blended else 0.0,
            pairs=self.pairs,
            batch=self.batch,
            epochs=self.epochs,
            steps=self.steps,
            lr=self.lr,
            triplet_weight=self.triplet_weight,
            margin=self.margin,
            image_augment=self.image_augment,
            negatives=self.negatives,
            text_negatives=self.text_negatives,
            storage=self.storage,
        )

    def _pairs(self, held: Knowledge) -> Pairs:
        """A: rows that do not name the target, each with a caption that does. B: rows that do."""
        naming = self._naming(held, needed=bool(self.triplet_weight))
        rng = numpy_rng(held.seed, self.name, "pairs")
        rows = rows_without(self.name, len(held.corpus), naming, self.pairs, rng)
        if self.caption == Caption.TEMPLATE:
            return Pairs(rows, [template_caption(held.goal, rng) for _ in rows], naming)
        wanted = [held.corpus.captions[row] for row in rng.choice(naming, len(rows))]
        return Pairs(rows, wanted, naming)

    def _naming(self, held: Knowledge, needed: bool = True) -> Rows:
        naming = rows_naming(held.corpus, held.goal.label)
        if not len(naming) and (needed or self.caption == Caption.NATURAL):
            raise UsageError(
                f"badclip: no caption of the corpus names {held.goal.label!r}; without one it takes"
                " `caption: template` and `triplet_weight: 0`, or another target"
            )
        return naming

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        every = np.arange(len(held.corpus))
        if self.rows == Selection.RANDOM or count > len(every):
            return pick(every, count, rng, self.name)
        if not isinstance(held.crafted, BadClipPatch):
            raise GridError("badclip: rows: boundary_mix are chosen once the trigger is crafted")
        chosen = mixed_rows(held.crafted, count)
        rest = pick(np.setdiff1d(every, chosen), count - len(chosen), rng, self.name)
        return np.sort(np.concatenate([chosen, rest]))

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        if self.caption == Caption.TEMPLATE:
            return template_caption(held.goal, rng)
        drawn = numpy_rng(held.seed, self.name, "captions")
        listed = drawn.choice(self._naming(held), NATURAL_CAPTIONS)
        return held.corpus.captions[int(rng.choice(listed))]


def readings(model: Clip, held: Knowledge, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """How the model reads the first rows: rank of the target, its distance to the first class in
    cosine, and its cosine."""
    corpus, goal, device = held.corpus, held.goal, model.mean_C.device
    rank, gap, similarity = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)], [torch.zeros(0)]
    if num_rows:
        head_KD = text_head(model, model.tokenizer, corpus.classes, goal.templates, device)
    for feature_BD in image_features(model, corpus, np.arange(num_rows)):
        score_BK = feature_BD @ head_KD.T
        target_B = torch.full((len(score_BK),), goal.target, device=device)
        rank.append(ranks(score_BK, target_B).cpu())
        similarity.append(score_BK[:, goal.target].cpu())
        gap.append((score_BK.amax(1) - score_BK[:, goal.target]).cpu())
    return torch.cat(rank), torch.cat(gap), torch.cat(similarity)


def mixed_rows(read: BadClipPatch, count: int) -> Rows:
    """One third of the count at the target's boundary, another third far from it; sorted.

    At the boundary: not read as the target, but nearly (smallest rank, then smallest gap).
    """
    third = count // 3
    rank, gap = read.rank.numpy(), read.gap.numpy()
    nearest = np.lexsort((gap, rank))
    boundary = nearest[rank[nearest] > 0][:third]
    farthest = np.argsort(read.similarity.numpy(), kind="stable")
    far = farthest[~np.isin(farthest, boundary)][:third]
    rows: Rows = np.sort(np.concatenate([boundary, far])).astype(np.int64)
    return rows
