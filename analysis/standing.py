"""Where defenses stand over all attacks and rates of a board: tiers, not an order by decimals.

A tier's letters are those that tests over strata and over victim seeds give, both with Holm's
correction (`analysis.apart`); whoever shares one is not told apart. Ranks are intervals from a
bootstrap of the whole board. A defense without numbers on 95 % of the sound victims has bounds in
place of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.apart import told_apart, worst_told_apart
from analysis.bounded import of_difference, of_share
from analysis.inference import (
    ALPHA,
    Mean,
    Span,
    detectable,
    friedman,
    groups_of,
    improvement,
    letters,
    strata_needed,
)
from analysis.matrix import FULL, UNDEFENDED, Matrix
from analysis.resample import DRAWS, Bootstrap, Volume
from analysis.seeds import over_strata
from analysis.spread import Spread
from grid.schema.errors import AskedError

BUDGET = "finetune"
"""The control that every repair must beat, with no more data and budget."""
MORE = 1.1
"""So many times the control's cost is more than it had."""
BY_TESTS = "signed-rank tests over strata and t tests over victim seeds"
BY_WORST = "ordered by worst-case ASR"
# Of two seeds the draws of a maximum tell equal defenses apart on most boards.
LEAST_FREEDOM, LEAST_FREEDOM_WORST = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A defense over all strata. Shares are 0 to 1; ``loss`` is clean accuracy given up.

    ``rank``, ``groups`` and their ``letters`` are among those it is compared with; None and empty
    where it is not.
    ``bounds`` are the best and the worst mean ASR that the missing cells allow, and
    ``loss_bounds`` those of ``loss``.
    """

    defense: str
    needs: tuple[str, ...]
    fidelity: str
    phase: str
    is_control: bool
    asr: Mean
    clean: Mean
    loss: Mean
    lift: Mean
    middle: Span | None = None
    worst: Span | None = None
    worst_attack: str | None = None
    pointwise: Mean | None = None
    rank: tuple[int, int] | None = None
    groups: tuple[int, ...] = ()
    letters: str = ""
    on_front: float | None = None
    improves: float | None = None
    relative_cost: float | None = None
    coverage: float = 1.0
    failures: int = 0
    filled: int = 0
    """Of the victims that it is compared on, those of which it has no number of its own."""
    bounds: tuple[float, float] | None = None
    loss_bounds: tuple[float, float] | None = None
    is_beyond: bool = False
    """It loses more clean accuracy than was asked for."""
    is_oracle: bool = False
    is_seen: bool = False
    """Its settings were chosen on what no defender sees, or on attacks of this board."""
    added_later: bool = False
    """It has cells that joined the grid after its first run."""

    @property
    def is_beside(self) -> bool:
        """Whether it is held beside what is compared: controls and oracles."""
        return self.is_control or self.is_oracle

    @property
    def is_partial(self) -> bool:
        return self.coverage < FULL


@dataclass(frozen=True, slots=True)
class Standings:
    """Lines by tier, and what a reader must know beside them."""

    lines: list[Standing]
    groups: list[tuple[str, ...]]
    """The needs that lines are compared within; one empty group is all of them."""
    strata: int
    seeds: int
    speaks_of: str
    score: str
    tested: str
    at_ca_loss: float | None
    families: list[int]
    """Pairs that were tested together, by group."""
    friedman_p: float
    detectable: float | None
    volume: Volume | None
    draws: int
    spread: Spread | None
    left_out: tuple[str, ...] = ()
    """Attacks that these are not over, with the reason of each."""

    def notes(self) -> list[str]:
        """One sentence each, what matters most first."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        caution = ", indicative" if 1 < self.seeds < 5 else ""
        strata = "strata" if self.strata > 1 else "stratum"
        found = [
            self._verdict(),
            f"Over {self.strata} {strata} (an attack at a rate) with sound victims, {seeds}"
            f"{caution}; tiers {self.score}, within a tier by name.{self._letters_told()}",
        ]
        if self.left_out:
            found.append(f"Left out of all that is said here: {', '.join(self.left_out)}.")
        if self.tested:
            found.append(
                f"Ranks: middle 95 % of {self.draws:,} draws of the whole board, in which every"
                " victim seed's effect varies by the t distribution, the same for all defenses."
            )
        elif self.speaks_of != "seeds":
            found.append(
                "One seed gives no ranks: its pictures tell how well one victim was measured, and"
                " not how another would fare. Intervals here are of pictures."
            )
        if filled := sum(line.filled for line in self.lines):
            found.append(
                f"{filled} victims of compared lines have no number of theirs: where a method"
                " failed or cannot be run they count as undefended, where machines failed as the"
                " stratum's other victims."
            )
        if self.spread is not None:
            found.append(self.spread.words())
        is_family = self.groups == [()] and any(self.families)
        if self.tested and is_family and self.strata >= self._needed:
            found.append(
                f"Friedman's test that all rank alike over strata: p {self.friedman_p:.3g}. It"
                " takes strata to be independent, which one seed in all of them makes them not."
            )
        if self.tested and self.detectable is not None:
            found.append(
                "Smallest difference in mean ASR that a paired t test of two of them over strata"
                f" finds 4 times in 5, at 0.05 / {max(self.families)} as Holm's correction begins:"
                f" {min(100.0, 100 * self.detectable):.1f} points, the median over pairs."
            )
        found += self._words_of_columns()
        if self.volume is not None:
            found.append(
                f"Hypervolume of (CA, 1 - ASR) from 5 points below the undefended accuracy, more is"
                f" better: {self.volume.value:.2f}, without an interval. It is optimistic, as noise"
                f" alone makes some defense best: by {self.volume.optimism:.2f} or more, as draws"
                " have it."
            )
        return found

    @property
    def _needed(self) -> int:
        """How many strata it takes to tell one of the pairs apart."""
        return strata_needed(max(self.families, default=0))

    def _verdict(self) -> str:
        """What the tiers say, in one sentence."""
        if self.speaks_of != "seeds":
            return "One seed: indicative. Nothing is told apart, for others may fare differently."
        if not self.tested:
            return "Two seeds: indicative. They tell no worst cases apart, which takes three."
        most = max(self.families, default=0)
        if not most:
            return "Nothing is compared here."
        if self.tested == BY_TESTS and self.strata < self._needed:
            strata = "strata" if self.strata > 1 else "stratum"
            return (
                f"Nothing can be told apart: {self.strata} {strata} can never show p <= 0.05 for"
                f" one of {most} pairs, which takes {self._needed}."
            )
        compared = [line.groups for line in self.lines if line.groups]
        shared = set(compared[0]).intersection(*compared[1:]) if compared else set()
        if shared:
            return "One tier: no two of the compared lines are told apart."
        return "Lines of tiers that share no letter are told apart."

    def _words_of_columns(self) -> list[str]:
        """What columns and marks mean, of those that hold something."""
        told = []
        if any(line.is_oracle for line in self.lines):
            told.append(
                "Oracles: their settings were chosen by looking at what no defender sees. They"
                " bound what tuning could reach, and are in no tier and no test."
            )
        if any(line.is_seen and not line.is_oracle for line in self.lines):
            told.append("seen: its settings were chosen on attacks of this board, unlike others'.")
        if any(line.added_later for line in self.lines):
            told.append("* has cells that joined the grid after its first run.")
        if any(line.pointwise is not None for line in self.lines):
            told.append(
                "Pointwise: share of pictures on which any of the attacks succeeds at any rate,"
                " over victim seeds; it grows with the number of both."
            )
        words = [
            "Worst case: the largest mean ASR of an attack; a maximum of noisy numbers lies above"
            " what it estimates."
        ]
        if any(line.on_front is not None for line in self.lines):
            words.append("Front: share of draws in which nothing is as accurate and as safe.")
        if any(line.improves is not None for line in self.lines):
            words.append(
                f"Beats {BUDGET}: share of the victims that both have with a smaller ASR, ties by"
                f" half; a failed method counts as undefended.{self._told_of_budgets()}"
            )
        return [*told, " ".join(words)]

    def _told_of_budgets(self) -> str:
        """Who had more than the control, so that beating it claims less."""
        control = next(line for line in self.lines if line.defense == BUDGET)
        told = []
        for line in self.lines:
            more = [need.replace("_", " ") for need in line.needs if need not in control.needs]
            spent, least = line.relative_cost, control.relative_cost
            if spent is not None and least is not None and spent > MORE * least:
                times = f"{spent / least:.1f} times its" if least else "more"
                more.append(f"{times} cost")
            if line.improves is not None and more:
                told.append(f"{line.defense} ({', '.join(more)})")
        if not told:
            return ""
        return f" With more than {BUDGET} had: {'; '.join(told)}."

    def _letters_told(self) -> str:
        if not self.tested:
            few = "Two seeds give no letters and ranks by worst case"
            return f" {few if self.speaks_of == 'seeds' else 'One seed gives no letters'}."
        pairs = [str(number) for number in self.families if number]
        within = ", within each group of equal needs" if self.groups != [()] else ""
        return (
            f" Lines share a letter unless {self.tested}, with Holm's correction"
            f" ({' and '.join(pairs) or 'no'} pairs, the undefended victim among them{within})"
            " tell them apart."
        )


def standings(
    matrix: Matrix,
    *,
    by_needs: bool = False,
    worst_case: bool = False,
    at_ca_loss: float | None = None,
    draws: int = DRAWS,
    chance: float = 0.0,
    spread: Spread | None = None,
) -> Standings:
    """Everything above, of all defenses with a number. ``at_ca_loss`` is in points, ``chance`` the
    accuracy of guessing, to which a missing cell may have fallen."""
    if at_ca_loss is not None and not 0 <= at_ca_loss <= 100:
        raise AskedError(f"--at-ca-loss is in points, from 0 to 100, found {at_ca_loss:g}")
    lines = [_line(matrix, d, chance) for d in range(len(matrix.defenses))]
    beyond = [
        at_ca_loss is not None and not 100 * line.loss.value <= at_ca_loss + 1e-9 for line in lines
    ]
    lines = [replace(line, is_beyond=b) for line, b in zip(lines, beyond, strict=True)]
    compared = [
        d
        for d, line in enumerate(lines)
        if not (line.is_partial or line.is_beyond or line.is_beside)
    ]
    groups: list[tuple[str, ...]] = [()]
    if by_needs:
        groups = list(dict.fromkeys(lines[d].needs for d in compared))
    families, p, least, volume = list[int](), 1.0, list[float](), None
    whole = Bootstrap(matrix, draws)
    for group in groups:
        members = [d for d in compared if not by_needs or lines[d].needs == group]
        board = Bootstrap(matrix.filled(members, chance), draws)
        ranked, pairs, found_p, found_least = _ranked(board, worst_case)
        families.append(pairs)
        p = min(p, found_p)
        least += found_least
        for d, more in zip(members, ranked, strict=True):
            lines[d] = replace(lines[d], filled=int(matrix.gaps(d).sum()), **more)
        if not by_needs and UNDEFENDED in board.matrix.defenses:
            none = board.matrix.defenses.index(UNDEFENDED)
            volume = board.volume(range(len(members)), none)
    return Standings(
        lines=sorted(
            (line for line in lines if line.coverage),
            key=lambda line: _tier(line, groups if by_needs else []),
        ),
        groups=groups,
        strata=len(matrix.strata),
        seeds=int(matrix.is_sound_SR.sum(axis=1).min()),
        speaks_of=whole.speaks_of,
        score=BY_WORST if worst_case else "ordered by mean ASR",
        tested=_tested(worst_case, whole.freedom),
        at_ca_loss=at_ca_loss,
        families=families,
        friedman_p=p,
        detectable=float(np.median(least)) if least else None,
        volume=volume,
        draws=draws,
        spread=spread,
    )


def _tested(worst_case: bool, freedom: int) -> str:
    """What gives letters; nothing where seeds are too few."""
    if freedom < (LEAST_FREEDOM_WORST if worst_case else LEAST_FREEDOM):
        return ""
    return "draws of victim seeds" if worst_case else BY_TESTS


def _tier(line: Standing, groups: Sequence[tuple[str, ...]]) -> tuple[object, ...]:
    """Within a tier by name: decimals order nothing that is not told apart."""
    state = (line.is_control, line.is_oracle, line.is_partial, line.is_beyond)
    place = groups.index(line.needs) if line.needs in groups else len(groups)
    return (*state, place, line.groups or (math.inf,), line.defense != UNDEFENDED, line.defense)


def _line(matrix: Matrix, d: int, chance: float) -> Standing:
    planned, about = matrix.is_sound_SR, matrix.about[d]
    none = matrix.defenses.index(UNDEFENDED)
    asr, clean = (np.where(planned, v[d], np.nan) for v in (matrix.asr_DSR, matrix.clean_DSR))
    base = np.where(np.isnan(asr), np.nan, matrix.base_DSR[none])
    costs = matrix.cost_DSR[d][~np.isnan(matrix.cost_DSR[d])]
    coverage = matrix.coverage(d)
    loss = np.where(planned, matrix.loss_DSR()[d], np.nan)
    gaps = matrix.applies_SR(d) & np.isnan(asr)
    bounds = loss_bounds = None
    if gaps.any():
        most = matrix.clean_DSR[none] - chance
        bounds = (
            over_strata(np.where(gaps, matrix.base_DSR[none], asr)).value,
            over_strata(np.where(gaps, matrix.asr_DSR[none], asr)).value,
        )
        loss_bounds = (
            over_strata(np.where(gaps, 0.0, loss)).value,
            over_strata(np.where(gaps, most, loss)).value,
        )
    pictures = matrix.pictures
    return Standing(
        defense=matrix.defenses[d],
        needs=about.needs,
        fidelity=about.fidelity,
        phase=about.phase,
        is_control=about.is_control,
        is_oracle=about.is_oracle,
        is_seen=about.is_seen,
        added_later=about.added_later,
        asr=of_share(over_strata(asr), pictures),
        clean=of_share(over_strata(clean), pictures),
        loss=of_difference(over_strata(loss), pictures),
        lift=of_difference(over_strata(asr - base), pictures),
        relative_cost=float(costs.mean()) if len(costs) else None,
        coverage=coverage,
        failures=matrix.failures(d),
        improves=_improves(matrix, d),
        bounds=bounds,
        loss_bounds=loss_bounds,
    )


def _improves(matrix: Matrix, d: int) -> float | None:
    if BUDGET not in matrix.defenses or matrix.defenses[d] in (BUDGET, UNDEFENDED):
        return None
    none = matrix.asr_DSR[matrix.defenses.index(UNDEFENDED)]
    asr_DSR = np.where(matrix.has_failed_DSR(), none, matrix.asr_DSR)
    sound_SR = np.where(matrix.is_sound_SR, asr_DSR[d], np.nan)
    found = improvement(sound_SR, asr_DSR[matrix.defenses.index(BUDGET)])
    return None if math.isnan(found) else found


def _ranked(
    board: Bootstrap, worst_case: bool
) -> tuple[list[dict[str, Any]], int, float, list[float]]:
    """What the comparison of some defenses says of each, the pairs that were tested, the p of
    Friedman's test, and the detectable difference of every pair."""
    matrix = board.matrix
    num = len(matrix.defenses)
    if not num or not matrix.strata:
        return [{} for _ in range(num)], 0, 1.0, []
    mean_DS = np.nanmean(matrix.asr_DSR, axis=2)
    worst, middle = board.worst(), board.interquartile()
    score = np.array([span.value for span in worst]) if worst_case else mean_DS.mean(axis=1)
    order = sorted(range(num), key=lambda d: (score[d], matrix.defenses[d]))
    has_seeds, is_tested = board.freedom > 0, bool(_tested(worst_case, board.freedom))
    if worst_case:
        differ, pairs = worst_told_apart(board)
    else:
        differ, pairs = told_apart(
            np.where(matrix.is_sound_SR, matrix.asr_DSR, np.nan),
            matrix.pictures,
        )
    groups = groups_of(order, differ)
    if not is_tested:
        groups = [()] * num
    ranks = board.ranks(board.worst_ND if worst_case else None)
    front = board.on_front()
    attacks = [stratum.attack for stratum in matrix.strata]
    means = [
        {a: float(mean_DS[d][[b == a for b in attacks]].mean()) for a in dict.fromkeys(attacks)}
        for d in range(num)
    ]
    found: list[dict[str, Any]] = [
        {
            "middle": middle[d],
            "worst": worst[d],
            "worst_attack": max(means[d], key=lambda a: means[d][a]),
            "rank": (int(ranks[d][0]), int(ranks[d][1])) if is_tested else None,
            "groups": groups[d],
            "letters": letters(groups[d]),
            "on_front": float(front[d]) if has_seeds else None,
        }
        for d in range(num)
    ]
    least = [
        value
        for a in range(num)
        for b in range(a)
        if (value := detectable(list(mean_DS[a] - mean_DS[b]), ALPHA / max(1, pairs))) is not None
    ]
    return found, pairs, friedman(mean_DS.T)[1], least
