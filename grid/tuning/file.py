"""A campaign file's text to a `Campaign`; anything it cannot mean raises with its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from attacks.base import STAMPING
from defenses.base import Between, OneOf, Phase
from grid.decode import decode
from grid.entries import NAME, NAME_HELP, elements, read_rates, require_distinct
from grid.gridfile import grid_of
from grid.nodes import Raw, parse
from grid.registry import Source, campaign_source, grid_source
from grid.spec import UNDEFENDED, DefenseEntry, Grid
from grid.tuning.spec import (
    Budget,
    By,
    Campaign,
    Drop,
    Objective,
    Search,
    Searched,
    Sees,
    Side,
    Simulate,
    Space,
    Stop,
)
from victims.errors import UsageError, near
from victims.recipe import Recipe
from victims.tracks import Track

DEFAULT_OBJECTIVE = {"tuned": {"minimise": "worst_asr", "ca_loss": 2}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    name: str | None = None
    description: str = ""
    grid: Raw
    tuning: Raw
    held_out: Raw
    defenses: Raw
    objectives: Raw | None = None
    search: Search = field(default_factory=Search)
    stop: Stop | None = None
    drop: Drop | None = None
    budget: Budget
    simulate: Raw | None = None
    curves: bool = False


def load_campaign(name_or_path: str) -> Campaign:
    """A campaign file by its path, or one that comes with the tool by its name."""
    return decode_campaign(campaign_source(name_or_path))


def decode_campaign(source: Source) -> Campaign:
    """Read the text of a campaign file."""
    raw = parse(source.text, source.source)
    file, places = decode(_File, raw), raw.items()
    name = source.name if file.name is None else file.name
    if not NAME.fullmatch(name):
        raise places.get("name", raw).error(
            f"{name!r} cannot name a folder. Give `name`: {NAME_HELP}."
        )
    grid_raw, grid_at = _grid(file.grid, source)
    grid = grid_of(grid_raw, grid_at)
    if (workers := grid.execution.resources_for("defended").workers) > 1:
        raise file.grid.error(
            f"execution.resources.defended.workers is {workers}, and a trial runs on one device."
            " Give 1 here; a grid that uses what was chosen may have more."
        )
    tuning = _side(file.tuning, grid)
    held_out = _side(file.held_out, grid, default_seed=max(tuning.seeds) + 1)
    _keep_apart(grid, held_out, tuning.attacks, file.held_out, "a tuning attack")
    if both_seeds := set(tuning.seeds) & set(held_out.seeds):
        raise file.held_out.error(
            f"seed {min(both_seeds)} is both a tuning seed and held out: its victims are started"
            " alike, and pictures poisoned alike. Give held_out other seeds."
        )
    wanted = file.objectives or Raw.of(DEFAULT_OBJECTIVE, raw.where)
    objectives = {label: _objective(label, item) for label, item in wanted.items().items()}
    if not objectives:
        raise wanted.error("no objective is named")
    simulate = None
    if file.simulate is not None:
        simulate = _simulate(file.simulate, grid)
        _keep_apart(grid, held_out, simulate.attacks, file.held_out, "simulated")
    for label, objective in objectives.items():
        if objective.sees is Sees.SIMULATED and simulate is None:
            raise wanted.items()[label].error(
                "it sees simulated attacks: say which in `simulate`, as in {attacks: [NAME]}"
            )
        if objective.maximise is not None and file.search.by is By.NSGA2:
            raise wanted.items()[label].error(
                "nsga2 makes clean accuracy large and attack success small at once: give minimise,"
                " and ca_loss to choose by from its front"
            )
    found = Campaign(
        name=name,
        description=file.description,
        grid=grid,
        plain=grid_raw.without("defenses", "seeds", "description", "name").plain(),
        tuning=tuning,
        held_out=held_out,
        defenses=_defenses(file.defenses, grid_raw, grid_at),
        objectives=objectives,
        search=file.search,
        stop=file.stop,
        drop=file.drop,
        budget=file.budget,
        simulate=simulate,
        curves=file.curves,
        source=source.source,
        text=source.text,
    )
    _check_search(found, places, raw)
    return found


def _keep_apart(grid: Grid, held_out: Side, others: Sequence[str], raw: Raw, what: str) -> None:
    """No attack that a search may look at is held out, under whatever label."""
    methods = {entry.label: entry.method for entry in grid.attacks}
    for label in held_out.attacks:
        for other in others:
            if methods[label] == methods[other]:
                known = "" if label == other else f" is {other} by another name, which"
                raise raw.error(
                    f"{label}{known} is both {what} and held out. What was tuned on an attack is"
                    " not tested by it."
                )


def _check_search(found: Campaign, places: Mapping[str, Raw], raw: Raw) -> None:
    if found.search.by is By.GRID and found.budget.trials is not None:
        for searched in found.defenses:
            size = num_settings(searched.space, found.search.points)
            if size > found.budget.trials:
                raise places.get("budget", raw).error(
                    f"the grid of {searched.label} has {size} settings, and the budget"
                    f" {found.budget.trials} trials: give {size}, fewer values, or another search"
                )
    for searched in found.defenses if found.stop is not None else ():
        if "recipe.epochs" in searched.space:
            raise places["stop"].error(
                f"trials are compared after equally many epochs, and {searched.label} searches"
                " recipe.epochs: a schedule of another length is elsewhere by then. Leave out"
                " `stop`, or give a `space` without recipe.epochs."
            )
    if found.drop is not None and not any(o.minimise for o in found.objectives.values()):
        raise places["drop"].error(
            "it ends trials for their ASR, and no objective minimises that. Leave it out."
        )
    if found.drop is not None:
        counts = {
            Sees.ATTACKS: found.tuning,
            Sees.CLEAN: found.tuning,
            Sees.HELD_OUT: found.held_out,
        }
        sides = [counts[o.sees] for o in found.objectives.values() if o.sees in counts]
        most = max(
            (len(s.attacks) * len(s.seeds) * len(s.rates or "x") for s in sides), default=0
        ) * len(found.grid.targets)
        if most <= found.drop.after:
            raise places["drop"].error(
                f"after {found.drop.after} cells, and no trial has more than {most}: nothing could"
                " be dropped. Leave it out, or add attacks or seeds."
            )


def num_settings(space: Space, points: int) -> int:
    """How many settings a grid over a space has."""
    total = 1
    for dimension in space.values():
        total *= len(values_of(dimension, points))
    return total


def values_of(dimension: Between | OneOf, points: int) -> list[Any]:
    """The values of one dimension of a grid; a range is cut evenly, both ends among them."""
    if isinstance(dimension, OneOf):
        return list(dimension.values)
    low, high = dimension.low, dimension.high
    shares = [i / (points - 1) for i in range(points)]
    if dimension.log:
        found = [low * (high / low) ** share for share in shares]
    else:
        found = [low + (high - low) * share for share in shares]
    if is_whole(dimension):
        return list(dict.fromkeys(round(value) for value in found))
    return found


def is_whole(dimension: Between) -> bool:
    return isinstance(dimension.low, int) and isinstance(dimension.high, int)


# --- the grid and its parts


def _grid(raw: Raw, source: Source) -> tuple[Raw, Source]:
    """The grid as a mapping: of a preset or file by its name, or written here; one defense and one
    seed stand where those of a campaign come from elsewhere."""
    rest = {"defenses": [UNDEFENDED], "seeds": [0]}
    if isinstance(raw.node.data, str):
        named = raw.node.data
        beside = Path(source.source).parent / named
        of = grid_source(str(beside) if beside.is_file() else named)
        return parse(of.text, of.source), of
    return raw.over({"name": source.name}).over(rest), source


def _side(raw: Raw, grid: Grid, default_seed: int = 0) -> Side:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Given:
        attacks: Raw
        seeds: tuple[int, ...] | None = None
        rates: Raw | None = None

    given = decode(Given, raw)
    attacks = _attacks(given.attacks, grid)
    seeds = (default_seed,) if given.seeds is None else given.seeds
    _check_seeds(seeds, raw)
    rates = read_rates(given.rates, grid.data.suspect) if given.rates else None
    for entry in grid.attacks:
        missing = set(rates or ()) - set(grid.levels(entry))
        if entry.label in attacks and missing and given.rates is not None:
            known = ", ".join(grid.levels(entry))
            raise given.rates.error(
                f"{entry.label} has no rate {missing.pop()} in the grid. Known: {known}."
            )
    if rates and "0" in rates:
        raise raw.items()["rates"].error("at rate 0 there is no attack to be tuned against")
    return Side(attacks=attacks, seeds=seeds, rates=rates)


def _check_seeds(seeds: Sequence[int], raw: Raw) -> None:
    place = raw.items().get("seeds", raw)
    if not seeds or min(seeds) < 0:
        raise place.error("seeds are whole numbers from 0 on, one at least")
    require_distinct(seeds, [place] * len(seeds))


def _attacks(raw: Raw, grid: Grid) -> tuple[str, ...]:
    known = {entry.label: entry for entry in grid.attacks}
    found = []
    for item in elements(raw):
        label = item.node.text
        if label not in known:
            guess = near(label, known)
            raise item.error(f"the grid has no attack {label!r}.{guess} Known: {', '.join(known)}.")
        if known[label].method.aim not in STAMPING:
            raise item.error(
                f"{label} stamps no pictures, so it has no ASR to be tuned by. Hold it out, or"
                " leave it to the grid."
            )
        found.append(label)
    require_distinct(found, elements(raw))
    return tuple(found)


def _objective(label: str, raw: Raw) -> Objective:
    if not NAME.fullmatch(label) or label == "default":
        raise raw.error(f"{label!r} cannot name an objective. Use {NAME_HELP}, and not `default`.")
    return decode(Objective, raw)


def _simulate(raw: Raw, grid: Grid) -> Simulate:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Given:
        attacks: Raw
        seeds: tuple[int, ...] = (0,)
        rate: Raw | None = None
        recipe: Raw | None = None

    if grid.track is Track.SUPERVISED:
        raise raw.error("attacks are simulated on the multimodal track alone")
    given = decode(Given, raw)
    _check_seeds(given.seeds, raw)
    rate = given.rate or Raw.of(0.05, raw.where)
    recipe = given.recipe or Raw.of({}, raw.where)
    decoded: Recipe = decode(type(grid.victim), recipe, base=grid.victim)
    share = read_rates(_alone(rate), grid.data.rows("clean") // 2)[0]
    if share == "0":
        raise rate.error("at rate 0 nothing is simulated")
    return Simulate(
        attacks=_attacks(given.attacks, grid),
        seeds=given.seeds,
        rate=share,
        recipe={name: getattr(decoded, name) for name in recipe.items()},
    )


def _alone(raw: Raw) -> Raw:
    """A value as a list of one, at its place."""
    return Raw(replace(raw.node, data=(raw.node,)), raw.where)


# --- the defenses and their spaces


def entries_of(items: list[Any], grid: Raw, source: Source) -> tuple[DefenseEntry, ...]:
    """The defenses of a list, as a grid file would have them; the undefended victim not among."""
    found = grid_of(grid.under({"defenses": items, "seeds": [0]}), source).defenses
    return tuple(entry for entry in found if entry.method.name != UNDEFENDED)


def with_values(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's fields with settings in place of its own; ``recipe.NAME`` lies in its recipe."""
    found = dict(given)
    recipe = dict(found.get("recipe") or {})
    for name, value in values.items():
        if name.startswith("recipe."):
            recipe[name.removeprefix("recipe.")] = value
        else:
            found[name] = value
    return {**found, "recipe": recipe} if recipe else found


def _defenses(raw: Raw, grid: Raw, source: Source) -> tuple[Searched, ...]:
    found = [_searched(item, grid, source) for item in elements(raw)]
    require_distinct([searched.label for searched in found], elements(raw))
    return tuple(found)


def _searched(raw: Raw, grid: Raw, source: Source) -> Searched:
    if isinstance(raw.node.data, str):
        name, fields_of = raw.node.data, Raw.of({}, raw.where)
    else:
        items = raw.items()
        if len(items) != 1:
            raise raw.error("expected one defense per item; indent its fields below its name")
        name, fields_of = next(iter(items.items()))
        if fields_of.node.data is None:
            fields_of = Raw.of({}, fields_of.where)
    space_raw = fields_of.items().get("space")
    given = fields_of.without("space").plain()
    # Decoded at its own place, so that a fault in it is told there.
    item = Raw.of({}, raw.where).under({name: given})
    if name == UNDEFENDED:
        raise raw.error("none is the undefended victim: it has nothing to search. Leave it out.")
    first, *others = entries_of([item.plain()], grid, source)
    if others:
        raise raw.error(f"{name} has a judge for each of the grid's guides: name one in `guides`")
    if first.method.phase is Phase.CONTROL:
        raise raw.error(f"{name} is a control, not a defense: there is nothing to tune")
    space = _space(space_raw, first) if space_raw is not None else dict(type(first.method).space)
    if not space:
        raise raw.error(f"{name} declares no search space: give `space`")
    if clash := set(space) & set(_flat(given)):
        raise (space_raw or raw).error(
            f"{clash.pop()} is given a value and searched: do one of both"
        )
    found = Searched(label=first.label, name=name, given=given, space=space, entry=first)
    _check_values(found, grid, source, space_raw or raw)
    return found


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    recipe = given.get("recipe") or {}
    return {**given, **{f"recipe.{name}": value for name, value in recipe.items()}}


def _space(raw: Raw, entry: DefenseEntry) -> Space:
    own = [f.name for f in fields(entry.method) if f.init]
    recipe = [f"recipe.{f.name}" for f in fields(entry.recipe) if f.init and f.name != "seed"]
    raw.check_keys([*own, *recipe])
    return {name: _dimension(item) for name, item in raw.items().items()}


def _dimension(raw: Raw) -> Between | OneOf:
    """A list of values, or ``{low, high, log}``."""
    if isinstance(raw.node.data, tuple):
        values = [item.plain() for item in elements(raw)]
        require_distinct(values, raw.elements())
        return OneOf(values=tuple(values))
    items = raw.items()
    raw.check_keys(["low", "high", "log"])
    ends: list[float] = []
    for name in ("low", "high"):
        value = items[name].node.data if name in items else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise items.get(name, raw).error("a range has two numbers, low and high")
        ends.append(value)
    log = items["log"].node.data if "log" in items else False
    if not isinstance(log, bool):
        raise items["log"].error(f"expected true or false, got {items['log'].show()}")
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        raise raw.error("the ends of a range are numbers, and finite")
    if not low < high or (log and low <= 0):
        raise raw.error("low lies below high, and above 0 on a log scale")
    return Between(low=low, high=high, log=log)


def _check_values(searched: Searched, grid: Raw, source: Source, place: Raw) -> None:
    """Raise where a value of a list, or an end of a range, cannot be a setting of its defense."""
    for name, dimension in searched.space.items():
        for value in values_of(dimension, 2):
            given = with_values(searched.given, {name: value})
            try:
                entries_of([{searched.name: given}], grid, source)
            except UsageError as error:
                raise place.error(f"{name} cannot be {value}: {error}") from error
