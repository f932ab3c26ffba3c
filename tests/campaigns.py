"""A campaign file of seconds for tests: the tiny grid, two repairs, few trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from grid.registry import Source
from grid.tuning.file import decode_campaign
from grid.tuning.spec import Campaign
from tests.grids import TINY

GRID: Mapping[str, Any] = {
    **{name: value for name, value in TINY.items() if name not in ("name", "defenses", "seeds")},
    "attacks": [
        {"badnet": {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}},
        {"blended": {"alpha": 0.4}},
        {"sig": {"delta": 60}},
    ],
}
FILE: Mapping[str, Any] = {
    "name": "mini",
    "grid": GRID,
    "tuning": {"attacks": ["badnet", "blended"]},
    "held_out": {"attacks": ["sig"], "seeds": [1]},
    "defenses": [
        {
            "finetune": {
                "space": {
                    "recipe.lr": {"low": 1e-3, "high": 1e-2, "log": True},
                    "recipe.epochs": {"low": 1, "high": 3},
                }
            }
        }
    ],
    "budget": {"trials": 3},
}


def campaign_text(**changes: Any) -> str:
    body = {name: value for name, value in {**FILE, **changes}.items() if value is not None}
    return yaml.safe_dump(body, sort_keys=False)


def write_campaign_file(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mini.yaml"
    path.write_text(campaign_text(**changes))
    return path


def campaign(**changes: Any) -> Campaign:
    return decode_campaign(Source("mini", "mini.yaml", campaign_text(**changes)))
