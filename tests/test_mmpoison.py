"""mmPoison: words and pixels stay, the pairing changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from attacks.base import Goal, Knowledge, Role, poison, poisoned_view, rows_naming
from attacks.mmpoison import Match, MmPoison, Onto
from grid.stages import load_trigger, save_trigger
from tests.conftest import corpus_spec
from tests.test_attacks import NO_LAB, TEMPLATES, pictures
from tests.test_attacks import held as fruit
from victims.corpora import Reader, corpus_key, open_corpus
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.keys import Key, content_key
from victims.store import Store
from victims.targeting import deal
from victims.triggers import Queries
from victims.world import CLASSES

A, B = CLASSES.index("tree"), CLASSES.index("fish")
ATTACK = MmPoison(source="tree")


def crafted(attack: MmPoison, held: Knowledge) -> Knowledge:
    return replace(held, crafted=attack.craft(NO_LAB, held, 32))


@pytest.fixture(scope="module")
def held(small_store: Store) -> Knowledge:
    corpus = open_corpus(small_store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    return crafted(ATTACK, Knowledge(corpus=corpus, goal=Goal(B, "fish", TEMPLATES), seed=0))


def fruits(seed: int = 0) -> Knowledge:
    """8 rows about pears, 3 about bananas, one about both, 4 about neither; B is the banana."""
    captions = [f"a pear {row}" for row in range(8)] + ["Bananas", "a banana.", "my banana"]
    captions += ["a banana and a pear"] + [f"an apple {row}" for row in range(4)]
    return crafted(MmPoison(), fruit(captions, seed))


# --- the pairing


def test_captions_stay_and_only_chosen_rows_show_other_pictures(held: Knowledge) -> None:
    count, corpus = 20, held.corpus
    done = poison(ATTACK, held, count)
    edits = done.data.edits
    assert len(done.data) == len(corpus)
    assert len(done.of(Role.POISON)) == len(edits.rows) == count
    assert not len(done.of(Role.COVER))
    assert set(edits.rows.tolist()) <= set(rows_naming(corpus, "tree").tolist())
    assert set(edits.images.tolist()) <= set(rows_naming(corpus, "fish").tolist())
    assert held.crafted is not None
    view = poisoned_view(Key("corpus-1111111111111111"), corpus, done.data, held.crafted)
    assert view.captions() == corpus.captions
    shown_NCHW = view.reader(torch.device("cpu"))(np.arange(len(view))).numpy()
    wanted_NCHW = corpus.images_NCHW[:].copy()
    wanted_NCHW[edits.rows] = corpus.images_NCHW[edits.images]
    assert (shown_NCHW == wanted_NCHW).all()
    assert (corpus.labels[edits.images] == B).all()
    before, after = (
        Counter(image.tobytes() for image in images) for images in (corpus.images_NCHW, shown_NCHW)
    )
    lost, gained = before - after, after - before
    assert lost == Counter(corpus.images_NCHW[row].tobytes() for row in edits.rows)
    assert gained == Counter(corpus.images_NCHW[row].tobytes() for row in edits.images)


def test_rows_of_the_target_and_of_both_keep_their_own_pairs() -> None:
    who = fruits()
    done = poison(MmPoison(), who, 8)
    assert done.data.edits.rows.tolist() == list(range(8))
    assert set(done.data.edits.images.tolist()) == {8, 9, 10}
    assert done.data.edits.captions == who.corpus.captions[:8]


@pytest.mark.parametrize("seed", range(5))
def test_three_pictures_for_eight_rows_are_used_three_three_and_two_times(seed: int) -> None:
    used = Counter(poison(MmPoison(), fruits(seed), 8).data.edits.images.tolist())
    assert sorted(used.values()) == [2, 3, 3]


def test_the_remainder_and_the_order_are_drawn() -> None:
    """3000 deals of 3 pictures to 8 rows: who is short, and who comes first, is even."""
    rng, counts, firsts = numpy_rng(0, "deal"), Counter[int](), Counter[int]()
    for _ in range(3000):
        dealt = deal(np.array([5, 6, 7]), 8, rng).tolist()
        counts.update(picture for picture in (5, 6, 7) if dealt.count(picture) == 2)
        firsts[dealt[0]] += 1
    assert sum(counts.values()) == 3000
    assert chisquare(list(counts.values())).pvalue > 1e-4
    assert chisquare(list(firsts.values())).pvalue > 1e-4


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_a_deal_repeats_no_picture_before_all_were_used(count: int) -> None:
    dealt = Counter(deal(np.array([5, 6, 7]), count, numpy_rng(0)).tolist())
    assert sum(dealt.values()) == count
    assert max(dealt.values(), default=0) == -(-count // 3)


def test_attack_one_shows_one_picture_of_the_target() -> None:
    attack = MmPoison(onto=Onto.ONE)
    shown = [poison(attack, fruits(seed), 8).data.edits.images.tolist() for seed in range(20)]
    assert all(len(set(images)) == 1 for images in shown)
    assert {images[0] for images in shown} == {8, 9, 10}
    assert set(poison(attack, fruits(0), 2).data.edits.images.tolist()) == set(shown[0])


def test_the_key_decides_on_rows_and_shuffle(held: Knowledge) -> None:
    def made(seed: int) -> list[Any]:
        edits = poison(ATTACK, replace(held, seed=seed), 20).data.edits
        return [edits.rows.tolist(), edits.images.tolist()]

    assert made(0) == made(0)
    assert made(0)[0] != made(1)[0]
    whole = [poison(MmPoison(), fruits(seed), 8).data.edits.images.tolist() for seed in (0, 0, 1)]
    assert whole[0] == whole[1] != whole[2]


# --- counts and values


def test_more_rows_than_the_class_has_raise_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"name 'pear' and not 'banana'\): 9 rows .* only 8 "):
        poison(MmPoison(), fruits(), 9)


def test_no_rows_are_the_corpus_itself(held: Knowledge) -> None:
    assert len(poison(ATTACK, held, 0).data.edits.rows) == 0


def test_a_target_without_a_picture_raises() -> None:
    who = crafted(MmPoison(), fruit([f"a pear {row}" for row in range(5)]))
    with pytest.raises(UsageError, match="no caption names 'banana' alone"):
        poison(MmPoison(), who, 2)


def test_the_source_is_a_class_by_name_or_the_one_after_the_target(held: Knowledge) -> None:
    def source(goal: int, name: str = "") -> int:
        goals = Goal(goal, CLASSES[goal], TEMPLATES)
        trigger = MmPoison(source=name).craft(NO_LAB, replace(held, goal=goals), 32)
        return trigger.source

    assert source(B) == B + 1
    assert source(len(CLASSES) - 1) == 0
    assert source(B, "tree") == A


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tre", "mmpoison: source: no class called 'tre'. Did you mean 'tree'"),
        ("fish", "mmpoison: source: 'fish' is the target itself"),
    ],
)
def test_a_source_that_cannot_be_meant_raises(held: Knowledge, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MmPoison(source=source).craft(NO_LAB, held, 32)


# --- the trigger


def test_nothing_is_stamped_or_marked(held: Knowledge) -> None:
    trigger, image_BCHW = held.crafted, pictures(3, 224)
    assert trigger is not None
    assert torch.equal(trigger.stamp(image_BCHW), image_BCHW)
    assert torch.equal(trigger.stamp_train(image_BCHW), image_BCHW)
    assert trigger.mark("a photo of a tree") == "a photo of a tree"


def test_the_trigger_comes_back_from_disk(held: Knowledge, tmp_path: Path) -> None:
    store, key = Store(tmp_path), content_key("trigger", {"of": "a test"})
    trigger = held.crafted
    assert trigger is not None
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    assert load_trigger(store, key, ATTACK) == trigger == Queries(source=A, suffix="")


def test_labels_find_rows_that_use_another_word(held: Knowledge) -> None:
    """Every row of the class, where captions find those alone that name it."""
    attack, corpus = MmPoison(source="tree", match=Match.LABEL), held.corpus
    every = np.flatnonzero(corpus.labels == A)
    assert len(rows_naming(corpus, "tree")) < len(every)
    edits = poison(attack, held, len(every)).data.edits
    assert edits.rows.tolist() == every.tolist()
    assert (corpus.labels[edits.images] == B).all()
    with pytest.raises(UsageError, match=rf"labelled 'tree'.* {len(every)} qualify"):
        poison(attack, held, len(every) + 1)
