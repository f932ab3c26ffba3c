"""What a manifest may say. It decides which files are read, and anybody may have written it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

FORMAT = 1
# Names of classes, templates and curves stand in manifests; the largest of ours is far below.
MAX_BYTES = 16 << 20
# A file's name and an attempt's: nothing that leads elsewhere, hides, or means more to a shell.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class BadManifest(ValueError):
    """A manifest that is none, in words."""


@dataclass(frozen=True, slots=True)
class Entry:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The attempt that made an artefact, its files and what is told about it."""

    key: str
    attempt: str
    files: Mapping[str, Entry]
    meta: Mapping[str, Any]

    def encode(self) -> bytes:
        files = {n: {"size": e.size, "sha256": e.sha256} for n, e in self.files.items()}
        body = {"format": FORMAT, "key": self.key, "attempt": self.attempt, "files": files}
        return json.dumps({**body, "meta": self.meta}, sort_keys=True, allow_nan=False).encode()


def _refuse(word: str) -> NoReturn:
    raise BadManifest(f"{word} is no number of JSON")


def plain_json(text: bytes, *, nan: bool = False) -> Any:
    """JSON as the standard has it, or with ``nan``; what is wrong with it is a `BadManifest`."""
    try:
        return json.loads(text, parse_constant=None if nan else _refuse)
    except RecursionError as error:
        raise BadManifest("it is nested too deep") from error
    except ValueError as error:
        raise BadManifest(f"it is no JSON ({str(error)[:100]})") from error


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadManifest(f"{what} must be a mapping, not {type(value).__name__}")
    return value


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise BadManifest(f"{str(value)[:60]!r} is no name of {what}")
    return value


def _entry(name: str, value: Any) -> Entry:
    found = _mapping(value, f"the entry of {name}")
    size, sha256 = found.get("size"), found.get("sha256")
    if type(size) is not int or size < 0:
        raise BadManifest(f"the size of {name} must be a number of bytes")
    if not isinstance(sha256, str) or SHA256.fullmatch(sha256) is None:
        raise BadManifest(f"the digest of {name} must be 64 hexadecimal digits")
    return Entry(size, sha256)


def decode(text: bytes, key: str) -> Manifest:
    """The manifest of ``key``."""
    found = _mapping(plain_json(text), "a manifest")
    if found.get("key") != key:
        raise BadManifest(f"it is the manifest of {str(found.get('key'))[:60]!r}")
    files = _mapping(found.get("files"), "files")
    entries = {_name(name, "a file"): _entry(name, value) for name, value in files.items()}
    attempt = _name(found.get("attempt"), "an attempt")
    return Manifest(key, attempt, entries, _mapping(found.get("meta"), "meta"))
