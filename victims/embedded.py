"""Splits of the embedded world as corpora."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from victims.world import CLASSES, TEMPLATES, Rendered, World, render_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldCorpus:
    """The first ``num_rows`` pairs of one split of a world."""

    name: ClassVar[str] = "world_corpus"
    version: ClassVar[int] = 1

    world: World
    split: str
    num_rows: int

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES

    @property
    def templates(self) -> Sequence[str]:
        return TEMPLATES

    def chunks(self) -> Iterator[Rendered]:
        return render_chunks(self.world, self.split, self.num_rows)
