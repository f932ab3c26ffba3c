"""One piece of a source to part files: the pixels of its pairs, and what became of every row.

Safe to run twice, and anywhere that sees the folder: files get their names when they are whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from victims.ingest.below import Unusable
from victims.ingest.items import Item, Job, Reason, Request
from victims.ingest.listing import listed_items
from victims.ingest.pictures import decode, read_picture, strict_pillow
from victims.ingest.shards import parquet_items, tar_items

PARTS: Final = "parts"
DIGEST_BYTES: Final = 16
_MARK: Final = b"part"
_COLUMNS: Final = ("source", "caption", "digest", "picture", "reason", "detail", "notes")


class Stopped(Exception):
    """Whoever asked for a part does not want it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What came of a piece: candidates looked at, pairs kept, and the others by reason."""

    index: int
    seen: int
    kept: int
    skipped: Mapping[str, int] = field(default_factory=dict)


def pixels_path(work: Path, index: int) -> Path:
    return work / PARTS / f"{index:06d}.u8"


def rows_path(work: Path, index: int) -> Path:
    return work / PARTS / f"{index:06d}.parquet"


def settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: what follows relies on it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_part(work: Path, index: int, row_bytes: int) -> Part | None:
    """A part that is there and whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(rows_path(work, index)) as file:
            if not set(_COLUMNS) <= set(file.schema_arrow.names):
                return None  # of an earlier version
            about = json.loads(file.schema_arrow.metadata[_MARK])
        part = Part(index=index, **about)
        if pixels_path(work, index).stat().st_size != part.kept * row_bytes:
            return None
        return part
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None


def items_of(job: Job, request: Request, work: Path) -> Iterator[Item]:
    """The candidates of a piece."""
    if job.fault:
        return iter([Item(job.name, reason=Reason.UNREADABLE_SHARD, detail=job.fault)])
    if request.form == "webdataset":
        return tar_items(job, request)
    return parquet_items(job, request) if request.form == "parquet" else listed_items(job, work)


class _Decoded(NamedTuple):
    """A picture: digests of its file and of its pixels, the pixels, and what was done to it."""

    of_file: bytes
    of_pixels: bytes
    pixels: bytes
    notes: tuple[str, ...]


class _Decoder:
    """Pictures at the size asked for; the captions of one picture, which follow each other, share
    what was decoded."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._asked: bytes | str | None = None
        self._found: _Decoded | Unusable | None = None

    def __call__(self, image: bytes | str) -> _Decoded:
        same = image is self._asked or (isinstance(image, str) and image == self._asked)
        if not same:
            self._asked = image
            try:
                self._found = self._decode(image)
            except Unusable as error:
                self._found = error
        if isinstance(self._found, Unusable):
            raise Unusable(self._found.reason, self._found.detail)
        assert self._found is not None
        return self._found

    def _decode(self, image: bytes | str) -> _Decoded:
        data = read_picture(self._request.root, image) if isinstance(image, str) else image
        if not data:
            raise Unusable(Reason.CORRUPT_IMAGE, "an empty file")
        picture = decode(data, self._request.size)
        pixels = picture.image_CHW.tobytes()
        of_pixels = hashlib.sha256(pixels).digest()[:DIGEST_BYTES]
        return _Decoded(hashlib.sha256(data).digest(), of_pixels, pixels, picture.notes)


def run_part(
    job: Job,
    request: Request,
    work: Path,
    tick: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Part:
    """Work a piece through and leave its files; ``tick`` hears of every candidate."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    decoder, known, kept, seen = _Decoder(request), dict[bytes, str](), 0, 0
    (work / PARTS).mkdir(parents=True, exist_ok=True)
    scratch = work / PARTS / f".{job.index:06d}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        with scratch.open("wb") as file, strict_pillow():
            for item in items_of(job, request, work):
                if stopped():
                    raise Stopped
                tick()
                seen += 1
                digest, picture, notes = b"", b"", tuple[str, ...]()
                reason, detail = item.reason, item.detail
                if reason is None:
                    assert item.image is not None
                    assert item.caption is not None
                    try:
                        found = decoder(item.image)
                        named = hashlib.sha256(found.of_file + item.caption.encode())
                        digest, picture, notes = (
                            named.digest()[:DIGEST_BYTES],
                            found.of_pixels,
                            found.notes,
                        )
                    except Unusable as error:
                        reason, detail = error.reason, error.detail
                    else:
                        if digest in known:
                            reason, detail = Reason.DUPLICATE, f"of {known[digest]}"
                        else:
                            known[digest] = item.source
                            file.write(found.pixels)
                            kept += 1
                row = (item.source, item.caption, digest, picture, reason, detail, " ".join(notes))
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
                if kept == request.limit:
                    break
        settle(scratch)
        scratch.replace(pixels_path(work, job.index))
    finally:
        scratch.unlink(missing_ok=True)
    skipped = Counter(str(reason) for reason in columns["reason"] if reason is not None)
    part = Part(index=job.index, seen=seen, kept=kept, skipped=dict(sorted(skipped.items())))
    _write_rows(columns, part, work)
    return part


def _write_rows(columns: Mapping[str, list[Any]], part: Part, work: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"seen": part.seen, "kept": part.kept, "skipped": part.skipped}
    schema = pa.schema(
        [
            *(("source", pa.string()), ("caption", pa.string()), ("digest", pa.binary())),
            *(("picture", pa.binary()), ("reason", pa.string()), ("detail", pa.string())),
            ("notes", pa.string()),
        ],
        metadata={_MARK: json.dumps(about).encode()},
    )
    scratch = work / PARTS / f".{part.index:06d}-{uuid.uuid4().hex[:8]}.tmp"
    pq.write_table(pa.table(dict(columns), schema=schema), scratch)
    settle(scratch)
    scratch.replace(rows_path(work, part.index))
    settle(work / PARTS)
