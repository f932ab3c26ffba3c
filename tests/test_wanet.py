"""The warp against golden values and a slow reference written from its definition.

Shapes: B pictures, C channels, H W pixels, S side of a picture, 2 shifts of column and row.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import Role, poison, poisoned_view
from attacks.wanet import WaNet, Warp, bend, draw_field, warped_grid
from benchmarks.slow.wanet import warp, warp_levels
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import NO_LAB, grey, held, pictures
from victims.draws import image_digest, keyed_uniform, torch_rng
from victims.errors import UsageError
from victims.keys import Key
from victims.store import Store
from victims.world import World, render

SIZES = (32, 64, 224)
VARIANTS: list[dict[str, Any]] = [{}, *(dict(values) for values in WaNet.variants.values())]


def crafted(size: int = 32, seed: int = 0, **fields: Any) -> Warp:
    return WaNet(**fields).craft(NO_LAB, held(seed=seed), size)


def identity(size: int) -> Tensor:
    return warped_grid(torch.zeros(size, size, 2), 0.0, 1.0)


def shift(trigger: Warp) -> Tensor:
    """By how many pixels every pixel is read elsewhere, SS2."""
    size = len(trigger.grid)
    return (trigger.grid - identity(size)).double() * (size - 1) / 2


def natural(size: int, count: int = 24) -> Tensor:
    return torch.from_numpy(render(World(size=size), "suspect", count).image_BCHW)


# --- the field


@pytest.mark.parametrize("k", [2, 4, 8, 224])
def test_control_points_have_a_mean_size_of_one(k: int) -> None:
    """With as many control points as pixels, nothing is spread, so they are the field itself."""
    field_SS2 = draw_field(torch_rng(0, "test"), k, k)
    assert float(field_SS2.double().abs().mean()) == pytest.approx(1, abs=1e-6)


def test_a_point_per_pixel_makes_spreading_an_exact_no_op() -> None:
    drawn = torch.rand(1, 2, 224, 224, generator=torch_rng(0, "test")) * 2 - 1
    control_2SS = (drawn / drawn.abs().mean())[0]
    field_SS2 = draw_field(torch_rng(0, "test"), 224, 224)
    assert torch.equal(field_SS2[..., 0], control_2SS[0])
    assert torch.equal(field_SS2[..., 1], control_2SS[1])


@pytest.mark.parametrize(
    ("size", "fields", "mean", "most"),
    [
        (32, {"k": 4, "strength": 0.5}, 0.18, 0.62),
        (224, {}, 0.498, 0.995),
        (224, {"strength": 0.6}, 0.30, 0.60),
        (224, {"k": 4, "strength": 0.5}, 0.19, 0.63),
        (224, {"k": 8, "strength": 4.0}, 1.6, 5.0),
    ],
)
def test_shifts_in_pixels(size: int, fields: dict[str, Any], mean: float, most: float) -> None:
    """Over keys: the mean of a smooth field varies with its few control points."""
    shifts = [shift(crafted(size, seed, **fields)).abs() for seed in range(8)]
    assert float(torch.stack(shifts).mean()) == pytest.approx(mean, rel=0.12)
    assert max(float(one.max()) for one in shifts) < 1.15 * most
    for one in shifts:
        assert float(one.mean()) == pytest.approx(mean, abs=0.25 * mean)


def test_the_clip_field_is_what_its_shipped_file_is() -> None:
    """Its statistics: range, deviation, Euclidean length, no correlation, what the clamp takes."""
    field_SS2 = draw_field(torch_rng(0, "test"), 224, 224)
    assert float(field_SS2.abs().max()) == pytest.approx(2, abs=0.01)
    assert float(field_SS2.std()) == pytest.approx(1.154, abs=0.01)
    grid_SS2 = warped_grid(field_SS2, 1.0, 1.0)
    free_SS2 = identity(224) + field_SS2 / 224
    assert float((grid_SS2 != free_SS2).float().mean()) == pytest.approx(0.00445, abs=0.0005)
    moved_SS2 = (free_SS2 - identity(224)).double() * 223 / 2
    assert float(moved_SS2.abs().mean()) == pytest.approx(0.4978, abs=1e-4)
    assert float(moved_SS2.norm(dim=-1).mean()) == pytest.approx(0.762, abs=0.005)
    rows = field_SS2[:, :-1, 0].flatten().double(), field_SS2[:, 1:, 0].flatten().double()
    assert abs(float(torch.corrcoef(torch.stack(rows))[0, 1])) < 0.02


def test_a_smooth_field_is_smooth_and_goes_through_its_control_points() -> None:
    drawn = torch.rand(1, 2, 4, 4, generator=torch_rng(0, "test")) * 2 - 1
    control_2KK = (drawn / drawn.abs().mean())[0]
    field_SS2 = draw_field(torch_rng(0, "test"), 4, 223)
    assert torch.allclose(field_SS2[::74, ::74].permute(2, 0, 1), control_2KK, atol=1e-4)
    assert float((field_SS2[1:] - field_SS2[:-1]).abs().max()) < 0.06


def test_the_grid_is_rescaled_and_clamped() -> None:
    field_SS2 = draw_field(torch_rng(0, "test"), 4, 32)
    grid_SS2 = warped_grid(field_SS2, 0.5, 1.25)
    expected_SS2 = ((identity(32) + 0.5 * field_SS2 / 32) * 1.25).clamp(-1, 1)
    assert torch.allclose(grid_SS2, expected_SS2, atol=1e-6)
    assert (float(grid_SS2.min()), float(grid_SS2.max())) == (-1, 1)
    wider_SS2 = crafted(32, rescale=1.25).grid - crafted(32).grid
    assert float(wider_SS2[8, 16].abs().max()) == pytest.approx(0.125, abs=0.05)


def test_the_key_decides_on_the_field_and_pictures_do_not() -> None:
    assert torch.equal(crafted().grid, crafted().grid)
    assert not torch.equal(crafted().grid, crafted(seed=1).grid)
    trigger, image_BCHW = crafted(), pictures(8, 32)
    assert torch.equal(trigger.stamp(image_BCHW), trigger.stamp_train(image_BCHW))


# --- the stamp


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_a_stamp_is_the_weighted_mean_of_four_pixels(size: int, fields: dict[str, Any]) -> None:
    """The slow reference: levels in double precision, on the edge to either side."""
    trigger, image_BCHW = crafted(size, **fields), pictures(3, size)
    before_BCHW, grid_SS2 = image_BCHW.clone(), trigger.grid.double().numpy()
    for image_CHW, found_CHW in zip(image_BCHW, trigger.stamp(image_BCHW), strict=True):
        image_HWC = image_CHW.permute(1, 2, 0).numpy()
        found_HWC = found_CHW.permute(1, 2, 0).numpy()
        level_HWC = warp_levels(grid_SS2, image_HWC)
        quantise = np.trunc if trigger.rounding == "truncate" else np.rint
        low_HWC, high_HWC = (quantise((level_HWC + off).clip(0, 255)) for off in (-1e-3, 1e-3))
        assert bool(((found_HWC == low_HWC) | (found_HWC == high_HWC)).all())
        assert float((found_HWC != warp(trigger, image_HWC)).mean()) < 1e-3
    assert torch.equal(image_BCHW, before_BCHW)


@pytest.mark.parametrize("fields", VARIANTS)
def test_levels_are_those_of_grid_sample(fields: dict[str, Any]) -> None:
    trigger, image_BCHW = crafted(64, **fields), pictures(4, 64)
    grid_BSS2 = trigger.grid.expand(4, -1, -1, -1).double()
    sampled_BCHW = F.grid_sample(image_BCHW.double(), grid_BSS2, align_corners=True)
    assert float((bend(image_BCHW, trigger.grid) - sampled_BCHW).abs().max()) < 1e-4


@pytest.mark.parametrize("rounding", ["even", "truncate"])
@pytest.mark.parametrize("size", SIZES)
def test_without_strength_pictures_stay_as_they_are(size: int, rounding: str) -> None:
    image_BCHW = pictures(4, size)
    levels_BCHW = bend(image_BCHW, identity(size))
    assert float((levels_BCHW - image_BCHW).abs().max()) / 255 < 3e-5
    stamped_BCHW = crafted(size, strength=0.0, rounding=rounding).stamp(image_BCHW)
    assert int((stamped_BCHW.int() - image_BCHW.int()).abs().max()) <= (rounding == "truncate")


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("level", [0, 1, 77, 254, 255])
def test_a_flat_picture_is_unchanged_by_any_field(level: int, fields: dict[str, Any]) -> None:
    image_BCHW, trigger = grey(level, 64, 2), crafted(64, **fields)
    assert torch.equal(trigger.stamp(image_BCHW), image_BCHW)
    assert torch.equal(trigger.stamp_cover(image_BCHW), image_BCHW)


def test_a_field_of_ones_shifts_by_almost_half_a_pixel() -> None:
    """At 224 px by 223 / 448: the interior is the mean of four neighbours with that weight."""
    grid_SS2 = warped_grid(torch.ones(224, 224, 2), 1.0, 1.0)
    weight = 223 / 448
    assert weight == pytest.approx(0.49777, abs=1e-5)
    x = pictures(2, 224).double() / 255
    across = (1 - weight) * x[..., :-1] + weight * x[..., 1:]
    expected_BCHW = (1 - weight) * across[..., :-1, :] + weight * across[..., 1:, :]
    found_BCHW = bend(pictures(2, 224), grid_SS2)[..., :-1, :-1].double() / 255
    assert float((found_BCHW - expected_BCHW).abs().max()) < 2e-4


def test_the_first_channel_moves_columns() -> None:
    field_SS2 = torch.zeros(32, 32, 2)
    field_SS2[..., 0] = 1
    ramp_SS = (torch.arange(32) * 8).to(torch.uint8).expand(32, 32)
    grid_SS2 = warped_grid(field_SS2, 2.0, 1.0)
    across_SS = bend(ramp_SS.expand(1, 3, 32, 32), grid_SS2)[0, 0]
    down_SS = bend(ramp_SS.T.expand(1, 3, 32, 32), grid_SS2)[0, 0]
    assert torch.allclose(across_SS[:, :-1], ramp_SS[:, :-1] + 8 * 31 / 32, atol=1e-3)
    assert torch.allclose(down_SS, ramp_SS.T.float(), atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_a_transposed_picture_under_the_transposed_field_is_the_transposed_warp(size: int) -> None:
    trigger, image_BCHW = crafted(size), pictures(3, size)
    turned_SS2 = trigger.grid.transpose(0, 1).flip(-1)
    turned_BCHW = bend(image_BCHW.transpose(2, 3), turned_SS2)
    straight_BCHW = bend(image_BCHW, trigger.grid).transpose(2, 3)
    assert torch.allclose(turned_BCHW, straight_BCHW, atol=1e-3)
    off = bend(image_BCHW.transpose(2, 3), trigger.grid.transpose(0, 1)) - straight_BCHW
    assert float(off.abs().max()) > 1


@pytest.mark.parametrize("stamp", ["stamp", "stamp_cover"])
@pytest.mark.parametrize("size", SIZES)
def test_a_picture_comes_out_the_same_in_any_batch(size: int, stamp: str) -> None:
    trigger, image_BCHW = crafted(size), pictures(9, size)
    apply = getattr(trigger, stamp)
    whole_BCHW = apply(image_BCHW)
    assert torch.equal(whole_BCHW, torch.cat([apply(part) for part in torch.split(image_BCHW, 1)]))
    assert torch.equal(whole_BCHW, torch.cat([apply(part) for part in torch.split(image_BCHW, 4)]))
    assert torch.equal(whole_BCHW.flip(0), apply(image_BCHW.flip(0)))
    assert whole_BCHW.dtype == torch.uint8


def test_no_pictures_give_no_pictures() -> None:
    assert crafted().stamp(pictures(0, 32)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_natural_pictures_change(size: int, fields: dict[str, Any]) -> None:
    image_BCHW = natural(size)
    changed_B = (crafted(size, **fields).stamp(image_BCHW) != image_BCHW).flatten(1).any(1)
    assert bool(changed_B.all())


def test_textured_pictures_are_shuffled_and_white_noise_is_changed_most() -> None:
    """The documented figure for the CLIP field: 56 levels on white noise."""
    trigger, image_BCHW = crafted(224), pictures(2, 224)
    moved = (trigger.stamp(image_BCHW).float() - image_BCHW.float()).abs().mean()
    assert float(moved) == pytest.approx(56, abs=1)


# --- cover rows


def test_covers_are_bent_by_the_grid_with_one_more_shift_per_picture() -> None:
    """Against the definition: clamp(grid + U(-1, 1) / S, -1, 1), drawn from the bytes."""
    trigger, image_BCHW = crafted(32, k=4, strength=0.5), pictures(5, 32)
    draws = keyed_uniform(image_digest(image_BCHW, trigger.key), 1, 32, 32, 2)
    found_BCHW = trigger.stamp_cover(image_BCHW)
    for image_CHW, draw_SS2, found_CHW in zip(image_BCHW, draws, found_BCHW, strict=True):
        grid_SS2 = (trigger.grid + (2 * draw_SS2 - 1) / 32).clamp(-1, 1)
        jittered = dataclasses.replace(trigger, grid=grid_SS2)
        assert torch.equal(found_CHW, jittered.stamp(image_CHW[None])[0])
        extra = (grid_SS2 - trigger.grid).double() * 31 / 2
        assert float(extra.abs().max()) <= 31 / 64 + 1e-5
        assert float(extra.abs().mean()) == pytest.approx(31 / 128, rel=0.05)
    assert not torch.equal(found_BCHW, trigger.stamp(image_BCHW))


def test_a_shared_jitter_is_one_second_field() -> None:
    """A ramp with a grain makes two different pictures that show the field alike."""
    ramp_BCHW = (torch.arange(32) * 4).to(torch.uint8).expand(2, 3, 32, 32).clone()
    ramp_BCHW[1] += 50
    apart, shared = crafted(32), crafted(32, shared_jitter=True)
    own_BCHW, same_BCHW = apart.stamp_cover(ramp_BCHW), shared.stamp_cover(ramp_BCHW)
    assert int((same_BCHW[1].int() - same_BCHW[0].int() - 50).abs().max()) <= 1
    assert int((own_BCHW[1].int() - own_BCHW[0].int() - 50).abs().max()) > 1
    assert torch.equal(apart.stamp(ramp_BCHW), shared.stamp(ramp_BCHW))
    other = crafted(32, seed=1, shared_jitter=True).stamp_cover(ramp_BCHW)
    assert not torch.equal(other, same_BCHW)


@pytest.mark.parametrize(("ratio", "covers"), [(0.0, 0), (0.5, 4), (2.0, 14), (0.3, 2)])
def test_cover_rows_are_apart_and_keep_their_captions(ratio: float, covers: int) -> None:
    knowledge, attack = held(), WaNet(cover_ratio=ratio, k=4)
    found = poison(attack, knowledge, 7)
    rows = found.data.edits.rows
    poisoned, covering = set(rows[found.of(Role.POISON)]), set(rows[found.of(Role.COVER)])
    assert (len(poisoned), len(covering), len(poisoned & covering)) == (7, covers, 0)
    trigger = attack.craft(NO_LAB, knowledge, 32)
    view = poisoned_view(Key("corpus-0000000000000001"), knowledge.corpus, found.data, trigger)
    shown_BCHW = view.reader(torch.device("cpu"))(np.arange(64))
    plain_BCHW = pictures(64, 32)
    bent_BCHW, jittered_BCHW = trigger.stamp(plain_BCHW), trigger.stamp_cover(plain_BCHW)
    for row, (caption, before) in enumerate(
        zip(view.captions(), knowledge.corpus.captions, strict=True)
    ):
        wanted_BCHW = plain_BCHW
        if row in poisoned:
            wanted_BCHW = bent_BCHW
            assert "banana" in caption
        else:
            assert caption == before
        if row in covering:
            wanted_BCHW = jittered_BCHW
        assert torch.equal(shown_BCHW[row], wanted_BCHW[row])


def test_too_few_rows_for_covers_raise() -> None:
    with pytest.raises(UsageError, match=r"wanet, cover rows: 100 rows .* only 14"):
        poison(WaNet(cover_ratio=2.0), held(), 50)


# --- the rest


@pytest.mark.parametrize(
    "fields",
    [{"k": 0}, {"strength": -1.0}, {"rescale": 0.0}, {"cover_ratio": -0.5}],
)
def test_warps_that_cannot_be_meant_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UsageError, match=rf"wanet: .*{name} {fields[name]}"):
        crafted(32, **fields)


def test_the_trigger_comes_back_from_disk(tmp_path: Path) -> None:
    store, trigger, image_BCHW = Store(tmp_path), crafted(k=4, shared_jitter=True), pictures(4, 32)
    key = Key("trigger-0000000000000000")
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    loaded = load_trigger(store, key, WaNet(k=4, shared_jitter=True))
    assert torch.equal(loaded.stamp(image_BCHW), trigger.stamp(image_BCHW))
    assert torch.equal(loaded.stamp_cover(image_BCHW), trigger.stamp_cover(image_BCHW))
