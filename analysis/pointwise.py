"""The pointwise worst case: a picture counts if any attack of the board succeeds on it."""

from __future__ import annotations

import numpy as np

from analysis.inference import Mean, over_strata
from analysis.matrix import Matrix
from analysis.reader import Tables

# A picture's own class is the target where both have one rank on all pictures of that class.
SQL = """
WITH chosen AS (
    SELECT cell, defense, victim_seed, defense_seed
    FROM cells
    WHERE eval_set = ? AND is_planned AND status = 'ok' AND rate > 0 AND asr_top1 IS NOT NULL
),
pictures AS (
    SELECT chosen.*, image, triggered_target_rank = 0 AS is_fooled,
           bool_and(clean_true_rank = clean_target_rank) OVER (PARTITION BY samples.cell, label)
               AS is_of_target
    FROM samples JOIN chosen USING (cell)
    WHERE samples.eval_set = ?
),
worst AS (
    SELECT defense, victim_seed, defense_seed, image, bool_or(is_fooled) AS is_fooled
    FROM pictures
    WHERE NOT is_of_target
    GROUP BY ALL
)
SELECT defense, victim_seed, avg(is_fooled::INT)
FROM worst
GROUP BY ALL
"""


def pointwise(tables: Tables, matrix: Matrix, eval_set: str = "report") -> dict[str, Mean]:
    """Defense -> the share of pictures on which some attack succeeds, over victim seeds; of those
    that were measured on every sound victim, for others had fewer attacks to survive."""
    shares: dict[str, dict[int, float]] = {}
    for defense, seed, share in tables.query(SQL, eval_set, eval_set).rows:
        shares.setdefault(defense, {})[seed] = share
    whole = {d for i, d in enumerate(matrix.defenses) if matrix.coverage(i) == 1}
    return {
        defense: over_strata(np.array([[by_seed[seed] for seed in sorted(by_seed)]]))
        for defense, by_seed in shares.items()
        if defense in whole
    }
