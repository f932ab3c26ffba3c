"""The lists of attacks and defenses of a grid file, and the recipes that their entries train with.

Lists hold a method's name or ``name: {field: value}``. Beside a method's own fields stand ``as``
(its label on the board), ``variant`` (a named set of values; explicit fields win), for attacks
``rates`` or ``counts`` (this attack's own poison rates, or numbers of poisoned rows) and, for
defenses, ``recipe`` (changes to the grid's recipes for this entry alone), ``along`` (several values
of one knob, see `grid.knobs`) or ``tuned`` (the file of a campaign that has all of an entry's
settings, or what it says). A control whose ``like``
names another entry takes over that entry's changes. The undefended victim, ``none``, is always
the reference of the gate: where a file does not list it, it is added at the front.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from attacks.base import Aim, poison_count
from defenses.base import Need, Phase
from grid.data import Data
from grid.decode import decode
from grid.knobs import expanded
from grid.nodes import Raw, parse, read_text
from grid.registry import Kind, Method, resolve, table
from grid.spec import UNDEFENDED, AttackEntry, DefenseEntry, Guide, Knob, Tuned
from victims.errors import GridError, UsageError, near, unknown
from victims.recipe import ClassifierRecipe, Recipe, Select

RESERVED: Mapping[Kind, tuple[str, ...]] = {
    "attacks": ("as", "variant", "rates", "counts"),
    "defenses": ("as", "variant", "recipe", "guides", "tuned", "along"),
}
# A name becomes a folder and a part of a cell's label: no separators, no spaces.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
# Settings that a campaign chose: the defense, and the campaign after an @.
NAME_AT = re.compile(rf"{NAME.pattern}(@{NAME.pattern})?")
NAME_HELP = "letters, digits and . _ + = -, beginning with a letter or a digit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipes:
    """A file's ``recipes``. ``reference`` is needed in regime F alone."""

    reference: Recipe | None = None
    victim: Recipe
    repair: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierRecipes(Recipes):
    """The same on the supervised track. ``reference`` fits the CLIP that judges."""

    victim: ClassifierRecipe
    repair: ClassifierRecipe


class _Entry(NamedTuple):
    """A method of a list, its place, and what else was written there, undecoded."""

    label: str
    method: Any
    at: Raw
    more: Mapping[str, Raw]
    tuned: Tuned | None = None
    knob: Knob | None = None

    @property
    def recipe(self) -> Raw | None:
        return self.more.get("recipe")


def attack_entries(raw: Raw, num_rows: int, size: int) -> tuple[AttackEntry, ...]:
    methods = table("attacks")
    entries = [_entry("attacks", item, methods) for item in elements(raw)]
    _require_labels(entries)
    return tuple(_attack(entry, num_rows, size) for entry in entries)


def _attack(entry: _Entry, num_rows: int, size: int) -> AttackEntry:
    try:
        entry.method.check(size)
    except UsageError as error:
        raise entry.at.error(str(error)) from error
    rates, counts = entry.more.get("rates"), entry.more.get("counts")
    if rates and counts:
        raise counts.error("give `rates` or `counts`, not both")
    if entry.method.aim is Aim.TARGETS and counts is None:
        unit = entry.method.unit
        raise (rates or entry.at).error(
            f"{entry.label}: a rate would be ambiguous, since it is in use for the rows of one"
            f" target and of all. Give `counts`, multiples of its {unit} targets, such as"
            f" [0, {10 * unit}] for 10 rows each."
        )
    return AttackEntry(
        label=entry.label,
        method=entry.method,
        rates=read_rates(rates, num_rows) if rates else None,
        counts=_counts(counts, entry.method, num_rows) if counts else None,
    )


def _counts(raw: Raw, method: Any, num_rows: int) -> tuple[int, ...]:
    given = elements(raw)
    for item in given:
        value = item.node.data
        if type(value) is not int or not 0 <= value <= num_rows or value % method.unit:
            among = f" that divides among {method.unit} targets" if method.unit > 1 else ""
            raise item.error(
                f"expected a number of rows in 0..{num_rows}{among}, got {item.show()}"
            )
    found = [int(item.node.text.replace("_", "")) for item in given]
    require_distinct(found, given)
    return tuple(found)


def read_rates(raw: Raw, num_rows: int) -> tuple[str, ...]:
    given = elements(raw)
    found = [_rate(item, num_rows) for item in given]
    require_distinct(found, given)
    return tuple(found)


def _rate(raw: Raw, num_rows: int) -> str:
    """A share as exact decimal text, e.g. 1e-4 as 0.0001."""
    value, text = raw.node.data, raw.node.text.replace("_", "")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1:
        hint = ""
        percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", raw.node.text)
        if percent and float(percent[1]) <= 100:
            hint = f". {percent[1]} % is {Decimal(percent[1]) / 100:f}"
        raise raw.error(f"expected a share in 0..1 such as 0.01, got {raw.show()}{hint}")
    try:
        poison_count(text, num_rows)
    except UsageError as error:
        raise raw.error(str(error).removeprefix("rates: ")) from error
    exact = Decimal(text)
    return format(exact.normalize(), "f") if exact else "0"


def defense_entries(
    raw: Raw, recipes: Recipes, data: Data, guides: Sequence[Guide] = ()
) -> tuple[DefenseEntry, ...]:
    methods = table("defenses")
    entries = [
        _entry("defenses", own, methods, knob)
        for item in elements(raw)
        for own, knob in expanded(item)
    ]
    if not any(entry.method.name == UNDEFENDED for entry in entries):
        entries.insert(0, _entry("defenses", Raw.of(UNDEFENDED, raw.where), methods))
    _require_labels(entries)
    for entry in entries:
        try:
            entry.method.check()
        except UsageError as error:
            raise entry.at.error(str(error)) from error
    own = {entry.label: _overrides(entry, recipes.repair) for entry in entries}
    found = []
    for entry in entries:
        values = {**_inherited(entry, entries, own), **own[entry.label]}
        replaces_training = entry.method.replaces_training()
        at = entry.recipe or entry.at
        repair = replace(recipes.repair, **values)
        victim = replace(recipes.victim, **values) if replaces_training else recipes.victim
        if values:
            used, split = (victim, "suspect") if replaces_training else (repair, "clean")
            check_recipe(used, split, data, at if entry.recipe else at.only(()))
        own_entry = DefenseEntry(
            label=entry.label,
            method=entry.method,
            recipe=repair,
            victim_recipe=victim,
            overrides=values,
            tuned=entry.tuned,
            knob=entry.knob,
        )
        found.extend(guided(own_entry, entry.more.get("guides"), guides))
    return tuple(found)


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
    for item in elements(raw):
        name = item.node.text
        if name not in by_label:
            raise unknown("guide", name, by_label, str(item.where))
        found.append(by_label[name])
    require_distinct([guide.label for guide in found], elements(raw))
    return found


def _overrides(entry: _Entry, base: Recipe) -> dict[str, Any]:
    if entry.recipe is None:
        return {}
    decoded = decode(type(base), entry.recipe, base=base)
    return {name: getattr(decoded, name) for name in entry.recipe.items()}


def _inherited(
    entry: _Entry, entries: Sequence[_Entry], own: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The recipe overrides of the entry that a control imitates, by label or else by name."""
    like = getattr(entry.method, "like", None)
    if entry.method.phase is not Phase.CONTROL or like is None:
        return {}
    if like in own:
        return own[like]
    others = [own[other.label] for other in entries if other.method.name == like]
    if any(values != others[0] for values in others):
        raise entry.at.error(
            f"like: {like} means several entries whose recipes differ. Leave one of them without"
            " `as`: the control follows that one."
        )
    return others[0] if others else {}


def _entry(kind: Kind, raw: Raw, methods: Mapping[str, Method], knob: Knob | None = None) -> _Entry:
    """``name``, or ``name: {field: value}``."""
    if isinstance(raw.node.data, Mapping):
        items = raw.items()
        if len(items) != 1:
            raise raw.error(
                f"expected one method per item, got {listed(items)}. Indent a method's fields"
                " below its name."
            )
        name, given = next(iter(items.items()))
    elif isinstance(raw.node.data, str):
        name, given = raw.node.data, Raw.of({}, raw.where.at(raw.node.data))
    else:
        raise raw.error(f"expected a method of {', '.join(methods)}, got {raw.show()}")
    cls: Any = resolve(kind, name, str(raw.where), methods)
    if given.node.data is None:
        given = Raw.of({}, given.where)
    tuned = None
    if kind == "defenses" and "tuned" in given.items():
        tuned, given = _tuned(name, given)
    items = given.items()
    names = [f.name for f in fields(cls) if f.init]
    reserved = RESERVED[kind]
    clash = set(reserved) & set(names)
    if clash:
        raise GridError(f"{name}: a method cannot have a field called {clash.pop()!r}")
    given.check_keys([*names, *reserved])
    own = given.without(*reserved)
    if "variant" in items:
        own = own.over(_variant(cls, items["variant"]))
    label = items["as"].node.text if "as" in items else name
    if not (NAME_AT if tuned or knob else NAME).fullmatch(label):
        raise items["as"].error(f"{label!r} cannot be a label. Use {NAME_HELP}.")
    return _Entry(label, decode(cls, own), given, given.only(reserved).items(), tuned, knob)


def _tuned(name: str, raw: Raw) -> tuple[Tuned, Raw]:
    """What a campaign says of an entry, and the entry with the settings that it chose."""
    raw.check_keys(["tuned", "as", "guides"])
    item = raw.items()["tuned"]
    if isinstance(item.node.data, str):
        beside = Path(item.where.file).parent / item.node.data
        path = beside if beside.is_file() else Path(item.node.data)
        if not path.is_file():
            raise item.error(f"no file {item.node.data}, beside this one or where you are")
        item = parse(read_text(path), str(path))
    tuned = decode(Tuned, item)
    if tuned.defense != name:
        raise item.error(f"these are settings of {tuned.defense}, and the entry is {name}")
    if not NAME_AT.fullmatch(tuned.name):
        raise item.error(f"{tuned.name!r} cannot be a label. Use {NAME_HELP}, and one @.")
    settings = item.items().get("settings", Raw.of({}, item.where))
    given = settings.under({"as": tuned.name}) if "as" not in raw.items() else settings
    return tuned, Raw.of({**given.plain(), **raw.without("tuned").plain()}, item.where)


def _variant(cls: Any, raw: Raw) -> Mapping[str, Any]:
    name, variants = raw.node.data, cls.variants
    if not isinstance(name, str) or name not in variants:
        every = ", ".join(variants) or "it has none"
        guess = near(raw.node.text, variants)
        raise raw.error(f"{cls.name} has no variant {raw.show()}.{guess} Known: {every}.")
    found: Mapping[str, Any] = variants[name]
    return found


def _require_labels(entries: Sequence[_Entry]) -> None:
    seen: dict[str, _Entry] = {}
    for entry in entries:
        if entry.label in seen:
            first = seen[entry.label].at.where
            raise entry.at.error(
                f"the label {entry.label!r} is already that of line {first.line}. Give one of the"
                f" two another with `as`, such as {{as: {entry.label}-2}}."
            )
        seen[entry.label] = entry


def check_recipe(recipe: Recipe, split: str, data: Data, raw: Raw) -> None:
    """A recipe fits its data; only the reference has a seed of its own."""
    items = raw.items()
    if split != "public" and "seed" in items:
        raise items["seed"].error(
            "the seed of a victim or of a defense comes from `seeds` and `defense_seeds`; leave"
            " it out here"
        )
    require_seed(recipe.seed, items.get("seed", raw))
    if isinstance(recipe, ClassifierRecipe) and recipe.lr == Select():
        raise items.get("lr", raw).error(
            "the rates that `select` tries by default are a CLIP's. Give those of a classifier,"
            " such as lr: {rates: [0.001, 0.01, 0.1]}"
        )
    if isinstance(recipe.lr, Select) and split != "clean":
        raise items.get("lr", raw).error(
            "only repairs choose their learning rate. Give a number: this recipe is how the victim"
            " came to be, and a defense that takes its place keeps to it."
        )
    num_rows = data.rows(split)
    if recipe.batch_size > num_rows:
        raise items.get("batch_size", raw).error(
            f"a batch of {recipe.batch_size} is larger than its data, the {num_rows} rows of"
            f" {split!r}"
        )


def require_seed(seed: int, raw: Raw) -> None:
    if not 0 <= seed < 2**63:
        raise raw.error(f"a seed is a whole number from 0 to 2^63 - 1, got {seed}")


def elements(raw: Raw) -> list[Raw]:
    """The items of a list that gives the grid its cells: at least one."""
    found = raw.elements()
    if not found:
        raise raw.error("the list is empty, so the grid would have no cells")
    return found


def listed(items: Iterable[str]) -> str:
    return ", ".join(items) or "nothing"


def require_distinct(values: Sequence[Any], places: Sequence[Raw]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise places[index].error(f"{value} is given twice")
