"""Fine-tuning: the schedule's golden values, and the loop against one written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defenses.base import Case, Need, Recipes
from defenses.finetune import Finetune, Part, PartialClip
from tests.conftest import corpus_spec
from victims.batches import Batch
from victims.corpora import Reader, View, corpus_key, open_corpus, subset, whole
from victims.draws import numpy_rng
from victims.errors import Forbidden, GridError
from victims.lab import DataRef, Lab, ModelRef, model_key
from victims.models import SCALE_MAX, Clip, ModelSpec, fresh
from victims.recipe import (
    BatchNormMode,
    Clock,
    OptimizerState,
    Recipe,
    Runtime,
    Schedule,
    lr_factor,
)
from victims.store import Store
from victims.training import Fit, FitReport, Objective, PlainClip, PlainClipSpec, optimizer_for

MODEL = ModelSpec()
# 99,968 clean pairs in batches of 64 are 1,562 steps.
FULL, STEPS = Recipe(epochs=10, batch_size=64, lr=1e-5, warmup_steps=50), 1562


def recipe(**fields: Any) -> Recipe:
    return Recipe(
        **{"epochs": 1, "batch_size": 16, "lr": 1e-3, "warmup_steps": 2, "seed": 3, **fields}
    )


def clean(store: Store, rows: int = 64) -> View:
    key = corpus_key(corpus_spec("clean"))
    return subset(whole(open_corpus(store, key, Reader.TRAINING)), np.arange(rows))


def fitted(
    view: View, recipe: Recipe, objective: Objective | None = None
) -> tuple[Clip, FitReport]:
    model = fresh(MODEL, 0)
    report = Fit(model, view, objective or PlainClip(), recipe, runtime=Runtime())()
    return model, report


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# --- the schedule


def test_the_fixed_schedule_at_full_scale() -> None:
    assert lr_factor(FULL, 0, STEPS) == pytest.approx(0.02)
    assert lr_factor(FULL, 49, STEPS) == 1.0
    assert lr_factor(FULL, 50, STEPS) == 1.0
    assert 0 <= lr_factor(FULL, 10 * STEPS - 1, STEPS) < 1e-7


def test_the_released_schedule_at_full_scale() -> None:
    """Warm-up is never seen, epoch 9 ends at zero, and the last epoch climbs again."""
    full = replace(FULL, schedule=Schedule.RELEASED)
    assert lr_factor(full, 0, STEPS) == pytest.approx(0.9769, abs=5e-5)
    assert lr_factor(full, 4 * STEPS, STEPS) == pytest.approx(0.5025, abs=5e-5)
    assert lr_factor(full, 9 * STEPS - 1, STEPS) < 1e-7
    assert lr_factor(full, 10 * STEPS - 1, STEPS) == pytest.approx(0.0246, abs=5e-5)


@pytest.mark.parametrize("late", [0, 1])
def test_the_schedule_is_its_equation(late: int) -> None:
    """Linear to step w, then 1/2 (1 + cos(pi (t - w) / (T - w))); released counts epochs from 1."""
    kind = Schedule.RELEASED if late else Schedule.FIXED
    small = recipe(epochs=3, warmup_steps=5, schedule=kind)
    for epoch in range(3):
        for index in range(7):
            t = 7 * (epoch + late) + index
            cosine = 0.5 * (1 + math.cos(math.pi * (t - 5) / (21 - 5)))
            expected = (t + 1) / 5 if t < 5 else cosine
            assert lr_factor(small, 7 * epoch + index, 7) == pytest.approx(expected)


def test_the_rates_that_are_used_are_the_scheduled_ones(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[float]] = []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        used.append(sorted({group["lr"] for group in optimizer.param_groups}))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    plan = recipe(epochs=2, text_lr_ratio=0.25)
    fitted(clean(small_store, 50), plan)
    factors = [lr_factor(plan, index, 3) for index in range(6)]
    assert len(used) == 6
    for rates, factor in zip(used, factors, strict=True):
        assert rates == pytest.approx([0.25e-3 * factor, 1e-3 * factor])


# --- the loop


class Recorder(PlainClip):
    """Plain CLIP that remembers which rows it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, list[int]]] = []

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.seen.append((clock.epoch, batch.rows.tolist()))
        return super().forward(model, batch, clock)


def test_rows_are_reshuffled_every_epoch_and_the_last_partial_batch_is_dropped(
    small_store: Store,
) -> None:
    recorder = Recorder()
    _, report = fitted(clean(small_store, 61), recipe(epochs=2), recorder)
    epochs = [[rows for e, rows in recorder.seen if e == epoch] for epoch in (0, 1)]
    for batches in epochs:
        assert [len(rows) for rows in batches] == [16, 16, 16]
        assert len({row for rows in batches for row in rows}) == 48
    assert epochs[0] != epochs[1]
    assert report.cost["steps"] == 6
    assert report.cost["images_backward"] == report.cost["texts_backward"] == 96


def by_hand(view: View, recipe: Recipe) -> Clip:
    """The algorithm in plain steps: shuffle, both cross-entropies by definition, AdamW, clamp."""
    model = fresh(MODEL, 0)
    model.train()
    names = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in names.items()}
    v = {name: torch.zeros_like(p) for name, p in names.items()}
    images, captions, t = view.corpus.images_NCHW[view.rows], view.captions(), 0
    for epoch in range(recipe.epochs):
        order = numpy_rng(recipe.seed, "order", epoch).permutation(len(view))
        for first in range(0, len(view) - recipe.batch_size + 1, recipe.batch_size):
            rows = order[first : first + recipe.batch_size]
            image_BD = model.encode_image(torch.from_numpy(images[rows]))
            tokens = torch.from_numpy(model.tokenizer([captions[row] for row in rows])).long()
            logits = model.net.logit_scale.exp() * image_BD @ model.encode_text(tokens).T
            by_row = logits.diagonal() - logits.logsumexp(1)
            by_column = logits.diagonal() - logits.logsumexp(0)
            model.zero_grad()
            (-(by_row.mean() + by_column.mean()) / 2).backward()
            steps = len(view) // recipe.batch_size
            rate = recipe.rate * lr_factor(recipe, t, steps)
            t += 1
            with torch.no_grad():
                for name, p in names.items():
                    assert p.grad is not None
                    lr = rate * (1 if name.startswith("net.visual.") else recipe.text_lr_ratio)
                    if p.ndim >= 2:
                        p.copy_(p - lr * recipe.weight_decay * p)
                    m[name] = recipe.beta1 * m[name] + (1 - recipe.beta1) * p.grad
                    v[name] = recipe.beta2 * v[name] + (1 - recipe.beta2) * p.grad**2
                    m_hat = m[name] / (1 - recipe.beta1**t)
                    v_hat = v[name] / (1 - recipe.beta2**t)
                    p.copy_(p - lr * m_hat / (v_hat.sqrt() + recipe.eps))
                names["net.logit_scale"].clamp_(0, math.log(100))
    return model


def test_the_loop_is_the_algorithm(small_store: Store) -> None:
    """With a large eps: where a gradient is nothing but rounding noise, Adam would blow it up."""
    view = clean(small_store, 40)
    plan = recipe(epochs=2, text_lr_ratio=0.2, lr=1e-2, eps=1e-2)
    found, _ = fitted(view, plan)
    expected, start = by_hand(view, plan).state_dict(), fresh(MODEL, 0).state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    parameters = {name for name, _ in found.named_parameters()}
    assert moved(start, expected) >= parameters


def test_no_rate_keeps_the_weights_bit_for_bit(small_store: Store) -> None:
    start = fresh(MODEL, 0).state_dict()
    still, _ = fitted(clean(small_store), recipe(lr=0.0))
    names = moved(start, still.state_dict())
    assert names
    assert all(name.split(".")[-1].startswith(("running_", "num_batches_")) for name in names)
    frozen, _ = fitted(clean(small_store), recipe(lr=0.0, bn_mode=BatchNormMode.EVAL))
    assert not moved(start, frozen.state_dict())


@pytest.mark.parametrize(("start", "bound"), [(SCALE_MAX - 1e-4, SCALE_MAX), (1e-4, 0.0)])
def test_the_logit_scale_stays_between_0_and_ln_100(
    small_store: Store, start: float, bound: float
) -> None:
    """Pushed against each bound by a loss that is nothing but the scale."""

    class Push(Objective):
        def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
            return {"push": model.net.logit_scale * (-1 if bound else 1)}

        def trainable(self, model: Clip) -> list[torch.nn.Parameter]:
            return [model.net.logit_scale]

    model = fresh(MODEL, 0)
    model.net.logit_scale.data.fill_(start)
    Fit(model, clean(small_store), Push(), recipe(lr=0.1, warmup_steps=0), runtime=Runtime())()
    assert float(model.net.logit_scale.detach()) == pytest.approx(bound, abs=1e-6)


def test_tensors_of_fewer_than_two_dimensions_do_not_decay() -> None:
    model = fresh(MODEL, 0)
    groups = optimizer_for(model, PlainClip(), recipe(weight_decay=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0), name
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    assert "net.logit_scale" in flat
    assert any("downsample.1.weight" in name for name in flat)
    assert any(".bn1.bias" in name for name in flat)


# --- the method

SIDES: dict[Part, Callable[[str], bool]] = {
    Part.IMAGE: lambda name: name.startswith("net.visual."),
    Part.TEXT: lambda name: not name.startswith("net.visual."),
    Part.PROJECTIONS: lambda name: name.startswith(
        ("net.text_projection", "net.visual.attnpool.c_proj.")
    ),
}


@pytest.mark.parametrize("part", SIDES)
def test_only_the_chosen_part_and_the_scale_move(small_store: Store, part: Part) -> None:
    start = dict(fresh(MODEL, 0).named_parameters())
    model, _ = fitted(clean(small_store, 32), recipe(), PartialClip(part))
    expected = {name for name in start if SIDES[part](name)} | {"net.logit_scale"}
    assert moved(start, dict(model.named_parameters())) == expected
    assert all(parameter.requires_grad for parameter in model.parameters())


def case(store: Store, lab: Lab, repair: Recipe, victim: ModelRef) -> Case:
    data = DataRef(corpus_key(corpus_spec("clean")), 256)
    grants = {Need.VICTIM: lambda: victim, Need.CLEAN_DATA: lambda: data}
    return Case("finetune", grants, (Recipes(victim=recipe(), repair=repair), 0))


def victim_of(lab: Lab) -> ModelRef:
    data = lab.put(clean(lab.store, 32))
    return lab.train(PlainClipSpec(), data, recipe(lr=5e-3, seed=77))


def test_the_plan_is_one_fit_from_the_victim_on_the_clean_data(small_store: Store) -> None:
    lab = Lab(small_store, MODEL, Runtime())
    victim, repair = victim_of(lab), recipe(batch_size=64)
    done = Finetune().apply(lab, case(small_store, lab, repair, victim))
    data = corpus_key(corpus_spec("clean"))
    assert done.model.key == model_key(PlainClipSpec(), repair, data, victim.key, MODEL)
    start, found = lab.load(victim).state_dict(), lab.load(done.model).state_dict()
    assert moved(start, found)
    assert done.flagged is None
    with pytest.raises(Forbidden, match="suspect_data"):
        _ = case(small_store, lab, repair, victim).suspect_data


def test_moments_are_carried_over_only_when_asked(small_store: Store) -> None:
    """And only where they were stored: the released code needs the key even for a fresh start."""
    lab = Lab(small_store, MODEL, Runtime(keep_optimizer=True))
    data = lab.put(clean(small_store, 32))
    victim = lab.train(PlainClipSpec(), data, recipe(seed=78))
    carry = recipe(batch_size=64, optimizer_state=OptimizerState.CARRY)
    found = [
        lab.load(Finetune().apply(lab, case(small_store, lab, plan, victim)).model).state_dict()
        for plan in (recipe(batch_size=64), carry)
    ]
    assert moved(*found)
    bare = Lab(small_store, MODEL, Runtime())
    with pytest.raises(GridError, match="keep_optimizer"):
        Finetune().apply(bare, case(small_store, bare, carry, victim_of(bare)))
