"""Candidates of files that hold pictures themselves: WebDataset's shards and Parquet.

Members of an archive are read one after another and never written anywhere.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from victims.errors import UsageError
from victims.ingest.items import MAX_PICTURE_BYTES, Item, Job, Reason, Request, first_line, shown
from victims.ingest.tables import CAPTION_COLUMNS, column, several
from victims.tar_headers import BoundedHeader

PICTURES: Final = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
TEXTS: Final = ("txt", "caption", "json")
_BROKEN: Final = (
    *(tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, MemoryError),
)
_BLOCK: Final = 512
IMAGE_COLUMNS: Final = ("image", "jpg", "png", "webp", "image_bytes", "bytes", "img")
_READ_ROWS: Final = 64

Sample = dict[str, bytes | None]  # by ending; None: too large to be a picture


def tar_items(job: Job, request: Request) -> Iterator[Item]:
    """The samples of a shard; what is wrong with the shard itself is its last candidate."""
    key, sample = "", Sample()
    try:
        with tarfile.open(job.path, "r:*", tarinfo=BoundedHeader) as tar:
            for member in tar:
                # Nobody asks for an earlier one, and a small archive may hold millions.
                tar.members.clear()  # type: ignore[attr-defined]
                name, ending = _split(member.name)
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if name != key:
                    yield from _of_sample(f"{job.name}/{shown(key)}", sample, request)
                    key, sample = name, Sample()
                if ending in PICTURES or ending in TEXTS:
                    file = tar.extractfile(member)
                    large = member.size > MAX_PICTURE_BYTES
                    sample[ending] = None if large or file is None else file.read()
            fault = _after_the_end(tar)
    except _BROKEN as error:
        fault = first_line(error)
    if not fault:
        yield from _of_sample(f"{job.name}/{shown(key)}", sample, request)
    else:
        # The last sample may have lost a half; the shard's record stands for it.
        yield Item(job.name, reason=Reason.UNREADABLE_SHARD, detail=fault)


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


def _of_sample(source: str, sample: Sample, request: Request) -> Iterator[Item]:
    if not sample:
        return
    endings = [ending for ending in sample if ending in PICTURES]
    if not endings:
        yield Item(source, reason=Reason.MISSING_IMAGE, detail=f"only {', '.join(sample)}")
        return
    image = sample[endings[0]]
    if image is None:
        yield Item(source, reason=Reason.TOO_LARGE, detail=endings[0])
        return
    for item in _captions(source, sample, request):
        yield Item(item.source, image, item.caption, item.reason, item.detail)


def _captions(source: str, sample: Sample, request: Request) -> Iterator[Item]:
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
    own = list(several(source, source, captions))
    yield from own[:1] if request.captions == "first" else own


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
    own = list(several(source, source, caption))
    for item in own[:1] if request.captions == "first" else own:
        yield Item(item.source, image, item.caption, item.reason, item.detail)
