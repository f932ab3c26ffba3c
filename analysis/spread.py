"""How much of a number is the victim, how much the defense's own dice, how much the pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.inference import Components, variance_components
from analysis.matrix import UNDEFENDED
from analysis.reader import Tables

SQL = """
WITH measured AS (
    SELECT attack, rate_text, track, regime, model, target, defense, victim_seed, defense_seed,
           asr_top1, asr_n
    FROM cells
    WHERE is_planned AND eval_set = ? AND rate > 0 AND status = 'ok' AND asr_top1 IS NOT NULL
)
SELECT * FROM measured
SEMI JOIN (SELECT * FROM measured WHERE defense = ?) AS sound
USING (attack, rate_text, track, regime, model, target, victim_seed)
ORDER BY ALL
"""


class Spread(NamedTuple):
    """Standard deviations of ASR, of one defense on one stratum: roots of mean variances. None
    where no defense has two seeds of a kind."""

    victims: float | None
    defenses: float | None
    pictures: float

    def words(self) -> str:
        """One sentence, in points."""
        parts = [
            f"{100 * value:.1f} {what}"
            for value, what in (
                (self.victims, "between victim seeds"),
                (self.defenses, "between defense seeds of one victim"),
                (self.pictures, "of the pictures of one model"),
            )
            if value is not None
        ]
        alone = self.victims is not None and self.defenses is None
        more = "; with one defense seed each, victims vary by its dice too" if alone else ""
        return (
            "Standard deviation of ASR in points, of a defense on a stratum:"
            f" {', '.join(parts)} (roots of mean variances{more})."
        )


def load_spread(tables: Tables, eval_set: str) -> Spread | None:
    """Over all defenses and strata with sound victims; None where there are none."""
    rows = tables.query(SQL, eval_set, UNDEFENDED).rows
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for row in rows:
        groups[row[:7]].append(row[7:])
    return spread([_components(group) for group in groups.values()])


def spread(found: Sequence[Components]) -> Spread | None:
    """Roots of the mean of each variance, over those who have it."""
    if not found:
        return None

    def root(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.sqrt(np.mean(known))) if known else None

    pictures = root([one.pictures for one in found])
    assert pictures is not None
    return Spread(
        root([one.victims for one in found]), root([one.defenses for one in found]), pictures
    )


def _components(cells: Sequence[tuple[Any, ...]]) -> Components:
    """Of one defense on one stratum: rows of victim seed, defense seed, ASR and its pictures."""
    victims = {seed: r for r, seed in enumerate(dict.fromkeys(cell[0] for cell in cells))}
    nested = {seed: k for k, seed in enumerate(sorted({cell[1] for cell in cells}))}
    share_RK = np.full((len(victims), len(nested)), np.nan)
    for victim, defense, asr, _ in cells:
        share_RK[victims[victim], nested[defense]] = asr
    return variance_components(share_RK, min(cell[3] for cell in cells))
