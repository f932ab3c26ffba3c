"""Labelled sets and an image classifier at test size, for defenses of the supervised track."""

from __future__ import annotations

from typing import Any

from defenses.base import Case, Defense, Need, Recipes
from tests.conftest import corpus_spec
from victims.classifiers import ClassifierSpec
from victims.corpora import build_corpus, corpus_key
from victims.lab import DataRef, Lab, ModelRef
from victims.labelled import LabelledWorld
from victims.recipe import ClassifierRecipe, Recipe, Runtime
from victims.store import Store
from victims.world import CLASSES

MODEL = ClassifierSpec(classes=tuple(CLASSES))
RECIPES = Recipes(
    victim=ClassifierRecipe(epochs=2, batch_size=64, lr=0.02),
    repair=ClassifierRecipe(epochs=1, batch_size=64, lr=0.01),
)


def lab_of(store: Store) -> Lab:
    """The lab of a new stage."""
    return Lab(store, MODEL, Runtime())


def rows_of(store: Store, split: str, num_rows: int = 256) -> DataRef:
    spec = LabelledWorld(of=corpus_spec(split, num_rows))
    build_corpus(store, spec)
    return DataRef(corpus_key(spec), num_rows)


def victim_of(lab: Lab) -> ModelRef:
    """What training on the suspect rows makes; nothing in them is poisoned."""
    recipe: Recipe = RECIPES.victim
    return lab.train(lab.plain(recipe), rows_of(lab.store, "suspect"), recipe)


def case_of(defense: Defense, lab: Lab, **recipes: Recipe) -> Case:
    grants: dict[Need, Any] = {
        Need.SUSPECT_DATA: lambda: rows_of(lab.store, "suspect"),
        Need.CLEAN_DATA: lambda: rows_of(lab.store, "clean"),
        Need.START: lambda: None,
        Need.VICTIM: lambda: victim_of(lab),
    }
    granted = {need: give for need, give in grants.items() if need in defense.needed()}
    plan = Recipes(
        victim=recipes.get("victim", RECIPES.victim), repair=recipes.get("repair", RECIPES.repair)
    )
    return Case(defense.name, granted, (plan, 0))
