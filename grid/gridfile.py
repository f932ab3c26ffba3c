"""A grid file's text to a `Grid`: what its keys mean, with a place for all that they cannot mean.

The lists of methods are read in `grid.entries`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from attacks.base import Track
from defenses.base import Regime
from grid.corpus_file import check_corpus_keys, corpus_data
from grid.data import CorpusData, Data, FilesData, LabelledWorldData, WorldData
from grid.decode import decode
from grid.entries import (
    NAME,
    NAME_HELP,
    ClassifierRecipes,
    Recipes,
    attack_entries,
    check_recipe,
    defense_entries,
    elements,
    listed,
    read_rates,
    require_distinct,
    require_seed,
)
from grid.evaluate import Evaluate
from grid.execution import Execution
from grid.further_sets import with_further_sets
from grid.gate import Gate
from grid.guides import read_guides
from grid.model_entry import Model, check_model_keys, read_model
from grid.nodes import Raw, Where, parse
from grid.own_paths import own_path
from grid.registry import Source, grid_source
from grid.spec import Grid, Guide
from victims.architectures import keeps_activations
from victims.classifiers import CLASSIFIERS, ClassifierSpec
from victims.compiled import COMPILED_KEEPS
from victims.errors import UsageError, unknown
from victims.label_readers import DATASETS
from victims.labelled_files import labelled_splits
from victims.measuring import check_classes, resolve_target
from victims.models import EMBEDDED, ModelSpec
from victims.recipe import Recipe
from victims.world import World


def load_grid(name_or_path: str, *, on: str | None = None) -> Grid:
    """A grid file by its path, or a preset by its name; ``on`` other machines than it says."""
    grid = decode_grid(grid_source(name_or_path))
    return grid if on is None else replace(grid, execution=grid.execution.moved(on))


def decode_grid(source: Source) -> Grid:
    """Read the text of a grid file; anything it cannot mean raises with its place."""
    return grid_of(parse(source.text, source.source), source)


def check_keys(raw: Raw) -> None:
    """Refuse keys and recipes that no grid file has; looks at none of the files that it names."""
    file = decode(_File, raw)
    labelled = file.track is Track.SUPERVISED
    decode(ClassifierRecipes if labelled else Recipes, file.recipes)
    if file.gate.node.data is not None:
        decode(Gate, file.gate.without("rate"))
    if file.model is not None:
        check_model_keys(file.model)
    for kind, item in file.data.items().items():
        if kind == "corpus":
            check_corpus_keys(item)
        elif kind in DATASETS:
            item.check_keys([f.name for f in fields(_Files)])
        elif kind == "world" and item.node.data is not None:
            item.check_keys([*_OF_WORLD, *_OF_SPLITS])


def grid_of(raw: Raw, source: Source) -> Grid:
    """The grid that a mapping means; ``source`` is where it stands."""
    file = decode(_File, raw)
    places = raw.items()
    labelled = file.track is Track.SUPERVISED
    regime = file.regime or (Regime.S if labelled else Regime.F)
    if labelled and regime is Regime.F:
        raise places["regime"].error(
            "an image classifier is trained from scratch: leave `regime` out, or write S"
        )
    name = source.name if file.name is None else file.name
    if not NAME.fullmatch(name):
        at = places.get("name", raw)
        raise at.error(f"{name!r} cannot name a run's folder. Give `name`: {NAME_HELP}.")
    data = _data(file.data, labelled)
    recipes = decode(ClassifierRecipes if labelled else Recipes, file.recipes)
    at_recipes = file.recipes.items()
    for stage, split in (("reference", "public"), ("victim", "suspect"), ("repair", "clean")):
        recipe = getattr(recipes, stage)
        # Without public rows there is no model to fit to them: what asks for one is told below.
        if recipe is not None and (data.public or labelled or split != "public"):
            check_recipe(recipe, split, data, at_recipes[stage])
    rates = read_rates(file.rates, data.suspect)
    attacks = attack_entries(file.attacks, data.suspect, data.size)
    guides = _guides(file, data, recipes.reference) if labelled else ()
    if file.guides is not None and not labelled:
        raise file.guides.error(
            "guides judge the data of image classifiers (track: supervised); that of a CLIP is"
            " judged by the reference"
        )
    defenses = defense_entries(file.defenses, recipes, data, guides)
    readers = [entry.label for entry in attacks if entry.method.needs_surrogate]
    if labelled and readers and data.public < recipes.victim.batch_size:
        raise places.get("data", raw).error(
            f"{readers[0]} fits a model of its own to public pictures, by the victim's recipe: give"
            f" `public` at least one batch of {recipes.victim.batch_size} rows"
        )
    spec, weights = (_classifier(file.model, data), None) if labelled else _clip(file, data, regime)
    if weights is not None and recipes.reference is not None:
        raise at_recipes["reference"].error(
            "the public model is `pretrained`, and nothing is fitted in its place: leave it out"
        )
    for stage in ("reference", "victim", "repair"):
        recipe = getattr(recipes, stage)
        if recipe is not None and recipe.compile and file.execution.checkpoint_activations:
            raise at_recipes[stage].error(f"compile: {COMPILED_KEEPS}")
    if file.execution.checkpoint_activations and isinstance(spec, ModelSpec):
        why = keeps_activations(spec.arch) if spec.arch not in EMBEDDED else None
        if why is not None:
            raise places["execution"].error(
                f"checkpoint_activations saves no memory with {spec.arch}: {why}. Leave it out;"
                " `micro_batch` in a recipe saves memory in any network"
            )
    starts = recipes.reference is not None or weights is not None
    if weights is None and not data.public and not labelled and (regime is Regime.F or readers):
        user = (
            f"{readers[0]} reads" if readers and regime is not Regime.F else "regime F starts from"
        )
        raise places.get("data", raw).error(
            f"{user} a public model, which is fitted to `public` rows, and there are none: give"
            " some, or `model` weights of its own with `pretrained`"
            + (", or write `regime: S`" if regime is Regime.F else "")
        )
    if not starts and not labelled and (regime is Regime.F or readers):
        user = readers[0] if readers else "regime F"
        raise file.recipes.error(
            f"missing key 'reference', the recipe of the public model that {user} starts from; or"
            " give `model` weights of its own with `pretrained`"
        )
    return Grid(
        name=name,
        description=file.description,
        track=file.track,
        regime=regime,
        data=data,
        model=spec,
        weights=weights,
        targets=_targets(file, data.classes),
        attacks=attacks,
        rates=rates,
        defenses=defenses,
        seeds=_seeds(file.seeds),
        defense_seeds=_seeds(file.defense_seeds),
        reference=recipes.reference or recipes.victim,
        victim=recipes.victim,
        repair=recipes.repair,
        gate=_gate(file.gate, [*rates, *(r for a in attacks for r in a.rates or ())], regime),
        evaluate=_evaluate(file.evaluate, places, labelled, data),
        execution=file.execution,
        source=source.source,
        text=source.text,
    )


# What a file means by leaving a key out.
_WORLD = Raw.of({"world": {}}, Where())
_FIRST_SEED = Raw.of([0], Where())
_EMPTY = Raw.of({}, Where())


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """The keys of a grid file; `Raw` ones are decoded below."""

    name: str | None = None
    description: str = ""
    track: Track = Track.MULTIMODAL
    regime: Regime | None = None
    data: Raw = _WORLD
    model: Raw | None = None
    guides: Raw | None = None
    target: Raw | None = None
    targets: Raw | None = None
    attacks: Raw
    rates: Raw
    defenses: Raw
    seeds: Raw
    defense_seeds: Raw = _FIRST_SEED
    recipes: Raw
    gate: Raw = _EMPTY
    evaluate: Raw = _EMPTY
    execution: Execution = field(default_factory=Execution)


# The side that the pictures of a labelled set have, unless a file says another.
_SIDES = {"tiny_imagenet": 64}
_OF_WORLD = tuple(f.name for f in fields(World))
_OF_SPLITS = tuple(f.name for f in fields(WorldData) if f.name != "world")


def _data(raw: Raw, labelled: bool) -> Data:
    """``{world: {...}}``: the fields of the world and of its splits side by side; or the name of a
    labelled set and where it lies."""
    items = raw.items()
    if len(items) != 1:
        raise raw.error(f"expected one corpus kind, such as world: {{}}, got {listed(items)}")
    kind, item = next(iter(items.items()))
    if kind in DATASETS and labelled:
        return _files(kind, item)
    if kind == "corpus" and not labelled:
        return corpus_data(item)
    if kind != "world":
        known = ["world", *DATASETS] if labelled else ["world", "corpus"]
        raise unknown("corpus kind", kind, known, str(raw.where))
    cls = LabelledWorldData if labelled else WorldData
    if item.node.data is None:
        return cls()
    item.check_keys([*_OF_WORLD, *_OF_SPLITS])
    world = decode(World, item.only(_OF_WORLD))
    require_seed(world.seed, item.items().get("seed", item))
    return replace(decode(cls, item.only(_OF_SPLITS)), world=world)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    root: str
    size: int | None = None
    suspect: int | None = None
    clean: int | None = None
    public: int = 0
    tuning: int | None = None
    report: int | None = None
    seed: int = 0


def _files(dataset: str, raw: Raw) -> FilesData:
    """The splits of a labelled set; its files are read once, for their digest."""
    given = decode(_Files, raw)
    counts = {name: getattr(given, name) for name in ("suspect", "clean", "tuning", "report")}
    size = given.size or _SIDES.get(dataset, 32)
    try:
        root = own_path(given.root, raw.items()["root"])
        splits = labelled_splits(
            dataset, root, size, public=given.public, seed=given.seed, **counts
        )
    except UsageError as error:
        raise raw.error(str(error)) from error
    for name in ("clean", "tuning"):
        if name not in splits:
            raise (
                raw.items()
                .get(name, raw)
                .error(f"{name} needs rows: defenses and gates are given them")
            )
    return FilesData(splits=splits)


def _classifier(raw: Raw | None, data: Data) -> ClassifierSpec:
    """An architecture's name, or its fields; its classes are those of the data."""
    raw = Raw.of("preact_tiny", Where()) if raw is None else raw
    if isinstance(raw.node.data, str):
        raw = Raw.of({"arch": raw.node.data}, raw.where)
    if "pretrained" in (given := raw.items()):
        raise given["pretrained"].error(
            "an image classifier is trained from scratch: leave it out. A judge of its data has"
            " weights of its own, under `guides`."
        )
    raw.check_keys(["arch", "size"])
    spec = decode(ModelSpec, raw.over({"size": data.size}))
    _same_size(spec.size, data.size, raw)
    if spec.arch not in CLASSIFIERS:
        at = raw.items().get("arch", raw)
        raise unknown("image classifier", spec.arch, CLASSIFIERS, str(at.where))
    return ClassifierSpec(arch=spec.arch, size=spec.size, classes=tuple(data.classes))


def _clip(file: _File, data: Data, regime: Regime) -> Model:
    """The grid's CLIP; its size is the pictures'."""
    found = read_model(file.model, data.size)
    raw = Raw.of({}, Where()) if file.model is None else file.model
    if found.spec.size != data.size:
        _same_size(found.spec.size, data.size, raw)
    if found.weights is not None and regime is Regime.S:
        raise raw.items()["pretrained"].error(
            "in regime S victims are trained from random weights, so that these would not be used:"
            " leave `pretrained` out, or write regime: F"
        )
    return found


def _same_size(size: int, pictures: int, raw: Raw) -> None:
    if size != pictures:
        at = raw.items()["size"]
        raise at.error(f"{size} px, but the pictures of `data` have {pictures} px a side")


def _guides(file: _File, data: Data, reference: Recipe | None) -> tuple[Guide, ...]:
    def model(raw: Raw) -> Model:
        return read_model(raw, data.size)

    if isinstance(data, FilesData) and reference is not None:
        raise file.recipes.items()["reference"].error(
            "the reference is fitted to pictures with captions, and these have labels alone: leave"
            " it out, and give `guides` with `weights`"
        )

    def check(recipe: Recipe, raw: Raw) -> None:
        check_recipe(recipe, "public", data, raw)

    return read_guides(file.guides, reference, data.size, model, load_grid, check)


def _evaluate(raw: Raw, places: Mapping[str, Raw], labelled: bool, data: Data) -> Evaluate:
    given = raw.items() if raw.node.data is not None else {}
    raw.check_keys([f.name for f in fields(Evaluate)])
    own, retrieval = raw.without("others"), given.get("retrieval")
    if retrieval is not None and not isinstance(retrieval.node.data, bool):
        own = own.without("retrieval")
    found = decode(Evaluate, own)
    if not isinstance(data, WorldData) and "sets" not in given:
        found = replace(found, sets=("report",))
    for split in found.sets:
        if not data.rows(split):
            at = places.get("evaluate", places["data"])
            raise at.error(f"these data have no {split!r} split: write sets: [report]")
    for name in ("retrieval", "probe", "others"):
        if labelled and name in given and given[name].node.data not in (False, ()):
            raise given[name].error(
                f"{name} is measured on CLIPs; an image classifier has no captions"
            )
    if isinstance(data, CorpusData) and found.probe:
        raise given["probe"].error("a probe is trained on clean rows, and pairs have no labels")
    return with_further_sets(found, raw, given, data.size)


def _targets(file: _File, classes: Sequence[str]) -> tuple[int, ...]:
    check_classes(classes)
    if file.target and file.targets:
        raise file.targets.error("give `target` (one class) or `targets` (a list), not both")
    if file.targets is None:
        return (_target(file.target, classes) if file.target else 0,)
    given = elements(file.targets)
    found = [_target(item, classes) for item in given]
    require_distinct(found, given)
    return tuple(found)


def _target(raw: Raw, classes: Sequence[str]) -> int:
    value = raw.node.data
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise raw.error(f"expected a class name or its index, got {raw.show()}")
    try:
        return resolve_target(value, classes)
    except UsageError as error:
        raise raw.error(str(error).removeprefix("target: ")) from error


def _seeds(raw: Raw) -> tuple[int, ...]:
    given = elements(raw) if isinstance(raw.node.data, tuple) else [raw]
    found = []
    for item in given:
        if type(item.node.data) is not int:
            raise item.error(f"expected a whole number or a list of them, got {item.show()}")
        found.append(item.node.data)
        require_seed(item.node.data, item)
    require_distinct(found, given)
    return tuple(found)


def _gate(raw: Raw, rates: Sequence[str], regime: Regime) -> Gate:
    at = raw.items().get("reference")
    if at is not None and at.node.data is not None and regime is Regime.S:
        raise at.error(
            "the weights that victims start from are held against it, and in regime S they start"
            " from random ones: leave it out"
        )
    at = raw.items().get("rate")
    if at is None or at.node.data is None:
        return decode(Gate, raw)
    # Numbers are compared as numbers: 0.010 is the rate 0.01.
    by_value = {float(rate): rate for rate in rates if float(rate) > 0}
    value = at.node.data
    rate = by_value.get(float(value)) if type(value) in (int, float) else None  # type: ignore[arg-type]
    if rate is None:
        every = ", ".join(by_value.values())
        raise at.error(f"{at.show()} is not a positive rate of this grid. Known: {every}.")
    return replace(decode(Gate, raw.without("rate")), rate=rate)
