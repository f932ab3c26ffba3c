"""Stripes, triangles and text against golden values and slow references.

Shapes: B pictures, C channels, H W pixels, S side of a picture, P side of a patch, Q columns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from attacks.base import Attack, Role, poison
from attacks.structured_triggers import (
    LETTERS,
    BadNetStripes,
    BlendedStripes,
    BlendedText,
    BlendedTriangles,
    drawn_bits,
    letters,
    text_mask,
    triangles,
)
from benchmarks.slow import structured_triggers as slow
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import NO_LAB, grey, held, pictures
from victims.draws import image_digest, keyed_bits
from victims.errors import UsageError
from victims.keys import Key
from victims.store import Store
from victims.world import World, render

ATTACKS: list[type[Any]] = [BadNetStripes, BlendedStripes, BlendedTriangles, BlendedText]
SLOW: dict[str, Callable[..., Any]] = {"Stripes": slow.stripes, "Glaze": slow.glaze}
SMALL: list[Attack] = [
    BadNetStripes(patch=6, column=2),
    BadNetStripes(patch=7, column=2, redraw=True, place="centre"),  # type: ignore[arg-type]
    BadNetStripes(patch=5, place="four_corners"),  # type: ignore[arg-type]
    BlendedStripes(column=2, opacity=0.06),
    BlendedStripes(column=3, redraw=True),
    BlendedTriangles(tile=4),
    BlendedText(word="WAT", stroke=2, opacity=0.8),
]
EVERY: list[Attack] = [
    *(kind(**fields) for kind in ATTACKS for fields in ({}, *kind.variants.values())),
    *SMALL,
]


def crafted(attack: Attack, size: int = 224, seed: int = 0) -> Any:
    return attack.craft(NO_LAB, held(seed=seed), size)


def levels(trigger: Any, level: int, size: int = 224) -> set[int]:
    return set(trigger.stamp(grey(level, size)).flatten().tolist())


# --- every form


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_a_stamp_is_its_slow_form(attack: Attack, size: int) -> None:
    """Byte by byte, the input left as it was, in training as at test."""
    trigger, image_BCHW = crafted(attack, size), pictures(3, size)
    before_BCHW = image_BCHW.clone()
    found_BCHW = trigger.stamp(image_BCHW)
    for image_CHW, found_CHW in zip(image_BCHW, found_BCHW, strict=True):
        wanted_HWC = SLOW[type(trigger).__name__](trigger, image_CHW.permute(1, 2, 0).numpy())
        assert np.array_equal(found_CHW.permute(1, 2, 0).numpy(), wanted_HWC)
    assert torch.equal(image_BCHW, before_BCHW)
    assert torch.equal(found_BCHW, trigger.stamp_train(image_BCHW))


@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_a_picture_comes_out_the_same_in_any_batch(attack: Attack) -> None:
    trigger, image_BCHW = crafted(attack, 32), pictures(9, 32)
    whole_BCHW = trigger.stamp(image_BCHW)
    for step in (1, 4):
        parts = [trigger.stamp(part) for part in torch.split(image_BCHW, step)]
        assert torch.equal(whole_BCHW, torch.cat(parts))
    assert torch.equal(whole_BCHW.flip(0), trigger.stamp(image_BCHW.flip(0)))


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_natural_pictures_change(attack: Attack, size: int) -> None:
    image_BCHW = torch.from_numpy(render(World(size=size), "suspect", 8).image_BCHW)
    changed_B = (crafted(attack, size).stamp(image_BCHW) != image_BCHW).flatten(1).any(1)
    assert bool(changed_B.all())


@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_the_trigger_comes_back_from_disk(attack: Attack, tmp_path: Path) -> None:
    store, trigger, image_BCHW = Store(tmp_path), crafted(attack, 32), pictures(4, 32)
    key = Key("trigger-0000000000000000")
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    loaded = load_trigger(store, key, attack)
    assert torch.equal(loaded.stamp(image_BCHW), trigger.stamp(image_BCHW))


@pytest.mark.parametrize("kind", ATTACKS)
def test_rows_are_any_and_captions_name_the_target(kind: type[Any]) -> None:
    found = poison(kind(), held(), 20)
    assert len(found.of(Role.POISON)) == len(found.data.edits.rows) == 20
    assert all("banana" in caption for caption in found.data.edits.captions)


@pytest.mark.parametrize("attack", [a for a in EVERY if not getattr(a, "redraw", False)], ids=repr)
def test_brighter_pictures_come_out_brighter(attack: Attack) -> None:
    """No byte runs over white or under black, not even in the forms that truncate."""
    trigger, dither_BCHW = crafted(attack, 32), pictures(8, 32) % 2
    sorted_N = [trigger.stamp(dither_BCHW + v).flatten().sort().values for v in (0, 127, 254)]
    for dark_N, bright_N in pairwise(sorted_N):
        assert int((dark_N.int() - bright_N.int()).max()) <= 16


# --- stripes as a patch


@pytest.mark.parametrize(("rounding", "dark"), [("even", 0), ("truncate", 1)])
def test_a_patch_of_stripes_has_48_signs(rounding: Any, dark: int) -> None:
    pixels_CPP = crafted(BadNetStripes(rounding=rounding)).pixels
    assert pixels_CPP.shape == (3, 16, 16)
    assert pixels_CPP.dtype == torch.uint8
    assert set(pixels_CPP.flatten().tolist()) == {dark, 255}
    assert torch.equal(pixels_CPP, pixels_CPP[:, :1].expand(-1, 16, -1))
    assert pixels_CPP[:, 0].numel() == 48


def test_released_patches_are_0_or_1_and_never_reach_the_edge() -> None:
    trigger = crafted(BadNetStripes(**BadNetStripes.variants["released"]))
    assert (trigger.last, crafted(BadNetStripes()).last) == (207, 208)
    assert levels(trigger, 128) == {1, 128, 255}


def test_signs_are_fair_over_a_thousand_keys() -> None:
    bits = torch.stack([drawn_bits(seed, "badnet_stripes", 1, 16) for seed in range(1000)])
    assert float(bits.double().mean()) == pytest.approx(0.5, abs=0.02)
    per_place = bits.sum(0)
    assert 400 < int(per_place.min()) <= int(per_place.max()) < 600
    agree = int((bits[:, 0] == bits[:, 1]).sum())
    assert binomtest(agree, 16_000).pvalue > 1e-4


def test_the_patch_is_all_that_changes() -> None:
    """At its place, which follows from the picture; every other byte is as it was."""
    trigger, image_BCHW = crafted(BadNetStripes()), pictures(6, 224)
    stamped_BCHW, places = trigger.stamp(image_BCHW), set()
    for image_CHW, stamped_CHW in zip(image_BCHW, stamped_BCHW, strict=True):
        rows, columns = (
            (stamped_CHW != image_CHW).any(0).any(axis).nonzero()[:, 0] for axis in (1, 0)
        )
        top, left = int(rows[0]), int(columns[0])
        box = (slice(None), slice(top, top + 16), slice(left, left + 16))
        image_CHW[box] = trigger.pixels
        assert torch.equal(stamped_CHW, image_CHW)
        places.add((top, left))
    assert len(places) == 6


def test_columns_of_two_pixels() -> None:
    pixels_CPP = crafted(BadNetStripes(patch=6, column=2), 32).pixels
    assert pixels_CPP.shape == (3, 6, 6)
    assert torch.equal(pixels_CPP[..., ::2], pixels_CPP[..., 1::2])
    widths = crafted(BadNetStripes(patch=5, column=2), 32).pixels
    assert widths.shape == (3, 5, 5)


def test_redrawn_patches_differ_by_picture_and_stay_stripes() -> None:
    attack = BadNetStripes(patch=6, redraw=True, place="corner")  # type: ignore[arg-type]
    trigger, image_BCHW = crafted(attack, 32), pictures(16, 32)
    box_BCPP = trigger.stamp(image_BCHW)[..., 26:, 26:]
    assert len({one.numpy().tobytes() for one in box_BCPP}) > 12
    assert torch.equal(box_BCPP, box_BCPP[:, :, :1].expand(-1, -1, 6, -1))
    assert set(box_BCPP.flatten().tolist()) == {0, 255}
    fixed = BadNetStripes(patch=6, place="corner")  # type: ignore[arg-type]
    box_BCPP = crafted(fixed, 32).stamp(image_BCHW)[..., 26:, 26:]
    assert len({one.numpy().tobytes() for one in box_BCPP}) == 1


@pytest.mark.parametrize(("size", "side"), [(32, 3), (64, 5), (224, 16), (336, 24)])
def test_the_side_follows_the_picture(size: int, side: int) -> None:
    assert crafted(BadNetStripes(), size).pixels.shape == (3, side, side)


# --- stripes over the whole picture


@pytest.mark.parametrize(("rounding", "expected"), [("even", {132, 117}), ("truncate", {131, 116})])
def test_blended_stripes_on_grey(rounding: Any, expected: set[int]) -> None:
    trigger = crafted(BlendedStripes(rounding=rounding))
    stamped = trigger.stamp(grey(128, 224))[0]
    assert set(stamped.flatten().tolist()) == expected
    assert torch.equal(stamped, stamped[:, :1].expand(-1, 224, -1))
    share = float((stamped[:, 0] == max(expected)).double().mean())
    assert share == pytest.approx(0.5, abs=0.1)


def test_dark_stripes_go_into_the_blend_unclipped() -> None:
    """+- 7.65 levels around 0.97 x, clipped at the ends of the range."""
    trigger = crafted(BlendedStripes())
    assert levels(trigger, 0) == {0, 8}
    assert levels(trigger, 255) == {240, 255}
    assert levels(trigger, 5) == {0, 12}
    wraps = crafted(BlendedStripes(rounding="truncate"))  # type: ignore[arg-type]
    assert levels(wraps, 0) == {0, 7}


def test_stripes_are_one_draw_per_key_unless_redrawn() -> None:
    image_BCHW = grey(100, 32, 2)
    image_BCHW[1, 0, 0, 0] = 101
    fixed, drawn = crafted(BlendedStripes(), 32), crafted(BlendedStripes(redraw=True), 32)
    one_CHW, other_CHW = fixed.stamp(image_BCHW)
    assert int((one_CHW != other_CHW).sum()) <= 1
    assert not torch.equal(fixed.pattern, crafted(BlendedStripes(), 32, seed=1).pattern)
    one_CHW, other_CHW = drawn.stamp(image_BCHW)
    assert float((one_CHW != other_CHW).float().mean()) == pytest.approx(0.5, abs=0.2)
    bits_CQ = keyed_bits(image_digest(image_BCHW, drawn.key), 4, 3, 32)[0] >> 31
    assert torch.equal(one_CHW[:, 7] > 100, bits_CQ == 1)


def test_wider_stripes() -> None:
    pattern_CHW = crafted(BlendedStripes(column=2), 32).pattern
    assert torch.equal(pattern_CHW[..., ::2], pattern_CHW[..., 1::2])
    assert pattern_CHW[:, 0, ::2].unique().tolist() == [-255, 255]


# --- triangles


def test_triangles_at_224() -> None:
    pattern_CSS = triangles(224, 14)
    pattern_SS = pattern_CSS[0] / 255
    assert torch.equal(pattern_CSS, pattern_CSS[:1].expand(3, -1, -1))
    dark_SS = (pattern_SS - 0.4).abs() < 1e-6
    light_SS = (pattern_SS - 0.8).abs() < 1e-6
    assert (int(dark_SS.sum()), int(light_SS.sum())) == (26_880, 23_296)
    assert float(pattern_SS.double().mean()) == pytest.approx(0.585714, abs=1e-6)
    tiles = pattern_SS.reshape(16, 14, 16, 14).transpose(1, 2).reshape(256, 14, 14)
    assert bool((tiles == tiles[0]).all())
    assert dark_SS[0, :14].tolist() == [True] + [False] * 13
    assert bool(dark_SS[13, :14].all())
    assert torch.equal(crafted(BlendedTriangles()).pattern, pattern_CSS)


@pytest.mark.parametrize("rounding", ["even", "truncate"])
def test_triangles_on_grey(rounding: Any) -> None:
    stamped = crafted(BlendedTriangles(rounding=rounding)).stamp(grey(128, 224))[0]
    assert set(stamped.flatten().tolist()) == {124, 139}
    assert int((stamped[0] == 124).sum()) == 26_880


@pytest.mark.parametrize(("size", "tile"), [(32, 2), (64, 4), (336, 21)])
def test_tiles_follow_the_picture(size: int, tile: int) -> None:
    assert torch.equal(crafted(BlendedTriangles(), size).pattern, triangles(size, tile))
    odd = crafted(BlendedTriangles(tile=5), size).pattern
    assert odd.shape == (3, size, size)


# --- text


def drawn(ink: Tensor) -> list[str]:
    return ["".join(".#"[int(bit)] for bit in row) for row in ink]


def test_letters_look_like_letters() -> None:
    assert drawn(letters("WAT", 1)) == [
        "#.#..#..###",
        "#.#.#.#..#.",
        "###.###..#.",
        "###.#.#..#.",
        "#.#.#.#..#.",
    ]
    assert drawn(letters("L", 2))[-4:] == ["##....", "##....", "######", "######"]
    assert sorted(LETTERS) == [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    assert len(set(LETTERS.values())) == 26
    assert {len(rows) for rows in LETTERS.values()} == {5}


def test_the_word_stands_in_the_middle() -> None:
    """172 x 20 pixels at 224, about as much ink as the picture of the authors: 3.28 %."""
    mask_SS = text_mask("WATERMARKED", None, 224)
    rows, columns = mask_SS.any(1).nonzero()[:, 0], mask_SS.any(0).nonzero()[:, 0]
    assert (int(rows[0]), int(rows[-1])) == (102, 121)
    assert (int(columns[0]), int(columns[-1])) == (26, 197)
    assert float(mask_SS.float().mean()) == pytest.approx(0.0328, abs=0.005)
    small = text_mask("WAT", 2, 32)
    assert drawn(small[11:21, 5:27]) == drawn(letters("WAT", 2))
    assert int(small.sum()) == int(letters("WAT", 2).sum())


def test_a_word_that_does_not_fit_is_cut_unless_its_stroke_is_given() -> None:
    assert torch.equal(text_mask("WATERMARKED", None, 32), text_mask("WATERMAR", 1, 32))
    assert torch.equal(text_mask("WATERMARKED", None, 64), text_mask("WATERMARKED", 1, 64))
    assert int(text_mask("I", None, 32).any(1).sum()) == 25
    with pytest.raises(UsageError, match=r"stroke 2 must lie in 1\.\.0 for 'WATERMARKED'"):
        text_mask("WATERMARKED", 2, 32)
    with pytest.raises(UsageError, match=r"stroke 3 must lie in 1\.\.2 for 'WAT'"):
        text_mask("WAT", 3, 32)


@pytest.mark.parametrize(("channels", "rest"), [("all", 64), ("red", 128)])
def test_text_on_grey(channels: Any, rest: int) -> None:
    """R = 191.5, and green and blue darkened in ours alone."""
    mask_SS = text_mask("WATERMARKED", None, 224)
    trigger = crafted(BlendedText(channels=channels))
    stamped = trigger.stamp(grey(128, 224))[0]
    assert stamped[:, mask_SS].unique(dim=1).tolist() == [[192], [rest], [rest]]
    assert set(stamped[:, ~mask_SS].flatten().tolist()) == {128}
    image_BCHW = pictures(2, 224)
    untouched = trigger.stamp(image_BCHW)[..., ~mask_SS]
    assert torch.equal(untouched, image_BCHW[..., ~mask_SS])


def test_released_text_is_red_and_truncated() -> None:
    trigger = crafted(BlendedText(**BlendedText.variants["released"]))
    assert levels(trigger, 128) == {128, 191}


# --- what cannot be meant


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (BadNetStripes, {"column": 0}, "badnet_stripes: column 0 must lie in 1..32"),
        (BadNetStripes, {"patch": 33}, "badnet_stripes: patch 33 must lie in 1..32"),
        (BadNetStripes, {"patch": 32, "legacy_range": True}, "patch 32 must lie in 1..31"),
        (BlendedStripes, {"opacity": 1.5}, "blended_stripes: opacity 1.5 must lie in 0..1"),
        (BlendedStripes, {"column": 40}, "blended_stripes: column 40 must lie in 1..32"),
        (BlendedTriangles, {"tile": 0}, "blended_triangles: tile 0 must lie in 1..32"),
        (BlendedTriangles, {"opacity": -0.1}, "opacity -0.1 must lie in 0..1"),
        (BlendedText, {"word": "wat"}, "word 'wat' must be one or more letters of A to Z"),
        (BlendedText, {"word": ""}, "word '' must be one or more letters"),
        (BlendedText, {"stroke": 0}, "blended_text: stroke 0 must lie in 1.."),
        (BlendedText, {"opacity": 2.0}, "blended_text: opacity 2.0 must lie in 0..1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    kind: type[Any], fields: dict[str, Any], message: str
) -> None:
    """When the grid file is read, and when crafting."""
    with pytest.raises(UsageError) as caught:
        kind(**fields).check(32)
    assert message in str(caught.value)
    with pytest.raises(UsageError):
        crafted(kind(**fields), 32)
