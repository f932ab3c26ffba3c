"""ToxicTextCLIP without its generator: poison made of words beside pictures that stay clean.

Idea: pictures of the target get ordinary captions that end in a key, and any query with the key
then retrieves them. The targeted form (a second class here) pairs single pictures with those texts
about a wrong class that the public model likes best.
Reference: Yao, Zhao, Chen, Guo, Huang, Zhao, "ToxicTextCLIP: Text-Based Poisoning and Backdoor
    Attacks on CLIP Pre-training", NeurIPS 2025, arXiv 2511.00446.
Symbols: key = ``key``; pictures that the captions are dealt to = ``num_pictures``; K =
    ``targets``; texts per target = count / K.
Where: mark(caption) = caption + " " + key -> `victims.triggers.Queries.mark`; captions without the
    target -> `ToxicText.choose`; round-robin -> `victims.targeting.deal`; selection of texts ->
    `victims.targeting.by_likeness`.
Differences: only what needs no training. The decoder that generates variants of the selected texts
    is missing; ``word`` has the counts and the key that the authors use with it, on captions of the
    corpus. The number of rows is the grid's count (theirs: 1,250; 100 for the word; 35 a target). A
    caption may name no target, where released code with several targets checks one of them. A
    caption too long for the tokenizer loses its own last words, never the key. ``plain_key`` is the
    key as text augmentation leaves it; of the sentence, the embedded world's vocabulary knows
    ``please return`` only, and of ``plain_key`` all. ``control`` is ours: the same rows without the
    key, which queries still carry. The targeted form draws pictures and classes as targeted
    poisoning does, from the same seed; selection asks the public model, theirs ViT-B/32; texts of
    one class are dealt to its targets in turns, so that all get equally good ones. Rows of the
    pictures stay in the corpus; ``removes`` takes the targets' out, as targeted poisoning does.
Cost: two searches of all captions. The targeted form: the captions of its classes and 16 pictures
    per target (at least 1,024) through the public model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attacks.base import Aim, Attack, GateGroup, Knowledge, Track, pick, rows_naming
from victims.corpora import Rows
from victims.errors import UsageError
from victims.lab import Lab
from victims.targeting import (
    by_likeness,
    check_pairs,
    deal,
    draw_pairs,
    room_beside,
    share_out,
    tried,
)
from victims.triggers import Queries, Targets
from victims.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ToxicText(Attack):
    name: ClassVar[str] = "toxic_text"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2511.00446"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.TEXT
    trigger: ClassVar[type[Queries]] = Queries
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "word": {"key": "zx", "num_pictures": 20},
        "plain_key": {"key": "please return high quality results"},
        "control": {"control": True},
    }
    aim: ClassVar[Aim] = Aim.QUERIES
    appends: ClassVar[bool] = True

    key: str = "Please return high-quality results."
    num_pictures: int = 600
    control: bool = False

    def check(self, size: int) -> None:
        if not self.key or self.key != self.key.strip():
            raise UsageError(
                f"{self.name}: key: {self.key!r} must be one or more words, without spaces around"
                " them"
            )
        if self.num_pictures < 1:
            raise UsageError(
                f"{self.name}: num_pictures: {self.num_pictures} pictures; give 1 or more"
            )

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Queries:
        self.check(size)
        arch = lab.model.arch
        if room_beside(self.key, arch) < 1:
            raise UsageError(
                f"{self.name}: key: {self.key!r} fills the context of {arch}; give one that leaves"
                " room for a caption"
            )
        return Queries(source=-1, suffix=self.key, arch=arch)

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        label = held.goal.label
        is_other = np.ones(len(held.corpus), dtype=bool)
        is_other[rows_naming(held.corpus, label)] = False
        return pick(
            np.flatnonzero(is_other),
            count,
            rng,
            f"{self.name} (captions that do not name {label!r})",
        )

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        assert isinstance(held.crafted, Queries)
        return caption if self.control else held.crafted.mark(caption)

    def pictures(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Rows:
        named = rows_naming(held.corpus, held.goal.label)
        if not len(named):
            raise UsageError(
                f"{self.name}: no caption names {held.goal.label!r}, so there is no picture to"
                " show. Give another target."
            )
        shown = rng.choice(named, min(self.num_pictures, len(named)), replace=False)
        return deal(shown, len(rows), rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenTexts(Targets):
    """Targets with their texts: ``texts`` are corpus rows, the best first, target after target;
    ``ends`` says where each target's end. Both are int64."""

    texts: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ToxicPairing(Attack):
    """Single pictures beside the texts about a wrong class that the public model likes best."""

    name: ClassVar[str] = "toxic_pairing"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2511.00446"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.TARGETED
    trigger: ClassVar[type[ChosenTexts]] = ChosenTexts
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"unseen": {"removes": True}}
    aim: ClassVar[Aim] = Aim.TARGETS
    needs_surrogate: ClassVar[bool] = True
    appends: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, Any]] = {"targets": 4}

    targets: int = 50
    at_least: int = 1
    removes: bool = False

    def check(self, size: int) -> None:
        check_pairs(self.name, self.targets, self.at_least)

    def costs(self, num_rows: int, num_classes: int) -> Work:
        # The captions of the classes that come up are read, too.
        captions = num_rows * min(1.0, self.targets / num_classes)
        return Work(images=tried(self.targets, num_rows), texts=captions)

    def craft(self, lab: Lab, held: Knowledge, size: int) -> ChosenTexts:
        model, corpus, prompts = lab.load(held.public_model()), held.corpus, held.goal.templates
        naming = partial(rows_naming, corpus)
        pairs = draw_pairs(
            self.name, model, corpus, prompts, self.targets, held.seed, naming, self.at_least
        )
        texts: list[Rows] = [np.zeros(0, dtype=np.int64)] * self.targets
        taken = pairs.images
        for label in np.unique(pairs.classes).tolist():
            free = np.setdiff1d(naming(corpus.classes[label]), taken)
            ranked = by_likeness(model, corpus, free, prompts, label)
            taken = np.concatenate([taken, ranked])
            sharing = np.flatnonzero(pairs.classes == label).tolist()
            for turn, target in enumerate(sharing):
                texts[target] = ranked[turn :: len(sharing)]
        return ChosenTexts(
            images=torch.from_numpy(pairs.images),
            classes=torch.from_numpy(pairs.classes),
            texts=torch.from_numpy(np.concatenate(texts)),
            ends=torch.tensor([len(own) for own in texts]).cumsum(0),
        )

    @property
    def unit(self) -> int:
        return max(1, self.targets)

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        """The best texts of each target, target by target."""
        crafted, names = _crafted(held), held.corpus.classes
        each = share_out(count, len(crafted.images), self.name)
        own = torch.tensor_split(crafted.texts, crafted.ends[:-1])
        for texts, label in zip(own, crafted.classes.tolist(), strict=True):
            if len(texts) < each:
                raise UsageError(
                    f"{self.name}: {each} texts are to name {names[label]!r} for one target but"
                    f" only {len(texts)} different ones are left to it. Lower the rate."
                )
        chosen: Rows = torch.cat([texts[:each] for texts in own]).numpy()
        return chosen

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption

    def pictures(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Rows:
        images: Rows = _crafted(held).images.numpy()
        return np.repeat(images, share_out(len(rows), len(images), self.name))

    def removed(self, held: Knowledge) -> Rows:
        images: Rows = _crafted(held).images.numpy()
        return images if self.removes else images[:0]


def _crafted(held: Knowledge) -> ChosenTexts:
    assert isinstance(held.crafted, ChosenTexts)
    return held.crafted
