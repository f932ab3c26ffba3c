"""The training loop: against a slow loop written apart from it, and after any interruption."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.finetune import Part, PartialClip
from defenses.roclip import Augment, PooledCaptionsSpec, PoolInit, Query
from tests.conftest import corpus_spec
from victims.batches import Batch, Scan
from victims.checkpoints import load_moments, save_moments, set_moments
from victims.corpora import (
    Reader,
    Rows,
    View,
    annotate,
    build_corpus,
    corpus_key,
    open_corpus,
    subset,
    whole,
    with_text,
)
from victims.draws import numpy_rng
from victims.errors import GridError, MethodFailure
from victims.in_modal import InModalSpec, Side
from victims.lab import DataRef, Lab
from victims.models import SCALE_MAX, Clip, ModelSpec, fresh, load_weights, save_weights
from victims.recipe import (
    SAVES_APART,
    BatchNormMode,
    Clock,
    Descent,
    Precision,
    Recipe,
    Runtime,
    Schedule,
    lr_factor,
)
from victims.rewrite import EdaMode, eda_text
from victims.store import Store
from victims.training import (
    Fit,
    FitReport,
    Objective,
    ObjectiveSpec,
    PlainClip,
    PlainClipSpec,
    optimizer_for,
)

RECIPE = Recipe(epochs=2, batch_size=32, lr=2e-3, text_lr_ratio=0.5, warmup_steps=2, seed=5)
IN_MODAL = InModalSpec(
    clip_weight=1.0,
    inmodal_weight=0.5,
    image_policy="autoaugment",
    side=Side.BOTH,
    concat_views=True,
)
POOLED = PooledCaptionsSpec(
    every=2,
    pool_size=40,
    pool_init=PoolInit.EMPTY,
    refresh_in_plain_epochs=True,
    crop_scale=(0.5, 1.0),
    augment=Augment.BOTH,
    query=Query.IMAGE,
    text_drift=False,
)


def view_of(store: Store, num_rows: int = 128, eda: EdaMode = EdaMode.PER_EPOCH) -> View:
    """The first rows of the clean split, with two captions under EDA beside their own."""
    corpus = open_corpus(store, corpus_key(corpus_spec("clean")), Reader.TRAINING)
    view = subset(whole(corpus), np.arange(num_rows))
    texts = {n: eda_text(eda, "lexicon", seed) for seed, n in enumerate(("eda", "eda_again"), 1)}
    return with_text(view, texts)


class Stopped(Exception):
    """The fit was interrupted on purpose."""


class Interrupted(Fit):
    """A fit that dies at the start of a step."""

    stop_at = 10**9
    lrs: list[list[float]]

    def _train_step(self, module: nn.Module, index: int) -> None:
        if self.step >= self.stop_at:
            raise Stopped
        super()._train_step(module, index)
        if not hasattr(self, "lrs"):
            self.lrs = []
        self.lrs.append([group["lr"] for group in self.optimizer.param_groups])


@dataclass
class Kept:
    """Checkpoints in one file."""

    path: Path
    saves: int = 0

    def load(self) -> Path | None:
        return self.path if self.path.exists() else None

    def save(self, write: Callable[[Path], None]) -> None:
        self.saves += 1
        scratch = self.path.with_suffix(".new")
        write(scratch)
        scratch.replace(self.path)


def run_fit(
    view: View,
    spec: ObjectiveSpec | Objective,
    recipe: Recipe = RECIPE,
    *,
    checkpoints: Kept | None = None,
    stop_at: int | None = None,
    model: Clip | None = None,
) -> tuple[Interrupted, FitReport | None]:
    """A fit from the weights of seed 3; without a report when it was stopped on the way."""
    model = fresh(ModelSpec(), 3) if model is None else model
    torch.manual_seed(99)
    objective = spec if isinstance(spec, Objective) else spec.build(model)
    runtime = Runtime(checkpoint_seconds=0)
    fit = Interrupted(model, view, objective, recipe, runtime=runtime, checkpoints=checkpoints)
    if stop_at is None:
        return fit, fit()
    fit.stop_at = stop_at
    with pytest.raises(Stopped):
        fit()
    return fit, None


def state(fit: Fit) -> dict[str, Tensor]:
    """Weights, statistics and the objective's buffers."""
    found = {f"model.{n}": t for n, t in fit.model.state_dict().items()}
    found |= {f"objective.{n}": t for n, t in fit.objective.state_dict().items()}
    return {n: t.detach().clone() for n, t in found.items()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


def without_time(report: FitReport | None) -> Any:
    assert report is not None
    return report.curves, {n: v for n, v in report.cost.items() if not n.endswith("_seconds")}


# --- one whole fit against a slow loop


def slow_clip_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> Tensor:
    """Pair by pair, from the definition."""
    total, count = torch.zeros(()), len(image_BD)
    for i in range(count):
        by_image = torch.stack([scale * image_BD[i] @ text_BD[j] for j in range(count)])
        by_text = torch.stack([scale * text_BD[i] @ image_BD[j] for j in range(count)])
        total = total - by_image.log_softmax(0)[i] - by_text.log_softmax(0)[i]
    return total / (2 * count)


def slow_lr(recipe: Recipe, step: int, total: int) -> float:
    if step < recipe.warmup_steps:
        return recipe.rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule is Schedule.CONSTANT:
        return recipe.rate
    progress = (step - recipe.warmup_steps) / (total - recipe.warmup_steps)
    return recipe.rate * (1 + math.cos(math.pi * progress)) / 2


def test_a_fit_is_what_a_slow_loop_computes(small_store: Store) -> None:
    view = view_of(small_store, 50)
    recipe = replace(RECIPE, batch_size=16, eps=1e-5)
    fit, report = run_fit(view, PlainClipSpec(), recipe)
    assert report is not None

    model = fresh(ModelSpec(), 3).train()
    text_side = [p for n, p in model.named_parameters() if "visual" not in n]
    image_side = [p for n, p in model.named_parameters() if "visual" in n]
    optimizers = [
        torch.optim.AdamW([p], lr=1, eps=recipe.eps, weight_decay=0.1 if p.ndim > 1 else 0.0)
        for p in [*text_side, *image_side]
    ]
    captions, tokenizer = view.captions(), model.tokenizer
    step, curves = 0, []
    for epoch in range(2):
        order = numpy_rng(recipe.seed, "order", epoch).permutation(50)
        losses = []
        for start in (0, 16, 32):  # the last two rows do not fill a batch
            rows = order[start : start + 16]
            image = torch.stack([torch.tensor(view.corpus.images_NCHW[row]) for row in rows])
            tokens = torch.tensor(tokenizer([captions[row] for row in rows])).long()
            image_BD = F.normalize(model.net.encode_image((image / 255 - 0.47) / 0.30), dim=-1)
            text_BD = F.normalize(model.net.encode_text(tokens), dim=-1)
            loss = slow_clip_loss(image_BD, text_BD, model.net.logit_scale.exp())
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for index, optimizer in enumerate(optimizers):
                ratio = 0.5 if index < len(text_side) else 1.0
                optimizer.param_groups[0]["lr"] = slow_lr(recipe, step, 6) * ratio
                optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        curves.append(sum(losses) / 3)

    assert [record["clip"] for record in report.curves] == pytest.approx(curves, rel=1e-4)
    for name, parameter in model.named_parameters():
        found = fit.model.get_parameter(name)
        assert torch.allclose(found, parameter, rtol=1e-3, atol=2e-5), name
    assert report.cost["steps"] == 6


def test_curves_have_one_record_per_epoch(small_store: Store) -> None:
    fit, report = run_fit(view_of(small_store, 70), IN_MODAL, replace(RECIPE, epochs=3))
    assert report is not None
    assert [record["epoch"] for record in report.curves] == [0, 1, 2]
    for epoch, record in enumerate(report.curves):
        assert record.keys() == {
            "epoch", "steps", "lr", "scale", "clip", "inmodal_image", "inmodal_text"
        }  # fmt: skip
        assert record["steps"] == 2
        assert record["lr"] == pytest.approx(slow_lr(RECIPE, 2 * epoch + 1, 6))
    assert report.curves[-1]["scale"] == float(fit.model.scale.detach())


class Noted(PlainClip):
    """Plain CLIP that remembers which rows it saw and what its terms were."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []
        self.terms: list[float] = []

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.rows.append(batch.rows.tolist())
        terms = super().forward(model, batch, clock)
        self.terms.append(float(terms["clip"].detach()))
        return terms


def test_curves_are_means_and_the_last_rows_are_dropped(small_store: Store) -> None:
    noted = Noted()
    _, report = run_fit(view_of(small_store, 70), noted)
    assert report is not None
    means = [sum(noted.terms[:2]) / 2, sum(noted.terms[2:]) / 2]
    assert [record["clip"] for record in report.curves] == pytest.approx(means, rel=1e-6)
    assert [len(rows) for rows in noted.rows] == [32] * 4
    for first in (0, 2):
        seen = noted.rows[first] + noted.rows[first + 1]
        assert len(set(seen)) == 64, "a row was seen twice in an epoch"
        assert set(seen) <= set(range(70))
    assert noted.rows[0] != noted.rows[2], "both epochs have the same order"


def test_cost_counts_what_went_through_the_towers(small_store: Store) -> None:
    view = view_of(small_store, 64)
    _, plain = run_fit(view, PlainClipSpec())
    _, doubled = run_fit(view, IN_MODAL)
    assert plain is not None
    assert doubled is not None
    shown = ("images_forward", "images_backward", "texts_forward", "texts_backward")
    assert [plain.cost[name] for name in shown] == [128] * 4
    assert [doubled.cost[name] for name in shown] == [256] * 4


# --- schedule


@pytest.mark.parametrize("schedule", Schedule)
def test_the_learning_rate_is_the_planned_one(small_store: Store, schedule: Schedule) -> None:
    recipe = replace(RECIPE, epochs=3, warmup_steps=3, schedule=schedule)
    fit, _ = run_fit(view_of(small_store, 64), PlainClipSpec(), recipe)
    ratios = [group["ratio"] for group in fit.optimizer.param_groups]
    assert set(ratios) == {0.5, 1.0}
    # The released schedule counts from the second epoch on, past the end of the cosine.
    late = 2 if schedule is Schedule.RELEASED else 0
    for step, lrs in enumerate(fit.lrs):
        expected = slow_lr(recipe, step + late, 6)
        assert lrs == pytest.approx([expected * ratio for ratio in ratios])
    assert len(fit.lrs) == 6


def test_the_schedule_by_hand() -> None:
    recipe = Recipe(epochs=2, batch_size=1, lr=1, warmup_steps=4)
    factors = [lr_factor(recipe, step, 6) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.05
    assert lr_factor(replace(recipe, warmup_steps=0), 0, 6) == 1.0
    # As released: the warm-up is skipped by an epoch, and the last steps rise again.
    released = replace(recipe, schedule=Schedule.RELEASED)
    assert [lr_factor(released, step, 6) for step in (0, 2)] == pytest.approx([factors[6], 0.5])
    assert lr_factor(released, 11, 6) > lr_factor(released, 6, 6)


# --- what moves and what does not


def moved(part: Part, store: Store) -> tuple[set[str], set[str]]:
    before = fresh(ModelSpec(), 3)
    fit, _ = run_fit(view_of(store, 32), PartialClip(part), replace(RECIPE, epochs=3))
    assert all(p.requires_grad for p in fit.model.parameters()), "left frozen behind"
    names = {n for n, _ in before.named_parameters()}
    frozen = {n for n in names if fit.model.get_parameter(n).grad is None}
    changed = {
        n for n in names if not torch.equal(before.get_parameter(n), fit.model.get_parameter(n))
    }
    assert not frozen & changed
    assert frozen | changed == names, "gradients were computed for what is frozen"
    return changed, names


def test_frozen_parameters_do_not_move_and_the_others_do(small_store: Store) -> None:
    scale = {"net.logit_scale"}
    image, names = moved(Part.IMAGE, small_store)
    text, _ = moved(Part.TEXT, small_store)
    projections, _ = moved(Part.PROJECTIONS, small_store)
    visual = {n for n in names if n.startswith("net.visual.")}
    assert image - scale <= visual
    assert text - scale <= names - visual
    assert {n.rpartition(".")[2] for n in projections - scale} <= {
        "text_projection", "weight", "bias"
    }  # fmt: skip
    assert all("c_proj" in n or "text_projection" in n for n in projections - scale)
    assert scale <= image & text & projections
    assert image | text == names, "what should move stays"


def test_decay_spares_what_has_fewer_than_two_dimensions() -> None:
    model = fresh(ModelSpec(), 0)
    optimizer = optimizer_for(model, PlainClip(), RECIPE)
    names = {id(p): n for n, p in model.named_parameters()}
    text = model.text_tower()
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0), name
            assert group["ratio"] == (0.5 if name in text else 1.0), name
        assert group["fused"], "the fused form is what was measured"
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    assert sorted(seen) == sorted(names.values()), "every parameter once"
    assert "net.logit_scale" in text


def test_decay_acts_on_weights_without_gradient() -> None:
    model = fresh(ModelSpec(), 0)
    optimizer = optimizer_for(model, PlainClip(), replace(RECIPE, lr=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


class Nothing(PlainClip):
    def trainable(self, model: Clip) -> Iterable[nn.Parameter]:
        return []


class Learner(PlainClip):
    """An objective with a parameter of its own, and nothing else to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def trainable(self, model: Clip) -> Iterable[nn.Parameter]:
        return []

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return {"own": self.weight.square().sum()}


def test_an_objective_may_bring_parameters_and_must_train_something(small_store: Store) -> None:
    view = view_of(small_store, 32)
    with pytest.raises(GridError, match="nothing to train"):
        run_fit(view, Nothing())
    learner = Learner()
    fit, _ = run_fit(view, learner)
    assert (learner.weight < 1).all()
    reference = dict(fresh(ModelSpec(), 3).named_parameters())
    assert_same(reference, dict(fit.model.named_parameters()))


@pytest.mark.parametrize(("start", "bound"), [(10.0, SCALE_MAX), (-3.0, 0.0)])
def test_the_logit_scale_is_clamped(small_store: Store, start: float, bound: float) -> None:
    model = fresh(ModelSpec(), 3)
    model.net.logit_scale.data.fill_(start)
    run_fit(view_of(small_store, 32), PlainClipSpec(), replace(RECIPE, epochs=1), model=model)
    assert float(model.net.logit_scale.detach()) == pytest.approx(bound)
    assert float(model.scale.detach()) <= 100.001


def test_batch_norm_statistics_move_only_when_asked(small_store: Store) -> None:
    view, name = view_of(small_store, 32), "net.visual.bn1.running_mean"
    before = fresh(ModelSpec(), 3).state_dict()[name]
    trained, _ = run_fit(view, PlainClipSpec())
    frozen, _ = run_fit(view, PlainClipSpec(), replace(RECIPE, bn_mode=BatchNormMode.EVAL))
    assert not torch.equal(trained.model.state_dict()[name], before)
    assert torch.equal(frozen.model.state_dict()[name], before)
    assert not trained.model.training
    assert not frozen.model.training


def test_half_precision_trains_in_full_precision_weights(small_store: Store) -> None:
    view = view_of(small_store, 64)
    _, plain = run_fit(view, PlainClipSpec())
    half, report = run_fit(view, PlainClipSpec(), replace(RECIPE, precision=Precision.BF16))
    assert report is not None
    assert plain is not None
    assert report.curves[0]["clip"] == pytest.approx(plain.curves[0]["clip"], rel=0.05)
    assert report.curves[0]["clip"] != plain.curves[0]["clip"]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


# --- seeds


def test_the_seed_decides_and_nothing_else_does(small_store: Store) -> None:
    view = view_of(small_store, 64)
    first, one = run_fit(view, IN_MODAL)
    torch.manual_seed(12345)
    np.random.seed(1)
    second, two = run_fit(view, IN_MODAL)
    assert_same(state(first), state(second))
    assert without_time(one) == without_time(two)
    other, _ = run_fit(view, IN_MODAL, replace(RECIPE, seed=6))
    assert not torch.equal(state(first)["model.net.visual.conv1.weight"],
                           state(other)["model.net.visual.conv1.weight"])  # fmt: skip


# --- errors


def test_more_rows_than_there_are_is_an_error(small_store: Store) -> None:
    with pytest.raises(GridError, match=r"31 rows do not fill one batch of 32.*smaller batch_size"):
        run_fit(view_of(small_store, 31), PlainClipSpec())


class Breaks(PlainClip):
    """One of two terms is not finite from a step on; an infinite one may mend again."""

    def __init__(self, step: int, value: float, mends: bool = False) -> None:
        super().__init__()
        self.step, self.value, self.mends = step, value, mends

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        terms = super().forward(model, batch, clock)
        now = clock.step == self.step if self.mends else clock.step >= self.step
        return {**terms, "penalty": torch.tensor(self.value if now else 0.0)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mends", [False, True])
def test_a_loss_that_is_not_finite_names_term_and_step(
    small_store: Store, value: float, mends: bool
) -> None:
    says = r"not finite: penalty at step 2; still finite: clip\. Lower the learning rate"
    with pytest.raises(MethodFailure, match=says):
        run_fit(view_of(small_store), Breaks(2, value, mends))


def test_a_diverging_fit_stops_as_an_outcome(small_store: Store) -> None:
    recipe = replace(RECIPE, lr=1e30, epochs=3, warmup_steps=0)
    with pytest.raises(MethodFailure, match=r"clip at step [1-9]"):
        run_fit(view_of(small_store), PlainClipSpec(), recipe)


def test_a_broken_loss_is_found_within_fifty_steps(small_store: Store) -> None:
    recipe = replace(RECIPE, epochs=1, batch_size=2)
    broken = Breaks(1, math.nan)
    fit_steps = []

    class Counting(Interrupted):
        def _train_step(self, module: nn.Module, index: int) -> None:
            super()._train_step(module, index)
            fit_steps.append(self.step)

    fit = Counting(
        fresh(ModelSpec(), 3), view_of(small_store, 256), broken, recipe, runtime=Runtime()
    )
    with pytest.raises(MethodFailure):
        fit()
    assert fit_steps[-1] == 50


def test_a_recipe_that_means_nothing_is_refused() -> None:
    for name, value in {"epochs": 0, "batch_size": 0, "lr": -1, "warmup_steps": -1}.items():
        change: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=name):
            replace(RECIPE, **change)


# --- begin_epoch


@dataclass(frozen=True)
class Brightness:
    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        assert not model.training
        return batch.image.float().mean((1, 2, 3))


class Chooses(Noted):
    """Visits the rows it is told, in order, and scores all of them first."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__()
        self.chosen, self.scores = chosen, np.zeros(0)

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        self.scores = scan(Brightness())
        assert model.training
        return np.asarray(self.chosen, dtype=np.int64)


def test_an_objective_may_choose_the_rows_of_an_epoch(small_store: Store) -> None:
    view, chosen = view_of(small_store, 64), list(range(63, 23, -1))
    objective = Chooses(chosen)
    _, report = run_fit(view, objective)
    assert objective.rows == [chosen[:32]] * 2
    images_NCHW = view.corpus.images_NCHW[:64]
    assert objective.scores == pytest.approx(images_NCHW.mean((1, 2, 3)), rel=1e-5)
    assert report is not None
    assert report.curves[0]["steps"] == 1


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (list(range(31)), "chose 31 rows in epoch 0, which do not fill one batch of 32"),
        ([*range(31), 64], "chose the row 0 or 64; rows lie in 0..63"),
        ([*range(31), -1], "chose the row -1 or 30; rows lie in 0..63"),
    ],
)
def test_rows_that_make_no_epoch_are_refused(
    small_store: Store, chosen: list[int], says: str
) -> None:
    with pytest.raises(MethodFailure, match=f"Chooses: begin_epoch {says}"):
        run_fit(view_of(small_store, 64), Chooses(chosen))


# --- interruption and resumption


class Dropout(PlainClip):
    """Draws from torch's global generator, as code taken from elsewhere may."""

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        noise = torch.rand(())
        return {n: t * (1 + noise) for n, t in super().forward(model, batch, clock).items()}


RESUMED: dict[str, ObjectiveSpec | type[Objective]] = {
    "plain": PlainClipSpec(),
    "views": IN_MODAL,
    "pool": POOLED,
    "global": Dropout,
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_fit_is_the_same_to_the_bit(
    small_store: Store, tmp_path: Path, name: str
) -> None:
    """Four steps an epoch, stopped before and at the end of an epoch and inside the second, which
    for the pooled objective is a matching one, where the text tower stands still.
    """
    made = RESUMED[name]

    def spec() -> ObjectiveSpec | Objective:
        return made() if isinstance(made, type) else made

    view, recipe = view_of(small_store, 64), replace(RECIPE, batch_size=16)
    whole_, undisturbed = run_fit(view, spec(), recipe)
    for stop_at in (3, 4, 6):
        kept = Kept(tmp_path / f"fit{stop_at}")
        run_fit(view, spec(), recipe, checkpoints=kept, stop_at=stop_at)
        assert kept.saves == stop_at
        again, resumed = run_fit(view, spec(), recipe, checkpoints=kept)
        assert again.step == 8
        assert len(again.lrs) == 8 - stop_at, "steps were repeated"
        assert_same(state(whole_), state(again))
        assert without_time(undisturbed) == without_time(resumed)


class SlowDisk:
    """Checkpoints that take 50 s to save, on a clock on which nothing else takes time but a
    20 s for every look at it."""

    def __init__(self) -> None:
        self.now, self.saves = 0.0, list[float]()

    def __call__(self) -> float:
        self.now += 20
        return self.now

    def load(self) -> None:
        return None

    def save(self, write: Callable[[Path], None]) -> None:
        self.saves.append(self.now)
        self.now += 50


def test_saving_takes_no_more_than_a_twentieth_of_a_fit(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saves(seconds: float) -> list[float]:
        disk, view = SlowDisk(), view_of(small_store)
        model = fresh(ModelSpec(), 0)
        runtime = Runtime(checkpoint_seconds=seconds)
        recipe = replace(RECIPE, epochs=40)
        fit = Fit(
            model, view, PlainClipSpec().build(model), recipe, runtime=runtime, checkpoints=disk
        )
        monkeypatch.setattr(time, "perf_counter", disk)
        monkeypatch.setattr(Fit, "_train_step", one_step)
        monkeypatch.setattr(Fit, "_end_epoch", one_epoch)
        fit()
        monkeypatch.undo()
        assert disk.now > 3 * SAVES_APART * 50
        return disk.saves

    def one_step(self: Fit, module: nn.Module, index: int) -> None:
        self.step += 1
        time.perf_counter()

    def one_epoch(self: Fit, num_steps: int) -> None:
        self.order, self.epoch = None, self.epoch + 1

    rare, every = saves(10), saves(0)
    assert len(rare) >= 2
    assert min(np.diff(rare)) >= SAVES_APART * 50
    assert len(every) == 40 * 128 // RECIPE.batch_size


def test_moments_fit_the_layout_of_their_weights(small_store: Store, tmp_path: Path) -> None:
    """AdamW's fused form walks memory: convolution weights lie in channels-last order, files in
    plain order, and moments loaded as they lie in the file met the wrong weights, unnoticed.
    """
    view = view_of(small_store, 64)
    fit, _ = run_fit(view, PlainClipSpec())
    save_moments(fit.optimizer, tmp_path / "moments")
    model = fresh(ModelSpec(), 3)
    optimizer = optimizer_for(model, PlainClip(), RECIPE)
    load_moments(optimizer, model, tmp_path / "moments")
    shuffled = 0
    for old, new in zip(fit.model.parameters(), model.parameters(), strict=True):
        before, after = fit.optimizer.state[old], optimizer.state[new]
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name])
        assert after["exp_avg"].stride() == new.stride()
        shuffled += not new.is_contiguous()
    assert shuffled > 3, "nothing here is in channels-last order: the test shows nothing"


def test_moments_of_another_model_are_refused(small_store: Store, tmp_path: Path) -> None:
    fit, _ = run_fit(view_of(small_store, 32), PlainClipSpec(), replace(RECIPE, epochs=1))
    save_moments(fit.optimizer, tmp_path / "moments")
    model = fresh(ModelSpec(), 3)
    optimizer = optimizer_for(model, PartialClip(Part.TEXT), RECIPE)
    with pytest.raises(GridError, match="carry needs a fit over the same parameters"):
        load_moments(optimizer, model, tmp_path / "moments")


def test_a_fit_starts_from_fresh_moments() -> None:
    optimizer = optimizer_for(fresh(ModelSpec(), 3), PlainClip(), RECIPE)
    assert not optimizer.state
    set_moments(optimizer, {})
    assert not optimizer.state


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    small_store: Store, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    view, kept = view_of(small_store, 64), Kept(tmp_path / "fit")
    undisturbed, report = run_fit(view, PlainClipSpec())
    run_fit(view, PlainClipSpec(), checkpoints=kept, stop_at=2)
    kept.path.write_bytes(kept.path.read_bytes()[:-100] if content is None else content)
    again, resumed = run_fit(view, PlainClipSpec(), checkpoints=kept)
    assert "the fit starts over" in caplog.text
    assert_same(state(undisturbed), state(again))
    assert without_time(report) == without_time(resumed)


KILLED = """
import sys
import torch
from tests.conftest import corpus_spec
from tests.test_training import IN_MODAL, RECIPE, train_in
from victims.recipe import Runtime
from victims.store import Store
torch.set_num_threads(1)
train_in(Store(sys.argv[1]), Runtime(checkpoint_seconds=0))
"""


def train_in(store: Store, runtime: Runtime) -> Path:
    """A model trained through the lab; its folder."""
    lab = Lab(store, ModelSpec(), runtime)
    data = lab.with_text(
        DataRef(corpus_key(corpus_spec("clean")), 256), eda=eda_text(EdaMode.STATIC, "lexicon", 0)
    )
    return store.need(lab.train(IN_MODAL, data, RECIPE).key).folder


def test_a_killed_process_loses_only_steps(small_store: Store, tmp_path: Path) -> None:
    """SIGKILL in the middle of a fit; another process goes on; the weights are the same bytes."""
    store = Store(tmp_path / "store")
    build_corpus(store, corpus_spec("clean"))
    command = [sys.executable, "-c", KILLED, store.uri]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 60
        while not list(Path(store.root, "partial").glob("*/fit.safetensors")):
            assert child.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert store.keys("model") == set()
    resumed = train_in(store, Runtime())
    assert not list(Path(store.root, "partial").glob("*")), "checkpoints of finished work stay"
    undisturbed = train_in(small_store, Runtime(checkpoint_seconds=1e9))
    for name in ("weights.safetensors", "curves.json"):
        assert (resumed / name).read_bytes() == (undisturbed / name).read_bytes()


# --- what is in no key


def test_runtime_is_in_no_key(small_store: Store) -> None:
    """Another number of threads, another checkpoint interval: the same model is found."""
    folders = {
        train_in(small_store, runtime)
        for runtime in (
            Runtime(),
            Runtime(threads=2, checkpoint_seconds=1.0),
            Runtime(keep_optimizer=True),
            Runtime(checkpoint_activations=True),
        )
    }
    assert len(folders) == 1


def test_weights_come_back_as_they_were(small_store: Store, tmp_path: Path) -> None:
    fit, _ = run_fit(view_of(small_store, 32), PlainClipSpec())
    save_weights(fit.model, tmp_path / "weights")
    loaded = load_weights(Clip(ModelSpec()), tmp_path / "weights", "test")
    assert_same(fit.model.state_dict(), loaded.state_dict())


# --- ending, counting and watching


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLevel:
    """The first level of every picture."""

    name: ClassVar[str] = "first_level"
    version: ClassVar[int] = 1

    def __call__(self, model: Clip, batch: Batch) -> Tensor:
        assert not model.training
        return batch.image[:, 0, 0, 0]


class Ends(PlainClip):
    """Visits sixteen rows in each of three epochs and ends; notes what it sees of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scans: list[tuple[int, list[str], list[float]]] = []

    def rows_per_epoch(self, num_rows: int) -> int:
        return 16

    def begin_epoch(
        self, model: Clip, scan: Scan, clock: Clock, rng: np.random.Generator
    ) -> Rows | None:
        rows = np.array([5, 2, 40])
        levels = scan(FirstLevel(), rows).tolist()
        self.scans.append((len(scan), sorted(scan.columns), levels))
        if clock.epoch == 3:
            return np.zeros(0, dtype=np.int64)
        return rng.permutation(len(scan))[:16]

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        terms = super().forward(model, batch, clock)
        self.watched = {"doubled": 2 * terms["clip"].detach()}
        return terms


class EndsSpec:
    def build(self, model: Clip) -> Objective:
        return Ends()


def test_an_objective_ends_its_fit_and_counts_its_own_steps(small_store: Store) -> None:
    view = annotate(view_of(small_store, 48), {"mark": np.arange(48)})
    recipe = replace(RECIPE, epochs=10, batch_size=8, warmup_steps=0)
    fit, report = run_fit(view, EndsSpec(), recipe)
    assert report is not None
    assert [record["steps"] for record in report.curves] == [2, 2, 2]
    assert report.cost["steps"] == 6
    assert fit.total_steps == 20, "the schedule counts the rows that an epoch visits"
    expected = [recipe.rate * lr_factor(recipe, step, 2) for step in range(6)]
    assert [lrs[-1] for lrs in fit.lrs] == pytest.approx(expected)
    levels = [float(view.corpus.images_NCHW[row][0, 0, 0]) for row in (5, 2, 40)]
    assert fit.objective.scans == [(48, ["mark"], levels)] * 4


def test_what_is_watched_joins_the_curves_and_no_loss(small_store: Store) -> None:
    recipe = replace(RECIPE, epochs=10, batch_size=8)
    fit, report = run_fit(view_of(small_store, 48), EndsSpec(), recipe)
    assert report is not None
    for record in report.curves:
        assert record["doubled"] == pytest.approx(2 * record["clip"])

    class Unwatched(Ends):
        def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
            return PlainClip.forward(self, model, batch, clock)

    class UnwatchedSpec:
        def build(self, model: Clip) -> Objective:
            return Unwatched()

    plain, _ = run_fit(view_of(small_store, 48), UnwatchedSpec(), recipe)
    assert all(torch.equal(a, state(plain)[n]) for n, a in state(fit).items())


def test_a_descent_by_hand() -> None:
    """Linear from the start to the middle over half of the steps, then a cosine to the end."""
    shape = Descent(middle=0.1, end=1e-9 / 3e-5)
    recipe = Recipe(epochs=1, batch_size=1, lr=3e-5, schedule=shape, warmup_steps=7)
    rates = [recipe.rate * lr_factor(recipe, step, 101) for step in range(101)]
    assert rates[0] == 3e-5
    assert rates[50] == pytest.approx(3e-5 - 2.7e-5 * 50 / 50.5)
    assert rates[-1] == pytest.approx(1e-9)
    assert rates == sorted(rates, reverse=True)
    half = [3e-5 * shape.factor(step, 100) for step in range(100)]
    assert half[50] == pytest.approx(3e-6), "the middle value, at the first step of the second half"
