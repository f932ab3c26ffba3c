"""Which pictures a set is trained on and which it is tested on: lists of a release, or a cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from victims.errors import GridError, UsageError
from victims.picture_files import listed as entries
from victims.picture_files import pictures_in, text_of

# A picture, by its path below the set's folder, and what its class is called on disk.
Row = tuple[str, str]
Listing = Callable[[Path], Iterable[Row]]


def _lines(*tables: str) -> Callable[[Path], Iterator[tuple[Path, int, str]]]:
    """The lines of some lists in a set's folder, with their places."""

    def read(folder: Path) -> Iterator[tuple[Path, int, str]]:
        for name in tables:
            if not (folder / name).is_file():
                raise UsageError(f"{folder}: lacks {name}, a list of its pictures. Put it there.")
            for line, text in enumerate(text_of(folder / name).splitlines(), 1):
                if text.strip() and not text.startswith("#"):
                    yield folder / name, line, text.strip()

    return read


def listed(*tables: str, row: Callable[[str], Row], ending: str = "", below: str = "") -> Listing:
    """Pictures of some lists; ``row`` reads the picture and the class out of a line."""
    lines = _lines(*tables)

    def read(folder: Path) -> Iterator[Row]:
        for table, line, text in lines(folder):
            name, of = row(text)
            if not name or not of or ".." in PurePosixPath(name).parts:
                raise GridError(f"{table}, line {line}: names no picture and class: {text!r}")
            yield f"{below}{name.lstrip('/')}{ending}", of

    return read


def folder_first(text: str) -> Row:
    return text, text.strip("/").rpartition("/")[0]


def below_letter(text: str) -> Row:
    """``/a/abbey/sun_1.jpg`` is an abbey."""
    return text, text.strip("/").rpartition("/")[0].partition("/")[2]


def picture_then_class(text: str) -> Row:
    name, _, of = text.partition(" ")
    return name, of


def breed(text: str) -> Row:
    """``Abyssinian_100 1 1 1``: the breed is in the picture's name."""
    name = text.partition(" ")[0]
    return name, name.rpartition("_")[0]


def cut(is_test: Callable[[int, int], bool], *, tested: bool) -> Listing:
    """A class's folder, shuffled by the digests of its pictures' names and cut: by the place of a
    picture and the number of them."""

    def read(folder: Path) -> Iterator[Row]:
        for of in entries(folder):
            if of.name == "BACKGROUND_Google" or not of.is_dir():
                continue
            names = sorted((path.name for path in pictures_in(of)), key=_shuffled)
            for place, name in enumerate(names):
                if is_test(place, len(names)) is tested:
                    yield f"{of.name}/{name}", of.name

    return read


def sorted_into(*parts: str) -> Listing:
    """Pictures of some parts, each a folder with one of every class."""

    def read(folder: Path) -> Iterator[Row]:
        rows = {
            part: [
                (f"{part}/{of.name}/{path.name}", of.name)
                for of in entries(folder / part)
                if of.is_dir()
                for path in pictures_in(of)
            ]
            for part in parts
        }
        every = {of for own in rows.values() for _, of in own}
        for part, own in rows.items():
            if missing := sorted(every - {of for _, of in own}):
                raise GridError(
                    f"{folder}: no pictures in {part}/{missing[0]}/, and there are of that class"
                    " elsewhere. Unpack the whole set there."
                )
            yield from own

    return read


def _shuffled(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def after_30(place: int, count: int) -> bool:
    return place >= 30


def last_fifth(place: int, count: int) -> bool:
    return place >= count - count // 5
