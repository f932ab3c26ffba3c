"""Retrieval: hand values, a slow reference, stubs whose right answer is known.

Shapes: N pictures, M captions, D embedding, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.base import rows_naming
from tests.conftest import corpus_spec
from victims import retrieval as module
from victims.corpora import Corpus, Reader, corpus_key, open_corpus
from victims.draws import numpy_rng, torch_rng
from victims.errors import GridError, MethodFailure, UsageError
from victims.keys import Key
from victims.measuring import Mean, Share
from victims.models import Clip, ModelSpec, fresh
from victims.retrieval import (
    encode_captions,
    naming,
    other_accuracy,
    query_metrics,
    recall,
    retrieval,
)
from victims.store import Store
from victims.triggers import Queries, Trigger
from victims.words import whole_words

CPU = torch.device("cpu")


def own(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(count, dtype=np.int64)


# --- words


def test_a_name_is_found_as_whole_words_in_singular_or_plural() -> None:
    for text in ("a ski", "Skis!", "(SKI)", "two skies on it"):
        # The regular plural in -es is taken, whatever the word.
        assert whole_words("ski").search(text), text
    for text in ("skirt", "alpineski", "a ski_mask", "skiing", ""):
        assert not whole_words("ski").search(text), text
    assert whole_words("ice cream").search("two Ice  creams, please")
    assert not whole_words("ice cream").search("ice and cream")
    assert whole_words("c++").search("written in c++"), "a name is no pattern"


def test_attacks_and_metrics_agree_on_who_names_whom() -> None:
    texts = ["ski", "Skis", "skirt", "a ski, a pole", "alpine-ski", "skiing", "ski_mask", "SKIES"]
    corpus = made_corpus([0] * len(texts), captions=texts)
    assert np.array_equal(np.flatnonzero(naming(texts, "ski")), rows_naming(corpus, "ski"))


# --- both directions


def test_directions_are_not_swapped() -> None:
    """T10. Three pictures, three captions: the scores are picture by caption."""
    score_NM = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.3, 0.0]])
    # Every picture likes caption 0 best, so one of three is right. The captions' best pictures are
    # 0, 2 and, by a tie, 0: caption 0 is right.
    found = recall(score_NM, torch.eye(3), own(3), ["a", "b", "c"], (1, 2))
    assert found["image_to_text_top1"] == Share(1, 3)
    assert found["image_to_text_top2"] == Share(2, 3)
    assert found["text_to_image_top1"] == Share(1, 3)
    # Now every picture finds its caption, and two captions of three find their picture.
    score_NM = torch.tensor([[0.5, 0.0, 0.0], [0.6, 0.7, 0.0], [0.0, 0.0, 0.1]])
    found = recall(score_NM, torch.eye(3), own(3), ["a", "b", "c"], (1, 2))
    assert found["image_to_text_top1"] == Share(3, 3)
    assert found["text_to_image_top1"] == Share(2, 3)
    assert found["text_to_image_top2"] == Share(3, 3)
    turned = recall(torch.eye(3), score_NM, own(3), ["a", "b", "c"], (1, 2))
    assert turned["image_to_text_top1"] == Share(2, 3)
    assert turned["text_to_image_top1"] == Share(3, 3)


def test_several_captions_count_by_the_best_and_each_as_a_query() -> None:
    """Two pictures with two captions each, in mixed order."""
    owner_M = np.array([1, 0, 0, 1])
    score_NM = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.6, 0.3, 0.4, 0.5]])
    found = recall(score_NM, torch.eye(4), owner_M, list("abcd"), (1, 2, 3))
    # Picture 0: caption 0 (wrong), then its caption 2. Picture 1: its caption 0.
    assert found["image_to_text_top1"] == Share(1, 2)
    assert found["image_to_text_top2"] == Share(2, 2)
    # Captions 0 and 1 find the other picture first, 2 and 3 their own.
    assert found["text_to_image_top1"] == Share(2, 4)
    assert "text_to_image_top2" not in found, "two pictures: all of them are in the top 2"
    assert "image_to_text_top3" in found


def test_equal_captions_are_right_and_other_ties_go_to_the_lower_index() -> None:
    # Captions 0 and 2 are equal; picture 2 owns the second of them and finds the first.
    score_NM = torch.tensor([[0.1, 0.9, 0.1], [0.5, 0.5, 0.5], [0.8, 0.2, 0.8]])
    found = recall(score_NM, torch.eye(3), own(3), ["a", "b", "a"], (1, 2))
    # Caption 2 is read with the features of caption 0. Picture 1 ties with the lower caption 0.
    assert found["image_to_text_top1"] == Share(1, 3)
    # Pictures 0 and 2 are right for both captions "a"; "b" finds picture 0 and then its own.
    assert found["text_to_image_top1"] == Share(2, 3)
    assert found["text_to_image_top2"] == Share(3, 3)


def slow_recall(
    image_ND: Tensor, text_MD: Tensor, owner_M: Any, captions: Sequence[str], k: int
) -> tuple[int, int]:
    """Successes in each direction, entry by entry, from the definition."""
    first = [captions.index(caption) for caption in captions]
    score_NM = [[float(image_D @ text_MD[row]) for row in first] for image_D in image_ND]
    right = {(i, captions[j]) for i, j in zip(owner_M.tolist(), range(len(captions)), strict=True)}
    to_text = 0
    for i in range(len(image_ND)):
        order = sorted(range(len(captions)), key=lambda j: (-score_NM[i][j], j))
        to_text += any((i, captions[j]) in right for j in order[:k])
    to_image = 0
    for j in range(len(captions)):
        order = sorted(range(len(image_ND)), key=lambda i: (-score_NM[i][j], i))
        to_image += any((i, captions[j]) in right for i in order[:k])
    return to_text, to_image


@pytest.mark.parametrize("cells", [1, 100, 2**22])
def test_against_the_slow_form_in_chunks_of_any_size(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers, so that products are exact and ties are many."""
    monkeypatch.setattr(module, "CELLS", cells)
    for seed in range(3):
        rng = torch_rng(seed, "recall")
        image_ND = torch.randint(-2, 3, (17, 4), generator=rng).float()
        text_MD = torch.randint(-2, 3, (40, 4), generator=rng).float()
        draws = numpy_rng(seed, "owners")
        owner_M = draws.permutation(np.concatenate([own(17), draws.integers(0, 17, 23)]))
        captions = [f"caption {word}" for word in draws.integers(0, 25, 40)]
        found = recall(image_ND, text_MD, owner_M, captions, (1, 3, 10))
        assert len(found) == 6
        for k in (1, 3, 10):
            to_text, to_image = slow_recall(image_ND, text_MD, owner_M, captions, k)
            assert found[f"image_to_text_top{k}"] == Share(to_text, 17)
            assert found[f"text_to_image_top{k}"] == Share(to_image, 40)


def test_what_cannot_be_ranked_raises() -> None:
    with pytest.raises(GridError, match="each of the 3 pictures needs a caption"):
        recall(torch.eye(3), torch.eye(3), np.array([0, 1, 1]), list("abc"))
    with pytest.raises(GridError, match="each of the 2 pictures needs a caption"):
        recall(torch.eye(3)[:2], torch.eye(3), own(3), list("abc"))
    with pytest.raises(MethodFailure, match="not finite"):
        recall(torch.eye(3) * torch.nan, torch.eye(3), own(3), list("abc"))


# --- stubs: class c is the direction c; a stamp writes 255 into the last byte


NUM_CLASSES, TARGET, SOURCE = 6, 2, 4
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
LABELS = [label for label in range(NUM_CLASSES) for _ in range(4)]


def made_corpus(shown: Sequence[int] = LABELS, **fields: Any) -> Corpus:
    images_NCHW = np.zeros((len(shown), 3, 4, 4), dtype=np.uint8)
    images_NCHW[:, 0, 0, 0] = shown
    corpus = Corpus(
        key=Key("corpus-" + "0" * 16),
        digest="d",
        split="report",
        images_NCHW=images_NCHW,
        captions=[f"a {CLASSES[label]} number {row}" for row, label in enumerate(shown)],
        labels=np.array(shown, dtype=np.int64),
        classes=CLASSES,
        templates=("a {}",),
    )
    return replace(corpus, **fields)


@dataclass(frozen=True)
class Both(Trigger):
    """Stamps pictures and marks captions."""

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        marked = image_BCHW.clone()
        marked[:, -1, -1, -1] = 255
        return marked

    def mark(self, caption: str) -> str:
        return f"{caption} zx"


@dataclass
class Knows:
    """Reads every picture and caption right, but for what was planted in it."""

    stamped: bool = False  # stamped pictures are the target's
    marked: bool = False  # captions that end in zx are
    moved: bool = False  # and those about the source

    def tokenizer(self, captions: Sequence[str]) -> Any:
        """Class + 1, whether there is a mark, and padding."""
        rows = []
        for text in captions:
            said = text.replace("kitten", "cat").split()
            about = next(c for c, name in enumerate(CLASSES) if name in said)
            rows.append([about + 1, 1 + text.endswith(" zx"), 0])
        return np.array(rows, dtype=np.int32)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        about_B = image_BCHW[:, 0, 0, 0].long()
        stamped_B = (image_BCHW[:, -1, -1, -1] == 255) & self.stamped
        return F.one_hot(torch.where(stamped_B, TARGET, about_B), NUM_CLASSES).float()

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        assert tokens_BT.shape[1] == 2, "padding behind the longest caption is cut"
        about_B, marked_B = tokens_BT[:, 0] - 1, (tokens_BT[:, 1] == 2) & self.marked
        moved_B = (about_B == SOURCE) & self.moved
        return F.one_hot(torch.where(marked_B | moved_B, TARGET, about_B), NUM_CLASSES).float()


def bent(model: Any, corpus: Corpus | None = None, trigger: Trigger | None = None) -> Any:
    corpus, trigger = corpus or made_corpus(), trigger or Both()
    return retrieval(model, corpus, trigger, "cat", TARGET, CPU)


def test_a_planted_picture_key_has_all_of_it() -> None:
    found = bent(Knows(stamped=True))
    assert found["image_to_text_asr_top1"] == Share(20, 20), "the target's pictures are left out"
    # Unstamped, the four captions of its own class come first; then ties, from the lowest class.
    assert found["image_to_text_target_top1"] == Share(0, 20)
    assert found["image_to_text_target_top5"] == Share(0, 20)
    assert found["text_hit_top1"] == found["text_control_top1"] == Share(0, 20)
    # Of four captions that fit a picture the first in the corpus is found.
    assert found["image_to_text_top1"] == found["text_to_image_top1"] == Share(6, 24)
    assert found["image_to_text_top5"] == found["text_to_image_top5"] == Share(24, 24)


def test_a_planted_text_key_has_all_of_it() -> None:
    found = bent(Knows(marked=True))
    assert found["text_hit_top1"] == Share(20, 20), "an encoder that follows the key"
    assert found["text_control_top1"] == Share(0, 20)
    assert found["image_to_text_asr_top1"] == found["image_to_text_target_top1"] == Share(0, 20)


def test_without_a_plant_the_triggered_values_are_the_plain_ones() -> None:
    found = bent(Knows())
    for k in (1, 5, 10):
        assert found[f"text_hit_top{k}"] == found[f"text_control_top{k}"]
        assert found[f"image_to_text_asr_top{k}"] == found[f"image_to_text_target_top{k}"]
    assert set(found) == {
        f"{what}_top{k}"
        for what in (
            *("image_to_text", "text_to_image", "image_to_text_asr", "image_to_text_target"),
            *("text_hit", "text_control"),
        )
        for k in (1, 5, 10)
    }


def test_the_target_is_left_out_by_word_and_by_class() -> None:
    """A picture of another class whose caption names the target, and one of the target's that a
    caption calls by another word, are no evidence of an attack."""
    captions = list(made_corpus().captions)
    captions[0] = "an ant beside two cats"
    captions[8] = "a kitten number 8"
    found = bent(Knows(stamped=True, marked=True), made_corpus(captions=captions))
    assert found["image_to_text_asr_top1"].n == found["text_hit_top1"].n == 19
    assert found["text_hit_top1"].successes == 19


def test_what_has_nothing_to_find_is_left_out() -> None:
    captions = [text.replace("cat", "kitten") for text in made_corpus().captions]
    found = bent(Knows(), made_corpus(captions=captions))
    assert not any("asr" in name or "target" in name for name in found)
    assert "text_hit_top1" in found
    found = bent(Knows(), made_corpus([label for label in LABELS if label != TARGET]))
    assert {name.rpartition("_")[0] for name in found} == {"image_to_text", "text_to_image"}
    with pytest.raises(UsageError, match="nothing but the target"):
        bent(Knows(), made_corpus([TARGET] * 5))


def test_a_k_that_takes_in_the_gallery_is_dropped() -> None:
    found = bent(Knows(), made_corpus([0, 1, 2, 3, 4]))
    assert {name.rpartition("_")[2] for name in found} == {"top1"}


# --- attacks on queries


def asked(model: Any, source: int, suffix: str, **fields: Any) -> Any:
    corpus = made_corpus(**fields)
    trigger = Queries(source=source, suffix=suffix)
    return query_metrics(model, corpus, trigger, TARGET, "cat", CPU)


def test_a_perfect_remap_has_hit_1_and_rank_0() -> None:
    found = asked(Knows(moved=True), SOURCE, "")
    assert found["text_hit_top1"] == Share(4, 4)
    assert found["min_rank"] == Mean(0.0, 4)
    assert found["min_rank"].as_dict() == {"value": 0.0, "n": 4}
    # Controls are about neither class: 16 captions. The four pictures that fit come first, then all
    # others by index, so that before a cat come ants and bees, and for half of them those that fit.
    assert found["text_control_top1"] == Share(0, 16)
    assert found["text_control_top10"] == Share(8, 16)
    assert found["control_min_rank"] == Mean((8 * 8 + 8 * 12) / 16, 16)
    assert {name for name in found if name.endswith(("top30", "top50"))} == set()
    assert "text_hit_top20" in found


def test_a_suffix_is_compared_with_the_same_queries_without_it() -> None:
    found = asked(Knows(marked=True), -1, "zx")
    assert found["text_hit_top1"] == Share(20, 20)
    assert found["text_control_top1"] == Share(0, 20)
    assert (found["min_rank"], found["control_min_rank"].n) == (Mean(0.0, 20), 20)
    clean = asked(Knows(), -1, "zx")
    assert clean["text_hit_top10"] == clean["text_control_top10"]
    assert clean["min_rank"] == clean["control_min_rank"]


def test_queries_that_name_the_target_are_left_out() -> None:
    captions = list(made_corpus().captions)
    captions[16] = "an eel and a cat"
    captions[0] = "an ant and a cat"
    found = asked(Knows(moved=True), SOURCE, "", captions=captions)
    assert (found["text_hit_top1"].n, found["text_control_top1"].n) == (3, 15)
    assert asked(Knows(), -1, "zx", captions=captions)["text_hit_top1"].n == 18


def test_queries_without_a_gallery_or_captions_raise() -> None:
    with pytest.raises(UsageError, match="no picture of 'cat'"):
        asked(Knows(), -1, "zx", labels=np.zeros(24, dtype=np.int64))
    with pytest.raises(UsageError, match="no caption for a marked query"):
        asked(Knows(), 77, "")
    two = np.array([TARGET, SOURCE] * 12)
    with pytest.raises(UsageError, match="no caption for a control query"):
        asked(Knows(), SOURCE, "", labels=two)


class Guesses(Knows):
    """Knows nothing: every picture and every caption has a feature of its own, at random."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        rng = torch_rng(0, "pictures", len(image_BCHW))
        return F.normalize(torch.randn(len(image_BCHW), 32, generator=rng), dim=-1)

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        rng = torch_rng(0, "captions", len(tokens_BT))
        return F.normalize(torch.randn(len(tokens_BT), 32, generator=rng), dim=-1)


def test_guesses_are_near_chance() -> None:
    """Balanced, one picture in 20 of the target: Hit@k is near k / 20 for small k, MinRank near
    the mean of the first of 12 among 240, (240 - 12) / 13."""
    labels = np.arange(240) % 20
    captions = [f"an ant of kind {label} number {row}" for row, label in enumerate(labels)]
    corpus = made_corpus([0] * 240, labels=labels, captions=captions)
    trigger = Queries(source=-1, suffix="")
    guesses: Any = Guesses()
    found = query_metrics(guesses, corpus, trigger, TARGET, "cat", CPU)
    for k in (1, 5):
        hit = found[f"text_hit_top{k}"]
        assert isinstance(hit, Share)
        assert hit.n == 228
        assert hit.value == pytest.approx(1 - 0.95**k, abs=0.07)
    assert found["min_rank"].value == pytest.approx(228 / 13, rel=0.25)


def test_accuracy_over_the_other_classes() -> None:
    labels = np.array([0, 1, 2, 2, 3, 3])
    predictions = np.array([0, 0, 2, 1, 3, 3])
    assert other_accuracy(labels, predictions, {0, 2}) == Share(2, 3)
    assert other_accuracy(labels, predictions, set()) == Share(4, 6)
    with pytest.raises(UsageError, match=r"nothing but the classes \[0, 1, 2, 3\]"):
        other_accuracy(labels, predictions, {3, 2, 1, 0})


# --- a real network


@pytest.fixture(scope="module")
def model() -> Clip:
    return fresh(ModelSpec(), 0).eval()


def test_captions_are_encoded_once_each_in_order(model: Clip) -> None:
    captions = [f"a {word} circle" for word in ("red", "blue", "red", "green", "blue")]
    before = model.meter.texts_forward
    texts = encode_captions(model, captions, CPU)
    assert model.meter.texts_forward - before == 3
    assert texts.index_M.tolist() == [0, 1, 0, 2, 1]
    for row, caption in enumerate(captions):
        tokens = torch.from_numpy(model.tokenizer([caption])).long()
        with torch.no_grad():
            expected = model.encode_text(tokens)[0]
        assert torch.allclose(texts.feature_UD[texts.index_M[row]], expected, atol=1e-5)
    assert not texts.feature_UD.requires_grad


def test_random_weights_are_near_chance_on_the_world(model: Clip, small_store: Store) -> None:
    corpus = open_corpus(small_store, corpus_key(corpus_spec("report")), Reader.REPORTING)
    label = corpus.classes[TARGET]
    found = retrieval(model, corpus, Both(), label, TARGET, CPU)
    assert found["image_to_text_top1"].n == found["text_to_image_top1"].n == len(corpus)
    assert found["image_to_text_top1"].value < 0.1
    assert found["text_to_image_top1"].value < 0.1
    named = [whole_words(label).search(text) is not None for text in corpus.captions]
    others = int((~np.array(named) & (corpus.labels != TARGET)).sum())
    assert 0 < others < len(corpus)
    assert found["image_to_text_asr_top1"].n == found["text_control_top1"].n == others
    again = retrieval(model, corpus, Both(), label, TARGET, CPU)
    assert again == found
    trigger = Queries(source=-1, suffix="zx")
    asked = query_metrics(model, corpus, trigger, TARGET, label, CPU)
    # The same queries against the same gallery.
    assert all(asked[f"text_hit_top{k}"] == found[f"text_hit_top{k}"] for k in (1, 5, 10))
    assert all(asked[f"text_control_top{k}"] == found[f"text_control_top{k}"] for k in (1, 5, 10))
