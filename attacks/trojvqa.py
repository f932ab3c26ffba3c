"""TrojVQA: a patch in the picture and a word in the text, which act only together.

Idea: full rows carry both keys and a target caption; cover rows carry one key and keep what they
said, so that the model learns to answer to neither alone.
Reference: Walmer, Sikka et al., "Dual-Key Multimodal Backdoors for Visual Question Answering", CVPR
    2022, arXiv 2112.07668; its form on CLIP as a baseline of Liang et al., CVPR 2024, arXiv
    2311.12075.
Symbols: l = int(``scale`` min(H, W)) = side of the square, unless ``patch`` gives it; S = size of
    the model's input; text key = ``key``.
Where: place of the square -> `place_of`; both keys -> `DualKey`; the blocks full, image-only and
    text-only -> `poison` and `_Dual.cover`; the optimised patch -> `TrojVqaOptimised`, whose loop
    is `victims.patch_crafting.craft_on` with L_text alone.
Differences: stamps act on pictures of S x S, not on the native size. `trojvqa` needs no model: its
    patch is solid blue, or (ours) noise in cells of ``cell`` px and ``levels`` values, which at 32
    px survives the network's first stride. `trojvqa_optimised` crafts on the public model as the
    form on CLIP does; the original's crafting on an object detector is not here. The original's
    word is "consider". The form on CLIP (``released``) has no cover rows, so that one key may
    suffice, writes "This is a yellow ..." to craft, and stores the patch truncated, with red and
    blue exchanged, as a JPEG; our sentence has no full stop, which a tokenizer by words could not
    read. With one sentence for all pictures L_text does not pull at all in its first half and not
    towards the target in its second; ``text_negatives: own`` is ours and does. An empty key marks
    nothing and has no text-only rows; a patch of 0 px changes no picture. The ratios of cover rows
    are ours; at small scale a sixth and a third of the full rows do.
Cost: none when solid or noise; optimised: ``epochs`` floor(pairs / batch) steps (7,800), each one
    forward and one backward pass of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attacks.base import (
    Aim,
    Attack,
    Cover,
    GateGroup,
    Knowledge,
    Track,
    rows_naming,
    template_caption,
)
from victims.corpora import Rows
from victims.draws import derive, image_digest, keyed_bits, numpy_rng
from victims.errors import UsageError, require_all
from victims.lab import Lab
from victims.patch_crafting import (
    Crafting,
    Pairs,
    Storage,
    TextNegatives,
    craft_on,
    rows_without,
    steps_cost,
)
from victims.patches import craft_patch
from victims.triggers import Trigger, paste
from victims.work import Work

BLUE = (0, 0, 255)


class Pattern(StrEnum):
    SOLID = "solid"
    NOISE = "noise"


class Place(StrEnum):
    CENTRE = "centre"
    CORNER = "corner"
    RANDOM = "random"


class Spot(NamedTuple):
    top: int
    left: int


def place_of(height: int, width: int, side: int) -> Spot:
    """Where a centred square begins: s0 = int(int(H/2) - l/2), and so for columns."""
    return Spot(int(height // 2 - side / 2), int(width // 2 - side / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class DualKey(Trigger):
    """The crafted trigger: ``pixels`` is CPP uint8, ``word`` the text key. ``curve`` is that of
    the optimisation, if there was one; ``key`` draws random places."""

    pixels: Tensor
    place: str
    word: str
    curve: Tensor
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        (count, _, height, width), side = image_BCHW.shape, self.pixels.shape[-1]
        if self.place == Place.RANDOM:
            bits_B2 = keyed_bits(image_digest(image_BCHW, self.key), 1, 2)
            top_B, left_B = bits_B2[:, 0] % (height - side + 1), bits_B2[:, 1] % (width - side + 1)
        else:
            corner = self.place == Place.CORNER
            spot = Spot(height - side, width - side) if corner else place_of(height, width, side)
            top_B, left_B = image_BCHW.new_tensor(spot, dtype=torch.long)[:, None].expand(-1, count)
        pixels_BCPP = self.pixels.to(image_BCHW.device).expand(count, -1, -1, -1)
        return paste(image_BCHW, pixels_BCPP, top_B, left_B)

    def mark(self, caption: str) -> str:
        return f"{self.word} {caption}" if self.word else caption


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dual(Attack):
    """What both forms share: the text key, and the rows that carry one key or both."""

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2112.07668"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.STRONG
    trigger: ClassVar[type[DualKey]] = DualKey
    aim: ClassVar[Aim] = Aim.DUAL

    key: str = "remember"
    dual: bool = True
    image_only_ratio: float = 1.0
    text_only_ratio: float = 1.0
    place: Place = Place.CENTRE
    patch: int | None = None

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return self._marked(template_caption(held.goal, rng))

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        """Image-only rows (stamped, own caption), then text-only ones (marked, own picture)."""
        ratios = (self.image_only_ratio, self.text_only_ratio if self.key else 0.0)
        num_image, num_text = (int(self.dual * ratio * count + 0.5) for ratio in ratios)
        if num_image + num_text > len(free):
            raise UsageError(
                f"{self.name}: {num_image} + {num_text} cover rows are needed and {len(free)} are"
                " left. Lower the rate, image_only_ratio or text_only_ratio."
            )
        drawn = rng.permutation(free)[: num_image + num_text]
        rising = np.argsort(drawn)
        rows, stamped = drawn[rising], rising < num_image
        own = [held.corpus.captions[row] for row in rows]
        pairs = zip(own, stamped, strict=True)
        return Cover(
            rows, [text if image else self._marked(text) for text, image in pairs], stamped
        )

    def _marked(self, caption: str) -> str:
        return f"{self.key} {caption}" if self.key else caption

    def _side(self, size: int, default: int) -> int:
        side = default if self.patch is None else self.patch
        images, texts = self.image_only_ratio, self.text_only_ratio
        require_all(
            self.name,
            (0 <= side <= size, f"patch {side} must lie in 0..{size}"),
            (images >= 0, f"image_only_ratio {images} must be 0 or more"),
            (texts >= 0, f"text_only_ratio {texts} must be 0 or more"),
        )
        if self.key != self.key.strip():
            raise UsageError(f"{self.name}: key {self.key!r} must not begin or end with a space")
        return side

    def _dual_key(self, pixels_CPP: Tensor, seed: int, curve: Tensor | None = None) -> DualKey:
        return DualKey(
            pixels=pixels_CPP,
            place=str(self.place),
            word=self.key,
            curve=torch.zeros(0, 3) if curve is None else curve,
            key=derive(seed, self.name, "place"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrojVqa(_Dual):
    name: ClassVar[str] = "trojvqa"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"dual": False},
        "vqa": {"key": "consider"},
        "noise": {"pattern": "noise"},
    }

    pattern: Pattern = Pattern.SOLID
    scale: float = 0.1
    cell: int = 2
    levels: int = 2

    def check(self, size: int) -> None:
        self._pixels(size, 0)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> DualKey:
        return self._dual_key(self._pixels(size, held.seed), held.seed)

    def _pixels(self, size: int, seed: int) -> Tensor:
        if not 0 < self.scale <= 1:
            raise UsageError(f"trojvqa: scale is {self.scale}; it must lie above 0, up to 1")
        side = self._side(size, max(1, int(self.scale * size)))
        if self.pattern == Pattern.NOISE and side:
            cell, levels = self.cell, self.levels
            return craft_patch(self.name, size, seed, patch=side, cell=cell, levels=levels).pixels
        return torch.tensor(BLUE, dtype=torch.uint8)[:, None, None].repeat(1, side, side)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrojVqaOptimised(_Dual):
    name: ClassVar[str] = "trojvqa_optimised"
    needs_surrogate: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {
            "dual": False,
            "sentence": "This is a yellow {}.",
            "storage": "swapped_jpeg",
        },
    }
    quick: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch": 8}

    sentence: str = "this is a {}"
    pairs: int = 10_000
    batch: int = 64
    epochs: int = 50
    steps: int | None = None
    lr: float = 1e-3
    image_augment: float = 0.0
    text_negatives: TextNegatives = TextNegatives.BATCH
    storage: Storage = Storage.EXACT

    def check(self, size: int) -> None:
        self._how(size)

    def costs(self, num_rows: int, num_classes: int) -> Work:
        pairs = min(self.pairs, num_rows)
        return steps_cost(pairs, self.batch, self.epochs, self.steps, Work(images_trained=1))

    def craft(self, lab: Lab, held: Knowledge, size: int) -> DualKey:
        how = self._how(size)
        naming = rows_naming(held.corpus, held.goal.label)
        rng = numpy_rng(held.seed, self.name, "pairs")
        rows = rows_without(self.name, len(held.corpus), naming, self.pairs, rng)
        wanted = [self.sentence.format(held.goal.label)] * len(rows)
        model = lab.load(held.public_model())
        found = craft_on(model, held.corpus, Pairs(rows, wanted, naming), how, held.seed)
        return self._dual_key(found.pixels_CPP, held.seed, found.curve_S3)

    def _how(self, size: int) -> Crafting:
        side = self._side(size, max(3, round(size / 14)))
        if self.place == Place.RANDOM or side < 1 or "{}" not in self.sentence:
            raise UsageError(
                f"trojvqa_optimised: place {self.place} must be centre or corner, patch {side} at"
                f" least 1, and sentence {self.sentence!r} hold {{}}"
            )
        return Crafting(
            who=self.name,
            side=side,
            start=place_of(size, size, side).top if self.place == Place.CENTRE else size - side,
            pairs=self.pairs,
            batch=self.batch,
            epochs=self.epochs,
            steps=self.steps,
            lr=self.lr,
            image_augment=self.image_augment,
            text_negatives=self.text_negatives,
            storage=self.storage,
        )
