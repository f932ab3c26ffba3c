"""PAR against loops written from its equations, its limiting cases, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses.base import Case, Defended, Need, Recipes
from defenses.finetune import Finetune
from defenses.par import Par
from tests.conftest import corpus_spec
from tests.test_cleanclip import vit
from tests.test_losses import features, slow
from tests.test_training import Kept, run_fit, state
from victims.augment import NoiseErase, augment
from victims.away import Away, AwaySpec, Gate, Sides, gate_notes, pushed
from victims.batches import Batch
from victims.corpora import Reader, View, corpus_key, open_corpus, subset, whole
from victims.draws import Draws, torch_rng
from victims.errors import UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.losses import clip_loss
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import (
    BatchNormMode,
    Clock,
    Descent,
    Recipe,
    Runtime,
    Schedule,
    Select,
    lr_factor,
)
from victims.store import Store
from victims.training import Fit, FitReport, Objective, ObjectiveSpec, PlainClipSpec

MODEL = ModelSpec()
SPEC = AwaySpec(
    threshold=2.15,
    weight=0.5,
    gate=Gate.BATCH,
    sides=Sides.BOTH,
    train_scale=False,
    policy=NoiseErase(),
)
OFF = NoiseErase(noise_probability=0.0, erase_probability=0.0)
START = Clock(0, 0, 1)
RECIPE = Recipe(
    epochs=2, batch_size=16, lr=1e-3, warmup_steps=0, seed=4, bn_mode=BatchNormMode.EVAL
)


def view(store: Store, rows: int = 64) -> View:
    corpus = open_corpus(store, corpus_key(corpus_spec("clean")), Reader.TRAINING)
    return subset(whole(corpus), np.arange(rows))


def fitted(
    data: View,
    objective: Objective | ObjectiveSpec,
    recipe: Recipe = RECIPE,
    model: Clip | None = None,
) -> tuple[dict[str, Tensor], FitReport]:
    model = fresh(MODEL, 0) if model is None else model
    objective = objective if isinstance(objective, Objective) else objective.build(model)
    report = Fit(model, data, objective, recipe, runtime=Runtime())()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, report


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


# --- the loss, on given features


@dataclass
class Stub:
    """A model that answers with given features."""

    image: Tensor
    text: Tensor
    scale: Tensor
    mean_C: Tensor

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return self.image

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return self.text


@cache
def small_model() -> Clip:
    return fresh(MODEL, 0)


def away(spec: AwaySpec, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Any:
    """The objective after one step, and its terms, for features of a model and of its victim."""
    rows, scale, mean = len(now[0]), torch.tensor(14.0, dtype=torch.float64), torch.zeros(3)
    objective = Away(spec, small_model())
    if objective.victim:
        objective.victim = (cast("Clip", Stub(*then, scale, mean)),)
    batch = Batch(
        rows=torch.arange(rows),
        image=torch.zeros(rows, 3, 32, 32, dtype=torch.uint8),
        tokens=torch.ones(rows, 4, dtype=torch.long),
        views={"image": torch.zeros(rows, 3, 32, 32)},
    )
    return objective, objective(cast("Clip", Stub(*now, scale, mean)), batch, START)


def slow_distances(now: Tensor, then: Tensor) -> list[float]:
    return [
        sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
        for a, b in zip(now.tolist(), then.tolist(), strict=True)
    ]


def slow_away(distances: list[float], threshold: float, gate: Gate) -> tuple[float, float]:
    """[S <= tau] S and the share that is switched off."""
    if gate is Gate.BATCH:
        level = sum(distances) / len(distances)
        return (level, 0.0) if level <= threshold else (0.0, 1.0)
    kept = [d for d in distances if d <= threshold]
    return sum(kept) / len(distances), 1 - len(kept) / len(distances)


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("sides", Sides)
@pytest.mark.parametrize("threshold", [1.2, 2.0, 2.15, 3.0])
def test_each_term_is_its_equation(gate: Gate, sides: Sides, threshold: float) -> None:
    now, then = (features(0), features(1)), (features(2), features(3))
    spec = replace(SPEC, threshold=threshold, gate=gate, sides=sides, weight=0.7)
    objective, terms = away(spec, now, then)
    expected = {"clip": slow("clip", *now, 14.0)}
    watched = {}
    for side, a, b in zip(("image", "text"), now, then, strict=True):
        if sides in ("both", side):
            distances = slow_distances(a, b)
            counted, gated = slow_away(distances, threshold, gate)
            expected[f"away_{side}"] = -0.7 * counted
            watched[f"distance_{side}"] = sum(distances) / len(distances)
            watched[f"further_{side}"] = watched[f"distance_{side}"]
            watched[f"gated_{side}"] = gated
    assert {n: float(t) for n, t in terms.items()} == pytest.approx(expected, rel=1e-9)
    told = {n: float(t) for n, t in objective.watched.items()}
    # The buffer of the largest distance is in single precision.
    rounded = {n: 1e-6 if n.startswith("further") else 1e-9 for n in watched}
    assert told.keys() == watched.keys()
    for name, value in watched.items():
        assert told[name] == pytest.approx(value, rel=rounded[name])


def test_each_side_has_a_gate_of_its_own() -> None:
    """One side far, one near; the other way round the other term falls away."""
    near, far, base = features(0), -features(0), features(0)
    for sides in ((near, far), (far, near)):
        _, terms = away(replace(SPEC, threshold=2.0), sides, (base, base))
        kept = [float(terms[name]) for name in ("away_image", "away_text")]
        assert kept == [0.0, 0.0]
    turned = torch.stack([base[:, 1], -base[:, 0], *base[:, 2:].unbind(1)], dim=1)
    mean = sum(slow_distances(turned, base)) / len(base)
    assert 0 < mean < 2
    for sides, name in (((turned, far), "away_image"), ((far, turned), "away_text")):
        objective, terms = away(replace(SPEC, threshold=2.0), sides, (base, base))
        other = ({"away_image", "away_text"} - {name}).pop()
        assert float(terms[name]) == pytest.approx(-0.5 * mean)
        assert float(terms[other]) == 0
        assert float(objective.watched[other.replace("away", "gated")]) == 1


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 4), st.sampled_from(Gate))
def test_distances_and_their_sum_keep_their_bounds(seed: int, tau: float, gate: Gate) -> None:
    """S = 2 - 2 mean cos in 0..4; at weight 1/2 the loss is below L_mm by tau at most."""
    now = (features(seed), features(seed + 1))
    then = (features(seed + 2), features(seed + 3))
    objective, terms = away(replace(SPEC, threshold=tau, gate=gate), now, then)
    for side, a, b in zip(("image", "text"), now, then, strict=True):
        distance = float(objective.watched[f"distance_{side}"])
        assert distance == pytest.approx(2 - 2 * float((a * b).sum(-1).mean()), abs=1e-6)
        assert 0 <= distance <= 4
    below = float(terms["away_image"] + terms["away_text"])
    assert -tau - 1e-9 <= below <= 0


@pytest.mark.parametrize("gate", Gate)
def test_the_threshold_itself_still_counts(gate: Gate) -> None:
    distance = torch.full((4,), 2.15, dtype=torch.float64, requires_grad=True)
    kept = pushed(distance, 2.15, gate)
    assert float(kept.distance.detach()) == 2.15
    assert float(kept.gated) == 0
    kept.distance.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(cast("Tensor", distance.grad), torch.full((4,), 0.25, dtype=torch.float64))
    beyond = torch.full((4,), 2.1501, dtype=torch.float64, requires_grad=True)
    dropped = pushed(beyond, 2.15, gate)
    assert float(dropped.distance.detach()) == 0
    assert float(dropped.gated) == 1
    dropped.distance.backward()  # type: ignore[no-untyped-call]
    assert not cast("Tensor", beyond.grad).any()


def test_a_batch_is_judged_by_its_mean_and_a_sample_by_itself() -> None:
    distance = torch.tensor([1.0, 3.0], requires_grad=True)
    batch, sample = pushed(distance, 2.0, Gate.BATCH), pushed(distance, 2.0, Gate.SAMPLE)
    assert (float(batch.distance.detach()), float(batch.gated)) == (2.0, 0.0)
    assert (float(sample.distance.detach()), float(sample.gated)) == (0.5, 0.5)
    (grad,) = torch.autograd.grad(sample.distance, distance)
    assert grad.tolist() == [0.5, 0.0]


def test_a_broken_distance_is_not_hidden_by_the_gate() -> None:
    assert math.isnan(float(pushed(torch.tensor([math.nan, 1.0]), 2.0, Gate.BATCH).distance))


# --- the first step


def first_step(
    store: Store, model: Clip, bn_mode: BatchNormMode, spec: AwaySpec = SPEC
) -> tuple[Objective, dict[str, Tensor]]:
    """The objective on 16 augmented pairs before anything has moved."""
    data = view(store, 16)
    objective = spec.build(model)
    fit = Fit(model, data, objective, replace(RECIPE, bn_mode=bn_mode), runtime=Runtime())
    fit._set_mode()
    batch = fit.loader(np.arange(16))
    draws = Draws(torch_rng(0, "views"), 16, 0, 16)
    batch = replace(batch, views=objective.views(batch, draws))
    assert not torch.equal(batch.views["image"], batch.image / 255)
    return objective, objective(model, batch, START)


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_at_the_start_the_distances_and_their_gradients_are_exactly_0(
    small_store: Store, arch: str, gate: Gate
) -> None:
    """Of any attention kernel that torch has for models in eval mode, too."""
    model = vit() if arch == "vit" else fresh(MODEL, 0)
    spec = replace(SPEC, gate=gate)
    objective, terms = first_step(small_store, model, BatchNormMode.EVAL, spec)
    for side in ("image", "text"):
        assert float(objective.watched[f"distance_{side}"]) == 0
        assert float(terms[f"away_{side}"].detach()) == 0
        grads = torch.autograd.grad(
            terms[f"away_{side}"], list(objective.trainable(model)), allow_unused=True,
            retain_graph=True,
        )  # fmt: skip
        reached = [grad for grad in grads if grad is not None]
        assert reached
        assert not any(bool(grad.any()) for grad in reached)
    total = torch.stack(list(terms.values())).sum()
    assert torch.equal(total, terms["clip"])
    pulls = torch.autograd.grad(total, list(objective.trainable(model)), allow_unused=True)
    assert any(grad is not None and bool(grad.any()) for grad in pulls)


def test_in_train_mode_the_model_starts_away_from_its_victim(small_store: Store) -> None:
    """Batch statistics are not those the victim was frozen with."""
    objective, _ = first_step(small_store, fresh(MODEL, 0), BatchNormMode.TRAIN)
    assert float(objective.watched["distance_image"]) > 1e-3
    assert float(objective.watched["distance_text"]) == 0


# --- what moves and what does not


def test_the_victim_stays_and_is_no_part_of_the_objective(small_store: Store) -> None:
    model = fresh(MODEL, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = cast("Away", SPEC.build(model))
    found, _ = fitted(view(small_store), objective, model=model)
    (victim,) = objective.victim
    assert not differing(before, victim.state_dict())
    assert not victim.training
    assert not any(m.training for m in victim.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not any(p.requires_grad or p.grad is not None for p in victim.parameters())
    assert not list(objective.parameters())
    assert set(objective.state_dict()) == {"farthest_2"}
    moved = differing(before, found)
    assert {"net.visual.conv1.weight", "net.token_embedding.weight"} <= moved
    assert "net.logit_scale" not in moved
    assert not any("running" in name for name in moved), "batch normalisation in eval mode"


def test_the_scale_is_trained_when_asked(small_store: Store) -> None:
    before = fresh(MODEL, 0).state_dict()
    found, _ = fitted(view(small_store), replace(SPEC, train_scale=True))
    assert "net.logit_scale" in differing(before, found)


@pytest.mark.parametrize(
    ("fields", "images", "texts"),
    [
        ({}, 2, 2),
        ({"sides": Sides.IMAGE}, 2, 1),
        ({"sides": Sides.TEXT}, 1, 2),
        ({"weight": 0.0}, 1, 1),
    ],
)
def test_the_victims_passes_are_paid_for(
    small_store: Store, fields: dict[str, Any], images: int, texts: int
) -> None:
    _, report = fitted(view(small_store, 16), replace(SPEC, **fields))
    cost = {name: count / 32 for name, count in report.cost.items()}
    assert cost["images_backward"] == cost["texts_backward"] == 1
    assert (cost["images_forward"], cost["texts_forward"]) == (images, texts)


def test_erased_squares_are_0_for_the_network_and_scale_with_the_picture(
    small_store: Store,
) -> None:
    model, rows = fresh(MODEL, 0), 256
    image = torch.full((rows, 3, 32, 32), 255, dtype=torch.uint8)
    batch = Batch(torch.arange(rows), image, torch.ones(rows, 4, dtype=torch.long))
    objective = replace(SPEC, policy=NoiseErase(noise_probability=0.0)).build(model)
    seen = objective.views(batch, Draws(torch_rng(0, "views"), rows, 0, rows))["image"]
    zero_BHW = (model.normalise(seen) == 0).all(1)
    sides = {math.isqrt(int(area)) for area in zero_BHW.sum((1, 2)) if area}
    assert sides == {2, 3}
    assert abs(float(zero_BHW.any(2).any(1).float().mean()) - 0.5) < 0.1


# --- limiting cases


class Reference(Objective):
    """Plain CLIP on augmented pictures, with the scale frozen or not."""

    def __init__(self, policy: NoiseErase, train_scale: bool) -> None:
        super().__init__()
        self.policy, self.train_scale = policy, train_scale

    def trainable(self, model: Clip) -> Any:
        named = model.named_parameters()
        return [p for n, p in named if self.train_scale or "logit_scale" not in n]

    def views(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        return {"image": augment(self.policy, batch.image, draws)}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        image_BD = model.encode_image(batch.views["image"])
        return {"clip": clip_loss(image_BD, model.encode_text(batch.tokens), model.scale)}


@pytest.mark.parametrize("fields", [{"weight": 0.0}, {"threshold": 0.0}])
def test_without_the_push_it_is_clip_on_lightly_augmented_pictures(
    small_store: Store, fields: dict[str, float]
) -> None:
    data = view(small_store, 32)
    colour = NoiseErase(erase_color=(0.47, 0.47, 0.47))
    expected, _ = fitted(data, Reference(colour, train_scale=False))
    found, _ = fitted(data, replace(SPEC, **cast("dict[str, Any]", fields)))
    assert not differing(expected, found)
    pushed_away, _ = fitted(data, SPEC)
    assert differing(expected, pushed_away)


def test_without_augmentation_and_with_the_scale_it_is_plain_clip(small_store: Store) -> None:
    data = view(small_store, 32)
    expected, _ = fitted(data, PlainClipSpec())
    found, _ = fitted(data, replace(SPEC, weight=0.0, train_scale=True, policy=OFF))
    assert not differing(expected, found)


def test_the_push_lasts_until_the_threshold_is_passed(small_store: Store) -> None:
    """What moves on beyond it is momentum; a threshold of 4 is out of reach."""
    far = {}
    for tau in (1.0, 4.0):
        spec, recipe = replace(SPEC, threshold=tau), replace(RECIPE, epochs=5, lr=3e-3)
        _, report = fitted(view(small_store, 48), spec, recipe)
        curves, notes = report.curves, gate_notes(report.curves)
        assert curves[0]["gated_image"] < 1
        assert curves[-1]["gated_image"] == (1 if tau == 1 else 0)
        assert notes["never_gated"] == (0 if tau == 1 else 1)
        far[tau] = notes["farthest_image"]
        assert far[tau] >= max(record["distance_image"] for record in curves)
    assert 1 < far[1.0] < far[4.0] - 0.5


def test_the_largest_distance_is_that_of_a_step(small_store: Store) -> None:
    """The curves hold means of epochs: an excursion within one shows in no mean."""
    data, recipe = view(small_store, 48), replace(RECIPE, epochs=3, lr=3e-3)
    seen: list[float] = []

    class Watching(Away):
        def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
            terms = super().forward(model, batch, clock)
            seen.append(float(self.watched["distance_text"]))
            return terms

    model = fresh(ModelSpec(), 3)
    report = Fit(model, data, Watching(SPEC, model), recipe, runtime=Runtime())()
    found = gate_notes(report.curves)["farthest_text"]
    assert found == pytest.approx(max(seen), rel=1e-5)
    assert found > max(record["distance_text"] for record in report.curves)


def test_the_rate_may_start_at_the_paper_s() -> None:
    repair = Recipe(epochs=10, batch_size=64, lr=1e-3)
    assert Par().recipe(repair).lr == 1e-3
    assert Par(lr_start=3e-5).recipe(repair).lr == 3e-5


# --- killed and resumed


def test_a_killed_fit_goes_on_to_the_same_bits(small_store: Store, tmp_path: Path) -> None:
    data, recipe = view(small_store, 32), replace(RECIPE, lr=3e-3)
    spec = replace(SPEC, weight=2.0, threshold=0.5)
    whole_fit, expected = run_fit(data, spec, recipe)
    for stop_at in (1, 3):
        kept = Kept(tmp_path / f"{stop_at}")
        run_fit(data, spec, recipe, checkpoints=kept, stop_at=stop_at)
        assert kept.saves == stop_at
        again, report = run_fit(data, spec, recipe, checkpoints=kept)
        assert not differing(state(whole_fit), state(again))
        assert report is not None
        assert expected is not None
        assert report.curves == expected.curves
        counts = {n: c for n, c in expected.cost.items() if "seconds" not in n}
        assert {n: c for n, c in report.cost.items() if "seconds" not in n} == counts


# --- schedule and recipe


def test_the_published_rates() -> None:
    recipe = Par().recipe(Recipe(epochs=10, batch_size=2048, lr=3e-5))
    rates = [3e-5 * lr_factor(recipe, step, 122) for step in range(1220)]
    assert rates[0] == 3e-5
    assert rates[610] == pytest.approx(3e-6, rel=1e-12)
    assert rates[-1] == pytest.approx(1e-9, rel=1e-9)
    # Linear over the first half, a cosine over the second.
    assert rates[305] == pytest.approx((3e-5 + 3e-6) / 2, rel=1e-12)
    assert rates[609] - rates[610] == pytest.approx(rates[0] - rates[1], rel=1e-6)
    middle = 610 + 609 / 2
    around = (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2
    assert around == pytest.approx((3e-6 + 1e-9) / 2, rel=1e-6)
    assert all(later <= earlier for earlier, later in pairwise(rates))


@given(st.integers(3, 300), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.9))
def test_a_descent_never_rises_and_ends_where_it_should(
    total: int, one: float, other: float, share: float
) -> None:
    descent = Descent(middle=max(one, other), end=min(one, other), share=share)
    factors = [descent.factor(step, total) for step in range(total)]
    assert factors[0] == pytest.approx(1 if share else descent.middle, abs=1e-12)
    assert all(b <= a + 1e-12 for a, b in pairwise(factors))
    if share * total < total - 1:
        assert factors[-1] == pytest.approx(descent.end, abs=1e-12)


def test_a_fit_runs_at_these_rates_on_both_towers(small_store: Store) -> None:
    recipe = Par().recipe(replace(RECIPE, lr=3e-5, epochs=3, text_lr_ratio=0.2))
    fit, _ = run_fit(view(small_store), SPEC, recipe)
    steps = [rates[0] for rates in fit.lrs]
    assert len(steps) == 12
    assert steps[0] == 3e-5
    assert steps[6] == pytest.approx(3e-6)
    assert steps[-1] == pytest.approx(1e-9)
    assert all(len(set(rates)) == 1 for rates in fit.lrs)


def test_its_own_recipe_keeps_the_grids_sizes_rate_and_seed() -> None:
    grid = Recipe(epochs=7, batch_size=48, lr=Select(), seed=3, text_lr_ratio=0.2, beta1=0.8)
    own = Par().recipe(grid)
    assert own == replace(
        grid,
        schedule=Descent(middle=0.1, end=1e-9 / 3e-5, share=0.5),
        beta2=0.98,
        weight_decay=1e-4,
        bn_mode=BatchNormMode.EVAL,
        text_lr_ratio=1.0,
    )
    assert grid.schedule == Schedule.FIXED
    assert Par(own_recipe=False).recipe(grid) == grid
    assert Par(bn_mode=BatchNormMode.TRAIN).recipe(grid).bn_mode == BatchNormMode.TRAIN


# --- notes, the plan, refusals


def test_notes_count_steps_and_name_the_side() -> None:
    curves = [
        {"steps": 3.0, "gated_image": 0.0, "further_image": 0.5},
        {"steps": 1.0, "gated_image": 1.0, "further_image": 1.0},
        {"steps": 4.0, "gated_image": 0.5, "further_image": 0.0},
    ]
    image = {"gated_image": 3 / 8, "farthest_image": 2.5}
    assert gate_notes(curves) == {**image, "never_gated": 0.0}
    both = [{**record, "gated_text": 0.0, "further_text": 0.0625} for record in curves]
    text = {"gated_text": 0.0, "farthest_text": 0.5}
    assert gate_notes(both) == {**image, **text, "never_gated": 0.0}
    still = [{**record, "gated_image": 0.0} for record in both]
    assert gate_notes(still)["never_gated"] == 1.0
    assert gate_notes([{"steps": 3.0}]) == {}


@dataclass
class Scene:
    lab: Lab
    data: DataRef
    victims: list[ModelRef]

    def apply(self, defense: Any, recipe: Recipe = RECIPE, victim: int = 0) -> Defended:
        grants: dict[Need, Callable[[], Any]] = {
            Need.VICTIM: lambda: self.victims[victim],
            Need.CLEAN_DATA: lambda: self.data,
        }
        case = Case(defense.name, grants, (Recipes(victim=recipe, repair=recipe), 0))
        found: Defended = defense.apply(self.lab, case)
        return found

    def weights(self, done: Defended) -> dict[str, Tensor]:
        return dict(self.lab.load(done.model).state_dict())


@pytest.fixture
def scene(small_store: Store) -> Scene:
    lab = Lab(small_store, MODEL, Runtime())
    data = lab.put(view(small_store, 32))
    victims = [lab.train(PlainClipSpec(), data, replace(RECIPE, seed=s)) for s in (0, 1)]
    return Scene(lab, data, victims)


def test_the_plan_is_one_fit_from_the_victim_on_the_clean_data(scene: Scene) -> None:
    """Repeating it trains nothing; victim, fields and recipe are in its key."""
    first = scene.apply(Par())
    made = len(scene.lab.ledger.made)
    assert scene.apply(Par()) == first
    assert len(scene.lab.ledger.made) == made
    named = {"gated_image", "gated_text", "farthest_image", "farthest_text", "never_gated"}
    assert set(first.notes) == named
    assert first.notes["farthest_text"] > 0
    others = [
        scene.apply(Par(), victim=1),
        scene.apply(Par(threshold=1.0)),
        scene.apply(Par(own_recipe=False)),
        scene.apply(Par(), replace(RECIPE, seed=5)),
    ]
    assert len({done.model.key for done in (first, *others)}) == 5
    assert set(scene.apply(Par(sides=Sides.TEXT)).notes) == {n for n in named if "image" not in n}


def test_everything_switched_off_is_fine_tuning(scene: Scene) -> None:
    recipe = Recipe(epochs=1, batch_size=16, lr=1e-3, text_lr_ratio=0.2, warmup_steps=1)
    off = {"weight": 0.0, "train_scale": True, "noise_probability": 0.0, "erase_probability": 0.0}
    done = scene.apply(Par(**cast("dict[str, Any]", off), own_recipe=False), recipe)
    assert done.notes == {}
    plain = scene.weights(scene.apply(Finetune(), recipe))
    assert not differing(plain, scene.weights(done))
    own = scene.weights(scene.apply(Par(**cast("dict[str, Any]", off)), recipe))
    assert differing(plain, own)
    same = scene.weights(scene.apply(Finetune(), Par().recipe(recipe)))
    assert not differing(same, own)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"threshold": 4.5}, r"threshold must be in 0\.\.4, got 4\.5"),
        ({"threshold": math.nan}, "threshold must be"),
        ({"weight": -0.5}, r"weight must be 0 or more, got -0\.5"),
        ({"weight": math.inf}, "weight must be"),
        ({"noise_probability": 1.5}, "noise_probability must be"),
        ({"noise_sigma": -1.0}, "noise_sigma must be"),
        ({"erase_probability": -0.1}, "erase_probability must be"),
        ({"erase_area": (0.01, 0.005)}, "erase_area is"),
        ({"first_half": 1.5}, "first_half must be"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1\.0"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"text_lr_ratio": -1.0}, "text_lr_ratio must be"),
        ({"lr_middle_ratio": 1.5}, r"the learning rate falls.*lr_middle_ratio 1\.5"),
        ({"lr_middle_ratio": 1e-6}, "the learning rate falls"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], said: str) -> None:
    Par().check()
    with pytest.raises(UsageError, match=said):
        Par(**fields).check()
