"""What trials are measured on: keys, the halves of simulated data, and what is left alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.stages import PoisonStage
from grid.tuning.scenes import Scenes, inputs
from grid.tuning.spec import Sees
from tests.campaigns import campaign
from victims.corpora import Chunk
from victims.embedded import WorldCorpus
from victims.parts import CorpusPart
from victims.world import World

SIMULATED = {
    "objectives": {
        "tuned": {"minimise": "worst_asr", "ca_loss": 2},
        "simulated": {"sees": "simulated", "minimise": "worst_asr"},
        "oracle": {"sees": "held_out", "minimise": "worst_asr"},
    },
    "simulate": {"attacks": ["badnet"], "rate": 0.25, "recipe": {"epochs": 2}},
}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(campaign(**SIMULATED))


def keys_of(scenes: Scenes, values: dict[str, Any], sees: Sees = Sees.ATTACKS) -> list[str]:
    (searched,) = scenes.campaign.defenses
    squares = scenes.of(sees).squares(scenes.entry(searched, values))
    return [*(square.measure.key for square in squares), scenes.trial_key(squares)]


def test_other_settings_are_other_trials(scenes: Scenes) -> None:
    """Entries of one label, one after another, as the trials of a process are."""
    settings = [
        {"recipe.lr": 1e-3, "recipe.epochs": 1},
        {"recipe.lr": 3e-3, "recipe.epochs": 1},
        {"recipe.lr": 1e-3, "recipe.epochs": 2},
        {},
    ]
    found = [keys_of(scenes, values) for values in settings]
    assert len({tuple(keys) for keys in found}) == len(settings)
    assert all(len(set(column)) == len(settings) for column in zip(*found, strict=True))
    again = Scenes(campaign(**SIMULATED))
    assert [keys_of(again, values) for values in reversed(settings)] == found[::-1]


def test_undefended_victims_are_the_grids_own(scenes: Scenes) -> None:
    scene, (searched,) = scenes.of(Sees.ATTACKS), scenes.campaign.defenses
    squares = scene.squares(searched.entry)
    assert [s.cell.attack.label for s in squares] == ["badnet", "blended"]
    gates = {m.key for group in scene.groups() for m in scene.plan.gates[group].victims}
    assert {square.victim.key for square in squares} == gates
    assert scenes.of(Sees.CLEAN) is scene, "who sees clean pictures has the same victims"


def test_trials_never_read_what_is_reported(scenes: Scenes) -> None:
    (searched,) = scenes.campaign.defenses
    for sees in (Sees.ATTACKS, Sees.SIMULATED, Sees.HELD_OUT):
        for square in scenes.of(sees).squares(searched.entry):
            read = inputs(square.measure) | inputs(square.victim)
            splits = {stage.spec.split for stage in read.values() if stage.kind == "corpus"}  # type: ignore[attr-defined]
            assert splits <= {"public", "suspect", "clean", "tuning"}
            assert "tuning" in splits


def test_only_an_oracle_meets_held_out_attacks(scenes: Scenes) -> None:
    (searched,) = scenes.campaign.defenses

    def attacks(sees: Sees) -> set[str]:
        return {s.cell.attack.label for s in scenes.of(sees).squares(searched.entry)}

    assert attacks(Sees.ATTACKS) == {"badnet", "blended"}
    assert attacks(Sees.SIMULATED) == {"badnet"}
    assert attacks(Sees.HELD_OUT) == {"sig"}


def test_simulations_poison_one_half_of_the_clean_pairs(scenes: Scenes) -> None:
    (searched,) = scenes.campaign.defenses
    (square,) = scenes.of(Sees.SIMULATED).squares(searched.entry)
    defended = square.measure.defended
    assert isinstance(defended.victim.data, PoisonStage)
    poisoned, clean = defended.victim.data.trigger.corpus.spec, defended.clean.spec
    assert isinstance(poisoned, CorpusPart)
    assert isinstance(clean, CorpusPart)
    assert poisoned.split == clean.split == "clean"
    assert (poisoned.start, poisoned.num_rows) == (0, 16)
    assert (clean.start, clean.num_rows) == (16, 16)
    assert defended.victim.data.count == 4
    assert defended.victim.recipe.epochs == 2
    splits = {
        stage.spec.split  # type: ignore[attr-defined]
        for stage in inputs(square.measure).values()
        if stage.kind == "corpus"
    }
    assert "suspect" not in splits, "a simulation needs nothing of the suspect data"


@cache
def whole() -> WorldCorpus:
    return WorldCorpus(world=World(size=16), split="clean", num_rows=700)


def rows_of(chunks: list[Chunk]) -> tuple[np.ndarray, list[str], np.ndarray]:
    images = np.concatenate([chunk.image_BCHW for chunk in chunks])
    captions = [caption for chunk in chunks for caption in chunk.captions]
    return images, captions, np.concatenate([chunk.labels for chunk in chunks])


@cache
def all_rows() -> tuple[np.ndarray, list[str], np.ndarray]:
    return rows_of(list(whole().chunks()))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 699), st.integers(1, 700))
def test_a_part_is_a_slice(start: int, count: int) -> None:
    count = min(count, 700 - start)
    part = CorpusPart(of=whole(), start=start, num_rows=count)
    images, captions, labels = rows_of(list(part.chunks()))
    cut = slice(start, start + count)
    assert np.array_equal(images, all_rows()[0][cut])
    assert captions == all_rows()[1][cut]
    assert np.array_equal(labels, all_rows()[2][cut])


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 0), (699, 2)])
def test_a_part_lies_in_its_whole(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="do not lie in the 700 rows of clean"):
        CorpusPart(of=whole(), start=start, num_rows=count)


def test_a_search_is_what_suggests_and_judges() -> None:
    """More trials extend a search; another rule, space or way to search begins anew."""
    space = {"recipe.lr": [1e-3, 2e-3]}
    variants: dict[str, dict[str, Any]] = {
        "budget": {"budget": {"trials": 9}},
        "execution": {"description": "other words"},
        "objective": {"objectives": {"tuned": {"minimise": "mean_asr", "ca_loss": 2}}},
        "limit": {"objectives": {"tuned": {"minimise": "worst_asr", "ca_loss": 3}}},
        "space": {"defenses": [{"finetune": {"space": space}}]},
        "seed": {"search": {"seed": 1}},
        "stop": {"stop": {"by": "asha"}, "defenses": [{"finetune": {"space": space}}]},
        "stop later": {
            "stop": {"by": "asha", "grace": 2},
            "defenses": [{"finetune": {"space": space}}],
        },
        "cells": {"tuning": {"attacks": ["badnet"]}},
    }

    def key(**changes: Any) -> str:
        scenes = Scenes(campaign(**changes))
        scene, (searched,) = scenes.of(Sees.ATTACKS), scenes.campaign.defenses
        return scenes.search_key(searched, "tuned", scene.groups())

    found = {name: key(**changes) for name, changes in variants.items()}
    same = {found.pop("budget"), found.pop("execution")}
    assert same == {key()}
    assert len({*found.values(), *same}) == len(found) + 1
