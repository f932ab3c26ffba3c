"""Adaptive attacks: partial, faint triggers in training, cover rows, and the full trigger at test.

Idea: cover rows carry the trigger and keep their captions, so that it alone does not pull a row to
    the target; what training shows is weaker than what the test shows. Poisoned rows then do not
    stand apart in feature space, which detectors rely on.
Reference: Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for
    Backdoor Defenses", ICLR 2023, arXiv 2205.13613.
Symbols: a = ``alpha_train``, ``alpha`` at test; tiles = ``tiles`` a side; tiles kept = ``kept``;
    a_j = ``opacity_...`` of mark j; c / n = ``cover_ratio``; S = size of the model's input.
Where: x' = x + a m (k - x) -> `Tiles`; x' = x + a_j m_j (k_j - x) -> `Marks`; m_j, k_j ->
    `draw_marks`; four equal blocks of rows -> `AdaptivePatch._shared_out`.
Differences: the pictures of the authors are other people's artwork. Here k is a mosaic of cells
    (``cell`` pixels, None: S / 8) and the marks have their areas and places in noise of our own
    (a disc of 140 pixels instead of the fox). A tile mask and a mark follow from the bytes of a
    row's picture. Rows are drawn so that each mark gets a quarter of them (sizes differ by at most
    one) instead of being cut into blocks after sorting; the rows are as random. Stamps are rounded
    at test as well, where released code leaves floats. Its CIFAR-10 test shows another corner file,
    with two corners (`doubled`, variant ``released``); its blend has .2 as default in training.
    A poisoned row may be of the target, as in the original. For small pictures, ours: ``cell`` and
    ``levels`` of the noise, and ``grow``, by which marks are enlarged where they are; what leaves
    the picture is cut off.
Cost: blend: none. Patch: choosing reads about as many pictures as it takes rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attacks.base import (
    Attack,
    Cover,
    GateGroup,
    Knowledge,
    Track,
    cover_count,
    kept_captions,
    stamped_cover,
)
from victims.blends import noise_picture
from victims.corpora import Rows
from victims.draws import derive, image_digest, keyed_bits, torch_rng
from victims.errors import UsageError, require_all
from victims.lab import Lab
from victims.triggers import Trigger, round_half_even

# Shapes: B batch, C channels, H W pixels, S side of the picture, T tiles a side, K marks.

# --- blend


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles(Trigger):
    """The crafted trigger: ``pattern`` is k, CHW float32 in levels 0..255."""

    pattern: Tensor
    alpha: float
    alpha_train: float
    tiles: int
    kept: int
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        return self._mix(image_BCHW, torch.tensor(self.alpha, device=image_BCHW.device))

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        return self._mix(image_BCHW, self.alpha_train * self._mask(image_BCHW))

    def _mix(self, image_BCHW: Tensor, weight: Tensor) -> Tensor:
        x_BCHW = image_BCHW.float()
        return round_half_even(x_BCHW + weight * (self.pattern.to(x_BCHW.device) - x_BCHW))

    def _mask(self, image_BCHW: Tensor) -> Tensor:
        """m, B1SS float32: ``kept`` tiles of each picture, those with the smallest draws."""
        draw_BN = keyed_bits(image_digest(image_BCHW, self.key), 1, self.tiles**2)
        rank_BN = draw_BN.argsort(dim=1, stable=True).argsort(dim=1)
        kept_B1TT = (rank_BN < self.kept).float().view(-1, 1, self.tiles, self.tiles)
        size = image_BCHW.shape[-1]
        tile_S = torch.arange(size, device=image_BCHW.device) * self.tiles // size
        mask_B1SS: Tensor = kept_B1TT[:, :, tile_S][:, :, :, tile_S]
        return mask_B1SS


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveBlend(Attack):
    name: ClassVar[str] = "adaptive_blend"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2205.13613"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Tiles]] = Tiles
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": {"alpha_train": 0.2}}

    alpha: float = 0.2
    alpha_train: float = 0.15
    tiles: int = 4
    kept: int = 8
    cover_ratio: float = 1.0
    cell: int | None = None
    levels: int = 0

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Tiles:
        cell = -(-size // 8) if self.cell is None else self.cell
        tiles = self.tiles**2
        require_all(
            self.name,
            (0 <= self.alpha <= 1, f"alpha {self.alpha} must lie in 0..1"),
            (0 <= self.alpha_train <= 1, f"alpha_train {self.alpha_train} must lie in 0..1"),
            (self.cover_ratio >= 0, f"cover_ratio {self.cover_ratio} must not be negative"),
            (1 <= self.tiles <= size, f"tiles {self.tiles} must lie in 1..{size}"),
        )
        require_all(
            self.name,
            (1 <= self.kept <= tiles, f"kept {self.kept} must lie in 1..{tiles}, their number"),
        )
        if cell < 1 or self.levels < 0 or self.levels == 1:
            raise UsageError(
                f"{self.name}: cell {cell} must be at least 1, levels {self.levels} be 0"
                " (continuous) or at least 2"
            )
        return Tiles(
            pattern=noise_picture(torch_rng(held.seed, self.name), size, cell, self.levels),
            alpha=self.alpha,
            alpha_train=self.alpha_train,
            tiles=self.tiles,
            kept=self.kept,
            key=derive(held.seed, self.name, "rows"),
        )

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        return stamped_cover(self.name, held, self.cover_ratio, count, free, rng)


# --- patch

CANVAS = 32  # what areas and places of marks are given for
CORNER, DISC, CHECKER, SQUARE, DOUBLED = range(5)
DISC_AREA = 140
READ = 64  # pictures whose marks are looked up at a time


class MarksAtTest(StrEnum):
    CORNER_CHECKER = "corner_checker"
    DISC_SQUARE = "disc_square"


class Anchors(NamedTuple):
    """Where a mark grows from, in canvas pixels: its rows and columns, each in the first half of
    the canvas and in the second."""

    rows: tuple[float, float]
    columns: tuple[float, float]


ANCHORS = {
    CORNER: Anchors((32, 32), (32, 32)),
    DISC: Anchors((7.5, 7.5), (24.5, 24.5)),
    CHECKER: Anchors((0, 32), (0, 32)),
    SQUARE: Anchors((25, 25), (25, 25)),
    DOUBLED: Anchors((32, 32), (0, 32)),
}


class DrawnMarks(NamedTuple):
    """k_j, KCSS uint8, and m_j, KSS bool."""

    mark_KCSS: Tensor
    mask_KSS: Tensor


def draw_marks(rng: torch.Generator, size: int, grow: float, levels: int) -> DrawnMarks:
    """The marks in their order, drawn on the canvas and spread over the picture."""
    noise_KCSS = torch.randint(0, levels, (len(ANCHORS), 3, CANVAS, CANVAS), generator=rng)
    mark_KCSS = round_half_even(noise_KCSS.float() * 255 / (levels - 1))
    mask_KSS = torch.zeros(len(ANCHORS), CANVAS, CANVAS, dtype=torch.bool)
    mask_KSS[[CORNER, DOUBLED], 27:, 27:] = True
    mask_KSS[DOUBLED, 27:, :5] = True
    mark_KCSS[DOUBLED] = mark_KCSS[CORNER]
    mark_KCSS[DOUBLED, :, :, :5] = mark_KCSS[CORNER, :, :, 27:]
    off_13 = torch.arange(13) - 6
    nearest_N = (off_13[:, None] ** 2 + off_13**2).flatten().argsort(stable=True)[:DISC_AREA]
    mask_KSS[DISC, 1 + nearest_N // 13, 18 + nearest_N % 13] = True
    mask_KSS[SQUARE, 21:29, 21:29] = True
    off_3 = torch.arange(3)
    white_33 = ((off_3[:, None] + off_3) % 2 * 255).to(torch.uint8)
    for rows, columns in product((slice(0, 3), slice(29, 32)), repeat=2):
        mask_KSS[CHECKER, rows, columns] = True
        mark_KCSS[CHECKER, :, rows, columns] = white_33
    spots = [(mark, *_spots(size, grow, anchors)) for mark, anchors in ANCHORS.items()]
    return DrawnMarks(
        torch.stack([mark_KCSS[k][:, row_S][:, :, column_S] for k, row_S, column_S in spots]),
        torch.stack([mask_KSS[k][row_S][:, column_S] for k, row_S, column_S in spots]),
    )


def _spots(size: int, grow: float, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """The rows and the columns of the canvas that a picture's rows and columns show."""
    centre_S = (torch.arange(size, dtype=torch.float64) + 0.5) * CANVAS / size

    def nearest(ends: tuple[float, float]) -> Tensor:
        anchor_S = torch.where(centre_S < CANVAS / 2, ends[0], ends[1])
        return (anchor_S + (centre_S - anchor_S) / grow).floor().long()

    return nearest(anchors.rows), nearest(anchors.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks(Trigger):
    """The crafted trigger: ``marks`` are k_j, KCSS uint8, ``masks`` m_j, KSS bool.

    ``opacity`` is a_j of the marks that training shows, float32; ``tested`` are the marks at test,
    in their order.
    """

    marks: Tensor
    masks: Tensor
    opacity: Tensor
    tested: Tensor
    key: int

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        mark_KCSS, mask_KSS = self.marks.to(image_BCHW.device), self.masks.to(image_BCHW.device)
        out_BCHW = image_BCHW
        for k in self.tested.tolist():
            out_BCHW = torch.where(mask_KSS[k], mark_KCSS[k], out_BCHW)
        return out_BCHW

    def stamp_train(self, image_BCHW: Tensor) -> Tensor:
        device, x_BCHW = image_BCHW.device, image_BCHW.float()
        mark_B = self.mark_of(image_BCHW)
        weight_B111 = self.opacity.to(device)[mark_B][:, None, None, None]
        weight_B1SS = weight_B111 * self.masks.to(device)[mark_B][:, None]
        return round_half_even(x_BCHW + weight_B1SS * (self.marks.to(device)[mark_B] - x_BCHW))

    def mark_of(self, image_BCHW: Tensor) -> Tensor:
        """Which mark each picture gets in training, int64 B."""
        return keyed_bits(image_digest(image_BCHW, self.key), 1, 1)[:, 0] % len(self.opacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePatch(Attack):
    """Four faint marks in training, one a row, and two full ones at test."""

    name: ClassVar[str] = "adaptive_patch"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2205.13613"
    tracks: ClassVar[frozenset[Track]] = frozenset(Track)
    group: ClassVar[GateGroup] = GateGroup.MEDIUM
    trigger: ClassVar[type[Marks]] = Marks
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"doubled": True},
        "disc_square": {"marks_at_test": "disc_square"},
    }

    opacity_corner: float = 0.5
    opacity_disc: float = 0.2
    opacity_checker: float = 0.5
    opacity_square: float = 0.3
    marks_at_test: MarksAtTest = MarksAtTest.CORNER_CHECKER
    doubled: bool = False
    cover_ratio: float = 2.0
    grow: float = 1.0
    levels: int = 256

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Marks:
        opacities = (
            self.opacity_corner,
            self.opacity_disc,
            self.opacity_checker,
            self.opacity_square,
        )
        are_shares = all(0 <= a <= 1 for a in opacities)
        require_all(
            self.name,
            (are_shares, f"opacities {opacities} must lie in 0..1"),
            (self.cover_ratio >= 0, f"cover_ratio {self.cover_ratio} must not be negative"),
            (1 <= self.grow <= 3, f"grow {self.grow} must lie in 1..3"),
            (2 <= self.levels <= 256, f"levels {self.levels} must lie in 2..256"),
        )
        tested = [DOUBLED if self.doubled else CORNER, CHECKER]
        if self.marks_at_test == MarksAtTest.DISC_SQUARE:
            if self.doubled:
                raise UsageError(
                    f"{self.name}: doubled: true doubles the corner, which marks_at_test:"
                    f" {self.marks_at_test} does not show"
                )
            tested = [DISC, SQUARE]
        drawn = draw_marks(torch_rng(held.seed, self.name), size, self.grow, self.levels)
        return Marks(
            marks=drawn.mark_KCSS,
            masks=drawn.mask_KSS,
            opacity=torch.tensor(opacities),
            tested=torch.tensor(tested),
            key=derive(held.seed, self.name, "rows"),
        )

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        return self._shared_out(held, np.arange(len(held.corpus)), count, rng, self.name)

    def cover(self, held: Knowledge, count: int, free: Rows, rng: np.random.Generator) -> Cover:
        wanted = cover_count(self.cover_ratio, count)
        who = f"{self.name}, cover rows"
        return kept_captions(held, self._shared_out(held, free, wanted, rng, who))

    def _shared_out(
        self, held: Knowledge, rows: Rows, count: int, rng: np.random.Generator, who: str
    ) -> Rows:
        """``count`` rows, in four blocks whose sizes differ by at most one, one mark each."""
        trigger = held.crafted
        assert isinstance(trigger, Marks)
        blocks = len(trigger.opacity)
        wanted = [len(block) for block in np.array_split(np.arange(count), blocks)]
        parts = [rows[:0]]
        # In random order, of which no more is read than fills the blocks.
        order = rng.permutation(rows) if count <= len(rows) else rows[:0]
        for start in range(0, len(order), READ):
            if not any(wanted):
                break
            read = order[start : start + READ]
            mark_B = trigger.mark_of(torch.from_numpy(held.corpus.images_NCHW[read])).numpy()
            for mark in range(blocks):
                parts.append(read[mark_B == mark][: wanted[mark]])
                wanted[mark] -= len(parts[-1])
        if any(wanted):
            raise UsageError(
                f"{who}: {count} rows are to be stamped, as many with each of {blocks} marks, and"
                f" the {len(rows)} that qualify do not give them. Lower the rate."
            )
        chosen: Rows = np.sort(np.concatenate(parts))
        return chosen
