"""What is measured of every cell: evaluation sets, top-k, retrieval, probes, exhibits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from victims.evaluation_sets import EvaluationSet
from victims.exhibits import Exhibits
from victims.retrieval_sets import RetrievalSet


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSet:
    """A further set that accuracy is measured on, and what a linear probe is trained on there."""

    report: EvaluationSet
    probe: EvaluationSet | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Evaluation sets of the board, the k of its top-k metrics, and what is measured besides:
    ``retrieval`` between pictures and captions (of the board's sets, or of sets of its own), a
    linear ``probe`` trained on clean pairs, accuracy on ``others``, and ``exhibits`` to look at,
    which are no numbers of the board."""

    sets: tuple[Literal["report", "shifted"], ...] = ("report", "shifted")
    ks: tuple[int, ...] = (1, 3, 5, 10)
    retrieval: bool | tuple[RetrievalSet, ...] = False
    probe: bool = False
    exhibits: bool | Exhibits = field(default=False, metadata={"keyed": False})
    # Named in the grid's identity where there are any: those without keep theirs.
    others: tuple[OtherSet, ...] = field(default=(), metadata={"keyed": False})

    @property
    def retrieval_sets(self) -> tuple[RetrievalSet, ...]:
        return () if isinstance(self.retrieval, bool) else self.retrieval

    def __post_init__(self) -> None:
        if self.exhibits is True:
            object.__setattr__(self, "exhibits", Exhibits())  # as it is written otherwise
        _distinct("sets", self.sets)
        _distinct("ks", self.ks)
        names = [*(each.dataset for each in self.retrieval_sets)]
        names += [other.report.dataset for other in self.others]
        if names:
            _distinct("evaluate: sets", names)
        if min(self.ks) < 1 or 1 not in self.ks:
            raise ValueError(f"ks are positive and hold 1, which the gate reads; got {self.ks}")

    @property
    def shown(self) -> Exhibits | None:
        """What measurements of the board keep to be looked at."""
        return self.exhibits if isinstance(self.exhibits, Exhibits) else None


def _distinct(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise ValueError(f"{name} is empty")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} holds a value twice: {', '.join(map(str, values))}")
