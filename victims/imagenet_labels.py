"""Which class each picture of a flat ImageNet validation folder has, from the files that say so.

A table speaks of ids of WordNet, or of numbers in the order of these ids. The numbers of
``ILSVRC2012_validation_ground_truth.txt`` are in another order, so it needs its mapping.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from victims.errors import GridError, UsageError
from victims.mat_files import read_structures
from victims.picture_files import text_of

WNID: Final = re.compile(r"n\d{8}")
_NUMBERED: Final = re.compile(r"_val_(\d{8})")
_SYNSETS: Final = "imagenet_2012_validation_synset_labels.txt"
_GROUND_TRUTH: Final = "ILSVRC2012_validation_ground_truth.txt"
_MAPPINGS: Final = ("meta.mat", "ILSVRC2012_mapping.txt", "map_clsloc.txt")

# An id of WordNet, or a number in the order of these ids.
Label = str | int
Labels = dict[str, Label]


def labels_of(names: Sequence[str], places: Sequence[Path]) -> tuple[Labels, Path] | None:
    """Label by file name, and the table that says so: the first that lies in one of the places."""
    for name, read in _TABLES.items():
        for place in places:
            if (table := place / name).is_file():
                found = read(table, names, places)
                _require_all(found, names, table)
                return found, table
    return None


def _require_all(labels: Labels, names: Sequence[str], table: Path) -> None:
    there = set(names)
    if missing := sorted(labels.keys() - there):
        raise UsageError(
            f"{table}: speaks of {missing[0]} and {len(missing) - 1} more pictures that are not"
            " there. Unpack the whole set, or write a table of what is."
        )
    if unknown := sorted(there - labels.keys()):
        raise GridError(f"{table}: has no line for {unknown[0]} ({len(unknown)} such pictures)")


def _in_order(table: Path, names: Sequence[str], said: Sequence[Label]) -> Labels:
    """A table with a line for each picture, by the number in the picture's name."""
    found: Labels = {}
    for name in names:
        match = _NUMBERED.search(name)
        if match is None or not 1 <= int(match[1]) <= len(said):
            raise GridError(
                f"{table}: has {len(said)} lines, one for each ILSVRC2012_val_00000001.JPEG and on;"
                f" there is none for {name}"
            )
        found[name] = said[int(match[1]) - 1]
    if len(found) < len(said):
        raise UsageError(
            f"{table}: has {len(said)} lines for {len(found)} pictures. Unpack the whole set."
        )
    return found


def _synset_labels(table: Path, names: Sequence[str], places: Sequence[Path]) -> Labels:
    said = text_of(table).split()
    if strange := [(line, word) for line, word in enumerate(said, 1) if not WNID.fullmatch(word)]:
        raise GridError(f"{table}, line {strange[0][0]}: {strange[0][1]!r} is no id of WordNet")
    return _in_order(table, names, said)


def _mapping(table: Path, places: Sequence[Path]) -> dict[str, str]:
    """The id of WordNet of each number, from the development kit or a text."""
    found = [place / name for place in places for name in _MAPPINGS if (place / name).is_file()]
    if not found:
        raise UsageError(
            f"{table}: its numbers are in an order of their own, and what they mean is not there."
            f" Put meta.mat of the development kit beside it, or {_MAPPINGS[1]}: a line '1"
            " n02119789' for each number. Or sort the pictures into folders by class."
        )
    wnids: dict[str, str] = {}
    for place, (number, wnid) in enumerate(_pairs(found[0]), 1):
        if not number.isdecimal() or not WNID.fullmatch(wnid) or number in wnids:
            raise GridError(
                f"{found[0]}, line {place}: needs a number of its own and an id of WordNet"
            )
        wnids[number] = wnid
    return wnids


def _pairs(mapping: Path) -> Iterator[tuple[str, str]]:
    """Numbers and ids, in the order of the file."""
    if mapping.suffix == ".mat":
        for synset in read_structures(mapping, "synsets"):
            number, wnid = synset.get("ILSVRC2012_ID"), synset.get("WNID")
            text = ""
            if isinstance(number, np.ndarray) and number.size == 1:
                text = str(int(number.item()))
            yield text, wnid if isinstance(wnid, str) else ""
        return
    for line in text_of(mapping).splitlines():
        first, second = (*line.split(), "", "")[:2]
        yield (first, second) if first.isdecimal() else (second, first)


def _ground_truth(table: Path, names: Sequence[str], places: Sequence[Path]) -> Labels:
    wnids = _mapping(table, places)
    said: list[Label] = []
    for line, number in enumerate(text_of(table).split(), 1):
        if number not in wnids:
            raise GridError(f"{table}, line {line}: {number!r} is not in its mapping")
        said.append(wnids[number])
    return _in_order(table, names, said)


def _solution(table: Path, names: Sequence[str], places: Sequence[Path]) -> Labels:
    ending = {PurePosixPath(name).stem: name for name in names}
    found: Labels = {}
    for line, row in enumerate(csv.DictReader(text_of(table).splitlines()), 2):
        picture, boxes = row.get("ImageId") or "", (row.get("PredictionString") or "").split()
        if not picture or not boxes or not WNID.fullmatch(boxes[0]):
            raise GridError(f"{table}, line {line}: needs ImageId and PredictionString (id, box)")
        found[ending.get(picture, picture)] = boxes[0]
    return found


def _numbers(table: Path, names: Sequence[str], places: Sequence[Path]) -> Labels:
    found: Labels = {}
    for line, text in enumerate(text_of(table).splitlines(), 1):
        name, _, number = text.strip().rpartition(" ")
        if not name or not number.isdecimal():
            raise GridError(f"{table}, line {line}: needs a file name and the number of its class")
        found[PurePosixPath(name).name] = int(number)
    return found


def _labels_csv(table: Path, names: Sequence[str], places: Sequence[Path]) -> Labels:
    found: Labels = {}
    for line, row in enumerate(csv.DictReader(text_of(table).splitlines()), 2):
        name, number = row.get("image"), row.get("label")
        if name is None or number is None:
            there = ", ".join(key for key in row if key) or "none"
            raise GridError(
                f"{table}, line {line}: needs the columns image and label; columns there: {there}"
            )
        if not name or not number.isdecimal():
            raise GridError(
                f"{table}, line {line}: label {number!r} of {name!r} is no number. It must be the"
                " number of the class, in the order of the ids of WordNet from 0; of ids write"
                f" {_SYNSETS}, one a line."
            )
        found[PurePosixPath(name).name] = int(number)
    return found


# The official ones first; the last is a copy's copy.
_TABLES: Final[Mapping[str, Callable[[Path, Sequence[str], Sequence[Path]], Labels]]] = {
    _SYNSETS: _synset_labels,
    _GROUND_TRUTH: _ground_truth,
    "LOC_val_solution.csv": _solution,
    "val.txt": _numbers,
    "labels.csv": _labels_csv,
}
TABLES: Final = tuple(_TABLES)


def require_cover(numbers: Sequence[int], num_classes: int, where: Path) -> None:
    """Every class has pictures, and every picture one of the classes: accuracy over a set of
    labels with holes in it is the accuracy of another set."""
    have = set(numbers)
    if outside := sorted(have - set(range(num_classes))):
        raise GridError(f"{where}: class {outside[0]} is outside 0..{num_classes - 1}")
    if missing := sorted(set(range(num_classes)) - have):
        some = ", ".join(map(str, missing[:5]))
        raise GridError(
            f"{where}: labels must cover all {num_classes} classes, and {len(missing)} never occur"
            f" ({some}). A labels.csv with 998 of the 1,000 is passed around: use the official"
            f" labels, in {TABLES[0]} or {TABLES[1]}, or folders by class."
        )
