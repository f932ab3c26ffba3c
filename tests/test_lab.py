"""The workbench: what is done once is found again, and a handle tells nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from grid.work import LeftOff
from tests.conftest import corpus_spec
from victims.batches import Batch
from victims.corpora import View, build_corpus, corpus_key
from victims.errors import Forbidden, GridError
from victims.lab import DataRef, Lab, Ledger, ModelRef, Watch, memo, model_key
from victims.losses import clip_loss
from victims.models import Clip, ModelSpec
from victims.recipe import Clock, OptimizerState, Recipe, Runtime
from victims.rewrite import EdaMode, eda_text
from victims.store import Artefact, Busy, Damaged, Store
from victims.training import Objective, PlainClipSpec

RECIPE = Recipe(epochs=1, batch_size=64, lr=1e-3, warmup_steps=0)
CLEAN = DataRef(corpus_key(corpus_spec("clean")), 256)
RUNS: list[str] = []


@dataclass(frozen=True)
class MeanLevel:
    """Mean level of each picture: a score whose right value is known."""

    name: ClassVar[str] = "mean_level"
    version: ClassVar[int] = 1
    scale: float = 1.0

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        RUNS.append("score")
        return batch.image.float().mean((1, 2, 3)) * self.scale


@dataclass(frozen=True)
class Weighted:
    """Plain CLIP that notes when it is built, and may ask for a column."""

    name: ClassVar[str] = "weighted"
    version: ClassVar[int] = 1
    column: str = ""

    def build(self, model: Clip) -> Objective:
        RUNS.append("train")
        return _Weighted(self.column)


class _Weighted(Objective):
    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_BD, text_BD = model.encode_image(batch.image), model.encode_text(batch.tokens)
        terms = {"clip": clip_loss(image_BD, text_BD, model.scale)}
        if self.column:
            assert torch.equal(batch.columns[self.column], batch.rows * 10)
            terms["weight"] = batch.columns[self.column].float().mean() * 1e-6
        return terms


@dataclass(frozen=True)
class Mean:
    """A private loop: the mean picture of the data."""

    name: ClassVar[str] = "mean_picture"
    version: ClassVar[int] = 1

    def craft(self, model: Clip, view: View, *others: Clip) -> Mapping[str, Tensor]:
        RUNS.append("tensor")
        read = view.reader(torch.device("cpu"))
        image_BCHW = read(np.arange(len(view)))
        model.encode_image(image_BCHW[:8])
        mean_CHW = image_BCHW.float().mean(0)
        return {"mean": mean_CHW, "red": mean_CHW[0]}


@dataclass(frozen=True)
class Silenced:
    """A change of weights without a fit: the scale of the logits."""

    name: ClassVar[str] = "silenced"
    version: ClassVar[int] = 1
    scale: float = 0.0

    def edit(self, model: Clip) -> None:
        RUNS.append("edit")
        model.net.logit_scale.fill_(self.scale)


@pytest.fixture
def lab(small_store: Store) -> Lab:
    RUNS.clear()
    return Lab(small_store, ModelSpec(), Runtime())


def own_lab(store: Store) -> Lab:
    """The lab of another stage: nothing in hand."""
    return Lab(store, ModelSpec(), Runtime())


# --- memoisation


def test_what_was_trained_is_found(lab: Lab) -> None:
    ref = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=100))
    other = own_lab(lab.store)
    assert other.train(Weighted(), CLEAN, replace(RECIPE, seed=100)) == ref
    assert RUNS == ["train"]
    assert lab.ledger.made == [ref.key]
    assert other.ledger.made == []
    # Found or made, the work costs the same.
    assert other.ledger.total() == lab.ledger.total()
    assert other.ledger.total()["images_forward"] == 256
    assert other.ledger.total()["train_seconds"] > 0


def test_everything_that_matters_trains_again(lab: Lab) -> None:
    recipe = replace(RECIPE, seed=102)
    first = lab.train(Weighted(), CLEAN, recipe)
    part = lab.subset(CLEAN, np.arange(64))
    wide = lab.annotate(CLEAN, weight=np.arange(256) * 10)
    others = [
        lab.train(PlainClipSpec(), CLEAN, recipe),
        lab.train(Weighted(), part, recipe),
        lab.train(Weighted("weight"), wide, recipe),
        lab.train(Weighted(), CLEAN, replace(recipe, seed=103)),
        lab.train(Weighted(), CLEAN, recipe, init=first),
    ]
    assert len({first, *others}) == 6
    weights = {
        lab.store.need(ref.key).path("weights.safetensors").read_bytes() for ref in (first, *others)
    }
    # Weighing every row alike changes the key, not the weights; PlainClip is the same loss.
    assert len(weights) == 4


def test_an_edit_is_a_model_of_its_own(lab: Lab) -> None:
    """The model that was edited stays as it is; what was edited is found, or made anew."""
    first = lab.train(PlainClipSpec(), CLEAN, replace(RECIPE, seed=105))
    RUNS.clear()
    edited = lab.edit(Silenced(), first)
    other = own_lab(lab.store)
    assert other.edit(Silenced(), first) == edited
    assert (RUNS, other.ledger.made) == (["edit"], [])
    before, after = (lab.load(ref).state_dict() for ref in (first, edited))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["net.logit_scale"]
    assert float(after["net.logit_scale"]) == 0
    assert len({edited, lab.edit(Silenced(1.0), first), lab.edit(Silenced(), edited)}) == 3
    # A fit goes on from it.
    lab.train(PlainClipSpec(), CLEAN, RECIPE, init=edited)
    assert lab.ledger.costs[edited.key] == {}


def test_a_model_of_another_kind_is_not_edited(lab: Lab) -> None:
    first = lab.train(PlainClipSpec(), CLEAN, replace(RECIPE, seed=105))
    with pytest.raises(GridError, match="this grid's model is a"):
        Lab(lab.store, ModelSpec(size=64), Runtime()).edit(Silenced(3.0), first)


def test_columns_reach_the_batch_in_the_order_of_their_rows(lab: Lab) -> None:
    data = lab.annotate(CLEAN, weight=np.arange(256) * 10)
    recipe = replace(RECIPE, seed=104)
    curve = _curves(lab, lab.train(Weighted("weight"), data, recipe))[0]
    assert curve["weight"] == pytest.approx(1275e-6)
    # After a choice of rows, `rows` counts positions of the view and columns follow their rows.
    again = lab.annotate(lab.subset(CLEAN, np.arange(255, 127, -1)), weight=np.arange(128) * 10)
    lab.train(Weighted("weight"), again, recipe)


def _curves(lab: Lab, ref: ModelRef) -> Any:
    return json.loads(lab.store.need(ref.key).path("curves.json").read_text())


def test_a_key_is_known_before_anything_runs(lab: Lab) -> None:
    recipe = replace(RECIPE, seed=101)
    ref = lab.train(Weighted(), CLEAN, recipe)
    assert model_key(Weighted(), recipe, CLEAN.key, None, ModelSpec()) == ref.key
    keys = {
        model_key(Weighted(), recipe, CLEAN.key, None, ModelSpec()),
        model_key(Weighted(), recipe, CLEAN.key, None, ModelSpec(arch="small")),
        model_key(Weighted(), recipe, CLEAN.key, None, ModelSpec(size=64)),
        model_key(Weighted(), recipe, CLEAN.key, ref.key, ModelSpec()),
        model_key(Weighted(), recipe, "corpus-0123456789abcdef", None, ModelSpec()),
    }
    assert len(keys) == 5


def test_scores_are_made_once_and_in_row_order(lab: Lab) -> None:
    model = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=101))
    RUNS.clear()
    order = np.random.default_rng(0).permutation(256)
    shuffled = lab.subset(CLEAN, order)
    whole, mixed = lab.score(MeanLevel(), CLEAN, model), lab.score(MeanLevel(), shuffled, model)
    assert whole == pytest.approx(_mean_levels(lab), rel=1e-5)
    assert np.array_equal(mixed, whole[order])
    assert RUNS == ["score", "score"]
    assert np.array_equal(own_lab(lab.store).score(MeanLevel(), CLEAN, model), whole)
    assert RUNS == ["score", "score"], "a score was made twice"
    assert np.array_equal(lab.score(MeanLevel(2.0), CLEAN, model), whole * 2)


def _mean_levels(lab: Lab) -> Any:
    images = np.load(lab.store.need(CLEAN.key).path("images.npy"), allow_pickle=False)
    return images.mean((1, 2, 3))


def test_crafted_tensors_are_made_once(lab: Lab) -> None:
    model = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=101))
    RUNS.clear()
    first = lab.tensor(Mean(), CLEAN, model)
    second = own_lab(lab.store).tensor(Mean(), CLEAN, model)
    assert RUNS == ["tensor"]
    assert first.keys() == second.keys() == {"mean", "red"}
    assert torch.equal(first["mean"], second["mean"])
    assert float(first["mean"].mean()) == pytest.approx(_mean_levels(lab).mean(), rel=1e-4)
    assert lab.ledger.total()["images_forward"] == 256 + 8


def test_a_model_comes_back_ready_to_be_asked(lab: Lab) -> None:
    ref = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=101))
    model = lab.load(ref)
    assert not model.training
    assert model.meter.images_forward == 0
    assert all(p.requires_grad for p in model.parameters())


def test_training_leaves_the_global_generator_alone(lab: Lab) -> None:
    """Whether work was found or made must not change what draws later code sees."""
    torch.manual_seed(5)
    lab.train(Weighted(), CLEAN, replace(RECIPE, seed=105))
    after_work = torch.rand(1)
    torch.manual_seed(5)
    lab.train(Weighted(), CLEAN, replace(RECIPE, seed=105))
    assert RUNS == ["train"]
    assert torch.equal(after_work, torch.rand(1))


# --- subsets and handles


def test_all_rows_keep_the_key(lab: Lab) -> None:
    assert lab.subset(CLEAN, np.arange(256)) == CLEAN
    part = lab.subset(CLEAN, np.arange(0, 256, 2))
    assert (len(part), part.num_rows) == (128, 128)
    assert part.key != CLEAN.key
    assert lab.subset(part, np.arange(128)) == part
    assert lab.captions(part) == lab.captions(CLEAN)[::2]


@pytest.mark.parametrize("rows", [np.ones(256, bool), np.array([0.0, 1.5]), [True, False]])
def test_rows_are_numbers_and_never_a_mask(lab: Lab, rows: Any) -> None:
    """A mask taken for numbers would train on rows 0 and 1, many times over, in silence."""
    with pytest.raises(GridError, match=r"rows are given by number.*np.flatnonzero"):
        lab.subset(CLEAN, rows)


def test_no_rows_are_no_error_until_they_are_trained_on(lab: Lab) -> None:
    empty = lab.subset(CLEAN, np.array([]))
    assert len(empty) == 0
    with pytest.raises(GridError, match="0 rows do not fill one batch"):
        lab.train(Weighted(), empty, RECIPE)


def test_a_handle_is_a_key_and_a_length() -> None:
    assert set(DataRef.__slots__) == {"key", "num_rows"}
    assert set(ModelRef.__slots__) == {"key"}


def test_texts_are_part_of_the_data(lab: Lab) -> None:
    static = lab.with_text(CLEAN, eda=eda_text(EdaMode.STATIC, "lexicon", 0))
    keys = {
        CLEAN.key,
        static.key,
        lab.with_text(CLEAN, eda=eda_text(EdaMode.STATIC, "lexicon", 1)).key,
        lab.with_text(CLEAN, eda=eda_text(EdaMode.PER_EPOCH, "lexicon", 0)).key,
        lab.with_text(CLEAN, other=eda_text(EdaMode.STATIC, "lexicon", 0)).key,
    }
    assert len(keys) == 5
    assert lab.captions(static) == lab.captions(CLEAN), "captions are the pairs' own"


@pytest.mark.parametrize("split", ["tuning", "report", "shifted"])
def test_no_handle_opens_an_evaluation_split(lab: Lab, split: str) -> None:
    """A defense that makes up a handle from a key it knows gets no further."""
    forged = DataRef(corpus_key(corpus_spec(split)), 128)
    model = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=101))
    calls: list[Any] = [
        lambda: lab.captions(forged),
        lambda: lab.subset(forged, np.arange(3)),
        lambda: lab.annotate(forged, a=np.zeros(128)),
        lambda: lab.train(Weighted(), forged, RECIPE),
        lambda: lab.score(MeanLevel(), forged, model),
        lambda: lab.tensor(Mean(), forged, model),
    ]
    for call in calls:
        with pytest.raises(Forbidden, match=f"asked for the {split} split"):
            call()


# --- errors


def test_weights_of_another_model_are_named(lab: Lab) -> None:
    ref = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=101))
    other = Lab(lab.store, ModelSpec(arch="small"), Runtime())
    with pytest.raises(GridError, match=rf"{ref.key} is a .*arch='tiny'.*this grid's.*'small'"):
        other.train(Weighted(), CLEAN, RECIPE, init=ref)
    # A model that is only read, such as a judge, may be of any kind.
    assert other.load(ref).spec == ModelSpec()


def test_carried_moments_must_have_been_kept(lab: Lab) -> None:
    ref = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=101))
    carry = replace(RECIPE, optimizer_state=OptimizerState.CARRY)
    for init in (None, ref):
        with pytest.raises(GridError, match="keep_optimizer: true"):
            lab.train(Weighted(), CLEAN, carry, init=init)


def test_a_fit_starts_from_fresh_moments_unless_told(lab: Lab) -> None:
    """T33: the poisoned run's moments must not leak into a defense."""
    keeps = Lab(lab.store, ModelSpec(), Runtime(keep_optimizer=True))
    first = keeps.train(Weighted(), CLEAN, replace(RECIPE, seed=106))
    assert "optimizer.safetensors" in lab.store.need(first.key).files
    fresh = lab.train(Weighted(), CLEAN, replace(RECIPE, seed=107), init=first)
    carry = replace(RECIPE, seed=107, optimizer_state=OptimizerState.CARRY)
    carried = lab.train(Weighted(), CLEAN, carry, init=first)
    plain = own_lab(lab.store)
    unkept = plain.train(Weighted(), CLEAN, replace(RECIPE, seed=108))
    again = plain.train(Weighted(), CLEAN, replace(RECIPE, seed=107), init=unkept)
    paths = [lab.store.need(r.key).path("weights.safetensors") for r in (fresh, carried, again)]
    assert len({path.read_bytes() for path in paths}) == 3
    losses = [_curves(lab, ref)[0]["clip"] for ref in (fresh, carried)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_missing_weights_are_an_error_and_not_a_fresh_start(lab: Lab) -> None:
    """T42."""
    gone = ModelRef(model_key(Weighted(), RECIPE, CLEAN.key, None, ModelSpec(size=64)))
    with pytest.raises(Damaged, match="not in the store"):
        lab.train(Weighted(), CLEAN, RECIPE, init=gone)
    with pytest.raises(Damaged):
        lab.load(gone)


def test_a_failed_fit_leaves_nothing(lab: Lab) -> None:
    recipe = replace(RECIPE, seed=109)
    with pytest.raises(KeyError):
        lab.train(Weighted("absent"), CLEAN, recipe)
    assert model_key(Weighted("absent"), recipe, CLEAN.key, None, ModelSpec()) not in lab.store
    assert lab.ledger.made == []


def test_what_another_process_makes_is_busy(lab: Lab) -> None:
    recipe = replace(RECIPE, seed=110)
    key = model_key(Weighted(), recipe, CLEAN.key, None, ModelSpec())
    with Store(lab.store.uri).claim(key), pytest.raises(Busy):
        lab.train(Weighted(), CLEAN, recipe)
    assert RUNS == []
    lab.train(Weighted(), CLEAN, recipe)


def test_damaged_work_is_done_again(tmp_path: Any) -> None:
    store = Store(tmp_path)
    build_corpus(store, corpus_spec("clean", 64))
    data = DataRef(corpus_key(corpus_spec("clean", 64)), 64)
    ref = own_lab(store).train(Weighted(), data, RECIPE)
    path = store.need(ref.key).path("weights.safetensors")
    body = path.read_bytes()
    path.write_bytes(body[:-1])
    again = own_lab(Store(tmp_path))
    assert again.train(Weighted(), data, RECIPE) == ref
    assert again.ledger.made == [ref.key]
    assert again.store.need(ref.key).path("weights.safetensors").read_bytes() == body


def test_memo_asks_once(small_store: Store) -> None:
    ledger, calls = Ledger(), list[int]()

    def make(scratch: Any) -> dict[str, Any]:
        calls.append(1)
        return {"cost": {"x": 1.0}}

    key = corpus_key(corpus_spec("clean", 7))
    for _ in "ab":
        memo(small_store, key, make, collective=False, ledger=ledger)
    assert (calls, ledger.made) == ([1], [key])
    small_store.discard(key, "it is no corpus")


# --- who watches a fit


def fitted(folder: Path, watch: Watch | None) -> Artefact:
    """A model of two epochs in a store of its own."""
    store = Store(str(folder))
    build_corpus(store, corpus_spec("clean"))
    lab = Lab(store, ModelSpec(), Runtime(), watch=watch)
    return store.need(lab.train(PlainClipSpec(), CLEAN, replace(RECIPE, epochs=2)).key)


def test_a_watched_fit_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Whoever looks may run pictures through the model: that is no part of the fit or its cost."""
    seen: list[float] = []

    def look(model: Clip, key: str, record: Mapping[str, float]) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        model.encode_image(torch.full((8, 3, 32, 32), 7, dtype=torch.uint8))
        torch.rand(3)
        seen.append(record["epoch"])

    plain, watched = fitted(tmp_path / "plain", None), fitted(tmp_path / "watched", look)
    assert seen == [0, 1]
    assert plain.path("weights.safetensors").read_bytes() == (
        watched.path("weights.safetensors").read_bytes()
    )
    assert plain.path("curves.json").read_text() == watched.path("curves.json").read_text()
    counted = ("images_forward", "images_backward", "texts_forward", "texts_backward", "steps")
    for name in counted:
        assert plain.meta["cost"][name] == watched.meta["cost"][name] > 0


def test_who_has_seen_enough_ends_a_fit(tmp_path: Path) -> None:
    """Nothing is published, and nobody finds it claimed: the next one makes it, the same."""

    def enough(model: Clip, key: str, record: Mapping[str, float]) -> None:
        raise LeftOff

    with pytest.raises(LeftOff):
        fitted(tmp_path / "store", enough)
    assert list(Store(str(tmp_path / "store")).keys("model")) == []
    again, plain = fitted(tmp_path / "store", None), fitted(tmp_path / "plain", None)
    assert again.path("weights.safetensors").read_bytes() == (
        plain.path("weights.safetensors").read_bytes()
    )
