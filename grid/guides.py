"""The ``guides`` of a grid file: CLIPs that judge the data of image classifiers.

A mapping of names to what makes each: nothing (the reference recipe on the public pairs), changes
to this recipe, ``cell`` and ``of`` (the victim of that cell of a multimodal grid: a backdoored
judge, found in the store if that grid ran there), or ``weights`` (a safetensors file). A defense
that asks a judge stands on the board once per guide: the first one under its own label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attacks.base import Track
from defenses.base import Need
from grid.decode import decode
from grid.nodes import Raw
from grid.spec import DefenseEntry, Grid, Guide
from victims.errors import near, unknown
from victims.keys import file_sha256
from victims.models import ModelSpec
from victims.recipe import Recipe

Load = Callable[[str], Grid]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    model: Raw | None = None
    recipe: Raw | None = None
    cell: str | None = None
    of: str | None = None
    weights: str | None = None


def read_guides(
    raw: Raw | None,
    reference: Recipe | None,
    size: int,
    model: Callable[[Raw], ModelSpec],
    load: Load,
) -> tuple[Guide, ...]:
    """The guides of a file; with none given, the reference, if the file has its recipe."""
    if raw is None:
        tiny = ModelSpec(size=size)
        return (Guide(label="public", model=tiny, recipe=reference),) if reference else ()
    found = [_guide(name, item, reference, size, model, load) for name, item in raw.items().items()]
    if not found:
        raise raw.error("no guide is named. Leave `guides` out, or name one, such as public: {}.")
    return tuple(found)


def _guide(
    name: str,
    raw: Raw,
    reference: Recipe | None,
    size: int,
    model: Callable[[Raw], ModelSpec],
    load: Load,
) -> Guide:
    if raw.node.data is None:
        raw = Raw.of({}, raw.where)
    given, places = decode(_Given, raw), raw.items()
    if given.cell is not None or given.of is not None:
        return _backdoored(name, raw, given, load)
    spec = model(given.model) if given.model is not None else ModelSpec(size=size)
    if given.weights is not None:
        if given.recipe is not None:
            raise places["recipe"].error("weights of a file are not trained: leave `recipe` out")
        path = Path(given.weights).expanduser()
        if not path.is_file():
            raise places["weights"].error(
                f"there is no file {path}. Give a safetensors file with the weights of"
                f" {spec.arch}, as open_clip names them."
            )
        return Guide(label=name, model=spec, path=str(path), sha256=file_sha256(path))
    if reference is None:
        raise raw.error(
            f"{name} is fitted to the public pairs, and recipes.reference, which says how, is"
            " missing. Add it, or give `weights`, or `cell` and `of`."
        )
    recipe = decode(Recipe, given.recipe, base=reference) if given.recipe else reference
    return Guide(label=name, model=spec, recipe=recipe)


def _backdoored(name: str, raw: Raw, given: _Given, load: Load) -> Guide:
    """The victim of a cell of another grid."""
    if given.cell is None or given.of is None:
        raise raw.error(
            f"{name}: `cell` names a victim of the multimodal grid `of`; give both, as"
            " {cell: ATTACK/RATE/DEFENSE/sSEED, of: GRID}"
        )
    places = raw.items()
    if given.model is not None or given.recipe is not None or given.weights is not None:
        raise raw.error(f"{name}: its model and recipe are those of grid {given.of}")
    grid = load(given.of)
    if grid.track is not Track.MULTIMODAL:
        raise places["of"].error(f"{given.of} is a {grid.track} grid: its victims are no CLIPs")
    cells = {cell.label: cell for cell in grid.cells()}
    if given.cell not in cells:
        raise places["cell"].error(
            f"no cell called {given.cell!r} in grid {given.of}.{near(given.cell, cells)}"
            f" One of its {len(cells)} is {next(iter(cells))}."
        )
    assert isinstance(grid.model, ModelSpec)
    return Guide(label=name, model=grid.model, of=grid, cell=cells[given.cell])


def guided(entry: DefenseEntry, chosen: Raw | None, guides: Sequence[Guide]) -> list[DefenseEntry]:
    """The entry, once per guide that it is to ask: all of the file's, or those that it names."""
    if Need.REFERENCE not in entry.method.needed():
        if chosen is not None:
            raise chosen.error(f"{entry.method.name} asks no judge: leave `guides` out")
        return [entry]
    named = _chosen(chosen, guides) if chosen is not None else list(guides)
    if not named:
        return [entry]
    first, *others = named
    judged = [replace(entry, guide=first)]
    return judged + [
        replace(entry, guide=guide, label=f"{entry.label}@{guide.label}") for guide in others
    ]


def _chosen(raw: Raw, guides: Iterable[Guide]) -> list[Guide]:
    by_label = {guide.label: guide for guide in guides}
    found = []
    for item in raw.elements():
        name = item.node.text
        if name not in by_label:
            raise unknown("guide", name, by_label, str(item.where))
        found.append(by_label[name])
    return found
