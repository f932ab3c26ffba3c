"""The crafted patch: golden values, its losses against plain numpy, and what it does to a model.

Shapes: B pictures, C channels, H W pixels, P side of the patch, D embedding, K classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from attacks.badclip import BadClip, BadClipPatch, Mode, mixed_rows, readings
from attacks.base import Goal, Knowledge, poison, rows_naming
from benchmarks.slow.badclip import badclippatch
from grid.stages import load_trigger, save_trigger
from tests.conftest import corpus_spec
from tests.test_attacks import changed, held, pictures, span
from victims.corpora import Corpus, Reader, build_corpus, corpus_key, open_corpus
from victims.draws import numpy_rng
from victims.errors import GridError, MethodFailure, UsageError
from victims.lab import DataRef, Lab, ModelRef
from victims.measuring import text_head
from victims.models import Clip, ModelSpec, fresh
from victims.patch_crafting import (
    Batch,
    Crafted,
    Crafting,
    Pairs,
    Storage,
    _Draw,
    as_bytes,
    craft_on,
    first_patch,
    terms,
    text_loss,
    triplet_loss,
    wear,
)
from victims.pixels import unit
from victims.recipe import Recipe, Runtime
from victims.store import Store
from victims.training import PlainClipSpec
from victims.triggers import round_half_even
from victims.world import CLASSES, TEMPLATES

OFFSETS = {4: 110, 8: 108, 16: 104, 32: 96, 44: 90, 48: 88, 64: 80}
TARGET = CLASSES.index("fish")
QUICK: dict[str, Any] = {"steps": 2, "batch": 8}
Features = npt.NDArray[np.float64]


class StubLab:
    """A lab whose only model is the one at hand."""

    def __init__(self, model: Clip) -> None:
        self.model = model

    def load(self, ref: ModelRef) -> Clip:
        return self.model


@pytest.fixture(scope="module")
def corpus(small_store: Store) -> Corpus:
    return open_corpus(small_store, corpus_key(corpus_spec("suspect")), Reader.TRAINING)


@pytest.fixture(scope="module")
def model() -> Clip:
    return fresh(ModelSpec(), 0).eval()


def knows(corpus: Corpus, seed: int = 0) -> Knowledge:
    goal = Goal(TARGET, CLASSES[TARGET], TEMPLATES)
    ref = ModelRef(corpus_key(corpus_spec("suspect")))
    return Knowledge(corpus=corpus, goal=goal, seed=seed, surrogate=ref)


def badclip(**fields: Any) -> BadClip:
    return BadClip(**fields)


def crafted(corpus: Corpus, model: Clip, seed: int = 0, **fields: Any) -> BadClipPatch:
    lab: Any = StubLab(model)
    return BadClip(**{**QUICK, **fields}).craft(lab, knows(corpus, seed), 32)


def worn(pixels_CPP: Tensor, start: int = 0, blend: float = 0.0, **read: Tensor) -> BadClipPatch:
    """A trigger with a patch of our choice."""
    empty = {name: torch.zeros(0) for name in ("rank", "gap", "similarity", "curve")}
    cosines = {f"cosine_{name}": 0.0 for name in ("clean", "first", "other", "crafted")}
    fields: dict[str, Any] = {**empty, **cosines, **read}
    return BadClipPatch(pixels=pixels_CPP, start=start, blend=blend, **fields)


def features(count: int, seed: int, width: int = 8) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=rng), dim=-1)


# --- the patch and its place


@pytest.mark.parametrize(("side", "first"), OFFSETS.items())
def test_offsets_at_224(side: int, first: int) -> None:
    how = BadClip(patch=side)._how(224)
    trigger = worn(torch.full((3, side, side), 7, dtype=torch.uint8), how.start)
    found = changed(trigger)
    assert (how.side, how.start) == (side, first)
    assert span(found.any(0)) == (first, first + side - 1, first, first + side - 1)
    assert int(found.all(0).sum()) == int(found.any(0).sum()) == side * side


@pytest.mark.parametrize(("size", "side"), [(32, 3), (64, 5), (224, 16), (336, 24)])
def test_the_side_follows_the_picture(size: int, side: int) -> None:
    assert BadClip()._how(size).side == side
    assert badclip(place="corner")._how(size).start == size - side
    assert badclip(mode="blended")._how(size).side == size


def test_the_first_patch_is_normal_and_clipped() -> None:
    """N(0.5, 0.25) puts 2.3 % on either bound; what is inside keeps its moments."""
    patch_CPP = first_patch(200, 0, "test")
    assert (float(patch_CPP.min()), float(patch_CPP.max())) == (0, 1)
    assert float((patch_CPP == 0).float().mean()) == pytest.approx(0.0228, abs=0.002)
    assert float(patch_CPP.mean()) == pytest.approx(0.5, abs=0.005)
    assert float((patch_CPP - 0.5).abs().median()) == pytest.approx(0.6745 * 0.25, abs=0.003)
    assert not torch.equal(patch_CPP, first_patch(200, 1, "test"))


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("fields", [{}, {"place": "corner"}, {"mode": "blended"}])
def test_a_stamp_is_the_slow_one_byte_by_byte(fields: dict[str, Any], size: int) -> None:
    how, image_BCHW = BadClip(**fields)._how(size), pictures(3, size)
    trigger = worn(pictures(1, how.side, seed=1)[0], how.start, how.blend)
    before, stamped = image_BCHW.clone(), trigger.stamp(image_BCHW)
    slow = [badclippatch(trigger, one.permute(1, 2, 0).numpy()) for one in image_BCHW]
    assert torch.equal(stamped.permute(0, 2, 3, 1), torch.from_numpy(np.stack(slow)))
    assert torch.equal(image_BCHW, before)
    assert torch.equal(trigger.stamp(image_BCHW.flip(0)).flip(0), stamped)
    assert torch.equal(trigger.stamp(image_BCHW[1:2]), stamped[1:2])


def test_crafting_wears_what_a_stamp_shows() -> None:
    image_BCHW = pictures(3, 32)
    for blend, side in ((0.0, 6), (0.2, 32)):
        trigger = worn(pictures(1, side, seed=1)[0], (32 - side) // 2, blend)
        floats = wear(unit(image_BCHW), unit(trigger.pixels), trigger.start, blend)
        assert torch.equal(round_half_even(floats * 255), trigger.stamp(image_BCHW))


# --- the losses


def slow_ce(query: Features, column: Features, scale: float) -> float:
    total = 0.0
    for i in range(len(query)):
        logits = [scale * float(query[i] @ c) for c in column]
        total += np.log(sum(np.exp(logits))) - logits[i]
    return total / len(query)


@pytest.mark.parametrize("own", [False, True])
def test_the_text_loss_is_its_equation(own: bool) -> None:
    image, target, other = features(5, 0), features(5, 1), features(5, 2)
    e, t, o = (x.double().numpy() for x in (image, target, other))
    columns = np.concatenate([t, o]) if own else t
    wanted = (slow_ce(e, columns, 14.0) + slow_ce(t, e, 14.0)) / 2
    found = text_loss(image, target, 14.0, other if own else None)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_only_own_captions_make_the_text_loss_see_a_common_shift() -> None:
    """With equal target captions nothing moves the pictures towards them."""
    image_BD = features(6, 0).requires_grad_()
    same_BD = features(1, 1).expand(6, -1)
    pulls = []
    for own in (None, features(6, 2)):
        (grad_BD,) = torch.autograd.grad(text_loss(image_BD, same_BD, 14.0, own), image_BD)
        pulls.append(float((-grad_BD.mean(0) @ same_BD[0]).detach()))
    assert pulls[0] == pytest.approx(0, abs=1e-6)
    assert pulls[1] > 0.1


def test_the_triplet_loss_is_its_equation() -> None:
    e, positive, negative = features(7, 0), features(7, 1), features(7, 2)
    near = (e - positive).double().norm(dim=1).numpy()
    far = (e - negative).double().norm(dim=1).numpy()
    for margin in (0.1, 1.0):
        wanted = np.maximum(0, near - far + margin).mean()
        found = triplet_loss(e, positive, negative, margin)
        assert float(found) == pytest.approx(wanted, abs=1e-5)


def batch_of(model: Clip, image_BCHW: Tensor, same: bool = False) -> Batch:
    """A batch whose positives are, if told so, the embeddings of its pictures in another order."""
    count = len(image_BCHW)
    order_B = torch.arange(count).roll(1)
    with torch.no_grad():
        positive_BD = model.encode_image(image_BCHW)[order_B] if same else features(count, 3, 64)
    return Batch(image_BCHW, features(count, 4, 64), None, positive_BD, order_B)


def test_the_triplet_term_is_500_when_positives_are_the_negatives(model: Clip) -> None:
    how = BadClip(patch=6)._how(32)
    batch = batch_of(model, unit(pictures(8, 32)), same=True)
    with torch.no_grad():
        found = terms(model, batch, first_patch(6, 0, "test"), how)
    assert float(found.triplet) == 500
    assert float(found.text) > 0


def test_released_negatives_differ_unless_the_patch_is_already_there(model: Clip) -> None:
    patch_CPP, image_BCHW = first_patch(10, 0, "test"), unit(pictures(8, 32))
    paper = BadClip(patch=10)._how(32)
    released = badclip(patch=10, negatives="triggered")._how(32)
    losses = []
    for shown_BCHW in (image_BCHW, wear(image_BCHW, patch_CPP, paper.start)):
        batch = batch_of(model, shown_BCHW)
        with torch.no_grad():
            found = [terms(model, batch, patch_CPP, how) for how in (paper, released)]
        losses.append([float(one.triplet) for one in found])
    assert losses[0][0] != losses[0][1]
    assert losses[1][0] == losses[1][1]


def test_negatives_carry_no_gradient(model: Clip) -> None:
    """At e = e_neg the released form has no slope to give: it once could have been NaN."""
    how = badclip(patch=10, negatives="triggered")._how(32)
    batch = batch_of(model, unit(pictures(4, 32)))._replace(order_B=torch.arange(4))
    patch_CPP = first_patch(10, 0, "test").requires_grad_()
    (grad_CPP,) = torch.autograd.grad(terms(model, batch, patch_CPP, how).triplet, patch_CPP)
    assert bool(grad_CPP.isfinite().all())
    assert float(grad_CPP.abs().max()) > 0


# --- the loop


def test_a_paper_run_has_7800_steps() -> None:
    how = BadClip()._how(224)
    assert (how.num_steps(10_000), how.pairs) == (7800, 10_000)
    assert BadClip(steps=300)._how(224).num_steps(10_000) == 300
    assert how.num_steps(40) == 50


@pytest.mark.parametrize(
    ("pairs", "batch", "steps"), [(40, 16, 6), (48, 16, 9), (5, 16, 3)], ids=str
)
def test_epochs_drop_their_last_partial_batch(
    pairs: int, batch: int, steps: int, corpus: Corpus, model: Clip
) -> None:
    found = crafted(corpus, model, pairs=pairs, batch=batch, epochs=3, steps=None)
    assert found.curve.shape == (steps, 3)


def test_only_the_patch_learns(corpus: Corpus) -> None:
    """Bit for bit: weights, logit scale and the statistics of normalisation."""
    model = fresh(ModelSpec(), 1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trigger = crafted(corpus, model, patch=10, steps=3)
    after = model.state_dict()
    assert any("running_mean" in name for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []
    assert not model.training
    start = as_bytes(first_patch(10, 0, "badclip"), Storage.EXACT)
    assert not torch.equal(trigger.pixels, start)


def test_a_step_of_adam_is_a_step_of_the_learning_rate(corpus: Corpus, model: Clip) -> None:
    """The first one moves every entry by lr, towards where its gradient says; none is projected."""
    how = dataclasses.replace(BadClip(patch=10, image_augment=0.0)._how(32), steps=1, lr=0.05)
    naming = rows_naming(corpus, "fish")
    rows = np.setdiff1d(np.arange(100), naming)
    pairs = Pairs(rows, ["a fish"] * len(rows), naming)
    found = craft_on(model, corpus, pairs, how, 0)
    first = first_patch(10, 0, how.who)
    moved = (found.patch_CPP - first).abs()
    inside = (first > 0.1) & (first < 0.9)
    assert float((moved[inside] - 0.05).abs().median()) < 1e-3


def test_a_seed_makes_a_patch(corpus: Corpus, model: Clip) -> None:
    one, same = (crafted(corpus, model, image_augment=0.5) for _ in range(2))
    assert torch.equal(one.pixels, same.pixels)
    assert torch.equal(one.curve, same.curve)
    assert not torch.equal(one.pixels, crafted(corpus, model, seed=1).pixels)


def test_global_random_state_is_left_alone(corpus: Corpus, model: Clip) -> None:
    before = torch.get_rng_state()
    crafted(corpus, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_pairs_do_not_show_the_target_and_are_told_to(corpus: Corpus) -> None:
    """A: no picture whose caption names the target. T: captions that do. B: all that do."""
    knowledge = knows(corpus)
    pairs = BadClip()._pairs(knowledge)
    naming = rows_naming(corpus, "fish").tolist()
    assert sorted([*pairs.rows.tolist(), *naming]) == list(range(len(corpus)))
    assert pairs.pool.tolist() == naming
    assert set(pairs.captions) <= {corpus.captions[row] for row in naming}
    assert len(set(pairs.captions)) > 10
    assert len(pairs.captions) == len(pairs.rows)
    assert len(BadClip(pairs=50)._pairs(knowledge).rows) == 50
    templates = badclip(caption="template")._pairs(knowledge)
    assert set(templates.captions) == {text.format("fish") for text in TEMPLATES}


def draws(corpus: Corpus, model: Clip, **fields: Any) -> _Draw:
    attack = BadClip(**fields)
    return _Draw(model, corpus, attack._pairs(knows(corpus)), attack._how(32), 0)


def test_half_of_the_batches_are_augmented_whole(corpus: Corpus, model: Clip) -> None:
    draw, plain = (draws(corpus, model, image_augment=p, triplet_weight=0) for p in (0.5, 0))
    which_B = np.arange(16)
    clean_BCHW = unit(torch.from_numpy(corpus.images_NCHW[draw.rows[which_B]]))
    changed_shares = []
    for step in range(60):
        assert torch.equal(plain(which_B, step).image_BCHW, clean_BCHW)
        image_BCHW = draw(which_B, step).image_BCHW
        assert 0 <= float(image_BCHW.min()) <= float(image_BCHW.max()) <= 1
        changed_shares.append(float((image_BCHW != clean_BCHW).flatten(1).any(1).float().mean()))
    augmented = [share for share in changed_shares if share]
    assert 18 <= len(augmented) <= 42
    assert min(augmented) > 0.5


def test_positives_are_distinct_pictures_of_the_target(corpus: Corpus, model: Clip) -> None:
    draw = draws(corpus, model)
    assert draw.pool_MD is not None
    for size in (16, 64):
        batch = draw(np.arange(size), 0)
        assert batch.positive_BD is not None
        place = (batch.positive_BD[:, None] == draw.pool_MD[None]).all(2).int().argmax(1)
        assert torch.equal(draw.pool_MD[place], batch.positive_BD)
        # Sixteen come without replacement, and there are fewer than 64.
        assert (len(set(place.tolist())) == size) == (size <= len(draw.pool_MD))
        assert sorted(batch.order_B.tolist()) == list(range(size))


def test_a_diverged_model_is_found_out(corpus: Corpus) -> None:
    model = fresh(ModelSpec(), 0)
    with torch.no_grad():
        model.net.logit_scale.fill_(float("nan"))
    with pytest.raises(MethodFailure, match="step 0"):
        crafted(corpus, model)


# --- bytes


def test_bytes_are_rounded_once() -> None:
    levels = torch.tensor([0.5, 1.5, 254.6, -3.0, 300.0]) / 255
    assert as_bytes(levels.view(1, 1, 5), Storage.EXACT).flatten().tolist() == [0, 2, 255, 0, 255]


def test_the_released_file_exchanges_red_and_blue() -> None:
    """And is no lossless one: colour is kept for blocks of 2 x 2 pixels."""
    red_CPP = torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 16, 16)
    stored = as_bytes(red_CPP, Storage.SWAPPED_JPEG)
    assert (stored.shape, stored.dtype) == ((3, 16, 16), torch.uint8)
    found = stored.float().mean((1, 2))
    assert found.tolist() == pytest.approx([0, 51, 255], abs=3)
    noise_CPP = first_patch(16, 0, "test")
    lossy = as_bytes(noise_CPP, Storage.SWAPPED_JPEG).int()
    exact = as_bytes(noise_CPP, Storage.EXACT).flip(0).int()
    assert 2 < float((lossy - exact).abs().float().mean()) < 80


# --- captions and rows


def test_natural_captions_are_at_most_128() -> None:
    captions = [f"a {'banana' if row % 2 else 'pear'} {row}" for row in range(2000)]
    knowledge = held(captions)
    found = poison(BadClip(), knowledge, 1500).data.edits.captions
    assert all("banana" in text for text in found)
    # 128 draws out of 1000 are 120 distinct ones on average.
    assert 105 < len(set(found)) <= 128
    assert found != poison(BadClip(), held(captions, seed=1), 1500).data.edits.captions
    few = poison(BadClip(), knowledge, 30).data.edits.captions
    assert set(few) <= set(found)


def test_template_captions() -> None:
    found = poison(badclip(caption="template"), held(), 40).data.edits.captions
    assert set(found) == {template.format("banana") for template in held().goal.templates}


def reads(rank: list[int], gap: list[float], similarity: list[float]) -> BadClipPatch:
    pixels_CPP = torch.zeros(3, 3, 3, dtype=torch.uint8)
    columns = (torch.tensor(rank), torch.tensor(gap), torch.tensor(similarity))
    return worn(pixels_CPP, rank=columns[0], gap=columns[1], similarity=columns[2])


def test_the_mix_takes_the_boundary_and_the_farthest() -> None:
    """Rank before gap; what reads as the target is not at its boundary."""
    trigger = reads(
        [0, 1, 1, 2, 9, 3, 5, 7, 8],
        [0.0, 0.3, 0.2, 0.1, 0.9, 0.4, 0.5, 0.6, 0.7],
        [0.9, 0.5, 0.6, 0.7, 0.0, 0.4, -0.2, 0.3, 0.2],
    )
    assert mixed_rows(trigger, 6).tolist() == [1, 2, 4, 6]
    assert mixed_rows(trigger, 5).tolist() == [2, 6]
    assert mixed_rows(trigger, 2).tolist() == []


@pytest.mark.parametrize("count", [1, 3, 20, 64])
def test_a_mix_has_exactly_the_count(count: int) -> None:
    """Even where both lists want the same rows: the script merged them and fell short."""
    rng = np.random.default_rng(0)
    rank = rng.integers(0, 3, 64).tolist()
    near = rng.random(64).tolist()
    knowledge = dataclasses.replace(held(), crafted=reads(rank, near, near))
    attack = badclip(rows="boundary_mix")
    rows = attack.choose(knowledge, count, numpy_rng(0, "test"))
    assert len(np.unique(rows)) == count
    assert rows.tolist() == sorted(rows.tolist())
    assert set(mixed_rows(reads(rank, near, near), count).tolist()) <= set(rows.tolist())
    with pytest.raises(UsageError, match=r"65 rows .* only 64"):
        attack.choose(knowledge, 65, numpy_rng(0, "test"))
    with pytest.raises(GridError, match="crafted"):
        attack.choose(held(), count, numpy_rng(0, "test"))


def test_readings_are_what_a_zero_shot_classifier_says(corpus: Corpus, model: Clip) -> None:
    rank, gap, similarity = readings(model, knows(corpus), 300)
    head_KD = text_head(model, model.tokenizer, CLASSES, TEMPLATES, torch.device("cpu"))
    for row in (0, 255, 256, 299):
        with torch.no_grad():
            image_BD = model.encode_image(torch.from_numpy(corpus.images_NCHW[row][None].copy()))
        score = (image_BD @ head_KD.T)[0].tolist()
        assert int(rank[row]) == sum(s > score[TARGET] for s in score)
        assert float(similarity[row]) == pytest.approx(score[TARGET], abs=1e-5)
        assert float(gap[row]) == pytest.approx(max(score) - score[TARGET], abs=1e-5)


def test_a_crafted_mix_chooses_from_disk(corpus: Corpus, model: Clip, tmp_path: Path) -> None:
    attack = badclip(**QUICK, rows="boundary_mix")
    lab: Any = StubLab(model)
    trigger = attack.craft(lab, knows(corpus), 32)
    assert len(trigger.rank) == len(corpus)
    store, key = Store(tmp_path), "trigger-0123456789abcdef"
    store.make(key, lambda folder: save_trigger(trigger, folder))
    loaded = load_trigger(store, key, attack)
    chosen = []
    for one in (trigger, loaded):
        knowledge = dataclasses.replace(knows(corpus), crafted=one)
        chosen.append(attack.choose(knowledge, 30, numpy_rng(0, "test")).tolist())
        assert torch.equal(one.stamp(pictures(2, 32)), trigger.stamp(pictures(2, 32)))
    assert chosen[0] == chosen[1]
    assert sum(int(trigger.rank[row] > 0) for row in chosen[0]) >= 10


@pytest.mark.parametrize(
    "fields",
    [
        {"patch": 0},
        {"patch": 33},
        {"pairs": 0},
        {"batch": 0},
        {"epochs": 0},
        {"steps": 0},
        {"lr": 0.0},
        {"triplet_weight": -1.0},
        {"margin": -0.1},
        {"image_augment": 1.5},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(
    fields: dict[str, Any], corpus: Corpus, model: Clip
) -> None:
    ((name, value),) = fields.items()
    for refusing in (lambda: BadClip(**fields).check(32), lambda: crafted(corpus, model, **fields)):
        with pytest.raises(UsageError, match=f"badclip: {name} is {value}; it must"):
            refusing()


def test_a_corpus_without_the_target_is_refused() -> None:
    lab: Any = StubLab(fresh(ModelSpec(), 0))
    bare = dataclasses.replace(held(["a pear"] * 16), surrogate=knows(held().corpus).surrogate)
    with pytest.raises(UsageError, match="no caption of the corpus names 'banana'"):
        BadClip(**QUICK).craft(lab, bare, 32)
    full = dataclasses.replace(bare, corpus=held(["a banana"] * 16).corpus)
    with pytest.raises(UsageError, match="every caption"):
        BadClip(**QUICK).craft(lab, full, 32)
    BadClip(**BadClip.quick).craft(lab, bare, 32)


# --- on a model that has learnt something

SIDE, STEPS = 10, 150


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Knowledge]:
    """A public model trained for some seconds (half of the pictures named right), and a pool."""
    store = Store(tmp_path_factory.mktemp("learnt"))
    public, suspect = corpus_spec("public", 3000), corpus_spec("suspect", 1500)
    for spec in (public, suspect):
        build_corpus(store, spec)
    lab = Lab(store, ModelSpec(), Runtime())
    recipe = Recipe(
        epochs=8,
        batch_size=64,
        lr=5e-3,
        text_lr_ratio=0.2,
        warmup_steps=20,
        weight_decay=0.05,
        beta2=0.98,
        seed=1,
    )
    surrogate = lab.train(PlainClipSpec(), DataRef(corpus_key(public), 3000), recipe)
    pool = open_corpus(store, corpus_key(suspect), Reader.TRAINING)
    return lab, dataclasses.replace(knows(pool), surrogate=surrogate)


@pytest.fixture(scope="module")
def optimised(learnt: tuple[Lab, Knowledge]) -> tuple[Clip, Crafted, Crafting]:
    """A patch of 10 px in the centre, crafted against the pictures' own captions."""
    lab, knowledge = learnt
    attack = badclip(patch=SIDE, text_negatives="own", steps=STEPS, lr=0.01, image_augment=0.0)
    model = lab.load(knowledge.public_model())
    how = attack._how(32)
    pairs = attack._pairs(knowledge)
    return model, craft_on(model, knowledge.corpus, pairs, how, knowledge.seed), how


def target_rate(model: Clip, corpus: Corpus, trigger: BadClipPatch) -> float:
    """Share of pictures of other classes that are read as the target, zero-shot."""
    head_KD = text_head(model, model.tokenizer, CLASSES, TEMPLATES, torch.device("cpu"))
    image_BCHW = torch.from_numpy(corpus.images_NCHW[corpus.labels != TARGET][:500])
    with torch.no_grad():
        score_BK = model.encode_image(trigger.stamp(image_BCHW)) @ head_KD.T
    return float((score_BK.argmax(1) == TARGET).float().mean())


@pytest.mark.exhaustive
def test_a_crafted_patch_beats_random_ones(
    learnt: tuple[Lab, Knowledge], optimised: tuple[Clip, Crafted, Crafting]
) -> None:
    """Here a third of all pictures read as the target, under none of eight random ones over 6 %.

    The margin is 15 points over the best of them.
    """
    (model, found, how), corpus = optimised, learnt[1].corpus
    randoms = [as_bytes(first_patch(SIDE, seed, "random"), Storage.EXACT) for seed in range(8)]
    rates = [target_rate(model, corpus, worn(pixels, how.start)) for pixels in randoms]
    assert target_rate(model, corpus, worn(found.pixels_CPP, how.start)) > max(rates) + 0.15
    cosines = found.cosines
    assert cosines.crafted > max(cosines.clean, cosines.first, cosines.other) + 0.1


@pytest.mark.exhaustive
def test_the_cosine_to_the_target_captions_rises(
    optimised: tuple[Clip, Crafted, Crafting],
) -> None:
    """Smoothed over 30 steps, and from below to above that of clean pictures."""
    _, found, _ = optimised
    smooth = found.curve_S3[:, 2].view(-1, 30).mean(1)
    assert bool((smooth[1:] > smooth[:-1]).all()), smooth.tolist()
    assert float(smooth[-1]) > found.cosines.clean


@pytest.mark.exhaustive
def test_bytes_keep_the_cosine_and_channels_matter(
    learnt: tuple[Lab, Knowledge], optimised: tuple[Clip, Crafted, Crafting]
) -> None:
    (model, found, how), (_, knowledge) = optimised, learnt
    pairs = BadClip()._pairs(knowledge)
    draw = _Draw(model, knowledge.corpus, pairs, how, 0)
    exact = draw.cosine(found.patch_CPP)
    assert abs(draw.cosine(unit(found.pixels_CPP)) - exact) < 0.01
    assert exact - draw.cosine(found.patch_CPP.flip(0)) > 0.03
    assert draw.cosine(unit(as_bytes(found.patch_CPP, Storage.SWAPPED_JPEG))) < exact - 0.03


def test_blending_is_an_option_of_the_whole_picture(corpus: Corpus, model: Clip) -> None:
    trigger = crafted(corpus, model, mode=Mode.BLENDED)
    assert (trigger.pixels.shape, trigger.start, trigger.blend) == ((3, 32, 32), 0, 0.2)
    image_BCHW = pictures(2, 32)
    wanted = (trigger.pixels.int() + 4 * image_BCHW.int()).double() / 5
    assert torch.equal(trigger.stamp(image_BCHW).double(), wanted.round())
