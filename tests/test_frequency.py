"""Fewer colours and waves in chroma against golden values and slow references.

The slow reference of the waves walks the whole way from its definition: colour space, blocks,
coefficients, and back.

Shapes: B pictures, C channels, H W pixels, S side of a picture, Q side of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.stats import chisquare
from torch import Tensor

from attacks.base import Attack, Knowledge, Role, Track, poison, poisoned_view
from attacks.frequency import Bpp, Ctrl, FTrojan, Reduced, levels_of
from benchmarks.slow import frequency as slow
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import NO_LAB, grey, held, pictures
from victims.draws import image_digest
from victims.errors import UsageError
from victims.frequency import (
    YCRCB,
    YUV,
    cosines,
    from_ycrcb_bytes,
    gain,
    to_ycrcb_bytes,
    waves,
)
from victims.keys import Key
from victims.store import Store
from victims.world import World, render

Floats = npt.NDArray[np.float64]

SIZES = (32, 64, 224)
SLOW: dict[str, Callable[..., Any]] = {"Reduced": slow.reduced, "Chroma": slow.chroma}
EVERY: list[Attack] = [
    *(kind(**fields) for kind in (Bpp, Ctrl, FTrojan) for fields in ({}, *kind.variants.values())),
    Bpp(levels=2, bank=3),
    Bpp(levels=200, rounding="truncate"),  # type: ignore[arg-type]
    Ctrl(window=16, positions=((0, 3), (7, 0), (15, 8)), magnitude=250.0),
    FTrojan(window=16, positions=((5, 9),), magnitude=77.0),
    FTrojan(magnitude=300.0, rounding="truncate"),  # type: ignore[arg-type]
]
WAVES = [attack for attack in EVERY if not isinstance(attack, Bpp)]


def pool(size: int, seed: int = 0) -> Knowledge:
    """An attacker's view whose pictures are of that size."""
    knowledge = held(seed=seed)
    images_NCHW = pictures(64, size).numpy()
    return replace(knowledge, corpus=replace(knowledge.corpus, images_NCHW=images_NCHW))


def crafted(attack: Attack, size: int = 32, seed: int = 0) -> Any:
    return attack.craft(NO_LAB, pool(size, seed), size)


def natural(size: int, count: int = 8) -> Tensor:
    return torch.from_numpy(render(World(size=size), "suspect", count).image_BCHW)


def window_of(attack: Any, size: int) -> int:
    """One block a picture in CTRL at its own sizes and in its released form, else 32 pixels."""
    if attack.window is not None:
        return int(attack.window)
    return size if size <= 64 or attack.legacy_window else 32


def blockwise(change: Callable[..., Floats], plane_SS: Floats, window: int) -> Floats:
    out_SS = np.empty_like(plane_SS)
    for row in range(0, len(plane_SS), window):
        for column in range(0, len(plane_SS), window):
            block = np.s_[row : row + window, column : column + window]
            out_SS[block] = change(plane_SS[block], norm="ortho")
    return out_SS


def with_coefficients(plane_SS: Floats, attack: Any) -> Floats:
    """The plane whose every block has M more at every position, by transform and inverse."""
    window = window_of(attack, len(plane_SS))
    found_SS = blockwise(dctn, plane_SS, window)
    for row, column in attack.positions:
        found_SS[row::window, column::window] += attack.magnitude
    return blockwise(idctn, found_SS, window)


def whole_way(attack: Any, image_HWC: Any) -> Floats:
    """Levels before they are bytes: colours, coefficients, and back through the inverse."""
    if attack.name == "ctrl":
        matrix = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
        offset = 0.0
    else:
        luma = np.array([0.299, 0.587, 0.114])
        red, blue = np.array([1.0, 0, 0]), np.array([0, 0, 1.0])
        matrix, offset = np.stack((luma, 0.713 * (red - luma), 0.564 * (blue - luma))), 128.0
    colour_HWC = image_HWC @ matrix.T + [0, offset, offset]
    for channel in (1, 2):
        colour_HWC[..., channel] = with_coefficients(colour_HWC[..., channel], attack)
    level_HWC: Floats = (colour_HWC - [0, offset, offset]) @ np.linalg.inv(matrix).T
    return level_HWC


# --- every form


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_a_stamp_is_its_slow_form(attack: Attack, size: int) -> None:
    """Byte by byte, the input left as it was, in training as at test."""
    trigger, image_BCHW = crafted(attack, size), torch.cat([pictures(2, size), natural(size, 1)])
    before_BCHW, found_BCHW = image_BCHW.clone(), trigger.stamp(image_BCHW)
    for image_CHW, found_CHW in zip(image_BCHW, found_BCHW, strict=True):
        wanted_HWC = SLOW[type(trigger).__name__](trigger, image_CHW.permute(1, 2, 0).numpy())
        assert np.array_equal(found_CHW.permute(1, 2, 0).numpy(), wanted_HWC)
    assert torch.equal(image_BCHW, before_BCHW)
    assert torch.equal(found_BCHW, trigger.stamp_train(image_BCHW))
    assert found_BCHW.dtype == torch.uint8


@pytest.mark.parametrize("stamp", ["stamp", "stamp_cover"])
@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_a_picture_comes_out_the_same_in_any_batch(attack: Attack, stamp: str) -> None:
    trigger, image_BCHW = crafted(attack), pictures(9, 32)
    apply = getattr(trigger, stamp)
    whole_BCHW = apply(image_BCHW)
    for step in (1, 4):
        parts = [apply(part) for part in torch.split(image_BCHW, step)]
        assert torch.equal(whole_BCHW, torch.cat(parts))
    assert torch.equal(whole_BCHW.flip(0), apply(image_BCHW.flip(0)))
    assert apply(image_BCHW[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_natural_pictures_change(attack: Attack, size: int) -> None:
    image_BCHW = natural(size)
    changed_B = (crafted(attack, size).stamp(image_BCHW) != image_BCHW).flatten(1).any(1)
    assert bool(changed_B.all())


@pytest.mark.parametrize("attack", EVERY, ids=repr)
def test_the_trigger_comes_back_from_disk(attack: Attack, tmp_path: Path) -> None:
    store, trigger, image_BCHW = Store(tmp_path), crafted(attack), pictures(4, 32)
    key = Key("trigger-0000000000000000")
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    loaded = load_trigger(store, key, attack)
    assert torch.equal(loaded.stamp(image_BCHW), trigger.stamp(image_BCHW))
    assert torch.equal(loaded.stamp_cover(image_BCHW), trigger.stamp_cover(image_BCHW))


@pytest.mark.parametrize("kind", [Bpp, Ctrl, FTrojan])
def test_they_are_for_pairs_and_for_classifiers(kind: type[Any]) -> None:
    assert kind.tracks == {Track.MULTIMODAL, Track.SUPERVISED}


# --- fewer colours


def test_eight_levels_and_their_bins() -> None:
    table = levels_of(8, "even").tolist()
    levels = [0, 36, 73, 109, 146, 182, 219, 255]
    assert [table.count(level) for level in levels] == [19, 36, 37, 36, 36, 37, 36, 19]
    assert sum(table.count(level) for level in levels) == 256
    edges = [(18, 0), (19, 36), (54, 36), (55, 73), (91, 73), (92, 109), (127, 109)]
    edges += [(128, 146), (163, 146), (164, 182), (200, 182), (201, 219), (236, 219), (237, 255)]
    assert [(byte, table[byte]) for byte, _ in edges] == edges
    moved = np.abs(np.array(table) - np.arange(256))
    assert moved.max() == 18
    assert moved.mean() == pytest.approx(9.07, abs=0.005)


def test_released_levels_are_cut_off() -> None:
    table = levels_of(8, "truncate").tolist()
    assert sorted(set(table)) == [0, 36, 72, 109, 145, 182, 218, 255]
    assert crafted(Bpp(**Bpp.variants["released"])).table.tolist() == table


@pytest.mark.parametrize("rounding", ["even", "truncate"])
@pytest.mark.parametrize("levels", [2, 3, 7, 8, 17, 100, 255])
def test_levels_are_those_of_the_formula(levels: int, rounding: Any) -> None:
    """In whole numbers: the nearest of q steps, and that step's level, to even if halfway."""
    steps = [(2 * x * (levels - 1) + 255) // 510 for x in range(256)]
    whole = [divmod(step * 255, levels - 1) for step in steps]
    up = [2 * rest > levels - 1 or (2 * rest == levels - 1 and level % 2) for level, rest in whole]
    wanted = [
        level + (rounding == "even") * bool(u) for (level, _), u in zip(whole, up, strict=True)
    ]
    assert levels_of(levels, rounding).tolist() == wanted


@pytest.mark.parametrize("attack", [a for a in EVERY if isinstance(a, Bpp)], ids=repr)
def test_colours_are_reduced_once(attack: Bpp) -> None:
    """Unless steps are so small that a level that was cut off lies nearer to the one below."""
    if attack.levels > 128:
        attack = replace(attack, levels=128)
    trigger, image_BCHW = crafted(attack), pictures(4, 32)
    once_BCHW = trigger.stamp(image_BCHW)
    assert torch.equal(trigger.stamp(once_BCHW), once_BCHW)
    assert len(once_BCHW.unique()) == attack.levels


# --- what cover rows show


def test_a_cover_row_gains_what_another_picture_loses() -> None:
    """The slow reference: x + (x_j - BPP(x_j)), clipped, for a picture j of the pool."""
    trigger, knowledge, image_BCHW = crafted(Bpp()), pool(32), pictures(40, 32, seed=1)
    table = levels_of(8, "even").numpy().astype(int)
    pool_NCHW = knowledge.corpus.images_NCHW.astype(int)
    lost_NCHW = pool_NCHW - table[pool_NCHW]
    pool_digests = image_digest(torch.from_numpy(knowledge.corpus.images_NCHW), trigger.key)
    by_digest = {digest: row for row, digest in enumerate(pool_digests.tolist())}
    assert sorted(by_digest[d] for d in trigger.digests.tolist()) == list(range(64))
    picked = [by_digest[int(trigger.digests[place])] for place in trigger.other(image_BCHW)]
    wanted_BCHW = np.clip(image_BCHW.numpy().astype(int) + lost_NCHW[picked], 0, 255)
    assert np.array_equal(trigger.stamp_cover(image_BCHW).numpy(), wanted_BCHW)
    assert len(set(picked)) > 15


def test_released_covers_gain_what_is_cut_off() -> None:
    released = crafted(Bpp(**Bpp.variants["released"]))
    more = released.bank.int() - crafted(Bpp()).bank.int()
    assert set(more.flatten().tolist()) == {0, 1}


def test_no_picture_is_its_own_other() -> None:
    """Of a bank of two, every picture of the bank takes the other; the rest take either."""
    trigger = crafted(Bpp(bank=2))
    image_NCHW = torch.from_numpy(pool(32).corpus.images_NCHW)
    digests, other = image_digest(image_NCHW, trigger.key), trigger.other(image_NCHW)
    own = [int((digests == digest).nonzero()[0, 0]) for digest in trigger.digests]
    assert [int(other[row]) for row in own] == [1, 0]
    assert 15 < int(other.sum()) < 49
    whole = crafted(Bpp())
    assert not bool((whole.digests[whole.other(image_NCHW)] == digests).any())


def test_others_are_drawn_evenly_from_the_bank() -> None:
    image_BCHW = pictures(3000, 4)
    counts = torch.bincount(crafted(Bpp(bank=16)).other(image_BCHW), minlength=16)
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_the_bank_follows_the_key_and_takes_no_picture_twice() -> None:
    assert torch.equal(crafted(Bpp(bank=8)).bank, crafted(Bpp(bank=8)).bank)
    assert not torch.equal(crafted(Bpp(bank=8)).bank, crafted(Bpp(bank=8), seed=1).bank)
    assert [len(crafted(Bpp(bank=n)).bank) for n in (2, 8, 256)] == [2, 8, 64]
    knowledge = pool(32)
    images_NCHW = knowledge.corpus.images_NCHW[np.arange(64) % 5]
    twins = replace(knowledge, corpus=replace(knowledge.corpus, images_NCHW=images_NCHW))
    trigger: Reduced = Bpp().craft(NO_LAB, twins, 32)
    assert len(trigger.bank) == len(set(trigger.digests.tolist())) == 5
    image_NCHW = torch.from_numpy(images_NCHW)
    place_N, digest_N = trigger.other(image_NCHW), image_digest(image_NCHW, trigger.key)
    assert not bool((trigger.digests[place_N] == digest_N).any())
    same = replace(knowledge, corpus=replace(knowledge.corpus, images_NCHW=images_NCHW[:1]))
    with pytest.raises(UsageError, match="bpp: the pool must hold 2 different pictures"):
        Bpp().craft(NO_LAB, same, 32)


def test_covers_stay_within_what_colours_lose() -> None:
    """18 levels with 8 of them; with 2 a byte still holds the change."""
    for levels, most in ((8, 18), (2, 127)):
        trigger = crafted(Bpp(levels=levels))
        assert int(trigger.bank.int().abs().max()) == most
        moved = trigger.stamp_cover(grey(128, 32, 4)).int() - 128
        assert int(moved.abs().max()) <= most


@pytest.mark.parametrize(("ratio", "covers"), [(0.0, 0), (0.5, 4), (1.0, 7), (2.0, 14)])
def test_cover_rows_are_apart_and_keep_their_captions(ratio: float, covers: int) -> None:
    knowledge, attack = pool(32), Bpp(cover_ratio=ratio)
    found = poison(attack, knowledge, 7)
    rows = found.data.edits.rows
    poisoned, covering = set(rows[found.of(Role.POISON)]), set(rows[found.of(Role.COVER)])
    assert (len(poisoned), len(covering), len(poisoned & covering)) == (7, covers, 0)
    trigger = attack.craft(NO_LAB, knowledge, 32)
    view = poisoned_view(Key("corpus-0000000000000001"), knowledge.corpus, found.data, trigger)
    shown_BCHW = view.reader(torch.device("cpu"))(np.arange(64))
    plain_BCHW = torch.from_numpy(knowledge.corpus.images_NCHW)
    reduced_BCHW, added_BCHW = trigger.stamp(plain_BCHW), trigger.stamp_cover(plain_BCHW)
    for row, (caption, before) in enumerate(
        zip(view.captions(), knowledge.corpus.captions, strict=True)
    ):
        assert ("banana" in caption) if row in poisoned else (caption == before)
        wanted_BCHW = reduced_BCHW if row in poisoned else plain_BCHW
        wanted_BCHW = added_BCHW if row in covering else wanted_BCHW
        assert torch.equal(shown_BCHW[row], wanted_BCHW[row])


def test_as_many_covers_as_poisoned_rows_are_the_default() -> None:
    assert len(poison(Bpp(), pool(32), 9).of(Role.COVER)) == 9
    with pytest.raises(UsageError, match=r"bpp, cover rows: 40 rows .* only 24"):
        poison(Bpp(), pool(32), 40)


# --- waves


@pytest.mark.parametrize("window", [8, 28, 32, 64, 224])
def test_the_transform_is_the_orthonormal_one(window: int) -> None:
    basis_QQ = cosines(window).numpy()
    assert np.allclose(basis_QQ @ basis_QQ.T, np.eye(window), atol=1e-12)
    plane_QQ = np.random.default_rng(0).normal(size=(window, window))
    assert np.allclose(basis_QQ @ plane_QQ @ basis_QQ.T, dctn(plane_QQ, norm="ortho"), atol=1e-10)


@pytest.mark.parametrize(
    ("window", "magnitude", "most", "rms", "first"),
    [
        (32, 30.0, 3.1944, 1.3258, 1.0339),
        (32, 100.0, 10.6481, 4.4194, 3.4464),
        (64, 100.0, 6.0086, None, None),
        (224, 100.0, 1.7779, None, None),
        (224, 30.0, 0.5334, None, None),
    ],
)
def test_waves_have_their_published_size(
    window: int, magnitude: float, most: float, rms: float | None, first: float | None
) -> None:
    wave_SS = waves(window, window, magnitude, ((15, 15), (31, 31)))
    assert float(wave_SS.abs().max()) == pytest.approx(most, abs=5e-5)
    assert float(wave_SS.mean()) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(wave_SS, wave_SS.T, rtol=0, atol=1e-12)
    if rms is not None:
        assert float(wave_SS.square().mean().sqrt()) == pytest.approx(rms, abs=5e-5)
        assert float(wave_SS[0, 0]) == pytest.approx(first, abs=5e-5)


def test_the_first_row_of_the_waves() -> None:
    row = waves(32, 32, 30.0, ((15, 15), (31, 31)))[0, :6].tolist()
    assert row == pytest.approx([1.0339, -0.8411, -1.1693, 0.5630, 1.3474, -0.3849], abs=5e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attack", WAVES, ids=repr)
def test_waves_are_the_inverse_of_their_coefficients(attack: Any, size: int) -> None:
    window, pattern_SS = window_of(attack, size), crafted(attack, size).pattern
    assert np.allclose(pattern_SS, with_coefficients(np.zeros((size, size)), attack), atol=1e-10)
    assert torch.allclose(
        pattern_SS[:window, :window].repeat(size // window, size // window), pattern_SS
    )
    if all(row and column for row, column in attack.positions):
        row_Q, by_hand_QQ = np.arange(window), np.zeros((window, window))
        for u, v in attack.positions:
            down_Q = np.cos((2 * row_Q + 1) * u * np.pi / (2 * window))
            across_Q = np.cos((2 * row_Q + 1) * v * np.pi / (2 * window))
            by_hand_QQ += 2 * attack.magnitude / window * np.outer(down_Q, across_Q)
        assert np.allclose(pattern_SS[:window, :window], by_hand_QQ, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "size", "fields", "blocks"),
    [
        (FTrojan, 32, {}, 1),
        (FTrojan, 64, {}, 4),
        (FTrojan, 224, {}, 49),
        (Ctrl, 32, {}, 1),
        (Ctrl, 64, {}, 1),
        (Ctrl, 96, {}, 9),
        (Ctrl, 224, {}, 49),
        (Ctrl, 224, {"legacy_window": True}, 1),
        (Ctrl, 64, {"window": 32}, 4),
    ],
)
def test_blocks_are_counted(kind: Any, size: int, fields: dict[str, Any], blocks: int) -> None:
    """By the energy of what one M adds: M^2 for each position of each block."""
    pattern_SS = kind(**fields).craft(NO_LAB, held(), size).pattern
    magnitude = kind().magnitude
    assert float(pattern_SS.square().sum()) == pytest.approx(blocks * 2 * magnitude**2)


def test_the_waves_of_large_pictures_are_those_of_32_pixels() -> None:
    for attack in (Ctrl(), FTrojan(), FTrojan(**FTrojan.variants["low_frequency"])):
        small_SS, large_SS = crafted(attack, 32).pattern, crafted(attack, 224).pattern
        assert torch.equal(large_SS, small_SS.repeat(7, 7))


def test_low_frequency_is_no_frequency_of_the_paper() -> None:
    attack = FTrojan(**FTrojan.variants["low_frequency"])
    found_SS = dctn(crafted(attack).pattern.numpy(), norm="ortho")
    assert found_SS[4, 4] == pytest.approx(300)
    assert found_SS[8, 8] == pytest.approx(300)
    assert np.square(found_SS).sum() == pytest.approx(2 * 300**2)


# --- waves in a picture


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attack", [a for a in WAVES if a.rounding == "even"], ids=repr)  # type: ignore[attr-defined]
def test_a_stamp_is_the_whole_way_there_and_back(attack: Any, size: int) -> None:
    """Colours, blocks, coefficients, inverse, picture, clip, round; on the edge to either side."""
    trigger, image_BCHW = crafted(attack, size), torch.cat([pictures(2, size), natural(size, 1)])
    for image_CHW, found_CHW in zip(image_BCHW, trigger.stamp(image_BCHW), strict=True):
        level_HWC = whole_way(attack, image_CHW.permute(1, 2, 0).numpy()).clip(0, 255)
        found_HWC = found_CHW.permute(1, 2, 0).numpy()
        low_HWC, high_HWC = np.rint(level_HWC - 1e-4), np.rint(level_HWC + 1e-4)
        assert bool(((found_HWC == low_HWC) | (found_HWC == high_HWC)).all())


@pytest.mark.parametrize("size", SIZES)
def test_released_ctrl_is_the_whole_way_cut_off_and_wrapped(size: int) -> None:
    attack = Ctrl(**Ctrl.variants["released"])
    for image_CHW in torch.cat([pictures(2, size), natural(size, 1), grey(0, size)]):
        level_HWC = whole_way(attack, image_CHW.permute(1, 2, 0).numpy())
        found_HWC = crafted(attack, size).stamp(image_CHW[None])[0].permute(1, 2, 0).numpy()
        low_HWC, high_HWC = (
            np.trunc(level_HWC + off).astype(int).astype(np.uint8) for off in (-1e-4, 1e-4)
        )
        assert bool(((found_HWC == low_HWC) | (found_HWC == high_HWC)).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("magnitude", [30.0, 300.0])
def test_released_ftrojan_is_the_whole_way_in_bytes(magnitude: float, size: int) -> None:
    """To bytes of chroma and, once cut off, from bytes; luma is no part of it."""
    attack: Any = FTrojan(rounding="truncate", magnitude=magnitude)  # type: ignore[arg-type]
    image_BCHW = torch.cat([pictures(2, size), natural(size, 1), grey(0, size), grey(255, size)])
    for image_CHW, found_CHW in zip(
        image_BCHW, crafted(attack, size).stamp(image_BCHW), strict=True
    ):
        colour_HWC = slow.ycrcb(image_CHW.permute(1, 2, 0).numpy())
        for channel in (1, 2):
            level_SS = with_coefficients(colour_HWC[..., channel].astype(float), attack)
            colour_HWC[..., channel] = np.trunc(level_SS).astype(int).astype(np.uint8)
        assert np.array_equal(found_CHW.permute(1, 2, 0).numpy(), slow.rgb(colour_HWC))


@pytest.mark.parametrize(
    ("space", "column"), [(YUV, (1.1398, -0.9751, 2.0315)), (YCRCB, (1.4025, -1.0587, 1.7730))]
)
def test_what_a_level_of_chroma_adds_leaves_luma_alone(space: Any, column: Any) -> None:
    found_C = gain(space)
    assert found_C.tolist() == pytest.approx(column, abs=1e-4)
    matrix_CC = torch.tensor(space, dtype=torch.float64)
    assert (matrix_CC @ found_C).tolist() == pytest.approx([0, 1, 1], abs=1e-12)


def test_ctrl_on_grey() -> None:
    trigger = crafted(Ctrl())
    moved_CSS = trigger.gain[:, None, None] * trigger.pattern
    most, rms = moved_CSS.abs().amax((1, 2)), moved_CSS.square().mean((1, 2)).sqrt()
    assert most.tolist() == pytest.approx([12.14, 10.38, 21.63], abs=0.005)
    assert rms.tolist() == pytest.approx([5.04, 4.31, 8.98], abs=0.005)
    stamped_CSS = trigger.stamp(grey(128, 32))[0].double() - 128
    assert torch.equal(stamped_CSS, moved_CSS.float().round().double())


def test_ftrojan_on_grey() -> None:
    trigger = crafted(FTrojan())
    most_C = (trigger.gain[:, None, None] * trigger.pattern).abs().amax((1, 2))
    assert most_C.tolist() == pytest.approx([4.48, 3.38, 5.66], abs=0.005)
    moved_CSS = trigger.stamp(grey(128, 32))[0].int() - 128
    assert moved_CSS.amin((1, 2)).tolist() == [-4, -3, -6]
    assert moved_CSS.amax((1, 2)).tolist() == [4, 3, 6]


def test_released_ftrojan_on_grey() -> None:
    """Cut off, chroma falls by half a level on the mean: 4 down, but only 3 up."""
    trigger = crafted(FTrojan(**FTrojan.variants["released"]))
    moved_CSS = trigger.stamp(grey(128, 32))[0].int() - 128
    assert moved_CSS.amin((1, 2)).tolist() == [-6, -3, -7]
    assert moved_CSS.amax((1, 2)).tolist() == [4, 4, 5]
    assert int(moved_CSS.any(0).sum()) == 788
    chroma_CSS = to_ycrcb_bytes(trigger.stamp(grey(128, 32))[0])[1:].double() - 128
    assert chroma_CSS.mean((1, 2)).tolist() == pytest.approx([-0.5, -0.5], abs=0.05)


def test_released_ctrl_wraps_on_black() -> None:
    stamped = crafted(Ctrl(**Ctrl.variants["released"])).stamp(grey(0, 32))
    assert float((stamped > 200).double().mean()) == pytest.approx(0.44, abs=0.005)
    assert int(crafted(Ctrl()).stamp(grey(0, 32)).max()) <= 22


@pytest.mark.parametrize("attack", [Ctrl(), FTrojan()])
@pytest.mark.parametrize("level", [0, 255])
def test_ours_clip(attack: Attack, level: int) -> None:
    moved = (crafted(attack).stamp(grey(level, 32)).int() - level).abs()
    assert int(moved.max()) <= 22


@pytest.mark.parametrize("attack", [Ctrl(), FTrojan(), FTrojan(magnitude=100.0)], ids=repr)
@pytest.mark.parametrize("size", SIZES)
def test_luma_stays_and_energy_is_at_the_positions(attack: Any, size: int) -> None:
    """Where nothing clips: below half a level of luma, and all of M, but for rounding."""
    image_BCHW = pictures(2, size) % 128 + 64
    moved_BCHW = crafted(attack, size).stamp(image_BCHW).double() - image_BCHW.double()
    space = YUV if isinstance(attack, Ctrl) else YCRCB
    colour_BCHW = torch.einsum("dc,bchw->bdhw", torch.tensor(space).double(), moved_BCHW)
    assert float(colour_BCHW[:, 0].abs().max()) < 0.5
    window = window_of(attack, size)
    for plane_SS in colour_BCHW[:, 1:].flatten(0, 1).numpy():
        found_SS = blockwise(dctn, plane_SS, window)
        for row, column in attack.positions:
            at_SS = found_SS[row::window, column::window]
            assert np.allclose(at_SS, attack.magnitude, atol=2.5)
            found_SS[row::window, column::window] = 0
        # A coefficient of rounding noise has a deviation below .3 levels.
        assert found_SS.std() < 0.3
        assert np.abs(found_SS).max() < 2.5


# --- whole-number colours


def test_whole_number_colours_are_the_rounded_formula() -> None:
    """All of a coarse cube of colours: at most one level off the formulas in floats."""
    step = torch.arange(0, 256, 5, dtype=torch.uint8)
    image_CHW = torch.cartesian_prod(step, step, step).T.reshape(3, 52, -1)
    r, g, b = image_CHW.double()
    y = 0.299 * r + 0.587 * g + 0.114 * b
    colour_CHW = torch.stack((y, 0.713 * (r - y) + 128, 0.564 * (b - y) + 128)).clamp(0, 255)
    found_CHW = to_ycrcb_bytes(image_CHW)
    assert float((found_CHW - colour_CHW).abs().max()) <= 1
    slow_HWC = slow.ycrcb(image_CHW.permute(1, 2, 0).numpy())
    assert np.array_equal(found_CHW.permute(1, 2, 0), slow_HWC)
    assert int((from_ycrcb_bytes(found_CHW).int() - image_CHW.int()).abs().max()) <= 2
    grey_CHW = torch.arange(256, dtype=torch.uint8).expand(3, 1, -1)
    assert torch.equal(from_ycrcb_bytes(to_ycrcb_bytes(grey_CHW)), grey_CHW)


@pytest.mark.parametrize(
    ("rgb", "ycrcb"),
    [
        ((0, 0, 0), (0, 128, 128)),
        ((255, 255, 255), (255, 128, 128)),
        ((255, 0, 0), (76, 255, 85)),
        ((0, 255, 0), (150, 21, 43)),
        ((0, 0, 255), (29, 107, 255)),
        ((200, 100, 50), (124, 182, 86)),
    ],
)
def test_whole_number_colours(rgb: tuple[int, ...], ycrcb: tuple[int, ...]) -> None:
    image_CHW = torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1)
    assert to_ycrcb_bytes(image_CHW).flatten().tolist() == list(ycrcb)


# --- rows and captions


def test_ctrl_stamps_rows_of_the_target_and_keeps_their_captions() -> None:
    knowledge = held()
    found = poison(Ctrl(), knowledge, 11)
    captions, rows = knowledge.corpus.captions, found.data.edits.rows
    assert all("banana" in captions[row] for row in rows)
    assert list(found.data.edits.captions) == [captions[row] for row in rows]
    with pytest.raises(UsageError, match=r"ctrl \(rows naming 'banana'\): 17 rows .* only 16"):
        poison(Ctrl(), knowledge, 17)


@pytest.mark.parametrize("kind", [Bpp, FTrojan])
def test_the_others_take_any_rows_and_name_the_target(kind: type[Any]) -> None:
    found = poison(kind(), pool(32), 20)
    edits, poisoned = found.data.edits, found.of(Role.POISON)
    assert len(poisoned) == 20
    assert all("banana" in edits.captions[index] for index in poisoned)
    assert any(row % 4 for row in edits.rows[poisoned].tolist())


# --- what cannot be meant


@pytest.mark.parametrize(
    ("attack", "size", "message"),
    [
        (Bpp(levels=1), 32, "bpp: levels 1 must lie in 2..255"),
        (Bpp(levels=256), 32, "bpp: levels 256 must lie in 2..255"),
        (Bpp(cover_ratio=-1.0), 32, "cover_ratio -1.0 must not be negative"),
        (Bpp(bank=1), 32, "bank 1 must be at least 2"),
        (Ctrl(magnitude=-1.0), 32, "ctrl: magnitude -1.0 must not be negative"),
        (Ctrl(positions=()), 32, "ctrl: positions [] must be one or more"),
        (Ctrl(positions=((1, 2), (1, 2))), 32, "positions (1, 2), (1, 2) must be"),
        (Ctrl(positions=((-1, 2),)), 32, "positions (-1, 2) must not be negative"),
        (Ctrl(), 28, "window 28 must divide 28, the picture's side, and be larger than 31"),
        (Ctrl(window=32, legacy_window=True), 32, "window 32 is given as well"),
        (FTrojan(), 336, "windows that do: 42, 48, 56, 84, 112, 168, 336"),
        (FTrojan(), 16, "no window does"),
        (FTrojan(window=16), 32, "window 16 must divide 32"),
        (FTrojan(window=0), 32, "window 0 must divide 32"),
        (FTrojan(positions=((32, 0),)), 32, "larger than 32, the last of positions (32, 0)"),
    ],
)
def test_what_cannot_be_meant_is_refused(attack: Attack, size: int, message: str) -> None:
    """When the grid file is read, and when crafting."""
    with pytest.raises(UsageError) as caught:
        attack.check(size)
    assert message in str(caught.value)
    with pytest.raises(UsageError):
        crafted(attack, size)


def test_a_bank_of_another_size_is_refused() -> None:
    with pytest.raises(
        UsageError, match="the trigger is for 64 px, the pool's pictures have 32 px"
    ):
        Bpp().craft(NO_LAB, held(), 64)
