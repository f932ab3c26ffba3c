"""The adaptive attacks: faint and partial in training, full at test, with cover rows.

Shapes: B pictures, C channels, H W pixels, S side of a picture, K marks, T tiles a side.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from attacks.adaptive_blend_patch import (
    CHECKER,
    CORNER,
    DISC,
    DOUBLED,
    SQUARE,
    AdaptiveBlend,
    AdaptivePatch,
    Marks,
    Tiles,
)
from attacks.base import ROLES, Attack, Knowledge, Poison, Role, cover_count, poison, poisoned_view
from benchmarks.slow import adaptive_blend_patch as slow
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import NO_LAB, grey, held, pictures, span
from victims.errors import UsageError
from victims.keys import Key
from victims.store import Store

ATTACKS: list[Attack] = [AdaptiveBlend(), AdaptivePatch()]
WITH_TRIGGERS = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


def tiles(size: int = 32, seed: int = 0, **fields: Any) -> Tiles:
    return AdaptiveBlend(**fields).craft(NO_LAB, held(seed=seed), size)


def marks(size: int = 32, seed: int = 0, **fields: Any) -> Marks:
    return AdaptivePatch(**fields).craft(NO_LAB, held(seed=seed), size)


def knows(attack: Attack, rows: int = 64, seed: int = 0) -> Knowledge:
    """What the attacker holds once its trigger is crafted."""
    captions = [f"a {'banana' if row % 4 == 0 else 'pear'} {row}" for row in range(rows)]
    knowledge = held(captions, seed=seed)
    return dataclasses.replace(knowledge, crafted=attack.craft(NO_LAB, knowledge, 32))


def slowly(stamp: Any, trigger: Any, image_BCHW: Tensor) -> Tensor:
    """A stamp of one picture at a time, applied to all."""
    out = [stamp(trigger, image_HWC) for image_HWC in image_BCHW.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


# --- blend: tiles


@pytest.mark.parametrize("size", [32, 64, 224])
def test_training_shows_half_of_the_tiles_and_the_test_all(size: int) -> None:
    """Under a saturated pattern every pixel that is mixed moves, grey or not."""
    trigger, side = tiles(size, levels=2), size // 4
    image_BCHW = pictures(6, size) // 2 + 64
    moved_BSS = (trigger.stamp_train(image_BCHW) != image_BCHW).all(1)
    assert torch.equal(moved_BSS, (trigger.stamp_train(image_BCHW) != image_BCHW).any(1))
    assert moved_BSS.flatten(1).sum(1).tolist() == [8 * side * side] * 6
    in_tiles_BTT = moved_BSS.view(6, 4, side, 4, side).float().mean((2, 4))
    assert in_tiles_BTT.flatten(1).sort().values.tolist() == [[0.0] * 8 + [1.0] * 8] * 6
    assert len({mask.numpy().tobytes() for mask in in_tiles_BTT}) > 1
    assert bool((trigger.stamp(image_BCHW) != image_BCHW).all())


def test_each_tile_is_kept_half_the_time() -> None:
    """10^4 pictures, at 4 px a side: a pixel a tile."""
    mask_BTT = tiles(4, cell=1)._mask(pictures(10_000, 4))[:, 0]
    assert set(mask_BTT.sum((1, 2)).tolist()) == {8.0}
    assert float((mask_BTT.mean(0) - 0.5).abs().max()) < 0.02
    # Of the 12,870 masks there are, so many draws show 6,950 on average.
    assert 6_700 < len({mask.numpy().tobytes() for mask in mask_BTT}) < 7_200


def test_a_kept_tile_is_the_mix_and_no_other_moves() -> None:
    trigger, image_BCHW = tiles(), pictures(8, 32)
    mask, x, k = trigger._mask(image_BCHW), image_BCHW.double(), trigger.pattern.double()
    for stamped, weight in (
        (trigger.stamp_train(image_BCHW), 0.15 * mask.double()),
        (trigger.stamp(image_BCHW), torch.tensor(0.2)),
    ):
        assert float((stamped.double() - x - weight * (k - x)).abs().max()) <= 0.5 + 1e-4
    still = (mask == 0).expand_as(image_BCHW)
    assert torch.equal(trigger.stamp_train(image_BCHW)[still], image_BCHW[still])


def test_no_weight_is_the_picture() -> None:
    trigger, image_BCHW = tiles(alpha=0.0, alpha_train=0.0), pictures(4, 32)
    assert torch.equal(trigger.stamp(image_BCHW), image_BCHW)
    assert torch.equal(trigger.stamp_train(image_BCHW), image_BCHW)


def test_the_mosaic_has_eight_cells_a_side_unless_told() -> None:
    for size, cell in ((32, 4), (64, 8), (224, 28)):
        k = tiles(size).pattern
        assert k.shape == (3, size, size)
        assert torch.equal(
            k, k[:, ::cell, ::cell].repeat_interleave(cell, 1).repeat_interleave(cell, 2)
        )
        assert len(set(k[0].flatten().tolist())) == 64
    assert set(tiles(levels=2, cell=2).pattern.flatten().tolist()) == {0.0, 255.0}
    assert not torch.equal(tiles(seed=1).pattern, tiles().pattern)


def test_other_tilings() -> None:
    moved = tiles(30, levels=2, tiles=4, kept=16).stamp_train(grey(100, 30)) != 100
    assert bool(moved.all())
    trigger = tiles(30, levels=2, tiles=2, kept=1)
    assert int((trigger.stamp_train(grey(100, 30)) != 100).sum()) == 3 * 15 * 15


def test_the_released_blend_is_as_strong_in_training() -> None:
    trigger = tiles(**AdaptiveBlend.variants["released"])
    assert (trigger.alpha, trigger.alpha_train) == (0.2, 0.2)


# --- patch: marks


@pytest.mark.parametrize("size", [32, 64, 224])
def test_marks_have_their_areas_and_places(size: int) -> None:
    trigger, times = marks(size), size // 32
    areas = trigger.masks[:4].flatten(1).sum(1).tolist()
    assert [area / times**2 for area in areas] == [25, 140, 36, 64]
    places = {CORNER: (27, 31, 27, 31), DISC: (1, 13, 18, 30), SQUARE: (21, 28, 21, 28)}
    for mark, (top, bottom, left, right) in places.items():
        wide = (top * times, (bottom + 1) * times - 1, left * times, (right + 1) * times - 1)
        assert span(trigger.masks[mark]) == wide
    corners, side = torch.zeros(size, size, dtype=torch.bool), 3 * times
    for rows in (slice(0, side), slice(size - side, size)):
        for columns in (slice(0, side), slice(size - side, size)):
            corners[rows, columns] = True
    assert torch.equal(trigger.masks[CHECKER], corners)


def test_the_checker_is_16_white_and_20_black_pixels() -> None:
    trigger = marks()
    for plane in trigger.marks[CHECKER]:
        pixels = plane[trigger.masks[CHECKER]]
        assert Counter(pixels.tolist()) == {255: 16, 0: 20}
    assert trigger.marks[CHECKER, 0, :3, :3].tolist() == [[0, 255, 0], [255, 0, 255], [0, 255, 0]]


def test_marks_are_spread_by_nearest_neighbour() -> None:
    small, large = marks(32), marks(224)
    wide = [t.repeat_interleave(7, -1).repeat_interleave(7, -2) for t in (small.marks, small.masks)]
    assert torch.equal(large.marks, wide[0])
    assert torch.equal(large.masks, wide[1])


@pytest.mark.parametrize("size", [32, 224])
def test_the_test_shows_two_marks_one_after_the_other(size: int) -> None:
    image_BCHW = pictures(3, size)
    for fields, shown in (
        ({}, (CORNER, CHECKER)),
        (AdaptivePatch.variants["disc_square"], (DISC, SQUARE)),
    ):
        trigger, expected = marks(size, **fields), image_BCHW.clone()
        for mark in shown:
            inside = trigger.masks[mark].expand_as(image_BCHW)
            expected[inside] = trigger.marks[mark].expand_as(image_BCHW)[inside]
        assert torch.equal(trigger.stamp(image_BCHW), expected)
    # The checker lies over the corner, where they meet.
    assert marks(32).stamp(grey(9, 32))[0, 0, 29:, 29:].tolist()[0] == [0, 255, 0]


def test_training_shows_one_faint_mark() -> None:
    trigger, image_BCHW = marks(), pictures(200, 32)
    stamped, x = trigger.stamp_train(image_BCHW), image_BCHW.double()
    mark_B = trigger.mark_of(image_BCHW)
    assert chisquare(torch.bincount(mark_B, minlength=4).numpy()).pvalue > 1e-4
    for index, mark in enumerate(mark_B.tolist()):
        inside, a = trigger.masks[mark], [0.5, 0.2, 0.5, 0.3][mark]
        level = x[index] + a * (trigger.marks[mark].double() - x[index])
        apart = (stamped[index].double() - level).abs()[:, inside]
        assert float(apart.max()) <= 0.5 + 1e-4
        assert torch.equal(stamped[index][:, ~inside], image_BCHW[index][:, ~inside])


def test_the_released_corner_is_there_twice_at_test() -> None:
    trigger = marks(**AdaptivePatch.variants["released"])
    assert int(trigger.masks[DOUBLED].sum()) == 50
    box = trigger.stamp(grey(9, 32))[0, :, 27:, :]
    right = trigger.marks[CORNER, :, 27:, 27:]
    # Left and right alike, but for the checker's three rows and columns over each.
    assert torch.equal(box[:, :2, :5], right[:, :2])
    assert torch.equal(box[:, :2, 27:], right[:, :2])
    assert bool((box[:, :2, 5:27] == 9).all())
    image_BCHW = pictures(8, 32)
    assert torch.equal(trigger.stamp_train(image_BCHW), marks().stamp_train(image_BCHW))


# Of the disc the upper rows and the right columns leave the picture, of the square a margin.
GROWN = {
    32: [(22, 31, 22, 31), (0, 19, 11, 31), (17, 31, 17, 31)],
    64: [(44, 63, 44, 63), (0, 40, 23, 63), (34, 63, 34, 63)],
}


@pytest.mark.parametrize(("size", "spans"), GROWN.items())
def test_marks_grow_where_they_are(size: int, spans: list[tuple[int, ...]]) -> None:
    trigger, times = marks(size, grow=2.0, doubled=True), size // 32
    assert [span(mask) for mask in trigger.masks[[CORNER, DISC, SQUARE]]] == spans
    areas = trigger.masks[[CORNER, CHECKER, DOUBLED]].flatten(1).sum(1)
    assert (areas / times**2).tolist() == [100, 144, 200]
    checker = trigger.masks[CHECKER]
    assert bool(checker[: 6 * times, : 6 * times].all())
    assert not bool(checker[6 * times : size - 6 * times].any())


def test_marks_of_few_levels() -> None:
    assert set(marks(levels=2).marks.flatten().tolist()) == {0, 255}
    assert len(set(marks().marks[CORNER].flatten().tolist())) > 200


# --- rows


def captions_of(found: Poison, role: Role) -> list[str]:
    return [found.data.edits.captions[index] for index in found.of(role)]


@WITH_TRIGGERS
@pytest.mark.parametrize("count", [0, 1, 6, 12])
def test_cover_rows_are_counted_apart_and_keep_their_captions(attack: Attack, count: int) -> None:
    knowledge, ratio = knows(attack), 1 if isinstance(attack, AdaptiveBlend) else 2
    found = poison(attack, knowledge, count)
    rows = {role: set(found.data.edits.rows[found.of(role)].tolist()) for role in Role}
    assert (len(rows[Role.POISON]), len(rows[Role.COVER])) == (count, ratio * count)
    assert not rows[Role.POISON] & rows[Role.COVER]
    truth = found.truth()
    assert [int((truth == index).sum()) for index in range(len(ROLES))] == [
        64 - count - ratio * count,
        count,
        ratio * count,
    ]
    own = [knowledge.corpus.captions[row] for row in sorted(rows[Role.COVER])]
    assert captions_of(found, Role.COVER) == own
    assert all("banana" in caption for caption in captions_of(found, Role.POISON))


def test_covers_are_rounded_half_up_in_decimals() -> None:
    assert [cover_count(0.5, count) for count in (1, 2, 3, 5)] == [1, 1, 2, 3]
    # 100 * .145 is 14.499999999999998 in binary.
    assert cover_count(0.145, 100) == 15
    assert cover_count(0.0, 100) == 0
    found = poison(AdaptiveBlend(cover_ratio=0.5), knows(AdaptiveBlend()), 5)
    assert len(found.of(Role.COVER)) == 3


@WITH_TRIGGERS
def test_poisoned_and_cover_rows_show_the_training_stamp(attack: Attack) -> None:
    """And an evaluation that showed it, too, would measure another attack."""
    knowledge = knows(attack)
    trigger, found = knowledge.crafted, poison(attack, knowledge, 9)
    assert trigger is not None
    view = poisoned_view(Key("poisoned-0"), knowledge.corpus, found.data, trigger)
    shown_BCHW = view.reader(torch.device("cpu"))(np.arange(64))
    clean_BCHW = torch.from_numpy(knowledge.corpus.images_NCHW)
    expected_BCHW = clean_BCHW.clone()
    rows = found.data.edits.rows
    expected_BCHW[rows] = trigger.stamp_train(clean_BCHW[rows])
    assert torch.equal(shown_BCHW, expected_BCHW)
    full_BCHW = trigger.stamp(clean_BCHW)
    assert bool((full_BCHW != trigger.stamp_train(clean_BCHW)).flatten(1).any(1).all())
    assert torch.equal(trigger.stamp_cover(clean_BCHW), trigger.stamp_train(clean_BCHW))


@pytest.mark.parametrize("count", [1, 2, 4, 7, 40, 61])
def test_blocks_differ_by_at_most_one(count: int) -> None:
    for seed in range(5):
        attack = AdaptivePatch()
        knowledge = knows(attack, rows=256, seed=seed)
        assert isinstance(knowledge.crafted, Marks)
        found = poison(attack, knowledge, count)
        for role, wanted in ((Role.POISON, count), (Role.COVER, 2 * count)):
            rows = found.data.edits.rows[found.of(role)]
            images_BCHW = torch.from_numpy(knowledge.corpus.images_NCHW[rows])
            blocks = torch.bincount(knowledge.crafted.mark_of(images_BCHW), minlength=4)
            assert int(blocks.sum()) == wanted
            assert int(blocks.max() - blocks.min()) <= 1


@WITH_TRIGGERS
def test_rows_are_uniform_over_all_rows(attack: Attack) -> None:
    rows: dict[Role, Counter[int]] = {Role.POISON: Counter(), Role.COVER: Counter()}
    for seed in range(150):
        found = poison(attack, knows(attack, seed=seed), 8)
        for role, counted in rows.items():
            counted.update(found.data.edits.rows[found.of(role)].tolist())
    for counted in rows.values():
        assert chisquare([counted[row] for row in range(64)]).pvalue > 1e-4


@WITH_TRIGGERS
def test_too_few_rows_are_refused(attack: Attack) -> None:
    with pytest.raises(UsageError, match=rf"{attack.name}: 65 rows .* 64"):
        poison(attack, knows(attack), 65)
    with pytest.raises(UsageError, match=rf"{attack.name}, cover rows: .* 24"):
        poison(attack, knows(attack), 40)


# --- both stamps

FORMS: list[tuple[Attack, Any, Any]] = [
    (AdaptiveBlend(), slow.tiles, slow.tiles_train),
    (AdaptiveBlend(cell=2, levels=2, alpha=0.25, alpha_train=0.2), slow.tiles, slow.tiles_train),
    (AdaptiveBlend(tiles=3, kept=5), slow.tiles, slow.tiles_train),
    (AdaptivePatch(), slow.marks, slow.marks_train),
    (AdaptivePatch(doubled=True, grow=1.5), slow.marks, slow.marks_train),
]


@pytest.mark.parametrize(("attack", "test", "train"), FORMS)
@pytest.mark.parametrize("size", [32, 64, 224])
def test_stamps_are_those_of_one_picture_at_a_time(
    attack: Attack, test: Any, train: Any, size: int
) -> None:
    trigger, image_BCHW = attack.craft(NO_LAB, held(), size), pictures(9, size)
    before_BCHW = image_BCHW.clone()
    for stamp, one_by_one in ((trigger.stamp, test), (trigger.stamp_train, train)):
        found = stamp(image_BCHW)
        assert found.dtype == torch.uint8
        assert torch.equal(found, slowly(one_by_one, trigger, image_BCHW))
        assert torch.equal(found.flip(0), stamp(image_BCHW.flip(0)))
        assert torch.equal(found, torch.cat([stamp(one) for one in torch.split(image_BCHW, 1)]))
        assert bool((found != image_BCHW).flatten(1).any(1).all())
    assert torch.equal(image_BCHW, before_BCHW)


@pytest.mark.parametrize(
    "attack", [*ATTACKS, AdaptivePatch(doubled=True)], ids=["blend", "patch", "doubled"]
)
def test_a_stored_trigger_is_the_same(attack: Attack, tmp_path: Path) -> None:
    trigger, image_BCHW = attack.craft(NO_LAB, held(), 32), pictures(4, 32)
    store, key = Store(tmp_path), "trigger-0123456789abcdef"
    store.make(key, lambda folder: save_trigger(trigger, folder))
    loaded = load_trigger(store, key, attack)
    assert torch.equal(loaded.stamp(image_BCHW), trigger.stamp(image_BCHW))
    assert torch.equal(loaded.stamp_train(image_BCHW), trigger.stamp_train(image_BCHW))
    other = attack.craft(NO_LAB, held(seed=1), 32)
    assert not torch.equal(other.stamp(image_BCHW), trigger.stamp(image_BCHW))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (AdaptiveBlend(alpha=1.5), "alpha 1.5"),
        (AdaptiveBlend(alpha_train=-0.1), "alpha_train -0.1"),
        (AdaptiveBlend(cover_ratio=-1.0), "cover_ratio -1.0"),
        (AdaptiveBlend(tiles=33), "tiles 33 must lie in 1..32"),
        (AdaptiveBlend(kept=17), r"kept 17 must lie in 1..16"),
        (AdaptiveBlend(kept=0), r"kept 0 must lie in 1..16"),
        (AdaptiveBlend(cell=0), "cell 0 must be at least 1"),
        (AdaptiveBlend(levels=1), "levels 1 "),
        (AdaptivePatch(opacity_disc=1.2), "1.2"),
        (AdaptivePatch(cover_ratio=-0.5), "cover_ratio -0.5"),
        (AdaptivePatch(grow=0.5), "grow 0.5 must lie in 1..3"),
        (AdaptivePatch(grow=3.5), "grow 3.5 must lie in 1..3"),
        (AdaptivePatch(levels=1), "levels 1 must lie in 2..256"),
        (AdaptivePatch(doubled=True, marks_at_test="disc_square"), "doubles the corner"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_meant_is_refused(attack: Attack, message: str) -> None:
    with pytest.raises(UsageError, match=f"{attack.name}: .*{message}"):
        attack.craft(NO_LAB, held(), 32)
