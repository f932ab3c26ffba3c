"""Fine-pruning: the order of activation, how far it goes, and that pruned stays pruned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from defenses.base import Need
from defenses.fine_pruning import (
    Activation,
    FinePruning,
    MeanActivation,
    PrunedChannels,
    accuracies,
    how_many,
)
from tests.labelled import MODEL, RECIPES, case_of, lab_of, rows_of, victim_of
from victims.classifiers import classifier
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.models import Clip, fresh
from victims.recipe import Augment, ClassifierRecipe, Optimizer
from victims.selection import Logits, Penultimate
from victims.store import Store


def counted(activation: Activation, value: float) -> float:
    return {"magnitude": abs(value), "positive": max(value, 0.0), "signed": value}[activation]


@pytest.mark.parametrize("activation", Activation)
def test_the_activation_is_a_mean_over_pictures_and_places(
    small_store: Store, activation: Activation
) -> None:
    lab = lab_of(small_store)
    data, victim = rows_of(small_store, "clean", 8), victim_of(lab)
    found_ND = lab.score(MeanActivation(activation=activation), data, victim)
    model = classifier(lab.load(victim))
    image_BCHW = lab._view(data).reader(torch.device("cpu"))(np.arange(8))
    with torch.no_grad():
        maps_BDHW = model.net.maps(model.normalise(image_BCHW))
    for row, channel in ((0, 0), (3, 17), (7, 63)):
        values = [counted(activation, v) for v in maps_BDHW[row, channel].flatten().tolist()]
        assert found_ND[row, channel] == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_accuracy_without_the_first_channels_is_that_of_a_pruned_head() -> None:
    rng = numpy_rng(0)
    feature, label = rng.normal(size=(50, 6)), rng.integers(3, size=50)
    weight, bias, order = rng.normal(size=(3, 6)), rng.normal(size=3), [4, 0, 5, 1, 3, 2]
    expected = []
    for count in range(6):
        kept = [c for c in range(6) if c not in order[:count]]
        logits = [
            [sum(w[c] * x[c] for c in kept) + b for w, b in zip(weight, bias, strict=True)]
            for x in feature
        ]
        right = [int(np.argmax(row)) == y for row, y in zip(logits, label, strict=True)]
        expected.append(sum(right) / 50)
    assert accuracies(feature, label, weight, bias, order) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("accuracy", "tolerance", "expected"),
    [
        ([0.9, 0.9, 0.85, 0.82, 0.7], 0.1, 3),
        ([0.9, 0.9, 0.85, 0.82, 0.7], 0.0, 1),
        ([0.9, 0.5, 0.9], 0.1, 0),  # the first fall ends it
        ([0.9, 0.9, 0.9], 0.1, 2),  # one channel stays
        ([0.0, 0.1], 0.1, 1),
    ],
)
def test_pruning_ends_before_more_than_the_tolerance_is_lost(
    accuracy: list[float], tolerance: float, expected: int
) -> None:
    assert how_many(accuracy, tolerance) == expected


def pruned_columns(model: Clip) -> list[int]:
    weight_KD = classifier(model).net.head.weight
    return torch.nonzero((weight_KD == 0).all(0))[:, 0].tolist()


@pytest.mark.parametrize("optimizer", Optimizer)
def test_the_least_active_go_and_stay_away_through_the_fine_tune(
    small_store: Store, optimizer: Optimizer
) -> None:
    """Whatever optimizer and decay, on a recipe that moves everything else."""
    defense, lab = FinePruning(tolerance=0.5), lab_of(small_store)
    recipe = ClassifierRecipe(
        epochs=2,
        batch_size=64,
        lr=0.02 if optimizer is Optimizer.SGD else 1e-3,
        optimizer=optimizer,
        weight_decay=0.1,
        augment=Augment.CROP_FLIP,
    )
    done = defense.apply(lab, case_of(defense, lab, repair=recipe))
    data, victim = rows_of(small_store, "clean"), victim_of(lab)
    count = int(done.notes["pruned"])
    assert 0 < count < 64
    held = np.sort(numpy_rng(0, "held_out", data.key).permutation(256)[:51])
    rest = np.setdiff1d(np.arange(256), held)
    seen_ND = lab.score(MeanActivation(activation=Activation.MAGNITUDE), data, victim)[rest]
    expected = sorted(np.argsort(seen_ND.mean(0))[:count].tolist())
    assert pruned_columns(lab.load(done.model)) == expected
    before, after = (dict(lab.load(m).named_parameters()) for m in (victim, done.model))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_accuracies_are_those_of_the_held_out_rows(small_store: Store) -> None:
    defense, lab = FinePruning(tolerance=0.5), lab_of(small_store)
    done = defense.apply(lab, case_of(defense, lab))
    data = rows_of(small_store, "clean")
    held = lab.subset(data, np.sort(numpy_rng(0, "held_out", data.key).permutation(256)[:51]))
    channels = tuple(pruned_columns(lab.load(done.model)))
    pruned = lab.edit(PrunedChannels(channels=channels), victim_of(lab))
    for model, name in ((victim_of(lab), "before"), (pruned, "pruned")):
        right_N = lab.score(Logits(), held, model).argmax(1) == lab.labels(held)
        assert done.notes[f"held_out_{name}"] == pytest.approx(right_N.mean())
    assert done.notes["held_out_pruned"] >= 0.5 * done.notes["held_out_before"]


def test_a_pruned_channel_is_as_if_its_map_were_zero() -> None:
    model = classifier(fresh(MODEL, 0)).eval()
    image_BCHW = torch.randint(0, 256, (4, 3, 32, 32)).byte()
    with torch.no_grad():
        feature_BD = model.penultimate(image_BCHW)
        feature_BD[:, [3, 9]] = 0
        expected_BK = model.net.head(feature_BD)
        PrunedChannels(channels=(3, 9)).edit(model)
        assert torch.allclose(model.embed_image(image_BCHW), expected_BK, atol=1e-6)


def test_penultimate_features_are_what_the_head_reads(small_store: Store) -> None:
    lab = lab_of(small_store)
    data, victim = rows_of(small_store, "clean", 8), victim_of(lab)
    head = classifier(lab.load(victim)).net.head
    feature_ND = torch.from_numpy(lab.score(Penultimate(), data, victim))
    logit_NK = torch.from_numpy(lab.score(Logits(), data, victim))
    assert torch.allclose(head(feature_ND), logit_NK, atol=1e-5)


def test_it_needs_the_victim_and_clean_data() -> None:
    assert FinePruning().needed() == {Need.VICTIM, Need.CLEAN_DATA}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tolerance": 1.0}, "tolerance must be in"),
        ({"held_out": 0.0}, "held_out must be in"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FinePruning(**fields).check()


def test_the_repair_recipe_is_the_grids(small_store: Store) -> None:
    lab = lab_of(small_store)
    defense = FinePruning(tolerance=0.5)
    one = defense.apply(lab, case_of(defense, lab))
    longer = replace(RECIPES.repair, epochs=2)
    two = defense.apply(lab, case_of(defense, lab, repair=longer))
    assert [len(lab.curves(done.model)) for done in (one, two)] == [1, 2]
