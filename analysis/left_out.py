"""What tiers are not over: attacks without an ASR, and those without a sound victim."""

from __future__ import annotations

from analysis.matrix import UNDEFENDED
from analysis.reader import Tables

# An attack that stamps nothing has its own metric; one that poisons by count has no rate.
WITHOUT_ASR = """
SELECT DISTINCT attack FROM cells
WHERE is_planned AND eval_set = ? AND defense = ? AND (rate > 0 OR rate IS NULL)
  AND (rate IS NULL OR (asr_top1 IS NULL AND hit_top1 IS NOT NULL))
ORDER BY 1
"""
WITHOUT_VICTIM = """
SELECT attack, rate_text FROM cells
WHERE is_planned AND eval_set = ? AND defense = ? AND rate > 0
GROUP BY ALL
HAVING NOT bool_or(status = 'ok') AND NOT bool_or(hit_top1 IS NOT NULL)
ORDER BY ALL
"""


def left_out(tables: Tables, eval_set: str = "report") -> tuple[str, ...]:
    """Attacks, at a rate where only that is left out, each with its reason."""
    none = [f"{name} (no ASR)" for (name,) in tables.query(WITHOUT_ASR, eval_set, UNDEFENDED).rows]
    rows = tables.query(WITHOUT_VICTIM, eval_set, UNDEFENDED).rows
    return (*none, *(f"{attack}@{rate} (no sound victim)" for attack, rate in rows))
