"""How close the driver's order comes to the best possible one, on up to 1,024 devices.

A simulation: the stages of the papers' grid take the seconds of ``paper_times.json``, every lane
holds one stage, and nothing else costs time. The corpora and the public model, which the papers
download, are there. The makespan stands beside the lower bound ``max(longest chain, work/lanes)``.
Three orders are compared: the driver's; the same, where a gate counts nothing that waits for its
verdict; and the order of the grid file. ``off`` is the driver's where stages take other seconds
than estimated.

``python -m benchmarks.schedule --record`` writes the seconds anew, from the board of preset papers
that the documents show; what a board does not say is an estimate, and said to be one.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from benchmarks.common import Figure, Figures
from grid.gridfile import decode_grid, load_grid
from grid.history import DEFAULT_RATE, History
from grid.order import Inputs, chains, lower_bound, priorities, simulate, waits_of
from grid.plan import Plan
from grid.planning import make_plan
from grid.registry import Source, grid_source
from grid.stage_order import longest_chain
from victims.keys import Key

TIMES = Path(__file__).with_name("paper_times.json")
BOARD = Path(__file__).parents[1] / "docs" / "papers-board.json"
LANES = (8, 32, 128, 512, 1024)
# Seconds of what no board tells: crafting triggers, and all that is short.
ESTIMATES = {
    **DEFAULT_RATE,
    **{"trigger:badclip": 20.0, "trigger:trojvqa_optimised": 12.0, "trigger:ssba": 60.0},
}
SPREAD = 0.3
ALONE = ", gates not counted"


def papers_grid(attacks: int | None, rates: int, seeds: int) -> Plan:
    """The attacks of preset attacks x rates x the defenses and recipes of preset papers x seeds."""
    papers, wide = (yaml.safe_load(grid_source(name).text) for name in ("papers", "attacks"))
    body = {
        **papers,
        "attacks": wide["attacks"][:attacks],
        "data": wide["data"],
        "rates": [0, 0.01, 0.003, 0.03, 0.001][:rates],
        "seeds": list(range(seeds)),
    }
    text = yaml.safe_dump(body, sort_keys=False)
    return make_plan(decode_grid(Source("papers-full", "the papers' full grid", text)))


def rates_of(table: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per unit of work by family: what was measured goes over what is estimated."""
    return {**table["estimated"], **table["measured"]}


def record() -> dict[str, Any]:
    """Seconds per unit of work, of the defenses and victims on the board of preset papers."""
    board = json.loads(BOARD.read_text("utf-8"))
    plan = make_plan(load_grid("papers"))
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    victims = []
    for row in board["rows"]:
        if row["cost_seconds"]:
            spent[row["attack"], row["defense"]].append(row["cost_seconds"])
            victims.append(row["cost_seconds"] / row["relative_cost"])
    found: dict[str, list[float]] = defaultdict(list)
    for cell in plan.cells:
        stage, label = cell.measure.defended, (cell.cell.attack.label, cell.cell.defense.label)
        if label in spent and stage.work > 0.01:
            found[stage.family].append(fmean(spent[label]) / stage.work)
    victim = plan.cells[0].victim
    found[victim.family] = [seconds / victim.work for seconds in victims]
    measured = {family: round(fmean(rates), 4) for family, rates in sorted(found.items())}
    return {
        "made": {**board["made"], "grid": board["grid"]["hash"], "from": BOARD.name},
        "measured": measured,
        "estimated": {name: ESTIMATES[name] for name in sorted(ESTIMATES)},
    }


def main(
    *,
    quick: bool = False,
    attacks: int | None = None,
    rates: int = 4,
    seeds: int = 5,
    lanes: tuple[int, ...] = LANES,
) -> Figures:
    """Makespan over the lower bound, on each number of lanes."""
    if quick:
        attacks, rates, seeds = attacks or 4, 2, 1
    plan = papers_grid(attacks, rates, seeds)
    history = History(None)
    history.rates = rates_of(json.loads(TIMES.read_text("utf-8")))
    public = {cell.victim.init.key for cell in plan.cells if cell.victim.init}
    waits = waits_of(plan, public | {k for k, s in plan.stages.items() if s.kind == "corpus"})
    seconds = {key: history.seconds(plan.stages[key]) for key in waits}
    figures = {
        "cells": Figure(value=len(plan.cells), unit="cells"),
        "stages": Figure(value=len(waits), unit="stages"),
        "victims": Figure(value=plan.num_victims(), unit="victims"),
        "work": Figure(value=sum(seconds.values()) / 3600, unit="h"),
        "longest chain": Figure(value=max(chains(waits, seconds).values()) / 3600, unit="h"),
    }
    for number in lanes:
        figures |= _compared(plan, waits, seconds, number)
    return figures


def _compared(plan: Plan, waits: Inputs, seconds: Mapping[Key, float], lanes: int) -> Figures:
    """The orders against the bound, on that many lanes."""
    stages = {key: plan.stages[key] for key in waits}
    driver, alone = priorities(plan, stages, seconds), longest_chain(stages, seconds)
    listed = {key: -float(place) for place, key in enumerate(waits)}
    best = lower_bound(waits, seconds, lanes)
    taken = {
        "": simulate(waits, seconds, driver, lanes).makespan / best,
        ALONE: simulate(waits, seconds, alone, lanes).makespan / best,
        ", as listed": simulate(waits, seconds, listed, lanes).makespan / best,
    }
    factors = np.random.default_rng(lanes).lognormal(-(SPREAD**2) / 2, SPREAD, len(seconds))
    actual = {key: seconds[key] * float(f) for key, f in zip(seconds, factors, strict=True)}
    off = simulate(waits, actual, driver, lanes).makespan / lower_bound(waits, actual, lanes)
    figures = {f"{lanes} lanes: lower bound": Figure(value=best / 3600, unit="h")}
    for name, ratio in taken.items():
        aim = None if name else 1.05
        figures[f"{lanes} lanes: makespan / bound{name}"] = Figure(
            value=ratio, unit="x", at_most=aim
        )
    figures[f"{lanes} lanes: makespan / bound, off"] = Figure(value=off, unit="x")
    return figures


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(
            "python -m benchmarks.schedule --record; the figures: python -m benchmarks schedule"
        )
    TIMES.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n", "utf-8")
    print(f"{TIMES} written")
