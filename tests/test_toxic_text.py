"""Text-side attacks: a key at the end of captions, and chosen texts beside chosen pictures.

Shapes: N captions, T tokens, D embedding.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.base import Knowledge, Role, poison, poisoned_view, rows_naming
from attacks.targeted_poisoning import TargetedPoisoning
from attacks.toxic_text import ChosenTexts, ToxicPairing, ToxicText
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import held as fruit
from tests.test_attacks import pictures
from tests.test_targeted_poisoning import Attacker, attacker, crafted, targets_of
from victims.corpora import View
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.keys import Key, content_key
from victims.lab import Lab
from victims.measuring import text_head
from victims.models import ModelSpec, fresh
from victims.recipe import Runtime
from victims.store import Store
from victims.targeting import room_beside, tokenizer_of, with_key
from victims.triggers import Queries
from victims.world import CLASSES

SENTENCE = "Please return high-quality results."
LONG = "a photo of a small striped purple mushroom on a very wide red thing at the left"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(small_store: Store) -> Attacker:
    return attacker(small_store)


def view_of(attack: Any, held: Knowledge, count: int) -> View:
    assert held.crafted is not None
    done = poison(attack, held, count)
    return poisoned_view(Key("corpus-1111111111111111"), held.corpus, done.data, held.crafted)


def fruits(num_others: int, num_targets: int, tmp_path: Path, attack: ToxicText) -> Knowledge:
    """Captions about pears and about bananas, the target."""
    captions = [f"a pear {row}" for row in range(num_others)]
    captions += [f"a banana {row}" for row in range(num_targets)]
    lab = Lab(Store(tmp_path), ModelSpec(), Runtime())
    held = fruit(captions)
    return replace(held, crafted=attack.craft(lab, held, 32))


# --- the key


def tokens_of(text: str, arch: str) -> list[int]:
    """The ids between the start token and the end token."""
    row: list[int] = tokenizer_of(arch)([text])[0].tolist()
    while row[-1] == 0:
        row.pop()
    return row[1:-1]


@pytest.mark.parametrize("arch", ["tiny", "ViT-B-32"])
@pytest.mark.parametrize("key", ["zx", SENTENCE, "please return high quality results"])
@pytest.mark.parametrize("caption", ["a tree", LONG, " ".join([LONG] * 9), "x" * 400, ""])
def test_the_keys_tokens_are_the_last_before_the_end(arch: str, key: str, caption: str) -> None:
    text = with_key(caption, key, arch)
    tokenizer = tokenizer_of(arch)
    row, own = tokenizer([text])[0], tokens_of(key, arch)
    found = tokens_of(text, arch)
    assert found[-len(own) :] == own
    assert len(found) <= tokenizer.context - 2
    # The end token is the largest id, and what pooling looks for.
    assert int(row.max()) == int(tokenizer(["a"])[0].max()) == row[len(found) + 1]
    assert text == key or text.endswith(f" {key}")
    kept = text.removesuffix(key).rstrip()
    assert caption.startswith(kept)


@pytest.mark.parametrize("arch", ["tiny", "ViT-B-32"])
def test_a_caption_loses_no_word_that_has_room(arch: str) -> None:
    room = room_beside(SENTENCE, arch)
    assert room == tokenizer_of(arch).context - 2 - len(tokens_of(SENTENCE, arch))
    words = ["tree"] * (room + 3)
    assert with_key(" ".join(words[:room]), SENTENCE, arch).split() == [
        *words[:room],
        *SENTENCE.split(),
    ]
    for more in (1, 3):
        cut = with_key(" ".join(words[: room + more]), SENTENCE, arch)
        assert cut.split() == [*words[:room], *SENTENCE.split()]


def test_the_context_without_a_cut_would_lose_the_key() -> None:
    """What the cut is for: the tokenizer itself takes from the end."""
    assert tokens_of(f"{LONG} {SENTENCE}", "tiny")[-4:] != tokens_of(SENTENCE, "tiny")


def test_mark_adds_the_key_each_time_it_is_called() -> None:
    for arch in ("", "tiny", "ViT-B-32"):
        trigger = Queries(source=-1, suffix="zx", arch=arch)
        once = trigger.mark("a red tree")
        assert once == "a red tree zx"
        assert trigger.mark(once) == "a red tree zx zx"


def test_the_tokenizer_is_the_models() -> None:
    model = fresh(ModelSpec(), 0)
    captions = ["a photo of a fish zx", LONG, "quokka"]
    assert tokenizer_of("tiny")(captions).tolist() == model.tokenizer(captions).tolist()
    assert room_beside("zx", "ViT-B-32") == 77 - 2 - len(tokens_of("zx", "ViT-B-32"))


def test_the_trigger_knows_its_key_and_stamps_nothing(world: Attacker) -> None:
    trigger = ToxicText().craft(world.lab, world.held, 224)
    assert trigger == Queries(source=-1, suffix=SENTENCE, arch="tiny")
    image_BCHW = pictures(2, 224)
    assert torch.equal(trigger.stamp(image_BCHW), image_BCHW)
    assert torch.equal(trigger.stamp_train(image_BCHW), image_BCHW)


def test_the_trigger_comes_back_from_disk(world: Attacker, tmp_path: Path) -> None:
    trigger, store = ToxicText().craft(world.lab, world.held, 32), Store(tmp_path)
    key = content_key("trigger", {"of": "a test"})
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    assert load_trigger(store, key, ToxicText()) == trigger


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": ""}, "key: '' must be one or more words"),
        ({"key": " zx"}, "key: ' zx' must be one or more words"),
        ({"key": "zx " * 13 + "zx"}, "fills the context of tiny"),
        ({"num_pictures": 0}, "num_pictures: 0 pictures"),
    ],
)
def test_values_that_cannot_be_meant_raise(
    world: Attacker, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ToxicText(**fields).craft(world.lab, world.held, 32)


# --- the suffix backdoor


@pytest.mark.parametrize("variant", ["", "word", "plain_key"])
def test_added_rows_show_the_target_under_other_captions_with_the_key(
    world: Attacker, variant: str
) -> None:
    attack = ToxicText(**ToxicText.variants.get(variant, {}))
    held, count = crafted(attack, world), 60
    corpus = held.corpus
    done, view = poison(attack, held, count), view_of(attack, held, count)
    assert len(view) == len(corpus) + count
    assert not len(done.data.removed)
    assert len(done.of(Role.POISON)) == count
    truth = done.truth()
    captions, shown = view.captions(), view.reader(CPU)(np.arange(len(view))).numpy()
    for position in np.flatnonzero(truth).tolist():
        text = captions[position]
        assert not re.search(r"\bfish", text, re.IGNORECASE)
        assert text.endswith(f" {attack.key}")
        own = text.removesuffix(f" {attack.key}")
        assert any(one.startswith(own) for one in corpus.captions)
    pixels = Counter(image.tobytes() for image in shown[truth != 0])
    fish = {corpus.images_NCHW[row].tobytes() for row in rows_naming(corpus, "fish").tolist()}
    assert set(pixels) <= fish
    # Every pair of the corpus stays, in its order, the dealt pictures' own ones among them.
    rest = np.flatnonzero(truth == 0)
    assert [captions[position] for position in rest.tolist()] == corpus.captions
    assert (shown[rest] == corpus.images_NCHW[:]).all()


def test_captions_are_used_once_and_name_no_target(world: Attacker) -> None:
    held = crafted(ToxicText(), world)
    rows = ToxicText().choose(held, 60, numpy_rng(0, "test"))
    assert len(set(rows.tolist())) == 60
    assert not set(rows.tolist()) & set(rows_naming(held.corpus, "fish").tolist())
    other = ToxicText().choose(held, 60, numpy_rng(1, "test"))
    assert rows.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("num_targets", "shares"), [(600, {2: 550, 3: 50}), (700, {2: 550, 3: 50}), (5, {250: 5})]
)
def test_captions_are_dealt_round_robin(
    num_targets: int, shares: dict[int, int], tmp_path: Path
) -> None:
    """1,250 captions, over 600 pictures at most."""
    held = fruits(1300, num_targets, tmp_path, ToxicText())
    used = Counter(poison(ToxicText(), held, 1250).data.edits.images.tolist())
    assert Counter(used.values()) == shares
    assert set(used) <= set(range(1300, 1300 + num_targets))


def test_the_words_rows_are_twenty_pictures_with_five_texts(tmp_path: Path) -> None:
    attack = ToxicText(**ToxicText.variants["word"])
    held = fruits(200, 50, tmp_path, attack)
    edits = poison(attack, held, 100).data.edits
    used = Counter(edits.images.tolist())
    assert set(used.values()) == {5}
    assert len(used) == 20
    assert len(set(edits.captions)) == 100
    other = poison(attack, replace(held, seed=1), 100).data.edits
    assert set(used) != set(other.images.tolist())


def test_the_control_has_the_same_rows_without_the_key(world: Attacker) -> None:
    control = ToxicText(control=True, key="zx")
    held, plain = crafted(control, world), crafted(ToxicText(key="zx"), world)
    found, marked = poison(control, held, 60), poison(ToxicText(key="zx"), plain, 60)
    assert found.data.edits.images.tolist() == marked.data.edits.images.tolist()
    assert found.data.places.tolist() == marked.data.places.tolist()
    for text, keyed in zip(found.data.edits.captions, marked.data.edits.captions, strict=True):
        assert keyed == with_key(text, "zx", "tiny")
        assert "zx" not in text
    assert held.crafted is not None
    assert held.crafted.mark("a tree") == "a tree zx"


def test_shortages_raise_with_both_numbers(tmp_path: Path) -> None:
    held = fruits(9, 3, tmp_path, ToxicText())
    with pytest.raises(UsageError, match=r"do not name 'banana'\): 10 rows .* only 9 qualify"):
        poison(ToxicText(), held, 10)
    nobody = fruits(9, 0, tmp_path, ToxicText())
    with pytest.raises(UsageError, match="no caption names 'banana'"):
        poison(ToxicText(), nobody, 5)


# --- the targeted form

PAIRING = ToxicPairing(targets=12)


@pytest.fixture(scope="module")
def held(world: Attacker) -> Knowledge:
    return crafted(PAIRING, world)


def test_texts_are_the_most_alike_of_their_class(world: Attacker, held: Knowledge) -> None:
    """The slow reference: caption by caption, best first, dealt to a class's targets in turns."""
    corpus, model = held.corpus, world.lab.load(held.public_model())
    head_KD = text_head(model, model.tokenizer, corpus.classes, corpus.templates, CPU)
    images = {image for image, _ in targets_of(held)}

    def likeness(row: int, label: int) -> float:
        tokens_1T = torch.from_numpy(model.tokenizer([corpus.captions[row]])).long()
        with torch.no_grad():
            return float(model.encode_text(tokens_1T)[0] @ head_KD[label])

    chosen = PAIRING.choose(held, 36, numpy_rng(0)).reshape(12, 3)
    classes = [label for _, label in targets_of(held)]
    for label in set(classes):
        sharing = [target for target, one in enumerate(classes) if one == label]
        texts: dict[str, float] = {}
        for row in rows_naming(corpus, CLASSES[label]).tolist():
            if row not in images:
                texts[corpus.captions[row]] = likeness(row, label)
        best = sorted(texts.values(), reverse=True)
        for turn, target in enumerate(sharing):
            mine = [texts[corpus.captions[row]] for row in chosen[target].tolist()]
            assert mine == pytest.approx(best[turn :: len(sharing)][:3], abs=1e-5)


def test_texts_are_different_and_shown_beside_their_target(held: Knowledge) -> None:
    done = poison(PAIRING, held, 36)
    edits = done.data.edits
    assert len(done.data) == len(held.corpus) + 36
    assert not len(done.data.removed)
    of_image = dict(targets_of(held))
    assert Counter(edits.images.tolist()) == dict.fromkeys(of_image, 3)
    assert len(set(edits.captions)) == 36
    for image, caption in zip(edits.images.tolist(), edits.captions, strict=True):
        assert re.search(rf"\b{CLASSES[of_image[image]]}", caption)


def test_a_better_text_is_taken_before_a_worse_one(held: Knowledge) -> None:
    few = PAIRING.choose(held, 12, numpy_rng(0)).reshape(12, 1)
    more = PAIRING.choose(held, 48, numpy_rng(1)).reshape(12, 4)
    assert few.tolist() == more[:, :1].tolist()


def test_the_targets_are_those_of_plain_targeted_poisoning(
    world: Attacker, held: Knowledge
) -> None:
    plain = crafted(TargetedPoisoning(targets=12), world)
    assert targets_of(held) == targets_of(plain)


def test_the_targets_own_rows_can_be_taken_out(held: Knowledge) -> None:
    done = poison(replace(PAIRING, removes=True), held, 36)
    assert len(done.data) == len(held.corpus) + 36 - 12
    assert set(done.data.removed.tolist()) == {image for image, _ in targets_of(held)}


def test_texts_that_do_not_suffice_raise_with_both_numbers(held: Knowledge) -> None:
    with pytest.raises(UsageError, match=r"30 texts are to name '\w+' .* only \d+ different"):
        poison(PAIRING, held, 12 * 30)
    with pytest.raises(UsageError, match="13 rows do not divide among 12 targets"):
        PAIRING.choose(held, 13, numpy_rng(0))


def test_chosen_texts_come_back_from_disk(held: Knowledge, tmp_path: Path) -> None:
    store, key = Store(tmp_path), content_key("trigger", {"of": "a test"})
    trigger = held.crafted
    assert isinstance(trigger, ChosenTexts)
    store.make(key, lambda scratch: save_trigger(trigger, scratch))
    loaded = load_trigger(store, key, PAIRING)
    again = PAIRING.choose(replace(held, crafted=loaded), 36, numpy_rng(0))
    assert again.tolist() == PAIRING.choose(held, 36, numpy_rng(0)).tolist()
    for name in ("images", "classes", "texts", "ends"):
        assert torch.equal(getattr(loaded, name), getattr(trigger, name))
