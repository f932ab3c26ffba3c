"""The folder that `grid ingest` writes, and rows of it that are read when they are asked for.

It holds images.npy (uint8 NCHW), pairs.arrow (caption, label, picture, source), skipped.parquet
and, written last, corpus.json, which alone is trusted: without it there is no corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast, overload

import numpy as np
import numpy.typing as npt

from victims.corpora import Rows
from victims.errors import GridError, UsageError

FORM: Final = 2  # 1 did not say which pairs are of one picture
MANIFEST, IMAGES, PAIRS, SKIPPED = "corpus.json", "images.npy", "pairs.arrow", "skipped.parquet"
WORK: Final = "work"  # what a run that has not ended keeps in the folder
NO_LABEL: Final = -1
PICTURE: Final = "picture"  # the first row with the same picture


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


def pictures_of(folder: Folder) -> Rows:
    """Of every pair the first of the same picture; itself, where the folder does not say."""
    if not folder.knows_pictures:
        return np.arange(folder.rows, dtype=np.int64)
    return _pictures(folder.root / PAIRS, folder.digest, folder.rows)


@lru_cache(maxsize=2)
def _pictures(path: Path, digest: str, rows: int) -> Rows:
    import pyarrow as pa
    import pyarrow.feather as feather

    try:
        column = feather.read_table(path, columns=[PICTURE], memory_map=True)[PICTURE]
        found: Rows = column.to_numpy().astype(np.int64)
    except (OSError, pa.ArrowException) as error:
        raise GridError(f"{path}: cannot be read ({error}). Ingest again.") from error
    own = np.arange(len(found))
    if len(found) != rows or (found < 0).any() or (found > own).any():
        raise GridError(f"{path}: its column {PICTURE!r} is of another corpus. Ingest again.")
    found.setflags(write=False)
    return found


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
