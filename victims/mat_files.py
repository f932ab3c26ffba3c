"""Numbers and text in .mat files of version 5, which is all that labels of pictures need.

Objects are passed over: nothing is built from a file but arrays of numbers and strings.
The format is that of MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import contextlib
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
_CELLS: Final = 1  # and other classes of arrays
_STRUCTURE: Final = 2
_TEXT: Final = 4
_WIDE: Final = (4, 17)  # text as 16-bit words
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
Parts = list[tuple[int, bytes]]


def read_mat(path: Path) -> dict[str, Numbers]:
    """The real arrays of numbers in a file, by name, with their axes as MATLAB has them."""
    with _damaged(path):
        found = ((_name(parts), _numbers(parts)) for parts in _matrices(_body(path)))
        return {name: array for name, array in found if array is not None}


def read_structures(path: Path, name: str) -> list[dict[str, Numbers | str]]:
    """The fields of each structure of an array of them, as far as they are numbers or text."""
    with _damaged(path):
        for parts in _matrices(_body(path)):
            if _name(parts) == name and _kind(parts) == _STRUCTURE:
                return _fields(parts)
    raise GridError(f"{path}: holds no array of structures called {name}")


def read_texts(path: Path, name: str) -> list[str]:
    """The texts of an array of cells, each of which holds one."""
    with _damaged(path):
        for parts in _matrices(_body(path)):
            if _name(parts) == name and _kind(parts) == _CELLS:
                cells = [list(_elements(body)) for kind, body in parts[3:] if kind == _MATRIX]
                if all(len(inner) > 3 and _kind(inner) == _TEXT for inner in cells):
                    return [_text(*inner[3]) for inner in cells]
    raise GridError(f"{path}: holds no array of texts called {name}")


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (struct.error, zlib.error, ValueError, IndexError, OSError) as error:
        raise GridError(
            f"{path}: damaged ({type(error).__name__}: {error}). Put an intact copy there."
        ) from error


def _body(path: Path) -> bytes:
    raw = path.read_bytes()
    if len(raw) < _HEADER or raw[126:128] != b"IM":
        raise GridError(f"{path}: no .mat file of version 5 in little-endian order")
    return raw[_HEADER:]


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


def _matrices(raw: bytes) -> Iterator[Parts]:
    """The elements of every array: its flags, its shape, its name and what it holds."""
    for kind, body in _elements(raw):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            whole = unpacker.decompress(body, _MOST)
            if unpacker.unconsumed_tail:
                raise ValueError("an array of more than 2 GiB")
            yield from _matrices(whole)
        elif kind == _MATRIX:
            yield list(_elements(body))


def _kind(parts: Parts) -> int:
    """The class of an array, 0 for one of complex numbers."""
    flags = int(struct.unpack_from("<I", parts[0][1])[0])
    return 0 if flags & _COMPLEX else flags & 0xFF


def _name(parts: Parts) -> str:
    return parts[2][1].decode("latin-1")


def _numbers(parts: Parts) -> Numbers | None:
    """What an array of numbers holds; None for what is none."""
    if _kind(parts) not in _NUMERIC or len(parts) < 4:
        return None
    shape = np.frombuffer(parts[1][1], "<i4").tolist()
    kind, data = parts[3]
    if kind not in _TYPES:
        raise ValueError(f"numbers of unknown type {kind}")
    return np.frombuffer(data, _TYPES[kind]).reshape(shape, order="F")


def _fields(parts: Parts) -> list[dict[str, Numbers | str]]:
    """Structures lie one after another, each with its fields in the order of their names."""
    width, names = struct.unpack_from("<i", parts[3][1])[0], parts[4][1]
    if width < 1:
        raise ValueError(f"names of {width} characters")
    cut = [names[at : at + width] for at in range(0, len(names), width)]
    said = [name.partition(b"\0")[0].decode("latin-1") for name in cut]
    found: list[dict[str, Numbers | str]] = []
    for first in range(5, len(parts), len(said)):
        structure: dict[str, Numbers | str] = {}
        for name, (kind, body) in zip(said, parts[first : first + len(said)], strict=True):
            inner = list(_elements(body)) if kind == _MATRIX else []
            if len(inner) > 3 and _kind(inner) == _TEXT:
                structure[name] = _text(*inner[3])
            elif len(inner) > 3 and (numbers := _numbers(inner)) is not None:
                structure[name] = numbers
        found.append(structure)
    return found


def _text(kind: int, data: bytes) -> str:
    return data.decode("utf-16-le" if kind in _WIDE else "utf-8")
