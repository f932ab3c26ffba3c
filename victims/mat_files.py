"""Arrays of numbers in .mat files of version 5, which is all that labels of pictures need.

Structures, cells and objects are passed over: nothing is built from a file but arrays of numbers.
The format is that of MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from victims.errors import GridError

_HEADER: Final = 128
_MATRIX: Final = 14
_COMPRESSED: Final = 15
# Types of data elements that hold numbers, little endian.
_TYPES: Final = {
    **{1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"},
    **{12: "<i8", 13: "<u8"},
}
_NUMERIC: Final = range(6, 16)  # classes of arrays: double to uint64
_COMPLEX: Final = 0x0800
_MOST: Final = 2**31  # bytes that one array may unpack to

Numbers = npt.NDArray[np.generic]


def read_mat(path: Path) -> dict[str, Numbers]:
    """The real arrays of numbers in a file, by name, with their axes as MATLAB has them."""
    try:
        raw = path.read_bytes()
        if len(raw) < _HEADER or raw[126:128] != b"IM":
            raise GridError(f"{path}: no .mat file of version 5 in little-endian order")
        return dict(_arrays(raw[_HEADER:]))
    except (struct.error, zlib.error, ValueError, IndexError, OSError) as error:
        raise GridError(
            f"{path}: damaged ({type(error).__name__}: {error}). Put an intact copy there."
        ) from error


def _elements(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and bytes of each data element."""
    place = 0
    while place + 8 <= len(raw):
        kind, size = struct.unpack_from("<II", raw, place)
        if kind >> 16:  # a small element: type and size in one word, the data in the next
            kind, size, start, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            start = place + 8
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(raw):
            raise ValueError("cut off")
        yield kind, raw[start : start + size]
        place = end


def _arrays(raw: bytes) -> Iterator[tuple[str, Numbers]]:
    for kind, body in _elements(raw):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            whole = unpacker.decompress(body, _MOST)
            if unpacker.unconsumed_tail:
                raise ValueError("an array of more than 2 GiB")
            yield from _arrays(whole)
        elif kind == _MATRIX and (found := _array(body)) is not None:
            yield found


def _array(body: bytes) -> tuple[str, Numbers] | None:
    """Name and numbers of a matrix; None for what is no real array of numbers."""
    parts = list(_elements(body))
    flags = struct.unpack_from("<I", parts[0][1])[0]
    if flags & 0xFF not in _NUMERIC or flags & _COMPLEX or len(parts) < 4:
        return None
    shape = np.frombuffer(parts[1][1], "<i4").tolist()
    kind, data = parts[3]
    if kind not in _TYPES:
        raise ValueError(f"numbers of unknown type {kind}")
    flat = np.frombuffer(data, _TYPES[kind])
    return parts[2][1].decode("latin-1"), flat.reshape(shape, order="F")
