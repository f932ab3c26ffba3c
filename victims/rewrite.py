"""Alternative captions of a view: EDA, drawn once per run or anew each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from victims.draws import derive
from victims.eda import eda_all
from victims.errors import UsageError
from victims.words import SynonymSource, synonym_source


class EdaMode(StrEnum):
    """`static`, as all released code does; `per_epoch`, the better practice; `off`."""

    STATIC = "static"
    PER_EPOCH = "per_epoch"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class EdaText:
    """Every caption under EDA. ``synonyms`` says where the synonyms are found, the digest which."""

    name: ClassVar[str] = "eda"
    version: ClassVar[int] = 1

    mode: EdaMode
    synonyms: str = field(metadata={"keyed": False})
    synonyms_digest: str
    seed: int

    @property
    def per_epoch(self) -> bool:
        return self.mode == EdaMode.PER_EPOCH

    def rewrite(self, captions: Sequence[str], epoch: int) -> list[str]:
        if self.mode == EdaMode.OFF:
            return list(captions)
        source = pinned_source(self.synonyms)
        return eda_all(captions, source.synonyms, derive(self.seed, "eda", epoch))


def pinned_source(name: str) -> SynonymSource:
    """``lexicon``, or ``wordnet:/path#digest``: files of another place are pinned by their digest,
    so that what a defense was given is part of its identity."""
    place, _, pin = name.partition("#")
    source = synonym_source(place)
    if place != "lexicon" and pin != source.digest:
        raise UsageError(
            f"synonyms: {place} has the digest {source.digest}, the configuration says"
            f" {pin or 'nothing'}. Write {place}#{source.digest}."
        )
    return source


def eda_text(mode: EdaMode, synonyms: str, seed: int) -> EdaText:
    """The view, with the digest of its synonyms in its identity."""
    digest = pinned_source(synonyms).digest
    return EdaText(mode=mode, synonyms=synonyms, synonyms_digest=digest, seed=seed)
