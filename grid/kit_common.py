"""The clauses that every method keeps, attack or defense, and building one as a grid file does."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union

from grid.decode import decode, type_hints
from grid.kit_base import Broken, expect
from grid.nodes import Raw, Where
from victims.errors import UsageError
from victims.keys import Key

BLOCKS = ("Idea", "Reference", "Symbols", "Where", "Differences", "Cost")


def target_of(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def built(cls: type[Any], variant: str = "", *, quick: bool = True) -> Any:
    """The method with its defaults, or with those of a variant, made quick where it says how."""
    hurry = getattr(cls, "quick", {}) if quick else {}
    values = {**(cls.variants[variant] if variant else {}), **hurry}
    try:
        return decode(cls, Raw.of(values, Where(path=f"variants.{variant}" if variant else "")))
    except (UsageError, ValueError, TypeError) as error:
        what = f"variant {variant!r}" if variant else "its defaults"
        raise Broken(
            f"found that {target_of(cls)} cannot be built with {what}: {error}; expected a default"
            " for every field and, in `variants`, values as a grid file writes them"
        ) from error


# --- checks on every method

KeyOf = Callable[[Any], Sequence[Key]]


def is_plain_data(method: Any) -> None:
    """It is a frozen, keyword-only dataclass."""
    cls = type(method)
    expect(dataclasses.is_dataclass(cls), f"a {cls.__name__} that is none", "a frozen dataclass")
    frozen = cls.__dataclass_params__.frozen
    expect(frozen, "a dataclass that can be changed", "frozen=True")
    loose = [f.name for f in dataclasses.fields(method) if not f.kw_only]
    expect(not loose, f"positional fields {', '.join(loose)}", "kw_only=True")


def declares_the_common(method: Any) -> None:
    """Name, version, paper and variants, which both kinds of method declare."""
    cls = type(method)
    for name in ("name", "paper"):
        value = getattr(cls, name, None)
        good = isinstance(value, str) and value != ""
        expect(good, f"`{name}` = {value!r}", "a word or more of text")
    version = getattr(cls, "version", None)
    expect(type(version) is int and version >= 1, f"`version` = {version!r}", "a whole number >= 1")
    variants = getattr(cls, "variants", None)
    expect(isinstance(variants, Mapping), f"`variants` = {variants!r}", "a mapping, perhaps empty")
    plain = built(cls, quick=False)
    same = [name for name in variants or {} if built(cls, name, quick=False) == plain]
    expect(not same, f"variants equal to the defaults: {', '.join(same)}", "a difference")


def explains_itself(method: Any) -> None:
    """The docstring of the file or of the class has the six blocks, in order."""
    cls = type(method)
    texts = [inspect.getdoc(cls) or "", inspect.getdoc(sys.modules[cls.__module__]) or ""]
    pattern = rf"^({'|'.join(BLOCKS)}):[ \n]*\S"
    found = max((re.findall(pattern, text, re.MULTILINE) for text in texts), key=len)
    expect(
        found == list(BLOCKS),
        f"the blocks {', '.join(found) or 'none'} in the docstring of {cls.__module__}",
        f"{', '.join(f'{block}: ...' for block in BLOCKS)}, in this order, none empty",
    )


def keys_every_field(method: Any, keys_of: KeyOf) -> None:
    """Equal configurations have equal keys; another legal value of any field changes them all."""
    cls: Any = type(method)
    own = keys_of(method)
    expect(
        keys_of(cls(**_values(method))) == own,
        "another key for the same values spelled out",
        "the same key",
    )
    hints = type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(method)}
    for name, field in fields.items():
        value = getattr(method, name)
        other = _changed(method, name, list(alternatives(hints[name], value)))
        theirs = keys_of(other)
        shown = f"{name} = {getattr(other, name)!r} instead of {value!r}"
        if field.metadata.get("keyed", True):
            kept = [a for a, b in zip(own, theirs, strict=True) if a == b]
            expect(not kept, f"the key {', '.join(kept)} also with {shown}", "another key")
            continue
        # Where a thing lies is no identity, what it is must then be one.
        expect(own == theirs, f"another key with {shown}, marked keyed: False", "the same key")
        pinned = fields.get(f"{name}_sha256")
        expect(
            pinned is not None and pinned.metadata.get("keyed", True),
            f"no keyed field {name}_sha256 beside {name}, which is marked keyed: False",
            "the content's digest in the key where its place is not",
        )


def _values(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def _changed(method: Any, name: str, values: Sequence[Any]) -> Any:
    for value in values:
        try:
            return dataclasses.replace(method, **{name: value})
        except (ValueError, UsageError):
            continue
    shown = ", ".join(map(repr, values)) or "no value of its type"
    raise Broken(
        f"found no other legal value of {name} (tried {shown}); expected a type whose neighbouring"
        " values are legal, such as a number, a word, an enum or an optional one of these"
    )


def alternatives(hint: Any, value: Any) -> Iterator[Any]:
    """Values of a field's type that are not the one it has, likely legal ones first."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for arg in args:
            fits = arg is type(None) or isinstance(value, typing.get_origin(arg) or arg)
            yield from alternatives(arg, value if fits else None)
    elif origin is Literal:
        yield from (choice for choice in args if choice != value)
    elif hint is type(None):
        yield from [] if value is None else [None]
    elif dataclasses.is_dataclass(hint) and value is not None:
        hints = type_hints(type(value))  # type: ignore[arg-type]
        for f in dataclasses.fields(value):
            for other in alternatives(hints[f.name], getattr(value, f.name)):
                yield dataclasses.replace(value, **{f.name: other})
    elif origin in (tuple, Sequence, list) and value:
        for other in alternatives(args[0], value[0]):
            yield (other, *value[1:])
    elif isinstance(hint, type) and issubclass(hint, Enum):
        yield from (member for member in hint if member is not value)
    elif hint is bool:
        yield not value
    elif hint is int:
        yield from (2, 1, 3) if value is None else (value + 1, value - 1, 2 * value)
    elif hint is float:
        yield from (0.5, 2.0) if not value else (value / 2, value * 1.25, value + 0.125)
    elif hint is str:
        yield f"{value or ''}x"
