"""Choosing a learning rate on held-out pairs: the metric, the rule, and what `lab.train` makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import corpus_spec
from victims import selection
from victims.corpora import build_corpus, corpus_key
from victims.errors import GridError
from victims.lab import DataRef, Lab, ModelRef
from victims.models import ModelSpec, fresh
from victims.recipe import Recipe, Runtime, Select
from victims.rewrite import EdaMode, eda_text
from victims.selection import choose, retrieved
from victims.store import Store
from victims.training import Fit, PlainClipSpec

RECIPE = Recipe(epochs=1, batch_size=16, lr=1e-3, warmup_steps=2, seed=3)
HOW = Select(rates=(1e-3, 1e-2, 1e-5), floor=8)


def slow_hits(image: np.ndarray, text: np.ndarray, captions: list[str]) -> list[float]:
    """Mean ranks, query by query."""
    found = []
    for i, caption in enumerate(captions):
        hits = []
        for query, answers in ((image[i], text), (text[i], image)):
            scores = [float(query @ answer) for answer in answers]
            best = max(s for s, c in zip(scores, captions, strict=True) if c == caption)
            wrong = [s for s, c in zip(scores, captions, strict=True) if c != caption]
            above, tied = sum(s > best for s in wrong), sum(s == best for s in wrong)
            hits.append(1 + above + tied / 2 <= 1)
        found.append(sum(hits) / 2)
    return found


@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_retrieval_is_the_mean_rank_query_by_query(num_pairs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Small whole numbers: ties come up often.
    image, text = rng.integers(-1, 2, (2, num_pairs, 3)).astype(np.float32)
    captions = [f"caption {i}" for i in rng.integers(0, 4, num_pairs)]
    assert retrieved(image, text, captions).tolist() == slow_hits(image, text, captions)


def test_retrieval_in_blocks_is_retrieval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    image, text = rng.normal(size=(2, 90, 4)).astype(np.float32).round(1)
    captions = [f"caption {i}" for i in rng.integers(0, 30, 90)]
    at_once = slow_hits(image, text, captions)
    largest = list[int]()
    where = np.where

    def seen(condition: Any, *rest: Any) -> Any:
        largest.append(condition.size)
        return where(condition, *rest)

    monkeypatch.setattr(selection, "BLOCK", 1000)
    monkeypatch.setattr(np, "where", seen)
    assert retrieved(image, text, captions).tolist() == at_once
    assert 0 < max(largest) <= 1000, "more similarities than a block were held at once"


def test_retrieval_by_hand() -> None:
    eye = np.eye(3, dtype=np.float32)
    names = ["a circle", "a star", "a tree"]
    assert retrieved(eye, eye, names).tolist() == [1, 1, 1]
    assert retrieved(eye, eye[[1, 0, 2]], names).tolist() == [0, 0, 1]
    equal = ["a circle", "a circle", "a tree"]
    assert retrieved(eye, eye[[1, 0, 2]], equal).tolist() == [1, 1, 1], "equal captions are right"
    collapsed = np.ones((3, 3), dtype=np.float32)
    assert retrieved(collapsed, collapsed, names).tolist() == [0, 0, 0], "a tie is no hit"


def test_the_largest_rate_within_a_standard_error_of_the_best_is_taken() -> None:
    hits = [np.array([1.0] * k + [0.0] * (100 - k)) for k in (50, 60, 58, 55, 10)]
    found = choose((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), hits)
    assert found["metric"] == [0.5, 0.6, 0.58, 0.55, 0.1]
    # sqrt(0.6 * 0.4 / 99): 0.58 is within 0.049 of the best and 0.55 is not.
    assert found["standard_error"] == pytest.approx(np.sqrt(0.24 / 99))
    assert (found["chosen"], found["held_out"]) == (1e-3, 100)
    assert choose((1e-2, 1e-4), [hits[4], hits[1]])["chosen"] == 1e-4, "rates in any order"


@pytest.mark.parametrize(
    ("num_rows", "count"), [(100_000, 2_000), (2_000, 200), (400, 100), (10_000, 200)]
)
def test_how_many_rows_are_held_out(num_rows: int, count: int) -> None:
    assert Select().num_held_out(num_rows) == count


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rates": ()}, "rates must be positive and distinct"),
        ({"rates": (1e-3, 1e-3)}, "rates must be positive and distinct"),
        ({"rates": (0.0, 1e-3)}, "rates must be positive and distinct"),
        ({"share": 0.5}, r"share must lie in \(0, 0.25\], got 0.5"),
        ({"floor": 1}, "floor must be at least 2 rows"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Select(**fields)  # type: ignore[arg-type]


# --- in the lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    store = Store(tmp_path / "store")
    for split in ("clean", "report"):
        build_corpus(store, corpus_spec(split, 128))
    return Lab(store, ModelSpec(), Runtime())


def clean(lab: Lab) -> DataRef:
    return DataRef(corpus_key(corpus_spec("clean", 128)), 128)


def start(lab: Lab) -> ModelRef:
    return lab.train(PlainClipSpec(), clean(lab), replace(RECIPE, seed=1))


def test_every_rate_is_fitted_on_the_rest_and_one_is_taken(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, seen = start(lab), list[tuple[float, frozenset[int]]]()
    plain = Fit.__call__

    def spy(self: Fit) -> object:
        seen.append((self.recipe.rate, frozenset(self.view.rows.tolist())))
        return plain(self)

    monkeypatch.setattr(Fit, "__call__", spy)
    recipe = replace(RECIPE, lr=HOW)
    found = lab.train(PlainClipSpec(), clean(lab), recipe, init=init)
    assert [rate for rate, _ in seen] == [1e-3, 1e-2, 1e-5]
    (rows,) = {rows for _, rows in seen}
    assert len(rows) == 128 - 8, "no fit sees the held-out rows"
    (choice,) = lab.ledger.choices.values()
    assert choice["held_out"] == 8
    assert choice["rates"] == [1e-3, 1e-2, 1e-5]
    # The model is the fit on the rest at the chosen rate, not another one on all rows.
    rest = lab.subset(clean(lab), np.array(sorted(rows)))
    assert found == lab.train(
        PlainClipSpec(), rest, replace(RECIPE, lr=choice["chosen"]), init=init
    )
    # What was not chosen was paid for, too.
    fits = [c for key, c in lab.ledger.costs.items() if "steps" in c and key != init.key]
    assert len(fits) == 3
    assert lab.ledger.total()["steps"] == sum(c["steps"] for c in fits) + 8


def test_whatever_lies_beside_the_pairs_the_same_ones_are_held_out(lab: Lab) -> None:
    data, recipe = clean(lab), replace(RECIPE, lr=HOW)
    held = lab.held_out(data, recipe).tolist()
    assert len(held) == 8
    marked = lab.annotate(data, weight=np.ones(len(data), np.float32))
    rewritten = lab.with_text(data, eda=eda_text(EdaMode.STATIC, "lexicon", 0))
    assert len({data.key, marked.key, rewritten.key}) == 3
    for other in (marked, rewritten):
        assert lab.held_out(other, recipe).tolist() == held
    fewer = lab.subset(data, np.arange(1, 128))
    assert (lab.held_out(fewer, recipe) + 1).tolist() != held, "other rows, another draw"
    assert lab.held_out(data, replace(recipe, seed=4)).tolist() != held
    assert lab.held_out(data, RECIPE).tolist() == [], "a named rate needs none"


def test_the_rows_that_may_be_held_out_can_be_named(lab: Lab) -> None:
    named = np.arange(64, 128)
    lab.train(PlainClipSpec(), clean(lab), replace(RECIPE, lr=HOW), held_out=named)
    held = [view for view in lab._views.values() if len(view) == 8]
    assert held
    assert all(set(view.rows.tolist()) <= set(named.tolist()) for view in held)


def test_a_choice_is_made_once(lab: Lab) -> None:
    recipe = replace(RECIPE, lr=HOW)
    first = lab.train(PlainClipSpec(), clean(lab), recipe)
    made = list(lab.ledger.made)
    again = Lab(lab.store, ModelSpec(), Runtime())
    assert again.train(PlainClipSpec(), clean(again), recipe) == first
    assert again.ledger.made == []
    assert again.ledger.choices == lab.ledger.choices
    assert again.ledger.total() == lab.ledger.total()
    other = Lab(lab.store, ModelSpec(), Runtime())
    other.train(PlainClipSpec(), clean(other), replace(recipe, lr=replace(HOW, floor=9)))
    assert set(other.ledger.choices) != set(lab.ledger.choices), "the rule is in the key"
    assert made


def test_too_few_rows_are_refused(lab: Lab) -> None:
    with pytest.raises(GridError, match="lr: select: 4 rows are too few"):
        lab.train(PlainClipSpec(), clean(lab), replace(RECIPE, lr=HOW), held_out=np.arange(4))


def test_an_unresolved_rate_is_no_number() -> None:
    with pytest.raises(GridError, match=r"resolved by `Lab\.train`"):
        _ = replace(RECIPE, lr=HOW).rate


def test_the_choice_looks_at_no_other_split(lab: Lab) -> None:
    """T36: no trigger and no evaluation split can be part of it: they are not among its inputs."""
    read: list[str] = []
    need = lab.store.need
    lab.store.need = lambda key: read.append(key) or need(key)  # type: ignore[method-assign,func-returns-value]
    lab.train(PlainClipSpec(), clean(lab), replace(RECIPE, lr=HOW))
    assert corpus_key(corpus_spec("report", 128)) not in read
    assert {key.rsplit("-", 1)[0] for key in read} <= {"corpus", "model", "score", "selection"}


def test_a_fresh_model_finds_nothing() -> None:
    model = fresh(ModelSpec(), 0)
    with torch.no_grad():
        image_BD = model.encode_image(torch.zeros(6, 3, 32, 32, dtype=torch.uint8)).numpy()
    text_BD = np.repeat(image_BD[:1], 6, axis=0)
    names = [f"caption {i}" for i in range(6)]
    assert retrieved(image_BD, text_BD, names).sum() == 0
