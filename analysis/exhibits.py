"""What a run kept to be looked at (``evaluate.exhibits``), as frames that figures are drawn from.

A cell may have been measured again: of its exhibits those written last are taken. One victim stands
for an attack: the gate's rate is not known here, so it is that of the most poisoned rows, of the
first seed.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from analysis.figures import Stamped
from analysis.reader import Tables
from analysis.words import amount

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

KINDS = ("pictures", "features", "rocs", "fits")
SHOWN = """
WITH sound AS (
    SELECT cell, attack, defense, count, rate_text, victim_seed, defense_seed, target, is_control,
           position
    FROM outcomes
    WHERE is_planned AND count > 0 AND status IN ('ok', 'inert', 'invalid_victim')
),
chosen AS (
    SELECT attack, arg_max(victim, (count, -seed, -nested, -place)) AS victim
    FROM (SELECT attack, count, victim_seed AS seed, defense_seed AS nested, min(position) AS place,
                 {'count': count, 'victim_seed': victim_seed, 'defense_seed': defense_seed,
                  'target': target} AS victim
          FROM sound WHERE defense = 'none' GROUP BY ALL)
    GROUP BY attack
)
SELECT sound.cell, sound.attack, sound.defense, sound.is_control, sound.position
FROM sound JOIN chosen ON chosen.attack = sound.attack
WHERE chosen.victim = {'count': sound.count, 'victim_seed': sound.victim_seed,
                       'defense_seed': sound.defense_seed, 'target': sound.target}
"""
"""The cells of one victim per attack."""


def features(tables: Tables) -> pd.DataFrame:
    """Places of image features, per attack: of its victim, and of what defenses made of it."""
    found = _frame(
        tables,
        "features",
        "attack, defense, position, image, kind, x, y, projection",
        "position, image, kind",
    )
    named = found["defense"].where(found["defense"] != "none", "victim")
    return found.assign(model=named).drop(columns=["defense", "position"])


def rocs(tables: Tables) -> pd.DataFrame:
    """Points of ROC curves, per attack and defense; of a defense's several scores each."""
    found = _frame(
        tables,
        "rocs",
        "attack, defense, score, false_positive, true_positive, auroc",
        "position, score, false_positive, true_positive",
    )
    has_name = found["score"] != ""
    named = found["defense"].where(~has_name, found["defense"] + ": " + found["score"])
    return found.assign(defense=named).drop(columns=["score"])


def fits(tables: Tables) -> pd.DataFrame:
    """What fits recorded epoch by epoch, per attack: of its victim and of the defenses."""
    found = _frame(tables, "fits", "attack, defense, epoch, name, value", "position, name, epoch")
    stage = found["defense"].where(found["defense"] != "none", "victim")
    return found.assign(stage=stage).drop(columns=["defense"])


def pictures(tables: Tables) -> list[Stamped]:
    """Pictures before and after each attack's trigger."""
    named = "coalesce(class_name, 'class ' || label) AS said"
    found = _frame(tables, "pictures", f"attack, {named}, clean, triggered", "position, image")
    return [
        Stamped(str(attack), _pixels(clean), _pixels(triggered), str(said))
        for attack, said, clean, triggered in zip(
            *(found[name] for name in ("attack", "said", "clean", "triggered")), strict=True
        )
    ]


def victims(tables: Tables) -> dict[str, str]:
    """By attack, of which victim exhibits are shown, in words."""
    rows = tables.query(
        f"WITH shown AS ({SHOWN}) SELECT outcomes.attack, rate, count, target,"  # noqa: S608
        " victim_seed, bool_or(outcomes.status = 'invalid_victim')"
        " FROM outcomes JOIN shown USING (cell) GROUP BY ALL"
    ).rows
    return {
        str(attack): f"{amount(rate, count)}, target {target}, victim seed {seed}"
        + (", invalid: it failed its gate" if is_invalid else "")
        for attack, rate, count, target, seed, is_invalid in rows
    }


def is_any(tables: Tables) -> bool:
    """Whether the run kept anything to be looked at."""
    return any(tables.query(f"SELECT 1 FROM {kind} LIMIT 1").rows for kind in KINDS)  # noqa: S608


def _frame(tables: Tables, kind: str, columns: str, order: str) -> pd.DataFrame:
    """A table of exhibits beside its cell's attack and defense."""
    import pandas as pd

    answer = tables.query(
        f"WITH shown AS ({SHOWN}) SELECT {columns} FROM (SELECT *, max(written_at)"  # noqa: S608
        f" OVER (PARTITION BY cell) AS newest FROM {kind}) JOIN shown USING (cell)"
        f" WHERE written_at = newest ORDER BY {order}"
    )
    return pd.DataFrame(answer.rows, columns=answer.columns)


def _pixels(data: object) -> npt.NDArray[np.uint8]:
    import numpy as np
    from PIL import Image

    assert isinstance(data, bytes | bytearray | memoryview)
    with Image.open(io.BytesIO(bytes(data)), formats=["PNG"]) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.uint8)
