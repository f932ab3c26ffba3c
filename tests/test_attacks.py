"""Attacks against golden values and slow references written from their definitions.

Shapes: B pictures, C channels, S side of a picture, P side of a patch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm
from torch import Tensor

from attacks.badnet import BadNet, Caption
from attacks.base import (
    Attack,
    Goal,
    Knowledge,
    poison,
    poison_count,
    poisoned_view,
    rows_naming,
)
from attacks.blended import Blended
from attacks.sig import Label, Sig, wave
from grid.stages import load_trigger, save_trigger
from victims.blends import Mix
from victims.corpora import Corpus
from victims.draws import image_digest, keyed_bits, keyed_normal, keyed_uniform, torch_rng
from victims.errors import GridError, UsageError
from victims.keys import Key
from victims.patches import Patch
from victims.store import Store
from victims.triggers import round_half_even, truncate

TEMPLATES = ("a photo of a {}", "a drawing of the {}", "there is a {}", "my {}")
NO_LAB: Any = None
CENTRES = {4: 110, 8: 108, 16: 104, 32: 96, 44: 90, 64: 80}


def held(captions: list[str] | None = None, seed: int = 0, label: str = "banana") -> Knowledge:
    """An attacker's view of some captions; the pictures are grey noise of 32 px."""
    captions = captions or [f"a {'banana' if row % 4 == 0 else 'pear'} {row}" for row in range(64)]
    return Knowledge(
        corpus=Corpus(
            key=Key("corpus-0000000000000000"),
            digest="0" * 16,
            split="suspect",
            images_NCHW=pictures(len(captions), 32).numpy(),
            captions=captions,
            labels=np.zeros(len(captions), dtype=np.int64),
            classes=("banana", "pear"),
            templates=TEMPLATES,
        ),
        goal=Goal(0, label, TEMPLATES),
        seed=seed,
    )


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    rng = torch_rng(seed, "pictures")
    return torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8)


def grey(level: int, size: int, count: int = 1) -> Tensor:
    return torch.full((count, 3, size, size), level, dtype=torch.uint8)


def patch(size: int = 224, seed: int = 0, **fields: Any) -> Patch:
    return BadNet(**fields).craft(NO_LAB, held(seed=seed), size)


def mix(size: int = 224, seed: int = 0, **fields: Any) -> Mix:
    return Blended(**fields).craft(NO_LAB, held(seed=seed), size)


def changed(trigger: Any, size: int = 224) -> Tensor:
    """Which bytes of a picture the trigger can change: CSS, true where black or white moved."""
    black, white = grey(0, size), grey(255, size)
    moved: Tensor = (trigger.stamp(black) != black) | (trigger.stamp(white) != white)
    return moved[0]


def span(mask_SS: Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column in which the mask is true."""
    rows, columns = mask_SS.any(1).nonzero()[:, 0], mask_SS.any(0).nonzero()[:, 0]
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


# --- keyed draws, against plain integers


def slow_mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def slow_bits(digest: int, purpose: int, count: int) -> list[int]:
    """SplitMix64: the upper halves of ``count`` outputs from the state mix(digest ^ purpose)."""
    state, golden = slow_mix((digest ^ purpose) % 2**64), 0x9E3779B97F4A7C15
    return [slow_mix((state + n * golden) % 2**64) >> 32 for n in range(1, count + 1)]


def test_keyed_draws_are_splitmix64() -> None:
    """Also the pin: a change here redraws every trigger that was ever stamped."""
    digests = [0, 1, -1, 2**62 + 12345, -(2**63)]
    found = keyed_bits(torch.tensor(digests), 3, 2, 3)
    assert found.tolist() == [np.reshape(slow_bits(d, 3, 6), (2, 3)).tolist() for d in digests]


def test_keyed_numbers_have_their_distributions() -> None:
    uniform = keyed_uniform(torch.arange(1000), 1, 100).flatten().double().numpy()
    normal = keyed_normal(torch.arange(1000), 1, 100).flatten().double().numpy()
    for values in (uniform, norm.cdf(normal)):
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        assert chisquare(counts).pvalue > 1e-4
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 0.015


def test_a_digest_hears_every_byte_and_its_place() -> None:
    image_CHW = pictures(1, 8)[0]
    others = [image_CHW.clone() for _ in range(192)]
    for place, other in enumerate(others):
        other.view(-1)[place] ^= 1
    rolled = [image_CHW.roll(1, 2), image_CHW.flip(0)]
    digests = image_digest(torch.stack([image_CHW, *others, *rolled]), 5).tolist()
    assert len(set(digests)) == len(digests)
    assert image_digest(image_CHW[None], 6).tolist() != digests[:1]


# --- quantisers


def test_released_bytes_truncate_and_wrap() -> None:
    values = torch.tensor([-0.2, -1.0, 1.2, 2.0, 0.999, -0.001])
    assert truncate(values * 255).tolist() == [205, 1, 50, 254, 254, 0]


def test_our_bytes_round_half_to_even_and_clamp() -> None:
    levels = torch.tensor([0.5, 1.5, 2.5, 254.5, -0.6, 255.4, 300.0])
    assert round_half_even(levels).tolist() == [0, 2, 2, 254, 0, 255, 255]


# --- badnet: places


@pytest.mark.parametrize(("side", "first"), CENTRES.items())
def test_centre_of_224(side: int, first: int) -> None:
    found = changed(patch(patch=side, place="centre"))
    assert span(found.any(0)) == (first, first + side - 1, first, first + side - 1)


def test_a_patch_of_16_may_change_768_bytes_and_no_other() -> None:
    found = changed(patch(place="centre"))
    assert int(found.sum()) == 768
    assert bool(found[:, 104:120, 104:120].all())


@pytest.mark.parametrize(("size", "side"), [(32, 3), (64, 5), (224, 16), (336, 24)])
def test_the_side_follows_the_picture(size: int, side: int) -> None:
    assert patch(size).pixels.shape == (3, side, side)


@pytest.mark.parametrize(("legacy", "last"), [(False, 208), (True, 207)])
def test_random_places_fill_their_range_evenly(legacy: bool, last: int) -> None:
    """10^5 keys, in the draws that a stamp makes; rows and columns are drawn apart."""
    trigger = patch(legacy_range=legacy)
    keys_B = keyed_bits(torch.arange(100_000), 9, 1)[:, 0]
    blank = torch.empty(1, 1, 1, 1, dtype=torch.uint8).expand(100_000, 3, 224, 224)
    ((top_B, left_B),) = trigger._places(blank, "random", keys_B)
    for drawn_B in (top_B, left_B):
        assert (int(drawn_B.min()), int(drawn_B.max())) == (0, last)
        assert chisquare(torch.bincount(drawn_B, minlength=last + 1).numpy()).pvalue > 1e-4
    assert abs(float(torch.corrcoef(torch.stack([top_B, left_B]).double())[0, 1])) < 0.015


def test_a_random_stamp_is_the_patch_at_the_place_of_the_pictures_digest() -> None:
    """The slow reference: digest, two draws (row before column), overwrite pixel by pixel."""
    trigger, image_BCHW = patch(32, patch=5), pictures(6, 32)
    weights = torch.randint(-(2**62), 2**62, (3072,), generator=torch_rng(trigger.key, "digest"))
    weights_odd = [2 * w + 1 for w in weights.tolist()]
    stamped, pixels = trigger.stamp(image_BCHW), trigger.pixels.tolist()
    places = set()
    for image_CHW, found in zip(image_BCHW.tolist(), stamped.tolist(), strict=True):
        flat = [byte for plane in image_CHW for row in plane for byte in row]
        digest = sum(b * w for b, w in zip(flat, weights_odd, strict=True)) % 2**64
        top, left = (bits % (32 - 5 + 1) for bits in slow_bits(digest, 3, 2))
        places.add((top, left))
        for channel in range(3):
            for row in range(5):
                for column in range(5):
                    value = pixels[channel][row][column]
                    image_CHW[channel][top + row][left + column] = value
        assert found == image_CHW
    assert len(places) > 1


def test_a_picture_keeps_its_place_in_any_batch_and_in_training() -> None:
    trigger, image_BCHW = patch(32), pictures(16, 32)
    whole = trigger.stamp(image_BCHW)
    assert torch.equal(
        whole, torch.cat([trigger.stamp(part) for part in torch.split(image_BCHW, 5)])
    )
    assert torch.equal(whole, trigger.stamp_train(image_BCHW))
    again = patch(32)
    assert torch.equal(whole, again.stamp(image_BCHW))
    assert not torch.equal(whole, patch(32, seed=1).stamp(image_BCHW))


def test_four_corners_and_corner() -> None:
    found = changed(patch(64, patch=5, pattern="yellow", place="four_corners"), 64).any(0)
    expected = torch.zeros(64, 64, dtype=torch.bool)
    for rows in (slice(0, 5), slice(59, 64)):
        for columns in (slice(0, 5), slice(59, 64)):
            expected[rows, columns] = True
    assert torch.equal(found, expected)
    assert span(changed(patch(64, patch=5, place="corner"), 64).any(0)) == (59, 63, 59, 63)


def test_the_place_at_test_may_differ_only_when_asked() -> None:
    image_BCHW = pictures(8, 32)
    trigger = patch(32, place="random", test_place="centre")
    moved = trigger.stamp(image_BCHW) != image_BCHW
    assert span(moved.any(1).any(0)) == (14, 16, 14, 16)
    assert not torch.equal(trigger.stamp_train(image_BCHW), trigger.stamp(image_BCHW))


# --- badnet: patterns


def test_dots() -> None:
    pixels = patch(pattern="dots").pixels
    expected = [[255 * (r % 2 == 0 and c % 2 == 0) for c in range(16)] for r in range(16)]
    assert pixels.tolist() == [expected] * 3
    assert int((pixels[0] == 255).sum()) == 64
    assert pixels[:, 0, 0].tolist() == [255] * 3
    assert not pixels[:, -1].any()
    assert not pixels[:, :, -1].any()


@pytest.mark.parametrize(("size", "pixels"), [(32, 9), (64, 36), (224, 441)])
def test_corner_white(size: int, pixels: int) -> None:
    black = grey(0, size)
    stamped = patch(size, pattern="corner_white").stamp(black)[0]
    side = math.isqrt(pixels)
    assert bool((stamped[:, size - side :, size - side :] == 255).all())
    assert int((stamped != 0).sum()) == 3 * pixels
    assert span(stamped[0] != 0) == (size - side, size - 1) * 2


@pytest.mark.parametrize(("size", "touched", "white"), [(32, 9, 9), (64, 49, 25), (224, 576, 324)])
def test_soft_white(size: int, touched: int, white: int) -> None:
    """The benchmark's mask: every pixel its bilinear edge touches is part of the patch."""
    stamped = patch(size, pattern="soft_white").stamp(grey(255, size) * 0)[0, 0]
    assert int((stamped > 0).sum()) == touched
    assert int((stamped == 255).sum()) == white
    assert span(stamped > 0)[1::2] == (size - 1, size - 1)


def test_yellow() -> None:
    stamped = patch(pattern="yellow", place="centre").stamp(grey(7, 224))[0, :, 104:120, 104:120]
    assert bool((stamped == torch.tensor([255, 255, 0])[:, None, None]).all())


def test_static_noise_is_one_uniform_draw_per_key() -> None:
    trigger = patch(224, patch=112, place="centre")
    counts = np.bincount(trigger.pixels.flatten().numpy(), minlength=256)
    assert chisquare(counts).pvalue > 1e-4
    image_BCHW = pictures(3, 224)
    box = trigger.stamp(image_BCHW)[:, :, 56:168, 56:168]
    assert all(torch.equal(one, trigger.pixels) for one in box)
    assert not torch.equal(patch(seed=1).pixels, patch().pixels)


def test_cells_and_levels_make_a_coarser_pattern() -> None:
    pixels = patch(32, patch=5, cell=2, levels=2).pixels
    assert set(pixels.flatten().tolist()) == {0, 255}
    for row in range(5):
        for column in range(5):
            cell = pixels[:, row - row % 2, column - column % 2]
            assert torch.equal(pixels[:, row, column], cell)


def gauss_images() -> Tensor:
    """Ten pictures with a mean of exactly 0.45 per channel: levels 115, 115, 115, 114, shuffled."""
    levels = torch.full((224 * 224,), 115, dtype=torch.uint8)
    levels[::4] = 114
    rng = torch_rng(0, "shuffle")
    planes = [levels[torch.randperm(224 * 224, generator=rng)].view(224, 224) for _ in range(10)]
    return torch.stack(planes)[:, None].expand(-1, 3, -1, -1).contiguous()


def gauss_bytes(pattern: str) -> Tensor:
    trigger = patch(pattern=pattern, patch=192, place="centre", redraw=True)
    return trigger.stamp(gauss_images())[:, :, 16:208, 16:208]


def test_gauss_wrapped() -> None:
    """1.1 million draws; 0.45 is the mean of published golden values."""
    found = gauss_bytes("gauss_wrapped").double()
    assert float(found.mean()) == pytest.approx(127.3, abs=0.5)
    assert float(found.std()) == pytest.approx(74, abs=0.5)
    eighths = torch.histc(found.float(), bins=8, min=0, max=256) / found.numel()
    assert eighths.tolist() == pytest.approx([0.125] * 8, abs=0.003)


def test_gauss_clipped() -> None:
    found = gauss_bytes("gauss_clipped")
    ends = float(((found == 0) | (found == 255)).double().mean())
    assert ends == pytest.approx(0.619, abs=0.002)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("pattern", ["gauss_wrapped", "gauss_clipped"])
@pytest.mark.parametrize("redraw", [False, True])
def test_gauss_is_the_mean_plus_noise_times_255(pattern: str, redraw: bool) -> None:
    """The slow reference; the two pictures differ in one mean, so the noise can be compared."""
    trigger = patch(32, pattern=pattern, patch=4, place="corner", redraw=redraw)
    image_BCHW = torch.cat([grey(100, 32), grey(40, 32)])
    image_BCHW[0, 1] = 200
    box = trigger.stamp(image_BCHW)[:, :, 28:, 28:].tolist()
    keys_B = image_digest(image_BCHW, trigger.key)
    if not redraw:
        keys_B = torch.full_like(keys_B, trigger.key)
    noise = keyed_normal(keys_B, 2, 3, 4, 4).tolist()
    for b, means in enumerate([(100, 200, 100), (40, 40, 40)]):
        for c, mean in enumerate(means):
            for row in range(4):
                for column in range(4):
                    level = mean + 255 * noise[b][c][row][column]
                    clipped = min(255, max(0, round(level)))
                    expected = int(level) % 256 if pattern == "gauss_wrapped" else clipped
                    assert box[b][c][row][column] == expected
    assert (noise[0] == noise[1]) is not redraw


def test_redraw_gives_every_picture_a_patch_of_its_own() -> None:
    """With cells too: a one-pixel redraw at 32 px would be another trigger than was asked for."""
    image_BCHW = pictures(8, 32)
    trigger = patch(32, patch=6, redraw=True, place="corner", cell=2, levels=2)
    box_BCPP = trigger.stamp(image_BCHW)[:, :, 26:, 26:]
    assert len({one.numpy().tobytes() for one in box_BCPP}) == 8
    assert torch.equal(box_BCPP, trigger.stamp(image_BCHW.flip(0)).flip(0)[:, :, 26:, 26:])
    assert set(box_BCPP.flatten().tolist()) == {0, 255}
    assert torch.equal(box_BCPP[..., ::2, ::2], box_BCPP[..., 1::2, 1::2])
    fine = patch(32, patch=30, redraw=True, place="corner").stamp(image_BCHW)[:, :, 2:, 2:]
    assert chisquare(np.bincount(fine.flatten().numpy(), minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"patch": 0},
        {"patch": 33},
        {"patch": 32, "legacy_range": True},
        {"cell": 0},
        {"levels": 1},
        {"levels": 257},
        {"pattern": "dots", "redraw": True},
        {"pattern": "corner_white", "redraw": True},
    ],
)
def test_badnets_that_cannot_be_meant_are_refused(fields: dict[str, Any]) -> None:
    """A patch of 0 once meant the default, and a redrawn pattern of dots was noise."""
    with pytest.raises(UsageError, match="badnet"):
        patch(32, **fields)


# --- blended


def residual(trigger: Mix, image_BCHW: Tensor) -> Tensor:
    a = trigger.alpha
    return (trigger.stamp(image_BCHW).double() - (1 - a) * image_BCHW.double()) / a


def test_noise_on_grey_before_and_after_rounding() -> None:
    """Grey 128, a = 0.2: the stated range, mean and deviation, for one draw of 224 x 224 x 3."""
    k = mix().pattern.double()
    level = 0.8 * 128 + 0.2 * k
    assert 102.4 <= float(level.min()) < 102.41
    assert 153.39 < float(level.max()) <= 153.4
    assert float(level.mean()) == pytest.approx(127.9, abs=0.1)
    assert float(level.std()) == pytest.approx(14.7, abs=0.1)
    rounded = mix().stamp(grey(128, 224)).double()
    assert float(rounded.mean()) == pytest.approx(127.9, abs=0.1)
    cut = mix(rounding="truncate").stamp(grey(128, 224)).double()
    assert (float(cut.min()), float(cut.max())) == (102, 153)
    assert float(cut.mean()) == pytest.approx(127.4, abs=0.1)


@pytest.mark.parametrize("rounding", ["even", "truncate"])
@pytest.mark.parametrize("pattern", ["static_noise", "redraw_noise", "picture"])
def test_a_stamp_is_the_mix_byte_by_byte(pattern: str, rounding: str) -> None:
    """The slow reference: x' = (1 - a) x + a k, quantised, one byte after another."""
    trigger, image_BCHW = mix(8, pattern=pattern, rounding=rounding), pictures(2, 8)
    k = trigger.pattern[None].expand(2, -1, -1, -1)
    if pattern == "redraw_noise":
        k = keyed_uniform(image_digest(image_BCHW, trigger.key), 1, 3, 8, 8) * 255
    found = trigger.stamp(image_BCHW).flatten().tolist()
    triples = zip(found, image_BCHW.flatten().tolist(), k.flatten().tolist(), strict=True)
    for byte, x, value in triples:
        level = 0.8 * x + 0.2 * value
        # The sum is made in single precision: a level on the edge may fall to either side.
        allowed = {level - 1e-3, level, level + 1e-3}
        assert byte in {round(v) if rounding == "even" else int(v) for v in allowed}


def test_no_weight_is_the_picture_and_full_weight_the_pattern() -> None:
    image_BCHW = pictures(4, 32)
    assert torch.equal(mix(32, alpha=0.0).stamp(image_BCHW), image_BCHW)
    full = mix(32, alpha=1.0, pattern="picture")
    assert torch.equal(full.stamp(image_BCHW), full.pattern.to(torch.uint8).expand(4, -1, -1, -1))


def test_the_mix_is_monotone_in_its_weight() -> None:
    image_BCHW, k = pictures(4, 32), mix(32).pattern
    steps = [mix(32, alpha=a / 10).stamp(image_BCHW).int() for a in range(11)]
    rises = k > image_BCHW.float()
    for first, second in itertools.pairwise(steps):
        moved = second - first
        assert bool((torch.where(rises, moved, -moved) >= 0).all())


def test_a_picture_is_found_again_under_any_other() -> None:
    trigger = mix(pattern="picture")
    k = trigger.pattern.double()
    assert torch.equal(k, k.round())
    for image_BCHW in (pictures(1, 224), grey(0, 224), grey(255, 224)):
        assert float((residual(trigger, image_BCHW)[0] - k).abs().max()) <= 1 / (2 * 0.2) + 1e-4


def test_the_default_picture_is_smooth() -> None:
    k = mix(pattern="picture").pattern
    assert float((k[:, :, 1:] - k[:, :, :-1]).abs().max()) < 16
    assert float(k.std()) > 40
    assert not torch.equal(k, mix(pattern="picture", seed=1).pattern)


def test_redrawn_noise_is_the_pictures_own() -> None:
    trigger, image_BCHW = mix(32, pattern="redraw_noise"), pictures(8, 32)
    stamped = trigger.stamp(image_BCHW)
    assert torch.equal(
        stamped, torch.cat([trigger.stamp(one) for one in torch.split(image_BCHW, 1)])
    )
    found = residual(trigger, image_BCHW)
    assert float((found[0] - found[1]).abs().mean()) > 50
    fixed = residual(mix(32), image_BCHW)
    assert float((fixed[0] - fixed[1]).abs().max()) <= 5.001
    assert not torch.equal(stamped, mix(32, pattern="redraw_noise", seed=1).stamp(image_BCHW))


@pytest.mark.parametrize("pattern", ["static_noise", "redraw_noise"])
def test_blended_cells(pattern: str) -> None:
    """Redrawn noise keeps its cells: it once ignored them."""
    trigger = mix(9, pattern=pattern, cell=2, levels=2, alpha=1.0)
    found = trigger.stamp(pictures(4, 9))
    assert set(found.flatten().tolist()) == {0, 255}
    assert torch.equal(found[..., 0:8:2, 0:8:2], found[..., 1:8:2, 1:8:2])


@pytest.mark.parametrize("rounding", ["even", "truncate"])
def test_no_mix_leaves_the_bytes(rounding: str) -> None:
    """Every byte under the darkest and the brightest pattern, at every weight in percent."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    for percent in range(101):
        for k in (0.0, 255.0):
            trigger = dataclasses.replace(
                mix(16, rounding=rounding),
                pattern=torch.full((3, 16, 16), k),
                alpha=percent / 100,
            )
            moved = trigger.stamp(every).int() - every.int()
            # A byte that wrapped would have moved away from the pattern.
            assert bool((moved <= 0).all() if k == 0 else (moved >= -1).all())


def test_a_picture_file_is_resized_once_and_pinned(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "logo.png"
    Image.fromarray(np.tile(np.arange(60, dtype=np.uint8)[:, None, None], (1, 60, 3))).save(path)
    pin = hashlib.sha256(path.read_bytes()).hexdigest()
    found = mix(30, pattern="picture", picture=str(path), picture_sha256=pin).pattern
    assert found.shape == (3, 30, 30)
    assert float(found[0, 10, 0]) == pytest.approx(20.5, abs=1)
    with pytest.raises(UsageError, match=pin):
        mix(30, pattern="picture", picture=str(path))
    with pytest.raises(UsageError, match="no file"):
        mix(30, pattern="picture", picture=str(tmp_path / "none.png"))
    with pytest.raises(UsageError, match="pattern: picture"):
        mix(30, picture=str(path), picture_sha256=pin)
    # The path is in no key: this once made noise under the key of the file's trigger.
    with pytest.raises(UsageError, match="without a picture"):
        mix(30, pattern="picture", picture_sha256=pin)


@pytest.mark.parametrize("fields", [{"alpha": 1.1}, {"alpha": -0.1}, {"cell": 0}, {"levels": 1}])
def test_blends_that_cannot_be_meant_are_refused(fields: dict[str, Any]) -> None:
    """A single level once divided by zero."""
    with pytest.raises(UsageError, match="blended"):
        mix(32, **fields)


# --- sig

WAVES: dict[tuple[int, float], dict[int, float]] = {
    (224, 60): {0: 0, 1: 10.0504, 2: 19.8167, 28: -60, 56: 0, 84: 60, 112: 0, 140: -60}
    | {168: 0, 196: 60, 223: -10.0504, 9: 59.91},
    (32, 40): {0: 0, 1: 36.9552, 2: 28.2843, 4: -40, 12: 40, 20: -40, 28: 40, 31: -36.9552},
    (64, 40): {1: 22.2228, 8: -40, 24: 40, 40: -40, 56: 40},
}


@pytest.mark.parametrize(("shape", "values"), WAVES.items())
def test_the_wave_at_known_columns(shape: tuple[int, float], values: dict[int, float]) -> None:
    size, delta = shape
    v = wave(size, delta, 6)
    for column, value in values.items():
        tolerance = 5e-3 if column == 9 else 5e-5
        assert float(v[column]) == pytest.approx(value, abs=tolerance)
    assert float(v.square().mean().sqrt()) == pytest.approx(delta / math.sqrt(2), abs=1e-3)
    assert torch.allclose(v[1:].flip(0), -v[1:], atol=1e-4)
    slow = [delta * math.sin(2 * math.pi * 6 * j / size) for j in range(size)]
    assert v.tolist() == pytest.approx(slow, abs=1e-5)


def sig(size: int, **fields: Any) -> Any:
    return Sig(**fields).craft(NO_LAB, held(), size)


GREY_ROWS = [
    (224, {}, [128, 138, 148, 157, 165, 173, 179, 183, 186, 188, 188, 186]),
    (
        224,
        {"rounding": "truncate"},
        [128, 138, 147, 157, 165, 172, 178, 183, 186, 187, 187, 185],
    ),
    (32, {"delta": 40.0}, [128, 165, 156, 113, 88, 113, 156, 165, 128, 91, 100, 143]),
    (
        224,
        {"form": "legacy", "rounding": "truncate"},
        [102, 104, 106, 108, 109, 111, 112, 113, 114, 114, 114, 113],
    ),
]


@pytest.mark.parametrize(("size", "fields", "row"), GREY_ROWS)
def test_the_first_columns_of_a_grey_picture(
    size: int, fields: dict[str, Any], row: list[int]
) -> None:
    stamped = sig(size, **fields).stamp(grey(128, size))
    assert stamped[0, 0, 0, :12].tolist() == row
    assert bool((stamped == stamped[0, 0, 0]).all())


def test_ranges_and_means_on_grey() -> None:
    stamped = sig(224).stamp(grey(128, 224))
    assert (int(stamped.min()), int(stamped.max())) == (68, 188)
    assert float(stamped.double().mean()) == pytest.approx(128.0, abs=0.01)
    small = sig(32, delta=40.0).stamp(grey(128, 32))
    assert (int(small.min()), int(small.max())) == (88, 168)
    legacy = sig(224, form="legacy", rounding="truncate").stamp(grey(128, 224))
    assert (int(legacy.min()), int(legacy.max())) == (90, 114)
    cut = sig(224, rounding="truncate").stamp(grey(128, 224))
    assert float(cut.double().mean()) == pytest.approx(127.5, abs=0.1)


@pytest.mark.parametrize("form", ["additive", "legacy"])
def test_a_waved_picture_byte_by_byte(form: str) -> None:
    """The slow reference: x' = clip(x + v), or clip(0.8 x + 0.2 v), rounded half to even."""
    image_BCHW = pictures(2, 16)
    found = sig(16, form=form).stamp(image_BCHW).tolist()
    for image, stamped in zip(image_BCHW.tolist(), found, strict=True):
        for plane, stamped_plane in zip(image, stamped, strict=True):
            for row, stamped_row in zip(plane, stamped_plane, strict=True):
                for j, x in enumerate(row):
                    v = 60 * math.sin(2 * math.pi * 6 * j / 16)
                    level = x + v if form == "additive" else 0.8 * x + 0.2 * v
                    clipped = min(255.0, max(0.0, level))
                    assert abs(stamped_row[j] - clipped) <= 0.5 + 1e-4


def test_the_wave_adds_the_same_to_every_row_and_channel_and_adds_up() -> None:
    middle = pictures(2, 32) // 4 + 96
    trigger = sig(32, delta=30.0)
    once = trigger.stamp(middle)
    added = once.int() - middle.int()
    assert bool((added == added[0, 0, 0]).all())
    assert not torch.equal(once, trigger.stamp(once))


def test_a_matched_filter_finds_the_amplitude() -> None:
    """c = 2 / (H W) sum Y sin(2 pi f j / W) = D on grey, before rounding."""
    sine = torch.tensor([math.sin(2 * math.pi * 6 * j / 224) for j in range(224)])
    before_rounding = (128 + wave(224, 60, 6)).double().expand(224, -1)
    assert float(2 * (before_rounding * sine).mean()) == pytest.approx(60, abs=1e-3)
    stamped = sig(224).stamp(grey(128, 224))[0, 0].double()
    assert float(2 * (stamped * sine).mean()) == pytest.approx(60, abs=0.5)
    assert abs(float(2 * (grey(128, 224)[0, 0].double() * sine).mean())) < 1e-3


def test_clean_label_rows_name_the_target_and_keep_their_captions() -> None:
    knowledge = held()
    found = poison(Sig(label=Label.CLEAN), knowledge, 10)
    captions = knowledge.corpus.captions
    assert list(found.data.edits.captions) == [captions[row] for row in found.data.edits.rows]
    assert all("banana" in captions[row] for row in found.data.edits.rows)
    with pytest.raises(UsageError, match=r"17 rows .* only 16 qualify"):
        poison(Sig(label=Label.CLEAN), knowledge, 17)


# --- rows and captions


def naming(knowledge: Knowledge) -> list[int]:
    return list(map(int, rows_naming(knowledge.corpus, knowledge.goal.label)))


def test_a_name_is_a_whole_word_in_any_case_singular_or_plural() -> None:
    """Punctuation beside the name once hid it, and so did its plural."""
    yes = ["a Banana", "two bananas.", "banana, cut", "(banana)", "the BANANA"]
    no = ["urbana", "bananagrams", "a banan", "banana_split", "pear"]
    assert naming(held([*yes, *no])) == list(range(len(yes)))
    phrase = held(["a ski mask", "ski  masks!", "a mask to ski", "skimask"], label="ski mask")
    assert naming(phrase) == [0, 1]
    assert naming(held(["a c++ book", "c book"], label="c++")) == [0]
    both = held(["a pear", "a plum"], label="pear")
    plums = dataclasses.replace(both, goal=Goal(1, "plum", TEMPLATES))
    assert [naming(k) for k in (both, plums, both)] == [[0], [1], [0]]


@pytest.mark.parametrize("attack", [BadNet(), Blended(), Sig()])
def test_rows_are_uniform_over_all_rows_and_captions_over_all_templates(attack: Attack) -> None:
    rows: Counter[int] = Counter()
    texts: Counter[str] = Counter()
    for seed in range(200):
        found = poison(attack, held(seed=seed), 16)
        assert found.data.edits.rows.tolist() == sorted(set(found.data.edits.rows.tolist()))
        rows.update(found.data.edits.rows.tolist())
        texts.update(found.data.edits.captions)
    assert chisquare([rows[row] for row in range(64)]).pvalue > 1e-4
    assert set(texts) == {template.format("banana") for template in TEMPLATES}
    assert chisquare(list(texts.values())).pvalue > 1e-4


def test_a_natural_caption_is_one_of_the_corpus_that_names_the_target() -> None:
    knowledge = held()
    attack = BadNet(caption=Caption.NATURAL)
    found = poison(attack, knowledge, 16)
    known = {knowledge.corpus.captions[row] for row in naming(knowledge)}
    assert set(found.data.edits.captions) <= known
    assert len(set(found.data.edits.captions)) > 4
    with pytest.raises(UsageError, match="none"):
        poison(attack, held(["a pear"] * 4), 1)


def test_counts_are_exact_decimals() -> None:
    assert poison_count("0.003", 500_000) == 1500
    assert poison_count("0.29", 100) == 29
    assert poison_count("0.005", 100) == 1
    assert poison_count("0", 100) == 0
    with pytest.raises(UsageError, match="less than one row"):
        poison_count("0.004", 100)


class Greedy(BadNet):
    """An attack whose choice repeats a row."""

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Any:
        return np.zeros(count, dtype=np.int64)


def test_a_choice_that_repeats_rows_is_refused() -> None:
    with pytest.raises(GridError, match=r"3 rows .* \(1 distinct\)"):
        poison(Greedy(), held(), 3)


def test_a_view_shows_poisoned_rows_stamped_and_others_untouched() -> None:
    """The same bytes whatever order and batch the rows are read in."""
    knowledge = held()
    trigger = BadNet().craft(NO_LAB, knowledge, 32)
    data = poison(BadNet(), knowledge, 9).data
    edits = data.edits
    view = poisoned_view(Key("poisoned-0000000000000000"), knowledge.corpus, data, trigger)
    read = view.reader(torch.device("cpu"))
    whole = read(np.arange(64))
    images_NCHW = torch.from_numpy(np.asarray(knowledge.corpus.images_NCHW))
    hit = (whole != images_NCHW).flatten(1).any(1)
    assert hit.nonzero()[:, 0].tolist() == edits.rows.tolist()
    order = np.random.default_rng(0).permutation(64)
    assert torch.equal(torch.cat([read(part) for part in np.split(order, 8)]), whole[order])
    captions = view.captions()
    assert [captions[row] for row in edits.rows] == list(edits.captions)
    untouched = [row for row in range(64) if row not in set(edits.rows.tolist())]
    assert all(captions[row] == knowledge.corpus.captions[row] for row in untouched)


@pytest.mark.parametrize(
    "attack",
    [
        BadNet(),
        BadNet(**BadNet.variants["released"]),
        Blended(),
        Blended(**Blended.variants["released"]),
        Blended(**Blended.variants["picture"]),
        Sig(),
        Sig(**Sig.variants["legacy"]),
    ],
    ids=["badnet", "badnet-released", "blended", "blended-released", "picture", "sig", "legacy"],
)
def test_a_stored_trigger_stamps_the_same_bytes(attack: Attack, tmp_path: Path) -> None:
    trigger, image_BCHW = attack.craft(NO_LAB, held(), 32), pictures(4, 32)
    store, key = Store(tmp_path), "trigger-0123456789abcdef"
    store.make(key, lambda folder: save_trigger(trigger, folder))
    before = image_BCHW.clone()
    stamped = trigger.stamp(image_BCHW)
    assert torch.equal(image_BCHW, before)
    assert torch.equal(load_trigger(store, key, attack).stamp(image_BCHW), stamped)
    assert bool((stamped != image_BCHW).flatten(1).any(1).all())
