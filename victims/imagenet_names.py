"""What ImageNet's classes are called, and the order that their ids stand in.

The names that come with open_clip are in the order of the 1,000 ids of WordNet: they are given to
these ids and to no others. Folders that are called otherwise need a file of names beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from victims.errors import GridError, UsageError
from victims.imagenet_labels import WNID
from victims.picture_files import require_unique, text_of

NUM_CLASSES: Final = 1000
# SHA-256 of the 1,000 ids in their order, joined by newlines.
_KNOWN_IDS: Final = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
# The list that comes with open_clip has two names twice, which were equal text weights: their
# classes get the first word that WordNet has for them.
_TWICE: Final[Mapping[int, tuple[str, str]]] = {
    744: ("missile", "projectile"),
    836: ("sunglasses", "sunglass"),
}
_WRITE: Final = (
    "Put classnames.txt there (a name a line, in the order of the ids) or classes.json"
    ' ({"n01440764": "tench", ...}).'
)


def in_order(ids: Iterable[str]) -> list[str]:
    """Ids in the order of their classes: as numbers where all are numbers."""
    every = set(ids)
    if all(name.isascii() and name.isdecimal() for name in every):
        return sorted(every, key=lambda name: (int(name), name))
    return sorted(every)


def names_of(places: Sequence[Path], ids: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes, and their ids where the file of the names, or ImageNet itself, says
    them."""
    for place in places:
        text, table = place / "classnames.txt", place / "classes.json"
        if text.is_file():
            names = [line.strip() for line in text_of(text).splitlines()]
            if ids and len(names) != len(ids):
                raise UsageError(
                    f"{text}: {len(names)} names for {len(ids)} classes; it needs one a line, in"
                    f" the order of the ids ({', '.join(ids[:3])}, ...)"
                )
            return require_unique(names, text), []
        if table.is_file():
            named = _by_id(table)
            if unnamed := [name for name in ids if name not in named]:
                raise UsageError(f"{table}: no name for {', '.join(unnamed[:5])}")
            own = list(ids) or in_order(named)
            return require_unique([named[name] for name in own], table), own
    if ids:
        require_known(ids, places[0])
    return imagenet_names(), []


def require_known(ids: Sequence[str], where: Path) -> None:
    """That classes without names of their own are ImageNet's, whose names are known."""
    if len(ids) != NUM_CLASSES:
        raise UsageError(
            f"imagenet: {len(ids)} classes in {where}, and the names that are known are those"
            f" of all {NUM_CLASSES}. {_WRITE}"
        )
    if strange := [name for name in ids if not WNID.fullmatch(name)]:
        raise UsageError(
            f"imagenet: {NUM_CLASSES} classes in {where}, and {strange[0]!r} is no id of WordNet"
            f" such as n01440764 ({len(strange)} such): which class is which cannot be told."
            f" {_WRITE}"
        )
    if hashlib.sha256("\n".join(ids).encode()).hexdigest() != _KNOWN_IDS:
        raise UsageError(
            f"imagenet: the {NUM_CLASSES} ids in {where} ({ids[0]} to {ids[-1]}) are not those of"
            f" ImageNet's classes, whose names are known. {_WRITE}"
        )


def _by_id(table: Path) -> dict[str, str]:
    try:
        named = json.loads(text_of(table))
    except ValueError as error:
        raise GridError(f"{table}: no JSON ({error})") from error
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise GridError(f'{table}: needs names by id, {{"n01440764": "tench", ...}}')
    return named


def imagenet_names() -> tuple[str, ...]:
    """The names of all classes: OpenAI's, as open_clip has them, no name twice."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # slow to import

    names = list(IMAGENET_CLASSNAMES)
    if len(names) != NUM_CLASSES:
        raise GridError(f"open_clip has {len(names)} names of ImageNet's {NUM_CLASSES} classes")
    for index, (shared, own) in _TWICE.items():
        if names[index] == shared:
            names[index] = own
    return require_unique(names, Path("open_clip.zero_shot_metadata"))
