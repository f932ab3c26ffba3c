"""Identity: what changes a key and what does not, and the table of keys of all defaults."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import ATTACKS
from defenses import DEFENSES
from grid.registry import KINDS, resolve
from victims.embedded import WorldCorpus
from victims.keys import LATER, content_key, kind_of
from victims.models import ModelSpec
from victims.recipe import Recipe
from victims.rewrite import EdaMode, EdaText
from victims.training import PlainClipSpec
from victims.world import World

GOLDEN = Path(__file__).parent / "golden" / "keys.json"
REGENERATE = "python -m tests.test_keys --write"


def key(value: Any, *inputs: str) -> str:
    return content_key("thing", value, inputs)


# --- the table of defaults


def methods() -> Iterator[tuple[str, Any]]:
    """``kind/name`` and class of every built-in method."""
    for kind in KINDS:
        for name in ATTACKS if kind == "attacks" else DEFENSES:
            yield f"{kind}/{name}", resolve(kind, name)


def others() -> dict[str, Any]:
    """What is keyed and no method; only what has no default is given."""
    return {
        "recipe": Recipe(epochs=1, batch_size=64, lr=1e-3),
        "world": World(),
        "model": ModelSpec(),
        "world_corpus": WorldCorpus(world=World(), split="report", num_rows=512),
        "objective/plain_clip": PlainClipSpec(),
        "text/eda": EdaText(mode=EdaMode.STATIC, synonyms="lexicon", synonyms_digest="", seed=0),
    }


def default_keys() -> dict[str, str]:
    found = {name: key(value) for name, value in others().items()}
    for name, cls in methods():
        found[name] = key(cls())
        for variant, values in cls.variants.items():
            found[f"{name}:{variant}"] = key(cls(**values))
    return dict(sorted(found.items()))


def test_defaults_have_the_keys_they_had() -> None:
    golden: dict[str, str] = json.loads(GOLDEN.read_text())
    now = default_keys()
    changed = {n: (golden.get(n), now.get(n)) for n in golden | now if golden.get(n) != now.get(n)}
    assert not changed, (
        f"keys of defaults changed (old, new): {changed}. Results made with the old defaults are no"
        " longer found, and configurations that spell them out mean something else than they did:"
        f" bump version or revert; to accept run {REGENERATE}"
    )


def test_no_two_methods_share_a_key() -> None:
    keys = [found for name, found in default_keys().items() if ":" not in name]
    assert len(set(keys)) == len(keys)


# --- what does not matter

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def as_floats(value: Any) -> Any:
    """The same value with every integer spelled as a float, and every list as a tuple."""
    if isinstance(value, list):
        return tuple(as_floats(item) for item in value)
    if isinstance(value, dict):
        return {name: as_floats(item) for name, item in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def alike(a: Any, b: Any) -> bool:
    """Do two plain values mean the same? Written apart from the code under test."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return bool(a == b) and (numbers or type(a) is type(b))


@settings(deadline=None)
@given(values)
def test_the_spelling_of_numbers_and_the_order_of_names_do_not_matter(value: Any) -> None:
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert key(as_floats(shuffled)) == key(value)


@settings(deadline=None)
@given(values, values)
def test_keys_are_equal_where_meanings_are_and_nowhere_else(a: Any, b: Any) -> None:
    assert (key(a) == key(b)) == alike(a, b)


@settings(deadline=None)
@given(st.permutations(["alpha", "beta", "gamma"]), scalars)
def test_the_order_of_fields_does_not_matter(order: list[str], value: Any) -> None:
    made = {"alpha": 1, "beta": "two", "gamma": value}
    one = make_dataclass("Same", list(made), frozen=True)(**made)
    other = make_dataclass("Same", order, frozen=True)(**made)
    assert key(one) == key(other)


def test_spelled_out_defaults_do_not_matter() -> None:
    short = Recipe(epochs=1, batch_size=64, lr=1)
    spelled = {f.name: getattr(short, f.name) for f in fields(short)}
    assert key(Recipe(**spelled)) == key(short)
    assert key(Recipe(epochs=1, batch_size=64, lr=1.0)) == key(short)
    for _, cls in methods():
        assert key(cls(**{f.name: getattr(cls(), f.name) for f in fields(cls)})) == key(cls())


class Colour(StrEnum):
    RED = "red"


class Shape(Enum):
    ROUND = "round"


class Count(IntEnum):
    ONE = 1


def test_enums_are_their_values_and_sets_have_no_order() -> None:
    assert key([Colour.RED, Shape.ROUND, Count.ONE]) == key(["red", "round", 1])
    assert key({"b", "a", "c"}) == key(["a", "b", "c"])
    assert key(frozenset({(1, 2), (0, 3)})) == key([[0, 3], [1, 2]])


@dataclass(frozen=True)
class Found:
    """A file by content; where it lies is not what it is."""

    sha256: str
    path: str = field(default="", metadata={"keyed": False})


def test_a_field_that_is_not_keyed_does_not_matter_and_its_neighbour_does() -> None:
    assert key(Found("a", "/here")) == key(Found("a", "/there"))
    assert key([Found("a")]) != key([Found("b")])


@dataclass(frozen=True)
class Grown:
    """A class that got a field after the first results."""

    name: ClassVar[str] = "grown"
    size: int = 1
    colour: str | None = field(default=None, metadata=LATER)


def test_a_later_field_changes_no_key_until_it_is_set() -> None:
    @dataclass(frozen=True)
    class Before:
        name: ClassVar[str] = "grown"
        size: int = 1

    assert key(Grown()) == key(Before()) == key(Grown(colour=None))
    assert len({key(Grown()), key(Grown(colour="red")), key(Grown(colour="blue"))}) == 3


# --- what matters


def another(value: Any) -> Any:
    """A value of about the same type that means something else."""
    if value is None:
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return tuple(another(item) for item in value)
    return dataclasses.replace(
        value, **{(f := fields(value)[0]).name: another(getattr(value, f.name))}
    )


def keyed_values() -> list[tuple[str, Any]]:
    return [*others().items(), *((name, cls()) for name, cls in methods())]


def with_field(value: Any, name: str, new: Any) -> Any:
    """A copy with one field changed, past any validation."""
    copy: Any = object.__new__(type(value))
    for f in fields(value):
        object.__setattr__(copy, f.name, new if f.name == name else getattr(value, f.name))
    return copy


@pytest.mark.parametrize(("name", "value"), keyed_values(), ids=lambda v: v if v is str else None)
def test_every_field_matters_unless_it_is_declared_not_to(name: str, value: Any) -> None:
    for f in fields(value):
        changed = with_field(value, f.name, another(getattr(value, f.name)))
        assert (key(changed) != key(value)) == f.metadata.get("keyed", True), f"{name}.{f.name}"


@pytest.mark.parametrize(("name", "value"), keyed_values(), ids=lambda v: v if v is str else None)
def test_the_version_and_the_kind_matter(name: str, value: Any) -> None:
    cls = type(value)

    def as_class(**says: Any) -> str:
        other = type(cls.__name__, (cls,), {"__slots__": (), **says})
        copy: Any = object.__new__(other)
        for f in fields(value):
            object.__setattr__(copy, f.name, getattr(value, f.name))
        return key(copy)

    assert as_class() == key(value)
    assert as_class(version=cls.version + 1) != key(value)
    assert as_class(name="another_name") != key(value)


def test_kind_inputs_and_their_order_matter() -> None:
    a, b = content_key("corpus", 1), content_key("corpus", 2)
    keys = [key(1), key(1, a), key(1, b), key(1, a, b), key(1, b, a), content_key("other", 1)]
    assert len(set(keys)) == len(keys)


def test_true_is_not_one_and_none_is_not_nothing() -> None:
    keys = [key(v) for v in (True, 1, "1", None, "", [], [None], {}, {"a": None}, "true")]
    assert len(set(keys)) == len(keys)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Its fields speak of something else than the class's name and version."""

    name: str
    version: int = 3


@dataclass(frozen=True)
class Declared:
    name: ClassVar[str] = "declared"
    size: int = 1


@dataclass(frozen=True)
class Undeclared:
    size: int = 1


def test_fields_called_name_or_version_are_fields() -> None:
    keys = [key(Labelled("a")), key(Labelled("b")), key(Labelled("a", 4))]
    assert len(set(keys)) == 3
    assert key(Declared()) != key(Undeclared())


# --- what is refused


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    for value in (number, [number], {"a": number}, with_field(World(), "seed", number)):
        with pytest.raises(ValueError, match="JSON compliant"):
            key(value)


@pytest.mark.parametrize(
    "value",
    [b"bytes", object(), Path("a"), torch.zeros(1), np.zeros(1), len, Recipe, 1j, {1: 0, "1": 1}],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    for wrapped in (value, [value], {"a": value}):
        with pytest.raises(TypeError, match="cannot key"):
            key(wrapped)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "corpus",
        "corpus-0123",
        "corpus-0123456789abcdeg",
        "Corpus-0123456789abcdef",
        "../corpus-0123456789abcdef",
        "corpus-0123456789abcdef\n",
        "a/b-0123456789abcdef",
    ],
)
def test_a_malformed_key_never_becomes_a_path(text: str) -> None:
    with pytest.raises(ValueError, match="not a content key"):
        kind_of(text)


def test_a_key_names_its_kind() -> None:
    assert kind_of(key(1)) == "thing"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {REGENERATE}")
    GOLDEN.write_text(json.dumps(default_keys(), indent=1) + "\n")
