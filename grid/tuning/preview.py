"""What a campaign would do, before it does anything: cells, trials, what is to be made first."""

from __future__ import annotations

from pathlib import Path

from defenses.base import OneOf
from grid.history import History
from grid.stages import ModelStage, Stage
from grid.status_words import duration
from grid.tuning.scenes import Scenes, inputs
from grid.tuning.spec import Campaign, Searched
from grid.tuning.tuned import words
from victims.keys import Key
from victims.store import Store


def _ranges(searched: Searched) -> str:
    """The space in words."""
    found = []
    for name, dimension in searched.space.items():
        if isinstance(dimension, OneOf):
            found.append(f"{name} in {{{', '.join(map(str, dimension.values))}}}")
        else:
            scale = " (log)" if dimension.log else ""
            found.append(f"{name} {dimension.low:g} to {dimension.high:g}{scale}")
    return ", ".join(found)


def preview(campaign: Campaign, store_uri: str) -> list[str]:
    """Lines for people; the store is asked what it holds, if it exists."""
    scenes = Scenes(campaign)
    there = "://" in store_uri or (Path(store_uri) / "store.json").exists()
    store = Store(store_uri) if there else None
    history = History(Path(store_uri) / "history.json" if store and store.local else None)
    first: dict[Key, Stage] = {}
    searches, total = [], 0.0
    for label, rule in campaign.objectives.items():
        scene = scenes.of(rule.sees)
        for group in scene.groups():
            for stage in scene.plan.gates[group].stages:
                inputs(stage, first)
        for searched in campaign.defenses:
            squares = scene.squares(searched.entry)
            for square in squares:
                inputs(square.measure, first)
            one = sum(
                history.seconds(stage) for s in squares for stage in (s.measure.defended, s.measure)
            )
            total += one * (campaign.budget.trials or 0)
            noun = "cell" if len(squares) == 1 else "cells"
            searches.append(
                f"  {searched.label}, {label}: {campaign.search.by.value} over"
                f" {_ranges(searched)}; {len(squares)} {noun} a trial, about {one:.0f} s with the"
                " defaults"
            )
    missing = [stage for key, stage in first.items() if store is None or key not in store]
    fits = sum(isinstance(stage, ModelStage) for stage in missing)
    before = sum(history.seconds(stage) for stage in missing)
    budget = ", ".join(
        f"{value:g} {name.replace('_', ' ')}"
        for name in ("trials", "device_hours", "wall_minutes")
        if (value := getattr(campaign.budget, name)) is not None
    )
    told = [
        f"{campaign.name}: {len(searches)} searches, each of {budget}",
        *(f"{label}: {words(rule)}" for label, rule in campaign.objectives.items()),
        f"first {len(missing)} stages, {fits} fits among them, about {duration(before)} of work;"
        " then",
        *searches,
    ]
    if total:
        told.append(
            f"at most {duration(total)} of work for trials: equal settings of two searches, and"
            " what the store holds, are not computed again"
        )
    return told
