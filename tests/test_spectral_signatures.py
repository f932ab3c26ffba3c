"""Spectral signatures: scores from the covariance's eigenvector, and what leaves each class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from defenses.base import Need
from defenses.spectral_signatures import SpectralSignatures, scores_of
from tests.labelled import RECIPES, case_of, lab_of, rows_of, victim_of
from victims.draws import numpy_rng
from victims.errors import UsageError
from victims.selection import Penultimate
from victims.store import Store


def slow_scores(feature_ND: np.ndarray) -> np.ndarray:
    """tau along the eigenvector of the largest eigenvalue of the covariance."""
    mean_D = sum(feature_ND) / len(feature_ND)
    covariance_DD = sum(np.outer(row - mean_D, row - mean_D) for row in feature_ND)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    v_D = vectors_DD[:, np.argmax(values_D)]
    return np.array([float((row - mean_D) @ v_D) ** 2 for row in feature_ND])


@pytest.mark.parametrize("shape", [(40, 6), (5, 12), (1, 3)])
def test_scores_are_their_equation(shape: tuple[int, int]) -> None:
    feature_ND = 3 + numpy_rng(0).normal(size=shape)
    assert scores_of(feature_ND) == pytest.approx(slow_scores(feature_ND), abs=1e-9)


def test_rows_apart_from_their_class_have_the_highest_scores() -> None:
    rng = numpy_rng(1)
    feature_ND = rng.normal(size=(100, 8))
    feature_ND[:7] += 4
    assert set(np.argsort(-scores_of(feature_ND))[:7].tolist()) == set(range(7))


def test_every_class_loses_its_share(small_store: Store) -> None:
    defense, lab = SpectralSignatures(expected_rate=0.2), lab_of(small_store)
    done = defense.apply(lab, case_of(defense, lab))
    data = rows_of(small_store, "suspect")
    label_N, flagged, suspicion = lab.labels(data), done.flagged, done.suspicion
    assert flagged is not None
    assert suspicion is not None
    feature_ND = lab.score(Penultimate(), data, victim_of(lab))
    for label in np.unique(label_N):
        rows = np.flatnonzero(label_N == label)
        assert flagged[rows].sum() == int(len(rows) * 3 // 10)
        tau_N = slow_scores(feature_ND[rows].astype(np.float64))
        assert suspicion[rows] == pytest.approx(tau_N, rel=1e-4, abs=1e-6)
        if flagged[rows].any():
            assert tau_N[flagged[rows]].min() >= tau_N[~flagged[rows]].max()
    assert done.notes["dropped"] == flagged.sum()
    kept = lab.subset(data, np.flatnonzero(~flagged))
    recipe = RECIPES.victim
    assert done.model == lab.train(lab.plain(recipe), kept, recipe)


def test_shares_are_products_of_decimals() -> None:
    """In floats 1.5 times .3 is less than .45, and 44 of 100 rows would go."""
    assert SpectralSignatures(expected_rate=0.3)._share() == 0.45
    assert 1.5 * 0.3 < 0.45


def test_it_needs_the_victim_its_data_and_its_start() -> None:
    defense = SpectralSignatures()
    assert defense.needed() == {Need.VICTIM, Need.SUSPECT_DATA, Need.START}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expected_rate": 1.0}, "expected_rate must be in"),
        ({"expected_rate": 0.7}, "factor must be above 0, and less than 1 / expected_rate"),
        ({"factor": 0.0}, "factor must be above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SpectralSignatures(**fields).check()
