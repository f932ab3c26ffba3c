"""What a campaign adds to its trials, and whether its driver grows with them.

A search of many settings on the embedded world at test size: first from nothing, then from a store
that holds all of it (every trial is found), then the same command again (every trial is known). The
time that a search adds is its wall time over the seconds of its stages on as many lanes. At last a
long search over two settings, whose trials do next to nothing: what the driver's memory does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from benchmarks.common import Figure, Figures, child, grid, lines

RECIPE = {"epochs": 1, "batch_size": 32, "lr": 2e-3, "warmup_steps": 2}
OPEN = {"asr": 0, "lift": -1, "clean_loss": 1}
SPLITS = ("public", "suspect", "clean", "tuning", "report", "shifted")
GRID: Mapping[str, Any] = {
    "data": {"world": {"size": 32, **dict.fromkeys(SPLITS, 64)}},
    "target": "circle",
    "rates": [0, 0.1],
    "attacks": [
        {"badnet": {"patch": 6, "cell": 2, "levels": 2, "place": "corner"}},
        {"sig": {"delta": 60}},
    ],
    "recipes": {"reference": RECIPE, "victim": RECIPE, "repair": RECIPE},
    "gate": {"strong": OPEN, "medium": OPEN, "init_loss": 1},
    "execution": {"lanes": 2, "device": "cpu", "threads": 1},
}
RATES = {"low": 1e-4, "high": 1e-2, "log": True}


def campaign_file(folder: Path, trials: int, space: Any) -> Path:
    """One search over a learning rate, of so many trials."""
    body = {
        "name": "bench",
        "grid": GRID,
        "tuning": {"attacks": ["badnet"]},
        "held_out": {"attacks": ["sig"]},
        "defenses": [{"finetune": {"space": {"recipe.lr": space}}}],
        "budget": {"trials": trials},
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def main(*, quick: bool = False) -> Figures:
    count, many = (6, 20) if quick else (100, 1000)
    found: Figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = campaign_file(folder, count, RATES)

        def tune(out: str) -> float:
            places = ("--out", str(folder / out), "--store", str(folder / "store"))
            return grid("tune", str(path), *places).seconds.wall

        fresh = tune("first")
        search, stages = _search_seconds(folder / "first"), _stage_seconds(folder / "first")
        found |= {
            "trials": Figure(value=count, unit="trials"),
            "from nothing": Figure(value=fresh, unit="s"),
            "of it the search": Figure(value=search, unit="s"),
            "stages of trials / 2 lanes": Figure(value=stages / 2, unit="s"),
            "added to a trial": Figure(value=(search - stages / 2) / count, unit="s"),
            "all found in the store": Figure(value=tune("second"), unit="s", at_most=60.0),
            "the same command again": Figure(value=tune("second"), unit="s", at_most=60.0),
        }
        done = child("-m", "benchmarks.campaign", "--memory", str(many), scratch)
    sizes: list[tuple[int, float]] = json.loads(done.out.splitlines()[-1])
    early, late = sizes[len(sizes) // 10], sizes[-1]
    return found | {
        "trials that do nothing": Figure(value=many, unit="trials"),
        f"driver at trial {early[0]}": Figure(value=early[1], unit="MB"),
        f"driver at trial {late[0]}": Figure(value=late[1], unit="MB"),
        "growth per 1,000 trials": Figure(
            value=1000 * (late[1] - early[1]) / max(1, late[0] - early[0]), unit="MB", at_most=50.0
        ),
    }


def _search_seconds(out: Path) -> float:
    (search,) = json.loads((out / "campaign.json").read_text())["searches"]
    return float(search["wall_seconds"])


def _stage_seconds(out: Path) -> float:
    """Of the stages that ran for trials: repairs and their measurements, but the default's."""
    tables = [pq.read_table(file) for file in (out / "stages").glob("*.parquet")]
    seconds = {r["key"]: r["seconds"] for table in tables for r in table.to_pylist()}
    records = [
        record
        for file in (out / "trials").glob("*.parquet")
        for record in pq.read_table(file).to_pylist()
        if record["record"] == "cell" and not record["is_default"]
    ]
    keys = {record[name] for record in records for name in ("defended_key", "measure_key")}
    return float(sum(seconds.get(key, 0.0) for key in keys))


def measure_memory(trials: int, folder: Path) -> list[tuple[int, float]]:
    """(trials ended, megabytes of this process), over a long search."""
    from grid.tuning.campaign import CampaignDriver
    from grid.tuning.file import load_campaign
    from victims.store import Store

    sizes: list[tuple[int, float]] = []

    class Watched(CampaignDriver):
        def _progress(self, report: Any, trials: Sequence[Any]) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append((len(trials), pages * os.sysconf("SC_PAGE_SIZE") / 1e6))

    path = campaign_file(folder, trials, [1e-3, 2e-3])
    store = Store(str(folder / "store"))
    Watched(load_campaign(str(path)), folder / "long", store, say=lambda line: None).run()
    return sizes


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(measure_memory(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        print("\n".join(lines("campaign", main(quick="--quick" in sys.argv))))
