"""The cells of a grid as arrays: what comparisons over attacks, rates and seeds are made of.

Shapes: D defense, S stratum (an attack at a rate, on one target and kind of victim), R victim seed.
Defense seeds are averaged inside their victim seed, which is the replicate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from analysis.inference import Floats
from analysis.reader import Tables
from grid.schema.errors import no_such
from grid.schema.status import Status

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


def kinds_of(strata: Sequence[Stratum]) -> list[str]:
    """What tells strata apart besides attack and rate, in words; empty where nothing does."""
    several = [name for name in Stratum._fields[2:] if len({getattr(s, name) for s in strata}) > 1]
    return [", ".join(str(getattr(s, name)) for name in several) for s in strata]


class About(NamedTuple):
    """What a defense is given, and how."""

    needs: tuple[str, ...]
    phase: str
    fidelity: str
    is_control: bool
    is_oracle: bool = False
    """Its settings were chosen by looking at what no defender sees."""
    is_seen: bool = False
    """Its settings were chosen on attacks of this board."""
    added_later: bool = False
    """It has cells that joined the grid after its first run."""

    @property
    def is_beside(self) -> bool:
        """Whether it stands beside what is compared."""
        return self.is_control or self.is_oracle


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

    @property
    def pictures(self) -> int:
        """Of how many pictures every ASR is at the least; 0 where none is known."""
        return int(min(self.pictures_S, default=0))

    def index(self, defense: str) -> int:
        """Where a defense stands; a name that is not there is refused."""
        if defense not in self.defenses:
            raise no_such("defense", defense, self.defenses, " on this board")
        return self.defenses.index(defense)

    def applies_SR(self, defense: int) -> npt.NDArray[np.bool_]:
        """The sound victims that the defense can be run on at all."""
        return np.asarray(self.is_sound_SR & ~np.isin(self.status_DSR[defense], NOT_ITS_FAULT))

    def coverage(self, defense: int) -> float:
        """The share of the sound victims that it can be run on with numbers of the defense."""
        wanted = self.applies_SR(defense)
        has = ~np.isnan(self.asr_DSR[defense]) & wanted
        return float(has.sum() / wanted.sum()) if wanted.any() else 0.0

    def failures(self, defense: int) -> int:
        """Cells in which the method itself failed: an outcome, and no gap."""
        return int((self.status_DSR[defense] == Status.FAILED_METHOD.value).sum())

    def has_failed_DSR(self) -> npt.NDArray[np.bool_]:
        """The sound victims of which a method failed to make anything."""
        failed_DSR = self.status_DSR == Status.FAILED_METHOD.value
        return np.asarray(failed_DSR & np.isnan(self.asr_DSR) & self.is_sound_SR)

    def loss_DSR(self) -> Floats:
        """Clean accuracy lost against the undefended victim."""
        return np.asarray(self.clean_DSR[self.defenses.index(UNDEFENDED)] - self.clean_DSR)

    def gaps(self, defense: int) -> npt.NDArray[np.bool_]:
        """The sound victims of which the defense has no number."""
        return np.asarray(self.is_sound_SR & np.isnan(self.asr_DSR[defense]))

    def filled(self, defenses: Sequence[int], chance: float) -> Matrix:
        """Some of the defenses with a number for every sound victim, so that all can be ranked on
        the same ones.

        Where a method failed, or cannot be run, nothing is defended: its ASR is the undefended
        one's, and of a failure accuracy is that of guessing. What the machines lost is taken to
        be as the other victims of its stratum, where there are any.
        """
        none = self.index(UNDEFENDED)
        asr_DSR, clean_DSR = self.asr_DSR.copy(), self.clean_DSR.copy()
        for d in defenses:
            failed = self.gaps(d) & (self.status_DSR[d] == Status.FAILED_METHOD.value)
            off = self.gaps(d) & ~self.applies_SR(d)
            lost = self.gaps(d) & ~failed & ~off
            asr_SR, clean_SR = self.asr_DSR[d], self.clean_DSR[d]
            has = (~np.isnan(asr_SR) & self.is_sound_SR).any(axis=1, keepdims=True)
            alike = lost & has
            for values, own, undefended in (
                (asr_DSR, asr_SR, self.asr_DSR[none]),
                (clean_DSR, clean_SR, self.clean_DSR[none]),
            ):
                mean_S = _mean_over_seeds(np.where(self.is_sound_SR, own, np.nan))
                values[d] = np.where(
                    alike, mean_S[:, None], np.where(failed | off | lost, undefended, own)
                )
            clean_DSR[d][failed] = chance
        return replace(self, asr_DSR=asr_DSR, clean_DSR=clean_DSR).only(defenses)

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


def _mean_over_seeds(values_SR: Floats) -> Floats:
    """Means of what is there; NaN where nothing is."""
    there = ~np.isnan(values_SR)
    total = np.where(there, values_SR, 0.0).sum(axis=1)
    return np.asarray(np.where(there.any(axis=1), total / np.maximum(there.sum(axis=1), 1), np.nan))


NUMBERS = ("clean_top1", "asr_top1", "asr_clean_victim_top1", "relative_cost")
SQL = """
SELECT attack, rate_text, track, regime, model, target, defense, victim_seed,
       avg(clean_top1), avg(asr_top1), avg(asr_clean_victim_top1), avg(relative_cost),
       arg_max(status, CASE status WHEN 'ok' THEN 0 ELSE 1 END), min(asr_n),
       any_value(needs), any_value(phase), any_value(fidelity), bool_or(is_control), min(position),
       any_value(tuned), bool_or(added_later)
FROM cells
WHERE is_planned AND eval_set = ? AND rate > 0
GROUP BY ALL
ORDER BY min(position), attack, rate_text, defense, victim_seed
"""


_loaded: WeakKeyDictionary[Tables, dict[str, Matrix | None]] = WeakKeyDictionary()


def load_matrix(tables: Tables, eval_set: str = "report") -> Matrix | None:
    """The cells of open results, which do not change; None where no victim has a number yet."""
    known = _loaded.setdefault(tables, {})
    if eval_set not in known:
        known[eval_set] = _load(tables, eval_set)
    return known[eval_set]


def _load(tables: Tables, eval_set: str) -> Matrix | None:
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
        known = about.get(row[6], About(tuple(row[14] or ()), row[15], row[16], bool(row[17])))
        tuned = json.loads(row[19] or "{}")
        about[row[6]] = known._replace(
            is_oracle=known.is_oracle or bool(tuned.get("oracle")),
            is_seen=known.is_seen or bool(tuned.get("seen")),
            added_later=known.added_later or bool(row[20]),
        )
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
