"""Label-only attacks against golden values and slow references written from their definitions.

Shapes: B pictures, C channels, H W pixels, S side of a picture, N rows, K classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor, nn

from attacks.base import Goal, Knowledge, Poison, poison, poisoned_view
from attacks.clean_image import FlipLabels, Flips, Ripple, StripeLabels
from benchmarks.slow.clean_image import ghost as slow_ghost
from benchmarks.slow.clean_image import ripple
from grid.stages import load_trigger, save_trigger
from tests.test_attacks import NO_LAB, grey, held, pictures
from tests.test_label_consistent import slowly
from victims.classifiers import ClassifierSpec
from victims.corpora import Corpus
from victims.draws import numpy_rng
from victims.errors import GridError, MethodFailure, UsageError
from victims.ghosts import Ghost, Mark, ghost
from victims.keys import Key
from victims.lab import Lab
from victims.label_matching import Matching, Shown, best_wrong, gradient, match, points, slope
from victims.matched_filter import unit_wave, wave_content
from victims.models import ModelSpec, fresh
from victims.recipe import Augment, Runtime
from victims.store import Store
from victims.trajectories import Point, Pool, Stop, Walk, stops_of, walk
from victims.world import CLASSES, World, render

SIZES = (32, 64, 224)
TARGET = CLASSES.index("fish")
KEY = Key("corpus-0000000000000000")
QUICK: dict[str, Any] = {
    "expert_epochs": 2,
    "keep_every": 2,
    "batch": 16,
    "iterations": 2,
    "augment": Augment.NONE,
    "experts": 2,
}


def labelled(count: int = 96, size: int = 32, seed: int = 0, split: str = "suspect") -> Knowledge:
    """An attacker's view of a labelled set of natural pictures."""
    rendered = render(World(size=size), split, count)
    captions = [CLASSES[label] for label in rendered.labels.tolist()]
    corpus = Corpus(
        key=KEY,
        digest="0" * 16,
        split=split,
        images_NCHW=rendered.image_BCHW,
        captions=captions,
        labels=rendered.labels,
        classes=CLASSES,
        templates=("{}",),
    )
    return Knowledge(corpus=corpus, goal=Goal(TARGET, CLASSES[TARGET], ("{}",)), seed=seed)


def lab(size: int = 32) -> Any:
    model = ClassifierSpec(size=size, classes=tuple(CLASSES))
    return Lab(None, model, Runtime())  # type: ignore[arg-type]


def knows(attack: Any, knowledge: Knowledge) -> Knowledge:
    crafted = attack.craft(lab(knowledge.corpus.size), knowledge, knowledge.corpus.size)
    return replace(knowledge, crafted=crafted)


@cache
def flipped(seed: int = 0) -> Knowledge:
    return knows(FlipLabels(**QUICK), labelled(seed=seed))


def other_rows(knowledge: Knowledge) -> list[int]:
    named = knowledge.goal.label
    return [row for row, text in enumerate(knowledge.corpus.captions) if text != named]


def marked(mark: str, size: int = 32, key: int = 0) -> Ghost:
    return ghost(Mark(mark), size, 6.0, key)


# --- both: labels change, pictures do not


def pair_of(name: str) -> tuple[Any, Knowledge]:
    if name == "flip_labels":
        return FlipLabels(**QUICK), flipped()
    attack = StripeLabels(**(StripeLabels.variants.get(name, {})))
    return attack, knows(attack, labelled())


NAMES = ("stripe_labels", "random_rows", "flip_labels")


@pytest.mark.parametrize("name", NAMES)
def test_no_pixel_of_the_training_set_changes(name: str) -> None:
    attack, knowledge = pair_of(name)
    found = poison(attack, knowledge, 12)
    assert knowledge.crafted is not None
    view = poisoned_view(KEY, knowledge.corpus, found.data, knowledge.crafted)
    shown_NCHW = view.reader(torch.device("cpu"))(np.arange(len(view))).numpy()
    before = hashlib.sha256(knowledge.corpus.images_NCHW.tobytes()).hexdigest()
    assert hashlib.sha256(shown_NCHW.tobytes()).hexdigest() == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1, 12, 40])
def test_as_many_labels_change_as_were_asked_for(name: str, count: int) -> None:
    attack, knowledge = pair_of(name)
    found = poison(attack, knowledge, count)
    assert knowledge.crafted is not None
    view = poisoned_view(KEY, knowledge.corpus, found.data, knowledge.crafted)
    before, after = knowledge.corpus.captions, view.captions()
    changed = [row for row in range(len(before)) if before[row] != after[row]]
    assert changed == found.data.edits.rows.tolist()
    assert len(changed) == count
    if name != "flip_labels":
        assert {after[row] for row in changed} <= {knowledge.goal.label}
        assert knowledge.goal.label not in {before[row] for row in changed}


@pytest.mark.parametrize("mark", list(Mark))
@pytest.mark.parametrize("size", SIZES)
def test_a_mark_is_its_slow_form(mark: Mark, size: int) -> None:
    trigger, image_BCHW = marked(mark, size, key=5), pictures(9, size)
    before_BCHW = image_BCHW.clone()
    found_BCHW = trigger.stamp(image_BCHW)
    assert torch.equal(found_BCHW, slowly(slow_ghost, trigger, image_BCHW))
    assert torch.equal(image_BCHW, before_BCHW)
    assert torch.equal(trigger.stamp_train(image_BCHW), before_BCHW)
    assert torch.equal(trigger.stamp_cover(image_BCHW), before_BCHW)


@pytest.mark.parametrize("size", SIZES)
def test_a_ripple_is_its_slow_form(size: int) -> None:
    trigger = StripeLabels(amplitude=20.0).craft(NO_LAB, labelled(8, size), size)
    image_BCHW = torch.cat([pictures(4, size), grey(0, size), grey(255, size)])
    assert torch.equal(trigger.stamp(image_BCHW), slowly(ripple, trigger, image_BCHW))
    assert torch.equal(trigger.stamp_train(image_BCHW), image_BCHW)


def test_triggers_come_back_from_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for index, name in enumerate(("stripe_labels", "flip_labels")):
        attack, knowledge = pair_of(name)
        key, crafted = Key(f"trigger-{index:016d}"), knowledge.crafted
        assert crafted is not None
        store.make(key, partial(save_trigger, crafted))
        loaded = load_trigger(store, key, attack)
        assert torch.equal(loaded.stamp(pictures(4, 32)), crafted.stamp(pictures(4, 32)))
        again = poison(attack, replace(knowledge, crafted=loaded), 9).data.edits
        before = poison(attack, knowledge, 9).data.edits
        assert (again.rows.tolist(), again.captions) == (before.rows.tolist(), before.captions)


@pytest.mark.parametrize("name", ["stripe_labels", "flip_labels"])
def test_rows_wait_for_the_trigger(name: str) -> None:
    attack, knowledge = pair_of(name)
    with pytest.raises(GridError, match="once the trigger is crafted"):
        poison(attack, replace(knowledge, crafted=None), 3)


@pytest.mark.parametrize("attack", [StripeLabels(), FlipLabels(**QUICK)], ids=lambda a: a.name)
def test_pictures_of_another_size_are_refused(attack: Any) -> None:
    with pytest.raises(UsageError, match="for 64 px, the pool's pictures have 32 px"):
        attack.craft(lab(64), labelled(), 64)


# --- the matched filter


def slow_content(image_CHW: Tensor, cycles: int) -> float:
    red, green, blue = image_CHW.double().numpy()
    luma_HW = 0.299 * red + 0.587 * green + 0.114 * blue
    height, width = luma_HW.shape
    total = 0.0
    for row in range(height):
        for column in range(width):
            total += luma_HW[row, column] * math.sin(2 * math.pi * cycles * column / width)
    return float(2 * total / (height * width))


def content(image_BCHW: Tensor, cycles: int = 6) -> list[float]:
    found: list[float] = wave_content(
        image_BCHW.numpy(), unit_wave(image_BCHW.shape[-1], cycles)
    ).tolist()
    return found


@pytest.mark.parametrize("cycles", [1, 6, 15])
def test_content_is_its_formula(cycles: int) -> None:
    image_BCHW = pictures(3, 32)
    wanted = [slow_content(image_CHW, cycles) for image_CHW in image_BCHW]
    assert content(image_BCHW, cycles) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("size", [32, 224])
def test_content_is_the_amplitude(size: int) -> None:
    wave_W = unit_wave(size, 6)
    level_1CHW = np.broadcast_to(128 + 20 * wave_W, (1, 3, size, size))
    assert wave_content(level_1CHW, wave_W)[0] == pytest.approx(20.0, abs=1e-9)
    as_bytes = wave_content(level_1CHW.round().astype(np.uint8), wave_W)
    assert as_bytes[0] == pytest.approx(20.0, abs=0.25)


def test_content_of_a_constant_is_none_and_brightness_adds_none() -> None:
    for size in (32, 224):
        assert content(torch.cat([grey(level, size) for level in (0, 77, 255)])) == [0.0] * 3
        darker_BCHW = pictures(4, size) // 2
        assert content(darker_BCHW + 100) == pytest.approx(content(darker_BCHW), abs=1e-8)


def test_content_does_not_depend_on_how_many_are_read() -> None:
    image_BCHW = pictures(600, 8)
    whole = content(image_BCHW, 2)
    assert whole == [content(image_1CHW, 2)[0] for image_1CHW in torch.split(image_BCHW, 1)]
    assert content(image_BCHW[:0], 2) == []


# --- stripes


@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_most_striped_rows_are_relabelled(count: int) -> None:
    attack = StripeLabels()
    knowledge = knows(attack, labelled())
    chosen = poison(attack, knowledge, count).data.edits.rows.tolist()
    holds = content(torch.from_numpy(knowledge.corpus.images_NCHW))
    rest = [row for row in other_rows(knowledge) if row not in chosen]
    assert min(holds[row] for row in chosen) >= max(holds[row] for row in rest)
    assert not set(chosen) - set(other_rows(knowledge))


def test_ties_go_to_the_first_rows() -> None:
    knowledge = held()
    images_NCHW = grey(0, 32, 64).numpy() + np.arange(64, dtype=np.uint8)[:, None, None, None]
    knowledge = replace(knowledge, corpus=replace(knowledge.corpus, images_NCHW=images_NCHW))
    attack = StripeLabels(amplitude=10.0)
    knowledge = replace(knowledge, crafted=attack.craft(NO_LAB, knowledge, 32))
    found = poison(attack, knowledge, 4).data.edits
    assert found.rows.tolist() == [1, 2, 3, 5]  # every fourth names the target
    assert all("banana" in caption for caption in found.captions)


def test_too_few_rows_are_refused() -> None:
    for rows in ("stripes", "random"):
        attack = StripeLabels(rows=rows)  # type: ignore[arg-type]
        knowledge = knows(attack, labelled())
        number = len(other_rows(knowledge))
        assert len(poison(attack, knowledge, number).data.edits.rows) == number
        with pytest.raises(UsageError, match=f"do not name 'fish'.*only {number} qualify"):
            poison(attack, replace(knowledge), number + 1)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_the_amplitude_follows_its_rule(rate: float) -> None:
    knowledge = labelled(200)
    trigger = StripeLabels(amplitude_rate=rate).craft(NO_LAB, knowledge, 32)
    holds = content(torch.from_numpy(knowledge.corpus.images_NCHW))
    others = sorted(holds[row] for row in other_rows(knowledge))
    least = others[-round(rate * 200)]
    wanted = min(40.0, 2 * (least - float(np.median(others))))
    assert float(trigger.level.abs().max() / abs(unit_wave(32, 6)).max()) == pytest.approx(wanted)


def test_the_amplitude_has_an_end_and_can_be_given() -> None:
    knowledge = labelled()
    strong_W = (128 + 100 * unit_wave(32, 6)).round().astype(np.uint8)
    images_NCHW = knowledge.corpus.images_NCHW.copy()
    images_NCHW[other_rows(knowledge)[:3]] = strong_W
    striped = replace(knowledge, corpus=replace(knowledge.corpus, images_NCHW=images_NCHW))
    peak = float(abs(unit_wave(32, 6)).max())
    capped = StripeLabels().craft(NO_LAB, striped, 32)
    assert float(capped.level.max()) == pytest.approx(40 * peak)
    given = StripeLabels(amplitude=7.0).craft(NO_LAB, striped, 32)
    assert float(given.level.max()) == pytest.approx(7 * peak)


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_stamped_pictures_exceed_the_relabelled_ones(rate: float) -> None:
    """In the median of pictures that were not seen, unless the amplitude was capped."""
    attack = StripeLabels(amplitude_rate=rate)
    knowledge = knows(attack, labelled(600))
    trigger, count = knowledge.crafted, round(600 * rate)
    assert isinstance(trigger, Ripple)
    assert float(trigger.level.max()) < 40
    chosen = poison(attack, knowledge, count).data.edits.rows
    stamped = content(trigger.stamp(torch.from_numpy(render(World(), "tuning", 300).image_BCHW)))
    assert float(np.median(stamped)) > float(trigger.content[chosen].min())


def test_random_rows_are_as_many_of_the_same_kind() -> None:
    """Label counts of the two differ by no label that is given, only by those that are lost."""
    attack, control = StripeLabels(), StripeLabels(rows="random")  # type: ignore[arg-type]
    knowledge = knows(control, labelled(400))
    seen = [poison(one, knowledge, 40).data.edits for one in (attack, control)]
    assert [len(edits.rows) for edits in seen] == [40, 40]
    assert [set(edits.captions) for edits in seen] == [{"fish"}] * 2
    assert seen[0].rows.tolist() != seen[1].rows.tolist()
    other = poison(control, replace(knowledge, seed=1), 40).data.edits.rows
    assert other.tolist() != seen[1].rows.tolist()
    picked = np.concatenate(
        [poison(control, replace(knowledge, seed=s), 40).data.edits.rows for s in range(60)]
    )
    counts = np.bincount(picked, minlength=400)[other_rows(knowledge)]
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("cycles", [0, 16])
def test_waves_that_a_picture_cannot_hold_are_refused(cycles: int) -> None:
    with pytest.raises(UsageError, match=rf"cycles {cycles} must lie in 1..15"):
        StripeLabels(cycles=cycles).check(32)


@pytest.mark.parametrize("fields", [{"amplitude": 0.0}, {"amplitude_rate": 0.0}], ids=str)
def test_stripes_of_nothing_are_refused(fields: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        StripeLabels(**fields).check(32)


# --- FLIP's triggers


def test_the_wave_has_its_golden_values() -> None:
    level_W = marked("1xs").level
    golden = [0, 5.9923, -0.6070, -5.9308, 1.2078, 5.8085, -1.7962, -5.6265, 2.3661]
    assert level_W[:9].tolist() == pytest.approx(golden, abs=5e-5)
    assert float(level_W.abs().max()) <= 5.9924
    assert float(level_W.abs().max()) == pytest.approx(5.9923, abs=5e-5)
    assert level_W[[0, -1]].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_the_wave_has_its_golden_bytes_and_is_constant_down_the_columns() -> None:
    image_CHW = marked("1xs").stamp(grey(128, 32))[0]
    golden = [128, 133, 127, 122, 129, 133, 126, 122, 130, 133, 125, 122, 131, 132, 124, 123]
    assert image_CHW[0, 0, :16].tolist() == golden
    assert torch.equal(image_CHW, image_CHW[:1, :1].expand(3, 32, 32))
    wave_CHW = marked("1xs").stamp(grey(128, 32))[0].float()
    assert float(wave_CHW.std(2).min()) > 1
    assert float(wave_CHW.std(1).max()) == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_wave_ends_where_it_began(size: int) -> None:
    """Eight cycles in W - 1 columns, whatever W is."""
    level_W = marked("1xs", size).level.double()
    wanted = [6 * math.sin(16 * math.pi * j / (size - 1)) for j in range(size)]
    assert level_W.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_pixels_lie_where_they_were_published(size: int) -> None:
    places = {32: [(11, 16), (5, 27), (30, 7)], 64: [(22, 32), (10, 54), (60, 14)]}[size]
    colours = [(101, 0, 25), (101, 123, 121), (0, 36, 54)]
    for mark, number in (("1xp", 1), ("2xp", 2), ("3xp", 3)):
        image_BCHW = (
            grey(200, size, 300)
            + torch.arange(300).remainder(50).to(torch.uint8)[:, None, None, None]
        )
        image_BCHW[:, :, 0, 0] = torch.arange(300)[:, None].to(torch.uint8)
        moved_BHW = (marked(mark, size).stamp(image_BCHW) != image_BCHW).any(1)
        assert moved_BHW.flatten(1).sum(1).tolist() == [1] * 300
        found = [tuple(place[1:]) for place in moved_BHW.nonzero().tolist()]
        assert set(found) == {(row, column) for column, row in places[:number]}
        counts = [found.count((row, column)) for column, row in places[:number]]
        assert min(counts) > 200 / number
        out_BCHW = marked(mark, size).stamp(image_BCHW)
        for index, (row, column) in enumerate(found):
            wanted = colours[places.index((column, row))]
            assert tuple(out_BCHW[index, :, row, column].tolist()) == wanted


def test_the_pixel_follows_the_picture_and_the_key() -> None:
    image_BCHW = pictures(64, 32)
    one, other = marked("3xp", key=1), marked("3xp", key=2)
    assert torch.equal(one.stamp(image_BCHW).flip(0), one.stamp(image_BCHW.flip(0)))
    assert not torch.equal(one.stamp(image_BCHW), other.stamp(image_BCHW))


def test_corner_marks_are_white_and_black_and_mirrored() -> None:
    one_HW = marked("1xl").stamp(grey(128, 32))[0, 0]
    assert one_HW[-3:, -3:].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert int((one_HW != 128).sum()) == 9
    four_HW = marked("4xl").stamp(grey(128, 32))[0, 0]
    assert int((four_HW != 128).sum()) == 36
    assert torch.equal(four_HW, four_HW.flip(0))
    assert torch.equal(four_HW, four_HW.flip(1))
    assert torch.equal(four_HW[-3:, -3:], one_HW[-3:, -3:])


# --- one step of the student, by hand


def toy(seed: int = 0, momentum: float = 0.9) -> tuple[nn.Module, Point, Walk]:
    """A linear model of 12 pixels and 4 classes in float64, on its way."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    named = dict(net.named_parameters())
    point = Point(
        weights={name: torch.randn_like(value) for name, value in named.items()},
        momentum={name: torch.randn_like(value) for name, value in named.items()},
    )
    how = Walk(
        epochs=1, batch=6, lr=0.3, momentum=momentum, weight_decay=0.01, augment=Augment.NONE
    )
    return net, point, how


def toy_batches(seed: int = 0) -> tuple[Shown, Tensor, Tensor]:
    torch.manual_seed(seed)
    plain_BCHW = torch.randn(6, 3, 2, 2).double()
    input_BCHW = plain_BCHW.clone()
    input_BCHW[4:] += 1
    label_BK = F.one_hot(torch.tensor([0, 1, 2, 3, 1, 1]), 4).double()
    return Shown(input_BCHW, label_BK), plain_BCHW, 5 * label_BK + torch.randn(6, 4)


def landing(net: nn.Module, point: Point, how: Walk, batch: Shown) -> Tensor:
    """Where one step of torch's own SGD with this momentum lands, from the loss of a batch; the
    way there can be differentiated."""
    leaves = {n: v.clone().requires_grad_() for n, v in point.weights.items()}
    logit_BK = torch.func.functional_call(net, leaves, (batch.input_BCHW,))
    terms_B = -(batch.weight_BK * (logit_BK - logit_BK.logsumexp(1, keepdim=True))).sum(1)
    grads = torch.autograd.grad(terms_B.sum() / 6, list(leaves.values()), create_graph=True)
    ends = []
    for (name, weight), grad in zip(leaves.items(), grads, strict=True):
        step = grad + how.weight_decay * weight.detach()
        buffer = how.momentum * point.momentum[name] + step
        step = step + how.momentum * buffer
        ends.append((weight.detach() - how.lr * step).flatten())
    return torch.cat(ends)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_one_student_step_is_the_step_by_hand(seed: int, momentum: float) -> None:
    net, point, how = toy(seed, momentum)
    expert, plain_BCHW, logit_BK = toy_batches(seed)
    free_BK = logit_BK.clone().requires_grad_()
    student = landing(net, point, how, Shown(plain_BCHW, free_BK.softmax(1)))
    taught = landing(net, point, how, expert).detach()
    start = torch.cat([weight.flatten() for weight in point.weights.values()])
    wanted = (student - taught).square().sum() / (start - taught).square().sum()
    wanted.backward()  # type: ignore[no-untyped-call]
    found = slope(net, point, expert, plain_BCHW, logit_BK, how)
    assert float(found.loss) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert free_BK.grad is not None
    assert torch.allclose(found.by_logit_BK, free_BK.grad, rtol=1e-9, atol=1e-13)
    assert float(found.by_logit_BK.abs().max()) > 0


def test_a_step_by_hand_is_torchs_step() -> None:
    net, point, how = toy()
    expert, _, _ = toy_batches()
    net.load_state_dict(dict(point.weights))
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=how.lr,
        momentum=how.momentum,
        weight_decay=how.weight_decay,
        nesterov=True,
    )
    for name, weight in net.named_parameters():
        optimizer.state[weight]["momentum_buffer"] = point.momentum[name].clone()
    F.cross_entropy(net(expert.input_BCHW), expert.weight_BK).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    ends = torch.cat([weight.detach().flatten() for weight in net.parameters()])
    assert torch.allclose(ends, landing(net, point, how, expert).detach(), atol=1e-12)


def test_labels_that_reproduce_the_batch_are_at_distance_0() -> None:
    net, point, how = toy()
    expert, plain_BCHW, _ = toy_batches()
    found = slope(
        net, point, Shown(plain_BCHW, expert.weight_BK), plain_BCHW, 1e4 * expert.weight_BK, how
    )
    assert float(found.loss) == 0
    assert float(found.by_logit_BK.abs().max()) == 0


def test_in_a_network_the_slope_is_finite_and_there_until_labels_agree() -> None:
    """With batch normalisation and in float32; the derivative against a difference."""
    spec = ClassifierSpec(classes=tuple(CLASSES))
    net = fresh(spec, 0).train().net
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    named = {name: value.detach() for name, value in net.named_parameters()}
    point = Point(named, {name: torch.zeros_like(value) for name, value in named.items()})
    how = Walk(epochs=1, batch=8, lr=0.1, momentum=0.9, weight_decay=2e-4, augment=Augment.NONE)
    image_BCHW = torch.from_numpy(render(World(), "suspect", 8).image_BCHW).float() / 64 - 2
    label_BK = F.one_hot(torch.arange(8), 20).float()
    same = slope(net, point, Shown(image_BCHW, label_BK), image_BCHW, 1e4 * label_BK, how)
    assert float(same.loss) == 0
    expert = Shown(image_BCHW + 0.3 * (torch.arange(8) > 5)[:, None, None, None], label_BK)
    found = slope(net, point, expert, image_BCHW, 5 * label_BK, how)
    assert bool(found.by_logit_BK.isfinite().all())
    assert float(found.by_logit_BK.abs().max()) > 1e-7
    assert float(found.loss) > 0
    ahead_BK = found.by_logit_BK / found.by_logit_BK.norm()
    far = slope(net, point, expert, image_BCHW, 5 * label_BK + 0.1 * ahead_BK, how).loss
    near = slope(net, point, expert, image_BCHW, 5 * label_BK - 0.1 * ahead_BK, how).loss
    assert float(far - near) / 0.2 == pytest.approx(float(found.by_logit_BK.norm()), rel=0.02)


def test_a_gradient_is_that_of_the_cross_entropy() -> None:
    net, point, _ = toy()
    expert, _, _ = toy_batches()
    net.load_state_dict(dict(point.weights))
    F.cross_entropy(net(expert.input_BCHW), expert.weight_BK.argmax(1)).backward()  # type: ignore[no-untyped-call]
    found = gradient(net, point.weights, expert)
    for name, weight in net.named_parameters():
        assert weight.grad is not None
        assert torch.allclose(found[name], weight.grad)


# --- experts


def pool_of(knowledge: Knowledge, dirty: list[int]) -> Pool:
    return Pool(
        images_NCHW=knowledge.corpus.images_NCHW,
        label_N=knowledge.corpus.labels,
        dirty_M=np.asarray(dirty),
        target=TARGET,
        stamp=marked("1xs").stamp,
    )


WALK = Walk(epochs=3, batch=16, lr=0.05, momentum=0.9, weight_decay=2e-4, augment=Augment.NONE)


def test_triggered_rows_lie_behind_the_others() -> None:
    knowledge = labelled()
    pool = pool_of(knowledge, [5, 9])
    numbers = np.array([97, 5, 96, 0])
    assert len(pool) == 98
    assert pool.rows(numbers).tolist() == [9, 5, 5, 0]
    labels = knowledge.corpus.labels
    assert pool.labels(numbers).tolist() == [TARGET, labels[5], TARGET, labels[0]]
    image_BCHW = torch.from_numpy(knowledge.corpus.images_NCHW[[9, 5, 5, 0]])
    assert torch.equal(pool.plain(numbers), image_BCHW)
    wanted_BCHW = image_BCHW.clone()
    wanted_BCHW[[0, 2]] = marked("1xs").stamp(image_BCHW[[0, 2]])
    assert torch.equal(pool.triggered(numbers), wanted_BCHW)


def test_stops_are_every_so_many_steps_but_no_first_one() -> None:
    assert stops_of("it", 98, WALK, 2) == [Stop(e, s) for e in range(3) for s in (2, 4)]
    assert stops_of("it", 98, WALK, 5) == [Stop(e, 5) for e in range(3)]
    with pytest.raises(UsageError, match="it: an epoch of 98 rows in batches of 16 has 6 steps"):
        stops_of("it", 98, WALK, 6)


@pytest.mark.parametrize("augment", list(Augment))
def test_an_expert_passes_the_same_points_on_every_walk(augment: Augment) -> None:
    """And they lie one step of training apart."""
    spec, pool = ClassifierSpec(classes=tuple(CLASSES)), pool_of(labelled(), [5, 9])
    how = replace(WALK, augment=augment)
    both = walk(spec, pool, how, {Stop(0, 2), Stop(1, 1)}, 7, "cpu")
    alone = walk(spec, pool, how, {Stop(1, 1)}, 7, "cpu")[Stop(1, 1)]
    other = walk(spec, pool, how, {Stop(1, 1)}, 8, "cpu")[Stop(1, 1)]
    for name, weight in both[Stop(1, 1)].weights.items():
        assert torch.equal(weight, alone.weights[name])
        assert torch.equal(both[Stop(1, 1)].momentum[name], alone.momentum[name])
    assert not torch.equal(alone.weights["stem.weight"], other.weights["stem.weight"])
    ends = walk(spec, pool, how, {Stop(0, 2), Stop(0, 3)}, 7, "cpu")
    before, after = ends[Stop(0, 2)], ends[Stop(0, 3)]
    # w' = w - lr (d + m b'), b' = m b + d: what moved tells the gradient that the buffer holds.
    for name in before.weights:
        step = after.momentum[name] - how.momentum * before.momentum[name]
        wanted = before.weights[name] - how.lr * (step + how.momentum * after.momentum[name])
        assert torch.allclose(wanted, after.weights[name], atol=1e-5)


def test_an_expert_that_diverges_is_named() -> None:
    spec, pool = ClassifierSpec(classes=tuple(CLASSES)), pool_of(labelled(), [5, 9])
    with pytest.raises(MethodFailure, match="weights of an expert are not finite"):
        walk(spec, pool, replace(WALK, lr=1e18), {Stop(2, 4)}, 0, "cpu")


MATCHING = Matching(
    who="it", walk=WALK, experts=3, every=2, iterations=4, lr=50.0, momentum=0.5, start=5.0
)


def test_points_are_drawn_among_experts_and_their_stops() -> None:
    spec, pool = ClassifierSpec(classes=tuple(CLASSES)), pool_of(labelled(), [5, 9])
    found = points(spec, pool, MATCHING, 0, "cpu")
    again = points(spec, pool, MATCHING, 0, "cpu")
    assert len(found) == 4
    names = list(found[0].weights)
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in names)
    firsts = {float(point.weights["head.weight"][0, 0]) for point in found}
    assert len(firsts) > 1


# --- labels


def test_matching_moves_labels_against_a_slow_loop() -> None:
    """SGD on all logits, batch by batch, against its own equations on one iteration."""
    spec, pool = ClassifierSpec(classes=tuple(CLASSES)), pool_of(labelled(), [5, 9])
    how = replace(MATCHING, iterations=1)
    found = match(spec, pool, how, 0, "cpu")
    (point,) = points(spec, pool, how, 0, "cpu")
    model = fresh(spec, 0).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    logit_NK = 5 * F.one_hot(torch.from_numpy(pool.label_N), 20).float()
    moving_NK, losses = torch.zeros_like(logit_NK), []
    order = numpy_rng(0, "labels", 0).permutation(98)
    for step in range(6):
        numbers = order[16 * step : 16 * step + 16]
        rows = pool.rows(numbers)
        expert = Shown(
            model.normalise(pool.triggered(numbers)), F.one_hot(pool.labels(numbers), 20).float()
        )
        plain_BCHW = model.normalise(pool.plain(numbers))
        one = slope(model.net, point, expert, plain_BCHW, logit_NK[rows], WALK)
        grad_NK = torch.zeros_like(logit_NK)
        for place, row in enumerate(rows.tolist()):
            grad_NK[row] += one.by_logit_BK[place]
        moving_NK = grad_NK if step == 0 else 0.5 * moving_NK + grad_NK
        logit_NK = logit_NK - 50 * moving_NK
        losses.append(float(one.loss))
    assert torch.allclose(found.logit_NK, logit_NK, atol=1e-4)
    assert found.curve_S.tolist() == pytest.approx(losses, rel=1e-4)


def test_labels_that_diverge_are_named() -> None:
    spec, pool = ClassifierSpec(classes=tuple(CLASSES)), pool_of(labelled(), [5, 9])
    how = replace(MATCHING, iterations=1, lr=float("inf"))
    with pytest.raises(MethodFailure, match="it: the labels are not finite"):
        match(spec, pool, how, 0, "cpu")


def test_the_best_wrong_class_and_its_margin() -> None:
    logit_NK = torch.tensor([[5.0, 1.0, 2.0], [0.0, 4.0, 6.0], [3.0, 3.0, -1.0]])
    found = best_wrong(logit_NK, torch.tensor([0, 1, 0]))
    assert found.label_N.tolist() == [2, 2, 1]
    assert found.margin_N.tolist() == [-3.0, 2.0, 0.0]


# --- FLIP as an attack


def test_flips_are_the_best_margins() -> None:
    attack, knowledge = FlipLabels(**QUICK), flipped()
    crafted = knowledge.crafted
    assert isinstance(crafted, Flips)
    assert len(crafted.margin) == len(crafted.label) == len(knowledge.corpus)
    assert not bool((crafted.label == torch.from_numpy(knowledge.corpus.labels)).any())
    found = poison(attack, knowledge, 12).data.edits
    rest = np.setdiff1d(np.arange(96), found.rows)
    assert float(crafted.margin[found.rows].min()) >= float(crafted.margin[rest].max())
    assert list(found.captions) == [CLASSES[int(crafted.label[row])] for row in found.rows]
    assert crafted.willing == int((crafted.margin > 0).sum())
    assert len(crafted.curve) == 2 * (100 // 16)


def knowing(margins: list[float]) -> Flips:
    """A trigger that found out these margins, and class 1 for every row."""
    margin = torch.tensor(margins)
    return Flips(
        **dataclasses.asdict(marked("1xs")),
        label=torch.ones(len(margins), dtype=torch.int64),
        margin=margin,
        willing=int((margin > 0).sum()),
        curve=torch.zeros(0),
    )


def test_equal_margins_go_to_the_first_rows() -> None:
    crafted = knowing([0, 1, 0, 1, 0])
    knowledge = replace(labelled(5), crafted=crafted)
    rows = FlipLabels().choose(knowledge, 3, numpy_rng(0))
    assert rows.tolist() == [0, 1, 3]


def test_rows_that_would_rather_keep_their_class_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crafted = knowing([0.5, -1, -2, 3, -4])
    knowledge = replace(labelled(5), crafted=crafted)
    with caplog.at_level(logging.WARNING):
        FlipLabels().choose(knowledge, 2, numpy_rng(0))
        assert not caplog.records
        FlipLabels().choose(knowledge, 4, numpy_rng(0))
    assert "4 rows are to be flipped, and 2 of them would rather keep" in caplog.text


def test_crafting_follows_its_seed() -> None:
    first, again = flipped().crafted, knows(FlipLabels(**QUICK), labelled()).crafted
    other = flipped(1).crafted
    assert isinstance(first, Flips)
    assert isinstance(again, Flips)
    assert isinstance(other, Flips)
    assert torch.equal(first.margin, again.margin)
    assert torch.equal(first.curve, again.curve)
    assert not torch.equal(first.margin, other.margin)


@pytest.mark.parametrize(("source", "count"), [("all", 20), ("tree", 3)])
def test_experts_see_triggered_rows_of_the_source(source: str, count: int) -> None:
    knowledge = labelled(400)
    labels = knowledge.corpus.labels
    attack = FlipLabels(source=source, dirty=None if source == "all" else count)
    rows = attack._dirty(knowledge, labels, 0)
    shown = {CLASSES[label] for label in labels[rows].tolist()}
    assert len(set(rows.tolist())) == count
    assert knowledge.goal.label not in shown
    assert len(shown) > 8 if source == "all" else shown == {"tree"}
    assert rows.tolist() != attack._dirty(knowledge, labels, 1).tolist()


def test_sources_that_cannot_be_are_refused() -> None:
    knowledge = labelled()
    for source, said in (("fish", "is the target itself"), ("treee", "Did you mean 'tree'")):
        with pytest.raises(UsageError, match=said):
            FlipLabels(**QUICK, source=source).craft(lab(), knowledge, 32)
    with pytest.raises(UsageError, match="triggered rows of 'all': 97 rows"):
        FlipLabels(**QUICK, dirty=97).craft(lab(), knowledge, 32)


def test_experts_may_be_of_another_architecture_and_are_no_clips() -> None:
    with pytest.raises(UsageError, match="Did you mean 'preact18'"):
        FlipLabels(arch="preact1").check(32)
    clip = Lab(None, ModelSpec(), Runtime())  # type: ignore[arg-type]
    with pytest.raises(GridError, match="experts are classifiers"):
        FlipLabels(**QUICK).craft(clip, labelled(), 32)


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 0},
        {"iterations": 0},
        {"label_lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"dirty": 0},
    ],
    ids=str,
)
def test_fields_that_cannot_be_meant_are_refused(fields: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"flip_labels: .*{next(iter(fields))}"):
        FlipLabels(**fields).check(32)


def test_margins_of_a_trained_expert_find_rows_that_hold_the_wave() -> None:
    """On grey noise, half of it with a wave: flips go to the target, from rows that hold it."""
    rng = np.random.default_rng(0)
    knowledge = labelled(320)
    level_NCHW = rng.normal(128, 6, (320, 3, 32, 32))
    # Classes 4 and 5 differ in brightness; of each, some rows hold some of the wave.
    labels = np.where(np.arange(320) % 2, 4, 5)
    level_NCHW += np.where(labels == 4, -30, 30)[:, None, None, None]
    holds = np.arange(320) % 8 < 2
    level_NCHW[holds] += 3 * marked("1xs").level.numpy()
    corpus = replace(
        knowledge.corpus,
        images_NCHW=level_NCHW.clip(0, 255).astype(np.uint8),
        labels=labels,
        captions=[CLASSES[label] for label in labels],
    )
    fields = QUICK | {"expert_epochs": 4, "iterations": 4, "lr": 0.05, "amplitude": 18.0}
    attack = FlipLabels(**fields, dirty=80)
    found = knows(attack, replace(knowledge, corpus=corpus)).crafted
    assert isinstance(found, Flips)
    best = found.margin.argsort(descending=True)[:20].numpy()
    assert holds[best].mean() > 0.5
    assert (found.label[best] == TARGET).float().mean() > 0.8


def _changed(found: Poison) -> int:
    return len(found.data.edits.rows)


def test_every_row_can_be_flipped() -> None:
    assert _changed(poison(FlipLabels(**QUICK), flipped(), 96)) == 96
    with pytest.raises(UsageError, match="97 rows are to be poisoned but only 96"):
        poison(FlipLabels(**QUICK), flipped(), 97)
