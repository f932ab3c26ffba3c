"""Nodes to frozen dataclasses, strictly: what a class does not declare is an error with a place.

The type of a field says what may stand there, and nothing is guessed: a number in quotes is text.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from grid.nodes import FLOAT, Raw, Where
from victims.errors import GridError, UsageError, near

T = TypeVar("T")


def decode(cls: type[T], raw: Any, where: Where | None = None, base: T | None = None) -> T:
    """Build ``cls`` from a `Raw` or from plain data at ``where``.

    With ``base``, keys that are not given keep its values. A nested dataclass whose field has a
    default is laid over that default in the same way.
    """
    if not isinstance(raw, Raw):
        raw = Raw.of(raw, where or Where())
    made: Any = cls
    hints = type_hints(made)
    fields = {f.name: f for f in dataclasses.fields(made) if f.init}
    raw.check_keys(fields)
    items, values = raw.items(), dict[str, Any]()
    for name, item in items.items():
        default = _default(fields[name]) if base is None else getattr(base, name)
        values[name] = _convert(hints[name], item, default)
    if base is None:
        needed = [name for name, f in fields.items() if _default(f) is dataclasses.MISSING]
        missing = [name for name in needed if name not in items]
        if missing:
            raise raw.error(f"missing key {missing[0]!r}. Required here: {', '.join(needed)}.")
    with placed(raw):
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]


@contextmanager
def placed(raw: Raw) -> Iterator[None]:
    """Give errors about a value its place: the line of the key that the message begins with."""
    try:
        yield
    except (ValueError, UsageError) as error:
        message, data = str(error), raw.node.data
        head = re.match(r"\w+", message)
        below = data.get(head.group()) if isinstance(data, Mapping) and head else None
        line = below.line if below else raw.where.line
        raise dataclasses.replace(raw.where, line=line).error(message) from error


@cache
def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a class's fields, resolved."""
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise GridError(
            f"{cls.__module__}.{cls.__qualname__}: {error}. The types of its fields are read when"
            " a grid file is: import them for real, not under TYPE_CHECKING."
        ) from error


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _convert(hint: Any, raw: Raw, default: Any) -> Any:
    data, origin, args = raw.node.data, get_origin(hint), get_args(hint)
    if hint is Raw:
        return raw
    if hint is Any:
        return raw.plain()
    if origin in (Union, types.UnionType):
        return _union(args, raw, default)
    if origin is Literal:
        return _choice({str(value): value for value in args}, raw)
    if origin is tuple and Ellipsis not in args:
        elements = raw.elements()
        if len(elements) != len(args):
            raise raw.error(f"expected {len(args)} values, got {len(elements)}")
        pairs = zip(args, elements, strict=True)
        return tuple(_convert(arg, item, None) for arg, item in pairs)
    if origin in (tuple, list, Sequence):
        return tuple(_convert(args[0], item, None) for item in raw.elements())
    if origin in (dict, Mapping):
        return {name: _convert(args[1], item, None) for name, item in raw.items().items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice({str(member.value): member for member in hint}, raw)
    if hint in (bool, str, int, float):
        return _scalar(hint, raw, data)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(data, str) and data == getattr(hint, "name", None):
            return decode(hint, Raw.of({}, raw.where))  # its name alone: all its defaults
        return decode(hint, raw, base=default if isinstance(default, hint) else None)
    raise GridError(f"{raw.where}: a field of type {hint} cannot be given in a grid file")


def _union(args: tuple[Any, ...], raw: Raw, default: Any) -> Any:
    rest = [arg for arg in args if arg is not types.NoneType]
    if raw.node.data is None and len(rest) < len(args):
        return None
    problems = []
    for arg in rest:
        try:
            return _convert(arg, raw, default)
        except UsageError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if isinstance(raw.node.data, Mapping):
        # Only a dataclass is written as a mapping: what is wrong lies inside of it.
        inner = [p for a, p in zip(rest, problems, strict=True) if dataclasses.is_dataclass(a)]
        raise (inner or problems)[0]
    wanted = " or ".join(_wanted(arg) for arg in rest)
    raise raw.error(f"expected {wanted}, got {raw.show()}")


def _wanted(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return str(getattr(hint, "name", hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(str(member.value) for member in hint)
    return _EXPECTED.get(hint, str(hint))


def _choice(choices: Mapping[str, Any], raw: Raw) -> Any:
    text = raw.node.text
    if isinstance(raw.node.data, Mapping | tuple) or text not in choices:
        known = ", ".join(choices)
        raise raw.error(f"{raw.show()} is not a choice.{near(text, choices)} Known: {known}.")
    return choices[text]


_EXPECTED: Mapping[Any, str] = {
    bool: "true or false",
    str: "text",
    int: "a whole number",
    float: "a number",
}


def _scalar(hint: type[Any], raw: Raw, data: Any) -> Any:
    if hint is float and type(data) in (int, float):
        if abs(data) < math.inf:
            return float(data)
        raise raw.error(f"expected a finite number, got {raw.show()}")
    if type(data) is hint:
        if hint is int and abs(data) >= 2**63:
            raise raw.error(f"expected a whole number below 2^63, got {raw.show()}")
        return data
    advice = ""
    if hint is str and type(data) in (int, float, bool):
        advice = f". Write it in quotes: '{raw.node.text}'"
    elif hint in (int, float) and isinstance(data, str) and FLOAT.fullmatch(data.strip()):
        advice = ". Write it without quotes"
    raise raw.error(f"expected {_EXPECTED[hint]}, got {raw.show()}{advice}")
