"""Two defenses on the same victims: the difference in points with its interval, then p.

Per cell the exact McNemar test on per-picture outcomes; over strata the signed-rank test and sign
flips on seed-averaged differences. A difference is the first defense's number less the second's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.board import grid_info
from analysis.bounded import of_difference
from analysis.inference import (
    ALPHA,
    Floats,
    Mean,
    detectable,
    holm,
    improvement,
    least_p,
    mcnemar,
    over_differences,
    rank_direction,
    sign_flip,
    signed_rank,
)
from analysis.matrix import Matrix, Stratum, kinds_of, load_matrix
from analysis.reader import Tables, read_tables
from analysis.seeds import over_strata, seeds_p
from grid.schema.errors import AskedError, ResultsError


@dataclass(frozen=True, slots=True, kw_only=True)
class CellTest:
    """One victim: on how many pictures the attack fools only one of the two models, and the same
    of clean pictures that only one gets right. ``kind`` is what the board has several of."""

    attack: str
    rate: str
    seed: int
    kind: str = ""
    asr_difference: float
    clean_difference: float
    only_first: int | None = None
    only_second: int | None = None
    p: float | None = None
    p_holm: float | None = None
    clean_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``asr`` and ``clean`` are means over strata with the t interval of victim seeds; the
    ``_strata`` ones treat strata as a sample, as the tests do."""

    first: str
    second: str
    shared: int
    of_first: int
    of_second: int
    strata: int
    seeds: int
    asr: Mean
    asr_strata: Mean
    clean: Mean
    clean_strata: Mean
    p_signed_rank: float
    p_sign_flip: float
    p_seeds: float
    """Of the t test over victim seeds, whose interval is that of ``asr``."""
    clean_p_signed_rank: float
    first_better: float
    detectable: float | None
    direction: int
    """Of the signed ranks of ASR: -1 where the first leaves less."""
    defense_seeds: int
    grid: str | None
    grid_hash: str | None
    eval_set: str
    added_later: tuple[str, ...]
    """Which of the two have cells that joined the grid after its first run."""
    sound: int
    """All sound victims, of which a method may have failed on some."""
    first_failed: int
    second_failed: int
    cells: tuple[CellTest, ...]
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What the numbers allow to be said, in one sentence."""
        return self.says(self.p_signed_rank)

    @property
    def unsaid(self) -> str:
        """What failed, of which no number here tells; empty where nothing did."""
        both = ((self.first, self.first_failed), (self.second, self.second_failed))
        told = [f"{name} failed on {n} of {self.sound} victims" for name, n in both if n]
        return f"{' and '.join(told)}: this says nothing of those." if told else ""

    def says(self, p: float, p_seeds: float | None = None) -> str:
        """The same by other p than the tests' own, such as those of a whole family."""
        p_seeds = self.p_seeds if p_seeds is None else p_seeds
        least = least_p(self.strata)
        if self.strata < 2:
            return "One stratum: nothing can be said of other attacks or rates."
        if least > ALPHA:
            return (
                f"{self.strata} strata cannot show p <= 0.05 (at best {least:.3g}): no difference"
                " over attacks is claimed."
            )
        if not self.asr.df:
            return (
                "One seed: indicative. No difference is claimed, for others may fare differently."
            )
        if p > ALPHA:
            return "Not told apart over strata."
        if p_seeds > ALPHA:
            return (
                "Not told apart: strata differ alike, but their mean by no more than victim seeds"
                f" vary it (p {p_seeds:.2g})."
            )
        if self.direction * self.asr_strata.value <= 0:
            return (
                "Signed ranks tell them apart and the mean points the other way: few strata differ"
                " much. Neither is claimed to be safer."
            )
        better = self.first if self.direction < 0 else self.second
        return f"{better} leaves the smaller ASR over strata."


def compare(tables: Tables, first: str, second: str, eval_set: str = "report") -> Comparison:
    """Compare two defenses of open results."""
    matrix = load_matrix(tables, eval_set)
    if matrix is None:
        raise ResultsError(f"No sound victim in {tables.directory} yet: nothing to compare on.")
    a, b = matrix.index(first), matrix.index(second)
    if a == b:
        raise AskedError(f"{first} with itself: name two defenses.")
    both = ~np.isnan(matrix.asr_DSR[[a, b]]).any(axis=0) & matrix.is_sound_SR
    if not both.any():
        raise ResultsError(f"{first} and {second} share no victim with numbers of both.")
    asr, clean = (
        np.where(both, values[a] - values[b], np.nan)
        for values in (matrix.asr_DSR, matrix.clean_DSR)
    )
    kept = both.any(axis=1)
    failed_DSR = matrix.has_failed_DSR()
    pictures = int(matrix.pictures_S[kept].min())
    asr_S, clean_S = np.nanmean(asr[kept], axis=1), np.nanmean(clean[kept], axis=1)
    return Comparison(
        first=first,
        second=second,
        shared=int(both.sum()),
        of_first=_measured(matrix, a),
        of_second=_measured(matrix, b),
        strata=int(kept.sum()),
        seeds=int(both[kept].sum(axis=1).min()),
        asr=of_difference(over_strata(asr), pictures),
        asr_strata=of_difference(over_differences(list(asr_S)), pictures),
        clean=of_difference(over_strata(clean), pictures),
        clean_strata=of_difference(over_differences(list(clean_S)), pictures),
        p_signed_rank=signed_rank(list(asr_S)),
        p_sign_flip=sign_flip(list(asr_S)),
        p_seeds=seeds_p(asr, pictures),
        clean_p_signed_rank=signed_rank(list(clean_S)),
        first_better=improvement(
            matrix.asr_DSR[a][kept], np.where(both, matrix.asr_DSR[b], np.nan)[kept]
        ),
        detectable=detectable(list(asr_S)),
        direction=rank_direction(list(asr_S)),
        defense_seeds=_defense_seeds(tables, (first, second), eval_set),
        grid=grid_info(tables).name,
        grid_hash=grid_info(tables).hash,
        eval_set=eval_set,
        added_later=tuple(matrix.defenses[d] for d in (a, b) if matrix.about[d].added_later),
        sound=int(matrix.is_sound_SR.sum()),
        first_failed=int(failed_DSR[a].sum()),
        second_failed=int(failed_DSR[b].sum()),
        cells=_cells(tables, matrix, (a, b), asr, clean, eval_set),
        warnings=(*_oracles(matrix, (a, b)), *tables.warnings),
    )


def compare_in(directory: Path, first: str, second: str, eval_set: str = "report") -> Comparison:
    """The same of a results directory, also while a grid is still writing there."""
    return read_tables(directory, lambda tables: compare(tables, first, second, eval_set))


def _measured(matrix: Matrix, d: int) -> int:
    return int((~np.isnan(matrix.asr_DSR[d]) & matrix.is_sound_SR).sum())


def _oracles(matrix: Matrix, pair: tuple[int, int]) -> list[str]:
    return [
        f"{matrix.defenses[d]} is an oracle: its settings were chosen by looking at what no"
        " defender sees."
        for d in pair
        if matrix.about[d].is_oracle
    ]


def _defense_seeds(tables: Tables, names: tuple[str, str], eval_set: str) -> int:
    """The most defense seeds that a victim has."""
    ((most,),) = tables.query(
        "SELECT coalesce(max(n), 0) FROM (SELECT count(DISTINCT defense_seed) AS n FROM cells"
        " WHERE eval_set = ? AND is_planned AND status = 'ok' AND defense IN (?, ?)"
        " GROUP BY defense, attack, rate, track, regime, model, target, victim_seed)",
        eval_set,
        *names,
    ).rows
    return int(most)


# A picture's own class is the target where both have one rank on all pictures of that class.
PICTURES = """
WITH chosen AS (
    SELECT cell, defense, attack, rate_text, track, regime, model, target, victim_seed
    FROM cells
    WHERE eval_set = ? AND is_planned AND status = 'ok' AND rate > 0 AND defense IN (?, ?)
    -- Of a victim's several defense seeds the first, for a test needs two models.
    QUALIFY row_number() OVER (
        PARTITION BY defense, attack, rate_text, track, regime, model, target, victim_seed
        ORDER BY defense_seed, cell
    ) = 1
),
pictures AS (
    SELECT chosen.* EXCLUDE (cell), image,
           triggered_target_rank = 0 AS is_fooled, clean_prediction = label AS is_right,
           bool_and(clean_true_rank = clean_target_rank) OVER (PARTITION BY samples.cell, label)
               AS is_of_target
    FROM newest_samples AS samples JOIN chosen USING (cell)
    WHERE samples.eval_set = ?
)
SELECT one.attack, one.rate_text, one.track, one.regime, one.model, one.target, one.victim_seed,
       count(*) FILTER (one.is_fooled AND NOT other.is_fooled AND NOT one.is_of_target),
       count(*) FILTER (other.is_fooled AND NOT one.is_fooled AND NOT one.is_of_target),
       count(*) FILTER (one.is_right AND NOT other.is_right),
       count(*) FILTER (other.is_right AND NOT one.is_right)
FROM pictures AS one
JOIN pictures AS other USING (attack, rate_text, track, regime, model, target, victim_seed, image)
WHERE one.defense = ? AND other.defense = ?
GROUP BY ALL
"""


def _cells(
    tables: Tables,
    matrix: Matrix,
    pair: tuple[int, int],
    asr_SR: Floats,
    clean_SR: Floats,
    eval_set: str,
) -> tuple[CellTest, ...]:
    """Every shared victim; McNemar where its pictures are on record."""
    names = [matrix.defenses[d] for d in pair]
    rows = tables.query(PICTURES, eval_set, *names, eval_set, *names).rows
    counted = {(Stratum(*row[:6]), row[6]): row[7:] for row in rows}
    kinds = kinds_of(matrix.strata)
    found = []
    for s, stratum in enumerate(matrix.strata):
        for r, seed in enumerate(matrix.seeds):
            if np.isnan(asr_SR[s, r]):
                continue
            counts = counted.get((stratum, seed))
            found.append(
                CellTest(
                    attack=stratum.attack,
                    rate=stratum.rate,
                    seed=seed,
                    kind=kinds[s],
                    asr_difference=float(asr_SR[s, r]),
                    clean_difference=float(clean_SR[s, r]),
                    only_first=counts[0] if counts else None,
                    only_second=counts[1] if counts else None,
                    p=mcnemar(counts[0], counts[1]) if counts else None,
                    clean_p=mcnemar(counts[2], counts[3]) if counts else None,
                )
            )
    tested = [i for i, cell in enumerate(found) if cell.p is not None]
    for i, p in zip(tested, holm([found[i].p or 0.0 for i in tested]), strict=True):
        found[i] = replace(found[i], p_holm=p)
    return tuple(found)
