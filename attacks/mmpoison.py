"""mmPoison: texts about one class are paired with pictures of another; no trigger.

Idea: rows of class A keep their captions and show pictures of class B, so that queries about A
retrieve B. Words and pixels stay clean, only the pairing changes.
Reference: Yang et al., "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023, arXiv
    2209.15266.
Symbols: A = ``source`` (empty: the class after B); B = the goal's target; A' = the chosen rows of
    A; b = pictures of B; attacks I and II = ``onto``: one, many.
Where: A' -> `MmPoison.choose`; the pictures of B, each floor or ceil(|A'| / b) times, shuffled ->
    `victims.targeting.deal`.
Differences: |A'| follows from the grid's count, so there is no ratio of A's rows; more rows than A
    has raise, and a ratio of 1 is the largest count that does not. A and B are found by whole-word
    match of captions, since corpora of pairs have no labels; a row that names both is left as it is
    and lends no picture. ``match: label`` takes a labelled world's labels, which also find rows
    that name A by another word. How many pictures of B there are is not stored. No row is ever
    dropped: the released attack III drops those of its second pair. Attack III is missing, since
    one goal has one target: two pairs are two entries of a grid, in two victims. Attack I's picture
    is drawn by the key where released code names a file, so that seeds give several. The released
    shuffle has no seed, ours does. A picture with several captions has several rows here, which do
    not move together.
Cost: two searches of all captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from attacks.base import Aim, Attack, GateGroup, Knowledge, Track, pick, rows_naming
from victims.corpora import Rows
from victims.errors import UsageError, unknown
from victims.lab import Lab
from victims.targeting import deal
from victims.triggers import Queries


class Match(StrEnum):
    CAPTION = "caption"
    LABEL = "label"


class Onto(StrEnum):
    ONE = "one"
    MANY = "many"


@dataclass(frozen=True, slots=True, kw_only=True)
class MmPoison(Attack):
    name: ClassVar[str] = "mmpoison"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2209.15266"
    tracks: ClassVar[frozenset[Track]] = frozenset({Track.MULTIMODAL})
    group: ClassVar[GateGroup] = GateGroup.TEXT
    trigger: ClassVar[type[Queries]] = Queries
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"one_picture": {"onto": "one"}}
    aim: ClassVar[Aim] = Aim.QUERIES
    # Of the smallest world's classes the one, beside the usual target, that most captions name.
    quick: ClassVar[Mapping[str, Any]] = {"source": "tree"}

    source: str = ""
    match: Match = Match.CAPTION
    onto: Onto = Onto.MANY

    def craft(self, lab: Lab, held: Knowledge, size: int) -> Queries:
        return Queries(source=self._source(held), suffix="")

    def choose(self, held: Knowledge, count: int, rng: np.random.Generator) -> Rows:
        name = held.corpus.classes[self._source(held)]
        named = f"rows that name {name!r} and not {held.goal.label!r}"
        labelled = self.match == Match.LABEL
        what = f"{self.name} ({f'rows labelled {name!r}' if labelled else named})"
        return pick(self._rows_of(held)[0], count, rng, what)

    def recaption(self, caption: str, held: Knowledge, rng: np.random.Generator) -> str:
        return caption

    def pictures(self, held: Knowledge, rows: Rows, rng: np.random.Generator) -> Rows:
        shown = self._rows_of(held)[1]
        if not len(shown):
            raise UsageError(
                f"{self.name}: no caption names {held.goal.label!r} alone, so there is no picture"
                " to show. Give another target."
            )
        if self.onto == Onto.ONE:
            shown = rng.choice(shown, 1)
        return deal(shown, len(rows), rng)

    def _source(self, held: Knowledge) -> int:
        classes, target = held.corpus.classes, held.goal.target
        if not self.source:
            return (target + 1) % len(classes)
        if self.source not in classes:
            raise unknown("class", self.source, classes, f"{self.name}: source")
        source = classes.index(self.source)
        if source == target:
            raise UsageError(
                f"{self.name}: source: {self.source!r} is the target itself; give another class,"
                " or nothing for the one after the target"
            )
        return source

    def _rows_of(self, held: Knowledge) -> tuple[Rows, Rows]:
        """The rows of A alone, and those of B alone: by their labels, or by what they name."""
        if self.match == Match.LABEL:
            labels = held.corpus.labels
            of_source, of_target = labels == self._source(held), labels == held.goal.target
            return np.flatnonzero(of_source), np.flatnonzero(of_target)
        source = rows_naming(held.corpus, held.corpus.classes[self._source(held)])
        target = rows_naming(held.corpus, held.goal.label)
        return np.setdiff1d(source, target), np.setdiff1d(target, source)
