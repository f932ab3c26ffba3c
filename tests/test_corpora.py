"""Corpora and views: read-only bytes, edits applied when rows are read, splits that stay shut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.badnet import BadNet
from attacks.base import Attack, Goal, Knowledge, poison, poisoned_view
from attacks.blended import Blended, Pattern
from attacks.sig import Sig
from tests.conftest import ROWS, corpus_spec
from victims.batches import Batch, Loader, caption_lengths, score_rows
from victims.corpora import (
    MAY_OPEN,
    Corpus,
    Edits,
    Reader,
    Show,
    View,
    annotate,
    corpus_key,
    open_corpus,
    subset,
    whole,
    with_text,
    write_corpus,
)
from victims.errors import Forbidden, GridError
from victims.lab import Lab
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import Runtime
from victims.rewrite import EdaMode, eda_text
from victims.store import Store
from victims.world import CLASSES, TEMPLATES, World, render

CPU = torch.device("cpu")


def opened(store: Store, split: str = "suspect") -> Corpus:
    return open_corpus(store, corpus_key(corpus_spec(split)), Reader.REPORTING)


# --- corpora


def test_a_corpus_holds_the_rows_that_were_rendered(small_store: Store) -> None:
    corpus, expected = opened(small_store, "clean"), render(World(), "clean", ROWS["clean"])
    assert np.array_equal(corpus.images_NCHW, expected.image_BCHW)
    assert list(corpus.captions) == expected.captions
    assert corpus.labels.tolist() == expected.labels.tolist()
    assert (list(corpus.classes), list(corpus.templates)) == (list(CLASSES), list(TEMPLATES))
    assert (len(corpus), corpus.size, corpus.split) == (ROWS["clean"], 32, "clean")


def test_a_corpus_is_mapped_and_cannot_be_written(small_store: Store) -> None:
    corpus = opened(small_store)
    assert isinstance(corpus.images_NCHW, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus.images_NCHW[0] = 0


def test_the_digest_follows_pictures_captions_and_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = Made(rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8), ("a", "b", "c", "d"))
    brighter = base.image_BCHW.copy()
    brighter[3, 2, 7, 7] ^= 1
    changes: list[Made] = [
        base,
        replace(base, image_BCHW=brighter),
        replace(base, captions=("a", "b", "c", "e")),
        replace(base, labels=np.array([0, 1, 2, 1])),
    ]
    digests = []
    for number, made in enumerate(changes):
        (folder := tmp_path / str(number)).mkdir()
        digests.append(write_corpus(folder, made)["digest"])
    assert len(set(digests)) == len(changes)


@dataclass(frozen=True)
class Made:
    """A corpus of given rows."""

    name: ClassVar[str] = "made"
    image_BCHW: Any
    captions: Sequence[str]
    labels: Any = None
    split: str = "suspect"
    num_rows: int = 4
    classes: ClassVar[Sequence[str]] = ("x", "y", "z")
    templates: ClassVar[Sequence[str]] = ("a {}",)

    def chunks(self) -> Iterator[Any]:
        labels = np.array([0, 1, 2, 0]) if self.labels is None else self.labels
        yield replace(self, labels=labels)


def test_too_few_rows_make_no_corpus(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = Made(np.zeros((4, 3, 8, 8), dtype=np.uint8), ("a", "b", "c", "d"), num_rows=5)
    with pytest.raises(GridError, match="4 of 5 rows"):
        store.get_or_make("corpus-0123456789abcdef", lambda folder: write_corpus(folder, made))
    assert store.keys("corpus") == set()


# --- who may open what


@pytest.mark.parametrize("reader", Reader)
@pytest.mark.parametrize("split", ROWS)
def test_a_reader_opens_its_splits_and_no_other(
    small_store: Store, reader: Reader, split: str
) -> None:
    allowed = {
        Reader.TRAINING: ("public", "suspect", "clean"),
        Reader.TUNING: ("public", "suspect", "clean", "tuning"),
        Reader.REPORTING: tuple(ROWS),
    }[reader]
    key = corpus_key(corpus_spec(split))
    if split in allowed:
        assert len(open_corpus(small_store, key, reader)) == ROWS[split]
    else:
        with pytest.raises(Forbidden, match=f"{reader} code asked for the {split} split"):
            open_corpus(small_store, key, reader)


def test_an_unknown_split_opens_for_nobody_but_by_decision() -> None:
    assert set().union(*MAY_OPEN.values()) == set(ROWS)


# --- poisoned views

ATTACKS: dict[str, Attack] = {
    "badnet": BadNet(patch=6),
    "badnet-redrawn": BadNet(patch=6, redraw=True),
    "blended": Blended(),
    "blended-redrawn": Blended(pattern=Pattern.REDRAW_NOISE),
    "sig": Sig(),
}


def poisoned(store: Store, attack: Attack, count: int = 40) -> tuple[View, set[int], Any]:
    corpus = opened(store)
    goal = Goal(target=1, label=CLASSES[1], templates=TEMPLATES)
    held = Knowledge(corpus=corpus, goal=goal, seed=7)
    trigger = attack.craft(Lab(store, ModelSpec(), Runtime()), held, corpus.size)
    data = poison(attack, held, count).data
    key = corpus_key(corpus_spec("suspect"))
    return poisoned_view(key, corpus, data, trigger), set(data.edits.rows.tolist()), trigger


@pytest.mark.parametrize("name", ATTACKS)
def test_exactly_the_poisoned_rows_show_the_stamp(small_store: Store, name: str) -> None:
    view, rows, trigger = poisoned(small_store, ATTACKS[name])
    positions = np.arange(len(view))
    seen_NCHW = view.reader(CPU)(positions)
    clean_NCHW = torch.from_numpy(np.array(view.corpus.images_NCHW))
    differs = (seen_NCHW != clean_NCHW).flatten(1).any(1)
    assert set(differs.nonzero().flatten().tolist()) == rows
    chosen = torch.tensor(sorted(rows))
    assert torch.equal(seen_NCHW[chosen], trigger.stamp_train(clean_NCHW[chosen]))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_row_shows_the_same_bytes_in_every_batch_and_epoch(small_store: Store, name: str) -> None:
    view, rows, _ = poisoned(small_store, ATTACKS[name])
    read = view.reader(CPU)
    once = read(np.arange(len(view)))
    poisoned_first = np.array(sorted(rows) + [r for r in range(len(view)) if r not in rows])
    for order in (poisoned_first, np.random.default_rng(1).permutation(len(view))):
        for size in (1, 7, len(view)):
            batch = read(order[:size])
            assert torch.equal(batch, once[torch.from_numpy(order[:size])])
    assert torch.equal(view.reader(CPU)(np.arange(len(view))), once), "another epoch's reader"


def test_reading_poison_leaves_the_corpus_as_it_was(small_store: Store) -> None:
    path = small_store.need(corpus_key(corpus_spec("suspect"))).path("images.npy")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    view, _, trigger = poisoned(small_store, ATTACKS["badnet"])
    image = view.reader(CPU)(np.arange(16))
    image.zero_()
    assert int(view.reader(CPU)(np.arange(16)).max()) > 0, "a batch is a window on the corpus"
    kept = torch.from_numpy(np.array(view.corpus.images_NCHW[:16]))
    again = kept.clone()
    trigger.stamp(kept)
    assert torch.equal(kept, again), "a stamp wrote into its input"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_captions_are_edited_where_poisoned_and_nowhere_else(small_store: Store) -> None:
    view, rows, _ = poisoned(small_store, ATTACKS["badnet"])
    captions, own = view.captions(), view.corpus.captions
    changed = {row for row in range(len(view)) if captions[row] != own[row]}
    assert changed <= rows
    assert len(changed) > len(rows) / 2
    assert all(CLASSES[1] in captions[row] for row in rows)


def test_a_caption_may_be_edited_away(small_store: Store) -> None:
    corpus = opened(small_store)
    shows = np.full(2, Show.STAMPED, dtype=np.int8)
    edits = Edits(np.array([2, 5]), ["", "x"], np.array([2, 5]), shows)
    view = replace(whole(corpus), edits=edits, stamps={Show.STAMPED: lambda image: 255 - image})
    assert view.captions()[2] == ""
    assert view.captions()[5] == "x"
    assert view.captions()[3] == corpus.captions[3]


def test_edits_follow_their_rows_into_a_subset(small_store: Store) -> None:
    view, rows, _ = poisoned(small_store, ATTACKS["sig"])
    chosen = np.array([*sorted(rows)[:3], *(r for r in range(20) if r not in rows)])[::-1].copy()
    part = subset(view, chosen)
    assert len(part) == len(chosen)
    assert part.captions() == [view.captions()[r] for r in chosen]
    own = part.reader(CPU)(np.arange(len(part)))
    assert torch.equal(own, view.reader(CPU)(chosen))
    assert subset(part, np.array([1])).captions() == [view.captions()[chosen[1]]]


def test_a_subset_of_everything_is_the_view_itself(small_store: Store) -> None:
    view = whole(opened(small_store))
    assert subset(view, np.arange(len(view))) is view
    keys = {
        subset(view, rows).key
        for rows in (np.arange(10), np.arange(9), np.arange(10)[::-1].copy(), np.array([0, 0]))
    }
    assert len(keys) == 4
    assert view.key not in keys
    for bad in (np.array([len(view)]), np.array([-1])):
        with pytest.raises(GridError, match=r"positions must lie in 0\.\.511"):
            subset(view, bad)


# --- columns, texts, batches


def test_columns_are_keyed_by_their_bytes(small_store: Store) -> None:
    view = whole(opened(small_store))
    zeros, ones = np.zeros(len(view), np.float32), np.ones(len(view), np.float32)
    keys = [
        view.key,
        annotate(view, {"weight": zeros}).key,
        annotate(view, {"weight": ones}).key,
        annotate(view, {"other": zeros}).key,
        annotate(view, {"weight": zeros.astype(np.int32)}).key,
        annotate(view, {"weight": zeros.reshape(-1, 1)}).key,
    ]
    assert len(set(keys)) == len(keys)
    assert annotate(view, {"weight": zeros.copy()}).key == keys[1]
    with pytest.raises(GridError, match="weight has 3 values for 512 rows"):
        annotate(view, {"weight": zeros[:3]})


@pytest.fixture(scope="module")
def model() -> Clip:
    return fresh(ModelSpec(), 0)


def test_a_batch_holds_what_belongs_to_its_rows(small_store: Store, model: Clip) -> None:
    view = whole(opened(small_store))
    view = annotate(view, {"row": np.arange(len(view)), "half": np.arange(len(view)) / 2})
    view = subset(view, np.array([40, 7, 300, 8]))
    view = with_text(view, {"eda": eda_text(EdaMode.STATIC, "lexicon", 0)})
    loader = Loader(view, model, CPU)
    loader.begin_epoch(0)
    batch = loader(np.array([2, 0]))
    assert batch.rows.tolist() == [2, 0]
    assert batch.columns["row"].tolist() == [300, 40]
    assert batch.columns["half"].tolist() == [150.0, 20.0]
    assert torch.equal(batch.image, torch.from_numpy(view.corpus.images_NCHW[[300, 40]]))
    full = torch.from_numpy(model.tokenizer([view.corpus.captions[r] for r in (300, 40)])).long()
    width = batch.tokens.shape[1]
    assert torch.equal(batch.tokens, full[:, :width])
    assert not full[:, width:].any(), "words were cut off"
    assert bool((batch.tokens[:, -1] != 0).any()), "cut after the longest caption"
    assert set(batch.texts) == {"eda"}
    assert len(batch) == 2
    names = set(batch.__dataclass_fields__)
    assert names == {"rows", "image", "tokens", "texts", "columns", "views"}, "T26: no truth in it"


@pytest.mark.parametrize(("mode", "changes"), [(EdaMode.STATIC, False), (EdaMode.PER_EPOCH, True)])
def test_texts_are_drawn_once_or_every_epoch(
    small_store: Store, model: Clip, mode: EdaMode, changes: bool
) -> None:
    view = with_text(whole(opened(small_store)), {"eda": eda_text(mode, "lexicon", 0)})
    loader, rows = Loader(view, model, CPU), np.arange(256)
    seen = []
    for epoch in (0, 1, 0):
        loader.begin_epoch(epoch)
        batch = loader(rows)
        seen.append([[t for t in row if t] for row in batch.texts["eda"].tolist()])
        assert batch.tokens.tolist() != batch.texts["eda"].tolist()
    assert seen[0] == seen[2]
    assert (seen[0] != seen[1]) == changes


def test_padding_changes_no_caption_feature(model: Clip) -> None:
    """Tokens are cut after the longest caption of a batch, which differs from batch to batch."""
    tokens = torch.from_numpy(model.tokenizer(["a photo of a circle", "a star"])).long()
    model.eval()
    with torch.no_grad():
        cut = model.encode_text(tokens[1:, :4])
        full = torch.nn.functional.normalize(model.net.encode_text(tokens), dim=-1)
    assert torch.allclose(model.encode_text(tokens), full, atol=1e-6)
    assert torch.allclose(cut, full[1:], atol=1e-6)


def test_the_length_of_a_caption_counts_to_its_last_token() -> None:
    """Byte-pair tables give the id of padding to ``!`` as well: counting ids other than 0 cut the
    end token off captions that shout.
    """
    tokens = np.array([[5, 0, 0, 7, 9, 0], [5, 6, 9, 0, 0, 0], [5, 6, 7, 8, 4, 9]], dtype=np.int32)
    assert caption_lengths(tokens).tolist() == [5, 3, 6]


@dataclass(frozen=True)
class Row:
    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        return batch.rows.float()


def test_scores_come_in_row_order_and_leave_the_mode(small_store: Store, model: Clip) -> None:
    view = whole(opened(small_store))
    model.train()
    assert score_rows(model, view, Row(), batch_size=100).tolist() == list(range(512))
    assert model.training
    assert len(score_rows(model, subset(view, np.arange(0)), Row())) == 0
