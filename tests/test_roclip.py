"""RoCLIP against references written from its algorithm box, and its pool against a plain list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defenses.base import Case, Fidelity, Need, Phase, Recipes, Regime, fidelity_in, resolved_needs
from defenses.controls import AugmentedClipSpec
from defenses.roclip import (
    Augment,
    Data,
    PooledCaptions,
    PooledCaptionsSpec,
    PoolInit,
    Query,
    RoClip,
)
from tests.conftest import corpus_spec
from tests.test_losses import features, slow
from victims.augment import augment
from victims.batches import Batch
from victims.corpora import Reader, View, corpus_key, open_corpus, subset, whole, with_text
from victims.draws import Draws, torch_rng
from victims.errors import UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.memory import Memory
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import Clock, Recipe, Runtime
from victims.rewrite import EdaMode, EdaText, eda_text
from victims.store import Store
from victims.training import Fit, FitReport, Objective

MODEL, WIDTH = ModelSpec(), 64
SPEC = PooledCaptionsSpec(
    every=2,
    pool_size=40,
    pool_init=PoolInit.EMPTY,
    refresh_in_plain_epochs=False,
    crop_scale=(0.08, 1.0),
    augment=Augment.BOTH,
    query=Query.IMAGE,
    text_drift=False,
)
RECIPE = Recipe(epochs=2, batch_size=16, lr=1e-3, warmup_steps=0, seed=4)
PLAIN, MATCHING = Clock(0, 0, 8), Clock(1, 4, 8)


def view(store: Store, rows: int = 64) -> View:
    corpus = open_corpus(store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)
    some = subset(whole(corpus), np.arange(rows))
    return with_text(some, {"eda": eda_text(EdaMode.STATIC, "lexicon", 0)})


@dataclass
class State:
    """What a fit looked like at the end of an epoch."""

    weights: dict[str, Tensor]
    pool: Tensor
    pointer: int
    filled: int


def fitted(
    data: View, objective: Objective, recipe: Recipe = RECIPE, checkpoints: Any = None
) -> tuple[list[State], FitReport]:
    model, states = fresh(MODEL, 0), list[State]()

    def look(record: object) -> None:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        own = objective.state_dict()
        pool = own.get("pool.rows_PD", torch.zeros(0)).clone()
        counts = [int(own.get(f"pool.{name}", 0)) for name in ("pointer", "filled")]
        states.append(State(weights, pool, *counts))

    runtime = Runtime(checkpoint_seconds=-1.0)
    fit = Fit(
        model, data, objective, recipe, runtime=runtime, checkpoints=checkpoints, on_epoch=look
    )
    report = fit()
    return states, report


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


def built(**fields: Any) -> PooledCaptions:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PooledCaptions(replace(SPEC, **fields), WIDTH)


# --- the pool


@dataclass
class SlowPool:
    """The circular FIFO as a list."""

    size: int
    slots: list[Any]
    pointer: int = 0

    def push(self, rows: list[Any]) -> None:
        for row in rows:
            if self.pointer == self.size:
                break
            self.slots[self.pointer : self.pointer + 1] = [row]
            self.pointer += 1
        if self.pointer == self.size:
            self.pointer = 0


def test_a_pool_of_five_and_batches_of_two() -> None:
    """a b | c d | e f: the pool is a b c d e, f is dropped, the pointer is at the start."""
    pool = Memory(5, 2)
    letters = torch.arange(12, dtype=torch.float32).view(6, 2)
    for first in (0, 2, 4):
        pool.push(letters[first : first + 2])
    assert torch.equal(pool.rows_PD, letters[:5])
    assert (int(pool.pointer), int(pool.filled)) == (0, 5)
    pool.push(letters[5:] + 10)
    assert torch.equal(pool.rows_PD, torch.cat([letters[5:] + 10, letters[1:5]]))
    assert (int(pool.pointer), int(pool.filled)) == (1, 5)


@given(st.integers(1, 9), st.lists(st.integers(1, 6), max_size=8))
def test_the_pool_is_a_circular_list(size: int, batches: list[int]) -> None:
    pool, slow_pool = Memory(size, 1), SlowPool(size, [])
    next_value = 1
    for rows in batches:
        values = [float(v) for v in range(next_value, next_value + rows)]
        next_value += rows
        pool.push(torch.tensor(values)[:, None])
        slow_pool.push(values)
    filled = int(pool.filled)
    assert pool.rows_PD[:filled, 0].tolist() == slow_pool.slots
    assert int(pool.pointer) == slow_pool.pointer
    assert not pool.rows_PD[filled:].any()


def test_matching_epochs() -> None:
    """Epochs of the paper count from 1."""

    def matching(every: int | None) -> list[int]:
        return [epoch + 1 for epoch in range(30) if built(every=every).matches(epoch)]

    assert matching(3) == list(range(3, 31, 3))
    assert matching(1) == list(range(1, 31))
    assert matching(2) == list(range(2, 31, 2))
    assert matching(None) == []


# --- one step, on given features


@dataclass
class Stub:
    """A model that answers with given features."""

    image: Tensor
    text: Tensor
    scale: Tensor

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return self.image

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        # Through an operation, so that gradient mode has its say.
        return self.text * 1


def step(objective: PooledCaptions, image: Tensor, text: Tensor, clock: Clock) -> dict[str, Tensor]:
    rows = len(image)
    batch = Batch(
        rows=torch.arange(rows),
        image=torch.zeros(rows, 3, 32, 32, dtype=torch.uint8),
        tokens=torch.zeros(rows, 4, dtype=torch.long),
        texts={"eda": torch.ones(rows, 4, dtype=torch.long)},
        views={"image": torch.zeros(rows, 3, 32, 32)},
    )
    stub = Stub(image, text, torch.tensor(14.0, dtype=image.dtype))
    found: dict[str, Tensor] = objective(cast("Clip", stub), batch, clock)
    return found


def pooled(rows: Tensor, **fields: Any) -> PooledCaptions:
    """An objective in double precision whose pool holds ``rows``."""
    size = fields.pop("pool_size", len(rows))
    objective = PooledCaptions(replace(SPEC, pool_size=size, **fields), rows.shape[1]).double()
    objective.pool.push(rows)
    return objective


def slow_nearest(query: Tensor, pool: Tensor) -> Tensor:
    """Row by row, the stored vector with the largest cosine."""
    chosen = []
    for q in query.tolist():
        best, best_cosine = None, -2.0
        for p in pool.tolist():
            dot = sum(x * y for x, y in zip(q, p, strict=True))
            norms = sum(x * x for x in q) ** 0.5 * sum(y * y for y in p) ** 0.5
            if dot / norms > best_cosine:
                best, best_cosine = p, dot / norms
        chosen.append(best)
    return torch.tensor(chosen, dtype=query.dtype)


@pytest.mark.parametrize("query", Query)
def test_a_matching_step_is_the_algorithm(query: Query) -> None:
    """L = 1/2 [CE(I, N) + CE(N, I)] with N the pool's rows nearest to I (v1: to the caption)."""
    image, text, pool = features(0, 6), features(1, 6), features(2, 11)
    asked = image if query is Query.IMAGE else text
    nearest = slow_nearest(asked, pool)
    other = slow_nearest(text if query is Query.IMAGE else image, pool)
    assert not torch.equal(nearest, other)
    terms = step(pooled(pool, query=query), image, text, MATCHING)
    assert set(terms) == {"matched"}
    assert float(terms["matched"]) == pytest.approx(slow("clip", image, nearest, 14.0), rel=1e-9)


def test_a_plain_step_is_the_clip_loss_and_leaves_the_pool_alone() -> None:
    image, text, pool = features(0, 6), features(1, 6), features(2, 11)
    objective = pooled(pool, pool_size=20)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    terms = step(objective, image, text, PLAIN)
    assert set(terms) == {"clip"}
    assert float(terms["clip"]) == pytest.approx(slow("clip", image, text, 14.0), rel=1e-9)
    assert not differing(before, objective.state_dict())


def test_the_query_comes_before_the_enqueue() -> None:
    """The captions of the step would be perfect matches; they may not be found."""
    image, pool = features(0, 6), features(2, 6)
    objective = pooled(pool, pool_size=12)
    found = float(step(objective, image, image, MATCHING)["matched"])
    assert found == pytest.approx(slow("clip", image, slow_nearest(image, pool), 14.0))
    assert torch.equal(objective.pool.rows_PD, torch.cat([pool, image]))
    again = float(step(objective, image, image, MATCHING)["matched"])
    assert again == pytest.approx(slow("clip", image, image, 14.0))


@pytest.mark.parametrize("drift", [False, True])
def test_a_pool_of_the_batchs_own_captions_gives_the_clip_loss_without_text_gradient(
    drift: bool,
) -> None:
    image = features(0, 6).requires_grad_()
    text = F.normalize(image.detach() + 0.1 * features(1, 6), dim=-1).requires_grad_()
    terms = step(pooled(text.detach(), text_drift=drift), image, text, MATCHING)
    value = slow("clip", image.detach(), text.detach(), 14.0)
    assert float(terms["matched"].detach()) == pytest.approx(value, rel=1e-9)
    terms["matched"].backward()  # type: ignore[no-untyped-call]
    assert image.grad is not None
    assert float(image.grad.abs().max()) > 1e-3
    assert (text.grad is None) is not drift
    assert text.grad is None or not text.grad.any()


def test_an_empty_pool_gives_the_plain_loss_and_is_filled() -> None:
    image, text = features(0, 6), features(1, 6)
    objective = PooledCaptions(replace(SPEC, pool_size=9), 5).double()
    terms = step(objective, image, text, MATCHING)
    assert float(terms["clip"]) == pytest.approx(slow("clip", image, text, 14.0), rel=1e-9)
    assert torch.equal(objective.pool.rows_PD[:6], text)
    assert int(objective.pool.filled) == 6


def test_unfilled_slots_are_masked() -> None:
    """Every filled slot points away from the queries; an empty one, at cosine 0, is no match."""
    image = features(0, 3)
    objective = pooled(-image.mean(0, keepdim=True), pool_size=8)
    assert float((image @ objective.pool.rows_PD[0]).max()) < 0
    found = float(step(objective, image, image, MATCHING)["matched"])
    nearest = objective.pool.rows_PD[:1].expand(3, -1)
    assert found == pytest.approx(slow("clip", image, nearest, 14.0), rel=1e-9)


def test_the_pool_is_refreshed_in_plain_epochs_when_asked() -> None:
    image, text = features(0, 6), features(1, 6)
    objective = pooled(features(2, 3), pool_size=12, refresh_in_plain_epochs=True)
    step(objective, image, text, PLAIN)
    assert torch.equal(objective.pool.rows_PD[3:9], text)
    assert not objective.pool.rows_PD.requires_grad


def test_the_legacy_pool_is_full_of_long_noise_that_is_matched_as_it_is() -> None:
    """Released code normalises a copy for the search and returns the raw vector."""
    objective = built(pool_init=PoolInit.LEGACY, pool_size=500)
    assert int(objective.pool.filled) == 500
    norms = objective.pool.rows_PD.norm(dim=1)
    assert float(norms.mean()) == pytest.approx(WIDTH**0.5, rel=0.02)
    assert float(objective.pool.rows_PD.std()) == pytest.approx(1, abs=0.02)
    image = F.normalize(features(0, 1, WIDTH) + 0.5 * features(1, 8, WIDTH), dim=-1).float()
    raw = slow_nearest(image, objective.pool.rows_PD)
    found = float(step(objective, image, image, MATCHING)["matched"])
    assert found == pytest.approx(slow("clip", image, raw, 14.0), rel=1e-4)
    assert found != pytest.approx(slow("clip", image, F.normalize(raw, dim=-1), 14.0), rel=0.1)


# --- whole fits


def test_without_matching_it_is_training_on_augmented_pairs(small_store: Store) -> None:
    """Bit for bit, whatever the pool; the control is written apart from the method."""
    data = view(small_store)
    control, _ = fitted(data, AugmentedClipSpec(image_policy="simclr").build(fresh(MODEL, 0)))
    for fields in (
        {"pool_size": 4},
        {"pool_size": 100, "pool_init": PoolInit.LEGACY, "text_drift": True},
        {"pool_size": 16, "refresh_in_plain_epochs": True},
    ):
        found, report = fitted(data, built(every=None, **fields))
        assert not differing(found[-1].weights, control[-1].weights)
        assert "matched" not in report.curves[-1]
    matched, _ = fitted(data, built())
    assert differing(matched[-1].weights, control[-1].weights)
    assert not differing(matched[0].weights, control[0].weights)


class Logged(Memory):
    """A memory that keeps what is pushed."""

    def __init__(self) -> None:
        super().__init__(40, WIDTH)
        self.pushed: list[Tensor] = []

    def push(self, rows_GD: Tensor) -> None:
        self.pushed.append(rows_GD.clone())
        super().push(rows_GD)


def test_the_pool_moves_in_matching_epochs_alone_and_holds_what_was_written_last(
    small_store: Store,
) -> None:
    objective, pool = PooledCaptions(SPEC, WIDTH), Logged()
    objective.pool = pool
    states, report = fitted(view(small_store), objective, replace(RECIPE, epochs=5))
    assert not states[0].pool.any()
    assert torch.equal(states[1].pool, states[2].pool)
    assert states[1].pointer == states[2].pointer
    assert torch.equal(states[3].pool, states[4].pool)
    assert not torch.equal(states[1].pool, states[3].pool)
    # Four steps of 16 in each of two matching epochs, into 40 slots.
    slow_pool = SlowPool(40, [])
    assert len(pool.pushed) == 8
    for text_GD in pool.pushed:
        slow_pool.push(list(text_GD))
    assert torch.equal(states[-1].pool, torch.stack(slow_pool.slots))
    assert states[-1].pointer == slow_pool.pointer
    assert torch.allclose(states[-1].pool.norm(dim=1), torch.ones(40))
    named = [set(record) & {"clip", "matched"} for record in report.curves]
    assert named == [{"clip"}, {"clip", "matched"}, {"clip"}, {"matched"}, {"clip"}]


@pytest.mark.parametrize("drift", [False, True])
def test_the_text_tower_stands_still_in_a_matching_epoch(small_store: Store, drift: bool) -> None:
    """With moments from a plain epoch behind it, which a zero gradient would let it follow."""
    objective = built(refresh_in_plain_epochs=True, text_drift=drift)
    (plain, matching), report = fitted(view(small_store), objective)
    assert "clip" not in report.curves[1]
    moved = differing(plain.weights, matching.weights)
    text = fresh(MODEL, 0).text_tower() - {"net.logit_scale"}
    assert moved & text == (text if drift else set())
    assert {"net.logit_scale", "net.visual.conv1.weight"} <= moved
    assert report.cost["texts_forward"] == 128
    assert report.cost["texts_backward"] == (128 if drift else 64)


@pytest.mark.parametrize("drift", [False, True])
def test_text_gradients_are_exactly_zero_in_a_matching_step(
    small_store: Store, drift: bool
) -> None:
    data, model = view(small_store, 16), fresh(MODEL, 0).train()
    objective = built(text_drift=drift, pool_init=PoolInit.LEGACY)
    images = data.reader(torch.device("cpu"))(np.arange(16))
    tokens = torch.from_numpy(model.tokenizer(data.captions())).long()
    batch = Batch(torch.arange(16), images, tokens, {"eda": tokens})
    batch = replace(batch, views=objective.views(batch, Draws(torch_rng(0, "views"), 16, 0, 16)))
    terms = objective(model, batch, MATCHING)
    terms["matched"].backward()
    text = model.text_tower() - {"net.logit_scale"}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in text:
        grad = grads[name]
        assert (grad is None) is not drift
        assert grad is None or not grad.any()
    for name in ("net.logit_scale", "net.visual.conv1.weight", "net.visual.attnpool.c_proj.weight"):
        grad = grads[name]
        assert grad is not None
        assert grad.any()


# --- killed and resumed


class Killed(Exception):
    pass


class Saved:
    """Mid-fit checkpoints after every step; dies after the save of step ``die_after``."""

    def __init__(self, path: Path, die_after: int | None) -> None:
        self.path, self.die_after, self.count = path, die_after, 0

    def load(self) -> Path | None:
        return self.path if self.path.exists() else None

    def save(self, write: Callable[[Path], None]) -> None:
        write(self.path)
        self.count += 1
        if self.count == self.die_after:
            raise Killed


@pytest.mark.parametrize(
    ("die_after", "pool_init"),
    [
        (6, PoolInit.EMPTY),
        (7, PoolInit.LEGACY),
        pytest.param(2, PoolInit.LEGACY, marks=pytest.mark.exhaustive),
        pytest.param(8, PoolInit.EMPTY, marks=pytest.mark.exhaustive),
    ],
)
def test_a_fit_killed_in_a_matching_epoch_goes_on_bit_for_bit(
    small_store: Store, tmp_path: Path, die_after: int, pool_init: PoolInit
) -> None:
    """Four steps an epoch: 6 and 7 lie inside the matching epoch, 8 is its end."""
    data, recipe = view(small_store), replace(RECIPE, epochs=3)
    states, report = fitted(data, built(pool_init=pool_init), recipe)
    place = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        fitted(data, built(pool_init=pool_init), recipe, Saved(place, die_after))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        other = PooledCaptions(replace(SPEC, pool_init=pool_init), WIDTH)
    resumed_states, resumed = fitted(data, other, recipe, Saved(place, None))
    last, expected = resumed_states[-1], states[-1]
    assert not differing(expected.weights, last.weights)
    assert torch.equal(expected.pool, last.pool)
    assert (expected.pointer, expected.filled) == (last.pointer, last.filled)
    assert resumed.curves == report.curves
    times = ("train_seconds", "wall_seconds")
    costs = [{k: v for k, v in r.cost.items() if k not in times} for r in (resumed, report)]
    assert costs[0] == costs[1]


# --- the method


class PlanLab:
    """A lab that writes down the one fit it is asked for."""

    def __init__(self) -> None:
        self.text: EdaText | None = None
        self.asked: tuple[Any, ...] = ()

    def with_text(self, data: DataRef, **texts: EdaText) -> DataRef:
        self.text = texts["eda"]
        return data

    def train(self, spec: Any, data: DataRef, recipe: Recipe, *, init: Any) -> ModelRef:
        self.asked = (spec, data, recipe, init)
        return ModelRef(data.key)


def planned(defense: RoClip, rows: int = 10_000) -> PlanLab:
    lab = PlanLab()
    data = DataRef(corpus_key(corpus_spec("suspect")), rows)
    start = ModelRef(corpus_key(corpus_spec("clean")))
    grants = {Need.SUSPECT_DATA: lambda: data, Need.START: lambda: start}
    repair = replace(RECIPE, epochs=9)
    case = Case("roclip", grants, (Recipes(victim=RECIPE, repair=repair), 0))
    defense.apply(cast("Lab", lab), case)
    assert lab.asked[1:] == (data, RECIPE, start)
    return lab


def test_it_replaces_the_victims_training_with_the_carded_defaults() -> None:
    lab = planned(RoClip())
    assert lab.asked[0] == replace(SPEC, pool_size=200)
    assert lab.text == eda_text(EdaMode.STATIC, "lexicon", RECIPE.seed)
    assert planned(RoClip(), 1_000_000).asked[0].pool_size == 20_000
    assert planned(RoClip(), 300).asked[0].pool_size == RECIPE.batch_size
    assert planned(RoClip(pool_size=21_845)).asked[0].pool_size == 21_845


def test_without_matching_the_pools_size_is_no_part_of_the_plan() -> None:
    specs = [planned(RoClip(every=None, pool_size=size)).asked[0] for size in (None, 7, 70)]
    assert specs[0] == specs[1] == specs[2]
    variant: Any = RoClip.variants["augment_only"]
    assert planned(RoClip(**variant)).asked[0] == specs[0]


@pytest.mark.parametrize("fields", [{"every": 0}, {"pool_size": 0}, {"pool_size": -3}])
def test_plans_that_cannot_be_meant_are_refused(fields: dict[str, Any]) -> None:
    """A pool of 0 once meant the default size."""
    with pytest.raises(UsageError, match="roclip"):
        planned(RoClip(**fields))


@pytest.mark.parametrize("which", Augment)
def test_each_side_is_augmented_only_when_asked(small_store: Store, which: Augment) -> None:
    both, image, text = Augment.BOTH, Augment.IMAGE, Augment.TEXT
    lab = planned(RoClip(augment=which))
    assert lab.text is not None
    assert (lab.text.mode is EdaMode.STATIC) is (which in (both, text))
    images = view(small_store, 8).reader(torch.device("cpu"))(np.arange(8))
    batch = Batch(torch.arange(8), images, torch.zeros(8, 2, dtype=torch.long))

    def draws() -> Draws:
        return Draws(torch_rng(0, "views"), 8, 0, 8)

    found = lab.asked[0].build(fresh(MODEL, 0)).views(batch, draws())["image"]
    if which in (both, image):
        assert torch.equal(found, augment("simclr", images, draws()))
    else:
        assert torch.equal(found, images)


def test_the_crop_is_the_one_that_was_asked_for(small_store: Store) -> None:
    images = view(small_store, 8).reader(torch.device("cpu"))(np.arange(8))
    batch = Batch(torch.arange(8), images, torch.zeros(8, 2, dtype=torch.long))
    views = [
        built(crop_scale=scale).views(batch, Draws(torch_rng(0, "views"), 8, 0, 8))["image"]
        for scale in ((0.08, 1.0), (0.9, 1.0))
    ]
    assert not torch.equal(*views)


def test_it_claims_to_be_exact_from_scratch_alone() -> None:
    assert fidelity_in(RoClip(), Regime.S) is Fidelity.EXACT
    assert fidelity_in(RoClip(), Regime.F) is Fidelity.ADAPTED
    assert (RoClip().acts(), RoClip(data=Data.CLEAN).acts()) == (
        Phase.PRETRAINING,
        Phase.FINETUNING,
    )
    assert resolved_needs(RoClip(), Regime.S) == ["suspect_data"]
    assert resolved_needs(RoClip(), Regime.F) == ["suspect_data", "reference"]
