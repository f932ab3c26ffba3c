"""The ``guides`` of a grid file: CLIPs that judge the data of image classifiers.

A mapping of names to what makes each: nothing (the reference recipe on the public pairs), changes
to this recipe, ``cell`` and ``of`` (the victim of that cell of a multimodal grid: a backdoored
judge, found in the store if that grid ran there), ``weights`` (a file) or a `pretrained` ``model``.
A defense that asks a judge stands on the board once per guide: the first one under its own label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attacks.base import Track
from defenses.controls import NoDefense
from grid.decode import decode
from grid.entries import NAME, NAME_HELP
from grid.model_entry import Model
from grid.nodes import Raw, parse
from grid.registry import grid_source
from grid.spec import Grid, Guide
from victims.errors import near
from victims.fingerprints import remembered_sha256
from victims.models import ModelSpec
from victims.pretrained import Weights
from victims.recipe import Recipe

Load = Callable[[str], Grid]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    model: Raw | None = None
    recipe: Raw | None = None
    cell: str | None = None
    of: str | None = None
    weights: str | None = None


PUBLIC = "public"


def read_guides(
    raw: Raw | None,
    reference: Recipe | None,
    size: int,
    model: Callable[[Raw], Model],
    load: Load,
    check: Callable[[Recipe, Raw], None],
) -> tuple[Guide, ...]:
    """The guides of a file; with none given, the reference, if the file has its recipe."""
    if raw is None:
        tiny = ModelSpec(size=size)
        return (Guide(label=PUBLIC, model=tiny, recipe=reference),) if reference else ()
    found = []
    for name, item in raw.items().items():
        if not NAME.fullmatch(name):
            raise item.error(f"{name!r} cannot name a guide. Use {NAME_HELP}.")
        if not item.node.data and name != PUBLIC:
            raise item.error(
                f"nothing tells how {name} differs from the public model: give `recipe`, such as"
                " {epochs: 1}, `weights`, `model`, or `cell` and `of`. The public model itself is"
                f" {PUBLIC}: {{}}."
            )
        found.append(_guide(name, item, reference, size, model, load, check))
    if not found:
        raise raw.error("no guide is named. Leave `guides` out, or name one, such as public: {}.")
    return tuple(found)


def _guide(
    name: str,
    raw: Raw,
    reference: Recipe | None,
    size: int,
    model: Callable[[Raw], Model],
    load: Load,
    check: Callable[[Recipe, Raw], None],
) -> Guide:
    if raw.node.data is None:
        raw = Raw.of({}, raw.where)
    given, places = decode(_Given, raw), raw.items()
    if given.cell is not None or given.of is not None:
        return _backdoored(name, raw, given, load)
    spec, own = model(given.model) if given.model else Model(ModelSpec(size=size), None)
    for key in ("weights", "recipe"):
        if own is not None and getattr(given, key) is not None:
            raise places[key].error(f"this model is `pretrained`: leave {key} out")
    if own is not None:
        return Guide(label=name, model=spec, weights=own)
    if given.weights is not None:
        if given.recipe is not None:
            raise places["recipe"].error("weights of a file are not trained: leave `recipe` out")
        path = Path(given.weights).expanduser().absolute()
        if not path.is_file():
            raise places["weights"].error(
                f"there is no file {path}. Give a safetensors file with the weights of"
                f" {spec.arch}, as open_clip names them."
            )
        weights = Weights(path=str(path), sha256=remembered_sha256(path))
        return Guide(label=name, model=spec, weights=weights)
    if reference is None:
        raise raw.error(
            f"{name} is fitted to the public pairs, and recipes.reference, which says how, is"
            " missing. Add it, or give `weights`, or `cell` and `of`."
        )
    recipe = reference
    if given.recipe is not None:
        recipe = decode(Recipe, given.recipe, base=reference)
        check(recipe, given.recipe)
    return Guide(label=name, model=spec, recipe=recipe)


def _backdoored(name: str, raw: Raw, given: _Given, load: Load) -> Guide:
    """The victim of a cell of another grid."""
    if given.cell is None or given.of is None:
        raise raw.error(
            f"{name}: `cell` names a victim of the multimodal grid `of`; give both, as"
            " {cell: ATTACK/RATE/DEFENSE/sSEED, of: GRID}"
        )
    places = raw.items()
    for key in ("model", "recipe", "weights"):
        if key in places:
            raise places[key].error(f"leave {key} out: those of grid {given.of} are meant")
    # Before that grid is read, which may name this one in turn.
    source = grid_source(given.of)
    track = parse(source.text, source.source).items().get("track")
    if track is not None and track.node.data != Track.MULTIMODAL:
        raise places["of"].error(
            f"{given.of} is a {track.node.data} grid: its victims are no CLIPs"
        )
    grid = load(given.of)
    cells = {
        cell.label: cell
        for cell in grid.cells()
        if cell.not_applicable is None and isinstance(cell.defense.method, NoDefense)
    }
    if given.cell not in cells:
        raise places["cell"].error(
            f"no victim called {given.cell!r} in grid {given.of}.{near(given.cell, cells)}"
            f" It is a cell of the undefended victim; one of its {len(cells)} is"
            f" {next(iter(cells), 'none')}."
        )
    assert isinstance(grid.model, ModelSpec)
    return Guide(label=name, model=grid.model, of=grid, cell=cells[given.cell])
