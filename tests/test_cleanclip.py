"""CleanCLIP against a reference written from its equations, and against plain fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from defenses.base import Case, Need, Recipes
from defenses.cleanclip import CleanClip
from tests.conftest import corpus_spec
from tests.test_losses import features, slow, slow_ce
from victims.batches import Batch
from victims.corpora import Corpus, Reader, View, corpus_key, open_corpus, subset, whole, with_text
from victims.draws import Draws, torch_rng
from victims.in_modal import InModal, InModalSpec, Side
from victims.lab import Lab
from victims.models import Clip, ModelSpec, fresh
from victims.recipe import BatchNormMode, Clock, Recipe, Runtime
from victims.rewrite import EdaMode, eda_text
from victims.store import Store
from victims.training import Fit, FitReport, ObjectiveSpec, PlainClipSpec

MODEL = ModelSpec()
DEFAULT = InModalSpec(
    clip_weight=1.0,
    inmodal_weight=1.0,
    image_policy="autoaugment",
    side=Side.BOTH,
    concat_views=True,
)
START = Clock(0, 0, 1)


def corpus(store: Store) -> Corpus:
    return open_corpus(store, corpus_key(corpus_spec("clean")), Reader.TRAINING)


def view(store: Store, rows: int = 48, eda: EdaMode = EdaMode.STATIC) -> View:
    some = subset(whole(corpus(store)), np.arange(rows))
    return with_text(some, {"eda": eda_text(eda, "lexicon", 0)})


def fitted(
    model: Clip, data: View, spec: ObjectiveSpec, **fields: Any
) -> tuple[dict[str, Tensor], FitReport]:
    # A large eps: where a gradient is rounding noise, Adam would blow it up to the learning rate.
    plan: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "eps": 1e-3}
    recipe = Recipe(**plan, warmup_steps=0, **fields)
    report = Fit(model, data, spec.build(model), recipe, runtime=Runtime())()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, report


# --- the loss


@dataclass
class Stub:
    """A model that answers with given features: originals first, then augmented views."""

    image: Sequence[Tensor]
    text: Sequence[Tensor]
    scale: Tensor

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return torch.cat(list(self.image))

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return torch.cat(list(self.text))


def terms(spec: InModalSpec, sides: Sequence[Tensor], scale: float) -> dict[str, Tensor]:
    """The objective's terms on given I, I', T, T'."""
    rows = len(sides[0])
    batch = Batch(
        rows=torch.arange(rows),
        image=torch.zeros(rows, 3, 32, 32, dtype=torch.uint8),
        tokens=torch.ones(rows, 4, dtype=torch.long),
        texts={"eda": torch.ones(rows, 6, dtype=torch.long)},
        views={"image": torch.zeros(rows, 3, 32, 32)},
    )
    stub = Stub(sides[:2], sides[2:], torch.tensor(scale, dtype=torch.float64))
    return InModal(spec)(cast("Clip", stub), batch, START)  # type: ignore[no-any-return]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 8.0), (2.0, 0.0)])
def test_each_term_is_its_equation(weights: tuple[float, float]) -> None:
    sides = [features(seed) for seed in range(4)]
    image, view_, text, eda = [side.tolist() for side in sides]
    spec = replace(DEFAULT, clip_weight=weights[0], inmodal_weight=weights[1])
    found = {name: float(term) for name, term in terms(spec, sides, 14.0).items()}
    assert found == pytest.approx(
        {
            "clip": weights[0] * slow("clip", sides[0], sides[2], 14.0),
            "inmodal_image": weights[1] * slow_ce(image, view_, 14.0) / 2,
            "inmodal_text": weights[1] * slow_ce(text, eda, 14.0) / 2,
        },
        rel=1e-9,
    )


@pytest.mark.parametrize("rows", [2, 7])
def test_hand_values(rows: int) -> None:
    equal = torch.eye(1, 8, dtype=torch.float64).expand(rows, -1)
    assert float(sum(terms(DEFAULT, [equal] * 4, 100.0).values())) == pytest.approx(
        2 * math.log(rows)
    )
    matched = torch.eye(rows, dtype=torch.float64)
    found = terms(DEFAULT, [matched] * 4, 3.0)
    per_modality = math.log(1 + (rows - 1) * math.exp(-3.0))
    assert float(found["inmodal_image"]) == pytest.approx(per_modality / 2)
    assert float(found["inmodal_image"] + found["inmodal_text"]) == pytest.approx(per_modality)


def test_the_originals_are_the_rows() -> None:
    sides = [features(seed) for seed in range(4)]
    found = terms(DEFAULT, sides, 14.0)
    turned = terms(DEFAULT, [sides[1], sides[0], sides[3], sides[2]], 14.0)
    for name in ("inmodal_image", "inmodal_text"):
        assert abs(float(found[name]) - float(turned[name])) > 1e-2


def test_gradient_reaches_originals_and_augmented_views() -> None:
    sides = [features(seed).requires_grad_() for seed in range(4)]
    found = terms(DEFAULT, sides, 14.0)
    for name, near in (("inmodal_image", sides[:2]), ("inmodal_text", sides[2:])):
        grads = torch.autograd.grad(found[name], near, retain_graph=True)
        assert all(float(grad.abs().max()) > 1e-3 for grad in grads)


def test_a_side_can_be_left_out() -> None:
    sides = [features(seed) for seed in range(4)]
    names = {side: set(terms(replace(DEFAULT, side=side), sides, 14.0)) for side in Side}
    assert names == {
        Side.BOTH: {"clip", "inmodal_image", "inmodal_text"},
        Side.IMAGE: {"clip", "inmodal_image"},
        Side.TEXT: {"clip", "inmodal_text"},
    }


# --- what is encoded


@pytest.mark.parametrize("concat", [True, False])
def test_clean_and_augmented_views_reach_their_own_terms(small_store: Store, concat: bool) -> None:
    """On a real model: I and T from the pair itself, I' and T' from the views, in train mode."""
    data, model = view(small_store, 8), fresh(MODEL, 0)
    spec = replace(DEFAULT, concat_views=concat)
    objective = InModal(spec)
    images = data.reader(torch.device("cpu"))(np.arange(8))
    draws = Draws(torch_rng(0, "views"), 8, 0, 8)
    captions = data.captions()
    edited = data.texts["eda"].rewrite(captions, 0)
    tokens, eda = [torch.from_numpy(model.tokenizer(c)).long() for c in (captions, edited)]
    batch = Batch(torch.arange(8), images, tokens, {"eda": eda})
    views = objective.views(batch, draws)
    assert not torch.equal(views["image"], images / 255)
    batch = replace(batch, views=views)
    model.train()
    with torch.no_grad():
        found = objective(model, batch, START)
        if concat:
            image, augmented = model.encode_image(
                torch.cat([images.float() / 255, views["image"]])
            ).chunk(2)
        else:
            image, augmented = model.encode_image(images), model.encode_image(views["image"])
        text, other = model.encode_text(tokens), model.encode_text(eda)
    scale = float(model.scale.detach())
    expected = {
        "clip": slow("clip", image, text, scale),
        "inmodal_image": slow("in_modal", image, augmented, scale),
        "inmodal_text": slow("in_modal", text, other, scale),
    }
    assert {name: float(term) for name, term in found.items()} == pytest.approx(expected, rel=1e-4)


class Recorder(InModal):
    """CleanCLIP that remembers the captions and views it was shown, by epoch and row."""

    def __init__(self, spec: InModalSpec) -> None:
        super().__init__(spec)
        self.tokens: dict[int, dict[int, list[int]]] = {}
        self.plain: dict[int, list[int]] = {}
        self.images: dict[int, dict[int, Tensor]] = {}

    def forward(self, model: Clip, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        for row, tokens, plain, image in zip(
            batch.rows.tolist(), batch.texts["eda"], batch.tokens, batch.views["image"], strict=True
        ):
            self.tokens.setdefault(clock.epoch, {})[row] = tokens[tokens != 0].tolist()
            self.plain[row] = plain[plain != 0].tolist()
            self.images.setdefault(clock.epoch, {})[row] = image.clone()
        return super().forward(model, batch, clock)


def seen(store: Store, eda: EdaMode) -> Recorder:
    model, recorder = fresh(MODEL, 0), Recorder(DEFAULT)
    recipe = Recipe(epochs=2, batch_size=16, lr=0.0)
    Fit(model, view(store, 48, eda), recorder, recipe, runtime=Runtime())()
    return recorder


def test_static_eda_is_drawn_once_and_images_anew_each_epoch(small_store: Store) -> None:
    recorder = seen(small_store, EdaMode.STATIC)
    assert recorder.tokens[0] == recorder.tokens[1]
    assert sum(recorder.tokens[0][row] != recorder.plain[row] for row in range(48)) > 12
    first, second = recorder.images[0], recorder.images[1]
    assert sum(not torch.equal(first[row], second[row]) for row in range(48)) > 36


def test_eda_per_epoch_is_drawn_anew(small_store: Store) -> None:
    recorder = seen(small_store, EdaMode.PER_EPOCH)
    changed = sum(recorder.tokens[0][row] != recorder.tokens[1][row] for row in range(48))
    assert changed > 12


def test_eda_off_is_the_caption_itself(small_store: Store) -> None:
    recorder = seen(small_store, EdaMode.OFF)
    assert recorder.tokens[0] == recorder.tokens[1] == recorder.plain


def test_one_word_stays_a_caption() -> None:
    found = eda_text(EdaMode.STATIC, "lexicon", 0).rewrite(["circle", "zx"] * 500, 0)
    assert all(found)
    assert set(found[1::2]) == {"zx"}
    assert len(set(found[::2])) > 1


# --- against fine-tuning

ZERO = replace(DEFAULT, inmodal_weight=0.0)


def worst(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return max(float((second[n].float() - t.float()).abs().max()) for n, t in first.items())


@pytest.mark.parametrize("concat", [True, False])
def test_weight_0_is_fine_tuning_with_batch_norm_in_eval_mode(
    small_store: Store, concat: bool
) -> None:
    data = view(small_store)
    plain, _ = fitted(fresh(MODEL, 0), data, PlainClipSpec(), bn_mode=BatchNormMode.EVAL)
    spec = replace(ZERO, concat_views=concat)
    found, _ = fitted(fresh(MODEL, 0), data, spec, bn_mode=BatchNormMode.EVAL)
    assert worst(plain, found) <= (1e-5 if concat else 0)
    assert worst(plain, fresh(MODEL, 0).state_dict()) > 1e-2


def test_weight_0_is_not_fine_tuning_where_batch_norm_sees_both_views(small_store: Store) -> None:
    data = view(small_store)
    plain, _ = fitted(fresh(MODEL, 0), data, PlainClipSpec())
    found, _ = fitted(fresh(MODEL, 0), data, ZERO)
    weight = "net.visual.layer4.0.conv3.weight"
    assert worst({weight: plain[weight]}, found) > 1e-4


def vit() -> Clip:
    """A small vision transformer in place of the residual network."""
    model = fresh(MODEL, 0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    vocabulary = model.net.token_embedding.num_embeddings
    text = CLIPTextCfg(context_length=16, vocab_size=vocabulary, width=32, heads=2, layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.net = CLIP(32, vision, text)
    return model


def test_weight_0_is_fine_tuning_on_a_transformer(small_store: Store) -> None:
    data = view(small_store)
    plain, _ = fitted(vit(), data, PlainClipSpec())
    found, _ = fitted(vit(), data, ZERO)
    assert worst(plain, found) <= 1e-5
    other, _ = fitted(vit(), data, DEFAULT)
    assert worst(plain, other) > 1e-3


def test_a_step_costs_twice_a_fine_tuning_step(small_store: Store) -> None:
    data = view(small_store, 16)
    _, plain = fitted(fresh(MODEL, 0), data, PlainClipSpec())
    _, found = fitted(fresh(MODEL, 0), data, DEFAULT)
    for name in ("images_backward", "images_forward", "texts_backward", "texts_forward"):
        assert found.cost[name] == 2 * plain.cost[name] > 0


def test_the_plan_is_one_fit_from_the_victim_on_the_clean_data(small_store: Store) -> None:
    """Repeating it trains nothing; the victim, the weight and the EDA seed are in its key."""
    lab = Lab(small_store, MODEL, Runtime())
    data = lab.put(subset(whole(corpus(small_store)), np.arange(16)))
    repair = Recipe(epochs=1, batch_size=16, lr=1e-3, seed=11)
    victims = [lab.train(PlainClipSpec(), data, replace(repair, seed=seed)) for seed in (0, 1)]

    def apply(victim: int, defense: CleanClip, recipe: Recipe = repair) -> str:
        grants = {Need.VICTIM: lambda: victims[victim], Need.CLEAN_DATA: lambda: data}
        case = Case("cleanclip", grants, (Recipes(victim=repair, repair=recipe), 0))
        return defense.apply(lab, case).model.key

    first = apply(0, CleanClip())
    made = len(lab.ledger.made)
    assert apply(0, CleanClip()) == first
    assert len(lab.ledger.made) == made
    others = [
        apply(1, CleanClip()),
        apply(0, CleanClip(inmodal_weight=2.0)),
        apply(0, CleanClip(), replace(repair, seed=12)),
        apply(0, CleanClip(eda=EdaMode.OFF)),
    ]
    assert len({first, *others}) == 5
