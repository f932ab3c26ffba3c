"""What a cell's rows say of the cell itself."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from attacks.base import Aim
from defenses.base import fidelity_in, resolved_needs
from defenses.controls import NoDefense
from grid.spec import Cell, Grid


def describe_cell(cell: Cell, grid: Grid) -> dict[str, Any]:
    """The identity columns of a cell's rows.

    Chosen pictures have rows per target and in total, which one rate would mix up: it is null.
    """
    defense, regime = cell.defense.method, grid.regime
    rate: str | None = cell.rate
    if cell.count and cell.attack.counts is not None:
        counted = Decimal(cell.count) / grid.data.suspect
        is_rate = cell.attack.method.aim is not Aim.TARGETS
        rate = format(round(counted, 8).normalize(), "f") if is_rate else None
    return {
        "label": cell.label,
        "attack": cell.attack.label,
        "rate": None if rate is None else float(rate),
        "rate_text": rate,
        "defense": cell.defense.label,
        "needs": resolved_needs(defense, regime),
        "fidelity": fidelity_in(defense, regime).value,
        "phase": defense.acts().value,
        # The undefended victim stands among the defenses: every one of them is read against it.
        "is_control": defense.phase.value == "control" and not isinstance(defense, NoDefense),
        "victim_seed": cell.seed,
        "defense_seed": cell.defense_seed,
    }
