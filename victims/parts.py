"""A run of rows of a corpus as a corpus of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from victims.corpora import Chunk, CorpusSpec, Rows


class _Cut(NamedTuple):
    image_BCHW: npt.NDArray[np.uint8]
    labels: Rows
    captions: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPart:
    """The rows ``start`` to ``start + num_rows`` of another corpus, of the same split."""

    name: ClassVar[str] = "corpus_part"
    version: ClassVar[int] = 1

    of: Any
    start: int
    num_rows: int

    def __post_init__(self) -> None:
        whole: CorpusSpec = self.of
        if self.start < 0 or self.num_rows < 1 or self.start + self.num_rows > whole.num_rows:
            raise ValueError(
                f"num_rows {self.num_rows} from row {self.start} do not lie in the"
                f" {whole.num_rows} rows of {whole.split}"
            )

    @property
    def split(self) -> str:
        split: str = self.of.split
        return split

    @property
    def classes(self) -> Sequence[str]:
        classes: Sequence[str] = self.of.classes
        return classes

    @property
    def templates(self) -> Sequence[str]:
        templates: Sequence[str] = self.of.templates
        return templates

    def chunks(self) -> Iterator[Chunk]:
        at, end = 0, self.start + self.num_rows
        for chunk in self.of.chunks():
            low, high = max(self.start - at, 0), min(end - at, len(chunk.labels))
            if low < high:
                cut = slice(low, high)
                yield _Cut(chunk.image_BCHW[cut], chunk.labels[cut], chunk.captions[cut])
            at += len(chunk.labels)
            if at >= end:
                return
