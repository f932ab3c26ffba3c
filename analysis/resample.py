"""The bootstrap of a whole board: victim seeds are drawn anew inside every stratum, the same ones
for all defenses, and whatever is read off the board is read off every draw.

A drawn mean of R seeds varies by (R - 1) / R of what it should, so draws are stretched about what
was measured. A single seed cannot be drawn from: then pictures are, for each defense by itself and
by the normal curve, and the answer speaks of these alone.

Shapes: N draws, D defense, S stratum, R victim seed, A attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.inference import Floats, interquartile_mean
from analysis.matrix import Matrix
from analysis.stats import Point, hypervolume

DRAWS = 10_000
SEED = 20_260_101
TAIL = 2.5
# Clean accuracy may fall so far below the undefended victim's before it counts for nothing.
WORST_LOSS = 0.05
# Of statistics that sort every draw, so many draws are enough.
SORTED_DRAWS = 2_000


class Span(NamedTuple):
    """What was measured and the middle 95 % of the draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Draws of a matrix of defenses that were measured on every one of its victims."""

    matrix: Matrix
    draws: int = DRAWS
    seed: int = SEED

    @cached_property
    def speaks_of(self) -> str:
        """``seeds``, or ``pictures`` where a stratum has one seed alone."""
        return "seeds" if self._count_S.min() > 1 else "pictures"

    @cached_property
    def _count_S(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.matrix.is_sound_SR.sum(axis=1))

    @cached_property
    def _weight_NF(self) -> Floats:
        """How often each seed of each stratum was drawn, over the number of its seeds."""
        rng = np.random.default_rng([self.seed, self.draws])
        found = [
            rng.multinomial(count, np.full(count, 1 / count), self.draws) / count
            for count in self._count_S
        ]
        return np.concatenate(found, axis=1)

    def _flat_DF(self, values_DSR: Floats) -> Floats:
        """The seeds of all strata side by side."""
        return np.asarray(values_DSR[:, self.matrix.is_sound_SR])

    def _means_DS(self, values_DSR: Floats) -> Floats:
        return np.asarray(np.nanmean(np.where(self.matrix.is_sound_SR, values_DSR, np.nan), 2))

    def drawn(self, values_DSR: Floats, share_S: Floats, salt: int = 0) -> Floats:
        """Draws, by defense, of a sum over strata of means over seeds, each times its share.

        ``salt`` tells apart what is drawn of pictures.
        """
        mean_DS = self._means_DS(values_DSR)
        measured_D = mean_DS @ share_S
        if self.speaks_of == "pictures":
            rng = np.random.default_rng([self.seed, self.draws, salt])
            # As Agresti and Coull: two more of each kind, so that 0 of n has a spread.
            n_S = self.matrix.pictures_S + 4
            near_DS = (mean_DS * self.matrix.pictures_S + 2) / n_S
            spread_D = np.sqrt((near_DS * (1 - near_DS) / n_S) @ share_S**2)
            return measured_D + spread_D * rng.standard_normal((self.draws, len(measured_D)))
        stretch_S = share_S * np.sqrt(self._count_S / (self._count_S - 1))
        each_F = np.repeat(stretch_S, self._count_S)
        held = each_F != 0  # of an attack alone: its own strata
        found = self._weight_NF[:, held] @ (self._flat_DF(values_DSR) * each_F)[:, held].T
        return np.asarray(measured_D + found - mean_DS @ stretch_S)

    @cached_property
    def _all_S(self) -> Floats:
        return np.full(len(self.matrix.strata), 1 / len(self.matrix.strata))

    @cached_property
    def asr_ND(self) -> Floats:
        """Draws of the mean ASR over strata."""
        return self.drawn(self.matrix.asr_DSR, self._all_S, 1)

    @cached_property
    def clean_ND(self) -> Floats:
        """The same of clean accuracy."""
        return self.drawn(self.matrix.clean_DSR, self._all_S, 2)

    # --- what is read off the draws

    def ranks(self, score_ND: Floats | None = None) -> npt.NDArray[np.float64]:
        """Low and high rank by defense, 1 the smallest score; ties share the better rank."""
        score = self.asr_ND if score_ND is None else score_ND
        better = (score[:, None, :] < score[:, :, None] - 1e-12).sum(axis=2) + 1
        ends = np.percentile(better, [TAIL, 100 - TAIL], axis=0, method="nearest")
        return np.asarray(ends.T, dtype=float)

    def on_front(self) -> Floats:
        """The share of draws in which no other defense is as good in both accuracy and ASR and
        better in one, by defense."""
        clean, asr = self.clean_ND, self.asr_ND
        as_good = (clean[:, None] >= clean[:, :, None]) & (asr[:, None] <= asr[:, :, None])
        better = (clean[:, None] > clean[:, :, None]) | (asr[:, None] < asr[:, :, None])
        return np.asarray(1 - (as_good & better).any(axis=2).mean(axis=0))

    def worst(self) -> list[Span]:
        """The largest over attacks of the mean ASR over their strata. It is the maximum of noisy
        numbers: what was measured lies above what it estimates."""
        measured = self._means_DS(self.matrix.asr_DSR) @ self._attack_AS.T
        return _spans(measured.max(axis=1), self.worst_ND)

    @cached_property
    def worst_ND(self) -> Floats:
        found = np.full_like(self.asr_ND, -np.inf)
        for salt, share_S in enumerate(self._attack_AS):
            np.maximum(found, self.drawn(self.matrix.asr_DSR, share_S, 10 + salt), out=found)
        return found

    @cached_property
    def _attack_AS(self) -> Floats:
        """Rows that take the mean over an attack's strata."""
        attacks = list(dict.fromkeys(stratum.attack for stratum in self.matrix.strata))
        found = np.array([[s.attack == a for s in self.matrix.strata] for a in attacks], float)
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def interquartile(self) -> list[Span]:
        """The interquartile mean of ASR over strata and seeds."""
        rng = np.random.default_rng([self.seed, self.draws, 3])
        flat_DF = self._flat_DF(self.matrix.asr_DSR)
        starts_F = np.repeat(np.cumsum(self._count_S) - self._count_S, self._count_S)
        count_F = np.repeat(self._count_S, self._count_S)
        n_F = np.repeat(self.matrix.pictures_S, self._count_S) + 4
        draws = min(self.draws, SORTED_DRAWS)
        drawn_ND = np.empty((draws, len(flat_DF)))
        for n in range(draws):
            if self.speaks_of == "seeds":
                place_F = starts_F + (rng.random(len(count_F)) * count_F).astype(np.int64)
                values_DF = flat_DF[:, place_F]
            else:
                near_DF = (flat_DF * (n_F - 4) + 2) / n_F
                noise_DF = rng.standard_normal(flat_DF.shape)
                values_DF = flat_DF + np.sqrt(near_DF * (1 - near_DF) / n_F) * noise_DF
            drawn_ND[n] = interquartile_mean(values_DF)
        return _spans(interquartile_mean(flat_DF), drawn_ND)

    def volume(self, defenses: Sequence[int], undefended: int) -> Span:
        """Hypervolume of some defenses' (clean accuracy, 1 - ASR): from five points below the
        undefended victim's accuracy at full ASR, as a share of that box."""
        clean, asr = (
            np.nanmean(v, axis=(1, 2)) for v in (self.matrix.clean_DSR, self.matrix.asr_DSR)
        )

        def of(clean_D: Floats, asr_D: Floats) -> float:
            top = float(clean_D[undefended])
            points = [Point(float(clean_D[d]), 1 - float(asr_D[d])) for d in defenses]
            return hypervolume(points, Point(top - WORST_LOSS, 0.0), Point(top, 1.0))

        some = range(0, self.draws, max(1, self.draws // SORTED_DRAWS))
        drawn = [of(self.clean_ND[n], self.asr_ND[n]) for n in some]
        low, high = np.percentile(drawn, [TAIL, 100 - TAIL])
        return Span(of(clean, asr), float(low), float(high))


def _spans(measured_D: Floats, drawn_ND: Floats) -> list[Span]:
    low, high = np.percentile(drawn_ND, [TAIL, 100 - TAIL], axis=0)
    return [
        Span(float(v), max(0.0, float(lo)), min(1.0, float(hi)))
        for v, lo, hi in zip(measured_D, low, high, strict=True)
    ]
