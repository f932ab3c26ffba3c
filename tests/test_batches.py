"""Batches that are read ahead are the batches that were asked for."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_training import IN_MODAL, RECIPE, assert_same, state, view_of
from victims.batches import Batch, Loader, score_rows
from victims.corpora import Edits, Show, View, annotate, with_text
from victims.models import BpeTokenizer, ModelSpec, fresh
from victims.outliers import TextEmbeddings
from victims.pictures import Pictures
from victims.recipe import Runtime
from victims.rewrite import EdaMode, eda_text
from victims.selection import TextFeatures
from victims.store import Store
from victims.tokens import Remembered
from victims.training import Fit

CPU = torch.device("cpu")


def poisoned(store: Store) -> View:
    """32 rows with a column, other captions each epoch, two stamped pictures and a borrowed one."""
    view = with_text(view_of(store, 32), {"eda": eda_text(EdaMode.PER_EPOCH, "lexicon", 0)})
    edits = Edits(
        np.array([3, 7, 9]),
        ["a red circle"] * 3,
        np.array([3, 7, 20]),
        np.array([Show.STAMPED, Show.COVER, Show.PLAIN], dtype=np.int8),
    )
    stamps = {Show.STAMPED: torch.bitwise_not, Show.COVER: lambda image_BCHW: image_BCHW // 2}
    return annotate(replace(view, edits=edits, stamps=stamps), {"number": np.arange(32)})


def assert_same_batches(one: Batch, other: Batch) -> None:
    for name in ("rows", "image", "tokens"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("texts", "columns"):
        assert_same(getattr(one, name), getattr(other, name))


def test_a_batch_that_was_expected_is_the_one_that_is_asked_for(small_store: Store) -> None:
    view, model = poisoned(small_store), fresh(ModelSpec(), 3)
    plain, ahead = (Loader(view, model, CPU, ahead=ahead) for ahead in (False, True))
    order = np.random.default_rng(0).permutation(32)
    for epoch in range(2):
        for loader in (plain, ahead):
            loader.begin_epoch(epoch)
        for start in range(0, 32, 8):
            rows = order[start : start + 8]
            found = ahead(rows)
            ahead.expect(order[start + 8 : start + 16] if start < 16 else order[:3])
            assert_same_batches(found, plain(rows))
    assert found.texts
    assert found.columns
    assert plain.waited_seconds > 0
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_captions_that_were_read_ahead_are_not_those_of_the_next_epoch(small_store: Store) -> None:
    view, model = poisoned(small_store), fresh(ModelSpec(), 3)
    plain, ahead = (Loader(view, model, CPU, ahead=ahead) for ahead in (False, True))
    for loader in (plain, ahead):
        loader.begin_epoch(0)
        loader.expect(np.arange(32))
        loader.begin_epoch(1)
    assert_same_batches(ahead(np.arange(32)), plain(np.arange(32)))


def test_a_fit_that_reads_ahead_ends_at_the_same_bits(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted() -> Fit:
        torch.manual_seed(99)
        model = fresh(ModelSpec(), 3)
        view = with_text(
            view_of(small_store, 100), {"eda": eda_text(EdaMode.PER_EPOCH, "lexicon", 0)}
        )
        fit = Fit(model, view, IN_MODAL.build(model), RECIPE, runtime=Runtime())
        fit()
        return fit

    def ahead(*given: object) -> Loader:
        return Loader(*given, ahead=True)  # type: ignore[arg-type]

    plain = fitted()
    monkeypatch.setattr("victims.training.Loader", ahead)
    assert_same(state(plain), state(fitted()))


def test_what_reading_ahead_meets_is_raised_where_the_batch_is_asked_for(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(view_of(small_store, 8), fresh(ModelSpec(), 3), CPU, ahead=True)
    monkeypatch.setattr(Pictures, "read", lambda *given, **named: 1 / 0)
    loader.expect(np.arange(4))
    with pytest.raises(ZeroDivisionError):
        loader(np.arange(4))
    loader.close()


def test_pages_are_asked_for_wherever_a_picture_lies(tmp_path: Path) -> None:
    """Rows that begin and end within pages, the last one at the file's end; and arrays in memory,
    for which there is nothing to ask."""
    images_NCHW = np.random.default_rng(0).integers(0, 256, (9, 3, 50, 50), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images_NCHW)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r", allow_pickle=False)
    for found in (mapped, images_NCHW):
        pictures = Pictures(found, np.arange(9)[::-1].copy())
        assert (pictures._mapped is not None) == isinstance(found, np.memmap)
        pictures.ask(np.arange(9))
        assert np.array_equal(pictures.read(np.array([0, 8, 8])), images_NCHW[[8, 0, 0]])
    with pytest.raises(IndexError, match=r"pictures 9\.\.9 of 9"):
        Pictures(images_NCHW, np.arange(10)).read(np.array([9]))


def test_a_scorer_of_captions_reads_no_picture(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, model = view_of(small_store), fresh(ModelSpec(), 0).eval()
    tokens_NT = torch.from_numpy(model.tokenizer(view.captions())).long()
    with torch.no_grad():
        feature_ND, embedding_ND = model.encode_text(tokens_NT), model.embed_text(tokens_NT)
    read = list[int]()
    monkeypatch.setattr(Pictures, "read", lambda self, rows, **_: read.append(len(rows)))
    monkeypatch.setattr(Pictures, "ask", lambda self, rows: read.append(len(rows)))
    found = score_rows(model, view, TextFeatures())
    np.testing.assert_allclose(found, feature_ND.numpy(), atol=1e-6)
    found = score_rows(model, view, TextEmbeddings())
    np.testing.assert_allclose(found, embedding_ND.numpy(), atol=1e-5)
    assert read == []


def test_a_caption_is_tokenised_once_and_gives_the_same_ids() -> None:
    asked = list[list[str]]()

    def tokenize(captions: list[str]) -> np.ndarray:
        asked.append(captions)
        # The end of a caption is 9; a 0 before it is a token like others.
        token_NT = np.zeros((len(captions), 6), dtype=np.int32)
        for row, caption in enumerate(captions):
            token_NT[row, : len(caption) + 1] = [*(ord(letter) - ord("a") for letter in caption), 9]
        return token_NT

    kept = Remembered(tokenize, most=4)
    for captions in (["ab", "", "ba"], ["ba", "ab", "ab"], ["aaaaa", "ba"], ["cd"], ["ab"], []):
        np.testing.assert_array_equal(kept(captions), tokenize(captions))
        asked.pop()
    # Four are kept; the fifth has all of them forgotten.
    assert asked == [["ab", "", "ba"], ["aaaaa"], ["cd"], ["ab"], []]
    many = [letter * 2 for letter in "abcdefg"]
    np.testing.assert_array_equal(kept(many), tokenize(many))


def test_byte_pairs_of_the_same_captions_are_looked_up_once_per_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import open_clip

    own = open_clip.get_tokenizer("ViT-B-32")
    captions = ["a photo of a snail, nobody said that before!", "!", "", "x" * 400]
    first = BpeTokenizer("ViT-B-32")(captions)
    np.testing.assert_array_equal(first, own(captions).numpy())
    monkeypatch.setattr(type(own), "encode", None)
    np.testing.assert_array_equal(BpeTokenizer("ViT-B-32")(captions[::-1]), first[::-1])
