"""Labelled sets as corpora: every pair's caption is the name of its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from victims.classifiers import LABEL_TEMPLATES
from victims.embedded import WorldCorpus
from victims.world import Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledWorld:
    """The pictures of a corpus of the embedded world, labelled instead of captioned."""

    name: ClassVar[str] = "labelled_world"
    version: ClassVar[int] = 1

    of: WorldCorpus

    @property
    def split(self) -> str:
        return self.of.split

    @property
    def num_rows(self) -> int:
        return self.of.num_rows

    @property
    def classes(self) -> Sequence[str]:
        return self.of.classes

    @property
    def templates(self) -> Sequence[str]:
        return LABEL_TEMPLATES

    def chunks(self) -> Iterator[Rendered]:
        classes = self.classes
        for chunk in self.of.chunks():
            yield chunk._replace(captions=[classes[label] for label in chunk.labels.tolist()])
