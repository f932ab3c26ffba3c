"""The cells of a grid as arrays: what comparisons over attacks, rates and seeds are made of.

Shapes: D defense, S stratum (an attack at a rate, on one target and kind of victim), R victim seed.
Defense seeds are averaged inside their victim seed, which is the replicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.inference import Floats
from analysis.reader import Tables
from grid.schema import ResultsError, Status

UNDEFENDED = "none"
# Of so much of the matrix a defense must have numbers to be given a rank.
FULL = 0.95
NOT_ITS_FAULT = (Status.SKIPPED, Status.NOT_APPLICABLE, Status.INERT, Status.INVALID_VICTIM)


class Stratum(NamedTuple):
    """An attack at a rate, on one target and kind of victim."""

    attack: str
    rate: str
    track: str
    regime: str
    model: str
    target: str

    @property
    def label(self) -> str:
        return f"{self.attack}@{self.rate}"


class About(NamedTuple):
    """What a defense is given, and how."""

    needs: tuple[str, ...]
    phase: str
    fidelity: str
    is_control: bool


@dataclass(frozen=True, slots=True)
class Matrix:
    """One number per cell; NaN where it was not measured, whose status says why.

    Strata are those whose undefended victims are sound: what fails its gate or is inert tells
    nothing of a defense, and no defense is averaged over it.
    """

    defenses: tuple[str, ...]
    strata: tuple[Stratum, ...]
    seeds: tuple[int, ...]
    is_sound_SR: npt.NDArray[np.bool_]
    """Whether there is an undefended victim that passed its gate."""
    about: tuple[About, ...]
    clean_DSR: Floats
    asr_DSR: Floats
    base_DSR: Floats
    """ASR of the clean victims on the same pictures."""
    cost_DSR: Floats
    status_DSR: npt.NDArray[np.str_]
    pictures_S: npt.NDArray[np.int64]

    def index(self, defense: str) -> int:
        """Where a defense stands; a name that is not there is refused."""
        if defense not in self.defenses:
            from victims.errors import near

            guess = near(defense, self.defenses)
            raise ResultsError(
                f"no defense {defense!r} on this board.{guess} There: {', '.join(self.defenses)}."
            )
        return self.defenses.index(defense)

    def coverage(self, defense: int) -> float:
        """The share of the sound victims on which the defense was measured."""
        wanted = self.is_sound_SR
        has = ~np.isnan(self.asr_DSR[defense]) & wanted
        return float(has.sum() / wanted.sum()) if wanted.any() else 0.0

    def failures(self, defense: int) -> int:
        """Cells in which the method itself failed: an outcome, and no gap."""
        return int((self.status_DSR[defense] == Status.FAILED_METHOD.value).sum())

    def loss_DSR(self) -> Floats:
        """Clean accuracy lost against the undefended victim."""
        return np.asarray(self.clean_DSR[self.defenses.index(UNDEFENDED)] - self.clean_DSR)

    def only(self, defenses: Sequence[int]) -> Matrix:
        """Some of the defenses, in that order."""
        chosen = list(defenses)
        return replace(
            self,
            defenses=tuple(self.defenses[d] for d in chosen),
            about=tuple(self.about[d] for d in chosen),
            clean_DSR=self.clean_DSR[chosen],
            asr_DSR=self.asr_DSR[chosen],
            base_DSR=self.base_DSR[chosen],
            cost_DSR=self.cost_DSR[chosen],
            status_DSR=self.status_DSR[chosen],
        )


NUMBERS = ("clean_top1", "asr_top1", "asr_clean_victim_top1", "relative_cost")
SQL = """
SELECT attack, rate_text, track, regime, model, target, defense, victim_seed,
       avg(clean_top1), avg(asr_top1), avg(asr_clean_victim_top1), avg(relative_cost),
       arg_max(status, CASE status WHEN 'ok' THEN 0 ELSE 1 END), min(asr_n),
       any_value(needs), any_value(phase), any_value(fidelity), bool_or(is_control), min(position)
FROM cells
WHERE is_planned AND eval_set = ? AND rate > 0
GROUP BY ALL
ORDER BY min(position), attack, rate_text, defense, victim_seed
"""


def load_matrix(tables: Tables, eval_set: str = "report") -> Matrix | None:
    """The cells of open results; None where no victim has a number yet."""
    rows = tables.query(SQL, eval_set).rows
    sound = {
        (Stratum(*row[:6]), row[7])
        for row in rows
        if row[6] == UNDEFENDED and row[12] == Status.OK and row[9] is not None
    }
    if not sound:
        return None
    return _arranged([row for row in rows if (Stratum(*row[:6]), row[7]) in sound])


def _arranged(rows: Sequence[tuple[Any, ...]]) -> Matrix:
    defenses = tuple(dict.fromkeys([UNDEFENDED, *(row[6] for row in rows)]))
    strata = tuple(dict.fromkeys(Stratum(*row[:6]) for row in rows))
    seeds = tuple(sorted({row[7] for row in rows}))
    place_D, place_S, place_R = (
        {name: i for i, name in enumerate(names)} for names in (defenses, strata, seeds)
    )
    shape = (len(defenses), len(strata), len(seeds))
    arrays = np.full((len(NUMBERS), *shape), np.nan)
    status_DSR = np.full(shape, Status.MISSING.value, dtype="U32")
    pictures_S = np.zeros(len(strata), dtype=np.int64)
    about: dict[str, About] = {}
    for row in rows:
        d, s, r = place_D[row[6]], place_S[Stratum(*row[:6])], place_R[row[7]]
        status_DSR[d, s, r] = row[12]
        if row[12] == Status.OK:
            arrays[:, d, s, r] = [np.nan if value is None else value for value in row[8:12]]
            pictures_S[s] = max(pictures_S[s], row[13] or 0)
        about.setdefault(row[6], About(tuple(row[14] or ()), row[15], row[16], bool(row[17])))
    clean, asr, base, cost = arrays
    described = tuple(about[name] for name in defenses)
    return Matrix(
        defenses,
        strata,
        seeds,
        ~np.isnan(asr[place_D[UNDEFENDED]]),
        described,
        clean,
        asr,
        base,
        cost,
        status_DSR,
        pictures_S,
    )
