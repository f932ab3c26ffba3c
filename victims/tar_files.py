"""Pictures in tar files, read where they lie: an index of offsets, and nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from victims.errors import GridError
from victims.tar_headers import BoundedHeader, Oversized


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a tar file, and where its bytes are."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"

    def read_bytes(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            found = file.read(self.size)
        if len(found) < self.size:
            raise GridError(f"{self}: cut off after {len(found)} of {self.size} bytes")
        return found


# What a picture's bytes come from.
Source = Path | Member


def members(archive: Path) -> Mapping[str, Member]:
    """The regular files of a tar file by name, without hidden ones. Read once while it stays."""
    try:
        state = archive.stat()
    except OSError as error:
        raise GridError(f"{archive}: cannot be read ({error.strerror})") from error
    return _members(archive, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2048)
def _members(archive: Path, size: int, changed: int) -> Mapping[str, Member]:
    found: dict[str, Member] = {}
    try:
        # "r:" takes no compression: offsets mean nothing in a file that must be inflated first.
        with tarfile.open(archive, "r:", tarinfo=BoundedHeader) as tar:
            for entry in tar:
                path = PurePosixPath(entry.name)
                # Links point elsewhere, and a sparse file's bytes are not in one piece.
                if not entry.isreg() or entry.issparse() or path.name.startswith("."):
                    continue
                if entry.offset_data + entry.size > size:
                    raise GridError(f"{archive}: cut off within {entry.name}. Fetch it again.")
                name = path.as_posix()
                if name in found:
                    raise GridError(f"{archive}: holds {name} twice")
                found[name] = Member(archive, name, entry.offset_data, entry.size)
    except (Oversized, MemoryError) as error:
        raise GridError(f"{archive}: cannot be read ({error or type(error).__name__})") from error
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise GridError(
            f"{archive}: not a plain tar file ({type(error).__name__}: {error}). One that is"
            " compressed (.tar.gz) must be inflated first: gunzip FILE."
        ) from error
    return found
