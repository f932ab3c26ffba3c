"""What a campaign reports: lines for people, and ``campaign.json``, what was asked and what every
search so far has come to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grid.schema.columns import SCHEMA_VERSION
from grid.schema.whole import write_whole
from grid.tuning.spec import Campaign
from grid.tuning.tuned import words

FILE = "campaign.json"


@dataclass(slots=True)
class SearchReport:
    """What one search did and chose."""

    defense: str
    objective: str
    oracle: bool
    search: str
    by: str
    trials: int = 0
    stopped: int = 0
    failed: int = 0
    replayed: int = 0
    lost: int = 0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    chosen: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    feasible: bool | None = None
    named: str | None = None
    file: str | None = None


@dataclass(slots=True)
class CampaignReport:
    """What a campaign did; also written as ``campaign.json``."""

    name: str
    searches: list[SearchReport]
    held_out: Path | None
    wall_seconds: float

    @property
    def short(self) -> list[str]:
        """The searches that a failing process or an early end left without some of their trials."""
        return [
            f"{one.defense}, {one.objective} ({one.lost} of {one.trials} trials)"
            for one in self.searches
            if one.lost
        ]

    def lines(self) -> list[str]:
        """What every search used of its budget, which is the same for all, and what it chose."""
        found = []
        for one in self.searches:
            counts = [f"{one.trials} trials"]
            counts += [f"{one.stopped} stopped"] if one.stopped else []
            counts += [f"{one.failed} failed"] if one.failed else []
            counts += [f"{one.replayed} known before"] if one.replayed else []
            mark = " (oracle)" if one.oracle else ""
            found.append(
                f"{one.defense}, {one.objective}{mark}: {', '.join(counts)},"
                f" {one.device_seconds:.0f} device seconds -> {one.named or 'nothing'}"
                f" {json.dumps(dict(one.settings)) if one.named else ''}".rstrip()
            )
        return found


def write_report(
    out: Path, campaign: Campaign, searches: Sequence[SearchReport], num_cells: int
) -> None:
    """``num_cells`` is how many cells the tuning attacks give every trial."""
    body = {
        "schema_version": SCHEMA_VERSION,
        "name": campaign.name,
        "hash": hashlib.sha256(campaign.text.encode()).hexdigest()[:12],
        "grid_hash": campaign.grid.identity_hash,
        "grid": campaign.grid.name,
        "tuning": {
            "attacks": list(campaign.tuning.attacks),
            "seeds": list(campaign.tuning.seeds),
            "cells": num_cells,
        },
        "held_out": {
            "attacks": list(campaign.held_out.attacks),
            "seeds": list(campaign.held_out.seeds),
        },
        "objectives": {
            label: {
                "sees": rule.sees.value,
                "minimise": rule.minimise,
                "maximise": rule.maximise,
                "ca_loss": None if rule.ca_loss is None else rule.ca_loss / 100,
                "rule": words(rule),
            }
            for label, rule in campaign.objectives.items()
        },
        "budget": asdict(campaign.budget),
        "searches": [asdict(one) for one in searches],
    }
    write_whole(out / FILE, json.dumps(body, indent=1))
