"""A campaign as one would have been written: made-up trials that behave as tuned repairs do."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from grid.schema.columns import SCHEMA_VERSION
from grid.schema.writing import write_table
from tests.rows import EPOCH, trial_row

ATTACKS = {"badnet": 1.0, "blended": 1.25}
"""Attack -> how hard it is to forget."""
VICTIM_CA = 0.602
CA_LOSS = 0.02
NUM_EPOCHS = 8
OBJECTIVES: Mapping[str, dict[str, Any]] = {
    "tuned": {"sees": "attacks", "minimise": "worst_asr", "maximise": None, "ca_loss": CA_LOSS},
    "clean-only": {"sees": "clean", "minimise": None, "maximise": "change", "ca_loss": CA_LOSS},
}
SEES = {"oracle": "held_out", "simulated": "simulated"}
"""What an objective of another name sees, by how its name begins."""
DEFAULTS: Mapping[str, dict[str, Any]] = {
    "cleanclip": {"recipe.lr": 1e-5, "inmodal_weight": 1.0, "recipe.schedule": "cosine"},
    "finetune": {"recipe.lr": 1e-5, "recipe.weight_decay": 0.1, "recipe.schedule": "cosine"},
}
STRENGTH = {"cleanclip": 1.0, "finetune": 0.55}


class Ended(NamedTuple):
    """The records of a search and what is known of it at its end."""

    records: list[dict[str, Any]]
    told: dict[str, Any]


def suggest(defense: str, number: int, dice: random.Random) -> dict[str, Any]:
    """The default first, then settings drawn from a space as the search would."""
    if number == 0:
        return dict(DEFAULTS[defense])
    drawn = {"recipe.lr": 10 ** dice.uniform(-5.5, -2.3)}
    if defense == "cleanclip":
        drawn["inmodal_weight"] = 10 ** dice.uniform(-1, 1)
    else:
        drawn["recipe.weight_decay"] = 10 ** dice.uniform(-3, 0)
    return {**drawn, "recipe.schedule": dice.choice(["cosine", "constant"])}


def repaired(
    defense: str, settings: Mapping[str, Any], attack: str, epoch: int, dice: random.Random
) -> tuple[float, float]:
    """(clean accuracy, ASR) after some epochs: a strong repair forgets more of both."""
    strength = STRENGTH[defense] * (math.log10(settings["recipe.lr"]) + 5.5)
    strength *= settings.get("inmodal_weight", 1.0) ** 0.15
    strength *= 1.0 if settings["recipe.schedule"] == "cosine" else 1.15
    done = 1 - math.exp(-epoch / 2.5)
    lost = 0.055 * max(0.0, strength - 1.1) ** 2 * done - 0.002 * done
    asr = 0.985 / (1 + math.exp(3.2 * (strength * done / ATTACKS.get(attack, 1.1) - 1.0)))
    share = asr * 1.04 + dice.gauss(0, 0.012)
    return VICTIM_CA - lost + dice.gauss(0, 0.002), min(1.0, max(0.0, share))


def search_records(
    defense: str, objective: str, num_trials: int, seed: int, attacks: Sequence[str] = (*ATTACKS,)
) -> Ended:
    """One search: trial 3 and every fifth after it stop early, trial 6 fails."""
    dice = random.Random(f"{defense}/{objective}/{seed}")
    records: list[dict[str, Any]] = []
    for number in range(num_trials):
        settings = suggest(defense, number, dice)
        status = "failed" if number == 6 else "stopped" if number % 5 == 3 else "ok"
        shared = {
            "search": f"search-{defense}-{objective}",
            "defense": defense,
            "objective": objective,
            "trial": f"trial-{defense}-{objective}-{number}",
            "campaign": "tune-demo",
            "settings": json.dumps(settings),
            "started_at": EPOCH + timedelta(minutes=number),
        }
        records += _trial_records(number, status, settings, shared, attacks, dice)
    return Ended(records, _told(defense, objective, records))


def _trial_records(
    number: int,
    status: str,
    settings: Mapping[str, Any],
    shared: Mapping[str, Any],
    attacks: Sequence[str],
    dice: random.Random,
) -> list[dict[str, Any]]:
    defense = str(shared["defense"])
    last = {"ok": NUM_EPOCHS, "stopped": 3, "failed": 2}[status]
    begun = attacks if status == "ok" else attacks[:1]
    found, ends = [], []
    for cell, attack in enumerate(begun):
        about = {**shared, "cell": cell, "attack": attack, "rate_text": "0.01", "seed": 0}
        victim = {"victim_clean": VICTIM_CA, "victim_asr": 0.99 - 0.01 * cell}
        for epoch in range(1, last + 1):
            clean, asr = repaired(defense, settings, attack, epoch, dice)
            point = {**about, **victim, "clean_top1": clean, "asr_top1": asr, "epoch": epoch}
            found.append(trial_row(number, "epoch", **point, clean_n=2000, asr_n=1980))
        if status == "ok":
            end = trial_row(number, "cell", **{**point, "epoch": None}, device_seconds=2.4)
            found.append(end)
            ends.append(end)
    numbers: dict[str, Any] = {"device_seconds": 0.3 * last * len(begun)}
    if status == "ok":
        ca = sum(end["clean_top1"] for end in ends) / len(ends)
        asrs = [end["asr_top1"] for end in ends]
        numbers |= {"ca": ca, "ca_loss": VICTIM_CA - ca, "is_feasible": VICTIM_CA - ca <= CA_LOSS}
        numbers |= {"worst_asr": max(asrs), "mean_asr": sum(asrs) / len(asrs)}
        numbers["change"] = 0.07 + 0.05 * (1 - numbers["mean_asr"]) + max(0.0, VICTIM_CA - ca)
        clean_only = shared["objective"] == "clean-only"
        numbers["score"] = -numbers["change"] if clean_only else numbers["worst_asr"]
    why = {"ok": None, "stopped": "below the median after 3 epochs", "failed": "loss is not finite"}
    end = trial_row(number, "trial", **shared, **numbers, status=status, reason=why[status])
    return [*found, end]


def _told(defense: str, objective: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry of campaign.json."""
    ends = [record for record in records if record["record"] == "trial"]
    able = [end for end in ends if end.get("is_feasible")]
    best = min(able, key=lambda end: end["score"])
    named = f"{defense}@tune-demo" + ("" if objective == "tuned" else f"-{objective}")
    return {
        "defense": defense,
        "objective": objective,
        "oracle": objective == "oracle",
        "search": records[0]["search"],
        "by": "random",
        "trials": len(ends),
        "stopped": sum(end["status"] == "stopped" for end in ends),
        "failed": sum(end["status"] == "failed" for end in ends),
        "device_seconds": sum(end["device_seconds"] for end in ends),
        "chosen": best["trial"],
        "settings": json.loads(best["settings"]),
        "feasible": True,
        "named": named,
        "file": f"tuned/{named}.yaml",
    }


def _objective(name: str) -> dict[str, Any]:
    sees = next((sees for start, sees in SEES.items() if name.startswith(start)), "attacks")
    return OBJECTIVES.get(name, {**OBJECTIVES["tuned"], "sees": sees})


def campaign_file(searches: Sequence[Mapping[str, Any]], num_trials: int) -> dict[str, Any]:
    """What campaign.json says."""
    given = {str(search["objective"]): None for search in searches}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": "tune-demo",
        "hash": "fedcba9876543210",
        "grid": "demo-small",
        "tuning": {"attacks": list(ATTACKS), "seeds": [0], "cells": len(ATTACKS)},
        "held_out": {"attacks": ["sig"], "seeds": [1]},
        "objectives": {name: _objective(name) for name in given},
        "budget": {"trials": num_trials},
        "searches": list(searches),
    }


def write_campaign(
    folder: Path,
    defenses: Sequence[str] = tuple(DEFAULTS),
    objectives: Sequence[str] = tuple(OBJECTIVES),
    num_trials: int = 12,
    seed: int = 0,
) -> Path:
    """A whole campaign's directory; an objective called oracle sees the held-out attack."""
    told = []
    for defense in defenses:
        for objective in objectives:
            attacks = ("sig",) if objective == "oracle" else tuple(ATTACKS)
            ended = search_records(defense, objective, num_trials, seed, attacks)
            write_table(folder, "trials", ended.records)
            told.append(ended.told)
    text = json.dumps(campaign_file(told, num_trials))
    (folder / "campaign.json").write_text(text, encoding="utf-8")
    return folder
