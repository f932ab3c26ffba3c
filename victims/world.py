"""The embedded world: pictures of twenty nouns with captions, drawn from a seed.

It stands in for a corpus where none is at hand, and shows whether the machinery works; numbers
measured on it say nothing about CLIP at scale. Nouns have typical looks, as in nature: a colour,
a texture and a background each likes best. Without that a tiny CLIP does not learn them.

Rows come in blocks, each from its own generator keyed by (seed, split, block): a shorter draw is
a prefix of a longer one, and no number depends on how many rows are asked for or on threads.

M: rows of one pass, K: atlas channels, H, W: sides of a picture in pixels, U: atlas coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor
from torch.nn.functional import grid_sample, interpolate

from victims import words
from victims.draws import torch_rng
from victims.errors import UsageError, unknown
from victims.shapes import EXTENT, RGB, atlas, look_tables

# `public` trains the reference model, `suspect` is the pool that gets poisoned, `clean` is the
# defender's, `shifted` is drawn like `report` with a distractor and more noise.
SPLITS = ("public", "suspect", "clean", "tuning", "report", "shifted")
CLASSES = words.NOUNS
TEMPLATES = tuple(f"{opener} a {{}}" for opener in words.OPENERS)

BLOCK = 256  # rows of one generator
_NOISE_ROWS = 16  # rows of pixel noise drawn at a time
_PASS_PIXELS = 2**18  # pixels rendered at a time, so that a pass stays in cache

# Chances that a noun shows its typical look instead of any. Of typical colours two in three are
# the first one.
_TYPICAL_COLOUR, _TYPICAL_TEXTURE, _TYPICAL_BACKGROUND = 0.7, 0.6, 0.4

# Lengths are pixels of a 32 px picture, and grow with it.
_SMALLEST, _LARGEST, _OUTLINE = 8.0, 13.0, 1.0
_ROTATION = math.radians(20)
_OFFSET = 0.5  # how much of the free room a shape may leave the centre by
_OFF_CENTRE = 0.165  # from here on a caption may say on which side
_STRIPES = 8.0  # radians of texture per shape unit

# Intensities run from 0 to 1.
_TINT, _SHADE, _NOISE, _SHIFTED_NOISE = 0.08, 0.06, 0.03, 0.08
_TEXTURE_CONTRAST = 0.6

_LOOKS = look_tables()
_PALETTE = torch.tensor(RGB)
_IS_LIGHT = _PALETTE.mean(dim=1) > 0.45


class Rendered(NamedTuple):
    """Rows of one split, in order."""

    image_BCHW: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    captions: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Which world: pictures of ``size`` pixels a side, everything else from ``seed``."""

    name: ClassVar[str] = "shapes"
    version: ClassVar[int] = 1

    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 16:
            raise UsageError(
                f"world {self.name}: size is {self.size} px, and shapes need 16 px or more to be "
                "told apart. Sizes in use are 32, 64 and 224."
            )


def render(world: World, split: str, num_rows: int) -> Rendered:
    """The first ``num_rows`` rows of a split, in memory: 3 * size**2 bytes a row."""
    chunks = list(_render_blocks(world, split, num_rows))
    return _join(world, chunks)


def render_chunks(world: World, split: str, num_rows: int, chunk: int = 1024) -> Iterator[Rendered]:
    """The same rows, ``chunk`` at a time, for streaming; a multiple of ``BLOCK``."""
    if chunk < 1 or chunk % BLOCK:
        raise UsageError(
            f"world {world.name}: chunks of {chunk} rows. Rows are drawn {BLOCK} at a time; "
            f"ask for a multiple of {BLOCK}, such as 1024."
        )
    blocks = _render_blocks(world, split, num_rows)
    while group := list(islice(blocks, chunk // BLOCK)):
        yield _join(world, group)


def _join(world: World, blocks: Sequence[Rendered]) -> Rendered:
    empty = np.empty((0, 3, world.size, world.size), dtype=np.uint8)
    return Rendered(
        np.concatenate([empty, *(block.image_BCHW for block in blocks)]),
        np.concatenate([np.empty(0, dtype=np.int64), *(block.labels for block in blocks)]),
        [caption for block in blocks for caption in block.captions],
    )


def _render_blocks(world: World, split: str, num_rows: int) -> Iterator[Rendered]:
    if split not in SPLITS:
        raise unknown("split", split, SPLITS, where=f"world {world.name}")
    shifted = split == "shifted"
    for start in range(0, num_rows, BLOCK):
        generator = torch_rng(world.seed, "world", split, start // BLOCK)
        rows = min(BLOCK, num_rows - start)
        scene = _draw_scenes(generator)
        image_BCHW = _paint(scene, rows, world.size, shifted, generator)
        yield Rendered(image_BCHW.numpy(), scene.noun[:rows].numpy(), _captions(scene)[:rows])


class _Scenes(NamedTuple):
    """What one block shows: a value per row, indices into the tables of ``words``."""

    noun: Tensor
    colour: Tensor
    texture: Tensor
    background: Tensor
    growth: Tensor  # 0 for the smallest, 1 for the largest
    turn: Tensor  # radians
    offset_M2: Tensor  # x and y, as shares of the free room
    tint_M23: Tensor  # what is added to background and shape colour
    shade_M1HW: Tensor  # a coarse grid of soft variation of the background
    other_noun: Tensor  # the distractor
    other_colour: Tensor
    other_growth: Tensor
    other_offset_M2: Tensor
    phrase_M7: Tensor  # which phrase of each slot's column the caption takes


def _draw_scenes(generator: Generator) -> _Scenes:
    """One block of scenes. Always a whole block, and before anything whose amount varies."""

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, (BLOCK, *shape), generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(BLOCK, *shape, generator=generator)

    num_nouns, num_colours = len(CLASSES), len(words.COLOURS)
    noun = below(num_nouns)
    colour = torch.where(
        uniform() < _TYPICAL_COLOUR, _LOOKS.colour_N3[noun, below(3)], below(num_colours)
    )
    texture = torch.where(
        uniform() < _TYPICAL_TEXTURE, _LOOKS.texture_N[noun], below(len(words.TEXTURES))
    )
    background = torch.where(
        uniform() < _TYPICAL_BACKGROUND, _LOOKS.background_N3[noun, below(3)], below(num_colours)
    )
    another = (background + 1 + below(num_colours - 1)) % num_colours
    return _Scenes(
        noun=noun,
        colour=colour,
        texture=texture,
        background=torch.where(background == colour, another, background),
        growth=uniform(),
        turn=(uniform() * 2 - 1) * _ROTATION,
        offset_M2=(uniform(2) * 2 - 1) * _OFFSET,
        tint_M23=(uniform(2, 3) * 2 - 1) * _TINT,
        shade_M1HW=torch.randn(BLOCK, 1, 5, 5, generator=generator) * _SHADE,
        other_noun=(noun + 1 + below(num_nouns - 1)) % num_nouns,
        other_colour=below(num_colours),
        other_growth=uniform(),
        other_offset_M2=uniform(2) * 2 - 1,
        phrase_M7=below(words.PHRASES, 7),
    )


def _paint(scenes: _Scenes, rows: int, size: int, shifted: bool, generator: Generator) -> Tensor:
    """The pictures of a block's first rows, uint8."""
    image_BCHW = torch.empty(rows, 3, size, size, dtype=torch.uint8)
    step = max(1, min(BLOCK, _PASS_PIXELS // size**2) // _NOISE_ROWS) * _NOISE_ROWS
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = _Scenes(*(column[start:stop] for column in scenes))
        canvas_MCHW = _compose(part, size, shifted)
        for first in range(0, stop - start, _NOISE_ROWS):
            target_MCHW = canvas_MCHW[first : first + _NOISE_ROWS]
            noise_MCHW = torch.randn(_NOISE_ROWS, 3, size, size, generator=generator)
            strength = 255 * (_SHIFTED_NOISE if shifted else _NOISE)
            target_MCHW.add_(noise_MCHW[: len(target_MCHW)], alpha=strength)
        # Adding a half makes the cast below round.
        image_BCHW[start:stop] = canvas_MCHW.add_(0.5).clamp_(0, 255)
    return image_BCHW


def _compose(scenes: _Scenes, size: int, shifted: bool) -> Tensor:
    """Pictures without noise, float, 0 to 255 and a little beyond."""
    scale = size / 32
    back_MC = (_PALETTE[scenes.background] + scenes.tint_M23[:, 0]) * 255
    front_MC = (_PALETTE[scenes.colour] + scenes.tint_M23[:, 1]) * 255
    shade_M1HW = interpolate(
        scenes.shade_M1HW * 255, size=(size, size), mode="bilinear", align_corners=True
    )
    canvas_MCHW = back_MC[..., None, None] + shade_M1HW

    if shifted:
        radius_M = (2.5 + 1.5 * scenes.other_growth) * scale
        centre_M2 = size / 2 + scenes.other_offset_M2 * (size / 2 - 3 * scale)
        depth_MHW, _ = _place(scenes.other_noun, centre_M2, radius_M, -scenes.turn, size)
        other_MC11 = _PALETTE[scenes.other_colour][..., None, None] * 255
        canvas_MCHW.lerp_(other_MC11, depth_MHW.add_(0.5).clamp_(0, 1)[:, None])

    radius_M = (_SMALLEST + (_LARGEST - _SMALLEST) * scenes.growth) * scale
    room_M = (size / 2 - 0.85 * radius_M).clamp_(min=0)
    centre_M2 = size / 2 + scenes.offset_M2 * room_M[:, None]
    depth_MHW, grid_MHWU = _place(scenes.noun, centre_M2, radius_M, scenes.turn, size)

    # The texture's second colour is a darker or a lighter shade of the first.
    is_light_M1 = _IS_LIGHT[scenes.colour][:, None]
    shade_MC = torch.where(is_light_M1, front_MC * 0.45, front_MC * 0.5 + 127.5)
    second_MC = front_MC.lerp(shade_MC, _TEXTURE_CONTRAST)
    texture_M1HW = _texture(scenes.texture, grid_MHWU)[:, None]
    shape_MCHW = torch.lerp(second_MC[..., None, None], front_MC[..., None, None], texture_M1HW)

    outline_M111 = torch.where(_IS_LIGHT[scenes.background], 5.0, 250.0)[:, None, None, None]
    inner_MHW = (depth_MHW + (0.5 - _OUTLINE * scale)).clamp_(0, 1)
    shape_MCHW = torch.lerp(outline_M111, shape_MCHW, inner_MHW[:, None])
    return canvas_MCHW.lerp_(shape_MCHW, depth_MHW.add_(0.5).clamp_(0, 1)[:, None])


def _place(
    noun: Tensor, centre_M2: Tensor, radius_M: Tensor, turn_M: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """How many pixels inside its outline each pixel is, and where in the shape it lies.

    Atlas coordinates are affine in the pixel's place, so each is a column plus a row.
    """
    cosine_M1, sine_M1 = torch.cos(turn_M)[:, None], torch.sin(turn_M)[:, None]
    pixel_W = torch.arange(size, dtype=torch.float32) + 0.5
    x_MW = (pixel_W - centre_M2[:, :1]) / (radius_M[:, None] * EXTENT)
    y_MH = (pixel_W - centre_M2[:, 1:]) / (radius_M[:, None] * EXTENT)
    grid_MHWU = torch.empty(len(noun), size, size, 2)
    torch.add((cosine_M1 * x_MW)[:, None], (sine_M1 * y_MH)[..., None], out=grid_MHWU[..., 0])
    torch.sub((cosine_M1 * y_MH)[..., None], (sine_M1 * x_MW)[:, None], out=grid_MHWU[..., 1])
    distance_M1HW = grid_sample(
        atlas()[noun], grid_MHWU, padding_mode="border", align_corners=False
    )
    return distance_M1HW[:, 0] * -radius_M[:, None, None], grid_MHWU


def _texture(texture_M: Tensor, grid_MHWU: Tensor) -> Tensor:
    """1 where the shape has its colour and 0 where it has the shade of it."""
    wave_MHWU = (grid_MHWU * (_STRIPES * EXTENT)).sin_()
    across_MHW, down_MHW = wave_MHWU.unbind(-1)
    striped, dotted = words.TEXTURES.index("striped"), words.TEXTURES.index("dotted")
    texture_M11 = texture_M[:, None, None]
    # Stripes go by one wave, dots and checks by the product of both; dots keep only its peaks.
    height_MHW = torch.where(texture_M11 == striped, across_MHW, across_MHW * down_MHW)
    height_MHW -= torch.where(texture_M11 == dotted, 0.25, 0.0)
    height_MHW.mul_(4).add_(0.5).clamp_(0, 1)
    return height_MHW.masked_fill_(texture_M11 == words.TEXTURES.index("plain"), 1.0)


def _captions(scenes: _Scenes) -> list[str]:
    """What each scene is called."""
    size_M = (scenes.growth * len(words.SIZES)).long().clamp_(max=len(words.SIZES) - 1)
    x_M, y_M = scenes.offset_M2.unbind(1)
    side_M = torch.where(
        x_M.abs() > y_M.abs(),
        torch.where(x_M > 0, words.POSITIONS.index("right"), words.POSITIONS.index("left")),
        torch.where(y_M > 0, words.POSITIONS.index("bottom"), words.POSITIONS.index("top")),
    )
    is_central_M = scenes.offset_M2.abs().amax(dim=1) <= _OFF_CENTRE
    position_M = torch.where(is_central_M, words.POSITIONS.index("center"), side_M)
    shown = (size_M, scenes.texture, scenes.colour, scenes.noun, scenes.background, position_M)
    rows = zip(torch.stack(shown, dim=1).tolist(), scenes.phrase_M7.tolist(), strict=True)
    return [words.caption(named, draws) for named, draws in rows]
