"""Results directories with made-up numbers, as a grid of many defenses would have written them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from grid.schema import write_grid, write_rows, write_table
from tests.rows import EPOCH, cell_columns, cell_rows

N = 1000
Number = Callable[[str, str, int], float]


def write_board(
    folder: Path,
    asr: Mapping[str, Number],
    *,
    attacks: Sequence[str] = ("badnet", "blended"),
    rates: Sequence[str] = ("0.01",),
    seeds: Iterable[int] = (0, 1, 2),
    clean: Mapping[str, Number] | None = None,
    status: Mapping[tuple[str, str, str, int], str] | None = None,
    name: str = "made",
    **more: Any,
) -> Path:
    """A grid of these defenses; ``status`` says how single cells (defense, attack, rate, seed)
    ended that are not ok."""
    rows: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    for attack in attacks:
        for rate in rates:
            for seed in seeds:
                for defense, number in asr.items():
                    given = (clean or {}).get(defense, steady(0.6))
                    ended = (status or {}).get((defense, attack, rate, seed), "ok")
                    cells.append(cell_columns(attack, rate, defense, seed, **more))
                    if ended == "missing":
                        continue
                    rows += cell_rows(
                        attack,
                        rate,
                        defense,
                        seed,
                        clean=given(attack, rate, seed),
                        asr=number(attack, rate, seed),
                        status=ended,
                        n=N,
                        **more,
                    )
    write_rows(folder, rows)
    write_grid(folder, name, "0123456789abcdef", cells)
    return folder


def steady(value: float, spread: float = 0.0, seed: int = 0) -> Number:
    """A number that victims differ about by so much."""

    def number(attack: str, rate: str, victim: int) -> float:
        dice = random.Random(f"{seed}/{value}/{attack}/{rate}/{victim}")
        return min(1.0, max(0.0, round(N * (value + dice.gauss(0, spread))) / N))

    return number


def write_pictures(
    folder: Path,
    cell: str,
    fooled: Sequence[bool],
    right: Sequence[bool],
    labels: Sequence[int],
    written_at: datetime = EPOCH,
) -> None:
    """What became of every picture of a cell; class 0 is the target."""
    write_table(
        folder,
        "samples",
        [
            {
                "cell": cell,
                "eval_set": "report",
                "written_at": written_at,
                "image": i,
                "label": label,
                "clean_prediction": label if is_right else label + 1,
                "triggered_prediction": 0 if is_fooled else label,
                "clean_true_rank": 0 if is_right else 1,
                "triggered_target_rank": 0 if is_fooled else 2,
                "clean_target_rank": (0 if is_right else 1) if label == 0 else 3,
            }
            for i, (is_fooled, is_right, label) in enumerate(
                zip(fooled, right, labels, strict=True)
            )
        ],
    )
