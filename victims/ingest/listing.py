"""The listing of a source: every candidate of a table in one mapped file, so that any rows of it
can be worked on anywhere. Shards and Parquet need none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from victims.ingest.items import Item, Job, Reason, Request
from victims.ingest.tables import coco_items, csv_items, folder_items

LISTING: Final = "listing.arrow"
_BATCH: Final = 8192


def candidates(request: Request) -> Iterator[Item]:
    """The candidates of a table, in its order."""
    source = Path(request.source)
    made = {
        "csv": lambda: csv_items(source, request),
        "folder": lambda: folder_items(source, request),
        "coco": lambda: coco_items(source),
    }
    items = made[request.form]()
    return _first_captions(items) if request.captions == "first" else items


def _first_captions(items: Iterator[Item]) -> Iterator[Item]:
    """Without the further captions of a picture."""
    seen = set[int]()
    for item in items:
        if item.reason is None:
            named = hashlib.blake2b(os.fsencode(str(item.image)), digest_size=8).digest()
            number = int.from_bytes(named)
            if number in seen:
                continue
            seen.add(number)
        yield item


def write_listing(request: Request, path: Path) -> tuple[int, str]:
    """Write the candidates of a table; their number, and a digest of what they say."""
    import pyarrow as pa

    schema = pa.schema(
        [
            *(("source", pa.string()), ("image", pa.binary()), ("caption", pa.string())),
            *(("reason", pa.string()), ("detail", pa.string())),
        ]
    )
    hashed, rows, items = hashlib.sha256(), 0, candidates(request)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while some := list(islice(items, _BATCH)):
            columns = {
                "source": [item.source for item in some],
                # A path may hold bytes that are no text.
                "image": [_path_bytes(item) for item in some],
                "caption": [item.caption for item in some],
                "reason": [item.reason for item in some],
                "detail": [item.detail for item in some],
            }
            for item in some:
                hashed.update(repr((item.source, item.image, item.caption, item.reason)).encode())
            writer.write_table(pa.table(columns, schema=schema))
            rows += len(some)
    return rows, hashed.hexdigest()


def _path_bytes(item: Item) -> bytes | None:
    return os.fsencode(item.image) if isinstance(item.image, str) else None


def listed_items(job: Job, work: Path) -> Iterator[Item]:
    """The candidates ``start`` to ``stop`` of the listing."""
    import pyarrow as pa

    with pa.memory_map(str(work / LISTING)) as file:
        table = pa.ipc.open_file(file).read_all().slice(job.start, job.stop - job.start)
        for row in table.to_pylist():
            yield Item(
                row["source"],
                None if row["image"] is None else os.fsdecode(row["image"]),
                row["caption"],
                None if row["reason"] is None else Reason(row["reason"]),
                row["detail"],
            )
