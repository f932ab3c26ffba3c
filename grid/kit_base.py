"""What the contract kit stands on: a tiny world, with its models, in a store of its own.

A check is a function of a method and a `Kit`. It returns nothing, or raises `Broken` with what it
found and what the contract expects.
"""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.base import Goal, Knowledge
from grid.registry import resolve, table
from grid.spec import tracks
from grid.stages import Bench, CorpusStage, ModelStage, PoisonStage, Stage, TriggerStage
from victims.classifiers import LABEL_TEMPLATES, ClassifierSpec
from victims.corpora import Corpus, Reader, open_corpus
from victims.embedded import WorldCorpus
from victims.errors import GridError
from victims.keys import content_key
from victims.lab import Lab, Ledger, ModelRef, spec_meta
from victims.labelled import LabelledWorld
from victims.models import ModelSpec, NetSpec, fresh, save_weights
from victims.recipe import ClassifierRecipe, Recipe, Runtime
from victims.store import Store
from victims.tracks import Track
from victims.world import CLASSES, SPLITS, TEMPLATES, World

ROWS = 256
PICTURES = {32: ROWS, 64: 64, 224: 16}  # rows that attacks are shown, by pixels a side
POISONED = 25
# Not class 0, which is what code that forgets the target would mean.
TARGET = CLASSES.index("fish")


class Broken(GridError):
    """A clause of the contract that a method does not keep."""


def expect(holds: bool, found: str, expected: str) -> None:
    """Raise `Broken` unless the clause holds."""
    if not holds:
        raise Broken(f"found {found}; expected {expected}")


class Kit:
    """A world of a few hundred pairs, its reference model and its victims, in ``root``.

    On the supervised track the victims are image classifiers and the reference is their judge.
    """

    def __init__(self, root: Path, track: Track = Track.MULTIMODAL) -> None:
        self.root, self.track = root, track
        self.labelled = track is Track.SUPERVISED
        self.store = Store(root / "base")
        templates = LABEL_TEMPLATES if self.labelled else TEMPLATES
        self.goal = Goal(TARGET, CLASSES[TARGET], templates)
        self.runtime = Runtime()
        # By trigger key, what another process made of it.
        self.elsewhere: dict[str, str] = {}
        # What clauses share: crafted triggers, and what a defense's run left or raised.
        self.crafted: dict[Any, Any] = {}
        self.runs: dict[Any, Any] = {}
        self._held: dict[int, Corpus] = {}
        self._copies = 0

    @cached_property
    def _supervised(self) -> Kit:
        other = Kit(self.root / "supervised", Track.SUPERVISED)
        other.elsewhere = self.elsewhere
        return other

    def suited(self, method: Any) -> Kit:
        """The kit of the first track that a method is defined on: this one, or its like."""
        return self if self.track in tracks(method) else self._supervised

    def model(self, size: int = 32) -> NetSpec:
        """What the victims are."""
        return ClassifierSpec(size=size, classes=CLASSES) if self.labelled else ModelSpec(size=size)

    def recipe(self, epochs: int) -> Recipe:
        if self.labelled:
            return ClassifierRecipe(epochs=epochs, batch_size=64, lr=0.02)
        return Recipe(epochs=epochs, batch_size=64, lr=3e-3, text_lr_ratio=0.2, warmup_steps=2)

    # --- what attacks are shown

    def held(self, size: int = 32, seed: int = 0) -> Knowledge:
        """What an attacker holds: the pool of pictures of that size, the goal and a seed."""
        if size not in self._held:
            stage = self.corpus("suspect", size)
            stage.run(self.bench(self.store))
            self._held[size] = open_corpus(self.store, stage.key, Reader.TRAINING)
        return Knowledge(
            corpus=self._held[size], goal=self.goal, seed=seed, surrogate=self.surrogate(size)
        )

    def surrogate(self, size: int = 32) -> ModelRef:
        """A public model of that size. It has learnt nothing, which no clause asks of it."""
        spec = self.model(size)
        key = content_key("model", {"surrogate": spec})

        def make(scratch: Path) -> dict[str, Any]:
            save_weights(fresh(spec, 0), scratch / "weights.safetensors")
            return {"model": spec_meta(spec), "cost": {}}

        if key not in self.store:
            self.store.make(key, make)
        return ModelRef(key)

    def pictures(self, size: int = 32) -> Tensor:
        """Natural pictures, uint8 BCHW, that a stamp may keep."""
        return torch.from_numpy(self.held(size).corpus.images_NCHW[:].copy())

    def lab(self, size: int = 32, store: Store | None = None) -> Lab:
        return self.bench(store or self.store).lab(self.model(size))

    def bench(self, store: Store) -> Bench:
        return Bench(store, self.runtime, lambda line: None, Ledger())

    def corpus(self, split: str, size: int = 32) -> CorpusStage:
        rows = PICTURES[size] if split == "suspect" else ROWS // 2
        pairs = WorldCorpus(world=World(size=size), split=split, num_rows=rows)
        return CorpusStage(LabelledWorld(of=pairs) if self.labelled else pairs)

    # --- what defenses are handed

    @cached_property
    def poisoned(self) -> PoisonStage:
        """The pool under the first attack of the table."""
        attack = resolve("attacks", next(iter(table("attacks"))))()
        suspect = self.corpus("suspect")
        trigger = TriggerStage(attack, self.goal, 0, suspect, self.model())
        return PoisonStage(trigger, POISONED, ROWS)

    @cached_property
    def reference(self) -> ModelStage:
        """The public CLIP: where victims start from, or what judges the labels of others."""
        pairs = WorldCorpus(world=World(), split="public", num_rows=ROWS // 2)
        fit = Recipe(epochs=1, batch_size=64, lr=3e-3, text_lr_ratio=0.2, warmup_steps=2)
        return ModelStage(ModelSpec(), fit, ROWS // 2, CorpusStage(pairs), None)

    def victim(self, data: CorpusStage | PoisonStage, init: ModelStage | None) -> ModelStage:
        # Two epochs, so that methods that act every other epoch do act.
        return ModelStage(self.model(), self.recipe(epochs=2), ROWS, data, init)

    def victims(self) -> list[ModelStage]:
        """Poisoned and clean from the reference (regime F), poisoned from nothing (regime S)."""
        suspect, reference = self.corpus("suspect"), None if self.labelled else self.reference
        found = [self.victim(self.poisoned, reference), self.victim(suspect, reference)]
        return [*found, self.victim(self.poisoned, None)]

    @cached_property
    def ready(self) -> Store:
        """The store with every split, the truth, the reference and the victims in it."""
        bench = self.bench(self.store)
        for split in SPLITS:
            self.corpus(split).run(bench)
        data: list[Stage] = [self.poisoned.trigger, self.poisoned]
        public: list[Stage] = [self.reference.data, self.reference]
        for stage in (*data, *public, *self.victims()):
            stage.run(bench)
        return self.store

    def fresh_store(self) -> WatchedStore:
        """A copy of the ready store, as it was before any defense ran."""
        self._copies += 1
        copy = self.root / f"copy{self._copies}"
        ignore = shutil.ignore_patterns("locks", "partial")
        # Links are as good as copies: a store replaces files and never writes into one.
        shutil.copytree(self.ready.root, copy, ignore=ignore, copy_function=os.link)
        return WatchedStore(copy)


class WatchedStore(Store):
    """A store that remembers which artefacts were read."""

    def __init__(self, uri: Path) -> None:
        self.read: set[str] = set()
        super().__init__(uri)

    def get(self, key: str) -> Any:
        self.read.add(key)
        return super().get(key)
