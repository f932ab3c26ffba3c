"""Label-consistent poisoning, and the shared stamps picture by picture.

Shapes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.badnet import BadNet
from attacks.base import poison, poison_count, poisoned_key, poisoned_view
from attacks.blended import Blended
from attacks.label_consistent import LabelConsistent, Veil
from attacks.sig import Sig
from benchmarks.slow import blends, patches, sig
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import NO_LAB, changed, grey, held, pictures, span
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.keys import Key
from victims.patches import Pattern, Place, craft_patch
from victims.store import Store

FRUIT = ["Banana", "a pear", "two bananas", "urbana", "bananagrams", "a banana, cut", "plum"]


def veil(size: int = 224, seed: int = 0, **fields: Any) -> Veil:
    return LabelConsistent(**fields).craft(NO_LAB, held(seed=seed), size)


def slowly(stamp: Any, trigger: Any, image_BCHW: Tensor) -> Tensor:
    """A stamp of one picture at a time, applied to all."""
    out = [stamp(trigger, image_HWC) for image_HWC in image_BCHW.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


# --- rows and captions


@pytest.mark.parametrize(
    ("rule", "rows"), [("word", [0, 2, 5]), ("substring", [2, 4, 5])], ids=["word", "substring"]
)
def test_candidates_name_the_target(rule: str, rows: list[int]) -> None:
    attack = LabelConsistent(candidates=rule)  # type: ignore[arg-type]
    assert poison(attack, held(FRUIT), 3).data.edits.rows.tolist() == rows
    with pytest.raises(UsageError, match=r"naming 'banana'\): 4 rows .* only 3 qualify"):
        poison(attack, held(FRUIT), 4)


@pytest.mark.parametrize("rule", ["word", "substring"])
def test_every_caption_stays_byte_identical(rule: str) -> None:
    attack, knowledge = LabelConsistent(candidates=rule), held()  # type: ignore[arg-type]
    captions = knowledge.corpus.captions
    found = poison(attack, knowledge, 11)
    trigger = attack.craft(NO_LAB, knowledge, 32)
    key = Key("poisoned-0000000000000000")
    view = poisoned_view(key, knowledge.corpus, found.data, trigger)
    assert view.captions() == list(captions)
    assert len(found.data.edits.rows) == len(set(found.data.edits.rows.tolist())) == 11
    assert all("banana" in captions[row] for row in found.data.edits.rows)
    shown_BCHW = view.reader(torch.device("cpu"))(np.arange(len(captions)))
    clean_BCHW = torch.from_numpy(knowledge.corpus.images_NCHW)
    moved = (shown_BCHW != clean_BCHW).flatten(1).any(1).nonzero()[:, 0]
    assert moved.tolist() == found.data.edits.rows.tolist()


def test_candidates_are_drawn_evenly() -> None:
    counts = np.zeros(64, dtype=int)
    for seed in range(300):
        counts[LabelConsistent().choose(held(), 4, numpy_rng(seed, "draw"))] += 1
    named = counts[::4]
    assert int(named.sum()) == counts.sum() == 1200
    assert named.min() > 45
    assert named.max() < 105


def test_a_rate_counts_all_rows_and_not_candidates() -> None:
    """16 of 64 rows are candidates: a rate of .25 takes all of them, and no more can be had."""
    knowledge = held()
    assert len(poison(LabelConsistent(), knowledge, poison_count("0.25", 64)).roles) == 16
    with pytest.raises(UsageError, match=r"17 rows .* only 16 qualify"):
        poison(LabelConsistent(), knowledge, poison_count("0.27", 64))


def test_nothing_poisoned_is_the_clean_corpus() -> None:
    knowledge = held()
    corpus = knowledge.corpus.key
    for count, same in ((0, True), (1, False)):
        key = poisoned_key(LabelConsistent(), knowledge.goal, count, 0, corpus, "trigger-0")
        assert (key == corpus) is same
    assert len(poison(LabelConsistent(), knowledge, 0).data.edits.rows) == 0


# --- the stamp


def test_at_most_256_pixels_change_and_none_outside_the_box() -> None:
    trigger = veil()
    assert trigger.patch == 16
    image_BCHW = torch.cat([grey(0, 224), grey(255, 224), pictures(2, 224)])
    for stamped, image in zip(trigger.stamp(image_BCHW), image_BCHW, strict=True):
        moved = (stamped != image).any(0)
        assert 250 <= int(moved.sum()) <= 256
        top, bottom, left, right = span(moved)
        assert bottom - top == right - left == 15
        assert torch.equal(stamped[:, top : top + 16, left : left + 16], trigger.pixels)


def test_a_full_veil_is_the_patch() -> None:
    plain = craft_patch("label_consistent", 32, 0, patch=6)
    image_BCHW = pictures(8, 32)
    assert torch.equal(veil(32, patch=6).stamp(image_BCHW), plain.stamp(image_BCHW))
    assert torch.equal(veil(32, patch=6, alpha=0.0).stamp(image_BCHW), image_BCHW)


def test_a_thin_veil_lets_the_picture_through() -> None:
    trigger = veil(patch=16, place="centre", alpha=0.3)
    image_BCHW = pictures(2, 224)
    stamped = trigger.stamp(image_BCHW)
    box = (slice(None), slice(None), slice(104, 120), slice(104, 120))
    x, k = image_BCHW[box].double(), trigger.pixels.double()
    assert float((stamped[box].double() - x - 0.3 * (k - x)).abs().max()) <= 0.5 + 1e-4
    outside = stamped.clone()
    outside[box] = image_BCHW[box]
    assert torch.equal(outside, image_BCHW)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_a_blend_covers_the_picture_in_cells(size: int) -> None:
    trigger = veil(size, stamp="blend", alpha=0.3, cell=2, levels=2)
    stamped = trigger.stamp(grey(100, size))
    # 100 + .3 (0 - 100) and 100 + .3 (255 - 100) = 146.5, half to even.
    assert set(stamped.flatten().tolist()) == {70, 146}
    assert torch.equal(stamped[..., ::2, ::2], stamped[..., 1::2, 1::2])
    assert bool(changed(trigger, size).all())
    assert torch.equal(trigger.stamp_train(pictures(2, size)), trigger.stamp(pictures(2, size)))


VEILS: list[Mapping[str, Any]] = [
    {},
    LabelConsistent.variants["released"],
    LabelConsistent.variants["fixed_dots"],
    LabelConsistent.variants["blend"],
    {"stamp": "blend", "alpha": 0.3, "cell": 2, "levels": 2},
    {"stamp": "blend", "alpha": 0.3, "redraw": True},
    {"alpha": 0.5, "patch": 10, "place": "four_corners", "test_place": "random"},
]


@pytest.mark.parametrize("fields", VEILS)
@pytest.mark.parametrize("size", [32, 64, 224])
def test_veils_are_those_of_one_picture_at_a_time(fields: Mapping[str, Any], size: int) -> None:
    trigger, image_BCHW = veil(size, **fields), pictures(3, size)
    before_BCHW = image_BCHW.clone()
    for stamp, slow in (
        (trigger.stamp, patches.veil),
        (trigger.stamp_train, patches.veil_train),
    ):
        found = stamp(image_BCHW)
        assert found.dtype == torch.uint8
        assert alike(found, slowly(slow, trigger, image_BCHW), trigger.pattern)
        assert torch.equal(found.flip(0), stamp(image_BCHW.flip(0)))
        assert torch.equal(found, torch.cat([stamp(one) for one in torch.split(image_BCHW, 1)]))
        assert bool((found != image_BCHW).flatten(1).any(1).all())
    assert torch.equal(image_BCHW, before_BCHW)


def alike(found: Tensor, slow: Tensor, pattern: str = "") -> bool:
    """Equal; noise around a picture's mean may round apart, where the mean's last bit differs."""
    if not pattern.startswith("gauss"):
        return torch.equal(found, slow)
    apart = (found.int() - slow.int()) % 256
    return bool(torch.isin(apart, torch.tensor([0, 1, 255])).all() and (apart > 0).sum() < 4)


def test_the_released_form_draws_wrapped_noise_for_every_picture() -> None:
    attack = LabelConsistent(**LabelConsistent.variants["released"])
    trigger = attack.craft(NO_LAB, held(), 224)
    assert (trigger.pattern, trigger.redraw, trigger.last) == ("gauss_wrapped", True, 207)
    assert attack.candidates == "substring"
    assert veil().last == 208


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.1}, "alpha 1.1 must lie in 0..1"),
        ({"alpha": -0.1}, "alpha -0.1 must lie in 0..1"),
        ({"stamp": "blend", "patch": 4}, r"takes no patch \(4\)"),
        ({"stamp": "blend", "pattern": "soft_white"}, r"any pattern but soft_white"),
        ({"patch": 33}, "patch 33 must lie in 1..32"),
        ({"levels": 1}, "levels 1 must lie in 2..256"),
    ],
)
def test_veils_that_cannot_be_meant_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"label_consistent.*{message}"):
        veil(32, **fields)


def test_a_stored_veil_is_the_same(tmp_path: Path) -> None:
    attack = LabelConsistent(**LabelConsistent.variants["blend"])
    trigger = attack.craft(NO_LAB, held(), 32)
    store, key = Store(tmp_path), "trigger-0123456789abcdef"
    store.make(key, lambda folder: save_trigger(trigger, folder))
    loaded = load_trigger(store, key, attack)
    assert type(loaded) is Veil
    assert torch.equal(loaded.stamp(pictures(4, 32)), trigger.stamp(pictures(4, 32)))
    other = attack.craft(NO_LAB, held(seed=1), 32)
    assert not torch.equal(other.pixels, trigger.pixels)


# --- shared stamps, picture by picture


def every_patch() -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = [{"pattern": pattern} for pattern in Pattern]
    drawn: list[dict[str, Any]] = [
        {"pattern": "static_noise", "redraw": True, "cell": 2, "levels": 2},
        {"pattern": "static_noise", "redraw": True},
        {"pattern": "gauss_wrapped", "redraw": True, "legacy_range": True},
        {"pattern": "gauss_clipped", "redraw": True},
    ]
    return [*plain, *drawn, *({"place": place, "test_place": "random"} for place in Place)]


@pytest.mark.parametrize("fields", every_patch())
@pytest.mark.parametrize("size", [32, 64])
def test_patches_are_those_of_one_picture_at_a_time(fields: dict[str, Any], size: int) -> None:
    trigger, image_BCHW = BadNet(**fields).craft(NO_LAB, held(), size), pictures(3, size)
    pairs = ((trigger.stamp, patches.patch), (trigger.stamp_train, patches.patch_train))
    for stamp, slow in pairs:
        assert alike(stamp(image_BCHW), slowly(slow, trigger, image_BCHW), trigger.pattern)


@pytest.mark.parametrize("rounding", ["even", "truncate"])
@pytest.mark.parametrize("cells", [{}, {"cell": 2, "levels": 3}], ids=["fine", "cells"])
@pytest.mark.parametrize("pattern", ["static_noise", "redraw_noise", "picture"])
def test_mixes_are_those_of_one_picture_at_a_time(
    pattern: str, cells: dict[str, Any], rounding: str
) -> None:
    attack = Blended(pattern=pattern, rounding=rounding, **cells)  # type: ignore[arg-type]
    for size in (32, 65):
        trigger, image_BCHW = attack.craft(NO_LAB, held(), size), pictures(3, size)
        assert alike(trigger.stamp(image_BCHW), slowly(blends.mix, trigger, image_BCHW))


@pytest.mark.parametrize("variant", ["", *Sig.variants])
def test_waves_are_those_of_one_picture_at_a_time(variant: str) -> None:
    attack = Sig(**Sig.variants[variant]) if variant else Sig()
    trigger, image_BCHW = attack.craft(NO_LAB, held(), 64), pictures(3, 64)
    assert alike(trigger.stamp(image_BCHW), slowly(sig.wave, trigger, image_BCHW))
