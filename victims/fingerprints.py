"""Digests of files by contents, remembered so that what has not changed is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from victims.errors import GridError
from victims.keys import file_sha256
from victims.tar_files import Member, Source

_HEX: Final = re.compile(r"[0-9a-f]{64}")
# A file may change twice within a tick of the file system's clock and keep its time: what changed
# less than this ago is not remembered.
_SETTLED_SECONDS: Final = 2.0


def digest_files(files: Mapping[str, Source]) -> str:
    """SHA-256 over the names given and the contents of all files, in the order of the names.

    A member of a tar file counts as the file that it would be. Remembered under the absolute path,
    size and time of change of every file: a file whose contents change while both stay goes
    unnoticed. A cache that cannot be read or written costs time and nothing else.
    """
    try:
        return _digest(files, _cache_path(files))
    except OSError as error:
        raise GridError(f"{error.filename}: cannot be read ({error.strerror})") from error


def remembered_sha256(path: Path) -> str:
    """SHA-256 of one file's bytes, remembered in the same way: weights of hundreds of megabytes
    are read once, however often they are named."""
    try:
        cached = _cache_path({"": path}, "sha256")
        if (known := _known(cached)) is not None:
            return known
        found = file_sha256(path)
        _remember(cached, found)
    except OSError as error:
        raise GridError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return found


def _known(cached: Path | None) -> str | None:
    if cached is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            known = cached.read_text(encoding="ascii").strip()
            if _HEX.fullmatch(known):
                return known
    return None


def _remember(cached: Path | None, found: str) -> None:
    if cached is not None:
        with contextlib.suppress(OSError):
            _write(cached, found)


def _digest(files: Mapping[str, Source], cached: Path | None) -> str:
    if (known := _known(cached)) is not None:
        return known
    hashed = hashlib.sha256()
    for name, path in sorted(files.items()):
        if isinstance(path, Member):
            contents = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            with path.open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").hexdigest()
        hashed.update(_bytes(name) + f"\0{contents}\n".encode())
    _remember(cached, hashed.hexdigest())
    return hashed.hexdigest()


def _cache_path(files: Mapping[str, Source], what: str = "1") -> Path | None:
    """Where the digest of these files, as they are now, is remembered; None: nowhere."""
    stamp, settled = hashlib.sha256(f"{what}\n".encode()), time.time() - _SETTLED_SECONDS
    for name, path in sorted(files.items()):
        file = path.archive if isinstance(path, Member) else path
        state = file.stat()
        if state.st_mtime > settled:
            return None
        place = _bytes(name) + b"\0" + _bytes(str(file.absolute()))
        stretch = f" {path.offset} {path.size}" if isinstance(path, Member) else ""
        stamp.update(place + f"\0{state.st_size} {state.st_mtime_ns}{stretch}\n".encode())
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        home = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # an account without a home folder
        return None
    return home / "backdoor-grid" / "fingerprints" / stamp.hexdigest()


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _write(path: Path, text: str) -> None:
    """Whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
