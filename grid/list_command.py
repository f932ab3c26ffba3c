"""The command that lists what a grid file can name: methods, presets, campaigns, models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from grid import model_commands
from grid.options import JsonOpt
from victims.errors import UsageError, near


class Kind(StrEnum):
    ATTACKS = "attacks"
    DEFENSES = "defenses"
    PRESETS = "presets"
    CAMPAIGNS = "campaigns"
    MODELS = "models"


def ls(
    kind: Annotated[Kind, typer.Argument()],
    name: Annotated[
        str, typer.Argument(help="Only names that hold this, in any case.", show_default="")
    ] = "",
    as_json: JsonOpt = False,
) -> None:
    """List attacks, defenses, presets, campaigns or models, with where each is defined."""
    from grid.registry import campaigns, describe, presets

    if kind is Kind.MODELS:
        model_commands.show_models(name, as_json)
        return

    if kind in (Kind.PRESETS, Kind.CAMPAIGNS):
        every = presets() if kind is Kind.PRESETS else campaigns()
        bundled = {n: every[n] for n in _held(name, every, kind)}
        files = {name: _bundled_file(kind.value, name) for name in bundled}
        if as_json:
            found = {n: {"idea": idea, "file": files[n]} for n, idea in bundled.items()}
            typer.echo(json.dumps(found, indent=1))
            return
        for name, idea in bundled.items():
            typer.echo(f"{name:12} {idea}\n{'':12} {files[name]}")
        return
    found_methods = describe("attacks" if kind is Kind.ATTACKS else "defenses")
    held = _held(name, [method.name for method in found_methods], kind)
    methods = [method for method in found_methods if method.name in held]
    if as_json:
        rows = [{n: getattr(m, n) for n in m.__slots__} for m in methods]
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    for method in methods:
        by_regime = method.fidelity or {}
        same = len(set(by_regime.values())) == 1
        words = [word if same else f"{word} in {regime}" for regime, word in by_regime.items()]
        phase = f"gate: {method.phase}" if kind is Kind.ATTACKS and method.phase else method.phase
        knob = f"knob: {method.knob}" if method.knob else ""
        facts = [phase, ", ".join(words[:1] if same else words), ", ".join(method.needs), knob]
        typer.echo(f"{method.name:22}{'; '.join(fact for fact in facts if fact)}")
        typer.echo(f"{'':22}{method.error or method.idea}")
        typer.echo(f"{'':22}{method.distribution}: {method.origin or method.cls}")


def _held(name: str, known: Iterable[str], kind: Kind) -> list[str]:
    """Of some names those that hold a text."""
    every = list(known)
    found = [one for one in every if name.lower() in one.lower()]
    if not found:
        raise UsageError(f"none of the {kind.value} is called so: {name!r}.{near(name, every)}")
    return found


def _bundled_file(folder: str, name: str) -> str:
    """Where a preset is, relative to the working directory where it lies below it."""
    path = Path(__file__).parent / folder / f"{name}.yaml"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
