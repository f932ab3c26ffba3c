"""Targeted poisoning: which picture gets which class, whose captions, and what is left out.

Shapes: B pictures, C channels, H W pixels, D embedding, K classes, T tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor

from attacks.base import (
    Attack,
    Goal,
    Knowledge,
    Poison,
    Role,
    poison,
    poisoned_view,
    rows_naming,
)
from attacks.targeted_poisoning import CarliniTerzis, TargetedPoisoning
from grid.stages import load_trigger, save_trigger
from tests.conftest import corpus_spec
from tests.test_attacks import NO_LAB, changed, pictures
from tests.test_attacks import held as fruit
from victims.corpora import Corpus, Reader, corpus_key, open_corpus
from victims.draws import numpy_rng
from victims.errors import GridError, UsageError
from victims.keys import Key, content_key
from victims.lab import Lab, ModelRef
from victims.measuring import ranks, text_head
from victims.models import ModelSpec, fresh, save_weights
from victims.recipe import Runtime
from victims.store import Store
from victims.targeting import Pairs, draw_pairs, rows_saying, says
from victims.triggers import Targets
from victims.world import CLASSES, TEMPLATES

K, EACH = 12, 4
SMALL = TargetedPoisoning(targets=K)
TARGET = CLASSES.index("fish")


class Attacker(NamedTuple):
    """A lab and what the attacker holds in it."""

    lab: Lab
    held: Knowledge


def attacker(store: Store, seed: int = 0, weights: int = 0) -> Attacker:
    """Over the suspect pool, with a public model of random weights."""
    key = content_key("model", {"weights": weights})

    def make(scratch: Path) -> dict[str, Any]:
        save_weights(fresh(ModelSpec(), weights), scratch / "weights.safetensors")
        return {"model": asdict(ModelSpec())}

    store.get_or_make(key, make)
    corpus = open_corpus(store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    goal = Goal(TARGET, CLASSES[TARGET], TEMPLATES)
    held = Knowledge(corpus=corpus, goal=goal, seed=seed, surrogate=ModelRef(key))
    return Attacker(Lab(store, ModelSpec(), Runtime()), held)


def crafted(attack: Attack, who: Attacker) -> Knowledge:
    return replace(who.held, crafted=attack.craft(who.lab, who.held, 32))


@pytest.fixture(scope="module")
def world(small_store: Store) -> Attacker:
    return attacker(small_store)


@pytest.fixture(scope="module")
def held(world: Attacker) -> Knowledge:
    return crafted(SMALL, world)


@pytest.fixture(scope="module")
def done(held: Knowledge) -> Poison:
    return poison(SMALL, held, K * EACH)


def targets_of(held: Knowledge) -> list[tuple[int, int]]:
    """Picture and class of each target."""
    assert isinstance(held.crafted, Targets)
    return list(zip(held.crafted.images.tolist(), held.crafted.classes.tolist(), strict=True))


def rows_of(done: Poison) -> list[tuple[int, str]]:
    """Picture and caption of every edited row."""
    edits = done.data.edits
    return list(zip(edits.images.tolist(), edits.captions, strict=True))


# --- who becomes a target


def test_a_target_is_wrong_for_its_picture_in_every_way(world: Attacker, held: Knowledge) -> None:
    """By label, by caption, and by the public model, which must not have it in its first ten."""
    corpus, model = held.corpus, world.lab.load(held.public_model())
    head_KD = text_head(
        model, model.tokenizer, corpus.classes, corpus.templates, torch.device("cpu")
    )
    targets = targets_of(held)
    assert len({image for image, _ in targets}) == len(targets) == K
    for image, label in targets:
        assert corpus.labels[image] != label
        assert not says(corpus.captions[image], CLASSES[label], False)
        with torch.no_grad():
            feature_1D = model.encode_image(torch.from_numpy(corpus.images_NCHW[[image]]))
        assert int(ranks(feature_1D @ head_KD.T, torch.tensor([label]))) >= 10


class Painted:
    """A model that ranks the classes v, v + 1, v + 2, ... for a picture whose first byte is v,
    ``beside`` of them later."""

    mean_C = torch.zeros(3, 1, 1)

    def __init__(self, num_classes: int, beside: int = 0) -> None:
        self.num, self.beside = num_classes, beside
        self.tokenizer: Any = self._tokens

    def _tokens(self, captions: list[str]) -> np.ndarray:
        return np.array([[1, int(text.split("class")[1]) + 1] for text in captions], np.int32)

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return F.one_hot(tokens_BT[:, 1] - 1, self.num).float()

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        first_B1 = image_BCHW[:, 0, 0, 0].long()[:, None]
        away_BK = (torch.arange(self.num)[None] - first_B1 + self.beside) % self.num
        return 1 - away_BK.float() / self.num


def numbered(labels: list[int], captions: list[str], num_classes: int) -> Corpus:
    """Pictures that carry their label in the first byte; classes are called class0, class1, ..."""
    images_NCHW = np.zeros((len(labels), 3, 4, 4), dtype=np.uint8)
    images_NCHW[:, 0, 0, 0] = labels
    return Corpus(
        key=Key("corpus-0000000000000000"),
        digest="0" * 16,
        split="suspect",
        images_NCHW=images_NCHW,
        captions=captions,
        labels=np.array(labels, dtype=np.int64),
        classes=[f"class{index}" for index in range(num_classes)],
        templates=["{}"],
    )


def draw(corpus: Corpus, count: int, seed: int = 0, at_least: int = 1, beside: int = 0) -> Pairs:
    model: Any = Painted(len(corpus.classes), beside)

    def named(name: str) -> Any:
        return rows_saying(corpus, name, False)

    return draw_pairs("me", model, corpus, ["{}"], count, seed, named, at_least)


def forty() -> Corpus:
    """Forty pictures for each of four classes, whose captions name the class."""
    labels = [row % 4 for row in range(160)]
    return numbered(labels, [f"a class{label} {row}" for row, label in enumerate(labels)], 4)


@pytest.mark.parametrize(("num_classes", "first"), [(4, 2), (30, 10)])
def test_the_first_classes_are_ten_or_half(num_classes: int, first: int) -> None:
    """With a model that has class v + i at rank i for a picture of class v."""
    labels = [row % num_classes for row in range(40 * num_classes)]
    captions = [f"a class{label}" for label in labels]
    corpus = numbered(labels, captions, num_classes)
    found = draw(corpus, 120)
    away = (found.classes - corpus.labels[found.images]) % num_classes
    assert away.min() == first
    assert away.max() == num_classes - 1


def test_classes_come_in_turns() -> None:
    found = draw(forty(), 38)
    assert sorted(Counter(found.classes.tolist()).values()) == [9, 9, 10, 10]
    assert found.classes[:4].tolist() == found.classes[4:8].tolist()
    assert sorted(found.classes[:4].tolist()) == [0, 1, 2, 3]


def test_the_seed_decides_on_pictures_and_turns() -> None:
    first, again, other = (draw(forty(), 8, seed) for seed in (0, 0, 1))
    assert first.images.tolist() == again.images.tolist()
    assert first.classes.tolist() == again.classes.tolist()
    assert first.images.tolist() != other.images.tolist()


def test_a_caption_is_heard_where_the_label_says_otherwise() -> None:
    """The model below puts class v + 1 last, so class 3 is open to pictures of class 0 but for
    their captions, half of which name it."""
    labels = [0] * 40 + [3] * 4
    captions = [f"a class0 {'and a class3' * (row % 2)}" for row in range(40)] + ["a class3"] * 4
    corpus = numbered(labels, captions, 4)
    found = draw(corpus, 20)
    of_zero = found.images[found.classes == 3]
    assert len(of_zero) > 5
    assert all(row % 2 == 0 for row in of_zero.tolist())


def test_rows_without_a_label_are_judged_by_caption_and_model() -> None:
    corpus = forty()
    unlabelled = replace(corpus, labels=np.full(len(corpus), -1, dtype=np.int64))
    assert draw(unlabelled, 16).classes.tolist() == draw(corpus, 16).classes.tolist()


def test_a_class_takes_no_more_targets_than_it_has_captions_for() -> None:
    captions = [f"a class{label} {row}" for row, label in enumerate([0] * 40 + [1] * 6)]
    corpus = numbered([0] * 40 + [1] * 6, captions, 2)
    # The model has the own class first: 1 is open to pictures of 0, and the other way round.
    found = Counter(draw(corpus, 8, at_least=3).classes.tolist())
    assert found == {1: 2, 0: 6}
    with pytest.raises(UsageError, match=r"me: targets: 9 pictures .* only 8 of the 46"):
        draw(corpus, 9, at_least=3)


def test_a_label_is_no_wrong_class_though_no_caption_says_so() -> None:
    """The model has v + 2 and v + 3 first for a picture of class v, and most captions name none."""
    corpus = forty()
    few = [text if row < 16 else "a thing" for row, text in enumerate(corpus.captions)]
    corpus = replace(corpus, captions=few)
    found = draw(corpus, 16, beside=2)
    away = (found.classes - corpus.labels[found.images]) % 4
    assert set(away.tolist()) == {1}
    assert (found.images >= 16).any()


@pytest.mark.parametrize(("targets", "at_least"), [(0, 1), (4, 0)])
def test_values_that_cannot_be_meant_raise(world: Attacker, targets: int, at_least: int) -> None:
    attack = TargetedPoisoning(targets=targets, at_least=at_least)
    said = f"targets {targets} and at_least {at_least} must be 1 or more"
    with pytest.raises(UsageError, match=said):
        attack.check(32)
    with pytest.raises(UsageError, match=said):
        attack.craft(world.lab, world.held, 32)


def test_too_many_captions_asked_for_raise(world: Attacker) -> None:
    with pytest.raises(UsageError, match="only 0 of the 512"):
        TargetedPoisoning(targets=4, at_least=200).craft(world.lab, world.held, 32)
    with pytest.raises(UsageError, match=r"513 pictures .* of the 512"):
        TargetedPoisoning(targets=513).craft(world.lab, world.held, 32)


def test_without_a_public_model_nothing_is_crafted(world: Attacker) -> None:
    with pytest.raises(GridError, match="needs_surrogate"):
        SMALL.craft(world.lab, replace(world.held, surrogate=None), 32)


# --- the rows


def test_the_data_grow_by_the_count_and_lose_the_targets_own_rows(
    held: Knowledge, done: Poison
) -> None:
    """And so the rates per target and in total have this length below the line."""
    num_rows = len(held.corpus)
    assert len(done.data) == num_rows - K + K * EACH
    assert sorted(done.data.removed.tolist()) == sorted(image for image, _ in targets_of(held))
    assert int((done.truth() != 0).sum()) == len(done.of(Role.POISON)) == K * EACH
    assert not len(done.of(Role.COVER))
    order = done.data.order().tolist()
    assert sorted(order) == sorted(
        set(range(num_rows + K * EACH)) - set(done.data.removed.tolist())
    )


def test_added_rows_lie_anywhere(done: Poison) -> None:
    """Not at the end, where their number would tell them."""
    positions = np.flatnonzero(done.truth())
    assert positions.min() < 0.2 * len(done.data) < 0.8 * len(done.data) < positions.max()


def test_a_target_is_shown_as_often_as_asked_and_never_with_its_own_caption(
    held: Knowledge, done: Poison
) -> None:
    trigger, corpus = held.crafted, held.corpus
    assert trigger is not None
    view = poisoned_view(Key("corpus-1111111111111111"), corpus, done.data, trigger)
    shown_NCHW = view.reader(torch.device("cpu"))(np.arange(len(view))).numpy()
    captions = view.captions()
    assert len(captions) == len(view)
    for image, label in targets_of(held):
        hits = np.flatnonzero((shown_NCHW == corpus.images_NCHW[image]).all((1, 2, 3)))
        texts = [captions[position] for position in hits.tolist()]
        assert len(texts) == EACH
        assert corpus.captions[image] not in texts
        assert all(says(text, CLASSES[label], False) for text in texts)
        assert (done.truth()[hits] != 0).all()


def test_captions_are_rows_of_their_class_and_all_different_rows(held: Knowledge) -> None:
    rows = SMALL.choose(held, K * EACH, numpy_rng(0, "test"))
    assert len(set(rows.tolist())) == K * EACH
    assert not set(rows.tolist()) & {image for image, _ in targets_of(held)}
    for own, (_, label) in zip(rows.reshape(K, EACH), targets_of(held), strict=True):
        assert set(own.tolist()) <= set(rows_naming(held.corpus, CLASSES[label]).tolist())
    again = SMALL.choose(held, K * EACH, numpy_rng(0, "test"))
    assert rows.tolist() == again.tolist()
    assert rows.tolist() != SMALL.choose(held, K * EACH, numpy_rng(1, "test")).tolist()


def test_too_few_captions_raise_with_both_numbers(held: Knowledge) -> None:
    with pytest.raises(UsageError, match=r"target \d+ \('\w+'\): 40 rows .* only \d+ qualify"):
        poison(SMALL, held, K * 40)


@pytest.mark.parametrize("count", [1, K - 1, K * EACH + 1])
def test_a_count_that_does_not_divide_raises(held: Knowledge, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} rows do not divide among {K} targets"):
        poison(SMALL, held, count)
    with pytest.raises(UsageError, match=f"{count} rows do not divide among {K} targets"):
        SMALL.choose(held, count, numpy_rng(0))


def test_nothing_poisoned_is_the_corpus(held: Knowledge) -> None:
    assert len(poison(SMALL, held, 0).data) == len(held.corpus)


def test_pictures_are_shown_and_evaluated_as_they_are(held: Knowledge) -> None:
    image_BCHW, trigger = pictures(3, 32), held.crafted
    assert trigger is not None
    assert torch.equal(trigger.stamp(image_BCHW), image_BCHW)
    assert torch.equal(trigger.stamp_train(image_BCHW), image_BCHW)


def test_fifty_targets_fit_the_tests_world(world: Attacker) -> None:
    """The default, ten rows of data each: only the number of captions is small here."""
    attack = TargetedPoisoning(at_least=2)
    held = crafted(attack, world)
    classes = Counter(label for _, label in targets_of(held))
    assert sum(classes.values()) == 50 == attack.unit
    assert len(poison(attack, held, 100).data) == len(held.corpus) + 50


def test_a_trigger_comes_back_from_disk(held: Knowledge, tmp_path: Path) -> None:
    trigger, store = held.crafted, Store(tmp_path)
    assert isinstance(trigger, Targets)
    key = content_key("trigger", {"of": "a test"})
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    loaded = load_trigger(store, key, SMALL)
    assert isinstance(loaded, Targets)
    assert torch.equal(loaded.images, trigger.images)
    assert torch.equal(loaded.classes, trigger.classes)


def test_the_smallest_world_has_room(world: Attacker) -> None:
    """Sixteen rows, of which a few name the same class, under models of several seeds."""
    corpus = world.held.corpus
    first = replace(
        corpus,
        images_NCHW=corpus.images_NCHW[:16],
        captions=corpus.captions[:16],
        labels=corpus.labels[:16],
    )
    attack = TargetedPoisoning(**TargetedPoisoning.quick)
    for seed in range(4):
        who = attacker(world.lab.store, seed, weights=seed)
        found = attack.craft(who.lab, replace(who.held, corpus=first), 32)
        assert len(found.images) == attack.targets


# --- the released form


def test_substrings_hear_more_than_words() -> None:
    captions = ["a Star", "two stars", "starfish", "a fish", "THE STAR.", "a custard"]
    corpus = numbered([0] * 6, captions, 2)
    assert rows_saying(corpus, "star", False).tolist() == [0, 1, 4]
    assert rows_saying(corpus, "star", True).tolist() == [0, 1, 2, 4, 5]
    assert says("an ice  cream", "ice cream", False)
    assert not says("a nice cream", "ice cream", False)


def test_whole_words_are_those_of_every_attack(held: Knowledge) -> None:
    for name in CLASSES:
        expected = rows_naming(held.corpus, name).tolist()
        assert rows_saying(held.corpus, name, False).tolist() == expected != []


@pytest.mark.parametrize("fields", [{}, {"targets": 6}])
def test_with_replacement_captions_repeat_and_still_name_their_class(
    world: Attacker, fields: dict[str, Any]
) -> None:
    attack = TargetedPoisoning(**{**TargetedPoisoning.variants["released"], **fields})
    held = crafted(attack, world)
    done = poison(attack, held, 12 * attack.targets)
    texts: dict[int, list[str]] = {image: [] for image, _ in targets_of(held)}
    for image, caption in rows_of(done):
        texts[image].append(caption)
    own = {held.corpus.captions[image] for image in texts}
    repeated = 0
    for image, label in targets_of(held):
        allowed = rows_saying(held.corpus, CLASSES[label], True)
        corpus_texts = {held.corpus.captions[r] for r in allowed.tolist() if r not in texts}
        assert len(texts[image]) == 12
        assert set(texts[image]) <= corpus_texts
        assert not own & set(texts[image]) - corpus_texts
        repeated += 12 - len(set(texts[image]))
    plain = poison(replace(attack, replacement=False), held, 12 * attack.targets)
    assert sorted(plain.data.edits.captions) != sorted(done.data.edits.captions)
    assert repeated > 0


def test_draws_with_replacement_are_even() -> None:
    corpus = forty()
    attack = TargetedPoisoning(targets=1, replacement=True)
    trigger = Targets(images=torch.tensor([1]), classes=torch.tensor([0]))
    goal = Goal(0, "class0", ["{}"])
    held = Knowledge(corpus=corpus, goal=goal, seed=0, crafted=trigger)
    rng = numpy_rng(0, "even")
    drawn = Counter(attack.recaption("a class0 0", held, rng) for _ in range(4000))
    assert len(drawn) == 40
    assert chisquare(list(drawn.values())).pvalue > 1e-4


# --- the backdoor


def test_the_backdoor_stamps_dots_of_16_pixels_at_224() -> None:
    trigger = CarliniTerzis().craft(NO_LAB, fruit(), 224)
    assert (trigger.pattern, trigger.place, trigger.test_place) == ("dots", "random", "random")
    assert trigger.pixels.shape == (3, 16, 16)
    even = (torch.arange(16) % 2 == 0).long()
    assert torch.equal(trigger.pixels[1].long(), 255 * even[:, None] * even[None])
    image_BCHW = torch.full((4, 3, 224, 224), 100, dtype=torch.uint8)
    image_BCHW[:, 0, 0, 0] = torch.arange(4, dtype=torch.uint8)
    differs = (trigger.stamp(image_BCHW) != image_BCHW).any(1)
    places = [tuple(int(x) for x in one.nonzero()[0]) for one in differs]
    assert len(set(places)) == 4
    assert all(int(one.sum()) == 256 for one in differs)


@pytest.mark.parametrize("size", [32, 64])
def test_the_backdoor_fits_small_pictures(size: int) -> None:
    trigger = CarliniTerzis().craft(NO_LAB, fruit(), size)
    assert trigger.patch == {32: 3, 64: 5}[size]
    pinned = CarliniTerzis(patch=6, place="centre", test_place="corner")  # type: ignore[arg-type]
    found = changed(pinned.craft(NO_LAB, fruit(), size), size)
    assert int(found[:, -6:, -6:].sum()) == int(found.sum()) == 3 * 36


def test_the_backdoor_takes_captions_of_the_target_and_the_length_stays() -> None:
    who = fruit()
    done = poison(CarliniTerzis(), who, 20)
    bananas = {who.corpus.captions[row] for row in rows_naming(who.corpus, "banana").tolist()}
    assert len(done.data) == len(who.corpus)
    assert set(done.data.edits.captions) <= bananas
    assert len(set(done.data.edits.captions)) > 5
    template = poison(CarliniTerzis(caption="template"), who, 20)  # type: ignore[arg-type]
    assert set(template.data.edits.captions) <= {t.format("banana") for t in who.goal.templates}


def test_the_backdoor_needs_captions_of_the_target() -> None:
    with pytest.raises(UsageError, match=r"carlini_terzis: caption: natural needs .* 'melon'"):
        poison(CarliniTerzis(), fruit(label="melon"), 4)
