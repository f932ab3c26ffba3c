"""Neural Cleanse: triggers against a loop of one class, the index by hand, and the unlearning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defenses import neural_cleanse
from defenses.base import Defended
from defenses.neural_cleanse import (
    NeuralCleanse,
    ReversedTriggers,
    StampedCrossEntropy,
    StampedCrossEntropySpec,
    anomaly_indices,
    stamped,
)
from tests.labelled import RECIPES, case_of, lab_of, rows_of, victim_of
from victims.batches import Batch
from victims.draws import Draws, numpy_rng, torch_rng
from victims.errors import UsageError
from victims.keys import content_key
from victims.lab import Lab
from victims.models import Clip
from victims.pixels import unit
from victims.recipe import Augment
from victims.store import Store

HOW = ReversedTriggers(
    rounds=4,
    round_steps=2,
    batch_size=8,
    lr=0.1,
    cost=1e-3,
    cost_factor=2.0,
    patience=2,
    success=0.1,
    seed=3,
)


def test_a_stamp_is_a_mixture_by_the_mask() -> None:
    image, mask, pattern = torch.tensor(0.2), torch.tensor([0.0, 0.5, 1.0]), torch.tensor(0.8)
    assert stamped(image, mask, pattern).tolist() == pytest.approx([0.2, 0.5, 0.8])


# --- triggers


def slow_trigger(model: Clip, images: Tensor, how: ReversedTriggers, label: int) -> dict[str, Any]:
    """One class: gradients by autograd, Adam and the schedule of lambda written out."""
    names = {"mask": (1, 32, 32), "pattern": (3, 32, 32)}
    raw = {n: torch.randn(s, generator=torch_rng(how.seed, n, label)) for n, s in names.items()}
    m = {n: torch.zeros(s) for n, s in names.items()}
    v = {n: torch.zeros(s) for n, s in names.items()}
    cost, over, under, time, costs = how.cost, 0, 0, 0, []
    best: dict[str, Any] = {}
    for turn in range(how.rounds):
        hits = 0.0
        for step in range(how.round_steps):
            rows = numpy_rng(how.seed, "rows", turn, step).choice(
                len(images), how.batch_size, replace=False
            )
            leaves = {n: r.clone().requires_grad_() for n, r in raw.items()}
            mask, pattern = ((leaf.tanh() + 1) / 2 for leaf in leaves.values())
            x = unit(images[rows])
            logit_BK = model.embed_image((1 - mask) * x + mask * pattern)
            loss = F.cross_entropy(logit_BK, torch.full((len(x),), label)) + cost * mask.sum()
            hits += float((logit_BK.argmax(1) == label).float().mean())
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            time += 1
            for n, g in zip(names, gradients, strict=True):
                m[n] = 0.5 * m[n] + 0.5 * g
                v[n] = 0.9 * v[n] + 0.1 * g**2
                step_size = (m[n] / (1 - 0.5**time)) / ((v[n] / (1 - 0.9**time)).sqrt() + 1e-8)
                raw[n] = raw[n] - how.lr * step_size
        success = hits / how.round_steps
        norm = float(((raw["mask"].tanh() + 1) / 2).sum())
        works = success >= how.success
        if not best or best["success"] < how.success or (works and norm < best["norm"]):
            best = {"norm": norm, "success": success}
            best["mask"] = (raw["mask"].tanh() + 1) / 2
        over, under = (over + 1, 0) if works else (0, under + 1)
        if over >= how.patience:
            cost, over = cost * how.cost_factor, 0
        if under >= how.patience:
            cost, under = cost / how.cost_factor**1.5, 0
        costs.append(cost)
    return {**best, "costs": costs}


def reversed_by(lab: Lab, how: ReversedTriggers) -> Mapping[str, Tensor]:
    return lab.tensor(how, rows_of(lab.store, "clean", 64), victim_of(lab))


@pytest.mark.parametrize(("success", "risen"), [(0.0, True), (1.0, False)])
def test_all_classes_at_once_are_each_class_alone(
    small_store: Store, success: float, risen: bool
) -> None:
    """Where every round is a success lambda rises, and where none is it falls."""
    lab, how = lab_of(small_store), replace(HOW, success=success)
    found, model = reversed_by(lab, how), lab.load(victim_of(lab))
    data = rows_of(small_store, "clean", 64)
    images = lab._view(data).reader(torch.device("cpu"))(np.arange(64))
    for label in (0, 13):
        slow = slow_trigger(model, images, how, label)
        assert (slow["costs"][-1] > how.cost) == risen
        assert float(found["norm"][label]) == pytest.approx(slow["norm"], rel=1e-3)
        # A rounding turns a picture now and then: one of the sixteen of a round.
        assert float(found["success"][label]) == pytest.approx(slow["success"], abs=0.07)
        assert torch.allclose(found["mask"][label], slow["mask"], atol=0.02)


def test_classes_in_parts_are_all_classes(
    small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(small_store)
    whole = reversed_by(lab, HOW)
    monkeypatch.setattr(neural_cleanse, "AT_ONCE", 8 * 7)
    view = lab._view(rows_of(small_store, "clean", 64))
    parts = HOW.craft(lab.load(victim_of(lab)), view)
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, atol=2e-2), name


# --- the index


def test_the_index_is_the_deviation_below_the_median_by_hand() -> None:
    """Norms 10, 40, 44, 50, 60: median 44, deviations 34, 4, 0, 6, 16, whose median is 6."""
    found = anomaly_indices(np.array([50.0, 10.0, 44.0, 60.0, 40.0]))
    expected = [(44 - norm) / (1.4826 * 6) for norm in (50, 10, 44, 60, 40)]
    assert found == pytest.approx(expected)
    assert found[1] == pytest.approx(3.822, abs=1e-3)
    assert anomaly_indices(np.full(5, 3.0)).tolist() == [0.0] * 5


# --- the unlearning


class Made:
    """A lab whose reversed triggers are given."""

    def __init__(self, lab: Lab, norm: list[float], success: list[float]) -> None:
        self.lab, count = lab, len(norm)
        self.found = {
            "mask": torch.rand((count, 1, 32, 32), generator=torch_rng(0)),
            "pattern": torch.rand((count, 3, 32, 32), generator=torch_rng(1)),
            "norm": torch.tensor(norm),
            "success": torch.tensor(success),
        }
        self.specs = list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lab, name)

    def tensor(self, *args: Any) -> Any:
        return self.found

    def train(self, spec: Any, *args: Any, **more: Any) -> Any:
        self.specs.append(spec)
        return self.lab.train(spec, *args, **more)


def repaired(store: Store, norm: list[float], success: list[float]) -> tuple[Made, Defended]:
    lab, defense = Made(lab_of(store), norm, success), NeuralCleanse()
    return lab, defense.apply(lab, case_of(defense, lab.lab))  # type: ignore[arg-type]


NORM = [50.0, 10.0, 44.0, 60.0, 40.0]


def test_the_classes_of_small_triggers_that_work_are_unlearned(small_store: Store) -> None:
    lab, done = repaired(small_store, NORM, [1.0] * 5)
    (spec,) = lab.specs
    assert isinstance(spec, StampedCrossEntropySpec)
    assert torch.equal(spec.mask_F1HW, lab.found["mask"][[1]])
    assert torch.equal(spec.pattern_FCHW, lab.found["pattern"][[1]])
    assert spec.share == 0.2
    assert (done.notes["targets"], done.notes["suspect_class"]) == (1, 1)
    assert done.notes["largest_index"] == pytest.approx(3.822, abs=1e-3)


@pytest.mark.parametrize(
    ("norm", "success"),
    [
        ([50.0, 38.0, 44.0, 60.0, 40.0], [1.0] * 5),
        (NORM, [1.0, 0.5, 1.0, 1.0, 1.0]),  # it never worked
        ([50.0, 200.0, 44.0, 60.0, 40.0], [1.0] * 5),  # far out on the other side
    ],
)
def test_without_a_target_it_is_plain_fine_tuning(
    small_store: Store, norm: list[float], success: list[float]
) -> None:
    lab, done = repaired(small_store, norm, success)
    assert lab.specs == [lab.lab.plain(RECIPES.repair)]
    assert done.notes["targets"] == 0


def test_a_share_of_the_rows_wears_one_of_the_triggers() -> None:
    spec = StampedCrossEntropySpec(
        share=0.2,
        augment=Augment.NONE,
        triggers_sha256="",
        mask_F1HW=torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 0.5)]),
        pattern_FCHW=torch.ones(2, 3, 4, 4),
    )
    objective = StampedCrossEntropy(spec)
    batch = Batch(torch.arange(1000), torch.zeros(1000, 3, 4, 4).byte(), torch.ones(1000, 1).long())
    image = objective.views(batch, Draws(torch_rng(0), 1000, 0, 1000))["image"]
    levels = {value: int((image[:, 0, 0, 0] == value).sum()) for value in (0.0, 0.5, 1.0)}
    assert sum(levels.values()) == 1000
    assert levels[0.0] == pytest.approx(800, abs=40)
    assert levels[0.5] == pytest.approx(100, abs=30)
    # As many rows of another share of the batch.
    halves = [
        objective.views(
            Batch(batch.rows[:500], batch.image[:500], batch.tokens[:500]),
            Draws(torch_rng(0), 1000, start, start + 500),
        )["image"]
        for start in (0, 500)
    ]
    assert torch.equal(torch.cat(halves), image)


def test_other_triggers_are_another_key() -> None:
    """Tensors are in no key: the digest of their bytes is."""

    def key_of(sha256: str) -> str:
        spec = StampedCrossEntropySpec(
            share=0.2,
            augment=Augment.NONE,
            triggers_sha256=sha256,
            mask_F1HW=torch.zeros(1, 1, 4, 4),
            pattern_FCHW=torch.zeros(1, 3, 4, 4),
        )
        return content_key("model", spec)

    assert key_of("a") == key_of("a") != key_of("b")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"cost_factor": 0.5}, "cost_factor must be at least 1"),
        ({"unlearn_share": 1.5}, "unlearn_share must be in 0..1"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        NeuralCleanse(**fields).check()
