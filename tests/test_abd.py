"""ABD: the crafted patch against a loop written from its equations, the fine-tune against its
limiting cases, and the plan.

Shapes: B batch, C channels, S H W pixels, P side of the patch, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.abd import Abd, Origin, PatchSource
from defenses.base import Case, Defended, Need, Recipes
from defenses.controls import AugmentedClipSpec, AugmentOnly
from tests.conftest import corpus_spec
from tests.test_losses import features, slow, slow_ce
from tests.test_training import Interrupted, Kept, Stopped, assert_same, state, view_of
from victims.augment import augment, policy_from, seeded
from victims.batches import Batch
from victims.corpora import Reader, View, corpus_key, open_corpus, subset, whole
from victims.draws import Draws, derive, numpy_rng, torch_rng
from victims.errors import Forbidden, MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.models import Clip, ModelSpec, fresh
from victims.noise_patch import NoisePatch, anywhere, corner_of, noise_square, side_of, wear
from victims.patched_pairs import PatchedPairs, PatchedPairsSpec, Pgd, Placement
from victims.recipe import Clock, Recipe, Runtime, Select
from victims.rewrite import EdaMode
from victims.store import Store
from victims.training import Fit, ObjectiveSpec, PlainClipSpec
from victims.universal_patch import (
    TERMS,
    Clamp,
    CraftAugment,
    CraftPlace,
    Discriminator,
    Maker,
    Painter,
    Pixels,
    UniversalPatch,
    _Craft,
    between_loss,
    clip_weights,
    judge_of_pixels,
    nce,
    nearly_grey,
    neighbours,
    noise_of_each,
    topology,
)

MODEL = ModelSpec()
REPAIR = Recipe(epochs=1, batch_size=16, lr=3e-3, warmup_steps=0, seed=5)
HOW = UniversalPatch(
    maker=Maker.GENERATOR,
    area=0.03,
    place=CraftPlace.CORNER,
    pairs=48,
    batch=16,
    epochs=1,
    steps=None,
    lr=2e-4,
    width=2,
    fooled_weight=1.0,
    away_weight=10.0,
    away_text_weight=5.0,
    topology_weight=1.0,
    topology_text_weight=5.0,
    reference_weight=10.0,
    discriminator=Discriminator.PIXELS,
    clip_norm=True,
    clamp=Clamp.PIXELS,
    augment=CraftAugment.NONE,
    seed=3,
)
DIRECT = replace(HOW, maker=Maker.DIRECT, lr=0.05, fooled_weight=0.0, reference_weight=0.0)
PIXELS = noise_square(5, 1)
SPEC = PatchedPairsSpec(
    align=False,
    placement=Placement.RANDOM,
    clean_mix=0.0,
    pgd=None,
    patch_sha256="",
    pixels_CPP=PIXELS,
)
NO_PATCH = replace(SPEC, pixels_CPP=torch.zeros(3, 0, 0))
PER_PICTURE = replace(NO_PATCH, pgd=Pgd(reach=8 / 255, steps=3, text_weight=5.0))
START = Clock(0, 0, 1)


def draws(rows: int, start: int = 0, stop: int | None = None, key: int = 0) -> Draws:
    return Draws(torch_rng(key, "views"), rows, start, rows if stop is None else stop)


@pytest.fixture(scope="module")
def lab(small_store: Store) -> Lab:
    return Lab(small_store, MODEL, Runtime())


@pytest.fixture(scope="module")
def data(lab: Lab) -> DataRef:
    corpus = open_corpus(lab.store, corpus_key(corpus_spec("clean")), Reader.TRAINING)
    return lab.put(subset(whole(corpus), np.arange(64)))


@pytest.fixture(scope="module")
def victim(lab: Lab, data: DataRef) -> ModelRef:
    return lab.train(PlainClipSpec(), data, replace(REPAIR, seed=8))


@pytest.fixture(scope="module")
def reference(lab: Lab, data: DataRef) -> ModelRef:
    return lab.train(PlainClipSpec(), data, replace(REPAIR, seed=9))


@pytest.fixture(scope="module")
def view(lab: Lab, data: DataRef) -> View:
    return lab._view(data)


def seeing(view: View, seed: int = 0) -> Clip:
    """Random weights whose features depend on the picture: statistics are those of the view."""
    model = fresh(MODEL, seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train().encode_image(view.reader(torch.device("cpu"))(np.arange(len(view))))
    return model.eval().requires_grad_(False)


# --- geometry


def test_sides_and_rows_are_the_published_ones() -> None:
    assert [side_of(area, 224) for area in (0.01, 0.02, 0.03, 0.05, 0.1)] == [22, 31, 38, 50, 70]
    assert (corner_of(38, 224), corner_of(38, 224) + 38 - 1) == (172, 209)
    assert (side_of(0.03, 32), 32 - corner_of(5, 32) - 5) == (5, 2)
    assert (side_of(0.0, 32), side_of(1.0, 32), corner_of(32, 32)) == (0, 32, 0)


def test_an_area_of_less_than_a_pixel_is_refused() -> None:
    with pytest.raises(UsageError, match="less than one pixel of 32 x 32"):
        side_of(5e-4, 32)
    with pytest.raises(UsageError, match=r"must lie in 0\.\.1"):
        side_of(1.5, 32)


@pytest.mark.parametrize(("side", "size"), [(5, 9), (1, 4), (7, 7)])
def test_places_are_all_that_lie_inside_and_equally_likely(side: int, size: int) -> None:
    rows = 4000
    top_B, left_B = anywhere(draws(rows), side, size)
    ways = size - side + 1
    for place_B in (top_B, left_B):
        counts = torch.bincount(place_B, minlength=ways)
        assert len(counts) == ways
        assert float((counts / rows - 1 / ways).abs().max()) < 4 * math.sqrt(1 / ways / rows)
    assert (ways == 1) == torch.equal(top_B, left_B)


def test_wearing_changes_the_square_alone() -> None:
    image = torch.rand(4, 3, 32, 32, generator=torch_rng(0))
    before = image.clone()
    top_B, left_B = torch.tensor([0, 27, 3, 9]), torch.tensor([0, 27, 20, 9])
    worn = wear(image, PIXELS, top_B, left_B)
    expected = image.clone()
    for row, (top, left) in enumerate(zip(top_B.tolist(), left_B.tolist(), strict=True)):
        expected[row, :, top : top + 5, left : left + 5] = PIXELS
    assert torch.equal(worn, expected)
    assert torch.equal(image, before)


# --- networks


def test_the_networks_are_the_published_ones_at_224() -> None:
    painter, judge = Painter(224, 128, 0), judge_of_pixels(224, 128)
    counts = [sum(p.numel() for p in net.parameters()) for net in (painter, judge)]
    assert counts == [12_660_500, 11_222_401]
    with torch.no_grad():
        assert painter().shape == (1, 3, 224, 224)
        assert judge(torch.zeros(2, 3, 224, 224)).numel() == 2


@pytest.mark.parametrize("size", [16, 24, 32, 33, 48, 64, 96, 128, 336])
def test_any_size_has_its_map_and_its_verdicts(size: int) -> None:
    painter = Painter(size, 2, 0)
    painted = painter()
    assert painted.shape == (1, 3, size, size)
    assert torch.equal(painted, painter()), "in train mode it is a fixed function of its weights"
    assert judge_of_pixels(size, 2)(torch.zeros(3, 3, size, size)).numel() == 3


def test_the_clip_reaches_the_normalisation_layers_unless_told() -> None:
    judge = judge_of_pixels(32, 2)
    norms = [module for module in judge.modules() if isinstance(module, nn.BatchNorm2d)]
    spared = {id(weight) for norm in norms for weight in norm.parameters()}

    def largest(of_norms: bool) -> float:
        some = [w for w in judge.parameters() if (id(w) in spared) is of_norms]
        return max(float(w.detach().abs().max()) for w in some)

    assert largest(False) > 0.01
    clip_weights(judge, clip_norm=False)
    assert [largest(False), largest(True)] == pytest.approx([0.01, 1.0])
    clip_weights(judge, clip_norm=True)
    assert largest(True) == pytest.approx(0.01)


# --- losses


def slow_neighbours(rows: list[list[float]]) -> list[list[float]]:
    """Cosine distances less each row's smallest to another row; similarities as shares."""
    n, found = len(rows), []
    for i in range(n):
        cosine = [sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) for j in range(n)]
        nearest = min(1 - cosine[j] for j in range(n) if j != i)
        similar = [(2 - (0.0 if j == i else 1 - cosine[j] - nearest)) / 2 for j in range(n)]
        found.append([value / sum(similar) for value in similar])
    return found


def slow_topology(a: Tensor, b: Tensor) -> float:
    """KL(P_b, P_a) + KL(1 - P_b, 1 - P_a), over all entries."""
    total = 0.0
    for p_row, q_row in zip(slow_neighbours(b.tolist()), slow_neighbours(a.tolist()), strict=True):
        for p, q in zip(p_row, q_row, strict=True):
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


@pytest.mark.parametrize("rows", [3, 7, 16])
def test_topology_is_its_equation(rows: int) -> None:
    a, b = features(0, rows), features(1, rows)
    shares = slow_neighbours(a.tolist())
    assert torch.allclose(neighbours(a), torch.tensor(shares, dtype=torch.float64), atol=1e-12)
    assert float(topology(a, b)) == pytest.approx(slow_topology(a, b), rel=1e-9)
    assert abs(slow_topology(a, b) - slow_topology(b, a)) > 1e-4, "the order matters"
    assert float(topology(a, a)) == 0


def test_between_one_and_the_same_model_patched_pictures_are_pulled_together() -> None:
    """It depends on the similarities of different rows alone, and falls as they rise."""
    seen = features(2).requires_grad_()
    loss = between_loss(seen, seen)
    cosine = (seen @ seen.T).tolist()
    total = 0.0
    for i in range(7):
        others = sum(math.exp(10 * cosine[i][j] - 10) for j in range(7) if j != i)
        total -= math.log(1 + others)
    assert float(loss.detach()) == pytest.approx(total / 7, rel=1e-9)
    loss.backward()  # type: ignore[no-untyped-call]
    assert seen.grad is not None
    moved = F.normalize(seen.detach() - 0.1 * seen.grad, dim=-1)
    assert float((moved @ moved.T).sum()) > sum(map(sum, cosine))


# --- the craft against a loop from its equations


def slow_nce(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(())
    for i in range(len(a)):
        logits = torch.stack([10 * (a[i] * b[j]).sum() for j in range(len(b))])
        total = total + logits.exp().sum().log() - logits[i]
    return total / len(a)


def slow_shares(x: Tensor) -> Tensor:
    out = []
    for i in range(len(x)):
        distance = torch.stack([1 - (x[i] * x[j]).sum() for j in range(len(x))])
        nearest = torch.stack([distance[j] for j in range(len(x)) if j != i]).min()
        scaled = [distance[j] * 0 if j == i else distance[j] - nearest for j in range(len(x))]
        similar = (2 - torch.stack(scaled)) / 2
        out.append(similar / similar.sum())
    return torch.stack(out)


def slow_topo(a: Tensor, b: Tensor) -> Tensor:
    p, q = slow_shares(b), slow_shares(a)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def slow_craft(how: UniversalPatch, model: Clip, view: View, other: Clip | None) -> Tensor:
    """The patch, step by step; the generator paints anew for the discriminator and for itself."""
    size, side = 32, 5
    corner = 32 - 2 - side
    span = slice(corner, corner + side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(how.seed, "universal_patch", "init"))
        if how.maker == Maker.GENERATOR:
            maker: nn.Module = Painter(size, how.width, how.seed)
        else:
            grey = 0.5 + 0.02 * (noise_square(size, how.seed) - 0.5)
            maker = Pixels((grey - model.mean_C) / model.std_C)
        judge = judge_of_pixels(size, how.width)
    adam: dict[str, Any] = {"betas": (0.5, 0.999)}
    to_paint = torch.optim.Adam(maker.parameters(), lr=how.lr, **adam)
    to_judge = torch.optim.Adam(judge.parameters(), lr=2e-4, **adam)
    low, high = -model.mean_C / model.std_C, (1 - model.mean_C) / model.std_C

    def painted() -> Tensor:
        square: Tensor = maker()[0][:, span, span]
        return torch.minimum(torch.maximum(square, low), high)

    def worn(normal: Tensor) -> Tensor:
        out = normal.clone()
        out[:, :, span, span] = painted()
        return out

    def seen_by(encoder: Clip, normal: Tensor) -> Tensor:
        return encoder.encode_image(normal * model.std_C + model.mean_C)

    order = numpy_rng(how.seed, "universal_patch", "order", 0).permutation(len(view))
    tokens = torch.from_numpy(model.tokenizer(view.captions())).long()
    images = view.reader(torch.device("cpu"))(np.arange(len(view)))
    for step in range(how.num_steps(len(view))):
        rows = order[step * how.batch : (step + 1) * how.batch]
        x = model.normalise(images[rows])
        with torch.no_grad():
            f_x, g_t = seen_by(model, x), model.encode_text(tokens[rows])
        fooled = torch.zeros(())
        if how.fooled_weight:
            real, fake = judge(x).sigmoid(), judge(worn(x).detach()).sigmoid()
            to_judge.zero_grad()
            (-real.log().mean() - (1 - fake).log().mean()).backward()
            to_judge.step()
            with torch.no_grad():
                for weight in judge.parameters():
                    weight.clamp_(-0.01, 0.01)
            fooled = -judge(worn(x)).sigmoid().log().mean()
        x_adv = worn(x)
        f_adv = seen_by(model, x_adv)
        adv = -slow_nce(f_x, f_adv) - 5 * slow_nce(f_adv, g_t)
        topo = -slow_topo(f_x, f_adv) - 5 * slow_topo(f_adv, g_t)
        loss = how.fooled_weight * fooled + ((x_adv - x) ** 2).mean() + 10 * adv + topo
        if other is not None:
            loss = loss - how.reference_weight * slow_nce(f_adv, seen_by(other, x_adv))
        to_paint.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        to_paint.step()
        if isinstance(maker, Pixels):
            with torch.no_grad():
                maker.map.copy_(torch.minimum(torch.maximum(maker.map, low), high))
    with torch.no_grad():
        return painted() * model.std_C + model.mean_C


@pytest.mark.parametrize(
    "how",
    [HOW, replace(HOW, reference_weight=-10.0), DIRECT, replace(DIRECT, fooled_weight=1.0)],
    ids=["generator", "negative", "direct", "direct-judged"],
)
def test_the_craft_is_its_equations(view: View, how: UniversalPatch) -> None:
    how, view = replace(how, batch=8), subset(view, np.arange(16))
    models = [seeing(view, seed) for seed in range(2 if how.reference_weight else 1)]
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    found = how.craft(models[0], view, *models[1:])
    expected = slow_craft(how, models[0], view, models[1] if len(models) > 1 else None)
    assert float((found["patch"] - expected).abs().max()) < 2e-4
    assert found["curve"].shape == (2, len(TERMS))
    first = _Craft(how, models[0], view, tuple(models[1:])).patch().detach()
    assert float((found["patch"] - first).abs().max()) > 1e-3, "two steps move it"
    for model, state_before in zip(models, before, strict=True):
        assert_same(model.state_dict(), state_before)


def test_the_discriminator_answers_a_half_once_it_is_clipped(view: View) -> None:
    how = replace(HOW, steps=6, reference_weight=0.0, width=16)
    craft = _Craft(how, seeing(view), view, ())
    assert craft.judge is not None
    painting = torch.optim.Adam(craft.maker.parameters(), lr=how.lr)
    judging = torch.optim.Adam(craft.judge.parameters(), lr=2e-4)
    for step in range(6):
        judged = craft.step(craft._drawn(step), painting, judging)[0]
        assert max(float(p.detach().abs().max()) for p in craft.judge.parameters()) <= 0.01
        if step:
            assert float(judged.detach()) == pytest.approx(2 * math.log(2), abs=0.03)


def test_a_crafted_patch_leads_the_model_astray(view: View) -> None:
    """Away from what pictures show, also pictures it was not crafted on; noise hardly does."""
    model, batch = seeing(view), batch_of(view, 64)
    how = replace(DIRECT, steps=20, area=0.1, lr=0.1, away_text_weight=0.0, topology_weight=0.0)
    found = how.craft(model, view)
    image, side = batch.image[48:] / 255, found["patch"].shape[-1]
    corner = corner_of(side, 32)

    def seen(square: Tensor) -> Tensor:
        return model.encode_image(wear(image, square, corner, corner))

    noise = noise_square(side, DIRECT.seed)
    plain = model.encode_image(image)
    lost = [float(nce(plain, seen(square))) for square in (noise, found["patch"])]
    assert lost[1] > lost[0] + 0.5
    text = model.encode_text(batch.tokens[48:])
    cosines = [
        float((of * text).sum(1).mean()) for of in (plain, seen(noise), seen(found["patch"]))
    ]
    assert found["cosines"].tolist() == pytest.approx(cosines, abs=1e-5)
    assert torch.allclose(found["worn"], seen(found["patch"]), atol=1e-6)


@pytest.mark.exhaustive
def test_a_patch_leads_pictures_away_from_their_captions(
    lab: Lab, data: DataRef, victim: ModelRef
) -> None:
    """On pairs that neither crafted it nor choose the learning rate, more than noise does; in the
    mean of three victims that have learnt what captions say, as one may be hard to lead."""
    how = replace(DIRECT, steps=60, pairs=56, area=0.3, lr=0.2)
    cosines = []
    for seed in range(3):
        recipe = replace(REPAIR, epochs=30, lr=5e-3, seed=seed)
        learnt = lab.train(PlainClipSpec(), data, recipe, init=victim)
        cosines.append(lab.tensor(how, data, learnt)["cosines"].tolist())
    plain, noise, patch = np.mean(cosines, axis=0)
    assert patch < plain - 0.1
    assert patch < noise - 0.05


@pytest.mark.parametrize(
    ("place", "start"),
    [(CraftPlace.CORNER, 25), (CraftPlace.OPPOSITE, 2), (CraftPlace.CENTRE, 13)],
)
def test_the_patch_is_crafted_where_it_is_told(view: View, place: CraftPlace, start: int) -> None:
    craft = _Craft(replace(DIRECT, place=place), seeing(view), view, ())
    drawn = craft._drawn(0)
    assert (drawn.top_B, drawn.left_B) == (start, start)
    unit = nearly_grey(32, DIRECT.seed)[:, start : start + 5, start : start + 5]
    assert torch.allclose(craft.patch(), unit, atol=1e-6)


def test_a_random_place_is_drawn_for_every_picture_and_step(view: View) -> None:
    craft = _Craft(replace(DIRECT, place=CraftPlace.RANDOM), seeing(view), view, ())
    first, second = craft._drawn(0), craft._drawn(1)
    assert isinstance(first.top_B, Tensor)
    assert len(set(first.top_B.tolist())) > 4
    assert not torch.equal(first.top_B, cast("Tensor", second.top_B))
    assert int(first.top_B.max()) <= 32 - 5


def test_brightness_is_raised_and_the_rest_is_as_before(view: View) -> None:
    model = seeing(view)
    plain = _Craft(DIRECT, model, view, ())._drawn(0).image_BCHW
    bright = replace(DIRECT, augment=CraftAugment.BRIGHTNESS)
    raised = _Craft(bright, model, view, ())._drawn(0).image_BCHW
    assert bool((raised >= plain).all())
    assert bool((raised <= (plain * 1.5).clamp(max=1) + 1e-6).all())
    factor_B = raised.flatten(1).median(1).values / plain.flatten(1).median(1).values
    assert float(factor_B.std()) > 0.02


def test_clamps_differ_while_crafting_and_both_patches_can_be_shown(view: View) -> None:
    model = seeing(view)
    for clamp, ends in (
        (Clamp.PIXELS, (0.0, 1.0)),
        (Clamp.ADVCLIP, (-2.118 * 0.30 + 0.47, 2.640 * 0.30 + 0.47)),
    ):
        for sign, end in zip((-1, 1), ends, strict=True):
            craft = _Craft(replace(DIRECT, clamp=clamp), model, view, ())
            nn.init.constant_(cast("Pixels", craft.maker).map, 10.0 * sign)
            assert torch.allclose(craft.patch(), torch.tensor(end), atol=1e-5)
        found = replace(HOW, clamp=clamp, reference_weight=0.0, steps=2).craft(model, view)
        assert float(found["patch"].min()) >= 0
        assert float(found["patch"].max()) <= 1


def test_features_can_be_judged_instead_of_pixels(view: View) -> None:
    how = replace(HOW, discriminator=Discriminator.FEATURES, reference_weight=0.0)
    by_features = how.craft(seeing(view), view)
    by_pixels = replace(HOW, reference_weight=0.0).craft(seeing(view), view)
    assert not torch.equal(by_features["patch"], by_pixels["patch"])
    assert float(by_features["curve"][0, 0]) > 1


def test_what_cannot_be_crafted_is_said(view: View) -> None:
    model = seeing(view)
    with pytest.raises(UsageError, match="nothing to craft"):
        replace(DIRECT, area=0.0).craft(model, view)
    with pytest.raises(UsageError, match="batches of 1 pairs"):
        DIRECT.craft(model, subset(view, np.arange(1)))
    with pytest.raises(UsageError, match="16 px or more, got 12"):
        Painter(12, 2, 0)
    nn.init.constant_(model.net.visual.attnpool.c_proj.bias, math.nan)
    with pytest.raises(MethodFailure, match="not finite at step 0"):
        DIRECT.craft(model, view)


def test_fewer_pairs_than_a_batch_are_one_batch() -> None:
    assert HOW.num_steps(10_000) == 625
    assert replace(HOW, epochs=20).num_steps(9) == 20
    assert replace(HOW, epochs=20, steps=7).num_steps(48) == 7


# --- noise for each picture


def batch_of(view: View, rows: int) -> Batch:
    model = fresh(MODEL, 0)
    tokens = torch.from_numpy(model.tokenizer(view.captions()[:rows])).long()
    images = view.reader(torch.device("cpu"))(np.arange(rows))
    return Batch(torch.arange(rows), images, tokens)


def test_noise_of_each_picture_is_its_own(view: View) -> None:
    """Against a loop over pictures and steps; within reach, in range, and it works."""
    model, batch = seeing(view), batch_of(view, 6)
    start = 2 * torch.rand(6, 3, 32, 32, generator=torch_rng(1)) - 1
    reach = 8 / 255
    found = noise_of_each(model, batch, start, reach=reach, steps=4, text_weight=5.0)
    image = batch.image.float() / 255
    assert float((found - image).abs().max()) <= reach + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1

    def objective(picture: Tensor, row: int) -> Tensor:
        seen = model.encode_image(picture)[0]
        own = model.encode_image(image[row : row + 1])[0]
        caption = model.encode_text(batch.tokens[row : row + 1])[0]
        return (seen * own).sum() + 5 * (seen * caption).sum()

    for row in range(6):
        own = image[row : row + 1]
        x = (own + reach * start[row : row + 1]).clamp(0, 1)
        for _ in range(4):
            x = x.detach().requires_grad_()
            objective(x, row).backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            x = x.detach() - 2.5 * reach / 4 * x.grad.sign()
            x = torch.minimum(torch.maximum(x, own - reach), own + reach).clamp(0, 1)
        # Where a slope is rounding noise its sign may differ.
        same = ((found[row] - x[0]).abs() < 1e-5).float().mean()
        assert float(same) > 0.98
        assert float(objective(found[row : row + 1], row)) < float(objective(own, row)) - 0.1
    half = Batch(batch.rows[3:], batch.image[3:], batch.tokens[3:])
    apart = noise_of_each(model, half, start[3:], reach=reach, steps=4, text_weight=5.0)
    assert float(((apart - found[3:]).abs() < 1e-5).float().mean()) > 0.98


# --- the objective


@dataclass
class Stub:
    """A model that answers with given features, in order."""

    image: Sequence[Tensor]
    text: Sequence[Tensor]
    scale: Tensor

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return torch.cat(list(self.image))

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return torch.cat(list(self.text))


def terms(spec: PatchedPairsSpec, image: list[Tensor], text: list[Tensor]) -> dict[str, float]:
    batch = Batch(
        rows=torch.arange(7),
        image=torch.zeros(7, 3, 32, 32, dtype=torch.uint8),
        tokens=torch.ones(7, 4, dtype=torch.long),
        texts={"eda": torch.ones(7, 6, dtype=torch.long)},
        views={"image": torch.zeros(7, 3, 32, 32)},
    )
    stub = cast("Clip", Stub(image, text, torch.tensor(14.0, dtype=torch.float64)))
    found = PatchedPairs(spec, None)(stub, batch, START)
    return {name: float(term) for name, term in found.items()}


def test_both_readings_are_their_equations() -> None:
    image, worn, text, eda = (features(seed) for seed in range(4))
    expected = slow("clip", worn, eda, 14.0)
    assert terms(SPEC, [worn], [eda]) == pytest.approx({"clip": expected}, rel=1e-9)
    found = terms(replace(SPEC, align=True), [image, worn], [text, eda])
    rows = [side.tolist() for side in (image, worn, text, eda)]
    expected_B = {
        "clip": slow("clip", image, text, 14.0),
        "inmodal_image": slow_ce(rows[0], rows[1], 14.0) / 2,
        "inmodal_text": slow_ce(rows[2], rows[3], 14.0) / 2,
    }
    assert found == pytest.approx(expected_B, rel=1e-9)


def test_pictures_and_captions_reach_their_own_terms(view: View) -> None:
    """On a real model in train mode: I_adv and T_eda alone in reading A, all four in B."""
    model, batch = fresh(MODEL, 0).train(), batch_of(view, 8)
    eda = torch.from_numpy(model.tokenizer(["a circle", "dog on a mat"] * 4)).long()
    batch = replace(batch, texts={"eda": eda})
    for align in (False, True):
        objective = replace(SPEC, align=align).build(model)
        whole_batch = replace(batch, views=objective.views(batch, draws(8)))
        top_B, left_B = anywhere(draws(8), 5, 32)
        worn = wear(batch.image / 255, PIXELS, top_B, left_B)
        assert torch.equal(whole_batch.views["image"], worn)
        with torch.no_grad():
            found = {n: float(t) for n, t in objective(model, whole_batch, START).items()}
            text, edited = model.encode_text(batch.tokens), model.encode_text(eda)
            scale = float(model.scale)
            if not align:
                expected = {"clip": slow("clip", model.encode_image(worn), edited, scale)}
            else:
                both = torch.cat([batch.image / 255, worn])
                image, other = model.encode_image(both).chunk(2)
                expected = {
                    "clip": slow("clip", image, text, scale),
                    "inmodal_image": slow("in_modal", image, other, scale),
                    "inmodal_text": slow("in_modal", text, edited, scale),
                }
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_place_is_drawn_at_every_access_or_fixed(view: View) -> None:
    batch, model = batch_of(view, 32), fresh(MODEL, 0)
    source, image = draws(32), batch.image / 255
    objective = SPEC.build(model)
    first, second = (objective.views(batch, source)["image"] for _ in range(2))
    assert not torch.equal(first, second)
    fixed = replace(SPEC, placement=Placement.FIXED).build(model).views(batch, source)["image"]
    assert torch.equal(fixed, wear(image, PIXELS, 25, 25))


def test_some_pictures_can_stay_clean(view: View) -> None:
    batch, model = batch_of(view, 64), fresh(MODEL, 0)
    image = batch.image / 255
    worn = SPEC.build(model).views(batch, draws(64))["image"]
    for share, least, most in ((1.0, 64, 64), (0.5, 20, 44)):
        found = replace(SPEC, clean_mix=share).build(model).views(batch, draws(64))["image"]
        clean = (found == image).flatten(1).all(1)
        assert least <= int(clean.sum()) <= most
        assert torch.equal(found[~clean], worn[~clean])


# --- fits


def weights(store: Store, spec: ObjectiveSpec, eda: EdaMode = EdaMode.STATIC) -> dict[str, Tensor]:
    model = fresh(MODEL, 0)
    Fit(model, view_of(store, 32, eda), spec.build(model), REPAIR, runtime=Runtime())()
    return dict(model.state_dict())


def test_without_patch_and_eda_it_is_fine_tuning(small_store: Store) -> None:
    plain = weights(small_store, PlainClipSpec())
    assert_same(weights(small_store, NO_PATCH, EdaMode.OFF), plain)
    patched = weights(small_store, SPEC, EdaMode.OFF)
    assert any(not torch.equal(patched[name], plain[name]) for name in plain)


def test_without_a_patch_it_is_fine_tuning_on_edited_captions(small_store: Store) -> None:
    assert_same(
        weights(small_store, NO_PATCH), weights(small_store, AugmentedClipSpec(image_policy="none"))
    )


def test_a_patch_of_noise_is_its_control(small_store: Store) -> None:
    """To the bit: the pixels, the places and the loss of the augmentation-only fine-tune."""
    policy = seeded("noise_patch", 7)
    assert policy == NoisePatch(key=7)
    noise = replace(SPEC, pixels_CPP=noise_square(5, 7))
    found = weights(small_store, noise)
    assert_same(found, weights(small_store, AugmentedClipSpec(image_policy=policy)))
    other = weights(small_store, AugmentedClipSpec(image_policy=seeded("noise_patch", 8)))
    assert any(not torch.equal(found[name], other[name]) for name in found)


def test_only_policies_with_a_key_take_the_seed() -> None:
    assert [seeded(name, 3) for name in ("none", "simclr")] == ["none", "simclr"]
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    drawn = [augment(policy_from("noise_patch", key=key), image, draws(2)) for key in (0, 1)]
    assert not torch.equal(*drawn)
    with pytest.raises(UsageError, match=r"area is 1\.5"):
        policy_from("noise_patch", area=1.5)


def test_the_frozen_victim_stays_what_it_was_and_is_paid_for(small_store: Store) -> None:
    model = fresh(MODEL, 0)
    objective = PER_PICTURE.build(model)
    (frozen,) = cast("Any", objective)._frozen
    before = {n: t.clone() for n, t in frozen.state_dict().items()}
    assert not list(objective.parameters())
    assert not objective.state_dict()
    fit = Fit(model, view_of(small_store, 32), objective, REPAIR, runtime=Runtime())
    report = fit()
    assert not frozen.training
    assert_same(frozen.state_dict(), before)
    assert not torch.equal(model.net.text_projection, frozen.net.text_projection)
    # Per row one pass of the fit, three steps and the picture as it is.
    assert report.cost["images_forward"] == 32 * (1 + 3 + 1)
    assert report.cost["images_backward"] == 32 * (1 + 3)


@pytest.mark.parametrize("spec", [SPEC, PER_PICTURE, replace(SPEC, clean_mix=0.3)])
def test_a_fit_that_is_killed_goes_on_as_if_nothing_had_been(
    small_store: Store, tmp_path: Path, spec: PatchedPairsSpec
) -> None:
    recipe, kept = replace(REPAIR, epochs=2), Kept(tmp_path / "fit")

    def fit(checkpoints: Kept | None, stop_at: int = 10**9) -> Interrupted:
        model = fresh(MODEL, 0)
        view = view_of(small_store, 32)
        runtime = Runtime(checkpoint_seconds=0)
        made = Interrupted(
            model, view, spec.build(model), recipe, runtime=runtime, checkpoints=checkpoints
        )
        made.stop_at = stop_at
        return made

    undisturbed = fit(None)
    undisturbed()
    with pytest.raises(Stopped):
        fit(kept, 3)()
    resumed = fit(kept)
    resumed()
    assert resumed.step == 4
    assert_same(state(resumed), state(undisturbed))


# --- the plan


def apply(
    lab: Lab,
    defense: Abd | AugmentOnly,
    victim: ModelRef,
    data: DataRef,
    reference: ModelRef | None = None,
    seed: int = 0,
    recipe: Recipe = REPAIR,
) -> Defended:
    """As a stage would: what is not needed is not there."""
    grants: dict[Need, Any] = {Need.VICTIM: lambda: victim, Need.CLEAN_DATA: lambda: data}
    if Need.REFERENCE in defense.needed():
        assert reference is not None
        grants[Need.REFERENCE] = lambda: reference
    case = Case(defense.name, grants, (Recipes(victim=recipe, repair=recipe), seed))
    return defense.apply(lab, case)


QUICK: dict[str, Any] = {"craft_steps": 2, "gan_width": 2}


def test_the_reference_is_needed_only_where_it_is_read() -> None:
    with_reference = [Abd(), Abd(backdoor_weight=-10.0), Abd(patch_source=PatchSource.DIRECT)]
    assert all(Need.REFERENCE in defense.needed() for defense in with_reference)
    without = [
        Abd(backdoor_weight=0.0),
        Abd(area=0.0),
        Abd(patch_source=PatchSource.NOISE),
        Abd(patch_source=PatchSource.PGD),
    ]
    for defense in without:
        assert defense.needed() == {Need.VICTIM, Need.CLEAN_DATA}


def test_the_plan_crafts_once_and_repairs_the_victim(
    lab: Lab, data: DataRef, victim: ModelRef, reference: ModelRef
) -> None:
    done = apply(lab, Abd(**QUICK), victim, data, reference)
    assert set(done.notes) == {"cosine_plain", "cosine_noise", "cosine_patch"}
    made = len(lab.ledger.made)
    assert apply(lab, Abd(**QUICK), victim, data, reference).model == done.model
    assert len(lab.ledger.made) == made
    # The fine-tune's own options leave the patch as it is: one training more, no tensor.
    for change in ({"placement": Placement.FIXED}, {"clean_mix": 0.5, "align": True}):
        before = list(lab.ledger.made)
        assert apply(lab, Abd(**QUICK, **change), victim, data, reference).model != done.model
        assert [key.split("-")[0] for key in lab.ledger.made[len(before) :]] == ["model"]
    others = [
        apply(lab, Abd(**QUICK), victim, data, reference, seed=1),
        apply(lab, Abd(**QUICK, backdoor_weight=0.0), victim, data),
        apply(lab, Abd(**QUICK, craft_pairs=16), victim, data, reference),
    ]
    assert len({done.model.key, *(other.model.key for other in others)}) == 4


def test_pairs_that_choose_the_learning_rate_craft_nothing(
    lab: Lab, data: DataRef, victim: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    crafted_on, crafted_by = list[DataRef](), list[int]()
    craft = lab.tensor

    def spy(spec: Any, on: DataRef, *models: ModelRef) -> dict[str, Tensor]:
        crafted_on.append(on)
        crafted_by.append(spec.pairs)
        return craft(spec, on, *models)

    monkeypatch.setattr(lab, "tensor", spy)
    recipe = replace(REPAIR, lr=Select(rates=(1e-3, 3e-3), floor=8))
    apply(lab, Abd(**QUICK, backdoor_weight=0.0), victim, data, recipe=recipe)
    (found,) = crafted_on
    held = lab.held_out(data, recipe)
    assert len(held) == 8
    rows = lab._view(data).rows
    assert lab._view(found).rows.tolist() == np.delete(rows, held).tolist()
    # Of the 56 others an eighth crafts nothing and is looked at.
    assert crafted_by == [49]


def test_the_origin_can_be_fine_tuned_on_the_clean_pairs(
    lab: Lab, data: DataRef, victim: ModelRef, reference: ModelRef
) -> None:
    defense = Abd(**QUICK, origin=Origin.FINETUNED_REFERENCE)
    found = apply(lab, defense, victim, data, reference)
    finetuned = lab.train(PlainClipSpec(), data, REPAIR, init=reference)
    assert finetuned.key in lab.ledger.costs
    made = len(lab.ledger.made)
    assert apply(lab, Abd(**QUICK), victim, data, finetuned).model == found.model
    assert len(lab.ledger.made) == made, "the same crafting, found by its key"


def test_sources_without_crafting_open_no_reference(
    lab: Lab, data: DataRef, victim: ModelRef
) -> None:
    noise = apply(lab, Abd(patch_source=PatchSource.NOISE), victim, data)
    assert noise.notes == {}
    again = apply(lab, AugmentOnly(policy="noise_patch_eda"), victim, data)
    assert_same(lab.load(noise.model).state_dict(), lab.load(again.model).state_dict())
    nothing = apply(lab, Abd(patch_source=PatchSource.NOISE, area=0.0), victim, data)
    assert nothing.model == apply(lab, Abd(area=0.0), victim, data).model
    per_picture = apply(lab, Abd(patch_source=PatchSource.PGD, pgd_steps=1), victim, data)
    assert len({noise.model.key, nothing.model.key, per_picture.model.key}) == 3
    case = Case("abd", {}, (Recipes(victim=REPAIR, repair=REPAIR), 0))
    with pytest.raises(Forbidden, match="abd asked for reference"):
        _ = case.reference


def test_an_area_below_a_pixel_fails_before_anything_is_made(
    lab: Lab, data: DataRef, victim: ModelRef, reference: ModelRef
) -> None:
    made = len(lab.ledger.made)
    with pytest.raises(UsageError, match="less than one pixel"):
        apply(lab, Abd(**QUICK, area=5e-4), victim, data, reference)
    assert len(lab.ledger.made) == made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("area", 1.5),
        ("area", -0.1),
        ("clean_mix", 2.0),
        ("craft_pairs", 1),
        ("craft_batch", 1),
        ("craft_epochs", 0),
        ("craft_steps", 0),
        ("craft_lr", 0.0),
        ("gan_weight", -1.0),
        ("gan_width", 0),
        ("pgd_reach", 0.0),
        ("pgd_steps", 0),
    ],
)
def test_values_that_cannot_be_meant_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"abd: {field} must be .*, got {value}"):
        Abd(**{field: value}).check()


def test_synonyms_are_pinned_and_the_defaults_are_fine() -> None:
    Abd().check()
    with pytest.raises(UsageError):
        Abd(synonyms="thesaurus").check()
