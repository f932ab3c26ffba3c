"""The data of a grid: the embedded world, files of pictures, or an ingested corpus, in splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grid.execution import at_least
from victims.classifiers import LABEL_TEMPLATES
from victims.corpora import CorpusSpec
from victims.embedded import WorldCorpus
from victims.evaluation_sets import EvaluationSet
from victims.ingested import IngestedPairs
from victims.labelled import LabelledWorld
from victims.labelled_files import LabelledFiles
from victims.world import CLASSES, TEMPLATES, World


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanPool:
    """How many clean pairs there are, and whether they are `disjoint` from the suspect ones or,
    as in `overlap`, pairs that the suspect data holds too, as they were before any poisoning."""

    rows: int
    pool: Literal["disjoint", "overlap"] = "disjoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldData:
    """The embedded world and how many rows of each split the grid uses."""

    world: World = field(default_factory=World)
    public: int = 10_000
    suspect: int = 10_000
    clean: int | CleanPool = 2_000
    tuning: int = 2_000
    report: int = 2_000
    shifted: int = 2_000

    def __post_init__(self) -> None:
        at_least(self, 1, "public", "suspect", "tuning", "report", "shifted")
        if isinstance(self.clean, CleanPool) and self.clean.pool == "disjoint":
            object.__setattr__(self, "clean", self.clean.rows)  # as it is written otherwise
        num_clean, overlaps = self._clean()
        if num_clean < 1:
            raise ValueError(f"clean must be at least 1, got {num_clean}")
        if overlaps and num_clean > self.suspect:
            raise ValueError(
                f"clean: {num_clean} rows of pool overlap, and the suspect data has {self.suspect}"
            )

    def _clean(self) -> tuple[int, bool]:
        """The number of clean pairs, and whether the suspect data holds them too."""
        if isinstance(self.clean, CleanPool):
            return self.clean.rows, self.clean.pool == "overlap"
        return self.clean, False

    @property
    def size(self) -> int:
        """The side of a picture, in pixels."""
        return self.world.size

    def rows(self, split: str) -> int:
        """How many pairs a split has."""
        return self.captioned(split).num_rows

    def captioned(self, split: str) -> WorldCorpus:
        """The pairs of a split."""
        num_rows, overlaps = self._clean() if split == "clean" else (getattr(self, split), False)
        split = "suspect" if overlaps else split
        return WorldCorpus(world=self.world, split=split, num_rows=num_rows)

    def corpus(self, split: str) -> CorpusSpec:
        """What a split's stages read."""
        return self.captioned(split)

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES

    @property
    def templates(self) -> Sequence[str]:
        return TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledWorldData(WorldData):
    """The same pictures, each with the name of its class for a caption."""

    def corpus(self, split: str) -> CorpusSpec:
        return LabelledWorld(of=self.captioned(split))

    @property
    def templates(self) -> Sequence[str]:
        return LABEL_TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesData:
    """A labelled set of pictures on disk: its splits by name."""

    splits: Mapping[str, LabelledFiles]

    @property
    def size(self) -> int:
        return self.splits["suspect"].size

    @property
    def suspect(self) -> int:
        return self.rows("suspect")

    @property
    def public(self) -> int:
        return self.rows("public")

    def rows(self, split: str) -> int:
        return self.splits[split].num_rows if split in self.splits else 0

    def corpus(self, split: str) -> CorpusSpec:
        return self.splits[split]

    @property
    def classes(self) -> Sequence[str]:
        return self.splits["suspect"].classes

    @property
    def templates(self) -> Sequence[str]:
        return LABEL_TEMPLATES


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusData:
    """Ingested pairs in disjoint splits, and a labelled set that victims are judged by."""

    splits: Mapping[str, IngestedPairs | EvaluationSet]

    @property
    def size(self) -> int:
        return self._report.size

    @property
    def suspect(self) -> int:
        return self.rows("suspect")

    @property
    def public(self) -> int:
        return self.rows("public")

    def rows(self, split: str) -> int:
        return self.splits[split].num_rows if split in self.splits else 0

    def corpus(self, split: str) -> CorpusSpec:
        return self.splits[split]

    @property
    def _report(self) -> EvaluationSet:
        report = self.splits["report"]
        assert isinstance(report, EvaluationSet)
        return report

    @property
    def classes(self) -> Sequence[str]:
        return self._report.classes

    @property
    def templates(self) -> Sequence[str]:
        return self._report.templates


Data = WorldData | FilesData | CorpusData
