"""What a trial is worth: pure functions of the numbers of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from grid.tuning.spec import Objective

# Above every score that a trial can have: of one that failed, and of one beyond the limits.
FAILED, INFEASIBLE = 4.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CellNumbers:
    """One cell on the tuning split: the defended victim's numbers and the undefended one's."""

    attack: str
    clean: float
    asr: float
    victim_clean: float
    victim_asr: float
    change: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialNumbers:
    """A trial over its cells. ``change`` is None until a cell has ended."""

    ca: float
    ca_loss: float
    worst_asr: float
    mean_asr: float
    change: float | None

    def as_columns(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in self.__slots__}


def over_cells(cells: Sequence[CellNumbers]) -> TrialNumbers:
    """Accuracy as the mean over cells; attack success first over the cells of an attack."""
    by_attack: dict[str, list[float]] = {}
    for cell in cells:
        by_attack.setdefault(cell.attack, []).append(cell.asr)
    means = [fmean(values) for values in by_attack.values()]
    changes = [cell.change for cell in cells if cell.change is not None]
    return TrialNumbers(
        ca=fmean(cell.clean for cell in cells),
        ca_loss=fmean(cell.victim_clean - cell.clean for cell in cells),
        worst_asr=max(means),
        mean_asr=fmean(means),
        change=fmean(changes) if changes else None,
    )


def excess(numbers: TrialNumbers, objective: Objective) -> float:
    """By how much accuracy, as a share, a trial misses the objective's limit; 0 within it."""
    if objective.ca_loss is None:
        return 0.0
    # Rounding must not decide whether a loss of exactly the limit is one too many.
    over = numbers.ca_loss - objective.ca_loss / 100
    return over if over > 1e-9 else 0.0


def score(numbers: TrialNumbers, objective: Objective) -> float:
    """What the search makes small: within the limits from 0 to 1, beyond them by how far."""
    over = excess(numbers, objective)
    if over:
        return INFEASIBLE + over
    if objective.minimise is not None:
        return float(getattr(numbers, objective.minimise))
    # Before a cell has ended its change is not known: no reason to end the trial.
    value = getattr(numbers, str(objective.maximise))
    return 1.0 - (1.0 if value is None else float(value))


class Incumbent(NamedTuple):
    """What a trial is compared with until there is a better one: its ASR by cell, its score."""

    asr: dict[int, float]
    score: float


def best(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial record that a search chooses: of those that came to their end the smallest score,
    then the most accurate, then the first. The settings that the defense has anyway, number 0,
    stand among them: no search chooses what is worse than they are. What trials took plays no
    part: it differs from run to run."""
    ended = [t for t in trials if t["status"] == "ok"]
    return min(ended, key=lambda t: (t["score"], -t["ca"], t["number"]), default=None)


def signed_rank_p(differences: Sequence[float]) -> float:
    """One-sided p of Wilcoxon's signed-rank test that differences lie above 0, exactly.

    Zeros are left out, ties share the mean of their ranks. Without a difference it is 1.
    """
    values = [value for value in differences if value]
    if not values:
        return 1.0
    order = sorted(range(len(values)), key=lambda i: abs(values[i]))
    doubled = [0] * len(values)  # twice the rank, which is whole for ties too
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and abs(values[order[stop]]) == abs(values[order[start]]):
            stop += 1
        for place in order[start:stop]:
            doubled[place] = start + 1 + stop
        start = stop
    ways = {0: 1}  # sum of the ranks of positive differences: in how many of all signs
    for rank in doubled:
        further = dict(ways)
        for total, count in ways.items():
            further[total + rank] = further.get(total + rank, 0) + count
        ways = further
    seen = sum(rank for rank, value in zip(doubled, values, strict=True) if value > 0)
    above = sum(count for total, count in ways.items() if total >= seen)
    return float(above / 2 ** len(values))
