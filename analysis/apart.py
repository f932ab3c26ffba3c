"""Which defenses are told apart: by strata and by victim seeds, both.

Signed ranks over strata take strata to be independent. They are not, for a seed is one seed in
every stratum (it sets where training starts, and in which order): what it does to one of two equal
defenses leans all strata to one side, and signed ranks call that a difference. So the mean
difference must exceed what seeds vary it by as well, and what pictures allow. Either test alone is
corrected by Holm over all pairs; one seed tells nothing apart.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

from analysis.bounded import paired_p
from analysis.inference import (
    ALPHA,
    Floats,
    holm,
    rank_direction,
    separated,
    separated_by_draws,
)
from analysis.resample import Bootstrap
from analysis.seeds import seeds_p


def told_apart(
    asr_DSR: Floats, pictures: int = 0, alpha: float = ALPHA
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which pairs of defenses differ, and how many pairs there are; NaN is no victim. Every number
    is of so many pictures."""
    mean_DS = np.nanmean(asr_DSR, axis=2)
    differ, num_pairs = separated(mean_DS, alpha)
    pairs = list(combinations(range(len(asr_DSR)), 2))
    by_seeds = holm([seeds_p(asr_DSR[a] - asr_DSR[b], pictures) for a, b in pairs])
    for (a, b), p in zip(pairs, by_seeds, strict=True):
        if differ[a, b] and (p > alpha or contradicts(mean_DS[a] - mean_DS[b])):
            differ[a, b] = differ[b, a] = False
    return differ, num_pairs


def worst_told_apart(board: Bootstrap, alpha: float = ALPHA) -> tuple[npt.NDArray[np.bool_], int]:
    """The same of worst cases, by draws of victim seeds and by pictures."""
    worst_D, pictures = board.worst_D, board.matrix.pictures
    differ, num_pairs = separated_by_draws(board.worst_ND, worst_D, alpha)
    pairs = list(combinations(range(len(worst_D)), 2))
    by_pictures = holm([paired_p(float(worst_D[a] - worst_D[b]), pictures) for a, b in pairs])
    for (a, b), p in zip(pairs, by_pictures, strict=True):
        if pictures and p > alpha:
            differ[a, b] = differ[b, a] = False
    return differ, num_pairs


def contradicts(difference_S: Floats) -> bool:
    """Whether signed ranks and the mean over strata point to different sides."""
    return bool(rank_direction(list(difference_S)) * difference_S.mean() <= 0)
