"""Results directories with made-up numbers, as a grid of many defenses would have written them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from grid.schema.writing import write_grid, write_rows, write_table
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


def write_exhibits(folder: Path, cells: Mapping[str, str]) -> Path:
    """What a run keeps to be looked at, of these cells by their defense."""
    from victims.exhibits import png

    plain = np.zeros((3, 8, 8), dtype=np.uint8)
    stamped = plain.copy()
    stamped[:, 5:, 5:] = 255
    for defense, cell in cells.items():
        own = {"cell": cell, "written_at": EPOCH}
        spots = [("clean", 0.0, 0.0), ("triggered", 1.0, 0.0), ("target", 1.0, 1.0)]
        write_table(
            folder,
            "features",
            [
                {**own, "image": 3 * n + i, "label": 1, "projection": "pca"}
                | {"kind": kind, "x": x + n / 9, "y": y + n / 7}
                for n in range(3)
                for i, (kind, x, y) in enumerate(spots)
            ],
        )
        curve = [{**own, "epoch": e, "name": "clip", "value": 3.0 / e} for e in (1, 2, 3)]
        write_table(folder, "fits", curve)
        if defense == "none":
            shown = {
                "image": 0,
                "label": 1,
                "class_name": "cube",
                "clean": png(plain),
                "triggered": png(stamped),
            }
            write_table(folder, "pictures", [{**own, **shown}])
    return folder
