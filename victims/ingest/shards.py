"""Candidates of files that hold pictures themselves: WebDataset's shards and Parquet.

Members of an archive are read one after another and never written anywhere.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from victims.errors import UsageError
from victims.ingest.items import MAX_PICTURE_BYTES, Item, Job, Reason, Request, first_line, shown
from victims.ingest.tables import CAPTION_COLUMNS, column, several, usable
from victims.tar_headers import BoundedHeader

PICTURES: Final = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
TEXTS: Final = ("txt", "caption", "json")
_BROKEN: Final = (
    *(tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, MemoryError),
)
_BLOCK: Final = 512
IMAGE_COLUMNS: Final = ("image", "jpg", "png", "webp", "image_bytes", "bytes", "img")
_READ_ROWS: Final = 64
_DOTTED: Final = "a sample's name ends at its first dot, and what follows is no ending of a picture"


@dataclass(slots=True)
class _Sample:
    """What shares a key. Of members that are read their bytes, or None: too large; of all others
    their endings, so that a sample that is no pair can say what it has."""

    key: str
    read: dict[str, bytes | None] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)  # by ending: why it is not read

    def has(self, ending: str) -> bool:
        return ending in self.read or ending in self.others


def tar_items(job: Job, request: Request) -> Iterator[Item]:
    """The samples of a shard; what is wrong with the shard itself is its last candidate."""
    sample, fault = None, ""
    try:
        with tarfile.open(job.path, "r:*", tarinfo=BoundedHeader) as tar:
            for member in tar:
                # Nobody asks for an earlier one, and a small archive may hold millions.
                tar.members.clear()  # type: ignore[attr-defined]
                key, ending = _split(member.name)
                if member.isdir() or PurePosixPath(member.name).name.startswith("."):
                    continue
                # As in open_clip's reader, an ending that is there already begins another sample:
                # an archive that was appended to may hold two of one key, one behind the other.
                if sample is None or key != sample.key or sample.has(ending):
                    yield from _of_sample(job, sample, request)
                    sample = _Sample(key)
                _add(sample, ending, member, tar)
            fault = _after_the_end(tar)
    except _BROKEN as error:
        fault = first_line(error)
    if not fault:
        yield from _of_sample(job, sample, request)
    else:
        # The last sample may have lost a half; the shard's record stands for it.
        yield Item(job.name, reason=Reason.UNREADABLE_SHARD, detail=fault)


def _add(sample: _Sample, ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """A member to its sample. Of pictures the first is the sample's, and no other is read."""
    if not member.isfile():
        sample.others[ending] = "is a link, or no file"
    elif ending in PICTURES and (first := _picture_of(sample)):
        sample.others[ending] = f"the picture of the sample is its {first}"
    elif ending in PICTURES or ending in TEXTS:
        file = tar.extractfile(member)
        large = member.size > MAX_PICTURE_BYTES
        sample.read[ending] = None if large or file is None else file.read()
    else:
        sample.others[ending] = "an ending that is not read"


def _picture_of(sample: _Sample) -> str:
    return next((ending for ending in sample.read if ending in PICTURES), "")


def _split(name: str) -> tuple[str, str]:
    """A member's key, up to the first dot of its file's name, and what follows, in lower case."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _after_the_end(tar: tarfile.TarFile) -> str:
    """What follows the last member, if it is not the mark of an archive's end."""
    raw: IO[bytes] | None = tar.fileobj  # type: ignore[assignment]
    assert raw is not None
    raw.seek(tar.offset)
    block = raw.read(_BLOCK)
    if len(block) < _BLOCK:
        return "the archive ends without its mark: it was cut short"
    return "" if not any(block) else f"what follows byte {tar.offset} is no member"


def _of_sample(job: Job, sample: _Sample | None, request: Request) -> Iterator[Item]:
    if sample is None:
        return
    source, first = f"{job.name}/{shown(sample.key)}", _picture_of(sample)
    if not first:
        yield from _without_picture(source, sample)
        return
    image = sample.read[first]
    if image is None:
        yield Item(source, reason=Reason.TOO_LARGE, detail=first)
    else:
        for item in _captions(source, sample.read, request):
            yield Item(item.source, image, item.caption, item.reason, item.detail)
    for ending, why in sample.others.items():
        if ending in PICTURES:
            yield Item(f"{source}.{ending}", reason=Reason.DUPLICATE_MEMBER, detail=why)


def _without_picture(source: str, sample: _Sample) -> Iterator[Item]:
    """A candidate for each name that may be meant as a picture, or else one for the sample."""
    dotted = [ending for ending in sample.others if ending.rpartition(".")[2] in PICTURES]
    for ending in dotted:
        why = sample.others[ending] if ending in PICTURES else _DOTTED
        yield Item(f"{source}.{shown(ending)}", reason=Reason.MISSING_IMAGE, detail=why)
    if not dotted:
        there = ", ".join(shown(ending) or "no ending" for ending in (*sample.read, *sample.others))
        yield Item(source, reason=Reason.MISSING_IMAGE, detail=f"only {there}")


def _captions(source: str, sample: Mapping[str, bytes | None], request: Request) -> Iterator[Item]:
    """Candidates with the captions of a sample, of its text or of a field of its JSON."""
    text = None if request.caption_column else sample.get("txt", sample.get("caption"))
    try:
        if text is not None:
            yield from several(source, source, text.decode("utf-8-sig"))
            return
        held = sample.get("json")
        found = json.loads(held) if held is not None else {}
    except UnicodeDecodeError as error:
        yield Item(source, reason=Reason.CAPTION_NOT_UTF8, detail=first_line(error))
        return
    except (ValueError, RecursionError) as error:
        yield Item(source, reason=Reason.MALFORMED_ROW, detail=first_line(error))
        return
    wanted = (request.caption_column,) if request.caption_column else CAPTION_COLUMNS
    fields = found if isinstance(found, dict) else {}
    captions = next((fields[name] for name in wanted if name in fields), None)
    yield from usable(several(source, source, captions), request)


def parquet_columns(path: Path, names: list[str], request: Request) -> tuple[str, str]:
    """The columns of a Parquet file that hold pictures and captions."""
    image = column(path, names, request.image_column, IMAGE_COLUMNS, "image")
    return image, column(path, names, request.caption_column, CAPTION_COLUMNS, "caption")


def parquet_items(job: Job, request: Request) -> Iterator[Item]:
    """The rows of some row groups: bytes, or a struct of bytes and path, as HuggingFace has it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(job.path) as file:
            names = parquet_columns(Path(job.path), file.schema_arrow.names, request)
            groups = range(job.start, job.stop)
            row = sum(file.metadata.row_group(group).num_rows for group in range(job.start))
            first, last = row + job.skip, row + job.skip + job.take
            batches = file.iter_batches(_READ_ROWS, row_groups=list(groups), columns=list(names))
            for batch in batches:
                begin = min(len(batch), max(0, first - row))
                end = min(len(batch), last - row) if job.take else len(batch)
                some, row = batch.slice(begin, max(0, end - begin)), row + begin
                for image, caption in zip(*(_values(some[n]) for n in names), strict=True):
                    yield from _of_row(f"{job.name}#{row}", image, caption, request)
                    row += 1
                if job.take and row >= last:
                    return
    except (OSError, pa.ArrowException) as error:
        detail = f"row groups {job.start}..{job.stop - 1}: {first_line(error)}"
        yield Item(job.name, reason=Reason.UNREADABLE_SHARD, detail=detail)


def _values(column: Any) -> Iterator[Any]:
    """The values of a column; text that is no UTF-8 is kept as its bytes."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield value.as_buffer().to_pybytes()


def _of_row(source: str, image: Any, caption: Any, request: Request) -> Iterator[Item]:
    if isinstance(image, dict):
        held, path = image.get("bytes"), image.get("path")
        image = held if held is not None else path
    if image is None:
        yield Item(source, reason=Reason.MISSING_IMAGE, detail="empty")
        return
    if not isinstance(image, bytes | str):
        raise UsageError(f"{source}: a picture is bytes or a path, not {type(image).__name__}")
    if isinstance(caption, bytes):
        yield Item(source, reason=Reason.CAPTION_NOT_UTF8, detail="caption")
        return
    for item in usable(several(source, source, caption), request):
        yield Item(item.source, image, item.caption, item.reason, item.detail)
