"""The bootstrap of a whole board: victim seeds vary, the same for all defenses and strata, and
whatever is read off the board is read off every draw.

Three seeds drawn anew make ten boards, all too alike. So every seed's effect on the board
(`seed_effects`) is multiplied by a normal number, and each draw divided by the root of a
chi-square over its degrees of freedom: a draw of a mean then follows the t interval of seeds, and
draws of several numbers keep what these have in common. A single seed cannot be varied: then
pictures are, for each defense by itself and by the normal curve, and the answer speaks of these
alone.

Shapes: N draws, D defense, S stratum, R victim seed, A attack.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.bounded import of_share
from analysis.inference import Floats, Span, interquartile_mean
from analysis.matrix import Matrix
from analysis.seeds import over_strata, seed_effects, seed_freedom
from analysis.stats import Point, hypervolume

DRAWS = 10_000
SEED = 20_260_101
TAIL = 2.5
# Clean accuracy may fall so far below the undefended victim's before it counts for nothing.
WORST_LOSS = 0.05
# Of statistics that sort every draw, so many draws are enough.
SORTED_DRAWS = 2_000
NOISE = 1e-12


class Volume(NamedTuple):
    """A hypervolume as measured, and by how much draws of the board exceed that on average: about
    as much as it exceeds what it estimates, or less."""

    value: float
    optimism: float


@dataclass(frozen=True)
class Bootstrap:
    """Draws of a matrix of defenses that have a number on every one of its victims."""

    matrix: Matrix
    draws: int = DRAWS
    seed: int = SEED

    @cached_property
    def speaks_of(self) -> str:
        """``seeds``, or ``pictures`` where no stratum has several."""
        return "seeds" if self.freedom else "pictures"

    @cached_property
    def freedom(self) -> int:
        """Degrees of freedom between victim seeds."""
        return seed_freedom(self.matrix.is_sound_SR)

    @cached_property
    def _multiplier_NR(self) -> Floats:
        """What each seed's effect is multiplied by."""
        rng = np.random.default_rng([self.seed, self.draws])
        normal_NR = rng.standard_normal((self.draws, len(self.matrix.seeds)))
        chance_N = rng.chisquare(self.freedom, self.draws) / self.freedom
        return np.asarray(normal_NR / np.sqrt(chance_N)[:, None])

    def _masked(self, values_DSR: Floats) -> Floats:
        return np.where(self.matrix.is_sound_SR, values_DSR, np.nan)

    def _means_DS(self, values_DSR: Floats) -> Floats:
        return np.asarray(np.nanmean(self._masked(values_DSR), axis=2))

    def drawn(self, values_DSR: Floats, share_S: Floats, salt: int = 0) -> Floats:
        """Draws, by defense, of a sum over strata of means over seeds, each times its share.

        ``salt`` tells apart what is drawn of pictures.
        """
        mean_DS = self._means_DS(values_DSR)
        measured_D = mean_DS @ share_S
        if self.speaks_of == "pictures":
            spread_D = np.sqrt(self._picture_variance(mean_DS) @ share_S**2)
            return measured_D + spread_D * self._normal_ND(salt)
        effect_DR = np.einsum("dsr,s->dr", seed_effects(self._masked(values_DSR)), share_S)
        return np.asarray(measured_D + self._multiplier_NR @ effect_DR.T)

    def _normal_ND(self, salt: int) -> Floats:
        """Each defense's own dice, whoever it is compared with."""
        keys = [zlib.crc32(name.encode()) for name in self.matrix.defenses]
        return np.stack(
            [
                np.random.default_rng([self.seed, self.draws, salt, key]).standard_normal(
                    self.draws
                )
                for key in keys
            ],
            axis=1,
        )

    def _picture_variance(self, mean_DS: Floats) -> Floats:
        # As Agresti and Coull: two more of each kind, so that 0 of n has a spread.
        n_S = self.matrix.pictures_S + 4
        near_DS = (mean_DS * self.matrix.pictures_S + 2) / n_S
        return np.asarray(near_DS * (1 - near_DS) / n_S)

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
        ordered = np.sort(score, axis=1)
        rank_ND = np.empty(score.shape, dtype=np.int32)
        for n, row in enumerate(score):
            rank_ND[n] = np.searchsorted(ordered[n], row - NOISE) + 1
        ends = np.percentile(rank_ND, [TAIL, 100 - TAIL], axis=0, method="nearest")
        return np.asarray(ends.T, dtype=float)

    def on_front(self) -> Floats:
        """The share of draws in which no other defense is as good in both accuracy and ASR and
        better in one, by defense."""
        order_ND = np.lexsort((self.asr_ND, -self.clean_ND), axis=1)
        clean, asr = (np.take_along_axis(v, order_ND, axis=1) for v in (self.clean_ND, self.asr_ND))
        least = np.minimum.accumulate(asr, axis=1)
        # The first of those that have the least ASR so far: of these it is the most accurate.
        is_record = np.ones_like(asr, dtype=bool)
        is_record[:, 1:] = asr[:, 1:] < least[:, :-1]
        place = np.maximum.accumulate(np.where(is_record, np.arange(asr.shape[1]), 0), axis=1)
        twin = (asr == least) & (clean == np.take_along_axis(clean, place, axis=1))
        found = np.empty_like(twin)
        np.put_along_axis(found, order_ND, twin, axis=1)
        return np.asarray(found.mean(axis=0))

    def worst(self) -> list[Span]:
        """The largest over attacks of the mean ASR over their strata. It is the maximum of noisy
        numbers: what was measured lies above what it estimates. So the interval is as wide as all
        attacks' together: a maximum is off by no more than the one that is off most."""
        if len(self._attack_AS) == 1 and self.freedom:  # no maximum: the mean, and its t interval
            means = map(over_strata, self._masked(self.matrix.asr_DSR))
            found = [Span(*mean[:3]) for mean in means]
        else:
            half_D = np.percentile(self._worst[1], 100 - 2 * TAIL, axis=0)
            found = [
                Span(float(v), float(v - half), float(v + half))
                for v, half in zip(self.worst_D, half_D, strict=True)
            ]
        return [of_share(span, self.matrix.pictures) for span in found]

    @property
    def worst_D(self) -> Floats:
        """The largest over attacks, as measured."""
        return np.asarray((self._means_DS(self.matrix.asr_DSR) @ self._attack_AS.T).max(axis=1))

    @property
    def worst_ND(self) -> Floats:
        """Draws of the largest over attacks."""
        return self._worst[0]

    @cached_property
    def _worst(self) -> tuple[Floats, Floats]:
        """Draws of the largest over attacks, and of how far the one off most is off."""
        mean_DS = self._means_DS(self.matrix.asr_DSR)
        largest = np.full((self.draws, len(mean_DS)), -np.inf)
        furthest = np.zeros_like(largest)
        for salt, share_S in enumerate(self._attack_AS):
            found = self.drawn(self.matrix.asr_DSR, share_S, 10 + salt)
            np.maximum(largest, found, out=largest)
            np.maximum(furthest, np.abs(found - mean_DS @ share_S), out=furthest)
        return largest, furthest

    @cached_property
    def _attack_AS(self) -> Floats:
        """Rows that take the mean over an attack's strata."""
        attacks = list(dict.fromkeys(stratum.attack for stratum in self.matrix.strata))
        found = np.array([[s.attack == a for s in self.matrix.strata] for a in attacks], float)
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def interquartile(self) -> list[Span]:
        """The interquartile mean of ASR over strata and seeds; a draw shifts whole strata."""
        asr_DSR = self._masked(self.matrix.asr_DSR)
        sound = self.matrix.is_sound_SR
        draws = min(self.draws, SORTED_DRAWS)
        mean_DS = self._means_DS(asr_DSR)
        effect_DSR = seed_effects(asr_DSR)
        spread_DS = np.sqrt(self._picture_variance(mean_DS))
        rng = np.random.default_rng([self.seed, self.draws, 3])
        drawn_ND = np.empty((draws, len(asr_DSR)))
        for n in range(draws):
            if self.speaks_of == "seeds":
                shift_DS = effect_DSR @ self._multiplier_NR[n]
            else:
                shift_DS = spread_DS * rng.standard_normal(spread_DS.shape)
            drawn_ND[n] = interquartile_mean((asr_DSR + shift_DS[..., None])[:, sound])
        found = _spans(interquartile_mean(asr_DSR[:, sound]), drawn_ND)
        return [of_share(span, self.matrix.pictures) for span in found]

    def volume(self, defenses: Sequence[int], undefended: int) -> Volume:
        """Hypervolume of some defenses' (clean accuracy, 1 - ASR): from five points below the
        undefended victim's accuracy at full ASR, as a share of that box.

        Whatever noise makes the best of several counts for it, so what was measured lies above
        what it estimates, and an interval of draws, which lie above that again, would not cover.
        """

        def of(clean_D: Floats, asr_D: Floats) -> float:
            top = float(clean_D[undefended])
            points = [Point(float(clean_D[d]), 1 - float(asr_D[d])) for d in defenses]
            return hypervolume(points, Point(top - WORST_LOSS, 0.0), Point(top, 1.0))

        some = range(0, self.draws, max(1, self.draws // SORTED_DRAWS))
        drawn = [of(self.clean_ND[n], self.asr_ND[n]) for n in some]
        measured = of(
            self._means_DS(self.matrix.clean_DSR) @ self._all_S,
            self._means_DS(self.matrix.asr_DSR) @ self._all_S,
        )
        return Volume(measured, max(0.0, float(np.mean(drawn)) - measured))


def _spans(measured_D: Floats, drawn_ND: Floats) -> list[Span]:
    """Intervals of draws; what was measured lies in its own."""
    low, high = np.percentile(drawn_ND, [TAIL, 100 - TAIL], axis=0)
    return [
        Span(float(v), min(float(lo), float(v)), max(float(hi), float(v)))
        for v, lo, hi in zip(measured_D, low, high, strict=True)
    ]
