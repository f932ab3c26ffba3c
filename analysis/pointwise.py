"""The pointwise worst case: a picture counts if any attack succeeds on it, at any rate."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from analysis.bounded import of_share
from analysis.inference import Floats, Mean
from analysis.matrix import Matrix
from analysis.reader import Tables
from analysis.seeds import over_strata

# A picture's own class is the target where both have one rank on all pictures of that class.
SQL = """
WITH chosen AS (
    SELECT cell, defense, track, regime, model, target, victim_seed, defense_seed, attack, rate_text
    FROM cells
    WHERE eval_set = ? AND is_planned AND status = 'ok' AND rate > 0 AND asr_top1 IS NOT NULL
),
pictures AS (
    SELECT chosen.*, image, triggered_target_rank = 0 AS is_fooled,
           bool_and(clean_true_rank = clean_target_rank) OVER (PARTITION BY samples.cell, label)
               AS is_of_target
    FROM newest_samples AS samples JOIN chosen USING (cell)
    WHERE samples.eval_set = ?
),
worst AS (
    SELECT defense, track, regime, model, target, victim_seed, defense_seed, image,
           bool_or(is_fooled) AS is_fooled, count(DISTINCT (attack, rate_text)) AS strata
    FROM pictures
    WHERE NOT is_of_target
    GROUP BY ALL
)
SELECT defense, track, regime, model, target, victim_seed,
       avg(is_fooled::INT), min(strata), count(DISTINCT image)
FROM worst
GROUP BY ALL
"""


def pointwise(tables: Tables, matrix: Matrix, eval_set: str = "report") -> dict[str, Mean]:
    """Defense -> the share of pictures on which an attack succeeds at any rate: per victim seed and
    kind of victim, then the mean over kinds. Of those alone that have their pictures on record for
    every sound victim: others had fewer attacks to survive."""
    kinds = list(dict.fromkeys(stratum[2:] for stratum in matrix.strata))
    of_kind = np.array([[stratum[2:] == kind for stratum in matrix.strata] for kind in kinds])
    wanted_KR = of_kind.astype(int) @ matrix.is_sound_SR.astype(int)
    place_K = {kind: k for k, kind in enumerate(kinds)}
    place_R = {seed: r for r, seed in enumerate(matrix.seeds)}
    shares: dict[str, Floats] = {}
    whole: dict[str, npt.NDArray[np.bool_]] = {}
    pictures: dict[str, int] = {}
    for defense, *kind, seed, share, strata, n in tables.query(SQL, eval_set, eval_set).rows:
        if tuple(kind) not in place_K or seed not in place_R:
            continue
        pictures[defense] = min(n, pictures.get(defense, n))
        k, r = place_K[tuple(kind)], place_R[seed]
        shares.setdefault(defense, np.full(wanted_KR.shape, np.nan))[k, r] = share
        of_own = whole.setdefault(defense, wanted_KR == 0)
        of_own[k, r] = strata == wanted_KR[k, r]
    return {
        defense: of_share(over_strata(np.where(wanted_KR > 0, share_KR, np.nan)), pictures[defense])
        for defense, share_KR in shares.items()
        if whole[defense].all()
    }
