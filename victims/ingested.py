"""Pairs that `grid ingest` wrote, as corpora: the folder is pointed to, its pictures never copied.

A folder holds images.npy (uint8 NCHW), pairs.arrow (caption, label, source), skipped.parquet and,
written last, corpus.json, which alone is trusted: without it there is no corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, cast, overload

import numpy as np
import numpy.typing as npt

from victims.corpora import Corpus, Rows
from victims.draws import numpy_rng
from victims.errors import GridError, UsageError
from victims.keys import Key
from victims.keys import digest as digest_of
from victims.store import Artefact

FORM: Final = 2  # 1 did not say which pairs are of one picture
MANIFEST, IMAGES, PAIRS, SKIPPED = "corpus.json", "images.npy", "pairs.arrow", "skipped.parquet"
WORK: Final = "work"  # what a run that has not ended keeps in the folder
NO_LABEL: Final = -1
PICTURE: Final = "picture"  # the first row with the same picture
SPLITS: Final = ("suspect", "clean", "public")
ROWS: Final = "rows.npy"
_CHUNK_ROWS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """An ingested corpus, as its manifest says."""

    root: Path
    digest: str
    size: int
    rows: int
    form: int
    about: Mapping[str, Any]

    @property
    def knows_pictures(self) -> bool:
        """Whether it says which of its pairs are of one picture."""
        return self.form >= 2


def read_folder(root: str | Path) -> Folder:
    """The corpus in a folder. One that is not whole, or not there, is an error that says so."""
    root = Path(root)
    try:
        about = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        form = int(about["form"])
        if form > FORM:
            raise UsageError(
                f"{root}: was written by a newer version of this tool (form {form}, this version"
                f" reads up to {FORM}). Upgrade."
            )
        digest, size, rows = str(about["digest"]), int(about["size"]), int(about["rows"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(_absent(root)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GridError(f"{root / MANIFEST}: is no manifest of ingested pairs ({error})") from error
    return Folder(root=root, digest=digest, size=size, rows=rows, form=form, about=about)


def _absent(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder. Give one that `grid ingest` wrote."
    if (root / WORK).is_dir():
        return f"{root}: `grid ingest` has not ended there. The same command goes on with it."
    return f"{root}: holds no ingested pairs (no {MANIFEST}). `grid ingest SOURCE --out` makes it."


def open_images(folder: Folder) -> npt.NDArray[np.uint8]:
    """All pictures of a folder, mapped; a file of another shape or length is an error."""
    path, wanted = folder.root / IMAGES, (folder.rows, 3, folder.size, folder.size)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GridError(f"{path}: cannot be read ({error}). Ingest again.") from error
    if images.shape != wanted or images.dtype != np.uint8:
        raise GridError(
            f"{path}: has {images.shape} {images.dtype}, and {MANIFEST} says {wanted}. One of them"
            " is of another corpus: put the right file back, or ingest again."
        )
    return cast("npt.NDArray[np.uint8]", images)


class ChosenImages:
    """Some rows of mapped pictures, read when they are asked for: what is indexed is a copy."""

    def __init__(self, images_NCHW: npt.NDArray[np.uint8], rows: Rows) -> None:
        self._images, self._rows = images_NCHW, rows
        self.shape = (len(rows), *images_NCHW.shape[1:])
        self.dtype, self.ndim = images_NCHW.dtype, images_NCHW.ndim

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> npt.NDArray[np.uint8]:
        rows = self._rows[index]
        # Of one row the map gives a view that nobody may write to; of several it makes a copy.
        return (
            np.array(self._images[rows]) if np.ndim(rows) == 0 else np.asarray(self._images[rows])
        )

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return (self[position] for position in range(len(self)))


class ChosenCaptions(Sequence[str]):
    """The captions of some rows, read from the file when the first of them is asked for."""

    def __init__(self, path: Path, rows: Rows) -> None:
        self._path, self._rows = path, rows
        self._texts: list[str] | None = None

    def _read(self) -> list[str]:
        if self._texts is None:
            import pyarrow.feather as feather

            table = feather.read_table(self._path, columns=["caption"], memory_map=True)
            self._texts = table["caption"].take(self._rows).to_pylist()
        return self._texts

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._read()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())


class PairsChunk(NamedTuple):
    """Some pairs, in order."""

    image_BCHW: npt.NDArray[np.uint8]
    labels: Rows
    captions: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestedPairs:
    """Rows ``offset`` to ``offset + num_rows`` of the ``total`` of a folder, shuffled by ``seed``.

    ``digest`` is that of the folder's manifest and says which pairs they are, wherever they lie.
    They have no labels; ``classes`` are those that attacks on them may speak of, and are keyed by
    their digest: there may be a thousand of them.
    """

    name: ClassVar[str] = "ingested_pairs"
    version: ClassVar[int] = 1

    root: str = field(metadata={"keyed": False})
    digest: str
    size: int
    total: int
    split: str
    num_rows: int
    offset: int = 0
    seed: int = 0
    classes: tuple[str, ...] = field(default=(), metadata={"keyed": False})
    vocabulary: str = field(default="", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", digest_of(list(self.classes))[:16])
        stop = self.offset + self.num_rows
        if self.num_rows < 1 or self.offset < 0 or stop > self.total:
            raise UsageError(
                f"{self.split}: rows {self.offset}..{stop - 1} were asked for, {self.root} has"
                f" {self.total} pairs"
            )

    @property
    def templates(self) -> Sequence[str]:
        """None: prompts are those of the evaluation sets."""
        return ()

    def rows(self) -> Rows:
        """Which pairs of the folder these are, in their order."""
        order = numpy_rng(self.seed, self.name).permutation(self.total)
        return order[self.offset : self.offset + self.num_rows].astype(np.int64)

    def folder(self) -> Folder:
        """The folder, if it still holds the pairs that were planned with."""
        return _same_folder(self.root, self.digest)

    def chunks(self) -> Iterator[PairsChunk]:
        folder, rows = self.folder(), self.rows()
        images = ChosenImages(open_images(folder), rows)
        captions = ChosenCaptions(folder.root / PAIRS, rows)
        for start in range(0, self.num_rows, _CHUNK_ROWS):
            some = slice(start, start + _CHUNK_ROWS)
            image_BCHW = images[some]
            labels = np.full(len(image_BCHW), NO_LABEL, dtype=np.int64)
            yield PairsChunk(image_BCHW, labels, captions[some])


def _same_folder(root: str, digest: str) -> Folder:
    try:
        folder = read_folder(root)
    except UsageError as error:
        raise GridError(
            f"{error} The pairs of this grid (digest {digest[:16]}) are read from it: every node"
            " that runs stages must see it at this path."
        ) from error
    if folder.digest != digest:
        raise UsageError(
            f"{root}: holds pairs with the digest {folder.digest[:16]}, and {digest[:16]} were"
            " planned with. Plan again, or put those back."
        )
    return folder


def write_pointer(scratch: Path, spec: IngestedPairs) -> dict[str, Any]:
    """A corpus artefact that holds which rows there are and where they lie, and no pixels."""
    open_images(spec.folder())
    rows = spec.rows()
    np.save(scratch / ROWS, rows, allow_pickle=False)
    return {
        "split": spec.split,
        "rows": spec.num_rows,
        "digest": hashlib.sha256(f"{spec.digest}\n".encode() + rows.tobytes()).hexdigest()[:16],
        "classes": list(spec.classes),
        "templates": [],
        "pairs": {"root": spec.root, "digest": spec.digest},
    }


def points_elsewhere(artefact: Artefact, spec: IngestedPairs) -> bool:
    """Whether an artefact was written when the same pairs lay in another folder."""
    return bool(artefact.meta["pairs"]["root"] != spec.root)


def open_pointer(artefact: Artefact) -> Corpus:
    """The corpus that such an artefact points to."""
    meta = artefact.meta
    folder = _same_folder(str(meta["pairs"]["root"]), str(meta["pairs"]["digest"]))
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
        classes=list(meta["classes"]),
        templates=[],
    )
