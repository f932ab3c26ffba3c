"""Content keys: an artefact's identity is the hash of everything that determines its contents."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import json.encoder
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NewType

Key = NewType("Key", str)

# Metadata of a field that came after the first results: in a key where it is not its default.
LATER = MappingProxyType({"keyed_if_set": True})

PATTERN = re.compile(r"([a-z][a-z_]*)-([0-9a-f]{16})")


def canonical(value: Any) -> Any:
    """Reduce a configuration to JSON types that mean the same on every machine.

    Field order, the spelling of a number (1 or 1.0) and spelled-out defaults vanish here; a
    dataclass keeps its kind (``name`` or the class's name) and its ``version``. A field marked
    ``metadata={"keyed": False}`` says where something is found, not what it is; one marked `LATER`
    is left out while it has its default, so that what was made before it came is still found.
    """
    # By exact type first: a plan of 10,000 cells asks a million times, mostly about these.
    cls = type(value)
    if cls is str or cls is int or cls is bool or value is None:
        return value
    if cls is list or cls is tuple:
        return [canonical(item) for item in value]
    if isinstance(value, Enum):
        return canonical(value.value)
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if dataclasses.is_dataclass(cls):
        names, every, later = _fields(cls)
        # What the class says of itself; a field of that name speaks of something else.
        kind = cls.__name__ if "name" in every else getattr(cls, "name", cls.__name__)
        version = 1 if "version" in every else getattr(cls, "version", 1)
        fields = {name: canonical(getattr(value, name)) for name in names}
        for name, default in later:
            if getattr(value, name) == default:
                del fields[name]
        return {"kind": kind, "version": version, "fields": fields}
    if isinstance(value, Mapping):
        named = {str(key): canonical(value[key]) for key in value}
        if len(named) != len(value):
            raise TypeError(f"cannot key a mapping whose keys read alike: {list(value)}")
        return named
    if isinstance(value, AbstractSet):
        return sorted((canonical(item) for item in value), key=_body)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [canonical(item) for item in value]
    raise TypeError(
        f"cannot key a {type(value).__name__}: what is keyed holds numbers, strings, enums,"
        " lists, mappings and dataclasses of these"
    )


@functools.cache
def _fields(
    cls: type[Any],
) -> tuple[tuple[str, ...], frozenset[str], tuple[tuple[str, Any], ...]]:
    """Names of the keyed fields of a dataclass, of all its fields, and the later ones' defaults."""
    found = dataclasses.fields(cls)
    keyed = tuple(f.name for f in found if f.metadata.get("keyed", True))
    later = tuple((f.name, f.default) for f in found if f.metadata.get("keyed_if_set"))
    return keyed, frozenset(f.name for f in found), later


_body = json.JSONEncoder(sort_keys=True, allow_nan=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring_ascii

# Object -> its text, by identity; the object stays with it, so that no other takes its number.
_texts: dict[int, tuple[Any, str]] = {}
MOST_TEXTS = 10_000


def text_of(value: Any) -> str:
    """The canonical form as JSON.

    The keys of a plan hold the same few hundred methods and recipes a hundred thousand times: a
    tuple or frozen dataclass that holds nothing which can change is written once.
    """
    cls = type(value)
    if cls is str:
        return _quoted(value)
    if cls is int:
        return repr(value)
    if cls is list:
        return f"[{','.join(map(text_of, value))}]"
    found = _texts.get(id(value))
    if found is not None:
        return found[1]
    if cls is tuple:
        text = f"[{','.join(map(text_of, value))}]"
    else:
        text = _body(canonical(value))
        if not _is_frozen(cls):
            return text
    try:
        hash(value)
    except TypeError:  # it holds something that can change
        return text
    if len(_texts) >= MOST_TEXTS:
        _texts.clear()
    _texts[id(value)] = (value, text)
    return text


def _is_frozen(cls: type[Any]) -> bool:
    """Whether a class is a frozen dataclass."""
    params: Any = getattr(cls, "__dataclass_params__", None)
    return params is not None and bool(params.frozen)


def digest(value: Any) -> str:
    """SHA-256 of the canonical form, in hexadecimal."""
    return hashlib.sha256(_body(canonical(value)).encode()).hexdigest()


def content_key(
    kind: str, params: Any, inputs: Sequence[str] = (), more: tuple[str, ...] = ()
) -> Key:
    """Key of an artefact of ``kind`` made from ``params`` and the artefacts ``inputs``.

    ``more`` are further inputs: a tuple that many keys share, so that it is written once.
    """
    if type(params) is dict and set(map(type, params)) == {str}:
        fields = [f"{_quoted(name)}:{text_of(params[name])}" for name in sorted(params)]
        about = f"{{{','.join(fields)}}}"
    else:
        about = text_of(params)
    made_of = [_quoted(key) for key in inputs]
    if more:
        made_of.append(text_of(more)[1:-1])
    body = f"[{_quoted(kind)},{about},[{','.join(made_of)}]]"
    return Key(f"{kind}-{hashlib.sha256(body.encode()).hexdigest()[:16]}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(key: str) -> str:
    """The kind a key names; a malformed key raises, so that none can become a path."""
    match = PATTERN.fullmatch(key)
    if match is None:
        raise ValueError(f"not a content key: {key!r} (expected kind-16hexdigits)")
    return match.group(1)
