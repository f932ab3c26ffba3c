"""The settings that a search chose, as a named defense: a file with its provenance, which an entry
of a grid file names, and the grid that tries all chosen ones on held-out attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from defenses.base import Between, OneOf
from grid.results import commit, versions
from grid.schema.whole import write_whole
from grid.spec import Tuned
from grid.tuning.file import with_values
from grid.tuning.spec import Campaign, Objective, Searched, Sees

FOLDER, HELD_OUT = "tuned", "held-out.yaml"


def tuned_entry(
    campaign: Campaign,
    searched: Searched,
    objective: str,
    chosen: Mapping[str, Any],
    counts: Mapping[str, float],
    search: str,
) -> Tuned:
    """The named defense of one search."""
    import json

    rule = campaign.objectives[objective]
    values = json.loads(str(chosen["settings"]))
    return Tuned(
        name=campaign.named(searched.label, objective),
        defense=searched.name,
        settings=with_values(searched.given, values),
        campaign=campaign.name,
        objective=objective,
        rule=words(rule),
        oracle=rule.is_oracle,
        attacks=seen_attacks(campaign, rule),
        trials=int(counts["trials"]),
        device_seconds=float(counts["device_seconds"]),
        feasible=bool(chosen["is_feasible"]),
        found={name: chosen[name] for name in ("ca", "ca_loss", "worst_asr", "mean_asr")},
        made={
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": json.loads(versions()),
            "trial": chosen["trial"],
            "search": search,
            "by": campaign.search.by.value,
            "seed": campaign.search.seed,
            "space": {name: _plain_dimension(d) for name, d in searched.space.items()},
            "seeds": list(campaign.tuning.seeds),
            "is_default": bool(chosen["is_default"]),
            "recipe": _recipe_of(searched, values),
        },
    )


def _recipe_of(searched: Searched, values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole recipe behind the settings: a grid with another one makes other models of them."""
    changed = {n.removeprefix("recipe."): v for n, v in values.items() if n.startswith("recipe.")}
    return {**asdict(searched.entry.recipe), **changed}


def _plain_dimension(dimension: Between | OneOf) -> Any:
    if isinstance(dimension, OneOf):
        return list(dimension.values)
    return {"low": dimension.low, "high": dimension.high, "log": dimension.log}


def words(rule: Objective) -> str:
    """An objective in a line."""
    what = f"minimise {rule.minimise}" if rule.minimise else f"maximise {rule.maximise}"
    limit = (
        f", at most {rule.ca_loss:g} points of accuracy lost" if rule.ca_loss is not None else ""
    )
    return f"{what}{limit}; sees {rule.sees.value.replace('_', '-')}"


def seen_attacks(campaign: Campaign, rule: Objective) -> tuple[str, ...]:
    """The attacks that a search could see the success of, on victims of the grid or its own."""
    if rule.sees is Sees.SIMULATED and campaign.simulate is not None:
        return campaign.simulate.attacks
    if rule.sees is Sees.ATTACKS:
        return campaign.tuning.attacks
    return campaign.held_out.attacks if rule.sees is Sees.HELD_OUT else ()


def write_tuned(out: Path, tuned: Tuned) -> Path:
    path = out / FOLDER / f"{tuned.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"# {tuned.defense} with the settings that campaign {tuned.campaign} chose:"
        f" {tuned.rule}.\n# In a grid file: - {tuned.defense}: {{tuned: {path.name}}}\n"
    )
    write_whole(path, head + _dump(_plain(tuned)))
    return path


def write_held_out(
    out: Path, campaign: Campaign, found: Sequence[Tuned], say: Callable[[str], None]
) -> Path | None:
    """The grid file that tries every chosen setting, and the defaults, on what was held out; None
    where nothing was chosen."""
    if not found:
        return None
    labels = [entry.label for entry in campaign.grid.attacks]
    attacks = [
        item
        for label, item in zip(labels, campaign.plain["attacks"], strict=True)
        if label in campaign.held_out.attacks
    ]
    given = {name: value for name, value in campaign.plain.items() if name != "attacks"}
    if campaign.held_out.rates is not None:
        attacks = [_without_rates(item) for item in attacks]
        clean = [0] if any(float(rate) == 0 for rate in given["rates"]) else []
        given["rates"] = [*clean, *(float(rate) for rate in campaign.held_out.rates)]
    defenses: list[Any] = ["none"]
    for searched in campaign.defenses:
        defenses.append({searched.name: dict(searched.given)} if searched.given else searched.name)
        defenses += [
            {tuned.defense: {"tuned": _plain(tuned)}}
            for tuned in found
            if tuned.name.partition("@")[0] == searched.label
        ]
    weights = campaign.grid.weights
    if weights is not None and not weights.tag:
        # It is written beside another file than the one that its path was relative to.
        given["model"] = {**given["model"], "pretrained": weights.path}
    body = {
        "name": f"{campaign.name}-held-out",
        "description": f"what campaign {campaign.name} chose, on attacks and seeds held out of it",
        **given,
        "attacks": attacks,
        "seeds": list(campaign.held_out.seeds),
        "defenses": defenses,
    }
    path, text = out / HELD_OUT, f"# Written by: grid tune {campaign.source}\n{_dump(body)}"
    changed = path.exists() and _chosen_in(path.read_text(encoding="utf-8")) != _chosen_in(text)
    if changed and any((out / "held-out" / "rows").glob("*.parquet")):
        say(
            "other settings are chosen now than were tried on the held-out attacks before. Whoever"
            " looks at what is held out again and again tunes on it: say so beside the numbers."
        )
    write_whole(path, text)
    return path


def _without_rates(item: Any) -> Any:
    """An attack's entry without rates of its own."""
    if not isinstance(item, dict):
        return item
    return {
        name: {n: v for n, v in (fields or {}).items() if n not in ("rates", "counts")}
        for name, fields in item.items()
    }


def _chosen_in(text: str) -> list[Any]:
    """What a held-out grid tries, without when and at what cost it was found."""
    found = []
    for item in yaml.safe_load(text)["defenses"]:
        tuned = next(iter(item.values())).get("tuned") if isinstance(item, dict) else None
        found.append((tuned["name"], tuned["settings"]) if tuned else item)
    return found


def _plain(tuned: Tuned) -> dict[str, Any]:
    return {**asdict(tuned), "attacks": list(tuned.attacks)}


def _dump(body: Mapping[str, Any]) -> str:
    return yaml.safe_dump(_lists(body), sort_keys=False, allow_unicode=True, width=100)


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lists(item) for name, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
