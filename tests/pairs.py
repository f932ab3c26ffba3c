"""The embedded world as files of pictures and captions, in every form that `grid ingest` reads."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from grid.ingest import Ingested, ingest
from grid.ingest_parts import How
from victims.ingest.items import Request
from victims.ingest.sources import form_of, root_of
from victims.world import CLASSES, World, render


class Pair(NamedTuple):
    name: str
    png: bytes
    caption: str


@cache
def world_pairs(num_rows: int, size: int = 32, split: str = "suspect") -> list[Pair]:
    """Different pairs of the embedded world, as PNG, which loses nothing."""
    drawn = render(World(size=size), split, num_rows)
    images = [Image.fromarray(np.moveaxis(image, 0, -1)) for image in drawn.image_BCHW]
    return [
        Pair(f"{n:05d}.png", encoded(image), caption)
        for n, (image, caption) in enumerate(zip(images, drawn.captions, strict=True))
    ]


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, pairs: Sequence[Pair], each: int) -> Path:
    """Shards of so many samples."""
    for start in range(0, len(pairs), each):
        members = list[tuple[str, bytes]]()
        for name, png, caption in pairs[start : start + each]:
            members += [(name, png), (f"{Path(name).stem}.txt", caption.encode())]
        write_tar(folder / f"{start // each:03d}.tar", members)
    return folder


def write_pictures(folder: Path, pairs: Sequence[Pair]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        (folder / pair.name).write_bytes(pair.png)
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[str]], separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def every_form(folder: Path, pairs: Sequence[Pair]) -> dict[str, Request]:
    """The same pairs in every form, and how each is asked for."""
    shown = write_pictures(folder / "pictures", pairs)
    rows = [[pair.name, pair.caption] for pair in pairs]
    images = [{"id": n + 7, "file_name": pair.name} for n, pair in enumerate(pairs)]
    notes = [{"image_id": n + 7, "caption": pair.caption} for n, pair in enumerate(pairs)]
    coco = folder / "captions.json"
    coco.write_text(json.dumps({"images": images, "annotations": notes}))
    in_json = list[tuple[str, bytes]]()
    for pair in pairs:
        key = Path(pair.name).stem
        field = json.dumps({"caption": pair.caption, "url": "x"}).encode()
        in_json += [(f"{key}.json", field), (f"{key}.png", pair.png)]
    write_tar(folder / "json" / "0.tar", in_json)
    beside = write_pictures(folder / "beside", pairs)
    for pair in pairs:
        (beside / pair.name).with_suffix(".txt").write_text(pair.caption + "\n")
    listed = write_pictures(folder / "listed", pairs)
    (listed / "captions.txt").write_text("".join(f"{p.name}\t{p.caption}\n" for p in pairs))
    lines = [json.dumps({"file_name": p.name, "text": p.caption}) for p in pairs]
    jsonl = write_pictures(folder / "jsonl", pairs) / "metadata.jsonl"
    jsonl.write_text("\n".join(lines))
    structs = [{"bytes": pair.png, "path": pair.name} for pair in pairs]
    captions = [pair.caption for pair in pairs]
    half = len(pairs) // 2
    (folder / "hf").mkdir()
    for name, cut in {"a": slice(half), "b": slice(half, None)}.items():
        table = pa.table({"image": structs[cut], "text": captions[cut]})
        pq.write_table(table, folder / "hf" / f"{name}.parquet", row_group_size=5)
    plain = pa.table({"jpg": [p.png for p in pairs], "caption": captions})
    pq.write_table(plain, folder / "plain.parquet")
    title = ["filepath", "title"]
    return {
        "csv": request(write_csv(folder / "a.csv", [["image", "caption"], *rows]), root=shown),
        "tsv": request(write_csv(folder / "b.csv", [title, *rows], "\t"), root=shown),
        "shards": request(write_shards(folder / "shards", pairs, 7)),
        "pattern": request(f"{folder}/shards/{{000..{(len(pairs) - 1) // 7:03d}}}.tar"),
        "json": request(folder / "json" / "0.tar"),
        "coco": request(coco, root=shown),
        "beside": request(beside),
        "listed": request(listed),
        "jsonl": request(jsonl, root=folder / "jsonl"),
        "structs": request(folder / "hf"),
        "bytes": request(folder / "plain.parquet"),
    }


def request(source: Path | str, *, root: Path | None = None, **more: Any) -> Request:
    form = more.pop("form", None) or form_of(str(source))
    below = str(root) if root else root_of(str(source), form)
    return Request(source=str(source), form=form, root=below, **{"size": 32, **more})


def ingested(asked: Request, out: Path, *said: list[str], **how: Any) -> Ingested:
    lines = said[0] if said else []
    return ingest(asked, out, How(**how), lines.append)


def labelled_folder(folder: Path, rows: Mapping[str, tuple[str, int]]) -> Path:
    """Splits of the embedded world as an image folder: part -> split and rows."""
    for part, (split, num_rows) in rows.items():
        drawn = render(World(size=32), split, num_rows)
        for n, (image, label) in enumerate(zip(drawn.image_BCHW, drawn.labels, strict=True)):
            path = folder / part / CLASSES[label] / f"{n:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.fromarray(np.moveaxis(image, 0, -1))))
    return folder
