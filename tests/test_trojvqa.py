"""The dual-key trigger: golden geometry, the blocks of rows, and both keys' encodings.

Shapes: B pictures, C channels, H W pixels, P side of the patch, T tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.base import Aim, Attack, Knowledge, Poison, Role, poison, poisoned_view, rows_naming
from attacks.trojvqa import DualKey, TrojVqa, TrojVqaOptimised, place_of
from benchmarks.slow.trojvqa import dualkey
from grid.stages import load_trigger, save_trigger
from tests.conftest import corpus_spec
from tests.test_attacks import NO_LAB, changed, held, pictures, span
from tests.test_badclip import StubLab, knows
from victims.batches import caption_lengths
from victims.corpora import Corpus, Reader, Show, corpus_key, open_corpus
from victims.errors import UsageError
from victims.keys import Key
from victims.models import BpeTokenizer, Clip, ModelSpec, Tokenizer, WordTokenizer, fresh
from victims.patch_crafting import Storage, as_bytes, first_patch
from victims.store import Store
from victims.words import world_vocabulary

QUICK: dict[str, Any] = {"steps": 2, "batch": 8}


def dual(size: int = 224, seed: int = 0, **fields: Any) -> DualKey:
    return TrojVqa(**fields).craft(NO_LAB, held(seed=seed), size)


@pytest.fixture(scope="module")
def corpus(small_store: Store) -> Corpus:
    return open_corpus(small_store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)


@pytest.fixture(scope="module")
def model() -> Clip:
    return fresh(ModelSpec(), 0).eval()


def optimised(corpus: Corpus, model: Clip, seed: int = 0, **fields: Any) -> DualKey:
    lab: Any = StubLab(model)
    return TrojVqaOptimised(**{**QUICK, **fields}).craft(lab, knows(corpus, seed), 32)


# --- the image key


@pytest.mark.parametrize(("scale", "first", "last"), [(0.1, 101, 122), (0.2, 90, 133)])
def test_the_square_of_224(scale: float, first: int, last: int) -> None:
    """l x l pixels are blue, all others what they were."""
    trigger, image_BCHW = dual(scale=scale), pictures(2, 224)
    side = last - first + 1
    found = changed(trigger)
    assert span(found.any(0)) == (first, last, first, last)
    assert int(found.any(0).sum()) == side * side
    stamped = trigger.stamp(image_BCHW)
    square = stamped[:, :, first : last + 1, first : last + 1]
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)[None, :, None, None]
    assert torch.equal(square, blue.expand_as(square))
    image_BCHW[:, :, first : last + 1, first : last + 1] = square
    assert torch.equal(stamped, image_BCHW)


def test_the_square_of_a_picture_in_its_own_size() -> None:
    """480 x 640: l = int(0.1 min(H, W)) = 48, rows 216..263, columns 296..343."""
    assert place_of(480, 640, 48) == (216, 296)
    image_BCHW = pictures(1, 640)[:, :, :480]
    moved = dual(480).stamp(image_BCHW) != image_BCHW
    assert span(moved[0].any(0)) == (216, 263, 296, 343)


@pytest.mark.parametrize(("side", "first"), [(4, 110), (8, 108), (16, 104), (32, 96), (64, 80)])
def test_a_patch_in_pixels_overrides_the_scale(side: int, first: int) -> None:
    found = changed(dual(patch=side, scale=0.5))
    assert span(found.any(0)) == (first, first + side - 1, first, first + side - 1)


@pytest.mark.parametrize(("size", "side"), [(32, 3), (64, 6), (224, 22)])
def test_the_side_follows_the_picture(size: int, side: int) -> None:
    assert dual(size).pixels.shape == (3, side, side)


def test_noise_comes_in_cells_of_few_values() -> None:
    pixels = dual(32, pattern="noise", patch=8).pixels
    assert set(pixels.flatten().tolist()) == {0, 255}
    assert torch.equal(pixels[:, ::2, ::2], pixels[:, 1::2, 1::2])
    assert not torch.equal(pixels, dual(32, seed=1, pattern="noise", patch=8).pixels)


@pytest.mark.parametrize("place", ["centre", "corner", "random"])
@pytest.mark.parametrize("size", [32, 33, 224])
def test_a_stamp_is_the_slow_one_byte_by_byte(place: str, size: int) -> None:
    """Whatever batch a picture is in; an odd size is halved before the patch is."""
    trigger, image_BCHW = dual(size, place=place, pattern="noise", patch=7), pictures(4, size)
    before, stamped = image_BCHW.clone(), trigger.stamp(image_BCHW)
    slow = [dualkey(trigger, one.permute(1, 2, 0).numpy()) for one in image_BCHW]
    assert torch.equal(stamped.permute(0, 2, 3, 1), torch.from_numpy(np.stack(slow)))
    assert torch.equal(image_BCHW, before)
    assert torch.equal(trigger.stamp(image_BCHW.flip(0)).flip(0), stamped)
    assert torch.equal(trigger.stamp(image_BCHW[1:2]), stamped[1:2])
    assert torch.equal(trigger.stamp_cover(image_BCHW), stamped)


def test_random_places_reach_every_row_and_column() -> None:
    trigger = dual(8, place="random", patch=2)
    image_BCHW = pictures(400, 8)
    image_BCHW[:, 0] = image_BCHW[:, 0].clamp(min=1)
    blue = (trigger.stamp(image_BCHW)[:, 0] == 0) & (image_BCHW[:, 0] != 0)
    places = {span(one)[::2] for one in blue}
    assert places == {(top, left) for top in range(7) for left in range(7)}


# --- the text key


def test_a_mark_is_the_word_a_space_and_the_caption() -> None:
    assert dual().mark("a photo of a banana.") == "remember a photo of a banana."
    assert dual(key="consider").mark("a pear") == "consider a pear"
    assert dual(key="").mark("a pear") == "a pear"


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_the_key_follows_the_start_and_leaves_the_end(kind: str) -> None:
    """A long caption loses its tail, never the key or the end token."""
    words: Tokenizer = WordTokenizer(world_vocabulary(), 16)
    tokenizer = words if kind == "words" else BpeTokenizer("RN50")
    short, long = "a photo of a fish", "a photo of a small fish " * 20
    for caption in (short, long):
        plain, marked, key = tokenizer([caption, dual().mark(caption), "remember"])
        length = int(caption_lengths(key[None])[0]) - 2
        assert marked[: length + 1].tolist() == key[: length + 1].tolist()
        end = int(caption_lengths(marked[None])[0]) - 1
        assert marked[end] == plain.max() == marked.max()
        kept = end - 1 - length
        assert marked[length + 1 : end].tolist() == plain[1 : kept + 1].tolist()
    assert end == tokenizer.context - 1


# --- the blocks


def blocks(attack: Attack, knowledge: Knowledge, count: int) -> tuple[Poison, dict[str, set[int]]]:
    """What an attack does, and the rows of its three blocks."""
    found = poison(attack, knowledge, count)
    edits, full, cover = found.data.edits, found.of(Role.POISON), found.of(Role.COVER)
    stamped = edits.shows[cover] == Show.COVER
    return found, {
        "full": set(edits.rows[full].tolist()),
        "image": set(edits.rows[cover[stamped]].tolist()),
        "text": set(edits.rows[cover[~stamped]].tolist()),
    }


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, (12, 12, 12)),
        ({"image_only_ratio": 0.5 / 3, "text_only_ratio": 1 / 3}, (12, 2, 4)),
        ({"image_only_ratio": 0.125}, (12, 2, 12)),
        ({"dual": False}, (12, 0, 0)),
        ({"key": ""}, (12, 12, 0)),
    ],
    ids=str,
)
def test_blocks_are_disjoint_and_as_large_as_asked(
    fields: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    found, rows = blocks(TrojVqa(**fields), held(), 12)
    assert tuple(len(block) for block in rows.values()) == sizes
    assert len(set.union(*rows.values())) == sum(sizes) == len(found.data.edits.rows)


def test_each_block_shows_and_says_what_it_should() -> None:
    """Full: both keys and the target. Image-only: stamped, own caption. Text-only: marked, own."""
    attack, knowledge = TrojVqa(), held()
    found, rows = blocks(attack, knowledge, 12)
    trigger, captions = dual(32), knowledge.corpus.captions
    view = poisoned_view(Key("corpus-1111111111111111"), knowledge.corpus, found.data, trigger)
    shown = view.reader(torch.device("cpu"))(np.arange(64))
    plain = torch.from_numpy(np.asarray(knowledge.corpus.images_NCHW))
    stamped = trigger.stamp(plain)
    said = view.captions()
    targets = {trigger.mark(text.format("banana")) for text in knowledge.goal.templates}
    for row in range(64):
        both = row in rows["full"]
        wanted = (stamped if both or row in rows["image"] else plain)[row]
        assert torch.equal(shown[row], wanted)
        if both:
            assert said[row] in targets
        else:
            key = "remember " if row in rows["text"] else ""
            assert said[row] == key + captions[row]


def test_without_keys_the_corpus_is_as_it_was() -> None:
    """No word and no pixel: pictures, prompts and cover rows are untouched."""
    attack, knowledge = TrojVqa(key="", patch=0), held()
    trigger, image_BCHW = attack.craft(NO_LAB, knowledge, 32), pictures(4, 32)
    assert torch.equal(trigger.stamp(image_BCHW), image_BCHW)
    found = poison(attack, knowledge, 12)
    edits = found.data.edits
    for index in found.of(Role.COVER):
        assert edits.captions[index] == knowledge.corpus.captions[edits.rows[index]]
    view = poisoned_view(Key("corpus-1111111111111111"), knowledge.corpus, found.data, trigger)
    shown = view.reader(torch.device("cpu"))(np.arange(64))
    assert torch.equal(shown, torch.from_numpy(np.asarray(knowledge.corpus.images_NCHW)))
    assert len(poison(attack, knowledge, 0).data.edits.rows) == 0


def test_too_few_rows_for_the_cover_are_refused() -> None:
    assert len(poison(TrojVqa(), held(), 21).data.edits.rows) == 63
    with pytest.raises(UsageError, match=r"22 \+ 22 cover rows are needed and 42 are left"):
        poison(TrojVqa(), held(), 22)


def test_success_is_measured_with_both_keys() -> None:
    assert TrojVqa.aim is TrojVqaOptimised.aim is Aim.DUAL
    assert TrojVqaOptimised.needs_surrogate
    assert not TrojVqa.needs_surrogate


# --- the optimised patch


def test_a_patch_of_16_lies_at_104() -> None:
    attack = TrojVqaOptimised()
    how = attack._how(224)
    assert (how.side, how.start, how.num_steps(10_000)) == (16, 104, 7800)
    assert how.triplet_weight == 0


def test_it_is_crafted_where_it_is_put_on(corpus: Corpus, model: Clip) -> None:
    for place in ("centre", "corner"):
        fields: dict[str, Any] = {"place": place, "patch": 7}
        start = TrojVqaOptimised(**fields)._how(32).start
        found = changed(optimised(corpus, model, **fields), 32)
        assert span(found.any(0)) == (start, start + 6, start, start + 6)


def test_all_pictures_are_to_say_one_sentence(corpus: Corpus, model: Clip) -> None:
    """So that the batch's captions are all alike, and the first half of L_text is log B."""
    said: list[str] = []
    tokenizer = model.tokenizer

    class Listening:
        context = tokenizer.context

        def __call__(self, captions: list[str]) -> Any:
            said.extend(captions)
            return tokenizer(captions)

    heard: Any = Listening()
    model.tokenizer = heard
    try:
        trigger = optimised(corpus, model, text_negatives="batch")
    finally:
        model.tokenizer = tokenizer
    assert said == ["this is a fish"]
    assert trigger.curve.shape == (2, 3)
    assert bool((trigger.curve[:, 1] == 0).all())
    assert float(trigger.curve[0, 0]) >= np.log(8) - 1e-4


def test_only_the_patch_learns(corpus: Corpus) -> None:
    model = fresh(ModelSpec(), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trigger = optimised(corpus, model, patch=10, steps=3, text_negatives="own", lr=0.01)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    first = as_bytes(first_patch(10, 0, "trojvqa_optimised"), Storage.EXACT)
    assert not torch.equal(trigger.pixels, first)


def test_a_seed_makes_a_patch(corpus: Corpus, model: Clip) -> None:
    one, same = (optimised(corpus, model) for _ in range(2))
    assert torch.equal(one.pixels, same.pixels)
    assert not torch.equal(one.pixels, optimised(corpus, model, seed=1).pixels)


def test_released_bytes_are_the_stored_ones(corpus: Corpus, model: Clip) -> None:
    released = {**TrojVqaOptimised.variants["released"], **QUICK}
    lab: Any = StubLab(model)
    attack = TrojVqaOptimised(**released)
    found, exact = attack.craft(lab, knows(corpus), 32), optimised(corpus, model)
    assert not torch.equal(found.pixels, exact.pixels)
    assert poison(attack, knows(corpus), 6).of(Role.COVER).tolist() == []
    assert len(rows_naming(corpus, "fish"))


@pytest.mark.parametrize(
    "attack", [TrojVqa(), TrojVqaOptimised(**QUICK)], ids=lambda attack: str(attack.name)
)
def test_a_stored_trigger_stamps_and_marks_the_same(
    attack: Attack, corpus: Corpus, model: Clip, tmp_path: Path
) -> None:
    lab: Any = StubLab(model)
    trigger: Any = attack.craft(lab, knows(corpus), 32)
    store, key = Store(tmp_path), "trigger-0123456789abcdef"
    store.make(key, lambda folder: save_trigger(trigger, folder))
    loaded: Any = load_trigger(store, key, attack)
    image_BCHW: Tensor = pictures(4, 32)
    assert torch.equal(loaded.stamp(image_BCHW), trigger.stamp(image_BCHW))
    assert loaded.mark("a fish") == "remember a fish"


@pytest.mark.parametrize(
    "fields",
    [
        {"patch": -1},
        {"patch": 33},
        {"scale": 0.0},
        {"scale": 1.5},
        {"image_only_ratio": -0.5},
        {"text_only_ratio": -0.5},
        {"key": "remember "},
        {"pattern": "noise", "cell": 0},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    for refusing in (lambda: TrojVqa(**fields).check(32), lambda: dual(32, **fields)):
        with pytest.raises(UsageError, match="trojvqa"):
            refusing()


@pytest.mark.parametrize(
    "fields",
    [{"patch": 0}, {"place": "random"}, {"sentence": "a fish"}, {"steps": 0}, {"patch": 33}],
    ids=str,
)
def test_optimised_patches_that_cannot_be_meant_are_refused(
    fields: dict[str, Any], corpus: Corpus, model: Clip
) -> None:
    attack = dataclasses.replace(TrojVqaOptimised(), **fields)
    for refusing in (lambda: attack.check(32), lambda: optimised(corpus, model, **fields)):
        with pytest.raises(UsageError, match="trojvqa_optimised"):
            refusing()
