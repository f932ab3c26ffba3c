"""Splits of labelled image sets on disk as corpora. A picture's caption is its class's name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from victims.corpora import Rows
from victims.draws import numpy_rng
from victims.errors import UsageError, unknown
from victims.fingerprints import digest_files
from victims.label_readers import DATASETS
from victims.picture_files import Found, Part, fit

# In the order in which they are cut from the training pictures.
_FROM_TRAINING: Final = ("tuning", "clean", "public", "suspect")
SPLITS: Final = (*_FROM_TRAINING, "report")
_DEFAULT_SHARE: Final = 20  # tuning and clean take one row in so many, unless said otherwise
_CHUNK_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class LabelledChunk:
    """Some pictures with their labels and the names of these."""

    image_BCHW: npt.NDArray[np.uint8]
    labels: Rows
    captions: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFiles:
    """Rows ``offset`` to ``offset + num_rows`` of a set's pictures, shuffled by ``seed``.

    The report split shuffles the test pictures, every other split the training pictures.
    ``fingerprint`` is the digest of all files of the set, which must still be the same when the
    pictures are read; ``size`` is the side they are resized and cropped to. `labelled_splits`
    makes these so that they are disjoint.
    """

    name: ClassVar[str] = "labelled_files"
    version: ClassVar[int] = 1

    dataset: str
    root: str = field(metadata={"keyed": False})
    fingerprint: str
    size: int
    split: str
    num_rows: int
    offset: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown("labelled data set", self.dataset, DATASETS)
        if self.split not in SPLITS:
            raise unknown("split of a labelled data set", self.split, SPLITS)
        if self.size < 1 or self.num_rows < 1 or self.offset < 0:
            raise UsageError(
                f"{self.dataset}, {self.split}: size and num_rows must be positive and offset not "
                f"negative; got {self.size}, {self.num_rows} and {self.offset}"
            )

    @property
    def classes(self) -> Sequence[str]:
        return _classes(self.dataset, self.root, self.fingerprint)

    @property
    def templates(self) -> Sequence[str]:
        return ("{}",)

    def chunks(self) -> Iterator[LabelledChunk]:
        found = find_set(self.dataset, self.root)
        if digest_of(found) != self.fingerprint:
            raise UsageError(
                f"{self.dataset}: the files in {self.root} are not those that were planned with "
                f"(fingerprint {self.fingerprint[:16]}): plan again, or put those files back."
            )
        part = _part(found, self.split)
        rows = self._rows(len(part.labels))
        for start in range(0, self.num_rows, _CHUNK_ROWS):
            some = rows[start : start + _CHUNK_ROWS]
            images = [fit(picture, self.size) for picture in part.pictures(some)]
            labels = part.labels[some]
            yield LabelledChunk(
                np.stack(images), labels, [found.classes[n] for n in labels.tolist()]
            )

    def _rows(self, total: int) -> Rows:
        """Which of the ``total`` pictures these are, in their order."""
        stop = self.offset + self.num_rows
        if stop > total:
            raise UsageError(
                f"{self.dataset}, {self.split}: rows {self.offset}..{stop - 1} were asked for, "
                f"{self.root} has {total} such pictures"
            )
        part = "test" if self.split == "report" else "train"
        order = numpy_rng(self.seed, self.name, part).permutation(total)
        return order[self.offset : stop].astype(np.int64)


def fingerprint(dataset: str, root: str | Path) -> str:
    """Digest of the contents of all files that a set consists of, wherever it lies."""
    return digest_of(find_set(dataset, root))


def digest_of(found: Found) -> str:
    """Digest of a set's files, and of the names of its classes where these are in none of them."""
    return with_names(digest_files(found.files), found)


def with_names(digest: str, found: Found) -> str:
    """A digest of files, and of class names that are in none of a set's files."""
    if not found.names_apart:
        return digest
    said = "\n".join([digest, *found.classes])
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()


def labelled_splits(
    dataset: str,
    root: str | Path,
    size: int,
    *,
    suspect: int | None = None,
    clean: int | None = None,
    public: int = 0,
    tuning: int | None = None,
    report: int | None = None,
    seed: int = 0,
) -> dict[str, LabelledFiles]:
    """Disjoint splits of a set by name, counted in rows; a split of no rows is left out.

    ``report`` is the test set (default: all of it). The training pictures are shuffled once by
    ``seed`` and cut into tuning and clean (default: 5 % each, rounded down), public (default:
    none) and suspect (default: the rest). No picture is decoded.
    """
    found = find_set(dataset, root)
    total, tested = len(_part(found, "tuning").labels), len(_part(found, "report").labels)
    share = total // _DEFAULT_SHARE
    counts = {
        "tuning": share if tuning is None else tuning,
        "clean": share if clean is None else clean,
        "public": public,
    }
    rest = total - sum(counts.values())
    counts["suspect"] = rest if suspect is None else suspect
    counts["report"] = tested if report is None else report
    _check(f"{dataset} in {root}", counts, total, tested)
    offset, splits, digest = 0, dict[str, LabelledFiles](), digest_of(found)
    for split, num_rows in counts.items():
        if num_rows:
            splits[split] = LabelledFiles(
                dataset=dataset,
                root=str(absolute(root)),
                fingerprint=digest,
                size=size,
                split=split,
                num_rows=num_rows,
                offset=0 if split == "report" else offset,
                seed=seed,
            )
        offset += num_rows
    return splits


def _check(where: str, counts: dict[str, int], total: int, tested: int) -> None:
    cut = {split: counts[split] for split in _FROM_TRAINING}
    asked = " + ".join(f"{split} {count}" for split, count in cut.items())
    held_out = cut["tuning"] + cut["clean"] + cut["public"]
    # The rest for suspect may have come out negative: then too much is held out.
    needed = held_out + max(cut["suspect"], 0)
    if min(cut["tuning"], cut["clean"], cut["public"]) >= 0 and needed > total:
        raise UsageError(
            f"{where}: {asked} = {needed} rows of {total} training pictures: ask for "
            f"{needed - total} fewer."
        )
    if counts["report"] > tested:
        raise UsageError(f"{where}: report {counts['report']} rows of {tested} test pictures")
    if min(counts.values()) < 0 or not counts["suspect"] or not counts["report"]:
        raise UsageError(
            f"{where}: {asked}, report {counts['report']}: none may be negative, and suspect and "
            f"report need rows. There are {total} training and {tested} test pictures."
        )


def find_set(dataset: str, root: str | Path) -> Found:
    if dataset not in DATASETS:
        raise unknown("labelled data set", dataset, DATASETS)
    return DATASETS[dataset](absolute(root))


def absolute(root: str | Path) -> Path:
    return Path(root).expanduser().absolute()


@lru_cache
def _classes(dataset: str, root: str, fingerprint: str) -> tuple[str, ...]:
    """Asked for often, and a set may have 100,000 files; another fingerprint asks again."""
    return find_set(dataset, root).classes


def _part(found: Found, split: str) -> Part:
    return found.test() if split == "report" else found.train()
