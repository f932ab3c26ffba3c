"""Headers of tar files that are read with bounds: what precedes a member may claim any size, and
would be taken into memory before anybody sees a name.
"""

from __future__ import annotations

import tarfile
from typing import Any, Final, Self

MOST_HEADER_BYTES: Final = 1 << 20  # of one extended header: a name, or records of a member
_EXTENDED: Final = frozenset(
    [
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    ]
)


class Oversized(tarfile.TarError):
    """A header of a size that no honest archive has."""


class BoundedHeader(tarfile.TarInfo):
    """A member's header; extended ones above a mebibyte, and maps of holes, are refused."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _EXTENDED and not 0 <= found.size <= MOST_HEADER_BYTES:
            raise Oversized(
                f"an extended header of {found.size} bytes; up to {MOST_HEADER_BYTES} are read"
            )
        if found.type == tarfile.GNUTYPE_SPARSE:
            raise Oversized(f"{found.name}: sparse files are not read")
        return found

    def _proc_gnusparse_10(self, *_: Any) -> None:
        # Their newest form keeps the map of holes in the data, with no bound but their end.
        raise Oversized(f"{self.name}: sparse files are not read")
