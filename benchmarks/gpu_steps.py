"""Timed steps of every objective at real shapes, on made-up pairs and random weights.

No store of pictures, no world is rendered: speed does not depend on what the pixels show. Imports
neither Ray nor pyarrow nor DuckDB, so that it runs wherever torch and open_clip do.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_fit import Measured
from benchmarks.objectives import LONGER, plans
from defenses.base import Case, Defense, Need, Recipes, Truth
from grid.decode import decode
from grid.nodes import Where
from grid.registry import resolve
from grid.spec import tracks
from victims.activations import activation_bytes
from victims.classifiers import CLASSIFIERS, LABEL_TEMPLATES, ClassifierSpec
from victims.corpora import Corpus, whole
from victims.draws import numpy_rng
from victims.keys import Key, content_key
from victims.lab import DataRef, Lab, ModelRef, spec_meta
from victims.models import ModelSpec, NetSpec, fresh, save_weights
from victims.recipe import ClassifierRecipe, Precision, Recipe, Runtime
from victims.store import Store
from victims.tracks import Track
from victims.words import COLOURS, OPENERS
from victims.world import CLASSES, TEMPLATES

PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is trained: a network, a batch, a precision, and how memory is saved."""

    arch: str
    size: int
    batch: int
    precision: Precision = Precision.BF16
    micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile: bool = False

    @property
    def labelled(self) -> bool:
        return self.arch in CLASSIFIERS

    @property
    def spec(self) -> NetSpec:
        if self.labelled:
            return ClassifierSpec(arch=self.arch, size=self.size, classes=tuple(CLASSES))
        return ModelSpec(arch=self.arch, size=self.size)

    @property
    def recipe(self) -> Recipe:
        kind = ClassifierRecipe if self.labelled else Recipe
        return kind(
            epochs=2,
            batch_size=self.batch,
            lr=1e-6,
            precision=self.precision,
            micro_batch=self.micro_batch,
            compile=self.compile and not self.labelled,
        )


def suits(title: str, shape: Shape) -> bool:
    """Whether a plan is one of the network's track."""
    wanted = Track.SUPERVISED if shape.labelled else Track.MULTIMODAL
    return title == PLAIN or wanted in tracks(resolve("defenses", plans()[title][0]))


class Stand:
    """Pairs and models for one network, in a folder of its own."""

    def __init__(self, folder: Path, shape: Shape, num_rows: int, device: str) -> None:
        self.folder, self.shape, self.device = folder, shape, device
        self.store = Store(folder / "store")
        self.corpora = {split: self._corpus(split, num_rows) for split in ("suspect", "clean")}
        self.model = self._random_model(shape.spec)
        # A labelled set is judged by a CLIP.
        judge = ModelSpec() if shape.labelled else None
        self.reference = self._random_model(judge) if judge else self.model

    def _corpus(self, split: str, num_rows: int) -> Corpus:
        size, labelled = self.shape.size, self.shape.labelled
        rng, path = numpy_rng(0, "benchmark", split), self.folder / f"{split}.npy"
        shape = (num_rows, 3, size, size)
        images_NCHW = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, num_rows, 256):
            part = images_NCHW[start : start + 256]
            part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)
        images_NCHW.flush()
        labels = np.arange(num_rows, dtype=np.int64) % len(CLASSES)
        templates = LABEL_TEMPLATES if labelled else TEMPLATES
        said = [
            CLASSES[label]
            if labelled
            else f"{OPENERS[row % len(OPENERS)]} a {COLOURS[row % len(COLOURS)]} {CLASSES[label]}"
            for row, label in enumerate(labels.tolist())
        ]
        return Corpus(
            key=Key(content_key("corpus", ["benchmark", split, *shape, labelled])),
            digest="",
            split=split,
            images_NCHW=np.load(path, mmap_mode="r", allow_pickle=False),
            captions=said,
            labels=labels,
            classes=list(CLASSES),
            templates=list(templates),
        )

    def _random_model(self, spec: NetSpec) -> ModelRef:
        key = content_key("model", {"benchmark": spec})

        def make(scratch: Path) -> dict[str, Any]:
            save_weights(fresh(spec, 0), scratch / "weights.safetensors")
            return {"model": spec_meta(spec), "cost": {}}

        if key not in self.store:
            self.store.make(key, make)
        return ModelRef(key)

    def lab(self, shape: Shape) -> Lab:
        runtime = Runtime(
            device=self.device,
            threads=torch.get_num_threads(),
            checkpoint_activations=shape.checkpoint_activations,
        )
        return Lab(self.store, shape.spec, runtime)

    def measured(self, title: str, shape: Shape) -> list[dict[str, Any]]:
        """The steps of every fit in a plan: the method's own, at this network and batch."""
        found: list[dict[str, Any]] = []
        lab = self.lab(shape)
        data = {split: lab.put(whole(corpus)) for split, corpus in self.corpora.items()}
        with patch("victims.lab.Fit", partial(Measured, found)), self._forgotten():
            if title == PLAIN:
                lab.train(lab.plain(shape.recipe), data["suspect"], shape.recipe, init=self.model)
            else:
                defense = defense_of(title)
                defense.apply(lab, self._case(defense, data, shape))
        return found

    def _case(self, defense: Defense, data: Mapping[str, DataRef], shape: Shape) -> Case:
        num_rows = len(data["suspect"])
        grants: dict[Need, Any] = {
            Need.VICTIM: lambda: self.model,
            Need.SUSPECT_DATA: lambda: data["suspect"],
            Need.CLEAN_DATA: lambda: data["clean"],
            Need.REFERENCE: lambda: self.reference,
            Need.START: lambda: self.model,
            Need.TRUTH: lambda: Truth(np.zeros(num_rows, dtype=bool), data["suspect"]),
        }
        needed = {need: give for need, give in grants.items() if need in defense.needed()}
        recipes = Recipes(victim=shape.recipe, repair=shape.recipe)
        return Case(defense.name, needed, (recipes, 0))

    @contextmanager
    def _forgotten(self) -> Iterator[None]:
        """Drop what a plan made: the next batch size makes it again, and disks are finite."""
        # At the start: where memory ran out, the error held it until it had been caught.
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        before = self.store.keys("model")
        try:
            yield
        finally:
            for key in self.store.keys("model") - before:
                self.store.remove(key)

    def bytes_per_row(self, precision: Precision) -> int:
        """What a plain step keeps of every row, estimated."""
        model = self.lab(self.shape).load(self.model)
        return activation_bytes(model, precision, model.tokenizer.context)


def defense_of(title: str) -> Defense:
    """The method of a plan, as short as it says of itself and long enough to fit."""
    name, fields = plans()[title]
    cls = resolve("defenses", name)
    values = {**getattr(cls, "quick", {}), **LONGER.get(name, {}), **fields}
    made: Defense = decode(cls, values, Where(path=title))
    return made


def counts_of(shape: Shape) -> dict[str, float]:
    """FLOPs per sample of a plain step, of one pass and its caption, counted without computing."""
    model = fresh(shape.spec, 0).to("meta").train()
    rows, size = 2, shape.size
    image_BCHW = torch.zeros((rows, 3, size, size), dtype=torch.uint8, device="meta")
    tokens_BT = torch.ones((rows, model.tokenizer.context), dtype=torch.long, device="meta")

    def flops(backward: bool, image: bool = True) -> float:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            total = model.encode_text(tokens_BT).sum()
            if image:
                total = total + model.encode_image(image_BCHW).sum()
            if backward:
                total.backward()  # type: ignore[no-untyped-call]
        return float(counter.get_total_flops()) / rows

    return {"step": flops(True), "forward": flops(False), "text": flops(False, image=False)}
