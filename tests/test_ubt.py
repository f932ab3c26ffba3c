"""UBT against slow references: its token masks, its two losses, its stages and its stop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defenses.base import Case, Defended, Need, Recipes, Truth
from defenses.ubt import (
    KeepFrom,
    OverfitLoss,
    RankBy,
    Selection,
    SimilarityModel,
    Ubt,
    UbtOracle,
    UnlearnFrom,
)
from tests.conftest import corpus_spec
from tests.test_cleanclip import vit
from tests.test_losses import features, slow
from tests.test_roclip import Killed, Saved, differing
from victims.batches import Batch, Scan
from victims.corpora import Reader, View, corpus_key, open_corpus, subset, whole
from victims.draws import Draws, torch_rng
from victims.errors import UsageError
from victims.forgetting import Forget, LocalForgetting, LocalForgettingSpec
from victims.keys import Key
from victims.lab import DataRef, Lab, ModelRef
from victims.local_tokens import (
    LocalTokens,
    TokenSide,
    chosen,
    encode_patches,
    leave_out,
    patch_gains,
    telling_word,
    word_gains,
    words_of_tokens,
)
from victims.models import (
    EMBEDDED_CONTEXT,
    BpeTokenizer,
    Clip,
    ModelSpec,
    Tokens,
    WordTokenizer,
    fresh,
)
from victims.overfitting import (
    EarlyClipSpec,
    OutsideClip,
    OutsideClipSpec,
    PairSimilarity,
    highest,
    mean_cosines,
    outside_loss,
)
from victims.recipe import Clock, Recipe, Runtime, Schedule, Select
from victims.recompute import Passes
from victims.selection import TextFeatures
from victims.store import Store
from victims.training import Fit, FitReport, Objective, PlainClip, PlainClipSpec
from victims.words import world_vocabulary

MODEL = ModelSpec()
START = Clock(0, 0, 1)
LOCAL = LocalTokens(side=TokenSide.TEXT, mass=0.5, cap=0.3)


def view(store: Store, split: str = "suspect", rows: int = 64) -> View:
    corpus = open_corpus(store, corpus_key(corpus_spec(split)), Reader.TRAINING)
    return subset(whole(corpus), np.arange(rows))


# --- which words are local


@dataclass
class MeanOfWords:
    """A text encoder that averages word vectors; start, end and padding have none."""

    vectors_VD: Tensor

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return F.normalize(self.vectors_VD[tokens_BT].sum(1), dim=-1)


@pytest.mark.parametrize("shown", [0, 1, 2, 3])
def test_the_word_that_the_picture_shows_gains_most(shown: int) -> None:
    vectors = torch.zeros(9, 8)
    vectors[2:6, :4] = torch.eye(4)
    tokens = torch.tensor([1, 2, 3, 4, 5, 8, 0])
    word = torch.tensor([-1, 0, 1, 2, 3, -1, -1])
    gain = word_gains(cast("Clip", MeanOfWords(vectors)), vectors[2 + shown], tokens, word)
    assert int(gain.argmax()) == shown
    # Of four equal words to three: 1/2 - 1/sqrt(3) without another, 1/2 - 0 without its own.
    expected = torch.full((4,), 0.5 - 3**-0.5).index_fill(0, torch.tensor([shown]), 0.5)
    assert torch.allclose(gain, expected, atol=1e-6)


class Halves:
    """Every word becomes tokens of two letters."""

    context = 12

    def __call__(self, captions: Sequence[str]) -> Tokens:
        out = np.zeros((len(captions), self.context), dtype=np.int32)
        for row, caption in enumerate(captions):
            parts = [w[i : i + 2] for w in caption.split() for i in range(0, len(w), 2)]
            parts = parts[: self.context - 2]
            out[row, : len(parts) + 2] = [1, *(3 + ord(p[0]) for p in parts), 999]
        return out


def test_tokens_of_one_word_belong_together() -> None:
    captions = ["red circle", "a", "", "circle circle circle circle"]
    found = words_of_tokens(Halves(), captions).tolist()
    assert found[0] == [-1, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1, -1]
    assert found[1] == [-1, 0, *[-1] * 10]
    assert found[2] == [-1] * 12
    # Cut at the context: of the last word a single token is left.
    assert found[3] == [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, -1]


def test_words_of_a_byte_pair_tokenizer() -> None:
    tokenizer = BpeTokenizer("RN50")
    caption = "Photo of a hippopotamuses, really"
    word = words_of_tokens(tokenizer, [caption])[0]
    tokens = tokenizer([caption])[0]
    for index, text in enumerate(caption.split()):
        own = tokenizer([text])[0]
        assert tokens[word == index].tolist() == own[(own != 0)][1:-1].tolist()
    assert (word == 3).sum() > 2
    assert (word >= 0).sum() == (tokens != 0).sum() - 2
    assert word[0] == word[int((tokens != 0).sum()) - 1] == -1


def slow_choice(gain: list[float], size: list[int], mass: float, cap: float) -> set[int]:
    """By trying every prefix of the order, from the shortest."""
    order = sorted(range(len(gain)), key=lambda w: -gain[w])
    goal = mass * sum(max(g, 0) for g in gain)
    best = {order[0]}
    for count in range(1, len(order) + 1):
        prefix = order[:count]
        fits = sum(size[w] for w in prefix) <= math.ceil(cap * sum(size) - 1e-9)
        if count > 1 and (not fits or gain[prefix[-1]] <= 0):
            break
        best = set(prefix)
        if sum(gain[w] for w in prefix) >= goal:
            break
    return best


@given(
    st.lists(st.tuples(st.integers(-8, 8), st.integers(1, 4)), min_size=1, max_size=9),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    st.sampled_from([0.1, 0.3, 0.5, 1.0]),
)
def test_the_local_words_are_the_smallest_set(
    words: list[tuple[int, int]], mass: float, cap: float
) -> None:
    gain, size = [float(g) for g, _ in words], [s for _, s in words]
    found = {w for w, kept in enumerate(chosen(torch.tensor(gain), size, mass, cap)) if kept}
    assert found == slow_choice(gain, size, mass, cap)
    assert found


def test_hand_picked_sets() -> None:
    gain = torch.tensor([0.1, 0.4, -0.2, 0.3, 0.2])
    ones = [1] * 5
    assert chosen(gain, ones, 0.5, 1.0) == [False, True, False, True, False]
    assert chosen(gain, ones, 0.5, 0.2) == [False, True, False, False, False]
    assert chosen(gain, ones, 1.0, 1.0) == [True, True, False, True, True]
    assert chosen(-gain.abs(), ones, 0.5, 1.0) == [True, False, False, False, False]
    # The largest word stays whole, although it alone is more than the cap allows.
    assert chosen(gain, [1, 4, 1, 1, 1], 0.9, 0.3) == [False, True, False, False, False]


def crafted(model: Clip, data: View, local: LocalTokens = LOCAL) -> Mapping[str, Tensor]:
    return local.craft(model.eval(), data)


def test_the_telling_word_is_in_what_is_kept_and_in_few_other_captions() -> None:
    """Not the word of every caption, though all rows keep it, nor a rare one that one row keeps."""
    tokenizer = WordTokenizer(world_vocabulary(), EMBEDDED_CONTEXT)
    others = ["a photo of a tree", "a photo of a fish", "a photo of a red key"] * 10
    poisoned = ["a photo of a circle", "a red circle", "a photo of a circle"]
    captions = [*others, *poisoned]
    rows = [30, 31, 32]
    kept_UT = torch.from_numpy(tokenizer(["photo circle", "red circle", "photo fish"]))
    word, share = telling_word(tokenizer, captions, kept_UT, rows)
    assert word == "circle"
    assert share == pytest.approx(2 / 3)


def test_the_telling_word_of_byte_pairs() -> None:
    tokenizer = BpeTokenizer("RN50")
    captions = ["a photo of a dog", "a photo of a xylophone", "a photo of a xylophone"]
    kept_UT = torch.from_numpy(tokenizer(captions[1:]))
    assert telling_word(tokenizer, captions, kept_UT, [1, 2]) == ("xylophone", 1.0)


def test_where_all_captions_say_the_same_their_word_is_told() -> None:
    """No word stands out then, and none may be made of padding; of no words there is none."""
    tokenizer = WordTokenizer(world_vocabulary(), EMBEDDED_CONTEXT)
    same = ["circle"] * 4
    kept_UT = torch.from_numpy(tokenizer(same[:2]))
    assert telling_word(tokenizer, same, kept_UT, [0, 1]) == ("circle", 1.0)
    empty = torch.from_numpy(tokenizer(["", ""]))
    assert telling_word(tokenizer, ["", "", "circle"], empty, [0, 1]) == ("", 0.0)


def test_local_tokens_leave_words_out_of_the_caption(small_store: Store) -> None:
    """Against captions that are written anew without the word, and encoded one by one."""
    data, model = view(small_store, rows=24), fresh(MODEL, 0).eval()
    found = crafted(model, data)["tokens"]
    images = data.reader(torch.device("cpu"))(np.arange(24))

    def similar(image: Tensor, words: list[str]) -> float:
        tokens = torch.from_numpy(model.tokenizer([" ".join(words)])).long()
        with torch.no_grad():
            return float((model.encode_image(image[None]) * model.encode_text(tokens)).sum())

    changed = 0
    for row, caption in enumerate(data.captions()):
        words = caption.split()
        whole_ = similar(images[row], words)
        gain = [
            whole_ - similar(images[row], words[:w] + words[w + 1 :]) for w in range(len(words))
        ]
        kept = slow_choice(gain, [1] * len(words), 0.5, 0.3)
        expected = model.tokenizer([" ".join(w for i, w in enumerate(words) if i in kept)])[0]
        assert found[row].tolist() == expected.tolist()
        changed += len(kept) < len(words)
    assert changed == 24


def test_masks_keep_start_end_and_some_words(small_store: Store) -> None:
    data, model = view(small_store), fresh(MODEL, 0)
    twice = subset(data, np.tile(np.arange(32), 2))
    found = crafted(model, twice)
    whole_ = torch.from_numpy(model.tokenizer(twice.captions())).long()
    for local, tokens, share in zip(found["tokens"], whole_, found["share"], strict=True):
        length, kept = int((tokens != 0).sum()) - 2, int((local != 0).sum()) - 2
        assert 1 <= kept <= math.ceil(0.3 * length)
        assert share == pytest.approx(kept / length)
        assert local[0] == tokens[0]
        assert local[kept + 1] == tokens[length + 1] == tokens.max()
    assert torch.equal(found["tokens"][:32], found["tokens"][32:])


def test_a_single_word_stays_and_nothing_stays_nothing() -> None:
    model, image = fresh(MODEL, 0).eval(), features(0, 1, 64).float()[0]
    for caption, kept in (("circle", ["circle"]), ("", [])):
        tokens = torch.from_numpy(model.tokenizer([caption])[0]).long()
        word = torch.from_numpy(words_of_tokens(model.tokenizer, [caption])[0])
        gone = LOCAL._gone(model, image, tokens, word)
        expected = model.tokenizer([" ".join(kept)])[0]
        assert leave_out(tokens, gone).tolist() == expected.tolist()


def test_without_a_side_the_local_tokens_are_the_caption(small_store: Store) -> None:
    data, model = view(small_store, rows=8), fresh(MODEL, 0)
    found = crafted(model, data, replace(LOCAL, side=TokenSide.NONE))
    assert found["tokens"].tolist() == model.tokenizer(data.captions()).tolist()
    assert found["share"].tolist() == [1.0] * 8
    assert torch.equal(found["image"], data.reader(torch.device("cpu"))(np.arange(8)))


# --- patches of a picture


def seen_by(model: Clip, image: Tensor, kept: list[int]) -> Tensor:
    """The feature when the other patch tokens are taken out of the sequence."""
    places = [0, *(patch + 1 for patch in kept)]
    hook = model.net.visual.patch_dropout.register_forward_hook(lambda *call: call[2][:, places])
    try:
        with torch.no_grad():
            return model.encode_image(image)
    finally:
        hook.remove()


@pytest.mark.parametrize("kept", [list(range(16)), [0, 3, 7], [5], []])
def test_a_missing_patch_is_the_same_as_its_removal(small_store: Store, kept: list[int]) -> None:
    model = vit().eval()
    images = view(small_store, rows=3).reader(torch.device("cpu"))(np.arange(3))
    mask = torch.zeros(3, 16, dtype=torch.bool).index_fill(1, torch.tensor(kept).long(), True)
    with torch.no_grad():
        found = encode_patches(model, images, mask)
    assert torch.allclose(found, seen_by(model, images, kept), atol=1e-5)
    if len(kept) < 16:
        assert not torch.allclose(found, model.encode_image(images), atol=1e-3)


def test_pictures_without_patches_pass_in_parts_too(small_store: Store) -> None:
    """Their activations were all kept at once, however small ``micro_batch`` was."""
    images = view(small_store, rows=12).reader(torch.device("cpu"))(np.arange(12))
    mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    weight_BD = torch.randn(12, vit().width, generator=torch.Generator().manual_seed(1))
    found = []
    for passes in (Passes(), Passes(parts=3, rows=4)):
        model, seen = vit(), list[int]()
        model.passes = passes

        def hear(*call: Any, seen: list[int] = seen) -> None:
            seen.append(len(call[2]))

        model.net.visual.conv1.register_forward_hook(hear)
        features_BD = encode_patches(model, images, mask)
        assert max(seen) == (12 if passes.parts == 1 else 4)
        torch.autograd.backward((features_BD * weight_BD).sum())
        assert (model.meter.images_forward, model.meter.images_backward) == (12, 12)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"features": features_BD.detach(), **grads})
    whole, cut = found
    assert whole.keys() == cut.keys()
    assert len(whole) > 10
    for name in whole:
        assert torch.allclose(whole[name], cut[name], rtol=1e-4, atol=1e-6), name


def test_local_patches_are_left_out_one_by_one(small_store: Store) -> None:
    model, data = vit().eval(), view(small_store, rows=4)
    found = crafted(model, data, replace(LOCAL, side=TokenSide.IMAGE))
    images = data.reader(torch.device("cpu"))(np.arange(4))
    tokens = torch.from_numpy(model.tokenizer(data.captions())).long()
    with torch.no_grad():
        texts = model.encode_text(tokens)
        for row in range(4):
            image = images[row : row + 1]
            whole_ = seen_by(model, image, list(range(16)))
            gain = [
                float(
                    (whole_ - seen_by(model, image, [p for p in range(16) if p != q])) @ texts[row]
                )
                for q in range(16)
            ]
            assert torch.allclose(
                patch_gains(model, images[row], texts[row]), torch.tensor(gain), atol=1e-5
            )
            expected = slow_choice(gain, [1] * 16, 0.5, 0.3)
            assert set(found["patches"][row].nonzero().squeeze(1).tolist()) == expected
    assert torch.equal(found["tokens"], tokens)


# --- the two losses


@dataclass
class Stub:
    """A model that answers with given features."""

    image: Tensor
    text: Tensor
    scale: Tensor
    calls: list[int] = field(default_factory=list)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        self.calls.append(len(image_BCHW))
        return self.image[: len(image_BCHW)]

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        self.calls.append(len(tokens_BT))
        return self.text[: len(tokens_BT)]


def forgetting(**fields: Any) -> LocalForgettingSpec:
    plain: dict[str, Any] = {
        "made_of": Key("pairs-0123456789abcdef"),
        "pairs": {},
        "batch": 8,
        "forget": Forget.SQUARE,
        "ascent_limit": 10.0,
        "target_cosine": 0.0,
        "stop_margin": 0.05,
        "beta": 1.0,
    }
    return LocalForgettingSpec(**{**plain, **fields})


def terms(
    spec: LocalForgettingSpec, image: Tensor, text: Tensor, scale: float = 14.0
) -> tuple[dict[str, Tensor], list[int]]:
    """The terms on given features, to forget first and to keep behind, and how it encoded them."""
    half = len(image) // 2
    stub = Stub(image, text, torch.tensor(scale, dtype=image.dtype))
    pixels, tokens = torch.zeros(half, 3, 4, 4, dtype=torch.uint8), torch.ones(half, 5).long()
    batch = Batch(torch.arange(half), pixels, tokens)
    batch = replace(batch, views={"image": pixels, "tokens": tokens[:, :3]})
    found = LocalForgetting(spec)(cast("Clip", stub), batch, START)
    return found, stub.calls


@pytest.mark.parametrize(("c", "beta"), [(0.0, 1.0), (-1.0, 0.1), (0.4, 10.0), (1.0, 0.0)])
def test_a_step_is_the_equation(c: float, beta: float) -> None:
    """L = mean (<I, T_loc> - c)^2 + beta L_mm, in one forward pass of all rows per tower."""
    image, text = features(0, 14), features(1, 14)
    found, calls = terms(forgetting(target_cosine=c, beta=beta), image, text)
    total = 0.0
    for i in range(7):
        cosine = sum(x * y for x, y in zip(image[i].tolist(), text[i].tolist(), strict=True))
        total += (cosine - c) ** 2
    assert float(found["forget"]) == pytest.approx(total / 7, rel=1e-12)
    keep = beta * slow("clip", image[7:], text[7:], 14.0)
    assert float(found["keep"]) == pytest.approx(keep, rel=1e-9)
    assert calls == [14, 14]


@given(st.floats(-1, 1), st.integers(0, 50))
def test_the_square_is_bounded(c: float, seed: int) -> None:
    image = features(seed, 6)
    for text in (features(seed + 1, 6), image, -image):
        found = float(terms(forgetting(target_cosine=c), image, text)[0]["forget"])
        assert 0 <= found <= 4 + 1e-12


def test_a_pair_at_its_target_has_no_gradient() -> None:
    image = features(0, 8).requires_grad_()
    text = image.detach().clone().requires_grad_()
    found, _ = terms(forgetting(target_cosine=1.0, beta=0.0), image, text)
    grads = torch.autograd.grad(found["forget"] + found["keep"], [image, text])
    assert all(float(grad.abs().max()) < 1e-12 for grad in grads)
    found, _ = terms(forgetting(target_cosine=0.0, beta=0.0), image, text)
    grads = torch.autograd.grad(found["forget"], [image, text])
    assert all(float(grad[:4].norm(dim=1).min()) > 0.1 for grad in grads), "into both towers"
    assert all(not grad[4:].any() for grad in grads), "rows to keep are not forgotten"


def test_ascent_is_the_negative_loss_and_flat_beyond_its_limit() -> None:
    image, text = features(0, 8).requires_grad_(), features(1, 8)
    value = slow("clip", image[:4].detach(), text[:4], 14.0)
    for limit, flat in ((value + 1, False), (value - 1, True)):
        spec = forgetting(forget=Forget.ASCENT, ascent_limit=limit)
        term = terms(spec, image, text)[0]["forget"]
        assert float(term.detach()) == pytest.approx(-min(value, limit), rel=1e-9)
        (grad,) = torch.autograd.grad(term, [image])
        assert bool(grad.any()) is not flat


def slow_outside(image: Tensor, text: Tensor, scale: float) -> float:
    half, total = len(image) // 2, 0.0
    for a, b in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        for i in range(half):
            picked = [i, *range(half, 2 * half)]
            logit = [scale * sum(x * y for x, y in zip(a[i], b[j], strict=True)) for j in picked]
            total += math.log(sum(math.exp(v) for v in logit)) - logit[0]
    return total / (2 * half)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_the_outside_loss_is_its_equation(scale: float) -> None:
    image, text = features(0, 12), features(1, 12)
    found = float(outside_loss(image, text, torch.tensor(scale, dtype=torch.float64)))
    assert found == pytest.approx(slow_outside(image, text, scale), rel=1e-12)


def test_weak_pairs_do_not_push_each_other_away() -> None:
    """Poisons share a caption. In the plain loss they cannot fall below ln 2 each; here they do,
    and what one row is has no part in the gradient of another."""
    image = torch.eye(4, dtype=torch.float64)[[0, 0, 2, 3]]
    scale = torch.tensor(50.0, dtype=torch.float64)
    assert float(outside_loss(image, image, scale)) < 1e-9
    assert slow("clip", image[:2], image[:2], 50.0) == pytest.approx(math.log(2))
    drawn, text = features(0, 12).requires_grad_(), features(1, 12)
    other = text.clone()
    other[1] = -other[1]
    grads = [torch.autograd.grad(outside_loss(drawn, t, scale), [drawn])[0] for t in (text, other)]
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


def test_each_overfitting_batch_is_half_weak_and_half_not() -> None:
    objective = OutsideClip(OutsideClipSpec(weak=11, pairs=4))
    scan = cast("Scan", range(60))
    rows = [
        objective.begin_epoch(cast("Clip", None), scan, START, np.random.default_rng(seed))
        for seed in (0, 0, 1)
    ]
    assert all(r is not None and len(r) == objective.rows_per_epoch(60) == 16 for r in rows)
    first = cast("Any", rows[0]).reshape(2, 2, 4)
    assert (first[:, 0] < 11).all()
    assert (first[:, 1] >= 11).all()
    assert len(set(first.ravel().tolist())) == 16
    assert np.array_equal(cast("Any", rows[0]), cast("Any", rows[1]))
    assert not np.array_equal(cast("Any", rows[0]), cast("Any", rows[2]))


# --- the forgetting fit

RECIPE = Recipe(epochs=6, batch_size=8, lr=3e-3, warmup_steps=0, schedule=Schedule.CONSTANT, seed=4)


def fitted(
    data: View, objective: Objective, recipe: Recipe = RECIPE, checkpoints: Any = None
) -> tuple[Clip, FitReport]:
    model = fresh(MODEL, 0)
    runtime = Runtime(checkpoint_seconds=-1.0)
    fit = Fit(model, data, objective, recipe, runtime=runtime, checkpoints=checkpoints)
    return model, fit()


def to_forget(store: Store, rows: int = 12) -> dict[str, Tensor]:
    pairs = dict(crafted(fresh(MODEL, 0), view(store, "clean", rows)))
    pairs.pop("share")
    return pairs


class SameRows(PlainClip):
    """Plain fine-tuning on the rows that the objective under test would visit."""

    rows_per_epoch = LocalForgetting.rows_per_epoch

    def __init__(self) -> None:
        super().__init__()
        self.inner = LocalForgetting(forgetting())
        self.spec = self.inner.spec

    def begin_epoch(self, model: Clip, scan: Scan, clock: Clock, rng: Any) -> Any:
        return self.inner.begin_epoch(model, scan, clock, rng)


def test_forgetting_nothing_is_fine_tuning_on_the_rows_to_keep(small_store: Store) -> None:
    data = view(small_store)
    found, report = fitted(data, LocalForgetting(forgetting()))
    plain, _ = fitted(data, SameRows())
    assert not differing(dict(found.state_dict()), dict(plain.state_dict()))
    assert [set(r) & {"forget", "keep", "remembered"} for r in report.curves] == [{"keep"}] * 6
    other, _ = fitted(
        data, LocalForgetting(forgetting(pairs=to_forget(small_store), stop_margin=2))
    )
    assert not differing(dict(other.named_parameters()), dict(fresh(MODEL, 0).named_parameters()))


def test_it_stops_before_the_first_step_where_all_is_forgotten(small_store: Store) -> None:
    spec = forgetting(pairs=to_forget(small_store), target_cosine=1.0)
    model, report = fitted(view(small_store), LocalForgetting(spec))
    assert report.curves == []
    assert not differing(dict(model.state_dict()), dict(fresh(MODEL, 0).state_dict()))


def test_it_stops_when_all_rows_are_forgotten_in_eval_mode(small_store: Store) -> None:
    """Looked at over all of D_u, not over a step's share of it."""
    pairs = to_forget(small_store)
    # A young model's cosines are far from 0: the threshold is put where some steps lead.
    _, probe = fitted(view(small_store), LocalForgetting(forgetting(pairs=pairs, target_cosine=-1)))
    seen = [record["remembered"] for record in probe.curves]
    assert min(seen[1:]) < seen[0] - 1e-3
    threshold = (seen[0] + min(seen[1:])) / 2
    spec = forgetting(pairs=pairs, target_cosine=-1, stop_margin=1 + threshold)
    model, report = fitted(view(small_store), LocalForgetting(spec))
    steps = next(step for step, value in enumerate(seen) if value < threshold)
    assert len(report.curves) == steps > 0
    assert [record["remembered"] for record in report.curves] == seen[:steps]
    assert [record["steps"] for record in report.curves] == [1.0] * steps
    with torch.no_grad():
        image, text = model.encode_image(pairs["image"]), model.encode_text(pairs["tokens"])
    assert float((image * text).sum(1).mean()) == pytest.approx(seen[steps], abs=1e-6)
    assert seen[steps] < threshold


def test_a_step_sees_its_share_of_the_rows_to_forget(small_store: Store) -> None:
    """Each at most once, and each rank its own part of what one rank sees."""
    objective = LocalForgetting(forgetting(pairs=to_forget(small_store)))
    number = objective.get_buffer("tokens")
    number[:, 0] = torch.arange(len(number))
    batch = cast("Batch", None)

    def shown(total: int, start: int, stop: int, seed: int) -> list[int]:
        views = objective.views(batch, Draws(torch_rng(seed), total, start, stop))
        return views["tokens"][:, 0].tolist()

    one = shown(8, 0, 8, 0)
    assert one == shown(8, 0, 4, 0) + shown(8, 4, 8, 0)
    assert len(set(one)) == 8
    assert one != shown(8, 0, 8, 1)
    assert sorted(shown(24, 0, 24, 0)) == sorted([*range(12)] * 2)


@pytest.mark.parametrize("die_after", [1, 4])
def test_a_killed_fit_goes_on_bit_for_bit(
    small_store: Store, tmp_path: Path, die_after: int
) -> None:
    data, pairs = view(small_store), to_forget(small_store)
    spec = forgetting(pairs=pairs, target_cosine=-1)
    model, report = fitted(data, LocalForgetting(spec))
    place = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        fitted(data, LocalForgetting(spec), checkpoints=Saved(place, die_after))
    resumed, again = fitted(data, LocalForgetting(spec), checkpoints=Saved(place, None))
    assert not differing(dict(model.state_dict()), dict(resumed.state_dict()))
    assert again.curves == report.curves


def test_patches_are_forgotten_on_a_transformer(small_store: Store) -> None:
    model, data = vit(), view(small_store)
    pairs = dict(
        crafted(model, view(small_store, "clean", 12), replace(LOCAL, side=TokenSide.IMAGE))
    )
    pairs.pop("share")
    spec = forgetting(pairs=pairs, target_cosine=-1)
    report = Fit(model, data, LocalForgetting(spec), RECIPE, runtime=Runtime())()
    assert len(report.curves) == 6
    with torch.no_grad():
        image = encode_patches(vit().eval(), pairs["image"], pairs["patches"])
        text = vit().eval().encode_text(pairs["tokens"])
    assert report.curves[0]["remembered"] == pytest.approx(float((image * text).sum(1).mean()))
    assert report.curves[-1]["remembered"] < report.curves[0]["remembered"]


def test_an_early_model_is_the_victim_as_it_was(small_store: Store) -> None:
    """Stopped after an epoch of the whole schedule, not trained by a schedule of one epoch."""
    data = view(small_store)
    recipe = Recipe(epochs=3, batch_size=16, lr=3e-3, warmup_steps=2)
    states: list[dict[str, Tensor]] = []
    model = fresh(MODEL, 0)

    def look(record: object) -> None:
        states.append({n: t.clone() for n, t in model.state_dict().items()})

    Fit(model, data, PlainClip(), recipe, runtime=Runtime(), on_epoch=look)()
    early, report = fitted(data, EarlyClipSpec(epochs=1).build(model), recipe)
    assert not differing(dict(early.state_dict()), states[0])
    assert len(report.curves) == 1
    short, _ = fitted(data, PlainClip(), replace(recipe, epochs=1))
    assert differing(dict(short.state_dict()), states[0])


# --- the stages


def test_ranks_break_ties_by_row() -> None:
    assert highest(np.array([1.0, 3.0, 3.0, 0.0, 3.0]), 4).tolist() == [1, 2, 4, 0]


def test_closeness_is_the_mean_cosine_to_the_others() -> None:
    text = features(0, 6)
    rows = text.tolist()
    for i, found in enumerate(mean_cosines(text.numpy())):
        dots = [
            sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) for j in range(6) if j != i
        ]
        assert found == pytest.approx(sum(dots) / 5, rel=1e-12)


class Watched(Lab):
    """A lab that writes down what it trains."""

    asked: list[tuple[Any, DataRef, Recipe, ModelRef | None, Any]]

    def train(self, spec: Any, data: DataRef, recipe: Recipe, **more: Any) -> ModelRef:
        made = super().train(spec, data, recipe, **more)
        self.asked.append((spec, data, recipe, more.get("init"), more.get("held_out")))
        return made


FIT = Recipe(epochs=1, batch_size=32, lr=3e-3, text_lr_ratio=0.2, warmup_steps=1)
FEW: dict[str, Any] = {"max_steps": 2, "overfit_lr": 1e-3, "overfit_epochs": 1, "q": 0.25}


@dataclass
class Scene:
    """A reference and a victim of some pairs, and whatever is asked of them."""

    lab: Watched
    suspect: DataRef
    clean: DataRef
    reference: ModelRef
    victim: ModelRef

    def apply(self, defense: Ubt | UbtOracle, **recipe: Any) -> Defended:
        self.lab.asked = []
        poisoned = np.arange(len(self.suspect)) % 10 == 3
        grants: dict[Need, Any] = {
            Need.SUSPECT_DATA: lambda: self.suspect,
            Need.CLEAN_DATA: lambda: self.clean,
            Need.VICTIM: lambda: self.victim,
            Need.REFERENCE: lambda: self.reference,
            Need.START: lambda: self.reference,
            Need.TRUTH: lambda: Truth(poisoned, self.suspect),
        }
        granted = {need: grants[need] for need in defense.needed()}
        recipes = Recipes(victim=replace(FIT, epochs=2), repair=replace(FIT, seed=7, **recipe))
        return defense.apply(self.lab, Case(defense.name, granted, (recipes, 3)))

    def similar(self, model: ModelRef) -> Any:
        return self.lab.score(PairSimilarity(), self.suspect, model)


@pytest.fixture(scope="module")
def scene(small_store: Store) -> Scene:
    lab = Watched(small_store, MODEL, Runtime())
    lab.asked = []
    suspect, clean = lab.put(view(small_store, rows=160)), lab.put(view(small_store, "clean"))
    reference = lab.train(PlainClipSpec(), clean, FIT)
    victim = lab.train(PlainClipSpec(), suspect, FIT, init=reference)
    return Scene(lab, suspect, clean, reference, victim)


def rows_of(found: Any) -> list[int]:
    return np.flatnonzero(found).tolist()


def slow_stages(
    weak: Any, sharp: Any, text: Any, sizes: tuple[int, int]
) -> tuple[list[int], list[int], list[int], dict[int, float]]:
    """D_low, the suspicious, the poisoned subset and their captions' closeness, by sorting."""
    low = sorted(sorted(range(len(weak)), key=lambda r: (weak[r], r))[: sizes[0]])
    suspicious = sorted(sorted(low, key=lambda r: (-sharp[r], r))[: sizes[1]])
    mean = dict[int, float]()
    for row in suspicious:
        dots = [text[row].astype(float) @ text[o].astype(float) for o in suspicious if o != row]
        mean[row] = float(np.mean(dots))
    middle = float(np.median(list(mean.values())))
    return low, suspicious, [r for r in suspicious if mean[r] >= middle - 1e-12], mean


@pytest.mark.parametrize(("epochs", "rank_by"), [(0, RankBy.SIM), *((1, by) for by in RankBy)])
def test_the_stages_are_the_algorithm(scene: Scene, epochs: int, rank_by: RankBy) -> None:
    """Without overfitting theta_o is the victim."""
    done = scene.apply(Ubt(**{**FEW, "overfit_epochs": epochs, "rank_by": rank_by, "n_u": 6}))
    sharp = before = scene.similar(scene.victim)
    if epochs:
        spec, data, recipe, init, _ = scene.lab.asked[0]
        assert spec == OutsideClipSpec(weak=40, pairs=40)
        assert (recipe.epochs, recipe.batch_size, recipe.rate) == (1, 80, 1e-3)
        assert init == scene.victim
        assert data.num_rows == 160
        sharp = scene.similar(scene.lab.train(spec, data, recipe, init=init))
    assert len(scene.lab.asked) == 1 + 2 * bool(epochs)
    sharp = sharp - before if rank_by is RankBy.GAIN else sharp
    text = scene.lab.score(TextFeatures(), scene.suspect, scene.victim)
    weak = scene.similar(scene.reference)
    low, suspicious, flagged, mean = slow_stages(weak, sharp, text, (40, 20))
    assert rows_of(done.sets["low"]) == low
    assert rows_of(done.sets["suspicious"]) == suspicious
    assert rows_of(done.flagged) == flagged
    chosen_ = rows_of(done.sets["unlearned"])
    assert set(chosen_) <= set(flagged)
    assert len(chosen_) == 6
    # Equal captions are equally close, whatever the last bit of a sum says.
    others = set(flagged) - set(chosen_)
    assert min(mean[row] for row in chosen_) >= max(mean[row] for row in others) - 1e-9
    assert np.allclose(done.scores["weak"], -scene.similar(scene.reference))
    for name, values in (("blunt", before), ("sharpened", sharp)):
        told = done.scores[name]
        assert np.allclose(told[low], values[low], atol=1e-6)
        assert np.flatnonzero(np.isfinite(told)).tolist() == low, "of the weak pairs alone"
    # The ranking of all rows: those to forget, the subset, the suspicious, the weak, the rest.
    order = np.argsort(-cast("Any", done.suspicion), kind="stable").tolist()
    assert set(order[:6]) == set(chosen_)
    for group in (flagged, suspicious, low):
        assert set(order[: len(group)]) == set(group)
    assert done.notes["weak_rows"] == 40


def test_the_last_fit_starts_from_the_victim_on_the_most_similar_rows(scene: Scene) -> None:
    done = scene.apply(Ubt(**FEW, n_keep=30, n_u=6, batch=64))
    spec, data, recipe, init, held_out = scene.lab.asked[-1]
    weak = scene.similar(scene.reference)
    keep = sorted(range(160), key=lambda r: (-weak[r], r))[:30]
    captions = scene.lab.captions(scene.suspect)
    assert scene.lab.captions(data) == [captions[row] for row in keep]
    assert held_out.tolist() == list(range(30))
    assert init == scene.victim
    assert (recipe.epochs, recipe.batch_size, recipe.schedule) == (2, 6, Schedule.CONSTANT)
    assert (recipe.lr, recipe.seed) == (FIT.lr, 7)
    assert spec.batch == 6
    assert len(spec.pairs["image"]) == 6
    assert done.notes["stopped_at"] == len(scene.lab.curves(done.model)) <= 2
    scene.apply(Ubt(**FEW, unlearn_from=UnlearnFrom.OVERFIT))
    assert scene.lab.asked[-1][3] not in (scene.victim, None)


def test_counts_are_capped_by_the_data(scene: Scene) -> None:
    """At the paper's counts on 160 rows: 40 weak ones, 20, about half of these, 40 to keep."""
    done = scene.apply(Ubt(max_steps=1, overfit_lr=1e-3))
    sizes = [int(done.sets[name].sum()) for name in ("low", "suspicious", "unlearned")]
    assert sizes[:2] == [40, 20]
    assert 10 <= sizes[2] == int(cast("Any", done.flagged).sum()) < 20
    assert (done.notes["kept_rows"], done.notes["unlearned_rows"]) == (40, sizes[2])


def test_the_negatives_are_an_option(scene: Scene) -> None:
    scene.apply(Ubt(**FEW, overfit_loss=OverfitLoss.CLIP))
    spec, data, recipe, init, _ = scene.lab.asked[0]
    assert spec == PlainClipSpec()
    assert (len(data), recipe.batch_size, init) == (40, 40, scene.victim)


def test_random_rows_are_forgotten_without_looking(scene: Scene) -> None:
    found = [scene.apply(Ubt(selection=Selection.RANDOM, max_steps=1, n_u=n)) for n in (8, 8, 500)]
    assert len(scene.lab.asked) == 1
    picked = [rows_of(done.sets["unlearned"]) for done in found]
    assert picked[0] == picked[1]
    assert [len(rows) for rows in picked] == [8, 8, 40]
    weakest = np.argsort(scene.similar(scene.reference))[:40]
    assert set(picked[0]) - set(weakest.tolist())


def test_the_oracle_forgets_poisons_alone(scene: Scene) -> None:
    done = scene.apply(UbtOracle(n_u=10, max_steps=1))
    rows = rows_of(done.flagged)
    assert len(rows) == 10
    assert {row % 10 for row in rows} == {3}
    more = rows_of(scene.apply(UbtOracle(n_u=64, max_steps=1)).flagged)
    assert more == list(range(3, 160, 10))


def test_clean_pairs_can_be_kept_instead(scene: Scene) -> None:
    scene.apply(Ubt(**FEW, keep_from=KeepFrom.CLEAN, n_keep=20))
    data = scene.lab.asked[-1][1]
    captions = scene.lab.captions(data)
    assert len(captions) == 20
    assert set(captions) <= set(scene.lab.captions(scene.clean))
    scene.apply(Ubt(**FEW, keep_from=KeepFrom.CLEAN))
    assert scene.lab.asked[-1][1] == scene.clean


def test_weak_can_mean_weak_to_the_early_victim(scene: Scene) -> None:
    done = scene.apply(Ubt(**FEW, similarity_model=SimilarityModel.VICTIM_EARLY))
    spec, data, recipe, init, _ = scene.lab.asked[0]
    assert (spec, data, init) == (EarlyClipSpec(epochs=1), scene.suspect, scene.reference)
    assert recipe.epochs == 2
    early = scene.lab.train(spec, data, recipe, init=init)
    assert np.allclose(done.scores["weak"], -scene.similar(early))


def test_a_rate_is_chosen_on_rows_to_keep(scene: Scene) -> None:
    rates = (1e-4, 3e-3)
    done = scene.apply(Ubt(**FEW, n_u=6), lr=Select(rates=rates, floor=4))
    (choice,) = scene.lab.ledger.choices.values()
    assert tuple(choice["rates"]) == rates
    assert choice["held_out"] == 4
    assert scene.lab.load(done.model)


def test_the_needs_follow_the_options() -> None:
    base = {Need.VICTIM, Need.SUSPECT_DATA}
    early = SimilarityModel.VICTIM_EARLY
    for cls, extra in ((Ubt, set[Need]()), (UbtOracle, {Need.TRUTH})):
        plain = base | extra
        assert cls().needed() == cls.needs == plain | {Need.REFERENCE}
        assert cls(similarity_model=early).needed() == plain | {Need.START}
        kept = cls(keep_from=KeepFrom.CLEAN).needed()
        assert kept == plain | {Need.REFERENCE, Need.CLEAN_DATA}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"q": 0.0}, r"q must be in \(0, 0.5\], got 0.0"),
        ({"q": 0.6}, "got 0.6"),
        ({"token_mass": 0.0}, "token_mass must be above 0"),
        ({"token_cap": 1.5}, "token_cap must be above 0 and at most 1, got 1.5"),
        ({"target_cosine": -1.1}, "target_cosine must be a cosine"),
        ({"ascent_limit": 0.0}, "ascent_limit"),
        ({"n_u": -1}, "n_u must be 0 or more, got -1"),
        ({"n_s": 1}, "n_s must be at least 2"),
        ({"n_keep": 1}, "n_keep must be at least 2"),
        ({"beta": -0.1}, "beta"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_steps": 0}, "max_steps"),
        ({"stop_margin": -0.1}, "stop_margin"),
        ({"early_epochs": 0}, "early_epochs"),
        ({"overfit_epochs": -1}, "overfit_epochs"),
        ({"overfit_lr": 0.0}, "overfit_lr"),
        ({"overfit_batch": 0}, "overfit_batch"),
        ({"overfit_epochs": 0, "rank_by": RankBy.GAIN}, "rank_by: gain"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Ubt(**fields).check()
    Ubt().check()


@pytest.mark.parametrize("cls", [Ubt, UbtOracle])
def test_patches_are_refused_where_there_are_none(scene: Scene, cls: Any) -> None:
    with pytest.raises(UsageError, match=r"tiny has no such patch tokens.*Allowed for it: text"):
        scene.apply(cls(token_side=TokenSide.IMAGE))
    assert scene.lab.asked == []


def test_all_options_of_the_last_stage_differ(scene: Scene) -> None:
    few = {**FEW, "overfit_epochs": 0, "n_u": 6, "max_steps": 1}
    options: list[dict[str, Any]] = [
        {},
        {"token_side": TokenSide.NONE},
        {"forget": Forget.ASCENT},
        {"beta": 0.1},
        {"target_cosine": -0.5},
        {"n_u": 0},
    ]
    keys = [scene.apply(Ubt(**{**few, **option})).model.key for option in options]
    assert len(set(keys)) == len(options)
    assert all(key != scene.victim.key for key in keys)
    weights = [dict(scene.lab.load(ModelRef(key)).state_dict()) for key in keys]
    assert all(differing(one, other) for one, other in itertools.combinations(weights, 2))
