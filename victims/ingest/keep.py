"""Which rows of all parts become pairs: no pair twice, and no more than were asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from victims.ingest.items import Reason
from victims.ingest.work import DIGEST_BYTES, rows_path

Mask = npt.NDArray[np.bool_]
_NONE: Final = np.empty((0, DIGEST_BYTES), dtype=np.uint8)
_NO_PAIR: Final = np.empty(0, dtype=bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Of every part which of the pairs that it has pixels of are kept, and how many of its first
    rows were looked at; then what became of all rows. ``pictures`` says of each kept pair which is
    the first kept pair of the same picture, ``equals`` of each pair that an earlier part has which
    pair that is, both by their place among the pairs of all parts that have pixels."""

    pairs: Sequence[Mask]
    pictures: npt.NDArray[np.int64]
    looked_at: Sequence[int]
    seen: int
    skipped: Mapping[str, int]
    notes: Mapping[str, int]
    equals: Mapping[int, int]

    @property
    def total(self) -> int:
        return sum(int(mask.sum()) for mask in self.pairs)

    def taken(self, index: int, reasons: Sequence[str | None]) -> list[bool]:
        """Of the rows of a part that were looked at, which are pairs of the corpus."""
        masks = iter(self.pairs[index].tolist())
        return [reason is None and bool(next(masks)) for reason in reasons[: self.looked_at[index]]]


def choose(work: Path, num_parts: int, limit: int | None) -> Kept:
    """Leave out pairs that an earlier part has, and all that follows the last pair of the limit."""
    pixels, digests, pictures = list[Mask](), [_NONE], [_NONE]
    for index in range(num_parts):
        part = columns_of(work, index, ["digest", "picture", "reason"])
        has = np.array([reason is None for reason in part["reason"]], dtype=bool)
        pixels.append(has)
        digests.append(_rows_of(part["digest"], has))
        pictures.append(_rows_of(part["picture"], has))
    ends = np.cumsum([len(own) for own in digests[1:]])
    equal = first_of_equals(np.concatenate(digests))
    first = np.split(equal == np.arange(len(equal)), ends[:-1])
    pairs, looked_at, left = list[Mask](), list[int](), limit
    for has, mask in zip(pixels, first, strict=True):
        own_pairs, rows = (mask, len(has)) if left is None else _cut(mask, has, left)
        left = None if left is None else left - int(own_pairs.sum())
        pairs.append(own_pairs)
        looked_at.append(rows)
    chosen = np.concatenate([_NO_PAIR, *pairs])
    kept = Kept(
        pairs=pairs,
        pictures=first_of_equals(np.concatenate(pictures)[chosen]),
        looked_at=looked_at,
        seen=sum(looked_at),
        skipped={},
        notes={},
        equals={n: int(equal[n]) for n in np.flatnonzero(equal != np.arange(len(equal))).tolist()},
    )
    return _counted(work, kept)


def _rows_of(digests: Sequence[bytes], has: Mask) -> npt.NDArray[np.uint8]:
    own = b"".join(digest for digest, is_pair in zip(digests, has, strict=True) if is_pair)
    return np.frombuffer(own, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _counted(work: Path, kept: Kept) -> Kept:
    skipped, notes = Counter[str](), Counter[str]()
    for index in range(len(kept.pairs)):
        part = columns_of(work, index, ["reason", "notes"])
        taken = kept.taken(index, part["reason"])
        for is_pair, reason, note in zip(taken, part["reason"], part["notes"], strict=False):
            if is_pair:
                notes.update(note.split())
            else:
                skipped[reason or Reason.DUPLICATE.value] += 1
    return replace(kept, skipped=dict(sorted(skipped.items())), notes=dict(sorted(notes.items())))


def _cut(mask: Mask, has_pixels: Mask, left: int) -> tuple[Mask, int]:
    """A part's mask with its first ``left`` kept pairs alone, and the rows up to the last."""
    if left <= 0:
        return np.zeros_like(mask), 0
    if int(mask.sum()) < left:
        return mask, len(has_pixels)
    last = int(np.flatnonzero(mask)[left - 1])
    cut = mask.copy()
    cut[last + 1 :] = False
    return cut, int(np.flatnonzero(has_pixels)[last]) + 1


def first_of_equals(digest_ND: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Of every row the first of those equal to it."""
    word_N2 = np.ascontiguousarray(digest_ND).view(np.uint64).reshape(-1, 2)
    order = np.lexsort((word_N2[:, 1], word_N2[:, 0]))  # stable: of equal rows the first is first
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (word_N2[order[1:]] != word_N2[order[:-1]]).any(1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def columns_of(work: Path, index: int, names: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of the rows of a part."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(rows_path(work, index)) as file:
        table = file.read(columns=list(names))
    return {name: table[name].to_pylist() for name in names}
