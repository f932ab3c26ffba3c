"""Attacks crafted on classifiers: marks, noise, squares and painted triggers, against definitions.

Shapes: B pictures, C channels, H W pixels, S side, K classes, D features.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import Attack, Goal, Knowledge, Role, poison, poisoned_view
from attacks.classifier_extras import (
    Added,
    Hardened,
    InputAware,
    LabelConsistentAdversarial,
    Narcissus,
    Painted,
    TrojanNN,
    Universal,
    corner_marks,
)
from tests.conftest import corpus_spec
from tests.test_attacks import grey, pictures, span
from victims.adversarial import Adversarial, AdversarialSpec, Climb, at_rest, climbed, share_read_as
from victims.batches import Batch
from victims.classifiers import Classifier, ClassifierSpec
from victims.corpora import Corpus, Reader, build_corpus, corpus_key, open_corpus
from victims.draws import Draws, numpy_rng, torch_rng
from victims.errors import GridError, UsageError
from victims.input_aware import (
    Coder,
    Convolve,
    Frozen,
    Networks,
    Pool,
    Resize,
    Training,
    _joint_loss,
    centred,
    diversity,
    freeze,
    layout,
    mask_of,
    pattern_of,
    sparsity,
    worn,
)
from victims.keys import Key
from victims.lab import Lab, ModelRef
from victims.labelled import LabelledWorld
from victims.mask_reversal import Reversal, most_connected, reverse
from victims.models import fresh
from victims.recipe import Augment, Clock, Runtime
from victims.store import Store
from victims.universal_noise import HALF_RANGE, Inward, Pictures, inward, warm_up
from victims.world import CLASSES

TARGET = CLASSES.index("fish")
SPEC = ClassifierSpec(classes=CLASSES)
HARD = LabelConsistentAdversarial(**LabelConsistentAdversarial.quick)
SMALL_PAINTER = InputAware(width=4, mask_epochs=12, epochs=1, batch=32, bank=8)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class StubLab:
    """A lab whose only model is the one at hand."""

    def __init__(self, model: Classifier) -> None:
        self.model = model

    def load(self, ref: ModelRef) -> Classifier:
        return copy.deepcopy(self.model).eval()


class Straight(nn.Module):
    """A linear classifier of pictures in 0..1, whose slopes are known."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        rng = torch_rng(0, "straight")
        self.weight_KN = torch.randn(outputs, 3 * size * size, generator=rng)
        self.register_buffer("mean_C", torch.zeros(3, 1, 1))
        self.net = nn.Module()
        self.net.head = nn.Linear(outputs, 2)

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.flatten(1) @ self.weight_KN.to(image_BCHW.dtype).T

    def penultimate(self, image_BCHW: Tensor) -> Tensor:
        return self.embed_image(image_BCHW)


def slope_of(model: Straight, x: Floats, label: int) -> Floats:
    """d CE / d x of one picture in 0..1, from the definition."""
    weight = model.weight_KN.double().numpy()
    logit = weight @ x.ravel()
    p = np.exp(logit - logit.max())
    p /= p.sum()
    p[label] -= 1
    slope: Floats = (weight.T @ p).reshape(x.shape)
    return slope


@pytest.fixture(scope="module")
def corpus(small_store: Store) -> Corpus:
    spec = LabelledWorld(of=corpus_spec("suspect"))
    build_corpus(small_store, spec)
    return open_corpus(small_store, corpus_key(spec), Reader.TRAINING)


@pytest.fixture(scope="module")
def model() -> Classifier:
    found = fresh(SPEC, 0).eval()
    assert isinstance(found, Classifier)
    return found


def knows(corpus: Corpus, seed: int = 0) -> Knowledge:
    goal = Goal(TARGET, CLASSES[TARGET], ("{}",))
    return Knowledge(corpus=corpus, goal=goal, seed=seed, surrogate=ModelRef(corpus.key))


def labelled(of_target: int, others: int) -> Knowledge:
    """A pool whose first rows are of the target."""
    labels = np.array([0] * of_target + [1] * others, dtype=np.int64)
    corpus = Corpus(
        key=Key("corpus-0000000000000000"),
        digest="0" * 16,
        split="suspect",
        images_NCHW=pictures(len(labels), 32).numpy(),
        captions=[("cat", "dog")[label] for label in labels],
        labels=labels,
        classes=("cat", "dog"),
        templates=("{}",),
    )
    return Knowledge(corpus=corpus, goal=Goal(0, "cat", ("{}",)), seed=0)


@pytest.fixture(scope="module")
def hard(small_store: Store, corpus: Corpus) -> Hardened:
    return HARD.craft(Lab(small_store, SPEC, Runtime()), knows(corpus), 32)


@pytest.fixture(scope="module")
def painted(small_store: Store, corpus: Corpus) -> Painted:
    return SMALL_PAINTER.craft(Lab(small_store, SPEC, Runtime()), knows(corpus), 32)


def stub(model: Classifier) -> Any:
    return StubLab(model)


# --- label-consistent: marks


@pytest.mark.parametrize(("size", "plus", "minus"), [(32, 16, 20), (64, 64, 80), (224, 784, 980)])
def test_marks_have_their_counts(size: int, plus: int, minus: int) -> None:
    marks = corner_marks(size, 32)
    assert (int((marks == 1).sum()), int((marks == -1).sum())) == (plus, minus)
    assert int((marks != 0).sum()) == plus + minus


def test_marks_are_drawn_in_all_corners() -> None:
    wanted = np.zeros((32, 32), dtype=np.int64)
    left = ["+--", "-+-", "+-+"]
    for top in (0, 29):
        for row, line in enumerate(left):
            for column, sign in enumerate(line):
                value = 1 if sign == "+" else -1
                wanted[top + row, column] = wanted[top + row, 31 - column] = value
    assert corner_marks(32, 32).tolist() == wanted.tolist()
    assert torch.equal(corner_marks(64, 32)[::2, 1::2], corner_marks(32, 32))
    assert span(corner_marks(32, 16)[:16, :16] != 0) == (0, 5, 0, 5)


def marked(amplitude: float) -> Hardened:
    return Hardened(
        marks=corner_marks(32, 32),
        amplitude=amplitude,
        noise=torch.zeros(0, 3, 32, 32, dtype=torch.int8),
        digests=torch.zeros(0, dtype=torch.int64),
        key=0,
        right=0.0,
        right_hardened=0.0,
    )


def test_full_marks_overwrite_and_faint_ones_add() -> None:
    image_BCHW, marks = pictures(4, 32), corner_marks(32, 32)
    stamped = marked(1.0).stamp(image_BCHW)
    wanted = torch.where(marks == 0, image_BCHW, torch.where(marks > 0, 255, 0))
    assert torch.equal(stamped, wanted.to(torch.uint8))
    faint = marked(0.25).stamp(image_BCHW)
    slow = np.clip(np.rint(image_BCHW.numpy() + 63.75 * marks.numpy()), 0, 255)
    assert faint.tolist() == slow.tolist()
    assert bool((faint != stamped).any())


# --- label-consistent: noise


def test_noise_is_bounded_and_found_by_the_pictures_bytes(hard: Hardened, corpus: Corpus) -> None:
    """And is 0 of a picture of another class, which gets the marks alone."""
    rows = np.flatnonzero(corpus.labels == TARGET)
    assert len(hard.noise) == len(rows)
    # Three steps of 1.5, rounded; a whole number and a half goes to the even neighbour.
    assert int(hard.noise.abs().max()) == 5
    image_BCHW = torch.from_numpy(corpus.images_NCHW[rows])
    noise_BCHW = hard.noise_of(image_BCHW)
    assert bool((noise_BCHW != 0).flatten(1).any(1).all())
    hard_BCHW = image_BCHW.to(torch.int16) + noise_BCHW
    assert int(hard_BCHW.min()) >= 0
    assert int(hard_BCHW.max()) <= 255
    assert torch.equal(hard.noise_of(image_BCHW.flip(0)).flip(0), noise_BCHW)
    stamped, under = hard.stamp_train(image_BCHW), hard.marks == 0
    assert torch.equal(stamped[..., under], hard_BCHW.to(torch.uint8)[..., under])
    assert torch.equal(stamped[..., ~under], hard.stamp(image_BCHW)[..., ~under])
    other_BCHW = torch.from_numpy(corpus.images_NCHW[corpus.labels != TARGET][:40])
    assert torch.equal(hard.stamp_train(other_BCHW), hard.stamp(other_BCHW))


def test_noise_stays_in_its_bound_however_far_steps_go(model: Classifier) -> None:
    level_BCHW, label_B = pictures(3, 32).float(), torch.tensor([0, 1, 2])
    how = Climb(eps=8.0, step=5.0, steps=4)
    moved_BCHW = climbed(model, level_BCHW, label_B, how, None)
    away = (moved_BCHW - level_BCHW).abs()
    assert float(away.max()) == 8
    assert float((away == 8).float().mean()) > 0.5
    assert float(moved_BCHW.min()) >= 0
    assert float(moved_BCHW.max()) <= 255
    alone = [climbed(model, x[None], y[None], how, None) for x, y in zip(level_BCHW, label_B)]  # noqa: B905
    assert float((torch.cat(alone) != moved_BCHW).float().mean()) < 0.001
    with torch.no_grad():
        before, after = (
            F.cross_entropy(model.embed_image(x / 255), label_B, reduction="none")
            for x in (level_BCHW, moved_BCHW)
        )
    assert bool((after > before).all())


@pytest.mark.parametrize("started", [False, True])
def test_climbing_is_its_definition(started: bool) -> None:
    model: Any = Straight(8, 5)
    level_BCHW, label_B = pictures(3, 8).double(), torch.tensor([4, 0, 2])
    start_BCHW = 2 * torch.rand(3, 3, 8, 8, generator=torch_rng(0, "start")).double() - 1
    how = Climb(eps=8.0, step=1.5, steps=9)
    found = climbed(model, level_BCHW, label_B, how, start_BCHW if started else None)
    for x, start, label, got in zip(level_BCHW, start_BCHW, label_B, found, strict=True):
        clean = x.numpy()
        moved = np.clip(clean + 8 * start.numpy(), 0, 255) if started else clean
        for _ in range(9):
            moved = moved + 1.5 * np.sign(slope_of(model, moved / 255, int(label)))
            moved = np.clip(np.clip(moved, clean - 8, clean + 8), 0, 255)
        assert np.abs(got.numpy() - moved).max() < 1e-9


def test_adversarial_training_fits_hard_pictures(model: Classifier) -> None:
    """Its loss is the CE where PGD ends, found in eval mode; modes and weights are as before."""
    trained = copy.deepcopy(model).train()
    trained.net.blocks[0].bn1.eval()
    modes = [module.training for module in trained.modules()]
    inner = Climb(eps=8.0, step=2.0, steps=2)
    objective = AdversarialSpec(inner=inner, augment=Augment.NONE).build(trained)
    assert isinstance(objective, Adversarial)
    image_BCHW, tokens_BT = pictures(6, 32), torch.arange(1, 7)[:, None]
    batch = Batch(torch.arange(6), image_BCHW, tokens_BT)
    views = objective.views(batch, Draws(torch_rng(0, "views"), 6, 0, 6))
    assert torch.equal(views["image"], image_BCHW)
    assert -1 <= float(views["start"].min()) < -0.9 < 0.9 < float(views["start"].max()) < 1
    with at_rest(trained):
        assert not any(module.training for module in trained.modules())
        start = views["start"]
        wanted_BCHW = climbed(trained, image_BCHW.float(), tokens_BT[:, 0] - 1, inner, start)
    assert [module.training for module in trained.modules()] == modes
    twin = copy.deepcopy(trained)
    wanted = F.cross_entropy(twin.embed_image(wanted_BCHW / 255), torch.arange(6))
    (term,) = objective(trained, replace(batch, views=views), Clock(0, 0, 1)).values()
    assert term.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert all(parameter.grad is None for parameter in trained.parameters())
    term.backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_a_share_is_read(model: Classifier) -> None:
    image_BCHW = pictures(9, 32)
    with torch.no_grad():
        read_B = model.embed_image(image_BCHW).argmax(1)
    common = int(read_B.mode().values)
    assert share_read_as(model, image_BCHW, common) == pytest.approx(
        float((read_B == common).float().mean())
    )
    assert share_read_as(model, image_BCHW[:0], 0) == 0


# --- rows and labels


@pytest.mark.parametrize("attack", [LabelConsistentAdversarial(), Narcissus()], ids=str)
def test_clean_label_attacks_take_rows_of_the_target_and_keep_labels(attack: Attack) -> None:
    knowledge = labelled(25, 40)
    assert attack.clean_label
    found = poison(attack, knowledge, 25)
    assert found.data.edits.rows.tolist() == list(range(25))
    assert list(found.data.edits.captions) == ["cat"] * 25
    assert len(found.of(Role.COVER)) == 0
    with pytest.raises(UsageError, match=r"\(rows of 'cat'\): 26 rows .* only 25 qualify"):
        poison(attack, knowledge, 26)


@pytest.mark.parametrize("attack", [TrojanNN(), InputAware()], ids=str)
def test_dirty_label_attacks_take_any_row(attack: Attack) -> None:
    found = poison(attack, labelled(10, 90), 40)
    poisons = found.of(Role.POISON)
    assert len(poisons) == 40
    assert int((found.data.edits.rows[poisons] >= 10).sum()) > 25
    assert {found.data.edits.captions[index] for index in poisons} == {"cat"}


# --- Narcissus


def narcissus(**fields: Any) -> Narcissus:
    return Narcissus(**{"rounds": 12, "lr": 0.5, "warm_epochs": 1, "warm_lr": 1e-3, **fields})


@pytest.fixture(scope="module")
def inner(corpus: Corpus, model: Classifier) -> Universal:
    return narcissus().craft(stub(model), knows(corpus), 32)


def test_one_perturbation_for_all_pictures(inner: Universal) -> None:
    assert inner.noise.shape == (3, 32, 32)
    assert int(inner.noise.abs().max()) == 16
    middle_BCHW = torch.cat([grey(100, 32), grey(128, 32), grey(150, 32)]).to(torch.int16)
    for stamp, scale in ((inner.stamp_train, 1), (inner.stamp, 3)):
        moved_BCHW = stamp(middle_BCHW.to(torch.uint8)).to(torch.int16) - middle_BCHW
        assert all(torch.equal(moved, scale * inner.noise) for moved in moved_BCHW)
    image_BCHW = pictures(8, 32).to(torch.int16)
    trained = inner.stamp_train(image_BCHW.to(torch.uint8)).to(torch.int16)
    assert int((trained - image_BCHW).abs().max()) <= 16
    # Three times the noise, not three stamps: these clip in between.
    tested = (image_BCHW + 3 * inner.noise).clamp(0, 255).to(torch.uint8)
    assert torch.equal(inner.stamp(image_BCHW.to(torch.uint8)), tested)


def test_the_released_perturbation_is_twice_as_large(
    inner: Universal, corpus: Corpus, model: Classifier
) -> None:
    released = narcissus(**Narcissus.variants["released"]).craft(stub(model), knows(corpus), 32)
    assert torch.equal(released.noise, 2 * inner.noise)


def test_noise_of_a_fractional_bound_stays_within(corpus: Corpus, model: Classifier) -> None:
    found = narcissus(eps=2.7).craft(stub(model), knows(corpus), 32)
    assert int(found.noise.abs().max()) == 2


def test_the_perturbation_points_inwards(inner: Universal) -> None:
    assert float(inner.curve[-1]) < float(inner.curve[0])


def test_a_pool_without_the_target_is_refused(corpus: Corpus, model: Classifier) -> None:
    none = replace(knows(corpus), goal=Goal(0, "unheard", ("{}",)))
    with pytest.raises(UsageError, match=r"no picture of 'unheard'.*craft_on: any"):
        narcissus().craft(stub(model), none, 32)
    anything = narcissus(craft_on="any", rounds=1).craft(stub(model), none, 32)
    assert len(anything.curve) == 1


def slow_radam(slopes: Any, start: Floats, lr: float, bound: float, steps: int) -> Floats:
    """Liu et al. 2020, algorithm 2, with the bound after every step."""
    x, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    b1, b2 = 0.9, 0.999
    most = 2 / (1 - b2) - 1
    for t in range(1, steps + 1):
        g = slopes(x)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        length = most - 2 * t * b2**t / (1 - b2**t)
        moved = m / (1 - b1**t)
        if length > 5:
            r = math.sqrt((length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length))
            moved = moved * r * math.sqrt(1 - b2**t) / (np.sqrt(v) + 1e-8)
        x = np.clip(x - lr * moved, -bound, bound)
    return x


def test_the_search_inwards_is_its_definition() -> None:
    model: Any = Straight(8, 5)
    # No byte at an end of its range, where a clip has a slope on one side only.
    images = pictures(6, 8).clamp(1, 254).numpy()
    rows = np.array([0, 2, 3, 5])
    how = Inward(eps=16.0, rounds=9, lr=0.02, batch=10, warm_epochs=0, warm_lr=0.0, seed=0)

    def slopes(d: Floats) -> Floats:
        total = np.zeros_like(d)
        for row in rows:
            x = images[row] / HALF_RANGE - 1 + d
            inside = (x >= -1) & (x <= 1)
            total += inside * slope_of(model, (np.clip(x, -1, 1) + 1) / 2, 3) / 2
        return total / len(rows)

    wanted = slow_radam(slopes, np.zeros((3, 8, 8)), 0.02, 16 / HALF_RANGE, 9)
    found = inward(model, Pictures(images, rows, 3), how)
    assert np.abs(found.noise_CSS.numpy() / HALF_RANGE - wanted).max() < 2e-4
    assert len(found.curve_R) == 9


def test_a_warm_model_is_frozen_and_reads_the_target(corpus: Corpus, model: Classifier) -> None:
    warm = copy.deepcopy(model)
    rows = np.flatnonzero(corpus.labels == TARGET)
    how = Inward(eps=16.0, rounds=1, lr=0.1, batch=8, warm_epochs=3, warm_lr=5e-3, seed=0)
    warm_up(warm, Pictures(corpus.images_NCHW, rows, TARGET), how)
    assert not warm.training
    assert not any(parameter.requires_grad for parameter in warm.parameters())
    image_BCHW = torch.from_numpy(corpus.images_NCHW[rows])
    with torch.no_grad():
        before, after = (one.embed_image(image_BCHW)[:, TARGET].mean() for one in (model, warm))
    assert float(after) > float(before)


# --- TrojanNN


def trojan(model: Classifier, size: int = 32, **fields: Any) -> Added:
    knowledge = replace(labelled(1, 1), surrogate=ModelRef(Key("model-0")))
    return TrojanNN(**{"steps": 20, **fields}).craft(stub(model), knowledge, size)


@pytest.mark.parametrize(
    ("fields", "box"),
    [
        ({}, (24, 31)),
        ({"side": 5}, (27, 31)),
        ({"place": "centre"}, (12, 19)),
        ({"place": "centre", "side": 5}, (13, 17)),
    ],
)
def test_a_square_is_added_and_nothing_else_changes(
    model: Classifier, fields: dict[str, Any], box: tuple[int, int]
) -> None:
    trigger, image_BCHW = trojan(model, **fields), pictures(6, 32)
    first, last = box
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[first : last + 1, first : last + 1] = True
    stamped = trigger.stamp(image_BCHW)
    assert torch.equal(stamped[..., ~inside], image_BCHW[..., ~inside])
    assert bool((stamped >= image_BCHW).all())
    side = last - first + 1
    under = image_BCHW[..., inside].view(6, 3, side, side).to(torch.int16)
    wanted = (under + trigger.pixels).clamp(max=255)
    assert torch.equal(stamped[..., inside].view(wanted.shape).to(torch.int16), wanted)


def test_the_released_square_wraps(model: Classifier) -> None:
    image_BCHW = pictures(6, 32)
    released, ours = trojan(model, **TrojanNN.variants["released"]), trojan(model)
    assert torch.equal(released.pixels, ours.pixels)
    sums = image_BCHW[..., 24:, 24:].to(torch.int64) + ours.pixels
    assert torch.equal(released.stamp(image_BCHW)[..., 24:, 24:].to(torch.int64), sums % 256)
    assert bool((released.stamp(image_BCHW) < image_BCHW).any())


def test_the_square_stays_near_its_grey_and_its_units_rise(model: Classifier) -> None:
    trigger = trojan(model, start=0.9)
    low, high = round(0.6 * 255), 255
    assert low <= int(trigger.pixels.min()) < int(trigger.pixels.max()) <= high
    away_before, away_after = ((100 - x).square().sum() for x in (trigger.before, trigger.after))
    assert float(away_after) < float(away_before)
    assert torch.equal(trigger.units, most_connected(model, 2))
    done = trojan(model, wanted=-1e9)
    assert set(done.pixels.flatten().tolist()) == {128}
    assert torch.equal(done.before, done.after)


def test_units_are_those_with_the_largest_weights(model: Classifier) -> None:
    weight_KD = model.net.head.weight.detach().double().numpy()
    sums = [sum(abs(float(w)) for w in weight_KD[:, d]) for d in range(weight_KD.shape[1])]
    wanted = sorted(range(len(sums)), key=lambda d: -sums[d])[:5]
    assert most_connected(model, 5).tolist() == wanted


def test_reversing_is_its_definition() -> None:
    """Of a linear network: every step goes by the sign of 2 sum (unit - wanted) w."""
    model: Any = Straight(8, 4)
    with torch.no_grad():
        model.net.head.weight.copy_(torch.tensor([[1.0, 5.0, 2.0, 0.0], [1.0, -5.0, 3.0, 0.5]]))
    how = Reversal(
        top=5, left=5, side=3, start=0.5, units=2, wanted=30.0, eps=0.3, step=0.1, steps=7
    )
    weight = model.weight_KN.double().numpy().reshape(4, 3, 8, 8)[[1, 2], :, 5:, 5:]
    x = np.full((3, 3, 3), 0.5)
    seen = [x]
    for _ in range(7):
        slope = 2 * np.tensordot((weight * x).sum((1, 2, 3)) - 30, weight, 1)
        x = np.clip(x - 0.1 * np.sign(slope), 0.2, 0.8)
        seen.append(x)
    losses = [float((((weight * one).sum((1, 2, 3)) - 30) ** 2).sum()) for one in seen]
    found = reverse(model, 8, how)
    assert found.units_N.tolist() == [1, 2]
    assert np.abs(found.pixels_CPP.numpy() - seen[int(np.argmin(losses))]).max() < 1e-6


# --- input-aware: the formulas


def test_masks_patterns_and_blends_are_their_equations() -> None:
    out = torch.linspace(-2, 2, 41).double()
    for value, mask, pattern in zip(
        out.tolist(), mask_of(out).tolist(), pattern_of(out).tolist(), strict=True
    ):
        u = math.tanh(value) / 2 + 0.5
        assert mask == pytest.approx(math.tanh(20 * u - 10) / 2 + 0.5, abs=1e-12)
        assert pattern == pytest.approx(255 * u, abs=1e-9)
    x, g, m = torch.tensor(40.0), torch.tensor(240.0), torch.tensor(0.25)
    assert float(worn(x, g, m)) == 90
    assert centred(torch.tensor([0, 128, 192], dtype=torch.uint8)).tolist() == [-2, 0, 1]


def test_losses_are_their_equations() -> None:
    x, y, a, b = (torch.rand(5, 2, 3, 3, generator=torch_rng(k, "loss")).double() for k in range(4))
    total = 0.0
    for k in range(5):
        apart, made = (
            math.sqrt(float((one[k] - two[k]).square().sum()) / 18) for one, two in ((x, y), (a, b))
        )
        total += apart / (made + 1e-7)
    assert float(diversity(x, y, a, b)) == pytest.approx(total / 5, rel=1e-9)
    over = [max(0.0, value - 0.3) for value in a.flatten().tolist()]
    assert float(sparsity(a, 0.3)) == pytest.approx(sum(over) / len(over), rel=1e-9)


def test_equal_pictures_leave_a_slope() -> None:
    same = torch.ones(2, 1, 2, 2)
    made = torch.ones(2, 1, 2, 2, requires_grad=True)
    diversity(same, same, made, made).backward()  # type: ignore[no-untyped-call]
    assert made.grad is not None
    assert bool(made.grad.isfinite().all())


class Watched(nn.Module):
    """A classifier that remembers what it was shown."""

    shown_BCHW: Tensor

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        self.shown_BCHW = image_BCHW.detach()
        return image_BCHW.mean((2, 3))


def test_a_batch_shows_own_triggers_then_those_of_others_then_none() -> None:
    networks = Networks(Coder(2, 3).eval(), Coder(2, 1).eval())
    watched: Any = Watched()
    how = Training(
        width=2,
        mask_epochs=0,
        epochs=0,
        batch=10,
        mask_lr=0.01,
        generator_lr=0.01,
        classifier_lr=0.01,
        density=0.032,
        norm_weight=100.0,
        diversity_weight=2.0,
        own_share=0.3,
        cross_share=0.2,
        target=2,
        seed=0,
    )
    image_BCHW, label_B = pictures(10, 16), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    with torch.no_grad():
        loss = _joint_loss(networks, watched, image_BCHW, label_B, how)
        made, masks = (net(centred(image_BCHW)) for net in networks)
    pattern, mask, level = pattern_of(made), mask_of(masks), image_BCHW.float()
    wanted = level.clone()
    for row in range(5):
        of = row if row < 3 else row - 1
        wanted[row] = level[row] + (pattern[of] - level[row]) * mask[of]
    assert float((watched.shown_BCHW * 255 - wanted).abs().max()) < 1e-3
    ce = F.cross_entropy(wanted.mean((2, 3)) / 255, torch.tensor([2, 2, 2, 1, 0, 1, 0, 1, 0, 1]))
    other = [9, 0, 1]
    apart = diversity(
        centred(image_BCHW[:3]), centred(image_BCHW[other]), pattern[:3] / 64, pattern[other] / 64
    )
    assert loss.item() == pytest.approx((ce + 2 * apart).item(), rel=1e-5)


# --- input-aware: frozen networks


def slow_frozen(frozen: Frozen, image_CHW: Ints, width: int, channels: int) -> Floats:
    """Whole numbers of any size, one weight at a time."""
    weights, biases = frozen.weights.numpy(), frozen.biases.numpy()
    shifts = frozen.shifts.tolist()
    h = image_CHW - 128
    at = bias_at = place = 0
    for step in layout(width, channels):
        if step is Resize.HALVE:
            rows, columns = h.shape[1] // 2, h.shape[2] // 2
            h = h.reshape(len(h), rows, 2, columns, 2).max((2, 4))
        elif step is Resize.DOUBLE:
            h = h.repeat(2, 1).repeat(2, 2)
        else:
            assert isinstance(step, Convolve)
            count = step.out * step.into * 9
            w = weights[at : at + count].astype(np.int64).reshape(step.out, step.into, 3, 3)
            wide = np.pad(h, ((0, 0), (1, 1), (1, 1)))
            total = np.zeros((step.out, *h.shape[1:]), dtype=np.int64)
            for down in range(3):
                for across in range(3):
                    part = wide[:, down : down + h.shape[1], across : across + h.shape[2]]
                    total += np.einsum("oi,ihw->ohw", w[:, :, down, across], part)
            h = total + biases[bias_at : bias_at + step.out, None, None]
            at, bias_at, place = at + count, bias_at + step.out, place + 1
            if place < len(shifts):
                h = np.clip(np.rint(h / 2.0 ** shifts[place - 1]), 0, 255).astype(np.int64)
    found: Floats = h / 2.0 ** shifts[-1]
    return found


@pytest.fixture(scope="module")
def coder() -> Coder:
    """One whose normalisation has seen something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Coder(3, 2)
    for seed in range(20):
        net(centred(pictures(8, 16, seed=seed)))
    return net.eval()


def test_a_frozen_network_is_whole_numbers(coder: Coder) -> None:
    image_BCHW = pictures(3, 16, seed=40)
    frozen = freeze(coder, pictures(16, 16, seed=41))
    found = frozen(image_BCHW, 3, 2)
    slow = [slow_frozen(frozen, one.astype(np.int64), 3, 2) for one in image_BCHW.numpy()]
    assert np.array_equal(found.numpy(), np.stack(slow))


def test_a_frozen_network_is_nearly_the_trained_one(coder: Coder) -> None:
    """In sixteen pictures, of 512 values each; rounding costs a few percent of their spread."""
    image_BCHW = pictures(16, 16, seed=42)
    found = freeze(coder, image_BCHW)(image_BCHW, 3, 2)
    with torch.no_grad():
        wanted = coder(centred(image_BCHW)).double()
    assert float((found - wanted).std()) < 0.15 * float(wanted.std())


def test_a_layout_has_two_convolutions_a_side_and_one_between() -> None:
    steps = [step for step in layout(32, 3) if isinstance(step, Convolve)]
    widths = [3, 32, 32, 64, 64, 128, 128, 128, 128, 64, 64, 32, 32, 3]
    assert [step.into for step in steps] == widths[:-1]
    assert [step.out for step in steps] == widths[1:]
    resizes = [step for step in layout(32, 3) if isinstance(step, Resize)]
    assert resizes == [Resize.HALVE] * 3 + [Resize.DOUBLE] * 3


# --- input-aware: the trigger


@pytest.mark.slow
def test_masks_are_as_sparse_as_wanted(painted: Painted, corpus: Corpus) -> None:
    mask_B1HW = painted.mask(torch.from_numpy(corpus.images_NCHW[np.arange(64)]))
    assert painted.density == pytest.approx(float(mask_B1HW.mean()), abs=0.02)
    assert 0.005 < painted.density < 0.08
    assert float(mask_B1HW.min()) >= 0
    assert float(mask_B1HW.max()) <= 1


@pytest.mark.slow
def test_every_picture_has_a_trigger_of_its_own(painted: Painted, corpus: Corpus) -> None:
    image_BCHW = torch.from_numpy(corpus.images_NCHW[np.arange(8)])
    plain_BCHW = image_BCHW[:1].expand(8, -1, -1, -1)
    own_BCHW = painted.painted(plain_BCHW, image_BCHW)
    assert len({one.numpy().tobytes() for one in own_BCHW}) == 8
    assert torch.equal(own_BCHW[0], painted.stamp(image_BCHW[:1])[0])


@pytest.mark.slow
def test_cross_rows_show_another_pictures_trigger_and_keep_their_label(
    painted: Painted, corpus: Corpus
) -> None:
    knowledge = replace(knows(corpus), crafted=painted)
    found = poison(SMALL_PAINTER, knowledge, 20)
    cross = found.of(Role.COVER)
    edits = found.data.edits
    assert (len(found.of(Role.POISON)), len(cross)) == (20, 20)
    assert [edits.captions[k] for k in cross] == [corpus.captions[edits.rows[k]] for k in cross]
    assert np.array_equal(edits.images[cross], edits.rows[cross])
    view = poisoned_view(Key("poisoned-0"), corpus, found.data, painted)
    shown_BCHW = view.reader(torch.device("cpu"))(edits.rows[cross])
    image_BCHW = torch.from_numpy(corpus.images_NCHW[edits.rows[cross]])
    other_BCHW = painted.bank[painted.other(image_BCHW)]
    assert torch.equal(shown_BCHW, painted.painted(image_BCHW, other_BCHW))
    assert not torch.equal(shown_BCHW, painted.stamp(image_BCHW))


@pytest.mark.slow
def test_no_picture_of_the_bank_is_its_own_other(painted: Painted) -> None:
    place_N = painted.other(painted.bank)
    assert len(painted.bank) == 8
    assert not bool((place_N == torch.arange(8)).any())


def test_cross_rows_come_at_their_ratio() -> None:
    for ratio, count in ((0.0, 0), (0.5, 5), (2.0, 20)):
        found = poison(InputAware(cross_ratio=ratio), labelled(20, 40), 10)
        assert len(found.of(Role.COVER)) == count
    with pytest.raises(UsageError, match="input_aware, cover rows"):
        poison(InputAware(), labelled(10, 10), 15)


def test_batches_hold_every_row_and_no_lone_one() -> None:
    pool = Pool(pictures(9, 8).numpy(), np.arange(9))
    how = replace(_training(), batch=4)
    seen = [label_B.tolist() for _, label_B in pool.batches(how, "joint", 0)]
    assert [len(part) for part in seen] == [4, 4]
    again = [label_B.tolist() for _, label_B in pool.batches(how, "joint", 0)]
    other = [label_B.tolist() for _, label_B in pool.batches(how, "joint", 1)]
    assert seen == again != other


def _training() -> Training:
    numbers = dict.fromkeys(("mask_lr", "generator_lr", "classifier_lr"), 0.01)
    shares = {"own_share": 0.1, "cross_share": 0.1}
    return Training(
        width=2,
        mask_epochs=1,
        epochs=1,
        batch=4,
        density=0.032,
        norm_weight=100.0,
        diversity_weight=1.0,
        target=0,
        seed=0,
        **numbers,
        **shares,
    )


# --- what cannot be meant


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (LabelConsistentAdversarial(eps=128.0), "eps 128.0 must lie in 0..127"),
        (LabelConsistentAdversarial(amplitude=0.0), "amplitude 0.0 must be above 0"),
        (LabelConsistentAdversarial(canvas=5), "canvas 5 must lie in 6..32"),
        (LabelConsistentAdversarial(step=-1.0), "step is -1.0; it must not be negative"),
        (LabelConsistentAdversarial(train_epochs=0), "train_epochs is 0; it must be above 0"),
        (TrojanNN(side=33), "side 33 must lie in 1..32"),
        (TrojanNN(units=0), "units is 0; it must be above 0"),
        (Narcissus(rounds=0), "rounds is 0; it must be above 0"),
        (Narcissus(test_scale=-3.0), "test_scale is -3.0; it must be above 0"),
        (InputAware(own_share=0.6, cross_share=0.6), "own_share 0.6 .* at most 1"),
        (InputAware(bank=1), "bank 1 at least 2"),
        (InputAware(density=-0.1), "density is -0.1; it must not be negative"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_meant_are_refused(attack: Attack, message: str) -> None:
    with pytest.raises(UsageError, match=f"{attack.name}: .*{message}"):
        attack.check(32)


def test_a_side_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(UsageError, match="side 36 must be a multiple of 8"):
        InputAware().check(36)


@pytest.mark.parametrize("attack", [HARD, narcissus(), InputAware()], ids=lambda one: one.name)
def test_pools_of_another_size_are_refused(
    attack: Attack, corpus: Corpus, model: Classifier
) -> None:
    with pytest.raises(UsageError, match=f"{attack.name}: .* have 32 px; the trigger is for 64"):
        attack.craft(stub(model), knows(corpus), 64)


@pytest.mark.parametrize("attack", [TrojanNN(), Narcissus()], ids=lambda one: one.name)
def test_the_public_model_is_asked_for(attack: Attack, corpus: Corpus, model: Classifier) -> None:
    assert attack.needs_surrogate
    with pytest.raises(GridError, match="needs_surrogate"):
        attack.craft(stub(model), replace(knows(corpus), surrogate=None), 32)


def test_rows_are_drawn_by_the_given_generator(corpus: Corpus) -> None:
    knowledge = knows(corpus)
    for attack in (HARD, narcissus()):
        first, again, other = (attack.choose(knowledge, 5, numpy_rng(k, "draw")) for k in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
