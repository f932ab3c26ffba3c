"""Pictures with five captions each: COCO's and Flickr30k's test pictures, in Karpathy's splits.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR
2015. As a corpus, a picture is one row, whose caption has its captions as lines.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from victims.errors import GridError, UsageError, unknown
from victims.fingerprints import digest_files
from victims.labelled_files import LabelledChunk, absolute
from victims.picture_files import absent, fit_rows, part_of_files, text_of

CAPTIONS: Final = 5  # of each picture; some have more, of which the first count
_CHUNK_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Captioned:
    """A picture's file, what it is called wherever it lies, and its captions."""

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a set lies: its folder's names, those of its pictures, and its lists."""

    folders: tuple[str, ...]
    pictures: tuple[str, ...]
    split_file: str
    tables: tuple[str, ...] = ()


RETRIEVAL_SETS: Final[Mapping[str, _Home]] = {
    "coco": _Home(("coco", "COCO", ""), ("", "images"), "dataset_coco.json"),
    "flickr30k": _Home(
        ("flickr30k", "Flickr30k", ""),
        ("flickr30k-images", "flickr30k_images", "images", "Images", ""),
        "dataset_flickr30k.json",
        ("results_20130124.token", "results.csv", "captions.txt"),
    ),
}
_TEST_LISTS: Final = ("flickr30k_test.txt", "test.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSet:
    """The first ``num_rows`` test pictures of a set. ``fingerprint`` is the digest of pictures and
    captions, which must still be the same when they are read. `retrieval_set` makes these."""

    name: ClassVar[str] = "retrieval_set"
    version: ClassVar[int] = 1

    dataset: str
    root: str = field(metadata={"keyed": False})
    fingerprint: str
    size: int
    num_rows: int

    split: ClassVar[str] = "report"
    classes: ClassVar[Sequence[str]] = ()
    templates: ClassVar[Sequence[str]] = ()

    def chunks(self) -> Iterator[LabelledChunk]:
        rows = captioned(self.dataset, self.root)[: self.num_rows]
        if _digest(rows) != self.fingerprint:
            raise UsageError(
                f"{self.dataset}: the files in {self.root} are not those that were planned with "
                f"(fingerprint {self.fingerprint[:16]}): plan again, or put those files back."
            )
        part = part_of_files([row.path for row in rows], [-1] * len(rows))
        for start in range(0, len(rows), _CHUNK_ROWS):
            some = np.arange(start, min(start + _CHUNK_ROWS, len(rows)))
            captions = ["\n".join(rows[row].captions) for row in some.tolist()]
            images = fit_rows(part, some, self.size)
            yield LabelledChunk(images, part.labels[some], captions)


def retrieval_set(dataset: str, root: str, size: int, num_rows: int | None = None) -> RetrievalSet:
    """A set where it lies; ``num_rows`` takes fewer pictures than there are."""
    rows = captioned(dataset, root)
    if num_rows is not None and not 2 <= num_rows <= len(rows):
        raise UsageError(f"{dataset}: rows is {num_rows}; there are 2 to {len(rows)} to be had")
    rows = rows[:num_rows]
    return RetrievalSet(
        dataset=dataset,
        root=str(absolute(root)),
        fingerprint=_digest(rows),
        size=size,
        num_rows=len(rows),
    )


def captioned(dataset: str, root: str) -> list[Captioned]:
    """The test pictures of a set with five captions each, in the order of its list."""
    if dataset not in RETRIEVAL_SETS:
        raise unknown("retrieval set", dataset, RETRIEVAL_SETS)
    home, place = RETRIEVAL_SETS[dataset], absolute(root)
    wanted = (home.split_file, *home.tables)
    folder = next(
        (place / f for f in home.folders if any((place / f / w).is_file() for w in wanted)), None
    )
    if folder is None:
        advice = "It holds Karpathy's split and the captions: put it beside the pictures."
        raise absent(dataset, " or ".join(wanted), place, advice)
    if (folder / home.split_file).is_file():
        told = list(_karpathy(folder / home.split_file))
    else:
        table = next(folder / name for name in home.tables if (folder / name).is_file())
        told = list(_by_list(dataset, folder, table))
    rows = [_found(dataset, folder, home, *entry) for entry in told]
    if len({row.name for row in rows}) < len(rows) or len(rows) < 2:
        raise GridError(f"{dataset}: {folder}: {len(rows)} test pictures, not two that differ")
    return rows


def _karpathy(path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Name and captions of the pictures whose split is ``test``."""
    try:
        images: list[dict[str, Any]] = json.loads(text_of(path))["images"]
        for image in images:
            if image["split"] == "test":
                name = f"{image['filepath']}/" if image.get("filepath") else ""
                sentences = [str(sentence["raw"]) for sentence in image["sentences"]]
                yield path, f"{name}{image['filename']}", sentences
    except (ValueError, KeyError, TypeError) as error:
        raise GridError(
            f"{path}: not in the form of Karpathy's lists: images with split, filename and"
            f" sentences ({type(error).__name__}: {error})"
        ) from error


def _by_list(dataset: str, folder: Path, table: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Captions of a table for the pictures that a list of the test pictures names."""
    listing = next((folder / name for name in _TEST_LISTS if (folder / name).is_file()), None)
    if listing is None:
        split_file = RETRIEVAL_SETS[dataset].split_file
        wanted = f"{split_file} or {_TEST_LISTS[0]} (a picture's name on each line)"
        advice = f"{table.name} does not say which pictures are tested: put one there."
        raise absent(dataset, wanted, folder, advice)
    captions: dict[str, list[str]] = {}
    for name, caption in _table(table):
        captions.setdefault(name, []).append(caption)
    for line in text_of(listing).split():
        name = line if "." in line else f"{line}.jpg"
        if name not in captions:
            raise GridError(f"{table}: has no captions of {name}, which {listing.name} names")
        yield table, name, captions[name]


def _table(path: Path) -> Iterator[tuple[str, str]]:
    """``1.jpg#0<tab>caption`` of the release, or a table with a head: a name first, the caption
    last, separated by ``|`` or commas."""
    lines = text_of(path).splitlines()
    if path.suffix == ".token":
        for number, line in enumerate(lines, 1):
            name, _, caption = line.partition("\t")
            if "#" not in name or not caption:
                raise GridError(f"{path}, line {number}: needs NAME#NUMBER, a tab and a caption")
            yield name.partition("#")[0], caption
        return
    bar = "|" in lines[0] if lines else False
    for row in list(csv.reader(lines, delimiter="|" if bar else ","))[1:]:
        if len(row) >= 2:
            yield row[0].strip(), row[-1]


def _found(
    dataset: str, folder: Path, home: _Home, table: Path, name: str, sentences: Sequence[str]
) -> Captioned:
    captions = tuple(" ".join(sentence.split()) for sentence in sentences[:CAPTIONS])
    if len(captions) < CAPTIONS or not all(captions):
        said = sum(map(bool, captions))
        raise GridError(f"{table}: {name} has {said} captions of {CAPTIONS}")
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise GridError(f"{table}: {name!r} lies outside of the set")
    for inner in home.pictures:
        if (path := folder / inner / name).is_file():
            return Captioned(name, path, captions)
    raise absent(dataset, name, folder, f"{table.name} speaks of it: unpack all pictures there.")


def _digest(rows: Sequence[Captioned]) -> str:
    files = digest_files({row.name: row.path for row in rows})
    said = [files, *("\n".join((row.name, *row.captions)) for row in rows)]
    return hashlib.sha256("\n".join(said).encode("utf-8", "surrogateescape")).hexdigest()
