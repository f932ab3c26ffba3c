"""Pairs that `grid ingest` wrote, as corpora: their folder is pointed to, and never copied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from victims.corpora import Corpus, Rows
from victims.draws import numpy_rng
from victims.errors import GridError, UsageError
from victims.keys import Key
from victims.pair_folders import (
    NO_LABEL,
    PAIRS,
    ChosenCaptions,
    ChosenImages,
    Folder,
    open_images,
    pictures_of,
    read_folder,
)
from victims.store import Artefact

ROWS: Final = "rows.npy"
_CHUNK_ROWS: Final = 256


class PairsChunk(NamedTuple):
    """Some pairs, in order."""

    image_BCHW: npt.NDArray[np.uint8]
    labels: Rows
    captions: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestedPairs:
    """``num_rows`` of the ``total`` pairs of a folder, whose pictures are shuffled by ``seed``, the
    pairs of one picture side by side.

    They are counted from the start of this order, ``offset`` rows passed over, or from its end
    where ``behind`` is not None: the last so many rows are passed over, with all of the picture
    that the first of these shows, and then ``offset`` rows. So no picture is on both sides of a
    cut.

    ``digest`` is that of the folder's manifest and says which pairs they are, wherever they lie;
    where ``knows_pictures`` is false it does not say which show one picture, and each counts as
    its own. They have no labels. ``classes`` are what attacks on them may speak of: they are in the
    keys of what attacks make, and not of the pairs.
    """

    name: ClassVar[str] = "ingested_pairs"
    version: ClassVar[int] = 2

    root: str = field(metadata={"keyed": False})
    digest: str
    size: int
    total: int
    split: str
    num_rows: int
    offset: int = 0
    behind: int | None = None
    seed: int = 0
    classes: tuple[str, ...] = field(default=(), metadata={"keyed": False})
    knows_pictures: bool = field(default=True, metadata={"keyed": False})

    def __post_init__(self) -> None:
        stop = self.offset + self.num_rows
        if self.num_rows < 1 or self.offset < 0 or stop + (self.behind or 0) > self.total:
            raise UsageError(
                f"{self.split}: rows {self.offset}..{stop - 1} were asked for, {self.root} has"
                f" {self.total} pairs"
            )

    @property
    def caution(self) -> str | None:
        """What a reader of the board must know of these pairs."""
        if self.knows_pictures:
            return None
        return (
            f"{self.root}: does not say which pairs show one picture, as an earlier version wrote"
            " it: a picture with several captions may be in several splits. Ingest it again."
        )

    @property
    def templates(self) -> Sequence[str]:
        """None: prompts are those of the evaluation sets."""
        return ()

    def rows(self) -> Rows:
        """Which pairs of the folder these are, in their order."""
        picture_N = pictures_of(self.folder())
        order = _order(self.root, self.digest, self.seed)
        if self.behind is None:
            return order[self.offset : self.offset + self.num_rows]
        stop = len(order) - self.behind
        while 0 < stop < len(order) and picture_N[order[stop - 1]] == picture_N[order[stop]]:
            stop -= 1
        stop -= self.offset
        if stop < self.num_rows:
            raise UsageError(
                f"{self.split}: {self.num_rows} rows were asked for, and {max(stop, 0)} are left of"
                f" {self.root}, where no picture is in two splits"
            )
        return order[stop - self.num_rows : stop]

    def next_picture(self, start: int) -> int:
        """The first of these rows from ``start`` on that shows another picture than the row before
        it; their number, if none does."""
        own_N = pictures_of(self.folder())[self.rows()]
        begins = np.flatnonzero(own_N[1:] != own_N[:-1]) + 1
        later = begins[begins >= start]
        return int(later[0]) if len(later) else self.num_rows

    def part(self, start: int, num_rows: int) -> IngestedPairs:
        """So many of these rows from ``start`` on."""
        if self.behind is None:
            return replace(self, offset=self.offset + start, num_rows=num_rows)
        after = self.num_rows - start - num_rows
        return replace(self, offset=self.offset + after, num_rows=num_rows)

    def folder(self) -> Folder:
        """The folder, if it still holds the pairs that were planned with."""
        return _same_folder([self.root], self.digest)

    def chunks(self) -> Iterator[PairsChunk]:
        folder, rows = self.folder(), self.rows()
        images = ChosenImages(open_images(folder), rows)
        captions = ChosenCaptions(folder.root / PAIRS, rows)
        for start in range(0, self.num_rows, _CHUNK_ROWS):
            some = slice(start, start + _CHUNK_ROWS)
            image_BCHW = images[some]
            labels = np.full(len(image_BCHW), NO_LABEL, dtype=np.int64)
            yield PairsChunk(image_BCHW, labels, captions[some])


@lru_cache(maxsize=2)
def _order(root: str, digest: str, seed: int) -> Rows:
    """All pairs, by a drawn order of their pictures and within a picture by their own."""
    picture_N = pictures_of(_same_folder([root], digest))
    first, of_N = np.unique(picture_N, return_inverse=True)
    place = np.empty(len(first), dtype=np.int64)
    place[numpy_rng(seed, IngestedPairs.name).permutation(len(first))] = np.arange(len(first))
    order = np.argsort(place[of_N], kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def _same_folder(roots: Sequence[str], digest: str) -> Folder:
    """The first of some folders that holds the pairs with this digest."""
    faults = list[GridError]()
    for root in dict.fromkeys(roots):
        try:
            folder = read_folder(root)
        except UsageError as error:
            faults.append(
                GridError(
                    f"{error} The pairs of this grid (digest {digest[:16]}) are read from it: every"
                    " node that runs stages must see it at this path."
                )
            )
            continue
        if folder.digest == digest:
            return folder
        faults.append(
            UsageError(
                f"{root}: holds pairs with the digest {folder.digest[:16]}, and {digest[:16]} were"
                " planned with. Plan again, or put those back."
            )
        )
    raise faults[0]


def write_pointer(scratch: Path, spec: IngestedPairs) -> dict[str, Any]:
    """A corpus artefact that holds which rows there are and where they lay, and no pixels."""
    open_images(spec.folder())
    rows = spec.rows()
    np.save(scratch / ROWS, rows, allow_pickle=False)
    return {
        "split": spec.split,
        "rows": spec.num_rows,
        "digest": hashlib.sha256(f"{spec.digest}\n".encode() + rows.tobytes()).hexdigest()[:16],
        "classes": [],
        "templates": [],
        "pairs": {"root": spec.root, "digest": spec.digest},
    }


def open_pointer(artefact: Artefact, root: str) -> Corpus:
    """The corpus that such an artefact points to: in the folder ``root``, as whoever asks has it,
    or else where it lay when the artefact was written. Of no root in particular: ""."""
    meta = artefact.meta
    roots = [place for place in (root, str(meta["pairs"]["root"])) if place]
    folder = _same_folder(roots, str(meta["pairs"]["digest"]))
    rows = np.load(artefact.path(ROWS), allow_pickle=False)
    images = ChosenImages(open_images(folder), rows)
    return Corpus(
        key=Key(artefact.key),
        digest=str(meta["digest"]),
        split=str(meta["split"]),
        # It answers what is asked of a mapped array: its length, shape, and rows by index.
        images_NCHW=cast("npt.NDArray[np.uint8]", images),
        captions=ChosenCaptions(folder.root / PAIRS, rows),
        labels=np.full(len(rows), NO_LABEL, dtype=np.int64),
        classes=[],
        templates=[],
    )
