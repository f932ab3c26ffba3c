"""Parts to one corpus: what is kept, in the order of the source, and the manifest at the end.

Pixels are moved part by part, so that no more than one part lies on the disk twice. A run that
was stopped goes on where the file of pictures ends.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from victims.errors import GridError
from victims.ingest.items import Reason
from victims.ingest.keep import Kept, Mask, columns_of
from victims.ingest.work import pixels_path, settle
from victims.pair_folders import (
    FORM,
    IMAGES,
    MANIFEST,
    NO_LABEL,
    PAIRS,
    PICTURE,
    SKIPPED,
    open_images,
    read_folder,
)

JOINING: Final = "joining"
_READ_BYTES: Final = 8 << 20


def join(
    out: Path,
    work: Path,
    kept: Kept,
    size: int,
    about: Mapping[str, Any],
    say: Callable[[int], None] = lambda part: None,
) -> str:
    """Write the corpus; its digest. ``about`` goes into the manifest as it is."""
    (work / JOINING).touch()
    settle(work)  # before a part is used up: whoever goes on must know that parts are missing
    hashed = _digest_of(FORM, kept.total, size)
    _join_pixels(out, work, kept, size, hashed.update, say)
    _write_pairs(out, work, kept, hashed.update)
    _write_skipped(out, work, kept)
    settle(out / PAIRS)
    settle(out / SKIPPED)
    digest: str = hashed.hexdigest()
    body = {
        "form": FORM,
        "size": size,
        "rows": kept.total,
        "digest": digest,
        "pictures": int((kept.pictures == np.arange(kept.total)).sum()),
        "most_captions": int(np.bincount(kept.pictures).max(initial=0)),
        "seen": kept.seen,
        "skipped": kept.skipped,
        "notes": kept.notes,
        **about,
    }
    scratch = out / f".{MANIFEST}.tmp"
    scratch.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    settle(scratch)
    settle(out)
    scratch.replace(out / MANIFEST)
    settle(out)
    shutil.rmtree(work, ignore_errors=True)
    return digest


def _digest_of(form: int, rows: int, size: int) -> Any:
    return hashlib.sha256(f"pairs {form}: {rows} x 3 x {size} x {size}\n".encode())


def _join_pixels(
    out: Path,
    work: Path,
    kept: Kept,
    size: int,
    hear: Callable[[Any], None],
    say: Callable[[int], None],
) -> None:
    header = io.BytesIO()
    shape = (kept.total, 3, size, size)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    row_bytes, path = 3 * size * size, out / IMAGES
    with path.open("r+b" if path.exists() else "w+b") as images:
        if images.read(len(header.getvalue())) != header.getvalue():
            images.seek(0)
            images.truncate()
            images.write(header.getvalue())
        at = len(header.getvalue())
        for index, mask in enumerate(kept.pairs):
            own, end = pixels_path(work, index), at + int(mask.sum()) * row_bytes
            if own.exists():
                images.seek(at)
                images.truncate()
                with own.open("rb") as file:
                    for block in _blocks(file, mask, row_bytes):
                        images.write(block)
                        hear(block)
                images.flush()
                os.fsync(images.fileno())
                own.unlink()
            else:
                _hear_again(images, at, end, hear)
            at = end
            say(index + 1)
        images.seek(at)
        images.truncate()


def _blocks(file: IO[bytes], mask: Mask, row_bytes: int) -> Iterator[bytes]:
    """The kept rows of a part, a few MiB at a time."""
    step = max(1, _READ_BYTES // row_bytes)
    for start in range(0, len(mask), step):
        some = mask[start : start + step]
        row_ND = np.frombuffer(file.read(len(some) * row_bytes), np.uint8).reshape(-1, row_bytes)
        yield row_ND[some].tobytes()


def _hear_again(images: IO[bytes], start: int, end: int, hear: Callable[[Any], None]) -> None:
    images.seek(start)
    while start < end:
        block = images.read(min(_READ_BYTES, end - start))
        if not block:
            raise GridError(
                "a part of the pictures is neither in images.npy nor in its own file: delete the"
                " folder and ingest again"
            )
        hear(block)
        start += len(block)


def _write_pairs(out: Path, work: Path, kept: Kept, hear: Callable[[bytes], None]) -> None:
    import pyarrow as pa

    # Offsets of 64 bits: captions of many million pairs are more than 2 GiB.
    schema = pa.schema(
        [
            *(("caption", pa.large_string()), ("label", pa.int64())),
            *((PICTURE, pa.int64()), ("source", pa.large_string())),
        ]
    )
    path, at = out / PAIRS, 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for index in range(len(kept.pairs)):
            part = columns_of(work, index, ["caption", "source", "reason"])
            taken = kept.taken(index, part["reason"])
            caption, source = (
                [value for value, is_pair in zip(part[name], taken, strict=False) if is_pair]
                for name in ("caption", "source")
            )
            own = kept.pictures[at : at + len(caption)]
            hear(_said(caption, own))
            labels = np.full(len(caption), NO_LABEL, dtype=np.int64)
            found = {"caption": caption, "label": labels, PICTURE: own, "source": source}
            at += len(caption)
            writer.write_table(pa.table(found, schema=schema))


def _said(captions: Sequence[str], pictures: npt.NDArray[np.int64] | None) -> bytes:
    """What is digested of some pairs: their captions and, in the forms that have them, which are
    of one picture."""
    texts = [caption.encode() for caption in captions]
    said = [len(text).to_bytes(4, "big") + text for text in texts]
    if pictures is not None:
        numbers = (number.to_bytes(8, "big") for number in pictures.tolist())
        said = [text + number for text, number in zip(said, numbers, strict=True)]
    return b"".join(said)


def _write_skipped(out: Path, work: Path, kept: Kept) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("source", "reason", "detail")
    schema = pa.schema([(name, pa.string()) for name in names])
    firsts = dict.fromkeys(kept.equals.values(), "")
    with pq.ParquetWriter(out / SKIPPED, schema) as writer:
        place = 0  # among the pairs of all parts that have pixels
        for index in range(len(kept.pairs)):
            part = columns_of(work, index, names)
            taken = kept.taken(index, part["reason"])
            at, rows = place, list[tuple[str, str, str]]()
            for source, reason, detail, is_pair in zip(*part.values(), taken, strict=False):
                if is_pair and at in firsts:
                    firsts[at] = source
                if not is_pair:
                    same = "" if reason else f"of {firsts[kept.equals[at]]}"
                    rows.append((source, reason or Reason.DUPLICATE.value, detail or same))
                at += reason is None
            place += len(kept.pairs[index])
            if rows:
                columns = [list(column) for column in zip(*rows, strict=True)]
                writer.write_table(pa.table(columns, schema=schema))


def digest_again(root: str | Path, say: Callable[[int], None] = lambda rows: None) -> str:
    """The digest of what lies in a folder now."""
    import pyarrow as pa

    folder = read_folder(root)
    images, hashed = open_images(folder), _digest_of(folder.form, folder.rows, folder.size)
    step = max(1, _READ_BYTES // (3 * folder.size**2))
    for start in range(0, folder.rows, step):
        hashed.update(np.ascontiguousarray(images[start : start + step]).data)
        say(min(folder.rows, start + step))
    with pa.memory_map(str(folder.root / PAIRS)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            pictures = batch[PICTURE].to_numpy() if folder.knows_pictures else None
            hashed.update(_said(batch["caption"].to_pylist(), pictures))
    return str(hashed.hexdigest())
